"""attn_implementation="flashcore" in Hugging Face transformers, judged by its own eager attention on tiny models."""

import copy
import os
import subprocess
import sys

import pytest
from packaging.version import Version

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may wait for a network
torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers", minversion="5.5")

import flashcore.transformers as fct  # noqa: E402
from transformers import masking_utils  # noqa: E402

hf.logging.set_verbosity_error()
fct.register()

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"sliding_window": 4, "head_dim": 8}

DECODERS = {
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED)),
    "mistral, window": lambda: (hf.MistralForCausalLM, hf.MistralConfig(**WINDOWED)),
    "gemma2, window and softcap": lambda: (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**WINDOWED, attn_logit_softcapping=1.0, query_pre_attn_scalar=16),
    ),
    "gpt-oss, window and sinks": lambda: (
        hf.GptOssForCausalLM,
        hf.GptOssConfig(**WINDOWED, num_local_experts=2, num_experts_per_tok=1),
    ),
    "llama4, chunks": lambda: (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(
            **GROUPED, head_dim=8, attention_chunk_size=4, num_local_experts=1, intermediate_size_mlp=48
        ),
    ),
    "gpt2": lambda: (hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)),
}
OTHERS = {
    "bert": lambda: (hf.BertModel, hf.BertConfig(**SMALL)),
    "t5, position bias": lambda: (
        hf.T5ForConditionalGeneration,
        hf.T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=50, dropout_rate=0.0),
    ),
}
MODELS = DECODERS | OTHERS

TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}  # float32, two layers


def models(name, place, *implementations):
    """The same random model once for each implementation."""
    kind, config = MODELS[name]()
    if kind is hf.T5ForConditionalGeneration and not kind._supports_sdpa:
        pytest.skip("T5 of this transformers has an attention of its own")
    for implementation in implementations:
        config = copy.deepcopy(config)
        config._attn_implementation = implementation
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # sharper than a fresh model: every rule shows in the numbers
        yield model.to(place).eval()


def tokens(place, length=9):
    """Two sequences of token ids, the first padded on the left, and their padding mask."""
    ids = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1)).to(place)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    return ids, padding


def answer(model, ids, padding):
    more = {"decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, attention_mask=padding, **more)[0]


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_as_eager(name, padded, place):
    eager, ours = models(name, place, "eager", "flashcore")
    assert ours.config._attn_implementation == "flashcore"
    ids, padding = tokens(place)
    with torch.no_grad():
        expected, out = (answer(model, ids, padding if padded else None) for model in (eager, ours))
    if padded and out.shape[1] == ids.shape[1]:  # what stands in padding means nothing
        expected, out = (x[padding.bool()] for x in (expected, out))
    torch.testing.assert_close(out, expected, **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradients_as_eager(name, place):
    eager, ours = models(name, place, "eager", "flashcore")
    ids, padding = tokens(place)
    for model in (eager, ours):
        out = answer(model, ids, padding)
        counted = out[padding.bool()] if out.shape[1] == ids.shape[1] else out
        (counted.float() * torch.linspace(-1, 1, out.shape[-1], device=place)).square().mean().backward()
    for (path, mine), true in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if true.grad is None:
            assert mine.grad is None or not mine.grad.any(), path
        else:
            torch.testing.assert_close(mine.grad, true.grad, rtol=1e-3, atol=1e-5 * true.grad.abs().max().item() + 1e-7)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [n for n in DECODERS if n != "llama4, chunks"])
def test_the_same_text_as_eager(name, cache, place):
    """Greedy, past the window, from prompts of different lengths."""
    eager, ours = models(name, place, "eager", "flashcore")
    ids, padding = tokens(place)
    words = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True, "pad_token_id": 0, "eos_token_id": None}
    texts = [m.generate(ids, attention_mask=padding, cache_implementation=cache, **words) for m in (eager, ours)]
    assert texts[1].shape == (2, 17)
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_the_same_text_by_transformers_own_compiled_decoding(name, place):
    """With a static cache generate() compiles the decoding step: on GPUs by itself, elsewhere if it is told to."""
    eager, ours = models(name, place, "eager", "flashcore")
    ids, padding = tokens(place)
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    compiling = hf.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    expected = eager.generate(ids, attention_mask=padding, disable_compile=True, **words)
    text = ours.generate(ids, attention_mask=padding, cache_implementation="static", compile_config=compiling, **words)
    assert hasattr(ours, "_compiled_call")
    assert torch.equal(text, expected)


@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_a_prompt_in_two_parts(name, place):
    """The second part's queries come after keys that are in the cache: fewer queries than keys."""
    eager, ours = models(name, place, "eager", "flashcore")
    ids, _ = tokens(place, 12)
    with torch.no_grad():
        expected = eager(ids).logits[:, 5:]
        first = ours(ids[:, :5], use_cache=True)
        out = ours(ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(out, expected, **TOLERANCE)


def test_under_autocast(place):
    sdpa, ours = models("llama", place, "sdpa", "flashcore")
    ids, padding = tokens(place)
    with torch.no_grad(), torch.autocast(place, torch.bfloat16):
        expected, out = (answer(model, ids, padding)[padding.bool()] for model in (sdpa, ours))
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05 * expected.float().std().item())


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_compiled_as_one_graph(padded, place):
    torch.compiler.reset()  # what other tests compiled of the same code counts against its limit
    eager, ours = models("mistral, window", place, "eager", "flashcore")
    ids, padding = tokens(place)
    given = {"attention_mask": padding} if padded else {}
    with torch.no_grad():
        out = torch.compile(ours, fullgraph=True, backend="aot_eager")(ids, **given).logits
        expected = eager(ids, **given).logits
    kept = padding.bool() if padded else ...
    torch.testing.assert_close(out[kept], expected[kept], **TOLERANCE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, place):
    """Layers run again in the backward pass, with the same mask."""
    plain, saving = models("mistral, window", place, "flashcore", "flashcore")
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids, _ = tokens(place)
    for model in (plain, saving):
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
    for mine, true in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, true.grad)


def test_a_loaded_model_is_switched(place):
    eager, ours = models("mistral, window", place, "eager", "eager")
    ours.set_attn_implementation("flashcore")
    assert ours.config._attn_implementation == "flashcore"
    ids, _ = tokens(place)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, eager(ids).logits, **TOLERANCE)


def test_dropout_belongs_to_training(place):
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, attn_pdrop=0.5, resid_pdrop=0, embd_pdrop=0)
    config._attn_implementation = "flashcore"
    model = hf.GPT2Model(config).to(place)
    ids, _ = tokens(place)

    def run(seed):
        torch.manual_seed(seed)
        return model(ids)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


# ---- packed sequences ------------------------------------------------------------------------------------------------


SEES_POSITIONS = [("positions", name) for name in ("llama", "mistral, window")]  # gpt-oss makes masks without them
TAKES_LENGTHS = [("lengths", name) for name in ("llama", "mistral, window", "gpt-oss, window and sinks")]


@pytest.mark.parametrize(("told", "name"), SEES_POSITIONS + TAKES_LENGTHS)
def test_packed_sequences_do_not_see_each_other(told, name, place):
    (model,) = models(name, place, "flashcore")
    ids, _ = tokens(place)
    packed, positions = ids.reshape(1, 18), torch.arange(9, device=place).repeat(1, 2)
    rows = torch.tensor([0, 9, 18], dtype=torch.int32, device=place)
    lengths = {"cu_seq_lens_q": rows, "cu_seq_lens_k": rows, "max_length_q": 9, "max_length_k": 9}
    with torch.no_grad():
        apart = model(ids).logits
        words = lengths if told == "lengths" else {}
        together = model(packed, position_ids=positions, use_cache=False, **words).logits
    torch.testing.assert_close(together.reshape(apart.shape), apart, **TOLERANCE)


def test_a_vision_model_hands_over_packed_images(place):
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4)
    MODELS["vision"] = lambda: (Qwen2VisionTransformerPretrainedModel, config)
    eager, ours = models("vision", place, "eager", "flashcore")
    grids = torch.tensor([[1, 4, 4], [1, 2, 6]], device=place)
    pixels = torch.randn(28, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0)).to(place)
    with torch.no_grad():
        expected, out = (model(pixels, grid_thw=grids).pooler_output for model in (eager, ours))
    torch.testing.assert_close(out, expected, **TOLERANCE)


@pytest.mark.skipif(Version(hf.__version__) < Version("5.23"), reason="knew only names of its own before")
@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_continuous_batching_writes_the_same_text(name, place):
    (model,) = models(name, place, "flashcore")
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    words = hf.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    small = hf.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32, use_cuda_graph=False)
    results = model.generate_batch(inputs=prompts, generation_config=words, continuous_batching_config=small)
    texts = [result.generated_tokens for result in results.values()]
    alone = [model.generate(torch.tensor([p], device=place), generation_config=words)[0, len(p) :] for p in prompts]
    assert texts == [text.tolist() for text in alone]


# ---- masks -----------------------------------------------------------------------------------------------------------

MASK = {"batch_size": 2, "device": "cpu", "config": hf.MistralConfig(sliding_window=4)}
PLACES = {
    "square": {"q_length": 7, "kv_length": 7},
    "one more": {"q_length": 1, "kv_length": 6, "q_offset": 5},
    "a part": {"q_length": 3, "kv_length": 9, "q_offset": 6},
    "a window's cache": {"q_length": 3, "kv_length": 6, "q_offset": 6, "kv_offset": 3},
    "a static cache": {"q_length": 5, "kv_length": 8},
}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_described_mask_is_the_one_written_out(places, window):
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    words = MASK | places | {"mask_function": function, "local_size": window}
    mask = fct.attention_mask(**words)
    expected = masking_utils.sdpa_mask(**words, allow_is_causal_skip=False)
    if mask is None:  # the layer's own rule: all keys of a last query, or causal where there are as many queries
        assert window is None
        assert places["q_length"] in (1, places["kv_length"])
    else:
        assert isinstance(mask, fct.PositionMask)
        assert mask.shape == expected.shape
        assert torch.equal(mask & True, expected)
        assert torch.equal(mask[:, :, 1:, :3], expected[:, :, 1:, :3])


def test_what_positions_cannot_say_is_written_out():
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[0, :2] = False
    words = MASK | PLACES["square"]
    assert type(fct.attention_mask(**words, attention_mask=padding)) is torch.Tensor
    assert type(fct.attention_mask(**words, allow_is_causal_skip=False)) is torch.Tensor
    chunks = hf.Llama4TextConfig(attention_chunk_size=4)
    function = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64))
    mask = fct.attention_mask(**(words | {"config": chunks, "local_size": 4, "mask_function": function}))
    assert type(mask) is torch.Tensor


# ---- names and refusals ----------------------------------------------------------------------------------------------


def test_registering_under_another_name(place):
    fct.register("fused")
    eager, ours = models("llama", place, "eager", "fused")
    ids, padding = tokens(place)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, eager(ids).logits, **TOLERANCE)


def test_flash_attn_is_still_told_apart():
    fct.register()
    fct.register()
    asked = hf.modeling_utils.is_flash_attention_requested
    assert asked(requested_attention_implementation="flash_attention_2")
    assert not asked(requested_attention_implementation="flashcore")
    assert not asked(requested_attention_implementation="sdpa")


OF_THEIR_OWN = {
    "RemBertModel": lambda: hf.RemBertConfig(**SMALL, input_embedding_size=16),  # would add the mask up as numbers
    "SplinterModel": lambda: hf.SplinterConfig(**SMALL),  # does not say that no mask means no causal rule
    "GPTJModel": lambda: hf.GPTJConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),  # and flash-attn
}


@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_models_with_an_attention_of_their_own_are_refused(name):
    kind, config = getattr(hf, name), OF_THEIR_OWN[name]()
    if kind._supports_attention_backend:
        pytest.skip(f"{name} of this transformers goes by the interface")
    config._attn_implementation = "flashcore"
    with pytest.raises(ValueError, match=rf"{name} is not written for .*eager"):
        kind(config)


@pytest.mark.parametrize("family", ["DeepseekOcr2", "UnlimitedOcr"])
def test_a_part_with_an_attention_of_its_own_is_refused_and_the_rest_is_not(family):
    """Their SAM chooses between classes of its own, though they say that they go by the interface."""
    kind = getattr(hf, f"{family}VisionModel", None) or pytest.skip(f"this transformers has no {family}")
    fct.register()
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = kind.config_class(sam_config=small, encoder_config={**small, "intermediate_size": 64})
    if isinstance(config.sam_config, dict):
        pytest.skip("this transformers makes no configurations of the parts")
    config._attn_implementation = "flashcore"
    with torch.device("meta"), pytest.raises(ValueError, match=rf"{family}SamVisionEncoder is not written for .*eager"):
        kind(config)
    config.sam_config._attn_implementation = "eager"
    with torch.device("meta"):
        kind(config)
    assert config.encoder_config._attn_implementation == "flashcore"


def test_attention_weights_are_refused():
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"output_attentions=True given.*eager"):
        fct.attention_forward(torch.nn.Module(), x, x, x, None, output_attentions=True)


def test_without_transformers_the_import_says_what_to_install():
    program = "import sys; sys.modules['transformers'] = None; import flashcore.transformers"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ImportError: flashcore.transformers needs PyTorch and transformers 5.5 or newer: pip install" in done.stderr
