"""The search: steady-state evolution with elite preservation. A child is bred whenever there is room to compile it: for
the first population beside the incumbent and at random, then from the best that are known, which stay."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Protocol

from .compile import Build
from .judge import Judge
from .space import Space, Tile
from .state import Data, State, tile_of
from .verdict import Verdict

CROSSOVERS = 0.4
TOURNAMENT = 3
#: attempts at a tile that is possible and new, before the space counts as searched
ATTEMPTS = 500
#: what the last comparison needs: so many finalists, so many times the seconds of a first timing
FINALISTS, FINAL_TIMES = 4, 8
#: the least gain that counts, whatever the noise
LEAST_GAIN = 0.003


class Builder(Protocol):
    def build(self, tile: Optional[Tile]) -> Build: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class Settings:
    population: int = 16
    generations: int = 1000  #: of `population` births each
    minutes: float = 10.0  #: with the last comparison
    jobs: int = 1  #: compilers at a time
    seconds: float = 0.2  #: of timing, for each tile and line
    seed: int = 0


@dataclass
class Birth:
    born: str
    parents: list[int]
    tile: Tile


class Search:
    """`tell` hears of each candidate when it has been judged."""

    def __init__(
        self,
        space: Space,
        builder: Builder,
        judge: Judge,
        state: State,
        settings: Settings,
        tell: Callable[[Data], None] = lambda candidate: None,
    ) -> None:
        self._space, self._builder, self._judge = space, builder, judge
        self._state, self._settings, self._tell = state, settings, tell
        self._rng = random.Random(f"{settings.seed}:{len(state.candidates)}")
        self._incumbent = tile_of(state.candidates[0])
        self._neighbours = space.neighbours(self._incumbent)
        self._tried = state.tried()
        self._births = len(self._tried) - 1

    def run(self) -> None:
        """Until the generations, the minutes or the space are spent; then the last comparison."""
        last = FINALISTS * FINAL_TIMES * self._settings.seconds * 1.5 + 2
        end = time.monotonic() + max(0.0, self._settings.minutes * 60 - last)
        flights: dict[Future[Build], Birth] = {}
        pool = ThreadPoolExecutor(self._settings.jobs)
        try:
            while time.monotonic() < end:
                while len(flights) < self._settings.jobs and (birth := self._breed()):
                    flights[pool.submit(self._builder.build, birth.tile)] = birth
                if not flights:
                    break
                done = wait(flights, timeout=max(0.0, end - time.monotonic()), return_when=FIRST_COMPLETED).done
                for future in sorted(done, key=list(flights).index):
                    self._take(flights.pop(future), future.result())
        finally:
            if flights:
                self._builder.stop()
            pool.shutdown(cancel_futures=True)
            self._state.keep()

    def _take(self, birth: Birth, build: Build) -> None:
        verdict = Verdict(build.reason)
        if build.library:
            verdict = self._judge.judge(birth.tile, build.library, self._settings.seconds)
        state, reason = self._state, verdict.reason
        self._tell(state.add(birth.born, birth.parents, birth.tile, build.registers, reason, verdict))

    # ---- births ------------------------------------------------------------------------------------------------------

    def _breed(self) -> Optional[Birth]:
        """None where the search is at its end."""
        if self._births >= self._settings.population * self._settings.generations:
            return None
        for _ in range(ATTEMPTS):
            birth = self._attempt()
            if birth.tile in self._tried:
                continue
            reason = self._space.objection(birth.tile)
            if reason:
                self._state.prune(reason)
                continue
            self._tried.add(birth.tile)
            self._births += 1
            return birth
        return None

    def _attempt(self) -> Birth:
        rng, space = self._rng, self._space
        if self._births < self._settings.population:
            if self._births % 2 == 0 and (near := next(self._neighbours, None)):
                return Birth("neighbour", [0], near)
            return Birth("random", [], space.random(rng, self._incumbent))
        elites = self._state.elites
        one, other = self._parent(elites), self._parent(elites)
        if one is not other and rng.random() < CROSSOVERS:
            child = space.crossed(rng, tile_of(one), tile_of(other))
            if rng.random() < 0.5:
                child = space.mutated(rng, child)
            return Birth("crossover", [one["id"], other["id"]], child)
        return Birth("mutation", [one["id"]], space.mutated(rng, tile_of(one)))

    def _parent(self, elites: list[Data]) -> Data:
        return max(self._rng.choices(elites, k=TOURNAMENT), key=lambda candidate: float(candidate["gain"]))


def compare_finalists(builder: Builder, judge: Judge, state: State, seconds: float, copy_of_incumbent: Path) -> Data:
    """The best once more, and longer: the first timing of many is best by chance, too. The noise is what a copy of the
    incumbent seems to gain over the incumbent. Keeps and returns {"noise", "finalists": [{"id", "gain", "verdict"}],
    "winner": id or null}."""
    best = [candidate for candidate in state.elites if candidate["id"] and candidate["gain"] > 1]
    judge.close()  # what was tried meanwhile leaves no trace
    same = judge.judge(None, copy_of_incumbent, FINAL_TIMES * seconds)
    if same.reason:
        raise RuntimeError(f"the hand-set tile cannot be timed: {same.reason}")
    noise = max(LEAST_GAIN, abs(same.gain() - 1), (same.gain("high") - same.gain("low")) / 2)
    finalists: list[Data] = []
    for candidate in best[:FINALISTS]:
        build = builder.build(tile_of(candidate))
        verdict = judge.judge(tile_of(candidate), build.library, FINAL_TIMES * seconds) if build.library else None
        if verdict and not verdict.reason:
            finalists.append({"id": candidate["id"], "gain": verdict.gain(), "verdict": vars(verdict)})
    finalists.sort(key=lambda finalist: -finalist["gain"])
    winner = finalists[0]["id"] if finalists and finalists[0]["gain"] > 1 + noise else None
    final = {"noise": noise, "finalists": finalists, "winner": winner}
    state.conclude(final)
    return final
