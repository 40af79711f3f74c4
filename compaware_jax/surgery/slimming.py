"""Run a program on smaller arrays: the slimming reading of the rules, with un-cut as the way out.

Where a rule cannot run an equation at the small sizes exactly, the traced equation runs at full width:
its operands are rebuilt (zeros scattered where what was cut is zero in the masked network, otherwise
their producers run again at full width), and its outputs are cut. A body of a loop or branch that
needs so what comes from outside is given it at full width; a carry is then computed so at every step.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from compaware_jax.coupling.analysis import Analysis
from compaware_jax.coupling.derivatives import positions_of
from compaware_jax.coupling.program import Block, Checkpoint, Equation
from compaware_jax.coupling.rules import REGIONS, RULES, Kept, Parts, Small
from compaware_jax.coupling.rules.arrays import missing, scatter, small_shape, take
from compaware_jax.placement import dividing, explicit
from compaware_jax.surgery.small_derivatives import (
    InseparableError,
    cut_derivative,
    jvp_of_zeros,
    pulled_back,
    vjp_of_asked,
)


class _OutOfReachError(Exception):
    """A full-width value is needed whose producer lies outside the block being run."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


def run_small(
    analysis: Analysis, alive: np.ndarray, inputs: Sequence[jax.Array]
) -> tuple[list[jax.Array], FullWidth]:
    """Run an analysed program on inputs cut to the living classes.

    Args:
      analysis: the program and what leaves together in it.
      alive: boolean array over the analysis' classes.
      inputs: one array per input of the program, cut along the axes where classes died.

    Returns:
      The outputs, cut likewise, and what ran at full width.
    """
    run = _Run(analysis, alive)
    outputs = run.block(analysis.program.block, inputs)
    return outputs, run.record


@dataclass(eq=False)
class FullWidth:
    """What ran at full width: equations that had to, and equations run again to feed them.

    Attributes:
      uncut: equations that cannot run small exactly.
      again: equations run again to rebuild an operand of those.
    """

    uncut: dict[Equation, None] = field(default_factory=dict)
    again: dict[Equation, None] = field(default_factory=dict)


@dataclass(eq=False)
class _Run:
    analysis: Analysis
    alive: np.ndarray
    nested: bool = False
    small: MutableMapping[int, Any] = field(default_factory=dict)
    full: MutableMapping[int, Any] = field(default_factory=dict)
    producers: dict[int, Equation] = field(default_factory=dict)
    record: FullWidth = field(default_factory=FullWidth)

    def block(self, block: Block, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        self.small.update(zip(block.inputs, inputs, strict=True))
        self.equations(block.equations)
        return [self.read(v) for v in block.outputs]

    def equations(self, equations: Iterable[Equation], depth: int = 0) -> None:
        """Run equations in order, those of a call under `jax.checkpoint` under one, too; calls nest."""
        for calls, run in groupby(equations, lambda eqn: eqn.checkpoints[depth : depth + 1]):
            if calls:
                self.checkpointed(calls[0], tuple(run), depth + 1)
                continue
            for eqn in run:
                self.producers.update(dict.fromkeys(eqn.outputs, eqn))
                self.small.update(zip(eqn.outputs, self.results(eqn), strict=True))

    def checkpointed(self, checkpoint: Checkpoint, equations: Sequence[Equation], depth: int) -> None:
        # All that is made is handed out, to be found where an operand is rebuilt at full width; the compiler
        # drops what nobody reads.
        made = [v for eqn in equations for v in eqn.outputs]

        def run() -> list[Any]:
            # A scope of its own, as what is made here is of another trace.
            inner = replace(self, small=ChainMap({}, self.small), full=ChainMap({}, self.full))
            inner.equations(equations, depth)
            return [inner.small[v] for v in made]

        call = jax.checkpoint(run, policy=checkpoint.policy, prevent_cse=checkpoint.prevent_cse)
        self.small.update(zip(made, call(), strict=True))

    def results(self, eqn: Equation) -> list[Any]:
        kept = [self.kept(v) for v in eqn.outputs]
        with eqn.context:
            if self.analysis.ragged.intersection((*eqn.inputs, *eqn.outputs)):
                results = self.moved(eqn, kept)
            else:
                results = self.emptied(eqn, kept)
                if results is None:
                    results = self.equation(eqn, kept)
        if results is None:
            self.record.uncut[eqn] = None
            return [take(self.whole(v), index) for v, index in zip(eqn.outputs, kept, strict=True)]
        return results

    def kept(self, value: int) -> Kept:
        return self.analysis.kept(value, self.alive)

    def moved(self, eqn: Equation, kept: list[Kept]) -> list[jax.Array]:
        """The results of an equation that moves elements from or to a value that stays whole."""
        shapes = zip(eqn.inputs, eqn.in_shapes, strict=True)
        whole = [_spread(self.read(v), self.kept(v), shape) for v, shape in shapes]
        return [take(x, index) for x, index in zip(eqn.run(*whole), kept, strict=True)]

    def emptied(self, eqn: Equation, kept: list[Kept]) -> list[jax.Array] | None:
        """The results of an equation of which nothing is left, or of a product over nothing."""
        nothing = all(_is_empty(axes) for axes in kept)
        rule = RULES.get(eqn.primitive)
        if not nothing and rule is not None and rule.work is not None:
            nothing = any(
                all(z or index is None for z, index in zip(self.analysis.zero(v), self.kept(v), strict=True))
                for v in eqn.inputs
                if _is_empty(self.kept(v))
            )
        if not nothing or not eqn.outputs:
            return None
        avals = [self.analysis.program.avals[v] for v in eqn.outputs]
        shapes = [small_shape(aval.shape, axes) for aval, axes in zip(avals, kept, strict=True)]
        return [
            jnp.zeros(shape, aval.dtype, device=dividing(explicit(aval.sharding), shape))
            for shape, aval in zip(shapes, avals, strict=True)
        ]

    def read(self, value: int) -> Any:
        if value not in self.small:
            self.small[value] = jnp.asarray(self.analysis.program.constants[value])
        return self.small[value]

    def equation(self, eqn: Equation, kept: list[Kept]) -> list[jax.Array] | None:
        operands = [
            Small(self.read(v), self.kept(v), self.analysis.zero(v), self.known(v)) for v in eqn.inputs
        ]
        if any(_is_empty(x.kept) for x in operands):
            return None  # A largest of nothing, a mean of nothing: computed from the masked zeros.
        if eqn.primitive in RULES:
            slim = RULES[eqn.primitive].slim
            return None if slim is None else slim(eqn, operands, kept)
        if all(index is None for axes in [*kept, *(x.kept for x in operands)] for index in axes):
            return eqn.run(*[x.array for x in operands])
        if eqn.primitive in REGIONS:
            return self.region(eqn, operands, kept)
        if eqn.bodies:
            return self.call(eqn, eqn.bodies[0], operands, kept)
        return None

    def known(self, value: int) -> np.ndarray | None:
        constants = self.analysis.program.constants
        return positions_of(constants[value]) if value in constants else None

    def region(self, eqn: Equation, operands: list[Small], kept: list[Kept]) -> list[jax.Array] | None:
        """A loop or branch: its bodies run small, given at full width what they need so; or all un-cut."""
        parts, wide = REGIONS[eqn.primitive].parts(eqn), set[int]()
        inside = {value for body in eqn.bodies for value in body.inputs}
        while True:
            try:
                return self.bodies(eqn, operands, kept, parts, wide)
            except _OutOfReachError as error:
                if error.value not in inside:
                    raise  # It lies further outside.
                operand = parts.operand_of.get(error.value)
                if operand is None or operand in wide:
                    return None
                wide.add(operand)

    def bodies(
        self, eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept], parts: Parts, wide: set[int]
    ) -> list[jax.Array]:
        """The results of a loop or branch, some operands of which are handed in at full width."""
        record, seen, made = FullWidth(), list(operands), list(kept)

        def run(body: Block, arrays: Sequence[jax.Array], targets: Sequence[Kept]) -> list[jax.Array]:
            # A scope of its own: a body is traced apart, and its values are not those of another trace.
            inner, given = _Run(self.analysis, self.alive, nested=self.nested), list(arrays)
            for n, value in enumerate(body.inputs):
                if parts.operand_of.get(value) in wide:
                    inner.full[value], given[n] = given[n], take(given[n], inner.kept(value))
            results = inner.block(body, given)
            for n, (value, target) in enumerate(zip(body.outputs, targets, strict=True)):
                got = inner.kept(value)
                if any(aim is None and index is not None for aim, index in zip(target, got, strict=True)):
                    results[n], got = inner.whole(value), (None,) * len(got)
                results[n] = take(results[n], missing(target, got))
            record.uncut.update(inner.record.uncut)
            record.again.update(inner.record.again)
            return results

        for n in wide:
            whole = self.whole(eqn.inputs[n])
            seen[n] = Small(whole, (None,) * whole.ndim, operands[n].zero)
            if n in parts.carried:
                made[parts.carried[n]] = seen[n].kept
        results = REGIONS[eqn.primitive].slim(eqn, seen, made, run)
        self.full.update((eqn.outputs[at], results[at]) for n, at in parts.carried.items() if n in wide)
        self.record.uncut.update(record.uncut)
        self.record.again.update(record.again)
        return [take(x, missing(want, got)) for x, want, got in zip(results, kept, made, strict=True)]

    def whole(self, value: int) -> Any:
        """A value at full width, as the masked network would compute it."""
        # A stack, not recursion: a deep model may have thousands of such equations in a row.
        pending = [value]
        while pending:
            last = pending[-1]
            if last in self.full:
                pending.pop()
            elif self.is_scattered(last):
                shape = self.analysis.program.avals[last].shape
                self.full[last] = scatter(self.read(last), self.kept(last), shape)
            elif last in self.producers:
                eqn = self.producers[last]
                needed = [v for v in eqn.inputs if v not in self.full]
                if needed:
                    pending += needed
                    continue
                self.record.again[eqn] = None
                self.full.update(zip(eqn.outputs, eqn.run(*[self.full[v] for v in eqn.inputs]), strict=True))
            else:
                raise _OutOfReachError(last)
        return self.full[value]

    def is_scattered(self, value: int) -> bool:
        """Whether zeros at the cut places make a small value the full one."""
        if value not in self.small and value not in self.analysis.program.constants:
            return False
        if value in self.analysis.ragged:
            return False
        pairs = zip(self.analysis.zero(value), self.kept(value), strict=True)
        return all(zero or index is None for zero, index in pairs)

    def call(
        self, eqn: Equation, body: Block, operands: list[Small], kept: list[Kept]
    ) -> list[jax.Array] | None:
        """A call with its own derivative rule: body and rule both run small, or the call un-cut."""
        if eqn.primitive is p.custom_vjp_call_p:
            return self.call_with_backward(eqn, body, operands, kept)
        if eqn.primitive is not p.custom_jvp_call_p:
            return None
        analysis, alive, nested = self.analysis, self.alive, self.nested

        @cache
        def derivative() -> tuple[Analysis, np.ndarray]:
            return cut_derivative(eqn, analysis, alive, kept)

        @jax.custom_jvp
        def call(*arrays: jax.Array) -> list[jax.Array]:
            return _Run(analysis, alive, nested=nested).block(body, arrays)

        @call.defjvp
        def _(primals: Any, tangents: Any) -> tuple[list[jax.Array], list[jax.Array]]:
            rule, alive_in_it = derivative()
            run = _Run(rule, alive_in_it, nested=True)
            return call(*primals), run.block(rule.program.block, [*primals, *tangents])

        arrays = [x.array for x in operands]
        try:
            # A rule may call its own function, so inside a rule the next derivative is not looked at
            # before somebody takes it.
            jax.eval_shape(call if nested else partial(jvp_of_zeros, call), *arrays)
        except (_OutOfReachError, InseparableError):
            return None
        return call(*arrays)

    def call_with_backward(
        self, eqn: Equation, body: Block, operands: list[Small], kept: list[Kept]
    ) -> list[jax.Array] | None:
        """A call with a backward pass of its own: the body runs small; differentiated, the call runs un-cut.

        What its forward pass saves, and how its backward pass uses that, follows no equations of the body.
        """
        if not all(map(self.is_scattered, eqn.inputs)):
            return None
        analysis, alive, nested = self.analysis, self.alive, self.nested
        places = [(self.kept(v), analysis.program.avals[v].shape) for v in eqn.inputs]
        # What the function closed over comes first; it has no derivative, and to ask for it is an error.
        outside = eqn.params["num_consts"]
        closed, arrays = [x.array for x in operands[:outside]], [x.array for x in operands[outside:]]

        @jax.custom_vjp
        def call(*arrays: jax.Array) -> list[jax.Array]:
            return _Run(analysis, alive, nested=nested).block(body, [*closed, *arrays])

        def un_cut(*arrays: jax.Array) -> list[jax.Array]:
            small = zip([*closed, *arrays], places, strict=True)
            full = [scatter(x, index, shape) for x, (index, shape) in small]
            return [take(x, index) for x, index in zip(eqn.run(*full), kept, strict=True)]

        call.defvjp(partial(vjp_of_asked, un_cut), pulled_back, symbolic_zeros=True)
        try:
            jax.eval_shape(call, *arrays)
        except _OutOfReachError:
            return None
        return call(*arrays)


def _spread(array: jax.Array, kept: Kept, shape: tuple[int, ...]) -> jax.Array:
    """An array with what is kept at its full places and any numbers elsewhere: cheaper than `scatter`."""
    if _is_empty(kept):
        return scatter(array, kept, shape)
    places = (
        None if index is None else np.clip(np.searchsorted(index, np.arange(size)), 0, len(index) - 1)
        for index, size in zip(kept, shape, strict=True)
    )
    return take(array, list(places), distinct=False)


def _is_empty(kept: Kept) -> bool:
    return any(index is not None and len(index) == 0 for index in kept)
