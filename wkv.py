"""The WKV operator of RWKV-4 (arXiv 2305.13048, section 3): one function, three back ends.

    y_t = (sum_{i<t} e^(-(t-1-i) w + k_i) v_i + e^(u + k_t) v_t) / (the same without v),   w > 0, per channel

wkv_torch is the explanation and the oracle; wkv_cuda.cu is the speed, on the GPU and on the CPU.
`python wkv.py` measures them. Shape letters: B batch, T frames, C channels.
"""

import argparse
import ctypes
import functools
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).resolve().with_name('wkv_cuda.cu')
# frames in a chunk of time: what fits a CPU's nearest cache, a GPU's registers
CHUNK = {'cpu': 32, 'cuda': 8}
FLAGS = {'cpu': ['-xc++', '-std=c++17', '-O3', '-ffp-contract=fast'],
         'cuda': ['-std=c++17', '-O3', '-ftz=true']}
# by what PyTorch finds on this CPU; not -march=native, since different machines may share the built library
VECTORS = {'AVX512': ['-march=skylake-avx512'], 'AVX2': ['-march=haswell']}


def wkv(w, u, k, v, state=None, backend=None):
    """Weighted mean of v over the past: what RWKV-LM's RWKV-v4neo calls `RUN_CUDA(B, T, C, w, u, k, v)`.

    w = exp(time_decay) > 0 and u = time_first: (C,). k, v: (B, T, C), of one floating type. state: (B, 3, C) as an
    earlier call returned it (numerator, denominator, the exponent both are relative to), None at the start of a tune.
    backend: 'cuda' or 'cpu' (the kernel, for float32 and bfloat16), 'torch' (any type), or None for the best at hand.
    Returns y (B, T, C) in the type of k, and the state after frame T; sums are float32, or float64 if k is. Gradients
    reach w, u, k and v, but no state. Raises ValueError for tensors or a back end that do not fit.
    """
    state = fresh_state(k) if state is None else state.detach()
    B, _, C = k.shape
    fit = v.shape == k.shape and w.shape == u.shape == (C,) and state.shape == (B, 3, C)
    typed = k.dtype == v.dtype and k.is_floating_point()
    together = w.device == u.device == k.device == v.device == state.device
    if not (fit and k.numel() and typed and together):
        found = ', '.join(f'{tuple(x.shape)} {x.dtype} {x.device}' for x in (w, u, k, v, state))
        raise ValueError('wkv: w and u must be (C,), k and v (B, T, C), none of them 0 and both of one floating type, '
                         f'state (B, 3, C), and all on one device, not {found}')
    device = k.device.type
    known = k.dtype in (torch.float32, torch.bfloat16)
    ready = backend != 'torch' and known and has_kernel(k.device)
    backend = backend or (device if ready else 'torch')
    if backend == 'torch':
        return wkv_torch(w, u, k, v, state)
    if backend != device or not ready:
        raise ValueError(f'wkv: {backend!r} cannot run on {k.dtype} on {device}, torch can. {describe(device)}')
    run = kernel_forward
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # composing goes past what autograd and torch.compile need
        run = launch_forward
    y, state, _ = run(w.float(), u.float(), k, v, state.float())
    return y, state.detach()


def fresh_state(k):
    """The state (B, 3, C) before the first frame: empty sums, relative to an exponent below all others."""
    B, _, C = k.shape
    dtype = torch.promote_types(k.dtype, torch.float32)
    state = k.new_zeros(B, 3, C, dtype=dtype)
    state[:, 2] = -1e38
    return state


def wkv_torch(w, u, k, v, state):
    """The same in plain PyTorch. The sums are a e^p, b e^p: p, their largest exponent, keeps e^k from overflowing."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    w, u, state = (x.to(dtype) for x in (w, u, state))
    # at T = 1 y does not depend on w: this sum over none of its channels gives w a gradient, zeros, all the same
    u = u + w[:0].sum()
    a, b, p = state.unbind(1)
    y = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1)):
        # y is the same for every q, so no gradient goes through it
        q = torch.maximum(p, u + k_t).detach()
        old = torch.exp(p - q)
        now = torch.exp(u + k_t - q)
        numerator = old * a + now * v_t
        denominator = old * b + now
        y.append(numerator / denominator)
        q = torch.maximum(p - w, k_t).detach()
        old = torch.exp(p - w - q)
        now = torch.exp(k_t - q)
        a = old * a + now * v_t
        b = old * b + now
        p = q
    state = torch.stack((a, b, p), 1)
    return torch.stack(y, 1).to(k.dtype), state.detach()


# ---------------------------------------------------------------------------------------------------------------------
# The kernel: built once, kept in PyTorch's folder for extensions, proved in each process before its first use

def describe(device):
    """One line that says which back end runs on this device, and why."""
    return find_kernel(torch.device(device))[1]


def has_kernel(device):
    """Whether this torch.device has a kernel that works."""
    return find_kernel(device)[0]


# what torch.compiler.assume_constant_result says to torch.compile; that would import the compiler, which takes a second
has_kernel._dynamo_marked_constant = True


# the first use may be while composing, where gradients are off
@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def find_kernel(device):
    """Whether this torch.device has a kernel that works, and a line about it, which is printed if one does not."""
    if device.type not in CHUNK:
        return False, f'WKV: plain PyTorch, as there is no kernel for {device.type}'
    try:
        error = measure_error(kernel_forward, *example(2, 100, 33, device))
        # NaN is not below anything
        if not error < 1e-4:
            raise ArithmeticError(f'it is off by {error:.0e}')
        return True, f'WKV: {device.type} kernel'
    except Exception as error:
        # no compiler, an old one, a read-only folder, wrong numbers: all end the same way
        reason, *_ = str(error).split('\n')
        line = f'WKV: plain PyTorch, as the {device.type} kernel cannot be used: {reason:.100}'
        print(line, file=sys.stderr)
        return False, line


@functools.cache
def load_kernel(device):
    """The library for this torch.device, built if it is not there yet. Raises OSError or RuntimeError."""
    target = torch.backends.cpu.get_cpu_capability()
    if device.type == 'cuda':
        target = torch.cuda.get_device_capability(device)
    flags = [*FLAGS[device.type], *VECTORS.get(target, []), f'-DCHUNK={CHUNK[device.type]}']
    made_of = f'{SOURCE.read_text()} {flags} {target} {torch.__version__}'
    key = hashlib.sha256(made_of.encode()).hexdigest()
    root = os.environ.get('TORCH_EXTENSIONS_DIR') or cpp_extension.get_default_build_root()
    path = Path(root, 'wkv', f'wkv_{device.type}_{key[:16]}.so')
    if not path.exists():
        build(path, device, flags)
    library = ctypes.CDLL(str(path))
    library.wkv_forward.restype = ctypes.c_char_p
    library.wkv_backward.restype = ctypes.c_char_p
    return library


def build(path, device, flags):
    """Compile the library to this path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # pip put ninja beside the interpreter
    os.environ['PATH'] += f':{Path(sys.executable).parent}'
    # in a folder of its own, since another process may build as well: what comes to its place is whole
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        load = functools.partial(cpp_extension.load, f'wkv_{device.type}', str(SOURCE), extra_cuda_cflags=flags,
                                 build_directory=scratch, with_cuda=device.type == 'cuda', is_python_module=False)
        try:
            load(extra_cflags=[*flags, '-fopenmp'], extra_ldflags=['-fopenmp'])
        except RuntimeError:
            # without OpenMP the kernel runs on one core
            load(extra_cflags=flags)
        built, = Path(scratch).glob('*.so')
        os.replace(built, path)


def example(B, T, C, device):
    """To try WKV on: w (memories of less than a frame, of thousands), u (C,), k, v and the gradient of y (B, T, C)."""
    w = torch.logspace(-4, 1, C, device=device)
    numbers = torch.arange(3.0 * B * T * C, device=device)
    k, v, g = 3 * numbers.sin().view(3, B, T, C)
    return w, w.cos(), k, v, g


def measure_error(run, *inputs):
    """The largest |x - exact| / |exact| of y, given the state of a first run, and of each gradient; exact: float64."""
    results = []
    for function, dtype in (run, torch.float32), (wkv_torch, torch.float64):
        *leaves, g = (x.to(dtype).requires_grad_() for x in inputs)
        _, state, *_ = function(*leaves, fresh_state(g))
        y, *_ = function(*leaves, state.detach())
        # of a sum: for the gradient of a tensor autograd would import SymPy
        results.append([y, *torch.autograd.grad((y * g).sum(), leaves)])
    errors = [(x - exact).norm() / exact.norm() for x, exact in zip(*results)]
    # a tensor's max lets NaN through
    return torch.stack(errors).max().item()


def launch(name, w, u, k, v, saved, *rest):
    """Run wkv_forward or wkv_backward of wkv_cuda.cu, where Args are described. Raises RuntimeError."""
    segments, warps = split_time(k)
    scan = w.new_empty(len(k), segments, 4, len(w))
    tensors = [x.contiguous() for x in (w, u, k, v, saved, scan, *rest)]
    pointers = [x.data_ptr() for x in tensors]
    where = cpu_threads(k)
    with torch.cuda.device_of(k):
        if k.is_cuda:
            where = torch.cuda.current_stream().cuda_stream
        numbers = [where, *k.shape, k.dtype == torch.bfloat16, segments, warps, *pointers]
        args = (ctypes.c_int64 * len(numbers))(*numbers)
        function = getattr(load_kernel(k.device), name)
        error = function(args)
    if error:
        raise RuntimeError(f'{name}: {error.decode()}')


def cpu_threads(k):
    """How many threads a CPU takes for k: one where there is little to do."""
    return torch.get_num_threads() if k.numel() > 1 << 16 else 1


def split_time(k):
    """(segments, warps): for how many blocks time is cut, and how many chunks a block works on at once."""
    B, T, C = k.shape
    chunks = -(-T // CHUNK[k.device.type])
    if not k.is_cuda:
        vectors = B * -(-C // 16)
        spare = cpu_threads(k) // vectors
        return max(1, min(spare, chunks)), 1
    # 32 warps, each with 32 channels, keep a multiprocessor busy
    multiprocessors = torch.cuda.get_device_properties(k.device).multi_processor_count
    blocks = B * -(-C // 32)
    wanted = 32 * multiprocessors // blocks
    warps = max(1, min(wanted, chunks, 16))
    segments = min(wanted, chunks // 2) // 16
    if segments < 4:    # so few do not pay for the pass that sums them up
        segments = 1
    return segments, warps


def allocate(w, u, k, v, state):
    """Room for what launch_forward returns; torch.compile need not know more."""
    B, T, C = k.shape
    chunks = -(-T // CHUNK[k.device.type])
    y = k.new_empty(B, T, C)
    last = state.new_empty(B, 3, C)
    saved = state.new_empty(B, chunks, 3, C)
    return y, last, saved


def launch_forward(w, u, k, v, state):
    """y, the state after it, and the states at the starts of chunks for launch_backward."""
    y, last, saved = allocate(w, u, k, v, state)
    launch('wkv_forward', w, u, k, v, saved, state, last, y)
    return y, last, saved


def launch_backward(w, u, k, v, saved, g):
    """The gradients of w, u, k and v, given that of y, g (B, T, C)."""
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    # each warp of each segment sums up its own
    segments, warps = split_time(k)
    dw, du = w.new_empty(2, len(k), segments * warps, len(w))
    launch('wkv_backward', w, u, k, v, saved, g, dk, dv, dw, du)
    return dw.sum((0, 1)), du.sum((0, 1)), dk, dv


def allocate_gradients(w, u, k, v, saved, g):
    """Room for what launch_backward returns."""
    return [x.new_empty(x.shape) for x in (w, u, k, v)]


def keep_for_backward(ctx, inputs, output):
    w, u, k, v, _ = inputs
    _, _, saved = output
    ctx.save_for_backward(w, u, k, v, saved)


def backward(ctx, g, *_):
    """The gradients of w, u, k, v and, none, of the state."""
    return *kernel_backward(*ctx.saved_tensors, g), None


# Operators, for autograd and torch.compile. torch.library.custom_op makes such ones, too, but imports the compiler
FORWARD = '(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state) -> (Tensor, Tensor, Tensor)'
BACKWARD = '(Tensor w, Tensor u, Tensor k, Tensor v, Tensor saved, Tensor g) -> (Tensor, Tensor, Tensor, Tensor)'
if not hasattr(torch.ops.wkv, 'forward'):       # a module may be loaded twice, an operator is made once
    torch.library.define('wkv::forward', FORWARD)
    torch.library.define('wkv::backward', BACKWARD)
    torch.library.impl('wkv::forward', 'default', launch_forward)
    torch.library.impl('wkv::backward', 'default', launch_backward)
    torch.library.register_fake('wkv::forward', allocate)
    torch.library.register_fake('wkv::backward', allocate_gradients)
    torch.library.register_autograd('wkv::forward', backward, setup_context=keep_for_backward)
kernel_forward = torch.ops.wkv.forward
kernel_backward = torch.ops.wkv.backward


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark

def milliseconds(run):
    """The median time of a run(), by a timer that is slow to import."""
    from torch.utils.benchmark import Timer
    timer = Timer('run()', globals={'run': run}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange().median


def main():
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser = argparse.ArgumentParser(description='time the WKV back ends, and tell how far they are from float64')
    parser.add_argument('--shapes', default=['8,512,256'], nargs='+', metavar='B,T,C', help='%(default)s')
    args = parser.parse_args()
    print(describe(device))
    for shape in args.shapes:
        if not re.fullmatch('[1-9][0-9]*(,[1-9][0-9]*){2}', shape):
            parser.error(f'--shapes: {shape!r} is not B,T,C, three whole numbers from 1')
        sizes = [int(size) for size in shape.split(',')]
        inputs = example(*sizes, device)
        *leaves, g = (x.requires_grad_() for x in inputs)
        plain = None
        for backend in ['torch'] + [device] * has_kernel(g.device):
            run = functools.partial(wkv, backend=backend)
            error = measure_error(run, *inputs)
            y, _ = run(*leaves)
            forward = milliseconds(lambda: run(*leaves))
            backward = milliseconds(lambda: torch.autograd.grad(y, leaves, g, retain_graph=True))
            total = forward + backward
            plain = plain or total
            print(f'{shape} {backend}: forward {forward:.3f} ms, backward {backward:.3f} ms, '
                  f'{plain / total:.1f} x plain, error {error:.0e}')


if __name__ == '__main__':
    main()
