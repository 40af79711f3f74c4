"""Reductions: exact over a cut axis where what was cut is zero and zeros do not count."""

import numpy as np
from jax.extend.core import primitives as p

from compaware_jax.coupling.rules.families import reduction


def _power(x: float, count: int) -> float:
    with np.errstate(over="ignore"):
        return float(np.float64(x) ** count)


# Under vmap, what is summed over the name of a mapped axis is summed over that axis.
reduction(p.reduce_sum_p, sums=True, becomes=lambda x, count: count * x)
reduction(p.reduce_or_p, sums=True, becomes=lambda x, count: x)
for primitive in (p.reduce_xor_p, p.psum_p):
    reduction(primitive, sums=True)
reduction(p.reduce_prod_p, sums=False, becomes=_power)
for primitive in (p.reduce_max_p, p.reduce_min_p, p.reduce_and_p, p.pmax_p, p.pmin_p):
    reduction(primitive, sums=False, becomes=lambda x, count: x)
for primitive in (p.argmax_p, p.argmin_p):
    reduction(primitive, sums=False)
