"""Which instance of the Hopper forward kernel problem lines run on, and a call of one that was compiled by itself."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.arrays import Arrays
from ..bench.cases import EXAMPLE, Case, parse

BUCKETS = (64, 96, 128, 192, 256)
ELEMENTS = {"fp16": "Float16", "bf16": "BFloat16"}
POSITIONAL = {"causal", "causal_tl", "causal_br", "window"}
KNOWN = POSITIONAL | {"softcap", "scale", "lse"}
MESSAGE_BYTES = 1000


@dataclass(frozen=True)
class Instance:
    """A kernel of src/kernels/sm90: FwdTraits<element, bucket, FwdKind::kind>."""

    element: str
    bucket: int
    kind: str

    def __str__(self) -> str:
        return f"{self.element}, head_dim {self.bucket}, {self.kind}"


def instance_of(case: Case) -> Instance:
    """Raises ValueError for a line that the kernel does not take, or that has words which are not for tuning."""
    if case.phase != "fwd" or case.dtype not in ELEMENTS:
        raise ValueError(f'"{case.line}": tiles are searched for forward calls in fp16 and bf16, such as "{EXAMPLE}"')
    unknown = sorted(set(case.words) - KNOWN)
    if unknown:
        allowed = ", ".join(sorted(KNOWN))
        raise ValueError(f'"{case.line}": tiles are not searched with "{unknown[0]}"; allowed: {allowed}')
    if not case.flops:
        raise ValueError(f'"{case.line}": there is nothing to compute')
    bucket = next(bucket for bucket in BUCKETS if max(case.head_dim, case.head_dim_v) <= bucket)
    if bucket > 128 and case.head_dim_v % 8:
        raise ValueError(f'"{case.line}": above 128, head_dim_v must be a multiple of 8')
    kind = "general" if "softcap" in case.words else "positional" if set(case.words) & POSITIONAL else "full"
    return Instance(ELEMENTS[case.dtype], bucket, kind)


def common_instance(lines: Sequence[str]) -> Instance:
    """The one of all these lines. Raises ValueError where they are not of one."""
    instances = {line: instance_of(parse(line)) for line in lines}
    if len(set(instances.values())) > 1:
        told = "; ".join(f'"{line}": {instance}' for line, instance in instances.items())
        raise ValueError(f"these lines run on different instances of the kernel, search for one at a time: {told}")
    return next(iter(instances.values()))


class TuneCall(ctypes.Structure):
    """fwd_tune.cu's struct of this name."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "workspace", "stream")]
    _fields_ += [(name, ctypes.c_int64) for name in ("batch", "seqlen_q", "seqlen_k", "heads_q", "heads_k")]
    _fields_ += [(name, ctypes.c_int64) for name in ("head_dim", "head_dim_v", "causal", "top_left")]
    _fields_ += [(name, ctypes.c_int64) for name in ("window_left", "window_right", "device", "multiprocessors")]
    _fields_ += [(name, ctypes.c_double) for name in ("scale", "softcap")]


class Library:
    """An instance that was compiled: a shared library of fwd_tune.cu."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._run = library.flashcore_tune_run
        self._workspace = library.flashcore_tune_workspace
        self._workspace.restype = ctypes.c_size_t

    def workspace_bytes(self, call: TuneCall) -> int:
        return int(self._workspace(ctypes.byref(call)))

    def run(self, call: TuneCall) -> None:
        """Raises RuntimeError with what CUDA says."""
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        if self._run(ctypes.byref(call), message, ctypes.c_size_t(MESSAGE_BYTES)):
            raise RuntimeError(message.value.decode(errors="replace"))

    def call(self, case: Case, arrays: Arrays, stage: Any) -> Callable[[], Any]:
        """The call of a case on these arrays, to be made again and again; it returns out."""
        words = self.words(case, arrays, stage)
        scratch = stage.maker.empty((self.workspace_bytes(words),), "bool")
        words.workspace = address_of(scratch)

        def run(kept: Any = (scratch, arrays)) -> Any:
            self.run(words)
            return kept[1]["out"]

        return run

    @staticmethod
    def words(case: Case, arrays: Arrays, stage: Any) -> TuneCall:
        left, right = case.window
        call = TuneCall()
        for name in ("q", "k", "v", "out", "lse"):
            setattr(call, name, address_of(arrays[name]) if name in arrays else None)
        call.stream = stage.stream
        for name in ("batch", "seqlen_q", "seqlen_k", "heads_q", "heads_k", "head_dim", "head_dim_v", "scale"):
            setattr(call, name, getattr(case, name))
        call.causal, call.top_left = bool(case.causal), case.causal == "top_left"
        call.window_left, call.window_right = (-1 if bound is None else bound for bound in (left, right))
        call.device, call.multiprocessors = stage.index, stage.info.multiprocessors
        call.softcap = case.real("softcap")
        return call


def address_of(array: Any) -> int:
    """Where an array of ours lies."""
    return int(array.address)
