"""Optimizer states of every layout go on after surgery."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compaware_jax as ca
from compaware_jax.errors import PlanError

X = jnp.ones((2, 4))
KEPT = np.array([0, 2, 3, 6, 7, 9])


def net(v, x):
    p = v["params"]
    return jnp.tanh(x @ p["in"] + p["bias"]) @ p["out"]


@pytest.fixture
def cut():
    rng = np.random.default_rng(0)
    shapes = {"in": (4, 10), "bias": (10,), "out": (10, 2)}
    variables = {"params": {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}}
    groups = ca.find_groups(net, variables, X)
    return variables, ca.plan_units(groups, np.isin(np.arange(10), KEPT))


def gradients(apply, params):
    return jax.grad(lambda p: (apply({"params": p}, X) ** 2).sum())(params)


def trained(optimizer, params):
    state = optimizer.init(params)
    for _ in range(2):
        changes, state = optimizer.update(gradients(net, params), state, params)
        params = optax.apply_updates(params, changes)
    return params, state


MIRRORING = {
    "adamw": optax.adamw(1e-3),
    "part only": optax.masked(optax.adam(1e-3), {"in": True, "bias": False, "out": True}),
    "by label": optax.multi_transform(
        {"slow": optax.adam(1e-4), "fast": optax.sgd(1e-2, momentum=0.9)},
        {"in": "slow", "bias": "fast", "out": "fast"},
    ),
    "accumulated": optax.MultiSteps(optax.adam(1e-3), 3),
    "with hyperparameters": optax.inject_hyperparams(optax.lion)(1e-3),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-3),
}
OTHERS = {
    "rows and columns": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "per axis": optax.sm3(1e-3),
    "memory of steps": optax.lbfgs(1e-3, memory_size=3, linesearch=None),
}


@pytest.mark.parametrize("name", [*MIRRORING, *OTHERS])
def test_any_state_goes_on(cut, name):
    variables, plan = cut
    optimizer = (MIRRORING | OTHERS)[name]
    params, state = trained(optimizer, variables["params"])
    small_params = ca.shrink(params, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Nothing starts anew.
        small = ca.shrink_optimizer(optimizer, state, params, plan)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, optimizer.init(small_params))
    if name in MIRRORING:
        for got, expected in zip(
            jax.tree.leaves(small), jax.tree.leaves(ca.shrink(state, plan)), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    changes, _ = optimizer.update(gradients(ca.slim(net, plan), small_params), small, small_params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(changes))


@pytest.mark.parametrize("make", [optax.contrib.prodigy, optax.contrib.dadapt_adamw])
def test_distances_over_all_parameters_leave_moments_their_own(make):
    """Sums over everything make axes of a size look alike, also those that are cut differently."""

    def apply(v, x):
        h = jnp.tanh(x @ v["in"])
        return [jnp.tanh(h @ v[name]).sum(-1) for name in ("mean", "scale")]

    rng = np.random.default_rng(0)
    shapes = {"in": (4, 10), "mean": (10, 8), "scale": (10, 8)}
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    groups = ca.find_groups(apply, params, X)
    plan = ca.plan_units(groups, np.arange(groups.units) % 5 != 0)
    optimizer = make()
    _, state = optimizer.update(params, optimizer.init(params), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Nothing starts anew.
        small = ca.shrink_optimizer(optimizer, state, params, plan)
    for got, expected in zip(jax.tree.leaves(small), jax.tree.leaves(ca.shrink(state, plan)), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_row_and_column_means_are_cut_along_their_own_axis(cut):
    variables, plan = cut
    optimizer = OTHERS["rows and columns"]
    params, state = trained(optimizer, variables["params"])
    factored, small = state[0], ca.shrink_optimizer(optimizer, state, params, plan)[0]
    np.testing.assert_array_equal(small.v_row["in"], factored.v_row["in"])
    np.testing.assert_array_equal(small.v_col["in"], factored.v_col["in"][KEPT])
    np.testing.assert_array_equal(small.v["bias"], factored.v["bias"][KEPT])


def test_what_is_laid_out_anew_starts_anew_and_is_named(cut):
    variables, _ = cut
    groups = ca.find_groups(net, variables, X)
    plan = ca.plan_units(groups, np.arange(10) < 3)  # 4 × 3: the rows are now the longer side.
    optimizer = OTHERS["rows and columns"]
    params, state = trained(optimizer, variables["params"])
    with pytest.warns(UserWarning, match=r"start anew: 0/v_row/in, 0/v_col/in"):
        small = ca.shrink_optimizer(optimizer, state, params, plan)
    assert small[0].v_row["in"].shape == (3,)
    assert not small[0].v_row["in"].any()


def test_means_that_change_places_start_anew(cut):
    """Columns become as long as rows: what were means of columns has the shape of means of rows."""
    variables, _ = cut
    groups = ca.find_groups(net, variables, X)
    plan = ca.plan_units(groups, np.arange(10) < 2)  # 10 × 2 becomes 2 × 2.
    optimizer = OTHERS["rows and columns"]
    params, state = trained(optimizer, variables["params"])
    fresh = optimizer.init(ca.shrink(params, plan))[0]
    assert state[0].v_row["out"].shape == fresh.v_row["out"].shape == (2,)
    with pytest.warns(UserWarning, match=r"start anew: .*0/v_row/out, .*0/v_col/out"):
        small = ca.shrink_optimizer(optimizer, state, params, plan)[0]
    for found in (small.v_row["out"], small.v_col["out"]):
        np.testing.assert_array_equal(found, np.zeros(2))
    np.testing.assert_array_equal(small.v["bias"], state[0].v["bias"][:2])


def test_shrink_refuses_a_state_that_does_not_mirror_the_variables(cut):
    variables, plan = cut
    state = OTHERS["rows and columns"].init(variables["params"])
    with pytest.raises(PlanError, match="shrink_optimizer"):
        ca.shrink(state, plan)


def test_a_state_of_another_optimizer_is_refused(cut):
    variables, plan = cut
    state = optax.sgd(1e-3).init(variables["params"])
    with pytest.raises(PlanError, match="not one that this optimizer makes"):
        ca.shrink_optimizer(optax.adam(1e-3), state, variables["params"], plan)


def test_params_of_another_model_are_refused(cut):
    _, plan = cut
    params = {"in": jnp.ones((4, 9)), "bias": jnp.ones(9), "out": jnp.ones((9, 2))}
    with pytest.raises(PlanError, match=r"^shrink_optimizer: "):
        ca.shrink_optimizer(optax.adam(1e-3), optax.adam(1e-3).init(params), params, plan)


def test_a_line_search_is_told_to_start_anew():
    v = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
    groups = ca.find_groups(lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"], v, jnp.ones((1, 3)))
    plan = ca.plan_units(groups, jnp.arange(8) < 5)
    optimizer = optax.lbfgs()
    with pytest.raises(PlanError, match=r"update cannot be traced .*start anew: optimizer\.init"):
        ca.shrink_optimizer(optimizer, optimizer.init(v), v, plan)
