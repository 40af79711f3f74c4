"""Convolutions: the image's channels leave with the kernel's, filters are passed on.

Feature groups are cut one of two ways (`_kind`): the same positions in every group, or whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.extend.core import primitives as p

from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, filled_up, intersect, spread, take_along, vanishes
from compaware_jax.coupling.rules.families import fixed_elsewhere, mixed, zero_or_unknown
from compaware_jax.coupling.rules.registry import Kept, Small, register_rule

Channels = Factor | None
"""A factor on one axis: of the image's channels, the kernel's inputs, or its filters."""


def _kind(eqn: Equation) -> str:
    """How channels leave.

    Of "positions" and "groups", the one that leaves more units: positions leave inputs and outputs apart,
    whole groups leave both at once.
    """
    if eqn.params["batch_group_count"] > 1:
        return "batch groups"
    groups = eqn.params["feature_group_count"]
    if groups == 1:
        return "plain"
    spec = eqn.params["dimension_numbers"]
    inputs = eqn.in_shapes[1][spec.rhs_spec[1]]
    outputs = eqn.in_shapes[1][spec.rhs_spec[0]] // groups
    return "positions" if inputs > 1 and inputs + outputs > groups else "groups"


# --- coupling -----------------------------------------------------------------------------------------


def _couple_conv(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    image, kernel = inputs
    spec, shape = eqn.params["dimension_numbers"], eqn.out_shapes[0]
    (batch_axis, feature_axis, *_), (filter_axis, input_axis, *_) = spec.lhs_spec, spec.rhs_spec
    out_batch, out_feature, *_ = spec.out_spec

    def single(x: Tracked, axis: int) -> Channels:
        factor = x.factor_of(axis)
        return None if factor is None else ledger.collapse(factor, [axis])

    batch, feature = single(image, batch_axis), single(image, feature_axis)
    weights, filters = single(kernel, input_axis), single(kernel, filter_axis)
    for factor in kernel.factors:
        if not {filter_axis, input_axis}.intersection(factor.axes):
            ledger.fix(factor.ids, f"spatial axis of the kernel of {eqn.where}")
    slid_over = {a for f in mixed(ledger, image, (batch_axis, feature_axis)) for a in f.axes}
    free = [out for axis, out in zip(spec.lhs_spec, spec.out_spec, strict=True) if axis in slid_over]

    kind = _kind(eqn)
    if kind == "batch groups":
        for factor in (batch, feature, weights, filters):
            if factor is not None:
                ledger.fix(factor.ids, f"batch_group_count > 1 in {eqn.where}")
        batch = filters = None
    elif kind == "plain":
        if feature is not None and weights is not None:
            ledger.equate(feature.ids, weights.ids)
    elif kind == "positions":
        _tie_positions(ledger, eqn, feature, weights, filters)
    else:
        filters = _tie_groups(ledger, eqn, feature, weights, filters)

    factors = fixed_elsewhere(ledger, shape, (out_batch, out_feature, *free), f"spatial axis of {eqn.where}")
    if batch is not None:
        factors.append(zero_or_unknown(batch).moved({batch_axis: out_batch}))
    if filters is not None:
        factors.append(zero_or_unknown(filters).moved({filter_axis: out_feature}))
    return [Tracked(shape, tuple(factors))]


def _tie_positions(
    ledger: Ledger, eqn: Equation, feature: Channels, weights: Channels, filters: Channels
) -> None:
    """The same positions leave every feature group; inputs and outputs are free of each other."""
    groups, inputs, outputs = _sizes(eqn)
    if feature is not None:
        positions = ledger.fresh(1, inputs)
        ledger.equate(feature.ids.reshape(groups, -1), positions)
        if weights is not None:
            ledger.equate(weights.ids, positions[0])
    if filters is not None:
        ledger.equate(filters.ids.reshape(groups, -1), ledger.fresh(1, outputs))


def _tie_groups(
    ledger: Ledger, eqn: Equation, feature: Channels, weights: Channels, filters: Channels
) -> Channels:
    """A feature group leaves whole: its inputs, its filters and its outputs, which are what is returned."""
    groups, _, outputs = _sizes(eqn)
    if weights is not None:
        ledger.fix(weights.ids, f"input axis of the grouped kernel of {eqn.where}")
    whole = ledger.fresh(groups, 1)
    for factor in (feature, filters):
        if factor is not None:
            ledger.equate(factor.ids.reshape(groups, -1), whole)
    if filters is not None or feature is None:
        return filters
    filter_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    return Factor((filter_axis,), np.repeat(whole, outputs), feature.dead)


def _sizes(eqn: Equation) -> tuple[int, int, int]:
    """Feature groups, and each one's inputs and outputs."""
    spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    kernel = eqn.in_shapes[1]
    return groups, kernel[spec.rhs_spec[1]], kernel[spec.rhs_spec[0]] // groups


# --- slimming -----------------------------------------------------------------------------------------


def _slim_conv(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    spec = eqn.params["dimension_numbers"]
    image, kernel = filled_up(operands[0], spec.lhs_spec[2:], eqn.in_shapes[0]), operands[1]
    if image is None:
        return None
    if _kind(eqn) == "groups":
        return _slim_groups(eqn, image, kernel, kept[0][spec.out_spec[1]])
    feature_axis, input_axis = spec.lhs_spec[1], spec.rhs_spec[1]
    if not vanishes(image, feature_axis, kernel, input_axis):
        return None
    if _kind(eqn) == "positions":
        return _slim_positions(eqn, image, kernel)
    feature, weights = image.kept[feature_axis], kernel.kept[input_axis]
    arrays = intersect([image.array, kernel.array], feature, feature_axis, weights, input_axis)
    have = list(kept[0])
    have[spec.out_spec[1]] = kernel.kept[spec.rhs_spec[0]]
    (result,) = bind(eqn, arrays)
    return [spread(eqn, result, tuple(have), kept[0])]


def _slim_positions(eqn: Equation, image: Small, kernel: Small) -> list[jax.Array]:
    """Inputs cut at the same positions in every group, those of the image or of the kernel."""
    spec, (groups, inputs, _) = eqn.params["dimension_numbers"], _sizes(eqn)
    feature, weights = image.kept[spec.lhs_spec[1]], kernel.kept[spec.rhs_spec[1]]
    arrays = [image.array, kernel.array]
    if feature is None and weights is not None:
        everywhere = (np.arange(groups)[:, None] * inputs + weights).ravel()
        arrays[0] = take_along(image.array, spec.lhs_spec[1], everywhere)
    if weights is None and feature is not None:
        arrays[1] = take_along(kernel.array, spec.rhs_spec[1], feature[feature < inputs])
    return bind(eqn, arrays)


def _slim_groups(eqn: Equation, image: Small, kernel: Small, filters: np.ndarray | None) -> list[jax.Array]:
    """The feature groups that some filter is kept of."""
    if filters is None:
        return bind(eqn, [image.array, kernel.array])
    spec, (_, inputs, outputs) = eqn.params["dimension_numbers"], _sizes(eqn)
    alive = np.unique(filters // outputs)
    arrays = [image.array, kernel.array]
    if image.kept[spec.lhs_spec[1]] is None:
        channels = (alive[:, None] * inputs + np.arange(inputs)).ravel()
        arrays[0] = take_along(image.array, spec.lhs_spec[1], channels)
    if kernel.kept[spec.rhs_spec[0]] is None:
        arrays[1] = take_along(kernel.array, spec.rhs_spec[0], filters)
    return bind(eqn, arrays, feature_group_count=len(alive))


def _loose_conv(eqn: Equation) -> list[tuple[int, int]]:
    if _kind(eqn) != "plain":
        return []
    return [(1, axis) for axis in eqn.params["dimension_numbers"].rhs_spec[:2]]


def _work_conv(eqn: Equation) -> list[tuple[tuple[int, int], ...]]:
    spec = eqn.params["dimension_numbers"]
    filter_axis = spec.rhs_spec[0]
    out: list[tuple[tuple[int, int], ...]] = [((eqn.outputs[0], a),) for a in range(len(eqn.out_shapes[0]))]
    kernel: list[tuple[tuple[int, int], ...]] = [
        ((eqn.inputs[1], a),) for a in range(len(eqn.in_shapes[1])) if a != filter_axis
    ]
    for dilation, in_axis, out_axis in zip(
        eqn.params["lhs_dilation"], spec.lhs_spec[2:], spec.out_spec[2:], strict=True
    ):
        # Every tap meets each pixel once; the zeros put between them are no work.
        if dilation > 1 and eqn.in_shapes[0][in_axis] < eqn.out_shapes[0][out_axis]:
            out[out_axis] = ((eqn.inputs[0], in_axis),)
    if eqn.params["feature_group_count"] == 1:
        out[spec.out_spec[1]] = ((eqn.outputs[0], spec.out_spec[1]), (eqn.inputs[1], filter_axis))
    return [*out, *kernel]


register_rule(p.conv_general_dilated_p, _couple_conv, _slim_conv, _work_conv, _loose_conv)
