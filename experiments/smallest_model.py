"""The smallest model that keeps a criterion: ours, and of every rival.

Claim: the smallest of ours with a PSNR of at least 20 dB has at most half the parameters of the smallest that
a rival reaches.

    python experiments/smallest_model.py --data tfds --torch-python peers/bin/python

Budgets form a geometric grid, 3 % apart; the smallest that works for a method is found by bisection.
Every attempt is a whole pruning with the same fine-tune, at the best of the learning rates, as in
`compare.py`, whose settings these are; finished attempts are kept beside its cells. It writes `smallest.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tyro
from protocol import Candidate, Config, Rates, Study
from torch_rivals import channels, torch_rivals

from compaware_jax.cost import parameter_cost
from compaware_jax.tables import markdown_table


@dataclass(frozen=True)
class Args(Config):
    """Settings.

    Attributes:
      threshold: PSNR to keep, in dB.
      smallest: first budget of the grid.
      largest: last budget of the grid.
    """

    threshold: float = 20.0
    smallest: float = 0.02
    largest: float = 0.15


def grid(args: Args) -> list[float]:
    """Budgets 3 % apart."""
    count = int(np.log(args.largest / args.smallest) / np.log(1.03)) + 1
    return [round(float(args.smallest * 1.03**i), 6) for i in range(count)]


def first_that_works(budgets: list[float], works: Callable[[float], bool]) -> float | None:
    """The smallest budget that works, if all above one that works do; None if none does."""
    low, high = -1, len(budgets)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(budgets[middle]) else (middle, high)
    return budgets[high] if high < len(budgets) else None


def main(args: Args) -> None:
    """Bisect every method's budget and print the table."""
    study = Study(args)
    seed, cells, budgets = study.seeds[0], study.cells, grid(args)

    def works(name: str, compute: Callable[[float], Rates], budget: float) -> bool:
        best = max(cells.one(("smallest", name, budget, seed.seed), partial(compute, budget)).values())
        print(f"{name} at {budget:.2%}: {best:.2f} dB", flush=True)
        return best >= args.threshold

    def of_ours(budget: float) -> Rates:
        return seed.tuned(seed.ours(budget), study.rates)

    found = {"ours": first_that_works(budgets, partial(works, "ours", of_ours))}
    if args.torch_python:
        key = ("smallest kept", *budgets, seed.seed)
        kept = cells.large(key, partial(torch_rivals, seed, seed.dense, budgets))
        for rival, at in kept.items():

            def theirs(budget: float, at: Any = at) -> Rates:
                plan = seed.kept_by(channels(seed, at[f"{budget:g}"]))
                return seed.tuned(Candidate(plan, seed.dense), study.rates)

            reached = [b for b in budgets if f"{b:g}" in at]
            found[rival] = first_that_works(reached, partial(works, rival, theirs))
    total = parameter_cost(seed.groups).total
    ours = found["ours"] or 1.0
    rows = [
        [name, *(("–",) * 3 if b is None else (f"{b:.2%}", f"{int(b * total):,}", f"{ours / b:.2f}"))]
        for name, b in found.items()
    ]
    header = [f"PSNR ≥ {args.threshold:g} dB", "smallest budget", "parameters", "ours over it"]
    table = markdown_table(header, rows)
    (study.folder / "smallest.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
