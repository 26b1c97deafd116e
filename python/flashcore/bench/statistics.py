"""What the samples of one contender say, and what those of two say of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Summary = dict[str, Any]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"low": low, "median": middle, "high": high}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Quartiles over rounds of their time over ours: above 1 we are faster.

    Machines change their speed within seconds, so a time is compared only with those of the same round.
    """
    return quartiles([their / our for their, our in zip(theirs, ours, strict=True)])


def summary(seconds: Sequence[float]) -> Summary:
    """The spread of samples, in microseconds; `us` is the median, `us_low` and `us_high` are the quartiles."""
    times = np.asarray(seconds) * 1e6
    percentiles = {f"us_p{p}": float(np.percentile(times, p)) for p in (50, 90, 95, 99)}
    spread = quartiles(list(times))
    return {
        "us": spread["median"],
        "us_mean": float(times.mean()),
        "us_std": float(times.std(ddof=1)) if len(times) > 1 else 0.0,
        "us_min": float(times.min()),
        "us_max": float(times.max()),
        "us_low": spread["low"],
        "us_high": spread["high"],
        **percentiles,
        "samples": len(times),
    }
