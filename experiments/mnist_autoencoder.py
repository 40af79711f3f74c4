"""The main job: a trained MNIST autoencoder goes in, a smaller dense one that keeps its criteria comes out.

Claim: at a tenth of the parameters, widths found by soft coefficients beat uniform widths clearly, at the
same fine-tune.

    python experiments/mnist_autoencoder.py                            # the embedded 5,000 digits, or tfds
    python experiments/mnist_autoencoder.py --data tfds --budget 0.1   # full MNIST
    python experiments/mnist_autoencoder.py --data fashion             # Fashion-MNIST
    python experiments/mnist_autoencoder.py --model conv

Writes runs/<name>/: metrics.json, plan.json, timings.json, history.npz, PNG figures, report.html and
checkpoints. Started again after an interruption, it goes on where it was.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from mnist_report import Finished, write_report
from mnist_task import (
    METRICS,
    SCHEDULES,
    Data,
    Preset,
    Schedule,
    Task,
    criteria_below,
    criteria_marks,
    latencies,
    loss,
    metrics_of,
    psnr_of,
    share_text,
    uniform_plan,
)

import compaware_jax as ca
from compaware_jax.cost import COSTS
from compaware_jax.importance import group_ablation, l2
from compaware_jax.surgery.plan import component_table
from compaware_jax.tables import text_table


@dataclass(frozen=True)
class Config:
    """Settings; steps that are not given depend on the data and the model.

    Attributes:
      data: MNIST in full (tfds), embedded, or whichever is there (auto); or Fashion-MNIST.
      model: preset of the autoencoder.
      budget: share of the parameters that may stay; by default a tenth, 0.3 for the conv preset.
      psnr_drop: dB of PSNR that may be lost.
      worst_drop: dB of PSNR that the worst class may lose.
      ssim_drop: SSIM that may be lost.
      knn_drop: latent k-NN accuracy that may be lost.
      linear_drop: accuracy of a linear classifier of the latent that may be lost.
      dense_steps: steps of the dense training.
      dense_learning_rate: its learning rate (Adam, cosine to zero).
      search: settings of the search.
      fine_tune: steps after pruning, for every rival the same.
      learning_rate: of those (Adam, cosine to zero).
      batch: batch size.
      seed: of everything random.
      rivals: whether uniformly pruned and fresh models are trained beside it.
      timing: seconds in which the models' forward passes are timed; five of each are in any case.
      name: of the folder under `out`.
      out: where runs are kept.
    """

    data: Data = "auto"
    model: Preset = "dense"
    budget: float | None = None
    psnr_drop: float = 0.3
    worst_drop: float = 0.5
    ssim_drop: float = 0.02
    knn_drop: float = 0.03
    linear_drop: float = 0.03
    dense_steps: int | None = None
    dense_learning_rate: float | None = None
    search: ca.GradientSearch = field(default_factory=ca.GradientSearch)
    fine_tune: int | None = None
    learning_rate: float | None = None
    batch: int = 128
    seed: int = 0
    rivals: bool = True
    timing: float = 6.0
    name: str | None = None
    out: Path = Path("runs")


def schedule_of(config: Config, source: str) -> Schedule:
    """The schedule of a model on a data source, with what the settings say instead."""
    given = {f.name: getattr(config, f.name) for f in fields(Schedule)}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(SCHEDULES[config.model, source], **given)


def main(config: Config) -> None:
    """Run the experiment and print its table."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    started = time.perf_counter()
    task = Task(config.data, config.model, batch=config.batch, seed=config.seed)
    schedule = schedule_of(config, task.data.source)
    folder = config.out / (config.name or f"{config.model}-{task.data.source}-{schedule.budget:g}")
    checkpoints = folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    print(task.data.note)

    dense = task.dense(schedule.dense_steps, schedule.dense_learning_rate, checkpoints / "dense")
    dense_metrics = metrics_of(task.model.apply, dense, task.held_out)
    drops = (config.psnr_drop, config.worst_drop, config.ssim_drop, config.knn_drop, config.linear_drop)
    criteria = criteria_below(dense_metrics, dict(zip(METRICS, drops, strict=True)))
    groups, channels = task.groups(dense), task.groups(dense, boundary=False)
    print(groups, "\n")

    result = ca.compress(
        task.model.apply,
        dense,
        loss,
        task.batches,
        groups=groups,
        budget=ca.params(schedule.budget),
        criteria=criteria,
        held_out=task.held_out,
        search=config.search,
        fine_tune=schedule.fine_tune,
        learning_rate=schedule.learning_rate,
        key=task.search_key,
        directory=checkpoints / "compress",
    )
    models: dict[str, tuple[Any, Any, ca.Plan | None]] = {
        "dense": (task.model.apply, dense, None),
        "compressed": (result.apply, result.variables, result.plan),
    }

    def rival(label: str, start: Any, plan: ca.Plan) -> None:
        small = ca.slim(task.model.apply, plan)
        where = checkpoints / label.replace(" ", "-").replace(",", "")
        trained = task.fit(
            label, small, ca.shrink(start, plan), schedule.fine_tune, schedule.learning_rate, where
        )
        models[label] = (small, trained, plan)

    if config.rivals:
        uniform = uniform_plan(channels, dense, schedule.budget)
        fresh = task.model.init(jax.random.fold_in(task.init_key, 1))
        rival("uniform L2", dense, uniform)
        rival("from scratch, uniform widths", fresh, uniform)
        rival("from scratch, our widths", fresh, result.plan)

    falls = sensitivities(task, result, dense)
    rows = {n: describe((channels, groups), task, m, criteria) for n, m in models.items()}
    times = latencies(
        {n: m[:2] for n, m in models.items()}, task.held_out["image"][:256], seconds=config.timing
    )
    result.plan.save(folder / "plan.json")
    write_json(
        folder / "metrics.json",
        {
            "config": {**asdict(config), **asdict(schedule)},
            "data": {"source": task.data.source, "note": task.data.note},
            "criteria": [str(c) for c in criteria],
            "models": rows,
            "coefficients": dict(
                zip([g.name for g in groups.groups], result.found.coefficients.tolist(), strict=True)
            ),
            "components": component_table(groups, result.plan),
            "sensitivity": falls,
        },
    )
    seconds = time.perf_counter() - started
    write_json(folder / "timings.json", {"forward of 256, ms": times, "seconds in all": seconds})
    arrays: Any = flat_history(result)
    np.savez(folder / "history.npz", **arrays)
    header, table = comparison(rows, times, criteria)
    print("\n" + text_table(header, table, "held-out images; forward of one batch of 256"))
    print("criteria: " + "; ".join(str(c) for c in criteria))
    write_report(
        folder,
        Finished(
            task=task,
            budget=schedule.budget,
            search_steps=config.search.steps,
            channels=channels,
            result=result,
            models=models,
            rows=rows,
            falls=falls,
            header=header,
            table=table,
        ),
    )
    print(f"\n{seconds:.0f} s; everything is in {folder}, the report in {folder / 'report.html'}")


def describe(
    kinds: tuple[ca.Groups, ca.Groups],
    task: Task,
    model: tuple[Any, Any, ca.Plan | None],
    criteria: Any,
) -> dict[str, Any]:
    """Costs, metrics and kept criteria of a model; groups without and with those at the boundary."""
    apply, variables, plan = model
    groups = kinds[0 if plan is None else plan.cuts.boundary]
    counts = groups.sizes if plan is None else np.array([kept for _, kept, _ in plan.counts])
    metrics = metrics_of(apply, variables, task.held_out)
    return {
        "widths": counts.tolist(),
        "parameters": COSTS["parameters"](groups).exact(counts),
        "FLOPs": COSTS["flops"](groups).exact(counts),
        "metrics": metrics,
        "kept": criteria_marks(criteria, metrics),
    }


def comparison(
    rows: Mapping[str, Any], times: Mapping[str, float], criteria: Any
) -> tuple[list[str], list[list[object]]]:
    """The table of the experiment."""
    dense = rows["dense"]
    header = ["model", "parameters", "left", "FLOPs left", *dense["metrics"], "ms", "speed-up"]
    header += [f"{c.name} kept" for c in criteria]
    table = []
    for name, row in rows.items():
        line: list[object] = [name, f"{row['parameters']:,}"]
        line += [share_text(row[c], dense[c]) for c in ("parameters", "FLOPs")]
        line += [f"{value:.2f}" if "dB" in n else f"{value:.3f}" for n, value in row["metrics"].items()]
        line += [f"{times[name]:.2f}", f"{times['dense'] / times[name]:.1f}×"]
        table.append(line + ["yes" if kept else "no" for kept in row["kept"]])
    return header, table


def sensitivities(task: Task, result: ca.Result, dense: Any) -> dict[str, float]:
    """PSNR in dB that the dense model loses when a group alone gives up half of its units, untuned."""

    def metric(variables: Any) -> jax.Array:
        return psnr_of(task.model.apply, variables, task.held_out)

    groups = result.found.groups
    at_boundary = np.array([g.boundary for g in groups.groups], bool)[groups.group_of_unit]
    scores = np.where(at_boundary, result.found.scores, l2(groups, dense))
    falls = jax.jit(lambda v: group_ablation(groups, metric, v, scores))(dense)
    return dict(zip([g.name for g in groups.groups], np.asarray(falls).tolist(), strict=True))


def flat_history(result: ca.Result) -> dict[str, np.ndarray]:
    """Phases and their entries as one dict of arrays."""
    return {f"{p}/{n}": a for p, entries in result.history.items() for n, a in entries.items()}


def write_json(path: Path, content: Any) -> None:
    """Write JSON, readable by eye."""
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
