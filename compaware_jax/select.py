"""Selection: from coefficients and scores to exact counts that meet the budget, and to units."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Num

from compaware_jax.cost import Cost
from compaware_jax.errors import BudgetError
from compaware_jax.groups import Groups
from compaware_jax.importance import ranks


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

    All coefficients are scaled by a common factor to the largest counts that fit; single units, then
    exchanges of one unit for another, fill what rounding left.

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
    units = cost.units
    floor = cost.least if floor is None else np.clip(floor, cost.least, cost.most)
    if not np.isfinite(coefficients).all():
        raise BudgetError(
            f"round_counts: coefficients are {coefficients}, expected finite shares. The search diverged; "
            "lower its learning rate."
        )
    share = np.asarray(coefficients, float) * units
    if cost.exact(floor) > limit:
        raise BudgetError(
            f"round_counts: the least counts cost {cost.exact(floor)} {cost.name}, more than the limit "
            f"{limit}. Raise the budget or lower the floors."
        )

    def scaled(factor: float) -> np.ndarray:
        return _allowed(cost, np.clip(np.floor(factor * share + 0.5), floor, cost.most).astype(int), floor)

    low, high = 0.0, float(np.max(units / np.maximum(share, 1e-9))) + 1.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if cost.exact(scaled(middle)) <= limit else (low, middle)
    return _fill(cost, scaled(low), low * share, limit, floor)


def _allowed(cost: Cost, counts: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Counts rounded down to multiples of the steps, where they are not whole groups."""
    multiples = np.where(counts >= cost.units, cost.units, counts // cost.step * cost.step)
    return np.maximum(multiples, floor)


# Exchanges are tried between the groups whose units are cheapest: they fill what is left best.
_EXCHANGED = 40


def _fill(cost: Cost, counts: np.ndarray, wanted: np.ndarray, limit: int, floor: np.ndarray) -> np.ndarray:
    groups = range(len(counts))

    def up(counts: np.ndarray, g: int) -> np.ndarray:
        new = counts.copy()
        new[g] = min(counts[g] + cost.step[g], cost.units[g])
        return new

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
            counts = up(counts, max(single, key=lambda g: (wanted[g] - counts[g]) / cost.units[g]))
            continue
        if cost.exact(counts) >= 0.999 * limit:
            return counts
        rising = cheapest({g: up(counts, g) for g in groups})
        falling = cheapest({g: down(counts, g) for g in groups})
        better = [new for a in rising for b in falling if a != b and fits(new := down(up(counts, a), b))]
        if not better:
            return counts
        counts = max(better, key=cost.exact)


def uniform_counts(cost: Cost, limit: int, *, whole: Sequence[int] = ()) -> Int[np.ndarray, " groups"]:
    """Counts that keep the same share of every group: what most pruners do.

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
