"""What identifies a request, so that a checkpoint of another one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.coupling.groups import Groups
from compaware_jax.importance import ranks
from compaware_jax.search.coefficients import Problem, SearchMethod
from compaware_jax.training.checks import marks, program_mark
from compaware_jax.training.loop import digest


def describe_request(
    problem: Problem, variables: Any, method: SearchMethod, before: Mapping[str, float]
) -> dict[str, Any]:
    """What identifies a request, as JSON values: a checkpoint of another one is refused.

    Args:
      problem: what is asked.
      variables: the dense model's.
      method: how coefficients are found.
      before: the dense model's value per criterion.
    """
    return {
        "model": problem.groups.fingerprint,
        "groups": _mark(problem.groups),
        "variables": digest(variables),
        **marks(problem.apply, variables, problem.loss, problem.batches, problem.criteria),
        "before": {name: f"{value:.3g}" for name, value in before.items()},
        "criteria": [[c.name, c.threshold, c.above, c.trainable] for c in problem.criteria],
        "search": [
            type(method).__name__,
            _settings(method, problem, variables),
        ],
        "score": digest(ranks(problem.groups, problem.score(problem.groups, variables))),
    }


def _settings(method: SearchMethod, problem: Problem, variables: Any) -> Any:
    """The settings of a search; where it does not show them, a hash of its program and its steps."""
    if is_dataclass(method):
        return asdict(method)  # pyright: ignore[reportArgumentType]
    search = method.build(problem)

    def first(variables: Any) -> Any:
        state = search.init(variables, jnp.float32(0.5), jax.random.key(0), jnp.int32(0))
        state, info = search.step(state, jnp.int32(0))
        return state, info, search.coefficients(state), search.variables(state)

    return [program_mark(first, variables)[0], search.steps]


def _mark(groups: Groups) -> str:
    """A hash of the groups, of what cuts them and of what is demanded of them."""
    cuts = groups.analysis.cuts
    named = [(group.name, group.units, group.boundary) for group in groups.groups]
    outputs = groups.released, groups.states, groups.deployed_outputs
    cut = [cuts.within_heads, cuts.boundary, *sorted(map(repr, cuts.choices)), *outputs]
    limits = groups.floors, groups.ceilings, groups.steps, groups.may_empty
    return digest([np.frombuffer(repr([named, cut]).encode(), np.uint8), groups.units_of, limits])
