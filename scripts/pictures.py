"""The pictures in docs/ that are drawn from results: which there are, how they are drawn, which are out of date.

Each says in its own description from what it was drawn, by a SHA-256. Drawing needs flashcore and matplotlib, reading
that back neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS, RESULTS = ROOT / "docs", ROOT / "bench" / "results"
#: few enough to be told apart by colour
ROOFLINE = (
    "fwd bf16 b2 q8192 k8192 h32 d64",
    "fwd bf16 b2 q8192 k8192 h16 d128",
    "fwd bf16 b2 q8192 k8192 h16 d128 causal",
    "fwd bf16 b2 q8192 k8192 h8 d256",
    "fwd fp16 b1 q512 k512 h8 d64",
    "fwd fp16 b4 q256 k256 h8 d64",
)


def draw_speeds(data: dict[str, Any], path: Path, description: str) -> None:
    from flashcore.bench import plot

    data["cases"] = [case for case in data["cases"] if " bf16 " in case["line"]]  # the others are in µs
    plot.by_seqlen(data, path, description)


def draw_climb(data: dict[str, Any], path: Path, description: str) -> None:
    from flashcore.bench import plot

    plot.climb(data["cases"][0], path, description)


def draw_roofline(data: dict[str, Any], path: Path, description: str) -> None:
    from flashcore.bench import plot

    data["cases"] = [case for case in data["cases"] if case["line"] in ROOFLINE]
    plot.roofline(data, path, description)


@dataclass(frozen=True)
class Picture:
    path: Path
    source: Path  #: a result of `flashcore bench`
    draw: Callable[[dict[str, Any], Path, str], None]

    def description(self) -> str:
        return f"drawn from {self.source.name}, SHA-256 {hashlib.sha256(self.source.read_bytes()).hexdigest()}"

    def is_current(self) -> bool:
        """Both formats have the description as it is: PNG in an uncompressed chunk of text, SVG in an element."""
        return self.path.exists() and self.description().encode() in self.path.read_bytes()

    def redraw(self) -> None:
        from flashcore.bench import results

        data = results.load(self.source)
        results.add_rates(data)
        self.draw(data, self.path, self.description())


SPEEDS = Picture(DOCS / "forward_h200.png", RESULTS / "forward_h200.json", draw_speeds)
OF_README = (SPEEDS,)
OF_DOCS = (
    Picture(DOCS / "ladder_h200.svg", RESULTS / "ladder_h200.json", draw_climb),
    Picture(DOCS / "roofline_h200.svg", RESULTS / "forward_h200.json", draw_roofline),
)


def report_stale(pictures: tuple[Picture, ...], command: str) -> bool:
    """Names those that were drawn from other results than there are now; whether there are any."""
    stale = [picture for picture in pictures if not picture.is_current()]
    for picture in stale:
        print(f"docs/{picture.path.name}: STALE: not drawn from {picture.source.name} as it is: run {command}")
    return bool(stale)
