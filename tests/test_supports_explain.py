"""supports() and explain(): the answer before the call, in agreement with the call; FLASHCORE_LOG tells afterwards."""

import os
import re
import subprocess
import sys

import flashcore as fc
import numpy as np
import pytest
from cases import ALL_FLOATS, CASES, make
from hypothesis import given
from hypothesis import strategies as st
from test_errors import ATTENTION, Call

# supports() reads no data: what is wrong with the values of lengths is found by the call alone.
WITHOUT_VALUES = {name: entry for name, entry in ATTENTION.items() if name not in ("seqused_large", "seqused_negative")}


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_supports_every_valid_case(case, dtype, xp, rng):
    problem = make(case, dtype, rng)
    answer = fc.supports(*problem.arrays(xp), **problem.keywords(xp))
    assert answer.ok, answer.why
    assert answer.kernel
    assert not answer.why


@pytest.mark.parametrize(("changes", "exception", "pattern"), WITHOUT_VALUES.values(), ids=WITHOUT_VALUES)
def test_supports_says_what_the_call_would_raise(changes, exception, pattern, xp):
    call = Call(xp)
    try:
        call(**changes(call))
    except Exception as error:
        message = str(error)
    fresh = Call(xp)
    answer = fc.supports(**{**fresh.positional, **fresh.keywords, **changes(fresh)})
    assert not answer.ok
    assert not answer.kernel
    # An overlap between tensors is a matter of addresses, which other wording may describe.
    assert answer.why == message or re.search(pattern, answer.why, re.DOTALL)


@given(
    arrays=st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=6), st.sampled_from(["f2", "f4", "f8", "i4", "?"])),
        min_size=3,
        max_size=3,
    ),
    causal=st.sampled_from([True, False, "top_left", "bottom_right", "x", None, 3]),
    window=st.one_of(st.none(), st.tuples(st.integers(-3, 3), st.integers(-3, 3)), st.text(max_size=2)),
    softcap=st.one_of(st.floats(), st.none()),
    layout=st.sampled_from(["bhsd", "bshd", "thd", "", None]),
)
def test_supports_never_raises_and_agrees_with_the_call(arrays, causal, window, softcap, layout):
    q, k, v = (np.zeros(shape, dtype) for shape, dtype in arrays)
    words = {"causal": causal, "window": window, "softcap": softcap, "layout": layout}
    answer = fc.supports(q, k, v, **words)
    if answer.ok:
        fc.attention(q, k, v, **words)
    else:
        assert answer.why
        with pytest.raises((ValueError, TypeError, fc.Unsupported)):
            fc.attention(q, k, v, **words)


def test_supports_reads_no_data(rng):
    """NaN, absurd lengths and page ids do not matter: only shapes, dtypes and strides."""
    q, cache = np.full((2, 2, 1, 8), np.nan, np.float32), np.full((3, 2, 4, 8), np.nan, np.float32)
    lengths, table = np.array([-5, 10**6], np.int32), np.full((2, 2), -1, np.int32)
    assert fc.supports(q, cache, cache, cache_seqlens=lengths, block_table=table).ok


def test_support_can_be_asked_as_a_condition(xp):
    x = xp.array(np.zeros((1, 1, 2, 8)), "float32")
    assert fc.supports(x, x, x)
    assert not fc.supports(x, x, x, causal="sideways")


def test_supports_what_is_no_array():
    answer = fc.supports("q", None, 3)
    assert not answer.ok
    assert answer.why


def test_unknown_kernel_is_not_supported(xp):
    x = xp.array(np.zeros((1, 1, 2, 8)), "float32")
    answer = fc.supports(x, x, x, kernel="warp_drive")
    assert not answer.ok
    assert "warp_drive" in answer.why


def test_unsupported_gives_every_reason(xp):
    """A decode kernel cannot be asked for backward: the message lists each row of the device with its reason."""
    x = xp.array(np.zeros((1, 1, 2, 8)), "float8_e4m3")
    out = xp.empty((1, 1, 2, 8), "bfloat16")
    lse = xp.empty((1, 1, 2))
    with pytest.raises(fc.Unsupported) as caught:
        fc.attention_backward(xp.array(np.zeros((1, 1, 2, 8)), "bfloat16"), x, x, x, out, lse)
    message = str(caught.value)
    assert "bwd e4m3" in message
    assert re.search(r"reference.*:.*float8_e4m3", message)
    assert re.search(r"same call in (float32|bfloat16|float16) runs", message)


def test_explain_names_line_kernel_workspace(xp, device):
    x = xp.array(np.zeros((2, 4, 8, 16)), "float16")
    text = fc.explain(x, x[:, :2], x[:, :2], causal=True, softcap=3.0)
    assert "fwd fp16 b2 q8 k8 h4/2 d16 causal softcap3" in text
    assert fc.supports(x, x[:, :2], x[:, :2], causal=True, softcap=3.0).kernel in text
    assert re.search(r"workspace: *\d+ bytes", text)
    assert device in text


def test_explain_tells_of_the_kernels_that_were_not_chosen(xp):
    """Every row of the device is in the text, each with a reason."""
    x = xp.array(np.zeros((1, 1, 2, 8)), "float32")
    text = fc.explain(x, x, x)
    _, _, others = text.partition("others:")
    assert others.strip(), text
    for line in others.strip().splitlines():
        assert re.match(r"\s*\S+: \S", line), line


def test_explain_of_decode_and_varlen(xp):
    cache = xp.array(np.zeros((3, 2, 16, 8)), "float16")
    q = xp.array(np.zeros((2, 4, 1, 8)), "float16")
    given = {"cache_seqlens": xp.array([3, 4], "int32"), "block_table": xp.array([[0, 1], [2, 0]], "int32")}
    assert "decode fp16 b2 q1 k32 h4/2 d8 page16" in fc.explain(q, cache, cache, **given)
    packed = xp.array(np.zeros((10, 2, 8)), "float32")
    cuts = xp.array([0, 4, 10], "int32")
    assert re.search(
        r"fwd fp32 b2 .*varlen10", fc.explain(packed, packed, packed, cu_seqlens_q=cuts, cu_seqlens_k=cuts)
    )


def test_supports_and_explain_of_gradients(xp):
    x = xp.array(np.zeros((2, 4, 8, 16)), "float16")
    text = fc.explain(x, x[:, :2], x[:, :2], dout=x, causal=True, deterministic=True)
    assert "bwd fp16 b2 q8 k8 h4/2 d16 causal deterministic" in text
    answer = fc.supports(x, x[:, :2], x[:, :2], dout=x, causal=True, deterministic=True)
    assert answer.ok
    assert answer.kernel in text
    for wrong in ({"dout": x[:, :, 1:]}, {"dout": x, "out": x[:1]}, {"dout": x, "dq": x[:1]}, {"dout": x, "page": 1}):
        refusal = fc.supports(x, x, x, **wrong)
        assert not refusal.ok
        assert refusal.why


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_supports_the_gradients_of_every_valid_case(case, dtype, xp, rng):
    problem = make(case, dtype, rng)
    dout = xp.array(np.zeros((*problem.q.shape[:3], problem.v.shape[3])), dtype)
    answer = fc.supports(*problem.arrays(xp), dout=dout, **problem.keywords(xp))
    assert answer.ok, answer.why


def test_explain_of_a_line_is_explain_of_its_call(xp, device):
    x = xp.array(np.zeros((2, 4, 8, 16)), "float16")
    assert fc.explain("fwd fp16 b2 q8 k8 h4 d16 causal", device=device) == fc.explain(x, x, x, causal=True)


def test_explain_of_a_line_takes_a_kernel_by_name(xp, device):
    x = xp.array(np.zeros((2, 4, 8, 16)), "float16")
    named = f"{device}.reference"
    text = fc.explain("fwd fp16 b2 q8 k8 h4 d16", device=device, kernel=named)
    assert text == fc.explain(x, x, x, kernel=named)
    assert re.search(rf"kernel: +{named}", text)


@pytest.mark.parametrize("beside", [{"causal": True}, {"k": np.zeros((1, 1, 2, 8), np.float32)}], ids=["causal", "k"])
def test_a_line_has_all_options_in_its_words(beside):
    with pytest.raises(ValueError, match=f"stands alone.*{next(iter(beside))}"):
        fc.explain("fwd fp16 b2 q8 k8 h4 d16", device="cpu", **beside)


def test_arrays_say_where_they_are(xp, device):
    x = xp.array(np.zeros((1, 1, 2, 8)), "float32")
    with pytest.raises(ValueError, match="device"):
        fc.explain(x, x, x, device=device)


def test_explain_raises_what_the_call_would(xp):
    x = xp.array(np.zeros((1, 1, 2, 8)), "float32")
    with pytest.raises(ValueError, match=r"sideways"):
        fc.explain(x, x, x, causal="sideways")


def test_the_log_tells_which_kernel_ran():
    program = (
        "import numpy as np, flashcore as fc\n"
        "x = np.zeros((1, 2, 5, 8), np.float32)\n"
        "fc.attention(x, x, x, causal=True)"
    )
    for wish, expected in (("plan", 1), ("", 0)):
        environment = {**os.environ, "FLASHCORE_LOG": wish}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
        )
        lines = [line for line in done.stderr.splitlines() if "fwd fp32 b1 q5 k5 h2 d8 causal" in line]
        assert len(lines) == expected, done.stderr
        assert all("->" in line and "workspace" in line and "cpu." in line for line in lines)
