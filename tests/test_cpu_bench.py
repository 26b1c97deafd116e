"""The parts of the CPU benchmark that compute and write: rounds and ratios, the work of a cell, README's section."""

import json
from itertools import count

import flashcore as fc
import numpy as np
import pytest
from cpu_cells import CELLS, SKIPPING_CELLS, Cell
from cpu_compare import environment
from flashcore.bench.cases import MASK_BLOCK
from flashcore.bench.provenance import provenance
from flashcore.bench.statistics import ratio
from flashcore.bench.timing import FEWEST_ROUNDS, Contender, Plan, host_clock, take_rounds
from readme_cpu import cpu_section


def test_a_ratio_compares_times_of_the_same_round():
    # A machine that halves its speed in every other round changes no ratio; the medians of the times alone would.
    ours, theirs = [1.0, 2.0, 1.0, 2.0, 1.0], [3.0, 6.0, 3.0, 6.0, 3.0]
    assert ratio(theirs, ours) == {"low": 3.0, "median": 3.0, "high": 3.0}


def test_a_ratio_has_its_quartiles():
    assert ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == {"low": 2.0, "median": 3.0, "high": 4.0}


def test_rounds_are_as_many_as_asked():
    timed = [Contender("a", lambda repeats: None), Contender("b", lambda repeats: None)]
    others = take_rounds(timed, host_clock, Plan(2, 5, seconds=60), also=lambda: 7.0)
    assert [[len(contender.samples) for contender in timed], others] == [[5, 5], [7.0] * 5]


def test_without_time_left_there_are_still_the_fewest_rounds():
    timed = Contender("a", lambda repeats: None)
    others = take_rounds([timed], host_clock, Plan(20, 9, seconds=0), also=count().__next__)
    assert len(timed.samples) == FEWEST_ROUNDS
    assert others == list(range(FEWEST_ROUNDS))


def seen(cell: Cell) -> np.ndarray:
    """Which query sees which key, written out."""
    rows, columns = np.indices((cell.seqlen_q, cell.seqlen_k))
    keep = np.ones(rows.shape, bool)
    if cell.causal:
        keep &= columns <= rows
    if cell.left is not None:
        keep &= columns >= rows - cell.left
    if cell.blocks:
        keep &= (rows // MASK_BLOCK + columns // MASK_BLOCK) % 2 == 0
    return keep


@pytest.mark.parametrize(
    "cell",
    [
        Cell(1, 1, 70, 90, 8),
        Cell(1, 1, 70, 70, 8, causal=True),
        Cell(1, 1, 70, 70, 8, causal=True, left=9),
        Cell(1, 1, 70, 70, 8, causal=True, left=100),
        Cell(1, 1, 4 * MASK_BLOCK, 4 * MASK_BLOCK, 8, blocks=True),
    ],
    ids=lambda cell: cell.line,
)
def test_pairs_are_those_that_are_seen(cell):
    assert cell.pairs == seen(cell).sum()


def test_a_multiply_add_of_each_product_counts_two():
    assert Cell(2, 3, 5, 7, 11).flops == 2 * (2 * 3 * 5 * 7 * 11) * 2
    assert Cell(2, 3, 5, 7, 11, work="bwd").flops == 2.5 * Cell(2, 3, 5, 7, 11).flops


def test_decode_is_measured_by_the_keys_it_reads():
    assert SKIPPING_CELLS["decode GQA 32/4"].work_left == 4 / 32
    assert CELLS["decode"].kv_bytes(2) == 2 * 8 * 8192 * 128 * 2


@pytest.mark.parametrize(
    "cell", [c for c in {**CELLS, **SKIPPING_CELLS}.values() if c.work != "fwd+bwd"], ids=lambda cell: cell.line
)
def test_a_line_is_a_problem_line_without_its_dtype(cell):
    work, sizes = cell.line.split(" ", 1)
    line = f"{work} fp32 {sizes}"
    canonical = fc.explain(line, device="cpu").splitlines()[0].removeprefix("problem:").strip()
    assert canonical == line


def test_every_library_is_held_to_the_level_and_the_threads(monkeypatch):
    monkeypatch.setenv("FLASHCORE_NUM_THREADS", "7")
    held = environment("avx2", 3)
    assert (held["FLASHCORE_CPU_ISA"], held["ATEN_CPU_CAPABILITY"], held["OMP_NUM_THREADS"]) == ("avx2", "avx2", "3")
    assert "FLASHCORE_NUM_THREADS" not in held
    assert "ATEN_CPU_CAPABILITY" not in environment("native", 3)


def test_a_result_names_its_commit(monkeypatch):
    monkeypatch.setenv("FLASHCORE_GIT_SHA", "c0ffee")
    assert provenance("no-such-package")["git_sha"] == "c0ffee"
    assert "no-such-package" not in provenance("no-such-package")


def result(line, dtype, median, threads=2, **more):
    spread = {"low": median, "median": median, "high": median}
    cell = {"line": line, "dtype": dtype, "threads": threads, "ms": {"flashcore": 3.0}, "ratios": {"torch": spread}}
    return cell | more


def write(folder, name, cells, date="2026-01-02", isa="native", memory=(), **machine):
    machine = {"processor": "Abacus 9000", "family": "6", "flags": ["avx2"], "cores": 2, "torch": "2.0"} | machine
    machine |= {"git_sha": "0123456789abcdef", "date": date, "isa": isa}
    (folder / name).write_text(json.dumps({"machine": machine, "cells": cells, "memory": list(memory)}))


def test_readme_says_nothing_of_what_was_not_measured(tmp_path):
    assert cpu_section(tmp_path) == ""


def test_readme_has_a_row_for_a_case_and_a_column_for_a_dtype(tmp_path):
    write(tmp_path, "cpu_a_native.json", [result("fwd x", "float32", 2.0), result("fwd x", "float16", 8.0)])
    section = cpu_section(tmp_path)
    assert "| `fwd x` | 2.00 (3 ms) | – | 8.00 (3 ms) |" in section
    assert "2 threads 4.00 (lowest 2.00: `fwd x`, float32)" in section  # the geometric mean
    assert "Abacus 9000 (family 6, AVX2, 2 cores)" in section
    assert "(bench/results/cpu_a_native.json)" in section


def test_readme_shows_the_most_threads_and_sums_up_the_others(tmp_path):
    write(tmp_path, "cpu_a.json", [result("fwd x", "float32", 2.0), result("fwd x", "float32", 5.0, threads=1)])
    section = cpu_section(tmp_path)
    assert "| 2.00 (3 ms) |" in section
    assert "| 5.00" not in section
    assert "1 thread 5.00" in section


def test_readme_keeps_cells_that_skip_work_apart(tmp_path):
    half = {"low": 0.6, "median": 0.6, "high": 0.6}
    skipping = result("fwd mask", "float32", 9.0, work_left=0.5, time_left=half)
    write(tmp_path, "cpu_a.json", [result("fwd x", "float32", 2.0), skipping])
    section = cpu_section(tmp_path)
    assert "| `fwd mask`: 50.0% of the work | 60.0% (9.00) | – | – |" in section
    assert "2 threads 2.00 (lowest" in section


def test_readme_takes_the_newest_file_of_each_level(tmp_path):
    write(tmp_path, "cpu_a_native.json", [result("fwd x", "float32", 3.0)], date="2026-03-01")
    write(tmp_path, "cpu_b_native.json", [result("fwd x", "float32", 1.0)], date="2026-02-01")
    write(tmp_path, "cpu_a_avx2.json", [result("fwd x", "float32", 1.5)], date="2026-02-01", isa="avx2")
    section = cpu_section(tmp_path)
    assert "cpu_b_native.json" not in section
    assert "each with all that the processor has: 2 threads 3.00" in section
    assert "both held to AVX2: 2 threads 1.50" in section


def test_readme_keeps_machines_apart_and_the_newest_first(tmp_path):
    write(tmp_path, "cpu_new_native.json", [result("fwd x", "float32", 3.0)], date="2026-03-01")
    write(tmp_path, "cpu_old_avx2.json", [result("fwd y", "float32", 1.5)], isa="avx2", processor="Slide rule")
    newer, older = cpu_section(tmp_path).split("**Slide rule")
    assert "**Abacus 9000" in newer
    assert "| `fwd x` | 3.00 (3 ms)" in newer and "AVX2: " not in newer
    assert "| `fwd y` | 1.50 (3 ms)" in older and "both held to AVX2: 2 threads 1.50" in older


def test_readme_tells_the_memory(tmp_path):
    memory = {"library": "flashcore", "dtype": "float32", "shape": [1, 8, 16384, 64], "needed": 100, "growth": 104}
    write(tmp_path, "cpu_a.json", [result("fwd x", "float32", 2.0)], memory=[memory])
    assert "(1, 8, 16384, 64)" in cpu_section(tmp_path)
    assert "1.04 (flashcore, float32)" in cpu_section(tmp_path)
