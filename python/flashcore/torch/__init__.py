"""flashcore for torch: attention that torch can differentiate, compile, export, batch and capture.

`attention`, `attention_varlen`, `attention_decode` and `merge_states` are those of `flashcore`, with gradients.
`scaled_dot_product_attention` is torch's function; `install` puts it in its place. `MultiheadAttention` is a layer.
"""

try:
    import torch
except ImportError as error:
    raise ImportError("flashcore.torch needs PyTorch: pip install torch") from error

if not hasattr(torch.library, "register_vmap"):
    raise ImportError(f"flashcore.torch needs PyTorch 2.5 or newer, this is {torch.__version__}: pip install -U torch")

from .functional import attention, attention_decode, attention_varlen, merge_states
from .memory import workspaces_from_torch
from .modules import KVCache, MultiheadAttention
from .sdpa import install, installed, scaled_dot_product_attention, uninstall

__all__ = [
    "KVCache",
    "MultiheadAttention",
    "attention",
    "attention_decode",
    "attention_varlen",
    "install",
    "installed",
    "merge_states",
    "scaled_dot_product_attention",
    "uninstall",
    "workspaces_from_torch",
]
