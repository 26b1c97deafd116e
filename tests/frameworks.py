"""The array frameworks that tests speak: how each makes an array of a dtype and gives it back as NumPy."""

from __future__ import annotations

import importlib

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}


class Framework:
    """NumPy, and what the other frameworks have in common."""

    name = "numpy"
    dtypes = frozenset(DTYPES)

    def __init__(self, device: str = "cpu"):
        self.device = device

    def __repr__(self):
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    def array(self, values, dtype: str = "float32"):
        """A fresh array of this framework holding `values` rounded to `dtype`."""
        return np.array(values, DTYPES[dtype], order="C")

    def numpy(self, x) -> np.ndarray:
        """The values of `x`: float64 for floating numbers, else its own integers."""
        x = np.asarray(x)
        return x if x.dtype.kind in "iub" else x.astype(np.float64)

    def dtype(self, x) -> str:
        return next(name for name, dtype in DTYPES.items() if x.dtype == dtype)

    def owns(self, x) -> bool:
        return isinstance(x, np.ndarray)

    def empty(self, shape, dtype: str = "float32"):
        return self.array(np.full(shape, -7.0), dtype)


class Torch(Framework):
    name = "torch"

    def __init__(self, device: str = "cpu"):
        super().__init__(device)
        self.torch = importlib.import_module("torch")

    def _dtype(self, name):
        return getattr(self.torch, {"float8_e4m3": "float8_e4m3fn"}.get(name, name))

    def array(self, values, dtype="float32"):
        exact = self.torch.from_numpy(np.array(values, order="C"))
        return exact.to(self.device, self._dtype(dtype))

    def numpy(self, x):
        x = x.detach().cpu()
        return (x.double() if x.is_floating_point() else x).numpy()

    def dtype(self, x):
        return next(name for name in DTYPES if x.dtype == self._dtype(name))

    def owns(self, x):
        return isinstance(x, self.torch.Tensor) and x.device.type == self.device


class Jax(Framework):
    name = "jax"
    dtypes = frozenset(DTYPES) - {"float64", "int64"}  # off unless a program asks for 64 bits

    def __init__(self, device: str = "cpu"):
        super().__init__(device)
        self.jax = importlib.import_module("jax")

    def array(self, values, dtype="float32"):
        place = self.jax.devices(self.device)[0]
        return self.jax.device_put(np.array(values, DTYPES[dtype]), place)

    def numpy(self, x):
        return Framework.numpy(self, np.asarray(x))

    def owns(self, x):
        return isinstance(x, self.jax.Array) and all(
            (d.platform == "cpu") == (self.device == "cpu") for d in x.devices()
        )


class Cupy(Framework):
    name = "cupy"
    dtypes = frozenset(DTYPES) - {"bfloat16", "float8_e4m3"}

    def __init__(self, device: str = "cuda"):
        super().__init__(device)
        self.cupy = importlib.import_module("cupy")

    def array(self, values, dtype="float32"):
        return self.cupy.asarray(np.array(values, DTYPES[dtype], order="C"))

    def numpy(self, x):
        return Framework.numpy(self, self.cupy.asnumpy(x))

    def owns(self, x):
        return isinstance(x, self.cupy.ndarray)


KINDS = {"numpy": Framework, "torch": Torch, "jax": Jax, "cupy": Cupy}


def importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # absent, or broken on this machine
        return False
    return True


def sees_cuda(name: str) -> bool:
    """Whether the framework itself can use a GPU here: torch or jax may be CPU builds."""
    if not importable(name):
        return False
    if name == "torch":
        return importlib.import_module("torch").cuda.is_available()
    if name == "jax":
        return importlib.import_module("jax").default_backend() == "gpu"
    return name == "cupy"
