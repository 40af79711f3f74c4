"""The searches: gates, the budget surface, gradient against grid."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax.cost import parameter_cost
from compaware_jax.errors import RequestError
from compaware_jax.importance import ranks
from compaware_jax.search.coefficients import Problem, on_budget, soft_gates
from compaware_jax.search.gradient import _tangent
from compaware_jax.training.loop import run_steps
from compaware_jax.training.objective import Pressure, constrained, no_pressure
from tests import tasks


@pytest.fixture(scope="module")
def trained():
    variables = tasks.dense(300)
    return variables, tasks.groups(variables)


def test_gates_are_hard_for_whole_counts_without_edge(trained):
    _, groups = trained
    scores = jax.random.uniform(jax.random.key(0), (groups.units,))
    rank = ranks(groups, scores)
    counts = jnp.array([5.0, 3.0, 16.0])
    gates = soft_gates(groups, counts, rank, 0.0)
    np.testing.assert_array_equal(gates, rank < counts[groups.group_of_unit])


def test_gates_sum_to_the_count_while_the_edge_fits(trained):
    _, groups = trained
    rank = ranks(groups, jnp.arange(groups.units))
    counts = jnp.array([6.4, 2.0, 16.0])
    for edge in (0.0, 0.3, 0.6):
        gates = soft_gates(groups, counts, rank, edge)
        sums = [float(gates[g.slice].sum()) for g in groups.groups]
        np.testing.assert_allclose(sums, counts, rtol=0.02)


def test_gates_have_a_gradient_at_the_edge_only(trained):
    _, groups = trained
    rank = ranks(groups, jnp.arange(groups.units))

    def gate(counts):
        return soft_gates(groups, counts, rank, 0.5)

    slopes = jax.jacfwd(gate)(jnp.array([8.0, 2.0, 8.0]))
    first = np.asarray(slopes[groups.groups[0].slice, 0])
    order = np.argsort(np.asarray(rank[groups.groups[0].slice]))
    assert (first[order] > 0).nonzero()[0].tolist() == [6, 7, 8, 9]
    assert first.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0])
def test_on_budget(trained, budget):
    _, groups = trained
    cost = parameter_cost(groups)
    shares = jnp.log(jnp.array([0.3, 0.9, 0.5]))
    counts = jnp.exp(on_budget(cost, shares, budget))
    assert float(cost(counts)) == pytest.approx(budget * cost.total, rel=1e-4)
    assert (np.asarray(counts) <= groups.sizes + 1e-4).all()
    assert (np.asarray(counts) >= 1 - 1e-6).all()


def test_tangent_gradient_leaves_the_cost_alone(trained):
    _, groups = trained
    cost = parameter_cost(groups)
    log_counts = jnp.log(jnp.array([5.0, 2.0, 7.0]))
    gradient = jnp.array([-0.3, -0.1, -0.7])
    tangent, price = _tangent(cost, log_counts, gradient, jnp.ones(3, bool))
    assert float(tangent.sum()) == pytest.approx(0.0, abs=1e-5)
    assert float(price) > 0
    by_cost = jax.grad(lambda x: jnp.log(cost(jnp.exp(x))))(log_counts)
    np.testing.assert_allclose(tangent, gradient + price * by_cost, rtol=1e-5)


def test_few_that_can_pay_do_not_set_a_wild_price(trained):
    """At the start nearly all is whole: what a cheap group alone would pay is noise times a large factor."""
    _, groups = trained
    cost = parameter_cost(groups)
    log_counts = jnp.log(jnp.asarray(groups.sizes, float))
    by_cost = jax.grad(lambda x: jnp.log(cost(jnp.exp(x))))(log_counts)
    cheap = jnp.arange(3) == jnp.argmin(by_cost)
    _, price = _tangent(cost, log_counts, -1.0 * cheap, cheap)
    assert 0 < price <= 2.001 / by_cost.sum() < 1 / by_cost.min()


def weighing(multiplier):
    """A first step with this multiplier."""
    return Pressure(jnp.array([multiplier]), jnp.zeros(1), jnp.zeros(1))


def test_lagrangian():
    """The value is the loss; the gradient is the weighted mean, the criterion's in units of the loss."""
    criterion = ca.at_most("x", lambda f, v, b: v, 1.0)
    judged = ca.at_most("y", lambda f, v, b: v, 0.0, trainable=False)
    objective = constrained(lambda f, v, b: 2.0 - 0.5 * v, [criterion, judged], 100)
    value = jax.value_and_grad(lambda v, p: objective(lambda v: v, v, None, p), has_aux=True)
    (loss, (after, _)), slope = value(1.5, weighing(0.25))
    assert float(loss) == 1.25
    assert float(slope) == pytest.approx((-0.5 + 0.5 * 1.25) / 1.5)
    np.testing.assert_allclose((after.excess, after.distance), [[0.5], [0.5]])
    # Missed by more than the threshold: the unit is the distance.
    _, slope = value(3.0, weighing(0.25))
    assert float(slope) == pytest.approx((-0.5 + 0.5 * 0.5 / 2) / 1.5)
    # Surely kept: of no weight, whatever the multiplier.
    (_, (after, _)), slope = value(-2.0, weighing(0.25))
    assert float(slope) == -0.5
    np.testing.assert_allclose((after.excess, after.distance), [[-3.0], [3.0]])


def test_multipliers_rise_while_a_criterion_fails_and_fall_to_zero_where_it_is_kept():
    criteria = [ca.at_least("x", lambda f, v, b: v, 1.0)]
    value = constrained(lambda f, v, b: 0 * v, criteria, 1000)

    def follow(values, pressure):
        def step(pressure, v):
            _, (pressure, _) = value(lambda v: v, v, None, pressure)
            return pressure, pressure.multipliers[0]

        pressure, multipliers = jax.lax.scan(step, pressure, jnp.asarray(values))
        return np.asarray(multipliers), pressure

    near, pressure = follow([0.999] * 20, no_pressure(criteria))
    far, _ = follow([-1e6] * 20, no_pressure(criteria))
    np.testing.assert_allclose(near, 0.01 * np.arange(1, 21), rtol=1e-3)
    np.testing.assert_allclose(far, near, rtol=1e-3)
    # Batches on either side, as far: no side is the surer one.
    scattered, _ = follow([0.5, 1.5] * 500, no_pressure(criteria))
    assert scattered.max() < 1
    after, _ = follow([2.0] * 60, pressure)
    assert after[0] > 0
    assert (after[20:] == 0).all()


def test_criteria_weigh_the_same_however_many_the_steps():
    criteria = [ca.at_most("x", lambda f, v, b: v, 1.0)]
    ends = []
    for steps in (50, 400):
        pressure = no_pressure(criteria)
        step = jax.jit(
            partial(constrained(lambda f, v, b: 0 * v, criteria, steps), lambda v: v, jnp.asarray(3.0), None)
        )
        for _ in range(steps):
            _, (pressure, _) = step(pressure)
        ends.append(float(pressure.multipliers[0]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


@pytest.mark.parametrize("threshold", [1.0, 0.0, -1.0])
def test_training_goes_to_the_threshold_whatever_its_scale(threshold):
    """The loss pulls to three. Zero is a threshold like any other."""

    def trained(scale):
        bound = ca.at_most("x", lambda f, v, b: scale * (v["x"] + b)[0], scale * threshold)
        return ca.fit(
            lambda v: v, {"x": jnp.full(1, 2.5)}, lambda f, v, b: 1 + jnp.sum((v["x"] - 3.0 + b) ** 2),
            lambda step: 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (1,)), 1500,
            learning_rate=1e-2, criteria=[bound], progress=False,
        )[0]["x"]  # fmt: skip

    assert float(trained(1.0)[0]) == pytest.approx(threshold, abs=0.15)
    np.testing.assert_allclose(trained(1024.0), trained(1.0), rtol=1e-4)


def test_criteria_that_are_kept_change_nothing():
    loose = ca.at_most("error", tasks.error, 1e3)
    start = tasks.init(jax.random.key(3))
    free, bound = (
        ca.fit(tasks.apply, start, tasks.loss, tasks.batches, 30, criteria=criteria, progress=False)[0]
        for criteria in ([], [loose])
    )
    jax.tree.map(np.testing.assert_array_equal, free, bound)


def test_a_search_keeps_what_only_a_criterion_needs(trained):
    """Two models in one: the loss is of the first, the criterion of the second."""
    variables = {"seen": trained[0], "unseen": trained[0]}

    def apply(v, x):
        return tasks.apply(v["seen"], x), tasks.apply(v["unseen"], x)

    def error(which):
        return lambda f, v, b: jnp.mean((f(v, b)[which] - b) ** 2)

    groups = ca.find_groups(apply, variables, jnp.zeros((1, 8)))
    bound = ca.at_most("unseen", error(1), 2 * error(1)(apply, variables, tasks.held_out()))

    def kept(criteria):
        found = ca.find_plan(
            apply, variables, error(0), tasks.batches, groups=groups, budget=ca.params(0.4),
            criteria=criteria, search=ca.GradientSearch(steps=500), progress=False,
        )  # fmt: skip
        return [sum(units for _, units, _ in found.plan.counts[i : i + 3]) for i in (0, 3)]

    seen, unseen = kept([])
    assert unseen < 0.5 * seen
    seen, unseen = kept([bound])
    assert unseen > 0.8 * seen


def test_negative_losses_are_constrained_the_right_way():
    criterion = ca.at_most("x", lambda f, v, b: v, 1.0)
    value = constrained(lambda f, v, b: -2.0 + 0 * v, [criterion], 1)
    slope = jax.grad(lambda v: value(lambda v: v, v, None, weighing(1.0))[0])(3.0)
    assert slope > 0


def test_loss_and_criterion_may_call_under_other_transformations():
    def loss(f, v, batch, **flags):
        return jax.checkpoint(lambda: jnp.mean(f(v, batch, scale=2.0) ** 2))()

    criterion = ca.at_most("x", lambda f, v, b: jnp.mean(f(v, b, scale=2.0)), 0.1)
    value = constrained(loss, [criterion], 1)
    calls = []

    def f(v, batch, *, scale):
        calls.append(scale)
        return v * batch * scale

    slope = jax.grad(lambda v: value(f, v, jnp.ones(3), weighing(1.0))[0])(1.0)
    assert float(slope) == pytest.approx((8.0 + 2 * 4.0 * 2.0 / 1.9) / 3)


def run(method, variables, groups, budget=0.3):
    cost = parameter_cost(groups)
    problem = Problem(tasks.apply, tasks.loss, tasks.batches, groups, cost)
    search = method.build(problem)
    state = search.init(variables, budget, jax.random.key(0), 0)
    state, history = run_steps(
        search.step, state, search.steps, label="test", chunk=search.steps, progress=False
    )
    return search, state, history, cost


def test_gradient_search_ends_on_the_budget_and_trains(trained):
    variables, groups = trained
    search, state, history, cost = run(ca.GradientSearch(steps=200), variables, groups)
    counts = np.asarray(search.coefficients(state)) * groups.sizes
    assert float(cost(jnp.asarray(counts))) == pytest.approx(0.3 * cost.total, rel=1e-3)
    assert np.isfinite(history["loss"]).all()
    # The latent of this task is three-dimensional: one of its four units is all that may go.
    assert counts[1] > 2.5
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), variables, search.variables(state))
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("softened", [{"noise": 0.0, "edge": 2.0}, {"noise": 0.3, "edge": 0.0}])
def test_a_search_hardens_to_what_rounding_leaves(trained, softened):
    """Its last step's loss is that of hard gates on the budget: the edge is gone, and nothing is drawn."""
    variables, groups = trained
    cost = parameter_cost(groups)
    problem = Problem(tasks.apply, tasks.loss, tasks.batches, groups, cost)
    search = ca.GradientSearch(steps=1000, harden=0.5, **softened).build(problem)

    @jax.jit
    def away(index):
        """How far from the loss of hard gates the losses under three keys are."""
        counts = jnp.exp(on_budget(cost, jnp.zeros(3), 0.3))
        gates = soft_gates(groups, counts, ranks(groups, problem.score(groups, variables)), 0.0)
        hard = tasks.loss(tasks.apply, ca.apply_mask(groups, gates, variables), tasks.batches(index))
        states = [search.init(variables, 0.3, jax.random.key(seed), 0) for seed in range(3)]
        states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        _, info = jax.vmap(search.step, in_axes=(0, None))(states, index)
        return jnp.abs(info["loss"] / hard - 1)

    assert away(500).max() > 0.01
    assert away(999).max() < 0.001


def test_grid_search_finds_the_best_point_of_its_grid(trained):
    variables, groups = trained
    method = ca.GridSearch(levels=(0.5, 1.0, 2.0), steps_each=60, at_once=3)
    search, state, _, cost = run(method, variables, groups)
    assert np.isfinite(np.asarray(state.losses)).all()
    best = int(np.argmin(np.asarray(state.losses)))
    shares = np.asarray(search.coefficients(state))
    np.testing.assert_allclose(shares * groups.sizes, np.exp(state.log_counts[best]), rtol=1e-5)
    assert float(cost(jnp.exp(state.log_counts[best]))) == pytest.approx(0.3 * cost.total, rel=1e-3)
    # The grid holds points that cut the latent hard; they must not win.
    assert shares[1] * 4 > 2


@pytest.fixture
def one_group():
    """A model of one hidden layer, its variables and its groups."""

    def apply(v, x):
        return jnp.tanh(x @ v["a"]) @ v["b"]

    keys = jax.random.split(jax.random.key(0))
    variables = {"a": jax.random.normal(keys[0], (8, 6)), "b": jax.random.normal(keys[1], (6, 8))}
    return apply, variables, ca.find_groups(apply, variables, jnp.ones((1, 8)))


def test_grid_of_one_point(one_group):
    apply, _, groups = one_group
    problem = Problem(apply, tasks.loss, tasks.batches, groups, parameter_cost(groups))
    assert ca.GridSearch().build(problem).steps == 1


def test_a_point_of_the_grid_is_scored_beyond_its_fine_tune(one_group):
    """Tuned as `fit` does, criteria included, from the data position given; then come unseen batches."""
    apply, variables, groups = one_group
    criteria = (ca.at_most("size", lambda f, v, b: jnp.mean(f(v, b) ** 2), 1e-3),)
    problem = Problem(apply, tasks.penalized, tasks.batches, groups, parameter_cost(groups), criteria)
    search = ca.GridSearch(steps_each=20, learning_rate=1e-2, at_once=1, validate=2).build(problem)

    @jax.jit
    def found():
        state = search.init(variables, 0.5, jax.random.key(0), 7)
        return search.step(state, jnp.int32(0))[0].losses

    # The budget keeps three of six units.
    plan = ca.plan_units(groups, ranks(groups, problem.score(groups, variables)) < 3)
    small = ca.slim(apply, plan)
    tuned, _ = ca.fit(
        small, ca.shrink(variables, plan), tasks.penalized, lambda step: tasks.batches(step + 7), 20,
        learning_rate=1e-2, criteria=criteria, progress=False,
    )  # fmt: skip
    losses = [float(tasks.penalized(small, tuned, tasks.batches(7 + step))) for step in (20, 21)]
    np.testing.assert_allclose(found(), [np.mean(losses)], rtol=1e-3)


def test_search_is_one_program_for_many_budgets(trained):
    variables, groups = trained
    cost = parameter_cost(groups)
    problem = Problem(tasks.apply, tasks.loss, tasks.batches, groups, cost)
    search = ca.GradientSearch(steps=60).build(problem)
    budgets = jnp.array([0.2, 0.4, 0.8])
    state = jax.vmap(search.init, in_axes=(None, 0, None, None))(variables, budgets, jax.random.key(0), 0)
    state, _ = jax.lax.scan(jax.vmap(search.step, in_axes=(0, None)), state, jnp.arange(60))
    counts = jax.vmap(search.coefficients)(state) * groups.sizes
    reached = jax.vmap(cost)(counts) / cost.total
    np.testing.assert_allclose(reached, budgets, rtol=1e-3)


def test_shares_may_fall_below_a_unit_where_a_group_may_be_emptied(trained):
    _, groups = trained
    cost = parameter_cost(ca.constrain(groups, may_empty="*"))
    counts = jnp.exp(on_budget(cost, jnp.zeros(3), 0.08))
    assert (np.asarray(counts) < 1).any()
    assert float(cost(counts)) == pytest.approx(0.08 * cost.total, rel=1e-3)
    closed = parameter_cost(ca.constrain(groups, may_empty="*", ceiling={groups.groups[0].name: 0}))
    counts = np.exp(on_budget(closed, jnp.zeros(3), 0.3))
    assert np.isfinite(counts).all()
    assert counts[0] < 0.5


def test_grid_search_passes_over_what_diverges(trained):
    """A network that is not a number where its latent is whole."""
    variables, groups = trained

    def apply(v, x):
        latent = jnp.any(v["layer1"]["w"] != 0, axis=0).sum()
        return tasks.apply(v, x) + jnp.where(latent < 4, 0.0, jnp.nan)

    problem = Problem(apply, tasks.loss, tasks.batches, groups, parameter_cost(groups))
    found = ca.GridSearch(levels=(0.5, 2.0), steps_each=1).build(problem)
    state, info = found.step(found.init(variables, 0.5, jax.random.key(0), 0), jnp.int32(0))
    losses = np.asarray(state.losses)
    assert np.isposinf(losses).any()
    assert float(info["loss"]) == losses[np.isfinite(losses)].min()
    assert found.coefficients(state)[1] < 1


def test_grid_of_too_many_points_is_refused(trained):
    _, groups = trained
    problem = Problem(tasks.apply, tasks.loss, tasks.batches, groups, parameter_cost(groups))
    with pytest.raises(RequestError, match="1000 levels of 2 groups are 1,000,000 points"):
        ca.GridSearch(levels=tuple(np.linspace(0.1, 2, 1000).tolist())).build(problem)


def test_a_loss_of_zero_leaves_the_criteria(trained):
    """An application that is given by its criteria alone."""
    criterion = ca.at_most("x", lambda f, v, b: v, 1.0)
    value = constrained(lambda f, v, b: 0.0 * v, [criterion], 1)
    assert jax.grad(lambda v: value(lambda v: v, v, None, weighing(1.0))[0])(3.0) > 0


def test_weights_that_stay_as_they_are(trained):
    """Coefficients alone: the weights' learning rate is zero."""
    variables, groups = trained
    found = ca.find_plan(
        tasks.apply, variables, tasks.loss, tasks.batches, groups=groups, budget=ca.params(0.5),
        search=ca.GradientSearch(steps=20, learning_rate=0.0), progress=False,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
    assert found.coefficients.min() < 0.9
    with pytest.raises(RequestError, match="zero or above"):
        ca.GradientSearch(learning_rate=-1.0)
