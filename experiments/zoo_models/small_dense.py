"""Small nets of dense layers, one structure each."""

from __future__ import annotations

import itertools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx


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


class SortedExperts(nn.Module):
    """The best two experts of a token, and no token dropped: rows sorted by expert, in a ragged product."""

    experts: int = 4
    hidden: int = 10
    chosen: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        x = nn.Dense(12)(x)
        weight, expert = jax.lax.top_k(nn.softmax(nn.Dense(self.experts)(x)), self.chosen)
        order = jnp.argsort(expert.ravel())
        rows = jnp.repeat(x, self.chosen, axis=0)[order]
        sizes = jnp.bincount(expert.ravel(), length=self.experts)
        normal = nn.initializers.lecun_normal()
        gate, up = (self.param(name, normal, (self.experts, 12, self.hidden)) for name in ("gate", "up"))
        down = self.param("down", normal, (self.experts, self.hidden, 12))
        inner = nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
        back = jnp.zeros_like(rows).at[order].set(jax.lax.ragged_dot(inner, down, sizes))
        return nn.Dense(3)(x + (back.reshape(*weight.shape, -1) * weight[..., None]).sum(1))


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
