"""Decoders: Llama in plain JAX and in penzai, GPT-2 and a scanned transformer in Flax Linen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from penzai import pz
from penzai.models.transformer.variants import llamalike_common as penzai_llama

from .blocks import attention_block, attention_units, mlp_block, transformer_units
from .builders import BATCH, linen, random_tokens
from .entry import Entry, Model


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama-like decoder.

    Attributes:
      width: channels of the residual stream.
      layers: blocks.
      heads: query heads.
      groups: key and value heads; `heads` is a multiple of it.
      hidden: width of the gated MLP.
      vocabulary: tokens.
      head_size: channels per head.
      tied: whether the embedding is the output layer, too.
      length: tokens per example.
      dtype: of the parameters.
    """

    width: int
    layers: int
    heads: int
    groups: int
    hidden: int
    vocabulary: int
    head_size: int
    tied: bool = False
    length: int = 8
    dtype: str = "float32"

    @property
    def units(self) -> int:
        """Units counted by hand: the stream; per layer the key and value groups and the gated width."""
        return self.width + self.layers * (self.groups + self.hidden)


PRESETS = {
    "tiny": LlamaConfig(256, 4, 8, 4, 688, 4096, 32),
    "tied": LlamaConfig(256, 4, 8, 2, 688, 4096, 32, tied=True),
    "1b": LlamaConfig(2048, 16, 32, 8, 8192, 128256, 64, tied=True, dtype="bfloat16"),
    "7b": LlamaConfig(4096, 32, 32, 32, 11008, 32000, 128, dtype="bfloat16"),
}


def llama(config: LlamaConfig | str) -> Model:
    """A Llama-like decoder in plain JAX: RMSNorm, rotary positions, grouped queries, SwiGLU.

    Args:
      config: the sizes, or the name of a preset: ``tiny``, ``tied``, ``1b`` (Llama 3.2 1B), ``7b`` (Llama 1
        and 2).

    Returns:
      ``(apply, abstract variables, args)``; `apply` maps tokens (batch, length) to logits.
    """
    c = PRESETS[config] if isinstance(config, str) else config

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(c.dtype))

    def block() -> dict[str, Any]:
        query, key = c.heads * c.head_size, c.groups * c.head_size
        attention = {
            "q": leaf(c.width, query),
            "k": leaf(c.width, key),
            "v": leaf(c.width, key),
            "o": leaf(query, c.width),
        }
        mlp = {
            "gate": leaf(c.width, c.hidden),
            "up": leaf(c.width, c.hidden),
            "down": leaf(c.hidden, c.width),
        }
        return {
            "attention_norm": leaf(c.width),
            "attention": attention,
            "mlp_norm": leaf(c.width),
            "mlp": mlp,
        }

    variables: dict[str, Any] = {f"layer_{i}": block() for i in range(c.layers)}
    variables |= {"embedding": leaf(c.vocabulary, c.width), "norm": leaf(c.width)}
    if not c.tied:
        variables["head"] = leaf(c.width, c.vocabulary)

    def rotate(x: jax.Array) -> jax.Array:
        half = c.head_size // 2
        angles = np.outer(np.arange(x.shape[1]), 10000.0 ** (-np.arange(half) / half))[:, None]
        cosine, sine = jnp.asarray(np.cos(angles), x.dtype), jnp.asarray(np.sin(angles), x.dtype)
        left, right = jnp.split(x, 2, -1)
        return jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine], -1)

    def rms(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def attend(v: Any, x: jax.Array) -> jax.Array:
        batch, length = x.shape[:2]
        q = rotate((x @ v["q"]).reshape(batch, length, c.heads, c.head_size))
        k = rotate((x @ v["k"]).reshape(batch, length, c.groups, c.head_size))
        u = (x @ v["v"]).reshape(batch, length, c.groups, c.head_size)
        q = q.reshape(batch, length, c.groups, c.heads // c.groups, c.head_size)
        scores = jnp.einsum("btgnd,bsgd->bgnts", q, k) / math.sqrt(c.head_size)
        scores = jnp.where(np.tri(length, dtype=bool), scores, -1e9)
        mixed = jnp.einsum("bgnts,bsgd->btgnd", jax.nn.softmax(scores), u)
        return mixed.reshape(batch, length, -1) @ v["o"]

    def apply(v: Any, tokens: jax.Array) -> jax.Array:
        x = v["embedding"][tokens]
        for i in range(c.layers):
            w = v[f"layer_{i}"]
            x = x + attend(w["attention"], rms(x, w["attention_norm"]))
            y = rms(x, w["mlp_norm"])
            x = x + (jax.nn.silu(y @ w["mlp"]["gate"]) * (y @ w["mlp"]["up"])) @ w["mlp"]["down"]
        x = rms(x, v["norm"])
        return x @ (v["embedding"].T if c.tied else v["head"])

    return apply, variables, (random_tokens(BATCH, c.length, vocabulary=c.vocabulary),)


PENZAI = penzai_llama.LlamalikeTransformerConfig(
    num_kv_heads=2,
    query_head_multiplier=2,
    embedding_dim=128,
    projection_dim=32,
    mlp_hidden_dim=344,
    num_decoder_blocks=3,
    vocab_size=1000,
    mlp_variant="swiglu",
    tie_embedder_and_logits=False,
)


def _penzai() -> Model:
    def unbound() -> tuple[Any, Any]:
        model = penzai_llama.build_llamalike_transformer(PENZAI, init_base_rng=jax.random.key(0))
        return pz.unbind_params(model, freeze=True)

    skeleton = unbound()[0]
    named = jax.eval_shape(lambda: {value.label: value.value for value in unbound()[1]})
    variables = {label: value.data_array for label, value in named.items()}

    def apply(v: Any, tokens: jax.Array) -> jax.Array:
        values = [
            pz.ParameterValue(label=label, value=pz.nx.wrap(v[label]).tag(*value.named_axes))
            for label, value in named.items()
        ]
        model = pz.bind_variables(skeleton, values)
        return model(pz.nx.wrap(tokens).tag("batch", "seq")).unwrap("batch", "seq", "vocabulary")

    return apply, variables, (random_tokens(BATCH, 6, vocabulary=PENZAI.vocab_size),)


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm, tied output; 6 layers as in DistilGPT-2."""

    vocabulary: int = 50257
    positions: int = 1024
    width: int = 768
    depth: int = 6
    heads: int = 12

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Logits of the next tokens."""
        embedding = nn.Embed(self.vocabulary, self.width, name="wte")
        x = embedding(tokens) + nn.Embed(self.positions, self.width, name="wpe")(positions)
        mask = nn.make_causal_mask(tokens)
        for i in range(self.depth):
            y = nn.Dense(3 * self.width, name=f"qkv_{i}")(nn.LayerNorm()(x))
            q, k, v = (
                a.reshape(*a.shape[:2], self.heads, self.width // self.heads) for a in jnp.split(y, 3, -1)
            )
            y = nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)
            x = mlp_block(x + nn.Dense(self.width)(y), 4 * self.width)
        return embedding.attend(nn.LayerNorm()(x))


class ScannedBlock(nn.Module):
    """A pre-norm block whose parameters a scan stacks."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """The next carry, and no output."""
        return mlp_block(attention_block(x, self.heads, mask), self.hidden), None


class ScannedTransformer(nn.Module):
    """A decoder with its layers in one `nn.scan`, as large Flax models are written."""

    vocabulary: int = 1000
    width: int = 128
    depth: int = 6
    heads: int = 4
    hidden: int = 512

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next tokens."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        layers = nn.scan(
            ScannedBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.depth,
        )
        x, _ = layers(self.heads, self.hidden)(x, nn.make_causal_mask(tokens))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "Llama, tiny, grouped queries",
        "own, plain JAX",
        lambda: llama("tiny"),
        PRESETS["tiny"].units,
        "256 of the stream; per layer 4 key-value groups (with 2 query heads each) and 688 neurons",
    ),
    Entry(
        "Llama, tiny, tied embedding",
        "own, plain JAX",
        lambda: llama("tied"),
        PRESETS["tied"].units,
        "256 of the stream; per layer 2 key-value groups (with 4 query heads each) and 688 neurons",
    ),
    Entry(
        "Llama (penzai)",
        "penzai 0.2.5: build_llamalike_transformer",
        _penzai,
        128 + 3 * (2 + 2 + 32 // 2 + 32 + 344),
        "128 of the stream; per block 2 key-value groups, 2 query heads of each, 16 rotary pairs of "
        "query-key channels, 32 value channels, 344 neurons",
    ),
    Entry(
        "DistilGPT-2",
        "own, Flax Linen",
        linen(GPT2(), random_tokens(BATCH, 8, vocabulary=50257), np.arange(8)[None]),
        transformer_units(768, 6, 12, 3072),
        "768 of the stream (both embeddings, one tied to the output); per block 12 heads and 3072 neurons",
    ),
    Entry(
        "Scanned transformer",
        "own, Flax Linen, nn.scan over blocks",
        linen(ScannedTransformer(), random_tokens(BATCH, 6, vocabulary=1000)),
        128 + attention_units(4, 32) + 512,
        "128 of the stream; 4 heads, 32 query-key and 32 value channels, 512 neurons, each in all layers",
    ),
)
