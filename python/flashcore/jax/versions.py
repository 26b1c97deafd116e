"""What differs from one JAX release to the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

#: Before this, one function differentiated with respect to different arguments had to save the same things each time.
MAY_SAVE_WHAT_IS_WANTED = jax.__version_info__ >= (0, 9, 2)


def varying_axes(x: Any) -> frozenset[Any]:
    """The mesh axes along which an array differs from device to device; none outside of shard_map.

    Until 0.9 a type has them as `vma`, from 0.10 on in its `manual_axis_type`.
    """
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    axes = getattr(kind, "vma", ()) if manual is None else manual.varying
    return frozenset(axes)


def shape_struct(shape: tuple[int, ...], dtype: Any, sharding: Any, varying: frozenset[Any]) -> Any:
    """What a result looks like; `sharding` is None where no mesh is set."""
    if not varying:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    if hasattr(jax.sharding, "ManualAxisType"):
        kind = jax.sharding.ManualAxisType(varying=varying)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=kind)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, vma=varying)  # type: ignore[call-arg]


def vary(x: Any, axes: Iterable[Any]) -> Any:
    """The same values, marked as varying along more axes. Its gradient is the sum over them."""
    missing = tuple(set(axes) - varying_axes(x))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    return jax.lax.pvary(x, missing)  # type: ignore[attr-defined]  # until 0.8
