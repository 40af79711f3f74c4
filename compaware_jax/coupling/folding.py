"""Equations of constants, evaluated while tracing: in numpy, which compiles no program per shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from compaware_jax.coupling.program import Equation, is_smooth
from compaware_jax.placement import explicit

# --- what numpy computes as JAX does, bit for bit -------------------------------------------------------

COMPARISONS: dict[Primitive, Callable[..., np.ndarray]] = {
    p.eq_p: np.equal, p.ne_p: np.not_equal, p.lt_p: np.less, p.le_p: np.less_equal,
    p.gt_p: np.greater, p.ge_p: np.greater_equal,
}  # fmt: skip
_ELEMENTWISE: dict[Primitive, Callable[..., np.ndarray]] = {
    p.add_p: np.add, p.sub_p: np.subtract, p.mul_p: np.multiply, p.max_p: np.maximum, p.min_p: np.minimum,
    p.and_p: np.bitwise_and, p.or_p: np.bitwise_or, p.xor_p: np.bitwise_xor, p.not_p: np.bitwise_not,
    p.copy_p: np.asarray, **COMPARISONS,
}  # fmt: skip


def _iota(eqn: Equation) -> np.ndarray:
    shape, axis = eqn.out_shapes[0], eqn.params["dimension"]
    along = np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return np.broadcast_to(along, shape)


def _broadcast(eqn: Equation, x: np.ndarray) -> np.ndarray:
    shape = eqn.out_shapes[0]
    axes = [1] * len(shape)
    for size, axis in zip(x.shape, eqn.params["broadcast_dimensions"], strict=True):
        axes[axis] = size
    return np.broadcast_to(x.reshape(axes), shape)


def _selected(eqn: Equation, which: np.ndarray, *cases: np.ndarray) -> np.ndarray | None:
    return np.where(which, *reversed(cases)) if which.dtype == bool else None


def _converted(eqn: Equation, x: np.ndarray) -> np.ndarray | None:
    # A float that no integer holds is JAX's own affair.
    whole = not is_smooth(eqn.out_avals[0]) and is_smooth(eqn.in_avals[0])
    return None if whole else x.astype(eqn.out_avals[0].dtype)


def _sliced(eqn: Equation, x: np.ndarray) -> np.ndarray:
    strides = eqn.params["strides"] or [1] * x.ndim
    return x[tuple(map(slice, eqn.params["start_indices"], eqn.params["limit_indices"], strides))]


_OTHERS: dict[Primitive, Callable[..., np.ndarray | None]] = {
    p.iota_p: _iota,
    p.broadcast_in_dim_p: _broadcast,
    p.select_n_p: _selected,
    p.convert_element_type_p: _converted,
    p.slice_p: _sliced,
    p.squeeze_p: lambda eqn, x: x.reshape(eqn.out_shapes[0]),
    p.reshape_p: lambda eqn, x: x.reshape(eqn.out_shapes[0]),
    p.transpose_p: lambda eqn, x: x.transpose(eqn.params["permutation"]),
    p.concatenate_p: lambda eqn, *xs: np.concatenate(xs, eqn.params["dimension"]),
}


def evaluate(eqn: Equation, inputs: Sequence[Any]) -> list[np.ndarray] | None:
    """An equation of constants, evaluated here and now.

    Args:
      eqn: it.
      inputs: arrays, of numpy or of JAX.

    Returns:
      Its results; None where nothing can be evaluated, as in a part of a `jax.shard_map`, or for a mesh that
      is not set.
    """
    result = _by_numpy(eqn, inputs)
    if result is not None:
        return [result]
    try:
        with jax.ensure_compile_time_eval():
            results = eqn.run(*inputs)
    except ValueError:
        # Its type names a mesh, but nothing here says which devices are in it.
        if any(explicit(aval.sharding) for aval in eqn.out_avals):
            return None
        raise
    return None if any(isinstance(x, Tracer) for x in results) else [np.asarray(x) for x in results]


def _by_numpy(eqn: Equation, inputs: Sequence[Any]) -> np.ndarray | None:
    if eqn.primitive not in _ELEMENTWISE and eqn.primitive not in _OTHERS:
        return None
    avals = (*eqn.in_avals, *eqn.out_avals)
    # Keys, and numbers that numpy has not of its own, such as bfloat16, are of no kind here.
    if any(explicit(aval.sharding) or getattr(aval.dtype, "kind", "V") not in "biufc" for aval in avals):
        return None
    # A constant of the user's may be wider than what JAX takes it for.
    arrays = [np.asarray(x, dtype) for x, dtype in zip(inputs, eqn.in_dtypes, strict=True)]
    with np.errstate(all="ignore"):
        if eqn.primitive in _ELEMENTWISE:
            result = _ELEMENTWISE[eqn.primitive](*arrays)
        else:
            result = _OTHERS[eqn.primitive](eqn, *arrays)
    return None if result is None else np.asarray(result, eqn.out_avals[0].dtype)


# --- look-ups -------------------------------------------------------------------------------------------


def look_up(operand: np.ndarray, positions: np.ndarray, dimensions: Any, sizes: Sequence[int]) -> np.ndarray:
    """`jax.lax.gather` with positions inside the operand (others are moved inside).

    Args:
      operand: what is looked up.
      positions: of the corners of the windows, as JAX's gather takes them: an axis of coordinates comes last.
      dimensions: JAX's `GatherDimensionNumbers`.
      sizes: of a window, per axis of the operand.
    """
    # JAX's own numbers may be numpy's.
    offsets = [int(axis) for axis in dimensions.offset_dims]
    gone = {*dimensions.collapsed_slice_dims, *dimensions.operand_batching_dims}
    windows = dict(zip((a for a in range(operand.ndim) if a not in gone), offsets, strict=True))
    batching = zip(dimensions.operand_batching_dims, dimensions.start_indices_batching_dims, strict=True)
    each = dict(batching)
    rank = len(windows) + positions.ndim - 1
    places = [axis for axis in range(rank) if axis not in offsets]

    def over(axes: Sequence[int], values: Any) -> np.ndarray:
        """Values over some axes of the result."""
        shape = [1] * rank
        for axis, size in zip(axes, np.shape(values), strict=True):
            shape[axis] = size
        return np.asarray(values).reshape(shape)

    index = []
    for axis, size in enumerate(sizes):
        at = np.zeros([1] * rank, int)
        if axis in dimensions.start_index_map:
            corners = positions[..., dimensions.start_index_map.index(axis)].astype(int)
            at = over(places, np.clip(corners, 0, operand.shape[axis] - size))
        if axis in each:
            at = over([places[each[axis]]], np.arange(operand.shape[axis]))
        if axis in windows:
            at = at + over([windows[axis]], np.arange(size))
        index.append(at)
    return np.asarray(operand[tuple(index)])
