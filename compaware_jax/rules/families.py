"""Families that make most rules one line, and the steps of coupling that the others share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.extend.core import Primitive

from compaware_jax.factors import Factor, Ledger, Tracked, combine
from compaware_jax.program import Equation
from compaware_jax.rules.arrays import bind, cut
from compaware_jax.rules.registry import RULES, Kept, Rule, Small, register_rule

ZeroTest = Callable[[Equation, Sequence[bool], Sequence[float | None]], bool]
"""Whether an element-wise result is zero, from each operand's zero flag and uniform value."""


def elementwise(
    primitive: Primitive,
    zero: ZeroTest,
    singular: Iterable[int] | Callable[[Equation, Sequence[float | None]], Iterable[int]] = (),
) -> None:
    """Register an element-wise primitive.

    Args:
      primitive: its operands have the output's shape, up to size-1 axes and scalars.
      zero: when dead positions stay zero.
      singular: operands at whose zeros the function or its derivative is infinite; or a function of the
        equation and the operands' uniform values that says which.
    """

    def couple(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
        uniform = [x.uniform for x in inputs]
        infinite = list(singular(eqn, uniform) if callable(singular) else singular)
        factors = []
        for axes, ids, flags in combine(ledger, [x.factors for x in inputs]):
            dead_is_zero = [bool(flag) for flag in flags]
            factors.append(Factor(axes, ids, zero(eqn, dead_is_zero, uniform)))
            if infinite and _tells_apart(infinite, dead_is_zero, uniform):
                ledger.mark_inexact(ids, f"{eqn.where} is singular at zero")
        is_null = zero(eqn, [u == 0 for u in uniform], uniform)
        return [Tracked(eqn.out_shapes[0], tuple(factors), 0.0 if is_null else None)]

    def slim(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array]:
        return bind(eqn, [cut(x, kept[0]) if x.array.ndim else x.array for x in operands])

    RULES[primitive] = Rule(couple, slim, elementwise=True)


def _tells_apart(infinite: Sequence[int], zero: Sequence[bool], uniform: Sequence[float | None]) -> bool:
    """Whether an operand is singular where a channel is dead, and not alike for every channel.

    Where it is zero everywhere, it tells no channel from another; but something over zero is not nothing
    over zero.
    """
    differ = [z and u is None for z, u in zip(zero, uniform, strict=True)]
    return any(differ[n] or (uniform[n] == 0 and any(differ)) for n in infinite if n < len(differ))


def reduction(primitive: Primitive, *, sums: bool) -> None:
    """Register a reduction over ``params["axes"]``.

    Args:
      primitive: takes one operand, or reduces several alike.
      sums: whether zeros do not change the result; otherwise a cut reduced axis is un-cut.
    """

    def couple(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
        results = []
        for x, shape in zip(inputs, eqn.out_shapes, strict=True):
            kept_axes = [a for a in range(len(x.shape)) if a not in eqn.params["axes"]]
            factors = []
            for factor in x.factors:
                if any(a in kept_axes for a in factor.axes):
                    if _cut_within(ledger, factor, kept_axes):
                        continue
                    factor = ledger.collapse(factor, kept_axes)
                    factors.append(factor.moved({a: kept_axes.index(a) for a in factor.axes}))
            results.append(Tracked(shape, tuple(factors), 0.0 if sums and x.uniform == 0 else None))
        return results

    def slim(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
        for x in operands:
            # An axis that has only a name lies outside, as that of a vmap around the function does.
            for axis in (a for a in eqn.params["axes"] if isinstance(a, (int, np.integer))):
                if x.kept[axis] is not None and not (sums and x.zero[axis]):
                    return None
        return bind(eqn, [x.array for x in operands])

    register_rule(primitive, couple, slim)


def _cut_within(ledger: Ledger, factor: Factor, kept_axes: Sequence[int]) -> bool:
    """Whether a factor is cut along its reduced axes: positions within every norm group, not whole ones.

    Then all that is kept depends on every unit, and none of it leaves.
    """
    kept = tuple(n for a, n in zip(factor.axes, factor.ids.shape, strict=True) if a in kept_axes)
    within = tuple(n for a, n in zip(factor.axes, factor.ids.shape, strict=True) if a not in kept_axes)
    usual = ledger.cuts.within_heads
    if not within or (not usual and np.prod(within) <= np.prod(kept)):
        return False
    if ledger.chosen((kept, within)) is usual:
        return False
    ledger.collapse(factor, [a for a in factor.axes if a not in kept_axes])
    return True


def passed(
    ledger: Ledger, x: Tracked, passes: Mapping[int, int], reason: str, leave: Iterable[Factor] = ()
) -> list[Factor]:
    """The factors of a value on the axes that an operation hands on; the rest never leaves.

    Args:
      ledger: of the analysis.
      x: the value.
      passes: the axes handed on, to the axes that they become.
      reason: why atoms that live on other axes alone never leave.
      leave: factors of `x` that are not looked at.
    """
    skipped, factors = set(map(id, leave)), []
    for factor in x.factors:
        if id(factor) in skipped:
            continue
        rest = [a for a in factor.axes if a in passes]
        if rest:
            factors.append(ledger.collapse(factor, rest).moved({a: passes[a] for a in rest}))
        else:
            ledger.fix(factor.ids, reason)
    return factors


def mixed(ledger: Ledger, x: Tracked, passes: Iterable[int]) -> list[Factor]:
    """The factors of a value, on none of the axes that an operation hands on, of which something may leave.

    An operation that mixes what stands along an axis (a transform, a window) need not keep it whole: it sees
    zeros where something left (`filled_up`), and what comes out stands for itself, to be cut where it meets
    what is cut. Where nothing leaves what is mixed, nothing should leave behind it (`fixed_elsewhere`).
    """
    handed_on = set(passes)
    return [f for f in x.factors if not handed_on.intersection(f.axes) and not ledger.all_fixed(f.ids)]


def fixed_elsewhere(ledger: Ledger, shape: tuple[int, ...], free: Iterable[int], reason: str) -> list[Factor]:
    """Factors that never leave, for the axes of a shape that are not among the free ones."""
    done = set(free)
    return [
        Factor((a,), ledger.fresh_fixed(n, reason=reason), True)
        for a, n in enumerate(shape)
        if n > 1 and a not in done
    ]


def freed(
    ledger: Ledger,
    shape: tuple[int, ...],
    factors: Sequence[Factor],
    uniform: float | None,
    eqn: Equation,
) -> Tracked:
    """A `Tracked` whose size-1 axes are freed: what an equation selected there may not leave."""
    result = []
    for factor in factors:
        single = [pos for pos, axis in enumerate(factor.axes) if shape[axis] == 1]
        if not single:
            result.append(factor)
            continue
        if len(single) == len(factor.axes):
            ledger.fix(factor.ids, f"a single one of them is selected by {eqn.where}")
            continue
        ids = factor.ids[tuple(0 if pos in single else slice(None) for pos in range(factor.ids.ndim))]
        axes = tuple(a for pos, a in enumerate(factor.axes) if pos not in single)
        result.append(Factor(axes, ids, factor.zero))
    return Tracked(shape, tuple(result), uniform)


def common_value(xs: Sequence[Tracked]) -> float | None:
    """The number that every element of all values equals, if there is one."""
    uniform = {x.uniform for x in xs}
    return uniform.pop() if len(uniform) == 1 else None


def is_zero(x: Tracked, flag: bool | None) -> bool:
    """Whether dead positions of a value are zero, by a flag of `combine`; None: no factor is there."""
    return x.uniform == 0 if flag is None else flag


def known_start(start: Tracked | Small, size: int, taken: int) -> int | None:
    """Where a slice of an axis begins, moved inside as JAX does, if the trace shows it."""
    return None if start.known is None else int(np.clip(start.known, 0, size - taken))
