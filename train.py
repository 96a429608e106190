"""Train a model on tunes:  python train.py --arch=rwkv

Writes out/<arch>.pt (the best model by validation loss), out/<arch>.last.pt (what --resume goes on from),
out/<arch>.csv (every number it prints) and out/loss.svg (a chart of the validation losses of all runs there).
On N devices:  torchrun --standalone --nproc_per_node=N train.py --arch=rwkv
"""

import argparse
import contextlib
import copy
import csv
import io
import math
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import data
import model as models
import render
import wkv
from data import FLAG
from data import add_options
from data import number
from notation import UserError
from notation import clear_parts
from notation import is_alive
from notation import read_bytes
from notation import write_whole

# validations in a run; each reads as many frames as EVAL_STEPS steps do, and costs about half as much as these
VALIDATIONS = 20
EVAL_STEPS = 6
# share of the windows that are told the form of their tune; from the others the model learns to do without
TOLD = 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def parse_args(words=None):
    parser = data.make_parser(__doc__, 'python train.py --arch=lstm --data=my_tunes.zip --max_minutes=30')
    add_options(
        parser, 'data',
        ('data', 'nottingham', str, 'nottingham, or a folder, .zip, .mid, .abc, or an .npz of data.py'),
        ('representation', 'piano_roll', dict(choices=tuple(data.REPRESENTATIONS)), 'what a frame is'),
        ('steps_per_beat', None, number(int, 1, 96), 'steps to a quarter note (default: 4; for events 12)'),
        ('onsets', True, FLAG, 'frames of a piano_roll tell struck keys from held ones'),
        ('common_key', None, FLAG, 'move every tune to C major or A minor (default: where all files tell their key)'),
        ('transpose', 6, number(int, 0, 87),
         'windows are moved at random, at first by so many semitones either way at most, at last by none'))
    add_options(
        parser, 'model',
        ('arch', 'rwkv', dict(choices=tuple(models.ARCHITECTURES)), 'the architecture'),
        ('head', None, dict(choices=tuple(models.HEADS)),
         'the distribution of the next frame (default: chord for piano_roll, else softmax)'),
        ('n_layer', None, number(int, 1, 1000), 'layers (default: 3 on a CPU, 6 on a GPU)'),
        ('n_embd', None, number(int, 2, 65536),
         'channels (default: as many parameters as rwkv with 192, on a GPU with 384)'),
        ('dropout', models.Config.dropout, number(float, 0, 0.99), 'share of channels dropped of what a block adds'),
        ('window', models.Config.window, number(int, 1), 'frames that the attention of a transformer reaches back'),
        ('clock', True, FLAG, 'the model is told where in beat, bar and section a frame stands'),
        ('form', True, FLAG, 'piano_roll with --clock: the model can be told the form of a tune'),
        ('lookback', 64.0, number(float, 0, 1000), 'beats of the tune that the model can look at again; 0 for none'))
    add_options(
        parser, 'training',
        ('batch_size', None, number(int, 1, 2 ** 20),
         'windows in a step, all processes together (default: 8, on a GPU 32)'),
        ('gradient_accumulation_steps', 1, number(int, 1), 'pieces a process takes its windows in, to save memory'),
        ('block_size', 256, number(int, 1), 'frames in a window'),
        ('max_minutes', 8.0, number(float, 0, 1e6), 'the schedule ends after so long; 0: --max_iters decides'),
        ('max_iters', 0, number(int, 0), 'the schedule ends after so many steps; 0: --max_minutes decides'),
        ('learning_rate', 2e-2, number(float, 0), 'highest learning rate'),
        ('min_lr', 6e-5, number(float, 0), 'learning rate at the end'),
        ('warmup_iters', 50, number(int, 0), 'steps of linear warm-up, before the cosine decay'),
        ('weight_decay', 0.1, number(float, 0), 'on matrices only'),
        ('beta2', 0.99, number(float, 0, 0.999999), 'second moment decay of AdamW'),
        ('grad_clip', 1.0, number(float, 0), 'longest gradient; 0: no limit'),
        ('eval_interval', 0, number(int, 0), 'steps between validations; 0: about twenty validations in a run'),
        ('log_interval', 50, number(int, 1), 'steps between progress lines'))
    add_options(
        parser, 'machine',
        ('device', None, str, 'cpu, cuda, cuda:1, ... (default: cuda where there is one)'),
        ('dtype', None, dict(choices=('float32', 'bfloat16')),
         'arithmetic of the matrix products (default: bfloat16 where the processor has instructions for it)'),
        ('compile', False, FLAG, 'torch.compile the network'),
        ('seed', 1337, number(int, 0, 2 ** 32 - 1), 'of all random numbers'),
        ('out_dir', 'out', Path, 'where the checkpoint and the numbers go'),
        ('resume', False, FLAG, 'go on from <arch>.last.pt in --out_dir, with its options; those given again win'))
    return parser.parse_args(words)


def complete(args, device, world):
    """Fills in the defaults that depend on the device. Raises UserError for options that do not fit each other."""
    gpu = device.type == 'cuda'
    if not args.max_minutes and not args.max_iters:
        raise UserError('--max_minutes=0 and --max_iters=0 would train for ever: give one of them')
    args.n_layer = args.n_layer or (6 if gpu else 3)
    args.batch_size = args.batch_size or (32 if gpu else 8)
    args.dtype = args.dtype or ('bfloat16' if has_bfloat16(device) else 'float32')
    args.steps_per_beat = args.steps_per_beat or (12 if args.representation == 'events' else 4)
    if args.data not in ('nottingham', ''):
        args.data = str(Path(args.data).resolve())
    parts = world * args.gradient_accumulation_steps
    if args.batch_size % parts:
        fitting = math.ceil(args.batch_size / parts) * parts
        raise UserError(f'--batch_size={args.batch_size} does not divide by {world} processes and '
                        f'--gradient_accumulation_steps={args.gradient_accumulation_steps}: use --batch_size={fitting}')


def has_bfloat16(device):
    """Does the processor multiply in bfloat16? GPUs since Ampere do, and CPUs that say so (AVX512-BF16, AMX, Arm)."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path('/proc/cpuinfo')
    return device.type == 'cpu' and cpu.exists() and bool(re.search(r'\b(avx512_|amx_)?bf16\b', cpu.read_text()))


def make_representation(args):
    """The representation that the options ask for."""
    settings = dict(piano_roll=dict(steps_per_beat=args.steps_per_beat, onsets=args.onsets),
                    events=dict(steps_per_beat=args.steps_per_beat), abc={})
    return data.representation(dict(name=args.representation, **settings[args.representation]))


def make_config(args, representation, device):
    """The model that the options ask for. Raises UserError for a head that does not fit the representation."""
    head = args.head or representation.heads[0]
    if head not in representation.heads:
        raise UserError(f'--head={head} does not fit --representation={args.representation}: '
                        f'use --head={" or ".join(representation.heads)}, or leave it out')
    beat = representation.beat if args.clock else 0
    told_form = args.form and beat and not representation.shift     # where frames are steps of time, on the clock
    config = models.Config(
        n_units=representation.V,
        arch=args.arch,
        head=head,
        n_layer=args.n_layer,
        n_embd=args.n_embd or (384 if device.type == 'cuda' else 192),
        dropout=args.dropout,
        window=args.window,
        lookback=round(args.lookback * representation.frames_per_beat),
        beat=beat,
        form=data.FURTHEST if told_form else 0,
        shift=representation.shift)
    if args.arch == 'transformer' and config.n_embd % 2:
        raise UserError(f'--n_embd={config.n_embd} is odd, and rotary positions turn pairs: use an even number')
    return config if args.n_embd else models.same_size(config)


# ---------------------------------------------------------------------------------------------------------------------
# The optimisers

class Muon(torch.optim.Optimizer):
    """For matrices: moves by the orthogonal matrix that is nearest to the momentum, so that directions with small
    gradients learn as fast as those with large ones (Jordan et al. 2024, Muon; torch.optim.Muon has it from 2.9 on).

        M <- mu M + (1 - mu) G,     W <- (1 - lr * weight_decay) W - lr * sqrt(max(1, rows / columns)) * orthogonal(M')

    with Nesterov's M' = mu M + (1 - mu) G. All matrices of a shape go through the products at once, in `dtype`.
    """

    def __init__(self, matrices, lr, weight_decay, dtype):
        shapes = sorted({p.shape for p in matrices})
        groups = [dict(params=[p for p in matrices if p.shape == shape]) for shape in shapes]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype
        self.mu = 0.95

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates = []
            for p in group['params']:
                momentum = self.state[p].setdefault('momentum', torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - self.mu)
                updates.append(p.grad.lerp(momentum, self.mu))
            updates = orthogonal(torch.stack(updates).to(self.dtype))
            lr = group['lr']
            scale = max(1, updates.shape[1] / updates.shape[2]) ** 0.5
            for p, update in zip(group['params'], updates):
                p.mul_(1 - lr * group['weight_decay']).add_(update, alpha=-lr * scale)


def orthogonal(X):
    """The orthogonal matrices nearest to X (n, rows, columns), nearly: three Newton-Schulz steps with Jordan's
    coefficients bring all singular values that are not below a fiftieth of X's length to between 0.7 and 1.2."""
    if X.shape[1] > X.shape[2]:
        return orthogonal(X.mT).mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(3):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X


def make_optimizers(model, args):
    """Muon for the matrices of the blocks, of whatever architecture, and AdamW for the rest. Weight decay is for
    matrices only: biases, gains, decays and mixes go free."""
    inner = [p for p in model.blocks.parameters() if p.dim() == 2]
    taken = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in taken]
    groups = [dict(params=[p for p in outer if p.dim() == 2], weight_decay=args.weight_decay),
              dict(params=[p for p in outer if p.dim() != 2], weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, args.beta2), fused=True)
    return [adamw, Muon(inner, args.learning_rate, args.weight_decay, getattr(torch, args.dtype))]


# ---------------------------------------------------------------------------------------------------------------------
# Many processes: each takes its share of the windows, and they meet once a step

def ranks():
    """This process's number and how many there are, as torchrun tells them; 0 and 1 without it."""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def together(values, device, largest=False):
    """A list of numbers, each summed over all processes (or the largest of them), the same in all of them."""
    if ranks()[1] == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return values.tolist()


def average_gradients(parameters):
    """Data parallel training in four lines: every process goes on with the mean of all gradients."""
    grads = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(grads)
    for p, grad in zip(parameters, grads.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p) / ranks()[1])


# ---------------------------------------------------------------------------------------------------------------------
# Validation

class Score(NamedTuple):
    frame: float        # nats a frame: the mean of -ln p(frame_t | frames before t) over frames 2..T of every song
    beat: float         # nats a beat: all nats of a song, from its first frame to the boundary, over its beats
    songs: int
    frames: int         # counted in nats a frame


@torch.no_grad()
def evaluate(model, dataset, split, most=math.inf, batch_size=16):
    """The Score of a model on a split, each song read from its own start; nan where nothing is counted. Of more frames
    than `most` a sample of the songs is read, of all lengths. Processes share the songs."""
    rank, world = ranks()
    model.eval()
    device = next(model.parameters()).device
    every = math.ceil(dataset.lengths(split).sum() / most)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for x, lengths, beats in islice(dataset.whole_songs(split, batch_size, every), rank, None, world):
        x = x.to(device)
        lengths = lengths.to(device).unsqueeze(1)
        nats = model.nats(x).double()                               # of frame 1, .., frame T and the boundary
        t = torch.arange(1, x.shape[1], device=device)
        counted = (t >= 2) & (t <= lengths)                         # frame 1 has no past; past T is padding
        sums += torch.stack((nats[counted].sum(), counted.sum(), nats[t <= lengths + 1].sum(),
                             beats.sum().to(device), torch.tensor(len(x), device=device)))
    nats, frames, all_nats, beats, songs = together(sums.tolist(), device)
    if not frames:
        return Score(math.nan, math.nan, int(songs), 0)
    return Score(nats / frames, all_nats / beats, int(songs), int(frames))


# ---------------------------------------------------------------------------------------------------------------------
# The run

@dataclass
class Run:
    """The variables of a run, beside weights and optimisers: all that --resume needs, since a step draws its random
    numbers from the seed and its own number."""
    step: int = 0
    seconds: float = 0.0                            # of training so far
    validated: int = 0                              # the twentieth of the run that was validated last ...
    validated_at: int = 0                           # ... and at which step
    best: float = math.inf                          # lowest validation loss ...
    weights: dict = field(default_factory=dict)     # ... and the weights that had it
    rows: list = field(default_factory=list)        # of the table <arch>.csv
    losses: list = field(default_factory=list)      # since the last progress line ...
    spent: float = 0.0                              # ... and the seconds they took


def lr_at(step, done, args):
    """The learning rate: linear warm-up over the first steps, cosine decay over the run, done going from 0 to 1."""
    warm = min(1.0, (step + 1) / (args.warmup_iters + 1))
    return warm * (args.min_lr + (args.learning_rate - args.min_lr) * (0.5 + 0.5 * math.cos(math.pi * done)))


def transpose_at(done, args):
    """By how many semitones windows are moved at most: moving them makes many tunes of few, but the last third of a run
    is for the keys that real songs have."""
    return round(args.transpose * max(0.0, 1 - 1.5 * done))


def progress(run, args):
    """How much of the run is done, 0 to 1, by steps or by the clock; one step at least is made."""
    by_steps = run.step / args.max_iters if args.max_iters else 0.0
    by_clock = run.seconds / (60 * args.max_minutes) if args.max_minutes else 0.0
    return min(1.0, max(by_steps, by_clock)) if run.step else 0.0


def is_due(run, done, args):
    """Is it time to validate? At the start and the end, and after every --eval_interval steps or twentieth of the run,
    but not so often that it would take more than a twentieth of the time."""
    if done in (0, 1):
        return True
    if args.eval_interval:
        return run.step % args.eval_interval == 0
    # not >: with a longer schedule --resume goes on in an earlier twentieth than the last one that was validated
    return int(done * VALIDATIONS) != run.validated and run.step - run.validated_at >= 10 * EVAL_STEPS


def save_rows(path, rows):
    text = io.StringIO(newline='')
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def say(line, passing=False):
    """Prints a line, once for all processes. On a terminal a passing one is overwritten by the next."""
    if ranks()[0] == 0:
        terminal = sys.stdout.isatty()
        print('\r\033[K' * terminal + line, end='' if passing and terminal else '\n', flush=True)


def minutes(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def go_on_command():
    """The command that goes on with this run."""
    words = sys.orig_argv
    here = os.environ.get('LOCAL_WORLD_SIZE')
    if here:
        words = ['torchrun', '--standalone', f'--nproc_per_node={here}', *sys.argv]
        if here != os.environ['WORLD_SIZE']:
            return 'the torchrun command of each node, with --resume'
    return shlex.join(words + ['--resume'] * ('--resume' not in words))


def load_last(path):
    """A <arch>.last.pt -> its dictionary. Raises UserError if no run can go on from it."""
    _, saved = models.load_checkpoint(path)
    try:
        saved['run'] = Run(**saved['run'])
    except (KeyError, TypeError):
        raise UserError(f'{path} is not a run that can go on: train without --resume') from None
    return saved


def restore(saved, setup):
    """Puts a <arch>.last.pt in place and returns its Run. Raises UserError if it is of another model."""
    path = setup.last
    now = asdict(setup.model.config)
    then = saved['config']
    for name in now:
        if now[name] != then[name] and name != 'dropout':
            raise UserError(f'{path} is of a model with {name} {then[name]}, the options or the data make it '
                            f'{now[name]}: leave out what changes the model, or train without --resume')
    for optimizer, state in zip(setup.optimizers, saved['optimizers'], strict=True):
        # the groups hold learning rate and weight decay, which are for the options to say
        optimizer.load_state_dict(dict(state=state, param_groups=optimizer.state_dict()['param_groups']))
    setup.model.load_state_dict(saved['model'])
    setup.average.load_state_dict(saved['average'])
    run = saved['run']
    if setup.meta['source'] != saved['meta']['source']:     # judged on other songs, an old best means nothing
        run.best = math.inf
    say(f'going on from {path}: step {run.step}, {minutes(run.seconds)} of training')
    return run


class Setup(NamedTuple):
    """What stays the same from the first step to the last."""
    args: argparse.Namespace
    device: torch.device
    dataset: data.Dataset
    model: models.Model
    average: models.Model   # its weights, averaged over the steps so far: what is validated
    optimizers: list
    meta: dict              # what sample.py needs to know of the music
    best: Path              # the files of the run
    last: Path
    table: Path
    claim: Path


def set_up(args):
    """Device, processes, music and model, as the options say."""
    rank, world = ranks()
    device = data.pick_device(args.device)
    complete(args, device, world)
    if world > 1:
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision('high')
    if rank:
        dist.barrier()              # the first process downloads, and the others find what it kept
    dataset = data.load(args.data, make_representation(args), args.common_key, say)
    if world > 1 and not rank:
        dist.barrier()
    args.common_key = dataset.common_key
    dataset.batch(1, args.block_size, 0, np.random.default_rng())     # complains if there is too little music
    model = models.Model(make_config(args, dataset.representation, device)).to(device)
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot make the folder --out_dir={args.out_dir} ({e.strerror}): choose another') from None
    files = [args.out_dir / f'{args.arch}{suffix}' for suffix in ('.pt', '.last.pt', '.csv', '.pid')]
    meta = dict(data=args.data, source=dataset.source, representation=dataset.representation.settings,
                common_key=dataset.common_key, sharps=dataset.sharps,
                forms=dataset.forms if model.config.form else [],
                tempo=float(np.median([song.tempo for song in dataset.songs['train']])))
    return Setup(args, device, dataset, model, copy.deepcopy(model), make_optimizers(model, args), meta, *files)


def claim(setup):
    """Clears what killed runs of this name left, tells of another process that trains under it, and notes this one."""
    if ranks()[0]:
        return
    path = setup.claim
    clear_parts(setup.args.out_dir, setup.args.arch)
    with contextlib.suppress(UserError, ValueError):
        other = int(read_bytes(path, 20))
        if other != os.getpid() and is_alive(other):
            say(f'process {other} is training into {path.with_suffix("")}.* too, and the last to save wins: '
                'use another --out_dir')
    write_whole(path, str(os.getpid()).encode())


def describe(setup):
    """What is about to happen, in a few lines."""
    args = setup.args
    dataset = setup.dataset
    config = setup.model.config
    processes = f', {ranks()[1]} processes' * (ranks()[1] > 1)
    say(f'device: {setup.device}, {torch.get_num_threads()} threads, {args.dtype} matrix products{processes}')
    if args.arch == 'rwkv':
        say(wkv.describe(setup.device))
    moved = ', in C major or A minor' * dataset.common_key
    say(f'data: {dataset.source}, as {args.representation} of {config.n_units} units{moved}')
    for split in data.SPLITS:
        lengths = dataset.lengths(split)
        say(f'  {split}: {len(lengths):,} songs, {lengths.sum():,} frames, {dataset.beats[split].sum():,.0f} beats')
    if args.block_size > dataset.lengths('train').max():
        say(f'  --block_size={args.block_size} is longer than every song: a window holds several')
    say(f'model: {config.arch}, {config.head} head, {config.n_layer} layers of {config.n_embd} channels, '
        f'{sum(p.numel() for p in setup.model.parameters()):,} parameters')
    limits = [f'{args.max_minutes:g} minutes'] * bool(args.max_minutes)
    limits += [f'{args.max_iters:,} steps'] * bool(args.max_iters)
    say(f'training: {args.batch_size} windows of {args.block_size} frames a step, {" or ".join(limits)}')


def save_last(setup, run):
    """Saves all that --resume needs."""
    if ranks()[0]:
        return
    options = vars(setup.args) | dict(n_embd=setup.model.config.n_embd)
    words = [f'--{name}={value}' for name, value in options.items()
             if value is not None and name not in ('out_dir', 'resume')]
    states = [optimizer.state_dict()['state'] for optimizer in setup.optimizers]
    models.save_checkpoint(setup.last, setup.model, meta=setup.meta, step=run.step, valid=run.best,
                           run=vars(run), options=words, optimizers=states, average=setup.average.state_dict())


def validate(setup, run, done):
    """Validates on a sample of the songs, and keeps the model if it is the best so far."""
    if run.step:
        save_last(setup, run)       # before validating: a run that goes on from here validates first of all
    frames = EVAL_STEPS * setup.args.batch_size * setup.args.block_size
    with mixed_precision(setup):
        valid = evaluate(setup.average, setup.dataset, 'valid', frames).frame
    run.validated = int(done * VALIDATIONS)
    run.validated_at = run.step
    run.rows.append(dict(iter=run.step, minutes=round(run.seconds / 60, 3), valid=round(valid, 5)))
    say(f'step {run.step}: valid {valid:.4f} nats/frame')
    better = run.step and not valid >= run.best     # an untrained model replaces no checkpoint of an earlier run
    if better:
        run.best = valid
        run.weights = {name: value.cpu().clone() for name, value in setup.average.state_dict().items()}
    if ranks()[0] == 0:
        if better:
            models.save_checkpoint(setup.best, setup.average, meta=setup.meta, step=run.step, valid=valid)
        save_rows(setup.table, run.rows)


def mixed_precision(setup):
    """Where this is on, matrix products are in --dtype."""
    dtype = getattr(torch, setup.args.dtype)
    return torch.autocast(setup.device.type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def signals_noted():
    """A list into which SIGINT and SIGTERM go: a step is finished and the run saved before they are obeyed."""
    noted = []
    before = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        before[signum] = signal.signal(signum, lambda signum, frame: noted.append(signum))
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def train(args, saved=None):
    """Trains as the options say, anew or from a saved <arch>.last.pt. Returns the signal that stopped it, or 0."""
    setup = set_up(args)
    claim(setup)
    describe(setup)
    run = restore(saved, setup) if saved else Run()
    with signals_noted() as signals:
        stopped = make_steps(setup, run, signals)
    if not stopped:     # all that --resume needs is saved, what is left can be done again
        finish(setup, run)
    return stopped


def make_steps(setup, run, signals):
    """The loop: step after step until the run is done, or a signal is noted, which is returned; else 0."""
    rank, world = ranks()
    args, device, dataset, model, average, optimizers, *_ = setup
    parameters = list(model.parameters())
    loss_of = torch.compile(model.loss) if args.compile else model.loss
    begin = time.perf_counter() - run.seconds
    while True:
        # the first process has the clock, any of them may have got a signal; all must go on alike
        run.seconds = time.perf_counter() - begin
        done = progress(run, args) if rank == 0 else 0.0
        done, stopped = together([done, max(signals, default=0)], device, largest=True)
        if stopped:
            save_last(setup, run)
            say(f'stopped at step {run.step}; to go on:  {go_on_command()}')
            return int(stopped)
        if is_due(run, done, args):
            validate(setup, run, done)
        if done == 1:
            return 0

        began = time.perf_counter()
        lr = lr_at(run.step, done, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr
        # every process draws the whole batch and keeps its rows, so that their number does not change the music;
        # dropout differs. Seeds are made of the step, so that a resumed run goes on with the same random numbers
        rng = np.random.default_rng((args.seed, run.step))
        torch.manual_seed(int(rng.integers(2 ** 62)) + rank)
        windows = dataset.batch(args.batch_size, args.block_size, transpose_at(done, args), rng,
                                model.config.lookback, TOLD if model.config.form else 0.0)
        pieces = [part[rank::world].to(device).chunk(args.gradient_accumulation_steps) for part in windows]
        loss = 0.0
        for piece in zip(*pieces):
            with mixed_precision(setup):
                nats = loss_of(*piece) / args.gradient_accumulation_steps
            nats.backward()
            loss += nats.detach()
        if world > 1:
            average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.losses.append(together([loss.item()], device)[0] / world)
        check_finite(run.losses[-1], norm.item(), run.step)
        run.step += 1
        update_average(average, model, run.step)
        run.spent += time.perf_counter() - began
        if run.step % args.log_interval == 0:
            log_progress(run, args, lr, time.perf_counter() - begin)


@torch.no_grad()
def update_average(average, model, step):
    """Averages the weights of all steps, the last tenth of them counting most (Shamir & Zhang 2013, polynomial-decay
    averaging): single steps jump about a minimum, their mean lies nearer to it."""
    for mean, weight in zip(average.parameters(), model.parameters()):
        mean.lerp_(weight, min(1.0, 10 / step))


def check_finite(loss, norm, step):
    """Raises UserError, before anything is saved, if the numbers have run away."""
    for name, value in (('loss', loss), ('length of the gradient', norm)):
        if not math.isfinite(value):
            raise UserError(f'the {name} is {value} at step {step}, most likely since the learning rate is too high: '
                            'lower --learning_rate or --grad_clip and train again')


def log_progress(run, args, lr, seconds):
    """A progress line, and a row of the table."""
    loss = sum(run.losses) / len(run.losses)
    rate = args.batch_size * args.block_size * len(run.losses) / run.spent
    left = min(60 * args.max_minutes - seconds if args.max_minutes else math.inf,
               seconds / run.step * (args.max_iters - run.step) if args.max_iters else math.inf)
    left = minutes(max(0, left))
    say(f'step {run.step}: loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} frames/s, {left} left', passing=True)
    run.rows.append(dict(iter=run.step, minutes=round(seconds / 60, 3), train=round(loss, 5), lr=lr,
                         frames_per_second=round(rate)))
    run.losses = []
    run.spent = 0.0


def finish(setup, run):
    """Scores the best model on all validation and test songs, and says where everything is."""
    model = setup.model
    # the best average by a sample of the validation songs, or the last weights, which the small learning rate has
    # brought to rest: all validation songs decide
    scores = dict(valid=evaluate(model, setup.dataset, 'valid'))
    setup.average.load_state_dict(run.weights)
    best = evaluate(setup.average, setup.dataset, 'valid')
    if best.frame < scores['valid'].frame:
        model = setup.average
        scores['valid'] = best
    scores['test'] = evaluate(model, setup.dataset, 'test')
    row = dict(iter=run.step, minutes=round(run.seconds / 60, 3))
    for split, score in scores.items():
        row |= {f'best_{split}': round(score.frame, 5), f'best_{split}_beat': round(score.beat, 5)}
    run.rows.append(row)
    if ranks()[0]:
        return
    models.save_checkpoint(setup.best, model, meta=setup.meta, step=run.step, valid=scores['valid'].frame,
                           scores={split: score._asdict() for split, score in scores.items()})
    save_rows(setup.table, run.rows)
    setup.claim.unlink(missing_ok=True)
    say(f'data: {setup.dataset.source}')
    say(f'best model: {setup.best}; losses of all runs: {render.draw_losses(setup.args.out_dir)}')
    for split, score in scores.items():
        say(f'{split}: {score.frame:.4f} nats/frame, {score.beat:.4f} nats/beat '
            f'({score.songs} songs, {score.frames:,} frames)')


def main():
    args = parse_args()
    saved = None
    if args.resume:
        saved = load_last(args.out_dir / f'{args.arch}.last.pt')
        args = parse_args([*saved['options'], *sys.argv[1:], f'--arch={args.arch}', f'--out_dir={args.out_dir}'])
    stopped = train(args, saved)
    if ranks()[1] > 1:
        dist.destroy_process_group()
    if stopped:
        sys.exit(128 + stopped)


if __name__ == '__main__':
    data.run(main, '--batch_size, --block_size or --n_embd, or raise --gradient_accumulation_steps')
