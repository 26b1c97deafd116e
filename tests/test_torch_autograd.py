"""flashcore.torch's calls: differentiable, judged by torch's gradcheck and its own attention."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flashcore.torch as fct  # noqa: E402


def leaf(*shape, place="cpu", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(place, dtype).requires_grad_()


WORDS = {
    "plain": {},
    "causal": {"causal": "bottom_right"},
    "top_left": {"causal": "top_left"},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 1.5, "scale": 0.7},
    "dropout": {"dropout_p": 0.3, "seed": 5},
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_gradcheck(words, place):
    q, k, v = leaf(2, 4, 3, 5, place=place), leaf(2, 2, 6, 5, place=place), leaf(2, 2, 6, 4, place=place)
    assert torch.autograd.gradcheck(lambda *x: fct.attention(*x, return_lse=True, **words), (q, k, v), fast_mode=True)


def test_gradcheck_of_bias_and_sinks(place):
    q, k, v = leaf(2, 4, 3, 5, place=place), leaf(2, 2, 6, 5, place=place), leaf(2, 2, 6, 4, place=place)
    bias, sinks = leaf(4, 3, 6, place=place), leaf(4, place=place)
    mask = torch.ones(3, 6, dtype=torch.bool, device=place)
    mask[:, 4] = False

    def call(q, k, v, bias, sinks):
        return fct.attention(q, k, v, bias=bias, sinks=sinks, mask=mask, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks), fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_agrees_with_torch(dtype, causal, place):
    mine = [leaf(2, 3, 17, 32, place=place, dtype=dtype, seed=s) for s in range(3)]
    exact = [x.detach().double().requires_grad_() for x in mine]
    theirs = [x.detach().clone().requires_grad_() for x in mine]
    dout = torch.randn(2, 3, 17, 32, generator=torch.Generator().manual_seed(9)).to(place, dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    out = fct.attention(*mine, causal=causal)
    out.backward(dout)
    reference = attend(*exact, is_causal=causal)
    reference.backward(dout.double())
    judge = attend(*theirs, is_causal=causal)
    judge.backward(dout)

    def error(a, b):
        return (a.double() - b).abs().max().item()

    unit = torch.finfo(dtype).eps
    for x, other, true in zip(
        [out, *(x.grad for x in mine)],
        [judge, *(x.grad for x in theirs)],
        [reference, *(x.grad for x in exact)],
        strict=True,
    ):
        assert x.dtype == dtype
        assert error(x, true) <= 2 * error(other, true) + 4 * unit * true.abs().max().item()


def test_a_step_of_training_lowers_the_loss(place):
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 48).to(place)
    x, target = (torch.randn(2, 7, 16, device=place) for _ in range(2))

    def loss():
        q, k, v = layer(x).reshape(2, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)
        out = fct.attention(q, k, v, causal=True)
        return (out.transpose(1, 2).reshape(2, 7, 16) - target).square().mean()

    before = loss()
    before.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    with torch.no_grad():
        for p in layer.parameters():
            p -= 0.1 * p.grad
    assert loss() < before


def test_only_wanted_gradients_are_computed(place):
    q, k, v = (leaf(1, 2, 5, 8, place=place, seed=s) for s in range(3))
    fct.attention(q, k.detach(), v).sum().backward()
    assert q.grad is not None
    assert k.grad is None
    assert v.grad is not None


def test_expanded_gradients_are_taken(place):
    """The gradient of .sum() is one number with stride 0."""
    q, k, v = (leaf(1, 2, 5, 8, place=place, seed=s) for s in range(3))
    fct.attention(q, k, v).sum().backward()
    summed = v.grad.clone()
    v.grad = None
    fct.attention(q, k, v).backward(torch.ones(1, 2, 5, 8, dtype=torch.float64, device=place))
    torch.testing.assert_close(summed, v.grad)


def test_without_grad_there_is_no_graph(place):
    q, k, v = (leaf(1, 2, 5, 8, place=place, seed=s) for s in range(3))
    with torch.no_grad():
        assert not fct.attention(q, k, v).requires_grad
    assert not fct.attention(*(x.detach() for x in (q, k, v))).requires_grad
    assert fct.attention(q, k, v).requires_grad


def test_differentiating_twice_is_a_clear_error(place):
    q, k, v = (leaf(1, 2, 5, 8, place=place, seed=s) for s in range(3))
    (gradient,) = torch.autograd.grad(fct.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiat|twice|once|gradient"):
        gradient.sum().backward()


def test_changed_inputs_are_noticed(place):
    """Backward after an in-place change would use the wrong numbers: torch's own check says so."""
    q, k, v = (leaf(1, 2, 5, 8, place=place, seed=s) for s in range(3))
    changed = k * 1
    out = fct.attention(q, changed, v)
    changed += 1
    with pytest.raises(RuntimeError, match=r"modified by an inplace"):
        out.sum().backward()


def test_dropout_follows_torchs_seed(place):
    q, k, v = (leaf(1, 2, 15, 8, place=place, seed=s).detach() for s in range(3))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(fct.attention(q, k, v, dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_raw_and_differentiable_calls_agree(place):
    import flashcore as fc

    q, k, v = (leaf(1, 2, 5, 8, place=place, seed=s).detach() for s in range(3))
    np.testing.assert_array_equal(fct.attention(q, k, v, causal=True).cpu(), fc.attention(q, k, v, causal=True).cpu())


def test_checkpointing(place):
    from torch.utils.checkpoint import checkpoint

    q, k, v = (leaf(1, 2, 5, 8, place=place, seed=s) for s in range(3))
    plain = torch.autograd.grad(fct.attention(q, k, v, causal=True).square().sum(), (q, k, v))
    again = checkpoint(lambda *x: fct.attention(*x, causal=True), q, k, v, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), (q, k, v)), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_are_those_of_the_raw_call(place):
    q, k = leaf(1, 2, 5, 8, place=place), leaf(1, 2, 7, 8, place=place)
    with pytest.raises(ValueError, match=r"top_left.*bottom_right"):
        fct.attention(q, k, k, causal=True)


# ---- the other calls -------------------------------------------------------------------------------------------------


def int32(*numbers, place="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=place)


@pytest.mark.parametrize("words", [{}, {"causal": "bottom_right", "window": (3, 0)}, {"softcap": 1.5}], ids=str)
def test_gradcheck_of_varlen(words, place):
    """Sequences of 3, 0 and 2 queries against 4, 1 and 2 keys."""
    q, k, v = leaf(5, 4, 5, place=place), leaf(7, 2, 5, place=place), leaf(7, 2, 3, place=place)
    bias, sinks = leaf(4, 1, 7, place=place), leaf(4, place=place)
    cuts = int32(0, 3, 3, 5, place=place), int32(0, 4, 5, 7, place=place)

    def call(q, k, v, bias, sinks):
        return fct.attention_varlen(q, k, v, *cuts, bias=bias, sinks=sinks, return_lse=True, **words)

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks), fast_mode=True)


def test_varlen_gradients_are_those_of_each_sequence(place):
    q, k, v = (leaf(9, 2, 8, place=place, seed=s) for s in range(3))
    cuts = int32(0, 5, 9, place=place)
    out = fct.attention_varlen(q, k, v, cuts, cuts, causal=True, max_seqlen_q=5, max_seqlen_k=5)
    parts = [
        fct.attention(*(x[None, a:b] for x in (q, k, v)), causal=True, layout="bshd")[0] for a, b in ((0, 5), (5, 9))
    ]
    torch.testing.assert_close(out, torch.cat(parts))
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    theirs = torch.autograd.grad(torch.cat(parts).square().sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, (2, 0), (1, 1)])
def test_gradcheck_of_decode(window, causal, layout, place):
    """Against a cache that is only read: 6 and 3 keys of room for 8."""
    tensors = leaf(2, 4, 2, 5, place=place), leaf(2, 2, 8, 5, place=place), leaf(2, 2, 8, 4, place=place)
    sinks, held = leaf(4, place=place), int32(6, 3, place=place)
    words = {"causal": causal, "window": window, "layout": layout, "return_lse": True}
    words["alibi_slopes"] = torch.tensor([1.0, 0.5, 0.25, 0.125], device=place)

    def call(q, k, v, sinks):
        if layout == "bshd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return fct.attention_decode(q, k, v, held, sinks=sinks, **words)

    assert torch.autograd.gradcheck(call, (*tensors, sinks), fast_mode=True)
    with torch.no_grad():
        plain = call(*tensors, sinks)
    torch.testing.assert_close(call(*tensors, sinks), plain)  # two roads, one meaning


@pytest.mark.parametrize("given", ["k_new", "rotary_cos", "block_table"])
def test_decode_for_inference_only_says_so_under_grad(given, place):
    q, cache, held = leaf(1, 2, 1, 8, place=place), leaf(1, 2, 4, 8, place=place).detach(), int32(1, place=place)
    table = torch.ones(4, 4, dtype=torch.float64, device=place)
    words = {
        "k_new": {"k_new": cache[:, :, :1] * 2, "v_new": cache[:, :, :1] * 3},
        "rotary_cos": {"rotary_cos": table, "rotary_sin": table},
        "block_table": {"block_table": int32(0, place=place)[None]},
    }[given]
    before = cache.clone()
    with pytest.raises(RuntimeError, match=rf"{given}.*no_grad"):
        fct.attention_decode(q, cache, cache.clone(), held, **words)
    assert torch.equal(cache, before)
    with torch.no_grad():
        fct.attention_decode(q, cache, cache.clone(), held, **words)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "thd"])
def test_gradcheck_of_merge_states(layout, place):
    shape, rows = {
        "bhsd": ((2, 3, 4, 5), (2, 3, 4)),
        "bshd": ((2, 4, 3, 5), (2, 3, 4)),
        "thd": ((4, 3, 5), (3, 4)),
    }[layout]
    states = [leaf(*size, place=place, seed=s) for s in range(2) for size in (shape, rows)]
    assert torch.autograd.gradcheck(lambda *x: fct.merge_states(*x, layout=layout), states, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: fct.merge_states(*x, layout=layout), states, fast_mode=True)


def test_merged_halves_have_the_gradient_of_the_whole(place):
    """One query sees keys of the first half alone: the state of the second is empty there."""
    q, k, v = (leaf(1, 2, 6, 8, place=place, seed=s) for s in range(3))
    i, j = torch.arange(6, device=place)[:, None], torch.arange(6, device=place)
    masks = [(j < 3) & ((i != 1) | (j < 2)), (j >= 3) & (i != 1)]
    a, b = (fct.attention(q, k, v, mask=mask, return_lse=True) for mask in masks)
    merged = fct.merge_states(*a, *b)
    whole = fct.attention(q, k, v, mask=masks[0] | masks[1], return_lse=True)
    torch.testing.assert_close(merged, whole)
    ours, theirs = (torch.autograd.grad(x[0].square().sum() + x[1].sum(), (q, k, v)) for x in (merged, whole))
    torch.testing.assert_close(ours, theirs)


def test_merging_nothing_with_nothing_has_zero_gradients(place):
    out = leaf(1, 1, 2, 4, place=place)
    lse = torch.full((1, 1, 2), -torch.inf, dtype=torch.float64, device=place, requires_grad=True)
    merged = fct.merge_states(torch.zeros_like(out) * out, lse, torch.zeros_like(out) * out, lse)
    gradients = torch.autograd.grad(merged[0].sum(), (out, lse))
    assert all((gradient == 0).all() for gradient in gradients)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_the_arguments_are_those_of_the_raw_calls():
    import inspect

    import flashcore as fc

    for name in ("attention", "attention_varlen", "attention_decode", "merge_states"):
        raw, ours = (list(inspect.signature(getattr(module, name)).parameters) for module in (fc, fct))
        assert set(raw) - set(ours) == {"stream"}, name
        assert set(ours) - set(raw) <= {"deterministic"}, name
        positional = [
            [
                p.name
                for p in inspect.signature(getattr(m, name)).parameters.values()
                if p.kind == p.POSITIONAL_OR_KEYWORD
            ]
            for m in (fc, fct)
        ]
        assert positional[0] == positional[1]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_packed_arrays(layout, place):
    shape = (2, 3, 4, 5, 8) if layout == "bhsd" else (2, 5, 3, 4, 8)
    packed = leaf(*shape, place=place)
    ours = fct.attention(packed, causal=True, layout=layout)
    theirs = fct.attention(*packed.unbind(1 if layout == "bhsd" else 2), causal=True, layout=layout)
    torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(ours.square().sum(), packed)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.square().sum(), packed)[0])


def test_out_and_lse_are_written_where_nothing_is_recorded(place):
    q, k, v = (leaf(1, 2, 5, 8, place=place, seed=s) for s in range(3))
    out, lse = torch.empty_like(q).detach(), torch.empty(1, 2, 5, dtype=torch.float64, device=place)
    with pytest.raises(RuntimeError, match="out="):
        fct.attention(q, k, v, out=out)
    with torch.no_grad():
        results = fct.attention(q, k, v, out=out, lse=lse)
    assert results[0] is out
    assert results[1] is lse
    torch.testing.assert_close(results, fct.attention(q, k, v, return_lse=True))


def test_a_constant_that_requires_a_gradient_is_an_error(place):
    """Slopes of ALiBi have no gradient: a zero would go unnoticed."""
    q = leaf(1, 2, 5, 8, place=place)
    slopes = torch.ones(2, device=place, requires_grad=True)
    with pytest.raises(RuntimeError, match="alibi_slopes.*detach"):
        fct.attention(q, q, q, alibi_slopes=slopes)
    fct.attention(q, q, q, alibi_slopes=slopes.detach())
    with pytest.raises(RuntimeError, match="alibi_slopes.*detach"):
        torch.func.grad(lambda s: fct.attention(q, q, q, alibi_slopes=s).sum())(slopes.detach())


@pytest.mark.parametrize("given", [None, np.zeros((1, 1, 2, 4)), 3.0, [1]], ids=["none", "numpy", "number", "list"])
def test_what_is_no_tensor_is_refused(given):
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(TypeError, match="given|tensor"):
        fct.attention(given, q, q)
    with pytest.raises(TypeError, match="given|tensor"):
        fct.attention(given)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="given|tensor"):
        fct.attention(given, q, q)
    with pytest.raises((TypeError, ValueError), match="given|missing|tensor|v"):
        fct.attention(q, q, given)
    with pytest.raises((TypeError, ValueError), match="cache_seqlens"):
        fct.attention_decode(q, q, q, given)
    with pytest.raises((TypeError, ValueError), match="given|tensor|out_a"):
        fct.merge_states(given, q, q, q)


def test_a_changed_mask_is_noticed(place):
    q = leaf(1, 2, 5, 8, place=place)
    mask = torch.ones(5, 5, dtype=torch.bool, device=place)
    out = fct.attention(q, q, q, mask=mask)
    mask[0, 0] = False
    with pytest.raises(RuntimeError, match=r"modified by an inplace"):
        out.sum().backward()


@pytest.mark.parametrize("words", [{}, {"softcap": 30.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("setting", [False, True])
def test_deterministic_follows_torch(place, setting, words, monkeypatch):
    """As it is when the call is made, whatever it is when gradients are asked for."""
    from flashcore.torch import autograd, functional

    seen, convert = [], functional.convert
    for module in (autograd, functional):
        monkeypatch.setattr(module, "convert", lambda *words: (seen.append(words[7]), convert(*words))[1])
    q = leaf(1, 1, 2, 4, place=place)
    for given, wanted in ({}, setting), ({"deterministic": not setting}, not setting):
        torch.use_deterministic_algorithms(setting)
        try:
            out = fct.attention(q, q, q, **given, **words)
        finally:
            torch.use_deterministic_algorithms(False)
        out.sum().backward()
        assert seen.pop() == wanted


@pytest.mark.parametrize("words", [{"softcap": None}, {"dropout_p": None}, {"seed": "x"}, {"seed": -1}], ids=str)
def test_bad_words_are_refused_without_a_gradient_too(words):
    """Plain calls go straight to the library, which is not told of words that mean nothing to them."""
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises((TypeError, ValueError)):
        fct.attention(q, q, q, **words)
