"""What a judge says of a tile."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Verdict:
    """`gains` has, by problem line, the incumbent's time over this tile's: quartiles over rounds in which both took
    turns ("low", "median", "high"). `us` and `incumbent_us` are median times in microseconds."""

    reason: str = ""  #: why the tile is refused; empty where it was timed
    gains: dict[str, dict[str, float]] = field(default_factory=dict)
    us: dict[str, float] = field(default_factory=dict)
    incumbent_us: dict[str, float] = field(default_factory=dict)

    def gain(self, part: str = "median") -> float:
        """Geometric mean over the lines."""
        return math.exp(sum(math.log(spread[part]) for spread in self.gains.values()) / len(self.gains))
