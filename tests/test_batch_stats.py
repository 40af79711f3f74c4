"""Losses that return updates: batch statistics stay up to date while a model is compressed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

import compaware_jax as ca
from compaware_jax.cost import parameter_cost
from compaware_jax.errors import TraceError
from compaware_jax.search.coefficients import Problem
from compaware_jax.training.loop import run_steps

MOMENTUM = 0.9


class Network(nn.Module):
    """Two layers with batch norm, which a frozen running average would leave wrong."""

    @nn.compact
    def __call__(self, x, *, train):
        for width in (24, 16):
            x = nn.Dense(width)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x))
        return nn.Dense(3)(x)


def batches(step):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (64, 8)) * 3 + 1
    return {"x": x, "y": jnp.stack([jnp.sin(x[:, 0]), x[:, 1] * x[:, 2] / 5, x[:, 3]], 1)}


def apply(variables, x):
    """Both modes; compiled, what is not used costs nothing."""
    trained, updates = Network().apply(variables, x, train=True, mutable=["batch_stats"])
    return {"trained": trained, "used": Network().apply(variables, x, train=False), **updates}


def loss(apply, variables, batch):
    found = apply(variables, batch["x"])
    return jnp.mean((found["trained"] - batch["y"]) ** 2), {"batch_stats": found["batch_stats"]}


def error(apply, variables, batch):
    return jnp.mean((apply(variables, batch["x"])["used"] - batch["y"]) ** 2)


@pytest.fixture(scope="module")
def dense():
    start = Network().init(jax.random.key(1), batches(0)["x"], train=False)
    return ca.fit(apply, start, loss, batches, 400, learning_rate=1e-2, progress=False)[0]


@pytest.fixture(scope="module")
def groups(dense):
    found = ca.find_groups(apply, dense, batches(0)["x"], state_outputs={"batch_stats": "batch_stats"})
    assert [group.units for group in found.groups] == [24, 16]
    return found


def test_fit_takes_the_updates(dense):
    (tuned, _), layer = ca.fit(apply, dense, loss, batches, 1, progress=False), dense["params"]["Dense_0"]
    before, after = (v["batch_stats"]["BatchNorm_0"]["mean"] for v in (dense, tuned))
    batch_mean = (batches(0)["x"] @ layer["kernel"] + layer["bias"]).mean(0)
    assert np.abs(before).max() > 1, "it is far from its start at zero"
    np.testing.assert_allclose(after, MOMENTUM * before + (1 - MOMENTUM) * batch_mean, rtol=1e-4, atol=1e-5)


def test_the_small_model_has_statistics_of_its_own(dense, groups):
    held_out = batches(10_000)
    result = ca.compress(
        apply, dense, loss, batches, groups=groups, budget=ca.params(0.4), fine_tune=300,
        search=ca.GradientSearch(steps=60), learning_rate=1e-2, held_out=held_out,
        criteria=[ca.at_most("error", error, 10.0)], progress=False,
    )  # fmt: skip
    assert result.kept
    small = result.variables
    assert small["batch_stats"]["BatchNorm_0"]["mean"].shape == (result.plan.counts[0][1],)
    # In evaluation it is what it is in training, on average.
    trained, updates = jax.jit(
        lambda v, x: (result.apply(v, x)["trained"], result.apply(v, x)["batch_stats"])
    )(small, held_out["x"])
    used = result.apply(small, held_out["x"])["used"]
    assert jnp.mean((used - trained) ** 2) < 0.1 * jnp.var(held_out["y"])
    chex.assert_trees_all_equal_shapes(updates, small["batch_stats"])
    stale = {**small, "batch_stats": ca.shrink(dense, result.plan)["batch_stats"]}
    assert error(result.apply, small, held_out) < error(result.apply, stale, held_out)


def test_sweeps_take_the_updates(dense, groups):
    (point,) = ca.sweep(
        apply, dense, loss, batches, groups=groups, budgets=[ca.params(0.4)],
        search=ca.GradientSearch(steps=20), fine_tune=200, learning_rate=1e-2, progress=False,
    )  # fmt: skip
    small = ca.slim(apply, point.plan)
    held_out = batches(10_000)
    stale = {**point.variables, "batch_stats": ca.shrink(dense, point.plan)["batch_stats"]}
    assert error(small, point.variables, held_out) < error(small, stale, held_out)


def test_soft_gates_do_not_gather_in_the_statistics(dense, groups):
    """What was closed and opens again finds the statistics that it left."""
    cost = parameter_cost(groups)
    problem = Problem(apply, loss, batches, groups, cost)
    found = ca.GradientSearch(steps=100, harden=0.0, ramp=0.01).build(problem)
    state, _ = run_steps(
        found.step, found.init(dense, 0.4, jax.random.key(0), 0), 100, label="", progress=False
    )
    variance = found.variables(state)["batch_stats"]["BatchNorm_0"]["var"]
    x = jnp.concatenate([batches(i)["x"] for i in range(100)])
    layer = found.variables(state)["params"]["Dense_0"]
    expected = jnp.var(x @ layer["kernel"] + layer["bias"], 0)
    ratio = np.asarray(variance / expected)
    assert (ratio > 0.3).all(), ratio


def test_updates_beside_trained_leaves():
    """Where a module holds both, only what is returned is taken over."""

    def module(v, x):
        y = x @ v["layer"]["w"]
        return jnp.tanh(y - v["layer"]["mean"]) @ v["out"], y.mean(0)

    def module_loss(f, v, batch):
        y, mean = f(v, batch["x"])
        return jnp.mean((y - batch["y"]) ** 2), {"layer": {"mean": mean}}

    start = freeze({"layer": {"w": jnp.ones((8, 4)) / 8, "mean": jnp.zeros(4)}, "out": jnp.ones((4, 3))})
    found, _ = ca.fit(module, start, module_loss, batches, 20, learning_rate=1e-2, progress=False)
    assert jax.tree.structure(found) == jax.tree.structure(start)
    assert (found["layer"]["w"] != start["layer"]["w"]).all()
    np.testing.assert_allclose(
        found["layer"]["mean"], batches(19)["x"].mean(0) @ found["layer"]["w"], atol=2e-3
    )


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"statistics": jnp.zeros(3)}, "an update of `statistics`, expected paths of the variables"),
        ([jnp.zeros(3)], "an update of `0`"),
        (
            {"batch_stats": {"BatchNorm_0": {"mean": jnp.zeros(3)}}},
            r"of `batch_stats/BatchNorm_0/mean` of shape \(3,\) and float32, expected \(24,\)",
        ),
    ],
)
def test_other_updates_are_refused(dense, groups, updates, message):
    def wrong(apply, variables, batch):
        return loss(apply, variables, batch)[0], updates

    with pytest.raises(TraceError, match=message):
        ca.compress(apply, dense, wrong, batches, groups=groups, budget=ca.params(0.4), progress=False)
