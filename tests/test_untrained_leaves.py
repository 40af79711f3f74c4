"""Variables that no gradient trains, integers, flags and keys, are cut and carried along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax import importance
from compaware_jax.errors import RequestError
from compaware_jax.law import law_errors
from compaware_jax.training.objective import updated

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(256, 8)), jnp.float32)
HIDDEN = 24
SEARCH = ca.GradientSearch(steps=20)


def quantised(rows, columns):
    weights = RNG.normal(size=(rows, columns)) / np.sqrt(rows)
    scale = np.abs(weights).max(0) / 127
    return {"q": jnp.asarray(np.round(weights / scale), jnp.int8), "scale": jnp.asarray(scale, jnp.float32)}


def dense(layer, x):
    return (x @ layer["q"].astype(x.dtype)) * layer["scale"]


def apply(v, x):
    hidden = jnp.where(v["alive"], jnp.tanh(dense(v["first"], x) + v["bias"]), 0)
    return dense(v["last"], hidden)


def loss(apply, v, batch):
    key, drawn = jax.random.split(v["key"])
    seen = batch + 0.01 * jax.random.normal(drawn, batch.shape)
    # The flags come back as they were seen, masked in a search.
    return jnp.mean((apply(v, seen) - batch) ** 2), {
        "count": v["count"] + 1,
        "key": key,
        "alive": v["alive"],
    }


def batches(step):
    return X[jax.random.randint(jax.random.fold_in(jax.random.key(0), step), (32,), 0, len(X))]


@pytest.fixture
def variables():
    return {
        "first": quantised(8, HIDDEN),
        "bias": jnp.zeros(HIDDEN),
        "alive": jnp.asarray(RNG.random(HIDDEN) < 0.9),
        "last": quantised(HIDDEN, 8),
        "count": jnp.int32(0),
        "key": jax.random.key(3),
    }


def same(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return a.dtype == b.dtype and np.array_equal(a, b)


def test_fit_trains_the_floats(variables, tmp_path):
    fitted, history = ca.fit(apply, variables, loss, batches, 200, directory=tmp_path, progress=False)
    assert history["loss"][-1] < history["loss"][0]
    assert not same(fitted["first"]["scale"], variables["first"]["scale"])
    assert not same(fitted["bias"], variables["bias"])
    for untouched in (lambda v: v["first"]["q"], lambda v: v["last"]["q"], lambda v: v["alive"]):
        assert same(untouched(fitted), untouched(variables))
    key = variables["key"]
    for _ in range(200):
        key, _ = jax.random.split(key)
    assert fitted["count"] == 200
    assert same(fitted["key"], key)
    # All of it is in the checkpoint.
    again, _ = ca.fit(apply, variables, loss, batches, 200, directory=tmp_path, progress=False)
    assert all(map(same, jax.tree.leaves(fitted), jax.tree.leaves(again)))


@pytest.mark.parametrize("search", [SEARCH, ca.GridSearch(steps_each=3, at_once=1)])
def test_compress_cuts_them(variables, search):
    groups = ca.find_groups(apply, variables, X[:1])
    (group,) = groups.groups
    assert {path for path, _, _ in group.axes} == {"alive", "bias", "first/q", "first/scale", "last/q"}
    result = ca.compress(
        apply, variables, loss, batches, groups=groups, budget=ca.nbytes(0.5), search=search, fine_tune=10,
        progress=False,
    )  # fmt: skip
    small, plan = result.variables, result.plan
    kept = plan.small_shape(groups.leaves.index(next(x for x in groups.leaves if x.path == "bias")))[0]
    assert 1 < kept < HIDDEN
    assert same(small["first"]["q"], ca.shrink(variables, plan)["first"]["q"])
    assert same(small["last"]["q"], ca.shrink(variables, plan)["last"]["q"])
    assert same(small["alive"], ca.shrink(variables, plan)["alive"])
    # Steps of 20 and 10, or the fine-tune's alone: a grid hands over what it was given.
    assert small["count"] == (30 if search is SEARCH else 10)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(small))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(variables))
    assert size <= 0.5 * held
    assert result.costs["bytes"] == (held, size)


def test_what_a_search_masked_is_not_taken_for_new():
    """A loss sees the second unit closed, and changes the last one."""
    given = {"flags": jnp.array([True, True, True]), "counts": jnp.array([5, 6, 7])}
    seen = {"flags": jnp.array([True, False, True]), "counts": jnp.array([5, 0, 7])}
    news = {"flags": jnp.array([True, False, False]), "counts": jnp.array([5, 0, 8])}
    after = updated(given, news, seen)
    assert after["flags"].tolist() == [True, True, False]
    assert after["counts"].tolist() == [5, 6, 8]


def test_updates_are_taken_as_they_are():
    """A running minimum starts far off: a difference from there would lose it."""
    given, news = {"least": jnp.float32(1e10)}, {"least": jnp.float32(0.9)}
    assert updated(given, news, given)["least"] == news["least"]


def test_law(variables, x64):
    wide = jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, variables)
    groups = ca.find_groups(apply, wide, X.astype(float))
    keep = RNG.random(groups.units) < 0.5
    assert max(law_errors(apply, wide, X.astype(float), keep=keep, groups=groups)) <= 1e-12


def test_sweep_carries_them(variables):
    groups = ca.find_groups(apply, variables, X[:1])
    front = ca.sweep(
        apply, variables, loss, batches, groups=groups, budgets=[ca.nbytes(0.6), ca.nbytes(0.3)],
        search=SEARCH, fine_tune=10, progress=False,
    )  # fmt: skip
    for point in front:
        assert point.variables["count"] == 30
        assert same(point.variables["last"]["q"], ca.shrink(variables, point.plan)["last"]["q"])


def test_integers_alone_pay_last(variables):
    """At the boundary, where int8 kernels read and write, no gradient tells what a search may let go."""
    groups = ca.find_groups(apply, variables, X[:1], boundary=True)
    assert [group.axes for group in groups.groups if group.boundary] == [
        (("first/q", 0, 1),),
        (("last/q", 1, 1),),
    ]
    assert groups.trained.tolist() == [not group.boundary for group in groups.groups]
    for budget, whole in ((0.5, True), (0.1, False)):
        result = ca.compress(
            apply, variables, loss, batches, groups=groups, budget=ca.nbytes(budget), search=SEARCH,
            fine_tune=0, progress=False,
        )  # fmt: skip
        read, written = result.variables["first"]["q"].shape[0], result.variables["last"]["q"].shape[1]
        assert (read == written == 8) is whole


def test_gradients_of_integers_are_not_looked_at(variables):
    groups = ca.find_groups(apply, variables, X[:1])

    def value(v):
        return loss(apply, v, X)[0]

    gradients = jax.grad(value, allow_int=True)(variables)
    slopes = importance.gate_gradients(groups, variables, gradients)
    by_hand = (variables["first"]["scale"] * gradients["first"]["scale"]) + (
        variables["bias"] * gradients["bias"]
    )
    np.testing.assert_allclose(slopes, by_hand, rtol=1e-5)
    evidence = importance.observe(importance.no_evidence(groups), groups, variables, gradients, smoothing=1.0)
    np.testing.assert_allclose(
        evidence.norm, np.hypot(gradients["first"]["scale"], gradients["bias"]), rtol=1e-5
    )
    assert np.isfinite(importance.taylor2(groups, value, variables)).all()


def test_sums_over_trees_of_flags(variables):
    """What counts is told by the variables, not by what is summed over their places."""
    groups = ca.find_groups(apply, variables, X[:1])
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables)
    flags = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), variables)
    np.testing.assert_array_equal(importance.unit_sum(groups, flags), importance.unit_sum(groups, ones))
    assert (np.asarray(importance.unit_sum(groups, ones)) > 0).all()


@pytest.mark.parametrize("score", [importance.l1, importance.l2, importance.lamp, importance.fpgm])
def test_magnitudes_are_of_weights(variables, score):
    """Codes, counters and flags rank nothing beside floats, and only where there is nothing else."""
    counted = variables | {"seen": jnp.arange(HIDDEN) * 1000, "code": jnp.ones((HIDDEN, 3), jnp.int4)}

    def reads_all(v, x):
        hidden = jnp.where(v["seen"] >= 0, dense(v["first"], x) + v["bias"], 0) * v["alive"]
        return jnp.concatenate([dense(v["last"], hidden), hidden @ v["code"].astype(x.dtype)], 1)

    groups = ca.find_groups(reads_all, counted, X[:1])
    assert {path for path, *_ in groups.groups[0].axes} >= {"seen", "code", "first/q", "last/q"}
    floats = {"scale": counted["first"]["scale"], "bias": counted["bias"]}
    alone = ca.find_groups(lambda v, x: (x[:, :1] * v["scale"] + v["bias"]).sum(1), floats, X[:1])
    np.testing.assert_allclose(score(groups, counted), score(alone, floats), rtol=1e-5)
    at_boundary = ca.find_groups(reads_all, counted, X[:1], boundary=True)
    read = next(group for group in at_boundary.groups if group.axes == (("first/q", 0, 1),))
    assert (np.asarray(score(at_boundary, counted))[read.slice] > 0).all()


def test_what_is_refused(variables):
    def summed(v, x):
        return x @ v["first"]["q"].astype(x.dtype)

    integers = {"first": {"q": variables["first"]["q"]}}
    with pytest.raises(RequestError, match=r"no floating-point array.*first/q \(int8\).*by a scale"):
        ca.fit(summed, integers, lambda apply, v, b: apply(v, b).mean(), batches, 1)
