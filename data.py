"""Music in and out: MIDI files and ABC tunes to notes, notes to frames, frames to batches, and back to MIDI.

A *note* is a row (key, onset, end): key 0..87 counts from A0, times are in beats, that is quarter notes.
A *frame* says what each of the 88 keys does in one step of the beat (`steps_per_beat` to a beat). Its V units:
    0..87     onset plane: the key is struck in this step
    88..175   sustain plane: the key was struck before and is still held
    176       the boundary, alone in its frame: here one song ends and the next one starts
With onsets=False there is one plane, on wherever a key sounds, and the boundary is unit 88.
"""
import contextlib, functools, hashlib, io, json, multiprocessing, os, re, signal, sys, threading, urllib.request
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import mido
import numpy as np
import torch

LOWEST, KEYS = 21, 88  # the piano: A0 is MIDI note 21, C8 is 108
MAX_FRAMES = 100_000  # longest song we accept: 3.5 hours at 4 steps a beat and 120 beats a minute
# What a hostile file can cost is bounded by its size (measured at these: 1.1 s, 70 MB). Music stays far below: a
# piano sonata has 0.1 MB of MIDI, a long tune 3,000 characters of ABC
MAX_MIDI, MAX_FILE = 1 << 19, 4 << 20  # bytes in a MIDI file, in any other music file
MAX_TUNE, MAX_TURNS = 20_000, 9  # characters in an ABC tune, and events in its playing; how often a part is played
MAX_ARCHIVE = 1 << 30  # bytes of music in one zip, unpacked
SPLITS = ('train', 'valid', 'test')


class UserError(ValueError):
    """Something the user can mend: one sentence that names the file or option, and the mend."""

    def __init__(self, sentence):
        super().__init__(_printable(sentence))


def _printable(text):
    """Names and titles come from files: what would move the cursor, or not encode, must not reach the terminal."""
    return ''.join(c if c.isprintable() else '?' for c in text)


def _warn(sentences, most):
    for sentence in sentences[:most] + [f'skipped: {len(sentences) - most:,} more'] * (len(sentences) > most):
        print(_printable(sentence), file=sys.stderr)


class Song(NamedTuple):
    name: str
    notes: np.ndarray  # (N, 3) rows (key 0..87, onset, end), times in beats, sorted by (onset, key)
    tempo: float = 120.0  # beats a minute, for playback
    sharps: int | None = None  # key signature: sharps, or minus the flats; None where the file has none
    dropped: int = 0  # notes outside A0..C8, left out


def _song(name, rows, tempo, sharps):
    """A Song from rows (MIDI note, onset, end) in any order."""
    notes = np.array(rows, dtype=np.float64).reshape(-1, 3) - [LOWEST, 0, 0]
    on_piano = (notes[:, 0] >= 0) & (notes[:, 0] < KEYS)
    return Song(name, _one_per_key(notes[on_piano]), tempo, sharps, int((~on_piano).sum()))


def _one_per_key(notes):
    """A piano has one of each key: a key struck again ends its note; struck twice at once it sounds once."""
    notes = notes[np.lexsort((-notes[:, 2], notes[:, 1], notes[:, 0]))]  # by key, onset, longest first
    again = (notes[1:, :2] == notes[:-1, :2]).all(1)
    notes = notes[np.concatenate([[True], ~again])[:len(notes)]]
    cut = np.flatnonzero(notes[1:, 0] == notes[:-1, 0])
    notes[cut, 2] = np.minimum(notes[cut, 2], notes[cut + 1, 1])
    return notes[np.lexsort((notes[:, 0], notes[:, 1]))]


def _read_bytes(file, name, kind, limit=MAX_FILE):
    """Bytes and name of a file given by its path or open."""
    is_open = hasattr(file, 'read')
    try:
        with contextlib.nullcontext(file) if is_open else open(file, 'rb') as f:
            data = f.read(limit + 1)
    except OSError as e:
        raise UserError(f'cannot read {file} ({e.strerror}): give the path of {kind}') from None
    name = name or (kind if is_open else Path(file).name)
    if len(data) > limit:
        raise UserError(f'{name} is larger than {limit >> 10} KB, more than music needs: cut it, or leave it out')
    return data, name


# --------------------------------------------------------------------------------------------------------- MIDI

def read_midi(path, name=None):
    """Read a MIDI file of type 0 or 1 (a path, or a binary file object) into a Song.

    Notes come from every track and channel but percussion (channel 10). Raises UserError if it cannot be read.
    Source: Standard MIDI Files 1.0 (RP-001); mido does the parsing.
    """
    data, name = _read_bytes(path, name, 'a MIDI file', MAX_MIDI)
    try:
        # mido puts a delta time of any length into one integer, in quadratic time; a legal one has 4 bytes
        if re.search(rb'[\x80-\xff]{1024}', data):
            raise ValueError('endless delta time')
        midi = mido.MidiFile(file=io.BytesIO(data))
        if midi.type in (0, 1) and midi.ticks_per_beat > 0:
            return _song_from_tracks(name, midi.tracks, midi.ticks_per_beat)
    except Exception as e:  # on bad bytes mido raises OSError, EOFError, IndexError, KeySignatureError, ...
        what = str(e) or type(e).__name__
        raise UserError(f'{name} is not a whole MIDI file ({what}): replace it or leave it out') from None
    what = f'type {midi.type}' if midi.ticks_per_beat > 0 else 'SMPTE time'
    raise UserError(f'{name} is a MIDI file of {what}: save it as type 0 or 1 with time in beats')


def _song_from_tracks(name, tracks, ticks_per_beat):
    rows, held, last = [], [], 0  # rows of (MIDI note, tick, end tick)
    tempos, keys = [], []  # (tick, value)
    for track in tracks:
        tick, down = 0, {}  # down: (channel, note) -> (tick of the strike, did it cut the same note?)
        for m in track:
            tick += m.time
            if m.type in ('note_on', 'note_off') and m.channel != 9:
                at = m.channel, m.note
                if m.type == 'note_on' and m.velocity > 0:
                    if at in down:
                        rows.append((m.note, down[at][0], tick))
                    down[at] = tick, at in down
                elif at in down and down[at] != (tick, True):  # else the late release of the note just cut
                    rows.append((m.note, down.pop(at)[0], tick))
            elif m.type == 'set_tempo' and m.tempo > 0:
                tempos.append((tick, m.tempo))
            elif m.type == 'key_signature':
                keys.append((tick, sharps(m.key)))
        held += [(note, struck) for (_, note), (struck, _) in down.items()]
        last = max(last, tick)
    rows += [(note, struck, last) for note, struck in held]  # never released: they end with the file
    first = [min(events, key=lambda event: event[0])[1] if events else None for events in (tempos, keys)]
    beats = np.array(rows, dtype=np.float64).reshape(-1, 3) / [1, ticks_per_beat, ticks_per_beat]
    return _song(name, beats, 6e7 / (first[0] or 500_000), first[1])


def sharps(key):
    """Sharps of a key written as letter, # or b, and m for minor: C 0, G 1, F#m 3, Bb -2."""
    return 'FCGDAEB'.index(key[0]) - 1 + 7 * (key.count('#') - key.count('b')) - 3 * key.endswith('m')


def write_midi(notes, path, tempo=120.0):
    """Write notes (N, 3), times in beats, as a MIDI file of type 0; tempo in beats a minute.

    The file appears whole or not at all. Raises UserError if it cannot be written."""
    events = []  # (tick, is it a strike?, MIDI note); sorted, a release precedes a strike in the same tick
    for key, onset, end in _one_per_key(np.asarray(notes, dtype=np.float64).reshape(-1, 3)):
        note, tick = int(key) + LOWEST, round(onset * 480)
        events += [(tick, True, note), (max(round(end * 480), tick + 1), False, note)]
    micros = min(max(round(6e7 / tempo), 1), 0xFFFFFF)  # three bytes: no slower than 3.6 beats a minute
    track, now = mido.MidiTrack([mido.MetaMessage('set_tempo', tempo=micros)]), 0
    for tick, strike, note in sorted(events):
        track.append(mido.Message('note_on', note=note, velocity=80 if strike else 0, time=tick - now))
        now = tick
    buffer = io.BytesIO()
    mido.MidiFile(type=0, ticks_per_beat=480, tracks=[track]).save(file=buffer)
    write_whole(path, buffer.getvalue())


def write_whole(path, content):
    """Write bytes to a file that is there whole or not at all, even if the machine stops: to a temporary file, then
    flush, fsync, rename. Raises UserError if that fails; the file keeps what it had."""
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


# ---------------------------------------------------------------------------------------------------------- ABC
# A tune is read in three steps: `_spell` turns the page into events (pitches, lengths, bar lines: all that the
# written order decides), `_unfold` puts them into the order of playing, `_perform` counts time and adds chords.

SIGN, LENGTH = r'(?:\^\^?|__?|=)', r'(?:[1-9]\d{0,2})?/{0,4}(?:[1-9]\d{0,2})?'
NOTE = re.compile(rf"({SIGN}?)([A-Ga-g])([,']*)({LENGTH})(-?)")
TOKEN = re.compile(rf"""
    (?P<jump>   [!+](?:D\.|da|fine)[^!+\n]*[!+] | "[^"\w]*(?i:d\.\s?[cs]\.|da\s?capo|dal\s?segno|fine)[^"]*" )
  | (?P<field>  \[[A-Za-z]:[^\]\n]*\] )
  | (?P<symbol> "[^"]*" )
  | (?P<bar>    :*\[?\|[\]|]*:* | ::+ )
  | (?P<ending> (?:\[|(?<=[|\]:]))\d[\d,-]* )
  | (?P<tuplet> \([2-9](?::\d?){{0,2}} )
  | (?P<broken> >{{1,3}} | <{{1,3}} )
  | (?P<tie>    - )
  | (?P<sound>  (?: \[(?P<chord>[^\]\n]*)\] | (?P<note>{SIGN}?[A-Ga-g][,']*) | [zxZX] ) (?P<length>{LENGTH}) )
  | (?P<skip>   [\s`\\$().~HLMOPSTuv] | \{{[^}}]*\}} | ![^!\s][^!\n]*! | \+[^+\s]+\+ | y[\d/]* )
  | (?P<unknown>.)""", re.VERBOSE)
SCALE = dict(C=0, D=2, E=4, F=5, G=7, A=9, B=11)
ALTER = {'^': 1, '^^': 2, '=': 0, '_': -1, '__': -2, '#': 1, 'b': -1, '': 0}
MODES = dict(maj=0, ion=0, lyd=1, mix=-1, dor=-2, min=-3, aeo=-3, m=-3, phr=-4, loc=-5, exp=0)  # sharps
EXTRAS = r'(?:maj|M|add|[\d#b/+-])*'  # sevenths and the like, which a triad leaves out
TRIADS = {r'\d*sus4?': (0, 5, 7), r'\d*sus2': (0, 2, 7), r'(?:dim|o|°|ø)7?|m7b5': (0, 3, 6),
          r'(?:aug|\+)7?|7?(?:\+|#5)': (0, 4, 8), rf'(?:min|mi|m|-){EXTRAS}': (0, 3, 7), EXTRAS: (0, 4, 7)}


def read_abc(path, name=None):
    """Read the tunes of an ABC file (a path, or a binary file object) into a list of Songs.

    Repeats are played out, grace notes and ornaments left out; chord symbols are close triads below the melody,
    each held to the next one. A tune that uses something else (voices, parts, overlays, jumps) is skipped, and one
    line on stderr names the tune and the thing. Raises UserError if there is no tune at all.
    Source: the ABC music standard 2.1 (December 2011).
    """
    data, name = _read_bytes(path, name, 'an ABC file')
    try:
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError:
        text = data.decode('latin-1')
    text = re.sub(r'(?m)^%.*\n|(?<!\\)%.*', '', re.sub(r'\r\n?', '\n', text))  # comments and %%directives
    opening, *tunes = re.split(r'(?m)^(?=X:)', text)
    if not tunes:
        raise UserError(f'{name} has no tune in it (in ABC a tune starts with a line X:): give an ABC file')
    defaults = list(dict(re.findall(r'(?m)^([MLQ]):(.*)', opening.split('\n\n')[0])).items())
    songs, skipped = [], []
    for tune in tunes:
        tune = re.split(r'\n[ \t]*\n', tune)[0]  # an empty line ends a tune; what follows is free text
        title = (re.search(r'(?m)^T:[ \t]*(\S.*)', tune) or re.match(r'(.*)', tune))[1].strip()[:80]
        try:
            songs.append(_song_from_abc(title, tune, defaults))
        except UserError as e:
            skipped.append(f'{name}: skipped the tune "{title}": {e}')
    _warn(skipped, 20)
    return songs


def _song_from_abc(title, tune, defaults):
    if len(tune) > MAX_TUNE:
        raise UserError(f'it has more than {MAX_TUNE:,} characters')
    head, key, body = (*re.split(r'(?m)^(K:.*)', tune, maxsplit=1), '', '')[:3]
    page = dict(K={}, L=None, M=Fraction(1), Q='', compound=False, sharps=None)
    for letter, value in defaults + re.findall(r'(?m)^([A-Za-z]):(.*)', head + key):
        if letter == 'P':
            raise UserError(f'cannot follow the order of parts P:{value.strip()[:40]}')
        _read_field(page, letter, value)
    page['L'] = page['L'] or Fraction(1, 16 if page['M'] and page['M'] < Fraction(3, 4) else 8)
    tempo, sharps = _tempo(page['Q'], page['L']), page['sharps']
    # field lines in the body become inline fields, or nothing where they make no sound; a line "A:|" is music
    body = re.sub(r'(?m)^([A-Za-z+]):(?![|:])(.*)', lambda m: f'[{m[0]}]' if m[1] in 'KLMUVm' else '', body)
    song = _song(title, _perform(_unfold(_spell(body, page))), tempo, sharps)
    if not len(song.notes):
        raise UserError('it has no notes')
    return song


def _read_field(page, letter, value):
    """Take note of a field. V m U (voices, macros, redefined symbols) are beyond us, the rest do not sound."""
    value = value.strip()
    meter = re.fullmatch(r'\(?(\d\d?(?:\+\d\d?)*)\)?/([1-9]\d?)', {'C': '4/4', 'C|': '2/2'}.get(value, value))
    if letter == 'M' and (meter or value in ('none', '')):
        page['M'] = Fraction(sum(map(int, meter[1].split('+'))), int(meter[2])) if meter else None
        page['compound'] = bool(meter) and meter[1] in ('6', '9', '12')
    elif letter == 'L' and re.fullmatch(r'[1-9]\d?(/[1-9]\d{0,2})?', value):
        page['L'] = Fraction(value)
    elif letter == 'K':
        page['K'], page['sharps'] = _key(value)
    elif letter == 'Q':
        page['Q'] = value
    elif letter in 'LMUVm':
        raise UserError(f'cannot read {letter}:{value[:40]}')


def _key(value):
    """The text of a K: field to ({'F': 1, ...}, number of sharps or None)."""
    modes = '(?i:maj|ion|min|aeo|mix|dor|phr|lyd|loc|exp)|m(?![a-z])|'
    m = re.match(rf'HP|Hp|none|$|([A-G])([#b]?)\s*({modes})', value)
    if not m or re.search('transpose|octave|shift', value):
        raise UserError(f'cannot read K:{value[:40]}')
    mode, count = (m[3] or 'maj').lower(), 2 if m[0] in ('HP', 'Hp') else None  # Highland pipes play F# and C#
    if m[1] and mode != 'exp':
        count = sharps(m[1] + m[2]) + MODES[mode]
    key = {letter: ((count or 0) + 6 - i) // 7 for i, letter in enumerate('FCGDAEB')}
    key |= {letter.upper(): ALTER[sign] for sign, letter in re.findall(rf'({SIGN})([A-Ga-g])', value[m.end():])}
    return key, count


def _tempo(text, unit):
    """The text of a Q: field to quarter notes a minute: 1/4=120, 3/8=100, or 120 notes of the unit length."""
    text = re.sub(r'"[^"]*"', '', text).strip()  # "Allegro"
    beat = r'[1-9]\d?/[1-9]\d?'
    m = re.fullmatch(rf'((?:{beat}\s+)*{beat}\s*=)?\s*([1-9]\d{{0,3}})', text)
    if not m:
        return 120.0
    return float(4 * int(m[2]) * (sum(map(Fraction, m[1][:-1].split())) if m[1] else unit))


def _triad(text):
    """A chord symbol to a close triad of MIDI notes, its root in C3..B3; () for N.C., None for no symbol."""
    text = re.sub(r'\([^()]*\)', '', text).replace('♯', '#').replace('♭', 'b').strip()
    if not text or re.fullmatch(r'(?i)n\.?c\.?', text):
        return () if text else None
    m = re.fullmatch(r'([A-G])([#b]?)(.*?)(/[A-G][#b]?)?', text)
    for quality, intervals in TRIADS.items() if m else ():
        if re.fullmatch(quality, m[3]):
            root = 48 + (SCALE[m[1]] + ALTER[m[2]]) % 12
            return [root + i for i in intervals]
    raise UserError(f'cannot read the chord symbol "{text[:40]}"')


def _length(text):
    num, den = re.fullmatch(r'(\d*)/*(\d*)', text).groups()
    return Fraction(int(num or 1), int(den or 2 ** text.count('/')))  # A/ is A/2, A// is A/4


def _spell(music, page):
    """ABC music to a list of events
        ['sound', MIDI notes (none: a rest), beats, those notes that are tied to the next sound]
        ['bar', how often a repeat goes back from here, does one start?, is the bar double?]
        ['ending', for which turns], ['symbol', triad]
    """
    events, last = [], ['sound', [], 0, []]  # last: the latest sound
    altered, spelt, tied = {}, {}, {}  # letter -> alteration in this bar; (letter, height) -> alteration
    share, ratio, left = 1, 1, 0  # broken rhythm: what the next sound gets; tuplet: factor, sounds to come
    for m in TOKEN.finditer(music):
        kind, text = m.lastgroup, m[0]
        if kind == 'sound':
            length = _length(m['length']) * 4 * page['L'] * share * (ratio if left > 0 else 1)
            share, left = 1, left - 1
            notes = NOTE.findall(m['chord'] or m['note'] or '')
            if text[0] == '[':  # a chord lasts as long as its first note
                if not notes or re.search(r'[^\s().~HLMOPSTuv]', NOTE.sub('', m['chord'])):
                    raise UserError(f'cannot read {text[:40]}')
                length *= _length(notes[0][3])
            elif text[0] in 'ZX':  # rests of whole bars
                if not page['M']:
                    raise UserError(f'cannot play {text} without a metre')
                length *= page['M'] / page['L']
            last = ['sound', [], length, []]
            events.append(last)
            before, spelt, tied = tied, {}, {}
            for sign, letter, octave, _, tie in notes:
                octaves = letter.islower() + octave.count("'") - octave.count(',')
                place = letter, height = letter.upper(), 60 + 12 * octaves
                if sign:  # lasts to the bar line, in every octave: the standard's default
                    altered[letter] = ALTER[sign]
                spelt[place] = altered.get(letter, page['K'].get(letter, 0))
                if not sign and place in before:  # a tie carries the alteration over the bar line
                    spelt[place] = before[place]
                last[1].append(height + SCALE[letter] + spelt[place])
                if tie:
                    tied[place] = spelt[place]
                    last[3].append(last[1][-1])
        elif kind == 'tie':
            last[3], tied = last[1], spelt
        elif kind == 'broken':
            if share != 1:  # a second one without a sound between: in exact fractions, a long row would take for ever
                raise UserError(f'cannot read {text} here')
            more = 2 - Fraction(1, 2 ** len(text))  # A>B is A3/2 B/2, A>>B is A7/4 B/4
            last[2] *= more if text[0] == '>' else 2 - more
            share = 2 - more if text[0] == '>' else more
        elif kind == 'tuplet':  # (p:q:r puts p notes into the time of q, for the next r sounds
            p, q, r = (int(n or 0) for n in (text[1:] + '::').split(':')[:3])
            ratio = Fraction(q or {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}.get(p, 3 if page['compound'] else 2), p)
            left = r or p
        elif kind == 'bar':
            altered = {}
            ends, starts = len(text) - len(text.lstrip(':')), text.endswith(':')
            events.append(['bar', ends if '|' in text else 1, starts, bool(re.search(r'\|[|\]]|\[\|', text))])
        elif kind == 'ending':  # [1 or [1,3 or [1-3
            spans = [re.findall(r'\d\d?', span) for span in text.split(',')]
            turns = [n for span in spans if span for n in range(int(span[0]), int(span[-1]) + 1)]
            events.append(['ending', turns or [0]])
        elif kind == 'symbol' and text[1] not in '^_<>@"':  # those are words to read, not to play
            triad = _triad(text[1:-1])
            if triad is not None:
                events.append(['symbol', triad])
        elif kind == 'field':
            _read_field(page, text[1], text[3:-1])
        elif kind not in ('skip', 'symbol'):
            raise UserError(f'cannot read {text[:40]}')
    return events


def _unfold(events):
    """Events in the order of playing. A repeat goes back to the latest |: or, if it has none, to the latest
    double bar, end of a repeat, or start of the tune; on each turn the endings of other turns are skipped."""
    def ending_after(i):  # for which turns is the ending that follows immediately?
        while i < len(events) and events[i][0] == 'bar' and not events[i][1]:
            i += 1
        return events[i][1] if i < len(events) and events[i][0] == 'ending' else ()

    played, notes, i = [], 0, 0
    start, opened, turn, turns, final = 0, False, 1, 1, False  # opened: by |: ; final: we are in a last ending
    while i < len(events):
        event, i = events[i], i + 1
        if event[0] == 'ending':
            turns, final = max(turns, *event[1]), turn > 1
            if turn not in event[1]:
                while i < len(events) and (events[i][0] in ('sound', 'symbol') or events[i][:2] == ['bar', 0]):
                    i += 1
                if i == len(events) or events[i][0] == 'ending':
                    continue
                event, i = ['bar', 0, events[i][2], not ending_after(i + 1)], i + 1  # has been repeated before
        if event[0] == 'bar':
            _, ends, starts, double = event
            turns = max(turns, ends + 1, *ending_after(i)) if ends else turns
            if turns > MAX_TURNS:
                raise UserError(f'a part of it is played more than {MAX_TURNS} times')
            if ends and turn < turns:
                turn, i, final = turn + 1, start, False
            elif ends or starts or double and (final or not opened):
                start, opened, turn, turns, final = i, starts, 1, 1, False
        played.append(event)
        notes += len(event[1]) if event[0] == 'sound' else 0
        if len(played) + notes > MAX_TUNE:
            raise UserError(f'its repeats make more than {MAX_TUNE:,} notes')
    return played


def _perform(events):
    """Events in the order of playing to rows (N, 3) of (MIDI note, onset, end) in beats."""
    now, rows, tied, symbols = Fraction(0), [], {}, []
    for kind, value, *more in events:
        if kind == 'sound':
            sounding = {note: tied.get(note) or [note, now, now] for note in value}
            now += more[0]
            for note, row in sounding.items():
                row[2] = now
                if note not in tied:
                    rows.append(row)
            tied = {note: sounding[note] for note in more[1]}
        elif kind == 'symbol':
            symbols.append((float(now), value))
    rows = np.array(rows, dtype=np.float64).reshape(-1, 3)
    chords = []
    for (onset, triad), (end, _) in zip(symbols, symbols[1:] + [(float(now), ())]):
        melody = rows[(rows[:, 1] < end) & (rows[:, 2] > onset), 0]
        for _ in triad:  # while it reaches the melody, its top note moves down an octave
            if triad[-1] >= melody.min(initial=128):
                triad = [triad[-1] - 12, *triad[:-1]]
        chords += [(note, onset, end) for note in triad if end > onset]
    return [*rows, *chords]


# --------------------------------------------------------------------------------------------------------- keys

# How well each pitch class fits a major and a minor key on C (Krumhansl and Kessler 1982)
PROFILES = np.array([[6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88],
                     [6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17]])


def estimate_sharps(notes):
    """Key signature (-5..6 sharps) of the major or minor key whose Krumhansl-Kessler profile correlates best
    with the time that notes (N, 3) spend on each pitch class."""
    notes = np.asarray(notes, dtype=np.float64).reshape(-1, 3)
    time = np.bincount((notes[:, 0].astype(int) + LOWEST) % 12, np.maximum(notes[:, 2] - notes[:, 1], 1e-3), 12)
    z = (PROFILES - PROFILES.mean(1, keepdims=True)) / PROFILES.std(1, keepdims=True)
    fit = [z @ np.roll(time, -tonic) for tonic in range(12)]  # correlation, but for a factor all keys share
    tonic, minor = divmod(int(np.argmax(fit)), 2)
    return (7 * (tonic + 3 * minor) + 5) % 12 - 5


def common_key_shift(song):
    """Semitones that move a Song to C major or A minor by its key signature (estimated where it has none):
    -6..5 (G 5, D -2, A 3), the convention of the published Nottingham rolls; an octave off that where a note
    would leave the keyboard, 0 where nothing fits."""
    sharps = estimate_sharps(song.notes) if song.sharps is None else song.sharps
    shift, keys = (-7 * sharps + 6) % 12 - 6, song.notes[:, 0]
    low, high = -keys.min(initial=KEYS), KEYS - 1 - keys.max(initial=0)
    return next((s for s in (shift, shift + 12, shift - 12) if low <= s <= high), 0)


# ------------------------------------------------------------------------------------------------------- frames

def units(onsets=True):
    """V, the number of units in a frame; the boundary is the last one."""
    return (1 + onsets) * KEYS + 1


def _quantise(notes, steps_per_beat):
    """Notes (N, 3) in beats to (N, 3) int64 in steps: rounded half up, one step long at least."""
    notes = np.asarray(notes, dtype=np.float64).reshape(-1, 3)
    steps = np.floor(notes * [1, steps_per_beat, steps_per_beat] + 0.5)
    if not steps[:, 1:].max(initial=0) < MAX_FRAMES:
        raise UserError(f'a song is longer than {MAX_FRAMES:,} steps: cut it, or use fewer --steps_per_beat')
    steps = steps.astype(np.int64)
    steps[:, 2] = np.maximum(steps[:, 2], steps[:, 1] + 1)
    return _one_per_key(steps)


def _ranges(start, count):
    """arange(start[i], start[i] + count[i]) for every i, joined."""
    return np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())


def _draw(B, T, row, key, on, end, onsets):
    """Draw notes, in steps, into empty frames (B, T, V) uint8, each into one of the B rows; what lies outside
    0..T-1 is cut off."""
    frames = np.zeros((B, T, units(onsets)), dtype=np.uint8)
    if onsets:
        struck = (on >= 0) & (on < T)
        frames[row[struck], on[struck], key[struck]] = 1
    first = np.clip(on + onsets, 0, T)
    count = np.maximum(np.clip(end, 0, T) - first, 0)
    frames[np.repeat(row, count), _ranges(first, count), np.repeat(key + onsets * KEYS, count)] = 1
    return frames


def to_frames(notes, steps_per_beat=4, onsets=True):
    """Notes (N, 3) in beats to frames (T, V) uint8; frame 0 is beat 0, T is where the last note ends, and the
    boundary unit stays 0. Raises UserError above MAX_FRAMES."""
    key, on, end = _quantise(notes, steps_per_beat).T
    return _draw(1, end.max(initial=0), np.zeros_like(key), key, on, end, onsets)[0]


def to_notes(frames, steps_per_beat=4, onsets=True):
    """Frames (T, V) to notes (N, 3) float64 in beats, sorted by (onset, key): the inverse of to_frames.
    A key held without having been struck, which a sampled frame can contain, counts as struck."""
    f = np.asarray(frames).astype(bool).T  # (V, T)
    silence = np.zeros((KEYS, 1), dtype=bool)
    struck = np.hstack([f[:KEYS] & onsets, silence])  # (KEYS, T + 1)
    sounds = np.hstack([f[onsets * KEYS:][:KEYS], silence]) | struck
    before = np.hstack([silence, sounds[:, :-1]])
    struck |= sounds & ~before
    key, on = np.nonzero(struck)
    _, end = np.nonzero(before & (struck | ~sounds))  # an end for each strike, in the same order
    return np.stack([key, on / steps_per_beat, end / steps_per_beat], 1)[np.lexsort((key, on))]


# ------------------------------------------------------------------------------------------------------ dataset

class Tape(NamedTuple):
    """A split's songs end to end, in steps: boundary, song, boundary, song, ..., boundary. 13 bytes a note."""
    key: np.ndarray  # (N,) uint8
    on: np.ndarray  # (N,) int32, rising
    end: np.ndarray  # (N,) int32
    reach: np.ndarray  # (N,) int32 latest end so far; it rises, so a search finds the first note that sounds
    bounds: np.ndarray  # (songs + 1,) int64 where the boundaries are


def _tape(songs, steps_per_beat):
    N, bounds = sum(len(song.notes) for song in songs), [0]
    key, on, end = np.empty(N, np.uint8), np.empty(N, np.int32), np.empty(N, np.int32)
    N = 0
    for song in songs:
        notes = _quantise(song.notes, steps_per_beat) + [0, bounds[-1] + 1, bounds[-1] + 1]
        here, N = slice(N, N + len(notes)), N + len(notes)
        key[here], on[here], end[here] = notes.T
        bounds.append(notes[:, 2].max())
    return Tape(key[:N], on[:N], end[:N], np.maximum.accumulate(end[:N]), np.array(bounds))


class Dataset:
    """Songs in three splits, kept as notes; frames are drawn when they are asked for.

    source: one line, what music this is; songs: {'train' | 'valid' | 'test': [Song]}; V: units in a frame.
    """

    def __init__(self, songs, source, steps_per_beat=4, onsets=True, common_key=False):
        self.songs, self.source, self.V = songs, source, units(onsets)
        self.steps_per_beat, self.onsets, self.common_key = steps_per_beat, onsets, common_key
        self.tapes = {split: _tape(songs[split], steps_per_beat) for split in SPLITS}

    def frames(self, split):
        """Frames of all songs of a split, boundaries not counted."""
        return int((np.diff(self.tapes[split].bounds) - 1).sum())

    def beats(self, split):
        return self.frames(split) / self.steps_per_beat

    def batch(self, split, batch_size, block_size, transpose, rng, history=0):
        """Windows cut at random places of a split's tape, with the `history` frames before each window (empty ones
        before the tape begins): (B, history + block_size + 1, V) torch.uint8; and (B,) torch.int64, the place in its tune
        of the last frame of the history, with 0 for the boundary that the tune begins with.

        Each window is moved up or down by a random interval of at most `transpose` semitones that keeps its
        notes on the keyboard. rng: np.random.Generator. Raises UserError if the split is too short for one."""
        tape, B, T = self.tapes[split], batch_size, block_size + 1
        length = int(tape.bounds[-1]) + 1
        if length < T:
            raise UserError(f'the {split} songs have {length} frames, too few for --block_size={block_size}: '
                            f'use --block_size={length - 1} or less, or more music')
        first = rng.integers(0, length - T + 1, B)
        place = first - 1 - tape.bounds[np.searchsorted(tape.bounds[1:], first - 1, 'right')]
        start, T = first - history, T + history
        lo, hi = np.searchsorted(tape.reach, start, 'right'), np.searchsorted(tape.on, start + T)
        note, row = _ranges(lo, hi - lo), np.repeat(np.arange(B), hi - lo)
        key = tape.key[note].astype(np.int64)
        lowest, highest = np.full(B, KEYS - 1), np.zeros(B, dtype=np.int64)
        np.minimum.at(lowest, row, key)
        np.maximum.at(highest, row, key)
        key += rng.integers(np.maximum(-transpose, -lowest), np.minimum(transpose, KEYS - 1 - highest) + 1)[row]
        frames = _draw(B, T, row, key, tape.on[note] - start[row], tape.end[note] - start[row], self.onsets)
        lo, hi = np.searchsorted(tape.bounds, start), np.searchsorted(tape.bounds, start + T)
        row = np.repeat(np.arange(B), hi - lo)
        frames[row, tape.bounds[_ranges(lo, hi - lo)] - start[row], -1] = 1
        return torch.from_numpy(frames), torch.from_numpy(place)

    def whole_songs(self, split, batch_size):
        """Every song of a split once, songs of like length together: yields (frames, lengths).

        frames (B, T + 1, V) torch.uint8: a boundary, the song, and zeros up to the longest of the B songs;
        lengths (B,) torch.int64: frames of each song without its boundary, so row i holds 1 + lengths[i]."""
        tape = self.tapes[split]
        lengths = np.diff(tape.bounds) - 1
        first = np.searchsorted(tape.on, tape.bounds)  # the first note of each song
        order = np.argsort(lengths, kind='stable')
        for songs in np.split(order, range(batch_size, len(order), batch_size)):
            count = first[songs + 1] - first[songs]
            note, row = _ranges(first[songs], count), np.repeat(np.arange(len(songs)), count)
            on, end = tape.on[note] - tape.bounds[songs][row], tape.end[note] - tape.bounds[songs][row]
            key = tape.key[note].astype(np.int64)
            frames = _draw(len(songs), lengths[songs[-1]] + 1, row, key, on, end, self.onsets)
            frames[:, 0, -1] = 1
            yield torch.from_numpy(frames), torch.from_numpy(lengths[songs])


# --------------------------------------------------------------------------------------------------------- load

HERE = Path(__file__).resolve().parent
NOTTINGHAM, TUNES = HERE / 'nottingham.zip', HERE / 'tunes.abc'
NOTTINGHAM_URLS = (
    'https://codeload.github.com/SudharshanShanmugasundaram/Music-Generation/zip/'
    '17c438d6ba921a8848cf29ded6fd24399981bda1',
    'https://web.archive.org/web/20190502175445id_/http://www-etud.iro.umontreal.ca/~boulanni/Nottingham.zip')
NOTTINGHAM_DIGEST = 'a107e20c1b880d97cb1d7c324cb185400313e6f3ffbf20e4b5d56bd3e604ea7e'
TIMEOUT = 10  # seconds for one download
MUSIC = ('.mid', '.midi', '.abc')
CACHE, MANY = HERE / 'cache', 2000  # from so many files on, all cores read, and what they read is kept in CACHE
FOLDERS = dict(train='train', valid='valid', validation='valid', test='test')


def load(data='nottingham', steps_per_beat=4, onsets=True, common_key=False, log=print):
    """Read music into a Dataset.

    data: 'nottingham' (1,037 folk tunes, split as in Boulanger-Lewandowski et al. 2012; nottingham.zip beside
        this file, or a download, or tunes.abc instead), or the path of a folder, .zip, .mid, .midi or .abc.
    Folders named train, valid and test are the splits; without them a hash of the name splits songs 8:1:1.
    common_key: move every song to C major or A minor. log gets one line for each notice.
    What cannot be read is skipped and named on stderr. Raises UserError if no song is left.
    """
    source, files = _nottingham(log) if str(data) == 'nottingham' else (data, _music_in(data))
    table, notes = _read(data, files, log)
    songs, skipped, end = [], table['skipped'], 0
    for file, count, name, *rest in table['songs']:
        song, end = Song(name, notes[end:end + count], *rest), end + count
        if song.notes[:, 1:].max() * steps_per_beat < MAX_FRAMES - 1:
            shift = common_key_shift(song) if common_key else 0
            songs.append((file, song._replace(notes=song.notes + np.float32([shift, 0, 0])) if shift else song))
        else:
            skipped.append(f'{name} has more than {MAX_FRAMES:,} steps: cut it or lower --steps_per_beat')
    if not songs:
        raise UserError(f'no song in {data} can be used: {skipped[0]}')
    _warn([f'skipped: {sentence}' for sentence in skipped], 5)
    if dropped := sum(song.dropped for _, song in songs):
        log(f'{dropped:,} notes that a piano does not have are left out')
    return Dataset(_split(songs, log), f'{source} ({len(songs):,} songs)', steps_per_beat, onsets, common_key)


def _read(data, files, log):
    """What is in the files, as (table, notes): table['songs'] has a row (file name, number of notes, name, tempo,
    sharps, dropped) for each song, table['skipped'] a sentence for each file that cannot be read, and notes
    (N, 3) float32 are those of all songs. Of many files it is kept in CACHE, and valid while they are unchanged."""
    if len(files) < MANY:
        return _pack(files, map(_read_file, files))
    root, stamp = Path(data).resolve(), hashlib.sha256(Path(__file__).read_bytes())  # a changed reader reads anew
    for name in [name for name, _ in files] if root.is_dir() else ['']:
        with contextlib.suppress(OSError):
            stat = os.stat(root / name)
            stamp.update(os.fsencode(f'{name}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_mode}\n'))
    stamp, cache = stamp.hexdigest(), CACHE / f'{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.npz'
    try:
        with np.load(cache, allow_pickle=False) as kept:
            table = json.loads(kept['table'].tobytes())
            if table['stamp'] == stamp:
                return table, kept['notes']
    except Exception:  # there is none yet, or it is damaged
        pass
    table, notes = _pack(files, _tell(_read_on_all_cores(files, log), len(files), log))
    buffer, text = io.BytesIO(), json.dumps(dict(table, stamp=stamp)).encode()
    np.savez_compressed(buffer, table=np.frombuffer(text, np.uint8), notes=notes)
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        write_whole(cache, buffer.getvalue())
        log(f'kept in {cache}, which the next run reads instead while {data} is unchanged')
    except (OSError, UserError) as e:
        log(f'the next run has to read the files again: {e}')
    return table, notes


def _pack(files, results):
    songs, skipped, notes = [], [], [np.empty((0, 3), np.float32)]
    for found, (file, _) in zip(results, files):  # in this order, results runs to its end
        if isinstance(found, str):
            skipped.append(found)
        else:
            notes += [song.notes for song in found]
            songs += [(file, len(song.notes), song.name, song.tempo, song.sharps, song.dropped) for song in found]
    return dict(songs=songs, skipped=skipped), np.concatenate(notes)


def _read_file(file):
    """The Songs in a (name, function that opens it), notes in float32; or a sentence if there are none."""
    name, opener = file
    try:
        with opener() as f:
            f = io.BytesIO(f.read(MAX_FILE + 1))
    except Exception as e:  # from a disk OSError; from a bad zip whatever zipfile and its decompressors come upon
        return f'{name} cannot be read, replace it or leave it out: {e}'
    try:
        found = read_abc(f, name) if name.lower().endswith('.abc') else [read_midi(f, name)]
    except UserError as e:
        return str(e)
    if not any(len(song.notes) for song in found):
        return f'{name} has nothing in it that a piano can play: replace it or leave it out'
    return [song._replace(notes=np.float32(song.notes)) for song in found]


def _read_on_all_cores(files, log):
    """Yields _read_file of each file. The processes start anew (spawn): a fork would inherit torch's threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    done = 0
    try:
        workers = max(1, min(cores, 60, len(files) // 500))  # a worker takes seconds to start, as long as 500 files
        with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), _start_worker) as pool:
            for result in pool.map(_read_file, files, chunksize=64):
                yield result
                done += 1
    except (BrokenProcessPool, OSError, ImportError) as e:  # no room for them, or no script they could start from
        log(f'reading on one core ({e})')
        yield from map(_read_file, files[done:])


def _tell(results, total, log):
    """Passes results on and tells how many there were: in a line that moves on a terminal, in ten lines in a log."""
    for n, result in enumerate(results, 1):
        yield result
        line = f'read {n:,} of {total:,} files'
        if sys.stderr.isatty():
            if n % 100 == 0 or n == total:
                print(f'\r{line}', end='\n' if n == total else '', file=sys.stderr, flush=True)
        elif 10 * n // total > 10 * (n - 1) // total:
            log(line)


def _start_worker():
    """Leave Ctrl-C to the parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _music_in(data):
    """The music files of a path, as a list of (name, function that opens it)."""
    path = Path(data)
    if not str(data) or not path.exists():
        raise UserError(f'there is no {data or "path"}: give --data a folder, a .zip, .mid or .abc')
    if path.is_dir():
        found = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        if not found:
            raise UserError(f'the folder {data} is empty: put MIDI files into it')
        found = [p for p in found if p.is_file()]  # and no pipe, which would make us wait
        files = [(p.relative_to(path).as_posix(), functools.partial(open, p, 'rb')) for p in found]
    elif path.suffix.lower() == '.zip':
        time = path.stat().st_mtime_ns
        files = [(m.filename, functools.partial(_open_member, path, time, m)) for m in _zip_members(path, path)[1]]
    else:
        files = [(path.name, functools.partial(open, path, 'rb'))]
    files = [(name, opener) for name, opener in files
             if name.lower().endswith(MUSIC) and not re.search(r'(^|/)(\.[^/]|__MACOSX/)', name)]
    if not files:
        raise UserError(f'there is no music in {data}: give --data MIDI files (.mid, .midi) or ABC (.abc)')
    return files


def _zip_members(file, path):
    """A zip and the music in it, as (ZipFile, [ZipInfo]). Nothing is ever unpacked to the disk."""
    try:
        archive = zipfile.ZipFile(file)
    except Exception as e:  # BadZipFile, struct.error, OverflowError, ...
        raise UserError(f'{path} is not a whole zip ({e}): get it again') from None
    for name in archive.namelist():
        if re.match(r'[\\/]|[A-Za-z]:[\\/]', name) or '..' in re.split(r'[\\/]', name):
            raise UserError(f'{path} holds a path that climbs out of it ({name}): do not trust it')
    members = [m for m in archive.infolist() if m.filename.lower().endswith(MUSIC)]
    members.sort(key=lambda m: m.filename)
    if sum(m.file_size for m in members) > MAX_ARCHIVE:  # zipfile reads no more of a member than it declares
        raise UserError(f'{path} unpacks to more than {MAX_ARCHIVE >> 30} GB of music: use a smaller one')
    return archive, members


@functools.lru_cache(1)
def _archive(path, time):
    return zipfile.ZipFile(path)


def _open_member(path, time, member):
    """A file in a zip. Every process opens the zip for itself, and again only after it has changed."""
    return _archive(path, time).open(member)


def _split(songs, log):
    """[(file name, Song)] to {'train' | 'valid' | 'test': [Song]}, by folder if any is so named, or by hash."""
    def rank(song):
        return int(hashlib.sha256(song.name.rsplit('/', 1)[-1].encode(errors='surrogateescape')).hexdigest(), 16)

    if len(songs) < 3:
        log('fewer than 3 songs: train, valid and test are the same, and the figures say nothing of new music')
        return {split: [song for _, song in songs] for split in SPLITS}
    splits = {split: [] for split in SPLITS}
    folders = [[FOLDERS[part] for part in name.lower().split('/')[:-1] if part in FOLDERS] for name, _ in songs]
    for (_, song), folder in zip(songs, folders):
        by_hash = {0: 'valid', 1: 'test'}.get(rank(song) % 10, 'train')
        splits[(folder or ['train'])[0] if any(folders) else by_hash].append(song)
    for split in SPLITS:
        if not splits[split]:  # few songs, or folders for two of the three: take a tenth of the largest
            largest = max(splits.values(), key=len)
            largest.sort(key=rank)
            tenth = max(len(largest) // 10, 1)
            splits[split], largest[:tenth] = largest[:tenth], []
    return splits


def _nottingham(log):
    """What is used for Nottingham, and its files: the local archive, or a download, or the bundled tunes."""
    trouble = []
    for origin in (NOTTINGHAM, *NOTTINGHAM_URLS):
        local = origin == NOTTINGHAM
        if local and not NOTTINGHAM.exists():
            continue
        host = str(NOTTINGHAM) if local else origin.split('/')[2]
        try:
            if not local:
                log(f'downloading Nottingham from {host}')
            files = _nottingham_files(NOTTINGHAM.read_bytes() if local else _download(origin))
        except Exception as e:  # no network, no such archive, or a bad one: try the next
            trouble.append(f'{host}: {e}')
            continue
        if not local:
            _keep(files, log)
        if trouble:
            log(f'could not use {"; ".join(trouble)}')
        return f'Nottingham, {NOTTINGHAM}', [(name, functools.partial(io.BytesIO, files[name])) for name in files]
    trouble = '; '.join(trouble)
    if not TUNES.exists():
        raise UserError(f'there is neither Nottingham ({trouble}) nor {TUNES}: give --data your own music')
    log(f'no Nottingham ({trouble}), so this is the bundled {TUNES.name}; put nottingham.zip beside it to change that')
    return f'{TUNES.name}, for want of Nottingham', [(TUNES.name, functools.partial(open, TUNES, 'rb'))]


def _download(url):
    """The bytes at a URL, or OSError, within TIMEOUT seconds."""
    answer = [OSError(f'no answer in {TIMEOUT} s')]

    def fetch():
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                answer.append(response.read(MAX_ARCHIVE))
        except Exception as e:  # HTTPException, ValueError, ...: whatever it is, this copy is no use
            answer.append(OSError(str(e) or type(e).__name__))

    # a socket's timeout starts anew with every byte; a thread can be left behind, whatever it is waiting for
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if isinstance(answer[-1], OSError):
        raise answer[-1]
    return answer[-1]


def _nottingham_files(blob):
    """{'train/x.mid': bytes} from whatever archive they are in. Raises UserError if they are not those files."""
    files = {}
    archive, members = _zip_members(io.BytesIO(blob), 'the archive')
    for member in members:
        m = re.search(r'(?:^|/)Nottingham/((?:train|valid|test)/[^/]+\.mid)$', member.filename)
        if m:
            with archive.open(member) as f:
                files[m[1]] = f.read(MAX_FILE)
    digest = hashlib.sha256(b''.join(name.encode() + b'\0' + files[name] for name in sorted(files))).hexdigest()
    if digest != NOTTINGHAM_DIGEST:
        raise UserError('it does not hold the 1,037 Nottingham files (their digest is wrong)')
    return files


def _keep(files, log):
    """Write the downloaded files to nottingham.zip, so that the next run needs no network."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(f'Nottingham/{name}'), files[name], zipfile.ZIP_DEFLATED)
    try:
        write_whole(NOTTINGHAM, buffer.getvalue())
    except UserError as e:
        log(f'the next run has to download Nottingham again: {e}')
