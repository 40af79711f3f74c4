"""Primitives that rename or regroup axes: transpose, squeeze, broadcast, reshape."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from compaware_jax.coupling.dead import BLANK
from compaware_jax.coupling.factors import Factor, Tracked, minimal
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, small_shape
from compaware_jax.coupling.rules.families import freed
from compaware_jax.coupling.rules.registry import Kept, Small, register_rule
from compaware_jax.placement import dividing, explicit

# --- axes renamed: transpose, squeeze, broadcast_in_dim -----------------------------------------------


def _renamed(ledger: Ledger, eqn: Equation, x: Tracked, axis_map: dict[int, int]) -> list[Tracked]:
    factors = [factor.moved(axis_map) for factor in x.factors]
    return [freed(ledger, eqn.out_shapes[0], factors, x.uniform, eqn)]


def _couple_transpose(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    (x,) = inputs
    return _renamed(ledger, eqn, x, {a: i for i, a in enumerate(eqn.params["permutation"])})


def _couple_squeeze(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    (x,) = inputs
    left = [a for a in range(len(x.shape)) if a not in eqn.params["dimensions"]]
    return _renamed(ledger, eqn, x, {a: i for i, a in enumerate(left)})


def _couple_broadcast(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    x = inputs[0]
    return _renamed(ledger, eqn, x, {i: int(a) for i, a in enumerate(eqn.params["broadcast_dimensions"])})


def _slim_same(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    return bind(eqn, [operands[0].array])


def _slim_broadcast(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    shape = small_shape(eqn.out_shapes[0], kept[0])
    sharding, dimensions = eqn.params["sharding"], eqn.params["broadcast_dimensions"]
    return [
        lax.broadcast_in_dim(
            operands[0].array, shape, dimensions, out_sharding=dividing(explicit(sharding), shape)
        )
    ]


register_rule(p.transpose_p, _couple_transpose, _slim_same, moves=True)
register_rule(p.squeeze_p, _couple_squeeze, _slim_same, moves=True)
register_rule(p.broadcast_in_dim_p, _couple_broadcast, _slim_broadcast)


def _couple_constant(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    return [Tracked(shape) for shape in eqn.out_shapes]


register_rule(p.iota_p, _couple_constant, lambda eqn, operands, kept: eqn.run())


# --- reshape ------------------------------------------------------------------------------------------


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest split of a reshape into runs of axes with equal products (size-1 axes left out)."""
    left = [a for a, size in enumerate(before) if size != 1]
    right = [a for a, size in enumerate(after) if size != 1]
    result = []
    while left:
        ins, outs = [left.pop(0)], [right.pop(0)]
        n_in, n_out = before[ins[0]], after[outs[0]]
        while n_in != n_out:
            if n_in < n_out:
                ins.append(left.pop(0))
                n_in *= before[ins[-1]]
            else:
                outs.append(right.pop(0))
                n_out *= after[outs[-1]]
        result.append((ins, outs))
    return result


def _couple_reshape(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    x = inputs[0]
    if eqn.params["dimensions"] is not None:
        order = {a: i for i, a in enumerate(eqn.params["dimensions"])}
        moved = tuple(f.moved(order) for f in x.factors)
        x = Tracked(tuple(x.shape[a] for a in eqn.params["dimensions"]), moved, x.uniform)
    shape = eqn.out_shapes[0]
    if 0 in x.shape:
        return [Tracked(shape, (), x.uniform)]
    parts = blocks(x.shape, shape)
    for factor in x.factors:
        touched = [part for part in parts if set(part[0]) & set(factor.axes)]
        if any(len(ins) > 1 or len(outs) > 1 for ins, outs in touched):
            first, last = parts.index(touched[0]), parts.index(touched[-1])
            joined = parts[first : last + 1]
            ins, outs = ([axis for part in joined for axis in part[side]] for side in (0, 1))
            parts[first : last + 1] = [(ins, outs)]
    factors: list[Factor] = []
    simple = {ins[0]: outs[0] for ins, outs in parts if len(ins) == len(outs) == 1}
    factors += [f.moved(simple) for f in x.factors if all(a in simple for a in f.axes)]
    for ins, outs in parts:
        inside = [f for f in x.factors if set(f.axes) <= set(ins)]
        if inside and not (len(ins) == len(outs) == 1):
            factors += _merged(ledger, eqn, x.shape, ins, outs, inside)
    return [freed(ledger, shape, factors, x.uniform, eqn)]


def _merged(
    ledger: Ledger,
    eqn: Equation,
    shape: tuple[int, ...],
    ins: list[int],
    outs: list[int],
    inside: list[Factor],
) -> list[Factor]:
    free = [f for f in inside if not ledger.all_fixed(f.ids)]
    if not free:
        reason = "reshaped from axes that are fixed"
        return [Factor((a,), ledger.fresh_fixed(eqn.out_shapes[0][a], reason=reason), BLANK) for a in outs]
    # Two independent sets of units cannot both leave a merged axis: its rows would form a rectangle
    # that one dense axis cannot hold. The set with more units stays free, unless more leave elsewhere when
    # it is the other one.
    units = [len(np.unique(f.ids)) for f in free]
    order = sorted(range(len(free)), key=lambda n: -units[n])
    if len(free) == 2 and ledger.chosen(((units[order[0]],), (units[order[1]],))):
        order.reverse()
    stays = free[order[0]]
    for factor in free:
        if factor is not stays:
            ledger.fix(factor.ids, f"merged with another axis by {eqn.where}")
    sizes = [shape[a] for a in ins]
    index = tuple(slice(None) if a in stays.axes else None for a in ins)
    ids = np.broadcast_to(stays.ids[index], sizes)
    return [minimal(outs, ids.reshape([eqn.out_shapes[0][a] for a in outs]), stays.dead)]


def _slim_reshape(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    # Kept elements keep their row-major order, so the small reshape moves the right ones.
    shape = small_shape(eqn.out_shapes[0], kept[0])
    sharding = dividing(explicit(eqn.out_avals[0].sharding), shape)
    return [lax.reshape(operands[0].array, shape, eqn.params["dimensions"], out_sharding=sharding)]


register_rule(p.reshape_p, _couple_reshape, _slim_reshape, moves=True)
