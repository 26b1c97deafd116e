"""Times vector_add and reduce beside torch, CuPy and NumPy: same values, one process, in turn.

    python bench/primitives.py                                   # 64 and 256 MiB of each; --thorough: 1 GiB, too
    python bench/primitives.py "add fp16 33554432" "sum fp32 4096x4096 axis0"
    python bench/primitives.py --save bench/results/NAME.json --csv NAME.csv

A case is an operation (add, sum, max, min, mean), a dtype (fp16, bf16, fp32, fp64), a shape, and the axis that is
reduced; without one everything is. GB/s counts each byte that has to be read or written once. Shares are those of two
copies within the same memory, bytes read and bytes written both counted: of a large one, measured once, and of one that
moves as many bytes as the case, in turn with the contenders.
scripts/update_docs.py makes the table of docs/primitives.md from the saved file.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flashcore as fc
import numpy as np
from flashcore.bench import ceilings, provenance, report
from flashcore.bench.arrays import NAMES, decode
from flashcore.bench.results import check_same_run, check_writable, save
from flashcore.bench.stage import CACHES, Stage
from flashcore.bench.statistics import summary
from flashcore.bench.timing import Contender, Plan, take_rounds
from rich.console import Console
from rich.progress import track

OURS, COPY = "flashcore", "copy"
INTERRUPTED = 130
OPERATIONS = ("add", "sum", "max", "min", "mean")
SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
SIZES_MIB, THOROUGH_MIB = (64, 256), 1024
NORMAL, THOROUGH = (20, 100, 10.0), (100, 1000, 60.0)
#: elements that a sample of results is made of
SAMPLED = 1 << 21
EXAMPLE = '"add fp32 16777216" or "sum fp16 4096x4096 axis0"'
SUMMARY = ("us_mean", "us_std", "us", "us_p95", "us_p99")
COLUMNS = ("case", "contender", *SUMMARY, "gbs", "share_copy", "share_same_copy", "error")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    op: str
    dtype: str
    shape: tuple[int, ...]
    axis: int | None = None

    @property
    def line(self) -> str:
        axis = "" if self.axis is None else f" axis{self.axis}"
        return f"{self.op} {self.dtype} {'x'.join(map(str, self.shape))}{axis}"

    @property
    def left(self) -> tuple[int, ...]:
        """The shape of the result."""
        if self.op == "add":
            return self.shape
        return () if self.axis is None else self.shape[: self.axis] + self.shape[self.axis + 1 :]

    @property
    def sums(self) -> bool:
        return self.op in ("sum", "mean")

    @property
    def bytes(self) -> int:
        inputs = 2 if self.op == "add" else 1
        return (inputs * math.prod(self.shape) + math.prod(self.left)) * SIZES[self.dtype]


def parse(line: str) -> Case:
    """Raises ValueError saying which word is wrong."""

    def wrong(word: str, allowed: str) -> ValueError:
        return ValueError(f'"{line}": "{word}" given; {allowed}; for example {EXAMPLE}')

    words = line.split()
    op, dtype, shape, *rest = words + [""] * (3 - len(words))
    if op not in OPERATIONS:
        raise wrong(op, f"an operation of {', '.join(OPERATIONS)} comes first")
    if dtype not in SIZES:
        raise wrong(dtype, f"a dtype of {', '.join(SIZES)} comes second")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise wrong(shape, "a shape of sizes with x between comes third")
    case = Case(op, dtype, tuple(map(int, shape.split("x"))))
    if not rest:
        return case
    if op == "add" or len(rest) > 1:
        raise wrong(rest[-1], "nothing may follow there")
    axis = re.fullmatch(r"axis(\d+)", rest[0])
    if not axis or int(axis[1]) >= len(case.shape):
        raise wrong(rest[0], f"axis0 to axis{len(case.shape) - 1} may follow")
    return Case(op, dtype, case.shape, int(axis[1]))


def default_cases(thorough: bool = False) -> Iterator[Case]:
    for mib, dtype in itertools.product(
        (*SIZES_MIB, THOROUGH_MIB) if thorough else SIZES_MIB, ("fp32", "fp16", "bf16")
    ):
        count = (mib << 20) // SIZES[dtype]
        yield Case("add", dtype, (count,))
        yield Case("sum", dtype, (count,))
        if dtype == "fp32":
            yield from (Case(op, dtype, (count,)) for op in ("max", "mean"))
        for axis in (0, 1):
            yield Case("sum", dtype, (4096, count // 4096), axis)
        yield Case("max", dtype, (count // 64, 64), 1)


# ---- who is timed ----------------------------------------------------------------------------------------------------


def our_call(case: Case, arrays: list[Any], stage: Stage) -> Call:
    *inputs, out = arrays
    if case.op == "add":
        return lambda: fc.vector_add(*inputs, out=out, stream=stage.stream)
    return lambda: fc.reduce(*inputs, case.op, case.axis, out=out, stream=stage.stream)


def torch_call(case: Case, arrays: list[Any], stage: Stage) -> Call:
    torch = stage.torch
    *inputs, out = (torch.from_dlpack(array) for array in arrays)
    if case.op == "add":
        return lambda: torch.add(*inputs, out=out)
    function = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}[case.op]
    axes = tuple(range(len(case.shape))) if case.axis is None else case.axis
    return lambda: function(*inputs, axes, out=out)


def array_module_call(module: Any, case: Case, arrays: list[Any]) -> Call:
    *inputs, out = (module.from_dlpack(array) for array in arrays)
    if case.op == "add":
        return lambda: module.add(*inputs, out=out)
    return lambda: getattr(module, case.op)(*inputs, axis=case.axis, out=out)


def cupy_call(case: Case, arrays: list[Any], stage: Stage) -> Call:
    import cupy

    call, stream = array_module_call(cupy, case, arrays), cupy.cuda.ExternalStream(stage.stream)

    def on_stream() -> Any:
        with stream:
            return call()

    return on_stream


def numpy_call(case: Case, arrays: list[Any], stage: Stage) -> Call:
    return array_module_call(np, case, arrays)


def makers(stage: Stage) -> dict[str, Callable[[Case, list[Any], Stage], Call]]:
    """flashcore and who else can be imported here."""
    found = {OURS: our_call}
    if stage.torch:
        found["torch"] = torch_call
    if not stage.cuda:
        found["numpy"] = numpy_call
    elif (
        provenance.version_of("cupy-cuda13x") or provenance.version_of("cupy-cuda12x") or provenance.version_of("cupy")
    ):
        found["cupy"] = cupy_call
    return found


# ---- measuring -------------------------------------------------------------------------------------------------------


def sampled_places(case: Case) -> Any:
    """Places of some results, among them the first and the last."""
    results = math.prod(case.left)
    each = 1 if case.op == "add" else math.prod(case.shape) // results
    chosen = np.random.default_rng(0).integers(0, results, max(1, min(results, SAMPLED // each)))
    return np.unique([0, *chosen, results - 1])


def exact(case: Case, inputs: list[Any], places: Any) -> tuple[Any, Any]:
    """The results at these places in float64, and what an error there is relative to: the size of what was added up,
    else of the result. Inputs are given as the numbers that they repeat."""
    if case.op == "add":
        first, second = (numbers[places % len(numbers)] for numbers in inputs)
        return first + second, np.abs(first + second)
    (numbers,) = inputs
    count = math.prod(case.shape) // math.prod(case.left)
    if case.axis is None:
        return tuple(np.array([whole]) for whole in _of_repeated(case.op, numbers, count))
    inside = math.prod(case.shape[case.axis + 1 :])
    begin = places // inside * inside * count + places % inside
    elements = numbers[(begin[:, None] + np.arange(count) * inside) % len(numbers)]
    return tuple(getattr(np, case.op)(x, axis=1) for x in (elements, np.abs(elements) if case.sums else elements))


def _of_repeated(op: str, numbers: Any, count: int) -> tuple[float, float]:
    """The same of the first `count` of endlessly repeated numbers."""
    if op in ("max", "min"):
        extreme = getattr(np, op)(numbers[:count])
        return extreme, extreme
    times, rest = divmod(count, len(numbers))
    totals = [times * x.sum() + x[:rest].sum() for x in (numbers, np.abs(numbers))]
    return (totals[0], totals[1]) if op == "sum" else (totals[0] / count, totals[1] / count)


def error_of(results: Any, truth: Any, size: Any) -> float:
    """The largest error, relative to these sizes; NaN shows."""
    return float(np.max(np.abs(results - truth) / np.maximum(np.abs(size), 1e-30)))


def measure(case: Case, stage: Stage, plan: Plan) -> dict[str, Any]:
    """The result of one case. A contender that cannot do it is named among the failures."""
    name, maker = NAMES[case.dtype], stage.maker
    numbers = [maker.numbers(name) for _ in range(2 if case.op == "add" else 1)]
    sets = [
        [*(maker.repeated(bits, case.shape, name) for bits in numbers), maker.empty(case.left, name)]
        for _ in range(stage.copies(case.bytes))
    ]
    places = sampled_places(case)
    truth, size = exact(case, [decode(bits, name) for bits in numbers], places)
    entry: dict[str, Any] = {"case": case.line, "bytes": case.bytes, "results": {}, "failures": {}}
    contenders = []
    for who, make in makers(stage).items():
        try:
            with stage.current():
                contender = ready(who, [make(case, arrays, stage) for arrays in sets], stage)
            results = decode(maker.host(sets[0][-1]).ravel()[places], name)
            entry["results"][who] = {"error": error_of(results, truth, size)}
            contenders.append(contender)
        except Exception as reason:  # a contender that cannot do the case is no reason to stop
            entry["failures"][who] = f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
    with stage.current():
        # As many bytes as the case moves, half of them read, half written; a ragged end would make the copy slower.
        copies = [ceilings.copy_call(stage, max(case.bytes // 2 // 256 * 256, 1)) for _ in sets]
        contenders.append(ready(COPY, copies, stage))
        take_rounds(contenders, stage.clock, plan, stage.flush if stage.caches == "flush" else None)
    entry[COPY] = {}
    for contender in contenders:
        result = entry[COPY] if contender.name == COPY else entry["results"][contender.name]
        result |= summary(contender.samples)
        result["gbs"] = case.bytes / result["us"] / 1e3
    for result in entry["results"].values():
        result["share_same_copy"] = result["gbs"] / entry[COPY]["gbs"]
    return entry


def ready(who: str, calls: list[Call], stage: Stage) -> Contender:
    """Has run once on every set; recorded as a CUDA graph where that can be."""
    for call in calls:
        call()
    stage.wait()
    if who == "cupy":
        return stage.eager(who, calls)
    try:
        return stage.contender(who, calls, torchs=who == "torch")
    except RuntimeError:
        return stage.eager(who, calls)


# ---- what comes out --------------------------------------------------------------------------------------------------


def rows(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in data["cases"]:
        for who, result in entry["results"].items():
            yield {"case": entry["case"], "contender": who, **{name: result[name] for name in COLUMNS[2:]}}


def show(console: Console, data: dict[str, Any]) -> None:
    made = report.table(
        "", "", "mean µs", "std", "p50", "p95", "p99", "GB/s", "% copy", "% same", "error", title="Primitives"
    )
    for row in rows(data):
        times = [report.number(row[name]) for name in SUMMARY]
        shares = [report.percent(row[name]) for name in ("share_copy", "share_same_copy")]
        rates = [report.number(row["gbs"]), *shares, f"{row['error']:.1e}"]
        style = "green" if row["contender"] == OURS else None
        made.add_row(row["case"], row["contender"], *times, *rates, style=style)
    console.print(made)
    for entry in data["cases"]:
        for who, why in entry["failures"].items():
            console.print(f"{entry['case']}: without {who}: {why}", markup=False, soft_wrap=True)
    console.print(f"copy: {report.number(data['ceilings']['copy_gbs'])} GB/s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=EXAMPLE)
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:N"; default: the best there is')
    parser.add_argument("--warm-up", type=int, help=f"rounds before those that count ({NORMAL[0]})")
    parser.add_argument("--iterations", type=int, help=f"rounds that count ({NORMAL[1]})")
    parser.add_argument("--seconds", type=float, help=f"a case ends early after so long ({NORMAL[2]:g})")
    parser.add_argument(
        "--thorough", action="store_true", help="{} + {} rounds, {:g} s, and more sizes".format(*THOROUGH)
    )
    parser.add_argument("--caches", choices=CACHES, default="rotate", help="what a call finds in the GPU's L2 cache")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write JSON, after every case")
    parser.add_argument("--resume", action="store_true", help="go on with the file of --save")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write CSV")
    return parser.parse_args()


def plan_of(given: argparse.Namespace) -> Plan:
    usual = THOROUGH if given.thorough else NORMAL
    asked = (given.warm_up, given.iterations, given.seconds)
    return Plan(*(usual[i] if word is None else word for i, word in enumerate(asked)))


def begin(given: argparse.Namespace, stage: Stage, plan: Plan) -> dict[str, Any]:
    """The result without a case, or with those that the file of --resume has. Raises ValueError for another run's."""
    data: dict[str, Any] = {"machine": provenance.machine(stage), "ceilings": None}
    data |= {"settings": {"caches": stage.caches, "warm_up": plan.warm_up, "rounds": plan.rounds}, "cases": []}
    if given.resume and given.save.exists():
        try:
            old = json.loads(given.save.read_text(encoding="utf-8"))
            done, copy = list(old["cases"]), float(old["ceilings"]["copy_gbs"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{given.save}: not a result of primitives.py") from None
        check_same_run(given.save, old, data["machine"], data["settings"])
        return data | {"cases": done, "ceilings": {"copy_gbs": copy}}
    return data


def measure_all(cases: list[Case], stage: Stage, plan: Plan, data: dict[str, Any], path: Path | None) -> None:
    data["ceilings"] = data["ceilings"] or {"copy_gbs": ceilings.copy_gbs(stage)}
    done = {entry["case"] for entry in data["cases"]}
    left = [case for case in cases if case.line not in done]
    for case in track(left, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        entry = measure(case, stage, plan)
        stage.forget()
        for result in entry["results"].values():
            result["share_copy"] = result["gbs"] / data["ceilings"]["copy_gbs"]
        data["cases"].append(entry)
        if path:
            save(path, data)


def main() -> int:
    given = arguments()
    try:
        if given.resume and not given.save:
            raise ValueError("--resume goes on with the file of --save, and none is given")
        cases = [parse(line) for line in given.cases] or list(default_cases(given.thorough))
        for path in filter(None, (given.save, given.csv)):
            check_writable(path)
        stage, plan = Stage(given.device, caches=given.caches), plan_of(given)
        data = begin(given, stage, plan)
    except ValueError as wrong:
        print(f"primitives.py: {wrong}", file=sys.stderr)
        return 2
    try:
        measure_all(cases, stage, plan, data, given.save)
        status = 0
    except KeyboardInterrupt:
        where = f"are in {given.save}: the same words and --resume go on" if given.save else "were not saved"
        print(f"\ninterrupted: {len(data['cases'])} cases {where}", file=sys.stderr)
        status = INTERRUPTED
    if data["cases"]:
        show(Console(highlight=False, width=None if sys.stdout.isatty() else report.WIDE), data)
    if given.csv:
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows(data))
    return status


if __name__ == "__main__":
    sys.exit(main())
