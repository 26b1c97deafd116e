"""The corners of what stands in for other functions: flash-attn's, torch's own, transformers' attention."""

import importlib
import sys

import pytest

torch = pytest.importorskip("torch")

import flashcore.compat.flash_attn as fa  # noqa: E402
import flashcore.torch as fct  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

TORCHS_OWN = F.scaled_dot_product_attention


def normal(*shape, place="cpu", dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(place, dtype)


def integers(*values, place="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=place)


# ---- flash-attn: packed queries, keys in pages -----------------------------------------------------------------------


def paged(place="cpu", total=5, offsets=(0, 2, 2, 5), keys=(0, 8, 13, 20), longest=(3, 8), **words):
    """out and lse of queries against pages, and the same against the keys put in order."""
    q, pages = normal(total, 4, 16, place=place), normal(2, 6, 4, 2, 16, place=place, seed=1)
    table = integers([0, 1], [2, 3], [4, 5], place=place)[: len(offsets) - 1]
    cu_q, cu_k = integers(*offsets, place=place), integers(*keys, place=place)
    words |= {"causal": True, "return_attn_probs": True}
    out, lse, _ = fa.flash_attn_varlen_func(q, *pages, cu_q, cu_k, *longest, block_table=table, **words)
    in_order = [pages[:, row.long()].flatten(1, 2)[:, : keys[b + 1] - keys[b]] for b, row in enumerate(table)]
    k, v = torch.cat(in_order, 1)
    true_out, true_lse, _ = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, None, None, **words)
    return (out, lse), (true_out, true_lse)


PAGED = {
    "plain": {},
    "bounds not known": {"longest": (None, None)},
    "bounds too large": {"longest": (1000, 1000)},
    "rows behind the last sequence": {"total": 9},
    "and bounds not known": {"total": 9, "longest": (None, None)},
    "no rows": {"total": 0, "offsets": (0, 0, 0, 0)},
    "a window": {"window_size": (3, 0)},
}


@pytest.mark.parametrize("words", PAGED.values(), ids=PAGED)
def test_pages_are_as_keys_in_order(words, place):
    results, true = paged(place, **words)
    torch.testing.assert_close(results, true, rtol=1e-4, atol=1e-5)


WRONG_OFFSETS = {
    "maximum": ({"longest": (2, 8)}, "sequence 2 of cu_seqlens_q has 3 rows, more than the given maximum of 2"),
    "maximum of keys": ({"longest": (3, 7)}, "sequence 0 of cu_seqlens_k has 8 rows, more than the given maximum of 7"),
    "start": ({"offsets": (1, 2, 2, 5)}, r"cu_seqlens_q\[0\] is 1; it must start with 0"),
    "start of keys": ({"keys": (1, 8, 13, 20)}, r"cu_seqlens_k\[0\] is 1; it must start with 0"),
    "falling": ({"offsets": (0, 3, 2, 5)}, r"cu_seqlens_q\[2\] is 2 after 3; it must never fall"),
    "beyond": ({"offsets": (0, 2, 3, 6)}, r"cu_seqlens_q\[3\] is 6, but there are only 5 packed rows"),
    "negative": ({"longest": (-3, 8)}, "-3 given as a bound"),
    "batch": ({"keys": (0, 8)}, r"must have shape \(batch \+ 1,\), got \(4,\) and \(2,\)"),
}


@pytest.mark.parametrize(("words", "says"), WRONG_OFFSETS.values(), ids=WRONG_OFFSETS)
def test_wrong_lengths_are_refused_on_the_cpu(words, says):
    with pytest.raises(ValueError, match=says):
        paged(**words)


def test_a_gpu_is_asked_only_where_checks_are_wished_for(monkeypatch, place):
    if place == "cpu":
        pytest.skip("a CPU is not waited for")
    q = normal(5, 4, 16, place="cpu").to(place)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pages = torch.zeros(2, 6, 4, 2, 16, device=place)
        lengths = torch.arange(4, dtype=torch.int32, device=place)
        table = torch.arange(6, dtype=torch.int32, device=place).view(3, 2)
        fa.flash_attn_varlen_func(q, *pages, lengths, lengths, 3, 8, block_table=table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setenv("FLASHCORE_CHECK", "1")
    with pytest.raises(ValueError, match="more than the given maximum of 2"):
        paged(place, longest=(2, 8))


# ---- flash-attn: what is refused in its own words --------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3, (1, 2, 3)], ids=str)
def test_a_window_is_a_pair(window):
    x = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match=r"window_size=.* given; a pair \(left, right\)"):
        fa.flash_attn_func(x, x, x, window_size=window)


WRONG_CACHES = {
    "floats": ({"cache_batch_idx": torch.tensor([0.0, 1.9])}, TypeError, "cache_batch_idx must be int32, got .*float"),
    "index": ({"cache_batch_idx": integers(0, 5)}, ValueError, r"cache_batch_idx\[1\] is 5; there are caches 0 to 2"),
    "indices": ({"cache_batch_idx": integers(0)}, ValueError, r"cache_batch_idx must have shape \(2,\), got \(1,\)"),
    "padding": ({"cache_leftpad": integers(0, 7)}, ValueError, r"cache_leftpad\[1\] is 7; the sequence has 0 to 6"),
    "negative": ({"cache_leftpad": integers(-1, 0)}, ValueError, r"cache_leftpad\[0\] is -1; the sequence has 0"),
    "paddings": ({"cache_leftpad": integers(1)}, ValueError, r"cache_leftpad must have shape \(2,\), got \(1,\)"),
    "no tensor": ({"cache_leftpad": [0, 1]}, TypeError, "cache_leftpad: builtins.list given"),
}


@pytest.mark.parametrize(("words", "error", "says"), WRONG_CACHES.values(), ids=WRONG_CACHES)
def test_whose_cache_is_whose_is_checked(words, error, says):
    q, cache = torch.zeros(2, 1, 4, 8), torch.zeros(3, 6, 2, 8)
    words = {"cache_batch_idx": integers(0, 2)} | words
    with pytest.raises(error, match=says):
        fa.flash_attn_with_kvcache(q, cache, cache, **words)


def test_the_module_stands_in_for_flash_attn_and_no_more(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", fa)
    assert importlib.import_module("flash_attn").flash_attn_func is fa.flash_attn_func
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.bert_padding")
    assert not hasattr(fa, "__version__")


# ---- torch's function: strides ---------------------------------------------------------------------------------------

ROADS = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
    "bias": {"attn_mask": torch.zeros(5, 5)},
    "shared heads": {"enable_gqa": True},
}


@pytest.mark.parametrize("grad", [False, True], ids=["", "gradient"])
@pytest.mark.parametrize("by_rows", [False, True], ids=["dense", "by rows"])
@pytest.mark.parametrize("words", ROADS.values(), ids=ROADS)
def test_the_result_lies_as_the_query(words, by_rows, grad, place):
    words = {name: x.to(place) if isinstance(x, torch.Tensor) else x for name, x in words.items()}
    heads = (4, 2, 2) if "enable_gqa" in words else (4, 4, 4)

    def run(attend):
        tensors = [normal(2, 5, h, 16, place=place, seed=i).requires_grad_(grad) for i, h in enumerate(heads)]
        q, k, v = (x.transpose(1, 2) if by_rows else x.transpose(1, 2).contiguous() for x in tensors)
        out = attend(q, k, v, **words)
        grads = torch.autograd.grad(out.square().sum(), tensors) if grad else ()
        return out, *grads

    ours, theirs = run(fct.scaled_dot_product_attention), run(TORCHS_OWN)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours[0].stride() == ((320, 16, 64, 1) if by_rows else (320, 80, 16, 1))
    if place == "cpu":
        assert ours[0].stride() == theirs[0].stride()
    if by_rows:
        assert ours[0].transpose(1, 2).view(2, 5, 64).shape == (2, 5, 64)


def test_keys_that_lie_otherwise(place):
    """The result follows the query alone."""
    q, (k, v) = normal(2, 5, 4, 16, place=place).transpose(1, 2), normal(2, 2, 4, 7, 16, place=place, seed=1)
    for given in ((k, v), (k[0], v[0]), (k[0, 0], v[0, 0]), (k[:, :1], v[:, :1]), (k[:1], v[:1])):
        out, true = (attend(q, *given) for attend in (fct.scaled_dot_product_attention, TORCHS_OWN))
        torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-5)
        assert out.stride() == q.stride()


def test_compiled_code_sees_the_same_strides(place):
    def merged(x):
        heads = x.transpose(1, 2)
        return fct.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).view(2, -1, 64)

    x = normal(2, 5, 4, 16, place=place)
    torch.testing.assert_close(torch.compile(merged, backend="aot_eager", fullgraph=True)(x), merged(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float16], ids=str)
def test_masks_of_other_dtypes_are_named(dtype):
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match=rf"attn_mask of {dtype} given; torch.bool, torch.float32 or query's"):
        fct.scaled_dot_product_attention(q, q, q, torch.zeros(3, 3, dtype=dtype))


def test_a_mask_is_a_tensor():
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(TypeError, match="attn_mask must be a tensor, got list"):
        fct.scaled_dot_product_attention(q, q, q, [[True]])


# ---- torch's function: what goes to torch's own while ours is installed ----------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The calls that flashcore was asked for."""
    from flashcore.torch import sdpa

    seen = []

    def attend(*tensors, **words):
        seen.append(words)
        return fct.scaled_dot_product_attention(*tensors, **words)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", attend)
    return seen


def heads(*counts):
    return [normal(2, count, 5, 8, seed=i) for i, count in enumerate(counts)]


LEFT_TO_TORCH = {
    "key and value heads differ": (heads(8, 4, 2), {"enable_gqa": True}),
    "scale of infinity": (heads(2, 2, 2), {"scale": float("inf")}),
    "scale that is no number": (heads(2, 2, 2), {"scale": float("nan")}),
}


@pytest.mark.parametrize(("tensors", "words"), LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_what_ours_refuses_is_torchs(tensors, words, calls):
    with fct.installed():
        out = F.scaled_dot_product_attention(*tensors, **words)
    torch.testing.assert_close(out, TORCHS_OWN(*tensors, **words), equal_nan=True)
    assert calls == []


@pytest.mark.parametrize("shape", [(2, 0, 5, 8), (0, 5, 8)], ids=str)
def test_without_heads_nothing_is_computed(shape, calls):
    """Some versions of torch's own function divide by their number."""
    q, k, v = (torch.zeros(shape, requires_grad=True) for _ in range(3))
    with fct.installed():
        out = F.scaled_dot_product_attention(q, k, v)
    out.sum().backward()
    assert out.shape == q.grad.shape == k.grad.shape == v.grad.shape == shape
    assert len(calls) == 1


TAKEN = {
    "equal": (heads(4, 4, 4), {}),
    "grouped": (heads(4, 2, 2), {"enable_gqa": True}),
    "one key head": (heads(4, 1, 1), {}),
    "one query head": (heads(1, 4, 4), {}),
    "one value head": (heads(4, 4, 1), {}),
    "no heads dimension": ([torch.ones(5, 8)] * 3, {"scale": 2}),
}


@pytest.mark.parametrize(("tensors", "words"), TAKEN.values(), ids=TAKEN)
def test_what_ours_shares_out_is_taken(tensors, words, calls):
    with fct.installed():
        out = F.scaled_dot_product_attention(*tensors, **words)
    torch.testing.assert_close(out, TORCHS_OWN(*tensors, **words), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("backends", "count"),
    [
        (SDPBackend.MATH, 0),
        ([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], 0),  # which the CPU does not have
        (SDPBackend.FLASH_ATTENTION, 1),
        ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], 1),
    ],
    ids=str,
)
def test_the_kernels_that_are_asked_for(backends, count, calls):
    q = normal(1, 2, 5, 8)
    with fct.installed(), sdpa_kernel(backends):
        F.scaled_dot_product_attention(q, q, q)
    assert len(calls) == count


class Plain(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "make",
    [torch.jit.script, lambda module: torch.jit.trace(module, torch.zeros(1, 2, 3, 8), check_trace=False)],
    ids=["script", "trace"],
)
def test_torch_jit_takes_torchs_operator(make, calls):
    with fct.installed():
        graph = make(Plain())
        assert "aten::scaled_dot_product_attention" in {node.kind() for node in graph.graph.nodes()}
    q = normal(1, 2, 5, 8)
    torch.testing.assert_close(graph(q), TORCHS_OWN(q, q, q))
    assert calls == []


# ---- transformers ----------------------------------------------------------------------------------------------------


def transformers():
    return pytest.importorskip("transformers", minversion="5.5"), importlib.import_module("flashcore.transformers")


VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
CHOOSING_THEMSELVES = {
    "FalconModel": lambda hf: hf.FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    ),
    "SamModel": lambda hf: hf.SamConfig(),
    "Data2VecVisionModel": lambda hf: hf.Data2VecVisionConfig(**VISION, intermediate_size=32),
}


@pytest.mark.parametrize("name", CHOOSING_THEMSELVES)
def test_models_that_choose_their_attention_themselves_are_refused(name):
    hf, ours = transformers()
    ours.register()
    module = sys.modules[getattr(hf, name).__module__]
    if not any(word.endswith("ATTENTION_CLASSES") for word in vars(module)):
        pytest.skip(f"{name} of this transformers goes by the interface")
    config = CHOOSING_THEMSELVES[name](hf)
    config._attn_implementation = "flashcore"
    with pytest.raises(ValueError, match=rf"{name} is not written for .*eager"):
        getattr(hf, name)(config)


def test_models_that_say_no_more_than_sdpa_but_go_by_the_interface_run(place):
    hf, ours = transformers()
    ours.register()
    config = hf.WhisperConfig(
        vocab_size=60,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    sounds, text = normal(1, 8, 20, place=place), torch.arange(3, 8, device=place)[None]
    outs = []
    for name in ("eager", "flashcore"):
        config._attn_implementation = name
        torch.manual_seed(0)
        model = hf.WhisperModel(config).to(place).eval()
        with torch.no_grad():
            outs.append(model(input_features=sounds, decoder_input_ids=text)[0])
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
def test_names_that_mean_another_attention_are_refused(name):
    hf, ours = transformers()
    before = hf.modeling_utils.ALL_ATTENTION_FUNCTIONS.get(name)
    with pytest.raises(ValueError, match=rf'"{name}" is an attention of transformers already'):
        ours.register(name)
    assert hf.modeling_utils.ALL_ATTENTION_FUNCTIONS.get(name) is before
