"""Result files: JSON that is whole at every moment, and CSV.

{"machine", "settings", "ceilings", "complete", "cases": [{"line", "kernel", "flops", "bytes", "ratio_to_best_peer",
"results": {contender: {"us" (the median), "us_mean", …, "tflops", "gbs", …}}, "failures": {contender: why}}]}
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from . import form
from .cases import parse

OURS = "flashcore"
ERROR_LIMIT = 1.2
#: what has to agree for a file to be gone on with
IDENTITY = ("device", "gpu", "processor", "driver", "flashcore", "torch", "jax", "git_sha", "isa", "cores", "threads")
COLUMNS = tuple(
    "us us_mean us_std us_min us_p50 us_p90 us_p95 us_p99 us_low us_high us_max "
    "samples tflops gbs share_matmul share_copy host_us error".split()
)

Data = dict[str, Any]


def check_writable(path: Path) -> None:
    """Raises ValueError before anything is measured for a file that could not be written after."""
    try:
        is_other = path.exists() and not path.is_file()  # a folder, a device
        if is_other or path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f"{path}: cannot be written")
        _partial(path).touch()  # tried: of some folders, rights alone do not tell
        _partial(path).unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def save(path: Path, data: Data) -> None:
    """Writes beside the file and moves it there: who reads it finds the old content or the new, never a part."""
    partial = _partial(path)
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def load(path: Path) -> Data:
    """Raises ValueError for a file that is not of this kind: what is wrong with it, and where."""
    try:
        data: Data = json.loads(path.read_text(encoding="utf-8"))
        form.check(data)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a result of `flashcore bench`: {error}") from None
    return data


def check_same_run(path: Path, old: Data, machine: Data, settings: Data) -> None:
    """Raises ValueError where an old file was measured otherwise than this run would: they would not compare."""
    pairs = [(name, old.get("machine", {}).get(name), machine.get(name)) for name in IDENTITY]
    pairs += [(name, old.get("settings", {}).get(name), settings[name]) for name in settings]
    different = [f"{name} {was!r} there, {now!r} here" for name, was, now in pairs if was != now]
    if different:
        raise ValueError(f"{path}: cannot go on with it: {'; '.join(different)}")


def add_rates(data: Data) -> None:
    """Works out for every result what its time means: TFLOP/s, GB/s, and shares of the ceilings."""
    ceilings = data.get("ceilings") or {"matmul_tflops": {}, "copy_gbs": None}
    for entry in data["cases"]:
        case = parse(entry["line"])
        most = ceilings["matmul_tflops"].get(case.dtype)
        for result in entry["results"].values():
            result["tflops"] = case.flops / result["us"] / 1e6
            result["gbs"] = case.bytes / result["us"] / 1e3
            result["share_matmul"] = result["tflops"] / most if most else None
            result["share_copy"] = result["gbs"] / ceilings["copy_gbs"] if ceilings["copy_gbs"] else None


def error_ratio(entry: Data) -> Optional[float]:
    """Our error over that of the most exact other library; None where either is not known."""
    errors = {name: result.get("error") for name, result in entry["results"].items()}
    ours = errors.pop(OURS, None)
    others = [error for name, error in errors.items() if error and error == error and not name.startswith(OURS)]
    return None if ours is None or not others else ours / min(others)


def is_too_inexact(entry: Data) -> bool:
    """More than 1.2 times the error of the most exact other library, or NaN where that has none."""
    ratio = error_ratio(entry)
    return ratio is not None and not ratio <= ERROR_LIMIT


def rows(data: Data) -> Iterator[Data]:
    for entry in data["cases"]:
        for name, result in entry["results"].items():
            kernel = result.get("kernel", "")
            yield {"line": entry["line"], "contender": name, "kernel": kernel} | {c: result.get(c) for c in COLUMNS}


def save_csv(path: Path, data: Data) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["line", "contender", "kernel", *COLUMNS])
        writer.writeheader()
        writer.writerows(rows(data))
