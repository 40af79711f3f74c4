"""Selection: from coefficients and scores to exact counts that meet the budget, and to units."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Num

from compaware_jax.cost import COSTS, Budget, Cost, check_budget
from compaware_jax.coupling.groups import Groups, check_groups
from compaware_jax.errors import BudgetError, PlanError
from compaware_jax.importance import ranks
from compaware_jax.surgery.plan import Plan, plan_units


def keep_units(
    groups: Groups,
    scores: Num[ArrayLike, " units"],
    counts: Int[np.ndarray, " groups"],
) -> Bool[np.ndarray, " units"]:
    """The units to keep: the best `counts[g]` of every group.

    Where that would leave nothing of a guarded set, its best unit takes the place of the worst kept
    unit of its group.

    Args:
      groups: what can leave.
      scores: shape (units,).
      counts: units to keep per group, shape (groups,), none below `groups.floors`.

    Returns:
      Boolean array, shape (units,).
    """
    scores = np.asarray(scores, float).copy()
    for units in groups.needed:
        # The group that answers for a guarded set (see Groups.floors) ranks the set's best unit first.
        group = groups.group_of_unit
        own = units[group[units] == group[units[0]]]
        scores[own[np.argmax(scores[own])]] = np.inf
    return np.asarray(ranks(groups, scores)) < np.asarray(counts)[groups.group_of_unit]


def round_counts(
    cost: Cost,
    coefficients: Float[np.ndarray, " groups"],
    limit: int,
    *,
    floor: Int[np.ndarray, " groups"] | None = None,
) -> Int[np.ndarray, " groups"]:
    """Whole counts in the coefficients' proportions, as close below a limit as units allow.

    All coefficients are scaled by a common factor to the limit. Groups of which one step is a large part of
    it are settled first, as near to their share as can be; the others are scaled to what is left, to the
    largest counts that fit. Single steps, then exchanges of one step for another, fill what that left.

    Args:
      cost: what is limited.
      coefficients: kept share per group, in (0, 1], shape (groups,).
      limit: the largest cost allowed.
      floor: least counts, shape (groups,); default the fewest that may stay.

    Returns:
      Counts, shape (groups,), int.

    Raises:
      BudgetError: the floors cost more than the limit.
    """
    floor = cost.least if floor is None else np.clip(floor, cost.least, cost.most)
    if not np.isfinite(coefficients).all():
        raise BudgetError(
            f"round_counts: coefficients are {coefficients}, expected finite shares. The search diverged; "
            "lower its learning rate."
        )
    share = np.asarray(coefficients, float) * cost.units
    _check_reachable(cost, floor, limit, "round_counts")
    settled, low, high = _settled(cost, share, limit, floor)

    def rounded(scaled: np.ndarray) -> np.ndarray:
        nearest = np.floor(np.clip(scaled, low, high) + 0.5).astype(int)
        return np.where(settled, low, np.maximum(_whole_steps(cost, nearest), low))

    wanted = _largest(share, cost, lambda scaled: cost.exact(rounded(scaled)) <= limit)
    return _fill(cost, rounded(wanted), wanted, limit, floor, settled)


def _check_reachable(cost: Cost, least: np.ndarray, limit: int, caller: str) -> None:
    if cost.exact(least) > limit:
        raise BudgetError(
            f"{caller}: the least counts cost {cost.exact(least)} {cost.name}, more than the limit {limit}. "
            "Raise the budget or lower the floors."
        )


def _whole_steps(cost: Cost, counts: np.ndarray) -> np.ndarray:
    """Counts rounded down to multiples of the steps, where they are not whole groups."""
    return np.where(counts >= cost.units, cost.units, counts // cost.step * cost.step)


def _largest(share: np.ndarray, cost: Cost, fits: Callable[[np.ndarray], bool]) -> np.ndarray:
    """The shares, scaled by the largest common factor that fits."""
    low, high = 0.0, float(np.max(cost.units / np.maximum(share, 1e-9))) + 1.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if fits(middle * share) else (low, middle)
    return low * share


# A step of a smaller part of the limit is fine: whatever its rounding leaves, other groups can take.
_COARSE = 0.02

# So many coarse groups at a time are settled together, by all their ways to round.
_TOGETHER = 6

# What other groups move for coarse ones weighs half: a search ends with the last unit of a coarse one partly
# open, and that does nearly what a whole one does.
_MOVED = 0.5


def _settled(
    cost: Cost, share: np.ndarray, limit: int, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which groups are coarse, and bounds of all counts, which settle those.

    A fine group can take up what a coarse one leaves, not the other way round. So of all ways to round the
    coarse ones up or down, all others scaled to what that leaves, the nearest is taken: in the squared log of
    the counts, weighted by what a group costs. The coarsest groups come first.
    """
    settled, low, high = np.zeros(len(share), bool), floor.copy(), cost.most.copy()
    while True:
        scaled = _largest(share, cost, lambda scaled: _soft(cost, np.clip(scaled, low, high)) <= limit)
        wanted = np.clip(scaled, low, high)
        below = np.clip((np.ceil(wanted / cost.step).astype(int) - 1) * cost.step, low, high)
        above = np.clip(below + cost.step, low, high)
        step = _soft(cost, wanted + np.diag(cost.step)) - _soft(cost, wanted)
        coarse = np.flatnonzero(~settled & (above > below) & (step >= _COARSE * limit))
        if not len(coarse):
            return settled, low, high
        coarse = coarse[np.argsort(-step[coarse], kind="stable")][:_TOGETHER]
        up = np.array(list(itertools.product((True, False), repeat=len(coarse))))
        ways = np.where(up, above[coarse], below[coarse])
        counts, fits = _with_others(cost, ways, coarse, scaled, low, high, limit)
        # Down to none is as far as to a quarter of a unit, which is where the search would take it.
        log = np.log(np.maximum(counts, 0.25)) - np.log(np.maximum(wanted, 0.25))
        weight = step * wanted / cost.step * np.where(np.isin(np.arange(len(share)), coarse), 1.0, _MOVED)
        nearest = ways[np.argmin(np.where(fits, log**2 @ weight, np.inf))]
        settled[coarse] = True
        low[coarse] = high[coarse] = nearest


def _with_others(
    cost: Cost,
    ways: np.ndarray,
    coarse: np.ndarray,
    scaled: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    limit: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Per way to round the coarse groups all counts, the others' scaled to the limit; and which ways fit."""

    def counts(log_factor: np.ndarray) -> np.ndarray:
        found = np.clip(np.exp(log_factor)[:, None] * scaled, low, high)
        found[:, coarse] = ways
        return found

    least, most = np.full(len(ways), -12.0), np.full(len(ways), 12.0)
    for _ in range(40):
        middle = 0.5 * (least + most)
        inside = _soft(cost, counts(middle)) <= limit
        least, most = np.where(inside, middle, least), np.where(inside, most, middle)
    found = counts(least)
    return found, _soft(cost, found) <= limit


def _soft(cost: Cost, counts: np.ndarray) -> Any:
    """The cost of counts that need not be whole, on the host: shape (..., groups) to (...)."""
    sizes = cost.base + counts @ cost.per_unit.T
    return np.prod(sizes[..., cost.terms], axis=-1) @ cost.weights


def _one_more(cost: Cost, counts: np.ndarray, g: int) -> np.ndarray:
    """The counts with one step more of a group."""
    more = counts.copy()
    more[g] = min(counts[g] + cost.step[g], cost.units[g])
    return more


# Exchanges are tried between the groups whose units are cheapest: they fill what is left best.
_EXCHANGED = 40


def _fill(
    cost: Cost, counts: np.ndarray, wanted: np.ndarray, limit: int, floor: np.ndarray, settled: np.ndarray
) -> np.ndarray:
    """Counts that spend more of the limit, those that are settled last."""
    groups = range(len(counts))

    up = partial(_one_more, cost)

    def down(counts: np.ndarray, g: int) -> np.ndarray:
        new = counts.copy()
        new[g] = (counts[g] - 1) // cost.step[g] * cost.step[g]
        return new

    def fits(new: np.ndarray) -> bool:
        inside = (new >= floor).all() and (new <= cost.most).all()
        return bool(inside and cost.exact(counts) < cost.exact(new) <= limit)

    def cheapest(changed: dict[int, np.ndarray]) -> list[int]:
        inside = [
            g for g, new in changed.items() if floor[g] <= new[g] <= cost.most[g] and new[g] != counts[g]
        ]
        return sorted(inside, key=lambda g: abs(cost.exact(changed[g]) - cost.exact(counts)))[:_EXCHANGED]

    # Single steps first, where the rounding took most; then exchanges that spend more of the limit.
    while True:
        single = [g for g in groups if fits(up(counts, g))]
        if single:
            counts = up(
                counts, max(single, key=lambda g: (not settled[g], (wanted[g] - counts[g]) / cost.units[g]))
            )
            continue
        if cost.exact(counts) >= 0.999 * limit:
            return counts
        rising = cheapest({g: up(counts, g) for g in groups if not settled[g]})
        falling = cheapest({g: down(counts, g) for g in groups if not settled[g]})
        better = [new for a in rising for b in falling if a != b and fits(new := down(up(counts, a), b))]
        if not better:
            return counts
        counts = max(better, key=cost.exact)


def uniform_counts(cost: Cost, limit: int, *, whole: Sequence[int] = ()) -> Int[np.ndarray, " groups"]:
    """Counts that keep the same share of every group.

    Args:
      cost: what is limited.
      limit: the largest cost allowed.
      whole: groups that are left alone, e.g. the latent.

    Returns:
      Counts, shape (groups,).
    """
    floor = cost.least.copy()
    floor[list(whole)] = cost.most[list(whole)]
    return round_counts(cost, np.ones(len(floor)), limit, floor=floor)


def global_counts(
    groups: Groups, cost: Cost, scores: Num[ArrayLike, " units"], limit: int
) -> Int[np.ndarray, " groups"]:
    """Counts of the best units of all groups together, as many as fit.

    Where the next one does not fit any more, those after it may.

    Args:
      groups: what can leave.
      cost: what is limited.
      scores: shape (units,), comparable from group to group; see `importance.within_groups`.
      limit: the largest cost allowed.

    Returns:
      Counts, shape (groups,), between the groups' floors and ceilings, in their steps.

    Raises:
      BudgetError: the floors cost more than the limit.
    """
    _check_reachable(cost, cost.least, limit, "global_counts")
    best = groups.group_of_unit[np.argsort(-np.asarray(scores, float), kind="stable")]

    def of(number: int) -> np.ndarray:
        counts = np.minimum(np.bincount(best[:number], minlength=len(groups.groups)), cost.most)
        return np.maximum(_whole_steps(cost, counts), cost.least)

    number = bisect.bisect_right(range(groups.units + 1), limit, key=lambda n: cost.exact(of(n))) - 1
    counts = of(number)
    falling = [np.sort(np.asarray(scores, float)[group.slice])[::-1] for group in groups.groups]
    growing = [g for g in range(len(counts)) if counts[g] < cost.most[g]]
    while growing:
        g = max(growing, key=lambda g: falling[g][counts[g]])
        more = _one_more(cost, counts, g)
        if more[g] > cost.most[g] or cost.exact(more) > limit:
            growing.remove(g)  # Nor does it fit once others have grown.
            continue
        counts = more
        if counts[g] == cost.most[g]:
            growing.remove(g)
    return counts


def one_shot(
    groups: Groups, scores: Num[ArrayLike, " units"], budget: Budget, *, across: bool = False
) -> Plan:
    """The plan that keeps the best units by a score, without a search: what most pruners do.

    Args:
      groups: what can leave.
      scores: shape (units,), e.g. ``importance.l2(groups, variables)``.
      budget: the target, e.g. ``params(0.5)``.
      across: rank the units of all groups together ("global"), instead of keeping the same share of every
        group ("uniform"). Scores that are not comparable go through `importance.within_groups` first.

    Returns:
      The plan; its cost is at most the budget.

    Raises:
      PlanError: the scores are not one number per unit.
      BudgetError: the budget is below what the fixed axes and the floors allow.

    Example:
      >>> import jax.numpy as jnp
      >>> import compaware_jax as ca
      >>> from compaware_jax import importance
      >>> def net(v, x):
      ...     return jnp.tanh(x @ v["a"]) @ v["b"]
      >>> variables = {"a": jnp.arange(24.0).reshape(3, 8), "b": jnp.ones((8, 2))}
      >>> groups = ca.find_groups(net, variables, jnp.ones((1, 3)))
      >>> plan = ca.one_shot(groups, importance.l2(groups, variables), ca.params(0.5))
      >>> ca.shrink(variables, plan)["a"].shape
      (3, 4)
    """
    check_groups(groups)
    check_budget(budget)
    values = np.asarray(scores, float)
    if values.shape != (groups.units,) or np.isnan(values).any():
        got = "not a number" if values.shape == (groups.units,) else f"of shape {values.shape}"
        raise PlanError(f"one_shot: scores are {got}, expected one number per unit, ({groups.units},).")
    cost, limit = COSTS[budget.cost](groups), budget.limit(groups)
    counts = global_counts(groups, cost, values, limit) if across else uniform_counts(cost, limit)
    return plan_units(groups, keep_units(groups, values, counts))
