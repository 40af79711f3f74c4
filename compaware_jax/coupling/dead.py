"""What the dead positions of a value are in the masked network: those whose atom is removed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Dead:
    """What the dead positions of a value are in the masked network.

    Attributes:
      zero: whether all of them are exactly zero, and stay so when what made them changes a little.
      values: numbers that some of them become, as far as the trace shows, infinities included. There may be
        others.
    """

    zero: bool
    values: frozenset[float]

    @property
    def infinite(self) -> bool:
        """Whether some of them become infinite."""
        return any(map(math.isinf, self.values))


ZERO = Dead(True, frozenset({0.0}))
BLANK = Dead(True, frozenset())
"""Zero, but not because anything left: the dense network's are, too."""
UNKNOWN = Dead(False, frozenset())

# Beyond so many, the largest finite ones are not followed.
_FOLLOWED = 4


def one_of(cases: Iterable[Dead]) -> Dead:
    """What holds of a value that is one of several, or is made of them."""
    cases = list(cases)
    return Dead(all(case.zero for case in cases), few(value for case in cases for value in case.values))


def few(values: Iterable[float]) -> frozenset[float]:
    """The values that are worth following: the smallest ones, and infinities."""
    values = set(values)
    finite = sorted(filter(math.isfinite, values), key=abs)[:_FOLLOWED]
    return frozenset([*finite, *filter(math.isinf, values)])
