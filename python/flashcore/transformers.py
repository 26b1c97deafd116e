"""flashcore for Hugging Face transformers: `register()` makes ``attn_implementation="flashcore"`` known.

    import flashcore.transformers

    flashcore.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flashcore")

Every model written for transformers' attention interface then runs on flashcore, forward and backward, on the CPU and
on GPUs: grouped heads, sliding windows, softcap, sinks, position biases, dropout, padding, static and dynamic caches,
and packed sequences.
"""

from __future__ import annotations

import sys
from functools import wraps
from inspect import signature
from itertools import chain
from os.path import commonprefix
from typing import Any, Optional

try:
    import torch
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils, modeling_utils
    from transformers.generation import utils as generation_utils
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        "flashcore.transformers needs PyTorch and transformers 5.5 or newer: pip install torch 'transformers>=5.5'"
    ) from error

if "q_length" not in signature(sdpa_mask).parameters:
    raise ImportError(
        f"flashcore.transformers needs transformers 5.5 or newer, this is {transformers.__version__}: "
        "pip install -U transformers"
    )

from .torch import attention, attention_varlen

__all__ = ["attention_forward", "attention_mask", "register"]

_names: set[str] = set()  # under which the functions here are registered


def register(name: str = "flashcore") -> None:
    """Make ``attn_implementation=name`` known to transformers. Doing it again changes nothing.

    transformers takes a name with "flash" in it for a kind of flash-attn. That is wanted where vision models and
    continuous batching hand over packed sequences, and is corrected where models are loaded, masks made and texts
    generated. A model that itself refuses flash-attn takes a name without "flash", such as register("fused").
    Models that are not written for the attention interface refuse the name with a ValueError, and a name that means
    another attention in transformers ("sdpa") is one here.
    """
    _refuse_taken(name)
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)
    _names.add(name)
    for module in (modeling_utils, masking_utils, generation_utils):
        _correct(module, "is_flash_attention_requested", _apart_from_flash_attn)
    _correct(modeling_utils.PreTrainedModel, "get_correct_attn_implementation", _refusing_strangers)


# ---- masks ---------------------------------------------------------------------------------------------------------


class PositionMask(torch.Tensor):
    """A boolean (batch, 1, seqlen_q, seqlen_k) mask that a causal rule and a window describe.

    `attention_forward` reads the description. Any other operation gets the mask written out, so that a model may do
    with it what it likes.
    """

    causal: str
    window: Optional[tuple[int, None]]

    @staticmethod
    def __new__(cls, shape: tuple[int, int, int, int], causal: str, left: Optional[int], device: Any) -> PositionMask:
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.causal = causal
        mask.window = None if left is None else (left, None)
        return mask

    def written_out(self) -> torch.Tensor:
        """The same mask as an ordinary tensor."""
        seqlen_q, seqlen_k = self.shape[-2:]
        shift = seqlen_k - seqlen_q if self.causal == "bottom_right" else 0
        after = torch.arange(seqlen_k, device=self.device) - torch.arange(seqlen_q, device=self.device)[:, None] - shift
        seen = after <= 0
        if self.window is not None:
            seen &= after >= -self.window[0]
        return seen.expand(self.shape)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PositionMask({tuple(self.shape)}, causal={self.causal!r}, window={self.window})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.written_out, (args, kwargs or {}))
        return function(*args, **kwargs)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: Optional[torch.Tensor] = None,
    local_size: Optional[int] = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: Any = "cpu",
    **others: Any,
) -> Optional[torch.Tensor]:
    """transformers' mask function for flashcore.

    Returns None where `attention_forward` needs no mask beyond the layer's own causal rule, a `PositionMask` where
    positions alone decide, else a boolean (batch, 1, seqlen_q, seqlen_k), True = keep.
    """
    if allow_is_causal_skip and _is_window(local_size, config) and not torch.compiler.is_compiling():
        alignment = _alignment(q_length, kv_length, q_offset, kv_offset)
        if alignment is not None and _keeps_all(attention_mask, kv_length, kv_offset):
            reaches = local_size is None or kv_length < local_size  # from the last query to the first key
            if reaches and alignment == "bottom_right" and q_length in (1, kv_length):
                return None
            left = None if local_size is None else local_size - 1
            return PositionMask((batch_size, 1, q_length, kv_length), alignment, left, device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        config=config,
        device=device,
        **others,
    )


def _is_window(local_size: Optional[int], config: Any) -> bool:
    """Whether local_size, if any, is a sliding window; chunks are given by the same name."""
    if local_size is None:
        return True
    return (
        local_size == getattr(config, "sliding_window", None) and getattr(config, "attention_chunk_size", None) is None
    )


def _alignment(q_length: int, kv_length: int, q_offset: Any, kv_offset: Any) -> Optional[str]:
    """Which causal rule these positions follow, if it can be told without waiting for the device."""
    if not isinstance(q_offset, int) or not isinstance(kv_offset, int):
        return None
    if q_offset + q_length == kv_offset + kv_length:
        return "bottom_right"
    return "top_left" if q_offset == kv_offset else None


def _keeps_all(padding: Optional[torch.Tensor], kv_length: int, kv_offset: int) -> bool:
    if padding is None:
        return True
    end = kv_offset + kv_length
    return padding.shape[-1] >= end and bool(padding[:, kv_offset:end].all())


# ---- the call ------------------------------------------------------------------------------------------------------


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    sliding_window: Optional[int] = None,
    softcap: Optional[float] = None,
    is_causal: Optional[bool] = None,
    s_aux: Optional[torch.Tensor] = None,
    position_bias: Optional[torch.Tensor] = None,
    cache: Any = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query, key and value (batch, heads, seqlen, head_dim).

    Args:
      attention_mask: None, boolean with True = keep, or added to the scores; broadcastable to
        (batch, heads, seqlen_q, seqlen_k). None with is_causal (default: the module's) is the causal rule.
      sliding_window: used with packed sequences; elsewhere the mask has it.
      softcap, scaling, dropout: as flashcore's softcap, scale, dropout_p.
      s_aux: (heads), the sinks.
      position_bias: added to the scores, (1 or batch, heads, seqlen_q, seqlen_k), with a gradient.
      cache: of continuous batching.
      others: cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k of packed sequences; what models pass along for
        other implementations is ignored.

    Returns (out, None), out (batch, seqlen_q, heads, head_dim).

    Raises ValueError where weights are asked for (output_attentions), which are never made.
    """
    if others.get("output_attentions"):
        raise ValueError(
            "output_attentions=True given; flashcore does not make the attention weights: load the model with "
            'attn_implementation="eager" to see them'
        )
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=others)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    words: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap or 0.0,
        "dropout_p": dropout,
        "sinks": _added(s_aux, query),
    }
    if others.get("cu_seq_lens_q") is not None:
        return _packed(query, key, value, causal, sliding_window, others, words), None

    if isinstance(attention_mask, PositionMask):
        words |= {"causal": attention_mask.causal, "window": attention_mask.window}
    elif attention_mask is None:
        words["causal"] = "top_left" if causal and query.shape[1] > 1 else False
    elif attention_mask.dtype == torch.bool:
        words["mask"] = attention_mask
    else:
        position_bias = attention_mask if position_bias is None else position_bias + attention_mask
    out: Any = attention(query, key, value, layout="bshd", bias=_added(position_bias, query), **words)
    return out, None


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    sliding_window: Optional[int],
    lengths: dict[str, Any],
    words: dict[str, Any],
) -> torch.Tensor:
    """Sequences one after the other in one row: (1, tokens, heads, head_dim)."""
    if lengths.get("block_table") is not None:
        raise ValueError("block_table given; flashcore's attention function takes keys and values that are in order")
    out: Any = attention_varlen(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        lengths["cu_seq_lens_q"].to(torch.int32),
        lengths["cu_seq_lens_k"].to(torch.int32),
        max_seqlen_q=lengths.get("max_length_q"),
        max_seqlen_k=lengths.get("max_length_k"),
        causal="bottom_right" if causal else False,
        window=(sliding_window - 1, None) if causal and sliding_window else None,
        **words,
    )
    return out.unflatten(0, query.shape[:2])  # type: ignore[no-any-return]


def _added(scores: Optional[torch.Tensor], query: torch.Tensor) -> Optional[torch.Tensor]:
    """What is added to scores, in a dtype that goes with the query's."""
    if scores is None or scores.dtype in (query.dtype, torch.float32):
        return scores
    return scores.to(query.dtype)


# ---- what transformers has to be told --------------------------------------------------------------------------------


def _correct(owner: Any, name: str, correction: Any) -> None:
    """Put `correction(original)` in the place of owner's function, once."""
    original = getattr(owner, name, None)
    if original is not None and not getattr(original, "knows_flashcore", False):
        corrected: Any = wraps(original)(correction(original))
        corrected.knows_flashcore = True
        setattr(owner, name, corrected)


def _apart_from_flash_attn(original: Any) -> Any:
    """A module of transformers is not to take the names here for flash-attn because they have "flash" in them."""

    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: Optional[str] = None, **more: Any
    ) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        return name not in _names and original(config, requested_attention_implementation, **more)

    return is_flash_attention_requested


def _refuse_taken(name: str) -> None:
    attentions, masks = modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    is_free = attentions.get(name) in (None, attention_forward) and masks.get(name) in (None, attention_mask)
    if not is_free:
        raise ValueError(
            f'register("{name}") given; "{name}" is an attention of transformers already: take another name, '
            'such as "flashcore" or "fused"'
        )


def _goes_by_the_interface(model: type) -> bool:
    """Whether the attention layers of this model look the function up under the name that is asked for.

    Many models that do say no more than that they support sdpa. Of those, some choose among classes of their own, or
    call torch's function themselves. And a model that says more may have a part that chooses (DeepSeek-OCR-2's SAM).
    """
    bases = (kind for kind in model.__mro__ if kind is not modeling_utils.PreTrainedModel)
    families = {kind.__module__ for kind in bases if issubclass(kind, modeling_utils.PreTrainedModel)}
    if getattr(model, "_supports_attention_backend", False):
        return not any(map(model.__name__.startswith, chain.from_iterable(map(_own_choices, families))))
    return getattr(model, "_supports_sdpa", False) and all(map(_looks_it_up, families))


def _own_choices(module: str) -> list[str]:
    """For each choice between attention classes of a module's own, what their names begin with: that of the model."""
    words = vars(sys.modules[module]) if module in sys.modules else {}
    choices = [word.values() for word in words.values() if type(word) is dict and {"eager", "sdpa"} <= word.keys()]
    return [commonprefix([getattr(kind, "__name__", "") for kind in kinds]) for kinds in choices]


def _looks_it_up(module: str) -> bool:
    words = vars(sys.modules[module]) if module in sys.modules else {}
    has_layers = any(
        isinstance(word, type)
        and issubclass(word, torch.nn.Module)
        and "Attention" in name
        and word.__module__ == module  # a model that is put together from others leaves it to them
        for name, word in words.items()
    )
    return not _own_choices(module) and ("ALL_ATTENTION_FUNCTIONS" in words or not has_layers)


def _refusing_strangers(original: Any) -> Any:
    """Models that do not go by the interface may read its masks otherwise (as numbers to add, for one), or fail."""

    def get_correct_attn_implementation(
        model: Any, requested_attention: Optional[str], *more: Any, **words: Any
    ) -> str:
        if requested_attention in _names and not _goes_by_the_interface(type(model)):
            raise ValueError(
                f'attn_implementation="{requested_attention}" given; {type(model).__name__} is not written for '
                'transformers\' attention interface: attn_implementation="eager" runs it'
            )
        return original(model, requested_attention, *more, **words)  # type: ignore[no-any-return]

    return get_correct_attn_implementation
