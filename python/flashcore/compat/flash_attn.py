"""flash-attn's functions, argument for argument as in its version 2.8, computed by flashcore.

    from flashcore.compat.flash_attn import flash_attn_func  # was: from flash_attn import flash_attn_func

Shapes are flash-attn's: (batch, seqlen, heads, head_dim), packed (tokens, heads, head_dim). The causal rule, the window
and ALiBi are aligned bottom-right. What all functions share:

  dropout_p: probability of dropping a weight; drawn from torch's default generator.
  softmax_scale: default 1/√head_dim.
  causal: query i sees keys j ≤ i + seqlen_k − seqlen_q.
  window_size: (left, right), how many keys before and after its own place a query sees; -1 is unbounded.
  softcap: scores become ``softcap · tanh(score / softcap)``; 0 is off.
  alibi_slopes: float32, (heads) or (batch, heads): ``−slope · |i + seqlen_k − seqlen_q − j|`` is added.
  deterministic: bitwise the same gradients from run to run; torch.use_deterministic_algorithms asks for it too.
  return_attn_probs: also return lse, float32 (batch, heads, seqlen_q), packed (heads, tokens), and an empty tensor in
    the place of flash-attn's matrix of probabilities, which is never made.

Wider than flash-attn: float32 and float64, the CPU, any page size, head_dim of v of its own, dropout with softcap,
gradients through lse. A query that sees no key has out = 0 as there, and lse = -inf (there +inf).
Errors are those of `flashcore.attention`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Optional, Union

try:
    import torch
except ImportError as error:
    raise ImportError("flashcore.compat.flash_attn needs PyTorch: pip install torch") from error

from ..attention import _bound
from ..torch import attention, attention_decode, attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Tensor = torch.Tensor
_Sides = Sequence[int]
_Result = Union[Tensor, tuple[Tensor, Tensor, Tensor]]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: _Sides = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """Attention of q (batch, seqlen_q, heads_q, head_dim) over k, v (batch, seqlen_k, heads_k, head_dim).

    heads_q is a multiple of heads_k. Returns out like q, with return_attn_probs (out, lse, empty).
    """
    result = attention(
        _dense_rows(q),
        _dense_rows(k),
        _dense_rows(v),
        layout="bshd",
        dropout_p=dropout_p,
        deterministic=deterministic or None,
        return_lse=return_attn_probs,
        **_words(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )
    return (*result, _no_probabilities(q)) if return_attn_probs else result


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: _Sides = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_func` with keys and values in one tensor kv (batch, seqlen_k, 2, heads_k, head_dim)."""
    k, v = _unpacked("kv", kv, 2, "(batch, seqlen, 2, heads, head_dim)")
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: _Sides = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_func` with all three in one tensor qkv (batch, seqlen, 3, heads, head_dim)."""
    q, k, v = _unpacked("qkv", qkv, 3, "(batch, seqlen, 3, heads, head_dim)")
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: _Sides = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Optional[Tensor] = None,
) -> _Result:
    """Attention of packed sequences: q (total_q, heads_q, head_dim), k and v (total_k, heads_k, head_dim).

    Args:
      cu_seqlens_q, cu_seqlens_k: int32 (batch + 1): sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1] − 1.
      max_seqlen_q, max_seqlen_k: the longest sequence, or more; None where it is not known.
      block_table: int32 (batch, max_pages): k and v are pages, (pages, page_size, heads_k, head_dim), and page p of
        sequence b is k[block_table[b, p]]. Without dropout, and without a backward pass.

    Returns out (total_q, heads_q, head_dim), with return_attn_probs (out, lse, empty).
    """
    words = _words(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is not None:
        if dropout_p > 0:
            raise ValueError(f"dropout_p={dropout_p} given with a block_table; keys in pages go without dropout")
        with torch.no_grad():
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            paged = _attend_pages(q, k, v, *lengths, block_table, words)
        out, lse = _without_gradient("flash_attn_varlen_func with a block_table", paged, q, k, v)
        result = (out, lse) if return_attn_probs else out
    else:
        result = attention_varlen(
            _dense_rows(q),
            _dense_rows(k),
            _dense_rows(v),
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            dropout_p=dropout_p,
            deterministic=deterministic or None,
            return_lse=return_attn_probs,
            **words,
        )
    return (*result, _no_probabilities(q)) if return_attn_probs else result


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: _Sides = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_varlen_func` with keys and values in one tensor kv (total_k, 2, heads_k, head_dim)."""
    k, v = _unpacked("kv", kv, 2, "(total, 2, heads, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: _Sides = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_varlen_func` with all three in one tensor qkv (total, 3, heads, head_dim)."""
    q, k, v = _unpacked("qkv", qkv, 3, "(total, 3, heads, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    cache_seqlens: Optional[Union[int, Tensor]] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: _Sides = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Optional[Tensor] = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """Attention of new queries q (batch, seqlen_q, heads_q, head_dim) against a cache; without a backward pass.

    Args:
      k_cache, v_cache: (batch_cache, capacity, heads_k, head_dim), or pages (pages, page_size, heads_k, head_dim).
      k, v: (batch, seqlen_new, heads_k, head_dim), written to the cache at cache_seqlens and then attended to.
      rotary_cos, rotary_sin: (positions, rotary_dim / 2): k is rotated at cache_seqlens + i; so is q if causal or with
        a window, else at cache_seqlens. They go with k and v.
      cache_seqlens: int, or int32 (batch): keys in the cache before this call. Default: all of it.
      cache_batch_idx: int32 (batch): sequence b's cache is k_cache[cache_batch_idx[b]].
      cache_leftpad: int32 (batch): so many keys in front are padding. Not with a block_table.
      block_table: int32 (batch, max_pages): page p of sequence b is k_cache[block_table[b, p]].
      rotary_interleaved: pairs neighbours; False pairs halves.
      num_splits: taken and not needed: the number of splits is chosen by the library.

    Returns out like q, with return_softmax_lse (out, lse) with lse float32 (batch, heads_q, seqlen_q).
    """
    _require_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    inputs = (q, k_cache, v_cache, k, v)
    _check_cache_words(k, v, rotary_cos, rotary_sin, cache_seqlens)
    batch, seqlen_q = q.shape[:2]
    if not isinstance(cache_seqlens, Tensor):
        pages = 1 if block_table is None else block_table.shape[1]
        length = pages * k_cache.shape[1] if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), length, dtype=torch.int32, device=q.device)
    caches, held, block_table = _where_keys_lie(
        (k_cache, v_cache), cache_seqlens, cache_leftpad, cache_batch_idx, block_table
    )
    words = _words(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if k is not None and rotary_cos is not None and rotary_sin is not None:
        moving = bool(causal) or words["window"] is not None
        same_rule = k.shape[1] == seqlen_q and (moving or seqlen_q == 1)  # as the library's own
        if cache_leftpad is not None or not same_rule:
            q = _rotate(q, cache_seqlens, moving, rotary_cos, rotary_sin, rotary_interleaved)
            k = _rotate(k, cache_seqlens, True, rotary_cos, rotary_sin, rotary_interleaved)
            rotary_cos = rotary_sin = None
    with torch.no_grad():
        results = attention_decode(
            _dense_rows(q),
            *caches,
            held,
            block_table,
            k_new=None if k is None else _dense_rows(k),
            v_new=None if v is None else _dense_rows(v),
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            layout="bshd",
            return_lse=return_softmax_lse,
            **words,
        )
    results = results if return_softmax_lse else (results,)
    results = _without_gradient("flash_attn_with_kvcache", results, *inputs)
    return results if return_softmax_lse else results[0]


# ---- what the functions share --------------------------------------------------------------------------------------


def _words(
    softmax_scale: Optional[float],
    causal: bool,
    window_size: _Sides,
    softcap: float,
    alibi_slopes: Optional[Tensor],
) -> dict[str, Any]:
    """These options in flashcore's words."""
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise ValueError(f"window_size={window_size!r} given; a pair (left, right) is needed, with -1 for unbounded")
    sides = tuple(-1 if side is None or side < 0 else side for side in window_size)
    return {
        "scale": softmax_scale,
        "causal": "bottom_right" if causal else False,
        "window": None if sides == (-1, -1) else sides,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


def _check_cache_words(
    k: Optional[Tensor],
    v: Optional[Tensor],
    rotary_cos: Optional[Tensor],
    rotary_sin: Optional[Tensor],
    cache_seqlens: Optional[Union[int, Tensor]],
) -> None:
    if (k is None) != (v is None):
        raise ValueError("one of k and v given; new keys and new values go together")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("one of rotary_cos and rotary_sin given; they go together")
    if k is None and rotary_cos is not None:
        raise ValueError("rotary_cos given without k and v; the rotary embedding goes with new keys")
    if k is not None and cache_seqlens is None:
        raise ValueError("k and v given without cache_seqlens, which says where in the cache they go")


def _where_keys_lie(
    caches: tuple[Tensor, Tensor],
    cache_seqlens: Tensor,
    padding: Optional[Tensor],
    batch_idx: Optional[Tensor],
    block_table: Optional[Tensor],
) -> tuple[tuple[Tensor, ...], Tensor, Optional[Tensor]]:
    """The caches, how many keys they hold, and a table of their pages, in flashcore's words."""
    if block_table is not None and (batch_idx is not None or padding is not None):
        other = "cache_batch_idx" if batch_idx is not None else "cache_leftpad"
        raise ValueError(f"{other} and block_table given; only one of them can say whose cache is whose")
    batch, (owners, capacity) = cache_seqlens.numel(), caches[0].shape[:2]
    if batch_idx is not None:
        _check_each("cache_batch_idx", batch_idx, batch, [owners - 1] * batch, "there are caches 0 to {}")
    if padding is None:
        return caches, cache_seqlens, block_table if batch_idx is None else batch_idx.to(torch.int32)[:, None]
    held = cache_seqlens.tolist() if _is_looked_into(cache_seqlens) else []
    _check_each("cache_leftpad", padding, batch, held, "the sequence has 0 to {} keys")
    # Pages of one key each, and a table of those behind the padding.
    owner = torch.arange(len(padding), device=padding.device) if batch_idx is None else batch_idx
    place = padding[:, None] + torch.arange(capacity, device=padding.device)
    table = torch.where(place < capacity, owner[:, None] * capacity + place, -1)  # none beyond the end
    try:
        pages = tuple(cache.view(-1, 1, *cache.shape[2:]) for cache in caches)
    except RuntimeError:
        raise ValueError("cache_leftpad given; the sequences of a cache must then follow without a gap") from None
    return pages, cache_seqlens - padding, table.to(torch.int32)


def _is_looked_into(lengths: Tensor) -> bool:
    """Whether lengths are checked, as the library does it: a GPU is not waited for unless FLASHCORE_CHECK=1."""
    has_values = type(lengths) is Tensor and not torch.compiler.is_compiling()
    return has_values and (lengths.is_cpu or os.environ.get("FLASHCORE_CHECK") == "1")


def _check_each(name: str, given: Tensor, batch: int, largest: Sequence[int], rule: str) -> None:
    """One integer for each sequence, of 0 to largest."""
    _require_tensors(**{name: given})
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32, got {given.dtype}")
    if given.shape != (batch,):
        raise ValueError(f"{name} must have shape ({batch},), got {tuple(given.shape)}")
    if not _is_looked_into(given):
        return
    for b, (value, last) in enumerate(zip(given.tolist(), largest, strict=False)):  # largest is empty if not known
        if not 0 <= value <= last:
            raise ValueError(f"{name}[{b}] is {value}; {rule.format(last)}")


def _check_offsets(name: str, offsets: Tensor, longest: Optional[int], rows: Optional[int]) -> None:
    """Where packed sequences begin and end, in the words of the library."""
    bound = _bound(longest)
    if not _is_looked_into(offsets):
        return
    values = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"{name}[0] is {values[0]}; it must start with 0")
    for b, (first, end) in enumerate(zip(values, values[1:], strict=False)):
        if end < first:
            raise ValueError(f"{name}[{b + 1}] is {end} after {first}; it must never fall")
        if longest is not None and end - first > bound:
            given = f"{end - first} rows, more than the given maximum of {bound}"
            raise ValueError(f"sequence {b} of {name} has {given}")
    if rows is not None and values[-1] > rows:
        raise ValueError(f"{name}[{len(values) - 1}] is {values[-1]}, but there are only {rows} packed rows")


def _dense_rows(tensor: Tensor) -> Tensor:
    """flash-attn copies what has no contiguous last dimension; flashcore would refuse it."""
    return tensor if not isinstance(tensor, Tensor) or tensor.stride(-1) == 1 else tensor.contiguous()


def _no_probabilities(q: Tensor) -> Tensor:
    return q.new_empty(0)


def _unpacked(name: str, packed: Tensor, parts: int, shape: str) -> tuple[Tensor, ...]:
    _require_tensors(**{name: packed})
    if packed.dim() != shape.count(",") + 1 or packed.shape[-3] != parts:
        raise ValueError(f"{name} of shape {tuple(packed.shape)} given; {shape} is needed")
    return packed.unbind(-3)


def _require_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
            raise TypeError(f"{name}: {kind} given; flashcore.compat.flash_attn takes torch tensors")


class _WithoutGradient(torch.autograd.Function):
    """Results of calls that run where a gradient may be asked for later, and say so if it is."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.name = name
        return tuple(result.view_as(result) for result in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"{ctx.name} has no gradient; call it under torch.no_grad()")


def _without_gradient(name: str, results: tuple[Tensor, ...], *inputs: Optional[Tensor]) -> tuple[Tensor, ...]:
    given = [tensor for tensor in inputs if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _WithoutGradient.apply(name, len(results), *results, *given)  # type: ignore[no-any-return]
    return results


def _rotate(x: Tensor, start: Tensor, moving: bool, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of x (batch, seqlen, heads, head_dim) at positions start + i, or all at start."""
    positions = start[:, None] + torch.arange(x.shape[1], device=x.device) * moving
    half = cos.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[positions][:, :, None].to(dtype) for table in (cos, sin))
    turned, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = first * cos - second * sin, first * sin + second * cos
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def _attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    block_table: Tensor,
    words: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Packed queries against paged keys: a decode call whose queries are padded on the left, so that they end together.

    The rules are aligned bottom-right, so rows in front change nothing for the rows behind them.
    """
    _require_tensors(q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or len(cu_seqlens_q) < 1:
        shapes = f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have shape (batch + 1,), got {shapes}")
    if q.dim() != 3:
        raise ValueError(f"q must have shape (total, heads, head_dim), got {tuple(q.shape)}")
    total, batch = q.shape[0], len(cu_seqlens_q) - 1
    _check_offsets("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, total)
    _check_offsets("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, None)
    rows = total if max_seqlen_q is None else min(_bound(max_seqlen_q), total)
    ends = cu_seqlens_q[1:]
    source = ends[:, None] + torch.arange(-rows, 0, device=q.device)
    padded = q[source.clamp(0, max(total - 1, 0))]
    lengths = cu_seqlens_k.diff().to(torch.int32)
    out, lse = attention_decode(padded, k, v, lengths, block_table, layout="bshd", return_lse=True, **words)
    token = torch.arange(total, device=q.device)
    sequence = torch.searchsorted(ends, token, right=True).clamp(max=batch - 1)
    row = token - ends[sequence] + rows
    is_held = (row >= 0) & (row < rows)  # rows behind the last sequence are nobody's
    row = row.clamp(0, rows - 1)
    out = torch.where(is_held[:, None, None], out[sequence, row], 0)
    return out, torch.where(is_held, lse[sequence, :, row].transpose(0, 1), -torch.inf)
