"""Compare models by their losses and by their music:  python compare.py out/rwkv.pt out/lstm.pt

Each model composes tunes, told the forms of training songs and in several takes if it can be. How far they are from
real ones is measured feature by feature: the Kolmogorov-Smirnov distance between these tunes and the test songs (after
Yang and Lerch, Neural Computing and Applications 32, 2020). The training songs stand beside: what they get is as good
as real. Writes out/compare.csv and out/compare.svg.
"""

import itertools
import math
import random
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

GRID = 4                # steps a beat on which tunes are compared step by step
TRAINING = 200          # training songs that stand beside, and that tunes are ranked by
HEARD = 1000            # beats of a tune that are measured
VARIETY = 0.1           # share of the forms of training songs that have to fit a tune that is asked for
NEAR = 0.3              # how much it weighs that a tune is near to a song, beside variety
SIDE_BY_SIDE = 32       # tunes composed at once: more are no faster, and take memory
MOST = 20_000           # tunes composed in all
PHRASE = 16             # beats that are composed in several takes, before one of them is chosen
TAKES = 8               # how many takes, if the tune is to come home at the end of these beats ...
SPARE = 2               # ... and else
COMPOSING = (           # the options of sample.py, too
    ('length', 256.0, number(float, 1, 1e6), 'beats at most; the model may end the tune before'),
    ('min_length', 16.0, number(float, 0, 1e6), 'beats at least, before the model may end the tune'),
    ('temperature', 1.0, number(float, 0.001, 100), 'above 1 is bolder, below 1 safer'),
    ('top_p', None, number(float, 0.01, 1),
     'nucleus: choose among the likeliest that hold so much probability (default: 0.99, for ABC text 0.98, for events '
     '1, which is all)'))

# ---------------------------------------------------------------------------------------------------------------------
# The features of a tune. Notes are (N, 3) as in notation.py, steps (S,) a number for what is struck and held in each

def features(notes, ended):
    """{feature: number} of a tune, nan where it has none of what is measured. Lengths are in beats, intervals in
    semitones. Key and metre are guessed from the notes, of real songs too, so that all are measured alike.

    ended: did the model itself end it, within --length?"""
    # of hours of music the first part is enough, and silence of hours before it is left out
    begin = HEARD * (notes[0, 1] // HEARD)
    notes = notes - [0, begin, begin]
    notes = notes[notes[:, 1] < HEARD]
    notes[:, 2] = np.minimum(notes[:, 2], HEARD)
    # to twelfths of a beat, since players let go of a note a little early
    notes = data.quantise(notes, 12) / [1, 12, 12]
    is_melody = notation.is_melody(notes)
    melody = notes[is_melody]
    chords = notes[~is_melody]
    sharps, _ = notation.estimate_key(notes)
    # above the tonic of the major key with this signature
    degrees = (notes[:, 0] + notation.LOWEST - 7 * sharps) % 12
    _, count = np.unique(degrees, return_counts=True)
    share = count / len(degrees)
    leaps = np.abs(np.diff(melody[:, 0]))
    onsets = np.unique(notes[:, 1])
    steps = data.step_names(notes, GRID)
    below = data.step_names(chords, GRID) > 0
    beats = notes[:, 2].max()
    bar, pickup = notation.estimate_metre(notes)
    after_bar_line = (beats - pickup + 0.01) % bar
    return {
        'notes in scale': mean(np.isin(degrees, (0, 2, 4, 5, 7, 9, 11))),
        'melody on chord': on_chord(melody, chords),
        # major or minor
        'last on tonic': degrees[is_melody][-1] in (0, 9),
        'pitch entropy': -(share @ np.log2(share)),
        'interval size': mean(leaps),
        # larger than a third
        'leaps': mean(leaps > 4),
        'repeated notes': mean(leaps == 0),
        'melody range': np.ptp(melody[:, 0]),
        'note length': mean(melody[:, 2] - melody[:, 1]),
        'melody notes a beat': len(melody) / beats,
        'on beat': mean(np.isclose(onsets % 1, 0)),
        # sixteenths and triplets
        'off half beat': 1 - mean(np.isclose(onsets % 0.5, 0)),
        'chord changes a beat': chord_changes(chords) / beats,
        'chords below': below.sum() / len(steps),
        # keys that sound at a time
        'polyphony': (notes[:, 2] - notes[:, 1]).sum() / beats,
        'repeats': repeats(steps),
        'circles': circles(steps),
        'beats': beats,
        'whole bars': after_bar_line < 0.02,
        'ended': ended,
    }


def copied(notes, book):
    """Beats of the longest stretch of a tune that stands in the book, too: data.copy_book of training songs."""
    return data.longest_copy(data.intervals(notes, GRID), book) / GRID


def all_features(notes, book, ended=True):
    """The features of a tune, how much of it is copied among them."""
    return features(notes, ended) | {'copied': copied(notes, book)}


def mean(values):
    """The mean, nan of nothing."""
    return np.mean(values) if len(values) else math.nan


def sounds_at(time, notes):
    """Which of the notes (N, 3) sound at a time, (N,), or at each of the times (T, 1), (T, N)."""
    return (notes[:, 1] <= time) & (time < notes[:, 2])


def on_chord(melody, chords):
    """Share of the melody notes over a chord that belong to it."""
    # tables of melody notes (rows) and notes of chords (columns)
    sounding = sounds_at(melody[:, 1:2], chords)
    same = (melody[:, :1] - chords[:, 0]) % 12 == 0
    over_a_chord = sounding.any(1)
    fits = (sounding & same).any(1)
    return mean(fits[over_a_chord])


def chord_changes(chords):
    """How often other keys are struck under the melody than before."""
    keys, onset, _ = chords.T
    struck = [set(keys[onset == time]) for time in np.unique(onset)]
    return sum(a != b for a, b in itertools.pairwise(struck))


def repeats(steps):
    """Share of the steps in stretches of 8 beats that stood there before, note for note."""
    again = np.zeros(len(steps))
    seen = set()
    for end in range(8 * GRID, len(steps) + 1):
        stretch = steps[end - 8 * GRID:end].tobytes()
        if stretch in seen:
            again[end - 8 * GRID:end] = 1
        seen.add(stretch)
    return mean(again)


def circles(steps, beat=GRID):
    """1 if something of eight beats or less comes three times in a row or more, for twelve beats or more, else 0."""
    longest = min(8 * beat, len(steps) - 1)
    for lag in range(1, longest + 1):
        same = steps[lag:] == steps[:-lag]
        needed = max(2 * lag, 12 * beat - lag)
        if same.sum() < needed:         # as for most lags: too few for a stretch of them
            continue
        in_a_row = np.convolve(same, np.ones(needed))
        if in_a_row.max() > needed - 0.5:
            return 1
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Composed tunes

class Tune(NamedTuple):
    """A composed tune, and what is known of it."""
    song: Song              # with the opening
    nats: float             # nats a frame of the part that was composed, to a model that is told of no form
    ended: bool             # by the model itself


def compose(model, representation, opening, count, args, generator, forms=()):
    """Goes on from an opening, frames (T, V) after the boundary, count times: a list of Tunes, in no order, and how
    many frames they have in all. What the representation cannot read, ABC that is not valid for one, is left out. args
    has length, min_length (beats), temperature and top_p; forms: those of the training songs, see draw_forms."""
    steps = representation.frames_per_beat
    length = math.ceil(args.length * steps)
    at_least = math.ceil(args.min_length * steps)
    top_p = args.top_p or representation.top_p
    device = next(model.parameters()).device
    prompt = np.concatenate((representation.boundary(), opening))
    prompt = torch.from_numpy(prompt).to(device)
    drawn = []
    if not len(opening):                            # a person's own beginning has a form of its own
        drawn = draw_forms(forms, count, length, at_least, generator)
    known = np.unique([name for form in forms for name in form['chords']])
    tunes = []
    total = 0
    for begin in range(0, count, SIDE_BY_SIDE):
        prompts = prompt.expand(min(SIDE_BY_SIDE, count - begin), -1, -1)
        plans = takes = None
        if drawn:
            told = drawn[begin:begin + SIDE_BY_SIDE]
            takes = Takes(representation, told, known)
            plans = make_plans(told, length).to(device)
        composed = model.compose(prompts, length, args.temperature, top_p, generator, at_least, plans, takes)
        if takes:
            composed = takes.one_of_each(composed)
        for frames in composed:
            total += len(frames)
            ended = len(frames) < length
            heard = np.concatenate((opening, frames.cpu().numpy()))
            try:
                song = representation.to_song(heard, ended)
            except UserError:
                continue
            if len(frames) and len(song.notes):
                # the model's own opinion of it, from the first frame after the opening
                whole = torch.cat((prompt, frames))
                nats = model.nats(whole.unsqueeze(0))[0, len(prompt) - 1:]
                tunes.append(Tune(song, nats.double().mean().item(), ended))
    random.Random(0).shuffle(tunes)             # they came from short to long
    return tunes, total


def draw_forms(forms, count, length, at_least, generator):
    """The forms of training songs that count tunes are told, of at_least to length frames, the shortest first. These
    forms, those with sixteenths after the others and else sorted by length, are cut into count equal pieces, and one is
    drawn from each. No forms where so few songs are of that length that all tunes would be alike."""
    fitting = [form for form in forms if at_least <= data.form_length(form) <= length]
    if len(fitting) < max(1, VARIETY * len(forms)):
        return []
    fitting.sort(key=lambda form: (form['sixteenths'], data.form_length(form)))
    chance = torch.rand(count, generator=generator, device=generator.device).cpu()
    places = (torch.arange(count) + chance) / count * len(fitting)
    drawn = [fitting[place] for place in places.long().clamp(max=len(fitting) - 1)]
    return sorted(drawn, key=data.form_length)


def make_plans(forms, length):
    """The plans of forms, (len(forms), 1 + length, 6); after its end a tune is told the boundary again."""
    plans = torch.from_numpy(data.END).repeat(len(forms), 1 + length, 1)
    for rows, form in zip(plans, forms):
        plan = data.make_plan(form)
        rows[:len(plan)] = torch.from_numpy(plan)
    return plans


class Takes:
    """Composes each tune in several rows, as `go_on` of Model.compose: TAKES in the PHRASE beats before its form comes
    home, else SPARE. When they are over one row goes on: of those that have not ended and come home best the first with
    the fewest faults. forms: what the tunes are told; chords: the names of those that some training song has."""

    def __init__(self, representation, forms, chords):
        self.representation = representation
        self.tune_of_row = np.arange(len(forms))
        self.choices = [self.when_to_choose(form) for form in forms]            # a dict of each
        self.is_new = [data.make_plan(form)[:-1, 0] == 1 for form in forms]     # (T,) of each: is nothing repeated?
        self.chords = chords

    def when_to_choose(self, form):
        """{frame: home} in order of time: after which frames of a tune of this form one of the takes goes on, and 1 +
        the pitch class of the tonic that has to be there, as in a plan, or 0."""
        phrase = PHRASE * self.representation.beat
        homes = {first + length - 1: home for first, length, home in form['homes']}
        choices = {data.form_length(form) - 1: 0} | homes
        for before, frame in itertools.pairwise([0, *sorted(choices)]):
            choices |= dict.fromkeys(range(frame - phrase, before, -phrase), 0)
        return dict(sorted(choices.items()))

    def __call__(self, frames, ended):
        t = frames.shape[1] - 1                 # the last frame so far
        rows = []
        for tune, choices in enumerate(self.choices):
            takes = np.flatnonzero(self.tune_of_row == tune)
            home = choices.pop(t, None)
            if home is not None:
                is_new = self.is_new[tune][:t + 1]
                going = [take for take in takes if not ended[take]] or takes[:1]
                points = [self.home_points(frames[take], home) for take in going]
                best = [take for take, count in zip(going, points) if count == max(points)]
                take = min(best, key=lambda take: self.faults(frames[take], is_new))
                takes = np.array([take])
            if len(takes) == 1 and choices and not ended[takes[0]]:
                next_home, *_ = choices.values()
                takes = takes.repeat(TAKES if next_home else SPARE)
            rows += takes.tolist()
        if rows == list(range(len(frames))):
            return None
        self.tune_of_row = self.tune_of_row[rows]
        return torch.tensor(rows, device=frames.device)

    def recent(self, frames):
        """The last two phrases of a take, frames (T, V), as such and as notes."""
        recent = frames[-2 * PHRASE * self.representation.beat:].cpu().numpy()
        return recent, self.representation.decode(recent)

    def home_points(self, frames, home):
        """How well a take, frames (T, V), comes home: one point if its last melody note has the pitch class home - 1,
        and then one if it is in the common key, of which that is the tonic, and one for the tonic's triad below."""
        if not home:
            return 0
        _, notes = self.recent(frames)
        if not len(notes):
            return 0
        melody = notation.is_melody(notes)
        key, onset, _ = notes[melody][-1]
        if home != 1 + (key + notation.LOWEST) % 12:
            return 0
        sharps, _ = notation.estimate_key(notes)
        sounding = notes[~melody & sounds_at(onset, notes), 0]
        chord = set((sounding - key) % 12)
        points = 1
        points += sharps == 0
        points += {0, 7} <= chord <= {0, 3, 4, 7}
        return points

    def faults(self, frames, is_new):
        """The share of the last beats of a take, frames (T, V), that repeat something where its form is_new (T,), the
        share with a chord that no training song has, and one for a circle."""
        beat = self.representation.beat
        recent, notes = self.recent(frames)
        repeats = data.find_repeats(frames.cpu().numpy(), beat) > 0
        again = (repeats & is_new)[-len(recent):]
        chords = data.step_names(notes[~notation.is_melody(notes)], beat)
        unheard = ~np.isin(chords, self.chords)
        return again.mean() + unheard.sum() / len(recent) + circles(data.frame_names(recent), beat)

    def one_of_each(self, composed):
        """Of what was composed each tune once."""
        _, rows = np.unique(self.tune_of_row, return_index=True)
        return [composed[row] for row in rows]


def check_size(args, representation):
    """Raises UserError if longer tunes are asked for than a song may be, or more than can be looked through."""
    length = math.ceil(args.length * representation.frames_per_beat)
    if length > data.MAX_FRAMES:
        raise UserError(f'--length={args.length:g} is more than {data.MAX_FRAMES:,} frames: ask for '
                        f'{data.MAX_FRAMES // representation.frames_per_beat:,} beats or less')
    if args.num_samples * args.best_of > MOST:
        raise UserError(f'--num_samples={args.num_samples} times --best_of={args.best_of} is more than {MOST:,} tunes: '
                        'ask for fewer')


def best(tunes, songs, count):
    """count of the Tunes, one after another: all together as varied as songs are, and each near to some song. The next
    is the one with the lowest cost: the mean Kolmogorov-Smirnov distance of those taken, with it, to the songs, and
    NEAR times how far it is itself from the nearest of them."""
    if not songs:
        return sorted(tunes, key=lambda tune: not tune.ended)[:count]
    real = points([(song.notes, True) for song in some(songs)])
    composed = points([(tune.song.notes, tune.ended) for tune in tunes])
    # from the nearest song, in units of the features' spread among the songs
    apart = np.abs(composed[:, None] - real) / (real.std(0) + 1e-3)
    apart = apart.mean(2).min(1)
    # shares can be farthest apart at a song's number, or just below it
    levels = np.concatenate((real, real - 1e-6))
    share = (real[:, None] <= levels).mean(0, dtype=np.float32)     # (levels, features)
    reaches = composed[:, None] <= levels                           # (tunes, levels, features)
    taken = []
    total = np.zeros_like(share)                                    # how many of those taken reach each level
    for size in range(1, min(count, len(tunes)) + 1):
        shares = (total + reaches) / size                           # with each of the tunes
        cost = np.abs(shares - share).max(1).mean(1) + NEAR * apart / size
        cost[taken] = math.inf
        taken.append(cost.argmin())
        total += reaches[taken[-1]]
    return [tunes[i] for i in taken]


def points(tunes):
    """[(notes, did it end by itself?)] to (tunes, features); what a tune has nothing of counts as 0."""
    rows = [list(features(notes, ended).values()) for notes, ended in tunes]
    return np.nan_to_num(np.array(rows, dtype=float))


def some(songs):
    """TRAINING songs at most, from all over a list."""
    return songs[::math.ceil(len(songs) / TRAINING) or 1]


# ---------------------------------------------------------------------------------------------------------------------
# Many tunes

class Column(NamedTuple):
    """A column of the table: tunes of one origin."""
    name: str
    values: dict        # {feature: (tunes,)}, without those that have none of what is measured
    distances: dict     # {feature: distance to the real songs} and their mean; empty for the real songs themselves
    notes: np.ndarray   # of the tune in the picture
    facts: dict         # {name: text}, what else is known


def make_column(name, tunes, notes, real=None, facts=()):
    """The Column of tunes, each its features; notes: of the one to show; real: the Column they are compared with."""
    values = {}
    distances = {}
    for feature in tunes[0]:
        found = np.array([tune[feature] for tune in tunes], dtype=float)
        values[feature] = found[np.isfinite(found)]
        if real:
            distances[feature] = distance(values[feature], real.values[feature])
    if real:
        distances['mean distance'] = mean(list(distances.values()))
    return Column(name, values, distances, notes, dict(facts))


def distance(a, b):
    """Kolmogorov-Smirnov: how far the shares of a and of b up to a number are apart, where they are farthest; 1 where
    only one of them has numbers."""
    x = np.concatenate([a, b])
    up_to_a = np.searchsorted(np.sort(a), x, side='right') / max(1, len(a))
    up_to_b = np.searchsorted(np.sort(b), x, side='right') / max(1, len(b))
    return np.abs(up_to_a - up_to_b).max(initial=0)


def read_real(dataset, split, length):
    """The Column of the test songs, or of another split, that of some training songs, and the book of them all. One of
    more than `length` beats has not ended, since a composed one would not have."""
    def measure(notes, old):
        return all_features(notes, old, notes[:, 2].max() <= length)

    songs = [song.notes for song in dataset.songs[split]]
    training = [song.notes for song in dataset.songs['train']]
    strikes = [data.intervals(notes, GRID) for notes in training]
    book = data.copy_book(strikes)
    tunes = [measure(notes, book) for notes in songs]
    real = make_column(f'{split} songs', tunes, songs[len(songs) // 2])
    tunes = []
    for i in some(range(len(training))):
        others = strikes[:i] + strikes[i + 1:]      # a song is no copy of itself
        tunes.append(measure(training[i], data.copy_book(others)))
    return real, make_column('training songs', tunes, training[0], real), book


def model_column(name, model, dataset, real, book, args, forms):
    """The Column of a model."""
    size = sum(p.numel() for p in model.parameters())
    facts = {'parameters': str(size)}
    train.say(f'{name}: loss on the real songs', passing=True)
    for split in ('valid', 'test'):
        score = train.evaluate(model, dataset, split)
        facts[f'{split} nats a frame'] = f'{score.frame:.3f}'
        facts[f'{split} nats a beat'] = f'{score.beat:.3f}'
    count = args.num_samples * args.best_of
    train.say(f'{name}: composing {count} tunes', passing=True)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    representation = dataset.representation
    opening = np.zeros((0, representation.V), np.uint8)
    began = time.perf_counter()
    composed, frames = compose(model, representation, opening, count, args, generator, forms)
    seconds = time.perf_counter() - began
    facts['frames a second when composing'] = f'{frames / seconds:.0f}'
    facts['tunes that can be read'] = f'{len(composed)} of {count}'
    if not composed:
        raise UserError(f'{name} composed no tune that can be read: train it for longer')
    train.say(f'{name}: measuring the tunes', passing=True)
    tunes = best(composed, dataset.songs['train'], args.num_samples)
    tunes.sort(key=lambda tune: tune.nats)
    median = tunes[len(tunes) // 2]
    facts['nats a frame of its median tune'] = f'{median.nats:.3f}'
    measured = [all_features(tune.song.notes, book, tune.ended) for tune in tunes]
    return make_column(name, measured, median.song.notes, real, facts)


# ---------------------------------------------------------------------------------------------------------------------
# The table and the picture

def make_table(columns):
    """Rows {heading: text}: the means of the features and their distances (KS), then what else is known."""
    table = {}      # heading -> {name: text}
    for column in columns:
        means = {name: f'{mean(values):.3f}' for name, values in column.values.items()}
        table[column.name] = means | column.facts
        if column.distances:
            table[f'KS {column.name}'] = {name: f'{far:.3f}' for name, far in column.distances.items()}
    rows = []
    for name in [*columns[-1].distances, *columns[-1].facts]:
        rows.append({'': name})
        for heading, cells in table.items():
            rows[-1][heading] = cells.get(name, '')
    return rows


def print_table(rows):
    """A line for each row."""
    headings = list(rows[0])
    for name, *cells in [headings, *map(dict.values, rows)]:
        padded = [cell.rjust(max(8, len(heading))) for cell, heading in zip(cells, headings[1:])]
        print(f'{name:31}', *padded)


def draw_distances(drawing, columns):
    """Add a bar for each feature and column to a Drawing."""
    top = drawing.bottom + 34
    names = list(columns[0].distances)
    step = 6 * len(columns) + 7
    bottom = top + step * len(names)
    drawing.text(8, top - 18, 'distance to the real songs and its mean: shorter bars are better', 'title')
    farthest = max(max(column.distances.values()) for column in columns)
    pixels = 608 / farthest
    for tick in render.ticks(0, farthest):
        x = 160 + pixels * tick
        drawing.strokes('line', 1, f'M{x:g} {top}V{bottom}')
        drawing.text(x, bottom + 16, f'{tick:g}', 'mid')
    for i, name in enumerate(names):
        drawing.text(150, top + step * (i + 0.5) + 4, name, 'end')
    for i, column in enumerate(columns):
        words = f'■ {render.label(column.name)} {column.distances["mean distance"]:.3f}'
        drawing.text(778, top + 10 + 14 * i, words, render.colour(i))
        for k, far in enumerate(column.distances.values()):
            drawing.strokes(render.colour(i), 5, f'M160 {top + step * k + 6 * i + 6}h{pixels * far:.1f}')
    drawing.bottom = bottom + 26


def draw(real, training, models, losses):
    """The picture, bytes: loss curves {name: points}, a bar for each feature, and piano rolls of a real song and of the
    tune of each model that is its median by nats. Each origin has its colour throughout; chords are grey."""
    drawing = render.Drawing()
    if losses:
        render.draw_chart(drawing, losses)
    draw_distances(drawing, [*models, training])
    for i, column in [(len(models), real), *enumerate(models)]:
        metre, _, pickup = notation.fit_bars(column.notes, None, None)
        title = 'one of the' if column is real else 'the median tune of'
        drawing.text(8, drawing.bottom + 18, f'{title} {render.label(column.name)}, {metre}', 'title')
        drawing.bottom += 30
        render.draw_roll(drawing, column.notes, metre, pickup, lines=2, styles=(render.colour(i), 'grey'))
    return drawing.svg('comparison')


# ---------------------------------------------------------------------------------------------------------------------
# The command

def parse_args():
    parser = data.make_parser(__doc__, 'python compare.py out/rwkv.pt out/lstm.pt --split=valid')
    parser.add_argument('checkpoints', nargs='+', type=Path, metavar='CHECKPOINT', help='written by train.py')
    data.add_options(
        parser, 'composing',
        ('num_samples', 100, number(int, 1, 1000), 'tunes of each model'),
        ('best_of', 1, number(int, 1, 100), 'so many are composed for each of them (as in sample.py; there 8)'),
        *COMPOSING,
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
    loaded = [load_checkpoint(path, data.pick_device(args.device)) for path in args.checkpoints]
    for _, checkpoint in loaded:
        check_size(args, data.representation(checkpoint['meta']['representation']))
    music = sorted({checkpoint['meta']['data'] for _, checkpoint in loaded})
    if len(music) > 1:
        raise UserError(f'these models were trained on {" and on ".join(music)}: compare them apart')
    stems = [path.stem for path in args.checkpoints]
    models = []
    losses = {}
    for path, (model, checkpoint) in zip(args.checkpoints, loaded):
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        meta = checkpoint['meta']
        representation = data.representation(meta['representation'])
        dataset = data.load(meta['data'], representation, meta['common_key'], log=lambda line: None)
        if not models:
            train.say('measuring the real songs', passing=True)
            real, training, book = read_real(dataset, args.split, args.length)
        models.append(model_column(name, model, dataset, real, book, args, meta['forms']))
        curve = render.read_losses(path.with_suffix('.csv'))
        if len(curve):
            losses[name] = curve
    rows = make_table([real, training, *models])
    train.say('', passing=True)
    print_table(rows)
    train.save_rows(table, rows)
    notation.write_whole(picture, draw(real, training, models, losses))
    print(f'{table} has this table, {picture} the pictures')


if __name__ == '__main__':
    data.run(main, '--num_samples or --length')
