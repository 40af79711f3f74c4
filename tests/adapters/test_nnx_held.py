"""NNX modules that hold tables, masks, counters and caches, or were cut by a function of both modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compaware_jax as ca
from compaware_jax.adapters import nnx as adapter
from compaware_jax.errors import PlanError
from compaware_jax.law import distance
from tests.adapters.common import TIGHT, cut, images, random_units, units_without_every_second


class Held(nnx.Module):
    """Channels permuted, masked, and scaled behind an int8 kernel; calls are counted."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        self.codes = nnx.Param(jnp.arange(-32, 32, dtype=jnp.int8).reshape(8, 8))
        self.scale = nnx.Param(jnp.linspace(0.1, 0.2, 8))
        self.order = nnx.Variable(jnp.array([3, 1, 0, 2, 7, 6, 5, 4]))
        self.mask = np.arange(16).reshape(8, 2) % 3 > 0
        self.calls, self.counts = nnx.Variable(jnp.array(0)), True

    def __call__(self, x, unused=None):
        if self.counts:
            self.calls[...] += 1
        hidden = nnx.relu(self.first(x))[..., self.order[...]]
        hidden = jnp.tanh(hidden @ self.codes[...].astype(x.dtype)) * self.scale
        return hidden @ (self.last.kernel[...] * self.mask) + self.calls[...].astype(x.dtype)


def test_integers_and_flags_of_a_module(x64):
    """Those of Params are cut; others are constants, also inside `nnx.jit`, unless a call changes them."""
    model, x = Held(nnx.Rngs(0)), images(4, 3)
    apply, variables = adapter.functional(model)
    assert set(variables) == {"first", "last", "codes", "scale"}
    groups = ca.find_groups(apply, variables, x)
    assert groups.units == 16
    plan, masked = cut(groups, random_units(groups), variables)
    expected, small = apply(masked, x), adapter.slimmed(model, plan)
    rows, columns = (index for index in plan.kept[[leaf.path for leaf in plan.leaves].index("codes")])
    assert small.model.codes.shape == (len(rows), len(columns))
    assert distance(small(x), expected) <= TIGHT
    assert distance(nnx.jit(lambda m, x: m(x))(small, x), expected + 1) <= TIGHT
    assert int(small.model.calls[...]) == 2
    wrt = nnx.DiffState(0, nnx.All(nnx.Param, nnx.Not(nnx.PathContains("codes"))))
    assert jax.tree.leaves(nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=wrt)(small))
    assert int(small.model.calls[...]) == 3
    assert distance(small(x, jnp.ones(1)), expected + 3) <= TIGHT
    assert distance(nnx.clone(small)(x), expected + 4) <= TIGHT
    small.set_attributes(counts=False)
    for call in (nnx.jit(lambda m, x: m(x)), lambda m, x: m(x)):
        assert distance(call(small, x), expected + 3) <= TIGHT
    small.model.order[...] = small.model.order[...][::-1]
    with pytest.raises(PlanError, match="Slimmed: `order` has other values than when `slimmed` was called"):
        small(x)
    abstract = adapter.slimmed(nnx.eval_shape(lambda: Held(nnx.Rngs(0))), plan)
    assert abstract.model.codes.shape == small.model.codes.shape


def test_outputs_beside_updates():
    """Released, and with the updates among them, not behind them."""
    rngs = nnx.Rngs(0)
    first, norm, last = nnx.Linear(3, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    class Two(nnx.Module):
        def __init__(self):
            self.first, self.norm, self.last = first, norm, last

        def __call__(self, x):
            latent = self.norm(self.first(x))
            return {"latent": latent, "y": self.last(latent)}

    training, variables = adapter.functional(Two(), updates=True)

    def apply(variables, x):
        output, new = training(variables, x)
        return {**output, "new": new}

    x = jnp.asarray(images(4, 3), jnp.float32)
    groups = ca.find_groups(
        apply, variables, x, released=("latent",), state_outputs={"new": ""}, boundary=True
    )
    plan = ca.plan_units(groups, random_units(groups))
    expected = ca.slim(apply, plan)(ca.shrink(variables, plan), x)
    got = adapter.slimmed(Two(), plan)(x)
    assert distance(got, {name: expected[name] for name in ("latent", "y")}) <= 1e-5


def test_a_cache_is_a_variable():
    """Where it is written to next is not known, so that none of its positions leaves."""

    class Decoder(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.out = nnx.Embed(9, 6, rngs=rngs), nnx.Linear(6, 9, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 6, 8, decode=True, rngs=rngs)
            self.attention.init_cache((2, 5, 6))

        def __call__(self, tokens):
            x = self.embed(tokens)[:, None]
            return self.out(x + self.attention(x))

    model, tokens = Decoder(nnx.Rngs(0)), jnp.array([1, 2])
    apply, variables = adapter.functional(model, updates=True)
    groups = ca.find_groups(apply, variables, tokens, state_outputs={"1": ""})
    fixed = {(axis.path, axis.axis) for axis in groups.fixed}
    assert {("attention/cached_key", 1), ("attention/cached_value", 1)} <= fixed
    plan, masked = cut(groups, units_without_every_second(groups, "attention"), variables)
    small = adapter.slimmed(model, plan)
    for step in range(3):
        expected, updates = apply(masked, tokens + step)
        masked = {**masked, "attention": {**masked["attention"], **updates["attention"]}}
        assert distance(small(tokens + step), expected) <= 1e-5
    assert int(small.model.attention.cache_index[...]) == 3


def test_a_plan_of_both_modes():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs)
    )
    training, variables = adapter.functional(nnx.view(model, use_running_average=False), updates=True)
    used, _ = adapter.functional(nnx.view(model, use_running_average=True))

    def both(variables, x):
        output, state = training(variables, x)
        return {"trained": output, "used": used(variables, x), "state": state}

    x = jnp.asarray(images(4, 3), jnp.float32)
    groups = ca.find_groups(both, variables, x, state_outputs={"state": ""}, deployed=("used",))
    plan = ca.plan_units(groups, np.arange(8) < 5)
    small = ca.slim(both, plan)(ca.shrink(variables, plan), x)
    for mode, name in (("train", "trained"), ("eval", "used")):
        getattr(model, mode)()
        assert distance(adapter.slimmed(model, plan)(x), small[name]) <= 1e-5
