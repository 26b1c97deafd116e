"""Attention as a layer: `MultiheadAttention` with grouped heads, rotary embedding, and `KVCache` to generate with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ..options import Window
from .functional import attention, attention_decode


class KVCache:
    """The keys and values of the tokens so far, with room for `capacity` of them. `MultiheadAttention` appends to it.

    Attributes:
      k, v: (batch, capacity, heads, head_dim).
      seqlens: int32 (batch): how many tokens are held.
      used: the largest of them, known without asking the device; more than that only after `truncate` on a GPU.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        heads: int,
        head_dim: int,
        *,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        self.k = torch.zeros(batch, capacity, heads, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.used = 0

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def grow(self, tokens: int) -> None:
        """Counts new tokens that were written behind the others."""
        self.seqlens += tokens
        self.used += tokens

    def truncate(self, seqlens: Union[int, Sequence[int], Tensor]) -> None:
        """Forgets all but the first seqlens[b] tokens of sequence b: padding, or guesses that were wrong.

        Args:
          seqlens: one number for all sequences or one for each. On a GPU `used` sinks to the largest number given;
            a tensor on the GPU is not waited for and leaves `used`, which the room for new tokens is counted from,
            as it is. So does a compiled call.
        """
        given = torch.as_tensor(seqlens)
        if given.shape not in ((), self.seqlens.shape) or given.is_floating_point():
            what, batch = f"{given.dtype} {tuple(given.shape)}", len(self.seqlens)
            raise ValueError(f"seqlens: {what} given; an integer or ({batch},) of them, one a sequence, is needed")
        is_compiling = torch.compiler.is_compiling()
        known = given.flatten().tolist() if given.is_cpu and not is_compiling else []
        if min(known, default=0) < 0:
            raise ValueError(f"seqlens={known} given; a length is at least 0")
        torch.minimum(self.seqlens, given.to(self.seqlens), out=self.seqlens)
        if self.seqlens.is_cpu and not is_compiling:
            self.used = max(self.seqlens.tolist(), default=0)
        elif known:
            self.used = min(self.used, max(known))

    def reset(self) -> None:
        """Forgets everything."""
        self.seqlens.zero_()
        self.used = 0


class MultiheadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) with its projections, batch first.

    Args:
      embed_dim: size of the tokens that come in and go out.
      num_heads: query heads.
      num_kv_heads: key and value heads, a divisor of num_heads (GQA, MQA); default num_heads.
      head_dim: default embed_dim / num_heads.
      bias: whether the projections have one.
      dropout: probability of dropping an attention weight while training.
      causal: a token sees itself and those before it.
      window: (left, right) as in `flashcore.attention`.
      softcap: as in `flashcore.attention`.
      context_dim: size of the tokens of `context`, for attention to another sequence; default embed_dim.
      rotary_base: turns on rotary position embedding (RoFormer, Su et al. 2021) over the whole head_dim; 10000.0 is
        usual.
      rotary_interleaved: rotates neighbours (GPT-J) instead of halves (GPT-NeoX, Llama).
      max_positions: how many positions rotary embedding knows.

    Its state is that of the four `nn.Linear`s q_proj, k_proj, v_proj and out_proj; rotary tables are computed
    and not saved, and stay in float32 (float64 for float64) whatever the module is cast to.
    """

    rotary_cos: Optional[Tensor]
    rotary_sin: Optional[Tensor]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: Optional[int] = None,
        head_dim: Optional[int] = None,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        window: Window = None,
        softcap: float = 0.0,
        context_dim: Optional[int] = None,
        rotary_base: Optional[float] = None,
        rotary_interleaved: bool = False,
        max_positions: int = 8192,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} and num_kv_heads={num_kv_heads} given; a multiple is needed")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim={embed_dim} is no multiple of num_heads={num_heads}; say head_dim=")
            head_dim = embed_dim // num_heads
        if rotary_base is not None and head_dim % 2:
            raise ValueError(f"head_dim={head_dim} given; rotary embedding needs an even one")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} given; it must lie in [0, 1)")
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.dropout, self.causal, self.window, self.softcap = dropout, causal, window, softcap
        self.rotary_base, self.rotary_interleaved, self.max_positions = rotary_base, rotary_interleaved, max_positions
        kv_from = embed_dim if context_dim is None else context_dim
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, **factory)
        self.k_proj = nn.Linear(kv_from, num_kv_heads * head_dim, **factory)
        self.v_proj = nn.Linear(kv_from, num_kv_heads * head_dim, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, **factory)
        self.register_buffer("rotary_cos", None, persistent=False)
        self.register_buffer("rotary_sin", None, persistent=False)
        self.reset_parameters()
        self._make_rotary_tables()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, biases of zero."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def _make_rotary_tables(self) -> None:
        if self.rotary_base is None:
            return
        device, dtype = self.q_proj.weight.device, torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
        positions = torch.arange(self.max_positions, dtype=torch.float64, device=device)
        angles = positions[:, None] * self.rotary_base**-exponents
        self.rotary_cos, self.rotary_sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiheadAttention:
        super()._apply(fn, recurse)
        self._make_rotary_tables()  # `fn` may have rounded them
        return self

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for this layer, of its dtype and on its device."""
        weight = self.k_proj.weight
        return KVCache(batch, capacity, self.num_kv_heads, self.head_dim, device=weight.device, dtype=weight.dtype)

    def forward(
        self,
        x: Tensor,
        context: Optional[Tensor] = None,
        *,
        mask: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
        key_lengths: Optional[Tensor] = None,
        cache: Optional[KVCache] = None,
    ) -> Tensor:
        """Attends from x to itself, to `context`, or to what `cache` holds and then x, which is appended to it.

        Args:
          x: (batch, seqlen, embed_dim).
          context: (batch, seqlen_k, context_dim).
          mask: boolean, True = keep, broadcastable to (batch, num_heads, seqlen, seqlen_k; with a cache: its capacity).
          bias: added to the scores, broadcastable likewise; float32 or the module's dtype, with a gradient.
          key_lengths: int32 (batch): only the first key_lengths[b] keys of sequence b exist; the rest is padding.
          cache: for generation, under torch.no_grad().

        Returns: (batch, seqlen, embed_dim).
        """
        self._check(x, context, key_lengths, cache)
        source = x if context is None else context
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = (layer(source).unflatten(-1, (self.num_kv_heads, self.head_dim)) for layer in (self.k_proj, self.v_proj))
        if cache is not None:
            out = self._attend_to_cache(q, k, v, mask, bias, cache)
        else:
            out = self._attend(q, k, v, mask, bias, key_lengths)
        return self.out_proj(out.flatten(-2))  # type: ignore[no-any-return]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], bias: Optional[Tensor], lengths: Optional[Tensor]
    ) -> Tensor:
        if self.rotary_base is not None:
            q, k = self._rotate(q), self._rotate(k)
        if lengths is not None and self.window is not None and not self.causal:
            keep = torch.arange(k.shape[1], device=k.device) < lengths[:, None, None, None]
            mask = keep if mask is None else mask & keep  # with seqused_k the window would count from the shorter end
            lengths = None
        return attention(  # type: ignore[return-value]
            q,
            k,
            v,
            causal="top_left" if self.causal else False,
            window=self.window,
            softcap=self.softcap,
            mask=mask,
            bias=bias,
            dropout_p=self.dropout if self.training else 0.0,
            seqused_k=lengths,
            layout="bshd",
        )

    def _attend_to_cache(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], bias: Optional[Tensor], cache: KVCache
    ) -> Tensor:
        out = attention_decode(
            q,
            cache.k,
            cache.v,
            cache.seqlens,
            k_new=k,
            v_new=v,
            rotary_cos=self.rotary_cos,
            rotary_sin=self.rotary_sin,
            rotary_interleaved=self.rotary_interleaved,
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            mask=mask,
            bias=bias,
            layout="bshd",
        )
        cache.grow(q.shape[1])
        return out  # type: ignore[return-value]

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of (batch, seqlen, heads, head_dim), each pair turned by an angle of its position."""
        cos, sin = (table[: x.shape[1], None] for table in (self.rotary_cos, self.rotary_sin))  # type: ignore[index]
        numbers = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.rotary_interleaved:
            first, second = numbers[..., 0::2], numbers[..., 1::2]
        else:
            first, second = numbers.chunk(2, dim=-1)
        turned = (first * cos - second * sin, first * sin + second * cos)
        joined = torch.stack(turned, -1).flatten(-2) if self.rotary_interleaved else torch.cat(turned, -1)
        return joined.to(x.dtype)

    def _check(
        self, x: Tensor, context: Optional[Tensor], key_lengths: Optional[Tensor], cache: Optional[KVCache]
    ) -> None:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x of shape {tuple(x.shape)} given; (batch, seqlen, {self.embed_dim}) is needed")
        if context is not None:
            inner = self.k_proj.in_features
            if context.dim() != 3 or context.shape[-1] != inner or context.shape[0] != x.shape[0]:
                shape = tuple(context.shape)
                raise ValueError(f"context of shape {shape} given; ({x.shape[0]}, seqlen_k, {inner}) is needed")
            if self.causal or self.rotary_base is not None or cache is not None:
                raise ValueError("context given; causal, rotary embedding and a cache are for attention to x itself")
        if self.rotary_base is not None:
            last = x.shape[1] + (cache.used if cache is not None else 0)
            if last > self.max_positions:
                raise ValueError(f"position {last - 1} reached; max_positions={self.max_positions}")
        if cache is None:
            return
        if key_lengths is not None:
            raise ValueError("key_lengths given with a cache; after the call, say cache.truncate(lengths)")
        if cache.used + x.shape[1] > cache.capacity:
            raise ValueError(
                f"{x.shape[1]} tokens given to a cache that holds {cache.used} and has room for {cache.capacity}"
            )
        if self.training and self.dropout > 0:
            raise ValueError("a cache is for generation, without dropout; call eval() on the module")

    def extra_repr(self) -> str:
        words = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "window": self.window,
            "rotary_base": self.rotary_base,
        }
        given = (f"{name}={value}" for name, value in words.items() if value not in (None, False))
        return ", ".join((str(self.embed_dim), *given))
