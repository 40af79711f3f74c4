"""The steps of slimming that rules share: arrays cut, put back, and bound again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.registry import Kept, Small
from compaware_jax.placement import dividing, resharded, sharding_in_type


def take(array: jax.Array, positions: Sequence[np.ndarray | None], *, distinct: bool = True) -> jax.Array:
    """Static positions along each axis (None: all of them), no two of them the same where `distinct`."""
    for axis, index in enumerate(positions):
        if index is not None:
            array = resharded(array, axis, lambda whole, a=axis, i=index: _take_axis(whole, i, a, distinct))
    return array


def _take_axis(array: jax.Array, index: np.ndarray, axis: int, distinct: bool) -> jax.Array:
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return jax.lax.slice_in_dim(array, int(index[0]), int(index[0]) + len(index), axis=axis)
    return jnp.take(array, index, axis=axis, mode="clip", unique_indices=distinct)


def take_along(array: jax.Array, axis: int, index: np.ndarray | None) -> jax.Array:
    """Static positions along one axis (None: all of them)."""
    return take(array, [index if a == axis else None for a in range(array.ndim)])


def scatter(array: Any, kept: Sequence[np.ndarray | None], shape: tuple[int, ...]) -> Any:
    """Put a cut array back at its places in zeros of the full shape; a numpy array stays one."""
    for axis, index in enumerate(kept):
        if index is not None:
            size = (*array.shape[:axis], shape[axis], *array.shape[axis + 1 :])
            places = (slice(None),) * axis + (index,)
            if isinstance(array, np.ndarray):
                full = np.zeros(size, array.dtype)
                full[places] = array
                array = full
            else:
                sharding = dividing(sharding_in_type(array), size)
                zeros = jnp.zeros_like(array, shape=size, device=sharding)
                array = zeros.at[places].set(array, out_sharding=sharding)
    return array


def missing(want: Kept, have: Kept) -> Kept:
    """What is kept of the axes that a value still has whole."""
    return tuple(index if mine is None else None for index, mine in zip(want, have, strict=True))


def cut(operand: Small, target: Kept) -> jax.Array:
    """Cut the whole axes of an operand down to the target's kept indices.

    Size-1 axes broadcast, so they are left alone.
    """
    shape = operand.array.shape
    return take(
        operand.array,
        [
            want if have is None and shape[axis] != 1 else None
            for axis, (have, want) in enumerate(zip(operand.kept, target, strict=True))
        ],
    )


def small_shape(shape: tuple[int, ...], kept: Kept) -> tuple[int, ...]:
    """A full shape with the kept counts in place of the cut axes."""
    return tuple(size if index is None else len(index) for size, index in zip(shape, kept, strict=True))


def bind(eqn: Equation, arrays: Sequence[jax.Array], **overrides: Any) -> list[jax.Array]:
    """Bind the equation's primitive on other arrays, with some parameters overridden."""
    result = eqn.primitive.bind(*arrays, **(eqn.params | overrides))
    return list(result) if eqn.primitive.multiple_results else [result]


def filled_up(operand: Small, axes: Iterable[int], shape: tuple[int, ...]) -> Small | None:
    """An operand of a full shape with zeros for what was cut of some axes; None where those are not zeros."""
    cut_there = [a for a in axes if operand.kept[a] is not None]
    if not all(operand.zero[a] for a in cut_there):
        return None
    there = tuple(index if a in cut_there else None for a, index in enumerate(operand.kept))
    elsewhere = tuple(None if a in cut_there else index for a, index in enumerate(operand.kept))
    return Small(scatter(operand.array, there, shape), elsewhere, operand.zero, operand.known)


def spread(eqn: Equation, result: jax.Array, have: Kept, target: Kept) -> jax.Array:
    """Zeros at the indices of a result that stay although the weights that make them are gone."""
    places = [within(index, want) for index, want in zip(have, target, strict=True)]
    return scatter(result, places, small_shape(eqn.out_shapes[0], target))


def within(index: np.ndarray | None, wider: np.ndarray | None) -> np.ndarray | None:
    """Where kept indices of an axis stand among more that are kept; None where they are the same."""
    if index is None or wider is None:
        return index
    return None if len(wider) == len(index) else np.searchsorted(wider, index)


def vanishes(lhs: Small, left: int, rhs: Small, right: int) -> bool:
    """Whether what leaves a contracted pair of axes contributes zero to the contraction."""
    pair = ((lhs, left), (rhs, right))
    cut_axes = [(x, axis) for x, axis in pair if x.kept[axis] is not None]
    return not cut_axes or any(x.zero[axis] for x, axis in cut_axes)


def intersect(
    arrays: list[jax.Array], a: np.ndarray | None, left: int, b: np.ndarray | None, right: int
) -> list[jax.Array]:
    """Cut two paired axes to what both keep."""
    if a is None or b is None:
        return [
            take_along(arrays[0], left, b if a is None else None),
            take_along(arrays[1], right, a if b is None else None),
        ]
    if np.array_equal(a, b):
        return arrays
    both = np.intersect1d(a, b)
    return [
        take_along(arrays[0], left, np.searchsorted(a, both)),
        take_along(arrays[1], right, np.searchsorted(b, both)),
    ]
