"""The effect of every importance: which units stay, at the same widths.

Claim: which units stay matters little once a model is fine-tuned; how many of which group stay matters more.

    python experiments/importances.py --data tfds

Each importance ranks the units of the trained dense model once. The best of every group stay, at uniform
widths and at those that the search found; then everyone gets the same fine-tune, at the best of the learning
rates, as in `compare.py`, whose settings these are. It writes `importances.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from compare import CHANNELS
from mnist_task import loss, psnr_of
from protocol import Config, Rates, Seed, Study, at_best_rate, interval

import compaware_jax as ca
from compaware_jax import importance
from compaware_jax.select import keep_units
from compaware_jax.tables import markdown_table

EVIDENCE_STEPS = 100


def scores(seed: Seed) -> Mapping[str, np.ndarray]:
    """Every importance of the dense model's units, shape (units,) each."""
    task, groups, dense = seed.task, seed.groups, seed.dense
    apply = task.model.apply
    batches = task.batches

    def loss_at(index: Any) -> Callable[[Any], jax.Array]:
        return lambda v: loss(apply, v, batches(index))

    def metric(v: Any) -> jax.Array:
        return psnr_of(apply, v, batches(jnp.int32(0)))

    @jax.jit
    def evidence() -> importance.Evidence:
        def see(seen: importance.Evidence, index: jax.Array) -> tuple[importance.Evidence, None]:
            return importance.observe(seen, groups, dense, jax.grad(loss_at(index))(dense)), None

        return jax.lax.scan(see, importance.no_evidence(groups), jnp.arange(EVIDENCE_STEPS))[0]

    seen, first = evidence(), loss_at(jnp.int32(0))
    gradients = jax.jit(jax.grad(first))(dense)
    found = {
        "random": importance.random(groups, jax.random.key(seed.seed)),
        "L1 norm": importance.l1(groups, dense),
        "L2 norm": importance.l2(groups, dense),
        "LAMP": importance.lamp(groups, dense),
        "FPGM": importance.fpgm(groups, dense),
        "activation": importance.activation(groups, dense, batches(jnp.int32(0))["image"][:1]),
        "Taylor, first order": importance.taylor(groups, dense, gradients),
        "Taylor, second order": jax.jit(lambda v: importance.taylor2(groups, first, v))(dense),
        "OBD": jax.jit(lambda v: importance.obd(groups, first, v))(dense),
        "Fisher": importance.fisher(seen),
        "gradient accumulation": importance.accumulated(seen),
        "Bayesian uncertainty": importance.bayesian(seen),
        "criterion's slope": jax.jit(lambda v: importance.gradient_sensitivity(groups, metric, v))(dense),
        "criterion's fall": jax.jit(lambda v: importance.ablation(groups, metric, v))(dense),
    }
    return {name: np.asarray(values) for name, values in found.items()}


def main(config: Config) -> None:
    """Fine-tune what every importance keeps and print the table."""
    study = Study(config)
    found: dict[tuple[str, str, float], list[Rates]] = {}
    for seed in study.seeds:
        by_name = scores(seed)
        for b in config.budgets:
            channels = study.cells.one((CHANNELS, b, seed.seed), partial(seed.ours, b, seed.groups))
            ours = np.array([kept for _, kept, _ in ca.Plan.from_json(channels["plan"]).counts])
            for widths, counts in (("uniform", seed.uniform(b)), ("ours", ours)):
                for name, values in by_name.items():
                    plan = seed.kept_by(keep_units(seed.groups, values, counts))
                    key = ("importance", name, widths, b, seed.seed)
                    cell = study.cells.one(key, partial(seed.tuned, plan, seed.dense))
                    found.setdefault((name, widths, b), []).append(cell)
    if config.worker is not None:
        return
    columns = [(widths, b) for b in config.budgets for widths in ("uniform", "ours")]
    names = dict.fromkeys(name for name, _, _ in found)
    rows = [[n, *(interval(at_best_rate(found[n, *column])) for column in columns)] for n in names]
    header = ["PSNR (dB)", *(f"{100 * b:g} %, {widths} widths" for widths, b in columns)]
    table = markdown_table(header, rows)
    (study.folder / "importances.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, default=Config(budgets=(0.1,), seeds=1)))
