"""The table of a file of bench/compare.py: each case's speed by flashcore and by the other libraries."""

from __future__ import annotations

from typing import Any

OURS = "flashcore"
SHORT = 20  # µs; below it TFLOP/s mean little


def speed(result: dict[str, Any] | None, fastest: float) -> str:
    if result is None:
        return "–"
    text = f"{result['us']:.1f} µs" if result["us"] < SHORT else f"{result['tflops']:.0f}"
    return f"**{text}**" if result["us"] == fastest else text


def share(result: dict[str, Any] | None) -> str:
    """Of the speed of torch's matmul in the same run."""
    return "–" if result is None or result["us"] < SHORT else f"{result['share_matmul']:.0%}"


def table(cases: list[dict[str, Any]], shares: bool = False) -> list[str]:
    """Lines of Markdown. With `shares` a column tells how near to the matmul ceiling ours comes."""
    others = list(dict.fromkeys(name for case in cases for name in case["results"] if name != OURS))
    columns = [OURS, *["of the ceiling"] * shares, *others, "ratio"]
    lines = [f"| case | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for case in cases:
        results = case["results"]
        fastest = min(result["us"] for result in results.values())
        ours, *theirs = (speed(results.get(name), fastest) for name in (OURS, *others))
        cells = [ours, *[share(results.get(OURS))] * shares, *theirs, f"{case['ratio_to_best_peer']:.2f}"]
        lines.append(f"| `{case['line']}` | {' | '.join(cells)} |")
    return lines
