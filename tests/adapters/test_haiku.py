"""Haiku: the law through a transformed function, and parameters and state for one that is rebuilt."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax.adapters import haiku as adapter
from compaware_jax.errors import PlanError, TraceError
from compaware_jax.law import distance, law_errors
from tests.adapters.common import TIGHT, cut, drawn_init, images, random_units


def build(conv=6, hidden=5, normalise=True, with_state=True):
    def net(x, is_training):
        x = hk.Conv2D(conv, 3)(x)
        if with_state:
            x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        x = jax.nn.relu(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if normalise:
            x = hk.LayerNorm(-1, True, True)(x)
        return hk.Linear(3)(jax.nn.relu(hk.Linear(hidden)(x)).mean(1))

    return (hk.transform_with_state if with_state else hk.transform)(net)


def test_law(x64):
    net, x = build(with_state=False), images(2, 4, 4, 2)
    apply, variables = adapter.functional(net, drawn_init(net.init, x, True), is_training=False)
    groups = ca.find_groups(apply, variables, x)
    assert max(law_errors(apply, variables, x, keep=random_units(groups), groups=groups)) <= TIGHT


@pytest.mark.parametrize("normalise", [True, False])
def test_params_and_state_go_on_in_a_rebuilt_net(x64, normalise):
    net, x = build(normalise=normalise), images(2, 4, 4, 2)
    params, state = drawn_init(net.init, x, True)
    training, variables = adapter.functional(net, params, state, updates=True, is_training=True)
    groups = ca.find_groups(training, variables, x, state_outputs={"1": "state"})
    plan, masked = cut(groups, random_units(groups), variables)
    small = ca.shrink(variables, plan)
    output, new_state = jax.jit(ca.slim(training, plan))(small, x)
    expected, expected_state = jax.jit(training)(masked, x)
    assert distance(output, expected) <= TIGHT
    assert distance(new_state, ca.shrink({**variables, "state": expected_state}, plan)["state"]) <= TIGHT
    small_params, small_state = small["params"], small["state"]
    evaluation, _ = adapter.functional(net, params, state, is_training=False)
    assert distance(jax.jit(ca.slim(evaluation, plan))(small, x), jax.jit(evaluation)(masked, x)) <= TIGHT

    rebuilt = build(
        conv=small_params["conv2_d"]["w"].shape[-1],
        hidden=small_params["linear_1"]["w"].shape[-1],
        normalise=normalise,
    )
    rebuilt_apply, _ = adapter.functional(rebuilt, small_params, small_state, is_training=False)
    if normalise:
        with pytest.raises(PlanError, match="normalisation over a cut axis"):
            adapter.check_rebuilt(rebuilt_apply, evaluation, plan, variables, x)
        return
    assert adapter.check_rebuilt(rebuilt_apply, evaluation, plan, variables, x) <= TIGHT
    _, rebuilt_state = rebuilt.apply(small_params, small_state, None, x, is_training=True)
    assert distance(rebuilt_state, new_state) < 0.1


def test_counters_go_on():
    net, x = build(), images(64, 4, 4, 2)
    training, variables = adapter.functional(
        net, *net.init(jax.random.key(0), x, True), updates=True, is_training=True
    )

    def loss(apply, variables, batch):
        output, state = apply(variables, batch)
        return jnp.mean((output - batch[:, 0, 0, :1]) ** 2), {"state": state}

    groups = ca.find_groups(training, variables, x, state_outputs={"1": "state"})
    result = ca.compress(
        training,
        variables,
        loss,
        lambda step: jnp.roll(x, step, 0),
        groups=groups,
        budget=ca.params(0.6),
        search=ca.GradientSearch(steps=20),
        fine_tune=10,
        progress=False,
    )
    state = result.variables["state"]
    (mean,) = [module for name, module in state.items() if "mean" in name]
    assert mean["counter"] == 30
    # As net itself has it, of the mean that is not corrected for its start.
    np.testing.assert_allclose(mean["average"], mean["hidden"] / (1 - 0.9**30), rtol=1e-5)


def test_refusals():
    with pytest.raises(TraceError, match=r"without its state\. Pass functional\(transformed, params, state"):
        adapter.functional(build(), {})
    with pytest.raises(TraceError, match="a Transformed, which has no state"):
        adapter.functional(build(with_state=False), {}, {})
    with pytest.raises(TraceError, match=r"got a function, expected what hk\.transform"):
        adapter.functional(lambda x: x, {})


def test_transformed_without_a_random_key(x64):
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([6, 2])(x)))
    x = jnp.ones((4, 3))
    params = net.init(jax.random.key(0), x)
    apply, variables = adapter.functional(net, params)
    np.testing.assert_array_equal(apply(variables, x), net.apply(params, x))
    assert ca.find_groups(apply, variables, x).units == 6


@pytest.mark.parametrize("with_state", [True, False])
def test_a_key_per_call(x64, with_state):
    def net(x):
        return hk.Linear(2)(hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(8)(x)))

    transformed, x = (hk.transform_with_state if with_state else hk.transform)(net), images(4, 3)
    given = transformed.init(jax.random.key(0), x)
    apply, variables = adapter.functional(
        transformed, *(given if with_state else (given,)), rng=jax.random.key(1)
    )
    keys = [jax.random.key(seed) for seed in (2, 3)]
    outputs = [apply(variables, x, reseed=key) for key in (None, *keys)]
    assert min(distance(outputs[n], outputs[n - 1]) for n in range(3)) > 0.1
    groups = ca.find_groups(apply, variables, x, reseed=keys[0])
    keep = random_units(groups)
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups, reseed=keys[1])) <= TIGHT
