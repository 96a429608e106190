"""
Train a model on tunes:  python train.py --arch=rwkv

Writes out/<arch>.pt (the best checkpoint by validation loss), out/<arch>.last.pt (what --resume goes on from),
out/<arch>.csv (every number it prints) and out/loss.svg (a chart of the validation losses of all runs there).
On N devices:  torchrun --standalone --nproc_per_node=N train.py --arch=rwkv
"""

import argparse
import csv
import io
import math
import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import data
import render
import wkv
from data import UserError, write_whole
from model import VERSION, CheckpointError, Config, Model, load_checkpoint

# equal in parameters to 5%; a GPU gets a bigger model for the same minutes
SIZES = {('rwkv', 'cpu'): 192, ('lstm', 'cpu'): 240, ('rwkv', 'cuda'): 384, ('lstm', 'cuda'): 488}


def boolean(text):
    if text.lower() in ('true', '1', 'yes'):
        return True
    if text.lower() in ('false', '0', 'no'):
        return False
    raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')


def number(kind, low, high=math.inf):
    """An argparse type: a number of this kind from low to high."""
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


def parse_args(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog='example: python train.py --arch=lstm --data=my_tunes.zip --max_minutes=30')
    parser.error = lambda message: exit_with(message + '; --help lists the options')
    flag = dict(type=boolean, nargs='?', const=True, metavar='BOOL')

    def group(title, *options):
        g = parser.add_argument_group(title)
        for name, default, kind, text in options:
            kind = kind if isinstance(kind, dict) else dict(type=kind)
            text += '' if default is None else f' (default: {default})'
            g.add_argument(f'--{name}', default=default, help=text, **kind)

    group('data',
          ('data', 'nottingham', str, 'nottingham, or a folder or .zip of MIDI files, one .mid, or one .abc'),
          ('steps_per_beat', 4, number(int, 1, 96), 'frames a beat (quarter note)'),
          ('onsets', True, flag, 'frames tell struck keys from held ones'),
          ('common_key', False, flag, 'move every tune to C major or A minor'),
          ('transpose', 6, number(int, 0, 87), 'each window is moved at random, this many semitones either way at most'))
    group('model',
          ('arch', 'rwkv', dict(choices=('rwkv', 'lstm')), 'the recurrent network'),
          ('head', 'chord', dict(choices=('chord', 'bernoulli')), 'the distribution over the next frame'),
          ('n_layer', None, number(int, 1, 1000), 'layers (default: 3 on a CPU, 6 on a GPU)'),
          ('n_embd', None, number(int, 1, 65536), 'channels (default: 192 for rwkv and 240 for lstm, equal in parameters; about twice that on a GPU)'),
          ('dropout', 0.3, number(float, 0, 0.99), 'share of channels dropped'),
          ('clock', True, flag, 'the model is told where in beat, bar and section a frame stands'),
          ('lookback', 64.0, number(float, 0, 1000), 'beats of the tune that the model can look at again; 0 for none'))
    group('training',
          ('batch_size', None, number(int, 1), 'windows in a step, all processes together (default: 8 on a CPU, 32 on a GPU)'),
          ('gradient_accumulation_steps', 1, number(int, 1), 'pieces a process takes its windows in, to save memory'),
          ('block_size', 256, number(int, 1), 'frames in a window'),
          ('max_minutes', 8.0, number(float, 0, 1e6), 'the schedule ends after so long; 0: no limit, --max_iters decides'),
          ('max_iters', 0, number(int, 0), 'the schedule ends after so many steps; 0: no limit, --max_minutes decides'),
          ('optimizer', None, dict(choices=('muon', 'adamw')), 'muon is for the matrices of the layers, with adamw for the rest '
           '(default: muon where torch has it, from 2.9 on, and --dtype is bfloat16, in which it works)'),
          ('learning_rate', 6e-3, number(float, 0), 'highest learning rate'),
          ('min_lr', 6e-5, number(float, 0), 'learning rate at the end'),
          ('warmup_iters', 50, number(int, 0), 'steps of linear warm-up, before the cosine decay'),
          ('weight_decay', 0.1, number(float, 0), 'on matrices only'),
          ('beta2', 0.99, number(float, 0, 0.999999), 'second moment decay of AdamW'),
          ('grad_clip', 1.0, number(float, 0), 'longest gradient; 0: no limit'),
          ('eval_interval', 1000, number(int, 1), 'steps between validations'),
          ('log_interval', 50, number(int, 1), 'steps between progress lines'))
    group('machine',
          ('device', None, str, 'cpu, cuda, cuda:1, ... (default: cuda where there is one)'),
          ('dtype', None, dict(choices=('float32', 'bfloat16')), 'arithmetic of the matrix products (default: the faster one here)'),
          ('compile', False, flag, 'torch.compile the network'),
          ('seed', 1337, number(int, 0, 2 ** 32 - 1), 'of all random numbers'),
          ('out_dir', 'out', Path, 'where the checkpoint and the numbers go'),
          ('resume', False, flag, 'go on from <arch>.last.pt in --out_dir, with its options; those given again win'))
    return parser.parse_args(words)


def as_words(options):
    """Options as the words of a command line, for the run that resumes this one."""
    return [f'--{name}={value}' for name, value in options.items() if value is not None and name not in ('out_dir', 'resume')]


def exit_with(message, status=2):
    if os.environ.get('LOCAL_RANK', '0') == '0':    # of many processes on a machine, one speaks
        print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
    sys.exit(status)


def pick_device(name):
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name == 'cuda' and 'LOCAL_RANK' in os.environ:
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f'--device={name} is not on this machine: use --device=cpu, or leave it out') from None


def pick_dtype(name, device):
    """bfloat16 where it is the faster one: on GPUs since Ampere, and on CPUs whose matrix product says so."""
    if name is not None:
        return getattr(torch, name)
    if device.type != 'cpu':
        return torch.bfloat16 if device.type == 'cuda' and torch.cuda.is_bf16_supported(False) else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1024, 256).to(dtype), torch.randn(256, 1024).to(dtype)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


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


class Loss(nn.Module):
    """Model and loss in one forward, where DistributedDataParallel finds both: windows x (B, T + 1, V), the frames before
    them, past (B, W, V), and the place (B,) of the last of those in its tune -> mean nats a frame."""

    def __init__(self, model, compiled=False):
        super().__init__()
        self.model = model
        self.run = torch.compile(model.forward) if compiled else model.forward

    def forward(self, x, past, place):
        out, _ = self.run(x[:, :-1], (place, (past, None), None))
        return self.model.nll(out, x[:, 1:]).mean()


@torch.no_grad()
def evaluate(model, dataset, split, batch_size=16):
    """
    Nats a frame: the mean of -ln p(frame_t | frames before t) over frames 2..T of every song, each read from its own
    start with fresh state; of many processes each takes its share of the batches, and all get the same answer.
    Returns (nats, songs, frames counted); nan nats where no song has two frames.
    """
    rank, world = ranks()
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, songs, frames = 0.0, 0, 0
    for x, lengths in islice(dataset.whole_songs(split, batch_size), rank, None, world):
        x, lengths = x.to(device), lengths.to(device)
        nats = model.nats(x)                                    # of frame 1, .., frame T, after the boundary
        t = torch.arange(1, x.shape[1], device=device)
        counted = (t >= 2) & (t <= lengths.unsqueeze(1))        # frame 1 has no past; past T is padding
        total += nats[counted].double().sum().item()
        songs, frames = songs + len(x), frames + int(counted.sum())
    model.train(training)
    total, songs, frames = together([total, songs, frames], device)
    songs, frames = int(songs), int(frames)
    return total / frames if frames else math.nan, songs, frames


def save_rows(path, rows):
    text = io.StringIO(newline='')
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def clock(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def report(line, passing=False):
    """Prints a line. A passing one is overwritten by the next, if this is a terminal; a log keeps them all."""
    terminal = sys.stdout.isatty()
    print('\r\033[K' * terminal + line, end='' if passing and terminal else '\n', flush=True)


def go_on_command():
    """The command that goes on with this run."""
    words, here = sys.orig_argv, os.environ.get('LOCAL_WORLD_SIZE')
    if here:
        words = ['torchrun', '--standalone', f'--nproc_per_node={here}', *sys.argv]
        if here != os.environ['WORLD_SIZE']:
            return 'the torchrun command of each node, with --resume'
    return shlex.join(words + ['--resume'] * ('--resume' not in words))


# the variables of a run, beside weights and optimisers: all that --resume needs, since a step draws its random numbers
# from the seed and its own number
RUN = dict(step=int, elapsed=float, evaluating=float, best=float, rows=list, recent=list, spent=float)


def load_last(path):
    """A <arch>.last.pt -> its dictionary. Raises CheckpointError if it is none."""
    _, saved = load_checkpoint(path)
    run, words = saved.get('run'), saved.get('options')
    if not (isinstance(run, dict) and all(type(run.get(name)) is kind for name, kind in RUN.items())
            and all(isinstance(row, dict) for row in run['rows']) and all(isinstance(x, float) for x in run['recent'])
            and isinstance(saved.get('optimizers'), list) and isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise CheckpointError(f'{path} is not a run that can go on: train without --resume')
    return saved


def restore(saved, path, model, optimizers):
    """Puts weights and optimisers' state of a <arch>.last.pt in place. Raises UserError if they are another model's."""
    now, then = asdict(model.config), saved['config']
    for name in now:
        if now[name] != then[name] and name != 'dropout':
            raise UserError(f'{path} is of a model with {name} {then[name]}, the options or the data make it {now[name]}: '
                            'leave out what changes the model, or train without --resume')
    if len(saved['optimizers']) != len(optimizers):
        raise UserError(f'{path} is of a run with another --optimizer: leave it out, or train without --resume')
    try:
        for optimizer, states in zip(optimizers, saved['optimizers']):
            moments = {i: {name: value.clone() for name, value in state.items()} for i, state in states.items()}
            parameters = [p for group in optimizer.param_groups for p in group['params']]
            adamw = isinstance(optimizer, torch.optim.AdamW)
            names = ('exp_avg', 'exp_avg_sq') if adamw else ('momentum_buffer',)
            if moments.keys() != set(range(len(parameters))) or adamw and any(
                    state['step'] < 1 for state in moments.values()) or any(
                    x.shape != p.shape or x.dtype != p.dtype or not x.isfinite().all()
                    for i, p in enumerate(parameters) for x in (moments[i][name] for name in names)):
                raise ValueError
            # the groups hold learning rate and weight decay, which are for the options to say
            optimizer.load_state_dict(dict(state=moments, param_groups=optimizer.state_dict()['param_groups']))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise CheckpointError(f'{path} is not a run that can go on: train without --resume') from None
    model.load_state_dict(saved['model'])


def fit(args, saved=None):
    """Trains as the options say; saved: the content of a <arch>.last.pt to go on from. Returns the signal that stopped it,
    or 0."""
    begin = time.perf_counter()
    rank, world = ranks()
    say = report if rank == 0 else lambda *args, **options: None
    if not args.max_minutes and not args.max_iters:
        raise UserError('--max_minutes=0 and --max_iters=0 would train for ever: give one of them')
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    kind = 'cuda' if device.type == 'cuda' else 'cpu'
    args.dtype = str(dtype).removeprefix('torch.')
    args.optimizer = args.optimizer or ('muon' if dtype == torch.bfloat16 and hasattr(torch.optim, 'Muon') else 'adamw')
    if args.optimizer == 'muon' and not hasattr(torch.optim, 'Muon'):
        raise UserError('--optimizer=muon needs torch 2.9 or later: use --optimizer=adamw, or leave it out')
    args.n_layer = args.n_layer or {'cpu': 3, 'cuda': 6}[kind]
    args.n_embd = args.n_embd or SIZES[args.arch, kind]
    args.batch_size = args.batch_size or {'cpu': 8, 'cuda': 32}[kind]
    pieces = args.gradient_accumulation_steps
    if args.batch_size % (world * pieces):
        raise UserError(f'--batch_size={args.batch_size} does not divide by {world} processes and --gradient_accumulation_steps='
                        f'{pieces}: use --batch_size={-(-args.batch_size // (world * pieces)) * world * pieces}')
    if world > 1:
        if kind == 'cuda':
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision('high')

    if rank:
        dist.barrier()      # the first process downloads, or reads many files, and the others find what it kept
    dataset = data.load(args.data, args.steps_per_beat, args.onsets, args.common_key, say)
    if world > 1 and not rank:
        dist.barrier()
    history = round(args.lookback * args.steps_per_beat)        # frames before a window that the model can look at
    config = Config(dataset.V, args.arch, args.head, args.n_layer, args.n_embd, args.dropout, history,
                    args.steps_per_beat * args.clock)
    model = Model(config).to(device)
    dataset.batch('train', 1, args.block_size, 0, np.random.default_rng())     # complains if there is too little music
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot make the folder --out_dir={args.out_dir} ({e.strerror}): choose another') from None
    for part in args.out_dir.glob(f'{args.arch}.*.part') if rank == 0 else ():
        part.unlink(missing_ok=True)                # what a run that was killed in the act of saving left
    checkpoint, table, last = (args.out_dir / f'{args.arch}{suffix}' for suffix in ('.pt', '.csv', '.last.pt'))

    # what sample.py needs to know of the data
    meta = dict(data=args.data if args.data == 'nottingham' else str(Path(args.data).resolve()), source=dataset.source,
                steps_per_beat=args.steps_per_beat, onsets=args.onsets, common_key=args.common_key,
                tempo=float(np.median([song.tempo for song in dataset.songs['train']])))

    say(f'device: {device}, {torch.get_num_threads()} threads, {args.dtype} matrix products'
        + f', {world} processes' * (world > 1))
    if args.arch == 'rwkv':
        say(wkv.describe(device))
    say(f'data: {dataset.source}')
    for split in data.SPLITS:
        say(f'  {split}: {len(dataset.songs[split]):,} songs, {dataset.frames(split):,} frames, {dataset.beats(split):,.0f} beats')
    say(f'model: {args.arch}, {args.head} head, {args.n_layer} layers of {args.n_embd} channels, '
        f'{sum(p.numel() for p in model.parameters()):,} parameters')
    limits = [f'{args.max_minutes:g} minutes'] * bool(args.max_minutes) + [f'{args.max_iters:,} steps'] * bool(args.max_iters)
    say(f'training: {args.batch_size} windows of {args.block_size} frames a step, {" or ".join(limits)}, {args.optimizer}')

    optimizers = model.optimizers(args.optimizer, args.learning_rate, args.weight_decay, args.beta2)
    best, rows, recent, spent, evaluating, step = math.inf, [], [], 0.0, 0.0, 0
    if saved:
        restore(saved, last, model, optimizers)
        run = saved['run']
        best, rows, recent, spent, evaluating, step = (run[name] for name in 'best rows recent spent evaluating step'.split())
        begin -= run['elapsed']
        saved.clear()       # lets go of the file, which the next save replaces
        say(f'going on from {last}: step {step}, {clock(run["elapsed"])} of training')
    loss_of = Loss(model, args.compile)
    if world > 1:       # averages the gradients of all processes, each of which takes its own rows of a batch
        loss_of = nn.parallel.DistributedDataParallel(loss_of, [device] if kind == 'cuda' else None)
    mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()

    def progress():
        """Share of the run that is done, by steps or by the clock; two validations are kept in reserve for the end."""
        minutes = (time.perf_counter() - begin + 2 * evaluating) / 60
        return max(step / args.max_iters if args.max_iters else 0, minutes / args.max_minutes if args.max_minutes else 0)

    def save(path, valid, **more):
        if rank == 0:
            buffer = io.BytesIO()
            torch.save(dict(version=VERSION, config=asdict(config), meta=meta, step=step, valid=valid,
                            model=model.state_dict(), **more), buffer)
            write_whole(path, buffer.getbuffer())

    def save_last():
        save(last, best, options=as_words(vars(args) | dict(data=meta['data'])), optimizers=[o.state_dict()['state'] for o in optimizers],
             run=dict(step=step, elapsed=time.perf_counter() - begin, evaluating=evaluating, best=best, rows=rows,
                      recent=recent, spent=spent))

    stop = []           # signals that came in: the step is finished and the run saved before they are obeyed
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: stop.append(signum))
    while True:
        # the first process has the clock, any of them may have got a signal; all must decide alike
        done, stopped = together([progress() if rank == 0 else 0, max(stop, default=0)], device, largest=True)
        done = min(1.0, done) if step else 0.0      # one step at least: the end needs a checkpoint of this run
        if stopped:
            save_last()
            say(f'stopped at step {step}; to go on:  {go_on_command()}')
            return int(stopped)
        if step % args.eval_interval == 0 or done == 1:
            if step:        # an untrained model does not replace a checkpoint of an earlier run, here and below
                save_last()         # before validating: a run that goes on from here validates first of all
            start = time.perf_counter()
            valid, _, _ = evaluate(model, dataset, 'valid')
            evaluating = time.perf_counter() - start
            minutes = (time.perf_counter() - begin) / 60
            rows.append(dict(iter=step, minutes=round(minutes, 3), valid=round(valid, 5)))
            say(f'step {step}: valid {valid:.4f} nats/frame')
            if step and not valid >= best:
                best = valid
                save(checkpoint, valid)
            if rank == 0:
                save_rows(table, rows)
        if done == 1:
            break

        start = time.perf_counter()
        warm = min(1.0, (step + 1) / (args.warmup_iters + 1))
        lr = warm * (args.min_lr + (args.learning_rate - args.min_lr) * (0.5 + 0.5 * math.cos(math.pi * done)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group['lr'] = lr
        # every process draws the whole batch and keeps its rows, so that their number does not change the music;
        # dropout differs. Seeds are made of the step, so that a resumed run goes on with the same random numbers
        rng = np.random.default_rng((args.seed, step))
        torch.manual_seed(int(rng.integers(2 ** 62)) + rank)
        x, place = (part[rank::world].to(device) for part in
                    dataset.batch('train', args.batch_size, args.block_size, args.transpose, rng, history))
        loss = 0.0
        for i, (piece, n) in enumerate(zip(x.chunk(pieces), place.chunk(pieces))):
            with loss_of.no_sync() if world > 1 and i < pieces - 1 else nullcontext():     # gradients meet once a step
                with mixed:
                    nats = loss_of(piece[:, history:], piece[:, :history], n) / pieces
                nats.backward()
            loss += nats.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)   # flush the gradients early, their memory serves the next step
        recent.append(together([loss.item()], device)[0] / world)
        for name, value in (('loss', recent[-1]), ('length of the gradient', norm.item())):
            if not math.isfinite(value):
                raise UserError(f'the {name} is {value} at step {step}, most likely since the learning rate is too high: lower '
                                f'--learning_rate or --grad_clip and train again; {checkpoint} has the best model so far')
        spent += time.perf_counter() - start
        step += 1
        if step % args.log_interval == 0:
            loss, rate = sum(recent) / len(recent), args.batch_size * args.block_size * len(recent) / spent
            passed = time.perf_counter() - begin
            left = min(60 * args.max_minutes - passed if args.max_minutes else math.inf,
                       passed / step * (args.max_iters - step) if args.max_iters else math.inf)
            say(f'step {step}: loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} frames/s, {clock(left)} left', passing=True)
            rows.append(dict(iter=step, minutes=round(passed / 60, 3), train=round(loss, 5), lr=lr, frames_per_second=round(rate)))
            recent, spent = [], 0.0

    if rank == 0:
        model.load_state_dict(load_checkpoint(checkpoint)[1]['model'])
    if world > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    test, songs, frames = evaluate(model, dataset, 'test')
    rows.append(dict(iter=step, minutes=round((time.perf_counter() - begin) / 60, 3), test=round(test, 5)))
    if rank == 0:
        save_rows(table, rows)
        say(f'data: {dataset.source}')
        say(f'best checkpoint: {checkpoint}, valid {best:.4f} nats/frame; losses of all runs: {render.draw_losses(args.out_dir)}')
        say(f'test: {test:.4f} nats/frame ({songs} songs, {frames:,} frames)')
    return 0


def main():
    try:
        args, saved = parse_args(), None
        if args.resume:
            saved = load_last(args.out_dir / f'{args.arch}.last.pt')
            args = parse_args([*saved['options'], *sys.argv[1:], f'--arch={args.arch}', f'--out_dir={args.out_dir}'])
        stopped = fit(args, saved)
        if ranks()[1] > 1:
            dist.destroy_process_group()
        if stopped:
            sys.exit(128 + stopped)
    except (UserError, CheckpointError) as e:
        exit_with(e)
    except KeyboardInterrupt:       # while it was still reading the music
        exit_with('stopped before the first step', 130)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == '__main__':
    main()
