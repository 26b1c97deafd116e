"""python -m flashcore bench: what is measured, by which clock, what the samples say, and that a run can be cut off."""

from __future__ import annotations

import csv
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import flashcore as fc
import numpy as np
import pytest
from flashcore import _core
from flashcore.bench import (
    arrays,
    calls,
    cases,
    ceilings,
    compare,
    exact,
    ladder,
    peers,
    plot,
    provenance,
    results,
    run,
)
from flashcore.bench.stage import Stage
from flashcore.bench.statistics import quartiles, summary
from flashcore.bench.timing import Contender, Plan, take_rounds
from hypothesis import given
from hypothesis import strategies as st

TINY = "fwd fp32 b1 q32 k32 h2 d16"
QUICK = Plan(warm_up=1, rounds=3, seconds=0.2)
#: one of each kind of call, small; the arrays of all of them are checked against float64
LINES = [
    "fwd fp16 b2 q40 k40 h4/2 d16 causal",
    "fwd bf16 b2 q40 k50 h4/2 d16/32 causal_br window4,* lse",
    "fwd fp32 b1 q40 k30 h2 d16 causal_tl window5,* softcap2.5",
    "fwd fp32 b1 q40 k60 h2 d16 window3,2 scale0.5",
    "fwd fp64 b1 q600 k700 h1 d8 mask causal_tl",
    "fwd fp32 b3 q20 k20 h2 d8 varlen50/50 causal",
    "fwd e4m3 b1 q20 k20 h2 d16",
    "bwd fp32 b2 q40 k50 h4/2 d16 causal_tl softcap5",
    "bwd fp32 b3 q20 k20 h2 d8 varlen50/50",
    "decode bf16 b2 q1 k64 h4/2 d16 page16",
    "decode fp32 b2 q3 k61 h4/2 d16",
]


def flashcore_command(*words, **keywords):
    """The command, with the keyboard's interrupt on even where the tests were started with it off."""
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from flashcore.__main__ import main; sys.exit(main())"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program, "bench", *map(str, words)], **pipes, **keywords)


# ---- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.CASES)
def test_every_name_stands_for_lines_that_the_library_reads(kind):
    for name in cases.names(kind):
        lines = cases.lines_of([name], kind)
        assert lines
        assert lines == [_core.canonical_problem_line(line) for line in lines]


def test_all_is_every_line_once():
    lines = cases.lines_of(["all"], "cuda")
    assert len(lines) == len(set(lines))
    assert set(lines) == {line for name in cases.CASES["cuda"] for line in cases.lines_of([name], "cuda")}


def test_a_line_may_be_one_word_or_several():
    words = ["mission", *TINY.split(), "small", TINY.replace("q32", "q8")]
    lines = cases.lines_of(words, "cpu")
    assert lines[:2] == [cases.MISSION, TINY]
    assert lines[-1] == TINY.replace("q32", "q8")


def test_decode_is_a_name_and_the_first_word_of_a_line():
    line = "decode fp32 b1 q1 k64 h2 d16"
    named = cases.lines_of(["decode"], "cpu")
    assert len(named) > 1
    assert cases.lines_of(line.split(), "cpu") == [line]
    assert cases.lines_of(["decode", "mission"], "cpu") == [*named, cases.MISSION]


def test_a_malformed_line_names_the_word_and_shows_one_that_can_be_read():
    with pytest.raises(ValueError, match="causel") as error:
        cases.lines_of([TINY + " causel"], "cpu")
    shown = re.search(r'for example: "(.*)"', str(error.value))[1]
    assert cases.parse(shown).line == shown


def test_an_unknown_name_is_told_which_there_are():
    with pytest.raises(ValueError, match="fast.*mission.*decode.*all") as error:
        cases.lines_of(["fast"], "cpu")
    assert cases.EXAMPLE in str(error.value)


def test_a_file_holds_a_case_in_each_line(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(f"# mine\n\n{TINY}  # the tiny one\nsmall\n")
    assert cases.lines_of([f"@{file}"], "cpu") == [TINY, *cases.lines_of(["small"], "cpu")]


def test_an_error_in_a_file_names_its_line(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(f"{TINY}\nfwd fp16 b1 q1 k1 h1 d1 colour\n")
    with pytest.raises(ValueError, match=r"mine\.txt:2: .*colour"):
        cases.lines_of([f"@{file}"], "cpu")
    with pytest.raises(ValueError, match="cannot be read"):
        cases.lines_of(["@" + str(tmp_path / "none.txt")], "cpu")


def seen(case, seqlen_q, seqlen_k):
    """Which query of one sequence sees which key, written out."""
    rows, keys = np.indices((seqlen_q, seqlen_k))
    place = rows if case.causal == "top_left" else rows + seqlen_k - seqlen_q
    left, right = case.window
    keep = np.ones(rows.shape, bool)
    if case.causal:
        keep &= keys <= place
    elif right is not None:
        keep &= keys <= place + right
    if left is not None:
        keep &= keys >= place - left
    if "mask" in case.words:
        keep &= (rows // cases.MASK_BLOCK + keys // cases.MASK_BLOCK) % 2 == 0
    return keep


@pytest.mark.parametrize("line", LINES)
def test_pairs_are_those_that_are_seen(line):
    case = cases.parse(line)
    lengths = zip(case.lengths("q"), case.lengths("k"), strict=True)
    assert case.pairs == sum(seen(case, q, k).sum() for q, k in lengths)


def test_packed_lengths_fill_the_totals():
    case = cases.parse("fwd fp32 b4 q100 k90 h1 d8 varlen251/240")
    assert case.lengths("q") == [100, 51, 50, 50]
    assert sum(case.lengths("k")) == 240


def test_work_is_two_for_each_multiply_add():
    forward, backward = cases.parse("fwd fp16 b2 q5 k7 h3 d11/13"), cases.parse("bwd fp16 b2 q5 k7 h3 d11/13")
    assert forward.flops == 2 * 2 * 3 * 5 * 7 * (11 + 13)
    assert backward.flops == 2 * 2 * 3 * 5 * 7 * (3 * 11 + 2 * 13)  # q k, dout v; dq, dk; dv


def test_bytes_are_each_array_once():
    assert cases.parse("fwd fp16 b2 q5 k7 h4/2 d8").bytes == 2 * (2 * 2 * 4 * 5 * 8 + 2 * 2 * 2 * 7 * 8)
    assert cases.parse("decode fp32 b2 q1 k64 h4/2 d8").bytes == 4 * (2 * 2 * 4 * 8 + 2 * 2 * 2 * 64 * 8)


def test_keys_that_no_query_sees_need_not_be_moved():
    whole, window = cases.parse("decode fp32 b1 q1 k64 h1 d8"), cases.parse("decode fp32 b1 q1 k64 h1 d8 window15,*")
    assert whole.bytes - window.bytes == 4 * 2 * 8 * (64 - 16)


# ---- inputs and the check of results ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [("bfloat16", "bfloat16"), ("float8_e4m3", "float8_e4m3fn")])
def test_encoding_rounds_as_ml_dtypes_does(ours, theirs, rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = (rng.standard_normal(10_000) * 10.0 ** rng.integers(-4, 3, 10_000)).astype(np.float32)
    expected = values.astype(getattr(ml_dtypes, theirs))
    known = np.isfinite(expected.astype(np.float32)) & (np.abs(values) <= 448 if "float8" in ours else True)
    bits = arrays.encode(values, ours)
    np.testing.assert_array_equal(arrays.decode(bits, ours)[known], expected.astype(np.float64)[known])


@pytest.fixture(scope="module")
def maker():
    return arrays.Maker(cuda=False, index=0, stream=0)


@pytest.mark.parametrize("line", LINES)
def test_our_call_of_a_line_is_what_the_line_says(line, maker):
    case = cases.parse(line)
    made = arrays.make(case, maker, results=True)
    sample = exact.sample(case, made, maker)
    bound = {"fp16": 2e-3, "bf16": 1.5e-2, "e4m3": 1.5e-2, "fp32": 1e-5, "fp64": 1e-12}[case.dtype]
    assert sample.error(calls.ours(case, made)(), "bhsd") < bound


@pytest.mark.parametrize("line", ["fwd fp32 b1 q40 k40 h2 d16", "bwd fp32 b1 q40 k40 h2 d16 causal"])
def test_a_wrong_result_shows(line, maker):
    case, wrong = cases.parse(line), cases.parse(line + " scale0.5")
    made = arrays.make(case, maker)
    assert exact.sample(case, made, maker).error(calls.ours(wrong, made)(), "bhsd") > 0.05


@pytest.mark.parametrize(
    "words",
    ["bias alibi sinks", "dropout0.25 seed7", "append2 rotary16i", "seqused", "dlse bias sinks", "descale"],
)
def test_calls_of_the_other_words_run(words, maker):
    phase = {"append2": "decode", "dlse": "bwd"}.get(words.split()[0], "fwd")
    sizes = "b2 q1 k40 h2 d16" if phase == "decode" else "b2 q20 k20 h2 d16"
    case = cases.parse(f"{phase} {'e4m3' if words == 'descale' else 'fp32'} {sizes} {words}")
    result = calls.first(calls.ours(case, arrays.make(case, maker))())
    assert np.isfinite(arrays.decode(maker.host(result), result.dtype)).all()


def test_rising_keys_outgrow_each_other_from_the_last_block_to_the_first():
    """By more than the 8 powers of two that the fast kernels let pass."""
    case = cases.parse("fwd fp32 b2 q64 k256 h3 d32")
    rising = arrays.Maker(cuda=False, index=0, stream=0, inputs="rising")
    made = arrays.make(case, rising)
    q, k = (rising.host(made[name]).astype(np.float64) for name in "qk")
    blocks = (q @ k.swapaxes(-1, -2) / np.sqrt(32) * np.log2(np.e)).reshape(2, 3, 64, 4, 64).max(-1).mean((0, 1, 2))
    assert (np.diff(blocks[::-1]) > 4).all() and blocks[0] > blocks[-1] + 8
    assert len(np.unique(k)) == 256 * 32  # each head has them


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 100])
def test_an_array_repeats_the_numbers_that_fill_it(count, maker):
    bits = np.arange(7, dtype=np.float16)
    assert np.array_equal(maker.host(maker.repeated(bits, (count,), "float16")), np.resize(bits, count))


# ---- samples ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-7, 10), min_size=2, max_size=200))
def test_the_summary_is_numpys(seconds):
    told, times = summary(seconds), np.array(seconds) * 1e6
    expected = {"us": np.median(times), "us_mean": np.mean(times), "us_min": np.min(times), "us_max": np.max(times)}
    expected |= {f"us_p{p}": np.percentile(times, p) for p in (50, 90, 95, 99)}
    expected |= {"us_low": np.percentile(times, 25), "us_high": np.percentile(times, 75)}
    expected["us_std"] = statistics.stdev(map(float, times))
    assert {name: told[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert told["samples"] == len(seconds)


def test_one_sample_has_no_deviation():
    assert summary([3e-6])["us_std"] == 0


def test_quartiles_lie_between_the_samples():
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"low": 2.0, "median": 3.0, "high": 4.0}


class Machine:
    """A clock that tells what its contenders say of themselves, and writes down who ran."""

    def __init__(self):
        self.ran = []

    def contender(self, name, seconds, per_queue=1):
        return Contender(name, lambda repeats: self.ran.append((name, repeats)) or seconds * repeats, per_queue)

    def clock(self, queue, repeats):
        return queue(repeats)


def test_everyone_runs_once_in_each_round():
    machine = Machine()
    timed = [machine.contender(name, 1.0) for name in "abc"]
    take_rounds(timed, machine.clock, Plan(warm_up=2, rounds=5, seconds=60))
    assert [len(contender.samples) for contender in timed] == [5, 5, 5]
    for start in range(3, len(machine.ran), 3):  # behind the three trials
        assert {name for name, _ in machine.ran[start : start + 3]} == set("abc")


def test_short_calls_are_repeated_and_the_sample_is_of_one():
    machine = Machine()
    short, long = machine.contender("short", 1e-5, per_queue=4), machine.contender("long", 1.0)
    take_rounds([short, long], machine.clock, Plan(warm_up=0, rounds=3, seconds=60, sample_seconds=1e-3))
    assert (short.repeats, long.repeats) == (100, 1)
    assert short.samples == pytest.approx([1e-5 / 4] * 3)


def test_what_comes_between_is_not_repeated_and_comes_before_each_sample():
    machine, flushes = Machine(), []
    only = machine.contender("a", 1e-6)
    plan = Plan(warm_up=1, rounds=3, seconds=60, sample_seconds=0)
    take_rounds([only], machine.clock, plan, between=lambda: flushes.append(len(machine.ran)))
    assert flushes == list(range(5))
    assert only.repeats == 1


# ---- results ---------------------------------------------------------------------------------------------------------


def entry(line=TINY, us=10.0, low=9.0, high=11.0, **others):
    times = {"us": us, "us_low": low, "us_high": high}
    found = {"flashcore": times} | {name: {"us": value} for name, value in others.items()}
    work = cases.parse(line)
    return {"line": line, "kernel": "cpu.flash", "flops": work.flops, "bytes": work.bytes, "results": found}


def data(*entries, **machine):
    return {"machine": machine, "settings": {}, "ceilings": None, "complete": True, "cases": list(entries)}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((10, 9, 11), (12, 11.5, 13), "slower"),  # the bands do not touch
        ((10, 9, 11), (12, 10.5, 13), "same"),  # they overlap
        ((10, 9, 11), (10, 9, 11), "same"),
        ((10, 9, 11), (8, 7, 8.9), "faster"),
        ((10, 9, 11), (9, 8, 9.0), "same"),  # they touch
    ],
)
def test_a_change_counts_beyond_the_noise_of_both(old, new, expected):
    (change,) = compare.changes(data(entry(TINY, *old)), data(entry(TINY, *new)))
    assert change.verdict == expected
    assert change.ratio == pytest.approx(new[0] / old[0])


def test_only_cases_that_both_have_are_compared():
    other = TINY.replace("q32", "q16")
    assert compare.changes(data(entry(TINY)), data(entry(other))) == []


def test_files_without_quartiles_are_compared_by_their_extremes():
    old = entry()
    old["results"]["flashcore"] = {"us": 10, "us_min": 9, "us_max": 14}
    (change,) = compare.changes(data(old), data(entry(us=12, low=11.9, high=12.1)))
    assert change.verdict == "same"


def test_what_the_others_did_tells_the_machine_from_the_code():
    old, new = (
        data(entry(SDPA=10.0), entry(cases.MISSION, SDPA=20.0)),
        data(entry(SDPA=40.0), entry(cases.MISSION, SDPA=20.0)),
    )
    assert compare.drift(old, new) == {"SDPA": pytest.approx(2.0)}
    assert compare.drift(data(entry()), data(entry(SDPA=10.0))) == {}


def test_another_machine_is_pointed_out():
    assert compare.differences(data(gpu="A"), data(gpu="B")) == ["gpu: A then, B now"]
    assert compare.differences(data(gpu="A"), data(gpu="A")) == []


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("bench/results/forward_*.json")), ids=str)
def test_published_results_stay_readable(path):
    published = results.load(path)
    results.add_rates(published)
    assert all(change.verdict == "same" for change in compare.changes(published, published))


def test_a_file_gives_back_what_was_saved(tmp_path):
    path, saved = tmp_path / "r.json", data(entry(SDPA=20.0), gpu="A")
    results.add_rates(saved)
    results.save(path, saved)
    assert results.load(path) == saved


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    results.save(path, data(entry()))
    with pytest.raises(TypeError):
        results.save(path, data(entry(), gpu=object()))
    assert results.load(path) == data(entry())


def test_rates_follow_from_times_and_ceilings():
    saved = data(entry("fwd fp16 b1 q512 k512 h8 d64", us=10.0)) | {
        "ceilings": {"matmul_tflops": {"fp16": 500.0}, "copy_gbs": 4000.0}
    }
    results.add_rates(saved)
    result = saved["cases"][0]["results"]["flashcore"]
    assert result["tflops"] == pytest.approx(4 * 8 * 512**2 * 64 / 10e-6 / 1e12)
    assert result["gbs"] == pytest.approx(4 * 8 * 512 * 64 * 2 / 10e-6 / 1e9)
    assert result["share_matmul"] == pytest.approx(result["tflops"] / 500)
    assert result["share_copy"] == pytest.approx(result["gbs"] / 4000)


def test_on_the_cpu_a_product_in_float32_is_a_ceiling_of_16_bits_too(monkeypatch):
    stage = Stage("cpu", with_torch=False)
    monkeypatch.setattr(ceilings, "_product_tflops", lambda _, d: {"fp16": 0.001, "fp32": 0.5, "bf16": 0.7}.get(d))
    assert [ceilings.matmul_tflops(stage, dtype) for dtype in ("fp16", "bf16", "fp32", "fp64")] == [0.5, 0.7, 0.5, None]


def test_the_ladder_climbs_from_the_scalar_kernel_to_the_chosen_one():
    found = entry(us=10.0, **{"SDPA flash": 12.0, "SDPA math": 90.0})
    found["results"] |= {"flashcore cuda.reference": {"us": 300.0}, "flashcore ladder.fused_wmma": {"us": 40.0}}
    found["results"] |= {"flashcore ladder.unfused_wmma": {"us": 80.0}}
    names = [ladder.label(found, name) for name, _ in ladder.climb(found)]
    rungs = ["cuda.reference", "ladder.unfused_wmma", "ladder.fused_wmma", "cpu.flash"]
    assert names == [*rungs, "SDPA math", "SDPA flash"]
    assert ladder.best_sdpa(found) == 12.0


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    old = data(entry(), git_sha="a") | {"settings": {"clock": "wall"}}
    results.check_same_run(tmp_path, old, {"git_sha": "a"}, {"clock": "wall"})
    with pytest.raises(ValueError, match="git_sha 'a' there, 'b' here"):
        results.check_same_run(tmp_path, old, {"git_sha": "b"}, {"clock": "wall"})
    with pytest.raises(ValueError, match="clock"):
        results.check_same_run(tmp_path, old, {"git_sha": "a"}, {"clock": "events"})


@pytest.mark.parametrize("draw", ["by_seqlen", "climb", "roofline"])
@pytest.mark.parametrize("ending", plot.FORMATS)
def test_pictures_are_drawn(draw, ending, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [f"{phase} fp16 b1 q{n} k{n} h8 d64" for phase in ("fwd", "bwd") for n in (512, 1024)]
    saved = data(*(entry(line, SDPA=20.0) for line in [*lines, "decode bf16 b1 q1 k512 h8 d64"]))
    saved["ceilings"] = {"matmul_tflops": {"fp16": 500.0}, "copy_gbs": 4000.0}
    results.add_rates(saved)
    path = tmp_path / f"picture{ending}"
    getattr(plot, draw)(saved["cases"][0] if draw == "climb" else saved, path)
    assert path.read_bytes().startswith(b"\x89PNG" if ending == ".png" else b"<?xml")
    assert path.stat().st_size > 5_000


def test_a_commit_is_told_only_of_our_own_tree(tmp_path, monkeypatch):
    monkeypatch.delenv("FLASHCORE_GIT_SHA", raising=False)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=False)
    monkeypatch.chdir(tmp_path)
    assert provenance.git_sha() == ""


# ---- contenders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["fwd fp32 b2 q40 k40 h4 d16 causal", "fwd fp32 b1 q40 k70 h4/2 d16 causal_br"])
def test_peers_on_the_cpu_do_the_same_attention(line):
    pytest.importorskip("torch")
    stage = Stage("cpu")
    chosen, _ = peers.choose(stage, None)
    found = run.measure(line, stage, chosen, run.Settings(QUICK, "wall", "warm"))
    assert {"flashcore", "SDPA", "SDPA math"} <= set(found["results"])
    assert all(result["error"] < 1e-5 for result in found["results"].values())
    assert found["ratio_to_best_peer"] > 0


def test_gradients_of_peers_are_the_same_gradients():
    pytest.importorskip("torch")
    stage = Stage("cpu")
    chosen, _ = peers.choose(stage, ["sdpa"])
    found = run.measure("bwd fp32 b1 q40 k40 h4/2 d16 causal", stage, chosen, run.Settings(QUICK, "wall", "warm"))
    assert found["failures"] == {}
    assert all(result["error"] < 1e-5 for result in found["results"].values())


def test_a_peer_that_cannot_do_a_case_says_what_it_lacks():
    pytest.importorskip("torch")
    stage = Stage("cpu")
    chosen, _ = peers.choose(stage, ["sdpa"])
    found = run.measure("fwd fp32 b1 q8 k8 h2 d16 sinks", stage, chosen, run.Settings(QUICK, "wall", "warm"))
    assert found["failures"] == {"SDPA": "does not know sinks"}
    assert "flashcore" in found["results"]


def test_without_torch_flashcore_is_timed_on_its_own_arrays():
    stage = Stage("cpu")
    stage.torch = None
    found = run.measure(TINY, stage, [], run.Settings(QUICK, "wall", "warm"))
    assert found["results"]["flashcore"]["error"] < 1e-5
    assert found["results"]["flashcore"]["samples"] == 3


def test_recorded_work_is_timed_by_the_stopwatch():
    """On the CPU a recording is the function itself, so that this way is walked without a GPU, too."""
    stage = Stage("cpu")
    stage.torch, stage.clock_name = None, "events"
    found = run.measure(TINY, stage, [], run.Settings(QUICK, "events", "warm"))
    assert found["results"]["flashcore"]["graph"]
    assert found["results"]["flashcore"]["us"] > 0


def test_a_file_of_peers_is_timed_beside_the_others(tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch.nn.functional import scaled_dot_product_attention as sdpa\n"
        "def mine(q, k, v, causal):\n"
        "    return sdpa(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)\n"
        "PEERS = {'mine': mine}\n"
    )
    found = run.measure(TINY, Stage("cpu"), peers.from_file(file), run.Settings(QUICK, "wall", "warm"))
    assert found["results"]["mine"]["error"] < 1e-5
    file.write_text("PEERS = 3")
    with pytest.raises(ValueError, match="gives no peers"):
        peers.from_file(file)


@pytest.mark.parametrize("with_torch", [True, False])
@pytest.mark.parametrize("caches", ["rotate", "flush", "warm"])
def test_a_gpu_is_timed_by_events_and_graphs(with_torch, caches):
    if fc.device_count() == 0:
        pytest.skip("no CUDA device")
    stage = Stage("cuda", caches=caches)
    if not with_torch:
        stage.torch = None
    elif stage.torch is None:
        pytest.skip("torch cannot use the device")
    chosen, _ = peers.choose(stage, ["sdpa-flash"] if with_torch else [])
    plan = Plan(2, 5, 10.0, 0 if caches == "flush" else 1e-3)
    for line in ("fwd fp16 b1 q512 k512 h8 d64", "bwd fp16 b1 q128 k128 h2 d64", "decode bf16 b2 q1 k512 h8/2 d128"):
        found = run.measure(line, stage, chosen, run.Settings(plan, "events", caches))
        assert found["failures"] == {}
        assert all(result["graph"] and result["error"] < 2e-2 for result in found["results"].values())


# ---- the command -----------------------------------------------------------------------------------------------------


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
