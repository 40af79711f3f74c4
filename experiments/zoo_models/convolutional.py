"""Convolutional networks of the zoo: dm-haiku's and equimo's as they come, the others written in Flax Linen.

Every `units` is counted from the definition: a residual stream is one set of channels however many layers
write to it; a depthwise convolution's channels are those of its input; what is concatenated keeps its own
units; a grouped convolution and a GroupNorm give up whole groups or positions within groups.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from equimo.layers.norm import LayerNorm2d
from equimo.models.convnext import convnext_t
from equimo.models.mobilenet import mobilenetv3_small

from .builders import BATCH, abstract_equinox, abstract_key, floats, linen
from .convolutional_linen import (
    BLOCKS_50,
    CLASSES,
    DENSENET_BLOCKS,
    DENSENET_TRANSITIONS,
    EDSR,
    EFFICIENTNET_B0,
    MOBILENET_V2,
    REGNET_BLOCKS,
    REGNET_WIDTHS,
    SHUFFLENET_V2,
    UNET_WIDTHS,
    VAE,
    VGG16,
    VGG_16,
    WIDTHS_18,
    AlexNet,
    DenseNet121,
    GroupNormResNet18,
    InvertedResidualNet,
    RegNetY400MF,
    ResNet50,
    ShuffleNetV2,
    Stages,
    UNet,
)
from .entry import Entry, Model

STREAMS_50 = (256, 512, 1024, 2048)


def _images(size: int = 32) -> jax.ShapeDtypeStruct:
    return floats(BATCH, size, size, 3)


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

    variables, static = abstract_equinox(init)

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        model = eqx.combine(variables, static)
        return jax.vmap(lambda image: model(image, key=jax.random.PRNGKey(0), inference=True))(x)

    return apply, variables, (floats(BATCH, 3, 32, 32),)


def _inputs(stages: Stages, stem: int = 32) -> list[tuple[int, int]]:
    """Per inverted residual block its input channels and its expansion."""
    found, channels = [], stem
    for expansion, filters, blocks, _, _ in stages:
        for _ in range(blocks):
            found.append((channels, expansion))
            channels = filters
    return found


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
        linen(ResNet50(), _images()),
        RESNET_50,
        RESNET_50_BY_HAND,
    ),
    Entry(
        "VAE",
        "Flax Linen, as in flax examples/vae",
        linen(VAE(), floats(BATCH, 784), abstract_key()),
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
        linen(DenseNet121(), _images()),
        64 + sum(DENSENET_BLOCKS) * (128 + 32) + sum(DENSENET_TRANSITIONS),
        "stem 64 + 128 inner and 32 new channels in each of 58 layers + transitions 896",
    ),
    Entry(
        "ResNeXt-50 32x4d",
        "Flax Linen, as in torchvision",
        linen(ResNet50(groups=32, base_width=4), _images()),
        64
        + sum(STREAMS_50)
        + sum(n * _grouped(32, c // 2 // 32) for n, c in zip(BLOCKS_50, STREAMS_50, strict=True)),
        "stem 64 + streams 3,840 + per block 32 groups, or positions before and after, if those are more",
    ),
    Entry(
        "EfficientNet-B0",
        "Flax Linen, as in Tan and Le",
        linen(InvertedResidualNet(EFFICIENTNET_B0, nn.silu, True), _images()),
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
        linen(InvertedResidualNet(MOBILENET_V2, nn.relu6, False), _images()),
        32
        + sum(channels for _, channels, *_ in MOBILENET_V2)
        + sum(c * t for c, t in _inputs(MOBILENET_V2) if t > 1)
        + 1280,
        "stem 32 + streams 712 + expansions + head 1,280",
    ),
    Entry(
        "RegNetY-400MF",
        "Flax Linen, as in torchvision",
        linen(RegNetY400MF(), _images()),
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
        "ShuffleNet v2",
        "Flax Linen, as in Ma et al.",
        linen(ShuffleNetV2(), _images(64)),
        24 + sum(width // 2 * (2 * blocks + 1) for width, blocks in SHUFFLENET_V2) + 1024,
        "stem 24 + the channels of every 1×1 convolution, three in the first block of a stage and two in the "
        "others + head 1,024",
    ),
    Entry(
        "U-Net",
        "Flax Linen, as in Ronneberger et al., with batch normalization",
        linen(UNet(), _images()),
        2 * sum(UNET_WIDTHS) + 2 * 1024 + 3 * sum(UNET_WIDTHS),
        "two convolutions per level down, two at the bottom, three per level up (one transposed)",
    ),
    Entry(
        "VGG-16 BN",
        "Flax Linen, as in torchvision",
        linen(VGG16(), _images(64)),
        sum(sum(widths) for widths in VGG_16) + 2 * 4096,
        "13 convolutions (4,224) + two dense layers of 4,096; a channel takes its flattened rows along",
    ),
    Entry(
        "AlexNet",
        "Flax Linen, as in Krizhevsky et al.",
        linen(AlexNet(), _images(99)),
        (96 + 256 + 384 + 384 + 256) // 2 + 2 * 4096,
        "all five convolutions are in two groups or feed one that is: the same position in both; 2 × 4,096",
    ),
    Entry(
        "EDSR baseline ×4",
        "Flax Linen, as in Lim et al.",
        linen(EDSR(), _images(8)),
        64 + 16 * 64 + 2 * 64,
        "one stream of 64 + an inner width per block + 64 per pixel shuffle, four channels each",
    ),
    Entry(
        "ResNet-18 GroupNorm",
        "Flax Linen, as in Wu and He",
        linen(GroupNormResNet18(), _images()),
        3 * sum(_normed(width, 32) for width in WIDTHS_18),
        "32 groups in each of 4 streams and 8 inner widths",
    ),
)
