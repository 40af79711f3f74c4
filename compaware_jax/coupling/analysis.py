"""What the coupling analysis found: which indices of which axes leave together, and which never do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from compaware_jax.coupling.factors import USUAL, Choice, Cuts, Factor, Factors
from compaware_jax.coupling.ledger import Solution
from compaware_jax.coupling.program import Program
from compaware_jax.coupling.rules import Kept


@dataclass(frozen=True, eq=False)
class Analysis:
    """What leaves together in a program.

    Attributes:
      program: the program analysed.
      factors: per value id its factors (their atoms index `solution.labels`).
      solution: classes of atoms; joint factors are rectangles under it, but for those of `ragged` values.
      unknown: where primitives without a rule were met.
      choices: choices of how to cut that were met.
      cuts: how it was cut where there was a choice, the choices taken included.
      boundary: classes of weights that leave apart from a contraction that reads them.
    """

    program: Program
    factors: Mapping[int, Factors]
    solution: Solution
    unknown: tuple[str, ...]
    choices: frozenset[Choice] = frozenset()
    cuts: Cuts = USUAL
    boundary: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    _labels: dict[int, tuple[np.ndarray | None, ...]] = field(default_factory=dict)
    _along: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    _alike: dict[bytes, np.ndarray] = field(default_factory=dict)

    @cached_property
    def free(self) -> np.ndarray:
        """Boolean array over classes: which ones may leave."""
        return self.solution.free()

    @cached_property
    def freedom(self) -> tuple[int, int]:
        """How many elements the indices hold that may leave, and in how many classes.

        An element under two axes counts twice: a kernel that loses inputs may lose outputs as well. An axis
        that can only leave as a whole counts as one that stays: none is emptied unless that is allowed.
        """
        elements, classes = 0, [np.zeros(0, int)]
        for value in self.program.leaf_values:
            along = [labels for labels in self.labels(value) if labels is not None]
            size = math.prod(self.program.avals[value].shape)
            for labels in along:
                if (labels != labels[0]).any():
                    elements += size // len(labels) * int((labels >= 0).sum())
            classes += [labels[labels >= 0] for labels in along]
        return elements, len(np.unique(np.concatenate(classes)))

    @cached_property
    def ragged(self) -> frozenset[int]:
        """Values whose classes form no rectangle, which a dense array cannot hold cut.

        They stay whole; what leaves of them is not read again by the equations that move them on.
        """
        return frozenset(
            value
            for value, factors in self.factors.items()
            for f in factors
            if len(f.axes) > 1 and len(_varying(self._open[f.ids])) > 1
        )

    def labels(self, value: int) -> tuple[np.ndarray | None, ...]:
        """Per axis of a value the class of each index (-1: fixed), or None where nothing is tracked.

        Axes with the same classes share one array.
        """
        if value not in self._labels:
            result: list[np.ndarray | None] = [None] * len(self.program.avals[value].shape)
            for factor in () if value in self.ragged else self.factors.get(value, ()):
                position, labels = self._line(factor.ids)
                result[factor.axes[position]] = labels
            self._labels[value] = tuple(result)
        return self._labels[value]

    def lines(self) -> list[np.ndarray]:
        """Every distinct array of `labels` of some value's axis."""
        tracked = (factors for value, factors in self.factors.items() if value not in self.ragged)
        # Many values share an array of atoms.
        atoms = {id(f.ids): f.ids for factors in tracked for f in factors}
        lines = (self._line(ids)[1] for ids in atoms.values())
        return list({id(labels): labels for labels in lines}.values())

    def factor(self, value: int, axis: int) -> Factor:
        """The factor that covers an axis of a value that has labels there."""
        return next(f for f in self.factors[value] if axis in f.axes)

    def together(self, axes: Sequence[tuple[int, int]]) -> np.ndarray | None:
        """Classes of the indices of (value id, axis) pairs that run along one another; see `labels`."""
        result = None
        for value, axis in axes:
            labels = self.labels(value)[axis]
            if result is None:
                result = labels
            elif labels is not None and labels is not result:
                result = np.where(result < 0, labels, result)
        return result

    def reason(self, value: int, axis: int) -> str:
        """Why the first index of an axis that never leaves does not."""
        factor = self.factor(value, axis)
        fixed = (self.solution.fixed.get(label) for label in self.solution.labels[factor.ids].ravel())
        return next((reason for reason in fixed if reason), "")

    def zero(self, value: int) -> tuple[bool, ...]:
        """Per axis of a value whether dead positions are zero in the masked network."""
        result = [True] * len(self.program.avals[value].shape)
        for factor in self.factors.get(value, ()):
            for axis in factor.axes:
                result[axis] = factor.zero
        return tuple(result)

    def kept(self, value: int, alive: np.ndarray) -> Kept:
        """Per axis the indices whose class is alive, or None where all are.

        Args:
          value: a value id.
          alive: boolean array over classes; fixed classes count as alive.
        """
        result = []
        for labels in self.labels(value):
            index = None
            if labels is not None:
                alive_here = (labels < 0) | alive[labels]
                index = None if alive_here.all() else np.flatnonzero(alive_here)
            result.append(index)
        return tuple(result)

    @cached_property
    def _open(self) -> np.ndarray:
        """Per atom its class, or -1 where it is fixed."""
        labels = self.solution.labels
        return np.where(self.free[labels], labels, -1)

    def _line(self, ids: np.ndarray) -> tuple[int, np.ndarray]:
        """The position of the one axis of a factor that its classes depend on, and the classes along it."""
        # Element-wise operations hand on the very array of atoms: many values share it.
        if id(ids) not in self._along:
            position, labels = 0, self._open[ids]
            if labels.ndim > 1:
                varying = _varying(labels)
                position = varying[0] if varying else labels.ndim - 1
                labels = labels[tuple(slice(None) if p == position else 0 for p in range(labels.ndim))]
            self._along[id(ids)] = position, self._alike.setdefault(labels.tobytes(), labels)
        return self._along[id(ids)]


def _varying(labels: np.ndarray) -> list[int]:
    """The axes along which labels differ."""
    return [p for p in range(labels.ndim) if varies(labels, p)]


def varies(labels: np.ndarray, position: int) -> bool:
    """Whether labels differ along one of their axes."""
    return labels.shape[position] > 1 and bool((labels != np.take(labels, [0], axis=position)).any())
