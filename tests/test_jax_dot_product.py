"""flashcore.jax.dot_product_attention: values and gradients of jax.nn.dot_product_attention, argument for argument."""

import inspect

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import flashcore.jax as fcj  # noqa: E402
import jax.numpy as jnp  # noqa: E402

B, H = 2, 8
#: name: (T, S, N, K)
SIZES = {"square": (11, 11, 4, 2), "more_keys": (7, 13, 4, 1), "more_queries": (13, 7, 2, 2)}
WINDOWS = (None, 3, (2, 0), (-1, 4))


@pytest.fixture(autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


def qkv(rng, size, dtype=jnp.float32):
    rows, columns, heads, heads_k = SIZES[size]
    shapes = (B, rows, heads, H), (B, columns, heads_k, H), (B, columns, heads_k, H)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def sees_something(size, is_causal=False, window=None, lengths=None, mask=None):
    """Which queries see a key: for the others jax.nn gives a mean of all values, flashcore 0. (B, T)"""
    rows, columns = SIZES[size][:2]
    i, j = np.ogrid[:rows, :columns]
    left, right = (columns + rows,) * 2 if window is None else (window, window) if isinstance(window, int) else window
    seen = (j >= i - left) & (j <= i + right) & ((j <= i) | (not is_causal))
    seen = np.broadcast_to(seen, (B, rows, columns)).copy()
    for b in range(B if lengths is not None else 0):
        seen[b, :, int(lengths[b]) :] = False
    if mask is not None:
        seen &= np.asarray(mask).all(axis=1)
    return jnp.asarray(seen.any(axis=2))


def check(arrays, alive, tolerance=2e-5, **words):
    """Values and gradients, of what both define: rows that see something."""
    trained = {name: words.pop(name) for name in ("bias",) if name in words}
    alive = alive[:, :, None, None]

    def run(attend, *arrays):
        call = lambda q, k, v, more: jnp.where(alive, attend(q, k, v, **more, **words), 0)  # noqa: E731
        out, pull = jax.vjp(call, *arrays, trained)
        return out, *pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))

    mine = jax.jit(run, static_argnums=0)(fcj.dot_product_attention, *arrays)
    wide = [x.astype(jnp.float32) for x in arrays]  # jax.nn knows no float16 on the CPU
    theirs = jax.jit(run, static_argnums=0)(jax.nn.dot_product_attention, *wide)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    assert [x.dtype for x in mine[:4]] == [arrays[0].dtype] * 4
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_causal_and_window(size, is_causal, window, rng):
    if jax.__version_info__ < (0, 10) and window is not None and not is_causal:
        pytest.skip("jax.nn of this version does not heed a window that comes alone")
    alive = sees_something(size, is_causal, window)
    check(qkv(rng, size), alive, is_causal=is_causal, local_window_size=window, scale=0.3)


@pytest.mark.parametrize("size", ["square", "more_keys"])
@pytest.mark.parametrize("window", [None, (3, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(size, is_causal, window, rng):
    rows, columns = SIZES[size][:2]
    q_lengths, k_lengths = jnp.array([rows, 3], jnp.int32), jnp.array([4, columns], jnp.int32)
    alive = sees_something(size, is_causal, window, k_lengths)
    words = {"is_causal": is_causal, "local_window_size": window, "key_value_seq_lengths": k_lengths}
    check(qkv(rng, size), alive, query_seq_lengths=q_lengths, **words)


@pytest.mark.parametrize("shape", [(B, 4, 11, 11), (1, 4, 11, 11), (B, 1, 1, 11), (11, 11)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_bias_of_any_shape_and_dtype(shape, dtype, rng):
    bias = jnp.asarray(rng.standard_normal(shape), dtype)
    check(qkv(rng, "square"), sees_something("square"), 1e-2 if dtype == jnp.bfloat16 else 2e-5, bias=bias)


@pytest.mark.parametrize("window", [None, (-1, 4)], ids=["plain", "window_as_mask"])
def test_mask(window, rng):
    mask = jnp.asarray(rng.random((B, 1, 11, 11)) < 0.7)
    check(qkv(rng, "square"), sees_something("square", window=window, mask=mask), mask=mask, local_window_size=window)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_halves(dtype, rng):
    check(qkv(rng, "square", dtype), sees_something("square"), 2e-2, is_causal=True)


def test_without_a_batch(rng):
    q, k, v = (x[0] for x in qkv(rng, "square"))
    mine, theirs = (
        jax.jit(lambda *x, attend=attend: attend(*x, is_causal=True))(q, k, v)
        for attend in (fcj.dot_product_attention, jax.nn.dot_product_attention)
    )
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_residual(rng):
    arguments = inspect.signature(jax.nn.dot_product_attention).parameters
    if "return_residual" not in arguments:
        pytest.skip("this JAX does not return it")
    for arrays in (qkv(rng, "square"), [x[0] for x in qkv(rng, "square")]):
        mine, theirs = (
            jax.jit(lambda *x, attend=attend: attend(*x, is_causal=True, return_residual=True))(*arrays)
            for attend in (fcj.dot_product_attention, jax.nn.dot_product_attention)
        )
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_signature_is_that_of_jax():
    theirs, mine = (
        inspect.signature(f).parameters.values() for f in (jax.nn.dot_product_attention, fcj.dot_product_attention)
    )
    known = {(p.name, p.kind, p.default) for p in mine}
    assert {(p.name, p.kind, p.default) for p in theirs} <= known


@pytest.mark.parametrize(
    "words,error,match",
    [
        ({"implementation": "cudnn"}, ValueError, r"implementation='cudnn' given.*jax\.nn"),
        ({"mask": jnp.zeros((11, 11))}, TypeError, r"mask must be boolean.*bias"),
        ({"query_seq_lengths": jnp.zeros((3,), jnp.int32)}, ValueError, r"query_seq_lengths has shape \(3,\).*\(2,\)"),
        ({"key_value_seq_lengths": jnp.zeros((2,))}, ValueError, r"key_value_seq_lengths.*float32.*int32"),
        ({"bias": jnp.zeros((3, 11, 11))}, ValueError, r"bias must be broadcastable"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_arguments(words, error, match, rng):
    with pytest.raises(error, match=match):
        jax.jit(lambda *x: fcj.dot_product_attention(*x, **words))(*qkv(rng, "square"))


def test_ranks_that_differ(rng):
    q, k, v = qkv(rng, "square")
    with pytest.raises(ValueError, match=r"key has shape .*all \(B, length, heads, H\)"):
        fcj.dot_product_attention(q, k[0], v)
