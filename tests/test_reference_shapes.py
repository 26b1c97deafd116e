"""The five reference shapes: float16, head_dim 64, largest error at most 1e-3 and mean error at most 1e-4."""

import flashcore as fc
import numpy as np
import pytest
import reference

SHAPES = {
    "tiny": (1, 1, 32, 64),
    "small": (1, 2, 64, 64),
    "medium": (1, 4, 128, 64),
    "mission": (1, 8, 512, 64),
    "multi_batch": (4, 8, 256, 64),
}


@pytest.mark.parametrize("seed", [0, 42, 12345])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reference_shape(shape, seed, xp):
    q, k, v = np.random.default_rng(seed).standard_normal((3, *shape)).astype(np.float16)
    exact, _ = reference.attention(*(x.astype(np.float64) for x in (q, k, v)))
    out = fc.attention(*(xp.array(x, "float16") for x in (q, k, v)))
    assert xp.dtype(out) == "float16"
    error = np.abs(xp.numpy(out) - exact)
    assert not np.isnan(error).any()
    assert error.max() <= 1e-3
    assert error.mean() <= 1e-4
