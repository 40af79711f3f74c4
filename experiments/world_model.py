"""A world model with a controller, made small for what the application needs of it.

Claim: of one trained model, the application decides which components stay. At a twentieth of the parameters
it still swings the pendulum up and balances it, and still predicts its frames; uniform L2 pruning with the
same fine-tune does not do both.

    python experiments/world_model.py
    python experiments/world_model.py --budget 0.02 --applications control

Three applications: "control" needs the action, "prediction" the frames, "both" the two of them. One criterion
is how upright the pendulum is in the last 2.5 of 10 s, the small model in the loop; another the PSNR of the
frames up to three steps ahead. Writes runs/<name>/: metrics.json, a plan per small model, components.png,
swing_up.png and checkpoints; started again, it goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure
from mnist_task import latencies, uniform_plan
from pendulum import Apply, Batch, WorldModel, apply, batches, control, swing_up

import compaware_jax as ca
from compaware_jax.metrics import psnr
from compaware_jax.report import STYLE, WIDTH, save_figures
from compaware_jax.surgery.plan import component_table
from compaware_jax.tables import text_table
from compaware_jax.training.criteria import measure

Application = Literal["both", "control", "prediction"]
UPRIGHT, PSNR = "upright", "PSNR (dB)"
NEEDS = {"both": (UPRIGHT, PSNR), "control": (UPRIGHT,), "prediction": (PSNR,)}
"""The criteria of each application."""
LAST = 50
"""Steps at the end of a swing-up, when the pendulum has to be upright."""


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      budget: share of the parameters that may stay.
      applications: for what the model is made small.
      upright: least mean cosine of the angle at the end.
      psnr: least PSNR of the frames, in dB.
      dense_steps: steps of the dense training.
      dense_learning_rate: its learning rate (Adam, cosine to zero).
      search: settings of the search.
      fine_tune: steps after pruning, for every model the same.
      learning_rate: of those (Adam, cosine to zero).
      batch: batch size.
      seed: of everything random.
      name: of the folder under `out`; by default the budget is in it.
      out: where runs are kept.
    """

    budget: float = 0.05
    applications: tuple[Application, ...] = get_args(Application)
    upright: float = 0.99
    psnr: float = 30.0
    dense_steps: int = 5_000
    dense_learning_rate: float = 1e-3
    search: ca.GradientSearch = field(default_factory=ca.GradientSearch)
    fine_tune: int = 4_000
    learning_rate: float = 2e-3
    batch: int = 128
    seed: int = 0
    name: str | None = None
    out: Path = Path("runs")


class Model(NamedTuple):
    """A model, and what it keeps of the dense one."""

    apply: Apply
    variables: Any
    plan: ca.Plan | None = None


def action_loss(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """Mean squared difference to the expert's action."""
    return jnp.mean((apply(variables, batch["view"], batch["actions"])["action"] - batch["expert"]) ** 2)


def frame_loss(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """Mean squared error of the frames; a frame's mean square is about a tenth of an action's."""
    return 10 * jnp.mean((apply(variables, batch["view"], batch["actions"])["frames"] - batch["frames"]) ** 2)


def both_losses(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """Their sum."""
    return action_loss(apply, variables, batch) + frame_loss(apply, variables, batch)


LOSSES = {"both": both_losses, "control": action_loss, "prediction": frame_loss}


def upright_of(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """Mean cosine of the angle at the end of swing-ups in which the model acts."""
    angles = swing_up(partial(control, apply, variables), batch["start"])
    return jnp.mean(jnp.cos(angles[-LAST:]))


def psnr_of(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """Peak signal-to-noise ratio of the frames now and ahead, in dB."""
    return psnr(apply(variables, batch["view"], batch["actions"])["frames"], batch["frames"])


def main(config: Config) -> None:
    """Run the experiment and print its tables."""
    folder = config.out / (config.name or f"world-model-{config.budget:g}")
    checkpoints = folder / "checkpoints"
    data_key, init_key, held_key, start_key, search_key = jax.random.split(jax.random.key(config.seed), 5)
    draw = batches(config.batch, data_key)
    held_out = batches(1_000, held_key)(jnp.zeros((), int)) | {"start": hanging(64, start_key)}
    example = held_out["view"][:1], held_out["actions"][:1]
    criteria = {
        UPRIGHT: ca.at_least(UPRIGHT, upright_of, config.upright, trainable=False),
        PSNR: ca.at_least(PSNR, psnr_of, config.psnr),
    }

    def train(name: str, apply: Apply, variables: Any, loss: Any, steps: int, rate: float) -> Any:
        where = checkpoints / name.replace(" ", "-").replace(",", "")
        job = {"name": name, "batch": config.batch, "seed": config.seed}
        return ca.fit(
            apply, variables, loss, draw, steps, learning_rate=rate, label=name, directory=where, job=job
        )[0]

    fresh = WorldModel().init(init_key, *example)
    dense = train("dense", apply, fresh, both_losses, config.dense_steps, config.dense_learning_rate)
    groups = ca.find_groups(apply, dense, *example, boundary=True)
    channels = ca.find_groups(apply, dense, *example)
    print(groups, "\n")

    models = {"dense": Model(apply, dense)}
    for name in config.applications:
        result = ca.compress(
            apply,
            dense,
            LOSSES[name],
            draw,
            groups=groups,
            budget=ca.params(config.budget),
            criteria=[criteria[need] for need in NEEDS[name]],
            held_out=held_out,
            search=config.search,
            fine_tune=config.fine_tune,
            learning_rate=config.learning_rate,
            key=search_key,
            directory=checkpoints / name,
            allow_failing=True,
        )
        models[f"for {name}"] = Model(result.apply, result.variables, result.plan)
        uniform = uniform_plan(channels, dense, config.budget)
        small, label = ca.slim(apply, uniform), f"uniform L2, for {name}"
        cut = ca.shrink(dense, uniform)
        variables = train(label, small, cut, LOSSES[name], config.fine_tune, config.learning_rate)
        models[label] = Model(small, variables, uniform)
    write(folder, models, [*criteria.values()], groups, held_out)


def hanging(count: int, key: jax.Array) -> jax.Array:
    """States (count, 2) at rest at the bottom, more or less."""
    return jnp.asarray([jnp.pi, 0.0]) + jax.random.uniform(key, (count, 2), minval=-0.5, maxval=0.5)


def write(
    folder: Path,
    models: Mapping[str, Model],
    criteria: Sequence[ca.Criterion],
    groups: ca.Groups,
    held_out: Batch,
) -> None:
    """Print the tables; write the figures, the plans and the figures behind the tables."""
    metrics = {name: measure(criteria, m.apply, m.variables, held_out) for name, m in models.items()}
    loops = {name: (partial(control, m.apply), m.variables) for name, m in models.items()}
    times = latencies(loops, held_out["view"][:1], rounds=200)
    sizes = {name: sum(x.size for x in jax.tree.leaves(m.variables)) for name, m in models.items()}
    left = {name: size / sizes["dense"] for name, size in sizes.items()}
    rows = [
        [
            name,
            f"{left[name]:.1%}",
            *(f"{found[c.name]:.3f}" + ("" if c.keeps(found[c.name]) else " not kept") for c in criteria),
            f"{times[name]:.3f}",
        ]
        for name, found in metrics.items()
    ]
    header = ["model", "parameters", *map(str, criteria), "ms per action"]
    print(text_table(header, rows, "Held-out views, and swing-ups from hanging"))

    shares = {
        name: {component: after / before for component, before, after, _ in component_table(groups, m.plan)}
        for name, m in models.items()
        if m.plan is not None
    }
    content = {name: {"left": left[name], **metrics[name], "components": shares.get(name)} for name in models}
    (folder / "metrics.json").write_text(json.dumps(content, indent=1) + "\n")
    # A uniform share is the same for every application.
    shares = {name.partition(", for")[0]: share for name, share in shares.items()}
    components = list(next(iter(shares.values())))
    lines = [[name, *(f"{share[c]:.1%}" for c in components)] for name, share in shares.items()]
    print(text_table(["model", *components], lines, "What is left of each component"))

    def angles_of(m: Model) -> np.ndarray:
        return np.asarray(
            jax.jit(lambda v: swing_up(partial(control, m.apply, v), held_out["start"][:8]))(m.variables)
        )

    angles = {name: angles_of(m) for name, m in models.items()}
    figures = {"components": components_figure(shares), "swing_up": swing_up_figure(angles)}
    save_figures(folder, figures)
    for name, m in models.items():
        if m.plan is not None:
            m.plan.save(folder / f"plan-{name.replace(' ', '-').replace(',', '')}.json")
    print(f"everything is in {folder}")


def components_figure(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """What is left of each component, by model."""
    components = list(next(iter(shares.values())))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
        for number, (name, share) in enumerate(shares.items()):
            places = np.arange(len(components)) + (number - (len(shares) - 1) / 2) * 0.8 / len(shares)
            axes.bar(places, [100 * share[c] for c in components], 0.8 / len(shares), label=name)
        axes.set_xticks(range(len(components)), components)
        axes.set_ylabel("parameters left (%)")
        axes.legend(fontsize=8)
    return figure


def swing_up_figure(angles: Mapping[str, np.ndarray]) -> Figure:
    """Height of the pendulum over time, by model, in a few swing-ups each."""
    with plt.rc_context(STYLE):
        size = (WIDTH, 1.1 * len(angles))
        figure, grid = plt.subplots(len(angles), 1, figsize=size, sharex=True, layout="constrained")
        for axes, (name, angle) in zip(np.atleast_1d(grid), angles.items(), strict=True):
            axes.plot(np.cos(angle), lw=0.8, alpha=0.7)
            axes.set_ylim(-1.1, 1.1)
            axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("step")
        figure.supylabel("height of the tip (m)", fontsize=9)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
