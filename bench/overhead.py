"""Prints what one call costs beside the kernel: Python's share of `flashcore.attention` on tiny inputs.

The C++ call is timed by a loop inside the module; `_core.forward` adds to it the reading of prepared arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import flashcore as fc
import numpy as np
from flashcore import _core
from flashcore.interop import classify
from flashcore.options import convert


def microseconds(function: Callable[[], Any], calls: int, repeats: int) -> float:
    """Time of one call: the smallest of several repeats, so that other processes' work is left out."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls)
    return min(times) * 1e6


def measure(name: str, q: Any, k: Any, v: Any, calls: int, repeats: int) -> None:
    framework = classify(q)
    out = framework.like(q, None)
    arrays = (q, k, v) + (None,) * 10
    options = convert("bhsd", False, None, None, 0.0, 0.0, 0, False, None)
    plan = fc.plan(q, k, v, out=out)

    def core() -> None:
        _core.forward(framework.bridge, arrays, (out, None), options, -1, -1, None)

    sdpa = None
    if name.startswith("torch"):
        import torch

        sdpa = torch.nn.functional.scaled_dot_product_attention
    native = min(_core.time_forward(framework.bridge, arrays, (out, None), options, calls) for _ in range(repeats))
    base = native * 1e6
    samples = {
        "_core.forward, all prepared": microseconds(core, calls, repeats),
        "plan(q, k, v, out=out)": microseconds(lambda: plan(q, k, v, out=out), calls, repeats),
        "attention(q, k, v, out=out)": microseconds(lambda: fc.attention(q, k, v, out=out), calls, repeats),
        "attention(q, k, v)": microseconds(lambda: fc.attention(q, k, v), calls, repeats),
        "attention(…, causal=True, return_lse=True)": microseconds(
            lambda: fc.attention(q, k, v, causal=True, return_lse=True), calls, repeats
        ),
    }
    if sdpa is not None:
        samples["torch's scaled_dot_product_attention"] = microseconds(lambda: sdpa(q, k, v), calls, repeats)
    print(f"{name}, {tuple(q.shape)}, {q.dtype}: the C++ call takes {base:.2f} us")
    for what, cost in samples.items():
        print(f"  {what:<44}{cost:8.2f} us{cost - base:+8.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--seqlen", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=8)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (1, 1, arguments.seqlen, arguments.head_dim)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    measure("numpy", q, k, v, arguments.calls, arguments.repeats)
    if importlib.util.find_spec("torch"):
        import torch

        measure("torch CPU", *(torch.from_numpy(x) for x in (q, k, v)), arguments.calls, arguments.repeats)


if __name__ == "__main__":
    main()
