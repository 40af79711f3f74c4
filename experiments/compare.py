"""Against every rival, at every budget: the same dense weights, the same data order, the same fine-tune.

Claim: at no budget and no seed is the compressed model below any rival.

    python -m venv peers && peers/bin/pip install torch torch-pruning
    python experiments/compare.py --data tfds --torch-python peers/bin/python

* Rivals: Torch-Pruning's importances, uniform and global, on the same dense weights; the same after 4,000
  more dense steps, for the best of them; the dense model itself, trained on.
* Ours once more without the boundary: only channels leave, as with the rivals.
* From scratch: our plan, uniform widths, and the best of 20 random widths.
* Everyone gets the same fine-tune steps after pruning, and the best of three learning rates by the mean of
  their held-out PSNR over seeds.
* What our search adds is timed beside 4,000 plain dense steps.

Finished cells are kept as files under `runs/compare/…/cells`, so an interrupted comparison goes on where it
was; several workers share the work with ``--worker 0 2`` and ``--worker 1 2`` (then run without, for the
table). It writes `table.md`, `compare.json` and `compare.png`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from mnist_autoencoder import SCHEDULES
from mnist_task import Data, Preset, Task, loss, psnr_of
from scipy import stats

import compaware_jax as ca
from compaware_jax.coefficients import Problem, on_budget
from compaware_jax.cost import COSTS, parameter_cost
from compaware_jax.fit import adam_cosine, fit_step
from compaware_jax.groups import Groups
from compaware_jax.importance import l2
from compaware_jax.report import save_figures, trade_off_figure
from compaware_jax.select import keep_units, round_counts, uniform_counts
from compaware_jax.tables import markdown_table

HERE = Path(__file__).parent
CHUNK = 500


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      data: which images, as in the main experiment.
      model: preset of the autoencoder.
      budgets: shares of the parameters that may stay.
      seeds: of the dense model, the data order and the search.
      rates: learning rates of which rivals and fresh models get the best.
      dense_steps: of the dense training; default that of the main experiment.
      search: settings of ours.
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
    dense_steps: int | None = None
    search: ca.GradientSearch = field(default_factory=ca.GradientSearch)
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
        steps = self.config.dense_steps or self.schedule.dense_steps
        train = partial(self.task.dense, steps, self.schedule.dense_learning_rate, None)
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
        """The channels that can leave: what rivals know of."""
        return self.task.groups(self.dense, boundary=False)

    @cached_property
    def all_groups(self) -> Groups:
        """Pixels that are read or written as well."""
        return self.task.groups(self.dense)

    @cached_property
    def fresh(self) -> Any:
        """Untrained weights for models from scratch."""
        return self.task.model.init(jax.random.fold_in(self.task.init_key, 1))

    def tuned(self, plan: ca.Plan | None, start: Any) -> dict[float, float]:
        """Held-out PSNR by learning rate after the fine-tune: rates are lanes of a vmap."""
        apply = self.task.model.apply if plan is None else ca.slim(self.task.model.apply, plan)
        start = start if plan is None else ca.shrink(start, plan)
        rates, chunk = jnp.array(self.config.rates), math.gcd(self.steps, CHUNK)

        def rule(rate: jax.Array) -> Any:
            return fit_step(apply, loss, self.task.batches, adam_cosine(rate, self.steps))  # type: ignore[arg-type]

        @jax.jit
        def run(states: Any, first: jax.Array) -> Any:
            def step(states: Any, index: jax.Array) -> Any:
                return jax.vmap(lambda rate, state: rule(rate)[1](state, index)[0])(rates, states), None

            return jax.lax.scan(step, states, first + jnp.arange(chunk))[0]

        states = jax.vmap(lambda rate: rule(rate)[0](start))(rates)
        for first in range(0, self.steps, chunk):
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

    def ours(self, budget: float, groups: Groups) -> dict[str, Any]:
        """What `compress` does with its defaults, fine-tuned at all learning rates as the rivals are."""
        plan, weights, seconds = self.task.search(
            self.config.search, self.dense, groups, budget, self.task.search_key
        )
        return {"psnr": self.tuned(plan, weights), "plan": plan, "seconds": seconds}

    def rivals(self, weights: Any, budgets: Sequence[float]) -> dict[str, dict[float, np.ndarray]]:
        """Per rival and budget the units that Torch-Pruning keeps."""
        folder = self.cells.folder / f"torch-{self.seed}-{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        layers = [weights["params"][part][layer] for part, layer in LAYERS]
        arrays = {f"w{i}": layer["kernel"] for i, layer in enumerate(layers)}
        arrays |= {f"b{i}": layer["bias"] for i, layer in enumerate(layers)}
        images = np.asarray(self.task.batches(jnp.asarray(0))["image"]).reshape(self.config.batch, -1)
        np.savez(folder / "dense.npz", latent=2, images=images, **arrays)
        command = [str(self.config.torch_python), str(HERE / "peers/torch_prune.py")]
        command += [str(folder / "dense.npz"), str(folder / "kept.json"), "--budgets", *map(str, budgets)]
        subprocess.run(command, check=True, capture_output=True)
        found = json.loads((folder / "kept.json").read_text())["kept"]
        return {
            rival: {float(budget): self._units(kept) for budget, kept in by_budget.items()}
            for rival, by_budget in found.items()
        }

    def _units(self, kept: Sequence[Sequence[int]]) -> np.ndarray:
        units = np.zeros(self.groups.units, bool)
        for group, channels in zip(self.groups.groups, kept, strict=True):
            units[group.offset + np.array(channels)] = True
        return units

    def step_times(self) -> dict[str, float]:
        """Seconds per dense step and per step of the search, in turns."""
        search = self.config.search
        problem = Problem(
            self.task.model.apply, loss, self.task.batches, self.all_groups, parameter_cost(self.all_groups)
        )
        found = search.build(problem)
        schedule = adam_cosine(1e-3, self.steps)
        init, step = fit_step(self.task.model.apply, loss, self.task.batches, schedule)
        runs = {
            "dense": (step, init(self.dense)),
            "search": (found.step, found.init(self.dense, 0.1, jax.random.key(0), 0)),
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
        return {name: float(np.median(values)) for name, values in times.items()} | {"steps": search.steps}


# The dense layers of the preset, in order; Torch-Pruning's model is built from them.
LAYERS = (
    ("encoder", "dense1"),
    ("encoder", "dense2"),
    ("encoder", "latent"),
    ("decoder", "dense1"),
    ("decoder", "dense2"),
    ("decoder", "image"),
)

Key = tuple[Any, ...]
OURS, CHANNELS = "ours", "ours, channels only"
TRAINED_ON = "the best of these, after more dense steps"


class Comparison:
    """All cells: what is computed, in which order, and what comes of it."""

    def __init__(self, config: Config):
        self.config = config
        source = Task(config.data, config.model, batch=config.batch, seed=0).data.source
        self.folder = config.out / f"{config.model}-{source}"
        self.cells = Cells(self.folder / "cells")
        self.seeds = [Seed(config, self.cells, s) for s in range(config.seeds)]
        self.number = 0

    def get(self, key: Key) -> Any:
        """A finished cell; waits for other workers."""
        while not self.cells.path(key).exists():
            if self.config.worker is None:
                raise LookupError(f"no cell {key}")
            time.sleep(5)
        return self.cells.get(key, lambda: None)

    def do(self, work: Mapping[Key, Callable[[], Any]]) -> dict[Key, Any]:
        """Compute this worker's share of cells, then collect all of them."""
        worker, workers = self.config.worker or (0, 1)
        for key, compute in work.items():
            self.number += 1
            if self.number % workers == worker and not self.cells.path(key).exists():
                start = time.perf_counter()
                self.cells.get(key, compute)
                print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
        return {key: self.get(key) for key in work}

    def tuned(self, seed: Seed, plan: ca.Plan | None, start: Any) -> Callable[[], dict[float, float]]:
        """A cell's work: the fine-tune of a plan."""
        return lambda: seed.tuned(plan, start)

    def run(self) -> dict[str, dict[float, list[float]]]:
        """All cells. Returns PSNR per method, budget and seed, at the best learning rate."""
        config, seeds, budgets = self.config, self.seeds, self.config.budgets
        self.do({("dense", s.seed): partial(getattr, s, "dense") for s in seeds})
        pairs = [(s, b) for b in budgets for s in seeds]
        ours = self.do({(OURS, b, s.seed): partial(s.ours, b, s.all_groups) for s, b in pairs})
        self.do({(CHANNELS, b, s.seed): partial(s.ours, b, s.groups) for s, b in pairs})
        self.do({("dense more", s.seed): self.tuned(s, None, s.dense) for s in seeds})
        self.do({("times",): seeds[0].step_times})
        self.do(
            {
                ("uniform, from scratch", b, s.seed): self.tuned(s, s.plan_of(s.uniform(b), s.fresh), s.fresh)
                for s, b in pairs
            }
        )
        self.do(
            {
                ("our plan, from scratch", b, s.seed): self.tuned(s, ours[OURS, b, s.seed]["plan"], s.fresh)
                for s, b in pairs
            }
        )
        if config.torch_python:
            self.rivals()
        self.random_widths()
        return self.collected()

    def collected(self) -> dict[str, dict[float, list[float]]]:
        """PSNR per method and budget, a list over seeds, at the best learning rate of the mean."""
        result: dict[str, dict[float, list[float]]] = {}
        for name in self.methods():
            for b in self.config.budgets:
                keys = [(name, b, s.seed) for s in self.seeds]
                if all(self.cells.path(key).exists() for key in keys):
                    by_seed = [self.get(key) for key in keys]
                    if name in (OURS, CHANNELS):
                        by_seed = [cell["psnr"] for cell in by_seed]
                    rate = max(by_seed[0], key=lambda r, found=by_seed: np.mean([f[r] for f in found]))
                    result.setdefault(name, {})[b] = [found[rate] for found in by_seed]
        return result

    def methods(self) -> list[str]:
        """Names of all, ours first."""
        scratch = ["our plan, from scratch", "uniform, from scratch", "best of random widths, from scratch"]
        if not self.config.torch_python:
            return [OURS, CHANNELS, *scratch]
        kept = self.get(("kept", self.seeds[0].seed))
        return [OURS, CHANNELS, *kept, TRAINED_ON, *scratch]

    def rivals(self) -> None:
        """Torch-Pruning on the same dense weights; the best of them also after more dense steps."""
        kept = self.do(
            {("kept", s.seed): partial(s.rivals, s.dense, self.config.budgets) for s in self.seeds}
        )
        work = {}
        for b in self.config.budgets:
            for s in self.seeds:
                for rival, by_budget in kept["kept", s.seed].items():
                    if b in by_budget:
                        plan = ca.plan_units(s.groups, by_budget[b])
                        work[rival, b, s.seed] = self.tuned(s, plan, s.dense)
        tuned = self.do(work)
        # The best of them again, having spent our search's time on more dense training.
        trained_on = self.do(
            {("dense trained on", s.seed): partial(getattr, s, "dense_trained_on") for s in self.seeds}
        )
        kept = self.do(
            {
                ("kept, trained on", s.seed): partial(
                    s.rivals, trained_on["dense trained on", s.seed], self.config.budgets
                )
                for s in self.seeds
            }
        )
        work = {}
        for b in self.config.budgets:
            scores: dict[str, list[float]] = {}
            for (rival, budget, _), found in tuned.items():
                if budget == b:
                    scores.setdefault(rival, []).append(max(found.values()))
            best = max(scores, key=lambda rival, of=scores: np.mean(of[rival]))
            for s in self.seeds:
                plan = ca.plan_units(s.groups, kept["kept, trained on", s.seed][best][b])
                start = trained_on["dense trained on", s.seed]
                work[TRAINED_ON, b, s.seed] = self.tuned(s, plan, start)
        self.do(work)

    def random_widths(self) -> None:
        """Random allocations from scratch: all on the first seed, the best of them on the others."""
        first, work = self.seeds[0], {}
        for b in self.config.budgets:
            for n in range(self.config.random_widths):
                plan = first.plan_of(first.random(b, n), first.fresh)
                work["random", b, n] = self.tuned(first, plan, first.fresh)
        tried = self.do(work)
        work = {}
        for b in self.config.budgets:
            best = max(
                range(self.config.random_widths), key=lambda n, b=b: max(tried["random", b, n].values())
            )
            for s in self.seeds:
                plan = s.plan_of(s.random(b, best), s.fresh)
                work["best of random widths, from scratch", b, s.seed] = self.tuned(s, plan, s.fresh)
        self.do(work)


def cell(values: Sequence[float]) -> str:
    """Mean and 95 % interval (Student's t over seeds)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:.2f} ± {half:.2f}"


def above(found: Mapping[str, Mapping[float, Sequence[float]]], budget: float) -> list[float]:
    """Per seed how far ours is above the method that is best of all others on the mean."""
    rivals = {name: at for name, at in found.items() if name not in (OURS, CHANNELS)}
    others = [np.array(at[budget]) for at in rivals.values() if budget in at]
    return (np.array(found[OURS][budget]) - max(others, key=np.mean)).tolist()


def main(config: Config) -> None:
    """Run the comparison; without a worker's number, print and write the table."""
    comparison = Comparison(config)
    found = comparison.run()
    if config.worker is not None:
        return
    budgets = config.budgets
    header = ["PSNR (dB)", *(f"{100 * b:g} %" for b in budgets)]
    rows = [[name, *(cell(at[b]) if b in at else "–" for b in budgets)] for name, at in found.items()]
    rows.append(["ours above the best other", *(cell(above(found, b)) for b in budgets)])
    rows.append(["… on the worst seed", *(f"{min(above(found, b)):.2f}" for b in budgets)])
    dense = [comparison.get(("dense more", s.seed)) for s in comparison.seeds]
    rate = max(dense[0], key=lambda r: np.mean([d[r] for d in dense]))
    times = comparison.get(("times",))
    text = "\n\n".join(
        [
            markdown_table(header, rows),
            f"The dense model, trained on for as many steps: {cell([d[rate] for d in dense])} dB.",
            f"Our search: {times['steps']} steps, the time of "
            f"{times['steps'] * times['search'] / times['dense']:.0f} dense steps.",
        ]
    )
    (comparison.folder / "table.md").write_text(text + "\n")
    record = {name: {str(b): values for b, values in at.items()} for name, at in found.items()}
    (comparison.folder / "compare.json").write_text(json.dumps(record, indent=1))
    points = {
        name: [(100 * b, float(np.mean(values))) for b, values in at.items()] for name, at in found.items()
    }
    save_figures(comparison.folder, {"compare": trade_off_figure(points, metric="PSNR (dB), held-out")})
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
