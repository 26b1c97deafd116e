"""The operators under torch.func.vmap: the mapped axis is folded into the batch, so that one call does it all.

Where that changes the meaning (sinks that are mapped or want a gradient, dropout, packed sequences, a cache that is
written) every element has a call of its own.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from . import ops
from .ops import TENSORS

_PLANES = ("mask", "bias")  # broadcastable to (batch, heads, queries, keys)
_PER_HEAD = ("alibi_slopes", "q_descale", "k_descale", "v_descale")  # (heads) or (batch, heads)
_COUNT = len(TENSORS)


def _lead(tensor: Tensor, axis: Optional[int], size: int) -> Tensor:
    """The tensor with the mapped axis in front, repeated where it is not mapped."""
    return tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)


def _fold(tensor: Any, axis: Optional[int], size: int) -> Any:
    """(batch, …) of every element, one after the other."""
    return None if tensor is None else _lead(tensor, axis, size).flatten(0, 1)


def _fold_plane(tensor: Any, axis: Optional[int], size: int, batch: int, repeat: bool) -> Any:
    """A mask or bias; one that serves the whole batch of every element stays as it is, unless `repeat`."""
    rank = tensor.dim() - (axis is not None)
    if axis is None and not repeat and (rank < 4 or tensor.shape[0] == 1):
        return tensor
    leading = _lead(tensor, axis, size)
    full = leading.reshape(size, *(1,) * (4 - rank), *leading.shape[1:])
    return full.expand(size, batch, *full.shape[2:]).flatten(0, 1)


def _fold_per_head(tensor: Any, axis: Optional[int], size: int, batch: int) -> Any:
    rank = tensor.dim() - (axis is not None)
    if axis is None and rank == 1:
        return tensor
    leading = _lead(tensor, axis, size)
    full = leading if rank == 2 else leading.unsqueeze(1)
    return full.expand(size, batch, full.shape[-1]).flatten(0, 1)


def _fold_all(
    arguments: tuple[Any, ...], axes: tuple[Any, ...], size: int, batch: int, repeat: tuple[str, ...]
) -> tuple[Any, ...]:
    """The tensors of TENSORS."""
    folded: list[Any] = []
    for name, tensor, axis in zip(TENSORS, arguments, axes, strict=True):
        if tensor is None or name == "sinks":
            folded.append(tensor)
        elif name in _PLANES:
            folded.append(_fold_plane(tensor, axis, size, batch, name in repeat))
        elif name in _PER_HEAD:
            folded.append(_fold_per_head(tensor, axis, size, batch))
        else:
            folded.append(_fold(tensor, axis, size))
    return tuple(folded)


def _foldable(arguments: tuple[Any, ...], axes: tuple[Any, ...]) -> bool:
    words = ops.split(arguments)[2]
    return words.layout != "thd" and words.dropout_p == 0 and axes[TENSORS.index("sinks")] is None


def _batch(q: Tensor, axis: Optional[int]) -> int:
    return q.shape[0 if axis is None else int(axis == 0)]


def _one_by_one(operator: Any, size: int, axes: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    """A call for each element. The elements are views, so that a cache is written where it lies."""
    if size == 0:
        raise ValueError("vmap over no elements given to a call that is made element by element")
    results = [
        operator(*(x.select(axis, i) if isinstance(axis, int) else x for x, axis in zip(arguments, axes, strict=True)))
        for i in range(size)
    ]
    return tuple(torch.stack(each) for each in zip(*results, strict=True))


def _unfold(tensor: Tensor, size: int, batch: int) -> Tensor:
    return tensor.unflatten(0, (size, batch))


def _forward(info: Any, axes: tuple[Any, ...], *arguments: Any) -> Any:
    size = info.batch_size
    if not _foldable(arguments, axes):
        return _one_by_one(ops.attention_forward, size, axes, arguments), (0, 0)
    batch = _batch(arguments[0], axes[0])
    tensors = _fold_all(arguments[:_COUNT], axes[:_COUNT], size, batch, ())
    out, lse = ops.attention_forward(*tensors, *arguments[_COUNT:])
    return (_unfold(out, size, batch), _unfold(lse, size, batch)), (0, 0)


def _backward(info: Any, axes: tuple[Any, ...], *arguments: Any) -> Any:
    size = info.batch_size
    before, inner, wanted = arguments[:4], arguments[4 : 5 + _COUNT], arguments[5 + _COUNT]
    inner_axes = axes[4 : 5 + _COUNT]
    rest = arguments[6 + _COUNT :]
    _, _, _, wants_bias, wants_sinks = wanted
    if wants_sinks or not _foldable((*inner, *rest), inner_axes):
        return _one_by_one(ops.attention_backward, size, axes, arguments), (0,) * 5
    q, bias = inner[0], inner[TENSORS.index("bias")]
    batch = _batch(q, inner_axes[0])
    tensors = _fold_all(inner[:_COUNT], inner_axes[:_COUNT], size, batch, ("bias",) if wants_bias else ())
    above = [_fold(x, axis, size) for x, axis in zip(before, axes[:4], strict=True)]
    grads = list(ops.attention_backward(*above, *tensors, inner[_COUNT], wanted, *rest))
    for i in range(3):
        if wanted[i]:
            grads[i] = _unfold(grads[i], size, batch)
    if wants_bias:
        grads[3] = _bias_gradient(grads[3], bias, inner_axes[TENSORS.index("bias")], size, batch)
    return tuple(grads), tuple(0 if want else None for want in wanted)


def _bias_gradient(gradient: Tensor, bias: Tensor, axis: Optional[int], size: int, batch: int) -> Tensor:
    """dbias of each element, from that of the bias repeated for every element and batch."""
    shape = list(bias.shape)
    if axis is not None:
        del shape[axis]
    full = gradient.reshape(size, batch, *gradient.shape[1:])
    if len(shape) < 4 or shape[0] == 1:
        full = full.sum(1, dtype=torch.promote_types(full.dtype, torch.float32)).to(full.dtype)
    return full.reshape(size, *shape)


def _decode(operator: Any, info: Any, axes: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    if operator is ops.attention_append and (axes[0] is None or axes[1] is None):
        raise ValueError("vmap of attention_decode with k_new and v_new: k_cache and v_cache have to be mapped, too")
    return _one_by_one(operator, info.batch_size, axes, arguments), (0, 0)


def _merge(info: Any, axes: tuple[Any, ...], *arguments: Any) -> Any:
    size, states, layout = info.batch_size, arguments[:4], arguments[4]
    if layout == "thd":
        return _one_by_one(ops.merge_states, size, axes, arguments), (0, 0)
    batch = _batch(states[0], axes[0])
    out, lse = ops.merge_states(*(_fold(x, axis, size) for x, axis in zip(states, axes[:4], strict=True)), layout)
    return (_unfold(out, size, batch), _unfold(lse, size, batch)), (0, 0)


def _register(name: str, rule: Any) -> None:
    torch.library.register_vmap(f"flashcore::{name}", rule, lib=ops.library)


_register("attention_forward", _forward)
_register("attention_backward", _backward)
_register("attention_decode", lambda info, axes, *x: _decode(ops.attention_decode, info, axes, x))
_register("attention_append", lambda info, axes, *x: _decode(ops.attention_append, info, axes, x))
_register("merge_states", _merge)
