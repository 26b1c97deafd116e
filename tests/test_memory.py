"""Memory: the pool's counters, reuse, empty_cache, a resource of the user's own, and what exhaustion leaves behind."""

import ctypes
import gc

import flashcore as fc
import numpy as np
import pytest
from test_frameworks import Producer

SHAPE = (1, 2, 33, 24)


def backward(xp, seed=0):
    """A call that needs a workspace: the gradients add up in float32 before they are rounded."""
    rng = np.random.default_rng(seed)
    q, k, v, dout = (xp.array(rng.standard_normal(SHAPE), "float16") for _ in range(4))
    out, lse = fc.attention(q, k, v, return_lse=True)
    return [xp.numpy(g) for g in fc.attention_backward(dout, q, k, v, out, lse, deterministic=True)]


@pytest.fixture(autouse=True)
def own_pool(device):
    """Each test begins with an empty pool and ends with flashcore's own."""
    gc.collect()
    fc.empty_cache()
    yield
    fc.set_workspace_resource(None, device=device)


def test_workspaces_are_given_back_and_reused(xp, device):
    backward(xp)
    first = fc.memory_stats(device)
    assert first.allocations > 0
    backward(xp)
    second = fc.memory_stats(device)
    assert second.bytes_in_use == first.bytes_in_use
    assert second.allocations > first.allocations
    assert second.upstream_allocations == first.upstream_allocations


def test_empty_cache_gives_everything_back(xp, device):
    backward(xp)
    before = fc.memory_stats(device)
    assert before.bytes_reserved > before.bytes_in_use
    fc.empty_cache()
    after = fc.memory_stats(device)
    assert after.bytes_reserved == after.bytes_in_use
    assert after.peak_bytes_reserved >= before.bytes_reserved
    backward(xp)


def test_counters_are_consistent(xp, device):
    for seed in range(3):
        backward(xp, seed)
        stats = fc.memory_stats(device)
        assert stats.bytes_in_use <= stats.bytes_reserved <= stats.peak_bytes_reserved
        assert stats.bytes_in_use <= stats.peak_bytes_in_use <= stats.peak_bytes_reserved
        assert stats.upstream_allocations <= stats.allocations


def test_results_of_unknown_producers_live_in_the_pool():
    x = np.zeros((1, 2, 1000, 16), np.float32)
    before = fc.memory_stats("cpu").bytes_in_use
    out = fc.attention(*[Producer(x)] * 3, out=None, window=(0, 0))
    assert fc.memory_stats("cpu").bytes_in_use >= before + x.nbytes
    view = np.from_dlpack(out)
    del out
    gc.collect()
    assert fc.memory_stats("cpu").bytes_in_use >= before + x.nbytes, "a view keeps the memory"
    del view
    gc.collect()
    assert fc.memory_stats("cpu").bytes_in_use == before


class Counting:
    """A resource made of Python functions, on the CPU or over torch's allocator on the GPU."""

    def __init__(self, device):
        self.device, self.alive, self.asked, self.refuse = device, {}, [], None

    def allocate(self, size, stream):
        self.asked.append(size)
        if self.refuse is not None:
            return self.refuse()
        if self.device == "cuda":
            torch = pytest.importorskip("torch")
            address = torch.cuda.caching_allocator_alloc(size, 0, stream)
            self.alive[address] = size
            return address
        memory = ctypes.create_string_buffer(size + 255)
        address = (ctypes.addressof(memory) + 255) // 256 * 256
        self.alive[address] = (size, memory)
        return address

    def deallocate(self, address, size, stream):
        kept = self.alive.pop(address)
        assert size == (kept if self.device == "cuda" else kept[0])
        if self.device == "cuda":
            pytest.importorskip("torch").cuda.caching_allocator_delete(address)


def test_a_resource_of_ones_own_serves_the_workspaces(xp, device):
    expected = backward(xp)
    counting = Counting(device)
    fc.set_workspace_resource(counting.allocate, counting.deallocate, device=device)
    before = fc.memory_stats(device).allocations
    for mine, pooled in zip(backward(xp), expected, strict=True):
        np.testing.assert_array_equal(mine, pooled)
    assert counting.asked
    assert not counting.alive, "every block comes back"
    assert fc.memory_stats(device).allocations == before, "the pool is not asked"
    fc.set_workspace_resource(None, device=device)
    count = len(counting.asked)
    backward(xp)
    assert len(counting.asked) == count


def fail():
    raise RuntimeError("no more for you")


@pytest.mark.parametrize("refuse", [lambda: None, lambda: 0, fail], ids=["none", "zero", "exception"])
def test_exhaustion_is_a_memory_error_and_later_calls_work(refuse, xp, device):
    expected = backward(xp)
    counting = Counting(device)
    fc.set_workspace_resource(counting.allocate, counting.deallocate, device=device)
    counting.refuse = refuse
    with pytest.raises(MemoryError):
        backward(xp)
    counting.refuse = None
    for again, before in zip(backward(xp), expected, strict=True):
        np.testing.assert_array_equal(again, before)


def test_exhaustion_writes_nothing(xp, device):
    counting = Counting(device)
    counting.refuse = lambda: None
    q, k, v, dout = (xp.array(np.ones(SHAPE), "float16") for _ in range(4))
    out, lse = fc.attention(q, k, v, return_lse=True)
    grads = {name: xp.empty(SHAPE, "float16") for name in ("dq", "dk", "dv")}
    fc.set_workspace_resource(counting.allocate, counting.deallocate, device=device)
    with pytest.raises(MemoryError):
        fc.attention_backward(dout, q, k, v, out, lse, deterministic=True, **grads)
    for grad in grads.values():
        np.testing.assert_array_equal(xp.numpy(grad), -7)


def test_a_result_too_large_for_any_machine():
    """2^55 bytes: MemoryError from the pool, which stays usable."""
    x = Producer(np.broadcast_to(np.float32(0), (2**45, 1, 1, 256)))
    with pytest.raises(MemoryError):
        fc.attention(x, x, x)
    small = Producer(np.zeros((1, 1, 2, 4), np.float32))
    np.testing.assert_array_equal(np.from_dlpack(fc.attention(small, small, small)), 0)


def test_half_a_resource_is_refused(device):
    counting = Counting(device)
    with pytest.raises(ValueError, match=r"allocate.*deallocate"):
        fc.set_workspace_resource(counting.allocate, None, device=device)
    with pytest.raises(TypeError, match=r"function"):
        fc.set_workspace_resource(3, counting.deallocate, device=device)
