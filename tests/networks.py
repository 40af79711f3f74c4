"""Random networks out of blocks, with a count of their units kept by hand.

Every block says in its own words what it ties: the drawing carries, per feature of the stream, the name
of the unit that the feature belongs to, and a list of pairs of names that turn out to be one. That is an
oracle for the analysis which knows nothing of primitives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

DIMS = ("NHWC", "HWIO", "NHWC")


class _Network:
    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.variables: dict[str, Any] = {}
        self.steps: list[Callable[[Any, jax.Array], jax.Array]] = []
        self.features: list[int] = []
        self.names = 0
        self.pairs: list[tuple[int, int]] = []

    def leaf(self, *shape: int) -> str:
        name = f"leaf{len(self.variables):02d}"
        self.variables[name] = self.rng.normal(size=shape) / np.sqrt(max(np.prod(shape[:-1]), 1))
        return name

    def new(self, count: int) -> list[int]:
        self.names += count
        return list(range(self.names - count, self.names))

    def tie(self, left: list[int], right: list[int]) -> None:
        self.pairs += zip(left, right, strict=True)

    def width(self) -> int:
        return int(self.rng.integers(2, 8))

    @property
    def units(self) -> int:
        """Names, less those that are one with another."""
        parent = list(range(self.names))

        def root(name: int) -> int:
            return name if parent[name] == name else root(parent[name])

        for left, right in self.pairs:
            parent[root(left)] = root(right)
        return len({root(name) for name in range(self.names)})


def _dense(d: _Network) -> None:
    w, b = d.leaf(len(d.features), n := d.width()), d.leaf(n)
    d.features = d.new(n)
    d.steps.append(lambda v, x: x @ v[w] + v[b])


def _pointwise(d: _Network) -> None:
    f = (jax.nn.relu, jnp.tanh, jax.nn.sigmoid, jax.nn.gelu)[d.rng.integers(4)]
    s = d.leaf(len(d.features))
    d.steps.append(lambda v, x: f(x) * v[s])


def _layer_norm(d: _Network) -> None:
    s = d.leaf(len(d.features))

    def step(v: Any, x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 0.1) * v[s]

    d.steps.append(step)


def _residual(d: _Network) -> None:
    """A layer of its own; the layer that writes back has the stream's features."""
    n, h = len(d.features), d.width()
    up, down = d.leaf(n, h), d.leaf(h, n)
    d.new(h)
    d.steps.append(lambda v, x: x + jnp.tanh(x @ v[up]) @ v[down])


def _gated(d: _Network) -> None:
    """Two halves of one layer, feature by feature."""
    w = d.leaf(len(d.features), 2 * (h := d.width()))
    d.features = d.new(h)

    def step(v: Any, x: jax.Array) -> jax.Array:
        a, b = jnp.split(x @ v[w], 2, -1)
        return a * jax.nn.sigmoid(b)

    d.steps.append(step)


def _branch(d: _Network) -> None:
    """A branch beside the stream: its features are new ones."""
    w = d.leaf(len(d.features), h := d.width())
    d.features = d.features + d.new(h)
    d.steps.append(lambda v, x: jnp.concatenate([x, jnp.sin(x @ v[w])], -1))


def _stacked(d: _Network) -> None:
    """Two branches, stacked and laid out again, one behind the other or in turn."""
    branches = [d.leaf(len(d.features), h) for h in [d.width()] * 2]
    names = [d.new(d.variables[w].shape[-1]) for w in branches]
    in_turn = bool(d.rng.integers(2))
    d.features = [n for pair in zip(*names, strict=True) for n in pair] if in_turn else names[0] + names[1]

    def step(v: Any, x: jax.Array) -> jax.Array:
        both = jnp.stack([jnp.tanh(x @ v[w]) for w in branches], -1 if in_turn else -2)
        return both.reshape(*x.shape[:-1], -1)

    d.steps.append(step)


def _packed(d: _Network) -> None:
    """Two branches handed on in one array, each read by a layer of its own."""
    h, out = d.width(), d.width()
    ways = [(d.leaf(len(d.features), h), d.leaf(h, out)) for _ in range(2)]
    d.new(2 * h)
    d.features = d.new(out)

    def step(v: Any, x: jax.Array) -> jax.Array:
        both = jnp.stack([jnp.sin(x @ v[up]) for up, _ in ways])
        return sum((both[i] @ v[down] for i, (_, down) in enumerate(ways)), jnp.zeros(()))

    d.steps.append(step)


def _folded(d: _Network) -> None:
    """The halves of the stream added: a feature of one is one with a feature of the other."""
    if len(d.features) % 2 or len(d.features) < 4:
        return
    half = len(d.features) // 2
    d.tie(d.features[:half], d.features[half:])
    d.features = d.features[:half]
    d.steps.append(lambda v, x: x[..., :half] + x[..., half:])


def _permuted(d: _Network) -> None:
    order = d.rng.permutation(len(d.features))
    d.features = [d.features[i] for i in order]
    d.steps.append(lambda v, x: x[..., order])


def _shuffled(d: _Network) -> None:
    """Dealt out into piles, one after the other."""
    n = len(d.features)
    piles = [k for k in range(2, n) if n % k == 0]
    if not piles:
        return
    k = int(d.rng.choice(piles))
    d.features = [name for pile in range(k) for name in d.features[pile::k]]
    d.steps.append(lambda v, x: x.reshape(*x.shape[:-1], n // k, k).swapaxes(-1, -2).reshape(x.shape))


def _doubled(d: _Network) -> None:
    """Every feature twice, in turn."""
    d.features = [name for name in d.features for _ in range(2)]
    d.steps.append(lambda v, x: jnp.repeat(x, 2, -1))


def _attention(d: _Network) -> None:
    """Heads are units."""
    n, heads, size = len(d.features), 3, 2
    wq, wk, wv, wo = d.leaf(n, 6), d.leaf(n, 6), d.leaf(n, 6), d.leaf(6, n)
    d.new(heads)

    def step(v: Any, x: jax.Array) -> jax.Array:
        q, k, u = ((x @ v[w]).reshape(*x.shape[:-1], heads, size) for w in (wq, wk, wv))
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return x + jnp.einsum("bhts,bshd->bthd", weights, u).reshape(*x.shape[:-1], 6) @ v[wo]

    d.steps.append(step)


def _recurrent(d: _Network) -> None:
    """The state is fed back: a unit is its gate, its candidate, its row and what reads it."""
    n, h = len(d.features), d.width()
    w, u = d.leaf(n, 2 * h), d.leaf(h, 2 * h)
    d.features = d.new(h)

    def step(v: Any, x: jax.Array) -> jax.Array:
        def cell(state: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
            gate, new = jnp.split(now @ v[w] + state @ v[u], 2, -1)
            state = state + jax.nn.sigmoid(gate) * (jnp.tanh(new) - state)
            return state, state

        start = jnp.zeros((x.shape[0], h))
        return lax.scan(cell, start, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    d.steps.append(step)


def _ensemble(d: _Network) -> None:
    """Three members and their average: a member is a unit, and so is a hidden feature of all of them."""
    n, h, out = len(d.features), d.width(), d.width()
    up, down = d.leaf(3, n, h), d.leaf(3, h, out)
    d.new(3)
    d.new(h)
    d.features = d.new(out)
    d.steps.append(lambda v, x: jax.vmap(lambda a, b: jnp.tanh(x @ a) @ b)(v[up], v[down]).mean(0))


def _embedded(d: _Network) -> None:
    table = d.leaf(7, len(d.features))
    d.steps.append(lambda v, x: x + v[table][(jnp.abs(x).sum(-1) * 10).astype(int) % 7])


def _conv(d: _Network) -> None:
    k, b = d.leaf(3, 3, len(d.features), n := d.width()), d.leaf(n)
    d.features = d.new(n)
    d.steps.append(
        lambda v, x: lax.conv_general_dilated(x, v[k], (1, 1), "SAME", dimension_numbers=DIMS) + v[b]
    )


def _depthwise(d: _Network) -> None:
    k = d.leaf(3, 3, 1, n := len(d.features))
    d.steps.append(
        lambda v, x: lax.conv_general_dilated(
            x, v[k], (1, 1), "SAME", dimension_numbers=DIMS, feature_group_count=n
        )
    )


def _squeeze_excite(d: _Network) -> None:
    n, h = len(d.features), d.width()
    down, up = d.leaf(n, h), d.leaf(h, n)
    d.new(h)

    def step(v: Any, x: jax.Array) -> jax.Array:
        gate = jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ v[down]) @ v[up])
        return x * gate[:, None, None, :]

    d.steps.append(step)


def _pool(d: _Network) -> None:
    window = (1, 2, 2, 1)
    d.steps.append(lambda v, x: lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 1, 1, 1), "SAME"))


_ANY = (
    _dense, _pointwise, _pointwise, _residual, _gated, _branch, _folded, _permuted, _shuffled, _doubled,
    _layer_norm, _ensemble, _embedded, _stacked, _packed,
)  # fmt: skip
_SEQUENCE = (*_ANY, _attention, _recurrent)
_IMAGE = (*_ANY, _conv, _conv, _depthwise, _squeeze_excite, _pool)


def random_network(seed: int) -> tuple[Callable[..., Any], dict[str, Any], np.ndarray, int]:
    """Draw a network: ``(apply, variables, x, units)``."""
    d = _Network(seed)
    image = seed % 2 == 0
    x = d.rng.normal(size=(2, 4, 4, 3) if image else (2, 3, 5))
    w = d.leaf(x.shape[-1], n := d.width())
    d.features = d.new(n)
    d.steps.append(lambda v, x: x @ v[w])
    for _ in range(int(d.rng.integers(3, 8))):
        blocks = _IMAGE if image else _SEQUENCE
        if len(d.features) <= 16:
            blocks[d.rng.integers(len(blocks))](d)
    flat = bool(d.rng.integers(2))
    positions = int(np.prod(x.shape[1:-1])) if flat else 1
    head = d.leaf(positions * len(d.features), 2)

    def last(v: Any, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1) if flat else x.mean(tuple(range(1, x.ndim - 1)))
        return x @ v[head]

    steps = (*d.steps, last)

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        for step in steps:
            x = step(variables, x)
        return x

    return apply, d.variables, x, d.units
