"""The law of the library, measured: masked and slimmed are the same function, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import compaware_jax as ca


def random_keep(groups: ca.Groups, rng: np.random.Generator, share: float = 0.5) -> np.ndarray:
    """Random units to keep: at least one of each group and of each guarded set."""
    keep = rng.random(groups.units) < share
    for group in groups.groups:
        keep[rng.integers(group.offset, group.offset + group.units)] = True
    for units in groups.guarded:
        keep[rng.choice(units)] = True
    return keep


def law_errors(
    apply: Callable[..., Any],
    variables: Any,
    *args: Any,
    keep: np.ndarray,
    groups: ca.Groups,
    slimmer: Callable[..., Any] = ca.slim,
) -> tuple[float, float]:
    """Relative error of the outputs, and of the gradients against their global norm."""
    plan = ca.plan_units(groups, keep)
    masked = jax.jit(lambda v: ca.apply_mask(groups, jnp.asarray(keep, float), v))(variables)
    small, small_apply = ca.shrink(variables, plan), slimmer(apply, plan)
    weights = jax.tree.map(
        lambda s: jax.random.normal(jax.random.key(7), s.shape, s.dtype),
        jax.eval_shape(apply, variables, *args),
    )

    def loss(f: Callable[..., Any], tree: Any) -> jax.Array:
        outputs = f(tree, *args)
        terms = jax.tree.map(lambda y, w: jnp.sum(y * w), outputs, weights)
        return sum(jax.tree.leaves(terms), jnp.zeros(()))

    def evaluate(f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(lambda tree: (f(tree, *args), jax.grad(lambda t: loss(f, t))(tree)))

    expected, expected_grad = evaluate(apply)(masked)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(expected_grad)):
        # Compiled, the derivative of a minimum can be 0/0 (XLA computes the compared values twice, in
        # different roundings, and finds no minimum); op by op it cannot.
        expected, expected_grad = evaluate(apply).__wrapped__(masked)
    expected_grad = ca.shrink(jax.device_get(expected_grad), plan)
    got, got_grad = evaluate(small_apply)(small)
    return distance(got, expected), distance(got_grad, expected_grad)


def distance(got: Any, expected: Any) -> float:
    """Norm of the difference over the norm of the expected tree.

    Weights and inputs are of order one, so a norm below 1e-5 is rounding noise around zero (some
    programs cancel exactly); it has no relative error, and 1e-5 takes its place.
    """
    flat_got = np.concatenate([np.ravel(x) for x in jax.tree.leaves(got)])
    flat_expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected)])
    assert flat_got.shape == flat_expected.shape
    assert np.isfinite(flat_expected).all()
    scale = np.linalg.norm(flat_expected)
    return float(np.linalg.norm(flat_got - flat_expected) / max(scale, 1e-5))
