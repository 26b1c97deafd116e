"""`tune`: a search for better tiles of the Hopper kernel; with --rows the best of the kernels that are built."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .. import device_info, load_tuned
from .._core import no_device_reason
from ..bench import cases, provenance, report, results
from ..bench.stage import Stage
from ..device import parse_device
from ..tune import compile, files, rows
from ..tune.instance import Instance, common_instance
from ..tune.judge import GpuJudge
from ..tune.proposal import proposal
from ..tune.search import Search, Settings, compare_finalists
from ..tune.space import Space, Tile
from ..tune.state import Data, State, tile_of
from ..tuning import tuned_path

INTERRUPTED = 130
ELITES, SHOWN = 8, 10
ROW_SECONDS, TILE_SECONDS = 3.0, 0.2

DESCRIPTION = """\
Searches for tiles of the Hopper forward kernel that are faster than those of src/kernels/sm90/tiles.h: each is compiled
from a checkout by nvcc, checked, and timed in turn with the hand-set one. Ends with a table and a change to tiles.h.
With --rows it needs no compiler: it times the kernels that are built, in all their settings, and keeps the best in a
file that FLASHCORE_TUNED or flashcore.load_tuned reads."""
EPILOG = f"""\
examples:
  python -m flashcore tune "{cases.EXAMPLE}" --minutes 5 --save search.json
  python -m flashcore tune "fwd bf16 b8 q2048 k2048 h32 d64" --seed 1
  python -m flashcore tune --rows "decode bf16 b16 q1 k8192 h32/8 d128" @mine.txt --save tuned.txt"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="search for faster tiles; with --rows for the fastest kernels that are built",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lines", nargs="+", metavar="LINE", help="a problem line, or @FILE of them; searched as one")
    parser.add_argument("--rows", action="store_true", help="choose among the kernels that are built")
    parser.add_argument("--device", help='"cpu" (with --rows), "cuda" or "cuda:N"; default: the best there is')
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="the search as JSON, gone on with if it exists; with --rows the file of tuned kernels ($FLASHCORE_TUNED)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of timing: each tile ({TILE_SECONDS:g}), with --rows each line ({ROW_SECONDS:g})",
    )
    search = parser.add_argument_group("search")
    search.add_argument("--minutes", type=float, default=10.0, help="of searching (10)")
    search.add_argument("--generations", type=int, default=1000, help="it ends after so many (1000)")
    search.add_argument("--population", type=int, default=16, help="tiles of a generation (16)")
    search.add_argument("--seed", type=int, default=0, help="of its random numbers (0)")
    search.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time (cores)")
    search.add_argument("--source", type=Path, metavar="DIR", help="the checkout to compile (the current one)")
    search.add_argument(
        "--cache", type=Path, metavar="DIR", help=f"where libraries are kept ({compile.default_cache()})"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    limits = {"--minutes": 0, "--generations": 0, "--population": 1, "--jobs": 1, "--seconds": 0}
    for name, least in limits.items():
        given = getattr(arguments, name[2:])
        if given is not None and given < least:
            raise ValueError(f"{name} {given} given; at least {least} is allowed")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, report.WIDE)
    return _tune_rows(console, arguments) if arguments.rows else _search(console, arguments)


# ---- the kernels that are built --------------------------------------------------------------------------------------


def _tune_rows(console: Console, arguments: argparse.Namespace) -> int:
    target = tuned_path(arguments.save)
    before = files.read(target) if target.exists() else []
    stage = Stage(arguments.device, with_torch=False)
    lines = cases.lines_of(arguments.lines, stage.kind)
    found: list[rows.Finding] = []
    finished = True
    try:
        with _progress() as progress:
            task = progress.add_task("", total=len(lines))
            for line in lines:
                tell = lambda word, line=line: progress.update(task, description=f"{line}: {word}")  # noqa: E731
                found.append(rows.tune(line, stage, arguments.seconds or ROW_SECONDS, tell))
                progress.advance(task)
    except KeyboardInterrupt:
        finished = False
    files.write(target, files.merge(before, found))
    load_tuned(target)
    table = report.table("", "usual", "µs", "fastest", "µs", "usual / fastest", title=stage.info.name)
    for finding in found:
        times = [report.number(finding.seconds[name] * 1e6) for name in (finding.usual, finding.kernel)]
        better = (finding.kernel, times[1], f"{finding.gain:.2f}") if finding.entry else ("the usual one", "", "")
        table.add_row(finding.line, finding.usual, times[0], *better)
    console.print(table)
    kept = sum(finding.entry is not None for finding in found)
    console.print(f"{kept} of {len(found)} tuned, in {target}: FLASHCORE_TUNED={target}", soft_wrap=True, markup=False)
    return 0 if finished else INTERRUPTED


# ---- tiles -----------------------------------------------------------------------------------------------------------


def _search(console: Console, arguments: argparse.Namespace) -> int:
    lines = cases.lines_of(arguments.lines, "cuda")
    instance = common_instance(lines)
    if arguments.save:
        results.check_writable(arguments.save)
    source = compile.find_source(arguments.source)
    device, machine = _hopper(arguments.device)
    name = machine["gpu"]
    compiler = compile.Compiler(source, instance, arguments.cache or compile.default_cache())
    space = Space(instance.bucket, instance.kind, compile.widths_of(source))
    incumbent = compiler.incumbent()
    identity = {"instance": str(instance), "lines": lines, "device": name, "sources": compiler.digest}
    identity |= {"incumbent": asdict(incumbent), "machine": machine}
    state = State(identity, arguments.seed, arguments.population, ELITES, arguments.save)
    resumed = state.resume()
    console.print(f"{instance}: the tile of tiles.h is {incumbent}, on {device} ({name})", markup=False, soft_wrap=True)
    if resumed:
        console.print(f"going on with {len(state.candidates) - 1} tiles of {arguments.save}", markup=False)
    settings = Settings(
        arguments.population,
        arguments.generations,
        arguments.minutes,
        arguments.jobs,
        arguments.seconds or TILE_SECONDS,
        arguments.seed,
    )
    try:
        final = _run(lines, device, space, compiler, state, settings)
    except KeyboardInterrupt:
        state.keep()
        where = f"are in {arguments.save}: the same words go on" if arguments.save else "were not saved"
        told = f"interrupted: {len(state.candidates) - 1} tiles {where}"
        Console(stderr=True).print(told, style="yellow", markup=False, soft_wrap=True)
        return INTERRUPTED
    _report(console, state, final, source, instance)
    return 0


def _hopper(device: Any) -> tuple[str, Data]:
    """The GPU that tiles are timed on, and what is told of it. Raises ValueError where its capability is not 9.0."""
    needed = "tiles are those of the Hopper kernel, timed on a GPU of compute capability 9.0"
    cuda, index = parse_device(device)
    if not cuda:
        reason = no_device_reason() or f"{device} given"
        raise ValueError(f"{needed}: {reason}. With --rows the kernels that are built are timed on any device")
    info = device_info(index)
    if info.compute_capability[0] != 9:
        raise ValueError(f"{needed}: cuda:{index} ({info.name}) has {'{}.{}'.format(*info.compute_capability)}")
    return f"cuda:{index}", provenance.gpu(index) | provenance.provenance()


def _run(
    lines: list[str], device: str, space: Space, compiler: compile.Compiler, state: State, settings: Settings
) -> Data:
    built = compiler.build(None)
    if not built.library:
        raise RuntimeError(f"the hand-set tile cannot be compiled: {built.reason}")
    judge = GpuJudge(lines, device, built.library)
    begin = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder, _progress() as progress:
            copy = Path(shutil.copy(built.library, Path(folder, "copy.so")))
            task = progress.add_task("the inputs", total=max(settings.minutes * 60, 1))
            same = judge.judge(None, copy, settings.seconds)  # an error here is no tile's
            if same.reason:
                raise RuntimeError(f"the hand-set tile cannot be timed: {same.reason}")

            def tell(candidate: Data) -> None:
                best = state.elites[0]
                told = f"{candidate['id']} tiles, the best {tile_of(best)}: {best['gain']:.3f}"
                progress.update(task, description=told, completed=time.monotonic() - begin)

            Search(space, compiler, judge, state, settings, tell).run()
            progress.update(task, description="the best once more")
            return compare_finalists(compiler, judge, state, settings.seconds, copy)
    finally:
        judge.close()


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield progress


def _report(console: Console, state: State, final: Data, source: Path, instance: Instance) -> None:
    candidates = state.candidates
    rejected = Counter(_kind(candidate["reason"]) for candidate in candidates if candidate["reason"])
    timed = [candidate for candidate in candidates[1:] if candidate["gain"] is not None]
    told = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
    console.print(
        f"{len(candidates) - 1} tiles: {len(timed)} timed, {sum(rejected.values())} refused{told and f' ({told})'}; "
        f"{sum(state.data['pruned'].values())} passed over without compiling",
        markup=False,
        soft_wrap=True,
    )
    again = {finalist["id"]: finalist["gain"] for finalist in final["finalists"]}
    table = report.table(
        "tile", "from", "µs", "gain", "low", "high", "once more", title="hand-set time over the tile's"
    )
    best = sorted(timed, key=lambda candidate: (-again.get(candidate["id"], 0.0), -candidate["gain"]))
    for candidate in best[:SHOWN]:
        verdict = candidate["verdict"]
        gains = list(verdict["gains"].values())
        spread = [f"{min(gain[part] for gain in gains):.3f}" for part in ("low", "high")]
        us = " ".join(report.number(us) for us in verdict["us"].values())
        more = f"{again[candidate['id']]:.3f}" if candidate["id"] in again else ""
        style = "green" if candidate["id"] == final["winner"] else None
        row = (str(tile_of(candidate)), candidate["born"], us, f"{candidate['gain']:.3f}", *spread, more)
        table.add_row(*row, style=style)
    console.print(table)
    incumbent = tile_of(candidates[0])
    if final["winner"] is None:
        console.print(
            f"nothing beat the hand-set tile {incumbent} by more than the noise of {final['noise']:.1%}: "
            "tiles.h stays as it is",
            markup=False,
            soft_wrap=True,
        )
        return
    winner: Tile = tile_of(candidates[final["winner"]])
    console.print(
        f"{winner} gains {again[final['winner']] - 1:.1%}, the noise is {final['noise']:.1%}. Its line serves other "
        "problems, too: full and positional, float16 and bfloat16. Measure those before it is taken over.",
        markup=False,
        soft_wrap=True,
    )
    console.print(proposal(source, instance, incumbent, winner), markup=False, soft_wrap=True)


def _kind(reason: str) -> str:
    """A reason without its numbers."""
    return reason.split(" bytes")[0].split(":")[0].rstrip(" 0123456789")
