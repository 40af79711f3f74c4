"""Element-wise primitives: operands are tied index by index; what differs is what they make of zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.extend.core import primitives as p
from scipy import special

from compaware_jax.coupling.folding import COMPARISONS
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.rules.families import Becomes, Numbers, cases, elementwise, on_numbers

# --- functions of one operand -------------------------------------------------------------------------


def _same(x: Any) -> Any:
    return x


# What is zero of zero, and what is not, is asked of the functions.
SMOOTH: dict[Primitive, Callable[[Any], Any]] = {
    p.neg_p: np.negative, p.sign_p: np.sign, p.abs_p: np.abs, p.floor_p: np.floor, p.ceil_p: np.ceil,
    p.round_p: np.round, p.square_p: np.square, p.sin_p: np.sin, p.cos_p: np.cos, p.tan_p: np.tan,
    p.tanh_p: np.tanh, p.atan_p: np.arctan, p.sinh_p: np.sinh, p.cosh_p: np.cosh, p.asinh_p: np.arcsinh,
    p.exp_p: np.exp, p.exp2_p: np.exp2, p.expm1_p: np.expm1, p.logistic_p: special.expit,
    p.erf_p: special.erf, p.erfc_p: special.erfc, p.bessel_i0e_p: special.i0e, p.bessel_i1e_p: special.i1e,
    p.real_p: _same, p.imag_p: np.zeros_like, p.conj_p: _same, p.copy_p: _same, p.name_p: _same,
    p.stop_gradient_p: _same, p.reduce_precision_p: _same, p.is_finite_p: np.isfinite,
}  # fmt: skip
# The others are infinite at these operands, or else their derivatives are.
SINGULAR: dict[Primitive, tuple[Callable[[Any], Any], Sequence[float]]] = {
    p.sqrt_p: (np.sqrt, (0.0,)), p.cbrt_p: (np.cbrt, (0.0,)), p.log_p: (np.log, (0.0,)),
    p.rsqrt_p: (lambda x: 1 / np.sqrt(x), (0.0,)), p.lgamma_p: (special.gammaln, (0.0,)),
    p.digamma_p: (special.digamma, (0.0,)), p.log1p_p: (np.log1p, (-1.0,)),
    p.asin_p: (np.arcsin, (1.0, -1.0)), p.acos_p: (np.arccos, (1.0, -1.0)), p.acosh_p: (np.arccosh, (1.0,)),
    p.atanh_p: (np.arctanh, (1.0, -1.0)), p.erf_inv_p: (special.erfinv, (1.0, -1.0)),
}  # fmt: skip
# Newer than the oldest JAX supported.
NEWER = vars(p)
if "one_minus_square_p" in NEWER:
    SMOOTH[NEWER["one_minus_square_p"]] = lambda x: 1 - x * x
if "log2_p" in NEWER:
    SINGULAR[NEWER["log2_p"]] = np.log2, (0.0,)

for primitive, function, at in (
    *((primitive, function, ()) for primitive, function in SMOOTH.items()),
    *((primitive, *what) for primitive, what in SINGULAR.items()),
):
    with np.errstate(all="ignore"):
        keeps_zero = bool(function(np.float64(0)) == 0)
        finite = all(np.isfinite(function(np.float64(x))) for x in at)
    elementwise(
        primitive,
        lambda eqn, zero, uniform, keeps_zero=keeps_zero: keeps_zero and zero[0],
        singular=(0,) if at else (),
        at=at,
        finite=finite,
        becomes=on_numbers(function),
    )


def _converted(eqn: Equation, numbers: Sequence[Numbers], by_what_left: Sequence[bool]) -> Sequence[float]:
    to = eqn.out_avals[0].dtype
    if jnp.issubdtype(to, jnp.bool_):
        return [float(x != 0) for x in numbers[0]]
    if jnp.issubdtype(to, jnp.inexact):
        return list(numbers[0])
    # What an infinite number is as an integer is left open.
    return [float(int(x)) for x in numbers[0] if np.isfinite(x)]


def _inverted(eqn: Equation, numbers: Sequence[Numbers], by_what_left: Sequence[bool]) -> Sequence[float]:
    return [1 - x for x in numbers[0]] if jnp.issubdtype(eqn.in_dtypes[0], jnp.bool_) else ()


_power = on_numbers(np.power)


def _raised(eqn: Equation, numbers: Sequence[Numbers], by_what_left: Sequence[bool]) -> Iterable[float]:
    power = frozenset({float(eqn.params["y"])})
    return _power(eqn, [*numbers, power], by_what_left)


elementwise(p.convert_element_type_p, lambda eqn, zero, uniform: zero[0], becomes=_converted)
elementwise(p.population_count_p, lambda eqn, zero, uniform: zero[0])
elementwise(p.clz_p, lambda eqn, zero, uniform: False)
elementwise(
    p.not_p,
    lambda eqn, zero, uniform: False,
    becomes=_inverted,
)
elementwise(
    p.integer_pow_p,
    lambda eqn, zero, uniform: zero[0] and eqn.params["y"] > 0,
    singular=lambda eqn, uniform: [0] if eqn.params["y"] < 0 else [],
    becomes=_raised,
)
if "polynomial_p" in NEWER:
    elementwise(NEWER["polynomial_p"], lambda eqn, zero, uniform: False)

# --- of two -------------------------------------------------------------------------------------------


def _sum(a: float, b: float) -> float:
    # What cancels up to rounding cancels.
    return 0.0 if np.isfinite(a) and abs(a + b) <= 1e-6 * abs(a) else a + b


def _bits(function: Callable[[int, int], int]) -> Callable[[float, float], float]:
    return lambda a, b: float(function(int(a), int(b))) if np.isfinite([a, b]).all() else np.nan


# Zero where both operands are.
JOINT: dict[Primitive, Callable[[Any, Any], Any]] = {
    p.add_p: _sum, p.add_jaxvals_p: _sum, p.sub_p: lambda a, b: _sum(a, -b),
    p.or_p: _bits(int.__or__), p.xor_p: _bits(int.__xor__), p.complex_p: lambda a, b: np.nan if b else a,
}  # fmt: skip
# Not zero where both are, or not because both are.
COMPARED: dict[Primitive, Callable[[Any, Any], Any]] = {
    **COMPARISONS, p.eq_to_p: np.equal, p.le_to_p: np.less_equal, p.lt_to_p: np.less,
    p.nextafter_p: np.nextafter,
}  # fmt: skip
for primitive, function in JOINT.items():
    elementwise(
        primitive,
        lambda eqn, zero, uniform: all(z or u == 0 for z, u in zip(zero, uniform, strict=True)),
        becomes=on_numbers(function),
        crosses=True,
    )
for primitive, function in COMPARED.items():
    elementwise(primitive, lambda eqn, zero, uniform: False, becomes=on_numbers(function), bounds=True)


def _product(function: Callable[[Any, Any], Any]) -> Becomes:
    known = on_numbers(function)

    def becomes(eqn: Equation, numbers: Sequence[Numbers], by_what_left: Sequence[bool]) -> Iterable[float]:
        # Nothing times whatever it may be.
        nothing = any(left and 0.0 in xs for xs, left in zip(numbers, by_what_left, strict=True))
        return [*known(eqn, numbers, by_what_left), *([0.0] if nothing else [])]

    return becomes


for primitive, function in ((p.mul_p, np.multiply), (p.and_p, _bits(int.__and__))):
    elementwise(
        primitive,
        lambda eqn, zero, uniform: any(z or u == 0 for z, u in zip(zero, uniform, strict=True)),
        becomes=_product(function),
    )

elementwise(
    p.max_p,
    lambda eqn, zero, uniform: (
        all(z or (u is not None and u <= 0) for z, u in zip(zero, uniform, strict=True))
        and any(z or u == 0 for z, u in zip(zero, uniform, strict=True))
    ),
    becomes=on_numbers(np.maximum),
    bounds=True,
)
elementwise(
    p.min_p,
    lambda eqn, zero, uniform: (
        all(z or (u is not None and u >= 0) for z, u in zip(zero, uniform, strict=True))
        and any(z or u == 0 for z, u in zip(zero, uniform, strict=True))
    ),
    becomes=on_numbers(np.minimum),
    bounds=True,
)
for primitive, function in ((p.div_p, np.divide), (p.rem_p, np.fmod)):
    elementwise(
        primitive,
        lambda eqn, zero, uniform: zero[0] and not zero[1],
        singular=(1,),
        becomes=on_numbers(function),
    )
# Below one, the derivative is infinite at zero.
elementwise(
    p.pow_p,
    lambda eqn, zero, uniform: zero[0] and (uniform[1] or 0.0) > 0,
    singular=lambda eqn, uniform: [] if (uniform[1] or 0.0) >= 1 else [0],
    becomes=_power,
)
elementwise(
    p.atan2_p,
    lambda eqn, zero, uniform: False,
    singular=(0, 1),
    finite=True,
    becomes=on_numbers(np.arctan2),
)
for primitive in (p.shift_left_p, p.shift_right_logical_p, p.shift_right_arithmetic_p):
    elementwise(primitive, lambda eqn, zero, uniform: zero[0])

# --- of more ------------------------------------------------------------------------------------------


def _chosen(eqn: Equation, zero: Sequence[bool], uniform: Sequence[float | None]) -> bool:
    """The first operand only chooses: what it chooses from decides, all of it where the choice is open."""
    which, *open_cases = zip(zero, uniform, strict=True)
    if which[1] is not None:
        open_cases = [open_cases[int(which[1])]]
    return all(z or u == 0 for z, u in open_cases)


elementwise(p.select_n_p, _chosen, becomes=cases, bounds=True)
elementwise(
    p.clamp_p,
    lambda eqn, zero, uniform: (
        zero[1]
        and (zero[0] or (uniform[0] is not None and uniform[0] <= 0))
        and (zero[2] or (uniform[2] is not None and uniform[2] >= 0))
    ),
    becomes=on_numbers(lambda low, x, high: min(max(x, low), high)),
    bounds=True,
)
for primitive in (
    p.igamma_p, p.igammac_p, p.igamma_grad_a_p, p.zeta_p, p.polygamma_p, p.regularized_incomplete_beta_p,
):  # fmt: skip
    elementwise(primitive, lambda eqn, zero, uniform: False, singular=(0, 1, 2))
