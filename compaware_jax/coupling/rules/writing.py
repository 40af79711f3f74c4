"""Updates by index: scatter, dynamic_update_slice.

Axes written whole are passed on. Of the others, those whose positions are constants of the program are
followed position by position (`Write`); where one is not, none is, and they stay whole. The axes of an update
that run over computed positions are summed over by `scatter_add`: what leaves there adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from compaware_jax.coupling.dead import UNKNOWN, one_of
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, cut, take, take_along
from compaware_jax.coupling.rules.families import dead_of, fixed_elsewhere, known_start, passed
from compaware_jax.coupling.rules.registry import Kept, Small, register_rule


@dataclass(frozen=True, eq=False)
class Write:
    """Where the update goes along an axis that it does not cover.

    Attributes:
      axis: of the operand.
      source: the axis of the update that runs along it; None where a single place is written to.
      places: positions on the operand's axis, one per index of the update's.
    """

    axis: int
    source: int | None
    places: np.ndarray


def _couple(
    ledger: Ledger,
    eqn: Equation,
    x: Tracked,
    update: Tracked,
    passes: Mapping[int, int],
    writes: Sequence[Write] | None,
    *,
    replaces: bool,
    summed: Sequence[Factor] = (),
) -> list[Factor]:
    """The factors of an operand that is written to.

    Args:
      ledger: of the analysis.
      eqn: the equation.
      x: the operand.
      update: what is written.
      passes: axes of the update that cover the operand's, to those.
      writes: one per other axis of the operand; None where that is not known.
      replaces: whether the update takes the place of what was there.
      summed: factors of the update that are summed over.
    """
    reason, places = f"written to by index in {eqn.where}", list(writes or ())
    along = [(_alone(x, w.axis), _alone(update, w.source)) for w in places]
    into = passed(ledger, x, {a: a for a in passes.values()}, reason, [f for f, _ in along if f])
    written = passed(ledger, update, passes, reason, [*(f for _, f in along if f), *summed])
    factors = []
    for axes, ids, (mine, theirs) in combine(ledger, [tuple(into), tuple(written)]):
        factors.append(Factor(axes, ids, one_of([dead_of(x, mine), dead_of(update, theirs)])))
    if writes is None:
        return factors + fixed_elsewhere(ledger, x.shape, passes.values(), reason)
    whole = [len(np.unique(w.places)) == x.shape[w.axis] for w in places]
    for n, (write, (mine, theirs)) in enumerate(zip(places, along, strict=True)):
        size, tracked = x.shape[write.axis], [f for f in (mine, theirs) if f is not None]
        if not tracked or size == 1:
            continue
        if all(ledger.all_fixed(f.ids) for f in tracked):
            factors += fixed_elsewhere(ledger, x.shape, {*range(len(x.shape))} - {write.axis}, reason)
            continue
        dead = [dead_of(x, mine and mine.dead), dead_of(update, theirs and theirs.dead)]
        ids = (ledger.fresh(size) if mine is None else mine.ids).copy()
        if theirs is not None:
            if replaces and all(whole[:n] + whole[n + 1 :]):
                ids[write.places] = theirs.ids
                dead = dead[1:] if whole[n] else dead
            ledger.equate(ids[write.places], theirs.ids)
        factors.append(Factor((write.axis,), ids, one_of(dead)))
    return factors


def _alone(x: Tracked, axis: int | None) -> Factor | None:
    """The factor on this axis alone, if there is one."""
    return next((f for f in x.factors if f.axes == (axis,)), None)


def _slim(
    eqn: Equation, x: Small, update: Small, kept: Kept, passes: Mapping[int, int], writes: Sequence[Write]
) -> tuple[jax.Array, jax.Array | None, dict[int, np.ndarray], dict[int, np.ndarray]]:
    """The operand and the update (None: nothing of it is left), cut; per axis the new places, and which."""
    base = x.array
    wanted: list[np.ndarray | None] = [None] * update.array.ndim
    for axis, out in passes.items():
        wanted[axis] = kept[out]
    moved, which = {}, {}
    for write in writes:
        index, have = kept[write.axis], x.kept[write.axis]
        if index is None:
            index = np.arange(eqn.in_shapes[0][write.axis])
        if have is not None:
            # Where something is written, what was there may have left by itself: anything will do.
            places = np.clip(np.searchsorted(have, index), 0, max(len(have) - 1, 0))
            base = take(base, [places if a == write.axis else None for a in range(base.ndim)], distinct=False)
        which[write.axis] = np.flatnonzero(np.isin(write.places, index))
        moved[write.axis] = np.searchsorted(index, write.places[which[write.axis]])
        if not len(which[write.axis]):
            return cut(Small(base, x.kept, x.zero), kept), None, moved, which
        if write.source is not None:
            wanted[write.source] = which[write.axis]
    return cut(Small(base, x.kept, x.zero), kept), cut(update, tuple(wanted)), moved, which


# --- scatter ------------------------------------------------------------------------------------------


def _scatter_axes(eqn: Equation) -> tuple[dict[int, int], dict[int, int]]:
    """Whole window axes and batching axes of the updates to axes of the operand."""
    dims = eqn.params["dimension_numbers"]
    operand, _, updates = eqn.in_shapes
    whole = {u: a for u, a in _window_axes(eqn).items() if updates[u] == operand[a]}
    batch = _batch_axes(eqn)
    batching = {
        batch[b]: a
        for a, b in zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims, strict=True)
    }
    return whole, batching


def _window_axes(eqn: Equation) -> dict[int, int]:
    """Window axes of the updates to axes of the operand."""
    dims = eqn.params["dimension_numbers"]
    gone = {*dims.inserted_window_dims, *dims.operand_batching_dims}
    windows = [a for a in range(len(eqn.in_shapes[0])) if a not in gone]
    # A vmap makes numpy's integers of these.
    return dict(zip(map(int, dims.update_window_dims), windows, strict=True))


def _batch_axes(eqn: Equation) -> list[int]:
    """The axes of the updates that run over the indices."""
    windows = eqn.params["dimension_numbers"].update_window_dims
    return [a for a in range(len(eqn.in_shapes[2])) if a not in windows]


def _scatter_writes(eqn: Equation, known: np.ndarray | None) -> list[Write] | None:
    """Where static indices write, axis by axis; None where it is not static, or no grid of positions."""
    dims, operand, updates = eqn.params["dimension_numbers"], eqn.in_shapes[0], eqn.in_shapes[2]
    whole, batching = _scatter_axes(eqn)
    if known is None or not known.size or batching:
        return None
    starts = dict(zip(dims.scatter_dims_to_operand_dims, np.moveaxis(known, -1, 0), strict=True))
    window_of = {a: u for u, a in _window_axes(eqn).items()}
    writes, batch = [], _batch_axes(eqn)
    for axis in (a for a in range(len(operand)) if a not in whole.values()):
        start = starts.get(axis, np.zeros(known.shape[:-1], int))
        varying = [d for d in range(start.ndim) if (start != np.take(start, [0], d)).any()]
        source, places = window_of.get(axis), start.ravel()[:1]
        if source is not None and not varying:
            places = places + np.arange(updates[source])
        elif source is None and len(varying) == 1:
            source = batch[varying[0]]
            places = np.moveaxis(start, varying[0], 0).reshape(start.shape[varying[0]], -1)[:, 0]
        elif varying:
            return None
        writes.append(Write(axis, source, places))
    for a, start in starts.items():
        if a in whole.values() and start.any():
            return None
    sources = [w.source for w in writes if w.source is not None]
    inside = all((w.places >= 0).all() and (w.places < operand[w.axis]).all() for w in writes)
    return writes if inside and len(set(sources)) == len(sources) else None


_ADDS = {p.scatter_add_p, *([lax.scatter_sub_p] if hasattr(lax, "scatter_sub_p") else [])}


def _summed(ledger: Ledger, eqn: Equation, indices: Tracked, updates: Tracked) -> list[tuple[Factor, Factor]]:
    """Factors of computed positions, and of the updates along them, that are summed over and may leave."""
    if eqn.primitive not in _ADDS or indices.known is not None:
        return []
    both = ((_alone(indices, d), _alone(updates, u)) for d, u in _position_axes(eqn).items())
    found = [(a, b) for a, b in both if a is not None and b is not None]
    return [(a, b) for a, b in found if not (ledger.all_fixed(a.ids) or ledger.all_fixed(b.ids))]


def _position_axes(eqn: Equation) -> dict[int, int]:
    """Axes of the indices to those of the updates along them, without those of batching."""
    batching = eqn.params["dimension_numbers"].scatter_indices_batching_dims
    # The last axis of the indices holds the columns of a position.
    return {d: u for d, u in enumerate(_batch_axes(eqn)) if d not in batching}


def _couple_scatter(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    x, indices, updates = inputs
    whole, batching = _scatter_axes(eqn)
    summed = _summed(ledger, eqn, indices, updates)
    for factor in indices.factors:
        if not any(factor is f for f, _ in summed):
            ledger.fix(factor.ids, f"an index of {eqn.where}")
    for positions, written in summed:
        ledger.equate(positions.ids, written.ids)
    # `x.at[i].apply(f)` is a scatter with f in it, and f of zero may be anything.
    sets = eqn.primitive is p.scatter_p
    applied = sets and eqn.params["update_jaxpr"] is not None
    writes, passes = _scatter_writes(eqn, indices.known), whole | batching
    factors = _couple(
        ledger, eqn, x, updates, passes, writes,
        replaces=sets and not applied, summed=[written for _, written in summed],
    )  # fmt: skip
    return [Tracked(x.shape, tuple(factors if not applied else [replace(f, dead=UNKNOWN) for f in factors]))]


def _slim_scatter(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    x, indices, updates = operands
    whole, batching = _scatter_axes(eqn)
    if any(kept[0][a] is not None for a in batching.values()):
        return None
    writes = _scatter_writes(eqn, indices.known) or []
    base, update, moved, which = _slim(eqn, x, updates, kept[0], whole | batching, writes)
    if update is None:
        return [base]
    positions = indices.array
    # Along axes that are followed position by position, the update was cut above.
    for d, u in _position_axes(eqn).items() if not writes else ():
        mine, theirs = indices.kept[d], updates.kept[u]
        if (mine is not None or theirs is not None) and not updates.zero[u]:
            return None
        if mine is None:
            positions = take_along(positions, d, theirs)
        if theirs is None:
            update = take_along(update, u, mine)
    if writes:
        assert indices.known is not None
        places, batch = indices.known.copy(), _batch_axes(eqn)
        columns = eqn.params["dimension_numbers"].scatter_dims_to_operand_dims
        dims = {w.axis: batch.index(w.source) for w in writes if w.source in batch}
        for axis, dim in dims.items():
            places = np.take(places, which[axis], dim)
        for axis in (w.axis for w in writes if w.axis in columns):
            # Along a window, and where there is one place, the first says it all.
            along = [-1 if d == dims.get(axis) else 1 for d in range(places.ndim - 1)]
            new = moved[axis] if axis in dims else moved[axis][:1]
            places[..., columns.index(axis)] = new.reshape(along)
        positions = jnp.asarray(places)
    return bind(eqn, [base, positions, update])


for primitive in (p.scatter_p, p.scatter_mul_p, p.scatter_min_p, p.scatter_max_p, *_ADDS):
    register_rule(primitive, _couple_scatter, _slim_scatter)


# --- dynamic_update_slice -----------------------------------------------------------------------------


def _update_writes(
    eqn: Equation, starts: Sequence[Tracked | Small]
) -> tuple[dict[int, int], list[Write] | None]:
    """The axes that the update covers, and where it goes along the others."""
    operand, update = eqn.in_shapes[:2]
    covered = {a: a for a, (n, k) in enumerate(zip(operand, update, strict=True)) if n == k}
    writes = []
    for axis, start in enumerate(starts):
        if axis not in covered:
            first = known_start(start, operand[axis], update[axis])
            if first is None:
                return covered, None
            writes.append(Write(axis, axis, first + np.arange(update[axis])))
    return covered, writes


def _couple_update(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    x, update, *starts = inputs
    factors = _couple(ledger, eqn, x, update, *_update_writes(eqn, starts), replaces=True)
    return [Tracked(x.shape, tuple(factors))]


def _slim_update(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    x, update, *starts = operands
    covered, writes = _update_writes(eqn, starts)
    base, small, moved, _ = _slim(eqn, x, update, kept[0], covered, writes or [])
    if small is None:
        return [base]
    at = [jnp.full_like(s.array, moved[a][0]) if a in moved else s.array for a, s in enumerate(starts)]
    return bind(eqn, [base, small, *at])


register_rule(p.dynamic_update_slice_p, _couple_update, _slim_update)
