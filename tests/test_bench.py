"""python -m flashcore bench: what is measured, by which clock, and what the samples say."""

from __future__ import annotations

import re
import statistics

import flashcore as fc
import numpy as np
import pytest
from flashcore import _core
from flashcore.bench import arrays, calls, cases, exact, peers, run
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
