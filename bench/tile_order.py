"""How evenly an order of causal tiles keeps the multiprocessors busy, by simulation: no GPU is needed.

    python bench/tile_order.py                        # head dimensions and lengths of the published table
    python bench/tile_order.py 256:8192:16 128:2048:128

A problem is head_dim:seqlen:heads (heads of all batch entries). Printed is the time of the last block over the mean,
for sections of so many MiB of keys and values (tile/scheduler.cuh), and for the same with rows taken by octaves of
their length: the longest half of all heads first, then the half of the rest, each octave in sections of twice as many
heads. Blocks draw tiles as fwd_work.cuh's scheduling warp does: the next one while a tile runs, or up to --ahead of
them where the tile last drawn has at most --short key blocks, but for the last --last rounds.
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import dataclass

MULTIPROCESSORS = 132
OVERHEAD = 1.5  #: of a tile, in key blocks
DRAW = 0.5  #: from a draw to the tile's start, in key blocks
TILES = {64: (192, 128), 128: (128, 128), 256: (128, 80)}  #: queries and keys by head_dim, as tiles.h has them
TABLE = [f"{dim}:{seqlen}:{16384 // seqlen * 2048 // dim}" for dim in TILES for seqlen in (512, 2048, 8192, 16384)]


@dataclass(frozen=True)
class Rule:
    ahead: int
    short: int
    last: int


def lengths(head_dim: int, seqlen: int, heads: int, mib: int, octaves: bool) -> list[float]:
    """Key blocks of every tile, in the order in which tiles are drawn."""
    queries, keys = TILES[head_dim]
    per_head = 4 * seqlen * head_dim
    section = max(1, min(heads, (mib << 20) // per_head))
    order: list[int] = []
    rows = -(-seqlen // queries)
    while rows:
        rest = rows // 2 if octaves else 0
        for first in range(0, heads, section):
            for row in range(rows - 1, rest - 1, -1):
                order += [row] * min(section, heads - first)
        rows, section = rest, 2 * section
    return [-(-min(seqlen, (row + 1) * queries) // keys) + OVERHEAD for row in order]


def unevenness(tiles: list[float], rule: Rule) -> float:
    """The time of the last block over the mean of all."""
    blocks = min(MULTIPROCESSORS, len(tiles))
    last = len(tiles) - rule.last * blocks
    drawn = [[(0.0, tiles[block])] for block in range(blocks)]  # when, how long
    ends: list[list[float]] = [[] for _ in range(blocks)]

    def end(block: int, n: int) -> float:
        for when, length in drawn[block][len(ends[block]) : n + 1]:
            before = ends[block][-1] if ends[block] else 0.0
            ends[block].append(max(before, when + DRAW) + length)
        return ends[block][n]

    def next_draw(block: int, index: int) -> float:
        n = len(drawn[block])
        many = drawn[block][-1][1] <= rule.short + OVERHEAD and index < last
        held = rule.ahead + 1 if many else 2
        return max(drawn[block][-1][0] + DRAW, end(block, n - held) if n >= held else 0.0)

    draws = [(next_draw(block, block), block) for block in range(blocks)]
    heapq.heapify(draws)
    for index in range(blocks, len(tiles)):
        when, block = heapq.heappop(draws)
        drawn[block].append((when, tiles[index]))
        heapq.heappush(draws, (next_draw(block, index), block))
    return max(end(block, len(drawn[block]) - 1) for block in range(blocks)) / (sum(tiles) / blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=TABLE, metavar="head_dim:seqlen:heads")
    parser.add_argument("--mib", type=int, nargs="+", default=[16, 32, 64], help="sizes of sections")
    parser.add_argument("--ahead", type=int, default=3, help="tiles held at most (3)")
    parser.add_argument("--short", type=int, default=8, help="key blocks of a tile behind which they are held (8)")
    parser.add_argument("--last", type=int, default=4, help="rounds at the end in which one is held (4)")
    arguments = parser.parse_args()
    rule = Rule(arguments.ahead, arguments.short, arguments.last)
    print(f"{'':18}" + "".join(f"{f'{mib} MiB':>9}{'octaves':>9}" for mib in arguments.mib))
    for problem in arguments.problems:
        try:
            head_dim, seqlen, heads = map(int, problem.split(":"))
            _ = TILES[head_dim], 1 / seqlen, 1 / heads
        except (ValueError, KeyError, ZeroDivisionError):
            known = ", ".join(map(str, TILES))
            parser.error(f'"{problem}" given; head_dim:seqlen:heads is needed, head_dim one of {known}')
        numbers = [
            unevenness(lengths(head_dim, seqlen, heads, mib, octaves), rule)
            for mib in arguments.mib
            for octaves in (False, True)
        ]
        print(f"{problem:18}" + "".join(f"{number:9.3f}" for number in numbers))


if __name__ == "__main__":
    main()
