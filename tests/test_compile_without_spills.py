"""cmake/CompileWithoutSpills.cmake with a compiler that only says what ptxas would: what stops a build."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "cmake" / "CompileWithoutSpills.cmake"
CLEAN = (0, 0, 0)

pytestmark = [
    pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake"),
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree"),
]


def ptxas_says(name, frame, stores, loads):
    return f"""ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    {frame} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers"""


def compile_with(tmp_path, output, *, limits="", strict=True, status=0, flags=()):
    (tmp_path / "output").write_text(output + "\n")
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\ntouch '{tmp_path}/a.o'\ncat '{tmp_path}/output' >&2\nexit {status}\n")
    compiler.chmod(0o755)
    words = ["cmake", f"-DSTRICT={'ON' if strict else 'OFF'}", f"-DLIMITS={limits}", "-P", SCRIPT, "--"]
    words += [compiler, *flags, "-c", "a.cu", "-o", f"{tmp_path}/a.o"]
    result = subprocess.run(words, capture_output=True, text=True)
    return result.returncode == 0, result.stderr, (tmp_path / "a.o").exists()


def test_clean_kernels_pass_without_a_word(tmp_path):
    assert compile_with(tmp_path, ptxas_says("fwd", *CLEAN)) == (True, "", True)


@pytest.mark.parametrize("usage", [(8, 0, 0), (0, 4, 0), (0, 0, 4)], ids=["frame", "stores", "loads"])
def test_a_spill_stops_the_build_and_leaves_no_object(tmp_path, usage):
    output = "\n".join([ptxas_says("clean", *CLEAN), ptxas_says("spilling", *usage)])
    passed, words, object_left = compile_with(tmp_path, output)
    assert not passed and not object_left
    assert "spilling: " in words and "clean: " not in words


@pytest.mark.parametrize(("bytes_spilt", "passes"), [(92, True), (93, False)])
def test_a_known_spill_may_not_grow(tmp_path, bytes_spilt, passes):
    output = ptxas_says("fwdILi256ELNS0_7FwdKindE2EE", bytes_spilt, bytes_spilt, 40)
    assert compile_with(tmp_path, output, limits="other=4|Li256E.*KindE2E=92")[0] is passes


def test_a_limit_is_of_its_kernel_alone(tmp_path):
    assert not compile_with(tmp_path, ptxas_says("fwdILi128E", 8, 8, 8), limits="Li256E=92")[0]


@pytest.mark.parametrize("code", ["C7508", "C7510", "C7514"])
def test_serialised_products_stop_the_build(tmp_path, code):
    note = f"ptxas info    : ({code}) Potential Performance Loss: wgmma.mma_async instructions are serialized due to …"
    passed, words, _ = compile_with(tmp_path, note + "\n" + ptxas_says("fwd", *CLEAN))
    assert not passed and code in words


def test_where_it_is_no_error_it_is_a_warning(tmp_path):
    passed, words, object_left = compile_with(tmp_path, ptxas_says("fwd", 8, 8, 8), strict=False)
    assert passed and object_left and "Warning" in words and "8, 8, 8" in words


def test_the_compilers_own_words_and_failure_are_passed_on(tmp_path):
    passed, words, _ = compile_with(tmp_path, "a.cu(3): error: expected a ;", status=2)
    assert not passed and "expected a ;" in words


def test_device_debug_code_may_spill(tmp_path):
    assert compile_with(tmp_path, ptxas_says("fwd", 8, 8, 8), flags=["-G"])[0]
