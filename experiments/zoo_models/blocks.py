"""Blocks that several transformers of the zoo share, and hand counts of their units.

The blocks are functions; call them within a compact method of a Flax Linen module.
"""

from __future__ import annotations

import flax.linen as nn
import jax


def attention_block(x: jax.Array, heads: int, mask: jax.Array | None = None) -> jax.Array:
    """Pre-norm self-attention and its shortcut; x is (batch, length, width)."""
    return x + nn.MultiHeadDotProductAttention(heads)(nn.LayerNorm()(x), mask=mask)


def mlp_block(x: jax.Array, hidden: int) -> jax.Array:
    """Pre-norm MLP of `hidden` neurons and its shortcut; x is (..., width)."""
    return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(hidden)(nn.LayerNorm()(x))))


def transformer_units(width: int, depth: int, heads: int, hidden: int) -> int:
    """Channels of the stream; per block the heads (a head is a unit) and the neurons."""
    return width + depth * (heads + hidden)


def attention_units(heads: int, size: int) -> int:
    """Linen and NNX keep heads and their `size` channels on two axes: both leave, channels from all heads."""
    return heads + size + size
