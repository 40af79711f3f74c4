"""Masks: gates over units as a pytree like the variables, and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from compaware_jax.coupling.groups import Groups, check_groups, leaves_like
from compaware_jax.coupling.program import is_smooth
from compaware_jax.errors import PlanError
from compaware_jax.placement import is_weak, on_host, place_of


def mask(groups: Groups, gates: Num[ArrayLike, " units"], variables: Any) -> Any:
    """The mask of gates: each leaf the outer product of its axes' gates.

    Args:
      groups: what can leave.
      gates: one value in [0, 1] per unit, shape (units,); soft or hard.
      variables: the pytree whose structure the mask takes; only its structure is used.

    Returns:
      A pytree like `variables`; axes that no unit reaches have size 1 in it, so it broadcasts.

    Raises:
      PlanError: there is not one gate per unit, or the variables have other leaves.
    """
    check_groups(groups)
    gates = _per_unit(groups, gates, jnp)
    if (count := jax.tree.structure(variables).num_leaves) != len(groups.leaves):
        raise PlanError(
            f"mask: the variables have {count} leaves, expected {len(groups.leaves)}. Pass those that the "
            "groups were found for."
        )
    leaves = [_outer(axes, gates, jnp) for axes in groups.units_of]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def apply_mask(groups: Groups, gates: Num[ArrayLike, " units"], variables: Any) -> Any:
    """``mask(gates) * variables``, differentiable in both.

    Integers and flags, which have no values in between, are whole until their gate is closed.

    Args:
      groups: what can leave.
      gates: shape (units,).
      variables: the pytree that the groups were found for.

    Returns:
      A pytree like `variables`, of the same shapes and dtypes.

    Raises:
      PlanError: there is not one gate per unit, or the variables are others.
    """
    leaves, structure = leaves_like(groups, variables, "apply_mask"), jax.tree.structure(variables)
    # On the host, numpy spares a compilation per shape.
    here = all(map(on_host, [gates, *leaves]))
    xp = np if here else jnp
    gates = _per_unit(groups, gates, xp)
    masked = [
        _masked(leaf, _outer(axes, gates, xp), xp) for leaf, axes in zip(leaves, groups.units_of, strict=True)
    ]
    if here:
        places = [place_of(leaf, leaf.shape) if isinstance(leaf, jax.Array) else None for leaf in leaves]
        masked = jax.device_put(masked, places)
    return jax.tree.unflatten(structure, masked)


def _per_unit(groups: Groups, gates: Any, xp: Any) -> Any:
    try:
        gates = xp.asarray(gates, jax.dtypes.canonicalize_dtype(float))
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"mask: the gates are {type(gates).__name__}, expected numbers, one per unit: "
            "apply_mask(groups, gates, variables)."
        ) from error
    if gates.shape != (groups.units,):
        raise PlanError(f"mask: gates have shape {gates.shape}, expected one per unit, ({groups.units},).")
    return gates


def _masked(leaf: Any, factor: Any, xp: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf  # A random key is no number, and none of its axes leaves.
    if not is_smooth(leaf):
        # There is nothing between an integer and zero that every reader of it would take for less.
        return xp.where(factor > 0, xp.asarray(leaf), xp.zeros((), leaf.dtype))
    if is_weak(leaf):
        return jnp.asarray(leaf).at[...].multiply(factor.astype(leaf.dtype))  # A product would not be weak.
    with np.errstate(all="ignore"):  # What is infinite or no number is so in a program, too.
        return (xp.asarray(leaf) * factor).astype(leaf.dtype)


def _outer(axes: tuple[np.ndarray, ...], gates: Any, xp: Any) -> Any:
    padded = xp.append(gates, xp.ones((), gates.dtype))
    result = xp.ones((1,) * len(axes), gates.dtype)
    for axis, units in enumerate(axes):
        if (units >= 0).any():
            shape = [1] * len(axes)
            shape[axis] = len(units)
            result = result * padded[units].reshape(shape)
    return result


def group_counts(groups: Groups, gates: Num[ArrayLike, " units"]) -> Float[Array, " groups"]:
    """Soft count of kept units per group: the sum of its gates, shape (groups,)."""
    return jax.ops.segment_sum(
        jnp.asarray(gates, float), groups.group_of_unit, len(groups.groups), indices_are_sorted=True
    )
