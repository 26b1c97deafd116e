"""One cell of the CPU benchmark as calls to be timed: flashcore's, torch's, JAX's, NumPy's, on the same values."""

from __future__ import annotations

from typing import Any

import torch
from cpu_cells import Cell
from flashcore.bench.calls import Call, keywords, ours
from flashcore.bench.cases import MASK_BLOCK
from flashcore.bench.peers import jax_arrays, jax_call, sdpa, sdpa_words

JAX_DTYPES = ("float32", "bfloat16")  # JAX multiplies no float16 on the CPU


def tensors(cell: Cell, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """q, k, v, the gradient of the output, and a mask, as far as the cell has them."""
    torch.manual_seed(1)
    queries = (cell.batch, cell.heads, cell.seqlen_q, cell.head_dim)
    keys = (cell.batch, cell.heads_k or cell.heads, cell.seqlen_k, cell.head_dim)
    made = {name: torch.randn(shape).to(dtype) for name, shape in (("q", queries), ("k", keys), ("v", keys))}
    if cell.work != "fwd":
        made["dout"] = torch.randn(queries).to(dtype)
    if cell.blocks:
        rows, columns = (torch.arange(n) // MASK_BLOCK for n in (cell.seqlen_q, cell.seqlen_k))
        made["mask"] = (rows[:, None] + columns) % 2 == 0
    return made


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def our_run(cell: Cell, dtype: torch.dtype) -> Call:
    made, case = tensors(cell, dtype), cell.case(name_of(dtype))
    if cell.work != "fwd+bwd":
        return ours(case, made)
    import flashcore.torch

    leaves, dout = [made[name].requires_grad_() for name in "qkv"], made["dout"]
    words = keywords(case) | {name: made[name] for name in made if name == "mask"}
    return lambda: torch.autograd.grad(flashcore.torch.attention(*leaves, **words), leaves, dout)


def torch_run(cell: Cell, dtype: torch.dtype) -> Call:
    made, case = tensors(cell, dtype), cell.case(name_of(dtype))
    if cell.work != "fwd+bwd":
        return sdpa(case, made, torch)
    from torch.nn.functional import scaled_dot_product_attention

    leaves, dout = [made[name].requires_grad_() for name in "qkv"], made["dout"]
    words = sdpa_words(case, made, torch)
    return lambda: torch.autograd.grad(scaled_dot_product_attention(*leaves, **words), leaves, dout)


def jax_run(cell: Cell, dtype: torch.dtype) -> Call:
    attention = jax_call(cell.case(name_of(dtype)), *jax_arrays(tensors(cell, dtype), *"qkv"))
    return lambda: attention().block_until_ready()


def numpy_run(cell: Cell, dtype: torch.dtype) -> Call:
    import numpy as np

    q, k, v = (tensor.numpy() for tensor in tensors(cell, dtype).values())
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


def contenders(cell: Cell, dtype_name: str, peers: list[str]) -> dict[str, Call]:
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
