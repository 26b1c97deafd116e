#!/usr/bin/env python3
"""A short text about the kernels in a raw CSV page of Nsight Compute: scripts/profile.sh calls it.

Metrics differ in name from one architecture to the next: each is looked for by a pattern, and left out if missing.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

STALL = re.compile(r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active\.ratio|\.ratio)")
SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SECONDS = {
    "ns": 1e-9,
    "nsecond": 1e-9,
    "us": 1e-6,
    "usecond": 1e-6,
    "ms": 1e-3,
    "msecond": 1e-3,
    "s": 1.0,
    "second": 1.0,
}
STALLS_SHOWN = 5

Metrics = dict[str, tuple[float, str]]


def read(text: str) -> Iterator[tuple[str, Metrics]]:
    """Name and metrics (value, unit) of each kernel. The second row of the page has the units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = csv.reader(lines)
    header, units = next(rows, None), next(rows, None)
    if not header or not units or "Kernel Name" not in header:
        raise ValueError("not a raw CSV page of Nsight Compute")
    for row in rows:
        metrics: Metrics = {}
        for name, unit, value in zip(header, units, row, strict=True):
            try:
                metrics[name] = (float(value.replace(",", "")), unit)
            except ValueError:
                continue  # text, or n/a on this architecture
        yield row[header.index("Kernel Name")], metrics


def find(metrics: Metrics, *patterns: str) -> tuple[float, str] | None:
    """The largest of the metrics that the first pattern with any match names."""
    for pattern in patterns:
        found = [value for name, value in metrics.items() if re.fullmatch(pattern, name)]
        if found:
            return max(found)
    return None


def in_bytes(value: tuple[float, str]) -> float:
    match = re.match(r"([KMGT]?)byte", value[1])
    return value[0] * SCALES[match[1] if match else ""]


def seconds(value: tuple[float, str]) -> float:
    return value[0] * SECONDS.get(value[1], 1e-9)


def stalls(metrics: Metrics) -> list[tuple[str, float]]:
    """What warps wait for, the longest first: warps waiting for each instruction issued."""
    found: dict[str, float] = {}
    for name, (value, _) in metrics.items():
        match = STALL.fullmatch(name)
        if match and not match[1].endswith("not_issued"):
            found[match[1]] = max(value, found.get(match[1], 0.0))
    return sorted(found.items(), key=lambda item: -item[1])


def describe(name: str, metrics: Metrics) -> Iterable[str]:
    yield name
    time = find(metrics, r"gpu__time_duration\.(sum|avg)")
    if time:
        yield f"  time                    {seconds(time) * 1e6:.1f} µs under the profiler, from cold caches"
    percents = {
        "tensor pipe": (
            r"sm__pipe_tensor_.*cycles_active\.avg\.pct_of_peak_sustained_(active|elapsed)",
            r"sm__inst_executed_pipe_tensor.*\.avg\.pct_of_peak_sustained_(active|elapsed)",
        ),
        "issue slots": (
            r"sm__inst_issued\.avg\.pct_of_peak_sustained_active",
            r"smsp__issue_active\.avg\.pct_of_peak_sustained_active",
        ),
        "warps resident": (r"sm__warps_active\.avg\.pct_of_peak_sustained_active",),
        "L2": (r"lts__t_sectors\.avg\.pct_of_peak_sustained_elapsed", r"lts__throughput\.avg\.pct.*elapsed"),
        "DRAM": (r"dram__throughput\.avg\.pct.*elapsed", r"gpu__dram_throughput\.avg\.pct.*elapsed"),
        "L2 hits": (r"lts__t_sector_hit_rate\.pct",),
    }
    for label, patterns in percents.items():
        value = find(metrics, *patterns)
        if value:
            yield f"  {label:<22}{value[0]:6.1f} %"
    for label, pattern in (("DRAM read", r"dram__bytes_read\.sum"), ("DRAM written", r"dram__bytes_write\.sum")):
        value = find(metrics, pattern)
        if value:
            yield f"  {label:<22}{in_bytes(value) / 2**20:8.1f} MiB"
    conflicts = find(metrics, r"l1tex__data_bank_conflicts_pipe_lsu_mem_shared\.sum", r".*bank_conflicts.*shared\.sum")
    wavefronts = find(metrics, r"l1tex__data_pipe_lsu_wavefronts_mem_shared\.sum")
    if conflicts:
        share = f" ({conflicts[0] / wavefronts[0]:.1%} of the wavefronts)" if wavefronts and wavefronts[0] else ""
        yield f"  shared bank conflicts {conflicts[0]:10.0f}{share}"
    for label, pattern in (("registers", "launch__registers_per_thread"), ("threads", "launch__block_size")):
        value = find(metrics, pattern)
        if value:
            yield f"  {label:<22}{value[0]:6.0f}"
    for reason, warps in stalls(metrics)[:STALLS_SHOWN]:
        yield f"  stalled: {reason:<22}{warps:6.2f} warps for each instruction issued"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="what `ncu --import REPORT --page raw --csv` printed")
    arguments = parser.parse_args()
    try:
        kernels = list(read(arguments.csv.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        sys.exit(f"{arguments.csv}: {error}")
    for name, metrics in kernels:
        print("\n".join(describe(name, metrics)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
