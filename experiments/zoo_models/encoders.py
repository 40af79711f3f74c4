"""Transformers that encode: BERT in Flax NNX, an encoder with a decoder and a Perceiver in Flax Linen."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .blocks import attention_units
from .builders import BATCH, flax_nnx, floats, linen, random_tokens
from .entry import Entry, Model


class BertLayer(nnx.Module):
    """A post-norm layer."""

    def __init__(self, width: int, heads: int, hidden: int, **options: Any):
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, **options)
        self.attention_norm = nnx.LayerNorm(width, **options)
        self.intermediate = nnx.Linear(width, hidden, **options)
        self.output = nnx.Linear(hidden, width, **options)
        self.output_norm = nnx.LayerNorm(width, **options)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """The layer's output."""
        x = self.attention_norm(x + self.attention(x, mask=mask))
        return self.output_norm(x + self.output(jax.nn.gelu(self.intermediate(x), approximate=False)))


class Bert(nnx.Module):
    """BERT-small (Turc et al. 2019) in NNX, with a masked-language-model head and a pooler."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        vocabulary: int = 30522,
        width: int = 512,
        depth: int = 4,
        heads: int = 8,
        hidden: int = 2048,
        positions: int = 512,
    ):
        # NNX keeps an embedding's dtype and casts to it.
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": jnp.result_type(float)}
        self.words = nnx.Embed(vocabulary, width, **options)
        self.positions = nnx.Embed(positions, width, **options)
        self.types = nnx.Embed(2, width, **options)
        self.norm = nnx.LayerNorm(width, **options)
        self.layers = nnx.List([BertLayer(width, heads, hidden, **options) for _ in range(depth)])
        self.pooler = nnx.Linear(width, width, **options)
        self.classifier = nnx.Linear(width, 2, **options)
        self.transform = nnx.Linear(width, width, **options)
        self.transform_norm = nnx.LayerNorm(width, **options)
        self.bias = nnx.Param(jnp.zeros(vocabulary))

    def __call__(self, tokens: jax.Array, types: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of the words, and of the next-sentence task."""
        x = self.words(tokens) + self.positions(jnp.arange(tokens.shape[1])) + self.types(types)
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, valid[:, None, None, :])
        pooled = jnp.tanh(self.pooler(x[:, 0]))
        y = self.transform_norm(jax.nn.gelu(self.transform(x), approximate=False))
        return self.words.attend(y) + self.bias[...], self.classifier(pooled)


def _bert() -> Model:
    tokens = random_tokens(BATCH, 8, vocabulary=30522)
    types = np.array([[0] * 4 + [1] * 4] * BATCH, np.int32)
    valid = np.arange(8)[None] < np.array([[8], [6]])
    return flax_nnx(lambda: Bert(nnx.Rngs(0)), tokens, types, valid)()


class EncoderDecoder(nn.Module):
    """The base model of Vaswani et al. (2017): post-norm, sinusoidal positions, one shared embedding."""

    vocabulary: int = 37000
    width: int = 512
    depth: int = 6
    heads: int = 8
    hidden: int = 2048

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        """Logits of the next target tokens."""
        embedding = nn.Embed(self.vocabulary, self.width)

        def embed(tokens: jax.Array) -> jax.Array:
            position = np.arange(tokens.shape[1])[:, None]
            angles = position / 10000 ** (np.arange(0, self.width, 2) / self.width)
            table = np.concatenate([np.sin(angles), np.cos(angles)], -1)
            return embedding(tokens) * math.sqrt(self.width) + table

        def attend(x: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> jax.Array:
            return nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(self.heads)(x, y, mask=mask))

        def feed(x: jax.Array) -> jax.Array:
            return nn.LayerNorm()(x + nn.Dense(self.width)(nn.relu(nn.Dense(self.hidden)(x))))

        memory = embed(source)
        for _ in range(self.depth):
            memory = feed(attend(memory, memory))
        x = embed(target)
        for _ in range(self.depth):
            x = attend(x, x, nn.make_causal_mask(target))
            x = feed(attend(x, memory))
        return embedding.attend(x)


class Perceiver(nn.Module):
    """A Perceiver (Jaegle et al. 2021): latents read the input by cross-attention, with shared weights."""

    latents: int = 16
    width: int = 128
    heads: int = 8
    rounds: int = 2
    depth: int = 3
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Class logits of a batch of sequences (batch, length, features)."""
        latents = self.param("latents", nn.initializers.normal(0.02), (self.latents, self.width))
        z = jnp.broadcast_to(latents, (x.shape[0], *latents.shape))
        x = nn.LayerNorm()(x)
        norm = nn.LayerNorm(name="cross_norm")
        cross = nn.MultiHeadDotProductAttention(
            1, qkv_features=self.width, out_features=self.width, name="cross"
        )
        blocks = [
            (
                nn.LayerNorm(name=f"norm_{i}a"),
                nn.MultiHeadDotProductAttention(self.heads, name=f"self_{i}"),
                nn.LayerNorm(name=f"norm_{i}b"),
                nn.Dense(self.width, name=f"up_{i}"),
                nn.Dense(self.width, name=f"down_{i}"),
            )
            for i in range(self.depth)
        ]
        for _ in range(self.rounds):
            z = z + cross(norm(z), x)
            for first, attention, second, up, down in blocks:
                z = z + attention(first(z))
                z = z + down(nn.gelu(up(second(z))))
        return nn.Dense(self.classes)(z.mean(1))


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "BERT-small",
        "own, Flax NNX",
        _bert,
        512 + 4 * (attention_units(8, 64) + 2048) + 512,
        "512 of the stream, which the transform before the tied output joins; per layer 8 heads, 64 + 64 "
        "channels of all heads, 2048 neurons; pooler 512",
    ),
    Entry(
        "Transformer base",
        "own, Flax Linen",
        linen(
            EncoderDecoder(),
            random_tokens(BATCH, 6, vocabulary=37000),
            random_tokens(BATCH, 5, vocabulary=37000, seed=1),
        ),
        512 + 18 * attention_units(8, 64) + 12 * 2048,
        "one shared embedding joins both streams: 512; 18 attentions: 8 heads, 64 + 64 channels; 12 × 2048",
    ),
    Entry(
        "Perceiver",
        "own, Flax Linen, rounds share weights",
        linen(Perceiver(), floats(BATCH, 12, 20)),
        16 + 128 + attention_units(0, 128) + 3 * (attention_units(8, 16) + 128),
        "16 latents (averaged at the end) of 128 channels; cross-attention (its one head stays) 128 + 128; "
        "3 blocks: 8 heads, 16 + 16, 128",
    ),
)
