"""The ledger of atoms against a union-find that looks at one pair at a time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from compaware_jax.coupling.ledger import Ledger


class Pairs:
    """Classes of atoms, kept one equality at a time."""

    def __init__(self):
        self.parent = {}

    def root(self, atom):
        while self.parent.get(atom, atom) != atom:
            atom = self.parent[atom]
        return atom

    def equate(self, a, b):
        for left, right in zip(*(x.ravel().tolist() for x in np.broadcast_arrays(a, b)), strict=True):
            self.parent[self.root(left)] = self.root(right)

    def fixed(self, marks):
        return {self.root(atom) for ids in marks for atom in ids.ravel().tolist()}


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1))
def test_classes(seed):
    """Whole runs, parts of runs, permutations, one with many: whatever is said, the classes are the same."""
    rng = np.random.default_rng(seed)
    ledger, pairs, marks = Ledger(), Pairs(), []
    size, arrays, empty = int(rng.integers(2, 6)), [], []
    for _ in range(rng.integers(2, 9)):
        # A run of nothing begins where the next one does.
        empty.append(ledger.fresh(0))
        arrays.append(ledger.fresh(size))
    ledger.equate(empty[0], empty[-1])
    for _ in range(rng.integers(1, 12)):
        a, b = (arrays[i] for i in rng.integers(0, len(arrays), 2))
        kind = rng.integers(6)
        if kind == 3:
            a, b = a[: size // 2], b[size - size // 2 :]
        elif kind == 4:
            a = rng.permutation(a)
        elif kind == 5:
            a = a[:1]
        if rng.random() < 0.2:
            ledger.fix(a, "fixed")
            marks.append(a)
        ledger.equate(a, b)
        pairs.equate(a, b)
        if kind == 4:
            arrays.append(a)
    solution = ledger.solve()
    roots = np.array([pairs.root(atom) for atom in range(ledger.size)])
    same = solution.labels[:, None] == solution.labels
    assert (same == (roots[:, None] == roots)).all()
    # Numbered in the order in which they first appear.
    assert (np.diff(np.unique(solution.labels, return_index=True)[1]) > 0).all()
    fixed = pairs.fixed(marks)
    assert {pairs.root(int(np.argmax(solution.labels == label))) for label in solution.fixed} == fixed
    for array in arrays:
        if ledger.all_fixed(array):
            assert {pairs.root(atom) for atom in array.tolist()} <= fixed
