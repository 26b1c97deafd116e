"""flashcore.jax.attention: under jit, grad and vmap, judged by the same attention written in JAX."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import flashcore as fc  # noqa: E402
import flashcore.jax as fcj  # noqa: E402
import jax.numpy as jnp  # noqa: E402


def arrays(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def attend(q, k, v, causal=False, bias=None):
    """Attention in JAX's own operations."""
    score = jnp.einsum("bhid,bhjd->bhij", q, k, precision="highest") / q.shape[-1] ** 0.5
    score = score if bias is None else score + bias
    if causal:
        score = jnp.where(jnp.tri(*score.shape[-2:], dtype=bool), score, -jnp.inf)
    return jnp.einsum("bhij,bhjd->bhid", jax.nn.softmax(score, axis=-1), v, precision="highest")


def near(a, b, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance)


QKV = (2, 3, 9, 16), (2, 3, 9, 16), (2, 3, 9, 16)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_forward(causal, jit):
    call = lambda *x: fcj.attention(*x, causal=causal)  # noqa: E731
    out = (jax.jit(call) if jit else call)(*arrays(*QKV))
    assert isinstance(out, jax.Array)
    near(out, attend(*arrays(*QKV), causal=causal))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal, jit):
    def loss(call):
        return lambda *x: (call(*x, causal=causal) ** 2).sum()

    grad = jax.grad(loss(fcj.attention), argnums=(0, 1, 2))
    for mine, theirs in zip(
        (jax.jit(grad) if jit else grad)(*arrays(*QKV)),
        jax.grad(loss(attend), argnums=(0, 1, 2))(*arrays(*QKV)),
        strict=True,
    ):
        near(mine, theirs, 1e-4)


def test_gradient_of_a_broadcast_bias():
    q, k, v, bias = arrays(*QKV, (3, 1, 9))
    mine = jax.grad(lambda b: (fcj.attention(q, k, v, bias=b) ** 2).sum())(bias)
    theirs = jax.grad(lambda b: (attend(q, k, v, bias=b) ** 2).sum())(bias)
    assert mine.shape == bias.shape
    near(mine, theirs, 1e-4)


def test_gradient_through_lse_and_sinks():
    q, k, v, sinks = arrays(*QKV, (3,))

    def mine(q, sinks):
        out, lse = fcj.attention(q, k, v, sinks=sinks, return_lse=True)
        return (out**2).sum() + (lse**2).sum()

    def theirs(q, sinks):
        score = jnp.einsum("bhid,bhjd->bhij", q, k, precision="highest") / 4
        logits = jnp.concatenate([score, jnp.broadcast_to(sinks[None, :, None, None], (2, 3, 9, 1))], axis=-1)
        out = jnp.einsum("bhij,bhjd->bhid", jax.nn.softmax(logits, axis=-1)[..., :-1], v, precision="highest")
        return (out**2).sum() + (jax.nn.logsumexp(logits, axis=-1) ** 2).sum()

    for a, b in zip(jax.grad(mine, (0, 1))(q, sinks), jax.grad(theirs, (0, 1))(q, sinks), strict=True):
        near(a, b, 1e-4)


def test_vmap():
    q, k, v = arrays((4, 2, 3, 9, 16), (4, 2, 3, 9, 16), (4, 2, 3, 9, 16))
    out = jax.vmap(lambda *x: fcj.attention(*x, causal=True))(q, k, v)
    near(out, jnp.stack([attend(*x, causal=True) for x in zip(q, k, v, strict=True)]))


def test_mask_and_layout():
    q, k, v = arrays(*QKV)
    mask = jnp.arange(9) < 6
    turned = [x.swapaxes(1, 2) for x in (q, k, v)]
    out = jax.jit(lambda *x: fcj.attention(*x, mask=mask, layout="bshd"))(*turned)
    near(out.swapaxes(1, 2), attend(q, k[:, :, :6], v[:, :, :6]))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=str)
def test_halves_keep_their_dtype(dtype):
    q, k, v = arrays(*QKV, dtype=dtype)
    out, pull = jax.vjp(lambda *x: fcj.attention(*x), q, k, v)
    assert out.dtype == dtype
    assert [g.dtype for g in pull(jnp.ones_like(out))] == [dtype] * 3
    near(out, attend(*(x.astype(jnp.float32) for x in (q, k, v))), 2e-2)


def test_eager_raw_call_takes_jax_arrays():
    q, k, v = arrays(*QKV)
    out = fc.attention(q, k, v)
    assert isinstance(out, jax.Array)
    near(out, attend(q, k, v))


def test_errors_come_while_tracing():
    q, k, v = arrays(*QKV)
    with pytest.raises(ValueError, match=r"top_left.*bottom_right"):
        jax.jit(lambda q, k, v: fcj.attention(q, k, v, causal=True))(q[:, :, :4], k, v)
