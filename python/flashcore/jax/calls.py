"""One call of the library as an operation of a JAX program: checked while tracing, mapped by vmap, cut by shardings."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from .. import _core
from ..options import LAYOUTS, ROW_ORDER
from . import sharding
from .versions import shape_struct, vary, varying_axes


class Call(NamedTuple):
    """Everything about a call but its arrays. Hashable: a static argument."""

    phase: str  #: "forward", "backward" or "decode"
    words: tuple[Any, ...]  #: as `_core.Options` takes them
    operands: tuple[str, ...]  #: the arrays that come in, by name
    results: tuple[str, ...]
    bounds: tuple[int, int] = (-1, -1)  #: max_seqlen_q, max_seqlen_k
    rotary_interleaved: bool = False
    mapped: int = 0  #: how many dimensions vmap put in front of each array

    @property
    def layout(self) -> str:
        return next(name for name, number in LAYOUTS.items() if number == self.words[0])

    @property
    def dropout_p(self) -> float:
        return float(self.words[6])

    @property
    def written_in_place(self) -> dict[int, int]:
        """Operand -> result, for the caches that are appended to."""
        return {self.operands.index(name): i for i, name in enumerate(self.results) if name in self.operands}


def array(value: Any, name: str) -> Any:
    """A JAX array or tracer. Raises TypeError for what is neither that nor a NumPy array or a number."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic, int, float, bool)):
        return jnp.asarray(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise TypeError(f"{name}: {kind} given; flashcore.jax takes JAX and NumPy arrays")


def given(**arrays: Any) -> dict[str, Any]:
    """Those of the arrays that are not None."""
    return {name: array(value, name) for name, value in arrays.items() if value is not None}


def results_of(call: Call, shapes: dict[str, Any]) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each result; `shapes` are the operands, or anything with their shapes and dtypes."""
    mapped = np.broadcast_shapes(*(x.shape[: call.mapped] for x in shapes.values())) if call.mapped else ()
    q = shapes["q"]
    v = shapes["v_cache" if call.phase == "decode" else "v"]
    own = q.shape[call.mapped :]

    def of(name: str) -> Any:
        if name == "out":
            float8 = q.dtype == jnp.float8_e4m3fn
            return (*own[:-1], *v.shape[-1:]), jnp.dtype(jnp.bfloat16) if float8 else q.dtype
        if name == "lse":
            rows = tuple(own[i] for i in ROW_ORDER[call.layout] if i < len(own))
            return rows, jnp.dtype(jnp.float64 if q.dtype == jnp.float64 else jnp.float32)
        like = shapes[name if name in shapes else name.removeprefix("d")]
        return like.shape[call.mapped :], like.dtype

    return [((*mapped, *shape), dtype) for shape, dtype in map(of, call.results)]


def invoke(call: Call, arrays: dict[str, Any]) -> tuple[Any, ...]:
    """The results of a call on arrays without mapped dimensions. Raises what `flashcore.attention` would raise."""
    shapes = {name: arrays[name] for name in call.operands}
    _register()
    _check(call, shapes)
    return tuple(_operation(call)(*shapes.values()))


@lru_cache(maxsize=1024)
def _operation(call: Call) -> Any:
    """The call as a function of its operands that vmap and shardings know how to take apart."""

    @jax.custom_batching.custom_vmap
    def operation(*arrays: Any) -> Any:
        return sharding.partitioned(call, bare)(*arrays)

    def bare(*arrays: Any) -> tuple[Any, ...]:
        return tuple(_ffi_call(call, arrays))

    @operation.def_vmap
    def mapped(size: int, is_mapped: Any, *arrays: Any) -> Any:
        in_place = call.written_in_place
        lifted = []
        for place, (x, own) in enumerate(zip(arrays, is_mapped, strict=True)):
            if own:
                lifted.append(x)
            elif place in in_place:
                lifted.append(jnp.broadcast_to(x, (size, *x.shape)))
            else:
                lifted.append(x[None])
        results = _operation(call._replace(mapped=call.mapped + 1))(*lifted)
        return results, (True,) * len(call.results)

    return operation


def _ffi_call(call: Call, arrays: tuple[Any, ...]) -> Any:
    layout, causal, left, right, scale, softcap, dropout_p, seed, deterministic, kernel = call.words
    integers = {
        "layout": layout,
        "causal": causal,
        "left": left,
        "right": right,
        "seed": seed - 2**64 if seed >= 2**63 else seed,
        "deterministic": deterministic,
        "max_seqlen_q": call.bounds[0],
        "max_seqlen_k": call.bounds[1],
        "rotary_interleaved": call.rotary_interleaved,
        "mapped": call.mapped,
    }
    numbers = {"scale": scale, "softcap": softcap, "dropout_p": dropout_p}
    shapes = dict(zip(call.operands, arrays, strict=True))
    looks = results_of(call, shapes)
    shardings = sharding.of_results(call, shapes, [shape for shape, _ in looks])
    varying = varying_axes(shapes["q"])  # as of all operands: vary_alike made them so
    run = jax.ffi.ffi_call(
        f"flashcore_{call.phase}",
        tuple(shape_struct(*look, cut, varying) for look, cut in zip(looks, shardings, strict=True)),
        input_output_aliases=call.written_in_place,
    )
    return run(
        *arrays,
        operands=" ".join(call.operands),
        results=" ".join(call.results),
        kernel=kernel,
        **{name: np.int64(value) for name, value in integers.items()},
        **{name: np.float64(value) for name, value in numbers.items() if value is not None},
    )


def _check(call: Call, shapes: dict[str, Any]) -> None:
    """Raises for a call that can never run. Neither data nor, but for the choice of a kernel, the device matters."""
    looks = {name: (x.shape, x.dtype) for name, x in shapes.items()}
    looks |= dict(zip(call.results, results_of(call, shapes), strict=True))
    tensors = [(name, str(dtype), tuple(shape)) for name, (shape, dtype) in looks.items()]
    gpu = jax.default_backend() == "gpu" and _core.device_count() > 0
    places = (True, False) if gpu else (False, True) if _core.device_count() > 0 else (False,)
    refused: Optional[Exception] = None
    for cuda in places:  # a kernel may be asked for that only one kind of device has
        try:
            _core.check_call(
                call.phase, _core.Options(*call.words), tensors, *call.bounds, call.rotary_interleaved, cuda, 0
            )
            return
        except _core.Unsupported as error:
            refused = refused or error
    if refused is not None:
        raise refused


@cache
def _register() -> None:
    """Makes the library's functions known to XLA, once, and only after JAX's own start: a refusal would spoil that."""
    jax.default_backend()
    for name, platform, function in _core.xla_targets():
        try:
            jax.ffi.register_ffi_target(name, function, platform=platform)
        except Exception as error:
            raise RuntimeError(
                f"JAX {jax.__version__} does not take flashcore {_core.version()}'s functions ({error}); "
                "install another version of one of them"
            ) from error


def vary_alike(arrays: dict[str, Any]) -> dict[str, Any]:
    """Inside shard_map: the same values, marked as differing along each mesh axis along which any of them differs.

    So JAX sums the gradient of an array that all devices share.
    """
    axes = frozenset().union(*map(varying_axes, arrays.values()))
    return {name: vary(x, axes) for name, x in arrays.items()} if axes else arrays
