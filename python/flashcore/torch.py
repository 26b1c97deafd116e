"""flashcore for torch, differentiable: `flashcore.torch.attention`."""

from __future__ import annotations

from typing import Any, Optional, Union

try:
    import torch
except ImportError as error:
    raise ImportError("flashcore.torch needs PyTorch: pip install torch") from error

from . import attention as _attention
from .attention import NO_LENGTHS, gradients
from .options import Causal, Layout, Window, convert

__all__ = ["attention"]

_Options = dict[str, Any]


class _Attention(torch.autograd.Function):
    """out and lse from q, k, v, bias and sinks; everything else is constant."""

    @staticmethod
    def forward(
        ctx: Any,
        words: _Options,
        constants: _Options,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: Optional[torch.Tensor],
        sinks: Optional[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = {name: value for name, value in words.items() if name != "deterministic"}
        out, lse = _attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **given, **constants)
        ctx.words, ctx.constants = words, constants
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Optional[torch.Tensor], dlse: Optional[torch.Tensor]) -> tuple[Any, ...]:
        wanted = tuple(ctx.needs_input_grad[2:])
        if dout is None and dlse is None:
            return (None,) * 7
        grads = _Gradients.apply(  # type: ignore[no-untyped-call]
            ctx.words, ctx.constants, wanted, dout, dlse, *ctx.saved_tensors
        )
        return None, None, *grads


class _Gradients(torch.autograd.Function):
    """The gradients as a function of their own, so that differentiating them is an error and not a silent zero."""

    @staticmethod
    def forward(
        ctx: Any,
        words: _Options,
        constants: _Options,
        wanted: tuple[bool, ...],
        dout: Optional[torch.Tensor],
        dlse: Optional[torch.Tensor],
        *saved: Any,
    ) -> tuple[Any, ...]:
        q, k, v, bias, sinks, out, lse = saved
        dout = torch.zeros_like(out) if dout is None else _dense_rows(dout)
        inputs = (
            q,
            k,
            v,
            constants["mask"],
            bias,
            constants["alibi_slopes"],
            sinks,
            *NO_LENGTHS,
            constants["seqused_k"],
        )
        return tuple(gradients(inputs, (out, lse), (dout, dlse), (None,) * 5, wanted, convert(**words)))

    @staticmethod
    def backward(ctx: Any, *above: Any) -> Any:
        raise RuntimeError("flashcore.torch.attention can be differentiated once; its gradients have no gradient")


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A gradient may arrive expanded (as of .sum()); the library asks for a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = False,
    window: Window = None,
    scale: Optional[float] = None,
    mask: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    softcap: float = 0.0,
    alibi_slopes: Optional[torch.Tensor] = None,
    sinks: Optional[torch.Tensor] = None,
    dropout_p: float = 0.0,
    seed: Optional[int] = None,
    seqused_k: Optional[torch.Tensor] = None,
    deterministic: Optional[bool] = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    kernel: Optional[str] = None,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """`flashcore.attention` with gradients for q, k, v, bias and sinks, through out and through lse.

    Arguments and shapes are those of `flashcore.attention`; and:
      seed: of dropout; None draws one from torch's default generator, so that torch.manual_seed governs it.
      deterministic: bitwise the same gradients from run to run; None follows torch.use_deterministic_algorithms.

    The gradients themselves have no gradient: differentiating twice raises RuntimeError.
    """
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64).random_()) if dropout_p > 0 else 0
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    words: _Options = {
        "layout": layout,
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "seed": seed,
        "deterministic": deterministic,
        "kernel": kernel,
    }
    constants: _Options = {"mask": mask, "alibi_slopes": alibi_slopes, "seqused_k": seqused_k}
    out, lse = _Attention.apply(  # type: ignore[no-untyped-call]
        words, constants, q, k, v, bias, sinks
    )
    return (out, lse) if return_lse else out
