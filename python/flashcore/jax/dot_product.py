"""`dot_product_attention`, which takes what `jax.nn.dot_product_attention` takes."""

from __future__ import annotations

import operator
from typing import Any, Literal, Optional, Union

import jax
import jax.numpy as jnp

from ..options import refuse_traced
from .calls import array
from .differentiable import attention


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: Optional[float] = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Optional[Union[int, tuple[int, int]]] = None,
    implementation: Optional[Literal["flashcore"]] = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`, argument for argument, by flashcore.

    B is the batch size, T and S the lengths of queries and keys, N and K the numbers of query and key/value heads (N a
    multiple of K), H the head dimension.

    Args:
      query: (B, T, N, H) or (T, N, H).
      key, value: (B, S, K, H) or (S, K, H); value may have a head dimension of its own.
      bias: added to the logits, broadcastable to (B, N, T, S); has a gradient.
      mask: boolean, True = takes part, broadcastable to (B, N, T, S).
      scale: default 1/√H. A Python number.
      is_causal: query i sees keys j ≤ i, also where T and S differ.
      query_seq_lengths: int32 (B): later queries give 0.
      key_value_seq_lengths: int32 (B): later keys do not exist.
      local_window_size: (left, right) or one number for both: query i sees keys i − left to i + right.
      implementation: None or "flashcore".
      return_residual: also return the log-sum-exp of the logits, (B, T, N) or (T, N), key's dtype, without a gradient.

    Returns: like query, with value's head dimension. A query that sees no key gives 0 (jax.nn gives a mean of values
    there); its log-sum-exp is -inf.

    Raises: ValueError, TypeError while tracing: says what was given and what is allowed.
    """
    refuse_traced(scale=scale, is_causal=is_causal, local_window_size=local_window_size)
    if implementation not in (None, "flashcore"):
        raise ValueError(
            f"implementation={implementation!r} given; this is flashcore's: allowed are None and 'flashcore', "
            "jax.nn.dot_product_attention has the others"
        )
    query, key, value = array(query, "query"), array(key, "key"), array(value, "value")
    single = query.ndim == 3
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != query.ndim or x.ndim not in (3, 4):
            raise ValueError(
                f"{name} has shape {x.shape}; query, key and value are all (B, length, heads, H) or all "
                "(length, heads, H)"
            )
    if single:
        query, key, value = query[None], key[None], value[None]
    batch, rows, columns = query.shape[0], query.shape[1], key.shape[1]
    used_q = _lengths(query_seq_lengths, "query_seq_lengths", batch)
    used_k = _lengths(key_value_seq_lengths, "key_value_seq_lengths", batch)
    bias = None if bias is None else array(bias, "bias")
    if bias is not None and bias.dtype not in (query.dtype, jnp.float32):
        bias = bias.astype(query.dtype if query.dtype == jnp.float64 else jnp.float32)
    mask = None if mask is None else array(mask, "mask")
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be boolean (True = takes part), got {mask.dtype}; an additive mask is given as bias"
        )
    window = None
    if local_window_size is not None:
        window, mask = _window(local_window_size, is_causal, used_k is not None, (rows, columns), mask)
    attended = attention(
        query,
        key,
        value,
        causal="top_left" if is_causal else False,
        window=window,
        scale=scale,
        mask=mask,
        bias=bias,
        seqused_k=used_k,
        layout="bshd",
        return_lse=return_residual,
    )
    out, lse = attended if return_residual else (attended, None)
    exists = None if used_q is None else jnp.arange(rows) < used_q[:, None]
    if exists is not None:
        out = jnp.where(exists[:, :, None, None], out, 0)
    out = out[0] if single else out
    if lse is None:
        return out
    residual = jax.lax.stop_gradient(lse).swapaxes(1, 2)
    if exists is not None:
        residual = jnp.where(exists[:, :, None], residual, -jnp.inf)
    residual = residual.astype(key.dtype)
    return out, residual[0] if single else residual


def _window(
    size: Union[int, tuple[int, int]], is_causal: bool, lengths_vary: bool, shape: tuple[int, int], mask: Any
) -> tuple[Any, Any]:
    """flashcore's window and mask for a window that is aligned with the first query and key.

    Without a causal rule flashcore's windows are aligned with the last ones: they are moved by the difference, and
    where that cannot be (a side would be negative, or the last key is not the same in all sequences) masked.
    """
    left, right = (size, size) if isinstance(size, int) else map(operator.index, size)
    rows, columns = shape
    shift = 0 if is_causal else columns - rows
    if min(left, right, left + shift, right - shift) >= 0 and (is_causal or not lengths_vary):
        return (left + shift, right - shift), mask
    distance = jnp.arange(columns) - jnp.arange(rows)[:, None]
    within = (-left <= distance) & (distance <= right)
    return None, within if mask is None else mask & within


def _lengths(lengths: Any, name: str, batch: int) -> Any:
    if lengths is None:
        return None
    lengths = array(lengths, name)
    if lengths.shape != (batch,) or lengths.dtype != jnp.int32:
        raise ValueError(f"{name} has shape {lengths.shape} and dtype {lengths.dtype}; int32 ({batch},) is needed")
    return lengths
