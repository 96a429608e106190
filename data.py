"""Songs to frames and back in three representations, forms, splits and batches, and where the music comes from.

A *frame* (V,) says which of V units are on; the last unit is the boundary, alone in its frame, where one song ends and
the next one starts. What the other units are, the representation says:

    piano_roll   a frame a step of time: 88 keys struck, 88 keys still held, boundary
    events       a frame an event: 88 notes on, 88 notes off, time shifts of 1, 2, .. steps, boundary
    abc          a frame a character of the tune's ABC text: newline, printable ASCII, boundary

`python data.py FOLDER OUT.npz` reads a large collection once; --data=OUT.npz then starts at once.
Shape letters: B batch, T frames, V units in a frame.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import notation
from notation import KEYS
from notation import Song
from notation import UserError

MAX_FRAMES = 100_000        # longest song we accept: 3.5 hours at 4 steps a beat and 120 beats a minute


# ---------------------------------------------------------------------------------------------------------------------
# Representations. Nobody but these classes asks which one it is.

def quantise(notes, steps_per_beat):
    """Notes (N, 3) in beats to (N, 3) int64 in steps: rounded half up, one step long at least."""
    steps = np.floor(notes * [1, steps_per_beat, steps_per_beat] + 0.5)
    if not steps[:, 1:].max(initial=0) < MAX_FRAMES:
        raise UserError(f'a song is longer than {MAX_FRAMES:,} steps: cut it, or use fewer --steps_per_beat')
    steps = steps.astype(np.int64)
    steps[:, 2] = np.maximum(steps[:, 2], steps[:, 1] + 1)
    return notation.one_per_key(steps)


def moved(song, semitones):
    """A Song moved up, with its key signature; its text no longer holds."""
    if not semitones:
        return song
    sharps = None if song.sharps is None else notation.signature(song.sharps + 7 * semitones)
    return song._replace(notes=song.notes + [semitones, 0, 0], sharps=sharps, text=None)


class Representation:
    """What the three have in common. Each has V, encode, decode, and `settings` to build it; heads that fit, the
    default first; beat and shift for the model's clock (see Config); steps_per_beat, and about as many frames_per_beat
    as a tune has."""
    planes = 0          # of 88 keys each, with which the units begin; a text has none, and stays in its key
    shift = 0           # the first of the units that move time; 0: each frame does, by a step
    heads = ('softmax',)
    top_p = 1.0         # in composing, unless a person asks for another
    left_out = 0        # notes of all songs so far for which there is no place in the frames

    def boundary(self):
        """The frame between tunes, (1, V) uint8."""
        return np.eye(1, self.V, self.V - 1, dtype=np.uint8)

    def steps(self, frames):
        """How many steps of time frames (T, V) take, for the clock."""
        return len(frames)

    def to_song(self, frames, ended=True):
        """Frames (T, V) of a tune, with its end or without, to a Song. Raises UserError if they are no music."""
        return Song('', self.decode(frames))

    def opening(self, path, beats, common_key):
        """The first beats of the first tune in a .mid or .abc file: as a Song, as frames (T, V) to go on from, and by
        how many semitones it was moved to the common key. Raises UserError if there are no notes in them."""
        songs, skipped = read_file(File(path.name, path))
        if not songs:
            raise UserError(f'{path} has no tune that can be read ({skipped[0]}): give another --prompt')
        song = songs[0]
        notes = song.notes[song.notes[:, 1] < beats]
        if not len(notes):
            raise UserError(f'{path} has no notes in its first {beats:g} beats: '
                            'give another --prompt or more --prompt_beats')
        text = song.text if song.notes[:, 2].max() <= beats else None
        semitones = notation.common_key_shift(song) if common_key else 0
        notes[:, 2] = np.minimum(notes[:, 2], beats)
        song = moved(song._replace(notes=notes, text=text), semitones)
        frames = self.encode(song)
        # what is composed goes on from the frames, so it is their times that count
        return song._replace(notes=self.decode(frames)), frames, semitones

    def transpose(self, frames, semitones):
        """Moves frames (T, V) up, in place, as far as the keyboard allows, and returns by how many semitones."""
        keys = frames[:, :self.planes * KEYS]
        planes = keys.reshape(len(frames), self.planes, KEYS)
        used = np.flatnonzero(planes.any((0, 1)))
        if len(used):
            semitones = min(max(semitones, -used[0]), KEYS - 1 - used[-1])
            keys[:] = np.roll(planes, semitones, axis=2).reshape(keys.shape)
        return semitones


class PianoRoll(Representation):
    """A frame is a step of time and says of each key whether it is struck in it (units 0..87) or still held from
    before (88..175). With onsets=False there is one plane, on wherever a key sounds; repeated notes melt together."""
    heads = ('chord', 'bernoulli')
    top_p = 0.99        # one unlikely key is heard

    def __init__(self, steps_per_beat=4, onsets=True):
        self.settings = dict(name='piano_roll', steps_per_beat=steps_per_beat, onsets=onsets)
        self.steps_per_beat = steps_per_beat
        self.onsets = onsets
        self.planes = 1 + onsets
        self.V = self.planes * KEYS + 1
        self.beat = steps_per_beat
        self.frames_per_beat = steps_per_beat

    def encode(self, song):
        """A Song to frames (T, V) uint8, from beat 0 to the end of the last note. Raises UserError above MAX_FRAMES."""
        notes = quantise(song.notes, self.steps_per_beat)
        frames = np.zeros((notes[:, 2].max(initial=0), self.V), dtype=np.uint8)
        for key, onset, end in notes:
            frames[onset + self.onsets:end, key + self.onsets * KEYS] = 1
        if self.onsets:
            frames[notes[:, 1], notes[:, 0]] = 1
        return frames

    def decode(self, frames):
        """Frames (T, V) to notes (N, 3) in beats, the inverse of encode. A key held that was not struck, which a
        sampled frame can contain, counts as struck."""
        planes = np.asarray(frames, dtype=bool)[:, :-1].reshape(len(frames), self.planes, KEYS)
        planes = planes.transpose(1, 2, 0)                          # (planes, KEYS, T)
        planes = np.pad(planes, ((0, 0), (0, 0), (1, 1)))           # silence before and after
        sounds = planes.any(0)
        struck = sounds[:, 1:] & ~sounds[:, :-1]
        if self.onsets:
            struck |= planes[0, :, 1:]
        ended = sounds[:, :-1] & (struck | ~sounds[:, 1:])
        key, onset = struck.nonzero()
        _, end = ended.nonzero()                                    # an end for each strike, in the same order
        notes = np.stack((key, onset / self.steps_per_beat, end / self.steps_per_beat), axis=1)
        return notes[np.lexsort((key, onset))]


class Events(Representation):
    """A frame is one event: a note on (units 0..87), a note off (88..175), or a time shift of 1, 2, .. steps, eight
    beats at most; after Oore et al. 2018 (arXiv 1808.03715), without loudness. At one instant first notes go off, then
    on, both from the lowest key to the highest, so that a tune has one spelling."""
    planes = 2

    def __init__(self, steps_per_beat=12):
        self.settings = dict(name='events', steps_per_beat=steps_per_beat)
        self.steps_per_beat = steps_per_beat
        self.longest = 8 * steps_per_beat       # steps in one time shift at most
        self.V = 2 * KEYS + self.longest + 1
        self.beat = steps_per_beat
        self.shift = 2 * KEYS                   # the unit of a shift by one step is the first of them
        self.frames_per_beat = 7                # folk tunes have 2.2 notes a beat, and often a shift between

    def encode(self, song):
        """A Song to frames (T, V) uint8. Raises UserError above MAX_FRAMES steps."""
        changes = []                            # (step, 1 for on, key): once sorted, in the order of the spelling
        for key, onset, end in quantise(song.notes, self.steps_per_beat).tolist():
            changes.append((onset, 1, key))
            changes.append((end, 0, key))
        units = []
        now = 0
        for step, on, key in sorted(changes):
            while now < step:
                shift = min(step - now, self.longest)
                units.append(self.shift + shift - 1)
                now += shift
            units.append(key if on else KEYS + key)
        return np.eye(self.V, dtype=np.uint8)[units]

    def decode(self, frames):
        """Frames (T, V) to notes (N, 3) in beats, the inverse of encode. Forgives what a sampler may do: a note off
        that is not on is passed over, a note on that is on is struck again, and what is on at the end ends there."""
        now = 0
        struck = {}                             # key -> step
        notes = []
        for unit in np.asarray(frames)[:, :-1].argmax(1).tolist():
            if unit >= self.shift:
                now += unit - self.shift + 1
                continue
            key = unit % KEYS
            if key in struck:
                notes.append((key, struck.pop(key), now))
            if unit < KEYS:
                struck[key] = now
        notes += [(key, onset, now) for key, onset in struck.items()]
        notes = [note for note in notes if note[2] > note[1]]
        beats = np.array(notes, dtype=np.float64).reshape(-1, 3) / [1, self.steps_per_beat, self.steps_per_beat]
        return beats[np.lexsort((beats[:, 0], beats[:, 1]))]

    def steps(self, frames):
        """How many steps of time frames (T, V) take."""
        return int((frames[:, self.shift:-1] * np.arange(1, self.longest + 1)).sum())


class AbcText(Representation):
    """A frame is one character of a tune's ABC text: newline or printable ASCII. A tune from an .abc file is its own
    text, M, L, P, V, K and the music; one from MIDI is written down first."""
    top_p = 0.98        # one unlikely character can make a text unreadable
    CHARACTERS = '\n' + ''.join(map(chr, range(32, 127)))
    settings = dict(name='abc')
    steps_per_beat = 12     # where a grid is needed: the one on which ABC's triplets stand, too
    V = len(CHARACTERS) + 1
    beat = 0                # there is no clock: time is not in the order of the characters
    frames_per_beat = 4

    def encode(self, song):
        """A Song to frames (T, V) uint8. Raises UserError above MAX_FRAMES characters."""
        text, left_out = notation.tune_text(song)
        self.left_out += left_out
        return self.encode_text(text, song.name)

    def encode_text(self, text, name='the prompt'):
        """ABC text to frames (T, V) uint8; raises UserError for too many characters, or one not in CHARACTERS."""
        if len(text) > MAX_FRAMES:
            raise UserError(f'{name} has more than {MAX_FRAMES:,} characters of ABC: cut it, or leave it out')
        unknown = set(text) - set(self.CHARACTERS)
        if unknown:
            raise UserError(f'{min(unknown)!r} is no character that a model of ABC text knows: use plain ASCII')
        return np.eye(self.V, dtype=np.uint8)[[self.CHARACTERS.index(c) for c in text]]

    def text(self, frames):
        """Frames (T, V) to text."""
        return ''.join(self.CHARACTERS[unit] for unit in np.asarray(frames)[:, :-1].argmax(1))

    def to_song(self, frames, ended=True):
        """Frames (T, V) to a Song, without the end as far as the last bar line; raises UserError for invalid ABC."""
        text = self.text(frames)
        if not ended:
            text = text[:text.rfind('|') + 1] or text
        skipped = []
        songs = notation.read_abc(f'X:1\n{text}\n'.encode(), 'the composed text', skipped)
        if not songs:
            raise UserError(skipped[0])
        return songs[0]

    def decode(self, frames):
        """Frames (T, V) to notes (N, 3) in beats; raises UserError if they are not valid ABC."""
        return self.to_song(frames).notes

    def opening(self, path, beats, common_key):
        """As in Representation; and a file of fields alone, M:6/8 and K:D for one, asks for a tune in that metre and
        key."""
        header = read_header(path) if path.suffix.lower() == '.abc' else ''
        if header:
            return Song('', np.zeros((0, 3)), text=header), self.encode_text(header), 0
        song, frames, semitones = super().opening(path, beats, common_key)
        # it goes on, so it has no end; but a repeat has
        text = re.sub(':$', ':|', self.text(frames).rstrip('|]\n '))
        return song, self.encode_text(text), semitones


REPRESENTATIONS = dict(piano_roll=PianoRoll, events=Events, abc=AbcText)


def representation(settings):
    """The representation of these settings, as a checkpoint keeps them. Raises UserError if there is none."""
    options = dict(settings)
    try:
        return REPRESENTATIONS[options.pop('name')](**options)
    except (KeyError, TypeError):
        raise UserError(f'there is no representation {settings}: use one of {", ".join(REPRESENTATIONS)}') from None


# ---------------------------------------------------------------------------------------------------------------------
# The form of a tune: its metre, which of its parts are new and which repeat an earlier one, as in AABB, and which come
# home, to the tonic

FURTHEST = 64           # beats that a repeat may lie back
REPEAT = 8              # beats that it has at least, before a nearer one takes some of them
CHORDS = 32             # different ones of a song that are kept: folk tunes have fewer, pianists have more than enough
# what is told of the boundary after a tune, see make_plan
END = np.array([1, 0, 0, 0, 0, 0], dtype=np.int32)


def frame_names(frames):
    """A number for each of frames (T, V) -> (T,) int64, the same for equal frames: a sum of random ones, one for each
    unit that is on."""
    return frames @ np.random.default_rng(0).integers(1 << 50, size=frames.shape[1])


def step_names(notes, steps_per_beat):
    """A number for what notes (N, 3) strike and hold in each step, (S,)."""
    return frame_names(PianoRoll(steps_per_beat).encode(Song('', notes)))


def find_form(song, frames, representation, common_key):
    """The form of a Song, with its frames (T, V) in a representation: dict(metre, sixteenths, bar, pickup, parts,
    homes, chords). sixteenths: does more than one note in twenty begin between the eighths? bar is how long a bar is
    and pickup where the first full one begins, both in frames, guessed where the song does not tell them.

    parts: [(back, frames), ..]. A part repeats, frame by frame, what stood `back` beats before it, or is new where back
    is 0. homes: see find_homes; none of a tune that is not in the common key, since its tonic is not known. chords: the
    names of what is struck and held below the melody, the most common CHORDS of them."""
    beat = representation.beat
    back = find_repeats(frames, beat)
    edges = np.flatnonzero(np.diff(back, prepend=-1, append=-1))
    parts = list(zip(back[edges[:-1]].tolist(), np.diff(edges).tolist()))
    homes = find_homes(song, back, edges, beat) if common_key else []
    metre, bar, pickup = notation.fit_bars(song.notes, song.metre, song.pickup)
    between = 2 * quantise(song.notes, beat)[:, 1] % beat > 0
    sixteenths = bool(between.sum() > 0.05 * len(between))
    heard = representation.decode(frames)
    below = step_names(heard[~notation.is_melody(heard)], beat)
    chords = [name for name, _ in collections.Counter(below.tolist()).most_common(CHORDS)]
    return dict(metre=metre, sixteenths=sixteenths, bar=float(bar * beat), pickup=float(pickup * beat), parts=parts,
                homes=homes, chords=chords)


def find_repeats(frames, beat):
    """How many beats before each of the frames (T, V) lies what it repeats, (T,); 0: it is new."""
    names = frame_names(frames)
    back = np.zeros(len(frames), dtype=int)
    for beats in range(FURTHEST, 0, -1):        # the nearest repeat counts
        lag = beats * beat
        same = names[lag:] == names[:-lag]
        if same.sum() < REPEAT * beat:          # as for most lags: too few for a stretch of them
            continue
        changes = np.diff(same, prepend=0, append=0)
        for first, stop in zip(np.flatnonzero(changes > 0), np.flatnonzero(changes < 0)):
            if stop - first >= REPEAT * beat:
                back[lag + first:lag + stop] = beats
    return back


def find_homes(song, back, edges, beat):
    """The melody notes with which a tune in the common key comes home, [(first frame, frames until the next melody
    note, 1 + pitch class), ..]: the last one of each part, if it is C or A, and, where the part is a repeat, the C or A
    in the same place of what it repeats. A few new frames in or after a repeat, as another last note, belong to it.
    back (T,) as in find_repeats, edges where the parts begin and end."""
    keys, onsets, _ = quantise(song.notes[notation.is_melody(song.notes)], beat).T
    pitch_class = (keys + notation.LOWEST) % 12
    source = beat * back
    for first, stop in itertools.pairwise(edges):
        if first and not source[first] and stop - first < REPEAT * beat:
            source[first:stop] = source[first - 1]
    found = set()
    for end in np.flatnonzero(np.diff(source, append=-1)) + 1:
        note = np.searchsorted(onsets, end) - 1
        while note >= 0 and pitch_class[note] in (0, 9) and note not in found:
            found.add(int(note))
            repeated = onsets[note] - source[onsets[note]]
            note = np.searchsorted(onsets, repeated, side='right') - 1
            if onsets[note] != repeated:
                break
    following = np.append(onsets[1:], len(back))
    return [(int(onsets[i]), int(following[i] - onsets[i]), 1 + int(pitch_class[i])) for i in sorted(found)]


def make_plan(form):
    """What a model is told of a form, (T + 1, 6) int32: for each frame a row

        (1 + back, frames left of the part, of the tune, of the bar, metre, home)

    and one for the boundary after it. Frames left count this one. metre is 1 + twice its number in BARS, and 1 more
    with sixteenths, or 0 for another metre. home is 1 + the pitch class of the tonic from a note that comes home to the
    next one, else 0. A row of zeros tells nothing."""
    metre = 0
    if form['metre'] in notation.BARS:
        metre = 1 + 2 * list(notation.BARS).index(form['metre']) + form['sixteenths']
    of_tune = form_length(form)
    rows = []
    for back, frames in form['parts']:
        for of_part in range(frames, 0, -1):
            # a bar line belongs to the frame that is nearest
            of_bar = 1 + int((form['pickup'] - len(rows) - 0.5) % form['bar'])
            rows.append((1 + back, of_part, of_tune, of_bar, metre, 0))
            of_tune -= 1
    plan = np.array([*rows, END], dtype=np.int32)
    for first, frames, home in form['homes']:
        plan[first:first + frames, 5] = home
    return plan


def form_length(form):
    """Frames in a tune of this form."""
    return sum(frames for _, frames in form['parts'])


# ---------------------------------------------------------------------------------------------------------------------
# A split is its songs end to end as frames, one bit a unit: boundary, song, boundary, song, .., boundary

SPLITS = ('train', 'valid', 'test')


class Windows(NamedTuple):
    """Windows cut out of a split, and what Model.loss needs to know of what stands before them."""
    frames: torch.Tensor    # (B, T + 1, V) uint8
    past: torch.Tensor      # (B, W, V) uint8 the frames before each; empty ones before the split begins
    age: torch.Tensor       # (B,) int64 how many frames ...
    time: torch.Tensor      # (B,) int64 ... and steps the last of these is after the boundary at which its tune began
    plan: torch.Tensor      # (B, T, 6) int32 what is told of frames[:, 1:], see make_plan


class Dataset:
    """Songs in three splits, as frames. source: what music this is, in a line; songs: {'train': [Song], ..};
    common_key: were they moved to C major or A minor? sharps: the key signature that most of them had before."""

    def __init__(self, songs, source, representation, common_key=False, sharps=None):
        self.songs = songs
        self.source = source
        self.representation = representation
        self.common_key = common_key
        self.sharps = sharps
        self.packed = {}        # split -> (frames, V / 8) uint8
        self.bounds = {}        # split -> (songs + 1,) where the boundaries stand
        self.beats = {}         # split -> (songs,) from the start of each song to the end of its last note
        boundary = np.packbits(representation.boundary(), axis=1)
        for split in SPLITS:
            rows = [boundary]
            for song in songs[split]:
                rows += [np.packbits(representation.encode(song), axis=1), boundary]
            lengths = [len(frames) for frames in rows[1::2]]
            self.packed[split] = np.concatenate(rows)
            self.bounds[split] = np.cumsum([0] + [length + 1 for length in lengths])
            self.beats[split] = np.array([song.notes[:, 2].max(initial=0) for song in songs[split]], dtype=np.float64)

    def frames(self, split, start, end):
        """Frames start to end - 1 of a split, (T, V) uint8."""
        return np.unpackbits(self.packed[split][start:end], axis=1, count=self.representation.V)

    def lengths(self, split):
        """Frames of each song, boundaries not counted: (songs,)."""
        return np.diff(self.bounds[split]) - 1

    @functools.cached_property
    def forms(self):
        """The form of each training song."""
        forms = []
        for song, (start, end) in zip(self.songs['train'], itertools.pairwise(self.bounds['train'])):
            frames = self.frames('train', start + 1, end)
            forms.append(find_form(song, frames, self.representation, self.common_key))
        return forms

    @functools.cached_property
    def plans(self):
        """The plans of all training songs, end to end as their frames are."""
        return np.concatenate([[END], *map(make_plan, self.forms)])

    def batch(self, batch_size, block_size, transpose, rng, history=0, told=0.0):
        """Windows of block_size + 1 frames from random places of the training songs, with the `history` frames before
        each. Each is moved up or down by a random interval of at most `transpose` semitones; in a common key, by
        chance, half of them are. told: the share of windows that are told the form of their song. rng: a
        np.random.Generator. Raises UserError if there are too few frames for one."""
        longest = len(self.packed['train']) - 1
        if block_size > longest:
            raise UserError(f'the train songs are too short for --block_size={block_size}: '
                            f'use --block_size={longest} or less, or more music')
        bounds = self.bounds['train']
        shape = (batch_size, history + block_size + 1, self.representation.V)
        frames = np.zeros(shape, dtype=np.uint8)
        age = []
        time = []
        plans = np.zeros((batch_size, block_size, len(END)), dtype=np.int32)
        first = rng.integers(0, longest - block_size + 1, batch_size)
        semitones = rng.integers(-transpose, transpose + 1, batch_size)
        if self.common_key:                     # half of the windows stay in it
            semitones *= rng.integers(0, 2, batch_size)
        for row, start, interval, rows in zip(frames, first, semitones, plans):
            if rng.random() < told:
                rows[:] = self.plans[start + 1:start + block_size + 1]
            before = min(start, history)        # frames there are before the window
            row[history - before:] = self.frames('train', start - before, start + block_size + 1)
            interval = self.representation.transpose(row, interval)
            home = rows[:, 5]
            home[home > 0] = 1 + (home[home > 0] - 1 + interval) % 12
            began = bounds[np.searchsorted(bounds, max(start - 1, 0), 'right') - 1]
            age.append(max(start - 1 - began, 0))
            time.append(self.representation.steps(self.frames('train', began + 1, start)))
        frames = torch.from_numpy(frames)
        plans = torch.from_numpy(plans)
        return Windows(frames[:, history:], frames[:, :history], torch.tensor(age), torch.tensor(time), plans)

    def whole_songs(self, split, batch_size, every=1):
        """Every song of a split, or one in `every`, songs of like length together: yields (frames, lengths, beats).

        frames (B, T + 2, V) torch.uint8: a boundary, the song, a boundary, and zeros up to the longest of the B songs;
        lengths (B,) torch.int64: frames of each song without its boundaries; beats (B,) torch.float64."""
        lengths = self.lengths(split)
        every = max(1, min(every, len(lengths)))
        order = np.argsort(lengths, kind='stable')[every // 2::every]
        for songs in np.split(order, range(batch_size, len(order), batch_size)):
            frames = np.zeros((len(songs), lengths[songs[-1]] + 2, self.representation.V), dtype=np.uint8)
            for row, song in zip(frames, songs):
                start, end = self.bounds[split][song:song + 2]
                row[:end + 1 - start] = self.frames(split, start, end + 1)
            yield torch.from_numpy(frames), torch.from_numpy(lengths[songs]), torch.from_numpy(self.beats[split][songs])


# ---------------------------------------------------------------------------------------------------------------------
# Where the music comes from

HERE = Path(__file__).resolve().parent
NOTTINGHAM = HERE / 'nottingham.zip'
TUNES = HERE / 'tunes.abc'
NOTTINGHAM_URLS = (
    'https://codeload.github.com/SudharshanShanmugasundaram/Music-Generation/zip/'
    '17c438d6ba921a8848cf29ded6fd24399981bda1',
    'https://web.archive.org/web/20190502175445id_/http://www-etud.iro.umontreal.ca/~boulanni/Nottingham.zip')
NOTTINGHAM_DIGEST = 'a107e20c1b880d97cb1d7c324cb185400313e6f3ffbf20e4b5d56bd3e604ea7e'
TIMEOUT = 10                            # seconds for one download
MAX_DOWNLOAD = 1 << 28                  # bytes
MAX_FILE = 1 << 26                      # bytes of one file: the largest public tune books have 20 MB
MUSIC = ('.mid', '.midi', '.kar', '.rmi', '.abc')
MANY = 2000                             # from so many files on, all cores read
FOLDERS = dict(train='train', valid='valid', validation='valid', test='test')


class File(NamedTuple):
    """A music file: a path, or a member of the zip there."""
    name: str
    path: Path
    member: str | None = None


def load(data='nottingham', representation=None, common_key=None, log=print):
    """Read music into a Dataset.

    data: 'nottingham' (1,037 folk tunes, split as in Boulanger-Lewandowski et al. 2012: nottingham.zip beside this
        file, or a download, or tunes.abc instead), or the path of a folder, .zip, .mid, .abc, or .npz of data.py.
        Folders named train, valid and test are the splits; without them a hash of the name splits songs 8:1:1.
    representation: how to make frames, by default PianoRoll(). common_key: move every song to C major or A minor; by
        default this is done where all files tell their key, unless songs are kept as text.
    log gets one line for each notice. What cannot be read is skipped and named on stderr.
    Raises UserError if no song is left.
    """
    representation = representation or PianoRoll()
    source, path = find_nottingham(log) if str(data) == 'nottingham' else (str(data), Path(data))
    found, skipped = load_songs(path) if path.suffix.lower() == '.npz' else read_music(path, log)
    longest = MAX_FRAMES / representation.steps_per_beat - 1
    songs = []
    for file, song in found:
        if song.notes[:, 2].max() <= longest:
            songs.append((file, song))
        else:
            skipped.append(f'{song.name} is longer than {longest:,.0f} beats: cut it, or lower --steps_per_beat')
    tell_what_is_skipped(data, songs, skipped)
    tell_what_is_left_out([song for _, song in songs], log)
    keys = [song.sharps for _, song in songs]
    if common_key is None:
        common_key = None not in keys and representation.planes > 0
    if common_key:
        songs = [(file, moved(song, notation.common_key_shift(song))) for file, song in songs]
    splits = split_songs(songs, log)
    source = f'{source} ({len(songs):,} songs)'
    dataset = Dataset(splits, source, representation, common_key, statistics.mode(keys))
    if representation.left_out:
        log(f'{representation.left_out:,} notes have no place in ABC text (a bass below chords) and are left out')
    return dataset


def tell_what_is_skipped(data, songs, skipped):
    """Up to five of the sentences, on stderr. Raises UserError if no song is left."""
    if not songs:
        raise UserError(f'no song in {data} can be used: {skipped[0]}')
    for sentence in skipped[:5]:
        print(notation.printable(f'skipped: {sentence}'), file=sys.stderr)
    if len(skipped) > 5:
        print(f'skipped: {len(skipped) - 5:,} more', file=sys.stderr)


def tell_what_is_left_out(songs, log):
    """A line for each thing that is in the files and not in the frames."""
    dropped = sum(song.dropped for song in songs)
    if dropped:
        log(f'{dropped:,} notes that a piano does not have are left out')
    silent = [song.silence for song in songs if song.silence >= 1]
    if silent:
        log(f'{len(silent):,} songs end in silence, {sum(silent):,.0f} beats in all, which is left out')


def read_music(path, log):
    """All songs of a folder, zip or file: ([(file name, Song)], [a sentence for what is skipped])."""
    songs = []
    skipped = []
    open_zip.cache_clear()      # there may be another file of this name by now
    files = music_files(path, log)
    for file, (found, sentences) in zip(files, read_files(files)):
        songs += [(file.name, song) for song in found]
        skipped += sentences
    return songs, skipped


def read_files(files):
    """Yields read_file of each; thousands of files are shared out to all cores."""
    if len(files) < MANY:
        yield from map(read_file, files)
        return
    # spawn: a fork would inherit torch's threads in whatever state they are. Ctrl-C is for the parent
    context = multiprocessing.get_context('spawn')
    with context.Pool(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap(read_file, files, chunksize=64)


def read_file(file):
    """The Songs in a File, notes in float32, and a sentence for each tune that is skipped."""
    skipped = []
    try:
        content = notation.read_bytes(file.path, MAX_FILE) if file.member is None else read_member(file)
        if file.name.lower().endswith('.abc'):
            songs = notation.read_abc(content, file.name, skipped)
        else:
            songs = [notation.read_midi(content, file.name)]
    except UserError as e:
        return [], [str(e)]
    songs = [song._replace(notes=song.notes.astype(np.float32)) for song in songs if len(song.notes)]
    if not songs and not skipped:
        skipped = [f'{file.name} has nothing in it that a piano can play: replace it or leave it out']
    return songs, skipped


def read_header(path):
    """The fields M, L and K of an ABC file that has no music in it, as tune_text orders them; '' if it has some."""
    text = re.sub('%.*', '', notation.decoded(notation.read_bytes(path, MAX_FILE)))
    if re.search(r'(?m)^(?![A-Za-z]:)[ \t]*\S', text):
        return ''
    kept = dict(re.findall(r'(?m)^([MLK]):[ \t]*(.*?)\s*$', text))
    return ''.join(f'{name}:{kept[name]}\n' for name in 'MLK' if kept.get(name))


@functools.lru_cache(1)
def open_zip(path):
    content = notation.read_bytes(path)
    try:
        return zipfile.ZipFile(io.BytesIO(content))
    except Exception as e:      # BadZipFile, struct.error, OverflowError, ...
        raise UserError(f'{path} is not a whole zip ({e}): get it again') from None


def read_member(file):
    """The bytes of a file in a zip, which is never unpacked to the disk."""
    archive = open_zip(file.path)
    try:
        with archive.open(file.member) as f:
            content = f.read(MAX_FILE + 1)
    except Exception as e:      # whatever zipfile and its decompressors come upon
        raise UserError(f'{file.name} in {file.path} cannot be read ({e}): get the zip again') from None
    if len(content) > MAX_FILE:
        raise UserError(f'{file.name} is larger than {MAX_FILE >> 20} MB: cut it, or leave it out')
    return content


def music_files(path, log):
    """The music Files of a path."""
    if not os.path.exists(path) or path == Path():
        raise UserError(f'there is no --data={path}: give a folder, a .zip, .mid, .abc or .npz')
    if path.is_dir():
        paths = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        files = [File(p.relative_to(path).as_posix(), p) for p in paths if p.is_file()]     # and no pipe or device
    elif path.suffix.lower() == '.zip':
        names = sorted(open_zip(path).namelist())
        files = [File(name, path, name) for name in names]
    else:
        files = [File(path.name, path)]
    files = [file for file in files if not re.search(r'(^|/)(\.[^/]|__MACOSX/)', file.name)]
    zips = [file.name for file in files if file.name.lower().endswith('.zip')]
    if zips:
        log(notation.printable(f'{len(zips)} zip files inside {path} are left alone, {zips[0]} for one: '
                               'give --data one of them, or unpack them'))
    music = [file for file in files if file.name.lower().endswith(MUSIC)]
    if not music:
        raise UserError(f'there is no music in {path}: give --data MIDI files (.mid, .midi, .kar, .rmi) or ABC (.abc)')
    return music


def split_songs(songs, log):
    """[(file name, Song)] to {'train' | 'valid' | 'test': [Song]}, by folder if any is so named, or by hash."""
    def rank(song):
        return int(hashlib.sha256(song.name.rsplit('/', 1)[-1].encode(errors='surrogateescape')).hexdigest(), 16)

    if len(songs) < 3:
        log('fewer than 3 songs: train, valid and test are the same, and the figures say nothing of new music')
        return {split: [song for _, song in songs] for split in SPLITS}
    splits = {split: [] for split in SPLITS}
    folders = [[FOLDERS[part] for part in name.lower().split('/')[:-1] if part in FOLDERS] for name, _ in songs]
    by_folder = any(folders)
    for (_, song), folder in zip(songs, folders):
        if by_folder:
            splits[folder[0] if folder else 'train'].append(song)
        else:
            splits[{0: 'valid', 1: 'test'}.get(rank(song) % 10, 'train')].append(song)
    if by_folder:
        log('splits by the names of folders: ' + ', '.join(f'{len(splits[split]):,} songs {split}' for split in SPLITS))
    for split in SPLITS:
        if not splits[split]:   # few songs, or folders for two of the three: take a tenth of the largest
            largest = max(splits.values(), key=len)
            largest.sort(key=rank)
            tenth = max(len(largest) // 10, 1)
            splits[split] = largest[:tenth]
            del largest[:tenth]
            log(f'no songs for {split}: {tenth:,} of the largest split are taken')
    return splits


def find_nottingham(log):
    """What is used for Nottingham, and its path: the local archive, or a download, or the bundled tunes."""
    trouble = []
    if NOTTINGHAM.exists():
        try:
            nottingham_files(notation.read_bytes(NOTTINGHAM))
            return 'Nottingham', NOTTINGHAM
        except UserError as e:
            trouble.append(f'{NOTTINGHAM}: {e}')
    for url in NOTTINGHAM_URLS:
        host = url.split('/')[2]
        log(f'downloading Nottingham from {host}')
        try:
            keep_nottingham(nottingham_files(download(url)))
            return 'Nottingham', NOTTINGHAM
        except Exception as e:  # no network, no such archive, a bad one, or no room: try the next
            trouble.append(f'{host}: {e}')
    trouble = '; '.join(trouble)
    if not TUNES.exists():
        raise UserError(f'there is neither Nottingham ({trouble}) nor {TUNES}: give --data your own music')
    log(notation.printable(f'no Nottingham ({trouble}), so this is the bundled {TUNES.name}; '
                           'put nottingham.zip beside it to change that'))
    return f'{TUNES.name}, for want of Nottingham', TUNES


def download(url):
    """The bytes at a URL, within TIMEOUT seconds. Raises OSError, or what urllib and http raise."""
    deadline = time.monotonic() + TIMEOUT
    content = bytearray()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        # a socket's timeout starts anew with every byte, so the whole is watched, too
        while piece := response.read1(1 << 16):
            content += piece
            if time.monotonic() > deadline or len(content) > MAX_DOWNLOAD:
                raise OSError(f'not there in {TIMEOUT} s')
    return bytes(content)


def nottingham_files(content):
    """{'train/x.mid': bytes} from whatever archive they are in. Raises UserError if they are not those files."""
    files = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                match = re.search(r'(?:^|/)Nottingham/((?:train|valid|test)/[^/]+\.mid)$', member)
                if match:
                    files[match[1]] = archive.read(member)
    except Exception as e:      # BadZipFile, zlib.error, NotImplementedError, ...
        raise UserError(f'it is not a whole zip ({e})') from None
    digest = hashlib.sha256(b''.join(name.encode() + b'\0' + files[name] for name in sorted(files))).hexdigest()
    if digest != NOTTINGHAM_DIGEST:
        raise UserError('it does not hold the 1,037 Nottingham files (their digest is wrong)')
    return files


def keep_nottingham(files):
    """Writes the files to nottingham.zip, so that the next run needs no network."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(f'Nottingham/{name}'), files[name], zipfile.ZIP_DEFLATED)
    notation.write_whole(NOTTINGHAM, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# A large collection, read once: python data.py FOLDER OUT.npz

def save_songs(path, songs, skipped):
    """Writes what read_music found: notes (N, 3) of all songs, and a table with the rest as JSON."""
    table = [(file, len(song.notes), song._replace(notes=None)) for file, song in songs]
    text = json.dumps(dict(songs=table, skipped=skipped)).encode()
    buffer = io.BytesIO()
    notes = np.concatenate([song.notes for _, song in songs] or [np.zeros((0, 3), np.float32)])
    np.savez_compressed(buffer, table=np.frombuffer(text, np.uint8), notes=notes)
    notation.write_whole(path, buffer.getvalue())


def load_songs(path):
    """What save_songs wrote, as read_music gives it. Raises UserError if it is no such file."""
    content = notation.read_bytes(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            table = json.loads(arrays['table'].tobytes())
            notes = arrays['notes']
        songs = []
        end = 0
        for file, count, fields in table['songs']:
            songs.append((file, Song(*fields)._replace(notes=notes[end:end + count])))
            end += count
        return songs, table['skipped']
    except Exception as e:      # whatever numpy, zipfile and json make of other bytes
        raise UserError(f'{path} is not what python data.py FOLDER OUT.npz writes ({type(e).__name__}): '
                        'write it again') from None


def main():
    """Read a folder, zip or file of music once, into an .npz that --data takes."""
    parser = make_parser(main.__doc__, 'python data.py my_folder my_music.npz')
    parser.add_argument('music', type=Path, help='a folder, .zip, .mid or .abc')
    parser.add_argument('out', type=Path, help='the .npz to write')
    args = parser.parse_args()
    if args.out.suffix.lower() != '.npz':
        raise UserError(f'{args.out} has to end in .npz, by which --data knows it: give another name')
    notation.check_writable(args.out)
    songs, skipped = read_music(args.music.resolve(), print)
    tell_what_is_skipped(args.music, songs, skipped)
    save_songs(args.out, songs, skipped)
    notes = sum(len(song.notes) for _, song in songs)
    print(f'{args.out}: {len(songs):,} songs, {notes:,} notes, {len(skipped):,} skipped')


# ---------------------------------------------------------------------------------------------------------------------
# Copies

def intervals(notes, steps_per_beat):
    """A tune as one number for each strike but the first, the same in every transposition: (strikes,) int64.

    Its lower 16 bits are the steps since the strike before, the others name (by a checksum) the keys that are struck,
    counted from the highest key of the strike before. It tells what is struck when, not how long it is held."""
    steps = np.floor(notes[:, :2] * [1, steps_per_beat] + 0.5).astype(np.int64)
    keys, onsets = steps[np.lexsort((steps[:, 0], steps[:, 1]))].T
    times, first = np.unique(onsets, return_index=True)
    strikes = zip(times, np.split(keys, first[1:]))
    tune = []
    for (before, last), (step, keys) in itertools.pairwise(strikes):
        name = zlib.crc32((keys - last[-1]).tobytes())
        tune.append((name << 16) + min(step - before, 0xffff))
    return np.array(tune, dtype=np.int64)


def copy_book(tunes):
    """Tunes made by intervals(), for longest_copy to search: all their strikes, sorted, and the place of each."""
    # a strike that is in no tune stands between them
    book = np.concatenate([np.append(tune, -1) for tune in tunes] or [np.zeros(0, np.int64)])
    places = np.argsort(book, kind='stable')
    return book[places], places


def longest_copy(tune, book):
    """Steps in the longest stretch of a tune, made by intervals(), that also stands in the book: from the strike before
    its first interval to its last strike."""
    strikes, places = book
    # run[i + 1]: steps of the match that ends with the strike at place i
    run = np.zeros(len(places) + 1, dtype=np.int64)
    longest = 0
    last = places[:0]
    begin = np.searchsorted(strikes, tune)
    end = np.searchsorted(strikes, tune, side='right')
    for strike, a, b in zip(tune, begin, end):
        here = places[a:b]
        steps = run[here] + (strike & 0xffff)
        run[last + 1] = 0
        run[here + 1] = steps
        last = here
        longest = max(longest, steps.max(initial=0))
    return int(longest)


# ---------------------------------------------------------------------------------------------------------------------
# The command lines of all scripts

def make_parser(description, example):
    """An argparse parser whose complaints are one sentence."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f'example: {example}')
    parser.error = lambda message: exit_with(f'{message}; --help lists the options')
    return parser


def add_options(parser, title, *options):
    """Adds a group of options, each (name, default, type or dict of settings for argparse, help)."""
    group = parser.add_argument_group(title)
    for name, default, kind, text in options:
        settings = kind if isinstance(kind, dict) else dict(type=kind)
        text += '' if default is None else f' (default: {default})'
        group.add_argument(f'--{name}', default=default, help=text, **settings)


def boolean(text):
    """An argparse type: True or False."""
    if text.lower() in ('true', '1', 'yes'):
        return True
    if text.lower() in ('false', '0', 'no'):
        return False
    raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')


FLAG = dict(type=boolean, nargs='?', const=True, metavar='BOOL')


def number(kind, low, high=math.inf):
    """An argparse type: a number of this kind, int or float, from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            bounds = f'from {low} to {high}' if high < math.inf else f'of {low} or more'
            raise argparse.ArgumentTypeError(f'{text!r} is not a {"whole " * (kind is int)}number {bounds}')
        return value
    return parse


def pick_device(name):
    """The torch.device of this name, or the best here for None. Raises UserError if it is not on this machine."""
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name == 'cuda' and 'LOCAL_RANK' in os.environ:
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()    # which also refuses 'meta'
        return device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f'--device={name} is not on this machine: use --device=cpu, or leave it out') from None


def exit_with(message, status=2):
    """Ends the program with one sentence on stderr; of many processes on a machine, one speaks."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
    sys.exit(status)


def run(main, lower):
    """Runs a script's main. What a user can mend ends in one sentence; lower: the options that save memory."""
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors='replace')        # a terminal that has no ■ shows a ?
    try:
        main()
    except UserError as e:
        exit_with(e)
    except BrokenPipeError:                             # as in: python sample.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_with('stopped, since nobody reads what it prints')
    except KeyboardInterrupt:
        exit_with('stopped', 130)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(e):
            raise
        exit_with(f'there is not enough memory: lower {lower}')


if __name__ == '__main__':
    run(main, 'the number of files')
