"""Coupling analysis: one pass over a program, then one solution of what leaves together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from compaware_jax.coupling.analysis import Analysis, varies
from compaware_jax.coupling.dead import UNKNOWN, ZERO, Dead
from compaware_jax.coupling.derivatives import (
    asked_of,
    backward_of,
    derivative_of,
    flags,
    identity,
    is_elementwise,
    number_of,
    positions_of,
    reached_in_place,
)
from compaware_jax.coupling.factors import USUAL, Cuts, Factor, Tracked
from compaware_jax.coupling.ledger import Ledger, LooseEnd, Loosened, Solution
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Block, Equation, Program, is_smooth
from compaware_jax.coupling.rules import REGIONS, RULES
from compaware_jax.coupling.rules.families import fixed_elsewhere, zero_or_unknown
from compaware_jax.coupling.trace import flatten
from compaware_jax.errors import UnknownPrimitiveError


def analyse(
    program: Program,
    *,
    released: Sequence[int] = (),
    states: Sequence[tuple[int, int]] = (),
    taken: Sequence[int] = (),
    strict: bool = False,
    cuts: Cuts = USUAL,
    settled: bool = False,
) -> Analysis:
    """Find what leaves together in a traced function.

    Args:
      program: the traced function; its leaves get atoms, its other inputs are fixed, but for those taken.
      released: positions of outputs whose axes may be cut; all others are fixed.
      states: (output position, leaf position) pairs: the output is the leaf's next value, cut as it is.
      taken: positions of data inputs whose axes may be cut; what is missing of them is zero.
      strict: raise at a primitive without a rule instead of fixing what reaches it.
      cuts: how joint factors are cut.
      settled: leave it at that; otherwise its choices are tried, and those taken that free more of the
        leaves, or as much in more units.

    Raises:
      UnknownPrimitiveError: in strict mode, at a primitive without a rule.
    """
    ledger = partial(Ledger, is_differentiated=program.is_differentiated)
    asked = program, released, states, taken, strict
    best = _analyse(ledger(cuts=cuts), *asked)
    for choice in () if settled else sorted(best.choices):
        other = replace(best.cuts, choices=best.cuts.choices | {choice})
        trial = _analyse(ledger(cuts=other), *asked)
        if trial.freedom > best.freedom:
            best = replace(trial, choices=best.choices)
    if cuts.boundary and (loose := _loose_ends(best)):
        loosened = _analyse(ledger(cuts=best.cuts, loose=loose), *asked)
        best = replace(loosened, choices=best.choices)
    return best


def _loose_ends(analysis: Analysis) -> dict[Equation, list[LooseEnd]]:
    """Where contractions read weights at indices that never leave: there the weights alone may leave."""
    program = analysis.program
    of_weights = {*program.leaf_values, *program.constants}
    ends: dict[Equation, list[LooseEnd]] = {}
    for eqn in program.block.equations:
        rule = RULES.get(eqn.primitive)
        for operand, axis in [] if rule is None or rule.loose is None else rule.loose(eqn):
            value = eqn.inputs[operand]
            labels = analysis.labels(value)[axis]
            if labels is None or len(analysis.factor(value, axis).axes) > 1:
                continue
            # A weight that is gone contributes nothing only where it is zero in the masked network.
            gone_is_zero = value in of_weights and analysis.zero(value)[axis]
            if gone_is_zero and (labels < 0).any():
                ends.setdefault(eqn, []).append(
                    LooseEnd(operand, axis, labels < 0, analysis.reason(value, axis))
                )
        if of_weights.issuperset(eqn.inputs):
            of_weights.update(eqn.outputs)
    return ends


def _analyse(
    ledger: Ledger,
    program: Program,
    released: Sequence[int],
    states: Sequence[tuple[int, int]],
    taken: Sequence[int],
    strict: bool,
) -> Analysis:
    avals = program.avals
    inputs = [_leaf(ledger, avals[v].shape) for v in program.leaf_values]
    for n, (name, value) in enumerate(zip(program.arguments, program.argument_values, strict=True)):
        shape, what = avals[value].shape, f"data input `{name}`"
        inputs.append(_leaf(ledger, shape) if n in taken else _data(ledger, shape, what))
    propagation = _Propagation(ledger, program.constants, strict)
    outputs = propagation.block(program.block, inputs)
    leaf_of = dict(states)
    for position, (path, output) in enumerate(zip(program.output_paths, outputs, strict=True)):
        if position in leaf_of:
            leaf = propagation.values[program.leaf_values[leaf_of[position]]]
            combine(ledger, [leaf.factors, output.factors])
        elif position not in released:
            for factor in output.factors:
                ledger.fix(factor.ids, f"output `{path}`" if path else "output of the function")
    return propagation.close(program)


def analyse_seeded(
    program: Program, inputs: Sequence[Tracked], atoms: int, *, cuts: Cuts = USUAL
) -> Analysis:
    """Analyse a program whose inputs already carry atoms (integers below `atoms`); nothing is fixed."""
    return _seeded(program, inputs, atoms, cuts)[0].close(program)


def _seeded(
    program: Program, inputs: Sequence[Tracked], atoms: int, cuts: Cuts, *, nested: bool = False
) -> tuple[_Propagation, list[Tracked]]:
    """What `analyse_seeded` solves, and the outputs.

    With `nested`, the derivative rules of calls inside it are not looked at (a rule may call itself).
    """
    propagation = _Propagation(Ledger(cuts=cuts), program.constants, strict=False, nested=nested)
    propagation.ledger.fresh(atoms)
    return propagation, propagation.block(program.block, inputs)


def _leaf(ledger: Ledger, shape: tuple[int, ...]) -> Tracked:
    # Size-1 axes are never tracked: a learned scale of shape (1,) would unite everything.
    return Tracked(shape, tuple(Factor((a,), ledger.fresh(n), ZERO) for a, n in enumerate(shape) if n > 1))


def _data(ledger: Ledger, shape: tuple[int, ...], what: str) -> Tracked:
    return Tracked(shape, tuple(fixed_elsewhere(ledger, shape, (), what)))


@dataclass(eq=False)
class _Propagation:
    ledger: Ledger
    constants: Mapping[int, Any]
    strict: bool
    nested: bool = False
    values: dict[int, Tracked] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    derivatives: dict[Any, _DerivativeRule] = field(default_factory=dict)
    written: list[Loosened] = field(default_factory=list)

    def block(self, block: Block, inputs: Sequence[Tracked]) -> list[Tracked]:
        self.values.update(zip(block.inputs, inputs, strict=True))
        for eqn in block.equations:
            results = self.equation(eqn, [self.read(v) for v in eqn.inputs])
            self.values.update(zip(eqn.outputs, results, strict=True))
        return [self.read(v) for v in block.outputs]

    def read(self, value: int) -> Tracked:
        if value not in self.values:
            constant = self.constants[value]
            self.values[value] = Tracked(np.shape(constant), (), number_of(constant), positions_of(constant))
        return self.values[value]

    def equation(self, eqn: Equation, inputs: list[Tracked]) -> list[Tracked]:
        if eqn.primitive in RULES:
            ends, before = self.ledger.loose.get(eqn, ()), len(self.ledger.loosened)
            for end in ends:
                inputs[end.operand] = end.seen(self.ledger, inputs[end.operand])
            outputs = RULES[eqn.primitive].couple(self.ledger, eqn, inputs)
            if not RULES[eqn.primitive].elementwise:
                self._doubt_infinities(eqn, inputs, outputs)
            if ends:
                written = np.concatenate([f.ids.ravel() for x in outputs for f in x.factors])
                met = self.ledger.loosened[before:]
                self.written += [x for x in met if np.isin(x.in_place, written).any()]
            if not any(x.factors for x in inputs):
                # What is made of constants is cut where it meets what is cut.
                return [replace(x, factors=()) for x in outputs]
            return outputs
        if eqn.primitive in REGIONS:
            return REGIONS[eqn.primitive].couple(self.ledger, eqn, inputs, self.block)
        if eqn.bodies:
            outputs = self.block(eqn.bodies[0], inputs)
            if self.nested or self.keeps_derivatives_zero(eqn, inputs, outputs):
                return outputs
            return [_doubtful(x) for x in outputs]
        if not any(x.factors for x in inputs):
            return [Tracked(shape) for shape in eqn.out_shapes]
        if self.strict:
            raise UnknownPrimitiveError(
                f"find_groups: no rule for {eqn.where}. Expected only primitives with a rule, because "
                "strict=True. Register one with compaware_jax.register_rule(primitive, couple, slim), "
                "or pass strict=False to keep whole whatever reaches it."
            )
        self.unknown.append(eqn.where)
        reason = f"reaches {eqn.where}, which has no rule (see compaware_jax.register_rule)"
        for x in inputs:
            for factor in x.factors:
                self.ledger.fix(factor.ids, reason)
        return [_data(self.ledger, shape, reason) for shape in eqn.out_shapes]

    def _doubt_infinities(self, eqn: Equation, inputs: Sequence[Tracked], outputs: Sequence[Tracked]) -> None:
        """Mark what is infinite where it is dead, and not handed on: times zero it is no number."""
        lost = [f for x in inputs for f in x.factors if f.dead.infinite]
        if lost and not any(f.dead.infinite for x in outputs for f in x.factors):
            for factor in lost:
                self.ledger.mark_inexact(factor.ids, f"{eqn.where} meets infinity in its place")

    def keeps_derivatives_zero(
        self, eqn: Equation, inputs: Sequence[Tracked], outputs: Sequence[Tracked]
    ) -> bool:
        """Whether dead positions of a custom call have zero tangents, by its own derivative rule.

        A zero flag promises a zero value and a zero derivative: a later sum over the cut axis relies on
        both. What makes the rule infinite where it is dead is marked. The same call under the same pattern
        of atoms is answered once.
        """
        inputs = [self.with_vacuous_zeros(x) for x in inputs]
        memo, forward = self.derivatives, eqn.primitive is p.custom_jvp_call_p
        shared = flags(eqn, inputs, self.constants) if forward else None
        if shared in memo:
            return memo[shared].zero
        asked = [*inputs, *([] if forward else outputs)]
        everything = [f.ids.ravel() for x in asked for f in x.factors]
        names = np.unique(np.concatenate(everything)) if everything else np.zeros(0, int)
        local = [_renamed(x, names) for x in asked]
        pattern = tuple((x.uniform, *((f.axes, f.dead, f.ids.tobytes()) for f in x.factors)) for x in local)
        key = (*identity(eqn), pattern)
        if key not in memo:
            read = _read_forward if forward else _read_backward
            memo[key] = read(eqn, local, len(names), self.ledger.cuts)
        answer = memo[key]
        if shared is not None and answer.by_flags and not answer.singular:
            memo[shared] = answer
        for atoms, reason in answer.singular:
            self.ledger.mark_inexact(names[atoms], reason)
        return answer.zero

    def with_vacuous_zeros(self, x: Tracked) -> Tracked:
        """The value, where all that never leaves counts as zero when it does."""
        factors = tuple(
            replace(f, dead=ZERO) if not f.zero and self.ledger.all_fixed(f.ids) else f for f in x.factors
        )
        return replace(x, factors=factors)

    def close(self, program: Program) -> Analysis:
        factors = {value: x.factors for value, x in self.values.items()}
        joint = {value: fs for value, fs in factors.items() if any(len(f.axes) > 1 for f in fs)}
        moved = _only_moved(program.block) if joint else set()
        joint = [f for value, fs in joint.items() if value not in moved for f in fs if len(f.axes) > 1]
        solution = _solve(self.ledger, joint)
        # What is not written any more is zero: so it may not be where something is singular at zero.
        for met in self.written:
            classes = (solution.labels[atoms].tolist() for atoms in (met.atoms, met.in_place))
            for atom, place in zip(*classes, strict=True):
                if place in solution.inexact:
                    solution.inexact.setdefault(atom, solution.inexact[place])
        loosened = np.concatenate([np.zeros(0, int), *(x.atoms for x in self.ledger.loosened)])
        return Analysis(
            program=program,
            factors=factors,
            solution=solution,
            boundary=np.unique(solution.labels[loosened]),
            unknown=tuple(self.unknown),
            choices=frozenset(self.ledger.met),
            cuts=self.ledger.cuts,
        )


def _only_moved(block: Block) -> set[int]:
    """Values that equations which only move elements hand to one another, and to nothing else.

    They need not be cut: a channel shuffle makes one axis two and one again, and what leaves it is no row of
    either of the two.
    """
    inside, elsewhere = set[int](), set(block.outputs)
    for eqn in block.equations:
        rule = RULES.get(eqn.primitive)
        if rule is not None and rule.moves:
            inside.update(eqn.outputs)
        else:
            elsewhere.update(eqn.inputs)
    inner = (_only_moved(body) for eqn in block.equations for body in eqn.bodies)
    return (inside - elsewhere).union(*inner)


@dataclass(frozen=True)
class _DerivativeRule:
    """What was read of the derivative rule of a call.

    Attributes:
      zero: whether dead positions have zero tangents.
      by_flags: whether that was told element by element.
      singular: atoms that, dead, make the rule infinite, and why.
    """

    zero: bool
    by_flags: bool = False
    singular: tuple[tuple[np.ndarray, str], ...] = ()


def _read_forward(eqn: Equation, inputs: Sequence[Tracked], atoms: int, cuts: Cuts) -> _DerivativeRule:
    """Read a rule from operands and their tangents to tangents."""
    closed = derivative_of(eqn)
    if closed is None:
        return _DerivativeRule(zero=False)
    tangents = [Tracked(x.shape, tuple(map(zero_or_unknown, x.factors))) for x in inputs]
    program = flatten(closed, leaves=())
    read, outputs = _seeded(program, [*inputs, *tangents], atoms, cuts, nested=True)
    zero = all(f.zero for x in outputs for f in x.factors)
    return _DerivativeRule(zero, is_elementwise(program.block), read.ledger.singular(atoms))


def _read_backward(eqn: Equation, values: Sequence[Tracked], atoms: int, cuts: Cuts) -> _DerivativeRule:
    """Read a rule from operands and cotangents to cotangents.

    Dead positions have zero tangents where no cotangent of theirs reaches what is alive. That is told of
    rules that take cotangents position by position, if an operand is dead where what is made of it is.
    """
    closed = backward_of(eqn)
    if closed is None:
        return _DerivativeRule(zero=False)
    inputs, outputs = values[: len(eqn.inputs)], values[len(eqn.inputs) :]
    cotangents = [
        Tracked(x.shape, tuple(replace(f, dead=UNKNOWN) for f in x.factors))
        for x, aval in zip(outputs, eqn.out_avals, strict=True)
        if is_smooth(aval)
    ]
    program = flatten(closed, leaves=())
    read, _ = _seeded(program, [*inputs, *cotangents], atoms, cuts, nested=True)
    reached = reached_in_place(program.block, program.block.inputs[len(inputs) :])
    if reached is None:
        return _DerivativeRule(zero=False, singular=read.ledger.singular(atoms))
    asked = [x for x, mine in zip(inputs, asked_of(eqn), strict=True) if mine]
    back = [x for x, v in zip(asked, program.block.outputs, strict=True) if v in reached]
    zero = all(_dead_alike(x, y) for x in back for y in cotangents if x.shape == y.shape)
    return _DerivativeRule(zero, singular=read.ledger.singular(atoms))


def _dead_alike(x: Tracked, y: Tracked) -> bool:
    """Whether two values of a shape are dead at the same positions."""
    return len(x.factors) == len(y.factors) and all(
        any(f.axes == g.axes and np.array_equal(f.ids, g.ids) for g in y.factors) for f in x.factors
    )


def _renamed(x: Tracked, names: np.ndarray) -> Tracked:
    """A value whose atoms are called by their positions among these names."""
    factors = (replace(f, ids=np.searchsorted(names, f.ids)) for f in x.factors)
    return Tracked(x.shape, tuple(factors), x.uniform)


def _doubtful(x: Tracked) -> Tracked:
    return Tracked(x.shape, tuple(replace(f, dead=Dead(False, f.dead.values)) for f in x.factors), x.uniform)


def _solve(ledger: Ledger, joint: Iterable[Factor]) -> Solution:
    """Solve; then unite what a dense array cannot keep apart, until nothing changes.

    A dense array keeps a rectangle: a joint factor has to depend on one of its axes only. The axis that
    leaves most units stays.
    """
    joint = list(joint)
    while True:
        solution = ledger.solve()
        free = solution.free()
        changed = False
        for factor in joint:
            labels = solution.labels[factor.ids]
            labels = np.where(free[labels], labels, -1)
            varying = [axis for p, axis in enumerate(factor.axes) if varies(labels, p)]
            if len(varying) > 1:
                best = max(varying, key=lambda axis: _units_left(labels, factor.axes.index(axis)))
                ledger.collapse(factor, [best])
                changed = True
        if not changed:
            return solution


def _units_left(labels: np.ndarray, position: int) -> int:
    """How many units stay apart when labels are united along all axes but one."""
    trial = Ledger()
    names, ids = np.unique(labels, return_inverse=True)
    trial.fresh(len(names))
    trial.collapse(Factor(tuple(range(labels.ndim)), ids.reshape(labels.shape), ZERO), [position])
    solved = trial.solve()
    fixed = solved.labels[names < 0]
    return len(np.setdiff1d(solved.labels, fixed))
