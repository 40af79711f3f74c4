"""Against every rival, at every budget: the same dense weights, the same data order, the same fine-tune.

Claim: at no budget and no seed is the compressed model below any rival.

    python -m venv peers && peers/bin/pip install torch torch-pruning
    python experiments/compare.py --data tfds --torch-python peers/bin/python

* Rivals: Torch-Pruning's importances, uniform and global, on the same dense weights; the same after 4,000
  more dense steps, for the best of them; the dense model itself, trained on.
* From scratch: our widths, uniform widths, and the best of 20 random widths.
* Everyone gets the same fine-tune steps after pruning; rivals and fresh models get the best of three
  learning rates by their held-out PSNR (to their favour), ours its default.
* What our search adds is timed beside 4,000 plain dense steps.

Finished cells are kept as files under `runs/compare/…/cells`, so an interrupted comparison goes on where it
was; several workers share the work with ``--worker 0 2`` and ``--worker 1 2`` (then run without, for the
table). It writes `table.md`, `compare.json` and `compare.png`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mnist_autoencoder import SCHEDULES
from mnist_task import Data, Preset, Task, loss, psnr_of

import compaware_jax as ca
from compaware_jax.coefficients import on_budget
from compaware_jax.cost import COSTS
from compaware_jax.fit import adam_cosine, fit_step
from compaware_jax.groups import Groups
from compaware_jax.importance import l2
from compaware_jax.select import keep_units, round_counts, uniform_counts

HERE = Path(__file__).parent
CHUNK = 500


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      data: where the digits come from.
      model: preset of the autoencoder.
      budgets: shares of the parameters that may stay.
      seeds: of the dense model, the data order and the search.
      rates: learning rates of which rivals and fresh models get the best.
      fine_tune: steps after pruning, for everyone; default that of the main experiment.
      extra: more dense steps for the best rival of each budget.
      random_widths: allocations tried from scratch, on the first seed.
      batch: batch size.
      torch_python: Python of an environment with torch and torch-pruning; without it, no such rivals.
      worker: this worker's number and how many there are; the table is made without it.
      out: where runs are kept.
    """

    data: Data = "auto"
    model: Preset = "dense"
    budgets: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03)
    seeds: int = 5
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    fine_tune: int | None = None
    extra: int = 4_000
    random_widths: int = 20
    batch: int = 128
    torch_python: str | None = None
    worker: tuple[int, int] | None = None
    out: Path = Path("runs/compare")


@dataclass(frozen=True)
class Cells:
    """Results kept as files, one per cell."""

    folder: Path

    def get(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The result of a cell, computed if no file holds it.

        Args:
          key: what identifies it, JSON-able.
          compute: makes a picklable result.
        """
        path = self.path(key)
        if not path.exists():
            result = compute()
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(pickle.dumps(result))
            part.replace(path)
        return pickle.loads(path.read_bytes())

    def path(self, key: Sequence[Any]) -> Path:
        """The file of a cell."""
        text = json.dumps(key)
        name = "".join(c if c.isalnum() or c in ".-" else "_" for c in text.strip("[]").replace('"', ""))
        return self.folder / f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.pkl"


@dataclass(frozen=True)
class Seed:
    """One seed's task, dense model and groups."""

    config: Config
    cells: Cells
    seed: int

    @cached_property
    def task(self) -> Task:
        """Data in this seed's order, and the model."""
        return Task(self.config.data, self.config.model, batch=self.config.batch, seed=self.seed)

    @cached_property
    def schedule(self) -> Any:
        """Steps and learning rates of the main experiment."""
        return SCHEDULES[self.config.model, self.task.data.source]

    @property
    def steps(self) -> int:
        """Fine-tune steps."""
        return self.config.fine_tune or self.schedule.fine_tune

    @cached_property
    def dense(self) -> Any:
        """The dense weights that everyone starts from."""
        train = partial(self.task.dense, self.schedule.dense_steps, self.schedule.dense_learning_rate, None)
        return self.cells.get(["dense", self.seed], lambda: jax.device_get(train()))

    @cached_property
    def dense_trained_on(self) -> Any:
        """The dense weights after more steps, for rivals that spend our search's time so."""
        rate = self.schedule.dense_learning_rate

        def train() -> Any:
            return self.task.fit("more", self.task.model.apply, self.dense, self.config.extra, rate, None)

        return self.cells.get(["dense trained on", self.seed], lambda: jax.device_get(train()))

    @cached_property
    def groups(self) -> Groups:
        """What can leave."""
        return self.task.groups(self.dense)

    @cached_property
    def fresh(self) -> Any:
        """Untrained weights for models from scratch."""
        return self.task.model.init(jax.random.fold_in(self.task.init_key, 1))

    def tuned(self, plan: ca.Plan | None, start: Any) -> dict[float, float]:
        """Held-out PSNR by learning rate after the fine-tune: rates are lanes of a vmap."""
        apply = self.task.model.apply if plan is None else ca.slim(self.task.model.apply, plan)
        start = start if plan is None else ca.shrink(start, plan)
        rates = jnp.array(self.config.rates)

        def rule(rate: jax.Array) -> Any:
            return fit_step(apply, loss, self.task.batches, adam_cosine(rate, self.steps))  # type: ignore[arg-type]

        @jax.jit
        def run(states: Any, first: jax.Array) -> Any:
            def step(states: Any, index: jax.Array) -> Any:
                return jax.vmap(lambda rate, state: rule(rate)[1](state, index)[0])(rates, states), None

            return jax.lax.scan(step, states, first + jnp.arange(CHUNK))[0]

        states = jax.vmap(lambda rate: rule(rate)[0](start))(rates)
        for first in range(0, self.steps, CHUNK):
            states = run(states, jnp.asarray(first))
        measure = jax.jit(lambda v: psnr_of(apply, v, self.task.held_out))
        return {
            rate: float(measure(jax.tree.map(lambda x, i=i: x[i], states.variables)))
            for i, rate in enumerate(self.config.rates)
        }

    def plan_of(self, counts: np.ndarray, weights: Any) -> ca.Plan:
        """The plan with these counts, best units by L2."""
        return ca.plan_units(
            self.groups, keep_units(self.groups, np.asarray(l2(self.groups, weights)), counts)
        )

    def uniform(self, budget: float) -> np.ndarray:
        """The same share of every group but the latent."""
        whole = [i for i, group in enumerate(self.groups.groups) if group.coupling]
        cost = COSTS["parameters"](self.groups)
        return uniform_counts(cost, ca.params(budget).limit(self.groups), whole=whole)

    def random(self, budget: float, number: int) -> np.ndarray:
        """Random counts on the budget: shares log-uniform over a factor of sixteen."""
        cost = COSTS["parameters"](self.groups)
        rng = np.random.default_rng([number, round(1e4 * budget)])
        shares = jnp.asarray(rng.uniform(-2, 2, len(self.groups.groups)) * np.log(2), float)
        counts = on_budget(cost, shares, budget)
        share = np.exp(np.asarray(counts)) / self.groups.sizes
        return round_counts(cost, share, ca.params(budget).limit(self.groups))
