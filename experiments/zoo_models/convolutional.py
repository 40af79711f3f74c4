# ruff: noqa: D102 (a Flax module is documented as a class)
"""Convolutional networks of the zoo: dm-haiku's and equimo's as they come, the others written in Flax Linen.

Every `units` is counted from the definition: a residual stream is one set of channels however many layers
write to it; a depthwise convolution's channels are those of its input; what is concatenated keeps its own
units; a grouped convolution and a GroupNorm give up whole groups or positions within groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from equimo.layers.norm import LayerNorm2d
from equimo.models.convnext import convnext_t
from equimo.models.mobilenet import mobilenetv3_small

from .entry import Entry, Model

BATCH = 2
CLASSES = 1000
STREAMS_50 = (256, 512, 1024, 2048)
BLOCKS_50 = (3, 4, 6, 3)
WIDTHS_18 = (64, 128, 256, 512)


def _images(size: int = 32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.float32)


def _linen(module: nn.Module, *args: Any) -> Model:
    variables = jax.eval_shape(module.init, jax.random.key(0), *args)
    return module.apply, variables, args


def _haiku(network: type[hk.Module], **settings: Any) -> Model:
    def forward(x: jax.Array, is_training: bool) -> jax.Array:
        return network(num_classes=CLASSES, **settings)(x, is_training)

    transformed = hk.transform_with_state(forward)
    x = _images()
    params, state = jax.eval_shape(partial(transformed.init, is_training=True), jax.random.PRNGKey(0), x)
    # Integers have no gradient, and inference never reads the moving averages' step counter.
    state = hk.data_structures.filter(lambda module, name, value: name != "counter", state)

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        return transformed.apply(variables["params"], variables["state"], None, x, is_training=False)[0]

    return apply, {"params": params, "state": state}, (x,)


class _ChannelNorm(eqx.Module):
    """equimo's `LayerNorm2d` without its cast to float32: the law is measured in float64."""

    weight: jax.Array
    bias: jax.Array
    eps: float = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        mean = x.mean(0, keepdims=True)
        var = jnp.square(x - mean).mean(0, keepdims=True)
        normed = (x - mean) * jax.lax.rsqrt(var + self.eps)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


def _equimo(create: Any) -> Model:
    def init() -> Any:
        model = create(key=jax.random.PRNGKey(0), inference_mode=True)

        def widened(module: Any) -> Any:
            if isinstance(module, LayerNorm2d):
                return _ChannelNorm(module.weight, module.bias, module.eps)
            return module

        return jax.tree.map(widened, model, is_leaf=lambda m: isinstance(m, LayerNorm2d))

    abstract = eqx.filter_eval_shape(init)
    variables, static = eqx.partition(abstract, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        model = eqx.combine(variables, static)
        return jax.vmap(lambda image: model(image, key=jax.random.PRNGKey(0), inference=True))(x)

    return apply, variables, (jax.ShapeDtypeStruct((BATCH, 3, 32, 32), jnp.float32),)


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


def _vae() -> Model:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return _linen(VAE(), jax.ShapeDtypeStruct((BATCH, 784), jnp.float32), key)


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


def _inputs(stages: Stages, stem: int = 32) -> list[tuple[int, int]]:
    """Per inverted residual block its input channels and its expansion."""
    found, channels = [], stem
    for expansion, filters, blocks, _, _ in stages:
        for _ in range(blocks):
            found.append((channels, expansion))
            channels = filters
    return found


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


def _grouped(groups: int, width: int) -> int:
    """Units around a grouped convolution of equal in and out width: groups, or positions on either side."""
    return max(groups, 2 * width)


def _normed(channels: int, groups: int) -> int:
    """Units of channels under a GroupNorm: groups, or positions within a group."""
    return max(groups, channels // groups)


def _equimo_normed(channels: int) -> int:
    """The same with equimo's number of groups: the largest power of two, up to 32, that divides."""
    return _normed(channels, max(g for g in (1, 2, 4, 8, 16, 32) if channels % g == 0))


# (input channels, expanded channels, stride, squeeze-and-excitation) per block
MOBILENET_V3_SMALL = (
    (16, 16, 2, True),
    (24, 72, 2, False),
    (24, 88, 1, False),
    (40, 96, 2, True),
    (40, 240, 1, True),
    (40, 240, 1, True),
    (48, 120, 1, True),
    (48, 144, 1, True),
    (96, 288, 2, True),
    (96, 576, 1, True),
    (96, 576, 1, True),
)


def _mobilenet_v3_units() -> int:
    units, outputs = _equimo_normed(16), [block[0] for block in MOBILENET_V3_SMALL[1:]] + [1280]
    for (channels, inner, stride, squeezed), out in zip(MOBILENET_V3_SMALL, outputs, strict=True):
        units += _equimo_normed(inner) + (inner if squeezed else 0)
        units += 0 if stride == 1 and channels == out else _equimo_normed(out)
    return units


CONVNEXT_DIMS, CONVNEXT_BLOCKS = (96, 192, 384, 768), (3, 3, 9, 3)
RESNET_50 = 64 + sum(STREAMS_50) + sum(2 * n * (c // 4) for n, c in zip(BLOCKS_50, STREAMS_50, strict=True))
RESNET_50_BY_HAND = "stem 64 + a stream per stage (3,840) + two inner widths per block (7,552)"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "ResNet-50 v1",
        "dm-haiku: hk.nets.ResNet50",
        partial(_haiku, hk.nets.ResNet50),
        RESNET_50,
        RESNET_50_BY_HAND,
    ),
    Entry(
        "ResNet-50 v2",
        "dm-haiku: hk.nets.ResNet50(resnet_v2=True)",
        partial(_haiku, hk.nets.ResNet50, resnet_v2=True),
        RESNET_50,
        RESNET_50_BY_HAND,
    ),
    Entry(
        "ResNet-18",
        "dm-haiku: hk.nets.ResNet18",
        partial(_haiku, hk.nets.ResNet18),
        sum(WIDTHS_18) + 2 * sum(WIDTHS_18),
        "a stream per stage (960; the stem writes to the first) + one inner width per block (1,920)",
    ),
    Entry(
        "MobileNetV1",
        "dm-haiku: hk.nets.MobileNetV1",
        partial(_haiku, hk.nets.MobileNetV1),
        32 + 64 + 2 * 128 + 2 * 256 + 6 * 512 + 2 * 1024,
        "stem 32 + the outputs of 13 pointwise convolutions; depthwise channels are their input's",
    ),
    Entry(
        "ResNet-50 (Flax)",
        "Flax Linen, as in flax examples/imagenet",
        lambda: _linen(ResNet50(), _images()),
        RESNET_50,
        RESNET_50_BY_HAND,
    ),
    Entry(
        "VAE",
        "Flax Linen, as in flax examples/vae",
        _vae,
        500 + 500,
        "both hidden layers of 500; the 20 latents stay, for mean and log-variance are outputs",
    ),
    Entry(
        "ConvNeXt-T",
        "equimo: convnext_t (LayerNorm2d without its cast to float32)",
        lambda: _equimo(convnext_t),
        sum(CONVNEXT_DIMS) + sum(n * 4 * d for n, d in zip(CONVNEXT_BLOCKS, CONVNEXT_DIMS, strict=True)),
        "a stream per stage (1,440) + the fourfold inner width of every block (26,496)",
    ),
    Entry(
        "MobileNetV3-Small",
        "equimo: mobilenetv3_small (GroupNorm)",
        lambda: _equimo(mobilenetv3_small),
        _mobilenet_v3_units(),
        "stem, streams and expansions, each in groups of its GroupNorm or positions within + SE widths",
    ),
    Entry(
        "DenseNet-121",
        "Flax Linen, as in Huang et al.",
        lambda: _linen(DenseNet121(), _images()),
        64 + sum(DENSENET_BLOCKS) * (128 + 32) + sum(DENSENET_TRANSITIONS),
        "stem 64 + 128 inner and 32 new channels in each of 58 layers + transitions 896",
    ),
    Entry(
        "ResNeXt-50 32x4d",
        "Flax Linen, as in torchvision",
        lambda: _linen(ResNet50(groups=32, base_width=4), _images()),
        64
        + sum(STREAMS_50)
        + sum(n * _grouped(32, c // 2 // 32) for n, c in zip(BLOCKS_50, STREAMS_50, strict=True)),
        "stem 64 + streams 3,840 + per block 32 groups, or positions before and after, if those are more",
    ),
    Entry(
        "EfficientNet-B0",
        "Flax Linen, as in Tan and Le",
        lambda: _linen(InvertedResidualNet(EFFICIENTNET_B0, nn.silu, True), _images()),
        32
        + sum(channels for _, channels, *_ in EFFICIENTNET_B0)
        + sum(c * t for c, t in _inputs(EFFICIENTNET_B0) if t > 1)
        + sum(c // 4 for c, _ in _inputs(EFFICIENTNET_B0))
        + 1280,
        "stem 32 + streams 784 + expansions + a quarter of each block's input for SE + head 1,280",
    ),
    Entry(
        "MobileNetV2",
        "Flax Linen, as in Sandler et al.",
        lambda: _linen(InvertedResidualNet(MOBILENET_V2, nn.relu6, False), _images()),
        32
        + sum(channels for _, channels, *_ in MOBILENET_V2)
        + sum(c * t for c, t in _inputs(MOBILENET_V2) if t > 1)
        + 1280,
        "stem 32 + streams 712 + expansions + head 1,280",
    ),
    Entry(
        "RegNetY-400MF",
        "Flax Linen, as in torchvision",
        lambda: _linen(RegNetY400MF(), _images()),
        32
        + sum(REGNET_WIDTHS)
        + sum(n * _grouped(w // 8, 8) for n, w in zip(REGNET_BLOCKS, REGNET_WIDTHS, strict=True))
        + sum(
            round(before / 4) + (n - 1) * round(w / 4)
            for before, n, w in zip((32, *REGNET_WIDTHS), REGNET_BLOCKS, REGNET_WIDTHS, strict=False)
        ),
        "stem 32 + streams 800 + per block groups of 8 (or positions before and after) and the SE width",
    ),
    Entry(
        "U-Net",
        "Flax Linen, as in Ronneberger et al., with batch normalization",
        lambda: _linen(UNet(), _images()),
        2 * sum(UNET_WIDTHS) + 2 * 1024 + 3 * sum(UNET_WIDTHS),
        "two convolutions per level down, two at the bottom, three per level up (one transposed)",
    ),
    Entry(
        "VGG-16 BN",
        "Flax Linen, as in torchvision",
        lambda: _linen(VGG16(), _images(64)),
        sum(sum(widths) for widths in VGG_16) + 2 * 4096,
        "13 convolutions (4,224) + two dense layers of 4,096; a channel takes its flattened rows along",
    ),
    Entry(
        "EDSR baseline ×4",
        "Flax Linen, as in Lim et al.",
        lambda: _linen(EDSR(), _images(8)),
        64 + 16 * 64 + 2 * 64,
        "one stream of 64 + an inner width per block + 64 per pixel shuffle, four channels each",
    ),
    Entry(
        "ResNet-18 GroupNorm",
        "Flax Linen, as in Wu and He",
        lambda: _linen(GroupNormResNet18(), _images()),
        3 * sum(_normed(width, 32) for width in WIDTHS_18),
        "32 groups in each of 4 streams and 8 inner widths",
    ),
)
