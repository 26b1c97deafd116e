"""How a call is cut where its arrays are sharded: over the batch, over heads, and over what vmap added.

Everything else a call sees whole; the partitioner gathers it. Dropout's random numbers depend on the place in the batch
and among the heads, so such calls are not cut at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from typing import Any

import jax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

Call = Any  # calls.Call, which imports this module

#: The dimensions of each array in layout bhsd: b batch, h query heads, H key/value heads, others are not cut.
_ROWS = {
    "q": "bhid",
    "k": "bHjd",
    "v": "bHje",
    "out": "bhie",
    "k_cache": "bHjd",
    "v_cache": "bHje",
    "k_new": "bHnd",
    "v_new": "bHne",
}
_OTHERS = {
    "lse": "bhi",
    "mask": "bhij",
    "bias": "bhij",
    "alibi_slopes": "bh",
    "sinks": "h",
    "q_descale": "bH",
    "k_descale": "bH",
    "v_descale": "bH",
    "seqused_k": "b",
    "cache_seqlens": "b",
    "block_table": "bm",
    "cu_seqlens_q": "c",
    "cu_seqlens_k": "c",
    "rotary_cos": "pr",
    "rotary_sin": "pr",
}


def dimensions(call: Call, name: str, rank: int) -> str:
    """A letter for each dimension of an array of the call: digits are mapped ones."""
    base = name if name in _ROWS or name in _OTHERS else name.removeprefix("d")
    own = _ROWS.get(base) or _OTHERS[base]
    if base in _ROWS and call.layout == "bshd":
        own = own[0] + own[2] + own[1] + own[3]
    if call.layout == "thd":
        own = {"bhid": "ihd", "bHjd": "jHd", "bHje": "jHe", "bhie": "ihe", "bhi": "hi"}.get(own, own.replace("b", "c"))
    if "block_table" in call.operands and base in ("k_cache", "v_cache"):
        own = own.replace("b", "p")  # a pool of pages belongs to no sequence
    own = own[len(own) - (rank - call.mapped) :]  # leading ones may be missing
    return "".join(str(i) for i in range(call.mapped)) + own


def _is_cut(letter: str) -> bool:
    return letter in "bhH" or letter.isdigit()


def partitioned(call: Call, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which a partitioner cuts instead of gathering its operands."""
    if call.dropout_p > 0:
        return function
    whole = custom_partitioning(function)
    whole.def_partition(
        lambda mesh, arrays, results: _partition(call, function, mesh, arrays, results),
        infer_sharding_from_operands=lambda mesh, arrays, results: _results(
            call, mesh, _axes(call, mesh, arrays), results
        ),
        sharding_rule=lambda mesh, arrays, results: _rule(call, arrays, results),
    )
    return whole


def of_results(call: Call, shapes: dict[str, Any], results: list[tuple[int, ...]]) -> list[Any]:
    """The shardings that are part of the results' types: within a mesh with explicit axes, and in shard_map."""
    types = {name: jax.typeof(x) for name, x in shapes.items()}
    mesh = types["q"].sharding.mesh
    if mesh.empty:
        return [None] * len(results)
    axes = {} if call.dropout_p > 0 else _axes(call, mesh, types.values())
    return [_sharding(call, mesh, axes, name, shape) for name, shape in zip(call.results, results, strict=True)]


# ---- which mesh axes cut which dimension ----------------------------------------------------------------------------


def _axes(call: Call, mesh: Any, arrays: Any) -> dict[str, Any]:
    """letter -> the mesh axes that q's own sharding cuts it with, where they divide it; H for both kinds of heads."""
    shapes = dict(zip(call.operands, arrays, strict=True))
    q, keys = shapes["q"], "k_cache" if call.phase == "decode" else "k"
    sizes = dict(zip(dimensions(call, "q", len(q.shape)), q.shape, strict=True))
    heads_k = shapes[keys].shape[dimensions(call, keys, len(shapes[keys].shape)).index("H")]
    spec = getattr(q.sharding, "spec", None) or ()
    axes = {}
    for letter, entry in zip(sizes, spec, strict=False):
        if entry is None or not _is_cut(letter) or (letter == "b" and _appends_to_pages(call)):
            continue
        taken = entry if isinstance(entry, tuple) else (entry,)
        ways = math.prod(mesh.shape[axis] for axis in taken)
        if (heads_k if letter == "h" and heads_k > 1 else sizes[letter]) % ways == 0:
            axes["H" if letter == "h" else letter] = entry
    return axes


def _appends_to_pages(call: Call) -> bool:
    """All sequences write to one pool, so one device has to see them all."""
    return "block_table" in call.operands and "k_cache" in call.results


def _sharding(call: Call, mesh: Any, axes: dict[str, Any], name: str, shape: tuple[int, ...]) -> NamedSharding:
    entries = []
    for letter, size in zip(dimensions(call, name, len(shape)), shape, strict=True):
        entries.append(None if size == 1 else axes.get("H" if letter == "h" else letter))
    return NamedSharding(mesh, PartitionSpec(*entries))


def _results(call: Call, mesh: Any, axes: dict[str, Any], results: Any) -> tuple[NamedSharding, ...]:
    return tuple(_sharding(call, mesh, axes, name, x.shape) for name, x in zip(call.results, results, strict=True))


def _partition(call: Call, function: Callable[..., Any], mesh: Any, arrays: Any, results: Any) -> Any:
    axes = _axes(call, mesh, arrays)
    operands = tuple(_sharding(call, mesh, axes, name, x.shape) for name, x in zip(call.operands, arrays, strict=True))
    parts = _results(call, mesh, axes, results)
    sums = [_axes_summed_over(axes, part) if call.phase == "backward" else () for part in parts]

    def local(*arrays: Any) -> Any:
        with _one_device_of(jax.sharding.get_abstract_mesh()):
            return tuple(jax.lax.psum(x, over) if over else x for x, over in zip(function(*arrays), sums, strict=True))

    return mesh, local, parts, operands


def _one_device_of(mesh: Any) -> Any:
    """What surrounds one device's part of a program: an explicit mesh would mark even the addition of two numbers with
    a sharding, which XLA refuses."""
    if mesh.empty:
        return nullcontext()
    manual = mesh.update(axis_types=(jax.sharding.AxisType.Manual,) * len(mesh.axis_names))
    return jax.sharding.use_abstract_mesh(manual)


def _axes_summed_over(axes: dict[str, Any], part: NamedSharding) -> tuple[Any, ...]:
    """The mesh axes that cut the call but not this result, of which each device therefore has a part of the sum."""

    def flat(entries: Any) -> list[Any]:
        return [axis for entry in entries if entry for axis in (entry if isinstance(entry, tuple) else (entry,))]

    return tuple(axis for axis in flat(axes.values()) if axis not in flat(part.spec))


# ---- the same for Shardy --------------------------------------------------------------------------------------------


def _rule(call: Call, arrays: Any, results: Any) -> SdyShardingRule:
    """Dimensions that are cut together share a factor; query heads are (key/value heads, group)."""
    sizes = {}
    for name, x in zip(call.operands, arrays, strict=True):
        sizes.update(
            {letter: n for letter, n in zip(dimensions(call, name, len(x.shape)), x.shape, strict=True) if n != 1}
        )
    group = sizes.get("h", 1) // sizes.get("H", 1)
    own = (f"own{i}" for i in count())

    def factor(letter: str, size: int) -> Any:
        if size == 1 or not _is_cut(letter):
            return next(own)
        if letter == "h" and group > 1:
            return CompoundFactor("heads", "group") if "H" in sizes else "group"
        return "heads" if letter in "hH" else "batch" if letter == "b" else f"mapped{letter}"

    def mapping(name: str, x: Any) -> ArrayMapping:
        return ArrayMapping(*map(factor, dimensions(call, name, len(x.shape)), x.shape))

    return SdyShardingRule(
        tuple(map(mapping, call.operands, arrays)),
        tuple(map(mapping, call.results, results)),
        **({"group": group} if group > 1 and "H" in sizes else {}),
    )
