"""What kernels read and write of axes that stay: what the application does not need of it goes first.

Those axes are the features of a model's inputs and outputs and, inside it, such as the positions of an image
in front of a dense layer. Units at the boundary (``find_groups(..., boundary=True)``) are not like channels.
Their weights say little: those of a pixel that is always dark are as large as when they were drawn. And many
of them cost the application nothing, so they are no matter of trade. So before a search they are ranked by
what the loss says of them, and those that it hardly notices leave; then the search shares out the budget
among the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compaware_jax.coupling.groups import Groups, Limits
from compaware_jax.coupling.program import is_smooth
from compaware_jax.importance import Evidence, fisher, no_evidence, observe, ranks
from compaware_jax.masks import apply_mask
from compaware_jax.search.coefficients import Problem
from compaware_jax.training.fit import adam_cosine
from compaware_jax.training.loop import run_once
from compaware_jax.training.objective import updated_paths
from compaware_jax.training.trained import descended, value_and_gradients

EVIDENCE_STEPS = 100
CALIBRATION_STEPS = 200


def trim(
    problem: Problem,
    variables: Any,
    limits: Sequence[int],
    *,
    share: float = 3e-4,
    steps: int = EVIDENCE_STEPS,
    calibration: int = CALIBRATION_STEPS,
    learning_rate: float = 0.1,
) -> tuple[Problem, Any]:
    """Let go of the boundary units that the loss hardly notices.

    Of every boundary group those units stay that hold, together, all but a share of the Fisher information
    of the group's gates; the smaller the budget, the more may leave. (Of a group of integers alone the loss
    tells nothing; it stays as it is.) Then the leaves that no unit reaches,
    such as the bias of an output whose kernel lost columns, are trained alone: what those columns gave is
    theirs to give now.

    Args:
      problem: what a search is asked.
      variables: the dense model's.
      limits: the costs aimed at; where the lowest would not stay within reach, nothing is trimmed.
      share: of a group's Fisher information that may leave for a model as large as the dense one; for a
        tenth of its cost, ten times that. The highest limit counts.
      steps: batches from which the information is estimated.
      calibration: training steps of the leaves that no unit reaches.
      learning_rate: of those (Adam, cosine to zero).

    Returns:
      The problem, its groups constrained to what stays and its score ranking that first; and the
      variables to search from. Both as they were where no group is at the boundary.
    """
    groups = problem.groups
    at_boundary = np.array([group.boundary for group in groups.groups], bool) & groups.trained
    if not at_boundary.any():
        return problem, variables
    information = _information(problem, variables, steps)
    share = min(share * problem.cost.total / max(*limits, 1), 0.5)
    counts = np.clip(_needed(groups, np.asarray(information), share), groups.floors, groups.ceilings)
    demands = Limits(
        least=np.where(at_boundary, counts, groups.floors),
        most=np.where(at_boundary, counts, groups.ceilings),
        step=groups.steps,
        may_empty=groups.may_empty,
    )
    groups = replace(groups, limits=demands)
    cost = replace(problem.cost, least=groups.floors, most=groups.ceilings)
    if cost.floor > min(limits):
        return problem, variables
    ranked = at_boundary[groups.group_of_unit]

    def score(groups: Groups, variables: Any) -> jax.Array:
        return jnp.where(ranked, information, problem.score(groups, variables))

    stays = np.asarray(ranks(groups, information)) < counts[groups.group_of_unit]
    gates = jnp.asarray(~ranked | stays, float)
    trimmed = replace(problem, groups=groups, cost=cost, score=score)
    if not (gates == 0).any():
        return trimmed, variables
    return trimmed, _calibrated(trimmed, gates, variables, calibration, learning_rate)


def _information(problem: Problem, variables: Any, steps: int) -> Float[Array, " units"]:
    """Empirical Fisher information of each unit's gate over some batches, shape (units,)."""

    def see(seen: Evidence, index: jax.Array) -> tuple[Evidence, None]:
        batch = problem.batches(index)
        _, gradients = value_and_gradients(
            lambda v: (problem.value(problem.apply, v, batch), None), variables
        )
        return observe(seen, problem.groups, variables, gradients, smoothing=1.0), None

    start = no_evidence(problem.groups)
    return fisher(run_once(lambda index: jax.lax.scan(see, start, index)[0], jnp.arange(steps)))


def _needed(groups: Groups, information: np.ndarray, share: float) -> np.ndarray:
    """Per group how many of its best units hold all but a share of its information, in allowed steps."""
    counts = []
    for group in groups.groups:
        held = np.cumsum(np.sort(information[group.slice])[::-1])
        counts.append(int(np.sum(held < (1 - share) * held[-1])) + 1)
    return np.minimum(-(-np.array(counts) // groups.steps) * groups.steps, groups.sizes)


def _calibrated(problem: Problem, gates: jax.Array, variables: Any, steps: int, learning_rate: float) -> Any:
    """The variables, their leaves without units trained under the gates, if that lowers the loss.

    What the loss gives new values, such as running averages, is no matter of training.
    """
    leaves, structure = jax.tree.flatten(variables)

    def put(trained: list[jax.Array]) -> Any:
        placed = dict(zip(alone, trained, strict=True))
        return jax.tree.unflatten(structure, [placed.get(i, leaf) for i, leaf in enumerate(leaves)])

    renewed = updated_paths(problem.loss, problem.apply, variables, problem.batches)
    alone = [
        i
        for i, (leaf, axes) in enumerate(zip(leaves, problem.groups.units_of, strict=True))
        if is_smooth(leaf)
        and problem.groups.leaves[i].path not in renewed
        and not any((units >= 0).any() for units in axes)
    ]
    rule = adam_cosine(learning_rate, steps)

    def value(trained: list[jax.Array], index: jax.Array) -> jax.Array:
        masked = apply_mask(problem.groups, gates, put(trained))
        return problem.value(problem.apply, masked, problem.batches(index))

    def step(state: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        trained, moments = state
        before, gradients = jax.value_and_grad(value)(trained, index)
        return descended(rule, moments, trained, gradients, before), before

    def run(start: list[jax.Array]) -> list[jax.Array]:
        (trained, _), _ = jax.lax.scan(step, (start, rule.init(start)), jnp.arange(steps))
        unseen = steps + jnp.arange(4)
        old, new = (jax.lax.map(lambda i, x=x: value(x, i), unseen).mean() for x in (start, trained))
        return jax.tree.map(lambda a, b: jnp.where(new < old, b, a), start, trained)

    return put(run_once(run, [jnp.asarray(leaves[i]) for i in alone])) if alone else variables
