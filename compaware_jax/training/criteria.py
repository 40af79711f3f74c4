"""Criteria: application metrics with a threshold, and whether a model keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from compaware_jax.errors import CriterionError

Apply = Callable[..., Any]
Metric = Callable[[Apply, Any, Any], jax.Array]
"""``(apply, variables, batch) -> scalar``. `apply` is the function under test: dense, masked or small."""


@dataclass(frozen=True)
class Criterion:
    """A metric with a threshold.

    Attributes:
      name: what reports call it.
      metric: ``(apply, variables, batch) -> scalar``, traceable by JAX.
      threshold: in the metric's unit.
      above: whether the metric has to be at least (True) or at most (False) the threshold.
      trainable: whether it is also a constraint while training, on each batch. An accuracy has no
        gradient, and a metric may cost more than a step: such criteria are judged at the end only.
    """

    name: str
    metric: Metric
    threshold: float
    above: bool = True
    trainable: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", _threshold(self.name, self.metric, self.threshold))
        if not np.isfinite(self.threshold):
            raise CriterionError(
                f"Criterion `{self.name}`: the threshold is {self.threshold}, expected a finite number."
            )

    def reading(self, value: ArrayLike) -> float:
        """A value of the metric as a float: the threshold, where that is the same in the metric's precision.

        In float32, a tenth is more than 0.1.
        """
        value = np.asarray(value)
        if jnp.issubdtype(value.dtype, jnp.floating):
            with np.errstate(over="ignore"):
                threshold = value.dtype.type(self.threshold)
            # A threshold that is too large or too small for the metric is none of its values.
            if value == threshold and np.isfinite(threshold) and bool(threshold) == bool(self.threshold):
                return self.threshold
        return float(value)

    def keeps(self, value: float) -> bool:
        """Whether a value keeps the criterion; one that is not a number does not.

        It is read in JAX's default precision; `reading` is in the metric's.
        """
        value = self.reading(np.asarray(value, jnp.result_type(float)))
        return value >= self.threshold if self.above else value <= self.threshold

    def excess(self, value: Array) -> Array:
        """How far a value is on the wrong side of the threshold, in the metric's unit; else negative."""
        return self.threshold - value if self.above else value - self.threshold

    def __str__(self) -> str:
        return f"{self.name} {'≥' if self.above else '≤'} {self.threshold:g}"


def at_least(name: str, metric: Metric, threshold: ArrayLike, *, trainable: bool = True) -> Criterion:
    """The metric may not fall below the threshold, a number or a measured value; see `Criterion`."""
    return Criterion(name, metric, _threshold(name, metric, threshold), True, trainable)


def at_most(name: str, metric: Metric, threshold: ArrayLike, *, trainable: bool = True) -> Criterion:
    """The metric may not rise above the threshold, a number or a measured value; see `Criterion`."""
    return Criterion(name, metric, _threshold(name, metric, threshold), False, trainable)


def _threshold(name: Any, metric: Any, threshold: Any) -> float:
    """The number that a threshold is, or holds: an array, such as a measured value times a share."""
    if not isinstance(name, str) or not callable(metric):
        raise CriterionError(
            f"Criterion: the name is {name!r} and the metric {metric!r}, expected a string and a function "
            "(apply, variables, batch) -> scalar, in this order, then the threshold."
        )
    given = np.asarray(threshold)
    if given.size != 1 or not jnp.issubdtype(given.dtype, jnp.number) or np.iscomplexobj(given):
        raise CriterionError(f"Criterion `{name}`: the threshold is {threshold!r}, expected one number.")
    return float(given.item())


def checked_criteria(criteria: Any) -> tuple[Criterion, ...]:
    """The criteria as a tuple.

    Raises:
      CriterionError: something else is among them, or is given instead; or two have the same name.
    """
    if isinstance(criteria, Sequence) and all(isinstance(c, Criterion) for c in criteria):
        names = [c.name for c in criteria]
        if len(set(names)) < len(names):
            raise CriterionError(
                f"criteria are named {names}, expected names of their own. Rename one, so that each can be "
                "reported."
            )
        return tuple(criteria)
    got = [type(c).__name__ for c in criteria] if isinstance(criteria, Sequence) else type(criteria).__name__
    raise CriterionError(
        f"criteria is {got}, expected a list of criteria, such as [at_least('psnr', metric, 30.0)]."
    )


@dataclass(frozen=True)
class Verdict:
    """A criterion, and what two models made of it."""

    criterion: str
    before: float
    after: float
    kept: bool

    @property
    def told(self) -> str:
        """What tables say of it: the value after, and whether that is not enough."""
        return f"{self.after:.6g}{'' if self.kept else ' (not kept)'}"


def measure(criteria: Sequence[Criterion], apply: Apply, variables: Any, batch: Any) -> dict[str, float]:
    """The value of every criterion's metric.

    Args:
      criteria: what to measure.
      apply: the function under test.
      variables: its variables.
      batch: the batch to measure on, passed on to the metrics.

    Returns:
      Value per criterion's name, see `Criterion.reading`.

    Raises:
      CriterionError: two criteria have the same name, or a metric is no scalar.
    """
    criteria = checked_criteria(criteria)
    values = jax.jit(lambda v, b: [c.metric(apply, v, b) for c in criteria])(variables, batch)
    for c, value in zip(criteria, values, strict=True):
        if jnp.shape(value) != ():
            raise CriterionError(
                f"measure: the metric of `{c.name}` has shape {jnp.shape(value)}, expected a scalar, such as "
                "a mean over the batch."
            )
    return {c.name: c.reading(value) for c, value in zip(criteria, values, strict=True)}


def check_dense(criteria: Sequence[Criterion], before: dict[str, float], caller: str) -> None:
    """Refuse criteria that the dense model fails.

    Args:
      criteria: what is asked.
      before: the dense model's value per criterion.
      caller: the function that asks, for messages.

    Raises:
      CriterionError: says which and by how much.
    """
    failed = [c for c in criteria if not c.keeps(before[c.name])]
    if failed:
        raise CriterionError(
            f"{caller}: the dense model already fails "
            + "; ".join(
                f"`{c}` (it has {before[c.name]:.6g}, short by {abs(before[c.name] - c.threshold):.3g})"
                for c in failed
            )
            + ". Expected criteria that the dense model meets on the held-out batch. Train it further, "
            "relax the threshold, or pass allow_failing=True to try all the same."
        )
