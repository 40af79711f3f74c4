"""Importance of units: what their removal costs, by magnitude, by gradient, or by the criterion itself.

Every function returns scores over units, shape (units,): the higher, the more the unit matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from compaware_jax.groups import Groups
from compaware_jax.masks import apply_mask
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
    offsets = np.concatenate([[0], np.cumsum(groups.sizes)[:-1]]).astype(int)
    within = np.arange(groups.units) - offsets[groups.group_of_unit]
    if isinstance(scores, np.ndarray):
        result = np.empty(groups.units, int)
        result[np.lexsort((-scores, groups.group_of_unit))] = within
        return result
    order = jnp.lexsort((-jnp.asarray(scores), groups.group_of_unit))
    return jnp.zeros(groups.units, int).at[order].set(within)


def l1(groups: Groups, variables: Any) -> Float[Array, " units"]:
    """Sum of the absolute values of a unit's weights, shape (units,)."""
    return unit_sum(groups, variables, abs)


def l2(groups: Groups, variables: Any) -> Float[Array, " units"]:
    """Euclidean norm of a unit's weights, shape (units,).

    References:
      Li et al., Pruning Filters for Efficient ConvNets, arXiv 1608.08710 (the L1 form), over whole
      coupled units as in Fang et al., DepGraph, arXiv 2301.12900.
    """
    return jnp.sqrt(unit_sum(groups, variables, lambda x: x * x))


def random(groups: Groups, key: jax.Array) -> Float[Array, " units"]:
    """Uniform random scores, the control, shape (units,)."""
    return jax.random.uniform(key, (groups.units,))


def taylor(groups: Groups, variables: Any, gradients: Any) -> Float[Array, " units"]:
    """First-order Taylor: ``|sum of weight * gradient|`` over a unit, shape (units,).

    Args:
      groups: what can leave.
      variables: the weights.
      gradients: the loss gradients at them, a pytree like the variables.

    References:
      Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv 1906.10771.
    """
    products = jax.tree.map(lambda w, g: w * g, variables, gradients)
    return jnp.abs(unit_sum(groups, products))


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
