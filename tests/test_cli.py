"""python -m flashcore: info, explain and demo, as a user types them."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import flashcore as fc
import pytest


def run(*words, code=0):
    done = subprocess.run([sys.executable, "-m", "flashcore", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_info():
    text = run("info")
    assert fc.__version__ in text
    assert "cpu" in text
    assert "reference" in text


def test_info_tells_a_gpu_in_words():
    from flashcore.cli.info import details

    gpu = SimpleNamespace(
        warp_size=32,
        clock_khz=1_980_000,
        memory_clock_khz=3_201_000,
        memory_bus_bits=6144,
        l2_bytes=60 << 20,
        shared_bytes_per_sm=228 << 10,
        shared_bytes_per_block=227 << 10,
        driver_version=13000,
        runtime_version=12040,
    )
    told = dict(details(gpu))
    assert told["warp size"] == "32"
    assert told["SM clock up to"] == "1.98 GHz"
    assert told["memory up to"] == "4917 GB/s"  # 2 · 3.201 GHz · 6144 bits
    assert told["L2"] == "60.0 MiB"
    assert (told["driver CUDA"], told["runtime CUDA"]) == ("13.0", "12.4")


@pytest.mark.skipif(fc.device_count() == 0, reason="needs a GPU")
def test_info_knows_every_gpu():
    for index in range(fc.device_count()):
        gpu = fc.device_info(index)
        assert gpu.warp_size == 32
        assert min(gpu.multiprocessors, gpu.clock_khz, gpu.memory_clock_khz, gpu.l2_bytes, gpu.memory_bytes) > 0
    assert "warp size 32" in run("info")


def test_explain_is_the_librarys_answer():
    line = "fwd bf16 b2 q4096 k4096 h32/8 d128 causal"
    assert run("explain", line, "--device", "cpu").strip() == fc.explain(line, device="cpu").strip()


def test_explain_of_a_kernel_by_name():
    text = run("explain", "fwd fp32 b1 q4 k4 h1 d8", "--device", "cpu", "--kernel", "cpu.flash:avx1024")
    assert 'has no setting "avx1024"' in text


def test_explain_takes_words_without_quotes():
    line = "decode bf16 b64 q1 k8192 h64/8 d128 page16"
    assert line in run("explain", *line.split(), "--device", "cpu")


def test_a_line_that_cannot_be_read_is_one_clear_error():
    assert "causel" in run("explain", "fwd fp16 b1 q1 k1 h1 d1 causel", code=2)


def test_unknown_commands_and_options():
    assert "usage" in run("fly", code=2)
    assert "usage" in run("info", "--fast", code=2)
    assert "usage" in run(code=2)


def test_help_names_the_commands():
    text = run("--help")
    assert all(command in text for command in ("info", "explain", "demo"))


def test_demo_checks_itself_and_draws_here():
    text = run("demo", "--device", "cpu", "--sentence", "the quick brown fox jumps")
    assert "pass" in text
    assert "FAIL" not in text
    assert "quick" in text
    assert "reference" in text or "cpu." in text


def test_demo_draws_a_png(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    picture = tmp_path / "heads.png"
    run("demo", "--device", "cpu", "--png", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 10_000


def test_demo_on_a_gpu_that_is_not_there(no_cuda):
    assert "error" in run("demo", "--device", "cuda", code=2)


def test_demo_of_an_empty_sentence():
    assert "error" in run("demo", "--device", "cpu", "--sentence", "", code=2)
