"""Rows that see nothing and tensors of size zero: out = 0, lse = -inf, gradients 0, never NaN, never a failure."""

import flashcore as fc
import numpy as np
import pytest
from cases import ALL_FLOATS

pytestmark = pytest.mark.usefixtures("best_and_reference")


def qkv(xp, batch=2, heads=2, seqlen=(5, 7), dim=8, dtype="float32"):
    rng = np.random.default_rng(0)
    q = xp.array(rng.standard_normal((batch, heads, seqlen[0], dim)), dtype)
    k, v = (xp.array(rng.standard_normal((batch, heads, seqlen[1], dim)), dtype) for _ in range(2))
    return q, k, v


def assert_empty(xp, out, lse):
    np.testing.assert_array_equal(xp.numpy(out), np.zeros(tuple(out.shape)))
    np.testing.assert_array_equal(xp.numpy(lse), np.full(tuple(lse.shape), -np.inf))


EMPTY = {
    "mask": {"mask": np.zeros((5, 7), bool)},
    "mask_and_sinks": {"mask": np.zeros((5, 7), bool), "sinks": np.ones(2, np.float32)},
    "mask_and_bias": {"mask": np.zeros((5, 7), bool), "bias": np.ones((5, 7), np.float32)},
    "mask_and_dropout": {"mask": np.zeros((5, 7), bool), "dropout_p": 0.5},
    "bias_of_minus_infinity": {"bias": np.full((5, 7), -np.inf, np.float32)},
    "mask_and_softcap": {"mask": np.zeros((5, 7), bool), "softcap": 2.0},
}


def keywords(xp, words):
    kinds = {"mask": "bool"}
    return {n: xp.array(x, kinds.get(n, "float32")) if isinstance(x, np.ndarray) else x for n, x in words.items()}


@pytest.mark.parametrize("words", EMPTY.values(), ids=EMPTY)
def test_masked_rows_are_empty(words, xp):
    assert_empty(xp, *fc.attention(*qkv(xp), return_lse=True, **keywords(xp, words)))


@pytest.mark.parametrize("dtype", ALL_FLOATS)
def test_causal_bottom_right_leaves_the_first_queries_empty(dtype, xp):
    q, k, v = qkv(xp, seqlen=(9, 4), dtype=dtype)
    out, lse = (xp.numpy(x) for x in fc.attention(q, k, v, causal="bottom_right", return_lse=True))
    np.testing.assert_array_equal(out[:, :, :5], 0)
    assert np.isneginf(lse[:, :, :5]).all()
    assert np.isfinite(lse[:, :, 5:]).all()


def test_a_window_beside_the_keys_is_empty(xp):
    """top-left window (0, 0) with more queries than keys: query 7 looks at key 7, which does not exist."""
    q, k, v = qkv(xp, seqlen=(9, 4))
    out, lse = (xp.numpy(x) for x in fc.attention(q, k, v, causal="top_left", window=(0, 0), return_lse=True))
    np.testing.assert_array_equal(out[:, :, 4:], 0)
    assert np.isneginf(lse[:, :, 4:]).all()


@pytest.mark.parametrize("words", EMPTY.values(), ids=EMPTY)
def test_gradients_of_empty_rows_are_zero(words, xp):
    q, k, v = qkv(xp)
    given = keywords(xp, words)
    out, lse = fc.attention(q, k, v, return_lse=True, **given)
    dlse = xp.array(np.ones((2, 2, 5)), "float32")
    for grad in fc.attention_backward(
        xp.array(np.ones((2, 2, 5, 8)), "float32"), q, k, v, out, lse, dlse=dlse, **given
    ):
        np.testing.assert_array_equal(xp.numpy(grad), np.zeros(tuple(grad.shape)))


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("batch", "seqlen"), [(0, (5, 7)), (2, (0, 7)), (2, (0, 0)), (2, (5, 0)), (0, (0, 0))], ids=str
)
@pytest.mark.parametrize("words", [{}, {"causal": "bottom_right"}, {"window": (2, 1)}, {"dropout_p": 0.5}], ids=str)
def test_zero_sizes(batch, seqlen, words, xp):
    q, k, v = qkv(xp, batch, seqlen=seqlen)
    out, lse = fc.attention(q, k, v, return_lse=True, **words)
    assert tuple(out.shape) == (batch, 2, seqlen[0], 8)
    assert tuple(lse.shape) == (batch, 2, seqlen[0])
    assert_empty(xp, out, lse)
    grads = fc.attention_backward(xp.array(np.ones((batch, 2, seqlen[0], 8)), "float32"), q, k, v, out, lse, **words)
    for grad, x in zip(grads, (q, k, v), strict=True):
        np.testing.assert_array_equal(xp.numpy(grad), np.zeros(tuple(x.shape)))


def test_a_mask_of_no_batch(xp):
    """What tasks would tell each other of the mask has no room in the workspace, as nobody will ask."""
    q, k, v = qkv(xp, batch=0, seqlen=(30, 20))
    mask = xp.array(np.ones((30, 20)), "bool")
    out, lse = fc.attention(q, k, v, mask=mask, return_lse=True)
    assert tuple(out.shape) == (0, 2, 30, 8)
    dq, dk, _ = fc.attention_backward(out, q, k, v, out, lse, mask=mask)
    assert (tuple(dq.shape), tuple(dk.shape)) == ((0, 2, 30, 8), (0, 2, 20, 8))


def test_zero_sizes_fill_a_given_out(xp):
    """No key at all: `out` is still written."""
    q, k, v = qkv(xp, seqlen=(5, 0))
    out = xp.empty((2, 2, 5, 8))
    fc.attention(q, k, v, out=out)
    np.testing.assert_array_equal(xp.numpy(out), 0)


def test_every_framework_takes_zero_sizes(framework):
    for shape in ((0, 2, 3, 8), (1, 2, 0, 8)):
        x = framework.array(np.zeros(shape), "float32")
        out = fc.attention(x, x, x)
        assert framework.owns(out)
        assert tuple(out.shape) == shape


def test_varlen_without_sequences(xp):
    x = xp.array(np.zeros((0, 2, 8)), "float32")
    offsets = xp.array([0], "int32")
    out, lse = fc.attention_varlen(x, x, x, offsets, offsets, return_lse=True)
    assert tuple(out.shape) == (0, 2, 8)
    assert tuple(lse.shape) == (2, 0)


def test_decode_on_an_empty_cache(xp):
    q, k, v = qkv(xp, seqlen=(1, 7))
    lengths = xp.array([0, 0], "int32")
    assert_empty(xp, *fc.attention_decode(q, k, v, lengths, return_lse=True))


def test_decode_of_no_batch_and_no_capacity(xp):
    for batch, capacity in ((0, 7), (2, 0)):
        q, k, v = qkv(xp, batch, seqlen=(1, capacity))
        lengths = xp.array(np.zeros(batch), "int32")
        assert_empty(xp, *fc.attention_decode(q, k, v, lengths, return_lse=True))


def test_merge_of_two_empty_states_is_empty(xp):
    out, lse = xp.array(np.zeros((1, 2, 3, 8)), "float32"), xp.array(np.full((1, 2, 3), -np.inf), "float32")
    assert_empty(xp, *fc.merge_states(out, lse, out, lse))


def test_merge_with_an_empty_state_changes_nothing(xp):
    q, k, v = qkv(xp)
    out, lse = fc.attention(q, k, v, return_lse=True)
    none, minus = xp.array(np.zeros((2, 2, 5, 8)), "float32"), xp.array(np.full((2, 2, 5), -np.inf), "float32")
    for pair in ((out, lse, none, minus), (none, minus, out, lse)):
        merged, merged_lse = fc.merge_states(*pair)
        np.testing.assert_array_equal(xp.numpy(merged), xp.numpy(out))
        np.testing.assert_array_equal(xp.numpy(merged_lse), xp.numpy(lse))


def test_a_paged_cache_of_no_batch(xp):
    q, k, v = (xp.array(np.zeros((n, 2, s, 8)), "float32") for n, s in ((0, 1), (5, 4), (5, 4)))
    table, lengths = xp.array(np.zeros((0, 3)), "int32"), xp.array(np.zeros(0), "int32")
    assert_empty(xp, *fc.attention_decode(q, k, v, lengths, table, return_lse=True))


def test_a_cache_of_no_pages(xp):
    """No sequence holds a key, so no page is needed."""
    q, k, v = (xp.array(np.zeros((n, 2, s, 8)), "float32") for n, s in ((2, 1), (0, 4), (0, 4)))
    table, lengths = xp.array(np.zeros((2, 3)), "int32"), xp.array(np.zeros(2), "int32")
    assert_empty(xp, *fc.attention_decode(q, k, v, lengths, table, return_lse=True))


def test_appending_nothing(xp):
    q, k, v = qkv(xp, seqlen=(1, 7))
    none = xp.array(np.zeros((2, 2, 0, 8)), "float32")
    lengths = xp.array([3, 7], "int32")
    plain = fc.attention_decode(q, k, v, lengths)
    appended = fc.attention_decode(q, k, v, lengths, k_new=none, v_new=none)
    np.testing.assert_array_equal(xp.numpy(appended), xp.numpy(plain))
