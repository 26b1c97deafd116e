"""The machine of a result file in a few words."""

from __future__ import annotations

from typing import Any

FACTS = ("driver", "cuda", "torch", "date")


def told_machine(machine: dict[str, Any]) -> str:
    words = [machine.get("gpu") or machine.get("processor") or "machine"]
    words += [f"{name} {machine[name]}" for name in FACTS if machine.get(name)]
    return ", ".join([*words, f"commit {machine.get('git_sha', '')[:12]}"])
