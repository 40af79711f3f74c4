"""Grid search over coefficients: the source paper's other search, with the same interface."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.errors import RequestError
from compaware_jax.importance import ranks
from compaware_jax.masks import apply_mask
from compaware_jax.search.coefficients import Problem, Search, on_budget, soft_gates
from compaware_jax.settings import whole_number
from compaware_jax.training.checks import checked_rate
from compaware_jax.training.fit import adam_cosine, fit_step

MOST_POINTS = 100_000


class GridState(NamedTuple):
    """State of the grid search: the weights it starts from, the grid on the budget, losses so far."""

    variables: Any
    log_counts: jax.Array
    losses: jax.Array
    offset: jax.Array


@dataclass(frozen=True)
class GridSearch:
    """Exhaustive search on a grid of relative coefficients, each tried by a short fine-tune.

    The grid is the product of `levels` over all groups that may change but the first of them, shifted onto
    the budget.

    Attributes:
      levels: factors on a group's share relative to the first group's.
      steps_each: fine-tune steps per point, masked, from the dense weights.
      learning_rate: of those (Adam, cosine to zero).
      at_once: points tried together, by vmap.
      validate: batches, beyond those of the fine-tune, whose mean loss scores a point.
    """

    levels: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    steps_each: int = 200
    learning_rate: float = 2e-3
    at_once: int = 4
    validate: int = 4

    def __post_init__(self) -> None:
        levels = np.asarray(self.levels)
        numbers = levels.ndim == 1 and len(levels) and levels.dtype.kind in "iuf"
        if not numbers or not (np.isfinite(levels) & (levels > 0)).all():
            raise RequestError(
                f"GridSearch: levels={self.levels!r}, expected factors above zero, such as (0.5, 1.0, 2.0)."
            )
        for name, least in (("steps_each", 0), ("at_once", 1), ("validate", 1)):
            whole_number(getattr(self, name), f"GridSearch: {name}", least=least)
        checked_rate(self.learning_rate, "GridSearch: learning_rate")

    def build(self, problem: Problem) -> Search:
        """The search as pure functions; one step tries `at_once` points."""
        groups, cost = problem.groups, problem.cost
        levels = np.log(np.asarray(self.levels))
        varied = np.flatnonzero(groups.floors < groups.ceilings)[1:]
        if len(levels) ** len(varied) > MOST_POINTS:
            raise RequestError(
                f"GridSearch: {len(levels)} levels of {len(varied)} groups are "
                f"{len(levels) ** len(varied):,} points, expected at most {MOST_POINTS:,}. Give fewer "
                "levels, keep groups whole with constrain(groups, whole=...), or use GradientSearch."
            )
        points = list(itertools.product(levels, repeat=len(varied)))
        rows = -(-len(points) // self.at_once) * self.at_once
        grid = np.zeros((rows, len(groups.groups)))
        grid[:, varied] = np.resize(np.array(points), (rows, len(varied)))

        def init(variables: Any, budget: Any, key: jax.Array, offset: Any) -> GridState:
            del key
            points = jax.vmap(lambda x: on_budget(cost, x, jnp.asarray(budget, float)))(jnp.asarray(grid))
            return GridState(variables, points, jnp.full(len(grid), jnp.inf), jnp.asarray(offset, jnp.int32))

        def attempt(state: GridState, log_counts: jax.Array) -> jax.Array:
            variables = state.variables
            rank = ranks(groups, problem.score(groups, variables))
            gates = soft_gates(groups, jnp.exp(log_counts), rank, 0.0)

            def masked(tree: Any, *args: Any, **kwargs: Any) -> Any:
                return problem.apply(apply_mask(groups, gates, tree), *args, **kwargs)

            def batches(index: jax.Array) -> Any:
                return problem.batches(index + state.offset)

            rule = adam_cosine(self.learning_rate, self.steps_each)
            start, step = fit_step(
                masked, problem.loss, batches, rule, problem.criteria, steps=self.steps_each
            )
            # What a loss says of the variables, such as a penalty, it says of those that stay.
            hard = apply_mask(groups, gates, variables)
            tuned, _ = jax.lax.scan(step, start(hard), jnp.arange(self.steps_each))
            unseen = self.steps_each + jnp.arange(self.validate)
            values = jax.lax.map(lambda i: problem.value(masked, tuned.variables, batches(i)), unseen)
            return values.mean()

        def step(state: GridState, index: jax.Array) -> tuple[GridState, dict[str, jax.Array]]:
            numbers = index * self.at_once + jnp.arange(self.at_once)
            found = jax.vmap(lambda x: attempt(state, x))(state.log_counts[numbers])
            # A point that diverged is none of the best.
            losses = state.losses.at[numbers].set(jnp.where(jnp.isnan(found), jnp.inf, found))
            return state._replace(losses=losses), {"loss": losses.min()}

        def coefficients(state: GridState) -> jax.Array:
            best = state.log_counts[jnp.argmin(state.losses)]
            # Where every point diverged, none is the best.
            return jnp.where(state.losses.min() < jnp.inf, jnp.exp(best), jnp.nan) / jnp.asarray(groups.sizes)

        return Search(
            init=init,
            step=step,
            steps=len(grid) // self.at_once,
            coefficients=coefficients,
            variables=lambda state: state.variables,
        )
