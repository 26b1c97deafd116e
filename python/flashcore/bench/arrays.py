"""Random inputs of a case, on a device, as flashcore's own arrays: no framework is needed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from .. import _core
from .cases import MASK_BLOCK, Case

NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "e4m3": "float8_e4m3"}
_BITS: dict[str, Any] = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "bfloat16": np.uint16}
_BITS |= {"float8_e4m3": np.uint8, "int32": np.int32, "bool": np.bool_}
#: random numbers repeat after so many
POOL = 1 << 22
#: what keys are: normal numbers, or such that grow by this with each block of so many towards the first, so that a
#: running maximum has to move in every block of a kernel that begins with the last keys
INPUTS = ("normal", "rising")
RISE, RISE_BLOCK = 2.0, 64

Arrays = dict[str, Any]


@cache
def _e4m3_values() -> Any:
    """The numbers of the codes 0 to 126: those that are positive and finite."""
    code = np.arange(127)
    exponent, fraction = code >> 3, code & 7
    return np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))


def encode(values: Any, dtype: str) -> Any:
    """float32 values in the bits of `dtype` (a name of flashcore's), rounded to nearest."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if dtype == "float8_e4m3":
        table = _e4m3_values()
        nearest = np.searchsorted((table[1:] + table[:-1]) / 2, np.abs(values))
        return (nearest | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)
    return np.asarray(values).astype(_BITS[dtype])


def decode(bits: Any, dtype: str) -> Any:
    """The float64 values of such bits."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "float8_e4m3":
        return np.where(bits & 0x80, -1.0, 1.0) * np.append(_e4m3_values(), np.nan)[bits & 0x7F]
    return bits.astype(np.float64)


class Maker:
    """Makes arrays on one device, in order with one stream."""

    def __init__(self, cuda: bool, index: int, stream: int, seed: int = 0, inputs: str = "normal") -> None:
        self._where = (cuda, index, stream)
        self.stream = stream
        self._inputs = inputs
        self._pool = np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32)
        self._encoded: dict[str, Any] = {}
        self._taken = 0

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return _core.empty(list(shape), dtype, *self._where)

    def of(self, values: Any, dtype: str) -> Any:
        bits = np.ascontiguousarray(values, _BITS[dtype])
        array = self.empty(bits.shape, dtype)
        _core.copy_in(array, bits.ctypes.data, bits.nbytes, self.stream)
        return array

    def normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Normal numbers; those of the next array begin elsewhere in the pool."""
        return self.repeated(self.numbers(dtype), shape, dtype)

    def keys(self, shape: tuple[int, ...], dtype: str) -> Any:
        """As the inputs are to be; of packed sequences normal ones."""
        rows, dim = shape[-2:]
        if self._inputs == "normal" or len(shape) != 4 or rows * dim > POOL // 2:
            return self.normal(shape, dtype)
        self.numbers(dtype)
        factors = 1 + RISE * ((rows - 1 - np.arange(rows)) // RISE_BLOCK)
        plane = self._pool[self._taken :][: rows * dim].reshape(rows, dim) * factors[:, None]
        return self.repeated(encode(plane.astype(np.float32), dtype), shape, dtype)

    def numbers(self, dtype: str) -> Any:
        """The bits of as many normal numbers as there are before they repeat; each time they begin elsewhere."""
        if dtype not in self._encoded:
            self._encoded[dtype] = encode(self._pool, dtype)
        self._taken = (self._taken + 7919) % (POOL // 2)
        return self._encoded[dtype][self._taken :]

    def repeated(self, bits: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """An array that is filled with these bits over and over."""
        array = self.empty(shape, dtype)
        _core.repeat_in(array, bits.ctypes.data, bits.nbytes, self.stream)
        return array

    def host(self, array: Any) -> Any:
        """An array's bits in host memory, once all that is queued is done."""
        bits = np.empty(array.shape, _BITS[{"boolean": "bool"}.get(array.dtype, array.dtype)])
        _core.copy_out(array, bits.ctypes.data, bits.nbytes, self.stream)
        return bits


def make(case: Case, maker: Maker, results: bool = False) -> Arrays:
    """The arrays of a case by the names that flashcore's functions give them: (batch, heads, seqlen, head_dim), packed
    (tokens, heads, head_dim). With `results` also those that a call writes to.

    Raises ValueError for words that no arrays are made for.
    """
    for word in ("unaligned", *(f"out_{dtype}" for dtype in NAMES)):
        if word in case.words:
            raise ValueError(f'"{case.line}": no arrays are made for "{word}"')
    case.check_lengths()
    arrays = _cache(case, maker) if case.decode else _inputs(case, maker)
    dtype = NAMES[case.dtype]
    out_dtype = "bfloat16" if dtype == "float8_e4m3" else dtype
    lse_dtype = "float64" if dtype == "float64" else "float32"
    rows: tuple[int, ...] = (case.batch, case.heads_q, case.seqlen_q)
    out_shape: tuple[int, ...] = (*rows, case.head_dim_v)
    if "varlen" in case.words:
        tokens = case.rows("q")
        rows, out_shape = (case.heads_q, tokens), (tokens, case.heads_q, case.head_dim_v)
    if results and case.phase == "bwd":
        arrays |= {f"d{name}": maker.empty(arrays[name].shape, dtype) for name in "qkv"}
    elif results:
        arrays["out"] = maker.empty(out_shape, out_dtype)
        if "lse" in case.words:
            arrays["lse"] = maker.empty(rows, lse_dtype)
    if case.phase == "bwd":
        arrays["dout"] = maker.normal(out_shape, dtype)
        if "dlse" in case.words:
            arrays["dlse"] = maker.normal(rows, lse_dtype)
    return arrays | _extras(case, maker)


def _inputs(case: Case, maker: Maker) -> Arrays:
    dtype = NAMES[case.dtype]
    arrays: Arrays = {}
    sizes = {
        "q": (case.heads_q, case.head_dim),
        "k": (case.heads_k, case.head_dim),
        "v": (case.heads_k, case.head_dim_v),
    }
    for name, (heads, dim) in sizes.items():
        packed = (case.rows("q" if name == "q" else "k"), heads, dim)
        padded = (case.batch, heads, case.seqlen_q if name == "q" else case.seqlen_k, dim)
        shape = packed if "varlen" in case.words else padded
        arrays[name] = (maker.keys if name == "k" else maker.normal)(shape, dtype)
    if "varlen" in case.words:
        for letter in "qk":
            bounds = np.concatenate([[0], np.cumsum(case.lengths(letter))])
            arrays[f"cu_seqlens_{letter}"] = maker.of(bounds, "int32")
    if "seqused" in case.words:
        arrays["seqused_k"] = maker.of(np.array(case.lengths("k")), "int32")
    return arrays


def _cache(case: Case, maker: Maker) -> Arrays:
    """A full cache, less the keys that the call appends; pages in the order of the keys."""
    dtype, page, new = NAMES[case.dtype], case.integer("page"), case.integer("append")
    pages = -(-case.seqlen_k // page) if page else 1
    blocks = (case.batch * pages, case.heads_k, page or case.seqlen_k)
    arrays: Arrays = {
        "q": maker.normal((case.batch, case.heads_q, case.seqlen_q, case.head_dim), dtype),
        "k_cache": maker.normal((*blocks, case.head_dim), dtype),
        "v_cache": maker.normal((*blocks, case.head_dim_v), dtype),
        "cache_seqlens": maker.of(np.full(case.batch, case.seqlen_k - new), "int32"),
    }
    if page:
        arrays["block_table"] = maker.of(np.arange(case.batch * pages).reshape(case.batch, pages), "int32")
    if new:
        rows = (case.batch, case.heads_k, new)
        arrays |= {"k_new": maker.normal((*rows, case.head_dim), dtype)}
        arrays |= {"v_new": maker.normal((*rows, case.head_dim_v), dtype)}
    if "rotary" in case.words:
        half = case.integer("rotary") // 2
        angle = np.arange(case.seqlen_k)[:, None] * 10000.0 ** (-np.arange(half) / max(half, 1))
        arrays |= {"rotary_cos": maker.of(np.cos(angle), "float32"), "rotary_sin": maker.of(np.sin(angle), "float32")}
    return arrays


def _extras(case: Case, maker: Maker) -> Arrays:
    arrays: Arrays = {}
    if "mask" in case.words:
        rows, columns = (np.arange(size) // MASK_BLOCK for size in (case.seqlen_q, case.seqlen_k))
        arrays["mask"] = maker.of((rows[:, None] + columns) % 2 == 0, "bool")
    if "bias" in case.words:
        arrays["bias"] = maker.normal((1, case.heads_q, case.seqlen_q, case.seqlen_k), "float32")
    if "alibi" in case.words:
        arrays["alibi_slopes"] = maker.of(2.0 ** (-8 * np.arange(1, case.heads_q + 1) / case.heads_q), "float32")
    if "sinks" in case.words:
        arrays["sinks"] = maker.normal((case.heads_q,), "float32")
    if "descale" in case.words:
        ones = np.ones((case.batch, case.heads_k))
        arrays |= {f"{name}_descale": maker.of(ones, "float32") for name in "qkv"}
    return arrays
