"""What a model costs, as a function of how many units each group keeps.

Every cost here is a sum of products of axis sizes, and an axis size is linear in the groups' kept
counts. So a cost is an exact polynomial of the counts: differentiable for soft counts (sums of gates)
and equal to the true cost for whole ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from compaware_jax.coupling.groups import Groups
from compaware_jax.coupling.work import work_of
from compaware_jax.errors import BudgetError
from compaware_jax.settings import real_number


@dataclass(frozen=True, eq=False)
class Cost:
    """A cost as a polynomial of kept counts.

    It is ``sum_t weights[t] * prod_d sizes[terms[t, d]]`` with ``sizes = base + per_unit @ counts``.

    Attributes:
      name: what is counted.
      base: per axis the indices that never leave, shape (axes,).
      per_unit: per axis and group the indices that one unit holds, shape (axes, groups).
      terms: per product the axes multiplied, shape (terms, factors); axis 0 is the constant one.
      weights: per product its weight, shape (terms,).
      units: units per group, shape (groups,).
      least: the fewest units that may stay per group, shape (groups,).
      most: the most units that may stay per group, shape (groups,).
      step: kept counts are multiples of it, or the whole group, shape (groups,).
    """

    name: str
    base: np.ndarray
    per_unit: np.ndarray
    terms: np.ndarray
    weights: np.ndarray
    units: np.ndarray
    least: np.ndarray
    most: np.ndarray
    step: np.ndarray

    def __call__(self, counts: Num[ArrayLike, " groups"]) -> Float[Array, ""]:
        """The cost of soft or hard counts, shape (groups,): a float scalar, differentiable."""
        counts = jnp.asarray(counts)
        dtype = jnp.result_type(counts, float)
        sizes = jnp.asarray(self.base, dtype) + jnp.asarray(self.per_unit, dtype) @ counts
        return jnp.asarray(self.weights, dtype) @ jnp.prod(sizes[self.terms], axis=1)

    def exact(self, counts: Int[np.ndarray, " groups"]) -> int:
        """The cost of whole counts, in integers."""
        sizes = self.base + self.per_unit @ np.asarray(counts, np.int64)
        return int(self.weights @ np.prod(sizes[self.terms], axis=1))

    @property
    def total(self) -> int:
        """The cost of the dense model."""
        return self.exact(self.units)

    @property
    def floor(self) -> int:
        """The cost with the fewest units left in every group: what fixed axes allow."""
        return self.exact(self.least)


def parameter_cost(groups: Groups) -> Cost:
    """Number of elements in all leaves."""
    return _leaf_cost("parameters", groups, lambda itemsize: 1)


def byte_cost(groups: Groups) -> Cost:
    """Bytes of all leaves."""
    return _leaf_cost("bytes", groups, lambda itemsize: itemsize)


def flop_cost(groups: Groups) -> Cost:
    """FLOPs of one call at the traced input shapes, as far as the outputs that are deployed need them.

    Two per multiply-add of contractions and convolutions; element-wise work is not counted, as is usual.
    The body of a `scan` counts once per step, that of a `while` once, and of a `cond` the first branch.
    """
    builder = _Builder(groups)
    for work in work_of(groups.analysis.program, groups.deployed_outputs):
        rows = []
        for dimension in work.dimensions:
            classes = groups.analysis.together(dimension)
            value, axis = dimension[0]
            size = groups.analysis.program.avals[value].shape[axis]
            units = np.full(size, -1) if classes is None else groups.unit_of_class[classes]
            rows.append(builder.axis(units))
        builder.add(rows, 2 * work.times)
    return builder.cost("FLOPs")


def _leaf_cost(name: str, groups: Groups, weight: Callable[[int], int]) -> Cost:
    builder = _Builder(groups)
    for leaf, axes in zip(groups.leaves, groups.units_of, strict=True):
        builder.add([builder.axis(units) for units in axes], weight(_itemsize(leaf.dtype)))
    return builder.cost(name)


def _itemsize(dtype: str) -> int:
    # What JAX computes with: without x64, numpy's float64 are float32.
    return _key_bytes()[dtype] if dtype in _key_bytes() else jax.dtypes.canonicalize_dtype(dtype).itemsize


@cache
def _key_bytes() -> dict[str, int]:
    """Bytes of a typed random key, by the name of its dtype."""
    kinds = ("threefry2x32", "rbg", "unsafe_rbg")
    dtypes = [jax.eval_shape(partial(jax.random.key, impl=kind), 0).dtype for kind in kinds]
    return {str(dtype): dtype.itemsize for dtype in dtypes}


class _Builder:
    """Collects products of axis sizes; equal axes share a row."""

    def __init__(self, groups: Groups):
        self.groups = groups
        self.rows: dict[bytes, int] = {}
        self.base: list[int] = [1]
        self.per_unit: list[np.ndarray] = [np.zeros(len(groups.groups), int)]
        self.products: list[tuple[list[int], int]] = []

    def axis(self, units: np.ndarray) -> int:
        key = units.tobytes()
        if key not in self.rows:
            counts = np.bincount(units[units >= 0], minlength=self.groups.units)
            offsets = [group.offset for group in self.groups.groups]
            self.rows[key] = len(self.base)
            self.base.append(int((units < 0).sum()))
            self.per_unit.append(counts[offsets] if offsets else np.zeros(0, int))
        return self.rows[key]

    def add(self, rows: list[int], weight: int) -> None:
        self.products.append((rows, weight))

    def cost(self, name: str) -> Cost:
        width = max((len(rows) for rows, _ in self.products), default=1)
        terms = np.zeros((len(self.products), width), int)
        for number, (rows, _) in enumerate(self.products):
            terms[number, : len(rows)] = rows
        return Cost(
            name=name,
            base=np.array(self.base, np.int64),
            per_unit=np.array(self.per_unit, np.int64),
            terms=terms,
            weights=np.array([weight for _, weight in self.products], np.int64),
            units=self.groups.sizes,
            least=self.groups.floors,
            most=self.groups.ceilings,
            step=self.groups.steps,
        )


COSTS: dict[str, Callable[[Groups], Cost]] = {
    "parameters": parameter_cost,
    "bytes": byte_cost,
    "flops": flop_cost,
}


@dataclass(frozen=True)
class Budget:
    """A target on a cost: at most `fraction` of the dense model's.

    Attributes:
      cost: a key of `COSTS`.
      fraction: in (0, 1].
    """

    cost: str
    fraction: float

    def __post_init__(self) -> None:
        if not isinstance(self.cost, str) or self.cost not in COSTS:
            raise BudgetError(f"Budget: cost is {self.cost!r}, expected one of {sorted(COSTS)}.")
        object.__setattr__(self, "fraction", _number(self.cost, self.fraction))
        if not 0 < self.fraction <= 1:
            raise BudgetError(
                f"Budget: the fraction of {self.cost} is {self.fraction}, expected a number in (0, 1]. "
                "Give the share of the dense model's cost that may stay, e.g. 0.1 for a tenth."
            )

    def limit(self, groups: Groups) -> int:
        """The largest cost that the budget allows.

        Raises:
          BudgetError: even the fewest units that may stay cost more, or the dense model costs nothing.
        """
        cost = cost_of(groups, self.cost)
        limit = int(np.floor(self.fraction * cost.total + 1e-9))
        if cost.floor > limit:
            raise BudgetError(
                f"Budget: {self.fraction:.4%} of {cost.total} {cost.name} is {limit}, below the smallest "
                f"reachable {cost.floor} ({cost.floor / cost.total:.4%}: the fewest units that may stay of "
                "each group, beside the axes that stay whole). Ask for at least that, or demand less."
            )
        return limit


def cost_of(groups: Groups, name: str) -> Cost:
    """The cost of that name in `COSTS`, of a model that has any.

    Raises:
      BudgetError: the dense model costs nothing.
    """
    cost = COSTS[name](groups)
    if not cost.total:
        raise BudgetError(
            f"Budget: the model has no {cost.name}, expected a cost that pruning lowers, such as params(0.5)."
        )
    return cost


def check_budget(budget: Any) -> None:
    """Refuse what is no budget.

    Raises:
      BudgetError: says what to pass instead.
    """
    if not isinstance(budget, Budget):
        raise BudgetError(
            f"the budget is {budget!r}, expected a Budget: params({budget!r}), nbytes(...) or flops(...)."
        )


def _number(cost: str, fraction: Any) -> float:
    number = real_number(fraction)
    if number is None:
        raise BudgetError(f"Budget: the fraction of {cost} is {fraction!r}, expected a number in (0, 1].")
    return number


def params(fraction: Any) -> Budget:
    """At most this fraction of the dense model's parameters, in (0, 1].

    All elements of the variables count, those of state (running averages, a cache) as well.
    """
    return Budget("parameters", _number("parameters", fraction))


def nbytes(fraction: Any) -> Budget:
    """At most this fraction of the dense model's bytes, in (0, 1]."""
    return Budget("bytes", _number("bytes", fraction))


def flops(fraction: Any) -> Budget:
    """At most this fraction of the dense model's FLOPs at the traced input shapes, in (0, 1].

    Of a function that returns more than is deployed, name what is: ``find_groups(..., deployed=...)``.
    """
    return Budget("flops", _number("flops", fraction))
