"""attention_backward(): all gradients against the oracle's chain rule and against finite differences."""

import all_kernels
import flashcore as fc
import numpy as np
import pytest
import reference
from cases import ALL_FLOATS, BY_NAME, CASES, LAYOUTS, assert_near, cut, in_layout, lse_dtype, make, rounded
from reference import framework_arithmetic

NAMES = ("dq", "dk", "dv", "dbias", "dsinks")


def expected_names(problem):
    return [n for n in NAMES if n[1:] in ("q", "k", "v") or n[1:] in problem.tensors]


def run(problem, xp, dout, dlse=None, layout="bhsd", **more):
    """Forward, then backward: the gradients by name, as NumPy arrays in bhsd."""
    arrays, words = problem.arrays(xp, layout), problem.keywords(xp)
    out, lse = fc.attention(*arrays, layout=layout, return_lse=True, **words)
    if dlse is not None:
        more["dlse"] = xp.array(dlse, lse_dtype(problem.dtype))
    given = xp.array(in_layout(dout, layout), problem.dtype)
    grads = fc.attention_backward(given, *arrays, out, lse, layout=layout, **words, **more)
    names = expected_names(problem)
    assert len(grads) == len(names)
    named = {name: xp.numpy(g) for name, g in zip(names, grads, strict=True)}
    return {n: in_layout(g, layout) if n in ("dq", "dk", "dv") else g for n, g in named.items()}


def check_each_kernel(problem, xp, dout, dlse=None, layout="bhsd", **more):
    for name, grads in all_kernels.each(
        xp.device, lambda kernel: run(problem, xp, dout, dlse, layout, kernel=kernel, **more)
    ):
        check(problem, grads, dout, dlse, name)


def check(problem, grads, dout, dlse=None, kernel="the chosen kernel"):
    inputs = (dout, problem.q, problem.k, problem.v, problem.options, dlse)
    exact = reference.attention_backward(*inputs)
    stepwise = reference.attention_backward(*inputs, framework_arithmetic(problem.dtype))
    terms_of = reference.attention_backward(*inputs, cancel=False)
    terms = problem.q.shape[3] + problem.k.shape[2] + problem.q.shape[2] * problem.q.shape[1]
    for name, grad in grads.items():
        magnitude = np.abs(terms_of[name]).max(initial=0)
        assert_near(grad, exact[name], stepwise[name], problem.dtype, terms, f"{name} by {kernel}", magnitude)


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_chain_rule(case, dtype, xp, rng):
    problem = make(case, dtype, rng)
    dout = rounded(rng.standard_normal((*problem.q.shape[:3], problem.v.shape[3])), dtype)
    check_each_kernel(problem, xp, dout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["plain", "gqa", "sinks", "sinks_window", "everything", "causal_bottom_right_empty_rows"]
)
def test_gradient_through_lse(name, layout, xp, rng):
    problem = make(BY_NAME[name], "float32", rng)
    dout = rounded(rng.standard_normal((*problem.q.shape[:3], problem.v.shape[3])), "float32")
    dlse = rounded(rng.standard_normal(problem.q.shape[:3]), "float32")
    check_each_kernel(problem, xp, dout, dlse, layout)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", ALL_FLOATS)
def test_everything_at_once_small(dtype, xp, rng):
    problem = make(cut(BY_NAME["everything"], batch=1, seqlen=(3, 9)), dtype, rng)
    dout = rounded(rng.standard_normal((*problem.q.shape[:3], problem.v.shape[3])), dtype)
    check_each_kernel(problem, xp, dout)


@pytest.mark.parametrize("name", ["plain", "everything", "causal_top_left", "gqa", "dropout", "softcap", "sinks"])
def test_is_the_slope_of_the_forward(name, xp, rng):
    """Central differences of flashcore's own forward in float64."""
    problem = make(BY_NAME[name], "float64", rng)
    dout = rng.standard_normal((*problem.q.shape[:3], problem.v.shape[3]))
    dlse = rng.standard_normal(problem.q.shape[:3])
    grads = run(problem, xp, dout, dlse)
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.tensors}

    def loss(changed, step):
        x = {n: xp.array(t, "bool" if n == "mask" else "float64") for n, t in inputs.items()}
        x = {n: xp.array(t, "float32") if n == "alibi_slopes" else x[n] for n, t in inputs.items()}
        x.update({n: xp.array(inputs[n] + step * d, "float64") for n, d in changed.items()})
        q, k, v = (x.pop(n) for n in "qkv")
        out, lse = fc.attention(q, k, v, return_lse=True, **x, **problem.case.words)
        lse = xp.numpy(lse)
        return (xp.numpy(out) * dout).sum() + (np.where(np.isinf(lse), 0, lse) * dlse).sum()

    for grad_name, grad in grads.items():
        direction = {grad_name[1:]: rng.standard_normal(grad.shape)}
        slope = (loss(direction, 1e-5) - loss(direction, -1e-5)) / 2e-5
        assert (grad * direction[grad_name[1:]]).sum() == pytest.approx(slope, rel=1e-6, abs=1e-6), grad_name


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["gqa", "everything", "long"])
def test_deterministic_is_bitwise_the_same(name, dtype, xp, rng):
    problem = make(BY_NAME[name], dtype, rng)
    dout = rounded(rng.standard_normal((*problem.q.shape[:3], problem.v.shape[3])), dtype)
    once, again = (run(problem, xp, dout, deterministic=True) for _ in range(2))
    for key in once:
        np.testing.assert_array_equal(once[key], again[key], err_msg=key)
    check(problem, once, dout)


@pytest.mark.parametrize(
    "shape", [(2, 2, 19, 19), (2, 19, 19), (19,), (2, 1, 19, 1), (1, 2, 1, 19), (1, 1, 1, 1), (19, 1), ()], ids=str
)
def test_dbias_has_the_shape_of_bias(shape, xp, rng):
    problem = make(cut(BY_NAME["bias"], bias_shape=shape), "float32", rng)
    problem.tensors["bias"] = rounded(rng.standard_normal(shape), "float32")
    dout = rounded(rng.standard_normal((2, 2, 19, 16)), "float32")
    assert run(problem, xp, dout)["dbias"].shape == shape
    check_each_kernel(problem, xp, dout)


def test_gradients_have_their_inputs_dtype_and_framework(framework, rng):
    for dtype in sorted({"float16", "bfloat16", "float32"} & framework.dtypes):
        problem = make(BY_NAME["gqa"], dtype, rng)
        arrays = problem.arrays(framework)
        out, lse = fc.attention(*arrays, return_lse=True)
        grads = fc.attention_backward(framework.array(np.ones((2, 6, 19, 16)), dtype), *arrays, out, lse)
        assert len(grads) == 3
        for grad, x in zip(grads, arrays, strict=True):
            assert framework.owns(grad)
            assert framework.dtype(grad) == dtype
            assert tuple(grad.shape) == tuple(x.shape)


def test_empty_rows_have_zero_gradients(xp, rng):
    """29 queries, 13 keys, bottom-right: the first 16 queries see nothing."""
    problem = make(BY_NAME["causal_bottom_right_empty_rows"], "float32", rng)
    dout = rounded(rng.standard_normal((2, 2, 29, 16)), "float32")
    grads = run(problem, xp, dout)
    np.testing.assert_array_equal(grads["dq"][:, :, :16], 0)
    changed = dout.copy()
    changed[:, :, :16] += 5
    for name, grad in run(problem, xp, changed).items():
        np.testing.assert_array_equal(grad, grads[name], err_msg=name)


def test_keys_that_nobody_sees_have_zero_gradients(xp, rng):
    problem = make(BY_NAME["mask"], "float32", rng)
    problem.tensors["mask"][..., 7] = False
    grads = run(problem, xp, rounded(rng.standard_normal((2, 2, 19, 16)), "float32"))
    np.testing.assert_array_equal(grads["dk"][:, :, 7], 0)
    np.testing.assert_array_equal(grads["dv"][:, :, 7], 0)


def test_is_linear_in_dout(xp, rng):
    problem = make(BY_NAME["everything"], "float64", rng)
    a, b = rng.standard_normal((2, *problem.q.shape[:3], problem.v.shape[3]))
    of_a, of_b, of_sum = (run(problem, xp, x) for x in (a, b, a + 2 * b))
    for name in of_sum:
        np.testing.assert_allclose(of_sum[name], of_a[name] + 2 * of_b[name], rtol=1e-9, atol=1e-11, err_msg=name)
