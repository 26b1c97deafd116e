"""`explain`: which kernel a problem line gets, and why no other."""

from __future__ import annotations

import argparse
from typing import Any

from .. import _core, explain


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain", help="which kernel a problem gets, and why no other", epilog=_core.problem_line_help()
    )
    parser.add_argument("line", nargs="+", help='a problem line, such as "fwd bf16 b2 q4096 k4096 h32/8 d128 causal"')
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:N"; default: the best there is')
    parser.add_argument("--kernel", help='a kernel by its name, "cpu.flash", or in a setting, "cpu.flash:avx2"')
    return parser


def run(arguments: argparse.Namespace) -> int:
    print(explain(" ".join(arguments.line), device=arguments.device, kernel=arguments.kernel))
    return 0
