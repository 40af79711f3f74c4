"""The values of a program at several widths, and what was computed wider than the plan has it."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from compaware_jax.coupling.analysis import Analysis
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules import Kept
from compaware_jax.coupling.rules.arrays import scatter, small_shape, take, within
from compaware_jax.coupling.work import flops_of


@dataclass(eq=False)
class Wider:
    """What ran wider than the plan has it, and with how many FLOPs in one run.

    Attributes:
      uncut: equations that cannot run small exactly.
      again: equations run for the sake of those, to rebuild an operand.
      alive: per equation the classes that were alive when it ran wider, each time.
    """

    uncut: dict[Equation, int] = field(default_factory=dict)
    again: dict[Equation, int] = field(default_factory=dict)
    alive: dict[Equation, list[np.ndarray]] = field(default_factory=dict)

    def note(self, eqn: Equation, run: Widths) -> None:
        """Put down that an equation runs wider, in a run."""
        kind = self.uncut if eqn in self.uncut else self.again
        kind[eqn] = kind.get(eqn, 0) + run.flops(eqn)
        self.alive.setdefault(eqn, []).append(run.alive)

    def add(self, other: Wider) -> None:
        """Take in what ran in a body."""
        self.uncut.update(other.uncut)
        self.again.update(other.again)
        self.alive.update(other.alive)


@dataclass(eq=False)
class Widths:
    """The values of equations run with some classes alive; and of wider runs, with more of them alive.

    Attributes:
      analysis: of the program.
      alive: boolean array over its classes.
      nested: whether it is inside a derivative rule.
      values: what was computed, cut to the classes alive.
      producers: the equations that were run, by their outputs.
      record: what ran wider than it should.
      before: what did when all of it was run before.
      narrower: the run in which all equations are run; None where that is this one.
      wider: runs of the same equations with more classes alive, by these.
      depth: how many runs asked for wider ones on the way to this one.
    """

    analysis: Analysis
    alive: np.ndarray
    nested: bool = False
    values: ChainMap[int, Any] = field(default_factory=ChainMap[int, Any])
    producers: dict[int, Equation] = field(default_factory=dict)
    record: Wider = field(default_factory=Wider)
    before: Wider = field(default_factory=Wider)
    narrower: Any = None
    wider: dict[bytes, Any] = field(default_factory=dict)
    depth: int = 0

    def kept(self, value: int) -> Kept:
        """Per axis of a value the indices that are here, None for all."""
        return self.analysis.kept(value, self.alive)

    def shape(self, value: int) -> tuple[int, ...]:
        """A value's shape here."""
        return small_shape(self.analysis.program.avals[value].shape, self.kept(value))

    def flops(self, eqn: Equation) -> int:
        """FLOPs of an equation at the shapes here."""
        return flops_of(eqn, self.shape)

    def read(self, value: int) -> Any:
        """A value that was computed, or a constant."""
        if value not in self.values:
            self.values[value] = jnp.asarray(self.analysis.program.constants[value])
        return self.values[value]

    def scope(self) -> Self:
        """The same run, whose new values are its own: those of another trace may not get out."""
        inner = replace(self, values=self.values.new_child(), wider={})
        for key, run in self.wider.items():
            values = run.values.new_child()
            inner.wider[key] = replace(run, values=values, narrower=inner, wider=inner.wider)
        return inner

    def widest(self, eqn: Equation) -> Self:
        """The run whose results of an equation have those of this one in them, as things were before."""
        others = [a for a in self.before.alive.get(eqn, []) if (a >= self.alive).all()]
        return self.widened(max(others, key=np.count_nonzero)) if others else self

    @property
    def full(self) -> Self:
        """The run with all classes alive, whose values are those of the masked network at full width."""
        return self.widened(np.ones_like(self.alive))

    def widened(self, classes: np.ndarray) -> Self:
        """The run with more classes alive."""
        alive = self.alive | classes
        if (alive == self.alive).all():
            return self
        key = alive.tobytes()
        if key not in self.wider:
            narrow = self if self.narrower is None else self.narrower
            self.wider[key] = replace(
                self, alive=alive, values=ChainMap(), narrower=narrow, depth=self.depth + 1
            )
        return self.wider[key]

    @property
    def subsets(self) -> list[Self]:
        """The runs whose classes alive are alive in this one, too."""
        runs = [self.narrower, *self.wider.values()] if self.narrower else []
        return [run for run in runs if run is not self and not (run.alive & ~self.alive).any()]

    def fills(self, value: int, wider: Widths) -> bool:
        """Whether a value of this run, with zeros at the places cut, is that of a wider one."""
        constants, labels = self.analysis.program.constants, self.analysis.solution.labels
        if value not in self.values and value not in constants:
            return False
        if value in self.analysis.ragged:
            factors = self.analysis.factors[value]
            return not any((wider.alive & ~self.alive)[labels[f.ids]].any() for f in factors)
        kept = self.analysis.zero(value), self.kept(value), wider.kept(value)
        return all(zero or within(have, want) is None for zero, have, want in zip(*kept, strict=True))

    def narrowed(self, value: int, kept: Kept) -> Any:
        """A value of this run cut to less."""
        places = (within(want, have) for want, have in zip(kept, self.kept(value), strict=True))
        return take(self.read(value), list(places))

    def filled(self, value: int) -> bool:
        """Whether a value that is not here is here now, out of a run whose classes are alive here, too."""
        source = next((run for run in self.subsets if run.fills(value, self)), None)
        if source is not None:
            kept = zip(source.kept(value), self.kept(value), strict=True)
            places = [within(have, want) for have, want in kept]
            self.values[value] = scatter(source.read(value), places, self.shape(value))
        elif value in self.full.values:
            self.values[value] = take(self.full.values[value], self.kept(value))
        return value in self.values
