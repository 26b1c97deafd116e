"""What python -m flashcore bench makes of its samples: rates, comparisons, files, the ladder, pictures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from flashcore.bench import cases, ceilings, compare, ladder, plot, provenance, results
from flashcore.bench.stage import Stage
from test_bench import TINY


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
