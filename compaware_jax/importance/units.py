"""From arrays over the variables to arrays over units, and ranks within groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from compaware_jax.coupling.groups import Groups, leaves_like
from compaware_jax.coupling.program import is_smooth
from compaware_jax.placement import on_host, replicated


def unit_sum(groups: Groups, tree: Any, of: Callable[[Any], Any] = lambda x: x) -> Float[Array, " units"]:
    """Sum over everything that a unit holds (an element under two of its axes counts twice).

    Integers and flags, such as the codes of a quantised kernel or a counter, are no weights beside those that
    are: they count for groups that hold nothing else. Where a kernel's scale is not among what a unit holds,
    rank by the weights that it stands for.

    Args:
      groups: what can leave.
      tree: a pytree like the variables.
      of: element-wise function of what is summed, e.g. a square.

    Returns:
      The sums, shape (units,).
    """
    return floats(sums_over_units(groups, tree, of))


def squared(x: Any) -> Any:
    """Squares of the magnitudes of an array's elements."""
    return x * x if x.dtype.kind != "c" else (x * x.conj()).real


def as_numbers(array: Any) -> jax.Array:
    """An array on the device as floats of the default type at least, or complex numbers of such."""
    default = jax.dtypes.canonicalize_dtype(float)
    return jnp.asarray(array, jnp.promote_types(array.dtype, default) if is_smooth(array) else default)


def counted(groups: Groups, tree: Any) -> list[tuple[Any, list[np.ndarray]]]:
    """The leaves of a tree like the variables, and per axis the units that they count for; see `unit_sum`."""
    leaves = leaves_like(groups, tree, "importance")
    pairs = list(zip(leaves, map(list, groups.units_of), strict=True))
    if not all(groups.smooth):
        beside_weights = np.append(groups.trained[groups.group_of_unit], False)
        for (_, axes), smooth in zip(pairs, groups.smooth, strict=True):
            if not smooth:
                axes[:] = [np.where(beside_weights[units], -1, units) for units in axes]
    return pairs


def floats(values: Any) -> jax.Array:
    """As a JAX array of the default float type."""
    if isinstance(values, np.ndarray):
        # `jnp.asarray` would compile a program for it.
        return jax.device_put(values.astype(jax.dtypes.canonicalize_dtype(float)))
    return jnp.asarray(values, float)


def sums_over_units(groups: Groups, tree: Any, of: Callable[[Any], Any]) -> np.ndarray | Array:
    """`unit_sum`, as a numpy array where all leaves are on the host."""
    pairs = counted(groups, tree)
    # On the host, numpy spares a compilation per shape.
    xp = np if all(on_host(leaf) for leaf, _ in pairs) else jnp
    sums, places = [xp.zeros(0)], [np.zeros(0, int)]
    for leaf, axes in pairs:
        wanted = [axis for axis, units in enumerate(axes) if units.max(initial=-1) >= 0]
        if wanted:
            sums += (_host_sums if xp is np else _device_sums)(leaf, wanted, of)
        places += [axes[axis] for axis in wanted]
    # What belongs to no unit is counted first, and dropped.
    together, where = xp.concatenate(sums), np.concatenate(places) + 1
    if xp is np:
        return np.bincount(where, together, groups.units + 1)[1:]
    return jax.ops.segment_sum(together, where, groups.units + 1)[1:]


def _device_sums(leaf: Any, wanted: Sequence[int], of: Callable[[Any], Any]) -> list[Any]:
    values = of(jnp.asarray(leaf, _wide(leaf.dtype)))
    sums = (values.sum(tuple(a for a in range(leaf.ndim) if a != axis)) for axis in wanted)
    return [replicated(x) for x in sums]


@cache
def _wide(dtype: Any) -> Any:
    # Sums of narrow floats lose what they add; float32 at least.
    return (
        jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else np.dtype(np.float32)
    )


# So many elements at a time stay in the cache.
_BLOCK = 2**17


def _host_sums(leaf: Any, wanted: Sequence[int], of: Callable[[Any], Any]) -> list[np.ndarray]:
    """Sums over all axes but one, for each of the wanted ones, in one pass over the array."""
    array, dtype = np.asarray(leaf), _wide(leaf.dtype)
    shape = array.shape
    if len(shape) == 1:
        return [of(np.asarray(array, dtype))]
    # A table of the first axes by the last ones, as square as can be: its margins are short.
    sizes = [(math.prod(shape[:n]), math.prod(shape[n:])) for n in range(len(shape))]
    split = min(range(len(shape)), key=lambda n: sum(sizes[n]))
    rows, columns = sizes[split]
    table, step = array.reshape(rows, columns), max(1, _BLOCK // max(columns, 1))
    by_row, by_column = [], np.zeros(columns)
    for start in range(0, max(rows, 1), step):
        values = of(np.asarray(table[start : start + step], dtype))
        # A product with ones is several times as fast as a sum.
        by_row.append(values @ np.ones(columns, values.dtype))
        by_column = by_column + np.ones(len(values), values.dtype) @ values
    margins = (np.concatenate(by_row).reshape(shape[:split]), by_column.reshape(shape[split:]))
    result = []
    for axis in wanted:
        margin, own = (margins[0], axis) if axis < split else (margins[1], axis - split)
        result.append(margin.sum(tuple(a for a in range(margin.ndim) if a != own)))
    return result


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
