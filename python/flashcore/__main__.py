"""The command line: python -m flashcore info | explain | demo | bench | tune."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Optional

from . import CudaError, Unsupported, __version__

REFUSALS = (ValueError, TypeError, MemoryError, OSError, RuntimeError, Unsupported, CudaError)


def main(words: Optional[Sequence[str]] = None) -> int:
    try:
        if _is_here("rich"):
            return _run(words)
        print("error: the command line needs rich: pip install 'flashcore[bench]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except REFUSALS as error:
        from rich.console import Console

        text = str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
        Console(stderr=True).print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


def _run(words: Optional[Sequence[str]]) -> int:
    from .cli import bench, demo, explain, info, tune

    parser = argparse.ArgumentParser(prog="python -m flashcore", description="Fused attention for CUDA and the CPU.")
    parser.add_argument("--version", action="version", version=f"flashcore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (info, explain, demo, bench, tune):
        module.add_parser(commands).set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    return int(arguments.run(arguments))


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # marked as missing
        return False


if __name__ == "__main__":
    sys.exit(main())
