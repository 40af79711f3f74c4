"""The MNIST autoencoder, in Flax Linen, handed out as pure functions.

The strided convolutions are written as matrix products. XLA on the CPU runs a convolution inside
`lax.scan` many times slower than outside, a transposed one (`lhs_dilation`) far below the rate of a
matrix product, and a `vmap` over kernels turns either into a slow grouped convolution; training
under scan and vmap is what this library does all the time. A training step of the conv preset is
about 2 times faster with the products than with nn.Conv and nn.ConvTranspose, and about 10 times
inside a scan (`python experiments/bench_convolutions.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

__all__ = ["Autoencoder", "autoencoder", "strided_convolution", "transposed_convolution"]

LATENT = 32

Variables = dict[str, Any]


class Autoencoder(NamedTuple):
    """Pure functions of an autoencoder with the components "encoder" and "decoder".

    Attributes:
      init: key -> variables, {"params": {"encoder": ..., "decoder": ...}} in float32.
      apply: variables, image (B, 28, 28, 1) in [0, 1] -> {"image": the reconstruction in (0, 1),
        shape as the image, "latent": (B, 32)}.
      encode: variables, image -> latent (B, 32).
      decode: variables, latent (B, 32) -> image (B, 28, 28, 1).
    """

    init: Callable[[PRNGKeyArray], Variables]
    apply: Callable[[Variables, Float[Array, "b 28 28 1"]], dict[str, Array]]
    encode: Callable[[Variables, Float[Array, "b 28 28 1"]], Float[Array, "b 32"]]
    decode: Callable[[Variables, Float[Array, "b 32"]], Float[Array, "b 28 28 1"]]


def autoencoder(preset: str = "dense") -> Autoencoder:
    """Builds an autoencoder for MNIST.

    Args:
      preset: "dense": widths 784-512-256-32-256-512-784, 1,083,696 parameters. "conv": 3x3
        convolutions with stride 2 to 32 and 64 channels (28 -> 14 -> 7 pixels), dense 256, latent
        32, and the mirror image of it with transposed convolutions.
        Both: ReLU in between, a linear latent, a sigmoid at the end.

    Returns:
      The four functions.

    Raises:
      ValueError: if the preset is unknown.

    Example:
      >>> import jax
      >>> model = autoencoder("dense")
      >>> variables = model.init(jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
      1083696
      >>> model.apply(variables, jax.numpy.zeros((5, 28, 28, 1)))["latent"].shape
      (5, 32)
    """
    presets = {"dense": (DenseEncoder, DenseDecoder), "conv": (ConvEncoder, ConvDecoder)}
    if preset not in presets:
        raise ValueError(
            f"autoencoder: got preset={preset!r}; expected one of {sorted(presets)}; pass one of "
            "them, or write your own model: any pure function of its variables can be pruned."
        )
    encoder, decoder = presets[preset]
    module = Coder(encoder=encoder(), decoder=decoder())

    @jax.jit
    def init(key: PRNGKeyArray) -> Variables:
        return dict(module.init(key, jnp.zeros((1, 28, 28, 1))))

    def apply(variables: Variables, image: Float[Array, "b 28 28 1"]) -> dict[str, Array]:
        return module.apply(variables, image)  # pyright: ignore[reportReturnType]

    def encode(variables: Variables, image: Float[Array, "b 28 28 1"]) -> Float[Array, "b 32"]:
        return module.apply(variables, image, method="encode")  # pyright: ignore[reportReturnType]

    def decode(variables: Variables, latent: Float[Array, "b 32"]) -> Float[Array, "b 28 28 1"]:
        return module.apply(variables, latent, method="decode")  # pyright: ignore[reportReturnType]

    return Autoencoder(init, apply, encode, decode)


class Coder(nn.Module):
    """An encoder and a decoder, whose variables are named so."""

    encoder: nn.Module
    decoder: nn.Module

    def __call__(self, image: Array) -> dict[str, Array]:
        latent = self.encode(image)
        return {"image": self.decode(latent), "latent": latent}

    def encode(self, image: Array) -> Array:
        return self.encoder(image)

    def decode(self, latent: Array) -> Array:
        return self.decoder(latent)


class DenseEncoder(nn.Module):
    """784-512-256-32."""

    @nn.compact
    def __call__(self, image: Array) -> Array:
        x = image.reshape(image.shape[0], -1)
        x = nn.relu(nn.Dense(512, name="dense1")(x))
        x = nn.relu(nn.Dense(256, name="dense2")(x))
        return nn.Dense(LATENT, name="latent")(x)


class DenseDecoder(nn.Module):
    """32-256-512-784."""

    @nn.compact
    def __call__(self, latent: Array) -> Array:
        x = nn.relu(nn.Dense(256, name="dense1")(latent))
        x = nn.relu(nn.Dense(512, name="dense2")(x))
        x = nn.sigmoid(nn.Dense(784, name="image")(x))
        return x.reshape(x.shape[0], 28, 28, 1)


class ConvEncoder(nn.Module):
    """28x28x1, 14x14x32, 7x7x64, 256, 32."""

    @nn.compact
    def __call__(self, image: Array) -> Array:
        x = nn.relu(Stride2(32, strided_convolution, name="conv1")(image))
        x = nn.relu(Stride2(64, strided_convolution, name="conv2")(x))
        # By position and channel, not flattened: each is an axis of the kernel, so that both can leave.
        x = x.reshape(x.shape[0], 7 * 7, 64)
        x = nn.relu(nn.DenseGeneral(256, axis=(1, 2), name="dense1")(x))
        return nn.Dense(LATENT, name="latent")(x)


class ConvDecoder(nn.Module):
    """32, 256, 7x7x64, 14x14x32, 28x28x1."""

    @nn.compact
    def __call__(self, latent: Array) -> Array:
        x = nn.relu(nn.Dense(256, name="dense1")(latent))
        x = nn.relu(nn.DenseGeneral((7 * 7, 64), name="dense2")(x))
        x = x.reshape(x.shape[0], 7, 7, 64)
        x = nn.relu(Stride2(32, transposed_convolution, name="conv1")(x))
        return nn.sigmoid(Stride2(1, transposed_convolution, name="image")(x))


class Stride2(nn.Module):
    """A 3x3 layer of stride 2 with nn.Conv's variables: kernel (3, 3, in, out), bias (out,)."""

    features: int
    convolution: Callable[[Array, Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return self.convolution(x, kernel) + bias.reshape(1, 1, 1, -1)


def strided_convolution(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "b h_out w_out o"]:
    """A 3x3 convolution of stride 2 with padding SAME, as one product over patches.

    Args:
      x: images (B, H, W, I).
      kernel: (3, 3, I, O).

    Returns:
      (B, ceil(H / 2), ceil(W / 2), O), what `nn.Conv(O, (3, 3), strides=2)` gives without its bias.
    """
    batch, height, width, channels = x.shape
    rows, cols = -(-height // 2), -(-width // 2)
    top, left = (2 * rows + 1 - height) // 2, (2 * cols + 1 - width) // 2
    below, right = 2 * rows + 1 - height - top, 2 * cols + 1 - width - left
    edges = ((0, 0, 0), (top, below, 0), (left, right, 0), (0, 0, 0))
    padded = lax.pad(x, jnp.zeros((), x.dtype), edges)
    taps = [
        lax.slice(
            padded,
            (0, i, j, 0),
            (batch, i + 2 * rows - 1, j + 2 * cols - 1, channels),
            (1, 2, 2, 1),
        )
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(taps, axis=-1) @ kernel.reshape(9 * channels, -1)


def transposed_convolution(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "b 2*h 2*w o"]:
    """A 3x3 transposed convolution of stride 2 with padding SAME, by output phases.

    Along one axis, y[2t] = x[t - 1] k[0] + x[t] k[2] and y[2t + 1] = x[t] k[1]. The four phases of
    the two axes are therefore sums of 4, 2, 2 and 1 products, which are then interleaved: no
    product meets an inserted zero.

    Args:
      x: images (B, H, W, I).
      kernel: (3, 3, I, O).

    Returns:
      (B, 2 H, 2 W, O), what `nn.ConvTranspose(O, (3, 3), strides=(2, 2))` gives without its bias.
    """
    batch, height, width, channels = x.shape
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (1, 0, 0), (1, 0, 0), (0, 0, 0)))

    def tap(i: int, j: int) -> Array:
        # Only the first kernel row (column) reads the image row above (column to the left).
        top, left = int(i != 0), int(j != 0)
        end = (batch, top + height, left + width, channels)
        weights = lax.slice(kernel, (i, j, 0, 0), (i + 1, j + 1, *kernel.shape[2:]))
        return lax.slice(padded, (0, top, left, 0), end) @ weights.reshape(kernel.shape[2:])

    def interleaved(even: Array, odd: Array, axis: int) -> Array:
        shape = [*even.shape[:axis], 1, *even.shape[axis:]]
        pairs = jnp.concatenate([even.reshape(shape), odd.reshape(shape)], axis)
        return pairs.reshape(*even.shape[: axis - 1], -1, *even.shape[axis:])

    upper = interleaved(tap(0, 0) + tap(0, 2) + tap(2, 0) + tap(2, 2), tap(0, 1) + tap(2, 1), 3)
    lower = interleaved(tap(1, 0) + tap(1, 2), tap(1, 1), 3)
    return interleaved(upper, lower, 2)
