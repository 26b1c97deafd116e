"""flashcore's own call of a case, ready to be made again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from .. import attention, attention_backward, attention_decode, attention_varlen
from .arrays import Arrays
from .cases import Case

Call = Callable[[], Any]


def keywords(case: Case) -> dict[str, Any]:
    """The words of a case as a caller would write them: only those that it needs."""
    words: dict[str, Any] = {}
    if case.causal:
        square = not case.decode and case.seqlen_q == case.seqlen_k and "varlen" not in case.words
        words["causal"] = True if square or case.decode else case.causal
    elif case.decode:
        words["causal"] = False
    if "window" in case.words:
        words["window"] = case.window
    for word in ("softcap", "scale"):
        if word in case.words:
            words[word] = case.real(word)
    if "dropout" in case.words:
        words |= {"dropout_p": case.real("dropout"), "seed": int(case.words.get("seed", 0))}
    return words


def ours(case: Case, arrays: Arrays, stream: Optional[int] = None, kernel: Optional[str] = None) -> Call:
    """The call on these arrays, written as a caller would: with no word that it does not need. It returns out, with lse
    where the line has it, or the gradients; in the arrays given for them, else in new ones."""
    forced = {"kernel": kernel, "stream": stream}
    words = keywords(case) | {name: value for name, value in forced.items() if value is not None}
    given = dict(arrays)
    if "lse" in case.words and "lse" not in given:
        words["return_lse"] = True
    if case.decode:
        q, k, v = given.pop("q"), given.pop("k_cache"), given.pop("v_cache")
        if case.words.get("rotary", "").endswith("i"):
            words["rotary_interleaved"] = True
        return lambda: attention_decode(q, k, v, **given, **words)
    if "varlen" in case.words:
        words |= {"max_seqlen_q": case.seqlen_q, "max_seqlen_k": case.seqlen_k}
    forward = attention_varlen if "varlen" in case.words else attention
    q, k, v = (given.pop(name) for name in "qkv")
    if case.phase == "fwd":
        return lambda: forward(q, k, v, **given, **words)
    backward_only = {name: given.pop(name) for name in ("dout", "dq", "dk", "dv", "dlse") if name in given}
    before = {name: word for name, word in words.items() if name != "kernel"}  # which may know gradients only
    out, lse = forward(q, k, v, **given, **before | {"return_lse": True})
    dout = backward_only.pop("dout")
    if "deterministic" in case.words:
        words["deterministic"] = True
    return lambda: attention_backward(dout, q, k, v, out, lse, **backward_only, **given, **words)


def first(result: Any) -> Any:
    """out of what a call returns, or the gradient of q."""
    return result[0] if isinstance(result, (tuple, list)) else result
