"""Surgery on trees: variables, or whatever is shaped like them, become small, and full again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from compaware_jax.coupling.rules.arrays import scatter
from compaware_jax.placement import is_spread, is_weak, on_host, place_of
from compaware_jax.surgery.matching import change_matching
from compaware_jax.surgery.plan import Plan


def shrink(tree: Any, plan: Plan) -> Any:
    """Cut a tree down to a plan.

    Args:
      tree: the variables, or any pytree that holds trees like them (an optimizer state with its moments,
        EMA copies, a checkpoint of all of these) or like one of their Flax collections (moments
        over ``variables["params"]``), also with leaves or sub-trees left out, by `optax.masked` or by
        None in their place; other leaves are passed through. Its arrays may be abstract
        (`jax.ShapeDtypeStruct`), e.g. to restore a checkpoint of the small model.
      plan: what is kept.

    Returns:
      The tree with every array that belongs to a leaf of the plan cut along the kept indices. Arrays stay
      on their devices, sharded as they were; an axis that the mesh does not divide any more is replicated
      (``constrain(groups, multiple_of=…)`` keeps widths that it divides).

    Raises:
      PlanError: nothing in the tree fits the plan, or a sub-tree fits it in two ways that differ, or has
        its names but other shapes, or leaves among them that the plan does not know.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import compaware_jax as ca
      >>> def net(v, x):
      ...     return jnp.tanh(x @ v["w1"]) @ v["w2"]
      >>> v = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
      >>> groups = ca.find_groups(net, v, jnp.ones((1, 3)))
      >>> plan = ca.plan_units(groups, jnp.arange(8) < 5)
      >>> ca.shrink(v, plan)["w2"].shape
      (5, 2)
      >>> ca.shrink(optax.adam(1e-3).init(v), plan)[0].mu["w1"].shape
      (3, 5)
    """
    return change_matching(tree, plan, _cut, full=True, caller="shrink")


def expand(tree: Any, plan: Plan) -> Any:
    """The inverse of `shrink` up to what was cut, which comes back as zeros.

    Args:
      tree: a tree that `shrink` returned for the plan.
      plan: what was kept.

    Returns:
      The tree at the full shapes: ``expand(shrink(variables, plan), plan)`` is the masked variables.

    Raises:
      PlanError: nothing in the tree fits the plan.
    """
    return change_matching(tree, plan, _put_back, full=False, caller="expand")


def _cut(arrays: Sequence[Any], plan: Plan, positions: Sequence[int]) -> list[Any]:
    kept, room = _as_arrays([plan.kept[i] for i in positions]), _Room()
    small = [_taken(array, indices, room) for array, indices in zip(arrays, kept, strict=True)]
    return _sent_back(small, arrays)


def cut_axes(array: Any, kept: Sequence[Sequence[int] | None]) -> Any:
    """An array with the kept indices of each axis (None: all), on the host where it is there."""
    (indices,) = _as_arrays([kept])
    return _sent_back([_taken(array, indices, _Room())], [array])[0]


def _as_arrays(kept: Sequence[Sequence[Sequence[int] | None]]) -> list[list[np.ndarray | None]]:
    """Kept indices as arrays; the axes of a group share one object, which is converted once."""
    distinct = {id(index): index for axes in kept for index in axes}
    arrays = {name: None if index is None else np.asarray(index, int) for name, index in distinct.items()}
    return [[arrays[id(index)] for index in axes] for axes in kept]


class _Room:
    """Memory for an array cut along one axis only: fresh memory costs more time than the copy into it."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def array(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array in it, in place of the one before."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._bytes):
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


def _fresh(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory of its own, at an address that JAX on the CPU takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


_ALIGNMENT = 64  # Bytes, of XLA's buffers on the CPU.


def _taken(array: Any, kept: Sequence[np.ndarray | None], room: _Room) -> Any:
    if all(index is None for index in kept):
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return _abstract(array, _cut_shape(array, kept))
    if array.dtype == jax.dtypes.float0:  # The gradient of an integer has no memory to cut.
        return np.zeros(_cut_shape(array, kept), array.dtype)
    small = _here(array)
    along = [(axis, index) for axis, index in enumerate(kept) if index is not None]
    for number, (axis, index) in enumerate(along):
        if isinstance(small, np.ndarray):
            shape = (*small.shape[:axis], len(index), *small.shape[axis + 1 :])
            first = number == 0 and len(along) > 1
            out = room.array(shape, small.dtype) if first else _fresh(shape, small.dtype)
            # What is kept lies inside; clipping lets numpy write without a buffer of its own.
            small = np.take(small, index, axis, out=out, mode="clip")
        else:
            small = small.take(index, axis=axis)
    return small


def _cut_shape(array: Any, kept: Sequence[np.ndarray | None]) -> list[int]:
    return [size if index is None else len(index) for size, index in zip(array.shape, kept, strict=True)]


def _abstract(array: jax.ShapeDtypeStruct, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    place = place_of(array, shape)
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=place, weak_type=is_weak(array))


def _here(array: Any) -> Any:
    # On the host, numpy spares a compilation per shape; it knows no weak types. Parts of a sharded array are
    # cut by what they are parts of, so they come together there as well.
    return np.asarray(array) if (on_host(array) or is_spread(array)) and not is_weak(array) else array


def _sent_back(small: list[Any], arrays: Sequence[Any]) -> list[Any]:
    """What was cut on the host becomes JAX arrays where it came from such, all in one transfer."""
    sent = [
        n
        for n, (x, array) in enumerate(zip(small, arrays, strict=True))
        if isinstance(x, np.ndarray) and not isinstance(array, np.ndarray)
    ]
    places = [place_of(arrays[n], small[n].shape) for n in sent]
    result = list(small)
    for n, x in zip(sent, jax.device_put([small[n] for n in sent], places), strict=True):
        result[n] = x
    return result


def _put_back(arrays: Sequence[Any], plan: Plan, positions: Sequence[int]) -> list[Any]:
    full = []
    kept = _as_arrays([plan.kept[i] for i in positions])
    for array, leaf, indices in zip(arrays, positions, kept, strict=True):
        if all(index is None for index in indices):
            full.append(array)
            continue
        if isinstance(array, jax.ShapeDtypeStruct):
            full.append(_abstract(array, plan.leaves[leaf].shape))
            continue
        full.append(scatter(_here(array), indices, plan.leaves[leaf].shape))
    return _sent_back(full, arrays)
