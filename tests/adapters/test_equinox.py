"""Equinox: the law through a module, and a small module back."""

from functools import lru_cache
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compaware_jax as ca
from compaware_jax.adapters import equinox as adapter
from compaware_jax.errors import PlanError, TraceError
from compaware_jax.law import distance
from tests.adapters.common import TIGHT, cut, drawn, images, random_units, units_without_every_second


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: Any
    attention: eqx.nn.MultiheadAttention
    layer_norm: Any
    dense: list

    def __init__(self, key, normalise, batch_norm):
        keys = jax.random.split(key, 4)
        self.conv = eqx.nn.Conv2d(2, 6, 3, padding=1, key=keys[0])
        self.norm = eqx.nn.BatchNorm(6, "batch", mode="batch") if batch_norm else None
        self.attention = eqx.nn.MultiheadAttention(
            4, 6, qk_size=2, vo_size=2, use_query_bias=True, output_size=6, key=keys[1]
        )
        self.layer_norm = eqx.nn.LayerNorm(6) if normalise else None
        self.dense = [eqx.nn.Linear(6, 5, key=keys[2]), eqx.nn.Linear(5, 3, key=keys[3])]

    def __call__(self, x, state=None, *, key=None):
        x = self.conv(x)
        if self.norm is not None:
            x, state = self.norm(x, state)
        x = jax.nn.relu(x).reshape(x.shape[0], -1).T
        x = self.attention(x, x, x)
        if self.layer_norm is not None:
            x = jax.vmap(self.layer_norm)(x)
        x = self.dense[1](jax.nn.relu(jax.vmap(self.dense[0])(x)).mean(0))
        return x if self.norm is None else (x, state)


def model_and_state(normalise=True, batch_norm=False):
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0), normalise, batch_norm)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(drawn(params), rest), state


@lru_cache
def prepared(normalise=True):
    model, _ = model_and_state(normalise)
    apply, variables = adapter.functional(model)
    x = images(4, 2, 4, 4)
    return model, apply, variables, x, ca.find_groups(apply, variables, x[0])


def batched(apply):
    return jax.vmap(apply, (None, 0))


def test_law(x64):
    _, apply, variables, x, groups = prepared()
    plan, masked = cut(groups, random_units(groups), variables)
    got = jax.jit(ca.slim(batched(apply), plan))(ca.shrink(variables, plan), x)
    assert distance(got, jax.jit(batched(apply))(masked, x)) <= TIGHT


def test_slimmed_is_a_module_to_go_on_with(x64, tmp_path):
    model, apply, variables, x, groups = prepared()
    plan, masked = cut(groups, random_units(groups), variables)
    small = adapter.slimmed(model, plan)
    expected = jax.jit(batched(apply))(masked, x)
    assert distance(jax.jit(jax.vmap(small))(x), expected) <= TIGHT
    # Keys are passed through, as Equinox users do.
    assert distance(eqx.filter_jit(small)(x[0], key=jax.random.key(1)), expected[0]) <= TIGHT

    adapted = jax.tree.map(lambda leaf: 2 * leaf, ca.shrink(variables, plan))
    got = jax.jit(jax.vmap(adapter.slimmed(model, plan, variables=adapted)))(x)
    assert distance(got, jax.jit(ca.slim(batched(apply), plan))(adapted, x)) <= TIGHT
    with pytest.raises(PlanError, match="slimmed: the variables do not fit the plan"):
        adapter.slimmed(model, plan, variables=variables)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(module, x):
        return (jax.vmap(module)(x) ** 2).mean()

    optimizer = optax.adam(1e-2)
    moments = optimizer.init(eqx.filter(small, eqx.is_inexact_array))
    losses = []
    for _ in range(3):
        value, gradients = loss(small, x)
        updates, moments = optimizer.update(gradients, moments)
        small = eqx.apply_updates(small, updates)
        losses.append(float(value))
    assert losses[-1] < losses[0]

    eqx.tree_serialise_leaves(tmp_path / "small.eqx", small)
    back = eqx.tree_deserialise_leaves(tmp_path / "small.eqx", adapter.slimmed(model, plan))
    assert eqx.tree_equal(back, small)


def test_state(x64):
    model, state = model_and_state(batch_norm=True)
    x = images(4, 2, 4, 4)
    trained = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    _, state = trained(x, state)
    model = eqx.nn.inference_mode(model)
    apply, variables = adapter.functional(model, state)
    groups = ca.find_groups(apply, variables, x[0])
    assert any(path.startswith("state/") for group in groups.groups for path, _, _ in group.axes)
    plan, masked = cut(groups, random_units(groups), variables)
    small, small_state = adapter.slimmed(model, plan, state)
    call = jax.jit(jax.vmap(small, in_axes=(0, None), out_axes=(0, None)))
    output, new_state = call(x, small_state)
    assert distance(output, jax.jit(batched(apply))(masked, x)) <= TIGHT
    shapes = [[y.shape for y in jax.tree.leaves(tree)] for tree in (new_state, small_state)]
    assert shapes[0] == shapes[1]
    arrays = eqx.filter(small, eqx.is_inexact_array), eqx.filter(small_state, eqx.is_array)
    assert sum(y.size for y in jax.tree.leaves(arrays)) == plan.parameters


def test_smaller(x64):
    model, apply, variables, x, groups = prepared(normalise=False)
    keep = units_without_every_second(groups, "attention/query", "attention/key", "attention/value")
    plan, masked = cut(groups, keep, variables)
    small = adapter.smaller(model, plan, x[0])
    assert type(small) is type(model)
    assert distance(eqx.filter_jit(small)(x[0]), jax.jit(apply)(masked, x[0])) <= TIGHT

    model, _, _, x, groups = prepared()
    plan = ca.plan_units(groups, units_without_every_second(groups, "attention/query"))
    with pytest.raises(PlanError, match=r"smaller: the model's own code does not run.* use `slimmed`"):
        adapter.smaller(model, plan, x[0])


def test_models_of_the_wrong_type():
    with pytest.raises(TraceError, match=r"equinox\.functional: got a dict.*needs no adapter"):
        adapter.functional({})


class Normalised(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 8, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.last = eqx.nn.Linear(8, 2, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.last(jax.nn.relu(x)), state


def test_training_mode_through_compress():
    model, state = eqx.nn.make_with_state(Normalised)(jax.random.key(0))
    one, variables = adapter.functional(model, state, updates=True)
    apply = jax.vmap(one, (None, 0), (0, None), axis_name="batch")

    def batches(step):
        x = 2 + 3 * jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (64, 3))
        return {"x": x, "y": jnp.stack([x[:, 0] * x[:, 1], x[:, 2]], 1) / 9}

    def loss(apply, variables, batch):
        found, new = apply(variables, batch["x"])
        return jnp.mean((found - batch["y"]) ** 2), {"state": new}

    task = apply, variables, loss, batches
    variables, _ = ca.fit(*task, 200, learning_rate=1e-2, progress=False)
    groups = ca.find_groups(apply, variables, batches(0)["x"], state_outputs={"1": "state"}, strict=True)
    assert groups.units == 8
    result = ca.compress(
        apply, variables, loss, batches, groups=groups, budget=ca.params(0.6),
        search=ca.GradientSearch(steps=20), fine_tune=200, learning_rate=1e-2, progress=False,
    )  # fmt: skip
    x = batches(9)["x"]
    small, small_state = adapter.slimmed(model, result.plan, state, variables=result.variables)
    got, new = jax.vmap(small, (0, None), (0, None), axis_name="batch")(x, small_state)
    expected, updates = result.apply(result.variables, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(eqx.filter(new, eqx.is_array), updates, rtol=1e-5, atol=1e-5)
    assert small_state.get(model.norm.batch_counter) == 200 + 20 + 200
    # The running mean moves by a hundredth to that of the small model's own channels.
    mean = jax.vmap(small.model.first)(x).mean(0)
    moved = [
        100 * after - 99 * before
        for before, after in zip(*map(jax.tree.leaves, (result.variables["state"], updates)), strict=True)
    ]
    assert any(leaf.shape == mean.shape and np.allclose(leaf, mean, rtol=1e-2, atol=1e-2) for leaf in moved)


def test_updates_without_state():
    with pytest.raises(TraceError, match=r"updates=True without state"):
        adapter.functional(eqx.nn.Linear(3, 2, key=jax.random.key(0)), updates=True)


class Held(eqx.Module):
    """Channels permuted and masked, and constants of a module that are no arrays."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear
    order: jax.Array
    mask: jax.Array

    def __init__(self, key):
        self.first, self.last = eqx.nn.Linear(3, 8, key=key), eqx.nn.Linear(8, 2, use_bias=False, key=key)
        self.order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
        self.mask = jnp.arange(16).reshape(2, 8) % 3 > 0

    def __call__(self, x):
        hidden = jax.nn.relu(self.first(x))[self.order]
        return (self.last.weight * self.mask) @ hidden


def test_integers_and_flags_of_a_module_are_constants(x64):
    model, x = Held(jax.random.key(0)), images(4, 3)
    apply, variables = adapter.functional(model)
    groups = ca.find_groups(apply, variables, x[0])
    assert groups.units == 8
    plan, masked = cut(groups, random_units(groups), variables)
    expected, small = batched(apply)(masked, x), adapter.slimmed(model, plan)
    assert distance(jax.vmap(small)(x), expected) <= TIGHT
    assert distance(eqx.filter_jit(lambda m, x: jax.vmap(m)(x))(small, x), expected) <= TIGHT
    assert jax.tree.leaves(eqx.filter_grad(lambda m: (jax.vmap(m)(x) ** 2).sum())(small))
    changed = eqx.tree_at(lambda m: m.model.mask, small, ~model.mask)
    with pytest.raises(PlanError, match="Slimmed: `mask` has other values than when `slimmed` was called"):
        changed(x[0])


def test_a_plan_of_both_modes():
    model, state = eqx.nn.make_with_state(Normalised)(jax.random.key(0))
    training, variables = adapter.functional(model, state, updates=True)
    used, _ = adapter.functional(eqx.nn.inference_mode(model), state)

    def over(apply, out):
        return jax.vmap(apply, (None, 0), out, axis_name="batch")

    def both(variables, x):
        output, new = over(training, (0, None))(variables, x)
        return {"trained": output, "used": over(used, 0)(variables, x), "state": new}

    x = jnp.asarray(images(4, 3), jnp.float32)
    groups = ca.find_groups(both, variables, x, state_outputs={"state": "state"}, deployed=("used",))
    plan = ca.plan_units(groups, np.arange(8) < 5)
    expected = ca.slim(both, plan)(ca.shrink(variables, plan), x)
    for mode, name in ((model, "trained"), (eqx.nn.inference_mode(model), "used")):
        small, small_state = adapter.slimmed(mode, plan, state)
        output, _ = jax.vmap(small, (0, None), (0, None), axis_name="batch")(x, small_state)
        assert distance(output, expected[name]) <= 1e-5
