"""Small nets, one structure each, spread over Flax Linen, Flax NNX, Haiku and Equinox."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .entry import Entry, Model

BATCH = 2


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _linen(module: nn.Module, *args: Any) -> Callable[[], Model]:
    return lambda: (module.apply, jax.eval_shape(module.init, jax.random.key(0), *args), args)


def _haiku(forward: Callable[..., Any], *args: Any) -> Callable[[], Model]:
    def build() -> Model:
        net = hk.without_apply_rng(hk.transform(forward))
        return net.apply, jax.eval_shape(net.init, jax.random.key(0), *args), args

    return build


def _nnx(make: Callable[[], nnx.Module], *args: Any) -> Callable[[], Model]:
    def build() -> Model:
        graph, state = nnx.split(nnx.eval_shape(make))
        return (lambda variables, *inputs: nnx.merge(graph, variables)(*inputs)), state, args

    return build


def _equinox(make: Callable[[], eqx.Module], *args: Any, keyed: bool = False) -> Callable[[], Model]:
    """An Equinox model, mapped over the batch; `keyed`: its last argument is a key for the batch."""

    def build() -> Model:
        model = eqx.filter_eval_shape(make)
        arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

        def apply(variables: Any, *inputs: Any) -> Any:
            whole = eqx.combine(variables, static)
            if not keyed:
                return jax.vmap(whole)(*inputs)
            *data, key = inputs
            keys = jax.random.split(key, len(data[0]))
            return jax.vmap(lambda *x: whole(*x[:-1], key=x[-1]))(*data, keys)

        return apply, arrays, args

    return build


def nested_concat(x: jax.Array) -> jax.Array:
    """A concatenation within a concatenation."""
    a, b, c = jax.nn.relu(hk.Linear(6)(x)), jnp.tanh(hk.Linear(5)(x)), hk.Linear(4)(x)
    inner = jnp.concatenate([a, b], -1)
    return hk.Linear(3)(jnp.concatenate([inner, c, jax.nn.relu(hk.Linear(7)(inner))], -1))


class WideAndDeep(nn.Module):
    """Wide & Deep (Cheng et al. 2016): a linear part on crossed features, embeddings into a deep part."""

    @nn.compact
    def __call__(self, wide: jax.Array, dense: jax.Array, categories: jax.Array) -> jax.Array:
        """One logit per row."""
        tables = [nn.Embed(20, size)(categories[:, i]) for i, size in enumerate((4, 6, 8))]
        x = jnp.concatenate([dense, *tables], -1)
        for width in (32, 16):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(1)(jnp.concatenate([wide, x], -1))


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


class Reused(nnx.Module):
    """One residual block applied three times, and one layer applied twice in a row."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Linear(5, 12, rngs=rngs)
        self.up = nnx.Linear(12, 20, rngs=rngs)
        self.down = nnx.Linear(20, 12, rngs=rngs)
        self.narrow = nnx.Linear(12, 9, rngs=rngs)
        self.twice = nnx.Linear(9, 9, rngs=rngs)
        self.head = nnx.Linear(9, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        x = self.stem(x)
        for _ in range(3):
            x = x + self.down(jax.nn.relu(self.up(x)))
        x = jax.nn.relu(self.narrow(x))
        for _ in range(2):
            x = jnp.tanh(self.twice(x))
        return self.head(x)


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


class ResidualBlock(eqx.Module):
    """A pre-norm residual block of an MLP."""

    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, hidden: int, key: jax.Array):
        first, second = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(width)
        self.up = eqx.nn.Linear(width, hidden, key=first)
        self.down = eqx.nn.Linear(hidden, width, key=second)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The block's output."""
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class ResidualMLP(eqx.Module):
    """A residual MLP with layer norm."""

    stem: eqx.nn.Linear
    blocks: tuple[ResidualBlock, ...]
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.stem = eqx.nn.Linear(5, 16, key=keys[0])
        self.blocks = tuple(
            ResidualBlock(16, hidden, k) for hidden, k in zip((24, 20, 28), keys[1:], strict=False)
        )
        self.head = eqx.nn.Linear(16, 3, key=keys[4])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of one example."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LayerScale(nn.Module):
    """A custom layer: parameters without a submodule (scale, shift, one gate for all channels)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The scaled input."""
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.constant(0.1), (width,))
        shift = self.param("shift", nn.initializers.zeros, (1, width))
        gate = self.param("gate", nn.initializers.ones, ())
        return gate * (x * scale + shift)


class Scaled(nn.Module):
    """A residual net with layer scale."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        x = nn.Dense(12)(x)
        for hidden in (18, 14):
            x = x + LayerScale()(nn.Dense(12)(nn.relu(nn.Dense(hidden)(x))))
        return nn.Dense(3)(x)


class Unused(nnx.Module):
    """A net with a head, a bias and a norm that the forward pass never reads."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(5, 9, rngs=rngs)
        self.second = nnx.Linear(9, 7, rngs=rngs)
        self.auxiliary = nnx.Linear(9, 11, rngs=rngs)
        self.norm = nnx.LayerNorm(9, rngs=rngs)
        self.head = nnx.Linear(7, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        x = nnx.relu(self.first(x))
        self.auxiliary(x)
        return self.head(nnx.relu(x @ self.second.kernel[...]))


def one_channel(x: jax.Array) -> jax.Array:
    """Convolutions with one channel in and one channel between."""
    x = jax.nn.relu(hk.Conv2D(1, 3)(x))
    x = jax.nn.relu(hk.Conv2D(6, 3, stride=2)(x))
    x = hk.Conv2D(1, 1)(x)
    return hk.Linear(3)(x.reshape(x.shape[0], -1))


class Gated(nn.Module):
    """Gated units from one dense layer: GLU, then SwiGLU, then interleaved pairs."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        x = nn.glu(nn.Dense(2 * 10)(x))
        gate, value = jnp.split(nn.Dense(2 * 14, use_bias=False)(x), 2, -1)
        x = nn.Dense(8)(nn.silu(gate) * value)
        pairs = nn.Dense(2 * 9)(x).reshape(x.shape[0], 9, 2)
        return nn.Dense(3)(nn.sigmoid(pairs[..., 0]) * pairs[..., 1])


class TiedAutoencoder(eqx.Module):
    """An autoencoder whose decoder uses the encoder's kernels, transposed."""

    kernels: tuple[jax.Array, ...]
    up_biases: tuple[jax.Array, ...]
    down_biases: tuple[jax.Array, ...]

    def __init__(self, key: jax.Array):
        sizes = (20, 16, 12, 6)
        keys = jax.random.split(key, 3)
        shapes = list(itertools.pairwise(sizes))
        self.kernels = tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
        self.up_biases = tuple(jnp.zeros(n) for n in sizes[1:])
        self.down_biases = tuple(jnp.zeros(n) for n in sizes[:-1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """The reconstruction of one example."""
        for kernel, bias in zip(self.kernels, self.up_biases, strict=True):
            x = jnp.tanh(x @ kernel + bias)
        layers = list(zip(self.kernels, self.down_biases, strict=True))
        for kernel, bias in layers[:0:-1]:
            x = jnp.tanh(kernel @ x + bias)
        return layers[0][0] @ x + layers[0][1]


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


class Dropped(eqx.Module):
    """Dropout in training mode, with a key per example."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    head: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(5, 14, key=keys[0])
        self.second = eqx.nn.Linear(14, 10, key=keys[1])
        self.head = eqx.nn.Linear(10, 3, key=keys[2])
        self.dropout = eqx.nn.Dropout(0.3)

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Logits of one example."""
        first, second = jax.random.split(key)
        x = self.dropout(jax.nn.relu(self.first(x)), key=first)
        x = self.dropout(jax.nn.relu(self.second(x)), key=second)
        return self.head(x)


class LinenDropped(nn.Module):
    """Dropout in training mode, with the key as an argument; one mask is broadcast over time."""

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Logits of a batch of sequences."""
        x = nn.relu(nn.Dense(14)(x))
        x = nn.Dropout(0.25, deterministic=False)(x, rng=key)
        x = nn.relu(nn.Dense(10)(x))
        x = nn.Dropout(0.25, broadcast_dims=(1,), deterministic=False)(x, rng=jax.random.fold_in(key, 1))
        return nn.Dense(3)(x.mean(1))


class EmbeddingBag(nnx.Module):
    """fastText: looked-up rows, averaged without the padding, into a classifier."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(50, 16, rngs=rngs)
        self.hidden = nnx.Linear(16, 12, rngs=rngs)
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Class logits."""
        rows = jnp.take(self.table.embedding[...], tokens, axis=0)
        valid = (tokens > 0)[..., None]
        mean = jnp.where(valid, rows, 0).sum(1) / jnp.maximum(valid.sum(1), 1)
        return self.head(nnx.relu(self.hidden(mean)))


class Stacked(nn.Module):
    """Branches that are stacked and averaged, so that they share their channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        branches = [nn.Dense(10)(x), nn.Dense(10)(nn.relu(nn.Dense(6)(x))), jnp.tanh(nn.Dense(10)(x))]
        return nn.Dense(3)(nn.relu(jnp.stack(branches).mean(0)))


class Bilinear(eqx.Module):
    """Contractions of three and four operands: a bilinear layer, and a low-rank (CP) one."""

    left: jax.Array
    right: jax.Array
    core: jax.Array
    factors: tuple[jax.Array, jax.Array, jax.Array]

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 6)
        draw = jax.random.normal
        self.left, self.right = draw(keys[0], (5, 8)), draw(keys[1], (4, 7))
        self.core = draw(keys[2], (8, 7, 9))
        self.factors = (draw(keys[3], (9, 6)), draw(keys[4], (9, 6)), draw(keys[5], (6, 3)))

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Logits of one pair of examples."""
        a, b = jnp.tanh(jnp.einsum("i,ip->p", x, self.left)), jnp.tanh(jnp.einsum("j,jq->q", y, self.right))
        h = jax.nn.relu(jnp.einsum("p,q,pqr->r", a, b, self.core))
        return jnp.einsum("r,rk,s,sk,ko->o", h, self.factors[0], h, self.factors[1], self.factors[2])


class Experts(nn.Module):
    """Dense routing: every expert runs, a softmax gate weighs them."""

    experts: int = 4
    hidden: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        x = nn.Dense(12)(x)
        gate = nn.softmax(nn.Dense(self.experts)(x))
        normal = nn.initializers.lecun_normal()
        up = self.param("up", normal, (self.experts, 12, self.hidden))
        down = self.param("down", normal, (self.experts, self.hidden, 12))
        each = jnp.einsum("bei,eio->beo", nn.relu(jnp.einsum("bi,eio->beo", x, up)), down)
        return nn.Dense(3)(x + jnp.einsum("be,beo->bo", gate, each))


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


class Normalised(nn.Module):
    """Weight normalisation, maxout, and a classifier on cosines."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        x = nn.relu(nn.WeightNorm(nn.Dense(12))(x))
        x = nn.Dense(3 * 7)(x).reshape(x.shape[0], 7, 3).max(-1)
        x = nn.Dense(9)(x)
        x = x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
        kernel = self.param("prototypes", nn.initializers.lecun_normal(), (9, 4))
        return 10 * x @ (kernel / jnp.sqrt((kernel * kernel).sum(0) + 1e-6))


class Recomputed(nn.Module):
    """Residual blocks under `nn.remat`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        block = nn.remat(RecomputedBlock)
        x = nn.Dense(12)(x)
        for hidden in (18, 15):
            x = block(hidden)(x)
        return nn.Dense(3)(x)


class RecomputedBlock(nn.Module):
    """A residual block with RMSNorm."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The block's output."""
        return x + nn.Dense(x.shape[-1])(nn.silu(nn.Dense(self.hidden)(nn.RMSNorm()(x))))


class BothDirections(nn.Module):
    """A bidirectional GRU over an embedding."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Class logits."""
        x = nn.Embed(40, 8)(tokens)
        forward, backward = (nn.RNN(nn.GRUCell(n, param_dtype=x.dtype)) for n in (10, 7))
        both: Any = nn.Bidirectional(forward, backward)(x)
        return nn.Dense(3)(both.mean(1))


class MinimalGRU(eqx.Module):
    """minGRU (Feng et al. 2024): a gated linear recurrence by `jax.lax.associative_scan`."""

    embed: eqx.nn.Linear
    gate: eqx.nn.Linear
    candidate: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Linear(5, 8, key=keys[0])
        self.gate = eqx.nn.Linear(8, 12, key=keys[1])
        self.candidate = eqx.nn.Linear(8, 12, key=keys[2])
        self.head = eqx.nn.Linear(12, 3, key=keys[3])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs along one sequence (time, features)."""
        x = jax.vmap(self.embed)(x)
        gate = jax.nn.sigmoid(jax.vmap(self.gate)(x))
        update = gate * jax.vmap(self.candidate)(x)

        def compose(left: Any, right: Any) -> Any:
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, hidden = jax.lax.associative_scan(compose, (1 - gate, update))
        return jax.vmap(self.head)(hidden)


def sorted_set(x: jax.Array) -> jax.Array:
    """A set encoder with sorted pooling (FSPool) and the best two elements by a learned score."""
    h = jax.nn.relu(hk.Linear(12)(x))
    weights = hk.get_parameter("weights", (x.shape[1], 12), init=jnp.ones)
    pooled = (jnp.sort(h, axis=1) * weights).sum(1)
    score = hk.Linear(1)(h)[..., 0]
    _, best = jax.lax.top_k(score, 2)
    chosen = jnp.take_along_axis(h, best[..., None], axis=1).mean(1)
    return hk.Linear(3)(jnp.concatenate([pooled, chosen], -1))


class Fourier(nn.Module):
    """An FNet block (Lee-Thorp et al. 2022): Fourier transforms over tokens and channels mix the stream."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Class logits of a batch of sequences."""
        x = nn.Dense(16)(x)
        x = nn.LayerNorm()(x + jnp.fft.fft2(x).real)
        x = nn.LayerNorm()(x + nn.Dense(16)(nn.gelu(nn.Dense(24)(x))))
        return nn.Dense(3)(x.mean(1))


def _tokens(*shape: int, below: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, below, shape).astype(np.int32)


def _key() -> jax.Array:
    return jax.eval_shape(lambda: jax.random.key(0))


KEY = jax.random.PRNGKey

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "Nested concatenation",
        "own, Haiku",
        _haiku(nested_concat, _floats(4, 5)),
        6 + 5 + 4 + 7,
        "each branch keeps its own: 6, 5, 4, 7",
    ),
    Entry(
        "Wide & Deep",
        "own, Flax Linen",
        _linen(WideAndDeep(), _floats(4, 10), _floats(4, 5), _tokens(4, 3, below=20)),
        4 + 6 + 8 + 32 + 16,
        "columns of the embeddings 4, 6, 8; hidden 32, 16",
    ),
    Entry(
        "Multiple inputs",
        "own, Equinox",
        _equinox(
            lambda: MultipleInputs(KEY(0)), _floats(BATCH, 3, 8, 8), _floats(BATCH, 5), _floats(BATCH, 2)
        ),
        8 + 12 + 10,
        "8 channels, 12 of the vector, 10 joint",
    ),
    Entry(
        "C2f block",
        "own, Flax Linen",
        _linen(C2f(), _floats(BATCH, 8, 8, 3)),
        16 + 16 + 16 + 2 * 16 + 24,
        "stem 16; split half 16; other half with both residual outputs 16; two inner 16; out 24",
    ),
    Entry(
        "Block used again",
        "own, Flax NNX",
        _nnx(lambda: Reused(nnx.Rngs(0)), _floats(4, 5)),
        12 + 20 + 9,
        "stream 12; inner 20; 9 that go in and out of the layer used twice",
    ),
    Entry(
        "Concatenation on another axis",
        "own, Flax Linen",
        _linen(OtherAxis(), _floats(BATCH, 4, 6, 3), _floats(BATCH, 2, 6, 2)),
        10 + 12 + 8,
        "10 shared by both convolutions, 12 with the token, 8",
    ),
    Entry(
        "Convolution, flatten, dense",
        "own, Flax NNX",
        _nnx(lambda: Flattened(nnx.Rngs(0)), _floats(BATCH, 8, 8, 1)),
        6 + 8 + 10,
        "6 and 8 channels, 10 neurons",
    ),
    Entry(
        "Dense, unflatten, transposed convolution",
        "own, Haiku",
        _haiku(unflattened, _floats(BATCH, 5)),
        8 + 6 + 4,
        "8 channels of 4 neurons each; 6 and 4 channels",
    ),
    Entry(
        "Residual MLP",
        "own, Equinox",
        _equinox(lambda: ResidualMLP(KEY(0)), _floats(4, 5)),
        16 + 24 + 20 + 28,
        "stream 16; inner 24, 20, 28",
    ),
    Entry(
        "Layer scale",
        "own, Flax Linen, bare parameters",
        _linen(Scaled(), _floats(4, 5)),
        12 + 18 + 14,
        "stream 12; inner 18, 14",
    ),
    Entry(
        "Unused parameters",
        "own, Flax NNX",
        _nnx(lambda: Unused(nnx.Rngs(0)), _floats(4, 5)),
        9 + 7,
        "9 and 7; the head, the bias and the norm that nothing reads add none",
    ),
    Entry(
        "One channel",
        "own, Haiku",
        _haiku(one_channel, _floats(BATCH, 6, 6, 1)),
        6,
        "6 channels; a single channel cannot leave",
    ),
    Entry(
        "Gated linear units",
        "own, Flax Linen",
        _linen(Gated(), _floats(4, 5)),
        10 + 14 + 8 + 9,
        "10, 14 and 9 pairs; 8 between",
    ),
    Entry(
        "Tied autoencoder",
        "own, Equinox",
        _equinox(lambda: TiedAutoencoder(KEY(0)), _floats(4, 20)),
        16 + 12 + 6,
        "16 and 12, each shared by encoder and decoder; latent 6",
    ),
    Entry(
        "Channel shuffle, 2 groups",
        "own, Flax Linen: a ShuffleNet v1 unit",
        _linen(ShuffleUnit(2), _floats(BATCH, 6, 6, 3)),
        24 // 2 + 12 // 2**2,
        "grouped layers lose one channel per group at a time: 24 / 2 of the stream; inside, the shuffle "
        "joins those of the layer before to those of the layer behind: 12 / 4",
    ),
    Entry(
        "Channel shuffle, 3 groups",
        "own, Flax Linen: a ShuffleNet v1 unit",
        _linen(ShuffleUnit(3), _floats(BATCH, 6, 6, 3)),
        24 // 3,
        "24 / 3 of the stream; inside, 4 per group is no multiple of 3, so the shuffle joins all 12",
    ),
    Entry(
        "SqueezeNet fire",
        "own, Haiku",
        _haiku(fire, _floats(BATCH, 12, 12, 3)),
        8 + (4 + 2 * 6) + (5 + 2 * 7),
        "stem 8; squeeze 4 and 5; both expansions 2 × 6 and 2 × 7",
    ),
    Entry(
        "Inception block",
        "own, Flax NNX",
        _nnx(lambda: Inception(nnx.Rngs(0)), _floats(BATCH, 6, 6, 3)),
        8 + 4 + (5 + 6) + (3 + 4) + 7,
        "stem 8; branches 4, 5 + 6, 3 + 4, 7",
    ),
    Entry(
        "Dropout (Equinox)",
        "own, Equinox, training mode",
        _equinox(lambda: Dropped(KEY(0)), _floats(4, 5), _key(), keyed=True),
        14 + 10,
        "14 and 10",
    ),
    Entry(
        "Dropout (Linen)",
        "own, Flax Linen, training mode",
        _linen(LinenDropped(), _floats(4, 3, 5), _key()),
        14 + 10,
        "14 and 10",
    ),
    Entry(
        "Embedding bag",
        "own, Flax NNX",
        _nnx(lambda: EmbeddingBag(nnx.Rngs(0)), _tokens(BATCH, 6, below=50)),
        16 + 12,
        "columns of the table 16; hidden 12",
    ),
    Entry(
        "Stacked branches",
        "own, Flax Linen",
        _linen(Stacked(), _floats(4, 5)),
        10 + 6,
        "10 shared by three branches; 6 inside one",
    ),
    Entry(
        "Bilinear",
        "own, Equinox, einsum",
        _equinox(lambda: Bilinear(KEY(0)), _floats(4, 5), _floats(4, 4)),
        8 + 7 + 9 + 6,
        "8 left, 7 right, 9 (both slots of the last contraction), rank 6",
    ),
    Entry(
        "Mixture of experts",
        "own, Flax Linen, dense routing",
        _linen(Experts(), _floats(4, 5)),
        12 + 4 + 10,
        "stream 12; 4 experts with their column of the gate; 10 hidden, each in all experts",
    ),
    Entry(
        "Squeeze and excite",
        "own, Equinox",
        _equinox(lambda: SqueezeExcite(KEY(0)), _floats(BATCH, 3, 6, 6)),
        12 + 4 + 8,
        "12 with the depthwise kernel and the gate; squeeze 4; pointwise 8",
    ),
    Entry(
        "Sub-pixel convolution",
        "own, Flax Linen",
        _linen(SubPixel(), _floats(BATCH, 6, 6, 3)),
        12 + 8,
        "12; 8 channels behind the shuffle, of 4 before it each",
    ),
    Entry(
        "Padded shortcut",
        "own, Flax NNX: ResNet for CIFAR, option A",
        _nnx(lambda: PaddedShortcut(nnx.Rngs(0)), _floats(BATCH, 8, 8, 3)),
        8 + (16 - 8) + 10,
        "8 of both streams, 8 that the shortcut pads, inner 10",
    ),
    Entry(
        "Weight norm, maxout, cosines",
        "own, Flax Linen",
        _linen(Normalised(), _floats(4, 5)),
        12 + 7 + 9,
        "12; 7 maxout units of 3 columns; 9",
    ),
    Entry(
        "Recomputed blocks",
        "own, Flax Linen: nn.remat",
        _linen(Recomputed(), _floats(4, 5)),
        12 + 18 + 15,
        "stream 12; inner 18, 15",
    ),
    Entry(
        "Bidirectional GRU",
        "own, Flax Linen: nn.Bidirectional",
        _linen(BothDirections(), _tokens(BATCH, 5, below=40)),
        8 + 10 + 7,
        "8 of the embedding; hidden 10 and 7",
    ),
    Entry(
        "minGRU",
        "own, Equinox: jax.lax.associative_scan",
        _equinox(lambda: MinimalGRU(KEY(0)), _floats(BATCH, 6, 5)),
        8 + 12,
        "8; 12 with the gate and the candidate",
    ),
    Entry(
        "Sorted set",
        "own, Haiku: sort, top_k, take_along_axis",
        _haiku(sorted_set, _floats(BATCH, 6, 5)),
        12,
        "12 in both halves of the concatenation",
    ),
    Entry(
        "Fourier mixing",
        "own, Flax Linen: an FNet block",
        _linen(Fourier(), _floats(BATCH, 6, 5)),
        24,
        "inner 24; every channel of the stream reaches every other by the transform",
    ),
)
