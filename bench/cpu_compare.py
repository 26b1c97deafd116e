#!/usr/bin/env python3
"""flashcore's CPU rows against torch's scaled_dot_product_attention, in one process.

Both run in random order inside each round; a cell's ratio is the median over rounds of (torch time / flashcore time) of
the same round. Machines change their speed within seconds, so ratios are comparable where times are not.

Usage: cpu_compare.py [--threads 1 2] [--dtypes float32 …] [--cases 512 2048 …] [--rounds 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flashcore as fc
import torch
import torch.nn.functional as F

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Sizes of one cell. `backward` times the gradients alone, from a forward pass made before."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    heads_k: int | None = None
    causal: bool = False
    backward: bool = False


CASES = {
    "512": Case(1, 8, 512, 512, 64),
    "2048": Case(1, 8, 2048, 2048, 64),
    "1024x32": Case(1, 32, 1024, 1024, 128),
    "4x256": Case(4, 8, 256, 256, 64),
    "4096c": Case(1, 8, 4096, 4096, 128, causal=True),
    "384d80": Case(2, 12, 384, 384, 80),
    "decode": Case(1, 32, 1, 8192, 128, heads_k=8),
    "small": Case(1, 1, 32, 32, 64),
    "bwd 512": Case(1, 8, 512, 512, 64, backward=True),
    "bwd 2048": Case(1, 8, 2048, 2048, 64, backward=True),
    "bwd 1024x32": Case(1, 32, 1024, 1024, 128, backward=True),
    "bwd 4x256": Case(4, 8, 256, 256, 64, backward=True),
    "bwd 4096c": Case(1, 8, 4096, 4096, 128, causal=True, backward=True),
    "bwd 384d80": Case(2, 12, 384, 384, 80, backward=True),
}


def tensors(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    q = torch.randn(case.batch, case.heads, case.seqlen_q, case.head_dim).to(dtype)
    keys = (case.batch, case.heads_k or case.heads, case.seqlen_k, case.head_dim)
    return q, torch.randn(keys).to(dtype), torch.randn(keys).to(dtype)


def forward_runs(case: Case, dtype: torch.dtype) -> tuple[Run, Run]:
    q, k, v = tensors(case, dtype)
    grouped = case.heads_k is not None
    ours = (lambda: fc.attention(q, k, v, causal=True)) if case.causal else (lambda: fc.attention(q, k, v))
    theirs = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)  # noqa: E731
    check(ours(), theirs(), dtype)
    return ours, theirs


def backward_runs(case: Case, dtype: torch.dtype) -> tuple[Run, Run]:
    q, k, v = tensors(case, dtype)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    result = F.scaled_dot_product_attention(*leaves, is_causal=case.causal)
    dout = torch.randn_like(q)
    out, lse = fc.attention(q, k, v, causal=case.causal, return_lse=True)
    ours = lambda: fc.attention_backward(dout, q, k, v, out, lse, causal=case.causal)  # noqa: E731
    theirs = lambda: torch.autograd.grad(result, leaves, dout, retain_graph=True)  # noqa: E731
    for mine, other in zip(ours(), theirs(), strict=True):
        check(mine, other, dtype)
    return ours, theirs


def check(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    """A wrong result is not worth timing."""
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance)


def seconds(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    ours, theirs = backward_runs(case, dtype) if case.backward else forward_runs(case, dtype)
    runs = {"flashcore": ours, "torch": theirs}
    repeats = {name: max(1, int(0.02 / max(seconds(run, 2), 1e-7))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name], repeats[name]))
    ratios = [t / f for t, f in zip(times["torch"], times["flashcore"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    pairs = case.batch * case.heads * case.seqlen_q * case.seqlen_k * (0.5 if case.causal else 1)
    operations = 4 * pairs * case.head_dim * (2.5 if case.backward else 1)
    mine = statistics.median(times["flashcore"])
    return {
        "flashcore_ms": mine * 1e3,
        "torch_ms": statistics.median(times["torch"]) * 1e3,
        "gflops": operations / mine * 1e-9,
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()

    cells = []
    print(f"{processor()}, torch {torch.__version__}, load {os.getloadavg()[0]:.2f}")
    print(f"{'case':12} {'dtype':9} {'threads':>7} {'torch ms':>9} {'ms':>9} {'GF/s':>6}  ratio (quartiles)")
    for threads in args.threads:
        torch.set_num_threads(threads)
        fc.set_num_threads(threads)
        for name in args.cases:
            for dtype in args.dtypes:
                cell = measure(CASES[name], getattr(torch, dtype), args.rounds)
                cells.append({"case": name, "dtype": dtype, "threads": threads, **cell})
                print(
                    f"{name:12} {dtype:9} {threads:7} {cell['torch_ms']:9.3f} {cell['flashcore_ms']:9.3f} "
                    f"{cell['gflops']:6.0f}  {cell['ratio']:.2f} ({cell['ratio_low']:.2f}-{cell['ratio_high']:.2f})",
                    flush=True,
                )
    print(f"geometric mean {statistics.geometric_mean(c['ratio'] for c in cells):.2f}, load {os.getloadavg()[0]:.2f}")
    if args.json:
        facts = {"processor": processor(), "torch": torch.__version__, "load": os.getloadavg()[0], "cells": cells}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
