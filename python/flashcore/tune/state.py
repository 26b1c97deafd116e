"""The search as a file: JSON that is whole at every moment, and that a search can go on with.

{"instance", "lines", "device", "sources", "incumbent": tile, "machine", "seed", "population",
"elites": [id of the best, …], "candidates": [{"id", "born" (random, neighbour, mutation, crossover),
"parents": [id, …], "tile", "registers", "reason" (empty where it was timed), "gain", "verdict"}],
"pruned": {reason: how often}, "final": {…} or null}
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from ..bench.results import save
from .space import Tile

Data = dict[str, Any]
#: what has to agree for a file to be gone on with
IDENTITY = ("instance", "lines", "device", "sources", "incumbent")
#: what every candidate of a file has
FACTS = ("id", "born", "parents", "tile", "registers", "reason", "gain", "verdict")


class State:
    """Every tile that was tried, in the order in which it was judged. Number 0 is the incumbent."""

    def __init__(self, identity: Data, seed: int, population: int, elites: int, path: Optional[Path]) -> None:
        self._path, self._elites = path, elites
        first = {"id": 0, "born": "incumbent", "parents": [], "tile": identity["incumbent"], "registers": 0}
        first |= {"reason": "", "gain": 1.0, "verdict": None}
        self.data: Data = {**identity, "seed": seed, "population": population, "elites": [0], "candidates": [first]}
        self.data |= {"pruned": {}, "final": None}

    def resume(self) -> bool:
        """Goes on with what the file has, if there is one. Raises ValueError for one of another search, or damaged."""
        if not self._path or not self._path.exists():
            return False
        try:
            old = json.loads(self._path.read_text(encoding="utf-8"))
            candidates, pruned = list(old["candidates"]), dict(old["pruned"])
            [hash(tile_of(candidate)) for candidate in candidates]
        except OSError as error:
            raise ValueError(f"{self._path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self._path}: not a search of `flashcore tune`") from None
        for name in IDENTITY:
            if old.get(name) != self.data[name]:
                raise ValueError(
                    f"{self._path}: a search with another {name}: {old.get(name)!r}, now {self.data[name]!r}; "
                    "give another file to --save"
                )
        if flaw := _flaw(candidates, self.data["incumbent"]):
            raise ValueError(f"{self._path}: damaged: {flaw}; give another file to --save")
        self.data |= {"candidates": candidates, "pruned": pruned}
        self._rank()
        return True

    @property
    def candidates(self) -> list[Data]:
        return list(self.data["candidates"])

    @property
    def elites(self) -> list[Data]:
        """The best, the incumbent among them; best first."""
        return [self.data["candidates"][number] for number in self.data["elites"]]

    def tried(self) -> set[Tile]:
        return {tile_of(candidate) for candidate in self.data["candidates"]}

    def add(self, born: str, parents: list[int], tile: Tile, registers: int, reason: str, verdict: Any) -> Data:
        gain = None if reason else verdict.gain()
        candidate = {"id": len(self.data["candidates"]), "born": born, "parents": parents, "tile": asdict(tile)}
        candidate |= {"registers": registers, "reason": reason, "gain": gain}
        candidate["verdict"] = None if reason else asdict(verdict)
        self.data["candidates"].append(candidate)
        self._rank()
        self.keep()
        return candidate

    def prune(self, reason: str) -> None:
        self.data["pruned"][reason] = self.data["pruned"].get(reason, 0) + 1

    def conclude(self, final: Data) -> None:
        self.data["final"] = final
        self.keep()

    def keep(self) -> None:
        if self._path:
            save(self._path, self.data)

    def _rank(self) -> None:
        timed = [candidate for candidate in self.data["candidates"] if candidate["gain"] is not None]
        ranked = sorted(timed, key=lambda candidate: -candidate["gain"])
        best = [candidate["id"] for candidate in ranked[: self._elites]]
        self.data["elites"] = best if 0 in best else [*best, 0]


def tile_of(candidate: Data) -> Tile:
    return Tile(**candidate["tile"])


def _flaw(candidates: list[Data], incumbent: Data) -> str:
    """What is wrong with a file's candidates, empty where nothing is: their numbers have to be their places."""
    if not candidates:
        return "it has no candidates, not even the incumbent"
    for number, candidate in enumerate(candidates):
        if missing := [name for name in FACTS if name not in candidate]:
            return f"candidate {number} has no {', '.join(missing)}"
        if candidate["id"] != number:
            return f"candidate {number} has the id {candidate['id']!r}"
        gain = candidate["gain"]
        if candidate["reason"]:
            if gain is not None:
                return f"candidate {number} was refused, and yet has the gain {gain!r}"
        elif not isinstance(gain, (int, float)) or not math.isfinite(gain):
            return f"candidate {number} was timed, and its gain is {gain!r}"
        elif number and not isinstance(candidate["verdict"], dict):
            return f"candidate {number} was timed, and its verdict is {candidate['verdict']!r}"
    if candidates[0]["tile"] != incumbent:
        return "candidate 0 is not the incumbent"
    return ""
