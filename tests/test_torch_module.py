"""flashcore.torch.MultiheadAttention: beside attention written out in torch, and step by step with a cache."""

import copy
import io

import pytest

torch = pytest.importorskip("torch")

import flashcore.torch as fct  # noqa: E402


def layer_on(place, embed_dim=24, num_heads=4, dtype=torch.float64, **words):
    torch.manual_seed(0)
    layer = fct.MultiheadAttention(embed_dim, num_heads, device=place, dtype=dtype, **words)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases, too
    return layer


def tokens(*shape, place="cpu", seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(place, dtype)


def turned(x, base, interleaved):
    """Rotary embedding of (batch, heads, seqlen, dim) as a multiplication of complex numbers."""
    seqlen, dim = x.shape[-2:]
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim)
    angles = torch.arange(seqlen, device=x.device)[:, None] * frequencies
    factor = torch.polar(torch.ones_like(angles), angles)
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor)
    return (product if interleaved else product.transpose(-1, -2)).flatten(-2)


def written_out(layer, x, context=None, mask=None, bias=None, lengths=None):
    """The same layer from matrix products and a softmax."""
    source = x if context is None else context

    def heads(linear, tensor, count):
        return linear(tensor).unflatten(-1, (count, layer.head_dim)).transpose(1, 2)

    q = heads(layer.q_proj, x, layer.num_heads)
    k, v = (heads(linear, source, layer.num_kv_heads) for linear in (layer.k_proj, layer.v_proj))
    if layer.rotary_base:
        q, k = (turned(t, layer.rotary_base, layer.rotary_interleaved) for t in (q, k))
    k, v = (t.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / layer.head_dim**0.5
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    if bias is not None:
        scores = scores + bias
    i, j = (torch.arange(n, device=x.device) for n in scores.shape[-2:])
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device)
    if layer.causal:
        keep &= j <= i[:, None]
    if layer.window:
        left, right = (10**9 if side in (None, -1) else side for side in layer.window)
        keep &= (j >= i[:, None] - left) & (j <= i[:, None] + right)
    if lengths is not None:
        keep = keep & (j < lengths[:, None, None, None])
    if mask is not None:
        keep = keep & mask
    weights = torch.softmax(scores.masked_fill(~keep, -torch.inf), -1)
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2))


LAYERS = {
    "plain": {},
    "causal": {"causal": True},
    "gqa": {"num_kv_heads": 2, "causal": True},
    "mqa": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 10, "bias": False},
    "window": {"window": (2, 1)},
    "causal window": {"causal": True, "window": (3, None)},
    "softcap": {"softcap": 1.5},
    "rotary": {"causal": True, "rotary_base": 100.0},
    "rotary interleaved": {"rotary_base": 100.0, "rotary_interleaved": True, "num_kv_heads": 2},
}


@pytest.mark.parametrize("words", LAYERS.values(), ids=LAYERS)
def test_agrees_with_attention_written_out(words, place):
    layer = layer_on(place, **words)
    x = tokens(2, 7, 24, place=place).requires_grad_()
    given = [x, *layer.parameters()]
    results = []
    for out in (layer(x), written_out(layer, x)):
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "words", [{}, {"causal": True}, {"window": (2, 2)}, {"causal": True, "window": (2, 0)}], ids=str
)
def test_masks_biases_and_lengths(words, place):
    layer = layer_on(place, **words)
    x, bias = tokens(2, 7, 24, place=place), tokens(4, 7, 7, place=place).requires_grad_()
    lengths = torch.tensor([7, 4], dtype=torch.int32, device=place)
    mask = tokens(7, 7, place=place) > -1.5
    mask |= torch.eye(7, dtype=torch.bool, device=place)
    ours = layer(x, mask=mask, bias=bias, key_lengths=lengths)
    theirs = written_out(layer, x, mask=mask, bias=bias, lengths=lengths)
    for b in range(2):  # rows of padding mean nothing
        torch.testing.assert_close(ours[b, : lengths[b]], theirs[b, : lengths[b]])
    (gradient,) = torch.autograd.grad(ours[:, :4].square().sum(), bias)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs[:, :4].square().sum(), bias)[0])


def test_attention_to_a_context(place):
    layer = layer_on(place, context_dim=9)
    x, context = tokens(2, 5, 24, place=place), tokens(2, 8, 9, place=place)
    torch.testing.assert_close(layer(x, context), written_out(layer, x, context))


def test_the_weights_of_torchs_layer_give_its_results(place):
    torchs = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64, device=place)
    layer = layer_on(place)
    weights = torchs.in_proj_weight.chunk(3), torchs.in_proj_bias.chunk(3)
    state = {
        f"{name}_proj.{kind}": part
        for kind, parts in zip(("weight", "bias"), weights, strict=True)
        for name, part in zip("qkv", parts, strict=True)
    }
    layer.load_state_dict({**state, "out_proj.weight": torchs.out_proj.weight, "out_proj.bias": torchs.out_proj.bias})
    x = tokens(2, 5, 24, place=place)
    torch.testing.assert_close(layer(x), torchs(x, x, x, need_weights=False)[0])


# ---- generation ------------------------------------------------------------------------------------------------------

CACHED = {name: words for name, words in LAYERS.items() if words.get("causal")}


@pytest.mark.parametrize("steps", [(1,) * 9, (5, 1, 1, 2), (9,)], ids=["one by one", "prompt first", "at once"])
@pytest.mark.parametrize("words", CACHED.values(), ids=CACHED)
def test_decoding_step_by_step_is_the_full_forward(words, steps, place):
    layer = layer_on(place, **words).eval()
    x = tokens(2, 9, 24, place=place)
    cache = layer.new_cache(2, 12)
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in x.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x))
    assert cache.used == 9
    assert cache.seqlens.tolist() == [9, 9]


def test_prompts_of_different_lengths(place):
    """Padded behind; then the cache forgets the padding, and every sequence goes on from its own length."""
    layer = layer_on(place, causal=True, rotary_base=100.0).eval()
    x, lengths = tokens(2, 6, 24, place=place), [6, 3]
    more = tokens(2, 2, 24, place=place, seed=2)
    cache = layer.new_cache(2, 10)
    with torch.no_grad():
        layer(x, cache=cache)
        cache.truncate(torch.tensor(lengths, device=place))
        out = torch.cat([layer(step, cache=cache) for step in more.split(1, dim=1)], 1)
        for b, length in enumerate(lengths):
            alone = layer(torch.cat([x[b, :length], more[b]])[None])
            torch.testing.assert_close(out[b], alone[0, length:])
    cache.reset()
    assert (cache.used, cache.seqlens.tolist()) == (0, [0, 0])


def test_a_compiled_step_decodes(place):
    layer = layer_on(place, causal=True, num_kv_heads=2, rotary_base=100.0).eval()
    x = tokens(1, 6, 24, place=place)
    step = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    cache = layer.new_cache(1, 8)
    with torch.no_grad():
        parts = [step(part, cache=cache) for part in x.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x))


# ---- as a module -----------------------------------------------------------------------------------------------------


def test_state_is_that_of_the_projections():
    layer = layer_on("cpu", rotary_base=100.0)
    assert set(layer.state_dict()) == {
        f"{name}_proj.{kind}" for name in ("q", "k", "v", "out") for kind in ("weight", "bias")
    }
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    other = layer_on("cpu", rotary_base=100.0)
    torch.nn.init.zeros_(other.q_proj.weight)
    other.load_state_dict(torch.load(stored))
    x = tokens(1, 4, 24)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotary_tables_stay_exact_in_narrow_modules(dtype):
    """Cast to bfloat16, position 257 would be position 256."""
    layer = layer_on("cpu", dtype=torch.float32, rotary_base=100.0)
    exact = layer.rotary_cos.clone()
    layer.to(dtype)
    assert layer(tokens(1, 4, 24, dtype=dtype)).dtype is dtype
    assert torch.equal(layer.rotary_cos, exact)


def test_made_on_meta_and_filled_later(place):
    with torch.device("meta"):
        layer = fct.MultiheadAttention(24, 4, rotary_base=100.0, dtype=torch.float64)
    layer.to_empty(device=place)
    source = layer_on(place, rotary_base=100.0)
    layer.load_state_dict(source.state_dict())
    x = tokens(1, 4, 24, place=place)
    assert torch.equal(layer(x), source(x))


def test_dropout_is_for_training():
    layer = layer_on("cpu", dropout=0.5)
    x = tokens(1, 8, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_autocast():
    layer = layer_on("cpu", dtype=torch.float32, rotary_base=100.0)
    x = tokens(1, 4, 24, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        with torch.no_grad():
            cached = layer.eval()(x, cache=layer.new_cache(1, 4))
    assert out.dtype is cached.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=5e-2, rtol=5e-2)


def test_repr_names_what_matters():
    text = repr(fct.MultiheadAttention(24, 4, num_kv_heads=2, causal=True))
    assert "24, num_heads=4, num_kv_heads=2, head_dim=6, causal=True" in text


REFUSED = {
    "heads": (lambda: fct.MultiheadAttention(24, 4, num_kv_heads=3), "multiple"),
    "embed_dim": (lambda: fct.MultiheadAttention(25, 4), "head_dim="),
    "odd rotary": (lambda: fct.MultiheadAttention(20, 4, rotary_base=1e4), "even"),
    "dropout": (lambda: fct.MultiheadAttention(24, 4, dropout=1.0), r"\[0, 1\)"),
    "rank": (lambda: layer_on("cpu")(tokens(7, 24)), "batch, seqlen, 24"),
    "width": (lambda: layer_on("cpu")(tokens(1, 7, 23)), "batch, seqlen, 24"),
    "context": (lambda: layer_on("cpu")(tokens(1, 7, 24), tokens(1, 7, 23)), "context"),
    "context and causal": (lambda: layer_on("cpu", causal=True)(tokens(1, 7, 24), tokens(1, 7, 24)), "causal"),
    "positions": (lambda: layer_on("cpu", rotary_base=1e4, max_positions=6)(tokens(1, 7, 24)), "max_positions=6"),
    "full cache": (lambda: with_cache({}, 6), "room for 6"),
    "lengths and cache": (lambda: with_cache({}, key_lengths=torch.tensor([3])), "truncate"),
    "dropout and cache": (lambda: with_cache({"dropout": 0.1}), "eval"),
}


def with_cache(words, capacity=8, **call):
    layer = layer_on("cpu", causal=True, **words)
    with torch.no_grad():
        return layer(tokens(1, 7, 24), cache=layer.new_cache(1, capacity), **call)


@pytest.mark.parametrize(("call", "says"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_a_clear_error(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_cache_under_grad_is_refused():
    layer = layer_on("cpu", causal=True)
    cache = layer.new_cache(1, 8)
    with pytest.raises(RuntimeError, match="no_grad"):
        layer(tokens(1, 2, 24), cache=cache)
    assert cache.used == 0
