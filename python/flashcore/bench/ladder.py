"""The ladder: from the scalar kernel to the chosen one on one problem, each rung by its forced name."""

from __future__ import annotations

from rich.table import Table

from .report import number, table
from .results import OURS, Data
from .run import KERNEL_PREFIX, kernels_of

TEACHING = "ladder."


def rungs(line: str, device: str) -> list[str]:
    """The kernels to force: the scalar reference, then the teaching rungs in the order of their table."""
    names = kernels_of(line, device)
    return [name for name in names if name.endswith(".reference")] + [name for name in names if TEACHING in name]


def climb(entry: Data) -> list[tuple[str, float]]:
    """(name, µs) of the rungs that were timed, the reference first, the chosen kernel last; then other libraries."""
    results = entry["results"]
    forced = [name for name in results if name.startswith(KERNEL_PREFIX)]
    order = sorted(forced, key=lambda name: (not name.endswith(".reference"), -results[name]["us"]))
    others = [name for name in results if name not in order and name != OURS]
    order += [OURS] * (OURS in results) + sorted(others, key=lambda name: -results[name]["us"])
    return [(name, results[name]["us"]) for name in order]


def label(entry: Data, name: str) -> str:
    return entry.get("kernel", name) if name == OURS else name.removeprefix(KERNEL_PREFIX)


def best_sdpa(entry: Data) -> float | None:
    times = [result["us"] for name, result in entry["results"].items() if name.startswith("SDPA")]
    return min(times, default=None)


def climb_table(entry: Data) -> Table:
    """Each rung with its speed-up over the scalar baseline and against the fastest SDPA."""
    made = table("rung", "µs", "TFLOP/s", "× scalar", "× SDPA", title=f"The ladder: {entry['line']}")
    steps, sdpa = climb(entry), best_sdpa(entry)
    scalar = next((us for name, us in steps if name.endswith(".reference")), None)
    for name, us in steps:
        ratios = [f"{base / us:.2f}" if base else "–" for base in (scalar, sdpa)]
        made.add_row(label(entry, name), number(us), number(entry["results"][name].get("tflops"), 3), *ratios)
    return made
