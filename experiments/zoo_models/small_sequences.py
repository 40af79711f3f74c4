"""Small nets on sequences and sets, one structure each."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx


class EmbeddingBag(nnx.Module):
    """fastText: looked-up rows, averaged without the padding, into a classifier."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(50, 16, rngs=rngs)
        self.hidden = nnx.Linear(16, 12, rngs=rngs)
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Class logits."""
        rows = jnp.take(self.table.embedding[...], tokens, axis=0)
        valid = (tokens > 0)[..., None]
        mean = jnp.where(valid, rows, 0).sum(1) / jnp.maximum(valid.sum(1), 1)
        return self.head(nnx.relu(self.hidden(mean)))


class BothDirections(nn.Module):
    """A bidirectional GRU over an embedding."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Class logits."""
        x = nn.Embed(40, 8)(tokens)
        forward, backward = (nn.RNN(nn.GRUCell(n, param_dtype=x.dtype)) for n in (10, 7))
        both: Any = nn.Bidirectional(forward, backward)(x)
        return nn.Dense(3)(both.mean(1))


class MinimalGRU(eqx.Module):
    """minGRU (Feng et al. 2024): a gated linear recurrence by `jax.lax.associative_scan`."""

    embed: eqx.nn.Linear
    gate: eqx.nn.Linear
    candidate: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Linear(5, 8, key=keys[0])
        self.gate = eqx.nn.Linear(8, 12, key=keys[1])
        self.candidate = eqx.nn.Linear(8, 12, key=keys[2])
        self.head = eqx.nn.Linear(12, 3, key=keys[3])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs along one sequence (time, features)."""
        x = jax.vmap(self.embed)(x)
        gate = jax.nn.sigmoid(jax.vmap(self.gate)(x))
        update = gate * jax.vmap(self.candidate)(x)

        def compose(left: Any, right: Any) -> Any:
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, hidden = jax.lax.associative_scan(compose, (1 - gate, update))
        return jax.vmap(self.head)(hidden)


def sorted_set(x: jax.Array) -> jax.Array:
    """A set encoder with sorted pooling (FSPool) and the best two elements by a learned score."""
    h = jax.nn.relu(hk.Linear(12)(x))
    weights = hk.get_parameter("weights", (x.shape[1], 12), init=jnp.ones)
    pooled = (jnp.sort(h, axis=1) * weights).sum(1)
    score = hk.Linear(1)(h)[..., 0]
    _, best = jax.lax.top_k(score, 2)
    chosen = jnp.take_along_axis(h, best[..., None], axis=1).mean(1)
    return hk.Linear(3)(jnp.concatenate([pooled, chosen], -1))


class Fourier(nn.Module):
    """An FNet block (Lee-Thorp et al. 2022): Fourier transforms over tokens and channels mix the stream."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Class logits of a batch of sequences."""
        x = nn.Dense(16)(x)
        x = nn.LayerNorm()(x + jnp.fft.fft2(x).real)
        x = nn.LayerNorm()(x + nn.Dense(16)(nn.gelu(nn.Dense(24)(x))))
        return nn.Dense(3)(x.mean(1))
