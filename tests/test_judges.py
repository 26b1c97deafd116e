"""Independent judges: torch's own scaled_dot_product_attention, and JAX's."""

import flashcore as fc
import numpy as np
import pytest
from cases import assert_near


@pytest.fixture
def torch(place):
    return pytest.importorskip("torch")


def tensors(torch, device, dtype, heads=(4, 4), seqlen=(33, 33), dim=48):
    generator = torch.Generator().manual_seed(sum(seqlen) + dim)
    shapes = (2, heads[0], seqlen[0], dim), (2, heads[1], seqlen[1], dim), (2, heads[1], seqlen[1], dim)
    return [torch.randn(s, generator=generator).to(device, getattr(torch, dtype)) for s in shapes]


def judge(torch, mine, qkv, **words):
    """Error against float64 at most twice torch's own error in the same dtype, plus the epsilon of `cases`."""
    attend = torch.nn.functional.scaled_dot_product_attention
    wide = {n: w.double() if torch.is_tensor(w) and w.dtype != torch.bool else w for n, w in words.items()}
    exact = attend(*(x.double() for x in qkv), **wide)
    theirs = attend(*qkv, **words)
    assert mine.dtype == theirs.dtype
    terms = qkv[0].shape[3] + qkv[1].shape[2]
    mine, exact, other = (x.double().cpu().numpy() for x in (mine, exact, theirs))
    assert_near(mine, exact, other, str(theirs.dtype).removeprefix("torch."), terms)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
def test_torch(causal, dtype, torch, device):
    qkv = tensors(torch, device, dtype)
    judge(torch, fc.attention(*qkv, causal=causal), qkv, is_causal=causal)


@pytest.mark.parametrize("seqlen", [(7, 40), (40, 7)])
def test_torch_causal_is_top_left(seqlen, torch, device):
    qkv = tensors(torch, device, "float32", seqlen=seqlen)
    judge(torch, fc.attention(*qkv, causal="top_left"), qkv, is_causal=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("heads", [(4, 2), (6, 1)])
def test_torch_grouped_heads(heads, dtype, torch, device):
    qkv = tensors(torch, device, dtype, heads=heads)
    judge(torch, fc.attention(*qkv), qkv, enable_gqa=True)


def test_torch_mask(torch, device):
    qkv = tensors(torch, device, "float32")
    mask = torch.rand(2, 1, 33, 33, generator=torch.Generator().manual_seed(0)).to(device) < 0.6
    mask[..., 3] = True
    judge(torch, fc.attention(*qkv, mask=mask), qkv, attn_mask=mask)


def test_torch_bias_and_scale(torch, device):
    qkv = tensors(torch, device, "float32")
    bias = torch.randn(4, 33, 33, generator=torch.Generator().manual_seed(0)).to(device)
    judge(torch, fc.attention(*qkv, bias=bias, scale=0.2), qkv, attn_mask=bias.expand(2, -1, -1, -1), scale=0.2)


def test_torch_gradients(torch, device):
    attend = torch.nn.functional.scaled_dot_product_attention
    qkv = tensors(torch, device, "float64")
    leaves = [x.clone().requires_grad_() for x in qkv]
    dout = torch.randn(2, 4, 33, 48, generator=torch.Generator().manual_seed(0)).to(device, torch.float64)
    attend(*leaves, is_causal=True).backward(dout)
    out, lse = fc.attention(*qkv, causal=True, return_lse=True)
    for mine, leaf in zip(fc.attention_backward(dout, *qkv, out, lse, causal=True), leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("words", [{}, {"is_causal": True}, {"local_window_size": (5, 2)}], ids=str)
def test_jax(words):
    jax = pytest.importorskip("jax")
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (2, 33, 4, 48)) for key in keys)
    with jax.default_matmul_precision("highest"):  # JAX's own choice on a GPU is TF32
        theirs = jax.nn.dot_product_attention(q, k, v, **words)
    mine = {"causal": words.get("is_causal", False), "window": words.get("local_window_size")}
    np.testing.assert_allclose(fc.attention(q, k, v, layout="bshd", **mine), theirs, rtol=1e-4, atol=1e-5)
