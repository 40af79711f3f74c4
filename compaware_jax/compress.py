"""The main job: a trained model and what its application demands go in, a smaller one comes out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from compaware_jax.boundary import trim
from compaware_jax.coefficients import GradientSearch, Problem, Score, SearchMethod
from compaware_jax.cost import COSTS, Budget
from compaware_jax.criteria import Apply, Criterion, Verdict, measure
from compaware_jax.fit import Batches, Loss, check_finite, fit
from compaware_jax.groups import Groups
from compaware_jax.importance import l2
from compaware_jax.loop import run_steps
from compaware_jax.plan import Plan, plan_units
from compaware_jax.request import check_budget, check_request, describe_request
from compaware_jax.select import keep_units, round_counts
from compaware_jax.small_function import Uncut, slim, uncut, work_in
from compaware_jax.surgery import shrink

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What `compress` made.

    Attributes:
      apply: the small function, with the signature of the dense one.
      variables: its variables.
      plan: what was kept.
      groups: what could leave; at the boundary, with what stays there settled.
      scores: what ranked the units when they were cut, shape (units,).
      coefficients: kept share per group that the search ended with, shape (groups,).
      adapted: the weights that the search ended with, at full width, before surgery and fine-tune.
      uncut: what of the small function runs at full width; no cost counts it.
      verdicts: per criterion its value before and after, and whether it is kept.
      costs: per cost its value before and after.
      history: per phase ("search", "fine-tune") the means over chunks of steps.
    """

    apply: Callable[..., Any]
    variables: Any
    plan: Plan
    groups: Groups
    scores: np.ndarray
    coefficients: np.ndarray
    adapted: Any
    uncut: tuple[Uncut, ...]
    verdicts: tuple[Verdict, ...]
    costs: Mapping[str, tuple[int, int]]
    history: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def kept(self) -> bool:
        """Whether every criterion is kept."""
        return all(verdict.kept for verdict in self.verdicts)


def compress(
    apply: Apply,
    variables: Any,
    loss: Loss,
    batches: Batches,
    *,
    groups: Groups,
    budget: Budget,
    criteria: Sequence[Criterion] = (),
    held_out: Any = None,
    search: SearchMethod | None = None,
    score: Score = l2,
    fine_tune: int = 10_000,
    learning_rate: float = 2e-3,
    key: jax.Array | None = None,
    directory: str | os.PathLike[str] | None = None,
    allow_failing: bool = False,
    progress: bool = True,
) -> Result:
    """Make a model as small as a budget asks, keeping its criteria.

    Three phases: soft coefficients are optimised together with the weights; the counts are rounded to
    the budget exactly and the model is cut; the small model is fine-tuned. Where groups are at the
    boundary, what the loss hardly notices of them leaves before (see `boundary.trim`).

    Args:
      apply: pure function ``apply(variables, *args)``.
      variables: its trained variables.
      loss: ``(apply, variables, batch) -> scalar``, called with dense, masked and small functions; or
        ``-> (scalar, updates)``, where updates are new values of entries of the variables that no gradient
        trains, such as ``{"batch_stats": ...}``.
      batches: ``step -> batch``, pure and jittable, so that the step is the whole data position.
      groups: what can leave, from `find_groups`.
      budget: the target, e.g. ``params(0.1)``.
      criteria: metrics with thresholds; constraints while training, verdicts at the end.
      held_out: the batch on which criteria are measured; needed if there are any.
      search: how coefficients are found; default `GradientSearch`.
      score: ranks units within their group.
      fine_tune: steps of the last phase.
      learning_rate: of the last phase (Adam, cosine to zero).
      key: source of randomness; default ``jax.random.key(0)``.
      directory: where to keep checkpoints; started again with the same arguments after a kill, the
        result is the same bit for bit. None for none.
      allow_failing: go on although the dense model fails a criterion.
      progress: show progress bars.

    Returns:
      The `Result`. A criterion that could not be kept at the budget is said so in its verdicts.

    Raises:
      BudgetError: the budget is below what the fixed axes allow.
      CriterionError: the dense model already fails a criterion.
      PlanError: nothing can leave, or the variables are not those of the groups, or not trainable.
      TraceError: the loss is not one finite number.
      DivergenceError: the search or the fine-tune ended in values that are not finite.
      CheckpointError: the directory holds a checkpoint that is corrupt or of another job.
    """
    check_budget(budget)
    cost = COSTS[budget.cost](groups)
    problem = Problem(apply, loss, batches, groups, cost, tuple(criteria), score)
    before = check_request(problem, variables, held_out, allow_failing=allow_failing)
    limit = budget.limit(groups)
    criteria = problem.criteria
    key = jax.random.key(0) if key is None else key
    method = GradientSearch() if search is None else search
    job = {
        **describe_request(problem, variables, method),
        "budget": [budget.cost, budget.fraction],
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "fine_tune": [fine_tune, learning_rate],
    }
    folder = None if directory is None else Path(directory)
    problem, start = trim(problem, variables, [limit])
    found = method.build(problem)
    state, search_history = run_steps(
        found.step,
        found.init(start, budget.fraction, key, 0),
        found.steps,
        label="search",
        chunk=min(50, found.steps),
        directory=folder and folder / "search",
        job=job,
        progress=progress,
    )
    coefficients = np.asarray(found.coefficients(state))
    trained = found.variables(state)
    check_finite(trained, "search")
    counts = round_counts(problem.cost, coefficients, limit)
    scores = np.asarray(problem.score(groups, trained))
    keep = keep_units(groups, scores, counts)
    plan = plan_units(groups, keep)
    ran = _checked_work(groups, plan)

    small_apply = slim(apply, plan)
    small, tune_history = fit(
        small_apply,
        shrink(trained, plan),
        loss,
        batches,
        fine_tune,
        learning_rate=learning_rate,
        criteria=criteria,
        label="fine-tune",
        directory=folder and folder / "fine-tune",
        job=job,
        progress=progress,
    )
    after = measure(criteria, small_apply, small, held_out) if criteria else {}
    verdicts = tuple(Verdict(str(c), before[c.name], after[c.name], c.keeps(after[c.name])) for c in criteria)
    costs = {name: make(groups) for name, make in COSTS.items()}
    return Result(
        apply=small_apply,
        variables=small,
        plan=plan,
        groups=problem.groups,
        scores=scores,
        coefficients=coefficients,
        adapted=trained,
        uncut=ran,
        verdicts=verdicts,
        costs={name: (c.total, c.exact(counts)) for name, c in costs.items()},
        history={"search": search_history, "fine-tune": tune_history},
    )


def _checked_work(groups: Groups, plan: Plan) -> tuple[Uncut, ...]:
    """What runs at full width; a warning where that is much."""
    ran = uncut(groups, plan)
    share = sum(equation.flops for equation in ran) / max(work_in(groups), 1)
    if share > 0.01:
        _LOG.warning(
            "%.0f %% of the FLOPs still run at full width, e.g. %s, because the small result would not be "
            "exact. Result.uncut lists them; constrain(groups, whole=...) keeps the units that cause it.",
            100 * share,
            ran[0].where,
        )
    return ran
