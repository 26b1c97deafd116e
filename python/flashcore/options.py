"""Words: the option words of a call as the library's own options. Each distinct set of words is converted once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, Optional, TypedDict, Union

from . import _core
from .interop import is_traced

Layout = Literal["bhsd", "bshd"]
Causal = Union[bool, Literal["top_left", "bottom_right"]]
Window = Optional[Sequence[Optional[int]]]

LAYOUTS = {"bhsd": 0, "bshd": 1, "thd": 2}
CAUSAL = {False: 0, True: 1, "top_left": 2, "bottom_right": 3}
#: the arrays of a forward call behind q, k and v, in the order of `_core.forward`
FORWARD_ARRAYS = (
    "mask",
    "bias",
    "alibi_slopes",
    "sinks",
    "q_descale",
    "k_descale",
    "v_descale",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_k",
)
#: those of a decode call behind q, in the order of `_core.decode`
DECODE_ARRAYS = (
    "cache_seqlens",
    "block_table",
    "k_new",
    "v_new",
    "rotary_cos",
    "rotary_sin",
    "mask",
    "bias",
    "alibi_slopes",
    "sinks",
    "q_descale",
    "k_descale",
    "v_descale",
)
#: lse's dimensions, as places in q's shape
ROW_ORDER = {"bhsd": (0, 1, 2), "bshd": (0, 2, 1), "thd": (1, 0)}


class AttentionKeywords(TypedDict, total=False):
    """What `supports`, `explain` and `plan` take: keywords of `attention`, of varlen, decode and gradients."""

    causal: Causal
    window: Window
    scale: Optional[float]
    mask: Any
    bias: Any
    softcap: float
    alibi_slopes: Any
    sinks: Any
    dropout_p: float
    seed: int
    q_descale: Any
    k_descale: Any
    v_descale: Any
    seqused_k: Any
    layout: Layout
    return_lse: bool
    out: Any
    lse: Any
    kernel: Optional[str]
    stream: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    max_seqlen_q: Optional[int]
    max_seqlen_k: Optional[int]
    cache_seqlens: Any
    block_table: Any
    k_new: Any
    v_new: Any
    rotary_cos: Any
    rotary_sin: Any
    rotary_interleaved: bool
    dout: Any
    dlse: Any
    deterministic: bool
    dq: Any
    dk: Any
    dv: Any


def word(name: str, given: Any, allowed: dict[Any, int]) -> int:
    """The number of a word. Raises ValueError naming the words that are allowed."""
    try:
        return allowed[given]
    except (KeyError, TypeError):
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}={given!r} given; allowed: {choices}") from None


def window_sides(window: Sequence[Optional[int]]) -> tuple[int, int]:
    """(left, right) with -1 for unbounded."""
    try:
        left, right = (-1 if side is None else operator.index(side) for side in window)
    except (TypeError, ValueError):
        raise ValueError(
            f"window={window!r} given; a pair (left, right) of key counts is needed, with None or -1 for unbounded"
        ) from None
    if not (-1 <= left < 2**63 and -1 <= right < 2**63):
        raise ValueError(
            f"window={window!r} given; each side is at least 0 and less than 2**63, or None or -1 for unbounded"
        )
    return left, right


@lru_cache(maxsize=256)
def _convert(
    layout: str,
    causal: Causal,
    sides: Optional[tuple[int, int]],
    scale: Optional[float],
    softcap: float,
    dropout_p: float,
    seed: int,
    deterministic: bool,
    kernel: Optional[str],
) -> _core.Options:
    if kernel is not None and not isinstance(kernel, str):
        raise TypeError(f"kernel={kernel!r} given; a kernel's name is needed")
    if not 0 <= operator.index(seed) < 2**64:
        raise ValueError(f"seed={seed} given; 0 to 2**64 - 1 is allowed")
    left, right = sides or (-1, -1)
    return _core.Options(
        word("layout", layout, LAYOUTS),
        word("causal", causal, CAUSAL),
        left,
        right,
        scale,
        softcap,
        dropout_p,
        operator.index(seed),
        bool(deterministic),
        kernel or "",
    )


def convert(
    layout: str,
    causal: Causal,
    window: Window,
    scale: Optional[float],
    softcap: float,
    dropout_p: float,
    seed: int,
    deterministic: bool,
    kernel: Optional[str],
) -> _core.Options:
    """The library's options for these words."""
    try:
        # What is remembered must be plain values: an array of one element may change later, and a list has no hash.
        sides = None if window is None else window_sides(window)
        if scale is not None:
            scale = float(scale)
        if type(softcap) is not float:
            softcap = float(softcap)
        if type(dropout_p) is not float:
            dropout_p = float(dropout_p)
        return _convert(layout, causal, sides, scale, softcap, dropout_p, seed, deterministic, kernel)
    except (TypeError, ValueError):
        refuse_traced(
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
            dropout_p=dropout_p,
            seed=seed,
            deterministic=deterministic,
        )
        raise


def refuse_traced(**words: Any) -> None:
    """Raises TypeError for a word that is traced by JAX: a program is compiled for the words of its calls."""
    for name, value in words.items():
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if any(map(is_traced, parts)):
            raise TypeError(
                f"{name}: a traced value given; it is written into the compiled program, so a plain Python value is "
                "needed (for jax.jit: static_argnames)"
            ) from None
