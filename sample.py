"""Compose with a trained model:  python sample.py --ckpt out/rwkv.pt

Writes out/rwkv.mid (play, edit), .abc (sheet music), .wav (listen) and .svg (look); with --num_samples, out/rwkv-1.mid
and so on, as varied as songs are.
"""

import argparse
import math
import re
import secrets
import time
from pathlib import Path

import numpy as np
import torch

import compare
import data
import notation
import render
from data import FLAG
from data import add_options
from data import number
from model import load_checkpoint
from notation import KEYS
from notation import Song
from notation import UserError

SUFFIXES = ('.mid', '.abc', '.wav', '.svg')
ROUNDS = 8              # how often more tunes are composed for those that --metre asks for


def key_signature(text):
    """An argparse type: 'D' -> (2, False), 'F#m' -> (3, True): sharps in the signature, and is it minor?"""
    if not re.fullmatch('[A-G][#b]?m?', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no key: write C, F#, Bb, Am, C#m, ...')
    return notation.sharps(text), text.endswith('m')


def parse_args():
    parser = data.make_parser(__doc__, 'python sample.py --num_samples=4 --metre=6/8 --key=D --tempo=180')
    add_options(
        parser, 'the model',
        ('ckpt', Path('out/rwkv.pt'), Path, 'checkpoint written by train.py'),
        ('device', 'cpu', str, 'cpu, cuda, ...'))
    add_options(
        parser, 'composing',
        ('num_samples', 1, number(int, 1, 1000), 'tunes to write, as varied as songs are'),
        ('best_of', 8, number(int, 1, 1000), 'tunes composed for each that is written'),
        *compare.COMPOSING,
        ('metre', None, dict(choices=sorted(notation.BARS)), 'keep only tunes in this metre (default: any)'),
        ('seed', None, number(int, 0, 2 ** 63 - 1), 'the same seed, the same files (default: a new one, printed)'),
        ('prompt', None, Path, 'a .mid or .abc file to continue; for ABC text also fields alone, as M:6/8'),
        ('prompt_beats', math.inf, number(float, 0), 'read so many beats of the prompt'),
        ('no_prompt', False, FLAG, 'leave the prompt out of what is written'))
    add_options(
        parser, 'what is written',
        ('out', None, Path, 'name of the files, .mid, .abc, .wav and .svg (default: that of the checkpoint)'),
        ('key', None, key_signature, 'move the tune to this key: C, F#, Bb, Am, ... '
         '(default: that of the prompt, or the signature of most training tunes)'),
        ('tempo', None, number(float, 4, 1000), 'beats a minute (default: that of the prompt or the training tunes)'))
    return parser.parse_args()


def output_names(args):
    """The names of the tunes, without suffix. Raises UserError, before composing, if one cannot be written."""
    if args.out:
        notation.check_writable(args.out)       # no folder, link or device
    out = args.out or args.ckpt
    if out.suffix.lower() in (*SUFFIXES, '.pt', '.midi'):
        out = out.with_suffix('')
    names = [out]
    if args.num_samples > 1:
        names = [out.with_name(f'{out.name}-{i}') for i in range(1, args.num_samples + 1)]
    for name in names:
        for suffix in SUFFIXES:
            notation.check_writable(f'{name}{suffix}')
            if args.prompt and args.prompt.resolve() == Path(f'{name}{suffix}').resolve():
                raise UserError(f'{args.prompt} is the prompt, and would be written over: give another --out')
    return names


def hasten(model):
    """Gets a CPU ready to compose a few tunes, where each frame is little work for a model."""
    # too little to share between cores, or to prepare for oneDNN
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    # a matrix that lies in memory column by column multiplies a few rows faster
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.T.contiguous().T


def with_key_and_metre(song):
    """The Song with the key and metre that its notes suggest, where it does not tell them."""
    if song.sharps is None:
        sharps, minor = notation.estimate_key(song.notes)
        song = song._replace(sharps=sharps, minor=minor)
    metre, _, pickup = notation.fit_bars(song.notes, song.metre, song.pickup)
    return song._replace(metre=metre, pickup=pickup)


def candidates(model, representation, opening, frames, args, generator, forms):
    """Composes --best_of tunes for each that is written, told forms in the metre that is asked for; and again, if too
    few are in it."""
    if args.metre:
        forms = [form for form in forms if form['metre'] == args.metre]
    wanted = args.num_samples * args.best_of
    start = time.perf_counter()
    found = []
    made = 0
    readable = 0
    drawn = 0
    for _ in range(ROUNDS if args.metre else 1):
        tunes, count = compare.compose(model, representation, frames, wanted, args, generator, forms)
        made += wanted
        readable += len(tunes)
        drawn += count
        for tune in tunes:
            # a text tells its own key and metre; else those of the prompt hold
            song = tune.song if tune.song.text else opening._replace(notes=tune.song.notes, text=None)
            song = with_key_and_metre(song)
            if args.metre in (None, song.metre):
                found.append(tune._replace(song=song))
        if len(found) >= args.num_samples:
            break
    seconds = time.perf_counter() - start
    line = f'{made} tunes composed in {seconds:.1f} s, {drawn / seconds:,.0f} frames a second'
    if readable < made:
        line += f'; {readable} of {made} are valid'
    if args.metre:
        line += f'; {len(found)} are in {args.metre}'
    print(line)
    if not found:
        asked = f'in {args.metre}' if args.metre and readable else 'that can be read'
        raise UserError(f'none of {made} tunes was one {asked}: '
                        'use another --seed, a higher --best_of, or another --prompt')
    return found


def key_shift(song, args, semitones, meta):
    """Semitones from where a Song was composed to where it is played: in the key that is asked for, in that of the
    prompt, which was moved, or in the key signature of most training tunes."""
    sharps = meta['sharps'] if meta['common_key'] and not args.prompt else None
    if args.key:
        sharps, _ = args.key
    return -semitones if sharps is None else notation.interval(song.sharps, sharps)


def finished(song, opening, args, semitones, meta):
    """The Song as it is written: without the prompt if so asked, in its key."""
    if args.no_prompt and len(opening.notes):
        begin = opening.notes[:, 2].max()
        notes = song.notes[song.notes[:, 1] >= begin - 1e-6] - [0, begin, begin]
        if not len(notes):
            raise UserError('nothing new was struck after the prompt: use another --seed, or leave --no_prompt out')
        pickup = round(song.pickup - begin, 6) % notation.bar_beats(song.metre)
        song = song._replace(notes=notes, pickup=pickup, text=None)
    song = data.moved(song, key_shift(song, args, semitones, meta))
    if args.key:
        song = song._replace(sharps=args.key[0], minor=args.key[1])
    return song._replace(notes=song.notes[(song.notes[:, 0] >= 0) & (song.notes[:, 0] < KEYS)])


def write(song, name, tempo, prompt_beats):
    """Writes name.mid, .abc, .svg and, unless the tune is very long, .wav; returns what they are, for a person."""
    signature = dict(sharps=song.sharps, minor=song.minor, metre=song.metre, pickup=song.pickup)
    notation.write_midi(song.notes, f'{name}.mid', tempo, name.name, **signature)
    if song.text:           # it was composed as text, with repeats and all
        text = f'X:1\nT:{name.name}\nQ:1/4={tempo:g}\n{song.text}'
        left_out = 0
    else:
        text, left_out = notation.write_abc(song.notes, name.name, tempo, **signature)
    notation.write_whole(f'{name}.abc', text.encode())
    render.write_svg(song.notes, f'{name}.svg', song.metre, song.pickup, prompt_beats, name.name)
    sound = song.notes[:, 2].max() * 60 / tempo <= render.LONGEST
    if sound:
        render.write_wav(song.notes, f'{name}.wav', tempo, song.metre, song.pickup)
    line = f'{name}.mid, .abc, .svg' + ', .wav' * bool(sound)
    line += f': {notation.key_name(song.sharps, song.minor)}, {song.metre}'
    return line + f', {left_out} bass notes left out of the .abc' * bool(left_out)


def training_songs(meta):
    """The training songs of a checkpoint, for their notes alone; none if they are gone, or others have their place."""
    try:
        # as a piano roll, whatever the model reads: only the notes are looked at
        dataset = data.load(meta['data'], log=lambda line: None)
    except UserError:
        return []
    # what music it is, whatever the number of songs that can be used by now
    now, then = (source.rsplit(' (', 1)[0] for source in (dataset.source, meta['source']))
    return dataset.songs['train'] if now == then else []


def main():
    args = parse_args()
    device = data.pick_device(args.device)
    model, checkpoint = load_checkpoint(args.ckpt, device)
    meta = checkpoint['meta']
    representation = data.representation(meta['representation'])
    compare.check_size(args, representation)
    names = output_names(args)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    generator = torch.Generator(device).manual_seed(seed)
    print(f'{args.ckpt}: {model.config.arch}, trained on {meta["source"]}, '
          f'valid {checkpoint["valid"]:.4f} nats/frame; seed {seed}')

    # a person's own beginning, if there is one, in the key that the model knows
    opening = Song('', np.zeros((0, 3)))
    frames = np.zeros((0, representation.V), np.uint8)
    semitones = 0
    if args.prompt:
        opening, frames, semitones = representation.opening(args.prompt, args.prompt_beats, meta['common_key'])
        if args.metre and opening.metre not in (None, args.metre):
            raise UserError(f'{args.prompt} is in {opening.metre}, not in {args.metre}: leave --metre out')
    hasten(model)
    tunes = candidates(model, representation, opening, frames, args, generator, meta['forms'])
    tempo = args.tempo or (opening.tempo if len(opening.notes) else meta['tempo'])
    prompt_beats = 0.0 if args.no_prompt else opening.notes[:, 2].max(initial=0)
    songs = training_songs(meta)
    book = data.copy_book([data.intervals(song.notes, compare.GRID) for song in songs])
    for name, tune in zip(names, compare.best(tunes, songs, args.num_samples)):
        song = finished(tune.song, opening, args, semitones, meta)
        line = write(song, name, tempo, prompt_beats)
        line += f', {tune.nats:.3f} nats/frame, {len(song.notes)} notes, {song.notes[:, 2].max(initial=0):g} beats'
        if songs:
            line += f', at most {compare.copied(song.notes, book):g} beats in a row copied'
        print(line)
        if name == names[0]:
            print(render.terminal_roll(song.notes))
    if songs:
        print(f'copies are looked for in the training songs of {meta["source"]}, in every transposition')
    else:
        print(f'whether it copied, and which are the best, is not known, since {meta["data"]} is not there any more')


if __name__ == '__main__':
    data.run(main, '--num_samples, --best_of or --length')
