"""The measured climb of docs/ladder.md, from the files bench/results/ladder_*.json.

They come from `python -m flashcore bench --ladder --save bench/results/ladder_NAME.json`; a picture
docs/ladder_NAME.svg or .png (from --plot) is shown beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs_machine import told_machine

OURS = "flashcore"


def is_scalar(name: str) -> bool:
    return name.endswith(".reference")


def steps(entry: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(name, label, µs): the scalar kernel, the rungs from slow to fast, the kernel that is chosen, other libraries."""
    results = entry["results"]
    rungs = sorted(
        (n for n in results if n.startswith(f"{OURS} ")), key=lambda n: (not is_scalar(n), -results[n]["us"])
    )
    others = sorted((n for n in results if n != OURS and n not in rungs), key=lambda n: -results[n]["us"])
    labels = {name: f"`{name.removeprefix(OURS).strip()}`" for name in rungs}
    labels |= {OURS: f"**`{entry['kernel']}`**"} | {name: name for name in others}
    return [(n, labels[n], results[n]["us"]) for n in [*rungs, *[OURS] * (OURS in results), *others]]


def climb(entry: dict[str, Any]) -> list[str]:
    found = steps(entry)
    scalar = next((us for name, _, us in found if is_scalar(name)), None)
    sdpa = min((us for name, _, us in found if name.startswith("SDPA")), default=None)
    rows = [f"`{entry['line']}`:", "", "| | µs | TFLOP/s | × scalar | × SDPA |", "|---|---:|---:|---:|---:|"]
    for _, label, us in found:
        ratios = [f"{base / us:.2f}" if base else "–" for base in (scalar, sdpa)]
        rows.append(f"| {label} | {us:.1f} | {entry['flops'] / us / 1e6:.3g} | {' | '.join(ratios)} |")
    return [*rows, ""]


def picture_of(path: Path, folder: Path) -> list[str]:
    found = [p for p in (folder / f"{path.stem}.svg", folder / f"{path.stem}.png") if p.exists()]
    return [f"![The climb, times the speed of the scalar kernel]({found[0].name})", ""] if found else []


def section(results: Path, pictures: Path) -> str:
    lines = []
    for path in sorted(results.glob("ladder_*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"On one {told_machine(data['machine'])}; medians, in turn, by one clock."]
        lines += ["", *(line for entry in data["cases"] for line in climb(entry)), *picture_of(path, pictures)]
    return "\n".join(["## The climb, measured", "", *lines, ""]) if lines else ""
