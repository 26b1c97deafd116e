"""The tiles of the Hopper forward kernel: what can be chosen, what can be seen to be impossible before it is compiled,
and how new tiles come from old ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

MOST_SHARED_BYTES = 232448  # of a block, compute capability 9.0
BARRIER_BYTES = 512  # and the descriptions of tiles; a little more than there are
REGISTERS = 65536  # of a multiprocessor
WARPGROUP = 128
LEAST_REGISTERS, MOST_REGISTERS = 24, 240  # that setmaxnreg can name
PANEL_ROW_BYTES = 128  # 64 columns of 16 bits
CONSUMERS = (2, 3)  # with one, its share is more than setmaxnreg can name; there are named barriers for three
#: registers of a consumer beside output, scores and weights: the least that was ever enough
OTHER_REGISTERS = {"full": 24, "positional": 24, "general": 48}

AXES: dict[str, tuple[Any, ...]] = {
    "block_m": (128, 192),
    "block_n": (),  # whatever there are wgmma wrappers for
    "stages": (2, 3, 4),
    "q_buffers": (1, 2),
    "separate_out": (False, True),
    "rescale_early": (False, True),
    "producer_registers": (24, 32, 40, 48, 56),
    "growth": (0, 4, 8, 12),
    "section_mib": (8, 16, 32, 64),
    "octaves_from": (0, 8, 16, 64),
}


@dataclass(frozen=True)
class Tile:
    """src/kernels/sm90/tiles.h's FwdTile, member by member."""

    block_m: int
    block_n: int
    stages: int
    q_buffers: int
    separate_out: bool
    rescale_early: bool
    producer_registers: int
    consumer_registers: int
    growth: int = 8
    section_mib: int = 32
    octaves_from: int = 0

    @property
    def consumers(self) -> int:
        return self.block_m // 64

    def cpp(self, whole: bool = False) -> str:
        """The initialiser in C++, `whole` with the members that have defaults, too."""
        words = [str(value).lower() for value in asdict(self).values()]
        default = (self.growth, self.section_mib, self.octaves_from) == (8, 32, 0)
        return ", ".join(words[:-3] if default and not whole else words)

    def __str__(self) -> str:
        return f"{{{self.cpp()}}}"


def launch_registers(consumers: int) -> int:
    """Registers of each thread as the kernel starts: all that there are, shared evenly, in steps of 8."""
    return min(255, REGISTERS // (WARPGROUP * (consumers + 1))) // 8 * 8


def most_consumer_registers(consumers: int, producer_registers: int) -> int:
    """What a consumer's threads can take once the producer has given up all but `producer_registers`."""
    pool = (consumers + 1) * launch_registers(consumers) - producer_registers
    return min(MOST_REGISTERS, pool // consumers // 8 * 8)


@dataclass(frozen=True)
class Space:
    """The tiles of one instance of the kernel. bucket: its head_dim; kind: full, positional or general; widths: the
    wgmma shapes that the sources have, in columns."""

    bucket: int
    kind: str
    widths: tuple[int, ...]

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """What is varied. The consumers' registers follow: they take what the producer leaves."""
        axes = AXES | {"block_n": tuple(n for n in self.widths if n % 16 == 0)}
        if self.kind == "full":  # its tiles are alike, and come in a fixed order
            del axes["section_mib"], axes["octaves_from"]
        return axes

    def shared_bytes(self, tile: Tile) -> int:
        """Of a block; as SharedPlan in fwd.cuh lays it out, with room for the barriers."""
        panels = -(-self.bucket // 64)
        q, k = (panels * rows * PANEL_ROW_BYTES for rows in (tile.block_m, tile.block_n))
        return tile.q_buffers * q + 2 * tile.stages * k + tile.separate_out * q + BARRIER_BYTES

    def objection(self, tile: Tile) -> str:
        """Why a tile cannot work, without compiling it; empty if nothing speaks against it."""
        if tile.block_m % 64 or tile.consumers not in CONSUMERS:
            return "rows: 128 or 192, 64 for each consumer"
        if tile.block_n % 16 or tile.block_n not in self.widths:
            return "keys: no wgmma shape of such a width"
        registers = (tile.producer_registers, tile.consumer_registers)
        if any(r % 8 or not LEAST_REGISTERS <= r <= MOST_REGISTERS for r in registers):
            return "registers: multiples of 8 from 24 to 240"
        start = launch_registers(tile.consumers)
        if not tile.producer_registers <= start <= tile.consumer_registers:
            return f"registers: the producer must give and the consumers take, from {start}"
        if tile.producer_registers + tile.consumers * tile.consumer_registers > (tile.consumers + 1) * start:
            return "registers: more than a block has"
        needed = self.bucket // 2 + tile.block_n // 2 + tile.block_n // 4 + OTHER_REGISTERS[self.kind]
        if needed > tile.consumer_registers:
            return "registers: output, scores and weights do not fit"
        if self.shared_bytes(tile) > MOST_SHARED_BYTES:
            return "shared memory: more than 227 KB"
        return ""

    # ---- new tiles ---------------------------------------------------------------------------------------------------

    def with_changes(self, tile: Tile, **changes: Any) -> Tile:
        changed = replace(tile, **changes)
        most = most_consumer_registers(changed.consumers, changed.producer_registers)
        return replace(changed, consumer_registers=most)

    def neighbours(self, tile: Tile) -> Iterator[Tile]:
        """Those that differ in one axis, the nearest values first."""
        own = asdict(tile)
        steps: list[tuple[float, str, Any]] = []
        for name, values in self.axes.items():
            ranked = sorted(values, key=lambda value, now=own[name]: abs(value - now))  # type: ignore[misc]
            steps += [(rank, name, value) for rank, value in enumerate(ranked) if value != own[name]]
        for _, name, value in sorted(steps, key=lambda step: step[0]):
            yield self.with_changes(tile, **{name: value})

    def random(self, rng: random.Random, like: Tile) -> Tile:
        return self.with_changes(like, **{name: rng.choice(values) for name, values in self.axes.items()})

    def mutated(self, rng: random.Random, tile: Tile) -> Tile:
        """One axis changed, often two, seldom three; half of the steps go to the value beside it."""
        count = rng.choices((1, 2, 3), (5, 3, 1))[0]
        changes = {}
        for name in rng.sample(sorted(self.axes), count):
            values, now = sorted(self.axes[name]), asdict(tile)[name]
            near = [value for value in values if value > now][:1] + [value for value in values if value < now][-1:]
            others = near if near and rng.random() < 0.5 else [value for value in values if value != now]
            changes[name] = rng.choice(others)
        return self.with_changes(tile, **changes)

    def crossed(self, rng: random.Random, one: Tile, other: Tile) -> Tile:
        """Each axis from one of two parents."""
        parents = asdict(one), asdict(other)
        return self.with_changes(one, **{name: rng.choice(parents)[name] for name in self.axes})
