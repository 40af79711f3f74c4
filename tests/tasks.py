"""A small trained problem for the tests of training, search and compression."""

from __future__ import annotations

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

import compaware_jax as ca

WIDTHS = (12, 16, 4, 16, 12)


def init(key: jax.Array) -> dict[str, Any]:
    """An autoencoder of points on a curved surface."""
    sizes = (8, *WIDTHS[1:4], 8)
    keys = jax.random.split(key, len(sizes))
    return {
        f"layer{i}": {
            "w": jax.random.normal(keys[i], (a, b)) / jnp.sqrt(a),
            "b": jnp.zeros(b),
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }


def apply(variables: dict[str, Any], x: jax.Array) -> jax.Array:
    """Reconstructs x."""
    for name in sorted(variables):
        x = x @ variables[name]["w"] + variables[name]["b"]
        x = x if name == "layer3" else jnp.tanh(x)
    return x


def points(key: jax.Array, count: int) -> jax.Array:
    """Points of a three-dimensional surface in eight dimensions, shape (count, 8)."""
    t = jax.random.uniform(key, (count, 3), minval=-1.5, maxval=1.5)
    mix = jax.random.normal(jax.random.key(42), (3, 8))
    return jnp.sin(t @ mix)


def batches(step: jax.Array) -> jax.Array:
    """Batch number `step`."""
    return points(jax.random.fold_in(jax.random.key(1), step), 64)


def loss(f: Any, variables: Any, batch: jax.Array) -> jax.Array:
    """Mean squared error."""
    return jnp.mean((f(variables, batch) - batch) ** 2)


def penalized(f: Any, variables: Any, batch: jax.Array) -> jax.Array:
    """Mean squared error and the length of all weights, which those that left add nothing to."""
    return loss(f, variables, batch) + 0.1 * optax.tree.norm(variables)


def held_out() -> jax.Array:
    """Points that no batch holds."""
    return points(jax.random.key(2), 500)


def dense(steps: int = 600) -> dict[str, Any]:
    """The trained model."""
    start = init(jax.random.key(0))
    return ca.fit(apply, start, loss, batches, steps, learning_rate=1e-2, progress=False)[0]


def groups(variables: Any) -> ca.Groups:
    """Its groups."""
    return ca.find_groups(apply, variables, jnp.zeros((1, 8)))


def error(f: Any, variables: Any, batch: jax.Array) -> jax.Array:
    """The metric: root mean squared error."""
    return jnp.sqrt(loss(f, variables, batch))


SEARCH = ca.GradientSearch(steps=100)
BOUND = ca.at_most("error", error, 0.25)
_ASKED = {"criteria": [BOUND], "learning_rate": 1e-2, "progress": False}


def compress(trained: tuple[Any, ca.Groups], **changes: Any) -> ca.Result:
    """The main job on a trained model and its groups, with changes to what is asked."""
    variables, found = trained
    asked = {"budget": ca.params(0.5), "search": SEARCH, "fine_tune": 200, "held_out": held_out()}
    asked |= _ASKED | {"groups": found, "loss": loss, "batches": batches} | changes
    return ca.compress(apply, variables, **asked)


def sweeps_alike(trained: tuple[Any, ca.Groups], **asked: Any) -> bool:
    """Whether a sweep's only lane ends in the plan, and near the variables, of `compress`."""
    (point,), result = sweep(trained, **asked), compress(trained, **asked)
    chex.assert_trees_all_close(point.variables, result.variables, rtol=1e-3, atol=1e-4)
    return point.plan == result.plan


def sweep(trained: tuple[Any, ca.Groups], **changes: Any) -> Any:
    """A short sweep over a single budget, with changes to what is asked."""
    variables, found = trained
    asked = {"budgets": [ca.params(0.5)], "search": ca.GradientSearch(steps=10), "fine_tune": 10}
    asked |= _ASKED | {"held_out": held_out(), "groups": found} | changes
    return ca.sweep(apply, variables, **({"loss": loss, "batches": batches} | asked))
