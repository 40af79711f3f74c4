"""Loops and branches are handed in at full width what they need so; the rest of them runs small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import compaware_jax as ca
from compaware_jax.law import law_errors, random_keep

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
SHAPES = {"in": (3, 8), "up": (8, 12), "down": (12, 8), "out": (8, 2)}
VARIABLES = {name: RNG.normal(size=shape) / shape[0] ** 0.5 for name, shape in SHAPES.items()}
X = RNG.normal(size=(4, 3))


def scaled(h):
    """Between zero and one over the channels, as a latent of MuZero: what left is not zero, and counts."""
    low, high = h.min(-1, keepdims=True), h.max(-1, keepdims=True)
    return (h - low) / (high - low + 1e-3)


def block(v, h):
    return h + jnp.tanh(h @ v["up"]) @ v["down"]


def of_carry(v, x):
    def step(h, _):
        h = scaled(block(v, h))
        return h, h @ v["out"]

    return lax.scan(step, scaled(x @ v["in"]), None, length=3)


def of_counted_loop(v, x):
    return lax.fori_loop(0, 3, lambda i, h: scaled(block(v, h)), scaled(x @ v["in"]))


def of_constant(v, x):
    outside = jax.nn.sigmoid(x @ v["in"])

    def step(total, _):
        return total + block(v, jax.nn.softmax(outside)).mean(-1), None

    return lax.scan(step, x[:, 0], None, length=2)[0]


def of_sequence(v, x):
    rows = jax.nn.sigmoid(x @ v["in"])
    return lax.scan(lambda c, row: (c + 1, block(v, jax.nn.softmax(row)) @ v["out"]), 0, rows)[1]


def of_branch(v, x):
    h = jax.nn.sigmoid(x @ v["in"])
    branches = [lambda h: block(v, jax.nn.softmax(h)), lambda h: h, lambda h: scaled(h) @ v["up"] @ v["down"]]
    return lax.switch((x[0, 0] > 0).astype(int) * 2, branches, h)


def of_nested(v, x):
    def inner(g, _):
        return scaled(block(v, g)), None

    def outer(h, _):
        chosen = lax.cond(x[0, 0] > 0, jax.nn.softmax, lambda g: g, h)
        return jax.nn.sigmoid(lax.scan(inner, h, None, length=2)[0]), chosen @ v["out"]

    return lax.scan(outer, jax.nn.sigmoid(x @ v["in"]), None, length=2)


def of_two_carries(v, x):
    def step(state, _):
        h, g = state
        return (jax.nn.sigmoid(block(v, g)), jax.nn.softmax(h)), (h * g) @ v["out"]

    h = jax.nn.sigmoid(x @ v["in"])
    return lax.scan(step, (h, 0 * h), None, length=3)


def of_checkpoint(v, x):
    step = jax.checkpoint(lambda h, _: (scaled(block(v, h)), None))
    return lax.scan(step, scaled(x @ v["in"]), None, length=3)[0]


LOOPS = [
    of_carry, of_counted_loop, of_constant, of_sequence, of_branch, of_nested, of_two_carries, of_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize("of", LOOPS)
def test_law_and_small_products(of):
    def apply(v, x):
        return [y @ v["out"] if y.shape[-1:] == (8,) else y for y in jax.tree.leaves(of(v, x))]

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    assert groups.units == 20
    for seed in range(3):
        keep = random_keep(groups, np.random.default_rng(seed))
        assert max(law_errors(apply, VARIABLES, X, keep=keep, groups=groups)) <= 1e-10
    ran = ca.uncut(groups, ca.plan_units(groups, keep))
    assert ran
    assert not [e.where for e in ran if any(f"`{name}`" in e.where for name in ("scan", "while", "cond"))]
    assert not [e.where for e in ran if "`dot_general`" in e.where]


def test_a_loop_for_every_example_runs_whole():
    """Under `vmap` a loop runs until its last example is done, told by a condition for each that stays."""

    def one(v, x):
        def goes_on(state):
            return (state[1].sum() < 3) & (state[0] < 4)

        def step(state):
            return state[0] + 1, scaled(block(v, state[1]))

        return lax.while_loop(goes_on, step, (0, scaled(x @ v["in"])))[1]

    def apply(v, x):
        return jax.vmap(one, (None, 0))(v, x) @ v["out"]

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    keep = random_keep(groups, np.random.default_rng(0))
    assert max(law_errors(apply, VARIABLES, X, keep=keep, groups=groups, gradients=False)) <= 1e-10
    assert any("`while`" in e.where for e in ca.uncut(groups, ca.plan_units(groups, keep)))
