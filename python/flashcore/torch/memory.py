"""Workspaces from torch's caching allocator, so that one pool serves the whole process."""

from __future__ import annotations

import torch

from ..device import Device, parse_device, set_workspace_resource


def workspaces_from_torch(device: Device = None, enabled: bool = True) -> None:
    """Takes flashcore's workspaces on a GPU from torch's caching allocator, or again from flashcore's own pool.

    Results come from torch's allocator in any case. With the workspaces there, too, torch.cuda.memory_allocated and
    set_per_process_memory_fraction count them, and a CUDA graph keeps them in its own pool.

    Args:
      device: "cuda", "cuda:1" or an index; default: the first GPU.
      enabled: False goes back to flashcore's pool.

    Raises: ValueError where there is no such GPU.
    """
    on_cuda, index = parse_device("cuda" if device is None else device)
    if not on_cuda:
        raise ValueError(f"device={device!r} given; torch's caching allocator is for CUDA devices")
    if not enabled:
        set_workspace_resource(None, device=index)
        return

    def allocate(size: int, stream: int) -> int:
        return int(torch.cuda.caching_allocator_alloc(size, index, stream))

    def deallocate(address: int, size: int, stream: int) -> None:
        torch.cuda.caching_allocator_delete(address)

    set_workspace_resource(allocate, deallocate, device=index)
