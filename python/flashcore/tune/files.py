"""Files of tuned kernels: written here, read by the library (its format is in include/flashcore/tuning.h)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import _core

if TYPE_CHECKING:
    from .rows import Finding

FIRST_LINE = "flashcore-tuned 1"


class Entry(NamedTuple):
    device_name: str
    line: str
    kernel: str
    note: str = ""


def key_of(line: str) -> str:
    """The canonical line without its seed: what a call's own line is compared with."""
    return re.sub(r" seed\d+", "", _core.canonical_problem_line(line))


def read(path: Path) -> list[Entry]:
    """Raises ValueError for a file that cannot be read, naming the line."""
    return [Entry(*words) for words in _core.read_tuned(str(path))]


def merge(old: Iterable[Entry], findings: Iterable[Finding]) -> list[Entry]:
    """What `old` has of other problems and devices, then the kernels that were found to beat the usual ones."""
    found = {(finding.device_name, finding.line): finding.entry for finding in findings}
    kept = [entry for entry in old if (entry.device_name, entry.line) not in found]
    return kept + [entry for entry in found.values() if entry]


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Writes beside the file and moves it there: who reads it finds the old content or the new, never a part."""
    devices: dict[str, list[Entry]] = {}
    for entry in entries:
        devices.setdefault(entry.device_name, []).append(entry)
    lines = [FIRST_LINE]
    for name, kernels in devices.items():
        lines += ["", f"[{name}]"]
        lines += [f"{line} -> {kernel}{note and f'  # {note}'}" for _, line, kernel, note in kernels]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, path)
