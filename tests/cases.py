"""Problems to try, the arrays that pose them, and how far a result may lie from the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import reference
from frameworks import DTYPES

HALVES = ("float16", "bfloat16")
ALL_FLOATS = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("bhsd", "bshd")


@dataclass(frozen=True)
class Case:
    """One attention problem. `tensors` names the optional inputs; odd sizes are the rule, not the exception."""

    name: str
    batch: int = 2
    heads: tuple[int, int] = (2, 2)
    seqlen: tuple[int, int] = (19, 19)
    dim: tuple[int, int] = (16, 16)
    words: dict = field(default_factory=dict)  # causal, window, scale, softcap, dropout_p, seed
    tensors: tuple[str, ...] = ()
    bias_shape: tuple | None = None
    mask_shape: tuple | None = None

    def __str__(self):
        return self.name


CASES = (
    Case("plain"),
    Case("one_key_one_query", seqlen=(1, 1)),
    Case("more_keys", seqlen=(7, 45)),
    Case("more_queries", seqlen=(45, 7)),
    Case("long", batch=1, seqlen=(130, 197), dim=(64, 64)),
    Case("scale", words={"scale": 0.7}),
    Case("causal", words={"causal": True}),
    Case("causal_top_left", seqlen=(13, 29), words={"causal": "top_left"}),
    Case("causal_bottom_right", seqlen=(13, 29), words={"causal": "bottom_right"}),
    Case("causal_top_left_more_queries", seqlen=(29, 13), words={"causal": "top_left"}),
    Case("causal_bottom_right_empty_rows", seqlen=(29, 13), words={"causal": "bottom_right"}),
    Case("window_left", words={"window": (4, None)}),
    Case("window_right", words={"window": (-1, 3)}),
    Case("window_both", seqlen=(17, 31), words={"window": (6, 2)}),
    Case("window_zero", words={"window": (0, 0)}),
    Case("window_causal", words={"window": (5, 3), "causal": True}),
    Case("window_top_left", seqlen=(17, 31), words={"window": (3, 0), "causal": "top_left"}),
    Case("window_bottom_right", seqlen=(17, 31), words={"window": (3, 0), "causal": "bottom_right"}),
    Case("mask", tensors=("mask",)),
    Case("mask_one_row", tensors=("mask",), mask_shape=(1, 19)),
    Case("mask_per_batch", tensors=("mask",), mask_shape=(2, 1, 1, 19)),
    Case("bias", tensors=("bias",)),
    Case("bias_over_heads", tensors=("bias",), bias_shape=(2, 19, 19)),
    Case("bias_over_keys", tensors=("bias",), bias_shape=(2, 1, 1, 19)),
    Case("bias_of_one_number", tensors=("bias",), bias_shape=(1, 1, 1, 1)),
    Case("softcap", words={"softcap": 2.5}),
    Case("alibi", seqlen=(11, 23), tensors=("alibi_slopes",)),
    Case("alibi_causal", tensors=("alibi_slopes",), words={"causal": True}),
    Case("sinks", tensors=("sinks",)),
    Case("sinks_window", seqlen=(23, 11), tensors=("sinks",), words={"window": (3, 0)}),
    Case("dropout", words={"dropout_p": 0.3, "seed": 2**40 + 17}),
    Case("gqa", heads=(6, 2)),
    Case("mqa", heads=(5, 1), words={"causal": True}),
    Case("head_dim_1", dim=(1, 1)),
    Case("head_dim_v_smaller", dim=(40, 24)),
    Case("head_dim_v_larger", dim=(8, 33)),
    Case("head_dim_256", batch=1, seqlen=(9, 12), dim=(256, 256)),
    Case("head_dim_odd", dim=(77, 5)),
    Case(
        "everything",
        heads=(4, 2),
        seqlen=(14, 26),
        dim=(24, 40),
        words={"causal": "bottom_right", "window": (15, -1), "softcap": 4.0, "scale": 0.4, "dropout_p": 0.2, "seed": 3},
        tensors=("mask", "bias", "alibi_slopes", "sinks"),
    ),
)
BY_NAME = {case.name: case for case in CASES}


def rounded(x, dtype: str) -> np.ndarray:
    """What `x` is once it is stored in `dtype`, as float64."""
    return np.asarray(x).astype(DTYPES[dtype]).astype(np.float64)


def tensor_of(case: Case, name: str, dtype: str, rng) -> np.ndarray:
    """One optional input of a case, rounded as it will be stored."""
    full = (case.batch, case.heads[0], *case.seqlen)
    if name == "mask":
        return rng.random(case.mask_shape or full) < 0.7
    if name == "bias":
        return rounded(rng.standard_normal(case.bias_shape or full), dtype)
    if name == "sinks":
        return rounded(rng.standard_normal(case.heads[0]), "float32")
    return rounded(2.0 ** -rng.integers(1, 8, case.heads[0]), "float32")  # alibi_slopes


@dataclass
class Problem:
    """A case with numbers in it: float64 arrays in bhsd that hold what the given dtype can hold."""

    case: Case
    dtype: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    tensors: dict

    @property
    def options(self) -> reference.Options:
        return reference.Options(**self.case.words, **self.tensors)

    def arrays(self, xp, layout="bhsd"):
        return [xp.array(in_layout(x, layout), self.dtype) for x in (self.q, self.k, self.v)]

    def keywords(self, xp) -> dict:
        """The call's keyword arguments as arrays of framework `xp`."""
        kinds = {"mask": "bool", "bias": self.dtype, "sinks": "float64" if self.dtype == "float64" else "float32"}
        given = {name: xp.array(t, kinds.get(name, "float32")) for name, t in self.tensors.items()}
        return {**self.case.words, **given}


def make(case: Case, dtype: str, rng) -> Problem:
    (heads_q, heads_k), (seqlen_q, seqlen_k), (dim, dim_v) = case.heads, case.seqlen, case.dim
    q = rounded(rng.standard_normal((case.batch, heads_q, seqlen_q, dim)), dtype)
    k = rounded(rng.standard_normal((case.batch, heads_k, seqlen_k, dim)), dtype)
    v = rounded(rng.standard_normal((case.batch, heads_k, seqlen_k, dim_v)), dtype)
    return Problem(case, dtype, q, k, v, {name: tensor_of(case, name, dtype, rng) for name in case.tensors})


def in_layout(x: np.ndarray, layout: str) -> np.ndarray:
    """bhsd <-> the given layout; its own inverse."""
    return x if layout == "bhsd" else np.ascontiguousarray(x.swapaxes(1, 2))


def cut(case: Case, **changes) -> Case:
    return replace(case, **changes)


# ---- how near is near enough -----------------------------------------------------------------------------------------

UNIT = {
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
    "float8_e4m3": 2.0**-8,  # its results are bfloat16
}


def allowed_error(exact, framework, dtype: str, terms: int = 1, magnitude: float = 0.0) -> float:
    """The contract's precision: at most twice the error of the same steps done one by one in the same dtype, plus an
    epsilon. The epsilon is what a correct result cannot avoid: a rounding to `dtype` (its own last one, and in the
    backward pass that of `out`, which it reads) and the roundings of sums of `terms` products in float32 or float64,
    which grow with √terms. Where large terms cancel, roundings are relative to the terms: `magnitude` is their size.
    """
    largest = max(np.abs(exact).max(initial=0), 2.0**-14)
    step_by_step = np.abs(framework - exact).max(initial=0)
    sums = UNIT["float64" if dtype == "float64" else "float32"]
    return 2 * step_by_step + (UNIT[dtype] + 2 * sums * max(terms, 1) ** 0.5) * max(magnitude, largest)


def assert_near(actual, exact, framework, dtype: str, terms: int = 1, what: str = "result", magnitude: float = 0.0):
    """`actual` lies within `allowed_error` of `exact`, and is infinite exactly where `exact` is."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert not np.isnan(actual).any(), f"{what}: {np.isnan(actual).sum()} NaN"
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(actual[~finite], exact[~finite], err_msg=what)
    error = np.abs(actual[finite] - exact[finite]).max(initial=0)
    bound = allowed_error(exact[finite], framework[finite], dtype, terms, magnitude)
    assert error <= bound, f"{what}: largest error {error:.3g}, allowed {bound:.3g} in {dtype}"


def lse_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"
