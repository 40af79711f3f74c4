"""From arrays over the variables to arrays over units, and ranks within groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from compaware_jax.groups import Groups
from compaware_jax.trace import on_host


def unit_sum(groups: Groups, tree: Any, of: Callable[[Any], Any] = lambda x: x) -> Float[Array, " units"]:
    """Sum over everything that a unit holds (an element under two of its axes counts twice).

    Args:
      groups: what can leave.
      tree: a pytree like the variables.
      of: element-wise function of what is summed, e.g. a square.

    Returns:
      The sums, shape (units,).
    """
    leaves = jax.tree.leaves(tree)
    # On the host, numpy spares a compilation per shape.
    xp = np if all(on_host(leaf) for leaf in leaves) else jnp
    sums, places = [xp.zeros(0)], [np.zeros(0, int)]
    for leaf, axes in zip(leaves, groups.units_of, strict=True):
        wanted = [axis for axis, units in enumerate(axes) if (units >= 0).any()]
        # Sums of narrow floats lose what they add; float32 at least.
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        sums += (_host_sums if xp is np else _device_sums)(
            leaf, wanted, lambda x, t=wide: of(xp.asarray(x, t))
        )
        places += [np.where(axes[axis] < 0, groups.units, axes[axis]) for axis in wanted]
    together, where = xp.concatenate(sums), np.concatenate(places)
    if xp is np:
        return jnp.asarray(np.bincount(where, together, groups.units + 1)[:-1], float)
    return jax.ops.segment_sum(together, where, groups.units + 1)[:-1]


def _device_sums(leaf: Any, wanted: Sequence[int], of: Callable[[Any], Any]) -> list[Any]:
    values = of(leaf)
    return [values.sum(tuple(a for a in range(leaf.ndim) if a != axis)) for axis in wanted]


# So many elements at a time stay in the cache.
_BLOCK = 2**18


def _host_sums(leaf: Any, wanted: Sequence[int], of: Callable[[Any], Any]) -> list[np.ndarray]:
    """Sums over all axes but one, for each of the wanted ones, in one pass over the array."""
    if not wanted:
        return []
    array = np.asarray(leaf)
    sums: list[Any] = [0.0] * len(wanted)
    first: list[np.ndarray] = []
    rows = max(1, _BLOCK * array.shape[0] // max(array.size, 1))
    for start in range(0, array.shape[0], rows):
        values = of(array[start : start + rows])
        for number, axis in enumerate(wanted):
            part = values.sum(tuple(a for a in range(array.ndim) if a != axis))
            if axis == 0:
                first.append(part)
            else:
                sums[number] = sums[number] + part
    return [np.concatenate(first) if axis == 0 else total for axis, total in zip(wanted, sums, strict=True)]


def ranks(groups: Groups, scores: Num[ArrayLike, " units"]) -> Int[Array | np.ndarray, " units"]:
    """Rank of each unit in its group by falling score, from 0, shape (units,); ties by position."""
    within = np.arange(groups.units) - groups.offsets[groups.group_of_unit]
    if isinstance(scores, np.ndarray):
        result = np.empty(groups.units, int)
        result[np.lexsort((-scores, groups.group_of_unit))] = within
        return result
    order = jnp.lexsort((-jnp.asarray(scores), groups.group_of_unit))
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
