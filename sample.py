"""
Compose with a trained model:  python sample.py --ckpt out/rwkv.pt

Writes out/rwkv.mid, .wav (listen) and .svg (look); with --num_samples, out/rwkv-1.mid and so on, the best first.
"""

import argparse
import math
import re
import secrets
import time
import zlib
from pathlib import Path

import numpy as np
import torch

import data
import render
from data import UserError
from model import CheckpointError, load_checkpoint
from train import boolean, exit_with, number, pick_device


def key_signature(text):
    """'D' -> 2, 'F#m' -> 3, 'Bb' -> -2: sharps in the signature, for argparse."""
    if not re.fullmatch('[A-G][#b]?m?', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no key: write C, F#, Bb, Am, C#m, ...')
    return data.sharps(text)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog='example: python sample.py --ckpt out/rwkv.pt --num_samples=4 --key=D --tempo=180')
    parser.error = lambda message: exit_with(message + '; --help lists the options')

    def group(title, *options):
        g = parser.add_argument_group(title)
        for name, default, kind, text in options:
            kind = kind if isinstance(kind, dict) else dict(type=kind)
            g.add_argument(f'--{name}', default=default, help=text, **kind)

    group('the model',
          ('ckpt', Path('out/rwkv.pt'), Path, 'checkpoint written by train.py (default: out/rwkv.pt)'),
          ('device', 'cpu', str, 'cpu, cuda, ... (default: cpu)'))
    group('composing',
          ('num_samples', 1, number(int, 1, 1000), 'tunes to write, the best first (default: 1)'),
          ('best_of', 8, number(int, 1, 1000), 'tunes composed, side by side, for each that is written (default: 8)'),
          ('length', 256.0, number(float, 1, 1e6), 'beats at most; the model may end the tune before (default: 256)'),
          ('min_length', 16.0, number(float, 0, 1e6), 'beats at least, before the model may end the tune (default: 16)'),
          ('temperature', 1.0, number(float, 0.001, 100), 'above 1 is bolder, below 1 safer (default: 1)'),
          ('top_p', 0.98, number(float, 0.01, 1), 'nucleus: choose among the likeliest that hold so much probability (default: 0.98)'),
          ('seed', None, number(int, 0, 2 ** 63 - 1), 'the same seed gives the same files (default: a new one, which is printed)'),
          ('prompt', None, Path, 'a .mid or .abc file to continue'),
          ('prompt_beats', math.inf, number(float, 0), 'read so many beats of the prompt (default: all)'),
          ('no_prompt', False, dict(type=boolean, nargs='?', const=True, metavar='BOOL'), 'leave the prompt out of what is written'))
    group('what is written',
          ('out', None, Path, 'path of the .mid (default: that of the checkpoint)'),
          ('key', None, key_signature, 'move the tune to this key signature: C, F#, Bb, Am, ... (default: where it was composed)'),
          ('check_copies', True, dict(type=boolean, nargs='?', const=True, metavar='BOOL'),
           'tell the longest stretch that stands in a training song, too (default: True)'),
          ('tempo', None, number(float, 4, 1000), 'beats a minute (default: that of the prompt or of the training tunes)'))
    return parser.parse_args()


def key_shift(notes, sharps, common_key):
    """Semitones, -6..5, to the key signature of so many sharps from the one the tune is in (none with common_key)."""
    return (7 * (sharps - (0 if common_key else data.estimate_sharps(notes))) + 6) % 12 - 6


def read_prompt(path, beats):
    """The first tune in a .mid or .abc file, cut after so many beats, as a data.Song."""
    if path.suffix.lower() == '.abc':
        songs = data.read_abc(path)
        if not songs:
            raise UserError(f'{path} has no tune that can be read: give another --prompt')
        song = songs[0]
    else:
        song = data.read_midi(path)
    notes = song.notes[song.notes[:, 1] < beats]
    if not len(notes):
        raise UserError(f'{path} has no notes in its first {beats:g} beats: give another --prompt or more --prompt_beats')
    notes[:, 2] = np.minimum(notes[:, 2], beats)
    return song._replace(notes=notes)


def beats_per_bar(notes):
    """3 or 4, whichever the chords keep to: the share of their strikes that fall on a bar line, against chance."""
    onsets, count = np.unique(notes[:, 1].round(3), return_counts=True)
    chords = onsets[count >= 3]
    on_line = {bar: (np.abs((chords + 0.1) % bar) < 0.2).mean() * bar if len(chords) else 0 for bar in (4, 3)}
    return max(on_line, key=on_line.get)


def intervals(notes, steps_per_beat):
    """
    A tune as one number a step, the same in every transposition: 0 where nothing is struck, else a name (checksum) of the
    keys that are, counted from the highest key of the strike before. It tells what is struck when, not how long it is held.
    """
    steps = np.floor(notes * [1, steps_per_beat, steps_per_beat] + 0.5).astype(int)
    tune, top = np.zeros(steps[:, 1].max(initial=-1) + 1, np.int64), None
    for t in np.unique(steps[:, 1]):
        struck = np.sort(steps[steps[:, 1] == t, 0])
        tune[t] = 1 + zlib.crc32((struck - (struck[-1] if top is None else top)).tobytes())
        top = struck[-1]
    return tune


def longest_copy(tune, book):
    """Steps in the longest stretch that stands both in tune and in book, two arrays of intervals(). The stretch begins
    after its first strike, which is named by the one before it."""
    longest, run = 0, np.zeros(len(book) + 1, np.int32)     # run[j]: steps of the match that ends with book[j - 1]
    for name in tune:
        run[1:] = (run[:-1] + 1) * (book == name)
        longest = max(longest, run.max())
    return int(longest)


def training_book(meta):
    """The training songs of a checkpoint, as intervals() with a fence behind each; and where they are. None if gone."""
    path, grid = Path(meta['data']), (meta['steps_per_beat'], meta['onsets'])
    if meta['data'] == 'nottingham':
        path = data.TUNES if meta['source'].startswith(data.TUNES.name) else data.NOTTINGHAM
    try:
        songs = data.load(path, *grid, log=lambda line: None).songs['train']
    except UserError:
        return None, path
    book = []
    for song in songs:      # seen through the same frames as what is composed
        book += [intervals(data.to_notes(data.to_frames(song.notes, *grid), *grid), grid[0]), np.array([-1])]
    return np.concatenate(book), path


def compose(args):
    device = pick_device(args.device)
    model, checkpoint = load_checkpoint(args.ckpt, device)
    meta = checkpoint['meta']
    grid = meta['steps_per_beat'], meta['onsets']
    if model.config.n_units != data.units(meta['onsets']):
        raise CheckpointError(f'{args.ckpt} has {model.config.n_units} units in a frame, not those of a piano: give another --ckpt')
    length = math.ceil(args.length * meta['steps_per_beat'])
    if length > data.MAX_FRAMES:
        raise UserError(f'--length={args.length:g} is more than {data.MAX_FRAMES:,} frames: ask for '
                        f'{data.MAX_FRAMES // meta["steps_per_beat"]:,} beats or less')
    if args.num_samples * args.best_of * (length + 4 * model.config.lookback) > 200 * data.MAX_FRAMES:       # 3.5 GB
        raise UserError(f'--num_samples={args.num_samples} times --best_of={args.best_of} times --length={args.length:g} is '
                        f'more than {200 * data.MAX_FRAMES:,} frames at once: ask for fewer or shorter tunes')
    out = args.out or args.ckpt.with_suffix('.mid')
    if not out.parent.is_dir():
        raise UserError(f'there is no folder {out.parent} for {out.name}: make it, or give another --out')
    seed = secrets.randbits(32) if args.seed is None else args.seed
    generator = torch.Generator(device).manual_seed(seed)
    print(f'{args.ckpt}: {model.config.arch}, trained on {meta["source"]}, valid {checkpoint["valid"]:.4f} nats/frame')

    # the prompt: a boundary frame, where every tune starts, and the person's own beginning if there is one
    opening, moved, usual_tempo = np.empty((0, 3)), 0, meta['tempo']
    if args.prompt:
        song = read_prompt(args.prompt, args.prompt_beats)
        moved, usual_tempo = data.common_key_shift(song) if meta['common_key'] else 0, song.tempo
        opening = song.notes + [moved, 0, 0]
    frames = data.to_frames(opening, *grid)
    boundary = np.zeros((1, model.config.n_units), np.uint8)
    boundary[0, -1] = 1
    prompt = torch.from_numpy(np.concatenate((boundary, frames))).to(device)
    prompt = prompt.expand(args.num_samples * args.best_of, -1, -1)

    torch.set_num_threads(1)        # a frame is too little work to share between cores
    start = time.perf_counter()
    composed = model.compose(prompt, length, args.temperature, args.top_p, generator,
                             at_least=math.ceil(args.min_length * meta['steps_per_beat']))
    seconds, count = time.perf_counter() - start, sum(map(len, composed))
    print(f'seed {seed}: {len(composed)} x {max(map(len, composed))} frames in {seconds:.1f} s, '
          f'{count / seconds:,.0f} frames a second')
    # the model's own opinion, nats a frame: far above what real tunes get is noise, far below is one bar over and over;
    # and first come the tunes that it ended itself
    scored = [(model.nats_per_frame(prompt[i], tune), i) for i, tune in enumerate(composed) if len(tune)]
    ranked = sorted(scored, key=lambda score: (len(composed[score[1]]) == length, abs(score[0] - checkpoint['valid'])))
    ranked = ranked[:args.num_samples]
    if not ranked:
        raise UserError(f'the model ended the tune at once: use another --seed{" or a shorter prompt" * bool(args.prompt)}')

    book, path = training_book(meta) if args.check_copies else (None, None)
    for place, (nats, i) in enumerate(ranked, 1):
        tune = composed[i].cpu().numpy()
        copied = None if book is None else longest_copy(intervals(data.to_notes(tune, *grid), grid[0]), book) / grid[0]
        whole, beats = (tune, 0.0) if args.no_prompt else (np.concatenate((frames, tune)), len(frames) / grid[0])
        notes = data.to_notes(whole, *grid)
        notes[:, 0] += key_shift(notes, args.key, meta['common_key']) if args.key is not None else -moved
        notes = notes[(notes[:, 0] >= 0) & (notes[:, 0] < data.KEYS)]
        name = out if args.num_samples == 1 else out.with_name(f'{out.stem}-{place}{out.suffix}')
        bar, tempo = beats_per_bar(notes), args.tempo or usual_tempo
        data.write_midi(notes, name, tempo)
        render.write_svg(notes, name.with_suffix('.svg'), bar, beats, name.stem)
        sound = bool(notes[:, 2].max(initial=0) * 60 / tempo <= render.LONGEST)
        if sound:
            render.write_wav(notes, name.with_suffix('.wav'), tempo, bar)
        print(f'{name} ({".wav, " * sound}.svg): {nats:.3f} nats/frame, {len(notes)} notes, {len(tune) / grid[0]:g} beats'
              + (f', at most {copied:g} beats in a row copied' if book is not None else ''))
        if place == 1:
            print(render.terminal_roll(notes))
    if args.check_copies:
        print(f'copies are looked for in the training songs of {path}, in every transposition' if book is not None else
              f'whether it copied is not known, since {path} is not there any more')


def main():
    try:
        compose(parse_args())
    except (UserError, CheckpointError) as e:
        exit_with(e)


if __name__ == '__main__':
    main()
