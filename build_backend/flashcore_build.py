"""The build backend: scikit-build-core, plus NVIDIA's compiler wheels where they are wanted.

FLASHCORE_NVCC decides where the CUDA compiler comes from:
  auto (default)  an nvcc on this machine; otherwise, if an NVIDIA driver is loaded, the wheels; otherwise none
  system          an nvcc on this machine
  wheels          NVIDIA's wheels from the package index (about 105 MB, for the build only)
  none            no wheels; CMake still uses an nvcc that it finds, FLASHCORE_CUDA=OFF forbids it
"""

import os
import shutil
from pathlib import Path

from scikit_build_core import build as _scikit
from scikit_build_core.build import *  # noqa: F403 - every hook of the build interface

# The oldest CUDA 13: what it builds loads on every driver that CUDA 13 programs run on.
_CUDA = "13.0.*"
_NVCC_WHEELS = [f"nvidia-{part}=={_CUDA}" for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")]
_CHOICES = ("auto", "system", "wheels", "none")


def _has_nvcc() -> bool:
    roots = (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    in_root = any(root and Path(root, "bin", "nvcc").exists() for root in roots)
    return bool(os.environ.get("CUDACXX") or in_root or shutil.which("nvcc"))


def _wants_wheels() -> bool:
    choice = os.environ.get("FLASHCORE_NVCC", "auto")
    if choice not in _CHOICES:
        raise SystemExit(f"FLASHCORE_NVCC={choice!r} given; allowed: {', '.join(_CHOICES)}")
    if choice == "auto":
        return not _has_nvcc() and Path("/proc/driver/nvidia/version").exists()
    return choice == "wheels"


def _with_compiler(requirements: list) -> list:
    return [*requirements, *_NVCC_WHEELS] if _wants_wheels() else list(requirements)


def get_requires_for_build_wheel(config_settings=None):
    return _with_compiler(_scikit.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_compiler(_scikit.get_requires_for_build_editable(config_settings))
