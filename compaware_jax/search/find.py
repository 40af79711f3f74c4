"""The first half of the main job: how much of each group to keep, in whole units, and which ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from compaware_jax.cost import COSTS, Budget, check_budget
from compaware_jax.coupling.groups import Groups
from compaware_jax.importance import l2
from compaware_jax.search.boundary import trim
from compaware_jax.search.coefficients import Problem, Score, SearchMethod
from compaware_jax.search.job import describe_request
from compaware_jax.search.request import (
    check_asked,
    check_problem,
    checked_key,
    checked_search,
)
from compaware_jax.search.select import keep_units, round_counts
from compaware_jax.surgery.plan import Plan, plan_units
from compaware_jax.training.criteria import Apply, Criterion, checked_criteria
from compaware_jax.training.fit import check_finite, stops
from compaware_jax.training.loop import run_steps
from compaware_jax.training.objective import Batches, Loss


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      plan: what is kept.
      variables: the weights that the search ended with, at full width; ``shrink(variables, plan)`` cuts them.
      groups: what could leave; at the boundary, with what stays there settled.
      scores: what ranked the units when they were cut, shape (units,).
      coefficients: kept share per group that the search ended with, shape (groups,).
      history: means over chunks of steps, shape (chunks, ...); of `GradientSearch`, "loss", "share" of each
        group, "criteria" (the metrics of those that are trained by) and "price" (by how many percent the loss
        falls when the budget grows by one).
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
      score: ranks units within their group; see `compress`.
      key: source of randomness; default ``jax.random.key(0)``.
      directory: where to keep checkpoints; None for none.
      progress: show a progress bar.

    Returns:
      The `Found`; its plan is on the budget exactly.

    Raises:
      BudgetError: the budget is below what the fixed axes allow.
      RequestError: an argument is malformed, the variables are not trainable, or the batches are no pure
        function of the step.
      PlanError: nothing can leave, or the variables are not those of the groups.
      TraceError: the loss is not one finite number, or does not run on a small model.
      DivergenceError: the search ended in values that are not finite.
      CheckpointError: the directory holds a checkpoint that is corrupt or of another job.
    """
    problem = problem_of(apply, loss, batches, groups, budget, criteria, score)
    check_problem(problem, variables, "find_plan")
    job = None if directory is None else describe_search(problem, variables, budget, search, key, {})
    return run_search(
        problem, variables, budget, search=search, key=key, directory=directory, job=job, progress=progress
    )


def problem_of(
    apply: Any,
    loss: Any,
    batches: Any,
    groups: Any,
    budget: Any,
    criteria: Any,
    score: Any,
) -> Problem:
    """What a search is asked at a budget.

    Raises:
      RequestError: what should be a function is none.
      BudgetError: it is no budget.
      CriterionError: a criterion is none.
    """
    check_asked(apply, loss, batches, groups, score)
    check_budget(budget)
    return Problem(
        apply, loss, batches, groups, COSTS[budget.cost](groups), checked_criteria(criteria), score
    )


def describe_search(
    problem: Problem,
    variables: Any,
    budget: Budget,
    search: Any,
    key: Any,
    before: Mapping[str, float],
) -> dict[str, Any]:
    """What identifies a search, as JSON values; see `describe_request`."""
    method, key = checked_search(search), checked_key(key)
    return {
        **describe_request(problem, variables, method, before),
        "budget": [budget.cost, budget.fraction],
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }


def run_search(
    problem: Problem,
    variables: Any,
    budget: Budget,
    *,
    search: Any,
    key: Any,
    directory: str | os.PathLike[str] | None,
    job: Mapping[str, Any] | None,
    progress: bool,
) -> Found:
    """`find_plan` for a problem that is checked."""
    method, key = checked_search(search), checked_key(key)
    groups, limit = problem.groups, budget.limit(problem.groups)
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
        check=stops(found.variables, "search"),
        progress=progress,
    )
    trained, coefficients = found.variables(state), np.asarray(found.coefficients(state))
    check_finite({"coefficients": coefficients, "variables": trained}, "search")
    scores = np.asarray(problem.score(groups, trained))
    keep = keep_units(groups, scores, round_counts(problem.cost, coefficients, limit))
    return Found(plan_units(groups, keep), trained, problem.groups, scores, coefficients, history)
