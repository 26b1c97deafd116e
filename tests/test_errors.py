"""Bad input: an exception of the contract's type that names what was given and what is allowed; nothing is written."""

import re

import flashcore as fc
import numpy as np
import pytest

FULL = 2, 4, 9, 16


class Call:
    """A valid attention call whose arguments a test then spoils."""

    function = staticmethod(fc.attention)
    results = ("out", "lse")

    def __init__(self, xp):
        self.xp = xp
        rng = np.random.default_rng(0)
        self.positional = {
            "q": self.array(rng.standard_normal(FULL)),
            "k": self.array(rng.standard_normal((2, 2, 9, 16))),
            "v": self.array(rng.standard_normal((2, 2, 9, 16))),
        }
        self.keywords = {"out": xp.empty(FULL), "lse": xp.empty((2, 4, 9))}

    def array(self, values, dtype="float32"):
        return self.xp.array(values, dtype)

    def zeros(self, *shape, dtype="float32"):
        return self.array(np.zeros(shape), dtype)

    def __call__(self, **changes):
        positional = {n: changes.pop(n, x) for n, x in self.positional.items()}
        return self.function(*positional.values(), **{**self.keywords, **changes})

    def written(self):
        """The arrays that the call may write to."""
        return [self.keywords[name] for name in self.results]


class Decode(Call):
    function = staticmethod(fc.attention_decode)

    def __init__(self, xp):
        super().__init__(xp)
        rng = np.random.default_rng(0)
        self.positional = {
            "q": self.array(rng.standard_normal((2, 4, 1, 16))),
            "k_cache": self.array(np.full((6, 2, 4, 16), -7.0)),
            "v_cache": self.array(np.full((6, 2, 4, 16), -7.0)),
            "cache_seqlens": self.array([5, 8], "int32"),
            "block_table": self.array([[0, 1, 2], [3, 4, 5]], "int32"),
        }
        self.keywords = {
            "out": xp.empty((2, 4, 1, 16)),
            "lse": xp.empty((2, 4, 1)),
            "k_new": self.array(rng.standard_normal((2, 2, 1, 16))),
            "v_new": self.array(rng.standard_normal((2, 2, 1, 16))),
        }

    def written(self):
        return super().written() + [self.positional["k_cache"], self.positional["v_cache"]]


class Varlen(Call):
    function = staticmethod(fc.attention_varlen)

    def __init__(self, xp):
        super().__init__(xp)
        rng = np.random.default_rng(0)
        self.positional = {
            "q": self.array(rng.standard_normal((9, 4, 16))),
            "k": self.array(rng.standard_normal((9, 2, 16))),
            "v": self.array(rng.standard_normal((9, 2, 16))),
            "cu_seqlens_q": self.array([0, 4, 9], "int32"),
            "cu_seqlens_k": self.array([0, 4, 9], "int32"),
        }
        self.keywords = {"out": xp.empty((9, 4, 16)), "lse": xp.empty((4, 9))}


class Backward(Call):
    function = staticmethod(fc.attention_backward)
    results = ("dq", "dk", "dv")

    def __init__(self, xp):
        super().__init__(xp)
        q, k, v = self.positional.values()
        out, lse = fc.attention(q, k, v, return_lse=True)
        dout = self.array(np.ones(FULL))
        self.positional = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
        self.keywords = {"dq": xp.empty(FULL), "dk": xp.empty((2, 2, 9, 16)), "dv": xp.empty((2, 2, 9, 16))}


def refused(call, exception, pattern, **changes):
    """The call raises, says `pattern`, and has written nothing."""
    with pytest.raises(exception) as caught:
        call(**changes)
    assert re.search(pattern, str(caught.value), re.DOTALL), f"{pattern!r} is not in: {caught.value}"
    for x in call.written():
        np.testing.assert_array_equal(call.xp.numpy(x), -7.0)


# Each entry: what to change (given the call), the exception, what the message must say: the given and the allowed.
ATTENTION = {
    "q_rank": (lambda c: {"q": c.zeros(4, 9, 16)}, ValueError, r"q.*batch.*heads.*seqlen.*\(4, 9, 16\)"),
    "k_rank": (lambda c: {"k": c.zeros(2, 2, 9, 16, 1)}, ValueError, r"k.*\(2, 2, 9, 16, 1\)"),
    "batches": (lambda c: {"k": c.zeros(3, 2, 9, 16), "v": c.zeros(3, 2, 9, 16)}, ValueError, r"batch.*2.*3"),
    "heads": (lambda c: {"k": c.zeros(2, 3, 9, 16), "v": c.zeros(2, 3, 9, 16)}, ValueError, r"4.*3.*multiple"),
    "no_heads": (lambda c: {"k": c.zeros(2, 0, 9, 16), "v": c.zeros(2, 0, 9, 16)}, ValueError, r"head"),
    "heads_of_v": (lambda c: {"v": c.zeros(2, 4, 9, 16)}, ValueError, r"2 heads.*4"),
    "lengths_of_k_and_v": (lambda c: {"v": c.zeros(2, 2, 8, 16)}, ValueError, r"9.*8"),
    "head_dim": (lambda c: {"k": c.zeros(2, 2, 9, 8)}, ValueError, r"16.*8"),
    "head_dim_zero": (
        lambda c: {"q": c.zeros(2, 4, 9, 0), "k": c.zeros(2, 2, 9, 0)},
        ValueError,
        r"head_dim 0.*1 to 256",
    ),
    "head_dim_large": (
        lambda c: {"q": c.zeros(2, 4, 9, 257), "k": c.zeros(2, 2, 9, 257)},
        ValueError,
        r"257.*1 to 256",
    ),
    "head_dim_v_large": (lambda c: {"v": c.zeros(2, 2, 9, 300)}, ValueError, r"300.*1 to 256"),
    "dtypes_mixed": (lambda c: {"k": c.zeros(2, 2, 9, 16, dtype="float16")}, TypeError, r"k.*float32.*float16"),
    "dtype_integer": (
        lambda c: {n: c.zeros(*s, dtype="int32") for n, s in zip("qkv", (FULL, FULL, FULL), strict=True)},
        TypeError,
        r"q.*float16.*int32",
    ),
    "layout": (lambda c: {"layout": "sbhd"}, ValueError, r"sbhd.*bhsd.*bshd"),
    "layout_of_varlen": (lambda c: {"layout": "thd"}, ValueError, r"cu_seqlens|rank|shape|thd"),
    "causal_word": (lambda c: {"causal": "middle"}, ValueError, r"middle.*top_left.*bottom_right"),
    "causal_number": (lambda c: {"causal": 7}, ValueError, r"7.*top_left.*bottom_right"),
    "causal_ambiguous": (
        lambda c: {"causal": True, "k": c.zeros(2, 2, 12, 16), "v": c.zeros(2, 2, 12, 16)},
        ValueError,
        r"9.*12.*top_left.*bottom_right",
    ),
    "window_negative": (lambda c: {"window": (-2, 3)}, ValueError, r"-2"),
    "window_of_one": (lambda c: {"window": (3,)}, ValueError, r"window.*left.*right"),
    "window_number": (lambda c: {"window": 3}, (ValueError, TypeError), r"window"),
    "window_float": (lambda c: {"window": (1.5, 2)}, (ValueError, TypeError), r"1\.5"),
    "window_of_65_bits": (lambda c: {"window": (2**63, 0)}, ValueError, r"window.*9223372036854775808.*2\*\*63"),
    "scale_nan": (lambda c: {"scale": float("nan")}, ValueError, r"scale.*nan.*finite"),
    "scale_inf": (lambda c: {"scale": float("inf")}, ValueError, r"scale.*inf.*finite"),
    "scale_word": (lambda c: {"scale": "large"}, (TypeError, ValueError), r"large|scale"),
    "softcap_negative": (lambda c: {"softcap": -1.0}, ValueError, r"softcap.*-1"),
    "softcap_nan": (lambda c: {"softcap": float("nan")}, ValueError, r"softcap.*nan"),
    "dropout_one": (lambda c: {"dropout_p": 1.0}, ValueError, r"dropout_p.*1.*\[0, 1\)"),
    "dropout_negative": (lambda c: {"dropout_p": -0.1}, ValueError, r"dropout_p.*-0\.1.*\[0, 1\)"),
    "dropout_nan": (lambda c: {"dropout_p": float("nan")}, ValueError, r"dropout_p.*nan"),
    "seed_negative": (lambda c: {"dropout_p": 0.5, "seed": -1}, ValueError, r"seed.*-1"),
    "seed_large": (lambda c: {"dropout_p": 0.5, "seed": 2**64}, ValueError, r"seed.*18446744073709551616"),
    "seed_float": (lambda c: {"dropout_p": 0.5, "seed": 1.5}, (TypeError, ValueError), r"float|1\.5"),
    "mask_dtype": (lambda c: {"mask": c.zeros(9, 9)}, TypeError, r"mask.*bool.*float32"),
    "mask_shape": (lambda c: {"mask": c.zeros(9, 8, dtype="bool")}, ValueError, r"mask.*\(2, 4, 9, 9\).*\(9, 8\)"),
    "mask_rank": (lambda c: {"mask": c.zeros(1, 1, 1, 9, 9, dtype="bool")}, ValueError, r"mask.*\(2, 4, 9, 9\)"),
    "bias_dtype": (lambda c: {"bias": c.zeros(9, 9, dtype="int32")}, TypeError, r"bias.*float32.*int32"),
    "bias_shape": (lambda c: {"bias": c.zeros(3, 9, 9)}, ValueError, r"bias.*\(2, 4, 9, 9\).*\(3, 9, 9\)"),
    "bias_zero_size": (lambda c: {"bias": c.zeros(9, 0)}, ValueError, r"bias.*\(2, 4, 9, 9\).*\(9, 0\)"),
    "alibi_shape": (lambda c: {"alibi_slopes": c.zeros(3)}, ValueError, r"alibi_slopes.*\(4,\).*\(3,\)"),
    "alibi_dtype": (lambda c: {"alibi_slopes": c.zeros(4, dtype="int32")}, TypeError, r"alibi_slopes.*float32"),
    "sinks_shape": (lambda c: {"sinks": c.zeros(2, 4)}, ValueError, r"sinks.*\(4,\).*\(2, 4\)"),
    "sinks_dtype": (lambda c: {"sinks": c.zeros(4, dtype="int32")}, TypeError, r"sinks.*float32.*int32"),
    "descale_without_float8": (lambda c: {"q_descale": c.zeros(2, 2)}, ValueError, r"q_descale.*float8"),
    "seqused_large": (lambda c: {"seqused_k": c.array([3, 10], "int32")}, ValueError, r"seqused_k\[1\].*10.*9"),
    "seqused_negative": (lambda c: {"seqused_k": c.array([-3, 1], "int32")}, ValueError, r"seqused_k\[0\].*-3"),
    "seqused_shape": (lambda c: {"seqused_k": c.array([3], "int32")}, ValueError, r"seqused_k.*\(2,\).*\(1,\)"),
    "seqused_dtype": (lambda c: {"seqused_k": c.array([3, 4], "int64")}, TypeError, r"seqused_k.*int32.*int64"),
    "out_shape": (lambda c: {"out": c.zeros(2, 4, 9, 8)}, ValueError, r"out.*\(2, 4, 9, 16\).*\(2, 4, 9, 8\)"),
    "out_dtype": (lambda c: {"out": c.zeros(*FULL, dtype="float16")}, TypeError, r"out.*float32.*float16"),
    "lse_shape": (lambda c: {"lse": c.zeros(2, 9, 4)}, ValueError, r"lse.*\(2, 4, 9\).*\(2, 9, 4\)"),
    "lse_dtype": (lambda c: {"lse": c.zeros(2, 4, 9, dtype="float16")}, TypeError, r"lse.*float32.*float16"),
    "out_is_q": (lambda c: {"out": c.positional["q"]}, ValueError, r"out.*overlaps.*q"),
    "lse_is_part_of_out": (lambda c: {"lse": c.keywords["out"][..., 0]}, ValueError, r"overlap"),
    "unknown_keyword": (lambda c: {"is_causal": True}, TypeError, r"is_causal"),
}
DECODE = {
    "lengths_dtype": (lambda c: {"cache_seqlens": c.array([5, 8], "int64")}, TypeError, r"cache_seqlens.*int32.*int64"),
    "lengths_shape": (lambda c: {"cache_seqlens": c.array([5], "int32")}, ValueError, r"cache_seqlens.*\(2,\).*\(1,\)"),
    "length_negative": (lambda c: {"cache_seqlens": c.array([5, -1], "int32")}, ValueError, r"cache_seqlens\[1\].*-1"),
    "length_too_large": (
        lambda c: {"cache_seqlens": c.array([5, 13], "int32")},
        ValueError,
        r"cache_seqlens\[1\].*13.*12",
    ),
    "no_room_to_append": (lambda c: {"cache_seqlens": c.array([5, 12], "int32")}, ValueError, r"12.*1 .*12"),
    "page_too_large": (
        lambda c: {"block_table": c.array([[0, 6, 2], [3, 4, 5]], "int32")},
        ValueError,
        r"block_table\[0\]\[1\].*6.*5",
    ),
    "page_negative": (
        lambda c: {"block_table": c.array([[0, 1, 2], [3, -1, 5]], "int32")},
        ValueError,
        r"block_table\[1\]\[1\].*-1",
    ),
    "table_shape": (
        lambda c: {"block_table": c.array([[0, 1, 2]], "int32")},
        ValueError,
        r"block_table.*\(2, max_pages\)",
    ),
    "table_dtype": (lambda c: {"block_table": c.zeros(2, 3, dtype="int64")}, TypeError, r"block_table.*int32.*int64"),
    "cache_without_table": (lambda c: {"block_table": None}, ValueError, r"6.*2.*block_table"),
    "caches_differ": (lambda c: {"v_cache": c.zeros(6, 2, 5, 16)}, ValueError, r"k_cache.*v_cache"),
    "k_new_alone": (lambda c: {"v_new": None}, ValueError, r"k_new.*v_new.*together"),
    "k_new_shape": (lambda c: {"k_new": c.zeros(2, 4, 1, 16)}, ValueError, r"k_new.*\(2, 2, 1, 16\).*\(2, 4, 1, 16\)"),
    "v_new_longer": (lambda c: {"v_new": c.zeros(2, 2, 2, 16)}, ValueError, r"v_new.*\(2, 2, 1, 16\).*\(2, 2, 2, 16\)"),
    "k_new_dtype": (lambda c: {"k_new": c.zeros(2, 2, 1, 16, dtype="float16")}, TypeError, r"k_new.*float32.*float16"),
    "cos_alone": (lambda c: {"rotary_cos": c.zeros(20, 8)}, ValueError, r"rotary_cos.*rotary_sin.*together"),
    "rotary_wide": (
        lambda c: {"rotary_cos": c.zeros(20, 9), "rotary_sin": c.zeros(20, 9)},
        ValueError,
        r"rotary.*16.*\(20, 9\)",
    ),
    "rotary_short": (
        lambda c: {"rotary_cos": c.zeros(8, 8), "rotary_sin": c.zeros(8, 8)},
        ValueError,
        r"rotary.*8 positions.*9",
    ),
    "top_left": (lambda c: {"causal": "top_left"}, ValueError, r"bottom.right.*top_left"),
    "k_new_overlaps_the_cache": (
        lambda c: {"k_new": c.positional["k_cache"][:2, :, :1]},
        ValueError,
        r"k_cache.*overlap|overlap.*k_cache",
    ),
}
VARLEN = {
    "start": (lambda c: {"cu_seqlens_q": c.array([1, 4, 9], "int32")}, ValueError, r"cu_seqlens_q\[0\].*1.*0"),
    "falling": (lambda c: {"cu_seqlens_k": c.array([0, 9, 4], "int32")}, ValueError, r"cu_seqlens_k\[2\].*4.*9"),
    "past_the_end": (lambda c: {"cu_seqlens_k": c.array([0, 4, 10], "int32")}, ValueError, r"cu_seqlens_k.*10.*9"),
    "batches": (lambda c: {"cu_seqlens_k": c.array([0, 9], "int32")}, ValueError, r"cu_seqlens_k.*\(3,\).*\(2,\)"),
    "dtype": (lambda c: {"cu_seqlens_q": c.array([0, 4, 9], "int64")}, TypeError, r"cu_seqlens_q.*int32.*int64"),
    "rank": (lambda c: {"cu_seqlens_q": c.zeros(1, 3, dtype="int32")}, ValueError, r"cu_seqlens_q.*batch \+ 1"),
    "empty": (lambda c: {"cu_seqlens_q": c.zeros(0, dtype="int32")}, ValueError, r"cu_seqlens_q.*batch \+ 1"),
    "longer_than_the_maximum": (lambda c: {"max_seqlen_q": 4}, ValueError, r"5.*maximum.*4"),
    "negative_maximum": (lambda c: {"max_seqlen_k": -5}, ValueError, r"-5"),
    "maximum_of_65_bits": (lambda c: {"max_seqlen_q": 2**64}, ValueError, r"18446744073709551616.*2\*\*63"),
    "maximum_between_numbers": (lambda c: {"max_seqlen_k": 9.5}, TypeError, r"float"),
    "seqused_large": (lambda c: {"seqused_k": c.array([4, 6], "int32")}, ValueError, r"seqused_k\[1\].*6.*5"),
    "q_rank": (lambda c: {"q": c.zeros(1, 9, 4, 16)}, ValueError, r"q.*total.*\(1, 9, 4, 16\)"),
    "tokens_of_v": (lambda c: {"v": c.zeros(8, 2, 16)}, ValueError, r"9.*8"),
}
BACKWARD = {
    "dout_shape": (lambda c: {"dout": c.zeros(2, 4, 9, 8)}, ValueError, r"dout.*\(2, 4, 9, 16\).*\(2, 4, 9, 8\)"),
    "dout_dtype": (lambda c: {"dout": c.zeros(*FULL, dtype="float16")}, TypeError, r"dout.*float32.*float16"),
    "out_shape": (lambda c: {"out": c.zeros(2, 4, 8, 16)}, ValueError, r"out.*\(2, 4, 9, 16\)"),
    "lse_missing": (lambda c: {"lse": None}, (ValueError, TypeError), r"lse"),
    "lse_shape": (lambda c: {"lse": c.zeros(2, 4, 8)}, ValueError, r"lse.*\(2, 4, 9\).*\(2, 4, 8\)"),
    "dlse_shape": (lambda c: {"dlse": c.zeros(2, 4, 8)}, ValueError, r"dlse.*\(2, 4, 9\).*\(2, 4, 8\)"),
    "dq_shape": (lambda c: {"dq": c.zeros(2, 4, 9, 8)}, ValueError, r"dq.*\(2, 4, 9, 16\).*\(2, 4, 9, 8\)"),
    "dk_dtype": (lambda c: {"dk": c.zeros(2, 2, 9, 16, dtype="float16")}, TypeError, r"dk.*float32.*float16"),
    "dk_is_dv": (lambda c: {"dk": c.keywords["dv"]}, ValueError, r"dk.*overlaps.*dv|dv.*overlaps.*dk"),
    "dq_is_q": (lambda c: {"dq": c.positional["q"]}, ValueError, r"dq.*overlaps.*q"),
}


def table(entries):
    return pytest.mark.parametrize(("changes", "exception", "pattern"), entries.values(), ids=entries)


@table(ATTENTION)
def test_attention(changes, exception, pattern, xp, monkeypatch):
    monkeypatch.setenv("FLASHCORE_CHECK", "1")  # on the GPU, too, look at the values of lengths
    call = Call(xp)
    refused(call, exception, pattern, **changes(call))


@table(DECODE)
def test_decode(changes, exception, pattern, xp, monkeypatch):
    monkeypatch.setenv("FLASHCORE_CHECK", "1")
    call = Decode(xp)
    refused(call, exception, pattern, **changes(call))


@table(VARLEN)
def test_varlen(changes, exception, pattern, xp, monkeypatch):
    monkeypatch.setenv("FLASHCORE_CHECK", "1")
    call = Varlen(xp)
    refused(call, exception, pattern, **changes(call))


@table(BACKWARD)
def test_backward(changes, exception, pattern, xp):
    call = Backward(xp)
    refused(call, exception, pattern, **changes(call))


@pytest.mark.parametrize("kind", [Call, Decode, Varlen, Backward])
def test_the_unspoiled_call_is_valid(kind, xp):
    """What the tests above spoil works as it stands: each refusal is about the change alone."""
    kind(xp)()


def test_lengths_that_lie_on_the_gpu_never_crash(device, xp):
    """Without FLASHCORE_CHECK they are not read before the launch: any value is clamped to the tensors."""
    if device == "cpu":
        pytest.skip("values on the CPU are checked")
    call = Decode(xp)
    call(cache_seqlens=call.array([-5, 10**9], "int32"), block_table=call.array([[9, -9, 2], [3, 4, 2**30]], "int32"))
    assert np.isfinite(call.xp.numpy(call.keywords["out"])).all()


def test_strides_that_overlap_cannot_be_written(xp):
    call = Call(xp)
    one = call.zeros(1, 4, 9, 16)
    out = np.broadcast_to(one, FULL) if xp.name == "numpy" else one.expand(*FULL)
    if xp.name == "numpy":
        out.flags.writeable = True
    refused(call, ValueError, r"out.*share memory", out=out)


def test_unaligned_memory_is_refused_or_right():
    """An address that is no multiple of the element's size."""
    raw = np.frombuffer(bytearray(4 * 2 * 9 * 16 + 1), np.uint8)[1:]
    x = raw.view(np.float32).reshape(1, 2, 9, 16)
    x[:] = np.random.default_rng(0).standard_normal(x.shape)
    try:
        out = fc.attention(x, x, x)
    except (ValueError, TypeError) as refusal:
        assert re.search(r"align|multiple|address", str(refusal))
    else:
        np.testing.assert_array_equal(out, fc.attention(*[x.copy()] * 3))


def test_merge_states(xp):
    call = Call(xp)
    out, lse = call.zeros(*FULL), call.zeros(2, 4, 9)
    for arguments, exception, pattern in [
        ((out, lse, call.zeros(2, 4, 9, 8), lse), ValueError, r"out_b.*\(2, 4, 9, 16\).*\(2, 4, 9, 8\)"),
        ((out, lse, out, call.zeros(2, 4, 8)), ValueError, r"lse_b.*\(2, 4, 9\).*\(2, 4, 8\)"),
        ((out, call.zeros(2, 4, 9, dtype="float16"), out, lse), TypeError, r"lse_a.*float32.*float16"),
        ((out, lse, call.zeros(*FULL, dtype="float16"), lse), TypeError, r"out_b.*float32.*float16"),
    ]:
        with pytest.raises(exception, match=pattern):
            fc.merge_states(*arguments)


def test_exceptions_belong_where_python_expects_them():
    assert issubclass(fc.Unsupported, Exception)
    assert not issubclass(fc.Unsupported, ValueError)
    assert issubclass(fc.CudaError, Exception)


@pytest.mark.parametrize("index", [-1, 99])
def test_devices_that_do_not_exist(index):
    with pytest.raises(ValueError, match=str(index)):
        fc.device_info(index)


def test_device_words():
    with pytest.raises(ValueError, match=r"tpu.*cpu.*cuda"):
        fc.device_info("tpu")
