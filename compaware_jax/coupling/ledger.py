"""The ledger: atoms, the equalities between them, and what never leaves.

Equalities are collected while equations are read, and solved once, at the end, by connected components.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from compaware_jax.coupling.factors import USUAL, Choice, Cuts, Factor, Tracked


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
