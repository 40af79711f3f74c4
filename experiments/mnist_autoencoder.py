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
from mnist_figures import boundary_figure, images_figure, latent_figure
from mnist_task import (
    METRICS,
    Data,
    Preset,
    Task,
    criteria_below,
    criteria_marks,
    latencies,
    loss,
    metrics_of,
    psnr_of,
    share_text,
)

import compaware_jax as ca
from compaware_jax.cost import COSTS
from compaware_jax.importance import group_ablation, l2
from compaware_jax.report import (
    Section,
    component_table,
    html_report,
    kept_units_figure,
    save_figures,
    trade_off_figure,
    trajectory_figure,
    whole_sections,
)
from compaware_jax.select import keep_units, round_counts, uniform_counts
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
    name: str | None = None
    out: Path = Path("runs")


@dataclass(frozen=True)
class Schedule:
    """What the settings leave open by default: it depends on the model and the data."""

    budget: float
    dense_steps: int
    dense_learning_rate: float
    fine_tune: int
    learning_rate: float


# Dense models train to convergence on held-out images; more steps on the embedded ones overfit.
SCHEDULES = {
    ("dense", "tfds"): Schedule(0.1, 6_000, 1e-3, 10_000, 4e-3),
    ("dense", "fashion"): Schedule(0.1, 6_000, 1e-3, 10_000, 4e-3),
    ("dense", "embedded"): Schedule(0.1, 3_000, 1e-3, 5_000, 2e-3),
    ("conv", "tfds"): Schedule(0.3, 6_000, 2e-3, 10_000, 2e-3),
    ("conv", "fashion"): Schedule(0.3, 6_000, 2e-3, 10_000, 2e-3),
    ("conv", "embedded"): Schedule(0.3, 2_000, 2e-3, 2_000, 2e-3),
}


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

    uniform = uniform_plan(channels, dense, schedule.budget)
    fresh = task.model.init(jax.random.fold_in(task.init_key, 1))
    rival("uniform L2", dense, uniform)
    rival("from scratch, uniform widths", fresh, uniform)
    rival("from scratch, our widths", fresh, result.plan)

    falls = sensitivities(task, result, dense)
    rows = {n: describe((channels, groups), task, m, criteria) for n, m in models.items()}
    times = latencies({n: m[:2] for n, m in models.items()}, task.held_out["image"][:256])
    result.plan.save(folder / "plan.json")
    write_json(
        folder / "metrics.json",
        {
            "config": {**asdict(config), **asdict(schedule)},
            "data": {"source": task.data.source, "note": task.data.note},
            "criteria": [str(c) for c in criteria],
            "models": rows,
            "coefficients": dict(
                zip([g.name for g in groups.groups], result.coefficients.tolist(), strict=True)
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
    write_report(folder, config, schedule, task, channels, result, models, rows, falls, header, table)
    print(f"\n{seconds:.0f} s; everything is in {folder}, the report in {folder / 'report.html'}")


def uniform_plan(groups: ca.Groups, dense: Any, budget: float) -> ca.Plan:
    """Same share of every group, best units by L2 norm; the latent is left alone, to the rival's favour."""
    cost = COSTS["parameters"](groups)
    whole = [i for i, group in enumerate(groups.groups) if group.coupling]
    counts = uniform_counts(cost, ca.params(budget).limit(groups), whole=whole)
    return ca.plan_units(groups, keep_units(groups, np.asarray(l2(groups, dense)), counts))


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

    groups = result.groups
    at_boundary = np.array([g.boundary for g in groups.groups], bool)[groups.group_of_unit]
    scores = np.where(at_boundary, result.scores, l2(groups, dense))
    falls = jax.jit(lambda v: group_ablation(groups, metric, v, scores))(dense)
    return dict(zip([g.name for g in groups.groups], np.asarray(falls).tolist(), strict=True))


def untuned(
    task: Task, channels: ca.Groups, dense: Any, result: ca.Result
) -> dict[str, list[tuple[float, float]]]:
    """PSNR at several budgets without fine-tune: uniform L2 on dense weights, ours after the search."""

    @jax.jit
    def measure(variables: Any) -> jax.Array:
        return psnr_of(task.model.apply, variables, task.held_out)

    lines: dict[str, list[tuple[float, float]]] = {"uniform L2, not tuned": [], "ours, not tuned": []}
    cost = COSTS["parameters"](result.groups)
    for share in (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0):
        counts = round_counts(cost, result.coefficients, int(share * cost.total))
        ours = ca.plan_units(result.groups, keep_units(result.groups, result.scores, counts))
        for line, plan, weights in zip(
            lines.values(), (uniform_plan(channels, dense, share), ours), (dense, result.adapted), strict=True
        ):
            masked = ca.expand(ca.shrink(weights, plan), plan)
            line.append((100 * plan.parameters / cost.total, float(measure(masked))))
    return lines


def pixels(plan: ca.Plan) -> dict[str, np.ndarray]:
    """Which of an image's pixels the small model reads, and which it writes by more than a bias."""
    kept_of = {leaf.path: kept for leaf, kept in zip(plan.leaves, plan.kept, strict=True)}
    ends = {"read": ("params/encoder/dense1/kernel", 0), "written": ("params/decoder/image/kernel", 1)}
    kept = {name: kept_of[path][axis] for name, (path, axis) in ends.items()}
    return {n: np.isin(np.arange(784), np.arange(784) if k is None else k) for n, k in kept.items()}


def write_report(
    folder: Path,
    config: Config,
    schedule: Schedule,
    task: Task,
    channels: ca.Groups,
    result: ca.Result,
    models: Mapping[str, tuple[Any, Any, ca.Plan | None]],
    rows: Mapping[str, Any],
    falls: Mapping[str, float],
    header: list[str],
    table: list[list[object]],
) -> None:
    """Figures and the HTML page."""
    labels = np.asarray(task.held_out["label"])
    first = np.concatenate([np.flatnonzero(labels == d)[:1] for d in range(10)])
    outputs = {
        n: jax.device_get(jax.jit(models[n][0])(models[n][1], task.held_out["image"][:2000]))
        for n in ("dense", "compressed", "uniform L2")
    }
    images = {"original": np.asarray(task.held_out["image"][first])}
    images |= {n: out["image"][first] for n, out in outputs.items()}
    share = result.history["search"]["share"]
    metric = "PSNR (dB)"
    points = {
        n: [(100 * row["parameters"] / rows["dense"]["parameters"], row["metrics"][metric])]
        for n, row in rows.items()
    }
    points |= untuned(task, channels, models["dense"][1], result)
    groups = result.groups
    figures = {
        "trade_off": trade_off_figure(points, metric=f"{metric}, held-out"),
        "kept_units": kept_units_figure(groups, result.plan),
        "coefficients": trajectory_figure(groups, share, config.search.steps),
        "images": images_figure(images),
        "latent": latent_figure({n: outputs[n]["latent"] for n in ("dense", "compressed")}, labels[:2000]),
    }
    if config.model == "dense":
        mean = np.asarray(task.held_out["image"].mean(0)[..., 0])
        figures["boundary"] = boundary_figure(pixels(result.plan), mean)
    names = dict(zip(figures, save_figures(folder, figures), strict=True))
    before, after = result.costs["parameters"]
    verdict = "; ".join(
        f"{v.criterion}: {'kept' if v.kept else 'NOT KEPT'} ({v.before:.4g} → {v.after:.4g})"
        for v in result.verdicts
    )
    boundary = []
    if "boundary" in names:
        text = (
            "Marked: what the small model reads of an image, and what it writes of one by more than a bias; "
            "behind it the mean image."
        )
        boundary = [Section("Pixels", text, figures=[names["boundary"]])]
    sections = [
        Section(
            "Answer",
            f"{before:,} parameters went in, {after:,} came out ({after / before:.2%}; asked: at most "
            f"{schedule.budget:.2%}).\n\n{verdict}.",
        ),
        Section("Comparison", "Every pruned rival had the same fine-tune.", header, table),
        Section(
            "Trade-off",
            "Single marks: after the fine-tune. Lines: the same weights cut to other budgets and measured "
            "as they are, without any fine-tune.",
            figures=[names["trade_off"]],
        ),
        Section(
            "What each component paid",
            "",
            ["component", "parameters before", "after", "left"],
            component_table(groups, result.plan),
            [names["kept_units"]],
        ),
        Section(
            "Coefficients",
            "Kept share of each group while coefficients and weights are optimised together. The table "
            "sets beside it how sensitive the criterion was at the start: PSNR that the dense model loses "
            "when the group alone gives up half of its units, without fine-tune.",
            ["group", "units", "kept", "sensitivity (dB)"],
            [
                (g.name, g.units, f"{share:.1%}", f"{fall:.2f}")
                for g, share, fall in zip(
                    groups.groups,
                    result.coefficients,
                    falls.values(),
                    strict=True,
                )
            ],
            [names["coefficients"]],
        ),
        Section("Images", figures=[names["images"]]),
        *boundary,
        Section("Latent space", figures=[names["latent"]]),
        *whole_sections(groups, result.plan),
        Section("Data", task.data.note),
    ]
    warning = task.data.note if task.data.source == "embedded" else ""
    name = "Fashion-MNIST" if task.data.source == "fashion" else "MNIST"
    html_report(folder / "report.html", f"{name} autoencoder, {config.model}", sections, warning=warning)


def flat_history(result: ca.Result) -> dict[str, np.ndarray]:
    """Phases and their entries as one dict of arrays."""
    return {f"{p}/{n}": a for p, entries in result.history.items() for n, a in entries.items()}


def write_json(path: Path, content: Any) -> None:
    """Write JSON, readable by eye."""
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
