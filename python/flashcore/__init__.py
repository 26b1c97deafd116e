"""flashcore: fused attention for CUDA and the CPU, on the arrays of any framework."""

from ._core import Array, CudaError, DeviceInfo, MemoryStats, Unsupported, version
from .attention import attention, attention_backward, attention_decode, attention_varlen, merge_states
from .device import (
    device_count,
    device_info,
    empty_cache,
    memory_stats,
    num_threads,
    set_num_threads,
    set_workspace_resource,
)
from .planning import Plan, Support, explain, plan, supports
from .primitives import reduce, vector_add
from .tuning import autotune, load_tuned

__version__ = version()
for _public in (Array, CudaError, DeviceInfo, MemoryStats, Unsupported):
    _public.__module__ = "flashcore"  # where users find them, and what messages call them

__all__ = [
    "Array",
    "CudaError",
    "DeviceInfo",
    "MemoryStats",
    "Plan",
    "Support",
    "Unsupported",
    "__version__",
    "attention",
    "attention_backward",
    "attention_decode",
    "attention_varlen",
    "autotune",
    "device_count",
    "device_info",
    "empty_cache",
    "explain",
    "load_tuned",
    "memory_stats",
    "merge_states",
    "num_threads",
    "plan",
    "reduce",
    "set_num_threads",
    "set_workspace_resource",
    "supports",
    "vector_add",
]
