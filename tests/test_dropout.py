"""Dropout: the mask is a pure function of seed, batch, head, query and key, the same everywhere."""

import flashcore as fc
import numpy as np
import pytest
import reference
from cases import rounded
from frameworks import KINDS

pytestmark = pytest.mark.usefixtures("best_and_reference")


def weights(xp, rng, seqlen=(21, 30), batch=2, heads=3, **words):
    """The dropped softmax weights themselves: with v the identity, out is the weight matrix."""
    q = xp.array(rng.standard_normal((batch, heads, seqlen[0], 8)), "float32")
    k = xp.array(rng.standard_normal((batch, heads, seqlen[1], 8)), "float32")
    v = xp.array(np.broadcast_to(np.eye(seqlen[1]), (batch, heads, seqlen[1], seqlen[1])), "float32")
    return xp.numpy(fc.attention(q, k, v, **words))


def factors(p, seed, seqlen=(21, 30), batch=2, heads=3):
    return np.stack([reference.dropout_factor(b, heads, *seqlen, p, seed) for b in range(batch)])


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_drops_exactly_what_philox_says(p, seed, xp, rng):
    dropped = weights(xp, rng, dropout_p=p, seed=seed) == 0
    np.testing.assert_array_equal(dropped, factors(p, seed) == 0)


def test_kept_weights_are_scaled(xp):
    kept = weights(xp, np.random.default_rng(1), dropout_p=0.25, seed=7)
    whole = weights(xp, np.random.default_rng(1))
    np.testing.assert_allclose(kept, whole * factors(0.25, 7), rtol=1e-5, atol=1e-8)


def test_probability_zero_is_no_dropout(xp):
    one, other = (weights(xp, np.random.default_rng(1), **w) for w in ({}, {"dropout_p": 0.0, "seed": 5}))
    np.testing.assert_array_equal(one, other)


def test_lse_does_not_see_dropout(xp, rng):
    q, k, v = (xp.array(x, "float32") for x in rng.standard_normal((3, 1, 2, 13, 8)))
    _, lse = fc.attention(q, k, v, return_lse=True)
    _, dropped = fc.attention(q, k, v, return_lse=True, dropout_p=0.5, seed=3)
    np.testing.assert_array_equal(xp.numpy(lse), xp.numpy(dropped))


def test_a_word_depends_on_its_place_only(xp):
    """A longer problem drops the same weights in the corner that both have."""
    small = weights(xp, np.random.default_rng(1), dropout_p=0.5, seed=11) == 0
    large = weights(xp, np.random.default_rng(1), seqlen=(33, 41), batch=3, heads=4, dropout_p=0.5, seed=11) == 0
    np.testing.assert_array_equal(small, large[:2, :3, :21, :30])


def test_layout_does_not_change_the_mask(xp, rng):
    q, k, v = rng.standard_normal((3, 2, 3, 17, 8))
    words = {"dropout_p": 0.5, "seed": 4}
    one = xp.numpy(fc.attention(*(xp.array(x, "float32") for x in (q, k, v)), **words))
    turned = [xp.array(np.swapaxes(x, 1, 2), "float32") for x in (q, k, v)]
    other = xp.numpy(fc.attention(*turned, layout="bshd", **words))
    np.testing.assert_array_equal(one, np.swapaxes(other, 1, 2))


def test_varlen_counts_within_each_sequence(xp, rng):
    """Sequence b of a packed call drops what batch entry b of a padded call drops."""
    q, k, v = (rounded(x, "float32") for x in rng.standard_normal((3, 12, 2, 8)))
    cuts = xp.array([0, 5, 12], "int32")
    words = {"dropout_p": 0.5, "seed": 21}
    packed = xp.numpy(fc.attention_varlen(*(xp.array(x, "float32") for x in (q, k, v)), cuts, cuts, **words))
    padded = [np.zeros((2, 2, 7, 8)) for _ in range(3)]
    for full, x in zip(padded, (q, k, v), strict=True):
        full[0, :, :5], full[1] = x[:5].swapaxes(0, 1), x[5:].swapaxes(0, 1)
    mask = np.ones((2, 1, 1, 7), bool)
    mask[0, ..., 5:] = False
    arrays = [xp.array(x, "float32") for x in padded]
    out = xp.numpy(fc.attention(*arrays, mask=xp.array(mask, "bool"), **words))
    np.testing.assert_allclose(packed[:5], out[0, :, :5].swapaxes(0, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(packed[5:], out[1].swapaxes(0, 1), rtol=1e-5, atol=1e-6)


def test_backward_drops_what_the_forward_dropped(xp):
    """dv of a one-hot dout is the row of dropped weights that the forward used."""
    rng = np.random.default_rng(1)
    used = weights(xp, rng, batch=1, heads=1, dropout_p=0.4, seed=77)[0, 0]
    rng = np.random.default_rng(1)
    q = xp.array(rng.standard_normal((1, 1, 21, 8)), "float32")
    k = xp.array(rng.standard_normal((1, 1, 30, 8)), "float32")
    v = xp.array(np.eye(30)[None, None], "float32")
    words = {"dropout_p": 0.4, "seed": 77}
    out, lse = fc.attention(q, k, v, return_lse=True, **words)
    for i in (0, 9, 20):
        dout = np.zeros((1, 1, 21, 30))
        dout[0, 0, i] = 1
        _, _, dv = fc.attention_backward(xp.array(dout, "float32"), q, k, v, out, lse, **words)
        np.testing.assert_allclose(xp.numpy(dv)[0, 0, :, 0], used[i], rtol=1e-5, atol=1e-7)


def test_cpu_and_gpu_drop_the_same(device, xp):
    if device == "cpu":
        pytest.skip("needs a GPU beside the CPU")
    words = {"dropout_p": 0.3, "seed": 2**50 + 1}
    on_gpu = weights(xp, np.random.default_rng(2), **words)
    on_cpu = weights(KINDS["numpy"](), np.random.default_rng(2), **words)
    np.testing.assert_array_equal(on_gpu == 0, on_cpu == 0)
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-4, atol=1e-7)
