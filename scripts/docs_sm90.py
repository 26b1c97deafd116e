"""The measured speed of src/kernels/sm90/README.md, from bench/results/forward_h200.json of bench/compare.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs_machine import told_machine

OURS = "flashcore"


def row(entry: dict[str, Any], others: list[str]) -> str:
    """Of each TFLOP/s, or µs where those mean little; ours also as a share of the matmul ceiling."""
    results = entry["results"]
    is_short = results[OURS]["us"] < 20

    def speed(name: str) -> str:
        if name not in results:
            return "–"
        return f"{results[name]['us']:.2f} µs" if is_short else f"{results[name]['tflops']:.0f}"

    share = "–" if is_short else f"{results[OURS]['share_matmul']:.0%}"
    cells = [speed(OURS), share, *map(speed, others), f"{entry['ratio_to_best_peer']:.3f}"]
    return f"| `{entry['line']}` | {' | '.join(cells)} |"


def section(results: Path, _: Path) -> str:
    path = results / "forward_h200.json"
    if not path.exists():
        return ""
    data = json.loads(path.read_text(encoding="utf-8"))
    timed = [entry for entry in data["cases"] if OURS in entry["results"]]
    others = list(dict.fromkeys(name for entry in timed for name in entry["results"] if name != OURS))
    ceilings = ", ".join(f"{value:.0f} in {dtype}" for dtype, value in data["ceilings"]["matmul_tflops"].items())
    return "\n".join(
        [
            "",
            f"On one {told_machine(data['machine'])}, cuDNN {data['machine']['cudnn']}: TFLOP/s, or µs of short calls, "
            f"medians, all in turn in one process. torch's matmul reached {ceilings} in that run: the ceiling. The "
            "ratio is the time of the best other library over ours.",
            "",
            f"| | {OURS} | of the ceiling | {' | '.join(others)} | ratio |",
            "|---|" + "---:|" * (3 + len(others)),
            *(row(entry, others) for entry in timed),
            "",
            f"From `bench/results/{path.name}`, made by `python bench/compare.py`.",
            "",
        ]
    )
