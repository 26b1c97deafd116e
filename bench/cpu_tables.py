"""Results of the CPU benchmark as tables to be read."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import geometric_mean
from typing import Any

from rich.table import Table

Result = dict[str, Any]


def table_of(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def spread(quartiles: dict[str, float] | None, form: str = ".2f") -> str:
    if quartiles is None:
        return "–"
    low, middle, high = (format(quartiles[name], form) for name in ("low", "median", "high"))
    return f"{middle} ({low}–{high})"


def share(result: Result) -> str:
    peak = result.get("peak")
    return f"{peak['share']['median']:.0%} of {peak['of']}" if peak else "–"


def ours(result: Result) -> list[str]:
    return [result["case"], result["dtype"], f"{result['ms']['flashcore']:.3f}"]


def ratios(results: list[Result], threads: int) -> Table:
    peers = list(dict.fromkeys(peer for r in results for peer in r["ratios"]))
    columns = ["case", "dtype", "ms", "torch ms", "GF/s", "share of peak", *(f"ratio to {peer}" for peer in peers)]
    rows = [
        [*ours(r), f"{r['ms']['torch']:.3f}", f"{r['gflops']:.0f}", share(r)]
        + [spread(r["ratios"].get(peer)) for peer in peers]
        for r in results
    ]
    return table_of(f"Threads: {threads}. Ratios: their time over ours", columns, rows)


def savings(results: list[Result], threads: int) -> Table:
    columns = ["case", "dtype", "ms", "work left", "time left", "ratio to torch"]
    rows = [
        [*ours(r), f"{r['work_left']:.1%}", spread(r["time_left"], ".1%"), spread(r["ratios"]["torch"])]
        for r in results
    ]
    return table_of(f"Threads: {threads}. What skipping work gains", columns, rows)


def growth(memory: list[Result]) -> Table:
    columns = ["library", "dtype", "shape", "inputs and output", "growth", "growth / inputs and output"]
    mebibytes = 2**20
    rows = [
        [m["library"], m["dtype"], str(tuple(m["shape"]))]
        + [f"{m['needed'] / mebibytes:.0f} MiB", f"{m['growth'] / mebibytes:.0f} MiB"]
        + [f"{m['growth'] / m['needed']:.3f}"]
        for m in memory
    ]
    return table_of("Growth of a fresh process by one forward call", columns, rows)


def tables(results: list[Result], memory: list[Result]) -> Iterator[Table | str]:
    plain = [r for r in results if "work_left" not in r]
    for threads in dict.fromkeys(r["threads"] for r in results):
        mine = [r for r in results if r["threads"] == threads]
        for make, chosen in ((ratios, [r for r in mine if r in plain]), (savings, [r for r in mine if r not in plain])):
            if chosen:
                yield make(chosen, threads)
    if plain:
        mean = geometric_mean(r["ratios"]["torch"]["median"] for r in plain)
        yield f"geometric mean of the ratios to torch, {len(plain)} cells: {mean:.2f}"
    if memory:
        yield growth(memory)
