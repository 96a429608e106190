"""The models: RNN, LSTM, RWKV and Transformer over frames, and the heads that give the probability of the next frame.

Shape letters: B batch, T frames, C channels (n_embd), V units in a frame, W frames that can be looked back at,
M choices that spell a batch of frames.

Every architecture reads binary frames (B, T, V) and answers for each the distribution of the frame after it:

    out, state = model(frames, state)       # any T >= 1; state None at the start of a tune
    model.head.nll(out, targets)            # (B, T): -ln p(target frame | frames so far), in nats
    model.head.sample(out[:, -1])           # (B, V): the next frame, drawn

The same call trains (T = a window) and composes (T = 1, state carried); the numbers agree. All that is known of music
here: the last unit of a frame is the boundary between tunes, which units move time, and how long a beat is.
"""

import bisect
import io
import math
import pickle
import zipfile
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from notation import BARS
from notation import UserError
from notation import read_bytes
from notation import write_whole
from wkv import wkv


@dataclass
class Config:
    n_units: int                # V, as the representation has it
    arch: str = 'rwkv'          # a name in ARCHITECTURES
    head: str = 'chord'         # a name in HEADS
    n_layer: int = 3
    n_embd: int = 192           # C
    dropout: float = 0.3        # of what a block adds
    window: int = 1024          # frames that the Transformer's attention reaches back, itself included
    lookback: int = 0           # W: the model also looks at the last W frames of the tune; 0: it does not
    beat: int = 0               # steps in a beat: the model is told where in beat, bar and section it is; 0: it is not
    form: int = 0               # beats that a form reaches back at most; 0: the model is told of no form
    shift: int = 0              # the first of the units that move time by 1, 2, .. steps; 0: each frame does, by one


class Dropout(nn.Module):
    """Variational dropout (Gal & Ghahramani 2016): x (B, T, C) loses the same channels in all frames of a window.

    Only what a block adds to x goes through it. A model whose input and head have learned with channels missing is too
    sure of itself when it composes with all of them, and strikes too few notes.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        B, _, C = x.shape
        chance = torch.rand(B, 1, C, device=x.device)
        keep = chance >= self.p
        factor = keep / (1 - self.p)
        return x * factor.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The architectures. A block is one layer: forward(x (B, T, C), state) -> x, state, for any T >= 1; state None at the
# start. Read at once or in pieces, it gives the same numbers.

class RNNBlock(nn.Module):
    """x + RNN(LN(x)), the simple recurrent network (Elman 1990) as torch.nn.RNN has it:

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    h_{t-1} goes through a matrix, so step t has to wait for step t - 1. State: h (B, C).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.ln = nn.LayerNorm(config.n_embd)
        self.rnn = nn.RNN(config.n_embd, config.n_embd, batch_first=True)
        self.drop = Dropout(config.dropout)
        # orthogonal matrices neither blow up nor fade what goes through them again and again (Saxe et al. 2014)
        nn.init.orthogonal_(self.rnn.weight_ih_l0)
        nn.init.orthogonal_(self.rnn.weight_hh_l0)
        nn.init.zeros_(self.rnn.bias_ih_l0)
        nn.init.zeros_(self.rnn.bias_hh_l0)

    def forward(self, x, state):
        h = None if state is None else state.unsqueeze(0)
        out, h = self.rnn(self.ln(x), h)
        return x + self.drop(out), h.squeeze(0)


class LSTMBlock(nn.Module):
    """x + LSTM(LN(x)), the LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000) as
    torch.nn.LSTM has it; its four gates are stacked in each matrix:

        i, f, g, o = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)           what is remembered
        h_t = sigmoid(o) * tanh(c_t)                                what is told

    State: (h (B, C), c (B, C)).
    """

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.ln = nn.LayerNorm(C)
        self.lstm = nn.LSTM(C, C, batch_first=True)
        self.drop = Dropout(config.dropout)
        for weight in (self.lstm.weight_ih_l0, self.lstm.weight_hh_l0):
            for gate in weight.detach().chunk(4):
                nn.init.orthogonal_(gate)
        nn.init.zeros_(self.lstm.bias_ih_l0)
        nn.init.zeros_(self.lstm.bias_hh_l0)
        # the forget gate starts open: remember at first (Jozefowicz et al. 2015)
        forget_bias = self.lstm.bias_ih_l0.detach()[C:2 * C]
        nn.init.ones_(forget_bias)

    def forward(self, x, state):
        if state is not None:
            state = tuple(part.unsqueeze(0) for part in state)
        out, (h, c) = self.lstm(self.ln(x), state)
        state = h.squeeze(0), c.squeeze(0)
        return x + self.drop(out), state


def token_shift(x, last):
    """The input one frame earlier: x (B, T, C), last (B, 1, C) or None, the frame before x -> (B, T, C)."""
    if last is None:
        last = torch.zeros_like(x[:, :1])
    return torch.cat((last, x[:, :-1]), dim=1)


def token_mix(before, x, share):
    """A mix of a frame and the one before, for each channel its own: share (C,) of x."""
    return torch.lerp(before, x, share.to(x.dtype))


class TimeMix(nn.Module):
    """Time mixing, RWKV_TimeMix in RWKV-LM's RWKV-v4neo; it plays the part of attention.

        k_t = W_k (m_k * x_t + (1 - m_k) * x_{t-1})         and v_t, r_t alike: the paper's "token shift"
        y_t = sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t, over the same without v: its "WKV operator", wkv.py
        out_t = W_o (sigmoid(r_t) * y_t): its "output gating"

    with w = e^{time_decay}, u = time_first, m = time_mix. No matrix stands between the past and y_t, so all frames of a
    window are worked at once. State: (x_{t-1} (B, 1, C), that of wkv (B, 3, C)).
    """

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        channel = torch.arange(C)
        depth = layer / max(1, config.n_layer - 1)      # 0 at the bottom, 1 at the top
        below = 1 - layer / config.n_layer              # 1 at the bottom, almost 0 at the top
        # each channel starts with its own memory: w from e^-5 (over a hundred frames) to e^3 (the frame before) ...
        place = channel / max(1, C - 1)
        curve = 0.7 + 1.3 * depth
        self.time_decay = nn.Parameter(-5 + 8 * place ** curve)
        # ... its own weight for the present frame, in a zigzag so that neighbours differ ...
        zigzag = (channel + 1) % 3 - 1.0
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * zigzag)
        # ... and its own share of the present frame; the rest comes from the frame before
        mix = channel / C
        self.time_mix_k = nn.Parameter(mix ** below)
        self.time_mix_v = nn.Parameter(mix ** below + 0.3 * depth)
        self.time_mix_r = nn.Parameter(mix ** (0.5 * below))
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        # all but the values start from zero: every block starts as the identity
        nn.init.zeros_(self.key.weight)
        nn.init.orthogonal_(self.value.weight)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.output.weight)

    def forward(self, x, state):
        last, memory = state
        before = token_shift(x, last)
        k = self.key(token_mix(before, x, self.time_mix_k))
        v = self.value(token_mix(before, x, self.time_mix_v))
        r = self.receptance(token_mix(before, x, self.time_mix_r))
        w = self.time_decay.exp()
        y, memory = wkv(w, self.time_first, k, v, memory)
        out = self.output(torch.sigmoid(r) * y)
        return out, (x[:, -1:], memory)


class ChannelMix(nn.Module):
    """Channel mixing, RWKV_ChannelMix in RWKV-v4neo; it plays the part of the feed-forward layer.

        k_t = W_k (m_k * x_t + (1 - m_k) * x_{t-1})         and r_t alike
        out_t = sigmoid(r_t) * W_v max(k_t, 0)^2

    State: x_{t-1} (B, 1, C).
    """

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        below = 1 - layer / config.n_layer              # as in TimeMix
        mix = (torch.arange(C) / C) ** below
        self.time_mix_k = nn.Parameter(mix.clone())
        self.time_mix_r = nn.Parameter(mix.clone())
        self.key = nn.Linear(C, 4 * C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(4 * C, C, bias=False)
        # the gain, sqrt(4 C / C), keeps the size of what is made four times as wide
        nn.init.orthogonal_(self.key.weight, gain=2)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, x, last):
        before = token_shift(x, last)
        k = self.key(token_mix(before, x, self.time_mix_k))
        r = self.receptance(token_mix(before, x, self.time_mix_r))
        hidden = torch.relu(k).square()
        out = torch.sigmoid(r) * self.value(hidden)
        return out, x[:, -1:]


class RWKVBlock(nn.Module):
    """x + TimeMix(LN(x)), then x + ChannelMix(LN(x)): RWKV-4 (Peng et al. 2023, arXiv 2305.13048). Names and initial
    values are those of RWKV-LM's RWKV-v4neo. State: (that of TimeMix, that of ChannelMix)."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)
        self.drop = Dropout(config.dropout)

    def forward(self, x, state):
        att_state, ffn_state = state or ((None, None), None)
        out, att_state = self.att(self.ln1(x), att_state)
        x = x + self.drop(out)
        out, ffn_state = self.ffn(self.ln2(x), ffn_state)
        return x + self.drop(out), (att_state, ffn_state)


def rotate(x, first):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): x (B, heads, T, D), whose frames stand at first, first + 1,
    .. The pair of channels (j, j + D/2) is turned by position / 10000^(2j/D), so that a product of two rotated vectors
    depends on how far apart they stand."""
    T, D = x.shape[-2:]
    # float64: after an hour of music a position has too many digits for the sine in float32
    position = first + torch.arange(T, dtype=torch.float64)
    j = torch.arange(D // 2, dtype=torch.float64)
    slowness = 10000 ** (2 * j / D)
    angle = position.unsqueeze(1) / slowness                        # (T, D/2)
    cos = angle.cos().to(x)
    sin = angle.sin().to(x)
    a, b = x.chunk(2, dim=-1)
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.cat(turned, dim=-1)


def count_heads(C):
    """How many heads C channels make: of 32 each, or of the next size that divides C into even parts."""
    heads = max(1, C // 32)
    while C % (2 * heads):
        heads -= 1
    return heads


class Attention(nn.Module):
    """Causal attention (Vaswani et al. 2017) with rotary positions: for each head

        out_t = sum_i softmax_i(q_t . k_i / sqrt(D)) v_i        over the frames t - window < i <= t

    through torch's scaled_dot_product_attention, which is flash attention on a GPU. State: (rotated keys and values of
    the last window - 1 frames, each (B, heads, <window, D), and how many frames there have been)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.heads = count_heads(C)
        self.window = config.window
        self.query = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        for linear in (self.query, self.key, self.value):
            nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(self.output.weight)              # as in RWKV, a block starts as the identity

    def split(self, x):
        """x (B, T, C) -> (B, heads, T, D)"""
        heads = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)

    def forward(self, x, state):
        T = x.shape[1]
        past, first = state or (None, 0)                # first: the place of the first of these frames
        q = self.split(self.query(x))
        k = self.split(self.key(x))
        v = self.split(self.value(x))
        q = rotate(q, first)
        k = rotate(k, first)
        if past is not None:
            past_k, past_v = past
            k = torch.cat((past_k.to(k.dtype), k), dim=2)
            v = torch.cat((past_v.to(v.dtype), v), dim=2)
        S = k.shape[2]                                  # frames that can be seen
        if S == T and T <= self.window:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            frame = torch.arange(S, device=x.device)
            ago = frame[S - T:].unsqueeze(1) - frame    # (T, S)
            seen = (ago >= 0) & (ago < self.window)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        kept = max(0, S - self.window + 1)              # the first frame that the next one will still see
        past = k[:, :, kept:], v[:, :, kept:]
        out = out.transpose(1, 2).flatten(2)            # (B, T, C)
        return self.output(out), (past, first + T)


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Shazeer (2020, arXiv 2002.05202): W_o (silu(W_g x) * W_i x), here three times as
    wide as x, which makes the block as large as RWKV's."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.gate = nn.Linear(C, 3 * C, bias=False)
        self.input = nn.Linear(C, 3 * C, bias=False)
        self.output = nn.Linear(3 * C, C, bias=False)
        nn.init.orthogonal_(self.gate.weight, gain=3 ** 0.5)
        nn.init.orthogonal_(self.input.weight, gain=3 ** 0.5)
        nn.init.zeros_(self.output.weight)

    def forward(self, x):
        gate = F.silu(self.gate(x))
        return self.output(gate * self.input(x))


class TransformerBlock(nn.Module):
    """x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)): the pre-norm block of Llama (Touvron et al. 2023, arXiv
    2302.13971). State: that of Attention."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd)
        self.norm2 = nn.RMSNorm(config.n_embd)
        self.att = Attention(config)
        self.ffn = SwiGLU(config)
        self.drop = Dropout(config.dropout)

    def forward(self, x, state):
        dtype = self.norm1.weight.dtype                 # autocast leaves the type of a mean square to us
        normed = self.norm1(x.to(dtype))
        out, state = self.att(normed, state)
        x = x + self.drop(out)
        normed = self.norm2(x.to(dtype))
        out = self.ffn(normed)
        return x + self.drop(out), state


ARCHITECTURES = dict(rnn=RNNBlock, lstm=LSTMBlock, rwkv=RWKVBlock, transformer=TransformerBlock)


# ---------------------------------------------------------------------------------------------------------------------
# What the blocks are told beside the frame: where in the tune it stands, its form, and which passages it repeats

def count_since(reset, passed, before):
    """A count that goes on with time and that a reset sets to 0: reset (B, T, ..) bool, passed (.., T, ..) the time
    from before these frames to each of them, rising, before (B, ..) the count there -> (B, T, ..)."""
    count = before.unsqueeze(1) + passed
    at_resets = torch.where(reset, count, 0)
    at_the_last = at_resets.cummax(dim=1).values
    return count - at_the_last


class Clock(nn.Module):
    """Where in the beat, the bar and the section of the tune a frame stands: hands that turn once in `beats` beats,
    from the boundary at which the tune begins. With n_t steps since then (for Form: steps left), `beat` to a beat,

        x_t = .. + P (cos(2 pi n_t / (b beat)), sin(2 pi n_t / (b beat)) for b in beats)

    It is the position encoding of the Transformer (Vaswani et al. 2017) with the periods that music has. One clock may
    show several counts, each with its own hands.
    """
    beats = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

    def __init__(self, config, counts=1):
        super().__init__()
        self.beat = config.beat
        hands = 2 * len(self.beats) * counts
        self.position = nn.Linear(hands, config.n_embd, bias=False)
        nn.init.zeros_(self.position.weight)            # at first no clock is read

    def forward(self, n):
        """n (B, T, counts), or (B, T) for one count -> (B, T, C)."""
        beats = torch.tensor(self.beats, device=n.device)
        turns = 1 / (self.beat * beats)                 # in a step; no buffer, which a model in 16 bits would round
        turned = n.unsqueeze(-1) * turns % 1
        angle = 2 * math.pi * turned
        hands = torch.cat((angle.cos(), angle.sin()), dim=-1)
        dtype = self.position.weight.dtype
        hands = hands.flatten(2).to(dtype)
        return self.position(hands)


class Form(nn.Module):
    """What the model is told of the form of its tune, if it is told: which passage the next frame repeats, in how many
    frames u_t that part is over, in how many v_t the tune is and w_t the bar, and the metre, with or without
    sixteenths. A second clock counts down,

        x_t = .. + E[1 + b_t] + M[metre] + P hands(u_t, v_t, w_t)

    with E a vector for each number b_t of beats back, 0 for what is new. E[0], "nothing is told", is never read. And
    the head is told where a part comes home, to which tonic: it gets h_t + H[1 + pitch class], else h_t + H[0]."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.back = nn.Embedding(config.form + 2, C)
        self.metre = nn.Embedding(1 + 2 * len(BARS), C)
        self.home = nn.Embedding(1 + 12, C)
        self.left = Clock(config, counts=3)
        for embedding in (self.back, self.metre, self.home):
            nn.init.zeros_(embedding.weight)

    def forward(self, plan):
        """plan (B, T, 6), see data.make_plan -> for the blocks and for the head, each (B, T, C), zeros where nothing is
        told."""
        back, *_, metre, home = plan.unbind(-1)
        told = (back > 0).unsqueeze(-1)
        left = plan[..., 1:4]
        x = self.back(back) + self.metre(metre)
        x = x + self.left(left)
        return told * x, told * self.home(home)


class Lookback(nn.Module):
    """Tunes repeat their bars and phrases, and a vector of C numbers does not hold a phrase note by note. So the model
    keeps the last W frames of the tune as they are, after an idea of the Lookback RNN (Waite, Magenta 2016), and asks

        match_t[l] = is frame t equal to frame t - l of the same tune?          1. which lags match, l = 1..W
        run_t[l] = run_{t-1}[l] + 1 if match_t[l] else 0                        2. for how long they have matched
        p_t = softmax(D LN(h_t) + b + c * ln(1 + run_t))                        3. what they vote for: over the lags,
        recall_t = R sum_l p_t[l] frame_{t+1-l}                                    and one more for "nothing like it"

    The blocks are told A ln(1 + run_t); h_t is what they make of it, and recall_t is added to h_t for the head. It is
    an attention that asks "how long ago?" instead of "where is something like this?", and it starts from a rule of
    thumb: the longer a lag has matched, the likelier it does so once more. In the code the lags stand from W down to
    1, as the frames do: the oldest first. A is run, D and b are lag, c is trust, R is recall."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        W = config.lookback
        self.W = W
        lags = torch.arange(W, 0, -1)
        self.register_buffer('lags', lags, persistent=False)
        a = torch.full((config.n_units,), 6364136223846793005)
        self.register_buffer('powers', a.cumprod(0), persistent=False)
        self.run = nn.Linear(W, C, bias=False)
        self.ln = nn.LayerNorm(C)
        self.lag = nn.Linear(C, W + 1)
        self.trust = nn.Parameter(torch.ones(W))
        self.recall = nn.Linear(config.n_units, C, bias=False)
        # at first the runs alone decide on a lag, and nothing is recalled
        nn.init.zeros_(self.lag.weight)
        nn.init.zeros_(self.recall.weight)

    def names(self, frames):
        """A number of 64 bits for each frame (B, T, V) -> (B, T), the same for equal frames: sum_v frame_v a^(v+1)."""
        return (frames * self.powers).sum(-1)

    def matches(self, names, age):
        """Step 1: names (B, W + T) of all frames seen, age (B, T) frames since the boundary -> (B, T, W) bool."""
        T = age.shape[1]
        before = names.unfold(1, self.W, 1)
        before = before[:, :T]                          # (B, T, W): the W frames before each
        now = names[:, self.W:]
        same = before == now.unsqueeze(2)
        in_this_tune = self.lags <= age.unsqueeze(2)
        return same & in_this_tune

    def runs(self, match, before):
        """Step 2: match (B, T, W), before (B, W) the runs before these frames -> (B, T, W)."""
        T = match.shape[1]
        passed = torch.arange(1, T + 1, device=match.device)
        return count_since(~match, passed.unsqueeze(1), before)

    def forward(self, h, strength, age, seen):
        """Step 3: h (B, T, C) from the blocks, strength (B, T, W) ln(1 + run), age (B, T), seen (B, W + T, V) all
        frames -> recall (B, T, C)."""
        B, T, W = strength.shape
        trust = self.trust * strength
        scores = self.lag(self.ln(h))                                           # (B, T, 1 + W)
        scores = scores + F.pad(trust, (1, 0))
        p = scores.softmax(-1)
        p = p[..., 1:]
        in_this_tune = self.lags <= age.unsqueeze(2) + 1
        p = p * in_this_tune
        # Row t of p belongs to the frames t + 1 .. t + W of seen. Rows of W + T + 1 read as rows of W + T slide to the
        # right by one more each (the skewing of Huang et al. 2018), and one product adds the frames up
        slid = F.pad(p, (0, T + 1)).flatten(1)
        slid = slid[:, :T * (W + T)]
        slid = slid.view(B, T, W + T)
        weights = slid[..., :-1].to(h.dtype)
        recalled = weights @ seen[:, 1:].to(h.dtype)
        return self.recall(recalled)


# ---------------------------------------------------------------------------------------------------------------------
# Heads: from what the model knows after frame t to the distribution of frame t + 1

def choose(logits, temperature, top_p, generator):
    """Draws one of the last dimension: logits (B, N) -> (B,). top_p < 1: among the likeliest that together have so much
    probability (nucleus sampling, Holtzman et al. 2020)."""
    p = torch.softmax(logits / temperature, dim=-1)
    chance = torch.rand(len(p), 1, generator=generator, device=p.device)
    # as a rule nothing else is in the nucleus
    likeliest = p.max(dim=-1)
    if (likeliest.values >= top_p).all():
        return likeliest.indices
    p, order = p.sort(dim=-1, descending=True)
    total = p.cumsum(-1)
    # the nucleus ends with the first that brings the total to top_p
    inside = total - p < top_p
    nucleus = (total * inside).amax(-1, keepdim=True)
    # a random point below that lies in the share of one of them
    point = nucleus * chance
    rank = (total <= point).sum(-1, keepdim=True)
    return order.gather(-1, rank).squeeze(-1)


class LinearHead(nn.Module):
    """A logit for each unit by one matrix, (B, T, C) -> (B, T, V): what the next two heads have in common."""

    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(config.n_embd, config.n_units)

    def forward(self, h):
        return self.out(h)


class SoftmaxHead(LinearHead):
    """For frames with one unit: p(unit) = softmax(W h + b), as in a language model."""

    def nll(self, logits, frames):
        units = frames.argmax(-1)
        logits = logits.flatten(0, -2).float()
        loss = F.cross_entropy(logits, units.flatten(), reduction='none')
        return loss.view(units.shape)

    def sample(self, logits, temperature=1.0, top_p=1.0, generator=None, may_end=True):
        logits = logits.float()
        if not may_end:
            others = logits[..., :-1]
            logits = F.pad(others, (0, 1), value=-math.inf)
        unit = choose(logits, temperature, top_p, generator)
        frame = F.one_hot(unit, logits.shape[-1])
        return frame.to(torch.uint8)


class BernoulliHead(LinearHead):
    """Each unit on its own: p(frame) = prod_v sigmoid(logit_v)^frame_v (1 - sigmoid(logit_v))^(1 - frame_v)."""

    def nll(self, logits, frames):
        targets = frames.float()
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction='none')
        return loss.sum(-1)

    def sample(self, logits, temperature=1.0, top_p=1.0, generator=None, may_end=True):
        p = torch.sigmoid(logits.float() / temperature)
        # the nucleus of two outcomes is the likelier one alone where it has top_p of the probability
        likelier = torch.maximum(p, 1 - p)
        p = torch.where(likelier >= top_p, p.round(), p)
        p[..., -1] *= may_end
        chance = torch.rand(p.shape, generator=generator, device=p.device)
        return (chance < p).to(torch.uint8)


class ChordHead(nn.Module):
    """Spells a frame from its lowest unit to its highest, one categorical choice at a time, until "done":

        p(frame) = prod_{j=1..K+1} softmax_{c > u_{j-1}}(logits(h, {u_1, .., u_{j-1}}))[u_j]

    with u_0 = -1 and u_{K+1} = V, "done", and with S the units so far

        logits(h, S) = W_out gelu(W_hidden h + b_hidden + sum_{u in S} W_chosen[:, u]) + b_out

    Every set of units has exactly one spelling, so the probabilities of all 2^V frames sum to 1. This is NADE
    (Larochelle & Murray 2011) that walks over the K units that are on instead of all V: K + 1 small steps, some six.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        V = config.n_units
        self.hidden = nn.Linear(C, C)
        self.chosen = nn.Linear(V, C, bias=False)
        self.out = nn.Linear(C, V + 1)
        self.register_buffer('choices', torch.arange(V + 1), persistent=False)

    def forward(self, h):
        return self.hidden(h)                           # what does not depend on the choices is worked out once

    def logits(self, hidden, last):
        """hidden (M, C) with the chosen units in it, last (M,) the highest of them or -1 -> (M, V + 1)."""
        logits = self.out(F.gelu(hidden)).float()
        passed = self.choices <= last.unsqueeze(-1)
        return logits.masked_fill(passed, -math.inf)

    def nll(self, h, frames):
        *shape, V = frames.shape
        h = h.flatten(0, -2)
        frames = frames.flatten(0, -2)
        # one row for every choice of every frame: (frame, choice) in reading order, "done" is choice V
        choices = F.pad(frames, (0, 1), value=1)
        frame, choice = choices.nonzero(as_tuple=True)                                  # (M,), (M,)
        # in whole blocks of rows: for every new number of rows a CPU's matrix library makes, and keeps, new code
        M = len(frame)
        spare = -M % 512
        rows = F.pad(frame, (0, spare))
        choice = F.pad(choice, (0, spare), value=V)
        # before the first choice of a frame stands the "done" of another
        before = choice.roll(1)
        last = before.masked_fill(before == V, -1)
        # index_select, since the backward of h[rows] would take three times as long
        lower = self.choices[:V] < choice.unsqueeze(-1)
        chosen = frames.index_select(0, rows) * lower                                   # (M, V): units taken so far
        hidden = h.index_select(0, rows) + self.chosen(chosen.to(h.dtype))
        logits = self.logits(hidden, last)
        loss = F.cross_entropy(logits, choice, reduction='none')
        nats = loss.new_zeros(len(frames))
        nats = nats.index_add(0, frame, loss[:M])
        return nats.view(shape)

    def sample(self, hidden, temperature=1.0, top_p=1.0, generator=None, may_end=True):
        B = len(hidden)
        V = self.chosen.in_features
        last = torch.full((B,), -1, device=hidden.device)
        spelling = []
        columns = self.chosen.weight.T                  # what a chosen unit adds
        while True:
            logits = self.logits(hidden, last)
            if not may_end:
                logits[:, V - 1] = -math.inf
            choice = choose(logits, temperature, top_p, generator)
            spelling.append(choice)
            if (choice == V).all():
                break
            last = choice.clamp(max=V - 1)              # a row that is done has "done" alone left to choose
            hidden = hidden + columns[last]
        frame = torch.zeros(B, V + 1, dtype=torch.uint8, device=hidden.device)
        frame.scatter_(1, torch.stack(spelling, dim=1), 1)
        return frame[:, :V]


HEADS = dict(chord=ChordHead, bernoulli=BernoulliHead, softmax=SoftmaxHead)


# ---------------------------------------------------------------------------------------------------------------------
# The model

class State(NamedTuple):
    """What a model knows of the frames so far; Model makes it and takes it."""
    time: torch.Tensor          # (B,) steps since the boundary at which the tune began, for the clock
    age: torch.Tensor           # (B,) frames since then
    past: torch.Tensor          # (B, W, V) the last frames, for looking back
    names: torch.Tensor         # (B, W) a number for each of them, see Lookback.names
    run: torch.Tensor           # (B, W) how long each lag has matched
    blocks: tuple               # the state of each block, as it returned it


def take_rows(state, rows):
    """The State, or a part of one, of these rows of the batch; a row may be taken several times. rows: (B',)."""
    if isinstance(state, torch.Tensor):
        return state[rows]
    if not isinstance(state, tuple):                    # None, or a number that holds for all rows
        return state
    parts = [take_rows(part, rows) for part in state]
    return State(*parts) if isinstance(state, State) else tuple(parts)


class Model(nn.Module):
    """frames (B, T, V) -> Linear (+ clock, form, runs) -> LayerNorm -> blocks (+ recall, home) -> LayerNorm -> head."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.config = config
        self.emb = nn.Linear(config.n_units, C)         # in place of the token embedding: the input already is a vector
        self.clock = Clock(config) if config.beat else None
        self.form = Form(config) if config.form else None
        self.look = Lookback(config) if config.lookback else None
        self.ln_in = nn.LayerNorm(C)
        block = ARCHITECTURES[config.arch]
        blocks = [block(config, layer) for layer in range(config.n_layer)]
        self.blocks = nn.ModuleList(blocks)
        self.ln_out = nn.LayerNorm(C)
        self.head = HEADS[config.head](config)

    def start(self, frames, past=None, age=None, time=None):
        """The State before frames (B, T, V): at the start of a tune, or within one, if past (B, W, V) are the frames
        before, the last of them age (B,) frames and time (B,) steps after the boundary. Runs are counted anew."""
        B = len(frames)
        W = self.config.lookback
        zero = torch.zeros(B, dtype=torch.long, device=frames.device)
        if past is None:
            past = frames.new_zeros(B, W, frames.shape[2])
            age = time = zero
        names = self.look.names(past) if self.look else None
        run = zero.unsqueeze(1).expand(B, W)
        blocks = (None,) * len(self.blocks)
        return State(time, age, past, names, run, blocks)

    def advance(self, frames, state):
        """time and age (B, T) at each frame of frames (B, T, V)."""
        T = frames.shape[1]
        boundary = frames[..., -1] > 0
        passed = torch.arange(1, T + 1, device=frames.device)
        # where each frame is a step, both are the same
        age = time = count_since(boundary, passed, state.age)
        if self.config.shift:
            shifts = frames[..., self.config.shift:-1]
            longest = shifts.shape[-1]
            steps = torch.arange(1, longest + 1, device=frames.device)
            taken = (shifts * steps).sum(-1)
            time = count_since(boundary, taken.cumsum(1), state.time)
        return time, age

    def forward(self, frames, state=None, plan=None):
        """frames (B, T, V) binary, T >= 1, and the State before them (None: the first frame is a boundary, where a tune
        starts) -> what the head needs for the frame after each, (B, T, ..), and the State after the last.
        plan: (B, T, 6) what is told of the frame after each; None: nothing."""
        state = state or self.start(frames)
        home = 0
        dtype = self.emb.weight.dtype
        x = self.emb(frames.to(dtype))
        time, age = self.advance(frames, state)
        if self.clock:
            x = x + self.clock(time)
        if self.form and plan is not None:
            told, home = self.form(plan)
            x = x + told
        if self.look:
            seen = torch.cat((state.past, frames), dim=1)
            new_names = self.look.names(frames)
            names = torch.cat((state.names, new_names), dim=1)
            match = self.look.matches(names, age)
            run = self.look.runs(match, state.run)
            strength = run.to(dtype).log1p()
            x = x + self.look.run(strength)
        x = self.ln_in(x)
        blocks = []
        for block, block_state in zip(self.blocks, state.blocks):
            x, block_state = block(x, block_state)
            blocks.append(block_state)
        state = state._replace(time=time[:, -1], age=age[:, -1], blocks=tuple(blocks))
        if self.look:
            x = x + self.look(x, strength, age, seen)
            W = self.look.W
            past = seen[:, -W:]
            names = names[:, -W:]
            run = run[:, -1]
            state = state._replace(past=past, names=names, run=run)
        out = self.head(self.ln_out(x + home))
        return out, state

    def loss(self, frames, past, age, time, plan=None):
        """Mean nats a frame of windows from anywhere in tunes: frames (B, T + 1, V); for the rest see start."""
        state = self.start(frames, past, age, time)
        out, _ = self(frames[:, :-1], state, plan)
        targets = frames[:, 1:]
        return self.head.nll(out, targets).mean()

    @torch.no_grad()
    def nats(self, frames):
        """-ln p of each frame given those before it, but for the first: (B, T + 1, V) -> (B, T). Reads from the start
        of a tune, and in pieces, so that long songs need no more memory."""
        nats = []
        state = None
        for begin in range(0, frames.shape[1] - 1, 512):
            piece = frames[:, begin:begin + 513]
            out, state = self(piece[:, :-1], state)
            targets = piece[:, 1:]
            nats.append(self.head.nll(out, targets))
        return torch.cat(nats, dim=1)

    @torch.inference_mode()
    def compose(self, prompt, length, temperature=1.0, top_p=1.0, generator=None, at_least=0, plan=None,
                go_on=None):
        """Continues prompts, all B at once: (B, P, V) frames, P >= 1 -> list of B tensors (T_i, V) uint8 with what
        comes after. A row ends with length frames, or where the model draws the boundary, from at_least on.
        plan: (B, P + length, 6) what is told of the frame after each; None: nothing. go_on, with a plan: a function of
        what came after the prompts so far, (B, T, V), and of which rows have ended, (B,); it returns the rows that go
        on, in any number and some of them several times, or None if all do. What is left at the end is returned."""
        self.eval()
        B, P, V = prompt.shape

        def told(begin, count):
            return None if plan is None else plan[:, begin:begin + count]

        state = None
        at_once = max(1, 4096 // B)             # looking back takes memory for each frame
        for begin in range(0, P, at_once):
            piece = prompt[:, begin:begin + at_once]
            out, state = self(piece, state, told(begin, piece.shape[1]))
        frames = torch.empty(B, length, V, dtype=torch.uint8, device=prompt.device)
        lengths = torch.zeros(B, dtype=torch.long, device=prompt.device)
        for t in range(length):
            may_end = t >= at_least
            last = out[:, -1]
            frame = self.head.sample(last, temperature, top_p, generator, may_end)
            going = (lengths == t) & (frame[:, -1] == 0)
            if not going.any():
                break
            lengths += going
            frames[:, t] = frame
            rows = go_on(frames[:, :t + 1], ~going) if go_on else None
            if rows is not None:
                frame = frame[rows]
                frames = frames[rows]
                lengths = lengths[rows]
                plan = plan[rows]
                state = take_rows(state, rows)
            out, state = self(frame.unsqueeze(1), state, told(P + t, 1))
        lengths = lengths.tolist()
        return [tune[:end] for tune, end in zip(frames, lengths)]


def count_parameters(config):
    with torch.device('meta'):                          # shapes without memory
        model = Model(config)
    return sum(p.numel() for p in model.parameters())


def same_size(config):
    """config with the n_embd, a multiple of 8, that makes its model as large as an RWKV of config.n_embd channels."""
    target = count_parameters(replace(config, arch='rwkv'))
    widths = range(8, 8 * config.n_embd, 8)
    sizes = [replace(config, n_embd=n) for n in widths]
    larger = bisect.bisect(sizes, target, key=count_parameters)
    smaller = max(0, larger - 1)
    neighbours = sizes[smaller:larger + 1]

    def error(size):
        return abs(count_parameters(size) - target)

    return min(neighbours, key=error)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

VERSION = 8         # of the layout of a checkpoint


def save_checkpoint(path, model, **more):
    """Writes a model and what more there is to say, numbers and text, whole or not at all. Raises UserError."""
    buffer = io.BytesIO()
    config = asdict(model.config)
    weights = model.state_dict()
    checkpoint = dict(version=VERSION, config=config, model=weights, **more)
    torch.save(checkpoint, buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path, device='cpu'):
    """A file that train.py wrote -> (model in eval mode, its dictionary). Raises UserError if it is none. The file
    runs no code (weights_only), its weights have to be those of a model of its config, and finite."""
    content = read_bytes(path)
    try:
        # torch does not look at the checksums
        archive = zipfile.ZipFile(io.BytesIO(content))
        if archive.testzip():
            raise ValueError('its checksums are wrong')
        file = io.BytesIO(content)
        checkpoint = torch.load(file, map_location='cpu', weights_only=True)
        if checkpoint['version'] != VERSION:
            raise ValueError(f'it is of version {checkpoint["version"]}, this code reads {VERSION}')
        config = Config(**checkpoint['config'])
        # before there is memory for them: the least numbers that such a model has, beside all bytes of the file
        rows = config.n_units + config.lookback + config.form
        rows += config.n_layer * config.n_embd
        if rows * config.n_embd > len(content):
            raise ValueError('it is too short for a model of its config')
        model = Model(config)
        # a copy, since torch notes 'assign' in the dictionary it gets
        weights = dict(checkpoint['model'])
        model.load_state_dict(weights, assign=True)
        finite = [p.isfinite().all() for p in model.parameters()]
        if not all(finite):
            raise ValueError('its weights are not finite')
    except Exception as e:      # whatever unzipping and unpickling make of bytes that are not a checkpoint
        why = f'{type(e).__name__}: {e}'
        if isinstance(e, pickle.UnpicklingError):
            why = 'it holds more than numbers and text'
        raise UserError(f'{path} is damaged or no checkpoint of this project ({why}): '
                        'train again, or give another path') from None
    return model.to(device).eval(), checkpoint
