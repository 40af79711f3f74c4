"""A trade-off front: budgets and seeds as lanes of one vmapped program.

Claim: every budget is hit within 0.5 %, and the whole front compiles once.

    python experiments/sweep_budgets.py --budgets 0.05 0.1 0.2 0.3 0.5 --seeds 2

Writes runs/<name>/: sweep.csv, one plan per lane, trade_off.png. The fine-tune of a lane runs masked at
full width and is shorter than that of mnist_autoencoder.py, so the front lies somewhat lower.
"""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax.monitoring
import tyro
from mnist_task import Data, Preset, Task, criteria_below, loss, metrics_of

import compaware_jax as ca
from compaware_jax.report import save_figures, trade_off_figure
from compaware_jax.tables import text_table


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      budgets: shares of the parameters that may stay.
      seeds: lanes per budget.
      data: which images, as in the main experiment.
      model: preset of the autoencoder.
      dense_steps: steps of the dense training.
      dense_learning_rate: its learning rate.
      search: settings of the search.
      fine_tune: steps after pruning, masked.
      learning_rate: of those.
      batch: batch size.
      seed: of the dense model and the data.
      name: of the folder under `out`.
      out: where runs are kept.
    """

    budgets: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    seeds: int = 2
    data: Data = "auto"
    model: Preset = "dense"
    dense_steps: int = 3_000
    dense_learning_rate: float = 1e-3
    search: ca.GradientSearch = field(default_factory=ca.GradientSearch)
    fine_tune: int = 1_000
    learning_rate: float = 2e-3
    batch: int = 128
    seed: int = 0
    name: str = "sweep"
    out: Path = Path("runs")


def main(config: Config) -> None:
    """Run the sweep and print its table."""
    compilations: list[str] = []

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs
        if event.endswith("backend_compile_duration"):
            compilations.append(str(kwargs.get("fun_name")))

    task = Task(config.data, config.model, batch=config.batch, seed=config.seed)
    folder = config.out / config.name
    folder.mkdir(parents=True, exist_ok=True)
    print(task.data.note)
    dense = task.dense(config.dense_steps, config.dense_learning_rate, folder / "checkpoints" / "dense")
    dense_metrics = metrics_of(task.model.apply, dense, task.held_out)
    groups = task.groups(dense)

    criteria = criteria_below(dense_metrics, {"PSNR (dB)": 1.0, "SSIM": 0.05, "k-NN": 0.05})
    metrics = [criterion.name for criterion in criteria]
    jax.monitoring.register_event_duration_secs_listener(count)
    started = time.perf_counter()
    points = ca.sweep(
        task.model.apply,
        dense,
        loss,
        task.batches,
        groups=groups,
        budgets=[ca.params(b) for b in config.budgets],
        seeds=config.seeds,
        criteria=criteria,
        held_out=task.held_out,
        search=config.search,
        fine_tune=config.fine_tune,
        learning_rate=config.learning_rate,
        directory=folder / "checkpoints" / "sweep",
    )
    seconds = time.perf_counter() - started

    names = [f"{g.name} ({g.units})" for g in groups.groups]
    header = [
        "budget",
        "seed",
        "parameters",
        "reached",
        "of budget",
        *metrics,
        "kept",
        *names,
    ]
    table = []
    for point in points:
        total, left = point.costs["parameters"]
        table.append(
            [
                f"{point.budget.fraction:g}",
                point.seed,
                left,
                f"{left / total:.3%}",
                f"{left / total / point.budget.fraction:.2%}",
                *(f"{verdict.after:.3f}" for verdict in point.verdicts),
                "yes" if point.kept else "no",
                *(kept for _, kept, _ in point.plan.counts),
            ]
        )
        point.plan.save(folder / f"plan-{point.budget.fraction:g}-{point.seed}.json")
    with (folder / "sweep.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *table])
    metric = metrics[0]
    series = {"dense": [(100.0, dense_metrics[metric])]}
    for seed in range(config.seeds):
        own = [point for point in points if point.seed == seed]
        left = [point.costs["parameters"][1] / point.costs["parameters"][0] for point in own]
        series[f"seed {seed}"] = [(100 * x, p.verdicts[0].after) for x, p in zip(left, own, strict=True)]
    save_figures(folder, {"trade_off": trade_off_figure(series, metric=f"{metric}, held-out")})
    print(text_table(header, table, f"{len(points)} lanes; dense {dense_metrics[metric]:.2f} dB"))
    programs = sum(name == "jit(run_chunk)" for name in compilations)
    print(f"{seconds:.0f} s for {len(points)} lanes; compilations of the training program: {programs}")
    print(f"everything is in {folder}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
