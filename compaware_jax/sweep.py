"""A whole trade-off front in one compiled program: budgets and seeds are lanes of a vmap."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compaware_jax.cost import COSTS, Budget, check_budget
from compaware_jax.coupling.groups import Groups
from compaware_jax.errors import BudgetError
from compaware_jax.importance import l2
from compaware_jax.masks import apply_mask
from compaware_jax.search.boundary import trim
from compaware_jax.search.coefficients import Problem, Score, Search, SearchMethod
from compaware_jax.search.job import describe_request
from compaware_jax.search.request import (
    check_asked,
    check_request,
    checked_key,
    checked_search,
)
from compaware_jax.search.select import keep_units, round_counts
from compaware_jax.settings import whole_number
from compaware_jax.surgery.plan import Plan, plan_units
from compaware_jax.surgery.small_function import checked_work, costs_left
from compaware_jax.surgery.trees import shrink
from compaware_jax.tables import text_table
from compaware_jax.training.checks import checked_rate, not_finite, optimizer_mark
from compaware_jax.training.criteria import Apply, Criterion, Verdict, checked_criteria
from compaware_jax.training.fit import FitState, adam_cosine, fit_step
from compaware_jax.training.loop import run_steps
from compaware_jax.training.objective import Batches, Loss

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One lane of a sweep.

    Attributes:
      budget: what was asked.
      seed: of the data order and the sampled allocations.
      plan: what was kept.
      variables: the small variables; run them with ``slim(apply, plan)``.
      verdicts: per criterion its value before and after on the held-out batch, and whether it is kept.
      costs: per cost its value before and after; the FLOPs are those that the small function runs, at full
        width where it has to.
      coefficients: kept share per group that the search ended with, shape (groups,).
      diverged: whether the lane ended in values that are not finite; it keeps no criterion then.
    """

    budget: Budget
    seed: int
    plan: Plan
    variables: Any = field(repr=False)
    verdicts: tuple[Verdict, ...]
    costs: Mapping[str, tuple[int, int]]
    coefficients: np.ndarray
    diverged: bool = False

    @property
    def kept(self) -> bool:
        """Whether every criterion is kept."""
        return not self.diverged and all(verdict.kept for verdict in self.verdicts)


class Front(tuple[Point, ...]):
    """The points of a sweep, budgets in the order given, seeds inside; `print` shows a row for each."""

    __slots__ = ()

    def __str__(self) -> str:
        """Per point its budget and seed, what is left of the cost, and what each criterion has."""
        names = [verdict.criterion for verdict in self[0].verdicts] if self else []
        rows = []
        for point in self:
            before, after = point.costs[point.budget.cost]
            told = [verdict.told for verdict in point.verdicts]
            end = "diverged" if point.diverged else ""
            share = f"{point.budget.fraction:.2%}"
            rows.append((share, point.seed, f"{after:,}", f"{after / max(before, 1):.2%}", *told, end))
        cost = self[0].budget.cost if self else "cost"
        return text_table(("budget", "seed", cost, "left", *names, ""), rows)


class _State(NamedTuple):
    """All lanes: the search's state, then the fine-tune's; gates and data offset per lane."""

    search: Any
    tune: FitState
    gates: jax.Array
    offset: jax.Array


@dataclass(frozen=True, eq=False)
class _Lanes:
    """Searches, then fine-tunes, of many budgets and seeds, as pure functions of one state.

    Attributes:
      problem: what is asked.
      search: the search for it.
      limits: the cost that each lane aims at.
      fine_tune: steps of the last phase.
      rule: optimizer of the last phase.
    """

    problem: Problem
    search: Search
    limits: tuple[int, ...]
    fine_tune: int
    rule: optax.GradientTransformation

    @property
    def steps(self) -> int:
        """Steps of both phases."""
        return self.search.steps + self.fine_tune

    def init(self, variables: Any, asked: Sequence[tuple[Budget, int]], key: jax.Array) -> _State:
        """Where all lanes start; the first seed has the key and the data order of `compress`."""
        keys = jnp.stack([jax.random.fold_in(key, seed) if seed else key for _, seed in asked])
        offset = jnp.array([seed * self.steps for _, seed in asked], jnp.int32)
        fractions = jnp.array([budget.fraction for budget, _ in asked])
        searches = jax.vmap(self.search.init, in_axes=(None, 0, 0, 0))(variables, fractions, keys, offset)
        gates = jnp.ones((len(asked), self.problem.groups.units))
        return _State(searches, self._untuned(self.search.variables(searches)), gates, offset)

    def step(self, state: _State, index: jax.Array) -> tuple[_State, dict[str, jax.Array]]:
        """One step of the search or of the fine-tune, of all lanes."""
        return jax.lax.cond(index < self.search.steps, self._searched, self._tuned, state, index)

    def harden(self, state: _State) -> _State:
        """Round every lane to its budget, on the host and in whole numbers."""
        shares, trained = self.coefficients(state), self.search.variables(state.search)
        # A lane that diverged is cut all the same: the others go on.
        shares = np.where(np.isfinite(shares).all(1, keepdims=True), shares, 1.0)
        scores = np.asarray(jax.vmap(lambda v: self.problem.score(self.problem.groups, v))(trained))
        gates = [
            keep_units(self.problem.groups, score, round_counts(self.problem.cost, share, limit))
            for score, share, limit in zip(scores, shares, self.limits, strict=True)
        ]
        hard = jnp.asarray(np.array(gates), state.gates.dtype)
        # What a loss says of the variables, such as a penalty, it says of those that stay.
        masked = jax.vmap(partial(apply_mask, self.problem.groups))(hard, trained)
        return state._replace(gates=hard, tune=self._untuned(masked))

    def _untuned(self, variables: Any) -> FitState:
        """Where fine-tunes start; an optimizer's state may hold what it starts from."""
        return jax.vmap(self._tuner(jnp.ones(self.problem.groups.units), jnp.int32(0))[0])(variables)

    def coefficients(self, state: _State) -> np.ndarray:
        """Kept share per lane and group, shape (lanes, groups)."""
        return np.asarray(jax.vmap(self.search.coefficients)(state.search))

    def _tuner(self, gates: jax.Array, offset: jax.Array) -> Any:
        problem = self.problem

        def masked(tree: Any, *args: Any, **kwargs: Any) -> Any:
            return problem.apply(apply_mask(problem.groups, gates, tree), *args, **kwargs)

        def batches(index: jax.Array) -> Any:
            return problem.batches(index + offset)

        return fit_step(masked, problem.loss, batches, self.rule, problem.criteria, steps=self.fine_tune)

    def _searched(self, state: _State, index: jax.Array) -> tuple[_State, dict[str, jax.Array]]:
        new, info = jax.vmap(self.search.step, in_axes=(0, None))(state.search, index)
        return state._replace(search=new), {"loss": info["loss"]}

    def _tuned(self, state: _State, index: jax.Array) -> tuple[_State, dict[str, jax.Array]]:
        def one(tune: FitState, gates: jax.Array, offset: jax.Array) -> Any:
            return self._tuner(gates, offset)[1](tune, index - self.search.steps)

        new, info = jax.vmap(one)(state.tune, state.gates, state.offset)
        return state._replace(tune=new), {"loss": info["loss"]}


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
    search: SearchMethod | None = None,
    score: Score = l2,
    fine_tune: int = 2_000,
    learning_rate: float = 2e-3,
    optimizer: optax.GradientTransformation | None = None,
    key: jax.Array | None = None,
    directory: str | os.PathLike[str] | None = None,
    allow_failing: bool = False,
    progress: bool = True,
) -> Front:
    """Compress a model to several budgets, with several seeds each, in one compiled program.

    The first lane of a budget does what `compress` does with the same key, except that its fine-tune runs
    masked at full width, so that all lanes have one shape, and that the boundary is trimmed once, for the
    highest budget. The lanes of the other seeds draw other data and allocations. Arguments are those of
    `compress`. A lane holds weights and moments of both phases, six times the variables, beside gradients.

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
      search: how coefficients are found; default `GradientSearch`.
      score: ranks units within their group; see `compress`.
      fine_tune: steps of the last phase, fewer than those of `compress`: they run at full width.
      learning_rate: of the last phase.
      optimizer: of the last phase, see `fit`.
      key: source of randomness; default ``jax.random.key(0)``.
      directory: where to keep checkpoints; None for none.
      allow_failing: go on although the dense model fails a criterion.
      progress: show a progress bar.

    Returns:
      The `Front`: a `Point` per lane. A lane that diverged is warned of, keeps no criterion, and leaves the
      others as they are.

    Raises:
      BudgetError: a budget is below what the fixed axes allow; the budgets are none, or on different costs.
      RequestError: there are no seeds, or as for `compress`.
      CriterionError, PlanError, TraceError, CheckpointError: as for `compress`.
    """
    check_asked(apply, loss, batches, groups, score)
    if not isinstance(budgets, Sequence):
        raise BudgetError(f"sweep: budgets is {budgets!r}, expected a list of budgets on the same cost.")
    for budget in budgets:
        check_budget(budget)
    seeds = whole_number(seeds, "sweep: seeds", least=1)
    fine_tune = whole_number(fine_tune, "sweep: fine_tune")
    learning_rate = checked_rate(learning_rate, "sweep: learning_rate")
    mark = optimizer_mark(optimizer, variables, "sweep")
    rule = adam_cosine(learning_rate, fine_tune) if optimizer is None else optimizer
    kinds = {budget.cost for budget in budgets}
    if len(kinds) != 1:
        raise BudgetError(
            f"sweep: budgets are on {sorted(kinds) or 'nothing'}, expected one or more budgets, all on "
            "the same cost. Run one sweep per cost."
        )
    limits = {budget: budget.limit(groups) for budget in budgets}
    cost = COSTS[kinds.pop()](groups)
    method, key = checked_search(search), checked_key(key)
    problem = Problem(apply, loss, batches, groups, cost, checked_criteria(criteria), score)
    before = check_request(problem, variables, held_out, allow_failing=allow_failing, caller="sweep")
    job = {} if directory is None else describe_request(problem, variables, method, before)
    problem, start = trim(problem, variables, list(limits.values()))
    asked = [(budget, seed) for budget in budgets for seed in range(seeds)]
    goals = tuple(limits[budget] for budget, _ in asked)
    lanes = _Lanes(problem, method.build(problem), goals, fine_tune, rule)
    state, _ = run_steps(
        lanes.step,
        lanes.init(start, asked, key),
        lanes.steps,
        label=f"sweep of {len(asked)} lanes",
        chunk=50,
        between={lanes.search.steps: lanes.harden},
        directory=directory,
        job={
            **job,
            "budgets": [[b.cost, b.fraction] for b in budgets],
            "seeds": seeds,
            "key": np.asarray(jax.random.key_data(key)),
            "fine_tune": [fine_tune, mark or learning_rate],
        },
        progress=progress,
    )
    return Front(_points(lanes, state, asked, groups, held_out, before))


def _points(
    lanes: _Lanes,
    state: _State,
    asked: Sequence[tuple[Budget, int]],
    groups: Groups,
    held_out: Any,
    before: Mapping[str, float],
) -> Iterator[Point]:
    apply, criteria = lanes.problem.apply, lanes.problem.criteria
    masked = jax.vmap(lambda g, v: apply_mask(groups, g, v))(state.gates, state.tune.variables)
    # One lane at a time: a held-out set is much larger than a batch.
    values = jax.device_get(jax.lax.map(lambda v: [c.metric(apply, v, held_out) for c in criteria], masked))
    shares = lanes.coefficients(state)
    for i, (budget, seed) in enumerate(asked):
        plan = plan_units(groups, np.asarray(state.gates[i]) > 0.5)
        small = shrink(jax.tree.map(lambda x, i=i: x[i], state.tune.variables), plan)
        diverged = bool(not_finite({"coefficients": shares[i], "variables": small}))
        if diverged:
            _LOG.warning(
                "sweep: seed %d of budget %g ended in values that are not finite; lower its learning rates.",
                seed,
                budget.fraction,
            )
        yield Point(
            budget=budget,
            seed=seed,
            plan=plan,
            variables=small,
            verdicts=tuple(
                Verdict(str(c), before[c.name], after, c.keeps(after) and not diverged)
                for c, after in ((c, c.reading(value[i])) for c, value in zip(criteria, values, strict=True))
            ),
            costs=costs_left(groups, plan, checked_work(groups, plan, budget)[1]),
            coefficients=shares[i],
            diverged=diverged,
        )
