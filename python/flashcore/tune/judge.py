"""What a tile is worth: right or not, and how fast beside the one that is there. Judged in a process of its own: a
kernel may hang, or break what the process has on the GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol

from . import worker
from .space import Tile
from .verdict import Verdict

#: a process has so long to make its inputs, and then for each library, beside the seconds of timing
START_SECONDS, ANSWER_SECONDS = 240.0, 30.0
#: each library brings a CUDA runtime of its own, of which a process holds only so many
MOST_LIBRARIES = 150


class Judge(Protocol):
    """What the search needs to know of a tile."""

    def judge(self, tile: Optional[Tile], library: Path, seconds: float) -> Verdict:
        """Checks, then times for so many seconds a line. `tile` None is a copy of the incumbent."""

    def close(self) -> None:
        """Ends what runs. The next question starts anew."""


class GpuJudge:
    """On a GPU, in a worker that is ended and started anew where it does not answer."""

    def __init__(
        self, lines: Sequence[str], device: str, incumbent: Path, serve: Callable[..., None] = worker.serve
    ) -> None:
        self._serve = serve
        self._start = (list(lines), device, str(incumbent))
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None
        self._libraries = 0  # that the process has loaded

    def judge(self, tile: Optional[Tile], library: Path, seconds: float) -> Verdict:
        """Raises RuntimeError where not even the incumbent can be run."""
        if self._process is None:
            self._begin()
        limit = ANSWER_SECONDS + 2 * seconds * len(self._start[0])
        try:
            self._pipe.send((str(library), seconds))
            if not self._pipe.poll(limit):
                self._end()
                return Verdict(f"hangs: no answer in {limit:.0f} s")
            verdict, broken = self._pipe.recv()
        except (EOFError, OSError):
            code = self._end()
            return Verdict(f"ends the process ({code})")
        self._libraries += 1
        if broken or self._libraries >= MOST_LIBRARIES:
            self._end()
        return Verdict(**verdict)

    def close(self) -> None:
        if self._process is not None:
            self._end()

    def _begin(self) -> None:
        self._libraries = 0
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=self._serve, args=(theirs, *self._start), daemon=True)
        self._process.start()
        theirs.close()
        try:
            why = self._pipe.recv() if self._pipe.poll(START_SECONDS) else f"no answer in {START_SECONDS:.0f} s"
        except EOFError:
            why = "the process ended"
        if why:
            self._end()
            raise RuntimeError(f"the hand-set tile cannot be timed: {why}")

    def _end(self) -> Optional[int]:
        process, self._process = self._process, None
        self._pipe.close()
        process.join(1.0)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode
