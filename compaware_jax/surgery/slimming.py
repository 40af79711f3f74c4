"""Run a program on smaller arrays: the slimming reading of the rules, with un-cut as the way out.

Where a rule cannot run an equation at the small sizes exactly, the equation runs wider: in a run with more
classes alive, those of one axis where that will do, else those of all its axes. Such a run finds its values
in the narrower one (with zeros scattered where what was cut is zero in the masked network), otherwise their
producers run again in it. A body of a loop or branch that needs so what comes from outside is given it at
full width; a carry is then computed so at every step.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
from compaware_jax.placement import dividing, explicit, struct_of
from compaware_jax.surgery.small_derivatives import (
    InseparableError,
    cut_derivative,
    jvp_of_zeros,
    pulled_back,
    vjp_of_asked,
)
from compaware_jax.surgery.widths import Wider, Widths


class _OutOfReachError(Exception):
    """A wider value is needed whose producer lies outside the block being run."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


def run_small(
    analysis: Analysis, alive: np.ndarray, inputs: Sequence[jax.Array], before: Wider
) -> tuple[list[jax.Array], Wider]:
    """Run an analysed program on inputs cut to the living classes.

    Args:
      analysis: the program and what leaves together in it.
      alive: boolean array over the analysis' classes.
      inputs: one array per input of the program, cut along the axes where classes died.
      before: what runs wider, as `wider_on_shapes` found it. What would run both so and less wide runs once,
        and is cut.

    Returns:
      The outputs, cut likewise, and what ran wider than its classes.
    """
    run = _Run(analysis, alive, before=before)
    outputs = run.block(analysis.program.block, inputs)
    return outputs, run.record


def wider_on_shapes(analysis: Analysis, alive: np.ndarray, inputs: Sequence[Any]) -> Wider:
    """What would run wider in `run_small`; nothing is computed.

    Args:
      analysis: the program and what leaves together in it.
      alive: boolean array over the analysis' classes.
      inputs: one array, or shape, per input of the program.
    """
    found: list[Wider] = []

    def run(*inputs: jax.Array) -> None:
        found.append(run_small(analysis, alive, inputs, Wider())[1])

    jax.eval_shape(run, *inputs)
    return found[0]


@dataclass(eq=False)
class _Run(Widths):
    """Equations run with some classes alive."""

    def block(self, block: Block, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        self.values.update(zip(block.inputs, inputs, strict=True))
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
                self.values.update(zip(eqn.outputs, self.results(eqn), strict=True))

    def checkpointed(self, checkpoint: Checkpoint, equations: Sequence[Equation], depth: int) -> None:
        # All that is made is handed out, to be found where a wider run needs it; the compiler drops what
        # nobody reads.
        made = [v for eqn in equations for v in eqn.outputs]

        def run() -> tuple[list[Any], dict[bytes, dict[int, Any]]]:
            inner = self.scope()
            inner.equations(equations, depth)
            wider = {key: dict(run.values.maps[0]) for key, run in inner.wider.items()}
            return [inner.values[v] for v in made], wider

        values, wider = jax.checkpoint(run, policy=checkpoint.policy, prevent_cse=checkpoint.prevent_cse)()
        self.values.update(zip(made, values, strict=True))
        for key, found in wider.items():
            self.widened(np.frombuffer(key, bool)).values.update(found)

    def results(self, eqn: Equation) -> list[Any]:
        kept = [self.kept(v) for v in eqn.outputs]
        run = self.widest(eqn)
        if run is self:
            with eqn.context:
                results = self.tried(eqn, kept)
            if results is not None:
                if self.narrower is not None:
                    self.record.note(eqn, self)
                return results
            run = self.widened(self.needed(eqn))
            self.record.uncut.setdefault(eqn, 0)
        elif eqn in self.before.uncut:
            self.record.uncut.setdefault(eqn, 0)
        for v in eqn.outputs:
            run.obtain(v)
        return [run.narrowed(v, index) for v, index in zip(eqn.outputs, kept, strict=True)]

    def obtain(self, value: int) -> Any:
        """A value of a wider run: out of another one, or by its producers."""
        # A stack, not recursion: a deep model may have thousands of such equations in a row.
        pending, constants = [value], self.analysis.program.constants
        while pending:
            last = pending[-1]
            if last in self.values or last in constants or self.filled(last):
                pending.pop()
            elif last not in self.producers:
                raise _OutOfReachError(last)
            else:
                eqn = self.producers[last]
                needed = [v for v in eqn.inputs if v not in self.values and v not in constants]
                pending += needed
                if not needed:
                    self.values.update(zip(eqn.outputs, self.results(eqn), strict=True))
        return self.read(value)

    def tried(self, eqn: Equation, kept: list[Kept]) -> list[Any] | None:
        """The results of an equation, or None where it does not run exactly with these classes alive."""
        if self.analysis.ragged.intersection((*eqn.inputs, *eqn.outputs)):
            return self.moved(eqn, kept)
        results = self.emptied(eqn, kept)
        return self.equation(eqn, kept) if results is None else results

    def needed(self, eqn: Equation) -> np.ndarray:
        """The classes with which an equation runs that does not without: of one axis, or else of all."""
        if self.depth >= _DEEPEST:
            return ~self.alive
        labels = self.analysis.solution.labels
        sets: dict[bytes, np.ndarray] = {}
        for value in (*eqn.inputs, *eqn.outputs):
            for factor in self.analysis.factors.get(value, ()):
                classes = np.zeros_like(self.alive)
                classes[labels[factor.ids]] = True
                classes &= ~self.alive
                if classes.any():
                    sets[classes.tobytes()] = classes
        enough = []
        if len(sets) > 1 and self.narrower is None:
            enough = [classes for classes in sets.values() if self.widened(classes).would_run(eqn)]
        if enough:
            return min(enough, key=lambda classes: self.widened(classes).flops(eqn))
        return np.logical_or.reduce(list(sets.values()))

    def would_run(self, eqn: Equation) -> bool:
        """Whether an equation, by its rule, runs exactly with these classes alive; nothing is computed."""
        rule = RULES.get(eqn.primitive)
        if rule is None or rule.slim is None:
            return False
        avals = [self.analysis.program.avals[v] for v in eqn.inputs]
        structs = [
            struct_of(aval, aval.dtype, self.shape(v)) for aval, v in zip(avals, eqn.inputs, strict=True)
        ]
        found: list[bool] = []

        def run(*arrays: jax.Array) -> None:
            trial = replace(self, values=ChainMap(dict(zip(eqn.inputs, arrays, strict=True))))
            found.append(trial.tried(eqn, [self.kept(v) for v in eqn.outputs]) is not None)

        with eqn.context:
            jax.eval_shape(run, *structs)
        return found[0]

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

    def equation(self, eqn: Equation, kept: list[Kept]) -> list[jax.Array] | None:
        operands = [
            Small(self.read(v), self.kept(v), self.analysis.zero(v), self.known(v)) for v in eqn.inputs
        ]
        if any(_is_empty(x.kept) for x in operands):
            return None  # A largest of nothing, a mean of nothing: computed from the masked zeros.
        if all(index is None for axes in [*kept, *(x.kept for x in operands)] for index in axes):
            return eqn.run(*[x.array for x in operands])
        if eqn.primitive in RULES:
            slim = RULES[eqn.primitive].slim
            return None if slim is None else slim(eqn, operands, kept)
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
        record, seen, made = Wider(), list(operands), list(kept)

        def run(body: Block, arrays: Sequence[jax.Array], targets: Sequence[Kept]) -> list[jax.Array]:
            # A scope of its own: a body is traced apart, and its values are not those of another trace.
            inner, given = _Run(self.analysis, self.alive, self.nested, before=self.before), list(arrays)
            for n, value in enumerate(body.inputs):
                if parts.operand_of.get(value) in wide:
                    inner.full.values[value], given[n] = given[n], take(given[n], inner.kept(value))
            results = inner.block(body, given)
            for n, (value, target) in enumerate(zip(body.outputs, targets, strict=True)):
                got = inner.kept(value)
                if any(aim is None and index is not None for aim, index in zip(target, got, strict=True)):
                    results[n], got = inner.full.obtain(value), (None,) * len(got)
                results[n] = take(results[n], missing(target, got))
            record.add(inner.record)
            return results

        for n in wide:
            whole = self.full.obtain(eqn.inputs[n])
            seen[n] = Small(whole, (None,) * whole.ndim, operands[n].zero)
            if n in parts.carried:
                made[parts.carried[n]] = seen[n].kept
        results = REGIONS[eqn.primitive].slim(eqn, seen, made, run)
        self.full.values.update(
            (eqn.outputs[at], results[at]) for n, at in parts.carried.items() if n in wide
        )
        self.record.add(record)
        return [take(x, missing(want, got)) for x, want, got in zip(results, kept, made, strict=True)]

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
        if not all(self.fills(v, self.full) for v in eqn.inputs):
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


# From here on a wider run has all classes alive: each asks for the next one by recursion.
_DEEPEST = 8


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
