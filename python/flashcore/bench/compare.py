"""Two results of the same cases: what became slower or faster by more than the noise of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from .results import OURS, Data

SLOWER, FASTER, SAME = "slower", "faster", "same"


@dataclass(frozen=True)
class Change:
    line: str
    old_us: float
    new_us: float
    verdict: str

    @property
    def ratio(self) -> float:
        """New time over old: above 1 is slower."""
        return self.new_us / self.old_us


def band(result: dict[str, Any]) -> tuple[float, float]:
    """The quartiles of a result's times: half of its samples lie between. Of files without them the extremes."""
    return (
        result.get("us_low", result.get("us_min", result["us"])),
        result.get("us_high", result.get("us_max", result["us"])),
    )


def verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A change counts where the bands of the two do not touch."""
    (old_low, old_high), (new_low, new_high) = band(old), band(new)
    return SLOWER if new_low > old_high else FASTER if new_high < old_low else SAME


def changes(old: Data, new: Data, contender: str = OURS) -> list[Change]:
    """For every case that both have a time of."""
    before = {entry["line"]: entry["results"].get(contender) for entry in old["cases"]}
    found = []
    for entry in new["cases"]:
        was, now = before.get(entry["line"]), entry["results"].get(contender)
        if was and now:
            found.append(Change(entry["line"], was["us"], now["us"], verdict(was, now)))
    return found


def failed(old: Data, new: Data) -> dict[str, float]:
    """The old time, by line, of every case that flashcore had a time of and has none of any more."""
    now_failed = {entry["line"] for entry in new["cases"] if OURS not in entry["results"]}
    before = {entry["line"]: entry["results"][OURS]["us"] for entry in old["cases"] if OURS in entry["results"]}
    return {line: us for line, us in before.items() if line in now_failed}


def check_common(path: Path, old: Data, lines: Iterable[str]) -> None:
    """Raises ValueError for an old result, that of `path`, with no time of flashcore in any of these cases."""
    if not {entry["line"] for entry in old["cases"] if OURS in entry["results"]} & set(lines):
        raise ValueError(f"{path}: nothing to compare with: it has a time of flashcore in none of these cases")


def drift(old: Data, new: Data) -> dict[str, float]:
    """New time over old of each other contender, geometric mean over the cases: how the machine itself has changed."""
    names = {name for entry in new["cases"] for name in entry["results"] if not name.startswith(OURS)}
    ratios = {name: [change.ratio for change in changes(old, new, name)] for name in sorted(names)}
    return {name: geometric_mean(found) for name, found in ratios.items() if found}


def differences(old: Data, new: Data) -> list[str]:
    """What makes the times of two files hard to compare."""
    names = ("gpu", "processor", "isa", "cores", "threads", "clock", "caches", "inputs")
    pairs = []
    for name in names:
        was, now = (data.get("machine", {}).get(name, data.get("settings", {}).get(name)) for data in (old, new))
        if was is not None and now is not None and was != now:
            pairs.append(f"{name}: {was} then, {now} now")
    return pairs
