"""flashcore.torch under torch.compile, torch.export, torch.func, autocast, checkpoints and CUDA graphs."""

import gc

import pytest

torch = pytest.importorskip("torch")

import flashcore.torch as fct  # noqa: E402
from flashcore.torch import ops  # noqa: E402
from torch.func import grad, jacrev, jvp, vjp, vmap  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def normal(*shape, place="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(place)


def arguments(place, batch=2):
    """q, k, v, bias, sinks"""
    shapes = ((batch, 4, 3, 5), (batch, 2, 6, 5), (batch, 2, 6, 4), (4, 3, 6), (4,))
    return [normal(*shape, place=place, seed=i) for i, shape in enumerate(shapes)]


def full(q, k, v, bias, sinks, **words):
    words = {"causal": "bottom_right", "window": (4, None), "softcap": 2.0, **words}
    return fct.attention(q, k, v, bias=bias, sinks=sinks, **words)


def packed(q, k, v):
    """(total, heads, dim) from one sequence's (heads, total, dim)."""
    rows = [x.transpose(-2, -3).contiguous() for x in (q, k, v)]
    lengths = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=q.device)
    return fct.attention_varlen(*rows, lengths, lengths, causal=True)


def with_gradients(function, tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum(x.double().square().sum() for x in results)
    return [*results, *torch.autograd.grad(loss, leaves)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def compiled(function, **words):
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **words})


# ---- compile and export ----------------------------------------------------------------------------------------------


def two_results(q, k, v):
    return fct.attention(q, k, v, return_lse=True, deterministic=True, layout="bshd")


def merged(q, k, v):
    states = [fct.attention(q, k, v, mask=m, return_lse=True) for m in (torch.arange(6) < 2, torch.arange(6) >= 2)]
    return fct.merge_states(*states[0], *states[1])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_has_the_same_gradients(dynamic, place):
    tensors = arguments(place)
    assert_same(with_gradients(compiled(full, dynamic=dynamic), tensors), with_gradients(full, tensors))


def test_compile_of_other_calls():
    squares = [normal(1, 5, 2, 8, seed=i) for i in range(3)]
    assert_same(with_gradients(compiled(two_results), squares), with_gradients(two_results, squares))
    tensors = arguments("cpu")[:3]
    assert_same(with_gradients(compiled(merged), tensors), with_gradients(merged, tensors))
    rows = [normal(2, 5, 8, seed=i) for i in range(3)]
    assert_same(with_gradients(compiled(packed), rows), with_gradients(packed, rows))


def test_compile_of_one_tensor_in_several_places():
    def alike(x):
        out, lse = fct.attention(x, x, x, bias=x[0, 0, :, :1], return_lse=True)
        return fct.merge_states(out, lse, out, lse)

    tensors = [normal(1, 2, 5, 5)]
    assert_same(with_gradients(compiled(alike), tensors), with_gradients(alike, tensors))


def test_compile_with_inductor(place):
    """The default backend. On a GPU with something around to fuse, where it chooses strides; on the CPU that would cost
    a run of the C++ compiler."""
    tensors = arguments(place)

    def around(q, k, v, bias, sinks):
        return full(q.sin(), k * 2, v.transpose(2, 3).exp().transpose(2, 3), bias, sinks).cos()

    function = full if place == "cpu" else around
    assert_same(with_gradients(compiled(function, backend="inductor"), tensors), with_gradients(function, tensors))


def test_compile_recompiles_nothing_for_another_length():
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph

    call = torch.compile(lambda q: fct.attention(q, q, q, causal=True), fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 6, 9):
        q = normal(1, 2, length, 8)
        assert_same([call(q)], [fct.attention(q, q, q, causal=True)])
    assert count == 1


def test_compiled_dropout_draws_anew_in_every_run():
    q, k, v = arguments("cpu")[:3]
    call = compiled(lambda *x: fct.attention(*x, dropout_p=0.5))
    torch.manual_seed(1)
    first, second = call(q, k, v), call(q, k, v)
    torch.manual_seed(1)
    assert torch.equal(fct.attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_compiled_dropout_has_the_gradient_of_its_own_draw():
    tensors = arguments("cpu")[:3]
    runs = []
    for function in (
        lambda *x: fct.attention(*x, dropout_p=0.5),
        compiled(lambda *x: fct.attention(*x, dropout_p=0.5)),
    ):
        torch.manual_seed(3)
        runs.append(with_gradients(function, tensors))
    assert_same(*runs)


def test_compiled_errors_are_clear():
    q, k = normal(1, 2, 5, 8), normal(1, 2, 7, 8)
    with pytest.raises(ValueError, match=r"top_left.*bottom_right"):
        compiled(lambda q, k: fct.attention(q, k, k, causal=True), backend="eager")(q, k)


class Block(torch.nn.Module):
    def forward(self, q, k, v):
        return fct.attention(q, k, v, causal="bottom_right") + 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    tensors = arguments("cpu")[:3]
    sizes = {0: torch.export.Dim("batch", max=64)}
    program = torch.export.export(Block(), tuple(tensors), strict=strict, dynamic_shapes=(sizes,) * 3)
    assert "flashcore.attention_forward" in program.graph_module.code
    others = arguments("cpu", batch=5)[:3]
    assert_same([program.module()(*others)], [Block()(*others)])


def decode_arguments(place="cpu"):
    q, k, v = arguments(place)[:3]
    caches = [torch.zeros(2, 2, 8, dim, dtype=torch.float64, device=place) for dim in (5, 4)]
    lengths = torch.tensor([0, 3], dtype=torch.int32, device=place)
    return q, k[:, :, :2], v[:, :, :2], *caches, lengths


def test_compiled_decode_writes_the_cache(place):
    results = []
    for wrap in (lambda f: f, compiled):
        q, k, v, k_cache, v_cache, lengths = decode_arguments(place)

        def step(q, k, v, k_cache, v_cache, lengths):
            out = fct.attention_decode(q * 2, k_cache, v_cache, lengths, k_new=k, v_new=v) + 1
            return out, fct.attention_decode(q, k_cache, v_cache, lengths + 2, causal=False)

        with torch.no_grad():
            results.append([*wrap(step)(q, k, v, k_cache, v_cache, lengths), k_cache, v_cache])
    assert results[0][2].abs().sum() > 0
    assert_same(*results)


def test_opcheck_of_every_operator():
    """torch's own checks: schema, fake results, autograd registration, AOT dispatch."""
    tensors = [None] * (len(ops.TENSORS) + 1)
    for name, tensor in zip(("q", "k", "v", "bias", "sinks"), arguments("cpu"), strict=True):
        tensors[ops.TENSORS.index(name)] = tensor
    words = (*ops.words("bhsd", "bottom_right", (4, None), None, 2.0, 0.0, 0, False, None), -1, -1)
    torch.library.opcheck(ops.attention_forward, (*tensors, *words))
    out, lse = ops.attention_forward(*tensors, *words)
    for wanted in ([True] * 5, [True, False, True, False, False]):
        torch.library.opcheck(ops.attention_backward, (out, lse, out, lse, *tensors, wanted, *words))
    torch.library.opcheck(ops.merge_states, (out, lse, out, lse, "bhsd"))
    q, k, v, k_cache, v_cache, lengths = decode_arguments()
    words = ops.words("bhsd", "bottom_right", None, None, 0.0, 0.0, 0, False, None)
    torch.library.opcheck(ops.attention_append, (k_cache, v_cache, q, lengths, None, k, v, *[None] * 9, False, *words))
    torch.library.opcheck(ops.attention_decode, (k_cache, v_cache, q, lengths, *[None] * 12, False, *words))


# ---- torch.func ------------------------------------------------------------------------------------------------------


def test_functional_gradients(place):
    tensors = arguments(place)
    ours = grad(lambda *x: full(*x).square().sum(), argnums=(0, 1, 2, 3, 4))(*tensors)
    assert_same(ours, with_gradients(full, tensors)[1:])
    out, pull = vjp(lambda q: full(q, *tensors[1:]), tensors[0])
    assert_same(pull(2 * out), [ours[0]])


def test_functional_jacobian():
    q, k, v = arguments("cpu")[:3]
    exact = torch.autograd.functional.jacobian(lambda q: fct.attention(q, k, v), q)
    assert_same([jacrev(lambda q: fct.attention(q, k, v))(q)], [exact])


def stacked(function, axes, *tensors):
    """What vmap means: one call after the other."""
    size = next(t.shape[axis] for t, axis in zip(tensors, axes, strict=True) if axis is not None)
    rows = [
        function(
            *(t if axis is None else t.select(axis, i).contiguous() for t, axis in zip(tensors, axes, strict=True))
        )
        for i in range(size)
    ]
    return [torch.stack(x) for x in zip(*rows, strict=True)]


MAPPED = {"q": (0, None, None), "k and v": (None, 0, 0), "all": (0, 1, 2), "last": (-1, None, 4), "layout": (0, 0, 0)}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap(name, batch, place):
    axes = MAPPED[name]
    shapes = ((batch, 4, 3, 5), (batch, 2, 6, 5), (batch, 2, 6, 4))
    tensors = [
        normal(*shape, place=place, seed=i)
        if axis is None
        else normal(3, *shape, place=place, seed=i).movedim(0, axis).contiguous()
        for i, (shape, axis) in enumerate(zip(shapes, axes, strict=True))
    ]
    if name == "layout":
        tensors = [x.transpose(2, 3).contiguous() for x in tensors]
    words = {"layout": "bshd"} if name == "layout" else {"causal": "bottom_right"}

    def call(q, k, v):
        return fct.attention(q, k, v, return_lse=True, **words)

    assert_same(vmap(call, axes)(*tensors), stacked(call, axes, *tensors))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (4, 3, 6), (1, 1, 3, 6), (2, 4, 3, 6), (2, 1, 1, 6)], ids=str)
@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, None), (0, None, -1), (None, 0, -1)], ids=str)
def test_vmap_of_the_gradients_of_masks_and_biases(axes, shape, place):
    """q, bias and mask mapped or not; bias of every rank, with its gradient for each element."""
    q_axis, bias_axis, mask_axis = axes
    _, k, v, _, sinks = arguments(place)
    q = normal(*([] if q_axis is None else [3]), 2, 4, 3, 5, place=place)
    bias = normal(*([] if bias_axis is None else [3]), *shape, place=place)
    mask = normal(*shape, *([] if mask_axis is None else [3]), place=place) > -1

    def loss(q, bias, mask):
        return fct.attention(q, k, v, bias=bias, mask=mask, sinks=sinks).square().sum()

    gradients = grad(loss, argnums=(0, 1))
    assert_same(vmap(gradients, axes)(q, bias, mask), stacked(gradients, axes, q, bias, mask))


def test_vmap_of_slopes_and_lengths(place):
    q, k, v = arguments(place)[:3]
    slopes = normal(3, 2, 4, place=place).abs().float()
    used = torch.tensor([[2, 6], [0, 3], [1, 1]], dtype=torch.int32, device=place)

    def call(slopes, used):
        return (fct.attention(q, k, v, alibi_slopes=slopes, seqused_k=used),)

    for axes in ((0, 0), (0, None), (None, 0)):
        given = [x if axis == 0 else x[0] for x, axis in zip((slopes, used), axes, strict=True)]
        assert_same(vmap(call, axes)(*given), stacked(call, axes, *given))
    rows = slopes[:, 0].contiguous()
    assert_same(vmap(call, (0, None))(rows, used[0]), stacked(call, (0, None), rows, used[0]))


def test_vmap_of_the_gradient_of_sinks(place):
    tensors = arguments(place)
    sinks = normal(3, 4, place=place)
    gradient = grad(lambda s, q: full(q, *tensors[1:4], s).square().sum(), argnums=(0, 1))
    q = normal(3, *tensors[0].shape, place=place)
    for axes, given in (((0, None), (sinks, tensors[0])), ((None, 0), (sinks[0], q)), ((0, 0), (sinks, q))):
        assert_same(vmap(gradient, axes)(*given), stacked(gradient, axes, *given))


def test_gradient_of_vmap(place):
    """What is mapped is inside: here no tensor says that it requires a gradient."""
    _, k, v, bias, sinks = arguments(place)
    q = normal(3, 2, 4, 3, 5, place=place)

    def mapped(q, k, bias):
        return vmap(lambda x: full(x, k, v, bias, sinks))(q).square().sum()

    def plain(q, k, bias):
        return sum(full(x, k, v, bias, sinks).square().sum() for x in q)

    assert_same(grad(mapped, (0, 1, 2))(q, k, bias), grad(plain, (0, 1, 2))(q, k, bias))
    leaves = [x.clone().requires_grad_() for x in (q, k, bias)]
    assert_same(torch.autograd.grad(mapped(*leaves), leaves), torch.autograd.grad(plain(*leaves), leaves))


def test_vmap_of_vmap():
    q, k, v = arguments("cpu")[:3]
    many = normal(2, 3, *q.shape)
    ours = vmap(vmap(lambda x: fct.attention(x, k, v)))(many)
    assert_same([ours], [torch.stack([torch.stack([fct.attention(x, k, v) for x in row]) for row in many])])


def test_vmap_is_one_call(monkeypatch):
    q, k, v = arguments("cpu")[:3]
    calls = []
    whole = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *x: (calls.append(1), whole(*x))[1])
    vmap(lambda x: full(x, k, v, None, None))(normal(8, *q.shape))
    assert len(calls) == 1


def test_vmap_of_dropout_means_the_same_seed_for_every_element():
    q, k, v = arguments("cpu")[:3]
    many = normal(3, *q.shape)

    def call(x):
        return (fct.attention(x, k, v, dropout_p=0.4, seed=7),)

    assert_same(vmap(call)(many), stacked(call, (0,), many))
    with pytest.raises(RuntimeError, match="random"):  # vmap's own word for a draw that it was not told about
        vmap(lambda x: fct.attention(x, k, v, dropout_p=0.4))(many)
    same = vmap(lambda x: fct.attention(x, k, v, dropout_p=0.4), randomness="same")(q.expand(2, *q.shape))
    assert torch.equal(same[0], same[1])
    different = vmap(lambda x: fct.attention(x, k, v, dropout_p=0.4), randomness="different")(q.expand(2, *q.shape))
    assert not torch.equal(different[0], different[1])


def test_vmap_of_the_other_calls():
    q, k, v = (normal(3, 2, 5, 8, seed=i) for i in range(3))
    assert_same(vmap(lambda *x: (packed(*x),))(q, k, v), stacked(lambda *x: (packed(*x),), (0, 0, 0), q, k, v))
    states = [normal(3, 2, 2, 5, 8), normal(3, 2, 2, 5), normal(3, 2, 2, 5, 8, seed=1), normal(3, 2, 2, 5, seed=1)]
    assert_same(vmap(fct.merge_states)(*states), stacked(fct.merge_states, (0,) * 4, *states))
    gradient = grad(lambda *x: fct.merge_states(*x)[0].square().sum(), argnums=(0, 1, 2, 3))
    assert_same(vmap(gradient)(*states), stacked(gradient, (0,) * 4, *states))


def test_vmap_of_decode_writes_every_cache():
    q, k, v, k_cache, v_cache, lengths = decode_arguments()
    many = [x.expand(3, *x.shape).clone() for x in (k_cache, v_cache)]
    one = [x.clone() for x in many]
    qs = normal(3, *q.shape)

    def step(q, k_cache, v_cache):
        return (fct.attention_decode(q, k_cache, v_cache, lengths, k_new=k, v_new=v),)

    mapped = vmap(step)(qs, *many)
    alone = [torch.stack([step(qs[i], one[0][i], one[1][i])[0] for i in range(3)])]
    assert_same([*mapped, *many], [*alone, *one])
    with pytest.raises(ValueError, match="k_cache and v_cache"):
        vmap(lambda x: step(x, k_cache, v_cache)[0])(qs)


# ---- torch.func inside torch.compile ---------------------------------------------------------------------------------


def alone(a, la, b, lb):
    return (fct.merge_states(a, la, b, lb)[0] * lb[..., None]).square().sum()


def of_halves(q, k, v):
    return fct.attention(q, k, v, causal="top_left").square().sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mapped", [False, True], ids=["grad", "vmap_grad"])
@pytest.mark.parametrize("merging", [False, True], ids=["attention", "merge_states"])
def test_transforms_may_be_compiled(merging, mapped, backend):
    tensors = [normal(3, *x.shape, seed=i) for i, x in enumerate(states() if merging else arguments("cpu")[:3])]
    tensors = tensors if mapped else [x[0] for x in tensors]
    gradient = grad(alone if merging else of_halves, argnums=(0, 1, 2))
    gradient = vmap(gradient) if mapped else gradient
    assert_same(compiled(gradient, backend=backend)(*tensors), gradient(*tensors))


def merged_by_hand(a, la, b, lb):
    whole = torch.logaddexp(la, lb)
    out = torch.exp(la - whole)[..., None] * a + torch.exp(lb - whole)[..., None] * b
    return (out * lb[..., None]).square().sum()


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_merge_states_is_differentiated_twice_by_transforms(backend):
    def twice(loss, *states):
        return grad(lambda *x: sum(g.square().sum() for g in grad(loss, argnums=(0, 1, 2, 3))(*x)), (0, 1, 2, 3))(
            *states
        )

    ours = lambda *x: twice(alone, *x)  # noqa: E731
    ours = ours if backend is None else compiled(ours, backend=backend)
    assert_same(ours(*states()), twice(merged_by_hand, *states()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attention_is_differentiated_once_by_compiled_transforms(backend):
    q, k, v = arguments("cpu")[:3]
    twice = grad(lambda q: grad(of_halves)(q, k, v).square().sum())
    with pytest.raises(RuntimeError, match="differentiated once"):
        compiled(twice, backend=backend)(q)


# ---- what has no derivative ------------------------------------------------------------------------------------------


def states():
    return normal(1, 2, 5, 8), normal(1, 2, 5), normal(1, 2, 5, 8, seed=1), normal(1, 2, 5, seed=1)


def test_forward_mode_is_a_clear_error():
    q, k, v = arguments("cpu")[:3]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(lambda q: fct.attention(q, k, v), (q,), (q,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        fct.attention(torch.autograd.forward_ad.make_dual(q, q), k, v)
    a, la, b, lb = states()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(lambda a: fct.merge_states(a, la, b, lb)[0], (a,), (a,))
    q, k, v, k_cache, v_cache, lengths = decode_arguments()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(lambda q: fct.attention_decode(q, k_cache, v_cache, lengths), (q,), (q,))


@pytest.mark.parametrize("linear", [False, True], ids=["square", "sum"])
def test_differentiating_twice_is_a_clear_error(linear):
    """Of .sum(), too, whose own gradient is a constant: there a zero would go unnoticed."""
    q, k, v = arguments("cpu")[:3]

    def loss(q):
        out = fct.attention(q, k, v)
        return out.sum() if linear else out.square().sum()

    with pytest.raises(RuntimeError, match="once"):
        grad(lambda q: grad(loss)(q).sum())(q)
    q.requires_grad_()
    (first,) = torch.autograd.grad(loss(q), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        first.sum().backward()


@pytest.mark.parametrize("new", [False, True], ids=["read", "append"])
def test_a_lost_gradient_of_decode_is_a_clear_error(new):
    """Inside vmap no tensor says that it requires a gradient; a zero would go unnoticed."""
    q, k, v, k_cache, v_cache, lengths = decode_arguments()
    words = {"k_new": k, "v_new": v} if new else {}

    def step(q, k_cache, v_cache):
        return fct.attention_decode(q, k_cache, v_cache, lengths, **words)

    caches = [x.expand(2, *x.shape).clone() for x in (k_cache, v_cache)]
    with pytest.raises(RuntimeError, match="no_grad"):
        grad(lambda q: vmap(step)(q, *caches).sum())(q.expand(2, *q.shape))
    if not new:
        ours = grad(lambda q: step(q, k_cache, v_cache).square().sum())(q)
        assert_same([ours], with_gradients(lambda q: step(q, k_cache, v_cache), [q])[1:])


# ---- other surroundings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_autocast_casts_as_for_torchs_own(wrap, place):
    q, k, v = (normal(1, 2, 5, 8, place=place, seed=i).float() for i in range(3))
    bias = normal(5, 5, place=place).float()
    with torch.autocast(place, torch.bfloat16):
        out, *gradients = with_gradients(wrap(lambda *x: fct.attention(*x[:3], bias=x[3])), [q, k, v, bias])
        own = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
        assert fct.attention(q.double(), k.double(), v.double()).dtype is torch.float64  # as autocast does
    assert out.dtype is own.dtype is torch.bfloat16
    assert all(gradient.dtype is torch.float32 for gradient in gradients)
    torch.testing.assert_close(out, own, atol=2e-2, rtol=2e-2)


def test_autocast_of_decode_follows_the_cache():
    q, k, v, k_cache, v_cache, lengths = (x.float() if x.is_floating_point() else x for x in decode_arguments())
    with torch.autocast("cpu", torch.bfloat16):
        assert fct.attention_decode(q, k_cache, v_cache, lengths, k_new=k, v_new=v).dtype is torch.float32
        assert fct.attention_decode(q, k_cache.bfloat16(), v_cache.bfloat16(), lengths).dtype is torch.bfloat16


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_checkpoints(wrap):
    """Dropout is recomputed with the seed of the first run."""
    from torch.utils.checkpoint import checkpoint

    def block(q, k, v):
        return fct.attention(q.sin(), k, v, dropout_p=0.3)

    call = wrap(lambda *x: checkpoint(block, *x, use_reentrant=False))
    tensors = arguments("cpu")[:3]
    torch.manual_seed(5)
    ours = with_gradients(call, tensors)
    torch.manual_seed(5)
    assert_same(ours, with_gradients(block, tensors))


def test_negated_and_conjugate_views(place):
    q, k, v = arguments(place)[:3]
    lazy = torch._neg_view(v)
    assert_same(with_gradients(fct.attention, [q, k, lazy]), with_gradients(fct.attention, [q, k, -v]))
    assert_same([fct.attention(q, k, lazy)], [fct.attention(q, k, -v)])
    numbers = torch.complex(v, v).conj()
    assert_same([fct.attention(q, k, numbers.imag.contiguous())], [fct.attention(q, k, -v)])
    with pytest.raises(TypeError, match="complex"):
        fct.attention(numbers, numbers, numbers)
    out, lse = fct.attention(q, k, v, return_lse=True)
    assert_same(fct.merge_states(torch._neg_view(out), lse, out, lse), fct.merge_states(-out, lse, out, lse))
    lengths = torch.full((2,), 6, dtype=torch.int32, device=place)
    assert_same([fct.attention_decode(q, k, lazy, lengths)], [fct.attention_decode(q, k, -v, lengths)])


def test_fake_and_meta_tensors_have_shapes(place):
    q, k, v = (x.to("meta") for x in arguments("cpu")[:3])
    out, lse = fct.attention(q, k, v, return_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == ((2, 4, 3, 4), (2, 4, 3), torch.float64)
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 3, 4, 8, device=place, dtype=torch.bfloat16)
        out, lse = fct.attention(q, q, q, layout="bshd", return_lse=True)
        assert (out.shape, lse.shape, lse.dtype, out.device.type) == ((2, 3, 4, 8), (2, 4, 3), torch.float32, place)
        with pytest.raises(ValueError, match="4 dimensions"):
            fct.attention(q[0], q[0], q[0])


def test_subclasses_are_tensors():
    class Named(torch.Tensor):
        pass

    q, k, v = arguments("cpu")[:3]
    out = fct.attention(q.as_subclass(Named), k, v)
    assert isinstance(out, Named)
    assert_same([out.as_subclass(torch.Tensor)], [fct.attention(q, k, v)])


def test_inference_mode():
    with torch.inference_mode():
        q = normal(1, 2, 3, 8)
        assert fct.attention(q, q, q, return_lse=True)[1].is_inference()


def test_cuda_graphs(place):
    """Captured with its backward pass; a replay reads the new numbers."""
    if place == "cpu":
        pytest.skip("needs a GPU")
    q, k, v = (normal(1, 2, 64, 64, place=place, seed=i).half().requires_grad_() for i in range(3))

    def step():
        out = fct.attention(q, k, v, causal=True)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(results, step(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


def test_outputs_come_from_torchs_allocator(place):
    if place == "cpu":
        pytest.skip("needs a GPU")
    q = torch.randn(1, 8, 512, 64, device=place, dtype=torch.float16)
    before = torch.cuda.memory_allocated()
    out = fct.attention(q, q, q)
    assert torch.cuda.memory_allocated() - before >= out.numel() * 2


def test_workspaces_come_from_torchs_allocator_if_asked(place):
    """The backward pass of the reference kernel keeps a number per query row."""
    if place == "cpu":
        with pytest.raises(ValueError, match="cpu|CUDA"):
            fct.workspaces_from_torch("cpu")
        return
    q = torch.randn(1, 8, 1024, 16, device=place, requires_grad=True)
    k = torch.randn(1, 8, 64, 16, device=place)

    def highest():
        gc.collect()  # what other tests have left would go in between
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        (gradient,) = torch.autograd.grad(fct.attention(q, k, k, kernel="reference").sum(), q)
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated(), gradient

    own, expected = highest()
    fct.workspaces_from_torch()
    try:
        torchs, gradient = highest()
    finally:
        fct.workspaces_from_torch(enabled=False)
    assert torchs - own >= 8 * 1024 * 4
    torch.testing.assert_close(gradient, expected)


def test_compile_with_cuda_graphs(place):
    if place == "cpu":
        pytest.skip("needs a GPU")
    tensors = [normal(1, 2, 64, 64, place=place, seed=i).float() for i in range(3)]
    call = torch.compile(lambda *x: fct.attention(*x, causal=True) * 2, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            out = call(*tensors).clone()
    torch.testing.assert_close(out, fct.attention(*tensors, causal=True) * 2)
