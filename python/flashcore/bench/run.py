"""One run: for each case its contenders, their samples, and what they mean."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

from .. import explain
from . import exact
from .arrays import Arrays, make
from .calls import Call, ours
from .cases import Case, parse
from .peers import CannotDo, Peer
from .provenance import gpu_state
from .results import OURS, Data
from .stage import Stage
from .statistics import ratio, summary
from .timing import Contender, Plan, take_rounds

#: a kernel of ours by its own name, beside the one that is chosen
KERNEL_PREFIX = "flashcore "


@dataclass(frozen=True)
class Settings:
    """How a run measures: what has to be the same for its results to be gone on with."""

    plan: Plan
    clock: str
    caches: str
    kernels: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    inputs: str = "normal"

    def as_data(self) -> Data:
        how = {"clock": self.clock, "caches": self.caches, "inputs": self.inputs}
        return asdict(self.plan) | how | {"kernels": list(self.kernels), "peers": list(self.peers)}


@dataclass
class Entrant:
    """Someone who wants to be timed on a case: makes a call from each set of inputs."""

    name: str
    make: Callable[[Arrays], Call]
    torchs: bool
    finish: Optional[Callable[[Any], Any]] = None
    layout: str = "bhsd"
    kernel: Optional[str] = None


def kernels_of(line: str, device: str) -> list[str]:
    """The names of all kernels that a line could ask for, the chosen one first."""
    found = []
    for text in explain(line, device=device).splitlines():
        if text.startswith("kernel:"):
            found.append(text.removeprefix("kernel:").split()[0])
        elif text.startswith("  "):
            found.append(text.strip().partition(":")[0])
    return list(dict.fromkeys(found))


def measure(line: str, stage: Stage, peers: Sequence[Peer], settings: Settings) -> Data:
    """The result of one case. A contender that cannot do it is named among the failures."""
    case = parse(line)
    entry: Data = {"line": line, "kernel": kernels_of(line, stage.device)[0], "flops": None, "bytes": None}
    entry |= {"ratio_to_best_peer": None, "results": {}, "failures": {}}
    try:
        with stage.current():
            _measure_into(entry, case, stage, peers, settings)
            if stage.cuda:
                entry["gpu_state"] = gpu_state(stage.index)
    finally:
        gc.collect()
        stage.forget()
    return entry


def _measure_into(entry: Data, case: Case, stage: Stage, peers: Sequence[Peer], settings: Settings) -> None:
    try:
        case.check_memory(stage.info.memory_bytes)
        entry |= {"flops": case.flops, "bytes": case.bytes}
        sets = [make(case, stage.maker, results=stage.torch is None) for _ in range(stage.copies(case.bytes))]
    except (MemoryError, ValueError) as error:
        entry["failures"][OURS] = _one_line(error)
        return
    views = _views(stage, sets)
    sample = exact.sample(case, sets[0], stage.maker)
    contenders: list[Contender] = []
    for entrant in _entrants(entry["kernel"], case, stage, peers, settings, torchs=views is not None):
        try:
            contenders.append(_ready(entrant, views if entrant.torchs else sets, stage, sample, entry))
        except Exception as reason:  # a contender that cannot do the case is no reason to stop
            entry["failures"][entrant.name] = _one_line(reason)
            entry["results"].pop(entrant.name, None)
            stage.forget()
    if contenders:
        take_rounds(contenders, stage.clock, settings.plan, stage.flush if stage.caches == "flush" else None)
        _conclude(entry, contenders)


def _views(stage: Stage, sets: list[Arrays]) -> Optional[list[Arrays]]:
    """torch's views where there is torch and it knows the dtypes."""
    if stage.torch is None:
        return None
    try:
        return [stage.torch_views(arrays) for arrays in sets]
    except (RuntimeError, BufferError, TypeError):
        return None


def _entrants(
    chosen: str, case: Case, stage: Stage, peers: Sequence[Peer], settings: Settings, torchs: bool
) -> list[Entrant]:
    def our(name: str, kernel: Optional[str]) -> Entrant:
        return Entrant(name, lambda a: ours(case, a, stage.stream, kernel), torchs, kernel=kernel or chosen)

    def their(peer: Peer) -> Entrant:
        return Entrant(peer.name, lambda a: peer.make(case, a, stage), peer.torchs, peer.finish, peer.layout)

    forced = [our(KERNEL_PREFIX + kernel, kernel) for kernel in settings.kernels]
    return [our(OURS, None), *forced, *map(their, peers)]


def _ready(
    entrant: Entrant, sets: Optional[list[Arrays]], stage: Stage, sample: Optional[exact.Sample], entry: Data
) -> Contender:
    """Has run once: what it gives is compared with float64, and its kernels are loaded."""
    if sets is None:
        raise CannotDo("torch cannot read these arrays")
    calls = [entrant.make(arrays) for arrays in sets]
    result = calls[0]()
    stage.wait()
    facts: Data = {"error": sample.error(result, entrant.layout) if sample else None}
    if entrant.finish:
        entrant.finish(result)
    if entrant.kernel:
        facts["kernel"] = entrant.kernel
    if stage.cuda:
        facts["host_us"] = stage.host_seconds(calls[0]) * 1e6
    for call in calls[1:]:
        call()
    stage.wait()
    try:
        contender = stage.contender(entrant.name, calls, entrant.torchs, entrant.finish)
        facts["graph"] = stage.clock_name == "events"
    except RuntimeError:  # not made for graphs: its calls are queued one by one
        contender = stage.eager(entrant.name, calls, entrant.finish)
        facts["graph"] = False
    entry["results"][entrant.name] = facts
    return contender


def _one_line(reason: Exception) -> str:
    text = str(reason).strip().splitlines()
    if not text:
        return "out of memory" if isinstance(reason, MemoryError) else type(reason).__name__
    known = isinstance(reason, (CannotDo, ValueError, MemoryError))
    return (text[0] if known else f"{type(reason).__name__}: {text[0]}")[:300]


def _conclude(entry: Data, contenders: list[Contender]) -> None:
    for contender in contenders:
        entry["results"][contender.name] |= summary(contender.samples) | {"repeats": contender.repeats}
        entry["results"][contender.name]["calls_in_turn"] = contender.per_queue
    by_name = {contender.name: contender for contender in contenders}
    theirs = [c for c in contenders if c.name != OURS and not c.name.startswith(KERNEL_PREFIX)]
    if OURS in by_name and theirs:
        mine = entry["results"][OURS]["us"]
        best = min(theirs, key=lambda contender: entry["results"][contender.name]["us"])
        entry["best_peer"] = best.name
        entry["ratio_to_best_peer"] = entry["results"][best.name]["us"] / mine
        entry["ratio_spread"] = ratio(best.samples, by_name[OURS].samples)
