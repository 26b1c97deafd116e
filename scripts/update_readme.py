#!/usr/bin/env python3
"""Writes the speed section of README.md, and its picture, from the files under bench/results.

--check only says whether the section is current (exit status 1 if not); it needs no matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from readme_cpu import cpu_section

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
RESULT = RESULTS / "forward_h200.json"
PICTURE = ROOT / "docs" / "forward_h200.png"
BEGIN, END = "<!-- speed: written by scripts/update_readme.py -->\n", "<!-- end of speed -->"
OURS = "flashcore"


def family(line: str) -> str:
    """What a case is shown under: its head_dim and mask, or "small"."""
    sizes = dict(re.findall(r"([bqkhd])(\d+)", line))
    if int(sizes["b"]) * int(sizes["q"]) < 4096:
        return "small"
    return f"head_dim {sizes['d']}, {'causal' if 'causal' in line else 'full'}"


def seqlen(line: str) -> int:
    return int(re.search(r" q(\d+)", line)[1])


def cell(result: dict | None, best: bool) -> str:
    if result is None:
        return "–"
    text = f"{result['us']:.1f} µs" if result["us"] < 20 else f"{result['tflops']:.0f}"
    return f"**{text}**" if best else text


def gpu_section() -> str:
    data = json.loads(RESULT.read_text())
    machine = data["machine"]
    names = list(dict.fromkeys(name for case in data["cases"] for name in case["results"]))
    rows = []
    for case in data["cases"]:
        results = case["results"]
        fastest = min(r["us"] for r in results.values())
        cells = [cell(results.get(n), n in results and results[n]["us"] == fastest) for n in names]
        rows.append(f"| `{case['line']}` | {' | '.join(cells)} | {case['ratio_to_best_peer']:.2f} |")
    return "\n".join(
        [
            f"Forward on one {machine['gpu']} (driver {machine['driver']}, CUDA {machine['cuda']}, torch "
            f"{machine['torch']}, cuDNN {machine['cudnn']}; {machine['date']}, commit {machine['git_sha'][:12]}): "
            "TFLOP/s, or µs where that is under 20, by CUDA-graph replay, all in one process, taking turns, medians. "
            "The last column is the time of the best other library over ours: above 1 we are ahead.",
            "",
            f"![Forward speed by sequence length]({PICTURE.relative_to(ROOT)})",
            "",
            f"| case | {' | '.join(names)} | ratio |",
            "|---|" + "---:|" * (len(names) + 1),
            *rows,
            "",
            f"From [`{RESULT.relative_to(ROOT)}`]({RESULT.relative_to(ROOT)}), made by `python bench/compare.py`. "
            "On a GPU without a fast kernel yet, and for what none knows, the reference kernels run: right, and slow.",
            "",
        ]
    )


def section() -> str:
    return "\n".join(filter(None, [gpu_section(), cpu_section(RESULTS)]))


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = json.loads(RESULT.read_text())["cases"]
    panels = [f"head_dim {d}, {mask}" for mask in ("full", "causal") for d in (64, 128, 256)]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharex=True, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=True):
        mine = [c for c in cases if family(c["line"]) == panel and "/" not in c["line"]]
        for name in dict.fromkeys(n for c in mine for n in c["results"]):
            points = [(seqlen(c["line"]), c["results"][name]["tflops"]) for c in mine if name in c["results"]]
            bold = {"linewidth": 2.6, "zorder": 3} if name == OURS else {"linewidth": 1.4, "alpha": 0.8}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **bold)
        axis.set_title(panel, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xticks([512, 2048, 8192, 16384], ["512", "2k", "8k", "16k"])
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    for axis in axes[1]:
        axis.set_xlabel("sequence length, 16384 tokens")
    axes[0, 0].set_ylim(bottom=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


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
        return fresh != text
    README.write_text(fresh)
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
