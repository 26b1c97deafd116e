#!/usr/bin/env python3
"""Times flashcore on the CPU beside torch's scaled_dot_product_attention, and JAX and NumPy if asked.

    python bench/cpu_compare.py                                          # everything
    python bench/cpu_compare.py --isa avx2 --cases 512 "bwd 512" decode  # every library held to AVX2
    python bench/cpu_compare.py --peers jax numpy --memory --save bench/results/cpu_NAME_native.json

All contenders of a cell run in one process, in random order inside each round. A ratio is the median over rounds of
(their time / our time) of the same round: machines change their speed within seconds, so ratios are comparable where
times are not. Beside them stand what flashcore gains where a mask lets it skip work, and the share of what the
processor can do at most, which the program `peak` measures in the same rounds (`cmake --preset release && cmake --build
--preset release --target peak`; without it there is no share).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu_cells import CELLS, SKIPPING_CELLS
from cpu_tables import spread, tables
from flashcore.bench.provenance import busy, load, processor, provenance
from flashcore.bench.results import check_writable, save
from rich.console import Console
from rich.progress import Progress

INTERRUPTED = 130
HERE = Path(__file__).resolve().parent
DTYPES = ("float32", "bfloat16", "float16")
Result = dict[str, Any]

# Each level of instructions in the words of every library; "native" is what each chooses by itself. JAX compiles, MKL,
# oneDNN and OpenBLAS (NumPy's) dispatch.
LEVELS = {
    "native": {},
    "avx512": {
        "FLASHCORE_CPU_ISA": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "OPENBLAS_CORETYPE": "SkylakeX",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX512",
    },
    "avx2": {
        "FLASHCORE_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    },
}


def environment(isa: str, threads: int) -> dict[str, str]:
    """What a process is given so that all of its libraries keep to this level and to so many threads."""
    inherited = {name: value for name, value in os.environ.items() if name != "FLASHCORE_NUM_THREADS"}
    return inherited | LEVELS[isa] | {"OMP_NUM_THREADS": str(threads), "PJRT_NPROC": str(threads)}


def check_isa(isa: str) -> None:
    """Raises ValueError for a level that this processor does not have."""
    command = [sys.executable, "-m", "flashcore", "explain", "fwd fp32 b1 q1 k1 h1 d8", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(isa, 1), check=False)
    if run.returncode:
        raise ValueError(f"--isa {isa}: {run.stderr.strip().removeprefix('error: ')}")


def built_peak() -> str | None:
    found = sorted(HERE.parent.glob("build/*/bench/peak"), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else None


def measured(arguments: argparse.Namespace, threads: int) -> Iterator[Result]:
    """Results of the cells, one by one, from a process of their own."""
    names = ("isa", "cases", "dtypes", "peers", "rounds", "seconds", "peak")
    wishes = {name: getattr(arguments, name) for name in names} | {"threads": threads}
    command = [sys.executable, str(HERE / "cpu_worker.py"), json.dumps(wishes)]
    pipe = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}  # Ctrl-C is for this process alone
    with subprocess.Popen(command, env=environment(arguments.isa, threads), **pipe) as process:
        try:
            yield from map(json.loads, process.stdout)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ValueError(f"bench/cpu_worker.py ended with {process.returncode}")


def memory_growth(arguments: argparse.Namespace) -> list[Result]:
    threads = max(arguments.threads)
    results = []
    for library in ("flashcore", "torch"):
        for dtype in ("float32", "bfloat16"):
            command = [sys.executable, str(HERE / "cpu_memory.py"), library, dtype]
            run = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                env=environment(arguments.isa, threads),
                start_new_session=True,
                check=True,
            )
            results.append(json.loads(run.stdout))
    return results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [*CELLS, *SKIPPING_CELLS]
    parser.add_argument("--isa", choices=LEVELS, default="native", help="hold every library to this level")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cases", nargs="*", choices=cases, default=cases, metavar="CASE", help=", ".join(cases))
    parser.add_argument("--peers", nargs="+", choices=("jax", "numpy"), default=[], help="also time these")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60, help="a cell that took so long ends, from 3 rounds on")
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory of a long call")
    parser.add_argument("--peak", default=built_peak(), help="the program that measures the processor")
    parser.add_argument("--save", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: quartiles take two rounds at least")
    return arguments


def main() -> int:
    arguments = parse()
    results: list[Result] = []
    try:
        if arguments.save:
            check_writable(arguments.save)
        check_isa(arguments.isa)
        run(arguments, results)
    except (ValueError, OSError, subprocess.CalledProcessError) as wrong:
        print(f"cpu_compare.py: {wrong}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = f"are in {arguments.save}" if arguments.save else "were not saved"
        print(f"interrupted: {len(results)} cells {where}", file=sys.stderr)
        return INTERRUPTED
    return 0


def run(arguments: argparse.Namespace, results: list[Result]) -> None:
    """Fills the results, so that the caller knows those of a run that is cut off."""
    console = Console(width=140)
    machine = {**processor(), **provenance("torch", *arguments.peers), "isa": arguments.isa, "load": [load()]}
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False, soft_wrap=True)
    if not arguments.peak:
        console.print("no share of peak: the program `peak` is not built")
    warning = busy(machine["load"][0], machine["cores"])
    if warning:
        print(warning, file=sys.stderr)
    with Progress(console=console) as progress:
        task = progress.add_task("cells", total=len(arguments.threads) * len(arguments.cases) * len(arguments.dtypes))
        for threads in arguments.threads:
            for result in measured(arguments, threads):
                results.append(result)
                if arguments.save:  # a long run that is cut off keeps what it has
                    save(arguments.save, {"machine": machine, "cells": results, "memory": []})
                ratio = spread(result["ratios"]["torch"])
                progress.console.print(f"{result['case']} {result['dtype']}, threads {threads}: {ratio}", markup=False)
                progress.advance(task)
    memory = memory_growth(arguments) if arguments.memory else []
    machine["load"].append(load())
    if arguments.save:
        save(arguments.save, {"machine": machine, "cells": results, "memory": memory})
    for part in tables(results, memory):
        console.print(part)


if __name__ == "__main__":
    sys.exit(main())
