"""From arrays over the variables to arrays over units, and ranks within groups."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from compaware_jax.groups import Groups
from compaware_jax.trace import on_host


def unit_sum(groups: Groups, tree: Any) -> Float[Array, " units"]:
    """Sum over everything that a unit holds (an element under two of its axes counts twice).

    Args:
      groups: what can leave.
      tree: a pytree like the variables.

    Returns:
      The sums, shape (units,).
    """
    leaves = jax.tree.leaves(tree)
    # On the host, numpy spares a compilation per shape.
    xp = np if all(on_host(leaf) for leaf in leaves) else jnp
    sums, places = [xp.zeros(0)], [np.zeros(0, int)]
    for leaf, axes in zip(leaves, groups.units_of, strict=True):
        for axis, units in enumerate(axes):
            if (units >= 0).any():
                sums.append(xp.asarray(leaf).sum(tuple(a for a in range(leaf.ndim) if a != axis)))
                places.append(np.where(units < 0, groups.units, units))
    together, where = xp.concatenate(sums), np.concatenate(places)
    if xp is np:
        return jnp.asarray(np.bincount(where, together, groups.units + 1)[:-1], float)
    return jax.ops.segment_sum(together, where, groups.units + 1)[:-1]


def ranks(groups: Groups, scores: Num[ArrayLike, " units"]) -> Int[Array, " units"]:
    """Rank of each unit in its group by falling score, from 0, shape (units,); ties by position."""
    order = jnp.lexsort((-jnp.asarray(scores), groups.group_of_unit))
    offsets = np.concatenate([[0], np.cumsum(groups.sizes)[:-1]])
    within = np.arange(groups.units) - offsets[groups.group_of_unit]
    return jnp.zeros(groups.units, int).at[order].set(within)


def within_groups(groups: Groups, scores: Num[ArrayLike, " units"]) -> Float[Array, " units"]:
    """Scores over the mean of their group, shape (units,): comparable from group to group.

    References:
      Fang et al., DepGraph, arXiv 2301.12900 (its normalised group importance).
    """
    scores = jnp.asarray(scores, float)
    group = groups.group_of_unit
    sums = jax.ops.segment_sum(scores, group, len(groups.groups), indices_are_sorted=True)
    means = sums / groups.sizes
    return scores / jnp.where(means == 0, 1.0, means)[group]
