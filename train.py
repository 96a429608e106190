"""
Train a model on tunes:  python train.py --arch=rwkv

Writes out/<arch>.pt (the best checkpoint by validation loss), out/<arch>.csv (every number it prints) and
out/loss.svg (a chart of the validation losses of all runs there).
"""

import argparse
import csv
import io
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

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


def beats(text):
    return tuple(number(float, 1e-3, 1000)(lag) for lag in text.split(',') if lag)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog='example: python train.py --arch=lstm --data=my_tunes.zip --max_minutes=30')
    parser.error = lambda message: exit_with(message + '; --help lists the options')
    flag = dict(type=boolean, nargs='?', const=True, metavar='BOOL')

    def group(title, *options):
        g = parser.add_argument_group(title)
        for name, default, kind, text in options:
            kind = kind if isinstance(kind, dict) else dict(type=kind)
            shown = {None: 'by machine', '': 'none'}.get(default, default)
            g.add_argument(f'--{name}', default=default, help=f'{text} (default: {shown})', **kind)

    group('data',
          ('data', 'nottingham', str, 'nottingham, or a folder or .zip of MIDI files, one .mid, or one .abc'),
          ('steps_per_beat', 4, number(int, 1, 96), 'frames a beat (quarter note)'),
          ('onsets', True, flag, 'frames tell struck keys from held ones'),
          ('common_key', False, flag, 'move every tune to C major or A minor'),
          ('transpose', 6, number(int, 0, 87), 'each window is moved at random, this many semitones either way at most'))
    group('model',
          ('arch', 'rwkv', dict(choices=('rwkv', 'lstm')), 'the recurrent network'),
          ('head', 'chord', dict(choices=('chord', 'bernoulli')), 'the distribution over the next frame'),
          ('n_layer', None, number(int, 1, 1000), 'layers'),
          ('n_embd', None, number(int, 1, 65536), 'channels'),
          ('dropout', 0.1, number(float, 0, 0.99), 'share of channels dropped'),
          ('lookback', '3,4,6,8,12,16,24,32,48,64', beats, 'also read the frames so many beats back, a comma between; "" for none'))
    group('training',
          ('batch_size', None, number(int, 1), 'windows in a step'),
          ('block_size', 256, number(int, 1), 'frames in a window'),
          ('max_minutes', 8.0, number(float, 0), 'the schedule ends after so long; 0: no limit, --max_iters decides'),
          ('max_iters', 0, number(int, 0), 'the schedule ends after so many steps; 0: no limit, --max_minutes decides'),
          ('learning_rate', 6e-3, number(float, 0), 'highest learning rate'),
          ('min_lr', 6e-5, number(float, 0), 'learning rate at the end'),
          ('warmup_iters', 50, number(int, 0), 'steps of linear warm-up, before the cosine decay'),
          ('weight_decay', 0.1, number(float, 0), 'on matrices only'),
          ('beta2', 0.99, number(float, 0, 0.999999), 'second moment decay of AdamW'),
          ('grad_clip', 1.0, number(float, 0), 'longest gradient; 0: no limit'),
          ('eval_interval', 500, number(int, 1), 'steps between validations'),
          ('log_interval', 50, number(int, 1), 'steps between progress lines'))
    group('machine',
          ('device', None, str, 'cpu, cuda, cuda:1, ...'),
          ('dtype', None, dict(choices=('float32', 'bfloat16')), 'arithmetic of the matrix products'),
          ('compile', False, flag, 'torch.compile the network'),
          ('seed', 1337, number(int, 0, 2 ** 32 - 1), 'of all random numbers'),
          ('out_dir', 'out', Path, 'where the checkpoint and the numbers go'))
    return parser.parse_args()


def exit_with(message):
    print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
    sys.exit(2)


def pick_device(name):
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
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


@torch.no_grad()
def evaluate(model, dataset, split, batch_size=16):
    """
    Nats a frame: the mean of -ln p(frame_t | frames before t) over frames 2..T of every song, each read from its own
    start with fresh state. Returns (nats, songs, frames counted); nan nats where no song has two frames.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, songs, frames = 0.0, 0, 0
    for x, lengths in dataset.whole_songs(split, batch_size):
        x, lengths = x.to(device), lengths.to(device)
        out, _ = model(x[:, :-1])                               # boundary, frame 1, .., frame T-1
        nats = model.nll(out, x[:, 1:])                         # of frame 1, .., frame T
        t = torch.arange(1, x.shape[1], device=device)
        counted = (t >= 2) & (t <= lengths.unsqueeze(1))        # frame 1 has no past; past T is padding
        total += nats[counted].double().sum().item()
        songs, frames = songs + len(x), frames + int(counted.sum())
    model.train(training)
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


def fit(args):
    begin = time.perf_counter()
    if not args.max_minutes and not args.max_iters:
        raise UserError('--max_minutes=0 and --max_iters=0 would train for ever: give one of them')
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    kind = 'cuda' if device.type == 'cuda' else 'cpu'
    n_layer = args.n_layer or {'cpu': 3, 'cuda': 6}[kind]
    n_embd = args.n_embd or SIZES[args.arch, kind]
    batch_size = args.batch_size or {'cpu': 8, 'cuda': 32}[kind]
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    torch.set_float32_matmul_precision('high')

    dataset = data.load(args.data, args.steps_per_beat, args.onsets, args.common_key)
    lookback = tuple(sorted({max(1, round(lag * args.steps_per_beat)) for lag in args.lookback}))
    config = Config(dataset.V, args.arch, args.head, n_layer, n_embd, args.dropout, lookback)
    model = Model(config).to(device)
    dataset.batch('train', 1, args.block_size, 0, np.random.default_rng())     # complains if there is too little music
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot make the folder --out_dir={args.out_dir} ({e.strerror}): choose another') from None
    checkpoint, table = args.out_dir / f'{args.arch}.pt', args.out_dir / f'{args.arch}.csv'

    # what sample.py needs to know of the data
    meta = dict(data=args.data if args.data == 'nottingham' else str(Path(args.data).resolve()), source=dataset.source,
                steps_per_beat=args.steps_per_beat, onsets=args.onsets, common_key=args.common_key,
                tempo=float(np.median([song.tempo for song in dataset.songs['train']])))

    print(f'device: {device}, {torch.get_num_threads()} threads, {str(dtype).removeprefix("torch.")} matrix products')
    if args.arch == 'rwkv':
        print(wkv.describe(device))
    print(f'data: {dataset.source}')
    for split in data.SPLITS:
        print(f'  {split}: {len(dataset.songs[split]):,} songs, {dataset.frames(split):,} frames, {dataset.beats(split):,.0f} beats')
    print(f'model: {args.arch}, {args.head} head, {n_layer} layers of {n_embd} channels, '
          f'{sum(p.numel() for p in model.parameters()):,} parameters')
    limits = [f'{args.max_minutes:g} minutes'] * bool(args.max_minutes) + [f'{args.max_iters:,} steps'] * bool(args.max_iters)
    print(f'training: {batch_size} windows of {args.block_size} frames a step, {" or ".join(limits)}')

    optimizer = torch.optim.AdamW(model.parameter_groups(args.weight_decay), args.learning_rate,
                                  betas=(0.9, args.beta2), fused=True)
    forward = torch.compile(model) if args.compile else model
    mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    history = max(lookback, default=1) - 1          # frames before a window that its lookback can reach
    best, rows, recent, spent, evaluating, step = math.inf, [], [], 0.0, 0.0, 0

    def progress():
        """Share of the run that is done, by steps or by the clock; two validations are kept in reserve for the end."""
        minutes = (time.perf_counter() - begin + 2 * evaluating) / 60
        return max(step / args.max_iters if args.max_iters else 0, minutes / args.max_minutes if args.max_minutes else 0)

    while True:
        done = min(1.0, progress())
        if step % args.eval_interval == 0 or done == 1:
            start = time.perf_counter()
            valid, _, _ = evaluate(model, dataset, 'valid')
            evaluating = time.perf_counter() - start
            minutes = (time.perf_counter() - begin) / 60
            rows.append(dict(iter=step, minutes=round(minutes, 3), valid=round(valid, 5)))
            print(f'step {step}: valid {valid:.4f} nats/frame')
            if valid < best and step:               # an untrained model does not replace a checkpoint of an earlier run
                best = valid
                buffer = io.BytesIO()
                torch.save(dict(version=VERSION, config=asdict(config), meta=meta, step=step, valid=valid,
                                model=model.state_dict()), buffer)
                write_whole(checkpoint, buffer.getvalue())
            save_rows(table, rows)
        if done == 1:
            break

        start = time.perf_counter()
        warm = min(1.0, (step + 1) / (args.warmup_iters + 1))
        lr = warm * (args.min_lr + (args.learning_rate - args.min_lr) * (0.5 + 0.5 * math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group['lr'] = lr
        x = dataset.batch('train', batch_size, args.block_size, args.transpose, rng, history).to(device)
        past, x = x[:, :history], x[:, history:]
        with mixed:
            out, _ = forward(x[:, :-1], (past, None))
            loss = model.nll(out, x[:, 1:]).mean()
        loss.backward()
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)       # flush the gradients early, their memory serves the next step
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise UserError(f'the loss is {recent[-1]} at step {step}: lower --learning_rate or --grad_clip and train again; '
                            f'what stood in {checkpoint} at the last validation stands there still')
        spent += time.perf_counter() - start
        step += 1
        if step % args.log_interval == 0:
            loss, rate = sum(recent) / len(recent), batch_size * args.block_size * len(recent) / spent
            passed = time.perf_counter() - begin
            left = min(60 * args.max_minutes - passed if args.max_minutes else math.inf,
                       passed / step * (args.max_iters - step) if args.max_iters else math.inf)
            print(f'step {step}: loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} frames/s, {clock(left)} left', flush=True)
            rows.append(dict(iter=step, minutes=round(passed / 60, 3), train=round(loss, 5), lr=lr, frames_per_second=round(rate)))
            recent, spent = [], 0.0

    model.load_state_dict(torch.load(checkpoint, map_location=device, weights_only=True)['model'])
    test, songs, frames = evaluate(model, dataset, 'test')
    rows.append(dict(iter=step, minutes=round((time.perf_counter() - begin) / 60, 3), test=round(test, 5)))
    save_rows(table, rows)
    print(f'data: {dataset.source}')
    print(f'best checkpoint: {checkpoint}, valid {best:.4f} nats/frame; losses of all runs: {render.draw_losses(args.out_dir)}')
    print(f'test: {test:.4f} nats/frame ({songs} songs, {frames:,} frames)')


def main():
    try:
        fit(parse_args())
    except (UserError, CheckpointError) as e:
        exit_with(e)


if __name__ == '__main__':
    main()
