"""Look-ups by index: gather, dynamic_slice.

Axes taken whole are passed on. Axes that are indexed stay whole, unless the positions are constants of
the program: then the rule applies the primitive to the array of atoms, as `pieces` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from compaware_jax.coupling.dead import UNKNOWN, Dead
from compaware_jax.coupling.factors import Factor, Tracked, minimal
from compaware_jax.coupling.folding import look_up
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, take
from compaware_jax.coupling.rules.families import fixed_elsewhere, freed, known_start, passed
from compaware_jax.coupling.rules.registry import Kept, Small, register_rule

# Beyond this many elements a static look-up is not followed position by position.
_FOLLOWED_SIZE = 2**24


# --- gather -------------------------------------------------------------------------------------------


def _gather_axes(eqn: Equation) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """Window axes and batching axes of the operand, and batch axes of the indices, to output axes."""
    dims = eqn.params["dimension_numbers"]
    operand, indices = eqn.in_shapes
    windows = [
        a
        for a in range(len(operand))
        if a not in dims.collapsed_slice_dims and a not in dims.operand_batching_dims
    ]
    batch = [a for a in range(len(eqn.out_shapes[0])) if a not in dims.offset_dims]
    of_indices = dict(zip(range(len(indices) - 1), batch, strict=True))
    # In what JAX transformed, some of them are numpy's.
    batching = {
        int(a): of_indices[b]
        for a, b in zip(dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True)
    }
    return dict(zip(windows, map(int, dims.offset_dims), strict=True)), batching, of_indices


def _couple_gather(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    x, indices = inputs
    windows, batching, of_indices = _gather_axes(eqn)
    sizes = eqn.params["slice_sizes"]
    whole = {a: out for a, out in windows.items() if sizes[a] == x.shape[a]}
    passes = whole | batching
    followed = [
        f for f in x.factors if not set(f.axes) <= set(passes) and _is_followed(ledger, eqn, f, indices.known)
    ]
    factors = passed(ledger, x, passes, f"looked up by index in {eqn.where}", followed)
    for factor in followed:
        assert indices.known is not None
        factors += _follow(ledger, eqn, factor, indices.known, whole)
    from_indices = passed(ledger, indices, of_indices, f"an index of {eqn.where}")
    filled = _is_filled(eqn, indices.known)
    factors = [
        Factor(axes, ids, _looked_up(mine, theirs, filled))
        for axes, ids, (mine, theirs) in combine(ledger, [tuple(factors), tuple(from_indices)])
    ]
    if not followed and any(set(f.axes) - set(passes) for f in x.factors):
        # What is taken from an axis that stays whole stays whole.
        covered = {a for f in factors for a in f.axes} | set(passes.values())
        factors += fixed_elsewhere(ledger, eqn.out_shapes[0], covered, f"looked up by index in {eqn.where}")
    return [freed(ledger, eqn.out_shapes[0], factors, None if filled else x.uniform, eqn)]


def _looked_up(mine: Dead | None, theirs: Dead | None, filled: bool) -> Dead:
    """What is looked up in an operand at positions that may differ where channels are dead."""
    if mine is None:
        return UNKNOWN
    certain = not filled and (theirs is None or theirs.zero)
    return mine if certain else Dead(False, mine.values)


def _is_inside(eqn: Equation, known: np.ndarray | None) -> bool:
    """Whether the positions are known, and all of them inside."""
    if known is None or not known.size:
        return False
    starts = eqn.params["dimension_numbers"].start_index_map
    limits = [eqn.in_shapes[0][a] - eqn.params["slice_sizes"][a] for a in starts]
    return bool((known >= 0).all() and (known <= np.array(limits)).all())


def _is_filled(eqn: Equation, known: np.ndarray | None) -> bool:
    """Whether positions outside may put something into channels that are zero.

    Computed positions are taken to be inside where what is filled in is no number, as is the default of
    `jnp.take`: there, too, only a mistake reads outside, and it spoils the channels that stay as well.
    """
    value = eqn.params["fill_value"]
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP or value == 0 or _is_inside(eqn, known):
        return False
    floating = jnp.issubdtype(eqn.in_dtypes[0], jnp.inexact)
    return known is not None or not (floating and (value is None or np.isnan(value)))


def _is_followed(ledger: Ledger, eqn: Equation, factor: Factor, known: np.ndarray | None) -> bool:
    """Whether every position that a static look-up takes is inside, and few enough to follow."""
    if not _is_inside(eqn, known) or ledger.all_fixed(factor.ids):
        return False
    sizes = [int(np.prod(shape)) for shape in (*eqn.in_shapes[:1], *eqn.out_shapes)]
    return max(sizes) <= _FOLLOWED_SIZE


def _follow(
    ledger: Ledger, eqn: Equation, factor: Factor, known: np.ndarray, whole: dict[int, int]
) -> list[Factor]:
    """The factor of a static look-up: the look-up of the factor. What is looked up alone stays."""
    operand, sizes = list(eqn.in_shapes[0]), list(eqn.params["slice_sizes"])
    for axis in whole:
        if axis not in factor.axes:
            operand[axis] = sizes[axis] = 1
    ids = factor.ids.reshape([n if a in factor.axes else 1 for a, n in enumerate(operand)])
    taken = look_up(np.broadcast_to(ids, operand), known, eqn.params["dimension_numbers"], sizes)
    if not taken.ndim:
        ledger.fix(taken, f"a single one of them is selected by {eqn.where}")
        return []
    return [minimal(range(taken.ndim), taken, factor.dead)]


def _slim_gather(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    x, indices = operands
    windows, batching, of_indices = _gather_axes(eqn)
    sizes = list(eqn.params["slice_sizes"])
    positions = indices.array
    axis_of_batch = {out: a for a, out in of_indices.items()}
    # Output axes that run over the indices: keep the positions that are wanted.
    target: list[np.ndarray | None] = [None] * positions.ndim
    for out, index in enumerate(kept[0]):
        if index is not None and out in axis_of_batch and indices.kept[axis_of_batch[out]] is None:
            target[axis_of_batch[out]] = index
    positions = take(positions, target)
    starts = eqn.params["dimension_numbers"].start_index_map
    for axis, index in enumerate(x.kept):
        if index is None:
            continue
        if axis in starts and sizes[axis] != eqn.in_shapes[0][axis]:
            if sizes[axis] != 1 or indices.known is None:
                return None
            column = starts.index(axis)
            moved = jnp.searchsorted(jnp.asarray(index), positions[..., column])
            positions = positions.at[..., column].set(moved.astype(positions.dtype))
        elif axis in windows:
            sizes[axis] = len(index)
    for axis, out in windows.items():
        if kept[0][out] is not None and x.kept[axis] is None:
            return None
    array = x.array
    for axis, out in batching.items():
        if kept[0][out] is not None and x.kept[axis] is None:
            array = take(array, [kept[0][out] if a == axis else None for a in range(array.ndim)])
    return bind(eqn, [array, positions], slice_sizes=tuple(sizes))


register_rule(p.gather_p, _couple_gather, _slim_gather)


# --- dynamic_slice -----------------------------------------------------------------------------------


def _couple_dynamic_slice(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    x, *starts = inputs
    sizes = eqn.params["slice_sizes"]
    known = [known_start(s, n, k) for s, n, k in zip(starts, x.shape, sizes, strict=True)]
    passes = {
        a: a for a, (s, n, k) in enumerate(zip(known, x.shape, sizes, strict=True)) if n == k or s is not None
    }
    reason = f"sliced at a computed position in {eqn.where}"
    factors = []
    for factor in passed(ledger, x, passes, reason):
        ids = factor.ids
        for position, axis in enumerate(factor.axes):
            start = known[axis] or 0
            ids = np.take(ids, np.arange(start, start + sizes[axis]), axis=position)
        factors.append(Factor(factor.axes, ids, factor.dead))
    factors += fixed_elsewhere(ledger, eqn.out_shapes[0], passes, reason)
    return [freed(ledger, eqn.out_shapes[0], factors, x.uniform, eqn)]


def _slim_dynamic_slice(
    eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]
) -> list[jax.Array] | None:
    x, *starts = operands
    array, begin = x.array, [s.array for s in starts]
    sizes = list(eqn.params["slice_sizes"])
    for axis, index in enumerate(x.kept):
        if index is None:
            continue
        whole = sizes[axis] == eqn.in_shapes[0][axis]
        start = 0 if whole else known_start(starts[axis], eqn.in_shapes[0][axis], sizes[axis])
        if start is None:
            return None
        places = np.flatnonzero((index >= start) & (index < start + sizes[axis]))
        array = take(array, [places if a == axis else None for a in range(array.ndim)])
        sizes[axis] = len(places)
        begin[axis] = jnp.zeros_like(begin[axis])
    return [lax.dynamic_slice(array, begin, sizes)]


register_rule(p.dynamic_slice_p, _couple_dynamic_slice, _slim_dynamic_slice)
