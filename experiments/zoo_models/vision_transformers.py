"""Vision transformers and mixers: equimo's as they come, the others in Flax Linen and Haiku."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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

from .blocks import attention_block, attention_units, mlp_block, transformer_units
from .builders import BATCH, Build, abstract_equinox, floats, haiku, linen
from .entry import Entry, Model


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


def _equimo(make: Callable[[], eqx.Module], *image: int) -> Build:
    def build() -> Model:
        arrays, static = abstract_equinox(make)

        def apply(variables: Any, images: jax.Array) -> jax.Array:
            whole = eqx.combine(variables, static)
            with _wide(images.dtype, equimo_attention, equimo_norm):
                return jax.vmap(lambda x: whole(x, key=jax.random.PRNGKey(0), inference=True))(images)

        return apply, arrays, (floats(BATCH, *image),)

    return build


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
            x = mlp_block(attention_block(x, self.heads), self.hidden)
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
        return mlp_block(x + y, 4 * channels)


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


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "ViT-B/16 (equimo)",
        "equimo 1.1.0: vit_base_patch16_224, 64×64 images",
        _equimo(lambda: equimo_vit.vit_base_patch16_224(img_size=64, key=jax.random.PRNGKey(0)), 3, 64, 64),
        transformer_units(768, 12, 12, 3072),
        "768 of the stream; per block 12 heads and 3072 neurons",
    ),
    Entry(
        "DINOv3 ViT-S+/16",
        "equimo 1.1.0: dinov3_vits16plus_pretrain_lvd1689m, 64×64 images",
        _equimo(_dinov3, 3, 64, 64),
        384 + 4 + 12 * (6 + 1536),
        "384 of the stream (with its layer scales); 4 register tokens; per block 6 heads, 1536 gated neurons",
    ),
    Entry(
        "MLLA-T",
        "equimo 1.1.0: Mlla, 64×64 images",
        _equimo(_mlla, 3, 64, 64),
        4 * 32
        + sum(MLLA_WIDTHS[1:]) * (1 + 4)
        + sum(4 * w * d for w, d in zip(MLLA_WIDTHS, MLLA_DEPTHS, strict=True)),
        "4 stem layers of 32 norm groups, the last of them the first stream; streams 128, 256, 512, 4 × as "
        "many channels in the merges; per block 4 × width. This release drops what its attention computes",
    ),
    Entry(
        "ViT-B/16 (Linen)",
        "own, Flax Linen, 64×64 images",
        linen(LinenViT(), floats(BATCH, 64, 64, 3)),
        768 + 12 * (attention_units(12, 64) + 3072),
        "768 of the stream; per block 12 heads, 64 query-key and 64 value channels of them all, 3072 neurons",
    ),
    Entry(
        "Swin-T",
        "own, Flax Linen",
        linen(Swin(), floats(1, 224, 224, 3)),
        _swin_units(),
        "96, 192, 384, 768 of the streams; per block its heads (with their bias columns) and 4 × width",
    ),
    Entry(
        "MLP-Mixer S/16",
        "own, Haiku, 64×64 images",
        haiku(mixer, floats(BATCH, 64, 64, 3)),
        512 + 8 * (256 + 2048),
        "512 of the stream; per block 256 token neurons and 2048 channel neurons",
    ),
)
