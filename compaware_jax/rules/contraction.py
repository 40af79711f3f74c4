"""Contractions and convolutions: contracted axes leave together, free axes are passed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import primitives as p

from compaware_jax.factors import Factor, Ledger, Tracked, combine
from compaware_jax.placement import dividing, explicit
from compaware_jax.program import Equation
from compaware_jax.rules.families import (
    bind,
    filled_up,
    fixed_elsewhere,
    mixed,
    scatter,
    small_shape,
    take,
)
from compaware_jax.rules.registry import Kept, Small, primitives_of, register_rule

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
            axes = [a for a, r in zip(factor.axes, present, strict=True) if r == role]
            factor = ledger.collapse(factor, axes)
            moved = factor.moved({a: roles[operand][a][1] for a in factor.axes})
            by_role[role][operand].append(moved)
    combine(ledger, [tuple(fs) for fs in by_role["contract"]])
    factors = [
        Factor(axes, ids, any(flags))
        for axes, ids, flags in combine(ledger, [tuple(fs) for fs in by_role["batch"]])
    ]
    offset = len(_numbers(eqn)[1][0])
    for operand in (0, 1):
        for factor in by_role["free"][operand]:
            factors.append(factor.moved({a: a + offset for a in factor.axes}))
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
        arrays = _intersect(arrays, lhs.kept[left], left, rhs.kept[right], right)
    for left, right in zip(*contract, strict=True):
        if not _vanishes(lhs, left, rhs, right):
            return None
        arrays = _intersect(arrays, lhs.kept[left], left, rhs.kept[right], right)
    have = (*kept[0][: len(batch[0])], *free)
    sharding = dividing(explicit(eqn.params["out_sharding"]), small_shape(eqn.out_shapes[0], have))
    (result,) = bind(eqn, [*arrays, *(x.array for x in sizes)], out_sharding=sharding)
    return [_spread(eqn, result, have, kept[0])]


def _loose_dot(eqn: Equation) -> list[tuple[int, int]]:
    return [
        (operand, axis)
        for operand, roles in enumerate(_roles(eqn))
        for axis, (role, _) in roles.items()
        if role not in ("batch", "group")
    ]


def _spread(eqn: Equation, result: jax.Array, have: Kept, target: Kept) -> jax.Array:
    """Zeros at the indices of a result that stay although the weights that make them are gone."""
    places: list[np.ndarray | None] = []
    for index, want in zip(have, target, strict=True):
        if index is not None and want is not None:
            index = None if len(want) == len(index) else np.searchsorted(want, index)
        places.append(index)
    return scatter(result, places, small_shape(eqn.out_shapes[0], target))


def _vanishes(lhs: Small, left: int, rhs: Small, right: int) -> bool:
    """Whether what leaves a contracted pair of axes contributes zero to the contraction."""
    pair = ((lhs, left), (rhs, right))
    cut_axes = [(x, axis) for x, axis in pair if x.kept[axis] is not None]
    return not cut_axes or any(x.zero[axis] for x, axis in cut_axes)


def _intersect(
    arrays: list[jax.Array], a: np.ndarray | None, left: int, b: np.ndarray | None, right: int
) -> list[jax.Array]:
    """Cut two paired axes to what both keep."""
    if a is None or b is None:
        return [
            _take_axis(arrays[0], left, b if a is None else None),
            _take_axis(arrays[1], right, a if b is None else None),
        ]
    if np.array_equal(a, b):
        return arrays
    both = np.intersect1d(a, b)
    return [
        _take_axis(arrays[0], left, np.searchsorted(a, both)),
        _take_axis(arrays[1], right, np.searchsorted(b, both)),
    ]


def _take_axis(array: jax.Array, axis: int, index: np.ndarray | None) -> jax.Array:
    return take(array, [index if a == axis else None for a in range(array.ndim)])


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


# --- conv_general_dilated -----------------------------------------------------------------------------


def _couple_conv(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    lhs, rhs = inputs
    spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_shape = eqn.out_shapes[0]
    (lhs_batch, lhs_feature, *_), (rhs_out, rhs_in, *_) = spec.lhs_spec, spec.rhs_spec
    out_batch, out_feature, *_ = spec.out_spec
    factors = []

    def single(x: Tracked, axis: int) -> Factor | None:
        factor = x.factor_of(axis)
        return None if factor is None else ledger.collapse(factor, [axis])

    batch, feature = single(lhs, lhs_batch), single(lhs, lhs_feature)
    kernel_in, kernel_out = single(rhs, rhs_in), single(rhs, rhs_out)
    for factor in rhs.factors:
        if not set(factor.axes) & {rhs_out, rhs_in}:
            ledger.fix(factor.ids, f"spatial axis of the kernel of {eqn.where}")
    slid_over = {a for f in mixed(ledger, lhs, (lhs_batch, lhs_feature)) for a in f.axes}
    free = [out for axis, out in zip(spec.lhs_spec, spec.out_spec, strict=True) if axis in slid_over]
    if eqn.params["batch_group_count"] > 1:
        for factor in (batch, feature, kernel_in, kernel_out):
            if factor is not None:
                ledger.fix(factor.ids, f"batch_group_count > 1 in {eqn.where}")
        batch = feature = kernel_out = None
    elif groups == 1:
        if feature is not None and kernel_in is not None:
            ledger.equate(feature.ids, kernel_in.ids)
    elif _by_position(eqn):
        # The same positions leave every feature group; inputs and outputs are free of each other.
        if feature is not None:
            positions = ledger.fresh(1, lhs.shape[lhs_feature] // groups)
            ledger.equate(feature.ids.reshape(groups, -1), positions)
            if kernel_in is not None:
                ledger.equate(kernel_in.ids, positions[0])
        if kernel_out is not None:
            same = ledger.fresh(1, out_shape[out_feature] // groups)
            ledger.equate(kernel_out.ids.reshape(groups, -1), same)
    else:
        # A feature group leaves whole: its inputs, its filters and its outputs.
        if kernel_in is not None:
            ledger.fix(kernel_in.ids, f"input axis of the grouped kernel of {eqn.where}")
        whole = ledger.fresh(groups, 1)
        for factor in (feature, kernel_out):
            if factor is not None:
                ledger.equate(factor.ids.reshape(groups, -1), whole)
        if kernel_out is None and feature is not None:
            ids = np.repeat(whole, out_shape[out_feature] // groups)
            kernel_out = Factor((rhs_out,), ids, feature.zero)
    if batch is not None:
        factors.append(batch.moved({lhs_batch: out_batch}))
    if kernel_out is not None:
        factors.append(kernel_out.moved({rhs_out: out_feature}))
    factors += fixed_elsewhere(
        ledger, out_shape, (out_batch, out_feature, *free), f"spatial axis of {eqn.where}"
    )
    return [Tracked(out_shape, tuple(factors))]


def _by_position(eqn: Equation) -> bool:
    """Whether a grouped convolution leaves more units by position in a group than by whole groups.

    Positions leave its inputs and its outputs apart, whole groups leave both at once.
    """
    spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    inputs = eqn.in_shapes[1][spec.rhs_spec[1]]
    outputs = eqn.in_shapes[1][spec.rhs_spec[0]] // groups
    return groups > 1 and inputs > 1 and inputs + outputs > groups


def _slim_conv(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    lhs, rhs = filled_up(operands[0], spec.lhs_spec[2:], eqn.in_shapes[0]), operands[1]
    if lhs is None:
        return None
    lhs_feature, rhs_out, rhs_in = spec.lhs_spec[1], spec.rhs_spec[0], spec.rhs_spec[1]
    if groups == 1:
        if not _vanishes(lhs, lhs_feature, rhs, rhs_in):
            return None
        a, b = lhs.kept[lhs_feature], rhs.kept[rhs_in]
        (result,) = bind(eqn, _intersect([lhs.array, rhs.array], a, lhs_feature, b, rhs_in))
        have = list(kept[0])
        have[spec.out_spec[1]] = rhs.kept[rhs_out]
        return [_spread(eqn, result, tuple(have), kept[0])]
    if _by_position(eqn):
        if not _vanishes(lhs, lhs_feature, rhs, rhs_in):
            return None
        per_group, feature = eqn.in_shapes[1][rhs_in], lhs.kept[lhs_feature]
        inside = None if feature is None else feature[feature < per_group]
        # A whole image under a cut kernel: the kernel's positions, in every group.
        spread = None
        if (positions := rhs.kept[rhs_in]) is not None:
            spread = (np.arange(groups)[:, None] * per_group + positions).ravel()
        return bind(
            eqn,
            [
                _take_axis(lhs.array, lhs_feature, spread if feature is None else None),
                _take_axis(rhs.array, rhs_in, inside if positions is None else None),
            ],
        )
    filters = kept[0][spec.out_spec[1]]
    if filters is None:
        return bind(eqn, [lhs.array, rhs.array])
    inputs_per_group = eqn.in_shapes[0][lhs_feature] // groups
    alive = np.unique(filters // (eqn.in_shapes[1][rhs_out] // groups))
    inputs = (alive[:, None] * inputs_per_group + np.arange(inputs_per_group)).ravel()
    image = lhs.array if lhs.kept[lhs_feature] is not None else _take_axis(lhs.array, lhs_feature, inputs)
    kernel = rhs.array if rhs.kept[rhs_out] is not None else _take_axis(rhs.array, rhs_out, filters)
    return bind(eqn, [image, kernel], feature_group_count=len(alive))


def _loose_conv(eqn: Equation) -> list[tuple[int, int]]:
    if eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1:
        return []
    return [(1, axis) for axis in eqn.params["dimension_numbers"].rhs_spec[:2]]


def _work_conv(eqn: Equation) -> list[tuple[tuple[int, int], ...]]:
    spec = eqn.params["dimension_numbers"]
    rhs_out = spec.rhs_spec[0]
    out: list[tuple[tuple[int, int], ...]] = [((eqn.outputs[0], a),) for a in range(len(eqn.out_shapes[0]))]
    kernel: list[tuple[tuple[int, int], ...]] = [
        ((eqn.inputs[1], a),) for a in range(len(eqn.in_shapes[1])) if a != rhs_out
    ]
    if eqn.params["feature_group_count"] == 1:
        out[spec.out_spec[1]] = ((eqn.outputs[0], spec.out_spec[1]), (eqn.inputs[1], rhs_out))
    return [*out, *kernel]


register_rule(p.conv_general_dilated_p, _couple_conv, _slim_conv, _work_conv, _loose_conv)
