"""What you hear and see of a tune: a WAV file, a piano roll as SVG or in the terminal, and a chart of the losses.

Notes are rows (key 0..87, onset, end) with times in beats, as in notation.py. Bars come as a metre ('4/4', '6/8') and a
pickup: the beat where the first full bar begins.
"""

import csv
import io
import math
import wave
from html import escape
from pathlib import Path

import numpy as np

from notation import UserError
from notation import as_notes
from notation import bar_beats
from notation import is_melody
from notation import write_whole

# ---------------------------------------------------------------------------------------------------------------------
# Sound

RATE = 44100            # samples a second
LONGEST = 20 * 60       # seconds of sound in one WAV file: 0.2 GB, and about ten times that in memory


def piano_tone(key, velocity, seconds):
    """A struck string that nobody damps: (samples,) float32. All keys have the same power; velocity 0..1 brightens.

    Partials: f_n = n f_1 sqrt((1 + B n^2) / (1 + B)), the stiff string (Fletcher, JASA 36, 1964).
    Strength: sin(pi n / 8) / n^1.6, a hammer at an eighth of the string, times what its felt lets through.
    Decay: the higher the partial the faster, and first fast, then slow, as when the two strings of a key, hardly out
    of tune, move first with and then against each other (Weinreich, JASA 62, 1977).
    """
    first = 440 * 2 ** ((key - 48) / 12)
    stiffness = 1e-4 + 2e-4 * 2 ** ((key - 40) / 8)
    n = np.arange(1, 65)
    stretched = np.sqrt((1 + stiffness * n ** 2) / (1 + stiffness))
    f = first * n * stretched
    hammer = np.sin(np.pi * n / 8) / n ** 1.6
    felt = np.exp((first - f) / (1000 + 3000 * velocity))
    strength = hammer * felt * (f < 10_000)
    strength /= np.linalg.norm(strength)
    damping = 0.4 + f / 600
    # e^(z (512 a + b)) = e^(512 z a) e^(z b), so the sum of all partials is a matrix product
    a = np.arange(math.ceil(seconds * RATE / 512))
    b = np.arange(512)
    tone = 0
    strings = ((0.7, 1, 2), (0.3, 1.0003, 0.5))
    for share, tuning, decay in strings:
        z = (2j * np.pi * tuning * f - decay * damping) / RATE
        partials = share * strength * np.exp(512 * np.outer(a, z))
        samples = partials @ np.exp(np.outer(z, b))
        tone = tone + samples.imag.ravel()
    # the hammer takes 6 ms
    tone[:250] *= fade_in(250)
    return tone.astype(np.float32)


def fade_in(samples):
    """Factors that rise smoothly from 0 to 1, (samples,)."""
    return np.sin(np.linspace(0, np.pi / 2, samples)) ** 2


def add_room(sound):
    """Adds to sound (2, samples) what a small room answers: noise that falls by 60 dB in 0.7 s, other for each ear."""
    t = np.arange(int(0.7 * RATE)) / RATE
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, len(t)))
    answer = 0.004 * noise * np.exp(-6.9 * t / 0.7)
    # a convolution is a product of spectra; those of whole seconds are quick to work out, since RATE has small factors
    length = sound.shape[1]
    seconds = math.ceil((length + len(t)) / RATE)
    size = seconds * RATE
    spectrum = np.fft.rfft(sound.mean(0), size)
    for side, response in zip(sound, answer):
        product = spectrum * np.fft.rfft(response, size)
        side += np.fft.irfft(product)[:length]


def accents(onset, metre, pickup):
    """How hard notes are struck, (N,): 1 where a bar begins, 0.85 on its other beats, 0.7 between them."""
    bar = bar_beats(metre)
    count = int(metre.split('/')[0])
    # in 6/8, 9/8 and 12/8 three eighths are a beat
    beat = bar / count * (3 if count in (6, 9, 12) else 1)
    # players are never quite on the beat
    place = onset - pickup + 0.05
    begins_bar = place % bar < 0.1
    on_beat = place % beat < 0.1
    return np.select([begins_bar, on_beat], [1.0, 0.85], 0.7)


def synthesise(notes, tempo=120.0, metre='4/4', pickup=0.0):
    """Play notes (N, 3) on a kind of piano: (samples, 2) int16, left and right.

    Tempo in quarter notes a minute. Beats are louder than what lies between them, the first of a bar is the loudest,
    the melody is above the chords, low keys are to the left. Raises UserError for more than 20 minutes.
    """
    notes = as_notes(notes)
    if not len(notes):
        return np.zeros((0, 2), dtype=np.int16)
    seconds = notes[:, 1:].T * 60 / tempo
    if not seconds.max() <= LONGEST:
        raise UserError(f'the tune lasts more than {LONGEST // 60} minutes at tempo {tempo:g}, too long for a WAV '
                        'file: shorten it or raise the tempo')
    start, end = np.round(seconds * RATE).astype(int)
    # by 12 s a string has died down
    held = np.clip(end - start, 1000, 12 * RATE)
    velocity = accents(notes[:, 1], metre, pickup)
    loudness = velocity * np.where(is_melody(notes), 1, 0.5)
    # left and right together have the same power, wherever a key lies
    right = 0.3 + 0.4 * notes[:, 0] / 87
    gain = loudness * np.sqrt([1 - right, right])

    damper = fade_in(6000)[::-1]
    samples = max(start + held) + RATE
    sound = np.zeros((2, samples), dtype=np.float32)
    struck = list(zip(notes[:, 0], velocity))
    longest = held.max() / RATE + 1
    tones = {tone: piano_tone(*tone, longest) for tone in set(struck)}
    for tone, begin, length, sides in zip(struck, start, held, gain.T):
        note = tones[tone][:length + len(damper)].copy()
        note[length:] *= damper
        sound[:, begin:begin + len(note)] += np.outer(sides, note)
    add_room(sound)
    sound *= 0.9 * 32767 / np.abs(sound).max()
    return np.round(sound).astype(np.int16).T


def write_wav(notes, path, tempo=120.0, metre='4/4', pickup=0.0):
    """Write notes (N, 3) as sound: stereo, 44.1 kHz, 16 bit. See synthesise. Raises UserError if it cannot."""
    samples = synthesise(notes, tempo, metre, pickup).astype('<i2')
    buffer = io.BytesIO()
    with wave.open(buffer, 'wb') as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    write_whole(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

# Text and lines of colour have a contrast of 4.5:1 or more, to a white page and to a dark one
STYLE = '''svg{color:#57606a;font:11px sans-serif}path{fill:none;stroke:currentColor}text{fill:currentColor}
.title{font-size:14px;color:#1f2328}.end{text-anchor:end}.mid{text-anchor:middle}
.grey{stroke-opacity:.7}.line{stroke-opacity:.4}.prompt{stroke-opacity:.25}
.c0{color:#c2410c}.c1{color:#2563eb}.c2{color:#15803d}.c3{color:#a21caf}.c4{color:#0e7490}.c5{color:#854d0e}
@media(prefers-color-scheme:dark){svg{color:#9aa4af}.title{color:#e6edf3}
.c0{color:#fb923c}.c1{color:#60a5fa}.c2{color:#4ade80}.c3{color:#e879f9}.c4{color:#22d3ee}.c5{color:#facc15}}'''
LEFT = 40               # pixels left of a piano roll ...
WIDTH = 912             # ... and of its widest line, which fills the page of 960


def label(words):
    """The start of a name, without what XML cannot hold."""
    printable = [c for c in words[:24] if c.isprintable()]
    return escape(''.join(printable))


def colour(i):
    """The style of the i-th of several things."""
    return f'c{i % 6}'


class Drawing:
    """An SVG picture that grows downwards; bottom is where the next thing may begin, in pixels."""

    def __init__(self):
        self.elements = []
        self.bottom = 0

    def text(self, x, y, words, style=''):
        """Words that start, end (style 'end') or have their middle ('mid') at x."""
        self.elements.append(f'<text class="{style}" x="{x:g}" y="{y:g}">{words}</text>')

    def strokes(self, style, width, path):
        """Lines of one style and width along an SVG path."""
        self.elements.append(f'<path class="{style}" stroke-width="{width}" d="{path}"/>')

    def svg(self, title):
        """The whole file: bytes."""
        size = f'viewBox="0 0 960 {self.bottom}" width="960" height="{self.bottom}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{title}</title><style>{STYLE}</style>'
        return '\n'.join([head, *self.elements, '</svg>\n']).encode()


def draw_roll(drawing, notes, metre='4/4', pickup=0.0, prompt_beats=0.0, lines=None, styles=('c0', 'c1')):
    """Add notes (N, 3) to a Drawing as a piano roll of 16 bars a line, the first with the pickup before them.

    The first prompt_beats stand on a shaded ground. lines: how many are drawn, of all. styles: of melody and chords."""
    notes = as_notes(notes)
    melody = is_melody(notes)
    bar = bar_beats(metre)
    lead = pickup / bar                 # bars before the first bar line
    beats = notes[:, 2].max(initial=prompt_beats)
    full_bars = (beats - pickup) / bar
    bars = max(1, math.ceil(full_bars - 1e-6))
    pixels = WIDTH / (16 + lead)        # a bar
    # whole octaves, that of middle C among them
    octave = np.append((notes[:, 0] + 9) // 12, 4).astype(int)
    octaves = range(octave.min(), octave.max() + 1)
    for first in range(0, bars, 16)[:lines]:
        begins = first if first else -lead
        last = min(first + 16, bars)
        top = drawing.bottom
        bottom = top + 60 * len(octaves)

        def place(bars):
            """Where so many bars after the first bar line are over, in pixels; bar lines stand below one another."""
            bars = np.clip(bars, begins, last)
            return LEFT + pixels * (lead + bars - first)

        left = place(begins)
        right = place(last)
        prompt = place(prompt_beats / bar - lead)
        if prompt > left:
            drawing.strokes('prompt', bottom - top, f'M{left:g} {(top + bottom) / 2}H{prompt:g}')
        for i, number in enumerate(octaves):
            drawing.strokes('line', 1, f'M{left:g} {bottom - 60 * i}H{right:g}')
            drawing.text(left - 6, bottom - 60 * i, f'C{number}', 'end')
        for number in range(first, last):
            x = place(number)
            drawing.strokes('line', 1, f'M{x:g} {top}V{bottom}')
            drawing.text(x + 2, bottom + 12, number + 1)
        lowest = 12 * octaves[0] - 9.5
        y = bottom - 5 * (notes[:, 0] - lowest)
        begin, end = place(notes[:, 1:].T / bar - lead)
        for style, part in zip(styles, (melody, ~melody)):
            marks = ''
            for i in np.flatnonzero(part & (begin < end)):
                # a pixel less than its length tells a note from the next one on its key
                stop = max(end[i] - 1, begin[i] + 1)
                marks += f'M{begin[i]:.1f} {y[i]:g}H{stop:.1f}'
            drawing.strokes(style, 4.5, marks)
        drawing.bottom = bottom + 30


def write_svg(notes, path, metre='4/4', pickup=0.0, prompt_beats=0.0, title=''):
    """Draw notes (N, 3) as a piano roll, 16 bars a line: melody and chords in two colours.

    The first prompt_beats stand on a shaded ground. Raises UserError if the file cannot be written."""
    drawing = Drawing()
    drawing.text(LEFT, 16, label(title), 'title')
    drawing.text(840, 16, '■ melody', 'c0')
    drawing.text(900, 16, '■ chords', 'c1')
    drawing.bottom = 28
    draw_roll(drawing, notes, metre, pickup, prompt_beats)
    write_whole(path, drawing.svg(label(title)))


def terminal_roll(notes, width=80):
    """The start of a tune as text: a line for each key that is played, four columns a beat."""
    columns = width - 5
    notes = np.round(as_notes(notes) * [1, 4, 4]).astype(int)
    canvas = np.full((88, columns), ' ')
    for key, onset, end in notes:
        canvas[key, onset:end] = '─'
        canvas[key, onset:onset + 1] = '■'
    lines = []
    played = np.flatnonzero((canvas != ' ').any(1))
    for key in played[::-1]:
        letter = 'A A# B C C# D D# E F F# G G#'.split()[key % 12]
        name = f'{letter}{(key + 9) // 12}'
        lines.append(name.ljust(5) + ''.join(canvas[key]).rstrip())
    beats = math.ceil(notes[:, 2].max(initial=0) / 4)
    return '\n'.join([*lines, f'beats 1 to {min(beats, columns // 4)} of {beats}'])


# ---------------------------------------------------------------------------------------------------------------------
# Loss chart

def read_losses(path):
    """(points, 3) iterations, minutes, validation losses of a table that train.py wrote; none of any other file."""
    try:
        rows = csv.DictReader(path.read_text(encoding='utf-8').splitlines())
        names = ('iter', 'minutes', 'valid')
        points = [[row[name] or 'nan' for name in names] for row in rows]
        points = np.array(points, dtype=float).reshape(-1, 3)
    except (OSError, csv.Error, KeyError, ValueError):
        points = np.zeros((0, 3))
    return points[np.isfinite(points).all(1)]


def ticks(low, high):
    """Two to eight round numbers from low to high."""
    span = high - low
    unit = 10.0 ** math.floor(math.log10(span))
    for part in (0.2, 0.5, 1, 2):
        step = part * unit
        if span <= 7 * step:
            break
    first = math.ceil(low / step)
    last = math.floor(high / step)
    return step * np.arange(first, last + 1)


def draw_chart(drawing, runs):
    """Add the validation losses {name: points} to a Drawing, by iterations and by minutes."""
    top = drawing.bottom + 34
    bottom = top + max(280, 14 * len(runs))
    drawing.text(8, top - 18, 'validation loss in nats a frame, and the lowest of each run', 'title')
    for i, (name, points) in enumerate(runs.items()):
        drawing.text(778, top + 10 + 14 * i, f'{label(name)} {points[:, 2].min():.3f}', colour(i))
    # the untrained model, and what falls from there in the first tenth of a run, would flatten the rest
    curves = []
    for points in runs.values():
        tenth = (len(points) + 8) // 10
        curves.append(points[tenth:])
    highest = np.concatenate(curves).max(0)
    lowest = np.concatenate(curves).min(0)
    losses = lowest[2] - 0.01, highest[2] + 0.01
    for loss in ticks(*losses):
        y = np.interp(loss, losses, (bottom, top))
        drawing.text(38, y + 4, f'{loss:g}', 'end')
        drawing.strokes('line', 1, f'M44 {y:g}h350m24 0h350')
    for axis, unit, left in ((0, 'iterations', 44), (1, 'minutes', 418)):
        drawing.text(left + 175, bottom + 32, unit, 'mid')
        last = highest[axis] or 1
        for tick in ticks(0, last):
            x = left + 350 * tick / last
            drawing.text(x, bottom + 16, f'{tick:g}', 'mid')
        for i, points in enumerate(curves):
            x = left + 350 * points[:, axis] / last
            y = np.interp(points[:, 2], losses, (bottom, top))
            places = [f'{a:.1f} {b:.1f}' for a, b in zip(x, y)]
            # with a dash at the end, which also shows a single point
            drawing.strokes(colour(i), 2, f'M{"L".join(places)}h4')
    drawing.bottom = bottom + 40


def draw_losses(folder):
    """Draw folder/loss.svg from the .csv tables that train.py wrote there: validation loss by iterations and minutes.

    Returns its path, or None if no .csv there is such a table. Raises UserError if it cannot be written."""
    runs = {}
    for table in sorted(Path(folder).glob('*.csv')):
        points = read_losses(table)
        if len(points):
            runs[table.stem] = points
    if not runs:
        return None
    drawing = Drawing()
    draw_chart(drawing, runs)
    path = Path(folder) / 'loss.svg'
    write_whole(path, drawing.svg('validation loss'))
    return path
