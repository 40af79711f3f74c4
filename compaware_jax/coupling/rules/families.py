"""Families that make most rules one line, and the steps of coupling that the others share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from compaware_jax.coupling.dead import BLANK, UNKNOWN, ZERO, Dead, few
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, cut
from compaware_jax.coupling.rules.registry import RULES, Kept, Rule, Small, register_rule

ZeroTest = Callable[[Equation, Sequence[bool], Sequence[float | None]], bool]
"""Whether an element-wise result is zero, from each operand's zero flag and uniform value."""

Numbers = frozenset[float]
Becomes = Callable[[Equation, Sequence[Numbers], Sequence[bool]], Iterable[float]]
"""What an element-wise result is, from what each operand is (empty: not known), and whether by what left."""


def elementwise(
    primitive: Primitive,
    zero: ZeroTest,
    singular: Iterable[int] | Callable[[Equation, Sequence[float | None]], Iterable[int]] = (),
    *,
    at: Sequence[float] = (0.0,),
    finite: bool = False,
    becomes: Becomes | None = None,
    crosses: bool = False,
    bounds: bool = False,
) -> None:
    """Register an element-wise primitive.

    Args:
      primitive: its operands have the output's shape, up to size-1 axes and scalars.
      zero: when dead positions stay zero.
      singular: operands at some values of which the function or its derivative is infinite; or a function of
        the equation and the operands' uniform values that says which.
      at: those values.
      finite: whether it is the derivative alone that is infinite there.
      becomes: the function itself, on numbers (see `on_numbers`): what is dead and not zero may be a number
        at which a later function is infinite.
      crosses: whether it is zero where one operand is dead along an axis and another along another.
      bounds: whether it makes nothing infinite, or no number, of an infinite operand and an unknown one.
    """

    def couple(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
        uniform = [x.uniform for x in inputs]
        infinite = list(singular(eqn, uniform) if callable(singular) else singular)
        if finite and not ledger.is_differentiated(eqn.outputs[0]):
            infinite = []
        factors = []
        for axes, ids, dead in combine(ledger, [x.factors for x in inputs]):
            by_what_left, made = [d is not None and bool(d.values) for d in dead], []
            stays_zero = zero(eqn, [d is not None and d.zero for d in dead], uniform)
            meets_infinity = any(d is not None and d.infinite for d in dead)
            if becomes is not None and any(by_what_left) and (meets_infinity or not stays_zero):
                numbers = [_numbers(u, d) for u, d in zip(uniform, dead, strict=True)]
                if crosses:
                    numbers = [n or _elsewhere(ledger, x, axes) for n, x in zip(numbers, inputs, strict=True)]
                made = represented(becomes(eqn, numbers, by_what_left), eqn.out_avals[0].dtype)
            blank = ZERO if any(by_what_left) else BLANK
            factors.append(Factor(axes, ids, blank if stays_zero else Dead(False, few(made))))
            if infinite and (place := _tells_apart(infinite, at, dead, uniform)) is not None:
                ledger.mark_inexact(ids, f"{eqn.where} is singular at {f'{place:g}' if place else 'zero'}")
            elif any(map(math.isnan, made)) or (meets_infinity and not (made or bounds)):
                ledger.mark_inexact(ids, f"{eqn.where} makes no number of what is infinite without it")
        is_null = zero(eqn, [u == 0 for u in uniform], uniform)
        return [Tracked(eqn.out_shapes[0], tuple(factors), 0.0 if is_null else None)]

    def slim(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array]:
        return bind(eqn, [cut(x, kept[0]) if x.array.ndim else x.array for x in operands])

    RULES[primitive] = Rule(couple, slim, elementwise=True)


def on_numbers(function: Callable[..., Any]) -> Becomes:
    """What a function of numbers makes of all that its operands may be; nothing where one is not known."""

    @lru_cache(1024)
    def results(numbers: tuple[Numbers, ...]) -> Numbers:
        with np.errstate(all="ignore"):
            every = [function(*map(np.float64, each)) for each in itertools.product(*numbers)]
        return frozenset(map(float, every))

    return lambda eqn, numbers, by_what_left: results(tuple(numbers))


def represented(numbers: Iterable[float], dtype: Any) -> list[float]:
    """Numbers as a dtype has them: infinite where they are too large for it."""
    largest = _largest(dtype)
    return [math.copysign(math.inf, x) if abs(x) > largest else x for x in numbers]


@lru_cache(64)
def _largest(dtype: Any) -> float:
    return float(jnp.finfo(dtype).max) if jnp.issubdtype(dtype, jnp.inexact) else math.inf


def cases(eqn: Equation, numbers: Sequence[Numbers], by_what_left: Sequence[bool]) -> Iterable[float]:
    """What is chosen from all operands but the first, which chooses.

    If the first is not known, or not by what left, then only cases that something left are told.
    """
    which, *each = numbers
    chosen = [int(n) for n in which] or range(len(each))
    return (x for n in chosen if by_what_left[0] or by_what_left[n + 1] for x in each[n])


def _numbers(uniform: float | None, dead: Dead | None) -> Numbers:
    if dead is None:
        return frozenset() if uniform is None else frozenset({uniform})
    return dead.values or (ZERO.values if dead.zero else frozenset())


def _elsewhere(ledger: Ledger, x: Tracked, axes: tuple[int, ...]) -> Numbers:
    """What a value is where it is dead along other axes than these."""
    others = (f for f in x.factors if f.axes != axes and not ledger.all_fixed(f.ids))
    return frozenset().union(*(f.dead.values for f in others))


def _tells_apart(
    infinite: Sequence[int], at: Sequence[float], dead: Sequence[Dead | None], uniform: Sequence[float | None]
) -> float | None:
    """Where an operand is singular that is so where a channel is dead, and not alike for every channel.

    What is the same everywhere tells no channel from another; but something over zero is not nothing over
    zero.
    """
    values = [d.values if d and u is None else frozenset() for d, u in zip(dead, uniform, strict=True)]
    for n in (n for n in infinite if n < len(dead)):
        for place in at:
            if place in values[n] or (uniform[n] == place and any(place in v for v in values)):
                return place
    return None


def reduction(
    primitive: Primitive,
    *,
    sums: bool,
    becomes: Callable[[float, int], float] | None = None,
) -> None:
    """Register a reduction over ``params["axes"]`` to which zeros are zero.

    Args:
      primitive: takes one operand, or reduces several alike.
      sums: whether zeros do not change the result; otherwise a cut reduced axis is un-cut.
      becomes: what it makes of one number, so many times.
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
                    if not factor.zero:
                        count = math.prod(x.shape[a] for a in range(len(x.shape)) if a not in kept_axes)
                        numbers = [becomes(number, count) for number in factor.dead.values if becomes]
                        numbers = represented(numbers, eqn.out_avals[0].dtype)
                        factor = replace(factor, dead=Dead(False, few(numbers)))
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
        Factor((a,), ledger.fresh_fixed(n, reason=reason), BLANK)
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
        result.append(Factor(axes, ids, factor.dead))
    return Tracked(shape, tuple(result), uniform)


def common_value(xs: Sequence[Tracked]) -> float | None:
    """The number that every element of all values equals, if there is one."""
    uniform = {x.uniform for x in xs}
    return uniform.pop() if len(uniform) == 1 else None


def dead_of(x: Tracked, dead: Dead | None = None) -> Dead:
    """What dead positions of a value are, by what `combine` says of it; None: no factor is there."""
    if dead is not None:
        return dead
    return BLANK if x.uniform == 0 else UNKNOWN


def zero_or_unknown(factor: Factor) -> Factor:
    """A factor handed on by what makes zeros of zeros, and of other numbers another number."""
    return factor if factor.zero else replace(factor, dead=UNKNOWN)


def known_start(start: Tracked | Small, size: int, taken: int) -> int | None:
    """Where a slice of an axis begins, moved inside as JAX does, if the trace shows it."""
    return None if start.known is None else int(np.clip(start.known, 0, size - taken))
