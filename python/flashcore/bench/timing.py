"""Contenders timed in turn, all by one clock.

Machines change their speed within seconds: what is compared is taken in the same rounds, in one process, in an order
that changes from round to round. A sample is the mean over calls queued back to back: of one call where it is long.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

SAMPLE_SECONDS = 1e-3  # short calls are repeated for so long
FEWEST_ROUNDS = 3
TRIAL_REPEATS = 3


@dataclass
class Contender:
    """What is timed. `queue(n)` makes the work n times; `per_queue` calls are in it each time."""

    name: str
    queue: Callable[[int], Any]
    per_queue: int = 1
    repeats: int = 1
    samples: list[float] = field(default_factory=list)


#: seconds of `queue(repeats)`, measured on the device or by the host
Clock = Callable[[Callable[[int], Any], int], float]


def host_clock(queue: Callable[[int], Any], repeats: int) -> float:
    start = time.perf_counter()
    queue(repeats)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Plan:
    """How much is measured: rounds before those that count, rounds that count, and the seconds after which a case ends
    early, but not before FEWEST_ROUNDS. `sample_seconds` 0 makes each sample one call."""

    warm_up: int = 20
    rounds: int = 100
    seconds: float = 60.0
    sample_seconds: float = SAMPLE_SECONDS


def take_rounds(
    contenders: list[Contender],
    clock: Clock,
    plan: Plan,
    between: Optional[Callable[[], None]] = None,
    also: Optional[Callable[[], float]] = None,
) -> list[float]:
    """Fills the samples (seconds of one call) of every contender. Returns what `also` gave in each round that counts.

    `between` runs before each sample, outside of its time.
    """

    def sample(contender: Contender) -> float:
        if between:
            between()
        return clock(contender.queue, contender.repeats) / contender.repeats / contender.per_queue

    begin = time.perf_counter()
    for contender in contenders:
        contender.samples.clear()
        contender.repeats = TRIAL_REPEATS if plan.sample_seconds else 1
        once = max(sample(contender) * contender.per_queue, 1e-9)
        contender.repeats = max(1, int(plan.sample_seconds / once))
    late = False
    others: list[float] = []
    for number in range(-plan.warm_up, plan.rounds):
        spent = time.perf_counter() - begin
        late = late or spent > plan.seconds
        if number < 0 and spent > plan.seconds / 5:
            continue  # enough of warming up: the rest of the time is for what counts
        if number >= FEWEST_ROUNDS and late:
            break
        taken = {}
        if number >= 0 and also:
            others.append(also())
        for contender in random.sample(contenders, len(contenders)):
            taken[contender.name] = sample(contender)
        if number >= 0:
            for contender in contenders:
                contender.samples.append(taken[contender.name])
    return others
