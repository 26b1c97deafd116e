"""Trains a small attention block with JAX: flashcore under jit and grad.

Each token is to be told the token that came some places before it. One block of attention can do that, but only by
learning where to look: a bias for each head and each pair of places, trained by flashcore's gradient of the bias.
The same gradients are computed once by jax.nn's attention, too, and compared.

    python examples/jax_attention.py
"""

from __future__ import annotations

import argparse
import time
from functools import partial

try:
    import flashcore.jax
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise SystemExit(f"This example needs JAX and flashcore ({error}): pip install flashcore jax") from None

TOKENS, LENGTH, HEADS, HEAD_DIM = 16, 48, 4, 16
WIDTH = HEADS * HEAD_DIM


def init(key):
    """Parameters of embedding, one attention block, and the way back to tokens."""
    shapes = {
        "embed": (TOKENS, WIDTH),
        "qkv": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "unembed": (WIDTH, TOKENS),
    }
    keys = jax.random.split(key, len(shapes))
    normal = {n: jax.random.normal(k, s) * s[0] ** -0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return {**normal, "bias": jnp.zeros((HEADS, LENGTH, LENGTH))}


def block(parameters, tokens, attend):
    """Logits of each place, (batch, LENGTH, TOKENS)."""
    x = parameters["embed"][tokens]
    qkv = (x @ parameters["qkv"]).reshape(*tokens.shape, 3, HEADS, HEAD_DIM)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (batch, LENGTH, HEADS, HEAD_DIM), as jax.nn has them
    attended = attend(q, k, v, bias=parameters["bias"], is_causal=True).reshape(x.shape)
    return (x + attended @ parameters["out"]) @ parameters["unembed"]


def loss(parameters, tokens, lag, attend):
    """Cross entropy, and how often the most likely token is the right one."""
    logits = block(parameters, tokens, attend)[:, lag:]
    right = tokens[:, :-lag]
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), right[..., None], axis=-1).mean()
    return entropy, (logits.argmax(-1) == right).mean()


@partial(jax.jit, static_argnames=("lag", "rate", "batch"))
def step(parameters, moments, key, number, *, lag, rate, batch):
    """One step of Adam (Kingma & Ba 2015) on sequences drawn from `key`."""
    tokens = jax.random.randint(key, (batch, LENGTH), 0, TOKENS)
    attend = flashcore.jax.dot_product_attention
    (entropy, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(parameters, tokens, lag, attend)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, moments[1], grads)

    def move(p, m, s):
        return p - rate * (m / (1 - 0.9**number)) / (jnp.sqrt(s / (1 - 0.99**number)) + 1e-8)

    return jax.tree.map(move, parameters, first, second), (first, second), entropy, accuracy


def largest_difference(parameters, key, lag):
    """Between the gradients by flashcore and by jax.nn, relative to the largest of each parameter."""
    tokens = jax.random.randint(key, (4, LENGTH), 0, TOKENS)

    def grads(attend):
        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(lambda p: loss(p, tokens, lag, attend)[0]))(parameters)

    ours, theirs = grads(flashcore.jax.dot_product_attention), grads(jax.nn.dot_product_attention)
    each = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), ours, theirs)
    return max(jax.tree.leaves(each))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120, help="steps of training (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step (default: %(default)s)")
    parser.add_argument("--lag", type=int, default=5, help="how far back to look, 1 to 47 (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.02, help="of learning (default: %(default)s)")
    words = parser.parse_args()
    if not (0 < words.lag < LENGTH and words.steps > 0 and words.batch > 0):
        parser.error(f"--lag is 1 to {LENGTH - 1}, --steps and --batch are at least 1")

    print(f"on {jax.devices()[0]}: tokens that came {words.lag} places before, {words.steps} steps")
    keys = jax.random.split(jax.random.key(0), words.steps + 3)
    parameters = init(keys[-1])
    difference = largest_difference(parameters, keys[-2], words.lag)
    print(f"gradients differ from jax.nn's by {difference:.1e} of the largest")
    if not difference < 1e-3:
        raise SystemExit("that is too much")

    moments = (jax.tree.map(jnp.zeros_like, parameters),) * 2
    begin = time.perf_counter()
    for number in range(1, words.steps + 1):
        parameters, moments, entropy, accuracy = step(
            parameters, moments, keys[number], number, lag=words.lag, rate=words.rate, batch=words.batch
        )
        if number == 1 or number % max(1, words.steps // 10) == 0:
            print(f"step {number:4d}  loss {entropy:6.3f}  right {accuracy:4.0%}")
    print(f"{(time.perf_counter() - begin) / words.steps * 1e3:.1f} ms a step")
    seen = parameters["bias"][:, LENGTH - 1].argmax(-1)
    print("the heads' favourite places back from the last:", *[int(LENGTH - 1 - place) for place in seen])


if __name__ == "__main__":
    main()
