"""What each idea of the method gives: the whole of it, and each time without one.

Claim: without component awareness or criterion sensitivity the PSNR falls by decibels, without joint weights
at small budgets; soft coefficients matter little.

    python experiments/ablations.py --data tfds

* without component awareness: one coefficient for all groups, so every group keeps the same share; once more
  with the latent whole, as uniform widths have it;
* without criterion sensitivity: each group keeps what the weights' norms say (all units ranked together by
  the L2 norm over their group's mean), and so do the pixels; the same once more with channels only, to be
  set against the method without the boundary, and with the latent whole;
* without joint weights: the weights stand still while coefficients are found;
* hard from the start: no soft edge and no sampled allocations;
* without the boundary: only channels leave, every pixel is read and written.

Everything else is the same: dense weights, steps of the search, exact rounding, fine-tune. Finished cells are
kept beside those of `compare.py`. It writes `ablations.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import tyro
from protocol import Candidate, Config, Seed, Study, interval

import compaware_jax as ca
from compaware_jax.cost import parameter_cost
from compaware_jax.importance import l2, within_groups
from compaware_jax.tables import markdown_table


def searched(seed: Seed, budget: float, groups: ca.Groups | None = None, **changes: Any) -> Candidate:
    """The method's search with some of its settings changed."""
    method = replace(seed.config.search, **changes)
    groups = seed.all_groups if groups is None else groups
    plan, weights, _ = seed.task.search(method, seed.dense, groups, budget, seed.task.search_key)
    return Candidate(plan, weights)


def latent_whole(groups: ca.Groups) -> ca.Groups:
    """The groups, those between components held whole."""
    return ca.constrain(groups, whole=[group.name for group in groups.groups if group.coupling])


def one_coefficient(seed: Seed, budget: float) -> Candidate:
    """The same share of every group but the latent, which stays whole."""
    return searched(seed, budget, latent_whole(seed.all_groups), travel=0.0)


def by_norms(seed: Seed, budget: float, *, boundary: bool = True, whole: bool = False) -> Candidate:
    """Counts by the weights' norms from the start; the weights train along."""
    groups = seed.all_groups if boundary else seed.groups
    groups = latent_whole(groups) if whole else groups
    scores = np.asarray(within_groups(groups, l2(groups, seed.dense)))
    cost, order = parameter_cost(groups), np.argsort(-scores)
    limit = ca.params(budget).limit(groups)

    def counts(kept: int) -> np.ndarray:
        found = np.bincount(groups.group_of_unit[order[:kept]], minlength=len(groups.groups))
        return np.maximum(found, groups.floors)

    low, high = 0, groups.units
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost.exact(counts(middle)) <= limit else (low, middle)
    # Nothing is trimmed by what the loss says: to the search, pixels are groups like any others.
    groups = replace(groups, groups=tuple(replace(g, boundary=False) for g in groups.groups))
    fixed = {g.name: int(n) for g, n in zip(groups.groups, counts(low), strict=True)}
    return searched(seed, budget, ca.constrain(replace(groups, limits=None), floor=fixed, ceiling=fixed))


def channels_only(seed: Seed, budget: float) -> Candidate:
    """The method on the groups that rivals know of."""
    return searched(seed, budget, seed.groups)


WHOLE = "the whole method"

VARIANTS: dict[str, Callable[..., Candidate]] = {
    WHOLE: searched,
    "without component awareness": partial(searched, travel=0.0),
    "without component awareness, latent whole": one_coefficient,
    "without criterion sensitivity": by_norms,
    "without joint weights": partial(searched, learning_rate=0.0),
    "hard from the start": partial(searched, noise=0.0, edge=0.0),
    "without the boundary": channels_only,
    "without the boundary and criterion sensitivity": partial(by_norms, boundary=False),
    "without the boundary and criterion sensitivity, latent whole": partial(
        by_norms, boundary=False, whole=True
    ),
}


def figures(reached: Mapping[tuple[str, float], list[float]], variant: str, budget: float) -> tuple[str, str]:
    """A variant's PSNR, and what it lost of the whole method's: seeds are compared one by one."""
    whole, without = (np.array(reached[name, budget]) for name in (WHOLE, variant))
    return interval(without.tolist()), "" if variant == WHOLE else interval((whole - without).tolist())


def main(config: Config) -> None:
    """Run all variants and print the table."""
    study = Study(config)
    pairs = [(variant, b) for b in config.budgets for variant in VARIANTS]
    study.tune({("ablation", v, b): partial(VARIANTS[v], budget=b) for v, b in pairs})
    reached = {(v, b): study.reached(("ablation", v, b)) for v, b in pairs}
    rows = [[v, *(figure for b in config.budgets for figure in figures(reached, v, b))] for v in VARIANTS]
    header = ["PSNR (dB)", *(text for b in config.budgets for text in (f"{100 * b:g} %", "lost"))]
    table = markdown_table(header, rows)
    (study.folder / "ablations.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, default=Config(budgets=(0.1, 0.03))))
