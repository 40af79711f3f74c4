"""Contractions: contracted axes leave together, free axes are passed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import primitives as p

from compaware_jax.coupling.dead import UNKNOWN, ZERO
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, intersect, small_shape, spread, vanishes
from compaware_jax.coupling.rules.families import fixed_elsewhere, zero_or_unknown
from compaware_jax.coupling.rules.registry import Kept, Small, primitives_of, register_rule
from compaware_jax.placement import dividing, explicit

# --- dot_general --------------------------------------------------------------------------------------


def _numbers(eqn: Equation) -> tuple[Any, Any]:
    """The contracted and the batch axes, per operand."""
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    return eqn.params["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers


def _roles(eqn: Equation) -> list[dict[int, tuple[str, int]]]:
    """Per operand: axis to (role, position in that role); roles are batch, contract, free, and group."""
    contract, batch = _numbers(eqn)
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    result = []
    for operand, shape in enumerate(eqn.in_shapes[:2]):
        roles = {a: ("batch", i) for i, a in enumerate(batch[operand])}
        roles |= {a: ("contract", i) for i, a in enumerate(contract[operand])}
        if ragged is not None and operand == 1:
            roles |= {a: ("group", i) for i, a in enumerate(ragged.rhs_group_dimensions)}
        free = [a for a in range(len(shape)) if a not in roles]
        result.append(roles | {a: ("free", i) for i, a in enumerate(free)})
    return result


def _couple_dot(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    roles = _roles(eqn)
    by_role: dict[str, list[list[Factor]]] = {role: [[], []] for role in ("batch", "contract", "free")}
    for operand, x in enumerate(inputs[:2]):
        for factor in x.factors:
            present = [roles[operand][a][0] for a in factor.axes]
            if set(present) == {"group"}:
                continue
            # A joint factor that straddles roles stays on the axes that both operands share: on whole
            # heads, or else on the channels of them all.
            order = (
                ("contract", "free", "batch") if ledger.cuts.within_heads else ("batch", "contract", "free")
            )
            role = next(r for r in order if r in present)
            if role == "contract" and "free" in present:
                # The usual way is by what is contracted; what is passed on may free more.
                outer_first = factor.outer_first
                contracted = tuple(n for n, a in enumerate(outer_first) if roles[operand][a][0] == role)
                sizes = tuple(x.shape[a] for a in outer_first)
                role = "free" if ledger.chosen((contracted, sizes)) else role
            axes = [a for a, r in zip(factor.axes, present, strict=True) if r == role]
            factor = ledger.collapse(factor, axes)
            moved = factor.moved({a: roles[operand][a][1] for a in factor.axes})
            by_role[role][operand].append(moved)
    combine(ledger, [tuple(fs) for fs in by_role["contract"]])
    factors = [
        Factor(axes, ids, ZERO if any(d and d.zero for d in dead) else UNKNOWN)
        for axes, ids, dead in combine(ledger, [tuple(fs) for fs in by_role["batch"]])
    ]
    offset = len(_numbers(eqn)[1][0])
    for operand in (0, 1):
        for factor in by_role["free"][operand]:
            factors.append(zero_or_unknown(factor).moved({a: a + offset for a in factor.axes}))
        offset += sum(role == "free" for role, _ in roles[operand].values())
    return [Tracked(eqn.out_shapes[0], tuple(factors))]


def _slim_dot(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    contract, batch = _numbers(eqn)
    free = [
        x.kept[axis]
        for x, roles in zip(operands[:2], _roles(eqn), strict=True)
        for axis, (role, _) in roles.items()
        if role == "free"
    ]
    lhs, rhs, *sizes = operands
    arrays: list[jax.Array] = [lhs.array, rhs.array]
    for left, right in zip(*batch, strict=True):
        arrays = intersect(arrays, lhs.kept[left], left, rhs.kept[right], right)
    for left, right in zip(*contract, strict=True):
        if not vanishes(lhs, left, rhs, right):
            return None
        arrays = intersect(arrays, lhs.kept[left], left, rhs.kept[right], right)
    have = (*kept[0][: len(batch[0])], *free)
    sharding = dividing(explicit(eqn.params["out_sharding"]), small_shape(eqn.out_shapes[0], have))
    (result,) = bind(eqn, [*arrays, *(x.array for x in sizes)], out_sharding=sharding)
    return [spread(eqn, result, have, kept[0])]


def _loose_dot(eqn: Equation) -> list[tuple[int, int]]:
    return [
        (operand, axis)
        for operand, roles in enumerate(_roles(eqn))
        for axis, (role, _) in roles.items()
        if role not in ("batch", "group")
    ]


def _work_dot(eqn: Equation) -> list[tuple[tuple[int, int], ...]]:
    lhs, rhs, *_ = eqn.inputs
    roles = _roles(eqn)
    contract, batch = _numbers(eqn)
    pairs = [*zip(*batch, strict=True), *zip(*contract, strict=True)]
    shared = [((lhs, left), (rhs, right)) for left, right in pairs]
    free = [
        ((value, axis),)
        for value, of in zip((lhs, rhs), roles, strict=True)
        for axis, (role, _) in of.items()
        if role == "free"
    ]
    return [*shared, *free]


register_rule(p.dot_general_p, _couple_dot, _slim_dot, _work_dot, _loose_dot)


# --- ragged_dot_general: every run of rows has a matrix of its own, as in a mixture of experts --------


def _couple_ragged(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    if not _by_rows(eqn):
        for x in inputs:
            for factor in x.factors:
                ledger.fix(factor.ids, f"summed in runs by {eqn.where}")
        shape = eqn.out_shapes[0]
        return [Tracked(shape, tuple(fixed_elsewhere(ledger, shape, (), f"sums of {eqn.where}")))]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    dealt = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions, range(len(eqn.in_shapes[2]))
    for x, axes in zip(inputs, dealt, strict=True):
        for factor in x.factors:
            if set(axes).intersection(factor.axes):
                ledger.fix(factor.ids, f"rows or groups of {eqn.where}")
    return _couple_dot(ledger, eqn, inputs)


def _by_rows(eqn: Equation) -> bool:
    """Whether the runs are of rows of the first operand, not of a contracted axis, as in gradients."""
    roles = _roles(eqn)
    ragged = {roles[0][a][0] for a in eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions}
    return ragged == {"free"} and not _numbers(eqn)[1][0]


def _slim_ragged(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    return _slim_dot(eqn, operands, kept) if _by_rows(eqn) else bind(eqn, [x.array for x in operands])


_ROWS, _MATRICES = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 1), (1, 1, 1)))
for primitive in primitives_of(jax.lax.ragged_dot, _ROWS, _MATRICES, np.ones(1, "int32")):
    register_rule(primitive, _couple_ragged, _slim_ragged, _work_dot, _loose_dot)
