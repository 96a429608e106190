"""What musicians read and write: MIDI files and ABC tunes in and out, the key and the metre of a tune.

A *note* is a row (key, onset, end): key 0..87 counts from A0, times are in beats, that is quarter notes.
N is the number of notes in a tune.
"""

import collections
import contextlib
import functools
import io
import itertools
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from dataclasses import field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import mido
import numpy as np

LOWEST = 21             # the piano: A0 is MIDI note 21 ...
KEYS = 88               # ... and C8 is 108


# ---------------------------------------------------------------------------------------------------------------------
# Files

class UserError(ValueError):
    """Something the user can mend: one sentence that names the file or option, and the mend."""

    def __init__(self, sentence):
        super().__init__(printable(sentence)[:300])


def printable(text):
    """Names and titles come from files: what would move the cursor, or not encode, must not reach the terminal."""
    return ''.join(c if c.isprintable() else '?' for c in str(text))


def read_bytes(path, limit=None):
    """The bytes of a user's file, at most `limit`; the one place where such a file is opened. Raises UserError if it
    is larger, cannot be read, or is no plain file: a pipe would hang and a device might never end."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, 'it is no plain file')
        with open(path, 'rb') as file:
            return open_music(file, path, '', limit)[0]
    except OSError as e:
        raise UserError(f'cannot read {path} ({e.strerror}): give the path of a file you may read') from None


def open_music(file, name, kind, limit):
    """(bytes, name) of what a reader is given: a path, the bytes themselves, or a binary file object."""
    if isinstance(file, (str, os.PathLike)):
        return read_bytes(file, limit), name or Path(file).name
    name = name or kind
    content = file if isinstance(file, bytes) else file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(content) > limit:
        raise UserError(f'{name} is larger than {limit >> 10:,} KB: cut it, or leave it out')
    return content, name


def check_writable(path):
    """Raises UserError unless path is a plain file or a new one: to replace it would be the end of a link or device."""
    folder = os.path.dirname(path) or '.'
    if not os.path.isdir(folder):
        raise UserError(f'cannot write {path}: there is no folder {folder}; make it, or give another path')
    if not os.access(folder, os.W_OK):
        raise UserError(f'cannot write {path}: you may not write into {folder}; give another path')
    if os.path.islink(path) or os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'cannot write {path}: it is a link, a folder or a device; give the path of a plain file')


def write_whole(path, content):
    """Write bytes to a file that is there whole or not at all, even if the machine stops: to a temporary file, then
    flush, fsync, rename. Raises UserError if that fails; the file keeps what it had."""
    check_writable(path)
    part = f'{path}.{os.getpid()}.part'
    try:
        with open(part, 'wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise UserError(f'cannot write {path} ({e.strerror}): make room, or give a path you may write to') from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def clear_parts(folder, stem):
    """Remove the half-written files `stem.*.PID.part` of processes that are no more, unless it is not allowed."""
    with contextlib.suppress(OSError):
        for path in Path(folder).iterdir():
            match = re.fullmatch(rf'{re.escape(stem)}\..*\.([1-9]\d*)\.part', path.name)
            if match and not is_alive(int(match[1])):
                path.unlink()


def is_alive(pid):
    """Is there a process of this number? If we may not signal it, it is another user's."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as e:
        return isinstance(e, PermissionError)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Songs

class Song(NamedTuple):
    """A tune; what its file does not tell is None."""
    name: str
    notes: np.ndarray   # (N, 3) rows (key 0..87, onset, end), times in beats, sorted by (onset, key)
    tempo: float = 120.0   # quarter notes a minute
    sharps: int | None = None   # of the key signature; below 0: flats
    minor: bool = False
    metre: str | None = None   # such as '6/8'
    pickup: float | None = None   # the beat where the first full bar begins
    dropped: int = 0   # notes outside A0..C8, left out
    silence: float = 0.0   # beats of silence at the end, after the last note
    text: str | None = None   # the ABC it was read from: its fields M, L, P, V and K, and the music


def song_from_rows(name, rows, **more):
    """A Song from rows (MIDI note, onset, end) in any order; `more` are other fields of Song."""
    notes = as_notes(rows) - [LOWEST, 0, 0]
    on_piano = (notes[:, 0] >= 0) & (notes[:, 0] < KEYS)
    dropped = len(notes) - int(on_piano.sum())
    return Song(name, one_per_key(notes[on_piano]), dropped=dropped, **more)


def as_notes(rows):
    """Rows, or none, as a float64 array (N, 3)."""
    return np.asarray(rows, dtype=np.float64).reshape(-1, 3)


def one_per_key(notes):
    """A piano has one of each key: a key struck again ends its note; struck twice at once it sounds once."""
    notes = notes[np.lexsort((-notes[:, 2], notes[:, 1], notes[:, 0]))]   # by key, onset, longest first
    again = (notes[1:, :2] == notes[:-1, :2]).all(1)
    notes = notes[np.concatenate([[True], ~again])[:len(notes)]]
    cut = np.flatnonzero(notes[1:, 0] == notes[:-1, 0])
    notes[cut, 2] = np.minimum(notes[cut, 2], notes[cut + 1, 1])
    return notes[np.lexsort((notes[:, 0], notes[:, 1]))]


def is_melody(notes):
    """(N, 3) notes to (N,) booleans: a note is melody if nothing higher sounds, or starts with it, at its onset."""
    notes = as_notes(notes)
    melody = np.zeros(len(notes), dtype=bool)
    until = np.full(KEYS + 1, -np.inf)   # when each key falls silent
    for i in np.lexsort((-notes[:, 0], notes[:, 1])):   # at one onset the highest comes first
        key = int(notes[i, 0])
        melody[i] = until[key + 1:].max() <= notes[i, 1] + 1e-6
        until[key] = max(until[key], notes[i, 2])
    return melody


# ---------------------------------------------------------------------------------------------------------------------
# Keys

FIFTHS = 'FCGDAEB'      # letters by fifths: a key of n sharps raises the first n
# How well each pitch class fits a major and a minor key on C (Krumhansl and Kessler 1982)
PROFILES = np.array([[6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88],
                     [6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17]])


def sharps(key):
    """Sharps of a key written as letter, # or b, and m for minor: C 0, G 1, F#m 3, Bb -2."""
    signs = key.count('#') - key.count('b')
    return FIFTHS.index(key[0]) - 1 + 7 * signs - 3 * key.endswith('m')


def signature(fifths):
    """The signature, -5 (flats) to 6 sharps, of the key so many fifths above C."""
    return (fifths + 5) % 12 - 5


def written(sharps):
    """The signature that stands for so many sharps: nobody writes more than seven signs, so G# major is A flat."""
    return signature(sharps) if abs(sharps) > 7 else sharps


def key_name(sharps, minor=False):
    """The key of a signature: (2, False) is 'D', (-1, True) is 'Dm'."""
    signs, letter = divmod(written(sharps) + 1 + 3 * minor, 7)
    return FIFTHS[letter] + '#' * signs + 'b' * -signs + 'm' * minor


def estimate_key(notes):
    """(sharps -5..6, is it minor?) of the major or minor key whose Krumhansl-Kessler profile correlates best with the
    time that notes (N, 3) spend on each pitch class."""
    notes = as_notes(notes)
    pitch_class = (notes[:, 0].astype(int) + LOWEST) % 12
    length = np.maximum(notes[:, 2] - notes[:, 1], 1e-3)
    time = np.bincount(pitch_class, length, 12)
    z = (PROFILES - PROFILES.mean(1, keepdims=True)) / PROFILES.std(1, keepdims=True)
    fit = [z @ np.roll(time, -root) for root in range(12)]   # correlation, but for a factor that all keys share
    root, minor = divmod(int(np.argmax(fit)), 2)
    return signature(7 * (root + 3 * minor)), bool(minor)


def interval(sharps, other):
    """Semitones, -6..5, from the scale of a key signature to that of another."""
    return (7 * (other - sharps) + 6) % 12 - 6


def common_key_shift(song):
    """Semitones that move a Song to C major or A minor by its key signature (estimated where it has none): -6..5
    (G 5, D -2, A 3); an octave off that where a note would leave the keyboard, 0 where nothing fits."""
    count = estimate_key(song.notes)[0] if song.sharps is None else song.sharps
    shift = interval(count, 0)
    for semitones in (shift, shift + 12, shift - 12):
        keys = song.notes[:, 0] + semitones
        if ((keys >= 0) & (keys < KEYS)).all():
            return semitones
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Metre

# What each half beat of a bar is: D down beat, H half of the bar, B another beat, o between beats; where a beat is
# three eighths: P first beat, Q another one
BARS = {'4/4': 'DoBoHoBo', '3/4': 'DoBoBo', '2/4': 'DoBo', '6/8': 'PooQoo', '9/8': 'PooQooQoo'}
# Of 100 melody notes that begin there, how many last less than an eighth, an eighth, a quarter, a dotted quarter, more
# (counted in 615 tunes of the Nottingham collection); LIMITS in beats separate them
LENGTHS = {
    'D': (3, 36, 41, 6, 14),
    'H': (1, 37, 50, 4, 8),
    'B': (3, 54, 41, 1, 1),
    'P': (1, 55, 29, 10, 5),
    'Q': (1, 54, 36, 8, 1),
    'o': (2, 94, 2, 1, 1)}
LIMITS = (0.4, 0.8, 1.2, 1.8)
# Of 100 such places, how many have no chord, the same chord struck again, another chord: between what is counted in
# Nottingham, where the half of a bar has 4, and in books whose chords change more often
CHORDS = {
    'D': (10, 30, 60),
    'P': (10, 30, 60),
    'H': (85, 5, 10),
    'Q': (85, 5, 10),
    'B': (98, 1, 1),
    'o': (98, 1, 1)}
METRE_BEATS = 512       # how much of a long piece we look at


def bar_beats(metre):
    """Beats (quarter notes) in a bar: '6/8' has 3."""
    count, unit = metre.split('/')
    return 4 * int(count) / int(unit)


def estimate_metre(notes, bar=None):
    """(beats a bar, the beat where the first full bar begins) of notes (N, 3), from the notes alone.

    bar: the beats a bar where they are known; else it is 2, 3, 4 or 4.5. Of all metres and pickups, on half beats, it
    is the likeliest by where chords change and how long melody notes are.
    Source: the bar pointer model (Whiteley, Cemgil and Godsill 2006), with half beats as frames.
    """
    scores = metre_scores(notes, bar)
    if not scores:   # a bar that is not among BARS
        return bar, 0.0
    name, pickup = max(scores, key=scores.get)
    return bar_beats(name), pickup


def metre_text(notes, bar, pickup):
    """The metre as a musician writes it; bars of three beats are '6/8' or '3/4' by how the melody divides them."""
    notes = as_notes(notes)
    start = round(2 * pickup) % round(2 * bar) / 2
    scores = metre_scores(notes[is_melody(notes)], bar)
    names = [name for name, begin in scores if begin == start]
    return max(names, key=lambda name: scores[name, start])


def metre_scores(notes, bar=None):
    """{(metre, pickup): how likely it is, as a logarithm and but for a constant} for all BARS of so many beats."""
    notes = one_per_key(as_notes(notes))
    notes = notes[notes[:, 1] < METRE_BEATS]
    lengths, chords = cues(notes)
    scores = {}
    for name, places in BARS.items():
        size = len(places)
        if bar not in (None, size / 2):
            continue
        # (half beat of the tune, place in the bar); what chords and melody both say must not count twice
        by_length = [(100, *LENGTHS[place]) for place in places]
        by_chord = [CHORDS[place] for place in places]
        fit = 0.2 * np.log(by_length).T[lengths]
        if chords.any():
            fit += np.log(by_chord).T[chords]
        # going backwards, for each place in the bar: the best score from here to the end if we are there now; what
        # follows is the next place or, at a price, a new bar before this one is full (at the end of a part)
        best = np.zeros(size)
        following = np.arange(1, size + 1) % size
        for now in fit[::-1]:
            best = now + np.maximum(best[following], best[0] - 8)
        for pickup in range(size):
            # few tunes have a pickup of half a bar or more
            scores[name, pickup / 2] = best[-pickup] - 2 * (2 * pickup >= size)
    return scores


def cues(notes):
    """What each half beat tells, as columns of LENGTHS (0: no melody note begins) and of CHORDS."""
    melody = is_melody(notes)
    tune = notes[melody]
    steps = np.rint(2 * notes[:, 1]).astype(int)
    lengths = np.zeros(steps[melody].max(initial=-1) + 1, dtype=int)
    to_the_next = np.diff(tune[:, 1], append=tune[-1:, 2])
    lengths[steps[melody]] = 1 + np.searchsorted(LIMITS, to_the_next)
    struck = collections.defaultdict(set)
    for key, step in zip(notes[~melody, 0], steps[~melody]):
        struck[step].add(key % 12)
    chords = np.zeros_like(lengths)
    before = set()
    for step, chord in sorted(struck.items()):
        if len(chord) > 1 and step < len(chords):   # a note alone tells nothing
            chords[step] = 1 if chord <= before else 2
            before = chord
    return lengths, chords


# ---------------------------------------------------------------------------------------------------------------------
# MIDI

TICKS = 480             # to a beat, in the files we write
MAX_MIDI = 2 << 20      # bytes in a file: a piano concerto has 0.5 MB
# kinds of events: the status byte without its channel; what is no music (tempo, key, text) is 0x100 + its type
NOTE_OFF = 0x80
NOTE_ON = 0x90
CONTROLLER = 0xB0
END_OF_TRACK = 0x12F
TEMPO = 0x151
TIME_SIGNATURE = 0x158
KEY_SIGNATURE = 0x159
# how many data bytes follow the status byte; those that are not here have none
DATA_BYTES = {0x80: 2, 0x90: 2, 0xA0: 2, 0xB0: 2, 0xC0: 1, 0xD0: 1, 0xE0: 2, 0xF1: 1, 0xF2: 2, 0xF3: 1}
PEDAL = 64              # a controller
PERCUSSION = 9          # the channel of the drums, counted from 0


def read_midi(file, name=None):
    """Read a MIDI file of type 0 or 1 (a path, its bytes, or a binary file object) into a Song.

    Notes come from every track and channel but percussion (channel 10), held by the sustain pedal. Like a player it
    passes over counts, lengths and events that make no sense. Raises UserError if the file is cut off, or has no
    tracks or no beats.
    Source: Standard MIDI Files 1.0 (RP-001); the pedal as in Magenta's note-seq (apply_sustain_control_changes).
    """
    content, name = open_music(file, name, 'a MIDI file', MAX_MIDI)
    # not always at the start: a .rmi is a RIFF file around a MIDI file
    head, *tracks = content[content.find(b'MThd'):].split(b'MTrk')
    if not head.startswith(b'MThd') or not tracks:
        raise UserError(f'{name} is not a MIDI file with tracks in it: replace it or leave it out')
    kind = int.from_bytes(head[8:10])
    ticks_per_beat = int.from_bytes(head[12:14])
    if kind > 1 or not 0 < ticks_per_beat < 0x8000:
        raise UserError(f'{name} is a MIDI file of type 2 or in SMPTE time: save it as type 0 or 1 with time in beats')
    events = []
    try:
        for track in tracks:
            events += read_track(track)
    except StopIteration:
        raise UserError(f'{name} ends in the midst of an event: replace it or leave it out') from None
    # in order of time, at one time controllers first: the pedal counts for a key that goes up with it
    events = [(tick / ticks_per_beat, *event) for tick, *event in events]
    events.sort(key=lambda event: (event[0], event[1] != CONTROLLER))
    last = events[-1][0] if events else 0.0
    rows = as_notes(midi_rows(events, last))
    told = signatures(events, rows[:, 1].min(initial=last))
    silence = last - rows[:, 2].max(initial=0)
    return song_from_rows(name, rows, silence=silence, **told)


def read_track(chunk):
    """The events (tick, kind, channel, data bytes) of what follows an MTrk. Raises StopIteration if it is cut off."""
    body = chunk[4:]
    # the length that is stated counts only if there is no end of track
    if b'\xff\x2f\0' not in body:
        body = body[:int.from_bytes(chunk[:4])]
    stream = iter(body)
    events = []
    tick = 0
    status = 0
    for byte in stream:
        tick += read_number(byte, stream)
        byte = next(stream)
        data = []
        if byte < 0x80:   # data already: an event of the same kind as the latest one of a channel
            data = [byte]
            byte = status
        kind = byte
        if byte < 0xF0:
            status = byte
            kind = byte & 0xF0
        elif byte == 0xFF:
            kind = 0x100 + next(stream)
        size = DATA_BYTES.get(kind, 0)
        if byte in (0xF0, 0xF7, 0xFF):
            size = read_number(next(stream), stream)
        data += [next(stream) for _ in range(size - len(data))]
        events.append((tick, kind, byte & 15, data))
        if kind == END_OF_TRACK:
            break
    return events


def read_number(byte, stream):
    """A number of seven bits a byte, the last byte below 128; a longer one counts as eight bytes."""
    number = byte & 127
    for _ in range(7):
        if byte < 128:
            break
        byte = next(stream)
        number = number << 7 | byte & 127
    return number


def midi_rows(events, last):
    """Rows [MIDI note, onset, end] of events in order of time; what is never released ends at the beat `last`."""
    rows = []
    down = {}   # (channel, note) -> its row, did it cut the same note?
    held = {}   # channel whose pedal is down -> rows of the keys that went up since then
    for beat, kind, channel, data in events:
        if kind in (NOTE_OFF, NOTE_ON) and channel != PERCUSSION and data[0] < 128:
            at = channel, data[0]
            row, cut = down.get(at, (None, False))
            if kind == NOTE_ON and data[1] > 0:   # a velocity above 127 makes no sense, the strike does
                if row:
                    row[2] = beat
                rows.append([data[0], beat, last])
                down[at] = rows[-1], row is not None
            elif row and not (cut and row[1] == beat):   # else it is the late release of the note that was just cut
                del down[at]
                row[2] = last if channel in held else beat
                held.get(channel, []).append(row)
        elif kind == CONTROLLER and data[0] == PEDAL and 64 <= data[1] < 128:
            held.setdefault(channel, [])
        elif kind == CONTROLLER and data[0] == PEDAL and data[1] < 64:
            for row in held.pop(channel, []):
                row[2] = beat
    return rows


def signatures(events, first_note):
    """Fields of Song that events, times in beats, tell: the tempo at the first note, the first key, the first metre."""
    told = {}
    metres = {}   # beat -> metre
    for beat, kind, _, data in events:
        if kind == TEMPO and len(data) == 3 and any(data) and beat <= first_note:
            told['tempo'] = 6e7 / int.from_bytes(data)
        elif kind == KEY_SIGNATURE and len(data) == 2 and data[1] < 2 and 'sharps' not in told:
            count = int.from_bytes(data[:1], signed=True)
            if abs(count) <= 7:
                told.update(sharps=count, minor=data[1] == 1)
        elif kind == TIME_SIGNATURE and len(data) > 1 and data[0] > 0 and data[1] < 7:
            metres.setdefault(beat, f'{data[0]}/{2 ** data[1]}')
    if metres:
        told['metre'] = next(iter(metres.values()))
    if len(metres) > 1:   # a first bar that is shorter than the next is a pickup
        begin, metre = list(metres.items())[1]
        if abs(bar_beats(told['metre']) - begin) < 0.01 and begin < bar_beats(metre):
            told.update(metre=metre, pickup=begin)
    return told


def write_midi(notes, path, tempo=120.0, name='', sharps=None, minor=False, metre=None, pickup=0.0):
    """Write notes (N, 3), times in beats, as a MIDI file of type 0.

    tempo: quarter notes a minute; name: the track's; sharps, minor: its key signature; metre: such as '6/8', the first
    full bar beginning at the beat `pickup`; what comes before is a short bar, so that editors draw the bars right.
    The file appears whole or not at all. Raises UserError if it cannot be written.
    """
    # three bytes: no slower than 3.6 beats a minute
    micros = min(max(round(6e7 / tempo), 1), 0xFFFFFF)
    signs = [mido.MetaMessage('track_name', name=printable(name)), mido.MetaMessage('set_tempo', tempo=micros)]
    if sharps is not None:
        signs.append(mido.MetaMessage('key_signature', key=key_name(sharps, minor)))
    bars = {0: metre} if metre else {}
    # the short bar before the first full one, if a number of 64ths can tell its length
    length = Fraction(pickup or 0) / 4
    if metre and length > 0 and 64 % length.denominator == 0:
        unit = max(4, length.denominator)
        bars = {0: f'{int(length * unit)}/{unit}', round(pickup * TICKS): metre}
    for tick, text in bars.items():
        count, unit = map(int, text.split('/'))
        signs.append(mido.MetaMessage('time_signature', numerator=count, denominator=unit, time=tick))
    releases = []
    strikes = []
    for key, onset, end in one_per_key(as_notes(notes)):
        note = int(key) + LOWEST
        tick = round(onset * TICKS)
        release = max(round(end * TICKS), tick + 1)
        strikes.append(mido.Message('note_on', note=note, velocity=80, time=tick))
        releases.append(mido.Message('note_on', note=note, velocity=0, time=release))
    # each message is a track of its own, whose time counts from the start; at one time releases come before strikes
    track = mido.merge_tracks([message] for message in signs + releases + strikes)
    buffer = io.BytesIO()
    file = mido.MidiFile(type=0, ticks_per_beat=TICKS, charset='utf-8', tracks=[track])
    file.save(file=buffer)
    write_whole(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# ABC in

# A tune is read in three steps. `Page.spell` turns the written music into events, with every pitch and length worked
# out (what the order on the page decides); `arrange` puts the events into the order of playing; `play` counts time.
# An event is a Sound, a Bar, a list (the MIDI notes of a chord symbol), or one of the words DC, DS, segno, fine.

# what a hostile file can cost has bounds
MAX_BOOK = 64 << 20     # bytes in a file
MAX_TUNE = 40_000       # characters in a tune, and events in its playing

SIGN = r'(?:\^\^?|__?|=)'
LENGTH = r'(?:[1-9]\d{0,2})?/{0,4}(?:[1-9]\d{0,2})?'
NOTE = re.compile(rf"({SIGN}?)([A-Ga-g])([,']*)({LENGTH})(-?)")
DECORATION = r'![^!\s|"\[\]][^!\n|"\[\]]*! | \+[^+\s|]+\+'
WORDS = re.compile(rf'"[^"]*" | {DECORATION}', re.VERBOSE)
# One group for each kind of token; no two of them can share long stretches of text, so matching stays linear.
TOKEN = re.compile(rf"""
    (?P<field>   \[[A-Za-z]:[^\]\[\n]*\] )
  | (?P<text>    "[^"]*" | {DECORATION} | S )
  | (?P<bar_line> (?: \[?\| | : ) (?: [\s\\]* (?: \[?\| | : ) | \] )* (?: [\s\\]* \[?[1-9](?:[,-][1-9])* )?
                | \[[1-9](?:[,-][1-9])* )
  | (?P<tuplet>  \([1-9](?::\d?){{0,2}} )
  | (?P<broken>  (?:>{{1,3}}|<{{1,3}})(?![<>]) )
  | (?P<tie>     - )
  | (?P<sound>   (?: \[(?P<chord>[^\]\[\n]*)\] | (?P<note>{SIGN}?[A-Ga-g][,']*) | [zxZX] ) (?P<length>{LENGTH}) )
  | (?:          \{{[^{{}}]*\}} | y[\d/]* | [\s`'\\$(),.~\#*;?@%!+H-WYh-w] )
  | (?P<unknown> . )""", re.VERBOSE)
SCALE = 'C D EF G A B'  # a letter stands at its semitones above C
ALTER = {'^': 1, '^^': 2, '=': 0, '_': -1, '__': -2, '#': 1, 'b': -1, '': 0}
# how many sharps a mode has more than the major key on the same note
MODES = dict(maj=0, ion=0, lyd=1, mix=-1, dor=-2, min=-3, aeo=-3, m=-3, phr=-4, loc=-5)
# What may stand behind the root of a chord symbol, and the notes above the root; EXTRAS, sevenths and the like, are
# left out
EXTRAS = r'(?:[Mm]aj|M|add|[\d#b+/-])*'
TRIADS = {
    r'\d*sus4?': (0, 5, 7),
    r'\d*sus2': (0, 2, 7),
    r'/?d|/?dim\d*|o7?|m7b5': (0, 3, 6),
    r'(?:aug|\+)7?|7?(?:\+|#5)': (0, 4, 8),
    rf'(?:min|mi|m|-){EXTRAS}': (0, 3, 7),
    EXTRAS: (0, 4, 7)}
MARK = re.compile(r'(?i)(?P<DC>d\. ?c\b|da ?capo)|(?P<DS>d\. ?s\b|dal ?segno)|(?P<fine>\bfine\b)|(?P<segno>^S$|segno)')
# what else musicians put for the signs of plain ABC
PLAIN = str.maketrans('♯♭°øØ“”’\t', '#booo""\' ')


@dataclass
class Sound:
    """Notes that begin together; those that are tied go on in the next sound."""
    notes: dict   # as written, without its sign -> MIDI note; empty: a rest
    beats: Fraction
    tied: set   # those that are tied, as written


class Bar(NamedTuple):
    """A bar line."""
    ends: int   # how often a repeat goes back from here
    starts: bool   # does a repeat start here?
    double: bool
    turns: list   # an ending begins: it is played on these turns of the repeat


def decoded(data):
    """The text of a file: UTF-16 if it says so, else UTF-8 if it can be, else Latin-1; lines end in a newline."""
    encoding = 'utf-16' if data.startswith((b'\xff\xfe', b'\xfe\xff')) else 'utf-8-sig'
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode('latin-1')
    return re.sub(r'\r\n?', '\n', text)


def read_abc(file, name=None, skipped=None):
    """Read the tunes of an ABC file (a path, bytes or a binary file) into a list of Songs.

    Repeats, endings, parts (P:AABB), D.C., D.S. and fine are played out. Chord symbols are close triads below the
    melody, each held to the next one. Grace notes, ornaments and all that is only drawn are passed over. A tune that
    uses something else (voices, microtones) is skipped: a sentence for each goes to the list `skipped` if it is
    given, else one about them to stderr. Raises UserError if the file cannot be read or has no tune at all.
    Source: the ABC music standard 2.1 (December 2011).
    """
    data, name = open_music(file, name, 'an ABC file', MAX_BOOK)
    opening, *tunes = re.split(r'(?m)^(?=X:)', decoded(data))
    if not tunes:
        raise UserError(f'{name} has no tune in it (in ABC a tune starts with a line X:): give an ABC file')
    defaults = dict(re.findall(r'(?m)^([MLQ]):(.*)', opening.split('\n\n')[0]))
    songs = []
    faults = []
    for tune in tunes:
        title = re.search(r'(?m)^T:[ \t]*(\S.*)', tune) or re.match(r'(.*)', tune)
        title = title[1].strip()[:80]
        try:
            songs.append(read_tune(title, tune, defaults))
        except UserError as e:
            faults.append(f'{name}: skipped the tune "{title}": {e}')
    if skipped is not None:
        skipped += faults
    elif faults:
        print(printable(f'{faults[0]} ({len(faults):,} of {len(tunes):,} tunes were skipped)'), file=sys.stderr)
    return songs


def read_tune(title, tune, defaults):
    """The text of one tune to a Song; defaults are the fields, letter -> value, at the head of the book."""
    tune = re.split(r'\n[ \t]*\n', tune)[0]   # an empty line ends a tune; what follows is free text
    if len(tune) > MAX_TUNE:
        raise UserError(f'it has more than {MAX_TUNE:,} characters')
    tune = re.sub(r'(?ms)^%%begin(\w+).*?(?:^%%end\1|\Z)', '%', tune)   # blocks of text
    tune = re.sub(r'(?m)^%.*\n|(?<!\\)%.*', '', tune)   # comments and %%directives
    tune = re.sub(r'[^ -~\n]', '', tune.translate(PLAIN))
    parts = re.split(r'(?m)^K:(.*)', tune, maxsplit=1)
    head, key, body = (parts + ['', ''])[:3]
    fields = defaults | dict(re.findall(r'(?m)^([A-Za-z]):(.*)', head)) | {'K': key}
    fields = {letter: value.strip() for letter, value in fields.items()}
    page = Page()
    for letter, value in fields.items():
        page.take(letter, value)
    short = page.bar and page.bar < Fraction(3, 4)
    page.unit = page.unit or Fraction(1, 16 if short else 8)
    # field lines in the body become inline fields, or nothing where they make no sound; a line "A:|" is music
    body = re.sub(r'(?m)^([A-Za-z+]):(?![|:])(.*)\n?',
                  lambda m: f'[{m[1]}:{m[2].strip()}]\n' * (m[1] in 'KLMPQV'), body)
    if len(set(re.findall(r'\[V:\s*([^\]\s]*)', body))) > 1:
        raise UserError('it has several voices')
    # what the header says, before the music changes it
    told = dict(sharps=page.key[1], minor=page.key[2])
    bar = page.bar
    fields |= dict(M=page.metre, L=str(page.unit))
    rows, length, first_bar = play(spell_parts(page, fields.get('P', ''), body))
    if not any(LOWEST <= row[0] < LOWEST + KEYS for row in rows):
        raise UserError('it has no notes')
    if bar and fields['M']:
        told |= dict(metre=fields['M'], pickup=first_bar if first_bar < 4 * bar else 0.0)
    # Q: 1/4=120, 3/8=92.5, or 120 notes of the unit length; without "Allegro"
    tempo = re.sub(r'"[^"]*"?\s*', '', page.tempo)
    m = re.search(r'(?:([1-9]\d?/[1-9]\d?)\s*=|=|^)\s*(\d{1,4}(?:\.\d{1,4})?)(?![\d.]*\s*[/=])', tempo)
    if m and float(m[2]) > 0:
        beats = 4 * Fraction(m[1] or fields['L'])
        told['tempo'] = float(m[2]) * float(beats)
    told['silence'] = length - max(row[2] for row in rows)
    lines = [f'{letter}:{fields[letter]}' for letter in 'MLPVK' if letter == 'K' or fields.get(letter)]
    text = '\n'.join(lines + [re.sub(r'\[Q:[^\]\n]*\]', '', body)])
    text = re.sub(r' *\n\s*', '\n', re.sub(' +', ' ', text.strip()))
    return song_from_rows(title, rows, text=text + '\n', **told)


def spell_parts(page, order, body):
    """Music to events; its parts, each begun by a field P:, in an order such as AABB, if there is one."""
    first, *parts = re.split(r'\[P:([^\]\n]*)\]', body)
    labels = parts[::2]
    if not set(order) & set(labels):
        return page.spell(body)
    order = re.sub(r'[\s.]', '', order)
    order = re.sub(r'([A-Z])([1-9])', lambda m: m[1] * int(m[2]), order)
    if not re.fullmatch('[A-Z]+', order):
        raise UserError(f'cannot follow the order of parts P:{order[:40]}')
    events = page.spell(first)
    spelt = {}
    for label, music in zip(labels, parts[1::2]):
        spelt[label] = page.spell(music)
    for label in order[:100]:
        events += [Bar(0, True, True, []), *spelt.get(label, [])]
    return events


def read_key(value):
    """The text of a K: field to (letter -> semitones up, sharps or None, minor); None if it only names a clef."""
    if re.match(r'(?:[a-z]{2,}=|treble|bass|alto|tenor|perc|soprano|mezzo|baritone|[+-]8)', value):
        return None
    value = re.sub(r'[a-z]{2,}=\S*', '', value)
    value = re.sub('^H[Pp]', 'D', value)   # Highland pipes play F# and C#
    modes = r'(?i:maj|ion|min|aeo|mix|dor|phr|lyd|loc|exp)|m(?![a-z])|'
    m = re.match(rf'none|$|([A-Ga-g])([#b]?)\s*({modes})', value)
    if not m:
        raise UserError(f'cannot read K:{value[:40]}')
    mode = (m[3] or 'maj').lower()
    count = None
    if m[1] and mode != 'exp':
        count = sharps(m[1].upper() + m[2]) + MODES[mode]
    signs = {letter: ((count or 0) + 6 - i) // 7 for i, letter in enumerate(FIFTHS)}
    for sign, letter in re.findall(rf'({SIGN})([A-Ga-g])', value[m.end():]):
        signs[letter.upper()] = ALTER[sign]
    return signs, count, MODES.get(mode) == -3


def read_triad(text):
    """A chord symbol to a close triad of MIDI notes, its root in C3..B3; [] for N.C., None if it is no chord."""
    text = re.sub(r'\([^()]*\)', '', text).strip()
    if re.fullmatch(r'(?i)\^?n\.? ?c\.?', text):
        return []
    m = re.fullmatch(r'([A-G])([#b]?)(.*?)\s*(/[\^_=]?[A-Ga-g][#b^_=+-]?)?', text)
    for quality, intervals in TRIADS.items() if m else ():
        if re.fullmatch(quality, m[3]):
            root = 48 + (SCALE.index(m[1]) + ALTER[m[2]]) % 12
            return [root + i for i in intervals]
    return None


@functools.lru_cache(1000)
def read_length(text, unit):
    """The length behind a note (3, 3/2, / for 1/2, // for 1/4), in units, to beats."""
    above, below = re.fullmatch(r'(\d*)/*(\d*)', text).groups()
    return 4 * unit * Fraction(int(above or 1), int(below or 2 ** text.count('/')))


@dataclass
class Page:
    """What the page says at the point to which we have read, and the events so far; a method for each kind of token."""
    key: tuple = ({}, None, False)   # letter -> semitones up; sharps of the signature or None; is it minor?
    unit: Fraction | None = None   # L: in whole notes
    bar: Fraction | None = Fraction(1)   # M: in whole notes
    metre: str = ''   # M: as text
    tempo: str = ''   # Q: as text
    shift: int = 0   # semitones by which a clef moves the notes
    events: list = field(default_factory=list)
    last: Sound = field(default_factory=lambda: Sound({}, Fraction(0), set()))   # the latest one
    altered: dict = field(default_factory=dict)   # letter -> semitones, by the accidentals of this bar
    factors: list = field(default_factory=list)   # of the lengths of the next sounds, by tuplets and broken rhythm

    def spell(self, music):
        """Music to events in the order in which they are written."""
        self.events = []
        for m in TOKEN.finditer(music):
            if m.lastgroup:   # else it does not sound
                getattr(self, m.lastgroup)(m)
        return self.events

    def take(self, letter, value):
        """Take note of a field; those that are not here do not sound."""
        if letter == 'M':
            m = re.match(r'(\d\d?)\s*/\s*(1|2|4|8|16|32|64)(?!\d)', {'C': '4/4', 'C|': '2/2'}.get(value, value))
            self.bar = Fraction(int(m[1]), int(m[2])) if m else None
            self.metre = f'{m[1]}/{m[2]}' if m else 'none'
        elif letter == 'L':
            m = re.match(r'1\s*/\s*([1-9]\d{0,2})|1', value)
            if not m:
                raise UserError(f'cannot read L:{value[:40]}')
            self.unit = Fraction(1, int(m[1] or 1))
        elif letter in 'KV':
            m = re.search(r'([+-])8', value)   # treble-8 and the like
            self.shift = int(m[1] + '12') if m else self.shift
            if letter == 'K':
                self.key = read_key(value) or self.key
        elif letter == 'Q':
            self.tempo = self.tempo or value

    def field(self, m):
        self.take(m[0][1], m[0][3:-1].strip())

    def text(self, m):
        """A chord symbol, or a jump, or words and decorations, which do not sound."""
        triad = read_triad(m[0][1:-1])
        mark = MARK.search(m[0])
        if triad is not None:
            self.events.append(triad)
        elif mark:
            self.events.append(mark.lastgroup)

    def bar_line(self, m):
        """Bar lines side by side are one, |] and :| on the next line end a repeat; with the number of an ending."""
        self.altered = {}
        colons = re.findall(r'(?<![|:])(:+)[|\]]', m[0])
        ends = max(map(len, colons), default=int(m[0].startswith('::')))
        double = bool(re.search(r'\|[|\]]|\[\|', m[0]))
        turns = []
        for turn, last in re.findall(r'(\d)(?:-(\d))?', m[0]):
            turns += range(int(turn), int(last or turn) + 1)
        self.events.append(Bar(ends, m[0].endswith(':'), double, turns))

    def tuplet(self, m):
        """(p:q:r puts p notes into the time of q, for the next r sounds."""
        numbers = (m[0][1:] + '::').split(':')
        p, q, r = (int(number or 0) for number in numbers[:3])
        in_threes = p in (2, 4, 8) or p in (5, 7, 9) and self.metre in ('6/8', '9/8', '12/8')
        q = q or (3 if in_threes else 2)
        self.factors = [Fraction(q, p)] * (r or p)

    def broken(self, m):
        """A>B is A3/2 B/2, A>>B is A7/4 B/4."""
        less = Fraction(1, 2 ** len(m[0]))
        first = 2 - less if m[0][0] == '>' else less
        self.last.beats *= first
        factor = self.factors.pop(0) if self.factors else 1
        self.factors.insert(0, (2 - first) * factor)

    def tie(self, m):
        self.last.tied = set(self.last.notes)

    def sound(self, m):
        """A note, a chord or a rest."""
        text = m[0]
        length = read_length(m['length'], self.unit)
        if self.factors:
            length *= self.factors.pop(0)
        chord = WORDS.sub('', m['chord'] or '')
        written = NOTE.findall(chord or m['note'] or '')
        if text[0] == '[':
            if not written or re.search(r'[\^_=\d/|:&]', NOTE.sub('', chord)):
                raise UserError(f'cannot read {text[:40]}')
            length *= read_length(written[0][3], Fraction(1, 4))   # a chord lasts as long as its first note
        elif text[0] in 'ZX':   # rests of whole bars
            length *= (self.bar or 1) / self.unit
        before = self.last
        self.last = Sound({}, length, set())
        self.events.append(self.last)
        for sign, letter, octave, _, tie in written:
            place = letter + octave
            letter = letter.upper()
            if sign:   # lasts to the bar line, in every octave: the standard's default
                self.altered[letter] = ALTER[sign]
            semitones = self.altered.get(letter, self.key[0].get(letter, 0))
            octaves = place[0].islower() + octave.count("'") - octave.count(',')
            note = 60 + 12 * octaves + SCALE.index(letter) + semitones + self.shift
            if not sign and place in before.tied:   # a tie carries the alteration over the bar line
                note = before.notes[place]
            if place in self.last.notes:   # [c^c]: a letter may come twice
                place += sign
            self.last.notes[place] = note
            if tie:
                self.last.tied.add(place)

    def unknown(self, m):
        raise UserError(f'cannot read {m[0][:40]}')


def arrange(events):
    """Events in the order of playing. The last D.C. goes back to the start, a D.S. to the segno, at the end of its bar;
    from there on to the fine, or to where it was, there are no repeats."""
    jump = max((i for i, event in enumerate(events) if event in ('DC', 'DS')), default=None)
    if jump is None:
        return unfold(events)
    ends = [i + 1 for i, event in enumerate(events) if isinstance(event, Bar)]
    ends.append(len(events))
    stop = min(end for end in ends if end > jump)
    played = events[:stop]
    start = played.index('segno') if events[jump] == 'DS' and 'segno' in played else 0
    fine = played.index('fine', start) if 'fine' in played[start:] else jump
    stop = min(end for end in ends if end > fine)
    return unfold(played) + unfold(events[start:stop], once=True)


def unfold(events, once=False):
    """Events with their repeats played out; once: only the last turn of each.

    A repeat goes back to the latest |: or, if it has none, to the latest double bar, end of a repeat, or start of the
    tune; on each turn the endings of other turns are left out."""
    end = Bar(0, True, False, [])
    played = []
    common = []   # what is played on every turn
    endings = []   # (turns, events)
    last_turn = 1
    opened = False   # did it begin with |: ?
    for event in [*events, end]:
        (endings[-1][1] if endings else common).append(event)
        if not isinstance(event, Bar):
            continue
        last_turn = max(last_turn, event.ends + 1, *event.turns)
        if event.turns:
            endings.append((event.turns, []))
        # a double bar ends what no |: began, or the last ending
        elif event.ends or event.starts or event.double and not (opened and len(endings) < 2):
            if len(played) + last_turn * len(common + endings) > MAX_TUNE:
                raise UserError(f'its repeats make more than {MAX_TUNE:,} notes')
            for turn in range(last_turn if once else 1, last_turn + 1):
                played += common
                for turns, music in endings:
                    played += music * (turn in turns)
            common = []
            endings = []
            last_turn = 1
            opened = event.starts
    return [event for event in played if event is not end]


def play(events):
    """Events to (rows [MIDI note, onset, end], length, the first bar line) in beats."""
    rows = []
    symbols = []
    now = Fraction(0)
    first_bar = 0.0
    held = {}   # MIDI note -> its row, where it is tied
    for event in arrange(events):
        if isinstance(event, Sound):
            begin = float(now)
            now += event.beats
            sounding = {}
            for note in set(event.notes.values()):
                row = held.get(note)
                if row is None:
                    row = [note, begin, 0]
                    rows.append(row)
                row[2] = float(now)
                sounding[note] = row
            tied = [event.notes[place] for place in event.tied]
            held = {note: sounding[note] for note in tied}
        elif isinstance(event, list):
            symbols.append((float(now), event))
        elif isinstance(event, Bar):
            first_bar = first_bar or float(now)
    symbols.append((float(now), []))
    melody = as_notes(rows)
    # each chord lasts to the next one, below the notes that sound meanwhile
    for (onset, triad), (end, _) in itertools.pairwise(symbols):
        sounding = (melody[:, 1] < end) & (melody[:, 2] > onset)
        lowest = melody[sounding, 0].min(initial=128)
        for _ in triad:   # while it reaches the melody, its top note moves down an octave
            if triad[-1] >= lowest:
                triad = [triad[-1] - 12, *triad[:-1]]
        rows += [[note, onset, end] for note in triad if end > onset]
    return rows, float(now), first_bar


# ---------------------------------------------------------------------------------------------------------------------
# ABC out

BEAT = 24               # ticks in a beat: a multiple of 3 is a 32nd note, a multiple of 4 belongs to a triplet
# plain and dotted notes, in eighths, the unit of what we write
SINGLE = (16, 12, 8, 6, 4, 3, 2, 1.5, 1, 0.75, 0.5, 0.25)
# semitones of the notes above the root -> what stands behind the root's name
QUALITIES = {
    (0, 4): '',
    (0, 3): 'm',
    (0, 4, 7): '',
    (0, 3, 7): 'm',
    (0, 3, 6): 'dim',
    (0, 4, 8): 'aug',
    (0, 5, 7): 'sus4',
    (0, 4, 7, 10): '7',
    (0, 3, 7, 10): 'm7',
    (0, 4, 7, 11): 'maj7',
    (0, 5, 7, 10): '7sus4',
    (0, 3, 6, 9): 'dim7',
    (0, 3, 6, 10): 'm7b5'}


class Tick(NamedTuple):
    """A note in ticks; key is a MIDI number."""
    onset: int
    key: int
    end: int


class Chord(NamedTuple):
    """What becomes a chord symbol, in ticks."""
    onset: int
    end: int
    root: int       # 0..11
    quality: str    # one of QUALITIES


def write_abc(notes, name='', tempo=120.0, sharps=None, minor=False, metre=None, pickup=None):
    """Notes (N, 3), times in beats, to (a tune in ABC, how many notes were left out).

    Key (sharps, minor), metre ('6/8') and pickup (the beat where the first full bar begins) are guessed where they are
    None. Chords below the melody become chord symbols, each held to the next one, or to "^N.C." where they pause for a
    beat or more. A low bass that has a rhythm of its own below such chords is left out. All else is written as it
    sounds, on a grid of 32nd notes and triplets.
    Source: the ABC music standard 2.1 (December 2011).
    """
    notes = one_per_key(as_notes(notes))
    if sharps is None:
        sharps, minor = estimate_key(notes)
    sharps = written(sharps)
    metre, bar, pickup = fit_bars(notes, metre, pickup)
    title = unicodedata.normalize('NFKD', name).encode('ascii', 'ignore').decode()
    title = re.sub(r'[^ -~]|%', ' ', title).strip() or 'Untitled'
    # tick 0 is the bar line before the first note, or at it
    first = round(-pickup % bar * BEAT)
    melody, chords, left_out = find_chords(snap(notes, first))
    # a beam reaches over a dotted quarter, a quarter in 3/4, else two quarters
    beam = 36 if metre.endswith('/8') else BEAT if metre.startswith('3') else 2 * BEAT
    music = write_music(melody, chords, first, round(bar * BEAT), beam, Staff(sharps, minor))
    head = f'X:1\nT:{title}\nM:{metre}\nL:1/8\nQ:1/4={tempo:.6g}\nK:{key_name(sharps, minor)}'
    return f'{head}\n{music}\n', left_out


def tune_text(song):
    """The ABC text of a Song as a model reads it, fields M, L and K, and the music; and how many notes it lacks."""
    if song.text:
        return song.text, 0
    text, left_out = write_abc(song.notes, '', song.tempo, song.sharps, song.minor, song.metre, song.pickup)
    return re.sub(r'(?m)^[XTQ]:.*\n', '', text), left_out


def fit_bars(notes, metre, pickup):
    """(metre as text, beats a bar, pickup), guessed where they are not known."""
    bar = bar_beats(metre) if metre else None
    if bar is None or pickup is None:
        bar, begins = estimate_metre(notes, bar)
        pickup = begins if pickup is None else pickup
    return metre or metre_text(notes, bar, pickup), bar, pickup


def snap(notes, first):
    """Notes as Ticks, later by `first` ticks, on 32nd notes, or on triplets in beats that these fit better."""
    times = notes[:, 1:] * BEAT + first
    beats = (times // BEAT).astype(int)
    straight = 3 * np.rint(times / 3)
    thirds = 4 * np.rint(times / 4)
    gain = np.abs(times - straight) - np.abs(times - thirds)
    fits = np.bincount(beats.ravel(), gain.ravel()) > 0.5
    ticks = np.where(fits[beats], thirds, straight)
    ticks[:, 1] = np.maximum(ticks[:, 1], ticks[:, 0] + 3)
    snapped = one_per_key(np.column_stack((notes[:, 0] + LOWEST, ticks)))
    return [Tick(int(onset), int(key), int(end)) for key, onset, end in snapped]


def find_chords(ticks):
    """Ticks to (melody, Chords, how many notes are left out).

    A chord: notes struck together that have a name, within an octave, the lowest below the G above middle C. Left out
    is the bass of a tune with chords: what lies below their octave and under another note."""
    melody = []
    bass = []
    chords = []
    until = 0   # when the melody so far falls silent
    groups = [list(group) for _, group in itertools.groupby(ticks, lambda note: note.onset)]
    for group, following in zip(groups, groups[1:] + groups[-1:]):
        onset = group[0].onset
        top = group[-1]
        # it is the melody's, unless another melody note sounds, or it goes on for a beat below the next note
        goes_on = top.end - following[0].onset >= BEAT and top.key < following[-1].key
        if until > onset or goes_on:
            top = None
        # without it, if it can be spared
        root, quality, members = name_chord(group[:-1] if top and len(group) > 3 else group)
        if members:
            end = max(note.end for note in members)
            chords.append(Chord(onset, end, root, quality))
            # the top note of a chord without melody above it is both, if it lasts less long than the others
            if members[-1] is top and top.end < members[0].end:
                members = members[:-1]
        for note in group:
            if note in members:
                continue
            if note.key < 48 and note is not top:
                bass.append(note)
            else:
                melody.append(note)
                until = max(until, note.end)
    if not chords:
        return melody + bass, [], 0
    return melody, chords, len(bass)


def name_chord(group):
    """(root 0..11, quality, members) of the chord among the lowest notes of a group; no members: there is none."""
    low = [note for note in group if note.key - group[0].key < 12 and group[0].key < 67]
    for size in (4, 3, 2):
        choices = itertools.combinations(low, size)
        # those that last longest first: notes of the melody among them are shorter
        for members in sorted(choices, key=lambda notes: -sum(note.end for note in notes)):
            # two notes are a chord if they go on below a melody that doubles one of them
            doubled = any((group[-1].key - note.key) % 12 == 0 for note in members)
            goes_on = members[0].end == members[1].end > group[-1].end
            if size == 2 and not (doubled and goes_on):
                continue
            for root in members:
                steps = sorted((note.key - root.key) % 12 for note in members)
                quality = QUALITIES.get(tuple(steps))
                if quality is not None:
                    return root.key % 12, quality, members
    return 0, '', ()


def write_music(melody, chords, first, bar, beam, staff):
    """Lines of music from tick `first` on, four bars each, cut wherever a note begins or ends, at chord symbols, bar
    lines and around triplets; notes of a beam stand together."""
    end = max([first + BEAT // 2] + [sound.end for sound in melody + chords])
    if 0 < end % bar < BEAT:   # the last bar has at least a beat
        end += BEAT - end % bar
    symbols = {}
    following = [chord.onset for chord in chords[1:]] + [end]
    for chord, after in zip(chords, following):
        symbols[chord.onset] = f'"{staff.root(chord.root)}{chord.quality}"'
        if after - chord.end >= BEAT:
            symbols[chord.end] = '"^N.C."'
    starting = collections.defaultdict(list)
    for note in melody:
        starting[note.onset].append(note)
    releases = [note.end for note in melody]
    cuts = {first, end, *symbols, *starting, *releases, *range(bar, end, bar)}
    for beat in {cut // BEAT for cut in cuts if cut % 3}:
        cuts |= {max(first, beat * BEAT), (beat + 1) * BEAT}
    slices = []
    for onset, end in itertools.pairwise(sorted(cuts)):
        in_triplet = onset % 3 > 0 or end % 3 > 0
        slices.append((onset, end, in_triplet))
    # beat -> how many slices its triplet has
    sizes = collections.Counter(onset // BEAT for onset, _, in_triplet in slices if in_triplet)
    bars = []
    sounding = []
    for onset, end, in_triplet in slices:
        if not bars or onset % bar == 0:
            bars.append('')
            staff.signs = {}
        elif onset % bar % beam == 0:
            bars[-1] += ' '
        if in_triplet and onset // BEAT in sizes:
            bars[-1] += f'(3:2:{sizes.pop(onset // BEAT)}'.replace('(3:2:3', '(3')
        sounding = [note for note in sounding if note.end > onset] + starting[onset]
        bars[-1] += symbols.get(onset, '') + write_slice(sorted(sounding), onset, end, in_triplet, staff)
    count = 4 + (first % bar > 0)   # a pickup stands on the line of the first four bars
    lines = ['|'.join(bars[:count])]
    for begin in range(count, len(bars), 4):
        lines.append('|'.join(bars[begin:begin + 4]))
    return '|\n'.join(lines) + '|]'


def write_slice(notes, onset, end, in_triplet, staff):
    """What sounds from onset to end: one note or chord, or several tied ones if no single note is so long."""
    pieces = []
    left = Fraction(end - onset, 8 if in_triplet else 12)   # in eighths; three of a triplet take the time of two
    while left:
        length = left if in_triplet else Fraction(next(single for single in SINGLE if single <= left))
        left -= length
        text = re.sub(r'^1\b', '', str(length)).replace('/2', '/')
        names = []
        for note in notes:
            tie = '-' * (left > 0 or note.end > end)
            names.append(staff.note(note.key) + text + tie)
        piece = ''.join(names) or 'z' + text
        pieces.append(f'[{piece}]' if len(names) > 1 else piece)
    return ' '.join(pieces)


@dataclass
class Staff:
    """How notes are spelt in a key, and the accidentals of the bar so far."""
    sharps: int
    minor: bool
    signs: dict = field(default_factory=dict)

    def spell(self, key):
        """(letter, semitones up, octave, 0 from middle C) of a MIDI note. The twelve notes reach from three fifths
        below the tonic of the major key to eight above, in minor a fifth further."""
        flattest = self.sharps - 3 + self.minor
        fifth = flattest + (7 * key - flattest) % 12
        semitones, letter = divmod(fifth + 1, 7)
        return FIFTHS[letter], semitones, (key - semitones) // 12 - 5

    def root(self, pitch_class):
        """The name of a chord's root; a double sharp is no name."""
        letter, semitones, _ = self.spell(pitch_class)
        if abs(semitones) > 1:
            letter, semitones, _ = Staff(0, False).spell(pitch_class)
        return letter + '#' * semitones + 'b' * -semitones

    def note(self, key):
        """A note with the accidental it needs, whether one holds in its own octave only, as some say, or in all."""
        letter, semitones, octave = self.spell(key)
        signature = (self.sharps + 6 - FIFTHS.index(letter)) // 7
        in_all = self.signs.get(letter, signature)
        in_its_own = self.signs.get((letter, octave), signature)
        self.signs |= {letter: semitones, (letter, octave): semitones}
        sign = ''
        if not in_all == in_its_own == semitones:
            sign = '^' * semitones + '_' * -semitones or '='
        if octave < 1:
            return sign + letter + ',' * -octave
        return sign + letter.lower() + "'" * (octave - 1)
