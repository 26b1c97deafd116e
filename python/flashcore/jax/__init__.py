"""flashcore for JAX, under jit, grad, vmap and shard_map, on the CPU and on CUDA devices.

Each call is one custom call in the compiled program (`jax.ffi`): it reads and writes XLA's own buffers, on the stream
that XLA gives, with a workspace from XLA's allocator. Nothing passes through Python while the program runs.
"""

from __future__ import annotations

#: the first whose FFI tells a function which device it is called for (API 0.2)
OLDEST = (0, 8, 1)
_needed = "jax>=" + ".".join(map(str, OLDEST))

try:
    import jax
except ImportError as error:
    raise ImportError(f"flashcore.jax needs JAX: pip install '{_needed}' (pip install jax gives the newest)") from error

if jax.__version_info__ < OLDEST:
    raise ImportError(f"flashcore.jax needs {_needed}, JAX {jax.__version__} is installed: pip install -U '{_needed}'")

from .decode import attention_decode  # noqa: E402
from .differentiable import attention, attention_varlen  # noqa: E402
from .dot_product import dot_product_attention  # noqa: E402

__all__ = ["attention", "attention_decode", "attention_varlen", "dot_product_attention"]
