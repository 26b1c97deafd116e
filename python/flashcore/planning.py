"""Questions about a call before it is made: would it run, by which kernel and why; and plans, to ask only once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from . import _core
from .attention import _bound, _unpack, chosen, finished, wanted_gradients
from .device import Device, parse_device
from .interop import Framework, classify, known, stream_handle
from .options import DECODE_ARRAYS, FORWARD_ARRAYS, LAYOUTS, convert

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import AttentionKeywords

_COTANGENTS = ("dout", "dlse")
_GRADIENTS = ("dq", "dk", "dv")
_NO_FORWARD_ARRAYS = (None,) * len(FORWARD_ARRAYS)
_WORDS = {
    "layout": "bhsd",
    "window": None,
    "scale": None,
    "softcap": 0.0,
    "dropout_p": 0.0,
    "seed": 0,
    "deterministic": False,
    "kernel": None,
}


class Support(NamedTuple):
    """The answer of `supports`: true or false as a condition, too."""

    ok: bool
    kernel: str  #: the kernel that would run
    why: str  #: where not ok: the message that the call would raise

    def __bool__(self) -> bool:
        return self.ok


class _Question(NamedTuple):
    """A call taken apart: what `_core` needs to answer anything about it."""

    framework: Framework
    phase: str  #: forward, decode or backward: the end of the names of `_core`'s functions
    layout: str
    with_lse: bool
    arguments: tuple[Any, ...]  #: after the bridge


def _take(keywords: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(keywords.pop(name, None) for name in names)


def _take_bounds(keywords: dict[str, Any]) -> tuple[int, int]:
    return _bound(keywords.pop("max_seqlen_q", None)), _bound(keywords.pop("max_seqlen_k", None))


def _question(q: Any, k: Any, v: Any, keywords: dict[str, Any]) -> _Question:
    framework = known.get(type(q)) or classify(q)
    decode = "cache_seqlens" in keywords
    words = {name: keywords.pop(name, default) for name, default in {**_WORDS, "causal": decode}.items()}
    if decode and words["causal"] is True:
        words["causal"] = "bottom_right"
    if not decode and keywords.get("cu_seqlens_q") is not None:
        words["layout"] = "thd"
    options = convert(**words)
    outputs = _take(keywords, ("out", "lse"))
    keywords.pop("stream", None)
    if keywords.get("dout") is not None:
        cotangents, given = _take(keywords, _COTANGENTS), _take(keywords, _GRADIENTS)
        bounds = _take_bounds(keywords)
        arrays = (q, k, v, *_take(keywords, FORWARD_ARRAYS))
        _refuse_unknown(keywords)
        arguments = (arrays, outputs, cotangents, (*given, None, None), options, *bounds)
        return _Question(framework, "backward", words["layout"], False, arguments)
    with_lse = bool(keywords.pop("return_lse", False)) or outputs[1] is not None
    if decode:
        arrays = (q, *_take(keywords, DECODE_ARRAYS))
        interleaved = bool(keywords.pop("rotary_interleaved", False))
        arguments = (arrays, (k, v), interleaved, outputs, options, with_lse)
    else:
        if k is None:
            q, k, v = _unpack(framework, q, v, words["layout"])
        bounds = _take_bounds(keywords)
        arguments = ((q, k, v, *_take(keywords, FORWARD_ARRAYS)), outputs, options, *bounds, with_lse)
    _refuse_unknown(keywords)
    return _Question(framework, "decode" if decode else "forward", words["layout"], with_lse, arguments)


def _refuse_unknown(keywords: dict[str, Any]) -> None:
    if keywords:
        raise TypeError(f"unknown arguments: {', '.join(keywords)}")


def supports(q: Any, k: Any = None, v: Any = None, **options: Unpack[AttentionKeywords]) -> Support:
    """Whether a call would run: the same checks, but data is not read and nothing is raised.

    Takes the arguments of `attention`; with cu_seqlens_q and cu_seqlens_k those of `attention_varlen`, with
    cache_seqlens those of `attention_decode` (k and v are then the caches), with dout those of `attention_backward`
    (whose out and lse may be left out here).

    Returns: Support(ok, kernel, why).
    """
    try:
        asked = _question(q, k, v, dict(options))
        ask = getattr(_core, f"supports_{asked.phase}")
        return Support(*ask(asked.framework.bridge, *asked.arguments))
    except Exception as error:
        return Support(False, "", str(error))


def explain(
    q: Any, k: Any = None, v: Any = None, *, device: Device = None, **options: Unpack[AttentionKeywords]
) -> str:
    """How a call would run: the problem line, the chosen kernel and its workspace, and why each other kernel refused.

    Takes the arguments that `supports` takes. Or a problem line, such as ``"fwd bf16 b2 q4096 k4096 h32/8 d128
    causal"``, with a device for it ("cpu", "cuda", "cuda:1"; default: the best there is) and `kernel`.

    Raises: as the call would, except that a call that no kernel takes is explained, too. ValueError for options beside
    a problem line, which has them in its words, and for a device beside arrays.
    """
    if isinstance(q, str):
        kernel = options.pop("kernel", None)
        beside = [name for name, array in (("k", k), ("v", v)) if array is not None] + list(options)
        if beside:
            raise ValueError(f"a problem line stands alone, or with device and kernel; {', '.join(beside)} given, too")
        return str(_core.explain_line(q, *parse_device(device), kernel or ""))
    if device is not None:
        raise ValueError(f"device={device!r} goes with a problem line; arrays say themselves where they are")
    asked = _question(q, k, v, dict(options))
    ask = getattr(_core, f"explain_{asked.phase}")
    return str(ask(asked.framework.bridge, *asked.arguments))


class Plan:
    """A call that was checked and dispatched once, to be made many times with other arrays of the same form."""

    def __init__(self, core: _core.AttentionPlan, phase: str, layout: str, with_lse: bool) -> None:
        self._core = core
        self._phase = phase
        self._layout = layout
        self._with_lse = with_lse

    @property
    def kernel(self) -> str:
        """Name of the chosen kernel."""
        return self._core.kernel

    @property
    def workspace_bytes(self) -> int:
        """Device memory that a call takes from the workspace resource while it runs."""
        return self._core.workspace_bytes

    def describe(self) -> str:
        """The problem line, the kernel, the workspace."""
        return self._core.describe()

    def __repr__(self) -> str:
        return f"flashcore.Plan({self.describe()})"

    def __call__(
        self,
        q: Any,
        k: Any = None,
        v: Any = None,
        *,
        out: Any = None,
        lse: Any = None,
        stream: Any = None,
        **others: Any,
    ) -> Any:
        """Runs on arrays of the planned shapes, strides and dtypes; others are refused with ValueError.

        `others` are the planned call's other arrays by name (mask, bias, cu_seqlens_q, cache_seqlens, dout, …), and
        max_seqlen_q, max_seqlen_k, rotary_interleaved where the plan has them. Returns what the planned call returns.
        """
        framework = known.get(type(q)) or classify(q)
        handle: Optional[int] = None if stream is None else stream_handle(stream)
        if self._phase == "backward":
            return self._gradients(framework, (q, k, v), (out, lse), others, handle)
        if k is None:
            q, k, v = _unpack(framework, q, v, self._layout)
        layout = LAYOUTS[self._layout]
        if self._phase == "decode":
            arrays = (q, *_take(others, DECODE_ARRAYS))
            interleaved = bool(others.pop("rotary_interleaved", False))
            _refuse_unknown(others)
            results = self._core.run_decode(
                framework.bridge, arrays, (k, v), interleaved, (out, lse), layout, self._with_lse, handle
            )
        else:
            arrays, bounds = (q, k, v, *_NO_FORWARD_ARRAYS), (-1, -1)
            if others:
                bounds = _take_bounds(others)
                arrays = (q, k, v, *_take(others, FORWARD_ARRAYS))
                _refuse_unknown(others)
            results = self._core.run_forward(
                framework.bridge, arrays, (out, lse), layout, *bounds, self._with_lse, handle
            )
        return finished(framework, results)

    def _gradients(
        self,
        framework: Framework,
        inputs: tuple[Any, Any, Any],
        outputs: tuple[Any, Any],
        others: dict[str, Any],
        handle: Optional[int],
    ) -> tuple[Any, ...]:
        cotangents, given = _take(others, _COTANGENTS), _take(others, _GRADIENTS)
        bounds = _take_bounds(others)
        arrays = (*inputs, *_take(others, FORWARD_ARRAYS))
        _refuse_unknown(others)
        wanted = wanted_gradients(arrays)
        grads = self._core.run_backward(
            framework.bridge, arrays, outputs, cotangents, (*given, None, None), wanted, *bounds, handle
        )
        return chosen(finished(framework, grads), wanted)


def plan(q: Any, k: Any = None, v: Any = None, **options: Unpack[AttentionKeywords]) -> Plan:
    """Checks and dispatches a call without making it. Takes the arguments that `supports` takes; data is not read.

    ``plan(q, k, v, causal=True)(q, k, v, out=out)`` does what ``attention(q, k, v, causal=True, out=out)`` does, and
    ``plan(q, k, v, dout=dout)(q, k, v, dout=dout, out=out, lse=lse)`` what ``attention_backward`` does.

    Raises: as the call would.
    """
    asked = _question(q, k, v, dict(options))
    make = getattr(_core, f"plan_{asked.phase}")
    return Plan(make(asked.framework.bridge, *asked.arguments), asked.phase, asked.layout, asked.with_lse)
