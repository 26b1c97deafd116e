"""attention_varlen(): packed sequences of different lengths against the oracle, each sequence alone."""

import all_kernels
import flashcore as fc
import numpy as np
import pytest
import reference
from cases import ALL_FLOATS, assert_near, lse_dtype, rounded
from reference import PLAIN, Options, framework_arithmetic

CUTS = {
    "equal": ([0, 7, 14, 21], [0, 7, 14, 21]),
    "different": ([0, 5, 6, 33], [0, 11, 30, 31]),
    "empty_sequences": ([0, 0, 9, 9, 9, 12], [0, 4, 13, 13, 20, 20]),
    "one": ([0, 13], [0, 21]),
    "no_queries": ([0, 0, 0], [0, 5, 8]),
    "no_keys": ([0, 4, 7], [0, 0, 0]),
}
WORDS = {
    "plain": {},
    "top_left": {"causal": "top_left"},
    "bottom_right": {"causal": "bottom_right"},
    "window": {"window": (3, 1)},
    "window_bottom_right": {"window": (4, -1), "causal": "bottom_right"},
    "softcap": {"softcap": 1.5, "scale": 0.8},
    "dropout": {"dropout_p": 0.4, "seed": 99},
}


def pack(rng, cuts, dtype, heads=(4, 2), dim=(24, 16)):
    cu_q, cu_k = cuts
    q = rounded(rng.standard_normal((cu_q[-1], heads[0], dim[0])), dtype)
    k = rounded(rng.standard_normal((cu_k[-1], heads[1], dim[0])), dtype)
    v = rounded(rng.standard_normal((cu_k[-1], heads[1], dim[1])), dtype)
    return q, k, v


def call(xp, tensors, cuts, dtype, **more):
    arrays = [xp.array(x, dtype) for x in tensors]
    lengths = [xp.array(cut, "int32") for cut in cuts]
    out, lse = fc.attention_varlen(*arrays, *lengths, return_lse=True, **more)
    assert xp.dtype(out) == dtype
    assert xp.dtype(lse) == lse_dtype(dtype)
    return xp.numpy(out), xp.numpy(lse)


def check_each_kernel(xp, tensors, cuts, dtype, options, **words):
    for name, actual in all_kernels.each(
        xp.device, lambda kernel: call(xp, tensors, cuts, dtype, kernel=kernel, **words)
    ):
        check(actual, tensors, cuts, dtype, options, name)


def check(actual, tensors, cuts, dtype, options=PLAIN, kernel="the chosen kernel"):
    exact = reference.attention_varlen(*tensors, *cuts, options)
    stepwise = reference.attention_varlen(*tensors, *cuts, options, framework_arithmetic(dtype))
    assert_near(actual[0], exact[0], stepwise[0], dtype, 60, f"out by {kernel}")
    assert_near(actual[1], exact[1], stepwise[1], lse_dtype(dtype), 60, f"lse by {kernel}")


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_each_sequence_attends_to_itself(cuts, words, dtype, xp, rng):
    tensors = pack(rng, cuts, dtype)
    check_each_kernel(xp, tensors, cuts, dtype, Options(**words), **words)


def test_sinks_and_alibi(xp, rng):
    cuts = CUTS["different"]
    tensors = pack(rng, cuts, "float32")
    extra = {
        "sinks": rounded(rng.standard_normal(4), "float32"),
        "alibi_slopes": rounded(rng.random((3, 4)), "float32"),
    }
    given = {n: xp.array(t, "float32") for n, t in extra.items()}
    check_each_kernel(xp, tensors, cuts, "float32", Options(**extra), **given)


def test_mask_and_bias_count_within_the_sequence(xp, rng):
    """Row i, column j of a mask or bias is query i and key j of each sequence, not of the packed tensor."""
    cuts = CUTS["different"]
    tensors = pack(rng, cuts, "float32")
    bias = rounded(rng.standard_normal((3, 4, 27, 19)), "float32")
    mask = rng.random((1, 1, 27, 19)) < 0.7
    given = {"bias": xp.array(bias, "float32"), "mask": xp.array(mask, "bool")}
    longest = {"max_seqlen_q": 27, "max_seqlen_k": 19}
    check_each_kernel(xp, tensors, cuts, "float32", Options(bias=bias, mask=mask), **longest, **given)


@pytest.mark.parametrize("name", ["different", "empty_sequences"])
def test_max_seqlens_are_a_hint_only(name, xp, rng):
    cu_q, cu_k = cuts = CUTS[name]
    tensors = pack(rng, cuts, "float32")
    longest = {"max_seqlen_q": int(np.diff(cu_q).max()), "max_seqlen_k": int(np.diff(cu_k).max())}
    with_hint = call(xp, tensors, cuts, "float32", causal="bottom_right", **longest)
    without = call(xp, tensors, cuts, "float32", causal="bottom_right")
    for a, b in zip(with_hint, without, strict=True):
        np.testing.assert_array_equal(a, b)


def test_seqused_k_shortens_each_sequence(xp, rng):
    cuts = CUTS["different"]
    tensors = pack(rng, cuts, "float32")
    used = np.array([4, 0, 1], np.int32)
    words = {"causal": "bottom_right"}
    options = Options(seqused_k=used, **words)
    check_each_kernel(xp, tensors, cuts, "float32", options, seqused_k=xp.array(used, "int32"), **words)


def test_causal_true_needs_the_same_lengths(xp, rng):
    """The same offsets for queries and keys are self-attention: bare True is clear there, and only there."""
    cuts = CUTS["equal"]
    tensors = pack(rng, cuts, "float32")
    arrays = [xp.array(x, "float32") for x in tensors]
    offsets = xp.array(cuts[0], "int32")
    out, lse = fc.attention_varlen(*arrays, offsets, offsets, causal=True, return_lse=True)
    check((xp.numpy(out), xp.numpy(lse)), tensors, cuts, "float32", Options(causal=True))
    with pytest.raises(ValueError, match=r"top_left.*bottom_right"):
        call(xp, pack(rng, CUTS["different"], "float32"), CUTS["different"], "float32", causal=True)


def test_rows_past_the_last_sequence_are_empty(xp, rng):
    """12 packed rows of which the sequences own 9: the rest is defined, and touches nothing."""
    q, k, v = (rounded(x, "float32") for x in rng.standard_normal((3, 12, 2, 8)))
    cuts = ([0, 4, 9], [0, 4, 9])
    out, lse = call(xp, (q, k, v), cuts, "float32")
    check((out, lse), (q, k, v), cuts, "float32")
    np.testing.assert_array_equal(out[9:], 0)
    assert np.isneginf(lse[:, 9:]).all()


def backward(xp, tensors, cuts, dtype, dout, dlse=None, extra=None, **words):
    arrays = [xp.array(x, dtype) for x in tensors]
    lengths = [xp.array(cut, "int32") for cut in cuts]
    words = {**words, **{n: xp.array(t, lse_dtype(dtype)) for n, t in (extra or {}).items()}}
    out, lse = fc.attention_varlen(*arrays, *lengths, return_lse=True, **words)
    if dlse is not None:
        words["dlse"] = xp.array(dlse, lse_dtype(dtype))
    given = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True))
    grads = fc.attention_backward(xp.array(dout, dtype), *arrays, out, lse, layout="thd", **given, **words)
    return [xp.numpy(g) for g in grads]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("name", ["different", "empty_sequences", "no_keys"])
def test_backward_matches_the_chain_rule(name, words, dtype, xp, rng):
    cuts = CUTS[name]
    tensors = pack(rng, cuts, dtype)
    dout = rounded(rng.standard_normal((cuts[0][-1], 4, 16)), dtype)
    dlse = rounded(rng.standard_normal((4, cuts[0][-1])), lse_dtype(dtype))
    sinks = {"sinks": rounded(rng.standard_normal(4), "float32")}
    answers = all_kernels.each(
        xp.device, lambda kernel: backward(xp, tensors, cuts, dtype, dout, dlse, sinks, kernel=kernel, **words)
    )
    inputs = (dout, *tensors, *cuts, Options(**words, **sinks), dlse)
    exact = reference.attention_varlen_backward(*inputs)
    stepwise = reference.attention_varlen_backward(*inputs, framework_arithmetic(dtype))
    terms_of = reference.attention_varlen_backward(*inputs, cancel=False)
    for kernel, grads in answers:
        for name, grad in zip(("dq", "dk", "dv", "dsinks"), grads, strict=True):
            magnitude = np.abs(terms_of[name]).max(initial=0)
            assert_near(grad, exact[name], stepwise[name], dtype, 200, f"{name} by {kernel}", magnitude)


@pytest.mark.sanitizer
def test_small(xp, rng):
    cuts = CUTS["empty_sequences"]
    tensors = pack(rng, cuts, "float16", dim=(8, 8))
    words = {"causal": "bottom_right"}
    check_each_kernel(xp, tensors, cuts, "float16", Options(**words), **words)
