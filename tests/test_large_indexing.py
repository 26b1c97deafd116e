"""Offsets of 64 bits: strides beyond 2^31 elements, laid over sparse memory so that little of it is touched."""

import flashcore as fc
import numpy as np
import pytest
import reference
from cases import rounded
from reference import Decode, Options

pytestmark = pytest.mark.usefixtures("best_and_reference")

FAR = 2**31 + 64  # elements: beyond what 32 bits can count, signed


class Sparse:
    """Views with huge strides: a file with holes on the CPU, a plain allocation on the GPU."""

    def __init__(self, xp, folder):
        self.xp, self.folder, self.count = xp, folder, 0

    def __call__(self, values, axis, stride=FAR):
        """`values` in float16, with `stride` elements between neighbours along `axis`."""
        values = np.asarray(values, np.float16)
        rows = [values.strides[a] // 2 for a in range(values.ndim)]
        rows[axis] = stride
        elements = sum((n - 1) * s for n, s in zip(values.shape, rows, strict=True)) + 1
        if self.xp.device == "cpu":
            self.count += 1
            file = self.folder / f"sparse{self.count}"
            whole = np.memmap(file, np.float16, "w+", shape=(elements,))
            view = np.lib.stride_tricks.as_strided(whole, values.shape, [2 * s for s in rows]).view(np.ndarray)
            view[:] = values
        else:
            torch = pytest.importorskip("torch")
            whole = torch.empty(elements, dtype=torch.float16, device="cuda")
            view = whole.as_strided(values.shape, rows)
            view.copy_(torch.from_numpy(values))
        return view


@pytest.fixture
def sparse(xp, tmp_path):
    if xp.device == "cuda" and xp.name != "torch":
        pytest.skip("needs torch for huge strides on the GPU")
    return Sparse(xp, tmp_path)


def halves(rng, *shape):
    return rounded(rng.standard_normal(shape), "float16")


def close(actual, exact):
    np.testing.assert_allclose(actual, exact, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_inputs(which, axis, xp, sparse, rng):
    tensors = {name: halves(rng, 2, 2, 2, 8) for name in "qkv"}
    arrays = {name: sparse(x, axis) if name == which else xp.array(x, "float16") for name, x in tensors.items()}
    exact, _ = reference.attention(*tensors.values())
    close(xp.numpy(fc.attention(*arrays.values())), exact)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "row"])
def test_output(axis, xp, sparse, rng):
    tensors = [halves(rng, 2, 2, 2, 8) for _ in range(3)]
    out = sparse(np.zeros((2, 2, 2, 8)), axis)
    fc.attention(*(xp.array(x, "float16") for x in tensors), out=out)
    close(xp.numpy(out), reference.attention(*tensors)[0])


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["batch", "head", "query", "key"])
def test_bias(axis, xp, sparse, rng):
    tensors = [halves(rng, 2, 2, 2, 8) for _ in range(3)]
    bias = halves(rng, 2, 2, 2, 2)
    out = fc.attention(*(xp.array(x, "float16") for x in tensors), bias=sparse(bias, axis))
    close(xp.numpy(out), reference.attention(*tensors, Options(bias=bias))[0])


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["dout", "q", "k", "v"])
def test_backward(which, xp, sparse, rng):
    tensors = [halves(rng, 2, 2, 2, 8) for _ in range(4)]
    arrays = [sparse(x, 2) if i == which else xp.array(x, "float16") for i, x in enumerate(tensors)]
    dout, q, k, v = arrays
    out, lse = fc.attention(q, k, v, return_lse=True)
    grads = fc.attention_backward(dout, q, k, v, out, lse)
    exact = reference.attention_backward(*tensors)
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        close(xp.numpy(grad), exact[name])


def test_gradients_to_write(xp, sparse, rng):
    tensors = [halves(rng, 2, 2, 2, 8) for _ in range(4)]
    dout, q, k, v = (xp.array(x, "float16") for x in tensors)
    out, lse = fc.attention(q, k, v, return_lse=True)
    wide = {name: sparse(np.zeros((2, 2, 2, 8)), 1) for name in ("dq", "dk", "dv")}
    fc.attention_backward(dout, q, k, v, out, lse, **wide)
    exact = reference.attention_backward(*tensors)
    for name, grad in wide.items():
        close(xp.numpy(grad), exact[name])


def test_packed_rows(xp, sparse, rng):
    tensors = [halves(rng, 3, 2, 8) for _ in range(3)]
    cuts = xp.array([0, 1, 3], "int32")
    out = fc.attention_varlen(*(sparse(x, 0, 2**30 + 8) for x in tensors), cuts, cuts)
    close(xp.numpy(out), reference.attention_varlen(*tensors, [0, 1, 3], [0, 1, 3])[0])


def test_pages(xp, sparse, rng):
    """Page 2 of a cache begins beyond element 2^31."""
    q, k, v = halves(rng, 1, 2, 1, 8), halves(rng, 3, 2, 4, 8), halves(rng, 3, 2, 4, 8)
    table, lengths = np.array([[2, 1]], np.int32), np.array([6], np.int32)
    new = halves(rng, 1, 2, 1, 8), halves(rng, 1, 2, 1, 8)
    caches = [sparse(x, 0, 2**30 + 64) for x in (k, v)]
    given = dict(zip(("k_new", "v_new"), (xp.array(x, "float16") for x in new), strict=True))
    arrays = xp.array(q, "float16"), *caches, xp.array(lengths, "int32"), xp.array(table, "int32")
    out = fc.attention_decode(*arrays, **given)
    exact, _, k_after, v_after = reference.attention_decode(q, k, v, Decode(lengths, table, *new))
    close(xp.numpy(out), exact)
    np.testing.assert_array_equal(xp.numpy(caches[0]), k_after)
    np.testing.assert_array_equal(xp.numpy(caches[1]), v_after)


def test_primitives(xp, sparse, rng):
    x = halves(rng, 2, 2, 8)
    np.testing.assert_array_equal(xp.numpy(fc.vector_add(sparse(x, 1), sparse(x, 0))), 2 * x)
    close(xp.numpy(fc.reduce(sparse(x, 1), axis=1)), x.sum(axis=1))
