"""Against every rival, at every budget: the same dense weights, the same data order, the same fine-tune.

Claim: at no budget and no seed is the compressed model below any rival.

    python -m venv peers && peers/bin/pip install torch torch-pruning
    python experiments/compare.py --data tfds --torch-python peers/bin/python

* Rivals: Torch-Pruning's importances, uniform and global, on the same dense weights; the best of them once
  more after 4,000 more dense steps; the dense model itself, trained on.
* Ours once more without the boundary: only channels leave, as with the rivals.
* From scratch: our plan, uniform widths, and the best of 20 random widths.
* Everyone gets the same fine-tune steps after pruning, and the best of three learning rates by the mean of
  their held-out PSNR over seeds.
* What our search adds is timed beside plain dense steps.

Finished cells are kept as files under `runs/compare/…/cells`, so an interrupted comparison goes on where it
was; several workers share the work with ``--worker 0 2`` and ``--worker 1 2`` (then run without, for the
table). ``--finished`` tables what is there. It writes `table.md`, `compare.json` and `compare.png`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from cells import Key
from mnist_task import loss
from protocol import Config, Rates, Seed, Study, at_best_rate, interval
from torch_rivals import channels, torch_rivals

import compaware_jax as ca
from compaware_jax.boundary import CALIBRATION_STEPS, EVIDENCE_STEPS
from compaware_jax.coefficients import Problem
from compaware_jax.cost import parameter_cost
from compaware_jax.fit import adam_cosine, fit_step
from compaware_jax.report import save_figures, trade_off_figure
from compaware_jax.tables import markdown_table

OURS, CHANNELS = "ours", "ours, channels only"
TRAINED_ON = "the best of these, after more dense steps"
SCRATCH, UNIFORM = "our plan, from scratch", "uniform, from scratch"
KEPT, KEPT_LATER = "kept", "kept, trained on"
RANDOM = "best of random widths, from scratch"

Table = dict[str, dict[float, list[float]]]
"""PSNR per method, budget and seed, at the method's best learning rate."""


@dataclass(frozen=True)
class Args(Config):
    """Settings.

    Attributes:
      extra: more dense steps for the best rival of each budget.
      random_widths: allocations tried from scratch, on the first seed.
      random_budgets: where they are tried.
      finished: compute nothing, show what is finished.
    """

    extra: int = 4_000
    random_widths: int = 20
    random_budgets: tuple[float, ...] = (0.1, 0.05, 0.03)
    finished: bool = False


def compute(args: Args, study: Study) -> None:
    """Everything that the table shows."""
    cells, seeds = study.cells, study.seeds
    pairs = [(seed, budget) for budget in args.budgets for seed in seeds]

    def each(name: str, run: Callable[[Seed, float], object]) -> dict[Key, object]:
        return cells.all({(name, b, s.seed): partial(run, s, b) for s, b in pairs})

    each(OURS, lambda s, b: s.ours(b, s.all_groups))
    each(CHANNELS, lambda s, b: s.ours(b, s.groups))
    cells.all({("dense more", s.seed): partial(s.tuned, None, s.dense) for s in seeds})
    cells.one(("times",), partial(step_times, seeds[0]))
    each(UNIFORM, lambda s, b: s.tuned(s.plan_of(s.uniform(b), s.fresh), s.fresh))
    each(SCRATCH, lambda s, b: s.tuned(our_plan(study, s, b), s.fresh))
    if args.torch_python:
        rivals(args, study)
    random_widths(args, study)


def our_plan(study: Study, seed: Seed, budget: float) -> ca.Plan:
    """The plan that our search found."""
    return ca.Plan.from_json(study.cells.read((OURS, budget, seed.seed))["plan"])


def rivals(args: Args, study: Study) -> None:
    """Torch-Pruning on the same dense weights; the best of them also after more dense steps."""
    cells, seeds, budgets = study.cells, study.seeds, args.budgets

    def tuned(seed: Seed, weights: Any, kept: str, name: str, budget: float) -> Rates:
        units = cells.read((kept, seed.seed))[name][f"{budget:g}"]
        return seed.tuned(seed.kept_by(channels(seed, units)), weights)

    kept = cells.all({(KEPT, s.seed): partial(torch_rivals, s, s.dense, budgets) for s in seeds})
    names = list(kept[KEPT, 0])
    cells.all(
        {
            (name, b, s.seed): partial(tuned, s, s.dense, KEPT, name, b)
            for b in budgets
            for s in seeds
            for name in names
            if f"{b:g}" in kept[KEPT, s.seed].get(name, {})
        }
    )
    more = {s.seed: s.trained_on(args.extra) for s in seeds}
    cells.all({(KEPT_LATER, s.seed): partial(torch_rivals, s, more[s.seed], budgets) for s in seeds})
    table = collected(args, study, names)
    for b in budgets:
        best = max((n for n in names if b in table.get(n, {})), key=lambda n, b=b: np.mean(table[n][b]))
        cells.all(
            {(TRAINED_ON, b, s.seed): partial(tuned, s, more[s.seed], KEPT_LATER, best, b) for s in seeds}
        )


def random_widths(args: Args, study: Study) -> None:
    """Random allocations from scratch: all on the first seed, the best of them on the others."""

    def tuned(seed: Seed, budget: float, number: int) -> Rates:
        return seed.tuned(seed.plan_of(seed.random(budget, number), seed.fresh), seed.fresh)

    first, numbers = study.seeds[0], range(args.random_widths)
    for b in args.random_budgets:
        tried = study.cells.all({("random", b, n): partial(tuned, first, b, n) for n in numbers})
        best = max(numbers, key=lambda n, b=b, tried=tried: max(tried["random", b, n].values()))
        study.cells.all({(RANDOM, b, s.seed): partial(tuned, s, b, best) for s in study.seeds})


def step_times(seed: Seed) -> dict[str, float]:
    """Seconds per dense step and per step of the search, in turns."""
    search, groups = seed.config.search, seed.all_groups
    problem = Problem(seed.task.model.apply, loss, seed.task.batches, groups, parameter_cost(groups))
    found = search.build(problem)
    init, step = fit_step(seed.task.model.apply, loss, seed.task.batches, adam_cosine(1e-3, seed.steps))
    runs = {
        "dense": (step, init(seed.dense)),
        "search": (found.step, found.init(seed.dense, 0.1, jax.random.key(0), 0)),
    }
    compiled = {
        name: (jax.jit(lambda s, f=function: jax.lax.scan(f, s, jnp.arange(100))[0]), state)
        for name, (function, state) in runs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(4):
        for name, (run, state) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(state))
            if turn:
                times[name].append((time.perf_counter() - start) / 100)
    return {name: float(np.median(values)) for name, values in times.items()}


def collected(args: Args, study: Study, methods: Sequence[str]) -> Table:
    """The figures of methods, where all seeds are finished."""
    table: Table = {}
    for name in methods:
        for b in args.budgets:
            keys = [(name, b, s.seed) for s in study.seeds]
            if all(map(study.cells.has, keys)):
                found = map(study.cells.read, keys)
                by_seed = [cell.get("psnr", cell) for cell in found]
                table.setdefault(name, {})[b] = at_best_rate(by_seed)
    return table


def above(table: Table, budget: float, methods: Sequence[str]) -> list[float]:
    """Per seed how far ours is above the method that has the best mean of some; empty where there is none."""
    others = [table[n][budget] for n in methods if budget in table.get(n, {})]
    if not others or budget not in table.get(OURS, {}):
        return []
    return (np.array(table[OURS][budget]) - max(others, key=np.mean)).tolist()


def show(args: Args, study: Study) -> None:
    """Print and write the table and the figure."""
    cells, seeds = study.cells, study.seeds
    torch = [*cells.read((KEPT, 0)), TRAINED_ON] if cells.has((KEPT, 0)) else []
    table = collected(args, study, [OURS, CHANNELS, *torch, SCRATCH, UNIFORM, RANDOM])

    def line(name: str, of: Callable[[float], Sequence[float]], cell: Callable = interval) -> list[str]:
        return [name, *(cell(values) if (values := of(b)) else "–" for b in args.budgets)]

    rows = [line(name, lambda b, at=at: at.get(b, [])) for name, at in table.items()]
    for name, methods in (
        ("ours above the best of Torch-Pruning", torch),
        ("ours above the best of random widths", [RANDOM]),
    ):
        rows.append(line(name, lambda b, m=methods: above(table, b, m)))
        rows.append(
            line("… on the worst seed", lambda b, m=methods: above(table, b, m), lambda v: f"{min(v):.2f}")
        )
    text = [markdown_table(["PSNR (dB)", *(f"{100 * b:g} %" for b in args.budgets)], rows)]
    dense = [("dense more", s.seed) for s in seeds]
    if all(map(cells.has, dense)):
        reached = interval(at_best_rate(list(map(cells.read, dense))))
        text.append(f"The dense model, trained on for as many steps: {reached} dB.")
    if cells.has(("times",)):
        times, steps = cells.read(("times",)), args.search.steps
        trim = EVIDENCE_STEPS + CALIBRATION_STEPS
        text.append(
            f"Our search: {steps} steps, the time of {steps * times['search'] / times['dense']:.0f} dense "
            f"steps, after {trim} steps at the boundary."
        )
    (study.folder / "table.md").write_text("\n\n".join(text) + "\n")
    record = {name: {str(b): values for b, values in at.items()} for name, at in table.items()}
    (study.folder / "compare.json").write_text(json.dumps(record, indent=1))
    figure = trade_off_figure(_points(table), metric="PSNR (dB), held-out")
    save_figures(study.folder, {"compare": figure})
    print("\n\n".join(text))


def _points(table: Table) -> Mapping[str, list[tuple[float, float]]]:
    return {name: [(100 * b, float(np.mean(v))) for b, v in at.items()] for name, at in table.items()}


def main(args: Args) -> None:
    """Run the comparison; without a worker's number, print and write the table."""
    study = Study(args)
    if not args.finished:
        compute(args, study)
    if args.worker is None:
        show(args, study)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
