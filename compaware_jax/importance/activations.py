"""Importance by what a unit passes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compaware_jax.coupling.groups import Groups
from compaware_jax.coupling.rules import RULES
from compaware_jax.errors import PlanError
from compaware_jax.importance.units import as_numbers, squared
from compaware_jax.placement import replicated

_LOG = logging.getLogger(__name__)


def activation(groups: Groups, variables: Any, *args: Any, **kwargs: Any) -> Float[Array, " units"]:
    """Root mean square of what each unit feeds into contractions, shape (units,).

    Which values those are is read off the traced program: every operand of a contraction that depends
    on the data and has the unit on one of its axes. Values inside loops and branches are not looked at:
    units that are seen nowhere else score zero, and their groups are warned of.

    Args:
      groups: what can leave.
      variables: the weights.
      *args: inputs, of the shapes for which the groups were found.
      **kwargs: further inputs, by name.

    Raises:
      PlanError: the inputs are not those of `find_groups`.

    References:
      Luo et al., ThiNet, arXiv 1707.06342, for the idea of judging a filter by its output.
    """
    program = groups.analysis.program
    values: dict[int, Any] = {v: jnp.asarray(c) for v, c in program.constants.items()}
    inputs: Sequence[Any] = jax.tree.leaves((variables, args, kwargs))
    if len(inputs) != len(program.block.inputs):
        raise PlanError(
            f"activation: got variables and inputs of {len(inputs)} arrays, expected "
            f"{len(program.block.inputs)}: activation(groups, variables, *inputs), as find_groups was called."
        )
    values.update(zip(program.block.inputs, inputs, strict=True))
    from_data = set(program.argument_values)
    total, seen = jnp.zeros(groups.units + 1), np.zeros(groups.units + 1)
    for eqn in program.block.equations:
        rule = RULES.get(eqn.primitive)
        if rule is not None and rule.work is not None:
            for value in from_data.intersection(eqn.inputs):
                for axis, labels in enumerate(groups.analysis.labels(value)):
                    if labels is None:
                        continue
                    units = groups.unit_of_class[labels]
                    squares = squared(as_numbers(values[value]))
                    others = tuple(a for a in range(squares.ndim) if a != axis)
                    means = replicated(jnp.mean(squares, others))
                    total = total.at[units].add(means)
                    np.add.at(seen, units, 1)
        if from_data.intersection(eqn.inputs):
            from_data.update(eqn.outputs)
        results = eqn.run(*[values[v] for v in eqn.inputs])
        values.update(zip(eqn.outputs, results, strict=True))
    unseen = [group.name for group in groups.groups if not seen[group.slice].any()]
    if unseen:
        _LOG.warning(
            "activation: outside of loops and branches no contraction takes what %s pass on, so their "
            "units score zero. Keep these groups whole (constrain), or rank by another importance.",
            unseen,
        )
    return jnp.sqrt(total / np.maximum(seen, 1))[:-1]
