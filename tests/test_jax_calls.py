"""flashcore.jax on each of JAX's devices: every feature with gradients against the oracle, and what is refused."""

import subprocess
import sys

import flashcore as fc
import numpy as np
import pytest
import reference
from cases import ALL_FLOATS, BY_NAME, CASES, assert_near, in_layout, lse_dtype, make, rounded
from frameworks import DTYPES
from reference import Decode, Options, framework_arithmetic

jax = pytest.importorskip("jax")

import flashcore.jax as fcj  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from test_decode import LENGTHS, Cache, queries  # noqa: E402
from test_varlen import CUTS, pack  # noqa: E402


def platforms():
    gpu = jax.default_backend() == "gpu" and fc.device_count() > 0
    return ["cpu", "gpu"] if gpu else ["cpu"]


class Arrays:
    """Makes JAX arrays on one kind of device."""

    def __init__(self, platform):
        self.place = jax.local_devices(backend=platform)[0]

    def array(self, values, dtype="float32"):
        return jax.device_put(np.asarray(values, DTYPES[dtype]), self.place)


@pytest.fixture(params=platforms())
def xp(request):
    return Arrays(request.param)


@pytest.fixture
def x64():
    """64 bits switched on, as a program may have them; off is what all other tests have."""
    was = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", was)


def exact64(x):
    return np.asarray(x).astype(np.float64)


def check_with_gradients(problem, xp, rng, layout="bhsd", jit=jax.jit):
    """out, lse and all gradients, through both results."""
    arrays, words = problem.arrays(xp, layout), problem.keywords(xp)
    trained = {name: words.pop(name) for name in ("bias", "sinks") if name in words}
    call = jit(lambda q, k, v, more: fcj.attention(q, k, v, layout=layout, return_lse=True, **words, **more))
    (out, lse), pull = jax.vjp(call, *arrays, trained)
    assert out.devices() == {xp.place}
    dout = rounded(rng.standard_normal(in_layout(exact64(out), layout).shape), problem.dtype)
    dlse = rounded(rng.standard_normal(lse.shape), lse_dtype(problem.dtype))
    dlse[~np.isfinite(exact64(lse))] = 0
    above = xp.array(in_layout(dout, layout), problem.dtype), xp.array(dlse, lse_dtype(problem.dtype))
    *grads, more = jit(pull)(above)
    assert {x.dtype.name for x in (out, *grads)} == {problem.dtype}
    named = {f"d{n}": in_layout(exact64(g), layout) for n, g in zip("qkv", grads, strict=True)}
    named |= {f"d{n}": exact64(g) for n, g in more.items()}

    inputs = (problem.q, problem.k, problem.v, problem.options)
    steps = framework_arithmetic(problem.dtype)
    exact, stepwise = reference.attention(*inputs), reference.attention(*inputs, steps)
    terms = problem.q.shape[3] + problem.k.shape[2]
    assert_near(in_layout(exact64(out), layout), exact[0], stepwise[0], problem.dtype, terms, "out")
    assert_near(exact64(lse), exact[1], stepwise[1], lse_dtype(problem.dtype), terms, "lse")
    exact, stepwise, sizes = (
        reference.attention_backward(dout, *inputs, dlse, **how)
        for how in ({}, {"arithmetic": steps}, {"cancel": False})
    )
    terms += problem.q.shape[2] * problem.q.shape[1]
    for name, grad in named.items():
        magnitude = np.abs(sizes[name]).max(initial=0)
        assert_near(grad, exact[name], stepwise[name], problem.dtype, terms, name, magnitude)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition(case, xp, rng):
    check_with_gradients(make(case, "float32", rng), xp, rng)


def test_outside_of_jit(xp, rng):
    check_with_gradients(make(BY_NAME["everything"], "float32", rng), xp, rng, jit=lambda call: call)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["everything", "gqa"])
def test_halves(name, dtype, xp, rng):
    check_with_gradients(make(BY_NAME[name], dtype, rng), xp, rng)


@pytest.mark.parametrize("dtype", ALL_FLOATS)
def test_with_64_bits_switched_on(dtype, x64, xp, rng):
    check_with_gradients(make(BY_NAME["everything"], dtype, rng), xp, rng)


@pytest.mark.parametrize("name", ["gqa", "everything", "head_dim_v_larger"])
def test_layout_bshd(name, xp, rng):
    check_with_gradients(make(BY_NAME[name], "float32", rng), xp, rng, "bshd")


def test_lengths_shorter_than_the_tensors(xp, rng):
    q, k, v = (rng.standard_normal((3, 2, 7, 8)) for _ in range(3))
    used = np.array([7, 0, 4], np.int32)
    out = jax.jit(lambda *x: fcj.attention(*x[:3], seqused_k=x[3]))(*map(xp.array, (q, k, v)), xp.array(used, "int32"))
    np.testing.assert_allclose(out, reference.attention(q, k, v, Options(seqused_k=used))[0], atol=1e-5)


def test_float8(xp, rng):
    shape = (2, 2, 9, 16)
    q, k, v = (rounded(rng.standard_normal(shape), "float8_e4m3") for _ in range(3))
    descale = np.exp2(rng.integers(-2, 3, (2, 2)))
    arrays = [xp.array(x, "float8_e4m3") for x in (q, k, v)]
    call = jax.jit(lambda q, k, v, d: fcj.attention(q, k, v, q_descale=d, v_descale=d))
    out = call(*arrays, xp.array(descale))
    assert out.dtype == jnp.bfloat16
    exact, _ = reference.attention(q, k, v, Options(q_descale=descale, v_descale=descale))
    np.testing.assert_allclose(exact64(out), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)], ids=["no_batch", "no_rows"])
def test_zero_sizes(shape, xp):
    x = xp.array(np.zeros(shape))
    out, pull = jax.vjp(jax.jit(lambda x: fcj.attention(x, x, x)), x)
    assert out.shape == shape
    assert pull(out)[0].shape == shape


def test_no_keys_give_zero_and_zero_gradients(xp):
    q, k = xp.array(np.ones((1, 2, 3, 8))), xp.array(np.ones((1, 2, 0, 8)))
    (out, lse), pull = jax.vjp(lambda q: fcj.attention(q, k, k, return_lse=True), q)
    assert not np.asarray(out).any()
    assert np.isneginf(np.asarray(lse)).all()
    assert not np.asarray(pull((jnp.ones_like(out), jnp.ones_like(lse)))[0]).any()


# ---- packed sequences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_varlen_with_gradients(cuts, xp, rng):
    q, k, v = pack(rng, cuts, "float32")
    lengths = [xp.array(cut, "int32") for cut in cuts]
    call = jax.jit(lambda q, k, v: fcj.attention_varlen(q, k, v, *lengths, causal="bottom_right", return_lse=True))
    (out, lse), pull = jax.vjp(call, *map(xp.array, (q, k, v)))
    options = Options(causal="bottom_right")
    exact, exact_lse = reference.attention_varlen(q, k, v, *cuts, options)
    np.testing.assert_allclose(out, exact, atol=1e-5)
    np.testing.assert_allclose(lse, exact_lse, atol=1e-5)
    dout, dlse = rng.standard_normal(out.shape), np.where(np.isfinite(exact_lse), rng.standard_normal(lse.shape), 0)
    expected = reference.attention_varlen_backward(dout, q, k, v, *cuts, options, dlse)
    for grad, name in zip(pull((xp.array(dout), xp.array(dlse))), ("dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(grad, expected[name], atol=1e-4)


def test_varlen_causal_takes_one_array_of_offsets(xp, rng):
    """Whether two arrays of offsets are equal cannot be seen while tracing; whether they are one array can."""
    q, k, v = (xp.array(x) for x in pack(rng, ([0, 5, 9], [0, 5, 9]), "float32"))
    cu, same = xp.array([0, 5, 9], "int32"), xp.array([0, 5, 9], "int32")
    out = fcj.attention_varlen(q, k, v, cu, cu, causal=True)
    np.testing.assert_array_equal(out, fcj.attention_varlen(q, k, v, cu, same, causal="bottom_right"))
    with pytest.raises(ValueError, match=r"top_left.*bottom_right"):
        fcj.attention_varlen(q, k, v, cu, same, causal=True)


# ---- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [None, 8], ids=["contiguous", "paged"])
@pytest.mark.parametrize("donate", [False, True])
def test_decode_gives_the_caches_back(page, donate, xp, rng):
    cache = Cache(rng, capacity=72, page=page)
    q = queries(rng, cache, 2)
    new = [rng.standard_normal((len(LENGTHS), cache.heads[1], 2, dim)) for dim in cache.dim]
    angles = rng.standard_normal((80, 4))
    rotary = np.cos(angles), np.sin(angles)
    more = {} if page is None else {"block_table": xp.array(cache.table, "int32")}

    def step(q, k_cache, v_cache, lengths, k_new, v_new, cos, sin, more):
        return fcj.attention_decode(
            q,
            k_cache,
            v_cache,
            lengths,
            k_new=k_new,
            v_new=v_new,
            rotary_cos=cos,
            rotary_sin=sin,
            return_lse=True,
            **more,
        )

    given = [xp.array(x) for x in (q, cache.k, cache.v)]
    kept = [np.asarray(x).copy() for x in given]
    lengths = xp.array(cache.lengths, "int32")
    results = jax.jit(step, donate_argnums=(1, 2) if donate else ())(
        *given, lengths, *map(xp.array, (*new, *rotary)), more
    )
    decode = Decode(cache.lengths, cache.table, *new, *rotary)
    for mine, theirs in zip(results, reference.attention_decode(q, cache.k, cache.v, decode), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    if not donate:  # JAX's arrays are immutable
        for x, was in zip(given, kept, strict=True):
            np.testing.assert_array_equal(x, was)


def test_decode_without_new_keys_returns_out_alone(xp, rng):
    cache = Cache(rng)
    q = queries(rng, cache)
    out = fcj.attention_decode(*map(xp.array, (q, cache.k, cache.v)), xp.array(cache.lengths, "int32"))
    np.testing.assert_allclose(
        out, reference.attention_decode(q, cache.k, cache.v, Decode(cache.lengths))[0], atol=1e-5
    )


def test_decode_has_no_gradient(xp, rng):
    cache = Cache(rng)
    k, v, lengths = xp.array(cache.k), xp.array(cache.v), xp.array(cache.lengths, "int32")
    with pytest.raises(NotImplementedError, match=r"attention_decode has no gradient.*flashcore\.jax\.attention"):
        jax.grad(lambda q: fcj.attention_decode(q, k, v, lengths).sum())(xp.array(queries(rng, cache)))


# ---- what kind of call it is -----------------------------------------------------------------------------------------

SHAPE = (2, 3, 9, 16)


@pytest.fixture
def qkv(rng, xp):
    return [xp.array(rng.standard_normal(SHAPE)) for _ in range(3)]


def test_nothing_passes_through_python(qkv):
    """The program has one custom call forward and one backward, and no callback to the host."""
    call = jax.jit(jax.grad(lambda *x: fcj.attention(*x).sum(), argnums=(0, 1, 2)))
    program = call.lower(*qkv).as_text()
    assert "callback" not in program
    assert program.count("@flashcore_forward") == 1
    assert program.count("@flashcore_backward") == 1


def test_only_the_gradients_that_are_used_are_computed(qkv, xp):
    """A gradient of a bias costs a matrix of scores: a bias that is a constant has none."""
    if jax.__version_info__ < (0, 9, 2):
        pytest.skip("this JAX cannot tell one differentiation of a function from another")
    bias = xp.array(np.zeros((3, 9, 9)))
    constant = jax.jit(jax.grad(lambda q: fcj.attention(q, *qkv[1:], bias=bias).sum())).lower(qkv[0]).as_text()
    trained = jax.jit(jax.grad(lambda b: fcj.attention(*qkv, bias=b).sum())).lower(bias).as_text()
    assert 'results = "dq"' in constant
    assert 'results = "dbias"' in trained


def test_calls_outside_of_jit_are_compiled_once(qkv):
    fcj.attention(*qkv, scale=0.1234)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        import logging

        heard = []
        patch.setattr(logging.Logger, "handle", lambda self, record: heard.append(record.getMessage()))
        fcj.attention(*qkv, scale=0.1234)
        assert not [words for words in heard if "Compiling" in words]
        fcj.attention(*qkv, scale=0.4321)
        assert [words for words in heard if "Compiling" in words]


def test_remat_scan_and_lax_map(qkv):
    """What wraps a layer in practice."""
    q, k, v = qkv

    def layer(x, _):
        return jax.checkpoint(lambda x: x + fcj.attention(x, k, v, causal=True))(x), None

    loss = lambda q: (jax.lax.scan(layer, q, None, length=2)[0] ** 2).sum()  # noqa: E731
    plain = lambda q: (layer(layer(q, None)[0], None)[0] ** 2).sum()  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(q), jax.grad(plain)(q), rtol=1e-5, atol=1e-5)


def test_dropout_drops_what_flashcore_drops_elsewhere(qkv):
    out = jax.jit(lambda *x: fcj.attention(*x, dropout_p=0.5, seed=2**64 - 3))(*qkv)
    expected = fc.attention(*[np.asarray(x) for x in qkv], dropout_p=0.5, seed=2**64 - 3)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_kernel_can_be_forced(qkv):
    out = fcj.attention(*qkv, kernel="reference")
    np.testing.assert_allclose(out, fcj.attention(*qkv), atol=1e-5)
    with pytest.raises((ValueError, fc.Unsupported), match="no_such_kernel"):
        fcj.attention(*qkv, kernel="no_such_kernel")


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_refused_while_tracing(qkv):
    q, k, v = qkv
    abstract = jax.ShapeDtypeStruct((2, 4, 9, 16), jnp.float32)
    with pytest.raises(ValueError, match=r"q has 4 heads and k has 3"):
        jax.eval_shape(lambda q: fcj.attention(q, k, v), abstract)
    with pytest.raises(ValueError, match=r"q must have shape"):
        fcj.attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"top_left.*bottom_right"):
        jax.jit(lambda q: fcj.attention(q, k, v, causal=True))(q[:, :, :4])


def test_wrong_dtypes_are_refused_while_tracing(qkv):
    q, k, v = qkv
    with pytest.raises(TypeError, match=r"k \(like q\) must be float32, got float16"):
        jax.jit(fcj.attention)(q, k.astype(jnp.float16), v)
    for dtype in (jnp.int8, jnp.complex64, jnp.uint32):
        with pytest.raises(TypeError, match=r"q.*float16"):
            jax.jit(fcj.attention)(q.astype(dtype), k, v)


@pytest.mark.parametrize("word", ["scale", "softcap", "dropout_p", "seed", "causal"])
def test_traced_words_are_refused(word, qkv):
    with pytest.raises(TypeError, match=rf"{word}: a traced value given.*Python value"):
        jax.jit(lambda x: fcj.attention(*qkv, **{word: x}))(1)
    with pytest.raises(TypeError, match=r"window: a traced value given"):
        jax.jit(lambda x: fcj.attention(*qkv, window=(x, 0)))(1)


@pytest.mark.parametrize("give", [lambda x: [1.0], lambda x: "q", lambda x: object()], ids=["list", "str", "object"])
def test_what_is_no_array_is_refused(give, qkv):
    with pytest.raises(TypeError, match=r"k: .*given; flashcore.jax takes JAX and NumPy arrays"):
        fcj.attention(qkv[0], give(qkv[1]), qkv[2])


def test_arrays_of_another_framework_are_refused(qkv):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"v: torch\.Tensor given; flashcore.jax takes JAX"):
        fcj.attention(*qkv[:2], torch.zeros(SHAPE))


def test_forward_mode_is_an_error(qkv):
    with pytest.raises(TypeError, match=r"forward-mode"):
        jax.jvp(lambda q: fcj.attention(q, *qkv[1:]), (qkv[0],), (qkv[0],))


def test_a_second_derivative_is_an_error(qkv):
    once = jax.grad(lambda q: (fcj.attention(q, *qkv[1:]) ** 2).sum())
    with pytest.raises(NotImplementedError, match=r"differentiated once"):
        jax.grad(lambda q: once(q).sum())(qkv[0])


def test_lengths_out_of_range_are_an_error_of_the_running_program(rng):
    """On the CPU, where the library looks into lengths; its words arrive."""
    x = Arrays("cpu")
    q, k, v = (x.array(rng.standard_normal(SHAPE)) for _ in range(3))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*seqused_k.*10"):
        fcj.attention(q, k, v, seqused_k=x.array([9, 10], "int32")).block_until_ready()
    assert np.isfinite(np.asarray(fcj.attention(q, k, v))).all()  # and the next call runs


def test_an_old_jax_is_refused_with_what_is_needed():
    program = (
        "import jax; jax.__version_info__ = (0, 4, 30); jax.__version__ = '0.4.30'\n"
        "try: import flashcore.jax\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "needs jax>=" in done.stdout, done.stderr
    assert "0.4.30 is installed" in done.stdout
