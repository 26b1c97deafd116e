"""The calls as torch operators, torch.ops.flashcore.*: opaque to the compiler, with the shapes of their results.

Their gradients are in autograd.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import unwrap
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .. import _core
from ..attention import attention
from ..interop import Torch, classify, known
from ..options import DECODE_ARRAYS, FORWARD_ARRAYS, LAYOUTS, ROW_ORDER, Causal, Window, convert, window_sides, word

_CAUSAL: dict[Any, str] = {False: "none", True: "square", "top_left": "top_left", "bottom_right": "bottom_right"}
_CAUSAL_OF = {name: causal for causal, name in _CAUSAL.items()}

#: the arrays of a forward call, in the order of `_core.forward`
TENSORS = ("q", "k", "v", *FORWARD_ARRAYS)
#: those of them that have a gradient: q, k, v, bias, sinks
DIFFERENTIABLE = (0, 1, 2, 4, 6)
#: the arrays of a decode call, in the order of `_core.decode`
DECODE_TENSORS = ("q", *DECODE_ARRAYS)
_NO_GRADIENTS = (None,) * len(DIFFERENTIABLE)


class Words(NamedTuple):
    """The words of a call as an operator's schema can hold them."""

    layout: str
    causal: str
    left: int
    right: int
    scale: Optional[float]
    softcap: float
    dropout_p: float
    seed: int
    deterministic: bool
    kernel: str

    def options(self, drawn_seed: Optional[Tensor] = None) -> _core.Options:
        """The library's own options. `drawn_seed` is a seed that was drawn inside a graph."""
        seed = self.seed if drawn_seed is None else int(drawn_seed)
        return convert(
            self.layout,
            _CAUSAL_OF[self.causal],
            (self.left, self.right),
            self.scale,
            self.softcap,
            self.dropout_p,
            seed % 2**64,
            self.deterministic,
            self.kernel or None,
        )


def words(
    layout: str,
    causal: Causal,
    window: Window,
    scale: Optional[float],
    softcap: float,
    dropout_p: float,
    seed: int,
    deterministic: bool,
    kernel: Optional[str],
) -> Words:
    """The words of a call, checked as far as their form goes. Raises ValueError."""
    word("layout", layout, LAYOUTS)
    if causal not in _CAUSAL:
        word("causal", causal, {name: 0 for name in _CAUSAL})
    left, right = (-1, -1) if window is None else window_sides(window)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} given; 0 to 2**64 - 1 is allowed")
    signed = seed if seed < 2**63 else seed - 2**64
    scale = None if scale is None else float(scale)
    return Words(
        layout,
        _CAUSAL[causal],
        left,
        right,
        scale,
        float(softcap),
        float(dropout_p),
        signed,
        deterministic,
        kernel or "",
    )


# ---- who looks on at a call ------------------------------------------------------------------------------------------

#: the roads of a call
OPERATORS, LIBRARY, AUTOGRAD = range(3)

is_compiling = torch.compiler.is_compiling
is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # asked in less time; other compilers show among onlookers
_forward_ad = torch.autograd.forward_ad
FRAMEWORK: Torch = classify(torch.empty(0))  # type: ignore[assignment]
#: reads tensors without a warning about their gradients
QUIET = FRAMEWORK.quiet
# Private names of torch; where one is missing, every call takes the road of the operators.
casts = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)  # on some device
_onlookers = _core.Onlookers(
    QUIET,
    (Tensor, torch.nn.Parameter),
    [
        (getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1), 0),
        (getattr(torch._C, "_are_functorch_transforms_active", lambda: True), False),
        (getattr(torch._C, "_is_tracing", lambda: True), False),  # by torch.jit.trace
    ],
    casts,
    vars(_forward_ad),
    "_current_level",
    torch.is_grad_enabled,
)
#: a tuple of tensors, the first of them not None -> the road of the call, unless a compiler looks on
road_of = _onlookers.road
#: out of a plain call, made at once; True where its gradient is to be recorded; None where it takes another road
attend_plainly, attend_alike = _onlookers.attend, _onlookers.attend_alike


def choose_road(tensors: tuple[Optional[Tensor], ...]) -> int:
    """The road of a call with these tensors, the first of them not None."""
    return OPERATORS if is_compiling() else road_of(tensors)


def refuse_tangents(tensors: Sequence[Any]) -> None:
    """An error, and not a silent zero, where forward mode differentiates one of them."""
    if _forward_ad._current_level < 0:
        return
    if any(isinstance(x, Tensor) and _forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "flashcore.torch has no forward-mode derivative (jvp, jacfwd, dual numbers); use reverse mode"
        )


def refuse_learnable(scale: Any, softcap: Any = 0.0) -> None:
    """An error, and not a number quietly detached, where one of them is a tensor that wants a gradient."""
    for name, number in (("scale", scale), ("softcap", softcap)):
        if isinstance(number, Tensor) and number.requires_grad:
            raise TypeError(
                f"{name}: a tensor that requires grad given, but attention has no gradient for it; pass a Python "
                f"number: {name}.item()"
            )


# ---- the calls, on plain tensors -------------------------------------------------------------------------------------


def _attend(*tensors: Any, **words: Any) -> Any:
    if torch.is_grad_enabled():
        refuse_learnable(words.get("scale"))
    return unwrap(attention)(*tensors, **words)


#: `flashcore.attention`, without its warning about gradients
attend = _core.shortcut(_attend, known, "quiet")


def forward(
    tensors: tuple[Optional[Tensor], ...],
    options: _core.Options,
    bounds: tuple[int, int],
    with_lse: bool,
    out: Optional[Tensor] = None,
    lse: Optional[Tensor] = None,
) -> Any:
    """out or, where lse is given or wanted, (out, lse). `tensors` are those of TENSORS; the last may be missing."""
    return _core.forward(QUIET, tensors, (out, lse), options, *bounds, bool(with_lse), None)


def backward(
    cotangents: tuple[Optional[Tensor], Optional[Tensor]],
    results: tuple[Tensor, Tensor],
    tensors: tuple[Optional[Tensor], ...],
    wanted: tuple[bool, ...],
    options: _core.Options,
    bounds: tuple[int, int],
) -> tuple[Optional[Tensor], ...]:
    """(dq, dk, dv, dbias, dsinks), None where not wanted. `cotangents` are those of out and lse; `tensors` are those of
    TENSORS; the last may be missing."""
    dout, dlse = cotangents
    dout = torch.zeros_like(results[0]) if dout is None else dense_rows(dout)
    return _core.backward(  # type: ignore[no-any-return]
        QUIET, tensors, results, (dout, dlse), _NO_GRADIENTS, wanted, options, *bounds, None
    )


def decode(
    tensors: tuple[Optional[Tensor], ...],
    caches: tuple[Tensor, Tensor],
    interleaved: bool,
    options: _core.Options,
    with_lse: bool,
    out: Optional[Tensor] = None,
    lse: Optional[Tensor] = None,
) -> Any:
    """out or, where lse is given or wanted, (out, lse). `tensors` are those of DECODE_TENSORS."""
    return _core.decode(QUIET, tensors, caches, interleaved, (out, lse), options, bool(with_lse), None)


def merge(
    states: tuple[Tensor, Tensor, Tensor, Tensor],
    layout: str,
    out: Optional[Tensor] = None,
    lse: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """out and lse of (out_a, lse_a, out_b, lse_b)."""
    number = word("layout", layout, LAYOUTS)
    return _core.merge_states(QUIET, states, (out, lse), number, None)  # type: ignore[no-any-return]


def dense_rows(tensor: Tensor) -> Tensor:
    """The library asks for a contiguous last dimension; a gradient may arrive expanded (as of .sum())."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


# ---- the operators ---------------------------------------------------------------------------------------------------

_WORDS = (
    "str layout, str causal, SymInt left, SymInt right, float? scale, float softcap, float dropout_p, SymInt seed, "
    "bool deterministic, str kernel"
)
_BOUNDS = "SymInt max_seqlen_q, SymInt max_seqlen_k"


def _listed(names: tuple[str, ...], needed: tuple[str, ...]) -> str:
    return ", ".join(f"Tensor{'' if name in needed else '?'} {name}" for name in names)


_TENSORS = f"{_listed(TENSORS, ('q', 'k', 'v'))}, Tensor? drawn_seed"
_DECODE = _listed(DECODE_TENSORS, ("q", "cache_seqlens"))

library = torch.library.Library("flashcore", "DEF")
for schema in (
    f"attention_forward({_TENSORS}, {_WORDS}, {_BOUNDS}) -> (Tensor, Tensor)",
    f"attention_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {_TENSORS}, bool[] wanted, "
    f"{_WORDS}, {_BOUNDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"attention_decode(Tensor k_cache, Tensor v_cache, {_DECODE}, bool interleaved, {_WORDS}) -> (Tensor, Tensor)",
    f"attention_append(Tensor(a!) k_cache, Tensor(b!) v_cache, {_DECODE}, bool interleaved, {_WORDS}) "
    "-> (Tensor, Tensor)",
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str layout) -> (Tensor, Tensor)",
):
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

_COUNT = len(TENSORS)


def split(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, Words, tuple[int, int]]:
    """The arguments of attention_forward: (tensors, drawn seed, words, bounds)."""
    return arguments[:_COUNT], arguments[_COUNT], Words(*arguments[_COUNT + 1 : -2]), arguments[-2:]


# A compiler chooses strides as it likes: rows are made dense here.


def _forward(*arguments: Any) -> tuple[Tensor, Any]:
    (q, k, v, *others), drawn_seed, spoken, bounds = split(arguments)
    tensors = (dense_rows(q), dense_rows(k), dense_rows(v), *others)
    return forward(tensors, spoken.options(drawn_seed), bounds, True)  # type: ignore[no-any-return]


def _backward(dout: Any, dlse: Any, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    before, wanted = arguments[: _COUNT + 1], arguments[_COUNT + 1]
    (q, k, v, *others), drawn_seed, spoken, bounds = split((*before, *arguments[_COUNT + 2 :]))
    tensors = (dense_rows(q), dense_rows(k), dense_rows(v), *others)
    grads = backward((dout, dlse), (dense_rows(out), lse), tensors, tuple(wanted), spoken.options(drawn_seed), bounds)
    return tuple(out.new_empty(0) if gradient is None else gradient for gradient in grads)


def _decode(k_cache: Tensor, v_cache: Tensor, *arguments: Any) -> tuple[Tensor, Any]:
    count = len(DECODE_TENSORS)
    interleaved, spoken = arguments[count], Words(*arguments[count + 1 :])
    tensors = tuple([dense_rows(x) if i in (0, 3, 4) and x is not None else x for i, x in enumerate(arguments[:count])])
    return decode(tensors, (k_cache, v_cache), interleaved, spoken.options(), True)  # type: ignore[no-any-return]


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    return merge((dense_rows(out_a), lse_a, dense_rows(out_b), lse_b), layout)


#: by operator: what it does with plain tensors
IMPLEMENTATIONS = {
    "attention_forward": _forward,
    "attention_backward": _backward,
    "attention_decode": _decode,
    "attention_append": _decode,
    "merge_states": _merge,
}
for key in ("CPU", "CUDA"):
    for name, implementation in IMPLEMENTATIONS.items():
        library.impl(name, implementation, key)


# ---- the shapes of their results, where there is no data -------------------------------------------------------------


def _results(q: Tensor, v: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    if q.dim() != (3 if layout == "thd" else 4) or v.dim() < 3:
        needed = "(total, heads, head_dim)" if layout == "thd" else "4 dimensions"
        raise ValueError(f"q of shape {tuple(q.shape)} and v of shape {tuple(v.shape)} given; {needed} needed")
    dtype = torch.bfloat16 if q.dtype is torch.float8_e4m3fn else q.dtype
    rows = [q.shape[i] for i in ROW_ORDER[layout]]
    row_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype), q.new_empty(rows, dtype=row_dtype)


@torch.library.register_fake("flashcore::attention_forward", lib=library)
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, _, spoken, _ = split(arguments)
    return _results(tensors[0], tensors[2], spoken.layout)


@torch.library.register_fake("flashcore::attention_backward", lib=library)
def _(dout: Any, dlse: Any, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, wanted = arguments[:_COUNT], arguments[_COUNT + 1]
    sources = [tensors[i] for i in DIFFERENTIABLE]
    return tuple(
        source.new_empty(source.shape) if want else out.new_empty(0)
        for source, want in zip(sources, wanted, strict=True)
    )


def _decode_results(k_cache: Tensor, v_cache: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _results(arguments[0], v_cache, Words(*arguments[len(DECODE_TENSORS) + 1 :]).layout)


torch.library.register_fake("flashcore::attention_decode", _decode_results, lib=library)
torch.library.register_fake("flashcore::attention_append", _decode_results, lib=library)


@torch.library.register_fake("flashcore::merge_states", lib=library)
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


# ---- what they do where autograd looks on ----------------------------------------------------------------------------


def below_autograd(operator: Any, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def records(arguments: tuple[Any, ...]) -> bool:
    """Whether a gradient is recorded of an operator's results."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _without_gradient(operator: Any) -> Any:
    """Attention has gradients, the cache of a decode step has none."""

    def call(*arguments: Any) -> Any:
        refuse_tangents(arguments)
        if records(arguments):
            raise RuntimeError(
                "attention_decode has no gradient inside vmap or with new keys, but an input requires one; call it "
                "under torch.no_grad(), or train with flashcore.torch.attention"
            )
        return below_autograd(operator, arguments)

    return call


attention_forward = torch.ops.flashcore.attention_forward.default
attention_backward = torch.ops.flashcore.attention_backward.default
attention_decode = torch.ops.flashcore.attention_decode.default
attention_append = torch.ops.flashcore.attention_append.default
merge_states = torch.ops.flashcore.merge_states.default

library.impl("attention_decode", _without_gradient(attention_decode), "Autograd")
library.impl("attention_append", _without_gradient(attention_append), "Autograd")
