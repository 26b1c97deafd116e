"""What a call costs, for docs/torch.md: from the files bench/results/overhead_*.json of bench/overhead.py."""

from __future__ import annotations

import json
from pathlib import Path

from docs_machine import told_machine

#: what a row shows: its words, whose arrays, our call, another library's for the same
ROWS = (
    ("`flashcore.attention`, with `out=`", "torch", "attention(q, k, v, out=out)", None),
    ("`flashcore.attention`", "torch", "attention(q, k, v)", None),
    ("`flashcore.torch.attention`", "torch", "torch.attention", "SDPA"),
    ("`flashcore.torch.scaled_dot_product_attention`", "torch", "torch.scaled_dot_product_attention", "SDPA"),
    (
        "`flashcore.torch.attention`, a gradient to come",
        "torch",
        "torch.attention, gradient to come",
        "SDPA, gradient to come",
    ),
    ("the same, and back", "torch", "torch.attention, both ways", "SDPA, both ways"),
    ("`flashcore.torch.attention`, compiled", "torch", "torch.attention, compiled", "SDPA, compiled"),
    ("`flashcore.jax.attention`, jit", "jax", "jax.attention, jit", "jax.nn.dot_product_attention, jit"),
    ("`flashcore.attention` of CuPy's arrays, with `out=`", "cupy", "attention(q, k, v, out=out)", None),
    ("`flashcore.attention` of CuPy's arrays", "cupy", "attention(q, k, v)", None),
    ("`flashcore.attention` of NumPy's arrays", "numpy", "attention(q, k, v)", None),
)


def table(path: Path) -> list[str]:
    data = json.loads(path.read_text(encoding="utf-8"))
    found = {(case["framework"], name): cost["us"] for case in data["cases"] for name, cost in case["calls"].items()}
    rows = []
    for words, framework, ours, peer in ROWS:
        if (framework, ours) in found:
            beside = f"{found[framework, peer]:.1f}" if (framework, peer) in found else "–"
            rows.append(f"| {words} | {found[framework, ours]:.1f} | {beside} |")
    file = f"bench/results/{path.name}"
    return [
        f"{told_machine(data['machine'])}; [`{file}`](../{file}):",
        "",
        "| µs of the host a call | flashcore | SDPA, or JAX's own |",
        "|---|---:|---:|",
        *rows,
        "",
    ]


def section(results: Path, _: Path) -> str:
    """A table for each file."""
    tables = [table(path) for path in sorted(results.glob("overhead_*.json"))]
    about = "Inputs are one row of 8 numbers, so that nearly all is the call and not the kernel (`bench/overhead.py`)."
    return "\n".join([about, "", *(line for lines in tables for line in lines)]) if tables else ""
