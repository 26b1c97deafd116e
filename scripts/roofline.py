#!/usr/bin/env python3
"""Draws the roofline of a result of `python -m flashcore bench`: what its cases reach under the measured ceilings.

roofline.py RESULT.json PICTURE.png|svg [CASE LINE …]: all cases, or these. Needs flashcore and matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flashcore.bench import cases, plot, results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("lines", nargs="*", help="problem lines of the result")
    arguments = parser.parse_args()
    try:
        plot.check_path(arguments.picture)
        results.check_writable(arguments.picture)
        data = results.load(arguments.result)
        if arguments.lines:
            wanted = {cases.parse(line).line for line in arguments.lines}
            data["cases"] = [entry for entry in data["cases"] if entry["line"] in wanted]
        results.add_rates(data)
        plot.roofline(data, arguments.picture)
    except ValueError as error:
        sys.exit(f"scripts/roofline.py: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
