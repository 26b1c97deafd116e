"""The plainest calls of `attention` pass Python by, and nobody can tell but by the clock."""

import inspect
import pickle
import pydoc
import subprocess
import sys

import flashcore as fc
import numpy as np
import pytest
from frameworks import KINDS, importable

whole_attention = inspect.unwrap(fc.attention)

WORDS = [
    {},
    {"causal": True},
    {"causal": False, "scale": None, "layout": "bhsd"},
    {"scale": 0.3},
    {"layout": "bshd"},
    {"causal": True, "scale": 2.0, "layout": "bshd"},
    {"causal": "bottom_right"},
    {"causal": "top_left", "scale": 0.3},
    {"scale": 2},
    {"window": (1, 0)},
    {"return_lse": True},
    {"return_lse": True, "causal": True, "layout": "bshd"},
    {"return_lse": False},
]


def arrays(framework, rng, dtype="float32"):
    return [framework.array(rng.standard_normal((2, 3, 3, 16)), dtype) for _ in range(3)]


def enters_python(call) -> bool:
    """Whether a call runs Python code of flashcore."""
    files = set()
    sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return any(file.startswith(tuple(fc.__path__)) for file in files)


@pytest.mark.parametrize("words", WORDS, ids=str)
def test_results_are_those_of_the_whole_function(words, framework, rng):
    q, k, v = arrays(framework, rng)
    given = fc.attention(q, k, v, **words)
    exact = whole_attention(q, k, v, **words)
    for a, b in zip(*[(x if isinstance(x, tuple) else (x,)) for x in (given, exact)], strict=True):
        assert type(a) is type(b)
        np.testing.assert_array_equal(framework.numpy(a), framework.numpy(b))


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("words", WORDS[:8], ids=str)
def test_plain_calls_do_not_enter_python(words, name, rng):
    if not importable(name):
        pytest.skip(f"{name} is not installed")
    q, k, v = arrays(KINDS[name](), rng)
    out = fc.attention(q, k, v)  # the first call finds out what kind of arrays these are
    assert not enters_python(lambda: fc.attention(q, k, v, **words))
    assert not enters_python(lambda: fc.attention(q, k, v, out=out, **words))
    assert enters_python(lambda: fc.attention(q, k, v, window=(1, 0), **words))


def test_out_is_the_array_given(framework, rng):
    if framework.name == "jax":
        pytest.skip("its arrays cannot be written")
    q, k, v = arrays(framework, rng)
    out = framework.empty((2, 3, 3, 16))
    assert fc.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(framework.numpy(out), framework.numpy(fc.attention(q, k, v)))


def test_lse_is_the_array_given(framework, rng):
    if framework.name == "jax":
        pytest.skip("its arrays cannot be written")
    q, k, v = arrays(framework, rng)
    lse = framework.empty((2, 3, 3))
    out, same = fc.attention(q, k, v, lse=lse)
    assert same is lse
    for given, exact in zip((out, lse), whole_attention(q, k, v, return_lse=True), strict=True):
        np.testing.assert_array_equal(framework.numpy(given), framework.numpy(exact))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda q, k, v: ((q, k), {}),
        lambda q, k, v: ((q, None, v), {}),
        lambda q, k, v: ((q, k, None), {}),
        lambda q, k, v: ((q, k, "v"), {}),
        lambda q, k, v: ((1, k, v), {}),
        lambda q, k, v: ((q, k, v, v), {}),
        lambda q, k, v: ((q, k[:, :, :2], v), {}),
        lambda q, k, v: ((q, k[:, :, :2], v[:, :, :2]), {"causal": True}),
        lambda q, k, v: ((q, k, v), {"scale": float("nan")}),
        lambda q, k, v: ((q, k, v), {"layout": "thd"}),
        lambda q, k, v: ((q, k, v), {"out": q}),
        lambda q, k, v: ((q, k, v), {"out": "here"}),
        lambda q, k, v: ((q, k, v), {"sclae": 1.0}),
    ],
)
def test_errors_are_those_of_the_whole_function(spoil, framework, rng):
    positional, words = spoil(*arrays(framework, rng))
    with pytest.raises(Exception) as whole:
        whole_attention(*positional, **words)
    with pytest.raises(type(whole.value)) as short:
        fc.attention(*positional, **words)
    assert str(short.value) == str(whole.value)


def test_a_subclass_of_ndarray_gives_a_plain_array(rng):
    class Named(np.ndarray):
        pass

    q, k, v = (rng.standard_normal((1, 1, 3, 8), dtype=np.float32).view(Named) for _ in range(3))
    assert type(fc.attention(q, k, v)) is np.ndarray


def test_it_is_pickled_by_name():
    assert pickle.loads(pickle.dumps(fc.attention)) is fc.attention


def test_help_has_the_options():
    text = pydoc.plain(pydoc.render_doc(fc.attention))
    assert "softcap" in text.split("Args:")[0]
    assert "scores become" in text


@pytest.mark.parametrize("call", ["attention(q, q, q)", "attention(q, q, q, softcap=1.0)", "plan(q, q, q)(q, q, q)"])
def test_the_warning_about_gradients_names_the_callers_line(call):
    pytest.importorskip("torch")
    program = (
        "import warnings, torch, flashcore as fc\n"
        "q = torch.randn(1, 1, 3, 8, requires_grad=True)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        f"    fc.{call}\n"
        "assert [(w.filename, w.lineno) for w in seen] == [('<string>', 5)], [str(w) for w in seen]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_negated_tensors_are_refused_wherever_they_stand(rng):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(1, 1, 3, 16) for _ in range(3))
    lazy = torch._neg_view(v)
    lengths = torch.tensor([3], dtype=torch.int32)
    planned = fc.plan(q, k, v)
    for call in (
        lambda: fc.attention(q, k, v, out=lazy),
        lambda: fc.attention_decode(q, k, lazy, lengths),
        lambda: fc.attention_decode(q, lazy, v, lengths * 0, k_new=k, v_new=k),
        lambda: planned(q, k, lazy),
        lambda: fc.vector_add(q, lazy),
    ):
        with pytest.raises(TypeError, match="negation"):
            call()
