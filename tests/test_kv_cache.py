"""KVCache: what is forgotten makes room again, and `used` says how much is taken without asking a device."""

import pytest

torch = pytest.importorskip("torch")

import flashcore.torch as fct  # noqa: E402

MAKERS = {
    "number": lambda lengths: max(lengths),
    "list": list,
    "tensor": lambda lengths: torch.tensor(lengths),
    "int32": lambda lengths: torch.tensor(lengths, dtype=torch.int32),
}


def cache_of(*lengths, capacity=16, place="cpu"):
    """A cache whose sequences hold so many tokens."""
    cache = fct.KVCache(len(lengths), capacity, 2, 8, device=place)
    cache.grow(max(lengths))
    cache.truncate(list(lengths))
    return cache


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_truncate_gives_the_room_back(make, place):
    cache = cache_of(9, 9, place=place)
    cache.truncate(make([4, 4]))
    assert (cache.used, cache.seqlens.tolist()) == (4, [4, 4])


def test_nothing_is_remembered_that_was_not_held(place):
    cache = cache_of(5, 3, place=place)
    cache.truncate([9, 2])
    assert (cache.used, cache.seqlens.tolist()) == (5, [5, 2])
    cache.truncate(4)
    assert (cache.used, cache.seqlens.tolist()) == (4, [4, 2])


def test_used_is_the_largest_length_on_the_cpu():
    cache = cache_of(3, 9)
    cache.truncate(torch.tensor([9, 5]))
    assert (cache.used, cache.seqlens.tolist()) == (5, [3, 5])


def test_a_tensor_on_a_gpu_leaves_used_as_it_is(place):
    if place == "cpu":
        pytest.skip("a CPU is not waited for")
    cache = cache_of(9, place=place)
    cache.truncate(torch.tensor([4], device=place))
    assert (cache.used, cache.seqlens.tolist()) == (9, [4])
    cache.truncate(4)
    assert cache.used == 4


def test_guessed_tokens_are_dropped_step_after_step(place):
    """As in speculative decoding: four tokens go in, one of them stays; the room is never used up."""
    layer = fct.MultiheadAttention(16, 2, causal=True, rotary_base=1e4, max_positions=8, device=place).eval()
    x = torch.randn(1, 5, 16, device=place)
    cache = layer.new_cache(1, 8)
    with torch.no_grad():
        whole = layer(x)
        for step in range(5):
            guess = torch.randn(1, 4, 16, device=place)
            guess[:, 0] = x[:, step]
            out = layer(guess[:, : 8 - step], cache=cache)
            torch.testing.assert_close(out[:, 0], whole[:, step], rtol=1e-4, atol=1e-5)
            cache.truncate(step + 1)
    assert cache.used == 5


def test_a_compiled_call_keeps_used(place):
    cache = cache_of(9, 9, place=place)

    @torch.compile(backend="eager", fullgraph=True)
    def forget(lengths):
        cache.truncate(lengths)

    forget(torch.tensor([4, 3], device=place))
    assert (cache.used, cache.seqlens.tolist()) == (9, [4, 3])


REFUSED = {
    "negative": (-1, r"-1.*at least 0"),
    "negative of one": ([2, -1], r"-1.*at least 0"),
    "too many": ([1, 2, 3], r"\(3,\) given.*\(2,\)"),
    "not whole": (1.5, r"float32.* given.*integer"),
}


@pytest.mark.parametrize(("lengths", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_length_is_refused(lengths, says):
    cache = cache_of(4, 4)
    with pytest.raises(ValueError, match=says):
        cache.truncate(lengths)
    assert (cache.used, cache.seqlens.tolist()) == (4, [4, 4])
