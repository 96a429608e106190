"""
The models: RWKV-4 and LSTM over frames, with a chord head or a Bernoulli head.

Shape letters: B batch, T frames, C channels (n_embd), V units in a frame, L layers, K units that are on in a frame,
M choices that spell a batch of frames (K + 1 for each frame: its units and "done").

Both architectures read binary frames (B, T, V) and answer for each the distribution of the frame after it:

    out, state = model(frames, state)      # any T >= 1; state None at the start of a tune
    model.nll(out, targets)                # (B, T): -ln p(target frame | frames so far), in nats
    model.sample(out[:, -1])               # (B, V): the next frame, drawn

The same call trains (T = a window, state dropped) and composes (T = 1, state carried); the numbers agree.
All that is known of music here is that the last unit of a frame is the boundary between tunes, and how long a beat is: a
frame may be any set of units, and a character of text is a frame with one.
`python model.py` times training steps of both architectures side by side.
"""

import argparse
import math
import os
import pickle
import time
import warnings
import zipfile
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from wkv import wkv


@dataclass
class Config:
    n_units: int                # V, as the data has it
    arch: str = 'rwkv'          # 'rwkv' or 'lstm'
    head: str = 'chord'         # 'chord' or 'bernoulli'
    n_layer: int = 3
    n_embd: int = 192           # C
    dropout: float = 0.3
    lookback: int = 0           # W: the model also looks at the last W frames of the tune; 0: it does not
    beat: int = 0               # frames in a beat; the model is told where in beat, bar and section it is; 0: it is not

    def __post_init__(self):
        sizes = self.n_units, self.n_layer, self.n_embd
        if not (all(type(n) is int and n <= 100_000 for n in (*sizes, self.lookback, self.beat)) and min(sizes) >= 1
                and self.lookback >= 0 and self.beat >= 0 and 0 <= self.dropout < 1
                and self.arch in ('rwkv', 'lstm') and self.head in ('chord', 'bernoulli')):
            raise ValueError(f'there is no such model: {self}')


class Dropout(nn.Module):
    """Variational dropout (Gal & Ghahramani 2016): x (B, T, C) loses the same channels in all frames of a window."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], 1, x.shape[2], device=x.device) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# RWKV-4 (Peng et al. 2023, arXiv 2305.13048). Names and shapes of the parameters are those of RWKV-LM's RWKV-v4neo.

def shift(x, last):
    """The input one frame earlier (the paper's token shift): x (B, T, C), last (B, C) or None -> (B, T, C), x[:, -1]."""
    last = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last.unsqueeze(1).to(x.dtype)
    return torch.cat((last, x[:, :-1]), dim=1), x[:, -1].detach()


class TimeMix(nn.Module):
    """
    Time mixing (RWKV_TimeMix in RWKV-v4neo); it plays the part of attention.

        k_t = W_k (m_k * x_t + (1 - m_k) * x_{t-1})         and v_t, r_t alike: the paper's "token shift"
        y_t = sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t, over the same sum without v: its "WKV operator", wkv.py
        out_t = W_o (sigmoid(r_t) * y_t): its "output gating"

    with w = e^{time_decay}, u = time_first, m = time_mix. x (B, T, C); state (x_{t-1} (B, C), wkv state (B, 3, C)).
    """

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        depth = layer / max(1, config.n_layer - 1)      # 0 at the bottom, 1 at the top
        ramp = layer / config.n_layer                   # 0 at the bottom, almost 1 at the top
        c = torch.arange(C)
        # each channel starts with its own memory: w from e^-5 (over a hundred frames) to e^3 (only the frame before) ...
        self.time_decay = nn.Parameter(-5 + 8 * (c / max(1, C - 1)) ** (0.7 + 1.3 * depth))
        # ... its own weight for the present frame, in a zigzag so that neighbours differ ...
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((c + 1) % 3 - 1.0))
        # ... and its own share of the frame before
        mix = (c / C).view(1, 1, C)
        self.time_mix_k = nn.Parameter(mix ** (1 - ramp))
        self.time_mix_v = nn.Parameter(mix ** (1 - ramp) + 0.3 * depth)
        self.time_mix_r = nn.Parameter(mix ** (0.5 * (1 - ramp)))
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)

    def forward(self, x, state):
        last, memory = state
        before, last = shift(x, last)
        k = self.key(torch.lerp(before, x, self.time_mix_k.to(x.dtype)))
        v = self.value(torch.lerp(before, x, self.time_mix_v.to(x.dtype)))
        r = self.receptance(torch.lerp(before, x, self.time_mix_r.to(x.dtype)))
        y, memory = wkv(self.time_decay.exp(), self.time_first, k, v, memory)
        return self.output(torch.sigmoid(r) * y), (last, memory)


class ChannelMix(nn.Module):
    """
    Channel mixing (RWKV_ChannelMix in RWKV-v4neo); it plays the part of the feed-forward layer.

        r_t = W_r (m_r * x_t + (1 - m_r) * x_{t-1})         and k_t alike
        out_t = sigmoid(r_t) * W_v max(k_t, 0)^2

    x (B, T, C); state x_{t-1} (B, C).
    """

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        mix = (torch.arange(C) / C).view(1, 1, C) ** (1 - layer / config.n_layer)
        self.time_mix_k = nn.Parameter(mix.clone())
        self.time_mix_r = nn.Parameter(mix.clone())
        self.key = nn.Linear(C, 4 * C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(4 * C, C, bias=False)

    def forward(self, x, last):
        before, last = shift(x, last)
        k = self.key(torch.lerp(before, x, self.time_mix_k.to(x.dtype)))
        r = self.receptance(torch.lerp(before, x, self.time_mix_r.to(x.dtype)))
        return torch.sigmoid(r) * self.value(torch.relu(k).square()), last


class RWKVBlock(nn.Module):
    """
    One layer: x + TimeMix(LN(x)), then x + ChannelMix(LN(x)). x (B, T, C); state (that of TimeMix, that of ChannelMix).
    The first layer also owns ln0, with which Model normalises what comes in.
    """

    def __init__(self, config, layer):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)
        self.drop = Dropout(config.dropout)

    def forward(self, x, state):
        att_state, ffn_state = state if state is not None else ((None, None), None)
        out, att_state = self.att(self.ln1(x), att_state)
        x = x + self.drop(out)
        out, ffn_state = self.ffn(self.ln2(x), ffn_state)
        return x + self.drop(out), (att_state, ffn_state)


class LSTMBlock(nn.Module):
    """
    One layer: x + LSTM(LN(x)). The LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000) is
    torch.nn.LSTM; for its input x_t, with the four gates stacked in each matrix:

        i, f, g, o = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)          h_t = sigmoid(o) * tanh(c_t)

    x (B, T, C); state (h (1, B, C), c (1, B, C)).
    """

    def __init__(self, config, layer):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.lstm = nn.LSTM(config.n_embd, config.n_embd, batch_first=True)
        self.drop = Dropout(config.dropout)

    def forward(self, x, state):
        out, state = self.lstm(self.ln1(x), state)
        return x + self.drop(out), tuple(part.detach() for part in state)


# ---------------------------------------------------------------------------------------------------------------------

def frames_since(event, before=None):
    """Frames since the last event, 0 at one: event (B, T, ..) bool, before (B, ..) the answer for the frame before these
    or None for 0 -> (B, T, ..) int64."""
    t = torch.arange(event.shape[1], device=event.device).view(-1, *[1] * (event.dim() - 2))
    last = torch.where(event, t, -1).cummax(1).values                   # -1: not in these frames
    since = t - last
    return since if before is None else since + (last < 0) * before.unsqueeze(1)


class Clock(nn.Module):
    """
    Where in the beat, the bar and the section of the tune a frame stands: hands that turn once in `beats` beats, from the
    boundary at which the tune begins. With n_t the number of frames since then and `beat` frames in a beat,

        x_t = .. + P (cos(2 pi n_t / (b beat)), sin(2 pi n_t / (b beat)) for b in beats)

    It is the position encoding of the Transformer (Vaswani et al. 2017) with the periods that music has.
    """
    beats = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

    def __init__(self, config):
        super().__init__()
        periods = torch.tensor(self.beats) * config.beat
        self.register_buffer('turns', 1 / periods, persistent=False)        # of each hand, in a frame
        self.position = nn.Linear(2 * len(self.beats), config.n_embd, bias=False)

    def forward(self, frames, n):
        """frames (B, T, V); n (B,), that of the frame before them, or None at the start -> P (..) (B, T, C), the last n."""
        if n is None:
            n = torch.full((len(frames),), -1, device=frames.device)
        n = frames_since(frames[..., -1] > 0, n)                            # (B, T)
        angle = 2 * math.pi * (n.unsqueeze(-1) * self.turns % 1)
        hands = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.position(hands.to(self.position.weight.dtype)), n[:, -1]


class Lookback(nn.Module):
    """
    Tunes repeat their bars and phrases, and a vector of C numbers does not hold a phrase note by note. So the model keeps
    the last W frames of the tune as they are, after an idea of the Lookback RNN (Waite, Magenta 2016), and with them

        run_t[l] = run_{t-1}[l] + 1 if frame t equals frame t - l, else 0               for the lags l = 1..W
        x_t = W_emb frame_t + b_emb + A ln(1 + run_t)                   what the blocks get; h_t is what they make of it
        p_t = softmax(D LN(h_t) + b + c * ln(1 + run_t))                over the lags, and one more for "nothing like it"
        recall_t = R sum_l p_t[l] frame_{t+1-l}                         what came next then; it is added to h_t for the head

    (A run, D and b lag, c trust, R recall in the code). It is an attention that asks "how long ago?" instead of "where is
    something like this?", and starts out from: the longer a lag has held, the likelier it holds once more. A frame that is
    not of the same tune, before the boundary, equals no other and is not recalled. Training counts runs anew in each window.
    """

    def __init__(self, config):
        super().__init__()
        C, V, self.W = config.n_embd, config.n_units, config.lookback
        self.run = nn.Linear(self.W, C, bias=False)
        self.ln = nn.LayerNorm(C)
        self.lag = nn.Linear(C, self.W + 1)
        self.trust = nn.Parameter(torch.ones(self.W))
        self.recall = nn.Linear(V, C, bias=False)

    def read(self, frames, state):
        """
        frames (B, T, V); state: the frames before them (B, W, V), and run (B, W) after these or None for zeros
        -> A ln(1 + run) (B, T, C), the state after the frames, and what forward needs: all frames seen (B, W + T, V), where
        in them frame t + 1 - l stands (B, T, W), whether it is of the same tune (B, T, W), and ln(1 + run) (B, T, W).
        """
        W, dtype, (past, before) = self.W, self.run.weight.dtype, state
        t = torch.arange(frames.shape[1], device=frames.device).unsqueeze(1)            # (T, 1)
        seen = torch.cat((past, frames), dim=1)                             # (B, W + T, V): frame t stands at W + t
        then = t + W + 1 - torch.arange(1, W + 1, device=frames.device)     # where frame t + 1 - l stands
        then = then.expand(len(seen), -1, -1)                               # (B, T, W)
        past, seen, tune = seen[:, -W:], seen.to(dtype), seen[..., -1].cumsum(1)        # a boundary begins the next tune
        one_tune = tune[:, W:].unsqueeze(2) == tune.unsqueeze(1)            # (B, T, W + T)
        # frames are equal if they have as many units in common as each has on: a product compares all pairs at once
        with torch.autocast(frames.device.type, enabled=False):             # bfloat16 counts to 256 only
            common = seen[:, W:] @ seen.mT                                  # (B, T, W + T)
        on = seen.sum(-1)
        equal = (common == on[:, W:].unsqueeze(2)) & (common == on.unsqueeze(1)) & one_tune
        equal = equal.gather(2, then - 1)                                   # (B, T, W): frame t and frame t - l
        run = frames_since(~equal, before)
        log_run = run.to(dtype).log1p()
        return self.run(log_run), (past, run[:, -1]), (seen, then, one_tune.gather(2, then), log_run)

    def forward(self, h, view):
        """h (B, T, C) from the blocks, view from read -> recall (B, T, C)."""
        seen, then, within, log_run = view
        scores = self.lag(self.ln(h))                                       # (B, T, 1 + W)
        scores = scores + F.pad(self.trust * log_run, (1, 0))
        p = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32))[..., 1:] * within
        weights = p.new_zeros(*p.shape[:2], seen.shape[1]).scatter(2, then, p)
        return self.recall(weights.to(seen.dtype) @ seen)


# ---------------------------------------------------------------------------------------------------------------------
# Heads: from what the model knows after frame t, (.., C), to the distribution of frame t + 1

class BernoulliHead(nn.Module):
    """Each unit on its own: p(frame) = prod_v sigmoid(logit_v)^frame_v (1 - sigmoid(logit_v))^(1 - frame_v)."""

    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(config.n_embd, config.n_units)

    def forward(self, h):
        return self.out(h)

    def nll(self, logits, frames):
        loss = F.binary_cross_entropy_with_logits(logits.float(), frames.float(), reduction='none')
        return loss.sum(-1)

    def sample(self, logits, temperature=1.0, top_p=1.0, generator=None, may_end=True):
        p = torch.sigmoid(logits.float() / temperature)
        # nucleus sampling over the two outcomes of a unit: the likelier one alone where it has top_p of the mass
        p = torch.where(torch.maximum(p, 1 - p) >= top_p, (p > 0.5).to(p.dtype), p)
        p[..., -1] *= may_end
        return torch.rand(p.shape, generator=generator, device=p.device).lt(p).to(torch.uint8)


class ChordHead(nn.Module):
    """
    Spells a frame from its lowest unit to its highest, one categorical choice at a time, until "done":

        p(frame) = prod_{j=1..K+1} softmax_{c > u_{j-1}}(logits(h, {u_1, .., u_{j-1}}))[u_j],     u_0 = -1, u_{K+1} = V ("done")

        logits(h, S) = W_out gelu(W_hidden h + b_hidden + sum_{u in S} W_chosen[:, u]) + b_out

    Every set of units has exactly one spelling, so the probabilities of all 2^V frames sum to 1. This is NADE
    (Larochelle & Murray 2011) that walks over the units that are on instead of all V: K + 1 small steps, some six.
    """

    def __init__(self, config):
        super().__init__()
        C, V = config.n_embd, config.n_units
        self.hidden = nn.Linear(C, C)
        self.chosen = nn.Linear(V, C, bias=False)
        self.out = nn.Linear(C, V + 1)

    def forward(self, h):
        return self.hidden(h)                           # what does not depend on the choices is worked out once

    def logits(self, h, chosen, last):
        """h (M, C), chosen (M, V) the units taken so far, last (M,) the highest of them or -1 -> (M, V + 1)."""
        logits = self.out(F.gelu(h + self.chosen(chosen.to(h.dtype)))).float()
        allowed = torch.arange(logits.shape[-1], device=h.device) > last.unsqueeze(-1)
        return logits.masked_fill(~allowed, -math.inf)

    def nll(self, h, frames):
        shape, V = frames.shape[:-1], frames.shape[-1]
        h, frames = h.reshape(-1, h.shape[-1]), frames.reshape(-1, V)
        # one row for every choice of every frame: (frame, choice) in reading order, "done" is choice V
        frame, choice = F.pad(frames, (0, 1), value=1).nonzero(as_tuple=True)              # (M,), (M,)
        first = torch.ones_like(frame, dtype=torch.bool)
        first[1:] = frame[1:] != frame[:-1]
        last = torch.where(first, -1, choice.roll(1))
        # index_select, since the backward of h[frame] would take three times as long
        chosen = frames.index_select(0, frame) * (torch.arange(V, device=h.device) < choice.unsqueeze(-1))   # (M, V)
        loss = F.cross_entropy(self.logits(h.index_select(0, frame), chosen, last), choice, reduction='none')
        return loss.new_zeros(frames.shape[0]).index_add(0, frame, loss).view(shape)

    def sample(self, h, temperature=1.0, top_p=1.0, generator=None, may_end=True):
        B, V = h.shape[0], self.chosen.in_features
        frame = torch.zeros(B, V + 1, dtype=torch.uint8, device=h.device)
        last = torch.full((B,), -1, device=h.device)
        while (last < V).any():                         # rows that are done choose "done" again, the only unit left
            logits = self.logits(h, frame[:, :V], last.clamp(max=V - 1))
            if not may_end:
                logits[:, V - 1] = -math.inf
            p = torch.softmax(logits / temperature, dim=-1)
            if top_p < 1:                               # nucleus sampling (Holtzman et al. 2020)
                q, order = p.sort(dim=-1, descending=True)
                q[q.cumsum(-1) - q >= top_p] = 0
                p = torch.zeros_like(p).scatter(-1, order, q)
            last = torch.multinomial(p, 1, generator=generator).squeeze(-1)
            frame.scatter_(1, last.unsqueeze(1), 1)
        return frame[:, :V]


# ---------------------------------------------------------------------------------------------------------------------

class Model(nn.Module):
    """
    frames (B, T, V) -> Linear (and clock, and lookback) -> LayerNorm -> blocks -> (lookback) -> LayerNorm -> head.
    """

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.n_embd
        self.emb = nn.Linear(config.n_units, C)         # in place of the token embedding: the input already is a vector
        self.clock = Clock(config) if config.beat else None
        self.look = Lookback(config) if config.lookback else None
        block = {'rwkv': RWKVBlock, 'lstm': LSTMBlock}[config.arch]
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(C)
        self.drop = Dropout(config.dropout)
        self.head = {'chord': ChordHead, 'bernoulli': BernoulliHead}[config.head](config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        for name, p in self.named_parameters():
            leaf = name.split('.', 2)[-1]               # 'blocks.0.att.key.weight' -> 'att.key.weight'
            if name in ('clock.position.weight', 'look.lag.weight', 'look.recall.weight'):
                p.zero_()                               # at first the runs alone decide on a lag, nothing is recalled, no clock is read
            elif leaf in ('att.key.weight', 'att.receptance.weight', 'att.output.weight',
                        'ffn.receptance.weight', 'ffn.value.weight'):
                p.zero_()                               # RWKV-v4neo: every block starts as the identity
            elif leaf.startswith('lstm.weight'):
                for gate in p.chunk(4):
                    nn.init.orthogonal_(gate)
            elif leaf.startswith('lstm.bias'):          # forget gate open: remember at first (Jozefowicz et al. 2015)
                p.zero_()
                if 'ih' in leaf:
                    p[p.shape[0] // 4:p.shape[0] // 2] = 1
            elif name.startswith('blocks.') and p.dim() == 2:
                nn.init.orthogonal_(p, gain=max(1, p.shape[0] / p.shape[1]) ** 0.5)

    def forward(self, frames, state=None):
        """
        frames (B, T, V) binary, T >= 1 -> what the head needs for the frame after each, (B, T, C or V), and the state.
        state: (that of Clock, that of Lookback, a list with the state of every block); gradients do not flow through it.
        With None the first frame should be a boundary; a window from the middle of a tune has (n, (past, None), None), n
        (B,) the place in its tune of the frame before the window, with 0 for the boundary, past (B, W, V) the frames before.
        """
        n, looked, recurrent = state or (None, None, None)
        x = self.emb(frames.to(self.emb.weight.dtype))
        if self.clock:
            position, n = self.clock(frames, n)
            x = x + position
        if self.look:
            looked = looked or (frames.new_zeros(frames.shape[0], self.look.W, frames.shape[2]), None)
            run, looked, view = self.look.read(frames, looked)
            x = x + run
        x = self.drop(self.blocks[0].ln0(x))
        recurrent = list(recurrent or [None] * len(self.blocks))
        for i, block in enumerate(self.blocks):
            x, recurrent[i] = block(x, recurrent[i])
        if self.look:
            x = x + self.look(x, view)
        return self.head(self.drop(self.ln_out(x))), (n, looked, recurrent)

    def nll(self, out, targets):
        """-ln p(targets | frames before), in nats: out from forward (B, T, ..), targets (B, T, V) -> (B, T)."""
        return self.head.nll(out, targets)

    def sample(self, out, temperature=1.0, top_p=1.0, generator=None, may_end=True):
        """Draws the next frame: out (B, ..) of the last frame read -> (B, V) uint8; may_end: may the last unit be on?"""
        return self.head.sample(out, temperature, top_p, generator, may_end)

    @torch.no_grad()
    def compose(self, prompt, length, temperature=1.0, top_p=1.0, generator=None, at_least=0):
        """
        Continues prompts, all B at once: (B, T, V) frames, T >= 1 -> list of B tensors (T_i, V) uint8 with what comes
        after. A row ends where the model puts the last unit (the boundary) into a frame, which it may after `at_least`
        frames, or after `length` frames.
        """
        self.eval()
        state = None
        for piece in prompt.split(max(1, 4096 // prompt.shape[0]), dim=1):     # looking back takes memory for each
            out, state = self(piece, state)
        frames = torch.empty(prompt.shape[0], length, prompt.shape[2], dtype=torch.uint8, device=prompt.device)
        ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        ends = torch.full((prompt.shape[0],), length, device=prompt.device)
        for t in range(length):
            frame = self.sample(out[:, -1], temperature, top_p, generator, may_end=t >= at_least)
            ends[(frame[:, -1] > 0) & ~ended] = t
            ended |= frame[:, -1] > 0
            if ended.all():
                break
            frames[:, t] = frame
            out, state = self(frame.unsqueeze(1), state)
        return [tune[:end] for tune, end in zip(frames, ends)]

    @torch.no_grad()
    def nats(self, frames):
        """-ln p of each frame given those before it, but for the first: (B, T + 1, V) -> (B, T). Read from a fresh state
        and in pieces, so that long songs need no more memory."""
        nats, state = [], None
        for piece, after in zip(frames[:, :-1].split(512, dim=1), frames[:, 1:].split(512, dim=1)):
            out, state = self(piece, state)
            nats.append(self.nll(out, after))
        return torch.cat(nats, dim=1)

    def nats_per_frame(self, prompt, tune):
        """Mean -ln p, in nats, of the frames of tune (T, V) that follow prompt (P, V), P >= 1."""
        nats = self.nats(torch.cat((prompt, tune)).unsqueeze(0))
        return nats[:, len(prompt) - 1:].double().sum().item() / len(tune)

    def optimizers(self, name, lr, weight_decay, beta2=0.99):
        """
        A list of optimisers that share the parameters out. 'adamw' takes all. With 'muon' (Jordan et al. 2024, torch.optim
        from torch 2.9 on) the matrices of the blocks, RWKV's and LSTM's alike, move by the orthogonal matrix that is
        nearest to their momentum, so that all directions learn alike, and AdamW takes the rest. It works in bfloat16.
        Weight decay is for matrices only: biases, gains, decays and mixes go free.
        """
        inner = [p for p in self.blocks.parameters() if p.dim() == 2] if name == 'muon' else []
        taken = {id(p) for p in inner}
        outer = [p for p in self.parameters() if id(p) not in taken]
        groups = [{'params': [p for p in outer if p.dim() == 2], 'weight_decay': weight_decay},
                  {'params': [p for p in outer if p.dim() != 2], 'weight_decay': 0.0}]
        adamw = torch.optim.AdamW(groups, lr, betas=(0.9, beta2), fused=True)
        return [adamw, torch.optim.Muon(inner, lr, weight_decay=weight_decay)] if inner else [adamw]


VERSION = 2         # of the layout of a checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one sentence that names the file and the mend."""


# what sample.py reads in a checkpoint beside the model
META = dict(data=str, source=str, steps_per_beat=int, onsets=bool, common_key=bool, tempo=float)


def load_checkpoint(path, device='cpu'):
    """
    A file that train.py wrote -> (model in eval mode, its dictionary). Raises CheckpointError if it is not one.

    Trusts nothing: the file is mapped, not read, until its sizes and names are those of a model of its config, so it
    costs no more memory than it has bytes, and weights_only=True runs no code.
    """
    try:
        with open(path, 'rb') as f, zipfile.ZipFile(f) as archive:
            members = archive.infolist()
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > os.path.getsize(path):
                raise ValueError('it unpacks to more than it is')
            f.seek(-22, 2)      # where the directory of a zip ends
            if f.read(4) != b'PK\5\6' or archive.testzip():
                raise ValueError('its bytes have changed')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')         # of odd pickles, which end in the sentence below
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if checkpoint['version'] != VERSION:
            raise ValueError(f'it is of version {checkpoint["version"]}, this code reads {VERSION}')
        meta, weights, config = checkpoint['meta'], checkpoint['model'], Config(**checkpoint['config'])
        if not (all(type(meta[name]) is kind for name, kind in META.items()) and 1 <= meta['steps_per_beat'] <= 96
                and 0 < meta['tempo'] < 1e9 and type(checkpoint['valid']) is float and type(checkpoint['step']) is int):
            raise ValueError('what it says of the music makes no sense')
        if config.n_layer != len({name.split('.')[1] for name in weights if name.startswith('blocks.')}):
            raise ValueError(f'it does not have the {config.n_layer} layers it claims')
        with torch.device('meta'):      # shapes without memory
            expected = Model(config).state_dict()
        for name in expected.keys() | weights.keys():
            want, have = expected.get(name), weights.get(name)
            if want is None or not isinstance(have, torch.Tensor) or have.shape != want.shape:
                shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else 'absent' for x in (have, want)]
                raise ValueError(f'its {name} is {shapes[0]} and should be {shapes[1]}')
            if have.dtype != want.dtype or have.device.type != 'cpu' or not (have.is_contiguous() and have.isfinite().all()):
                raise ValueError(f'its {name} does not consist of finite numbers')
    except OSError as e:
        raise CheckpointError(f'cannot read {path} ({e.strerror}): train a model first, or give another path') from None
    except Exception as e:      # whatever unzipping and unpickling make of bytes that are not a checkpoint
        why = 'it holds more than numbers and text' if isinstance(e, pickle.UnpicklingError) else str(e)
        why = ''.join(c for c in why if c.isprintable())[:200] if type(e) in (ValueError, pickle.UnpicklingError) else type(e).__name__
        raise CheckpointError(f'{path} is damaged or no checkpoint of this project ({why}): train again, or give another path') from None
    model = Model(config).to(device)
    model.load_state_dict(weights)
    return model.eval(), checkpoint


# ---------------------------------------------------------------------------------------------------------------------

def main():
    """Times training steps of RWKV and LSTM of the default sizes for a CPU, in turns, on random frames like those of tunes."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--device', default='cpu', help='where to run')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'], help='of the matrix products')
    parser.add_argument('--head', default='chord', choices=['chord', 'bernoulli'], help='of both models')
    parser.add_argument('--optimizer', default='adamw', choices=['adamw', 'muon'], help='of both models')
    parser.add_argument('--steps', type=int, default=100, help='of each')
    args = parser.parse_args()
    V, W, B, T = 177, 256, 8, 256
    models, seconds = {}, {}
    for arch, C in ('rwkv', 192), ('lstm', 240):
        model = Model(Config(V, arch, args.head, 3, C, lookback=W, beat=4)).to(args.device)
        models[arch] = model, model.optimizers(args.optimizer, 1e-3, 0.1)
        print(f'{arch}: {sum(p.numel() for p in model.parameters()):,} parameters')
    for step in range(args.steps + 5):
        frames = (torch.rand(B, W + T + 1, V, device=args.device) < 4 / V).to(torch.uint8)
        frames[..., -1] = 0
        n = torch.zeros(B, dtype=torch.long, device=args.device)
        for arch, (model, optimizers) in models.items():
            start = time.perf_counter()
            with torch.autocast(args.device, getattr(torch, args.dtype), enabled=args.dtype != 'float32'):
                out, _ = model(frames[:, W:-1], (n, (frames[:, :W], None), None))
                loss = model.nll(out, frames[:, W + 1:]).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            loss.item()                                 # waits for a GPU
            seconds.setdefault(arch, []).append(time.perf_counter() - start)
    rates = {arch: B * T / torch.tensor(times[5:], dtype=torch.float64) for arch, times in seconds.items()}
    for name, x in (*rates.items(), ('rwkv / lstm', rates['rwkv'] / rates['lstm'])):
        low, middle, high = (f'{x.quantile(q):,.{0 if name in rates else 2}f}' for q in (0.25, 0.5, 0.75))
        print(f'{name}: {middle} (half of the steps: {low} to {high})' + ' frames a second' * (name in rates))


if __name__ == '__main__':
    main()
