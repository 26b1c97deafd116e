"""The search for tiles: which there are, how it goes on, what it writes, how candidates are compiled and judged."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import flashcore as fc
import numpy as np
import pytest
import tune_doubles
from flashcore import _core
from flashcore.__main__ import main
from flashcore.bench.calls import ours
from flashcore.bench.cases import parse
from flashcore.bench.stage import Stage
from flashcore.cli import tune as cli_tune
from flashcore.tune import compile, judge, search, worker
from flashcore.tune.instance import Instance, Library, TuneCall, common_instance, instance_of
from flashcore.tune.proposal import proposal
from flashcore.tune.space import Space, Tile, launch_registers, most_consumer_registers
from flashcore.tune.state import State, tile_of
from flashcore.tune.verdict import Verdict
from hypothesis import given
from hypothesis import strategies as st
from tune_doubles import LINE, Builder, Judge, likes

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (32, 64, 80, 96, 112, 128, 176, 192, 256)
HAND_SET = Tile(192, 128, 2, 2, True, True, 32, 160)
SPACE = Space(64, "full", WIDTHS)
IDENTITY = {"instance": "i", "lines": [LINE], "device": "d", "sources": "s", "incumbent": asdict(HAND_SET)}
#: the tiles of tiles.h: head_dim, kind, tile
KNOWN = [
    (64, "full", HAND_SET),
    (64, "general", Tile(128, 128, 2, 2, True, False, 40, 232)),
    (128, "full", Tile(192, 80, 2, 2, True, False, 48, 152)),
    (128, "positional", Tile(192, 64, 2, 2, True, False, 40, 152, 8, 16, 8)),
    (192, "full", Tile(128, 80, 2, 1, True, False, 40, 232)),
    (256, "general", Tile(128, 64, 2, 1, False, True, 40, 232, 8, 32, 16)),
]

in_checkout = pytest.mark.skipif(not (ROOT / compile.ENTRY).is_file(), reason="needs the source tree")


def nvcc_or_skip() -> str:
    try:
        return compile.find_nvcc()
    except ValueError as reason:
        pytest.skip(str(reason))


# ---- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bucket", "kind", "tile"), KNOWN)
def test_the_hand_set_tiles_are_in_the_space(bucket, kind, tile):
    assert Space(bucket, kind, WIDTHS).objection(tile) == ""


@pytest.mark.parametrize(
    ("bucket", "kind", "changes", "objection"),
    [
        (64, "full", {"block_m": 64}, "rows"),
        (64, "full", {"block_m": 160}, "rows"),
        (64, "full", {"block_n": 144}, "keys"),
        (64, "full", {"block_n": 72}, "keys"),
        (64, "full", {"consumer_registers": 164}, "registers: multiples of 8"),
        (64, "full", {"producer_registers": 16}, "registers: multiples of 8"),
        (64, "full", {"consumer_registers": 120}, "registers: the producer must give"),
        (64, "full", {"consumer_registers": 168}, "registers: more than a block has"),
        (64, "general", {}, "registers: output, scores and weights do not fit"),  # spilled 220 bytes
        (64, "full", {"stages": 4, "block_m": 128, "block_n": 192}, "shared memory"),
    ],
)
def test_what_cannot_work_is_seen_without_compiling(bucket, kind, changes, objection):
    tile = replace(HAND_SET, **changes)
    if "block_m" in changes and changes["block_m"] == 128:
        tile = SPACE.with_changes(tile)
    assert Space(bucket, kind, WIDTHS).objection(tile).startswith(objection)


def test_registers_are_those_of_setmaxnreg():
    """65536 for 384 threads are 168 each; what the producer's 40 leave is 232 for two consumers."""
    assert (launch_registers(2), launch_registers(3)) == (168, 128)
    assert most_consumer_registers(2, 40) == 232
    assert most_consumer_registers(2, 24) == 240
    assert most_consumer_registers(3, 32) == 160


@given(st.integers(0, 2**32), st.sampled_from(KNOWN))
def test_new_tiles_differ_and_stay_on_the_axes(seed, known):
    bucket, kind, tile = known
    space, rng = Space(bucket, kind, WIDTHS), random.Random(seed)
    other = space.random(rng, tile)
    mutant, child = space.mutated(rng, tile), space.crossed(rng, tile, other)
    assert mutant != tile
    for made in (other, mutant, child):
        assert made.consumer_registers == most_consumer_registers(made.consumers, made.producer_registers)
        for name, values in space.axes.items():
            assert asdict(made)[name] in values
    assert all(asdict(child)[name] in (asdict(tile)[name], asdict(other)[name]) for name in space.axes)
    if kind == "full":  # the order of its tiles is fixed
        assert {made.section_mib for made in (other, mutant, child)} == {tile.section_mib}


def test_neighbours_differ_in_one_axis_the_nearest_first():
    found = list(SPACE.neighbours(HAND_SET))
    for near in found:
        changed = [name for name, value in asdict(near).items() if value != asdict(HAND_SET)[name]]
        assert len(set(changed) - {"consumer_registers"}) == 1
    order = [near.block_n for near in found if near.block_n != 128]
    assert set(order[:1]) == {112}
    assert len(found) == sum(len(values) - 1 for values in SPACE.axes.values())


# ---- problem lines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "instance"),
    [
        (LINE, Instance("BFloat16", 64, "full")),
        ("fwd fp16 b1 q512 k512 h8 d72/128 causal", Instance("Float16", 128, "positional")),
        ("fwd bf16 b1 q512 k512 h8/2 d160 window64,0", Instance("BFloat16", 192, "positional")),
        ("fwd bf16 b1 q512 k512 h8 d256 softcap30 causal lse", Instance("BFloat16", 256, "general")),
    ],
)
def test_lines_have_an_instance(line, instance):
    assert instance_of(parse(line)) == instance


@pytest.mark.parametrize(
    ("lines", "pattern"),
    [
        (["bwd bf16 b1 q8 k8 h1 d64"], "forward calls in fp16 and bf16"),
        (["fwd fp32 b1 q8 k8 h1 d64"], "forward calls in fp16 and bf16"),
        (["fwd bf16 b1 q8 k8 h1 d64 dropout0.1"], 'not searched with "dropout"; allowed: causal,'),
        (["fwd bf16 b1 q0 k8 h1 d64"], "nothing to compute"),
        (["fwd bf16 b1 q8 k8 h1 d192/129"], "must be a multiple of 8"),
        ([LINE, LINE + " causal"], "different instances of the kernel"),
    ],
)
def test_other_lines_are_refused(lines, pattern):
    with pytest.raises(ValueError, match=pattern):
        common_instance(lines)


# ---- the search ------------------------------------------------------------------------------------------------------

BEST = Tile(192, 96, 3, 1, True, True, 24, 160, 4)


def searched(path=None, gain=None, seed=0, population=16, generations=12, builder=None, **judge_words):
    state = State(IDENTITY, seed, population, 4, path)
    state.resume()
    settings = search.Settings(population, generations, minutes=10, jobs=1, seconds=0.01, seed=seed)
    builder, referee = builder or Builder(), Judge(gain or likes(BEST), **judge_words)
    try:
        search.Search(SPACE, builder, referee, state, settings).run()
    except KeyboardInterrupt:
        pass
    return state, builder, referee


def test_the_search_finds_what_is_better():
    """Of thousands of tiles, within 192: better than every tile of the first population, and nearly the best."""
    state, _, _ = searched()
    gains = [candidate["gain"] for candidate in state.candidates[1:]]
    assert max(gains) > max(gains[:16])
    assert state.elites[0]["gain"] >= likes(BEST)(BEST) - 0.02


def test_no_tile_is_tried_twice_and_none_that_cannot_work():
    state, builder, referee = searched()
    assert len(set(builder.built)) == len(builder.built) == 16 * 12
    assert all(SPACE.objection(tile) == "" for tile in builder.built)
    assert HAND_SET not in builder.built
    assert referee.judged == builder.built
    assert sum(state.data["pruned"].values()) > 0


def test_elites_stay_and_their_lineage_is_told():
    state, _, _ = searched()
    gains = {candidate["id"]: candidate["gain"] for candidate in state.candidates}
    assert [elite["gain"] for elite in state.elites[:4]] == sorted(gains.values(), reverse=True)[:4]
    assert 0 in state.data["elites"]
    for candidate in state.candidates[17:]:
        assert candidate["born"] in ("mutation", "crossover")
        assert all(parent < candidate["id"] for parent in candidate["parents"])
        assert len(candidate["parents"]) == (2 if candidate["born"] == "crossover" else 1)


def test_a_seed_repeats_the_search_and_another_does_not():
    assert searched(seed=1)[0].data["candidates"] == searched(seed=1)[0].data["candidates"]
    assert searched(seed=1)[0].data["candidates"] != searched(seed=2)[0].data["candidates"]


def test_refused_tiles_are_kept_with_their_reason_and_never_timed():
    builder = Builder(lambda tile: "spills 12 bytes" if tile.block_n == 112 else "")
    gain = lambda tile: "wrong: error 1.0" if tile.stages == 3 else 1.1  # noqa: E731
    state, _, referee = searched(gain=gain, builder=builder)
    for candidate in state.candidates[1:]:
        tile = tile_of(candidate)
        expected = "spills 12 bytes" if tile.block_n == 112 else "wrong: error 1.0" if tile.stages == 3 else ""
        assert candidate["reason"] == expected
        assert (candidate["gain"] is None) == bool(expected)
    assert not any(tile.block_n == 112 for tile in referee.judged)


def test_a_search_goes_on_where_it_was_interrupted(tmp_path):
    path = tmp_path / "search.json"
    searched(path, interrupt_after=20)
    before = json.loads(path.read_text())["candidates"]
    assert len(before) == 21
    state, builder, _ = searched(path)
    assert state.candidates[:21] == before
    assert len(state.candidates) == 1 + 16 * 12
    assert len({tile_of(candidate) for candidate in state.candidates}) == len(state.candidates)
    assert len(builder.built) == 16 * 12 - 20
    assert json.loads(path.read_text())["candidates"] == state.candidates


def test_a_file_of_another_search_is_refused(tmp_path):
    path = tmp_path / "search.json"
    searched(path, generations=1)
    other = State(IDENTITY | {"device": "another"}, 0, 16, 4, path)
    with pytest.raises(ValueError, match="search with another device: 'd', now 'another'; give another file to --save"):
        other.resume()
    path.write_text('{"cases": []}')
    with pytest.raises(ValueError, match="not a search of `flashcore tune`"):
        other.resume()


def test_a_search_without_time_or_generations_ends():
    state = State(IDENTITY, 0, 16, 4, None)
    for settings in (search.Settings(minutes=0), search.Settings(generations=0)):
        search.Search(SPACE, Builder(), Judge(likes(BEST)), state, settings).run()
    assert len(state.candidates) == 1


def test_a_search_ends_with_its_space():
    space = Space(256, "general", (64, 80))
    incumbent = Tile(128, 64, 2, 1, False, True, 40, 232)
    identity = IDENTITY | {"incumbent": asdict(incumbent)}
    state, builder = State(identity, 0, 16, 4, None), Builder()
    search.Search(space, builder, Judge(lambda tile: 1.0), state, search.Settings(generations=10**6)).run()
    assert 20 < len(builder.built) < 1000
    assert all(space.objection(tile) == "" for tile in builder.built)


# ---- the end ---------------------------------------------------------------------------------------------------------


def concluded(first, again, noise=0.0):
    """A search whose tiles seem to gain `first` and then gain `again`."""
    state, builder, _ = searched(gain=lambda tile: first, generations=1)
    referee = Judge(lambda tile: again)
    referee_judge = referee.judge
    same = tune_doubles.verdict_of(1 + noise)
    referee.judge = lambda tile, *rest: same if tile is None else referee_judge(tile, *rest)
    return search.compare_finalists(builder, referee, state, 0.01, Path("copy.so")), state


def test_what_was_best_by_chance_does_not_win():
    final, state = concluded(1.05, 1.001)
    assert final["winner"] is None
    assert state.data["final"] == final
    assert [finalist["gain"] for finalist in final["finalists"]] == [1.001] * 4


def test_a_winner_is_ahead_by_more_than_the_noise():
    assert concluded(1.05, 1.04)[0]["winner"] is not None
    assert concluded(1.05, 1.04, noise=0.05)[0]["winner"] is None
    assert concluded(0.99, 1.04)[0]["finalists"] == []


@in_checkout
def test_the_proposal_is_a_patch_of_the_hand_set_line(tmp_path):
    shutil.copytree(ROOT / "src/kernels/sm90", tmp_path / "src/kernels/sm90")
    patch = proposal(ROOT, Instance("BFloat16", 64, "full"), HAND_SET, BEST)
    subprocess.run(["patch", "-p1"], input=patch + "\n", text=True, cwd=tmp_path, check=True, capture_output=True)
    changed = (tmp_path / "src/kernels/sm90/tiles.h").read_text()
    assert "if (head_dim <= 64) return {192, 96, 3, 1, true, true, 24, 160, 4, 32, 0};" in changed
    assert str(HAND_SET) not in changed


@in_checkout
def test_the_proposal_is_a_sentence_where_no_line_has_just_the_tile():
    told = proposal(ROOT, Instance("Float16", 192, "full"), Tile(128, 112, 2, 1, False, True, 40, 232), BEST)
    assert told.startswith(
        "src/kernels/sm90/tiles.h: fwd_tile(192, FwdKind::full, FwdSize::large) should return {192, 96,"
    )


# ---- the judge's process ---------------------------------------------------------------------------------------------


@pytest.fixture
def referee(monkeypatch):
    monkeypatch.setattr(judge, "ANSWER_SECONDS", 1.0)
    made = judge.GpuJudge([LINE], "cuda:0", Path("fine"), tune_doubles.serve)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("library", "reason"),
    [("hangs", "hangs: no answer in"), ("crashes", r"ends the process (11)"), ("breaks", "an illegal instruction")],
)
def test_a_kernel_that_breaks_its_process_does_not_end_the_search(library, reason, referee):
    first = referee.judge(None, Path("fine"), 0.0)
    assert referee.judge(None, Path("fine"), 0.0) == first  # the same process
    assert referee.judge(HAND_SET, Path(library), 0.0).reason.startswith(reason)
    after = referee.judge(None, Path("fine"), 0.0)
    assert after.gain() == pytest.approx(1.5)
    assert after.us["pid"] != first.us["pid"]


def test_a_process_is_replaced_before_it_holds_too_many_libraries(referee, monkeypatch):
    monkeypatch.setattr(judge, "MOST_LIBRARIES", 2)
    processes = [referee.judge(HAND_SET, Path("fine"), 0.0).us["pid"] for _ in range(4)]
    assert processes[0] == processes[1] != processes[2] == processes[3]


def test_a_judge_that_cannot_begin_says_why():
    referee = judge.GpuJudge([LINE], "cuda:0", Path("broken"), tune_doubles.serve)
    with pytest.raises(RuntimeError, match="the hand-set tile cannot be timed: no such device"):
        referee.judge(None, Path("fine"), 0.0)
    referee.close()


class Double:
    """Stands for a compiled library: makes the library's own call, and then something to its result."""

    def __init__(self, afterwards=lambda out: None):
        self._afterwards = afterwards

    def call(self, case, arrays, stage):
        own = ours(case, arrays, stage.stream)

        def run():
            own()
            self._afterwards(arrays["out"])

        return run


def set_last(value):
    """Sets the last element, as a kernel might that forgets one; `value` are its 16 bits."""

    def change(out):
        bits = np.empty(out.shape, np.uint16)
        _core.copy_out(out, bits.ctypes.data, bits.nbytes, 0)
        bits[0, 0, -1, -1] = value
        _core.copy_in(out, bits.ctypes.data, bits.nbytes, 0)

    return change


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_tiles_are_timed_beside_the_incumbent(dtype):
    line = f"fwd {dtype} b1 q64 k64 h2 d64 causal"
    bench, verdict = worker.Bench(parse(line), Stage("cpu"), Double()), Verdict()
    bench.judge(Double(), 0.02, verdict)
    spread = verdict.gains[line]
    assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert verdict.us[line] > 0 < verdict.incumbent_us[line]


@pytest.mark.parametrize(
    ("value", "what"), [(0xFFFF, "nan from the library's own"), (0x5800, "from the library's own")]
)
def test_wrong_tiles_are_not_timed(value, what):
    """In rows that float64 does not look at, too: the sample is of the last head."""
    bench = worker.Bench(parse("fwd fp16 b1 q64 k64 h2 d64"), Stage("cpu"), Double())
    with pytest.raises(worker.Wrong, match=f"^wrong: .*{what}"):
        bench.judge(Double(set_last(value)), 0.02, Verdict())


def test_a_tile_that_writes_into_the_inputs_is_noticed():
    """Then the incumbent is wrong, too, and the process of no more use."""
    bench = worker.Bench(parse("fwd fp16 b1 q64 k64 h2 d64"), Stage("cpu"), Double())
    assert bench.is_intact(Double())
    set_last(0x5800)(bench._sets[0]["v"])
    assert not bench.is_intact(Double())


def test_what_a_tile_does_not_write_is_seen():
    """Results of the call before it lie in the same memory."""
    bench = worker.Bench(parse("fwd fp16 b1 q64 k64 h2 d64"), Stage("cpu"), Double())
    lazy = Double()
    lazy.call = lambda case, arrays, stage: lambda: None
    with pytest.raises(worker.Wrong, match="error nan against float64"):
        bench.judge(lazy, 0.02, Verdict())


# ---- the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", ""),
        ("8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads", "spills 16 bytes"),
        ("ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async", "products are serialised (C7510)"),
    ],
)
def test_ptxas_tells_what_spills_or_waits(told, reason):
    assert compile.objection(told) == reason


@in_checkout
def test_the_sources_are_found(tmp_path, monkeypatch):
    assert compile.find_source(ROOT) == ROOT
    monkeypatch.chdir(ROOT / "src")
    assert compile.find_source(None) == ROOT
    with pytest.raises(ValueError, match="no checkout of flashcore"):
        compile.find_source(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compile, "__file__", str(tmp_path / "site-packages/flashcore/tune/compile.py"))
    with pytest.raises(ValueError, match="no sources to compile: run this in a checkout"):
        compile.find_source(None)


def test_a_missing_compiler_is_one_clear_line(monkeypatch):
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compile.shutil, "which", lambda name: None)
    monkeypatch.setattr(compile.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="no nvcc: searching for tiles compiles kernels"):
        compile.find_nvcc()


@in_checkout
def test_the_incumbent_is_the_tile_of_the_sources(tmp_path):
    nvcc = nvcc_or_skip()
    for bucket, kind, tile in (KNOWN[0], KNOWN[-2]):
        assert compile.Compiler(ROOT, Instance("Float16", bucket, kind), tmp_path, nvcc).incumbent() == tile


@in_checkout
def test_tiles_are_compiled_once_and_refused_where_they_spill(tmp_path):
    """A tile that works, and one beyond the space's own limit of registers."""
    compiler = compile.Compiler(ROOT, Instance("BFloat16", 64, "full"), tmp_path, nvcc_or_skip())
    build = compiler.build(HAND_SET)
    assert build.library.is_file()
    assert build.registers == launch_registers(3)
    library, call = Library(build.library), TuneCall(batch=3, heads_q=5, heads_k=5, seqlen_q=1000, seqlen_k=1000)
    assert library.workspace_bytes(call) == 2 * 256 + 1024  # a counter, a mark, and 3 · 5 · 63 flags
    if fc.device_count() == 0:
        with pytest.raises(RuntimeError, match="CUDA failed at"):
            library.run(call)
    crowded = replace(HAND_SET, block_n=176)
    assert SPACE.objection(crowded).startswith("registers: output")
    refused = compiler.build(crowded)
    assert refused.library is None
    assert refused.reason.startswith(("spills ", "products are serialised"))
    compiler.stop()  # whoever compiles now is told so
    assert compiler.build(HAND_SET) == build
    assert compiler.build(crowded) == refused
    with pytest.raises(compile.Stopped):
        compiler.build(None)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*words, code):
    done = subprocess.run([sys.executable, "-m", "flashcore", "tune", *words], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fwd bf16 b8 x2048"], 'cannot read the word "x2048"'),
        (["nonsense"], 'no case "nonsense"'),
        (["fwd fp32 b1 q8 k8 h1 d64"], "tiles are searched for forward calls in fp16 and bf16"),
        ([LINE, "--source", "/nowhere"], "--source /nowhere: no checkout of flashcore"),
        ([LINE, "--jobs", "0"], "--jobs 0 given; at least 1 is allowed"),
        ([LINE, "--save", "/nowhere/search.json"], "/nowhere/search.json: cannot be written"),
        (["--rows", LINE, "--device", "cpu"], "no file for the tuned kernels"),
    ],
)
def test_bad_words_are_one_clear_line(words, told, monkeypatch):
    monkeypatch.delenv("FLASHCORE_TUNED", raising=False)
    assert told in run(*words, code=2)


@pytest.fixture
def search_here(tmp_path, monkeypatch, capsys):
    """The command with doubles in the place of the GPU and the compiler."""
    library = tmp_path / "library.so"
    library.write_text("")

    class Compiler(Builder):
        def __init__(self, *_):
            super().__init__(library=library)
            self.digest = "sources"

        def incumbent(self):
            return HAND_SET

    def run_with(referee, *words):
        monkeypatch.setattr(cli_tune.compile, "Compiler", Compiler)
        monkeypatch.setattr(cli_tune, "GpuJudge", lambda *_: referee)
        monkeypatch.setattr(cli_tune, "_hopper", lambda device: ("cuda:0", {"gpu": "imaginary"}))
        status = main(["tune", LINE, "--source", str(ROOT), "--jobs", "1", *words])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run_with


@in_checkout
def test_the_command_ends_with_a_table_and_a_patch(search_here, tmp_path):
    path = tmp_path / "search.json"
    status, told, _ = search_here(Judge(likes(BEST)), "--generations", "12", "--save", str(path))
    assert status == 0
    assert "192 tiles: 192 timed, 0 refused" in told
    winner = tile_of(json.loads(path.read_text())["candidates"][json.loads(path.read_text())["final"]["winner"]])
    assert f"+  if (head_dim <= 64) return {winner};" in told
    assert f"-  if (head_dim <= 64) return {HAND_SET};" in told


@in_checkout
def test_the_command_says_plainly_that_nothing_was_better(search_here):
    status, told, _ = search_here(
        Judge(lambda tile: "wrong: error 1" if tile.stages == 2 else 0.9), "--generations", "2"
    )
    assert status == 0
    assert f"nothing beat the hand-set tile {HAND_SET} by more than the noise of 0.3%: tiles.h stays as it is" in told
    assert "wrong)" in told
    assert "+++" not in told


@in_checkout
def test_ctrl_c_leaves_a_file_that_is_gone_on_with(search_here, tmp_path):
    path = tmp_path / "search.json"
    words = ("--generations", "2", "--save", str(path))
    status, _, told = search_here(Judge(likes(BEST), interrupt_after=5), *words)
    assert status == 130
    assert f"interrupted: 5 tiles are in {path}: the same words go on" in told
    status, told, _ = search_here(Judge(likes(BEST)), *words)
    assert status == 0
    assert f"going on with 5 tiles of {path}" in told
    assert "32 tiles: 32 timed" in told


@in_checkout
def test_a_hand_set_tile_that_cannot_be_timed_is_one_clear_line(search_here):
    referee = Judge(likes(BEST))
    referee.judge = lambda *_: Verdict("hangs: no answer in 30 s")
    status, _, told = search_here(referee)
    assert status == 2
    assert told.strip() == "error: the hand-set tile cannot be timed: hangs: no answer in 30 s"


@in_checkout
def test_without_a_gpu_the_search_says_so():
    if fc.device_count() > 0:
        pytest.skip("needs a machine without a GPU")
    told = run(LINE, "--source", str(ROOT), code=2)
    assert "timed on a GPU of compute capability 9.0" in told
    assert "--rows" in told


@in_checkout
def test_a_short_search_on_a_gpu(tmp_path):
    if fc.device_count() == 0 or fc.device_info(0).compute_capability[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    nvcc_or_skip()
    path = tmp_path / "search.json"
    words = ["fwd bf16 b2 q1024 k1024 h8 d64 causal", "--source", str(ROOT), "--cache", str(tmp_path / "cache")]
    words += ["--save", str(path), "--population", "4", "--generations", "2", "--seconds", "0.05", "--minutes", "3"]
    told = run(*words, code=0)
    data = json.loads(path.read_text())
    assert len(data["candidates"]) == 1 + 4 * 2
    timed = [candidate for candidate in data["candidates"][1:] if not candidate["reason"]]
    assert timed
    assert all(0.2 < candidate["gain"] < 5 for candidate in timed)
    assert data["final"] is not None
    assert "tiles.h" in told
    assert "going on with 8 tiles" in run(*words, code=0)
