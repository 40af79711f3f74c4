"""Selection: budgets met exactly, never exceeded; importance against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compaware_jax as ca
from compaware_jax import importance
from compaware_jax.cost import COSTS, parameter_cost
from compaware_jax.errors import BudgetError
from compaware_jax.models import autoencoder
from compaware_jax.select import keep_units, round_counts, uniform_counts
from tests.models import MODELS


@pytest.fixture(scope="module")
def dense_groups():
    model = autoencoder("dense")
    variables = jax.eval_shape(model.init, jax.random.key(0))
    return ca.find_groups(model.apply, variables, jnp.zeros((1, 28, 28, 1)), released=("latent",))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    fraction=st.floats(0.03, 1.0),
    shares=st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5),
    kind=st.sampled_from(sorted(COSTS)),
)
def test_rounding_meets_the_budget(dense_groups, fraction, shares, kind):
    cost = COSTS[kind](dense_groups)
    limit = ca.Budget(kind, fraction).limit(dense_groups)
    counts = round_counts(cost, np.array(shares), limit)
    assert (counts >= 1).all()
    assert (counts <= cost.units).all()
    assert 0.995 * limit <= cost.exact(counts) <= limit


def test_rounding_keeps_proportions(dense_groups):
    cost = parameter_cost(dense_groups)
    shares = np.array([0.08, 0.6, 0.9, 0.7, 0.1])
    counts = round_counts(cost, shares, int(0.1 * cost.total))
    ratio = counts / (shares * cost.units)
    assert ratio.max() / ratio.min() < 1.06


def test_rounding_below_the_floors(dense_groups):
    cost = parameter_cost(dense_groups)
    with pytest.raises(BudgetError, match="least counts cost"):
        round_counts(cost, np.ones(5), cost.floor - 1)


def test_uniform_counts_leave_groups_whole(dense_groups):
    cost = parameter_cost(dense_groups)
    counts = uniform_counts(cost, int(0.1 * cost.total), whole=[2])
    assert counts[2] == 32
    np.testing.assert_allclose(counts[[0, 1, 3, 4]] / cost.units[[0, 1, 3, 4]], 0.125, atol=0.01)


def test_keep_units_takes_the_best_and_guards_pieces():
    def apply(v, x):
        left, right = jnp.split(x @ v["a"], 2, -1)
        return jnp.concatenate([jnp.tanh(left), right], -1) @ v["b"]

    variables = {"a": np.ones((3, 6)), "b": np.ones((6, 2))}
    groups = ca.find_groups(apply, variables, np.ones((1, 3)))
    scores = np.array([5.0, 4.0, 3.0, 0.1, 0.2, 0.0])
    keep = keep_units(groups, scores, np.array([3]))
    np.testing.assert_array_equal(keep, [True, True, False, False, True, False])
    ca.plan_units(groups, keep)


def test_two_guarded_sets_raise_the_floor():
    def apply(v, x):
        left, right = jnp.split(x @ v["a"], 2, -1)
        return jnp.concatenate([jnp.tanh(left), right], -1) @ v["b"]

    groups = ca.find_groups(apply, {"a": np.ones((3, 8)), "b": np.ones((8, 2))}, np.ones((1, 3)))
    assert groups.floors.tolist() == [2]
    cost = parameter_cost(groups)
    counts = round_counts(cost, np.array([0.1]), cost.floor)
    assert counts.tolist() == [2]
    keep = keep_units(groups, np.arange(8.0), counts)
    np.testing.assert_array_equal(np.flatnonzero(keep), [3, 7])
    ca.plan_units(groups, keep)


def test_diverged_coefficients_are_refused(dense_groups):
    cost = parameter_cost(dense_groups)
    with pytest.raises(BudgetError, match="search diverged"):
        round_counts(cost, np.full(5, np.nan), cost.total)


@pytest.fixture
def scored():
    apply, variables, args = MODELS["convolutional"]()
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    return apply, variables, args, ca.find_groups(apply, variables, *args)


def unit_slices(groups, variables, unit):
    for leaf, axes in zip(jax.tree.leaves(variables), groups.units_of, strict=True):
        for axis, units in enumerate(axes):
            yield leaf.take(np.flatnonzero(units == unit), axis=axis)


def test_magnitudes(scored):
    _, variables, _, groups = scored
    l1, l2 = importance.l1(groups, variables), importance.l2(groups, variables)
    for unit in range(groups.units):
        parts = list(unit_slices(groups, variables, unit))
        assert float(l1[unit]) == pytest.approx(sum(np.abs(p).sum() for p in parts), rel=1e-5)
        norm = np.sqrt(sum((p**2).sum() for p in parts))
        assert float(l2[unit]) == pytest.approx(norm, rel=1e-5)


def test_taylor_predicts_the_first_order_change(scored):
    apply, variables, args, groups = scored

    def loss(v):
        return jnp.sum(apply(v, *args) ** 2)

    gradients = jax.grad(loss)(jax.tree.map(jnp.asarray, variables))
    scores = importance.taylor(groups, variables, gradients)

    def along(unit, t):
        gates = jnp.ones(groups.units).at[unit].add(-t)
        return loss(ca.apply_mask(groups, gates, variables))

    slopes = jax.vmap(lambda u: jax.grad(along, 1)(u, 0.0))(jnp.arange(groups.units))
    np.testing.assert_allclose(scores, np.abs(slopes), rtol=1e-3, atol=1e-4)


def test_sensitivities_against_removal_one_by_one(scored):
    apply, variables, args, groups = scored

    def metric(v):
        return -jnp.sum(apply(v, *args) ** 2)

    got = importance.ablation(groups, metric, variables, at_once=3)
    for unit in range(groups.units):
        gates = np.ones(groups.units)
        gates[unit] = 0
        expected = metric(variables) - metric(ca.apply_mask(groups, gates, variables))
        assert float(got[unit]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    slopes = importance.gradient_sensitivity(groups, metric, variables)
    assert slopes.shape == (groups.units,)
    assert (np.asarray(slopes) >= 0).all()
    scores = importance.l2(groups, variables)
    falls = importance.group_ablation(groups, metric, variables, scores, share=0.5)
    for number, group in enumerate(groups.groups):
        gates = np.ones(groups.units)
        worst = np.argsort(np.asarray(scores)[group.slice])[: group.units // 2]
        gates[group.offset + worst] = 0
        expected = metric(variables) - metric(ca.apply_mask(groups, gates, variables))
        assert float(falls[number]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_random_scores_follow_the_key(scored):
    groups = scored[-1]
    a = importance.random(groups, jax.random.key(0))
    np.testing.assert_array_equal(a, importance.random(groups, jax.random.key(0)))
    assert not np.array_equal(a, importance.random(groups, jax.random.key(1)))
    assert a.shape == (groups.units,)
