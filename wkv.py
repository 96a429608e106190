"""The WKV operator of RWKV-4 (arXiv 2305.13048, section 3): one function, three back ends.

    y_t = (sum_{i<t} e^(-(t-1-i) w + k_i) v_i + e^(u + k_t) v_t) / (the same without v),   w > 0, per channel

wkv_torch is the explanation and the oracle; wkv_cuda.cu is the speed, on the GPU and on the CPU.
`python wkv.py` measures them. Shape letters: B batch, T frames, C channels."""
import argparse
import ctypes
import functools
import glob
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time

import torch
from torch import Tensor

CHUNK = {"cpu": 32, "cuda": 8}  # frames in a chunk of time: what fits a CPU's nearest cache, a GPU's registers
FLAGS = {"cpu": ["-O3", "-std=c++17", "-ffp-contract=fast"], "cuda": ["-O3", "-std=c++17", "-ftz=true"]}
VECTORS = {"AVX512": ["-march=skylake-avx512"], "AVX2": ["-march=haswell"]}  # not native: machines share caches


def wkv(w, u, k, v, state=None, backend=None):
    """Weighted mean of v over the past: what RWKV-LM's RWKV-v4neo calls `RUN_CUDA(B, T, C, w, u, k, v)`.

    w = exp(time_decay) > 0 and u = time_first: (C,). k, v: (B, T, C), float32 or bfloat16. state: (B, 3, C)
    float32 as an earlier call returned it (numerator, denominator, the exponent both are relative to), None at
    the start of a tune. backend: 'cuda', 'cpu', 'torch', or None for the best at hand.
    Returns y (B, T, C) in v's dtype and the state after frame T. The gradient of y reaches w, u, k and v;
    states are constants, so a tune read in pieces has its gradient cut between them. Raises ValueError for
    shapes that do not fit and for a back end that is unknown or cannot run on these tensors."""
    B, T, C = k.shape
    state = fresh_state(k) if state is None else state.detach()
    if not (k.numel() and v.shape == k.shape and w.shape == u.shape == (C,) and state.shape == (B, 3, C)):
        raise ValueError(f"wkv: k {(*k.shape,)} and v {(*v.shape,)} must be (B, T, C), none of them 0, "
                         f"w {(*w.shape,)} and u {(*u.shape,)} (C,), state {(*state.shape,)} (B, 3, C)")
    if not w.device == u.device == k.device == v.device == state.device:
        devices = ", ".join(str(x.device) for x in (w, u, k, v, state))
        raise ValueError(f"wkv: w, u, k, v and state must be on one device, not on {devices}")
    device = k.device.type
    ready = k.dtype == v.dtype and k.dtype in (torch.float32, torch.bfloat16) and has_kernel(device)
    if backend is None:
        backend = device if ready else "torch"
    if backend == "torch":
        return wkv_torch(w, u, k, v, state)
    if backend != device or not ready:
        raise ValueError(f"wkv: back end {backend!r} cannot run on {k.dtype} on {device} ({describe(device)}); "
                         "'torch' can")
    if T == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return launch_forward(w, u, k, v, state)[:2]  # composing frame by frame: straight to the kernel
    y, state, _ = kernel_forward(w, u, k, v, state)
    return y, state.detach()


def fresh_state(k):
    """The state (B, 3, C) before the first frame: empty sums, relative to an exponent below all others."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    state = torch.zeros(k.shape[0], 3, k.shape[2], dtype=dtype, device=k.device)
    state[:, 2] = -1e38
    return state


def wkv_torch(w, u, k, v, state):
    """The same in plain PyTorch, in float64 if k is. The two sums are a e^p and b e^p, where p, the largest
    exponent among their terms, keeps e^k from overflowing. (In float32, p - w loses a small w beside a large p;
    the kernel does not.)"""
    dtype = torch.promote_types(k.dtype, torch.float32)
    w, u, a, b, p = w.to(dtype), u.to(dtype), *state.to(dtype).unbind(1)  # (C,) twice, (B, C) three times
    y = []
    for k_t, v_t in zip(k.to(dtype).unbind(1), v.to(dtype).unbind(1)):
        q = torch.maximum(p, u + k_t).detach()  # y is the same for every q, so no gradient goes through it
        old, now = torch.exp(p - q), torch.exp(u + k_t - q)
        y.append((old * a + now * v_t) / (old * b + now))
        q = torch.maximum(p - w, k_t).detach()
        old, now = torch.exp(p - w - q), torch.exp(k_t - q)
        a, b, p = old * a + now * v_t, old * b + now, q
    return torch.stack(y, 1).to(v.dtype), torch.stack((a, b, p), 1).detach()


# --- the kernel: built once, kept in PyTorch's folder for extensions, called through ctypes

@functools.cache
def find_kernel(device):
    """The kernel library for 'cpu' or 'cuda', built at the first call, or None; and what it is or why not."""
    if device not in CHUNK:
        return None, f"as there is no kernel for {device}"
    try:
        return build_kernel(device)
    except Exception as error:  # no compiler, an old one, a read-only folder: all end the same way
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return None, f"as the {device.upper()} kernel cannot be built: {reason}"


def build_kernel(device):
    from torch.utils import cpp_extension  # not at the top: plain PyTorch does without it
    if device == "cuda":
        gpus = sorted({"%d%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
        target = "sm_" + ", sm_".join(gpus)
        flags = FLAGS[device] + [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in gpus]
    else:
        target = torch.backends.cpu.get_cpu_capability()
        flags = FLAGS[device] + VECTORS.get(target, [])
    flags.append(f"-DCHUNK={CHUNK[device]}")
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "wkv_cuda.cu")
    with open(source, "rb") as f:
        key = hashlib.sha256(f.read() + repr((flags, torch.__version__)).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = os.path.join(root, "wkv")
    library = os.path.join(folder, f"wkv_{device}_{key}.so")
    if not os.path.exists(library):
        os.makedirs(folder, exist_ok=True)
        os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable)  # where pip put ninja
        for openmp in (["-fopenmp"], []) if device == "cpu" else ([],):  # without OpenMP: one core
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # no two processes meet in it
                copy = shutil.copy(source, os.path.join(scratch, "wkv.cu" if device == "cuda" else "wkv.cpp"))
                try:
                    cpp_extension.load(f"wkv_{device}", copy, extra_cflags=flags + openmp, extra_cuda_cflags=flags,
                                       extra_ldflags=openmp, build_directory=scratch, is_python_module=False)
                except RuntimeError:
                    if openmp:
                        continue
                    raise
                os.replace(*glob.glob(scratch + "/*.so"), library)
                break
    return ctypes.CDLL(library), f"{device.upper()} kernel for {target}"


told = set()  # devices that a line has been printed for


@torch.compiler.assume_constant_result
def has_kernel(device):
    kernel, _ = find_kernel(device)
    if not kernel and device not in told:
        print(describe(device), file=sys.stderr)
    return kernel is not None


def describe(device):
    """One line that says which back end runs on this device, and why."""
    device = torch.device(device).type
    told.add(device)
    kernel, why = find_kernel(device)
    return f"WKV: {why}" if kernel else f"WKV: plain PyTorch, {why}"


class Args(ctypes.Structure):  # as in wkv_cuda.cu
    _fields_ = [("where", ctypes.c_int64), *((n, ctypes.c_int) for n in "B T C bf16 segments warps".split()),
                *((n, ctypes.c_void_p) for n in "w u state last saved scan dwu k v y g dk dv".split())]


def launch(name, k, segments, warps, **tensors):
    with torch.cuda.device_of(k):
        if k.is_cuda:
            where = torch.cuda.current_stream().cuda_stream
        else:
            where = torch.get_num_threads() if k.numel() > 1 << 16 else 1
        args = Args(where, *k.shape, k.dtype == torch.bfloat16, segments, warps, k=k.data_ptr(),
                    **{n: tensor.data_ptr() for n, tensor in tensors.items()})
        error = getattr(find_kernel(k.device.type)[0], name)(ctypes.byref(args))
    if error:
        raise RuntimeError(f"{name} failed with CUDA error {error}")


def count_chunks(k):
    return -(-k.shape[1] // CHUNK[k.device.type])


def split_time(k, parts):
    """(segments, warps) of time: enough to keep the machine busy, or `parts` in all. One part is the walk."""
    B, _, C = k.shape
    chunks = count_chunks(k)
    if k.is_cuda:
        want = parts or (1 << 17) // (B * C)  # so many threads fill a large GPU
        segments = min(want, parts or chunks // 4) // 16
        return segments if segments >= 4 else 1, max(1, min(want, 16, chunks))  # fewer do not pay for pass 1
    return max(1, min(parts or torch.get_num_threads() // (B * -(-C // 16)), chunks)), 1


def launch_forward(w, u, k, v, state, parts=0):
    """y, the state after it, and the states at chunk starts for launch_backward. parts: see split_time."""
    w, u, state = w.float().contiguous(), u.float().contiguous(), state.float().contiguous()
    k, v = k.contiguous(), v.contiguous()
    B, T, C = k.shape
    segments, warps = split_time(k, parts)
    y, last, saved = torch.empty_like(v), torch.empty_like(state), state.new_empty(B, count_chunks(k), 3, C)
    scan = state.new_empty(B, segments, 4, C) if segments > 1 else saved
    launch("wkv_forward", k, segments, warps, w=w, u=u, v=v, state=state, last=last, saved=saved, scan=scan,
           y=y)
    return y, last, saved


def launch_backward(w, u, k, v, saved, g, parts=0):
    """The gradients of w, u (float32), k and v, given that of y, g (B, T, C)."""
    w, u, k = w.float().contiguous(), u.float().contiguous(), k.contiguous()
    v, g = v.contiguous(), g.contiguous()
    B, T, C = k.shape
    segments, warps = split_time(k, parts)
    dk, dv, scan = torch.empty_like(k), torch.empty_like(v), saved.new_empty(B, segments, 4, C)
    dwu = saved.new_empty(B, segments * warps, 2, C)  # one sum from each part
    launch("wkv_backward", k, segments, warps, w=w, u=u, v=v, saved=saved, scan=scan, g=g, dk=dk, dv=dv,
           dwu=dwu)
    return *dwu.sum((0, 1)), dk, dv


@torch.library.custom_op("wkv::forward", mutates_args=())
def kernel_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor,
                   parts: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(w, u, k, v, state, parts)


@kernel_forward.register_fake
def _(w, u, k, v, state, parts=0):
    saved = state.new_empty(k.shape[0], count_chunks(k), 3, k.shape[2], dtype=torch.float32)
    return v.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32), saved


@torch.library.custom_op("wkv::backward", mutates_args=())
def kernel_backward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, saved: Tensor, g: Tensor,
                    parts: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dw, du, dk, dv = launch_backward(w, u, k, v, saved, g, parts)
    return dw.to(w.dtype, copy=True), du.to(u.dtype, copy=True), dk, dv


@kernel_backward.register_fake
def _(w, u, k, v, saved, g, parts=0):
    return w.new_empty(w.shape), u.new_empty(u.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def setup_context(ctx, inputs, output):
    *tensors, _, ctx.parts = inputs
    ctx.save_for_backward(*tensors, output[2])


def backward(ctx, g, *_):
    return *kernel_backward(*ctx.saved_tensors, g, ctx.parts), None, None


kernel_forward.register_autograd(backward, setup_context=setup_context)


# --- the benchmark

def milliseconds(run, graph, repeat):
    """Median time of run(); with graph that of the GPU kernels it starts, without Python."""
    run()
    times = []
    if graph:
        torch.cuda.synchronize()
        recorded, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.graph(recorded):
            run()
        recorded.replay()
    for _ in range(repeat):
        if graph:
            start.record(), recorded.replay(), end.record(), end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def shape(text):
    B, T, C = map(int, text.split(","))
    return B, T, C


def main():
    gpu = torch.cuda.is_available()
    shapes = [(8, 1024, 512), (64, 1024, 1024)] if gpu else [(8, 512, 256), (16, 256, 192)]
    parser = argparse.ArgumentParser(description="measure the WKV back ends",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cpu"] + ["cuda"] * gpu,
                        help="where to run")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of k, v and y")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[*shapes, (1, 8192, 64)], metavar="B,T,C",
                        help="sizes to measure")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    print(f"{describe(args.device)} on {where}")
    source, target = torch.zeros(2, 1 << (28 if gpu else 25), device=args.device)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source), gpu, 20) / 1e6
    del source, target
    print(f"copy: {copy:.0f} GB/s. GB/s below count every input read once and every output written once;\n"
          "error: |x - float64| / |float64| for y and for the worst gradient")
    for B, T, C in args.shapes:
        torch.manual_seed(0)
        w, u = torch.exp(torch.empty(C, device=args.device).uniform_(-9, 4)), torch.randn(C, device=args.device)
        k, v, g = torch.randn(3, B, T, C, device=args.device).to(getattr(torch, args.dtype))
        state, inputs = fresh_state(k), (w, u, k, v)
        leaves = [x.double().requires_grad_() for x in inputs]
        y = wkv_torch(*leaves, state)[0]
        want = [y.detach(), *torch.autograd.grad(y, leaves, g.double())]
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = wkv_torch(*leaves, state)[0]
        runs = {"plain": (lambda: wkv_torch(*leaves, state),
                          lambda: torch.autograd.grad(y, leaves, g, retain_graph=True))}
        if has_kernel(args.device):
            saved = launch_forward(*inputs, state)[2]
            for name, parts in ("walk", 1), ("kernel", 0):
                runs[name] = (functools.partial(launch_forward, *inputs, state, parts),
                              functools.partial(launch_backward, *inputs, saved, g, parts))
        total = {}
        for name, (forward, backward) in runs.items():
            got = [forward()[0].detach(), *backward()]
            error = [((x.double() - x64).norm() / x64.norm()).item() for x, x64 in zip(got, want)]
            how = (False, 3) if name == "plain" else (gpu, 20)
            times = milliseconds(forward, *how), milliseconds(backward, *how)
            total[name] = sum(times)
            rate = 8 * k.nbytes / total[name] / 1e6  # k, v, y; k, v, g, dk, dv
            print(f"{f'{B},{T},{C}':>12} {name:>6}: forward {times[0]:8.3f} ms, backward {times[1]:8.3f} ms,"
                  f" {rate:6.1f} GB/s ({rate / copy:.1%} of copy), {total['plain'] / total[name]:.1f} x plain,"
                  f" {total.get('walk', total[name]) / total[name]:.1f} x walk,"
                  f" error {error[0]:.0e} {max(error[1:]):.0e}")


if __name__ == "__main__":
    main()
