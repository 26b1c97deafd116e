"""What searches for tiles found, for docs/tuning.md: from the files bench/results/tune_*.json of `flashcore tune`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from docs_machine import told_machine

Data = dict[str, Any]


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
    return f"Found: {changes(winner, data['incumbent'])}. It gains {gain - 1:.1%}, more than {noise}."


def of_file(path: Path) -> list[str]:
    data: Data = json.loads(path.read_text(encoding="utf-8"))
    if not data["final"]:
        return []  # not at its end
    tiles = {candidate["id"]: candidate for candidate in data["candidates"]}
    again = {found["id"]: found["gain"] for found in data["final"]["finalists"]}
    best = [number for number in data["elites"] if number]
    rows = []
    for number in sorted(best, key=lambda number: (-again.get(number, 0.0), -tiles[number]["gain"])):
        told = (
            changes(tiles[number]["tile"], data["incumbent"]),
            tiles[number]["born"],
            f"{tiles[number]['gain']:.3f}",
        )
        rows.append(f"| {' | '.join(told)} | {f'{again[number]:.3f}' if number in again else '–'} |")
    table = ["| against the hand-set tile | from | gain | once more |", "|---|---|---:|---:|", *rows, ""]
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
        "A gain is the hand-set tile's time over the tile's, both in turn; *once more* is the longer timing at the end."
    )
    return "\n".join(["", "## What searches found", "", head, "", *lines, ""]) if lines else ""
