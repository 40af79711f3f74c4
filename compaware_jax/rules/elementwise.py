"""Element-wise primitives: operands are tied index by index; what differs is when zeros stay zeros."""

from collections.abc import Sequence

from jax.extend.core import primitives as p

from compaware_jax.program import Equation
from compaware_jax.rules.families import elementwise

# Functions with f(0) = 0, and what only moves bits about.
ODD = (
    p.neg_p, p.sign_p, p.abs_p, p.floor_p, p.ceil_p, p.round_p, p.square_p, p.sin_p, p.tan_p, p.tanh_p,
    p.asin_p, p.atan_p, p.sinh_p, p.asinh_p, p.atanh_p, p.erf_p, p.erf_inv_p, p.expm1_p, p.log1p_p,
    p.real_p, p.imag_p, p.conj_p, p.convert_element_type_p, p.reduce_precision_p, p.copy_p,
    p.stop_gradient_p, p.name_p, p.population_count_p, p.bessel_i1e_p,
)  # fmt: skip
# Functions with f(0) != 0 that are finite there.
SHIFTED = (
    p.exp_p, p.exp2_p, p.cos_p, p.cosh_p, p.acos_p, p.logistic_p, p.erfc_p, p.not_p, p.is_finite_p,
    p.eq_p, p.ne_p, p.ge_p, p.gt_p, p.le_p, p.lt_p, p.eq_to_p, p.le_to_p, p.lt_to_p, p.nextafter_p, p.clz_p,
    p.bessel_i0e_p,
)  # fmt: skip
# Functions that are zero where all their operands are.
JOINT = (p.add_p, p.sub_p, p.add_jaxvals_p, p.or_p, p.xor_p, p.complex_p)

for primitive in ODD:
    elementwise(primitive, lambda eqn, zero, uniform: zero[0])
for primitive in SHIFTED:
    elementwise(primitive, lambda eqn, zero, uniform: False)
for primitive in JOINT:
    elementwise(
        primitive,
        lambda eqn, zero, uniform: all(z or u == 0 for z, u in zip(zero, uniform, strict=True)),
    )
for primitive in (p.mul_p, p.and_p):
    elementwise(
        primitive,
        lambda eqn, zero, uniform: any(z or u == 0 for z, u in zip(zero, uniform, strict=True)),
    )

elementwise(
    p.max_p,
    lambda eqn, zero, uniform: (
        all(z or (u is not None and u <= 0) for z, u in zip(zero, uniform, strict=True))
        and any(z or u == 0 for z, u in zip(zero, uniform, strict=True))
    ),
)
elementwise(
    p.min_p,
    lambda eqn, zero, uniform: (
        all(z or (u is not None and u >= 0) for z, u in zip(zero, uniform, strict=True))
        and any(z or u == 0 for z, u in zip(zero, uniform, strict=True))
    ),
)


def _chosen(eqn: Equation, zero: Sequence[bool], uniform: Sequence[float | None]) -> bool:
    """The first operand only chooses: what it chooses from decides, all of it where the choice is open."""
    which, *cases = zip(zero, uniform, strict=True)
    if which[1] is not None:
        cases = [cases[int(which[1])]]
    return all(z or u == 0 for z, u in cases)


elementwise(p.select_n_p, _chosen)
elementwise(p.div_p, lambda eqn, zero, uniform: zero[0] and not zero[1], singular=(1,))
elementwise(p.rem_p, lambda eqn, zero, uniform: zero[0] and not zero[1], singular=(1,))
elementwise(
    p.integer_pow_p,
    lambda eqn, zero, uniform: zero[0] and eqn.params["y"] > 0,
    singular=lambda eqn, uniform: [0] if eqn.params["y"] < 0 else [],
)
# Below one, the derivative is infinite at zero.
elementwise(
    p.pow_p,
    lambda eqn, zero, uniform: zero[0] and (uniform[1] or 0.0) > 0,
    singular=lambda eqn, uniform: [] if (uniform[1] or 0.0) >= 1 else [0],
)
elementwise(
    p.clamp_p,
    lambda eqn, zero, uniform: (
        zero[1]
        and (zero[0] or (uniform[0] is not None and uniform[0] <= 0))
        and (zero[2] or (uniform[2] is not None and uniform[2] >= 0))
    ),
)
for primitive in (p.shift_left_p, p.shift_right_logical_p, p.shift_right_arithmetic_p):
    elementwise(primitive, lambda eqn, zero, uniform: zero[0])
elementwise(p.atan2_p, lambda eqn, zero, uniform: False, singular=(0, 1))
for primitive in (p.sqrt_p, p.cbrt_p):
    elementwise(primitive, lambda eqn, zero, uniform: zero[0], singular=(0,))
for primitive in (p.log_p, p.rsqrt_p, p.acosh_p, p.lgamma_p, p.digamma_p):
    elementwise(primitive, lambda eqn, zero, uniform: False, singular=(0,))
for primitive in (
    p.igamma_p, p.igammac_p, p.igamma_grad_a_p, p.zeta_p, p.polygamma_p, p.regularized_incomplete_beta_p,
):  # fmt: skip
    elementwise(primitive, lambda eqn, zero, uniform: False, singular=(0, 1, 2))

# Newer than the oldest JAX supported.
for name, singular in (("one_minus_square_p", ()), ("polynomial_p", ()), ("log2_p", (0,))):
    if hasattr(p, name):
        elementwise(getattr(p, name), lambda eqn, zero, uniform: False, singular)
