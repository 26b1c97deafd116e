"""The process in which tiles run: holds the inputs, the results that are known to be right, and the incumbent."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..bench import exact
from ..bench.arrays import Arrays, make
from ..bench.calls import ours
from ..bench.cases import Case, parse
from ..bench.stage import Stage
from ..bench.statistics import quartiles, ratio
from ..bench.timing import Contender, Plan, take_rounds
from .instance import Library
from .verdict import Verdict

#: how far results may lie from the library's own, relatively: the rounding of the output, and some more
APART = {"float16": 2e-3, "bfloat16": 1e-2}
#: how much nearer to float64 than this tile the library may be
MOST_ERRORS = 2.0
ROUNDS = 2000


def serve(pipe: Any, lines: list[str], device: str, incumbent: str) -> None:
    """Says "" once it is ready, or why it cannot be; then answers (library, seconds) with (verdict, whether this
    process is of no more use), until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    try:
        stage = Stage(device, with_torch=False)
        known = Library(Path(incumbent))
        benches = [Bench(parse(line), stage, known) for line in lines]
    except Exception as error:
        pipe.send(_one_line(error))
        return
    pipe.send("")
    while True:
        try:
            path, seconds = pipe.recv()
        except EOFError:
            return
        verdict, broken = Verdict(), False
        try:
            library = Library(Path(path))
            for bench in benches:
                bench.judge(library, seconds, verdict)
        except Wrong as error:  # it may have written elsewhere, too
            verdict, broken = Verdict(str(error)), not all(bench.is_intact(known) for bench in benches)
        except Exception as error:  # what CUDA has refused once, it refuses from then on
            verdict, broken = Verdict(_one_line(error)), True
        pipe.send((asdict(verdict), broken))


class Wrong(Exception):
    """A result is wrong: how."""


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _values(bits: Any, dtype: str) -> Any:
    """float32 values of 16-bit ones, flat."""
    flat = bits.reshape(-1)
    return (flat.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else flat.astype(np.float32)


class Bench:
    """One problem line."""

    def __init__(self, case: Case, stage: Stage, incumbent: Library) -> None:
        self._case, self._stage = case, stage
        self._sets: list[Arrays] = [make(case, stage.maker, results=True) for _ in range(stage.copies(case.bytes))]
        out = self._sets[0]["out"]
        self._poison = np.full(out.shape, 0xFFFF, np.uint16)  # NaN, in float16 and in bfloat16
        self._sample = exact.sample(case, self._sets[0], stage.maker)
        arrays = self._sets[0]
        right = ours(case, arrays, stage.stream)
        right()
        stage.wait()
        if self._sample:
            self._error = self._sample.error(out, "bhsd")
        self._right = _values(stage.maker.host(out), out.dtype)
        self._norm = max(float(np.linalg.norm(self._right)), 1e-30)
        self._incumbent = self._contender("incumbent", incumbent)

    def judge(self, library: Library, seconds: float, verdict: Verdict) -> None:
        line, stage = self._case.line, self._stage
        candidate = self._contender("candidate", library)
        take_rounds([self._incumbent, candidate], stage.clock, Plan(2, ROUNDS, seconds))
        verdict.gains[line] = ratio(self._incumbent.samples, candidate.samples)
        verdict.us[line] = quartiles(candidate.samples)["median"] * 1e6
        verdict.incumbent_us[line] = quartiles(self._incumbent.samples)["median"] * 1e6

    def is_intact(self, incumbent: Library) -> bool:
        """Whether the incumbent is still right."""
        try:
            self._check(incumbent.call(self._case, self._sets[0], self._stage))
        except Wrong:
            return False
        return True

    def _contender(self, name: str, library: Library) -> Contender:
        """Checked, loaded and recorded."""
        calls: list[Callable[[], Any]] = [library.call(self._case, arrays, self._stage) for arrays in self._sets]
        self._check(calls[0])
        for call in calls[1:]:
            call()
        self._stage.wait()
        return self._stage.contender(name, calls, torchs=False)

    def _check(self, call: Callable[[], Any]) -> None:
        from .. import _core

        out = self._sets[0]["out"]
        _core.copy_in(out, self._poison.ctypes.data, self._poison.nbytes, self._stage.stream or 0)
        call()
        self._stage.wait()
        if self._sample:
            error, limit = self._sample.error(out, "bhsd"), MOST_ERRORS * self._error
            if not error <= limit:
                raise Wrong(f"wrong: error {error:.1e} against float64, {limit:.1e} is allowed")
        got = _values(self._stage.maker.host(out), out.dtype)
        apart = float(np.linalg.norm(got - self._right)) / self._norm
        if not apart <= APART[out.dtype]:
            raise Wrong(f"wrong: {apart:.1e} from the library's own result, {APART[out.dtype]:.1e} is allowed")
