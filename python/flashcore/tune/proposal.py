"""A better tile as a change to tiles.h."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from .instance import Instance
from .space import Tile

TILES = Path("src/kernels/sm90/tiles.h")


def proposal(source: Path, instance: Instance, old: Tile, new: Tile) -> str:
    """A unified diff where tiles.h has one line with just the old tile, else what the function should return."""
    text = (source / TILES).read_text(encoding="utf-8")
    literal = re.compile(re.escape(f"return {{{old.cpp()}}};"))
    if len(literal.findall(text)) != 1:
        call = f"fwd_tile({instance.bucket}, FwdKind::{instance.kind}, FwdSize::large)"
        return f"{TILES}: {call} should return {{{new.cpp()}}}, not {{{old.cpp()}}}"
    changed = literal.sub(f"return {{{new.cpp()}}};", text)
    lines = difflib.unified_diff(text.splitlines(), changed.splitlines(), f"a/{TILES}", f"b/{TILES}", lineterm="", n=2)
    return "\n".join(lines)
