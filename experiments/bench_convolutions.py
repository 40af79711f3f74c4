"""Claim: as matrix products, strided convolutions train fast wherever the training loop puts them.

Command: python experiments/bench_convolutions.py

One Adam step of the "conv" autoencoder at batch 128, against the same network with nn.Conv and
nn.ConvTranspose (same variables, same outputs), as time of nn.Conv / time of the products.
Expected (2 CPU cores, jax 0.10.2, two runs beside other work): jit 1.6-2.2, scan 9-11,
vmap over 4 models 1.6-1.9, scan of vmap over 4 models 12-15. It takes two minutes.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from compaware_jax.models import LATENT, Coder, autoencoder

BATCH = 128


class Encoder(nn.Module):
    """The encoder of the preset with nn.Conv."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Image to latent."""
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv1")(image))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="conv2")(x))
        x = nn.relu(nn.DenseGeneral(256, axis=(1, 2), name="dense1")(x.reshape(-1, 7 * 7, 64)))
        return nn.Dense(LATENT, name="latent")(x)


class Decoder(nn.Module):
    """The decoder of the preset with nn.ConvTranspose."""

    @nn.compact
    def __call__(self, latent: jax.Array) -> jax.Array:
        """Latent to image."""
        x = nn.relu(nn.Dense(256, name="dense1")(latent))
        x = nn.relu(nn.DenseGeneral((7 * 7, 64), name="dense2")(x)).reshape(-1, 7, 7, 64)
        x = nn.relu(nn.ConvTranspose(32, (3, 3), strides=(2, 2), name="conv1")(x))
        return nn.sigmoid(nn.ConvTranspose(1, (3, 3), strides=(2, 2), name="image")(x))


def training_step(apply: Callable[..., Any], image: jax.Array) -> Callable[[Any], Any]:
    """One Adam step on the squared error, from (variables, optimizer state) to the next."""
    optimizer = optax.adam(1e-3)

    def loss(variables: Any) -> jax.Array:
        return jnp.mean(jnp.square(apply(variables, image)["image"] - image))

    def step(carry: Any) -> Any:
        variables, state = carry
        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    return step


def in_scan(step: Callable[[Any], Any], length: int) -> Callable[[Any], Any]:
    """The step repeated on the device."""
    return lambda carry: jax.lax.scan(lambda c, _: (step(c), None), carry, length=length)[0]


def milliseconds(programs: list[Callable[[Any], Any]], carry: Any, repeats: int) -> list[float]:
    """The shortest time of each program on the same input."""
    compiled = [jax.jit(program).lower(carry).compile() for program in programs]
    times = []
    for _ in range(repeats):
        # Taking turns, so that whatever else the machine does falls on both alike.
        times.append([])
        for program in compiled:
            start = time.perf_counter()
            jax.block_until_ready(program(carry))
            times[-1].append(1e3 * (time.perf_counter() - start))
    return [min(column) for column in zip(*times, strict=True)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scan-length", type=int, default=5)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    key = jax.random.key(0)
    image = jax.random.uniform(key, (BATCH, 28, 28, 1))
    model = autoencoder("conv")
    applies = {
        "nn.Conv": Coder(encoder=Encoder(), decoder=Decoder()).apply,
        "products": model.apply,
    }

    def fresh(key: jax.Array) -> Any:
        variables = model.init(key)
        return variables, optax.adam(1e-3).init(variables)

    one, many = fresh(key), jax.vmap(fresh)(jax.random.split(key, args.models))
    outputs = [apply(one[0], image)["image"] for apply in applies.values()]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)

    rows = {
        "jit": (lambda s: s, one, 1),
        "scan": (lambda s: in_scan(s, args.scan_length), one, args.scan_length),
        f"vmap over {args.models}": (jax.vmap, many, args.models),
        f"scan of vmap over {args.models}": (
            lambda s: in_scan(jax.vmap(s), args.scan_length),
            many,
            args.scan_length * args.models,
        ),
    }
    print(f"{'ms per step and model':24}{'nn.Conv':>10}{'products':>10}{'ratio':>8}")
    for name, (loop, carry, steps) in rows.items():
        programs = [loop(training_step(apply, image)) for apply in applies.values()]
        slow, fast = (t / steps for t in milliseconds(programs, carry, args.repeats))
        print(f"{name:24}{slow:10.1f}{fast:10.1f}{slow / fast:8.1f}", flush=True)


if __name__ == "__main__":
    main()
