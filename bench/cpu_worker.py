"""Times cells of the CPU benchmark in this process: one number of threads, one level of instructions, both from the
environment. Started by cpu_compare.py with its wishes as JSON; prints the result of each cell as a line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from cpu_cells import CELLS, SKIPPING_CELLS, Cell
from cpu_contenders import contenders, our_run
from flashcore.bench.statistics import quartiles, ratio
from flashcore.bench.timing import Contender, Plan, host_clock, take_rounds

# What there is to multiply with, fastest first, and what a level leaves out.
BF16_UNITS = ("amx_bf16", "avx512_bf16")
UNITS = (*BF16_UNITS, "avx512", "avx2", "sse2", "neon")
# A float16 is the sum of two bfloat16, a float32 of three: see src/kernels/cpu/simd/tile_product.h.
PRODUCTS = {"bfloat16": 1, "float16": 3, "float32": 6}
BEYOND = {"native": (), "avx512": BF16_UNITS, "avx2": (*BF16_UNITS, "avx512")}

PEAK_MILLISECONDS = 10
SAMPLE_SECONDS = 0.02  # short calls are repeated for so long
READ_MILLISECONDS = 50  # several times through the keys and values of a decode


class Peak:
    """What bench/peak.cpp says of this machine, at this moment."""

    def __init__(self, program: str, threads: int, isa: str) -> None:
        self.program, self.threads = program, threads
        here = self.ask("--milliseconds", "1")["gflops"]
        self.units = [unit for unit in UNITS if unit in here and unit not in BEYOND[isa]]

    def ask(self, *words: str) -> dict[str, Any]:
        command = [self.program, "--threads", str(self.threads), *words]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    def unit_for(self, dtype: str) -> tuple[str, int]:
        """What multiplies there, and how many of its products one product of `dtype` takes."""
        if "amx_bf16" in self.units:
            return "amx_bf16", PRODUCTS[dtype]
        return next(unit for unit in self.units if unit not in BF16_UNITS), 1

    def gauge(self, cell: Cell, dtype: str) -> tuple[dict[str, Any], Callable[[], float]]:
        """What bounds the cell and how much of it there is to do (1e9 of it), and the peak by the second, measured."""
        unit, products = self.unit_for(dtype)
        if cell.is_decode:
            amount = cell.kv_bytes(getattr(torch, dtype).itemsize)
            words = ("--milliseconds", str(READ_MILLISECONDS), "--bytes", str(amount), unit)
            return {"of": "reading", "amount": amount * 1e-9}, lambda: self.ask(*words)["gbytes"]
        words = ("--milliseconds", str(PEAK_MILLISECONDS), unit)
        return {"of": unit, "amount": products * cell.flops * 1e-9}, lambda: self.ask(*words)["gflops"][unit]


def repeated(call: Callable[[], Any]) -> Callable[[int], None]:
    def queue(repeats: int) -> None:
        for _ in range(repeats):
            call()

    return queue


def measure(name: str, dtype: str, wishes: dict[str, Any], peak: Peak | None) -> dict[str, Any]:
    skips = name in SKIPPING_CELLS
    cell = SKIPPING_CELLS[name] if skips else CELLS[name]
    runs = contenders(cell, dtype, [] if skips else wishes["peers"])
    if skips:
        runs["whole"] = our_run(cell.whole, getattr(torch, dtype))
        runs["whole"]()
    gauge, now = peak.gauge(cell, dtype) if peak else ({}, None)
    timed = [Contender(run, repeated(call)) for run, call in runs.items()]
    plan = Plan(0, wishes["rounds"], wishes["seconds"], SAMPLE_SECONDS)
    peaks = take_rounds(timed, host_clock, plan, also=now)
    times = {contender.name: contender.samples for contender in timed}
    ours = times["flashcore"]
    result = {
        "case": name,
        "line": cell.line,
        "dtype": dtype,
        "threads": wishes["threads"],
        "rounds": len(ours),
        "ms": {run: quartiles(taken)["median"] * 1e3 for run, taken in times.items()},
        "ratios": {run: ratio(times[run], ours) for run in runs if run not in ("flashcore", "whole")},
        "gflops": quartiles([cell.flops * 1e-9 / t for t in ours])["median"],
    }
    if peaks:
        shares = [gauge["amount"] / t / most for t, most in zip(ours, peaks, strict=True)]
        result["peak"] = {"of": gauge["of"], "most": quartiles(peaks)["median"], "share": quartiles(shares)}
    if skips:
        result |= {"work_left": cell.work_left, "time_left": ratio(ours, times["whole"])}
    return result


def main() -> None:
    wishes = json.loads(sys.argv[1])
    peak = Peak(wishes["peak"], wishes["threads"], wishes["isa"]) if wishes["peak"] else None
    for name in wishes["cases"]:
        for dtype in wishes["dtypes"]:
            print(json.dumps(measure(name, dtype, wishes, peak)), flush=True)


if __name__ == "__main__":
    main()
