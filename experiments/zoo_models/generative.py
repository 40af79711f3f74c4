"""Autoencoders and generators: a VQ-VAE in Haiku, a diffusion transformer and a Neural ODE in JAX."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from jax.experimental.ode import odeint

from .builders import BATCH, floats, haiku, linen, random_tokens
from .entry import Entry, Model


def vq_vae(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The VQ-VAE of Haiku's example (van den Oord et al. 2017): images again, and the quantizer's loss."""

    def residual_stack(x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = x + hk.Conv2D(128, 1)(jax.nn.relu(hk.Conv2D(32, 3)(jax.nn.relu(x))))
        return jax.nn.relu(x)

    x = jax.nn.relu(hk.Conv2D(64, 4, stride=2)(images))
    x = jax.nn.relu(hk.Conv2D(128, 4, stride=2)(x))
    x = hk.Conv2D(64, 1)(residual_stack(hk.Conv2D(128, 3)(x)))
    quantized = hk.nets.VectorQuantizer(64, 512, commitment_cost=0.25)(x, is_training=True)
    x = residual_stack(hk.Conv2D(128, 3)(quantized["quantize"]))
    x = jax.nn.relu(hk.Conv2DTranspose(64, 4, stride=2)(x))
    return hk.Conv2DTranspose(3, 4, stride=2)(x), quantized["loss"]


class DiffusionTransformer(nn.Module):
    """DiT-S/2 (Peebles and Xie 2023): blocks modulated by the time step and the class, on latents."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    frequencies: int = 128
    classes: int = 1000

    @nn.compact
    def __call__(self, latents: jax.Array, times: jax.Array, labels: jax.Array) -> jax.Array:
        """Noise and its variance; latents are (batch, height, width, channels)."""
        batch, height, width, channels = latents.shape
        rates = jnp.exp(-jnp.log(10_000.0) * jnp.arange(self.frequencies) / self.frequencies)
        angles = times[:, None] * rates
        time = nn.Dense(self.width)(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1))
        condition = nn.Dense(self.width)(nn.silu(time)) + nn.Embed(self.classes + 1, self.width)(labels)

        def modulation(count: int) -> list[jax.Array]:
            return jnp.split(nn.Dense(count * self.width)(nn.silu(condition))[:, None], count, -1)

        def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
            return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)(x) * (1 + scale) + shift

        x = nn.Conv(self.width, (2, 2), strides=2, padding="VALID")(latents)
        x = x.reshape(batch, -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.depth):
            shift, scale, gate, later_shift, later_scale, later_gate = modulation(6)
            y = modulated(x, shift, scale)
            x = x + gate * nn.MultiHeadDotProductAttention(self.heads)(y)
            y = nn.gelu(nn.Dense(4 * self.width)(modulated(x, later_shift, later_scale)))
            x = x + later_gate * nn.Dense(self.width)(y)
        x = nn.Dense(2 * 2 * 2 * channels)(modulated(x, *modulation(2)))
        x = x.reshape(batch, height // 2, width // 2, 2, 2, 2 * channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, height, width, 2 * channels)


def neural_ode() -> Model:
    """A state that follows a learned derivative, solved with adaptive steps, between two dense layers."""
    shapes = {"in": (12, 32), "up": (33, 64), "bias": (64,), "down": (64, 32), "out": (32, 4)}
    variables = {name: floats(*shape) for name, shape in shapes.items()}

    def slope(
        state: jax.Array, time: jax.Array, up: jax.Array, bias: jax.Array, down: jax.Array
    ) -> jax.Array:
        now = jnp.concatenate([state, jnp.broadcast_to(time, (*state.shape[:-1], 1))], -1)
        return jnp.tanh(now @ up + bias) @ down

    def apply(v: Any, x: jax.Array) -> jax.Array:
        states = odeint(slope, x @ v["in"], jnp.linspace(0.0, 1.0, 3), v["up"], v["bias"], v["down"])
        return states[-1] @ v["out"]

    return apply, variables, (floats(BATCH, 12),)


_DIT = DiffusionTransformer()

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "VQ-VAE",
        "dm-haiku: hk.nets.VectorQuantizer in the autoencoder of its example",
        haiku(vq_vae, floats(BATCH, 16, 16, 3)),
        (64 + 128 + 128 + 2 * 32) + 64 + (128 + 2 * 32 + 64),
        "encoder 64, 128, a residual stack of 128 with two inner widths of 32; 64 of the codes; decoder a "
        "stack of 128 with 2 × 32, and 64",
    ),
    Entry(
        "DiT-S/2",
        "own, Flax Linen, as in Peebles and Xie",
        linen(_DIT, floats(BATCH, 8, 8, 4), floats(BATCH), random_tokens(BATCH, vocabulary=1000)),
        3 * 384 + 2 * 128 + 12 * (6 + 2 * 64 + 4 * 384),
        "stream 384, condition 384, hidden 384 of the time and the 256 waves that it reads; per block 6 "
        "heads, 64 channels of queries and keys, 64 of values, 1,536",
    ),
    Entry(
        "Neural ODE",
        "own, jax.experimental.ode.odeint",
        neural_ode,
        32 + 64,
        "32 of the state; 64 inside its derivative",
    ),
)
