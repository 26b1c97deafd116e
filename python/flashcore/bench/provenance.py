"""Where numbers come from: the machine, the versions, the commit, the day."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .. import __version__, device_info, num_threads

FLAGS = tuple(
    "avx2 fma f16c avx_vnni avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_fp16 "
    "asimd asimdhp bf16 sve i8mm".split()
)
#: distributions whose versions are told, where they are installed
LIBRARIES = ("torch", "flash-attn", "flash-attn-3", "flashinfer-python", "jax", "numpy", "cupy")
GPU_FACTS = {
    "driver": "driver_version",
    "sm_clock_max": "clocks.max.sm",
    "memory_clock_max": "clocks.max.memory",
    "power_limit": "power.limit",
}
GPU_STATE = {
    "sm_clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "power": "power.draw",
    "temperature": "temperature.gpu",
}


def output_of(*command: str) -> str:
    """What a command prints; empty if it cannot run."""
    try:
        return str(subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout).strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_sha() -> str:
    """FLASHCORE_GIT_SHA, else the commit of the source tree that this is run in; empty elsewhere."""
    told = os.environ.get("FLASHCORE_GIT_SHA")
    if told:
        return told
    top = output_of("git", "rev-parse", "--show-toplevel")
    is_ours = bool(top) and (Path(top) / "include" / "flashcore" / "flashcore.h").exists()
    return output_of("git", "rev-parse", "HEAD") if is_ours else ""


def provenance(*packages: str) -> dict[str, Any]:
    """Versions of flashcore and of these packages (those that are installed), the commit, the day."""
    found = {name: version_of(name) for name in packages}
    return {
        "flashcore": __version__,
        **{name: version for name, version in found.items() if version},
        "git_sha": git_sha(),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        text = ""
    facts = dict(re.findall(r"^(.*?)\s*: (.*)$", text, flags=re.MULTILINE))
    present = str(facts.get("flags", facts.get("Features", ""))).split()
    names = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    return {
        "processor": facts.get("model name", "unknown"),
        **{name: facts[key] for name, key in names.items() if key in facts},
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": len(os.sched_getaffinity(0)),
    }


def _ask_gpu(index: int, words: dict[str, str]) -> dict[str, str]:
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = visible[index] if index < len(visible) and visible[index] else index  # nvidia-smi counts all there are
    query = ("nvidia-smi", f"--id={name}", f"--query-gpu={','.join(words.values())}", "--format=csv,noheader")
    values = output_of(*query).split(", ")
    return dict(zip(words, values, strict=True)) if len(values) == len(words) else {}


def gpu_state(index: int) -> dict[str, str]:
    """Clocks, power and temperature of this moment, as nvidia-smi tells them; empty without it."""
    return _ask_gpu(index, GPU_STATE)


def load() -> float:
    return round(os.getloadavg()[0], 2)


def busy(load_before: float, cores: int) -> str:
    """A warning where others keep more than half of the cores busy; else empty."""
    if load_before <= cores / 2:
        return ""
    return f"warning: the load is {load_before} on {cores} cores before anything is measured: times will not compare"


def gpu(index: int) -> dict[str, Any]:
    info = device_info(index)
    facts = {"gpu": info.name, "compute_capability": "{}.{}".format(*info.compute_capability)}
    facts |= {"multiprocessors": info.multiprocessors, "l2_bytes": info.l2_bytes, "memory_bytes": info.memory_bytes}
    facts |= _ask_gpu(index, GPU_FACTS)
    return facts | {"cuda": f"{info.runtime_version // 1000}.{info.runtime_version % 1000 // 10}"}


def machine(stage: Any) -> dict[str, Any]:
    """The device and the software of a run."""
    facts: dict[str, Any] = {"device": stage.device}
    if stage.cuda:
        facts |= gpu(stage.index)
        if stage.torch:
            facts |= {"torch_cuda": stage.torch.version.cuda, "cudnn": stage.torch.backends.cudnn.version()}
    else:
        facts |= processor() | {"threads": num_threads()}
        facts |= {"isa": os.environ.get("FLASHCORE_CPU_ISA", "native"), "load": load()}
    return facts | {"python": sys.version.split()[0]} | provenance(*LIBRARIES)
