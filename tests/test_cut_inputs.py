"""Small functions of arguments that come in cut: trained by sequences, deployed by steps."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax.errors import PlanError
from compaware_jax.law import distance
from tests.adapters.common import drawn_init

WIDTH = 12
X = np.random.default_rng(0).normal(size=(5, 4, 3))


def cell(kind):
    """A recurrent policy: one step, its variables, where it starts."""
    module = {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}[kind](WIDTH)
    head = nn.Dense(2)

    def step(v, carry, x):
        carry, hidden = module.apply(v["cell"], carry, x)
        return carry, head.apply(v["head"], hidden)

    def start(rows):
        carry = module.initialize_carry(jax.random.key(0), (rows, 3))
        return jax.tree.map(lambda c: c.astype(float), carry)

    variables = {
        "cell": drawn_init(module.init, start(1), X[0, :1]),
        "head": drawn_init(head.init, jnp.ones((1, WIDTH))),
    }
    return step, variables, start


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_steps_of_what_was_cut_by_sequences(kind, x64):
    step, variables, start = cell(kind)

    def sequence(v, xs):
        return jax.lax.scan(lambda c, x: step(v, c, x), start(xs.shape[1]), xs)[1]

    groups = ca.find_groups(sequence, variables, X)
    keep = np.arange(groups.units) % 3 != 1
    plan = ca.plan_units(groups, keep)
    small, masked = ca.shrink(variables, plan), ca.apply_mask(groups, 1.0 * keep, variables)
    expected = sequence(masked, X)
    small_step = jax.jit(ca.slim(step, plan, released=["0"], cut_inputs={"carry": (None, WIDTH)}))
    for rows in (4, 1):  # Any number of them.
        carry = jax.tree.map(lambda c: c[:, : WIDTH - 4], start(rows))
        for n, x in enumerate(X):
            carry, action = small_step(small, carry, x[:rows])
            assert distance(action, expected[n, :rows]) <= 1e-10
    slopes = jax.grad(lambda c: small_step(small, c, X[0, :1])[1].sum())(carry)
    assert jax.tree.map(jnp.shape, slopes) == jax.tree.map(jnp.shape, carry)


def test_what_does_not_fit(x64):
    step, variables, start = cell("gru")
    groups = ca.find_groups(step, variables, start(1), X[0, :1])
    assert groups.units == 0, "the carry is data"

    def sequence(v, xs):
        return jax.lax.scan(lambda c, x: step(v, c, x), start(4), xs)[1]

    groups = ca.find_groups(sequence, variables, X)
    plan = ca.plan_units(groups, np.arange(WIDTH) < 5)
    small, x = ca.shrink(variables, plan), X[0, :1]
    with pytest.raises(PlanError, match=r"needs whole .*the input in `cut_inputs`"):
        ca.slim(step, plan)(small, start(1), x)
    slim = inspect.unwrap(ca.slim)
    for given, message in (
        ({"carry": (None, WIDTH)}, r"`carry` has shape \(1, 12\), expected \(1, 5\): of \(1, 12\)"),
        ({"carry": (WIDTH,)}, r"cut_inputs\['carry'\] has 1 axes, `carry` has shape \(1, 12\)"),
        ({"state": (None, WIDTH)}, r"cut_inputs names 'state', which is no argument .*\['carry', 'x'\]"),
    ):
        with pytest.raises(PlanError, match=message):
            slim(step, plan, released=["0"], cut_inputs=given)(small, start(1), x)
    for given in (["carry"], {"carry": (None, WIDTH + 0.5)}):
        with pytest.raises(PlanError, match=r"cut_inputs=.*, expected a dictionary from names"):
            slim(step, plan, cut_inputs=given)
