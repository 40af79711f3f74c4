"""The main job: a trained model and what its application demands go in, a smaller one comes out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax

from compaware_jax.cost import Budget
from compaware_jax.coupling.groups import Groups
from compaware_jax.importance import l2
from compaware_jax.search.coefficients import Score, SearchMethod
from compaware_jax.search.find import Found, describe_search, problem_of, run_search
from compaware_jax.search.request import check_request
from compaware_jax.settings import whole_number
from compaware_jax.surgery.plan import Plan, component_table
from compaware_jax.surgery.small_function import Uncut, checked_work, costs_left, slim
from compaware_jax.surgery.trees import shrink
from compaware_jax.tables import text_table
from compaware_jax.training.checks import checked_rate, optimizer_mark
from compaware_jax.training.criteria import Apply, Criterion, Verdict, measure
from compaware_jax.training.fit import tuned
from compaware_jax.training.loop import folder_of
from compaware_jax.training.objective import Batches, Loss


@dataclass(frozen=True)
class Result:
    """What `compress` made.

    Attributes:
      apply: the small function, with the signature of the dense one.
      variables: its variables.
      found: what the search found: the plan, the weights before surgery, what could leave.
      uncut: what of the small function runs wider, because it would not be exact otherwise.
      verdicts: per criterion its value before and after, and whether it is kept.
      costs: per cost its value before and after; the FLOPs are those that the small function runs, at full
        width where it has to.
      history: per phase ("search", "fine-tune") the means over chunks of steps: "loss", "criteria" (the
        metrics of those that are trained by, on batches), and of the search "share" and "price".
    """

    apply: Callable[..., Any]
    variables: Any = field(repr=False)
    found: Found
    uncut: tuple[Uncut, ...]
    verdicts: tuple[Verdict, ...]
    costs: Mapping[str, tuple[int, int]]
    history: Mapping[str, Mapping[str, np.ndarray]] = field(repr=False)

    def __str__(self) -> str:
        """What was asked, what came out, what each component paid: three tables."""
        costs = [(n, f"{a:,}", f"{b:,}", f"{b / max(a, 1):.1%}") for n, (a, b) in self.costs.items()]
        paid = [
            (name, f"{a:,}", f"{b:,}", share)
            for name, a, b, share in component_table(self.found.groups, self.plan)
        ]
        tables = [
            text_table(("cost", "before", "after", "left"), costs),
            text_table(("component", "parameters", "after", "left"), paid),
        ]
        if self.verdicts:
            told = [
                (v.criterion, f"{v.before:.6g}", f"{v.after:.6g}", "kept" if v.kept else "not kept")
                for v in self.verdicts
            ]
            tables.insert(0, text_table(("criterion", "before", "after", ""), told))
        return "\n\n".join(tables)

    @property
    def plan(self) -> Plan:
        """What is kept."""
        return self.found.plan

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
    optimizer: optax.GradientTransformation | None = None,
    key: jax.Array | None = None,
    directory: str | os.PathLike[str] | None = None,
    allow_failing: bool = False,
    progress: bool = True,
) -> Result:
    """Make a model as small as a budget asks, keeping its criteria.

    Three phases: soft coefficients are optimised together with the weights; the counts are rounded to
    the budget exactly and the model is cut; the small model is fine-tuned. Where groups are at the
    boundary, what the loss hardly notices of them leaves before (see `boundary.trim`).

    A step of the search trains the weights less than one of the fine-tune does. Where all steps there are
    time for are few, `one_shot` and a fine-tune of all of them may end ahead.

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
      score: ranks units within their group, ``(groups, variables) -> scores``, shape (units,); traced, and
        asked at every step of the search. `importance.l1`, `l2`, `lamp` and `fpgm` are such functions; those
        that need data have it from around them: ``lambda groups, v: importance.taylor(groups, v, grad(v))``.
      fine_tune: steps of the last phase.
      learning_rate: of the last phase (Adam, cosine to zero).
      optimizer: of the last phase, in place of that Adam; see `fit`. The search trains by Adam all that has a
        gradient: freeze what is to stay by `jax.lax.stop_gradient` in the function.
      key: source of randomness; default ``jax.random.key(0)``.
      directory: where to keep checkpoints; started again with the same arguments after a kill, the
        result is the same bit for bit. None for none.
      allow_failing: go on although the dense model fails a criterion.
      progress: show progress bars.

    Returns:
      The `Result`. A criterion that could not be kept at the budget is said so in its verdicts.

    Raises:
      BudgetError: the budget is below what the fixed axes allow.
      RequestError: an argument is malformed, the variables are not trainable, or the batches are no pure
        function of the step.
      CriterionError: the dense model already fails a criterion, or a metric does not run on a small model.
      PlanError: nothing can leave, or the variables are not those of the groups.
      TraceError: the loss is not one finite number, or does not run on a small model.
      DivergenceError: the search or the fine-tune ended in values that are not finite.
      CheckpointError: the directory holds a checkpoint that is corrupt or of another job.
    """
    fine_tune = whole_number(fine_tune, "compress: fine_tune")
    learning_rate = checked_rate(learning_rate, "compress: learning_rate")
    optimizer_mark(optimizer, variables, "compress")
    problem = problem_of(apply, loss, batches, groups, budget, criteria, score)
    before = check_request(problem, variables, held_out, allow_failing=allow_failing, caller="compress")
    folder = None if directory is None else folder_of(directory, "compress")
    job = folder and describe_search(problem, variables, budget, search, key, before)
    found = run_search(
        problem,
        variables,
        budget,
        search=search,
        key=key,
        directory=folder and folder / "search",
        job=job,
        progress=progress,
    )
    ran, flops = checked_work(groups, found.plan, budget)
    small_apply = slim(apply, found.plan)
    small, tune_history = tuned(
        small_apply,
        shrink(found.variables, found.plan),
        loss,
        batches,
        fine_tune,
        learning_rate=learning_rate,
        optimizer=optimizer,
        criteria=problem.criteria,
        label="fine-tune",
        directory=folder and folder / "fine-tune",
        job=job,
        progress=progress,
    )
    after = measure(problem.criteria, small_apply, small, held_out) if criteria else {}
    return Result(
        apply=small_apply,
        variables=small,
        found=found,
        uncut=ran,
        verdicts=tuple(
            Verdict(str(c), before[c.name], after[c.name], c.keeps(after[c.name])) for c in problem.criteria
        ),
        costs=costs_left(groups, found.plan, flops),
        history={"search": found.history, "fine-tune": tune_history},
    )
