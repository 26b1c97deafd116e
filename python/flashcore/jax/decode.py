"""`attention_decode`: new queries against a key/value cache."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

import jax

from ..options import Causal, Layout, Window, convert, refuse_traced
from .calls import Call, given, invoke, vary_alike


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
    kernel: Optional[str] = None,
) -> Any:
    """`flashcore.attention_decode` for arrays that cannot be written: the caches with the new keys are results.

    Arguments and shapes are those of `flashcore.attention_decode`; words are static.

    Returns:
      out; with return_lse the pair (out, lse). With k_new and v_new: (out, k_cache, v_cache) or
      (out, lse, k_cache, v_cache). Inside a jit whose caches are donated (donate_argnums) they are appended to in
      place; elsewhere XLA copies them first.

    Raises: as `attention`. Has no gradient: NotImplementedError.
    """
    refuse_traced(rotary_interleaved=rotary_interleaved, return_lse=return_lse)
    corner = "bottom_right" if causal is True else causal
    words = convert(layout, corner, window, scale, softcap, 0.0, 0, False, kernel).words()
    operands = vary_alike(
        given(
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            cache_seqlens=cache_seqlens,
            block_table=block_table,
            k_new=k_new,
            v_new=v_new,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            mask=mask,
            bias=bias,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
        )
    )
    results = ("out", *(("lse",) if return_lse else ()), *(() if k_new is None else ("k_cache", "v_cache")))
    names = tuple(sorted(operands))  # the order in which jit hands a dictionary on
    made = _compiled(Call("decode", words, names, results, rotary_interleaved=bool(rotary_interleaved)), operands)
    return made if len(made) > 1 else made[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(call: Call, operands: dict[str, Any]) -> tuple[Any, ...]:
    return invoke(call, operands)


def _refuse(call: Call, operands: dict[str, Any]) -> Any:
    raise NotImplementedError("flashcore.jax.attention_decode has no gradient; flashcore.jax.attention has one")


_decode.defvjp(_refuse, _refuse)
_compiled = jax.jit(_decode, static_argnums=0)
