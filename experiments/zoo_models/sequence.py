"""Sequence models and agents: transformers, recurrent nets, mixers, world models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import equimo.layers.attention as equimo_attention
import equimo.layers.norm as equimo_norm
import equimo.models.mlla as equimo_mlla
import equimo.models.vit as equimo_vit
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from brax.training.acme import running_statistics, specs
from brax.training.agents.ppo import networks as ppo
from brax.training.agents.sac import networks as sac
from flax import nnx
from penzai import pz
from penzai.models.transformer.variants import llamalike_common as penzai_llama

from .entry import Entry, Model

BATCH = 2


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _tokens(*shape: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, shape).astype(np.int32)


def _linen(module: nn.Module, *args: Any) -> Model:
    variables = jax.eval_shape(module.init, jax.random.key(0), *args)
    return module.apply, variables, args


def _haiku(forward: Callable[..., Any], *args: Any) -> Model:
    net = hk.without_apply_rng(hk.transform(forward))
    return net.apply, jax.eval_shape(net.init, jax.random.key(0), *args), args


def _nnx(make: Callable[[], nnx.Module], *args: Any) -> Model:
    graph, state = nnx.split(nnx.eval_shape(make))

    def apply(variables: Any, *inputs: Any) -> Any:
        return nnx.merge(graph, variables)(*inputs)

    return apply, state, args


class _Wide:
    """`jax.numpy` with another dtype in the place of float32."""

    def __init__(self, dtype: Any):
        self.float32 = dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)


@contextmanager
def _wide(dtype: Any, *modules: ModuleType) -> Iterator[None]:
    """Replace the float32 that equimo casts to by name: a comparison in float64 needs float64 there."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "jnp", _Wide(dtype)))
        yield


def _equimo(make: Callable[[], eqx.Module], *image: int) -> Model:
    model = eqx.filter_eval_shape(make)
    arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        whole = eqx.combine(variables, static)
        with _wide(images.dtype, equimo_attention, equimo_norm):
            return jax.vmap(lambda x: whole(x, key=jax.random.PRNGKey(0), inference=True))(images)

    return apply, arrays, (_floats(BATCH, *image),)


# Vision transformers ---------------------------------------------------------------------------------------


MLLA_WIDTHS, MLLA_DEPTHS = (64, 128, 256, 512), (2, 4, 8, 4)


def _mlla() -> eqx.Module:
    mlla: Any = equimo_mlla.Mlla
    return mlla(
        img_size=64,
        in_channels=3,
        dim=MLLA_WIDTHS[0],
        depths=list(MLLA_DEPTHS),
        num_heads=[2, 4, 8, 16],
        key=jax.random.PRNGKey(0),
    )


def _dinov3() -> eqx.Module:
    rotary = {
        "strategy": "period",
        "base": 100.0,
        "normalize_coords": "separate",
        "dtype": jnp.result_type(float),
    }
    return equimo_vit.dinov3_vits16plus_pretrain_lvd1689m(
        num_classes=1000, local_pos_embed_config_patch=rotary, key=jax.random.PRNGKey(0)
    )


class LinenViT(nn.Module):
    """ViT (Dosovitskiy et al. 2021), as a Linen user writes it."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Class logits of a batch of NHWC images."""
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, "VALID", name="embedding")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        for _ in range(self.depth):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x)[:, 0])


class SwinBlock(nn.Module):
    """A block of Swin: attention in (shifted) windows with a relative position bias, then an MLP."""

    heads: int
    window: int
    shift: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """A block's output; x is (batch, height, width, channels)."""
        batch, height, width, channels = x.shape
        window, shift = self.window, self.shift
        y = nn.LayerNorm()(x)
        if shift:
            y = jnp.roll(y, (-shift, -shift), (1, 2))
        rows, columns = height // window, width // window
        y = y.reshape(batch, rows, window, columns, window, channels).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch * rows * columns, window**2, channels)
        qkv = nn.Dense(3 * channels, name="qkv")(y)
        qkv = qkv.reshape(*y.shape[:2], 3, self.heads, channels // self.heads).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(channels // self.heads)
        table = self.param("bias", nn.initializers.normal(0.02), ((2 * window - 1) ** 2, self.heads))
        scores = scores + table[_relative_positions(window)].transpose(2, 0, 1)
        if shift:
            mask = _shift_mask(height, width, window, shift)
            scores = scores.reshape(batch, rows * columns, self.heads, window**2, window**2)
            scores = jnp.where(mask[:, None], scores, -100.0).reshape(-1, self.heads, window**2, window**2)
        y = (nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(y.shape)
        y = nn.Dense(channels, name="projection")(y)
        y = y.reshape(batch, rows, columns, window, window, channels).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(x.shape)
        if shift:
            y = jnp.roll(y, (shift, shift), (1, 2))
        x = x + y
        return x + nn.Dense(channels)(nn.gelu(nn.Dense(4 * channels)(nn.LayerNorm()(x))))


def _relative_positions(window: int) -> np.ndarray:
    at = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
    difference = at[:, :, None] - at[:, None, :] + window - 1
    return difference[0] * (2 * window - 1) + difference[1]


def _shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    region = np.zeros((height, width), int)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, vertical in enumerate(cuts):
        for j, horizontal in enumerate(cuts):
            region[vertical, horizontal] = 3 * i + j
    region = region.reshape(height // window, window, width // window, window).transpose(0, 2, 1, 3)
    region = region.reshape(-1, window**2)
    return region[:, :, None] == region[:, None, :]


class Swin(nn.Module):
    """Swin-T (Liu et al. 2021)."""

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Class logits of a batch of NHWC images."""
        x = nn.LayerNorm()(nn.Conv(self.width, (4, 4), (4, 4))(images))
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            if stage:
                parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
                x = nn.LayerNorm()(jnp.concatenate(parts, -1))
                x = nn.Dense(self.width * 2**stage, use_bias=False)(x)
            for block in range(depth):
                whole = x.shape[1] <= self.window
                shift = self.window // 2 if block % 2 and not whole else 0
                x = SwinBlock(heads, self.window, shift)(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean((1, 2)))


def _swin_units() -> int:
    blocks = zip((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), strict=True)
    return sum(width + depth * (heads + 4 * width) for width, depth, heads in blocks)


def mixer(images: jax.Array, width: int = 512, depth: int = 8) -> jax.Array:
    """MLP-Mixer S/16 (Tolstikhin et al. 2021) in Haiku."""

    def norm(x: jax.Array) -> jax.Array:
        return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

    def mlp(x: jax.Array, hidden: int) -> jax.Array:
        return hk.Linear(x.shape[-1])(jax.nn.gelu(hk.Linear(hidden)(x)))

    x = hk.Conv2D(width, 16, 16, padding="VALID")(images)
    x = x.reshape(x.shape[0], -1, width)
    for _ in range(depth):
        x = x + mlp(norm(x).swapaxes(1, 2), 256).swapaxes(1, 2)
        x = x + mlp(norm(x), 2048)
    return hk.Linear(1000)(norm(x).mean(1))


# Decoders --------------------------------------------------------------------------------------------------


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

    return apply, variables, (_tokens(BATCH, c.length, vocabulary=c.vocabulary),)


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

    return apply, variables, (_tokens(BATCH, 6, vocabulary=PENZAI.vocab_size),)


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
            x = x + nn.Dense(self.width)(y)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return embedding.attend(nn.LayerNorm()(x))


class ScannedBlock(nn.Module):
    """A pre-norm block whose parameters a scan stacks."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """The next carry, and no output."""
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x))))
        return x, None


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


# Encoders, and encoders with decoders ----------------------------------------------------------------------


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
    tokens = _tokens(BATCH, 8, vocabulary=30522)
    types = np.array([[0] * 4 + [1] * 4] * BATCH, np.int32)
    valid = np.arange(8)[None] < np.array([[8], [6]])
    return _nnx(lambda: Bert(nnx.Rngs(0)), tokens, types, valid)


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


# Recurrent nets --------------------------------------------------------------------------------------------


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


# Agents ----------------------------------------------------------------------------------------------------

ANT = (27, 8)
NORMALISE: Any = running_statistics.normalize


def _normaliser(observations: int) -> Any:
    """The mean and deviation alone: the counter is an integer, of which no gradient is taken."""
    state = jax.eval_shape(lambda: running_statistics.init_state(specs.Array((observations,), jnp.float32)))
    return running_statistics.NestedMeanStd(mean=state.mean, std=state.std)


def _ppo() -> Model:
    nets = ppo.make_ppo_networks(*ANT, preprocess_observations_fn=NORMALISE)
    variables = {
        "normaliser": _normaliser(ANT[0]),
        "policy": jax.eval_shape(nets.policy_network.init, jax.random.key(0)),
        "value": jax.eval_shape(nets.value_network.init, jax.random.key(0)),
    }

    def apply(v: Any, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = nets.policy_network.apply(v["normaliser"], v["policy"], observations)
        return logits, nets.value_network.apply(v["normaliser"], v["value"], observations)

    return apply, variables, (_floats(4, ANT[0]),)


def _sac() -> Model:
    nets = sac.make_sac_networks(
        *ANT,
        preprocess_observations_fn=NORMALISE,
        policy_network_layer_norm=True,
        q_network_layer_norm=True,
    )
    variables = {
        "normaliser": _normaliser(ANT[0]),
        "policy": jax.eval_shape(nets.policy_network.init, jax.random.key(0)),
        "critic": jax.eval_shape(nets.q_network.init, jax.random.key(0)),
    }

    def apply(v: Any, observations: jax.Array, actions: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = nets.policy_network.apply(v["normaliser"], v["policy"], observations)
        return logits, nets.q_network.apply(v["normaliser"], v["critic"], observations, actions)

    return apply, variables, (_floats(4, ANT[0]), _floats(4, ANT[1]))


def simplex_norm(x: jax.Array, simplex: int = 8) -> jax.Array:
    """SimNorm of TD-MPC2: a softmax over each run of `simplex` channels."""
    return nn.softmax(x.reshape(*x.shape[:-1], -1, simplex)).reshape(x.shape)


def two_hot_inverse(logits: jax.Array, low: float = -10.0, high: float = 10.0) -> jax.Array:
    """The scalar that a distribution over symlog bins stands for."""
    x = (nn.softmax(logits) * np.linspace(low, high, logits.shape[-1])).sum(-1)
    return jnp.sign(x) * (jnp.exp(jnp.abs(x)) - 1)


class NormedMLP(nn.Module):
    """Dense layers with LayerNorm and Mish; the last one plain, or with SimNorm."""

    hidden: tuple[int, ...]
    out: int
    simplex: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The last layer's output."""
        for width in self.hidden:
            x = jax.nn.mish(nn.LayerNorm()(nn.Dense(width)(x)))
        x = nn.Dense(self.out)(x)
        return simplex_norm(nn.LayerNorm()(x)) if self.simplex else x


class WorldModel(nn.Module):
    """The world model of TD-MPC2 (Hansen et al. 2024), 5M preset, along a rollout."""

    actions: int
    latent: int = 512
    encoder: int = 256
    hidden: int = 512
    bins: int = 101
    critics: int = 5

    @nn.compact
    def __call__(self, observations: jax.Array, actions: jax.Array) -> dict[str, jax.Array]:
        """Rewards, values and policies along a rollout; actions are (time, batch, actions)."""
        two = (self.hidden, self.hidden)
        dynamics = NormedMLP(two, self.latent, simplex=True, name="dynamics")
        reward = NormedMLP(two, self.bins, name="reward")
        policy = NormedMLP(two, 2 * self.actions, name="policy")
        ensemble = nn.vmap(
            NormedMLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,  # pyright: ignore[reportArgumentType]
            axis_size=self.critics,
        )
        critics = ensemble(two, self.bins, name="critics")
        z = NormedMLP((self.encoder,), self.latent, simplex=True, name="encoder")(observations)
        rewards, policies, values = [], [], []
        for action in actions:
            pair = jnp.concatenate([z, action], -1)
            rewards.append(two_hot_inverse(reward(pair)))
            values.append(two_hot_inverse(critics(pair)).min(0))
            policies.append(policy(z))
            z = dynamics(pair)
        policies.append(policy(z))
        final = jnp.concatenate([z, jnp.tanh(policies[-1][..., : self.actions])], -1)
        values.append(two_hot_inverse(critics(final)).min(0))
        return {"rewards": jnp.stack(rewards), "values": jnp.stack(values), "policies": jnp.stack(policies)}


# The table -------------------------------------------------------------------------------------------------


def _vit_units(width: int, depth: int, heads: int, hidden: int) -> int:
    return width + depth * (heads + hidden)


def _linen_attention(heads: int, size: int) -> int:
    """Linen keeps heads and channels on axes of their own, so channels leave from all heads at once, too."""
    return heads + size + size


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "ViT-B/16 (equimo)",
        "equimo 1.1.0: vit_base_patch16_224, 64×64 images",
        lambda: _equimo(
            lambda: equimo_vit.vit_base_patch16_224(img_size=64, key=jax.random.PRNGKey(0)), 3, 64, 64
        ),
        _vit_units(768, 12, 12, 3072),
        "768 of the stream; per block 12 heads and 3072 neurons",
    ),
    Entry(
        "DINOv3 ViT-S+/16",
        "equimo 1.1.0: dinov3_vits16plus_pretrain_lvd1689m, 64×64 images",
        lambda: _equimo(_dinov3, 3, 64, 64),
        384 + 4 + 12 * (6 + 1536),
        "384 of the stream (with its layer scales); 4 register tokens; per block 6 heads, 1536 gated neurons",
    ),
    Entry(
        "MLLA-T",
        "equimo 1.1.0: Mlla, 64×64 images",
        lambda: _equimo(_mlla, 3, 64, 64),
        4 * 32
        + sum(MLLA_WIDTHS[1:]) * (1 + 4)
        + sum(4 * w * d for w, d in zip(MLLA_WIDTHS, MLLA_DEPTHS, strict=True)),
        "4 stem layers of 32 norm groups, the last of them the first stream; streams 128, 256, 512, 4 × as "
        "many channels in the merges; per block 4 × width. This release drops what its attention computes",
    ),
    Entry(
        "ViT-B/16 (Linen)",
        "own, Flax Linen, 64×64 images",
        lambda: _linen(LinenViT(), _floats(BATCH, 64, 64, 3)),
        768 + 12 * (_linen_attention(12, 64) + 3072),
        "768 of the stream; per block 12 heads, 64 query-key and 64 value channels of them all, 3072 neurons",
    ),
    Entry(
        "Swin-T",
        "own, Flax Linen",
        lambda: _linen(Swin(), _floats(1, 224, 224, 3)),
        _swin_units(),
        "96, 192, 384, 768 of the streams; per block its heads (with their bias columns) and 4 × width",
    ),
    Entry(
        "MLP-Mixer S/16",
        "own, Haiku, 64×64 images",
        lambda: _haiku(mixer, _floats(BATCH, 64, 64, 3)),
        512 + 8 * (256 + 2048),
        "512 of the stream; per block 256 token neurons and 2048 channel neurons",
    ),
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
        lambda: _linen(GPT2(), _tokens(BATCH, 8, vocabulary=50257), np.arange(8)[None]),
        _vit_units(768, 6, 12, 3072),
        "768 of the stream (both embeddings, one tied to the output); per block 12 heads and 3072 neurons",
    ),
    Entry(
        "Scanned transformer",
        "own, Flax Linen, nn.scan over blocks",
        lambda: _linen(ScannedTransformer(), _tokens(BATCH, 6, vocabulary=1000)),
        128 + _linen_attention(4, 32) + 512,
        "128 of the stream; 4 heads, 32 query-key and 32 value channels, 512 neurons, each in all layers",
    ),
    Entry(
        "BERT-small",
        "own, Flax NNX",
        _bert,
        512 + 4 * (_linen_attention(8, 64) + 2048) + 512,
        "512 of the stream, which the transform before the tied output joins; per layer 8 heads, 64 + 64 "
        "channels of all heads, 2048 neurons; pooler 512",
    ),
    Entry(
        "Transformer base",
        "own, Flax Linen",
        lambda: _linen(
            EncoderDecoder(), _tokens(BATCH, 6, vocabulary=37000), _tokens(BATCH, 5, vocabulary=37000, seed=1)
        ),
        512 + 18 * _linen_attention(8, 64) + 12 * 2048,
        "one shared embedding joins both streams: 512; 18 attentions: 8 heads, 64 + 64 channels; 12 × 2048",
    ),
    Entry(
        "Perceiver",
        "own, Flax Linen, rounds share weights",
        lambda: _linen(Perceiver(), _floats(BATCH, 12, 20)),
        16 + 128 + _linen_attention(0, 128) + 3 * (_linen_attention(8, 16) + 128),
        "16 latents (averaged at the end) of 128 channels; cross-attention (its one head stays) 128 + 128; "
        "3 blocks: 8 heads, 16 + 16, 128",
    ),
    Entry(
        "LSTM language model",
        "own, Flax Linen: nn.RNN(nn.OptimizedLSTMCell)",
        lambda: _linen(LinenLSTM(), _tokens(BATCH, 5, vocabulary=1000)),
        96 + 128 + 112,
        "96 of the embedding; 128 and 112 hidden units with their four gate columns and recurrent row",
    ),
    Entry(
        "GRU language model",
        "own, Haiku: hk.dynamic_unroll(hk.GRU)",
        lambda: _haiku(haiku_language_model(hk.GRU, 128), _tokens(BATCH, 5, vocabulary=1000)),
        96 + 128,
        "96 of the embedding; 128 hidden units with their three gate columns and recurrent row",
    ),
    Entry(
        "LSTM language model (Haiku)",
        "own, Haiku: hk.dynamic_unroll(hk.LSTM)",
        lambda: _haiku(haiku_language_model(hk.LSTM, 128), _tokens(BATCH, 5, vocabulary=1000)),
        96 + 128,
        "96 of the embedding; 128 hidden units with their four gate columns and recurrent row",
    ),
    Entry(
        "Convolutional LSTM",
        "own, Flax Linen: nn.RNN(nn.ConvLSTMCell)",
        lambda: _linen(ConvolutionalLSTM(), _floats(BATCH, 4, 8, 8, 1)),
        16 + 12,
        "16 and 12 hidden channels with their four gate channels and recurrent kernels",
    ),
    Entry(
        "PPO policy and value",
        "brax 0.14.2: make_ppo_networks, Ant sizes",
        _ppo,
        4 * 32 + 5 * 256,
        "policy 4 × 32, value 5 × 256",
    ),
    Entry(
        "SAC policy and critics",
        "brax 0.14.2: make_sac_networks with layer norm, Ant sizes",
        _sac,
        2 * 256 + 2 * 2 * 256,
        "policy 2 × 256, two critics of 2 × 256",
    ),
    Entry(
        "TD-MPC2 world model",
        "own, Flax Linen, 5M preset, Ant sizes",
        lambda: _linen(WorldModel(ANT[1]), _floats(BATCH, ANT[0]), _floats(2, BATCH, ANT[1])),
        256 + 512 // 8 + 4 * 2 * 512 + 5 + 2 * 101,
        "encoder 256; 64 simplices of 8 latent channels; dynamics, reward, policy, critics (each across the "
        "ensemble) 2 × 512; 5 critics, of which the least counts; 2 × 101 bins, summed to scalars",
    ),
)
