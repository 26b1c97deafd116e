"""One cell of the CPU benchmark as calls to be timed: flashcore's, torch's, JAX's, NumPy's, on the same values."""

from __future__ import annotations

from typing import Any

import flashcore as fc
import torch
import torch.nn.functional as F
from cpu_cells import MASK_BLOCK, Cell
from rounds import Run

JAX_DTYPES = ("float32", "bfloat16")  # JAX multiplies no float16 on the CPU


def tensors(cell: Cell, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v, and the gradient of the output."""
    torch.manual_seed(1)
    queries = (cell.batch, cell.heads, cell.seqlen_q, cell.head_dim)
    keys = (cell.batch, cell.heads_k or cell.heads, cell.seqlen_k, cell.head_dim)
    return tuple(torch.randn(shape).to(dtype) for shape in (queries, keys, keys, queries))


def block_mask(cell: Cell) -> torch.Tensor:
    rows, columns = (torch.arange(n) // MASK_BLOCK for n in (cell.seqlen_q, cell.seqlen_k))
    return (rows[:, None] + columns) % 2 == 0


def our_words(cell: Cell) -> dict[str, Any]:
    """The cell in flashcore's words; only those that a call needs, as a caller would write it."""
    words: dict[str, Any] = {}
    if cell.causal:
        words["causal"] = True
    if cell.left is not None:
        words["window"] = (cell.left, 0)
    if cell.blocks:
        words["mask"] = block_mask(cell)
    return words


def torch_words(cell: Cell) -> dict[str, Any]:
    """The same in torch's; a window is a boolean mask there."""
    words: dict[str, Any] = {}
    if cell.left is not None:
        distance = torch.arange(cell.seqlen_q)[:, None] - torch.arange(cell.seqlen_k)
        words["attn_mask"] = (distance >= 0) & (distance <= cell.left)
    elif cell.causal:
        words["is_causal"] = True
    if cell.blocks:
        words["attn_mask"] = block_mask(cell)
    if cell.heads_k:
        words["enable_gqa"] = True
    return words


def our_run(cell: Cell, dtype: torch.dtype) -> Run:
    q, k, v, dout = tensors(cell, dtype)
    words = our_words(cell)
    if cell.work == "fwd":
        return lambda: fc.attention(q, k, v, **words)
    if cell.work == "bwd":
        out, lse = fc.attention(q, k, v, return_lse=True, **words)
        return lambda: fc.attention_backward(dout, q, k, v, out, lse, **words)
    import flashcore.torch

    leaves = [t.requires_grad_() for t in (q, k, v)]
    return lambda: torch.autograd.grad(flashcore.torch.attention(*leaves, **words), leaves, dout)


def torch_run(cell: Cell, dtype: torch.dtype) -> Run:
    q, k, v, dout = tensors(cell, dtype)
    words = torch_words(cell)
    if cell.work == "fwd":
        return lambda: F.scaled_dot_product_attention(q, k, v, **words)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    if cell.work == "bwd":
        out = F.scaled_dot_product_attention(*leaves, **words)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    return lambda: torch.autograd.grad(F.scaled_dot_product_attention(*leaves, **words), leaves, dout)


def jax_run(cell: Cell, dtype: torch.dtype) -> Run:
    import jax
    import jax.numpy as jnp

    q, k, v, _ = (jnp.asarray(t.float().transpose(1, 2).numpy(), str(dtype)[6:]) for t in tensors(cell, dtype))
    attention = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=cell.causal))
    return lambda: attention(q, k, v).block_until_ready()


def numpy_run(cell: Cell, dtype: torch.dtype) -> Run:
    import numpy as np

    q, k, v, _ = (t.numpy() for t in tensors(cell, dtype))
    hidden = ~np.tri(cell.seqlen_q, cell.seqlen_k, dtype=bool) if cell.causal else None
    scale = np.float32(cell.head_dim**-0.5)

    def run() -> Any:
        grouped = q.reshape(cell.batch, k.shape[1], -1, cell.head_dim)  # queries that share a key head lie together
        scores = (grouped * scale) @ k.swapaxes(2, 3)
        if hidden is not None:
            scores[..., hidden] = -np.inf
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        return (scores @ v).reshape(q.shape)

    return run


def peers_of(cell: Cell, dtype: str, wanted: list[str]) -> dict[str, Any]:
    """Of the wanted peers, those that stand beside this cell: forward only, where they know the dtype."""
    if cell.work != "fwd" or cell.left is not None or cell.blocks:
        return {}
    known = {"jax": (jax_run, JAX_DTYPES), "numpy": (numpy_run, ("float32",))}
    return {name: known[name][0] for name in wanted if dtype in known[name][1]}


def in_torch_order(name: str, result: Any) -> list[torch.Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    if name == "jax":
        import numpy as np

        return [torch.from_numpy(np.array(r, np.float32)).transpose(1, 2) for r in results]
    return [torch.as_tensor(r).float() for r in results]


def contenders(cell: Cell, dtype_name: str, peers: list[str]) -> dict[str, Run]:
    """Calls by name, flashcore's first. All have run and agree: a wrong result is not worth timing."""
    dtype = getattr(torch, dtype_name)
    makers = {"flashcore": our_run, "torch": torch_run, **peers_of(cell, dtype_name, peers)}
    runs = {name: make(cell, dtype) for name, make in makers.items()}
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    ours = in_torch_order("flashcore", runs["flashcore"]())
    for name, run in runs.items():
        if name != "flashcore":
            for mine, other in zip(ours, in_torch_order(name, run()), strict=True):
                torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)
    return runs
