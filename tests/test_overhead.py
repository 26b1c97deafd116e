"""bench/overhead.py and scripts/docs_overhead.py: what a call costs, measured and written down."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import docs_overhead
import flashcore
import pytest

pytest.importorskip("rich")

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "overhead.py"
RESULT = {
    "machine": {"gpu": "NVIDIA H200", "driver": "580", "git_sha": "0123456789abcdef", "date": "2026-01-02"},
    "cases": [
        {"framework": "cupy", "calls": {"attention(q, k, v)": {"us": 99.0}}},
        {
            "framework": "torch",
            "calls": {
                "attention(q, k, v)": {"us": 6.04},
                "torch.attention": {"us": 7.0},
                "SDPA": {"us": 15.06},
                "torch.attention, gradient to come": {"us": 18.0},
            },
        },
    ],
}


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


def test_without_results_nothing_is_said(tmp_path):
    assert docs_overhead.section(tmp_path, tmp_path) == ""


def test_a_table_for_each_file(tmp_path):
    (tmp_path / "overhead_h200.json").write_text(json.dumps(RESULT))
    lines = docs_overhead.section(tmp_path, tmp_path).splitlines()
    assert any(line.startswith("NVIDIA H200, driver 580, date 2026-01-02, commit 0123456789ab;") for line in lines)
    rows = [line for line in lines if line.startswith("| `")]
    assert rows == [
        "| `flashcore.attention` | 6.0 | – |",
        "| `flashcore.torch.attention` | 7.0 | 15.1 |",
        "| `flashcore.torch.attention`, a gradient to come | 18.0 | – |",
        "| `flashcore.attention` of CuPy's arrays | 99.0 | – |",
    ]


def test_a_run_saves_every_contender_that_can_be_imported(tmp_path):
    file = tmp_path / "overhead.json"
    done = run("--device", "cpu", "--calls", "2", "--repeats", "2", "--save", file)
    assert done.returncode == 0, done.stderr
    data = json.loads(file.read_text())
    assert data["machine"]["device"] == "cpu" and data["settings"]["calls"] == 2
    cases = {case["framework"]: case for case in data["cases"]}
    expected = {"numpy"} | {name for name in ("torch", "jax") if importlib.util.find_spec(name)}
    if flashcore.device_count() > 0:
        expected.discard("jax")  # its arrays lie on the GPU
    assert set(cases) == expected
    assert all(cost["us"] <= cost["median_us"] for case in cases.values() for cost in case["calls"].values())
    if "torch" in cases:
        assert {"attention(q, k, v)", "torch.attention", "SDPA", "SDPA, compiled"} <= set(cases["torch"]["calls"])


@pytest.mark.parametrize("arguments", [["--device", "moon"], ["--save", "/no/such/folder/a.json"]])
def test_bad_input_is_one_line(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("overhead.py: ") and len(done.stderr.splitlines()) == 1
