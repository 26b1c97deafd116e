"""The problem line: one canonical form for every way to write it, and errors that name the word."""

import random
import re

import flashcore as fc
import pytest
from hypothesis import given
from hypothesis import strategies as st


def canonical(line: str) -> str:
    """The line as flashcore writes it."""
    first = fc.explain(line, device="cpu").splitlines()[0]
    return first.removeprefix("problem:").strip()


@st.composite
def lines(draw):
    """Words of a valid problem line, in the documented order."""
    phase = draw(st.sampled_from(["fwd", "bwd", "decode"]))
    words = [phase, draw(st.sampled_from(["fp16", "bf16", "fp32", "fp64"]))]
    seqlen_q, seqlen_k = draw(st.integers(0, 5000)), draw(st.integers(0, 5000))
    heads_k, group = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    dim, dim_v = draw(st.integers(1, 256)), draw(st.integers(1, 256))
    words += [f"b{draw(st.integers(0, 64))}", f"q{seqlen_q}", f"k{seqlen_k}"]
    words += [f"h{heads_k * group}/{heads_k}", draw(st.sampled_from([f"d{dim}", f"d{dim}/{dim_v}"]))]
    options = {
        "causal": phase == "decode" or seqlen_q == seqlen_k,
        "causal_tl": phase != "decode",
        "causal_br": True,
    }
    words += draw(st.lists(st.sampled_from([word for word, valid in options.items() if valid]), max_size=1))
    side = st.one_of(st.just("*"), st.integers(0, 300).map(str))
    words += draw(st.lists(st.builds("window{},{}".format, side, side), max_size=1))
    words += draw(st.lists(st.floats(0.01, 100).map("softcap{!r}".format), max_size=1))
    words += draw(st.lists(st.floats(0, 0.99).map("dropout{!r}".format), max_size=1))
    words += draw(st.lists(st.integers(0, 2**64 - 1).map("seed{}".format), max_size=1))
    words += draw(st.lists(st.floats(1e-6, 1e6).map("scale{!r}".format), max_size=1))
    flags = ["mask", "bias", "alibi", "sinks", "unaligned"] + ["deterministic" if phase == "bwd" else "lse"]
    words += draw(st.lists(st.sampled_from(flags), unique=True))
    if phase == "decode":
        pages = [[], ["page1"]] + [[f"page{size}"] for size in (16, 256) if seqlen_k % size == 0]
        words += draw(st.sampled_from(pages))
        words += ["append3"] * draw(st.booleans()) * (seqlen_k >= 3) + ["rotary8i"] * draw(st.booleans()) * (dim >= 8)
    return words


@given(lines())
def test_canonical_form_is_a_fixed_point(words):
    once = canonical(" ".join(words))
    assert canonical(once) == once


@given(lines(), st.randoms(use_true_random=False))
def test_words_may_stand_in_any_order(words, shuffle: random.Random):
    mixed = words.copy()
    shuffle.shuffle(mixed)
    assert canonical("  ".join(mixed) + " ") == canonical(" ".join(words))


@given(lines(), st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8))
def test_a_word_that_cannot_be_read_is_named(words, odd):
    strange = "?" + odd
    with pytest.raises(ValueError) as caught:
        fc.explain(" ".join([*words, strange]), device="cpu")
    assert strange in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        answer = fc.explain(text, device="cpu")
    except ValueError as refusal:
        assert "problem line" in str(refusal)
    else:
        assert answer.startswith("problem:")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fwd bf16 b2 q4096 k4096 h32/8 d128 causal", "fwd bf16 b2 q4096 k4096 h32/8 d128 causal"),
        ("decode bf16 b64 q1 k8192 h64/8 d128 page16", "decode bf16 b64 q1 k8192 h64/8 d128 page16"),
        ("causal d64 h8/8 k5 q5 b1 fp16 fwd", "fwd fp16 b1 q5 k5 h8 d64 causal"),
        ("fwd fp16 b1 q5 k5 h8 d64/64", "fwd fp16 b1 q5 k5 h8 d64"),
        ("fwd fp16 b1 q5 k5 h8 d64 causal_tl", "fwd fp16 b1 q5 k5 h8 d64 causal"),
        ("fwd fp16 b1 q5 k5 h8 d64 window*,*", "fwd fp16 b1 q5 k5 h8 d64"),
        ("fwd fp16 b1 q5 k5 h8 d64 softcap0 dropout0 scale0.125", "fwd fp16 b1 q5 k5 h8 d64"),
    ],
)
def test_what_is_equal_is_written_equally(line, expected):
    assert canonical(line) == expected


@given(lines(), st.data())
def test_a_word_that_is_given_twice_is_named_twice(words, data):
    word = data.draw(st.sampled_from(words))
    with pytest.raises(ValueError, match=re.escape(f'"{word}" and "{word}"')):
        canonical(" ".join([*words, word]))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", r"phase"),
        ("fp16 b1 q1 k1 h1 d1", r"phase.*fwd.*bwd.*decode"),
        ("fwd b1 q1 k1 h1 d1", r"dtype.*fp16"),
        ("fwd fp16 q1 h1 d1", r"missing: b \(batch\), k \(seqlen_k\)\n"),
        ("fwd fp16 b1 q1 k1 h3/2 d1", r"3/2.*multiple"),
        ("fwd fp16 b1 q1 k1 h1 d257", r"257.*1 to 256"),
        ("fwd fp16 b1 q1 k1 h1 d0", r"0.*1 to 256"),
        ("fwd fp16 b-1 q1 k1 h1 d1", r"b-1"),
        ("fwd fp16 b1 q1 k1 h1 d1 window3", r"window3"),
        ("fwd fp16 b1 q1 k1 h1 d1 dropout1", r"dropout.*\[0, 1\)"),
        ("fwd fp16 b1 q1 k1 h1 d1 softcap-1", r"softcap"),
        ("fwd fp16 b1 q1 k2 h1 d1 causal", r"causal_tl.*causal_br"),
        ("fwd fp16 b99999999999999999999 q1 k1 h1 d1", r"b99999999999999999999"),
        ("fwd fp16 b1 q1 k1 h1 d1 page1", r'"page1" does not fit: only decode'),
        ("fwd fp16 b1 q1 k1 h1 d1 bias dbias", r'"dbias" does not fit: only bwd'),
        ("bwd fp16 b1 q1 k1 h1 d1 dbias", r'"dbias" does not fit: .*no bias'),
        ("decode fp16 b1 q1 k100 h1 d64 append500", r'"append500" does not fit: .*100'),
        ("decode fp16 b1 q1 k100 h1 d64 rotary65", r'"rotary65" does not fit: .*even'),
    ],
)
def test_refused_lines_say_what_is_wrong(line, says):
    with pytest.raises(ValueError, match=f"(?s){says}"):
        fc.explain(line, device="cpu")
