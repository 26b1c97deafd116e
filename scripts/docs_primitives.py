"""The measured speed of docs/primitives.md, from the files bench/results/primitives_*.json of bench/primitives.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs_machine import told_machine

OURS = "flashcore"
GOAL = 0.9  # of a copy: near enough to the speed of memory


def row(entry: dict[str, Any], others: list[str]) -> str:
    """GB/s of each; ours also in µs, as shares of a large copy and of one of as many bytes, and as the time of the best
    other one over ours."""
    results = entry["results"]
    mine = results[OURS]
    theirs = [results[name]["us"] for name in others if name in results]
    rates = [f"{results[name]['gbs']:.0f}" if name in results else "–" for name in others]
    ratio = f"{min(theirs) / mine['us']:.2f}" if theirs else "–"
    same = f"{mine['share_same_copy']:.0%}" if "share_same_copy" in mine else "–"
    own = (f"{mine['us']:.1f}", f"{mine['gbs']:.0f}", f"{mine['share_copy']:.0%}", same)
    return f"| `{entry['case']}` | {' | '.join([*own, *rates, ratio])} |"


def of_file(path: Path) -> list[str]:
    data = json.loads(path.read_text(encoding="utf-8"))
    timed = [entry for entry in data["cases"] if OURS in entry["results"]]
    others = list(dict.fromkeys(name for entry in timed for name in entry["results"] if name != OURS))
    worst = min(timed, key=lambda entry: entry["results"][OURS]["share_copy"])
    shares = [entry["results"][OURS]["share_copy"] for entry in timed]
    same = [share for entry in timed if (share := entry["results"][OURS].get("share_same_copy"))]
    beside_same = f"; beside a copy of as many bytes, {min(same):.0%} where least" if same else ""
    near = sum(share >= GOAL for share in shares)
    return [
        f"On one {told_machine(data['machine'])}: medians of {data['settings']['rounds']} rounds, all in turn. A large "
        f"copy moves {data['ceilings']['copy_gbs']:.0f} GB/s there. flashcore reaches {GOAL:.0%} of it or more in "
        f"{near} of {len(timed)} cases, and {min(shares):.0%} where it reaches least (`{worst['case']}`)"
        f"{beside_same}. The last column is the time of the best other library over ours: above 1 we are ahead.",
        "",
        "| | µs | GB/s | of a large copy | of one of as many bytes | "
        f"{' | '.join(f'{name} GB/s' for name in others)} | ratio |",
        "|---|" + "---:|" * (5 + len(others)),
        *(row(entry, others) for entry in timed),
        "",
        f"From [`bench/results/{path.name}`](../bench/results/{path.name}), made by `python bench/primitives.py`.",
        "",
    ]


def section(results: Path, _: Path) -> str:
    lines = [line for path in sorted(results.glob("primitives_*.json")) for line in of_file(path)]
    return "\n".join(["", "## Measured", "", *lines, ""]) if lines else ""
