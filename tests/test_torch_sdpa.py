"""flashcore in the place of torch's scaled_dot_product_attention: values, gradients and refusals beside torch's own."""

import pytest

torch = pytest.importorskip("torch")

import flashcore as fc  # noqa: E402
import flashcore.torch as fct  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.bias import causal_lower_right, causal_upper_left  # noqa: E402

TORCHS_OWN = F.scaled_dot_product_attention


def normal(*shape, place="cpu", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(place, dtype)


def leaf(*shape, **words):
    return normal(*shape, **words).requires_grad_()


def with_gradients(attend, tensors, *arguments, **words):
    """out, and the gradients of every tensor that requires one."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = attend(*leaves[:3], *(leaves[3:] or ()), *arguments, **words)
    dout = normal(*out.shape, place=out.device, dtype=out.dtype, seed=9)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# (query, key, value): leading dimensions of every number, broadcast or not
SHAPES = {
    "4d": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "square": ((2, 3, 6, 16), (2, 3, 6, 16), (2, 3, 6, 16)),
    "3d": ((4, 5, 8), (4, 7, 8), (4, 7, 8)),
    "2d": ((5, 8), (7, 8), (7, 3)),
    "5d": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8)),
    "broadcast batch": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "broadcast rank": ((4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "broadcast 5d": ((3, 1, 2, 5, 8), (2, 2, 7, 8), (1, 2, 2, 7, 8)),
    "one key head": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one value head": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 1, 7, 8)),
    "one query head": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "no queries": ((2, 2, 0, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "no keys": ((2, 2, 5, 8), (2, 2, 0, 8), (2, 2, 0, 8)),
    "no batch": ((0, 2, 5, 8), (0, 2, 7, 8), (0, 2, 7, 8)),
}


@pytest.mark.parametrize("words", [{}, {"is_causal": True}, {"scale": 0.3}], ids=["plain", "causal", "scale"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(shapes, words, place):
    tensors = [normal(*shape, place=place, seed=i) for i, shape in enumerate(shapes)]
    ours = with_gradients(fct.scaled_dot_product_attention, tensors, **words)
    assert_same(ours, with_gradients(TORCHS_OWN, tensors, **words))


@pytest.mark.parametrize(
    "shapes", [((2, 6, 5, 8), (2, 2, 7, 8)), ((6, 5, 8), (3, 7, 8)), ((1, 2, 4, 5, 8), (1, 2, 2, 7, 8))]
)
def test_grouped_heads(shapes, place):
    tensors = [normal(*shape, place=place, seed=i) for i, shape in enumerate((*shapes, shapes[1]))]
    ours = with_gradients(fct.scaled_dot_product_attention, tensors, enable_gqa=True)
    assert_same(ours, with_gradients(TORCHS_OWN, tensors, enable_gqa=True))


MASKS = [(5, 7), (1, 7), (5, 1), (1, 1), (4, 5, 7), (1, 5, 7), (2, 4, 5, 7), (2, 1, 5, 7), (2, 1, 1, 7), (1, 4, 5, 1)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_boolean_masks(shape, place):
    tensors = [normal(*s, place=place, seed=i) for i, s in enumerate(SHAPES["4d"])]
    mask = normal(*shape, place=place, seed=5) > -0.5
    ours = with_gradients(fct.scaled_dot_product_attention, tensors, mask)
    assert_same(ours, with_gradients(TORCHS_OWN, tensors, mask))


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_additive_masks_have_a_gradient(shape, place):
    tensors = [normal(*s, place=place, seed=i) for i, s in enumerate((*SHAPES["4d"], shape))]
    ours = with_gradients(fct.scaled_dot_product_attention, tensors)
    assert_same(ours, with_gradients(TORCHS_OWN, tensors))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("3d", (4, 5, 7)), ("2d", (5, 7)), ("5d", (3, 1, 5, 7)), ("5d", (2, 1, 4, 5, 7)), ("5d", (5, 7))],
)
def test_masks_of_every_rank(name, shape, place):
    tensors = [normal(*s, place=place, seed=i) for i, s in enumerate((*SHAPES[name], shape))]
    ours = with_gradients(fct.scaled_dot_product_attention, tensors)
    assert_same(ours, with_gradients(TORCHS_OWN, tensors))


@pytest.mark.parametrize("additive", [False, True])
def test_a_row_without_keys_is_zero(additive, place):
    """torch's softmax gives 0 there, and so do the gradients."""
    tensors = [normal(*s, place=place, seed=i) for i, s in enumerate(SHAPES["4d"])]
    keep = torch.ones(5, 7, dtype=torch.bool, device=place)
    keep[2] = False
    mask = torch.zeros(5, 7, dtype=torch.float64, device=place).masked_fill(~keep, -torch.inf) if additive else keep
    ours = with_gradients(fct.scaled_dot_product_attention, tensors, mask)
    assert (ours[0][:, :, 2] == 0).all()
    assert_same(ours, with_gradients(TORCHS_OWN, tensors, mask))


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_causal_biases(bias, place):
    tensors = [normal(*s, place=place, seed=i) for i, s in enumerate(SHAPES["4d"])]
    ours = with_gradients(fct.scaled_dot_product_attention, tensors, bias(5, 7))
    diagonal = 2 if bias is causal_lower_right else 0
    keep = torch.ones(5, 7, dtype=torch.bool, device=place).tril(diagonal)
    assert_same(ours, with_gradients(TORCHS_OWN, tensors, keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, place):
    """At most twice torch's own error, plus a rounding."""
    tensors = [normal(2, 2, 33, 32, place=place, dtype=dtype, seed=i) for i in range(3)]
    mask = normal(33, 33, place=place, dtype=torch.float32, seed=7)  # float32 is allowed beside every dtype
    ours = [t.double() for t in with_gradients(fct.scaled_dot_product_attention, tensors, mask)]
    with sdpa_kernel(SDPBackend.MATH):  # torch 2.11's other kernels give NaN for such a mask on a GPU
        theirs = [t.double() for t in with_gradients(TORCHS_OWN, tensors, mask)]
    exact = with_gradients(TORCHS_OWN, [t.double() for t in tensors], mask.double())
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        allowed = 2 * (other - true).abs().max() + 2 * torch.finfo(dtype).eps * true.abs().max()
        assert (mine - true).abs().max() <= allowed


def test_permuted_and_transposed_inputs(place):
    """Rows that are not contiguous are copied, as torch does."""
    q, k, v = (normal(2, 8, 3, 6, place=place, seed=i).transpose(1, 3) for i in range(3))
    assert_same([fct.scaled_dot_product_attention(q, k, v)], [TORCHS_OWN(q, k, v)])


def test_dropout_follows_torchs_seed_and_keeps_the_mean(place):
    q, k, v = (normal(1, 1, 64, 16, place=place, seed=i) for i in range(3))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(fct.scaled_dot_product_attention(q, k, torch.ones_like(v), dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert abs(results[0].mean().item() - 1) < 0.1  # 4096 weights


def test_dropout_of_everything_is_zero(place):
    tensors = [normal(1, 2, 3, 8, place=place, seed=i) for i in range(3)]
    assert all((x == 0).all() for x in with_gradients(fct.scaled_dot_product_attention, tensors, dropout_p=1.0))


Q = (2, 4, 5, 8)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


REFUSED = {
    "heads": ((zeros(*Q), zeros(2, 2, 5, 8), zeros(2, 2, 5, 8)), {}, "enable_gqa"),
    "groups": ((zeros(*Q), zeros(2, 3, 5, 8), zeros(2, 3, 5, 8)), {"enable_gqa": True}, "multiple"),
    "kv heads": ((zeros(*Q), zeros(2, 4, 5, 8), zeros(2, 2, 5, 8)), {"enable_gqa": True}, "equal"),
    "dtypes": ((zeros(*Q), zeros(*Q, dtype=torch.float64), zeros(*Q)), {}, "float"),
    "integers": ((zeros(*Q, dtype=torch.int32),) * 3, {}, "float16"),
    "complex": ((zeros(*Q, dtype=torch.complex64),) * 3, {}, "complex"),
    "one dimension": ((zeros(8),) * 3, {}, "dimensions"),
    "head_dim": ((zeros(*Q), zeros(2, 4, 5, 4), zeros(*Q)), {}, "head_dim"),
    "batch": ((zeros(*Q), zeros(3, 4, 5, 8), zeros(3, 4, 5, 8)), {}, "broadcast"),
    "key and value": ((zeros(*Q), zeros(*Q), zeros(2, 4, 6, 8)), {}, "keys"),
    "mask shape": ((zeros(*Q),) * 3, {"attn_mask": zeros(4, 5)}, r"broadcast"),
    "mask of 5d": ((zeros(1, *Q),) * 3, {"attn_mask": zeros(3, 1, 1, 5, 5)}, r"broadcast"),
    "mask dtype": ((zeros(*Q),) * 3, {"attn_mask": zeros(5, 5, dtype=torch.int64)}, "float32"),
    "mask half": ((zeros(*Q),) * 3, {"attn_mask": zeros(5, 5, dtype=torch.float16)}, "float32"),
    "mask and causal": ((zeros(*Q),) * 3, {"attn_mask": zeros(5, 5), "is_causal": True}, "is_causal"),
    "dropout": ((zeros(*Q),) * 3, {"dropout_p": 1.5}, "between 0 and 1"),
}


@pytest.mark.parametrize(("tensors", "words", "says"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_runtime_errors(tensors, words, says):
    with pytest.raises(RuntimeError, match=says):
        fct.scaled_dot_product_attention(*tensors, **words)


def test_what_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match="key"):
        fct.scaled_dot_product_attention(zeros(*Q), zeros(*Q).numpy(), zeros(*Q))
    with pytest.raises(TypeError):
        fct.scaled_dot_product_attention(zeros(*Q), zeros(*Q), zeros(*Q), None, 0.0, False, 1.0)  # keywords only


def test_compiled_and_batched(place):
    tensors = [leaf(2, 2, 5, 8, place=place, seed=i) for i in range(3)]
    mask = leaf(5, 5, place=place)
    compiled = torch.compile(fct.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, [*tensors, mask]), with_gradients(TORCHS_OWN, [*tensors, mask]))
    with torch.no_grad():
        mapped = torch.func.vmap(fct.scaled_dot_product_attention)(*tensors)  # maps the batch away: 3-D inside
        assert_same([mapped], [TORCHS_OWN(*tensors)])


# ---- in place of torch's own -----------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The shapes that flashcore was asked for."""
    from flashcore.torch import sdpa

    seen = []

    def attend(query, *others, **words):
        seen.append(tuple(query.shape))
        return fct.scaled_dot_product_attention(query, *others, **words)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", attend)
    return seen


def test_install_and_uninstall(calls):
    q = zeros(1, 2, 3, 8)
    fct.install()
    try:
        fct.install()
        F.scaled_dot_product_attention(q, q, q)
        with fct.installed():
            F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(q, q, q)
    finally:
        fct.uninstall()
    assert len(calls) == 3
    assert F.scaled_dot_product_attention is TORCHS_OWN
    fct.uninstall()
    F.scaled_dot_product_attention(q, q, q)
    assert len(calls) == 3


def test_a_block_ends_with_its_error():
    with pytest.raises(KeyError), fct.installed():
        raise KeyError
    assert F.scaled_dot_product_attention is TORCHS_OWN


OTHERS = {
    "wide heads": ((zeros(1, 2, 3, 300),) * 3, {}),
    "wide values": ((zeros(1, 2, 3, 8), zeros(1, 2, 3, 8), zeros(1, 2, 3, 300)), {}),
    "mask and causal": ((zeros(1, 2, 3, 8),) * 3, {"attn_mask": zeros(3, 3, dtype=torch.bool), "is_causal": True}),
    "causal bias": ((zeros(1, 2, 3, 300),) * 3, {"attn_mask": causal_upper_left(3, 3)}),
    "meta": ((torch.empty(1, 2, 3, 8, device="meta"),) * 3, {}),
    "nested": ((torch.nested.nested_tensor([torch.zeros(2, 3, 8)], layout=torch.jagged).transpose(1, 2),) * 3, {}),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("tensors", "words"), OTHERS.values(), ids=OTHERS)
def test_what_flashcore_does_not_take_goes_to_torch(tensors, words, calls):
    with fct.installed():
        out = F.scaled_dot_product_attention(*tensors, **words)
    assert calls == []
    assert out.shape[-1] == tensors[2].shape[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (8, 300), (256, 256), (257, 257), (257, 8)])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32, torch.float16, torch.float64])
def test_what_is_taken_is_what_supports_says(dtype, dims, mask, place):
    from flashcore.torch.sdpa import _takes

    q, v = (torch.zeros(1, 1, 4, dim, device=place).to(dtype) for dim in dims)
    plane = None if mask is None else torch.zeros(4, 4, dtype=mask, device=place)
    word = "mask" if mask is torch.bool else "bias"
    if dtype is torch.float8_e4m3fn:
        assert not _takes(q, q, v, plane, 0.0, False)  # torch's function means something else there
    else:
        found = fc.supports(q, q, v, **{word: plane})
        is_fast = found.ok and (place == "cpu" or not found.kernel.endswith(".reference"))
        assert _takes(q, q, v, plane, 0.0, False) == is_fast


def test_on_a_gpu_only_what_a_fast_kernel_runs_is_taken(monkeypatch):
    from flashcore.torch import sdpa

    monkeypatch.setattr(sdpa, "_HAS_CUDA", True)
    for is_hopper in (True, False):
        monkeypatch.setattr(sdpa, "_has_fast_kernels", lambda index, found=is_hopper: found)
        with FakeTensorMode(allow_non_fake_inputs=True):
            q = torch.empty(1, 2, 8, 64, dtype=torch.float16, device="cuda")
            assert sdpa._takes(q, q, q, None, 0.0, True) is is_hopper
            assert not sdpa._takes(q, q, q, None, 0.1, True)
            assert not sdpa._takes(*(q.float(),) * 3, None, 0.0, True)
            assert not sdpa._takes(q.requires_grad_(), q, q, None, 0.0, True)
            with torch.no_grad():
                assert sdpa._takes(q, q, q, None, 0.0, True) is is_hopper


@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_multihead_attention_of_torch(mask, calls, place):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64, device=place)
    x = leaf(2, 7, 24, place=place)
    words = {"need_weights": False}
    if mask == "causal":
        words |= {
            "attn_mask": nn.Transformer.generate_square_subsequent_mask(7, device=place).double(),
            "is_causal": True,
        }
    if mask == "padding":
        words |= {"key_padding_mask": torch.arange(7, device=place) >= torch.tensor([[7], [4]], device=place)}

    def run():
        out = layer(x, x, x, **words)[0]
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]

    theirs = run()
    with fct.installed():
        assert_same(run(), theirs)
    assert calls == ([(2, 3, 7, 8)] if place == "cpu" else [])  # no fast kernel of a GPU has gradients


def test_a_transformer_of_torch_trains_alike(calls, place):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64, device=place)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = normal(2, 6, 16, place=place)
    padding = torch.arange(6, device=place) >= torch.tensor([[6], [3]], device=place)

    def run():
        loss = model(x, src_key_padding_mask=padding)[~padding].square().sum()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    theirs = run()
    with fct.installed():
        assert_same(run(), theirs)
    assert len(calls) == (2 if place == "cpu" else 0)


def test_the_installed_function_compiles(place):
    q, k, v = (normal(1, 2, 5, 8, place=place, seed=i) for i in range(3))
    with fct.installed():
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph.code)
            return graph

        compiled = torch.compile(
            lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), fullgraph=True, backend=backend
        )
        assert_same([compiled(q, k, v)], [TORCHS_OWN(q, k, v, is_causal=True)])
    assert place != "cpu" or "flashcore" in graphs[0]
