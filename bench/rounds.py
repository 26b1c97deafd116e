"""Contenders timed in turn, and what the times of the same round say of each other.

Machines change their speed within seconds, so a time is compared only with those of the same round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[], object]

SAMPLE_SECONDS = 0.02  # short calls are repeated for so long
FEWEST_ROUNDS = 3


def seconds(run: Run, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def take_rounds(
    runs: dict[str, Run], rounds: int, budget: float, also: Callable[[], float] | None = None
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each contender in each round, in random order inside a round, and what `also` gave in each.

    Ends after `rounds`, or once `budget` seconds are spent, but not before the third.
    """
    repeats = {name: max(1, int(SAMPLE_SECONDS / max(seconds(run), 1e-7))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    others: list[float] = []
    begin = time.perf_counter()
    for taken in range(rounds):
        if taken >= FEWEST_ROUNDS and time.perf_counter() - begin > budget:
            break
        if also:
            others.append(also())
        for name in random.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name], repeats[name]))
    return times, others


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": middle, "high": high}


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Quartiles over rounds of their time over ours: above 1 we are faster."""
    return quartiles([their / our for their, our in zip(theirs, ours, strict=True)])


def geometric_mean(cells: list[dict[str, Any]], peer: str = "torch") -> float:
    """Of the median ratios of result cells to one peer."""
    return statistics.geometric_mean(cell["ratios"][peer]["median"] for cell in cells)
