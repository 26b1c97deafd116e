"""Prints what one call costs beside the kernel: Python's share of a call on tiny inputs, in each face of flashcore.

The C++ call is timed by a loop inside the module; `_core.forward` adds to it the reading of prepared arguments. All
contenders take turns in one process. On a GPU the time is the host's: what a call takes until it returns.
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


def microseconds(functions: dict[str, Callable[[], Any]], calls: int, repeats: int, settle: Any) -> dict[str, float]:
    """Time of one call of each: the smallest of several rounds, so that other processes' work is left out."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            settle()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            best[name] = min(best[name], (time.perf_counter() - start) / calls * 1e6)
    return best


def raw_calls(q: Any, k: Any, v: Any) -> dict[str, Callable[[], Any]]:
    framework = classify(q)
    out = framework.like(q, None)
    arrays = (q, k, v) + (None,) * 10
    options = convert("bhsd", False, None, None, 0.0, 0.0, 0, False, None)
    plan = fc.plan(q, k, v, out=out)
    return {
        "_core.forward, all prepared": lambda: _core.forward(
            framework.bridge, arrays, (out, None), options, -1, -1, False, None
        ),
        "plan(q, k, v, out=out)": lambda: plan(q, k, v, out=out),
        "attention(q, k, v, out=out)": lambda: fc.attention(q, k, v, out=out),
        "attention(q, k, v)": lambda: fc.attention(q, k, v),
        "attention(…, causal=True, return_lse=True)": lambda: fc.attention(q, k, v, causal=True, return_lse=True),
    }


def torch_calls(q: Any, k: Any, v: Any) -> dict[str, Callable[[], Any]]:
    import flashcore.torch as fct
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(lambda *x: fct.attention(*x, causal=True), fullgraph=True, backend="aot_eager")
    return {
        "torch: attention": lambda: fct.attention(q, k, v),
        "torch: its scaled_dot_product_attention": lambda: fct.scaled_dot_product_attention(q, k, v),
        "torch: SDPA": lambda: sdpa(q, k, v),
        "torch, compiled: attention": lambda: compiled(q, k, v),
        "torch, grad: attention, forward": lambda: fct.attention(*leaves),
        "torch, grad: SDPA, forward": lambda: sdpa(*leaves),
        "torch, grad: attention, both ways": lambda: torch.autograd.grad(fct.attention(*leaves), leaves, q),
        "torch, grad: SDPA, both ways": lambda: torch.autograd.grad(sdpa(*leaves), leaves, q),
    }


def measure(name: str, q: Any, k: Any, v: Any, calls: int, repeats: int, settle: Any = lambda: None) -> None:
    framework = classify(q)
    out = framework.like(q, None)
    arrays = (q, k, v) + (None,) * 10
    options = convert("bhsd", False, None, None, 0.0, 0.0, 0, False, None)
    native = []
    for _ in range(repeats):
        settle()
        native.append(_core.time_forward(framework.bridge, arrays, (out, None), options, calls))
    base = min(native) * 1e6
    functions = raw_calls(q, k, v) | (torch_calls(q, k, v) if name.startswith("torch") else {})
    print(f"{name}, {tuple(q.shape)}, {q.dtype}: the C++ call takes {base:.2f} us")
    for what, cost in microseconds(functions, calls, repeats, settle).items():
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

        tensors = [torch.from_numpy(x) for x in (q, k, v)]
        measure("torch CPU", *tensors, arguments.calls, arguments.repeats)
        if fc.device_count() and torch.cuda.is_available():
            halves = [x.cuda().half() for x in tensors]
            measure("torch CUDA", *halves, arguments.calls, arguments.repeats, torch.cuda.synchronize)


if __name__ == "__main__":
    main()
