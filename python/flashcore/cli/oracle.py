"""Attention by its definition, in float64: what the library is checked against."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


def attention(q: Any, k: Any, v: Any) -> Any:
    """softmax(q kᵀ / √head_dim) v, for (batch, heads, seqlen, head_dim)."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


MAX_ALLOWED = 1e-3
MEAN_ALLOWED = 1e-4


class Comparison(NamedTuple):
    """Absolute errors of a float16 result."""

    largest: float
    mean: float

    @property
    def passed(self) -> bool:
        return self.largest <= MAX_ALLOWED and self.mean <= MEAN_ALLOWED  # false for NaN


def compare(result: Any, expected: Any) -> Comparison:
    error = np.abs(np.asarray(result, dtype=np.float64) - expected)
    return Comparison(float(error.max()), float(error.mean()))
