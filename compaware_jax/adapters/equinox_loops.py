"""The primitives of Equinox's own loops, which diffrax is written with.

Importing `compaware_jax.adapters.equinox` registers them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import equinox.internal as eqxi
import jax
from equinox.internal._loop.common import maybe_set_p, select_if_vmap_p
from equinox.internal._primitive import _vprim_p as batched_p
from jax.extend.core import Primitive

from compaware_jax.coupling.dead import one_of
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, cut
from compaware_jax.coupling.rules.families import cases, dead_of, elementwise, fixed_elsewhere, passed
from compaware_jax.coupling.rules.registry import Kept, Small, primitives_of, register_rule

# --- what must not differ among the examples of a vmap ---------------------------------------------------


def _couple_of_all(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    return [Tracked(eqn.out_shapes[0])]


def _slim_of_all(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    (x,) = operands
    return None if any(index is not None for index in x.kept) else bind(eqn, [x.array])


_FLAG, _COUNT = jax.ShapeDtypeStruct((), "bool"), jax.ShapeDtypeStruct((), "int32")
for reduced, like in ((eqxi.unvmap_all, _FLAG), (eqxi.unvmap_any, _FLAG), (eqxi.unvmap_max, _COUNT)):
    for primitive in primitives_of(reduced, like):
        register_rule(primitive, _couple_of_all, _slim_of_all)
for primitive in primitives_of(eqxi.nonbatchable, _COUNT):
    elementwise(primitive, lambda eqn, zero, uniform: zero[0])

# A step's value, or the one before where the step does not count for this example.
elementwise(
    select_if_vmap_p,
    lambda eqn, zero, uniform: all(z or u == 0 for z, u in list(zip(zero, uniform, strict=True))[1:]),
    becomes=lambda eqn, numbers, left: cases(eqn, [frozenset(), *numbers[1:]], [False, *left[1:]]),
)

# --- what a step saves: `buffer.at[step].set(value)` -----------------------------------------------------


def _rows(
    primitive: Primitive, params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]
) -> tuple[dict[int, int], dict[int, int]] | None:
    """Axes of the buffer and of the value to axes of the result, where a row of the buffer is set."""
    if primitive is maybe_set_p:
        _, buffer, value, *positions = shapes
        if buffer[1:] != value or positions != [()]:
            return None
        return {a: a for a in range(1, len(buffer))}, {a: a + 1 for a in range(len(value))}
    if primitive is not batched_p:
        return None
    axes = params["__batch_axes"]
    one = [s if a is None else s[:a] + s[a + 1 :] for s, a in zip(shapes, axes, strict=True)]
    inner = _rows(params["prim"], dict(params["params"]), one)
    if inner is None:
        return None
    buffer, value = (_batched(places, axis) for places, axis in zip(inner, axes[1:3], strict=True))
    return buffer, value


def _batched(places: dict[int, int], axis: int | None) -> dict[int, int]:
    """What becomes of axes where the operand has one more for the examples, which the result has first."""
    if axis is None:
        return {a: out + 1 for a, out in places.items()}
    return {axis: 0} | {a + (a >= axis): out + 1 for a, out in places.items()}


def _couple_set(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    rows = _rows(eqn.primitive, eqn.params, eqn.in_shapes)
    reason = f"written to by index in {eqn.where}"
    if rows is None:
        for factor in (f for x in inputs for f in x.factors):
            ledger.fix(factor.ids, reason)
        return [Tracked(shape, tuple(fixed_elsewhere(ledger, shape, (), reason))) for shape in eqn.out_shapes]
    parts, shape = inputs[1:3], eqn.out_shapes[0]
    factors = []
    handed_on = [tuple(passed(ledger, x, to, reason)) for x, to in zip(parts, rows, strict=True)]
    for axes, ids, dead in combine(ledger, handed_on):
        factors.append(Factor(axes, ids, one_of(map(dead_of, parts, dead))))
    factors += fixed_elsewhere(ledger, shape, set(rows[0].values()) | set(rows[1].values()), reason)
    return [Tracked(shape, tuple(factors))]


def _slim_set(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    if eqn.primitive is batched_p and kept[0][0] is not None:
        return None  # The number of examples is one of its parameters.
    arrays = [x.array for x in operands]
    for operand, places in enumerate(_rows(eqn.primitive, eqn.params, eqn.in_shapes) or (), start=1):
        x = operands[operand]
        wanted = [kept[0][places[a]] if a in places else None for a in range(x.array.ndim)]
        arrays[operand] = cut(x, tuple(wanted))
    return bind(eqn, arrays)


for primitive in (maybe_set_p, batched_p):
    register_rule(primitive, _couple_set, _slim_set)
