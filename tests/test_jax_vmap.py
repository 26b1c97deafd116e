"""flashcore.jax under vmap: each place gives what the call gives there alone, in one call where that can be said."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import flashcore.jax as fcj  # noqa: E402
import jax.numpy as jnp  # noqa: E402

N, B, H, S, D = 3, 2, 4, 7, 8


def arrays(rng, **shapes):
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def one_by_one(call, axes, given):
    """The same by a Python loop: what vmap means."""
    size = next(x.shape[axes[name]] for name, x in given.items() if axes[name] is not None)
    pick = lambda i: {n: x if axes[n] is None else jnp.take(x, i, axes[n]) for n, x in given.items()}  # noqa: E731
    results = [call(pick(i)) for i in range(size)]
    return jax.tree.map(lambda *x: jnp.stack(x), *results)


def check(call, axes, given):
    mapped = jax.jit(jax.vmap(call, in_axes=(axes,)))(given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mapped, one_by_one(call, axes, given)
    )


QKV = {"q": (N, B, H, S, D), "k": (N, B, 2, S, D), "v": (N, B, 2, S, D)}
SHARED_KV = {"q": (N, B, H, S, D), "k": (B, 2, S, D), "v": (B, 2, S, D)}
#: what is given, along which axis it is mapped; and whether more batch can say it
MAPPED = {
    "all": (QKV, {}, True),
    "other_axes": ({"q": (B, N, H, S, D), "k": (B, 2, S, N, D), "v": (N, B, 2, S, D)}, {"q": 1, "k": 3}, True),
    "shared_keys": (SHARED_KV, {"k": None, "v": None}, False),
    "shared_queries": ({**QKV, "q": (B, H, S, D)}, {"q": None}, False),
    "shared_keys_batch_of_one": (
        {"q": (N, 1, H, S, D), "k": (1, 2, S, D), "v": (1, 2, S, D)},
        {"k": None, "v": None},
        True,
    ),
    "shared_bias": ({**QKV, "bias": (H, S, S)}, {"bias": None}, True),
    "bias_without_batch": ({**QKV, "bias": (N, H, S, S)}, {}, False),
    "bias_of_the_batch": ({**QKV, "bias": (N, B, 1, S, S)}, {}, True),
    "bias_alone": ({"q": (B, H, S, D), "k": (B, 2, S, D), "v": (B, 2, S, D), "bias": (N, H, S, S)}, "bias", False),
    "shared_sinks": ({**QKV, "sinks": (H,)}, {"sinks": None}, True),
    "sinks": ({**QKV, "sinks": (N, H)}, {}, False),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("shapes,axes,_", MAPPED.values(), ids=MAPPED)
def test_is_the_call_at_each_place(shapes, axes, _, gradients, rng):
    given = arrays(rng, **shapes)
    if isinstance(axes, str):
        axes = {name: None for name in given if name != axes}
    axes = {name: axes.get(name, 0) for name in given}

    def call(x):
        return fcj.attention(**x, causal=True, return_lse=True)

    def loss(x):
        out, lse = call(x)
        return (out**2).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) ** 2).sum()

    check(jax.grad(loss) if gradients else call, axes, given)


@pytest.mark.parametrize("name", ["mask", "seqused_k", "alibi_slopes", "dropout"])
def test_other_arguments(name, rng):
    given = arrays(rng, **QKV)
    words = {}
    if name == "mask":
        given["mask"] = jnp.asarray(rng.random((N, S)) < 0.6)
    elif name == "seqused_k":
        given["seqused_k"] = jnp.asarray(rng.integers(0, S + 1, (N, B)), jnp.int32)
    elif name == "alibi_slopes":
        given["alibi_slopes"] = jnp.asarray(rng.random((N, B, H)), jnp.float32)
    else:
        words = {"dropout_p": 0.5, "seed": 7}  # each place draws what it would draw alone
    check(lambda x: fcj.attention(**x, **words), dict.fromkeys(given, 0), given)


def test_twice_mapped(rng):
    given = arrays(rng, q=(2, N, B, H, S, D), k=(2, B, H, S, D), v=(2, N, B, H, S, D))
    call = lambda x: fcj.attention(**x)  # noqa: E731
    inner = {"q": 0, "k": None, "v": 0}
    check(jax.vmap(call, in_axes=(inner,)), dict.fromkeys(given, 0), given)


def test_varlen(rng):
    given = arrays(rng, q=(N, 9, H, D), k=(N, 9, H, D), v=(N, 9, H, D))
    given["cu"] = jnp.asarray([[0, 4, 9], [0, 9, 9], [0, 1, 9]], jnp.int32)
    call = lambda x: fcj.attention_varlen(x["q"], x["k"], x["v"], x["cu"], x["cu"], causal=True)  # noqa: E731
    check(call, dict.fromkeys(given, 0), given)


@pytest.mark.parametrize("shared", [(), ("k_cache", "v_cache")], ids=["caches_mapped", "caches_shared"])
def test_decode_that_appends(shared, rng):
    """Each place has caches of its own in the end, also where all began with the same."""
    cache = (B, H, 16, D)
    given = arrays(rng, q=(N, B, H, 1, D), k_new=(N, B, H, 1, D), v_new=(N, B, H, 1, D))
    given |= arrays(rng, **{name: cache if name in shared else (N, *cache) for name in ("k_cache", "v_cache")})
    given["cache_seqlens"] = jnp.asarray(rng.integers(0, 15, (N, B)), jnp.int32)
    axes = {name: None if name in shared else 0 for name in given}
    check(lambda x: fcj.attention_decode(**x), axes, given)


@pytest.fixture(scope="module")
def plans():
    """name -> how many calls of the library the mapped call is: its log has a line for each, while the program runs."""
    program = (
        "import os, jax, jax.numpy as jnp, flashcore.jax as fcj\n"
        f"for name, (shapes, axes, _) in {MAPPED!r}.items():\n"
        "    x = {n: jnp.ones(shape) for n, shape in shapes.items()}\n"
        "    axes = {n: None for n in x if n != axes} if isinstance(axes, str) else axes\n"
        "    axes = {n: axes.get(n, 0) for n in x}\n"
        "    call = jax.jit(jax.vmap(lambda x: fcj.attention(**x), in_axes=(axes,))).lower(x).compile()\n"
        "    os.write(2, f'begin {name}\\n'.encode())\n"
        "    call(x).block_until_ready()\n"
        "    os.write(2, b'end\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "FLASHCORE_LOG": "plan"}
    )
    assert done.returncode == 0, done.stderr
    parts = re.findall(r"^begin (\w+)\n(.*?)^end$", done.stderr, flags=re.MULTILINE | re.DOTALL)
    return {name: log.count("fwd ") for name, log in parts}


@pytest.mark.parametrize("name", MAPPED)
def test_is_one_call_where_more_batch_says_it(name, plans):
    assert plans[name] == (1 if MAPPED[name][2] else N)
