"""flashcore.jax on arrays that are cut over devices: by jit, by shard_map, and with axes in the types.

A machine with one device stands for two: XLA splits its CPU, in a process of its own, since that is decided at start.
"""

import os
import subprocess
import sys
import textwrap

import flashcore as fc
import pytest

jax = pytest.importorskip("jax")

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import flashcore.jax as fcj
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

assert len(jax.devices()) >= 2, jax.devices()
mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
rng = np.random.default_rng(0)
HEADS_K = {heads_k}
shapes = dict(q=(4, 8, 9, 16), k=(4, HEADS_K, 9, 16), v=(4, HEADS_K, 9, 24), bias=(1, 8, 9, 9), sinks=(8,))
given = {{name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}}
CUTS = {{
    "batch": dict(q=P("x"), k=P("x"), v=P("x"), bias=P(), sinks=P()),
    "heads": dict(q=P(None, "x"), k=P(None, "x"), v=P(None, "x"), bias=P(None, "x"), sinks=P("x")),
}}
if HEADS_K == 1:
    CUTS["heads"] |= dict(k=P(), v=P())
specs = CUTS["{cut}"]

def attend(x, **words):
    return fcj.attention(x["q"], x["k"], x["v"], causal=True, bias=x["bias"], sinks=x["sinks"], **words)

def grads(x, call=attend):
    return jax.grad(lambda x: (call(x) ** 2).sum())(x)

def near(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), a, b)

expected, expected_grads = attend(given), grads(given)
cut = {{name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in given.items()}}
"""

BY_JIT = """
for call, right in ((attend, expected), (grads, expected_grads)):
    program = jax.jit(call).lower(cut).compile()
    result = program(cut)
    near(result, right)
    assert "all-gather" not in program.as_text()
    assert (result if call is attend else result["q"]).sharding.is_equivalent_to(cut["q"].sharding, 4)
"""

BY_SHARD_MAP = """
shard_map = getattr(jax, "shard_map", None)
if shard_map is None:
    from jax.experimental.shard_map import shard_map
try:
    shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=specs["q"])({{**given, "q": given["q"][..., None]}})
except ValueError as error:
    assert "q must have shape (batch, heads, seqlen, head_dim)" in str(error), error
local = shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=specs["q"])
near(jax.jit(local)(given), expected)
near(jax.jit(lambda x: grads(x, local))(given), expected_grads)
"""

MAPPED = """
rows = {{name: x[None] * jnp.arange(1.0, 4.0).reshape(3, *(1,) * x.ndim) for name, x in given.items()}}
placed = {{n: jax.device_put(x, NamedSharding(mesh, P(None, *specs[n]))) for n, x in rows.items()}}
near(jax.jit(jax.vmap(attend))(placed), jax.vmap(attend)(rows))
"""

EXPLICIT = """
def in_explicit_mesh():
    from jax.sharding import AxisType
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))) as _:
        placed = {{name: jax.device_put(x, specs[name]) for name, x in given.items()}}
        def residual(x):
            out = attend(x)
            assert jax.typeof(out).sharding.spec == jax.typeof(x["q"]).sharding.spec, jax.typeof(out)
            return out
        near(jax.jit(residual)(placed), expected)
        near(jax.jit(lambda x: grads(x, residual))(placed), expected_grads)

if jax.__version_info__ >= (0, 10):  # before that the types of results do not say it
    in_explicit_mesh()
"""

DROPOUT = """
drop = lambda x: attend(x, dropout_p=0.5, seed=3)
near(jax.jit(drop)(cut), drop(given))  # the bits of the whole call, not of each part
"""

DECODE = """
cache = dict(q=(4, 8, 1, 16), k_cache=(4, HEADS_K, 32, 16), v_cache=(4, HEADS_K, 32, 16))
cache |= dict(k_new=(4, HEADS_K, 1, 16), v_new=(4, HEADS_K, 1, 16))
x = {{name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in cache.items()}}
like = {{n: specs["q" if n == "q" else "k"] for n in cache}}
y = {{name: jax.device_put(a, NamedSharding(mesh, like[name])) for name, a in x.items()}}
lengths = jnp.array([3, 0, 30, 11], jnp.int32)
step = lambda x: fcj.attention_decode(cache_seqlens=lengths, **x)
near(jax.jit(step)(y), step(x))

pages = jnp.arange(8, dtype=jnp.int32).reshape(4, 2)  # one pool, to which the sequences of both devices append
for name in ("k_cache", "v_cache"):
    x[name] = x[name].reshape(8, HEADS_K, 16, 16)
    spec = P() if HEADS_K == 1 or "{cut}" == "batch" else P(None, "x")
    y[name] = jax.device_put(x[name], NamedSharding(mesh, spec))
paged = lambda x: step({{**x, "block_table": pages}})
near(jax.jit(paged)(y), paged(x))
"""

PARTS = {
    "jit": BY_JIT,
    "shard_map": BY_SHARD_MAP,
    "vmap": MAPPED,
    "explicit": EXPLICIT,
    "dropout": DROPOUT,
    "decode": DECODE,
}


@pytest.fixture(params=["cpu", "cuda"])
def platform(request):
    if request.param == "cuda" and not (fc.device_count() > 1 and jax.default_backend() == "gpu"):
        pytest.skip("needs two GPUs that JAX sees")
    return request.param


@pytest.mark.parametrize("heads_k", [4, 1], ids=["gqa", "mqa"])
@pytest.mark.parametrize("cut", ["batch", "heads"])
def test_cut_over_two_devices(cut, heads_k, platform):
    """Each device attends to its part; gradients of what both share are summed; nothing is gathered."""
    program = (PROGRAM + "".join(f"print({name!r}, flush=True)\n{part}" for name, part in PARTS.items())).format(
        cut=cut, heads_k=heads_k
    )
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": platform,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, f"in part {done.stdout.split()[-1:]}:\n{done.stderr}"
