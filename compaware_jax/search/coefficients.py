"""Soft coefficients: how much of each group to keep, optimised together with the weights.

Units of a group are ranked by a score. A group's coefficient says up to which rank its gates are open,
with a soft edge, so one number per group has a gradient. `Search` is the interface of whatever finds
them: by gradient, jointly with the weights (`gradient`), or on a grid (`grid`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from compaware_jax.cost import Cost
from compaware_jax.coupling.groups import Groups
from compaware_jax.importance import l2
from compaware_jax.training.criteria import Apply, Criterion
from compaware_jax.training.objective import Batches, Loss, value_and_updates

Score = Callable[[Groups, Any], jax.Array]
"""``(groups, variables) -> scores over units``."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What a search is for.

    Attributes:
      apply: the dense function.
      loss: ``(apply, variables, batch) -> scalar``, or with updates; see `Loss`.
      batches: ``step -> batch``.
      groups: what can leave.
      cost: what the budget limits.
      criteria: constraints beside the budget.
      score: ranks the units of a group.
    """

    apply: Apply
    loss: Loss
    batches: Batches
    groups: Groups
    cost: Cost
    criteria: tuple[Criterion, ...] = ()
    score: Score = l2

    def value(self, apply: Apply, variables: Any, batch: Any) -> jax.Array:
        """The loss alone, without the updates that it may return."""
        return value_and_updates(self.loss, apply, variables, batch)[0]


class Search(NamedTuple):
    """A search as pure functions, to be run by `run_steps`, jitted, or vmapped over budgets and keys.

    Attributes:
      init: ``(variables, budget, key, offset) -> state``; the budget is the fraction of the cost that may
        stay, the offset the data position to start from.
      step: ``(state, index) -> (state, info)``.
      steps: how many steps it takes.
      coefficients: ``state -> kept share per group``, shape (groups,), on the budget.
      variables: ``state -> weights``, adapted where the search trains them.
    """

    init: Callable[[Any, Any, jax.Array, Any], Any]
    step: Callable[[Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
    steps: int
    coefficients: Callable[[Any], jax.Array]
    variables: Callable[[Any], Any]


@runtime_checkable
class SearchMethod(Protocol):
    """A configured search: `GradientSearch` or `GridSearch`."""

    def build(self, problem: Problem) -> Search:
        """The search for a problem."""
        ...


def soft_gates(
    groups: Groups,
    counts: Float[Array, " groups"],
    rank: Num[ArrayLike, " units"],
    edge: ArrayLike,
) -> Float[Array, " units"]:
    """Gates that are open for the best `counts[g]` units of a group, with a linear edge.

    Args:
      groups: what can leave.
      counts: soft counts per group, shape (groups,).
      rank: rank of each unit in its group, from 0, shape (units,).
      edge: width of the edge as a share of the count; at least one unit wide.

    Returns:
      Shape (units,), in [0, 1]; whole counts and no edge give hard gates.
    """
    units, group = jnp.asarray(groups.sizes, counts.dtype), groups.group_of_unit
    rank = jnp.asarray(rank, counts.dtype)
    # The edge narrows as a group fills, so that a whole group has only open gates.
    width = jnp.maximum(1.0, jnp.minimum(edge * counts, 2 * (units - counts) + 1))
    return jnp.clip((counts[group] - rank - 0.5) / width[group] + 0.5, 0.0, 1.0)


def on_budget(cost: Cost, log_share: Float[Array, " groups"], budget: ArrayLike) -> Float[Array, " groups"]:
    """Shift log shares by a common amount so that the cost meets the budget.

    Args:
      cost: what the budget limits.
      log_share: log of the kept share per group, shape (groups,), any offset.
      budget: fraction of the dense cost.

    Returns:
      Log counts, shape (groups,), between the fewest and the most that may stay.
    """
    # A group that may be emptied goes down to a quarter of a unit, which rounds to none.
    least = np.maximum(cost.least, 0.25)
    top, most, bottom = (
        jnp.log(jnp.asarray(counts, log_share.dtype))
        for counts in (cost.units, np.maximum(cost.most, least), least)
    )
    goal = budget * cost(jnp.exp(top))

    def place(shift: jax.Array) -> jax.Array:
        return jnp.clip(top + log_share + shift, bottom, most)

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        over = cost(jnp.exp(place(middle))) > goal
        return jnp.where(over, low, middle), jnp.where(over, middle, high)

    # At the low end every group is down to the fewest units, at the high end every group is whole.
    fewest = min(float(np.log(least.min(initial=1.0))), 0.0)
    bounds = (fewest - jnp.max(top + log_share), -jnp.min(log_share))
    low, _ = jax.lax.fori_loop(0, 30, halve, bounds)
    return place(low)
