"""vector_add() and reduce(): every dtype, shape and stride against NumPy in float64."""

import flashcore as fc
import numpy as np
import pytest
from cases import ALL_FLOATS, UNIT, rounded
from hypothesis import given
from hypothesis import strategies as st

SHAPES = [(), (1,), (7,), (1000,), (3, 5), (0,), (4, 0, 3), (2, 1, 3, 1), (2, 3, 4, 5, 2), (1, 2, 1, 2, 1, 2, 1, 2)]
OPERATIONS = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_is_rounded_once(shape, dtype, xp, rng):
    a, b = (rounded(rng.standard_normal(shape), dtype) for _ in range(2))
    out = fc.vector_add(xp.array(a, dtype), xp.array(b, dtype))
    assert xp.dtype(out) == dtype
    np.testing.assert_array_equal(xp.numpy(out), rounded(a + b, dtype))


def test_add_reads_strides(xp, rng):
    a, b = rounded(rng.standard_normal((2, 6, 8)), "float32")
    x, y, turned = xp.array(a, "float32"), xp.array(b, "float32"), xp.array(b.T, "float32").T
    sliced = fc.vector_add(x[::2, 1:], y[1::2, 1:])
    np.testing.assert_array_equal(xp.numpy(sliced), rounded(a[::2, 1:] + b[1::2, 1:], "float32"))
    np.testing.assert_array_equal(xp.numpy(fc.vector_add(x, turned)), rounded(a + b, "float32"))


@pytest.mark.parametrize("place", [0, 1])
def test_add_in_place(place, xp, rng):
    arrays = [xp.array(x, "float32") for x in rng.standard_normal((2, 1000))]
    expected = xp.numpy(arrays[0]) + xp.numpy(arrays[1])
    assert fc.vector_add(*arrays, out=arrays[place]) is arrays[place]
    np.testing.assert_allclose(xp.numpy(arrays[place]), expected, rtol=1e-7)


def test_add_carries_nan_and_infinity(xp):
    a, b = np.array([np.nan, np.inf, np.inf, 1.0]), np.array([1.0, 1.0, -np.inf, np.nan])
    out = xp.numpy(fc.vector_add(xp.array(a, "float32"), xp.array(b, "float32")))
    np.testing.assert_array_equal(out, [np.nan, np.inf, np.nan, np.nan])


@pytest.mark.parametrize(
    ("b", "exception", "pattern"),
    [
        (("float32", (5,)), ValueError, r"\(4,\).*\(5,\)|\(5,\).*\(4,\)"),
        (("float32", (1,)), ValueError, r"\(4,\).*\(1,\)|\(1,\).*\(4,\)"),
        (("float32", (4, 1)), ValueError, r"\(4, 1\)"),
        (("float16", (4,)), TypeError, r"float16.*float32|float32.*float16"),
        (("int32", (4,)), TypeError, r"int32"),
    ],
)
def test_add_refuses(b, exception, pattern, xp):
    out = xp.empty((4,))
    with pytest.raises(exception, match=f"(?s){pattern}"):
        fc.vector_add(xp.array(np.zeros(4), "float32"), xp.array(np.zeros(b[1]), b[0]), out=out)
    np.testing.assert_array_equal(xp.numpy(out), -7)


def test_add_refuses_nothing(xp):
    with pytest.raises(ValueError, match=r"b is missing"):
        fc.vector_add(xp.array(np.zeros(4), "float32"), None)


def test_add_refuses_a_shifted_overlap(xp):
    x = xp.array(np.arange(10.0), "float32")
    with pytest.raises(ValueError, match=r"overlap"):
        fc.vector_add(x[:9], x[:9], out=x[1:])
    np.testing.assert_array_equal(xp.numpy(x), np.arange(10.0))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -3])
def test_reduce(axis, op, dtype, xp, rng):
    x = rounded(rng.standard_normal((5, 37, 6)), dtype)
    out = fc.reduce(xp.array(x, dtype), op=op, axis=axis)
    exact = OPERATIONS[op](x, axis=axis)
    assert xp.dtype(out) == dtype
    assert tuple(out.shape) == np.shape(exact)
    if op in ("max", "min"):
        np.testing.assert_array_equal(xp.numpy(out), exact)
    else:  # one rounding of the result, and those of the sum in float32 or float64
        sums = UNIT["float64" if dtype == "float64" else "float32"] * np.abs(x).sum()
        np.testing.assert_allclose(xp.numpy(out), exact, rtol=UNIT[dtype], atol=4 * sums / (1 if op == "sum" else 37))


def test_sum_is_the_default(xp):
    x = xp.array(np.arange(12.0).reshape(3, 4), "float32")
    assert xp.numpy(fc.reduce(x)) == 66
    assert tuple(fc.reduce(x).shape) == ()


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("op", OPERATIONS)
def test_nan_comes_out(op, axis, xp):
    x = np.arange(12.0).reshape(3, 4)
    x[1, 2] = np.nan
    out = xp.numpy(fc.reduce(xp.array(x, "float32"), op=op, axis=axis))
    np.testing.assert_array_equal(np.isnan(out), np.isnan(OPERATIONS[op](x, axis=axis)))


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((3, 0), 1), ((3, 0), None)])
def test_nothing_to_reduce(shape, axis, xp):
    x = xp.array(np.zeros(shape), "float32")
    np.testing.assert_array_equal(xp.numpy(fc.reduce(x, "sum", axis)), np.zeros(shape[:axis] if axis else ()))
    assert np.isnan(xp.numpy(fc.reduce(x, "mean", axis))).all()
    for op in ("max", "min"):
        with pytest.raises(ValueError, match=r"max|min"):
            fc.reduce(x, op, axis)


@pytest.mark.parametrize("op", OPERATIONS)
def test_an_empty_result_is_fine(op, xp):
    assert tuple(fc.reduce(xp.array(np.zeros((0, 3)), "float32"), op, axis=1).shape) == (0,)


def test_halves_add_up_in_float32(xp):
    """A half accumulator stops growing at 2048."""
    x = xp.array(np.ones(70000), "float16")
    assert xp.numpy(fc.reduce(x, "mean")) == 1
    assert xp.numpy(fc.reduce(x[:50000], "sum")) == rounded(50000, "float16")


def test_a_long_sum_is_accurate(xp, rng):
    """10^6 numbers near 1: a sum one by one in float32 is off by more than a hundred times this bound."""
    x = rounded(1 + rng.random(10**6), "float32")
    np.testing.assert_allclose(xp.numpy(fc.reduce(xp.array(x, "float32"))), x.sum(), rtol=1e-6)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_any_axis_of_any_view(xp, shape, data):
    """Permuted, sliced views of random rank."""
    rng = np.random.default_rng(0)
    base = rounded(rng.standard_normal(shape), "float64")
    order = data.draw(st.permutations(range(len(shape))))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = xp.array(base, "float64")
    view = x.permute(*order) if xp.name == "torch" else x.transpose(*order)
    exact = base.transpose(order).sum(axis=axis)
    np.testing.assert_allclose(xp.numpy(fc.reduce(view, axis=axis)), exact, rtol=1e-12, atol=1e-12)


def test_reduce_into_out(xp, rng):
    x = xp.array(rng.standard_normal((4, 6)), "float32")
    out = xp.empty((12,))[::2]
    assert fc.reduce(x, "max", axis=0, out=out) is out
    np.testing.assert_array_equal(xp.numpy(out), xp.numpy(x).max(axis=0))


@pytest.mark.parametrize(
    ("words", "exception", "pattern"),
    [
        ({"op": "prod"}, ValueError, r"prod.*sum.*max.*min.*mean"),
        ({"axis": 2}, ValueError, r"2"),
        ({"axis": -3}, ValueError, r"-3"),
        ({"axis": 1.5}, TypeError, r"float|integer"),
    ],
)
def test_reduce_refuses(words, exception, pattern, xp):
    with pytest.raises(exception, match=pattern):
        fc.reduce(xp.array(np.zeros((3, 4)), "float32"), **words)


@pytest.mark.parametrize("axis", [2, -3, 2**31 - 1, -(2**63)])
def test_reduce_refuses_an_axis_that_is_none(axis, xp):
    """Also where `out` says what shape is wanted: no number stands for all axes."""
    out = xp.empty(())
    with pytest.raises(ValueError, match=f"axis={axis}.*rank 2"):
        fc.reduce(xp.array(np.zeros((3, 4)), "float32"), axis=axis, out=out)
    np.testing.assert_array_equal(xp.numpy(out), -7)


def test_reduce_refuses_integers(xp):
    with pytest.raises(TypeError, match=r"int32.*float16"):
        fc.reduce(xp.array(np.zeros(3), "int32"))
