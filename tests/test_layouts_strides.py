"""Strides are read, not copied: views, broadcasts, reversed and packed inputs, and results written where asked."""

import tracemalloc

import flashcore as fc
import numpy as np
import pytest
from frameworks import KINDS

pytestmark = pytest.mark.usefixtures("best_and_reference")


def arrays(xp, rng, shape=(2, 3, 11, 16), dtype="float32"):
    return [xp.array(rng.standard_normal(shape), dtype) for _ in range(3)]


def same(xp, a, b):
    np.testing.assert_array_equal(xp.numpy(a), xp.numpy(b))


def swap(x):
    return x.swapaxes(1, 2)


def test_a_transposed_view_is_the_other_layout(xp, rng):
    q, k, v = arrays(xp, rng)
    out, lse = fc.attention(q, k, v, return_lse=True)
    turned, turned_lse = fc.attention(swap(q), swap(k), swap(v), layout="bshd", return_lse=True)
    assert tuple(turned.shape) == (2, 11, 3, 16)
    same(xp, swap(turned), out)
    same(xp, turned_lse, lse)


@pytest.mark.parametrize(
    "cut", [np.s_[:, :, 1::2], np.s_[:, ::2], np.s_[1:], np.s_[..., 3:11], np.s_[:, 1:2, 4:5]], ids=str
)
def test_slices(cut, framework, rng):
    whole = arrays(framework, rng)
    views = [x[cut] for x in whole]
    dense = [framework.array(framework.numpy(x)[cut], "float32") for x in whole]
    same(framework, fc.attention(*views), fc.attention(*dense))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_reversed_views(axis, rng):
    """Negative strides: NumPy has them."""
    q, k, v = arrays(KINDS["numpy"](), rng)
    views = [np.flip(x, axis) for x in (q, k, v)]
    assert all(x.strides[axis] < 0 for x in views)
    np.testing.assert_array_equal(fc.attention(*views), fc.attention(*(x.copy() for x in views)))


@pytest.mark.parametrize("shape", [(1, 3, 11, 16), (2, 1, 11, 16), (2, 3, 1, 16)], ids=str)
def test_broadcast_views(shape, xp, rng):
    """Stride 0: one key head, one batch entry or one key for all."""
    q = xp.array(rng.standard_normal((2, 3, 11, 16)), "float32")
    small = rng.standard_normal((2, *shape))
    module = xp.torch if xp.name == "torch" else np
    k, v = (module.broadcast_to(xp.array(x, "float32"), (2, 3, 11, 16)) for x in small)
    dense = [xp.array(np.broadcast_to(x, (2, 3, 11, 16)), "float32") for x in small]
    same(xp, fc.attention(q, k, v), fc.attention(q, *dense))


def test_rows_that_start_off_any_boundary(xp, rng):
    """Views that begin at an odd element: no 4-, 8- or 16-byte load may be assumed."""
    wide = arrays(xp, rng, (2, 3, 11, 17), "float16")
    views = [x[..., 1:] for x in wide]
    dense = [xp.array(xp.numpy(x), "float16") for x in views]
    np.testing.assert_allclose(xp.numpy(fc.attention(*views)), xp.numpy(fc.attention(*dense)), rtol=2e-3, atol=2e-4)


def test_strides_of_dimensions_of_size_one_do_not_matter(rng):
    x = rng.standard_normal((1, 1, 4, 1)).astype(np.float32)
    odd = np.lib.stride_tricks.as_strided(x, x.shape, (12345 * 4, 7 * 4, 4, 99 * 4))
    np.testing.assert_array_equal(fc.attention(odd, odd, odd), fc.attention(x, x, x))


def test_the_last_dimension_must_be_contiguous(xp, rng):
    q, k, v = arrays(xp, rng, (2, 3, 11, 32))
    dense = q[..., :16], k[..., :16], v[..., :16]
    for place, name in enumerate("qkv"):
        given = list(dense)
        given[place] = (q, k, v)[place][..., ::2]
        with pytest.raises(ValueError, match=rf"{name}\b.*contiguous"):
            fc.attention(*given)


def test_masks_and_biases_keep_their_strides(xp, rng):
    q, k, v = arrays(xp, rng)
    bias, mask = rng.standard_normal((11, 11, 3, 2)), rng.random((11, 11)) < 0.7
    turned = xp.array(bias, "float32"), xp.array(mask, "bool")
    views = {"bias": turned[0].T if xp.name != "torch" else turned[0].permute(3, 2, 1, 0), "mask": turned[1].T}
    dense = {"bias": xp.array(np.ascontiguousarray(bias.T), "float32"), "mask": xp.array(mask.T.copy(), "bool")}
    same(xp, fc.attention(q, k, v, **views), fc.attention(q, k, v, **dense))


# ---- packed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "axis", "shape"), [("bhsd", 1, (2, 3, 4, 7, 16)), ("bshd", 2, (2, 7, 3, 4, 16))])
def test_packed_qkv(layout, axis, shape, framework, rng):
    values = rng.standard_normal(shape)
    packed = framework.array(values, "float32")
    parts = [framework.array(np.take(values, i, axis), "float32") for i in range(3)]
    same(framework, fc.attention(packed, layout=layout, causal=True), fc.attention(*parts, layout=layout, causal=True))


def test_packed_qkv_can_be_asked_about(xp):
    packed = xp.array(np.zeros((2, 3, 4, 7, 16)), "float32")
    assert fc.supports(packed).ok
    assert "b2 q7 k7 h4 d16" in fc.explain(packed)
    np.testing.assert_array_equal(xp.numpy(fc.plan(packed)(packed)), 0)


@pytest.mark.parametrize("shape", [(2, 4, 7, 16), (2, 2, 4, 7, 16), (2, 4, 3, 7, 16, 1)], ids=str)
def test_what_is_not_packed_is_refused(shape, xp):
    with pytest.raises(ValueError, match=r"3"):
        fc.attention(xp.array(np.zeros(shape), "float32"))


# ---- results where asked ---------------------------------------------------------------------------------------------


def test_out_is_written_and_returned(xp, rng):
    q, k, v = arrays(xp, rng)
    out = xp.empty((2, 3, 11, 16))
    assert fc.attention(q, k, v, out=out) is out
    same(xp, out, fc.attention(q, k, v))


def test_lse_is_written_and_returned(xp, rng):
    q, k, v = arrays(xp, rng)
    out, lse = xp.empty((2, 3, 11, 16)), xp.empty((2, 3, 11))
    result = fc.attention(q, k, v, out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    same(xp, lse, fc.attention(q, k, v, return_lse=True)[1])


def test_out_may_be_strided_and_the_gaps_stay(xp, rng):
    q, k, v = arrays(xp, rng)
    wide = xp.empty((2, 11, 6, 24))
    out = swap(wide[:, :, ::2, :16])
    fc.attention(q, k, v, out=out)
    same(xp, out, fc.attention(q, k, v))
    values = xp.numpy(wide).copy()
    values[:, :, ::2, :16] = -7
    np.testing.assert_array_equal(values, -7)


def test_gradients_may_be_given(xp, rng):
    q, k, v = arrays(xp, rng)
    dout = xp.array(rng.standard_normal((2, 3, 11, 16)), "float32")
    out, lse = fc.attention(q, k, v, return_lse=True)
    packed = xp.empty((2, 3, 3, 11, 16))
    given = {"dq": packed[:, 0], "dk": packed[:, 1], "dv": packed[:, 2]}
    written = fc.attention_backward(dout, q, k, v, out, lse, **given)
    for mine, expected in zip(written, fc.attention_backward(dout, q, k, v, out, lse), strict=True):
        same(xp, mine, expected)
    same(xp, packed[:, 1], written[1])


def test_strided_gradient_inputs(xp, rng):
    """The backward pass of the other layout: every tensor a transposed view."""
    q, k, v = arrays(xp, rng)
    dout = xp.array(rng.standard_normal((2, 3, 11, 16)), "float32")
    out, lse = fc.attention(q, k, v, return_lse=True)
    grads = fc.attention_backward(dout, q, k, v, out, lse)
    turned = fc.attention_backward(*map(swap, (dout, q, k, v, out)), lse, layout="bshd")
    for a, b in zip(grads, turned, strict=True):
        same(xp, a, swap(b))


def test_read_only_inputs(rng):
    q, k, v = arrays(KINDS["numpy"](), rng)
    expected = fc.attention(q, k, v)
    for x in (q, k, v):
        x.flags.writeable = False
    np.testing.assert_array_equal(fc.attention(q, k, v), expected)


def test_read_only_out_is_refused(rng):
    q, k, v = arrays(KINDS["numpy"](), rng)
    out = np.full(q.shape, -7, np.float32)
    out.flags.writeable = False
    with pytest.raises((ValueError, TypeError), match=r"out.*read-only|read-only.*out"):
        fc.attention(q, k, v, out=out)
    np.testing.assert_array_equal(out, -7)


def test_nothing_is_copied(rng):
    """A call on large strided inputs with `out` allocates next to nothing, in NumPy or in the workspace."""
    base = [np.asarray(rng.standard_normal((1, 40, 64, 64)), np.float32) for _ in range(3)]
    q, k, v = (swap(x) for x in base)  # layout bhsd: (1, 64, 40, 64)
    out = np.empty((1, 64, 40, 64), np.float32)
    fc.attention(q, k, v, out=out)
    tracemalloc.start()
    try:
        fc.attention(q, k, v, out=out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < base[0].nbytes / 10
    assert fc.plan(q, k, v, out=out).workspace_bytes < base[0].nbytes
