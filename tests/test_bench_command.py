"""python -m flashcore bench as a user types it: what it prints and saves, and that a run can be cut off."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time

import pytest
from flashcore import _core
from flashcore.bench import cases, results
from test_bench import TINY
from test_bench_results import data, entry


def flashcore_command(*words, **keywords):
    """The command, with the keyboard's interrupt on even where the tests were started with it off."""
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from flashcore.__main__ import main; sys.exit(main())"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program, "bench", *map(str, words)], **pipes, **keywords)


def test_a_short_run_on_the_cpu(bench, tmp_path):
    json_file, csv_file = tmp_path / "r.json", tmp_path / "r.csv"
    words = [TINY, "decode fp32 b1 q1 k64 h2 d16", "--device", "cpu", "--peers", "none", "--seconds", "0.2"]
    text = bench(*words, "--no-ceilings", "--save", json_file, "--csv", csv_file)
    assert TINY in text
    assert "p99" in text
    saved = results.load(json_file)
    assert saved["complete"]
    assert {"processor", "flashcore", "git_sha", "date", "python"} <= set(saved["machine"])
    result = saved["cases"][0]["results"]["flashcore"]
    assert 0 < result["us_min"] <= result["us"] <= result["us_p99"] <= result["us_max"]
    with csv_file.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["line"] for row in rows] == [case["line"] for case in saved["cases"]]
    assert float(rows[0]["us"]) == result["us"]
    again = bench("--load", json_file, "--compare", json_file)
    assert "within the noise" in again


def test_a_case_that_became_slower_is_an_exit_status(bench, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for path, factor in ((old, 1), (new, 2)):
        saved = data(entry(us=10.0 * factor, low=9.0 * factor, high=11.0 * factor))
        results.add_rates(saved)
        results.save(path, saved)
    assert "slower" in bench("--load", new, "--compare", old, code=1)
    assert "faster" in bench("--load", old, "--compare", new)


def test_the_ladder_on_the_cpu(bench):
    text = bench("--ladder", "--device", "cpu", "--peers", "none", "--seconds", "0.2", "--no-ceilings")
    assert "The ladder: " + cases.MISSION in text
    assert "cpu.reference" in text
    assert "cpu.flash" in text


def test_once_calls_a_line_and_names_its_kernel(bench):
    text = bench("--once", TINY, "decode fp32 b1 q1 k64 h2 d16", "--device", "cpu")
    assert text.splitlines() == [f"{TINY}  cpu.flash", "decode fp32 b1 q1 k64 h2 d16  cpu.decode"]


def test_a_kernel_in_a_setting_is_timed_beside_the_chosen_one(bench, tmp_path):
    word = next(word for word in _core.kernel_choices(TINY, False, 0) if word.startswith("cpu.flash:"))
    bench(
        TINY, "--device", "cpu", "--peers", "none", "--iterations", 3, "--kernel", word, "--save", tmp_path / "r.json"
    )
    (case,) = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert case["results"][f"flashcore {word}"]["kernel"] == word
    assert case["results"][f"flashcore {word}"]["us"] > 0


def test_names_are_listed_with_their_lines(bench):
    text = bench("--list", "--device", "cpu")
    assert all(name in text for name in cases.CASES["cpu"])
    assert cases.MISSION in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fast"], 'no case "fast"'),
        ([TINY + " causel"], "causel"),
        (["fwd", "fp6", "b1", "q1", "k1", "h1", "d1"], '"fp6"'),
        (["--peers", "sdpo"], 'no peer "sdpo"'),
        (["--kernel", "cpu.flesh"], 'no kernel "cpu.flesh"'),
        (["--kernel", "cpu.flash:mmx"], 'no kernel "cpu.flash:mmx"'),
        (["--save", "/no/such/folder/r.json"], "/no/such/folder/r.json: cannot be written"),
        (["--plot", "picture.gif"], "ends in .png or .svg"),
        (["--compare", "/no/such/file.json"], "cannot be read"),
        (["--load", __file__], "not a result"),
        (["--resume"], "--save"),
        (["--iterations", "0"], "at least 1"),
        (["--device", "tpu"], "tpu"),
        (["--ladder", "small"], "give no others"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_are_one_clear_error(bench, words, told):
    where = [] if "--device" in words else ["--device", "cpu"]
    text = bench(*words, *where, code=2)
    assert told in text
    assert text.count("error:") == 1


def test_a_gpu_that_is_not_there_is_one_clear_line(bench, no_cuda):
    text = bench("--device", "cuda", code=2)
    assert text.startswith("error:")
    assert len(text.splitlines()) == 1


def test_a_missing_library_is_one_clear_line(tmp_path):
    program = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(',')))\n"
        "from flashcore.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )

    def told(without, *words):
        command = [sys.executable, "-c", program, without, "bench", TINY, "--device", "cpu", "--seconds", "0.1", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    assert "without sdpa: torch is not installed" in told("torch,jax")
    assert told("matplotlib", "--plot", str(tmp_path / "p.png")).startswith("error: pictures need matplotlib")
    assert told("rich").startswith("error: the command line needs rich")


def test_an_interrupted_run_keeps_its_cases_and_goes_on(bench, tmp_path):
    path = tmp_path / "r.json"
    lines = [TINY.replace("q32", f"q{n}") for n in (8, 16, 24, 32)]
    words = [*lines, "--device", "cpu", "--peers", "none", "--iterations", "1000000", "--seconds", "0.4"]
    words += ["--no-ceilings", "--save", path]
    process = flashcore_command(*words)
    end = time.monotonic() + 120
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    assert "--resume" in err
    part = results.load(path)
    assert not part["complete"]
    assert 1 <= len(part["cases"]) < len(lines)
    bench(*words, "--resume")
    whole = results.load(path)
    assert whole["complete"]
    assert [case["line"] for case in whole["cases"]] == lines
    assert whole["cases"][: len(part["cases"])] == part["cases"]  # what was measured is not measured again
    assert json.loads(path.read_text())["machine"] == whole["machine"]
