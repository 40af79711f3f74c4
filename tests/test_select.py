"""Selection: budgets met exactly, never exceeded; importance against its definition."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compaware_jax as ca
from compaware_jax.cost import COSTS, parameter_cost
from compaware_jax.errors import BudgetError, PlanError, RequestError
from compaware_jax.models import autoencoder
from compaware_jax.search.select import keep_units, round_counts, uniform_counts


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


def chain(*sizes):
    def apply(variables, x):
        for w in variables:
            x = jnp.tanh(x @ w)
        return x

    shapes = [jax.ShapeDtypeStruct(pair, jnp.float32) for pair in itertools.pairwise(sizes)]
    return ca.find_groups(apply, shapes, jnp.ones((1, sizes[0])))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    shares=st.lists(st.floats(0.2, 1.0), min_size=8, max_size=8),
    fraction=st.floats(0.3, 1.0),
    step=st.sampled_from([1, 4, 8]),
    whole=st.integers(0, 4),
)
def test_rounding_meets_the_budget_in_steps(shares, fraction, step, whole):
    groups = chain(8, *[64] * 8, 8)
    names = [group.name for group in groups.groups]
    groups = ca.constrain(groups, multiple_of=step, whole=names[:whole], floor={names[-1]: 11})
    cost = parameter_cost(groups)
    limit = int(max(fraction * cost.total, cost.floor))
    counts = round_counts(cost, np.array(shares), limit)
    assert (counts[:whole] == 64).all()
    assert counts[-1] >= 11
    assert ((counts % step == 0) | (counts == 64)).all()
    assert cost.exact(counts) <= limit
    # Another step of any group is too much.
    for g in np.flatnonzero(counts < cost.most):
        assert cost.exact(counts + step * (np.arange(8) == g)) > limit


@pytest.mark.parametrize(
    ("sizes", "step", "fraction", "shares", "expected"),
    [
        # Three units of the first layer, and all of the second, lose 0.06 of the digits' accuracy.
        ((784, 128, 64, 10), 1, 0.03, (3.7, 23.2), (4, 9)),
        ((784, 96, 48, 64, 10), 1, 0.03, (2.7, 11.9, 16.4), (3, 4, 10)),
        # Both ends together: one after the other would have chosen the first, and fail.
        ((784, 256, 128, 256, 784), 16, 0.1, (23.9, 55.8, 30.8), (16, 128, 32)),
        ((784, 256, 128, 256, 784), 32, 0.3, (69.9, 128.0, 83.0), (64, 128, 64)),
        # What is cheap may yield, but not to nothing: here seven units of the first layer would leave it two.
        ((784, 128, 64, 10), 1, 0.0507, (6.8, 23.0), (6, 51)),
    ],
)
def test_coarse_groups_are_rounded_to_the_nearest(sizes, step, fraction, shares, expected):
    """The expensive ones first, together; then what is cheap takes what is left."""
    groups = ca.constrain(chain(*sizes), multiple_of=step)
    cost = parameter_cost(groups)
    limit = int(fraction * cost.total)
    counts = round_counts(cost, np.array(shares) / groups.sizes, limit)
    assert cost.exact(counts) <= limit
    assert tuple(counts) == expected


def test_whole_groups_leave_room_for_exchanges():
    groups = chain(8, *[64] * 64, 8)
    names = [group.name for group in groups.groups]
    cost = parameter_cost(ca.constrain(groups, whole=names[:60], multiple_of=8))
    limit = int(0.971 * cost.total)
    counts = round_counts(cost, np.full(64, 0.7), limit)
    assert 0.998 * limit <= cost.exact(counts) <= limit


def test_rounding_keeps_proportions(dense_groups):
    cost = parameter_cost(dense_groups)
    shares = np.array([0.08, 0.6, 0.9, 0.7, 0.1])
    counts = round_counts(cost, shares, int(0.1 * cost.total))
    ratio = counts / (shares * cost.units)
    assert ratio.max() / ratio.min() < 1.06


def test_cheap_groups_do_not_starve_for_half_a_unit(dense_groups):
    """At 3 % a unit of an outer layer is 2.4 % of the limit: both up would leave 3 and 2 inner ones."""
    cost = parameter_cost(dense_groups)
    counts = uniform_counts(cost, int(0.03 * cost.total), whole=[2])
    assert counts.tolist() == [20, 10, 32, 10, 19]


def test_groups_at_their_ceiling_stay_there_while_others_yield():
    """The third one wants far more than it may keep: what the first one gains is not taken from it."""
    groups = chain(784, 128, 64, 32, 10)
    cost = parameter_cost(groups)
    counts = round_counts(cost, np.array([5.8 / 128, 12 / 64, 100.0]), int(0.049 * cost.total))
    assert counts[0] == 6
    assert counts[2] >= 31  # One was exchanged for another unit, to spend the limit.


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


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    "demands", [{}, {"multiple_of": 8, "floor": {"*": 24}, "ceiling": {"encoder/dense1": 200}}]
)
def test_one_shot(dense_groups, across, demands):
    """Uniform or across groups, the best ones, and no step more fits."""
    groups = ca.constrain(dense_groups, **demands)
    scores = np.random.default_rng(0).random(groups.units) * (1 + groups.group_of_unit)
    cost, limit = parameter_cost(groups), ca.params(0.2).limit(groups)
    plan = ca.one_shot(groups, scores, ca.params(0.2), across=across)
    counts = np.array([kept for _, kept, _ in plan.counts])
    assert cost.exact(counts) <= limit
    assert (counts >= groups.floors).all()
    assert (counts <= groups.ceilings).all()
    assert (counts % groups.steps == 0).all()
    if not across:
        np.testing.assert_array_equal(counts, uniform_counts(cost, limit))
        return
    step = np.diag(np.minimum(groups.steps, groups.ceilings - counts))
    assert all(cost.exact(counts + one) > limit for one in step if one.any())
    # All that is better than the best unit that did not fit is there.
    free = np.flatnonzero((counts > groups.floors) & (counts < groups.ceilings))
    ordered = [np.sort(scores[group.slice])[::-1] for group in groups.groups]
    lowest = max(ordered[g][min(counts[g] + groups.steps[g], groups.sizes[g]) - 1] for g in free)
    assert len(free) >= 2
    better = np.array([np.sum(scores[group.slice] > lowest) for group in groups.groups])
    assert (np.minimum(better, groups.ceilings) // groups.steps * groups.steps <= counts).all()
    more = np.array([np.sum(scores[group.slice] >= lowest) for group in groups.groups])
    more = np.maximum(np.minimum(more, groups.ceilings) // groups.steps * groups.steps, groups.floors)
    assert cost.exact(more) > limit


def test_one_shot_refuses_what_is_of_another_kind(dense_groups):
    one_shot, scores = inspect.unwrap(ca.one_shot), np.zeros(dense_groups.units)
    with pytest.raises(BudgetError, match=r"the budget is 0\.5, expected a Budget: params"):
        one_shot(dense_groups, scores, 0.5)
    with pytest.raises(RequestError, match="groups is dict, expected what find_groups returns"):
        one_shot({}, scores, ca.params(0.5))


@pytest.mark.parametrize(
    ("scores", "message"),
    [(np.zeros(3), r"of shape \(3,\), expected one"), (np.full(1568, np.nan), "not a number")],
)
def test_one_shot_refuses_scores(dense_groups, scores, message):
    with pytest.raises(PlanError, match=message):
        ca.one_shot(dense_groups, scores, ca.params(0.2))
