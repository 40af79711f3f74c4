"""Importance by the criterion itself: what a metric loses with a unit, or with half of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from compaware_jax.coupling.groups import Groups
from compaware_jax.importance.units import ranks
from compaware_jax.masks import apply_mask


def gradient_sensitivity(
    groups: Groups, metric: Callable[[Any], Array], variables: Any
) -> Float[Array, " units"]:
    """How fast a metric changes with each unit's gate at one: ``|d metric / d gate|``.

    Args:
      groups: what can leave.
      metric: ``variables -> scalar``, differentiable.
      variables: where to take the gradient.

    Returns:
      Shape (units,), in the metric's unit.
    """
    gates = jnp.ones(groups.units)
    return jnp.abs(jax.grad(lambda g: metric(apply_mask(groups, g, variables)))(gates))


def ablation(
    groups: Groups, metric: Callable[[Any], Array], variables: Any, *, at_once: int = 16
) -> Float[Array, " units"]:
    """How much a metric falls when each unit alone is removed: ``metric(all) - metric(without it)``.

    One compiled pass, vmapped over `at_once` units at a time.

    Args:
      groups: what can leave.
      metric: ``variables -> scalar``; need not be differentiable.
      variables: the weights.
      at_once: how many masked copies of the variables are held at the same time.

    Returns:
      Shape (units,), in the metric's unit; negative where the metric rises.
    """
    gates = jnp.ones(groups.units)

    def without(unit: jax.Array) -> jax.Array:
        return metric(apply_mask(groups, gates.at[unit].set(0.0), variables))

    values = jax.lax.map(without, jnp.arange(groups.units), batch_size=at_once)
    return metric(variables) - values


def group_ablation(
    groups: Groups,
    metric: Callable[[Any], Array],
    variables: Any,
    scores: Num[ArrayLike, " units"],
    *,
    share: float = 0.5,
) -> Float[Array, " groups"]:
    """How much a metric falls when each group alone gives up a share of its units.

    Args:
      groups: what can leave.
      metric: ``variables -> scalar``.
      variables: the weights.
      scores: which units go first (the lowest), shape (units,).
      share: of each group's units, in (0, 1).

    Returns:
      Shape (groups,), in the metric's unit: the group's sensitivity.
    """
    stays = ranks(groups, scores) < jnp.ceil((1 - share) * groups.sizes)[groups.group_of_unit]

    def weakened(group: jax.Array) -> jax.Array:
        gates = jnp.where(groups.group_of_unit == group, stays, True).astype(float)
        return metric(apply_mask(groups, gates, variables))

    return metric(variables) - jax.lax.map(weakened, jnp.arange(len(groups.groups)), batch_size=4)
