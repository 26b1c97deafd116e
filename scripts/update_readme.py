#!/usr/bin/env python3
"""Writes the speed section of README.md, and its picture, from the files under bench/results.

--check only says whether both are current (exit status 1 if not), and needs neither matplotlib nor flashcore.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pictures
from forward_table import table
from readme_cpu import cpu_section

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
RESULT = RESULTS / "forward_h200.json"
BEGIN, END = "<!-- speed: written by scripts/update_readme.py -->\n", "<!-- end of speed -->"


def gpu_section() -> str:
    data = json.loads(RESULT.read_text())
    machine = data["machine"]
    rotates = data.get("settings", {}).get("caches") == "rotate"
    inputs = ", on inputs that rotate through more than the L2 cache" if rotates else ""
    return "\n".join(
        [
            f"Forward on one {machine['gpu']} (driver {machine['driver']}, CUDA {machine['cuda']}, torch "
            f"{machine['torch']}, cuDNN {machine['cudnn']}; {machine['date']}, commit {machine['git_sha'][:12]}): "
            f"TFLOP/s, or µs where that is under 20, by CUDA-graph replay{inputs}, all in one process, taking turns, "
            "medians. The last column is the time of the best other library over ours: above 1 we are ahead.",
            "",
            f"![Forward speed by sequence length]({pictures.SPEEDS.path.relative_to(ROOT)})",
            "",
            *table(data["cases"]),
            "",
            f"From [`{RESULT.relative_to(ROOT)}`]({RESULT.relative_to(ROOT)}), made by `python bench/compare.py`. "
            "On a GPU without a fast kernel yet, and for what none knows, the reference kernels run: right, and slow.",
            "",
        ]
    )


def section() -> str:
    return "\n".join(filter(None, [gpu_section(), cpu_section(RESULTS)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END, 1)[1]
    fresh = before + BEGIN + section() + END + after
    if arguments.check:
        print(f"README speed section: {'current' if fresh == text else 'STALE: run scripts/update_readme.py'}")
        return pictures.report_stale(pictures.OF_README, "scripts/update_readme.py") or fresh != text
    README.write_text(fresh)
    for picture in pictures.OF_README:
        picture.redraw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
