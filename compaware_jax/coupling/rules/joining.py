"""Primitives that join values along an axis: concatenate, stack.

Values joined one by one, along an axis of which each is a single index, may be cut in two ways (`_joined`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from compaware_jax.coupling.dead import BLANK, one_of
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, cut
from compaware_jax.coupling.rules.families import common_value, dead_of
from compaware_jax.coupling.rules.registry import Kept, Small, register_rule


def _couple_concatenate(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    axis = int(eqn.params["dimension"])
    if all(x.shape[axis] == 1 for x in inputs):
        return [_joined(ledger, eqn, inputs, axis)]
    along = [x.factor_of(axis) for x in inputs]
    spans = {f.axes for f in along if f is not None}
    span = spans.pop() if len(spans) == 1 else (axis,)
    if any(f.axes != span and set(f.axes) & set(span) for x in inputs for f in x.factors):
        span = (axis,)
    along = [None if f is None else ledger.collapse(f, span) for f in along]
    across = [tuple(f for f in x.factors if axis not in f.axes) for x in inputs]
    factors = []
    for axes, ids, dead in combine(ledger, across):
        factors.append(Factor(axes, ids, one_of(map(dead_of, inputs, dead))))
    if any(f is not None or (x.factors and x.shape[axis] == 1) for f, x in zip(along, inputs, strict=True)):
        ids = [
            _untracked(ledger, eqn, [x.shape[a] for a in span], x.shape[axis]) if f is None else f.ids
            for f, x in zip(along, inputs, strict=True)
        ]
        fixed = [f is not None and ledger.all_fixed(f.ids) for f in along]
        dead = one_of(
            BLANK if stays else dead_of(x, f and f.dead)
            for f, x, stays in zip(along, inputs, fixed, strict=True)
        )
        factors.append(Factor(span, np.concatenate(ids, axis=span.index(axis)), dead))
    return [Tracked(eqn.out_shapes[0], tuple(factors), common_value(inputs))]


def _untracked(ledger: Ledger, eqn: Equation, sizes: list[int], along: int) -> np.ndarray:
    """Atoms for a piece that carries none: a single index never leaves, others are free to."""
    if along == 1:
        return ledger.fresh_fixed(*sizes, reason=f"a size-1 axis joined by {eqn.where}")
    return ledger.fresh(*sizes)


def _slim_concatenate(
    eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]
) -> list[jax.Array] | None:
    axis, (target,) = eqn.params["dimension"], kept
    pieces, start = [], 0
    for x, shape in zip(operands, eqn.in_shapes, strict=True):
        index = target[axis]
        if index is not None:
            index = index[(index >= start) & (index < start + shape[axis])] - start
        start += shape[axis]
        if index is None or len(index):
            pieces.append(cut(x, (*target[:axis], index, *target[axis + 1 :])))
    return [lax.concatenate(pieces, axis)]


register_rule(p.concatenate_p, _couple_concatenate, _slim_concatenate, moves=True)


def _couple_stack(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    new = eqn.params["axis"]
    moved = [
        replace(x, factors=tuple(f.moved({a: a + (a >= new) for a in f.axes}) for f in x.factors))
        for x in inputs
    ]
    return [_joined(ledger, eqn, moved, new)]


def _joined(ledger: Ledger, eqn: Equation, pieces: Sequence[Tracked], axis: int) -> Tracked:
    """Values joined one by one along an axis.

    It stays, and along the others they leave together, index by index; unless more can leave where each
    keeps its own: then it is in a joint factor.
    """
    joint = _joint(ledger, pieces, axis)
    factors = [] if joint is None else [joint]
    rest = [tuple(f for f in x.factors if joint is None or f.axes[0] not in joint.axes) for x in pieces]
    for axes, ids, dead in combine(ledger, rest):
        factors.append(Factor(axes, ids, one_of(map(dead_of, pieces, dead))))
    if factors and joint is None and len(pieces) > 1:
        ids = ledger.fresh_fixed(len(pieces), reason=f"joined one by one by {eqn.where}")
        factors.append(Factor((axis,), ids, BLANK))
    return Tracked(eqn.out_shapes[0], tuple(factors), common_value(pieces))


def _joint(ledger: Ledger, pieces: Sequence[Tracked], axis: int) -> Factor | None:
    """The atoms of all pieces, if there is one other axis along which they differ and it is cut that way."""
    differ = []
    for factor in pieces[0].factors:
        along = [f for x in pieces for f in x.factors if f.axes == factor.axes]
        shared = all(f.ids is factor.ids for f in along)
        if len(along) == len(pieces) and not shared and not all(ledger.all_fixed(f.ids) for f in along):
            differ.append(along)
    if len(differ) != 1 or len(differ[0][0].axes) > 1:
        return None
    ids, (other,) = np.stack([f.ids for f in differ[0]]), differ[0][0].axes
    if not ledger.chosen(((), ids.shape)):
        return None
    dead = one_of(f.dead for f in differ[0])
    return Factor((axis, other), ids, dead) if axis < other else Factor((other, axis), ids.T, dead)


def _slim_stack(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    new = eqn.params["axis"]
    target = kept[0][:new] + kept[0][new + 1 :]
    return bind(eqn, [cut(x, target) for x in operands])


register_rule(lax.stack_p, _couple_stack, _slim_stack, moves=True)
