"""What a device can do at most, measured: a large matrix product, a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Optional

import numpy as np

from .. import _core
from .stage import Stage

GPU_MATRIX, CPU_MATRIX = 8192, 1024
GPU_COPY_BYTES, CPU_COPY_BYTES = 1 << 29, 1 << 27
SECONDS = 0.3
TORCH_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def _sampled_seconds(stage: Stage, call: Callable[[], Any]) -> list[float]:
    def queue(repeats: int) -> None:
        for _ in range(repeats):
            call()

    queue(2)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        times.append(stage.clock(queue, 2) / 2)
    return times


def matmul_tflops(stage: Stage, dtype: str) -> Optional[float]:
    """TFLOP/s of the quickest square product of `dtype`; None where there is none. Processors without arithmetic of 16
    bits multiply such numbers as float32, so on the CPU that counts, too."""
    ways = [dtype, "fp32"] if not stage.cuda and dtype in ("fp16", "bf16") else [dtype]
    return max(filter(None, (_product_tflops(stage, way) for way in ways)), default=None)


def _product_tflops(stage: Stage, dtype: str) -> Optional[float]:
    """By torch (on the CPU also by NumPy). The quickest sample counts: a ceiling is what can be reached, and a GPU that
    only multiplies may lower its clocks."""
    size = GPU_MATRIX if stage.cuda else CPU_MATRIX
    if stage.torch and dtype in TORCH_NAMES:
        kind = getattr(stage.torch, TORCH_NAMES[dtype])
        a, b = (stage.torch.randn(size, size, device=stage.device).to(kind) for _ in range(2))
        out = stage.torch.empty_like(a)

        def call() -> Any:
            return stage.torch.matmul(a, b, out=out)
    elif not stage.cuda and dtype in ("fp32", "fp64"):
        rng = np.random.default_rng(0)
        x, y = (rng.standard_normal((size, size)).astype(TORCH_NAMES[dtype]) for _ in range(2))
        product = np.empty_like(x)

        def call() -> Any:
            return np.matmul(x, y, out=product)
    else:
        return None
    return 2 * size**3 / min(_sampled_seconds(stage, call)) / 1e12


def copy_call(stage: Stage, size: int) -> Callable[[], Any]:
    """A call that copies so many bytes within the device's memory, from and to memory of its own."""
    source, target = (stage.maker.empty((size,), "bool") for _ in range(2))
    if not stage.cuda:  # memory that was never written is not there yet
        for array in (source, target):
            np.from_dlpack(array)[:] = False
    return lambda: _core.copy_within(target, source, stage.stream or 0)


def copy_gbs(stage: Stage) -> float:
    """GB/s of a large copy, bytes read and bytes written both counted."""
    size = GPU_COPY_BYTES if stage.cuda else CPU_COPY_BYTES
    times = _sampled_seconds(stage, copy_call(stage, size))
    return 2 * size / float(np.median(times)) / 1e9


def measure(stage: Stage, dtypes: list[str]) -> dict[str, Any]:
    products = {dtype: matmul_tflops(stage, dtype) for dtype in dtypes}
    stage.forget()
    copy = copy_gbs(stage)
    stage.forget()
    return {"matmul_tflops": {dtype: value for dtype, value in products.items() if value}, "copy_gbs": copy}


def highest(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements, each at its better."""
    products = {**first["matmul_tflops"]}
    for dtype, value in second["matmul_tflops"].items():
        products[dtype] = max(value, products.get(dtype, 0))
    return {"matmul_tflops": products, "copy_gbs": max(first["copy_gbs"], second["copy_gbs"])}
