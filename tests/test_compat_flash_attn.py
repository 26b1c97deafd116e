"""flashcore.compat.flash_attn: flash-attn's arguments and meaning, judged by attention written out in float64."""

import inspect
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flashcore.compat.flash_attn as fa  # noqa: E402

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
#: as flash-attn 2.8 documents them
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {TAIL}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}


@pytest.mark.parametrize("name", fa.__all__)
def test_the_arguments_are_flash_attns(name):
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == SIGNATURES[name]


# ---- the judge -------------------------------------------------------------------------------------------------------


def written_out(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, softmax_scale=None):
    """out (seqlen_q, heads, dim) and lse (heads, seqlen_q) of one sequence (seqlen, heads, dim), in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    j = torch.arange(k.shape[1], device=q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[:, None, None] * (i - j).abs()
    left, right = window_size
    unseen = torch.zeros(scores.shape[1:], dtype=torch.bool, device=q.device)
    if causal:
        unseen |= j > i
    if left >= 0:
        unseen |= j < i - left
    if right >= 0:
        unseen |= j > i + right
    scores = scores.masked_fill(unseen, -torch.inf)
    weights = torch.where(unseen.all(1)[:, None], 0.0, scores.softmax(-1).nan_to_num())
    return (weights @ v).transpose(0, 1), scores.logsumexp(-1)


def expected(q, k, v, alibi_slopes=None, **words):
    """The same of a batch (batch, seqlen, heads, dim): out, and lse (batch, heads, seqlen_q)."""
    slopes = [None] * len(q) if alibi_slopes is None else alibi_slopes.expand(len(q), -1)
    heads = [written_out(*x, alibi_slopes=s, **words) for *x, s in zip(q, k, v, slopes, strict=True)]
    return tuple(map(torch.stack, zip(*heads, strict=True)))


@pytest.fixture
def normal(place):
    generator = torch.Generator().manual_seed(0)

    def make(*shape, dtype=torch.float64, grad=False):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(place, dtype).requires_grad_(grad)

    return make


def gradients(out, inputs):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
    return torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True)


close = partial(torch.testing.assert_close, check_dtype=False)
EXACT = {"rtol": 1e-9, "atol": 1e-9}
#: float32's own rounding grows with the lengths; float16 and bfloat16 also round the weights and the results
ROUNDED = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}
SLOPES = [[0.5, 0.25, 0.125, 0.0625]]

WORDS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left": {"window_size": (3, -1)},
    "causal window": {"causal": True, "window_size": (2, 5)},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.7},
    "alibi": {"alibi_slopes": SLOPES[0]},
    "alibi of each": {"alibi_slopes": SLOPES + [[1.0, 0.5, 0.3, 0.1]], "causal": True},
}


def placed(words, place):
    return {n: torch.tensor(w, device=place) if n == "alibi_slopes" else w for n, w in words.items()}


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(5, 5), (3, 9), (9, 4)], ids=str)
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_values_lse_and_gradients(words, lengths, normal, place):
    """seqlen_q > seqlen_k leaves causal rows without any key: 0 there, and -inf."""
    words = placed(words, place)
    q = normal(2, lengths[0], 4, 8, grad=True)
    k, v = (normal(2, lengths[1], 2, 8, grad=True) for _ in range(2))
    out, lse, probabilities = fa.flash_attn_func(q, k, v, return_attn_probs=True, **words)
    true_out, true_lse = expected(q, k, v, **words)
    close(out, true_out, **EXACT)
    close(lse, true_lse, **EXACT)
    assert probabilities.numel() == 0
    for mine, true in zip(gradients(out, (q, k, v)), gradients(true_out, (q, k, v)), strict=True):
        close(mine, true, **EXACT)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_fast_kernels_agree(words, dtype, normal, place):
    words = placed(words, place)
    q, k, v = (normal(2, 33, heads, 64, dtype=dtype, grad=True) for heads in (4, 2, 2))
    out = fa.flash_attn_func(q, k, v, **words)
    true = expected(q, k, v, **words)[0]
    assert out.dtype == dtype
    tolerance = {"rtol": ROUNDED[dtype], "atol": ROUNDED[dtype]}
    close(out.double(), true, **tolerance)
    for mine, exact in zip(gradients(out, (q, k, v)), gradients(true, (q, k, v)), strict=True):
        close(mine, exact, **tolerance)


def test_packed_forms_are_the_same_call(normal):
    qkv = normal(2, 6, 3, 4, 8, grad=True)
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    out = fa.flash_attn_func(*qkv.unbind(2), causal=True)
    for packed in (fa.flash_attn_qkvpacked_func(qkv, causal=True), fa.flash_attn_kvpacked_func(q, kv, causal=True)):
        assert torch.equal(packed, out)
        assert torch.equal(*(gradients(x, qkv)[0] for x in (packed, out)))


def test_a_transposed_head_dim_is_taken(normal):
    q = normal(1, 2, 8, 5).transpose(2, 3)
    close(fa.flash_attn_func(q, q, q), expected(q, q, q)[0], **EXACT)


def test_dropout_drops_and_scales_and_follows_torchs_seed(normal, place):
    q, k = normal(1, 40, 2, 32), normal(1, 32, 2, 32)
    eye = torch.eye(32, dtype=torch.float64, device=place)[None, :, None].expand(1, 32, 2, 32)  # out is the weights
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(fa.flash_attn_func(q, k, eye, 0.25))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    kept = results[0] != 0
    assert 0.7 < kept.double().mean() < 0.8  # 2560 draws: 5 sigma are 0.043
    close(results[0][kept], expected(q, k, eye)[0][kept] / 0.75, **EXACT)


def test_deterministic_gradients_are_the_same_bits(normal):
    q, k, v = (normal(2, 70, 2, 32, dtype=torch.float32, grad=True) for _ in range(3))
    runs = [gradients(fa.flash_attn_func(q, k, v, deterministic=True), (q, k, v)) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_compiled_as_one_graph(normal):
    q, k, v = (normal(1, 6, 2, 8, grad=True) for _ in range(3))
    compiled = torch.compile(fa.flash_attn_func, fullgraph=True, backend="aot_eager")
    out, plain = (call(q, k, v, causal=True, window_size=(2, 0)) for call in (compiled, fa.flash_attn_func))
    close(out, plain, **EXACT)
    for mine, true in zip(gradients(out, (q, k, v)), gradients(plain, (q, k, v)), strict=True):
        close(mine, true, **EXACT)


# ---- packed sequences ------------------------------------------------------------------------------------------------

ROWS_Q, ROWS_K = [0, 4, 4, 9], [0, 6, 9, 12]  # one sequence without queries, one with more queries than keys


def sequences(q, k, v, alibi_slopes=None, **words):
    """The judge's out (total, heads, dim) and lse (heads, total) of sequences packed by ROWS_Q and ROWS_K."""
    parts = []
    for b in range(3):
        rows, keys = slice(*ROWS_Q[b : b + 2]), slice(*ROWS_K[b : b + 2])
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        parts.append(written_out(q[rows], k[keys], v[keys], alibi_slopes=slopes, **words))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


@pytest.fixture
def lengths(place):
    return *(torch.tensor(rows, dtype=torch.int32, device=place) for rows in (ROWS_Q, ROWS_K)), 5, 6


PACKED_WORDS = WORDS | {"alibi of each": {"alibi_slopes": SLOPES * 2 + [[1.0, 0.5, 0.3, 0.1]], "causal": True}}


@pytest.mark.parametrize("words", PACKED_WORDS.values(), ids=PACKED_WORDS)
def test_varlen_values_lse_and_gradients(words, normal, lengths, place):
    words = placed(words, place)
    q, k, v = normal(9, 4, 8, grad=True), normal(12, 2, 8, grad=True), normal(12, 2, 8, grad=True)
    out, lse, _ = fa.flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True, **words)
    true_out, true_lse = sequences(q, k, v, **words)
    close(out, true_out, **EXACT)
    close(lse, true_lse, **EXACT)
    for mine, true in zip(gradients(out, (q, k, v)), gradients(true_out, (q, k, v)), strict=True):
        close(mine, true, **EXACT)


def test_varlen_packed_forms_are_the_same_call(normal, lengths):
    qkv = normal(9, 3, 4, 8, grad=True)
    rows, longest = lengths[0], lengths[2]
    out = fa.flash_attn_varlen_func(*qkv.unbind(1), rows, rows, longest, longest, causal=True)
    three = fa.flash_attn_varlen_qkvpacked_func(qkv, rows, longest, causal=True)
    two = fa.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], rows, rows, longest, longest, causal=True)
    for packed in (three, two):
        assert torch.equal(packed, out)
        assert torch.equal(*(gradients(x, qkv)[0] for x in (packed, out)))


@pytest.mark.parametrize("words", PACKED_WORDS.values(), ids=PACKED_WORDS)
def test_varlen_keys_in_pages(words, normal, lengths, place):
    words = placed(words, place)
    q, k, v = normal(9, 4, 8), normal(12, 2, 8), normal(12, 2, 8)
    table = torch.tensor([[5, 0], [3, 3], [1, 3]], dtype=torch.int32, device=place)
    pages = normal(2, 6, 4, 2, 8)
    for b in range(3):
        for j in range(ROWS_K[b + 1] - ROWS_K[b]):
            pages[:, table[b, j // 4], j % 4] = torch.stack((k, v))[:, ROWS_K[b] + j]
    out, lse, _ = fa.flash_attn_varlen_func(q, *pages, *lengths, return_attn_probs=True, block_table=table, **words)
    true_out, true_lse = sequences(q, k, v, **words)
    close(out, true_out, **EXACT)
    close(lse, true_lse, **EXACT)


# ---- the cache -------------------------------------------------------------------------------------------------------


def rotated(x, start, cos, sin, interleaved, moving=True):
    """Rotary embedding of (batch, seqlen, heads, dim), as complex numbers."""
    half = cos.shape[1]
    order = torch.arange(2 * half).reshape(half, 2) if interleaved else torch.arange(2 * half).reshape(2, half).T
    positions = start[:, None] + torch.arange(x.shape[1], device=x.device) * moving
    turn = torch.complex(cos[positions], sin[positions])[:, :, None]
    turned = torch.view_as_real(torch.view_as_complex(x[..., order.to(x.device)].contiguous()) * turn)
    y = x.clone()
    y[..., order.flatten().to(x.device)] = turned.flatten(-2)
    return y


CACHE_WORDS = {n: WORDS[n] for n in ("plain", "causal", "window", "causal window", "softcap", "alibi")}
HELD = [3, 0]


@pytest.fixture
def cache(normal, place):
    """k_cache and v_cache of two sequences with 3 and 0 keys, and these numbers."""
    return *(normal(2, 12, 2, 8) for _ in range(2)), torch.tensor(HELD, dtype=torch.int32, device=place)


def held_keys(caches, added):
    """Each sequence's keys and values, as lists."""
    return [[x[b, : HELD[b] + added] for b in range(2)] for x in caches]


@pytest.mark.parametrize("rotary", [None, False, True], ids=["no rotary", "halves", "neighbours"])
@pytest.mark.parametrize("words", CACHE_WORDS.values(), ids=CACHE_WORDS)
@pytest.mark.parametrize("new", [(1, 1), (3, 3), (2, 4)], ids=str)
def test_new_keys_are_written_and_attended_to(new, words, rotary, normal, cache, place):
    """Rotary: queries are at cache_seqlens + i, but all at cache_seqlens where neither causal nor windowed."""
    words = placed(words, place)
    *caches, held = cache
    q, k, v = normal(2, new[0], 4, 8), normal(2, new[1], 2, 8), normal(2, new[1], 2, 8)
    given, q_turned, k_turned = {}, q, k
    if rotary is not None:
        angle = normal(12, 3)
        given = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "rotary_interleaved": rotary}
        moving = "causal" in words or "window_size" in words
        q_turned, k_turned = (
            rotated(x, held, angle.cos(), angle.sin(), rotary, m) for x, m in ((q, moving), (k, True))
        )
    truth = [x.clone() for x in caches]
    for x, added in zip(truth, (k_turned, v), strict=True):
        for b in range(2):
            x[b, HELD[b] : HELD[b] + new[1]] = added[b]

    out, lse = fa.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=held, return_softmax_lse=True, **given, **words
    )
    true_out, true_lse = expected(q_turned, *held_keys(truth, new[1]), **words)
    close(out, true_out, **EXACT)
    close(lse, true_lse, **EXACT)
    for mine, true in zip(caches, truth, strict=True):
        close(mine, true, **EXACT)


@pytest.mark.parametrize("count", ["int", "none", "splits"])
def test_lengths_of_the_cache(count, normal, cache):
    k_cache, v_cache, _ = cache
    q = normal(2, 2, 4, 8)
    given = {"int": {"cache_seqlens": 7}, "none": {}, "splits": {"cache_seqlens": 7, "num_splits": 3}}[count]
    keys = 12 if count == "none" else 7
    out = fa.flash_attn_with_kvcache(q, k_cache, v_cache, causal=True, **given)
    close(out, expected(q, k_cache[:, :keys], v_cache[:, :keys], causal=True)[0], **EXACT)


def test_the_cache_of_another_sequence(normal, place):
    k_cache, v_cache = normal(2, 5, 12, 2, 8)
    index = torch.tensor([4, 1], dtype=torch.int32, device=place)
    q, k, v = normal(2, 1, 4, 8), normal(2, 1, 2, 8), normal(2, 1, 2, 8)
    before = k_cache.clone()
    held = torch.tensor(HELD, dtype=torch.int32, device=place)
    out = fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=held, cache_batch_idx=index, causal=True)
    before[4, 3], before[1, 0] = k[0, 0], k[1, 0]
    assert torch.equal(k_cache, before)
    close(out, expected(q, *held_keys((k_cache[index], v_cache[index]), 1), causal=True)[0], **EXACT)


@pytest.mark.parametrize("indexed", [False, True], ids=["own cache", "cache of another"])
@pytest.mark.parametrize("rotary", [False, True], ids=["no rotary", "rotary"])
@pytest.mark.parametrize("words", CACHE_WORDS.values(), ids=CACHE_WORDS)
def test_padding_in_front_of_the_keys(words, rotary, indexed, normal, place):
    """Keys are written, and places counted for the rotary embedding, as if there were no padding."""
    words = placed(words, place)
    k_cache, v_cache = normal(2, 4, 12, 2, 8)
    owner = torch.tensor([3, 1] if indexed else [0, 1], dtype=torch.int32, device=place)
    if not indexed:
        k_cache, v_cache = k_cache[:2], v_cache[:2]
    held, padding = (torch.tensor(x, dtype=torch.int32, device=place) for x in ([7, 4], [2, 0]))
    q, k, v = normal(2, 3, 4, 8), normal(2, 3, 2, 8), normal(2, 3, 2, 8)
    given, q_turned, k_turned = {"cache_batch_idx": owner} if indexed else {}, q, k
    if rotary:
        angle = normal(12, 3)
        cos, sin = angle.cos(), angle.sin()
        given |= {"rotary_cos": cos, "rotary_sin": sin}
        moving = "causal" in words or "window_size" in words
        q_turned, k_turned = (rotated(x, held, cos, sin, True, m) for x, m in ((q, moving), (k, True)))
    truth = k_cache.clone(), v_cache.clone()
    for x, added in zip(truth, (k_turned, v), strict=True):
        for b, start in enumerate(held):
            x[owner[b], start : start + 3] = added[b]
    seen = [[x[owner[b], padding[b] : held[b] + 3] for b in range(2)] for x in truth]

    out, lse = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=held, cache_leftpad=padding, return_softmax_lse=True, **given, **words
    )
    true_out, true_lse = expected(q_turned, *seen, **words)
    close(out, true_out, **EXACT)
    close(lse, true_lse, **EXACT)
    for mine, true in zip((k_cache, v_cache), truth, strict=True):
        close(mine, true, **EXACT)


def test_padding_leaves_no_more_room_than_there_is(normal, cache, place):
    if place != "cpu":
        pytest.skip("values on a GPU are not read before the launch")
    *caches, _ = cache
    padding = torch.tensor([2, 2], dtype=torch.int32)
    new = normal(2, 3, 2, 8)
    with pytest.raises(ValueError, match="block_table"):
        fa.flash_attn_with_kvcache(
            normal(2, 3, 4, 8), *caches, new, new, cache_seqlens=10, cache_leftpad=padding, causal=True
        )


def test_a_cache_in_pages(normal, cache, place):
    k_cache, v_cache, held = cache
    table = torch.tensor([[5, 0, 2], [3, 1, 4]], dtype=torch.int32, device=place)
    pages = normal(2, 6, 4, 2, 8)
    for b in range(2):
        for p in range(3):
            pages[0, table[b, p]], pages[1, table[b, p]] = (x[b, 4 * p : 4 * p + 4] for x in (k_cache, v_cache))
    q, k, v = normal(2, 2, 4, 8), normal(2, 2, 2, 8), normal(2, 2, 2, 8)
    words = {"cache_seqlens": held, "causal": True, "return_softmax_lse": True}
    paged = fa.flash_attn_with_kvcache(q, *pages, k, v, block_table=table, **words)
    plain = fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **words)
    for mine, true in zip(paged, plain, strict=True):
        close(mine, true, **EXACT)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(normal, match, error=ValueError, call=fa.flash_attn_with_kvcache, **given):
    tensors = {name: normal(1, 4, 2, 8) for name in ("q", "k_cache", "v_cache")}
    with pytest.raises(error, match=match):
        call(**(tensors | given))


def test_what_the_cache_call_refuses(normal, place):
    index = torch.zeros(1, dtype=torch.int32, device=place)
    new = {"k": normal(1, 1, 2, 8), "v": normal(1, 1, 2, 8)}
    refused(normal, "cache_leftpad and block_table given; only one", cache_leftpad=index, block_table=index[:, None])
    refused(normal, "without a gap", k_cache=normal(1, 8, 2, 8)[:, :4].expand(2, 4, 2, 8), cache_leftpad=index)
    refused(normal, "go together", k=new["k"], cache_seqlens=1)
    refused(normal, "without cache_seqlens", **new)
    refused(normal, "rotary_cos given without k", rotary_cos=normal(4, 4), rotary_sin=normal(4, 4))
    refused(normal, "only one", cache_batch_idx=index, block_table=index[:, None])


@pytest.mark.parametrize("name", fa.__all__)
def test_arrays_that_are_no_tensors_are_refused(name):
    call = getattr(fa, name)
    x = np.zeros((2, 4, 2, 8), np.float32)
    given = {n: x for n in ("q", "k", "v", "kv", "qkv", "k_cache", "v_cache") if n in SIGNATURES[name].split(", ")}
    given |= {n: 2 for n in SIGNATURES[name].split(", ") if n.startswith(("cu_seqlens", "max_seqlen"))}
    with pytest.raises(TypeError, match=r"k?q?k?v?(_cache)?: numpy\.ndarray given; .* takes torch tensors"):
        call(**given)


def test_wrongly_packed_tensors_are_refused(normal):
    x = normal(2, 4, 2, 8)
    with pytest.raises(ValueError, match=r"qkv of shape \(2, 4, 2, 2, 8\) given; .*3, heads"):
        fa.flash_attn_qkvpacked_func(normal(2, 4, 2, 2, 8))
    with pytest.raises(ValueError, match=r"kv of shape .*\(batch, seqlen, 2, heads, head_dim\) is needed"):
        fa.flash_attn_kvpacked_func(x, x)


def test_what_keys_in_pages_refuse(normal, lengths, place):
    table = torch.zeros(3, 2, dtype=torch.int32, device=place)
    q, pages = normal(9, 4, 8), normal(6, 4, 2, 8)
    with pytest.raises(ValueError, match="without dropout"):
        fa.flash_attn_varlen_func(q, pages, pages, *lengths, 0.1, block_table=table)


def test_calls_for_inference_refuse_a_backward_pass(normal, cache, place):
    """As flash-attn's they run where gradients are recorded."""
    *caches, held = cache
    q, packed = normal(2, 1, 4, 8, grad=True), normal(2, 4, 8, grad=True)
    out, lse = fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=held, return_softmax_lse=True)
    one_each = torch.tensor([0, 1, 2], dtype=torch.int32, device=place)
    table = torch.zeros(2, 1, dtype=torch.int32, device=place)
    paged = fa.flash_attn_varlen_func(packed, *caches, one_each, one_each, 1, 1, block_table=table)
    for result in (out, lse, paged):
        with pytest.raises(RuntimeError, match="has no gradient; call it under torch.no_grad"):
            result.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert torch.equal(fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=held), out)
