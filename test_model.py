"""All tests:  python -m pytest"""

import contextlib
import csv
import errno
import functools
import hashlib
import http.server
import io
import json
import math
import os
import random
import re
import resource
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
from dataclasses import asdict
from pathlib import Path

import mido
import numpy as np
import pytest
import torch

import data
import render
import sample
import train
import wkv
from model import (VERSION, BernoulliHead, CheckpointError, ChordHead, Clock, Config, Dropout, LSTMBlock, Model, RWKVBlock,
                   load_checkpoint)

OPTIMIZERS = ['adamw'] + ['muon'] * hasattr(torch.optim, 'Muon')


# ------------------------------------------------------------------------------------------------------ data: MIDI

def _on(note, time=0, velocity=80, channel=0):
    return mido.Message('note_on', note=note, velocity=velocity, time=time, channel=channel)


def _off(note, time=0, channel=0):
    return mido.Message('note_off', note=note, time=time, channel=channel)


def _midi(path, *tracks, kind=1, ticks=480):
    mido.MidiFile(type=kind, ticks_per_beat=ticks, tracks=[mido.MidiTrack(t) for t in tracks]).save(path)
    return path


def _rows(notes):
    return [(int(k) + 21, round(float(a), 4), round(float(b), 4)) for k, a, b in notes]


@pytest.mark.parametrize('kind, tracks, rows', [
    pytest.param(0, [[_on(60), _off(60, 480)]], [(60, 0, 1)], id='type 0'),
    pytest.param(1, [[_on(60), _off(60, 480)], [_on(48, 240, channel=3), _off(48, 960, channel=3)]],
                 [(60, 0, 1), (48, .5, 2.5)], id='all tracks and channels'),
    pytest.param(0, [[_on(36, channel=9), _on(60), _off(60, 480), _off(36, channel=9)]], [(60, 0, 1)], id='percussion'),
    pytest.param(0, [[_on(60), _on(60, 480, velocity=0), _on(62, 480), _off(62, 480)]], [(60, 0, 1), (62, 2, 3)],
                 id='velocity 0'),
    pytest.param(0, [[_on(60), _on(60, 480), _off(60, 480), _off(60, 480)]], [(60, 0, 1), (60, 1, 2)], id='struck again'),
    pytest.param(0, [[_on(60), _on(60, 480), _off(60), _off(60, 480)]], [(60, 0, 1), (60, 1, 2)], id='late release'),
    pytest.param(1, [[_on(60), _off(60, 1920)], [_on(60, 480, channel=1), _off(60, 480, channel=1)]],
                 [(60, 0, 1), (60, 1, 2)], id='struck again from another track'),
    pytest.param(0, [[_on(60), _on(60, channel=1), _off(60, 480), _off(60, 480, channel=1)]], [(60, 0, 2)], id='twice at once'),
    pytest.param(1, [[_on(60, 480)], [_on(64), _off(64, 1440)]], [(64, 0, 3), (60, 1, 3)], id='never released'),
    pytest.param(0, [[_on(60, 480), _off(60), _on(62, 480), _off(62, 480)]], [(60, 1, 1), (62, 2, 3)], id='no length'),
    pytest.param(0, [[_off(60), _on(62, 480), _off(62, 480), _off(62)]], [(62, 1, 2)], id='release without a strike'),
])
def test_midi_notes(tmp_path, kind, tracks, rows):
    song = data.read_midi(_midi(tmp_path / 'a.mid', *tracks, kind=kind))
    assert _rows(song.notes) == rows and song.dropped == 0 and song.name == 'a.mid'


def test_midi_no_length_lasts_one_step(tmp_path):
    song = data.read_midi(_midi(tmp_path / 'a.mid', [_on(60, 480), _off(60), _on(62, 480), _off(62, 480)]))
    assert _rows(data.to_notes(data.to_frames(song.notes))) == [(60, 1, 1.25), (62, 2, 3)]


def test_midi_outside_the_piano_is_counted(tmp_path):
    song = data.read_midi(_midi(tmp_path / 'a.mid', [m for n in (20, 21, 108, 109, 127) for m in (_on(n), _off(n, 96))], ticks=96))
    assert _rows(song.notes) == [(21, 1, 2), (108, 2, 3)] and song.dropped == 3


def test_midi_first_tempo_and_key(tmp_path):
    tempo, key = functools.partial(mido.MetaMessage, 'set_tempo'), functools.partial(mido.MetaMessage, 'key_signature')
    song = data.read_midi(_midi(tmp_path / 'a.mid', [tempo(tempo=400_000, time=960), key(key='C', time=960)],
                                [tempo(tempo=750_000, time=240), key(key='F#m', time=480), _on(60), _off(60, 9)]))
    assert song.tempo == 80 and song.sharps == 3
    song = data.read_midi(_midi(tmp_path / 'b.mid', [_on(60), _off(60, 9)]))
    assert song.tempo == 120 and song.sharps is None
    for sharps, key in enumerate('Cb Gb Db Ab Eb Bb F C G D A E B F# C#'.split(), -7):
        assert data.sharps(key) == sharps
    assert [data.sharps(k) for k in 'Am Em Dm Ebm A#m'.split()] == [0, 1, -1, -6, 7]


def test_midi_refused(tmp_path):
    path = _midi(tmp_path / 'a.mid', [_on(60), _off(60, 480)])
    good = path.read_bytes()
    wrong = dict(type_2=good[:9] + b'\2' + good[10:], smpte=good[:12] + struct.pack('>h', -25 << 8) + good[14:], empty=b'',
                 cut=good[:-7], text=b'no music', endless_delta=good[:22] + b'\xff' * 100_000, huge=b'MThd' + bytes(5 << 20),
                 bad_key=good[:22] + b'\0\xff\x59\x02\x40\x09' + good[22:], no_ticks=good[:12] + b'\0\0' + good[14:])
    for name, blob in wrong.items():
        path = tmp_path / f'{name}.mid'
        path.write_bytes(blob)
        with pytest.raises(data.UserError, match=f'{name}.mid.*: ') as e:
            data.read_midi(path)
        assert '\n' not in str(e.value)
        with pytest.raises(data.UserError):
            data.read_midi(io.BytesIO(blob), 'member')
    with pytest.raises(data.UserError, match='endless delta'):
        data.read_midi(tmp_path / 'endless_delta.mid')
    with pytest.raises(data.UserError, match='type 2'):
        data.read_midi(tmp_path / 'type_2.mid')
    with pytest.raises(data.UserError, match='SMPTE'):
        data.read_midi(tmp_path / 'smpte.mid')
    with pytest.raises(data.UserError, match='nowhere.mid'):
        data.read_midi(tmp_path / 'nowhere.mid')


def test_midi_write_and_read_back(tmp_path):
    notes = np.array([[0, 0, 1], [40, 0, .5], [40, .5, 1.25], [87, 2, 2]])
    data.write_midi(notes, tmp_path / 'a.mid', tempo=90)
    song = data.read_midi(tmp_path / 'a.mid')
    notes[3, 2] += 1 / 480  # the shortest note a file can hold
    assert np.allclose(song.notes, notes) and abs(song.tempo - 90) < .01
    data.write_midi(notes[:0], tmp_path / 'a.mid', tempo=1)  # written over; slower than MIDI can say
    assert len(data.read_midi(tmp_path / 'a.mid').notes) == 0
    (tmp_path / 'folder').mkdir()
    for path in (tmp_path / 'no' / 'a.mid', tmp_path / 'folder'):
        with pytest.raises(data.UserError, match='cannot write'):
            data.write_midi(notes, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.mid', 'folder']


# ------------------------------------------------------------------------------------------------------- data: ABC

def _abc(body, head='M:4/4\nL:1/4\nK:C'):
    return data.read_abc(io.BytesIO(f'X:1\nT:tune\n{head}\n{body}\n'.encode()), 'x.abc')


def _melody(body, head='M:4/4\nL:1/4\nK:C'):
    """The notes as one string: letter, octave and length in quarter notes, with rests, in order of onset."""
    out, now = [], 0
    for note, on, end in _rows(_abc(body, head)[0].notes):
        if on > now:
            out.append(f'z{on - now:g}')
        out.append('C ^C D ^D E F ^F G ^G A ^A B'.split()[note % 12] + f'{note // 12 - 1}:{end - on:.3g}')
        now = end
    return ' '.join(out)


@pytest.mark.parametrize('body, melody', [
    ("C,, C, C c c'", 'C2:1 C3:1 C4:1 C5:1 C6:1'),
    ('C2 C/ C/2 C// C/4 C3/2 C3/ C4/', 'C4:2 C4:0.5 C4:0.5 C4:0.25 C4:0.25 C4:1.5 C4:1.5 C4:2'),
    ('^F F f | F _B =B B ^^C __D', '^F4:1 ^F4:1 ^F5:1 F4:1 ^A4:1 B4:1 B4:1 D4:1 C4:1'),
    ('C z C z/ C x2 C | Z | D Z2 E', 'C4:1 z1 C4:1 z0.5 C4:1 z2 C4:1 z4 D4:1 z8 E4:1'),
    ('C-C D-|D2 E-F C3-\nC .-', 'C4:2 D4:3 E4:1 F4:1 C4:4'),
    ('^F-|F F', '^F4:2 F4:1'),
    ('C>D C<D C>>D C<<D C>>>D', 'C4:1.5 D4:0.5 C4:0.5 D4:1.5 C4:1.75 D4:0.25 C4:0.25 D4:1.75 C4:1.88 D4:0.125'),
    ('C > D', 'C4:1.5 D4:0.5'),
    ('(3CDE (2FG (4CDEF A', 'C4:0.667 D4:0.667 E4:0.667 F4:1.5 G4:1.5 C4:0.75 D4:0.75 E4:0.75 F4:0.75 A4:1'),
    ('(5:4CDEFG (3::2C2D E (3:2:4 C/D/EF G', 'C4:0.8 D4:0.8 E4:0.8 F4:0.8 G4:0.8 C4:1.33 D4:0.667 E4:1 '
     'C4:0.333 D4:0.333 E4:0.667 F4:0.667 G4:1'),
    ('{fg}A {/d}(B .c) ~d !trill!e +turn+f Tg vA uB y4 c`d $', 'A4:1 B4:1 C5:1 D5:1 E5:1 F5:1 G5:1 A4:1 B4:1 C5:1 D5:1'),
    ('C \\\nD % E\n% F G\n%%MIDI program 1\nw:la la\nE|', 'C4:1 D4:1 E4:1'),
    ('C [K:D] F [L:1/8] F2 [M:3/4] Z C\nK:F\nB2\nL:1/4\nB', 'C4:1 ^F4:1 ^F4:1 z3 ^C4:0.5 ^A4:1 ^A4:1'),
    ('"^slow"C "_x"D "<p"E ">q"F "@1,2 r"G', 'C4:1 D4:1 E4:1 F4:1 G4:1'),
])
def test_abc_melody(body, melody):
    assert _melody(body) == melody


@pytest.mark.parametrize('body, letters', [
    ('|:C:|D', 'CCD'), ('C:|D', 'CCD'), ('C|]D:|E', 'CDDE'), ('C||D:|E', 'CDDE'), ('|:C||D:|E', 'CDCDE'),
    ('|:C::D:|', 'CCDD'), ('|:C:|:D:|', 'CCDD'), ('|:C:||:D:|E', 'CCDDE'), ('C:|D:|', 'CCDD'), ('|::C::|D', 'CCCD'),
    ('|:C|1D:|2E|]F', 'CDCEF'), ('|:C[1D:|[2E:|F', 'CDCEF'), ('C|1D:|2E||F:|', 'CDCEFF'), ('|:C|1D:|2E||F:|', 'CDCEFF'), ('|:C|1D:|\n|2E||', 'CDCE'),
    ('|:C|[1,3D:|[2E:|[4F|]G', 'CDCECDCFG'), ('|:C|1-3D:|4E|]', 'CDCDCDCE'), ('|:C|1D:|2E|:F|1G:|2A|]', 'CDCEFGFA'),
    ('|:C|1D:|E', 'CDCE'), ('[|C.|D[|]', 'CD'), ('|:C||D|1E:|2F|]G', 'CDECDFG'), ('G|:C:|', 'GCC'),
])
def test_abc_repeats(body, letters):
    assert ''.join('C_D_EF_G_A_B'[note % 12] for note, *_ in _rows(_abc(body)[0].notes)) == letters


@pytest.mark.parametrize('key, sharps, fgabcde', [
    ('C', 0, 'F G A B C D E'), ('G', 1, '^F G A B C D E'), ('Am', 0, 'F G A B C D E'), ('F#m', 3, '^F ^G A B ^C D E'),
    ('D Mix', 1, '^F G A B C D E'), ('Edor', 2, '^F G A B ^C D E'), ('E PHRYGIAN', 0, 'F G A B C D E'), ('Bb major', -2, 'F G A ^A C D ^D'),
    ('FLyd', 0, 'F G A B C D E'), ('B locrian', 0, 'F G A B C D E'), ('Amin', 0, 'F G A B C D E'), ('A aeolian', 0, 'F G A B C D E'),
    ('Gion', 1, '^F G A B C D E'), ('D =c', 2, '^F G A B C D E'), ('D exp _b', None, 'F G A ^A C D E'), ('HP', 2, '^F G A B ^C D E'),
    ('Hp', 2, '^F G A B ^C D E'), ('none', None, 'F G A B C D E'), ('', None, 'F G A B C D E'), ('G clef=bass', 1, '^F G A B C D E'),
])
def test_abc_keys(key, sharps, fgabcde):
    song = _abc('FGABCDE', f'L:1/4\nK:{key}')[0]
    assert song.sharps == sharps
    assert ['C ^C D ^D E F ^F G ^G A ^A B'.split()[n % 12] for n, *_ in _rows(song.notes)] == fgabcde.split()


@pytest.mark.parametrize('head, beats, tempo', [
    ('M:4/4', .5, 120), ('M:C', .5, 120), ('M:C|', .5, 120), ('M:6/8', .5, 120), ('M:2/4', .25, 120), ('M:none', .5, 120),
    ('M:(2+3)/8', .25, 120), ('N:', .5, 120), ('L:1/16', .25, 120), ('M:2/4\nL:1/2', 2, 120), ('Q:1/4=96', .5, 96), ('Q:"Fast" 3/8=100', .5, 150),
    ('Q:1/8=100 "Slow"', .5, 50), ('Q:1/4 1/8=60', .5, 90), ('L:1/8\nQ:200', .5, 100), ('Q:"Lively"', .5, 120), ('Q:1/4=0', .5, 120),
])
def test_abc_unit_length_and_tempo(head, beats, tempo):
    song = _abc('C', f'{head}\nK:C')[0]
    assert _rows(song.notes) == [(60, 0, beats)] and song.tempo == tempo


def test_abc_tuplets_in_compound_time():
    assert _melody('(2CD(5CDEFG', 'M:6/8\nL:1/8\nK:C') == 'C4:0.75 D4:0.75 C4:0.3 D4:0.3 E4:0.3 F4:0.3 G4:0.3'


def test_abc_chords_and_chord_symbols():
    assert _rows(_abc('[CEG]2 [CE]/ [C2E]-[CF]')[0].notes) == [
        (60, 0, 2), (64, 0, 2), (67, 0, 2), (60, 2, 2.5), (64, 2, 2.5), (60, 2.5, 5.5), (64, 2.5, 4.5), (65, 4.5, 5.5)]
    # held to the next symbol, over bars and rests, struck again by the same symbol; N.C. and the end stop it
    rows = _rows(_abc('c "G7"d2 z|"G"d z "N.C."d "F#m/C#"c2|')[0].notes)
    assert [r for r in rows if r[0] < 66] == [(n, *t) for t in ((1, 4), (4, 6), (7, 9)) for n in
                                              ((55, 59, 62) if t[0] < 7 else (54, 57, 61))]
    # the melody's D4 is inside G B D: the triad turns over until it lies below
    assert [r for r in _rows(_abc('"G"D4')[0].notes)] == [(50, 0, 4), (55, 0, 4), (59, 0, 4), (62, 0, 4)]
    for symbol, triad in dict(C=(0, 4, 7), Cm=(0, 3, 7), Cm7=(0, 3, 7), Cmaj7=(0, 4, 7), C7=(0, 4, 7), Cdim=(0, 3, 6), Caug=(0, 4, 8),
                              Csus4=(0, 5, 7), C7sus4=(0, 5, 7), Cm7b5=(0, 3, 6), C6=(0, 4, 7), Cadd9=(0, 4, 7)).items():
        assert data._triad(symbol) == [48 + i for i in triad], symbol
    assert data._triad('Bb')[0] == 58 and data._triad('C(Am)')[0] == 48
    assert len(_abc('"C""G"c4')[0].notes) == 4  # a symbol that is replaced at once makes no sound
    # with a repeat the symbols come round again
    assert [r[1:] for r in _rows(_abc('|:"C"c4:|')[0].notes) if r[0] == 48] == [(0, 4), (4, 8)]


@pytest.mark.parametrize('body, thing', [
    ('V:1\nC', 'V:1'), ('[V:2]C', 'V:2'), ('C & D', '&'), ('U:T=!trill!\nC', 'U:T'), ('m:~n=n\nC', 'm:'), ('!D.C.!C', 'D.C.'),
    ('"Fine"C', 'Fine'), ('"^D.C. al Fine"C', 'D.C. al Fine'), ('"Coda"C', 'Coda'), ('C ? D', '?'), ('C0', '0'), ('C1/0', '0'),
    ('[CE?]', '[CE?]'), ('[M:x]C', 'M:x'), ('K:X\nC', 'K:X'), ('z4', 'no notes'), ('^/C', '^'), ('[M:none]Z C', 'Z'),
])
def test_abc_what_it_cannot_read_skips_the_tune(capsys, body, thing):
    assert _abc(body) == []
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and 'x.abc' in line and '"tune"' in line and thing in line


def test_abc_header_of_parts_skips_the_tune(capsys):
    assert _abc('C', 'P:ABAB\nK:C') == [] and 'P:ABAB' in capsys.readouterr().err
    assert len(_abc('P:A\nC')) == 1  # only a label


def test_abc_files(tmp_path, capsys):
    text = ('\ufeff%abc-2.1\r\nL:1/4\r\nM:3/4\r\n\r\nfree text: with a colon\r\n\r\nX:1\r\nT:Café\r\nT:second title\r\nK:G\r\nA:|\r\n\r\n'
            'more text\r\n\r\nX:2\r\nT:Two\r\nL:1/2\r\nK:D\r\nF&F\r\nX:3\r\nK:D\r\nF|\r\n')
    for encoding in ('utf-8', 'latin-1'):
        path = tmp_path / 'a.abc'
        path.write_bytes(text.lstrip('\ufeff' * (encoding == 'latin-1')).encode(encoding))
        songs = data.read_abc(path)
        assert [s.name for s in songs] == ['Café', 'X:3']
        assert [_rows(s.notes) for s in songs] == [[(69, 0, 1), (69, 1, 2)], [(66, 0, 1)]]
        assert '"Two"' in capsys.readouterr().err
    path.write_bytes(b'\xef\xbb\xbfX:1\nK:C\nC')
    assert len(data.read_abc(path)) == 1
    for wrong in (b'', b'no tune here'):
        path.write_bytes(wrong)
        with pytest.raises(data.UserError, match='a.abc'):
            data.read_abc(path)


# ---------------------------------------------------------------------------------------- data: keys and frames

def test_keys_estimate_and_shift():
    scale = [(n, i, i + (2 if n in (0, 7) else 1)) for i, n in enumerate((0, 2, 4, 5, 7, 9, 11, 0, 4, 7, 0))]
    for shift, sharps in zip(range(0, 12), (0, -5, 2, -3, 4, -1, 6, 1, -4, 3, -2, 5)):
        notes = np.array([(39 + n + shift, a, b) for n, a, b in scale], dtype=float)  # C major, moved up
        assert data.estimate_sharps(notes) == sharps
    minor = np.array([(36 + n, i, i + 1) for i, n in enumerate((0, 0, 3, 7, 0, 2, 3, 5, 7, 8, 7, 0))], dtype=float)
    assert data.estimate_sharps(minor) == 0  # A minor
    notes = np.array([[40.0, 0, 1]])
    for sharps, shift in {0: 0, 1: 5, 2: -2, 3: 3, 4: -4, 5: 1, 6: -6, -1: -5, -2: 2, -3: -3, -4: 4, -5: -1, -6: -6, 7: -1, -7: 1}.items():
        assert data.common_key_shift(data.Song('', notes, sharps=sharps)) == shift
    assert data.common_key_shift(data.Song('', np.array([[85.0, 0, 1]]), sharps=1)) == -7  # 5 would leave the keyboard
    assert data.common_key_shift(data.Song('', np.array([[1.0, 0, 1]]), sharps=2)) == 10
    assert data.common_key_shift(data.Song('', np.array([[1.0, 0, 1], [86, 0, 1]]), sharps=2)) == 0
    assert data.common_key_shift(data.Song('', minor)) == 0


@pytest.mark.parametrize('beats, steps', [
    ([(0, 0, 1)], [(0, 0, 4)]), ([(0, .12, .9)], [(0, 0, 4)]), ([(0, .125, 1.125)], [(0, 1, 5)]), ([(0, 1, 1)], [(0, 4, 5)]),
    ([(0, 0, .05)], [(0, 0, 1)]), ([(0, 0, .99), (0, 1, 2)], [(0, 0, 4), (0, 4, 8)]),
    ([(0, 0, 2), (0, 1, 1.5)], [(0, 0, 4), (0, 4, 6)]), ([(0, 0, .5), (0, .05, 1)], [(0, 0, 4)]),
    ([(0, 0, 1), (87, 0, 1)], [(0, 0, 4), (87, 0, 4)]),
])
def test_frames_quantiser(beats, steps):
    frames = data.to_frames(np.array(beats, dtype=float))
    want = np.zeros((max(end for _, _, end in steps), 177), dtype=np.uint8)
    for key, on, end in steps:
        want[on, key] = 1
        want[on + 1:end, 88 + key] = 1
    assert frames.dtype == np.uint8 and (frames == want).all()
    plain = data.to_frames(np.array(beats, dtype=float), onsets=False)
    assert (plain[:, :88] == want[:, :88] | want[:, 88:176]).all() and plain.shape[1] == data.units(False) == 89


def _random_notes(rng, n, steps=200):
    rows = np.stack([rng.integers(0, 88, n), on := rng.integers(0, steps, n), on + rng.integers(1, 30, n)], 1)
    return data._one_per_key(rows.astype(float)) / [1, 4, 4]


def test_frames_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    for n in (0, 1, 50, 600):
        notes = _random_notes(rng, n)
        frames = data.to_frames(notes)
        assert np.array_equal(data.to_notes(frames), notes) and frames[:, -1].sum() == 0
        data.write_midi(data.to_notes(frames), tmp_path / 'a.mid')
        assert np.array_equal(data.to_frames(data.read_midi(tmp_path / 'a.mid').notes), frames)
        plain = data.to_frames(notes, onsets=False)
        assert np.array_equal(data.to_frames(data.to_notes(plain, onsets=False), onsets=False), plain)
    held = np.zeros((4, 177), dtype=np.uint8)
    held[1:3, 88 + 5] = held[2, 6] = held[3, 88 + 6] = 1  # key 5 is held without having been struck
    assert data.to_notes(held).tolist() == [[5, .25, .75], [6, .5, 1]]


def test_frames_keep_the_notes_of_played_music(tmp_path):
    """Notes that end a tick early, triplets, a chord below: 0.99 or more are found again, and far fewer without onsets."""
    rng, rows, now = np.random.default_rng(1), [], 0.0
    for _ in range(300):
        length = rng.choice([.25, .5, .5, .5, 1, 1.5, 1 / 3])
        for _ in range(3 if length == 1 / 3 else 1):
            rows.append((rng.integers(40, 60), now, now + length - 1 / 480))
            now += length
    rows += [(key, bar, bar + 2 - 1 / 480) for bar in range(0, int(now), 2) for key in (20, 24, 27)]
    notes = data._one_per_key(np.array(rows))
    for onsets, low, high in ((True, .99, 1), (False, .3, .9)):
        data.write_midi(data.to_notes(data.to_frames(notes, onsets=onsets), onsets=onsets), tmp_path / 'a.mid')
        again = data.read_midi(tmp_path / 'a.mid').notes
        found = sum(any(abs(on - b) < .1 for k, b, _ in again if k == key) for key, on, _ in notes)
        assert low <= 2 * found / (len(notes) + len(again)) <= high


def test_frames_too_long():
    for end in (1e5, 1e12, float('inf')):
        with pytest.raises(data.UserError, match='100,000'):
            data.to_frames(np.array([[40, 0, end]]))


# -------------------------------------------------------------------------------------------- data: tape and batches

def _dataset(n_songs=12, notes=80, onsets=True, seed=0, **options):
    rng = np.random.default_rng(seed)
    songs = [data.Song(f'{i}', _random_notes(rng, notes, 60)) for i in range(n_songs)]
    songs[0].notes[:] = data._one_per_key(np.array([[10, 0, 300.0]] * len(songs[0].notes)))[0]  # one long held note
    return data.Dataset({'train': songs, 'valid': songs[:5], 'test': songs[5:]}, 'random', onsets=onsets, **options)


@pytest.mark.parametrize('onsets', [True, False])
def test_batch_windows_equal_the_whole_tape(onsets):
    ds = _dataset(onsets=onsets)
    pieces = [boundary := np.zeros((1, ds.V), dtype=np.uint8)]
    boundary[0, -1] = 1
    for song in ds.songs['train']:
        pieces += [data.to_frames(song.notes, onsets=onsets), boundary]
    tape = np.concatenate(pieces)
    windows = {tape[i:i + 34].tobytes() for i in range(len(tape) - 33)}
    seen = [w.numpy().tobytes() for _ in range(60) for w in ds.batch('train', 50, 33, 0, np.random.default_rng(_))[0]]
    assert set(seen) <= windows and len(set(seen)) > .6 * len(windows)
    whole, _ = ds.batch('train', 1, len(tape) - 1, 0, np.random.default_rng(0))
    assert whole.dtype == torch.uint8 and (whole[0].numpy() == tape).all()
    assert ds.frames('train') == len(tape) - 13 and ds.beats('train') == ds.frames('train') / 4
    with pytest.raises(data.UserError, match='--block_size'):
        ds.batch('train', 1, len(tape), 0, np.random.default_rng(0))
    # with 40 frames of history, and the place in its tune of the frame before the window
    starts, before = np.flatnonzero(tape[:, -1]), np.concatenate((np.zeros((40, ds.V), dtype=np.uint8), tape))
    places = {(before[i:i + 74].tobytes(), i - 1 - max(starts[starts < i], default=0)) for i in range(len(tape) - 33)}
    seen = [(w.numpy().tobytes(), int(n)) for _ in range(60) for w, n in zip(*ds.batch('train', 50, 33, 0, np.random.default_rng(_), 40))]
    assert set(seen) <= places and len(set(seen)) > .6 * len(places)


def test_batch_transposition_never_leaves_the_keyboard():
    low, high = [data.Song('', np.array([[k, i, i + 1.5] for i, k in enumerate(keys)], dtype=float)) for keys in
                 ([0, 5, 9] * 8, [87, 80, 84] * 8)]
    ds = data.Dataset({s: [low, high] for s in data.SPLITS}, '')
    tape = ds.batch('train', 1, 198, 0, np.random.default_rng(0))[0][0]
    tape = torch.cat([tape[:, :88] | tape[:, 88:176], tape[:, -1:]], 1)
    moved = {}
    for at in range(len(tape) - 60):
        part, boundary = tape[at:at + 61, :88], tape[at:at + 61, 88:]
        keys = part.any(0).nonzero()
        for shift in range(max(-6, -int(keys.min())), min(6, 87 - int(keys.max())) + 1):
            moved[torch.cat([part.roll(shift, 1), boundary], 1).numpy().tobytes()] = shift
    shifts = []
    for seed in range(200):
        batch, again = [ds.batch('train', 4, 60, 6, np.random.default_rng(seed))[0] for _ in range(2)]
        assert torch.equal(batch, again)  # a seed is a seed
        for w in batch:  # no note has been lost, or has come in on the other side
            shifts.append(moved[torch.cat([w[:, :88] | w[:, 88:176], w[:, -1:]], 1).numpy().tobytes()])
    assert set(shifts) == set(range(-6, 7))


def test_whole_songs_once_each_padded_on_the_right():
    ds = _dataset()
    todo = {data.to_frames(s.notes).tobytes() for s in ds.songs['train']}
    for frames, lengths in ds.whole_songs('train', 5):
        assert frames.dtype == torch.uint8 and lengths.dtype == torch.int64 and frames.shape[1] == lengths.max() + 1
        for f, n in zip(frames.numpy(), lengths):
            assert f[0, -1] == 1 and f[0].sum() == 1 and not f[1 + n:].any() and not f[1:, -1].any()
            todo.remove(f[1:1 + n].tobytes())
    assert not todo


# ------------------------------------------------------------------------------------------------------ data: load

def _folder(path, names, note=60):
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        _midi(path / name, [_on(note + i % 40), _off(note + i % 40, 480 * (1 + i))])
    return path


def _zip(path, files):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, blob in files.items():
            z.writestr(name, blob)
    return path


def _names(ds):
    return {split: sorted(s.name for s in songs) for split, songs in ds.songs.items()}


def test_load_splits_by_folder(tmp_path):
    names = ['x/Train/a.mid', 'x/train/b.MID', 'x/VALIDATION/c.midi', 'x/Test/sub/d.mid', 'e.mid']
    ds = data.load(_folder(tmp_path / 'music', names))
    assert _names(ds) == dict(train=sorted([names[0], names[1], names[4]]), valid=[names[2]], test=[names[3]])
    assert '(5 songs)' in ds.source and str(tmp_path / 'music') in ds.source
    ds = data.load(_folder(tmp_path / 'two', [f'train/{i}.mid' for i in range(30)] + ['test/a.mid']))
    assert [len(ds.songs[s]) for s in data.SPLITS] == [27, 3, 1]  # no valid folder: a tenth of train


def test_load_splits_by_a_stable_rule(tmp_path):
    names = [f'{i}.mid' for i in range(100)]
    one = _names(data.load(_folder(tmp_path / 'one', names)))
    assert sorted(sum(one.values(), [])) == sorted(names) and 65 <= len(one['train']) <= 95
    two = _names(data.load(_folder(tmp_path / 'two', ['more.mid', *names[::-1]])))  # another order, and one more song
    assert all(set(one[s]) <= set(two[s]) for s in data.SPLITS)
    packed = {f'top/{n}': (tmp_path / 'one' / n).read_bytes() for n in names}
    three = _names(data.load(_zip(tmp_path / 'a.zip', packed)))  # the same music packed
    assert {s: sorted(f'top/{n}' for n in one[s]) for s in one} == three
    for n in (3, 4, 10):
        ds = data.load(_folder(tmp_path / f'few{n}', names[:n]))
        assert all(ds.songs.values()) and sum(map(len, ds.songs.values())) == n


def test_load_one_file_and_options(tmp_path, capsys):
    notes = np.array([[40, 0, 1], [44, 1, 2]], dtype=float)
    data.write_midi(notes, tmp_path / 'a.mid')
    lines = []
    ds = data.load(str(tmp_path / 'a.mid'), log=lines.append)
    assert _names(ds) == {s: ['a.mid'] for s in data.SPLITS} and 'same' in lines[0] and len(lines) == 1
    (tmp_path / 'b.abc').write_text('X:1\nT:One\nL:1/4\nK:G\nG\n\nX:2\nT:Two\nL:1/4\nK:F\nF\n\nX:3\nT:Three\nL:1/4\nK:Dm\nC,,,,D\n')
    ds = data.load(tmp_path / 'b.abc', steps_per_beat=2, onsets=False, common_key=True, log=lines.append)
    assert sorted(s.name for songs in ds.songs.values() for s in songs) == ['One', 'Three', 'Two'] and 'piano' in lines[1]
    assert {s.name: _rows(s.notes)[0][0] for songs in ds.songs.values() for s in songs} == dict(One=72, Two=60, Three=57)
    assert (ds.steps_per_beat, ds.onsets, ds.common_key, ds.V) == (2, False, True, 89)
    assert sum(ds.frames(s) for s in data.SPLITS) == 2 + 2 + 4 and capsys.readouterr().err == ''


def test_load_skips_and_names_what_is_corrupt(tmp_path, capsys):
    path = _folder(tmp_path / 'a', ['1.mid', '2.mid', '3.mid', '.hidden.mid', '__MACOSX/x.mid'])
    (path / 'bad.mid').write_bytes(b'MThd')
    (path / 'bad.abc').write_text('nothing')
    _midi(path / 'silent.mid', [_on(60, channel=9), _off(60, 9, channel=9)])
    _midi(path / 'forged.mid', [_on(60), _off(60, 2 ** 28 - 1)])
    (path / 'readme.txt').write_text('not music')
    ds = data.load(path)
    err = capsys.readouterr().err
    assert sum(map(len, ds.songs.values())) == 3 and err.count('\n') == 4
    assert all(name in err for name in ('bad.mid', 'bad.abc', 'silent.mid', 'forged.mid'))
    for i in range(7):
        (path / f'bad{i}.mid').write_bytes(b'')
    data.load(path)
    assert capsys.readouterr().err.count('\n') == 6  # five by name, and how many more


def test_load_errors(tmp_path):
    good = _midi(tmp_path / 'good.mid', [_on(60), _off(60, 480)]).read_bytes()
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none' / 'a.txt').write_text('')
    (tmp_path / 'corrupt').mkdir()
    (tmp_path / 'corrupt' / 'a.mid').write_bytes(good[:20])
    for name, blob in {'cut.mid': good[:-9], 'zero.mid': b'', 'zero.abc': b'', 'zero.zip': b'', 'a.txt': good, 'voices.abc': b'X:1\nK:C\nV:1\nC'}.items():
        (tmp_path / name).write_bytes(blob)
    _midi(tmp_path / 'forged.mid', [_on(60), _off(60, 480 * 25_000)])
    _zip(tmp_path / 'none.zip', {'a.txt': b''})
    (tmp_path / 'cut.zip').write_bytes(_zip(tmp_path / 'x.zip', {'a.mid': good}).read_bytes()[:-30])
    for name, says in {'missing': 'there is no', 'empty': 'empty', 'none': 'no music', 'corrupt': 'a.mid', 'cut.mid': 'not a whole', 'zero.mid': '',
                       'zero.abc': 'X:', 'zero.zip': 'not a whole zip', 'a.txt': 'no music', 'voices.abc': 'nothing in it', 'forged.mid': '100,000',
                       'none.zip': 'no music', 'cut.zip': 'not a whole zip'}.items():
        with pytest.raises(data.UserError, match=f'{re.escape(name)}.*: ') as e:
            data.load(tmp_path / name)
        assert says in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(data.UserError, match='there is no'):
        data.load('')


@pytest.mark.parametrize('name', ['../a.mid', 'x/../../a.mid', '/etc/a.mid', '..\\a.mid', 'C:\\a.mid', '\\a.mid', '../harmless.txt'])
def test_load_refuses_a_zip_that_climbs_out(tmp_path, name):
    good = _midi(tmp_path / 'good.mid', [_on(60), _off(60, 480)]).read_bytes()
    with pytest.raises(data.UserError, match='climbs out'):
        data.load(_zip(tmp_path / 'a.zip', {'good.mid': good, name: good}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.zip', 'good.mid']


def test_load_survives_zip_bombs(tmp_path, capsys, monkeypatch):
    good = _midi(tmp_path / 'good.mid', [_on(60), _off(60, 480)]).read_bytes()
    path = _zip(tmp_path / 'a.zip', {'good.mid': good, 'bomb.mid': bytes(20 << 20), 'huge.txt': bytes(20 << 20)})
    assert _names(data.load(path))['train'] == ['good.mid'] and 'bomb.mid is larger' in capsys.readouterr().err
    blob = bytearray(_zip(tmp_path / 'b.zip', {'good.mid': good, 'other.mid': good}).read_bytes())
    blob[30 + len('good.mid') + 5] ^= 255  # the packed bytes of the first member
    path.write_bytes(blob)
    assert _names(data.load(path))['train'] == ['other.mid'] and 'good.mid' in capsys.readouterr().err
    monkeypatch.setattr(data, 'MAX_ARCHIVE', 1 << 20)
    with pytest.raises(data.UserError, match='a.zip unpacks to more'):
        data.load(_zip(path, {f'{i}.mid': bytes(1 << 19) for i in range(3)}))


# ---------------------------------------------------------------------------------------------- data: many files

@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of 20 files that count as many, a folder for the cache, and no processes but this one."""
    def no_room(*args):
        raise OSError('no room')
    for name, value in dict(CACHE=tmp_path / 'cache', MANY=20, ProcessPoolExecutor=no_room).items():
        monkeypatch.setattr(data, name, value)
    return _folder(tmp_path / 'music', [f'{i % 3}/{i}.mid' for i in range(20)])


def _same(one, two):
    return _names(one) == _names(two) and one.source == two.source and all(
        a.notes.tolist() == b.notes.tolist() and a[2:] == b[2:] for s in data.SPLITS for a, b in zip(one.songs[s], two.songs[s]))


@pytest.mark.parametrize('zipped', [False, True])
def test_many_files_are_read_by_other_processes(many, tmp_path, monkeypatch, capsys, zipped):
    (many / 'bad.mid').write_bytes(b'MThd')
    path = _zip(tmp_path / 'a.zip', {str(p.relative_to(many)): p.read_bytes() for p in many.rglob('*.mid')}) if zipped else many
    here, lines = data.load(path), []
    monkeypatch.undo()
    monkeypatch.setattr(data, 'MANY', 20)
    monkeypatch.setattr(data, 'CACHE', tmp_path / 'other')
    there = data.load(path, log=lines.append)
    assert _same(here, there) and 'kept in' in lines[-1] and all(line.startswith('read ') for line in lines[:-1])
    assert len({id(song.notes.base) for songs in there.songs.values() for song in songs}) == 1  # views into one array
    assert capsys.readouterr().err.count('bad.mid') == 2


def test_many_files_are_read_again_only_after_a_change(many, monkeypatch, capsys):
    lines, read, read_file = [], [], data._read_file
    monkeypatch.setattr(data, '_read_file', lambda file: read.append(file) or read_file(file))

    def load(**options):
        del lines[:], read[:]
        return data.load(many, log=lines.append, **options)

    first = load()
    assert len(read) == 20 and [line for line in lines if line.startswith('read ')] == [f'read {n} of 20 files' for n in range(2, 21, 2)]
    for options in ({}, dict(steps_per_beat=2), dict(common_key=True)):
        assert _names(load(**options)) == _names(first) and not read and not lines
    assert _same(load(), first) and not read
    path = many / '0' / '0.mid'
    changes = [lambda: _midi(path, [_on(70), _off(70, 1000), _on(71), _off(71, 9)]), lambda: os.utime(path, ns=(0, 0)),
               lambda: _midi(many / 'new.mid', [_on(60), _off(60, 9)]), lambda: (many / 'new.mid').rename(many / 'newer.mid'),
               lambda: (many / 'newer.mid').unlink(), lambda: monkeypatch.setattr(data, '__file__', __file__)]
    for change in changes:
        change()
        load()
        assert len(read) in (20, 21)
        load()
        assert not read
    assert len(list(data.CACHE.iterdir())) == 1
    capsys.readouterr()
    monkeypatch.setattr(data, 'CACHE', path / 'cache')  # no place to write
    assert _names(load()) == _names(first) and len(read) == 20 and 'again' in lines[-1] and not capsys.readouterr().err


def test_many_files_a_damaged_cache_is_read_over(many):
    first = data.load(many)
    cache = next(data.CACHE.iterdir())
    good = cache.read_bytes()
    pickled = io.BytesIO()
    np.savez(pickled, table=np.array([{}], dtype=object), notes=np.zeros((1, 3)))
    for bad in (b'', b'nothing', good[:-1], good[:100], good[:200] + b'?' + good[201:], pickled.getvalue(), bytes(len(good))):
        cache.write_bytes(bad)
        assert _same(data.load(many), first)
        with np.load(cache, allow_pickle=False) as kept:
            assert len(kept['notes']) == 20


def test_many_files_two_processes_at_once(many, tmp_path):
    code = (f'import sys; sys.path.insert(0, {str(HERE)!r}); import data\ndef no_room(*a): raise OSError\n'
            f'data.MANY, data.CACHE, data.ProcessPoolExecutor = 20, data.Path({str(data.CACHE)!r}), no_room\n'
            f'for i in range(30):\n'
            f'    for p in data.CACHE.glob("*.npz") if i % 3 == 0 else (): p.unlink(missing_ok=True)\n'
            f'    assert sum(map(len, data.load({str(many)!r}, log=str).songs.values())) == 20, i\n')
    both = [subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=300) == (None, '') and process.returncode == 0
    assert [p.suffix for p in data.CACHE.iterdir()] == ['.npz']


def test_odd_names(tmp_path, capfd):
    path = _folder(tmp_path / 'a', ['1.mid', '2.mid', os.fsdecode(b'\xe9t\xe9.mid')])
    (path / 'red\x1b[31m\n.mid').write_bytes(b'')
    assert sum(map(len, data.load(path).songs.values())) == 3
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and '\x1b' not in err and 'red?[31m?.mid' in err


# ------------------------------------------------------------------------------------------------- hostile files
# `python test_model.py 20000` reads 20,000 mutated files, and prints how it went as JSON; the test reads a few.

LIMITS = dict(seconds=2, megabytes=500)  # for each file, beyond what an idle process takes


def _mutate(rng, blob, others):
    """A copy of bytes with one to three things wrong: bits, the end, a piece of another file, a number, a piece repeated."""
    blob = bytearray(blob)
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(len(blob) + 1), rng.choice([1, 2, 4, 8])
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
                number = rng.choice([0, 1, 127, 128, 255, 2 ** 15 - 1, 2 ** 24 - 1, 2 ** 28 - 1, 2 ** 31, 2 ** 64 - 1, len(blob)])
                blob[at:at + size] = (number % 256 ** size).to_bytes(size, rng.choice(['big', 'little']))
            case 4:
                piece = blob[at:at + rng.randint(1, 200)]
                blob[at:at] = piece * min(int(2 ** rng.uniform(0, 14)), (1 << 16) // max(1, len(piece)))
    return bytes(blob[:1 << 18])


def _mutate_member(rng, blob, others):
    """A sound zip in which one member is mutated, so that its checksum does not give it away."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(blob)) as old, zipfile.ZipFile(buffer, 'w') as new:
        chosen = rng.choice(old.namelist())
        for m in old.infolist():
            new.writestr(m, _mutate(rng, old.read(m), others) if m.filename == chosen else old.read(m))
    return buffer.getvalue()


def _sound_files(folder):
    """{kind: [bytes]}: files of each kind as they should be."""
    tunes = data.TUNES.read_text(encoding='utf-8').split('\n\nX:')[1:]
    abc = ['\n\nX:'.join(['', *tunes[i:i + 4]]).encode() for i in range(0, 40, 4)]
    meta = [mido.MetaMessage('key_signature', key='F#m'), mido.MetaMessage('set_tempo', tempo=400_000, time=9),
            mido.MetaMessage('track_name', name='x' * 40), mido.Message('sysex', data=range(100)),
            mido.Message('pitchwheel', pitch=9, channel=3), mido.MetaMessage('time_signature', numerator=6)]
    midi = [_midi(folder / 'a.mid', meta + [_on(60), _off(60, 480)], [_on(n, 5) for n in range(128)]).read_bytes()]
    for i, song in enumerate(data.read_abc(io.BytesIO(b'\n\n'.join(abc)))[:9]):
        data.write_midi(song.notes, folder / 'a.mid')
        midi.append((folder / 'a.mid').read_bytes())
    packed = [_zip(folder / 'a.zip', {f'train/{i}.mid': midi[i], 'valid/x/b.abc': abc[i], 'c.txt': b'?'}).read_bytes() for i in range(4)]
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(folder / 'a.zip', 'w', method) as z:
            z.writestr('a.mid', midi[0])
            z.writestr('b.abc', abc[0])
        packed.append((folder / 'a.zip').read_bytes())
    checkpoints = []
    for arch, head in (('rwkv', 'chord'), ('lstm', 'bernoulli')):
        config = Config(9, arch, head, n_layer=1, n_embd=8, lookback=2)
        meta = dict(data='a', source='b', steps_per_beat=4, onsets=True, common_key=False, tempo=120.0)
        torch.save(dict(version=VERSION, config=asdict(config), meta=meta, step=1, valid=1.0, model=Model(config).state_dict()), folder / 'a.pt')
        checkpoints.append((folder / 'a.pt').read_bytes())
    return dict(mid=midi, abc=abc, zip=packed, pt=checkpoints)


def _worst_files():
    """(kind, bytes): made by hand, to cost as much as they can."""
    size, head = data.MAX_MIDI - 30, b'MThd\0\0\0\6\0\0\0\1\1\xe0MTrk'
    for event, again in ((b'\0\xc0\5', b'\0\5'), (b'\0\x90\x3c\x40', b'\1\x3c\x40'), (b'', b'\0\xff\1\0'), (b'', b'\0\xf0\1\xf7'),
                         (b'', b'\0\xff\x7f\0'), (b'', b'\xff' * 500 + b'\0\xc0\0'), (b'', b'\0\xff\x7f\xff\xff\xff\x7f')):
        body = event + again * ((size - len(event)) // len(again))
        yield 'mid', head + len(body).to_bytes(4, 'big') + body
    yield 'mid', head[:10] + b'\x7f\xff' + head[12:14] + b'MTrk\0\0\0\0' * (size // 8)
    lengths = ''.join(f'C{n}/{999 - n}' for n in range(1, 999))
    for tune in ('C' + '>' * 19_000, '[1' * 9_000, ':' * 9_000 + '|', 'C' + ':' * 9_000 + '|' + 'C' * 9_000, '[' + 'C' * 9_000 + ']:::::::|',
                 lengths, '"C"C' * 4_900, '"C"[C-E]-' * 2_000, '|:' * 9_000, 'C:|' * 6_000, '(9:9:9' * 3_000, 'C' + "'" * 19_000, '"(' * 9_000,
                 '{' * 19_000, '[L:1/997]C[L:1/991]C' * 900, '|:C[99C:|' * 2000, '![' * 9_000, '"' * 19_999, "\n " * 9_000, '=' * 19_000, 'A:|\n' * 4_000):
        yield 'abc', f'X:1\nK:C\n{tune}\n'.encode()
    yield 'abc', b'M:4/4\n' * 20_000 + b'X:1\n' * 20_000
    yield 'abc', b'M:4/4\nL:1/8\n\n' + b'X:1\nK:C\nC\n\n' * 200 + b'\n' * (1 << 20) + b'T:' + b' ' * (1 << 20) + b'%' * (1 << 20)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w', method) as z:
            z.writestr('a.mid', bytes(64 << 20))
            for i in range(9_000):
                z.writestr(f'{i}.mid', b'')
        yield 'zip', buffer.getvalue()


def survive(count, folder):
    """Reads mutated files, as many as asked for in all, under LIMITS; returns what became of them."""
    rng, wrote, result = random.Random(count), [], {}
    sound, mine = _sound_files(folder), [False]
    many, cache = _folder(folder / 'many', ['0.mid', '1.mid', '2.mid']), folder / 'cache'

    def watch(event, args):  # Python itself tells of every file opened, changed or removed
        writes = event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if mine[0] and (writes or event in ('os.remove', 'os.rename', 'os.mkdir', 'os.rmdir', 'os.link', 'os.symlink', 'shutil.rmtree',
                                            'os.system', 'os.exec', 'os.posix_spawn', 'subprocess.Popen', 'socket.connect')):
            wrote.append((event, *args))

    def read(kind, path):
        if kind == 'pt':
            try:
                return bool(load_checkpoint(path)[0])
            except CheckpointError as e:
                error = e
        else:
            try:
                songs = [song for songs in data.load(many if kind == 'npz' else path, log=str).songs.values() for song in songs]
                for song in songs:
                    key, on, end = song.notes.T
                    assert len(key) and 0 <= key.min() and key.max() < 88 and 0 <= on.min() and (on <= end).all() and np.isfinite(end).all()
                assert kind != 'npz' or sorted(song.name for song in songs) == ['0.mid', '1.mid', '2.mid']
                return True
            except data.UserError as e:
                error = e
        assert kind != 'npz' and str(path) in str(error) and '\n' not in str(error), str(error)
        return False

    def check(kind, blob, what):
        path.write_bytes(blob)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        mine[0] = kind != 'npz'
        try:
            with contextlib.redirect_stderr(io.StringIO()) as told:
                good = read(kind, path)
        except BaseException:
            (folder / f'failed.{kind}').write_bytes(blob)
            print(f'{kind} {what}: see {folder}/failed.{kind}', file=sys.stderr)
            raise
        mine[0] = False
        seconds, grown = time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        row = result.setdefault(kind, dict(files=0, read=0, seconds=0.0, slowest=0.0, megabytes=0.0))
        row.update(files=row['files'] + 1, read=row['read'] + good, seconds=row['seconds'] + seconds, slowest=max(row['slowest'], seconds),
                   megabytes=row['megabytes'] + grown)
        if seconds > LIMITS['seconds'] or row['megabytes'] > LIMITS['megabytes'] or wrote or len(told.getvalue()) > 10_000:
            (folder / f'failed.{kind}').write_bytes(blob)
            raise AssertionError(f'{kind} {what}: {seconds:.1f} s, {row["megabytes"]:.0f} MB, {wrote}, {len(told.getvalue())} characters, see {folder}')

    def no_room(*args):
        raise OSError('no room')
    data.ProcessPoolExecutor, data.CACHE, data.MANY = no_room, cache, 10 ** 6
    sys.addaudithook(watch)
    path = folder / 'x.pt'  # torch loads some of itself when it is first used
    check('pt', sound['pt'][0], 'sound')
    for i, (kind, blob) in enumerate(_worst_files()):
        path = folder / f'x.{kind}'
        check(kind, blob, f'made by hand, {i}')
    data.MANY = 3
    data.load(many, log=str)
    sound['npz'] = [next(cache.iterdir()).read_bytes()]
    kinds = [(kind, change) for kind in sound for change in ((_mutate, _mutate_member) if kind in ('zip', 'pt') else (_mutate,))]
    for i in range(count):
        kind, change = kinds[i % len(kinds)]
        path = next(cache.iterdir()) if kind == 'npz' else folder / f'x.{kind}'
        data.MANY = 3 if kind == 'npz' else 10 ** 6
        check(kind, change(rng, rng.choice(sound[kind]), sound[kind]), i)
    return result


def test_hostile_files(tmp_path):
    done = subprocess.run([sys.executable, '-B', __file__, '1000', tmp_path], text=True, capture_output=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert sorted(result) == ['abc', 'mid', 'npz', 'pt', 'zip'] and all(0 < row['read'] <= row['files'] for row in result.values())


# ------------------------------------------------------------------------------------- data: Nottingham and download

@pytest.fixture
def nottingham(tmp_path, monkeypatch):
    """A small archive in the place of Nottingham, a folder to keep it in, and a way to serve it on 127.0.0.1."""
    names = [f'{s}/{i}.mid' for s in data.SPLITS for i in range(4)]
    files = {n: (_folder(tmp_path / 'src', [n], 50 + i) / n).read_bytes() for i, n in enumerate(names)}
    archive = _zip(tmp_path / 'public.zip', {f'repo-1/notebooks/Nottingham/{n}': b for n, b in files.items()} |
                   {'repo-1/notebooks/Other/train/0.mid': b'other', 'repo-1/README': b''}).read_bytes()
    home = tmp_path / 'home'
    home.mkdir()
    (home / 'tunes.abc').write_text(''.join(f'X:{i}\nT:Tune {i}\nK:C\nCDEF\n\n' for i in range(9)))
    digest = hashlib.sha256(b''.join(n.encode() + b'\0' + files[n] for n in sorted(files))).hexdigest()
    monkeypatch.setenv('no_proxy', '*')
    for name, value in dict(NOTTINGHAM=home / 'nottingham.zip', TUNES=home / 'tunes.abc', NOTTINGHAM_DIGEST=digest, TIMEOUT=1).items():
        monkeypatch.setattr(data, name, value)
    stop = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            bodies = dict(good=archive, truncated=archive[:len(archive) // 2], page=b'<html>', slow=archive,
                          wrong=_zip(tmp_path / 'w.zip', {f'Nottingham/{n}': b + b'!' for n, b in files.items()}).read_bytes())
            kind = self.path[1:]
            if kind not in bodies:
                return self.send_error(404)
            self.send_response(200)
            self.send_header('Content-Length', str(len(archive if kind == 'truncated' else bodies[kind])))
            self.end_headers()
            drip = 25 * (kind == 'slow')  # 5 s in which no timeout of a socket would strike
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
    urls = dict(refused=f'http://127.0.0.1:{closed}/good')

    def serve(*kinds):
        monkeypatch.setattr(data, 'NOTTINGHAM_URLS',
                            tuple(urls.get(k, f'http://127.0.0.1:{server.server_address[1]}/{k}') for k in kinds))
        return home, files
    yield serve
    stop.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('kinds', [('good',), ('wrong', 'good'), ('truncated', 'good'), ('refused', 'good'), ('slow', 'good'), ('404', 'good')])
def test_download_good(nottingham, kinds):
    home, files = nottingham(*kinds)
    lines = []
    ds = data.load(log=lines.append)
    assert _names(ds) == {s: sorted(n for n in files if n.startswith(s)) for s in data.SPLITS}
    assert ds.source.startswith('Nottingham') and '12 songs' in ds.source and len(lines) == len(kinds) + (len(kinds) > 1)
    with zipfile.ZipFile(home / 'nottingham.zip') as z:
        assert {n.partition('/')[2]: z.read(n) for n in z.namelist()} == files
    nottingham('refused')  # the second time there is no need for a network
    lines.clear()
    assert _names(data.load(log=lines.append)) == _names(ds) and lines == []


@pytest.mark.parametrize('kind', ['wrong', 'truncated', 'refused', 'slow', '404', 'page'])
def test_download_bad_falls_back_to_the_tune_book(nottingham, kind):
    home, _ = nottingham(kind)
    lines = []
    ds = data.load(log=lines.append)
    assert 'tunes.abc' in ds.source and '(9 songs)' in ds.source and sum('tunes.abc' in line for line in lines) == 1
    assert [p.name for p in home.iterdir()] == ['tunes.abc']


def test_download_replaces_a_wrong_local_archive(nottingham):
    home, files = nottingham('good')
    _zip(home / 'nottingham.zip', {'Nottingham/train/0.mid': files['train/0.mid']})
    lines = []
    assert '12 songs' in data.load(log=lines.append).source
    assert '12 songs' in data.load().source
    (home / 'nottingham.zip').unlink()
    (home / 'tunes.abc').unlink()
    nottingham('refused')
    with pytest.raises(data.UserError, match='tunes.abc'):
        data.load(log=lines.append)


def test_download_without_a_place_to_keep_it(nottingham, monkeypatch):
    home, _ = nottingham('good')
    monkeypatch.setattr(data, 'NOTTINGHAM', home / 'missing' / 'nottingham.zip')
    lines = []
    assert '12 songs' in data.load(log=lines.append).source and 'has to download' in lines[-1]


def test_nottingham_digest_is_the_published_one():
    assert data.NOTTINGHAM_DIGEST == 'a107e20c1b880d97cb1d7c324cb185400313e6f3ffbf20e4b5d56bd3e604ea7e'
    if data.NOTTINGHAM.exists():  # and the local archive, where there is one, has it
        assert len(data._nottingham_files(data.NOTTINGHAM.read_bytes())) == 1037


# --- wkv.py and wkv_cuda.cu



WKV_DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(params=WKV_DEVICES)
def wkv_device(request):
    """A device with its kernel."""
    kernel, why = wkv.find_kernel(request.param)
    if not kernel:
        pytest.skip(why)
    return request.param


def wkv_inputs(B, T, C, scale=1, w=None, dtype=torch.float32, device="cpu", seed=0):
    """w, u, k, v and the gradient of y; the w of the channels run from 1e-4 to 50."""
    make = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-4, math.log10(50), C)[torch.randperm(C, generator=make)]
    w = spread if w is None else torch.full((C,), w)
    k, v, g = torch.randn(3, B, T, C, generator=make) * torch.tensor([scale, scale, 1]).view(3, 1, 1, 1)
    return [x.to(device) for x in (w, torch.randn(C, generator=make), k.to(dtype), v.to(dtype), g.to(dtype))]


def wkv_random_state(B, C, device="cpu"):
    make = torch.Generator().manual_seed(1)
    a, b, p = torch.randn(3, B, C, generator=make)
    return torch.stack((a, 1 + b.abs(), 5 * p), 1).to(device)


def wkv_sum(w, u, k, v, g, state=None, size=False):
    """y and the gradients of sum(g y) by w, u, k, v, as sums written from the formula: with P[s, t] the weight of
    frame t in y_s, the gradient of its exponent is g_s P[s, t] sum_j P[s, j] (v_t - v_j).
    size: the same sums of absolute values."""
    w, u, k, v, g = (x.detach().cpu().double() for x in (w, u, k, v, g))
    if state is not None:  # as one more frame before the first
        a, b, p = state.cpu().double().unbind(1)
        k, v = torch.cat(((p + b.log())[:, None], k), 1), torch.cat(((a / b)[:, None], v), 1)
    T, before = k.shape[1], k.shape[1] - g.shape[1]
    age = (torch.arange(before, T)[:, None] - 1 - torch.arange(T))[None, :, :, None]  # of t at s: (1, S, T, 1)
    exponent = torch.where(age < 0, (k + u)[:, None], k[:, None] - age * w)  # (B, S, T, C)
    P = torch.softmax(exponent.masked_fill(age < -1, -torch.inf), 2)
    near, values, g = (v[:, :, None] - v[:, None]), v, g[:, :, None]
    if size:
        near, values, g = near.abs(), values.abs(), g.abs()
    d = g * P * torch.einsum("bsjc,btjc->bstc", P, near)
    dw = (d * age.clamp_min(0)).sum((0, 1, 2))
    return ((P * values[:, None]).sum(2), dw if size else -dw, (d * (age == -1)).sum((0, 1, 2)),
            d.sum(1)[:, before:], (P * g).sum(1)[:, before:])


def wkv_run(w, u, k, v, g, state=None, backend=None):
    """y, the gradients of w, u, k, v, and the state."""
    leaves = [x.detach().clone().requires_grad_() for x in (w, u, k, v)]
    y, state = wkv.wkv(*leaves, state, backend)
    assert not state.requires_grad
    gradients = torch.autograd.grad(y, leaves, g, allow_unused=True)  # at T = 1 plain PyTorch does not use w
    return [y.detach(), *(torch.zeros_like(x) if d is None else d for x, d in zip(leaves, gradients)), state]


def wkv_error(x, want):
    """|x - want| / |want|; less than 1e-30 counts as the zero it is in float32."""
    assert torch.isfinite(x).all()
    want = want.cpu().double()
    return ((x.cpu().double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def wkv_check(got, want, forward=1e-5, gradient=1e-4):
    errors = [wkv_error(x, y) for x, y in zip(got, want)]
    assert errors[0] <= forward and max(errors[1:]) <= gradient, errors


@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33])
def test_wkv_kernel_is_the_sum(wkv_device, T, scale):
    cases = [(C, w) for C in (1, 7, 64) for w in (None, 1e-4, 1.0, 50.0)]
    for seed, (C, w) in enumerate(cases):
        inputs = wkv_inputs(2, T, C, scale, w, device=wkv_device, seed=seed)
        for state in (None, wkv_random_state(2, C, wkv_device)):
            got, want = wkv_run(*inputs, state, wkv_device)[:5], wkv_sum(*inputs, state)
            wkv_check(got, want)
            sizes, bounds = wkv_sum(*inputs, state, size=True), (1e-5, 1e-4, 1e-4, 1e-2, 1e-4)
            for x, y, size, bound in zip(got, want, sizes, bounds):  # each number, by the size of its terms
                assert ((x.cpu() - y).abs() <= bound * size + 1e-30).all()


@pytest.mark.parametrize("T, C, scale",
                         [(1000, 512, 1), (1000, 64, 30), (4096, 1, 30), (4096, 7, 1), (4096, 64, 30)])
def test_wkv_kernel_over_long_times(wkv_device, T, C, scale):
    inputs = wkv_inputs(1, T, C, scale, device=wkv_device)
    wkv_check(wkv_run(*inputs, None, wkv_device)[:5], wkv_run(*(x.double() for x in inputs), None, "torch")[:5])


@pytest.mark.parametrize("T, scale", [(1, 1), (2, 1), (33, 1), (33, 4)])
def test_wkv_torch_is_the_sum(T, scale):
    inputs = wkv_inputs(2, T, 7, scale)
    for state in (None, wkv_random_state(2, 7)):
        want = wkv_sum(*inputs, state)
        wkv_check(wkv_run(*inputs, state, "torch")[:5], want)
        wkv_check(wkv_run(*(x.double() for x in inputs), state, "torch")[:5], want, 1e-12, 1e-10)


def test_wkv_torch_gradcheck():
    w, u, k, v, _ = (x.double().requires_grad_() for x in wkv_inputs(2, 5, 3))
    assert torch.autograd.gradcheck(lambda *x: wkv.wkv(*x, backend="torch")[0], (w, u, k, v))


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 16, 64])
def test_wkv_parts_of_time_give_the_same(wkv_device, parts):
    w, u, k, v, g = wkv_inputs(2, 333, 33, 10, device=wkv_device)
    state = wkv_random_state(2, 33, wkv_device)
    want = wkv.launch_forward(w, u, k, v, state, 1)
    got = wkv.launch_forward(w, u, k, v, state, parts)
    chunks = -(-333 // wkv.CHUNK[wkv_device])
    assert got[2].shape == (2, chunks, 3, 33)  # nothing of size (B, T, C) is kept
    assert wkv_error(got[0], want[0]) < 1e-6 and wkv_error(got[1][:, 2], want[1][:, 2]) < 1e-6
    want = wkv.launch_backward(w, u, k, v, want[2], g, 1)
    for x, y in zip(wkv.launch_backward(w, u, k, v, got[2], g, parts), want):
        assert wkv_error(x, y) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "kernel"])
def test_wkv_state_continues_a_tune(wkv_device, backend):
    backend = wkv_device if backend == "kernel" else backend
    w, u, k, v, _ = wkv_inputs(3, 100, 20, 5, device=wkv_device)
    want, last = wkv.wkv(w, u, k, v, backend=backend)
    for cuts in ([1] * 100, [7, 32, 33, 28], [99, 1]):
        state, y = None, []
        for k_piece, v_piece in zip(k.split(cuts, 1), v.split(cuts, 1)):
            with torch.no_grad():
                out, state = wkv.wkv(w, u, k_piece, v_piece, state, backend)
            y.append(out)
        assert wkv_error(torch.cat(y, 1), want) < 1e-5
        means, log_sums = state[:, 0] / state[:, 1], state[:, 1].log() + state[:, 2]
        assert wkv_error(means, last[:, 0] / last[:, 1]) < 1e-5
        assert (log_sums - last[:, 1].log() - last[:, 2]).abs().max() < 1e-3
    _, state = wkv.wkv(w, u, k[:, :50], v[:, :50], backend=backend)  # the back ends read each other's state
    assert wkv_error(wkv.wkv(w, u, k[:, 50:], v[:, 50:], state, "torch")[0], want[:, 50:]) < 1e-5


def test_wkv_very_long_tune(wkv_device):
    w, u, k, v, _ = wkv_inputs(1, 200_000, 16, 3, device=wkv_device)
    want, last = wkv.wkv(w, u, k, v)
    state, y = None, []
    for k_piece, v_piece in zip(k.split(1000, 1), v.split(1000, 1)):
        out, state = wkv.wkv(w, u, k_piece, v_piece, state)
        y.append(out)
    assert wkv_error(torch.cat(y, 1), want) < 1e-6 and wkv_error(state[:, 0], last[:, 0]) < 1e-4


def test_wkv_bfloat16(wkv_device):
    inputs = wkv_inputs(2, 70, 19, dtype=torch.bfloat16, device=wkv_device)
    got, want = wkv_run(*inputs, None, wkv_device), wkv_sum(*inputs)
    half, full = torch.bfloat16, torch.float32
    assert [x.dtype for x in got] == [half, full, full, half, half, full]
    wkv_check(got[:5], want, 3e-3, 3e-3)  # half a unit of bfloat16's last place is 2e-3
    assert wkv_error(got[1], want[1]) < 1e-4 and wkv_error(got[2], want[2]) < 1e-4  # sums stay in float32
    exact = wkv_run(*(x.float() for x in inputs), None, wkv_device)
    assert (got[0] == exact[0].bfloat16()).float().mean() > 0.99  # rounded once, to the nearest


def test_wkv_strides_and_nan(wkv_device):
    w, u, k, v, g = wkv_inputs(2, 40, 12, device=wkv_device)
    want = wkv_run(w, u, k, v, g)
    wide = torch.stack((k.transpose(1, 2), v.transpose(1, 2)), -1)  # (B, C, T, 2)
    k_strided, v_strided = wide.transpose(1, 2).unbind(-1)
    got = wkv_run(w.repeat_interleave(2)[::2], u, k_strided, v_strided, g.mT.contiguous().mT)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    k[1, 20, 3] = math.nan  # a diverged model has to show
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
    class Mix(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decay, self.first = torch.nn.Parameter(torch.randn(8)), torch.nn.Parameter(torch.randn(8))
            self.key, self.value = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            return wkv.wkv(self.decay.exp(), self.first, self.key(x), self.value(x))[0]

    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model, x = Mix().to(wkv_device), torch.randn(2, 40, 8, device=wkv_device)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), 0.03)
        losses[compiled] = []
        for _ in range(6):
            loss = (forward(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[compiled].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-4) and losses[True][-1] < losses[True][0]


@pytest.mark.parametrize("change, match", [
    (dict(backend="gpu"), "'gpu'"), (dict(backend="cuda"), "'cuda' cannot run on torch.float32 on cpu"),
    (dict(w=torch.ones(4)), r"w \(4,\)"), (dict(v=torch.ones(2, 4, 3)), r"v \(2, 4, 3\)"),
    (dict(state=torch.zeros(1, 3, 3)), r"state \(1, 3, 3\)"),
    (dict(k=torch.ones(2, 0, 3), v=torch.ones(2, 0, 3)), "none of them 0"),
    (dict(u=torch.ones(3, device="meta")), "on one device"),
    (dict(k=torch.ones(2, 5, 3).double(), backend="cpu"), "cannot run on torch.float64")])
def test_wkv_refuses(change, match):
    inputs = dict(zip("wukv", wkv_inputs(2, 5, 3)))
    with pytest.raises(ValueError, match=match):
        wkv.wkv(**{**inputs, **change})


def wkv_process(tmp_path, code, cache="cache", **environment):
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / cache), **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=Path(wkv.__file__).parent,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("missing", ["compiler", "cache"])
def test_wkv_falls_back_with_one_line(tmp_path, missing):
    (tmp_path / "file").touch()
    code = ("import torch, wkv; print('imported', flush=True); x = torch.ones(1, 3, 2)\n"
            "for _ in range(2): y, _ = wkv.wkv(x[0, 0], x[0, 0], x, x)\n"
            "print(y.sum().item(), wkv.find_kernel('cpu')[0])")
    change = dict(CXX="no-such-compiler") if missing == "compiler" else dict(cache="file")
    out, err = wkv_process(tmp_path, code, **change).communicate()
    assert out.split("\n")[:2] == ["imported", "6.0 None"], err
    said = [line for line in err.splitlines() if "WKV" in line]
    assert len(said) == 1 and re.match("WKV: plain PyTorch, as the CPU kernel cannot be built: .", said[0])


def test_wkv_two_processes_build_at_once(tmp_path, wkv_device):
    code = f"import wkv; print(wkv.describe({wkv_device!r}))"
    for process in [wkv_process(tmp_path, code) for _ in range(2)]:
        out, err = process.communicate()
        assert out.startswith(f"WKV: {wkv_device.upper()} kernel"), err
    assert [path.suffix for path in (tmp_path / "cache" / "wkv").iterdir()] == [".so"]


def test_wkv_benchmark_runs(tmp_path):
    run = subprocess.run([sys.executable, wkv.__file__, "--device=cpu", "--shapes", "1,20,8"],
                         text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert "WKV: " in run.stdout and "GB/s" in run.stdout and re.search(r"1,20,8 +plain: forward", run.stdout)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_wkv_nvcc_builds_without_warnings_or_spills(tmp_path, arch):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    source = Path(wkv.__file__).with_name("wkv_cuda.cu")
    run = subprocess.run(["nvcc", *wkv.FLAGS["cuda"], f"-DCHUNK={wkv.CHUNK['cuda']}", f"-arch={arch}", "-cubin",
                          "-Werror=all-warnings", "-Xptxas=-v,-warn-spills", source, "-o", tmp_path / "out"],
                         text=True, capture_output=True)
    report = run.stdout + run.stderr
    assert run.returncode == 0 and "warning" not in report, report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 4 and set(spills) == {("0", "0", "0")}, report  # two passes, two dtypes


@pytest.mark.skipif("cuda" not in WKV_DEVICES, reason="no GPU")
def test_wkv_runs_on_the_current_stream():
    inputs = wkv_inputs(4, 300, 100, device="cuda")
    want = wkv_run(*inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # were it on another stream, it would read k before it is there
        k = inputs[2] * 1
        got = wkv_run(*inputs[:2], k, *inputs[3:])
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, want))


# ------------------------------------------------------------------------------------------------------------
# model.py



def every_arch_and_head(test):
    test = pytest.mark.parametrize('head', ['chord', 'bernoulli'])(test)
    return pytest.mark.parametrize('arch', ['rwkv', 'lstm'])(test)


@torch.no_grad()
def randomise(module, std=0.5):
    """A fresh RWKV block is the identity: only random numbers everywhere show what it computes."""
    for p in module.parameters():
        p.normal_(0, std)
    return module


def random_model(arch='rwkv', head='chord', lookback=0, dtype=torch.float64, **sizes):
    torch.manual_seed(3)
    config = dict(n_units=7, arch=arch, head=head, n_layer=2, n_embd=8, lookback=lookback) | sizes
    return randomise(Model(Config(**config))).to(dtype).eval()


def random_frames(*shape):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.4).to(torch.uint8)


def arrays(module):
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


@every_arch_and_head
@pytest.mark.parametrize('lookback, beat', [(0, 0), (1, 0), (9, 0), (9, 4), (0, 1)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_model_in_pieces_equals_all_at_once(arch, head, lookback, beat, dtype):
    model, frames = random_model(arch, head, lookback, dtype, beat=beat), random_frames(2, 20, 7)
    frames[0, 3:15, -1], frames[0, 9:15] = 0, frames[0, 3:9].clone()    # a run of 6 frames, which the cuts below meet
    frames[0, 9:15, -1] = 0
    whole, _ = model(frames)  # as in training; the pieces below, without gradients, as in composing
    # rounding errors add up over 2 layers and 20 frames: over a dozen seeds the largest was 10 eps
    tolerance = 100 * torch.finfo(dtype).eps * whole.abs().max().item()
    with torch.no_grad():
        torch.testing.assert_close(model(frames[1:])[0], whole[1:], rtol=0, atol=tolerance)  # one row alone
        for lengths in [20 * [1], [7, 1, 3, 9], [1, 12, 7]]:
            outs, state = [], None
            for piece in frames.split(lengths, dim=1):
                out, after = model(piece, state)
                assert torch.equal(out, model(piece, state)[0])         # reading leaves the state as it was
                outs, state = outs + [out], after
            torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=tolerance)


@every_arch_and_head
@pytest.mark.parametrize('lookback, beat', [(0, 0), (1, 0), (9, 4)])
def test_model_outputs_depend_on_all_earlier_frames_and_on_no_later_one(arch, head, lookback, beat):
    T, model = 12, random_model(arch, head, lookback, beat=beat)
    frames = random_frames(1, T, 7).repeat(T + 1, 1, 1)
    s = torch.arange(T)
    frames[s, s] = 1 - frames[s, s]  # row s has another frame s, row T is as it was
    out, _ = model(frames)
    change = (out[:T] - out[T]).abs().amax(-1)                          # (T, T): of output t by frame s
    assert change.tril(-1).max() < 1e-13 * out.abs().max()
    assert change[s.unsqueeze(1) <= s].min() > 1e-7  # far above rounding, if faint after 11 frames


@every_arch_and_head
def test_model_in_bfloat16_is_near_float32(arch, head):
    model, frames = random_model(arch, head, 5, torch.float32, beat=4), random_frames(2, 20, 7)
    nats = []
    for mixed in (False, True):
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=mixed):
            nats.append(model.nll(model(frames[:, :-1])[0], frames[:, 1:]))
    assert nats[1].dtype == torch.float32 and not torch.equal(*nats)
    # eps is 2^-8; the mean over 38 frames of some 3 nats
    assert nats[1].mean().item() == pytest.approx(nats[0].mean().item(), rel=2 ** -5)


@pytest.mark.parametrize('W', [1, 3, 6])
def test_model_lookback_against_its_equations(W):
    # as initialised, the RWKV blocks are the identity, so all that is left are the embedding and looking back
    T, V, C = 12, 4, 6
    model = Model(Config(V, 'rwkv', 'bernoulli', 1, C, lookback=W)).double().eval()
    frames = random_frames(2, T, V)
    frames[0, :, -1] = 0  # one row is all one tune, the other has several
    frames[0, 6:9] = frames[0, 3:6]
    randomise(model.emb), randomise(model.look, std=1)
    P, softmax = arrays(model), lambda z: np.exp(z) / np.exp(z).sum()
    out = np.zeros((2, T, V))
    for b in range(2):
        f = np.concatenate((np.zeros((W, V)), frames[b].numpy()))  # frame t stands at W + t, nothing before it
        def one_tune(i, j): return not f[i + 1:j + 1, -1].any()  # none of them begins another tune
        run = np.zeros(W)
        for t in range(W, W + T):
            run = [run[l - 1] + 1 if one_tune(t - l, t) and (f[t] == f[t - l]).all() else 0 for l in range(1, W + 1)]
            x = P['emb.weight'] @ f[t] + P['emb.bias'] + P['look.run.weight'] @ np.log1p(run)
            x = layer_norm(x, P, 'blocks.0.ln0')
            scores = P['look.lag.weight'] @ layer_norm(x, P, 'look.ln') + P['look.lag.bias']
            p = softmax(scores + np.append(0, P['look.trust'] * np.log1p(run)))[1:]
            recalled = sum(p[l - 1] * f[t + 1 - l] for l in range(1, W + 1) if one_tune(t + 1 - l, t))
            x = layer_norm(x + P['look.recall.weight'] @ recalled, P, 'ln_out')
            out[b, t - W] = P['head.out.weight'] @ x + P['head.out.bias']
    np.testing.assert_allclose(model(frames)[0].detach(), out, rtol=0, atol=1e-12)
    # a window cut from the middle of a tune comes with the frames before it, and counts runs anew (here none goes on)
    frames[:, :5, 0], frames[:, 5, 0] = 0, 1
    later, _ = model(frames[:, 6:], (None, (frames[:, 6 - W:6], None), None))
    np.testing.assert_allclose(later.detach(), model(frames)[0].detach()[:, 6:], rtol=0, atol=1e-12)


def test_model_clock_against_its_equation():
    # as initialised, the RWKV blocks are the identity, so all that is left are the embedding and the clock
    T, V, C, beat = 30, 4, 6, 3
    model = Model(Config(V, 'rwkv', 'bernoulli', 1, C, beat=beat)).double().eval()
    randomise(model.clock, std=1)
    P, frames = arrays(model), torch.zeros(1, T, V)
    frames[0, [0, 7, 8], -1] = 1        # tunes of 6, 0 and 21 frames
    angle = [2 * np.pi * (t - max(start for start in (0, 7, 8) if start <= t)) / (beat * np.array(Clock.beats))[:, None] for t in range(T)]
    x = frames[0].numpy() @ P['emb.weight'].T + P['emb.bias']
    x += np.concatenate((np.cos(angle), np.sin(angle)), axis=1)[..., 0] @ P['clock.position.weight'].T
    x = layer_norm(layer_norm(x, P, 'blocks.0.ln0'), P, 'ln_out')
    out = x @ P['head.out.weight'].T + P['head.out.bias']
    np.testing.assert_allclose(model(frames)[0][0].detach(), out, rtol=0, atol=1e-5)     # the angles are float32
    # a window from the middle of a tune is told where it stands: frame 12 is the fifth of its tune
    later, _ = model(frames[:, 13:], (torch.tensor([4]), None, None))
    np.testing.assert_allclose(later.detach(), model(frames)[0].detach()[:, 13:], rtol=0, atol=1e-12)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, P, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * P[name + '.weight'] + P[name + '.bias']


def test_model_lstm_block_against_its_gate_equations():
    torch.manual_seed(0)
    C, T = 5, 9
    block = randomise(LSTMBlock(Config(7, n_embd=C), layer=1)).double().eval()
    P, x = arrays(block), torch.randn(2, T, C, dtype=torch.float64)
    W_ih, W_hh, b_ih, b_hh = (P[f'lstm.{n}_l0'] for n in ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'))
    expected = np.zeros((2, T, C))
    for b in range(2):
        h, c = np.zeros(C), np.zeros(C)
        for t in range(T):
            gates = W_ih @ layer_norm(x[b, t].numpy(), P, 'ln1') + b_ih + W_hh @ h + b_hh
            i, f, g, o = gates.reshape(4, C)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            expected[b, t] = x[b, t].numpy() + h
    first, state = block(x[:, :4], None)
    second, (h_T, c_T) = block(x[:, 4:], state)
    np.testing.assert_allclose(torch.cat((first, second), 1).detach(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.stack((h_T.detach()[0, 1], c_T.detach()[0, 1])), (h, c), rtol=0, atol=1e-12)


def mixed(x, m):
    """Token shift of arXiv 2305.13048: x (T, C), each frame mixed with the one before it."""
    return m[0] * x + (1 - m[0]) * np.vstack((np.zeros(x.shape[1]), x[:-1]))


def time_mix_by_hand(x, P, pre=''):
    """Time mixing as the paper writes it: the WKV as two sums over all of the past, in float64."""
    r, k, v = (mixed(x, P[f'{pre}time_mix_{n}'][0]) @ P[f'{pre}{m}.weight'].T
               for n, m in zip('rkv', ('receptance', 'key', 'value')))
    w, u = np.exp(P[pre + 'time_decay']), P[pre + 'time_first']
    wkv = np.zeros_like(x)
    for t in range(len(x)):
        above, below = np.exp(u + k[t]) * v[t], np.exp(u + k[t])
        for i in range(t):
            above += np.exp(-(t - 1 - i) * w + k[i]) * v[i]
            below += np.exp(-(t - 1 - i) * w + k[i])
        wkv[t] = above / below
    return (sigmoid(r) * wkv) @ P[pre + 'output.weight'].T


def channel_mix_by_hand(x, P, pre=''):
    """Channel mixing as the paper writes it."""
    r = mixed(x, P[pre + 'time_mix_r'][0]) @ P[pre + 'receptance.weight'].T
    k = mixed(x, P[pre + 'time_mix_k'][0]) @ P[pre + 'key.weight'].T
    return sigmoid(r) * (np.maximum(k, 0) ** 2 @ P[pre + 'value.weight'].T)


def rwkv_block_by_hand(x, P):
    x = x + time_mix_by_hand(layer_norm(x, P, 'ln1'), P, 'att.')
    return x + channel_mix_by_hand(layer_norm(x, P, 'ln2'), P, 'ffn.')


@pytest.mark.parametrize('part, by_hand, fresh', [
    ('att', time_mix_by_hand, (None, None)),
    ('ffn', channel_mix_by_hand, None),
    ('block', rwkv_block_by_hand, None)])
def test_model_rwkv_block_against_the_formulas(part, by_hand, fresh):
    torch.manual_seed(0)
    block = randomise(RWKVBlock(Config(7, n_embd=6), layer=1)).double().eval()
    module = getattr(block, part, block)
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    first, state = module(x[:, :4], fresh)
    second, _ = module(x[:, 4:], state)
    expected = np.stack([by_hand(row, arrays(module)) for row in x.numpy()])
    np.testing.assert_allclose(torch.cat((first, second), 1).detach(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize('L', [1, 3])
def test_model_rwkv_starts_as_v4neo(L):
    """Names, shapes and values of RWKV-LM's RWKV-v4neo/src/model.py; one layer, a division by zero there, works."""
    C = 12
    model = Model(Config(7, n_layer=L, n_embd=C))
    state, shapes = model.state_dict(), {'ln_out.weight': (C,), 'ln_out.bias': (C,)}
    for i in range(L):
        for ln in ['ln0', 'ln1', 'ln2'][i > 0:]:
            shapes |= {f'blocks.{i}.{ln}.weight': (C,), f'blocks.{i}.{ln}.bias': (C,)}
        shapes |= {f'blocks.{i}.att.{n}': (C,) for n in ('time_decay', 'time_first')}
        shapes |= {f'blocks.{i}.att.time_mix_{n}': (1, 1, C) for n in 'kvr'}
        shapes |= {f'blocks.{i}.att.{n}.weight': (C, C) for n in ('key', 'value', 'receptance', 'output')}
        shapes |= {f'blocks.{i}.ffn.time_mix_{n}': (1, 1, C) for n in 'kr'}
        shapes |= {f'blocks.{i}.ffn.key.weight': (4 * C, C), f'blocks.{i}.ffn.value.weight': (C, 4 * C),
                   f'blocks.{i}.ffn.receptance.weight': (C, C)}
    assert {name: tuple(p.shape) for name, p in state.items() if name.startswith(('blocks.', 'ln'))} == shapes

    for i in range(L):
        up, down = i / max(1, L - 1), 1 - i / L                 # from 0 to 1; from 1 to almost 0
        att, ffn = ({name.split('.', 3)[3]: p for name, p in state.items() if f'blocks.{i}.{part}.' in name}
                    for part in ('att', 'ffn'))
        share = [h / C for h in range(C)]
        expected = dict(time_decay=[-5 + 8 * (h / (C - 1)) ** (0.7 + 1.3 * up) for h in range(C)],
                        time_first=[math.log(0.3) + 0.5 * (-1, 0, 1)[(h + 1) % 3] for h in range(C)],
                        time_mix_k=[s ** down for s in share], time_mix_v=[s ** down + 0.3 * up for s in share],
                        time_mix_r=[s ** (0.5 * down) for s in share])
        for name, values in expected.items():
            np.testing.assert_allclose(att[name].flatten(), values, rtol=0, atol=2e-6, err_msg=name)
        for name in ('time_mix_k', 'time_mix_r'):
            np.testing.assert_allclose(ffn[name].flatten(), expected['time_mix_k'], rtol=0, atol=2e-6)
        zero = [name for part in (att, ffn) for name, p in part.items() if not p.any()]
        assert zero == ['key.weight', 'receptance.weight', 'output.weight', 'receptance.weight', 'value.weight']
        # orthogonal, with gain sqrt(rows / columns) where there are more rows than columns
        np.testing.assert_allclose(att['value.weight'].T @ att['value.weight'], np.eye(C), rtol=0, atol=1e-5)
        np.testing.assert_allclose(ffn['key.weight'].T @ ffn['key.weight'], 4 * np.eye(C), rtol=0, atol=1e-5)
    for name, p in state.items():
        if 'ln' in name:
            assert p.eq(1 if name.endswith('weight') else 0).all(), name


def test_model_lstm_starts_orthogonal_and_remembering():
    C = 8
    state = Model(Config(7, 'lstm', n_layer=2, n_embd=C)).state_dict()
    for i in range(2):
        for name in ('weight_ih', 'weight_hh'):
            for gate in state[f'blocks.{i}.lstm.{name}_l0'].chunk(4):
                np.testing.assert_allclose(gate @ gate.T, np.eye(C), rtol=0, atol=1e-5)
        bias = state[f'blocks.{i}.lstm.bias_ih_l0'] + state[f'blocks.{i}.lstm.bias_hh_l0']
        assert bias.tolist() == C * [0] + C * [1] + 2 * C * [0]         # in the order i, f, g, o


# --- the heads

HEADS = pytest.mark.parametrize('kind', [ChordHead, BernoulliHead])


def small_head(kind, V):
    torch.manual_seed(5)
    head = randomise(kind(Config(V, n_embd=5)), std=0.7)
    with torch.no_grad():
        head.out.bias[V:] -= 1.5                                        # "done" not too soon
    return head


def pick(logits, temperature, top_p):
    """Probabilities of one choice: the softmax, of which the fewest choices with top_p of the mass are kept."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[:1 + np.searchsorted(np.cumsum(p[order]), top_p)]
    q = np.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    return q


def frame_probabilities(head, h, temperature=1.0, top_p=1.0):
    """Of all 2^V frames, (2^V,), worked out choice by choice; bit v of the index is unit v."""
    P, h = arrays(head), h.double().numpy()
    if isinstance(head, BernoulliHead):
        p = np.ones(1)
        for logit in P['out.weight'] @ h + P['out.bias']:
            p = np.outer(pick(np.array([0, logit]), temperature, top_p), p).ravel()
        return p
    V = P['chosen.weight'].shape[1]
    probabilities, unfinished = np.zeros(2 ** V), [((), 1.0)]
    while unfinished:
        units, p = unfinished.pop()
        a = P['hidden.weight'] @ h + P['hidden.bias'] + sum(P['chosen.weight'][:, u] for u in units)
        gelu = np.array([0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in a])
        low = max(units, default=-1) + 1
        q = pick((P['out.weight'] @ gelu + P['out.bias'])[low:], temperature, top_p)
        for unit in range(low, V):
            unfinished.append(((*units, unit), p * q[unit - low]))
        probabilities[sum(1 << u for u in units)] = p * q[-1]           # "done"
    return probabilities


def all_frames(V):
    return ((torch.arange(2 ** V).unsqueeze(1) >> torch.arange(V)) & 1).to(torch.uint8)     # (2^V, V)


def index_of(frames):
    """The index of frames (.., V) among all frames."""
    return (frames.long() << torch.arange(frames.shape[-1])).sum(-1)


def assert_drawn_from(numbers, p):
    """
    By the inequality of Weissman et al. 2003, the frequencies of n draws lie farther from p than this, summed over
    the k cells, less than once in 1e9 runs; and what has no probability never comes.
    """
    n, k = len(numbers), len(p)
    frequency = np.bincount(numbers, minlength=k) / n
    assert abs(frequency - p).sum() < math.sqrt(2 * (k * math.log(2) + math.log(1e9)) / n)
    assert not frequency[p == 0].any()


@HEADS
def test_model_head_probabilities_of_all_frames(kind):
    V, head = 6, small_head(kind, 6)
    h = 2 * torch.randn(2, 3, 1, 5)
    with torch.no_grad():
        out = head(h)
        nats = head.nll(out.expand(2, 3, 2 ** V, -1), all_frames(V).expand(2, 3, -1, -1))
    assert nats.shape == (2, 3, 2 ** V)
    p = nats.double().neg().exp()
    assert (p.sum(-1) - 1).abs().max() < 1e-5
    for b in range(2):
        for t in range(3):
            np.testing.assert_allclose(p[b, t], frame_probabilities(head, h[b, t, 0]), rtol=1e-4)


@every_arch_and_head
def test_model_nll_of_a_batch_is_the_sum_over_its_choices(arch, head):
    V, model, heard = 6, random_model(arch, head, 2, torch.float32, n_units=6), []
    model.head.register_forward_hook(lambda module, inputs, out: heard.append(inputs[0]))
    frames = random_frames(3, 9, V)
    frames[0, 3], frames[1, 5] = 0, 1                                   # no unit on, all units on
    with torch.no_grad():
        nats = model.nll(model(frames[:, :-1])[0], frames[:, 1:])
    expected = [[-math.log(frame_probabilities(model.head, h)[index_of(frame)]) for h, frame in zip(*row)]
                for row in zip(heard[0], frames[:, 1:])]
    np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=1e-5)


@HEADS
@pytest.mark.parametrize('temperature, top_p', [(1, 1), (0.6, 1), (1.7, 1), (1, 0.8), (1.3, 0.55), (1, 0.3)])
def test_model_sampling_follows_the_probabilities(kind, temperature, top_p):
    head, h = small_head(kind, 6), torch.randn(5, generator=torch.Generator().manual_seed(1))
    frames = head.sample(head(h).expand(200_000, -1), temperature, top_p, torch.Generator().manual_seed(2))
    assert frames.dtype == torch.uint8 and frames.shape == (200_000, 6) and frames.max() <= 1
    assert_drawn_from(index_of(frames), frame_probabilities(head, h, temperature, top_p))


@HEADS
def test_model_sampled_rows_are_independent(kind):
    head = small_head(kind, 3)
    h = torch.randn(2, 5)  # two tunes in one batch, over and over
    frames = head.sample(head(h).repeat(100_000, 1), generator=torch.Generator().manual_seed(2))
    pairs = index_of(frames).view(-1, 2)
    joint = np.outer(frame_probabilities(head, h[0]), frame_probabilities(head, h[1])).ravel()
    assert_drawn_from(pairs[:, 0] * 8 + pairs[:, 1], joint)


@HEADS
@pytest.mark.parametrize('option, value', [('temperature', 1e-3), ('top_p', 1e-6)])
def test_model_cold_sampling_is_greedy(kind, option, value):
    head = small_head(kind, 6)
    h = torch.randn(20, 5)
    greedy = torch.tensor([frame_probabilities(head, row, 1.0, 1e-9).argmax() for row in h])
    assert len(set(greedy.tolist())) > 3
    for seed in range(3):
        frames = head.sample(head(h), generator=torch.Generator().manual_seed(seed), **{option: value})
        assert torch.equal(index_of(frames), greedy)


@HEADS
def test_model_sampling_repeats_with_its_generator(kind):
    head = small_head(kind, 6)
    out = head(torch.randn(50, 5))
    a, b, c = (head.sample(out, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_model_chord_head_spells_nothing_and_everything():
    V, head = 6, ChordHead(Config(6, n_embd=1))
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
        head.out.weight[:V, 0] = 10 * torch.arange(V, 0, -1)  # with h = 10, each time the lowest unit left
        head.out.bias[V] = 30                                           # with h = 0, done at once
        out = torch.tensor([0., 10, 0, 10]).unsqueeze(1)  # rows of a batch are done at different times
        nothing_everything = torch.tensor([0, 1, 0, 1]).unsqueeze(1).expand(-1, V)
        assert torch.equal(head.sample(out).long(), nothing_everything)
        assert head.nll(out, nothing_everything).max() < 1e-6
        opposite = head.nll(out, 1 - nothing_everything)
        assert opposite.isfinite().all() and opposite.min() > 20


# --- what training needs

def test_model_dropout_takes_the_same_channels_from_all_frames():
    torch.manual_seed(0)
    drop, x = Dropout(0.25), torch.ones(64, 5, 128)
    y = drop(x)
    assert (y == y[:, :1]).all() and set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert not torch.equal(y[0], y[1])
    # kept channels are 8192 coin tosses: by Hoeffding, farther off than 0.04 less than once in 1e11 runs
    assert abs(y.mean().item() - 1) < 0.04 / 0.75
    assert torch.equal(drop.eval()(x), x) and torch.equal(Dropout(0)(x), x)


@pytest.mark.parametrize('arch', ['rwkv', 'lstm'])
def test_model_dropout_acts_in_training_only(arch):
    model, frames = random_model(arch, dropout=0.3), random_frames(2, 5, 7)
    assert torch.equal(model(frames)[0], model(frames)[0])
    assert not torch.equal(model.train()(frames)[0], model(frames)[0])


@every_arch_and_head
def test_model_weight_decay_is_for_matrices_only(arch, head):
    model = random_model(arch, head, lookback=3, beat=4)
    name_of = {id(p): name for name, p in model.named_parameters()}
    for optimizer in OPTIMIZERS:
        groups = [group for o in model.optimizers(optimizer, 1e-2, 0.1) for group in o.param_groups]
        names = {decay: [name_of[id(p)] for g in groups if g['weight_decay'] == decay for p in g['params']] for decay in (0.1, 0)}
        assert sorted(names[0.1] + names[0]) == sorted(name_of.values())            # every parameter exactly once
        assert set(names[0.1]) == {n for n in name_of.values() if 'weight' in n and 'ln' not in n}


@pytest.mark.skipif('muon' not in OPTIMIZERS, reason='this torch has no Muon')
@pytest.mark.parametrize('arch', ['rwkv', 'lstm'])
def test_model_muon_moves_the_matrices_of_the_blocks_alike_in_all_directions(arch):
    model = random_model(arch, lookback=3, beat=4, n_embd=16).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    frames = random_frames(4, 12, 7)
    model.nll(model(frames[:, :-1])[0], frames[:, 1:]).mean().backward()
    for optimizer in model.optimizers('muon', 0.01, 0):
        optimizer.step()
    for name, p in model.named_parameters():
        step = p - before[name]
        if name.startswith('blocks.') and p.dim() == 2:     # Muon: singular values near the learning rate, longer if tall,
            values = torch.linalg.svdvals(step) / (0.01 * max(1, p.shape[0] / p.shape[1]) ** 0.5)
            gradient = torch.linalg.svdvals(p.grad)         # but for those that are as good as nothing in the gradient
            values = values[gradient > 0.02 * gradient.norm()]
            assert len(values) > 3 and 0.4 < values.min() and values.max() < 1.4, (name, values)
        else:                                               # AdamW: the first step is as long for every number
            assert step.abs().max() < 0.0101, name


@every_arch_and_head
def test_model_gradients_reach_every_parameter(arch, head):
    torch.manual_seed(0)
    model = Model(Config(7, arch, head, n_layer=2, n_embd=8, dropout=0, lookback=5, beat=4))
    (optimizer,), frames = model.optimizers('adamw', 1e-2, 0.1), random_frames(4, 12, 7)
    for _ in range(3):      # RWKV starts with zero matrices one behind another: gradient 3 reaches them all
        optimizer.step()
        optimizer.zero_grad()
        model.nll(model(frames[:, :-1])[0], frames[:, 1:]).mean().backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == [] and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('V, steps_per_beat', [(177, 4), (89, 2)])
@pytest.mark.parametrize('kind, n_layer', [('cpu', 3), ('cuda', 6)])
def test_model_default_sizes_are_within_5_percent(V, steps_per_beat, kind, n_layer, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    lookback = round(train.parse_args().lookback * steps_per_beat)
    models = [Model(Config(V, arch, 'chord', n_layer, train.SIZES[arch, kind], lookback=lookback, beat=steps_per_beat))
              for arch in ('rwkv', 'lstm')]
    rwkv, lstm = (sum(p.numel() for p in model.parameters()) for model in models)
    assert abs(lstm / rwkv - 1) < 0.05, f'{rwkv:,} and {lstm:,} parameters'


# ---------------------------------------------------------------------------------------------------------------------
# train.py and sample.py, as a person runs them

HERE = Path(__file__).resolve().parent
TINY = ['--n_layer=2', '--n_embd=16', '--batch_size=4', '--block_size=32', '--max_minutes=0', '--dtype=float32',
        '--eval_interval=100', '--log_interval=10', '--device=cpu']


def run(script, *options, cwd=None):
    """Runs a script; its output, its complaint and its exit status. Never a traceback."""
    done = subprocess.run([sys.executable, HERE / f'{script}.py', *map(str, options)], cwd=cwd, text=True,
                          capture_output=True, timeout=300)
    assert 'Traceback' not in done.stderr, done.stderr
    return done


def test_model_benchmark_compares_the_models_of_train():
    out = run('model', '--steps=2').stdout
    for arch in ('rwkv', 'lstm'):       # those that train.py makes
        model = Model(Config(177, arch, 'chord', 3, train.SIZES[arch, 'cpu'], lookback=256, beat=4))
        assert f'{arch}: {sum(p.numel() for p in model.parameters()):,} parameters' in out
    rates = re.findall(r'(?m)^(rwkv|lstm|rwkv / lstm): ([\d,.]+) \(half', out)
    assert [name for name, _ in rates] == ['rwkv', 'lstm', 'rwkv / lstm'], out
    assert all(float(rate.replace(',', '')) > 0 for _, rate in rates)


def scale_book(folder, songs=20):
    """A folder of MIDI files, each the same little round: scales over held triads, 16 beats."""
    folder.mkdir()
    for i in range(songs):
        melody = [(39 + i % 3 + step, beat / 2, beat / 2 + 0.5) for beat, step in enumerate([0, 2, 4, 5, 7, 5, 4, 2] * 4)]
        chords = [(27 + i % 3 + step, bar * 4, bar * 4 + 4) for bar in range(4) for step in (0, 4, 7)]
        data.write_midi(np.array(melody + chords, dtype=float), folder / f'round{i}.mid', 100 + i)
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Each architecture with each head, trained for a few steps on little rounds."""
    home = tmp_path_factory.mktemp('home')
    book = scale_book(home / 'book')
    result = {}
    for arch, head in (('rwkv', 'chord'), ('lstm', 'bernoulli')):
        done = run('train', f'--arch={arch}', f'--head={head}', f'--data={book}', '--max_iters=150', '--transpose=0', f'--out_dir={home / head}',
                   '--learning_rate=0.01', *TINY)
        assert done.returncode == 0, done.stderr
        result[arch] = done.stdout, home / head / f'{arch}.pt'
    return home, book, result


def test_train_prints_its_plan_and_results(trained):
    home, book, runs = trained
    for arch, (out, checkpoint) in runs.items():
        for word in ('device: cpu', '20 songs', 'train: ', 'frames', 'beats', 'parameters', 'frames/s', 'left', 'lr '):
            assert word in out, word
        assert ('WKV' in out) == (arch == 'rwkv')
        test = re.search(r'^test: (\d+\.\d{4}) nats/frame \((\d+) songs, ([\d,]+) frames\)$', out, re.M)
        assert test and out.rstrip().endswith(test[0])
        with open(checkpoint.with_suffix('.csv'), newline='') as f:
            rows = list(csv.DictReader(f))
        assert [float(row['test']) for row in rows if row['test']] == pytest.approx([float(test[1])], abs=1e-4)
        assert {'iter', 'minutes', 'train', 'valid', 'lr', 'frames_per_second'} <= set(rows[0])


def test_train_lowers_the_loss(trained):
    for out, _ in trained[2].values():
        first, *_, last = [float(x) for x in re.findall(r'step \d+: valid (\d+\.\d+) nats/frame', out)]
        assert last < first / 2


def test_checkpoint_round_trip(trained):
    home, book, runs = trained
    for arch, (out, path) in runs.items():
        model, checkpoint = load_checkpoint(path)
        dataset = data.load(str(book), log=lambda line: None)
        nats, songs, frames = train.evaluate(model, dataset, 'test')
        assert f'test: {nats:.4f} nats/frame ({songs} songs, {frames:,} frames)' in out
        assert checkpoint['meta']['source'] == dataset.source
        assert checkpoint['meta']['tempo'] == np.median([song.tempo for song in dataset.songs['train']])


def test_evaluate_counts_frames_2_to_T_of_each_song_from_fresh_state():
    songs = [data.Song(f'{n}', np.array([(40, 0, n), (44, 1, n)], dtype=float)) for n in (2, 3, 7, 140)]
    dataset = data.Dataset({split: songs for split in data.SPLITS}, 'four songs')       # the last is read in two pieces
    model = Model(Config(dataset.V, n_layer=1, n_embd=8, lookback=5, beat=4)).eval()
    nats, count, frames = train.evaluate(model, dataset, 'test', batch_size=2)
    total = 0.0
    for song in songs:
        x = torch.from_numpy(data.to_frames(song.notes))
        start = torch.zeros(1, dataset.V, dtype=torch.uint8)
        start[0, -1] = 1
        total += model.nats_per_frame(torch.cat((start, x[:1])), x[1:]) * (len(x) - 1)
    assert (count, frames) == (4, 4 * 152 - 4) and nats == pytest.approx(total / frames, rel=1e-5)


def test_nats_per_frame_does_not_depend_on_how_the_tune_is_cut():
    model = Model(Config(9, n_layer=1, n_embd=8, lookback=3, beat=4)).eval()
    x = (torch.rand(2500, 9, generator=torch.Generator().manual_seed(0)) < 0.3).to(torch.uint8)
    out, _ = model(x[None, :-1])
    for prompt in (1, 700, 1025, 2000):
        assert model.nats_per_frame(x[:prompt], x[prompt:]) == pytest.approx(
            model.nll(out, x[None, 1:])[0, prompt - 1:].double().mean().item(), rel=1e-5)


@pytest.mark.parametrize('arch', ['rwkv', 'lstm'])
def test_sample_writes_a_tune_and_the_same_seed_the_same_files(trained, tmp_path, arch):
    checkpoint = trained[2][arch][1]
    files = []
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        done = run('sample', '--ckpt', checkpoint, '--length=16', f'--seed={seed}', '--out', tmp_path / f'{name}.mid')
        assert done.returncode == 0, done.stderr
        assert str(tmp_path / f'{name}.mid') in done.stdout and 'beats 1 to' in done.stdout
        files.append([(tmp_path / name).with_suffix(suffix).read_bytes() for suffix in ('.mid', '.wav')])
    assert files[0] == files[1] != files[2]
    notes = data.read_midi(tmp_path / 'a.mid').notes
    assert len(notes) and notes[:, 2].max() <= 16


def test_sample_several_at_once_best_first(trained, tmp_path):
    done = run('sample', '--ckpt', trained[2]['rwkv'][1], '--length=8', '--num_samples=3', '--seed=5', '--tempo=90', '--out', tmp_path / 'x.mid')
    assert done.returncode == 0, done.stderr
    nats = [float(x) for x in re.findall(r'x-\d\.mid.*: (\d+\.\d+) nats/frame', done.stdout)]
    valid = load_checkpoint(trained[2]['rwkv'][1])[1]['valid']
    assert len(nats) == 3 and nats == sorted(nats, key=lambda x: abs(x - valid))
    assert data.read_midi(tmp_path / 'x-3.mid').tempo == pytest.approx(90, abs=0.01)


def test_sample_continues_a_prompt(trained, tmp_path):
    home, book, runs = trained
    prompt = data.read_midi(book / 'round4.mid')
    for options, beats in ((['--prompt_beats=6'], 6), ([], 16)):
        done = run('sample', '--ckpt', runs['rwkv'][1], '--prompt', book / 'round4.mid', *options, '--length=8', '--seed=3', '--out', tmp_path / 'y.mid')
        assert done.returncode == 0, done.stderr
        song = data.read_midi(tmp_path / 'y.mid')
        kept = lambda notes: notes[notes[:, 1] < beats - 1e-6][:, :2]
        np.testing.assert_allclose(kept(song.notes), kept(prompt.notes))
        assert song.tempo == pytest.approx(prompt.tempo, abs=0.01) and song.notes[:, 2].max() > beats
    run('sample', '--ckpt', runs['rwkv'][1], '--prompt', book / 'round4.mid', '--length=8', '--seed=3', '--no_prompt', '--out', tmp_path / 'z.mid')
    assert data.read_midi(tmp_path / 'z.mid').notes[:, 2].max() <= 8


def test_sample_key_moves_the_tune(trained, tmp_path):
    keys = {}
    for key in ('', '--key=Eb', '--key=Cm', '--key=A'):
        done = run('sample', '--ckpt', trained[2]['rwkv'][1], '--length=16', '--seed=1', *[key] * bool(key), '--out', tmp_path / 'k.mid')
        assert done.returncode == 0, done.stderr
        keys[key] = data.read_midi(tmp_path / 'k.mid').notes
    for key, sharps in (('--key=Eb', -3), ('--key=Cm', -3), ('--key=A', 3)):
        assert data.estimate_sharps(keys[key]) % 12 == sharps % 12
        np.testing.assert_array_equal(keys[key][:, 1:], keys[''][:, 1:])


def test_longest_copy_finds_a_passage_in_any_transposition():
    rng = np.random.default_rng(0)
    notes = lambda n: np.stack([rng.integers(30, 60, n), np.arange(n), np.arange(n) + 1], 1).astype(float)
    old, new = notes(300), notes(100)
    book = sample.intervals(old, 4)
    assert sample.longest_copy(sample.intervals(new, 4), book) < 40
    new[20:60, 0] = old[200:240, 0] - 7                          # 40 beats at 4 steps; the first strike has another before it
    assert 39 * 4 <= sample.longest_copy(sample.intervals(new, 4), book) <= 41 * 4
    assert sample.longest_copy(book, book) == len(book)


@pytest.mark.parametrize('bar', [3, 4])
def test_beats_per_bar_follows_the_chords(bar):
    chords = [(27 + step, b * bar, (b + 1) * bar) for b in range(12) for step in (0, 4, 7)]
    melody = [(50 + i % 5, i / 2, i / 2 + 0.5) for i in range(24 * bar)]
    assert sample.beats_per_bar(np.array(chords + melody, dtype=float)) == bar
    assert sample.beats_per_bar(np.empty((0, 3))) == 4


def test_sample_continues_abc_and_tells_what_it_copied(trained, tmp_path):
    (tmp_path / 'mine.abc').write_text('X:1\nT:Mine\nM:4/4\nL:1/4\nQ:1/4=77\nK:C\n"C"CDEF|"G7"GFED|\n')
    done = run('sample', '--ckpt', trained[2]['lstm'][1], '--prompt', tmp_path / 'mine.abc', '--length=8', '--seed=3', '--out', tmp_path / 'y.mid')
    assert done.returncode == 0, done.stderr
    song = data.read_midi(tmp_path / 'y.mid')
    assert song.tempo == pytest.approx(77, abs=0.01) and song.notes[0].tolist() == [27, 0, 4]
    assert re.search(r'at most [\d.]+ beats in a row copied', done.stdout)
    assert '--check_copies' in run('sample', '--help').stdout


def test_training_leaves_a_loss_chart(trained):
    home, book, runs = trained
    assert 'lstm' in (home / 'bernoulli' / 'loss.svg').read_text()


def test_training_stops_at_a_loss_that_is_not_finite(tmp_path, monkeypatch, capsys):
    book = scale_book(tmp_path / 'book')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'rwkv.pt').write_bytes(b'an earlier run')
    monkeypatch.setattr(Model, 'nll', lambda self, out, targets: out.sum() * math.nan)
    monkeypatch.setattr(sys, 'argv', ['train.py', f'--data={book}', '--max_iters=3', f'--out_dir={tmp_path / "out"}', *TINY])
    monkeypatch.setattr(train, 'evaluate', lambda *a: (1.0, 1, 1))
    with pytest.raises(SystemExit) as stop:
        train.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and 'step 0' in message and '--learning_rate' in message
    assert (tmp_path / 'out' / 'rwkv.pt').read_bytes() == b'an earlier run'


def test_seeds_make_training_repeatable(tmp_path):
    book = scale_book(tmp_path / 'book')
    weights = {}
    for name, seed in (('a', 7), ('b', 7), ('c', 8)):
        assert run('train', f'--data={book}', '--max_iters=3', f'--seed={seed}', f'--out_dir={tmp_path / name}', *TINY).returncode == 0
        weights[name] = torch.load(tmp_path / name / 'rwkv.pt', weights_only=True)['model']
    same = lambda x, y: all(torch.equal(weights[x][k], weights[y][k]) for k in weights[x])
    assert same('a', 'b') and not same('a', 'c')


BAD_OPTIONS = [
    ('train', ['--arch=gru'], '--arch'),
    ('train', ['--head=softmax'], '--head'),
    ('train', ['--onsets=maybe'], '--onsets'),
    ('train', ['--n_embd=0'], '--n_embd'),
    ('train', ['--dropout=1'], '--dropout'),
    ('train', ['--lookback=x'], '--lookback'),
    ('train', ['--batch_size=2.5'], '--batch_size'),
    ('train', ['--max_iters=0', '--max_minutes=0'], '--max_iters'),
    ('train', ['--device=cuda:99'], '--device'),
    ('train', ['--no_such_option'], '--no_such_option'),
    ('sample', ['--seed=x'], '--seed'),
    ('train', ['--data={tmp}/nowhere'], 'nowhere'),
    ('train', ['--data={tmp}/empty'], 'empty'),
    ('train', ['--data={book}', '--block_size=100000'], '--block_size'),
    ('train', ['--data={book}', '--out_dir={tmp}/file/out'], '--out_dir'),
    ('sample', ['--ckpt={tmp}/none.pt'], 'none.pt'),
    ('sample', ['--ckpt={tmp}/file'], 'file'),
    ('sample', ['--ckpt={tmp}/half.pt'], 'half.pt'),
    ('sample', ['--ckpt={tmp}/foreign.pt'], 'foreign.pt'),
    ('sample', ['--ckpt={tmp}/code.pt'], 'code.pt'),
    ('sample', ['--ckpt={ckpt}', '--temperature=0'], '--temperature'),
    ('sample', ['--ckpt={ckpt}', '--temperature=-1'], '--temperature'),
    ('sample', ['--ckpt={ckpt}', '--top_p=0'], '--top_p'),
    ('sample', ['--ckpt={ckpt}', '--length=1e6'], '--length'),
    ('sample', ['--ckpt={ckpt}', '--num_samples=10000', '--length=20000'], '--num_samples'),
    ('sample', ['--ckpt={ckpt}', '--key=H'], '--key'),
    ('sample', ['--ckpt={ckpt}', '--key='], '--key'),
    ('train', ['--max_minutes=inf'], '--max_minutes'),
    ('sample', ['--ckpt={ckpt}', '--prompt={tmp}/silent.mid'], 'silent.mid'),
    ('sample', ['--ckpt={ckpt}', '--prompt={tmp}/file'], 'file'),
    ('sample', ['--ckpt={ckpt}', '--prompt={tmp}/none.mid'], 'none.mid'),
    ('sample', ['--ckpt={ckpt}', '--out={tmp}/no/folder/x.mid'], 'x.mid'),
]


@pytest.mark.parametrize('script, options, named', BAD_OPTIONS, ids=lambda x: ' '.join(x) if isinstance(x, list) else None)
def test_bad_input_ends_in_one_sentence(trained, tmp_path, monkeypatch, capsys, script, options, named):
    home, book, runs = trained
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_bytes(b'nothing in particular')
    data.write_midi(np.empty((0, 3)), tmp_path / 'silent.mid')
    ckpt = runs['rwkv'][1]
    (tmp_path / 'half.pt').write_bytes(ckpt.read_bytes()[:ckpt.stat().st_size // 2])
    torch.save({'weights': torch.zeros(3)}, tmp_path / 'foreign.pt')
    torch.save({'model': Path('x'), 'code': subprocess.Popen}, tmp_path / 'code.pt')
    before = sorted(tmp_path.rglob('*'))
    options = [o.format(tmp=tmp_path, book=book, ckpt=ckpt) for o in options]
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', *options])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        {'train': train, 'sample': sample}[script].main()
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and named in message and '\n' not in message and message.startswith(f'{script}.py: ')
    assert sorted(tmp_path.rglob('*')) == before


def test_bad_input_has_exit_status_2_and_no_traceback(tmp_path):
    for script, option in (('train', f'--data={tmp_path}/nowhere'), ('sample', f'--ckpt={tmp_path}/nowhere.pt')):
        done = run(script, option)
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'nowhere' in done.stderr


# --- runs that are interrupted, resumed, shared out

def training(book, out, *options):
    """train.main() in this process; its exit status, 0 if it came to its end."""
    sys.argv = ['train.py', f'--data={book}', f'--out_dir={out}', *TINY, *options]
    try:
        train.main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', sys.argv)
    return scale_book(tmp_path / 'book')


def last_state(out, arch):
    """What a run ended with, without the times: weights, optimiser's moments and the numbers of the table."""
    saved = torch.load(out / f'{arch}.last.pt', weights_only=True)
    moments = [x for states in saved['optimizers'] for state in states.values() for x in state.values()]
    with open(out / f'{arch}.csv', newline='') as f:
        rows = [{k: v for k, v in row.items() if k not in ('minutes', 'frames_per_second')} for row in csv.DictReader(f)]
    return [*saved['model'].values(), *moments], rows


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('arch', ['rwkv', 'lstm'])
def test_resume_is_bit_for_bit_the_run_that_never_stopped(book, tmp_path, monkeypatch, capsys, arch, optimizer):
    options = (f'--arch={arch}', '--max_iters=9', '--eval_interval=4', '--log_interval=3', '--dropout=0.3',
               f'--optimizer={optimizer}')
    assert training(book, tmp_path / 'whole', *options) == 0
    tensors, rows = last_state(tmp_path / 'whole', arch)
    steps, draw = 0, data.Dataset.batch

    def interrupted(self, split, batch_size, *rest):       # signals in the middle of the 1st, 4th, 6th and 9th step
        nonlocal steps
        steps += batch_size > 1
        if batch_size > 1 and steps in (1, 4, 6, 9):
            signal.raise_signal(signal.SIGINT if steps < 5 else signal.SIGTERM)
        return draw(self, split, batch_size, *rest)

    monkeypatch.setattr(data.Dataset, 'batch', interrupted)
    assert training(book, tmp_path / 'parts', *options) == 130
    sys.argv = ['train.py', f'--arch={arch}', f'--out_dir={tmp_path / "parts"}', '--resume']      # all else is remembered
    for status in (130, 143, 143, None):
        with pytest.raises(SystemExit) if status else contextlib.nullcontext() as stop:
            train.main()
        assert status is None or stop.value.code == status
    assert steps == 9 and '--resume' in capsys.readouterr().out
    tensors_of_parts, rows_of_parts = last_state(tmp_path / 'parts', arch)
    assert rows_of_parts == rows and all(torch.equal(a, b) for a, b in zip(tensors_of_parts, tensors, strict=True))


def test_resume_options_given_again_win(book, tmp_path, capsys):
    assert training(book, tmp_path / 'out', '--max_iters=2', '--beta2=0.9') == 0
    assert training(book, tmp_path / 'out', '--resume', '--max_iters=4', '--learning_rate=0') == 0
    saved = torch.load(tmp_path / 'out' / 'rwkv.last.pt', weights_only=True)
    assert saved['step'] == 4 and {'--max_iters=4', '--beta2=0.9', '--learning_rate=0.0'} <= set(saved['options'])
    capsys.readouterr()
    for options, named in ((['--n_embd=24'], 'n_embd'), (['--arch=lstm'], 'lstm.last.pt')):
        assert training(book, tmp_path / 'out', '--resume', *options) == 2
        assert named in capsys.readouterr().err
    if 'muon' in OPTIMIZERS:
        assert training(book, tmp_path / 'out', '--resume', '--optimizer=muon') == 2
        assert '--optimizer' in capsys.readouterr().err
    saved['optimizers'][0][0]['exp_avg'] = saved['optimizers'][0][0]['exp_avg'][:1]
    torch.save(saved, tmp_path / 'out' / 'rwkv.last.pt')
    assert training(book, tmp_path / 'out', '--resume') == 2
    assert re.fullmatch(r'train.py: .*rwkv\.last\.pt .*--resume\n', capsys.readouterr().err)


def test_muon_is_for_a_torch_that_has_it(book, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(torch.optim, 'Muon', raising=False)
    assert training(book, tmp_path / 'out', '--max_iters=1', '--dtype=bfloat16') == 0
    assert '--optimizer=adamw' in torch.load(tmp_path / 'out' / 'rwkv.last.pt', weights_only=True)['options']
    capsys.readouterr()
    assert training(book, tmp_path / 'out', '--max_iters=1', '--optimizer=muon') == 2
    assert re.fullmatch(r'train.py: --optimizer=muon needs torch 2.9 .*\n', capsys.readouterr().err)


def test_sigterm_saves_and_gives_the_command_to_go_on(book, tmp_path):
    words = [sys.executable, HERE / 'train.py', f'--data={book}', f'--out_dir={tmp_path / "my run"}', *TINY, '--max_iters=1000000', '--arch=lstm']
    with subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith('step 10:'):
                process.terminate()
                break
        rest, complaint = process.communicate(timeout=60)
    assert process.returncode == 143 and not complaint
    step, command = re.search(r'^stopped at step (\d+); to go on:  (.*)$', rest, re.M).groups()
    done = subprocess.run([*shlex.split(command), f'--max_iters={int(step) + 5}'], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f'step {step}, ' in done.stdout and f'step {int(step) + 5}: valid' in done.stdout, done.stderr


def test_kill_9_in_the_act_of_saving_leaves_a_checkpoint(book, tmp_path):
    """Real runs that save after every step, killed at random while the new checkpoint is being written; each goes on
    where the one before was killed."""
    rng, steps, torn = np.random.default_rng(), [0], 0
    words = [sys.executable, HERE / 'train.py', f'--data={book}', f'--out_dir={tmp_path / "out"}', *TINY, '--n_embd=256',
             '--max_iters=1000000', '--eval_interval=1', '--arch=lstm', '--resume']
    assert training(book, tmp_path / 'out', '--n_embd=256', '--max_iters=1', '--arch=lstm') == 0
    for i in range(6):
        process = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(f'step {steps[-1] + 3}:'):
                break
        end = time.monotonic() + 10
        while time.monotonic() < end and not any((tmp_path / 'out').glob('*.pt.*.part')):
            pass
        time.sleep(i % 2 * rng.uniform(0, 0.02))      # before, during or after the renaming
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        torn += any((tmp_path / 'out').glob('*.pt.*.part'))
        load_checkpoint(tmp_path / 'out' / 'lstm.pt')
        steps.append(load_checkpoint(tmp_path / 'out' / 'lstm.last.pt')[1]['step'])
    assert torn and all(now >= before + 2 for before, now in zip(steps, steps[1:])), (torn, steps)


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_numbers_that_are_not_finite_stop_the_run(book, tmp_path, monkeypatch, capsys, what):
    assert training(book, tmp_path / 'out', '--max_iters=2') == 0
    before = {path: path.read_bytes() for path in (tmp_path / 'out').glob('*.pt')}

    class InfiniteGradient(torch.autograd.Function):
        forward, backward = staticmethod(lambda ctx, x: x.clone()), staticmethod(lambda ctx, g: g * math.inf)

    nll = Model.nll
    monkeypatch.setattr(Model, 'nll', lambda self, out, x: nll(self, InfiniteGradient.apply(out) if what == 'gradient' else
                                                               out * (math.nan if self.training else 1), x))
    capsys.readouterr()
    assert training(book, tmp_path / 'out', '--resume', '--max_iters=5', '--grad_clip=0') == 2
    message = capsys.readouterr().err
    assert what in message and 'step 2' in message and '--learning_rate' in message and message.count('\n') == 1
    assert len(before) == 2 and torch.load(tmp_path / 'out' / 'rwkv.last.pt', weights_only=True)['step'] == 2
    assert (tmp_path / 'out' / 'rwkv.pt').read_bytes() == before[tmp_path / 'out' / 'rwkv.pt']


def test_full_disk_leaves_the_checkpoints(book, tmp_path, monkeypatch, capsys):
    assert training(book, tmp_path / 'out', '--max_iters=2') == 0
    before = {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()}

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    capsys.readouterr()
    assert training(book, tmp_path / 'out', '--resume', '--max_iters=4') == 2
    message = capsys.readouterr().err
    assert 'rwkv.last.pt' in message and 'No space left' in message and message.count('\n') == 1
    assert {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == before


def test_gradient_accumulation_changes_nothing(book, tmp_path):
    for pieces in (1, 4):
        assert training(book, tmp_path / f'{pieces}', f'--gradient_accumulation_steps={pieces}', '--max_iters=4', '--dropout=0') == 0
    for a, b in zip(last_state(tmp_path / '1', 'rwkv')[0], last_state(tmp_path / '4', 'rwkv')[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_two_processes_with_batch_4_train_as_one_with_batch_8(book, tmp_path):
    options = f'--data={book}', *TINY, '--batch_size=8', '--max_iters=6', '--eval_interval=3', '--dropout=0', '--arch=lstm'
    assert training(book, tmp_path / 'one', *options[1:]) == 0
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1', f'--master_port={free_port()}',
               HERE / 'train.py', *options, f'--out_dir={tmp_path / "two"}', '--gradient_accumulation_steps=2']
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, env=os.environ | dict(GLOO_SOCKET_IFNAME='lo'))
    assert done.returncode == 0, done.stderr
    assert '2 processes' in done.stdout and done.stdout.count('\nstep 6: valid') == done.stdout.count('\ntest: ') == 1      # one speaks
    (one, rows), (two, rows_of_two) = last_state(tmp_path / 'one', 'lstm'), last_state(tmp_path / 'two', 'lstm')
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    for a, b in zip(rows, rows_of_two, strict=True):        # validation and test, of which each process did a share
        assert [float(x or 0) for x in a.values()] == pytest.approx([float(x or 0) for x in b.values()], abs=1e-4)


def test_batches_that_do_not_divide_are_refused(book, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '3')
    assert training(book, tmp_path / 'out', '--batch_size=8', '--max_iters=2') == 2
    assert re.fullmatch(r'train.py: --batch_size=8 .*3 processes.*--batch_size=9\n', capsys.readouterr().err)


def rezip(path, method=zipfile.ZIP_STORED, extra=()):
    """A checkpoint packed anew: another method, more members."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name, content in [*members, *extra]:
            archive.writestr(name, content)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at if at < 0 else len(content) // at] ^= 1
    path.write_bytes(content)


BAD_CHECKPOINTS = {
    'version': (lambda c: c.update(version=1), 'version 1'),
    'no config': (lambda c: c.pop('config'), ''),
    'extra field': (lambda c: c['config'].update(colour=1), ''),
    'arch': (lambda c: c['config'].update(arch='gru'), 'gru'),
    'absurd layers': (lambda c: c['config'].update(n_layer=10 ** 9), 'n_layer=1000000000'),
    'more layers than there are': (lambda c: c['config'].update(n_layer=90_000), '90000 layers'),
    'absurd channels': (lambda c: c['config'].update(n_embd=65_536), '65536'),
    'fractional channels': (lambda c: c['config'].update(n_embd=16.0), 'n_embd=16.0'),
    'absurd lookback': (lambda c: c['config'].update(lookback=10 ** 12), 'lookback'),
    'absurd beat': (lambda c: c['config'].update(beat=10 ** 12), 'beat'),
    'clock without a beat': (lambda c: c['config'].update(beat=0), 'clock.position.weight'),
    'dropout': (lambda c: c['config'].update(dropout=math.nan), 'dropout'),
    'key left out': (lambda c: c['model'].pop('emb.bias'), 'emb.bias'),
    'key too many': (lambda c: c['model'].update(evil=torch.zeros(3)), 'evil'),
    'shape': (lambda c: c['model'].update({'emb.bias': torch.zeros(17)}), 'emb.bias'),
    'not a tensor': (lambda c: c['model'].update({'emb.bias': 'x'}), 'emb.bias'),
    'dtype': (lambda c: c['model'].update({'emb.bias': torch.zeros(16, dtype=torch.float64)}), 'emb.bias'),
    'stretched': (lambda c: c['model'].update({'emb.weight': torch.zeros(1).expand(16, 177)}), 'emb.weight'),
    'nan': (lambda c: c['model']['emb.bias'].fill_(math.nan), 'emb.bias'),
    'tempo': (lambda c: c['meta'].update(tempo=math.inf), 'music'),
    'grid': (lambda c: c['meta'].update(steps_per_beat=10 ** 6), 'music'),
    'valid': (lambda c: c.update(valid='low'), 'music'),
    'planes': (lambda c: c['meta'].update(onsets=False), '177 units'),
}
BAD_FILES = {
    'cut': lambda path: os.truncate(path, path.stat().st_size - 100),
    'cut short': lambda path: os.truncate(path, 30),
    'empty': lambda path: os.truncate(path, 0),
    'one bit': lambda path: flip(path, 2),
    'one bit of the names': lambda path: flip(path, -100),
    'garbage behind': lambda path: path.write_bytes(path.read_bytes() + b'garbage'),
    'bomb': lambda path: rezip(path, zipfile.ZIP_DEFLATED, [('archive/data/999', bytes(10 ** 8))]),
    'folder': lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize('change', [*BAD_CHECKPOINTS, *BAD_FILES])
def test_checkpoint_that_is_not_one_is_refused(trained, tmp_path, monkeypatch, capsys, change):
    path, named = tmp_path / 'bad.pt', ''
    shutil.copy(trained[2]['rwkv'][1], path)
    if change in BAD_FILES:
        BAD_FILES[change](path)
    else:
        content = torch.load(path, weights_only=True)
        make, named = BAD_CHECKPOINTS[change]
        make(content)
        torch.save(content, path)
    monkeypatch.setattr(sys, 'argv', ['sample.py', f'--ckpt={path}', '--length=1'])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SystemExit) as stop:
        sample.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count('\n') == 1 and 'bad.pt' in message and named in message, message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000       # kilobytes


SVG = '{http://www.w3.org/2000/svg}'
TUNE = [[39, 0, 2], [43, 0, 2], [51, 0, 1], [53, 1, 1.5], [51, 1.5, 2], [39, 2, 4], [43, 2, 4], [56, 2, 4]]


def drawn(path, name):
    """Number of notes drawn in the colour of this class."""
    return sum(p.get('d').count('M') for p in ET.parse(path).iter(SVG + 'path') if p.get('class') == name)


def contrast(a, b):
    """Contrast ratio of two colours '#rrggbb' by the WCAG 2 formula."""
    def light(colour):
        rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        return (0.2126, 0.7152, 0.0722) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize('onset', (0, 1.5))  # the strongest and the weakest beat
@pytest.mark.parametrize('key', (0, 3, 7, 12, 24, 31, 39, 48, 55, 63, 75, 87))
def test_render_loudest_partial_is_the_key(key, onset):
    sound = render.synthesise([[key, onset, onset + 2]])[int(onset * 22050):][:44100]
    for side in (sound[:, 0], sound[:, 1], sound.sum(1)):
        spectrum = np.abs(np.fft.rfft(side * np.hanning(len(side)), 1 << 18))
        heard = spectrum.argmax() * 44100 / (1 << 18)
        wanted = 440 * 2 ** ((key + 21 - 69) / 12)
        assert abs(12 * math.log2(heard / wanted)) < 0.5  # semitones


def test_render_each_note_of_a_tune_is_heard():
    keys = [51, 53, 55, 56, 58, 60, 62, 63]
    sound = render.synthesise([[key, i, i + 1] for i, key in enumerate(keys)], tempo=120).sum(1)
    for i, key in enumerate(keys):
        part = sound[i * 22050:(i + 1) * 22050]
        heard = np.abs(np.fft.rfft(part * np.hanning(len(part)), 1 << 18)).argmax() * 44100 / (1 << 18)
        assert abs(12 * math.log2(heard / (440 * 2 ** ((key - 48) / 12)))) < 0.5


def test_render_silence_is_silent():
    assert render.synthesise([]).shape == (0, 2)
    sound = render.synthesise([[40, 2, 3], [44, 20, 21]])  # half a second a beat
    assert sound.dtype == np.float32 and not sound[:44100].any() and sound[44100:66150].any()
    assert not sound[int(3.5 * 44100):10 * 44100].any() and sound[10 * 44100:].any()
    assert not sound[-1].any() and np.abs(sound[-4410:]).max() < 1e-3


def test_render_never_clips_and_repeats_itself():
    notes = [[key, 0, 2] for key in range(20, 60, 2)]
    sound = render.synthesise(notes)
    assert 0.5 < np.abs(sound).max() <= 0.9001 and np.abs(sound.mean(0)).max() < 1e-3
    assert np.array_equal(sound, render.synthesise(notes))


def test_render_no_click_where_notes_begin_and_end():
    notes = np.array([[48, 0, 1], [48, 1, 2], [52, 2, 2.5], [48, 3, 5]])
    sound = render.synthesise(notes).astype(float)
    step = np.abs(np.diff(sound, axis=0)).max(1)
    near = np.zeros(len(step), dtype=bool)
    for beats in notes[:, 1:].ravel():
        at = int(round(beats * 22050))
        near[max(at - 40, 0):at + 40] = True
    assert step[near].max() <= step[~near].max()
    # a click is wide band: above 14 kHz, where no partial is, there is nothing but the rounding to 16 bits
    spectrum = np.fft.rfft(sound, axis=0)
    spectrum[np.fft.rfftfreq(len(sound), 1 / 44100) < 14000] = 0
    assert np.abs(np.fft.irfft(spectrum, axis=0)).max() < 2 / 32767


def test_render_beats_melody_and_sides():
    def level(notes, at, seconds=0.3):
        part = render.synthesise(notes)[int(at * 44100):int((at + seconds) * 44100)].astype(float)
        return np.sqrt((part ** 2).mean(0))

    accents = [[48, i * 4 + at, i * 4 + at + 0.5] for i, at in enumerate((0, 1, 2.5))]
    bar, beat, off = [level(accents, t).sum() for t in (0, 2.5, 5.25)]
    assert bar > 1.1 * beat > 1.2 * off
    low, high = level([[10, 0, 1]], 0), level([[80, 0, 1]], 0)
    assert low[0] > low[1] and high[1] > high[0]
    pair = render.synthesise([[40, 0, 1], [56, 0, 1]]).sum(1)[:22050]
    spectrum = np.abs(np.fft.rfft(pair * np.hanning(len(pair))))  # 2 Hz a bin
    f = 440 * 2 ** ((np.array([40, 56]) - 48) / 12)
    chord, melody = [spectrum[int(x / 2) - 3:int(x / 2) + 4].max() for x in f]
    assert melody > chord


def test_render_tone_decays_faster_the_higher():
    tone = render.piano_tone(36, 0.85, 2, 44100)
    first, later = [np.abs(np.fft.rfft(tone[at:at + 22050] * np.hanning(22050))) for at in (0, 66150)]
    f = 440 * 2 ** ((36 - 48) / 12)
    kept = [later[int(n * f / 2) - 4:int(n * f / 2) + 5].max() / first[int(n * f / 2) - 4:int(n * f / 2) + 5].max()
            for n in (1, 3, 6)]
    assert 1 > kept[0] > kept[1] > kept[2]


def test_render_wav_file(tmp_path):
    path = tmp_path / 'a.wav'
    render.write_wav(TUNE, path, tempo=60)
    with wave.open(str(path)) as f:
        assert (f.getnchannels(), f.getsampwidth(), f.getframerate(), f.getcomptype()) == (2, 2, 44100, 'NONE')
        assert 4 < f.getnframes() / 44100 < 5.5
        samples = np.frombuffer(f.readframes(f.getnframes()), '<i2').reshape(-1, 2)
    assert np.array_equal(samples, np.round(render.synthesise(TUNE, 60) * 32767))
    assert [p.name for p in tmp_path.iterdir()] == ['a.wav']
    render.write_wav([], tmp_path / 'empty.wav')
    with pytest.raises(data.UserError, match='minutes'):
        render.write_wav([[40, 0, 1e6]] + [[40, 1e6, 1e6 + 1]], path)
    with pytest.raises(data.UserError, match='cannot write'):
        render.write_wav(TUNE, tmp_path / 'none' / 'a.wav')


def test_render_melody_is_the_highest_at_its_onset():
    assert render.is_melody(TUNE).tolist() == [False, False, True, True, True, False, False, True]
    # below a held note it is no melody, after that note it is
    assert render.is_melody([[40, 0, 1], [30, 0.5, 2], [30, 1, 2], [35, 0.5, 1]]).tolist() == [True, False, True, False]
    assert len(render.is_melody([])) == 0


def test_render_piano_roll(tmp_path):
    path = tmp_path / 'a.svg'
    render.write_svg(TUNE, path, title='<Fish & "Chips">\0')
    root = ET.parse(path).getroot()
    assert root.find(SVG + 'title').text == '<Fish & "Chips">'
    assert (drawn(path, 'line0'), drawn(path, 'line1')) == (4, 4)  # melody, chords
    texts = ''.join(root.itertext())
    assert 'C4' in texts and 'C5' in texts and 'C3' not in texts and 'C6' not in texts
    assert 'prompt' not in [r.get('class') for r in root.iter(SVG + 'rect')]
    render.write_svg(TUNE, path, prompt_beats=2)
    (ground,) = [r for r in ET.parse(path).iter(SVG + 'rect') if r.get('class') == 'prompt']
    assert float(ground.get('width')) == 448  # half of the only bar
    render.write_svg([], path)
    assert drawn(path, 'line0') == drawn(path, 'line1') == 0
    assert [p.name for p in tmp_path.iterdir()] == ['a.svg']


@pytest.mark.parametrize('beats_per_bar', (3, 4))
def test_render_long_tunes_wrap_and_stay_small(tmp_path, beats_per_bar):
    path = tmp_path / 'a.svg'
    beats = 64 * beats_per_bar
    notes = [[51 + i % 12, i / 2, i / 2 + 0.5] for i in range(2 * beats)]
    notes += [[27 + k, i, i + beats_per_bar] for i in range(0, beats, beats_per_bar) for k in (0, 4, 7)]
    render.write_svg(notes, path, beats_per_bar, prompt_beats=17 * beats_per_bar)
    assert drawn(path, 'line0') == 2 * beats and drawn(path, 'line1') == 192
    assert path.stat().st_size < 30_000
    root = ET.parse(path).getroot()
    assert len([r for r in root.iter(SVG + 'rect') if r.get('class') == 'white edge']) == 4  # keyboards
    widths = [float(r.get('width')) for r in root.iter(SVG + 'rect') if r.get('class') == 'prompt']
    assert widths == [896, 56]
    assert [str(n) in [t.text for t in root.iter(SVG + 'text')] for n in (2, 16, 64, 65)] == [True, True, True, False]
    render.write_svg([[40, 15 * beats_per_bar, 17 * beats_per_bar]], path, beats_per_bar)
    assert drawn(path, 'line0') == 2  # a note over the end of a line is drawn in both


def test_render_colours_are_readable_on_both_pages():
    light, dark = render.STYLE.split('@media(prefers-color-scheme:dark)')
    for page, style, colours in (('#ffffff', light, render.LIGHT), ('#0d1117', dark, render.DARK)):
        texts = re.findall(r'(?:text|title)\{[^}]*fill:(#\w{6})', style)
        assert len(texts) == 2
        assert all(contrast(colour, page) > 4.5 for colour in texts + colours)
    assert contrast(render.LIGHT[0], '#dfdfdf') > 3 and contrast(render.DARK[1], '#2a2d32') > 3  # on the prompt's ground


def test_render_terminal_roll():
    notes = [[39, 0, 2], [43, 0, 1], [43, 1, 2], [40, 2, 4], [39, 2, 3]]
    assert render.terminal_roll(notes).split('\n') == ['    ▗▗', '', 'C4  ▗▄▐▀', 'beats 1 to 4 of 4, 1 column a beat']
    assert render.terminal_roll([]) == '(no notes)'
    assert render.terminal_roll([[0, 100, 100.5], [87, 100.5, 102]]).endswith('beats 101 to 102 of 102, 2 columns a beat')
    thirds = render.terminal_roll([[k % 88, k / 3, k / 3 + 5] for k in range(300)], width=40)
    assert max(map(len, thirds.split('\n'))) <= 40 and '3 columns a beat' in thirds


def write_run(path, losses, interval=500):
    table = ['iter,minutes,valid,train,lr,frames_per_second,test']
    for i, loss in enumerate(losses):
        table += [f'{i * interval},{i * 0.7},{loss},,,,', f'{i * interval + 50},{i * 0.7 + 0.1},,2.5,0.001,9000,']
    path.write_text('\n'.join(table) + '\n')


def test_render_loss_chart(tmp_path):
    assert render.draw_losses(tmp_path) is None and not list(tmp_path.iterdir())
    write_run(tmp_path / 'rwkv.csv', [20.5, 2.6, 2.2, 2.0, 1.95, 1.96])
    write_run(tmp_path / 'lstm & <co>.csv', [20.4, 2.7, 2.3, 2.1, 2.0, 1.965])
    (tmp_path / 'foreign.csv').write_text('a,b\n1,2\n')
    (tmp_path / 'binary.csv').write_bytes(b'iter,minutes,valid\n\xff\0\xfe')
    (tmp_path / 'folder.csv').mkdir()
    path = render.draw_losses(tmp_path)
    assert path == tmp_path / 'loss.svg' and not list(tmp_path.glob('*.part'))
    root = ET.parse(path).getroot()
    texts = [t.text for t in root.iter(SVG + 'text')]
    assert texts.count('rwkv 1.950') == texts.count('lstm & <co> 1.965') == 2  # in both panels
    assert 'iterations' in texts and 'minutes' in texts and not re.search('foreign|binary|folder', ' '.join(texts))
    ends = [float(t.get('y')) for t in root.iter(SVG + 'text') if (t.get('class') or '').startswith('text')]
    assert all(abs(a - b) >= 12 for a, b in (ends[:2], ends[2:]))
    ticks = [float(t) for t in texts if re.fullmatch(r'\d\.\d+', t)]
    assert 1.5 < min(ticks) and max(t for t in ticks if t < 20) < 4.5  # the untrained 20 does not flatten the rest


@pytest.mark.parametrize('one', (20.25, 0.25))  # all others end at the bottom, or at the top
def test_render_loss_chart_of_odd_tables(tmp_path, one):
    write_run(tmp_path / 'nan.csv', [20, float('nan'), 2.0, float('inf')])
    write_run(tmp_path / 'one.csv', [one])
    write_run(tmp_path / 'none.csv', [float('nan')])
    for i in range(30):
        write_run(tmp_path / f'run{i:02}.csv', [20, 2.5, 2.0])
    root = ET.parse(render.draw_losses(tmp_path)).getroot()
    texts = [t for t in root.iter(SVG + 'text') if (t.get('class') or '').startswith('text')]
    assert len(texts) == 64 and 'nan 2.000' in [t.text for t in texts] and f'one {one:.3f}' in [t.text for t in texts]
    heights = sorted(float(t.get('y')) for t in texts)[::2]
    assert np.diff(heights).min() >= 12 and heights[0] > 25 and heights[-1] < float(root.get('height'))
    assert 'nan' not in ''.join(p.get('d') for p in root.iter(SVG + 'path'))


if __name__ == '__main__':  # python test_model.py 20000 [folder]: so many mutated files, in a folder that is kept
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(survive(int(sys.argv[1]), Path(*(sys.argv[2:] or [temporary])))))
