"""The small building blocks: element-wise addition and reductions."""

from __future__ import annotations

import operator
from typing import Any, Literal, Optional

from . import _core
from .interop import classify, known, stream_handle
from .options import word

_OPERATIONS = {"sum": 0, "max": 1, "min": 2, "mean": 3}


def vector_add(a: Any, b: Any, *, out: Any = None, stream: Any = None) -> Any:
    """a + b, element by element, rounded once to the dtype. NaN + x and ∞ - ∞ are NaN.

    Args:
      a, b: one shape (any rank up to 8, any strides), one dtype of float16, bfloat16, float32, float64, one device.
      out: an array to write to; may be `a` or `b` itself.

    Raises: ValueError, TypeError, CudaError.
    """
    framework = known.get(type(a)) or classify(a, "a")
    handle = None if stream is None else stream_handle(stream)
    if out is None:
        out = framework.like(a, handle)
    _core.vector_add(framework.bridge, a, b, out, handle)
    return out if framework.finish is None else framework.finish(out)


def reduce(
    x: Any,
    op: Literal["sum", "max", "min", "mean"] = "sum",
    axis: Optional[int] = None,
    *,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """`op` over one axis of x, or over all of x where `axis` is None. Accumulates in float32 (float64 for float64).

    Args:
      x: any rank up to 8, any strides; float16, bfloat16, float32 or float64.
      axis: may be negative, counted from the end.
      out: an array to write to, of x's dtype and of x's shape without `axis` (rank 0 for None).

    Returns: an array; of rank 0 where axis is None. A NaN in x makes its result NaN, whatever `op` is; nothing to
    reduce gives 0 for "sum" and NaN for "mean".

    Raises: ValueError (also for "max" and "min" of nothing), TypeError, CudaError.
    """
    framework = known.get(type(x)) or classify(x, "x")
    number = word("op", op, _OPERATIONS)
    handle = None if stream is None else stream_handle(stream)
    if axis is not None:
        axis = operator.index(axis)
    left = _without(framework.shape(x), axis)
    if out is None:
        out = framework.empty(left, framework.dtype(x), x, handle)
    _core.reduce(framework.bridge, x, out, number, axis, handle)
    return out if framework.finish is None else framework.finish(out)


def _without(shape: tuple[int, ...], axis: Optional[int]) -> tuple[int, ...]:
    if axis is None:
        return ()
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis={axis} given for an array of rank {len(shape)}")
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]
