"""What you hear and see of a tune: a WAV file, a piano roll as SVG or in the terminal, and a chart of the losses.

Notes are rows (key 0..87, onset, end) with times in beats, as in data.py. Sound and pictures need numpy alone.
"""
import csv, io, math, wave
from html import escape
from pathlib import Path

import numpy as np

from data import KEYS, UserError, write_whole

LONGEST = 20 * 60  # seconds of sound in one WAV file; 0.2 GB, and about ten times that in memory
NAMES = 'A A# B C C# D D# E F F# G G#'.split()


def _rows(notes):
    return np.asarray(notes, dtype=np.float64).reshape(-1, 3)


def is_melody(notes):
    """(N, 3) notes to (N,) booleans: a note is melody if nothing higher sounds, or starts with it, at its onset."""
    notes = _rows(notes)
    melody, until = np.zeros(len(notes), dtype=bool), np.full(KEYS + 1, -np.inf)  # when each key falls silent
    for i in np.lexsort((-notes[:, 0], notes[:, 1])):  # at one onset the highest comes first
        key, onset, end = int(notes[i, 0]), notes[i, 1], notes[i, 2]
        melody[i] = until[key + 1:].max() <= onset + 1e-6
        until[key] = max(until[key], end)
    return melody


# --------------------------------------------------------------------------------------------------- sound

def piano_tone(key, velocity, seconds, rate):
    """A struck string that nobody damps: (samples,) float32. All keys have the same power; velocity 0..1 brightens.

    Partials: f_n = n f_1 sqrt((1 + B n^2) / (1 + B)), the stiff string (Fletcher, JASA 36, 1964).
    Strength: sin(pi n / 8) / n^1.6, a hammer at an eighth of the string, times what its felt lets through.
    Decay: the higher the partial the faster, and first fast, then slow, as when the two strings of a key, hardly out
    of tune, move first with and then against each other (Weinreich, JASA 62, 1977).
    """
    first = 440 * 2 ** ((key - 48) / 12)  # Hz
    stiffness = 1e-4 + 2e-4 * 2 ** ((key - 40) / 8)
    n = np.arange(1, 65)
    f = first * n * np.sqrt((1 + stiffness * n ** 2) / (1 + stiffness))
    strength = np.sin(np.pi * n / 8) / n ** 1.6 * np.exp(-(f - first) / (1000 + 3000 * velocity))
    heard = (f < 10_000) & (np.abs(strength) > 1e-3 * strength[0])
    f, strength = f[heard], strength[heard] / np.sqrt(np.sum(strength[heard] ** 2))
    damping = 0.4 + f / 600  # 1/s
    z = (2j * np.pi * np.concatenate([f, 1.0003 * f]) - np.concatenate([2 * damping, damping / 2])) / rate
    strength = np.concatenate([0.7 * strength, 0.3 * strength])
    # e^(z (512 a + b)) = e^(512 z a) e^(z b), so the sum of all partials is a matrix product
    blocks = strength * np.exp(512 * z * np.arange(math.ceil(seconds * rate / 512))[:, None])  # (blocks, partials)
    steps = np.exp(z[:, None] * np.arange(512))  # (partials, 512)
    tone = (blocks.real @ steps.imag + blocks.imag @ steps.real).ravel().astype(np.float32)
    attack = int((0.008 - 0.005 * key / KEYS) * rate)
    tone[:attack] *= np.sin(np.linspace(0, np.pi / 2, attack)) ** 2
    return tone


def room(rate):
    """Impulse response (2, samples) of a small room: early echoes, then noise that falls by 60 dB in 0.7 s."""
    t = np.arange(int(0.7 * rate)) / rate
    f = np.fft.rfftfreq(len(t), 1 / rate)
    noise = np.random.default_rng(0).standard_normal((2, len(t)))
    noise = np.fft.irfft(np.fft.rfft(noise) * f / (f + 500) / (1 + f / 3000), len(t))  # no rumble, no hiss
    response = 0.008 * noise * np.exp(-6.9 * t / 0.7) * np.clip((t - 0.02) / 0.03, 0, 1)
    for side, echoes in enumerate(((11, 23, 37), (13, 19, 41))):
        for ms in echoes:
            response[side, ms * rate // 1000] += 1.2 / ms
    return response * (1 - t / t[-1])


def synthesise(notes, tempo=120.0, beats_per_bar=4, rate=44100):
    """Play notes (N, 3) on a kind of piano: (samples, 2) float32 in [-0.9, 0.9], in steps of 1/32767 as in a file.

    Tempo in beats a minute. Beats are louder than what lies between them, the first of a bar is the loudest, the
    melody is above the chords, low keys are to the left. Raises UserError for more than 20 minutes.
    """
    notes = _rows(notes)
    if not len(notes):
        return np.zeros((0, 2), dtype=np.float32)
    keys, onset = notes[:, 0].astype(int), notes[:, 1]
    start = np.round(onset * 60 / tempo * rate)
    held = np.round(np.clip((notes[:, 2] - onset) * 60 / tempo, 0.02, 12) * rate)  # by 12 s a string has died down
    if not (start + held).max() <= LONGEST * rate:
        raise UserError(f'the tune lasts more than {LONGEST // 60} minutes at tempo {tempo:g}, too long for a WAV '
                        'file: shorten it or raise the tempo')
    start, held = start.astype(int), held.astype(int)
    beat = np.round(onset)
    velocity = np.where(np.abs(onset - beat) > 0.05, 0.7, np.where(beat % beats_per_bar > 0, 0.85, 1.0))
    angle = np.pi / 4 + (keys - 44) / KEYS * np.pi / 5  # equal-power panning
    gain = velocity * np.where(is_melody(notes), 1.0, 0.5) * np.stack([np.cos(angle), np.sin(angle)])  # (2, N)

    answer, release, size = room(rate), int(0.15 * rate), 1 << 17
    dry = (start + held).max() + release
    sound = np.zeros((2, dry + answer.shape[1]), dtype=np.float32)
    damper = np.cos(np.linspace(0, np.pi / 2, release)) ** 2
    for key, v in sorted(set(zip(keys, velocity))):
        which = np.flatnonzero((keys == key) & (velocity == v))
        tone = piano_tone(key, v, (held[which].max() + release) / rate, rate)
        for i in which:
            note = tone[:held[i] + release].copy()
            note[held[i]:] *= damper
            sound[:, start[i]:start[i] + len(note)] += gain[:, i, None].astype(np.float32) * note

    # the room answers to the sum of both sides: convolution by FFT, overlap and add, from the last piece to the
    # first, so that what is added never lies in a piece still to be read
    piece, spectrum = size - answer.shape[1], np.fft.rfft(answer, size)
    for at in reversed(range(0, dry, piece)):
        source = sound[:, at:min(at + piece, dry)].mean(0)
        if source.any():
            sound[:, at:at + size] += np.fft.irfft(np.fft.rfft(source, size) * spectrum, size)[:, :sound.shape[1] - at]
    sound *= 0.9 * 32767 / max(sound.max(), -sound.min())
    np.round(sound, out=sound)  # which also makes zeros of the 1e-17 that an FFT leaves of silence
    return np.divide(sound, 32767, out=sound).T


def write_wav(notes, path, tempo=120.0, beats_per_bar=4):
    """Write notes (N, 3) as sound: stereo, 44.1 kHz, 16 bit. See synthesise. Raises UserError if it cannot."""
    buffer = io.BytesIO()
    with wave.open(buffer, 'wb') as f:
        f.setnchannels(2)
        f.setsampwidth(2)
        f.setframerate(44100)
        f.writeframes(np.round(synthesise(notes, tempo, beats_per_bar) * 32767).astype('<i2').tobytes())
    write_whole(path, buffer.getvalue())


# ------------------------------------------------------------------------------------------------ pictures

# Text has a contrast of 4.5:1 or more to a white page and to a dark one, lines of colour too; the greys serve both.
STYLE = '''path{fill:none}text{fill:#57606a;font:11px sans-serif}.title{font-size:14px;fill:#1f2328}
.end{text-anchor:end}.mid{text-anchor:middle}.white{fill:#fff}.prompt{fill:#808080;fill-opacity:.25}.black{stroke:#333}
.edge,.grid,.row{stroke:#808080}.grid{stroke-opacity:.35}.row{stroke-opacity:.1}
%s@media(prefers-color-scheme:dark){text{fill:#9aa4af}.title{fill:#e6edf3}%s}'''
LIGHT = '#c2410c #2563eb #15803d #a21caf #0e7490 #854d0e'.split()
DARK = '#fb923c #60a5fa #4ade80 #e879f9 #22d3ee #facc15'.split()


def _text(text, length):
    """At most so many characters, without those that XML cannot hold."""
    text = ''.join(c for c in text if c.isprintable())
    return escape(text if len(text) <= length else text[:length - 1] + '…')


def _svg(width, height, title, body):
    style = STYLE % tuple(''.join(f'.line{i}{{stroke:{c}}}.text{i}{{fill:{c}}}' for i, c in enumerate(colours))
                          for colours in (LIGHT, DARK))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img"><title>{title}</title><style>{style}</style>\n' + '\n'.join(body) + '\n</svg>\n').encode()


def _n(x):
    return f'{x:.1f}'.removesuffix('.0')


def write_svg(notes, path, beats_per_bar=4, prompt_beats=0.0, title=''):
    """Draw notes (N, 3) as a piano roll, 16 bars to a line: time in bars, melody and chords in two colours.

    The first prompt_beats stand on a shaded ground. Raises UserError if the file cannot be written."""
    notes, title = _rows(notes), _text(title, 80)
    melody = is_melody(notes)
    low, high = (int(notes[:, 0].min()), int(notes[:, 0].max())) if len(notes) else (39, 50)
    low, high = max(0, low - (low - 3) % 12), min(KEYS, high - (high - 3) % 12 + 12)  # octaves from C to B, high is out
    bars = max(1, math.ceil(notes[:, 2].max(initial=prompt_beats) / beats_per_bar - 1e-6))
    step, left, in_line = 5, 58, min(16, bars)  # pixels a key, pixels before the first bar, bars
    bar = 896 / in_line  # pixels
    tall = (high - low) * step
    body = [f'<text class="title" x="{left}" y="16">{title}</text><text class="end" x="{left + 896}" y="16">'
            '<tspan class="text0">■</tspan> melody <tspan class="text1">■</tspan> chords' +
            ' <tspan class="prompt edge">■</tspan> prompt' * (prompt_beats > 0) + '</text>']
    for line in range(math.ceil(bars / in_line)):
        top, begin, count = 28 + line * (tall + 34), line * in_line, min(in_line, bars - line * in_line)
        right = left + count * bar

        def x(beats):
            return left + (beats / beats_per_bar - begin) * bar

        def y(key):  # the middle of its row; minus a half: its lower edge
            return _n(top + (high - key - 0.5) * step)

        def draw(name, marks, width=1):
            body.append(f'<path class="{name}" stroke-width="{width}" d="{"".join(marks)}"/>')

        asked = min(x(prompt_beats), right) - left
        if prompt_beats > 0 and asked > 0:
            body.append(f'<rect class="prompt" x="{left}" y="{top}" width="{_n(asked)}" height="{tall}"/>')
        black = [k for k in range(low, high) if '#' in NAMES[k % 12]]
        octaves = [k for k in range(low, high) if k % 12 == 3]
        draw('row', [f'M{left} {y(k)}H{_n(right)}' for k in black], step)
        draw('grid', [f'M{_n(left + i * bar)} {top}v{tall}' for i in range(count + 1)])
        draw('edge', [f'M{left} {y(k - 0.5)}H{_n(right)}' for k in (*octaves, low, high)])
        body.append(f'<rect class="white edge" x="{left - 32}" y="{top}" width="31" height="{tall}"/>')
        between = [k - 0.5 for k in range(low, high) if NAMES[k % 12] in 'CF']  # white keys without a black one between
        draw('edge', [f'M{left - 32} {y(k)}h31' for k in black + between], 0.7)
        draw('black', [f'M{left - 32} {y(k)}h19' for k in black], step - 1)
        body += [f'<text class="end" x="{left - 36}" y="{y(k - 0.5)}">C{(k + 9) // 12}</text>' for k in octaves]
        body += [f'<text x="{_n(left + i * bar + 2)}" y="{top + tall + 12}">{"" if i else "bar "}{begin + i + 1}</text>'
                 for i in range(count)]
        here = (x(notes[:, 1]) < right - 1e-3) & (x(notes[:, 2]) > left + 1e-3)
        for colour, part in enumerate((melody, ~melody)):
            spans = [(key, max(x(onset), left), min(x(end), right)) for key, onset, end in notes[here & part]]
            # a pixel less than its length tells a note from the next one on its key
            marks = [f'M{_n(a + 0.5)} {y(key)}h{_n(max(b - a - 1, 1))}' for key, a, b in spans]
            draw(f'line{colour}', marks, step - 0.5)
    write_whole(path, _svg(left + 902, 28 + math.ceil(bars / in_line) * (tall + 34), title or 'piano roll', body))


def terminal_roll(notes, width=80):
    """The start of a tune as text: two keys a line, time to the right, a gap where a note is struck; and a caption."""
    notes = _rows(notes)
    if not len(notes):
        return '(no notes)'
    # the coarsest grid on which the onsets lie shows the most of the tune
    off = {grid: np.abs(notes[:, 1] * grid - np.round(notes[:, 1] * grid)) for grid in (1, 2, 3, 4)}
    grid = next((grid for grid in off if np.mean(off[grid] < 0.1) > 0.95), 4)
    columns, first = max(1, width - 4), math.floor(notes[:, 1].min())
    begin = np.round((notes[:, 1] - first) * grid).astype(int)
    end = np.maximum(np.round((notes[:, 2] - first) * grid).astype(int), begin + 1)
    seen = begin < columns
    keys = notes[:, 0].astype(int)
    low, high = keys[seen].min(), keys[seen].max()
    low -= (low - 3) % 2  # C is the lower key of its line
    cells = np.zeros(((high - low) // 2 * 2 + 2, columns), dtype=int)  # 0 silent, 1 struck, 2 held
    for key, a, b in zip(keys[seen] - low, begin[seen], end[seen]):
        cells[key, a:b] = 2
        cells[key, a] = 1
    lines = []
    for i in range(len(cells) - 2, -1, -2):
        name = f'{NAMES[(low + i) % 12]}{(low + i + 9) // 12}' if i == 0 or (low + i) % 12 == 3 else ''
        line = ''.join(' ▝▀▗▐▜▄▟█'[upper + 3 * lower] for lower, upper in zip(*cells[i:i + 2]))
        lines.append(f'{name:<4}{line}'.rstrip())
    beats = math.ceil(end.max() / grid)
    return '\n'.join([*lines, f'beats {first + 1} to {first + max(1, min(beats, columns // grid))} of {first + beats}, '
                              f'{grid} column{"s" * (grid > 1)} a beat'])


def _losses(path):
    """(points, 3) iterations, minutes and validation losses of a table that train.py wrote; no points if it did not."""
    points = []
    try:
        with open(path, newline='', encoding='utf-8') as f:
            for row in csv.DictReader(f):
                try:
                    points.append([float(row[name]) for name in ('iter', 'minutes', 'valid')])
                except (KeyError, TypeError, ValueError):  # another table, or a row without validation
                    continue
    except (OSError, UnicodeDecodeError, csv.Error):
        points = []
    points = np.array(points).reshape(-1, 3)
    return points[np.isfinite(points).all(1)]


def _ticks(low, high, most):
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart, and how to write them."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= (high - low) / most * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    marks = range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)
    return [(i * step, f'{i * step:,.{digits}f}') for i in marks]


def draw_losses(folder):
    """Draw folder/loss.svg from the .csv tables that train.py wrote there: validation loss by iterations and minutes.

    Returns its path, or None if no .csv there is such a table. Raises UserError if it cannot be written."""
    runs = [(path.stem, _losses(path)) for path in sorted(Path(folder).glob('*.csv'))]
    # the untrained model is so far above that a line from there would be a wall
    runs = [(name, points[points[:, 0] > 0] if points[-1, 0] > 0 else points) for name, points in runs if len(points)]
    if not runs:
        return None
    colour = {name: i % len(LIGHT) for i, (name, _) in enumerate(runs)}
    runs.sort(key=lambda run: -run[1][-1, 2])  # from the top of the chart to the bottom
    labels = [f'{_text(name, 24)} {points[:, 2].min():.3f}' for name, points in runs]
    # zoom to where the curves end up: the first tenth of a run falls from far above and would flatten the rest
    late = np.concatenate([p[p[:, 0] >= min(p[-1, 0], p[:, 0].max() / 10 + 1), 2] for _, p in runs])
    margin = 0.05 * (late.max() - late.min()) or 0.1
    low, high = late.min() - margin, late.max() + margin
    top, left, tall = 34, 44, max(280, 14 * len(runs))
    wide = 480 - left - 22 - 6.3 * (min(24, max(len(name) for name, _ in runs)) + 6)  # the labels stand to the right

    def y(loss):
        return top + (high - loss) / (high - low) * tall

    # a label stands where its line ends, and moves where it would touch another: first down, then up from the bottom
    at = [y(points[-1, 2]) for _, points in runs]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + 14)
    at[-1] = min(at[-1], top + tall)
    for i in reversed(range(len(at) - 1)):
        at[i] = min(at[i], at[i + 1] - 14)

    body = ['<text class="title" x="8" y="16">validation loss in nats/frame, and the lowest of each run</text>']
    for panel, unit in enumerate(('iterations', 'minutes')):
        last = max(points[:, panel].max() for _, points in runs) or 1.0
        body.append(f'<svg x="{480 * panel}" width="480" height="{top + tall + 40}">')
        for loss, name in _ticks(low, high, 6):
            body.append(f'<path class="grid" d="M{left} {_n(y(loss))}h{_n(wide)}"/>'
                        f'<text class="end" x="{left - 6}" y="{_n(y(loss) + 4)}">{name}</text>')
        for tick, name in _ticks(0, last, 5):
            x = _n(left + tick / last * wide)
            body.append(f'<path class="edge" d="M{x} {top + tall}v4"/>'
                        f'<text class="mid" x="{x}" y="{top + tall + 16}">{name}</text>')
        body.append(f'<path class="edge" d="M{left} {top + tall}h{_n(wide)}"/>'
                    f'<text class="mid" x="{_n(left + wide / 2)}" y="{top + tall + 32}">{unit}</text>')
        for (name, points), label, height in zip(runs, labels, at):
            x, c = points[:, panel] / last * wide, colour[name]
            line = ' '.join(f'{_n(a)} {_n(b - top)}' for a, b in zip(x, y(points[:, 2])))
            end = f'M{_n(left + x[-1])} {_n(y(points[-1, 2]))}'
            body.append(f'<svg x="{left}" y="{top}" width="{_n(wide)}" height="{tall}">'  # cuts off what leaves it
                        f'<path class="line{c}" stroke-width="2" d="M{line}"/></svg>'
                        f'<path class="line{c}" stroke-width="6" stroke-linecap="round" d="{end}h0"/>'
                        f'<path class="grid" d="{end}L{_n(left + wide + 10)} {_n(height)}"/>'
                        f'<text class="text{c}" x="{_n(left + wide + 14)}" y="{_n(height + 4)}">{label}</text>')
        body.append('</svg>')
    path = Path(folder) / 'loss.svg'
    write_whole(path, _svg(960, top + tall + 40, 'validation loss', body))
    return path
