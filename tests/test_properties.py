"""Laws of attention that hold for any input: hypothesis looks for one that breaks them."""

import flashcore as fc
import numpy as np
import pytest
import reference
from cases import Case, assert_near, lse_dtype, make, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("best_and_reference")

SIZE = st.integers(1, 24)


@st.composite
def problems(draw, square=False):
    """(rng, q, k, v) in float32 with small random sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch, heads_k, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seqlen_k = draw(SIZE)
    seqlen_q = seqlen_k if square else draw(SIZE)
    dim, dim_v = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    q = rounded(rng.standard_normal((batch, heads_k * group, seqlen_q, dim)), "float32")
    k = rounded(rng.standard_normal((batch, heads_k, seqlen_k, dim)), "float32")
    v = rounded(rng.standard_normal((batch, heads_k, seqlen_k, dim_v)), "float32")
    return rng, q, k, v


def run(xp, q, k, v, **words):
    out, lse = fc.attention(*(xp.array(x, "float32") for x in (q, k, v)), return_lse=True, **words)
    return xp.numpy(out), xp.numpy(lse)


def near(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@given(problems())
def test_the_order_of_keys_does_not_matter(xp, problem):
    rng, q, k, v = problem
    order = rng.permutation(k.shape[2])
    near(run(xp, q, k[:, :, order], v[:, :, order]), run(xp, q, k, v))


@given(problems())
def test_equal_values_come_out_as_they_are(xp, problem):
    """The weights of a row sum to one."""
    _, q, k, v = problem
    out, _ = run(xp, q, k, np.ones_like(v))
    np.testing.assert_allclose(out, 1, rtol=1e-5)


@given(problems(), st.floats(-4, 4))
def test_is_linear_in_the_values(xp, problem, factor):
    _, q, k, v = problem
    out, lse = run(xp, q, k, v)
    near(run(xp, q, k, v * factor), (out * np.float32(factor), lse))


@given(problems(), st.floats(-50, 50))
def test_a_constant_bias_shifts_lse_only(xp, problem, constant):
    _, q, k, v = problem
    out, lse = run(xp, q, k, v)
    bias = xp.array(np.full((1, 1), constant), "float32")
    near(run(xp, q, k, v, bias=bias), (out, lse + np.float32(constant)))


@given(problems(), st.floats(0.1, 4))
def test_scale_belongs_to_the_queries(xp, problem, factor):
    _, q, k, v = problem
    near(run(xp, q * np.float32(factor), k, v, scale=0.3), run(xp, q, k, v, scale=0.3 * float(np.float32(factor))))


@given(problems())
def test_grouped_heads_are_repeated_heads(xp, problem):
    _, q, k, v = problem
    group = q.shape[1] // k.shape[1]
    near(run(xp, q, k, v), run(xp, q, k.repeat(group, 1), v.repeat(group, 1)))


@given(problems(), st.data())
def test_split_keys_merge_to_the_whole(xp, problem, data):
    _, q, k, v = problem
    cut = data.draw(st.integers(0, k.shape[2]))
    parts = [x for keys in (slice(cut), slice(cut, None)) for x in run(xp, q, k[:, :, keys], v[:, :, keys])]
    merged = fc.merge_states(*(xp.array(x, "float32") for x in parts))
    near(map(xp.numpy, merged), run(xp, q, k, v))


@given(problems())
def test_layouts_agree(xp, problem):
    _, q, k, v = problem
    out, lse = run(xp, q, k, v, causal="bottom_right")
    turned, turned_lse = run(xp, *(x.swapaxes(1, 2) for x in (q, k, v)), causal="bottom_right", layout="bshd")
    np.testing.assert_array_equal(turned.swapaxes(1, 2), out)
    np.testing.assert_array_equal(turned_lse, lse)


@given(problems(), st.integers(0, 12), st.integers(0, 12), st.sampled_from([False, "top_left", "bottom_right"]))
def test_windows_are_masks(xp, problem, left, right, causal):
    _, q, k, v = problem
    seen = reference.visible(reference.Options(causal=causal, window=(left, right)), q.shape[2], k.shape[2])
    near(run(xp, q, k, v, window=(left, right), causal=causal), run(xp, q, k, v, mask=xp.array(seen, "bool")))


@given(problems(), st.integers(0, 12), st.integers(0, 12))
def test_windows_compose(xp, problem, left, right):
    """A window to the left and the causal rule together are the window (left, 0)."""
    _, q, k, v = problem
    near(run(xp, q, k, v, window=(left, right), causal="bottom_right"), run(xp, q, k, v, window=(left, 0)))


@given(problems(square=True))
def test_bare_causal_is_both_corners_where_lengths_agree(xp, problem):
    _, q, k, v = problem
    plain = run(xp, q, k, v, causal=True)
    for corner in ("top_left", "bottom_right"):
        for a, b in zip(run(xp, q, k, v, causal=corner), plain, strict=True):
            np.testing.assert_array_equal(a, b)


@given(problems(), st.data())
def test_later_keys_do_not_change_causal_rows(xp, problem, data):
    rng, q, k, v = problem
    row = data.draw(st.integers(0, q.shape[2] - 1))
    other_k, other_v = k.copy(), v.copy()
    other_k[:, :, row + 1 :] += 5
    other_v[:, :, row + 1 :] -= 3
    for a, b in zip(run(xp, q, k, v, causal="top_left"), run(xp, q, other_k, other_v, causal="top_left"), strict=True):
        np.testing.assert_array_equal(a[:, :, : row + 1], b[:, :, : row + 1])


@given(problems(), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5), st.booleans())
def test_varlen_is_one_call_per_sequence(xp, problem, lengths, causal):
    rng, q, k, v = problem
    causal = "bottom_right" if causal else False
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(n)]) for n in zip(*lengths, strict=True))
    heads, heads_k = q.shape[1], k.shape[1]
    packed = [
        rounded(rng.standard_normal(shape), "float32")
        for shape in ((cu_q[-1], heads, 8), (cu_k[-1], heads_k, 8), (cu_k[-1], heads_k, 8))
    ]
    arrays = [xp.array(x, "float32") for x in packed]
    cuts = [xp.array(cut, "int32") for cut in (cu_q, cu_k)]
    out, lse = (xp.numpy(x) for x in fc.attention_varlen(*arrays, *cuts, causal=causal, return_lse=True))
    for b in range(len(lengths)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = [x.swapaxes(0, 1)[None] for x in (packed[0][rows], packed[1][keys], packed[2][keys])]
        one, one_lse = run(xp, *alone, causal=causal)
        np.testing.assert_allclose(out[rows].swapaxes(0, 1), one[0], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(lse[:, rows], one_lse[0], rtol=2e-5, atol=2e-5)


@given(problems(), st.integers(1, 40), st.data())
def test_a_paged_cache_is_a_contiguous_one(xp, problem, page, data):
    rng, q, k, v = problem
    batch, heads_k, capacity, _ = k.shape
    lengths = np.array(data.draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch)), np.int32)
    slots = -(-capacity // page)
    table = rng.permutation(batch * slots + 2)[: batch * slots].reshape(batch, slots).astype(np.int32)
    pages = [np.full((batch * slots + 2, heads_k, page, x.shape[3]), np.nan) for x in (k, v)]
    for b in range(batch):
        for j in range(capacity):
            for cache, x in zip(pages, (k, v), strict=True):
                cache[table[b, j // page], :, j % page] = x[b, :, j]
    query, used = xp.array(q, "float32"), xp.array(lengths, "int32")
    contiguous = fc.attention_decode(query, *(xp.array(x, "float32") for x in (k, v)), used, return_lse=True)
    paged = fc.attention_decode(
        query, *(xp.array(x, "float32") for x in pages), used, xp.array(table, "int32"), return_lse=True
    )
    near(map(xp.numpy, paged), map(xp.numpy, contiguous))


@given(problems(), st.data())
def test_decode_is_attention_over_the_used_keys(xp, problem, data):
    _, q, k, v = problem
    used = data.draw(st.integers(0, k.shape[2]))
    lengths = xp.array(np.full(q.shape[0], used), "int32")
    arrays = [xp.array(x, "float32") for x in (q, k, v)]
    decoded = fc.attention_decode(*arrays, lengths, return_lse=True)
    near(map(xp.numpy, decoded), run(xp, q, k[:, :, :used], v[:, :, :used], causal="bottom_right"))


@given(problems(), st.floats(-3, 3))
def test_a_sink_only_takes_weight_away(xp, problem, logit):
    """With a sink, out shrinks by one factor per row: exp(lse without) / exp(lse with)."""
    _, q, k, v = problem
    out, lse = run(xp, q, k, v)
    sunk, sunk_lse = run(xp, q, k, v, sinks=xp.array(np.full(q.shape[1], logit), "float32"))
    np.testing.assert_allclose(sunk_lse, np.logaddexp(lse, logit), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(sunk, out * np.exp(lse - sunk_lse)[..., None], rtol=1e-4, atol=2e-5)


@given(problems(), st.floats(1e3, 1e6))
def test_a_huge_softcap_is_none(xp, problem, cap):
    _, q, k, v = problem
    for a, b in zip(run(xp, q, k, v, softcap=cap), run(xp, q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@given(problems())
def test_gradients_of_values_conserve_dout(xp, problem):
    """Weights sum to one: over the keys, dv adds up to what dout adds up to over the queries of the group."""
    rng, q, k, v = problem
    arrays = [xp.array(x, "float32") for x in (q, k, v)]
    out, lse = fc.attention(*arrays, return_lse=True)
    dout = rounded(rng.standard_normal((*q.shape[:3], v.shape[3])), "float32")
    _, _, dv = fc.attention_backward(xp.array(dout, "float32"), *arrays, out, lse)
    grouped = dout.reshape(q.shape[0], k.shape[1], -1, v.shape[3]).sum(axis=2)
    np.testing.assert_allclose(xp.numpy(dv).sum(axis=2), grouped, rtol=1e-4, atol=1e-4)


@st.composite
def cases(draw):
    """Any combination of features, in small."""
    heads_k, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sizes = {"batch": draw(st.integers(1, 2)), "heads": (heads_k * group, heads_k)}
    sizes |= {"seqlen": (draw(SIZE), draw(SIZE)), "dim": (draw(st.integers(1, 20)), draw(st.integers(1, 20)))}
    side = st.one_of(st.none(), st.integers(0, 12))
    words = {
        "causal": draw(st.sampled_from([False, "top_left", "bottom_right"])),
        "window": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from([0.0, 1.5])),
        "scale": draw(st.sampled_from([None, 0.3])),
        "dropout_p": draw(st.sampled_from([0.0, 0.4])),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }
    tensors = draw(st.sets(st.sampled_from(["mask", "bias", "alibi_slopes", "sinks"])))
    full = (sizes["batch"], sizes["heads"][0], *sizes["seqlen"])
    ones = draw(st.tuples(*[st.booleans()] * 4))
    shape = tuple(1 if one else n for one, n in zip(ones, full, strict=True))
    return Case("drawn", words=words, tensors=tuple(sorted(tensors)), bias_shape=shape, mask_shape=shape[1:], **sizes)


@settings(max_examples=120)
@given(cases(), st.sampled_from(["float16", "float32", "float64"]), st.integers(0, 2**32))
def test_any_combination_of_features_is_the_definition(xp, case, dtype, seed):
    """Forward and backward, through out and lse, against the oracle."""
    rng = np.random.default_rng(seed)
    problem = make(case, dtype, rng)
    arrays, words, options = problem.arrays(xp), problem.keywords(xp), problem.options
    dout = rounded(rng.standard_normal((*problem.q.shape[:3], problem.v.shape[3])), dtype)
    dlse = rounded(rng.standard_normal(problem.q.shape[:3]), lse_dtype(dtype))
    out, lse = fc.attention(*arrays, return_lse=True, **words)
    above = xp.array(dout, dtype), xp.array(dlse, lse_dtype(dtype))
    grads = fc.attention_backward(above[0], *arrays, out, lse, dlse=above[1], **words)

    qkv, arithmetic = (problem.q, problem.k, problem.v), reference.framework_arithmetic(dtype)
    exact, stepwise = reference.attention(*qkv, options), reference.attention(*qkv, options, arithmetic)
    assert_near(xp.numpy(out), exact[0], stepwise[0], dtype, 50, "out")
    assert_near(xp.numpy(lse), exact[1], stepwise[1], lse_dtype(dtype), 50, "lse")
    exact = reference.attention_backward(dout, *qkv, options, dlse)
    stepwise = reference.attention_backward(dout, *qkv, options, dlse, arithmetic)
    terms = reference.attention_backward(dout, *qkv, options, dlse, cancel=False)
    for (name, true), grad in zip(exact.items(), grads, strict=True):
        assert_near(xp.numpy(grad), true, stepwise[name], dtype, 200, name, np.abs(terms[name]).max())
