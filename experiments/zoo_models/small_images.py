"""Small nets on images, one structure each."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx


class MultipleInputs(eqx.Module):
    """An image and a vector, each with an encoder of its own, joined."""

    convolution: eqx.nn.Conv2d
    vector: eqx.nn.Linear
    joint: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.convolution = eqx.nn.Conv2d(3, 8, 3, 2, 1, key=keys[0])
        self.vector = eqx.nn.Linear(5, 12, key=keys[1])
        self.joint = eqx.nn.Linear(8 + 12 + 2, 10, key=keys[2])
        self.head = eqx.nn.Linear(10, 3, key=keys[3])

    def __call__(self, image: jax.Array, vector: jax.Array, extra: jax.Array) -> jax.Array:
        """Logits of one example."""
        pooled = jax.nn.relu(self.convolution(image)).mean((1, 2))
        joint = jnp.concatenate([pooled, jax.nn.relu(self.vector(vector)), extra])
        return self.head(jax.nn.relu(self.joint(joint)))


class C2f(nn.Module):
    """The C2f block of YOLOv8: split, residual bottlenecks, and everything concatenated."""

    width: int = 16
    bottlenecks: int = 2

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of NHWC images."""

        def conv(x: jax.Array, width: int, size: int) -> jax.Array:
            x = nn.Conv(width, (size, size), use_bias=False)(x)
            return nn.silu(nn.BatchNorm(use_running_average=True)(x))

        x = conv(images, self.width, 3)
        parts = list(jnp.split(conv(x, 2 * self.width, 1), 2, -1))
        for _ in range(self.bottlenecks):
            y = parts[-1]
            parts.append(y + conv(conv(y, self.width, 3), self.width, 3))
        x = conv(jnp.concatenate(parts, -1), 24, 1)
        return nn.Dense(4)(x.mean((1, 2)))


class OtherAxis(nn.Module):
    """Concatenation along height, and of a learned token along time: both sides share their channels."""

    @nn.compact
    def __call__(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """Logits of two NHWC images."""
        both = jnp.concatenate([nn.Conv(10, (3, 3))(left), nn.Conv(10, (1, 1))(right)], axis=1)
        x = nn.relu(nn.Conv(12, (3, 3), (2, 2))(both)).reshape(left.shape[0], -1, 12)
        token = self.param("token", nn.initializers.ones, (1, 1, 12))
        x = jnp.concatenate([jnp.broadcast_to(token, (left.shape[0], 1, 12)), x], axis=1)
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)).max(1))


class Flattened(nnx.Module):
    """Convolution, pooling, flatten, dense: one channel holds many rows of the dense kernel."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 6, (3, 3), rngs=rngs)
        self.second = nnx.Conv(6, 8, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(2 * 2 * 8, 10, rngs=rngs)
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch of NHWC images."""
        x = nnx.max_pool(nnx.relu(self.first(x)), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.relu(self.second(x)), (2, 2), (2, 2))
        return self.head(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))


def unflattened(z: jax.Array) -> jax.Array:
    """Dense, unflatten, transposed convolutions, flatten, dense."""
    x = jax.nn.relu(hk.Linear(2 * 2 * 8)(z)).reshape(-1, 2, 2, 8)
    x = jax.nn.relu(hk.Conv2DTranspose(6, 3, 2)(x))
    x = jax.nn.relu(hk.Conv2DTranspose(4, 3, 2)(x))
    return hk.Linear(5)(x.reshape(x.shape[0], -1))


def one_channel(x: jax.Array) -> jax.Array:
    """Convolutions with one channel in and one channel between."""
    x = jax.nn.relu(hk.Conv2D(1, 3)(x))
    x = jax.nn.relu(hk.Conv2D(6, 3, stride=2)(x))
    x = hk.Conv2D(1, 1)(x)
    return hk.Linear(3)(x.reshape(x.shape[0], -1))


class ShuffleUnit(nn.Module):
    """A ShuffleNet v1 unit: grouped 1×1, channel shuffle, depthwise 3×3, grouped 1×1, residual."""

    groups: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of NHWC images."""
        conv, groups = nn.Conv, self.groups
        x = conv(24, (3, 3))(images)
        y = nn.relu(conv(12, (1, 1), feature_group_count=groups, use_bias=False)(x))
        y = y.reshape(*y.shape[:3], groups, 12 // groups).swapaxes(3, 4).reshape(y.shape)
        y = conv(12, (3, 3), feature_group_count=12, use_bias=False)(y)
        y = conv(24, (1, 1), feature_group_count=groups, use_bias=False)(y)
        return nn.Dense(4)(nn.relu(x + y).mean((1, 2)))


def fire(images: jax.Array) -> jax.Array:
    """Two fire modules of SqueezeNet, then its convolutional classifier."""

    def module(x: jax.Array, squeeze: int, expand: int) -> jax.Array:
        x = jax.nn.relu(hk.Conv2D(squeeze, 1)(x))
        one, three = jax.nn.relu(hk.Conv2D(expand, 1)(x)), jax.nn.relu(hk.Conv2D(expand, 3)(x))
        return jnp.concatenate([one, three], -1)

    x = jax.nn.relu(hk.Conv2D(8, 3, stride=2)(images))
    x = hk.max_pool(module(x, 4, 6), (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    return jax.nn.relu(hk.Conv2D(5, 1)(module(x, 5, 7))).mean((1, 2))


class Inception(nnx.Module):
    """An Inception block: 1×1, 1×1–3×3, 1×1–5×5, pooling–1×1."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.one = nnx.Conv(8, 4, (1, 1), rngs=rngs)
        self.three_in = nnx.Conv(8, 5, (1, 1), rngs=rngs)
        self.three = nnx.Conv(5, 6, (3, 3), rngs=rngs)
        self.five_in = nnx.Conv(8, 3, (1, 1), rngs=rngs)
        self.five = nnx.Conv(3, 4, (5, 5), rngs=rngs)
        self.pooled = nnx.Conv(8, 7, (1, 1), rngs=rngs)
        self.head = nnx.Linear(4 + 6 + 4 + 7, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch of NHWC images."""
        x = nnx.relu(self.stem(x))
        branches = [
            self.one(x),
            self.three(nnx.relu(self.three_in(x))),
            self.five(nnx.relu(self.five_in(x))),
            self.pooled(nnx.max_pool(x, (3, 3), (1, 1), "SAME")),
        ]
        return self.head(nnx.relu(jnp.concatenate(branches, -1)).mean((1, 2)))


class ChannelAttention(eqx.Module):
    """Efficient channel attention (Wang et al. 2020): a gate by a convolution along the channels."""

    stem: eqx.nn.Conv2d
    near: eqx.nn.Conv1d
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.stem = eqx.nn.Conv2d(3, 12, 3, padding=1, key=keys[0])
        self.near = eqx.nn.Conv1d(1, 1, 3, padding=1, use_bias=False, key=keys[1])
        self.head = eqx.nn.Linear(12, 3, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a CHW image."""
        x = jax.nn.relu(self.stem(x))
        gate = jax.nn.sigmoid(self.near(x.mean((1, 2))[None])[0])
        return self.head((x * gate[:, None, None]).mean((1, 2)))


class SqueezeExcite(eqx.Module):
    """A squeeze-and-excitation gate on depthwise-separable convolutions."""

    stem: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    squeeze: eqx.nn.Linear
    excite: eqx.nn.Linear
    pointwise: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 6)
        self.stem = eqx.nn.Conv2d(3, 12, 3, padding=1, key=keys[0])
        self.depthwise = eqx.nn.Conv2d(12, 12, 3, padding=1, groups=12, key=keys[1])
        self.squeeze = eqx.nn.Linear(12, 4, key=keys[2])
        self.excite = eqx.nn.Linear(4, 12, key=keys[3])
        self.pointwise = eqx.nn.Conv2d(12, 8, 1, key=keys[4])
        self.head = eqx.nn.Linear(8, 3, key=keys[5])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of one CHW image."""
        x = jax.nn.silu(self.depthwise(jax.nn.silu(self.stem(x))))
        gate = jax.nn.sigmoid(self.excite(jax.nn.relu(self.squeeze(x.mean((1, 2))))))
        x = jax.nn.silu(self.pointwise(x * gate[:, None, None]))
        return self.head(x.mean((1, 2)))


class SubPixel(nn.Module):
    """ESPCN (Shi et al. 2016): channels become pixels, so one channel behind stands for four before."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images of twice the size, NHWC."""
        x = jnp.tanh(nn.Conv(12, (3, 3))(images))
        x = nn.Conv(4 * 8, (3, 3))(x)
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height, width, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5)
        return nn.Conv(3, (3, 3))(nn.relu(x.reshape(batch, 2 * height, 2 * width, 8)))


class PaddedShortcut(nnx.Module):
    """ResNet for CIFAR with option A: a shortcut that pads its channels with zeros on both sides."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.first = nnx.Conv(8, 10, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(10, 16, (3, 3), rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch of NHWC images."""
        x = nnx.relu(self.stem(x))
        shortcut = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (4, 4)))
        x = nnx.relu(shortcut + self.second(nnx.relu(self.first(x))))
        return self.head(x.mean((1, 2)))
