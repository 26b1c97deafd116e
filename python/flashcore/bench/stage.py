"""Where contenders meet: one device, one clock, one stream, and the inputs that all of them read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Optional

from .. import _core, device_info
from ..device import Device, parse_device
from .arrays import Arrays, Maker
from .timing import Contender

MOST_COPIES = 64
LONG_CALL = 0.05
CACHES = ("rotate", "flush", "warm")
CLOCKS = ("events", "wall")

Calls = list[Callable[[], Any]]


@cache
def _stopwatch(cuda: bool, index: int) -> Any:
    """One a device for the whole process: memory that is kept for reuse belongs to its stream."""
    return _core.Stopwatch(cuda, index)


class Stage:
    """A device made ready for measuring.

    `clock` "events" times by CUDA events on `stream`, where a contender's work is recorded as a CUDA graph if it can
    be; "wall" by the host's clock around calls made one by one, for libraries that choose their streams themselves. The
    CPU has the host's clock. `torch` is torch where it is wanted and can use the device, else None.
    """

    def __init__(
        self,
        device: Device = None,
        clock: str = "events",
        caches: str = "rotate",
        with_torch: bool = True,
        inputs: str = "normal",
    ) -> None:
        self.cuda, self.index = parse_device(device)
        self.info = device_info(f"cuda:{self.index}" if self.cuda else "cpu")
        self.clock_name = clock if self.cuda else "wall"
        self.caches = caches if self.cuda else "warm"
        self._stopwatch = _stopwatch(self.cuda, self.index)
        self.stream: Optional[int] = self._stopwatch.stream if self.cuda else None
        self.maker = Maker(self.cuda, self.index, self.stream or 0, inputs=inputs)
        self.inputs = inputs
        self.torch = self._usable_torch() if with_torch else None
        self._flushed: Any = None

    @property
    def kind(self) -> str:
        return "cuda" if self.cuda else "cpu"

    @property
    def device(self) -> str:
        return f"cuda:{self.index}" if self.cuda else "cpu"

    def _usable_torch(self) -> Any:
        try:
            import torch
        except ImportError:
            return None
        if self.cuda and not (torch.cuda.is_available() and torch.cuda.device_count() > self.index):
            return None
        return torch

    @contextmanager
    def current(self) -> Iterator[None]:
        """In here, torch works on this stage's device and stream."""
        if not (self.cuda and self.torch):
            yield
            return
        with self.torch.cuda.device(self.index), self.torch.cuda.stream(self._torch_stream()):
            yield

    def _torch_stream(self) -> Any:
        return self.torch.cuda.ExternalStream(self.stream, device=self.index)

    def torch_views(self, arrays: Arrays) -> Arrays:
        """The same memory as torch's tensors."""
        return {name: self.torch.from_dlpack(array) for name, array in arrays.items()}

    # ---- time ------------------------------------------------------------------------------------------------------

    def clock(self, queue: Callable[[int], Any], repeats: int) -> float:
        """Seconds of what `queue(repeats)` does."""
        if self.clock_name == "events":
            self._stopwatch.start()
            queue(repeats)
            return float(self._stopwatch.stop())
        self.wait()
        start = time.perf_counter()
        queue(repeats)
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.cuda:
            self._stopwatch.start()
            self._stopwatch.stop()

    def copies(self, needed: float) -> int:
        """How many sets of inputs take turns, so that a call does not find its own in the L2 cache."""
        if not self.cuda or self.caches == "flush":
            return 1
        return min(MOST_COPIES, max(1, -(-2 * self.info.l2_bytes // max(int(needed), 1))))

    def flush(self) -> None:
        """Fills the L2 cache with something else."""
        if self._flushed is None:
            self._flushed = [self.maker.empty((max(self.info.l2_bytes, 1),), "bool") for _ in range(2)]
        target, source = self._flushed
        _core.copy_within(target, source, self.stream or 0)

    # ---- contenders ------------------------------------------------------------------------------------------------

    def contender(
        self, name: str, calls: Calls, torchs: bool, finish: Optional[Callable[[Any], Any]] = None
    ) -> Contender:
        """What the clock is to time. `torchs`: the calls allocate by torch, whose own graphs must then record them.

        `finish` waits for the result of a call on streams that nothing else waits for.
        """
        if self.clock_name == "events":
            if torchs:
                return Contender(name, self._recorded_by_torch(calls), len(calls))
            recording = self._stopwatch.record(lambda: [call() for call in calls])
            return Contender(name, recording.replay, len(calls))
        return self.eager(name, calls, finish)

    def eager(self, name: str, calls: Calls, finish: Optional[Callable[[Any], Any]] = None) -> Contender:
        def queue(repeats: int) -> None:
            for _ in range(repeats):
                for call in calls:
                    result = call()
            if finish:
                finish(result)

        return Contender(name, queue, len(calls))

    def _recorded_by_torch(self, calls: Calls) -> Callable[[int], Any]:
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, stream=self._torch_stream()):
            kept = [call() for call in calls]  # the graph writes to them

        def replay(times: int, results: Any = kept) -> None:
            for _ in range(times):
                graph.replay()

        return replay

    def host_seconds(self, call: Callable[[], Any]) -> float:
        """What the host spends on one call, the device's work left out."""
        repeats = 20 if self.clock(lambda _: call(), 1) < LONG_CALL else 1
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds = (time.perf_counter() - start) / repeats
        self.wait()
        return seconds

    def forget(self) -> None:
        """Gives memory that is kept for reuse back, so that the next case finds it."""
        _core.empty_cache()
        if self.cuda and self.torch:
            self.torch.cuda.empty_cache()
