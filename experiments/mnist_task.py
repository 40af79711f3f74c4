"""The application that the MNIST experiments share: loss, criteria, the dense model, and its rivals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import compaware_jax as ca
from compaware_jax.cost import parameter_cost
from compaware_jax.data import ImageSet, fashion_mnist, mnist, resident, whole
from compaware_jax.importance import l2
from compaware_jax.metrics import knn_accuracy, linear_accuracy, psnr, ssim, worst_class_psnr
from compaware_jax.models import Autoencoder, autoencoder
from compaware_jax.search.coefficients import SearchMethod
from compaware_jax.search.select import keep_units, uniform_counts
from compaware_jax.training.criteria import measure

Data = Literal["auto", "tfds", "embedded", "fashion"]
Preset = Literal["dense", "conv"]
Apply = Callable[..., dict[str, jax.Array]]
Batch = dict[str, jax.Array]

IMAGE = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)


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


def loss(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """Mean squared error of the reconstruction."""
    return jnp.mean((apply(variables, batch["image"])["image"] - batch["image"]) ** 2)


def psnr_of(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """Peak signal-to-noise ratio of the reconstruction, in dB."""
    return psnr(apply(variables, batch["image"])["image"], batch["image"])


def ssim_of(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """Mean structural similarity of the reconstruction."""
    return jnp.mean(ssim(apply(variables, batch["image"])["image"], batch["image"]))


def knn_of(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """Leave-one-out 5-nearest-neighbour accuracy in the latent space."""
    return knn_accuracy(apply(variables, batch["image"])["latent"], batch["label"])


def worst_psnr_of(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """PSNR of the class that is reconstructed worst, in dB."""
    return worst_class_psnr(apply(variables, batch["image"])["image"], batch["image"], batch["label"], 10)


def linear_of(apply: Apply, variables: Any, batch: Batch) -> jax.Array:
    """Accuracy of a linear classifier of the latent, fitted to half of the batch, on the other half."""
    return linear_accuracy(apply(variables, batch["image"])["latent"], batch["label"], 10)


METRICS = {
    "PSNR (dB)": psnr_of,
    "worst class (dB)": worst_psnr_of,
    "SSIM": ssim_of,
    "k-NN": knn_of,
    "linear": linear_of,
}


def criteria_below(dense: Mapping[str, float], drops: Mapping[str, float]) -> tuple[ca.Criterion, ...]:
    """Criteria that allow metrics, by their names in `METRICS`, to fall so much below the dense model's."""
    return tuple(
        ca.at_least(name, METRICS[name], dense[name] - drop, trainable=METRICS[name] is psnr_of)
        for name, drop in drops.items()
    )


def metrics_of(apply: Apply, variables: Any, batch: Batch) -> dict[str, float]:
    """All metrics of a model on a batch."""
    return measure([ca.at_least(n, m, 0.0) for n, m in METRICS.items()], apply, variables, batch)


class Task:
    """Data, model and dense training of one experiment."""

    def __init__(self, data: Data, preset: Preset, *, batch: int, seed: int):
        self.data: ImageSet = fashion_mnist() if data == "fashion" else mnist(data)
        self.model: Autoencoder = autoencoder(preset)
        self.key = jax.random.key(seed)
        self.settings = {"data": self.data.source, "preset": preset, "batch": batch, "seed": seed}
        data_key, self.init_key, self.search_key = jax.random.split(self.key, 3)
        self.batches = resident(self.data.train, batch, data_key)
        self.held_out = whole(self.data.test)

    def dense(self, steps: int, learning_rate: float, directory: Path | None) -> Any:
        """The dense model, trained; resumed if the directory holds a checkpoint."""
        start = self.model.init(self.init_key)
        return self.fit("dense", self.model.apply, start, steps, learning_rate, directory)

    def fit(
        self,
        name: str,
        apply: Apply,
        variables: Any,
        steps: int,
        learning_rate: float,
        directory: Path | None,
    ) -> Any:
        """Train a model on the task."""
        return ca.fit(
            apply,
            variables,
            loss,
            self.batches,
            steps,
            learning_rate=learning_rate,
            label=name,
            directory=directory,
            job={"name": name, **self.settings},
        )[0]

    def search(
        self, method: SearchMethod, dense: Any, groups: ca.Groups, budget: float, key: jax.Array
    ) -> tuple[ca.Plan, Any, float]:
        """The search of `compress` alone: the plan, the adapted weights, and its seconds, compiled or not."""
        start = time.perf_counter()
        found = ca.find_plan(
            self.model.apply,
            dense,
            loss,
            self.batches,
            groups=groups,
            budget=ca.params(budget),
            search=method,
            key=key,
            progress=False,
        )
        return found.plan, jax.block_until_ready(found.variables), time.perf_counter() - start

    def groups(self, variables: Any, *, boundary: bool = True) -> ca.Groups:
        """What can leave: channels, pixels that are read or written; the latent is an output that may shrink.

        Args:
          variables: the dense model's.
          boundary: pixels too; rivals know of channels only.
        """
        return ca.find_groups(self.model.apply, variables, IMAGE, released=("latent",), boundary=boundary)


def uniform_plan(groups: ca.Groups, dense: Any, budget: float) -> ca.Plan:
    """Same share of every group, best units by L2 norm; the latent is left alone."""
    return ca.plan_units(
        groups, keep_units(groups, np.asarray(l2(groups, dense)), uniform_widths(groups, budget))
    )


def uniform_widths(groups: ca.Groups, budget: float) -> np.ndarray:
    """The same share of every group on a budget of parameters, the latent whole: counts per group."""
    whole = [i for i, group in enumerate(groups.groups) if group.coupling]
    return uniform_counts(parameter_cost(groups), ca.params(budget).limit(groups), whole=whole)


def latencies(
    models: Mapping[str, tuple[Callable[..., Any], Any]],
    image: jax.Array,
    *,
    rounds: int = 40,
    seconds: float = 6.0,
) -> dict[str, float]:
    """Median time of one forward pass in ms; models take turns, so that drift hits all alike.

    Args:
      models: function and variables by name.
      image: what they are called with.
      rounds: every model is timed at most so often, after three calls that are not timed.
      seconds: no round begins after these, but for the first five.
    """
    compiled = {name: (jax.jit(apply), v) for name, (apply, v) in models.items()}
    times: dict[str, list[float]] = {name: [] for name in compiled}
    end = math.inf
    for number in range(rounds + 3):
        if number == 3:
            end = time.perf_counter() + seconds
        if number >= 8 and time.perf_counter() > end:
            break
        for name, (apply, variables) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(apply(variables, image))
            if number >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def share_text(part: float, total: float) -> str:
    """A share in percent."""
    return f"{part / total:.1%}"


def criteria_marks(criteria: Sequence[ca.Criterion], metrics: Mapping[str, float]) -> list[bool]:
    """Which criteria the metrics keep."""
    return [c.keeps(metrics[c.name]) for c in criteria]
