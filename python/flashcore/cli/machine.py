"""Where the demo runs: on the CPU with NumPy, or on a GPU with the arrays of torch or CuPy."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import device_count, device_info


class Machine:
    """The CPU. Moves arrays to the device and back, and times calls on it."""

    device = "cpu"
    note = ""

    def to_device(self, array: Any) -> Any:
        return array

    def to_host(self, array: Any) -> Any:
        return np.asarray(array)

    def wait(self) -> None:
        """Until the device has done its work."""

    def median_seconds(self, call: Callable[[], Any], budget: float = 1.5) -> float:
        """Median time of one call, after a warm-up, from as many samples as the budget of seconds holds (3 to 50)."""
        call()
        self.wait()
        samples: list[float] = []
        end = time.perf_counter() + budget
        while len(samples) < 3 or (len(samples) < 50 and time.perf_counter() < end):
            start = time.perf_counter()
            call()
            self.wait()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    def name(self) -> str:
        return device_info(self.device).name


class TorchMachine(Machine):
    device = "cuda:0"

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def to_device(self, array: Any) -> Any:
        return self._torch.from_numpy(array).to(self.device)

    def to_host(self, array: Any) -> Any:
        return array.cpu().numpy()

    def wait(self) -> None:
        self._torch.cuda.synchronize()


class CuPyMachine(Machine):
    device = "cuda:0"

    def __init__(self) -> None:
        import cupy  # type: ignore[import-not-found, unused-ignore]

        self._cupy = cupy

    def to_device(self, array: Any) -> Any:
        return self._cupy.asarray(array)

    def to_host(self, array: Any) -> Any:
        return self._cupy.asnumpy(array)

    def wait(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()


def _gpu_machine() -> Machine | None:
    """A GPU needs a library that puts arrays there."""
    if importlib.util.find_spec("torch"):
        machine = TorchMachine()
        if machine._torch.cuda.is_available():
            return machine
    if importlib.util.find_spec("cupy"):
        return CuPyMachine()
    return None


def choose(device: str) -> Machine:
    """The machine for "auto", "cpu" or "cuda"."""
    if device == "cpu" or (device == "auto" and device_count() == 0):
        return Machine()
    if device_count() == 0:
        device_info(0)  # raises, and says why there is no device
    machine = _gpu_machine()
    if machine is not None:
        return machine
    missing = "a GPU is here, but no library that puts arrays on it: pip install torch (with CUDA) or cupy-cuda13x"
    if device == "cuda":
        raise ValueError(missing)
    machine = Machine()
    machine.note = missing
    return machine
