"""What searches for tiles found, for docs/tuning.md: from the files bench/results/tune_*.json of `flashcore tune`, and
what src/kernels/sm90/tiles.h has of it now."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from docs_machine import told_machine

TILES = Path(__file__).resolve().parent.parent / "src" / "kernels" / "sm90" / "tiles.h"
CAUSAL_ORDER = ("section_mib", "octaves_from")  # a search leaves them alone in full kernels

Data = dict[str, Any]


def tile_of_sources(source: str, head_dim: int, kind: str) -> Data:
    """What fwd_tile in the text of tiles.h returns for large problems: the first line whose condition holds."""
    struct = source.split("struct FwdTile {")[1].split("}")[0]
    members = re.findall(r"^  (?:int|bool) (\w+)(?: = (\d+))?;", struct, re.M)
    function = source.split("constexpr FwdTile fwd_tile(int head_dim,")[1].split("\n}")[0]
    known = {"head_dim": head_dim, **{name: name == kind for name in ("full", "positional", "general")}}
    for condition, values in re.findall(r"^  (?:if \((.*)\) )?return \{([^}]*)\};", function, re.M):
        if "FwdSize::small" in condition or condition and not eval(condition.replace("&&", "and"), known.copy()):
            continue
        given = [json.loads(value) for value in values.split(", ")]
        return {name: int(default or 0) for name, default in members} | dict(zip(dict(members), given, strict=False))
    raise ValueError(f"{TILES}: no tile for head_dim {head_dim}, {kind}")


def sources_now(instance: str) -> Data:
    """Instance: as a search calls it, "BFloat16, head_dim 128, full"."""
    _, head_dim, kind = instance.split(", ")
    return tile_of_sources(TILES.read_text(encoding="utf-8"), int(head_dim.removeprefix("head_dim ")), kind)


def taken(tile: Data, data: Data) -> str:
    """How much of what a tile changed in the hand-set one is in the sources now."""
    now, hand_set = sources_now(data["instance"]), data["incumbent"]
    names = [name for name in tile if not (data["instance"].endswith(" full") and name in CAUSAL_ORDER)]
    others = [f"{name} {now[name]}" for name in names if now[name] != tile[name]]
    if not others:
        return "yes"
    same = [name for name in names if now[name] == tile[name] != hand_set[name]]
    if not same:
        return "no"
    return f"but for {', '.join(others)}" if len(others) <= len(same) else f"only {', '.join(same)}"


def changes(tile: Data, hand_set: Data) -> str:
    """In what a tile differs from the hand-set one."""
    words = [f"{name} {hand_set[name]} → {value}" for name, value in tile.items() if value != hand_set[name]]
    return ", ".join(words) or "none"


def kind(reason: str) -> str:
    """A reason without its numbers."""
    return reason.split(" bytes")[0].split(":")[0].rstrip(" 0123456789")


def counts(data: Data) -> str:
    tried = data["candidates"][1:]
    reasons = Counter(kind(candidate["reason"]) for candidate in tried if candidate["reason"])
    refused = sum(reasons.values())
    told = f"{len(tried)} tiles compiled, {len(tried) - refused} timed, {refused} refused"
    told += f" ({', '.join(f'{count} {reason}' for reason, count in reasons.most_common())})" if reasons else ""
    return f"{told}; {sum(data['pruned'].values())} passed over without compiling"


def verdict(data: Data) -> str:
    final = data["final"]
    noise = f"the noise of {final['noise']:.1%}"
    if final["winner"] is None:
        return f"Nothing beat the hand-set tile by more than {noise}: `tiles.h` stays as it is."
    gain = next(found["gain"] for found in final["finalists"] if found["id"] == final["winner"])
    winner = data["candidates"][final["winner"]]["tile"]
    found = f"Found: {changes(winner, data['incumbent'])}. It gains {gain - 1:.1%}, more than {noise}."
    return f"{found} In `tiles.h`: {taken(winner, data)}."


def of_file(path: Path) -> list[str]:
    data: Data = json.loads(path.read_text(encoding="utf-8"))
    if not data["final"]:
        return []  # not at its end
    tiles = {candidate["id"]: candidate for candidate in data["candidates"]}
    again = {found["id"]: found["gain"] for found in data["final"]["finalists"]}
    best = [number for number in data["elites"] if number]
    rows = []
    for number in sorted(best, key=lambda number: (-again.get(number, 0.0), -tiles[number]["gain"])):
        words = (
            changes(tiles[number]["tile"], data["incumbent"]),
            tiles[number]["born"],
            f"{tiles[number]['gain']:.3f}",
        )
        more = f"{again[number]:.3f}" if number in again else "–"
        rows.append(f"| {' | '.join(words)} | {more} | {taken(tiles[number]['tile'], data)} |")
    table = [
        "| against the hand-set tile | from | gain | once more | in `tiles.h` |",
        "|---|---|---:|---:|---|",
        *rows,
        "",
    ]
    lines = ", ".join(f"`{line}`" for line in data["lines"])
    return [
        f"### {lines}",
        "",
        f"On one {told_machine(data.get('machine', {'gpu': data['device']}))}: {counts(data)}. {verdict(data)}",
        "",
        *(table if rows else []),
        f"From [`bench/results/{path.name}`](../bench/results/{path.name}).",
        "",
    ]


def section(results: Path, _: Path) -> str:
    lines = [line for path in sorted(results.glob("tune_*.json")) for line in of_file(path)]
    head = (
        "A gain is the hand-set tile's time over the tile's, both in turn; *once more* is the longer timing at the "
        "end. The hand-set tile is the one that `tiles.h` had before the search. *In `tiles.h`* says what it has now: "
        "*yes*, this tile; *but for*, this tile with those values instead; *only*, of its changes these alone; *no*, "
        "none of them. The log of [`sm90/README.md`](../src/kernels/sm90/README.md) tells what was measured on other "
        "lengths."
    )
    return "\n".join(["", "## What searches found", "", head, "", *lines, ""]) if lines else ""
