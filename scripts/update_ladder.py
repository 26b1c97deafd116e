#!/usr/bin/env python3
"""Writes the measured climb of docs/ladder.md from the files bench/results/ladder_*.json; without any it says nothing.

The files come from `python -m flashcore bench --ladder --save bench/results/ladder_NAME.json`; a picture
docs/ladder_NAME.svg or .png (from --plot) is shown beside them. --check only says whether the page is current.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ladder.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- climb: written by scripts/update_ladder.py -->\n", "<!-- end of climb -->"
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
        machine = data["machine"]
        facts = [machine.get("gpu", "one machine")]
        facts += [f"{name} {machine[name]}" for name in ("driver", "cuda", "torch", "date") if machine.get(name)]
        lines += [
            f"On one {', '.join(facts)}, commit {machine.get('git_sha', '')[:12]}; medians, in turn, by one clock."
        ]
        lines += ["", *(line for entry in data["cases"] for line in climb(entry)), *picture_of(path, pictures)]
    return "\n".join(["## The climb, measured", "", *lines, ""]) if lines else ""


def rewritten(text: str, fresh: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + fresh + END + rest.split(END, 1)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    fresh = rewritten(text, section(RESULTS, PAGE.parent))
    if arguments.check:
        print(f"docs/ladder.md: {'current' if fresh == text else 'STALE: run scripts/update_ladder.py'}")
        return fresh != text
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
