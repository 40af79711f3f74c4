"""What is asked of `compress`, `find_plan` and `sweep`: refused early, and described for resumption."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.coefficients import Problem, SearchMethod
from compaware_jax.cost import Budget
from compaware_jax.criteria import check_dense, measure
from compaware_jax.errors import BudgetError, CriterionError, PlanError, TraceError
from compaware_jax.fit import updated, value_and_updates
from compaware_jax.groups import Groups, fingerprint, leaves_of
from compaware_jax.loop import digest


def check_request(
    problem: Problem, variables: Any, held_out: Any, *, allow_failing: bool
) -> dict[str, float]:
    """Refuse what cannot work, before any work is done.

    Args:
      problem: what is asked.
      variables: the dense model's.
      held_out: the batch on which criteria are measured.
      allow_failing: accept criteria that the dense model fails.

    Returns:
      The dense model's value per criterion.

    Raises:
      PlanError: nothing can leave, or the variables are not those of the groups, or not trainable.
      TraceError: the loss is not one finite number.
      CriterionError: criteria without held_out, with equal names, or failed by the dense model.
    """
    check_problem(problem, variables)
    if not problem.criteria:
        return {}
    if held_out is None:
        raise CriterionError(
            "compress: criteria need held_out, the batch that they are measured on; got None."
        )
    before = measure(problem.criteria, problem.apply, variables, held_out)
    if not allow_failing:
        check_dense(problem.criteria, before)
    return before


def check_problem(problem: Problem, variables: Any) -> None:
    """Refuse what no search can work on.

    Raises:
      PlanError: nothing can leave, or the variables are not those of the groups, or not trainable.
      TraceError: the loss is not one finite number.
    """
    if not problem.groups.groups:
        raise PlanError(
            "compress: no group of this model can leave. Print the groups: they say why each axis "
            "stays whole."
        )
    _check_variables(variables, problem.groups)
    _check_loss(problem, variables)


def check_budget(budget: Any) -> None:
    """Refuse what is no budget.

    Raises:
      BudgetError: says what to pass instead.
    """
    if not isinstance(budget, Budget):
        raise BudgetError(
            f"the budget is {budget!r}, expected a Budget: params({budget!r}), nbytes(...) or flops(...)."
        )


def describe_request(problem: Problem, variables: Any, method: SearchMethod) -> dict[str, Any]:
    """What identifies a request, as JSON values: a checkpoint of another one is refused."""
    settings = asdict(method) if is_dataclass(method) and not isinstance(method, type) else {}
    score = problem.score
    return {
        "model": problem.groups.fingerprint,
        "groups": _mark(problem.groups),
        "variables": digest(variables),
        "data": digest([problem.batches(jnp.int32(step)) for step in (0, 1)]),
        # Machines differ in the last digits.
        "loss": f"{float(_first_loss(problem, variables)):.3g}",
        "criteria": [[c.name, c.threshold, c.above, c.trainable] for c in problem.criteria],
        # JSON has no tuples: a job has to compare equal after a round trip.
        "search": [
            type(method).__name__,
            {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()},
        ],
        "score": getattr(score, "__name__", type(score).__name__),
    }


def _mark(groups: Groups) -> str:
    """A hash of the groups, of what cuts them and of what is demanded of them."""
    cuts = groups.analysis.cuts
    named = [(group.name, group.units, group.boundary) for group in groups.groups]
    cut = [cuts.within_heads, cuts.boundary, *sorted(map(repr, cuts.choices)), groups.released, groups.states]
    limits = groups.floors, groups.ceilings, groups.steps, groups.may_empty
    return digest([np.frombuffer(repr([named, cut]).encode(), np.uint8), groups.units_of, limits])


def _check_variables(variables: Any, groups: Groups) -> None:
    got = fingerprint(leaves_of(variables))
    if got != groups.fingerprint:
        expected = {leaf.path: leaf for leaf in groups.leaves}
        wrong = [leaf for leaf in leaves_of(variables) if expected.get(leaf.path) != leaf]
        raise PlanError(
            f"the variables (fingerprint {got}) are not those that the groups were found for "
            f"({groups.fingerprint}); first difference: {wrong[0] if wrong else 'missing leaves'}. Call "
            "find_groups with these variables."
        )
    whole = [leaf.path for leaf in groups.leaves if not jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if whole:
        raise PlanError(
            f"compress: {whole[:3]} are not floating-point leaves, which no gradient trains. Close over them "
            "instead of keeping them in the variables."
        )
    bad = [
        leaf.path
        for leaf, array in zip(groups.leaves, jax.tree.leaves(variables), strict=True)
        if not bool(jnp.isfinite(array).all())
    ]
    if bad:
        raise PlanError(
            f"compress: {bad[:3]} hold values that are not finite. Expected a trained model; look for "
            "where its training diverged."
        )


def _check_loss(problem: Problem, variables: Any) -> None:
    value = _first_loss(problem, variables)
    if value.shape != () or not bool(jnp.isfinite(value)):
        raise TraceError(
            f"compress: the loss of the dense model on batches(0) is {value}, expected one finite number. "
            "Look for values in the data that are not finite, or for a loss without a mean."
        )


def _first_loss(problem: Problem, variables: Any) -> jax.Array:
    """The loss of the dense model on the first batch."""
    batch = problem.batches(jnp.int32(0))

    def first(variables: Any) -> jax.Array:
        value, updates = value_and_updates(problem.loss, problem.apply, variables, batch)
        updated(variables, updates)
        return value

    return jnp.asarray(jax.jit(first)(variables))
