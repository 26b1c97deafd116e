#!/usr/bin/env python3
"""Says whether bench/results/gpu_check.json was made from the library's sources as they are now."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "gpu_check.json"
CODE = {".h", ".cpp", ".cu", ".cuh"}


def sources_hash(root: Path = ROOT) -> str:
    """SHA-256 over the paths and contents of the library's code, in the order of the paths."""
    files = [f for folder in ("include", "src") for f in (root / folder).rglob("*") if f.suffix in CODE]
    digest = hashlib.sha256()
    for path, file in sorted((f.relative_to(root).as_posix(), f) for f in files):
        content = file.read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def changed_since(commit: str, root: Path = ROOT) -> list[str]:
    """The library's code that is not as it was at the commit, as far as git knows it."""
    command = ["git", "-C", str(root), "diff", "--name-only", commit, "--", "include", "src"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [path for path in run.stdout.splitlines() if Path(path).suffix in CODE]


def describe(result: Path = RESULT) -> tuple[bool, str]:
    """Whether the result is of these sources and good, and that in a sentence."""
    if not result.exists():
        return False, "GPU check: never run. Run scripts/gpu_check.sh on a machine with a GPU."
    check = json.loads(result.read_text())
    run = f"{check['gpu']}, {check['date']}, commit {check['git_sha'][:12]}"
    if check["sources_sha256"] != sources_hash():
        changed = ", ".join(changed_since(check["git_sha"])) or "which, git does not know"
        return False, (
            f"GPU check: OUT OF DATE, sources have changed since ({run}): {changed}. Run scripts/gpu_check.sh again."
        )
    if not check["passed"]:
        return False, f"GPU check: of these sources, but it FAILED ({run})."
    return True, f"GPU check: passed with exactly these sources ({run})."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless the check is current and passed")
    arguments = parser.parse_args()
    current, sentence = describe()
    print(sentence)
    return int(arguments.strict and not current)


if __name__ == "__main__":
    sys.exit(main())
