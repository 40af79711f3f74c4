"""The effect of every importance: which units stay, at the same widths.

Claim: which units stay matters little once a model is fine-tuned; how many of which group stay matters more.

    python experiments/importances.py --data tfds

Each importance ranks the units of the trained dense model once. The best of every group stay, at uniform
widths and at those that the search found; then everyone gets the same fine-tune, at the best of the learning
rates, as in `compare.py`, whose settings these are. It writes `importances.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from mnist_task import loss, psnr_of
from protocol import Candidate, Config, Seed, Study, interval

import compaware_jax as ca
from compaware_jax import importance
from compaware_jax.search.boundary import EVIDENCE_STEPS
from compaware_jax.search.select import keep_units
from compaware_jax.tables import markdown_table


@dataclass(frozen=True)
class Trained:
    """What importances are computed from."""

    seed: Seed

    @property
    def groups(self) -> ca.Groups:
        """The channels that can leave."""
        return self.seed.groups

    @property
    def dense(self) -> Any:
        """The trained weights."""
        return self.seed.dense

    @cached_property
    def batch(self) -> Any:
        """The batch that single gradients are of."""
        return self.seed.task.batches(jnp.int32(0))

    @cached_property
    def gradients(self) -> Any:
        """Of the loss on one batch."""
        return jax.jit(jax.grad(self.loss))(self.dense)

    @cached_property
    def evidence(self) -> importance.Evidence:
        """Gathered over many batches."""
        groups, dense, task = self.groups, self.dense, self.seed.task

        @jax.jit
        def gathered() -> importance.Evidence:
            def see(seen: importance.Evidence, index: jax.Array) -> tuple[importance.Evidence, None]:
                gradients = jax.grad(lambda v: loss(task.model.apply, v, task.batches(index)))(dense)
                return importance.observe(seen, groups, dense, gradients), None

            return jax.lax.scan(see, importance.no_evidence(groups), jnp.arange(EVIDENCE_STEPS))[0]

        return gathered()

    def loss(self, variables: Any) -> jax.Array:
        """On one batch."""
        return loss(self.seed.task.model.apply, variables, self.batch)

    def metric(self, variables: Any) -> jax.Array:
        """PSNR on one batch."""
        return psnr_of(self.seed.task.model.apply, variables, self.batch)

    def compiled(self, scores: Callable[[ca.Groups, Callable, Any], jax.Array], function: Callable) -> Any:
        """Scores that differentiate a function of the variables."""
        return jax.jit(lambda v: scores(self.groups, function, v))(self.dense)


IMPORTANCES: dict[str, Callable[[Trained], Any]] = {
    "random": lambda t: importance.random(t.groups, jax.random.key(t.seed.seed)),
    "L1 norm": lambda t: importance.l1(t.groups, t.dense),
    "L2 norm": lambda t: importance.l2(t.groups, t.dense),
    "LAMP": lambda t: importance.lamp(t.groups, t.dense),
    "FPGM": lambda t: importance.fpgm(t.groups, t.dense),
    "activation": lambda t: importance.activation(t.groups, t.dense, t.batch["image"][:1]),
    "Taylor, first order": lambda t: importance.taylor(t.groups, t.dense, t.gradients),
    "Taylor, second order": lambda t: t.compiled(importance.taylor2, t.loss),
    "OBD": lambda t: t.compiled(importance.obd, t.loss),
    "Fisher": lambda t: importance.fisher(t.evidence),
    "gradient accumulation": lambda t: importance.accumulated(t.evidence),
    "Bayesian uncertainty": lambda t: importance.bayesian(t.evidence),
    "criterion's slope": lambda t: t.compiled(importance.gradient_sensitivity, t.metric),
    "criterion's fall": lambda t: t.compiled(importance.ablation, t.metric),
}


@cache
def trained(seed: Seed) -> Trained:
    """A seed's, kept for the importances to come."""
    return Trained(seed)


def kept_by(seed: Seed, name: str, widths: str, budget: float) -> Candidate:
    """What an importance keeps."""
    if widths == "uniform":
        counts = seed.uniform(budget)
    else:
        counts = np.array([kept for _, kept, _ in seed.our_plan(budget, boundary=False).counts])
    plan = seed.kept_by(keep_units(seed.groups, np.asarray(IMPORTANCES[name](trained(seed))), counts))
    return Candidate(plan, seed.dense)


def main(config: Config) -> None:
    """Fine-tune what every importance keeps and print the table."""
    study = Study(config)
    columns = [(widths, b) for b in config.budgets for widths in ("uniform", "ours")]
    cells = {("importance", n, *at): at for at in columns for n in IMPORTANCES}
    study.tune(
        {key: partial(kept_by, name=key[1], widths=widths, budget=b) for key, (widths, b) in cells.items()}
    )
    rows = [[n, *(interval(study.reached(("importance", n, *at))) for at in columns)] for n in IMPORTANCES]
    header = ["PSNR (dB)", *(f"{100 * b:g} %, {widths} widths" for widths, b in columns)]
    table = markdown_table(header, rows)
    (study.folder / "importances.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, default=Config(budgets=(0.1,), seeds=1)))
