"""The report of the main job: figures and one HTML page that holds everything itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from mnist_figures import boundary_figure, images_figure, latent_figure
from mnist_task import Preset, Task, psnr_of, uniform_plan

import compaware_jax as ca
from compaware_jax.cost import COSTS
from compaware_jax.report import (
    Section,
    html_report,
    kept_units_figure,
    save_figures,
    trade_off_figure,
    trajectory_figure,
    whole_sections,
)
from compaware_jax.search.select import keep_units, round_counts
from compaware_jax.surgery.plan import component_table


def untuned(
    task: Task, channels: ca.Groups, dense: Any, result: ca.Result
) -> dict[str, list[tuple[float, float]]]:
    """PSNR at several budgets without fine-tune: uniform L2 on dense weights, ours after the search."""

    @jax.jit
    def measure(variables: Any) -> jax.Array:
        return psnr_of(task.model.apply, variables, task.held_out)

    lines: dict[str, list[tuple[float, float]]] = {"uniform L2, not tuned": [], "ours, not tuned": []}
    cost = COSTS["parameters"](result.found.groups)
    for share in (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0):
        counts = round_counts(cost, result.found.coefficients, int(share * cost.total))
        ours = ca.plan_units(
            result.found.groups, keep_units(result.found.groups, result.found.scores, counts)
        )
        for line, plan, weights in zip(
            lines.values(),
            (uniform_plan(channels, dense, share), ours),
            (dense, result.found.variables),
            strict=True,
        ):
            masked = ca.expand(ca.shrink(weights, plan), plan)
            line.append((100 * plan.parameters / cost.total, float(measure(masked))))
    return lines


# Per preset what is read of images and written of them: the first and the last layer's pixels, or the
# positions of the 7×7 images that dense layers read and write; path and axis of the kernel.
ENDS: dict[Preset, tuple[int, dict[str, tuple[str, int]]]] = {
    "dense": (
        28,
        {
            "pixels read": ("params/encoder/dense1/kernel", 0),
            "pixels written": ("params/decoder/image/kernel", 1),
        },
    ),
    "conv": (
        7,
        {
            "positions read": ("params/encoder/dense1/kernel", 0),
            "positions written": ("params/decoder/dense2/kernel", 1),
        },
    ),
}


def places(preset: Preset, plan: ca.Plan) -> dict[str, np.ndarray]:
    """Where the small model reads an image, and writes one by more than a bias; (side, side) each."""
    kept_of = {leaf.path: kept for leaf, kept in zip(plan.leaves, plan.kept, strict=True)}
    side, ends = ENDS[preset]
    everywhere = np.arange(side**2)
    kept = {name: kept_of[path][axis] for name, (path, axis) in ends.items()}
    inside = {n: np.isin(everywhere, everywhere if k is None else k) for n, k in kept.items()}
    return {name: flags.reshape(side, side) for name, flags in inside.items()}


@dataclass(frozen=True)
class Finished:
    """A finished run of the main job.

    Attributes:
      task: data and model.
      budget: share of the parameters that was asked for.
      search_steps: steps of the search.
      channels: the groups that rivals know of.
      result: of `compress`.
      models: per name the function, its variables and its plan.
      rows: per name its costs and metrics.
      falls: per group how sensitive the criterion is to it, in dB.
      header: of the table of all models.
      table: its rows.
    """

    task: Task
    budget: float
    search_steps: int
    channels: ca.Groups
    result: ca.Result
    models: Mapping[str, tuple[Any, Any, ca.Plan | None]]
    rows: Mapping[str, Any]
    falls: Mapping[str, float]
    header: list[str]
    table: list[list[object]]


def write_report(folder: Path, run: Finished) -> None:
    """Figures and the HTML page."""
    task, result, models, rows = run.task, run.result, run.models, run.rows
    labels = np.asarray(task.held_out["label"])
    first = np.concatenate([np.flatnonzero(labels == d)[:1] for d in range(10)])
    outputs = {
        n: jax.device_get(jax.jit(models[n][0])(models[n][1], task.held_out["image"][:2000]))
        for n in ("dense", "compressed", "uniform L2")
        if n in models
    }
    images = {"original": np.asarray(task.held_out["image"][first])}
    images |= {n: out["image"][first] for n, out in outputs.items()}
    share = result.history["search"]["share"]
    metric = "PSNR (dB)"
    points = {
        n: [(100 * row["parameters"] / rows["dense"]["parameters"], row["metrics"][metric])]
        for n, row in rows.items()
    }
    points |= untuned(task, run.channels, models["dense"][1], result)
    groups = result.found.groups
    figures = {
        "trade_off": trade_off_figure(points, metric=f"{metric}, held-out"),
        "kept_units": kept_units_figure(groups, result.plan),
        "coefficients": trajectory_figure(groups, share, run.search_steps),
        "images": images_figure(images),
        "latent": latent_figure({n: outputs[n]["latent"] for n in ("dense", "compressed")}, labels[:2000]),
    }
    mean = np.asarray(task.held_out["image"].mean(0)[..., 0])
    figures["boundary"] = boundary_figure(places(task.settings["preset"], result.plan), mean)
    names = dict(zip(figures, save_figures(folder, figures), strict=True))
    before, after = result.costs["parameters"]
    verdict = "; ".join(
        f"{v.criterion}: {'kept' if v.kept else 'NOT KEPT'} ({v.before:.4g} → {v.after:.4g})"
        for v in result.verdicts
    )
    sections = [
        Section(
            "Answer",
            f"{before:,} parameters went in, {after:,} came out ({after / before:.2%}; asked: at most "
            f"{run.budget:.2%}).\n\n{verdict}.",
        ),
        Section("Comparison", "Every pruned rival had the same fine-tune.", run.header, run.table),
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
                    result.found.coefficients,
                    run.falls.values(),
                    strict=True,
                )
            ],
            [names["coefficients"]],
        ),
        Section("Images", figures=[names["images"]]),
        Section(
            "Boundary",
            "Marked: what the small model reads of an image, and what it writes of one by more than a bias; "
            "behind it the mean image.",
            figures=[names["boundary"]],
        ),
        Section("Latent space", figures=[names["latent"]]),
        *whole_sections(groups, result.plan),
        Section("Data", task.data.note),
    ]
    warning = task.data.note if task.data.source == "embedded" else ""
    name = "Fashion-MNIST" if task.data.source == "fashion" else "MNIST"
    html_report(
        folder / "report.html", f"{name} autoencoder, {task.settings['preset']}", sections, warning=warning
    )
