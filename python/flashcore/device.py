"""Devices and memory: what there is, what is in use, and where workspaces come from."""

from __future__ import annotations

import atexit
import re
from collections.abc import Callable
from typing import Any, Optional, Union

from . import _core
from ._core import DeviceInfo, MemoryStats

#: "cpu", "cuda", "cuda:1", a CUDA ordinal, or None for the best device there is
Device = Union[str, int, None]


def parse_device(device: Device) -> tuple[bool, int]:
    """(on CUDA, ordinal)."""
    if device is None:
        return _core.device_count() > 0, 0
    if isinstance(device, int) and not isinstance(device, bool):
        return True, device
    if device == "cpu":
        return False, 0
    match = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if match is None:
        raise ValueError(f'device={device!r} given; allowed: "cpu", "cuda", "cuda:N", or a CUDA ordinal')
    return True, int(match.group(1) or 0)


def device_count() -> int:
    """Number of usable CUDA devices; 0 where there is no GPU, no driver, or no CUDA in this build."""
    return _core.device_count()


def device_info(device: Device = 0) -> DeviceInfo:
    """Properties of a device: a CUDA ordinal, "cuda:N" or "cpu". Raises ValueError where there is none."""
    return _core.device_info(*parse_device(device))


def memory_stats(device: Device = None) -> MemoryStats:
    """Counters of flashcore's own pool on a device; default: the first GPU, or the CPU where there is none."""
    return _core.memory_stats(*parse_device(device))


def num_threads() -> int:
    """Threads that one call on the CPU may use: FLASHCORE_NUM_THREADS, else OMP_NUM_THREADS, else all processors.

    Given torch tensors, flashcore works on torch's threads, and uses no more than torch.set_num_threads says.
    """
    return _core.num_threads()


def set_num_threads(threads: int) -> None:
    """Sets the threads of the calls on the CPU that start from now on. Results do not depend on it.

    Raises:
      ValueError: less than 1.
    """
    _core.set_num_threads(threads)


def empty_cache() -> None:
    """Gives every block that flashcore's pools keep for reuse back to the system."""
    _core.empty_cache()


_replaced: set[tuple[bool, int]] = set()


def set_workspace_resource(
    allocate: Optional[Callable[[int, int], int]],
    deallocate: Optional[Callable[[int, int, int], Any]] = None,
    *,
    device: Device = None,
) -> None:
    """Takes workspaces on `device` from two functions of yours; None restores flashcore's own pool.

    Args:
      allocate: (bytes, stream) -> the address of at least so many bytes, aligned to 256; 0, None or an exception
        makes the call that needs the workspace raise MemoryError.
      deallocate: (address, bytes, stream) -> None; may be called while work queued on the stream still uses it.
      device: default: the first GPU, or the CPU where there is none.
    """
    if (allocate is None) != (deallocate is None):
        raise ValueError("allocate and deallocate are needed together; both None restores the pool")
    for name, function in (("allocate", allocate), ("deallocate", deallocate)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r} given; a function is needed")
    where = parse_device(device)
    _core.set_workspace_resource(allocate, deallocate, *where)
    if allocate is not None:
        _replaced.add(where)


@atexit.register
def _restore_pools() -> None:
    """The functions must not be called any more once the interpreter is going down."""
    for where in _replaced:
        _core.set_workspace_resource(None, None, *where)
