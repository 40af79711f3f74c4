"""Loops and branches: bodies are read with what is known of their inputs, and run again on small arrays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from compaware_jax.coupling.dead import BLANK, ZERO, Dead, one_of
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import cut, missing, scatter
from compaware_jax.coupling.rules.families import common_value, dead_of
from compaware_jax.coupling.rules.registry import REGIONS, Kept, Parts, Read, RegionRule, RunBody, Small
from compaware_jax.coupling.trace import scan_parts, while_parts

# So many steps of a loop are read with all that dead positions become.
_FOLLOWED = 3


def _carried(ledger: Ledger, x: Tracked) -> Tracked:
    """A carry before the first step: axes that nothing was known of may leave with what the body ties."""
    covered = {a for f in x.factors for a in f.axes}
    new = (
        Factor((a,), ledger.fresh(n), dead_of(x)) for a, n in enumerate(x.shape) if n > 1 and a not in covered
    )
    factors = (*x.factors, *new)
    return Tracked(x.shape, factors, x.uniform if factors else None)


def _joined(ledger: Ledger, xs: Sequence[Tracked]) -> Tracked:
    """What holds of a value that is one of several, all of one shape."""
    factors = []
    for axes, ids, dead in combine(ledger, [x.factors for x in xs]):
        factors.append(Factor(axes, ids, one_of(map(dead_of, xs, dead))))
    return Tracked(xs[0].shape, tuple(factors), common_value(xs))


def _settled(ledger: Ledger, carry: list[Tracked], step: Any) -> tuple[list[Tracked], Any]:
    """Read a loop's body until what holds of the carry holds after a step, too."""
    for steps in itertools.count(1):
        after, others = step(carry)
        joined = [_joined(ledger, pair) for pair in zip(carry, after, strict=True)]
        if steps > _FOLLOWED:
            joined = [_zeros_alone(x) for x in joined]
        if [_form(x) for x in joined] == [_form(x) for x in carry]:
            break
        # Coarser factors, fewer that are zero or more that may be: each can only go on so far, so this ends.
        # What was read holds of the first step, so what is singular there stays marked.
        carry = joined
    return carry, others


def _form(x: Tracked) -> tuple[float | None, set[tuple[tuple[int, ...], Dead]]]:
    return x.uniform, {(f.axes, f.dead) for f in x.factors}


def _zeros_alone(x: Tracked) -> Tracked:
    """The value, its dead positions followed no further than whether they may be zero: a carry may count."""
    factors = (replace(f, dead=Dead(f.zero, f.dead.values & ZERO.values)) for f in x.factors)
    return replace(x, factors=tuple(factors))


def _parts(eqn: Equation, handed_in: Sequence[Sequence[int]], carried: Sequence[int] = ()) -> Parts:
    """From per body the operands that its inputs are, and the operands that are carried, in output order."""
    pairs = (zip(body.inputs, at, strict=True) for body, at in zip(eqn.bodies, handed_in, strict=True))
    return Parts(dict(itertools.chain(*pairs)), {operand: n for n, operand in enumerate(carried)})


# --- scan ---------------------------------------------------------------------------------------------


def _couple_scan(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked], read: Read) -> list[Tracked]:
    consts, init, xs = scan_parts(eqn.source, inputs)
    slices = [_slice(ledger, eqn, x) for x in xs]

    def step(carry: list[Tracked]) -> tuple[list[Tracked], list[Tracked]]:
        outs = read(eqn.bodies[0], [*consts, *carry, *slices])
        return outs[: len(init)], outs[len(init) :]

    carry, ys = _settled(ledger, [_carried(ledger, x) for x in init], step)
    return [*carry, *(_stacked(ledger, eqn, y) for y in ys)]


def _slice(ledger: Ledger, eqn: Equation, x: Tracked) -> Tracked:
    factors = []
    for factor in x.factors:
        rest = [a for a in factor.axes if a != 0]
        if not rest:
            ledger.fix(factor.ids, f"the axis that {eqn.where} runs over")
            continue
        factors.append(ledger.collapse(factor, rest).moved({a: a - 1 for a in rest}))
    return Tracked(x.shape[1:], tuple(factors), x.uniform)


def _stacked(ledger: Ledger, eqn: Equation, y: Tracked) -> Tracked:
    factors = [f.moved({a: a + 1 for a in f.axes}) for f in y.factors]
    length = eqn.params["length"]
    if length > 1:
        ids = ledger.fresh_fixed(length, reason=f"the axis that {eqn.where} runs over")
        factors.append(Factor((0,), ids, BLANK))
    return Tracked((length, *y.shape), tuple(factors), y.uniform)


def _slim_scan(
    eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept], run: RunBody
) -> list[jax.Array]:
    consts, init, xs = scan_parts(eqn.source, operands)
    targets = [*kept[: len(init)], *(axes[1:] for axes in kept[len(init) :])]
    fixed = [x.array for x in consts]

    def step(carry: list[jax.Array], slices: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        outs = run(eqn.bodies[0], [*fixed, *carry, *slices], targets)
        return outs[: len(init)], outs[len(init) :]

    start = [cut(x, target) for x, target in zip(init, targets, strict=False)]
    carry, ys = lax.scan(
        step,
        start,
        [x.array for x in xs],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *ys]


def _parts_of_scan(eqn: Equation) -> Parts:
    consts, init, xs = scan_parts(eqn.source, range(len(eqn.inputs)))
    return _parts(eqn, [[*consts, *init, *xs]], init)


REGIONS[p.scan_p] = RegionRule(_couple_scan, _slim_scan, lambda eqn: (eqn.params["length"],), _parts_of_scan)


# --- while --------------------------------------------------------------------------------------------


def _couple_while(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked], read: Read) -> list[Tracked]:
    cond_consts, body_consts, init = while_parts(eqn.source, inputs)
    condition, body = eqn.bodies

    def step(carry: list[Tracked]) -> tuple[list[Tracked], None]:
        (goes_on,) = read(condition, [*cond_consts, *carry])
        after = read(body, [*body_consts, *carry])
        for x in after:
            # As `_slim_while` chooses between the two, example by example.
            combine(ledger, [goes_on.factors, x.factors])
        return after, None

    return _settled(ledger, [_carried(ledger, x) for x in init], step)[0]


def _slim_while(
    eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept], run: RunBody
) -> list[jax.Array]:
    cond_consts, body_consts, init = while_parts(eqn.source, operands)
    condition, body = eqn.bodies

    # Under vmap there is a condition for each example, along the first axes of all that is carried.
    examples = eqn.params["cond_jaxpr"].out_avals[0].shape
    alive = tuple(next((axes[a] for axes in kept if axes[a] is not None), None) for a in range(len(examples)))

    def goes_on(carry: list[jax.Array]) -> jax.Array:
        return run(condition, [*(x.array for x in cond_consts), *carry], [alive])[0]

    def step(carry: list[jax.Array]) -> list[jax.Array]:
        after = run(body, [*(x.array for x in body_consts), *carry], kept)
        if not examples:
            return after
        # The loop runs until the last example is done; those that are stay as they were.
        more = goes_on(carry)
        return [
            _of_examples(scatter(more, missing(alive, axes[: len(alive)]), examples), x, before)
            for x, before, axes in zip(after, carry, kept, strict=True)
        ]

    start = [cut(x, target) for x, target in zip(init, kept, strict=True)]
    return list(lax.while_loop(lambda carry: goes_on(carry).any(), step, start))


def _of_examples(which: jax.Array, x: jax.Array, otherwise: jax.Array) -> jax.Array:
    return jnp.where(which.reshape(which.shape + (1,) * (x.ndim - which.ndim)), x, otherwise)


def _parts_of_while(eqn: Equation) -> Parts:
    if eqn.params["cond_jaxpr"].out_avals[0].shape:
        return Parts({}, {})  # An example that leaves has no condition of its own to run by.
    cond_consts, body_consts, init = while_parts(eqn.source, range(len(eqn.inputs)))
    return _parts(eqn, [[*cond_consts, *init], [*body_consts, *init]], init)


# How often a loop runs is not known: its body counts once.
REGIONS[p.while_p] = RegionRule(_couple_while, _slim_while, lambda eqn: (1, 1), _parts_of_while)


# --- cond ---------------------------------------------------------------------------------------------


def _couple_cond(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked], read: Read) -> list[Tracked]:
    branches = [read(body, inputs[1:]) for body in eqn.bodies]
    return [_joined(ledger, outs) for outs in zip(*branches, strict=True)]


def _slim_cond(
    eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept], run: RunBody
) -> list[jax.Array]:
    def branch(body: Any) -> Any:
        return lambda *arrays: run(body, arrays, kept)

    choice, *rest = (x.array for x in operands)
    return list(lax.switch(choice, [branch(body) for body in eqn.bodies], *rest))


# Only one branch runs: the first stands for all.
REGIONS[p.cond_p] = RegionRule(
    _couple_cond,
    _slim_cond,
    lambda eqn: (1,) + (0,) * (len(eqn.bodies) - 1),
    lambda eqn: _parts(eqn, [range(1, len(eqn.inputs))] * len(eqn.bodies)),
)
