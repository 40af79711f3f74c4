"""Reductions: exact over a cut axis where what was cut is zero and zeros do not count."""

from jax.extend.core import primitives as p

from compaware_jax.rules.families import reduction

# Under vmap, what is summed over the name of a mapped axis is summed over that axis.
for primitive in (p.reduce_sum_p, p.reduce_or_p, p.reduce_xor_p, p.psum_p):
    reduction(primitive, sums=True)
for primitive in (
    p.reduce_max_p, p.reduce_min_p, p.reduce_prod_p, p.reduce_and_p, p.argmax_p, p.argmin_p,
    p.pmax_p, p.pmin_p,
):  # fmt: skip
    reduction(primitive, sums=False)
