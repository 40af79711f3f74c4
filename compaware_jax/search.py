"""The first half of the main job: how much of each group to keep, in whole units, and which ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from compaware_jax.boundary import trim
from compaware_jax.coefficients import GradientSearch, Problem, Score, SearchMethod
from compaware_jax.cost import COSTS, Budget
from compaware_jax.criteria import Apply, Criterion
from compaware_jax.fit import Batches, Loss, check_finite
from compaware_jax.groups import Groups
from compaware_jax.importance import l2
from compaware_jax.loop import run_steps
from compaware_jax.plan import Plan, plan_units
from compaware_jax.request import check_budget, check_problem, describe_request
from compaware_jax.select import keep_units, round_counts


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      plan: what is kept.
      variables: the weights that the search ended with, at full width; ``shrink(variables, plan)`` cuts them.
      groups: what could leave; at the boundary, with what stays there settled.
      scores: what ranked the units when they were cut, shape (units,).
      coefficients: kept share per group that the search ended with, shape (groups,).
      history: means over chunks of steps, shape (chunks, ...).
    """

    plan: Plan
    variables: Any = field(repr=False)
    groups: Groups
    scores: np.ndarray = field(repr=False)
    coefficients: np.ndarray
    history: Mapping[str, np.ndarray] = field(repr=False)


def find_plan(
    apply: Apply,
    variables: Any,
    loss: Loss,
    batches: Batches,
    *,
    groups: Groups,
    budget: Budget,
    criteria: Sequence[Criterion] = (),
    search: SearchMethod | None = None,
    score: Score = l2,
    key: jax.Array | None = None,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Found:
    """Search what to keep of a model at a budget: `compress` without the surgery and the fine-tune.

    For those who train the small model themselves: cut with ``slim(apply, found.plan)`` and
    ``shrink(found.variables, found.plan)``. Arguments are those of `compress`.

    Args:
      apply: pure function ``apply(variables, *args)``.
      variables: its trained variables.
      loss: as for `compress`.
      batches: ``step -> batch``.
      groups: what can leave, from `find_groups`.
      budget: the target, e.g. ``params(0.1)``.
      criteria: constraints on the way, those that are trainable; nothing is measured.
      search: how coefficients are found; default `GradientSearch`.
      score: ranks units within their group.
      key: source of randomness; default ``jax.random.key(0)``.
      directory: where to keep checkpoints; None for none.
      progress: show a progress bar.

    Returns:
      The `Found`; its plan is on the budget exactly.

    Raises:
      BudgetError: the budget is below what the fixed axes allow.
      PlanError: nothing can leave, or the variables are not those of the groups, or not trainable.
      TraceError: the loss is not one finite number.
      DivergenceError: the search ended in values that are not finite.
      CheckpointError: the directory holds a checkpoint that is corrupt or of another job.
    """
    problem = problem_of(apply, loss, batches, groups, budget, criteria, score)
    check_problem(problem, variables)
    return run_search(
        problem, variables, budget, search=search, key=key, directory=directory, progress=progress
    )


def problem_of(
    apply: Apply,
    loss: Loss,
    batches: Batches,
    groups: Groups,
    budget: Any,
    criteria: Sequence[Criterion],
    score: Score,
) -> Problem:
    """What a search is asked at a budget.

    Raises:
      BudgetError: it is no budget.
    """
    check_budget(budget)
    return Problem(apply, loss, batches, groups, COSTS[budget.cost](groups), tuple(criteria), score)


def describe_search(
    problem: Problem, variables: Any, budget: Budget, search: SearchMethod | None, key: jax.Array | None
) -> dict[str, Any]:
    """What identifies a search, as JSON values."""
    method, key = _defaults(search, key)
    return {
        **describe_request(problem, variables, method),
        "budget": [budget.cost, budget.fraction],
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }


def run_search(
    problem: Problem,
    variables: Any,
    budget: Budget,
    *,
    search: SearchMethod | None,
    key: jax.Array | None,
    directory: str | os.PathLike[str] | None,
    progress: bool,
) -> Found:
    """`find_plan` for a problem that is checked."""
    method, key = _defaults(search, key)
    groups, limit = problem.groups, budget.limit(problem.groups)
    job = describe_search(problem, variables, budget, method, key)
    problem, start = trim(problem, variables, [limit])
    found = method.build(problem)
    state, history = run_steps(
        found.step,
        found.init(start, budget.fraction, key, 0),
        found.steps,
        label="search",
        chunk=min(50, found.steps),
        directory=directory,
        job=job,
        progress=progress,
    )
    trained, coefficients = found.variables(state), np.asarray(found.coefficients(state))
    check_finite(trained, "search")
    scores = np.asarray(problem.score(groups, trained))
    keep = keep_units(groups, scores, round_counts(problem.cost, coefficients, limit))
    return Found(plan_units(groups, keep), trained, problem.groups, scores, coefficients, history)


def _defaults(search: SearchMethod | None, key: jax.Array | None) -> tuple[SearchMethod, jax.Array]:
    return search or GradientSearch(), jax.random.key(0) if key is None else key
