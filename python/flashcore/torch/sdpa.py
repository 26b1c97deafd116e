"""torch's scaled_dot_product_attention, computed by flashcore: as a function, and in place of torch's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Optional

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from ..device import device_count, device_info
from ..options import Causal
from .functional import _autocast_dtype, attention, is_compiling, record_plain
from .ops import attend_alike, dense_rows, is_dynamo_compiling

_NAME = "scaled_dot_product_attention"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_HEAD_DIM = 256


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, argument for argument, by flashcore.

    Args:
      query: (…, heads_q, L, E), float16, bfloat16, float32 or float64. Any number of leading dimensions, none too.
      key: (…, heads, S, E); value: (…, heads, S, Ev). Leading dimensions broadcast, as does a single head.
      attn_mask: broadcastable to (…, heads_q, L, S); boolean, True = takes part, or added to the scores: of query's
        dtype or float32, with a gradient where it requires one. Or a `torch.nn.attention.bias.CausalBias`.
      dropout_p: probability of dropping a weight, always applied. Which ones follows torch.manual_seed, but is not the
        choice that torch's own function makes.
      is_causal: query i sees keys j ≤ i (top-left, also where L and S differ).
      scale: default 1/√E.
      enable_gqa: heads_q may be a multiple of heads.

    Returns: (…, heads_q, L, Ev), of query's dtype. A query that sees no key gets 0. Where query is a tensor (batch, L,
    heads_q, E) seen through transpose(1, 2), the result is one, too.

    Raises: RuntimeError where the call can never be valid, as torch's own; TypeError for what is no tensor. Compiled
    and transformed calls, dtypes under autocast and errors of differentiation are as in `flashcore.torch.attention`.
    """
    if attn_mask is None and dropout_p == 0 and not is_dynamo_compiling():
        causal: Causal = "top_left" if is_causal else False
        try:
            result = attend_alike(query, key, value, causal, scale)
            if result is True:
                if query.is_contiguous() or not _lies_by_rows(query):
                    return record_plain(("bhsd", causal, scale), query, key, value)  # type: ignore[no-any-return]
                rows = (x.transpose(1, 2) for x in (query, key, value))
                return record_plain(("bshd", causal, scale), *rows).transpose(1, 2)  # type: ignore[no-any-return]
            if result is not None:
                return result  # type: ignore[return-value]
        except (ValueError, TypeError, IndexError):
            pass  # the long road knows what to do, or what to say
    mask = () if attn_mask is None else (("attn_mask", attn_mask),)
    for name, tensor in (("query", query), ("key", key), ("value", value), *mask):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_NAME}: {name} must be a tensor, got {type(tensor).__qualname__}")
    try:
        return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    except (ValueError, TypeError) as error:
        raise RuntimeError(f"{_NAME}: {error}") from error


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    dropout_p: float,
    is_causal: bool,
    scale: Optional[float],
    enable_gqa: bool,
) -> Tensor:
    causal, attn_mask = _causal_rule(query, key, attn_mask, is_causal)
    dimensions = (query.dim(), key.dim(), value.dim())
    if min(dimensions) < 2:
        raise ValueError(f"query, key and value need at least 2 dimensions, got {dimensions}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p={dropout_p} given; a probability between 0 and 1 is needed")
    is_by_rows = max(dimensions) == 4 and _lies_by_rows(query)
    if dimensions == (4, 4, 4) and query.shape[0] == key.shape[0] == value.shape[0]:
        batch = query.shape[:1]
    else:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        query, key, value = (_in_four_dimensions(x, batch) for x in (query, key, value))
    query, key, value = _matched_heads(query, key, value, enable_gqa)
    mask, bias = None, None
    if attn_mask is not None:
        _check_dtype(attn_mask, query)
        attn_mask = _plane(attn_mask, batch, query, key)
        mask, bias = (attn_mask, None) if attn_mask.dtype is torch.bool else (None, attn_mask)
    everything = dropout_p == 1  # is dropped: 0 with gradients of 0
    given = (dense_rows(x) for x in (query, key, value))
    if query.shape[1] == 0:
        out = query @ key.transpose(-2, -1) @ value
    else:
        out = attention(  # type: ignore[assignment]
            *((x.transpose(1, 2) for x in given) if is_by_rows else given),
            causal=causal,
            scale=scale,
            mask=mask,
            bias=bias,
            dropout_p=0.0 if everything else dropout_p,
            layout="bshd" if is_by_rows else "bhsd",
        )
        out = out.transpose(1, 2) if is_by_rows else out
    out = out * 0 if everything else out
    if dimensions == (4, 4, 4):
        return out
    heads = () if max(dimensions) == 2 else out.shape[1:2]
    return out.reshape(*batch, *heads, *out.shape[2:])


def _causal_rule(query: Tensor, key: Tensor, attn_mask: Any, is_causal: bool) -> tuple[Any, Optional[Tensor]]:
    """The rule, and the mask that is left."""
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal given; one of them, please")
    if not isinstance(attn_mask, CausalBias):
        return "top_left" if is_causal else False, attn_mask
    given, lengths = (attn_mask.seq_len_q, attn_mask.seq_len_kv), (query.shape[-2], key.shape[-2])
    if given != lengths:
        raise ValueError(f"CausalBias of {given} given, but query and key have the lengths {lengths}")
    return "top_left" if attn_mask.variant == CausalVariant.UPPER_LEFT else "bottom_right", None


def _lies_by_rows(query: Tensor) -> bool:
    """Whether the heads of a row lie together: what returns has q's order then, as torch's own, for a view of it."""
    return query.dim() == 4 and query.stride(1) < query.stride(2)


def _check_dtype(attn_mask: Tensor, query: Tensor) -> None:
    allowed = (torch.bool, torch.float32, query.dtype)
    if attn_mask.dtype in allowed or attn_mask.is_floating_point() and _autocast_dtype(query) is not None:
        return
    raise ValueError(
        f"attn_mask of {attn_mask.dtype} given; torch.bool, torch.float32 or query's {query.dtype} is allowed"
    )


def _in_four_dimensions(tensor: Tensor, batch: torch.Size) -> Tensor:
    if tensor.dim() == 2:
        tensor = tensor.unsqueeze(0)
    rows = tensor.shape[-3:]
    return tensor.expand(*batch, *rows).reshape(math.prod(batch), *rows)


def _matched_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    heads_q, heads_k, heads_v = query.shape[1], key.shape[1], value.shape[1]
    if heads_q == heads_k == heads_v:
        return query, key, value
    if flaw := _head_flaw(heads_q, heads_k, heads_v, enable_gqa):
        raise ValueError(flaw)
    heads = max(heads_k, heads_v)
    if heads_q == 1 and not enable_gqa:
        query = query.expand(-1, heads, -1, -1)
    return query, key.expand(-1, heads, -1, -1), value.expand(-1, heads, -1, -1)


def _head_flaw(heads_q: int, heads_k: int, heads_v: int, enable_gqa: bool) -> str:
    """Why heads do not go together; empty where they do, though not all of what enable_gqa lets pass can be grouped."""
    heads = max(heads_k, heads_v)
    if min(heads_k, heads_v) not in (1, heads):
        return f"key has {heads_k} heads and value {heads_v}; they must be equal"
    if not enable_gqa and heads_q != 1 and heads not in (1, heads_q):
        return f"query has {heads_q} heads, key and value have {heads}; enable_gqa=True lets them share"
    return ""


def _plane(attn_mask: Tensor, batch: torch.Size, query: Tensor, key: Tensor) -> Tensor:
    """The mask, broadcastable to (batch, heads, L, S) of four dimensions."""
    if len(batch) == 1 and attn_mask.dim() <= 4:
        return attn_mask
    full = (*batch, query.shape[1], query.shape[2], key.shape[2])
    rank = attn_mask.dim()
    if rank > len(full) or any(
        n not in (1, f) for n, f in zip(reversed(attn_mask.shape), reversed(full), strict=False)
    ):
        raise ValueError(f"attn_mask of shape {tuple(attn_mask.shape)} given; it must broadcast to {full}")
    if rank <= 3:
        return attn_mask
    rows = attn_mask.shape[-3:]
    return attn_mask.expand(*batch, *rows).reshape(math.prod(batch), *rows)


# ---- in place of torch's own -----------------------------------------------------------------------------------------

_torchs_own: Any = None  # while ours stands in its place
_ROUTED = frozenset((Tensor, torch.nn.Parameter, FakeTensor))
_HAS_CUDA = device_count() > 0


def install() -> None:
    """Puts flashcore in the place of `torch.nn.functional.scaled_dot_product_attention`, for this whole process.

    Calls that flashcore takes (`flashcore.supports`) go to it, all others to torch's own function; on a GPU also those
    that no fast kernel runs yet, for which torch's own is faster: gradients, dropout, float32, other chips. Code that
    looks the function up when it calls is served, torch.nn.MultiheadAttention for example; a name that was imported
    before keeps torch's own. Installing twice is installing once.

    torch's own runs, too, where `torch.nn.attention.sdpa_kernel` allows no flash kernel (on a GPU: no memory-efficient
    one either; compiled code does not look), and in what torch.jit traces or scripts.
    """
    global _torchs_own
    if _torchs_own is None:
        _torchs_own = torch.nn.functional.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = _routed  # type: ignore[assignment]
        torch.jit._builtins._register_builtin(_routed, f"aten::{_NAME}")  # scripts find torch's own


def uninstall() -> None:
    """Gives torch its own function back."""
    global _torchs_own
    if _torchs_own is not None:
        if torch.nn.functional.scaled_dot_product_attention is not _routed:
            raise RuntimeError("scaled_dot_product_attention was replaced again after install(); undo that first")
        torch.nn.functional.scaled_dot_product_attention = _torchs_own
        _torchs_own = None


@contextmanager
def installed() -> Iterator[None]:
    """`install` for the length of a `with` block."""
    was_there = _torchs_own is not None
    install()
    try:
        yield
    finally:
        if not was_there:
            uninstall()


def _routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not _wants_torchs_own(query) and _takes(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    arguments, words = (query, key, value, attn_mask, dropout_p, is_causal), {"scale": scale, "enable_gqa": enable_gqa}
    if isinstance(attn_mask, CausalBias):  # waits for the function that stands in torch.nn.functional
        return CausalBias.__torch_function__(_routed, (CausalBias,), arguments, words)  # type: ignore[no-any-return]
    return _torchs_own(*arguments, **words)  # type: ignore[no-any-return]


_routed.__name__ = _routed.__qualname__ = _NAME
_routed.__doc__ = scaled_dot_product_attention.__doc__


def _wants_torchs_own(query: Tensor) -> bool:
    if is_compiling():  # torch.compile cannot read the switches
        return False
    if torch.jit.is_tracing():
        return True
    cuda = torch.backends.cuda  # whose switches are also those of the CPU, which has no memory-efficient kernels
    return not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() and getattr(query, "is_cuda", False))


def _takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    dropout_p: float,
    is_causal: bool,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> bool:
    """What `supports` says, from shapes and dtypes alone: it is asked of traced tensors, too."""
    if not all(type(x) in _ROUTED for x in (query, key, value)) or query.dtype not in _DTYPES:
        return False
    if not (query.device == key.device == value.device and (query.is_cpu or query.is_cuda and _HAS_CUDA)):
        return False
    if not query.dtype == key.dtype == value.dtype or min(query.dim(), key.dim(), value.dim()) < 2:
        return False
    if not (1 <= query.shape[-1] == key.shape[-1] <= _MAX_HEAD_DIM and 1 <= value.shape[-1] <= _MAX_HEAD_DIM):
        return False
    if key.shape[-2] != value.shape[-2] or not _are_shared(_heads(query), _heads(key), _heads(value), enable_gqa):
        return False
    if scale is not None and not (isinstance(scale, (int, float, torch.SymFloat)) and -math.inf < scale < math.inf):
        return False
    if query.is_cuda and _heads(query) > 0 and not _is_fast(query, key, value, attn_mask, dropout_p):
        return False
    if attn_mask is None or isinstance(attn_mask, CausalBias):
        return attn_mask is None or not is_causal
    dtypes = (torch.bool, torch.float32, query.dtype)
    return (
        not is_causal and type(attn_mask) in _ROUTED and attn_mask.dtype in dtypes and attn_mask.device == query.device
    )


def _heads(tensor: Tensor) -> int:
    return tensor.shape[-3] if tensor.dim() > 2 else 1


def _are_shared(heads_q: int, heads_k: int, heads_v: int, enable_gqa: bool) -> bool:
    if heads_q == heads_k == heads_v == 0:
        return True  # by which some of torch's own would divide
    if 0 in (heads_q, heads_k, heads_v) or _head_flaw(heads_q, heads_k, heads_v, enable_gqa):
        return False
    return not enable_gqa or heads_q % max(heads_k, heads_v) == 0


def _is_fast(query: Tensor, key: Tensor, value: Tensor, attn_mask: Optional[Tensor], dropout_p: float) -> bool:
    """Whether a fast CUDA kernel runs the call, not the reference."""
    given = [x for x in (query, key, value, attn_mask) if isinstance(x, Tensor)]
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    is_narrow = query.dtype in (torch.float16, torch.bfloat16)
    is_aligned = query.shape[-1] % 8 == 0 and value.shape[-1] % 8 == 0
    is_known = is_narrow and is_aligned and dropout_p == 0 and not wants_gradient
    return is_known and _has_fast_kernels(query.device.index)


@cache
def _has_fast_kernels(index: int) -> bool:
    return device_info(index).compute_capability[0] == 9
