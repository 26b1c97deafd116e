"""Ways to make one argument of a call wrong, or strange: shapes, strides, dtypes, lengths, words, things that are none.

Not every spoiled call is invalid; what must hold for it is the same as for any other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

HUGE = (2**31 - 1, 2**31, 2**40, 2**62)


def spoil(arguments: dict[str, Any], rng) -> str:
    """Changes one argument in place. Says which and how."""
    if rng.random() < 0.25:
        return spoil_word(arguments, rng)
    names = [n for n, x in arguments.items() if isinstance(x, np.ndarray)]
    if not names or any(arguments[n].nbytes > 2**24 for n in names):  # an absurd length must not be copied
        return spoil_word(arguments, rng)
    name = str(rng.choice(names))
    kinds = NUMBERS if arguments[name].dtype.kind == "i" and rng.random() < 0.6 else SHAPES
    how = kinds[int(rng.integers(len(kinds)))]
    try:
        arguments[name] = how(arguments[name], arguments, rng)
    except (ValueError, IndexError, TypeError, OverflowError):  # this array has no such axis, size or dtype
        arguments[name] = None
        return f"{name}: none"
    return f"{name}: {how.__name__}"


# ---- arrays ----------------------------------------------------------------------------------------------------------


def any_axis(x, rng) -> int:
    return int(rng.integers(x.ndim))


def nothing(x, arguments, rng):
    return None


def no_array(x, arguments, rng):
    return [3, 2.5, "q", b"q", object(), [[1.0, 2.0]], (), np.float32(1), slice(3), type][int(rng.integers(10))]


def axis_less(x, arguments, rng):
    return x[(slice(None),) * any_axis(x, rng) + (0,)]


def axis_more(x, arguments, rng):
    return np.expand_dims(x, int(rng.integers(x.ndim + 1)))


def many_axes(x, arguments, rng):
    return x.reshape((1,) * int(rng.integers(5, 40)) + x.shape)


def scalar(x, arguments, rng):
    return np.array(1, x.dtype)


def shorter(x, arguments, rng):
    return x[(slice(None),) * any_axis(x, rng) + (slice(1, None),)]


def longer(x, arguments, rng):
    return np.concatenate([x, x], any_axis(x, rng))


def empty(x, arguments, rng):
    return x[(slice(None),) * any_axis(x, rng) + (slice(0),)]


def every_other(x, arguments, rng):
    return x[(slice(None),) * any_axis(x, rng) + (slice(None, None, 2),)]


def scattered(x, arguments, rng):
    """The right shape, the last dimension not contiguous."""
    return np.repeat(x, 2, -1)[..., ::2]


def backwards(x, arguments, rng):
    return np.flip(x, any_axis(x, rng))


def transposed(x, arguments, rng):
    return x.swapaxes(any_axis(x, rng), any_axis(x, rng))


def columns_first(x, arguments, rng):
    return np.asfortranarray(x)


def repeated(x, arguments, rng):
    """The right shape, one element or row for all: strides of 0."""
    axis = any_axis(x, rng)
    once = np.broadcast_to(x[(slice(None),) * axis + (slice(1),)], x.shape)
    once.flags.writeable = True
    return once


def overlapping(x, arguments, rng):
    """The right shape, rows that overlap each other."""
    strides = [step // 2 // x.itemsize * x.itemsize for step in x.strides[:-1]]
    return np.lib.stride_tricks.as_strided(x, x.shape, [*strides, x.itemsize])


def absurdly_long(x, arguments, rng):
    """Costs no memory. Only beside arrays that cannot have the same length: such a call would be valid, and endless."""
    if len([y for y in arguments.values() if isinstance(y, np.ndarray)]) < 3:
        return None
    axis = any_axis(x, rng)
    shape = list(x.shape)
    shape[axis] = int(rng.choice(HUGE))
    strides = list(x.strides)
    strides[axis] = 0
    return np.lib.stride_tricks.as_strided(x, shape, strides)


def unaligned(x, arguments, rng):
    raw = np.zeros(x.nbytes + x.itemsize + 1, np.uint8)
    moved = raw[1 : 1 + x.nbytes].view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


def read_only(x, arguments, rng):
    view = x.view()
    view.flags.writeable = False
    return view


def other_dtype(x, arguments, rng):
    kinds = ["float16", "float32", "float64", "int32", "int64", "bool", "uint8", "int8", "complex64", "object", "S3"]
    kinds += ["datetime64[s]", "longdouble", "uint32"]
    with np.errstate(all="ignore"):
        return x.astype(np.float64).astype("int64").astype(kinds[int(rng.integers(len(kinds)))])


def other_byte_order(x, arguments, rng):
    return x.astype(x.dtype.newbyteorder(">"))


def structured(x, arguments, rng):
    return np.zeros(x.shape, [("a", np.float32), ("b", np.int32)])


def masked(x, arguments, rng):
    return np.ma.masked_array(x)


def subclass(x, arguments, rng):
    class Named(np.ndarray):
        pass

    return x.view(Named)


def another_argument(x, arguments, rng):
    """Two arguments of a call are one array, or parts of one."""
    others = [y for y in arguments.values() if isinstance(y, np.ndarray)]
    return others[int(rng.integers(len(others)))]


def not_a_number(x, arguments, rng):
    x = x.copy()
    x[...] = [np.nan, np.inf, -np.inf][int(rng.integers(3))]
    return x


SHAPES = (nothing, no_array, axis_less, axis_more, many_axes, scalar, shorter, longer, empty, every_other, scattered)
SHAPES += (backwards, transposed, columns_first, repeated, overlapping, absurdly_long, unaligned, read_only)
SHAPES += (other_dtype, other_byte_order, structured, masked, subclass, another_argument, not_a_number)


# ---- lengths and page tables -----------------------------------------------------------------------------------------


def one_number(x, arguments, rng):
    x = x.copy()
    x.flat[int(rng.integers(x.size))] = rng.choice([-1, -(2**31), 2**31 - 1, 2**30, 1000, 0, 1])
    return x


def all_numbers(x, arguments, rng):
    return rng.integers(-3, 40, x.shape).astype(x.dtype)


def any_bits(x, arguments, rng):
    return rng.integers(-(2**31), 2**31, x.shape).astype(x.dtype)


def falling(x, arguments, rng):
    return x[::-1].copy()


def wide(x, arguments, rng):
    return x.astype(np.int64)


NUMBERS = (one_number, one_number, all_numbers, any_bits, falling, wide)


# ---- words -----------------------------------------------------------------------------------------------------------

STRANGE = (None, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64, 2**100, -(2**63), 1.5, float("nan"), float("inf"), -0.25)
STRANGE += ("", "abc", b"abc", (), [1], {}, object, True, np.float32(0.5), np.int64(3), np.zeros(3), 1 + 2j)
WORDS = {
    "causal": ("left", "top_left", "bottom_right", True),
    "window": ((-2, 0), (1,), (1, 2, 3), "ab", (None, 2**62), (2**63, 0), (2**63 - 1, 2**63 - 1), (1.5, 2), (0, -1)),
    "scale": (1e300, -1e300, 1e-300, "0.5"),
    "softcap": (-1.0, 1e-300, 1e300),
    "dropout_p": (1.0, 1.5, -0.1, 0.999999999999, 1e-300, "0.5"),
    "seed": (-1, 2**64, 2**64 - 1),
    "layout": ("sbhd", "thd", "bshd", "bhsd"),
    "kernel": ("reference", "cuda", "flash", "x" * 10000, "cpu.\0flash"),
    "stream": (0, 1, 12345, 2**63),
    "return_lse": (True, False),
    "max_seqlen_q": (-5, 0, 2),
    "max_seqlen_k": (-5, 0, 2),
    "deterministic": (True, False),
    "rotary_interleaved": (True,),
    "op": ("sum", "product", "max"),
    "axis": (5, -9, 0),
    "unknown": (1,),
}


def spoil_word(arguments: dict[str, Any], rng) -> str:
    """A word of the call, or one that it did not have, with a value that is out of range or of the wrong kind."""
    common = [n for n in WORDS if n in arguments]
    name = str(rng.choice(common if common and rng.random() < 0.5 else list(WORDS)))
    values = WORDS[name] if rng.random() < 0.6 else STRANGE
    arguments[name] = values[int(rng.integers(len(values)))]
    return f"{name}: {str(arguments[name])[:40]}"
