"""examples/jax_attention.py, run as a user runs it, in a short form. (ctest runs the C++ example: install.example.)"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "jax_attention.py"


def run(*words, hide=None):
    start = f"import runpy, sys; sys.argv = sys.argv[1:]; sys.modules |= {{{hide!r}: None}} if {hide!r} else {{}}; "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", start, str(EXAMPLE), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_learns_where_to_look():
    pytest.importorskip("jax")
    done = run("--steps", "60", "--lag", "3")
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss +([0-9.]+)", done.stdout)]
    assert losses[0] > 2
    assert losses[-1] < 0.1
    assert re.search(r"favourite places back from the last:.* 3\b", done.stdout), done.stdout


def test_a_lag_that_does_not_fit_is_refused():
    pytest.importorskip("jax")
    done = run("--lag", "99")
    assert done.returncode == 2
    assert "--lag is 1 to 47" in done.stderr


def test_without_jax_it_says_what_it_needs():
    done = run(hide="jax")
    assert done.returncode == 1
    assert "This example needs JAX" in done.stderr
    assert "Traceback" not in done.stderr
