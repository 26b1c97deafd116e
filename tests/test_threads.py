"""Several threads, a forked process, and Python code that runs while a call computes."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import flashcore as fc
import numpy as np
import pytest
from cases import BY_NAME, make
from frameworks import importable


def test_threads_agree_with_one_thread(xp, rng):
    """Forward and backward of different sizes at once: each thread gets its own answer."""
    names = ["plain", "gqa", "more_keys", "head_dim_256", "causal", "head_dim_v_larger"]
    problems = [make(BY_NAME[name], "float32", rng) for name in names]

    def work(problem):
        arrays, words = problem.arrays(xp), problem.keywords(xp)
        out, lse = fc.attention(*arrays, return_lse=True, **words)
        grads = fc.attention_backward(out, *arrays, out, lse, deterministic=True, **words)
        return [xp.numpy(x) for x in (out, lse, *grads)]

    expected = [work(p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for results, once in zip(pool.map(work, problems), expected, strict=True):
                for a, b in zip(results, once, strict=True):
                    np.testing.assert_array_equal(a, b)


def test_other_threads_run_during_a_call():
    """The GIL is released: Python code in another thread runs in the middle of a long call."""
    q = np.random.default_rng(0).standard_normal((1, 16, 1024, 64)).astype(np.float32)
    fc.attention(q[:, :1], q[:, :1], q[:, :1])
    span, ticks, done = [], [], threading.Event()

    def work():
        span.append(time.perf_counter())
        fc.attention(q, q, q, kernel="reference")  # on one thread, so that it takes long on any machine
        span.append(time.perf_counter())
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(1e-4):
        ticks.append(time.perf_counter())
    thread.join()
    begin, end = span
    middle = begin + (end - begin) / 4, end - (end - begin) / 4
    assert any(middle[0] < tick < middle[1] for tick in ticks)


FORK = """
import os, threading, warnings
import numpy as np, flashcore as fc
warnings.simplefilter("ignore", DeprecationWarning)
x = np.random.default_rng(0).standard_normal((1, 8, 160, 64)).astype(np.float32)
def call():
    out, lse = fc.attention(x, x, x, return_lse=True)
    return fc.attention_backward(out, x, x, x, out, lse)[0]
expected = call()
threads = [threading.Thread(target=call) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(call(), expected) else 3)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
ON_TORCH = FORK.replace("def call", "import torch; x = torch.from_numpy(x); torch.set_num_threads(3)\ndef call")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("program", [FORK, ON_TORCH], ids=["own threads", "torch's threads"])
def test_a_forked_process_calls_too(program):
    """After calls from several threads, a child makes the same call on the CPU and gets the same answer."""
    if program is ON_TORCH and not importable("torch"):
        pytest.skip("torch is not installed")
    environment = {**os.environ, "FLASHCORE_NUM_THREADS": "3"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
