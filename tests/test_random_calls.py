"""Ten thousand random calls, valid and invalid: none crashes, and none touches what it must not."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("random_calls.py")
CALLS, CHUNK = 10_000, 500


@pytest.mark.parametrize("first", range(0, CALLS, CHUNK))
def test_random_calls(first):
    """In a process of its own: a crash ends that alone, and the last number it printed is the call's seed."""
    command = [sys.executable, "-X", "faulthandler", str(PROGRAM), str(first), str(CHUNK)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    seed = next(line for line in reversed([str(first), *lines]) if line.isdigit())
    assert done.returncode == 0, (
        f"exit code {done.returncode}; to see it again: python tests/random_calls.py {seed}\n"
        f"{lines[-1:]}\n{done.stderr[-3000:]}"
    )
