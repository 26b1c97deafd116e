"""Where flashcore.torch has no answer it says so: no garbage, no silent zero, no detached number."""

import pytest

torch = pytest.importorskip("torch")

import flashcore.torch as fct  # noqa: E402
from flashcore.compat.flash_attn import flash_attn_func  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.func import vmap  # noqa: E402

BACKENDS = ("eager", "aot_eager")
FORWARD_MODE = "no forward-mode derivative"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def q_k_v():
    return [normal(1, 2, 5, 8, seed=i) for i in range(3)]


def merged(q, k, v):
    return fct.merge_states(q * k, q.sum(-1), v, k.sum(-1))[0]


def with_lse(q, k, v):
    out, lse = fct.attention(q, k, v, softcap=2.0, return_lse=True)
    return out * lse.unsqueeze(-1)


#: name -> a function of q, k and v
CALLS = {
    "attention": fct.attention,
    "sdpa": fct.scaled_dot_product_attention,
    "flash_attn": flash_attn_func,
    "with_lse": with_lse,
    "merge_states": merged,
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


# ---- torch.jit.trace -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_trace_replays_on_other_inputs(call, with_gradients):
    examples = [x.requires_grad_(with_gradients) for x in q_k_v()]
    traced = torch.jit.trace(lambda *x: call(*x), examples)
    others = [(2 * x.detach() + 1).requires_grad_(with_gradients) for x in examples]
    ours, theirs = traced(*others), call(*others)
    torch.testing.assert_close(ours, theirs)
    if with_gradients:
        grads = (torch.autograd.grad(out.sin().sum(), others) for out in (ours, theirs))
        torch.testing.assert_close(*grads)


# ---- forward mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_inside_a_compiled_function_is_an_error(call, backend):
    q, k, v = q_k_v()
    tangents = torch.compile(
        lambda q: torch.func.jvp(lambda q: call(q, k, v), (q,), (torch.ones_like(q),))[1],
        backend=backend,
        fullgraph=True,
    )
    with pytest.raises(Exception, match=FORWARD_MODE):
        tangents(q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_call_refuses_dual_numbers(call, backend):
    q, k, v = q_k_v()
    compiled = torch.compile(lambda *x: call(*x), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
        compiled(forward_ad.make_dual(q, k), k, v)


def test_a_dual_level_without_dual_numbers_compiles():
    q, k, v = q_k_v()
    compiled = torch.compile(lambda *x: fct.attention(*x), backend="eager", fullgraph=True)
    with forward_ad.dual_level():
        torch.testing.assert_close(compiled(q, k, v), fct.attention(q, k, v))


class _Model(torch.nn.Module):
    def forward(self, q, k, v):
        return fct.attention(q, k, v)


def test_an_exported_program_has_gradients_and_refuses_dual_numbers():
    q, k, v = q_k_v()
    exported = torch.export.export(_Model(), (q, k, v)).module()
    leaf = q.clone().requires_grad_()
    grads = [torch.autograd.grad(f(leaf, k, v).sin().sum(), leaf) for f in (exported, fct.attention)]
    torch.testing.assert_close(*grads)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
        exported(forward_ad.make_dual(q, k), k, v)


@pytest.mark.parametrize("name", ["attention", "sdpa", "flash_attn", "with_lse"])
def test_a_cotangent_that_carries_a_tangent_is_an_error(name):
    q, k, v = q_k_v()
    out = CALLS[name](q.requires_grad_(), k, v)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.autograd.grad(out, q, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


# ---- differentiating twice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["attention", "with_lse"])
def test_a_compiled_call_is_differentiated_once(name, backend):
    q, k, v = q_k_v()
    compiled = torch.compile(lambda q: CALLS[name](q * q, k, v) * q, backend=backend, fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(q.requires_grad_()).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once|double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["attention", "merge_states"])
def test_a_compiled_gradient_that_nobody_differentiates_has_no_history(name, backend):
    q, k, v = q_k_v()
    compiled = torch.compile(lambda q: CALLS[name](q, k, v), backend=backend, fullgraph=True)
    compiled(q.requires_grad_()).sum().backward()
    assert q.grad.grad_fn is None and not q.grad.requires_grad


# ---- numbers that are tensors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("word", ["scale", "softcap"])
def test_a_number_that_requires_grad_is_an_error(word, recorded):
    q, k, v = (x.requires_grad_(recorded) for x in q_k_v())
    number = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=rf"{word}: .*{word}\.item\(\)"):
        fct.attention(q, k, v, **{word: number})
    with pytest.raises(TypeError, match=rf"{word}: .*{word}\.item\(\)"):
        fct.attention_decode(q, k, v, torch.tensor([5], dtype=torch.int32), **{word: number})
    with pytest.raises(TypeError, match=rf"{word}: .*{word}\.item\(\)"):
        torch.func.grad(lambda x: fct.attention(q, k, v, **{word: x}).sum())(number.detach())
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.jvp(lambda x: fct.attention(q, k, v, **{word: x}), (number.detach(),), (number.detach(),))
    plain = fct.attention(q, k, v, **{word: 0.5})
    torch.testing.assert_close(fct.attention(q, k, v, **{word: number.detach()}), plain)
    with torch.no_grad():
        torch.testing.assert_close(fct.attention(q, k, v, **{word: number}), plain)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_scale_that_requires_grad_is_an_error_of_sdpa(recorded):
    q, k, v = (x.requires_grad_(recorded) for x in q_k_v())
    with pytest.raises(RuntimeError, match=r"scale\.item\(\)"):
        fct.scaled_dot_product_attention(q, k, v, scale=torch.tensor(0.5, requires_grad=True))


# ---- cotangents that are no plain tensors ----------------------------------------------------------------------------


def one_by_one(out, leaves, cotangents):
    each = [torch.autograd.grad(out, leaves, x, retain_graph=True) for x in cotangents]
    return [torch.stack(x) for x in zip(*each, strict=True)]


def test_batched_cotangents(call):
    leaves = [x.requires_grad_() for x in q_k_v()]
    out = call(*leaves)
    cotangents = normal(3, *out.shape)
    expected = one_by_one(out, leaves, cotangents)
    batched = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    mapped = vmap(lambda x: torch.autograd.grad(out, leaves, x, retain_graph=True))(cotangents)
    for x, y, z in zip(expected, batched, mapped, strict=True):
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(z, x)


def test_vectorized_jacobian(call):
    jacobians = [torch.autograd.functional.jacobian(call, tuple(q_k_v()), vectorize=x) for x in (False, True)]
    torch.testing.assert_close(*jacobians)


def test_batched_cotangents_of_dropout_share_its_seed():
    leaves = [x.requires_grad_() for x in q_k_v()]
    out = fct.attention(*leaves, dropout_p=0.5, causal=True)
    cotangents = normal(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(list(batched), one_by_one(out, leaves, cotangents))


def test_gradients_of_batched_cotangents_are_an_error():
    q, k, v = q_k_v()
    out = fct.attention(q.requires_grad_(), k, v)
    cotangents = normal(3, *out.shape).requires_grad_()
    (grads,) = torch.autograd.grad(out, q, cotangents, is_grads_batched=True, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grads.sum().backward()


def test_negated_cotangents(call):
    leaves = [x.requires_grad_() for x in q_k_v()]
    out = call(*leaves)
    ones = torch.ones_like(out)
    expected = torch.autograd.grad(out, leaves, -ones, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, torch._neg_view(ones)), expected)


# ---- vmap over nothing -----------------------------------------------------------------------------------------------


def test_vmap_over_no_elements_keeps_the_shape(call):
    tensors = [x.expand(0, *x.shape) for x in q_k_v()]
    assert vmap(call)(*tensors).shape == (0, 1, 2, 5, 8)
    gradient = torch.func.grad(lambda *x: call(*x).sum(), argnums=(0, 1, 2))
    assert [x.shape for x in vmap(gradient)(*tensors)] == [(0, 1, 2, 5, 8)] * 3
