"""Training any function of variables: Adam on a cosine, criteria as constraints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import get_opaque_trace_state

from compaware_jax.criteria import Apply, Criterion
from compaware_jax.errors import DivergenceError, TraceError
from compaware_jax.loop import digest, run_steps, whole_number
from compaware_jax.paths import named_leaves

Loss = Callable[[Apply, Any, Any], Any]
"""``(apply, variables, batch) -> scalar``, differentiable in the variables; or ``-> (scalar, updates)``,
where updates are new values of some leaves, nested as the variables are, e.g. ``{"batch_stats": ...}``."""

Batches = Callable[[jax.Array], Any]
"""``step -> batch``: a pure function, so that the step is the whole data position."""


def constrained(
    loss: Loss, criteria: Sequence[Criterion], *, strength: float = 1.0
) -> Callable[[Apply, Any, Any, jax.Array], tuple[jax.Array, tuple[jax.Array, Any]]]:
    """The augmented Lagrangian of a loss under criteria.

    With ``c = -margin`` (positive where a criterion fails), the term of each criterion is
    ``(max(0, m + strength * c)^2 - m^2) / (2 * strength)``, in units of the current loss, so that the
    strength needs no tuning to the loss' scale; a loss of zero counts as one.

    Args:
      loss: see `Loss`.
      criteria: constraints; those that are not trainable are left out.
      strength: of the quadratic term.

    Returns:
      ``(apply, variables, batch, multipliers) -> (value, (violations, updates))``, the first two
      differentiable; violations have shape (trainable criteria,) and are negative where a criterion is
      kept; updates are those of the loss.
    """
    trained = trainable(criteria)

    def value(
        apply: Apply, variables: Any, batch: Any, multipliers: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        apply = _once(apply)
        base, updates = value_and_updates(loss, apply, variables, batch)
        if not trained:
            return base, (jnp.zeros(0), updates)
        violations = -jnp.stack([c.margin(c.metric(apply, variables, batch)) for c in trained])
        raised = jnp.maximum(0.0, multipliers + strength * violations)
        terms = (raised**2 - multipliers**2) / (2 * strength)
        scale = jax.lax.stop_gradient(jnp.where(base == 0, 1.0, jnp.abs(base)))
        return base + scale * terms.sum(), (violations, updates)

    return value


def value_and_updates(loss: Loss, apply: Apply, variables: Any, batch: Any) -> tuple[jax.Array, Any]:
    """A loss' value, and its updates of the variables; none where it returns the value alone."""
    found = loss(apply, variables, batch)
    if not isinstance(found, tuple):
        return found, {}
    if len(found) != 2:
        raise TraceError(
            f"the loss returned {len(found)} values, expected a scalar, or a scalar and updates of the "
            "variables. Leave out what is for other eyes."
        )
    return found


def updated(variables: Any, updates: Any, seen: Any = None) -> Any:
    """The variables with the updates that a loss returned.

    Args:
      variables: a pytree of arrays.
      updates: new values of some of its leaves, at the same tree paths.
      seen: what the loss saw in place of the variables, where that was masked. Then the change goes over, not
        the value: gates would gather in what the loss updates step by step.

    Raises:
      TraceError: an update is at no path of the variables, or of another shape or dtype.
    """
    news = named_leaves(updates)
    if not news:
        return variables
    paths = {path: i for i, (path, _) in enumerate(named_leaves(variables))}
    leaves, structure = jax.tree.flatten(variables)
    old = leaves if seen is None else jax.tree.leaves(seen)
    result = list(leaves)
    for path, new in news:
        i = paths.get(path)
        if i is None:
            raise TraceError(
                f"the loss returned an update of `{path}`, expected paths of the variables, which are "
                f"{sorted(paths)[:12]}. Return (loss, updates), the updates nested as the variables are."
            )
        if (jnp.shape(new), jnp.result_type(new)) != (old[i].shape, old[i].dtype):
            raise TraceError(
                f"the loss returned an update of `{path}` of shape {jnp.shape(new)} and "
                f"{jnp.result_type(new)}, expected {old[i].shape} and {old[i].dtype}, as the variable is."
            )
        result[i] = new if seen is None else leaves[i] + (new - old[i])
    return jax.tree.unflatten(structure, result)


def _once(apply: Apply) -> Apply:
    """The function, remembering what it was called with.

    Loss and criteria call it with the same arrays. XLA would merge the forward passes, but each call
    would have a backward pass of its own.
    """
    seen: dict[Any, tuple[Any, Any, Any]] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        key = (structure, *map(id, leaves))
        trace = get_opaque_trace_state()
        # A result made inside another transformation (a checkpoint, a scan) may not leave it.
        if key not in seen or seen[key][0] != trace:
            # The arrays are kept with the result, so that no other array can take their identity.
            seen[key] = (trace, leaves, apply(*args, **kwargs))
        return seen[key][2]

    return call


def trainable(criteria: Sequence[Criterion]) -> tuple[Criterion, ...]:
    """The criteria that are constraints while training."""
    return tuple(c for c in criteria if c.trainable)


def dual_ascent(multipliers: jax.Array, violations: jax.Array, *, rate: float = 0.01) -> jax.Array:
    """One step of the multipliers: up where a criterion fails, down to zero where it is kept."""
    return jnp.maximum(0.0, multipliers + rate * violations)


class FitState(NamedTuple):
    """State of `fit`: variables, optimizer state, one multiplier per trainable criterion."""

    variables: Any
    optimizer: Any
    multipliers: jax.Array


def adam_cosine(learning_rate: float | jax.Array, steps: int) -> optax.GradientTransformation:
    """Adam with a cosine from the learning rate to zero."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))


def fit_step(
    apply: Apply,
    loss: Loss,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    criteria: Sequence[Criterion] = (),
) -> tuple[
    Callable[[Any], FitState],
    Callable[[FitState, jax.Array], tuple[FitState, dict[str, jax.Array]]],
]:
    """The pure ``(init, step)`` pair that `fit` runs; vmap it to train several models at once."""
    objective = constrained(loss, criteria)

    def init(variables: Any) -> FitState:
        return FitState(variables, optimizer.init(variables), jnp.zeros(len(trainable(criteria))))

    def step(state: FitState, index: jax.Array) -> tuple[FitState, dict[str, jax.Array]]:
        def value(variables: Any) -> Any:
            return objective(apply, variables, batches(index), state.multipliers)

        (total, (violations, news)), gradients = jax.value_and_grad(value, has_aux=True)(state.variables)
        changes, optimizer_state = optimizer.update(gradients, state.optimizer, state.variables)
        variables = updated(optax.apply_updates(state.variables, changes), news)
        multipliers = dual_ascent(state.multipliers, violations)
        return FitState(variables, optimizer_state, multipliers), {"loss": total}

    return init, step


def fit(
    apply: Apply,
    variables: Any,
    loss: Loss,
    batches: Batches,
    steps: int,
    *,
    learning_rate: float = 1e-3,
    criteria: Sequence[Criterion] = (),
    label: str = "fit",
    directory: str | os.PathLike[str] | None = None,
    job: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Train variables with Adam on a cosine, resumably.

    Args:
      apply: the function whose variables are trained.
      variables: a pytree of float arrays, the start.
      loss: ``(apply, variables, batch) -> scalar``, or ``(scalar, updates)``; see `Loss`.
      batches: ``step -> batch``, pure.
      steps: number of updates.
      learning_rate: at the start; it falls to zero on a cosine.
      criteria: constraints, by augmented Lagrangian.
      label: what the progress bar says.
      directory: for checkpoints; None for none.
      job: what identifies the run beside its start and settings, see `run_steps`; by default the first
        batches and the loss on one of them.
      progress: show a progress bar.

    Returns:
      The trained variables, and the history per chunk of steps.

    Raises:
      DivergenceError: the training ended in values that are not finite.
      CheckpointError, RequestError: see `run_steps`.
    """
    steps = whole_number(steps, f"{label}: steps")
    init, step = fit_step(apply, loss, batches, adam_cosine(learning_rate, steps), criteria)
    if directory is not None:
        job = {
            "start": digest(variables),
            "learning_rate": learning_rate,
            "criteria": [str(c) for c in trainable(criteria)],
            **(_task(apply, variables, loss, batches) if job is None else job),
        }
    state, history = run_steps(
        step,
        init(variables),
        steps,
        label=label,
        directory=directory,
        job=job,
        progress=progress,
    )
    check_finite(state.variables, label)
    return state.variables, history


def _task(apply: Apply, variables: Any, loss: Loss, batches: Batches) -> dict[str, Any]:
    """What tells a training from others of the same variables, as JSON values."""
    first, second = (batches(jnp.int32(step)) for step in (0, 1))
    value, _ = jax.jit(lambda v, batch: value_and_updates(loss, apply, v, batch))(variables, first)
    # Machines differ in the last digits.
    return {"data": digest([first, second]), "loss": f"{float(value):.3g}"}


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def is_finite(tree: Any) -> bool:
    """Whether all values in a tree of arrays are finite."""
    return all(map(bool, jax.device_get(_finite(jax.tree.leaves(tree)))))


def check_finite(variables: Any, label: str) -> None:
    """Refuse the outcome of a training that diverged.

    Raises:
      DivergenceError: a leaf holds values that are not finite.
    """
    leaves = named_leaves(variables)
    finite = jax.device_get(_finite([leaf for _, leaf in leaves]))
    bad = [path for (path, _), fine in zip(leaves, finite, strict=True) if not fine]
    if bad:
        raise DivergenceError(
            f"{label}: the training ended in values that are not finite, in {bad[:3]}. Lower its learning "
            "rate, or look for a division by what may become zero in a smaller model."
        )
