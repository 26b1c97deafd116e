"""FLASHCORE_CPU_ISA, FLASHCORE_NUM_THREADS, FLASHCORE_THREADS: instruction sets are right, threads change no bit."""

import os
import re
import subprocess
import sys

import flashcore as fc
import numpy as np
import pytest
import test_attention
import test_backward
from cases import BY_NAME, Case, make, rounded
from frameworks import Framework, importable

CASES = ["long", "everything", "gqa", "head_dim_odd", "dropout", "softcap"]


def instruction_sets() -> list[str]:
    """Those of this processor, as the refusal of an unknown one lists them."""
    x = np.zeros((1, 1, 2, 8), np.float32)
    os.environ["FLASHCORE_CPU_ISA"] = "abacus"
    try:
        fc.attention(x, x, x)
    except ValueError as refusal:
        return re.search(r"processor has (.*)", str(refusal))[1].split(", ")
    finally:
        del os.environ["FLASHCORE_CPU_ISA"]
    return []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set_is_right(isa, name, dtype, rng, monkeypatch):
    monkeypatch.setenv("FLASHCORE_CPU_ISA", isa)
    xp, problem = Framework(), make(BY_NAME[name], dtype, rng)
    out, lse = fc.attention(*problem.arrays(xp), return_lse=True, **problem.keywords(xp))
    test_attention.check(problem, out, lse, xp, "bhsd", isa)
    dout = rounded(rng.standard_normal((*problem.q.shape[:3], problem.v.shape[3])), dtype)
    test_backward.check(problem, test_backward.run(problem, xp, dout), dout, kernel=isa)


def mask_of_blocks(rng, *shape):
    """Blocks of 64 by 128 that are kept whole, dropped whole or kept in part: what tasks tell each other of a mask."""
    keep = rng.choice([0.0, 0.5, 1.0], (*shape[:2], -(-shape[2] // 64), -(-shape[3] // 128)))
    chance = keep.repeat(64, axis=2).repeat(128, axis=3)[:, :, : shape[2], : shape[3]]
    return rng.random(shape) < chance


@pytest.mark.parametrize("shared", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("isa", instruction_sets())
def test_a_mask_means_the_same_whoever_shares_it(isa, shared, rng, monkeypatch):
    """Tiles of a mask that heads or sequences share are looked at once; of others, by each."""
    monkeypatch.setenv("FLASHCORE_CPU_ISA", isa)
    words = {"causal": "bottom_right", "window": (250, None)}
    xp, problem = Framework(), make(Case("blocks", 2, (4, 2), (209, 400), (24, 24), words), "float32", rng)
    problem.tensors["mask"] = mask_of_blocks(rng, *shared, 209, 400)
    out, lse = fc.attention(*problem.arrays(xp), return_lse=True, **problem.keywords(xp))
    test_attention.check(problem, out, lse, xp, "bhsd", isa)
    dout = rounded(rng.standard_normal(problem.q.shape), "float32")
    test_backward.check(problem, test_backward.run(problem, xp, dout), dout, kernel=isa)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FLASHCORE_CPU_ISA", "abacus")
    x = np.zeros((1, 1, 2, 8), np.float32)
    with pytest.raises(ValueError, match=r"FLASHCORE_CPU_ISA.*abacus"):
        fc.attention(x, x, x)


PROGRAM = """
import hashlib, numpy as np, flashcore as fc
rng = np.random.default_rng(0)
q, k, v, dout = (rng.standard_normal((2, 4, 131, 48)).astype(np.float32) for _ in range(4))
out, lse = fc.attention(q, k, v, causal=True, return_lse=True)
grads = fc.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
lengths = np.array([77, 131], np.int32)
decoded = fc.attention_decode(q[:, :, :1], k, v, lengths)
print(hashlib.sha256(b"".join(x.tobytes() for x in (out, lse, *grads, decoded))).hexdigest())
"""


def run(threads: str, program: str = PROGRAM, **variables: str):
    environment = {**os.environ, "FLASHCORE_NUM_THREADS": threads, **variables}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_results_do_not_depend_on_threads():
    outputs = {threads: run(threads) for threads in ("1", "2", "5")}
    assert all(done.returncode == 0 for done in outputs.values()), outputs
    assert len({done.stdout for done in outputs.values()}) == 1


@pytest.mark.parametrize("threads", ["0", "-2", "many"])
def test_a_number_of_threads_that_is_none_is_refused(threads):
    done = run(threads)
    assert done.returncode == 1
    assert "ValueError" in done.stderr
    assert "FLASHCORE_NUM_THREADS" in done.stderr


def test_the_number_of_threads_can_be_set():
    before = fc.num_threads()
    try:
        fc.set_num_threads(3)
        assert fc.num_threads() == 3
        with pytest.raises(ValueError, match="0"):
            fc.set_num_threads(0)
        assert fc.num_threads() == 3
    finally:
        fc.set_num_threads(before)


# ---- beside torch ----------------------------------------------------------------------------------------------------

beside_torch = pytest.mark.skipif(not importable("torch"), reason="torch is not installed")

ON_TORCH = """
import os, torch, flashcore as fc
torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
q = torch.linspace(-3, 3, 8 * 256 * 64).sin().reshape(1, 8, 256, 64)
torch.ones(1 << 20).add(1)
before = count()
fc.attention(q, q, q)
print(count() - before)
"""


@beside_torch
@pytest.mark.parametrize(("word", "new"), [("openmp", "0"), (None, "0"), ("pool", "2")])
def test_torch_tensors_are_computed_on_torchs_threads(word, new):
    """No thread is added to those of torch, unless flashcore's own are asked for."""
    done = run("3", ON_TORCH, **({} if word is None else {"FLASHCORE_THREADS": word}))
    assert done.stdout.split() == [new], done.stderr


@beside_torch
def test_the_number_of_torchs_threads_holds():
    """A worker of torch's DataLoader sets one thread: then no call uses a second."""
    done = run("3", ON_TORCH.replace("set_num_threads(3)", "set_num_threads(1)"))
    assert done.stdout.split() == ["0"], done.stderr


@beside_torch
def test_results_do_not_depend_on_whose_threads():
    program = "import torch, flashcore as fc\nfc.attention(*[torch.ones(1, 1, 1, 8)] * 3)\n" + PROGRAM
    outputs = [run("3", program, FLASHCORE_THREADS=word) for word in ("pool", "openmp")]
    assert all(done.returncode == 0 for done in outputs), outputs
    assert outputs[0].stdout == outputs[1].stdout == run("1").stdout


def test_threads_that_are_nobodys_are_refused():
    done = run("2", FLASHCORE_THREADS="mine")
    assert done.returncode == 1
    assert re.search(r"ValueError.*FLASHCORE_THREADS.*mine.*pool.*openmp", done.stderr)
