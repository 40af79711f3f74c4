"""Atoms and factors: who lives and dies together inside one value.

Every index of every tracked axis carries an *atom*. A *factor* says, for a tuple of axes of a value,
which atom each position along those axes depends on; the position is dead when its atom is removed.
Atoms are plain integers, handed out by a `Ledger`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compaware_jax.coupling.dead import Dead


@dataclass(frozen=True, eq=False)
class Factor:
    """Atoms of a value along some of its axes.

    Attributes:
      axes: the axes, ascending; an axis is in at most one factor of a value.
      ids: integer atoms, one dimension per axis, of the value's sizes.
      dead: what dead positions are.
    """

    axes: tuple[int, ...]
    ids: np.ndarray
    dead: Dead

    @property
    def zero(self) -> bool:
        """Whether dead positions are exactly zero in the masked network."""
        return self.dead.zero

    @property
    def outer_first(self) -> tuple[int, ...]:
        """The axes from the outermost to the innermost, as they lay when they were one."""
        origin = (0,) * self.ids.ndim
        steps = {}
        for position, (axis, size) in enumerate(zip(self.axes, self.ids.shape, strict=True)):
            next_one = (*origin[:position], min(1, size - 1), *origin[position + 1 :])
            steps[axis] = abs(int(self.ids[next_one]) - int(self.ids[origin]))
        return tuple(sorted(self.axes, key=lambda axis: -steps[axis]))

    def moved(self, axis_map: dict[int, int]) -> Factor:
        """The same factor with its axes renamed (and the array transposed to keep them ascending)."""
        axes = tuple(int(axis_map[a]) for a in self.axes)
        if len(axes) == 1:
            return Factor(axes, self.ids, self.dead)
        order = np.argsort(axes)
        return Factor(tuple(axes[i] for i in order), self.ids.transpose(order), self.dead)


Factors = tuple[Factor, ...]
Choice = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes of a joint factor's axes that an operation keeps, and of those that it does away with.

Of a contraction: which axes it contracts, counted from the outermost, and the sizes of all from there on.
"""


@dataclass(frozen=True)
class Cuts:
    """How to cut where there is a choice.

    Attributes:
      within_heads: products over (head, channel) leave by channels of all heads, not by whole heads.
      boundary: weights of a contraction may leave at an index that itself stays: they read less of an
        input, or write less of an output.
      choices: the choices of how to cut joint factors that are not taken the usual way; see
        `Ledger.chosen`.
    """

    within_heads: bool = False
    boundary: bool = False
    choices: frozenset[Choice] = frozenset()


USUAL = Cuts()
"""Whole heads; otherwise the outer of two joined axes."""


@dataclass(frozen=True, eq=False)
class Tracked:
    """What a coupling rule sees of a value: its shape, its factors, its value where uniform.

    Attributes:
      shape: the full (unpruned) shape.
      factors: see `Factor`.
      uniform: the number that every element equals, where the trace shows it; else None.
      known: the value itself, where it is an array of integers or flags that the trace shows.
    """

    shape: tuple[int, ...]
    factors: Factors = ()
    uniform: float | None = None
    known: np.ndarray | None = None

    def factor_of(self, axis: int) -> Factor | None:
        """The factor that covers an axis, if any."""
        return next((f for f in self.factors if axis in f.axes), None)


def minimal(axes: Sequence[int], ids: np.ndarray, dead: Dead) -> Factor:
    """A factor over `axes` without the axes along which it is constant (at least one is kept)."""
    keep = [
        position
        for position in range(ids.ndim)
        if ids.shape[position] > 1 and (ids != np.take(ids, [0], axis=position)).any()
    ]
    if not keep:
        keep = [int(np.argmax(ids.shape))]
    index = tuple(slice(None) if p in keep else 0 for p in range(ids.ndim))
    return Factor(tuple(axes[p] for p in keep), ids[index], dead)
