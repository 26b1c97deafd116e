"""The file of a search for tiles: which are gone on with, and what is said of a damaged one."""

import json
from dataclasses import asdict, replace

import pytest
from flashcore.tune.space import Tile
from flashcore.tune.state import State
from tune_doubles import LINE, verdict_of

HAND_SET = Tile(192, 128, 2, 2, True, True, 32, 160)
IDENTITY = {"instance": "i", "lines": [LINE], "device": "d", "sources": "s", "incumbent": asdict(HAND_SET)}


def fresh(path):
    return State(IDENTITY, 0, 16, 4, path)


@pytest.fixture
def saved(tmp_path):
    """A search of the incumbent, a better tile and a refused one."""
    path = tmp_path / "search.json"
    state = fresh(path)
    state.add("random", [], replace(HAND_SET, stages=3), 168, "", verdict_of(1.02))
    state.add("mutation", [1], replace(HAND_SET, stages=4), 168, "spills 8 bytes", None)
    return path


def test_a_whole_file_is_gone_on_with(saved):
    state = fresh(saved)
    assert state.resume()
    assert state.data == json.loads(saved.read_text())
    assert [elite["id"] for elite in state.elites] == [1, 0]


def without(name, number):
    return lambda candidates: candidates[number].pop(name)


def with_(number, **facts):
    return lambda candidates: candidates[number].update(facts)


def remove(number):
    return lambda candidates: candidates.pop(number)


def remove_the_first_and_count_anew(candidates):
    del candidates[0]
    for number, candidate in enumerate(candidates):
        candidate["id"] = number


FLAWS = {
    "no gain": (without("gain", 1), "candidate 1 has no gain"),
    "no verdict": (without("verdict", 2), "candidate 2 has no verdict"),
    "no id": (without("id", 0), "candidate 0 has no id"),
    "empty": (list.clear, "it has no candidates, not even the incumbent"),
    "wrong id": (with_(1, id=7), "candidate 1 has the id 7"),
    "an id that is no number": (with_(2, id="2"), "candidate 2 has the id '2'"),
    "first removed": (remove(0), "candidate 0 has the id 1"),
    "middle removed": (remove(1), "candidate 1 has the id 2"),
    "first removed, counted anew": (remove_the_first_and_count_anew, "candidate 0 is not the incumbent"),
    "gain of a refused tile": (with_(2, gain=1.5), "candidate 2 was refused, and yet has the gain 1.5"),
    "gain that is no number": (with_(1, gain="1.02"), "candidate 1 was timed, and its gain is '1.02'"),
    "gain that is none": (with_(1, gain=None), "candidate 1 was timed, and its gain is None"),
    "gain that is NaN": (with_(1, gain=float("nan")), "candidate 1 was timed, and its gain is nan"),
    "timed without verdict": (with_(1, verdict=None), "candidate 1 was timed, and its verdict is None"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_damaged_file_is_refused_and_told_why(flaw, saved):
    damage, told = FLAWS[flaw]
    data = json.loads(saved.read_text())
    damage(data["candidates"])
    saved.write_text(json.dumps(data))
    state = fresh(saved)
    with pytest.raises(ValueError) as error:
        state.resume()
    assert str(error.value) == f"{saved}: damaged: {told}; give another file to --save"
    assert len(state.candidates) == 1  # untouched


@pytest.mark.parametrize(
    "damage", [without("tile", 1), with_(1, tile={"block_m": 128}), with_(1, tile=asdict(HAND_SET) | {"stages": []})]
)
def test_a_file_without_tiles_is_no_search(damage, saved):
    data = json.loads(saved.read_text())
    damage(data["candidates"])
    saved.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="search.json: not a search of `flashcore tune`"):
        fresh(saved).resume()
