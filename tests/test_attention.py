"""attention(): every feature in every dtype and layout against the float64 oracle."""

import all_kernels
import flashcore as fc
import numpy as np
import pytest
import reference
from cases import (
    ALL_FLOATS,
    BY_NAME,
    CASES,
    LAYOUTS,
    assert_near,
    cut,
    in_layout,
    lse_dtype,
    make,
    rounded,
)
from reference import Options, framework_arithmetic


def check(problem, out, lse, xp, layout, kernel="the chosen kernel"):
    """Compares a result with the oracle, within what the contract allows in this dtype."""
    exact = reference.attention(problem.q, problem.k, problem.v, problem.options)
    arithmetic = framework_arithmetic(problem.dtype)
    stepwise = reference.attention(problem.q, problem.k, problem.v, problem.options, arithmetic)
    terms = problem.q.shape[3] + problem.k.shape[2]
    assert_near(in_layout(xp.numpy(out), layout), exact[0], stepwise[0], problem.dtype, terms, f"out by {kernel}")
    assert_near(xp.numpy(lse), exact[1], stepwise[1], lse_dtype(problem.dtype), terms, f"lse by {kernel}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition(case, dtype, layout, xp, rng):
    problem = make(case, dtype, rng)
    arrays, words = problem.arrays(xp, layout), problem.keywords(xp)
    for kernel, (out, lse) in all_kernels.each(
        xp.device, lambda kernel: fc.attention(*arrays, layout=layout, return_lse=True, kernel=kernel, **words)
    ):
        check(problem, out, lse, xp, layout, kernel)
        assert xp.dtype(out) == dtype
        assert xp.dtype(lse) == lse_dtype(dtype)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", ALL_FLOATS)
def test_everything_at_once_small(dtype, xp, rng):
    problem = make(cut(BY_NAME["everything"], batch=1, seqlen=(3, 9)), dtype, rng)
    arrays, words = problem.arrays(xp), problem.keywords(xp)
    for kernel, (out, lse) in all_kernels.each(
        xp.device, lambda kernel: fc.attention(*arrays, return_lse=True, kernel=kernel, **words)
    ):
        check(problem, out, lse, xp, "bhsd", kernel)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 31, 32, 64, 65, 80, 96, 127, 128, 192, 255, 256])
def test_every_head_dim(dim, xp, rng):
    problem = make(cut(BY_NAME["plain"], batch=1, seqlen=(5, 9), dim=(dim, dim)), "float16", rng)
    arrays = problem.arrays(xp)
    for kernel, (out, lse) in all_kernels.each(
        xp.device, lambda kernel: fc.attention(*arrays, return_lse=True, kernel=kernel)
    ):
        check(problem, out, lse, xp, "bhsd", kernel)


@pytest.mark.parametrize("seqlen_q", [1, 2, 15, 16, 17, 64])
@pytest.mark.parametrize("seqlen_k", [1, 31, 32, 33, 63, 65, 129])
def test_lengths_around_block_edges(seqlen_q, seqlen_k, xp, rng):
    case = cut(BY_NAME["causal_bottom_right"], batch=1, heads=(1, 1), seqlen=(seqlen_q, seqlen_k))
    problem = make(case, "float32", rng)
    arrays, words = problem.arrays(xp), problem.keywords(xp)
    for kernel, (out, lse) in all_kernels.each(
        xp.device, lambda kernel: fc.attention(*arrays, return_lse=True, kernel=kernel, **words)
    ):
        check(problem, out, lse, xp, "bhsd", kernel)


def test_without_return_lse_only_out_comes_back(xp, rng):
    problem = make(BY_NAME["plain"], "float32", rng)
    q, k, v = problem.arrays(xp)
    out = fc.attention(q, k, v)
    assert xp.owns(out)
    with_lse, _ = fc.attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(xp.numpy(out), xp.numpy(with_lse))


def test_forward_is_bitwise_the_same_from_run_to_run(xp, rng):
    problem = make(BY_NAME["long"], "float16", rng)
    arrays = problem.arrays(xp)
    first = fc.attention(*arrays, return_lse=True)
    for _ in range(3):
        for again, once in zip(fc.attention(*arrays, return_lse=True), first, strict=True):
            np.testing.assert_array_equal(xp.numpy(again), xp.numpy(once))


def test_large_scores_do_not_overflow(xp, rng):
    """Scores of several thousand: a softmax that does not subtract the maximum gives Inf or NaN."""
    problem = make(cut(BY_NAME["plain"], words={"scale": 500.0}), "float32", rng)
    out, lse = fc.attention(*problem.arrays(xp), return_lse=True, scale=500.0)
    exact, exact_lse = reference.attention(problem.q, problem.k, problem.v, problem.options)
    np.testing.assert_allclose(xp.numpy(lse), exact_lse, rtol=1e-5)
    assert np.isfinite(xp.numpy(out)).all()
    assert np.abs(xp.numpy(out) - exact).max() < 1e-2


def test_negative_scale(xp, rng):
    problem = make(cut(BY_NAME["plain"], words={"scale": -0.3}), "float32", rng)
    out, lse = fc.attention(*problem.arrays(xp), return_lse=True, scale=-0.3)
    check(problem, out, lse, xp, "bhsd")


def test_scale_zero_averages_the_values(xp, rng):
    problem = make(BY_NAME["plain"], "float32", rng)
    out = xp.numpy(fc.attention(*problem.arrays(xp), scale=0.0))
    mean = np.broadcast_to(problem.v.mean(axis=2, keepdims=True), out.shape)
    np.testing.assert_allclose(out, mean, rtol=1e-5, atol=1e-6)


def test_bias_may_be_float32_beside_half_inputs(xp, rng):
    problem = make(BY_NAME["bias"], "float16", rng)
    bias = rng.standard_normal((2, 2, 19, 19)).astype(np.float32)
    out = xp.numpy(fc.attention(*problem.arrays(xp), bias=xp.array(bias, "float32")))
    options = Options(bias=bias.astype(np.float64))
    exact, _ = reference.attention(problem.q, problem.k, problem.v, options)
    stepwise, _ = reference.attention(problem.q, problem.k, problem.v, options, framework_arithmetic("float16"))
    assert_near(out, exact, stepwise, "float16", 35)


def test_alibi_slopes_per_batch(xp, rng):
    problem = make(BY_NAME["alibi"], "float32", rng)
    slopes = rounded(rng.random((2, 2)), "float32")
    out = xp.numpy(fc.attention(*problem.arrays(xp), alibi_slopes=xp.array(slopes, "float32")))
    options = Options(alibi_slopes=slopes)
    exact, _ = reference.attention(problem.q, problem.k, problem.v, options)
    stepwise, _ = reference.attention(problem.q, problem.k, problem.v, options, framework_arithmetic("float32"))
    assert_near(out, exact, stepwise, "float32", 35)


def test_infinite_bias_excludes_a_key(xp, rng):
    """-inf in a bias is the additive way to mask."""
    problem = make(BY_NAME["plain"], "float32", rng)
    bias = np.zeros((1, 1, 19, 19))
    bias[..., 5] = -np.inf
    out = xp.numpy(fc.attention(*problem.arrays(xp), bias=xp.array(bias, "float32")))
    keep = [j for j in range(19) if j != 5]
    exact, _ = reference.attention(problem.q, problem.k[:, :, keep], problem.v[:, :, keep])
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("queries", [2, 19], ids=["few", "many"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_row_of_the_largest_bias_is_no_empty_row(sign, queries, xp, rng):
    """A finite number is no -inf, though it is beyond float32 as an exponent of 2: padded rows of models have it."""
    problem = make(BY_NAME["plain"], "float32", rng)
    bias = np.zeros((1, 1, queries, 19))
    bias[..., 0, 7:] = np.finfo(np.float32).min
    exact, _ = reference.attention(problem.q[:, :, :queries], problem.k, problem.v, Options(bias=bias))
    exact[:, :, 1] = problem.v.mean(axis=2)  # beside such numbers scores do not count
    bias[..., 1, :] = sign * np.finfo(np.float32).max
    q, k, v = problem.arrays(xp)
    out = xp.numpy(fc.attention(xp.array(problem.q[:, :, :queries], "float32"), k, v, bias=xp.array(bias, "float32")))
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("descaled", [False, True])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_float8(descaled, out_dtype, xp, rng):
    """float8 where the device has it: descales are per (batch, kv head), results are wider."""
    problem = make(BY_NAME["gqa"], "float8_e4m3", rng)
    arrays = problem.arrays(xp)
    out = xp.empty((2, 6, 19, 16), out_dtype)
    if not fc.supports(*arrays, out=out).ok:
        pytest.skip("no kernel for float8 on this device")
    scales = {name: rounded(rng.uniform(0.5, 2, (2, 2)), "float32") for name in ("q_descale", "k_descale", "v_descale")}
    scales = scales if descaled else {}
    given = {name: xp.array(s, "float32") for name, s in scales.items()}
    fc.attention(*arrays, out=out, **given)
    exact, _ = reference.attention(problem.q, problem.k, problem.v, Options(**scales))
    stepwise, _ = reference.attention(
        problem.q, problem.k, problem.v, Options(**scales), framework_arithmetic("bfloat16")
    )
    assert_near(xp.numpy(out), exact, stepwise, out_dtype, 35)


def test_float8_gives_bfloat16_by_default(xp, rng):
    problem = make(BY_NAME["plain"], "float8_e4m3", rng)
    arrays = problem.arrays(xp)
    if not fc.supports(*arrays).ok:
        pytest.skip("no kernel for float8 on this device")
    assert xp.dtype(fc.attention(*arrays)) == "bfloat16"


def test_a_kernel_can_be_asked_for_by_name(xp, rng):
    problem = make(BY_NAME["causal"], "float32", rng)
    out, lse = fc.attention(*problem.arrays(xp), causal=True, return_lse=True, kernel="reference")
    check(problem, out, lse, xp, "bhsd")


def test_an_unknown_kernel_is_refused(xp, rng):
    problem = make(BY_NAME["plain"], "float32", rng)
    with pytest.raises((ValueError, fc.Unsupported), match=r"warp_drive"):
        fc.attention(*problem.arrays(xp), kernel="warp_drive")


def test_environment_variable_selects_the_kernel(xp, rng, monkeypatch):
    problem = make(BY_NAME["plain"], "float32", rng)
    arrays = problem.arrays(xp)
    monkeypatch.setenv("FLASHCORE_KERNEL", "reference")
    assert "reference" in fc.supports(*arrays).kernel
    monkeypatch.setenv("FLASHCORE_KERNEL", "warp_drive")
    assert not fc.supports(*arrays).ok


def test_default_options_are_those_of_the_contract(xp, rng):
    problem = make(BY_NAME["plain"], "float32", rng)
    arrays = problem.arrays(xp)
    spelled = fc.attention(
        *arrays,
        layout="bhsd",
        causal=False,
        window=(None, None),
        scale=None,
        softcap=0.0,
        dropout_p=0.0,
        mask=None,
        bias=None,
        alibi_slopes=None,
        sinks=None,
    )
    np.testing.assert_array_equal(xp.numpy(fc.attention(*arrays)), xp.numpy(spelled))


@pytest.mark.parametrize("pair", [((-1, -1), (None, None)), ((3, -1), (3, None)), ((-1, 2), (None, 2))])
def test_minus_one_and_none_both_mean_unbounded(pair, xp, rng):
    arrays = make(BY_NAME["plain"], "float32", rng).arrays(xp)
    one, other = (xp.numpy(fc.attention(*arrays, window=window)) for window in pair)
    np.testing.assert_array_equal(one, other)
