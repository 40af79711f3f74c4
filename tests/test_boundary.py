"""What is read of inputs and written of outputs: what the application does not need goes first."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax.cost import parameter_cost
from compaware_jax.search.boundary import trim
from compaware_jax.search.coefficients import Problem
from tests import tasks

LIVE, DEAD = 8, 6


def batches(step):
    """Points, with features that are always the same: the model learns to write them."""
    x = tasks.batches(step)
    return jnp.concatenate([x, jnp.full((len(x), DEAD), 0.2)], -1)


@pytest.fixture(scope="module")
def problem():
    sizes = (LIVE + DEAD, 16, 4, 16, LIVE + DEAD)
    keys = jax.random.split(jax.random.key(0), 4)
    start = {
        f"layer{i + 1}": {"w": jax.random.normal(keys[i], (a, b)) / jnp.sqrt(a), "b": jnp.zeros(b)}
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }

    def apply(variables, x):
        for name in sorted(variables):
            x = x @ variables[name]["w"] + variables[name]["b"]
            x = x if name == "layer4" else jnp.tanh(x)
        return x

    variables, _ = ca.fit(apply, start, tasks.loss, batches, 600, learning_rate=1e-2, progress=False)
    groups = ca.find_groups(apply, variables, batches(0), boundary=True)
    return Problem(apply, tasks.loss, batches, groups, parameter_cost(groups)), variables


def test_what_the_loss_does_not_notice_leaves_first(problem):
    problem, variables = problem
    groups = problem.groups
    assert [g.units for g in groups.groups if g.boundary] == [LIVE + DEAD, LIVE + DEAD]
    assert "boundary" in str(groups)
    trimmed, start = trim(problem, variables, [problem.cost.total], share=0.002)
    reads, *_, writes = trimmed.groups.groups
    floors, ceilings = trimmed.groups.floors, trimmed.groups.ceilings
    np.testing.assert_array_equal(floors[[0, -1]], ceilings[[0, -1]])
    assert floors[-1] == LIVE
    np.testing.assert_array_equal(floors[1:-1], groups.floors[1:-1])
    # The score ranks what stays first, whatever the weights are.
    larger = jax.tree.map(lambda x: 100 * x, start)
    scores = np.asarray(trimmed.score(trimmed.groups, larger))
    best = np.argsort(-scores[writes.slice])[: floors[-1]]
    assert (best < LIVE).all()
    # Without the columns of the constants, the bias gives them.
    keep = np.ones(groups.units, bool)
    keep[writes.slice] = np.isin(np.arange(writes.units), best)
    cut, all_of_it = keep.astype(float), np.ones(groups.units)
    whole, before, after = (
        float(tasks.loss(problem.apply, ca.apply_mask(groups, gates, v), batches(1000)))
        for gates, v in ((all_of_it, variables), (cut, variables), (cut, start))
    )
    assert after - whole < 0.3 * (before - whole)
    assert reads.axes == (("layer1/w", 0, 1),)


def test_everything_else_is_left_as_it_is(problem):
    problem, variables = problem
    _, start = trim(problem, variables, [problem.cost.total], share=0.002)
    for path, (new, old) in zip(
        (leaf.path for leaf in problem.groups.leaves),
        zip(jax.tree.leaves(start), jax.tree.leaves(variables), strict=True),
        strict=True,
    ):
        assert np.array_equal(new, old) == (path != "layer4/b"), path
    channels = ca.find_groups(problem.apply, variables, batches(0))
    same = Problem(problem.apply, tasks.loss, batches, channels, parameter_cost(channels))
    assert trim(same, variables, [100]) == (same, variables)


def test_complex_leaves_take_over_too(problem):
    """The bias turned in the complex plane: what the columns gave becomes its, as if it were real."""
    problem, variables = problem
    turn = 0.6 + 0.8j

    def with_bias(variables, change):
        last = variables["layer4"]
        return {**variables, "layer4": {**last, "b": change(last["b"])}}

    def apply(variables, x):
        return problem.apply(with_bias(variables, lambda b: (b * turn).real), x)

    given = with_bias(variables, lambda b: b / turn)
    groups = ca.find_groups(apply, given, batches(0), boundary=True)
    turned = Problem(apply, tasks.loss, batches, groups, parameter_cost(groups))
    (_, expected), (_, start) = (
        trim(p, v, [p.cost.total], share=0.002) for p, v in ((problem, variables), (turned, given))
    )
    moved = expected["layer4"]["b"] - variables["layer4"]["b"]
    assert np.abs(moved).max() > 0.05
    got = (start["layer4"]["b"] * turn).real - variables["layer4"]["b"]
    np.testing.assert_allclose(got, moved, atol=1e-4)


def test_what_the_loss_renews_is_not_trained(problem):
    """A running average beside the bias would take over what the columns gave, had it a gradient."""
    problem, variables = problem
    variables = {**variables, "average": jnp.zeros(LIVE + DEAD)}

    def apply(variables, x):
        layers = {name: layer for name, layer in variables.items() if name != "average"}
        return problem.apply(layers, x) + variables["average"]

    def loss(apply, variables, batch):
        return tasks.loss(apply, variables, batch), {"average": variables["average"]}

    groups = ca.find_groups(apply, variables, batches(0), boundary=True)
    asked = Problem(apply, loss, batches, groups, parameter_cost(groups))
    _, start = trim(asked, variables, [asked.cost.total], share=0.002)
    np.testing.assert_array_equal(start["average"], variables["average"])
    assert np.abs(start["layer4"]["b"] - variables["layer4"]["b"]).max() > 0.05


def test_a_limit_of_nothing(one_layer):
    """Where everything may be emptied, nothing at all may be asked for."""
    problem, variables = one_layer
    assert problem.cost.floor == 0
    trimmed, _ = trim(problem, variables, [0], steps=2, calibration=1)
    assert trimmed is problem


@pytest.fixture
def one_layer():
    def apply(v, x):
        return x @ v["w"]

    variables = {"w": jnp.ones((8, 8)) / 8}
    groups = ca.constrain(ca.find_groups(apply, variables, batches(0)[:, :8], boundary=True), may_empty="*")
    return Problem(apply, tasks.loss, tasks.batches, groups, parameter_cost(groups)), variables


def information(problem, variables, steps):
    """Per row of the first kernel and column of the last half the mean square of its gate's slope."""

    def gradients(step):
        return jax.grad(lambda v: tasks.loss(problem.apply, v, batches(step)))(variables)

    found = jax.jit(jax.vmap(gradients))(jnp.arange(steps))
    slopes = [
        np.sum(np.asarray(variables[name]["w"] * found[name]["w"]), axis)
        for name, axis in (("layer1", 2), ("layer4", 1))
    ]
    return [np.mean(per_step**2, 0) / 2 for per_step in slopes]


@pytest.mark.parametrize(
    ("demands", "share", "clamped"),
    [
        ({}, 0.2, {}),
        ({}, 9.0, {}),
        ({"floor": 13}, 0.2, {0: 13, -1: 13}),
        ({"ceiling": 2}, 0.01, {0: 2, -1: 2}),
        ({"multiple_of": 5}, 0.001, {0: 14, -1: 10}),
    ],
)
def test_how_many_stay(problem, demands, share, clamped):
    """All but a share of what the loss says, of which at most a half; and within what is demanded."""
    problem, variables = problem
    first, *_, last = problem.groups.groups
    demands = {name: {first.name: n, last.name: n} for name, n in demands.items()}
    groups = ca.constrain(problem.groups, **demands)
    asked = Problem(problem.apply, tasks.loss, batches, groups, parameter_cost(groups))
    trimmed, start = trim(asked, variables, [asked.cost.total], share=share, steps=3, calibration=1)
    scores = np.asarray(trimmed.score(trimmed.groups, start))
    for at, expected in zip((0, -1), information(problem, variables, 3), strict=True):
        group = groups.groups[at]
        np.testing.assert_allclose(scores[group.slice], expected, rtol=1e-3, atol=1e-12)
        held = [np.sort(expected)[-n:].sum() / expected.sum() for n in range(1, group.units + 1)]
        needed = 1 + int(np.sum(np.array(held) < 1 - min(share, 0.5)))
        assert trimmed.groups.floors[at] == trimmed.groups.ceilings[at] == clamped.get(at, needed)


def test_a_budget_below_what_stays_is_left_to_the_search(problem):
    problem, variables = problem
    assert trim(problem, variables, [problem.cost.floor])[0] is problem


def test_compress_and_sweep_trim(problem):
    problem, variables = problem
    settings = {"groups": problem.groups, "search": tasks.SEARCH, "fine_tune": 100, "progress": False}
    result = ca.compress(problem.apply, variables, tasks.loss, batches, budget=ca.params(0.4), **settings)
    kept = result.plan.kept[-1][1]  # The columns of the last kernel.
    assert kept is not None
    assert max(kept) < LIVE
    assert result.costs["parameters"][1] <= 0.4 * result.costs["parameters"][0]
    assert result.apply(result.variables, batches(0)).shape == batches(0).shape
    (point,) = ca.sweep(problem.apply, variables, tasks.loss, batches, budgets=[ca.params(0.4)], **settings)
    assert point.plan.kept[-1] == result.plan.kept[-1]


SINGULAR = {
    "std": lambda y: jnp.std(y, axis=0),
    "root of the absolute": lambda y: jnp.sqrt(jnp.abs(y)),
    "reciprocal": lambda y: 1 / y,
    "columns of length one": lambda y: y / jnp.linalg.norm(y, axis=0),
}


@pytest.mark.parametrize("head", SINGULAR)
def test_an_output_that_is_singular_at_zero_is_written(head):
    """Without its column it would be zero, where its gradient is not finite."""

    def apply(v, x):
        return SINGULAR[head](jnp.tanh(x @ v["a"]) @ v["b"])

    variables = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    groups = ca.find_groups(apply, variables, jnp.ones((5, 3)), boundary=True)
    assert [g.axes for g in groups.groups if g.boundary] == [(("a", 0, 1),)]
    assert "singular at zero" in next(axis.reason for axis in groups.fixed if axis.path == "b")


def test_an_output_squared_need_not_be_written():
    def apply(v, x):
        return jnp.sqrt((x @ v["a"]) ** 2 + 1.0)

    groups = ca.find_groups(apply, {"a": jnp.ones((3, 4))}, jnp.ones((5, 3)), boundary=True)
    assert [g.axes for g in groups.groups] == [(("a", 0, 1),), (("a", 1, 1),)]
