"""Frameworks: whose arrays these are, how results are allocated for them, on which stream they work.

The only file that knows frameworks. None of them is imported here: an array's type tells its framework, which is
therefore loaded already.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Optional

from . import _core

_NO_KEYWORDS: dict[str, Any] = {}
_VERSIONED: dict[str, Any] = {"max_version": (1, 0)}
_ALLOWED = "allowed dtypes: float16, bfloat16, float32, float64, float8_e4m3fn, int32, bool"


def explain_refusal(array: Any, name: str) -> tuple[Any, str]:
    """Raises TypeError with the array's own words about why it cannot be exported."""
    try:
        array.__dlpack__()
    except Exception as error:
        raise TypeError(f"{name}: {qualified(type(array))} cannot be read: {error}") from None
    raise TypeError(f"{name}: {qualified(type(array))} cannot be read")


def qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Framework:
    """One framework's way of doing things. This base serves any DLPack producer and answers with `flashcore.Array`."""

    #: turns a result into the framework's own type, where it was not allocated as one
    finish: Optional[Callable[[Any], Any]] = None

    def __init__(self, array_type: type) -> None:
        self.bridge = _core.Bridge(array_type, _VERSIONED, explain_refusal, self.empty_for, ordered=True)

    def shape(self, array: Any) -> tuple[int, ...]:
        return tuple(self.bridge.describe(array, "array")[0])

    def dtype(self, array: Any) -> Any:
        """The array's dtype in the framework's own terms."""
        return self.bridge.describe(array, "array")[1]

    def named_dtype(self, name: str) -> Any:
        return name

    def is_dtype(self, dtype: Any, name: str) -> bool:
        return bool(dtype == self.named_dtype(name))

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any, stream: Optional[int]) -> Any:
        """A dense array on the device of `like`."""
        _, _, cuda, index = self.bridge.describe(like, "array")
        return _core.empty(list(shape), dtype, cuda, index, stream or 0)

    def empty_for(self, like: Any, *shape: int, dtype: str, stream: Optional[int]) -> Any:
        """The same, for the library, which calls dtypes by their names."""
        return self.empty(shape, self.named_dtype(dtype), like, stream)

    def like(self, array: Any, stream: Optional[int]) -> Any:
        return self.empty(self.shape(array), self.dtype(array), array, stream)

    def take(self, array: Any, axis: int, index: int) -> Any:
        """The part `index` of a dimension, as a view."""
        try:
            return array[(slice(None),) * axis + (index,)]
        except TypeError:
            raise TypeError(
                f"one packed {qualified(type(array))} given, which cannot be cut into q, k and v; give those as arrays"
            ) from None


class NumPyLike(Framework):
    """What NumPy and CuPy share: the array interface, and 8- and 16-bit floats that come from ml_dtypes."""

    def __init__(self, module: Any, array_type: type) -> None:
        self.module = module
        self._empty = module.empty

    def shape(self, array: Any) -> tuple[int, ...]:
        return tuple(array.shape)

    def dtype(self, array: Any) -> Any:
        return array.dtype

    def named_dtype(self, name: str) -> Any:
        if name in ("bfloat16", "float8_e4m3"):
            ml_dtypes = sys.modules["ml_dtypes"]
            return self.module.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else ml_dtypes.float8_e4m3fn)
        return self.module.dtype(name)

    def is_dtype(self, dtype: Any, name: str) -> bool:
        return bool(dtype.name == ("float8_e4m3fn" if name == "float8_e4m3" else name))

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any, stream: Optional[int]) -> Any:
        return self._empty(shape, dtype)

    def reinterpret(self, array: Any, name: str) -> tuple[Any, str]:
        """bfloat16 and float8 are extension dtypes that DLPack export refuses: lend the bits and say what they are."""
        dtype = array.dtype
        if dtype.name == "bfloat16":
            return array.view(self.module.uint16), "bfloat16"
        if dtype.name == "float8_e4m3fn":
            return array.view(self.module.uint8), "float8_e4m3"
        if not dtype.isnative:
            raise TypeError(
                f"{name}: dtype {dtype.str!r} is not in this machine's byte order; "
                f"convert it with {name}.astype({dtype.newbyteorder('=').name!r})"
            )
        if dtype.kind not in "fiub" or dtype.itemsize > 8 or dtype.isbuiltin == 2:  # 2: of another package
            raise TypeError(f"{name}: dtype {dtype} given; {_ALLOWED}")
        return explain_refusal(array, name)


class NumPy(NumPyLike):
    def __init__(self, module: Any) -> None:
        super().__init__(module, module.ndarray)
        self.bridge = _core.Bridge(
            module.ndarray, _VERSIONED, self.reinterpret, self.empty_for, empty_like=module.empty_like
        )


class CuPy(NumPyLike):
    """Runs on CuPy's current stream; the export itself must not order anything (it would wait on the legacy stream)."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, module.ndarray)
        self._empty = module.ndarray  # what cupy.empty calls
        self._current_device = module.cuda.runtime.getDevice
        keywords = {"stream": -1, **_VERSIONED}
        self.bridge = _core.Bridge(
            module.ndarray, keywords, self.reinterpret, self.empty_for, current_stream=self.current_stream
        )

    def current_stream(self, index: int) -> int:
        return int(self.module.cuda.get_current_stream(index).ptr)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any, stream: Optional[int]) -> Any:
        device = like.device
        if device.id == self._current_device():  # entering it again takes longer than to ask
            return self._empty(shape, dtype)
        with device:
            return self._empty(shape, dtype)


class LazyNegation(TypeError):
    """A tensor stores the opposite of what it shows."""


class Torch(Framework):
    """Tensors are lent by torch's C exchange table where it has one (2.10 and newer), by `__dlpack__` before that."""

    def __init__(self, module: Any) -> None:
        self.module = module
        if os.environ.get("FLASHCORE_THREADS", "openmp") == "openmp":
            _core.use_openmp_threads()  # torch's own: on the CPU, two sets of threads would contend
        self.float8 = getattr(module, "float8_e4m3fn", None)
        self.dtypes = {name: getattr(module, name) for name in ("float16", "bfloat16", "float32", "float64")}
        self.dtypes["float8_e4m3"] = self.float8
        self.bridge, self.quiet = self._new_bridge(), self._new_bridge()
        self.quiet.wary_of_grad = False  # for flashcore.torch, which sees to gradients itself

    def _new_bridge(self) -> _core.Bridge:
        return _core.Bridge(
            self.module.Tensor,
            {"stream": -1},
            self.reinterpret,
            self.module.Tensor.new_empty,
            dtypes=self.dtypes,
            current_stream=self.current_stream,
            empty_like=self.module.empty_like,
            inspect=self.inspect,
            is_negated=self.module.Tensor.is_neg,
            exchange=True,
        )

    def current_stream(self, index: int) -> int:
        return int(self.module.cuda.current_stream(index).cuda_stream)

    def inspect(self, tensor: Any) -> None:
        """Hears of a tensor that is negated or requires grad."""
        if tensor.is_neg():
            raise LazyNegation(
                "a tensor with torch's lazy negation (as of .conj().imag) given; pass tensor.resolve_neg()"
            )
        if self.module.is_grad_enabled():
            self.bridge.wary_of_grad = False  # once is enough
            warnings.warn(
                "flashcore takes tensors that require grad as if detached: the result has no gradient. "
                "The differentiable call is flashcore.torch.attention",
                UserWarning,
                stacklevel=_caller_level(),
            )

    def reinterpret(self, tensor: Any, name: str) -> tuple[Any, str]:
        if not self.bridge.has_exchange_api:
            if tensor.requires_grad:
                return tensor.detach(), ""
            if tensor.dtype is self.float8:
                return tensor.view(self.module.uint8), "float8_e4m3"
        return explain_refusal(tensor, name)

    def shape(self, array: Any) -> tuple[int, ...]:
        return tuple(array.shape)

    def dtype(self, array: Any) -> Any:
        return array.dtype

    def named_dtype(self, name: str) -> Any:
        return self.dtypes[name]

    def is_dtype(self, dtype: Any, name: str) -> bool:
        return dtype is self.dtypes[name]

    def empty(self, shape: Sequence[int], dtype: Any, like: Any, stream: Optional[int]) -> Any:
        if not shape:
            return like.new_empty(shape, dtype=dtype)
        # torch reads sizes quicker than a tuple of sizes, and nothing quicker than a dtype
        return like.new_empty(*shape) if dtype is like.dtype else like.new_empty(*shape, dtype=dtype)


class Jax(Framework):
    """Eager JAX arrays. They are immutable, so results are written to memory of our own and then given to JAX."""

    def __init__(self, module: Any, array_type: type) -> None:
        self.module = module
        self.bridge = _core.Bridge(array_type, _NO_KEYWORDS, explain_refusal, self.empty_for, immutable=True)

    def shape(self, array: Any) -> tuple[int, ...]:
        return tuple(array.shape)

    def dtype(self, array: Any) -> Any:
        return str(array.dtype)

    def is_dtype(self, dtype: Any, name: str) -> bool:
        return bool(dtype == ("float8_e4m3fn" if name == "float8_e4m3" else name))

    def finish(self, result: Any) -> Any:
        return self.module.numpy.from_dlpack(result) if isinstance(result, _core.Array) else result


#: Framework of each array type that was seen.
known: dict[type, Framework] = {}


def classify(array: Any, name: str = "q") -> Framework:
    """The framework of an array's type, found once per type. Raises TypeError for what is not an array."""
    kind = type(array)
    roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
    if "torch" in roots and issubclass(kind, sys.modules["torch"].Tensor):
        framework = _classify_torch(kind, name)
    elif "numpy" in roots and hasattr(array, "__dlpack__"):
        framework = _classify_numpy(kind, name)
    elif "cupy" in roots and hasattr(array, "__dlpack__"):
        framework = CuPy(sys.modules["cupy"])
    elif roots & {"jax", "jaxlib"} and "jax" in sys.modules:
        framework = _classify_jax(array, name)
    elif hasattr(array, "__dlpack__"):
        framework = Framework(kind)
    else:
        raise TypeError(
            f"{name}: {qualified(kind)} is not an array; NumPy, torch, CuPy and JAX arrays are, "
            "and every object with __dlpack__"
        )
    known[kind] = framework
    return framework


def _classify_torch(kind: type, name: str) -> Framework:
    torch = sys.modules["torch"]
    dispatch = getattr(kind, "__torch_dispatch__", None)
    if getattr(dispatch, "__func__", dispatch) is not getattr(
        torch.Tensor.__torch_dispatch__, "__func__", torch.Tensor.__torch_dispatch__
    ):
        raise TypeError(
            f"{name}: {qualified(kind)} stands for other tensors and has no memory of its own; "
            "pass the plain tensors inside it"
        )
    return known.get(torch.Tensor) or known.setdefault(torch.Tensor, Torch(torch))


def _classify_numpy(kind: type, name: str) -> Framework:
    numpy = sys.modules["numpy"]
    if issubclass(kind, numpy.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array's mask would be ignored; pass .data, and a mask as `mask=`")
    return known.get(numpy.ndarray) or known.setdefault(numpy.ndarray, NumPy(numpy))


def is_traced(value: Any) -> bool:
    """Whether a value is JAX's stand-in for one that only the compiled program will have."""
    return "jax" in sys.modules and isinstance(value, sys.modules["jax"].core.Tracer)


def _classify_jax(array: Any, name: str) -> Framework:
    jax = sys.modules["jax"]
    if is_traced(array):
        raise TypeError(f"{name}: a JAX tracer given; inside jit, grad and vmap use flashcore.jax.attention")
    return Jax(jax, type(array))


def _caller_level() -> int:
    """The level, for `warnings.warn`, of the first frame outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        frame, level = frame.f_back, level + 1
    return level


def stream_handle(stream: Any) -> int:
    """A `cudaStream_t` as an int, from an int or from a framework's stream object."""
    for attribute in ("cuda_stream", "ptr", "value"):
        stream = getattr(stream, attribute, stream)
    if stream is None:  # the address of ctypes' null pointer
        return 0
    if isinstance(stream, bool) or not hasattr(stream, "__index__"):
        raise TypeError(
            f"stream: {qualified(type(stream))} given; an int (cudaStream_t) or an object with "
            ".cuda_stream, .ptr or .value is needed"
        )
    return int(stream.__index__())
