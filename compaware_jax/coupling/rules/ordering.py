"""Sorting: positions along the sorted axis lose their identity, so a cut sorted axis is un-cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from compaware_jax.coupling.dead import UNKNOWN
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, cut
from compaware_jax.coupling.rules.registry import Kept, Small, register_rule


def sorting(primitive: Primitive, axis_of: Callable[[Equation], int], *, places: bool) -> None:
    """Register a primitive that orders its operands along one axis.

    Args:
      primitive: its outputs have the operands' rank.
      axis_of: the axis along which it orders.
      places: whether its last output holds positions (which are not zero where values are).
    """

    def couple(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
        axis = axis_of(eqn)
        parts = []
        for x in inputs:
            across = [(f, [a for a in f.axes if a != axis]) for f in x.factors]
            parts.append(tuple(ledger.collapse(f, rest) for f, rest in across if rest))
        combined = combine(ledger, parts)
        outputs = []
        for number, shape in enumerate(eqn.out_shapes):
            source = min(number, len(inputs) - 1)
            lost = places and number == len(eqn.out_shapes) - 1
            factors = tuple(
                Factor(axes, ids, UNKNOWN if lost else dead[source] or UNKNOWN)
                for axes, ids, dead in combined
            )
            outputs.append(Tracked(shape, factors))
        return outputs

    def slim(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
        axis = axis_of(eqn)
        if any(x.kept[axis] is not None for x in operands):
            return None
        target = tuple(None if a == axis else index for a, index in enumerate(kept[0]))
        return bind(eqn, [cut(x, target) for x in operands])

    register_rule(primitive, couple, slim)


def _last(eqn: Equation) -> int:
    axis = eqn.params.get("axis", eqn.params.get("operand_axis", -1))
    return axis % len(eqn.in_shapes[0])


sorting(p.sort_p, lambda eqn: eqn.params["dimension"], places=False)
sorting(p.top_k_p, _last, places=True)
sorting(p.approx_top_k_p, lambda eqn: eqn.params["reduction_dimension"] % len(eqn.in_shapes[0]), places=True)
