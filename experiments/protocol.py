"""The protocol of all comparisons: what everyone starts from, and the same fine-tune for everyone.

A seed fixes the dense weights, the order of the data and the search. A method makes a candidate: a plan and
the weights that it starts from. It is tuned at several learning rates at once (they are lanes of a vmap); a
method's figure is its mean over seeds at the rate that is best for it. The first seed tries all rates, the
others those that came near the best there.

With ``--lanes`` many candidates are tuned at once, masked at full width, which by the law is the same: for an
accelerator, which one small model leaves idle. Then every seed tries all rates.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cells import Cells, Key
from mnist_task import SCHEDULES, Data, Preset, Schedule, Task, loss, psnr_of, uniform_widths
from scipy import stats

import compaware_jax as ca
from compaware_jax.cost import parameter_cost
from compaware_jax.coupling.groups import Groups
from compaware_jax.importance import l2
from compaware_jax.search.coefficients import on_budget
from compaware_jax.search.select import keep_units, round_counts
from compaware_jax.training.fit import adam_cosine, fit_step

CHUNK = 500

NEAR = 0.3
"""A rate that is more dB than this below the best one of the first seed is not tried on the others."""

Rates = dict[str, float]
"""Held-out PSNR by learning rate."""


class Candidate(NamedTuple):
    """What a method makes of a dense model, to be tuned.

    Attributes:
      plan: what is kept; None for the whole model.
      start: the weights at full width.
      notes: what its cell holds beside the figures.
    """

    plan: ca.Plan | None
    start: Any
    notes: Mapping[str, Any] | None = None

    def cell(self, psnr: Rates) -> Any:
        """The content of its cell."""
        return {"psnr": psnr, **self.notes} if self.notes else psnr


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      data: which images, as in the main experiment.
      model: preset of the autoencoder.
      budgets: shares of the parameters that may stay.
      seeds: of the dense model, the data order and the search.
      rates: learning rates of the fine-tune; everyone gets the best.
      dense_steps: of the dense training; default that of the main experiment.
      search: settings of ours.
      fine_tune: steps after pruning, for everyone; default that of the main experiment.
      batch: batch size.
      lanes: models tuned at once, masked; 1 for one candidate after the other, made small.
      torch_python: Python of an environment with torch and torch-pruning; without it, no such rivals.
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
    batch: int = 128
    lanes: int = 1
    torch_python: str | None = None
    out: Path = Path("runs/compare")


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
    def schedule(self) -> Schedule:
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
        weights = self.cells.arrays(("dense", self.seed), self.fresh, train)
        mark = zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(weights)))
        if self.cells.one(("dense weights", self.seed), lambda: mark) != mark:
            raise SystemExit(
                f"The dense weights of seed {self.seed} are not those that {self.cells.record} began with: "
                "another machine or version trained them. Give --out another folder."
            )
        return weights

    def trained_on(self, steps: int) -> Any:
        """The dense weights after more steps, of what time a method leaves of its allowance."""
        rate, apply = self.schedule.dense_learning_rate, self.task.model.apply
        train = partial(self.task.fit, "more", apply, self.dense, steps, rate, None)
        return self.cells.arrays(("dense trained on", steps, self.seed), self.fresh, train)

    @cached_property
    def fresh(self) -> Any:
        """Untrained weights for models from scratch."""
        return self.task.model.init(jax.random.fold_in(self.task.init_key, 1))

    @cached_property
    def groups(self) -> Groups:
        """The channels that can leave: what rivals know of."""
        return self.task.groups(self.fresh, boundary=False)

    @cached_property
    def all_groups(self) -> Groups:
        """Pixels that are read or written as well."""
        return self.task.groups(self.fresh)

    def tuned(self, candidate: Candidate, rates: Sequence[float]) -> Rates:
        """Held-out PSNR by learning rate after the fine-tune of a candidate, made small."""
        plan, start, _ = candidate
        apply = self.task.model.apply if plan is None else ca.slim(self.task.model.apply, plan)
        start = start if plan is None else ca.shrink(start, plan)
        starts = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(rates)), start)
        found = self._trained(lambda _: apply, jnp.zeros(len(rates)), starts, rates)
        return {f"{rate:g}": psnr for rate, psnr in zip(rates, found, strict=True)}

    def tuned_together(self, candidates: Sequence[Candidate], rates: Sequence[float]) -> list[Rates]:
        """What `tuned` gives of each, all at once and masked at full width."""
        lanes = [(c, rate) for c in candidates for rate in rates]
        masked = [_masked(candidate) for candidate, _ in lanes]
        masks, starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masked)
        found = self._trained(self._under, masks, starts, [rate for _, rate in lanes])
        figures = np.reshape(found, (len(candidates), len(rates))).tolist()
        return [{f"{rate:g}": psnr for rate, psnr in zip(rates, row, strict=True)} for row in figures]

    def _under(self, mask: Any) -> Any:
        """The model, its variables masked."""
        apply = self.task.model.apply
        return lambda variables, *args: apply(jax.tree.map(jnp.multiply, mask, variables), *args)

    def _trained(self, model: Callable[[Any], Any], setting: Any, starts: Any, rates: Any) -> list[float]:
        """Held-out PSNR per lane after the fine-tune.

        Args:
          model: from a lane's setting to its function.
          setting: of the lanes, stacked.
          starts: weights of the lanes, stacked.
          rates: learning rates of the lanes.
        """
        lanes, chunk = (setting, jnp.array(rates)), math.gcd(self.steps, CHUNK)

        def rule(lane: Any) -> Any:
            setting, rate = lane
            optimizer = adam_cosine(rate, self.steps)
            return fit_step(model(setting), loss, self.task.batches, optimizer)

        @jax.jit
        def run(lanes: Any, states: Any, first: jax.Array) -> Any:
            def step(states: Any, index: jax.Array) -> Any:
                return jax.vmap(lambda lane, state: rule(lane)[1](state, index)[0])(lanes, states), None

            return jax.lax.scan(step, states, first + jnp.arange(chunk))[0]

        @jax.jit
        def measure(lanes: Any, variables: Any, held_out: Any) -> jax.Array:
            return jax.lax.map(lambda at: psnr_of(model(at[0][0]), at[1], held_out), (lanes, variables))

        states = jax.vmap(lambda lane, start: rule(lane)[0](start))(lanes, starts)
        for first in range(0, self.steps, chunk):
            states = run(lanes, states, jnp.asarray(first))
        return np.asarray(measure(lanes, states.variables, self.task.held_out)).tolist()

    def ours(self, budget: float, *, boundary: bool = True, more: int = 0) -> Candidate:
        """What `compress` finds with its defaults.

        Args:
          budget: share of the parameters.
          boundary: pixels may leave as well.
          more: dense steps before.

        Returns:
          The candidate; it notes what is "kept" per group, and "seconds" of the search.
        """

        def search() -> dict[str, Any]:
            groups = self.all_groups if boundary else self.groups
            start = self.trained_on(more) if more else self.dense
            plan, weights, seconds = self.task.search(
                self.config.search, start, groups, budget, self.task.search_key
            )
            return {"plan": plan.to_json(), "seconds": round(seconds, 1), "weights": weights}

        key = ("searched" if boundary else "searched, channels only", budget, more, self.seed)
        found = self.cells.arrays(key, {"plan": "", "seconds": 0.0, "weights": self.fresh}, search)
        plan = ca.Plan.from_json(str(found["plan"]))
        kept = [n for _, n, _ in plan.counts]
        return Candidate(plan, found["weights"], {"kept": kept, "seconds": float(found["seconds"])})

    def our_plan(self, budget: float, *, boundary: bool = True) -> ca.Plan:
        """The plan that our search finds."""
        plan = self.ours(budget, boundary=boundary).plan
        assert plan is not None
        return plan

    def kept_by(self, units: np.ndarray) -> ca.Plan:
        """The plan that keeps channels, as rivals name them."""
        return ca.plan_units(self.groups, units)

    def plan_of(self, counts: np.ndarray, weights: Any) -> ca.Plan:
        """The plan with these counts of channels, the best by L2."""
        return self.kept_by(keep_units(self.groups, np.asarray(l2(self.groups, weights)), counts))

    def uniform(self, budget: float) -> np.ndarray:
        """The same share of every group of channels but the latent."""
        return uniform_widths(self.groups, budget)

    def random(self, budget: float, number: int) -> np.ndarray:
        """Random counts on the budget: shares log-uniform over a factor of sixteen, the latent whole."""
        groups, cost = self.groups, parameter_cost(self.groups)
        rng = np.random.default_rng([number, round(1e4 * budget)])
        log_shares = rng.uniform(-2, 2, len(groups.groups)) * np.log(2)
        log_shares[[group.coupling for group in groups.groups]] = 20.0
        share = np.exp(np.asarray(on_budget(cost, jnp.asarray(log_shares, float), budget))) / groups.sizes
        floor = np.where([group.coupling for group in groups.groups], cost.most, cost.least)
        return round_counts(cost, share, ca.params(budget).limit(groups), floor=floor)


Method = Callable[[Seed], Candidate]
"""What makes a candidate of a seed's dense model."""


def _masked(candidate: Candidate) -> tuple[Any, Any]:
    """A candidate's mask, and its start: what lies outside is neither seen nor trained."""
    plan, start, _ = candidate
    ones = jax.tree.map(jnp.ones_like, start)
    mask = ones if plan is None else ca.expand(ca.shrink(ones, plan), plan)
    return mask, start


class Study:
    """The cells and seeds of a comparison; experiments with the same settings share them.

    Attributes:
      folder: where results go.
      cells: finished ones.
      seeds: as many as asked for.
    """

    def __init__(self, config: Config):
        source = config.data
        if source == "auto":
            source = Task(config.data, config.model, batch=config.batch, seed=0).data.source
        self.folder = config.out / f"{config.model}-{source}"
        self.cells = Cells(self.folder)
        self.rates, self.lanes = config.rates, config.lanes
        # Keys do not name them.
        named = ("dense_steps", "search", "fine_tune", "batch", "rates")
        self.settle(("settings",), {name: str(getattr(config, name)) for name in named})
        self.seeds = [Seed(config, self.cells, number) for number in range(config.seeds)]

    def settle(self, key: Key, value: Any) -> None:
        """Hold on to a setting that no other cell's key names.

        Raises:
          SystemExit: the record's figures are of another one.
        """
        found = self.cells.one(key, lambda: value)
        if found != value:
            raise SystemExit(
                f"{self.cells.record} holds figures of {key} {found}, expected {value}. "
                "Give --out another folder."
            )

    def tune(self, work: Mapping[Any, Method]) -> None:
        """Figures of methods: at all learning rates on the first seed, at the near ones on the others.

        Args:
          work: by what identifies a candidate but its seed, the method that makes it.
        """
        if self.lanes > 1:
            # Seed by seed, so that several processes take a seed each.
            for seed in self.seeds:
                self.tune_at_once(seed, work)
        first, *others = self.seeds
        self.tune_on(first, work)
        near = {key: near_best(self.figures(key, first)) for key in work}
        self.cells.all(
            {
                (*key, s.seed): partial(self._one, method, s, near[key])
                for key, method in work.items()
                for s in others
            }
        )

    def tune_on(self, seed: Seed, work: Mapping[Any, Method]) -> None:
        """Figures of methods at all learning rates on one seed."""
        if self.lanes > 1:
            self.tune_at_once(seed, work)
        self.cells.all(
            {(*key, seed.seed): partial(self._one, method, seed, self.rates) for key, method in work.items()}
        )

    def tune_at_once(self, seed: Seed, work: Mapping[Any, Method]) -> None:
        """Figures on one seed, many at once: those that are not finished and that no process is at."""

        def compute(keys: list[Key]) -> dict[Key, Any]:
            candidates = {key: work[key[:-1]](seed) for key in keys}
            figures = seed.tuned_together([*candidates.values()], self.rates)
            return {k: c.cell(psnr) for (k, c), psnr in zip(candidates.items(), figures, strict=True)}

        keys, size = [(*key, seed.seed) for key in work], max(1, self.lanes // len(self.rates))
        for at in range(0, len(keys), size):
            self.cells.together(keys[at : at + size], compute)

    @staticmethod
    def _one(method: Method, seed: Seed, rates: Sequence[float]) -> Any:
        candidate = method(seed)
        return candidate.cell(seed.tuned(candidate, rates))

    def figures(self, key: Key, seed: Seed) -> Rates:
        """What `tune` found for a model and a seed."""
        cell = self.cells.read((*key, seed.seed))
        return cell.get("psnr", cell)

    def reached(self, key: Key) -> list[float]:
        """A model's PSNR per seed, at the learning rate that is best for its mean; empty if unfinished."""
        if not all(self.cells.has((*key, s.seed)) for s in self.seeds):
            return []
        by_seed = [self.figures(key, s) for s in self.seeds]
        tried = [rate for rate in by_seed[0] if all(rate in figures for figures in by_seed)]
        return max(([f[rate] for f in by_seed] for rate in tried), key=np.mean)


def near_best(found: Rates) -> list[float]:
    """The learning rates that came near the best one."""
    best = max(found.values())
    return [float(rate) for rate, psnr in found.items() if psnr >= best - NEAR]


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval (Student's t over seeds)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:.2f} ± {half:.2f}"
