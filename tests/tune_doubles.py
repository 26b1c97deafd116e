"""Doubles for the parts of the tuner that need a GPU or a compiler; a module, so that other processes can run them."""

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flashcore.tune.compile import Build
from flashcore.tune.space import Tile
from flashcore.tune.verdict import Verdict

LINE = "fwd bf16 b8 q2048 k2048 h32 d64"


def verdict_of(gain: float) -> Verdict:
    spread = {"low": gain - 0.001, "median": gain, "high": gain + 0.001}
    return Verdict("", {LINE: spread}, {LINE: 100 / gain}, {LINE: 100.0})


@dataclass
class Builder:
    """Builds at once. `refuses` gives a reason for a tile, or nothing."""

    refuses: object = lambda tile: ""
    built: list = field(default_factory=list)
    library: Path = Path("library.so")

    def build(self, tile):
        self.built.append(tile)
        reason = self.refuses(tile)
        return Build(None if reason else self.library, reason, 168)

    def stop(self):
        pass


@dataclass
class Judge:
    """`gain` tells of each tile how much faster it is than the incumbent. `interrupt_after` so many tiles, Ctrl-C."""

    gain: object
    interrupt_after: int = 10**9
    judged: list = field(default_factory=list)

    def judge(self, tile, library, seconds):
        if tile is None:
            return verdict_of(1.0)
        if len(self.judged) == self.interrupt_after:
            raise KeyboardInterrupt
        self.judged.append(tile)
        told = self.gain(tile)
        return Verdict(told) if isinstance(told, str) else verdict_of(told)

    def close(self):
        pass


def likes(best: Tile):
    """A gain that grows with every axis in which a tile is `best`."""

    def gain(tile):
        own, wanted = asdict(tile), asdict(best)
        return 0.9 + 0.02 * sum(own[name] == wanted[name] for name in own if name != "consumer_registers")

    return gain


def serve(pipe, lines, device, incumbent):
    """A worker whose libraries say by their names what happens when they run."""
    if incumbent == "broken":
        pipe.send("no such device")
        return
    pipe.send("")
    while True:
        try:
            path, _ = pipe.recv()
        except EOFError:
            return
        if path == "hangs":
            time.sleep(1000)
        if path == "crashes":
            os._exit(11)
        verdict = Verdict("an illegal instruction") if path == "breaks" else verdict_of(1.5)
        verdict.us["pid"] = float(os.getpid())
        pipe.send((asdict(verdict), path == "breaks"))
