"""Result files under bench/results: where the numbers come from, and how they are written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


def output_of(*command: str) -> str:
    """What a command prints; empty if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance(*packages: str) -> dict[str, Any]:
    """Versions of flashcore and of these packages (those that are installed), the commit, the day."""
    found = {name: version_of(name) for name in ("flashcore", *packages)}
    return {
        **{name: version for name, version in found.items() if version},
        "git_sha": os.environ.get("FLASHCORE_GIT_SHA") or output_of("git", "rev-parse", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(path: Path, machine: dict[str, Any], **results: Any) -> None:
    path.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n", encoding="utf-8")
