"""The roofline and the summaries of docs/profiles.md: docs/roofline_*.svg of scripts/roofline.py, docs/profile_*.txt of
scripts/profile.sh."""

from __future__ import annotations

from pathlib import Path


def section(_: Path, pages: Path) -> str:
    lines: list[str] = []
    for picture in sorted([*pages.glob("roofline_*.svg"), *pages.glob("roofline_*.png")]):
        lines += ["", f"![What cases reach under the measured ceilings]({picture.name})", ""]
    for path in sorted(pages.glob("profile_*.txt")):
        title, *text = path.read_text(encoding="utf-8").strip("\n").splitlines()
        lines += ["", f"### `{title}`", "", "```", *text, "```", ""]
    return "\n".join(lines)
