"""Several GPUs: a call runs where its arrays are, on that device's stream, whichever device is the current one."""

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import flashcore as fc
import numpy as np
import pytest
import reference
from cases import BY_NAME, assert_near, cut, make, rounded
from frameworks import Cupy, Torch, sees_cuda
from test_attention import check as check_forward
from test_backward import check as check_gradients
from test_backward import run as run_backward
from test_decode import Cache, new_keys, queries
from test_decode import call as call_decode
from test_decode import check as check_decode
from test_varlen import CUTS, pack
from test_varlen import call as call_varlen
from test_varlen import check as check_varlen

pytestmark = pytest.mark.skipif(fc.device_count() < 2, reason=f"needs two CUDA devices, there are {fc.device_count()}")

FIRST, SECOND = 0, 1  # the current device, and the one that calls are made on


class TorchOn(Torch):
    """Tensors on one GPU; those that are read have to be there."""

    def __init__(self, index):
        super().__init__(f"cuda:{index}")

    def owns(self, x):
        return isinstance(x, self.torch.Tensor) and x.device == self.torch.device(self.device)

    def numpy(self, x):
        assert self.owns(x), x.device
        return super().numpy(x)

    def make_current(self, index):
        self.torch.cuda.set_device(index)
        self.torch.zeros(1, device=f"cuda:{index}")


class CupyOn(Cupy):
    """The same of CuPy, which makes its arrays on the current device."""

    def __init__(self, index):
        super().__init__(f"cuda:{index}")
        self.there = self.cupy.cuda.Device(index)

    def array(self, values, dtype="float32"):
        with self.there:
            return super().array(values, dtype)

    def owns(self, x):
        return super().owns(x) and x.device == self.there

    def numpy(self, x):
        assert self.owns(x), x.device
        with self.there:
            return super().numpy(x)

    def make_current(self, index):
        self.cupy.cuda.Device(index).use()
        self.cupy.zeros(1)


ON = {"torch": TorchOn, "cupy": CupyOn}


def current_device() -> int:
    """As the driver knows it: frameworks keep numbers of their own."""
    index = ctypes.c_int(-1)
    assert ctypes.CDLL("libcuda.so.1").cuCtxGetDevice(ctypes.byref(index)) == 0
    return index.value


@pytest.fixture(params=ON)
def on(request):
    """A framework on the GPU of a number. The first one is the current device, and has to remain it."""
    if not sees_cuda(request.param):
        pytest.skip(f"needs {request.param} with GPUs")
    ON[request.param](FIRST).make_current(FIRST)
    yield ON[request.param]
    assert current_device() == FIRST


@pytest.fixture
def xp(on):
    return on(SECOND)


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    if not sees_cuda("torch"):
        pytest.skip("needs torch with GPUs")
    TorchOn(FIRST).make_current(FIRST)
    yield torch
    assert current_device() == FIRST


FAST = cut(BY_NAME["plain"], seqlen=(100, 100), dim=(64, 64))
WITH_WORKSPACE = cut(BY_NAME["causal"], batch=1, heads=(1, 1), seqlen=(2048, 2048), dim=(128, 128))


def attend(problem, xp, **more):
    return fc.attention(*problem.arrays(xp), return_lse=True, **problem.keywords(xp), **more)


def gradient_of_out(problem, rng):
    return rounded(rng.standard_normal((*problem.q.shape[:3], problem.v.shape[3])), problem.dtype)


# ---- each call on the second GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", [FAST, WITH_WORKSPACE, BY_NAME["everything"]], ids=["fast", "workspace", "everything"])
def test_attention(case, dtype, xp, rng):
    problem = make(case, dtype, rng)
    check_forward(problem, *attend(problem, xp), xp, "bhsd")


def test_a_plan(xp, rng):
    problem = make(WITH_WORKSPACE, "float16", rng)
    arrays = problem.arrays(xp)
    planned = fc.plan(*arrays, causal=True, return_lse=True)
    check_forward(problem, *planned(*arrays), xp, "bhsd")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_attention_backward(dtype, xp, rng):
    problem = make(BY_NAME["everything"], dtype, rng)
    dout = gradient_of_out(problem, rng)
    check_gradients(problem, run_backward(problem, xp, dout), dout)


def test_attention_decode_with_append(xp, rng):
    cache = Cache(rng, "float16", capacity=80, page=16)
    q, new = queries(rng, cache, 2), new_keys(rng, cache, 2)
    check_decode(call_decode(xp, cache, q, new), cache, q, new)


def test_attention_varlen(xp, rng):
    cuts = CUTS["different"]
    tensors = pack(rng, cuts, "float16")
    check_varlen(call_varlen(xp, tensors, cuts, "float16"), tensors, cuts, "float16")


def test_merge_states(xp, rng):
    out_a, out_b = rng.standard_normal((2, 1, 2, 9, 16)).astype(np.float32)
    lse_a, lse_b = rng.standard_normal((2, 1, 2, 9)).astype(np.float32)
    merged = fc.merge_states(*(xp.array(x) for x in (out_a, lse_a, out_b, lse_b)))
    exact = reference.merge_states(*(x.astype(np.float64) for x in (out_a, lse_a, out_b, lse_b)))
    for actual, expected in zip(merged, exact, strict=True):
        np.testing.assert_allclose(xp.numpy(actual), expected, rtol=1e-5, atol=1e-6)


def test_vector_add_and_reduce(xp, rng):
    a, b = rounded(rng.standard_normal((2, 1_000_003)), "float32")
    x, y = xp.array(a), xp.array(b)
    np.testing.assert_array_equal(xp.numpy(fc.vector_add(x, y)), rounded(a + b, "float32"))
    for op, exact in (("sum", np.sum), ("max", np.max)):
        np.testing.assert_allclose(xp.numpy(fc.reduce(x, op)), exact(a), rtol=1e-5, atol=1e-2)


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_each_device_tells_of_itself(torch):
    for index in range(fc.device_count()):
        info, known = fc.device_info(index), torch.cuda.get_device_properties(index)
        assert info.device == f"cuda:{index}"
        assert (info.name, info.compute_capability) == (known.name, (known.major, known.minor))
        assert (info.memory_bytes, info.multiprocessors) == (known.total_memory, known.multi_processor_count)
        assert repr(fc.device_info(f"cuda:{index}")) == repr(info)


def test_each_device_has_a_pool_of_its_own(xp, rng):
    problem = make(BY_NAME["plain"], "float32", rng)
    dout = gradient_of_out(problem, rng)
    before = [fc.memory_stats(index) for index in (FIRST, SECOND)]
    run_backward(problem, xp, dout)
    after = [fc.memory_stats(index) for index in (FIRST, SECOND)]
    assert after[FIRST].allocations == before[FIRST].allocations
    assert after[SECOND].allocations > before[SECOND].allocations
    fc.empty_cache()
    assert fc.memory_stats(SECOND).bytes_reserved < after[SECOND].bytes_reserved
    check_gradients(problem, run_backward(problem, xp, dout), dout)


def test_workspaces_from_torch_are_on_their_device(torch, rng):
    import flashcore.torch as fct

    problem = make(BY_NAME["plain"], "float32", rng)
    dout = gradient_of_out(problem, rng)
    fct.workspaces_from_torch(f"cuda:{SECOND}")
    try:
        before = fc.memory_stats(SECOND).allocations
        grads = run_backward(problem, TorchOn(SECOND), dout)
        assert fc.memory_stats(SECOND).allocations == before
    finally:
        fct.workspaces_from_torch(f"cuda:{SECOND}", enabled=False)
    check_gradients(problem, grads, dout)


MIXED = {
    "attention": lambda here, there, out: fc.attention(here, there, here, out=out),
    "attention_backward": lambda here, there, out: fc.attention_backward(
        there, here, here, here, here, here[..., 0], dq=out
    ),
    "merge_states": lambda here, there, out: fc.merge_states(here, here[..., 0], there, here[..., 0], out=out),
    "vector_add": lambda here, there, out: fc.vector_add(here, there, out=out),
    "out": lambda here, there, out: fc.reduce(there, out=out),
}


@pytest.mark.parametrize("call", MIXED.values(), ids=MIXED)
def test_arrays_on_two_gpus_are_refused_and_nothing_is_written(call, on):
    here, there = (on(index).array(np.zeros((1, 2, 9, 16))) for index in (SECOND, FIRST))
    out = on(SECOND).empty((1, 2, 9, 16) if call is not MIXED["out"] else ())
    with pytest.raises(ValueError, match=r"(?s)(?=.*cuda:0)(?=.*cuda:1)"):
        call(here, there, out)
    np.testing.assert_array_equal(on(SECOND).numpy(out), -7)


def test_two_threads_alternate_between_two_gpus(on, rng):
    """Each thread finds on either device what one thread alone finds there."""
    problems = [make(BY_NAME[name], "float32", rng) for name in ("causal", "gqa")]

    def work(problem, index):
        xp, words = on(index), problem.keywords(on(index))
        out, lse = attend(problem, xp)
        grads = fc.attention_backward(out, *problem.arrays(xp), out, lse, deterministic=True, **words)
        return [xp.numpy(x) for x in (out, lse, *grads)]

    expected = [work(problem, SECOND) for problem in problems]
    for problem, (out, lse, *_) in zip(problems, expected, strict=True):
        exact = reference.attention(problem.q, problem.k, problem.v, problem.options)
        np.testing.assert_allclose(out, exact[0], atol=1e-5)
        np.testing.assert_allclose(lse, exact[1], atol=1e-5)

    def alternate(which):
        return [work(problems[which], (which + turn) % 2) for turn in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for answers, once in zip(pool.map(alternate, range(2)), expected, strict=True):
            for answer in answers:
                for a, b in zip(answer, once, strict=True):
                    np.testing.assert_allclose(a, b, atol=1e-5)


# ---- streams and graphs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True], ids=["current stream", "stream given"])
def test_work_queued_before_on_the_same_stream_is_done_first(given, torch, rng):
    xp = TorchOn(SECOND)
    problem = make(FAST, "float16", rng)
    late = problem.arrays(xp)
    early = [torch.zeros_like(x) for x in late]
    torch.cuda.synchronize(SECOND)
    stream = torch.cuda.Stream(device=SECOND)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for x, y in zip(early, late, strict=True):
            x.copy_(y)
        with torch.cuda.device(FIRST):
            if not given:
                results = fc.attention(*early, return_lse=True)
                assert current_device() == FIRST
    if given:
        results = fc.attention(*early, return_lse=True, stream=stream)
    torch.cuda.synchronize(SECOND)
    check_forward(problem, *results, xp, "bhsd")


def test_a_cuda_graph(torch, rng):
    """Captured while another device is the current one; a replay reads the new numbers."""
    xp = TorchOn(SECOND)
    case = cut(BY_NAME["causal"], seqlen=(64, 64), dim=(64, 64))
    old, new = make(case, "float32", rng), make(case, "float32", rng)
    dout = gradient_of_out(new, rng)
    arrays, above = old.arrays(xp), xp.array(dout)

    def step():
        out, lse = fc.attention(*arrays, causal=True, return_lse=True)
        return out, lse, *fc.attention_backward(above, *arrays, out, lse, causal=True)

    stream = torch.cuda.Stream(device=SECOND)
    torch.cuda.synchronize(SECOND)
    with torch.cuda.stream(stream):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.cuda.device(FIRST):
        out, lse, *grads = step()
    for x, values in zip(arrays, (new.q, new.k, new.v), strict=True):
        x.copy_(xp.array(values))
    torch.cuda.synchronize(SECOND)
    with torch.cuda.device(SECOND):
        graph.replay()
    torch.cuda.synchronize(SECOND)
    check_forward(new, out, lse, xp, "bhsd")
    check_gradients(new, dict(zip(("dq", "dk", "dv"), map(xp.numpy, grads), strict=True)), dout)


def test_work_on_the_second_takes_no_memory_of_the_first(torch):
    """To select a device, as to go back to it, makes a context there, with hundreds of MiB."""
    program = f"""
import ctypes, threading, flashcore as fc, torch
def has_context(index):
    flags, active = ctypes.c_uint(), ctypes.c_int()
    assert ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState(index, ctypes.byref(flags), ctypes.byref(active)) == 0
    return bool(active.value)
q, k, v, out = (torch.ones(1, 2, 2048, 128, device="cuda:{SECOND}", dtype=torch.float16) for _ in range(4))
before = has_context({FIRST})
thread = threading.Thread(target=lambda: fc.attention(q, k, v, causal=True, out=out))  # its first word to CUDA
thread.start()
thread.join()
torch.cuda.synchronize({SECOND})
print(before, has_context({SECOND}), has_context({FIRST}))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    if told[0] == "True":
        pytest.skip("this torch makes a context on the first device by itself")
    assert told == ["False", "True", "False"]


# ---- flashcore.torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_gradients_by_torch(dtype, compiled, torch, rng):
    import flashcore.torch as fct

    xp = TorchOn(SECOND)
    problem = make(cut(BY_NAME["causal"], seqlen=(64, 64), dim=(64, 64)), dtype, rng)
    dout = gradient_of_out(problem, rng)
    leaves = [x.requires_grad_() for x in problem.arrays(xp)]

    def call(q, k, v):
        return fct.attention(q, k, v, causal=True, return_lse=True)

    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    out, lse = call(*leaves)
    out.backward(xp.array(dout, dtype))
    check_forward(problem, out, lse, xp, "bhsd")
    grads = {name: xp.numpy(x.grad) for name, x in zip(("dq", "dk", "dv"), leaves, strict=True)}
    check_gradients(problem, grads, dout)


def test_in_the_place_of_torchs_own_attention(torch, rng):
    import flashcore.torch as fct

    xp = TorchOn(SECOND)
    problem = make(FAST, "float16", rng)
    with fct.installed():
        out = torch.nn.functional.scaled_dot_product_attention(*problem.arrays(xp))
    exact, _ = reference.attention(problem.q, problem.k, problem.v)
    stepwise, _ = reference.attention(
        problem.q, problem.k, problem.v, arithmetic=reference.framework_arithmetic("float16")
    )
    assert_near(xp.numpy(out), exact, stepwise, "float16", 164, "out")
