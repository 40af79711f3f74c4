"""What the tests of all adapters share: values to draw, units to keep, and what follows from these."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import compaware_jax as ca
from compaware_jax.law import random_keep
from compaware_jax.paths import named_leaves

TIGHT = 1e-10


def drawn(tree: Any) -> Any:
    """The tree with random float64 values of order one; vectors positive, as a variance must be."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if leaf.size == leaf.shape[-1]:
            return jnp.asarray(rng.uniform(0.3, 1.0, leaf.shape))
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(leaf.size // leaf.shape[-1]))

    return jax.tree.map(draw, tree)


def drawn_init(init: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a model's `init` returns for these inputs, with the values of `drawn`."""
    return drawn(jax.eval_shape(lambda: init(jax.random.key(0), *args, **kwargs)))


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).normal(size=shape))


def random_units(groups: ca.Groups) -> np.ndarray:
    """Units to keep: some, but not all."""
    keep = random_keep(groups, np.random.default_rng(0))
    assert 0 < keep.sum() < groups.units, f"{keep.sum()} of {groups.units} units stay"
    return keep


def units_without_every_second(groups: ca.Groups, *whole: str) -> np.ndarray:
    """Units to keep: no second, fourth, ... one, but all of groups whose name contains a given one."""
    keep = np.ones(groups.units, bool)
    for group in groups.groups:
        if not any(name in group.name for name in whole):
            keep[group.slice][1:-1:2] = False
    return keep


def cut(groups: ca.Groups, keep: np.ndarray, variables: Any) -> tuple[ca.Plan, Any]:
    """The plan that keeps these units, and the full variables with all others masked."""
    return ca.plan_units(groups, keep), ca.apply_mask(groups, jnp.asarray(keep, float), variables)


def without_gradient(apply: Callable[..., Any], variables: Any, *args: Any) -> set[str]:
    """Paths of the leaves whose gradient is zero everywhere."""
    gradients = jax.jit(jax.grad(lambda v: (apply(v, *args) ** 2).sum()))(variables)
    return {path for path, leaf in named_leaves(gradients) if not jnp.any(leaf != 0)}
