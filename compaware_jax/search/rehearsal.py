"""A search played through on shapes: what would fail after hours, when the model is small, fails at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.coupling.groups import COLLECTIONS
from compaware_jax.coupling.program import Program, is_smooth
from compaware_jax.coupling.trace import trace
from compaware_jax.errors import CompawareError, CriterionError, TraceError, gist
from compaware_jax.placement import struct_of
from compaware_jax.search.coefficients import Problem
from compaware_jax.search.select import keep_units
from compaware_jax.surgery.plan import Plan, plan_units
from compaware_jax.surgery.small_function import slim
from compaware_jax.training.checks import ASKED, check_metric
from compaware_jax.training.objective import value_and_updates

_LOG = logging.getLogger(__name__)


def rehearse(problem: Problem, variables: Any, held_out: Any, caller: str) -> None:
    """Trace the loss and the criteria of the dense and of a small model, computing nothing.

    Leaves of a collection such as ``batch_stats`` that the loss reads and does not update are warned of: they
    would be trained like weights.

    Args:
      problem: what is asked.
      variables: the dense model's.
      held_out: the batch that criteria are measured on; None where nothing is measured.
      caller: the function that asks, for messages.

    Raises:
      TraceError: the loss does not use the function or the variables that it is called with, or fails on
        small ones.
      CriterionError: a metric, likewise.
    """
    plan = _half(problem)
    batch = jax.eval_shape(problem.batches, jnp.int32(0))
    apply, small_apply = problem.apply, slim(problem.apply, plan)
    leaves = jax.tree.leaves(variables)
    small = jax.tree.unflatten(
        jax.tree.structure(variables),
        [struct_of(leaf, jax.dtypes.result_type(leaf), plan.small_shape(i)) for i, leaf in enumerate(leaves)],
    )

    def loss(apply: Any, variables: Any, batch: Any) -> Any:
        return value_and_updates(problem.loss, apply, variables, batch)

    asks = _Asked(apply)
    program = _traced(loss, asks, variables, batch)
    if not program.leaves_read(0):
        raise TraceError(f"{caller}: the loss does not depend on the variables. {ASKED}")
    if not asks.asked:
        raise TraceError(f"{caller}: the loss does not call the function that it is given. {ASKED}")
    _warn_of_trained_state(program)
    _played(loss, small_apply, small, batch, TraceError, f"{caller}: the loss")
    if held_out is None:
        return
    for criterion in problem.criteria:
        name = f"{caller}: the metric of `{criterion.name}`"
        check_metric(criterion, apply, variables, held_out, caller, "held_out")
        asks = _Asked(apply)
        if not _traced(criterion.metric, asks, variables, held_out).leaves_read(stopped=True):
            empty = any(0 in jnp.shape(leaf) for leaf in jax.tree.leaves(held_out))
            told = "held_out has an array without elements: expected samples." if empty else ASKED
            raise CriterionError(f"{name} does not depend on the variables. {told}")
        if not asks.asked:
            _LOG.warning("%s does not call the function that it is given: is it of the weights alone?", name)
        _played(criterion.metric, small_apply, small, held_out, CriterionError, name)


class _Asked:
    """A function that knows whether it was called."""

    def __init__(self, apply: Callable[..., Any]):
        self.apply, self.asked = apply, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = True
        return self.apply(*args, **kwargs)


def _half(problem: Problem) -> Plan:
    """A plan that keeps about half of every group."""
    groups = problem.groups
    half = np.clip(groups.sizes // 2 // groups.steps * groups.steps, groups.floors, groups.ceilings)
    return plan_units(groups, keep_units(groups, np.zeros(groups.units), half))


def _traced(function: Callable[..., Any], apply: Any, variables: Any, batch: Any) -> Program:
    return trace(lambda variables, batch: function(apply, variables, batch), variables, batch)


def _warn_of_trained_state(program: Program) -> None:
    """Look at a traced loss, whose outputs are its value and its updates."""
    read, updated = program.leaves_read(0), {path.partition("/")[2] for path in program.output_paths[1:]}
    state = COLLECTIONS - {"params"}
    smooth = {
        path
        for path, value in zip(program.leaves, program.leaf_values, strict=True)
        if is_smooth(program.avals[value])
    }
    trained = [p for p in read if p in smooth and p.split("/")[0] in state and p not in updated]
    if trained:
        _LOG.warning(
            "`%s`%s would be trained like a weight, because the loss reads it and returns no update of it. "
            "Return (loss, updates) of a loss in training mode; or close over what is to stay as it is.",
            trained[0],
            f" and {len(trained) - 1} more leaves" if len(trained) > 1 else "",
        )


def _played(
    function: Callable[..., Any],
    apply: Any,
    variables: Any,
    batch: Any,
    kind: type[CompawareError],
    name: str,
) -> None:
    try:
        jax.eval_shape(lambda variables, batch: function(apply, variables, batch), variables, batch)
    except Exception as error:
        raise kind(f"{name} fails on a model with half of its units ({gist(error)}). {ASKED}") from error
