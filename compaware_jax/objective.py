"""What training lowers: a loss with its updates of the variables, criteria as an augmented Lagrangian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from compaware_jax.criteria import Apply, Criterion
from compaware_jax.errors import TraceError
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


def dual_ascent(multipliers: jax.Array, violations: jax.Array, *, rate: float = 0.01) -> jax.Array:
    """One step of the multipliers: up where a criterion fails, down to zero where it is kept."""
    return jnp.maximum(0.0, multipliers + rate * violations)
