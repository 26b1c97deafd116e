"""scripts/profile.sh and scripts/profile_summary.py, with doubles for Nsight Compute and the program it runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import profile_summary
import pytest

LINE = "fwd fp32 b1 q32 k32 h2 d16"
ROOT = Path(__file__).resolve().parent.parent
#: as Nsight Compute prints it: names, units, a row for each kernel; the tensor pipe's name is that of one architecture
PAGE = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active",\
"dram__bytes_read.sum","l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",\
"l1tex__data_pipe_lsu_wavefronts_mem_shared.sum","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
"","","us","%","Mbyte","","","inst","inst"
"0","void fwd<int>(Params)","1,234.5","71.25","64","50","1,000","0.5","2.25"
"1","combine","3","n/a","1","0","0","0","1"
"""


def test_a_profile_is_summed_up_kernel_by_kernel():
    (first_name, first), (second_name, second) = profile_summary.read(PAGE)
    text = "\n".join(profile_summary.describe(first_name, first))
    assert text.startswith("void fwd<int>(Params)\n")
    assert "1234.5 µs" in text
    assert re.search(r"tensor pipe +71\.2 %", text)
    assert re.search(r"DRAM read +61\.0 MiB", text)
    assert "50 (5.0% of the wavefronts)" in text
    assert text.index("long_scoreboard") < text.index("barrier")
    assert "tensor pipe" not in "\n".join(profile_summary.describe(second_name, second))


def test_a_page_that_is_none_is_refused():
    with pytest.raises(ValueError, match="not a raw CSV page"):
        list(profile_summary.read("nothing"))


def program(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def double_of_ncu(folder):
    """Writes an empty report, and reads PAGE from any."""
    (folder / "page.csv").write_text(PAGE)
    return program(
        folder / "ncu",
        f"[[ $1 == --import ]] && exec cat {folder}/page.csv\n"
        'while [[ $1 != --export ]]; do shift; done\n: > "$2.ncu-rep"',
    )


def profile(*words, **environment):
    command = [str(ROOT / "scripts" / "profile.sh"), *map(str, words)]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_profiling_without_nsight_compute_is_one_clear_line(tmp_path):
    done = profile(LINE, NCU=str(tmp_path / "ncu"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "ncu" in done.stderr


def test_profiling_leaves_a_report_and_a_summary(tmp_path):
    bench_program = program(tmp_path / "attention_bench", 'echo "fwd fp16 d64  cuda.some.row"')
    ncu = double_of_ncu(tmp_path)
    done = profile("--out", tmp_path, LINE, NCU=ncu, ATTENTION_BENCH=bench_program)
    assert done.returncode == 0, done.stderr
    name = tmp_path / "fwd_fp16_d64_cuda_some_row"
    assert name.with_suffix(".ncu-rep").exists()
    assert name.with_suffix(".txt").read_text() in done.stdout
    assert "cuda.some.row" in done.stdout
    assert "void fwd<int>(Params)" in done.stdout


def test_a_profile_of_a_line_that_cannot_run_says_what_the_program_says(tmp_path):
    bench_program = program(tmp_path / "attention_bench", 'echo "attention_bench: no CUDA device" >&2; exit 1')
    done = profile(LINE, NCU=program(tmp_path / "ncu", "exit 0"), ATTENTION_BENCH=bench_program)
    assert (done.returncode, done.stderr) == (2, "attention_bench: no CUDA device\n")


def test_without_the_program_the_python_module_is_profiled(tmp_path):
    python = program(
        tmp_path / "python",
        f'[[ $1 == -c ]] && exit 0\n[[ $1 == -m ]] && echo "$*" && exit 0\nexec {sys.executable} "$@"',
    )
    ncu = double_of_ncu(tmp_path)
    missing = str(tmp_path / "attention_bench")
    done = profile("--out", tmp_path, LINE, NCU=ncu, ATTENTION_BENCH=missing, PYTHON=python)
    assert done.returncode == 0, done.stderr
    assert f"-m flashcore bench --device cuda --once {LINE}" in done.stdout
    nothing = program(tmp_path / "empty", "exit 1")
    done = profile(LINE, NCU=ncu, ATTENTION_BENCH=missing, PYTHON=nothing)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "pip install ." in done.stderr and "--target attention_bench" in done.stderr
