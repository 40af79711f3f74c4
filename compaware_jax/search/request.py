"""What is asked of `compress`, `find_plan` and `sweep`, refused early where it cannot work."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.coupling.groups import Groups, check_groups, fingerprint, leaves_of
from compaware_jax.errors import (
    CriterionError,
    PlanError,
    RequestError,
    gist,
)
from compaware_jax.importance import l2
from compaware_jax.search.coefficients import Problem, SearchMethod
from compaware_jax.search.gradient import GradientSearch
from compaware_jax.search.rehearsal import rehearse
from compaware_jax.training.checks import (
    check_batches,
    check_functions,
    check_loss,
    check_metrics,
    check_objective,
    check_trainable,
    not_finite,
)
from compaware_jax.training.criteria import check_dense, measure


def check_request(
    problem: Problem, variables: Any, held_out: Any, *, allow_failing: bool, caller: str
) -> dict[str, float]:
    """Refuse what cannot work, before any work is done.

    Args:
      problem: what is asked.
      variables: the dense model's.
      held_out: the batch on which criteria are measured.
      allow_failing: accept criteria that the dense model fails.
      caller: the function that asks, for messages.

    Returns:
      The dense model's value per criterion.

    Raises:
      RequestError, PlanError, TraceError: as `check_problem`.
      CriterionError: criteria without held_out, with equal names, or failed by the dense model; or that are
        not a number of it.
    """
    if problem.criteria and held_out is None:
        raise CriterionError(
            f"{caller}: criteria need held_out, the batch that they are measured on; got None."
        )
    if callable(held_out):
        raise CriterionError(
            f"{caller}: held_out is a function, {_name(held_out)}, expected the batch that criteria are "
            "measured on: call it."
        )
    check_problem(problem, variables, caller, held_out)
    if not problem.criteria:
        return {}
    before = measure(problem.criteria, problem.apply, variables, held_out)
    if wrong := [name for name, value in before.items() if np.isnan(value)]:
        raise CriterionError(
            f"{caller}: the metrics of {wrong} are not a number on held_out, of the dense model. Expected "
            "numbers: look for a mean over nothing, or a root or logarithm of what may be negative."
        )
    if not allow_failing:
        check_dense(problem.criteria, before, caller)
    return before


def check_problem(problem: Problem, variables: Any, caller: str, held_out: Any = None) -> None:
    """Refuse what no search can work on.

    Args:
      problem: what is asked.
      variables: the dense model's.
      caller: the function that asks, for messages.
      held_out: the batch on which criteria are measured; None where nothing is measured.

    Raises:
      PlanError: nothing can leave, or the variables are not those of the groups; or the
        score is not one finite number per unit.
      RequestError: the variables are not trainable, or the batches are no pure function of the step.
      TraceError: the loss is not one finite number, or does not use the function and the variables that it
        is called with, or does not run with small ones.
      CriterionError: a metric does not, likewise.
    """
    if not problem.groups.groups:
        raise PlanError(
            f"{caller}: no group of this model can leave. Print the groups: they say why each axis "
            "stays whole."
        )
    _check_variables(variables, problem.groups, caller)
    check_batches(problem.batches, caller)
    check_objective(problem.apply, variables, problem.loss, problem.batches, problem.criteria, caller)
    check_loss(problem.apply, variables, problem.loss, problem.batches, caller)
    check_metrics(problem.apply, variables, problem.batches, problem.criteria, caller)
    _check_score(problem, variables, caller)
    rehearse(problem, variables, held_out, caller)


def check_asked(apply: Any, loss: Any, batches: Any, groups: Any, score: Any) -> None:
    """Refuse what is not of the right kind.

    Raises:
      RequestError: says what to pass instead.
    """
    check_functions(apply, loss, batches)
    check_groups(groups)
    if not callable(score):
        raise RequestError(f"score={score!r}, expected a function (groups, variables) -> scores, such as l2.")


def checked_key(key: Any) -> jax.Array:
    """The source of randomness, ``jax.random.key(0)`` where none is given.

    Raises:
      RequestError: it is no single random key.
    """
    if key is None:
        return jax.random.key(0)
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = isinstance(key, (jax.Array, np.ndarray)) and key.dtype == np.uint32 and key.ndim == 1
    if not (raw or (typed and key.shape == ())):
        raise RequestError(f"key={key!r}, expected one random key, such as jax.random.key(0).")
    return jnp.asarray(key)


def checked_search(search: Any) -> SearchMethod:
    """The search, `GradientSearch` where none is given.

    Raises:
      RequestError: it is no configured search.
    """
    method = GradientSearch() if search is None else search
    if isinstance(method, type) or not isinstance(method, SearchMethod):
        raise RequestError(
            f"search={method!r}, expected a configured search, such as GradientSearch(steps=1000)."
        )
    return method


def _name(function: Any) -> str:
    return f"`{getattr(function, '__qualname__', type(function).__name__)}`"


def _check_variables(variables: Any, groups: Groups, caller: str) -> None:
    check_trainable(variables, caller)
    got = fingerprint(leaves_of(variables))
    if got != groups.fingerprint:
        expected = {leaf.path: leaf for leaf in groups.leaves}
        wrong = [leaf for leaf in leaves_of(variables) if expected.get(leaf.path) != leaf]
        told = "missing leaves"
        if wrong:
            told = f"got {wrong[0]}, expected {expected.get(wrong[0].path, 'no such leaf')}"
        raise PlanError(
            f"{caller}: the variables (fingerprint {got}) are not those that the groups were found for "
            f"({groups.fingerprint}); first difference: {told}. Call find_groups with these variables."
        )
    if bad := not_finite(variables):
        raise PlanError(
            f"{caller}: {bad[:3]} hold values that are not finite. Expected a trained model; look for "
            "where its training diverged."
        )


def _check_score(problem: Problem, variables: Any, caller: str) -> None:
    def score(variables: Any) -> jax.Array:
        return jnp.asarray(problem.score(problem.groups, variables))

    try:
        scores = jax.eval_shape(score, variables)
    except Exception as error:
        raise PlanError(
            f"{caller}: the score {_name(problem.score)} fails ({gist(error)}). It is called as "
            "score(groups, variables) and traced; expected one number per unit."
        ) from error
    if scores.shape != (problem.groups.units,):
        raise PlanError(
            f"{caller}: the score {_name(problem.score)} has shape {scores.shape}, expected one number per "
            f"unit, ({problem.groups.units},)."
        )
    if problem.score is l2:  # Of finite variables.
        return
    wrong = jax.jit(lambda v: jnp.isnan(score(v)))(variables)
    if bool(wrong.any()):
        unit = int(jnp.argmax(wrong))
        group = problem.groups.groups[int(problem.groups.group_of_unit[unit])]
        raise PlanError(
            f"{caller}: the score {_name(problem.score)} is not a number at unit {unit - group.offset} of "
            f"`{group.name}`, expected numbers that rank the units."
        )
