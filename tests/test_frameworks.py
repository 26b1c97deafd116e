"""Arrays of every framework go in, and arrays of the same framework, dtype and device come out."""

import gc
import weakref

import flashcore as fc
import numpy as np
import pytest
import reference
from frameworks import KINDS, importable, sees_cuda
from reference import Options

SHAPE = (2, 2, 9, 16)


def qkv(framework, rng, dtype="float32"):
    return [framework.array(rng.standard_normal(SHAPE), dtype) for _ in range(3)]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_same_framework_and_dtype_come_back(dtype, framework, rng):
    if dtype not in framework.dtypes:
        pytest.skip(f"{framework} has no {dtype}")
    q, k, v = qkv(framework, rng, dtype)
    out, lse = fc.attention(q, k, v, return_lse=True)
    assert framework.owns(out)
    assert framework.owns(lse)
    assert framework.dtype(out) == dtype
    exact, exact_lse = reference.attention(*map(framework.numpy, (q, k, v)))
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(dtype, 1e-5)
    np.testing.assert_allclose(framework.numpy(out), exact, atol=tolerance)
    np.testing.assert_allclose(framework.numpy(lse), exact_lse, atol=1e-5)


def test_every_call_answers_in_its_framework(framework, rng):
    q, k, v = qkv(framework, rng)
    lengths = framework.array([9, 4], "int32")
    cuts = framework.array([0, 4, 9], "int32")
    out, lse = fc.attention(q, k, v, return_lse=True)
    if framework.name != "jax":  # its arrays cannot be written, and a cache may be
        results = [fc.attention_decode(q[:, :, :1], k, v, lengths)]
    else:
        results = []
    results += fc.attention_varlen(
        q[0].swapaxes(0, 1), k[0].swapaxes(0, 1), v[0].swapaxes(0, 1), cuts, cuts, return_lse=True
    )
    results += fc.attention_backward(out, q, k, v, out, lse)
    results += fc.merge_states(out, lse, out, lse)
    results += [fc.vector_add(q, k), fc.reduce(q), fc.reduce(q, "max", axis=1)]
    assert all(framework.owns(x) for x in results)


def test_inputs_are_not_changed(framework, rng):
    tensors = qkv(framework, rng)
    before = [framework.numpy(x).copy() for x in tensors]
    fc.attention(*tensors, causal=True)
    for x, was in zip(tensors, before, strict=True):
        np.testing.assert_array_equal(framework.numpy(x), was)


def test_results_live_on_their_own(framework, rng):
    """A result does not keep its inputs alive, nor does it die with them."""
    q, k, v = qkv(framework, rng)
    exact, _ = reference.attention(*map(framework.numpy, (q, k, v)))
    out = fc.attention(q, k, v)
    del q, k, v
    gc.collect()
    for _ in range(3):
        fc.attention(*qkv(framework, rng))
    np.testing.assert_allclose(framework.numpy(out), exact, atol=1e-5)


def test_out_must_be_of_the_same_framework(rng, torch):
    q, k, v = qkv(KINDS["numpy"](), rng)
    out = torch.full(SHAPE, -7.0)
    with pytest.raises((TypeError, ValueError), match=r"torch"):
        fc.attention(q, k, v, out=out)
    assert (out == -7).all()


@pytest.mark.parametrize("other", ["torch", "jax"])
def test_mixed_frameworks_are_refused(other, rng):
    """The message names the argument and both frameworks."""
    if not importable(other):
        pytest.skip(f"{other} is not installed")
    q, k, v = qkv(KINDS["numpy"](), rng)
    strange = KINDS[other]().array(k, "float32")
    with pytest.raises((TypeError, ValueError), match=rf"(?s)k\b.*({other}|numpy)"):
        fc.attention(q, strange, v)


def test_mixed_devices_are_refused(rng, torch):
    if not (fc.device_count() and sees_cuda("torch")):
        pytest.skip("needs a GPU that torch sees")
    q, k, v = qkv(KINDS["torch"](), rng)
    with pytest.raises(ValueError, match=r"k.*cuda.*cpu|k.*cpu.*cuda"):
        fc.attention(q, k.cuda(), v)


@pytest.mark.parametrize("given", [[[1.0]], 3.5, None, "q", object()], ids=["list", "float", "none", "str", "object"])
def test_what_is_no_array_is_refused(given):
    with pytest.raises(TypeError):
        fc.attention(given, given, given)


# ---- NumPy -----------------------------------------------------------------------------------------------------------


def test_numpy_in_the_other_byte_order_is_refused():
    x = np.zeros(SHAPE, np.dtype(np.float32).newbyteorder())
    with pytest.raises(TypeError, match=r"byte order"):
        fc.attention(x, x, x)


@pytest.mark.parametrize("dtype", ["int32", "int8", "complex64", "bool", "longdouble", "object", "U3"])
def test_numpy_dtypes_that_are_no_floats_are_refused(dtype):
    x = np.zeros(SHAPE, dtype)
    with pytest.raises(TypeError, match=r"float16"):
        fc.attention(x, x, x)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3", "float6_e2m3fn", "int4"])
def test_ml_dtypes_that_flashcore_does_not_know_are_refused(dtype):
    """The message names those that it knows: float8_e4m3fn differs from some of these in two letters."""
    import ml_dtypes

    if not hasattr(ml_dtypes, dtype):
        pytest.skip(f"this ml_dtypes has no {dtype}")
    x = np.ones(SHAPE).astype(getattr(ml_dtypes, dtype))
    with pytest.raises(TypeError, match=rf"q: dtype {dtype} given; allowed dtypes: .*bfloat16.*float8_e4m3fn"):
        fc.attention(x, x, x)


def test_numpy_masked_arrays_are_refused(rng):
    x = np.ma.masked_array(rng.standard_normal(SHAPE).astype(np.float32), mask=True)
    with pytest.raises(TypeError, match=r"mask"):
        fc.attention(x, x, x)


def test_numpy_memmap_is_an_array(rng, tmp_path):
    q, k, v = qkv(KINDS["numpy"](), rng)
    mapped = np.memmap(tmp_path / "q", np.float32, "w+", shape=SHAPE)
    mapped[:] = q
    np.testing.assert_array_equal(fc.attention(mapped, k, v), fc.attention(q, k, v))


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_torch_parameter_and_subclass(rng, torch):
    class Named(torch.Tensor):
        pass

    q, k, v = qkv(KINDS["torch"](), rng)
    expected = fc.attention(q, k, v)
    with torch.no_grad():
        out = fc.attention(torch.nn.Parameter(q), k.as_subclass(Named), v)
    assert torch.equal(out, expected)
    assert not out.requires_grad


def test_torch_requires_grad_is_taken_detached_with_one_warning(torch):
    """The raw call has no gradient: it says so once, and says where the differentiable call is."""
    import subprocess
    import sys

    program = (
        "import warnings, torch, flashcore as fc\n"
        "q = torch.randn(1, 1, 3, 8, requires_grad=True)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    with torch.no_grad(): fc.attention(q, q, q)\n"
        "    assert not seen, 'no warning without grad mode'\n"
        "    for _ in range(3): out = fc.attention(q, q, q)\n"
        "assert not out.requires_grad\n"
        "assert [w.category for w in seen] == [UserWarning], seen\n"
        "assert 'flashcore.torch' in str(seen[0].message)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_neg_view_never_has_the_wrong_sign(rng, torch):
    """A lazily negated tensor stores the opposite of what it shows."""
    q, k, v = qkv(KINDS["torch"](), rng)
    lazy = torch._neg_view(v)
    try:
        out = fc.attention(q, k, lazy)
    except (TypeError, ValueError) as refused:
        assert "neg" in str(refused)
    else:
        torch.testing.assert_close(out, -fc.attention(q, k, v))


@pytest.mark.parametrize("kind", ["meta", "sparse", "complex"])
def test_torch_tensors_without_plain_memory_are_refused(kind, torch):
    make = {
        "meta": lambda: torch.empty(SHAPE, device="meta"),
        "sparse": lambda: torch.zeros(SHAPE).to_sparse(),
        "complex": lambda: torch.zeros(SHAPE, dtype=torch.complex64),
    }
    x = make[kind]()
    with pytest.raises((TypeError, ValueError)):
        fc.attention(x, x, x)


def test_torch_fake_tensor_is_refused(torch):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(SHAPE)
    with pytest.raises((TypeError, ValueError)):
        fc.attention(x, x, x)


def test_torch_float8(torch):
    x = torch.randn(SHAPE).to(torch.float8_e4m3fn)
    if not fc.supports(x, x, x).ok:
        pytest.skip("no kernel for float8 on this device")
    out = fc.attention(x, x, x)
    assert out.dtype == torch.bfloat16
    exact, _ = reference.attention(*[x.double().numpy()] * 3)
    np.testing.assert_allclose(out.double().numpy(), exact, rtol=1e-2, atol=1e-2)


def test_torch_channels_last_and_permuted(rng, torch):
    q, k, v = (x.permute(0, 2, 1, 3) for x in qkv(KINDS["torch"](), rng))
    torch.testing.assert_close(fc.attention(q, k, v), fc.attention(q.contiguous(), k.contiguous(), v.contiguous()))


def _torch_cuda(torch):
    if not (fc.device_count() and sees_cuda("torch")):
        pytest.skip("needs a GPU that torch sees")


def test_torch_side_stream_is_followed(rng, torch):
    """Inputs that a slow side stream fills are read after it has filled them."""
    _torch_cuda(torch)
    side = torch.cuda.Stream()
    q, k, v = qkv(KINDS["torch"]("cuda"), rng)
    expected = fc.attention(q, k, v)
    late = torch.zeros_like(v)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(v)
        out = fc.attention(q, k, late)
    side.synchronize()
    assert torch.equal(out, expected)


def test_stream_argument_is_followed(rng, torch):
    _torch_cuda(torch)
    side = torch.cuda.Stream()
    q, k, v = qkv(KINDS["torch"]("cuda"), rng)
    expected, late, out = fc.attention(q, k, v), torch.zeros_like(v), torch.empty_like(q)
    for stream in (side, side.cuda_stream):
        late.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late.copy_(v)
        fc.attention(q, k, late, out=out, stream=stream)
        side.synchronize()
        assert torch.equal(out, expected)


def test_torch_cuda_graph(rng, torch):
    """A captured call runs again on new values."""
    _torch_cuda(torch)
    xp = KINDS["torch"]("cuda")
    q, k, v = qkv(xp, rng)
    out = torch.empty_like(q)
    fc.attention(q, k, v, out=out, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fc.attention(q, k, v, out=out, causal=True)
    for x, new in zip((q, k, v), qkv(xp, rng), strict=True):
        x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    exact, _ = reference.attention(*map(xp.numpy, (q, k, v)), Options(causal=True))
    np.testing.assert_allclose(xp.numpy(out), exact, atol=1e-5)


def test_flashcore_arrays_are_read_without_waiting_on_their_own_stream(torch):
    """A stream that is captured must not be waited for."""
    _torch_cuda(torch)
    stream = torch.cuda.Stream()
    x, out = (fc._core.empty(shape, "float32", True, 0, stream.cuda_stream) for shape in ([64], []))
    stream.synchronize()
    torch.from_dlpack(x).fill_(1)
    fc.reduce(x, out=out, stream=stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        fc.reduce(x, out=out, stream=stream)
    torch.from_dlpack(x).fill_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.from_dlpack(out).item() == 128


# ---- CuPy and JAX ----------------------------------------------------------------------------------------------------


def test_cupy_stream_is_followed(rng):
    cupy = pytest.importorskip("cupy")
    if not fc.device_count():
        pytest.skip("needs a GPU")
    q, k, v = qkv(KINDS["cupy"](), rng)
    expected = fc.attention(q, k, v)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as side:
        late = cupy.zeros_like(v)
        for _ in range(50):
            late += v / 50
        cupy.copyto(late, v)
        out = fc.attention(q, k, late)
        side.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(out), cupy.asnumpy(expected))


def _cupy(at_least=1, gpus=1):
    """CuPy, where it is there and sees enough GPUs."""
    cupy = pytest.importorskip("cupy")
    if fc.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    if int(cupy.__version__.split(".")[0]) < at_least:
        pytest.skip(f"needs CuPy {at_least}")
    return cupy


def test_cupy_arrays_of_another_gpu_run_there_on_its_own_stream(rng):
    """The current stream is a matter of each device: that of the arrays counts, not that of the current device."""
    cupy = _cupy(gpus=2)
    with cupy.cuda.Device(1):
        q, k, v = qkv(KINDS["cupy"](), rng)
        expected = fc.attention(q, k, v)
        late = cupy.zeros_like(v)
        side = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        side.use()
        for _ in range(50):
            late += v / 50
        cupy.copyto(late, v)
    out = fc.attention(q, k, late)
    assert out.device.id == 1
    side.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(out), cupy.asnumpy(expected))
    with cupy.cuda.Device(1):
        cupy.cuda.Stream.null.use()


def test_cupy_stream_argument_and_out(rng):
    cupy = _cupy()
    q, k, v = qkv(KINDS["cupy"](), rng)
    out, side = cupy.empty_like(q), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    assert fc.attention(q, k, v, out=out, stream=side) is out
    side.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(out), cupy.asnumpy(fc.attention(q, k, v)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3"])
def test_cupy_arrays_of_ml_dtypes(dtype, rng):
    cupy = _cupy(at_least=14)
    try:
        q, k, v = (cupy.asarray(x) for x in qkv(KINDS["numpy"](), rng, dtype))
    except ValueError as error:
        pytest.skip(f"CuPy {cupy.__version__}: {error}")
    out = fc.attention(q, k, v)
    assert isinstance(out, cupy.ndarray)
    assert out.dtype.name == "bfloat16"
    exact, _ = reference.attention(*(cupy.asnumpy(x).astype(np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(cupy.asnumpy(out).astype(np.float64), exact, rtol=2e-2, atol=2e-2)


def test_numpy_beside_cupy_is_refused(rng):
    cupy = _cupy()
    q, k, v = qkv(KINDS["numpy"](), rng)
    with pytest.raises(TypeError, match=r"k is a cupy\.ndarray, but .* numpy\.ndarray"):
        fc.attention(q, cupy.asarray(k), v)


def test_producers_on_a_gpu_are_waited_for(rng):
    """The consumer's stream is told to `__dlpack__`, which orders the producer's work before it."""
    cupy = _cupy()
    q, k, v = qkv(KINDS["cupy"](), rng)
    expected = fc.attention(q, k, v)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        late = cupy.zeros_like(v)
        for _ in range(50):
            late += v / 50
        cupy.copyto(late, v)
        out = fc.attention(Producer(q), Producer(k), Producer(late))
        assert out.__dlpack_device__() == (2, 0)
        np.testing.assert_array_equal(cupy.asnumpy(cupy.from_dlpack(out)), cupy.asnumpy(expected))


@pytest.mark.parametrize("word", ["causal", "window", "scale", "softcap", "dropout_p", "seed"])
def test_words_that_jax_traces_are_refused(word, rng):
    jax = pytest.importorskip("jax")
    q, k, v = qkv(KINDS["numpy"](), rng)
    with pytest.raises(TypeError, match=rf"{word}: a traced value given.*plain Python value"):
        jax.jit(lambda x: fc.attention(q, k, v, **{word: (x, 0) if word == "window" else x}))(1)


def test_jax_arrays_cannot_be_out(rng):
    pytest.importorskip("jax")
    q, k, v = qkv(KINDS["jax"](), rng)
    with pytest.raises((TypeError, ValueError), match=r"out"):
        fc.attention(q, k, v, out=q + 0)


def test_jax_tracers_are_pointed_to_flashcore_jax(rng):
    jax = pytest.importorskip("jax")
    q, k, v = qkv(KINDS["jax"](), rng)
    with pytest.raises(TypeError, match=r"flashcore\.jax"):
        jax.jit(lambda *x: fc.attention(*x))(q, k, v)


# ---- any other producer ----------------------------------------------------------------------------------------------


class Producer:
    """An array of no known framework: it only speaks DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OldProducer(Producer):
    """DLPack before version 1: `stream` is its only keyword."""

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


@pytest.mark.parametrize("kind", [Producer, OldProducer])
def test_unknown_producers_get_an_object_with_dlpack(kind, rng):
    q, k, v = qkv(KINDS["numpy"](), rng)
    out, lse = fc.attention(*map(kind, (q, k, v)), return_lse=True)
    assert out.__dlpack_device__() == (1, 0)
    expected, expected_lse = fc.attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(np.from_dlpack(out), expected)
    np.testing.assert_array_equal(np.from_dlpack(lse), expected_lse)


def test_every_call_takes_unknown_producers(rng):
    """The same numbers as for NumPy, each result with `__dlpack__`."""
    q, k, v = qkv(KINDS["numpy"](), rng)
    out, lse = fc.attention(q, k, v, return_lse=True)
    cuts, held = np.array([0, 4, 9], np.int32), np.array([5, 8], np.int32)
    packed = [np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v)]
    calls = {
        "varlen": lambda give: fc.attention_varlen(*map(give, (*packed, cuts, cuts)), causal=True),
        "decode": lambda give: fc.attention_decode(*map(give, (q[:, :, :1].copy(), k, v, held))),
        "backward": lambda give: fc.attention_backward(*map(give, (out, q, k, v, out, lse))),
        "merge": lambda give: fc.merge_states(*map(give, (out, lse, out, lse))),
        "plan": lambda give: fc.plan(*map(give, (q, k, v)))(*map(give, (q, k, v))),
        "vector_add": lambda give: fc.vector_add(give(q), give(k)),
        "reduce": lambda give: fc.reduce(give(q), "max", axis=1),
    }
    for name, call in calls.items():
        mine, expected = call(Producer), call(lambda x: x)
        pairs = zip(mine, expected, strict=True) if isinstance(expected, tuple) else [(mine, expected)]
        for a, b in pairs:
            np.testing.assert_array_equal(np.from_dlpack(a), b, err_msg=name)


def test_a_packed_producer_cannot_be_cut(rng):
    with pytest.raises(TypeError, match=r"one packed .*Producer given, which cannot be cut into q, k and v"):
        fc.attention(Producer(np.zeros((2, 3, 2, 9, 16), np.float32)))


def test_what_flashcore_gives_it_also_takes(rng):
    q, k, v = qkv(KINDS["numpy"](), rng)
    first = fc.attention(*map(Producer, (q, k, v)))
    second = fc.attention(first, first, first)
    expected = fc.attention(*[fc.attention(q, k, v)] * 3)
    np.testing.assert_array_equal(np.from_dlpack(second), expected)


def test_memory_outlives_the_object_that_exported_it(rng):
    q, k, v = qkv(KINDS["numpy"](), rng)
    out = fc.attention(*map(Producer, (q, k, v)))
    values = np.from_dlpack(out)
    copy = values.copy()
    del out
    gc.collect()
    for _ in range(5):
        fc.attention(*map(Producer, qkv(KINDS["numpy"](), rng)))
    np.testing.assert_array_equal(values, copy)


def test_a_producer_that_fails_raises_its_own_words():
    class Broken(Producer):
        def __dlpack__(self, **keywords):
            raise BufferError("the disk is full")

    x = Broken(np.zeros(SHAPE, np.float32))
    with pytest.raises((TypeError, ValueError, BufferError), match=r"the disk is full"):
        fc.attention(x, x, x)


def test_calls_hold_no_references(rng):
    class Watched(np.ndarray):
        pass

    arrays = [np.asarray(x).view(Watched) for x in qkv(KINDS["numpy"](), rng)]
    alive = [weakref.ref(x) for x in arrays]
    fc.attention(*arrays)
    del arrays
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize("words", [{}, {"return_lse": True}], ids=str)
def test_integers_are_refused_whatever_their_strides(words, framework):
    x = framework.array(np.zeros((2, 3, 4, 8)), "int32")
    for q in (x, x.swapaxes(1, 2)):
        with pytest.raises(TypeError, match="q.*float16.*int32"):
            fc.attention(q, q, q, **words)
