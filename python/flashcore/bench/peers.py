"""The attention of other libraries on a case: which are here, and their calls on the same values.

Each gets its inputs in the layout that it documents, and is forced to the kernels that its name says.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Optional

from .arrays import Arrays
from .calls import Call
from .cases import ITEM_BYTES, Case
from .stage import Stage

FLASHINFER_WORKSPACE = 256 << 20


class CannotDo(Exception):
    """A peer does not know this case; the message says what it lacks."""


@dataclass(frozen=True)
class Peer:
    """`make(case, arrays, stage)` gives the call. `arrays` are torch's where `torchs`, else flashcore's own."""

    name: str
    make: Callable[[Case, Arrays, Stage], Call]
    torchs: bool = True
    finish: Optional[Callable[[Any], Any]] = None  # waits for a result on the library's own streams
    layout: str = "bhsd"  # of its results


def _refuse_words(case: Case, *known: str) -> None:
    plain = {"causal", "causal_tl", "causal_br", "lse", "scale", "deterministic", *known}
    unknown = [word for word in case.words if word not in plain]
    if unknown:
        raise CannotDo(f"does not know {', '.join(unknown)}")


def _gradients(torch: Any, forward: Call, leaves: Sequence[Any], dout: Any) -> Call:
    """The backward pass alone, through the library's own autograd."""
    for leaf in leaves:
        leaf.requires_grad_()
    out = forward()
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


# ---- torch -----------------------------------------------------------------------------------------------------------

SDPA = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}


def _boolean_mask(case: Case, arrays: Arrays, torch: Any) -> Any:
    """What torch is told where it has no words: which keys are seen."""
    if "mask" in case.words and not case.causal and "window" not in case.words:
        return arrays["mask"]
    device = arrays["q"].device
    rows = torch.arange(case.seqlen_q, device=device)[:, None]
    diagonal = rows + (0 if case.causal == "top_left" else case.seqlen_k - case.seqlen_q)
    distance = diagonal - torch.arange(case.seqlen_k, device=device)
    left, right = case.window
    keep = torch.ones_like(distance, dtype=torch.bool)
    reach = 0 if case.causal else right
    if reach is not None:
        keep &= distance >= -reach
    if left is not None:
        keep &= distance <= left
    return keep & arrays["mask"] if "mask" in case.words else keep


def sdpa_words(case: Case, arrays: Arrays, torch: Any) -> dict[str, Any]:
    """A case in the words of torch's scaled_dot_product_attention."""
    _refuse_words(case, "mask", "window")
    words: dict[str, Any] = {}
    corner = case.causal == "bottom_right" and case.seqlen_q != case.seqlen_k
    if corner or "mask" in case.words or "window" in case.words:
        words["attn_mask"] = _boolean_mask(case, arrays, torch)
    elif case.causal:
        words["is_causal"] = True
    if case.heads_q != case.heads_k:
        words["enable_gqa"] = True
    if "scale" in case.words:
        words["scale"] = case.scale
    return words


def sdpa(case: Case, arrays: Arrays, torch: Any, backend: Any = None) -> Call:
    """torch's scaled_dot_product_attention of a case, or its gradients; by one backend, or by torch's choice."""
    from torch.nn.functional import scaled_dot_product_attention

    words = sdpa_words(case, arrays, torch)
    names = ("q", "k_cache", "v_cache") if case.decode else ("q", "k", "v")
    leaves = [arrays[name].detach() for name in names]

    def forced() -> Any:
        return nullcontext() if backend is None else torch.nn.attention.sdpa_kernel(backend)

    def forward() -> Any:
        with forced():
            return scaled_dot_product_attention(*leaves, **words)

    return _gradients(torch, forward, leaves, arrays["dout"]) if case.phase == "bwd" else forward


def _sdpa_peer(name: str) -> Peer:
    def make(case: Case, arrays: Arrays, stage: Stage) -> Call:
        from torch.nn.attention import SDPBackend

        return sdpa(case, arrays, stage.torch, getattr(SDPBackend, SDPA[name]))

    return Peer(f"SDPA {name}", make)


def _sdpa_chosen(case: Case, arrays: Arrays, stage: Stage) -> Call:
    return sdpa(case, arrays, stage.torch)


# ---- FlashAttention --------------------------------------------------------------------------------------------------


def _rows_first(arrays: Arrays, *names: str) -> list[Any]:
    """(batch, seqlen, heads, head_dim), dense."""
    return [arrays[name].detach().transpose(1, 2).contiguous() for name in names]


def _flash_attention(module: Any, table_word: str) -> Callable[[Case, Arrays, Stage], Call]:
    def make(case: Case, arrays: Arrays, stage: Stage) -> Call:
        _refuse_words(case, "window", "softcap", "page", *(() if case.decode else ("varlen",)))
        if case.causal == "top_left" and case.seqlen_q != case.seqlen_k:
            raise CannotDo("its causal rule is aligned bottom-right")
        words: dict[str, Any] = {"causal": bool(case.causal), "softmax_scale": case.scale}
        if "window" in case.words:
            words["window_size"] = tuple(-1 if side is None else side for side in case.window)
        if "softcap" in case.words:
            words["softcap"] = case.real("softcap")
        if case.decode:
            q, k, v = _rows_first(arrays, "q", "k_cache", "v_cache")
            words["cache_seqlens"] = arrays["cache_seqlens"]
            if "block_table" in arrays:
                words[table_word] = arrays["block_table"]
            return lambda: _output(module.flash_attn_with_kvcache(q, k, v, **words))
        if "varlen" in case.words:
            bounds = (arrays["cu_seqlens_q"], arrays["cu_seqlens_k"], case.seqlen_q, case.seqlen_k)
            leaves = [arrays[name].detach() for name in "qkv"]
            dout = arrays.get("dout")

            def forward() -> Any:
                return module.flash_attn_varlen_func(*leaves, *bounds, **words)
        else:
            leaves = _rows_first(arrays, "q", "k", "v")
            dout = _rows_first(arrays, "dout")[0] if "dout" in arrays else None

            def forward() -> Any:
                return module.flash_attn_func(*leaves, **words)

        if case.phase == "bwd":
            return _gradients(stage.torch, lambda: _output(forward()), leaves, dout)
        return lambda: _output(forward())

    return make


def _output(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


# ---- FlashInfer ------------------------------------------------------------------------------------------------------


@cache
def _flashinfer_workspace(device: str) -> Any:
    """One for all calls: they take turns on one stream."""
    import torch

    return torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)


def _flashinfer(case: Case, arrays: Arrays, stage: Stage) -> Call:
    flashinfer = importlib.import_module("flashinfer")
    _refuse_words(case, "page", "softcap")
    if case.phase == "bwd":
        raise CannotDo("has no backward pass")
    if case.causal == "top_left" and case.seqlen_q != case.seqlen_k:
        raise CannotDo("its causal rule is aligned bottom-right")
    torch, workspace = stage.torch, _flashinfer_workspace(stage.device)
    words: dict[str, Any] = {"sm_scale": case.scale}
    if "softcap" in case.words:
        words["logits_soft_cap"] = case.real("softcap")
    heads = (case.heads_q, case.heads_k, case.head_dim)

    def bounds(step: int) -> Any:
        return torch.arange(case.batch + 1, dtype=torch.int32, device=stage.device) * step

    if case.decode:
        if "block_table" not in arrays or case.seqlen_q != 1:
            raise CannotDo("decodes one query against a paged cache")
        table, page = arrays["block_table"], case.integer("page")
        last = torch.full((case.batch,), (case.seqlen_k - 1) % page + 1, dtype=torch.int32, device=stage.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        q = arrays["q"][:, :, 0].contiguous()
        types = {"q_data_type": q.dtype, "kv_data_type": q.dtype}
        wrapper.plan(bounds(table.shape[1]), table.reshape(-1), last, *heads, page, **types, **words)
        cache = tuple(_rows_first(arrays, "k_cache", "v_cache"))
        return lambda: wrapper.run(q, cache)[:, None]
    q, k, v = (tensor.flatten(0, 1) for tensor in _rows_first(arrays, "q", "k", "v"))
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    types = {"q_data_type": q.dtype, "kv_data_type": q.dtype}
    wrapper.plan(bounds(case.seqlen_q), bounds(case.seqlen_k), *heads, causal=bool(case.causal), **types, **words)
    shape = (case.batch, case.seqlen_q, case.heads_q, case.head_dim_v)
    return lambda: wrapper.run(q, k, v).view(shape)


# ---- JAX -------------------------------------------------------------------------------------------------------------


def jax_arrays(arrays: Arrays, *names: str) -> list[Any]:
    """(batch, seqlen, heads, head_dim), as JAX documents it."""
    import jax

    return [jax.numpy.swapaxes(jax.dlpack.from_dlpack(arrays[name]), 1, 2) for name in names]


def jax_call(case: Case, q: Any, k: Any, v: Any) -> Call:
    """jax.nn.dot_product_attention of a case, under jit."""
    import jax

    _refuse_words(case)
    if case.phase == "bwd":
        raise CannotDo("its gradients cannot be timed without its forward pass")
    if case.causal == "bottom_right" and case.seqlen_q != case.seqlen_k:
        raise CannotDo("its causal rule is aligned top-left")
    attention = jax.jit(partial(jax.nn.dot_product_attention, scale=case.scale, is_causal=bool(case.causal)))
    return lambda: attention(q, k, v)


def _jax(case: Case, arrays: Arrays, stage: Stage) -> Call:
    names = ("q", "k_cache", "v_cache") if case.decode else ("q", "k", "v")
    _refuse_words(case)
    q, k, v = jax_arrays(arrays, *names)
    if q.dtype.itemsize != ITEM_BYTES[case.dtype]:
        raise CannotDo(f"would do it in {q.dtype}: JAX_ENABLE_X64 is not set")
    return jax_call(case, q, k, v)


def _jax_waits(result: Any) -> Any:
    import jax

    return jax.block_until_ready(result)  # type: ignore[no-untyped-call, unused-ignore]


# ---- which are here --------------------------------------------------------------------------------------------------

Find = Callable[[Stage], Peer]


def _needs_torch(stage: Stage) -> None:
    if stage.torch is None:
        found = importlib.util.find_spec("torch") is not None
        raise CannotDo("torch cannot use this device" if found else "torch is not installed")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation is as good as none, but says more
        raise CannotDo(f"cannot be imported: {error}") from None


def _find_sdpa(backend: str) -> Find:
    def find(stage: Stage) -> Peer:
        _needs_torch(stage)
        return _sdpa_peer(backend)

    return find


def _find_flash(name: str, module: str, table_word: str) -> Find:
    def find(stage: Stage) -> Peer:
        _needs_torch(stage)
        return Peer(name, _flash_attention(_module(module), table_word), layout="bshd")

    return find


def _find_sdpa_chosen(stage: Stage) -> Peer:
    _needs_torch(stage)
    return Peer("SDPA", _sdpa_chosen)


def _find_flashinfer(stage: Stage) -> Peer:
    _needs_torch(stage)
    _module("flashinfer")
    return Peer("FlashInfer", _flashinfer, layout="bshd")


def _find_jax(stage: Stage) -> Peer:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory to the others
    jax = _module("jax")
    if stage.clock_name == "events":
        raise CannotDo(
            "works on streams of its own, which events do not see: --clock wall times all by the host's clock"
        )
    if stage.cuda and jax.default_backend() != "gpu":
        raise CannotDo("JAX cannot use this device")
    return Peer("JAX", _jax, torchs=False, finish=_jax_waits, layout="bshd")


_FLASH_3 = _find_flash("FlashAttention-3", "flash_attn_interface", "page_table")
#: by kind of device: what --peers calls them, in the order of the tables
PEERS: dict[str, dict[str, Find]] = {
    "cuda": {
        "sdpa-cudnn": _find_sdpa("cuDNN"),
        "sdpa-flash": _find_sdpa("flash"),
        "sdpa-efficient": _find_sdpa("efficient"),
        "sdpa-math": _find_sdpa("math"),
        "flash-attn": _find_flash("FlashAttention-2", "flash_attn", "block_table"),
        "flash-attn-3": _FLASH_3,
        "flashinfer": _find_flashinfer,
        "jax": _find_jax,
    },
    "cpu": {"sdpa": _find_sdpa_chosen, "sdpa-math": _find_sdpa("math"), "jax": _find_jax},
}


def choose(stage: Stage, wanted: Optional[Sequence[str]]) -> tuple[list[Peer], dict[str, str]]:
    """The wanted peers that are here (None: all), and why the others are not. Raises ValueError for unknown names."""
    known = PEERS[stage.kind]
    for name in wanted or ():
        if name not in known:
            raise ValueError(f'no peer "{name}" on {stage.kind}; allowed: {", ".join(known)}, none')
    peers, missing = [], {}
    for name in known if wanted is None else wanted:
        try:
            peers.append(known[name](stage))
        except CannotDo as reason:
            missing[name] = str(reason)
    return peers, missing


def from_file(path: Path) -> list[Peer]:
    """Peers of a Python file: a dict PEERS of name to function(q, k, v, causal) on (batch, seqlen, heads, head_dim)
    tensors of torch. Raises ValueError."""
    scope: dict[str, Any] = {"__file__": str(path), "__name__": "peers"}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
        functions = dict(scope["PEERS"])
    except Exception as error:
        raise ValueError(f"{path}: gives no peers: {type(error).__name__}: {error}") from None

    def peer(name: str, function: Callable[..., Any]) -> Peer:
        def make(case: Case, arrays: Arrays, stage: Stage) -> Call:
            _refuse_words(case)
            if case.phase != "fwd":
                raise CannotDo("a peer from a file has the forward pass alone")
            q, k, v = _rows_first(arrays, "q", "k", "v")
            return lambda: _output(function(q, k, v, bool(case.causal)))

        return Peer(name, make, layout="bshd")

    return [peer(name, function) for name, function in functions.items()]
