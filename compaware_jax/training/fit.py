"""Training any function of variables: Adam on a cosine unless told otherwise, criteria as constraints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from compaware_jax.errors import DivergenceError, RequestError
from compaware_jax.settings import whole_number
from compaware_jax.training.checks import (
    check_batches,
    check_functions,
    check_loss,
    check_metrics,
    check_objective,
    check_trainable,
    checked_rate,
    marks,
    not_finite,
    optimizer_mark,
)
from compaware_jax.training.criteria import Apply, Criterion, checked_criteria
from compaware_jax.training.loop import digest, run_steps
from compaware_jax.training.objective import (
    Batches,
    Loss,
    Pressure,
    constrained,
    followed,
    no_pressure,
    trainable,
    updated,
)
from compaware_jax.training.trained import descended, trained_part, value_and_gradients


class FitState(NamedTuple):
    """State of `fit`: variables, optimizer state, what the trainable criteria weigh."""

    variables: Any
    optimizer: Any
    pressure: Pressure


def adam_cosine(learning_rate: float | jax.Array, steps: int) -> optax.GradientTransformation:
    """Adam with a cosine from the learning rate to zero."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))


def fit_step(
    apply: Apply,
    loss: Loss,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    criteria: Sequence[Criterion] = (),
    *,
    steps: int = 1000,
) -> tuple[
    Callable[[Any], FitState],
    Callable[[FitState, jax.Array], tuple[FitState, dict[str, jax.Array]]],
]:
    """The pure ``(init, step)`` pair that `fit` runs; vmap it to train several models at once.

    Criteria weigh in at the pace of that many steps, see `constrained`.
    """
    objective = constrained(loss, criteria, steps)

    def init(variables: Any) -> FitState:
        return FitState(variables, optimizer.init(trained_part(variables)), no_pressure(criteria))

    def step(state: FitState, index: jax.Array) -> tuple[FitState, dict[str, jax.Array]]:
        def value(variables: Any) -> Any:
            return objective(apply, variables, batches(index), state.pressure)

        (total, (pressure, news)), gradients = value_and_gradients(value, state.variables)
        variables, optimizer_state = descended(optimizer, state.optimizer, state.variables, gradients, total)
        new = FitState(updated(variables, news), optimizer_state, pressure)
        return new, {"loss": total, **followed(criteria, pressure)}

    return init, step


def fit(
    apply: Apply,
    variables: Any,
    loss: Loss,
    batches: Batches,
    steps: int,
    *,
    learning_rate: float = 1e-3,
    optimizer: optax.GradientTransformation | None = None,
    criteria: Sequence[Criterion] = (),
    label: str = "fit",
    directory: str | os.PathLike[str] | None = None,
    job: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Train variables, resumably: with Adam on a cosine, or with any optimizer.

    Args:
      apply: the function whose variables are trained.
      variables: a pytree of arrays, the start. What is not floating-point (a frozen int8 kernel, a counter,
        a random key) changes only by the loss's updates.
      loss: ``(apply, variables, batch) -> scalar``, or ``(scalar, updates)``; see `Loss`.
      batches: ``step -> batch``, pure.
      steps: number of updates.
      learning_rate: of Adam at the start; it falls to zero on a cosine.
      optimizer: in place of that Adam, schedule included, e.g. ``optax.contrib.muon(schedule)``; its update
        gets the loss as ``value=``. What it trains is returned, not an average that its state may hold.
      criteria: constraints, by Lagrangian: they weigh the more, the longer they fail.
      label: what the progress bar says.
      directory: for checkpoints; None for none.
      job: what identifies the run beside its start and settings, see `run_steps`; by default the first
        batches and the loss on one of them.
      progress: show a progress bar.

    Returns:
      The trained variables, and the history: means over chunks of steps of the "loss" and, if there are
      any, of the metrics of "criteria", shape (chunks, trainable criteria).

    Raises:
      RequestError: an argument is malformed, or the batches are no pure function of the step.
      TraceError, CriterionError: the loss, or a metric, is not one number.
      DivergenceError: the training ended in values that are not finite.
      CheckpointError: see `run_steps`.
    """
    check_functions(apply, loss, batches)
    criteria = checked_criteria(criteria)
    learning_rate = checked_rate(learning_rate, f"{label}: learning_rate")
    check_trainable(variables, label)
    check_batches(batches, label)
    check_objective(apply, variables, loss, batches, criteria, label)
    check_metrics(apply, variables, batches, criteria, label)
    if not isinstance(job, (Mapping, type(None))):
        raise RequestError(f"{label}: job={job!r}, expected a dictionary of JSON values, by name.")
    if directory is not None and job is None:
        check_loss(apply, variables, loss, batches, label)
        job = marks(apply, variables, loss, batches, criteria)
    return tuned(
        apply,
        variables,
        loss,
        batches,
        steps,
        learning_rate=learning_rate,
        optimizer=optimizer,
        criteria=criteria,
        label=label,
        directory=directory,
        job=job,
        progress=progress,
    )


def tuned(
    apply: Apply,
    variables: Any,
    loss: Loss,
    batches: Batches,
    steps: int,
    *,
    learning_rate: float,
    optimizer: Any,
    criteria: Sequence[Criterion],
    label: str,
    directory: str | os.PathLike[str] | None,
    job: Mapping[str, Any] | None,
    progress: bool,
) -> tuple[Any, dict[str, np.ndarray]]:
    """`fit` of what is checked."""
    steps = whole_number(steps, f"{label}: steps")
    mark = optimizer_mark(optimizer, variables, label)
    rule = adam_cosine(learning_rate, steps) if optimizer is None else optimizer
    init, step = fit_step(apply, loss, batches, rule, criteria, steps=steps)
    if directory is not None:
        job = {
            "start": digest(variables),
            **({"learning_rate": learning_rate} if mark is None else {"optimizer": mark}),
            "criteria": [str(c) for c in trainable(criteria)],
            **(job or {}),
        }
    state, history = run_steps(
        step,
        init(variables),
        steps,
        label=label,
        directory=directory,
        job=job,
        check=stops(lambda state: state.variables, label),
        progress=progress,
    )
    check_finite(state.variables, label)
    return state.variables, history


def stops(of_state: Callable[[Any], Any], label: str) -> Callable[[Any, Mapping[str, Any]], None]:
    """A check for `run_steps` that stops a training as soon as it has diverged.

    Args:
      of_state: the values that have to be finite.
      label: what messages call the training.
    """

    def check(state: Any, means: Mapping[str, Any]) -> None:
        # A loss may be infinite for a while; what is not finite in the weights stays so.
        if not all(np.isfinite(mean).all() for mean in means.values()):
            check_finite(of_state(state), label)

    return check


def check_finite(variables: Any, label: str) -> None:
    """Refuse the outcome of a training that diverged.

    Raises:
      DivergenceError: a leaf holds values that are not finite.
    """
    if bad := not_finite(variables):
        raise DivergenceError(
            f"{label}: the training ended in values that are not finite, in {bad[:3]}. Lower its learning "
            "rate; or look for values in the data that are not finite, or for a division by what may become "
            "zero in a smaller model."
        )
