"""Small models with known groups, for tests; `MODELS` is the table that every transform is run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Model = tuple[Callable[..., Any], dict[str, Any], tuple[np.ndarray, ...]]


def _draw(shapes: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.normal(size=s) / np.sqrt(s[0]), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def mlp() -> Model:
    """Two dense layers: one group that couples two components."""
    variables = _draw({"first": {"w": (5, 8), "b": (8,)}, "second": {"w": (8, 3)}})

    def apply(v: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ v["first"]["w"] + v["first"]["b"]) @ v["second"]["w"]

    return apply, variables, (np.random.default_rng(1).normal(size=(4, 5)),)


def residual() -> Model:
    """A stream that three layers write to: they leave together; an inner width of its own."""
    variables = _draw({"stem": (5, 6), "norm": (6,), "up": (6, 7), "down": (7, 6), "head": (6, 2)}, seed=2)

    def apply(v: Any, x: jax.Array) -> jax.Array:
        h = x @ v["stem"]
        n = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 0.1) * v["norm"]
        return (h + jax.nn.silu(n @ v["up"]) @ v["down"]) @ v["head"]

    return apply, variables, (np.random.default_rng(3).normal(size=(4, 5)),)


def convolutional() -> Model:
    """Convolution, flatten, dense, unflatten, transposed convolution."""
    variables = _draw(
        {
            "conv": {"k": (3, 3, 2, 4), "b": (4,)},
            "in": {"w": (16, 6)},
            "out": {"w": (6, 20), "b": (20,)},
            "deconv": {"k": (3, 3, 5, 2)},
        },
        seed=4,
    )
    dims = ("NHWC", "HWIO", "NHWC")

    def apply(v: Any, x: jax.Array) -> jax.Array:
        h = lax.conv_general_dilated(x, v["conv"]["k"], (2, 2), "SAME", dimension_numbers=dims)
        h = jax.nn.sigmoid(h + v["conv"]["b"])
        z = jnp.tanh(h.reshape(h.shape[0], -1) @ v["in"]["w"])
        h = jax.nn.relu(z @ v["out"]["w"] + v["out"]["b"]).reshape(-1, 2, 2, 5)
        return lax.conv_transpose(h, v["deconv"]["k"], (2, 2), "SAME", dimension_numbers=dims)

    return apply, variables, (np.random.default_rng(5).normal(size=(2, 4, 4, 2)),)


def gated() -> Model:
    """A gated linear unit: the halves of one layer leave together, index by index."""
    variables = _draw({"in": (5, 12), "out": (6, 2)}, seed=6)

    def apply(v: Any, x: jax.Array) -> jax.Array:
        a, b = jnp.split(x @ v["in"], 2, -1)
        return (a * jax.nn.sigmoid(b)) @ v["out"]

    return apply, variables, (np.random.default_rng(7).normal(size=(4, 5)),)


def concatenated() -> Model:
    """Two branches joined: each keeps its own group, with its own rows in the layer behind."""
    variables = _draw({"left": (5, 4), "right": (5, 3), "unused": (4,), "head": (7, 2)}, seed=8)

    def apply(v: Any, x: jax.Array) -> jax.Array:
        both = jnp.concatenate([jnp.tanh(x @ v["left"]), jax.nn.relu(x @ v["right"])], -1)
        return both @ v["head"]

    return apply, variables, (np.random.default_rng(9).normal(size=(4, 5)),)


def attention() -> Model:
    """Heads leave whole; the residual stream is one group."""
    shapes = {"embed": (5, 6), "q": (6, 8), "k": (6, 8), "v": (6, 8), "o": (8, 6), "head": (6, 2)}
    variables = _draw(shapes, seed=10)

    def apply(v: Any, x: jax.Array) -> jax.Array:
        h = x @ v["embed"]
        q, k, u = ((h @ v[n]).reshape(*h.shape[:2], 4, 2) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        mixed = jnp.einsum("bhts,bshd->bthd", weights, u).reshape(*h.shape[:2], 8)
        return (h + mixed @ v["o"]).mean(1) @ v["head"]

    return apply, variables, (np.random.default_rng(11).normal(size=(2, 3, 5)),)


def recurrent() -> Model:
    """Token embedding, a gated recurrent layer, scores: the state is one group, the stream another."""
    shapes = {"embed": (9, 4), "in": {"w": (4, 10), "u": (5, 10), "b": (10,)}, "head": (5, 9)}
    variables = _draw(shapes, seed=12)

    def apply(v: Any, tokens: jax.Array) -> jax.Array:
        x = v["embed"][tokens]

        def cell(state: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
            gate, new = jnp.split(now @ v["in"]["w"] + state @ v["in"]["u"] + v["in"]["b"], 2, -1)
            state = state + jax.nn.sigmoid(gate) * (jnp.tanh(new) - state)
            return state, state

        _, states = lax.scan(cell, jnp.zeros((x.shape[0], 5)), x.swapaxes(0, 1))
        return states.swapaxes(0, 1) @ v["head"]

    return apply, variables, (np.random.default_rng(13).integers(0, 9, (2, 3)),)


def grouped_query() -> Model:
    """Two key-value heads for four query heads: a pair of query heads leaves with its key-value head."""
    shapes = {"embed": (5, 6), "q": (6, 8), "k": (6, 4), "v": (6, 4), "o": (8, 6), "head": (6, 2)}
    variables = _draw(shapes, seed=14)

    def apply(v: Any, x: jax.Array) -> jax.Array:
        h = x @ v["embed"]
        q = (h @ v["q"]).reshape(*h.shape[:2], 4, 2)
        k, u = ((h @ v[n]).reshape(*h.shape[:2], 2, 2).repeat(2, 2) for n in "kv")
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        mixed = jnp.einsum("bhts,bshd->bthd", weights, u).reshape(*h.shape[:2], 8)
        return (h + mixed @ v["o"]).mean(1) @ v["head"]

    return apply, variables, (np.random.default_rng(15).normal(size=(2, 3, 5)),)


def stacked() -> Model:
    """Layers run by `scan` over stacked weights: a hidden unit leaves from every layer at once."""
    variables = _draw({"in": (5, 4), "up": (3, 4, 6), "down": (3, 6, 4), "head": (4, 2)}, seed=16)

    def apply(v: Any, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
            return h + jnp.tanh(h @ w[0]) @ w[1], None

        return lax.scan(layer, x @ v["in"], (v["up"], v["down"]))[0] @ v["head"]

    return apply, variables, (np.random.default_rng(17).normal(size=(4, 5)),)


def mobile() -> Model:
    """Depthwise convolution, pooling, squeeze-and-excite: channels go through, the squeeze is its own."""
    variables = _draw(
        {"stem": (3, 3, 2, 6), "depth": (3, 3, 1, 6), "squeeze": (6, 3), "excite": (3, 6), "head": (6, 2)},
        seed=18,
    )
    dims = ("NHWC", "HWIO", "NHWC")

    def apply(v: Any, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(lax.conv_general_dilated(x, v["stem"], (1, 1), "SAME", dimension_numbers=dims))
        h = lax.conv_general_dilated(
            h, v["depth"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=h.shape[-1]
        )
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        gate = jax.nn.sigmoid(jax.nn.relu(h.mean((1, 2)) @ v["squeeze"]) @ v["excite"])
        return (h * gate[:, None, None]).mean((1, 2)) @ v["head"]

    return apply, variables, (np.random.default_rng(19).normal(size=(2, 4, 4, 2)),)


MODELS: dict[str, Callable[[], Model]] = {
    "mlp": mlp,
    "residual": residual,
    "convolutional": convolutional,
    "gated": gated,
    "concatenated": concatenated,
    "attention": attention,
    "recurrent": recurrent,
    "grouped_query": grouped_query,
    "stacked": stacked,
    "mobile": mobile,
}
