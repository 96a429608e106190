"""All tests:  python -m pytest"""

import contextlib
import csv
import dataclasses
import errno
import functools
import hashlib
import http.server
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
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import wave
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import torch

import compare
import data
import model
import model as models
import notation
import render
import train
import wkv
from model import Clock
from model import Config
from model import Dropout
from model import load_checkpoint
from model import Model
from model import save_checkpoint
from notation import Song
from notation import UserError

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# notation.py: files, MIDI, keys, metre


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
    return [(int(key) + 21, round(float(on), 4), round(float(end), 4)) for key, on, end in song.notes]


def midi_chunk(body, length=None):
    return b'MTrk' + struct.pack('>I', len(body) if length is None else length) + body


def midi_raw(*events, before=b'', after=b'', count=1, length=None, end=b'\0\xff\x2f\0'):
    """A file byte by byte: C4 in the first beat, then the events, then E4 in the second beat."""
    body = b'\0\x90\x3c\x50\x83\x60\x80\x3c\0' + b''.join(events) + b'\0\x90\x40\x50\x83\x60\x80\x40\0' + end
    length = None if length is None else len(body) + length
    return b'MThd' + struct.pack('>IHHH', 6, 1, count, 480) + before + midi_chunk(body, length) + after


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_files_that_are_no_plain_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'file').write_bytes(b'what was there')
    (tmp_path / 'link').symlink_to(tmp_path / 'file')
    (tmp_path / 'folder').mkdir()
    for path in (tmp_path / 'fifo', tmp_path / 'folder', tmp_path / 'nowhere', '/dev/zero'):
        with pytest.raises(notation.UserError, match=f'cannot read {path}'):
            notation.read_bytes(path, 100)
    for name in ('fifo', 'folder', '/dev/null', 'link', 'none/file', 'file/file', 'x' * 300):
        with pytest.raises(notation.UserError, match='cannot write'):
            notation.write_whole(tmp_path / name, b'new')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['fifo', 'file', 'folder', 'link']
    assert notation.read_bytes(tmp_path / 'link') == b'what was there'
    with pytest.raises(notation.UserError, match='larger than'):
        notation.read_bytes(tmp_path / 'file', 5)
    notation.write_whole(tmp_path / 'file', b'new')
    notation.write_whole(str(tmp_path / 'other'), b'new')
    assert notation.read_bytes(tmp_path / 'file', 3) == notation.read_bytes(str(tmp_path / 'other')) == b'new'


def test_files_keep_what_they_had_if_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / 'a.pt'
    path.write_bytes(b'old')

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(notation.UserError, match='a.pt .No space left'):
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
    message = str(notation.UserError('one\ntwo\x1b[2J\ud800' + 'x' * 1000))
    assert message.isprintable() and message.startswith('one?two?[2J?x') and len(message) == 300


# ---------------------------------------------------------------------------------------------------------------------
# MIDI

@pytest.mark.parametrize('tracks, rows', [
    (['on60 off60+480'], [(60, 0, 1)]),
    # all tracks and channels but percussion
    (['on60 off60+480', 'on48+240/3 off48+960/3'], [(60, 0, 1), (48, .5, 2.5)]),
    (['on36/9 on60 off60+480 off36/9'], [(60, 0, 1)]),
    # velocity 0; struck again, also with a late release or from another track; twice at once
    (['on60 on60+480:0 on62+480 off62+480'], [(60, 0, 1), (62, 2, 3)]),
    (['on60 on60+480 off60+480 off60+480'], [(60, 0, 1), (60, 1, 2)]),
    (['on60 on60+480 off60 off60+480'], [(60, 0, 1), (60, 1, 2)]),
    (['on60 off60+1920', 'on60+480/1 off60+480/1'], [(60, 0, 1), (60, 1, 2)]),
    (['on60 on60/1 off60+480 off60+480/1'], [(60, 0, 2)]),
    # never released, no length, released only
    (['on60+480', 'on64 off64+1440'], [(64, 0, 3), (60, 1, 3)]),
    (['on60+480 off60 on62+480 off62+480'], [(60, 1, 1), (62, 2, 3)]),
    (['off60 on62+480 off62+480 off62'], [(62, 1, 2)]),
    # the sustain pedal: held, down at the release, up at the release, half way, not down
    (['pedal127 on60 off60+480 pedal0+480'], [(60, 0, 2)]), (['on60 off60+480 pedal127 pedal0+480'], [(60, 0, 2)]),
    (['pedal127 on60 pedal0+480 off60'], [(60, 0, 1)]),
    (['pedal64 on60 off60+480 pedal90+240 pedal63+240'], [(60, 0, 2)]),
    (['pedal63 on60 off60+480 pedal0+480'], [(60, 0, 1)]),
    # struck again, of another channel, to the end of the file, up too early
    (['pedal127 on60 off60+240 on60+240 off60+240 pedal0+720'], [(60, 0, 1), (60, 1, 3)]),
    (['pedal127/1 on60 off60+480 pedal0+480/1'], [(60, 0, 1)]),
    (['pedal127 on60 off60+480 on62+480 off62+480'], [(60, 0, 3), (62, 2, 3)]),
    (['pedal127 on60 pedal0+240 off60+240'], [(60, 0, 1)]),
])
def test_midi_notes(tmp_path, tracks, rows):
    content = midi_bytes(*tracks, kind=len(tracks) > 1)
    (tmp_path / 'a.mid').write_bytes(content)
    song = notation.read_midi(tmp_path / 'a.mid')
    assert midi_rows(song) == rows and song.dropped == 0 and song.name == 'a.mid'
    assert midi_rows(notation.read_midi(io.BytesIO(content))) == midi_rows(notation.read_midi(content)) == rows


EVENTS = {
    'no such key': b'\xff\x59\x02\xee\x01', 'no such mode': b'\xff\x59\x02\xfe\xff', 'key of 1 byte': b'\xff\x59\x01\0',
    'tempo of 2 bytes': b'\xff\x51\x02\x07\xa1', 'tempo 0': b'\xff\x51\x03\0\0\0', 'of 4': b'\xff\x51\x04\1\1\1\1',
    'volume 168': b'\xb0\x07\xa8', 'pedal 200': b'\xb0\x40\xc8', 'controller 255': b'\xb0\xff\0',
    'program': b'\xc0\xff', 'pressure 128': b'\xd0\x80', 'bend above': b'\xe0\x80\xff', 'note 128': b'\x90\x80\x50',
    'release': b'\x80\xc8\0',
    'no time signature': b'\xff\x58\x01\4', '2^200': b'\xff\x58\x04\4\xc8\x18\x08', '0': b'\xff\x58\x04\0\2\x18\x08',
    'no such status': b'\xf4', 'clock': b'\xf8', 'song position': b'\xf2\1\2', 'unknown text': b'\xff\x7e\3abc',
    'text of 400': b'\xff\x05\x83\x10' + b'\xe6\xad\x8c\xff' * 100, 'sysex of 5000': b'\xf0\xa7\x08' + b'\xff' * 5000,
    'port': b'\xff\x21\1\0', 'long zero': b'\xff\x01\x80\x80\x80\x80\0'}
FILES = {
    'alien chunk': midi_raw(before=b'XFIH\0\0\0\4abcd'), 'bytes at the end': midi_raw(after=b'\0\0tail'),
    'alien chunk, no end before': midi_raw(end=b'', after=b'XFIH\0\0\0\4\x90\x90\x90\x90'),
    'bytes between tracks': midi_raw(after=b'\x85\0\0' + midi_chunk(b'\0\xff\x2f\0'), count=2),
    'length 3 too long': midi_raw(length=3), 'length 3 too short': midi_raw(length=-3),
    'length 0': midi_raw(length=-22), 'length without the second note': midi_raw(length=-18),
    'length of a megabyte': midi_raw(length=1 << 20),
    'length into the next track': midi_raw(length=3, after=midi_chunk(b'\0\xff\x2f\0')),
    'no end of track': midi_raw(end=b''), 'too few tracks': midi_raw(count=3), 'count 0': midi_raw(count=0),
    'RIFF': b'RIFF' + struct.pack('<I', 56) + b'RMIDdata' + struct.pack('<I', 44) + midi_raw()}


@pytest.mark.parametrize('content', [midi_raw(b'\0' + event) for event in EVENTS.values()] + list(FILES.values()),
                         ids=list(EVENTS) + list(FILES))
def test_midi_opens_what_every_player_opens(content):
    song = notation.read_midi(content)
    assert midi_rows(song) == [(60, 0, 1), (64, 1, 2)]
    assert song.tempo == 120 and song.sharps is None and song.metre is None


def test_midi_running_status_and_a_loud_note():
    running = b'\0\x90\x3c\x50\x83\x60\x3c\0\0\x40\x50\0\xff\1\1x\x83\x60\x40\0\0\xff\x2f\0'
    assert midi_rows(notation.read_midi(midi_raw()[:14] + midi_chunk(running))) == [(60, 0, 1), (64, 1, 2)]
    loud = midi_raw().replace(b'\x90\x40\x50', b'\x90\x40\xc8').replace(b'\x80\x40\0', b'\x80\x40\xff')
    assert midi_rows(notation.read_midi(loud)) == [(60, 0, 1), (64, 1, 2)]


def test_midi_outside_the_piano_and_silence_at_the_end_are_told():
    song = notation.read_midi(midi_bytes('on20 off20+96 on21 off21+96 on108 off108+96 on109 off109+96 on127', ticks=96))
    assert midi_rows(song) == [(21, 1, 2), (108, 2, 3)] and song.dropped == 3
    assert notation.read_midi(midi_bytes('on60 off60+480 pedal0+960')).silence == 2


def test_midi_first_tempo_key_and_metre():
    def meta(kind, **fields):
        return mido.MetaMessage(kind, **fields)

    song = notation.read_midi(midi_bytes(
        [meta('set_tempo', tempo=400_000, time=960), meta('key_signature', key='C', time=960)],
        [meta('set_tempo', tempo=750_000, time=240), meta('key_signature', key='F#m', time=480),
         *midi_track('on60 off60+9')],
        [meta('time_signature', numerator=6, denominator=8), meta('time_signature', numerator=3, time=960)]))
    assert song.tempo == 80 and song.sharps == 3 and song.minor and song.metre == '6/8' and song.pickup is None
    late = notation.read_midi(midi_bytes([*midi_track('on60 off60+480'), meta('set_tempo', tempo=250_000)]))
    assert late.tempo == 120 and late.sharps is None and late.metre is None


def test_midi_refused(tmp_path):
    good = midi_bytes('on60 off60+480')
    wrong = dict(type_2=good[:9] + b'\2' + good[10:], smpte=good[:12] + struct.pack('>h', -25 << 8) + good[14:],
                 empty=b'', cut=good[:-7], text=b'no music', endless=good[:22] + b'\xff' * 100_000, head=good[:14],
                 huge=b'MThd' + bytes(5 << 20), no_ticks=good[:12] + b'\0\0' + good[14:], cut_head=good[:9],
                 no_status=good[:22] + b'\0' * 9)
    for name, content in wrong.items():
        path = tmp_path / f'{name}.mid'
        path.write_bytes(content)
        with pytest.raises(notation.UserError, match=f'{name}.mid.*: ') as e:
            notation.read_midi(path)
        assert '\n' not in str(e.value)
        with pytest.raises(notation.UserError, match='member'):
            notation.read_midi(io.BytesIO(content), 'member')
    with pytest.raises(notation.UserError, match='nowhere.mid'):
        notation.read_midi(tmp_path / 'nowhere.mid')


def test_midi_hostile_files_cost_seconds_at_most():
    head = midi_raw()[:14]
    size = notation.MAX_MIDI
    pedalled = b'\0\xb0\x40\x7f\1\x90\x3c\x50\1\x3c\0\0\xb0\x40\0'
    for body in (b'MTrk\0\0\0\0' * (size // 8 - 3), midi_chunk(pedalled * (size // 16 - 3))):
        start = time.perf_counter()
        notation.read_midi(head + body)
        assert time.perf_counter() - start < 20


def test_midi_write_and_read_back(tmp_path):
    notes = np.array([[0, 0, 1], [40, 0, .5], [40, .5, 1.25], [87, 2, 2]])
    notation.write_midi(notes, tmp_path / 'a.mid', tempo=90)
    song = notation.read_midi(tmp_path / 'a.mid')
    notes[3, 2] += 1 / 480  # the shortest note a file can hold
    assert np.allclose(song.notes, notes) and abs(song.tempo - 90) < .01
    assert (song.sharps, song.metre, song.pickup) == (None, None, None)
    notation.write_midi(notes[:0], tmp_path / 'a.mid', tempo=1)  # written over; slower than MIDI can say
    assert len(notation.read_midi(tmp_path / 'a.mid').notes) == 0
    with pytest.raises(notation.UserError, match='cannot write'):
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
    assert [notation.tonic(sharps) for sharps in (0, 2, -1)] == [0, 2, 5]
    assert [notation.tonic(sharps, True) for sharps in (0, -3)] == [9, 0]


def test_keys_estimate_and_shift():
    scale = [(n, i, i + (2 if n in (0, 7) else 1)) for i, n in enumerate((0, 2, 4, 5, 7, 9, 11, 0, 4, 7, 0))]
    for shift, sharps in zip(range(0, 12), (0, -5, 2, -3, 4, -1, 6, 1, -4, 3, -2, 5)):
        notes = np.array([(39 + n + shift, a, b) for n, a, b in scale], dtype=float)  # C major, moved up
        assert notation.estimate_key(notes) == (sharps, False)
    minor = np.array([(36 + n, i, i + 1) for i, n in enumerate((0, 0, 3, 7, 0, 2, 3, 5, 7, 8, 7, 0))], dtype=float)
    assert notation.estimate_key(minor) == (0, True)
    notes = np.array([[40.0, 0, 1]])
    shifts = {0: 0, 1: 5, 2: -2, 3: 3, 4: -4, 5: 1, 6: -6, -1: -5, -2: 2, -3: -3, -4: 4, -5: -1, -6: -6, 7: -1, -7: 1}
    for sharps, shift in shifts.items():
        assert notation.common_key_shift(notation.Song('', notes, sharps=sharps)) == shift
    # at the ends of the keyboard: an octave off, or not at all
    for keys, sharps, shift in (([85], 1, -7), ([1], 2, 10), ([1, 86], 2, 0)):
        notes = np.array([[key, 0, 1] for key in keys], dtype=float)
        assert notation.common_key_shift(notation.Song('', notes, sharps=sharps)) == shift
    assert notation.common_key_shift(notation.Song('', minor)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Metre

METRE_RHYTHMS = {'2/4': ([.5, .5, .5, .5], [.5, .25, .25, 1]), '3/4': ([2, 1], [1, 1, 1]),
                 '4/4': ([1, .5, .5, 1, 1], [2, 1, 1]), '6/8': ([.5, .5, .5, 1, .5], [1, .5, 1, .5]),
                 '9/8': ([1, .5, 1, .5, .5, .5, .5], [1.5, 1, .5, .5, .5, .5])}


def metre_tune(metre, pickup):
    """A pickup, then eight bars twice, with a chord in each bar."""
    rng = np.random.default_rng(len(metre) + int(2 * pickup))
    bar = notation.bar_beats(metre)
    notes = [[51, 0, pickup]] * bool(pickup)
    now = pickup
    tune = [(rng.integers(48, 60), length) for i in range(8) for length in METRE_RHYTHMS[metre][i % 2]]
    for _ in range(2):
        beat = 0
        for key, length in tune:
            if beat % bar == 0:
                root = (20, 25, 27, 20)[int(beat / bar) % 4]
                notes += [[root + interval, now + beat, now + beat + bar] for interval in (0, 4, 7)]
            notes.append([key, now + beat, now + beat + length])
            beat += length
        now += beat
    return np.array(notes, dtype=float)


@pytest.mark.parametrize('metre, pickup', [('2/4', 0), ('3/4', 0), ('3/4', 1), ('4/4', 0), ('4/4', 1), ('6/8', 0),
                                           ('6/8', .5), ('9/8', 0), ('9/8', .5)])
def test_metre_of_plain_tunes(metre, pickup):
    bar = notation.bar_beats(metre)
    notes = metre_tune(metre, pickup)
    assert notation.metre(notes) == (bar, pickup)
    assert notation.metre_text(notes, bar, pickup) == metre
    assert notation.metre(notes[notation.is_melody(notes)], bar) == (bar, pickup)


def test_metre_without_notes_and_of_bars_that_are_known():
    assert notation.metre([]) == (4, 0) and notation.metre_text([], 3, 0) in ('3/4', '6/8')
    assert notation.metre(metre_tune('3/4', 1), 3)[0] == 3
    texts = [notation.metre_text([], bar, 0) for bar in (1.5, 2, 3.5, 4, 4.5, 5, 6)]
    assert texts == ['3/8', '2/4', '7/8', '4/4', '9/8', '5/4', '6/4']
    assert [notation.metre([[40, 0, 1], [42, 3, 9]], bar)[0] for bar in (1.5, 3.5, 5, 6)] == [1.5, 3.5, 5, 6]
    # what a broken file may hold costs neither time nor memory
    assert notation.metre([[40, 0, 1], [42, 1e12, 2e12]])[0] in (2, 3, 4, 4.5)


def test_metre_of_the_bundled_tunes():
    right = []
    for song in notation.read_abc(HERE / 'tunes.abc'):
        bar, pickup = notation.metre(song.notes)
        told = notation.bar_beats(song.metre)
        off = (pickup - song.pickup) % min(bar, told)
        right.append(off == 0 and (bar == told or {bar, told} == {2, 4}))
    assert len(right) == 128 and np.mean(right) >= 0.95


def test_melody_is_the_highest_at_its_onset():
    notes = [[20, 0, 4], [24, 0, 4], [50, 0, 1], [52, 1, 2], [53, 2, 4], [22, 4, 8], [45, 3, 5], [54, 4, 6]]
    assert notation.is_melody(notes).tolist() == [False, False, True, True, True, False, False, True]
    # below a held note it is no melody, after that note it is
    assert notation.is_melody([[40, 0, 1], [30, .5, 2], [30, 1, 2], [35, .5, 1]]).tolist() == [True, False, True, False]
    assert len(notation.is_melody([])) == 0


# ---------------------------------------------------------------------------------------------------------------------
# notation.py: ABC

# --- imports for development, cut off when appended ---


# --- end ---


# ---------------------------------------------------------------------------------------------------------------------
# notation: ABC in

def abc_songs(body, head='M:4/4\nL:1/4\nK:C', **more):
    return notation.read_abc(f'X:1\nT:tune\n{head}\n{body}\n'.encode(), 'x.abc', **more)


def abc_rows(notes):
    return [(int(key) + 21, float(on), float(end)) for key, on, end in notes]


def abc_melody(body, head='M:4/4\nL:1/4\nK:C'):
    """The notes as one string: letter, octave and length in quarter notes, with rests, in order of onset."""
    out = []
    now = 0
    for note, on, end in abc_rows(abc_songs(body, head)[0].notes):
        if on > now:
            out.append(f'z{on - now:g}')
        out.append('C ^C D ^D E F ^F G ^G A ^A B'.split()[note % 12] + f'{note // 12 - 1}:{end - on:.3g}')
        now = end
    return ' '.join(out)


def abc_letters(body, head='M:4/4\nL:1/4\nK:C'):
    return ''.join('C_D_EF_G_A_B'[note % 12] for note, *_ in abc_rows(abc_songs(body, head)[0].notes))


@pytest.mark.parametrize('body, melody', [
    ("C,, C, C c c'", 'C2:1 C3:1 C4:1 C5:1 C6:1'),
    ('C2 C/ C/2 C// C/4 C3/2 C3/ C4/', 'C4:2 C4:0.5 C4:0.5 C4:0.25 C4:0.25 C4:1.5 C4:1.5 C4:2'),
    ('^F F f | F _B =B B ^^C __D', '^F4:1 ^F4:1 ^F5:1 F4:1 ^A4:1 B4:1 B4:1 D4:1 C4:1'),
    ('C z C z/ C x2 C | Z | D Z2 E', 'C4:1 z1 C4:1 z0.5 C4:1 z2 C4:1 z4 D4:1 z8 E4:1'),
    ('C-C D-|D2 E-F C3-\nC .-', 'C4:2 D4:3 E4:1 F4:1 C4:4'), ('^F-|F F', '^F4:2 F4:1'),
    ('C>D C<D C>>D C<<D C>>>D', 'C4:1.5 D4:0.5 C4:0.5 D4:1.5 C4:1.75 D4:0.25 C4:0.25 D4:1.75 C4:1.88 D4:0.125'),
    ('C > D', 'C4:1.5 D4:0.5'),
    ('(3CDE (2FG (4CDEF A', 'C4:0.667 D4:0.667 E4:0.667 F4:1.5 G4:1.5 C4:0.75 D4:0.75 E4:0.75 F4:0.75 A4:1'),
    ('(5:4CDEFG (3::2C2D E (3:2:4 C/D/EF G', 'C4:0.8 D4:0.8 E4:0.8 F4:0.8 G4:0.8 C4:1.33 D4:0.667 E4:1 '
     'C4:0.333 D4:0.333 E4:0.667 F4:0.667 G4:1'), ('{fg}A {/d}(B .c) ~d !trill!e +turn+f Tg vA uB y4 c`d $',
     'A4:1 B4:1 C5:1 D5:1 E5:1 F5:1 G5:1 A4:1 B4:1 C5:1 D5:1'),
    ('C \\\nD % E\n% F G\n%%MIDI program 1\nw:la la\nE|', 'C4:1 D4:1 E4:1'),
    ('C [K:D] F [L:1/8] F2 [M:3/4] Z C\nK:F\nB2\nL:1/4\nB', 'C4:1 ^F4:1 ^F4:1 z3 ^C4:0.5 ^A4:1 ^A4:1'),
    # what is only drawn does not sound: words, letters, user symbols, clefs, layout, old line breaks, reserved signs
    ('"^slow"C "_x"D "<p"E ">q"F "@1,2 r"G "p"A "tr"B "Slow"c "3"d "Ad lib"e',
     'C4:1 D4:1 E4:1 F4:1 G4:1 A4:1 B4:1 C5:1 D5:1 E5:1'),
    ('U:k=!slide!\nvkC JD UE VF | Hc ! G A | !\nB [I:x 1] [r:word] ?*@;#c',
     'C4:1 D4:1 E4:1 F4:1 C5:1 G4:1 A4:1 B4:1 C5:1'),
    ('I:linebreak $\nC [K:bass] C, [K:clef=alto] C [K:D treble] F', 'C4:1 C3:1 C4:1 ^F4:1'),
    ('c [K:treble-8] c [K:C clef=bass+8] c [K:+8va] c', 'C5:1 C4:1 C6:1 C6:1'),
    ('V:1 clef=treble-8 nm="Fiddle"\nV:1\nC2 D2|', 'C3:2 D3:2'),
])
def test_abc_melody(body, melody):
    assert abc_melody(body) == melody


@pytest.mark.parametrize('body, letters', [
    ('|:C:|D', 'CCD'), ('C:|D', 'CCD'), ('C|]D:|E', 'CDDE'), ('C||D:|E', 'CDDE'), ('|:C||D:|E', 'CDCDE'),
    ('|:C::D:|', 'CCDD'), ('|:C:|:D:|', 'CCDD'), ('|:C:||:D:|E', 'CCDDE'), ('C:|D:|', 'CCDD'), ('|::C::|D', 'CCCD'),
    ('|:C|1D:|2E|]F', 'CDCEF'), ('|:C[1D:|[2E:|F', 'CDCEF'), ('C|1D:|2E||F:|', 'CDCEFF'), ('|:C|1D:|2E||F:|', 'CDCEFF'),
    ('|:C|1D:|\n|2E||', 'CDCE'), ('|:C| 1 D:| 2 E|]', 'CDCE'),
    ('|:C|[1,3D:|[2E:|[4F|]G', 'CDCECDCFG'), ('|:C|1,2,3D:|4E|]', 'CDCDCDCE'), ('|:C|1D:|2E|:F|1G:|2A|]', 'CDCEFGFA'),
    ('|:C|1D:|E', 'CDCE'), ('[|C.|D[|]', 'CD'), ('|:C||D|1E:|2F|]G', 'CDECDFG'), ('G|:C:|', 'GCC'),
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
    assert abc_letters('[P:A]|:C:|[P:B]D|', f'P:{order}\nL:1/4\nK:C') == letters.replace('C', 'CC')
    # each part is in the key in which it is written
    rows = abc_rows(abc_songs('P:A\nF::\nP:B\nK:D\nF|', 'P:ABA\nL:1/4\nK:C')[0].notes)
    assert [note for note, *_ in rows] == [65, 65, 66, 65, 65]


def test_abc_nested_orders_of_parts_are_skipped(capsys):
    assert abc_songs('P:A\nC|\nP:B\nD|', 'P:(AB)2\nL:1/4\nK:C') == []
    assert 'P:(AB)2' in capsys.readouterr().err


@pytest.mark.parametrize('key, sharps, fgabcde', [
    ('C', 0, 'F G A B C D E'), ('G', 1, '^F G A B C D E'), ('Am', 0, 'F G A B C D E'), ('F#m', 3, '^F ^G A B ^C D E'),
    ('D Mix', 1, '^F G A B C D E'), ('Edor', 2, '^F G A B ^C D E'), ('E PHRYGIAN', 0, 'F G A B C D E'),
    ('Bb major', -2, 'F G A ^A C D ^D'),
    ('FLyd', 0, 'F G A B C D E'), ('B locrian', 0, 'F G A B C D E'), ('Amin', 0, 'F G A B C D E'),
    ('A aeolian', 0, 'F G A B C D E'),
    ('Gion', 1, '^F G A B C D E'), ('D =c', 2, '^F G A B C D E'), ('D exp _b', None, 'F G A ^A C D E'),
    ('HP', 2, '^F G A B ^C D E'),
    ('Hp', 2, '^F G A B ^C D E'), ('none', None, 'F G A B C D E'), ('', None, 'F G A B C D E'),
    ('G clef=bass', 1, '^F G A B C D E'),
    ('F clef=bass', -1, 'F G A ^A C D E'), ('C^f^c', 0, '^F G A B ^C D E'), ('d', 2, '^F G A B ^C D E'),
])
def test_abc_keys(key, sharps, fgabcde):
    song = abc_songs('FGABCDE', f'L:1/4\nK:{key}')[0]
    assert song.sharps == sharps and song.minor == (key in ('Am', 'F#m', 'Amin', 'A aeolian'))
    assert ['C ^C D ^D E F ^F G ^G A ^A B'.split()[n % 12] for n, *_ in abc_rows(song.notes)] == fgabcde.split()


@pytest.mark.parametrize('head, beats, tempo', [
    ('M:4/4', .5, 120), ('M:C', .5, 120), ('M:C|', .5, 120), ('M:6/8', .5, 120), ('M:2/4', .25, 120),
    ('M:none', .5, 120), ('N:', .5, 120), ('L:1/16', .25, 120), ('M:2/4\nL:1/2', 2, 120), ('Q:1/4=96', .5, 96),
    ('Q:"Fast" 3/8=100', .5, 150), ('Q:1/8=100 "Slow"', .5, 50), ('L:1/8\nQ:200', .5, 100), ('Q:"Lively"', .5, 120),
    ('Q:1/4=0', .5, 120),
    ('Q:1/4=92.5', .5, 92.5), ('Q: 1/4 = 77 "x"', .5, 77), ('Q:1/4=100-120', .5, 100), ('L:1/4\nQ:C=80', 1, 80),
])
def test_abc_unit_length_and_tempo(head, beats, tempo):
    song = abc_songs('C', f'{head}\nK:C')[0]
    assert abc_rows(song.notes) == [(60, 0, beats)] and song.tempo == tempo
    assert abc_songs('Q:1/4=77\nC\nQ:1/4=99\nC', 'K:C')[0].tempo == 77


def test_abc_tuplets_in_compound_time():
    assert abc_melody('(2CD(5CDEFG', 'M:6/8\nL:1/8\nK:C') == 'C4:0.75 D4:0.75 C4:0.3 D4:0.3 E4:0.3 F4:0.3 G4:0.3'


@pytest.mark.parametrize('head, body, metre, pickup', [
    ('M:4/4', 'CDEF|', '4/4', 0), ('M:C|', 'D|:CDEF:|', '2/2', 1), ('M:6/8', 'C/|C3', '6/8', .5),
    ('M:3/4', '|:CD|EFG|', '3/4', 2),
    ('M:4/4', 'CDEFGABc|', '4/4', 0), ('M:none', 'C|D', None, None), ('N:', 'C|D', None, None),
    ('M:3/4', 'C', '3/4', 0), ('M:odd', 'C|', None, None),
])
def test_abc_metre_and_pickup(head, body, metre, pickup):
    song = abc_songs(body, f'{head}\nL:1/4\nK:C')[0]
    assert (song.metre, song.pickup) == (metre, pickup)
    assert song.silence == 0 and abc_songs(f'{body} z2 |')[0].silence == 2


def test_abc_chords_and_chord_symbols():
    assert abc_rows(abc_songs('[CEG]2 [CE]/ [C2E]-[CF]')[0].notes) == [
        (60, 0, 2), (64, 0, 2), (67, 0, 2), (60, 2, 2.5), (64, 2, 2.5), (60, 2.5, 5.5), (64, 2.5, 4.5), (65, 4.5, 5.5)]
    assert abc_rows(abc_songs('["Am"C!f!.E]')[0].notes) == [(60, 0, 1), (64, 0, 1)]
    # held to the next symbol, over bars and rests, struck again by the same symbol; N.C. and the end stop it
    for stop in ('"N.C."', '"NC"', '"^N.C."'):
        rows = abc_rows(abc_songs(f'c "G7"d2 z|"G"d z {stop}d "F#m/C#"c2|')[0].notes)
        assert [r for r in rows if r[0] < 66] == [(n, *t) for t in ((1, 4), (4, 6), (7, 9)) for n in
                                                  ((55, 59, 62) if t[0] < 7 else (54, 57, 61))]
    # the melody's D4 is inside G B D: the triad turns over until it lies below
    assert abc_rows(abc_songs('"G"D4')[0].notes) == [(50, 0, 4), (55, 0, 4), (59, 0, 4), (62, 0, 4)]
    for intervals, symbols in {
        (0, 4, 7): 'C C7 Cmaj7 CM7 C6 C6/9 Cadd9 C13 C/g C/f+ C7/b C/Bb C/^f C(Am)',
        (0, 3, 7): 'Cm Cm7 Cmin Cm/e_ C-',
        (0, 5, 7): 'Csus4 C7sus4 Csus',
        (0, 3, 6): 'Cdim Cd C/dim Co7 Cm7b5 C°', (0, 4, 8): 'Caug C+ C7#5', (0, 2, 7): 'Csus2',
    }.items():
        for symbol in symbols.split():
            rows = abc_rows(abc_songs(f'"{symbol}"c4')[0].notes)
            assert [n - 48 for n, *_ in rows[:-1]] == list(intervals), symbol
    assert [n for n, *_ in abc_rows(abc_songs('"B♭"c4')[0].notes)] == [58, 62, 65, 72]
    for words in ('p', 'tr', '1', 'Allegro', 'Fine', 'Capo 2', 'D C', 'Gently', 'a', '^C', 'Cxyz', ''):
        assert abc_rows(abc_songs(f'"{words}"c4')[0].notes) == [(72, 0, 4)], words
    # a symbol that is replaced at once makes no sound; with a repeat the symbols come round again
    assert len(abc_songs('"C""G"c4')[0].notes) == len(abc_songs('"N.C.""G"c4')[0].notes) == 4
    assert len(abc_songs('"G""N.C."c4')[0].notes) == 1
    assert [r[1:] for r in abc_rows(abc_songs('|:"C"c4:|')[0].notes) if r[0] == 48] == [(0, 4), (4, 8)]


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
        assert [abc_rows(s.notes) for s in songs] == [[(69, 0, 1), (69, 1, 2)], [(66, 0, 1)]]
        assert songs[0].text == 'M:3/4\nL:1/4\nK:G\nA:|\n'
        assert '"Two"' in capsys.readouterr().err
    path.write_bytes(b'\xef\xbb\xbfX:1\nK:C\nC')
    assert len(notation.read_abc(path)) == len(notation.read_abc(io.BytesIO(path.read_bytes()))) == 1
    for wrong in (b'', b'no tune here'):
        path.write_bytes(wrong)
        with pytest.raises(notation.UserError, match='a.abc'):
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
    for song in notation.read_abc(HERE / 'tunes.abc'):
        again = notation.read_abc(('X:1\n' + song.text).encode())[0]
        assert np.array_equal(again.notes, song.notes) and again.text == song.text == notation.tune_text(song)
        assert re.fullmatch(r'[ -~\n]*', song.text)


def test_abc_costs_are_bounded():
    book = 'X:%d\nT:Tune %d\nM:4/4\nL:1/8\nK:G\n' + '|:G2Bd g2fe|d2cB A2GF:|\n' * 5 + '\n'
    lengths = ''.join(f'C{n}/{999 - n}' for n in range(1, 999))
    worst = ['C' + '>' * 39_000, '[1' * 19_000, ':' * 19_000 + '|', 'C' + ':' * 9_000 + '|' + 'C' * 9_000,
             '[' + 'C' * 9_000 + ']:::::::|', lengths,
             '"C"C' * 9_900, '"C"[C-E]-' * 4_000, '|:' * 19_000, 'C:|' * 13_000, '(9:9:9' * 6_000,
             'C' + "'" * 39_000, '"(' * 19_000, '{' * 39_000,
             '[L:1/997]C[L:1/991]C' * 1900, '|:C[99C:|' * 4000, '![' * 19_000, '"' * 39_999, '\n ' * 19_000,
             '=' * 39_000, 'A:|\n' * 9_000, '[K:' * 13_000,
             'C&' * 19_000, '!D.C.!C|' * 4_900, '[V:1]C[V:2]C' * 3_000, 'P:A\nC\n' * 6_000, 'K:C' + '^c' * 19_000]
    for tune in [*worst, 'P:' + '((' * 9_000, 'P:' + '(A)9' * 9_000, 'P:((((A99)99)99)99)99\nK:C\nP:A\n' + 'C' * 9_000]:
        start = time.process_time()
        body = f'{tune}\nK:C\nC' if tune[0] == 'P' else f'K:C\n{tune}'
        notation.read_abc(f'X:1\n{body}\n'.encode(), skipped=[])
        assert time.process_time() - start < 3, tune[:20]
    start = time.process_time()
    assert len(notation.read_abc(''.join(book % (i, i) for i in range(1000)).encode())) == 1000
    assert time.process_time() - start < 20


# ---------------------------------------------------------------------------------------------------------------------
# notation: ABC out

def abc_music(notes, **more):
    """The music that is written for notes given as (MIDI note, onset, end)."""
    more = dict(metre='4/4', pickup=0, sharps=0) | more
    text, left_out = notation.write_abc(np.array(notes, float) - [21, 0, 0], **more)
    return re.split(r'K:.*\n', text)[1].strip(), left_out


def test_abc_header():
    text, _ = notation.write_abc(np.array([[39., 0, 1]]), 'Café\n% "x"', 90, 3, True, '6/8', 0)
    assert text.startswith('X:1\nT:Cafe   "x"\nM:6/8\nL:1/8\nQ:1/4=90\nK:F#m\n')
    assert notation.write_abc(np.zeros((0, 3)))[0].endswith('K:C\nz2|]\n')


@pytest.mark.parametrize('notes, more, music', [
    # lengths, ties over the bar line, rests, beams, octaves
    ([(60, 0, 1), (62, 1, 1.5), (64, 1.5, 2), (65, 2, 5), (72, 5.5, 5.75), (84, 5.75, 6),
    (48, 6, 8)], {}, "C2DE F4-|F2zc/c'/ C,4|]"), ([(60, 0, 2.5), (62, 2.5, 4)], {}, 'C4- CD3|]'),
    ([(60, i, i + 1) for i in range(18)], dict(pickup=2), 'C2C2|C2C2 C2C2|C2C2 C2C2|C2C2 C2C2|C2C2 C2C2|]'),
    ([(60, i / 2, i / 2 + .5) for i in range(7)], dict(metre='6/8', pickup=.5), 'C|CCC CCC|]'),
    # accidentals by key and bar, naturals, and none of them doubtful in another octave
    ([(66, 0, 1), (66, 1, 2), (65, 2, 3), (77, 3, 4), (66, 4, 8)], {}, '^F2F2 =F2f2|^F8|]'),
    ([(66, 0, 2), (65, 2, 4), (66, 4, 8)], dict(sharps=1), 'F4 =F4|F8|]'), ([(66, 2, 6), (66, 6, 7),
    (65, 7, 8)], {}, 'z4 ^F4-|^F4 F2=F2|]'),
    ([(70, 0, 4)], dict(sharps=-2), 'B8|]'), ([(68, 0, 4)], dict(minor=True), '^G8|]'), ([(61, 0, 2),
    (63, 2, 4)], dict(sharps=4), 'C4 D4|]'),
    # triplets
    ([(60 + i, i / 3, (i + 1) / 3) for i in range(3)] + [(65, 1, 2)], dict(sharps=-5), '(3CD=DF2|]'),
    ([(60, 0, 2 / 3), (62, 2 / 3, 1)], {}, '(3:2:2C2D|]'), ([(60, 0, .5), (62, .5, 2 / 3), (62, 2 / 3, 5 / 6),
    (62, 5 / 6, 1)], {}, 'C(3D/D/D/|]'), ([(60, 0, 1 / 3), (62, 1 / 3, 2)], {}, '(3:2:2CD2-D2|]'),
    # several notes at once, with their own lengths
    ([(60, 0, 2), (64, 0, 1), (65, 1, 2)], {}, '[C2-E2][C2F2]|]'),
    ([(72, 0, 1), (76, 0, 1), (79, 0, 1)], {}, '[c2e2g2]|]'),
    # chords under the melody
    ([(48, 0, 2), (52, 0, 2), (55, 0, 2), (72, 0, 4), (50, 2, 4), (53, 2, 4), (57, 2, 4),
    (60, 2, 4)], {}, '"C"c4- "Dm7"c4|]'),
    ([(54, 0, 4), (57, 0, 4), (60, 0, 4), (74, 1, 4), (58, 4, 8), (62, 4, 8), (65, 4, 8),
    (77, 4, 6)], {}, '"F#dim"z2d6|"Bb"f4 z4|]'),
    # where they fall silent for a beat or more it is told
    ([(48, 0, 2), (52, 0, 2), (55, 0, 2), (72, 0, 4)], {}, '"C"c4- "^N.C."c4|]'),
    ([(48, 0, 1), (52, 0, 1), (55, 0, 1), (72, 0, 2), (74, 2, 3), (43, 3, 4), (47, 3, 4), (50, 3, 4),
    (72, 3, 4)], {}, '"C"c2-"^N.C."c2 d2"G"c2|]'),
])
def test_abc_music(notes, more, music):
    assert abc_music(notes, **more) == (music, 0)
    if '"' not in music:
        key = notation.key_name(more.get('sharps', 0), more.get('minor', False))
        again = notation.read_abc(f'X:1\nM:4/4\nL:1/8\nK:{key}\n{music}'.encode())
        assert np.allclose(abc_rows(again[0].notes), sorted(notes, key=lambda note: (note[1], note[0])), atol=1e-6)


def test_abc_bass_below_chords_is_left_out_and_counted():
    chord = [(48, 1, 2), (52, 1, 2), (55, 1, 2)]
    assert abc_music([(36, 0, 1), (72, 0, 1), *chord, (72, 1, 2)]) == ('c2"C"c2|]', 1)
    assert abc_music([(36, 0, 1), (72, 0, 1)]) == ('[C,,2c2]|]', 0)


def test_abc_round_trip_is_stable():
    for song in notation.read_abc(HERE / 'tunes.abc'):
        more = song._asdict()
        more = [more[name] for name in ('name', 'tempo', 'sharps', 'minor', 'metre', 'pickup')]
        text, left_out = notation.write_abc(song.notes, *more)
        again = notation.read_abc(text.encode())[0]
        assert left_out == 0 and np.allclose(again.notes, song.notes, atol=1e-6)
        for name in ('sharps', 'minor', 'metre', 'pickup'):
            assert getattr(again, name) == getattr(song, name)
        assert notation.write_abc(again.notes, *more)[0] == text and abs(again.tempo - song.tempo) < .01
        # without the header's help the notes come back too, and as a model reads them
        guessed = notation.read_abc(notation.write_abc(song.notes)[0].encode())[0]
        plain = notation.tune_text(song._replace(text=None))
        assert np.allclose(guessed.notes, song.notes, atol=1e-6) and re.match(r'M:.*\nL:1/8\nK:.*\n', plain)
        assert np.allclose(notation.read_abc(('X:1\n' + plain).encode())[0].notes, song.notes, atol=1e-6)


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


def data_found(notes, again, lengths):
    """F1 of notes found again: the same key, struck less than a tenth of a beat off (and as long)."""
    found = 0
    for key, on, end in notes:
        same = again[(again[:, 0] == key) & (abs(again[:, 1] - on) < 0.1)]
        found += (abs(same[:, 2] - end) < 0.1).any() if lengths else len(same) > 0
    return 2 * found / (len(notes) + len(again))


@pytest.mark.parametrize('beats, steps', [
    ([(0, 0, 1)], [(0, 0, 4)]),
    ([(0, .12, .9)], [(0, 0, 4)]),
    ([(0, .125, 1.125)], [(0, 1, 5)]),
    ([(0, 1, 1)], [(0, 4, 5)]),
    ([(0, 0, .05)], [(0, 0, 1)]),
    ([(0, 0, .99), (0, 1, 2)], [(0, 0, 4), (0, 4, 8)]),
    ([(0, 0, 2), (0, 1, 1.5)], [(0, 0, 4), (0, 4, 6)]),
    ([(0, 0, .5), (0, .05, 1)], [(0, 0, 4)]),
    ([(0, 0, 1), (87, 0, 1)], [(0, 0, 4), (87, 0, 4)]),
])
def test_data_quantiser(beats, steps):
    song = data.Song('', np.array(beats, dtype=float))
    assert data.quantise(song.notes, 4).tolist() == [list(note) for note in steps]
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


@pytest.mark.parametrize('n', [0, 1, 50, 600])
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
    if grid.V == 273:
        assert (frames.sum(1) == 1).all()


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
    assert data.Events(12).encode(data.Song('', notes)).argmax(1).tolist() == data_units(
        'on40 on44 wait12 off40 off44 on40 wait12 off40 wait96 wait96 wait48 on30 wait12 off30')


def test_data_events_forgive_what_a_sampler_may_do():
    events = data.Events(4)
    frames = np.eye(events.V, dtype=np.uint8)
    units = data_units('off5 on6 wait2 on6 on9 off9 wait1 off6 off6 on7 wait4')
    assert events.decode(frames[units]).tolist() == [[6, 0, .5], [6, .5, .75], [7, .75, 1.75]]
    rng = np.random.default_rng(0)
    for _ in range(20):
        notes = events.decode(frames[rng.integers(0, events.V - 1, 300)])
        assert (notes[:, 2] > notes[:, 1]).all() and np.array_equal(notation.one_per_key(notes), notes)
        assert np.array_equal(events.decode(events.encode(data.Song('', notes))), notes)


def test_data_frames_keep_the_notes_of_played_music(tmp_path):
    """Notes that end a tick early, triplets, a chord below: all is found again, and far less without onsets."""
    rng = np.random.default_rng(1)
    rows = []
    now = 0.0
    for _ in range(300):
        length = rng.choice([.25, .5, .5, .5, 1, 1.5, 1 / 3])
        for _ in range(3 if length == 1 / 3 else 1):
            rows.append((rng.integers(40, 60), now, now + length - 1 / 480))
            now += length
    rows += [(key, bar, bar + 2 - 1 / 480) for bar in range(0, int(now), 2) for key in (20, 24, 27)]
    notes = notation.one_per_key(np.array(rows))
    for name, low, high in (('roll', .99, 1), ('events', .999, 1), ('plain', .3, .9)):
        grid = DATA_GRIDS[name]
        notation.write_midi(grid.decode(grid.encode(data.Song('', notes))), tmp_path / 'a.mid')
        assert low <= data_found(notes, notation.read_midi(tmp_path / 'a.mid').notes, lengths=False) <= high


@pytest.mark.parametrize('grid, least', [(data.PianoRoll(12), .999), (data.Events(12), .999), (data.AbcText(), 1)])
def test_data_bundled_tunes_round_trip(grid, least):
    songs = notation.read_abc(data.TUNES)[::4]
    assert np.mean([data_found(song.notes, grid.decode(grid.encode(song)), lengths=True) for song in songs]) >= least


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
    before = frames.copy()
    abc.transpose(frames, 5)
    assert np.array_equal(frames, before) and abc.steps(frames) == 0
    for text in ('K:C\n\u00e9', 'K:C\n\t', 'x' * 100_001):
        with pytest.raises(data.UserError, match='character'):
            abc.encode_text(text)
    for text in ('', 'C', 'K:C\n', 'K:Z\nC', 'L:1/8\nK:C\n[CE'):
        with pytest.raises(data.UserError):
            abc.to_song(abc.encode_text(text))


def test_data_openings(tmp_path):
    path = tmp_path / 'a.abc'
    path.write_text('X:1\nM:4/4\nL:1/4\nK:D\nDEFG|A4|]\n')
    roll = data.PianoRoll()
    song, frames, semitones = roll.opening(path, 2.5, True)
    assert semitones == -2
    assert song.notes.tolist() == [[39, 0, 1], [41, 1, 2], [43, 2, 2.5]]
    assert np.array_equal(roll.decode(frames), song.notes)
    # a text goes on, so it has no end; moved, it is written anew in its new key
    abc = data.AbcText()
    assert abc.text(abc.opening(path, 100, False)[1]) == 'M:4/4\nL:1/4\nK:D\nDEFG|A4'
    song, frames, _ = abc.opening(path, 100, True)
    assert abc.to_song(frames).sharps == song.sharps == 0 and np.array_equal(abc.decode(frames), song.notes)
    path.with_name('fields.abc').write_text('%abc\nX:1\nT:any\nK:D\nM:6/8 \n')
    assert abc.text(abc.opening(path.with_name('fields.abc'), 100, False)[1]) == 'M:6/8\nK:D\n'
    for name, beats in (('missing.abc', 9), ('fields.abc', 9), ('a.abc', 0)):
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
@pytest.mark.parametrize('end', [1e5, 1e12, float('inf')])
def test_data_a_song_may_be_too_long(grid, end):
    with pytest.raises(data.UserError, match='100,000'):
        grid.encode(data.Song('', np.array([[40, 0, end]])))


# ---------------------------------------------------------------------------------------------------------------------
# data.py: splits and batches

def data_set(grid, n_songs=12, notes=80, seed=0):
    rng = np.random.default_rng(seed)
    songs = []
    for i in range(n_songs):
        text = ''.join(rng.choice(list(data.AbcText.CHARACTERS), rng.integers(20, 200)))
        songs.append(data.Song(f'{i}', data_random_notes(rng, notes, 60), text=text))
    # one long held note
    songs[0] = songs[0]._replace(notes=np.array([[10, 0, 300.0]]))
    return data.Dataset(dict(train=songs, valid=songs[:5], test=songs[5:]), 'random', grid)


def data_tape(dataset):
    """All frames of the training songs, and the boundaries between them, (T, V)."""
    boundary = np.zeros((1, dataset.representation.V), dtype=np.uint8)
    boundary[0, -1] = 1
    pieces = [boundary]
    for song in dataset.songs['train']:
        pieces += [dataset.representation.encode(song), boundary]
    return np.concatenate(pieces)


def data_place(grid, tape, start):
    """Frames and steps from the last boundary before a window to the last frame before it."""
    began = max(np.flatnonzero(tape[:start, -1]), default=0)
    between = tape[began + 1:start]
    age = len(between)
    if grid.settings['name'] == 'events':
        return age, sum(unit - 175 for unit in between.argmax(1) if unit >= 176)
    return age, age if grid.settings['name'] == 'piano_roll' else 0


@data_for_each()
def test_data_windows_equal_the_whole(grid):
    history = 40
    dataset = data_set(grid)
    tape = data_tape(dataset)
    assert (dataset.frames('train', 0, len(tape)) == tape).all()
    assert dataset.packed['train'].shape == (len(tape), -(-grid.V // 8))
    assert dataset.lengths('train').sum() == len(tape) - 13
    before = np.concatenate((np.zeros((history, grid.V), dtype=np.uint8), tape))
    places = {(before[i:i + history + 34].tobytes(), *data_place(grid, tape, i)) for i in range(len(tape) - 33)}
    seen = set()
    for seed in range(60):
        windows = dataset.batch('train', 50, 33, 0, np.random.default_rng(seed), history)
        assert windows.frames.shape == (50, 34, grid.V) and windows.past.shape == (50, history, grid.V)
        assert [part.dtype for part in windows] == 2 * [torch.uint8] + 2 * [torch.int64]
        whole = torch.cat((windows.past, windows.frames), dim=1).numpy()
        seen |= {(w.tobytes(), *place) for w, *place in zip(whole, windows.age.tolist(), windows.time.tolist())}
    assert seen <= places and len(seen) > .6 * len(places)
    for history in (0, 40):
        windows = dataset.batch('train', 1, len(tape) - 1, 0, np.random.default_rng(0), history)
        assert (windows.frames[0].numpy() == tape).all() and windows.past.shape[1] == history and not windows.past.any()
        assert (windows.age, windows.time) == (0, 0)
    with pytest.raises(data.UserError, match=f'--block_size={len(tape) - 1} or less'):
        dataset.batch('train', 1, len(tape), 0, np.random.default_rng(0))


@data_for_each('roll', 'plain', 'events')
def test_data_transposition_moves_a_window_by_one_interval_on_the_keyboard(grid):
    low, high = [data.Song('', np.array([[key, i, i + 1.5] for i, key in enumerate(8 * keys)])) for keys in
                 ([0, 5, 9], [87, 80, 84])]
    dataset = data.Dataset({split: [low, high] for split in data.SPLITS}, '', grid)
    tape = data_tape(dataset)
    tape = np.concatenate((np.zeros((20, grid.V), dtype=np.uint8), tape))
    keys = 88 if grid.V == 89 else 176
    moved = {}
    for at in range(len(tape) - 80):
        window = tape[at:at + 81]
        planes = window[:, :keys].reshape(81, -1, 88)
        used = planes.any((0, 1)).nonzero()[0]
        for shift in range(max(-6, -used.min()), min(6, 87 - used.max()) + 1):
            after = np.concatenate((np.roll(planes, shift, 2).reshape(81, keys), window[:, keys:]), axis=1)
            moved[after.tobytes()] = shift
    shifts = []
    for seed in range(100):
        batch = dataset.batch('train', 4, 60, 6, np.random.default_rng(seed), 20)
        again = dataset.batch('train', 4, 60, 6, np.random.default_rng(seed), 20)
        # a seed is a seed
        assert all(map(torch.equal, batch, again))
        # no note has been lost, or has come in on the other side
        shifts += [moved.get(window.numpy().tobytes()) for window in torch.cat((batch.past, batch.frames), dim=1)]
    assert set(shifts) == set(range(-6, 7))


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
    for every in (1, 2, 5, 12, 13, 100):
        read = [n for _, some, _ in dataset.whole_songs('train', 2, every) for n in some.tolist()]
        assert read == lengths[min(every, 12) // 2::every].tolist() and len(read) >= 1


# ---------------------------------------------------------------------------------------------------------------------
# data.py: load

def data_midi(path, key=39, beats=1.0):
    notation.write_midi(np.array([[key, 0, beats]]), path)
    return path


def data_folder(path, names, key=39):
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        data_midi(path / name, key + i % 40, 1 + i)
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
    for songs in data.load(tmp_path / 'b.abc', abc, common_key=True, log=lines.append).songs.values():
        for song in songs:
            again = abc.to_song(abc.encode(song))
            assert again.notes[:, 0].tolist() == song.notes[:, 0].tolist() and again.sharps == 0
    data.tell_what_is_left_out([data.Song('', song.notes, silence=silence) for silence in (0.5, 3, 4)], lines.append)
    assert '2 songs end in silence, 7 beats' in lines[-1] and capsys.readouterr().err == ''


def test_data_load_skips_and_names_what_is_corrupt(tmp_path, capsys):
    path = data_folder(tmp_path / 'a', ['1.mid', '2.mid', '3.mid', '.hidden.mid', '__MACOSX/x.mid', '.git/a.mid'])
    (path / 'bad.mid').write_bytes(b'MThd')
    (path / 'bad.abc').write_text('nothing')
    notation.write_midi(np.zeros((0, 3)), path / 'silent.mid')
    data_midi(path / 'forged.mid', beats=30_000)
    (path / 'readme.txt').write_text('not music')
    os.mkfifo(path / 'pipe.mid')
    (path / 'half.abc').write_text('X:1\nT:good\nK:C\nC\n\nX:2\nT:worse\nK:C\n')
    dataset = data.load(path)
    err = capsys.readouterr().err
    assert sum(data_names(dataset).values(), []).count('good') == 1 and sum(map(len, dataset.songs.values())) == 4
    assert err.count('\n') == 5 and all(line.startswith('skipped: ') for line in err.splitlines())
    assert all(name in err for name in ('bad.mid', 'bad.abc', 'silent.mid', 'forged.mid', 'worse'))
    for i in range(7):
        (path / f'bad{i}.mid').write_bytes(b'')
    data.load(path)
    # five by name, and how many more
    err = capsys.readouterr().err
    assert err.count('\n') == 6 and err.endswith('skipped: 7 more\n')


def test_data_load_errors(tmp_path):
    good = data_midi(tmp_path / 'good.mid').read_bytes()
    for name in ('empty', 'none', 'corrupt'):
        (tmp_path / name).mkdir()
    (tmp_path / 'none' / 'a.txt').write_text('')
    (tmp_path / 'corrupt' / 'a.mid').write_bytes(good[:20])
    contents = {'cut.mid': good[:-9], 'zero.mid': b'', 'zero.abc': b'', 'zero.zip': b'', 'a.txt': good, 'zero.npz': b'',
                'voices.abc': b'X:1\nK:C\nV:1\nC D\nV:2\nC'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    data_midi(tmp_path / 'forged.mid', beats=25_000)
    data_zip(tmp_path / 'none.zip', {'a.txt': b''})
    (tmp_path / 'cut.zip').write_bytes(data_zip(tmp_path / 'x.zip', {'a.mid': good}).read_bytes()[:-30])
    for name in ('fifo.mid', 'fifo.zip', 'fifo.npz'):
        os.mkfifo(tmp_path / name)
    says = {
        'missing': 'there is no', 'missing.npz': 'No such file', 'empty': 'no music',
        'none': 'no music', 'corrupt': 'a.mid', 'cut.mid': 'midst', 'zero.mid': '', 'zero.abc': 'X:',
        'zero.zip': 'not a whole zip', 'a.txt': 'no music', 'voices.abc': 'voices', 'forged.mid': '24,999 beats',
        'none.zip': 'no music', 'cut.zip': 'not a whole zip', 'zero.npz': 'data.py FOLDER OUT.npz',
        'fifo.mid': 'no plain file', 'fifo.zip': 'no plain file', 'fifo.npz': 'no plain file'}
    for name, why in says.items():
        with pytest.raises(data.UserError, match=f'{re.escape(name)}.*: ') as e:
            data.load(tmp_path / name)
        assert why in str(e.value) and '\n' not in str(e.value)
    for name in ('', 'x' * 300):
        with pytest.raises(data.UserError, match='there is no'):
            data.load(name)


@pytest.mark.parametrize('name', ['../a.mid', 'x/../../a.mid', '/etc/a.mid', '..\\a.mid', 'C:\\a.mid', '../a.txt'])
def test_data_load_a_zip_that_climbs_out_writes_nothing(tmp_path, name):
    good = data_midi(tmp_path / 'good.mid').read_bytes()
    dataset = data.load(data_zip(tmp_path / 'a.zip', {'good.mid': good, name: good}))
    assert 'good.mid' in data_names(dataset)['train']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.zip', 'good.mid'] and not Path('/etc/a.mid').exists()


def test_data_load_survives_zip_bombs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, 'MAX_FILE', 1 << 20)
    good = data_midi(tmp_path / 'good.mid').read_bytes()
    path = data_zip(tmp_path / 'a.zip', {'good.mid': good, 'bomb.mid': bytes(20 << 20), 'huge.txt': bytes(20 << 20)})
    assert data_names(data.load(path))['train'] == ['good.mid'] and 'bomb.mid is larger' in capsys.readouterr().err
    content = bytearray(data_zip(tmp_path / 'b.zip', {'good.mid': good, 'other.mid': good}).read_bytes())
    # the packed bytes of the first member
    content[30 + len('good.mid') + 5] ^= 255
    # the same path with other music in it is read anew
    path.write_bytes(content)
    assert data_names(data.load(path))['train'] == ['other.mid'] and 'good.mid' in capsys.readouterr().err
    (tmp_path / 'large.mid').write_bytes(bytes(2 << 20))
    with pytest.raises(data.UserError, match='large.mid is larger'):
        data.load(tmp_path / 'large.mid')


def test_data_load_tells_of_zips_inside(tmp_path):
    path = data_folder(tmp_path / 'a', ['1.mid', '2.mid', '3.mid'])
    data_zip(path / 'inner.zip', {'4.mid': (path / '1.mid').read_bytes()})
    data_zip(tmp_path / 'outer.zip', {p.name: p.read_bytes() for p in path.iterdir()})
    for music in (path, tmp_path / 'outer.zip'):
        lines = []
        assert '(3 songs)' in data.load(music, log=lines.append).source
        assert '1 zip files inside' in lines[0] and 'inner.zip' in lines[0]


def test_data_load_odd_names(tmp_path, capfd):
    path = data_folder(tmp_path / 'a', ['1.mid', '2.mid', os.fsdecode(b'\xe9t\xe9.mid')])
    (path / 'red\x1b[31m\n.mid').write_bytes(b'')
    assert sum(map(len, data.load(path).songs.values())) == 3
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and '\x1b' not in err and 'red?[31m?.mid' in err


def test_data_load_many_files_are_read_by_other_processes(tmp_path, monkeypatch, capsys):
    music = data_folder(tmp_path / 'music', [f'{i % 3}/{i}.mid' for i in range(20)])
    (music / 'bad.mid').write_bytes(b'MThd')
    path = data_zip(tmp_path / 'a.zip', {str(p.relative_to(music)): p.read_bytes() for p in music.rglob('*.mid')})
    here = data.load(path)
    monkeypatch.setattr(data, 'MANY', 20)
    monkeypatch.setattr(data, 'map', None, raising=False)
    there = data.load(path)
    assert data_same(here, there) and here.source == there.source and capsys.readouterr().err.count('bad.mid') == 2


def test_data_npz_holds_what_was_read(tmp_path, monkeypatch, capsys):
    path = data_folder(tmp_path / 'music', ['train/1.mid', 'valid/2.mid', 'test/3.mid', os.fsdecode(b'train/\xe9.mid')])
    (path / 'bad.mid').write_bytes(b'MThd')
    tunes = 'X:1\nT:One\nM:6/8\nQ:1/4=90\nK:Gm\nG|B2G D2G|\n\nX:2\nT:Two\nK:C\nC,,,,D2\n\nX:3\nK:C\n'
    (path / 'train' / 'a.abc').write_text(tunes)
    out = tmp_path / 'music.npz'
    command = [sys.executable, data.__file__, path, out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f'{out}: 6 songs, 10 notes, 2 skipped\n', '')
    lines = []
    read = data.load(path, log=lines.append)
    skipped = capsys.readouterr().err
    again = data.load(out, log=lines.append)
    assert data_same(read, again) and '(6 songs)' in again.source and str(out) in again.source
    assert skipped == capsys.readouterr().err and skipped.count('\n') == 2 and lines[:2] == lines[2:]
    monkeypatch.setattr(sys, 'argv', ['data.py', str(path), str(tmp_path / 'music.zip')])
    with pytest.raises(data.UserError, match='music.zip has to end in .npz'):
        data.main()
    content = out.read_bytes()
    np.savez(tmp_path / 'pickled.npz', table=np.array([{}], dtype=object), notes=np.zeros((1, 3)))
    flipped = content[:200] + bytes([content[200] ^ 1]) + content[201:]
    pickled = (tmp_path / 'pickled.npz').read_bytes()
    bad = dict(cut=content[:-1], flipped=flipped, zeros=bytes(len(content)), pickled=pickled)
    for name, wrong in bad.items():
        (tmp_path / f'{name}.npz').write_bytes(wrong)
        with pytest.raises(data.UserError, match=f'{name}.npz is not what python data.py'):
            data.load(tmp_path / f'{name}.npz')


# ---------------------------------------------------------------------------------------------------------------------
# data.py: Nottingham

@pytest.fixture
def data_nottingham(tmp_path, monkeypatch):
    """A small archive in the place of Nottingham, a folder to keep it in, and a way to serve it on 127.0.0.1."""
    names = [f'{split}/{i}.mid' for split in data.SPLITS for i in range(4)]
    music = data_folder(tmp_path / 'music', names, 29)
    files = {name: (music / name).read_bytes() for name in names}
    archive = data_zip(tmp_path / 'public.zip', {f'repo-1/notebooks/Nottingham/{name}': files[name] for name in names} |
                       {'repo-1/notebooks/Other/train/0.mid': b'other', 'repo-1/README': b''}).read_bytes()
    wrong = data_zip(tmp_path / 'wrong.zip', {f'Nottingham/{name}': files[name] + b'!' for name in names}).read_bytes()
    bodies = dict(good=archive, truncated=archive[:len(archive) // 2], page=b'<html>', slow=archive, wrong=wrong)
    home = tmp_path / 'home'
    home.mkdir()
    (home / 'tunes.abc').write_text(''.join(f'X:{i}\nT:Tune {i}\nK:C\nCDEF\n\n' for i in range(9)))
    digest = hashlib.sha256(b''.join(name.encode() + b'\0' + files[name] for name in sorted(files))).hexdigest()
    monkeypatch.setenv('no_proxy', '*')
    settings = dict(NOTTINGHAM=home / 'nottingham.zip', TUNES=home / 'tunes.abc', NOTTINGHAM_DIGEST=digest, TIMEOUT=1)
    for name, value in settings.items():
        monkeypatch.setattr(data, name, value)
    stop = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path[1:]
            if kind not in bodies:
                return self.send_error(404)
            self.send_response(200)
            self.send_header('Content-Length', str(len(archive if kind == 'truncated' else bodies[kind])))
            self.end_headers()
            # 5 s in which no timeout of a socket would strike
            drip = 25 * (kind == 'slow')
            with contextlib.suppress(OSError):
                for byte in bodies[kind][:drip]:
                    if stop.wait(.2):
                        return
                    self.wfile.write(bytes([byte]))
                self.wfile.write(bodies[kind][drip:])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        closed = s.getsockname()[1]

    def serve(*kinds):
        ports = [closed if kind == 'refused' else server.server_address[1] for kind in kinds]
        urls = [f'http://127.0.0.1:{port}/{kind}' for port, kind in zip(ports, kinds)]
        monkeypatch.setattr(data, 'NOTTINGHAM_URLS', urls)
        return home, files

    yield serve
    stop.set()
    server.shutdown()
    server.server_close()


def test_data_nottingham_is_downloaded_and_kept(data_nottingham):
    kinds = ('wrong', 'truncated', 'refused', 'slow', '404', 'page', 'good')
    home, files = data_nottingham(*kinds)
    lines = []
    dataset = data.load(log=lines.append)
    assert sorted(sum(data_names(dataset).values(), [])) == sorted(f'Nottingham/{name}' for name in files)
    assert all(f'/{split}/' in song.name for split, songs in dataset.songs.items() for song in songs)
    assert dataset.source == f'Nottingham, {home / "nottingham.zip"} (12 songs)'
    assert [line.startswith('downloading Nottingham from 127.0.0.1') for line in lines] == 7 * [True] + [False]
    with zipfile.ZipFile(home / 'nottingham.zip') as archive:
        assert {name.partition('/')[2]: archive.read(name) for name in archive.namelist()} == files
    # the second time there is no need for a network
    data_nottingham('refused')
    again = data.load(log=lines.append)
    assert data_same(again, dataset) and len(lines) == 9


@pytest.mark.parametrize('kinds', [('wrong', 'page'), ('truncated', '404'), ('refused', 'slow')])
def test_data_nottingham_that_cannot_be_had_is_the_tune_book(data_nottingham, kinds):
    home, _ = data_nottingham(*kinds)
    lines = []
    dataset = data.load(log=lines.append)
    assert 'tunes.abc' in dataset.source and '(9 songs)' in dataset.source
    assert sum('tunes.abc' in line for line in lines) == 1
    assert [p.name for p in home.iterdir()] == ['tunes.abc']


def test_data_nottingham_wrong_archives_and_no_place(data_nottingham, monkeypatch):
    home, files = data_nottingham('good')
    data_zip(home / 'nottingham.zip', {'Nottingham/train/0.mid': files['train/0.mid']})
    lines = []
    assert '(12 songs)' in data.load(log=lines.append).source and len(lines) == 2
    assert '(12 songs)' in data.load(log=lines.append).source and len(lines) == 3
    monkeypatch.setattr(data, 'NOTTINGHAM', home / 'missing' / 'nottingham.zip')
    assert 'tunes.abc' in data.load(log=lines.append).source and any('there is no folder' in line for line in lines)
    (home / 'tunes.abc').unlink()
    data_nottingham('refused')
    with pytest.raises(data.UserError, match='neither Nottingham .*refused.*tunes.abc'):
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
    """A device with its kernel."""
    if not wkv.has_kernel(torch.device(request.param)):
        pytest.skip(wkv.describe(request.param))
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


def wkv_sum(w, u, k, v, g, state=None, size=False):
    """y and the gradients of sum(g y) by w, u, k, v, as sums written from the formula: with P[s, t] the weight of
    frame t in y_s, the gradient of its exponent is g_s P[s, t] sum_j P[s, j] (v_t - v_j).
    size: the same sums of absolute values.
    """
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
    near = v[:, :, None] - v[:, None]
    g = g[:, :, None]
    if size:
        near = near.abs()
        v = v.abs()
        g = g.abs()
    d = g * P * torch.einsum('bsjc,btjc->bstc', P, near)
    dw = (d * age.clamp_min(0)).sum((0, 1, 2))
    y = (P * v[:, None]).sum(2)
    du = (d * (age == -1)).sum((0, 1, 2))
    return y, dw if size else -dw, du, d.sum(1)[:, before:], (P * g).sum(1)[:, before:]


def wkv_run(w, u, k, v, g, state=None, backend=None):
    """y, the gradients of w, u, k, v, and the state."""
    leaves = [x.detach().clone().requires_grad_() for x in (w, u, k, v)]
    y, state = wkv.wkv(*leaves, state, backend)
    assert not state.requires_grad
    return [y.detach(), *torch.autograd.grad(y, leaves, g), state]


def wkv_error(x, want):
    """|x - want| / |want|; less than 1e-30 counts as the zero it is in float32."""
    assert torch.isfinite(x).all()
    want = want.cpu().double()
    return ((x.cpu().double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def wkv_check(got, want, forward=1e-5, gradient=1e-4):
    errors = [wkv_error(x, y) for x, y in zip(got, want)]
    assert errors[0] <= forward and max(errors[1:]) <= gradient, errors


@pytest.mark.parametrize('scale', [1, 30])
@pytest.mark.parametrize('T', [1, 2, 31, 32, 33])
def test_wkv_kernel_is_the_sum(wkv_device, T, scale):
    cases = [(C, w) for C in (1, 7, 64) for w in (None, 1e-4, 1.0, 50.0)]
    for seed, (C, w) in enumerate(cases):
        inputs = wkv_inputs(2, T, C, scale, w, device=wkv_device, seed=seed)
        for state in (None, wkv_random_state(2, C, wkv_device)):
            got = wkv_run(*inputs, state, wkv_device)[:5]
            want = wkv_sum(*inputs, state)
            wkv_check(got, want)
            # each number, by the size of its terms
            sizes = wkv_sum(*inputs, state, size=True)
            for x, y, size, bound in zip(got, want, sizes, (1e-5, 1e-4, 1e-4, 1e-2, 1e-4)):
                assert ((x.cpu() - y).abs() <= bound * size + 1e-30).all()


@pytest.mark.parametrize('T, C, scale',
                         [(1000, 512, 1), (1000, 64, 30), (4096, 1, 30), (4096, 7, 1), (4096, 64, 30)])
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


@pytest.mark.parametrize('segments, warps', [(2, 1), (3, 1), (5, 1), (16, 1), (1, 2), (1, 16), (4, 16), (16, 16)])
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
    want, got = results
    for x, y, bound in zip(got, want, (1e-6, 1e-6, 1e-5, 1e-5, 1e-5, 1e-5)):
        assert wkv_error(x, y) < bound


@pytest.mark.parametrize('T, pieces, backend', [
    (100, [1] * 100, 'torch'), (100, [7, 32, 33, 28], 'torch'),
    (100, [1] * 100, None), (100, [7, 32, 33, 28], None), (100, [99, 1], None), (200_000, [1000] * 200, None)])
def test_wkv_state_continues_a_tune(wkv_device, T, pieces, backend):
    w, u, k, v, _ = wkv_inputs(3, T, 20, 5, device=wkv_device)
    want, last = wkv.wkv(w, u, k, v, backend=backend)
    state = None
    y = []
    for k_piece, v_piece in zip(k.split(pieces, 1), v.split(pieces, 1)):
        with torch.no_grad():
            out, state = wkv.wkv(w, u, k_piece, v_piece, state, backend)
        y.append(out)
    assert wkv_error(torch.cat(y, 1), want) < 1e-5
    assert wkv_error(state[:, 0] / state[:, 1], last[:, 0] / last[:, 1]) < 1e-5
    assert (state[:, 1].log() + state[:, 2] - last[:, 1].log() - last[:, 2]).abs().max() < 1e-3
    # the back ends read each other's state
    _, state = wkv.wkv(w, u, k[:, :50], v[:, :50], backend=backend)
    assert wkv_error(wkv.wkv(w, u, k[:, 50:100], v[:, 50:100], state, 'torch')[0], want[:, 50:100]) < 1e-5


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


@pytest.mark.parametrize('given, sums', [('float64', 'float64'), ('float32', 'float32'), ('float16', 'float32')])
def test_wkv_types(given, sums):
    w, u, k, v, g = wkv_inputs(2, 5, 3, dtype=getattr(torch, given))
    for weights in (torch.float32, torch.float64):
        state = wkv_random_state(2, 3)
        want = wkv_sum(w, u, k, v, g, state)[0]
        y, state = wkv.wkv(w.to(weights), u.to(weights), k, v, state)
        assert y.dtype == k.dtype and state.dtype == getattr(torch, sums)
        # float64 is float64 throughout, whatever the state comes in
        assert wkv_error(y, want) < 100 * torch.finfo(k.dtype).eps


def test_wkv_strides_and_nan(wkv_device):
    w, u, k, v, g = wkv_inputs(2, 40, 12, device=wkv_device)
    want = wkv_run(w, u, k, v, g)
    got = wkv_run(w.repeat_interleave(2)[::2], u, *(x.mT.contiguous().mT for x in (k, v, g)))
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    # a diverged model has to show
    k[1, 20, 3] = math.nan
    y = wkv.wkv(w, u, k, v)[0]
    assert y[1, 20:, 3].isnan().all() and y.isnan().sum() == 20


def test_wkv_opcheck(wkv_device):
    for dtype in (torch.float32, torch.bfloat16):
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
    (dict(state=torch.zeros(1, 3, 3)), r'\(1, 3, 3\)'),
    (dict(k=torch.ones(2, 0, 3), v=torch.ones(2, 0, 3)), 'none of them 0'),
    (dict(u=torch.ones(3, device='meta')), 'on one device'),
    (dict(v=torch.ones(2, 5, 3).double()), 'of one floating type.*float64'),
    (dict(k=torch.ones(2, 5, 3).int(), v=torch.ones(2, 5, 3).int()), 'of one floating type'),
    (dict(k=torch.ones(2, 5, 3).double(), v=torch.ones(2, 5, 3).double(), backend='cpu'), 'run on torch.float64')])
def test_wkv_refuses(change, match):
    inputs = dict(zip('wukv', wkv_inputs(2, 5, 3)))
    with pytest.raises(ValueError, match=match):
        wkv.wkv(**{**inputs, **change})


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


@pytest.mark.parametrize('openmp', [True, False])
def test_wkv_two_processes_build_at_once(tmp_path, wkv_device, openmp):
    compiler = tmp_path / 'compiler'
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    change = {} if openmp else dict(CXX=str(compiler))
    code = f'import wkv; print(wkv.describe({wkv_device!r}))'
    for process in [wkv_process(tmp_path, code, **change) for _ in range(2)]:
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
        assert torch.equal(wkv.wkv(*inputs)[0], y)
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


@pytest.mark.parametrize('arch', ['sm_80', 'sm_90'])
def test_wkv_nvcc_builds_without_warnings_or_spills(tmp_path, arch):
    if not shutil.which('nvcc'):
        pytest.skip('no nvcc')
    run = subprocess.run(['nvcc', *wkv.FLAGS['cuda'], f'-DCHUNK={wkv.CHUNK["cuda"]}', f'-arch={arch}', '-cubin',
                          '-Werror=all-warnings', '-Xptxas=-v,-warn-spills', wkv.SOURCE, '-o', tmp_path / 'out'],
                         text=True, capture_output=True)
    report = run.stdout + run.stderr
    assert run.returncode == 0 and 'warning' not in report, report
    spills = re.findall(r'(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads', report)
    # forward and backward, two types
    assert len(spills) == 4 and set(spills) == {('0', '0', '0')}, report


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
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_wkv_benchmark():
    command = [sys.executable, wkv.__file__, '--shapes']
    run = subprocess.run([*command, '1,20,8'], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith('WKV: ') and re.search('1,20,8 torch: forward .* 1.0 x plain', run.stdout)
    run = subprocess.run([*command, '0,1,1'], text=True, capture_output=True)
    assert run.returncode == 2 and "'0,1,1'" in run.stderr and 'Traceback' not in run.stderr


# ---------------------------------------------------------------------------------------------------------------------
# model.py

# What stands for the representations here, with 7 units: units 3, 4, 5 of the events move time by 1, 2, 3 steps
MODEL_KINDS = {
    'bare': dict(head='chord'),
    'chord': dict(head='chord', lookback=9, beat=4),
    'bernoulli': dict(head='bernoulli', lookback=1, beat=1),
    'events': dict(head='softmax', lookback=9, beat=4, shift=3),
    'text': dict(head='softmax', lookback=9)}


def model_each_arch_and_kind(test):
    test = pytest.mark.parametrize('kind', MODEL_KINDS)(test)
    return pytest.mark.parametrize('arch', models.ARCHITECTURES)(test)


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
        whole, _ = model(frames)
        # rounding errors add up over 2 layers and 20 frames: over a dozen seeds the largest was 10 eps
        tolerance = 100 * torch.finfo(dtype).eps * whole.abs().max().item()
        with torch.no_grad():
            # one row alone
            model_close(model(frames[1:])[0], whole[1:].detach(), tolerance)
            for lengths in [20 * [1], [7, 1, 3, 9], [1, 12, 7]]:
                outs = []
                state = None
                for piece in frames.split(lengths, dim=1):
                    out, after = model(piece, state)
                    # reading leaves the state as it was
                    assert torch.equal(out, model(piece, state)[0])
                    outs.append(out)
                    state = after
                model_close(torch.cat(outs, 1), whole.detach(), tolerance)


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
    nats = []
    for mixed in (False, True):
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=mixed):
            nats.append(model.head.nll(model(frames[:, :-1])[0], frames[:, 1:]))
    assert nats[1].dtype == torch.float32 and not torch.equal(*nats)
    # eps is 2^-8; the mean over 38 frames of some 3 nats
    assert nats[1].mean().item() == pytest.approx(nats[0].mean().item(), rel=2 ** -5)


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
        model.head.nll(model(frames[:, :-1])[0], frames[:, 1:]).mean().backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == [] and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('arch', ['rwkv', 'transformer'])
@pytest.mark.parametrize('kind', MODEL_KINDS)
def test_model_loss_of_a_window_equals_that_in_the_whole_tune(arch, kind):
    # as initialised, these blocks are the identity, so a frame is told of the past by clock and lookback alone
    torch.manual_seed(0)
    model = Model(Config(7, arch, n_layer=1, n_embd=8, dropout=0, **MODEL_KINDS[kind] | dict(lookback=4))).double()
    for part in (model.emb, model.clock, model.look, model.head):
        if part:
            model_randomise(part)
    frames = model_frames(kind, 3, 40, 7)
    frames[:, 0] = torch.eye(7, dtype=torch.uint8)[6]
    out, _ = model(frames[:, :-1])
    nats = model.head.nll(out, frames[:, 1:])
    for start in range(5, 30):
        # runs are counted anew
        if (frames[:, start - 1:start] == frames[:, start - 5:start - 1]).all(-1).any():
            continue
        began = [max(row[:start, -1].nonzero().flatten().tolist()) for row in frames]
        age = torch.tensor([start - 1 - b for b in began])
        steps = (frames[..., 3:6] * torch.tensor([1, 2, 3])).sum(-1)
        time = torch.stack([row[b + 1:start].sum() for row, b in zip(steps, began)]) if model.config.shift else age
        loss = model.loss(frames[:, start:start + 10], frames[:, start - 4:start], age, time)
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


def model_rms_norm(x, P, name):
    # float64 has its own smallest step
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + np.finfo(float).eps) * P[name + '.weight']


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
    # a window cut from the middle of a tune comes with the frames before it, and counts runs anew (here none goes on)
    frames[:, 1:5, 0] = 0
    frames[:, 5, 0] = 1
    age = torch.tensor([5 - max(row[:6, -1].nonzero().flatten().tolist()) for row in frames])
    later, _ = model(frames[:, 6:], model.start(frames[:, 6:], frames[:, 6 - W:6], age, age))
    model_close(later, model(frames)[0].detach()[:, 6:], 1e-12)


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
    angle = 2 * np.pi * now[:, None] / (beat * np.array(Clock.beats))
    x = frames[0].numpy() @ P['emb.weight'].T + P['emb.bias']
    x = x + np.concatenate((np.cos(angle), np.sin(angle)), axis=1) @ P['clock.position.weight'].T
    x = model_layer_norm(model_layer_norm(x, P, 'ln_in'), P, 'ln_out')
    # the angles are float32
    model_close(model(frames)[0][0], x @ P['head.out.weight'].T + P['head.out.bias'], 1e-5)
    # a window from the middle of a tune is told where it stands: frame 12 is the fifth of its tune
    later, _ = model(frames[:, 13:], model.start(frames[:, 13:], None, torch.tensor([4]), torch.tensor([now[12]])))
    model_close(later, model(frames)[0].detach()[:, 13:], 1e-12)


def model_rnn_by_hand(x, P):
    h = np.zeros_like(x[0])
    out = []
    for row in model_layer_norm(x, P, 'ln'):
        h = np.tanh(P['rnn.weight_ih_l0'] @ row + P['rnn.bias_ih_l0'] + P['rnn.weight_hh_l0'] @ h + P['rnn.bias_hh_l0'])
        out.append(h)
    return x + out, [h]


def model_lstm_by_hand(x, P):
    h = np.zeros_like(x[0])
    c = np.zeros_like(x[0])
    out = []
    for row in model_layer_norm(x, P, 'ln'):
        gates = P['lstm.weight_ih_l0'] @ row + P['lstm.bias_ih_l0'] + P['lstm.weight_hh_l0'] @ h + P['lstm.bias_hh_l0']
        i, f, g, o = gates.reshape(4, -1)
        c = model_sigmoid(f) * c + model_sigmoid(i) * np.tanh(g)
        h = model_sigmoid(o) * np.tanh(c)
        out.append(h)
    return x + out, [h, c]


def model_mixed(x, m):
    """Token shift of arXiv 2305.13048: x (T, C), each frame mixed with the one before it."""
    return m * x + (1 - m) * np.vstack((np.zeros(x.shape[1]), x[:-1]))


def model_time_mix_by_hand(x, P):
    """Time mixing as the paper writes it: the WKV as two sums over all of the past, in float64."""
    r, k, v = (model_mixed(x, P[f'att.time_mix_{n}']) @ P[f'att.{m}.weight'].T
               for n, m in zip('rkv', ('receptance', 'key', 'value')))
    w = np.exp(P['att.time_decay'])
    wkv = np.zeros_like(x)
    for t in range(len(x)):
        weights = [np.exp(-(t - 1 - i) * w + k[i]) for i in range(t)] + [np.exp(P['att.time_first'] + k[t])]
        wkv[t] = (weights * v[:t + 1]).sum(0) / np.sum(weights, axis=0)
    return (model_sigmoid(r) * wkv) @ P['att.output.weight'].T


def model_channel_mix_by_hand(x, P):
    """Channel mixing as the paper writes it."""
    r = model_mixed(x, P['ffn.time_mix_r']) @ P['ffn.receptance.weight'].T
    k = model_mixed(x, P['ffn.time_mix_k']) @ P['ffn.key.weight'].T
    return model_sigmoid(r) * (np.maximum(k, 0) ** 2 @ P['ffn.value.weight'].T)


def model_rwkv_by_hand(x, P):
    x = x + model_time_mix_by_hand(model_layer_norm(x, P, 'ln1'), P)
    return x + model_channel_mix_by_hand(model_layer_norm(x, P, 'ln2'), P)


def model_rotated(x, position):
    """Rotary positions: the pairs (j, j + D/2) of x (D,) are complex numbers, and turned."""
    z = x[:len(x) // 2] + 1j * x[len(x) // 2:]
    z = z * np.exp(1j * position / 10000 ** (np.arange(len(z)) / len(z)))
    return np.concatenate((z.real, z.imag))


def model_attention_by_hand(x, P, heads, window):
    T, C = x.shape
    out = np.zeros_like(x)
    for head in np.arange(C).reshape(heads, -1):
        q, k, v = (x @ P[f'att.{name}.weight'][head].T for name in ('query', 'key', 'value'))
        q = np.array([model_rotated(row, t) for t, row in enumerate(q)])
        k = np.array([model_rotated(row, t) for t, row in enumerate(k)])
        for t in range(T):
            seen = slice(max(0, t - window + 1), t + 1)
            out[t, head] = model_softmax(k[seen] @ q[t] / np.sqrt(len(head))) @ v[seen]
    return out @ P['att.output.weight'].T


def model_transformer_by_hand(x, P, heads, window):
    x = x + model_attention_by_hand(model_rms_norm(x, P, 'norm1'), P, heads, window)
    y = model_rms_norm(x, P, 'norm2')
    gate = y @ P['ffn.gate.weight'].T
    return x + (gate * model_sigmoid(gate) * (y @ P['ffn.input.weight'].T)) @ P['ffn.output.weight'].T


@pytest.mark.parametrize('arch, by_hand', [('rnn', model_rnn_by_hand), ('lstm', model_lstm_by_hand)])
def test_model_recurrent_blocks_against_their_equations(arch, by_hand):
    torch.manual_seed(0)
    block = model_randomise(models.ARCHITECTURES[arch](Config(7, n_embd=5), layer=1)).double().eval()
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    first, state = block(x[:, :4], None)
    second, state = block(x[:, 4:], state)
    expected, last = zip(*(by_hand(row, model_arrays(block)) for row in x.numpy()))
    model_close(torch.cat((first, second), 1), np.stack(expected), 1e-12)
    state = state if arch == 'lstm' else (state,)
    model_close(torch.stack(state)[:, 0, 1], np.stack(last[1]), 1e-12)


def test_model_rwkv_block_against_the_formulas():
    torch.manual_seed(0)
    block = model_randomise(models.RWKVBlock(Config(7, n_embd=6), layer=1)).double().eval()
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    first, state = block(x[:, :4], None)
    second, _ = block(x[:, 4:], state)
    expected = np.stack([model_rwkv_by_hand(row, model_arrays(block)) for row in x.numpy()])
    model_close(torch.cat((first, second), 1), expected, 1e-11)


@pytest.mark.parametrize('C, heads', [(6, 1), (64, 2), (96, 3), (88, 2)])
@pytest.mark.parametrize('window', [1, 5, 1024])
def test_model_transformer_block_against_the_formulas(C, heads, window):
    torch.manual_seed(0)
    block = models.TransformerBlock(Config(7, n_embd=C, window=window), layer=1)
    block = model_randomise(block, 2 / C ** 0.5).double().eval()
    x = torch.randn(2, 11, C, dtype=torch.float64)
    first, state = block(x[:, :4], None)
    second, (past, count) = block(x[:, 4:], state)
    assert block.att.heads == heads and count == 11
    assert past[0].shape == past[1].shape == (2, heads, min(11, window - 1), C // heads)
    expected = np.stack([model_transformer_by_hand(row, model_arrays(block), heads, window) for row in x.numpy()])
    model_close(torch.cat((first, second), 1), expected, 1e-11)
    model_close(block(x, None)[0], expected, 1e-11)


def test_model_rotary_products_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    near = [(models.rotate(q, first + 7) * models.rotate(k, first)).sum().item() for first in (0, 1, 10 ** 6)]
    np.testing.assert_allclose(near, near[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize('L', [1, 3])
def test_model_rwkv_starts_as_v4neo(L):
    """Names, shapes and values of RWKV-LM's RWKV-v4neo/src/model.py, where ln_in is ln0 of the first block and mixes
    are (1, 1, C); one layer, a division by zero there, works."""
    C = 12
    state = Model(Config(7, n_layer=L, n_embd=C)).state_dict()
    shapes = {f'ln_{side}.{name}': (C,) for side in ('in', 'out') for name in ('weight', 'bias')}
    for block in (f'blocks.{i}.' for i in range(L)):
        names = [f'ln{n}.{name}' for n in (1, 2) for name in ('weight', 'bias')] + ['att.time_decay', 'att.time_first']
        names += [f'att.time_mix_{n}' for n in 'kvr'] + ['ffn.time_mix_k', 'ffn.time_mix_r']
        shapes |= {block + name: (C,) for name in names}
        square = ['att.key', 'att.value', 'att.receptance', 'att.output', 'ffn.receptance']
        shapes |= {f'{block}{name}.weight': (C, C) for name in square}
        shapes |= {block + 'ffn.key.weight': (4 * C, C), block + 'ffn.value.weight': (C, 4 * C)}
    assert {name: tuple(p.shape) for name, p in state.items() if name.startswith(('blocks.', 'ln'))} == shapes

    for i in range(L):
        # from 0 to 1; from 1 to almost 0
        up = i / max(1, L - 1)
        down = 1 - i / L
        att, ffn = ({name.split('.', 3)[3]: p for name, p in state.items() if f'blocks.{i}.{part}.' in name}
                    for part in ('att', 'ffn'))
        share = [h / C for h in range(C)]
        expected = dict(time_decay=[-5 + 8 * (h / (C - 1)) ** (0.7 + 1.3 * up) for h in range(C)],
                        time_first=[math.log(0.3) + 0.5 * (-1, 0, 1)[(h + 1) % 3] for h in range(C)],
                        time_mix_k=[s ** down for s in share], time_mix_v=[s ** down + 0.3 * up for s in share],
                        time_mix_r=[s ** (0.5 * down) for s in share])
        for name, values in expected.items():
            model_close(att[name], values, 2e-6)
        for name in ('time_mix_k', 'time_mix_r'):
            model_close(ffn[name], expected['time_mix_k'], 2e-6)
        zero = [name for part in (att, ffn) for name, p in part.items() if not p.any()]
        assert zero == ['key.weight', 'receptance.weight', 'output.weight', 'receptance.weight', 'value.weight']
        # orthogonal, with gain sqrt(rows / columns) where there are more rows than columns
        model_close(att['value.weight'].T @ att['value.weight'], np.eye(C), 1e-5)
        model_close(ffn['key.weight'].T @ ffn['key.weight'], 4 * np.eye(C), 1e-5)
    for name, p in state.items():
        if 'ln' in name:
            assert p.eq(1 if name.endswith('weight') else 0).all(), name


def test_model_other_blocks_start_orthogonal_and_remembering():
    C = 8
    for arch, gates in (('rnn', 1), ('lstm', 4)):
        state = Model(Config(7, arch, n_layer=2, n_embd=C)).state_dict()
        for i in range(2):
            for name in ('weight_ih', 'weight_hh'):
                for gate in state[f'blocks.{i}.{arch}.{name}_l0'].chunk(gates):
                    model_close(gate @ gate.T, np.eye(C), 1e-5)
            bias = state[f'blocks.{i}.{arch}.bias_ih_l0'] + state[f'blocks.{i}.{arch}.bias_hh_l0']
            # in the order i, f, g, o
            assert bias.tolist() == (C * [0] + C * [1] + 2 * C * [0] if arch == 'lstm' else C * [0])
    state = Model(Config(7, 'transformer', n_layer=1, n_embd=C)).state_dict()
    for name, gain in (('att.query', 1), ('att.key', 1), ('att.value', 1), ('ffn.gate', 3), ('ffn.input', 3)):
        weight = state[f'blocks.0.{name}.weight']
        model_close(weight.T @ weight, gain * np.eye(C), 1e-5)
    assert not state['blocks.0.att.output.weight'].any() and not state['blocks.0.ffn.output.weight'].any()


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


def model_pick(logits, temperature, top_p):
    """Probabilities of one choice: the softmax, of which the fewest choices with top_p of the mass are kept."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[:1 + np.searchsorted(np.cumsum(p[order]), top_p)]
    q = np.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    return q


def model_frame_probabilities(head, h, temperature=1.0, top_p=1.0, may_end=True):
    """Of all 2^V frames, (2^V,), worked out choice by choice; bit v of the index is unit v."""
    P = model_arrays(head)
    h = h.double().numpy()
    no_end = np.zeros(len(P['out.bias']))
    V = len(no_end) - isinstance(head, models.ChordHead)
    no_end[V - 1] = 0 if may_end else -np.inf
    if isinstance(head, models.BernoulliHead):
        p = np.ones(1)
        for logit in P['out.weight'] @ h + P['out.bias'] + no_end:
            p = np.outer(model_pick(np.array([0, logit]), temperature, top_p), p).ravel()
        return p
    probabilities = np.zeros(2 ** V)
    if isinstance(head, models.SoftmaxHead):
        probabilities[2 ** np.arange(V)] = model_pick(P['out.weight'] @ h + P['out.bias'] + no_end, temperature, top_p)
        return probabilities
    unfinished = [((), 1.0)]
    while unfinished:
        units, p = unfinished.pop()
        a = P['hidden.weight'] @ h + P['hidden.bias'] + sum(P['chosen.weight'][:, u] for u in units)
        gelu = np.array([0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in a])
        low = max(units, default=-1) + 1
        q = model_pick((P['out.weight'] @ gelu + P['out.bias'] + no_end)[low:], temperature, top_p)
        for unit in range(low, V):
            unfinished.append(((*units, unit), p * q[unit - low]))
        # "done"
        probabilities[sum(1 << u for u in units)] = p * q[-1]
    return probabilities


def model_all_frames(head, V):
    """All frames that a head gives a probability to, (.., V)."""
    if isinstance(head, models.SoftmaxHead):
        return torch.eye(V, dtype=torch.uint8)
    return ((torch.arange(2 ** V).unsqueeze(1) >> torch.arange(V)) & 1).to(torch.uint8)


def model_index(frames):
    """The index of frames (.., V) among all 2^V."""
    return (frames.long() << torch.arange(frames.shape[-1])).sum(-1)


def model_assert_drawn_from(numbers, p):
    """By the inequality of Weissman et al. 2003, the frequencies of n draws lie farther from p than this, summed over
    the k cells, less than once in 1e9 runs; and what has no probability never comes."""
    n = len(numbers)
    k = len(p)
    frequency = np.bincount(numbers, minlength=k) / n
    assert abs(frequency - p).sum() < math.sqrt(2 * (k * math.log(2) + math.log(1e9)) / n)
    assert not frequency[p == 0].any()


@model_each_head
def test_model_head_probabilities_of_all_frames(head):
    V = 6
    head = model_small_head(head, V)
    frames = model_all_frames(head, V)
    h = 2 * torch.randn(2, 3, 1, 5)
    with torch.no_grad():
        out = head(h)
        nats = head.nll(out.expand(2, 3, len(frames), -1), frames.expand(2, 3, -1, -1))
    assert nats.shape == (2, 3, len(frames))
    p = nats.double().neg().exp()
    assert (p.sum(-1) - 1).abs().max() < 1e-5
    for b in range(2):
        for t in range(3):
            expected = model_frame_probabilities(head, h[b, t, 0])[model_index(frames)]
            np.testing.assert_allclose(p[b, t], expected, rtol=1e-4)


@model_each_arch_and_kind
def test_model_nll_of_a_batch_is_the_sum_over_its_choices(arch, kind):
    model = model_random(arch, kind, torch.float32)
    heard = []
    model.head.register_forward_hook(lambda module, inputs, out: heard.append(inputs[0]))
    frames = model_frames(kind, 3, 9, 7)
    if model.config.head != 'softmax':
        # no unit on, all units on
        frames[0, 3] = 0
        frames[1, 5] = 1
    with torch.no_grad():
        nats = model.head.nll(model(frames[:, :-1])[0], frames[:, 1:])
    expected = [[-math.log(model_frame_probabilities(model.head, h)[model_index(frame)]) for h, frame in zip(*row)]
                for row in zip(heard[0], frames[:, 1:])]
    np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=1e-5)


@model_each_head
@pytest.mark.parametrize('temperature, top_p, may_end', [
    (1, 1, True), (0.6, 1, True), (1.7, 1, True), (1, 0.8, True), (1.3, 0.55, True), (1, 0.3, True), (1, 1, False),
    (1.3, 0.8, False)])
def test_model_sampling_follows_the_probabilities(head, temperature, top_p, may_end):
    head = model_small_head(head, 6)
    h = torch.randn(5, generator=torch.Generator().manual_seed(1))
    out = head(h).expand(200_000, -1)
    frames = head.sample(out, temperature, top_p, torch.Generator().manual_seed(2), may_end)
    assert frames.dtype == torch.uint8 and frames.shape == (200_000, 6) and frames.max() <= 1
    assert may_end or not frames[:, -1].any()
    model_assert_drawn_from(model_index(frames), model_frame_probabilities(head, h, temperature, top_p, may_end))


@model_each_head
def test_model_sampled_rows_are_independent(head):
    head = model_small_head(head, 3)
    # two tunes in one batch, over and over
    h = torch.randn(2, 5)
    frames = head.sample(head(h).repeat(100_000, 1), generator=torch.Generator().manual_seed(2))
    pairs = model_index(frames).view(-1, 2)
    joint = np.outer(model_frame_probabilities(head, h[0]), model_frame_probabilities(head, h[1])).ravel()
    model_assert_drawn_from(pairs[:, 0] * 8 + pairs[:, 1], joint)


@model_each_head
def test_model_cold_sampling_is_greedy_and_repeats_with_its_generator(head):
    head = model_small_head(head, 6)
    h = torch.randn(20, 5)
    greedy = torch.tensor([model_frame_probabilities(head, row, 1.0, 1e-9).argmax() for row in h])
    assert len(set(greedy.tolist())) > 3
    for cold in (dict(temperature=1e-3), dict(top_p=1e-6)):
        for seed in range(3):
            frames = head.sample(head(h), generator=torch.Generator().manual_seed(seed), **cold)
            assert torch.equal(model_index(frames), greedy)
    a, b, c = (head.sample(head(h), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_model_chord_head_spells_nothing_and_everything():
    V = 6
    head = models.ChordHead(Config(V, n_embd=1))
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
        # with h = 10, each time the lowest unit left; with h = 0, done at once
        head.out.weight[:V, 0] = 10 * torch.arange(V, 0, -1)
        head.out.bias[V] = 30
        # rows of a batch are done at different times
        out = torch.tensor([0., 10, 0, 10]).unsqueeze(1)
        nothing_everything = torch.tensor([0, 1, 0, 1]).unsqueeze(1).expand(-1, V)
        assert torch.equal(head.sample(out).long(), nothing_everything)
        assert head.nll(out, nothing_everything).max() < 1e-6
        opposite = head.nll(out, 1 - nothing_everything)
        assert opposite.isfinite().all() and opposite.min() > 20


# ---------------------------------------------------------------------------------------------------------------------
# model.py: training, composing, sizes

def test_model_dropout_takes_the_same_channels_from_all_frames():
    torch.manual_seed(0)
    drop = Dropout(0.25)
    x = torch.ones(64, 5, 128)
    y = drop(x)
    assert (y == y[:, :1]).all() and set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert not torch.equal(y[0], y[1])
    # kept channels are 8192 coin tosses: by Hoeffding, farther off than 0.04 less than once in 1e11 runs
    assert abs(y.mean().item() - 1) < 0.04 / 0.75
    assert torch.equal(drop.eval()(x), x) and torch.equal(Dropout(0)(x), x)


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
    for at_least in (0, 4, 12):
        tunes = model.compose(prompts, 12, 1.3, 0.99, torch.Generator().manual_seed(1), at_least)
        lengths = [len(tune) for tune in tunes]
        assert at_least <= min(lengths) <= max(at_least, 11) and max(lengths) <= 12
        assert not torch.cat(tunes)[:, -1].any()
    again = model.compose(prompts, 12, 1.3, 0.99, torch.Generator().manual_seed(1), at_least)
    assert all(map(torch.equal, tunes, again))


def test_model_composes_after_long_prompts_of_many_rows():
    model = model_random('rwkv', 'chord', torch.float32)
    prompt = model_frames('chord', 1, 30, 7)
    one, = model.compose(prompt, 9, top_p=1e-6)
    # 600 rows are read 6 frames at a time
    assert all(torch.equal(tune, one) for tune in model.compose(prompt.expand(600, -1, -1), 9, top_p=1e-6))


@pytest.mark.parametrize('n_layer, n_embd', [(3, 192), (6, 384)])
def test_model_sizes_are_within_5_percent(n_layer, n_embd):
    # the default grid, the benchmark grid, and the other representations
    for grid in (data.PianoRoll(), data.PianoRoll(2, onsets=False), data.Events(), data.AbcText()):
        sizes = dict(n_layer=n_layer, n_embd=n_embd, lookback=64 * grid.frames_per_beat, beat=grid.beat)
        config = Config(grid.V, 'rwkv', grid.heads[0], **sizes)
        assert models.same_size(config) == config
        target = models.count_parameters(config)
        for arch in models.ARCHITECTURES:
            same = models.same_size(dataclasses.replace(config, arch=arch))
            assert same.arch == arch and abs(models.count_parameters(same) / target - 1) < 0.05
    config = Config(20, 'transformer', n_embd=16, lookback=5, beat=4)
    assert models.count_parameters(config) == sum(p.numel() for p in Model(config).parameters())


# ---------------------------------------------------------------------------------------------------------------------
# model.py: checkpoints

class ModelPickledCode:
    def __reduce__(self):
        return os.mkdir, ('it_ran_code',)


@model_each_arch_and_kind
def test_model_checkpoint_round_trip(tmp_path, arch, kind):
    model = model_random(arch, kind, torch.float32)
    more = dict(step=7, meta=dict(name='\u00e9', tempo=1.5), table=[(1, None)])
    models.save_checkpoint(tmp_path / 'a.pt', model.train(), **more)
    again, checkpoint = models.load_checkpoint(tmp_path / 'a.pt')
    assert again.config == model.config and not again.training and os.listdir(tmp_path) == ['a.pt']
    assert {name: checkpoint[name] for name in more} == more
    frames = model_frames(kind, 2, 9, 7)
    assert torch.equal(again(frames)[0], model.eval()(frames)[0])
    assert all(p.requires_grad for p in again.parameters())


MODEL_BAD_CHECKPOINTS = {
    'version': lambda c: c.update(version=1),
    'no version': lambda c: c.pop('version'),
    'no config': lambda c: c.pop('config'),
    'extra field': lambda c: c['config'].update(colour=1),
    'arch': lambda c: c['config'].update(arch='gru'),
    'more layers': lambda c: c['config'].update(n_layer=9),
    'fractional channels': lambda c: c['config'].update(n_embd=8.0),
    'absurd channels': lambda c: c['config'].update(n_embd=65_536),
    'absurd lookback': lambda c: c['config'].update(lookback=10 ** 12),
    'clock without a beat': lambda c: c['config'].update(beat=0),
    'key left out': lambda c: c['model'].pop('emb.bias'),
    'key too many': lambda c: c['model'].update(evil=torch.zeros(3)),
    'shape': lambda c: c['model'].update({'emb.bias': torch.zeros(17)}),
    'no tensor': lambda c: c['model'].update({'emb.bias': 'x'}),
    'integers': lambda c: c['model'].update({'emb.bias': torch.zeros(8, dtype=torch.int64)}),
    'nan': lambda c: c['model']['emb.bias'].fill_(math.nan),
    'infinite': lambda c: c['model']['emb.bias'].fill_(-math.inf),
    'code': lambda c: c.update(meta=ModelPickledCode())}
MODEL_BAD_FILES = {
    'cut': lambda content: content[:-100],
    'cut short': lambda content: content[:30],
    'empty': lambda content: b'',
    'zeros': lambda content: bytes(len(content)),
    'text': lambda content: b'not a checkpoint\n',
    'pickled code': lambda content: pickle.dumps(ModelPickledCode(), 2),
    'pickled numbers': lambda content: pickle.dumps([1, 2], 2)}


@pytest.mark.parametrize('change', [*MODEL_BAD_CHECKPOINTS, *MODEL_BAD_FILES])
def test_model_checkpoint_that_is_not_one_is_refused(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'bad.pt'
    models.save_checkpoint(path, model_random('rwkv', 'chord', torch.float32), step=7)
    if change in MODEL_BAD_FILES:
        path.write_bytes(MODEL_BAD_FILES[change](path.read_bytes()))
    else:
        content = torch.load(path, weights_only=True)
        MODEL_BAD_CHECKPOINTS[change](content)
        torch.save(content, path)
    with pytest.raises(models.UserError, match='bad.pt is damaged or no checkpoint') as e:
        models.load_checkpoint(path)
    assert '\n' not in str(e.value) and not (tmp_path / 'it_ran_code').exists()


def test_model_checkpoint_with_a_flipped_bit_is_refused_or_the_same(tmp_path):
    path = tmp_path / 'bad.pt'
    model = model_random('rwkv', 'chord', torch.float32)
    models.save_checkpoint(path, model)
    content = path.read_bytes()
    frames = model_frames('chord', 1, 9, 7)
    refused = 0
    for at in np.linspace(0, len(content) - 1, 60).astype(int):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        try:
            again, _ = models.load_checkpoint(path)
            assert torch.equal(again(frames)[0], model(frames)[0]), at
        except models.UserError as e:
            assert 'bad.pt' in str(e)
            refused += 1
    assert refused > 20


def test_model_checkpoint_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / 'missing.pt'):
        with pytest.raises(models.UserError, match=f'{path}.*: give'):
            models.load_checkpoint(path)


# ---------------------------------------------------------------------------------------------------------------------
# train.py and sample.py, as a person runs them

SCRIPTS_HOME = Path(train.__file__).resolve().parent
SCRIPTS_TINY = ['--n_layer=2', '--n_embd=16', '--batch_size=4', '--block_size=32', '--max_minutes=0', '--dtype=float32',
                '--eval_interval=100', '--log_interval=10', '--device=cpu']
# of the processes that tests start: small models need one thread, and two of them talk on this machine
SCRIPTS_ENV = os.environ | dict(PYTHONPATH=str(SCRIPTS_HOME), OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo')
SCRIPTS_SUFFIXES = ('.mid', '.abc', '.wav', '.svg')


def scripts_run(script, *words, seconds=300):
    """Runs a script as `python script.py words` does, but here: its exit status, output and complaint."""
    def late(*_):
        pytest.fail(f'{script}.py {words} hangs')

    out = io.StringIO()
    err = io.StringIO()
    status = 0
    argv = sys.argv
    sys.argv = [f'{script}.py', *map(str, words)]
    torch.set_num_threads(1)        # models as small as these
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(SCRIPTS_HOME / f'{script}.py'), run_name='__main__')
    except SystemExit as stop:
        status = stop.code
    finally:
        signal.alarm(0)
        sys.argv = argv
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def scripts_train(book, out, *words):
    return scripts_run('train', f'--data={book}', f'--out_dir={out}', *SCRIPTS_TINY, *words)


def scripts_sample(ckpt, out, *words, sound=False):
    """Runs sample.py, which has to succeed; what it prints, and the tune in the .mid. Sound takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        if not sound:
            patch.setattr(render, 'LONGEST', 0)
        done = scripts_run('sample', f'--ckpt={ckpt}', f'--out={out}', *words)
    assert done.status == 0, done.err
    midi = Path(f'{out}.mid')
    return done.out, notation.read_midi(midi) if midi.exists() else None


def scripts_refused(done, script, named=''):
    """It ended in one sentence on stderr, with exit status 2."""
    assert done.status == 2 and re.fullmatch(f'{script}.py: .*\n', done.err) and named in done.err, done.err


def scripts_book(folder, songs=20):
    """A folder of MIDI files, each the same little round: scales over held triads, 16 beats."""
    folder.mkdir()
    for i in range(songs):
        melody = [(39 + i % 3 + step, t / 2, t / 2 + 0.5) for t, step in enumerate([0, 2, 4, 5, 7, 5, 4, 2] * 4)]
        chords = [(27 + i % 3 + step, bar * 4, bar * 4 + 4) for bar in range(4) for step in (0, 4, 7)]
        notation.write_midi(np.array(melody + chords, dtype=float), folder / f'round{i}.mid', 100 + i)
    return folder


@pytest.fixture(scope='module')
def book(tmp_path_factory):
    return scripts_book(tmp_path_factory.mktemp('music') / 'book')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, book):
    """Two architectures, trained for a few steps on little rounds: {arch: (what train.py printed, checkpoint)}."""
    home = tmp_path_factory.mktemp('trained')
    result = {}
    for arch, head in (('rwkv', 'chord'), ('lstm', 'bernoulli')):
        done = scripts_train(book, home / head, f'--arch={arch}', f'--head={head}', '--max_iters=80', '--transpose=0',
                             '--learning_rate=0.01', '--eval_interval=40')
        assert done.status == 0, done.err
        result[arch] = done.out, home / head / f'{arch}.pt'
    return result


def scripts_rows(out, arch='rwkv'):
    with (out / f'{arch}.csv').open(newline='') as f:
        return list(csv.DictReader(f))


def test_train_prints_its_plan_and_results(trained, book):
    for arch, (out, path) in trained.items():
        for word in ('device: cpu', '20 songs', '  train: ', 'frames', 'beats', 'parameters', 'frames/s', 'left'):
            assert word in out, word
        assert ('WKV' in out) == (arch == 'rwkv')
        row = r'(\d+\.\d{4}) nats/frame, (\d+\.\d{4}) nats/beat \((\d+) songs, ([\d,]+) frames\)'
        scores = re.findall(rf'(?m)^(valid|test): {row}$', out)
        assert [score[0] for score in scores] == ['valid', 'test'] and out.splitlines()[-1].startswith('test: ')
        rows = scripts_rows(path.parent, arch)
        assert {'iter', 'minutes', 'train', 'valid', 'lr', 'frames_per_second'} <= set(rows[0])
        told = [float(rows[-1][f'best_{split}{unit}']) for split in ('valid', 'test') for unit in ('', '_beat')]
        assert told == pytest.approx([float(x) for score in scores for x in score[1:3]], abs=1e-4)
        assert arch in (path.parent / 'loss.svg').read_text()
        assert {p.name for p in path.parent.iterdir()} == {f'{arch}.csv', f'{arch}.last.pt', f'{arch}.pt', 'loss.svg'}

        # it learned; and the checkpoint holds what was scored
        first, *_, last = [float(x) for x in re.findall(r'step \d+: valid (\d+\.\d+) nats/frame', out)]
        assert last < first / 2
        model, checkpoint = load_checkpoint(path)
        dataset = data.load(str(book), log=str)
        score = train.evaluate(model, dataset, 'test')
        assert f'test: {score.frame:.4f} nats/frame, {score.beat:.4f} nats/beat ({score.songs} songs, ' in out
        assert checkpoint['valid'] == pytest.approx(train.evaluate(model, dataset, 'valid').frame, rel=1e-5)
        assert checkpoint['meta']['source'] == dataset.source
        assert checkpoint['meta']['tempo'] == np.median([song.tempo for song in dataset.songs['train']])


def test_train_evaluate_reads_each_song_from_fresh_state():
    # the last one is read in two pieces
    songs = [Song(f'{n}', np.array([(40, 0, n), (44, 1, n)], dtype=float)) for n in (2, 3, 7, 140)]
    dataset = data.Dataset({split: songs for split in data.SPLITS}, 'four songs', data.PianoRoll())
    V = dataset.representation.V
    torch.manual_seed(0)
    model = Model(Config(V, n_layer=1, n_embd=8, lookback=5, beat=4)).eval()
    inside = 0.0
    whole = 0.0
    boundary = torch.eye(V, dtype=torch.uint8)[-1:]
    for song in songs:
        frames = torch.cat((boundary, torch.from_numpy(dataset.representation.encode(song)), boundary))
        state = None
        nats = []
        with torch.no_grad():
            for before, after in zip(frames[:-1], frames[1:]):
                out, state = model(before.view(1, 1, V), state)
                nats.append(model.head.nll(out, after.view(1, 1, V)).item())
        inside += sum(nats[1:-1])
        whole += sum(nats)
    score = train.evaluate(model, dataset, 'test', batch_size=2)
    assert (score.songs, score.frames) == (4, 4 * 152 - 4)
    assert score.frame == pytest.approx(inside / score.frames, rel=1e-5)
    assert score.beat == pytest.approx(whole / 152, rel=1e-5)
    # a sample of the songs; one at least, however long it is
    assert train.evaluate(model, dataset, 'test', most=400).songs == 2
    assert train.evaluate(model, dataset, 'test', most=10).songs == 1


@pytest.mark.parametrize('arch', ['rwkv', 'lstm'])
def test_sample_writes_the_same_files_for_the_same_seed(trained, tmp_path, arch):
    files = []
    for folder, seed in (('a', 1), ('b', 1), ('c', 2)):
        (tmp_path / folder).mkdir()
        options = '--length=2', f'--seed={seed}', '--best_of=2'
        printed, song = scripts_sample(trained[arch][1], tmp_path / folder / 'x', *options, sound=True)
        assert str(tmp_path / folder / 'x.mid') in printed and 'beats 1 to' in printed and f'seed {seed}' in printed
        assert re.search(r'at most [\d.]+ beats in a row copied', printed)
        assert len(song.notes) and song.notes[:, 2].max() <= 2 and song.metre and song.sharps is not None
        files.append([(tmp_path / folder / f'x{suffix}').read_bytes() for suffix in SCRIPTS_SUFFIXES])
        assert len(list((tmp_path / folder).iterdir())) == len(SCRIPTS_SUFFIXES) and all(files[-1])
    assert files[0] == files[1] and all(a != c for a, c in zip(files[0], files[2]))


def test_sample_several_at_once_best_first(trained, tmp_path):
    path = trained['rwkv'][1]
    options = '--length=8', '--num_samples=3', '--best_of=2', '--seed=5', '--tempo=90'
    printed, _ = scripts_sample(path, tmp_path / 'x', *options)
    nats = [float(x) for x in re.findall(r'x-\d\.mid.* (\d+\.\d+) nats/frame', printed)]
    valid = load_checkpoint(path)[1]['valid']
    # none of them can end before 16 beats, so that only their nats decide
    assert len(nats) == 3 and nats == sorted(nats, key=lambda x: abs(x - valid))
    assert notation.read_midi(tmp_path / 'x-3.mid').tempo == pytest.approx(90, abs=0.01)
    assert len(list(tmp_path.iterdir())) == 3 * 3
    # what a run would go on from is a model, too
    scripts_sample(path.with_name('rwkv.last.pt'), tmp_path / 'last', '--length=4', '--best_of=1')


@pytest.mark.parametrize('options, beats', [([], 16), (['--prompt_beats=6'], 6)])
def test_sample_continues_a_prompt(trained, book, tmp_path, options, beats):
    def kept(notes):
        return notes[notes[:, 1] < beats - 1e-6][:, :2]

    prompt = notation.read_midi(book / 'round4.mid')
    options = [*options, f'--prompt={book / "round4.mid"}', '--length=8', '--seed=3', '--best_of=1']
    _, song = scripts_sample(trained['rwkv'][1], tmp_path / 'y', *options)
    np.testing.assert_allclose(kept(song.notes), kept(prompt.notes))
    assert song.tempo == pytest.approx(prompt.tempo, abs=0.01) and beats < song.notes[:, 2].max() <= beats + 8
    _, alone = scripts_sample(trained['rwkv'][1], tmp_path / 'z', *options, '--no_prompt')
    new = song.notes[song.notes[:, 1] >= beats - 1e-6] - [0, beats, beats]
    np.testing.assert_allclose(alone.notes, new, atol=1e-6)
    bar, pickup = notation.metre(new)
    assert alone.metre == notation.metre_text(new, bar, pickup)
    assert (alone.pickup or 0) == pytest.approx(pickup)         # a file does not tell a pickup of nothing


def test_sample_continues_abc(trained, tmp_path):
    (tmp_path / 'mine.abc').write_text('X:1\nT:Mine\nM:4/4\nL:1/4\nQ:1/4=77\nK:C\n"C"CDEF|"G7"GFED|\n')
    _, song = scripts_sample(trained['lstm'][1], tmp_path / 'y', f'--prompt={tmp_path}/mine.abc', '--length=2')
    assert song.tempo == pytest.approx(77, abs=0.01) and song.notes[0].tolist() == [27, 0, 4]


def test_sample_key_moves_the_tune(trained, tmp_path):
    options = '--length=8', '--seed=1', '--best_of=1'
    _, plain = scripts_sample(trained['rwkv'][1], tmp_path / 'k', *options)
    for key, sharps in (('Eb', -3), ('Cm', -3), ('A', 3)):
        _, song = scripts_sample(trained['rwkv'][1], tmp_path / key, *options, f'--key={key}')
        moved = np.unique(song.notes[:, 0] - plain.notes[:, 0])
        assert len(moved) == 1 and -6 <= moved[0] <= 5
        assert (7 * plain.sharps + moved[0] - 7 * sharps) % 12 == 0
        assert (song.sharps, song.minor) == (sharps, key == 'Cm')
        np.testing.assert_array_equal(song.notes[:, 1:], plain.notes[:, 1:])


def scripts_untrained(path, representation, **meta):
    """A checkpoint of a model that has learned nothing, of music that is not there."""
    meta = dict(data=str(path.parent / 'gone'), source='nothing', representation=representation.settings) | meta
    meta = dict(common_key=False, tempo=120.0) | meta
    model = Model(Config(representation.V, 'lstm', representation.heads[0], n_layer=1, n_embd=8))
    save_checkpoint(path, model, meta=meta, step=1, valid=1.0)
    return path


def scripts_pretend(monkeypatch, *tunes):
    """Models compose these frames (T, V) in turn; a list of the prompts that they are given."""
    prompts = []

    def compose(self, prompt, length, *rest, **more):
        prompts.append(prompt)
        return [torch.from_numpy(tune) for tune in itertools.islice(itertools.cycle(tunes), len(prompt))]

    monkeypatch.setattr(Model, 'compose', compose)
    return prompts


def scripts_dance(bar, key=39, bars=8):
    """A Song with a chord a bar and quarter notes above it."""
    scale = [0, 2, 4, 5, 7, 9, 11, 12, 11, 9, 7, 5, 4, 2, 4, 7]
    notes = [(key - 12 + step, bar * i, bar * i + bar) for i in range(bars) for step in (0, 4, 7)]
    notes += [(key + scale[t % (4 * bar)] * (t % bar > 0), t, t + 1) for t in range(bar * bars)]
    return Song('', np.array(sorted(notes, key=lambda note: note[1]), dtype=float))


def test_sample_prompt_of_fields_alone(tmp_path, monkeypatch):
    text = data.AbcText()
    path = scripts_untrained(tmp_path / 'm.pt', text)
    jig = 'DFA d2f|afd Adf|AFD D3|]'
    prompts = scripts_pretend(monkeypatch, text.encode_text(jig), text.encode_text('|no: [music'))
    (tmp_path / 'jig.abc').write_text('M:6/8\nL:1/8\nK:D\n')
    printed, song = scripts_sample(path, tmp_path / 'x', f'--prompt={tmp_path}/jig.abc', '--best_of=4')
    assert text.text(prompts[0][0, 1:]) == 'M:6/8\nL:1/8\nK:D\n' and prompts[0][0, 0, -1] == 1
    assert (song.metre, song.sharps, len(song.notes)) == ('6/8', 2, 15)
    written = (tmp_path / 'x.abc').read_text()
    assert all(line in written for line in ('X:1\n', 'T:x\n', 'M:6/8\n', 'K:D\n', jig))
    assert '2 of 4 are valid' in printed and 'gone is not there any more' in printed


def test_sample_metre_keeps_what_is_in_it(tmp_path, monkeypatch):
    roll = data.PianoRoll()
    path = scripts_untrained(tmp_path / 'm.pt', roll)
    prompts = scripts_pretend(monkeypatch, *(roll.encode(scripts_dance(bar)) for bar in (2, 3)))
    for metre in ('3/4', '2/4'):
        printed, song = scripts_sample(path, tmp_path / 'x', f'--metre={metre}', '--best_of=2')
        assert song.metre == metre and f'1 are in {metre}' in printed
        assert f'M:{metre}\n' in (tmp_path / 'x.abc').read_text()
    assert len(prompts) == 2
    done = scripts_run('sample', f'--ckpt={path}', '--metre=9/8')
    scripts_refused(done, 'sample', 'in 9/8')


@pytest.mark.parametrize('sharps', [2, None])
def test_sample_goes_on_in_the_key_of_the_prompt(tmp_path, monkeypatch, sharps):
    """A model of tunes in C major reads the prompt in C major; what is written is in D, as the prompt is."""
    roll = data.PianoRoll()
    path = scripts_untrained(tmp_path / 'm.pt', roll, common_key=True)
    prompts = scripts_pretend(monkeypatch, roll.encode(scripts_dance(4)))
    notes = scripts_dance(4, key=41, bars=4).notes
    notation.write_midi(notes, tmp_path / 'd.mid', sharps=sharps)
    _, song = scripts_sample(path, tmp_path / 'x', f'--prompt={tmp_path}/d.mid', '--best_of=1')
    np.testing.assert_allclose(roll.decode(prompts[0][0, 1:].numpy()), notes - [2, 0, 0])
    np.testing.assert_allclose(song.notes[:len(notes)], notes)
    assert song.sharps == 2 and song.notes[len(notes):, 0].min() == 29


def test_sample_that_strikes_nothing_says_so(tmp_path, monkeypatch):
    roll = data.PianoRoll()
    path = scripts_untrained(tmp_path / 'm.pt', roll)
    notation.write_midi([(40, 0, 4)], tmp_path / 'p.mid')
    held = np.zeros((4, roll.V), dtype=np.uint8)
    held[:, 88 + 40] = 1
    scripts_pretend(monkeypatch, held)
    done = scripts_run('sample', f'--ckpt={path}', f'--prompt={tmp_path}/p.mid', '--no_prompt', f'--out={tmp_path}/x')
    scripts_refused(done, 'sample')


@pytest.mark.parametrize('out, stem', [
    ('x', 'x'), ('x.wav', 'x'), ('x.MID', 'x'), ('x.final', 'x.final'), ('rwkv.pt', 'rwkv'), ('rwkv.csv', 'rwkv.csv'),
    (None, 'rwkv')])
def test_sample_names_files_by_the_stem(trained, tmp_path, monkeypatch, out, stem):
    for path in trained['rwkv'][1].parent.iterdir():
        shutil.copy(path, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    scripts_pretend(monkeypatch, data.PianoRoll().encode(scripts_dance(2, bars=1)))
    done = scripts_run('sample', f'--ckpt={tmp_path}/rwkv.pt', *[f'--out={tmp_path}/{out}'] * (out is not None))
    assert done.status == 0, done.err
    assert {path.name for path in tmp_path.iterdir()} == {*before, *(stem + suffix for suffix in SCRIPTS_SUFFIXES)}
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


@pytest.mark.parametrize('out', ['link', 'folder', 'fifo', '.', '..', '/', '/dev/null', 'place', ''])
def test_sample_replaces_nothing_but_plain_files(trained, tmp_path, monkeypatch, out):
    (tmp_path / 'real').write_text('mine')
    (tmp_path / 'link.mid').symlink_to(tmp_path / 'real')
    (tmp_path / 'folder.abc').mkdir()
    (tmp_path / 'place').mkdir()
    os.mkfifo(tmp_path / 'fifo.svg')
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(Model, 'compose', None)
    monkeypatch.chdir(tmp_path)
    for several in ([], ['--num_samples=2'] * (out not in ('link', 'folder', 'fifo'))):
        done = scripts_run('sample', f'--ckpt={trained["rwkv"][1]}', f'--out={out}', *several)
        scripts_refused(done, 'sample', f'cannot write {out or "."}')
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / 'real').read_text() == 'mine'


SCRIPTS_BAD = [
    ('train', '--arch=gru', '--arch'),
    ('train', '--head=softmax', '--head=softmax'),
    ('train', '--data={book} --representation=abc --head=chord', '--head=chord'),
    ('train', '--data={book} --arch=transformer --n_embd=15', '--n_embd=15'),
    ('train', '--onsets=maybe', '--onsets'),
    ('train', '--n_embd=0', '--n_embd'),
    ('train', '--dropout=1', '--dropout'),
    ('train', '--lookback=x', '--lookback'),
    ('train', '--batch_size=2.5', '--batch_size'),
    ('train', '--data={book} --batch_size=1000000000000000000', '--batch_size'),
    ('train', '--max_iters=0 --max_minutes=0', '--max_iters'),
    ('train', '--max_minutes=inf', '--max_minutes'),
    ('train', '--device=cuda:99', '--device'),
    ('train', '--device=meta', '--device'),
    ('train', '--no_such_option', '--no_such_option'),
    ('train', '--resume', 'rwkv.last.pt'),
    ('train', '--resume --arch=lstm --out_dir={tmp}/last', 'lstm.last.pt is not a run that can go on'),
    ('train', '--data={tmp}/nowhere', 'nowhere'),
    ('train', '--data={tmp}/empty', 'empty'),
    ('train', '--data={tmp}/bad.zip', 'bad.zip'),
    ('train', '--data={tmp}/bad.npz', 'bad.npz'),
    ('train', '--data={book} --block_size=100000', '--block_size'),
    ('train', '--data={book} --out_dir={tmp}/file/out', '--out_dir'),
    ('sample', '--seed=x', '--seed'),
    ('sample', '--ckpt={tmp}/none.pt', 'none.pt'),
    ('sample', '--ckpt={tmp}/file', 'file'),
    ('sample', '--ckpt={tmp}/empty', 'empty'),
    ('sample', '--ckpt={tmp}/half.pt', 'half.pt'),
    ('sample', '--ckpt={tmp}/foreign.pt', 'foreign.pt'),
    ('sample', '--ckpt={tmp}/code.pt', 'code.pt'),
    ('sample', '--ckpt={ckpt} --device=cuda:99', '--device'),
    ('sample', '--ckpt={ckpt} --temperature=0', '--temperature'),
    ('sample', '--ckpt={ckpt} --temperature=-1', '--temperature'),
    ('sample', '--ckpt={ckpt} --top_p=0', '--top_p'),
    ('sample', '--ckpt={ckpt} --length=1e6', '--length'),
    ('sample', '--ckpt={ckpt} --num_samples=10000 --length=20000', '--num_samples'),
    ('sample', '--ckpt={ckpt} --num_samples=1000 --best_of=1000', '--best_of'),
    ('sample', '--ckpt={ckpt} --key=H', '--key'),
    ('sample', '--ckpt={ckpt} --key=', '--key'),
    ('sample', '--ckpt={ckpt} --prompt={tmp}/silent.mid', 'silent.mid'),
    ('sample', '--ckpt={ckpt} --prompt={book}/round1.mid --prompt_beats=0', '--prompt_beats'),
    ('sample', '--ckpt={ckpt} --prompt={tmp}/fields.abc', 'fields.abc'),
    ('sample', '--ckpt={ckpt} --prompt={tmp}/file', 'file'),
    ('sample', '--ckpt={ckpt} --prompt={tmp}/none.mid', 'none.mid'),
    ('sample', '--ckpt={ckpt} --out={tmp}/no/folder/x.mid', 'folder'),
]


@pytest.mark.parametrize('script, options, named', SCRIPTS_BAD, ids=lambda x: x.replace('{', '').replace('}', ''))
def test_bad_input_ends_in_one_sentence(trained, book, tmp_path, monkeypatch, script, options, named):
    (tmp_path / 'empty').mkdir()
    for name in ('file', 'bad.zip', 'bad.npz'):
        (tmp_path / name).write_bytes(b'nothing in particular')
    (tmp_path / 'fields.abc').write_text('M:6/8\nK:D\n')
    (tmp_path / 'last').mkdir()
    shutil.copy(trained['lstm'][1], tmp_path / 'last' / 'lstm.last.pt')
    notation.write_midi(np.empty((0, 3)), tmp_path / 'silent.mid')
    ckpt = trained['rwkv'][1]
    (tmp_path / 'half.pt').write_bytes(ckpt.read_bytes()[:ckpt.stat().st_size // 2])
    torch.save({'weights': torch.zeros(3)}, tmp_path / 'foreign.pt')
    torch.save({'model': Path('x'), 'code': subprocess.Popen}, tmp_path / 'code.pt')
    before = sorted(tmp_path.rglob('*'))
    monkeypatch.chdir(tmp_path)
    done = scripts_run(script, *options.format(tmp=tmp_path, book=book, ckpt=ckpt).split())
    scripts_refused(done, script, named)
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('name', ['f', 'f.mid', 'f.abc', 'f.zip', 'f.npz', '/dev/zero', 'rwkv.last.pt'])
@pytest.mark.parametrize('option', ['data', 'prompt', 'ckpt'])
def test_pipes_and_devices_do_not_hang(trained, tmp_path, name, option):
    path = Path('/dev/zero') if name == '/dev/zero' else tmp_path / name
    if path.parent == tmp_path:
        os.mkfifo(path)
    words = [f'--{option}={path}', f'--out_dir={tmp_path}']
    if name == 'rwkv.last.pt':
        words = ['--resume', f'--out_dir={tmp_path}']
    if option != 'data':
        words = [f'--ckpt={trained["rwkv"][1]}', f'--{option}={path}']
    script = 'train' if option == 'data' else 'sample'
    scripts_refused(scripts_run(script, *words, seconds=30), script, str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are interrupted, resumed, shared out

def scripts_last(out, arch='rwkv'):
    """What a run ended with: all its tensors, the table without the times, its step and its best loss."""
    saved = torch.load(out / f'{arch}.last.pt', weights_only=True)
    moments = [x for states in saved['optimizers'] for state in states.values() for x in state.values()]
    times = ('minutes', 'frames_per_second')
    rows = [{name: x for name, x in row.items() if name not in times} for row in scripts_rows(out, arch)]
    best = torch.load(out / f'{arch}.pt', weights_only=True)
    return [*saved['model'].values(), *moments, *best['model'].values()], rows, (saved['run']['step'], best['valid'])


def scripts_close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_train_seeds_make_it_repeatable(book, tmp_path):
    runs = {}
    for name, seed in (('a', 7), ('b', 7), ('c', 8)):
        assert scripts_train(book, tmp_path / name, '--max_iters=3', f'--seed={seed}').status == 0
        runs[name] = scripts_last(tmp_path / name)[0]
    assert all(map(torch.equal, runs['a'], runs['b'])) and not all(map(torch.equal, runs['a'], runs['c']))


@pytest.mark.parametrize('arch', ['rwkv', 'lstm'])
def test_resume_is_bit_for_bit_the_run_that_never_stopped(book, tmp_path, monkeypatch, arch):
    options = f'--arch={arch}', '--max_iters=9', '--eval_interval=4', '--log_interval=3', '--dropout=0.3'
    # a folder is named from where one stands, and stays the same music
    monkeypatch.chdir(book.parent)
    assert scripts_train(book.name, tmp_path / 'whole', *options).status == 0
    steps = 0
    draw = data.Dataset.batch

    # signals in the middle of the 1st, 4th, 6th and 9th step
    def interrupted(self, split, batch_size, *rest):
        nonlocal steps
        steps += batch_size > 1
        if batch_size > 1 and steps in (1, 4, 6, 9):
            signal.raise_signal(signal.SIGINT if steps < 5 else signal.SIGTERM)
        return draw(self, split, batch_size, *rest)

    monkeypatch.setattr(data.Dataset, 'batch', interrupted)
    done = [scripts_train(book.name, tmp_path / 'parts', *options)]
    monkeypatch.chdir(tmp_path)
    for _ in range(4):      # all else is remembered
        done.append(scripts_run('train', f'--arch={arch}', '--out_dir=parts', '--resume'))
    assert [d.status for d in done] == [130, 130, 143, 143, 0] and steps == 9, done[-1].err
    assert 'to go on:  ' in done[0].out and 'step 1, ' in done[1].out and '--resume' in done[0].out
    tensors, rows, best = scripts_last(tmp_path / 'whole', arch)
    tensors_of_parts, rows_of_parts, best_of_parts = scripts_last(tmp_path / 'parts', arch)
    assert rows_of_parts == rows and best_of_parts == best and best[0] == 9
    assert all(map(torch.equal, tensors_of_parts, tensors)) and len(tensors_of_parts) == len(tensors)


def test_resume_options_given_again_win(book, tmp_path):
    assert scripts_train(book, tmp_path / 'out', '--max_iters=2', '--beta2=0.9').status == 0
    done = scripts_train(book, tmp_path / 'out', '--resume', '--max_iters=4', '--learning_rate=0', '--block_size=1')
    assert done.status == 0, done.err
    saved = torch.load(tmp_path / 'out' / 'rwkv.last.pt', weights_only=True)
    assert saved['run']['step'] == 4
    assert {'--max_iters=4', '--beta2=0.9', '--learning_rate=0.0'} <= set(saved['options'])
    for options, named in ((['--n_embd=24'], 'n_embd 16'), (['--arch=lstm'], 'lstm.last.pt')):
        scripts_refused(scripts_train(book, tmp_path / 'out', '--resume', *options), 'train', named)


def test_resume_on_other_music_is_judged_anew(book, tmp_path):
    easy = tmp_path / 'easy'
    easy.mkdir()
    for i in range(4):
        notation.write_midi([(40, t, t + 1) for t in range(50)], easy / f'{i}.mid')
    assert scripts_train(easy, tmp_path / 'out', '--max_iters=1').status == 0
    before = load_checkpoint(tmp_path / 'out' / 'rwkv.pt')[1]
    assert scripts_train(book, tmp_path / 'out', '--resume', '--max_iters=2').status == 0
    after = load_checkpoint(tmp_path / 'out' / 'rwkv.pt')[1]
    assert after['valid'] > 2 * before['valid'] and after['meta']['data'] == str(book) and after['step'] == 2


def test_train_sigterm_saves_and_gives_the_command_to_go_on(book, tmp_path):
    words = [sys.executable, str(SCRIPTS_HOME / 'train.py'), f'--data={book}', f'--out_dir={tmp_path / "my run"}',
             *SCRIPTS_TINY, '--max_iters=1000000', '--arch=lstm']
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=SCRIPTS_ENV) as process:
        for line in process.stdout:
            if line.startswith('step 10:'):
                process.terminate()
                break
        rest, complaint = process.communicate(timeout=60)
    assert process.returncode == 143 and not complaint
    step, command = re.search(r'^stopped at step (\d+); to go on:  (.*)$', rest, re.M).groups()
    assert shlex.split(command) == [*words, '--resume']
    done = scripts_run('train', *shlex.split(command)[2:], f'--max_iters={int(step) + 5}')
    assert done.status == 0 and f'step {step}, ' in done.out and f'step {int(step) + 5}: valid' in done.out, done.err


# Runs that go on and save after every step, each killed in its third save: with half of the file written, before the
# new file takes the old one's name, and after that. Prints where the run stands after each
SCRIPTS_KILL = '''
import json, os, signal, sys
import model, torch, train
torch.set_num_threads(1)
out = sys.argv.pop()
fsync, replace = os.fsync, os.replace
saves = 0
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def dying_fsync(file):
    global saves
    fsync(file)
    saves += 'last.pt' in os.readlink(f'/proc/self/fd/{file}')
    if saves == 3 and moment == 'writing':
        os.ftruncate(file, os.fstat(file).st_size // 2)
        die()
def dying_replace(a, b):
    if saves == 3 and moment == 'written':
        die()
    replace(a, b)
    if saves == 3 and moment == 'renamed':
        die()
for moment in ('writing', 'written', 'renamed'):
    child = os.fork()
    if not child:
        os.fsync, os.replace = dying_fsync, dying_replace
        sys.stdout = open(os.devnull, 'w')
        train.main()
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    model.load_checkpoint(f'{out}/lstm.pt')
    step = model.load_checkpoint(f'{out}/lstm.last.pt')[1]['run']['step']
    print(json.dumps([moment, killed, step, sum(name.endswith('.part') for name in os.listdir(out))]), flush=True)
'''


def test_kill_9_in_the_act_of_saving_leaves_a_checkpoint(book, tmp_path):
    out = tmp_path / 'out'
    words = [f'--data={book}', f'--out_dir={out}', *SCRIPTS_TINY, '--eval_interval=1', '--arch=lstm']
    assert scripts_run('train', *words, '--max_iters=1').status == 0
    command = [sys.executable, '-c', SCRIPTS_KILL, *words, '--max_iters=100', '--resume', str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=SCRIPTS_ENV)
    # each cleared what the one before had left
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ['writing', -9, 2, 1], ['written', -9, 3, 1], ['renamed', -9, 5, 0]], done.stderr
    assert scripts_run('train', *words, '--max_iters=6', '--resume').status == 0


def test_train_two_runs_of_one_name(book, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    out.mkdir()
    dead = subprocess.Popen(['true'])
    dead.wait()
    with subprocess.Popen(['sleep', '100']) as other:
        (out / 'rwkv.pid').write_text(str(other.pid))
        (out / f'rwkv.pt.{other.pid}.part').write_bytes(b'half of it')
        for name in (f'rwkv.last.pt.{dead.pid}.part', f'lstm.pt.{dead.pid}.part'):
            (out / name).write_bytes(b'half of it')
        draw = data.Dataset.batch

        # the other run saves its best model, of another size, when this one has done its last validation but one
        def batch(self, *rest):
            if (out / 'rwkv.pt').exists():
                scripts_untrained(out / 'rwkv.pt', data.AbcText())
            return draw(self, *rest)

        monkeypatch.setattr(data.Dataset, 'batch', batch)
        done = scripts_train(book, out, '--max_iters=3', '--eval_interval=1', '--learning_rate=0')
        other.kill()
    assert done.status == 0 and f'process {other.pid} is training into {out}/rwkv.* too' in done.out
    assert sorted(path.name for path in out.iterdir()) == sorted([
        'loss.svg', f'lstm.pt.{dead.pid}.part', 'rwkv.csv', 'rwkv.last.pt', 'rwkv.pt', f'rwkv.pt.{other.pid}.part'])
    assert load_checkpoint(out / 'rwkv.pt')[0].config.arch == 'rwkv'
    # and after that nobody is in the way
    assert 'is training into' not in scripts_train(book, out, '--max_iters=1').out


class ScriptsInfiniteGradient(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, g: g * math.inf)


@pytest.mark.parametrize('options, step', [([], 0), (['--resume'], 2)])
@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_numbers_that_are_not_finite_stop_the_run(book, tmp_path, monkeypatch, what, options, step):
    out = tmp_path / 'out'
    assert scripts_train(book, out, '--max_iters=2').status == 0
    before = (out / 'rwkv.pt').read_bytes()
    loss = Model.loss
    change = ScriptsInfiniteGradient.apply if what == 'gradient' else lambda x: x * math.nan
    monkeypatch.setattr(Model, 'loss', lambda self, *windows: change(loss(self, *windows)))
    done = scripts_train(book, out, *options, '--max_iters=5', '--grad_clip=0')
    scripts_refused(done, 'train', '--learning_rate')
    assert what in done.err and f'step {step}' in done.err
    assert (out / 'rwkv.pt').read_bytes() == before
    assert load_checkpoint(out / 'rwkv.last.pt')[1]['run']['step'] == 2


@pytest.mark.parametrize('name', ['rwkv.pid', 'rwkv.last.pt', 'rwkv.pt', 'rwkv.csv', 'loss.svg'])
def test_full_disk_leaves_the_checkpoints(book, tmp_path, monkeypatch, name):
    out = tmp_path / 'out'
    assert scripts_train(book, out, '--max_iters=2').status == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(file):
        if Path(os.readlink(f'/proc/self/fd/{file}')).name.startswith(f'{name}.'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    done = scripts_train(book, out, '--resume', '--max_iters=4')
    scripts_refused(done, 'train', f'{name} (No space left')
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.get(name) == before.get(name) and not any('.part' in name for name in after)
    for path in ('rwkv.pt', 'rwkv.last.pt'):
        load_checkpoint(out / path)


@pytest.mark.parametrize('error', [
    MemoryError(), torch.OutOfMemoryError('CUDA out of memory'),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_not_enough_memory_is_told_in_one_sentence(book, trained, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    out = tmp_path / 'out'
    assert scripts_train(book, out, '--max_iters=2').status == 0
    before = {path.name: path.read_bytes() for path in out.glob('*.pt')}
    monkeypatch.setattr(Model, 'compose', fail)
    done = scripts_run('sample', f'--ckpt={trained["rwkv"][1]}', f'--out={tmp_path}/x')
    assert done.status == 2 and re.fullmatch('sample.py: .*not enough memory.*--num_samples.*\n', done.err)
    # in a step, and while the model is built
    for name in ('loss', '__init__'):
        monkeypatch.setattr(Model, name, fail)
        done = scripts_train(book, out, '--max_iters=4')
        assert done.status == 2 and re.fullmatch('train.py: .*not enough memory.*--batch_size.*\n', done.err)
    assert {path.name: path.read_bytes() for path in out.glob('*.pt')} == before


def test_gradient_accumulation_changes_nothing(book, tmp_path):
    for pieces in (1, 4):
        assert scripts_train(book, tmp_path / f'{pieces}', f'--gradient_accumulation_steps={pieces}', '--max_iters=4',
                             '--dropout=0').status == 0
    scripts_close(scripts_last(tmp_path / '1')[0], scripts_last(tmp_path / '4')[0])


def test_two_processes_with_batch_4_train_as_one_with_batch_8(book, tmp_path):
    options = ['--batch_size=8', '--max_iters=6', '--eval_interval=3', '--dropout=0', '--arch=lstm']
    assert scripts_train(book, tmp_path / 'one', *options).status == 0
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1']
    command = [*torchrun, f'--master_port={port}', str(SCRIPTS_HOME / 'train.py'), f'--data={book}', *SCRIPTS_TINY,
               *options, f'--out_dir={tmp_path / "two"}', '--gradient_accumulation_steps=2']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=SCRIPTS_ENV)
    assert done.returncode == 0, done.stderr
    # one speaks
    assert '2 processes' in done.stdout and done.stdout.count('\nstep 6: valid') == done.stdout.count('\ntest: ') == 1
    one, rows, _ = scripts_last(tmp_path / 'one', 'lstm')
    two, rows_of_two, _ = scripts_last(tmp_path / 'two', 'lstm')
    scripts_close(one, two)
    # validation and test, of which each process did a share
    for a, b in zip(rows, rows_of_two, strict=True):
        assert [float(x or 0) for x in a.values()] == pytest.approx([float(x or 0) for x in b.values()], abs=1e-4)


def test_batches_that_do_not_divide_are_refused(book, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '3')
    done = scripts_train(book, tmp_path / 'out', '--batch_size=8', '--max_iters=2')
    assert done.status == 2 and re.fullmatch(r'train.py: --batch_size=8 .*3 processes.*--batch_size=9\n', done.err)


# ---------------------------------------------------------------------------------------------------------------------
# The parts of train.py

def scripts_args(*words):
    return train.parse_args(list(words))


@pytest.mark.parametrize('shape', [(3, 32, 32), (2, 48, 16), (2, 16, 48), (1, 64, 1)])
def test_muon_moves_matrices_alike_in_all_directions(shape):
    n, rows, columns = shape
    rng = np.random.default_rng(0)
    U, _, V = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    rank = min(rows, columns)
    G = U * np.geomspace(1, 1 / 8, rank) @ V
    X = train.orthogonal(torch.tensor(G)).numpy()
    assert X.shape == shape
    # the directions are those of G, and none is much longer than another
    inside = U.swapaxes(1, 2) @ X @ V.swapaxes(1, 2)
    size = np.diagonal(inside, axis1=1, axis2=2)
    np.testing.assert_allclose(inside, size[:, None] * np.eye(rank), atol=1e-9)
    assert size.min() > 0.68 and size.max() < 1.22
    # one at a time, at any length, in any type
    np.testing.assert_allclose(train.orthogonal(torch.tensor(G[-1:])).numpy(), X[-1:], atol=1e-9)
    np.testing.assert_allclose(train.orthogonal(torch.tensor(1e-3 * G)).numpy(), X, atol=1e-2)
    half = train.orthogonal(torch.tensor(G, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 and np.abs(half.double().numpy() - X).max() < 0.1


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
    for p, w in zip(matrices, wanted):
        torch.testing.assert_close(p.detach(), w)


@pytest.mark.parametrize('arch', ['rnn', 'lstm', 'rwkv', 'transformer'])
def test_weight_decay_is_for_matrices_only(arch):
    model = Model(Config(9, arch, n_layer=2, n_embd=8, lookback=4, beat=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = scripts_args('--learning_rate=0.1', '--weight_decay=0.5', '--dtype=float32')
    optimizers = train.make_optimizers(model, args)
    assert [type(optimizer).__name__ for optimizer in optimizers] == ['AdamW', 'Muon']
    assert sum(len(group['params']) for optimizer in optimizers for group in optimizer.param_groups) == len(before)
    muon = {id(p) for group in optimizers[1].param_groups for p in group['params']}
    assert muon == {id(p) for name, p in model.named_parameters() if name.startswith('blocks.') and p.dim() == 2}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() == 2 else 1), msg=name)


def test_learning_rate_warms_up_and_decays():
    args = scripts_args('--learning_rate=1', '--min_lr=0.1', '--warmup_iters=9')
    assert [train.lr_at(step, 0, args) for step in (0, 4, 9, 99)] == pytest.approx([0.1, 0.5, 1, 1])
    assert [train.lr_at(99, done, args) for done in (0.25, 0.5, 1)] == pytest.approx([0.1 + 0.9 * 0.8535534, 0.55, 0.1])


@pytest.mark.parametrize('words, step_takes, validation_takes, wanted', [
    (['--max_iters=2000', '--max_minutes=0'], 0.2, 1.0, range(20, 23)),
    (['--max_iters=100000', '--max_minutes=0'], 0.2, 1.0, range(20, 23)),
    (['--max_iters=150', '--max_minutes=0'], 0.2, 1.0, range(3, 5)),
    (['--max_iters=10', '--max_minutes=0'], 0.2, 1.0, range(2, 3)),
    (['--max_iters=90', '--max_minutes=0', '--eval_interval=30'], 0.2, 1.0, range(4, 5)),
    (['--max_minutes=8'], 0.2, 0.7, range(20, 23)),
    (['--max_minutes=8'], 1.0, 60.0, range(2, 4)),
])
def test_validations_are_about_twenty(words, step_takes, validation_takes, wanted):
    args = scripts_args(*words)
    run = train.Run()
    at = []
    while True:
        done = train.progress(run, args)
        if train.is_due(run, args):
            at.append(done)
            run.validated = int(done * train.VALIDATIONS)
            run.validating += validation_takes
            run.seconds += validation_takes
        if done == 1:
            break
        run.step += 1
        run.seconds += step_takes
    assert len(at) in wanted and at[0] == 0 and at[-1] == 1, at
    if args.max_iters >= 2000 or step_takes < 1 < args.max_minutes:
        assert np.diff(at).max() < 0.07


@pytest.mark.parametrize('flags, has', [
    ('flags: fpu avx512f avx512_bf16 amx_tile', True), ('flags: fpu amx_bf16', True), ('', False),
    ('Features: asimd svebf16 bf16 i8mm', True), ('flags: fpu avx2 avx512f avx512vl', False)])
def test_bfloat16_where_the_processor_multiplies_in_it(monkeypatch, flags, has):
    monkeypatch.setattr(Path, 'exists', lambda self: True)
    monkeypatch.setattr(Path, 'read_text', lambda self: flags)
    assert train.has_bfloat16(torch.device('cpu')) is has
    args = scripts_args()
    train.complete(args, torch.device('cpu'), 1)
    assert args.dtype == ('bfloat16' if has else 'float32')
    monkeypatch.setattr(Path, 'exists', lambda self: False)
    assert not train.has_bfloat16(torch.device('cpu'))


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files: `python test_model.py 20000` reads so many mutated files, and prints how it went; the test reads a few

# for each file, beyond what an idle process takes
SCRIPTS_LIMITS = dict(seconds=2, megabytes=500)
SCRIPTS_CHANGES = ('os.remove', 'os.rename', 'os.mkdir', 'os.rmdir', 'os.link', 'os.symlink', 'os.system', 'os.exec',
                   'os.posix_spawn', 'shutil.rmtree', 'socket.connect', 'subprocess.Popen')
SCRIPTS_NUMBERS = (0, 1, 127, 128, 255, 2 ** 15 - 1, 2 ** 24 - 1, 2 ** 28 - 1, 2 ** 31, 2 ** 64 - 1)


def scripts_mutate(rng, blob, others):
    """A copy of bytes with one to three things wrong: bits, the end, a piece of another file, a number, a repeat."""
    blob = bytearray(blob)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(blob) + 1)
        match rng.randrange(5):
            case 0:
                for _ in range(rng.randint(1, 16) if blob else 0):
                    blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
            case 1:
                del blob[at:]
            case 2:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                blob[at:at + rng.randrange(200)] = other[start:start + rng.randint(1, 4000)]
            case 3:
                size = rng.choice([1, 2, 4, 8])
                number = rng.choice([*SCRIPTS_NUMBERS, len(blob)])
                blob[at:at + size] = (number % 256 ** size).to_bytes(size, rng.choice(['big', 'little']))
            case 4:
                piece = blob[at:at + rng.randint(1, 200)]
                blob[at:at] = piece * min(int(2 ** rng.uniform(0, 14)), (1 << 16) // max(1, len(piece)))
    return bytes(blob[:1 << 18])


def scripts_mutate_member(rng, blob, others):
    """A sound zip in which one member is mutated, so that its checksum does not give it away."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(blob)) as old, zipfile.ZipFile(buffer, 'w') as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, scripts_mutate(rng, content, others) if name == chosen else content)
    return buffer.getvalue()


def scripts_sound_files(folder):
    """{kind: [bytes]}: files of each kind as they should be; and a zip that costs as much as it can."""
    tunes = data.TUNES.read_text(encoding='utf-8').split('\n\nX:')[1:]
    sound = dict(mid=[], abc=['\n\nX:'.join(['', *tunes[i:i + 4]]).encode() for i in range(0, 40, 4)], zip=[], pt=[])
    for i, song in enumerate(notation.read_abc(b''.join(sound['abc']))[:9]):
        notation.write_midi(song.notes, folder / 'a', name='x' * 40, sharps=i - 4, metre='6/8')
        sound['mid'].append((folder / 'a').read_bytes())
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(folder / 'a', 'w', method) as z:
            for name, content in (('train/1.mid', sound['mid'][0]), ('valid/b.abc', sound['abc'][0]), ('c.txt', b'?')):
                z.writestr(name, content)
        sound['zip'].append((folder / 'a').read_bytes())
    for arch in ('rwkv', 'lstm'):
        model = Model(Config(9, arch, n_layer=1, n_embd=8, lookback=2))
        save_checkpoint(folder / 'a', model, meta=dict(data='a'), step=1, valid=1.0)
        sound['pt'].append((folder / 'a').read_bytes())
    with zipfile.ZipFile(folder / 'a', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('a.mid', bytes(64 << 20))
        for i in range(9_000):
            z.writestr(f'{i}.mid', b'')
    return sound, (folder / 'a').read_bytes()


def scripts_read(kind, path):
    """Reads a file; True if it is music or a model, False if it is refused in one sentence that names it."""
    try:
        if kind == 'pt':
            return bool(load_checkpoint(path)[0])
        data.open_zip.cache_clear()
        for song in itertools.chain(*data.load(path, log=str).songs.values()):
            key, onset, end = song.notes.T
            assert len(key) and ((0 <= key) & (key < 88) & (0 <= onset) & (onset <= end) & np.isfinite(end)).all()
        return True
    except UserError as e:
        assert str(path) in str(e) and '\n' not in str(e), str(e)
        return False


def survive(count, folder):
    """Reads mutated files, as many as asked for in all, under SCRIPTS_LIMITS; returns what became of them."""
    rng = random.Random(count)
    sound, worst = scripts_sound_files(folder)
    data.MANY = 10 ** 6         # all in this process
    result = {kind: dict(files=0, read=0, seconds=0.0, slowest=0.0, megabytes=0.0) for kind in sound}
    reading = False
    wrote = []

    def watch(event, args):     # Python itself tells of every file opened, changed or removed
        writes = event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if reading and (writes or event in SCRIPTS_CHANGES):
            wrote.append((event, *args))

    def check(kind, blob):
        nonlocal reading
        path = folder / f'x.{kind}'
        path.write_bytes(blob)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        reading = True
        with contextlib.redirect_stderr(io.StringIO()) as told:
            good = scripts_read(kind, path)
        reading = False
        seconds = time.process_time() - start
        megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        row = result[kind]
        for name, value in dict(files=1, read=good, seconds=seconds, megabytes=megabytes).items():
            row[name] += value
        row['slowest'] = max(row['slowest'], seconds)
        assert seconds < SCRIPTS_LIMITS['seconds'] and row['megabytes'] < SCRIPTS_LIMITS['megabytes'], (path, row)
        assert not wrote and len(told.getvalue()) < 10_000, (path, wrote, told.getvalue()[:999])

    # torch loads some of itself when it is first used
    (folder / 'x.pt').write_bytes(sound['pt'][0])
    load_checkpoint(folder / 'x.pt')
    sys.addaudithook(watch)
    check('zip', worst)
    kinds = [(kind, scripts_mutate) for kind in sound] + [(kind, scripts_mutate_member) for kind in ('zip', 'pt')]
    for kind, change in itertools.islice(itertools.cycle(kinds), count):
        check(kind, change(rng, rng.choice(sound[kind]), sound[kind]))
    return result


def test_hostile_files(tmp_path):
    command = [sys.executable, '-B', __file__, '400', str(tmp_path)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300, env=SCRIPTS_ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert sorted(result) == ['abc', 'mid', 'pt', 'zip']
    assert all(0 < row['read'] < row['files'] for row in result.values())


# ---------------------------------------------------------------------------------------------------------------------
# render.py

RENDER_TUNE = [[39, 0, 2], [43, 0, 2], [51, 0, 1], [53, 1, 1.5], [51, 1.5, 2], [39, 2, 4], [43, 2, 4], [56, 2, 4]]


def render_pitch(samples):
    """The key, of 88 and in between, of the loudest partial."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 18))
    return 48 + 12 * math.log2(spectrum.argmax() * 44100 / (1 << 18) / 440)


def render_level(notes, beat):
    """Loudness of both sides in the third of a second from a beat on, at 60 beats a minute, with a pickup of 1."""
    start = int(beat * 44100)
    part = render.synthesise(notes, 60, '4/4', 1)[start:start + 14700].astype(float)
    return np.sqrt((part ** 2).mean(0))


# the strongest and the weakest beat
@pytest.mark.parametrize('onset', [0, 1.5])
@pytest.mark.parametrize('key', [0, 12, 31, 48, 75, 87])
def test_render_loudest_partial_is_the_key(key, onset):
    sound = render.synthesise([[key, onset, onset + 2]])[int(onset * 22050):][:44100].astype(float)
    for side in (sound[:, 0], sound[:, 1], sound.sum(1)):
        assert abs(render_pitch(side) - key) < 0.5


def test_render_silence_is_silent_and_nothing_clips():
    assert render.synthesise([]).shape == (0, 2)
    # half a second a beat
    notes = [[40, 2, 3], [44, 20, 21], [48, 20, 21], [52, 20, 21]]
    sound = render.synthesise(notes)
    assert sound.dtype == np.int16 and not sound[:44100].any() and sound[44100:66150].any()
    assert not sound[int(3.5 * 44100):10 * 44100].any() and sound[10 * 44100:].any() and not sound[-1].any()
    assert np.abs(sound.astype(int)).max() == round(0.9 * 32767) and np.abs(sound.mean(0)).max() < 33
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
    notes = [[48, at, at + 0.5] for at in (1, 6, 11.5)]
    bar, beat, off = [render_level(notes, at).sum() for at in (1, 6, 11.5)]
    assert bar > 1.1 * beat > 1.2 * off
    low = render_level([[10, 0, 1]], 0)
    high = render_level([[80, 0, 1]], 0)
    assert low[0] > low[1] and high[1] > high[0]


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


# ---------------------------------------------------------------------------------------------------------------------
# render: pictures

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
    beats = 40 * bar
    notes = [[51 + i % 12, i / 2, i / 2 + 0.5] for i in range(int(2 * beats))]
    notes += [[27 + k, i * bar, i * bar + bar] for i in range(40) for k in (0, 4, 7)]
    render.write_svg(notes, path, metre, pickup)
    # sixteen bars to a line, all of the same scale
    expected = [40 + (pickup / bar + i % 16) * 57 for i in range(40)]
    upright = [d for d in (p.get('d') for p in ET.parse(path).iter(SVG + 'path')) if 'V' in d]
    assert [float(d[1:].split()[0]) for d in upright] == pytest.approx(expected, abs=0.01)
    assert len(render_marks(path, 'c0')) == int(2 * beats) and len(render_marks(path, 'c1')) == 120
    assert [text for text in render_texts(path) if text.isdecimal()] == [str(i + 1) for i in range(40)]
    assert path.stat().st_size < 40_000


def render_contrast(a, b):
    """Contrast ratio of two colours '#rrggbb' by the WCAG 2 formula."""
    lights = []
    for colour in (a, b):
        rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        lights.append((0.2126, 0.7152, 0.0722) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4))
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_render_colours_are_readable_on_both_pages():
    styles = render.STYLE.split('@media(prefers-color-scheme:dark)')
    for page, style in zip(('#ffffff', '#0d1117'), styles):
        colours = re.findall(r'[{;]color:(#\w{6})', style)
        assert len(colours) == 8 and all(render_contrast(colour, page) > 4.5 for colour in colours)


def test_render_terminal_roll():
    notes = [[39, 0, 1], [39, 1, 2], [44, 0.5, 0.75]]
    rows = render.terminal_roll(notes).split('\n')
    assert rows == ['F4     ■', 'C4   ■───■───', 'beats 1 to 2 of 2']
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


def test_render_loss_chart_of_many_runs(tmp_path):
    render_run(tmp_path / 'one.csv', [20.25])
    for i in range(30):
        render_run(tmp_path / f'run{i:02}.csv', [20, 2.5, 2.0])
    path = render.draw_losses(tmp_path)
    names = [t for t in ET.parse(path).iter(SVG + 'text') if t.get('class').startswith('c')]
    assert len(names) == 31 and names[0].text == 'one 20.250'
    assert float(names[-1].get('y')) < float(ET.parse(path).getroot().get('height'))


@pytest.mark.parametrize('low, high', [(0, 1), (0, 4200), (0.4, 0.6), (1.93, 2.7), (0, 0.05), (0, 95000), (5.1, 5.4)])
def test_render_ticks_are_round(low, high):
    ticks = render.ticks(low, high)
    assert 3 <= len(ticks) <= 8 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(abs(float(f'{tick:g}') - tick) < 1e-9 and len(f'{tick:g}') <= 5 for tick in ticks)


# ---------------------------------------------------------------------------------------------------------------------
# compare.py

# C D E C over C, then B3 F# G, and home to C, over G and C: (key, onset, end), C4 is key 39
COMPARE_TUNE = [[39, 0, 1], [41, 1, 1.5], [43, 1.5, 2], [39, 2, 4], [15, 0, 4], [19, 0, 4], [22, 0, 4],
                [38, 4, 5], [45, 5, 5.25], [46, 5.25, 6], [46, 6, 7], [51, 7, 8], [22, 4, 6], [26, 4, 6], [15, 6, 8]]


def compare_tune(notes):
    notes = np.array(notes, dtype=np.float64)
    return notes[np.lexsort((notes[:, 0], notes[:, 1]))]


def compare_line(keys, length=1.0):
    """A melody of notes of one length, without chords."""
    return compare_tune([[key, i * length, (i + 1) * length] for i, key in enumerate(keys)])


def compare_features(notes):
    """{feature: number} of a tune that copies nothing."""
    tune = compare.study(notes, data.copy_book([np.zeros(0, dtype=np.int64)]))
    return {name: float(feature(tune)) for name, feature in compare.FEATURES.items()}


def test_compare_features_of_a_small_tune():
    found = compare_features(compare_tune(COMPARE_TUNE))
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


def test_compare_features_do_not_depend_on_key_or_touch():
    tune = compare_tune(COMPARE_TUNE)
    for same in (tune + [3, 0, 0], tune - [0, 0, 1 / 480]):
        assert compare_features(same) == pytest.approx(compare_features(tune))
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
        assert (round(found['repeats'], 9), found['circles']) == (round(share, 9), circling), name
    # a long note is none
    assert compare_features(np.array([[39, 0, 11.5]]))['circles'] == 0


def test_compare_distance_by_hand():
    for a, b, apart in (([1, 2, 3], [1, 2, 3], 0), ([1, 2], [3, 4, 5], 1), ([1, 2, 3, 4], [0, 1, 2], 0.5),
                        ([1, 1], [1, 0], 0.5), ([], [1], 1), ([], [], 0)):
        assert compare.distance(np.array(a), np.array(b)) == apart


def test_compare_longest_copy():
    rng = np.random.default_rng(0)
    old = compare_line(rng.integers(20, 60, 200))
    new = compare_line(rng.integers(20, 60, 100))
    # a passage of 40 notes, a third higher
    new[30:70, 0] = old[100:140, 0] + 4
    book = data.copy_book([data.intervals(compare_line(rng.integers(20, 60, 50)), 4), data.intervals(old, 4)])
    # from the first of the forty notes to the last
    assert compare.study(new, book).copied == 39
    # at double speed it is another tune, and a copy does not run from one song into the next
    assert data.longest_copy(data.intervals(new * [1, 0.5, 0.5], 4), book) <= 4
    halves = data.copy_book([data.intervals(part, 4) for part in (old[:100], old[100:])])
    assert data.longest_copy(data.intervals(old, 4), halves) == 99 * 4


def compare_model(folder, arch, representation):
    """A small untrained model, as train.py would leave it, and music for it."""
    rng = np.random.default_rng(0)
    for split, songs in (('train', 4), ('valid', 2), ('test', 3)):
        (folder / 'music' / split).mkdir(parents=True, exist_ok=True)
        for i in range(songs):
            tune = compare_line(rng.integers(39, 51, 16))
            notation.write_midi(tune, folder / 'music' / split / f'{i}.mid')
    meta = dict(data=str(folder / 'music'), source='music', representation=representation.settings, common_key=False,
                tempo=120.0)
    torch.manual_seed(0)
    config = model.Config(representation.V, arch, representation.heads[-1], n_layer=1, n_embd=8, lookback=4,
                          beat=representation.beat, shift=representation.shift)
    net = model.Model(config)
    if config.head == 'bernoulli':
        # few keys at a time, and now and then an end
        torch.nn.init.constant_(net.head.out.bias, -4.0)
    model.save_checkpoint(folder / f'{arch}.pt', net, meta=meta, step=1, valid=1.0)


def compare_run(monkeypatch, *words):
    monkeypatch.setattr('sys.argv', ['compare.py', *map(str, words)])
    compare.main()


def test_compare_runs(tmp_path, monkeypatch, capsys):
    compare_model(tmp_path, 'lstm', data.PianoRoll(2))
    compare_model(tmp_path, 'rwkv', data.Events(4))
    (tmp_path / 'lstm.csv').write_text('iter,minutes,valid\n0,0,9.5\n10,1,2.5\n20,2,2.25\n')
    tables = []
    for out in (tmp_path / 'a', tmp_path / 'b'):
        checkpoints = (tmp_path / 'lstm.pt', tmp_path / 'rwkv.pt')
        compare_run(monkeypatch, *checkpoints, '--num_samples=5', '--length=24', f'--out={out}')
        printed = capsys.readouterr().out
        assert all(word in printed for word in ('test songs', 'training songs', 'KS lstm', 'rwkv', 'mean distance'))
        rows = list(csv.DictReader(out.with_suffix('.csv').open()))
        assert len(rows) == 21 + 9 and list(rows[0]) == [
            '', 'test songs', 'training songs', 'KS training songs', 'lstm', 'KS lstm', 'rwkv', 'KS rwkv']
        # how fast it was is all that may differ
        tables.append([row for row in rows if row[''] != 'frames a second when composing'])
        root = ET.parse(out.with_suffix('.svg')).getroot()
        words = ' '.join(text.text or '' for text in root.iter('{http://www.w3.org/2000/svg}text'))
        assert all(text in words for text in ('lstm 2.250', 'melody on chord', 'test songs, ', 'rwkv, '))
    assert tables[0] == tables[1]
    assert [row['test songs'] for row in tables[0] if row[''] == 'beats'] == ['16.000']


def test_compare_refuses(tmp_path, monkeypatch):
    out = f'--out={tmp_path}/c'
    for name in ('a', 'b'):
        compare_model(tmp_path / name, 'lstm', data.PianoRoll(2))
    compare_model(tmp_path / 'a', 'rnn', data.AbcText())
    with pytest.raises(UserError, match='compare them apart'):
        compare_run(monkeypatch, tmp_path / 'a/lstm.pt', tmp_path / 'b/lstm.pt', '--num_samples=2', '--length=8', out)
    with pytest.raises(UserError, match='no tune that can be read'):
        compare_run(monkeypatch, tmp_path / 'a/rnn.pt', '--num_samples=2', '--length=8', out)


if __name__ == '__main__':
    # python test_model.py 20000 [folder]: so many mutated files, in a folder that is kept
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(survive(int(sys.argv[1]), Path(*(sys.argv[2:] or [temporary])))))
