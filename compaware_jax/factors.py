"""Atoms and factors: who lives and dies together inside one value.

Every index of every tracked axis carries an *atom*. A *factor* says, for a tuple of axes of a value,
which atom each position along those axes depends on; the position is dead when its atom is removed.
Atoms are plain integers handed out by a `Ledger`, which also collects the equalities between them;
they are solved once, at the end, by connected components.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from compaware_jax.dead import Dead


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


@dataclass(frozen=True, eq=False)
class LooseEnd:
    """An axis of an operand some of whose indices leave apart from the equation that reads them.

    Attributes:
      operand: its position.
      axis: of the operand.
      where: boolean array over the axis.
      reason: why the index itself stays.
    """

    operand: int
    axis: int
    where: np.ndarray
    reason: str

    def seen(self, ledger: Ledger, x: Tracked) -> Tracked:
        """The operand as the equation sees it: at the loose indices it has atoms that stay."""
        factors = []
        for factor in x.factors:
            if factor.axes == (self.axis,):
                ids = factor.ids.copy()
                ids[self.where] = ledger.fresh_fixed(int(self.where.sum()), reason=self.reason)
                ledger.loosened.append(Loosened(factor.ids[self.where], ids[self.where]))
                factor = replace(factor, ids=ids)
            factors.append(factor)
        return replace(x, factors=tuple(factors))


@dataclass(frozen=True, eq=False)
class Loosened:
    """Atoms that leave apart from an equation, and those that it sees in their place: these stay."""

    atoms: np.ndarray
    in_place: np.ndarray


@dataclass(eq=False)
class Ledger:
    """Hands out atoms and collects what is known about them (the only mutable state of an analysis).

    Attributes:
      size: atoms handed out.
      cuts: how joint factors are cut.
      met: choices met.
      is_differentiated: whether a derivative passes through a value, by its id.
      loose: per equation the ends of its operands that leave apart from it.
      loosened: what was met there.
    """

    size: int = 0
    cuts: Cuts = USUAL
    is_differentiated: Callable[[int], bool] = lambda value: True
    loose: Mapping[Any, Sequence[LooseEnd]] = field(default_factory=dict)
    loosened: list[Loosened] = field(default_factory=list)
    met: set[Choice] = field(default_factory=set)
    _runs: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    _same_runs: list[tuple[int, int]] = field(default_factory=list)
    _edges: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _fixed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    _inexact: list[tuple[np.ndarray, str]] = field(default_factory=list)
    _flags: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    _doubted: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def chosen(self, choice: Choice) -> bool:
        """Whether to cut along the other axes of a joint factor than is usual.

        Equations that meet the same choice take it alike. The analysis tries both.
        """
        self.met.add(choice)
        return choice in self.cuts.choices

    def fresh(self, *shape: int) -> np.ndarray:
        """New atoms, of the given shape."""
        start, self.size = self.size, self.size + math.prod(shape)
        if self.size > len(self._flags):
            self._flags = np.concatenate([self._flags, np.zeros(self.size, bool)])
            self._doubted = np.concatenate([self._doubted, np.zeros(self.size, bool)])
        ids = np.arange(start, self.size).reshape(shape)
        # Known by its identity, so it is kept, and may not change.
        ids.flags.writeable = False
        self._runs[id(ids)] = start, ids
        return ids

    def fix(self, ids: np.ndarray, reason: str) -> None:
        """Say that atoms never leave, and why."""
        self._flags[ids] = True
        self._fixed.append((ids, reason))

    def fresh_fixed(self, *shape: int, reason: str) -> np.ndarray:
        """New atoms that never leave."""
        ids = self.fresh(*shape)
        self.fix(ids, reason)
        return ids

    def all_fixed(self, ids: np.ndarray) -> bool:
        """Whether every one of these atoms is known to be fixed, by itself or by an equality met since."""
        return bool(self._flags[ids].all())

    def stays(self, ids: np.ndarray) -> bool:
        """Whether every one of these atoms is known to be fixed, or has been marked inexact directly."""
        return bool((self._flags[ids] | self._doubted[ids]).all())

    def mark_inexact(self, ids: np.ndarray, reason: str) -> None:
        """Say that removing these atoms is not what masking them does (0/0, 1/0), and why."""
        self._doubted[ids] = True
        self._inexact.append((ids, reason))

    def equate(self, a: np.ndarray, b: np.ndarray) -> None:
        """Say that atoms leave together, position by position (arrays broadcast)."""
        if a is b or not (a.size and b.size):
            return
        if a.shape == b.shape and id(a) in self._runs and id(b) in self._runs:
            # Nearly always one whole axis with another, as they were handed out: no need to look inside.
            self._same_run(self._runs[id(a)][0], self._runs[id(b)][0], a.size)
            return
        differs = a != b
        if differs.any():
            a, b = (x[differs] for x in np.broadcast_arrays(a, b))
            self._edges.append((a, b))
            # One fixes the other. What fixes either of them later is not followed.
            fixed = self._flags[a] | self._flags[b]
            if fixed.any():
                self._flags[a[fixed]] = self._flags[b[fixed]] = True

    def _same_run(self, a: int, b: int, size: int) -> None:
        self._same_runs.append((a, b))
        left, right = self._flags[a : a + size], self._flags[b : b + size]
        left |= right
        right |= left

    def collapse(self, factor: Factor, axes: Sequence[int]) -> Factor:
        """Make a factor depend on `axes` only, uniting its atoms along its other axes."""
        for position, axis in reversed(list(enumerate(factor.axes))):
            if axis not in axes:
                first = np.take(factor.ids, [0], axis=position)
                self.equate(factor.ids, first)
                factor = replace(
                    factor,
                    axes=tuple(a for a in factor.axes if a != axis),
                    ids=np.take(first, 0, axis=position),
                )
        return factor

    def singular(self, atoms: int) -> tuple[tuple[np.ndarray, str], ...]:
        """Which of the first so many atoms are marked inexact, or tied to one that is, and why."""
        if not self._inexact:
            return ()
        solution = self.solve()
        labels = solution.labels[:atoms]
        marked = ((np.flatnonzero(labels == label), reason) for label, reason in solution.inexact.items())
        return tuple((ids, reason) for ids, reason in marked if ids.size)

    def solve(self) -> Solution:
        """Classes of atoms under the equalities collected so far."""
        node_of, nodes = self._nodes()
        empty = [(np.zeros(0, int),) * 2]
        a, b = (node_of[np.concatenate(ends)] for ends in zip(*(self._edges or empty), strict=True))
        graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(nodes, nodes))
        count, labels = connected_components(graph, directed=False)
        labels = labels[node_of]
        return Solution(
            labels=labels,
            count=count,
            fixed=_first_reasons(self._fixed, labels),
            inexact=_first_reasons(self._inexact, labels),
        )

    def _nodes(self) -> tuple[np.ndarray, int]:
        """Per atom its node, and how many nodes there are: atoms that are the same by whole runs are one."""
        first: dict[int, int] = {}

        def root(start: int) -> int:
            while (above := first.get(start, start)) != start:
                first[start] = first.get(above, above)
                start = above
            return start

        for a, b in self._same_runs:
            a, b = root(a), root(b)
            first[max(a, b)] = min(a, b)
        # Runs lie one behind the other; the first of those that are the same comes before the others.
        nodes, node_of_start, shifts = 0, dict[int, int](), []
        for start, ids in self._runs.values():
            if (of := root(start)) == start:
                node_of_start[start] = nodes
                nodes += ids.size
            shifts.append(node_of_start[of] - start)
        sizes = [ids.size for _, ids in self._runs.values()]
        node_of = np.repeat(np.array(shifts, int), sizes)
        node_of += np.arange(self.size)
        return node_of, nodes


def _first_reasons(marks: list[tuple[np.ndarray, str]], labels: np.ndarray) -> dict[int, str]:
    """Per class with a mark the reason of its first one."""
    if not marks:
        return {}
    marked = labels[np.concatenate([ids.ravel() for ids, _ in marks])]
    classes, first = np.unique(marked, return_index=True)
    ends = np.cumsum([ids.size for ids, _ in marks])
    which = np.searchsorted(ends, first, side="right")
    return {label: marks[n][1] for label, n in zip(classes.tolist(), which.tolist(), strict=True)}


@dataclass(frozen=True, eq=False)
class Solution:
    """Classes of atoms: `labels[atom]` in [0, count); reasons of the fixed and the inexact classes."""

    labels: np.ndarray
    count: int
    fixed: dict[int, str]
    inexact: dict[int, str]

    def free(self) -> np.ndarray:
        """Boolean array over classes: which ones are not fixed."""
        free = np.ones(self.count, bool)
        free[list(self.fixed)] = False
        return free


def combine(
    ledger: Ledger, operands: Sequence[Factors]
) -> list[tuple[tuple[int, ...], np.ndarray, list[Dead | None]]]:
    """Equate the factors of several operands that share their axes.

    Factors that overlap without spanning the same axes are collapsed onto the axes they share; where one
    of them never leaves, the other is collapsed onto the axes that it has to itself.

    Returns:
      A list of (axes, ids, dead), where dead holds what each operand's dead positions are, or None where the
      operand has no factor on these axes.
    """
    # Factors of one axis each overlap only where they are equal.
    if any(len(factor.axes) > 1 for factors in operands for factor in factors):
        operands = _apart(ledger, operands)
    merged: dict[tuple[int, ...], tuple[np.ndarray, list[Dead | None]]] = {}
    for index, factors in enumerate(operands):
        for factor in factors:
            if factor.axes not in merged:
                merged[factor.axes] = (factor.ids, [None] * len(operands))
            ids, dead = merged[factor.axes]
            ledger.equate(ids, factor.ids)
            dead[index] = factor.dead
    return [(axes, ids, dead) for axes, (ids, dead) in merged.items()]


def _apart(ledger: Ledger, operands: Sequence[Factors]) -> list[Factors]:
    """The operands' factors, those that overlap reconciled: any two span the same axes, or share none."""
    pool = [[index, factor] for index, factors in enumerate(operands) for factor in factors]
    changed = True
    while changed:
        changed = False
        for left in pool:
            for right in pool:
                shared = set(left[1].axes) & set(right[1].axes)
                if shared and left[1].axes != right[1].axes:
                    left[1], right[1] = _reconciled(ledger, left[1], right[1], shared)
                    changed = True
    return [tuple(factor for index, factor in pool if index == n) for n in range(len(operands))]


def _reconciled(ledger: Ledger, left: Factor, right: Factor, shared: set[int]) -> tuple[Factor, Factor]:
    """Two factors collapsed so that they span the same axes, or share none."""
    for fixed, other in ((left, right), (right, left)):
        rest = [a for a in other.axes if a not in shared]
        if rest and ledger.stays(fixed.ids) and not ledger.stays(other.ids):
            other = ledger.collapse(other, rest)
            return (fixed, other) if fixed is left else (other, fixed)
    # Of heads and channels that meet heads alone, the channels stay apart where these are what shall leave.
    by_channels = [
        ledger.cuts.within_heads and len(factor.axes) > 1 and {factor.outer_first[0]} == shared
        for factor in (left, right)
    ]
    if any(by_channels):
        left, right = (
            ledger.collapse(factor, [a for a in factor.axes if a not in shared]) if mine else factor
            for factor, mine in zip((left, right), by_channels, strict=True)
        )
        return left, right
    axes = sorted(shared)
    return ledger.collapse(left, axes), ledger.collapse(right, axes)


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
