"""Where a dead channel makes something infinite that a channel removed does not: such channels stay.

Every function below is finite for the dense network. Masked, channels are zero; what is made of them may be
a number at which a later function, or its derivative, is infinite.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import compaware_jax as ca
from compaware_jax.law import law_errors
from tests.functions import random_function

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
VARIABLES = {"a": RNG.normal(size=(3, 6)), "b": RNG.normal(size=(6, 2))}
X = RNG.normal(size=(4, 3))
# The first channel leaves: so do running results that start with it.
KEEP = np.array([0, 1, 1, 1, 0, 1], bool)
EVEN_ROWS = (np.arange(4) % 2 == 0)[:, None]
sigmoid = jax.nn.sigmoid


@jax.custom_jvp
def with_a_tangent(h):
    return 1.0 * h


with_a_tangent.defjvp(lambda h, t: (1.0 * h[0], t[0] * h[0] / jnp.abs(h[0])))


@jax.custom_vjp
def with_a_cotangent(h):
    return jnp.cos(h)


with_a_cotangent.defvjp(lambda h: (jnp.cos(h), h), lambda h, t: (t / jnp.sqrt(jnp.abs(h)),))


# Of hidden channels h, shape (4, 6).
SINGULAR = {
    # Zero in some rows only.
    "a row that is chosen": lambda h: 1 / jnp.where(EVEN_ROWS, h, 1.0),
    "a row that is not chosen": lambda h: 1 / jnp.where(EVEN_ROWS, 1.0, h),
    "rows joined": lambda h: 1 / jnp.concatenate([h, jnp.cos(h)], 0),
    "rows stacked": lambda h: (1 / jnp.stack([h, jnp.cos(h)])).sum(0),
    "rows sorted": lambda h: 1 / jnp.sort(jnp.concatenate([h, jnp.cosh(h)], 0), 0),
    "rows padded": lambda h: 1 / jnp.pad(h, ((1, 1), (0, 0)), constant_values=1.0),
    "a row set": lambda h: 1 / jnp.cos(h).at[0].set(h[0]),
    "a row left": lambda h: 1 / h.at[0].set(jnp.cos(h[0])),
    "rows updated": lambda h: 1 / lax.dynamic_update_slice(jnp.cos(h), h[:2], (1, 0)),
    "rows ordered": lambda h: 1 / jnp.take_along_axis(h, jnp.argsort(h, 0), 0),
    "the largest of a segment": lambda h: 1 / jax.ops.segment_max(h, jnp.array([0, 0, 1, 1]), 2),
    "products so far": lambda h: 1 / lax.associative_scan(jnp.multiply, h),
    "a product": lambda h: 1 / jnp.prod(jnp.concatenate([h, jnp.cos(h)], 0), 0),
    "the least": lambda h: 1 / jnp.min(jnp.concatenate([jnp.abs(h), jnp.cosh(h)], 0), 0),
    "the largest": lambda h: 1 / jnp.max(jnp.concatenate([h, -jnp.cosh(h)], 0), 0),
    "a factor": lambda h: 1 / (jnp.where(EVEN_ROWS, h, 1.0) * (X @ np.ones((3, 6)))),
    "draws of some rows": lambda h: jax.random.gamma(
        jax.random.key(0), jnp.abs(jnp.where(EVEN_ROWS, h, 1.0))
    ),
    # Zero in one branch, or after some steps.
    "a branch": lambda h: 1 / lax.cond(h.sum() > -99, lambda h: h, jnp.cos, h),
    "one of some branches": lambda h: jnp.log(jnp.abs(lax.switch(1, [jnp.cos, lambda h: h], h))),
    "a carry from the second step": lambda h: lax.scan(lambda p, r: (r, jnp.tanh(r / p)), np.ones(6), h)[1],
    "a carry that counts down": lambda h: lax.scan(lambda c, r: (c - 1, 1 / c), jnp.cos(h[0]) + 1, h)[1],
    "no step at all": lambda h: 1 / lax.scan(lambda c, _: (jnp.cos(c), None), h, None, length=0)[0],
    "the first step": lambda h: lax.scan(lambda h, _: (jnp.cos(1 / h), None), h, length=2)[0],
    "the first step's derivative": lambda h: lax.scan(
        lambda h, _: (jnp.exp(-jnp.sqrt(jnp.abs(h))), None), h, length=2
    )[0],
    "the first of some steps": lambda h: lax.fori_loop(0, 2, lambda _, h: jnp.log(jnp.abs(h)) + 1, h),
    # Zero at once, or not zero.
    "a standard deviation": lambda h: jnp.std(h, 0),
    "a root": lambda h: jnp.exp(-jnp.sqrt(jnp.abs(h))),
    "a root of a square, chosen": lambda h: jnp.where(h > 0, jnp.sqrt(jnp.abs(h)), 0.0),
    "one without a cosine": lambda h: 1 / (1 - jnp.cos(h)),
    "an exponential without one": lambda h: jnp.sqrt(jnp.exp(jnp.abs(h)) - 1),
    "a deviation of sigmoids": lambda h: (sigmoid(h) - sigmoid(h).mean(0)) / jnp.std(sigmoid(h), 0),
    "the angle of a cosine": lambda h: jnp.arccos(jnp.cos(h)),
    "a logarithm of one minus one": lambda h: jnp.log1p(-jnp.cos(h)),
    "chosen by its own value": lambda h: 1 / jnp.where(h > 5, 1.0, h),
    # Zero where two are dead, or all so far.
    "between two channels": lambda h: (1 / (h[:, :, None] - 1.3 * h[:, None, :])).sum(2),
    "sums so far": lambda h: jnp.sqrt(jnp.cumsum(h * h, 1)),
    "the largest so far": lambda h: jnp.log(lax.cummax(jnp.abs(h), 1)),
    # Infinite or no number as what is chosen.
    "masked by its own value": lambda h: jax.nn.softmax(jnp.where(h != 0, h, -jnp.inf), 0),
    "the largest of what is positive": lambda h: jnp.where(jnp.abs(h) > 0, h, -jnp.inf).max(0),
    "infinity times data": lambda h: jnp.exp(jnp.where(h != 0, h, -jnp.inf) * (X @ np.ones((3, 6)))),
    "infinity itself": lambda h: jnp.where(h != 0, h, jnp.inf),
    "a mean of numbers": lambda h: jnp.nanmean(jnp.where(h == 0, jnp.nan, h), 0),
    # By a derivative rule.
    "a rule of tangents": with_a_tangent,
    "a rule of cotangents": with_a_cotangent,
}
# Those of which the dense network has no finite derivative either.
SINGULAR_FORWARD = {
    "over a carry of zeros": lambda h: lax.scan(
        lambda c, row: (c + jnp.exp(row), jnp.tanh(row / c)), jnp.zeros(6), h
    )[1],
    "a while loop": lambda h: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.cos(1 / s[1])), (0, h)
    )[1],
    "a window": lambda h: 1 / lax.reduce_window(jnp.abs(h), 0.0, lax.max, (2, 1), (1, 1), "VALID"),
    "over nothing": lambda h: lax.scan(lambda c, row: (c, jnp.sign(row / 0.0)), 0.0, h)[1],
}


def normalized(h, n):
    return h / jnp.where(n > 0, n, 1.0)


# What guards against zero, and what only looks singular.
GUARDED = {
    "one for zero": lambda h: normalized(h, jnp.abs(h).max(0)),
    "one for zero, chosen again": lambda h: jnp.where(h == 0, 1.0, jnp.sin(h) / jnp.where(h == 0, 1.0, h)),
    "a floor": lambda h: h / jnp.maximum(jnp.abs(h), 1e-9),
    "a floor where it is small": lambda h: h / jnp.where(jnp.abs(h) < 1e-6, 1e-6, h),
    "a clip": lambda h: jnp.log(jnp.clip(jnp.abs(h), 1e-6)),
    "what is close": lambda h: 1 / jnp.where(jnp.isclose(h, 0), 1.0, h),
    "an epsilon": lambda h: (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5),
    "an epsilon below sigmoids": lambda h: (
        (sigmoid(h) - sigmoid(h).mean(0)) / jnp.sqrt(sigmoid(h).var(0) + 1e-5)
    ),
    "a safe norm": lambda h: h / optax.safe_norm(h, 1e-6, axis=0),
    "a root without a derivative": lambda h: h / (1 + lax.stop_gradient(jnp.std(h, 0))),
    "a root that is compared": lambda h: jnp.where(jnp.sqrt(jnp.abs(h)) > 0.1, jnp.sin(h), h),
    "a maximum of some rows": lambda h: (lambda e: e / e.max(0))(jnp.where(EVEN_ROWS, jnp.exp(h), 0.0)),
    "a sum of some rows": lambda h: jax.nn.softmax(jnp.where(EVEN_ROWS, h, -jnp.inf), 0),
    "rows joined with data": lambda h: jnp.log(jnp.concatenate([jnp.exp(h), X @ np.zeros((3, 6)) + 1], 0)),
    "a logarithm of its own": lambda h: jax.scipy.special.logit(sigmoid(h)),
    "infinite, and finite again": lambda h: jnp.exp(jnp.where(h != 0, h, -jnp.inf)),
    "infinite, and above zero": lambda h: jnp.maximum(jnp.where(h != 0, h, -jnp.inf), 0.0),
    "the largest of some, if any": lambda h: (lambda m: jnp.where(jnp.isfinite(m), h - m, h))(
        jnp.where(h > 0, h, -jnp.inf).max(0)
    ),
    "one over infinity": lambda h: jnp.cos(1 / (1 + jnp.where(h == 0, jnp.inf, h * h))),
    "above nothing": lambda h: jnp.maximum(jnp.where(jnp.isinf(h), 0.0, h), -jnp.inf),
    "a number for what is none": lambda h: jnp.nan_to_num(jnp.where(jnp.isnan(h), 0.0, h)),
    "an entropy": lambda h: -sigmoid(h) * jnp.log(sigmoid(h)),
    "a quotient of features": lambda h: (lambda f: f / f.sum(0))(jax.nn.elu(h) + 1),
    "a cardinal sine": jnp.sinc,
    "a running mean": lambda h: lax.scan(lambda c, r: (0.9 * c + 0.1 * r**2, r / (c + 0.1)), np.zeros(6), h)[
        1
    ],
    "a running mean's root": lambda h: lax.scan(
        lambda c, r: (0.9 * c + 0.1 * r**2, r / (lax.stop_gradient(jnp.sqrt(c)) + 0.1)),
        np.zeros(6),
        jnp.cos(h),
    )[1],
    "a scale of integers": lambda h: (lambda s: jnp.round(h / s) * s)(jnp.maximum(jnp.abs(h).max(0), 1e-3)),
}


def network(of):
    return lambda v, x: of(x @ v["a"]) @ v["b"]


def is_finite(apply, *trees, backward=True):
    """Whether what comes out of a network with each of the variables is finite, with all its derivatives."""

    def loss(v):
        return jnp.sin(apply(v, X)).sum()

    run = jax.jit(jax.value_and_grad(loss) if backward else loss)
    return [all(np.isfinite(x).all() for x in jax.tree.leaves(run(tree))) for tree in trees]


def masked(keep):
    return {"a": VARIABLES["a"] * keep, "b": VARIABLES["b"] * keep[:, None]}


@pytest.mark.parametrize("name", [*SINGULAR, *SINGULAR_FORWARD])
def test_what_is_singular_where_a_channel_is_dead_stays(name):
    apply, backward = network({**SINGULAR, **SINGULAR_FORWARD}[name]), name in SINGULAR
    assert is_finite(apply, VARIABLES, masked(KEEP), backward=backward) == [True, False]
    groups = ca.find_groups(apply, VARIABLES, X)
    assert groups.units == 0
    assert any("inexact=True releases it" in axis.reason for axis in groups.fixed)


@pytest.mark.parametrize("name", GUARDED)
def test_what_is_guarded_against_zero_leaves(name):
    groups = ca.find_groups(network(GUARDED[name]), VARIABLES, X, strict=True)
    assert groups.units == 6
    assert max(law_errors(network(GUARDED[name]), VARIABLES, X, keep=KEEP, groups=groups)) <= 1e-10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_what_overflows_is_infinite(dtype):
    """For the dense network it is small, for a dead channel too large for its dtype."""

    def apply(v, x):
        return (
            jnp.exp(100 - 60 * (1 + 0.1 * jnp.tanh(x @ v["a"]) ** 2) * jnp.sign(jnp.abs(x @ v["a"]))) @ v["b"]
        )

    cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), (VARIABLES, X))
    units = ca.find_groups(apply, *cast).units
    dead = jax.tree.map(lambda x: jnp.asarray(x, dtype), masked(KEEP))
    assert units == (6 if np.isfinite(apply(dead, cast[1])).all() else 0)
    assert units == (6 if dtype == jnp.float64 else 0)


def test_random_functions():
    """What is not told is finite whatever leaves; and what is told mostly is not."""
    keeps = np.array([[0, 1, 1, 1, 0, 1], [1, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]], bool)
    told = []
    for seed in range(60):
        apply = network(random_function(seed))
        dense, *finite = is_finite(apply, VARIABLES, *map(masked, keeps))
        if not dense:
            continue
        groups = ca.find_groups(apply, VARIABLES, X, strict=True)
        if groups.units:
            assert all(finite), seed
        else:
            told.append(not all(finite))
    assert 10 < len(told) < 40
    assert np.mean(told) > 0.8
