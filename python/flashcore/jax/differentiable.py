"""`attention` and `attention_varlen`, with gradients for q, k, v, bias and sinks."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ..attention import _bound
from ..options import Causal, Layout, Window, convert, refuse_traced
from .calls import Call, given, invoke, vary_alike
from .versions import MAY_SAVE_WHAT_IS_WANTED

_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")


class Asked(NamedTuple):
    """The static part of a call."""

    words: tuple[Any, ...]
    bounds: tuple[int, int]
    with_lse: bool


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
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    seqused_k: Any = None,
    deterministic: bool = True,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    kernel: Optional[str] = None,
) -> Any:
    """`flashcore.attention` inside jit, grad, vmap and shard_map, with gradients for q, k, v, bias and sinks.

    Arguments, shapes and results are those of `flashcore.attention`. Words and numbers (causal, scale, seed, …) are
    static: they are written into the compiled program. Gradients are deterministic by default, as JAX expects of pure
    functions; they flow through out and through lse, and have no gradients themselves.

    Mapped by vmap it stays one call where the mapped dimensions can be told as more batch. Sharded arrays are cut over
    batch and heads (jit partitions the call by itself; shard_map works, too).

    Raises: while tracing, what `flashcore.attention` raises; TypeError for a traced word. What only data can tell (a
    length that is out of range) is a JaxRuntimeError where the result is waited for.
    """
    constants = given(
        mask=mask,
        alibi_slopes=alibi_slopes,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        seqused_k=seqused_k,
    )
    words = (layout, causal, window, scale, softcap, dropout_p, seed, deterministic, kernel)
    return _attend(words, (None, None), return_lse, given(q=q, k=k, v=v, bias=bias, sinks=sinks), constants)


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
    deterministic: bool = True,
    return_lse: bool = False,
    kernel: Optional[str] = None,
) -> Any:
    """`flashcore.attention_varlen` with gradients: sequences of different lengths, packed one after the other.

    q is (total_q, heads_q, head_dim), cu_seqlens_q and cu_seqlens_k are int32 (batch + 1). Words, max_seqlen_q and
    max_seqlen_k are static. causal=True needs one and the same array as cu_seqlens_q and cu_seqlens_k; where they are
    two, say "top_left" or "bottom_right". Otherwise as `attention`.
    """
    refuse_traced(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    if causal is True:
        if cu_seqlens_q is not cu_seqlens_k or seqused_k is not None:
            raise ValueError(
                "causal=True given with lengths that may differ between queries and keys; say which corner the "
                "diagonal starts from, 'top_left' or 'bottom_right', or give one and the same array as cu_seqlens_q "
                "and cu_seqlens_k"
            )
        causal = "bottom_right"  # queries and keys are cut alike, so that all diagonals are one
    constants = given(
        mask=mask,
        alibi_slopes=alibi_slopes,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
    )
    words = ("thd", causal, window, scale, softcap, dropout_p, seed, deterministic, kernel)
    bounds = (max_seqlen_q, max_seqlen_k)
    return _attend(words, bounds, return_lse, given(q=q, k=k, v=v, bias=bias, sinks=sinks), constants)


def _attend(words: Any, bounds: Any, with_lse: bool, tensors: dict[str, Any], constants: dict[str, Any]) -> Any:
    layout, causal, window, scale, softcap, dropout_p, seed, deterministic, kernel = words
    refuse_traced(return_lse=with_lse)
    asked = Asked(convert(*words).words(), (_bound(bounds[0]), _bound(bounds[1])), bool(with_lse))
    together = vary_alike({**tensors, **constants})
    return _compiled(asked, {name: together[name] for name in tensors}, {name: together[name] for name in constants})


# ---- the function and its gradient ----------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(asked: Asked, tensors: dict[str, Any], constants: dict[str, Any]) -> Any:
    results = _forward(asked, {**tensors, **constants}, asked.with_lse)
    return results if asked.with_lse else results[0]


def _forward(asked: Asked, operands: dict[str, Any], with_lse: bool) -> tuple[Any, ...]:
    results = ("out", "lse") if with_lse else ("out",)
    return _once(Call("forward", asked.words, tuple(operands), results, asked.bounds), operands)


def _forward_rule(asked: Asked, tensors: dict[str, Any], constants: dict[str, Any]) -> Any:
    operands = {name: x.value for name, x in {**tensors, **constants}.items()}
    out, lse = _forward(asked, operands, with_lse=True)
    wanted = {  # its keys are known while tracing
        name: None for name, x in tensors.items() if x.perturbed or not MAY_SAVE_WHAT_IS_WANTED
    }
    return (out, lse) if asked.with_lse else out, (operands, out, lse, wanted)


def _backward_rule(asked: Asked, saved: Any, cotangents: Any) -> Any:
    operands, out, lse, wanted = saved
    dout, dlse = cotangents if asked.with_lse else (cotangents, None)
    above = {"dout": jnp.zeros_like(out) if isinstance(dout, SymbolicZero) else dout}
    if dlse is not None and not isinstance(dlse, SymbolicZero):
        above["dlse"] = dlse
    operands = {**operands, "out": out, "lse": lse, **above}
    results = tuple("d" + name for name in wanted)
    call = Call("backward", asked.words, tuple(operands), results, asked.bounds)
    grads = dict(zip(wanted, _once(call, operands), strict=True)) if wanted else {}
    tensors = {name: grads.get(name) for name in _DIFFERENTIABLE if name in operands}
    return tensors, None


_differentiable.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
_compiled = jax.jit(_differentiable, static_argnums=0)  # so that a call outside of jit is compiled once, too


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _once(call: Call, operands: dict[str, Any]) -> tuple[Any, ...]:
    """The call, which JAX differentiates only where a derivative is differentiated: an error with words."""
    return invoke(call, operands)


def _refuse(call: Call, operands: dict[str, Any]) -> Any:
    raise NotImplementedError("flashcore.jax.attention can be differentiated once; its gradients have no gradient")


_once.defvjp(_refuse, _refuse)
