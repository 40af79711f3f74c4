"""The main job: a trained model and what its application demands go in, a smaller one comes out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.coefficients import GradientSearch, Problem, Score, SearchMethod
from compaware_jax.cost import COSTS, Budget
from compaware_jax.criteria import Apply, Criterion, Verdict, check_dense, measure
from compaware_jax.errors import CriterionError, PlanError, TraceError
from compaware_jax.fit import Batches, Loss, fit
from compaware_jax.groups import Groups, fingerprint, leaves_of
from compaware_jax.importance import l2
from compaware_jax.loop import run_steps
from compaware_jax.plan import Plan, plan_units
from compaware_jax.select import keep_units, round_counts
from compaware_jax.surgery import shrink, slim


@dataclass(frozen=True)
class Result:
    """What `compress` made.

    Attributes:
      apply: the small function, with the signature of the dense one.
      variables: its variables.
      plan: what was kept.
      groups: what could leave.
      coefficients: kept share per group that the search ended with, shape (groups,).
      adapted: the weights that the search ended with, at full width, before surgery and fine-tune.
      verdicts: per criterion its value before and after, and whether it is kept.
      costs: per cost its value before and after.
      history: per phase ("search", "fine-tune") the means over chunks of steps.
    """

    apply: Callable[..., Any]
    variables: Any
    plan: Plan
    groups: Groups
    coefficients: np.ndarray
    adapted: Any
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
    the budget exactly and the model is cut; the small model is fine-tuned.

    Args:
      apply: pure function ``apply(variables, *args)``.
      variables: its trained variables.
      loss: ``(apply, variables, batch) -> scalar``, called with dense, masked and small functions.
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
      PlanError: the variables are not those that the groups were found for.
      TraceError: the loss is not one finite number.
      CheckpointError: the directory holds a checkpoint that is corrupt or of another job.
    """
    _check_variables(variables, groups)
    _check_loss(loss, apply, variables, batches)
    limit = budget.limit(groups)
    criteria = tuple(criteria)
    if criteria and held_out is None:
        raise CriterionError(
            "compress: criteria need held_out, the batch that they are measured on; got None."
        )
    before = measure(criteria, apply, variables, held_out) if criteria else {}
    if not allow_failing:
        check_dense(criteria, before)

    cost = COSTS[budget.cost](groups)
    key = jax.random.key(0) if key is None else key
    method = GradientSearch() if search is None else search
    found = method.build(Problem(apply, loss, batches, groups, cost, criteria, score))
    job = {
        "model": groups.fingerprint,
        "variables": _digest(variables),
        "budget": [budget.cost, budget.fraction],
        "criteria": [str(c) for c in criteria],
        "search": _describe(method),
        "score": getattr(score, "__name__", repr(score)),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "fine_tune": [fine_tune, learning_rate],
    }
    folder = None if directory is None else Path(directory)
    state, search_history = run_steps(
        found.step,
        found.init(variables, budget.fraction, key, 0),
        found.steps,
        label="search",
        chunk=min(50, found.steps),
        directory=folder and folder / "search",
        job=job,
        progress=progress,
    )
    coefficients = np.asarray(found.coefficients(state))
    trained = found.variables(state)
    counts = round_counts(cost, coefficients, limit)
    keep = keep_units(groups, np.asarray(score(groups, trained)), counts)
    plan = plan_units(groups, keep)

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
        groups=groups,
        coefficients=coefficients,
        adapted=trained,
        verdicts=verdicts,
        costs={name: (c.total, c.exact(counts)) for name, c in costs.items()},
        history={"search": search_history, "fine-tune": tune_history},
    )


def _check_variables(variables: Any, groups: Groups) -> None:
    got = fingerprint(leaves_of(variables))
    if got != groups.fingerprint:
        expected = {leaf.path: leaf for leaf in groups.leaves}
        wrong = [leaf for leaf in leaves_of(variables) if expected.get(leaf.path) != leaf]
        raise PlanError(
            f"compress: the variables (fingerprint {got}) are not those that the groups were found for "
            f"({groups.fingerprint}); first difference: {wrong[0] if wrong else 'missing leaves'}. Call "
            "find_groups with these variables."
        )
    bad = [
        leaf.path
        for leaf, array in zip(groups.leaves, jax.tree.leaves(variables), strict=True)
        if jnp.issubdtype(array.dtype, jnp.inexact) and not bool(jnp.isfinite(array).all())
    ]
    if bad:
        raise PlanError(
            f"compress: {bad[:3]} hold values that are not finite. Expected a trained model; look for "
            "where its training diverged."
        )


def _check_loss(loss: Loss, apply: Apply, variables: Any, batches: Batches) -> None:
    value = jax.jit(lambda v: loss(apply, v, batches(jnp.int32(0))))(variables)
    if value.shape != () or not bool(jnp.isfinite(value)):
        raise TraceError(
            f"compress: the loss of the dense model on batches(0) is {value}, expected one finite number. "
            "Look for values in the data that are not finite, or for a loss without a mean."
        )


def _digest(tree: Any) -> str:
    """A hash of a tree's values: what a checkpoint is tied to beside the shapes."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _describe(method: Any) -> Any:
    settings = asdict(method) if is_dataclass(method) and not isinstance(method, type) else {}
    # JSON has no tuples: a checkpoint's job has to compare equal after a round trip.
    return {type(method).__name__: {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}
