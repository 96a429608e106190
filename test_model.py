"""All tests:  python -m pytest"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import wave
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import mido
import numpy as np
import pytest
import torch

import compare
import data
import model as models
import notation
import render
import sample
import train
import wkv
from model import Config
from model import load_checkpoint
from model import Model
from model import save_checkpoint
from notation import Song
from notation import UserError


# ---------------------------------------------------------------------------------------------------------------------
# notation.py: files, MIDI, keys, metre


def rows_of(text):
    """Rows (MIDI note, onset, end) from words such as 60,64:0-1/2, two notes in the first half beat."""
    rows = []
    for keys, onset, end in re.findall(r'(\S+):(\S+)-(\S+)', text):
        rows += [(int(key), float(notation.Fraction(onset)), float(notation.Fraction(end))) for key in keys.split(',')]
    return sorted(rows, key=lambda row: (row[1], row[0]))


def midi_track(text):
    """MIDI messages from words: on60 off60+480 (480 ticks later) on60:0 (velocity 0) on60/9 (channel 9) pedal127."""
    messages = []
    for kind, value, ticks, velocity, channel in re.findall(r'([a-z]+)(\d+)(?:\+(\d+))?(?::(\d+))?(?:/(\d+))?', text):
        more = dict(time=int(ticks or 0), channel=int(channel or 0))
        if kind == 'pedal':
            messages.append(mido.Message('control_change', control=64, value=int(value), **more))
        else:
            messages.append(mido.Message(f'note_{kind}', note=int(value), velocity=int(velocity or 80), **more))
    return messages


def midi_bytes(*tracks, kind=1, ticks=480):
    buffer = io.BytesIO()
    tracks = [mido.MidiTrack(midi_track(track) if isinstance(track, str) else track) for track in tracks]
    mido.MidiFile(type=kind, ticks_per_beat=ticks, tracks=tracks).save(file=buffer)
    return buffer.getvalue()


def midi_rows(song):
    return [(int(key) + 21, float(on), float(end)) for key, on, end in song.notes]


def midi_chunk(body, more=0):
    """A track; the length that it states is so many bytes too long."""
    return b'MTrk' + struct.pack('>I', len(body) + more) + body


def midi_raw(*events, before=b'', after=b'', count=1, length=0, end=b'\0\xff\x2f\0'):
    """A file byte by byte: C4 in the first beat, then the events, then E4 in the second beat."""
    body = b'\0\x90\x3c\x50\x83\x60\x80\x3c\0' + b''.join(events) + b'\0\x90\x40\x50\x83\x60\x80\x40\0' + end
    return b'MThd' + struct.pack('>IHHH', 6, 1, count, 480) + before + midi_chunk(body, length) + after


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_files_that_are_no_plain_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'file').write_bytes(b'what was there')
    (tmp_path / 'link').symlink_to(tmp_path / 'file')
    for path in (tmp_path / 'fifo', tmp_path, tmp_path / 'nowhere', '/dev/zero'):
        with pytest.raises(UserError, match=f'cannot read {path}'):
            notation.read_bytes(path, 100)
    for name in ('fifo', '.', '/dev/null', 'link', 'none/file', 'file/file', 'x' * 300):
        with pytest.raises(UserError, match='cannot write'):
            notation.write_whole(tmp_path / name, b'new')
    assert notation.read_bytes(tmp_path / 'link') == b'what was there'
    with pytest.raises(UserError, match='larger than'):
        notation.read_bytes(tmp_path / 'file', 5)
    for path in (tmp_path / 'file', str(tmp_path / 'other')):
        notation.write_whole(path, b'new')
        assert notation.read_bytes(path, 3) == b'new'
    assert sorted(os.listdir(tmp_path)) == ['fifo', 'file', 'link', 'other']


def test_files_keep_what_they_had_if_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / 'a.pt'
    path.write_bytes(b'old')
    monkeypatch.setattr(os, 'fsync', Mock(side_effect=OSError(28, 'No space left on device')))
    with pytest.raises(UserError, match='a.pt .No space left'):
        notation.write_whole(path, b'new')
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['a.pt']


def test_files_only_parts_of_dead_processes_are_cleared(tmp_path):
    child = subprocess.Popen([sys.executable, '-c', ''])
    child.wait()
    stay = ['a.pt', f'a.pt.{os.getpid()}.part', f'b.pt.{child.pid}.part', 'a.pt.0.part', 'a.pt.part', 'a.pt.x.part']
    for name in stay + [f'a.pt.{child.pid}.part', f'a.mid.{child.pid}.part', f'a.pt.{10 ** 30}.part']:
        (tmp_path / name).write_bytes(b'')
    notation.clear_parts(tmp_path, 'a')
    assert sorted(os.listdir(tmp_path)) == sorted(stay)
    notation.clear_parts(tmp_path / 'nowhere', 'a')


def test_files_messages_are_one_short_line():
    message = str(UserError('one\ntwo\x1b[2J\ud800' + 'x' * 1000))
    assert message.isprintable() and message.startswith('one?two?[2J?x') and len(message) == 300


# ---------------------------------------------------------------------------------------------------------------------
# MIDI

@pytest.mark.parametrize('tracks, rows', [
    ('on60 off60+480', '60:0-1'),
    # all tracks and channels but percussion
    ('on60 off60+480 | on48+240/3 off48+960/3', '60:0-1 48:1/2-5/2'), ('on36/9 on60 off60+480 off36/9', '60:0-1'),
    # velocity 0; struck again, also with a late release or from another track; twice at once
    ('on60 on60+480:0 on62+480 off62+480', '60:0-1 62:2-3'), ('on60 on60+480 off60+480 off60+480', '60:0-1 60:1-2'),
    ('on60 on60+480 off60 off60+480', '60:0-1 60:1-2'), ('on60 off60+1920 | on60+480/1 off60+480/1', '60:0-1 60:1-2'),
    ('on60 on60/1 off60+480 off60+480/1', '60:0-2'),
    # never released, no length, released only
    ('on60+480 | on64 off64+1440', '64:0-3 60:1-3'), ('on60+480 off60 on62+480 off62+480', '60:1-1 62:2-3'),
    ('off60 on62+480 off62+480 off62', '62:1-2'),
    # the sustain pedal: held, down at the release, up at the release, half way, not down
    ('pedal127 on60 off60+480 pedal0+480', '60:0-2'), ('on60 off60+480 pedal127 pedal0+480', '60:0-2'),
    ('pedal127 on60 pedal0+480 off60', '60:0-1'), ('pedal64 on60 off60+480 pedal90+240 pedal63+240', '60:0-2'),
    ('pedal63 on60 off60+480 pedal0+480', '60:0-1'),
    # struck again, of another channel, to the end of the file
    ('pedal127 on60 off60+240 on60+240 off60+240 pedal0+720', '60:0-1 60:1-3'),
    ('pedal127/1 on60 off60+480 pedal0+480/1', '60:0-1'),
    ('pedal127 on60 off60+480 on62+480 off62+480', '60:0-3 62:2-3'),
])
def test_midi_notes(tmp_path, tracks, rows):
    tracks = tracks.split(' | ')
    content = midi_bytes(*tracks, kind=len(tracks) > 1)
    (tmp_path / 'a.mid').write_bytes(content)
    song = notation.read_midi(tmp_path / 'a.mid')
    assert midi_rows(song) == rows_of(rows) and song.dropped == 0 and song.name == 'a.mid'
    assert midi_rows(notation.read_midi(io.BytesIO(content))) == midi_rows(notation.read_midi(content)) == rows_of(rows)


# what makes no sense, or is no music, between the two notes
EVENTS = [
    # keys, tempos, data bytes above 127, time signatures, other statuses, long texts and blocks, a long number
    b'\xff\x59\x02\xee\x01', b'\xff\x59\x02\xfe\xff', b'\xff\x59\x01\0', b'\xff\x51\x02\x07\xa1', b'\xff\x51\x03\0\0\0',
    b'\xff\x51\x04\1\1\1\1', b'\xb0\x07\xa8', b'\xb0\x40\xc8', b'\xb0\xff\0', b'\xc0\xff', b'\xd0\x80', b'\xe0\x80\xff',
    b'\x90\x80\x50', b'\x80\xc8\0', b'\xff\x58\x01\4', b'\xff\x58\x04\4\xc8\x18\x08', b'\xff\x58\x04\0\2\x18\x08',
    b'\xf4', b'\xf8', b'\xf2\1\2', b'\xff\x7e\3abc', b'\xff\x05\x83\x10' + b'\xe6\xad\x8c\xff' * 100,
    b'\xf0\xa7\x08' + b'\xff' * 5000, b'\xff\x01\x80\x80\x80\x80\0']
EMPTY_TRACK = midi_chunk(b'\0\xff\x2f\0')
FILES = [
    # chunks of another kind, bytes between tracks and at the end
    midi_raw(before=b'XFIH\0\0\0\4abcd'), midi_raw(end=b'', after=b'XFIH\0\0\0\4\x90\x90\x90\x90'),
    midi_raw(after=b'\x85\0\0' + EMPTY_TRACK, count=2), midi_raw(after=b'\0\0tail'),
    # wrong lengths and counts, a length into the next track, no end of track
    *[midi_raw(length=length) for length in (3, -3, -22, -18, 1 << 20)], midi_raw(length=3, after=EMPTY_TRACK),
    midi_raw(end=b''), midi_raw(count=3), midi_raw(count=0),
    b'RIFF' + struct.pack('<I', 56) + b'RMIDdata' + struct.pack('<I', 44) + midi_raw()]


@pytest.mark.parametrize('content', [midi_raw(b'\0' + event) for event in EVENTS] + FILES)
def test_midi_opens_what_every_player_opens(content):
    song = notation.read_midi(content)
    assert midi_rows(song) == [(60, 0, 1), (64, 1, 2)]
    assert song.tempo == 120 and song.sharps is None and song.metre is None


def test_midi_running_status_loud_notes_dropped_notes_and_silence():
    running = b'\0\x90\x3c\x50\x83\x60\x3c\0\0\x40\x50\0\xff\1\1x\x83\x60\x40\0\0\xff\x2f\0'
    loud = midi_raw().replace(b'\x90\x40\x50', b'\x90\x40\xc8').replace(b'\x80\x40\0', b'\x80\x40\xff')
    for content in (midi_raw()[:14] + midi_chunk(running), loud):
        assert midi_rows(notation.read_midi(content)) == [(60, 0, 1), (64, 1, 2)]
    song = notation.read_midi(midi_bytes('on20 off20+96 on21 off21+96 on108 off108+96 on109 off109+96 on127', ticks=96))
    assert midi_rows(song) == [(21, 1, 2), (108, 2, 3)] and song.dropped == 3
    assert notation.read_midi(midi_bytes('on60 off60+480 pedal0+960')).silence == 2


def test_midi_first_tempo_key_and_metre():
    meta = mido.MetaMessage
    song = notation.read_midi(midi_bytes(
        [meta('set_tempo', tempo=400_000, time=960), meta('key_signature', key='C', time=960)],
        [meta('set_tempo', tempo=750_000, time=240), meta('key_signature', key='F#m', time=480),
         *midi_track('on60 off60+9')],
        [meta('time_signature', numerator=6, denominator=8), meta('time_signature', numerator=3, time=960)]))
    assert song.tempo == 80 and song.sharps == 3 and song.minor and song.metre == '6/8' and song.pickup is None
    late = notation.read_midi(midi_bytes([*midi_track('on60 off60+480'), meta('set_tempo', tempo=250_000)]))
    assert late.tempo == 120 and late.sharps is None and late.metre is None


GOOD = midi_bytes('on60 off60+480')


@pytest.mark.parametrize('content', [
    # type 2, time that is not in beats, cut off, no music, no end, too large, no status
    GOOD[:9] + b'\2' + GOOD[10:], GOOD[:12] + struct.pack('>h', -25 << 8) + GOOD[14:], GOOD[:12] + b'\0\0' + GOOD[14:],
    b'', GOOD[:-7], GOOD[:14], GOOD[:9], b'no music', GOOD[:22] + b'\xff' * 100_000, b'MThd' + bytes(5 << 20),
    GOOD[:22] + b'\0' * 9], ids=len)
def test_midi_refused(tmp_path, content):
    (tmp_path / 'a.mid').write_bytes(content)
    with pytest.raises(UserError, match=r'a.mid .*: .*$'):
        notation.read_midi(tmp_path / 'a.mid')
    with pytest.raises(UserError, match='member'):
        notation.read_midi(io.BytesIO(content), 'member')
    with pytest.raises(UserError, match='nowhere.mid'):
        notation.read_midi(tmp_path / 'nowhere.mid')


def test_midi_hostile_files_cost_seconds_at_most():
    head = midi_raw()[:14]
    size = notation.MAX_MIDI
    pedalled = b'\0\xb0\x40\x7f\1\x90\x3c\x50\1\x3c\0\0\xb0\x40\0'
    for body in (b'MTrk\0\0\0\0' * (size // 8 - 3), midi_chunk(pedalled * (size // 16 - 3))):
        start = time.process_time()
        notation.read_midi(head + body)
        assert time.process_time() - start < 20


def test_midi_write_and_read_back(tmp_path):
    notes = np.array([[0, 0, 1], [40, 0, .5], [40, .5, 1.25], [87, 2, 2]])
    notation.write_midi(notes, tmp_path / 'a.mid', tempo=90)
    song = notation.read_midi(tmp_path / 'a.mid')
    notes[3, 2] += 1 / 480  # the shortest note a file can hold
    assert np.allclose(song.notes, notes) and abs(song.tempo - 90) < .01
    assert (song.sharps, song.metre, song.pickup) == (None, None, None)
    notation.write_midi(notes[:0], tmp_path / 'a.mid', tempo=1)  # written over; slower than MIDI can say
    assert len(notation.read_midi(tmp_path / 'a.mid').notes) == 0
    with pytest.raises(UserError, match='cannot write'):
        notation.write_midi(notes, tmp_path / 'no' / 'a.mid')
    assert os.listdir(tmp_path) == ['a.mid']


@pytest.mark.parametrize('metre, pickup', [
    ('4/4', 1), ('4/4', 0), ('6/8', .5), ('3/4', 2), ('9/8', .5), ('4/4', 1.75), ('2/2', 2), ('6/8', 1.5), ('2/4', .25),
    ('3/4', 1 / 3), ('12/8', 4.5)])
def test_midi_key_metre_and_pickup_read_back(tmp_path, metre, pickup):
    notes = np.array([[40, 0, pickup or 1], [44, pickup or 1, 5], [47, 5, 9.5]], dtype=float)
    notation.write_midi(notes, tmp_path / 'a.mid', 100, 'a tune \u266f\n', -3, True, metre, pickup)
    song = notation.read_midi(tmp_path / 'a.mid')
    assert np.abs(song.notes - notes).max() < 1 / 480
    assert (song.sharps, song.minor, song.metre) == (-3, True, metre)
    assert song.pickup == (pickup if 64 * pickup % 1 == 0 and pickup else None)
    # and as others read it: a bar that ends with the pickup, then full ones
    track = mido.MidiFile(tmp_path / 'a.mid', charset='utf-8').tracks[0]
    assert track.name == 'a tune \u266f?'
    signs = [(m.numerator / m.denominator * 4, m.time) for m in track if m.type == 'time_signature']
    assert signs[-1][0] == notation.bar_beats(metre)
    if song.pickup:
        assert signs[0] == (pickup, 0) and track[[m.type for m in track].index('note_on') - 1].type == 'time_signature'


# ---------------------------------------------------------------------------------------------------------------------
# Keys

def test_keys_names():
    for sharps, key in enumerate('Cb Gb Db Ab Eb Bb F C G D A E B F# C#'.split(), -7):
        assert notation.sharps(key) == sharps and notation.key_name(sharps) == key
    assert [notation.sharps(key) for key in 'Am Em Dm Ebm A#m'.split()] == [0, 1, -1, -6, 7]
    assert [notation.key_name(sharps, True) for sharps in (0, 1, -1, -6, 7)] == 'Am Em Dm Ebm A#m'.split()
    assert notation.key_name(8) == 'Ab' and notation.key_name(-9) == 'A'


def test_keys_estimate_and_shift():
    scale = [(n, i, i + (2 if n in (0, 7) else 1)) for i, n in enumerate((0, 2, 4, 5, 7, 9, 11, 0, 4, 7, 0))]
    for shift, sharps in enumerate((0, -5, 2, -3, 4, -1, 6, 1, -4, 3, -2, 5)):
        notes = np.array([(39 + n + shift, a, b) for n, a, b in scale])  # C major, moved up
        assert notation.estimate_key(notes) == (sharps, False)
    minor = np.array([(36 + n, i, i + 1) for i, n in enumerate((0, 0, 3, 7, 0, 2, 3, 5, 7, 8, 7, 0))], dtype=float)
    assert notation.estimate_key(minor) == (0, True) and notation.common_key_shift(Song('', minor)) == 0
    # sharps and shift; at the ends of the keyboard: an octave off, or not at all
    cases = [(0, 0), (1, 5), (2, -2), (3, 3), (6, -6), (7, -1), (-1, -5), (-2, 2), (-6, -6), (-7, 1)]
    for keys, sharps, shift in [([40], *case) for case in cases] + [([85], 1, -7), ([1], 2, 10), ([1, 86], 2, 0)]:
        notes = np.array([[key, 0, 1] for key in keys], dtype=float)
        assert notation.common_key_shift(Song('', notes, sharps=sharps)) == shift


# ---------------------------------------------------------------------------------------------------------------------
# Metre

METRE_RHYTHMS = {'2/4': ([.5, .5, .5, .5], [.5, .25, .25, 1]), '3/4': ([2, 1], [1, 1, 1]),
                 '4/4': ([1, .5, .5, 1, 1], [2, 1, 1]), '6/8': ([.5, .5, .5, 1, .5], [1, .5, 1, .5]),
                 '9/8': ([1, .5, 1, .5, .5, .5, .5], [1.5, 1, .5, .5, .5, .5])}


def metre_tune(metre, pickup):
    """A pickup, then eight bars twice, with a chord in each bar."""
    rng = np.random.default_rng(len(metre) + int(2 * pickup))
    notes = [[51, 0, pickup]] * bool(pickup)
    now = pickup
    tune = rng.integers(48, 60, (8, 7))
    for bar in [*range(8)] * 2:
        notes += [[(20, 25, 27, 20)[bar % 4] + i, now, now + notation.bar_beats(metre)] for i in (0, 4, 7)]
        for key, length in zip(tune[bar], METRE_RHYTHMS[metre][bar % 2]):
            notes.append([key, now, now + length])
            now += length
    return np.array(notes, dtype=float)


@pytest.mark.parametrize('metre, pickup', [('2/4', 0), ('3/4', 0), ('3/4', 1), ('4/4', 0), ('4/4', 1), ('6/8', 0),
                                           ('6/8', .5), ('9/8', 0), ('9/8', .5)])
def test_metre_of_plain_tunes(metre, pickup):
    bar = notation.bar_beats(metre)
    notes = metre_tune(metre, pickup)
    assert notation.estimate_metre(notes) == (bar, pickup)
    assert notation.metre_text(notes, bar, pickup) == metre
    assert notation.estimate_metre(notes[notation.is_melody(notes)], bar) == (bar, pickup)


def test_metre_without_notes_and_of_bars_that_are_known():
    assert notation.estimate_metre([]) == (4, 0) and notation.metre_text([], 3, 0) in ('3/4', '6/8')
    assert notation.estimate_metre(metre_tune('3/4', 1), 3)[0] == 3
    assert [notation.metre_text([], bar, 0) for bar in (2, 4, 4.5)] == ['2/4', '4/4', '9/8']
    assert [notation.estimate_metre([[40, 0, 1], [42, 3, 9]], bar)[0] for bar in (1.5, 3.5, 5, 6)] == [1.5, 3.5, 5, 6]
    # what a broken file may hold costs neither time nor memory
    assert notation.estimate_metre([[40, 0, 1], [42, 1e12, 2e12]])[0] in (2, 3, 4, 4.5)


def test_metre_of_the_bundled_tunes():
    right = []
    for song in notation.read_abc(data.TUNES):
        bar, pickup = notation.estimate_metre(song.notes)
        told = notation.bar_beats(song.metre)
        off = (pickup - song.pickup) % min(bar, told)
        right.append(off == 0 and (bar == told or {bar, told} == {2, 4}))
    assert len(right) == 128 and all(right)


def test_melody_is_the_highest_at_its_onset():
    notes = [[20, 0, 4], [24, 0, 4], [50, 0, 1], [52, 1, 2], [53, 2, 4], [22, 4, 8], [45, 3, 5], [54, 4, 6]]
    assert notation.is_melody(notes).tolist() == [False, False, True, True, True, False, False, True]
    # below a held note it is no melody, after that note it is
    assert notation.is_melody([[40, 0, 1], [30, .5, 2], [30, 1, 2], [35, .5, 1]]).tolist() == [True, False, True, False]
    assert len(notation.is_melody([])) == 0


# ---------------------------------------------------------------------------------------------------------------------
# notation: ABC in

def abc_songs(body, head='M:4/4\nL:1/4\nK:C', **more):
    return notation.read_abc(f'X:1\nT:tune\n{head}\n{body}\n'.encode(), 'x.abc', **more)


def abc_melody(body):
    """The notes as one string: letter, octave and length in quarter notes, with rests, in order of onset."""
    out = []
    now = 0
    for note, on, end in midi_rows(abc_songs(body)[0]):
        if on > now:
            out.append(f'z{on - now:g}')
        out.append('C ^C D ^D E F ^F G ^G A ^A B'.split()[note % 12] + f'{note // 12 - 1}:{end - on:.3g}')
        now = end
    return ' '.join(out)


def abc_letters(body, head='M:4/4\nL:1/4\nK:C'):
    return ''.join('C_D_EF_G_A_B'[note % 12] for note, *_ in midi_rows(abc_songs(body, head)[0]))


@pytest.mark.parametrize('body, melody', [
    ("C,, C, C c c'", 'C2:1 C3:1 C4:1 C5:1 C6:1'), ('C > D', 'C4:1.5 D4:0.5'), ('^F-|F F', '^F4:2 F4:1'),
    ('C2 C/ C/2 C// C/4 C3/2 C3/ C4/', 'C4:2 C4:0.5 C4:0.5 C4:0.25 C4:0.25 C4:1.5 C4:1.5 C4:2'),
    ('^F F f | F _B =B B ^^C __D', '^F4:1 ^F4:1 ^F5:1 F4:1 ^A4:1 B4:1 B4:1 D4:1 C4:1'),
    ('C z C z/ C x2 C | Z | D Z2 E', 'C4:1 z1 C4:1 z0.5 C4:1 z2 C4:1 z4 D4:1 z8 E4:1'),
    ('C-C D-|D2 E-F C3-\nC .-', 'C4:2 D4:3 E4:1 F4:1 C4:4'),
    ('C>D C<D C>>D C<<D C>>>D', 'C4:1.5 D4:0.5 C4:0.5 D4:1.5 C4:1.75 D4:0.25 C4:0.25 D4:1.75 C4:1.88 D4:0.125'),
    ('[M:6/8][L:1/8](2CD(5CDEFG', 'C4:0.75 D4:0.75 C4:0.3 D4:0.3 E4:0.3 F4:0.3 G4:0.3'),
    ('(3CDE (2FG (4CDEF A', 'C4:0.667 D4:0.667 E4:0.667 F4:1.5 G4:1.5 C4:0.75 D4:0.75 E4:0.75 F4:0.75 A4:1'),
    ('(5:4CDEFG (3::2C2D E (3:2:4 C/D/EF G', 'C4:0.8 D4:0.8 E4:0.8 F4:0.8 G4:0.8 C4:1.33 D4:0.667 E4:1 '
     'C4:0.333 D4:0.333 E4:0.667 F4:0.667 G4:1'), ('{fg}A {/d}(B .c) ~d !trill!e +turn+f Tg vA uB y4 c`d $',
     'A4:1 B4:1 C5:1 D5:1 E5:1 F5:1 G5:1 A4:1 B4:1 C5:1 D5:1'),
    ('C \\\nD % E\n% F G\n%%MIDI program 1\nw:la la\nE|', 'C4:1 D4:1 E4:1'),
    ('C\n%%begintext\nA bad case of beef\n%%endtext\nD', 'C4:1 D4:1'),
    ('C [K:D] F [L:1/8] F2 [M:3/4] Z C\nK:F\nB2\nL:1/4\nB', 'C4:1 ^F4:1 ^F4:1 z3 ^C4:0.5 ^A4:1 ^A4:1'),
    # what is only drawn does not sound: words, letters, user symbols, clefs, layout, old line breaks, reserved signs
    ('"^slow"C "_x"D "<p"E ">q"F "@1,2 r"G "p"A "tr"B "Slow"c "3"d "Ad lib"e',
     'C4:1 D4:1 E4:1 F4:1 G4:1 A4:1 B4:1 C5:1 D5:1 E5:1'),
    ('U:k=!slide!\nvkC JD UE VF | Hc ! G A | !\nB [I:x 1] [r:word] ?*@;#c',
     'C4:1 D4:1 E4:1 F4:1 C5:1 G4:1 A4:1 B4:1 C5:1'),
    ('I:linebreak $\nC [K:bass] C, [K:clef=alto] C [K:D treble] F', 'C4:1 C3:1 C4:1 ^F4:1'),
    ('c [K:treble-8] c [K:C clef=bass+8] c [K:+8va] c', 'C5:1 C4:1 C6:1 C6:1'),
    ('V:1 clef=treble-8 nm="Fiddle"\nV:1\nC2 D2|', 'C3:2 D3:2'), ('K:D\nF [K:clef=bass] F', '^F4:1 ^F4:1'),
    # a letter may come twice in a chord
    ('[C^C]2 [_E=E-]E', 'C4:2 ^C4:2 ^D4:1 E4:2'),
])
def test_abc_melody(body, melody):
    assert abc_melody(body) == melody


@pytest.mark.parametrize('body, letters', [
    ('|:C:|D', 'CCD'), ('C:|D', 'CCD'), ('C|]D:|E', 'CDDE'), ('C||D:|E', 'CDDE'), ('|:C||D:|E', 'CDCDE'),
    ('|:C::D:|', 'CCDD'), ('|:C:|:D:|', 'CCDD'), ('|:C:||:D:|E', 'CCDDE'), ('C:|D:|', 'CCDD'), ('|::C::|D', 'CCCD'),
    ('|:C|1D:|2E|]F', 'CDCEF'), ('|:C[1D:|[2E:|F', 'CDCEF'), ('C|1D:|2E||F:|', 'CDCEFF'), ('|:C|1D:|2E||F:|', 'CDCEFF'),
    ('|:C|1D:|\n|2E||', 'CDCE'), ('|:C| 1 D:| 2 E|]', 'CDCE'),
    ('|:C|[1,3D:|[2E:|[4F|]G', 'CDCECDCFG'), ('|:C|1,2,3D:|4E|]', 'CDCDCDCE'), ('|:C|1D:|2E|:F|1G:|2A|]', 'CDCEFGFA'),
    ('|:C|1D:|E', 'CDCE'),
    ('|:C|[1-3 D:|[4 E|]', 'CDCDCDCE'), ('[|C.|D[|]', 'CD'), ('|:C||D|1E:|2F|]G', 'CDECDFG'), ('G|:C:|', 'GCC'),
    # bar lines side by side are one
    ('C|D[|]:|E', 'CDCDE'), ('C|D [|] :|E', 'CDCDE'), ('C|D |]\n:|E', 'CDCDE'), ('C|D|\n:|\n|:E:|', 'CDCDEE'),
    ('C:|\n: D:|', 'CCDD'),
    # D.C. and its like: at the end of their bar, once, without repeats
    ('C D !fine! | E F !D.C.! |] G', 'CDEFCD'), ('C|!fine!D||E|"D.C. al Fine"F|]', 'CDEFCD'),
    ('|:C|1D:|2E|!D.C.!F|', 'CDCEFCEF'),
    ('C|!segno!D|E|!D.S.!F|G', 'CDEFDEF'), ('"Fine"C', 'C'), ('"Coda"C', 'C'), ('SC|OD', 'CD'),
    ('|:C|1D:|2E||F|"D.C."G:|', 'CDCEFGFGCEFG'), ('"S"C|1D:|2E||"D.S."F|]', 'CDCEFCEF'), ('C"D.C."D:|', 'CDCDCD'),
])
def test_abc_repeats(body, letters):
    assert abc_letters(body) == letters


@pytest.mark.parametrize('order, letters', [
    ('AABB', 'CCDD'), ('ABC', 'CD'), ('', 'CD'), ('XY', 'CD'), ('BAB', 'DCD'), ('A2.B', 'CCD'),
])
def test_abc_orders_of_parts(order, letters):
    assert abc_letters('P:A\nC|\nP:B\nD|', f'P:{order}\nL:1/4\nK:C') == letters
    assert abc_letters('P: A\nC|\nP: B \nD|', f'P: {order}\nL:1/4\nK:C') == letters
    assert abc_letters('[P:A]|:C:|[P:B]D|', f'P:{order}\nL:1/4\nK:C') == letters.replace('C', 'CC')
    # each part is in the key in which it is written
    assert abc_letters('P:A\nF::\nP:B\nK:D\nF|', 'P:ABA\nL:1/4\nK:C') == 'FF_FF'


def test_abc_nested_orders_of_parts_are_skipped():
    skipped = []
    assert abc_songs('P:A\nC|', 'P:(AB)2\nL:1/4\nK:C', skipped=skipped) == [] and 'P:(AB)2' in skipped[0]


@pytest.mark.parametrize('keys, sharps, fgabcde', [
    ('C, F Lyd, B locrian, E PHRYGIAN', 0, 'F G A B C D E'), ('Am, Amin, A aeolian', 0, 'F G A B C D E'),
    ('G, D Mix, Gion', 1, '^F G A B C D E'), ('Edor, HP, Hp, d', 2, '^F G A B ^C D E'),
    ('none, ', None, 'F G A B C D E'),
    ('G clef=bass', 1, '^F G A B C D E'), ('F clef=bass, F', -1, 'F G A ^A C D E'), ('F#m', 3, '^F ^G A B ^C D E'),
    ('Bb major', -2, 'F G A ^A C D ^D'), ('D =c', 2, '^F G A B C D E'), ('C^f^c', 0, '^F G A B ^C D E'),
    ('D exp _b', None, 'F G A ^A C D E'), ('D exp ^f=c_b', None, '^F G A ^A C D E'),
])
def test_abc_keys(keys, sharps, fgabcde):
    for key in keys.split(', '):
        song = abc_songs('FGABCDE', f'L:1/4\nK:{key}')[0]
        assert song.sharps == sharps and song.minor == (key in ('Am', 'F#m', 'Amin', 'A aeolian'))
        names = ['C ^C D ^D E F ^F G ^G A ^A B'.split()[n % 12] for n, *_ in midi_rows(song)]
        assert names == fgabcde.split()


@pytest.mark.parametrize('head, beats, tempo', [
    ('M:4/4', .5, 120), ('M:C|', .5, 120), ('M:2/4', .25, 120), ('M:none', .5, 120), ('N:', .5, 120),
    ('L:1/16', .25, 120), ('M:2/4\nL:1/2', 2, 120), ('Q:1/4=96', .5, 96), ('Q:"Fast" 3/8=100', .5, 150),
    ('Q:1/8=100 "Slow"', .5, 50), ('Q:"Lively"', .5, 120), ('Q:1/4=0', .5, 120), ('Q:1/4=92.5', .5, 92.5),
    ('Q:1/4="Andante"', .5, 120), ('Q:1/4=', .5, 120),
    ('Q: 1/4 = 77 "x"', .5, 77), ('Q:1/4=100-120', .5, 100), ('L:1/8\nQ:200', .5, 100), ('L:1/4\nQ:C=80', 1, 80),
])
def test_abc_unit_length_and_tempo(head, beats, tempo):
    song = abc_songs('C', f'{head}\nK:C')[0]
    assert midi_rows(song) == [(60, 0, beats)] and song.tempo == tempo
    assert abc_songs('Q:1/4=77\nC\nQ:1/4=99\nC', 'K:C')[0].tempo == 77


@pytest.mark.parametrize('head, body, metre, pickup', [
    ('M:4/4', 'CDEF|', '4/4', 0), ('M:C|', 'D|:CDEF:|', '2/2', 1), ('M:6/8', 'C/|C3', '6/8', .5),
    ('M:3/4', '|:CD|EFG|', '3/4', 2), ('M:4/4', 'CDEFGABc|', '4/4', 0), ('M:none', 'C|D', None, None),
    ('N:', 'C|D', None, None), ('M:3/4', 'C', '3/4', 0), ('M:odd', 'C|', None, None),
    # MIDI knows no fifths
    ('M:4/5', 'C|', None, None),
])
def test_abc_metre_and_pickup(head, body, metre, pickup):
    song = abc_songs(body, f'{head}\nL:1/4\nK:C')[0]
    assert (song.metre, song.pickup) == (metre, pickup)
    assert song.silence == 0 and abc_songs(f'{body} z2 |')[0].silence == 2


def test_abc_chords_and_chord_symbols():
    assert midi_rows(abc_songs('[CEG]2 [CE]/ [C2E]-[CF]')[0]) == [
        (60, 0, 2), (64, 0, 2), (67, 0, 2), (60, 2, 2.5), (64, 2, 2.5), (60, 2.5, 5.5), (64, 2.5, 4.5), (65, 4.5, 5.5)]
    assert midi_rows(abc_songs('["Am"C!f!.E]')[0]) == [(60, 0, 1), (64, 0, 1)]
    # held to the next symbol, over bars and rests, struck again by the same symbol; N.C. and the end stop it
    for stop in ('"N.C."', '"NC"', '"^N.C."'):
        rows = midi_rows(abc_songs(f'c "G7"d2 z|"G"d z {stop}d "F#m/C#"c2|')[0])
        assert [r for r in rows if r[0] < 66] == [(n, *t) for t in ((1, 4), (4, 6), (7, 9)) for n in
                                                  ((55, 59, 62) if t[0] < 7 else (54, 57, 61))]
    # the melody's D4 is inside G B D: the triad turns over until it lies below
    assert midi_rows(abc_songs('"G"D4')[0]) == [(50, 0, 4), (55, 0, 4), (59, 0, 4), (62, 0, 4)]
    for intervals, symbols in {
        (0, 4, 7): 'C C7 Cmaj7 CMaj7 CM7 C6 C6/9 Cadd9 C13 C/g C/f+ C7/b C/Bb C/^f C(Am)',
        (0, 3, 7): 'Cm Cm7 Cmin Cm/e_ C-',
        (0, 5, 7): 'Csus4 C7sus4 Csus',
        (0, 3, 6): 'Cdim Cd C/dim Co7 Cm7b5 C°', (0, 4, 8): 'Caug C+ C7#5', (0, 2, 7): 'Csus2',
    }.items():
        for symbol in symbols.split():
            rows = midi_rows(abc_songs(f'"{symbol}"c4')[0])
            assert [n - 48 for n, *_ in rows[:-1]] == list(intervals), symbol
    assert [n for n, *_ in midi_rows(abc_songs('"B♭"c4')[0])] == [58, 62, 65, 72]
    for words in ('p', 'tr', '1', 'Allegro', 'Fine', 'Capo 2', 'D C', 'Gently', 'a', '^C', 'Cxyz', ''):
        assert midi_rows(abc_songs(f'"{words}"c4')[0]) == [(72, 0, 4)], words
    # a symbol that is replaced at once makes no sound; with a repeat the symbols come round again
    assert len(abc_songs('"C""G"c4')[0].notes) == len(abc_songs('"N.C.""G"c4')[0].notes) == 4
    assert len(abc_songs('"G""N.C."c4')[0].notes) == 1
    assert [r[1:] for r in midi_rows(abc_songs('|:"C"c4:|')[0]) if r[0] == 48] == [(0, 4), (4, 8)]


@pytest.mark.parametrize('body, thing', [
    ('C0', '0'), ('C1/0', '0'), ('[C0E]', '[C0E]'), ('L:x\nC', 'L:x'), ('K:X\nC', 'K:X'), ('z4', 'no notes'),
    ('^/C', '^'), ('[CE', '['), ('"C', '"'), ('{C', '{'), ('|:C[99D:|', '9'), ('C>>>>D', '>'), ('C2&E2|F', '&'),
    ('V:1\nC4|\nV:2\nE4|', 'several voices'),
])
def test_abc_what_it_cannot_read_skips_the_tune(capsys, body, thing):
    skipped = []
    assert abc_songs(body, skipped=skipped) == [] and not capsys.readouterr().err
    assert len(skipped) == 1 and all(word in skipped[0] for word in ('x.abc', '"tune"', thing))
    assert abc_songs(body) == [] and capsys.readouterr().err == skipped[0] + ' (1 of 1 tunes were skipped)\n'


def test_abc_files(tmp_path, capsys):
    text = ('\ufeff%abc-2.1\r\nL:1/4\r\nM:3/4\r\n\r\nfree text: with a colon\r\n\r\n'
            'X:1\r\nT:Café\r\nT:second title\r\nK:G\r\nA:|\r\n\r\n'
            'more text\r\n\r\nX:2\r\nT:Two\r\nL:1/2\r\nK:D\r\nF^/F\r\nX:3\r\nK:D\r\nF|\r\n')
    path = tmp_path / 'a.abc'
    for encoding in ('utf-8', 'latin-1'):
        path.write_bytes(text.lstrip('\ufeff' * (encoding == 'latin-1')).encode(encoding))
        songs = notation.read_abc(path)
        assert [s.name for s in songs] == ['Café', 'X:3']
        assert [midi_rows(s) for s in songs] == [[(69, 0, 1), (69, 1, 2)], [(66, 0, 1)]]
        assert songs[0].text == 'M:3/4\nL:1/4\nK:G\nA:|\n'
        assert '"Two"' in capsys.readouterr().err
    path.write_bytes('X:1\nT:Café\nK:C\nC'.encode('utf-16'))
    assert [s.name for s in notation.read_abc(path)] == ['Café']
    path.write_bytes(b'\xef\xbb\xbfX:1\nK:C\nC')
    assert len(notation.read_abc(path)) == len(notation.read_abc(io.BytesIO(path.read_bytes()))) == 1
    for wrong in (b'', b'no tune here'):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match='a.abc'):
            notation.read_abc(path)
    # many unreadable tunes: one line that counts them
    assert notation.read_abc(b'X:1\nK:C\n^/C\n\n' * 200 + b'X:1\nC\n') == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and '201 of 201' in lines[0]


def test_abc_text_is_the_tune_itself():
    text = ('X:5\nT:Ti♭le % x\nR:reel\nM:C\nQ:1/4=90\nV:1\nK:Gm treble %\n'
            '%%x\nG–A|\nw:la\n[Q:1/4=80]"E♭"B4|\t c4 |\n\nW:')
    song = notation.read_abc(text.encode())[0]
    assert song.text == 'M:4/4\nL:1/8\nV:1\nK:Gm treble\nGA|\n"Eb"B4| c4 |\n'
    for song in notation.read_abc(data.TUNES):
        again = notation.read_abc(('X:1\n' + song.text).encode())[0]
        assert np.array_equal(again.notes, song.notes) and (again.text, 0) == (song.text, 0) == notation.tune_text(song)
        assert re.fullmatch(r'[ -~\n]*', song.text)


@pytest.mark.parametrize('tune', [
    'C' + '>' * 39_000, '[1' * 19_000, ':' * 19_000 + '|', 'C' + ':' * 9_000 + '|' + 'C' * 9_000,
    '[' + 'C' * 9_000 + ']:::::::|', ''.join(f'C{n}/{999 - n}' for n in range(1, 999)),
    '[1' * 9_000 + ':' * 9_000 + '|',
    '"C"C' * 9_900, '"C"[C-E]-' * 4_000, '|:' * 19_000, 'C:|' * 13_000, '(9:9:9' * 6_000, 'C' + "'" * 39_000,
    '"(' * 19_000, '{' * 39_000, '[L:1/997]C[L:1/991]C' * 1900, '![' * 19_000, '"' * 39_999,
    '\n ' * 19_000, '=' * 39_000,
    'A:|\n' * 9_000, '[K:' * 13_000, '!D.C.!C|' * 4_900, '[V:1]C[V:2]C' * 3_000, 'P:A\nC\n' * 6_000, '^c' * 19_000,
], ids=lambda tune: f'{tune[:12]!r}')
def test_abc_costs_are_bounded(tune):
    start = time.process_time()
    notation.read_abc(f'X:1\nP:AAAA\nK:C\n{tune}\n'.encode(), skipped=[])
    assert time.process_time() - start < 3


def test_abc_large_books():
    book = 'X:%d\nT:Tune %d\nM:4/4\nL:1/8\nK:G\n' + '|:G2Bd g2fe|d2cB A2GF:|\n' * 5 + '\n'
    start = time.process_time()
    assert len(notation.read_abc(''.join(book % (i, i) for i in range(1000)).encode())) == 1000
    assert time.process_time() - start < 20


# ---------------------------------------------------------------------------------------------------------------------
# notation: ABC out

def abc_music(notes, **more):
    """(the music that is written for notes, how many are left out)."""
    more = dict(metre='4/4', pickup=0, sharps=0) | more
    text, left_out = notation.write_abc(np.array(rows_of(notes)) - [21, 0, 0], **more)
    return re.split(r'K:.*\n', text)[1].strip(), left_out


def test_abc_header():
    text, _ = notation.write_abc(np.array([[39., 0, 1]]), 'Café\n% "x"', 90, 3, True, '6/8', 0)
    assert text.startswith('X:1\nT:Cafe   "x"\nM:6/8\nL:1/8\nQ:1/4=90\nK:F#m\n')
    assert notation.write_abc(np.zeros((0, 3)))[0].endswith('K:C\nz2|]\n')
    # nobody writes eight sharps
    assert notation.write_abc(np.array([[47., 0, 1]]), sharps=8)[0].endswith('K:Ab\nA2|]\n')


@pytest.mark.parametrize('notes, more, music', [
    # lengths, ties over the bar line, rests, beams, octaves
    ('60:0-1 62:1-3/2 64:3/2-2 65:2-5 72:11/2-23/4 84:23/4-6 48:6-8', {}, "C2DE F4-|F2zc/c'/ C,4|]"),
    ('60:0-5/2 62:5/2-4', {}, 'C4- CD3|]'),
    (' '.join(f'60:{i}-{i + 1}' for i in range(18)), dict(pickup=2), 'C2C2' + '|C2C2 C2C2' * 4 + '|]'),
    (' '.join(f'60:{i}/2-{i + 1}/2' for i in range(7)), dict(metre='6/8', pickup=.5), 'C|CCC CCC|]'),
    # accidentals by key and bar, naturals, and none of them doubtful in another octave
    ('66:0-1 66:1-2 65:2-3 77:3-4 66:4-8', {}, '^F2F2 =F2f2|^F8|]'),
    ('66:0-2 65:2-4 66:4-8', dict(sharps=1), 'F4 =F4|F8|]'), ('66:2-6 66:6-7 65:7-8', {}, 'z4 ^F4-|^F4 F2=F2|]'),
    ('70:0-4', dict(sharps=-2), 'B8|]'), ('68:0-4', dict(minor=True), '^G8|]'),
    ('61:0-2 63:2-4', dict(sharps=4), 'C4 D4|]'),
    # triplets
    ('60:0-1/3 61:1/3-2/3 62:2/3-1 65:1-2', dict(sharps=-5), '(3CD=DF2|]'), ('60:0-2/3 62:2/3-1', {}, '(3:2:2C2D|]'),
    ('60:0-1/2 62:1/2-2/3 62:2/3-5/6 62:5/6-1', {}, 'C(3D/D/D/|]'), ('60:0-1/3 62:1/3-2', {}, '(3:2:2CD2-D2|]'),
    # several notes at once, with their own lengths
    ('60:0-2 64:0-1 65:1-2', {}, '[C2-E2][C2F2]|]'), ('72,76,79:0-1', {}, '[c2e2g2]|]'),
    ('36,72:0-1', {}, '[C,,2c2]|]'),
    # chords under the melody; where they fall silent for a beat or more it is told
    ('48,52,55:0-2 72:0-4 50,53,57,60:2-4', {}, '"C"c4- "Dm7"c4|]'),
    ('54,57,60:0-4 74:1-4 58,62,65:4-8 77:4-6', {}, '"F#dim"z2d6|"Bb"f4 z4|]'),
    ('50,55,57,60:0-4 72:0-4', {}, '"D7sus4"c8|]'),
    # the highest note is no melody if it goes on for a beat below the next one
    ('55,59,62,65:0-4 67:1-4', {}, '"G7"z2G6|]'), ('48,52,55:0-2 60:0-3/2 72:1-2', {}, '"C"C2-[Cc-]c|]'),
    ('48,52,55:0-2 72:0-4', {}, '"C"c4- "^N.C."c4|]'),
    ('48,52,55:0-1 72:0-2 74:2-3 43,47,50,72:3-4', {}, '"C"c2-"^N.C."c2 d2"G"c2|]'),
    # chords from as high as the F above middle C; from the G on they are melody
    ('65,69,72:0-4 81:0-4', {}, '"F"a8|]'), ('67,71,74:0-4 83:0-4', {}, '[G8B8d8b8]|]'),
    # a note of the melody inside the chord; two notes that go on below a melody with one of them
    ('46,50,53:0-4 48:0-1 72:0-4', {}, '"Bb"[C,2c2-]c6|]'), ('51,55:0-4 63:0-1 65:1-4', {}, '"Eb"_E2F6|]'),
])
def test_abc_music(notes, more, music):
    assert abc_music(notes, **more) == (music, 0)
    if '"' not in music:
        key = notation.key_name(more.get('sharps', 0), more.get('minor', False))
        again = notation.read_abc(f'X:1\nM:4/4\nL:1/8\nK:{key}\n{music}'.encode())
        assert np.allclose(midi_rows(again[0]), rows_of(notes), atol=1e-6)


def test_abc_bass_below_chords_is_left_out_and_counted():
    assert abc_music('36,72:0-1 48,52,55,72:1-2') == ('c2"C"c2|]', 1)


def test_abc_round_trip_is_stable():
    for song in notation.read_abc(data.TUNES)[::2]:
        more = (song.name, song.tempo, song.sharps, song.minor, song.metre, song.pickup)
        text, left_out = notation.write_abc(song.notes, *more)
        again = notation.read_abc(text.encode())[0]
        assert left_out == 0 and abs(again.tempo - song.tempo) < .01
        assert (again.sharps, again.minor, again.metre, again.pickup) == more[2:]
        assert notation.write_abc(again.notes, *more)[0] == text
        # without the header's help the notes come back too, and as a model reads them
        guessed = notation.read_abc(notation.write_abc(song.notes)[0].encode())[0]
        plain, _ = notation.tune_text(song._replace(text=None))
        assert re.match(r'M:.*\nL:1/8\nK:.*\n', plain)
        for notes in (again.notes, guessed.notes, notation.read_abc(f'X:1\n{plain}'.encode())[0].notes):
            assert np.allclose(notes, song.notes, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# data.py

DATA_GRIDS = dict(roll=data.PianoRoll(), plain=data.PianoRoll(onsets=False), events=data.Events(), abc=data.AbcText())


def data_for_each(*names):
    return pytest.mark.parametrize('grid', [pytest.param(DATA_GRIDS[name], id=name) for name in names or DATA_GRIDS])


def data_random_notes(rng, n, steps=200, steps_per_beat=4):
    """At most n notes that begin on a grid and overlap as they like, but for those of one key."""
    onset = rng.integers(0, steps, n)
    rows = np.stack((rng.integers(0, 88, n), onset, onset + rng.integers(1, 30, n)), axis=1)
    return notation.one_per_key(rows.astype(float)) / [1, steps_per_beat, steps_per_beat]


@pytest.mark.parametrize('beats, steps', [
    ([(0, .12, .9), (87, 0, 1)], [(0, 0, 4), (87, 0, 4)]),
    ([(0, .125, 1.125)], [(0, 1, 5)]),
    ([(0, 1, 1)], [(0, 4, 5)]),
    ([(0, 0, .99), (0, 1, 2)], [(0, 0, 4), (0, 4, 8)]),
    ([(0, 0, 2), (0, 1, 1.5)], [(0, 0, 4), (0, 4, 6)]),
    ([(0, 0, .5), (0, .05, 1)], [(0, 0, 4)])])
def test_data_quantiser(beats, steps):
    song = data.Song('', np.array(beats, dtype=float))
    frames = data.PianoRoll(4).encode(song)
    want = np.zeros((max(end for _, _, end in steps), 177), dtype=np.uint8)
    for key, on, end in steps:
        want[on, key] = 1
        want[on + 1:end, 88 + key] = 1
    assert frames.dtype == np.uint8 and (frames == want).all()
    plain = data.PianoRoll(4, onsets=False).encode(song)
    assert (plain[:, :88] == want[:, :88] | want[:, 88:176]).all() and plain.shape[1] == 89
    events = data.Events(4)
    assert events.decode(events.encode(song)).tolist() == [[key, on / 4, end / 4] for key, on, end in steps]


@pytest.mark.parametrize('n', [0, 1, 600])
@data_for_each('roll', 'events', 'plain')
def test_data_round_trip(tmp_path, grid, n):
    rng = np.random.default_rng(n)
    notes = data_random_notes(rng, n, 600, grid.steps_per_beat)
    frames = grid.encode(data.Song('', notes))
    assert frames.dtype == np.uint8 and frames.shape[1] == grid.V and not frames[:, -1].any()
    assert grid.steps(frames) == round(grid.steps_per_beat * notes[:, 2].max(initial=0))
    # a tune has one spelling
    assert np.array_equal(grid.encode(data.Song('', rng.permutation(notes))), frames)
    assert np.array_equal(grid.encode(grid.to_song(frames)), frames)
    if grid.V > 89:
        assert np.array_equal(grid.decode(frames), notes)
        notation.write_midi(grid.decode(frames), tmp_path / 'a.mid')
        assert np.array_equal(grid.encode(notation.read_midi(tmp_path / 'a.mid')), frames)


def test_data_piano_roll_a_key_held_that_was_not_struck():
    held = np.zeros((4, 177), dtype=np.uint8)
    held[1:3, 88 + 5] = 1
    held[2, 6] = 1
    held[3, 88 + 6] = 1
    assert data.PianoRoll().decode(held).tolist() == [[5, .25, .75], [6, .5, 1]]


def data_units(words):
    """Units of Events from words: on40 off40 wait12."""
    first = dict(on=0, off=88, wait=175)
    return [first[kind] + int(number) for kind, number in re.findall(r'([a-z]+)(\d+)', words)]


def test_data_events_spelling():
    notes = np.array([(44, 0, 1), (40, 0, 1), (40, 1, 2), (30, 22, 23)])
    frames = data.Events(12).encode(data.Song('', notes))
    assert (frames.sum(1) == 1).all() and frames.argmax(1).tolist() == data_units(
        'on40 on44 wait12 off40 off44 on40 wait12 off40 wait96 wait96 wait48 on30 wait12 off30')


def test_data_events_forgive_what_a_sampler_may_do():
    events = data.Events(4)
    frames = np.eye(events.V, dtype=np.uint8)
    units = data_units('off5 on6 wait2 on6 on9 off9 wait1 off6 off6 on7 wait4')
    assert events.decode(frames[units]).tolist() == [[6, 0, .5], [6, .5, .75], [7, .75, 1.75]]
    notes = events.decode(frames[np.random.default_rng(0).integers(0, events.V - 1, 3000)])
    assert (notes[:, 2] > notes[:, 1]).all() and np.array_equal(notation.one_per_key(notes), notes)
    assert np.array_equal(events.decode(events.encode(data.Song('', notes))), notes)


@pytest.mark.parametrize('grid', [data.PianoRoll(12), data.Events(12), data.AbcText()])
def test_data_bundled_tunes_round_trip(grid):
    kept = []
    for song in notation.read_abc(data.TUNES)[::4]:
        # a key, struck less than a tenth of a beat off and as long
        again = grid.decode(grid.encode(song))
        near = (abs(song.notes[:, None] - again) < 0.1).all(2)
        kept.append(2 * near.any(1).sum() / (len(song.notes) + len(again)))
    assert np.mean(kept) == 1


def test_data_abc_text():
    abc = data.AbcText()
    tune = 'X:1\nT:A \u00e9 title\nC:by me\nQ:1/4=99\nM:6/8\nL:1/8\nK:D % two\nd2A F2A|[df]6|\nw:la la\n'
    song, = notation.read_abc(tune.encode())
    frames = abc.encode(song)
    assert abc.text(frames) == song.text == 'M:6/8\nL:1/8\nK:D\nd2A F2A|[df]6|\n'
    assert frames.shape == (len(song.text), 97) and (frames.sum(1) == 1).all() and not frames[:, -1].any()
    again = abc.to_song(frames)
    assert np.array_equal(again.notes, song.notes) and (again.sharps, again.metre) == (2, '6/8')
    # a tune without text is written down first
    notes = np.array([(39, 0, 1), (43, 1, 1.5), (46, 1.5, 2), (51, 2, 4)])
    frames = abc.encode(data.Song('', notes, metre='4/4', pickup=0.0, sharps=0))
    assert np.array_equal(abc.decode(frames), notes) and abc.text(frames).startswith('M:4/4\n')
    for text in ('K:C\n\u00e9', 'K:C\n\t', 'x' * 100_001):
        with pytest.raises(data.UserError, match='character'):
            abc.encode_text(text)
    for text in ('', 'K:C\n', 'K:Z\nC', 'L:1/8\nK:C\n[CE'):
        with pytest.raises(data.UserError):
            abc.to_song(abc.encode_text(text))
    # what is cut off is read up to its last bar line
    frames = abc.encode_text('L:1/4\nK:C\nCDEF|GABc|"A')
    with pytest.raises(data.UserError):
        abc.to_song(frames)
    assert abc.to_song(frames, ended=False).notes[:, 0].tolist() == [39, 41, 43, 44, 46, 48, 50, 51]
    assert abc.to_song(abc.encode_text('K:C\nCD'), ended=False).notes[:, 0].tolist() == [39, 41]


def test_data_openings(tmp_path):
    path = tmp_path / 'a.abc'
    path.write_text('X:1\nM:4/4\nL:1/4\nK:D\nDEFG|A4|]\n')
    roll = data.PianoRoll()
    song, frames, semitones = roll.opening(path, 2.5, True)
    assert semitones == -2 and song.notes.tolist() == [[39, 0, 1], [41, 1, 2], [43, 2, 2.5]]
    assert np.array_equal(roll.decode(frames), song.notes)
    # a text goes on, so it has no end; moved, it is written anew in its new key
    abc = data.AbcText()
    assert abc.text(abc.opening(path, 100, False)[1]) == 'M:4/4\nL:1/4\nK:D\nDEFG|A4'
    song, frames, _ = abc.opening(path, 100, True)
    assert abc.to_song(frames).sharps == song.sharps == 0 and np.array_equal(abc.decode(frames), song.notes)
    # players let go of a note a little early, or late; what is composed begins on the grid
    notation.write_midi(np.array([(40, 0, 0.95), (42, 1, 2.05)]), tmp_path / 'a.mid')
    for beats in (1.98, 9):
        assert roll.opening(tmp_path / 'a.mid', beats, False)[0].notes.tolist() == [[40, 0, 1], [42, 1, 2]]
    path.write_text('X:1\nM:4/4\nL:1/4\nK:D\n|:DEFG|A4:|\n')
    assert abc.text(abc.opening(path, 100, False)[1]).endswith('\n|:DEFG|A4:|')
    # a text says no more than is asked for
    path.write_text('X:1\nL:1/4\nK:C\nC8|\n')
    assert abc.decode(abc.opening(path, 2, False)[1]).tolist() == [[39, 0, 2]]
    for name, beats in (('missing.abc', 9), ('a.abc', 0)):
        with pytest.raises(data.UserError, match=f'{name}.*--prompt'):
            roll.opening(path.with_name(name), beats, False)


@data_for_each()
def test_data_representations_are_built_again_from_their_settings(grid):
    again = data.representation(json.loads(json.dumps(grid.settings)))
    assert vars(again) == vars(grid) and type(again) is type(grid)
    for wrong in ({}, dict(name='tab'), dict(grid.settings, colour=1)):
        with pytest.raises(data.UserError, match='no representation'):
            data.representation(wrong)


@data_for_each('roll', 'plain', 'events')
@pytest.mark.parametrize('end', [1e5, float('inf')])
def test_data_a_song_may_be_too_long(grid, end):
    with pytest.raises(data.UserError, match='100,000'):
        grid.encode(data.Song('', np.array([[40, 0, end]])))


# ---------------------------------------------------------------------------------------------------------------------
# data.py: splits and batches

def data_set(grid):
    """Twelve random songs, the first of them one long held note."""
    rng = np.random.default_rng(0)
    songs = [data.Song('0', np.array([[10, 0, 300.0]]), text='CDEF')]
    for i in range(1, 12):
        text = ''.join(rng.choice(list(data.AbcText.CHARACTERS), rng.integers(20, 200)))
        songs.append(data.Song(f'{i}', data_random_notes(rng, 80, 60), text=text))
    return data.Dataset(dict(train=songs, valid=songs[:5], test=songs[5:]), 'random', grid)


def data_tape(dataset, history):
    """Empty frames, all frames of the training songs and the boundaries between them, (T, V)."""
    V = dataset.representation.V
    pieces = [np.zeros((history, V), dtype=np.uint8), np.eye(V, dtype=np.uint8)[-1:]]
    for song in dataset.songs['train']:
        pieces += [dataset.representation.encode(song), pieces[1]]
    return np.concatenate(pieces)


@data_for_each()
def test_data_windows_equal_the_whole(grid):
    history = 40
    dataset = data_set(grid)
    tape = data_tape(dataset, 0)
    assert (dataset.frames('train', 0, len(tape)) == tape).all()
    assert dataset.packed['train'].shape == (len(tape), -(-grid.V // 8))
    assert dataset.lengths('train').sum() == len(tape) - 13
    padded = data_tape(dataset, history)
    places = set()
    for start in range(len(tape) - 33):
        between = tape[max(np.flatnonzero(tape[:start, -1]), default=0) + 1:start]
        places.add((padded[start:start + history + 34].tobytes(), len(between), grid.steps(between)))
    seen = set()
    for seed in range(60):
        windows = dataset.batch(50, 33, 0, np.random.default_rng(seed), history)
        assert windows.frames.shape == (50, 34, grid.V) and windows.past.shape == (50, history, grid.V)
        assert [part.dtype for part in windows] == 2 * [torch.uint8] + 2 * [torch.int64] + [torch.int32]
        whole = torch.cat((windows.past, windows.frames), dim=1).numpy()
        seen |= {(w.tobytes(), *place) for w, *place in zip(whole, windows.age.tolist(), windows.time.tolist())}
    assert seen <= places and len(seen) > .6 * len(places)
    # the longest one, and none that is longer
    windows = dataset.batch(1, len(tape) - 1, 0, np.random.default_rng(0), 0)
    assert (windows.frames[0].numpy() == tape).all() and (windows.age, windows.time) == (0, 0)
    with pytest.raises(data.UserError, match=f'--block_size={len(tape) - 1} or less'):
        dataset.batch(1, len(tape), 0, np.random.default_rng(0))


@data_for_each()
def test_data_transposition_moves_a_window_by_one_interval_on_the_keyboard(grid):
    low, high = [data.Song('', np.array([[key, i, i + 1.5] for i, key in enumerate(8 * keys)]), text='CDEF' * 20)
                 for keys in ([0, 5, 9], [87, 80, 84])]
    dataset = data.Dataset({split: [low, high] for split in data.SPLITS}, '', grid)
    # text stays as it is
    keys = {89: 88, 97: 0}.get(grid.V, 176)
    shifts = set()
    for seed in range(100):
        # a seed is a seed, and the same places with it
        one, two, still = (dataset.batch(4, 60, most, np.random.default_rng(seed), 20) for most in (6, 6, 0))
        assert all(map(torch.equal, one, two))
        for moved, window in zip(*(torch.cat((x.past, x.frames), 1).numpy() for x in (one, still))):
            assert (moved[:, keys:] == window[:, keys:]).all()
            where, after = (x[:, :keys].reshape(-1, 88).nonzero() for x in (window, moved))
            # no note has been lost, or has come in on the other side
            shift, = set(after[1] - where[1]) or {0}
            assert np.array_equal(after[0], where[0])
            shifts.add(shift)
    assert shifts == (set(range(-6, 7)) if keys else {0})


def data_phrase(seed, end, beats=12):
    """A melody over a held chord, two notes a beat, that ends on a key."""
    keys = np.random.default_rng(seed).integers(45, 60, 2 * beats)
    keys[-1] = end
    onset = np.arange(2 * beats) / 2
    melody = np.stack((keys, onset, onset + 0.5), axis=1)
    # the chord is struck anew under the last note, which is no melody
    chord = [[27, 0, beats - 0.5], [27, beats - 0.5, beats]]
    return np.concatenate((melody, chord))


def data_song(*phrases, beats=12):
    notes = np.concatenate([phrase + [0, beats * i, beats * i] for i, phrase in enumerate(phrases)])
    return data.Song('', notes[np.lexsort((notes[:, 0], notes[:, 1]))])


DATA_PHRASES = dict(A=data_phrase(1, 46), B=data_phrase(2, 51), C=data_phrase(3, 48),
                    D=data_phrase(2, 39))       # end on G, C, A, C; B and D are alike but for their last note


@pytest.mark.parametrize('phrases, parts, homes', [
    ('A', [(0, 48)], {}), ('B', [(0, 48)], {46: 1}), ('CC', [(0, 48), (12, 48)], {46: 10, 94: 10}),
    ('AABB', [(0, 48), (12, 48), (0, 48), (12, 48)], {142: 1, 190: 1}),
    # the nearest repeat counts, and a part that goes on is one part
    ('ABAA', [(0, 96), (24, 48), (12, 48)], {94: 1}), ('ABAB', [(0, 96), (24, 96)], {94: 1, 190: 1}),
    # 60 beats are not too far, 72 are
    ('ABCBCA', [(0, 144), (24, 96), (60, 48)], {142: 10, 238: 10}),
    # what comes home at the end of a part comes home where it stood before, too
    ('ABCBCBA', [(0, 144), (24, 144), (0, 48)], {94: 1, 142: 10, 190: 1, 286: 1}),
    # with another last note, which in the midst of a repeat brings nothing home
    ('BAD', [(0, 96), (24, 46), (0, 2)], {46: 1, 142: 1}), ('BADA', [(0, 96), (24, 46), (0, 2), (24, 48)], {})])
def test_data_form(phrases, parts, homes):
    song = data_song(*(DATA_PHRASES[name] for name in phrases))._replace(metre='3/4', pickup=1.0)
    frames = data.PianoRoll().encode(song)
    # the key of the chord is held, and now and then struck
    chords = data.frame_names(np.eye(177, dtype=int)[[88 + 27, 27]]).tolist()
    # the last note of each phrase is an eighth
    form = dict(metre='3/4', sixteenths=False, bar=12, pickup=4, parts=parts,
                homes=[(first, 2, home) for first, home in homes.items()], chords=chords)
    # what a player is late by does not matter
    for late in (0, 0.1):
        found = data.find_form(song._replace(notes=song.notes + [0, late, late]), frames, data.PianoRoll(), True)
        assert found == form
    # elsewhere the tonic is not known
    assert data.find_form(song, frames, data.PianoRoll(), False) == form | dict(homes=[])
    # numbers and text that a checkpoint holds
    json.dumps(found)
    rows = data.make_plan(form).tolist()
    assert len(rows) == len(frames) + 1 == data.form_length(form) + 1 and rows[-1] == [1, 0, 0, 0, 0, 0]
    bar = 4
    told = [homes.get(t, homes.get(t - 1, 0)) for t in range(len(frames))]
    for back, length in parts:
        for left in range(length, 0, -1):
            wanted = [1 + back, left, len(rows) - 1, bar, 3, told.pop(0)]
            assert rows.pop(0) == wanted
            bar = bar - 1 or 12


def test_data_form_tells_of_sixteenths():
    for metre, number in (('4/4', 1), ('3/4', 3), ('9/8', 9), ('5/4', None)):
        song = data.Song('', compare_line(range(40, 60)), metre=metre, pickup=0.0)
        for late, sixteenths in ((0.5, False), (0.25, True)):
            # one note of twenty is not enough, two are
            for count in (1, 2):
                song.notes[:count, 1] = np.arange(count) + late
                form = data.find_form(song, np.zeros((80, 177), dtype=np.uint8), data.PianoRoll(), True)
                assert form['sixteenths'] == (sixteenths and count == 2)
                told = data.make_plan(form)[0, 4]
                assert told == (number + form['sixteenths'] if number else 0)


def test_data_form_of_notes_that_fall_on_one_step():
    song = data.Song('', np.array([[51, 0, 0.2], [51, 0.2, 1]]), metre='4/4', pickup=0.0)
    roll = data.PianoRoll(1)
    assert data.find_form(song, roll.encode(song), roll, True)['homes'] == [(0, 1, 1)]


@pytest.mark.parametrize('metre, pickup, beat, lines', [
    # a bar of four and a half frames, a rare metre, and bar lines between frames
    ('9/8', 0.0, 1, (0, 5, 9, 14, 18)), ('9/8', 1.5, 3, (5, 18)), ('5/8', 0.0, 4, (0, 10, 20)),
    ('4/4', 0.125, 4, (1, 17))])
def test_data_form_tells_where_bar_lines_are(metre, pickup, beat, lines):
    song = data.Song('', np.zeros((0, 3)), metre=metre, pickup=pickup)
    form = data.find_form(song, np.zeros((lines[-1], 177), dtype=np.uint8), data.PianoRoll(beat), True)
    rows = data.make_plan(form)[:-1]
    assert all(row[3] == min(line for line in lines if line > t) - t for t, row in enumerate(rows))
    assert (rows[:, 4] > 0).all() == (metre in notation.BARS)


def test_data_form_of_what_has_no_melody():
    song = data.Song('', np.zeros((0, 3)), metre='5/4', pickup=0.0)
    form = data.find_form(song, np.zeros((6, 177), dtype=np.uint8), data.PianoRoll(1), True)
    assert form == dict(metre='5/4', sixteenths=False, bar=5, pickup=0, parts=[(0, 6)], homes=[], chords=[])
    assert data.make_plan(form)[:, 3:].tolist() == [[bar, 0, 0] for bar in (5, 4, 3, 2, 1, 5, 0)]


def test_data_form_has_the_most_common_chords():
    # below a held note each key lasts one beat, and the first 32 come again
    keys = [*range(40), *range(32)]
    notes = [[60, 0, len(keys)]] + [[key, onset, onset + 1] for onset, key in enumerate(keys)]
    song = data.Song('', np.array(notes, dtype=float), metre='4/4', pickup=0.0)
    roll = data.PianoRoll(1)
    form = data.find_form(song, roll.encode(song), roll, True)
    assert set(form['chords']) == set(data.frame_names(np.eye(177, dtype=int)[:32]).tolist())


def test_data_repeats_of_less_than_8_beats_are_no_parts():
    roll = data.PianoRoll()
    for beats, parts in ((7, 1), (8, 2)):
        song = data_song(*2 * [data_phrase(1, 46, beats)], beats=beats)
        assert len(data.find_form(song, roll.encode(song), roll, True)['parts']) == parts


def test_data_windows_are_told_the_form_of_their_song():
    roll = data.PianoRoll()
    songs = [data_song(*(DATA_PHRASES[name] for name in phrases)) for phrases in ('AAB', 'BA')]
    dataset = data.Dataset({split: songs for split in data.SPLITS}, '', roll, common_key=True)
    rows = np.concatenate([[data.END]] + [data.make_plan(form) for form in dataset.forms])
    assert len(dataset.forms[0]['parts']) == 3 and len(rows) == len(dataset.packed['train'])
    # the names of all windows of 34 frames, by the interval by which the tape was moved
    windows = {}
    for move in range(-9, 10):
        tape = dataset.frames('train', 0, len(rows))
        roll.transpose(tape, move)
        windows[move] = np.lib.stride_tricks.sliding_window_view(data.frame_names(tape), 34)
    told = 0
    for seed in range(50):
        drawn = dataset.batch(4, 33, 9, np.random.default_rng(seed), told=0.5)
        for frames, plan in zip(drawn.frames.numpy(), drawn.plan.numpy()):
            told += plan.any()
            wanted = [0 * plan]
            for move, names in windows.items():
                for i in np.flatnonzero((names == data.frame_names(frames)).all(1)):
                    wanted.append(rows[i + 1:i + 34].copy())
                    home = wanted[-1][:, 5]
                    home[home == 1] = 1 + move % 12
            assert len(wanted) > 1 and any((plan == one).all() for one in wanted)
        assert not dataset.batch(4, 33, 0, np.random.default_rng(seed)).plan.any()
    assert 70 < told < 130


@pytest.mark.parametrize('common_key, still', [(True, 7 / 13), (False, 1 / 13)])
def test_data_half_of_the_windows_stay_in_a_common_key(common_key, still):
    songs = {split: [data_song(data_phrase(1, 46))] for split in data.SPLITS}
    dataset = data.Dataset(songs, '', data.PianoRoll(), common_key)
    shifts = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        frames = dataset.batch(8, len(dataset.packed['train']) - 1, 6, rng).frames.numpy()
        # the chord is the lowest key
        shifts += (frames[:, 1, :88].argmax(1) - 27).tolist()
    assert set(shifts) == set(range(-6, 7))
    # one in 13 of those that may move does not
    assert shifts.count(0) / len(shifts) == pytest.approx(still, abs=0.06)


@data_for_each()
def test_data_whole_songs_once_each_padded_on_the_right(grid):
    dataset = data_set(grid)
    todo = {grid.encode(song).tobytes(): song.notes[:, 2].max() for song in dataset.songs['train']}
    for frames, lengths, beats in dataset.whole_songs('train', 5):
        assert (frames.dtype, lengths.dtype, beats.dtype) == (torch.uint8, torch.int64, torch.float64)
        assert frames.shape[1] == lengths.max() + 2 and len(frames) == len(lengths) == len(beats) <= 5
        for row, n, beat in zip(frames.numpy(), lengths, beats):
            assert row[[0, n + 1]].sum() == row[[0, n + 1], -1].sum() == 2 and not row[n + 2:].any()
            assert todo.pop(row[1:1 + n].tobytes()) == beat
    assert not todo
    lengths = np.sort(dataset.lengths('train'))
    for every in (1, 2, 5, 13):
        read = [n for _, some, _ in dataset.whole_songs('train', 2, every) for n in some.tolist()]
        assert read == lengths[min(every, 12) // 2::every].tolist() and len(read) >= 1


# ---------------------------------------------------------------------------------------------------------------------
# data.py: load

def data_midi(path, key=39, beats=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    notation.write_midi(np.array([[key, 0, beats]]), path)
    return path.read_bytes()


def data_folder(path, names):
    for i, name in enumerate(names):
        data_midi(path / name, 30 + i % 40, 1 + i)
    return path


def data_zip(path, files):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def data_names(dataset):
    return {split: sorted(song.name for song in songs) for split, songs in dataset.songs.items()}


def data_same(one, two):
    """Do two datasets hold the same songs?"""
    return all(a._replace(notes=None) == b._replace(notes=None) and np.array_equal(a.notes, b.notes)
               for split in data.SPLITS for a, b in zip(one.songs[split], two.songs[split], strict=True))


def test_data_load_splits_by_folder(tmp_path):
    names = ['x/Train/a.mid', 'x/train/b.MID', 'x/VALIDATION/c.midi', 'x/Test/sub/d.mid', 'e.mid']
    lines = []
    dataset = data.load(data_folder(tmp_path / 'music', names), log=lines.append)
    assert data_names(dataset) == dict(train=sorted([names[0], names[1], names[4]]), valid=[names[2]], test=[names[3]])
    assert '(5 songs)' in dataset.source and str(tmp_path / 'music') in dataset.source
    assert len(lines) == 1 and '3 songs train, 1 songs valid, 1 songs test' in lines[0]
    names = [f'train/{i}.mid' for i in range(30)] + ['test/a.mid']
    dataset = data.load(data_folder(tmp_path / 'two', names), log=lines.append)
    # no valid folder: a tenth of train
    assert [len(dataset.songs[split]) for split in data.SPLITS] == [27, 3, 1] and 'no songs for valid: 3' in lines[-1]


def test_data_load_splits_by_a_stable_rule(tmp_path):
    names = [f'{i}.mid' for i in range(100)]
    one = data_names(data.load(data_folder(tmp_path / 'one', names)))
    assert sorted(sum(one.values(), [])) == sorted(names) and 65 <= len(one['train']) <= 95
    # another order, and one more song
    two = data_names(data.load(data_folder(tmp_path / 'two', ['more.mid', *names[::-1]])))
    assert all(set(one[split]) <= set(two[split]) for split in data.SPLITS)
    # the same music packed
    packed = {f'top/{name}': (tmp_path / 'one' / name).read_bytes() for name in names}
    three = data_names(data.load(data_zip(tmp_path / 'a.zip', packed)))
    assert {split: sorted(f'top/{name}' for name in one[split]) for split in one} == three
    for n in (3, 4, 10):
        dataset = data.load(data_folder(tmp_path / f'few{n}', names[:n]))
        assert all(dataset.songs.values()) and sum(map(len, dataset.songs.values())) == n


def test_data_load_one_file_and_options(tmp_path, capsys):
    data_midi(tmp_path / 'a.mid')
    lines = []
    dataset = data.load(str(tmp_path / 'a.mid'), log=lines.append)
    assert data_names(dataset) == {split: ['a.mid'] for split in data.SPLITS} and 'same' in lines[0] and len(lines) == 1
    tunes = (('One', 'G', 'G'), ('Two', 'F', 'F'), ('Three', 'Dm', 'C,,,,D'))
    tunes = [f'X:1\nT:{name}\nL:1/4\nK:{key}\n{music}\n' for name, key, music in tunes]
    (tmp_path / 'b.abc').write_text('\n'.join(tunes))
    dataset = data.load(tmp_path / 'b.abc', data.PianoRoll(2, onsets=False), common_key=True, log=lines.append)
    keys = {song.name: int(song.notes[0, 0]) + 21 for songs in dataset.songs.values() for song in songs}
    assert keys == dict(One=72, Two=60, Three=57) and '1 notes that a piano does not have' in lines[1]
    assert dataset.representation.settings == dict(name='piano_roll', steps_per_beat=2, onsets=False)
    assert sum(dataset.lengths(split).sum() for split in data.SPLITS) == 2 + 2 + 4
    # a text is written anew, in the key to which its tune was moved
    abc = data.AbcText()
    for song in sum(data.load(tmp_path / 'b.abc', abc, common_key=True, log=lines.append).songs.values(), []):
        again = abc.to_song(abc.encode(song))
        assert again.notes[:, 0].tolist() == song.notes[:, 0].tolist() and again.sharps == 0
    data.tell_what_is_left_out([data.Song('', song.notes, silence=silence) for silence in (0.5, 3, 4)], lines.append)
    assert '2 songs end in silence, 7 beats' in lines[-1] and capsys.readouterr().err == ''


def test_data_load_common_key_where_all_files_tell_theirs(tmp_path):
    for i, sharps in enumerate((1, 1, 0)):
        notation.write_midi(np.array([[40, 0, 1], [47, 1, 2]]), tmp_path / f'{i}.mid', sharps=sharps)

    def lowest(*options):
        dataset = data.load(tmp_path, *options)
        assert dataset.sharps == 1
        return dataset.common_key, sorted(song.notes[0, 0] for songs in dataset.songs.values() for song in songs)

    assert lowest() == lowest(data.Events()) == (True, [40, 45, 45])
    assert lowest(None, False) == lowest(data.AbcText()) == (False, [40, 40, 40])
    notation.write_midi(np.array([[40, 0, 1]]), tmp_path / 'untold.mid')
    assert lowest() == (False, [40, 40, 40, 40])


def test_data_load_tells_what_has_no_place_in_abc_text(tmp_path):
    # a bass note, then the chord above it
    rows = np.array(rows_of('36,72:0-1 48,52,55,72:1-2')) - [21, 0, 0]
    for i in range(3):
        notation.write_midi(rows, tmp_path / f'{i}.mid')
    lines = []
    data.load(tmp_path, data.AbcText(), log=lines.append)
    assert lines[-1].startswith('3 notes have no place in ABC text'), lines


def test_data_load_skips_and_names_what_is_corrupt(tmp_path, capfd):
    names = ['1.mid', '2.mid', os.fsdecode(b'\xe9t\xe9.mid'), '.hidden.mid', '__MACOSX/x.mid', '.git/a.mid']
    path = data_folder(tmp_path / 'a', names)
    (path / 'bad.mid').write_bytes(b'MThd')
    (path / 'bad.abc').write_text('nothing')
    notation.write_midi(np.zeros((0, 3)), path / 'red\x1b[31m\n.mid')
    data_midi(path / 'forged.mid', beats=30_000)
    (path / 'readme.txt').write_text('not music')
    os.mkfifo(path / 'pipe.mid')
    (path / 'half.abc').write_text('X:1\nT:good\nK:C\nC\n\nX:2\nT:worse\nK:C\n')
    dataset = data.load(path)
    err = capfd.readouterr().err
    assert sum(data_names(dataset).values(), []).count('good') == 1 and sum(map(len, dataset.songs.values())) == 4
    assert err.count('\n') == 5 and all(line.startswith('skipped: ') for line in err.splitlines())
    assert all(name in err for name in ('bad.mid', 'bad.abc', 'red?[31m?.mid', 'forged.mid', 'worse'))
    for i in range(7):
        (path / f'bad{i}.mid').write_bytes(b'')
    data.load(path)
    # five by name, and how many more
    err = capfd.readouterr().err
    assert err.count('\n') == 6 and err.endswith('skipped: 7 more\n')


def test_data_load_errors(tmp_path):
    good = data_midi(tmp_path / 'good.mid')
    cut = data_zip(tmp_path / 'x.zip', {'a.mid': good}).read_bytes()[:-30]
    contents = {
        'cut.mid': (good[:-9], 'midst'), 'zero.mid': (b'', ''), 'zero.abc': (b'', 'X:'), 'a.txt': (good, 'no music'),
        'zero.zip': (b'', 'not a whole zip'), 'cut.zip': (cut, 'not a whole zip'),
        'zero.npz': (b'', 'data.py FOLDER OUT.npz'), 'voices.abc': (b'X:1\nK:C\nV:1\nC D\nV:2\nC', 'voices'),
        'none/a.txt': (b'', '')}
    (tmp_path / 'none').mkdir()
    says = {'missing': 'there is no', 'missing.npz': 'No such file', 'none': 'no music', 'none.zip': 'no music',
            'forged.mid': '24,999 beats'}
    for name, (content, why) in contents.items():
        (tmp_path / name).write_bytes(content)
        says[name] = why
    data_midi(tmp_path / 'forged.mid', beats=25_000)
    data_zip(tmp_path / 'none.zip', {'a.txt': b''})
    for name in ('fifo.mid', 'fifo.zip', 'fifo.npz'):
        os.mkfifo(tmp_path / name)
        says[name] = 'no plain file'
    for name, why in says.items():
        with pytest.raises(data.UserError, match=f'{re.escape(name)}.*: ') as e:
            data.load(tmp_path / name)
        assert why in str(e.value) and '\n' not in str(e.value)
    for name in ('', 'x' * 300):
        with pytest.raises(data.UserError, match='there is no'):
            data.load(name)


def test_data_load_hostile_zips(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, 'MAX_FILE', 1 << 20)
    good = data_midi(tmp_path / 'good.mid')
    climbing = ('../a.mid', 'x/../../a.mid', '/etc/a.mid', '..\\a.mid', 'C:\\a.mid', '../a.txt')
    path = data_zip(tmp_path / 'a.zip', dict.fromkeys(('good.mid', *climbing), good))
    assert 'good.mid' in sum(data_names(data.load(path)).values(), [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.zip', 'good.mid'] and not Path('/etc/a.mid').exists()
    data_zip(path, {'good.mid': good, 'bomb.mid': bytes(20 << 20), 'huge.txt': bytes(20 << 20)})
    # the same path with other music in it is read anew
    assert data_names(data.load(path))['train'] == ['good.mid'] and 'bomb.mid is larger' in capsys.readouterr().err
    content = bytearray(data_zip(path, {'good.mid': good, 'other.mid': good}).read_bytes())
    # the packed bytes of the first member
    content[30 + len('good.mid') + 5] ^= 255
    path.write_bytes(content)
    assert data_names(data.load(path))['train'] == ['other.mid'] and 'good.mid' in capsys.readouterr().err
    (tmp_path / 'large.mid').write_bytes(bytes(2 << 20))
    with pytest.raises(data.UserError, match='large.mid is larger'):
        data.load(tmp_path / 'large.mid')


def test_data_load_tells_of_zips_inside(tmp_path):
    path = data_folder(tmp_path / 'a', ['1.mid', '2.mid', '3.mid'])
    (path / 'inner.zip').touch()
    data_zip(tmp_path / 'outer.zip', {p.name: p.read_bytes() for p in path.iterdir()})
    for music in (path, tmp_path / 'outer.zip'):
        lines = []
        assert '(3 songs)' in data.load(music, log=lines.append).source
        assert '1 zip files inside' in lines[0] and 'inner.zip' in lines[0]


def test_data_load_many_files_are_read_by_other_processes(tmp_path, monkeypatch, capsys):
    music = data_folder(tmp_path / 'music', [f'{i % 3}/{i}.mid' for i in range(20)])
    (music / 'bad.mid').write_bytes(b'MThd')
    path = data_zip(tmp_path / 'a.zip', {str(p.relative_to(music)): p.read_bytes() for p in music.rglob('*.mid')})
    here = data.load(path)
    monkeypatch.setattr(data, 'MANY', 20)
    monkeypatch.setattr(data, 'map', None, raising=False)
    there = data.load(path)
    assert data_same(here, there) and here.source == there.source and capsys.readouterr().err.count('bad.mid') == 2


class PickledCode:
    def __reduce__(self):
        return os.mkdir, ('it_ran_code',)


def test_data_npz_holds_what_was_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = data_folder(tmp_path / 'music', ['train/1.mid', 'valid/2.mid', 'test/3.mid', os.fsdecode(b'train/\xe9.mid')])
    (path / 'bad.mid').write_bytes(b'MThd')
    tunes = 'X:1\nT:One\nM:6/8\nQ:1/4=90\nK:Gm\nG|B2G D2G|\n\nX:2\nT:Two\nK:C\nC,,,,D2\n\nX:3\nK:C\n'
    (path / 'train' / 'a.abc').write_text(tunes)
    out = tmp_path / 'music.npz'
    monkeypatch.setattr(sys, 'argv', ['data.py', 'music', 'nowhere/music.npz'])
    with pytest.raises(UserError, match='there is no folder nowhere'):
        data.main()
    # the folder where one stands is a folder, too
    monkeypatch.chdir(path)
    monkeypatch.setattr(sys, 'argv', ['data.py', '.', str(out)])
    data.main()
    monkeypatch.chdir(tmp_path)
    printed, skipped = capsys.readouterr()
    assert printed == f'{out}: 6 songs, 10 notes, 2 skipped\n'
    lines = []
    one = data.load(path, log=lines.append)
    assert skipped == capsys.readouterr().err
    two = data.load(out, log=lines.append)
    assert data_same(one, two) and f'{out} (6 songs)' in two.source and lines[:2] == lines[2:]
    assert skipped == capsys.readouterr().err and skipped.count('\n') == 2
    content = out.read_bytes()
    # a file that is good is not replaced by an empty one
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none' / 'bad.mid').write_bytes(b'MThd')
    monkeypatch.setattr(sys, 'argv', ['data.py', 'none', str(out)])
    with pytest.raises(UserError, match='bad.mid'):
        data.main()
    assert out.read_bytes() == content
    np.savez(out, table=np.array([PickledCode()]), notes=np.zeros((1, 3)))
    flipped = content[:200] + bytes([content[200] ^ 1]) + content[201:]
    for wrong in (content[:-1], flipped, bytes(len(content)), out.read_bytes()):
        out.write_bytes(wrong)
        with pytest.raises(data.UserError, match='music.npz is not what python data.py'):
            data.load(out)
    assert not os.path.exists('it_ran_code')


# ---------------------------------------------------------------------------------------------------------------------
# data.py: Nottingham

class DataSlow(io.BytesIO):
    """A download that takes 5 s in which no timeout of a socket would strike."""

    def read1(self, size):
        if self.tell() < 25:
            size = 1
            time.sleep(.2)
        return super().read1(size)


@pytest.fixture
def data_nottingham(tmp_path, monkeypatch):
    """A small archive in the place of Nottingham, a folder to keep it in, and a way to set from where it is to come."""
    names = [f'{split}/{i}.mid' for split in data.SPLITS for i in range(4)]
    music = data_folder(tmp_path / 'music', names)
    files = {name: (music / name).read_bytes() for name in names}
    good = data_zip(tmp_path / 'good', {f'repo-1/notebooks/Nottingham/{name}': files[name] for name in names} |
                    {'repo-1/notebooks/Other/train/0.mid': b'other', 'repo-1/README': b''}).read_bytes()
    data_zip(tmp_path / 'wrong', {f'Nottingham/{name}': files[name] + b'!' for name in names})
    (tmp_path / 'truncated').write_bytes(good[:len(good) // 2])
    (tmp_path / 'page').write_bytes(b'<html>')
    home = tmp_path / 'home'
    home.mkdir()
    (home / 'tunes.abc').write_text(''.join(f'X:{i}\nT:Tune {i}\nK:C\nCDEF\n\n' for i in range(9)))
    digest = hashlib.sha256(b''.join(name.encode() + b'\0' + files[name] for name in sorted(files))).hexdigest()
    settings = dict(NOTTINGHAM=home / 'nottingham.zip', TUNES=home / 'tunes.abc', NOTTINGHAM_DIGEST=digest, TIMEOUT=1)
    for name, value in settings.items():
        monkeypatch.setattr(data, name, value)
    monkeypatch.setenv('no_proxy', '*')
    urlopen = data.urllib.request.urlopen
    monkeypatch.setattr(data.urllib.request, 'urlopen', lambda url, timeout:
                        DataSlow(good) if 'slow' in url else urlopen(url, timeout=timeout))
    # takes calls, and does not answer
    silent = socket.create_server(('127.0.0.1', 0))
    places = dict(silent=f'http://127.0.0.1:{silent.getsockname()[1]}')

    def serve(*kinds):
        urls = [places.get(kind, f'file://localhost{tmp_path}/{kind}') for kind in kinds]
        monkeypatch.setattr(data, 'NOTTINGHAM_URLS', urls)
        return home, files

    yield serve
    silent.close()


def test_data_nottingham_is_downloaded_and_kept(data_nottingham):
    home, files = data_nottingham('wrong', 'truncated', 'silent', 'slow', 'missing', 'page', 'good')
    lines = []
    dataset = data.load(log=lines.append)
    assert sorted(sum(data_names(dataset).values(), [])) == sorted(f'Nottingham/{name}' for name in files)
    assert all(f'/{split}/' in song.name for split, songs in dataset.songs.items() for song in songs)
    assert dataset.source == 'Nottingham (12 songs)'
    assert [line.startswith('downloading Nottingham from ') for line in lines] == 7 * [True] + [False]
    with zipfile.ZipFile(home / 'nottingham.zip') as archive:
        assert {name.partition('/')[2]: archive.read(name) for name in archive.namelist()} == files
    # the second time there is no need for a network
    data_nottingham('missing')
    again = data.load(log=lines.append)
    assert data_same(again, dataset) and len(lines) == 9


def test_data_nottingham_that_cannot_be_had_is_the_tune_book(data_nottingham, monkeypatch):
    home, files = data_nottingham('wrong', 'missing')
    lines = []
    dataset = data.load(log=lines.append)
    assert 'tunes.abc' in dataset.source and '(9 songs)' in dataset.source
    assert sum('tunes.abc' in line for line in lines) == 1 and os.listdir(home) == ['tunes.abc']
    # a wrong archive is replaced
    data_zip(home / 'nottingham.zip', {'Nottingham/train/0.mid': files['train/0.mid']})
    data_nottingham('good')
    for downloads in (1, 0):
        lines = []
        assert '(12 songs)' in data.load(log=lines.append).source and len(lines) == 1 + downloads
    monkeypatch.setattr(data, 'NOTTINGHAM', home / 'missing' / 'nottingham.zip')
    assert 'tunes.abc' in data.load(log=lines.append).source and any('there is no folder' in line for line in lines)
    (home / 'tunes.abc').unlink()
    data_nottingham('missing')
    with pytest.raises(data.UserError, match='neither Nottingham .*No such file.*tunes.abc'):
        data.load(log=lines.append)


def test_data_nottingham_digest_is_the_published_one():
    assert data.NOTTINGHAM_DIGEST == 'a107e20c1b880d97cb1d7c324cb185400313e6f3ffbf20e4b5d56bd3e604ea7e'
    # and the local archive, where there is one, has it
    if data.NOTTINGHAM.exists():
        assert len(data.nottingham_files(data.NOTTINGHAM.read_bytes())) == 1037


# ---------------------------------------------------------------------------------------------------------------------
# wkv.py and wkv_cuda.cu

WKV_DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available()


@pytest.fixture(params=WKV_DEVICES)
def wkv_device(request):
    """A device with its kernel: where there is a compiler, it has to work."""
    if not shutil.which(dict(cpu='c++', cuda='nvcc')[request.param]):
        pytest.skip('no compiler')
    assert wkv.has_kernel(torch.device(request.param)), wkv.describe(request.param)
    return request.param


def wkv_inputs(B, T, C, scale=1, w=None, dtype=torch.float32, device='cpu', seed=0):
    """w, u, k, v and the gradient of y; the w of the channels run from 1e-4 to 50."""
    make = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-4, math.log10(50), C)[torch.randperm(C, generator=make)]
    w = spread if w is None else torch.full((C,), w)
    u = torch.randn(C, generator=make)
    k, v, g = torch.randn(3, B, T, C, generator=make)
    return [w.to(device), u.to(device), *(x.to(device, dtype) for x in (scale * k, scale * v, g))]


def wkv_random_state(B, C, device='cpu'):
    make = torch.Generator().manual_seed(1)
    a, b, p = torch.randn(3, B, C, generator=make)
    return torch.stack((a, 1 + b.abs(), 5 * p), 1).to(device)


def wkv_sum(w, u, k, v, g, state=None):
    """y and the gradients of sum(g y) by w, u, k, v, as sums written from the formula: with P[s, t] the weight of
    frame t in y_s, the gradient of its exponent is g_s P[s, t] sum_j P[s, j] (v_t - v_j)."""
    w, u, k, v, g = (x.detach().cpu().double() for x in (w, u, k, v, g))
    if state is not None:
        # as one more frame before the first
        a, b, p = state.cpu().double().unbind(1)
        k = torch.cat(((p + b.log())[:, None], k), 1)
        v = torch.cat(((a / b)[:, None], v), 1)
    T = k.shape[1]
    before = T - g.shape[1]
    # of frame t at s: (1, S, T, 1)
    age = (torch.arange(before, T)[:, None] - 1 - torch.arange(T))[None, :, :, None]
    # (B, S, T, C)
    exponent = torch.where(age < 0, (k + u)[:, None], k[:, None] - age * w)
    P = torch.softmax(exponent.masked_fill(age < -1, -torch.inf), 2)
    g = g[:, :, None]
    d = g * P * torch.einsum('bsjc,btjc->bstc', P, v[:, :, None] - v[:, None])
    dw = -(d * age.clamp_min(0)).sum((0, 1, 2))
    du = (d * (age == -1)).sum((0, 1, 2))
    return (P * v[:, None]).sum(2), dw, du, d.sum(1)[:, before:], (P * g).sum(1)[:, before:]


def wkv_run(w, u, k, v, g, state=None, backend=None):
    """y, the gradients of w, u, k, v, and the state."""
    leaves = [x.detach().clone().requires_grad_() for x in (w, u, k, v)]
    y, state = wkv.wkv(*leaves, state, backend)
    assert not state.requires_grad
    return [y.detach(), *torch.autograd.grad(y, leaves, g), state]


def wkv_check(got, want, forward=1e-5, gradient=1e-4):
    """|x - want| / |want| of y and of all that follows; less than 1e-30 counts as the zero it is in float32."""
    for x, y, bound in zip(got, want, [forward] + 5 * [gradient]):
        y = y.cpu().double()
        assert ((x.cpu().double() - y).norm() / y.norm().clamp_min(1e-30)).item() <= bound


@pytest.mark.parametrize('scale', [1, 30])
@pytest.mark.parametrize('T', [1, 2, 31, 32, 33, 100])
def test_wkv_kernel_is_the_sum(wkv_device, T, scale):
    for C, w in itertools.product((1, 7, 64), (None, 1e-4, 1.0, 50.0)):
        inputs = wkv_inputs(2, T, C, scale, w, device=wkv_device, seed=C)
        for state in (None, wkv_random_state(2, C, wkv_device)):
            wkv_check(wkv_run(*inputs, state, wkv_device)[:5], wkv_sum(*inputs, state))


@pytest.mark.parametrize('T, C, scale', [(1000, 512, 1), (4096, 7, 1), (4096, 64, 30)])
def test_wkv_kernel_over_long_times(wkv_device, T, C, scale):
    inputs = wkv_inputs(1, T, C, scale, device=wkv_device)
    want = wkv_run(*(x.double() for x in inputs), None, 'torch')
    wkv_check(wkv_run(*inputs, None, wkv_device)[:5], want[:5])


@pytest.mark.parametrize('T, scale', [(1, 1), (2, 1), (33, 1), (33, 4)])
def test_wkv_torch_is_the_sum(T, scale):
    inputs = wkv_inputs(2, T, 7, scale)
    for state in (None, wkv_random_state(2, 7)):
        want = wkv_sum(*inputs, state)
        wkv_check(wkv_run(*inputs, state, 'torch')[:5], want)
        wkv_check(wkv_run(*(x.double() for x in inputs), state, 'torch')[:5], want, 1e-12, 1e-10)


@pytest.mark.parametrize('segments, warps', [(2, 1), (3, 1), (16, 1), (1, 2), (1, 16), (4, 16), (16, 16)])
def test_wkv_parts_of_time_give_the_same(wkv_device, monkeypatch, segments, warps):
    if wkv_device == 'cpu' and warps > 1:
        pytest.skip('a CPU has no warps')
    w, u, k, v, g = wkv_inputs(2, 333, 33, 10, device=wkv_device)
    state = wkv_random_state(2, 33, wkv_device)
    results = []
    for split in (1, 1), (segments, warps):
        monkeypatch.setattr(wkv, 'split_time', lambda k: split)
        y, last, saved = wkv.launch_forward(w, u, k, v, state)
        # nothing of size (B, T, C) is kept
        assert saved.shape == (2, -(-333 // wkv.CHUNK[wkv_device]), 3, 33)
        results.append([y, last[:, 2], *wkv.launch_backward(w, u, k, v, saved, g)])
    wkv_check(*results[::-1], 1e-6, 1e-5)


@pytest.mark.parametrize('T, pieces, backend', [
    (100, [1] * 100, 'torch'), (100, [7, 32, 33, 28], 'torch'),
    (100, [1] * 100, None), (100, [7, 32, 33, 28], None), (200_000, [1000] * 200, None)])
def test_wkv_state_continues_a_tune(wkv_device, T, pieces, backend):
    w, u, k, v, _ = wkv_inputs(3, T, 20, 5, device=wkv_device)
    want, last = wkv.wkv(w, u, k, v, backend=backend)
    state = None
    y = []
    for k_piece, v_piece in zip(k.split(pieces, 1), v.split(pieces, 1)):
        with torch.no_grad():
            out, state = wkv.wkv(w, u, k_piece, v_piece, state, backend)
        y.append(out)
    wkv_check([torch.cat(y, 1), state[:, 0] / state[:, 1]], [want, last[:, 0] / last[:, 1]], 1e-5, 1e-5)
    assert (state[:, 1].log() + state[:, 2] - last[:, 1].log() - last[:, 2]).abs().max() < 1e-3
    # the back ends read each other's state
    _, state = wkv.wkv(w, u, k[:, :50], v[:, :50], backend=backend)
    y, _ = wkv.wkv(w, u, k[:, 50:100], v[:, 50:100], state, 'torch')
    wkv_check([y], [want[:, 50:100]])


def test_wkv_bfloat16(wkv_device):
    inputs = wkv_inputs(2, 70, 19, dtype=torch.bfloat16, device=wkv_device)
    got = wkv_run(*inputs, None, wkv_device)
    want = wkv_sum(*inputs)
    assert [x.dtype for x in got[:3]] == [torch.bfloat16, torch.float32, torch.float32]
    # half a unit of bfloat16's last place is 2e-3; sums stay in float32
    wkv_check(got[:5], want, 3e-3, 3e-3)
    wkv_check(got[1:3], want[1:3], 1e-4)
    # rounded once, to the nearest
    exact = wkv_run(*(x.float() for x in inputs), None, wkv_device)
    assert (got[0] == exact[0].bfloat16()).float().mean() > 0.99


def test_wkv_strides_and_nan(wkv_device):
    w, u, k, v, g = wkv_inputs(2, 40, 12, device=wkv_device)
    want = wkv_run(w, u, k, v, g)
    got = wkv_run(w.repeat_interleave(2)[::2], u, *(x.mT.contiguous().mT for x in (k, v, g)))
    assert all(map(torch.equal, got, want))
    # a diverged model has to show
    k[1, 20, 3] = math.nan
    y = wkv.wkv(w, u, k, v)[0]
    assert y[1, 20:, 3].isnan().all() and y.isnan().sum() == 20


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_wkv_opcheck(wkv_device, dtype):
    w, u, k, v, g = wkv_inputs(2, 40, 5, dtype=dtype, device=wkv_device)
    state = wkv_random_state(2, 5, wkv_device)
    saved = wkv.kernel_forward(w, u, k, v, state)[2]
    torch.library.opcheck(wkv.kernel_forward, (*(x.requires_grad_() for x in (w, u, k, v)), state))
    torch.library.opcheck(wkv.kernel_backward, (*(x.detach() for x in (w, u, k, v)), saved, g))


def test_wkv_compiles_into_a_training_step(wkv_device):
    *leaves, g = (x.requires_grad_() for x in wkv_inputs(2, 40, 8, device=wkv_device))

    def loss(w, u, k, v):
        y, _ = wkv.wkv(w, u, 2 * k, v.sin())
        return (y.square() * g.detach()).sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    # the kernel proves itself while torch.compile reads the code
    wkv.find_kernel.cache_clear()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    wkv_check(got, want)
    assert wkv.has_kernel(torch.device(wkv_device))


@pytest.mark.parametrize('change, match', [
    (dict(backend='gpu'), "'gpu'"), (dict(backend='cuda'), "'cuda' cannot run on torch.float32 on cpu"),
    (dict(w=torch.ones(4)), r'\(4,\)'), (dict(v=torch.ones(2, 4, 3)), r'\(2, 4, 3\)'),
    (dict(state=torch.zeros(1, 3, 3)), r'\(1, 3, 3\)'), (dict(u=torch.ones(3, device='meta')), 'on one device'),
    (dict(k=torch.ones(2, 0, 3), v=torch.ones(2, 0, 3)), 'none of them 0'),
    (dict(v=torch.ones(2, 5, 3).double()), 'of one floating type.*float64'),
    (dict(k=torch.ones(2, 5, 3).double(), v=torch.ones(2, 5, 3).double(), backend='cpu'), 'run on torch.float64')])
def test_wkv_refuses(change, match):
    with pytest.raises(ValueError, match=match):
        wkv.wkv(**dict(zip('wukv', wkv_inputs(2, 5, 3))) | change)


# ---------------------------------------------------------------------------------------------------------------------
# wkv.py: a kernel is built, and proves itself

def wkv_process(tmp_path, code, cache='cache', **environment):
    environment = {**os.environ, 'TORCH_EXTENSIONS_DIR': str(tmp_path / cache), **environment}
    return subprocess.Popen([sys.executable, '-c', code], env=environment, cwd=Path(wkv.__file__).parent,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize('change', [dict(CXX='no-such-compiler'), dict(cache='file')])
def test_wkv_falls_back_with_one_line(tmp_path, change):
    (tmp_path / 'file').touch()
    code = ("import torch, wkv; print('imported', flush=True); x = torch.ones(1, 3, 2)\n"
            'for _ in range(2): y, _ = wkv.wkv(x[0, 0], x[0, 0], x, x)\n'
            "print(y.sum().item(), wkv.has_kernel(x.device), wkv.describe('cpu'))")
    out, err = wkv_process(tmp_path, code, **change).communicate()
    first, second = out.splitlines()
    assert first == 'imported' and second.startswith('6.0 False WKV: plain PyTorch'), err
    said = [line for line in err.splitlines() if 'WKV' in line]
    assert len(said) == 1 and re.match('WKV: plain PyTorch, as the cpu kernel cannot be used: .', said[0])


def test_wkv_two_processes_build_at_once_and_without_openmp(tmp_path, wkv_device):
    compiler = tmp_path / 'compiler'
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    code = f'import wkv; print(wkv.describe({wkv_device!r}))'
    for process in [wkv_process(tmp_path, code, CXX=str(compiler)) for _ in range(2)]:
        out, err = process.communicate()
        assert out == f'WKV: {wkv_device} kernel\n', err
    assert [path.suffix for path in (tmp_path / 'cache' / 'wkv').iterdir()] == ['.so']


@pytest.mark.parametrize('right, wrong, reason', [
    # forward, backward, the state, NaN, an error
    ('s.b = old * s.b + now;', 's.b = old * s.b + now * 1.001f;', 'it is off by '),
    ('dv[i] = z.gf + z.h * next.M;', 'dv[i] = z.gf;', 'it is off by '),
    ('return {get(p, me.m), ', 'return {F(), ', 'it is off by '),
    ('put(float* p, F x, int m) { ', 'put(float* p, F x, int m) { x = x / F(); ', 'it is off by nan'),
    ('return nullptr;', 'return "no kernel image is available";', 'wkv_forward: no kernel image is available')])
def test_wkv_a_wrong_kernel_is_set_aside(tmp_path, monkeypatch, capsys, wkv_device, right, wrong, reason):
    source = wkv.SOURCE.read_text()
    assert right in source
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    monkeypatch.setattr(wkv, 'SOURCE', tmp_path / 'wkv_cuda.cu')
    wkv.SOURCE.write_text(source.replace(right, wrong))
    # as if nothing had been built or proved yet
    for name in ('find_kernel', 'load_kernel'):
        monkeypatch.setattr(wkv, name, functools.cache(getattr(wkv, name).__wrapped__))
    inputs = wkv_inputs(2, 40, 5, device=wkv_device)[:4]
    with torch.inference_mode():
        y = wkv.wkv(*inputs)[0]
    assert torch.equal(y, wkv.wkv(*inputs, backend='torch')[0])
    line, = [line for line in capsys.readouterr().err.splitlines() if 'WKV' in line]
    assert line.startswith(f'WKV: plain PyTorch, as the {wkv_device} kernel cannot be used: {reason}')
    assert list(tmp_path.glob('wkv/*.so'))


def test_wkv_other_devices():
    assert wkv.describe('meta') == 'WKV: plain PyTorch, as there is no kernel for meta'
    x = torch.ones(2, 5, 3, device='meta')
    assert wkv.wkv(x[0, 0], x[0, 0], x, x)[0].shape == x.shape
    if 'cuda' not in WKV_DEVICES:
        assert wkv.describe('cuda').startswith('WKV: plain PyTorch, as the cuda kernel cannot be used: ')


@pytest.mark.skipif('cuda' not in WKV_DEVICES, reason='no GPU')
def test_wkv_runs_on_the_current_stream():
    w, u, k, v, g = wkv_inputs(4, 300, 100, device='cuda')
    want = wkv_run(w, u, k, v, g)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # were it on another stream, it would read k before it is there
        torch.cuda._sleep(10_000_000)
        got = wkv_run(w, u, k * 1, v, g)
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


def test_wkv_benchmark(monkeypatch, capsys):
    # the file is loaded a second time, and its operators are there already
    out = scripts_run('wkv', '--shapes', '1,20,8')
    assert out.startswith('WKV: ') and re.search('1,20,8 torch: forward .* 1.0 x plain', out)
    monkeypatch.setattr(sys, 'argv', ['wkv.py', '--shapes', '0,1,1'])
    with pytest.raises(SystemExit, match='2'):
        wkv.main()
    assert "'0,1,1'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# model.py

# What stands for the representations here, with 7 units: units 3, 4, 5 of the events move time by 1, 2, 3 steps
MODEL_KINDS = {
    'bare': dict(head='chord'),
    'chord': dict(head='chord', lookback=9, beat=4),
    'bernoulli': dict(head='bernoulli', lookback=1, beat=1),
    'events': dict(head='softmax', lookback=9, beat=4, shift=3),
    'text': dict(head='softmax', lookback=9)}
model_each_arch_and_kind = pytest.mark.parametrize(
    'arch, kind', list(itertools.product(models.ARCHITECTURES, MODEL_KINDS)))


@torch.no_grad()
def model_randomise(module, std=0.5):
    """A fresh RWKV or Transformer block is the identity: only random numbers everywhere show what it computes."""
    for p in module.parameters():
        p.normal_(0, std)
    return module


def model_random(arch='rwkv', kind='chord', dtype=torch.float64, **sizes):
    torch.manual_seed(3)
    config = dict(n_units=7, arch=arch, n_layer=2, n_embd=8) | MODEL_KINDS[kind] | sizes
    return model_randomise(Model(Config(**config))).to(dtype).eval()


def model_frames(kind, *shape):
    """Random frames (.., T, V), with one unit on in each if that is what the head takes."""
    make = torch.Generator().manual_seed(4)
    if MODEL_KINDS[kind]['head'] == 'softmax':
        return torch.eye(shape[-1], dtype=torch.uint8)[torch.randint(shape[-1], shape[:-1], generator=make)]
    return (torch.rand(shape, generator=make) < 0.4).to(torch.uint8)


def model_arrays(module):
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def model_close(out, expected, atol):
    np.testing.assert_allclose(out.detach(), expected, rtol=0, atol=atol)


@model_each_arch_and_kind
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_model_in_pieces_equals_all_at_once(arch, kind, dtype):
    frames = model_frames(kind, 2, 20, 7)
    # a run of 6 frames, which the cuts below meet
    frames[0, 3:9, -1] = 0
    frames[0, 9:15] = frames[0, 3:9]
    for window in (1024, 1, 6) if arch == 'transformer' else (1024,):
        model = model_random(arch, kind, dtype, window=window)
        # as in training; the pieces below, without gradients, as in composing
        whole = model(frames)[0].detach()
        # rounding errors add up over 2 layers and 20 frames: over a dozen seeds the largest was 10 eps
        tolerance = 100 * torch.finfo(dtype).eps * whole.abs().max().item()
        with torch.no_grad():
            # one row alone
            model_close(model(frames[1:])[0], whole[1:], tolerance)
            for lengths in [20 * [1], [7, 1, 3, 9], [1, 12, 7]]:
                outs = []
                state = None
                for piece in frames.split(lengths, dim=1):
                    out, after = model(piece, state)
                    # reading leaves the state as it was
                    assert torch.equal(out, model(piece, state)[0])
                    outs.append(out)
                    state = after
                model_close(torch.cat(outs, 1), whole, tolerance)


@model_each_arch_and_kind
def test_model_outputs_depend_on_all_earlier_frames_and_on_no_later_one(arch, kind):
    T = 12
    model = model_random(arch, kind)
    frames = model_frames(kind, 1, T, 7).repeat(T + 1, 1, 1)
    # row s has another frame s, row T is as it was
    s = torch.arange(T)
    frames[s, s] = frames[s, s].roll(1, dims=1) if MODEL_KINDS[kind]['head'] == 'softmax' else 1 - frames[s, s]
    out, _ = model(frames)
    # (T, T): of output t by frame s
    change = (out[:T] - out[T]).abs().amax(-1)
    assert change.tril(-1).max() < 1e-13 * out.abs().max()
    # far above rounding, if faint after 11 frames
    assert change[s.unsqueeze(1) <= s].min() > 1e-7


@model_each_arch_and_kind
def test_model_in_bfloat16_is_near_float32(arch, kind):
    model = model_random(arch, kind, torch.float32)
    frames = model_frames(kind, 2, 20, 7)
    exact = model.nats(frames)
    with torch.autocast('cpu', torch.bfloat16):
        nats = model.nats(frames)
    assert nats.dtype == torch.float32 and not torch.equal(nats, exact)
    # eps is 2^-8; the mean over 38 frames is off by half of that at most
    assert nats.mean().item() == pytest.approx(exact.mean().item(), rel=2 ** -7)


@model_each_arch_and_kind
def test_model_gradients_reach_every_parameter(arch, kind):
    torch.manual_seed(0)
    model = Model(Config(7, arch, n_layer=2, n_embd=8, dropout=0, **MODEL_KINDS[kind]))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    frames = model_frames(kind, 4, 12, 7)
    # RWKV starts with zero matrices one behind another: gradient 3 reaches them all
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        model.loss(frames, None, None, None).backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == [] and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('kind', MODEL_KINDS)
def test_model_loss_of_a_window_equals_that_in_the_whole_tune(kind):
    # as initialised, RWKV blocks are the identity, so a frame is told of the past by clock and lookback alone
    torch.manual_seed(0)
    model = Model(Config(7, n_layer=1, n_embd=8, dropout=0, **MODEL_KINDS[kind] | dict(lookback=4))).double()
    for part in (model.emb, model.clock, model.look, model.head):
        if part:
            model_randomise(part)
    frames = model_frames(kind, 3, 40, 7)
    frames[:, 0] = torch.eye(7, dtype=torch.uint8)[6]
    nats = model.nats(frames)
    time, age = model.advance(frames, model.start(frames))
    for start in range(5, 30):
        past = frames[:, start - 4:start]
        loss = model.loss(frames[:, start:start + 10], past, age[:, start - 1], time[:, start - 1])
        # runs are counted anew, so where one goes on there is a difference
        if not (past[:, -1:] == frames[:, start - 5:start - 1]).all(-1).any():
            assert loss.item() == pytest.approx(nats[:, start:start + 9].mean().item(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the parts, worked by hand

def model_sigmoid(x):
    return 1 / (1 + np.exp(-x))


def model_softmax(z):
    return np.exp(z) / np.exp(z).sum()


def model_layer_norm(x, P, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * P[name + '.weight'] + P[name + '.bias']


@pytest.mark.parametrize('W', [1, 3, 6])
def test_model_lookback_against_its_equations(W):
    # as initialised, the RWKV blocks are the identity, so all that is left are the embedding and looking back
    T = 12
    V = 4
    C = 6
    model = Model(Config(V, 'rwkv', 'bernoulli', 1, C, lookback=W)).double().eval()
    frames = model_frames('chord', 2, T, V)
    # one row is all one tune, the other has several
    frames[0, :, -1] = 0
    frames[0, 6:9] = frames[0, 3:6]
    frames[:, 0] = torch.tensor([0, 0, 0, 1])
    model_randomise(model.emb)
    model_randomise(model.look, std=1)
    P = model_arrays(model)
    lags = np.arange(W, 0, -1)
    out = np.zeros((2, T, V))
    for b in range(2):
        # frame t stands at W + t, nothing before it
        f = np.concatenate((np.zeros((W, V)), frames[b].numpy()))

        def one_tune(i, j):
            return not f[i + 1:j + 1, -1].any()

        run = np.zeros(W)
        for t in range(W, W + T):
            match = [one_tune(t - lag, t) and (f[t] == f[t - lag]).all() for lag in lags]
            run = np.where(match, run + 1, 0)
            x = P['emb.weight'] @ f[t] + P['emb.bias'] + P['look.run.weight'] @ np.log1p(run)
            x = model_layer_norm(x, P, 'ln_in')
            scores = P['look.lag.weight'] @ model_layer_norm(x, P, 'look.ln') + P['look.lag.bias']
            p = model_softmax(scores + np.append(0, P['look.trust'] * np.log1p(run)))[1:]
            recalled = sum(vote * f[t + 1 - lag] for vote, lag in zip(p, lags) if one_tune(t + 1 - lag, t))
            x = model_layer_norm(x + P['look.recall.weight'] @ recalled, P, 'ln_out')
            out[b, t - W] = P['head.out.weight'] @ x + P['head.out.bias']
    model_close(model(frames)[0], out, 1e-12)


def test_model_clock_of_a_model_in_16_bits_is_not_lost():
    torch.manual_seed(0)
    clock = model_randomise(models.Clock(Config(n_units=7, n_embd=8, beat=4)))
    n = torch.arange(99_990, 100_000).unsqueeze(0)
    exact = clock(n)
    torch.testing.assert_close(clock.bfloat16()(n).float(), exact, rtol=0, atol=0.1)


@pytest.mark.parametrize('shift', [0, 2])
def test_model_clock_against_its_equation(shift):
    # as initialised, the RWKV blocks are the identity, so all that is left are the embedding and the clock
    T = 30
    V = 6
    beat = 3
    model = Model(Config(V, 'rwkv', 'bernoulli', 1, 6, beat=beat, shift=shift)).double().eval()
    model_randomise(model.clock, std=1)
    P = model_arrays(model)
    unit = torch.randint(0, V - 1, (T,), generator=torch.Generator().manual_seed(1))
    # tunes of 6, 0 and 21 frames
    starts = (0, 7, 8)
    unit[list(starts)] = V - 1
    frames = torch.eye(V, dtype=torch.uint8)[unit].unsqueeze(0)
    # units 2, 3, 4 move time by 1, 2, 3 steps
    passed = [(u - 1 if 2 <= u < V - 1 else 0) if shift else 1 for u in unit.tolist()]
    began = [max(start for start in starts if start <= t) for t in range(T)]
    now = np.array([sum(passed[b + 1:t + 1]) for t, b in enumerate(began)])
    angle = 2 * np.pi * now[:, None] / (beat * np.array(models.Clock.beats))
    x = frames[0].numpy() @ P['emb.weight'].T + P['emb.bias']
    x = x + np.concatenate((np.cos(angle), np.sin(angle)), axis=1) @ P['clock.position.weight'].T
    x = model_layer_norm(model_layer_norm(x, P, 'ln_in'), P, 'ln_out')
    # the angles are float32
    model_close(model(frames)[0][0], x @ P['head.out.weight'].T + P['head.out.bias'], 1e-5)


def model_recurrent_by_hand(x, P, heads, window):
    P = {name.split('.')[-1]: p for name, p in P.items()} | P
    h = np.zeros_like(x[0])
    c = np.zeros_like(x[0])
    out = []
    for row in model_layer_norm(x, P, 'ln'):
        z = P['weight_ih_l0'] @ row + P['bias_ih_l0'] + P['weight_hh_l0'] @ h + P['bias_hh_l0']
        if len(z) == len(h):
            h = np.tanh(z)
        else:
            i, f, g, o = z.reshape(4, -1)
            c = model_sigmoid(f) * c + model_sigmoid(i) * np.tanh(g)
            h = model_sigmoid(o) * np.tanh(c)
        out.append(h)
    return x + out


def model_rwkv_by_hand(x, P, heads, window):
    """As arXiv 2305.13048 writes it: the WKV as two sums over all of the past."""
    def mixed(x, name, matrix):
        m = P[name]
        return (m * x + (1 - m) * np.vstack((0 * x[:1], x[:-1]))) @ P[matrix].T

    z = model_layer_norm(x, P, 'ln1')
    r = mixed(z, 'att.time_mix_r', 'att.receptance.weight')
    k = mixed(z, 'att.time_mix_k', 'att.key.weight')
    v = mixed(z, 'att.time_mix_v', 'att.value.weight')
    w = np.exp(P['att.time_decay'])
    wkv = np.zeros_like(x)
    for t in range(len(x)):
        weights = [np.exp(-(t - 1 - i) * w + k[i]) for i in range(t)] + [np.exp(P['att.time_first'] + k[t])]
        wkv[t] = (weights * v[:t + 1]).sum(0) / np.sum(weights, axis=0)
    x = x + (model_sigmoid(r) * wkv) @ P['att.output.weight'].T
    z = model_layer_norm(x, P, 'ln2')
    r = mixed(z, 'ffn.time_mix_r', 'ffn.receptance.weight')
    k = mixed(z, 'ffn.time_mix_k', 'ffn.key.weight')
    return x + model_sigmoid(r) * (np.maximum(k, 0) ** 2 @ P['ffn.value.weight'].T)


def model_transformer_by_hand(x, P, heads, window):
    def rms_norm(x, name):
        # float64 has its own smallest step
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + np.finfo(float).eps) * P[name]

    def rotated(x):
        """Rotary positions: the pairs (j, j + D/2) of x (T, D) are complex numbers, and turned."""
        T, D = x.shape
        z = x[:, :D // 2] + 1j * x[:, D // 2:]
        z = z * np.exp(1j * np.arange(T)[:, None] / 10000 ** (2 * np.arange(D // 2) / D))
        return np.hstack((z.real, z.imag))

    y = rms_norm(x, 'norm1.weight')
    attended = np.zeros_like(x)
    for head in np.arange(x.shape[1]).reshape(heads, -1):
        q, k, v = (y @ P[f'att.{name}.weight'][head].T for name in ('query', 'key', 'value'))
        q = rotated(q)
        k = rotated(k)
        for t in range(len(x)):
            seen = slice(max(0, t - window + 1), t + 1)
            attended[t, head] = model_softmax(k[seen] @ q[t] / np.sqrt(len(head))) @ v[seen]
    x = x + attended @ P['att.output.weight'].T
    y = rms_norm(x, 'norm2.weight')
    gate = y @ P['ffn.gate.weight'].T
    return x + (gate * model_sigmoid(gate) * (y @ P['ffn.input.weight'].T)) @ P['ffn.output.weight'].T


@pytest.mark.parametrize('arch, by_hand, C, heads, window', [
    ('rnn', model_recurrent_by_hand, 5, 1, 1), ('lstm', model_recurrent_by_hand, 5, 1, 1),
    ('rwkv', model_rwkv_by_hand, 6, 1, 1), ('transformer', model_transformer_by_hand, 6, 1, 1024),
    ('transformer', model_transformer_by_hand, 88, 2, 5), ('transformer', model_transformer_by_hand, 96, 3, 1)])
def test_model_blocks_against_their_equations(arch, by_hand, C, heads, window):
    torch.manual_seed(0)
    block = models.ARCHITECTURES[arch](Config(7, n_embd=C, window=window), layer=1)
    block = model_randomise(block, 2 / C ** 0.5).double().eval()
    x = torch.randn(2, 11, C, dtype=torch.float64)
    out, state = block(x, None)
    model_close(out, np.stack([by_hand(row, model_arrays(block), heads, window) for row in x.numpy()]), 1e-11)
    if arch == 'transformer':
        # no more is kept than the window sees
        (keys, _), _ = state
        assert keys.shape == (2, heads, min(11, window - 1), C // heads)


def test_model_rotary_products_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    near = [(models.rotate(q, first + 7) * models.rotate(k, first)).sum().item() for first in (0, 1, 10 ** 6)]
    np.testing.assert_allclose(near, near[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize('L', [1, 3])
def test_model_rwkv_starts_as_v4neo(L):
    """The values of RWKV-LM's RWKV-v4neo/src/model.py; one layer, a division by zero there, works."""
    C = 12
    share = np.arange(C) / C
    zigzag = np.array([0, 1, -1] * 4)
    for i, block in enumerate(Model(Config(7, n_layer=L, n_embd=C)).blocks):
        P = model_arrays(block)
        # from 0 to 1; from 1 to almost 0
        up = i / max(1, L - 1)
        down = 1 - i / L
        expected = {
            'att.time_decay': -5 + 8 * (np.arange(C) / (C - 1)) ** (0.7 + 1.3 * up),
            'att.time_first': math.log(0.3) + 0.5 * zigzag,
            'att.time_mix_k': share ** down, 'att.time_mix_v': share ** down + 0.3 * up,
            'att.time_mix_r': share ** (0.5 * down), 'ffn.time_mix_k': share ** down, 'ffn.time_mix_r': share ** down,
            'ln1.weight': 1, 'ln1.bias': 0, 'ln2.weight': 1, 'ln2.bias': 0, 'att.key.weight': 0,
            'att.receptance.weight': 0, 'att.output.weight': 0, 'ffn.receptance.weight': 0, 'ffn.value.weight': 0}
        for name, values in expected.items():
            np.testing.assert_allclose(P.pop(name), values, rtol=0, atol=2e-6, err_msg=name)
        # orthogonal, with gain sqrt(rows / columns) where there are more rows than columns
        value = P.pop('att.value.weight')
        key = P.pop('ffn.key.weight')
        np.testing.assert_allclose(value.T @ value, np.eye(C), rtol=0, atol=1e-5)
        np.testing.assert_allclose(key.T @ key, 4 * np.eye(C), rtol=0, atol=1e-5)
        assert key.shape == (4 * C, C) and not P


@pytest.mark.parametrize('arch', ['rnn', 'lstm', 'transformer'])
def test_model_other_blocks_start_orthogonal_and_remembering(arch):
    C = 8
    block = models.ARCHITECTURES[arch](Config(7, n_embd=C), layer=0).eval()
    matrices = [(name, p) for name, p in block.named_parameters() if p.dim() == 2]
    for name, p in matrices:
        # gates of the LSTM stand one below the other; what leads out of a part of the Transformer is zero
        for part in p.split(C) if arch == 'lstm' else [p]:
            gain = 0 if 'output' in name else len(part) / C
            model_close(part.T @ part, gain * np.eye(p.shape[1]), 1e-5)
    if arch != 'transformer':
        bias = sum(p for name, p in block.named_parameters() if '.bias' in name and name != 'ln.bias')
        # in the order i, f, g, o
        assert bias.tolist() == (C * [0] + C * [1] + 2 * C * [0] if arch == 'lstm' else C * [0])


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the heads

model_each_head = pytest.mark.parametrize('head', models.HEADS)


def model_small_head(head, V):
    torch.manual_seed(5)
    head = model_randomise(models.HEADS[head](Config(V, n_embd=5)), std=0.7)
    with torch.no_grad():
        # "done" not too soon
        head.out.bias[V:] -= 1.5
    return head


def model_frame_probabilities(head, h, temperature=1.0, top_p=1.0, may_end=True):
    """Of all 2^V frames, (2^V,), worked out choice by choice; bit v of the index is unit v."""
    def pick(logits):
        """The softmax, of which the fewest choices with top_p of the probability are kept."""
        p = model_softmax((logits - logits.max()) / temperature)
        order = np.argsort(-p)
        p[order[1 + np.searchsorted(np.cumsum(p[order]), top_p):]] = 0
        return p / p.sum()

    P = model_arrays(head)
    h = h.double().numpy()
    bias = P['out.bias']
    V = len(bias) - isinstance(head, models.ChordHead)
    if not may_end:
        bias[V - 1] = -np.inf
    probabilities = np.zeros(2 ** V)
    if isinstance(head, models.SoftmaxHead):
        probabilities[2 ** np.arange(V)] = pick(P['out.weight'] @ h + bias)
    elif isinstance(head, models.BernoulliHead):
        probabilities = np.ones(1)
        for logit in P['out.weight'] @ h + bias:
            probabilities = np.outer(pick(np.array([0, logit])), probabilities).ravel()
    else:
        unfinished = [((), 1.0)]
        while unfinished:
            units, p = unfinished.pop()
            a = P['hidden.weight'] @ h + P['hidden.bias'] + sum(P['chosen.weight'][:, u] for u in units)
            gelu = np.array([0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in a])
            low = max(units, default=-1) + 1
            *taken, done = p * pick((P['out.weight'] @ gelu + bias)[low:])
            unfinished += [((*units, low + i), q) for i, q in enumerate(taken)]
            probabilities[sum(1 << u for u in units)] = done
    return probabilities


def model_index(frames):
    """The index of frames (.., V) among all 2^V."""
    return (frames.long() << torch.arange(frames.shape[-1])).sum(-1)


@model_each_head
def test_model_head_probabilities_of_all_frames(head):
    V = 6
    frames = ((torch.arange(2 ** V).unsqueeze(1) >> torch.arange(V)) & 1).to(torch.uint8)
    if head == 'softmax':
        frames = torch.eye(V, dtype=torch.uint8)
    head = model_small_head(head, V)
    h = 2 * torch.randn(2, 3, 1, 5)
    with torch.no_grad():
        nats = head.nll(head(h).expand(2, 3, len(frames), -1), frames.expand(2, 3, -1, -1))
    p = nats.double().neg().exp()
    assert (p.sum(-1) - 1).abs().max() < 1e-5
    expected = [[model_frame_probabilities(head, one[0])[model_index(frames)] for one in row] for row in h]
    np.testing.assert_allclose(p, expected, rtol=1e-4)


@model_each_head
@pytest.mark.parametrize('temperature, top_p, may_end', [
    (1, 1, True), (0.6, 1, True), (1.7, 1, True), (1, 0.8, True), (1.3, 0.55, True), (1, 1, False), (1.3, 0.8, False),
    (1e-3, 1, True), (1, 1e-6, True)])
def test_model_sampling_follows_the_probabilities(head, temperature, top_p, may_end):
    V = 4
    n = 200_000
    head = model_small_head(head, V)
    # two tunes in one batch, over and over: each frame has its own probabilities, whatever the other is
    h = 2 * torch.randn(2, 5)
    frames = head.sample(head(h).repeat(n, 1), temperature, top_p, torch.Generator().manual_seed(2), may_end)
    assert frames.dtype == torch.uint8 and frames.shape == (2 * n, V) and frames.max() <= 1
    one, two = model_index(frames).view(n, 2).T
    p = np.outer(*(model_frame_probabilities(head, row, temperature, top_p, may_end) for row in h)).ravel()
    frequency = np.bincount(one << V | two, minlength=len(p)) / n
    # by the inequality of Weissman et al. 2003, farther off than this less than once in 1e9 runs
    assert abs(frequency - p).sum() < math.sqrt(2 * ((p > 0).sum() * math.log(2) + math.log(1e9)) / n)
    assert not frequency[p == 0].any()


# ---------------------------------------------------------------------------------------------------------------------
# model.py: training, composing, sizes

def test_model_dropout_takes_the_same_channels_from_all_frames():
    torch.manual_seed(0)
    x = torch.ones(64, 5, 128)
    y = models.Dropout(0.25)(x)
    assert (y == y[:, :1]).all() and not torch.equal(y[0], y[1])
    np.testing.assert_allclose(y.unique(), [0, 1 / 0.75])
    # kept channels are 8192 coin tosses: by Hoeffding, farther off than 0.04 less than once in 1e11 runs
    assert abs(y.mean().item() - 1) < 0.04 / 0.75


@pytest.mark.parametrize('arch', models.ARCHITECTURES)
def test_model_dropout_acts_in_training_only(arch):
    model = model_random(arch, dropout=0.3)
    frames = model_frames('chord', 2, 5, 7)
    assert torch.equal(model(frames)[0], model(frames)[0])
    assert not torch.equal(model.train()(frames)[0], model(frames)[0])


@model_each_arch_and_kind
def test_model_composes_what_it_says_and_ends_at_the_boundary(arch, kind):
    model = model_random(arch, kind, torch.float32, window=6)
    model.head.out.bias.data[6] = 1
    prompts = model_frames(kind, 20, 5, 7)
    prompts[..., -1] = 0
    greedy = model.train().compose(prompts, 12, top_p=1e-6)
    assert len(greedy) == 20 and not model.training
    for prompt, tune in zip(prompts, greedy):
        # the same frames, read at once, and the likeliest after each
        with torch.inference_mode():
            out, _ = model(torch.cat((prompt, tune)).unsqueeze(0))
            likeliest = model.head.sample(out[0], top_p=1e-6)[4:]
        assert torch.equal(likeliest[:len(tune)], tune) and not tune[:, -1].any() and tune.dtype == torch.uint8
        assert len(tune) == 12 or likeliest[len(tune), -1] == 1
    # many rows are read a few frames at a time
    many = model.compose(prompts.repeat(60, 1, 1), 12, top_p=1e-6)
    assert all(map(torch.equal, many, 60 * greedy))
    for at_least in (0, 4, 12):
        tunes = model.compose(prompts, 12, 1.3, 0.99, torch.Generator().manual_seed(1), at_least)
        lengths = [len(tune) for tune in tunes]
        assert at_least <= min(lengths) <= max(at_least, 11) and max(lengths) <= 12
        assert not torch.cat(tunes)[:, -1].any()
    again = model.compose(prompts, 12, 1.3, 0.99, torch.Generator().manual_seed(1), at_least)
    assert all(map(torch.equal, tunes, again))


def model_plan(*shape):
    """Random plans (.., 6) of forms that reach back 5 beats."""
    make = torch.Generator().manual_seed(5)
    return torch.stack([torch.randint(low, high, shape, generator=make)
                        for low, high in ((1, 7), (0, 30), (0, 30), (0, 30), (0, 11), (0, 13))], dim=-1)


def test_model_is_told_the_form_of_a_tune():
    model = model_random(form=5)
    frames = model_frames('chord', 3, 20, 7)
    plan = model_plan(3, 20)
    with torch.no_grad():
        untold, _ = model(frames)
        assert torch.equal(model(frames, None, 0 * plan)[0], untold)
        told, _ = model(frames, None, plan)
        for column, other in enumerate((0, 31, 31, 31, (plan[:, 12, 4] + 1) % 11, 12 - plan[:, 12, 5])):
            changed = plan.clone()
            changed[:, 12, column] = other
            same = (model(frames, None, changed)[0] - told).abs().amax((0, 2)) < 1e-9
            assert same[:12].all() and not same[12]
        state = None
        for t in range(20):
            out, state = model(frames[:, t:t + 1], state, plan[:, t:t + 1])
            assert torch.allclose(out, told[:, t:t + 1], atol=1e-9)
    model.loss(frames, None, None, None, plan[:, 1:]).backward()
    assert all(p.grad.any() for p in model.form.parameters())


def test_model_composes_on_a_form():
    model = model_random(kind='bernoulli', dtype=torch.float32, form=5)
    prompts = model_frames('bernoulli', 20, 5, 7)
    plan = model_plan(20, 5 + 12)
    told = model.compose(prompts, 12, top_p=1e-6, at_least=12, plan=plan)
    assert not all(map(torch.equal, told, model.compose(prompts, 12, top_p=1e-6, at_least=12)))
    # many rows are read a few frames at a time
    many = model.compose(prompts.repeat(60, 1, 1), 12, top_p=1e-6, at_least=12, plan=plan.repeat(60, 1, 1))
    assert all(map(torch.equal, many, 60 * told))
    for prompt, tune, rows in zip(prompts, told, plan):
        frames = torch.cat((prompt, tune)).unsqueeze(0)
        with torch.inference_mode():
            out, _ = model(frames, None, rows[:frames.shape[1]].unsqueeze(0))
            likeliest = model.head.sample(out[0], top_p=1e-6, may_end=False)[4:]
        assert torch.equal(likeliest[:len(tune)], tune)


@pytest.mark.parametrize('arch', models.ARCHITECTURES)
def test_model_takes_rows_of_a_state(arch):
    model = model_random(arch, window=6)
    frames = model_frames('chord', 3, 20, 7)
    rows = torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        whole, _ = model(frames)
        _, state = model(frames[:, :9])
        out, _ = model(frames[rows, 9:], models.take_rows(state, rows))
    assert torch.allclose(out, whole[rows, 9:], atol=1e-9)


def test_model_goes_on_in_the_rows_that_are_chosen():
    model = model_random('transformer', 'bernoulli', torch.float32, form=5, window=6)
    prompts = model_frames('bernoulli', 3, 5, 7)
    plan = model_plan(3, 5 + 12)
    a, b, c = model.compose(prompts, 12, top_p=1e-6, at_least=12, plan=plan)
    assert not torch.equal(a[8:], b[8:]) and not torch.equal(b[8:], c[8:])
    chosen = {3: [2, 0, 1, 2], 9: [3, 1]}

    def go_on(frames, ended):
        assert not ended.any()
        rows = chosen.get(frames.shape[1])
        return rows and torch.tensor(rows)

    last, first = model.compose(prompts, 12, top_p=1e-6, at_least=12, plan=plan, go_on=go_on)
    assert torch.equal(last, c) and torch.equal(first, a)
    # what has ended stays ended
    model.head.out.weight.data[6] = 0
    model.head.out.bias.data[6] = -2
    ends = [len(tune) for tune in model.compose(prompts, 12, generator=torch.Generator().manual_seed(1), plan=plan)]
    early = ends.index(min(ends))
    assert min(ends) < max(ends)
    chosen = {min(ends) + 1: torch.tensor([early] * 3)}
    tunes = model.compose(prompts, 12, generator=torch.Generator().manual_seed(1), plan=plan,
                          go_on=lambda frames, ended: chosen.get(frames.shape[1]))
    assert [len(tune) for tune in tunes] == 3 * [min(ends)]


@pytest.mark.parametrize('grid', [data.PianoRoll(), data.PianoRoll(2, onsets=False), data.Events(), data.AbcText()])
def test_model_sizes_are_within_5_percent(grid):
    config = Config(grid.V, 'rwkv', grid.heads[0], lookback=64 * grid.frames_per_beat, beat=grid.beat)
    target = sum(p.numel() for p in Model(config).parameters())
    assert models.same_size(config) == config and models.count_parameters(config) == target
    for arch in models.ARCHITECTURES:
        same = models.same_size(dataclasses.replace(config, arch=arch))
        assert same.arch == arch and abs(models.count_parameters(same) / target - 1) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# model.py: checkpoints

@model_each_arch_and_kind
def test_model_checkpoint_round_trip(tmp_path, arch, kind):
    model = model_random(arch, kind, torch.float32)
    more = dict(step=7, meta=dict(name='\u00e9', tempo=1.5), table=[(1, None)])
    models.save_checkpoint(tmp_path / 'a.pt', model.train(), **more)
    again, checkpoint = models.load_checkpoint(tmp_path / 'a.pt')
    assert again.config == model.config and not again.training and os.listdir(tmp_path) == ['a.pt']
    assert checkpoint | more == checkpoint
    frames = model_frames(kind, 2, 9, 7)
    assert torch.equal(again(frames)[0], model.eval()(frames)[0])
    assert all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize('change, why', [(change, '') for change in (
    lambda c: c.update(version=1),
    lambda c: c.pop('config'),
    lambda c: c['config'].update(colour=1),
    lambda c: c['config'].update(arch='gru'),
    lambda c: c['config'].update(n_layer=9),
    lambda c: c['config'].update(lookback=10 ** 12),
    lambda c: c['model'].pop('emb.bias'),
    lambda c: c['model'].update(evil=torch.zeros(3)),
    lambda c: c['model'].update({'emb.bias': 'x'}),
    lambda c: c['model'].update({'emb.bias': torch.zeros(8, dtype=torch.int64)}),
    lambda c: c['model']['emb.bias'].fill_(math.nan),
    lambda c: c.update(meta=PickledCode()))] + [
    (lambda c, size=size: c['config'].update({size: 10 ** 5}), 'too short for a model of its config')
    for size in ('n_units', 'n_embd', 'n_layer', 'lookback', 'form')])
def test_model_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch, change, why):
    monkeypatch.chdir(tmp_path)
    models.save_checkpoint('bad.pt', model_random('rwkv', 'chord', torch.float32))
    content = torch.load('bad.pt', weights_only=True)
    change(content)
    torch.save(content, 'bad.pt')
    model_assert_refused(why)


def model_assert_refused(why=''):
    with pytest.raises(models.UserError, match=f'bad.pt is damaged or no checkpoint.*{why}') as e:
        models.load_checkpoint('bad.pt')
    assert '\n' not in str(e.value) and not os.path.exists('it_ran_code')


def test_model_checkpoint_that_is_damaged_or_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_random('rwkv', 'chord', torch.float32)
    path = tmp_path / 'bad.pt'
    models.save_checkpoint(path, model)
    content = path.read_bytes()
    frames = model_frames('chord', 1, 9, 7)
    refused = 0
    for at in np.linspace(0, len(content) - 1, 60).astype(int):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        try:
            again, _ = models.load_checkpoint(path)
            # there are bits that say nothing
            assert torch.equal(again(frames)[0], model(frames)[0]), at
        except models.UserError:
            refused += 1
    assert refused > 20
    for wrong in (b'', b'text\n', bytes(5000), content[:30], content[:-100], pickle.dumps(PickledCode(), 2)):
        path.write_bytes(wrong)
        model_assert_refused()
    for path in (tmp_path, tmp_path / 'missing.pt'):
        with pytest.raises(models.UserError, match=f'{path}.*: give'):
            models.load_checkpoint(path)


# ---------------------------------------------------------------------------------------------------------------------
# train.py and sample.py, as a person runs them

SCRIPTS_TINY = ['--n_layer=2', '--n_embd=16', '--batch_size=4', '--block_size=32', '--max_minutes=0', '--dtype=float32',
                '--eval_interval=100', '--log_interval=10', '--device=cpu']
# of the processes that tests start: small models need one thread, and two of them talk on this machine: by its first
# network, lo or lo0
SCRIPTS_ENV = os.environ | dict(PYTHONPATH=str(data.HERE), OMP_NUM_THREADS='1',
                                GLOO_SOCKET_IFNAME=socket.if_nameindex()[0][1])


def scripts_run(script, *words, status=0):
    """Runs `python script.py words`, but here; it has to end with this exit status. Returns what it prints or, for
    status 2, its complaint, which has to be one sentence."""
    out = io.StringIO()
    err = io.StringIO()
    ended = 0
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail('it hangs'))
    signal.alarm(100)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, 'argv', [f'{script}.py', *map(str, words)])
        try:
            runpy.run_path(str(data.HERE / f'{script}.py'), run_name='__main__')
        except SystemExit as stop:
            ended = stop.code
        finally:
            signal.alarm(0)
    assert ended == status, err.getvalue()
    if status != 2:
        return out.getvalue()
    assert re.fullmatch(f'{script}.py: .*\n', err.getvalue())
    return err.getvalue()


def scripts_train(book, out, *words, status=0):
    return scripts_run('train', f'--data={book}', f'--out_dir={out}', *SCRIPTS_TINY, *words, status=status)


def scripts_sample(ckpt, out, *words):
    """Runs sample.py, but for the sound, which takes its time: what it prints, and the tune in the .mid."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, 'LONGEST', 0)
        printed = scripts_run('sample', f'--ckpt={ckpt}', f'--out={out}', *words)
    return printed, notation.read_midi(f'{out}.mid')


def scripts_dance(bar=4, key=39, bars=4):
    """A Song with a chord a bar and quarter notes above it."""
    scale = [0, 2, 4, 5, 7, 9, 11, 12, 11, 9, 7, 5, 4, 2, 4, 7]
    notes = [(key - 12 + step, bar * i, bar * i + bar) for i in range(bars) for step in (0, 4, 7)]
    notes += [(key + scale[t % (4 * bar)] * (t % bar > 0), t, t + 1) for t in range(bar * bars)]
    return Song('', np.array(sorted(notes, key=lambda note: note[1]), dtype=float))


@pytest.fixture(scope='module')
def book(tmp_path_factory):
    """A folder of 20 tunes of 16 beats, all alike."""
    folder = tmp_path_factory.mktemp('book')
    for i in range(20):
        notation.write_midi(scripts_dance(key=39 + i % 3).notes, folder / f'{i}.mid', 100 + i)
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory, book):
    """Two architectures, trained for a few steps: {arch: checkpoint}. What train.py printed is beside its folder."""
    home = tmp_path_factory.mktemp('trained')
    for arch, head in (('rwkv', 'chord'), ('lstm', 'bernoulli')):
        printed = scripts_train(book, home / arch, f'--arch={arch}', f'--head={head}', '--max_iters=80',
                                '--transpose=0', '--learning_rate=0.01', '--eval_interval=40')
        (home / f'{arch}.txt').write_text(printed)
    return {arch: home / arch / f'{arch}.pt' for arch in ('rwkv', 'lstm')}


@pytest.fixture
def out(trained, tmp_path):
    """The folder of a run of 80 steps, to go on with."""
    return shutil.copytree(trained['rwkv'].parent, tmp_path / 'out')


def scripts_files(folder, pattern='*'):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


@pytest.mark.parametrize('arch', ['rwkv', 'lstm'])
def test_train_prints_its_plan_and_results(trained, book, arch):
    path = trained[arch]
    out = path.parent.with_suffix('.txt').read_text()
    for word in ('device: cpu', '20 songs', '  train: ', 'frames', 'beats', 'parameters', 'frames/s', 'left'):
        assert word in out, word
    assert ('WKV' in out) == (arch == 'rwkv') and arch in (path.parent / 'loss.svg').read_text()
    assert {p.name for p in path.parent.iterdir()} == {f'{arch}.csv', f'{arch}.last.pt', f'{arch}.pt', 'loss.svg'}
    first, *_, last = re.findall(r'step \d+: valid (\d+\.\d+) nats/frame', out)
    assert float(last) < float(first) / 2

    # what is printed and in the table is how the model in the checkpoint scores
    model, checkpoint = load_checkpoint(path)
    dataset = data.load(book, log=str)
    *_, row = csv.DictReader(path.with_suffix('.csv').open())
    assert {'iter', 'minutes', 'train', 'valid', 'lr', 'frames_per_second'} <= set(row)
    for split in ('valid', 'test'):
        score = train.evaluate(model, dataset, split)
        assert (f'\n{split}: {score.frame:.4f} nats/frame, {score.beat:.4f} nats/beat '
                f'({score.songs} songs, {score.frames:,} frames)\n') in out
        table = float(row[f'best_{split}']), float(row[f'best_{split}_beat'])
        assert table == pytest.approx(score[:2], abs=1e-5)
        assert checkpoint['scores'][split]['frame'] == pytest.approx(score.frame)
    assert checkpoint['valid'] == checkpoint['scores']['valid']['frame']
    assert checkpoint['meta']['source'] == dataset.source
    assert checkpoint['meta']['tempo'] == np.median([song.tempo for song in dataset.songs['train']])


@torch.no_grad()
def test_train_evaluate_reads_each_song_from_fresh_state():
    # the last one is read in two pieces
    songs = [Song('', np.array([(40, 0, n), (44, 1, n)], dtype=float)) for n in (2, 3, 7, 140)]
    roll = data.PianoRoll()
    dataset = data.Dataset(dict.fromkeys(data.SPLITS, songs), 'four songs', roll)
    torch.manual_seed(0)
    model = Model(Config(roll.V, n_layer=1, n_embd=8, lookback=5, beat=4)).eval()
    boundary = torch.eye(roll.V, dtype=torch.uint8)[-1:]
    inside = []
    whole = []
    for song in songs:
        frames = torch.cat((boundary, torch.from_numpy(roll.encode(song)), boundary)).view(-1, 1, 1, roll.V)
        state = None
        nats = []
        for before, after in zip(frames[:-1], frames[1:]):
            out, state = model(before, state)
            nats.append(model.head.nll(out, after).item())
        inside += nats[1:-1]
        whole += nats
    score = train.evaluate(model, dataset, 'test', batch_size=2)
    assert score == pytest.approx((np.mean(inside), sum(whole) / 152, 4, 4 * 152 - 4), rel=1e-5)
    # a sample of the songs; one at least, however long it is
    assert train.evaluate(model, dataset, 'test', most=400).songs == 2
    assert train.evaluate(model, dataset, 'test', most=10).songs == 1


@pytest.mark.parametrize('arch', ['rwkv', 'lstm'])
def test_sample_writes_the_same_files_for_the_same_seed(trained, tmp_path, arch):
    files = []
    for folder, seed in (('a', 1), ('b', 1), ('c', 2)):
        out = tmp_path / folder / 'x'
        out.parent.mkdir()
        printed = scripts_run('sample', f'--ckpt={trained[arch]}', f'--out={out}', '--length=2', f'--seed={seed}')
        assert f'{out}.mid' in printed and 'beats 1 to' in printed and f'seed {seed}' in printed
        assert re.search(r'at most [\d.]+ beats in a row copied', printed)
        song = notation.read_midi(f'{out}.mid')
        assert len(song.notes) and song.notes[:, 2].max() <= 2 and song.metre and song.sharps is not None
        files.append(scripts_files(out.parent))
    assert files[0] == files[1] and set(files[0]) == {'x.mid', 'x.abc', 'x.wav', 'x.svg'}
    assert all(files[0][name] != files[2][name] for name in files[0])


def test_sample_several_at_once_and_the_best_of_some(trained, tmp_path, monkeypatch):
    # what a run would go on from is a model, too
    options = '--num_samples=3', '--best_of=2', '--tempo=90'
    scripts_run('sample', f'--ckpt={trained["rwkv"].with_name("rwkv.last.pt")}', f'--out={tmp_path}/x', '--length=8',
                *options)
    assert notation.read_midi(tmp_path / 'x-3.mid').tempo == pytest.approx(90, abs=0.01)
    assert len(list(tmp_path.iterdir())) == 3 * 4

    # of noise and what sounds like the training songs, the latter
    rng = np.random.default_rng(0)
    noise = [Song('', np.array([(rng.integers(88), t / 2, t / 2 + 1) for t in range(32)])) for _ in range(2)]
    dance = scripts_dance()
    scripts_pretend(monkeypatch, *(data.PianoRoll().encode(song) for song in (*noise, dance)))
    printed, song = scripts_sample(trained['rwkv'], tmp_path / 'y', '--best_of=3')
    np.testing.assert_allclose(song.notes, dance.notes)
    # from its first strike to its last
    assert 'at most 15 beats in a row copied' in printed


@pytest.mark.parametrize('options, beats', [([], 16), (['--prompt_beats=6'], 6)])
def test_sample_continues_a_prompt(trained, book, tmp_path, options, beats):
    def kept(notes):
        return notes[notes[:, 1] < beats - 1e-6][:, :2]

    prompt = notation.read_midi(book / '4.mid')
    options = [*options, f'--prompt={book}/4.mid', '--length=8', '--seed=3', '--best_of=1']
    _, song = scripts_sample(trained['rwkv'], tmp_path / 'y', *options)
    np.testing.assert_allclose(kept(song.notes), kept(prompt.notes))
    assert song.tempo == pytest.approx(prompt.tempo, abs=0.01) and beats < song.notes[:, 2].max() <= beats + 8
    _, alone = scripts_sample(trained['rwkv'], tmp_path / 'z', *options, '--no_prompt')
    new = song.notes[song.notes[:, 1] >= beats - 1e-6] - [0, beats, beats]
    np.testing.assert_allclose(alone.notes, new, atol=1e-6)
    # its bars are where they were; a file does not tell a pickup of nothing
    assert alone.metre == song.metre
    bars = ((song.pickup or 0) - beats - (alone.pickup or 0)) / notation.bar_beats(song.metre)
    assert bars == pytest.approx(round(bars))


def scripts_untrained(path, representation, common_key=False, sharps=None, forms=()):
    """A checkpoint of a model that has learned nothing, of music that is not there."""
    meta = dict(data=str(path.parent / 'gone'), source='nothing', representation=representation.settings,
                common_key=common_key, sharps=sharps, tempo=100.0, forms=forms)
    model = Model(Config(representation.V, 'lstm', representation.heads[0], n_layer=1, n_embd=8))
    save_checkpoint(path, model, meta=meta, step=1, valid=1.0)
    return path


def scripts_pretend(monkeypatch, *tunes):
    """Models compose these frames (T, V) in turn; a list of what they are asked for."""
    names = 'prompt', 'length', 'temperature', 'top_p', 'generator', 'at_least', 'plan', 'go_on'
    asked = []

    def compose(self, *words):
        asked.append(SimpleNamespace(**dict(zip(names, words, strict=True))))
        return [torch.from_numpy(tune) for tune in itertools.islice(itertools.cycle(tunes), len(words[0]))]

    monkeypatch.setattr(Model, 'compose', compose)
    return asked


@pytest.mark.parametrize('arch', models.ARCHITECTURES)
def test_sample_composes_with_the_same_model_faster(arch, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, 'enabled', True)
    model = model_random(arch)
    frames = model_frames('chord', 2, 9, 7)
    weights = [p.detach().clone() for p in model.parameters()]
    out = model(frames)[0].detach()
    sample.hasten(model)
    assert not torch.backends.mkldnn.enabled and model.emb.weight.T.is_contiguous()
    assert all(map(torch.equal, model.parameters(), weights))
    torch.testing.assert_close(model(frames)[0], out, rtol=1e-12, atol=1e-12)


def test_sample_prompt_of_fields_alone(tmp_path, monkeypatch):
    text = data.AbcText()
    path = scripts_untrained(tmp_path / 'm.pt', text)
    jig = 'DFA d2f|afd Adf|AFD D3|]'
    asked = scripts_pretend(monkeypatch, text.encode_text(jig), text.encode_text('|no: [music'))
    (tmp_path / 'jig.abc').write_text('\ufeffX:1\nK: D % a jig\n\nM:6/8\nL:1/8\n')
    printed, song = scripts_sample(path, tmp_path / 'x', f'--prompt={tmp_path}/jig.abc', '--best_of=4')
    boundary, *fields = asked[0].prompt[0]
    assert text.text(torch.stack(fields)) == 'M:6/8\nL:1/8\nK:D\n' and boundary[-1] == 1
    assert (song.metre, song.sharps, len(song.notes)) == ('6/8', 2, 15)
    assert song.tempo == pytest.approx(100, abs=0.01)
    written = (tmp_path / 'x.abc').read_text()
    assert all(line in written for line in ('X:1\n', 'T:x\n', 'M:6/8\n', 'K:D\n', jig))
    assert '2 of 4 are valid' in printed and 'gone is not there any more' in printed


def test_sample_looks_for_copies_in_the_songs_of_the_training_alone(book, tmp_path):
    meta = dict(data=str(book), source=data.load(book).source)
    assert sample.training_songs(meta)
    # with a song less than there was, they are still the songs
    assert sample.training_songs(meta | dict(source=f'{book} (21 songs)'))
    # tunes.abc in place of Nottingham, for one
    assert sample.training_songs(meta | dict(source='Nottingham (1,037 songs)')) == []
    assert sample.training_songs(meta | dict(data=str(tmp_path / 'gone'))) == []


def test_sample_metre_keeps_what_is_in_it(tmp_path, monkeypatch):
    roll = data.PianoRoll()
    path = scripts_untrained(tmp_path / 'm.pt', roll)
    scripts_pretend(monkeypatch, *(roll.encode(scripts_dance(bar, bars=8)) for bar in (2, 3)))
    for metre in ('3/4', '2/4'):
        printed, song = scripts_sample(path, tmp_path / 'x', f'--metre={metre}', '--best_of=2')
        assert song.metre == metre and '2 tunes composed' in printed and f'1 are in {metre}' in printed
        assert f'M:{metre}\n' in (tmp_path / 'x.abc').read_text()
    # it tries eight times eight
    assert 'none of 64 tunes was one in 9/8' in scripts_run('sample', f'--ckpt={path}', '--metre=9/8', status=2)


@pytest.mark.parametrize('sharps', [2, None])
def test_sample_goes_on_in_the_key_of_the_prompt(tmp_path, monkeypatch, sharps):
    """A model of tunes in C major reads the prompt in C major; what is written is in D, as the prompt is."""
    roll = data.PianoRoll()
    path = scripts_untrained(tmp_path / 'm.pt', roll, common_key=True)
    asked = scripts_pretend(monkeypatch, roll.encode(scripts_dance()))
    notes = scripts_dance(key=41).notes
    notation.write_midi(notes, tmp_path / 'd.mid', sharps=sharps)
    _, song = scripts_sample(path, tmp_path / 'x', f'--prompt={tmp_path}/d.mid', '--best_of=1')
    np.testing.assert_allclose(roll.decode(asked[0].prompt[0, 1:].numpy()), notes - [2, 0, 0])
    np.testing.assert_allclose(song.notes[:len(notes)], notes)
    assert song.sharps == 2 and song.notes[len(notes):, 0].min() == 29


@pytest.mark.parametrize('common_key, words, sharps', [
    (True, [], 1), (True, ['--key=Eb'], -3), (False, [], 0), (False, ['--key=A'], 3), (False, ['--key=Cm'], -3)])
def test_sample_plays_in_the_key_of_the_training_tunes(tmp_path, monkeypatch, common_key, words, sharps):
    """What is composed in C major is played where most training tunes were before they were moved to C major."""
    roll = data.PianoRoll()
    path = scripts_untrained(tmp_path / 'm.pt', roll, common_key=common_key, sharps=1)
    notes = np.concatenate((scripts_dance().notes, [[87, 16, 17]]))
    scripts_pretend(monkeypatch, roll.encode(Song('', notes)))
    _, song = scripts_sample(path, tmp_path / 'x', '--best_of=1', *words)
    moved = notes + [(7 * sharps + 6) % 12 - 6, 0, 0]
    assert (song.sharps, song.minor) == (sharps, words == ['--key=Cm'])
    # the highest key of a piano has none above it
    np.testing.assert_allclose(song.notes, moved[moved[:, 0] < 88])


def test_sample_keeps_the_key_and_metre_that_a_prompt_tells(tmp_path, monkeypatch):
    roll = data.PianoRoll()
    path = scripts_untrained(tmp_path / 'm.pt', roll)
    scripts_pretend(monkeypatch, roll.encode(scripts_dance(bar=3)))
    (tmp_path / 'p.abc').write_text('X:1\nM:5/4\nL:1/4\nK:Amix\nAcegf|agecA|\n')
    for more in ([], ['--no_prompt']):
        _, song = scripts_sample(path, tmp_path / 'x', f'--prompt={tmp_path}/p.abc', '--best_of=1', *more)
        assert (song.sharps, song.metre) == (2, '5/4')
    said = scripts_run('sample', f'--ckpt={path}', f'--prompt={tmp_path}/p.abc', '--metre=3/4', status=2)
    assert 'is in 5/4' in said


def test_scripts_print_to_any_terminal_and_stop_where_nobody_reads():
    code = "import data; data.run(lambda: print('■' * 100_000), '')"
    words = dict(cwd=data.HERE, env=os.environ | dict(PYTHONIOENCODING='cp1252'), stderr=subprocess.PIPE)
    done = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, **words)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b'?' * 100_000, b'')
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, '-c', code], stdout=writer, **words)
    os.close(writer)
    assert done.returncode == 2 and re.fullmatch(b'-c: stopped, .*\n', done.stderr)


def test_sample_that_strikes_nothing_says_so(tmp_path, monkeypatch):
    roll = data.PianoRoll()
    path = scripts_untrained(tmp_path / 'm.pt', roll)
    notation.write_midi([(40, 0, 4)], tmp_path / 'p.mid')
    held = np.zeros((4, roll.V), dtype=np.uint8)
    held[:, 88 + 40] = 1
    scripts_pretend(monkeypatch, held)
    words = [f'--ckpt={path}', f'--prompt={tmp_path}/p.mid', '--no_prompt']
    assert 'nothing new' in scripts_run('sample', *words, status=2)


@pytest.mark.parametrize('name, stem', [
    ('x', 'x'), ('x.wav', 'x'), ('x.MID', 'x'), ('x.final', 'x.final'), ('rwkv.pt', 'rwkv'), ('rwkv.csv', 'rwkv.csv'),
    (None, 'rwkv')])
def test_sample_names_files_by_the_stem(out, monkeypatch, name, stem):
    before = scripts_files(out)
    scripts_pretend(monkeypatch, data.PianoRoll().encode(scripts_dance(bar=2, bars=1)))
    scripts_run('sample', f'--ckpt={out}/rwkv.pt', *[f'--out={out}/{name}'] * (name is not None))
    after = scripts_files(out)
    assert set(after) == set(before) | {stem + suffix for suffix in ('.mid', '.abc', '.wav', '.svg')}
    assert before.items() <= after.items()


# what is done, and what the complaint names; the last of two equal options counts
SCRIPTS_BAD = [
    ('train --arch=gru', '--arch'),
    ('train --representation=abc --head=chord', '--head=chord'),
    ('train --arch=transformer --n_embd=15', '--n_embd=15'),
    ('train --onsets=maybe', '--onsets'),
    ('train --lookback=x', '--lookback'),
    ('train --batch_size=2.5', '--batch_size'),
    ('train --batch_size=8 --gradient_accumulation_steps=3', 'use --batch_size=9'),
    ('train --max_minutes=inf', '--max_minutes'),
    ('train --max_minutes=0', '--max_iters'),
    ('train --block_size=100000', '--block_size'),
    ('train --device=cuda:99', '--device'),
    ('train --data=nowhere', 'nowhere'),
    ('train --data=pipe.mid', 'pipe.mid'),
    ('train --out_dir=file/out', '--out_dir'),
    ('train --resume', 'rwkv.last.pt'),
    ('train --resume --arch=rnn --out_dir=last', 'rnn.last.pt'),
    ('train --resume --arch=lstm --out_dir=last', 'lstm.last.pt is not a run that can go on'),
    ('sample --ckpt=none.pt', 'none.pt'),
    ('sample --ckpt=file', 'file'),
    ('sample --ckpt=/dev/zero', '/dev/zero'),
    ('sample --temperature=0', '--temperature'),
    ('sample --length=1e6', '--length'),
    ('sample --num_samples=1000 --best_of=1000', '--best_of'),
    ('sample --key=H', '--key'),
    ('sample --prompt=file', 'file'),
    ('sample --prompt=silent.mid', 'silent.mid'),
    ('sample --prompt=fields.abc', 'fields.abc'),
    ('sample --prompt=pipe.mid', 'pipe.mid'),
    ('sample --prompt=tune.mid --prompt_beats=0', '--prompt_beats'),
    ('sample --prompt=tune.mid --out=tune', 'would be written over: give another --out'),
    ('sample --out=no/folder/x.mid', 'folder'),
    ('sample --out=link', 'cannot write link.mid'),
    ('sample --out=folder', 'cannot write folder.abc'),
    ('sample --out= --num_samples=2', 'cannot write .'),
    ('sample --out=/dev/null', 'cannot write /dev/null'),
]


@pytest.mark.parametrize('command, named', SCRIPTS_BAD)
def test_bad_input_ends_in_one_sentence(trained, book, tmp_path, monkeypatch, command, named):
    monkeypatch.chdir(tmp_path)
    # nothing is composed before all is known to be well
    monkeypatch.setattr(Model, 'compose', None)
    Path('file').write_bytes(b'nothing in particular')
    Path('link.mid').symlink_to('file')
    Path('folder.abc').mkdir()
    Path('fields.abc').write_text('M:6/8\nK:D\n')
    notation.write_midi(np.empty((0, 3)), 'silent.mid')
    notation.write_midi(scripts_dance().notes, 'tune.mid')
    tune = Path('tune.mid').read_bytes()
    Path('last').mkdir()
    shutil.copy(trained['lstm'], 'last/lstm.last.pt')
    for pipe in ('pipe.mid', 'last/rnn.last.pt'):
        os.mkfifo(pipe)
    before = sorted(tmp_path.rglob('*'))
    script, *words = command.split()
    usual = f'--ckpt={trained["rwkv"]}' if script == 'sample' else f'--data={book}'
    assert named in scripts_run(script, usual, *words, status=2)
    assert sorted(tmp_path.rglob('*')) == before and Path('tune.mid').read_bytes() == tune
    assert Path('file').read_bytes() == b'nothing in particular'


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are interrupted, resumed, shared out

def scripts_last(out, arch='rwkv'):
    """What a run ended with: all its tensors, the table without the times, its step and its best loss."""
    saved = torch.load(out / f'{arch}.last.pt', weights_only=True)
    best = torch.load(out / f'{arch}.pt', weights_only=True)
    moments = [x for states in saved['optimizers'] for state in states.values() for x in state.values()]
    rows = [[x for name, x in row.items() if name not in ('minutes', 'frames_per_second')]
            for row in csv.DictReader((out / f'{arch}.csv').open())]
    weights = [*saved['model'].values(), *saved['average'].values(), *best['model'].values()]
    return weights + moments, rows, (saved['run']['step'], best['valid'])


@pytest.mark.parametrize('arch, dtype', [('rwkv', 'bfloat16'), ('lstm', 'float32')])
def test_resume_is_bit_for_bit_the_run_that_never_stopped(book, tmp_path, monkeypatch, arch, dtype):
    options = (f'--arch={arch}', f'--dtype={dtype}', '--max_iters=9', '--eval_interval=4', '--log_interval=3',
               '--dropout=0.3')
    scripts_train(book, tmp_path / 'whole', *options)
    steps = 0
    draw = data.Dataset.batch

    # signals in the middle of the 1st, 4th, 6th and 9th step
    def interrupted(self, batch_size, *rest):
        nonlocal steps
        steps += batch_size > 1
        if batch_size > 1 and steps in (1, 4, 6, 9):
            signal.raise_signal(signal.SIGINT if steps < 5 else signal.SIGTERM)
        return draw(self, batch_size, *rest)

    monkeypatch.setattr(data.Dataset, 'batch', interrupted)
    monkeypatch.setattr(sys, 'orig_argv', ['python', 'train.py', '--out_dir=my run'])
    # a folder is named from where one stands, and stays the same music
    monkeypatch.chdir(book.parent)
    stopped = scripts_train(book.name, tmp_path / 'parts', *options, status=130)
    assert "stopped at step 1; to go on:  python train.py '--out_dir=my run' --resume\n" in stopped
    monkeypatch.chdir(tmp_path)
    for status in (130, 143, 143, 0):
        # all else is remembered
        printed = scripts_run('train', f'--arch={arch}', '--out_dir=parts', '--resume', status=status)
    assert 'going on from parts' in printed and steps == 9
    tensors, *rest = scripts_last(tmp_path / 'whole', arch)
    tensors_of_parts, *rest_of_parts = scripts_last(tmp_path / 'parts', arch)
    assert rest_of_parts == rest and rest[-1][0] == 9
    assert all(torch.equal(a, b) for a, b in zip(tensors, tensors_of_parts, strict=True))


def test_resume_options_given_again_win(book, out):
    scripts_train(book, out, '--resume', '--max_iters=82', '--learning_rate=0', '--block_size=1')
    saved = load_checkpoint(out / 'rwkv.last.pt')[1]
    assert saved['run']['step'] == 82
    assert {'--max_iters=82', '--transpose=0', '--learning_rate=0.0'} <= set(saved['options'])
    for option, named in (('--n_embd=24', 'n_embd 16'), ('--arch=lstm', 'lstm.last.pt')):
        assert named in scripts_train(book, out, '--resume', option, status=2)


def test_resume_on_other_music_is_judged_anew(out, tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    for i in range(4):
        notation.write_midi([(9 * t % 70 + i, t / 4, t) for t in range(50)], other / f'{i}.mid', sharps=2)
    before = load_checkpoint(out / 'rwkv.pt')[1]
    scripts_train(other, out, '--resume', '--max_iters=81')
    after = load_checkpoint(out / 'rwkv.pt')[1]
    assert after['valid'] > 2 * before['valid']
    assert (after['meta']['data'], after['meta']['sharps']) == (str(other), 2)
    # the first model that was validated on it is the best so far, or its last step
    last = load_checkpoint(out / 'rwkv.last.pt')[1]
    assert any(all(torch.equal(after['model'][name], last[kept][name]) for name in last[kept])
               for kept in ('average', 'model'))


# Two runs that go on and save after every step, each killed in its third save: before the new file takes the old one's
# name, and after that. Prints where they stand
SCRIPTS_KILL = """
import os, signal, sys
import model, torch, train

def watch(event, args):
    global saves
    saves += event == 'os.rename' and 'last.pt' in str(args[1])
    if saves == 3 and event == moment:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
out = sys.argv.pop()
for moment in ('os.rename', 'os.remove'):
    saves = 0
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr
        sys.addaudithook(watch)
        train.main()
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    model.load_checkpoint(f'{out}/rwkv.pt')
    step = model.load_checkpoint(f'{out}/rwkv.last.pt')[1]['run']['step']
    print(moment, killed, step, sum(name.endswith('.part') for name in os.listdir(out)), flush=True)
"""


def test_kill_9_in_the_act_of_saving_leaves_a_checkpoint(out):
    words = [f'--out_dir={out}', '--eval_interval=1', '--max_iters=90', '--resume', str(out)]
    done = subprocess.run([sys.executable, '-c', SCRIPTS_KILL, *words], capture_output=True, text=True, timeout=300,
                          env=SCRIPTS_ENV)
    # the second cleared what the first had left
    assert done.stdout.splitlines() == ['os.rename -9 81 1', 'os.remove -9 83 0'], done.stderr


def test_two_runs_of_one_name(book, out, monkeypatch):
    other = os.getppid()
    (out / 'rwkv.pid').write_text(str(other))
    draw = data.Dataset.batch

    # the other run saves its best model, of another size, when this one has found its own
    def batch(self, *rest):
        scripts_untrained(out / 'rwkv.pt', data.AbcText())
        return draw(self, *rest)

    monkeypatch.setattr(data.Dataset, 'batch', batch)
    words = '--resume', '--max_iters=82', '--learning_rate=0', '--min_lr=0', '--eval_interval=1'
    printed = scripts_train(book, out, *words)
    assert f'process {other} is training into {out}/rwkv.* too' in printed
    assert load_checkpoint(out / 'rwkv.pt')[0].config.arch == 'rwkv'
    # and after that nobody is in the way
    assert 'is training into' not in scripts_train(book, out, '--max_iters=1')


@pytest.mark.parametrize('options', [[], ['--resume']])
@pytest.mark.parametrize('named, change', [
    ('loss is nan', lambda nats: nats * math.nan),
    ('gradient is nan', lambda nats: nats.register_hook(lambda g: g * math.inf) and nats),
    ('memory: lower --batch_size', Mock(side_effect=MemoryError())),
    ('memory: lower --batch_size', Mock(side_effect=torch.OutOfMemoryError('CUDA out of memory'))),
    ('memory: lower --batch_size', Mock(side_effect=RuntimeError("CPUAllocator: can't allocate memory: 9")))])
def test_a_step_that_fails_leaves_the_checkpoints(book, out, monkeypatch, named, change, options):
    before = scripts_files(out, '*.pt')
    loss = Model.loss
    monkeypatch.setattr(Model, 'loss', lambda self, *windows: change(loss(self, *windows)))
    assert named in scripts_train(book, out, *options, '--max_iters=85', '--grad_clip=0', status=2)
    assert scripts_files(out, '*.pt') == before


def test_sample_without_enough_memory_says_so(out, monkeypatch):
    monkeypatch.setattr(Model, 'compose', Mock(side_effect=MemoryError()))
    assert 'memory: lower --num_samples' in scripts_run('sample', f'--ckpt={out}/rwkv.pt', status=2)


@pytest.mark.parametrize('name', ['rwkv.pid', 'rwkv.last.pt', 'rwkv.pt', 'rwkv.csv', 'loss.svg'])
def test_full_disk_leaves_the_checkpoints(book, out, monkeypatch, name):
    before = scripts_files(out)
    replace = os.replace

    def full(part, path):
        if Path(path).name == name:
            raise OSError(28, 'No space left on device')
        replace(part, path)

    monkeypatch.setattr(os, 'replace', full)
    assert f'{name} (No space left' in scripts_train(book, out, '--resume', '--max_iters=82', status=2)
    after = scripts_files(out)
    assert after.get(name) == before.get(name) and not any('.part' in name for name in after)
    for path in out.glob('*.pt'):
        load_checkpoint(path)


def scripts_close(a, b):
    return all(torch.allclose(x, y, rtol=1e-3, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_two_processes_with_batch_4_train_as_one_with_batch_8(book, tmp_path):
    options = ['--batch_size=8', '--max_iters=6', '--eval_interval=3', '--log_interval=2', '--dropout=0',
               '--grad_clip=0', '--arch=lstm']
    # so many that both have songs to validate on
    for split in data.SPLITS:
        shutil.copytree(book, tmp_path / 'books' / split)
    book = tmp_path / 'books'
    scripts_train(book, tmp_path / 'one', *options)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local_addr=127.0.0.1',
               '--nproc_per_node=2', data.HERE / 'train.py', f'--data={book}', f'--out_dir={tmp_path}/two',
               *SCRIPTS_TINY, *options, '--gradient_accumulation_steps=2']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=SCRIPTS_ENV)
    assert done.returncode == 0, done.stderr
    # one speaks
    assert '2 processes' in done.stdout and done.stdout.count('\nstep 6: valid') == done.stdout.count('\ntest: ') == 1
    one, rows, _ = scripts_last(tmp_path / 'one', 'lstm')
    two, rows_of_two, _ = scripts_last(tmp_path / 'two', 'lstm')
    assert scripts_close(one, two)
    scripts_train(book, tmp_path / 'other', *options, '--batch_size=4')
    assert not scripts_close(one, scripts_last(tmp_path / 'other', 'lstm')[0])
    # validation and test, of which each process did a share
    for a, b in zip(rows, rows_of_two, strict=True):
        assert [float(x or 0) for x in a] == pytest.approx([float(x or 0) for x in b], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The parts of train.py

@pytest.mark.parametrize('shape', [(3, 32, 32), (2, 48, 16), (2, 16, 48), (1, 64, 1)])
def test_muon_moves_matrices_alike_in_all_directions(shape):
    U, _, V = np.linalg.svd(np.random.default_rng(0).normal(size=shape), full_matrices=False)
    rank = U.shape[2]
    G = torch.tensor(U * np.geomspace(1, 1 / 8, rank) @ V)
    X = train.orthogonal(G)
    # the directions are those of G, and none is much longer than another
    inside = U.swapaxes(1, 2) @ X.numpy() @ V.swapaxes(1, 2)
    sizes = np.diagonal(inside, axis1=1, axis2=2)
    np.testing.assert_allclose(inside, sizes[:, None] * np.eye(rank), atol=1e-9)
    assert X.shape == shape and sizes.min() > 0.68 and sizes.max() < 1.22
    # one at a time, at any length, in any type
    torch.testing.assert_close(train.orthogonal(G[-1:]), X[-1:])
    torch.testing.assert_close(train.orthogonal(1e-3 * G), X, rtol=0, atol=1e-4)
    torch.testing.assert_close(train.orthogonal(G.bfloat16()), X.bfloat16(), rtol=0, atol=2 ** -5)


def test_muon_steps_by_momentum_shape_and_decay():
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((8, 2), (2, 8), (8, 2))]
    wanted = [p.detach().clone() for p in matrices]
    momentum = [torch.zeros_like(p) for p in matrices]
    muon = train.Muon(matrices, lr=0.1, weight_decay=0.5, dtype=torch.float64)
    for _ in range(3):
        for i, p in enumerate(matrices):
            p.grad = torch.randn_like(p)
            momentum[i] = 0.95 * momentum[i] + 0.05 * p.grad
            X = train.orthogonal((0.95 * momentum[i] + 0.05 * p.grad).unsqueeze(0))[0]
            wanted[i] = wanted[i] * (1 - 0.1 * 0.5) - 0.1 * max(1, len(p) / len(p.T)) ** 0.5 * X
        muon.step()
    torch.testing.assert_close([p.detach() for p in matrices], wanted)


@pytest.mark.parametrize('arch', ['rnn', 'lstm', 'rwkv', 'transformer'])
def test_weight_decay_is_for_matrices_only(arch):
    model = Model(Config(9, arch, n_layer=2, n_embd=8, lookback=4, beat=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = train.parse_args(['--learning_rate=0.1', '--weight_decay=0.5', '--dtype=float32'])
    adamw, muon = train.make_optimizers(model, args)
    inner = {id(p) for group in muon.param_groups for p in group['params']}
    assert inner == {id(p) for name, p in model.named_parameters() if name.startswith('blocks.') and p.dim() == 2}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw.step()
    muon.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() == 2 else 1), msg=name)


def test_average_of_the_weights_follows_the_last_tenth():
    model = torch.nn.Linear(1, 1)
    average = torch.nn.Linear(1, 1)
    for step in range(1, 1001):
        torch.nn.init.constant_(model.weight, step)
        train.update_average(average, model, step)
        # the mean of step s weighted by s^9, the first ten steps being too few for one
        assert step > 10 or average.weight.item() == step
    assert average.weight.item() == pytest.approx(1001 * 10 / 11)
    assert torch.equal(average.bias, model.bias)


def test_windows_are_moved_less_and_less():
    args = train.parse_args(['--transpose=6'])
    assert [train.transpose_at(done, args) for done in (0, 0.25, 0.5, 0.67, 1)] == [6, 4, 2, 0, 0]


def test_learning_rate_warms_up_and_decays():
    args = train.parse_args(['--learning_rate=1', '--min_lr=0.1', '--warmup_iters=9'])
    assert [train.lr_at(step, 0, args) for step in (0, 4, 9, 99)] == pytest.approx([0.1, 0.5, 1, 1])
    assert [train.lr_at(99, done, args) for done in (0.25, 0.5, 1)] == pytest.approx([0.1 + 0.9 * 0.8535534, 0.55, 0.1])


@pytest.mark.parametrize('words, step_takes, validation_takes, wanted', [
    ('--max_iters=2000 --max_minutes=0', 0.2, 1.0, 21),
    ('--max_iters=150 --max_minutes=0', 0.2, 1.0, 4),
    ('--max_iters=10 --max_minutes=0', 0.2, 1.0, 2),
    ('--max_iters=90 --max_minutes=0 --eval_interval=30', 0.2, 1.0, 4),
    ('--max_minutes=8', 0.2, 0.7, 21),
    ('--max_minutes=8', 8.0, 24.0, 2)])
def test_validations_are_about_twenty(words, step_takes, validation_takes, wanted):
    args = train.parse_args(words.split())
    run = train.Run()
    at = []
    done = 0
    while done < 1:
        done = train.progress(run, args)
        if train.is_due(run, done, args):
            at.append(done)
            run.validated = int(done * train.VALIDATIONS)
            run.validated_at = run.step
            run.seconds += validation_takes
        run.step += 1
        run.seconds += step_takes
    assert len(at) == wanted and at[0] == 0 and at[-1] == 1, at
    assert wanted < 20 or np.diff(at).max() < 0.07


def test_validations_go_on_where_a_finished_run_is_made_longer():
    args = train.parse_args(['--max_iters=4000', '--max_minutes=0'])
    run = train.Run(step=2000, validated=train.VALIDATIONS, validated_at=2000)
    while not train.is_due(run, train.progress(run, args), args):
        run.step += 1
    assert run.step == 2000 + 10 * train.EVAL_STEPS


@pytest.mark.parametrize('flags, has', [
    ('flags: fpu avx512f avx512_bf16 amx_tile', True), ('flags: fpu amx_bf16', True), ('', False),
    ('Features: asimd svebf16 bf16 i8mm', True), ('flags: fpu avx2 avx512f avx512vl', False)])
def test_bfloat16_where_the_processor_multiplies_in_it(monkeypatch, flags, has):
    monkeypatch.setattr(Path, 'exists', lambda self: True)
    monkeypatch.setattr(Path, 'read_text', lambda self: flags)
    args = train.parse_args([])
    train.complete(args, torch.device('cpu'), 1)
    assert args.dtype == ('bfloat16' if has else 'float32')
    monkeypatch.setattr(Path, 'exists', lambda self: False)
    assert not train.has_bfloat16(torch.device('cpu'))


@pytest.mark.parametrize('last, best', [(2.0, 3.0), (3.0, 2.0), (2.0, 2.0)])
def test_train_all_validation_songs_decide_between_the_last_model_and_the_best_by_a_sample(
        book, tmp_path, monkeypatch, last, best):
    setup = train.set_up(train.parse_args([f'--data={book}', f'--out_dir={tmp_path}', '--block_size=16', '--n_embd=8']))
    weight = setup.model.emb.weight
    run = train.Run(weights={name: value.clone() for name, value in setup.model.state_dict().items()})
    run.weights['emb.weight'].fill_(best)
    torch.nn.init.constant_(weight, last)
    monkeypatch.setattr(train, 'evaluate', lambda model, *_: train.Score(model.emb.weight.mean().item(), 0.0, 1, 1))
    train.finish(setup, run)
    kept, checkpoint = load_checkpoint(setup.best)
    assert checkpoint['valid'] == checkpoint['scores']['test']['frame'] == kept.emb.weight.mean() == min(last, best)


@pytest.mark.parametrize('words, device, wanted', [
    ('', 'cpu', Config(177, lookback=256, beat=4, form=64)),
    ('--form=no', 'cpu', Config(177, lookback=256, beat=4)),
    ('', 'cuda', Config(177, n_layer=6, n_embd=384, lookback=256, beat=4, form=64)),
    ('--representation=events --lookback=2 --dropout=0.25 --n_layer=2 --n_embd=16', 'cpu',
     Config(273, head='softmax', n_layer=2, n_embd=16, dropout=0.25, lookback=14, beat=12, shift=176)),
    ('--arch=transformer --head=bernoulli --window=99 --n_embd=16 --clock=no --lookback=0 --onsets=no', 'cpu',
     Config(89, 'transformer', 'bernoulli', n_embd=16, window=99))])
def test_train_options_make_the_model(words, device, wanted):
    args = train.parse_args(['--dtype=float32', *words.split()])
    train.complete(args, torch.device(device), 1)
    assert train.make_config(args, train.make_representation(args), torch.device(device)) == wanted


@pytest.mark.parametrize('arch, name, dtype, history, told', [
    ('rnn', 'abc', 'float32', 256, 0), ('transformer', 'events', 'bfloat16', 448, 0),
    ('lstm', 'piano_roll', 'float32', 256, 0.5)])
def test_train_makes_the_step_that_the_options_ask_for(book, tmp_path, monkeypatch, arch, name, dtype, history, told):
    asked = []
    draw = data.Dataset.batch
    loss = Model.loss
    monkeypatch.setattr(data.Dataset, 'batch', lambda self, *words: asked.append(words) or draw(self, *words))
    monkeypatch.setattr(Model, 'loss', lambda *words: asked.append(torch.is_autocast_enabled('cpu')) or loss(*words))
    scripts_train(book, tmp_path, f'--arch={arch}', f'--representation={name}', f'--dtype={dtype}', '--common_key=yes',
                  '--max_iters=1', '--learning_rate=0.1', '--warmup_iters=9', '--grad_clip=0.01')
    *_, (*sizes, _, before, share), autocast = asked
    assert (sizes, before, share, autocast) == ([4, 32, 6], history, told, dtype == 'bfloat16')
    _, saved = load_checkpoint(tmp_path / f'{arch}.last.pt')
    assert saved['meta']['representation']['name'] == name and saved['meta']['common_key']
    assert bool(saved['meta']['forms']) == bool(told)
    # AdamW's first step moves what began at 0 by the learning rate, of which a tenth is warm
    assert saved['model']['ln_out.bias'].abs().max().item() == pytest.approx(0.01, rel=0.01)
    # both optimisers remember a share of the gradient
    adamw, muon = saved['optimizers']
    grads = [state['exp_avg'] / 0.1 for state in adamw.values()] + [state['momentum'] / 0.05 for state in muon.values()]
    assert torch.cat([grad.flatten() for grad in grads]).norm().item() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize('nodes, command', [
    (1, "torchrun --standalone --nproc_per_node=2 train.py '--out_dir=my run' --resume"),
    (2, 'the torchrun command of each node, with --resume')])
def test_train_command_to_go_on_with_torchrun(monkeypatch, nodes, command):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--out_dir=my run'])
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setenv('WORLD_SIZE', str(2 * nodes))
    assert train.go_on_command() == command


@pytest.mark.parametrize('script, told', [
    ('train', '(default: 8.0)'), ('sample', '(default: 256.0)'), ('compare', '(default: out/compare)'),
    ('data', 'the .npz to write')])
def test_help_tells_the_options_and_their_defaults(script, told):
    assert told in scripts_run(script, '--help')


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files: `python test_model.py 20000` reads so many mutated files, and prints how it went; the test reads a few

def hostile_mutate(rng, blob, others):
    """A copy of bytes in which up to three pieces are something else."""
    numbers = 0, 1, 127, 128, 255, 2 ** 15 - 1, 2 ** 24 - 1, 2 ** 28 - 1, 2 ** 31, 2 ** 64 - 1, len(blob)
    for _ in range(rng.randint(0, 3)):
        start = rng.randrange(len(blob) + 1)
        end = min(len(blob), start + rng.choice([1, 4, 200, len(blob)]))
        piece = blob[start:end]
        number = rng.choice(numbers)
        other = rng.choice(others)
        there = rng.randrange(len(other))
        piece = rng.choice([
            b'',
            bytes(byte ^ 1 << rng.randrange(8) for byte in piece[:16]) + piece[16:],
            number.to_bytes(8, rng.choice(['big', 'little'])),
            (number % 256).to_bytes(1, 'big'),
            other[there:there + rng.randint(1, 4000)],
            piece[:200] * int(2 ** rng.uniform(0, 8))])
        blob = blob[:start] + piece + blob[end:]
    return blob[:1 << 18]


def hostile_mutate_member(rng, blob, others):
    """A sound zip in which one member is mutated, so that its checksum does not give it away."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(blob)) as old, zipfile.ZipFile(buffer, 'w') as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, hostile_mutate(rng, content, others) if name == chosen else content)
    return buffer.getvalue()


def hostile_sound_files(path):
    """{kind: [bytes]}: files of each kind as they should be, written at path in turn."""
    tunes = data.TUNES.read_text(encoding='utf-8').split('\n\nX:')[1:]
    sound = dict(abc=['\n\nX:'.join(['', *tunes[i:i + 4]]).encode() for i in range(0, 40, 4)], mid=[], zip=[], pt=[])
    songs = notation.read_abc(b''.join(sound['abc']))
    for i, song in enumerate(songs[:9]):
        notation.write_midi(song.notes, path, name='x' * 40, sharps=i - 4, metre='6/8')
        sound['mid'].append(path.read_bytes())
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, 'w', method) as z:
            z.writestr('train/1.mid', sound['mid'][0])
            z.writestr('valid/b.abc', sound['abc'][0])
        sound['zip'].append(path.read_bytes())
    for arch in ('rwkv', 'lstm'):
        save_checkpoint(path, Model(Config(9, arch, n_layer=1, n_embd=8, lookback=2)), meta=dict(data='a'), step=1)
        sound['pt'].append(path.read_bytes())
    data.save_songs(path, [('a.abc', song) for song in songs], [])
    return sound | dict(npz=[path.read_bytes()])


def hostile_read(path):
    """Is it music or a model? If not, it is refused in one sentence that names it."""
    try:
        if path.suffix == '.pt':
            return bool(load_checkpoint(path)[0])
        for song in itertools.chain(*data.load(path, log=str).songs.values()):
            key, onset, end = song.notes.T
            assert len(key) and ((0 <= key) & (key < 88) & (0 <= onset) & (onset <= end) & np.isfinite(end)).all()
        return True
    except UserError as e:
        assert str(path) in str(e) and '\n' not in str(e), str(e)
        return False


def survive(count, folder):
    """Reads mutated files, as many as asked for in all; returns what became of them. Each costs 2 s at most, all
    together 500 MB, and none changes anything."""
    sound = hostile_sound_files(folder / 'a')
    result = {kind: Counter() for kind in sound}
    changes = []

    # Python itself tells of every file opened, changed or removed, of processes and connections
    def watch(event, args):
        reads = event in ('os.listdir', 'os.scandir', 'os.walk') or event == 'open' and args[1] in ('r', 'rb')
        if event.split('.')[0] in ('open', 'os', 'shutil', 'socket', 'subprocess') and not reads:
            changes.append((event, *args))

    sys.addaudithook(watch)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 << 20 if sys.platform == 'darwin' else 1 << 10
    kinds = [(kind, hostile_mutate) for kind in sound] + [(kind, hostile_mutate_member) for kind in ('zip', 'pt')]
    for i, (kind, mutate) in enumerate(itertools.islice(itertools.cycle(kinds), count)):
        rng = random.Random(i)
        path = folder / f'x.{kind}'
        path.write_bytes(mutate(rng, rng.choice(sound[kind]), sound[kind]))
        changes.clear()
        start = time.process_time()
        with contextlib.redirect_stderr(io.StringIO()) as told:
            read = hostile_read(path)
        seconds = time.process_time() - start
        megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / unit
        result[kind].update(files=1, read=read, seconds=seconds)
        assert seconds < 2 and megabytes < 500 and len(told.getvalue()) < 10_000, (path, seconds, megabytes)
        assert not changes, (path, changes)
    return result


def test_hostile_files(tmp_path):
    # in a process of its own, since neither the most memory that one has had nor an audit hook goes away
    done = subprocess.run([sys.executable, __file__, '400', tmp_path], capture_output=True, text=True, env=SCRIPTS_ENV)
    assert done.returncode == 0, done.stderr
    assert all(0 < row['read'] < row['files'] for row in json.loads(done.stdout).values())


# ---------------------------------------------------------------------------------------------------------------------
# render.py

RENDER_TUNE = [[39, 0, 2], [43, 0, 2], [51, 0, 1], [53, 1, 1.5], [51, 1.5, 2], [39, 2, 4], [43, 2, 4], [56, 2, 4]]


# the strongest and the weakest beat
@pytest.mark.parametrize('onset', [0, 1.5])
@pytest.mark.parametrize('key', [0, 12, 31, 48, 75, 87])
def test_render_loudest_partial_is_the_key(key, onset):
    sound = render.synthesise([[key, onset, onset + 2]])[int(onset * 22050):][:44100].astype(float)
    for side in (sound[:, 0], sound[:, 1], sound.sum(1)):
        spectrum = np.abs(np.fft.rfft(side * np.hanning(len(side)), 1 << 18))
        assert abs(48 + 12 * math.log2(spectrum.argmax() * 44100 / (1 << 18) / 440) - key) < 0.5


def test_render_silence_is_silent_and_nothing_clips():
    assert render.synthesise([]).shape == (0, 2)
    # half a second a beat
    notes = [[40, 2, 3], [44, 20, 21], [48, 20, 21], [52, 20, 21]]
    sound = render.synthesise(notes)
    assert sound.dtype == np.int16 and not sound[:44100].any() and sound[44100:66150].any()
    assert not sound[int(3.5 * 44100):10 * 44100].any() and sound[10 * 44100:].any() and not sound[-1].any()
    assert np.abs(sound.astype(int)).max() == round(0.9 * 32767) and np.abs(sound.mean(0)).max() < 1
    assert np.array_equal(sound, render.synthesise(notes))


def test_render_no_click_where_notes_begin_and_end():
    notes = np.array([[48, 0, 1], [48, 1, 2], [52, 2, 2.5], [48, 3, 5]])
    sound = render.synthesise(notes).astype(float)
    # a click is wide band: above 14 kHz, where no partial is, there is nothing but the rounding to 16 bits
    spectrum = np.fft.rfft(sound, axis=0)
    spectrum[np.fft.rfftfreq(len(sound), 1 / 44100) < 14000] = 0
    assert np.abs(np.fft.irfft(spectrum, axis=0)).max() < 2


@pytest.mark.parametrize('metre, pickup, bar, beat, off', [
    ('4/4', 0, 4, 1, 0.5), ('4/4', 1, 1, 2, 2.5), ('3/4', 0, 3, 1, 1.5), ('6/8', 0, 3, 1.5, 1),
    ('2/4', 0.5, 2.5, 3.5, 1), ('9/8', 1.5, 6, 3, 2), ('2/2', 0, 4, 2, 1)])
def test_render_accents(metre, pickup, bar, beat, off):
    assert render.accents(np.array([bar, beat, off]), metre, pickup).tolist() == [1, 0.85, 0.7]
    # players are never quite on the beat
    assert render.accents(np.array([bar - 0.01, beat + 0.01]), metre, pickup).tolist() == [1, 0.85]


def test_render_beats_and_sides():
    def level(notes, beat):
        """Loudness of both sides in the third of a second from a beat on, with a pickup of 1."""
        part = render.synthesise(notes, 60, '4/4', 1)[int(beat * 44100):][:14700].astype(float)
        return np.sqrt((part ** 2).mean(0))
    notes = [[48, at, at + 0.5] for at in (1, 6, 11.5)]
    bar, beat, off = [level(notes, at).sum() for at in (1, 6, 11.5)]
    assert bar > 1.1 * beat > 1.2 * off
    assert np.diff(level([[10, 0, 1]], 0)) < 0 < np.diff(level([[80, 0, 1]], 0))


def test_render_wav_file(tmp_path):
    path = tmp_path / 'a.wav'
    render.write_wav(RENDER_TUNE, path, 60, '3/4', 1.0)
    with wave.open(str(path)) as f:
        assert (f.getnchannels(), f.getsampwidth(), f.getframerate(), f.getcomptype()) == (2, 2, 44100, 'NONE')
        assert 4 < f.getnframes() / 44100 < 5.5
        samples = np.frombuffer(f.readframes(f.getnframes()), '<i2').reshape(-1, 2)
    assert np.array_equal(samples, render.synthesise(RENDER_TUNE, 60, '3/4', 1.0))
    with pytest.raises(UserError, match='minutes'):
        render.write_wav([[40, 0, 1e6], [40, 1e6, 1e6 + 1]], path)


SVG = '{http://www.w3.org/2000/svg}'


def render_marks(path, style):
    """The numbers of each stroke of a style, 'M1 2H3' as (1, 2, 3)."""
    strokes = [p.get('d') for p in ET.parse(path).iter(SVG + 'path') if p.get('class') == style]
    return [tuple(map(float, re.findall(r'[\d.]+', mark))) for d in strokes for mark in d.split('M')[1:]]


def render_texts(path, style=''):
    return [t.text for t in ET.parse(path).iter(SVG + 'text') if t.text and t.get('class').startswith(style)]


def test_render_piano_roll(tmp_path):
    path = tmp_path / 'a.svg'
    render.write_svg(RENDER_TUNE, path, title='<Fish & "Chips">\0', prompt_beats=2)
    assert ET.parse(path).getroot().find(SVG + 'title').text == '<Fish & "Chips">'
    # a beat has 14.25 pixels, a key five: the two octaves end at 148, C4 is at 145.5
    assert render_marks(path, 'c0') == [
        (40, 85.5, 53.2), (54.2, 75.5, 60.4), (61.4, 85.5, 67.5), (68.5, 60.5, 96.0)]
    assert [mark[:2] for mark in render_marks(path, 'c1')] == [(40, 145.5), (40, 125.5), (68.5, 145.5), (68.5, 125.5)]
    assert render_texts(path, 'end') == ['C4', 'C5']
    assert render_marks(path, 'prompt') == [(40, 88, 68.5)]
    render.write_svg([], path)
    assert not render_marks(path, 'c0') + render_marks(path, 'c1')
    render.write_svg([[0, 0, 1], [87, 0, 1]], path)
    assert render_texts(path, 'end') == [f'C{i}' for i in range(9)]


@pytest.mark.parametrize('metre, bar, pickup', [('3/4', 3, 0), ('4/4', 4, 1), ('6/8', 3, 0.5), ('9/8', 4.5, 1.5)])
def test_render_bar_lines_and_long_tunes(tmp_path, metre, bar, pickup):
    path = tmp_path / 'a.svg'
    beats = pickup + 40 * bar
    notes = [[51 + i % 12, i / 2, i / 2 + 0.5] for i in range(int(2 * beats))]
    notes += [[27 + k, pickup + i * bar, pickup + i * bar + bar] for i in range(40) for k in (0, 4, 7)]
    render.write_svg(notes, path, metre, pickup)
    # sixteen bars to a line, all of the same scale, below one another
    expected = [40 + (pickup / bar + i % 16) * 912 / (16 + pickup / bar) for i in range(40)]
    upright = [d for d in (p.get('d') for p in ET.parse(path).iter(SVG + 'path')) if 'V' in d]
    assert [float(d[1:].split()[0]) for d in upright] == pytest.approx(expected, abs=0.01)
    assert len(render_marks(path, 'c0')) == int(2 * beats) and len(render_marks(path, 'c1')) == 120
    assert [text for text in render_texts(path) if text.isdecimal()] == [str(i + 1) for i in range(40)]
    assert path.stat().st_size < 40_000


def test_render_colours_are_readable_on_both_pages():
    def light(colour):
        """Relative luminance of '#rrggbb' by WCAG 2."""
        rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        return (0.2126, 0.7152, 0.0722) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    styles = render.STYLE.split('@media(prefers-color-scheme:dark)')
    for page, style in zip(('#ffffff', '#0d1117'), styles):
        lights = [light(colour) + 0.05 for colour in re.findall(r'[{;]color:(#\w{6})', style)]
        paper = light(page) + 0.05
        assert len(lights) == 8 and all(max(paper / ink, ink / paper) > 4.5 for ink in lights)


def test_render_terminal_roll():
    notes = [[39, 0, 1], [39, 1, 2], [44, 0.5, 0.75]]
    assert render.terminal_roll(notes) == 'F4     ■\nC4   ■───■───\nbeats 1 to 2 of 2'
    assert render.terminal_roll([]) == 'beats 1 to 0 of 0'
    long = render.terminal_roll([[k % 88, k / 3, k / 3 + 5] for k in range(300)], width=40).split('\n')
    assert max(map(len, long)) <= 40 and long[-1] == 'beats 1 to 8 of 105'


def render_run(path, losses, interval=500):
    """A table as train.py writes it, with rows of training between those of validation."""
    table = ['iter,minutes,valid,train,lr,frames_per_second,test']
    for i, loss in enumerate(losses):
        table += [f'{i * interval},{i * 0.7},{loss},,,,', f'{i * interval + 50},{i * 0.7 + 0.1},,2.5,0.001,9000,']
    path.write_text('\n'.join(table) + '\n')


def test_render_loss_chart(tmp_path):
    assert render.draw_losses(tmp_path) is None and not list(tmp_path.iterdir())
    render_run(tmp_path / 'rwkv.csv', [20.5, 2.6, 2.2, 2.0, 1.95, 1.96])
    render_run(tmp_path / 'lstm & <co>.csv', [20.4, 2.7, 2.3, 2.1, 2.0, 1.965])
    render_run(tmp_path / 'nan.csv', [math.nan, math.inf])
    (tmp_path / 'foreign.csv').write_text('a,b\n1,2\n')
    (tmp_path / 'binary.csv').write_bytes(b'iter,minutes,valid\n\xff\0\xfe')
    (tmp_path / 'folder.csv').mkdir()
    path = render.draw_losses(tmp_path)
    assert path == tmp_path / 'loss.svg'
    assert render_texts(path, 'c') == ['lstm & <co> 1.965', 'rwkv 1.950']
    # the untrained 20 does not flatten the rest
    texts = render_texts(path)
    assert {'iterations', 'minutes', '2000', '2', '2.6', '1'} <= set(texts) and '20' not in texts
    # both curves end at the right edge of both panels, the lower loss below
    curves = [render_marks(path, style) for style in ('c0', 'c1')]
    assert [[mark[-3] for mark in curve] for curve in curves] == [[394, 768], [394, 768]]
    assert 34 < curves[0][0][-2] < curves[1][0][-2] < 314
    # many runs, some with a single point
    for i in range(30):
        render_run(tmp_path / f'run{i:02}.csv', [20.25])
    root = ET.parse(render.draw_losses(tmp_path)).getroot()
    names = [t for t in root.iter(SVG + 'text') if t.get('class').startswith('c')]
    assert len(names) == 32 and names[1].text == 'run00 20.250'
    assert float(names[-1].get('y')) < float(root.get('height'))


@pytest.mark.parametrize('low, high', [(0, 1), (0, 4200), (0.4, 0.6), (1.93, 2.7), (0, 0.05), (0, 95000), (5.1, 5.4)])
def test_render_ticks_are_round(low, high):
    ticks = render.ticks(low, high)
    assert 3 <= len(ticks) <= 8 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(abs(float(f'{tick:g}') - tick) < 1e-9 and len(f'{tick:g}') <= 5 for tick in ticks)


# ---------------------------------------------------------------------------------------------------------------------
# compare.py

# C D E C over C, then B3 F# G, and home to C, over G and C: (key, onset, end), C4 is key 39
COMPARE_TUNE = np.array(
    [[39, 0, 1], [41, 1, 1.5], [43, 1.5, 2], [39, 2, 4], [15, 0, 4], [19, 0, 4], [22, 0, 4],
     [38, 4, 5], [45, 5, 5.25], [46, 5.25, 6], [46, 6, 7], [51, 7, 8], [22, 4, 6], [26, 4, 6], [15, 6, 8]])


def compare_line(keys):
    """A melody of notes of a beat, without chords."""
    return np.array([[key, i, i + 1.0] for i, key in enumerate(keys)])


def compare_features(notes, old=()):
    """{feature: number} of a tune; old: the training songs that it may copy."""
    book = data.copy_book([np.zeros(0, dtype=np.int64), *[data.intervals(song, 4) for song in old]])
    return compare.all_features(notes, book)


def test_compare_features_of_a_small_tune():
    found = compare_features(COMPARE_TUNE)
    shares = np.array([5, 1, 2, 1, 4, 2]) / 15
    wanted = {
        # all but F#
        'notes in scale': 14 / 15,
        # C E C over C, B and G G over G, C over C; not D, not F#. The second G stands over C
        'melody on chord': 6 / 9, 'last on tonic': 1, 'pitch entropy': -(shares * np.log2(shares)).sum(),
        'interval size': (2 + 2 + 4 + 1 + 7 + 1 + 0 + 5) / 8, 'leaps': 2 / 8, 'repeated notes': 1 / 8,
        'melody range': 13, 'note length': 8 / 9, 'melody notes a beat': 9 / 8, 'on beat': 7 / 9,
        'off half beat': 1 / 9,
        'chord changes a beat': 2 / 8, 'chords below': 1, 'polyphony': (8 + 12 + 4 + 2) / 8, 'repeats': 0, 'circles': 0,
        'beats': 8, 'ended': 1, 'copied': 0}
    assert found == pytest.approx({'whole bars': found['whole bars']} | wanted)
    # bars of four beats, by the chords
    chords = [[15 + 2 * (i % 2) + k, 4 * i, 4 * i + 4] for i in range(8) for k in (0, 4, 7)]
    for beats, whole in ((32, True), (33, False)):
        tune = np.concatenate([chords, compare_line(39 + np.arange(beats) % 8)])
        assert compare_features(tune)['whole bars'] == whole


def test_compare_features_do_not_depend_on_key_or_touch():
    for same in (COMPARE_TUNE + [3, 0, 0], COMPARE_TUNE - [0, 0, 1 / 480]):
        assert compare_features(same) == pytest.approx(compare_features(COMPARE_TUNE))
    found = compare_features(np.array([[39, 0, 1]]))
    assert math.isnan(found['interval size']) and math.isnan(found['melody on chord'])
    assert (found['beats'], found['notes in scale'], found['chords below'], found['circles']) == (1, 1, 0, 0)


def test_compare_repeats_and_circles():
    first = [39, 41, 43, 44, 46, 48, 50, 51]
    second = [51, 46, 43, 39, 44, 41, 38, 39]
    tunes = {
        'AB': (first + second, 0, 0),
        'AAB': (first * 2 + second, 1 / 3, 0),
        'ABA': (first + second + first, 1 / 3, 0),
        'AAA': (first * 3, 2 / 3, 1),
        'a four times': (second + first[:4] * 4, 0.5, 1),
        'a twice': (second + first[:4] * 2, 0, 0)}
    for name, (keys, share, circling) in tunes.items():
        found = compare_features(compare_line(keys))
        assert (found['repeats'], found['circles']) == (pytest.approx(share), circling), name
    # of hours of music, or silence, the first part is enough
    for begin in (0, 9000):
        assert compare_features(np.array([[39, begin, begin + 1], [41, begin + 1, 20_000]]))['beats'] == 1000
    # a long note is none
    assert compare_features(np.array([[39, 0, 11.5]]))['circles'] == 0


def test_compare_distance_by_hand():
    for a, b, apart in (([1, 2, 3], [1, 2, 3], 0), ([1, 2], [3, 4, 5], 1), ([1, 2, 3, 4], [0, 1, 2], 0.5),
                        ([1, 1], [1, 0], 0.5), ([], [1], 1), ([1], [], 1), ([], [], 0)):
        assert compare.distance(np.array(a), np.array(b)) == apart


def test_compare_longest_copy():
    rng = np.random.default_rng(0)
    old = compare_line(rng.integers(20, 60, 200))
    new = compare_line(rng.integers(20, 60, 100))
    # a passage of 40 notes, a third higher
    new[30:70, 0] = old[100:140, 0] + 4
    songs = [compare_line(rng.integers(20, 60, 50)), old]
    # from the first of the forty notes to the last
    assert compare_features(new, songs)['copied'] == 39
    # at double speed it is another tune, and a copy does not run from one song into the next
    assert compare_features(new * [1, 0.5, 0.5], songs)['copied'] <= 1
    assert compare_features(old, [old[:100], old[100:]])['copied'] == 99


def compare_form(*parts):
    """A form of parts (back, frames), the last of which comes home to C."""
    length = sum(frames for _, frames in parts)
    return dict(metre='3/4', sixteenths=False, bar=6, pickup=2, parts=list(parts), homes=[(length - 3, 3, 1)],
                chords=[0])


def compare_model(folder, arch, representation, forms=()):
    """A small untrained model, as train.py would leave it, and music for it."""
    rng = np.random.default_rng(0)
    for split in ('train', 'valid', 'test'):
        (folder / 'music' / split).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            notation.write_midi(compare_line(rng.integers(39, 51, 16)), folder / 'music' / split / f'{i}.mid')
    meta = dict(data=str(folder / 'music'), source='music', representation=representation.settings, common_key=False,
                tempo=120.0, forms=forms)
    torch.manual_seed(0)
    config = Config(representation.V, arch, representation.heads[-1], n_layer=1, n_embd=8, lookback=4,
                    beat=representation.beat, shift=representation.shift)
    net = Model(config)
    if config.head == 'bernoulli':
        # few keys at a time, and now and then an end
        torch.nn.init.constant_(net.head.out.bias, -4.0)
    save_checkpoint(folder / f'{arch}.pt', net, meta=meta, step=1, valid=1.0)


def test_compare_best_are_as_a_whole_like_the_songs():
    rng = np.random.default_rng(0)
    slow = [Song('', compare_line(39 + rng.integers(0, 13, 32))) for _ in range(5)]
    fast = [song._replace(notes=song.notes * [1, 0.5, 0.5]) for song in slow]
    songs = slow + fast
    circling = compare.Tune(Song('', compare_line([39, 41] * 16)), 0.1, True)
    endless = [compare.Tune(song, 0.5, False) for song in songs]
    real = [compare.Tune(song, 0.9, True) for song in songs]
    # one alone is not what no song is
    assert compare.best([circling, endless[3], real[3]], songs, 1)[0] is real[3]
    # among many slow tunes and a few fast ones, half of those taken are fast, as half of the songs are
    taken = compare.best([circling, *endless[:5], *real[:7]], songs, 4)
    assert sorted(tune.song.notes[0, 2] for tune in taken) == [0.5, 0.5, 1, 1]
    assert all(tune.ended and tune is not circling for tune in taken)
    # a fast one that is like no song in all else does not stand in for the fast songs
    wrong = circling._replace(song=Song('', circling.song.notes * [1, 0.5, 0.5]))
    assert all(tune is not wrong for tune in compare.best([wrong, *real[:3]], songs, 3))
    # no tune is taken twice
    tunes = [circling, *endless, *real]
    assert sorted(map(id, compare.best(tunes, songs, 40))) == sorted(map(id, tunes))
    # with one song, and without any, those that ended come first
    assert compare.best([endless[0], real[0]], songs[:1], 1)[0] is real[0]
    assert compare.best([endless[0], circling, real[1]], [], 2) == [circling, real[1]]


@pytest.mark.parametrize('asked, representation, taken', [
    (None, data.PianoRoll(2), 0.99), (None, data.Events(), 1), (None, data.AbcText(), 0.98),
    (0.5, data.AbcText(), 0.5)])
def test_compare_composing_has_the_nucleus_of_the_representation(monkeypatch, asked, representation, taken):
    calls = scripts_pretend(monkeypatch, np.zeros((1, representation.V), np.uint8))
    steps = representation.frames_per_beat
    net = Model(Config(representation.V, head=representation.heads[0], n_layer=1, n_embd=8))
    args = SimpleNamespace(length=2, min_length=1, temperature=1, top_p=asked)
    assert compare.compose(net, representation, np.zeros((0, representation.V), np.uint8), 3, args, None) == ([], 3)
    call, = calls
    assert call.plan is None and call.go_on is None and call.top_p == taken
    assert (call.prompt.shape, call.length, call.at_least) == ((3, 1, representation.V), 2 * steps, steps)
    assert call.prompt[:, 0, -1].all() and call.prompt.sum() == 3


def test_compare_composes_a_few_tunes_at_a_time(monkeypatch):
    roll = data.PianoRoll(2)
    frames = roll.encode(scripts_dance())
    calls = scripts_pretend(monkeypatch, frames)
    forms = [compare_form((0, length)) for length in (20, 12, 16)]
    net = Model(Config(roll.V, n_layer=1, n_embd=8))
    args = SimpleNamespace(length=10, min_length=6, temperature=1, top_p=1)
    nothing = np.zeros((0, roll.V), np.uint8)
    tunes, count = compare.compose(net, roll, nothing, 41, args, torch.Generator(), forms)
    assert len(tunes) == 41 and count == 41 * len(frames)
    assert [len(call.prompt) for call in calls] == [len(call.plan) for call in calls] == [32, 9]
    plans = torch.cat([call.plan for call in calls])
    # from short to long, and each as long as its form
    assert [plan[0, 2].item() for plan in plans] == sorted(plan[0, 2].item() for plan in plans)
    assert {plan[0, 2].item() for plan in plans} == {12, 16, 20}
    for plan in plans:
        told = data.make_plan(compare_form((0, plan[0, 2].item())))
        assert (plan.numpy()[:len(told)] == told).all()


def test_compare_draws_forms_of_fitting_length():
    forms = [compare_form(*parts) for parts in ([(0, 20)], [(0, 77)], [(0, 9), (2, 51)], [(0, 20), (3, 30)])]
    make = torch.Generator().manual_seed(0)
    # from short to long, each for as many tunes
    assert compare.draw_forms(forms, 60, 70, 21, make) == 30 * [forms[3]] + 30 * [forms[2]]
    # those with sixteenths have their share, whatever their length
    sixteenths = [forms[0] | dict(sixteenths=True), *forms[1:2], forms[1] | dict(sixteenths=True), forms[1]]
    assert compare.draw_forms(sixteenths, 4, 77, 1, make) == [sixteenths[0], forms[1], forms[1], sixteenths[2]]
    assert compare.draw_forms(forms, 5, 76, 52, make) == 5 * [forms[2]]
    alone = {data.form_length(*compare.draw_forms(forms, 1, 77, 1, make)) for _ in range(40)}
    assert alone == {20, 50, 60, 77}
    plans = compare.make_plans(forms[2:], 70).numpy()
    assert plans.shape == (2, 71, 6)
    for plan, form in zip(plans, forms[2:]):
        whole = data.make_plan(form)
        assert (plan[:len(whole)] == whole).all() and (plan[len(whole):] == data.END).all()
    for length, at_least in ((76, 61), (19, 1)):
        assert compare.draw_forms(forms, 2, length, at_least, make) == []
    # one song in twenty is not enough
    assert compare.draw_forms(forms[:1] + 19 * forms[1:2], 2, 30, 1, make) == []
    assert compare.draw_forms([], 1, 9, 2, make) == []


def compare_heard(length, *melodies):
    """So many frames, for each of these melodies, with which they end."""
    rows = np.zeros((len(melodies), length, 177), dtype=np.uint8)
    for row, keys in zip(rows, melodies):
        row[-4 * len(keys):] = data.PianoRoll().encode(Song('', compare_line(keys)))
    return torch.from_numpy(rows)


def test_compare_rates_takes():
    takes = compare.Takes(data.PianoRoll(), [], [0])
    told = np.zeros(154, dtype=bool)
    # a C at the end of C sharp major is not the tonic
    scale = [39, 41, 43, 44, 46, 48, 50]
    rng = np.random.default_rng(1)
    major = [*rng.permutation(scale), *rng.permutation(scale), *rng.permutation(scale), 39, 43, 46]
    sharp = [key + 1 for key in major]
    rows = compare_heard(154, major + [51], sharp + [51], sharp + [52])
    assert [takes.home_points(row, 1) for row in rows] == [2, 1, 0]
    assert [takes.home_points(row, home) for row, home in zip(rows, (0, 10, 2))] == [0, 0, 1]
    # the triad of the tonic, major or minor, with one of its notes left out or not, struck with it or before
    for chord, points in (([27, 31, 34], 3), ([27, 30, 34], 3), ([27, 34], 3), ([27, 31], 2), ([24, 27, 31], 2),
                          ([27, 31, 34, 37], 2)):
        struck, held, over = np.zeros((3, 177), dtype=int)
        struck[chord] = 1
        held[[88 + key for key in chord]] = 1
        known = data.frame_names(np.stack((struck, held, over)))
        for beats in (1, 3):
            frames, = compare_heard(154, major + [51])
            frames[-4 * beats, chord] = 1
            frames[1 - 4 * beats:, [88 + key for key in chord]] = 1
            assert takes.home_points(frames, 1) == points
            # each of its steps is a fault if no song has it
            for heard, strange in ((known, 0), (known[1:], 1), (known[2:], 4 * beats)):
                takes.chords = heard
                assert takes.faults(frames, told) == strange / 128
            # one that is over before is none
            frames[-6:, [88 + key for key in chord]] *= beats == 1
            assert takes.home_points(frames, 1) == (points if beats == 1 else 2)
    # 8 of the last 32 beats repeat what stood 24 beats before; the form says so of all, of none, or of 6
    line = rng.permutation(range(40, 70)).tolist()
    again, = compare_heard(154, line + line[6:14])
    assert takes.faults(again, told) == 0
    assert takes.faults(again, ~told) == 8 / 32
    told[:-24] = True
    assert takes.faults(again, told) == 2 / 32
    # a circle where the form has one, too; and silence
    circle, = compare_heard(154, 8 * [40, 43])
    assert takes.faults(circle, told & False) == 1
    silence = torch.zeros(154, 177, dtype=torch.uint8)
    assert takes.home_points(silence, 1) == 0 and takes.faults(silence, told & False) == 1


def test_compare_takes_come_home(monkeypatch):
    monkeypatch.setattr(compare, 'TAKES', 4)
    roll = data.PianoRoll()
    forms = [compare_form((0, 300)) | dict(homes=[]), compare_form((0, 250)) | dict(homes=[(150, 4, 1), (180, 4, 10)])]
    takes = compare.Takes(roll, forms, [0])
    # to C and to A; 64 frames before, and so on
    choices = [list(choices.items()) for choices in takes.choices]
    assert choices == [[(43, 0), (107, 0), (171, 0), (235, 0), (299, 0)],
                       [(25, 0), (89, 0), (153, 1), (183, 10), (185, 0), (249, 0)]]
    # a spare row each, as long as no home is near
    assert takes(torch.zeros(2, 1, 177), torch.zeros(2) > 0).tolist() == [0, 0, 1, 1]
    takes = compare.Takes(roll, forms[1:], [0])
    no_end = torch.zeros(4, dtype=torch.bool)
    assert takes(torch.zeros(1, 1, 177), no_end[:1]).tolist() == [0, 0]
    assert takes(torch.zeros(2, 26, 177), no_end[:2]).tolist() == [0, 0]
    assert takes(torch.zeros(2, 90, 177), no_end[:2]).tolist() == 4 * [0]
    assert takes(torch.zeros(4, 153, 177), no_end) is None
    before = np.random.default_rng(0).integers(40, 50, 30).tolist()
    # the third row is the first that ends on a C, 51 or 39, and goes on
    frames = compare_heard(154, before + [50], before + [51], before + [39], before + [51])
    ended = torch.tensor([False, True, False, False])
    assert takes(frames, ended).tolist() == 4 * [2]
    # none ends on A; one does not go in circles
    frames = compare_heard(184, 16 * [40, 43], 16 * [40, 43], before, 8 * [40, 43, 45, 47])
    assert takes(frames, no_end).tolist() == [2, 2]
    # and where nothing comes home; after the end of the form there are no more takes
    assert takes(torch.zeros(2, 186, 177), no_end[:2]).tolist() == [0, 0]
    frames = compare_heard(250, 16 * [40, 43], before)
    assert takes.one_of_each('ab') == ['a'] and takes(frames, no_end[:2]).tolist() == [1]
    assert takes.one_of_each('a') == ['a'] and takes(torch.zeros(1, 251, 177), no_end[:1]) is None
    # what has ended needs no takes
    takes = compare.Takes(roll, forms, [0])
    assert takes(torch.zeros(2, 9, 177), torch.tensor([True, False])).tolist() == [0, 1, 1]


def test_compare_composes_in_takes(monkeypatch):
    """The composer and the takes agree on which frame is which, and each tune comes back once."""
    roll = data.PianoRoll()
    heard = []
    counts = []
    points = compare.Takes.home_points
    forward = Model.forward
    monkeypatch.setattr(compare, 'TAKES', 3)
    monkeypatch.setattr(compare.Takes, 'home_points', lambda *words: heard.append(len(words[1])) or points(*words))
    monkeypatch.setattr(Model, 'forward', lambda self, frames, *more: counts.append(len(frames)) or
                        forward(self, frames, *more))
    torch.manual_seed(0)
    net = Model(Config(roll.V, 'lstm', 'bernoulli', 1, 8, lookback=8, beat=4, form=64))
    torch.nn.init.constant_(net.head.out.bias, -4.0)
    torch.nn.init.constant_(net.head.out.bias[-1:], -30.0)
    forms = [compare_form((0, 100)) | dict(homes=[(90, 4, 1)]), compare_form((0, 120)) | dict(homes=[(66, 2, 1)])]
    args = SimpleNamespace(length=30, min_length=25, temperature=1, top_p=1)
    nothing = np.zeros((0, roll.V), np.uint8)
    tunes, total = compare.compose(net, roll, nothing, 2, args, torch.Generator().manual_seed(0), forms)
    # a tune is heard when it comes home, 64 frames before, and when its form is over
    assert len(tunes) == 2 and total == 240
    assert heard == [4, 4, 30, 30, 68, 68, 68, 94, 94, 94, 100, 100, 120, 120]
    # the prompt, and what follows in two rows for each tune, in three before it comes home, until its form is over
    assert counts[:121] == [2] + 3 * [4] + 26 * [5] + 38 * [6] + 26 * [5] + 6 * [4] + 20 * [3] + [2]


def test_compare_composed_tunes_are_told_their_cost_and_end(monkeypatch):
    roll = data.PianoRoll(2)
    torch.manual_seed(0)
    net = Model(Config(roll.V, n_layer=1, n_embd=8)).eval()
    frames = roll.encode(scripts_dance(bars=1))
    scripts_pretend(monkeypatch, *(frames[2:end] for end in (8, 7, 2)))
    args = SimpleNamespace(length=3, min_length=1, temperature=1, top_p=1)
    (whole, shorter), count = compare.compose(net, roll, frames[:2], 3, args, None)
    nats = net.nats(torch.from_numpy(np.concatenate((roll.boundary(), frames))).unsqueeze(0))[0]
    assert count == 6 + 5 and (whole.ended, shorter.ended) == (False, True)
    assert (whole.nats, shorter.nats) == pytest.approx((nats[2:].mean().item(), nats[2:7].mean().item()))
    assert np.array_equal(whole.song.notes, roll.decode(frames))


def test_compare_reads_a_text_that_is_cut_off(monkeypatch):
    abc = data.AbcText()
    frames = abc.encode_text('K:C\nCDEF|GABc|"A')
    scripts_pretend(monkeypatch, frames, frames[:-1])
    net = Model(Config(abc.V, head='softmax', n_layer=1, n_embd=8)).eval()
    args = SimpleNamespace(length=len(frames) / abc.frames_per_beat, min_length=1, temperature=1, top_p=1)
    (tune,), _ = compare.compose(net, abc, np.zeros((0, abc.V), np.uint8), 2, args, None)
    assert not tune.ended and len(tune.song.notes) == 8


def compare_run(*words, **more):
    return scripts_run('compare', '--num_samples=5', '--length=24', *words, **more)


def test_scripts_compose_on_the_forms_that_a_checkpoint_has(tmp_path, monkeypatch):
    roll = data.PianoRoll(2)
    frames = roll.encode(scripts_dance())
    forms = [compare_form((0, len(frames)))]
    calls = scripts_pretend(monkeypatch, frames)
    path = scripts_untrained(tmp_path / 'm.pt', roll, forms=forms)
    scripts_run('sample', f'--ckpt={path}', '--num_samples=2', '--best_of=1')
    compare_model(tmp_path, 'lstm', roll, forms)
    compare_run(tmp_path / 'lstm.pt', f'--out={tmp_path / "x"}')
    for call, tunes in zip(calls, (2, 5), strict=True):
        assert len(call.plan) == tunes and (call.plan.numpy()[:, :len(frames) + 1] == data.make_plan(forms[0])).all()
    # a person's own beginning is not told how to go on
    notation.write_midi(scripts_dance().notes, tmp_path / 'mine.mid')
    scripts_run('sample', f'--ckpt={path}', f'--prompt={tmp_path / "mine.mid"}')
    assert calls[2].plan is None
    # who asks for a metre is given forms in it
    path = scripts_untrained(tmp_path / 'm.pt', roll, forms=[forms[0], forms[0] | dict(metre='4/4')])
    scripts_run('sample', f'--ckpt={path}', '--metre=4/4', '--num_samples=9', '--best_of=1')
    assert (calls[3].plan[:, 0, 4] == 1).all()


def test_compare_runs(tmp_path):
    compare_model(tmp_path, 'lstm', data.PianoRoll(2))
    compare_model(tmp_path, 'rwkv', data.Events(4))
    (tmp_path / 'lstm.csv').write_text('iter,minutes,valid\n0,0,9.5\n10,1,2.5\n20,2,2.25\n')
    tables = []
    for out in (tmp_path / 'a', tmp_path / 'b'):
        printed = compare_run(tmp_path / 'lstm.pt', tmp_path / 'rwkv.pt', f'--out={out}', '--best_of=2')
        assert all(word in printed for word in ('test songs', 'training songs', 'KS lstm', 'rwkv', 'mean distance'))
        rows = list(csv.DictReader(out.with_suffix('.csv').open()))
        assert len(rows) == 21 + 9 and list(rows[0]) == [
            '', 'test songs', 'training songs', 'KS training songs', 'lstm', 'KS lstm', 'rwkv', 'KS rwkv']
        # how fast it was is all that may differ
        tables.append([row for row in rows if row[''] != 'frames a second when composing'])
        words = ' '.join(render_texts(out.with_suffix('.svg')))
        assert all(text in words for text in ('lstm 2.250', 'melody on chord', 'test songs, ', 'rwkv, '))
        assert [row['lstm'] for row in rows if row[''] == 'tunes that can be read'] == ['10 of 10']
    assert tables[0] == tables[1]
    real = {row['']: row['test songs'] for row in tables[0]}
    assert (real['beats'], real['ended']) == ('16.000', '1.000')
    compare_run(tmp_path / 'lstm.pt', f'--out={out}', '--length=15', '--min_length=1')
    assert '\nended,0.000,0.000,0.000,' in out.with_suffix('.csv').read_text()


@pytest.mark.parametrize('words, message', [
    (['a/lstm.pt', 'b/lstm.pt'], 'compare them apart'), (['a/rnn.pt'], 'no tune that can be'),
    (['a/lstm.pt', '--length=1e6'], '--length=1e+06 is more')])
def test_compare_refuses(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ('a', 'b'):
        compare_model(Path(name).resolve(), 'lstm', data.PianoRoll(2))
    compare_model(Path('a').resolve(), 'rnn', data.AbcText())
    assert message in compare_run(*words, '--out=c', status=2)


if __name__ == '__main__':
    # python test_model.py 20000 [folder]: so many mutated files, in a folder that is kept
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(survive(int(sys.argv[1]), Path(*(sys.argv[2:] or [temporary])))))
