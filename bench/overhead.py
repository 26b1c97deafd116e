"""What one call costs beside the kernel: the host's time of a call on tiny inputs, in each face of flashcore.

The C++ call is timed by a loop inside the module; `_core.forward` adds to it the reading of prepared arguments. All
contenders of a framework take turns in one process; what counts is the smallest of many rounds, so that the work of
other processes is left out. On a GPU it is what a call takes until it returns. Frameworks that are not installed, or
cannot use the device, are left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import flashcore as fc
import numpy as np
from flashcore import _core
from flashcore.bench import provenance
from flashcore.bench.results import check_writable, save
from flashcore.bench.stage import Stage
from flashcore.interop import classify
from flashcore.options import convert

NATIVE = "the C++ call"
Calls = dict[str, Callable[[], Any]]


def importable(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def runs(name: str, function: Callable[[], Any]) -> bool:
    """Whether a contender can do this at all here; said if not."""
    try:
        function()
    except Exception as error:
        print(f"without {name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def microseconds(functions: Calls, calls: int, repeats: int, settle: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Time of one call of each, over `repeats` rounds of `calls` calls."""
    rounds: dict[str, list[float]] = {name: [] for name in functions if runs(name, functions[name])}
    for _ in range(repeats):
        for name in rounds:
            function = functions[name]
            settle()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            rounds[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: {"us": round(min(us), 3), "median_us": round(median(us), 3)} for name, us in rounds.items()}


# ---- contenders ------------------------------------------------------------------------------------------------------


def raw_calls(q: Any, k: Any, v: Any) -> Calls:
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


def torch_calls(q: Any, k: Any, v: Any) -> Calls:
    import flashcore.torch as fct
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    compiled, compiled_sdpa = (
        torch.compile(lambda *x, call=call: call(*x), fullgraph=True, backend="aot_eager")
        for call in (fct.attention, sdpa)
    )
    calls: Calls = {
        "torch.attention": lambda: fct.attention(q, k, v),
        "torch.scaled_dot_product_attention": lambda: fct.scaled_dot_product_attention(q, k, v),
        "SDPA": lambda: sdpa(q, k, v),
        "torch.attention, gradient to come": lambda: fct.attention(*leaves),
        "torch.scaled_dot_product_attention, gradient to come": lambda: fct.scaled_dot_product_attention(*leaves),
        "SDPA, gradient to come": lambda: sdpa(*leaves),
        "torch.attention, both ways": lambda: torch.autograd.grad(fct.attention(*leaves), leaves, q),
        "SDPA, both ways": lambda: torch.autograd.grad(sdpa(*leaves), leaves, q),
        "torch.attention, compiled": lambda: compiled(q, k, v),
        "SDPA, compiled": lambda: compiled_sdpa(q, k, v),
    }
    if q.is_cuda and (flash_attn := importable("flash_attn")):
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        calls["flash_attn"] = lambda: flash_attn.flash_attn_func(*rows)
    return calls


def jax_calls(jax: Any, q: Any, k: Any, v: Any) -> Calls:
    import flashcore.jax as fcj

    ours = jax.jit(lambda *x: fcj.attention(*x, layout="bshd"))
    peer = jax.jit(jax.nn.dot_product_attention)
    return {"jax.attention, jit": lambda: ours(q, k, v), "jax.nn.dot_product_attention, jit": lambda: peer(q, k, v)}


# ---- frameworks ------------------------------------------------------------------------------------------------------


def native_microseconds(q: Any, k: Any, v: Any, calls: int, repeats: int, settle: Callable[[], Any]) -> float:
    framework = classify(q)
    options = convert("bhsd", False, None, None, 0.0, 0.0, 0, False, None)
    arrays, out = (q, k, v) + (None,) * 10, framework.like(q, None)
    rounds = []
    for _ in range(repeats):
        settle()
        rounds.append(_core.time_forward(framework.bridge, arrays, (out, None), options, calls))
    return round(min(rounds) * 1e6, 3)


def contenders(
    stage: Stage, arrays: list[np.ndarray]
) -> Iterator[tuple[str, list[Any], Callable[[], Any], Callable[[], Calls]]]:
    """(framework, its arrays, how to wait for the device, its calls)."""
    half = [x.astype(np.float16) for x in arrays]
    if not stage.cuda:
        yield "numpy", arrays, lambda: None, lambda: raw_calls(*arrays)
    if torch := stage.torch:
        tensors = [torch.from_numpy(x).to(stage.device) for x in (half if stage.cuda else arrays)]
        settle = torch.cuda.synchronize if stage.cuda else lambda: None
        yield "torch", tensors, settle, lambda: raw_calls(*tensors) | torch_calls(*tensors)
    if stage.cuda and (cupy := importable("cupy")):
        on_gpu = [cupy.asarray(x) for x in half]
        yield "cupy", on_gpu, cupy.cuda.Device(stage.index).synchronize, lambda: raw_calls(*on_gpu)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # memory is torch's, too
    if (jax := importable("jax")) and (jax.default_backend() == "cpu") != stage.cuda:
        given = [jax.numpy.asarray(x) for x in (half if stage.cuda else arrays)]
        yield "jax", given, lambda: (given[0] + 1).block_until_ready(), lambda: jax_calls(jax, *given)


def measure(stage: Stage, shape: tuple[int, ...], calls: int, repeats: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype(np.float32) for _ in range(3)]
    for framework, arrays, settle, make in contenders(stage, inputs):
        entry: dict[str, Any] = {"framework": framework, "dtype": str(arrays[0].dtype).removeprefix("torch.")}
        if framework != "jax":
            entry["native_us"] = native_microseconds(*arrays, calls, repeats, settle)
        yield entry | {"calls": microseconds(make(), calls, repeats, settle)}


def show(entry: dict[str, Any]) -> None:
    base = entry.get("native_us")
    print(f"{entry['framework']}, {entry['dtype']}" + (f": {NATIVE} takes {base:.2f} us" if base else ""))
    for what, cost in entry["calls"].items():
        print(f"  {what:<54}{cost['us']:8.2f} us" + (f"{cost['us'] - base:+8.2f} us" if base else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:N"; default: the best there is')
    parser.add_argument("--calls", type=int, default=50, help="of a round (50)")
    parser.add_argument("--repeats", type=int, default=400, help="rounds (400)")
    parser.add_argument("--seqlen", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=8)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write JSON")
    given = parser.parse_args()
    try:
        if given.save:
            check_writable(given.save)
        stage = Stage(given.device)
    except ValueError as wrong:
        print(f"overhead.py: {wrong}", file=sys.stderr)
        return 2
    shape = (1, 1, given.seqlen, given.head_dim)
    data: dict[str, Any] = {"machine": provenance.machine(stage)}
    data |= {"settings": {"shape": shape, "calls": given.calls, "repeats": given.repeats}, "cases": []}
    for entry in measure(stage, shape, given.calls, given.repeats):
        show(entry)
        data["cases"].append(entry)
    if given.save:
        save(given.save, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
