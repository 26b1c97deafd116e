"""The oracle: attention and its gradients in NumPy, plainly from the definition, every matrix written out.

Nothing here knows how flashcore computes. Shapes are (batch, heads, seqlen, head_dim); numbers are float64 unless an
`Arithmetic` asks for the error that the same steps make in a narrower dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np

NARROW = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Arithmetic:
    """The numbers a computation is done with: `work` for sums, `storage` for every intermediate matrix."""

    work: type = np.float64
    storage: type | None = None

    def __call__(self, x):
        x = np.asarray(x, self.work)
        return x if self.storage is None else x.astype(self.storage).astype(self.work)


EXACT = Arithmetic()


def framework_arithmetic(dtype: str) -> Arithmetic:
    """What an array framework does that has no fused attention: each step rounded to `dtype`, sums in float32."""
    if dtype == "float64":
        return EXACT
    return Arithmetic(np.float32, NARROW.get(dtype))


@dataclass(frozen=True)
class Options:
    """The words of an attention call. Tensors are NumPy arrays; `None` means not given."""

    causal: bool | str = False
    window: tuple = (None, None)
    scale: float | None = None
    softcap: float = 0.0
    mask: np.ndarray | None = None
    bias: np.ndarray | None = None
    alibi_slopes: np.ndarray | None = None
    sinks: np.ndarray | None = None
    dropout_p: float = 0.0
    seed: int = 0
    seqused_k: np.ndarray | None = None
    q_descale: np.ndarray | None = None
    k_descale: np.ndarray | None = None
    v_descale: np.ndarray | None = None


PLAIN = Options()
CAUSAL_DECODE = Options(causal="bottom_right")


@dataclass
class Head:
    """One sequence's matrices, with heads_q heads: kept for the backward pass."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    slope: np.ndarray  # d score / d (scale q·k)
    weights: np.ndarray  # softmax, without dropout
    factor: np.ndarray  # of dropout
    sink_weight: np.ndarray
    out: np.ndarray = field(default=None)
    lse: np.ndarray = field(default=None)


# ---- the parts of the definition -------------------------------------------------------------------------------------


def philox4x32(counter, seed: int):
    """Philox 4x32-10 (Salmon et al. 2011): four uint32 words for a counter of four uint32 arrays."""
    mask32 = np.uint64(0xFFFFFFFF)
    c = [np.asarray(x, np.uint64) & mask32 for x in counter]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c[0]
        p1 = np.uint64(0xCD9E8D57) * c[2]
        high = np.uint64(32)
        c = [p1 >> high ^ c[1] ^ np.uint64(key[0]), p1 & mask32, p0 >> high ^ c[3] ^ np.uint64(key[1]), p0 & mask32]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(np.broadcast_arrays(*c)).astype(np.uint32)


def dropout_factor(batch: int, heads: int, seqlen_q: int, seqlen_k: int, p: float, seed: int) -> np.ndarray:
    """0 where the weight (batch, head, query, key) is dropped, else 1/(1-p): shape (heads, seqlen_q, seqlen_k)."""
    shape = (heads, seqlen_q, seqlen_k)
    if p == 0:
        return np.ones(shape)
    head, query, key = np.ogrid[:heads, :seqlen_q, :seqlen_k]
    words = philox4x32((key // 4, query, head, np.full((1, 1, 1), batch)), seed)
    word = np.take_along_axis(words, np.broadcast_to(key % 4, shape)[None], axis=0)[0]
    return np.where(word < np.uint32(int(p * 2**32)), 0.0, 1 / (1 - p))


def visible(options: Options, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """What position alone allows: bool (seqlen_q, seqlen_k)."""
    if options.causal is True and seqlen_q != seqlen_k:
        raise ValueError("causal=True says nothing about lengths that differ")
    shift = 0 if options.causal == "top_left" else seqlen_k - seqlen_q
    i, j = np.ogrid[:seqlen_q, :seqlen_k]
    seen = np.ones((seqlen_q, seqlen_k), bool)
    if options.causal:
        seen &= j <= i + shift
    left, right = (None if side in (None, -1) else side for side in options.window)
    if left is not None:
        seen &= j >= i + shift - left
    if right is not None:
        seen &= j <= i + shift + right
    return seen


def plane(tensor, batch: int, heads: int, b: int, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """A broadcastable (batch, heads, queries, keys) tensor as the matrices of one sequence."""
    t = np.asarray(tensor)
    t = t.reshape((1,) * (4 - t.ndim) + t.shape)
    t = t[b if t.shape[0] > 1 else 0]
    t = np.broadcast_to(t, (heads, t.shape[1], t.shape[2]))
    t = t if t.shape[1] == 1 else t[:, :seqlen_q]
    t = t if t.shape[2] == 1 else t[:, :, :seqlen_k]
    return np.broadcast_to(t, (heads, seqlen_q, seqlen_k))


def per_head(tensor, b: int, heads: int) -> np.ndarray:
    """A (heads,) or (batch, heads) tensor as the column of one sequence, (heads, 1, 1)."""
    t = np.asarray(tensor, np.float64)
    return np.broadcast_to(t if t.ndim == 1 else t[b], (heads,))[:, None, None]


def rotate(x: np.ndarray, positions, cos, sin, interleaved: bool) -> np.ndarray:
    """Rotary embedding of (heads, seqlen, dim) rows at `positions`; dimensions past 2·cos.shape[1] stay."""
    half = cos.shape[1]
    c, s = cos[positions], sin[positions]
    first = np.arange(half) * 2 if interleaved else np.arange(half)
    second = first + 1 if interleaved else first + half
    y = x.copy()
    y[..., first] = x[..., first] * c - x[..., second] * s
    y[..., second] = x[..., first] * s + x[..., second] * c
    return y


# ---- one sequence ----------------------------------------------------------------------------------------------------


def attend(q, k, v, o: Options, b: int, batch: int, arithmetic: Arithmetic = EXACT) -> Head:
    """Attention of sequence `b` over (heads, seqlen, dim) matrices."""
    rounded = arithmetic
    heads, seqlen_q, dim = q.shape
    group = heads // k.shape[0]
    if o.q_descale is not None:
        q = q * np.repeat(per_head(o.q_descale, b, k.shape[0]), group, axis=0)
    if o.k_descale is not None:
        k = k * per_head(o.k_descale, b, k.shape[0])
    if o.v_descale is not None:
        v = v * per_head(o.v_descale, b, k.shape[0])
    q, k, v = (np.asarray(x, arithmetic.work) for x in (q, k, v))
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    seqlen_k = k.shape[1]

    scale = dim**-0.5 if o.scale is None else o.scale
    score = rounded(rounded(q @ k.transpose(0, 2, 1)) * arithmetic.work(scale))
    slope = np.ones_like(score)
    if o.softcap > 0:
        t = rounded(np.tanh(score / arithmetic.work(o.softcap)))
        score, slope = rounded(t * arithmetic.work(o.softcap)), 1 - t * t
    if o.alibi_slopes is not None:
        i, j = np.ogrid[:seqlen_q, :seqlen_k]
        score = rounded(score - per_head(o.alibi_slopes, b, heads) * np.abs(i + seqlen_k - seqlen_q - j))
    if o.bias is not None:
        score = rounded(score + plane(o.bias, batch, heads, b, seqlen_q, seqlen_k))
    seen = np.broadcast_to(visible(o, seqlen_q, seqlen_k), score.shape)
    if o.mask is not None:
        seen = seen & plane(o.mask, batch, heads, b, seqlen_q, seqlen_k)

    score = np.where(seen, score, -np.inf)
    sink = np.full((heads, 1, 1), -np.inf) if o.sinks is None else per_head(o.sinks, b, heads)
    empty = ~seen.any(axis=2, keepdims=True)  # a query that sees nothing has lse = -inf, sink or not
    top = np.maximum(score.max(axis=2, keepdims=True, initial=-np.inf), sink)
    top = np.where(empty, 0, top)
    total = np.exp(score - top).sum(axis=2, keepdims=True) + np.exp(sink - top)
    with np.errstate(divide="ignore"):
        lse = np.where(empty, -np.inf, top + np.log(total))
    weights = np.where(seen, np.exp(score - np.where(empty, 0, lse)), 0)
    sink_weight = np.where(empty, 0, np.exp(sink - np.where(empty, 0, lse)))
    factor = dropout_factor(b, heads, seqlen_q, seqlen_k, o.dropout_p, o.seed)
    weights = rounded(weights)
    head = Head(q, k, v, slope, weights, factor, sink_weight)
    head.out = rounded(rounded(weights * factor) @ v)
    head.lse = np.asarray(lse[..., 0], np.float64 if arithmetic.work is np.float64 else np.float32)
    return head


def attend_backward(head: Head, dout, dlse, scale: float, arithmetic: Arithmetic = EXACT, cancel: bool = True):
    """Chain rule on the matrices of one sequence: dq, dk, dv (heads_q heads each), dscore, dsink (heads,).

    Without `cancel` every difference becomes a sum of absolute values: how large the terms are.
    """
    rounded = arithmetic
    dout = np.asarray(dout, arithmetic.work)
    if not cancel:
        head = replace(head, q=np.abs(head.q), k=np.abs(head.k), v=np.abs(head.v))
        dout, dlse, scale = np.abs(dout), -np.abs(dlse), abs(scale)
    dropped = rounded(head.weights * head.factor)
    dv = rounded(dropped.transpose(0, 2, 1) @ dout)
    dweights = rounded(rounded(dout @ head.v.transpose(0, 2, 1)) * head.factor)
    mean = (head.weights * dweights).sum(axis=2, keepdims=True) - np.asarray(dlse, arithmetic.work)[..., None]
    dscore = rounded(head.weights * (dweights - mean if cancel else dweights + mean))
    dsink = -(head.sink_weight * mean).sum(axis=(1, 2))
    dproduct = rounded(dscore * head.slope * arithmetic.work(scale))
    return rounded(dproduct @ head.k), rounded(dproduct.transpose(0, 2, 1) @ head.q), dv, dscore, dsink


# ---- whole calls -----------------------------------------------------------------------------------------------------


def attention(q, k, v, options: Options = PLAIN, arithmetic: Arithmetic = EXACT):
    """out and lse of a batch of equal lengths."""
    batch, heads, seqlen_q, _ = q.shape
    out = np.zeros((batch, heads, seqlen_q, v.shape[3]))
    lse = np.full((batch, heads, seqlen_q), -np.inf)
    for b in range(batch):
        used = k.shape[2] if options.seqused_k is None else int(options.seqused_k[b])
        head = attend(q[b], k[b, :, :used], v[b, :, :used], options, b, batch, arithmetic)
        out[b], lse[b] = head.out, head.lse
    return out, lse


def sum_to(gradient: np.ndarray, shape: tuple) -> np.ndarray:
    """Adds up a (batch, heads, queries, keys) gradient over the axes that `shape` was broadcast along."""
    full = (1,) * (4 - len(shape)) + tuple(shape)
    axes = tuple(a for a in range(4) if full[a] == 1)
    return gradient.sum(axis=axes, keepdims=True).reshape(shape)


def attention_backward(
    dout, q, k, v, options: Options = PLAIN, dlse=None, arithmetic: Arithmetic = EXACT, cancel: bool = True
):
    """Gradients of `attention`: a dict of dq, dk, dv, and dbias, dsinks where bias, sinks are given."""
    batch, heads, seqlen_q, dim = q.shape
    heads_k, seqlen_k = k.shape[1], k.shape[2]
    scale = dim**-0.5 if options.scale is None else options.scale
    dlse = np.zeros((batch, heads, seqlen_q)) if dlse is None else dlse
    grads = {"dq": np.zeros(q.shape), "dk": np.zeros(k.shape), "dv": np.zeros(v.shape)}
    dscore = np.zeros((batch, heads, seqlen_q, seqlen_k))
    dsinks = np.zeros(heads)
    for b in range(batch):
        used = seqlen_k if options.seqused_k is None else int(options.seqused_k[b])
        head = attend(q[b], k[b, :, :used], v[b, :, :used], options, b, batch, arithmetic)
        dq, dk, dv, ds, dsink = attend_backward(head, dout[b], dlse[b], scale, arithmetic, cancel)
        grads["dq"][b] = dq
        grads["dk"][b, :, :used] = arithmetic(dk.reshape(heads_k, heads // heads_k, used, dk.shape[2]).sum(axis=1))
        grads["dv"][b, :, :used] = arithmetic(dv.reshape(heads_k, heads // heads_k, used, dv.shape[2]).sum(axis=1))
        dscore[b, :, :, :used] = ds
        dsinks += dsink
    if options.bias is not None:
        grads["dbias"] = sum_to(dscore, np.shape(options.bias))
    if options.sinks is not None:
        grads["dsinks"] = dsinks
    return grads


def one_sequence(options: Options, b: int, batch: int, used: int | None = None) -> Options:
    """The options as sequence `b` alone sees them (dropout apart, which counts sequences)."""
    planes = {n: getattr(options, n) for n in ("mask", "bias")}
    picked = {n: t[b : b + 1] for n, t in planes.items() if t is not None and t.ndim == 4 and t.shape[0] == batch}
    slopes = options.alibi_slopes
    if slopes is not None and np.ndim(slopes) == 2:
        picked["alibi_slopes"] = slopes[b]
    return replace(options, seqused_k=None if used is None else np.array([used]), **picked)


def attention_varlen(q, k, v, cu_q, cu_k, options: Options = PLAIN, arithmetic: Arithmetic = EXACT):
    """out (total_q, heads, head_dim_v) and lse (heads, total_q) of packed sequences; rows of none are empty."""
    batch = len(cu_q) - 1
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    lse = np.full((q.shape[1], q.shape[0]), -np.inf)
    for b in range(batch):
        rows = slice(cu_q[b], cu_q[b + 1])
        used = cu_k[b + 1] - cu_k[b] if options.seqused_k is None else int(options.seqused_k[b])
        keys = slice(cu_k[b], cu_k[b] + used)
        turned = (x.transpose(1, 0, 2) for x in (q[rows], k[keys], v[keys]))
        head = attend(*turned, options, b, batch, arithmetic)
        out[rows], lse[:, rows] = head.out.transpose(1, 0, 2), head.lse
    return out, lse


def attention_varlen_backward(
    dout, q, k, v, cu_q, cu_k, options: Options = PLAIN, dlse=None, arithmetic: Arithmetic = EXACT, cancel: bool = True
):
    """Gradients dq, dk, dv (and dsinks) of `attention_varlen`."""
    batch, heads, heads_k = len(cu_q) - 1, q.shape[1], k.shape[1]
    scale = q.shape[2] ** -0.5 if options.scale is None else options.scale
    dlse = np.zeros((heads, q.shape[0])) if dlse is None else dlse
    grads = {"dq": np.zeros(q.shape), "dk": np.zeros(k.shape), "dv": np.zeros(v.shape)}
    dsinks = np.zeros(heads)
    for b in range(batch):
        rows = slice(cu_q[b], cu_q[b + 1])
        used = cu_k[b + 1] - cu_k[b] if options.seqused_k is None else int(options.seqused_k[b])
        keys = slice(cu_k[b], cu_k[b] + used)
        turned = (x.transpose(1, 0, 2) for x in (q[rows], k[keys], v[keys]))
        head = attend(*turned, options, b, batch, arithmetic)
        above = dout[rows].transpose(1, 0, 2), dlse[:, rows]
        dq, dk, dv, _, dsink = attend_backward(head, *above, scale, arithmetic, cancel)
        grads["dq"][rows] = dq.transpose(1, 0, 2)
        for name, grad in (("dk", dk), ("dv", dv)):
            grouped = grad.reshape(heads_k, heads // heads_k, used, grad.shape[2])
            grads[name][keys] = arithmetic(grouped.sum(axis=1)).transpose(1, 0, 2)
        dsinks += dsink
    if options.sinks is not None:
        grads["dsinks"] = dsinks
    return grads


@dataclass(frozen=True)
class Decode:
    """What a decode call adds to attention."""

    cache_seqlens: np.ndarray
    block_table: np.ndarray | None = None
    k_new: np.ndarray | None = None
    v_new: np.ndarray | None = None
    rotary_cos: np.ndarray | None = None
    rotary_sin: np.ndarray | None = None
    rotary_interleaved: bool = False


def attention_decode(
    q, k_cache, v_cache, decode: Decode, options: Options = CAUSAL_DECODE, arithmetic: Arithmetic = EXACT
):
    """out, lse and the two caches after the call."""
    d = decode
    batch, seqlen_q = q.shape[0], q.shape[2]
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    out = np.zeros((*q.shape[:3], v_cache.shape[3]))
    lse = np.full(q.shape[:3], -np.inf)
    page = k_cache.shape[2]

    def place(b, j):
        return (b, j) if d.block_table is None else (int(d.block_table[b, j // page]), j % page)

    for b in range(batch):
        length = int(d.cache_seqlens[b])
        if d.k_new is not None:
            new = d.k_new[b]
            if d.rotary_cos is not None:
                positions = length + np.arange(new.shape[1])
                new = rotate(new, positions, d.rotary_cos, d.rotary_sin, d.rotary_interleaved)
            for i in range(new.shape[1]):
                where, slot = place(b, length + i)
                k_cache[where, :, slot], v_cache[where, :, slot] = arithmetic(new[:, i]), d.v_new[b, :, i]
            length += new.shape[1]
        spots = [place(b, j) for j in range(length)]
        keys = np.stack([k_cache[w, :, s] for w, s in spots], axis=1) if spots else k_cache[0, :, :0]
        values = np.stack([v_cache[w, :, s] for w, s in spots], axis=1) if spots else v_cache[0, :, :0]
        query = q[b]
        if d.rotary_cos is not None:
            positions = length - seqlen_q + np.arange(seqlen_q)
            query = rotate(query, positions, d.rotary_cos, d.rotary_sin, d.rotary_interleaved)
        head = attend(query, keys, values, options, b, batch, arithmetic)
        out[b], lse[b] = head.out, head.lse
    return out, lse, k_cache, v_cache


def merge_states(out_a, lse_a, out_b, lse_b):
    """Attention over the union of two disjoint sets of keys."""
    lse = np.logaddexp(lse_a, lse_b)
    safe = np.where(np.isinf(lse), 0, lse)
    return out_a * np.exp(lse_a - safe)[..., None] + out_b * np.exp(lse_b - safe)[..., None], lse
