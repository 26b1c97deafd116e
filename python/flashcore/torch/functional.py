"""The functions: each call goes one of three roads, to the library itself, to its own autograd, or to the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Optional, ParamSpec, TypeVar, Union, cast

import torch
from torch import Tensor

from ..attention import _bound, _unpack
from ..interop import LazyNegation, qualified
from ..options import Causal, Layout, Window, convert
from . import batching, ops  # noqa: F401  (batching registers its rules)
from .autograd import Attention, MergeStates, record, record_plain, refuse_constants
from .ops import (
    AUTOGRAD,
    LIBRARY,
    OPERATORS,
    attend_plainly,
    choose_road,
    is_compiling,
    is_dynamo_compiling,
    refuse_learnable,
    refuse_tangents,
)

_UNKNOWN = (-1, -1)
_CONSTANT = tuple(i for i in range(len(ops.TENSORS)) if i not in ops.DIFFERENTIABLE)
_CAST = tuple(ops.TENSORS.index(name) for name in ("q", "k", "v", "bias"))  # by autocast

_Result = Union[Tensor, tuple[Tensor, Tensor]]
_Words, _Returned = ParamSpec("_Words"), TypeVar("_Returned")


def _shortcut(function: Callable[_Words, _Returned]) -> Callable[_Words, _Returned]:
    """The same function; calls of three tensors with no more than causal, scale and layout are made without entering
    it, where Python would set all of its words one by one."""

    @wraps(function)
    def attention(
        q: Any,
        k: Any = None,
        v: Any = None,
        *,
        causal: Any = False,
        scale: Any = None,
        layout: Any = "bhsd",
        **more: Any,
    ) -> Any:
        if not (more or is_dynamo_compiling()):
            try:
                result = attend_plainly(q, k, v, causal, scale, layout)
                if result is True:
                    return record_plain((layout, causal, scale), q, k, v)
                if result is not None:
                    return result
            except TypeError:
                pass  # the long road knows what to do, or what to say
        return function(q, k, v, causal=causal, scale=scale, layout=layout, **more)  # type: ignore[call-arg,arg-type]

    return cast(Callable[_Words, _Returned], attention)


@_shortcut
def attention(
    q: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    *,
    causal: Causal = False,
    window: Window = None,
    scale: Optional[float] = None,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    seed: Optional[int] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    deterministic: Optional[bool] = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    out: Optional[Tensor] = None,
    lse: Optional[Tensor] = None,
    kernel: Optional[str] = None,
) -> _Result:
    """`flashcore.attention` with gradients for q, k, v, bias and sinks, through out and through lse.

    Arguments, shapes, results and errors are those of `flashcore.attention`; the stream is torch's current one. And:
      seed: of dropout; None draws one from torch's default CPU generator, so that torch.manual_seed governs it. A CUDA
        graph keeps the seed with which it was captured.
      deterministic: bitwise the same gradients from run to run; None follows torch.use_deterministic_algorithms.
      out, lse: only where no gradient is recorded, and not under torch.compile or torch.func.

    Works under torch.compile(fullgraph=True), torch.export, torch.func (grad, vjp, vmap), activation checkpointing and
    CUDA graph capture. vmap makes one call of it (but with dropout, or with sinks that are mapped or want a gradient,
    one for each element). Under autocast q, k, v and bias are cast as for torch's scaled_dot_product_attention.

    The gradients themselves have no gradient: differentiating twice raises RuntimeError. Forward-mode differentiation
    raises NotImplementedError.
    """
    if k is None:
        q, k, v = _unpacked(q, v, layout)
    tensors = (q, k, v, mask, bias, alibi_slopes, sinks, q_descale, k_descale, v_descale, None, None, seqused_k)
    words = (layout, causal, window, scale, softcap, dropout_p, seed, deterministic, kernel)
    return _attend(tensors, words, _UNKNOWN, return_lse, out, lse)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    seqused_k: Optional[Tensor] = None,
    causal: Causal = False,
    window: Window = None,
    scale: Optional[float] = None,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    seed: Optional[int] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    deterministic: Optional[bool] = None,
    return_lse: bool = False,
    out: Optional[Tensor] = None,
    lse: Optional[Tensor] = None,
    kernel: Optional[str] = None,
) -> _Result:
    """`flashcore.attention_varlen` with gradients for q, k, v, bias and sinks, through out and through lse.

    Arguments, shapes, results and errors are those of `flashcore.attention_varlen`; seed, deterministic, out and lse,
    and all that is said of gradients, those of `flashcore.torch.attention`. vmap makes one call for each element.
    """
    tensors = (
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
    words = ("thd", causal, window, scale, softcap, dropout_p, seed, deterministic, kernel)
    return _attend(tensors, words, (_bound(max_seqlen_q), _bound(max_seqlen_k)), return_lse, out, lse)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Optional[Tensor] = None,
    *,
    k_new: Optional[Tensor] = None,
    v_new: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    rotary_interleaved: bool = False,
    causal: Causal = True,
    window: Window = None,
    scale: Optional[float] = None,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    out: Optional[Tensor] = None,
    lse: Optional[Tensor] = None,
    kernel: Optional[str] = None,
) -> _Result:
    """`flashcore.attention_decode` under torch.compile, torch.export, vmap and in CUDA graphs.

    Arguments, shapes, results and errors are those of `flashcore.attention_decode`. The caches are written in place
    where there are new keys; compilers know it. Under autocast q, k_new and v_new are cast to the dtype of the cache.

    Gradients, for q, k_cache, v_cache, bias and sinks, where the cache is only read: new keys, rotary embedding and
    block tables belong to inference, and raise RuntimeError where a gradient would be recorded.
    """
    causal = "bottom_right" if causal is True else causal
    if torch.is_grad_enabled():
        refuse_learnable(scale, softcap)
    if _autocast_dtype(q) is not None:
        q, k_new, v_new = (_cast(x, k_cache.dtype) for x in (q, k_new, v_new))
    tensors = (
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
    given = (*tensors, k_cache, v_cache, out, lse)
    words = (layout, causal, window, scale, softcap, 0.0, 0, False, kernel)
    road = choose_road(given)
    if road == OPERATORS:
        _require_tensors((*ops.DECODE_TENSORS, "k_cache", "v_cache", "out", "lse"), given)
    if road == AUTOGRAD or road == OPERATORS and torch.is_grad_enabled() and _any_grad(given):
        _refuse_inference_only(tensors)
        if causal == "top_left":
            raise ValueError("decode is causal bottom-right; top_left was given")
        as_forward = (q, k_cache, v_cache, *tensors[7:], None, None, cache_seqlens)
        return _attend(as_forward, (*words[:6], 0, None, kernel), _UNKNOWN, return_lse, out, lse)
    if road == LIBRARY:
        try:
            options, caches = convert(*words), (k_cache, v_cache)
            return ops.decode(tensors, caches, bool(rotary_interleaved), options, return_lse, out, lse)  # type: ignore[no-any-return]
        except LazyNegation:
            pass
    _refuse_out(out, lse)
    refuse_tangents(given)
    call = ops.attention_decode if k_new is None and v_new is None else ops.attention_append
    results = call(k_cache, v_cache, *tensors, bool(rotary_interleaved), *ops.words(*words))
    return tuple(results) if return_lse else results[0]


def merge_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    layout: str = "bhsd",
    out: Optional[Tensor] = None,
    lse: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """`flashcore.merge_states` with gradients for all four tensors.

    Arguments, shapes, results and errors are those of `flashcore.merge_states`; out and lse only where no gradient is
    recorded. Where neither state saw a key, the gradients are 0. They have gradients themselves.
    """
    given = (out_a, lse_a, out_b, lse_b, out, lse)
    road = choose_road(given)
    if road == OPERATORS:
        _require_tensors(("out_a", "lse_a", "out_b", "lse_b", "out", "lse"), given)
    if road == LIBRARY:
        try:
            return ops.merge(given[:4], layout, out, lse)
        except LazyNegation:
            pass
    _refuse_out(out, lse)
    refuse_tangents(given)
    return MergeStates.apply(*_distinct(given[:4]), layout)  # type: ignore[no-any-return]


# ---- the roads -------------------------------------------------------------------------------------------------------


def _attend(
    tensors: tuple[Optional[Tensor], ...],
    words: tuple[Any, ...],
    bounds: tuple[int, int],
    return_lse: bool,
    out: Optional[Tensor],
    lse: Optional[Tensor],
) -> _Result:
    """Attention of the tensors of ops.TENSORS."""
    layout, causal, window, scale, softcap, dropout_p, seed, deterministic, kernel = words
    if torch.is_grad_enabled():
        refuse_learnable(scale, softcap)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if (dtype := _autocast_dtype(tensors[0])) is not None:
        tensors = tuple(_cast(x, dtype) if i in _CAST else x for i, x in enumerate(tensors))
    road = choose_road((*tensors, out, lse))
    if road != OPERATORS:
        drawn = int(_draw_seed()) if seed is None and dropout_p > 0 else seed or 0
        words = (layout, causal, window, scale, softcap, dropout_p, drawn, deterministic, kernel)
        options = convert(*words)
        try:
            if road == AUTOGRAD:
                _refuse_out(out, lse)
                return _recorded(tensors, (options, words, bounds, return_lse))
            return ops.forward(tensors, options, bounds, return_lse, out, lse)  # type: ignore[no-any-return]
        except LazyNegation:
            seed = drawn
    _require_tensors(ops.TENSORS, tensors)
    _refuse_out(out, lse)
    refuse_tangents((*tensors, scale, softcap))
    drawn_seed = _draw_seed() if seed is None and dropout_p > 0 else None
    spoken = ops.words(layout, causal, window, scale, softcap, dropout_p, seed or 0, deterministic, kernel)
    results = Attention.apply(*_distinct(tensors), drawn_seed, *spoken, *bounds, return_lse)
    return results if return_lse else results[0]  # type: ignore[no-any-return]


def _recorded(tensors: Any, call: tuple[Any, ...]) -> _Result:
    if _any_grad([tensors[i] for i in _CONSTANT]):
        refuse_constants([x is not None and x.requires_grad for x in tensors])
    count = max(i for i, x in enumerate(tensors) if x is not None) + 1
    return record(call, *tensors[:count])  # type: ignore[no-any-return]


def _distinct(tensors: tuple[Optional[Tensor], ...]) -> tuple[Optional[Tensor], ...]:
    """torch.compile takes no tensor twice among the inputs of an autograd Function: views of it stand in."""
    if not is_compiling():
        return tensors
    distinct: list[Optional[Tensor]] = []
    for tensor in tensors:
        if tensor is not None and any(tensor is other for other in distinct):
            tensor = tensor.view_as(tensor)
        distinct.append(tensor)
    return tuple(distinct)


def _any_grad(tensors: Sequence[Optional[Tensor]]) -> bool:
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _draw_seed() -> Tensor:
    """An operation and not a number, so that a compiled graph draws anew in every run."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def _autocast_dtype(q: Optional[Tensor]) -> Optional[torch.dtype]:
    """What autocast wants on q's device; None where it is off."""
    device = "cuda" if getattr(q, "is_cuda", False) else "cpu"
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    """As autocast casts: tensors of floating numbers, but not of float64."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    return tensor if tensor.dtype is torch.float64 or tensor.dtype.itemsize == 1 else tensor.to(dtype)


def _unpacked(qkv: Tensor, v: Optional[Tensor], layout: str) -> tuple[Tensor, Tensor, Tensor]:
    _require_tensors(("q",), (qkv,))
    return _unpack(ops.FRAMEWORK, qkv, v, layout)


# ---- refusals --------------------------------------------------------------------------------------------------------


def _require_tensors(names: tuple[str, ...], given: tuple[Any, ...]) -> None:
    for name, tensor in zip(names, given, strict=True):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {qualified(type(tensor))} given; flashcore.torch takes torch tensors")
    if given[0] is None:
        raise TypeError(f"{names[0]}: None given; a tensor is needed")
    if given[0].is_complex():
        raise TypeError(f"{names[0]}: dtype {given[0].dtype} given; attention is of real numbers")


def _refuse_out(out: Optional[Tensor], lse: Optional[Tensor]) -> None:
    if out is not None or lse is not None:
        raise RuntimeError(
            "out= and lse= given where a gradient is recorded, or where the call is compiled or transformed; "
            "leave them out, or call under torch.no_grad()"
        )


def _refuse_inference_only(tensors: tuple[Optional[Tensor], ...]) -> None:
    """Of the tensors of ops.DECODE_TENSORS."""
    for name, tensor in zip(ops.DECODE_TENSORS[2:7], tensors[2:7], strict=True):
        if tensor is not None:
            raise RuntimeError(
                f"attention_decode with {name} has no gradient, but an input requires one; call it under "
                "torch.no_grad(), or train with flashcore.torch.attention"
            )
