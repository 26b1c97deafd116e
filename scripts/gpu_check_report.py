#!/usr/bin/env python3
"""Turns the logs of scripts/gpu_check.sh into bench/results/gpu_check.json and a table. Exits with 1 on any failure."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu_check_current import RESULT, ROOT, sources_hash

PACKAGES = {"torch": ["torch"], "cupy": ["cupy-cuda13x", "cupy-cuda12x", "cupy"], "jax": ["jax"], "numpy": ["numpy"]}
# What compute-sanitizer's tools count, by their closing lines: memcheck's and synccheck's errors, racecheck's hazards.
FINDINGS = {"memory_errors": r"ERROR SUMMARY: (\d+) error", "hazards": r"RACECHECK SUMMARY: (\d+) hazard"}
TIMED_OUT = (124, 137)


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version_of(names: list[str]) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def cuda_runtime() -> str:
    try:
        import flashcore

        version = flashcore.device_info().runtime_version
        return f"{version // 1000}.{version % 1000 // 10}"
    except Exception as error:  # noqa: BLE001  the report is written whatever is broken
        return f"unknown ({error})"


def read_tests(work: Path, step: str) -> dict | None:
    """Counts and names from a step's JUnit file, or from those of its parts, written by ctest, GoogleTest or pytest.

    None where the step wrote none, or a broken one.
    """
    files = sorted([*work.glob(f"{step}.xml"), *work.glob(f"{step}.part*.xml")])
    try:
        cases = [case for file in files for case in ElementTree.parse(file).getroot().iter("testcase")]
    except (OSError, ElementTree.ParseError):
        return None
    if not files:
        return None
    skipped, failures = 0, []
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            names = dict.fromkeys((case.get("classname"), case.get("name")))  # ctest gives the same name twice
            failures.append(".".join(filter(None, names)))
        elif case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
            skipped += 1
    passed = len(cases) - skipped - len(failures)
    return {"passed": passed, "failed": len(failures), "skipped": skipped, "failures": failures}


def read_steps(work: Path) -> list[dict]:
    """One entry per step, in the order they ran: name, ok, seconds, tests, and what the sanitizer counted."""
    steps = []
    for line in (work / "steps.tsv").read_text().splitlines():
        name, status, seconds = line.split("\t")
        step: dict = {"name": name, "ok": status == "0", "exit_status": int(status), "seconds": int(seconds)}
        tests = read_tests(work, name)
        if tests is not None:
            step["tests"] = tests
            step["ok"] = step["ok"] and tests["passed"] > 0  # a filter that matches nothing proves nothing
        log = (work / f"{name}.log").read_text(errors="replace")
        for found, pattern in FINDINGS.items():
            if counts := re.findall(pattern, log):
                step[found] = sum(map(int, counts))
                step["ok"] = step["ok"] and step[found] == 0
        steps.append(step)
    return steps


def print_table(report: dict) -> None:
    print(f"\n{report['gpu']}, driver {report['driver']}, CUDA {report['cuda_runtime']}, nvcc {report['nvcc']}")
    print(f"{'step':<20} {'':<6} {'passed':>7} {'failed':>7} {'skipped':>7} {'found':>6} {'seconds':>8}")
    for step in report["steps"]:
        tests = step.get("tests", {})
        counts = " ".join(f"{tests.get(k, ''):>7}" for k in ("passed", "failed", "skipped"))
        verdict = "ok" if step["ok"] else "TIME" if step["exit_status"] in TIMED_OUT else "FAILED"
        found = sum(step[name] for name in FINDINGS if name in step) if FINDINGS.keys() & step.keys() else ""
        print(f"{step['name']:<20} {verdict:<6} {counts} {found:>6} {step['seconds']:>8}")
    for step in report["steps"]:
        for name in step.get("tests", {}).get("failures", []):
            print(f"failed: {step['name']}: {name}")
    print("GPU check: passed" if report["passed"] else "GPU check: FAILED")


def main() -> int:
    work = Path(sys.argv[1])
    steps = read_steps(work)
    nvcc = re.search(r"V([\d.]+)", output_of("nvcc", "--version"))
    smi = "nvidia-smi", "--format=csv,noheader", "--id=0"
    report = {
        "passed": bool(steps) and all(step["ok"] for step in steps),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": sum(step["seconds"] for step in steps),
        "git_sha": os.environ.get("FLASHCORE_GIT_SHA") or output_of("git", "rev-parse", "HEAD"),
        "sources_sha256": sources_hash(),
        "gpu": output_of(*smi, "--query-gpu=name"),
        "compute_capability": output_of(*smi, "--query-gpu=compute_cap"),
        "driver": output_of(*smi, "--query-gpu=driver_version"),
        "cuda_runtime": cuda_runtime(),
        "nvcc": nvcc.group(1) if nvcc else "unknown",
        "python": platform.python_version(),
        **{name: version_of(distributions) for name, distributions in PACKAGES.items()},
        "steps": steps,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print_table(report)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
