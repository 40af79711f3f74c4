# ruff: noqa: D102 (a Flax module is documented as a class)
"""Convolutional networks of the zoo that are written in Flax Linen, and the numbers that define them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

CLASSES = 1000
BLOCKS_50 = (3, 4, 6, 3)
WIDTHS_18 = (64, 128, 256, 512)


class Bottleneck(nn.Module):
    """The bottleneck block of ResNet v1.5 and ResNeXt, with batch normalization."""

    filters: int
    strides: int
    groups: int = 1
    base_width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=True, momentum=0.9, epsilon=1e-5)
        inner = self.filters * self.base_width // 64 * self.groups
        y = nn.relu(norm()(conv(inner, (1, 1))(x)))
        y = conv(inner, (3, 3), self.strides, feature_group_count=self.groups)(y)
        y = nn.relu(norm()(y))
        y = norm(scale_init=nn.initializers.zeros_init())(conv(self.filters * 4, (1, 1))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(conv(self.filters * 4, (1, 1), self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 as in Flax's ImageNet example; with 32 groups of base width 4, ResNeXt-50 32x4d."""

    groups: int = 1
    base_width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(64, (7, 7), 2, padding=[(3, 3), (3, 3)], use_bias=False, name="conv_init")(x)
        x = nn.BatchNorm(use_running_average=True, momentum=0.9, epsilon=1e-5, name="bn_init")(x)
        x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(BLOCKS_50):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(64 * 2**stage, strides, self.groups, self.base_width)(x)
        return nn.Dense(CLASSES)(jnp.mean(x, (1, 2)))


class GroupNormResNet18(nn.Module):
    """ResNet-18 with GroupNorm of 32 groups in the place of batch normalization."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.GroupNorm, num_groups=32)
        x = nn.relu(norm()(conv(64, (7, 7), 2)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, width in enumerate(WIDTHS_18):
            for block in range(2):
                strides = 2 if stage > 0 and block == 0 else 1
                y = nn.relu(norm()(conv(width, (3, 3), strides)(x)))
                y = norm()(conv(width, (3, 3))(y))
                if x.shape != y.shape:
                    x = norm()(conv(width, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(CLASSES)(jnp.mean(x, (1, 2)))


class Encoder(nn.Module):
    """The encoder of Flax's VAE example."""

    latents: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.relu(nn.Dense(500, name="fc1")(x))
        return nn.Dense(self.latents, name="fc2_mean")(x), nn.Dense(self.latents, name="fc2_logvar")(x)


class Decoder(nn.Module):
    """The decoder of Flax's VAE example."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        return nn.Dense(784, name="fc2")(nn.relu(nn.Dense(500, name="fc1")(z)))


class VAE(nn.Module):
    """The variational autoencoder of Flax's VAE example."""

    latents: int = 20

    def setup(self) -> None:
        self.encoder = Encoder(self.latents)
        self.decoder = Decoder()

    def __call__(self, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, logvar = self.encoder(x)
        std = jnp.exp(0.5 * logvar)
        z = mean + jax.random.normal(key, logvar.shape) * std
        return self.decoder(z), mean, logvar


DENSENET_BLOCKS = (6, 12, 24, 16)
DENSENET_TRANSITIONS = (128, 256, 512)


class DenseNet121(nn.Module):
    """DenseNet-121: growth 32, bottlenecks of 4 growths, transitions that halve."""

    growth: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)
        x = nn.relu(norm()(conv(64, (7, 7), 2, padding=3)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, layers in enumerate(DENSENET_BLOCKS):
            for _ in range(layers):
                y = conv(4 * self.growth, (1, 1))(nn.relu(norm()(x)))
                y = conv(self.growth, (3, 3))(nn.relu(norm()(y)))
                x = jnp.concatenate([x, y], -1)
            if stage < len(DENSENET_TRANSITIONS):
                x = conv(x.shape[-1] // 2, (1, 1))(nn.relu(norm()(x)))
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(CLASSES)(jnp.mean(nn.relu(norm()(x)), (1, 2)))


# (expansion, channels, blocks, stride of the first, kernel) per stage
EFFICIENTNET_B0 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
MOBILENET_V2 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)
Stages = Sequence[tuple[int, int, int, int, int]]


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation with 1x1 convolutions."""

    squeezed: int
    act: Any = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s = self.act(nn.Conv(self.squeezed, (1, 1), name="reduce")(x.mean((1, 2), keepdims=True)))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1), name="expand")(s))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2 and, with squeeze-and-excitation, of EfficientNet."""

    expansion: int
    filters: int
    strides: int
    kernel: int
    act: Any
    squeeze_excite: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=True, momentum=0.99, epsilon=1e-3)
        channels = x.shape[-1]
        y = x
        if self.expansion > 1:
            y = self.act(norm()(conv(channels * self.expansion, (1, 1))(y)))
        inner = y.shape[-1]
        y = conv(inner, (self.kernel, self.kernel), self.strides, feature_group_count=inner)(y)
        y = self.act(norm()(y))
        if self.squeeze_excite:
            y = SqueezeExcite(channels // 4, self.act)(y)
        y = norm()(conv(self.filters, (1, 1))(y))
        return x + y if self.strides == 1 and channels == self.filters else y


class InvertedResidualNet(nn.Module):
    """MobileNetV2 (ReLU6) or EfficientNet-B0 (SiLU, squeeze-and-excitation)."""

    stages: Stages
    act: Any
    squeeze_excite: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=True, momentum=0.99, epsilon=1e-3)
        x = self.act(norm()(conv(32, (3, 3), 2)(x)))
        for expansion, filters, blocks, strides, kernel in self.stages:
            for block in range(blocks):
                step = strides if block == 0 else 1
                x = InvertedResidual(expansion, filters, step, kernel, self.act, self.squeeze_excite)(x)
        x = self.act(norm()(conv(1280, (1, 1))(x)))
        return nn.Dense(CLASSES)(jnp.mean(x, (1, 2)))


REGNET_WIDTHS = (48, 104, 208, 440)
REGNET_BLOCKS = (1, 3, 6, 6)


class RegNetY400MF(nn.Module):
    """RegNetY-400MF: stem 32, group width 8, squeeze-and-excitation of a quarter of the block's input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)
        x = nn.relu(norm()(conv(32, (3, 3), 2)(x)))
        for width, blocks in zip(REGNET_WIDTHS, REGNET_BLOCKS, strict=True):
            for block in range(blocks):
                strides = 2 if block == 0 else 1
                y = nn.relu(norm()(conv(width, (1, 1))(x)))
                y = conv(width, (3, 3), strides, feature_group_count=width // 8)(y)
                y = SqueezeExcite(round(x.shape[-1] / 4))(nn.relu(norm()(y)))
                y = norm()(conv(width, (1, 1))(y))
                if x.shape != y.shape:
                    x = norm()(conv(width, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(CLASSES)(jnp.mean(x, (1, 2)))


# Width and blocks of each stage.
SHUFFLENET_V2 = ((116, 4), (232, 8), (464, 4))


class ShuffleNetV2(nn.Module):
    """ShuffleNet v2, width 1: half of the channels go through a block, then both halves are shuffled."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)

        def pointwise(x: jax.Array, width: int) -> jax.Array:
            return nn.relu(norm()(nn.Conv(width, (1, 1), use_bias=False)(x)))

        def depthwise(x: jax.Array, strides: int) -> jax.Array:
            width = x.shape[-1]
            return norm()(nn.Conv(width, (3, 3), strides, feature_group_count=width, use_bias=False)(x))

        x = nn.relu(norm()(nn.Conv(24, (3, 3), 2, use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for width, blocks in SHUFFLENET_V2:
            for block in range(blocks):
                half, strides = width // 2, 2 if block == 0 else 1
                past, y = (x, x) if block == 0 else jnp.split(x, 2, -1)
                if block == 0:
                    past = pointwise(depthwise(past, strides), half)
                y = pointwise(depthwise(pointwise(y, half), strides), half)
                x = jnp.concatenate([past, y], -1)
                x = x.reshape(*x.shape[:-1], 2, half).swapaxes(-1, -2).reshape(x.shape)
        return nn.Dense(CLASSES)(jnp.mean(pointwise(x, 1024), (1, 2)))


UNET_WIDTHS = (64, 128, 256, 512)


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. with same padding and batch normalization, for two classes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def twice(x: jax.Array, width: int) -> jax.Array:
            for _ in range(2):
                x = nn.Conv(width, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            return x

        skips = []
        for width in UNET_WIDTHS:
            x = twice(x, width)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = twice(x, 1024)
        for width, skip in zip(reversed(UNET_WIDTHS), reversed(skips), strict=True):
            x = nn.ConvTranspose(width, (2, 2), strides=(2, 2))(x)
            x = twice(jnp.concatenate([skip, x], -1), width)
        return nn.Conv(2, (1, 1))(x)


VGG_16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG-16 with batch normalization, in inference mode."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for widths in VGG_16:
            for width in widths:
                x = nn.Conv(width, (3, 3))(x)
                x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.Dropout(0.5, deterministic=True)(nn.relu(nn.Dense(4096)(x)))
        return nn.Dense(CLASSES)(x)


def response_norm(x: jax.Array) -> jax.Array:
    """Local response normalization: by the squares of five neighbouring channels."""
    window, ones = (1, 1, 1, 5), (1, 1, 1, 1)
    near = jax.lax.reduce_window(x**2, 0.0, jax.lax.add, window, ones, "SAME")
    return x / (2 + 1e-4 * near) ** 0.75


class AlexNet(nn.Module):
    """AlexNet, with its convolutions in two groups and its local response normalization."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def pool(x: jax.Array) -> jax.Array:
            return nn.max_pool(x, (3, 3), strides=(2, 2))

        x = pool(response_norm(nn.relu(nn.Conv(96, (11, 11), 4, padding="VALID")(x))))
        x = pool(response_norm(nn.relu(nn.Conv(256, (5, 5), feature_group_count=2)(x))))
        x = nn.relu(nn.Conv(384, (3, 3))(x))
        x = nn.relu(nn.Conv(384, (3, 3), feature_group_count=2)(x))
        x = pool(nn.relu(nn.Conv(256, (3, 3), feature_group_count=2)(x)))
        x = x.reshape(x.shape[0], -1)
        for width in (4096, 4096):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(CLASSES)(x)


class EDSR(nn.Module):
    """EDSR's baseline for a factor of 4: 16 residual blocks of 64 channels, two pixel shuffles."""

    features: int = 64
    blocks: int = 16
    shuffles: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, kernel_size=(3, 3))
        mean = np.array([0.4488, 0.4371, 0.4040])
        head = conv(self.features)(x - mean)
        x = head
        for _ in range(self.blocks):
            x = x + conv(self.features)(nn.relu(conv(self.features)(x)))
        x = head + conv(self.features)(x)
        for _ in range(self.shuffles):
            x = conv(4 * self.features)(x)
            n, h, w, _ = x.shape
            x = x.reshape(n, h, w, self.features, 2, 2).transpose(0, 1, 4, 2, 5, 3)
            x = x.reshape(n, 2 * h, 2 * w, self.features)
        return conv(3)(x) + mean
