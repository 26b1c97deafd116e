"""Results as tables to be read."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .compare import FASTER, SLOWER, Change
from .results import OURS, Data, error_ratio, is_too_inexact

WIDE = 150
STYLES = {SLOWER: "bold red", FASTER: "green"}


def number(value: Any, digits: int = 4) -> str:
    """So many digits that count, without an exponent."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def percent(value: Any) -> str:
    return "–" if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def table(*columns: str, title: str = "") -> Table:
    """The first column is text; numbers stand under each other."""
    made = Table(title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=True)
    return made


COLUMNS: dict[str, Callable[[Data], str]] = {
    "p50 µs": lambda r: number(r.get("us")),
    "mean": lambda r: number(r.get("us_mean")),
    "std": lambda r: number(r.get("us_std"), 3),
    "min": lambda r: number(r.get("us_min")),
    "p90": lambda r: number(r.get("us_p90")),
    "p95": lambda r: number(r.get("us_p95")),
    "p99": lambda r: number(r.get("us_p99")),
    "TFLOP/s": lambda r: number(r.get("tflops"), 3),
    "GB/s": lambda r: number(r.get("gbs"), 3),
    "% matmul": lambda r: percent(r.get("share_matmul")),
    "% copy": lambda r: percent(r.get("share_copy")),
    "error": lambda r: "–" if r.get("error") is None else f"{r['error']:.1e}",
}
NARROW = ("p50 µs", "p95", "TFLOP/s", "GB/s", "error")


def case(entry: Data, data: Data, width: int) -> Table:
    """The contenders of a case, fastest first, times in microseconds."""
    shown = {name: show for name, show in COLUMNS.items() if width >= WIDE or name in NARROW}
    kernel = f" ({entry['kernel']})" if entry.get("kernel") else ""
    made = table("", *shown, "/ ours", title=escape(entry["line"] + kernel))
    ours = entry["results"].get(OURS, {}).get("us")
    for name, result in sorted(entry["results"].items(), key=lambda item: item[1]["us"]):
        ratio = f"{result['us'] / ours:.2f}" if ours and name != OURS else ""
        mark = "" if was_recorded(result, data) else " *"
        style = "green" if name == OURS else None
        made.add_row(escape(name) + mark, *(show(result) for show in shown.values()), ratio, style=style)
    return made


def was_recorded(result: Data, data: Data) -> bool:
    """Whether a contender was replayed as a graph, where all that can be are."""
    return bool(result.get("graph", True)) or data.get("settings", {}).get("clock") != "events"


def overview(data: Data) -> Table:
    """A line for each case: ours beside the best of the others."""
    made = table("", "ours µs", "TFLOP/s", "GB/s", "% matmul", "% copy", "the best other", "/ ours", title="All cases")
    for entry in data["cases"]:
        ours = entry["results"].get(OURS, {})
        ratio = entry.get("ratio_to_best_peer")
        cells = [COLUMNS[name](ours) for name in ("p50 µs", "TFLOP/s", "GB/s", "% matmul", "% copy")]
        other = escape(entry.get("best_peer") or _best_peer(entry))
        style = "red" if ratio is not None and ratio < 1 else None
        made.add_row(entry["line"], *cells, other, "–" if ratio is None else f"{ratio:.2f}", style=style)
    return made


def _best_peer(entry: Data) -> str:
    others = {name: result["us"] for name, result in entry["results"].items() if not name.startswith(OURS)}
    return min(others, key=others.__getitem__, default="–")


def notes(data: Data) -> list[str]:
    """What has to be known to read the table."""
    lines = []
    ceilings = data.get("ceilings") or {}
    products = ", ".join(f"{dtype} {number(value)}" for dtype, value in ceilings.get("matmul_tflops", {}).items())
    if ceilings:
        copy = f"copy {number(ceilings['copy_gbs'])} GB/s"
        lines.append(f"ceilings measured here: matmul TFLOP/s {products or 'none (needs torch)'}; {copy}")
    every = [result for entry in data["cases"] for result in entry["results"].values()]
    if not all(was_recorded(result, data) for result in every):
        lines.append("* cannot be recorded as a CUDA graph: its calls are queued one by one, host time may count")
    for entry in data["cases"]:
        if is_too_inexact(entry):
            lines.append(f"{entry['line']}: error {error_ratio(entry):.2f} times that of the most exact library")
    ratios = [entry["ratio_to_best_peer"] for entry in data["cases"] if entry.get("ratio_to_best_peer")]
    if ratios:
        behind = sum(ratio < 1 for ratio in ratios)
        mean = statistics.geometric_mean(ratios)
        lines.append(
            f"best other library's time over ours: geometric mean {mean:.3f} over {len(ratios)} "
            f"case{'s' * (len(ratios) > 1)}, ahead in {len(ratios) - behind}"
        )
    return lines


def machine(data: Data) -> str:
    shown = {name: value for name, value in data["machine"].items() if name not in ("flags", "clocks")}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def changes(found: list[Change], failed: dict[str, float], title: str) -> Table:
    made = table("", "old µs", "new µs", "new / old", "verdict", title=title)
    for change in found:
        verdict = f"[{STYLES[change.verdict]}]{change.verdict}[/]" if change.verdict in STYLES else "within the noise"
        made.add_row(change.line, number(change.old_us), number(change.new_us), f"{change.ratio:.3f}", verdict)
    for line, old_us in failed.items():
        made.add_row(line, number(old_us), "–", "–", f"[{STYLES[SLOWER]}]failed[/]")
    return made


def show(console: Console, data: Data) -> None:
    width = console.width if console.is_terminal else WIDE
    wide = Console(file=console.file, highlight=False, width=max(width, console.width), theme=None)
    for entry in data["cases"]:
        wide.print(case(entry, data, width))
        for name, why in entry.get("failures", {}).items():
            wide.print(f"  without {name}: {why}", style="dim", markup=False, soft_wrap=True)
    if len(data["cases"]) > 1:
        wide.print(overview(data))
    for line in notes(data):
        wide.print(line, markup=False, soft_wrap=True)
