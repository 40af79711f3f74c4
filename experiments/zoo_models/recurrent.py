"""Recurrent nets: LSTM, GRU and convolutional LSTM in Flax Linen and Haiku."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import haiku as hk
import jax

from .builders import BATCH, floats, haiku, linen, random_tokens
from .entry import Entry


class LinenLSTM(nn.Module):
    """A two-layer LSTM language model."""

    vocabulary: int = 1000
    width: int = 96
    hidden: tuple[int, ...] = (128, 112)

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next tokens."""
        x: Any = nn.Embed(self.vocabulary, self.width)(tokens)
        for hidden in self.hidden:
            x = nn.RNN(nn.OptimizedLSTMCell(hidden, param_dtype=x.dtype))(x)
        return nn.Dense(self.vocabulary)(x)


def haiku_language_model(core: Callable[[int], hk.RNNCore], hidden: int) -> Callable[[jax.Array], jax.Array]:
    """A recurrent language model in Haiku, unrolled by `hk.dynamic_unroll`."""

    def forward(tokens: jax.Array) -> jax.Array:
        x: Any = hk.Embed(1000, 96)(tokens)
        cell = core(hidden)
        x, _ = hk.dynamic_unroll(cell, x.swapaxes(0, 1), cell.initial_state(tokens.shape[0]))
        return hk.Linear(1000)(x.swapaxes(0, 1))

    return forward


class ConvolutionalLSTM(nn.Module):
    """Next-frame prediction (Shi et al. 2015): two convolutional LSTMs, then a convolution."""

    channels: tuple[int, ...] = (16, 12)

    @nn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        """The next frames; frames are (batch, time, height, width, 1)."""
        x: Any = frames
        for channels in self.channels:
            x = nn.RNN(nn.ConvLSTMCell(channels, (3, 3), param_dtype=x.dtype))(x)
        return nn.Conv(frames.shape[-1], (3, 3))(x)


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "LSTM language model",
        "own, Flax Linen: nn.RNN(nn.OptimizedLSTMCell)",
        linen(LinenLSTM(), random_tokens(BATCH, 5, vocabulary=1000)),
        96 + 128 + 112,
        "96 of the embedding; 128 and 112 hidden units with their four gate columns and recurrent row",
    ),
    Entry(
        "GRU language model",
        "own, Haiku: hk.dynamic_unroll(hk.GRU)",
        haiku(haiku_language_model(hk.GRU, 128), random_tokens(BATCH, 5, vocabulary=1000)),
        96 + 128,
        "96 of the embedding; 128 hidden units with their three gate columns and recurrent row",
    ),
    Entry(
        "LSTM language model (Haiku)",
        "own, Haiku: hk.dynamic_unroll(hk.LSTM)",
        haiku(haiku_language_model(hk.LSTM, 128), random_tokens(BATCH, 5, vocabulary=1000)),
        96 + 128,
        "96 of the embedding; 128 hidden units with their four gate columns and recurrent row",
    ),
    Entry(
        "Convolutional LSTM",
        "own, Flax Linen: nn.RNN(nn.ConvLSTMCell)",
        linen(ConvolutionalLSTM(), floats(BATCH, 4, 8, 8, 1)),
        16 + 12,
        "16 and 12 hidden channels with their four gate channels and recurrent kernels",
    ),
)
