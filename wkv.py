"""The WKV operator of RWKV-4 (arXiv 2305.13048, section 3): one function, three back ends.

    y_t = (sum_{i<t} e^(-(t-1-i) w + k_i) v_i + e^(u + k_t) v_t) / (the same without the v)     w > 0, per channel

wkv_torch is the explanation and the oracle; wkv_cuda.cu is the speed, on the GPU and on the CPU.
`python wkv.py` measures them. Shape letters: B batch, T frames, C channels."""
import argparse
import ctypes
import functools
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time

import torch
from torch import Tensor

CHUNK = 12


def wkv(w, u, k, v, state=None, backend=None):
    """Weighted mean of v over the past, what RWKV-LM's RWKV-v4neo calls `RUN_CUDA(B, T, C, w, u, k, v)`.

    w = exp(time_decay) > 0 and u = time_first: (C,). k, v: (B, T, C), float32 or bfloat16. state: (B, 3, C) float32 as an
    earlier call returned it (numerator, denominator, the exponent both are relative to), None at the start of a tune.
    backend: 'cuda', 'cpu', 'torch', or None for the best at hand. Returns y (B, T, C) in v's dtype and the state after frame T.
    The gradient of y reaches w, u, k, v; states are constants, so a tune read in pieces has its gradient cut between them.
    Raises ValueError for shapes that do not fit and for a back end that is unknown or cannot run on these tensors."""
    B, T, C = k.shape
    state = fresh_state(k) if state is None else state.detach()
    if not (T and v.shape == k.shape and w.shape == u.shape == (C,) and state.shape == (B, 3, C)):
        raise ValueError(f"wkv: k {(*k.shape,)}, v {(*v.shape,)}, w {(*w.shape,)}, u {(*u.shape,)} and state {(*state.shape,)} "
                         "must be (B, T, C) twice, (C,) twice and (B, 3, C), with T at least 1")
    device, fits = k.device.type, k.dtype == v.dtype and k.dtype in (torch.float32, torch.bfloat16)
    if backend is None:
        backend = best_backend(device) if fits else "torch"
    elif backend not in ("torch", device) or backend != "torch" and not (fits and find_kernel(device)[0]):
        raise ValueError(f"wkv: backend {backend!r} cannot run on {k.dtype} on {device} ({find_kernel(device)[1]}); try 'torch'")
    if backend == "torch":
        return wkv_torch(w, u, k, v, state)
    if T == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return launch_forward(w, u, k, v, state)[:2]  # composing, frame by frame: straight to the kernel
    y, state, _ = kernel_forward(w, u, k, v, state)
    return y, state.detach()


def fresh_state(k):
    """The state (B, 3, C) before the first frame: empty sums, relative to an exponent below all others."""
    state = torch.zeros(k.shape[0], 3, k.shape[2], dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
    state[:, 2] = -1e38
    return state


def wkv_torch(w, u, k, v, state):
    """The same in plain PyTorch, in float64 if k is. The two sums are a e^p and b e^p, where p, the largest exponent among the
    terms, keeps e^k from overflowing."""
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
    """The kernel library for 'cpu' or 'cuda', built at the first call, or None; and how it runs, or why there is none."""
    if device not in ("cpu", "cuda"):
        return None, f"there is no kernel for {device}"
    try:
        return build_kernel(device)
    except Exception as error:  # no compiler, ninja or room, an old compiler, a folder that is read-only: all end the same way
        return None, f"the {device} kernel cannot be built: {str(error).strip().splitlines()[0]}"


def build_kernel(device):
    from torch.utils import cpp_extension  # takes a while, and plain PyTorch does without it
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "wkv_cuda.cu")
    if device == "cuda":
        target = " ".join(sorted({"sm_%d%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}))
        how, suffix, flags = f"CUDA kernel for {target}", ".cu", ["-O3"]
    else:
        target = torch.backends.cpu.get_cpu_capability()
        how, suffix = f"CPU kernel for {target}, {torch.get_num_threads()} threads", ".cpp"
        flags = ["-O3", "-ffp-contract=fast", *{"AVX512": ["-march=skylake-avx512"], "AVX2": ["-march=haswell"]}.get(target, [])]
        flags += [] if sys.platform == "darwin" else ["-fopenmp"]
    with open(source, "rb") as f:
        key = hashlib.sha256(f.read() + repr((CHUNK, target, flags)).encode()).hexdigest()[:16]
    folder = os.path.join(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root(), "wkv")
    library = os.path.join(folder, f"wkv_{device}_{key}.so")
    if not os.path.exists(library):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as build:  # one's own, so that two processes never wait or meet
            shutil.copy(source, os.path.join(build, "wkv" + suffix))
            flags = flags + [f"-DCHUNK={CHUNK}"]
            cpp_extension.load("wkv_kernel", os.path.join(build, "wkv" + suffix), extra_cflags=flags, extra_cuda_cflags=flags,
                               build_directory=build, is_python_module=False)
            os.replace(os.path.join(build, "wkv_kernel.so"), library)
    return ctypes.CDLL(library), how


@torch.compiler.assume_constant_result
def best_backend(device):
    if find_kernel(device)[0]:
        return device
    if device not in told:
        print(describe(device), file=sys.stderr)
    return "torch"


told = set()


def describe(device):
    """One line that says which back end runs on this device, and why."""
    device = torch.device(device).type
    told.add(device)
    kernel, why = find_kernel(device)
    return f"WKV: {why}" if kernel else f"WKV: plain PyTorch, since {why}"


class Args(ctypes.Structure):  # struct Args of wkv_cuda.cu
    _fields_ = [("where", ctypes.c_int64), *((name, ctypes.c_int) for name in "B T C bf16 segments warps".split()),
                *((name, ctypes.c_void_p) for name in "w u state last saved scan dwu k v y g dk dv".split())]


def launch(name, split, k, **tensors):
    where = torch.cuda.current_stream().cuda_stream if k.is_cuda else torch.get_num_threads() if k.numel() > 1 << 14 else 1
    args = Args(where, *k.shape, k.dtype == torch.bfloat16, *split, k=k.data_ptr(), **{n: t.data_ptr() for n, t in tensors.items()})
    code = getattr(find_kernel(k.device.type)[0], name)(ctypes.byref(args))
    if code:
        raise RuntimeError(f"{name} failed with CUDA error {code}")


def plan(k, parts=0):
    """How time is split: into (segments, warps). As many as keep the machine busy; parts asks for a number, 1 is the walk."""
    B, T, C = k.shape
    chunks = -(-T // CHUNK)
    if k.is_cuda:
        parts = parts or min(16, (1 << 17) // (B * C))
        return 1, max(1, min(parts, 16, chunks))
    parts = max(1, min(parts or torch.get_num_threads() // (B * -(-C // 16)), chunks))
    return -(-chunks // -(-chunks // parts)), 1  # none is empty


def launch_forward(w, u, k, v, state, parts=0):
    w, u, k, v, state = w.float().contiguous(), u.float().contiguous(), k.contiguous(), v.contiguous(), state.float().contiguous()
    B, T, C = k.shape
    split = plan(k, parts)
    y, last, saved = torch.empty_like(v), torch.empty_like(state), state.new_empty(B, -(-T // CHUNK), 3, C)
    scan = state.new_empty(B, split[0], 4, C) if split[0] > 1 else saved
    launch("wkv_forward", split, k, w=w, u=u, v=v, state=state, last=last, saved=saved, y=y, scan=scan)
    return y, last, saved


@torch.library.custom_op("wkv::forward", mutates_args=())
def kernel_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, parts: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(k):
        return launch_forward(w, u, k, v, state, parts)


@kernel_forward.register_fake
def _(w, u, k, v, state, parts=0):
    B, T, C = k.shape
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(B, -(-T // CHUNK), 3, C)


@torch.library.custom_op("wkv::backward", mutates_args=())
def kernel_backward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, saved: Tensor, g: Tensor,
                    parts: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w32, u32, k, v, saved, g = w.float().contiguous(), u.float().contiguous(), k.contiguous(), v.contiguous(), saved.contiguous(), g.contiguous()
    B, T, C = k.shape
    split = plan(k, parts)
    dk, dv, dwu, scan = torch.empty_like(k), torch.empty_like(v), w32.new_empty(B, split[0] * split[1], 2, C), w32.new_empty(B, split[0], 4, C)
    with torch.cuda.device_of(k):
        launch("wkv_backward", split, k, w=w32, u=u32, v=v, saved=saved, g=g, dk=dk, dv=dv, dwu=dwu, scan=scan)
    dw, du = dwu.sum((0, 1))
    return dw.to(w.dtype, copy=True), du.to(u.dtype, copy=True), dk, dv


@kernel_backward.register_fake
def _(w, u, k, v, saved, g, parts=0):
    return torch.empty_like(w), torch.empty_like(u), k.new_empty(k.shape), v.new_empty(v.shape)


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[2])
    ctx.parts = inputs[5]


def autograd(ctx, g, *_):
    return *kernel_backward(*ctx.saved_tensors, g, ctx.parts), None, None


kernel_forward.register_autograd(autograd, setup_context=save_for_backward)
