"""Compare models by their losses and by their music:  python compare.py out/rwkv.pt out/lstm.pt

Each model composes tunes unaided. How far they are from real ones is measured feature by feature: the
Kolmogorov-Smirnov distance between these tunes and the test songs (after Yang and Lerch, Neural Computing and
Applications 32, 2020). The training songs stand beside: what they get is as good as real.
Writes out/compare.csv and out/compare.svg.
"""

import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import notation
import render
import train
from data import number
from model import load_checkpoint
from notation import Song
from notation import UserError

# steps a beat on which tunes are compared step by step
GRID = 4
# training songs that stand beside
TRAINING = 200

# ---------------------------------------------------------------------------------------------------------------------
# A tune and its features. Key and metre are guessed from the notes, of real songs too, so that all are measured alike

class Tune(NamedTuple):
    """What the features ask of a tune; notes are (N, 3) as in notation.py."""
    notes: np.ndarray
    melody: np.ndarray
    chords: np.ndarray
    # (N,) semitones above the tonic, that of the major key of the signature
    degrees: np.ndarray
    # of the last note of the melody
    last: int
    # semitones from each note of the melody to the next, up or down
    intervals: np.ndarray
    # beats at which something is struck
    onsets: np.ndarray
    # (steps,) a number for what is struck and held in each step of the grid
    steps: np.ndarray
    # its length
    beats: float
    # by the model itself
    ended: bool
    # beats in the longest stretch that stands in a training song, too, in whatever key
    copied: float


def study(notes, book, ended=True):
    """The Tune of notes (N, 3), N >= 1; book: data.copy_book of training songs."""
    copied = data.longest_copy(data.intervals(notes, GRID), book) / GRID
    # to twelfths of a beat, since players let go of a note a little early
    notes = data.quantise(notes, 12) / [1, 12, 12]
    melody = notation.is_melody(notes)
    sharps, _ = notation.estimate_key(notes)
    degrees = (notes[:, 0] + notation.LOWEST - notation.tonic(sharps)) % 12
    intervals = np.abs(np.diff(notes[melody, 0]))
    onsets = np.unique(notes[:, 1])
    frames = data.PianoRoll(GRID).encode(Song('', notes)).astype(np.int64)
    # a sum of random numbers, one for each unit
    steps = frames @ np.random.default_rng(0).integers(1 << 50, size=frames.shape[1])
    return Tune(notes, notes[melody], notes[~melody], degrees, degrees[melody][-1], intervals, onsets, steps,
                notes[:, 2].max(), ended, copied)


def mean(values):
    """The mean, nan of nothing."""
    return float(np.mean(values)) if len(values) else math.nan


def melody_on_chord(tune):
    """Share of the melody notes over a chord that belong to it."""
    at = tune.melody[:, 1:2]
    sounding = (tune.chords[:, 1] <= at) & (at < tune.chords[:, 2])
    same = (tune.melody[:, :1] - tune.chords[:, 0]) % 12 == 0
    return mean((sounding & same).any(1)[sounding.any(1)])


def pitch_entropy(tune):
    """Entropy of the pitch-class histogram, in bits."""
    _, count = np.unique(tune.degrees, return_counts=True)
    share = count / count.sum()
    return -(share @ np.log2(share))


def chord_changes(tune):
    """How often other keys are struck under the melody than before."""
    keys, onset, _ = tune.chords.T
    struck = [set(keys[onset == time]) for time in np.unique(onset)]
    return sum(a != b for a, b in zip(struck, struck[1:]))


def chords_below(tune):
    """Share of the steps with something under the melody."""
    sounding = np.zeros(len(tune.steps))
    for _, onset, end in np.round(tune.chords * GRID).astype(int):
        sounding[onset:end] = 1
    return mean(sounding)


def repeats(tune):
    """Share of the steps in stretches of 8 beats that stood there before, note for note."""
    again = np.zeros(len(tune.steps))
    seen = set()
    for end in range(8 * GRID, len(again) + 1):
        stretch = tune.steps[end - 8 * GRID:end]
        if tuple(stretch) in seen:
            again[end - 8 * GRID:end] = 1
        seen.add(tuple(stretch))
    return mean(again)


def circles(tune):
    """1 if something of eight beats or less comes three times in a row or more, for twelve beats or more, else 0."""
    for lag in range(1, min(8 * GRID, len(tune.steps) - 1) + 1):
        same = tune.steps[lag:] == tune.steps[:-lag]
        needed = max(2 * lag, 12 * GRID - lag)
        if np.convolve(same, np.ones(needed)).max() > needed - 0.5:
            return 1
    return 0


def whole_bars(tune):
    """1 if it ends on a bar line, else 0."""
    bar, pickup = notation.metre(tune.notes)
    bars = (tune.beats - pickup) / bar
    return abs(bars - round(bars)) < 0.003


# A number for each tune, nan where it has none of what is measured. Lengths are in beats, intervals in semitones
FEATURES = {
    'notes in scale': lambda tune: mean(np.isin(tune.degrees, (0, 2, 4, 5, 7, 9, 11))),
    'melody on chord': melody_on_chord,
    # major or minor
    'last on tonic': lambda tune: tune.last in (0, 9),
    'pitch entropy': pitch_entropy,
    'interval size': lambda tune: mean(tune.intervals),
    # larger than a third
    'leaps': lambda tune: mean(tune.intervals > 4),
    'repeated notes': lambda tune: mean(tune.intervals == 0),
    'melody range': lambda tune: np.ptp(tune.melody[:, 0]),
    'note length': lambda tune: mean(np.diff(tune.melody[:, 1:])),
    'melody notes a beat': lambda tune: len(tune.melody) / tune.beats,
    'on beat': lambda tune: mean(np.isclose(tune.onsets % 1, 0)),
    # sixteenths and triplets
    'off half beat': lambda tune: 1 - mean(np.isclose(tune.onsets % 0.5, 0)),
    'chord changes a beat': lambda tune: chord_changes(tune) / tune.beats,
    'chords below': chords_below,
    # keys that sound at a time
    'polyphony': lambda tune: np.diff(tune.notes[:, 1:]).sum() / tune.beats,
    'repeats': repeats,
    'circles': circles,
    'beats': lambda tune: tune.beats,
    'whole bars': whole_bars,
    'ended': lambda tune: tune.ended,
    'copied': lambda tune: tune.copied,
}


# ---------------------------------------------------------------------------------------------------------------------
# Many tunes

class Column(NamedTuple):
    """A column of the table: tunes of one origin."""
    name: str
    # {feature: (tunes,)}, without those that have none of what is measured
    values: dict
    # {feature: distance to the real songs}; empty for the real songs themselves
    distances: dict
    # of the tune in the picture
    notes: np.ndarray
    # {name: text}, what else is known
    facts: dict


def make_column(name, tunes, shown, real=None, facts=None):
    """The Column of Tunes, of which one is shown; real: the Column that they are compared with."""
    values = {}
    for feature, measure in FEATURES.items():
        found = np.array([measure(tune) for tune in tunes], dtype=float)
        values[feature] = found[np.isfinite(found)]
    if not real:
        return Column(name, values, {}, shown.notes, {})
    distances = {feature: distance(values[feature], real.values[feature]) for feature in values}
    facts = {'mean distance': f'{mean(list(distances.values())):.3f}'} | (facts or {})
    return Column(name, values, distances, shown.notes, facts)


def distance(a, b):
    """Kolmogorov-Smirnov: how far the shares of a and of b up to a number are apart, where they are farthest; 1 where
    only one of them has numbers."""
    if not len(a) or not len(b):
        return float(len(a) != len(b))
    x = np.concatenate([a, b])
    share_a = np.searchsorted(np.sort(a), x, side='right') / len(a)
    share_b = np.searchsorted(np.sort(b), x, side='right') / len(b)
    return np.abs(share_a - share_b).max()


def read_real(dataset, split):
    """The Column of the test songs, or of another split, that of some training songs, and the book of them all."""
    training = [song.notes for song in dataset.songs['train']]
    strikes = [data.intervals(notes, GRID) for notes in training]
    book = data.copy_book(strikes)
    tunes = [study(song.notes, book) for song in dataset.songs[split]]
    real = make_column(f'{split} songs', tunes, tunes[len(tunes) // 2])
    tunes = []
    for i in range(0, len(training), math.ceil(len(training) / TRAINING)):
        others = strikes.copy()
        # a song is no copy of itself
        others[i] = strikes[i][:0]
        tunes.append(study(training[i], data.copy_book(others)))
    return real, make_column('training songs', tunes, tunes[0], real), book


def compose(model, representation, args):
    """Tunes composed unaided: ([(T, V) frames, the boundary before], most frames of a tune, frames a second)."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(args.seed)
    boundary = torch.eye(representation.V, dtype=torch.uint8, device=device)[-1:]
    prompt = boundary.expand(args.num_samples, 1, -1)
    length = math.ceil(args.length * representation.frames_per_beat)
    # as in sample.py
    at_least = 16 * representation.frames_per_beat
    began = time.perf_counter()
    tunes = model.compose(prompt, length, args.temperature, args.top_p, generator, at_least)
    speed = sum(map(len, tunes)) / (time.perf_counter() - began)
    return [torch.cat([boundary, tune]) for tune in tunes], length, speed


def model_column(name, model, dataset, real, book, args):
    """The Column of a model."""
    parameters = sum(p.numel() for p in model.parameters())
    facts = dict(parameters=f'{parameters}')
    train.say(f'{name}: loss on the real songs', passing=True)
    for split in ('valid', 'test'):
        score = train.evaluate(model, dataset, split)
        facts[f'{split} nats a frame'] = f'{score.frame:.3f}'
        facts[f'{split} nats a beat'] = f'{score.beat:.3f}'
    train.say(f'{name}: composing {args.num_samples} tunes', passing=True)
    composed, length, speed = compose(model, dataset.representation, args)
    facts['frames a second when composing'] = f'{speed:.0f}'
    train.say(f'{name}: measuring the tunes', passing=True)
    tunes = []
    for frames in composed:
        try:
            notes = dataset.representation.to_song(frames[1:].cpu().numpy()).notes
        except UserError:
            # a text that is no ABC
            continue
        if len(notes):
            nats = model.nats(frames.unsqueeze(0)).mean().item()
            tunes.append((nats, study(notes, book, len(frames) <= length)))
    if not tunes:
        raise UserError(f'{name} composed no tune that can be read: train it for longer')
    facts['tunes that can be read'] = f'{len(tunes)} of {len(composed)}'
    tunes.sort(key=lambda tune: tune[0])
    nats, median = tunes[len(tunes) // 2]
    facts['nats a frame of its median tune'] = f'{nats:.3f}'
    return make_column(name, [tune for _, tune in tunes], median, real, facts)


# ---------------------------------------------------------------------------------------------------------------------
# The table and the picture

def make_table(columns):
    """Rows {heading: text}: the means of the features and their distances (KS), then what else is known."""
    rows = []
    for name in columns[0].values:
        row = {'': name}
        for column in columns:
            row[column.name] = f'{mean(column.values[name]):.3f}'
            if column.distances:
                row[f'KS {column.name}'] = f'{column.distances[name]:.3f}'
        rows.append(row)
    for name in columns[-1].facts:
        rows.append({'': name} | {column.name: column.facts.get(name, '') for column in columns})
    return rows


def print_table(rows):
    """A line for each row."""
    headings = list(rows[0])
    for row in [dict(zip(headings, headings)), *rows]:
        cells = [row.get(heading, '').rjust(max(8, len(heading))) for heading in headings[1:]]
        print(f'{row[""]:31}', *cells)


def draw_distances(drawing, columns):
    """Add a bar for each feature and column to a Drawing."""
    top = drawing.bottom + 34
    drawing.text(8, top - 18, 'Kolmogorov-Smirnov distance to the real songs, from 0 to 1', 'title')
    for i, column in enumerate(columns):
        drawing.text(778, top + 10 + 14 * i, f'■ {render.label(column.name)}', render.colour(i))
    for name in columns[0].distances:
        drawing.text(180, top + 3 * len(columns) + 4, name, 'end')
        for i, column in enumerate(columns):
            length = 570 * column.distances[name]
            drawing.strokes(render.colour(i), 5, f'M190 {top + 3}h{length:.1f}')
            top += 6
        top += 8
    drawing.bottom = top + 10


def draw(real, training, models, losses):
    """The picture, bytes: loss curves {name: points}, a bar for each feature, and piano rolls of a real song and of the
    tune of each model that is its median by nats."""
    drawing = render.Drawing()
    if losses:
        render.draw_chart(drawing, losses)
    draw_distances(drawing, [*models, training])
    for column in [real, *models]:
        bar, pickup = notation.metre(column.notes)
        metre = notation.metre_text(column.notes, bar, pickup)
        name = render.label(column.name)
        drawing.text(render.LEFT, drawing.bottom + 16, f'{name}, {metre}', 'title')
        drawing.bottom += 28
        render.draw_roll(drawing, column.notes, metre, pickup, lines=2)
    return drawing.svg('comparison')


# ---------------------------------------------------------------------------------------------------------------------
# The command

def parse_args():
    parser = data.make_parser(__doc__, 'python compare.py out/rwkv.pt out/lstm.pt --split=valid')
    parser.add_argument('checkpoints', nargs='+', type=Path, metavar='CHECKPOINT', help='written by train.py')
    data.add_options(
        parser, 'composing',
        ('num_samples', 100, number(int, 1, 1000), 'tunes of each model, composed side by side'),
        ('length', 256.0, number(float, 1, 10_000), 'beats at most'),
        ('temperature', 1.0, number(float, 0.001, 100), 'above 1 is bolder, below 1 safer'),
        ('top_p', 0.98, number(float, 0.01, 1), 'nucleus: choose among the likeliest that hold so much probability'),
        ('seed', 1, number(int, 0, 2 ** 63 - 1), 'the same seed gives the same tunes'),
        ('device', 'cpu', str, 'cpu, cuda, ...'))
    data.add_options(
        parser, 'comparing',
        ('split', 'test', dict(choices=('valid', 'test')), 'the songs to compare with; tune on valid'),
        ('out', Path('out/compare'), Path, 'path of the .csv and the .svg, without this ending'))
    return parser.parse_args()


def main():
    args = parse_args()
    table = f'{args.out}.csv'
    picture = f'{args.out}.svg'
    notation.check_writable(table)
    notation.check_writable(picture)
    stems = [path.stem for path in args.checkpoints]
    models = []
    losses = {}
    music = ''
    for path in args.checkpoints:
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        model, checkpoint = load_checkpoint(path, data.pick_device(args.device))
        meta = checkpoint['meta']
        if music not in ('', meta['data']):
            raise UserError(f'{path} was trained on {meta["data"]}, the models before on {music}: compare them apart')
        representation = data.representation(meta['representation'])
        dataset = data.load(meta['data'], representation, meta['common_key'], log=lambda line: None)
        if not music:
            music = meta['data']
            train.say('measuring the real songs', passing=True)
            real, training, book = read_real(dataset, args.split)
        models.append(model_column(name, model, dataset, real, book, args))
        points = render.read_losses(path.with_suffix('.csv'))
        if len(points):
            losses[name] = points
    rows = make_table([real, training, *models])
    train.say('', passing=True)
    print_table(rows)
    train.save_rows(table, rows)
    notation.write_whole(picture, draw(real, training, models, losses))
    print(f'{table} has this table, {picture} the pictures')


if __name__ == '__main__':
    data.run(main, '--num_samples or --length')
