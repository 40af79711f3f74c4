"""Against every rival, at every budget: the same dense weights, the same data order, the same fine-tune.

Goal: at no budget and no seed is the compressed model below any rival. Kept from 10 % down; at 20 % and
above, where all come near the dense model, LAMP is ahead on the conv preset, by 0.07 dB at 30 % in the mean
of six dense models and by 0.19 at most (`README.md` says where).

    python -m venv peers && peers/bin/pip install torch torch-pruning
    python experiments/compare.py --data tfds --torch-python peers/bin/python

* Rivals: Torch-Pruning's importances, uniform and global, on the same dense weights; the best of them once
  more after 4,000 more dense steps; the dense model itself, trained on.
* Ours once more without the boundary: only channels leave, as with the rivals. And once more after dense
  steps too: as many as our search leaves of the 4,000 in time.
* From scratch: our plan, uniform widths, and the best of 20 random widths.
* Everyone gets the same fine-tune steps after pruning, and the best of three learning rates by the mean of
  their held-out PSNR over seeds; a rate that is 0.3 dB behind on the first seed is not tried on the others.
* What our search adds is timed beside plain dense steps.

On an accelerator, ``--lanes 64`` tunes that many models at once; several of the same command share the seeds.
Finished cells are kept, so an interrupted comparison goes on where it was, and the same command started again
beside it shares the work. ``--finished`` tables what is there: ``--finished --out experiments/results`` what
is in the repository. It writes `table.md` and `compare.png`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from cells import Key
from mnist_task import loss
from protocol import Candidate, Config, Method, Seed, Study, interval
from torch_rivals import RIVALS, Kept, channels, torch_rivals

from compaware_jax.cost import parameter_cost
from compaware_jax.report import save_figures, trade_off_figure
from compaware_jax.search.boundary import CALIBRATION_STEPS, EVIDENCE_STEPS
from compaware_jax.search.coefficients import Problem
from compaware_jax.tables import markdown_table
from compaware_jax.training.fit import adam_cosine, fit_step

OURS, CHANNELS = "ours", "ours, channels only"
OURS_ON = "ours, after more dense steps"
TRAINED_ON = "the best of these, after more dense steps"
SCRATCH, UNIFORM = "our plan, from scratch", "uniform, from scratch"
RANDOM = "best of random widths, from scratch"
TORCH = (*RIVALS, TRAINED_ON)

Table = dict[str, dict[float, list[float]]]
"""PSNR per method, budget and seed, at the method's best learning rate."""


@dataclass(frozen=True)
class Args(Config):
    """Settings.

    Attributes:
      channels: ours without the boundary, too.
      extra: more dense steps for the best rival of each budget; ours gets what its search leaves of them.
      random_widths: allocations tried from scratch, on the first seed.
      random_budgets: where they are tried.
      finished: compute nothing, show what is finished.
    """

    channels: bool = True
    extra: int = 4_000
    random_widths: int = 20
    random_budgets: tuple[float, ...] = (0.1, 0.05, 0.03)
    finished: bool = False


def compute(args: Args, study: Study) -> None:
    """Everything that the table shows, budget by budget."""
    study.settle(("more dense steps",), args.extra)
    left = args.extra - search_cost(args, study)
    # With lanes, all budgets at once.
    for budgets in [args.budgets] if args.lanes > 1 else [(b,) for b in args.budgets]:
        work: dict[Key, Method] = {}
        for b in budgets:
            work[OURS, b] = partial(Seed.ours, budget=b)
            if args.channels:
                work[CHANNELS, b] = partial(Seed.ours, budget=b, boundary=False)
            work[OURS_ON, b] = partial(Seed.ours, budget=b, more=left)
            work[UNIFORM, b] = partial(uniform_from_scratch, budget=b)
        study.tune(work)
        study.tune({(SCRATCH, b): partial(ours_from_scratch, budget=b) for b in budgets})
        if args.torch_python:
            rivals(args, study, budgets)
        for b in args.random_budgets:
            if b in budgets:
                random_widths(args, study, b)
    study.tune({("dense more",): lambda seed: Candidate(None, seed.dense)})


def search_cost(args: Args, study: Study) -> int:
    """The dense steps that a search is worth, the steps at the boundary counted; in whole hundreds."""
    times = study.cells.one(("times",), partial(step_times, study.seeds[0]))
    trim = EVIDENCE_STEPS + CALIBRATION_STEPS
    return 100 * math.ceil((trim + args.search.steps * times["search"] / times["dense"]) / 100)


def uniform_from_scratch(seed: Seed, budget: float) -> Candidate:
    """Fresh weights at uniform widths."""
    return Candidate(seed.plan_of(seed.uniform(budget), seed.fresh), seed.fresh)


def ours_from_scratch(seed: Seed, budget: float) -> Candidate:
    """Fresh weights at the plan that our search found."""
    return Candidate(seed.our_plan(budget), seed.fresh)


def rivals(args: Args, study: Study, budgets: Sequence[float]) -> None:
    """Torch-Pruning on the same dense weights; the best of them also after more dense steps."""

    def kept(seed: Seed, later: bool) -> Kept:
        return study.cells.large(
            ("kept, trained on" if later else "kept", *args.budgets, seed.seed),
            lambda: torch_rivals(seed, start(seed, later), args.budgets),
        )

    def start(seed: Seed, later: bool) -> Any:
        return seed.trained_on(args.extra) if later else seed.dense

    def method(name: str, budget: float, later: bool) -> Method:
        def made(seed: Seed) -> Candidate:
            plan = seed.kept_by(channels(seed, kept(seed, later)[name][f"{budget:g}"]))
            return Candidate(plan, start(seed, later))

        return made

    able = {
        b: [n for n in RIVALS if all(f"{b:g}" in kept(s, False).get(n, {}) for s in study.seeds)]
        for b in budgets
    }
    study.tune({(name, b): method(name, b, False) for b in budgets for name in able[b]})
    best = {b: max(able[b], key=lambda name, b=b: np.mean(study.reached((name, b)))) for b in budgets}
    study.tune({(TRAINED_ON, b): method(best[b], b, True) for b in budgets})


def random_widths(args: Args, study: Study, budget: float) -> None:
    """Random allocations from scratch: all on the first seed, the best of them on the others."""

    def made(seed: Seed, number: int) -> Candidate:
        return Candidate(seed.plan_of(seed.random(budget, number), seed.fresh), seed.fresh)

    first, numbers = study.seeds[0], range(args.random_widths)
    study.tune_on(first, {("random", budget, n): partial(made, number=n) for n in numbers})
    best = max(numbers, key=lambda n: max(study.figures(("random", budget, n), first).values()))
    study.tune({(RANDOM, budget): partial(made, number=best)})


def step_times(seed: Seed) -> dict[str, float]:
    """Seconds per dense step and per step of the search, in turns; the first ones compile.

    After ten seconds no turn begins, but for the first three.
    """
    at_once, turns, end = jnp.arange(20), 8, time.perf_counter() + 10.0
    search, groups = seed.config.search, seed.all_groups
    problem = Problem(seed.task.model.apply, loss, seed.task.batches, groups, parameter_cost(groups))
    found = search.build(problem)
    init, step = fit_step(seed.task.model.apply, loss, seed.task.batches, adam_cosine(1e-3, seed.steps))
    runs = {
        "dense": (step, init(seed.dense)),
        "search": (found.step, found.init(seed.dense, 0.1, jax.random.key(0), 0)),
    }
    compiled = {
        name: (jax.jit(lambda s, f=function: jax.lax.scan(f, s, at_once)[0]), state)
        for name, (function, state) in runs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, (run, state) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(state))
            if turn:
                times[name].append((time.perf_counter() - start) / len(at_once))
    return {name: float(np.median(values)) for name, values in times.items()}


def collected(args: Args, study: Study) -> Table:
    """The figures of all methods, where all seeds are finished."""
    found = {
        name: {b: psnr for b in args.budgets if (psnr := study.reached((name, b)))}
        for name in (OURS, CHANNELS, OURS_ON, *TORCH, SCRATCH, UNIFORM, RANDOM)
    }
    return {name: at for name, at in found.items() if at}


def above(table: Table, budget: float, own: str, methods: Sequence[str]) -> tuple[str, str]:
    """How far ours is above the method of some that has the best mean; at worst, over seeds and methods."""
    others = [table[n][budget] for n in methods if budget in table.get(n, {})]
    if not others or budget not in table.get(own, {}):
        return "–", "–"
    ours = np.array(table[own][budget])
    return interval((ours - max(others, key=np.mean)).tolist()), f"{np.min(ours - others):.2f}"


def show(args: Args, study: Study) -> None:
    """Print and write the table and the figure."""
    table = collected(args, study)
    if not table:
        raise SystemExit(
            f"Nothing is finished in {study.cells.record}. Run without --finished, or name its --out."
        )
    budgets = [b for b in args.budgets if any(b in at for at in table.values())]
    rows = [[name, *(interval(at[b]) if b in at else "–" for b in budgets)] for name, at in table.items()]
    for name, own, methods in (
        ("ours above the best of Torch-Pruning", OURS, [*RIVALS]),
        ("… after more dense steps for both", OURS_ON, TORCH),
        ("ours above the best of random widths", OURS, [RANDOM]),
    ):
        mean, worst = zip(*(above(table, b, own, methods) for b in budgets), strict=True)
        rows += [[name, *mean], ["… at worst, over all seeds and these methods", *worst]]
    text = [markdown_table(["PSNR (dB)", *(f"{100 * b:g} %" for b in budgets)], rows)]
    if dense := study.reached(("dense more",)):
        text.append(f"The dense model, trained on for as many steps: {interval(dense)} dB.")
    if study.cells.has(("times",)):
        text.append(
            f"Our search: {args.search.steps} steps, with those at the boundary the time of "
            f"{search_cost(args, study):,} dense steps. Ours had the rest of {args.extra:,} in the row "
            f'"{OURS_ON}".'
        )
    (study.folder / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    # After more dense steps both lie on their lines without.
    drawn = {name: at for name, at in table.items() if name not in (OURS_ON, TRAINED_ON)}
    figure = trade_off_figure(_points(drawn), metric="PSNR (dB), held-out", ours=(OURS, CHANNELS))
    save_figures(study.folder, {"compare": figure})
    print("\n\n".join(text))


def _points(table: Table) -> Mapping[str, list[tuple[float, float]]]:
    return {name: [(100 * b, float(np.mean(v))) for b, v in at.items()] for name, at in table.items()}


def main(args: Args) -> None:
    """Run the comparison; print and write the table."""
    study = Study(args)
    if not args.finished:
        compute(args, study)
    show(args, study)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
