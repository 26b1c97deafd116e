"""Random calls with valid and invalid arguments, and what must hold for each of them. A seed is a call.

    python tests/random_calls.py 4711          # makes that call and checks it
    python tests/random_calls.py 4000 500      # 500 of them, from 4000 on

Either a documented exception with a message, and then no byte of any array given has changed; or a result, and then
only the elements of the outputs have, all of them, and they are right. Arrays lie in guarded memory.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flashcore as fc
import ml_dtypes
import numpy as np
import reference
from cases import UNIT, allowed_error
from frameworks import DTYPES
from random_spoils import spoil

GUARD = 64
FLOATS = ("float32", "float16", "bfloat16", "float64")
#: a NaN that no arithmetic makes: what the elements of an output hold before the call
UNWRITTEN = {1: np.uint8(0x7F), 2: np.uint16(0x7FA5), 4: np.uint32(0x7FA5A5A5), 8: np.uint64(0x7FF5A5A5A5A5A5A5)}
RESULTS = ("out", "lse", "dq", "dk", "dv")
DOCUMENTED = (ValueError, TypeError, fc.Unsupported, MemoryError)


# ---- memory ----------------------------------------------------------------------------------------------------------


def guarded(values: np.ndarray, rng) -> np.ndarray:
    """The values in the middle of random bytes, with gaps between rows and the dimensions in any order."""
    if values.size == 0:
        return values
    size, rank = values.dtype.itemsize, values.ndim
    strides, step = [0] * rank, size
    outer = rng.permutation(rank - 1).tolist() if rank > 1 and rng.random() < 0.4 else list(range(rank - 1))
    for axis in [rank - 1, *reversed(outer)] if rank else []:
        strides[axis] = step
        step *= max(1, values.shape[axis])
        if rng.random() < 0.2:
            step += size * int(rng.integers(1, 9))
    raw = rng.integers(0, 256, 4 * GUARD + step, np.uint8)
    start = GUARD + -raw.ctypes.data % GUARD + (0 if rng.random() < 0.5 else size * int(rng.integers(0, 5)))
    view = np.ndarray(values.shape, values.dtype, raw, start, strides)
    view[...] = values
    return view


def unwritten(shape: tuple, dtype: np.dtype, rng) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    return guarded(np.full(shape, UNWRITTEN[size]).view(dtype).reshape(shape), rng)


def root_of(array: np.ndarray) -> Any:
    """The array that owns an array's memory."""
    while isinstance(getattr(array, "base", None), np.ndarray) or hasattr(getattr(array, "base", None), "base"):
        array = array.base
    return array


def bytes_of(root: np.ndarray) -> np.ndarray:
    return np.asarray(root).ravel("K").view(np.uint8)


def element_bytes(view: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Which bytes of the root are elements of the view."""
    mask = np.zeros(bytes_of(root).size, bool)
    if view.size:
        start = view.ctypes.data - bytes_of(root).ctypes.data
        shape, strides = (*view.shape, view.dtype.itemsize), (*view.strides, 1)
        np.ndarray(shape, bool, mask, start, strides)[...] = True
    return mask


class Memory:
    """All memory that a call was given, as it was before."""

    def __init__(self, arguments: dict[str, Any]):
        roots = {id(r): r for r in (root_of(x) for x in arguments.values() if isinstance(x, np.ndarray))}
        self.before = [(r, bytes_of(r).copy()) for r in roots.values() if r.dtype != object]

    def restore(self):
        for root, before in self.before:
            if root.flags.writeable:
                bytes_of(root)[...] = before

    def assert_same(self, written: list[np.ndarray], what: str):
        """Nothing changed but elements of the arrays `written`."""
        for root, before in self.before:
            changed = bytes_of(root) != before
            for view in written:
                if root_of(view) is root:
                    changed &= ~element_bytes(view, root)
            assert not changed.any(), f"{what}: {changed.sum()} bytes changed that are not elements of an output"


# ---- calls -----------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call by keywords; `results` are the names of the arrays to write, in the order in which they are returned."""

    function: Callable
    arguments: dict[str, Any]
    results: tuple[str, ...]
    oracle: Callable[[], dict[str, Any]] | None = None  # name -> (exact, step by step, dtype, terms)
    exact_repeat: bool = True
    caches: tuple[str, ...] = ()
    spoiled: list[str] = field(default_factory=list)

    def __str__(self):
        def show(x):
            return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else repr(x)

        words = ", ".join(f"{name}={show(x)}" for name, x in self.arguments.items() if x is not None)
        return f"{self.function.__name__}({words}); spoiled: {', '.join(self.spoiled) or 'nothing'}"

    def named(self, result: Any) -> dict[str, np.ndarray]:
        result = result if isinstance(result, tuple) else (result,)
        assert len(result) <= len(self.results), f"{len(result)} results"
        return dict(zip(self.results, result, strict=False))


def normal(rng, *shape: int, dtype: str = "float32") -> np.ndarray:
    values = rng.standard_normal(shape)
    if values.size and rng.random() < 0.1:
        values.flat[rng.integers(0, values.size, 2)] = rng.choice([np.nan, np.inf, -np.inf, 1e4, -0.0], 2)
    with np.errstate(over="ignore"):
        return guarded(values.astype(DTYPES[dtype]), rng)


def some(rng, chance: float) -> bool:
    return bool(rng.random() < chance)


def length(rng) -> int:
    most = int(rng.choice([1, 2, 24, 24, 24, 90]))
    return int(rng.integers(most))


@dataclass
class Sizes:
    batch: int
    heads_k: int
    heads: int
    queries: int
    keys: int
    dim: int
    dim_v: int
    dtype: str

    @staticmethod
    def draw(rng) -> Sizes:
        dims = [1, 2, 5, 8, 16, 24, 33, 64, 64, 100, 128, 256]
        heads_k, dim = int(rng.integers(1, 4)), int(rng.choice(dims))
        dim_v = int(rng.choice(dims)) if some(rng, 0.3) else dim
        dtype = str(rng.choice(FLOATS)) if some(rng, 0.96) else "float8_e4m3"
        batch = int(rng.choice([1, 1, 2, 2, 3])) if some(rng, 0.95) else 0
        return Sizes(batch, heads_k, heads_k * int(rng.integers(1, 4)), length(rng), length(rng), dim, dim_v, dtype)

    @property
    def lse_dtype(self) -> np.dtype:
        return np.dtype("float64" if self.dtype == "float64" else "float32")

    @property
    def out_dtype(self) -> np.dtype:
        return np.dtype(DTYPES["bfloat16" if self.dtype == "float8_e4m3" else self.dtype])


def words_of(rng, s: Sizes, queries: int, keys: int, planes: bool) -> dict[str, Any]:
    """Options that a forward call takes; `planes` where a mask and a bias may be given."""
    words: dict[str, Any] = {}
    full = (s.batch, s.heads, queries, keys)
    shape = tuple(1 if some(rng, 0.3) else n for n in full)[int(rng.integers(0, 3)) :]
    if some(rng, 0.4):
        words["causal"] = rng.choice(["top_left", "bottom_right"]).item()
    if some(rng, 0.3):
        words["window"] = tuple(rng.choice([None, -1, 0, 1, 7, 2**40]) for _ in range(2))
    if some(rng, 0.2):
        words["scale"] = float(rng.choice([0.5, 0.0, -0.25]))
    if some(rng, 0.2):
        words["softcap"] = 2.5
    if planes and some(rng, 0.25):
        words["mask"] = guarded(rng.random(shape) < 0.7, rng)
    if planes and some(rng, 0.25):
        words["bias"] = normal(rng, *shape, dtype="float32" if s.dtype == "float8_e4m3" else s.dtype)
    if some(rng, 0.15):
        slopes = 2.0 ** -rng.integers(1, 8, ([s.batch] if some(rng, 0.5) else []) + [s.heads])
        words["alibi_slopes"] = guarded(slopes.astype(np.float32), rng)
    if some(rng, 0.15):
        words["sinks"] = normal(rng, s.heads)
    if s.dtype == "float8_e4m3" and some(rng, 0.5):
        words |= {f"{name}_descale": guarded(np.full((s.batch, s.heads_k), 0.5, np.float32), rng) for name in "qkv"}
    if some(rng, 0.15):
        words["kernel"] = str(rng.choice(["reference", "cpu.flash", "cpu.decode"]))
    return words


def outputs(rng, s: Sizes, out_shape: tuple, lse_shape: tuple) -> dict[str, Any]:
    words: dict[str, Any] = {}
    if some(rng, 0.5):
        words["out"] = unwritten(out_shape, s.out_dtype, rng)
    if some(rng, 0.4):
        words["lse"] = unwritten(lse_shape, s.lse_dtype, rng)
    if some(rng, 0.4):
        words["return_lse"] = True
    return words


def bhsd(x: np.ndarray, layout: str) -> np.ndarray:
    return np.asarray(x.swapaxes(1, 2) if layout == "bshd" else x).astype(np.float64)


def options_of(a: dict[str, Any], **changes) -> reference.Options:
    names = ("causal", "window", "scale", "softcap", "mask", "bias", "alibi_slopes", "sinks", "dropout_p", "seed")
    given = {n: a[n] for n in (*names, "seqused_k") if a.get(n) is not None}
    tensors = {n: x.astype(np.float64) for n, x in given.items() if n in ("bias", "alibi_slopes", "sinks")}
    return reference.Options(**{**given, **tensors, **changes})


def twice(compute: Callable, s: Sizes, names: tuple[str, ...], terms: int) -> dict[str, Any]:
    """The oracle's answers, exact and step by step."""
    exact, stepwise = compute(reference.EXACT), compute(reference.framework_arithmetic(s.dtype))
    dtypes = [s.lse_dtype.name if name == "lse" else s.dtype for name in names]
    answers = {n: [e, w, d, terms] for n, e, w, d in zip(names, exact, stepwise, dtypes, strict=True)}
    if s.dtype == "float64":  # in which the oracle's weights, too, have the roundings of scores of this size
        scores = np.abs(exact[1][np.isfinite(exact[1])]).max(initial=1)
        answers["out"].append(scores * np.abs(exact[0]).max(initial=0))
    return answers


def draw_attention(rng) -> Call:
    s, layout = Sizes.draw(rng), str(rng.choice(["bhsd", "bhsd", "bshd"]))

    def shape(heads, rows, dim):
        return (s.batch, heads, rows, dim) if layout == "bhsd" else (s.batch, rows, heads, dim)

    a = {
        "q": normal(rng, *shape(s.heads, s.queries, s.dim), dtype=s.dtype),
        "k": normal(rng, *shape(s.heads_k, s.keys, s.dim), dtype=s.dtype),
        "v": normal(rng, *shape(s.heads_k, s.keys, s.dim_v), dtype=s.dtype),
        "layout": layout,
        **words_of(rng, s, s.queries, s.keys, planes=True),
        **outputs(rng, s, shape(s.heads, s.queries, s.dim_v), (s.batch, s.heads, s.queries)),
    }
    if some(rng, 0.2):
        a["seqused_k"] = guarded(rng.integers(0, s.keys + 1, s.batch).astype(np.int32), rng)
    if some(rng, 0.2):
        a |= {"dropout_p": 0.25, "seed": int(rng.integers(0, 2**63))}

    def oracle():
        q, k, v = (bhsd(a[n], layout) for n in "qkv")

        def compute(arithmetic):
            out, lse = reference.attention(q, k, v, options_of(a), arithmetic)
            return bhsd(out, layout), lse

        return twice(compute, s, ("out", "lse"), s.keys + s.dim)

    return Call(fc.attention, a, ("out", "lse"), oracle)


def draw_packed(rng) -> Call:
    s, layout = Sizes.draw(rng), str(rng.choice(["bhsd", "bshd"]))
    shape = (s.batch, 3, s.heads, s.queries, s.dim) if layout == "bhsd" else (s.batch, s.queries, 3, s.heads, s.dim)
    a = {"q": normal(rng, *shape, dtype=s.dtype), "layout": layout, "causal": bool(some(rng, 0.5)), "return_lse": True}

    def oracle():
        q, k, v = (bhsd(np.take(a["q"], i, 1 if layout == "bhsd" else 2), layout) for i in range(3))

        def compute(arithmetic):
            out, lse = reference.attention(q, k, v, options_of(a), arithmetic)
            return bhsd(out, layout), lse

        return twice(compute, s, ("out", "lse"), s.queries + s.dim)

    return Call(fc.attention, a, ("out", "lse"), oracle)


def cuts_of(rng, batch: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([length(rng) for _ in range(batch)])]).astype(np.int32)


def draw_varlen(rng) -> Call:
    s = Sizes.draw(rng)
    cu_q, cu_k = cuts_of(rng, s.batch), cuts_of(rng, s.batch)
    spare_q, spare_k = (int(rng.choice([0, 0, 3])) for _ in range(2))
    rows, keys = int(cu_q[-1]) + spare_q, int(cu_k[-1]) + spare_k
    a = {
        "q": normal(rng, rows, s.heads, s.dim, dtype=s.dtype),
        "k": normal(rng, keys, s.heads_k, s.dim, dtype=s.dtype),
        "v": normal(rng, keys, s.heads_k, s.dim_v, dtype=s.dtype),
        "cu_seqlens_q": guarded(cu_q, rng),
        "cu_seqlens_k": guarded(cu_k, rng),
        **words_of(rng, s, rows, keys, planes=False),
        **outputs(rng, s, (rows, s.heads, s.dim_v), (s.heads, rows)),
    }
    if some(rng, 0.3):
        a["max_seqlen_q"] = int(np.diff(cu_q).max(initial=0)) + int(rng.integers(0, 3))
    if some(rng, 0.3):
        a["max_seqlen_k"] = int(np.diff(cu_k).max(initial=0)) + int(rng.integers(0, 3))
    if some(rng, 0.2):
        a["seqused_k"] = guarded(np.array([rng.integers(0, n + 1) for n in np.diff(cu_k)], np.int32), rng)
    if some(rng, 0.2):
        a |= {"dropout_p": 0.25, "seed": 5}

    def oracle():
        q, k, v = (a[n].astype(np.float64) for n in "qkv")
        cuts = cu_q.astype(int), cu_k.astype(int)
        compute = lambda arithmetic: reference.attention_varlen(q, k, v, *cuts, options_of(a), arithmetic)  # noqa: E731
        return twice(compute, s, ("out", "lse"), keys + s.dim)

    return Call(fc.attention_varlen, a, ("out", "lse"), oracle)


def draw_decode(rng) -> Call:
    s = Sizes.draw(rng)
    s.queries = int(rng.integers(0, 5))
    paged, page = some(rng, 0.5), int(rng.choice([1, 4, 16]))
    slots = -(-max(s.keys, 1) // page) if paged else 0
    capacity = slots * page if paged else s.keys
    blocks = (s.batch * slots + 2, page) if paged else (s.batch, capacity)
    new = int(rng.integers(0, min(3, capacity) + 1)) if some(rng, 0.5) else None
    lengths = rng.integers(0, capacity - (new or 0) + 1, s.batch).astype(np.int32)
    a = {
        "q": normal(rng, s.batch, s.heads, s.queries, s.dim, dtype=s.dtype),
        "k_cache": normal(rng, blocks[0], s.heads_k, blocks[1], s.dim, dtype=s.dtype),
        "v_cache": normal(rng, blocks[0], s.heads_k, blocks[1], s.dim_v, dtype=s.dtype),
        "cache_seqlens": guarded(lengths, rng),
        **words_of(rng, s, s.queries, capacity, planes=True),
        **outputs(rng, s, (s.batch, s.heads, s.queries, s.dim_v), (s.batch, s.heads, s.queries)),
    }
    a["causal"] = bool(some(rng, 0.8))
    if paged:
        table = rng.permutation(blocks[0])[: s.batch * slots].reshape(s.batch, slots).astype(np.int32)
        a["block_table"] = guarded(table, rng)
    if new is not None:
        a["k_new"] = normal(rng, s.batch, s.heads_k, new, s.dim, dtype=s.dtype)
        a["v_new"] = normal(rng, s.batch, s.heads_k, new, s.dim_v, dtype=s.dtype)
    if some(rng, 0.3) and s.dim > 1:
        half, positions = int(rng.integers(1, s.dim // 2 + 1)), capacity + s.queries + 1
        angle = rng.standard_normal((positions, half))
        a["rotary_cos"], a["rotary_sin"] = (guarded(f(angle).astype(np.float32), rng) for f in (np.cos, np.sin))
        a["rotary_interleaved"] = some(rng, 0.5)

    def oracle():
        wide = {n: a[n].astype(np.float64) for n in ("q", "k_cache", "v_cache")}
        names = ("block_table", "k_new", "v_new", "rotary_cos", "rotary_sin")
        given = {n: a[n] if n == "block_table" else a[n].astype(np.float64) for n in names if n in a}
        decode = reference.Decode(lengths, rotary_interleaved=a.get("rotary_interleaved", False), **given)
        options = options_of(a, causal="bottom_right" if a["causal"] else False)

        def compute(arithmetic):
            return reference.attention_decode(*wide.values(), decode, options, arithmetic)

        return twice(compute, s, ("out", "lse", "k_cache", "v_cache"), capacity + s.dim)

    if "rotary_cos" in a and s.queries > 0 and (lengths + (new or 0) < s.queries).any():
        oracle = None  # queries before position 0, which the oracle cannot place
    return Call(
        fc.attention_decode, a, ("out", "lse"), oracle, caches=("k_cache", "v_cache") if new is not None else ()
    )


def draw_backward(rng) -> Call:
    forward = draw_attention(rng)
    a = {n: x for n, x in forward.arguments.items() if n not in ("out", "lse", "return_lse")}
    s = Sizes.draw(rng)
    q, v = a["q"], a["v"]
    rows = (q.shape[0], q.shape[2], q.shape[1]) if a["layout"] == "bshd" else q.shape[:3]
    name = next(n for n, d in DTYPES.items() if q.dtype == d)
    s.dtype = name
    out_shape = (*q.shape[:3], v.shape[3])
    try:
        a["out"], a["lse"] = fc.attention(return_lse=True, **a)
    except DOCUMENTED:  # a forced kernel that does not take it
        a["out"], a["lse"] = np.zeros(out_shape, s.out_dtype), np.zeros(rows, s.lse_dtype)
    a["out"], a["lse"] = guarded(a["out"], rng), guarded(a["lse"], rng)
    a["dout"] = normal(rng, *out_shape, dtype=name)
    if some(rng, 0.4):
        a["dlse"] = normal(rng, *rows, dtype=s.lse_dtype.name)
    for n in "qkv":
        if some(rng, 0.4):
            a["d" + n] = unwritten(a[n].shape, a[n].dtype, rng)
    a["deterministic"] = some(rng, 0.6)
    results = ("dq", "dk", "dv", *(["dbias"] if "bias" in a else []), *(["dsinks"] if "sinks" in a else []))

    def oracle():
        layout = a["layout"]
        q, k, v, dout = (bhsd(a[n], layout) for n in ("q", "k", "v", "dout"))
        dlse = a["dlse"].astype(np.float64) if "dlse" in a else None

        def compute(arithmetic, cancel=True):
            return reference.attention_backward(dout, q, k, v, options_of(a), dlse, arithmetic, cancel)

        exact, stepwise = compute(reference.EXACT), compute(reference.framework_arithmetic(name))
        sizes = compute(reference.EXACT, cancel=False)
        turned = {n: (lambda x: bhsd(x, layout)) if n in ("dq", "dk", "dv") else np.asarray for n in exact}
        # weights are made from lse, whose rounding is relative to its size; in 16 bits others are larger
        scores = np.abs(a["lse"][np.isfinite(a["lse"])]).max(initial=1) if name in ("float32", "float64") else 1
        kept = {"dsinks": a["sinks"].dtype.name} if "sinks" in a else {}
        coarser = {n: max(name, kept.get(n, name), key=UNIT.get) for n in exact}
        return {
            n: (turned[n](exact[n]), turned[n](stepwise[n]), coarser[n], 300, scores * np.abs(sizes[n]).max(initial=0))
            for n in exact
        }

    return Call(fc.attention_backward, a, results, oracle, exact_repeat=a["deterministic"])


def draw_merge(rng) -> Call:
    s, layout = Sizes.draw(rng), str(rng.choice(["bhsd", "bshd", "thd"]))
    s.dtype = str(rng.choice(FLOATS))
    shapes = {
        "bhsd": ((s.batch, s.heads, s.queries, s.dim), (s.batch, s.heads, s.queries)),
        "bshd": ((s.batch, s.queries, s.heads, s.dim), (s.batch, s.heads, s.queries)),
        "thd": ((s.queries, s.heads, s.dim), (s.heads, s.queries)),
    }
    out, lse = shapes[layout]
    a: dict[str, Any] = {"layout": layout}
    for state in "ab":
        a["out_" + state] = normal(rng, *out, dtype=s.dtype)
        a["lse_" + state] = normal(rng, *lse, dtype=s.lse_dtype.name)
    if some(rng, 0.3):
        a["out"], a["lse"] = unwritten(out, s.out_dtype, rng), unwritten(lse, s.lse_dtype, rng)
    elif some(rng, 0.3):
        a["out"], a["lse"] = a["out_a"], a["lse_a"]
    states = [np.array(a[n], np.float64) for n in ("out_a", "lse_a", "out_b", "lse_b")]

    def oracle():
        turned = [x if x.ndim < len(out) or layout == "bhsd" else x.swapaxes(-2, -3) for x in states]
        merged, total = reference.merge_states(*turned)
        merged = merged if layout == "bhsd" else merged.swapaxes(-2, -3)
        sizes = max(np.abs(x[np.isfinite(x)]).max(initial=1) for x in (states[1], states[3]))
        return {"out": (merged, merged, s.dtype, 4), "lse": (total, total, s.lse_dtype.name, 4, sizes)}

    return Call(fc.merge_states, a, ("out", "lse"), oracle)


def draw_vector_add(rng) -> Call:
    shape, dtype = tuple(length(rng) for _ in range(int(rng.integers(0, 4)))), str(rng.choice(FLOATS))
    a: dict[str, Any] = {n: normal(rng, *shape, dtype=dtype) for n in "ab"}
    if some(rng, 0.5):
        a["out"] = unwritten(shape, DTYPES[dtype], rng) if some(rng, 0.6) else a["a"]
    terms = [np.array(a[n], np.float64) for n in "ab"]
    return Call(fc.vector_add, a, ("out",), lambda: {"out": (sum(terms), sum(terms), dtype, 1)})


def draw_reduce(rng) -> Call:
    shape, dtype = tuple(length(rng) for _ in range(int(rng.integers(0, 4)))), str(rng.choice(FLOATS))
    op = str(rng.choice(["sum", "max", "min", "mean"]))
    axis = int(rng.integers(-len(shape), len(shape))) if shape and some(rng, 0.7) else None
    x = normal(rng, *shape, dtype=dtype)
    a: dict[str, Any] = {"x": x, "op": op, "axis": axis}
    if some(rng, 0.4):
        left = () if axis is None else tuple(n for i, n in enumerate(shape) if i != axis % len(shape))
        a["out"] = unwritten(left, DTYPES[dtype], rng)

    def oracle():
        wide = x.astype(np.float64)
        if x.size:
            exact = getattr(np, op)(wide, axis=axis)
        else:  # NumPy refuses, also where there is no element to find
            exact = np.full(np.sum(wide, axis=axis).shape, {"sum": 0.0, "mean": np.nan}.get(op, np.inf))
        size = np.abs(wide).sum() if op == "sum" else np.abs(wide).max(initial=0)
        return {"out": (np.asarray(exact), np.asarray(exact), dtype, wide.size, size)}

    return Call(fc.reduce, a, ("out",), oracle)


DRAW = (draw_attention, draw_attention, draw_packed, draw_varlen, draw_varlen, draw_decode, draw_decode)
DRAW += (draw_backward, draw_backward, draw_merge, draw_vector_add, draw_reduce)


def draw(seed: int) -> tuple[Call, np.random.Generator]:
    rng = np.random.default_rng(seed)
    call = DRAW[seed % len(DRAW)](rng)
    if rng.random() < 0.6:
        call.spoiled = [spoil(call.arguments, rng) for _ in range(int(rng.integers(1, 3)))]
    return call, rng


# ---- what must hold --------------------------------------------------------------------------------------------------


def check(call: Call, rng) -> str:
    """Makes the call. What became of it: the exception's name, "result", or "right" where the oracle was asked."""
    memory = Memory(call.arguments)
    try:
        result = call.function(**call.arguments)
    except DOCUMENTED as refusal:
        message = str(refusal)
        assert message, f"{type(refusal).__name__} without a message"
        assert "incompatible function arguments" not in message, f"not our words: {message}"
        memory.assert_same([], f"refused ({message})")
        return type(refusal).__name__
    results = call.named(result)
    given = [n for n in (*call.results, *call.caches) if isinstance(call.arguments.get(n), np.ndarray)]
    memory.assert_same([call.arguments[n] for n in given], "made")
    inputs = [n for n in given if any(x is call.arguments[n] for m, x in call.arguments.items() if m != n)]
    for name, array in results.items():
        assert isinstance(array, np.ndarray), f"{name} is a {type(array)}"
        assert name not in given or array is call.arguments[name], f"{name}= was given, another array returned"
        mark = UNWRITTEN[array.dtype.itemsize]
        left = 0 if name in inputs or name not in given else np.count_nonzero(array.view(mark.dtype) == mark)
        assert left == 0, f"{left} elements of {name} were not written"
    answers = {n: np.array(x) for n, x in {**results, **{n: call.arguments[n] for n in call.caches}}.items()}
    memory.restore()
    if call.exact_repeat:
        repeat(call, answers, rng)
    if call.oracle is None or call.spoiled or not has_plain_numbers(call):
        return "result"
    memory.restore()
    compare(call.oracle(), answers)
    return "right"


def repeat(call: Call, answers: dict[str, np.ndarray], rng):
    """The same call with new arrays where it was given some and the other way round: bit for bit the same."""
    arguments = dict(call.arguments)
    for name in answers:
        if name in call.caches or name not in RESULTS:
            continue
        was_given = arguments.pop(name, None) is not None
        if was_given and name == "lse" and call.function is not fc.merge_states:
            arguments["return_lse"] = True
        elif not was_given:
            arguments[name] = unwritten(answers[name].shape, answers[name].dtype, rng)
    for name, array in call.named(call.function(**arguments)).items():
        same = array.tobytes() == answers[name].tobytes()
        assert same, f"{name} depends on whose array it is written to"


def has_plain_numbers(call: Call) -> bool:
    """Whether the oracle's bounds hold: everything finite and of ordinary size, and not in float8."""
    arrays = [x for n, x in call.arguments.items() if isinstance(x, np.ndarray) and n not in RESULTS]
    floats = [x for x in arrays if x.dtype.kind not in "iub"]
    return all((np.abs(x.astype(np.float64)) < 100).all() for x in floats) and not any(
        x.dtype == ml_dtypes.float8_e4m3fn for x in floats
    )


def compare(expected: dict[str, Any], answers: dict[str, np.ndarray]):
    for name, answer in answers.items():
        exact, stepwise, dtype, terms, *magnitude = expected[name]
        actual, exact = answer.astype(np.float64), np.asarray(exact, np.float64)
        assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
        finite = np.isfinite(exact)
        assert np.array_equal(actual[~finite], exact[~finite], equal_nan=True), f"{name}: not infinite where it must be"
        error = np.abs(actual[finite] - exact[finite]).max(initial=0)
        bound = allowed_error(exact[finite], np.asarray(stepwise)[finite], dtype, terms, *magnitude)
        assert error <= bound, f"{name}: largest error {error:.3g}, allowed {bound:.3g} in {dtype}"


def main(first: int, count: int = 1):
    """Makes the calls of these seeds. A seed is printed before its call, so that a crash names it."""
    resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))  # absurd lengths are the same MemoryError everywhere
    became: dict[str, int] = {}
    for seed in range(first, first + count):
        print(seed, flush=True)
        call, rng = draw(seed)
        try:
            with np.errstate(all="ignore"):
                end = check(call, rng)
        except BaseException:
            print(call, flush=True)
            raise
        became[end] = became.get(end, 0) + 1
    print(became)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
