"""A whole trade-off front in one compiled program: budgets and seeds are lanes of a vmap."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.boundary import trim
from compaware_jax.coefficients import GradientSearch, Problem, Score
from compaware_jax.cost import COSTS, Budget, Cost
from compaware_jax.criteria import Apply, Criterion
from compaware_jax.errors import BudgetError, RequestError
from compaware_jax.fit import Batches, FitState, Loss, adam_cosine, fit_step
from compaware_jax.groups import Groups
from compaware_jax.importance import l2
from compaware_jax.job import describe_request
from compaware_jax.loop import run_steps
from compaware_jax.masks import apply_mask
from compaware_jax.plan import Plan, plan_units
from compaware_jax.request import check_budget, check_functions, check_request, check_steps, checked_criteria
from compaware_jax.select import keep_units, round_counts
from compaware_jax.small_function import checked_work
from compaware_jax.surgery import shrink

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One lane of a sweep.

    Attributes:
      budget: what was asked.
      seed: of the data order and the sampled allocations.
      plan: what was kept.
      variables: the small variables; run them with ``slim(apply, plan)``.
      cost: the cost reached, and that of the dense model. FLOPs are those that the small function runs, at
        full width where it has to.
      metrics: value per criterion on the held-out batch.
      kept: whether each criterion is kept.
      coefficients: kept share per group that the search ended with.
    """

    budget: Budget
    seed: int
    plan: Plan
    variables: Any = field(repr=False)
    cost: tuple[int, int]
    metrics: Mapping[str, float]
    kept: Mapping[str, bool]
    coefficients: np.ndarray


class _Lanes(NamedTuple):
    """All lanes: the search's state, then the fine-tune's; gates and data offset per lane."""

    search: Any
    tune: FitState
    gates: jax.Array
    offset: jax.Array


def sweep(
    apply: Apply,
    variables: Any,
    loss: Loss,
    batches: Batches,
    *,
    groups: Groups,
    budgets: Sequence[Budget],
    seeds: int = 1,
    criteria: Sequence[Criterion] = (),
    held_out: Any = None,
    search: GradientSearch | None = None,
    score: Score = l2,
    fine_tune: int = 2_000,
    learning_rate: float = 2e-3,
    directory: str | os.PathLike[str] | None = None,
    allow_failing: bool = False,
    progress: bool = True,
) -> tuple[Point, ...]:
    """Compress a model to several budgets, with several seeds each, in one compiled program.

    Every lane does what `compress` does, except that its fine-tune runs masked at full width, so that
    all lanes have one shape. Arguments are those of `compress`.

    Args:
      apply: pure function ``apply(variables, *args)``.
      variables: its trained variables.
      loss: as for `compress`.
      batches: ``step -> batch``.
      groups: what can leave.
      budgets: targets on the same cost.
      seeds: lanes per budget.
      criteria: measured at the end of every lane, and constraints on the way.
      held_out: the batch on which they are measured.
      search: settings of the search.
      score: ranks units within their group.
      fine_tune: steps of the last phase.
      learning_rate: of the last phase.
      directory: where to keep checkpoints; None for none.
      allow_failing: go on although the dense model fails a criterion.
      progress: show a progress bar.

    Returns:
      One `Point` per lane, budgets in the order given, seeds inside. A lane that diverged is warned of, and
      keeps no criterion.

    Raises:
      BudgetError: a budget is below what the fixed axes allow; the budgets are none, or on different costs.
      RequestError: there are no seeds, or as for `compress`.
      CriterionError, PlanError, TraceError, CheckpointError: as for `compress`.
    """
    check_functions(apply, loss, batches)
    for budget in budgets:
        check_budget(budget)
    if not isinstance(seeds, (int, np.integer)) or seeds < 1:
        raise RequestError(f"sweep: seeds={seeds!r}, expected at least one lane per budget.")
    check_steps(fine_tune, "sweep: fine_tune")
    kinds = {budget.cost for budget in budgets}
    if len(kinds) != 1:
        raise BudgetError(
            f"sweep: budgets are on {sorted(kinds) or 'nothing'}, expected one or more budgets, all on "
            "the same cost. Run one sweep per cost."
        )
    limits = [budget.limit(groups) for budget in budgets]
    cost = COSTS[kinds.pop()](groups)
    method = search or GradientSearch()
    problem = Problem(apply, loss, batches, groups, cost, checked_criteria(criteria), score)
    checked = check_request(problem, variables, held_out, allow_failing=allow_failing)
    criteria = problem.criteria
    job = {} if directory is None else describe_request(problem, variables, method, checked.loss)
    problem, start = trim(problem, variables, limits)
    found = method.build(problem)
    lanes = [(budget, limit, s) for budget, limit in zip(budgets, limits, strict=True) for s in range(seeds)]
    total = found.steps + fine_tune

    def tuner(gates: jax.Array, offset: jax.Array) -> Any:
        def masked(tree: Any, *args: Any, **kwargs: Any) -> Any:
            return apply(apply_mask(groups, gates, tree), *args, **kwargs)

        rule = adam_cosine(learning_rate, fine_tune)
        return fit_step(masked, loss, lambda index: batches(index + offset), rule, criteria)

    def searching(state: _Lanes, index: jax.Array) -> tuple[_Lanes, dict[str, jax.Array]]:
        new, info = jax.vmap(found.step, in_axes=(0, None))(state.search, index)
        return state._replace(search=new), {"loss": info["loss"]}

    def tuning(state: _Lanes, index: jax.Array) -> tuple[_Lanes, dict[str, jax.Array]]:
        def one(tune: FitState, gates: jax.Array, offset: jax.Array) -> Any:
            return tuner(gates, offset)[1](tune, index)

        new, info = jax.vmap(one)(state.tune, state.gates, state.offset)
        return state._replace(tune=new), info

    def step(state: _Lanes, index: jax.Array) -> tuple[_Lanes, dict[str, jax.Array]]:
        return jax.lax.cond(index < found.steps, searching, tuning, state, index)

    def harden(state: _Lanes) -> _Lanes:
        """Round every lane to its budget, on the host and in whole numbers."""
        shares = np.asarray(jax.vmap(found.coefficients)(state.search))
        trained = found.variables(state.search)
        scores = np.asarray(jax.vmap(lambda v: problem.score(groups, v))(trained))
        gates = [
            keep_units(groups, scores[i], round_counts(problem.cost, shares[i], limit))
            for i, (_, limit, _) in enumerate(lanes)
        ]
        return state._replace(
            gates=jnp.asarray(np.array(gates), state.gates.dtype),
            tune=state.tune._replace(variables=trained),
        )

    keys = jax.random.split(jax.random.key(0), max(seeds, 1))
    offset = jnp.array([s * total for _, _, s in lanes], jnp.int32)
    searches = jax.vmap(found.init, in_axes=(None, 0, 0, 0))(
        start,
        jnp.array([budget.fraction for budget, _, _ in lanes]),
        jnp.stack([keys[s] for _, _, s in lanes]),
        offset,
    )
    gates = jnp.ones((len(lanes), groups.units))
    tune = jax.vmap(lambda v: tuner(gates[0], offset[0])[0](v))(found.variables(searches))
    state, _ = run_steps(
        step,
        _Lanes(searches, tune, gates, offset),
        total,
        label=f"sweep of {len(lanes)} lanes",
        chunk=50,
        between={found.steps: harden},
        directory=directory,
        job={
            **job,
            "budgets": [[b.cost, b.fraction] for b in budgets],
            "seeds": seeds,
            "fine_tune": [fine_tune, learning_rate],
        },
        progress=progress,
    )
    return _points(state, lanes, cost, groups, apply, criteria, held_out, found)


def _points(
    state: _Lanes,
    lanes: list[tuple[Budget, int, int]],
    cost: Cost,
    groups: Groups,
    apply: Apply,
    criteria: tuple[Criterion, ...],
    held_out: Any,
    found: Any,
) -> tuple[Point, ...]:
    masked = jax.vmap(lambda g, v: apply_mask(groups, g, v))(state.gates, state.tune.variables)
    # One lane at a time: a held-out set is much larger than a batch.
    values = jax.lax.map(lambda v: jnp.array([c.metric(apply, v, held_out) for c in criteria]), masked)
    shares = np.asarray(jax.vmap(found.coefficients)(state.search))
    points = []
    for i, (budget, _, seed) in enumerate(lanes):
        plan = plan_units(groups, np.asarray(state.gates[i]) > 0.5)
        metrics = {c.name: float(value) for c, value in zip(criteria, values[i], strict=True)}
        small = shrink(jax.tree.map(lambda x, i=i: x[i], state.tune.variables), plan)
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(small)):
            _LOG.warning(
                "sweep: seed %d of budget %g ended in values that are not finite; lower its learning rate.",
                seed,
                budget.fraction,
            )
        points.append(
            Point(
                budget=budget,
                seed=seed,
                plan=plan,
                variables=small,
                cost=(_reached(groups, plan, budget, cost), cost.total),
                metrics=metrics,
                kept={c.name: c.keeps(metrics[c.name]) for c in criteria},
                coefficients=shares[i],
            )
        )
    return tuple(points)


def _reached(groups: Groups, plan: Plan, budget: Budget, cost: Cost) -> int:
    """What a plan costs; FLOPs are those that the small function runs, at full width where it has to."""
    if budget.cost == "flops":
        return checked_work(groups, plan, budget)[1]
    return cost.exact(np.array([kept for _, kept, _ in plan.counts]))
