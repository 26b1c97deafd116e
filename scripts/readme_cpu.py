"""The CPU's part of README.md's speed section, from the files bench/results/cpu_*.json of bench/cpu_compare.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
LEVELS = {
    "native": "each with all that the processor has",
    "avx512": "both held to AVX-512",
    "avx2": "both held to AVX2",
}
WIDEST = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}
IDENTITY = ("processor", "family", "model", "stepping")

Cell = dict[str, Any]
Words = Callable[[Cell], str]
Results = dict[str, tuple[str, dict[str, Any]]]


def newest_results(folder: Path) -> list[Results]:
    """The machines, newest first: of each level, in the order of LEVELS, the newest file's name and content."""
    files = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("cpu_*.json"))]
    files = sorted((file for file in files if file[1]["cells"]), key=lambda file: file[1]["machine"]["date"])
    machines: dict[tuple[Any, ...], Results] = {}
    for name, data in reversed(files):
        identity = tuple(data["machine"].get(fact) for fact in IDENTITY)
        machines.setdefault(identity, {}).setdefault(data["machine"]["isa"], (name, data))
    return [{level: newest[level] for level in LEVELS if level in newest} for newest in machines.values()]


def ratio(cell: Cell) -> float:
    """torch's time over ours."""
    return cell["ratios"]["torch"]["median"]


def skips_work(cell: Cell) -> bool:
    return "work_left" in cell


def threads_words(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def summary(data: dict[str, Any]) -> str:
    """The ratios of one file: their geometric mean and the lowest, for each number of threads."""
    parts = []
    for threads in sorted({cell["threads"] for cell in data["cells"]}, reverse=True):
        cells = [cell for cell in data["cells"] if cell["threads"] == threads and not skips_work(cell)]
        if cells:
            low = min(cells, key=ratio)
            mean = geometric_mean(map(ratio, cells))
            lowest = f"lowest {ratio(low):.2f}: `{low['line']}`, {low['dtype']}"
            parts.append(f"{threads_words(threads)} {mean:.2f} ({lowest})")
    return "; ".join(parts)


def time_words(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds >= 0.1 else f"{milliseconds * 1e3:.3g} µs"


def table(cells: list[Cell], name: Words, show: Words) -> list[str]:
    """A row for each case, a column for each dtype."""
    shown = {(name(cell), cell["dtype"]): show(cell) for cell in cells}
    rows = dict.fromkeys(row for row, _ in shown)
    return [
        f"| case | {' | '.join(DTYPES)} |",
        "|---|" + "---:|" * len(DTYPES),
        *(f"| {row} | {' | '.join(shown.get((row, dtype), '–') for dtype in DTYPES)} |" for row in rows),
        "",
    ]


def machine_words(machine: dict[str, Any]) -> str:
    facts = [f"{name} {machine[name]}" for name in IDENTITY[1:] if name in machine]
    facts += [next((words for flag, words in WIDEST.items() if flag in machine["flags"]), "no vector units known")]
    return f"{machine['processor']} ({', '.join(facts)}, {machine['cores']} cores)"


def memory_words(memory: list[dict[str, Any]]) -> list[str]:
    if not memory:
        return []
    shares = [f"{m['growth'] / m['needed']:.2f} ({m['library']}, {m['dtype']})" for m in memory]
    shape = tuple(memory[0]["shape"])
    return [f"What one forward call on {shape} adds to a process, over its inputs and output: {', '.join(shares)}.", ""]


def machine_section(results: Results) -> list[str]:
    """The tables of one machine: of its first level, and what the others come to."""
    level, (_, data) = next(iter(results.items()))
    machine, threads = data["machine"], max(cell["threads"] for cell in data["cells"])
    cells = [cell for cell in data["cells"] if cell["threads"] == threads]
    skipping = [cell for cell in cells if skips_work(cell)]
    lines = [
        f"**{machine_words(machine)}** with {threads_words(threads)}, {LEVELS[level]} ({machine['date']}, torch "
        f"{machine['torch']}, commit {machine['git_sha'][:12]}):",
        "",
        *table(
            [cell for cell in cells if not skips_work(cell)],
            lambda cell: f"`{cell['line']}`",
            lambda cell: f"{ratio(cell):.2f} ({time_words(cell['ms']['flashcore'])})",
        ),
        *([data["note"], ""] if "note" in data else []),
        "Geometric means over all of these:",
        "",
        *(f"- {LEVELS[level]}: {summary(held)}" for level, (_, held) in results.items()),
        "",
    ]
    if skipping:
        lines += [
            "What a mask excludes is not computed, and heads that share keys read them once. Our time as a share of "
            "that with nothing skipped, and torch's time over ours:",
            "",
            *table(
                skipping,
                lambda cell: f"`{cell['line']}`: {cell['work_left']:.1%} of the work",
                lambda cell: f"{cell['time_left']['median']:.1%} ({ratio(cell):.2f})",
            ),
        ]
    return lines + memory_words(data["memory"])


def cpu_section(folder: Path) -> str:
    """Empty where nothing was measured."""
    machines = newest_results(folder)
    if not machines:
        return ""
    links = ", ".join(f"[`bench/results/{name}`](bench/results/{name})" for m in machines for name, _ in m.values())
    lines = [
        "### On the CPU",
        "",
        "The time of torch's `scaled_dot_product_attention` over ours, and our time. The ratio is the median over "
        "rounds in which both take turns in one process; above 1 we are ahead.",
        "",
        *(line for results in machines for line in machine_section(results)),
        f"From {links}, made by `python bench/cpu_compare.py`, which holds all to one level with `--isa`.",
        "",
    ]
    return "\n".join(lines)
