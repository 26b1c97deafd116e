"""scripts/update_docs.py: the measured sections of the pages."""

import json

import docs_ladder
import docs_primitives
import docs_profiles
import docs_tuning
import pytest
import update_docs

MACHINE = {"gpu": "NVIDIA H200", "driver": "580", "git_sha": "0123456789abcdef"}
CLIMB = {
    "machine": MACHINE,
    "cases": [
        {
            "line": "fwd fp16 b1 q512 k512 h8 d64",
            "kernel": "cuda.sm90.fwd_d64",
            "flops": 536870912,
            "results": {
                "flashcore": {"us": 10.0},
                "SDPA cuDNN": {"us": 12.0},
                "SDPA math": {"us": 60.0},
                "flashcore cuda.ladder.fused_wmma": {"us": 40.0},
                "flashcore cuda.reference": {"us": 1000.0},
                "flashcore cuda.ladder.unfused_wmma": {"us": 80.0},
            },
        }
    ],
}


def timed(us, gbs, share):
    return {"us": us, "gbs": gbs, "share_copy": share}


PRIMITIVES = {
    "machine": MACHINE,
    "ceilings": {"copy_gbs": 4000.0},
    "settings": {"rounds": 100},
    "cases": [
        {
            "case": "add fp32 33554432",
            "results": {
                "flashcore": timed(100.0, 3800.0, 0.95) | {"share_same_copy": 0.97},
                "torch": timed(110.0, 3500.0, 0.87),
                "cupy": timed(90.0, 4100.0, 1.02),
            },
        },
        {
            "case": "sum bf16 33554432",
            "results": {"flashcore": timed(20.0, 2080.0, 0.52), "torch": timed(30.0, 2450.0, 0.61)},
        },
    ],
}
HAND_SET = {"block_m": 128, "block_n": 128, "stages": 2}
BETTER = HAND_SET | {"block_n": 160, "stages": 3}
SEARCH = {
    "machine": MACHINE,
    "device": "NVIDIA H200",
    "instance": "BFloat16, head_dim 128, positional",
    "lines": ["fwd bf16 b8 q2048 k2048 h16 d128 causal"],
    "incumbent": HAND_SET,
    "elites": [2, 0, 1],
    "candidates": [
        {"id": 0, "born": "incumbent", "tile": HAND_SET, "reason": "", "gain": 1.0},
        {"id": 1, "born": "random", "tile": HAND_SET | {"stages": 4}, "reason": "", "gain": 0.91},
        {"id": 2, "born": "mutation", "tile": BETTER, "reason": "", "gain": 1.052},
        {"id": 3, "born": "random", "tile": HAND_SET | {"block_m": 192}, "reason": "spills 64 bytes", "gain": None},
    ],
    "pruned": {"too much shared memory": 7},
    "final": {"noise": 0.004, "finalists": [{"id": 2, "gain": 1.041}], "winner": 2},
}
#: the lines of tiles.h that are read
TILES = """
struct FwdTile {
  int block_m;         // query rows
  int block_n;
  int stages;
  bool separate_out;   // the output has a buffer of its own
  int growth = 8;      // room enough
};
constexpr FwdTile fwd_tile(int, FwdKind, FwdSize) { return {FLASHCORE_FWD_TILE}; }
constexpr FwdTile fwd_tile(int head_dim, FwdKind kind, FwdSize size) {
  if (size == FwdSize::small) return {64, 64, 2, true};
  const bool full = kind == FwdKind::full;
  if (head_dim <= 64) return {192, 128, 3, true, 4};
  if (head_dim == 128 && full) return {192, 80, 2, false};  // in braces: return {1, 1, 1, true};
  return {128, 160, 2, true};
}
"""


def written(section, folder, name, data):
    (folder / name).write_text(json.dumps(data))
    return section(folder, folder)


@pytest.mark.parametrize("page", update_docs.SECTIONS)
def test_without_results_nothing_is_said(page, tmp_path):
    _, section = update_docs.SECTIONS[page]
    assert section(tmp_path, tmp_path) == ""


def test_the_rungs_stand_in_order_with_their_speed_ups(tmp_path):
    text = written(docs_ladder.section, tmp_path, "ladder_h200.json", CLIMB)
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip(" `*") for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == [
        "cuda.reference",
        "cuda.ladder.unfused_wmma",
        "cuda.ladder.fused_wmma",
        "cuda.sm90.fwd_d64",
        "SDPA math",
        "SDPA cuDNN",
    ]
    assert [row[3] for row in cells] == ["1.00", "12.50", "25.00", "100.00", "16.67", "83.33"]  # times the scalar one
    assert [row[4] for row in cells] == ["0.01", "0.15", "0.30", "1.20", "0.20", "1.00"]  # times the fastest SDPA
    assert cells[3][2] == "53.7"  # TFLOP/s


def test_a_picture_of_the_climb_is_shown_where_there_is_one(tmp_path):
    assert "![" not in written(docs_ladder.section, tmp_path, "ladder_h200.json", CLIMB)
    (tmp_path / "ladder_h200.svg").write_text("")
    assert "](ladder_h200.svg)" in docs_ladder.section(tmp_path, tmp_path)


def test_primitives_stand_beside_the_others_and_the_copy(tmp_path):
    text = written(docs_primitives.section, tmp_path, "primitives_h200.json", PRIMITIVES)
    assert "| | µs | GB/s | of a large copy | of one of as many bytes | torch GB/s | cupy GB/s | ratio |" in text
    assert "| `add fp32 33554432` | 100.0 | 3800 | 95% | 97% | 3500 | 4100 | 0.90 |" in text
    assert "| `sum bf16 33554432` | 20.0 | 2080 | 52% | – | 2450 | – | 1.50 |" in text
    assert "reaches 90% of it or more in 1 of 2 cases, and 52% where it reaches least (`sum bf16 33554432`)" in text


def test_profiles_and_rooflines_are_shown(tmp_path):
    (tmp_path / "profile_mission_h200.txt").write_text("fwd fp16 d64  cuda.some.row\nkernel\n  tensor pipe 71 %\n")
    (tmp_path / "roofline_h200.svg").write_text("")
    text = docs_profiles.section(tmp_path, tmp_path)
    assert "### `fwd fp16 d64  cuda.some.row`\n\n```\nkernel\n  tensor pipe 71 %\n```\n" in text
    assert "](roofline_h200.svg)" in text


def test_a_search_tells_what_it_tried_what_won_and_what_was_taken(tmp_path, monkeypatch):
    (tmp_path / "tiles.h").write_text(TILES)
    monkeypatch.setattr(docs_tuning, "TILES", tmp_path / "tiles.h")
    text = written(docs_tuning.section, tmp_path, "tune_h200.json", SEARCH)
    assert "3 tiles compiled, 2 timed, 1 refused (1 spills); 7 passed over without compiling" in text
    assert "Found: block_n 128 → 160, stages 2 → 3. It gains 4.1%, more than the noise of 0.4%." in text
    assert "0.4%. In `tiles.h`: but for stages 2." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| block_n 128 → 160, stages 2 → 3 | mutation | 1.052 | 1.041 | but for stages 2 |",
        "| stages 2 → 4 | random | 0.910 | – | no |",
    ]


def tile(*values):
    return dict(zip(("block_m", "block_n", "stages", "separate_out", "growth"), values, strict=True))


def test_the_tile_of_the_sources_is_read_as_a_compiler_reads_it():
    assert docs_tuning.tile_of_sources(TILES, 64, "general") == tile(192, 128, 3, True, 4)
    assert docs_tuning.tile_of_sources(TILES, 128, "full") == tile(192, 80, 2, False, 8)
    assert docs_tuning.tile_of_sources(TILES, 128, "positional") == tile(128, 160, 2, True, 8)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (tile(192, 80, 2, False, 8), "yes"),
        (tile(192, 80, 2, False, 12), "but for growth 8"),
        (tile(192, 80, 2, True, 12), "but for separate_out False, growth 8"),
        (tile(192, 64, 3, True, 12), "only block_m"),
        (tile(128, 64, 3, True, 8), "no"),
        (tile(192, 80, 2, False, 8) | {"octaves_from": 16}, "yes"),  # which a full kernel does not have
    ],
)
def test_what_became_of_a_tile(found, told, tmp_path, monkeypatch):
    (tmp_path / "tiles.h").write_text(TILES)
    monkeypatch.setattr(docs_tuning, "TILES", tmp_path / "tiles.h")
    data = {"instance": "Float16, head_dim 128, full", "incumbent": tile(128, 128, 2, True, 8) | {"octaves_from": 0}}
    assert docs_tuning.taken(found, data) == told


def test_a_search_that_found_nothing_says_so(tmp_path):
    nothing = SEARCH | {"final": {"noise": 0.004, "finalists": [], "winner": None}}
    text = written(docs_tuning.section, tmp_path, "tune_h200.json", nothing)
    assert "Nothing beat the hand-set tile by more than the noise of 0.4%: `tiles.h` stays as it is." in text


def test_a_search_that_is_not_at_its_end_is_left_out(tmp_path):
    assert written(docs_tuning.section, tmp_path, "tune_h200.json", SEARCH | {"final": None}) == ""


def test_only_the_marked_place_is_rewritten():
    begin, end = "<!-- climb: written by scripts/update_docs.py -->\n", "<!-- end of climb -->"
    text = f"before\n{begin}old\n{end}\nafter\n"
    assert update_docs.rewritten(text, "climb", "new\n") == f"before\n{begin}new\n{end}\nafter\n"


@pytest.mark.parametrize("page", update_docs.SECTIONS)
def test_the_pages_are_current(page):
    name, section = update_docs.SECTIONS[page]
    text = (update_docs.ROOT / page).read_text(encoding="utf-8")
    assert update_docs.rewritten(text, name, section(update_docs.RESULTS, update_docs.DOCS)) == text
