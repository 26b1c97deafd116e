"""bench/primitives.py: its cases, what they move, and a short run."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flashcore.bench")
pytest.importorskip("rich")

SCRIPT = Path(__file__).parent.parent / "bench" / "primitives.py"


@pytest.fixture(scope="module")
def primitives():
    spec = importlib.util.spec_from_file_location("bench_primitives", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("line", "left", "count"),
    [
        ("add fp16 1000", (1000,), 3000),
        ("sum fp32 30x20", (), 601),
        ("max bf16 30x20 axis0", (20,), 620),
        ("mean fp64 3x4x5 axis1", (3, 5), 75),
    ],
)
def test_a_case_says_what_it_moves(line, left, count, primitives):
    case = primitives.parse(line)
    assert case.line == line
    assert case.left == left
    assert case.bytes == count * primitives.SIZES[case.dtype]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("", ""),
        ("multiply fp32 8", "multiply"),
        ("add int8 8", "int8"),
        ("sum fp32", ""),
        ("sum fp32 8x0", "8x0"),
        ("sum fp32 8x9 axis2", "axis2"),
        ("sum fp32 8x9 rows", "rows"),
        ("sum fp32 8x9 axis0 axis1", "axis1"),
        ("add fp32 8 axis0", "axis0"),
    ],
)
def test_a_wrong_word_is_named_beside_a_line_that_parses(line, word, primitives):
    with pytest.raises(ValueError, match=f'"{word}" given.*for example "add fp32 16777216"'):
        primitives.parse(line)


def test_every_default_case_reads_itself_again(primitives):
    cases = list(primitives.default_cases(thorough=True))
    assert set(primitives.default_cases()) < set(cases)
    assert [primitives.parse(case.line) for case in cases] == cases
    assert min(case.bytes for case in cases) >= 64 << 20


@pytest.mark.parametrize(
    "line",
    ["add fp32 100", "sum fp32 1000", "mean fp32 20", "max fp32 30", "sum fp64 4x5 axis0", "mean fp32 7x9 axis1"]
    + ["min fp16 3x4x5 axis1", "max bf16 50x60 axis1"],
)
def test_the_truth_is_that_of_repeated_numbers(line, primitives, rng):
    case = primitives.parse(line)
    numbers = [rng.standard_normal(size) for size in ((37, 41) if case.op == "add" else (37,))]
    whole = [np.resize(each, case.shape) for each in numbers]
    expected = whole[0] + whole[1] if case.op == "add" else getattr(np, case.op)(whole[0], axis=case.axis)
    places = primitives.sampled_places(case)
    assert {0, np.size(expected) - 1} <= set(places)
    truth, size = primitives.exact(case, numbers, places)
    assert truth == pytest.approx(np.ravel(expected)[places], rel=1e-12)
    assert primitives.error_of(truth, truth, size) == 0
    assert primitives.error_of(truth + size / 2, truth, size) == pytest.approx(0.5)
    assert np.isnan(primitives.error_of(truth * np.nan, truth, size))


def test_a_run_writes_json_and_csv(tmp_path):
    lines = ["add fp16 4096", "sum fp32 64x32 axis0", "min fp64 100"]
    files = tmp_path / "a.json", tmp_path / "a.csv"
    options = ["--device", "cpu", "--iterations", "3", "--warm-up", "0", "--seconds", "1"]
    done = run(*lines, *options, "--save", files[0], "--csv", files[1])
    assert done.returncode == 0, done.stderr
    data = json.loads(files[0].read_text())
    assert [entry["case"] for entry in data["cases"]] == lines
    for entry in data["cases"]:
        ours = entry["results"]["flashcore"]
        assert ours["gbs"] == pytest.approx(entry["bytes"] / ours["us"] / 1e3)
        assert ours["share_copy"] == pytest.approx(ours["gbs"] / data["ceilings"]["copy_gbs"])
        assert ours["share_same_copy"] == pytest.approx(entry["copy"]["us"] / ours["us"])
        assert ours["error"] < 1e-3
    results = sum(len(entry["results"]) for entry in data["cases"])
    assert len(files[1].read_text().splitlines()) == 1 + results


def test_an_interrupted_run_keeps_its_cases_and_goes_on(primitives, tmp_path, monkeypatch, capsys):
    path, lines = tmp_path / "a.json", ["add fp32 64", "sum fp32 64", "max fp32 64"]
    usual = primitives.measure

    def interrupted(case, *others):
        if case.line == lines[1]:
            raise KeyboardInterrupt
        return usual(case, *others)

    def status(*more):
        words = [*lines, "--device", "cpu", "--iterations", "3", "--warm-up", "0", "--save", str(path), *more]
        monkeypatch.setattr(sys, "argv", ["primitives.py", *words])
        return primitives.main()

    with monkeypatch.context() as patch:
        patch.setattr(primitives, "measure", interrupted)
        assert status() == 130
    assert f"1 cases are in {path}: the same words and --resume go on" in capsys.readouterr().err
    first = json.loads(path.read_text())["cases"]
    assert [entry["case"] for entry in first] == lines[:1]
    assert status("--resume") == 0
    whole = json.loads(path.read_text())["cases"]
    assert [entry["case"] for entry in whole] == lines
    assert whole[:1] == first
    assert status("--resume", "--iterations", "4") == 2
    assert "rounds 3 there, 4 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["frob fp32 3"], ["--device", "moon"], ["--save", "/no/such/folder/a.json"], ["--resume"]]
)
def test_bad_input_is_one_line(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("primitives.py: ")
    assert len(done.stderr.splitlines()) == 1
