"""plan(): a call checked once and made many times gives what the plain call gives, and refuses other shapes."""

import threading

import flashcore as fc
import numpy as np
import pytest
from cases import BY_NAME, in_layout, make

NAMES = ["plain", "causal_bottom_right", "window_both", "gqa", "head_dim_v_larger", "dropout", "softcap"]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_does_what_the_call_does(name, layout, xp, rng):
    problem = make(BY_NAME[name], "float16", rng)
    arrays, words = problem.arrays(xp, layout), {**problem.keywords(xp), "layout": layout}
    planned = fc.plan(*arrays, **words)
    for given in (arrays, make(BY_NAME[name], "float16", rng).arrays(xp, layout)):
        np.testing.assert_array_equal(xp.numpy(planned(*given)), xp.numpy(fc.attention(*given, **words)))


def test_a_plan_with_lse(xp, rng):
    arrays = make(BY_NAME["plain"], "float32", rng).arrays(xp)
    out, lse = fc.plan(*arrays, return_lse=True)(*arrays)
    expected = fc.attention(*arrays, return_lse=True)
    np.testing.assert_array_equal(xp.numpy(out), xp.numpy(expected[0]))
    np.testing.assert_array_equal(xp.numpy(lse), xp.numpy(expected[1]))


def test_a_plan_writes_to_out(xp, rng):
    arrays = make(BY_NAME["plain"], "float32", rng).arrays(xp)
    out = xp.empty((2, 2, 19, 16))
    assert fc.plan(*arrays)(*arrays, out=out) is out
    np.testing.assert_array_equal(xp.numpy(out), xp.numpy(fc.attention(*arrays)))


def test_a_plan_with_other_tensors(xp, rng):
    problem = make(BY_NAME["everything"], "float32", rng)
    arrays, words = problem.arrays(xp), problem.keywords(xp)
    tensors = {name: x for name, x in words.items() if name in problem.tensors}
    planned = fc.plan(*arrays, **words)
    np.testing.assert_array_equal(xp.numpy(planned(*arrays, **tensors)), xp.numpy(fc.attention(*arrays, **words)))


def test_plans_of_varlen_and_decode(xp, rng):
    packed = [xp.array(rng.standard_normal((9, 2, 8)), "float32") for _ in range(3)]
    cuts = {n: xp.array([0, 4, 9], "int32") for n in ("cu_seqlens_q", "cu_seqlens_k")}
    planned = fc.plan(*packed, causal="bottom_right", **cuts)
    expected = fc.attention_varlen(*packed, *cuts.values(), causal="bottom_right")
    np.testing.assert_array_equal(xp.numpy(planned(*packed, **cuts)), xp.numpy(expected))

    q, k, v = (xp.array(rng.standard_normal((2, 2, n, 8)), "float32") for n in (1, 9, 9))
    lengths = {"cache_seqlens": xp.array([3, 9], "int32")}
    planned = fc.plan(q, k, v, **lengths)
    np.testing.assert_array_equal(
        xp.numpy(planned(q, k, v, **lengths)), xp.numpy(fc.attention_decode(q, k, v, *lengths.values()))
    )


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", ["plain", "gqa", "head_dim_v_larger", "everything"])
def test_a_plan_of_gradients(name, layout, xp, rng):
    problem = make(BY_NAME[name], "float32", rng)
    arrays, words = problem.arrays(xp, layout), {**problem.keywords(xp), "layout": layout}
    out, lse = fc.attention(*arrays, return_lse=True, **words)
    dout = xp.array(np.ones(out.shape), "float32")
    dlse = xp.array(np.ones(lse.shape), "float32")
    planned = fc.plan(*arrays, dout=dout, dlse=dlse, **words)  # out and lse are not known yet
    expected = fc.attention_backward(dout, *arrays, out, lse, dlse=dlse, **words)
    tensors = {name: x for name, x in words.items() if name in problem.tensors}
    dq = xp.empty(arrays[0].shape)
    found = planned(*arrays, out=out, lse=lse, dout=dout, dlse=dlse, dq=dq, **tensors)
    assert found[0] is dq
    assert len(found) == len(expected)
    for gradient, exact in zip(found, expected, strict=True):
        np.testing.assert_array_equal(xp.numpy(gradient), xp.numpy(exact))


def test_a_plan_of_gradients_needs_the_planned_arrays(xp, rng):
    q, k, v = make(BY_NAME["plain"], "float32", rng).arrays(xp)
    out, lse = fc.attention(q, k, v, return_lse=True)
    planned = fc.plan(q, k, v, dout=out)
    assert "bwd fp32 b2 q19 k19 h2 d16" in planned.describe()
    with pytest.raises(ValueError, match="lse"):
        planned(q, k, v, dout=out, out=out)
    with pytest.raises(ValueError, match="dlse"):
        planned(q, k, v, dout=out, out=out, lse=lse, dlse=lse)
    with pytest.raises(TypeError, match="unknown arguments: grad"):
        planned(q, k, v, dout=out, out=out, lse=lse, grad=out)


def test_a_plan_tells_kernel_workspace_and_problem(xp, rng):
    problem = make(BY_NAME["causal"], "float16", rng)
    arrays = problem.arrays(xp)
    planned = fc.plan(*arrays, causal=True)
    assert planned.kernel == fc.supports(*arrays, causal=True).kernel
    assert isinstance(planned.workspace_bytes, int)
    assert planned.workspace_bytes >= 0
    assert "fwd fp16 b2 q19 k19 h2 d16 causal" in planned.describe()
    assert planned.kernel in planned.describe()


def spoiled(xp, rng):
    """Arrays that are not those of the plan: by shape, by dtype, or by one more of them."""
    case = BY_NAME["plain"]
    q, k, v = make(case, "float32", rng).arrays(xp)
    halves = make(case, "float16", rng).arrays(xp)
    return {
        "seqlen": ([q[:, :, 1:], k, v], {}),
        "batch": ([q[:1], k[:1], v[:1]], {}),
        "dtype": (halves, {}),
        "mask": ([q, k, v], {"mask": xp.array(np.ones((19, 19)), "bool")}),
    }


@pytest.mark.parametrize("change", ["seqlen", "batch", "dtype", "mask"])
def test_another_problem_is_refused(change, xp, rng):
    planned = fc.plan(*make(BY_NAME["plain"], "float32", rng).arrays(xp))
    arrays, words = spoiled(xp, rng)[change]
    with pytest.raises(ValueError):
        planned(*arrays, **words)


def test_other_strides_are_refused_or_right(xp, rng):
    q, k, v = make(BY_NAME["plain"], "float32", rng).arrays(xp)
    turned = [xp.array(in_layout(xp.numpy(x), "bshd"), "float32").swapaxes(1, 2) for x in (q, k, v)]
    try:
        out = fc.plan(q, k, v)(*turned)
    except ValueError as refusal:
        assert str(refusal)
    else:
        np.testing.assert_array_equal(xp.numpy(out), xp.numpy(fc.attention(q, k, v)))


def test_planning_refuses_what_the_call_refuses(xp):
    x = xp.array(np.zeros((1, 2, 3, 8)), "float32")
    with pytest.raises(ValueError, match=r"top_left.*bottom_right"):
        fc.plan(x, x[:, :, :2], x[:, :, :2], causal=True)
    with pytest.raises(TypeError, match=r"is_causal"):
        fc.plan(x, x, x, is_causal=True)


def test_planning_reads_no_data(xp):
    x = xp.array(np.full((1, 2, 3, 8), np.nan), "float32")
    ones = xp.array(np.ones((1, 2, 3, 8)), "float32")
    np.testing.assert_allclose(xp.numpy(fc.plan(x, x, x)(ones, ones, ones)), 1, rtol=1e-6)


def test_threads_may_share_a_plan(xp, rng):
    problems = [make(BY_NAME["long"], "float32", rng) for _ in range(4)]
    arrays = [p.arrays(xp) for p in problems]
    expected = [xp.numpy(fc.attention(*a)) for a in arrays]
    planned = fc.plan(*arrays[0])
    results = [None] * 4

    def work(i):
        for _ in range(3):
            results[i] = xp.numpy(planned(*arrays[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, exact)
