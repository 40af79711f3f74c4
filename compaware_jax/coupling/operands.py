"""Where the operands of an equation meet: their factors on the same axes, equated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compaware_jax.coupling.dead import Dead
from compaware_jax.coupling.factors import Factor, Factors
from compaware_jax.coupling.ledger import Ledger


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
