"""The measured speed of src/kernels/sm90/README.md, from bench/results/forward_h200.json of bench/compare.py."""

from __future__ import annotations

import json
from pathlib import Path

from docs_machine import told_machine
from forward_table import table


def section(results: Path, _: Path) -> str:
    path = results / "forward_h200.json"
    if not path.exists():
        return ""
    data = json.loads(path.read_text(encoding="utf-8"))
    ceilings = ", ".join(f"{value:.0f} in {dtype}" for dtype, value in data["ceilings"]["matmul_tflops"].items())
    return "\n".join(
        [
            "",
            f"On one {told_machine(data['machine'])}, cuDNN {data['machine']['cudnn']}: TFLOP/s, or µs of short calls, "
            f"medians, all in turn in one process. torch's matmul reached {ceilings} in that run: the ceiling. The "
            "ratio is the time of the best other library over ours.",
            "",
            *table(data["cases"], shares=True),
            "",
            f"From `bench/results/{path.name}`, made by `python bench/compare.py`.",
            "",
        ]
    )
