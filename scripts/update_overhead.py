#!/usr/bin/env python3
"""Writes what a call costs into docs/torch.md, from the files bench/results/overhead_*.json of bench/overhead.py.

--check only says whether the page is current (exit status 1 if not).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "torch.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- calls: written by scripts/update_overhead.py -->\n", "<!-- end of calls -->"

#: what a row shows: its words, our call, another library's for the same
ROWS = (
    ("`flashcore.attention`, with `out=`", "attention(q, k, v, out=out)", None),
    ("`flashcore.attention`", "attention(q, k, v)", None),
    ("`flashcore.torch.attention`", "torch.attention", "SDPA"),
    ("`flashcore.torch.scaled_dot_product_attention`", "torch.scaled_dot_product_attention", "SDPA"),
    ("`flashcore.torch.attention`, a gradient to come", "torch.attention, gradient to come", "SDPA, gradient to come"),
    ("the same, and back", "torch.attention, both ways", "SDPA, both ways"),
    ("`flashcore.torch.attention`, compiled", "torch.attention, compiled", "SDPA, compiled"),
    ("`flashcore.jax.attention`, jit", "jax.attention, jit", "jax.nn.dot_product_attention, jit"),
)


def machine_words(machine: dict[str, Any]) -> str:
    device = machine.get("gpu") or f"the CPU ({machine['processor']})"
    versions = [f"{name} {machine[name]}" for name in ("driver", "cuda", "torch", "jax") if machine.get(name)]
    return f"On {device}, {', '.join(versions)}; {machine['date']}, commit {machine['git_sha'][:12]}"


def table(path: Path) -> list[str]:
    data = json.loads(path.read_text(encoding="utf-8"))
    cases = [case for case in data["cases"] if case["framework"] in ("torch", "jax")]
    found = {name: cost["us"] for case in cases for name, cost in case["calls"].items()}
    rows = [
        f"| {words} | {found[ours]:.1f} | " + (f"{found[peer]:.1f} |" if peer in found else "– |")
        for words, ours, peer in ROWS
        if ours in found
    ]
    file = f"bench/results/{path.name}"
    return [
        f"{machine_words(data['machine'])}; [`{file}`](../{file}):",
        "",
        "| µs of the host a call | flashcore | SDPA, or JAX's own |",
        "|---|---:|---:|",
        *rows,
        "",
    ]


def section(results: Path) -> str:
    """A table for each file."""
    tables = [table(path) for path in sorted(results.glob("overhead_*.json"))]
    about = "Inputs are one row of 8 numbers, so that nearly all is the call and not the kernel (`bench/overhead.py`)."
    return "\n".join([about, "", *(line for lines in tables for line in lines)]) if tables else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    fresh = before + BEGIN + section(RESULTS) + END + rest.split(END, 1)[1]
    if arguments.check:
        print(f"docs/torch.md: {'current' if fresh == text else 'STALE: run scripts/update_overhead.py'}")
        return fresh != text
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
