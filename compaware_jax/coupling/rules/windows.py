"""Windows and running results: pooling, and cumulative sums, products and extrema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from compaware_jax.coupling.dead import UNKNOWN, ZERO, Dead, one_of
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, cut, filled_up
from compaware_jax.coupling.rules.families import fixed_elsewhere, mixed, passed
from compaware_jax.coupling.rules.registry import Kept, Small, register_rule

# --- windows ------------------------------------------------------------------------------------------


def _trivial_axes(eqn: Equation) -> list[int]:
    """Axes along which the window is one element wide."""
    params, rank = eqn.params, len(eqn.params["window_dimensions"])
    ones, none = (1,) * rank, ((0, 0),) * rank
    strides = params["window_strides"]
    base, dilation = params.get("base_dilation") or ones, params.get("window_dilation") or ones
    padding = params.get("padding") or none
    return [
        a
        for a in range(rank)
        if (params["window_dimensions"][a], strides[a], base[a], dilation[a]) == (1, 1, 1, 1)
        and tuple(padding[a]) == (0, 0)
    ]


def _is_always_on_data(eqn: Equation) -> bool:
    """Whether no position of the window is wholly in the padding, or in the holes of a dilated operand."""
    params, rank = eqn.params, len(eqn.params["window_dimensions"])
    base, dilation = params.get("base_dilation") or (1,) * rank, params.get("window_dilation") or (1,) * rank
    for axis, (size, positions) in enumerate(zip(eqn.in_shapes[0], eqn.out_shapes[0], strict=True)):
        starts = np.arange(positions) * params["window_strides"][axis] - params["padding"][axis][0]
        taps = starts[:, None] + np.arange(params["window_dimensions"][axis]) * dilation[axis]
        inside = (taps >= 0) & (taps < size * base[axis]) & (taps % base[axis] == 0)
        if not inside.any(1).all():
            return False
    return True


def windowed(primitive: Primitive, *, zeros: bool, padded: bool = True) -> None:
    """Register a primitive that slides a window over operands of one rank.

    Args:
      primitive: with the parameters of `lax.reduce_window`; operands of rank 0 are start values.
      zeros: whether a window of zeros gives zero.
      padded: whether a window of padding alone does, too.
    """

    def couple(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
        trivial = _trivial_axes(eqn)
        reason = f"a window runs over it in {eqn.where}"
        over = [x for x in inputs if x.shape]
        free = [mixed(ledger, x, trivial) for x in over]
        parts = [
            tuple(passed(ledger, x, {a: a for a in trivial}, reason, leave))
            for x, leave in zip(over, free, strict=True)
        ]
        untracked = {a for factors in free for f in factors for a in f.axes}
        stays = zeros and (padded or _is_always_on_data(eqn))
        factors = [Factor(axes, ids, _windows_of(dead, stays)) for axes, ids, dead in combine(ledger, parts)]
        outputs = []
        for shape in eqn.out_shapes:
            fixed = fixed_elsewhere(ledger, shape, {*trivial, *untracked}, reason)
            outputs.append(Tracked(shape, (*factors, *fixed)))
        return outputs

    def slim(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
        trivial = _trivial_axes(eqn)
        target = tuple(index if a in trivial else None for a, index in enumerate(kept[0]))
        over = [a for a in range(len(target)) if a not in trivial]
        arrays = []
        for x, shape in zip(operands, eqn.in_shapes, strict=True):
            whole = filled_up(x, over, shape) if shape else x
            if whole is None:
                return None
            arrays.append(cut(whole, target) if shape else x.array)
        return bind(eqn, arrays)

    register_rule(primitive, couple, slim)


def _windows_of(dead: Sequence[Dead | None], stays: bool) -> Dead:
    return _zeros_of(one_of(UNKNOWN if d is None else d for d in dead), stays)


def _zeros_of(dead: Dead, stays: bool) -> Dead:
    """What is made of runs that may be zero from end to end: then it may be zero, or `stays` so."""
    return Dead(stays and dead.zero, dead.values & ZERO.values)


windowed(p.reduce_window_sum_p, zeros=True)
for primitive in (p.reduce_window_max_p, p.reduce_window_min_p):
    windowed(primitive, zeros=True, padded=False)  # There the result is infinite.
for primitive in (p.reduce_window_p, p.select_and_gather_add_p, p.select_and_scatter_add_p):
    windowed(primitive, zeros=False)


# --- running results ----------------------------------------------------------------------------------


def running(primitive: Primitive, *, sums: bool, zeros: bool) -> None:
    """Register a running result along ``params["axis"]``.

    Args:
      primitive: takes one operand.
      sums: whether zeros along the axis do not change the result; otherwise a cut axis is un-cut.
      zeros: whether zeros all along the axis give zero.
    """

    def couple(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
        (x,) = inputs
        factors = tuple(
            replace(f, dead=_zeros_of(f.dead, zeros and eqn.params["axis"] not in f.axes)) for f in x.factors
        )
        return [Tracked(x.shape, factors)]

    def slim(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
        (x,) = operands
        axis = eqn.params["axis"]
        if x.kept[axis] is not None and not (sums and x.zero[axis]):
            return None
        return bind(eqn, [x.array])

    register_rule(primitive, couple, slim)


running(p.cumsum_p, sums=True, zeros=True)
for primitive in (p.cumprod_p, p.cummax_p, p.cummin_p):
    running(primitive, sums=False, zeros=True)
running(p.cumlogsumexp_p, sums=False, zeros=False)
