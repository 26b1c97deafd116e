"""The gradients: autograd Functions above the operators, and above the library itself where nothing else looks on.

`Attention` is what compilers, torch.func and subclasses see. `EagerAttention` is the same mathematics for plain tensors
in plain Python: without operators in between, a call costs a quarter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from inspect import Parameter, Signature
from typing import Any, NoReturn, Optional

import torch
from torch import Tensor
from torch._functorch import autograd_function

from ..interop import LazyNegation
from ..options import convert
from . import ops
from .ops import DIFFERENTIABLE, OPERATORS, TENSORS, choose_road, is_compiling, refuse_learnable

_COUNT = len(TENSORS)


def _wanted(needs: tuple[bool, ...]) -> tuple[bool, ...]:
    return tuple([needs[i] for i in DIFFERENTIABLE])


def _placed(grads: tuple[Any, ...], wanted: tuple[bool, ...], count: int) -> tuple[Any, ...]:
    """The gradients at their places among `count` arguments."""
    placed: list[Any] = [None] * count
    for i, gradient, want in zip(DIFFERENTIABLE, grads, wanted, strict=True):
        placed[i] = gradient if want else None
    return tuple(placed)


def refuse_constants(needs: Sequence[bool]) -> None:
    """An error, and not a silent zero, where one of TENSORS requires a gradient that there is none of."""
    for i, name in enumerate(TENSORS):
        if needs[i] and i not in DIFFERENTIABLE:
            raise RuntimeError(f"{name} requires a gradient, but attention has none for it; pass {name}.detach()")


def _without_func(function: Any) -> Any:
    """`function.apply` without its care for torch.func, which does not look on here."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class _Final(torch.autograd.Function):
    """Base of Functions that compute gradients: differentiating them is an error and not a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *above: Any) -> NoReturn:
        raise RuntimeError("flashcore.torch.attention can be differentiated once; its gradients have no gradient")


class _Gradients(_Final):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return ops.attention_backward(*arguments)


def _gradients(*arguments: Any) -> Any:
    """ops.attention_backward, whose results have no gradient; in a compiled graph the operator itself sees to that."""
    if is_compiling():
        with torch.enable_grad():
            return ops.attention_backward(*arguments)
    return (_Gradients.apply if torch.is_grad_enabled() else ops.attention_backward)(*arguments)


class Attention(torch.autograd.Function):
    """The arguments of ops.attention_forward, then whether lse has a gradient -> (out, lse)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return ops.attention_forward(*arguments[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[: _COUNT + 1], *output)
        ctx.words = inputs[_COUNT + 1 : -1]
        ctx.lse_used = inputs[-1]
        ctx.set_materialize_grads(False)
        if not ctx.lse_used:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        wanted = _wanted(ctx.needs_input_grad)
        refuse_constants(ctx.needs_input_grad)
        grads = _gradients(dout, dlse if ctx.lse_used else None, out, lse, *inputs, wanted, *ctx.words)
        return _placed(grads, wanted, len(ctx.needs_input_grad))


# torch.compile counts the parameters of `forward` to know whether it takes a context.
_names = [*(argument.name for argument in ops.attention_forward._schema.arguments), "lse_used"]
Attention.forward.__signature__ = Signature(  # type: ignore[attr-defined]
    [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in _names]
)


class EagerAttention(torch.autograd.Function):
    """(call, tensors…) -> out or, where lse has a gradient, (out, lse).

    call is (options, the words they were made of, bounds, whether lse has a gradient); tensors are those of TENSORS,
    but those at the end that are all None: autograd takes time for each.
    """

    @staticmethod
    def forward(ctx: Any, call: Any, *tensors: Any) -> Any:
        options, _, bounds, lse_used = call
        results = ops.forward(tensors, options, bounds, True)
        ctx.save_for_backward(*tensors, *results)
        ctx.call = call
        if not lse_used:
            return results[0]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        count = len(needs)
        if dout is None and dlse is None:
            return (None,) * count
        needs = needs[1:] + (False,) * (_COUNT + 1 - count)
        arguments = ctx.call, _wanted(needs), dout, dlse, *ctx.saved_tensors
        dq, dk, dv, dbias, dsinks = _differentiate(*arguments)
        placed = (None, dq, dk, dv, None, dbias, None, dsinks)
        return placed[:count] if count <= len(placed) else placed + (None,) * (count - len(placed))


class EagerPlainAttention(EagerAttention):
    """The same of q, k and v alone, the quickest to record: (words, q, k, v) -> out.

    words is (layout, causal, scale); it becomes options where gradients are asked for.
    """

    @staticmethod
    def forward(ctx: Any, words: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:  # type: ignore[override]
        layout, causal, scale = words
        if isinstance(scale, Tensor):
            refuse_learnable(scale)
        out, lse = ops.attend(q, k, v, causal=causal, scale=scale, layout=layout, return_lse=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.words = layout, causal, scale, torch.are_deterministic_algorithms_enabled()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> tuple[Any, ...]:  # type: ignore[override]
        layout, causal, scale, deterministic = ctx.words
        words = layout, causal, None, scale, 0.0, 0.0, 0, deterministic, None
        ctx.call = convert(*words), words, (-1, -1), False
        return EagerAttention.backward(ctx, dout)


record, record_plain = _without_func(EagerAttention), _without_func(EagerPlainAttention)


def _differentiate(call: Any, wanted: Any, dout: Any, dlse: Any, *saved: Any) -> Any:
    """(dq, dk, dv, dbias, dsinks), by the operators where somebody looks on now, as vmap of the cotangents does."""
    by_operator: Any = _gradients
    if choose_road((saved[0], dout, dlse)) != OPERATORS:
        try:
            differentiate = _EagerGradients.apply if torch.is_grad_enabled() else _eager_gradients
            return differentiate(call, wanted, dout, dlse, *saved)
        except TypeError:  # a cotangent with lazy negation, or of torch's older vmap (is_grads_batched)
            by_operator = ops.attention_backward  # that vmap knows no autograd Function
    _, words, bounds, _ = call
    *tensors, out, lse = saved
    tensors += [None] * (_COUNT - len(tensors))
    grads = by_operator(dout, dlse, out, lse, *tensors, None, wanted, *ops.words(*words), *bounds)
    return [gradient if want else None for gradient, want in zip(grads, wanted, strict=True)]


def _eager_gradients(call: Any, wanted: Any, dout: Any, dlse: Any, *saved: Any) -> tuple[Any, ...]:
    options, _, bounds, _ = call
    return ops.backward((dout, dlse), saved[-2:], saved[:-2], wanted, options, bounds)


class _EagerGradients(_Final):
    setup_context = torch.autograd.Function.setup_context  # none: forward is given the context

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _eager_gradients(*arguments)


class MergeStates(torch.autograd.Function):
    """With w_x = exp(lse_x - lse): out = w_a out_a + w_b out_b, lse = log(exp lse_a + exp lse_b).

    Its gradients are made of torch's own operations, and of out and lse: they can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, layout: str) -> Any:
        return ops.merge_states(out_a, lse_a, out_b, lse_b, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *states, ctx.layout = inputs
        ctx.save_for_backward(*states, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * 5
        return (*_merge_gradients(dout, dlse, *ctx.saved_tensors, ctx.layout), None)


def _merge_gradients(
    dout: Optional[Tensor],
    dlse: Optional[Tensor],
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: str,
) -> tuple[Tensor, ...]:
    grads: list[Tensor] = []
    above = torch.zeros_like(lse) if dlse is None else dlse
    dout = torch.zeros_like(out) if dout is None else dout
    for out_x, lse_x in ((out_a, lse_a), (out_b, lse_b)):
        # -inf of both, where no key was seen: set before exp, whose own gradient would be NaN
        weight = torch.exp(torch.where(lse_x == -torch.inf, -torch.inf, lse_x - lse))
        along = (dout.to(lse.dtype) * (out_x.to(lse.dtype) - out.to(lse.dtype))).sum(-1)
        grads.append((_as_rows(weight, layout).unsqueeze(-1) * dout.to(lse.dtype)).to(out_x.dtype))
        grads.append(weight * (above + _as_rows(along, layout)))
    return tuple(grads)


def _as_rows(numbers: Tensor, layout: str) -> Tensor:
    """A number per query row, between lse's order of dimensions and out's; its own inverse."""
    return numbers if layout == "bhsd" else numbers.transpose(-1, -2)


# ---- the operators where autograd looks on: those of exported programs, and of graphs that run uncompiled ------------


class _Once(_Final):
    setup_context = torch.autograd.Function.setup_context  # none: forward is given the context

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return ops.attention_backward(*arguments)


_allowing_one_level = getattr(autograd_function, "enable_single_level_autograd_function", nullcontext)


def _of_one_level(function: Any, operator: Any) -> Any:
    """The Function on one level of torch.func, for the operator: levels below record, too, what it calls."""
    count = len(operator._schema.arguments)

    def forward(*arguments: Any) -> Any:
        with torch.enable_grad():
            return ops.below_autograd(operator, arguments[skipped : skipped + count])

    skipped = int(function.setup_context is torch.autograd.Function.setup_context)  # none: forward is given the context
    return type(function.__name__, (function,), {"forward": staticmethod(forward)})


def _with_gradient(name: str, function: Any, *more: Any) -> Any:
    """The operator, recorded as `function` of its arguments and `more` where a gradient is recorded."""
    operator, implementation = getattr(ops, name), ops.IMPLEMENTATIONS[name]
    record, record_level = _without_func(function), _without_func(_of_one_level(function, operator))

    def call(*arguments: Any) -> Any:
        if ops.road_of(tuple([x for x in arguments if isinstance(x, Tensor)])) == ops.LIBRARY:
            try:
                return implementation(*arguments)  # as torch would find by asking again, which takes longer
            except LazyNegation:
                pass  # but that torch resolves
        ops.refuse_tangents(arguments)
        if not ops.records(arguments):
            return ops.below_autograd(operator, arguments)
        if not torch._C._are_functorch_transforms_active():
            return record(*arguments, *more)
        with _allowing_one_level():
            return record_level(*arguments, *more)

    return call


for _operator, _function in (
    ("attention_forward", (Attention, True)),
    ("attention_backward", (_Once,)),
    ("merge_states", (MergeStates,)),
):
    ops.library.impl(_operator, _with_gradient(_operator, *_function), "Autograd")
