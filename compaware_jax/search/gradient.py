"""Gradient search over coefficients: jointly with the weights, on the budget at every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compaware_jax.cost import Cost
from compaware_jax.importance import ranks
from compaware_jax.masks import apply_mask
from compaware_jax.search.coefficients import Problem, Search, on_budget, soft_gates
from compaware_jax.settings import checked_number, whole_number
from compaware_jax.training.checks import checked_rate
from compaware_jax.training.objective import Pressure, constrained, followed, no_pressure, updated
from compaware_jax.training.trained import descended, trained_part, value_and_gradients


class GradientState(NamedTuple):
    """State of the gradient search; a pytree, so it vmaps and checkpoints.

    Attributes:
      variables: the weights, trained along.
      log_share: log of the kept share per group, on the (ramped) budget.
      optimizer: of the weights.
      share_optimizer: of the log shares.
      pressure: what the trainable criteria weigh.
      price: moving mean of the budget's multiplier, relative to the loss: by how many percent the loss
        falls when the budget grows by one percent.
      budget: fraction of the dense cost that may stay.
      key: source of the sampled allocations.
      offset: data position of the first step.
    """

    variables: Any
    log_share: jax.Array
    optimizer: Any
    share_optimizer: Any
    pressure: Pressure
    price: jax.Array
    budget: jax.Array
    key: jax.Array
    offset: jax.Array


@dataclass(frozen=True)
class GradientSearch:
    """Joint gradient descent on coefficients and weights.

    Every step samples an allocation around the coefficients (log-normal), shifts it onto the budget
    surface, opens the gates of each group's best units with a soft edge, and takes one gradient for
    both. The coefficients' gradient is made tangent to the budget surface, by the multiplier that
    solves the Lagrangian's stationarity in the least-squares sense, in closed form (bounded while nearly
    every group is whole), and after each step the shares are shifted onto the surface; so the budget holds at
    every step and its multiplier needs no tuning. Criteria weigh in from the first step, see `constrained`:
    what only a criterion needs would be given up while it is silent.

    Sampling is what keeps this from starving a layer: units beyond the present edge are trained in a
    part of the steps, so the gradient sees what they would be worth, not what untrained ones are worth.

    A group that holds integers alone, such as the rows of a frozen int8 kernel that read an input, has no
    gradient: it stays whole as long as others reach the budget.

    Attributes:
      steps: number of steps.
      noise: standard deviation of the sampled log counts.
      edge: width of the soft edge as a share of the kept count.
      learning_rate: of the weights (Adam, cosine to a tenth); with zero they stay as they are.
      travel: the coefficients' Adam learning rate times the steps: about how far, in log share, a
        coefficient can go.
      ramp: share of the steps in which the budget falls, log-linearly, from one to its target.
      harden: share of the steps, the last ones, in which noise and edge fall to nothing.
    """

    steps: int = 1000
    noise: float = 0.1
    edge: float = 0.3
    learning_rate: float = 2e-3
    travel: float = 20.0
    ramp: float = 0.3
    harden: float = 0.25

    def __post_init__(self) -> None:
        whole_number(self.steps, "GradientSearch: steps", least=1)
        for name in ("ramp", "harden"):
            checked_number(getattr(self, name), f"GradientSearch: {name}", most=1.0)
        for name in ("noise", "edge", "travel"):
            checked_number(getattr(self, name), f"GradientSearch: {name}")
        checked_rate(self.learning_rate, "GradientSearch: learning_rate", zero=True)

    def build(self, problem: Problem) -> Search:
        """The search as pure functions."""
        # No gradient would tell what a group of integers alone is worth, so it does not pay for others.
        groups, stays = problem.groups, ~problem.groups.trained
        cost = replace(problem.cost, least=np.where(stays, problem.cost.most, problem.cost.least))
        objective = constrained(problem.loss, problem.criteria, self.steps)
        weights_rule = optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps, alpha=0.1))
        share_rule = optax.adam(
            optax.cosine_decay_schedule(self.travel / self.steps, self.steps), b1=0.9, b2=0.99
        )
        top, most = np.log(groups.sizes), np.log(groups.ceilings)

        def init(variables: Any, budget: Any, key: jax.Array, offset: Any) -> GradientState:
            share = jnp.zeros(len(groups.groups))
            return GradientState(
                variables=variables,
                log_share=share,
                optimizer=weights_rule.init(trained_part(variables)),
                share_optimizer=share_rule.init(share),
                pressure=no_pressure(problem.criteria),
                price=jnp.zeros(()),
                budget=jnp.asarray(budget, float),
                key=key,
                offset=jnp.asarray(offset, jnp.int32),
            )

        def step(state: GradientState, index: jax.Array) -> tuple[GradientState, dict[str, jax.Array]]:
            progress = index / self.steps
            soft = jnp.clip((1 - progress) / max(self.harden, _TINY), 0.0, 1.0)
            budget = state.budget ** (jnp.clip(progress / self.ramp, 0.0, 1.0) if self.ramp else 1.0)
            rank = ranks(groups, problem.score(groups, state.variables))
            noise = jax.random.normal(jax.random.fold_in(state.key, index), state.log_share.shape)
            sampled = on_budget(cost, state.log_share + soft * self.noise * noise, budget)

            def value(both: tuple[jax.Array, Any]) -> Any:
                log_counts, variables = both
                gates = soft_gates(groups, jnp.exp(log_counts), rank, soft * self.edge)
                masked = apply_mask(groups, gates, variables)
                batch = problem.batches(index + state.offset)
                total, (pressure, news) = objective(problem.apply, masked, batch, state.pressure)
                return total, (pressure, news, masked)

            (total, (pressure, news, seen)), (by_count, by_weight) = value_and_gradients(
                value, (sampled, state.variables)
            )
            tangent, price = _tangent(cost, sampled, by_count, sampled < most - 1e-4)

            change: Any
            change, share_optimizer = share_rule.update(tangent, state.share_optimizer, state.log_share)
            log_share = on_budget(cost, state.log_share + change, budget) - top
            variables, optimizer = descended(weights_rule, state.optimizer, state.variables, by_weight, total)
            new = GradientState(
                variables=updated(variables, news, seen),
                log_share=log_share,
                optimizer=optimizer,
                share_optimizer=share_optimizer,
                pressure=pressure,
                price=0.98 * state.price + 0.02 * price / jnp.maximum(jnp.abs(total), _TINY),
                budget=state.budget,
                key=state.key,
                offset=state.offset,
            )
            info = {"loss": total, "share": jnp.exp(log_share), "price": new.price}
            return new, info | followed(problem.criteria, pressure)

        return Search(
            init=init,
            step=step,
            steps=self.steps,
            coefficients=lambda state: jnp.exp(state.log_share),
            variables=lambda state: state.variables,
        )


_TINY = 1e-30

# The least share of all that can pay which sets the price: at the start nearly everything is whole, and the
# few that are not would set one that is noise many times larger than any slope.
_PAYING = 0.5


def _tangent(
    cost: Cost, log_counts: jax.Array, gradient: jax.Array, free: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradient along the budget surface, and the multiplier that makes it so.

    Only groups that are not whole can pay for others, so only they set the multiplier. While they are few, it
    is bounded, and the gradient is not quite tangent; `on_budget` puts the shares back.
    """
    by_cost = jax.grad(lambda x: jnp.log(cost(jnp.exp(x))))(log_counts)
    can_pay = jnp.sum(by_cost, where=cost.least < cost.most)
    paying = jnp.maximum(jnp.sum(by_cost, where=free), _PAYING * can_pay)
    price = -jnp.sum(gradient, where=free) / jnp.maximum(paying, 1e-6)
    return gradient + price * by_cost, price
