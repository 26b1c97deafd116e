"""python -m flashcore bench, where something is wrong: a damaged file, an impossible case, another machine, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cpu_compare
import flashcore as fc
import pytest
from flashcore.bench import arrays, calls, cases, compare, exact, provenance, results, run
from flashcore.bench.stage import Stage

ROOT = Path(__file__).parent.parent
TINY = "fwd fp32 b1 q32 k32 h2 d16"
OTHER = "fwd fp32 b1 q16 k16 h2 d16"
QUICK = ["--device", "cpu", "--peers", "none", "--seconds", "0.05", "--no-ceilings"]
AS_FROM_A_KEYBOARD = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "


@pytest.fixture
def bench_error(bench):
    """What the command says is wrong: one line."""

    def command(*words):
        text = bench(*words, code=2)
        (line,) = (line for line in text.splitlines() if line.startswith("error:"))
        return line

    return command


def timed(line=TINY, us=10.0):
    return {"line": line, "results": {"flashcore": {"us": us, "us_low": us * 0.9, "us_high": us * 1.1}}, "failures": {}}


def failed(line=TINY):
    return {"line": line, "results": {}, "failures": {"flashcore": "no kernel"}}


def data(*entries, **machine):
    return {"machine": machine, "settings": {}, "ceilings": None, "complete": True, "cases": list(entries)}


@pytest.fixture
def saved(tmp_path):
    """The path of a file with these cases."""

    def save(name, *entries, **machine):
        results.save(tmp_path / name, data(*entries, **machine))
        return tmp_path / name

    return save


# ---- against an older result -----------------------------------------------------------------------------------------


def test_a_case_that_fails_now_is_shown_and_is_an_exit_status(bench, saved):
    old, new = saved("old.json", timed(), timed(OTHER)), saved("new.json", failed(), timed(OTHER))
    text = bench("--load", new, "--compare", old, code=1)
    assert re.search(rf"{TINY} .* failed", text)
    assert re.search(rf"{OTHER} .* within the noise", text)


def test_a_case_that_failed_before_is_no_loss(bench, saved):
    old, new = saved("old.json", failed(), timed(OTHER)), saved("new.json", failed(), timed(OTHER))
    assert compare.failed(results.load(old), results.load(new)) == {}
    bench("--load", new, "--compare", old)


def test_no_case_in_common_is_an_error(bench_error, saved):
    old, new = saved("old.json", timed()), saved("new.json", timed(OTHER))
    assert f"{old}: nothing to compare with" in bench_error("--load", new, "--compare", old)


def test_no_case_in_common_is_told_before_anything_is_measured(bench_error, saved, monkeypatch):
    monkeypatch.delattr(run, "take_rounds")
    assert "nothing to compare with" in bench_error(OTHER, *QUICK, "--compare", saved("old.json", timed()))


# ---- the number of threads -------------------------------------------------------------------------------------------


def test_a_result_of_the_cpu_names_its_threads():
    assert provenance.machine(Stage("cpu", with_torch=False))["threads"] == fc.num_threads()


@pytest.mark.parametrize("name", ["cores", "threads"])
def test_other_threads_are_pointed_out_where_both_are_known(name):
    assert compare.differences(data(**{name: 2}), data(**{name: 4})) == [f"{name}: 2 then, 4 now"]
    assert compare.differences(data(), data(**{name: 4})) == []


@pytest.mark.parametrize("name", ["cores", "threads"])
def test_a_run_of_other_threads_is_not_gone_on_with(name):
    with pytest.raises(ValueError, match=f"{name} 2 there, 4 here"):
        results.check_same_run(Path("old.json"), data(**{name: 2}), {name: 4}, {})


# ---- going on with a file --------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_the_cases_that_it_was_not_asked_for(bench, tmp_path):
    path = tmp_path / "r.json"
    bench(TINY, *QUICK, "--save", path)
    before = results.load(path)["cases"]
    bench(OTHER, *QUICK, "--save", path, "--resume")
    after = results.load(path)["cases"]
    assert after[:1] == before
    assert [entry["line"] for entry in after] == [TINY, OTHER]


# ---- cases that cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["fwd fp32 b0 q8 k8 h1 d64", "bwd fp32 b0 q8 k8 h1 d64", "fwd fp32 b1 q0 k8 h1 d64"])
def test_an_empty_call_is_timed_as_any_other(line, bench):
    assert "flashcore" in bench(line, *QUICK)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("b2 q8 k8 h1 d16 varlen3/3", "q8 are 8 to 16 rows together, not 3"),
        ("b2 q8 k8 h1 d16 varlen16/17", "k8 are 8 to 16 rows together, not 17"),
        ("b0 q8 k8 h1 d16 varlen3/0", "q8 are 0 to 0 rows together, not 3"),
    ],
)
def test_lengths_that_do_not_fit_are_told_as_a_failure(words, told, bench):
    assert told in bench(f"fwd fp32 {words}", *QUICK, code=1)


@pytest.mark.parametrize("lengths", ["8/8", "16/16", "9/15"])
def test_lengths_that_fit_are_measured(lengths):
    case = cases.parse(f"fwd fp32 b2 q8 k8 h1 d16 varlen{lengths}")
    made = arrays.make(case, maker := arrays.Maker(cuda=False, index=0, stream=0))
    assert exact.sample(case, made, maker).error(calls.ours(case, made)(), "bhsd") < 1e-5


def test_a_word_that_no_arrays_are_made_for_is_told_whole(bench):
    assert 'no arrays are made for "out_fp16"' in bench("fwd fp32 b1 q8 k8 h1 d16 out_fp16", *QUICK, code=1)


@pytest.mark.parametrize("size", ["b9000000000000 q8", "b1 q8000000000000"])
def test_sizes_beyond_all_memory_are_a_failure_with_a_reason(size, bench):
    text = bench(f"fwd fp32 {size} k8 h1 d64", TINY, *QUICK)
    assert re.search(r"without flashcore: out of memory: q, k, v and out take \d+ GiB, the device has \d+", text)


def test_an_end_of_memory_without_words_is_told_in_words(bench_error, monkeypatch):
    monkeypatch.setattr(cases, "lines_of", lambda *_: exec("raise MemoryError"))
    assert bench_error(TINY, *QUICK) == "error: out of memory"


# ---- files of cases --------------------------------------------------------------------------------------------------


def test_a_file_of_cases_that_includes_itself_is_told(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(f"{TINY}\n@{two}\n")
    two.write_text(f"@{one}\n")
    with pytest.raises(ValueError, match=r"one\.txt:2: .*two\.txt:1: @.*one\.txt: the file includes itself"):
        cases.lines_of([f"@{one}"], "cpu")


def test_a_file_may_be_included_twice(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(f"@{two}\n@{two}\n")
    two.write_text(f"{TINY}\n")
    assert cases.lines_of([f"@{one}"], "cpu") == [TINY]


def test_a_file_without_a_case_is_told(bench_error, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("# nothing yet\n\n")
    assert "mine.txt: there is no case in it" in bench_error(f"@{file}", "--device", "cpu")


# ---- damaged results -------------------------------------------------------------------------------------------------


def damaged(change):
    whole = data(timed())
    change(whole)
    return whole


DAMAGES = {
    "machine is null, not an object": lambda d: d.update(machine=None),
    "settings is [], not an object": lambda d: d.update(settings=[]),
    'it has no "ceilings"': lambda d: d.pop("ceilings"),
    'ceilings is "high", not an object': lambda d: d.update(ceilings="high"),
    'ceilings has no "copy_gbs"': lambda d: d.update(ceilings={"matmul_tflops": {}}),
    "ceilings.matmul_tflops.fp16 is null, not a number above 0": lambda d: d.update(
        ceilings={"matmul_tflops": {"fp16": None}, "copy_gbs": 1.0}
    ),
    "cases is {}, not a list": lambda d: d.update(cases={}),
    "cases[0] is 3, not an object": lambda d: d.update(cases=[3]),
    'cases[0].line is "fwd fp16", not a problem line': lambda d: d["cases"][0].update(line="fwd fp16"),
    "cases[0].results is null, not an object": lambda d: d["cases"][0].update(results=None),
    "cases[0].results.flashcore is null, not an object": lambda d: d["cases"][0].update(results={"flashcore": None}),
    'cases[0].results.flashcore has no "us"': lambda d: d["cases"][0]["results"]["flashcore"].pop("us"),
    **{
        f"cases[0].results.flashcore.us is {json.dumps(us)}, not a number above 0": (
            lambda d, us=us: d["cases"][0]["results"]["flashcore"].update(us=us)
        )
        for us in (0, -1.0, True, "10", float("nan"), float("inf"))
    },
}


@pytest.mark.parametrize("told", DAMAGES)
def test_a_damaged_result_is_told_with_the_place(told, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(damaged(DAMAGES[told])))
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a result of `flashcore bench`: {told}")):
        results.load(path)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"cases": []}', "[" * 100_000, "\x00"])
def test_what_is_no_result_at_all_is_told(text, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a result"):
        results.load(path)


@pytest.mark.parametrize("words", [["--load"], [TINY, *QUICK, "--compare"], [TINY, *QUICK, "--resume", "--save"]])
def test_a_damaged_file_is_one_clear_error(words, bench_error, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data() | {"machine": None}))
    assert f"{path}: not a result of `flashcore bench`: machine is null" in bench_error(*words, path)


def test_a_result_without_rates_is_shown_with_them(bench, saved, tmp_path):
    pytest.importorskip("matplotlib")
    bench("--load", saved("r.json", timed()), "--plot", tmp_path / "p.svg")
    assert (tmp_path / "p.svg").exists()


def test_the_roofline_script_tells_a_damaged_file_in_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data() | {"ceilings": "high"}))
    command = [sys.executable, ROOT / "scripts" / "roofline.py", path, tmp_path / "p.svg"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert 'ceilings is "high", not an object' in line


# ---- words of the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", ["nan", "inf", "-inf", "-1"])
def test_seconds_that_are_no_time_are_refused(seconds, bench_error):
    told = f"--seconds {float(seconds)} given; a finite number of at least 0 is allowed"
    assert told in bench_error(TINY, "--device", "cpu", f"--seconds={seconds}")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that root cannot write to")
def test_a_folder_that_takes_no_file_is_noticed_before_measuring():
    with pytest.raises(ValueError, match=r"/proc/x\.json: cannot be written"):
        results.check_writable(Path("/proc/x.json"))


def test_looking_whether_a_file_can_be_written_leaves_nothing(tmp_path):
    results.check_writable(tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


# ---- a busy machine --------------------------------------------------------------------------------------------------


def test_a_busy_cpu_is_warned_of(bench, monkeypatch):
    monkeypatch.setattr(provenance, "load", lambda: 99.0)
    assert bench(TINY, *QUICK).count("warning: the load is 99.0 on ") == 1
    monkeypatch.setattr(provenance, "load", lambda: 0.0)
    assert "warning" not in bench(TINY, *QUICK)


def test_half_of_the_cores_may_be_busy():
    assert provenance.busy(4.0, 8) == ""
    assert "4.1 on 8 cores" in provenance.busy(4.1, 8)


@pytest.mark.parametrize(
    ("visible", "index", "asked"), [(None, 1, "1"), ("", 0, "0"), ("3,5", 1, "5"), ("GPU-8a, GPU-b1", 1, "GPU-b1")]
)
def test_the_gpu_that_a_program_sees_is_asked_of(visible, index, asked, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    commands = []
    monkeypatch.setattr(provenance, "output_of", lambda *command: commands.append(command) or "")
    provenance.gpu_state(index)
    assert commands[0][1] == f"--id={asked}"


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_an_interrupt_during_the_imports_is_one_line():
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'flashcore.cli.bench': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from flashcore.__main__ import main; sys.exit(main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


# ---- bench/cpu_compare.py --------------------------------------------------------------------------------------------


@pytest.fixture
def cpu_compare_error(monkeypatch, capsys):
    """What the script says of words that it refuses, without a cell measured."""
    monkeypatch.delattr(cpu_compare, "measured")

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["cpu_compare.py", *words])
        assert cpu_compare.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return command


def test_the_cpu_comparison_looks_for_its_folder_first(cpu_compare_error):
    assert "/nodir/x: cannot be written" in cpu_compare_error("--save", "/nodir/x")


def test_the_cpu_comparison_refuses_a_level_that_the_processor_lacks(cpu_compare_error, monkeypatch):
    monkeypatch.setitem(cpu_compare.LEVELS, "avx2", {"FLASHCORE_CPU_ISA": "abacus"})
    assert '--isa avx2: FLASHCORE_CPU_ISA is "abacus"' in cpu_compare_error("--isa", "avx2")


def test_the_cpu_comparison_ends_at_an_interrupt_with_one_line(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "r.json"
    script = f"sys.path.insert(0, {str(ROOT / 'bench')!r}); import cpu_compare; sys.exit(cpu_compare.main())"
    words = "--threads 1 --dtypes float32 --cases 512 decode --rounds 1000000 --seconds 0.1".split()
    command = [sys.executable, "-c", AS_FROM_A_KEYBOARD + script, *words, "--save", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **pipes)
    end = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert err.splitlines()[-1] == f"interrupted: 1 cells are in {path}"
    assert "Traceback" not in out + err
