"""NaN and Inf in keys that are excluded never reach a result; in keys that are seen they do, and only there."""

import flashcore as fc
import numpy as np
import pytest
import reference
from cases import assert_near, rounded
from reference import Options

pytestmark = pytest.mark.usefixtures("best_and_reference")

POISON = {"nan": np.nan, "inf": np.inf, "minus_inf": -np.inf}


def problem(rng, seqlen=(11, 17)):
    q = rounded(rng.standard_normal((2, 2, seqlen[0], 8)), "float32")
    k, v = (rounded(rng.standard_normal((2, 2, seqlen[1], 8)), "float32") for _ in range(2))
    return q, k, v


def arrays(xp, *tensors, dtype="float32"):
    return [xp.array(x, dtype) for x in tensors]


def poisoned(x, keys, value):
    x = x.copy()
    x[:, :, keys] = value
    return x


@pytest.fixture(params=POISON.values(), ids=POISON)
def poison(request):
    return request.param


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_excluded_by_a_mask(dtype, poison, xp, rng):
    q, k, v = (rounded(x, dtype) for x in problem(rng))
    mask = np.ones((1, 1, 1, 17), bool)
    mask[..., 12:] = False
    exact, framework = (
        reference.attention(q, k, v, Options(mask=mask), arithmetic)
        for arithmetic in (reference.EXACT, reference.framework_arithmetic(dtype))
    )
    bad = arrays(xp, q, poisoned(k, slice(12, None), poison), poisoned(v, slice(12, None), poison), dtype=dtype)
    out, lse = fc.attention(*bad, mask=xp.array(mask, "bool"), return_lse=True)
    assert_near(xp.numpy(out), exact[0], framework[0], dtype)
    assert_near(xp.numpy(lse), exact[1], framework[1], "float32", what="lse")


def test_excluded_for_one_batch_entry_only(poison, xp, rng):
    q, k, v = problem(rng)
    mask = np.ones((2, 1, 1, 17), bool)
    mask[0, ..., 5:9] = False
    clean = xp.numpy(fc.attention(*arrays(xp, q, k, v), mask=xp.array(mask, "bool")))
    v[0, :, 5:9], k[0, :, 5:9] = poison, poison
    np.testing.assert_array_equal(xp.numpy(fc.attention(*arrays(xp, q, k, v), mask=xp.array(mask, "bool"))), clean)


def test_excluded_by_the_causal_rule(poison, xp, rng):
    """Only the last query sees the last key: all others stay as they were."""
    q, k, v = problem(rng, (11, 11))
    clean = xp.numpy(fc.attention(*arrays(xp, q, k, v), causal=True))
    out = xp.numpy(fc.attention(*arrays(xp, q, poisoned(k, 10, poison), poisoned(v, 10, poison)), causal=True))
    np.testing.assert_array_equal(out[:, :, :10], clean[:, :, :10])
    assert not np.isfinite(out[:, :, 10]).any()


def test_excluded_by_a_window(poison, xp, rng):
    q, k, v = problem(rng, (11, 11))
    bad = arrays(xp, q, poisoned(k, 5, poison), poisoned(v, 5, poison))
    out = xp.numpy(fc.attention(*bad, window=(1, 1)))
    clean = xp.numpy(fc.attention(*arrays(xp, q, k, v), window=(1, 1)))
    far = [i for i in range(11) if abs(i - 5) > 1]
    np.testing.assert_array_equal(out[:, :, far], clean[:, :, far])


def test_excluded_by_seqused(poison, xp, rng):
    q, k, v = (rounded(x, "float32") for x in rng.standard_normal((3, 12, 2, 8)))
    cuts, used = xp.array([0, 5, 12], "int32"), xp.array([3, 4], "int32")
    clean = xp.numpy(fc.attention_varlen(*arrays(xp, q, k, v), cuts, cuts, seqused_k=used))
    for x in (k, v):
        x[3:5], x[9:] = poison, poison
    out = xp.numpy(fc.attention_varlen(*arrays(xp, q, k, v), cuts, cuts, seqused_k=used))
    np.testing.assert_array_equal(out, clean)


def test_in_another_sequence_of_varlen(poison, xp, rng):
    q, k, v = (rounded(x, "float32") for x in rng.standard_normal((3, 12, 2, 8)))
    cuts = xp.array([0, 5, 12], "int32")
    clean = xp.numpy(fc.attention_varlen(*arrays(xp, q, k, v), cuts, cuts))
    for x in (q, k, v):
        x[5:] = poison
    out = xp.numpy(fc.attention_varlen(*arrays(xp, q, k, v), cuts, cuts))
    np.testing.assert_array_equal(out[:5], clean[:5])


def test_excluded_keys_do_not_reach_the_gradients(poison, xp, rng):
    q, k, v = problem(rng)
    mask = np.ones((1, 1, 1, 17), bool)
    mask[..., 12:] = False
    given = {"mask": xp.array(mask, "bool")}
    bad = arrays(xp, q, poisoned(k, slice(12, None), poison), poisoned(v, slice(12, None), poison))
    out, lse = fc.attention(*bad, return_lse=True, **given)
    dout = rounded(rng.standard_normal((2, 2, 11, 8)), "float32")
    grads = fc.attention_backward(xp.array(dout, "float32"), *bad, out, lse, **given)
    exact = reference.attention_backward(dout, q, k, v, Options(mask=mask))
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        np.testing.assert_allclose(xp.numpy(grad), exact[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_nan_in_a_query_stays_in_its_row(xp, rng):
    q, k, v = problem(rng)
    clean = xp.numpy(fc.attention(*arrays(xp, q, k, v)))
    out = xp.numpy(fc.attention(*arrays(xp, poisoned(q, 4, np.nan), k, v)))
    assert np.isnan(out[:, :, 4]).all()
    others = [i for i in range(11) if i != 4]
    np.testing.assert_array_equal(out[:, :, others], clean[:, :, others])


def test_nan_behind_a_strided_row_is_not_read(xp, rng):
    """Rows of 8 inside rows of 16: what lies between them is not part of the tensor."""
    tensors = [np.full((2, 2, 11, 16), np.nan) for _ in range(3)]
    values = rng.standard_normal((3, 2, 2, 11, 8))
    for wide, x in zip(tensors, values, strict=True):
        wide[..., :8] = x
    out = fc.attention(*(xp.array(x, "float32")[..., :8] for x in tensors))
    expected = fc.attention(*arrays(xp, *values))
    np.testing.assert_array_equal(xp.numpy(out), xp.numpy(expected))
