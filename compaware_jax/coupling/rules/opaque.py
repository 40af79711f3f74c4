"""What is drawn at random, handed on, shown on the way, or computed from whole matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from compaware_jax.coupling.dead import UNKNOWN, ZERO
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.operands import combine
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.arrays import bind, cut, filled_up
from compaware_jax.coupling.rules.families import dead_of, fixed_elsewhere, mixed, passed, zero_or_unknown
from compaware_jax.coupling.rules.registry import Kept, Small, primitives_of, register_rule
from compaware_jax.placement import dividing

# --- random bits: drawn at full width, cut where they are used ----------------------------------------


def _couple_drawn(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    for x in inputs:
        for factor in x.factors:
            ledger.fix(factor.ids, f"a random key or count of {eqn.where}")
    return [Tracked(shape) for shape in eqn.out_shapes]


def _slim_whole(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    return bind(eqn, [x.array for x in operands])


_WRAPPING = [
    *primitives_of(
        partial(jax.random.wrap_key_data, impl="threefry2x32"), jax.ShapeDtypeStruct((2,), "uint32")
    ),
    *primitives_of(jax.random.key_data, jax.eval_shape(lambda: jax.random.key(0))),
    *primitives_of(jax.random.clone, jax.eval_shape(lambda: jax.random.key(0))),
]
for primitive in (
    p.random_bits_p, p.random_seed_p, p.random_split_p, p.random_fold_in_p, p.threefry2x32_p,
    p.rng_bit_generator_p, p.rng_uniform_p, *_WRAPPING,
):  # fmt: skip
    register_rule(primitive, _couple_drawn, _slim_whole)


def _couple_gamma(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    # One draw per shape parameter, each from its own part of the key: which part depends on all their number.
    key, shape = inputs
    _couple_drawn(ledger, eqn, [key])
    for factor in shape.factors:
        if 0.0 in factor.dead.values and shape.uniform is None:
            ledger.mark_inexact(factor.ids, f"{eqn.where} is singular at zero")
    return [Tracked(shape.shape, tuple(replace(f, dead=UNKNOWN) for f in shape.factors))]


def _slim_gamma(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    cut = any(index is not None for x in operands for index in x.kept)
    return None if cut else bind(eqn, [x.array for x in operands])


register_rule(p.random_gamma_p, _couple_gamma, _slim_gamma)


# --- handed on ----------------------------------------------------------------------------------------


def _couple_same(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    return list(inputs)


for primitive in (lax.optimization_barrier_p, p.device_put_p):
    register_rule(primitive, _couple_same, _slim_whole)


def _slim_unsharded(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    # A cut axis need not divide the mesh any more: the compiler chooses.
    (x,) = operands
    return [x.array] if any(index is not None for index in x.kept) else bind(eqn, [x.array])


register_rule(p.sharding_constraint_p, _couple_same, _slim_unsharded)


def _resharded(x: jax.Array) -> jax.Array:
    mesh = AbstractMesh((2,), ("devices",), axis_types=(AxisType.Explicit,))
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec("devices")))


def _slim_reshard(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    (x,) = operands
    sharding = dividing(eqn.out_avals[0].sharding, x.array.shape)
    return [jax.sharding.reshard(x.array, sharding)]


for primitive in primitives_of(_resharded, jax.ShapeDtypeStruct((2,), "float32")):
    register_rule(primitive, _couple_same, _slim_reshard)


def _couple_bits(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    # Numbers of another width have an axis more, or less, for their pieces. The bits of zero are zero.
    (x,), shape = inputs, eqn.out_shapes[0]
    same = {a: a for a in range(min(len(x.shape), len(shape)))}
    factors = passed(ledger, x, same, f"pieces of numbers in {eqn.where}")
    return [Tracked(shape, tuple(map(zero_or_unknown, factors)))]


register_rule(p.bitcast_convert_type_p, _couple_bits, _slim_whole)


# --- shown: the small function shows what it computes --------------------------------------------------


def _couple_shown(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    return []


def _shows(x: jax.Array) -> None:
    jax.debug.print("{}", x)
    jax.debug.callback(print, x)


for primitive in primitives_of(_shows, jax.ShapeDtypeStruct((2,), "float32")):
    register_rule(primitive, _couple_shown, _slim_whole)


# --- whole matrices, one per index of the axes before --------------------------------------------------


def _couple_matrices(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    first, *others = inputs
    batch, reason = range(len(first.shape) - 2), f"{eqn.where} computes from whole matrices"
    columns = _columns(eqn)
    parts = [tuple(passed(ledger, first, {a: a for a in batch}, reason))]
    parts += [tuple(passed(ledger, x, {a: a for a in (*batch, *columns)}, reason)) for x in others]
    for factor in parts[0]:
        if 0.0 in factor.dead.values and first.uniform is None:
            ledger.mark_inexact(factor.ids, f"{eqn.where} of a matrix of zeros")
    solves, factors = eqn.primitive is p.triangular_solve_p, []
    for axes, ids, dead in combine(ledger, parts):
        # What solves for zeros is zero.
        zero = solves and dead_of(others[0], dead[1]).zero
        factors.append(Factor(axes, ids, ZERO if zero else UNKNOWN))
    return [
        Tracked(shape, (*factors, *fixed_elsewhere(ledger, shape, {*batch, *columns}, reason)))
        for shape in eqn.out_shapes
    ]


def _columns(eqn: Equation) -> tuple[int, ...]:
    """The axis along which right-hand sides stand that are solved for one by one."""
    if eqn.primitive is not p.triangular_solve_p:
        return ()
    return (len(eqn.in_shapes[1]) - (1 if eqn.params["left_side"] else 2),)


def _slim_matrices(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    batch, columns = len(eqn.in_shapes[0]) - 2, _columns(eqn)
    arrays = []
    for n, x in enumerate(operands):
        handed_on = {*range(batch), *(columns if n else ())}
        arrays.append(cut(x, tuple(kept[0][a] if a in handed_on else None for a in range(x.array.ndim))))
    return bind(eqn, arrays)


for primitive in (
    p.cholesky_p, p.eig_p, p.eigh_p, p.svd_p, p.qr_p, p.lu_p, p.hessenberg_p, p.householder_product_p,
    p.schur_p, p.triangular_solve_p,
):  # fmt: skip
    register_rule(primitive, _couple_matrices, _slim_matrices)


def _couple_whole(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    reason = f"{eqn.where} computes from whole matrices"
    for x in inputs:
        for factor in x.factors:
            ledger.fix(factor.ids, reason)
    return [Tracked(shape, tuple(fixed_elsewhere(ledger, shape, (), reason))) for shape in eqn.out_shapes]


for primitive in (p.tridiagonal_p, p.tridiagonal_solve_p, p.linear_solve_p):
    register_rule(primitive, _couple_whole, _slim_whole)


# --- transforms ---------------------------------------------------------------------------------------


def _couple_fft(ledger: Ledger, eqn: Equation, inputs: Sequence[Tracked]) -> list[Tracked]:
    (x,), shape = inputs, eqn.out_shapes[0]
    batch = len(shape) - len(eqn.params["fft_lengths"])
    reason, free = f"transformed by {eqn.where}", mixed(ledger, x, range(batch))
    factors = [zero_or_unknown(f) for f in passed(ledger, x, {a: a for a in range(batch)}, reason, free)]
    factors += fixed_elsewhere(ledger, shape, {*range(batch), *(a for f in free for a in f.axes)}, reason)
    return [Tracked(shape, tuple(factors))]


def _slim_fft(eqn: Equation, operands: Sequence[Small], kept: Sequence[Kept]) -> list[jax.Array] | None:
    rank, transformed = len(eqn.in_shapes[0]), len(eqn.params["fft_lengths"])
    x = filled_up(operands[0], range(rank - transformed, rank), eqn.in_shapes[0])
    return None if x is None else bind(eqn, [x.array])


register_rule(p.fft_p, _couple_fft, _slim_fft)
