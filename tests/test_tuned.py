"""Tuned kernels: every setting of every kernel is right, autotune keeps what is faster, dispatch follows the file."""

import os
import subprocess
import sys
from types import SimpleNamespace

import flashcore as fc
import numpy as np
import pytest
import reference
from flashcore import _core
from flashcore.bench.calls import first
from flashcore.tune import files, rows

LINE = "fwd fp32 b1 q32 k32 h1 d64"
DECODE = "decode fp32 b2 q1 k700 h4/2 d64"


@pytest.fixture(autouse=True)
def nothing_stays_loaded(monkeypatch):
    monkeypatch.delenv("FLASHCORE_TUNED", raising=False)
    yield
    fc.load_tuned(None)


@pytest.fixture
def tuned(tmp_path):
    """Writes and loads a file with these kernels for problems on the CPU."""

    def load(**kernels):
        path = tmp_path / "tuned.txt"
        lines = {"line": LINE, "decode": DECODE}
        entries = [files.Entry(fc.device_info("cpu").name, lines[name], word) for name, word in kernels.items()]
        files.write(path, entries)
        fc.load_tuned(path)
        return path

    return load


def settings_of(line: str) -> list[str]:
    return [word for word in _core.kernel_choices(line, False, 0) if ":" in word]


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [700, 5000])
def test_every_way_to_cut_the_keys_of_decode_is_right(keys, rng):
    """Lengths that end inside of a part, in an earlier part, and at none."""
    line = f"decode fp32 b3 q1 k{keys} h4/2 d40/24"
    held = np.array([keys, 65, 0], np.int32)
    q = rng.standard_normal((3, 4, 1, 40), dtype=np.float32)
    k, v = (rng.standard_normal((3, 2, keys, dim), dtype=np.float32) for dim in (40, 24))
    words = [word for word in settings_of(line) if word.startswith("cpu.decode:")]
    assert len(words) > 2
    for word in words:
        out, lse = fc.attention_decode(q, k, v, held, kernel=word, return_lse=True)
        for b, length in enumerate(held):
            exact = reference.attention(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
            for ours, theirs in zip((out, lse), exact, strict=True):
                np.testing.assert_allclose(ours[b : b + 1], theirs, atol=5e-6, err_msg=f"{word}, sequence {b}")


@pytest.mark.parametrize("line", ["fwd fp16 b1 q128 k128 h4 d64", "fwd bf16 b1 q70 k90 h4/2 d128 causal_br lse"])
def test_every_choice_is_right_on_the_gpu(line):
    """The parts of the small Hopper kernel, the heights of the ladder's tiles, and every other row."""
    if fc.device_count() == 0:
        pytest.skip("needs a GPU")
    from flashcore.bench.stage import Stage

    finding = rows.tune(line, Stage("cuda:0"), 0.05)
    assert len(finding.seconds) > 1
    assert not finding.refused, finding.refused


def test_a_setting_is_part_of_the_kernels_name(rng):
    q = rng.standard_normal((1, 2, 4, 16), dtype=np.float32)
    for isa in (word for word in settings_of("fwd fp32 b1 q4 k4 h2 d16")):
        assert fc.plan(q, q, q, kernel=isa).kernel == isa
        assert isa in fc.plan(q, q, q, kernel=isa).describe()
    with pytest.raises(fc.Unsupported, match='has no setting "abacus" for this problem; it has '):
        fc.attention(q, q, q, kernel="cpu.flash:abacus")


# ---- dispatch --------------------------------------------------------------------------------------------------------


def test_a_tuned_kernel_runs_its_problem_alone(tuned, rng):
    tuned(line="cpu.reference")
    x = rng.standard_normal((1, 1, 32, 64), dtype=np.float32)
    assert fc.plan(x, x, x).kernel == "cpu.reference"
    assert fc.supports(x, x, x).kernel == "cpu.reference"
    assert fc.plan(x, x, x, causal=True).kernel == "cpu.flash"
    assert fc.plan(x, x, x, kernel="cpu.flash").kernel == "cpu.flash"
    np.testing.assert_array_equal(fc.attention(x, x, x), fc.attention(x, x, x, kernel="cpu.reference"))
    fc.load_tuned(None)
    assert fc.plan(x, x, x).kernel == "cpu.flash"


def test_explain_tells_what_is_tuned(tuned):
    path = tuned(line="cpu.reference", decode="cpu.decode:splits3")
    assert f"kernel:    cpu.reference\ntuned:     by {path}\n" in fc.explain(LINE, device="cpu")
    assert f"tuned:     not cpu.decode:splits3 of {path}: has no setting" in fc.explain(DECODE, device="cpu")


def test_a_file_that_cannot_be_read_changes_nothing(tuned, tmp_path):
    tuned(line="cpu.reference")
    broken = tmp_path / "broken.txt"
    broken.write_text("flashcore-tuned 1\n\n[cpu]\nfwd fp99 -> cpu.flash\n")
    with pytest.raises(ValueError, match=r"broken.txt:4: .*cannot read the word \"fp99\""):
        fc.load_tuned(broken)
    with pytest.raises(ValueError, match="missing.txt: cannot be read: No such file"):
        fc.load_tuned(tmp_path / "missing.txt")
    assert "kernel:    cpu.reference\n" in fc.explain(LINE, device="cpu")


ATTEND = """
import numpy as np, flashcore as fc
x = np.zeros((1, 1, 32, 64), np.float32)
try:
    print(fc.plan(x, x, x).kernel)
    fc.attention(x, x, x)
except ValueError as error:
    print("ValueError:", error)
"""


def attend(path):
    environment = os.environ | {"FLASHCORE_TUNED": str(path)}
    done = subprocess.run([sys.executable, "-c", ATTEND], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def test_the_variable_names_the_file(tuned, tmp_path):
    assert attend(tuned(line="cpu.reference")) == "cpu.reference"
    assert attend("") == "cpu.flash"
    broken = tmp_path / "broken.txt"
    broken.write_text("{}")
    assert attend(broken).startswith(f"ValueError: FLASHCORE_TUNED: {broken}:1: no file of tuned kernels")


# ---- autotune --------------------------------------------------------------------------------------------------------


@pytest.fixture
def times(monkeypatch):
    """Kernels take the seconds that are set here, others 1."""
    seconds = {}

    def take_rounds(contenders, clock, plan):
        for contender in contenders:
            contender.samples = [seconds.get(contender.name, 1.0)] * 5

    monkeypatch.setattr(rows, "take_rounds", take_rounds)
    return seconds


def test_autotune_keeps_the_fastest_and_uses_it(times, tmp_path):
    times |= {"cpu.decode:splits4": 0.5, "cpu.decode:splits2": 0.8}
    path = tmp_path / "tuned.txt"
    (found,) = fc.autotune(DECODE, path, device="cpu")
    assert (found.usual, found.kernel, found.gain) == ("cpu.decode", "cpu.decode:splits4", 2.0)
    assert found.seconds["cpu.decode:splits2"] == 0.8
    assert not found.refused
    entry = files.read(path)[0]
    assert entry[:3] == (fc.device_info("cpu").name, DECODE, "cpu.decode:splits4")
    assert entry.note.startswith("2.00 times as fast as cpu.decode")
    assert "kernel:    cpu.decode:splits4\n" in fc.explain(DECODE, device="cpu")


def test_autotune_leaves_the_usual_kernel_where_nothing_is_clearly_faster(times, tmp_path):
    times["cpu.decode:splits4"] = 0.995
    path = tmp_path / "tuned.txt"
    files.write(path, [files.Entry(fc.device_info("cpu").name, DECODE, "cpu.reference")])
    (found,) = fc.autotune([DECODE], path, device="cpu")
    assert found.kernel == found.usual == "cpu.decode"
    assert files.read(path) == []


def test_autotune_keeps_what_the_file_has_of_others(times, tmp_path):
    times["cpu.reference"] = 0.1
    path = tmp_path / "tuned.txt"
    others = [files.Entry("another device", DECODE, "cpu.flash", "a note")]
    others += [files.Entry(fc.device_info("cpu").name, "fwd fp32 b1 q9 k9 h1 d64", "cpu.flash:baseline")]
    files.write(path, others)
    fc.autotune([LINE + " dropout0.5 seed3"], path, device="cpu")
    entries = files.read(path)
    assert entries[:2] == others
    assert entries[2][1:3] == (LINE + " dropout0.5", "cpu.reference")


@pytest.mark.parametrize("line", [LINE, "fwd fp16 b1 q32 k32 h1 d64 alibi", "bwd fp32 b1 q8 k8 h1 d64"])
def test_autotune_refuses_wrong_results(line, times, tmp_path, monkeypatch):
    """By float64 where a line is done again exactly, else by what the usual kernel gives."""
    honest = rows.ours

    def sometimes_wrong(case, arrays, stream, kernel):
        call = honest(case, arrays, stream, kernel)
        if kernel != "cpu.reference":
            return call

        def wrong():
            result = call()
            spoilt = first(result)
            zeros = np.zeros(spoilt.shape, f"f{np.dtype(spoilt.dtype).itemsize}")
            _core.copy_in(spoilt, zeros.ctypes.data, zeros.nbytes, 0)
            return result

        return wrong

    monkeypatch.setattr(rows, "ours", sometimes_wrong)
    times["cpu.reference"] = 0.01
    (found,) = fc.autotune([line], tmp_path / "tuned.txt", device="cpu")
    assert found.refused["cpu.reference"].startswith("wrong: its error is")
    assert found.kernel == "cpu.flash"


def test_autotune_measures_for_real(tmp_path):
    (found,) = fc.autotune([LINE], tmp_path / "tuned.txt", device="cpu", seconds=0.05)
    assert found.usual == "cpu.flash"
    assert set(found.seconds) | set(found.refused) >= {"cpu.flash", "cpu.reference", *settings_of(LINE)}
    assert all(seconds > 0 for seconds in found.seconds.values())


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (((), {}), "no file for the tuned kernels: give a path, or set FLASHCORE_TUNED"),
        ((("/nowhere/tuned.txt",), {}), "/nowhere/tuned.txt: cannot be written"),
        (((os.devnull,), {}), "/dev/null: cannot be written"),
        ((("tuned.txt",), {"seconds": 0}), "seconds=0 given; it must be positive"),
        ((("tuned.txt",), {"device": "tpu"}), "device='tpu' given"),
    ],
)
def test_autotune_says_what_is_wrong(words, pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=pattern):
        fc.autotune([LINE], *words[0], **words[1])


def test_autotune_reads_the_lines_first(tmp_path):
    with pytest.raises(ValueError, match='cannot read the word "x9"'):
        fc.autotune([LINE, "fwd fp32 b1 x9"], tmp_path / "tuned.txt")
    with pytest.raises(fc.Unsupported, match="does not know float8_e4m3"):
        fc.autotune(["bwd e4m3 b1 q8 k8 h1 d64"], tmp_path / "tuned.txt", device="cpu")
    assert not (tmp_path / "tuned.txt").exists()


def test_a_finding_is_an_entry_where_it_is_better():
    finding = rows.Finding(LINE, "cpu", "cpu.flash", "cpu.flash")
    assert finding.entry is None
    assert files.merge([files.Entry("cpu", LINE, "x")], [finding]) == []
    better = SimpleNamespace(device_name="cpu", line=LINE, entry=files.Entry("cpu", LINE, "y"))
    assert files.merge([files.Entry("cpu", LINE, "x")], [better]) == [better.entry]


def test_rows_on_the_command_line(tmp_path):
    path = tmp_path / "tuned.txt"
    words = ["tune", "--rows", LINE, "--device", "cpu", "--seconds", "0.05", "--save", str(path)]
    done = subprocess.run([sys.executable, "-m", "flashcore", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert LINE in done.stdout
    assert f"FLASHCORE_TUNED={path}" in done.stdout
    assert path.read_text().startswith("flashcore-tuned 1\n")
