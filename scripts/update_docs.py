#!/usr/bin/env python3
"""Writes the measured sections of the pages in docs/ and beside kernels, and the pictures in docs/, from the files
bench/results/*.json and docs/profile_*.txt.

--check only says whether they are current (exit status 1 if not), and needs neither matplotlib nor flashcore.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import docs_ladder
import docs_overhead
import docs_primitives
import docs_profiles
import docs_sm90
import docs_tuning
import pictures

ROOT, DOCS, RESULTS = pictures.ROOT, pictures.DOCS, pictures.RESULTS

#: (folder of results, folder of pages) -> Markdown; empty where nothing has been measured
Section = Callable[[Path, Path], str]
#: by page: the name of its section, and who writes it
SECTIONS: dict[str, tuple[str, Section]] = {
    "docs/ladder.md": ("climb", docs_ladder.section),
    "docs/primitives.md": ("speed", docs_primitives.section),
    "docs/profiles.md": ("profiles", docs_profiles.section),
    "docs/torch.md": ("calls", docs_overhead.section),
    "docs/tuning.md": ("searches", docs_tuning.section),
    "src/kernels/sm90/README.md": ("speed", docs_sm90.section),
}


def rewritten(text: str, name: str, fresh: str) -> str:
    """The page with this section in its marked place."""
    begin, end = f"<!-- {name}: written by scripts/update_docs.py -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return before + begin + fresh + end + rest.split(end, 1)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = []
    for page, (name, section) in SECTIONS.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        fresh = rewritten(text, name, section(RESULTS, DOCS))
        if fresh != text:
            stale.append(page)
        if not arguments.check:
            path.write_text(fresh, encoding="utf-8")
    if arguments.check:
        print(f"measured sections: {'STALE: run scripts/update_docs.py' if stale else 'current'}", *stale)
        return pictures.report_stale(pictures.OF_DOCS, "scripts/update_docs.py") or bool(stale)
    for picture in pictures.OF_DOCS:
        picture.redraw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
