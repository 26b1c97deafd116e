"""How far a result is from float64: a sample of rows of the last head of the last sequence, done again exactly.

softmax(scale · q kᵀ) v by its definition; of a backward call the gradient of q,
scale · (p ∘ (dout vᵀ − Σ dout ∘ out)) k.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np

from .arrays import Arrays, Maker, decode
from .calls import first
from .cases import MASK_BLOCK, Case

ROWS = 128
#: words beyond these change the values, or what they are made of, in ways that are not done again here
KNOWN = {"causal", "causal_tl", "causal_br", "window", "softcap", "scale", "mask", "lse", "deterministic", "page"}
KNOWN |= {"varlen", "seqused"}


class Sample:
    """The exact rows of one case."""

    def __init__(self, case: Case, arrays: Arrays, maker: Maker) -> None:
        self._case, self._maker = case, maker
        self._seqlen_q, seqlen_k = case.lengths("q")[-1], case.lengths("k")[-1]
        self._rows = np.unique(np.linspace(0, self._seqlen_q - 1, ROWS).astype(int)) if self._seqlen_q else np.arange(0)
        names = ("q", "k_cache", "v_cache") if case.decode else ("q", "k", "v")
        q, k, v = (self._last_head(arrays[name]) for name in names)
        k, v = (x[len(x) - seqlen_k :] if "varlen" in case.words else x[:seqlen_k] for x in (k, v))
        scores = case.scale * (q[self._own_rows(len(q))] @ k.T)
        if "softcap" in case.words:
            scores = case.real("softcap") * np.tanh(scores / case.real("softcap"))
        scores = np.where(self._seen(seqlen_k), scores, -np.inf)
        top = scores.max(axis=1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = weights.sum(axis=1, keepdims=True)
        weights /= np.where(total > 0, total, 1)
        self.exact = weights @ v
        if case.phase == "bwd":
            dout = self._last_head(arrays["dout"])
            above = dout[self._own_rows(len(dout))]
            grad = weights * (above @ v.T - (above * self.exact).sum(axis=1, keepdims=True))
            if "softcap" in case.words:
                grad *= 1 - np.where(np.isfinite(scores), scores / case.real("softcap"), 0) ** 2
            self.exact = case.scale * grad @ k

    def _own_rows(self, rows: int) -> Any:
        """The sampled rows of the last sequence, in an array that may hold others before it."""
        return self._rows + rows - self._seqlen_q

    def _last_head(self, array: Any) -> Any:
        """(rows, head_dim) in float64, of an array of ours; the pages of the last sequence joined."""
        bits = self._maker.host(array)
        if bits.ndim == 3:
            part = bits[:, -1]
        elif "page" in self._case.words and bits.shape[2] == self._case.integer("page"):
            pages = bits.shape[0] // self._case.batch
            part = bits[-pages:, -1].reshape(-1, bits.shape[3])
        else:
            part = bits[-1, -1]
        return decode(np.ascontiguousarray(part), array.dtype)

    def _seen(self, seqlen_k: int) -> Any:
        keys = np.arange(seqlen_k)
        begin, end = self._case.keys_of_rows(self._rows, self._seqlen_q, seqlen_k)
        seen = (keys >= begin[:, None]) & (keys < end[:, None])
        if "mask" in self._case.words:
            seen &= (self._rows[:, None] // MASK_BLOCK + keys // MASK_BLOCK) % 2 == 0
        return seen

    def error(self, result: Any, layout: str) -> float:
        """Relative L2 error of a call's result; `layout` is "bhsd" or "bshd", and of packed results has no meaning."""
        got = first(result)
        if len(got.shape) == 3:
            rows = self._own_rows(got.shape[0])
            part = self._numbers(got, lambda x: x[rows, -1])
        elif layout == "bhsd":
            part = self._numbers(got, lambda x: x[-1, -1, self._rows])
        else:
            part = self._numbers(got, lambda x: x[-1, self._rows, -1])
        size = float(np.linalg.norm(self.exact))
        return float(np.linalg.norm(part - self.exact)) / max(size, 1e-300)

    def _numbers(self, array: Any, pick: Any) -> Any:
        if hasattr(array, "detach"):
            return pick(array.detach()).double().cpu().numpy()
        if hasattr(array, "astype"):
            return np.asarray(pick(array).astype("float32"), np.float64)
        return decode(pick(self._maker.host(array)), array.dtype)


def sample(case: Case, arrays: Arrays, maker: Maker) -> Optional[Sample]:
    """None for words that are not done again here."""
    return Sample(case, arrays, maker) if set(case.words) <= KNOWN and case.flops else None
