"""ResNet-50 in plain JAX: what `peers/torch_discovery.py` has in plain PyTorch, layer by layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .entry import Model

STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
"""Blocks, inner width and stride of each stage."""


def resnet50() -> Model:
    """ResNet-50 v1.5 at 224×224."""
    return apply, jax.eval_shape(init), (_shape(1, 224, 224, 3),)


def init() -> Any:
    """Its variables, all zero."""
    blocks, width = [], 64
    for count, inner, _ in STAGES:
        for number in range(count):
            blocks.append(
                {
                    "conv1": jnp.zeros((1, 1, width, inner)),
                    "norm1": _norm(inner),
                    "conv2": jnp.zeros((3, 3, inner, inner)),
                    "norm2": _norm(inner),
                    "conv3": jnp.zeros((1, 1, inner, 4 * inner)),
                    "norm3": _norm(4 * inner),
                }
            )
            if number == 0:
                blocks[-1] |= {"project": jnp.zeros((1, 1, width, 4 * inner)), "norm": _norm(4 * inner)}
            width = 4 * inner
    stem = {"conv": jnp.zeros((7, 7, 3, 64)), "norm": _norm(64)}
    return {"stem": stem, "blocks": blocks, "head": {"w": jnp.zeros((width, 1000)), "b": jnp.zeros(1000)}}


def apply(variables: Any, x: jax.Array) -> jax.Array:
    """Class scores of images (batch, height, width, 3), with running statistics."""
    stem, head = variables["stem"], variables["head"]
    x = jax.nn.relu(normalised(conv(x, stem["conv"], 2, 3), stem["norm"]))
    around = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)
    strides = [stride if number == 0 else 1 for count, _, stride in STAGES for number in range(count)]
    for block, stride in zip(variables["blocks"], strides, strict=True):
        x = bottleneck(x, block, stride)
    return x.mean((1, 2)) @ head["w"] + head["b"]


def bottleneck(x: jax.Array, block: Any, stride: int) -> jax.Array:
    """1×1, 3×3, 1×1 with batch norms, and a projection where the shape changes."""
    y = jax.nn.relu(normalised(conv(x, block["conv1"]), block["norm1"]))
    y = jax.nn.relu(normalised(conv(y, block["conv2"], stride, 1), block["norm2"]))
    y = normalised(conv(y, block["conv3"]), block["norm3"])
    if "project" in block:
        x = normalised(conv(x, block["project"], stride), block["norm"])
    return jax.nn.relu(x + y)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolution of (batch, height, width, channels) with (height, width, in, out)."""
    around = ((padding, padding),) * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normalised(x: jax.Array, norm: Any) -> jax.Array:
    """Batch norm by running statistics."""
    return (x - norm["mean"]) * (norm["scale"] * lax.rsqrt(norm["var"] + 1e-5)) + norm["bias"]


def _norm(width: int) -> dict[str, jax.Array]:
    return {name: jnp.zeros(width) for name in ("mean", "var", "scale", "bias")}


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
