"""Importance by the weights alone; integers and flags are none, see `unit_sum`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compaware_jax.coupling.groups import Groups
from compaware_jax.importance.units import as_numbers, counted, floats, squared, sums_over_units, unit_sum
from compaware_jax.placement import replicated


def l1(groups: Groups, variables: Any) -> Float[Array, " units"]:
    """Sum of the absolute values of a unit's weights, shape (units,)."""
    return unit_sum(groups, variables, abs)


def l2(groups: Groups, variables: Any) -> Float[Array, " units"]:
    """Euclidean norm of a unit's weights, shape (units,).

    References:
      Li et al., Pruning Filters for Efficient ConvNets, arXiv 1608.08710 (the L1 form), over whole
      coupled units as in Fang et al., DepGraph, arXiv 2301.12900.
    """
    squares = sums_over_units(groups, variables, squared)
    return floats(np.sqrt(squares) if isinstance(squares, np.ndarray) else jnp.sqrt(squares))


def lamp(groups: Groups, variables: Any) -> Float[Array, " units"]:
    """Layer-adaptive magnitude: a unit's squared norm over that of all units of its group that stay with it.

    Comparable from group to group: the largest unit of every group scores one.

    References:
      Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, arXiv 2010.07611, over units.
    """
    squares = l2(groups, variables) ** 2
    order = jnp.lexsort((-squares, groups.group_of_unit))
    first = jnp.zeros(groups.units, bool).at[groups.offsets].set(True)

    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (before, begun), (value, begins) = left, right
        return jnp.where(begins, value, before + value), begun | begins

    # Anew in every group: groups may differ by many orders of magnitude.
    larger, _ = jax.lax.associative_scan(add, (squares[order], first))
    return jnp.zeros(groups.units).at[order].set(squares[order] / jnp.where(larger == 0, 1.0, larger))


def fpgm(groups: Groups, variables: Any) -> Float[Array, " units"]:
    """Distance to the other units of the group, summed: a unit near the geometric median is replaceable.

    Args:
      groups: what can leave.
      variables: the weights.

    Returns:
      Shape (units,).

    References:
      He et al., Filter Pruning via Geometric Median, arXiv 1811.00250, over whole coupled units.
    """
    squares = [jnp.zeros((group.units, group.units)) for group in groups.groups]
    for leaf, axes in counted(groups, variables):
        for axis, units in enumerate(axes):
            for number in np.unique(groups.group_of_unit[units[units >= 0]]):
                rows = np.flatnonzero((units >= 0) & (groups.group_of_unit[units] == number))
                # Units of a group hold as many indices as one another: rows of the same width.
                rows = rows[np.argsort(units[rows], kind="stable")]
                vectors = jnp.moveaxis(replicated(as_numbers(leaf)), axis, 0)[rows]
                vectors = vectors.reshape(groups.groups[number].units, -1)
                products = (vectors @ vectors.conj().T).real
                norms = jnp.diagonal(products)
                squares[number] += jnp.maximum(norms[:, None] + norms[None] - 2 * products, 0.0)
    return jnp.concatenate([jnp.sqrt(s).sum(1) for s in squares]) if squares else jnp.zeros(0)


def random(groups: Groups, key: jax.Array) -> Float[Array, " units"]:
    """Uniform random scores, the control, shape (units,)."""
    return jax.random.uniform(key, (groups.units,))
