"""Tuned kernels: measuring which kernel is the best for a problem on a device, and choosing by what was measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Union

from . import _core
from .device import Device

if TYPE_CHECKING:
    from .tune.rows import Finding

AnyPath = Union[str, "os.PathLike[str]"]


def load_tuned(path: Optional[AnyPath]) -> None:
    """From now on, in every thread, kernels are chosen by this file, and no longer by the one that was loaded before or
    that the environment variable FLASHCORE_TUNED names. None: by no file.

    A file has a kernel for each of some problem lines, by the names of devices; calls on other problems or devices run
    as ever. A call's `kernel` and FLASHCORE_KERNEL come first. A tuned kernel that this build lacks or that refuses the
    problem is passed over; `explain` tells so. Another kernel gives other bits within the same bounds. Plans that are
    made already stay as they are.

    Raises:
      ValueError: the file cannot be read, or one of its lines; says which. What was loaded before stays.
    """
    if path is None:
        _core.forget_tuned()
    else:
        _core.load_tuned(os.fspath(path))


def autotune(
    problems: Union[str, Sequence[str]],
    path: Optional[AnyPath] = None,
    *,
    device: Device = None,
    seconds: float = 3.0,
) -> list[Finding]:
    """Measures which kernel of this build is the fastest for each problem on a device, keeps those that beat the usual
    one in a file, and loads the file.

    Every kernel that takes the problem is tried in each of its settings (instruction sets of a CPU, parts that the keys
    are cut into, rows of a tile), on random inputs; wrong results are refused, the others timed in turn. A kernel is
    kept where its lead is larger than the noise and than 1 %. What the file has of other problems and devices stays in
    it; of these problems the old entries go.

    Args:
      problems: a problem line ("decode bf16 b16 q1 k8192 h32/8 d128") or several; `explain(q, k, v, ...)` tells a
        call's. Calls are tuned that have this very line, but for the seed of dropout.
      path: the file; default: the one that FLASHCORE_TUNED names.
      device: "cpu", "cuda", "cuda:1" or a CUDA ordinal; default: the best there is.
      seconds: of timing, for each problem.

    Returns: for each problem a Finding: line, device_name, usual, kernel (the usual one where none was better), gain,
      seconds by kernel, and the kernels that were refused with the reason.

    Raises:
      ValueError: a line or the file cannot be read, or no file is named.
      Unsupported: no kernel takes a problem.
    """
    from .bench.cases import parse
    from .bench.stage import Stage
    from .tune import files, rows

    lines = [parse(line).line for line in ([problems] if isinstance(problems, str) else problems)]
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} given; it must be positive")
    target = tuned_path(path)
    before = files.read(target) if target.exists() else []
    stage = Stage(device, with_torch=False)
    found = [rows.tune(line, stage, seconds) for line in dict.fromkeys(lines)]
    files.write(target, files.merge(before, found))
    load_tuned(target)
    return found


def tuned_path(path: Optional[AnyPath]) -> Path:
    """The file that is meant. Raises ValueError where none is named or where it could not be written."""
    from .bench.results import check_writable

    named = path or os.environ.get("FLASHCORE_TUNED")
    if not named:
        raise ValueError("no file for the tuned kernels: give a path, or set FLASHCORE_TUNED")
    target = Path(named)
    check_writable(target)
    return target
