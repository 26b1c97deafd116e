"""The attention calls: allocate results in the caller's framework, turn words into options, call the library."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Optional, TypeVar, cast

from . import _core
from .interop import Framework, classify, known, stream_handle
from .options import LAYOUTS, Causal, Layout, Window, convert, word

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _shortcut(function: _Function) -> _Function:
    """The same function; calls with no more than arrays, causal, scale, layout, return_lse, out and lse
    are made without entering it."""
    return cast(_Function, update_wrapper(cast(Any, _core.shortcut(function, known, "bridge")), function))


@_shortcut
def attention(
    q: Any,
    k: Any = None,
    v: Any = None,
    *,
    causal: Causal = False,
    window: Window = None,
    scale: Optional[float] = None,
    mask: Any = None,
    bias: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    seqused_k: Any = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    kernel: Optional[str] = None,
    stream: Any = None,
) -> Any:
    """Scaled dot-product attention, ``softmax(scale · q kᵀ + …) v``, on the device and stream of its inputs.

    Arrays are NumPy, torch, CuPy or JAX arrays, or anything with ``__dlpack__``, all from one framework and on one
    device. Strides are read, nothing is copied; only the last dimension has to be contiguous.

    Nothing of torch looks on: gradients and torch.func are for `flashcore.torch.attention`, and so is torch.jit.trace,
    which would record the empty result without the call that fills it.

    Args:
      q: (batch, heads_q, seqlen_q, head_dim), float16, bfloat16, float32, float64 or float8_e4m3fn (GPUs that have
        it); head_dim 1 to 256. Alone, without k and v: the packed (batch, 3, heads, seqlen, head_dim), for "bshd"
        (batch, seqlen, 3, heads, head_dim).
      k: (batch, heads_k, seqlen_k, head_dim), heads_q a multiple of heads_k.
      v: (batch, heads_k, seqlen_k, head_dim_v).
      causal: "top_left" lets query i see keys j ≤ i, "bottom_right" j ≤ i + seqlen_k − seqlen_q. True is for
        seqlen_q == seqlen_k, where both agree; elsewhere it is an error.
      window: (left, right): how many keys before and after its own position a query sees; None or -1 is unbounded.
        Aligned bottom-right, top-left with causal="top_left".
      scale: default 1/√head_dim.
      mask: boolean, True = keep, broadcastable to (batch, heads_q, seqlen_q, seqlen_k).
      bias: added to the scores, q's dtype or float32, broadcastable to (batch, heads_q, seqlen_q, seqlen_k).
      softcap: scores become ``softcap · tanh(score / softcap)``; 0 is off.
      alibi_slopes: float32, (heads_q) or (batch, heads_q): ``−slope · |i + seqlen_k − seqlen_q − j|`` is added.
      sinks: (heads_q), float32 or q's dtype: a logit per head that takes weight and has no value.
      dropout_p: probability of dropping a weight, in [0, 1); `seed` chooses which.
      q_descale, k_descale, v_descale: float32 (batch, heads_k), factors of float8 values.
      seqused_k: int32 (batch): only the first seqused_k[b] keys of batch b exist.
      layout: "bhsd", or "bshd" for (batch, seqlen, heads, head_dim).
      return_lse: also return the log-sum-exp of the scores, float32 (batch, heads_q, seqlen_q).
      out, lse: arrays to write to; lse implies return_lse.
      kernel: a kernel's name, to force it; `explain` lists them.
      stream: a CUDA stream (int, or a framework's stream object) instead of the framework's current one.

    Returns:
      out, of q's shape with head_dim_v and q's dtype (bfloat16 for float8); with return_lse the pair (out, lse).
      A query that sees no key has out = 0 and lse = -inf. Nothing synchronises.

    Raises:
      ValueError, TypeError: the call can never be valid; says what was given and what is allowed.
      Unsupported: no kernel of this build takes the call on this device; gives every kernel's reason.
      MemoryError, CudaError: the device could not.
    Nothing is written to `out` when a call is refused.
    """
    framework = known.get(type(q)) or classify(q)
    if k is None:
        q, k, v = _unpack(framework, q, v, layout)
    arrays = (q, k, v, mask, bias, alibi_slopes, sinks, q_descale, k_descale, v_descale, None, None, seqused_k)
    options = convert(layout, causal, window, scale, softcap, dropout_p, seed, False, kernel)
    return _forward(framework, arrays, options, _UNKNOWN, return_lse, out, lse, stream)


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    seqused_k: Any = None,
    causal: Causal = False,
    window: Window = None,
    scale: Optional[float] = None,
    mask: Any = None,
    bias: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    kernel: Optional[str] = None,
    stream: Any = None,
) -> Any:
    """Attention of many sequences of different lengths, packed one after the other.

    Args:
      q: (total_q, heads_q, head_dim); sequence b owns the rows cu_seqlens_q[b] to cu_seqlens_q[b+1] − 1.
      k, v: (total_k, heads_k, head_dim) and (total_k, heads_k, head_dim_v), the same with cu_seqlens_k.
      cu_seqlens_q, cu_seqlens_k: int32 (batch + 1), on q's device; start with 0 and never fall. Checked on the CPU;
        on CUDA lengths are clamped to the tensors.
      max_seqlen_q, max_seqlen_k: bounds on the lengths, if known; good bounds save work on CUDA.
      seqused_k: int32 (batch): only the first seqused_k[b] keys of sequence b exist.
      The other arguments are those of `attention`; positions and causal rules count inside each sequence.

    Returns:
      out (total_q, heads_q, head_dim_v); with return_lse also lse, float32 (heads_q, total_q).

    Raises: as `attention`.
    """
    framework = known.get(type(q)) or classify(q)
    arrays = (
        q,
        k,
        v,
        mask,
        bias,
        alibi_slopes,
        sinks,
        q_descale,
        k_descale,
        v_descale,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
    )
    options = convert("thd", causal, window, scale, softcap, dropout_p, seed, False, kernel)
    bounds = (_bound(max_seqlen_q), _bound(max_seqlen_k))
    return _forward(framework, arrays, options, bounds, return_lse, out, lse, stream)


def attention_decode(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    cache_seqlens: Any,
    block_table: Any = None,
    *,
    k_new: Any = None,
    v_new: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = False,
    causal: Causal = True,
    window: Window = None,
    scale: Optional[float] = None,
    mask: Any = None,
    bias: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    kernel: Optional[str] = None,
    stream: Any = None,
) -> Any:
    """Attention of new queries against a key/value cache, after appending new keys to it.

    Args:
      q: (batch, heads_q, seqlen_q, head_dim), for "bshd" (batch, seqlen_q, heads_q, head_dim).
      k_cache, v_cache: (batch, heads_k, capacity, head_dim or head_dim_v); with a block table
        (pages, heads_k, page_size, …). For "bshd" (batch, capacity, heads_k, …) and (pages, page_size, heads_k, …).
      cache_seqlens: int32 (batch): keys in the cache before this call.
      block_table: int32 (batch, max_pages): page p of sequence b is k_cache[block_table[b][p]].
      k_new, v_new: (batch, heads_k, seqlen_new, …): written to the cache at cache_seqlens, then attended to.
      rotary_cos, rotary_sin: (positions, rotary_dim / 2), float32 or q's dtype: rotate q and k_new by their
        positions; `rotary_interleaved` pairs neighbours (GPT-J) instead of halves (GPT-NeoX).
      causal: True and "bottom_right" are the same here; False lets every query see the whole cache.
      The other arguments are those of `attention`.

    Returns:
      out, of q's shape with head_dim_v; with return_lse also lse, float32 (batch, heads_q, seqlen_q).

    Raises: as `attention`.
    """
    framework = known.get(type(q)) or classify(q)
    arrays = (
        q,
        cache_seqlens,
        block_table,
        k_new,
        v_new,
        rotary_cos,
        rotary_sin,
        mask,
        bias,
        alibi_slopes,
        sinks,
        q_descale,
        k_descale,
        v_descale,
    )
    options = convert(
        layout, "bottom_right" if causal is True else causal, window, scale, softcap, 0.0, 0, False, kernel
    )
    handle = None if stream is None else stream_handle(stream)
    results = _core.decode(
        framework.bridge,
        arrays,
        (k_cache, v_cache),
        bool(rotary_interleaved),
        (out, lse),
        options,
        bool(return_lse),
        handle,
    )
    return finished(framework, results)


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    deterministic: bool = False,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    seqused_k: Any = None,
    causal: Causal = False,
    window: Window = None,
    scale: Optional[float] = None,
    mask: Any = None,
    bias: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    layout: Layout = "bhsd",
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    kernel: Optional[str] = None,
    stream: Any = None,
) -> tuple[Any, ...]:
    """The gradients of `attention`, and with cu_seqlens_q and cu_seqlens_k of `attention_varlen`.

    Args:
      dout: the gradient of out, of its shape and dtype.
      q, k, v: the inputs of the forward call; out, lse: its results.
      dlse: the gradient of lse, if lse was used.
      deterministic: bitwise the same gradients from run to run.
      dq, dk, dv: arrays to write to.
      The other arguments must be those of the forward call.

    Returns:
      (dq, dk, dv), of the shapes and dtypes of q, k, v; then dbias where `bias` was given (bias's shape and dtype,
      summed over what was broadcast); then dsinks where `sinks` was given. So (dq, dk, dv, dbias, dsinks) with both.

    Raises: as `attention`.
    """
    layout_word = "thd" if cu_seqlens_q is not None else layout
    options = convert(layout_word, causal, window, scale, softcap, dropout_p, seed, deterministic, kernel)
    inputs = (q, k, v, mask, bias, alibi_slopes, sinks, None, None, None, cu_seqlens_q, cu_seqlens_k, seqused_k)
    wanted, bounds = wanted_gradients(inputs), (_bound(max_seqlen_q), _bound(max_seqlen_k))
    framework = known.get(type(q)) or classify(q)
    handle = None if stream is None else stream_handle(stream)
    grads = _core.backward(
        framework.bridge, inputs, (out, lse), (dout, dlse), (dq, dk, dv, None, None), wanted, options, *bounds, handle
    )
    return chosen(finished(framework, grads), wanted)


def merge_states(
    out_a: Any,
    lse_a: Any,
    out_b: Any,
    lse_b: Any,
    *,
    layout: str = "bhsd",
    out: Any = None,
    lse: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """The attention over the union of two disjoint sets of keys, from the attention over each.

    Args:
      out_a, out_b: (batch, heads, seqlen, head_dim_v), of one dtype; for "bshd" (batch, seqlen, heads, head_dim_v),
        for "thd" (total, heads, head_dim_v).
      lse_a, lse_b: float32 (batch, heads, seqlen); for "thd" (heads, total).
      out, lse: arrays to write to; may be those of a or of b.

    Returns: (out, lse) of the same shapes and dtypes.

    Raises: as `attention`.
    """
    framework = known.get(type(out_a)) or classify(out_a, "out_a")
    number = word("layout", layout, LAYOUTS)
    handle = None if stream is None else stream_handle(stream)
    results = _core.merge_states(framework.bridge, (out_a, lse_a, out_b, lse_b), (out, lse), number, handle)
    return finished(framework, results)  # type: ignore[no-any-return]


#: the bounds on the sequence lengths, where none are known
_UNKNOWN = (-1, -1)


# ---- what the calls share ------------------------------------------------------------------------------------------


def wanted_gradients(inputs: tuple[Any, ...]) -> tuple[bool, ...]:
    """Which of (dq, dk, dv, dbias, dsinks) a backward call gives, for all that can have one."""
    return True, True, True, inputs[4] is not None, inputs[6] is not None


def chosen(gradients: tuple[Any, ...], wanted: tuple[bool, ...]) -> tuple[Any, ...]:
    """Those that are wanted."""
    return tuple(gradient for gradient, want in zip(gradients, wanted, strict=True) if want)


def finished(framework: Framework, results: Any) -> Any:
    """What the caller gets for what the library returns: an array, or several."""
    if framework.finish is None:
        return results
    return tuple(map(framework.finish, results)) if isinstance(results, tuple) else framework.finish(results)


def _forward(
    framework: Framework,
    arrays: tuple[Any, ...],
    options: _core.Options,
    bounds: tuple[int, int],
    return_lse: bool,
    out: Any,
    lse: Any,
    stream: Any,
) -> Any:
    if stream is not None:
        stream = stream_handle(stream)
    results = _core.forward(framework.bridge, arrays, (out, lse), options, *bounds, bool(return_lse), stream)
    return finished(framework, results)


def _unpack(framework: Framework, qkv: Any, v: Any, layout: str) -> tuple[Any, Any, Any]:
    """q, k and v of a packed array, as views."""
    if v is not None:
        raise ValueError("v given without k; give q, k and v, or one packed array")
    shape = framework.shape(qkv)
    axis = 2 if layout == "bshd" else 1
    if len(shape) != 5 or shape[axis] != 3:
        packed = "(batch, seqlen, 3, heads, head_dim)" if axis == 2 else "(batch, 3, heads, seqlen, head_dim)"
        raise ValueError(
            f"one array of shape {shape} given; without k and v it has to be packed as {packed} for layout={layout!r}"
        )
    return framework.take(qkv, axis, 0), framework.take(qkv, axis, 1), framework.take(qkv, axis, 2)


def _bound(length: Optional[int]) -> int:
    """A bound on lengths for the library, which takes -1 for unknown."""
    if length is None:
        return -1
    if not 0 <= operator.index(length) < 2**63:
        raise ValueError(
            f"{length} given as a bound on the sequence lengths; it is at least 0 and less than 2**63, "
            "or None for unknown"
        )
    return operator.index(length)
