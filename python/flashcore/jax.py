"""flashcore for JAX, under jit and grad: `flashcore.jax.attention`.

The call leaves the compiled program through `jax.pure_callback`: arrays pass through host memory. That is a pointer on
the CPU and a copy on a GPU. Eager arrays on a GPU are taken where they lie by `flashcore.attention`.
"""

from __future__ import annotations

from typing import Any, Optional

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError("flashcore.jax needs JAX: pip install jax") from error

import numpy as np

from . import attention as _attention
from .attention import NO_LENGTHS, gradients
from .options import Causal, Layout, Window, convert
from .planning import plan

__all__ = ["attention"]


def _host(array: Any) -> Any:
    return None if array is None else np.asarray(array)


def attention(
    q: Any,
    k: Any,
    v: Any,
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
    seqused_k: Any = None,
    deterministic: bool = True,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    kernel: Optional[str] = None,
) -> Any:
    """`flashcore.attention` inside jit, grad and vmap, with gradients for q, k, v, bias and sinks.

    Arguments and shapes are those of `flashcore.attention`. Words and numbers (causal, scale, seed, …) are static.
    Gradients are deterministic by default, as JAX expects of pure functions.
    """
    words = (layout, causal, window, scale, softcap, dropout_p, seed)
    forward_words: dict[str, Any] = {
        "layout": layout,
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "seed": seed,
        "kernel": kernel,
    }

    def host_forward(tensors: Any, constants: Any) -> Any:
        q, k, v, bias, sinks = map(_host, tensors)
        mask, alibi_slopes, seqused_k = map(_host, constants)
        return _attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            seqused_k=seqused_k,
            return_lse=True,
            **forward_words,
        )

    def host_backward(tensors: Any, constants: Any, results: Any, cotangents: Any) -> Any:
        q, k, v, bias, sinks = map(_host, tensors)
        mask, alibi_slopes, seqused_k = map(_host, constants)
        inputs = (q, k, v, mask, bias, alibi_slopes, sinks, *NO_LENGTHS, seqused_k)
        wanted = (True, True, True, bias is not None, sinks is not None)
        grads = gradients(
            inputs,
            tuple(map(_host, results)),
            tuple(map(_host, cotangents)),
            (None,) * 5,
            wanted,
            convert(*words, deterministic, kernel),
        )
        return tuple(grads)

    @jax.custom_vjp
    def call(tensors: Any, constants: Any) -> Any:
        return jax.pure_callback(
            host_forward, _result_shapes(tensors, layout), tensors, constants, vmap_method="sequential"
        )

    def call_forward(tensors: Any, constants: Any) -> Any:
        results = call(tensors, constants)
        return results, (tensors, constants, results)

    def call_backward(saved: Any, cotangents: Any) -> Any:
        tensors, constants, results = saved
        shapes = tuple(None if x is None else _shape(x.shape, x.dtype) for x in tensors)
        grads = jax.pure_callback(
            host_backward, shapes, tensors, constants, results, cotangents, vmap_method="sequential"
        )
        return grads, tuple(map(_no_gradient, constants))

    call.defvjp(call_forward, call_backward)
    tensors = tuple(None if x is None else jnp.asarray(x) for x in (q, k, v, bias, sinks))
    constants = tuple(None if x is None else jnp.asarray(x) for x in (mask, alibi_slopes, seqused_k))
    _check(tensors, constants, forward_words)
    out, lse = call(tensors, constants)
    return (out, lse) if return_lse else out


def _check(tensors: Any, constants: Any, words: dict[str, Any]) -> None:
    """Raises what the call would raise, while tracing: an error in a callback would reach the user garbled.

    Planning does not read data, so the stand-ins are arrays whose memory is never touched.
    """
    q, k, v, bias, sinks, mask, alibi_slopes, seqused_k = (
        None if x is None else np.empty(x.shape, x.dtype) for x in (*tensors, *constants)
    )
    plan(q, k, v, bias=bias, sinks=sinks, mask=mask, alibi_slopes=alibi_slopes, seqused_k=seqused_k, **words)


def _result_shapes(tensors: Any, layout: str) -> Any:
    q, v = tensors[0], tensors[2]
    rows = (q.shape[0], q.shape[2], q.shape[1]) if layout == "bshd" else q.shape[:3]
    row_dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    return _shape((*q.shape[:-1], v.shape[-1]), q.dtype), _shape(rows, row_dtype)


def _shape(shape: Any, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _no_gradient(constant: Any) -> Any:
    """Masks, slopes and lengths are constants: a zero, of the type that JAX wants for the dtype."""
    if constant is None:
        return None
    if jnp.issubdtype(constant.dtype, jnp.floating):
        return jnp.zeros_like(constant)
    return np.zeros(constant.shape, jax.dtypes.float0)
