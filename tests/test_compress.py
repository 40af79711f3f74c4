"""The main job on a small problem, end to end."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax import importance
from compaware_jax.cost import flop_cost
from compaware_jax.errors import (
    CriterionError,
    DivergenceError,
)
from compaware_jax.training.criteria import measure
from tests import tasks


def test_end_to_end(trained):
    result = tasks.compress(trained)
    before, after = result.costs["parameters"]
    assert 0.9 * 0.5 * before <= after <= 0.5 * before
    assert after == sum(x.size for x in jax.tree.leaves(result.variables))
    (verdict,) = result.verdicts
    batch = tasks.held_out()
    assert verdict.after == pytest.approx(float(tasks.error(result.apply, result.variables, batch)), rel=1e-5)
    assert verdict.before == pytest.approx(float(tasks.error(tasks.apply, trained[0], batch)), rel=1e-5)
    assert verdict.kept
    assert result.kept
    assert result.history["search"]["share"].shape[1:] == (3,)
    assert np.isfinite(result.history["fine-tune"]["loss"]).all()


def test_the_bottleneck_stays_at_a_small_budget(trained):
    """The latent must stay: uniform pruning halves it, the search does not."""
    result = tasks.compress(trained, criteria=[], budget=ca.params(0.4), fine_tune=300)
    counts = {name: kept for name, kept, _ in result.plan.counts}
    assert counts["layer1"] >= 3
    assert result.verdicts == ()


def test_criterion_that_cannot_be_kept_is_said_so(trained):
    strict = ca.at_most("error", tasks.error, float(_dense_error(trained)) * 1.001)
    result = tasks.compress(trained, criteria=[strict], budget=ca.params(0.2))
    assert not result.kept
    assert not result.verdicts[0].kept
    assert result.verdicts[0].after > strict.threshold


def _dense_error(trained):
    return tasks.error(tasks.apply, trained[0], tasks.held_out())


def test_grid_search_has_the_same_interface(trained):
    grid = ca.GridSearch(levels=(0.5, 1.0, 2.0), steps_each=30, at_once=3)
    result = tasks.compress(trained, search=grid, criteria=[])
    before, after = result.costs["parameters"]
    assert after <= 0.5 * before


@pytest.mark.parametrize("budget", [ca.flops(0.5), ca.nbytes(0.5)])
def test_other_costs(trained, budget):
    result = tasks.compress(trained, budget=budget, criteria=[], fine_tune=20)
    before, after = result.costs[budget.cost]
    assert 0.9 * 0.5 * before <= after <= 0.5 * before


def test_dense_model_that_fails_a_criterion(trained):
    bad = ca.at_most("error", tasks.error, 1e-6)
    with pytest.raises(CriterionError, match=r"already fails `error ≤ 1e-06` .*short by"):
        tasks.compress(trained, criteria=[bad])
    result = tasks.compress(trained, criteria=[bad], allow_failing=True, fine_tune=20)
    assert not result.kept


def test_work_beyond_the_plan_is_said(caplog):
    """A token that was removed still takes part in attention, by what a bias makes of it."""
    rng = np.random.default_rng(0)
    shapes = {"tokens": (6, 8), "bias": (8,), "query": (8, 4), "key": (8, 4), "out": (8, 2)}
    variables = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def apply(v, x):
        tokens = jnp.concatenate([jnp.broadcast_to(v["tokens"], (len(x), 6, 8)), x], 1) + v["bias"]
        scores = (tokens @ v["query"]) @ (tokens @ v["key"]).swapaxes(1, 2)
        return (jax.nn.softmax(scores) @ tokens)[:, 6:].mean(1) @ v["out"]

    x = jnp.asarray(rng.normal(size=(4, 3, 8)), jnp.float32)
    groups = ca.find_groups(apply, variables, x)
    result = ca.compress(
        apply,
        variables,
        lambda f, v, batch: jnp.mean(f(v, batch) ** 2),
        lambda step: x,
        groups=ca.constrain(groups, ceiling={"tokens": 3}),
        budget=ca.params(0.7),
        search=ca.GradientSearch(steps=5),
        fine_tune=2,
        progress=False,
    )
    assert "reduce_max" in "".join(equation.where for equation in result.uncut)
    planned = flop_cost(groups).exact(np.array([kept for _, kept, _ in result.plan.counts]))
    total, left = result.costs["flops"]
    assert planned < left <= total
    shares = 100 * left / total, 100 * planned / total
    assert "{:.1f} % of the FLOPs are left, by the plan's counts {:.1f} %".format(*shares) in caplog.text


def test_flops_that_run_at_full_width_are_counted(caplog):
    """A product with a backward pass of its own runs whole behind no zeros, and no budget hides that."""
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 16), "b": (16, 8)}
    variables = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda held, g: (jnp.clip(g @ held[1].T, -1, 1), held[0].T @ g)
    )

    def apply(v, x):
        return product(jax.nn.sigmoid(x @ v["a"]), v["b"])

    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    model = apply, variables, lambda f, v, batch: jnp.mean(f(v, batch) ** 2), lambda step: x
    settings = {
        "groups": ca.find_groups(apply, variables, x),
        "search": ca.GradientSearch(steps=5),
        "fine_tune": 2,
        "progress": False,
    }
    result = ca.compress(*model, budget=ca.flops(0.5), **settings)
    assert result.plan.counts == (("a", 8, 16),)
    assert result.costs["flops"] == (2 * 4 * 2 * 8 * 16, 2 * 4 * 8 * (8 + 16))
    warning = "75.0 % of the FLOPs are left, above the budget, by the plan's counts 50.0 %: `custom_vjp_call`"
    assert caplog.text.count(warning) == 1
    (point,) = ca.sweep(*model, budgets=[ca.flops(0.5)], **settings)
    assert point.costs == result.costs
    assert caplog.text.count(warning) == 2


def test_results_print_as_tables(trained):
    result = tasks.compress(trained, fine_tune=5)
    before, after = result.costs["parameters"]
    text = str(result)
    assert f"{before:,}" in text
    assert f"{after:,}" in text
    assert str(tasks.BOUND) in text
    assert all(name in text for name in result.found.groups.components)
    assert len(repr(result)) < 3000
    assert "3 groups" in repr(result.found.groups)


def test_training_that_diverges_is_an_error(trained):
    with pytest.raises(DivergenceError, match=r"fine-tune: .* not finite, in \['layer0/b'"):
        tasks.compress(trained, learning_rate=1e30, criteria=[])
    with pytest.raises(DivergenceError, match="search: "):
        tasks.compress(trained, search=ca.GradientSearch(steps=20, learning_rate=1e30), criteria=[])


def test_training_that_diverges_ends_there(trained):
    asked = []

    def loss(apply, variables, batch):
        jax.debug.callback(lambda x: asked.append(x), batch.sum(), ordered=True)
        return tasks.loss(apply, variables, batch)

    def batches(step):
        return jnp.where(step >= 150, jnp.nan, tasks.batches(step))

    with pytest.raises(DivergenceError, match="fit: "):
        ca.fit(tasks.apply, trained[0], loss, batches, 100_000, progress=False)
    assert 150 < len(asked) < 300


def test_complex_variables_go_downhill():
    """By a complex number, JAX's gradient is the conjugate of the direction that optimizers take."""

    def apply(v, x):
        return ((x @ v["a"]) * jnp.exp(1j * v["phase"])) @ v["b"]

    def drawn(key, *shape):
        return jax.random.normal(key, shape, jnp.complex64) / shape[0] ** 0.5

    keys = jax.random.split(jax.random.key(0), 3)
    variables = {"a": drawn(keys[0], 3, 8), "b": drawn(keys[1], 8, 2), "phase": jnp.linspace(0, 1, 8)}
    wanted = {"a": drawn(keys[2], 3, 8), **{name: variables[name] for name in ("b", "phase")}}

    def batches(step):
        return jax.random.normal(jax.random.fold_in(keys[0], step), (32, 3), jnp.complex64)

    def loss(f, v, batch):
        return (jnp.abs(f(v, batch) - apply(wanted, batch)) ** 2).mean()

    trained, history = ca.fit(apply, variables, loss, batches, 600, learning_rate=1e-2, progress=False)
    assert history["loss"][-1] < 1e-3 * history["loss"][0]
    groups = ca.find_groups(apply, trained, batches(0), boundary=True)
    result = ca.compress(
        apply, trained, loss, batches, groups=groups, budget=ca.params(0.7), fine_tune=300,
        search=tasks.SEARCH, progress=False,
    )  # fmt: skip
    for phase in ("search", "fine-tune"):
        losses = result.history[phase]["loss"]
        assert losses[-1] < 0.5 * losses[0]
    assert result.variables["a"].dtype == jnp.complex64


def test_a_threshold_is_as_exact_as_its_metric():
    """In float32 a tenth is more than 0.1."""

    def misses(apply, variables, batch):
        return (jnp.arange(10) == 9).mean()

    at_most, at_least = (make("misses", misses, 0.1) for make in (ca.at_most, ca.at_least))
    measured = float(misses(None, None, None))
    assert measured > 0.1
    assert at_most.keeps(measured)
    assert measure([at_most], tasks.apply, None, None)["misses"] == 0.1
    assert at_least.keeps(measured)
    assert not at_most.keeps(float("nan"))
    assert not at_most.keeps(0.100001)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_metric_of_less_than_the_default_precision(dtype, x64):
    def share(apply, variables, batch):
        return (jnp.arange(10) == 9).mean(dtype=dtype)

    for make in (ca.at_most, ca.at_least):
        criterion = make("share", share, 0.1)
        read = measure([criterion], tasks.apply, None, None)["share"]
        assert read == 0.1
        assert criterion.keeps(read)
    above = ca.at_most("share", share, 0.099)
    assert not above.keeps(measure([above], tasks.apply, None, None)["share"])
    for threshold, metric, make in ((7e4, jnp.inf, ca.at_most), (1e-9, 0.0, ca.at_least)):
        far = make("far", lambda *_, metric=metric: jnp.float16(metric), threshold)
        assert not far.keeps(measure([far], tasks.apply, None, None)["far"])
    whole = ca.at_least("count", lambda *_: jnp.int32(0), 0.5)
    assert not whole.keeps(measure([whole], tasks.apply, None, None)["count"])


def test_threshold_that_was_measured(trained):
    """A criterion may come from a measurement, which is an array."""
    measured = tasks.error(tasks.apply, trained[0], tasks.held_out())
    criterion = ca.at_most("error", tasks.error, 3 * measured)
    assert isinstance(criterion.threshold, float)
    tasks.compress(trained, criteria=[criterion], fine_tune=20)
    with pytest.raises(CriterionError, match="expected one number"):
        ca.at_most("error", tasks.error, jnp.ones(2))


def test_counts_may_be_of_numpy(trained, tmp_path):
    """A checkpoint says what it is of in JSON, which knows no numpy."""
    variables, groups = trained
    task = tasks.apply, variables, tasks.loss, tasks.batches
    settings = {
        "groups": groups,
        "search": ca.GradientSearch(steps=5),
        "fine_tune": np.int64(5),
        "progress": False,
    }
    inspect.unwrap(ca.compress)(*task, budget=ca.params(0.5), directory=tmp_path / "one", **settings)
    inspect.unwrap(ca.sweep)(
        *task, budgets=[ca.params(0.5)], seeds=np.int64(1), directory=tmp_path / "many", **settings
    )


def test_a_search_without_a_best_point_is_an_error(trained):
    def batches(step):
        return jnp.where(step >= 1, jnp.nan, tasks.batches(step))

    variables, groups = trained
    with pytest.raises(DivergenceError, match=r"search: .*\['coefficients'\]"):
        ca.compress(
            tasks.apply, variables, tasks.loss, batches, groups=groups, budget=ca.params(0.5),
            search=ca.GridSearch(levels=(0.5, 1.0), steps_each=1), progress=False,
        )  # fmt: skip


def test_the_search_beats_equal_shares(trained):
    """The latent has just what the surface needs: equal shares give half of it up, the search none of it."""
    variables, groups = trained
    budget, same = ca.params(0.4), {"learning_rate": 1e-2, "progress": False}
    found = tasks.compress(trained, budget=budget, search=ca.GradientSearch(steps=300), fine_tune=300)
    plan = ca.one_shot(groups, importance.l2(groups, variables), budget)
    small_apply, start = ca.slim(tasks.apply, plan), ca.shrink(variables, plan)
    equal, _ = ca.fit(small_apply, start, tasks.loss, tasks.batches, 300, **same)
    assert [kept for _, kept, _ in plan.counts][1] == 2
    assert [kept for _, kept, _ in found.plan.counts][1] == 4
    ours = tasks.error(found.apply, found.variables, tasks.held_out())
    assert ours < 0.6 * tasks.error(small_apply, equal, tasks.held_out())


def test_the_history_of_criteria(trained):
    """In the metric's unit, on batches; those that are judged alone have none."""
    judged = ca.at_most("judged", tasks.error, 1.0, trainable=False)
    below = ca.at_least("size", lambda f, v, b: -jnp.mean(f(v, b) ** 2), -1.0)
    result = tasks.compress(trained, criteria=[judged, tasks.BOUND, below], fine_tune=200)
    for phase, history in result.history.items():
        assert history["criteria"].shape == (len(history["loss"]), 2), phase
    error, size = result.history["fine-tune"]["criteria"][-1]
    assert error == pytest.approx(
        float(tasks.error(result.apply, result.variables, tasks.held_out())), rel=0.1
    )
    output = result.apply(result.variables, tasks.held_out())
    assert size == pytest.approx(-float(jnp.mean(output**2)), rel=0.1)
    assert "criteria" not in tasks.compress(trained, criteria=[judged], fine_tune=1).history["search"]
