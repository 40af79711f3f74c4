"""What training lowers: a loss with its updates of the variables, criteria by Lagrangian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from compaware_jax.errors import TraceError
from compaware_jax.paths import named_leaves
from compaware_jax.training.criteria import Apply, Criterion

Loss = Callable[[Apply, Any, Any], Any]
"""``(apply, variables, batch) -> scalar``, differentiable in the variables; or ``-> (scalar, updates)``,
where updates are new values of some leaves, nested as the variables are, e.g. ``{"batch_stats": ...}``."""

Batches = Callable[[jax.Array], Any]
"""``step -> batch``: a pure function, so that the step is the whole data position."""


class Pressure(NamedTuple):
    """What criteria weigh while training; a pytree.

    Attributes:
      multipliers: weight of each trainable criterion beside the loss, which weighs one.
      excess: moving mean over batches of how far each metric is on the wrong side, in its unit.
      distance: likewise of how far it is from the threshold, on either side; zero before the first step.
    """

    multipliers: jax.Array
    excess: jax.Array
    distance: jax.Array


def no_pressure(criteria: Sequence[Criterion]) -> Pressure:
    """Where training starts: no criterion weighs anything."""
    none = jnp.zeros(len(trainable(criteria)))
    return Pressure(none, none, none)


def followed(criteria: Sequence[Criterion], pressure: Pressure) -> dict[str, jax.Array]:
    """What a history keeps of criteria: "criteria", the moving mean of each metric that is trained by.

    Args:
      criteria: constraints; those that are not trainable are left out.
      pressure: after a step.

    Returns:
      One entry, of shape (trainable criteria,), in the metrics' units; none without such criteria.
    """
    trained = trainable(criteria)
    if not trained:
        return {}
    thresholds = jnp.array([c.threshold for c in trained])
    wrong = jnp.array([-1.0 if c.above else 1.0 for c in trained])
    return {"criteria": thresholds + wrong * pressure.excess}


def constrained(
    loss: Loss, criteria: Sequence[Criterion], steps: int
) -> Callable[[Apply, Any, Any, Pressure], tuple[jax.Array, tuple[Pressure, Any]]]:
    """The Lagrangian of a loss under criteria, and one step of its multipliers.

    The value is the loss. Its gradient is the weighted mean of that of the loss (weight one) and of the
    criteria's terms, so it does not grow with their weights: Adam remembers large gradients for long. The
    term of a criterion is ``excess / unit`` in units of the current loss (a loss of zero counts as one). Its
    unit is the threshold, or the mean distance from it where that is more: so a metric has no scale, a
    threshold may be zero, and the pull is bounded where a metric misses by orders of magnitude, as it does on
    the way to a small model.

    With ``s = mean excess / mean distance``, between -1 (surely kept) and 1 (surely failing), a multiplier
    ``m`` follows ``s``: it is no quicker where a criterion fails by far, and falls to zero where it is kept.
    The weight is ``m * (1 + s)``, which is nothing as soon as a criterion is surely kept, or the pull would
    go on while the multiplier falls. The pace is that of the training: a multiplier of what fails all along
    ends at the same value, however many the steps.

    Args:
      loss: see `Loss`.
      criteria: constraints; those that are not trainable are left out.
      steps: how many steps there will be.

    Returns:
      ``(apply, variables, batch, pressure) -> (value, (pressure, updates))``: the pressure is that of the
      next step, the updates are those of the loss.
    """
    trained = trainable(criteria)
    thresholds = np.array([abs(c.threshold) for c in trained])
    rate = _WEIGHT / max(steps, 1)

    def value(
        apply: Apply, variables: Any, batch: Any, pressure: Pressure
    ) -> tuple[jax.Array, tuple[Pressure, Any]]:
        apply = _once(apply)
        base, updates = value_and_updates(loss, apply, variables, batch)
        if not trained:
            return base, (pressure, updates)
        excess = jnp.stack([c.excess(c.metric(apply, variables, batch)) for c in trained])
        after, sure = _pressed(pressure, jax.lax.stop_gradient(excess), rate)
        weights = pressure.multipliers * (1 + sure)
        unit = jnp.maximum(thresholds, after.distance)
        terms = weights * excess / jnp.where(unit == 0, 1.0, unit)
        scale = jax.lax.stop_gradient(jnp.where(base == 0, 1.0, jnp.abs(base)))
        mean = (base + scale * terms.sum()) / (1 + weights.sum())
        return jax.lax.stop_gradient(base) + (mean - jax.lax.stop_gradient(mean)), (after, updates)

    return value


# What a criterion weighs in the end that fails at every step, and the share of a batch in moving means.
_WEIGHT = 10.0
_FRESH = 0.05


def _pressed(pressure: Pressure, excess: jax.Array, rate: float) -> tuple[Pressure, jax.Array]:
    """The pressure after a batch, and how sure it is that each criterion fails: 1, or that it is kept: -1."""
    fresh = jnp.where(pressure.distance == 0, 1.0, _FRESH)
    over = (1 - fresh) * pressure.excess + fresh * excess
    distance = (1 - fresh) * pressure.distance + fresh * jnp.abs(excess)
    sure = over / jnp.where(distance == 0, 1.0, distance)
    return Pressure(jnp.maximum(0.0, pressure.multipliers + rate * sure), over, distance), sure


def value_and_updates(loss: Loss, apply: Apply, variables: Any, batch: Any) -> tuple[Any, Any]:
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


def updated_paths(loss: Loss, apply: Apply, variables: Any, batches: Batches) -> set[str]:
    """The leaves that a loss gives new values, by their paths; nothing is computed."""

    def first(variables: Any) -> Any:
        return value_and_updates(loss, apply, variables, batches(jnp.int32(0)))[1]

    return {path for path, _ in named_leaves(jax.eval_shape(first, variables))}


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
        result[i] = new if seen is None else _moved(leaves[i], old[i], new)
    return jax.tree.unflatten(structure, result)


def _moved(leaf: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """A leaf, changed as the new value is from the old one; the new one where the old one was the leaf's."""
    # Flags and random keys have no differences.
    number = jnp.issubdtype(leaf.dtype, np.number)
    changed = leaf + (new - old) if number else jnp.where(new == old, leaf, new)
    return jnp.where(old == leaf, new, changed)


def _once(apply: Apply) -> Apply:
    """The function, remembering what it was called with.

    Loss and criteria call it with the same arrays. XLA would merge the forward passes, but each call
    would have a backward pass of its own.
    """
    seen: dict[Any, tuple[Any, Any, Any, Any]] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        key = (structure, *map(id, leaves))
        trace = get_opaque_trace_state()
        # A result made inside another transformation (a checkpoint, a scan) may not leave it.
        if key not in seen or seen[key][0] != trace:
            # The arrays are kept with the result, so that no other array can take their identity.
            seen[key] = (trace, leaves, *jax.tree.flatten(apply(*args, **kwargs)))
        # Containers of its own for every caller, who may change them.
        _, _, outputs, output_structure = seen[key]
        return jax.tree.unflatten(output_structure, outputs)

    return call


def trainable(criteria: Sequence[Criterion]) -> tuple[Criterion, ...]:
    """The criteria that are constraints while training."""
    return tuple(c for c in criteria if c.trainable)
