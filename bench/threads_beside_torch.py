#!/usr/bin/env python3
"""Whose threads are better beside torch: flashcore's own pool, or the OpenMP threads that torch has loaded.

A step is torch.add, which wakes torch's threads, then one call of attention. Each kind of threads has processes of its
own, which take turns; a process gives the median time of its steps, the table the medians over processes. Rounds in
which other programs used the processors do not count.

Usage: threads_beside_torch.py [--rounds 5] [--steps 500] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import flashcore as fc
import torch
import torch.nn.functional as F
from flashcore.bench.provenance import processor

SHAPES = ((1, 2, 128, 64), (1, 8, 256, 64))
ADDED = 1 << 17  # torch.add spreads over its threads from 2^15 elements on
KINDS = ("pool", "openmp")


def steps_of(shape: tuple[int, ...]):
    """The steps to time."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(shape) for _ in range(3))
    a, b, c = (torch.randn(ADDED) for _ in range(3))
    torch.testing.assert_close(fc.attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-4, rtol=1e-4)

    def add_then(attention):
        def step():
            torch.add(a, b, out=c)
            attention(q, k, v)

        return step

    return {
        "torch.add, attention": add_then(fc.attention),
        "attention alone": lambda: fc.attention(q, k, v),
        "torch.add, torch's attention": add_then(F.scaled_dot_product_attention),
    }


def median_us(step, repeats: int) -> float:
    times = []
    for _ in range(repeats + repeats // 10):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[repeats // 10 :]) * 1e6


def measure(repeats: int) -> dict[str, float]:
    return {f"{shape} {name}": median_us(step, repeats) for shape in SHAPES for name, step in steps_of(shape).items()}


def busy_seconds() -> tuple[float, float]:
    """Processor time used so far: by everyone, and by the processes that this one has started."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, interrupt, soft = map(int, fields[:7])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK"), own.ru_utime + own.ru_stime


def run_process(kind: str, repeats: int) -> tuple[dict[str, float], float]:
    """The medians of one process, and how many processors others used meanwhile."""
    environment = {**os.environ, "FLASHCORE_THREADS": kind}
    command = [sys.executable, __file__, "--measure", "--steps", str(repeats)]
    begin, (all_before, own_before) = time.perf_counter(), busy_seconds()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    all_after, own_after = busy_seconds()
    others = (all_after - all_before - (own_after - own_before)) / (time.perf_counter() - begin)
    return json.loads(done.stdout), others


def quiet_rounds(wanted: int, tries: int, repeats: int, limit: float) -> list[dict[str, dict[str, float]]]:
    """Rounds of one process of each kind, without those in which others used more than `limit` processors."""
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(tries):
        measured = {kind: run_process(kind, repeats) for kind in KINDS}
        if max(others for _, others in measured.values()) <= limit:
            rounds.append({kind: cells for kind, (cells, _) in measured.items()})
        if len(rounds) == wanted:
            return rounds
    raise SystemExit(f"the machine is too busy: {len(rounds)} quiet rounds of {wanted} in {tries} tries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tries", type=int, default=40, help="to find so many quiet rounds")
    parser.add_argument("--others", type=float, default=0.15, help="processors that others may use in a quiet round")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.steps)))
        return

    rounds = quiet_rounds(args.rounds, args.tries, args.steps, args.others)
    cells = []
    print(f"{processor()}, {os.cpu_count()} processors, torch {torch.__version__}")
    print(f"{'step':48} {'pool':>9} {'openmp':>9}  pool / openmp (least, most)")
    for step in rounds[0]["pool"]:
        medians = {kind: statistics.median(r[kind][step] for r in rounds) for kind in KINDS}
        ratios = sorted(r["pool"][step] / r["openmp"][step] for r in rounds)
        cell = {"step": step, **{f"{kind}_us": medians[kind] for kind in KINDS}}
        cell |= {"ratio": statistics.median(ratios), "ratio_least": ratios[0], "ratio_most": ratios[-1]}
        cells.append(cell)
        print(
            f"{step:48} {medians['pool']:6.0f} us {medians['openmp']:6.0f} us  "
            f"{cell['ratio']:.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})"
        )
    if args.json:
        machine = {"processor": processor(), "processors": os.cpu_count(), "torch": torch.__version__}
        sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        machine |= {
            "flashcore": fc.__version__,
            "git_sha": sha,
            "date": time.strftime("%Y-%m-%d"),
            "processors_used_by_others": f"at most {args.others}",
        }
        facts = {"machine": machine, "steps": args.steps, "rounds": args.rounds, "cells": cells}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
