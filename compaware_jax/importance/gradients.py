"""Importance by gradients: what the loss says about closing a unit's gate.

The gate of a unit multiplies everything that the unit holds, so the loss' derivative by it is the sum of
weight times gradient over the unit, and the removal of the unit is a step from one to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compaware_jax.coupling.groups import Groups
from compaware_jax.coupling.program import is_smooth
from compaware_jax.importance.units import squared, unit_sum
from compaware_jax.masks import apply_mask

Value = Callable[[Any], Array]
"""``variables -> scalar``, differentiable."""


def gate_gradients(groups: Groups, variables: Any, gradients: Any) -> Float[Array, " units"]:
    """The loss' derivative by each gate at one: sum of weight times gradient, shape (units,).

    Args:
      groups: what can leave.
      variables: the weights.
      gradients: the loss gradients at them, a pytree like the variables. What stands in the places of
        integers and flags, such as ``jax.grad(..., allow_int=True)`` puts there, is not looked at.
    """
    return unit_sum(groups, _where_trained(lambda w, g: (w * g).real, variables, gradients))


def _where_trained(of: Callable[[Any, Any], Any], variables: Any, gradients: Any) -> Any:
    """A function of each leaf and its gradient; zeros for what has none."""

    def value(leaf: Any, gradient: Any) -> Any:
        return of(leaf, gradient) if is_smooth(leaf) else np.zeros(leaf.shape, np.float32)

    return jax.tree.map(value, variables, gradients)


def taylor(groups: Groups, variables: Any, gradients: Any) -> Float[Array, " units"]:
    """First-order Taylor: ``|sum of weight * gradient|`` over a unit, shape (units,).

    Args:
      groups: what can leave.
      variables: the weights.
      gradients: the loss gradients at them, a pytree like the variables.

    References:
      Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv 1906.10771.
    """
    return jnp.abs(gate_gradients(groups, variables, gradients))


def curvature(groups: Groups, loss: Value, variables: Any, *, at_once: int = 8) -> Float[Array, " units"]:
    """Second derivative of a loss by each gate at one, shape (units,): exact, one product per unit."""

    def of_gates(gates: jax.Array) -> jax.Array:
        return loss(apply_mask(groups, gates, variables))

    gates = jnp.ones(groups.units)

    def one(unit: jax.Array) -> jax.Array:
        direction = jnp.zeros_like(gates).at[unit].set(1.0)
        return jax.jvp(jax.grad(of_gates), (gates,), (direction,))[1][unit]

    return jax.lax.map(one, jnp.arange(groups.units), batch_size=at_once)


def taylor2(groups: Groups, loss: Value, variables: Any, *, at_once: int = 8) -> Float[Array, " units"]:
    """Second-order Taylor: ``|h / 2 - g|`` with a gate's slope g and curvature h, shape (units,).

    References:
      Molchanov et al., arXiv 1906.10771 (second-order form), with the exact curvature of gates.
    """
    slopes = gate_gradients(groups, variables, jax.grad(loss, allow_int=True)(variables))
    return jnp.abs(0.5 * curvature(groups, loss, variables, at_once=at_once) - slopes)


def obd(groups: Groups, loss: Value, variables: Any, *, at_once: int = 8) -> Float[Array, " units"]:
    """Optimal brain damage: half of the curvature by the gate, the slope taken as zero, shape (units,).

    References:
      LeCun et al., Optimal Brain Damage, NeurIPS 1989, over whole units.
    """
    return 0.5 * jnp.abs(curvature(groups, loss, variables, at_once=at_once))


class Evidence(NamedTuple):
    """Moving means over training steps of what gradients say about units; a pytree.

    Attributes:
      steps: how many were seen, shape ().
      norm: of the norm of a unit's gradient, shape (units,).
      slope: of the gate's gradient, shape (units,).
      square: of its square, shape (units,).
    """

    steps: jax.Array
    norm: jax.Array
    slope: jax.Array
    square: jax.Array


def no_evidence(groups: Groups) -> Evidence:
    """Nothing seen yet."""
    nothing = jnp.zeros(groups.units)
    return Evidence(jnp.zeros((), jnp.int32), nothing, nothing, nothing)


def observe(
    evidence: Evidence, groups: Groups, variables: Any, gradients: Any, *, smoothing: float = 0.95
) -> Evidence:
    """Take the gradients of one more step in.

    Args:
      evidence: so far.
      groups: what can leave.
      variables: the weights.
      gradients: the loss gradients at them.
      smoothing: share of the past in the moving means, in [0, 1); corrected for the first steps. At one
        they are plain means over all steps.

    Returns:
      The new evidence.
    """
    norm = jnp.sqrt(unit_sum(groups, _where_trained(lambda w, g: g, variables, gradients), squared))
    slope = gate_gradients(groups, variables, gradients)
    steps = evidence.steps + 1
    weight = 1 / steps if smoothing == 1 else (1 - smoothing) / (1 - smoothing**steps)
    return Evidence(
        steps=steps,
        norm=evidence.norm + weight * (norm - evidence.norm),
        slope=evidence.slope + weight * (slope - evidence.slope),
        square=evidence.square + weight * (slope**2 - evidence.square),
    )


def accumulated(evidence: Evidence) -> Float[Array, " units"]:
    """Accumulated gradient norm of each unit, smoothed over steps, shape (units,).

    References:
      Sundaram et al., arXiv 2601.19794 (gradient accumulation).
    """
    return evidence.norm


def fisher(evidence: Evidence) -> Float[Array, " units"]:
    """Empirical Fisher information of each gate, halved: the loss expected from closing it, shape (units,).

    References:
      Theis et al., Faster gaze prediction with dense networks and Fisher pruning, arXiv 1801.05787.
    """
    return 0.5 * evidence.square


def bayesian(evidence: Evidence, *, prior: float = 1e-8) -> Float[Array, " units"]:
    """How surely a gate matters: its mean slope times its root mean square, over its spread, shape (units,).

    All three are over the smoothed steps. Where steps disagree about a gate, its spread is wide and its
    score low.

    Args:
      evidence: of some steps.
      prior: added to the mean square and to the spread's square, so that a gate without a slope scores zero.

    References:
      After the idea of Sundaram et al., arXiv 2601.19794 (uncertainty with temporal smoothing); the formula
      is ours.
    """
    spread = jnp.maximum(evidence.square - evidence.slope**2, 0.0)
    return jnp.abs(evidence.slope) * jnp.sqrt(evidence.square + prior) / jnp.sqrt(spread + prior)
