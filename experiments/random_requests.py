"""Random requests, a budget and a criterion each: what a rival proves feasible is kept, and nothing is faked.

Claim: every request that some rival's model meets is met by ours; every other one that ours does not meet is
said not to be met.

    python experiments/random_requests.py --data tfds --torch-python peers/bin/python

A request draws a budget (log-uniform) and a metric, and a threshold below the dense model's value. Rivals
are Torch-Pruning's importances on the same dense weights, with the same fine-tune at the same learning rate.
Settings are those of `compare.py`; finished requests are kept beside its cells. It writes `requests.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tyro
from mnist_task import METRICS, criteria_below, loss, metrics_of
from protocol import Config, Seed, Study
from torch_rivals import channels, torch_rivals

import compaware_jax as ca
from compaware_jax.tables import markdown_table

# How far below the dense model's value a threshold may lie, and between which shares of the parameters a
# budget: so that neither "kept" nor "not kept" is the answer to all of them.
DROPS = {"PSNR (dB)": 2.0, "worst class (dB)": 2.0, "SSIM": 0.06, "k-NN": 0.01, "linear": 0.03}
BUDGETS = (0.015, 0.3)


@dataclass(frozen=True)
class Args(Config):
    """Settings.

    Attributes:
      number: of requests.
      rivals: of Torch-Pruning, by their names in `peers/torch_prune.py`.
    """

    number: int = 20
    rivals: tuple[str, ...] = ("LAMP, global", "L2, uniform")


def request(number: int) -> tuple[float, str, float]:
    """Budget, metric, and how much of it may be lost."""
    rng = np.random.default_rng(number)
    metric = list(METRICS)[number % len(METRICS)]
    budget = round(float(np.exp(rng.uniform(*np.log(BUDGETS)))), 4)
    return budget, metric, round(float(rng.uniform(0.02, 1.0)) * DROPS[metric], 6)


def answer(seed: Seed, criterion: ca.Criterion, budget: float) -> dict[str, Any]:
    """What `compress` says of a request."""
    task, dense = seed.task, seed.dense
    result = ca.compress(
        task.model.apply,
        dense,
        loss,
        task.batches,
        groups=seed.all_groups,
        budget=ca.params(budget),
        criteria=[criterion],
        held_out=task.held_out,
        search=seed.config.search,
        fine_tune=seed.steps,
        learning_rate=seed.schedule.learning_rate,
        key=task.search_key,
        progress=False,
    )
    measured = metrics_of(result.apply, result.variables, task.held_out)[criterion.name]
    return {"said": result.kept, "measured": measured}


def proofs(seed: Seed, rivals: Sequence[str], metric: str, budget: float) -> dict[str, float]:
    """The metric of every rival's model at the budget."""
    task, found = seed.task, {}
    for rival, kept in torch_rivals(seed, seed.dense, [budget]).items():
        if rival in rivals and kept:
            plan = seed.kept_by(channels(seed, kept[f"{budget:g}"]))
            small = ca.slim(task.model.apply, plan)
            start, rate = ca.shrink(seed.dense, plan), seed.schedule.learning_rate
            tuned = task.fit(rival, small, start, seed.steps, rate, None)
            found[rival] = metrics_of(small, tuned, task.held_out)[metric]
    return found


def main(args: Args) -> None:
    """Answer all requests and print the table."""
    study = Study(args)
    seed = study.seeds[0]
    dense = metrics_of(seed.task.model.apply, seed.dense, seed.task.held_out)
    rows, broken = [], 0
    for number in range(args.number):
        budget, metric, drop = request(number)
        (criterion,) = criteria_below(dense, {metric: drop})
        key = ("request", budget, metric, drop, seed.seed)
        ours = study.cells.one(key, partial(answer, seed, criterion, budget))
        theirs: dict[str, float] = {}
        if args.torch_python:
            key = ("request, rivals", budget, metric, drop, seed.seed)
            theirs = study.cells.one(key, partial(proofs, seed, args.rivals, metric, budget))
        feasible = any(criterion.keeps(value) for value in theirs.values())
        honest = ours["said"] == criterion.keeps(ours["measured"])
        fine = honest and (ours["said"] or not feasible)
        broken += not fine
        best = f"{max(theirs.values()):.4g}" if theirs else "–"
        said = "kept" if ours["said"] else "not kept"
        verdict = "" if fine else "BROKEN"
        rows.append((f"{budget:.1%}", str(criterion), f"{ours['measured']:.4g}", said, best, verdict))
        print(rows[-1], flush=True)
    header = ["budget", "criterion", "ours", "said", "best rival", ""]
    kept = sum(row[3] == "kept" for row in rows)
    table = f"{markdown_table(header, rows)}\n\n{kept} of {args.number} requests kept, {broken} broken."
    (study.folder / "requests.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
