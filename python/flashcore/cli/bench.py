"""`bench`: flashcore beside other libraries, timed in turn in one process."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import _core
from ..bench import arrays, calls, cases, ceilings, compare, ladder, peers, plot, provenance, report, results
from ..bench.run import Settings, kernels_of, measure
from ..bench.stage import CACHES, CLOCKS, Stage
from ..bench.timing import SAMPLE_SECONDS, Plan
from ..device import parse_device

INTERRUPTED = 130
NORMAL, THOROUGH = (20, 100, 60.0), (100, 1000, 600.0)

DESCRIPTION = """\
Times problems beside the attention of other libraries: the same values, one process, one clock, in turn.
On a GPU by CUDA events around CUDA-graph replays, on inputs that rotate through more than the L2 cache."""
EPILOG = f"""\
examples:
  python -m flashcore bench                                    the mission shape
  python -m flashcore bench training decode --save new.json
  python -m flashcore bench "{cases.EXAMPLE}" @mine.txt
  python -m flashcore bench training --compare old.json        exit status 1 where one is slower or fails
  python -m flashcore bench --ladder --plot climb.svg
  python -m flashcore bench --load new.json --csv new.csv --plot new.png"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time problems beside other libraries",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what")
    what.add_argument("cases", nargs="*", metavar="CASE", help="a name (see --list), a problem line, or @FILE of both")
    what.add_argument("--list", action="store_true", help="print the names and the lines that they stand for")
    what.add_argument("--ladder", action="store_true", help="the climb from the scalar kernel to the chosen one")
    kernel_help = 'also this kernel: "cpu.flash", or in a setting, "cpu.flash:avx2"; may be repeated'
    what.add_argument("--kernel", action="append", default=[], help=kernel_help)
    what.add_argument("--once", action="store_true", help="only call each case, a single time: for a profiler")
    what.add_argument("--peers", metavar="NAMES", help="other libraries, by commas: " + _peer_names())
    what.add_argument("--peer-file", type=Path, help="a Python file with a dict PEERS of more of them")
    what.add_argument("--device", help='"cpu", "cuda" or "cuda:N"; default: the best there is')
    how = parser.add_argument_group("how")
    how.add_argument("--warm-up", type=int, help=f"rounds before those that count ({NORMAL[0]})")
    how.add_argument("--iterations", type=int, help=f"rounds that count ({NORMAL[1]})")
    how.add_argument("--seconds", type=float, help=f"a case ends early after so long ({NORMAL[2]:g})")
    how.add_argument("--thorough", action="store_true", help="{} + {} rounds, {:g} s".format(*THOROUGH))
    how.add_argument("--clock", choices=CLOCKS, default="events", help="on a GPU; wall: the host's, call by call")
    how.add_argument("--caches", choices=CACHES, default="rotate", help="what a call finds in the GPU's L2 cache")
    how.add_argument(
        "--inputs", choices=arrays.INPUTS, default="normal", help="rising: keys whose scores outgrow each other"
    )
    how.add_argument("--no-ceilings", action="store_true", help="do not measure the matmul and copy ceilings")
    where = parser.add_argument_group("results")
    where.add_argument("--save", type=Path, metavar="FILE", help="write JSON, after every case")
    where.add_argument("--resume", action="store_true", help="go on with the file of --save")
    where.add_argument("--load", type=Path, metavar="FILE", help="show a saved result instead of measuring")
    where.add_argument("--csv", type=Path, metavar="FILE", help="write CSV")
    where.add_argument(
        "--compare", type=Path, metavar="FILE", help="against an older result: 1 where one is slower or fails"
    )
    where.add_argument("--plot", type=Path, metavar="FILE", help="draw speeds, or the ladder, as PNG or SVG")
    where.add_argument("--roofline", type=Path, metavar="FILE", help="draw the roofline as PNG or SVG")
    return parser


def _peer_names() -> str:
    return f"on a GPU {', '.join(peers.PEERS['cuda'])}; on the CPU {', '.join(peers.PEERS['cpu'])}; or none"


def run(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if arguments.list:
        return _list(console, arguments.device)
    if arguments.once:
        return _once(console, arguments)
    _check(arguments)
    old = results.load(arguments.compare) if arguments.compare else None
    if arguments.load:
        data, finished = results.load(arguments.load), True
        results.add_rates(data)
        if old:
            compare.check_common(arguments.compare, old, [entry["line"] for entry in data["cases"]])
    else:
        data, finished = _measure(console, arguments, old)
    _show(console, data, arguments)
    worse = _compare(console, old, data) if old else False
    if not finished:
        return INTERRUPTED
    return 1 if worse or not any(entry["results"] for entry in data["cases"]) else 0


def _list(console: Console, device: Any) -> int:
    kind = "cuda" if parse_device(device)[0] else "cpu"
    for name, lines in cases.CASES[kind].items():
        console.print(f"{name}:", style="bold")
        for line in lines:
            console.print(f"  {line}", markup=False)
    return 0


def _once(console: Console, arguments: argparse.Namespace) -> int:
    """As attention_bench --once: no other library, and no kernels of anyone but flashcore."""
    stage = Stage(arguments.device, with_torch=False)
    for line in cases.lines_of(arguments.cases or ["mission"], stage.kind):
        case = cases.parse(line)
        calls.ours(case, arrays.make(case, stage.maker, results=True), stage.stream)()
        stage.wait()
        console.print(f"{line}  {kernels_of(line, stage.device)[0]}", markup=False, soft_wrap=True)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Everything that could fail at the end fails at the beginning."""
    for path in filter(None, (arguments.save, arguments.csv, arguments.plot, arguments.roofline)):
        results.check_writable(path)
    for path in filter(None, (arguments.plot, arguments.roofline)):
        plot.check_path(path)
    if arguments.resume and not arguments.save:
        raise ValueError("--resume goes on with the file of --save, and none is given")
    if arguments.ladder and arguments.cases:
        raise ValueError("--ladder has a case of its own; give no others")
    limits = {
        "--warm-up": (arguments.warm_up, 0),
        "--iterations": (arguments.iterations, 1),
        "--seconds": (arguments.seconds, 0),
    }
    for name, (given, least) in limits.items():
        if given is not None and not least <= given < math.inf:  # so written, it refuses NaN
            raise ValueError(f"{name} {given} given; a finite number of at least {least} is allowed")


def _plan(arguments: argparse.Namespace) -> Plan:
    warm_up, rounds, seconds = THOROUGH if arguments.thorough else NORMAL
    warm_up = warm_up if arguments.warm_up is None else arguments.warm_up
    rounds = rounds if arguments.iterations is None else arguments.iterations
    seconds = seconds if arguments.seconds is None else arguments.seconds
    return Plan(warm_up, rounds, seconds, 0 if arguments.caches == "flush" else SAMPLE_SECONDS)


def _contenders(console: Console, stage: Stage, arguments: argparse.Namespace) -> list[peers.Peer]:
    names = arguments.peers.split(",") if arguments.peers is not None else None
    chosen, missing = peers.choose(stage, [] if names == ["none"] else names)
    for name, why in missing.items():
        console.print(f"without {name}: {why}", style="dim", markup=False, soft_wrap=True)
    return chosen + (peers.from_file(arguments.peer_file) if arguments.peer_file else [])


def _measure(console: Console, arguments: argparse.Namespace, older: results.Data | None) -> tuple[results.Data, bool]:
    """The result, and whether it is whole. `older`: what it is to be compared with."""
    stage = Stage(arguments.device, arguments.clock, arguments.caches, inputs=arguments.inputs)
    lines = (
        [cases.parse(cases.MISSION).line]
        if arguments.ladder
        else cases.lines_of(arguments.cases or ["mission"], stage.kind)
    )
    kernels = [*arguments.kernel, *(ladder.rungs(lines[0], stage.device) if arguments.ladder else [])]
    if kernels:
        _check_kernels(kernels, lines, stage)
    chosen = _contenders(console, stage, arguments)
    plan = _plan(arguments)
    names = tuple(peer.name for peer in chosen)
    settings = Settings(plan, stage.clock_name, stage.caches, tuple(kernels), names, stage.inputs)
    machine = provenance.machine(stage)
    data: results.Data = {"machine": machine, "settings": settings.as_data(), "ceilings": None, "complete": False}
    data |= {"ladder": arguments.ladder, "cases": []}
    if arguments.resume and arguments.save.exists():
        old = results.load(arguments.save)
        results.check_same_run(arguments.save, old, machine, settings.as_data())
        data |= {"cases": old["cases"], "ceilings": old["ceilings"]}
    if older:
        compare.check_common(arguments.compare, older, [*lines, *_done(data)])
    console.print(report.machine(data), markup=False, soft_wrap=True)
    warning = "" if stage.cuda else provenance.busy(machine["load"], machine["cores"])
    if warning:
        Console(stderr=True).print(warning, style="yellow", markup=False, soft_wrap=True)
    try:
        _measure_all(stage, lines, chosen, settings, data, arguments)
    except KeyboardInterrupt:
        _keep(data, arguments.save)
        done = f"{len(_done(data) & set(lines))} of {len(lines)} cases"
        where = f" are in {arguments.save}: the same words and --resume go on" if arguments.save else ", not saved"
        Console(stderr=True).print(f"interrupted: {done}{where}", style="yellow", markup=False, soft_wrap=True)
        return data, False
    return data, True


def _check_kernels(kernels: list[str], lines: list[str], stage: Stage) -> None:
    names = [name for line in lines for name in kernels_of(line, stage.device)]
    settings = [word for line in lines for word in _core.kernel_choices(line, stage.cuda, stage.index)]
    known = dict.fromkeys([*names, *settings])
    for kernel in kernels:
        if kernel not in known:
            raise ValueError(f'no kernel "{kernel}" for these cases on {stage.device}; allowed: {", ".join(known)}')


def _measure_all(
    stage: Stage,
    lines: list[str],
    chosen: list[peers.Peer],
    settings: Settings,
    data: results.Data,
    arguments: argparse.Namespace,
) -> None:
    done = _done(data) & set(lines)
    dtypes = list(dict.fromkeys(cases.parse(line).dtype for line in lines))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(lines), completed=len(done))
        if not arguments.no_ceilings:
            progress.update(task, description="ceilings")
            _measure_ceilings(stage, dtypes, data)
        for line in lines:
            if line in done:
                continue
            progress.update(task, description=line)
            data["cases"].append(measure(line, stage, chosen, settings))
            progress.advance(task)
            _keep(data, arguments.save)
        if not arguments.no_ceilings:
            progress.update(task, description="ceilings")
            _measure_ceilings(stage, dtypes, data)
    data["complete"] = True
    _keep(data, arguments.save)


def _done(data: results.Data) -> set[str]:
    return {entry["line"] for entry in data["cases"]}


def _measure_ceilings(stage: Stage, dtypes: list[str], data: results.Data) -> None:
    """At the beginning and at the end: what is reached at either time can be reached."""
    with stage.current():
        now = ceilings.measure(stage, dtypes)
    data["ceilings"] = ceilings.highest(data["ceilings"], now) if data["ceilings"] else now


def _keep(data: results.Data, path: Path | None) -> None:
    results.add_rates(data)
    if path:
        results.save(path, data)


def _show(console: Console, data: results.Data, arguments: argparse.Namespace) -> None:
    if data.get("ladder") and data["cases"]:
        console.print(ladder.climb_table(data["cases"][0]))
    report.show(console, data)
    if arguments.csv:
        results.save_csv(arguments.csv, data)
    if arguments.plot and data["cases"]:
        if data.get("ladder"):
            plot.climb(data["cases"][0], arguments.plot)
        else:
            plot.by_seqlen(data, arguments.plot)
    if arguments.roofline and data["cases"]:
        plot.roofline(data, arguments.roofline)


def _compare(console: Console, old: results.Data, data: results.Data) -> bool:
    """Whether something became slower, or fails that did not."""
    for difference in compare.differences(old, data):
        console.print(f"the machines or the ways differ: {difference}", style="yellow", markup=False, soft_wrap=True)
    found, failed = compare.changes(old, data), compare.failed(old, data)
    if found or failed:
        console.print(report.changes(found, failed, "flashcore against the older result"))
    drift = ", ".join(f"{name} {ratio:.3f}" for name, ratio in compare.drift(old, data).items())
    if drift:
        console.print(f"the others, new time over old: {drift}", markup=False, soft_wrap=True)
    return bool(failed) or any(change.verdict == compare.SLOWER for change in found)
