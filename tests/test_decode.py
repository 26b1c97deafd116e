"""attention_decode(): a few queries against a key/value cache, contiguous or paged, with append and rotary."""

import all_kernels
import flashcore as fc
import numpy as np
import pytest
import reference
from cases import ALL_FLOATS, assert_near, lse_dtype, rounded
from reference import Decode, Options, framework_arithmetic

LENGTHS = np.array([37, 0, 5, 64], np.int32)


class Cache:
    """A cache of four sequences, contiguous or in shuffled pages; unused places hold `filler`."""

    def __init__(self, rng, dtype="float32", heads=(4, 2), dim=(16, 16), capacity=64, page=None, filler=0.0):
        self.dtype, self.heads, self.dim, self.page = dtype, heads, dim, page
        self.lengths, self.table = LENGTHS, None
        rows = (len(LENGTHS), heads[1], capacity)
        if page is not None:
            slots = -(-capacity // page)
            pages = len(LENGTHS) * slots + 3
            self.table = rng.permutation(pages)[: len(LENGTHS) * slots].reshape(len(LENGTHS), slots).astype(np.int32)
            rows = (pages, heads[1], page)
        self.k = np.full((*rows, dim[0]), filler)
        self.v = np.full((*rows, dim[1]), filler)
        for b, length in enumerate(LENGTHS):
            for j in range(length):
                self.k[self.place(b, j)] = rounded(rng.standard_normal((heads[1], dim[0])), dtype)
                self.v[self.place(b, j)] = rounded(rng.standard_normal((heads[1], dim[1])), dtype)

    def place(self, b, j):
        return (b, slice(None), j) if self.page is None else (self.table[b, j // self.page], slice(None), j % self.page)


def queries(rng, cache, seqlen=1):
    return rounded(rng.standard_normal((len(LENGTHS), cache.heads[0], seqlen, cache.dim[0])), cache.dtype)


def turn(x, layout):
    return x if layout == "bhsd" else np.swapaxes(x, 1, 2)


def call(xp, cache, q, new=None, rotary=None, layout="bhsd", **words):
    """out, lse and both caches after the call, in bhsd."""
    caches = [xp.array(turn(x, layout), cache.dtype) for x in (cache.k, cache.v)]
    given = {}
    if cache.table is not None:
        given["block_table"] = xp.array(cache.table, "int32")
    if new is not None:
        given.update(zip(("k_new", "v_new"), (xp.array(turn(x, layout), cache.dtype) for x in new), strict=True))
    if rotary is not None:
        given.update(zip(("rotary_cos", "rotary_sin"), (xp.array(x, "float32") for x in rotary), strict=True))
    lengths = xp.array(cache.lengths, "int32")
    query = xp.array(turn(q, layout), cache.dtype)
    out, lse = fc.attention_decode(query, *caches, lengths, layout=layout, return_lse=True, **given, **words)
    assert xp.dtype(out) == cache.dtype
    return turn(xp.numpy(out), layout), xp.numpy(lse), *(turn(xp.numpy(c), layout) for c in caches)


def check_each_kernel(xp, cache, q, new=None, rotary=None, interleaved=False, layout="bhsd", given=None, **words):
    """`given` are the tensors among `words` as arrays of the framework."""
    arrays = {**words, **(given or {}), "rotary_interleaved": interleaved}
    for name, actual in all_kernels.each(
        xp.device, lambda kernel: call(xp, cache, q, new, rotary, layout, kernel=kernel, **arrays)
    ):
        check(actual, cache, q, new, rotary, interleaved, name, **words)


def check(actual, cache, q, new=None, rotary=None, interleaved=False, kernel="the chosen kernel", **words):
    words = {"causal": "bottom_right", **words}
    words["causal"] = "bottom_right" if words["causal"] is True else words["causal"]
    new, rotary = new or (None, None), rotary or (None, None)
    decode = Decode(cache.lengths, cache.table, *new, *rotary, interleaved)
    inputs = (q, cache.k, cache.v, decode, Options(**words))
    exact = reference.attention_decode(*inputs)
    stepwise = reference.attention_decode(*inputs, framework_arithmetic(cache.dtype))
    assert_near(actual[0], exact[0], stepwise[0], cache.dtype, 80, f"out by {kernel}")
    assert_near(actual[1], exact[1], stepwise[1], lse_dtype(cache.dtype), 80, f"lse by {kernel}")
    for b, length in enumerate(cache.lengths):
        for i in range(0 if new[0] is None else new[0].shape[2]):
            place = cache.place(b, int(length) + i)
            assert_near(actual[2][place], exact[2][place], stepwise[2][place], cache.dtype, 2, "k_cache")
            np.testing.assert_array_equal(actual[3][place], exact[3][place])


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("page", [None, 1, 3, 16, 64, 256])
@pytest.mark.parametrize("seqlen_q", [1, 2, 4])
def test_matches_the_definition(seqlen_q, page, dtype, layout, xp, rng):
    cache = Cache(rng, dtype, page=page)
    q = queries(rng, cache, seqlen_q)
    check_each_kernel(xp, cache, q, layout=layout)


@pytest.mark.parametrize("page", range(1, 257, 17))
def test_any_page_size(page, xp, rng):
    cache = Cache(rng, "float16", page=page)
    q = queries(rng, cache)
    check_each_kernel(xp, cache, q)


@pytest.mark.usefixtures("best_and_reference")
@pytest.mark.parametrize("page", [None, 7])
def test_pages_and_places_that_are_not_used_never_matter(page, xp, rng):
    """NaN wherever no key is: behind the lengths, in the last page of a sequence, in pages of nobody."""
    cache = Cache(rng, page=page, filler=np.nan)
    q = queries(rng, cache, 3)
    out, lse, *_ = call(xp, cache, q)
    assert not np.isnan(out).any()
    assert not np.isnan(lse).any()
    clean = Cache(rng, page=page)
    clean.table, clean.k, clean.v = cache.table, np.nan_to_num(cache.k), np.nan_to_num(cache.v)
    check((out, lse, cache.k, cache.v), clean, q)


@pytest.mark.usefixtures("best_and_reference")
def test_page_ids_beyond_the_length_are_not_looked_at(xp, rng):
    """A block table is padded with whatever: only the pages that hold keys count."""
    cache = Cache(rng, page=8)
    q = queries(rng, cache)
    expected = call(xp, cache, q)
    for b, length in enumerate(LENGTHS):
        cache.table[b, -(-int(length) // 8) :] = -(2**31) if b % 2 else 2**31 - 1
    for a, b in zip(call(xp, cache, q), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("best_and_reference")
def test_two_sequences_may_share_pages(xp, rng):
    cache = Cache(rng, page=16)
    cache.lengths = np.array([32, 32, 20, 17], np.int32)
    cache.table[1:, 0] = cache.table[0, 0]
    cache.k = rounded(rng.standard_normal(cache.k.shape), "float32")
    cache.v = rounded(rng.standard_normal(cache.v.shape), "float32")
    q = queries(rng, cache)
    check_each_kernel(xp, cache, q)


@pytest.mark.parametrize(
    "words", [{"causal": False}, {"causal": True}, {"window": (5, 0)}, {"softcap": 2.0}, {"scale": 0.9}], ids=str
)
@pytest.mark.parametrize("page", [None, 5])
def test_options(words, page, xp, rng):
    cache = Cache(rng, page=page)
    q = queries(rng, cache, 3)
    check_each_kernel(xp, cache, q, **words)


@pytest.mark.parametrize("page", [None, 16])
def test_sinks_alibi_mask_and_bias(page, xp, rng):
    cache = Cache(rng, page=page)
    q = queries(rng, cache, 2)
    tensors = {
        "sinks": rounded(rng.standard_normal(4), "float32"),
        "alibi_slopes": rounded(rng.random(4), "float32"),
        "bias": rounded(rng.standard_normal((4, 1, 2, 64)), "float32"),
        "mask": rng.random((1, 1, 2, 64)) < 0.8,
    }
    given = {n: xp.array(t, "bool" if n == "mask" else "float32") for n, t in tensors.items()}
    check_each_kernel(xp, cache, q, given=given, **tensors)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (3, 1), (40, 1)])
@pytest.mark.parametrize("dim", [(64, 64), (40, 24), (17, 3)])
def test_heads_and_dims(heads, dim, xp, rng):
    cache = Cache(rng, "float16", heads=heads, dim=dim, page=4)
    q = queries(rng, cache, 2)
    check_each_kernel(xp, cache, q)


@pytest.mark.parametrize("words", ["q1 k8192 h71/1 d64", "q1 k8192 h32/4 d128", "q16 k8192 h4 d128"])
def test_few_queries_are_split_over_the_keys_on_the_cpu(words):
    """One query does so however many heads share its keys; before, more than 16 left all threads but one idle."""
    assert "kernel:    cpu.decode" in fc.explain(f"decode fp32 b1 {words}", device="cpu")


def new_keys(rng, cache, count):
    shape = (len(LENGTHS), cache.heads[1], count)
    return tuple(rounded(rng.standard_normal((*shape, dim)), cache.dtype) for dim in cache.dim)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("page", [None, 1, 6, 64])
def test_append_writes_the_cache_then_attends(page, count, layout, xp, rng):
    cache = Cache(rng, capacity=72, page=page)
    q, new = queries(rng, cache, count), new_keys(rng, cache, count)
    check_each_kernel(xp, cache, q, new, layout=layout)
    actual = call(xp, cache, q, new, layout=layout)
    untouched = np.ones(cache.k.shape[:3], bool)
    for b, length in enumerate(LENGTHS):
        for i in range(count):
            untouched[cache.place(b, int(length) + i)] = False
    for after, before in ((actual[2], cache.k), (actual[3], cache.v)):
        np.testing.assert_array_equal(after[untouched], rounded(before, cache.dtype)[untouched])


def rotary_tables(dim, positions=80):
    angles = np.outer(np.arange(positions), 10000.0 ** (-np.arange(dim // 2) / (dim // 2)))
    return rounded(np.cos(angles), "float32"), rounded(np.sin(angles), "float32")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 10, 16])
@pytest.mark.parametrize("page", [None, 6])
def test_rotary(page, rotary_dim, interleaved, dtype, xp, rng):
    """q turns to the place of its query, k_new to its own; what is in the cache already was turned before."""
    cache = Cache(rng, dtype, capacity=72, page=page)
    q, new = queries(rng, cache, 3), new_keys(rng, cache, 3)
    check_each_kernel(xp, cache, q, new, rotary_tables(rotary_dim), interleaved)


@pytest.mark.usefixtures("best_and_reference")
def test_token_by_token_is_causal_attention(xp, rng):
    """Decoding a text one token at a time gives the rows of one causal forward call."""
    q, k, v = (rounded(x, "float32") for x in rng.standard_normal((3, 1, 2, 9, 16)))
    caches = [xp.array(np.full((1, 2, 12, 16), np.nan), "float32") for _ in range(2)]
    rows = []
    for i in range(9):
        now = slice(i, i + 1)
        new = {"k_new": xp.array(k[:, :, now], "float32"), "v_new": xp.array(v[:, :, now], "float32")}
        length = xp.array([i], "int32")
        rows.append(xp.numpy(fc.attention_decode(xp.array(q[:, :, now], "float32"), *caches, length, **new)))
    exact, _ = reference.attention(q, k, v, Options(causal=True))
    np.testing.assert_allclose(np.concatenate(rows, axis=2), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_small(dtype, xp, rng):
    cache = Cache(rng, dtype, capacity=66, page=5, filler=np.nan)
    q, new = queries(rng, cache, 2), new_keys(rng, cache, 2)
    for _, (out, lse, *_) in all_kernels.each(
        xp.device, lambda kernel: call(xp, cache, q, new, rotary_tables(8), kernel=kernel)
    ):
        assert not np.isnan(out).any()
        assert not np.isnan(lse).any()
