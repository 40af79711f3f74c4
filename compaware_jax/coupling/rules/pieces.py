"""Primitives that take, drop or add runs along an axis: slice, rev, split, unstack, pad, tile.

Each rule applies to the array of atoms what the primitive does to the value, so the index arithmetic
is the primitive's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from compaware_jax.coupling.dead import one_of
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import take
from compaware_jax.coupling.rules.families import dead_of, freed
from compaware_jax.coupling.rules.registry import Kept, Small, register_rule

# --- slice, rev, split, unstack -----------------------------------------------------------------------


def _sliced(ledger: Ledger, eqn: Equation, x: Tracked, index: tuple[slice, ...], out: int) -> Tracked:
    factors = [Factor(f.axes, f.ids[tuple(index[a] for a in f.axes)], f.dead) for f in x.factors]
    return freed(ledger, eqn.out_shapes[out], factors, x.uniform, eqn)


def _positions(index: slice, size: int, kept: np.ndarray) -> np.ndarray:
    """Where the elements of a full axis that a slice takes stand on the cut axis."""
    wanted = np.arange(size)[index]
    return np.searchsorted(kept, wanted[np.isin(wanted, kept)])


def _slim_index(eqn: Equation, x: Small, index: tuple[slice, ...]) -> jax.Array:
    """Static slices, on cut axes by position; whole axes keep their own strided slice."""
    size = eqn.in_shapes[0]
    whole = tuple(i if kept is None else slice(None) for i, kept in zip(index, x.kept, strict=True))
    positions = [
        None if kept is None else _positions(i, n, kept)
        for i, n, kept in zip(index, size, x.kept, strict=True)
    ]
    return take(_static_slice(x.array, whole), positions)


def _static_slice(array: jax.Array, index: tuple[slice, ...]) -> jax.Array:
    for axis, part in enumerate(index):
        start, stop, step = part.indices(array.shape[axis])
        if step == -1:
            array = lax.rev(array, (axis,))
        elif (start, stop, step) != (0, array.shape[axis], 1):
            array = lax.slice_in_dim(array, start, stop, step, axis)
    return array


def _slice_index(eqn: Equation) -> tuple[slice, ...]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    return tuple(slice(*triple) for triple in zip(starts, limits, strides, strict=True))


def _rev_index(eqn: Equation) -> tuple[slice, ...]:
    rank = len(eqn.in_shapes[0])
    return tuple(slice(None, None, -1 if a in eqn.params["dimensions"] else 1) for a in range(rank))


def _split_indices(eqn: Equation) -> list[tuple[slice, ...]]:
    rank, axis = len(eqn.in_shapes[0]), eqn.params["axis"]
    ends = np.cumsum(eqn.params["sizes"])
    return [
        tuple(slice(int(end - size), int(end)) if a == axis else slice(None) for a in range(rank))
        for size, end in zip(eqn.params["sizes"], ends, strict=True)
    ]


for primitive, index_of in ((p.slice_p, _slice_index), (p.rev_p, _rev_index)):

    def _couple_index(
        ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked], index_of: Any = index_of
    ) -> list[Tracked]:
        return [_sliced(ledger, eqn, inputs[0], index_of(eqn), 0)]

    def _slim_one(
        eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept], index_of: Any = index_of
    ) -> list[jax.Array]:
        return [_slim_index(eqn, operands[0], index_of(eqn))]

    register_rule(primitive, _couple_index, _slim_one, moves=True)


def _couple_split(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    return [_sliced(ledger, eqn, inputs[0], index, out) for out, index in enumerate(_split_indices(eqn))]


register_rule(
    lax.split_p,
    _couple_split,
    lambda eqn, operands, kept: [_slim_index(eqn, operands[0], index) for index in _split_indices(eqn)],
    moves=True,
)


def _unstack_indices(eqn: Equation) -> list[tuple[slice, ...]]:
    rank, axis = len(eqn.in_shapes[0]), eqn.params["axis"]
    return [
        tuple(slice(i, i + 1) if a == axis else slice(None) for a in range(rank))
        for i in range(eqn.in_shapes[0][axis])
    ]


def _couple_unstack(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    axis, (x,) = eqn.params["axis"], inputs
    single = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    outputs = []
    for index, shape in zip(_unstack_indices(eqn), eqn.out_shapes, strict=True):
        factors = [Factor(f.axes, f.ids[tuple(index[a] for a in f.axes)], f.dead) for f in x.factors]
        sliced = freed(ledger, single, factors, x.uniform, eqn)
        moved = tuple(f.moved({a: a - (a > axis) for a in f.axes}) for f in sliced.factors)
        outputs.append(Tracked(shape, moved, x.uniform))
    return outputs


register_rule(
    lax.unstack_p,
    _couple_unstack,
    lambda eqn, operands, kept: [
        lax.squeeze(_slim_index(eqn, operands[0], index), (eqn.params["axis"],))
        for index in _unstack_indices(eqn)
    ],
    moves=True,
)


# --- pad, tile ----------------------------------------------------------------------------------------


def padded_positions(size: int, padding: tuple[Any, Any, Any]) -> np.ndarray:
    """Which element of an axis stands where after `lax.pad`; -1 for padding."""
    low, high, interior = (int(n) for n in padding)
    spread = np.full(max(size + (size - 1) * interior, 0), -1)
    spread[:: interior + 1] = np.arange(size)
    spread = np.pad(spread, (max(low, 0), max(high, 0)), constant_values=-1)
    return spread[max(-low, 0) : len(spread) - max(-high, 0)]


def _couple_pad(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    x, value = inputs
    config = eqn.params["padding_config"]
    whole = all(c == (0, 0, 0) for c in config)
    factors = []
    for factor in x.factors:
        ids = factor.ids
        for position, axis in enumerate(factor.axes):
            if config[axis] != (0, 0, 0):
                source = padded_positions(x.shape[axis], config[axis])
                ids = np.moveaxis(np.take(ids, source, axis=position), position, 0)
                new = ids[source < 0].shape
                reason = f"padded by {eqn.where}"
                fixed = ledger.all_fixed(factor.ids)
                ids[source < 0] = ledger.fresh_fixed(*new, reason=reason) if fixed else ledger.fresh(*new)
                ids = np.moveaxis(ids, 0, position)
        # Padding along any axis puts the padding value at dead positions too.
        dead = factor.dead if whole else one_of([factor.dead, dead_of(value)])
        factors.append(Factor(factor.axes, ids, dead))
    uniform = x.uniform if x.uniform == value.uniform else None
    return [freed(ledger, eqn.out_shapes[0], factors, uniform, eqn)]


def _slim_pad(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    x, value = operands
    array, config = x.array, list(eqn.params["padding_config"])
    for axis, index in enumerate(kept[0]):
        if config[axis] == (0, 0, 0):
            continue
        if x.kept[axis] is not None or index is not None:
            source = padded_positions(eqn.in_shapes[0][axis], config[axis])
            source = source if index is None else source[index]
            have = x.kept[axis]
            have = np.arange(eqn.in_shapes[0][axis]) if have is None else have
            # The padding value goes behind the operand, and positions choose from both.
            places = np.where(source < 0, array.shape[axis], np.searchsorted(have, source))
            edge = [(0, 0, 0)] * array.ndim
            edge[axis] = (0, 1, 0)
            array = jnp.take(lax.pad(array, value.array, edge), places, axis=axis, mode="clip")
            config[axis] = (0, 0, 0)
    return [lax.pad(array, value.array, config)]


register_rule(p.pad_p, _couple_pad, _slim_pad)


def _couple_tile(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    (x,), reps = inputs, eqn.params["reps"]
    factors = [Factor(f.axes, np.tile(f.ids, [reps[a] for a in f.axes]), f.dead) for f in x.factors]
    return [Tracked(eqn.out_shapes[0], tuple(factors), x.uniform)]


def _slim_tile(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    return [lax.tile(operands[0].array, eqn.params["reps"])]


register_rule(lax.tile_p, _couple_tile, _slim_tile)
