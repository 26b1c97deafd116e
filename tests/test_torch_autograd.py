"""flashcore.torch.attention: differentiable, judged by torch's gradcheck and its own attention."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flashcore.torch as fct  # noqa: E402


@pytest.fixture
def place(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    return device


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
