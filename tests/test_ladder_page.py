"""scripts/update_ladder.py: the measured climb of docs/ladder.md."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "update_ladder.py"
RESULT = {
    "machine": {"gpu": "NVIDIA H200", "driver": "580", "git_sha": "0123456789abcdef"},
    "cases": [
        {
            "line": "fwd fp16 b1 q512 k512 h8 d64",
            "kernel": "cuda.sm90.fwd_d64",
            "flops": 536870912,
            "results": {
                "flashcore": {"us": 10.0},
                "SDPA cuDNN": {"us": 12.0},
                "SDPA math": {"us": 60.0},
                "flashcore cuda.ladder.fused_wmma": {"us": 40.0},
                "flashcore cuda.reference": {"us": 1000.0},
                "flashcore cuda.ladder.unfused_wmma": {"us": 80.0},
            },
        }
    ],
}


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("update_ladder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_results_nothing_is_said(page, tmp_path):
    assert page.section(tmp_path, tmp_path) == ""


def test_the_rungs_stand_in_order_with_their_speed_ups(page, tmp_path):
    (tmp_path / "ladder_h200.json").write_text(json.dumps(RESULT))
    rows = [line for line in page.section(tmp_path, tmp_path).splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip(" `*") for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == [
        "cuda.reference",
        "cuda.ladder.unfused_wmma",
        "cuda.ladder.fused_wmma",
        "cuda.sm90.fwd_d64",
        "SDPA math",
        "SDPA cuDNN",
    ]
    assert [row[3] for row in cells] == ["1.00", "12.50", "25.00", "100.00", "16.67", "83.33"]  # times the scalar one
    assert [row[4] for row in cells] == ["0.01", "0.15", "0.30", "1.20", "0.20", "1.00"]  # times the fastest SDPA
    assert cells[3][2] == "53.7"  # TFLOP/s


def test_a_picture_is_shown_where_there_is_one(page, tmp_path):
    (tmp_path / "ladder_h200.json").write_text(json.dumps(RESULT))
    assert "![" not in page.section(tmp_path, tmp_path)
    (tmp_path / "ladder_h200.svg").write_text("")
    assert "](ladder_h200.svg)" in page.section(tmp_path, tmp_path)


def test_only_the_marked_place_is_rewritten(page):
    text = f"before\n{page.BEGIN}old\n{page.END}\nafter\n"
    assert page.rewritten(text, "new\n") == f"before\n{page.BEGIN}new\n{page.END}\nafter\n"


def test_the_page_is_current(page):
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.rewritten(text, page.section(page.RESULTS, page.PAGE.parent)) == text
