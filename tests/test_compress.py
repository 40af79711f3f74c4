"""The main job on a small problem: end to end, killed and resumed, and with bad input."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax.errors import (
    BudgetError,
    CheckpointError,
    CriterionError,
    DivergenceError,
    PlanError,
    RequestError,
    TraceError,
)
from tests import tasks

BOUND = ca.at_most("error", tasks.error, 0.25)


@pytest.fixture(scope="module")
def trained():
    variables = tasks.dense()
    return variables, tasks.groups(variables)


def compress(trained, **changes):
    variables, groups = trained
    settings = {
        "groups": groups,
        "budget": ca.params(0.5),
        "criteria": [BOUND],
        "held_out": tasks.held_out(),
        "search": tasks.SEARCH,
        "fine_tune": 200,
        "learning_rate": 1e-2,
        "progress": False,
    }
    return ca.compress(tasks.apply, variables, tasks.loss, tasks.batches, **(settings | changes))


def sweep(trained, **changes):
    variables, groups = trained
    settings = {
        "groups": groups,
        "budgets": [ca.params(0.5)],
        "criteria": [BOUND],
        "held_out": tasks.held_out(),
        "search": ca.GradientSearch(steps=10),
        "fine_tune": 10,
        "learning_rate": 1e-2,
        "progress": False,
    }
    return ca.sweep(tasks.apply, variables, tasks.loss, tasks.batches, **(settings | changes))


def test_end_to_end(trained):
    result = compress(trained)
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


def test_better_than_uniform_widths_at_a_small_budget(trained):
    """The latent must stay: uniform pruning halves it, the search does not."""
    result = compress(trained, criteria=[], budget=ca.params(0.4), fine_tune=300)
    counts = {name: kept for name, kept, _ in result.plan.counts}
    assert counts["layer1"] >= 3
    assert result.verdicts == ()


def test_criterion_that_cannot_be_kept_is_said_so(trained):
    strict = ca.at_most("error", tasks.error, float(_dense_error(trained)) * 1.001)
    result = compress(trained, criteria=[strict], budget=ca.params(0.2))
    assert not result.kept
    assert not result.verdicts[0].kept
    assert result.verdicts[0].after > strict.threshold


def _dense_error(trained):
    return tasks.error(tasks.apply, trained[0], tasks.held_out())


def test_grid_search_has_the_same_interface(trained):
    grid = ca.GridSearch(levels=(0.5, 1.0, 2.0), steps_each=30, at_once=3)
    result = compress(trained, search=grid, criteria=[])
    before, after = result.costs["parameters"]
    assert after <= 0.5 * before


@pytest.mark.parametrize("budget", [ca.flops(0.5), ca.nbytes(0.5)])
def test_other_costs(trained, budget):
    result = compress(trained, budget=budget, criteria=[], fine_tune=20)
    before, after = result.costs[budget.cost]
    assert 0.9 * 0.5 * before <= after <= 0.5 * before


def test_dense_model_that_fails_a_criterion(trained):
    bad = ca.at_most("error", tasks.error, 1e-6)
    with pytest.raises(CriterionError, match=r"already fails `error ≤ 1e-06` .*short by"):
        compress(trained, criteria=[bad])
    result = compress(trained, criteria=[bad], allow_failing=True, fine_tune=20)
    assert not result.kept


def test_bad_input(trained, tmp_path):
    variables, groups = trained
    with pytest.raises(BudgetError, match="smallest reachable"):
        compress(trained, budget=ca.params(0.001))
    with pytest.raises(CriterionError, match="expected a finite number"):
        ca.at_least("x", tasks.error, float("nan"))
    with pytest.raises(CriterionError, match="criteria need held_out"):
        compress(trained, held_out=None)
    with pytest.raises(TraceError, match=r"is nan, expected a finite number"):
        ca.compress(
            tasks.apply, variables, tasks.loss, lambda step: tasks.batches(step) * jnp.nan,
            groups=groups, budget=ca.params(0.5),
        )  # fmt: skip
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(PlanError, match="not finite"):
        compress((broken, groups))
    with pytest.raises(PlanError, match="not those that the groups were found for"):
        compress(({"layer0": variables["layer0"]}, groups))
    with pytest.raises(BudgetError, match=r"is 0.5, expected a Budget: params\(0.5\)"):
        # Without the annotations that tests check.
        inspect.unwrap(ca.compress)(
            tasks.apply, variables, tasks.loss, tasks.batches, groups=groups, budget=0.5
        )
    with pytest.raises(CriterionError, match=r"has shape \(64, 8\), expected a scalar"):
        compress(trained, criteria=[ca.at_most("x", lambda f, v, b: f(v, b), 1.0)], held_out=tasks.batches(0))
    with pytest.raises(TraceError, match="returned 3 values, expected a scalar"):
        ca.compress(
            tasks.apply, variables, lambda *args: (tasks.loss(*args), {}, 0), tasks.batches,
            groups=groups, budget=ca.params(0.5),
        )  # fmt: skip
    for message, changes in {
        "all on the same cost": {"budgets": [ca.params(0.5), ca.flops(0.5)]},
        "seeds=0, expected a whole number, 1 or more": {"budgets": [ca.params(0.5)], "seeds": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            ca.sweep(tasks.apply, variables, tasks.loss, tasks.batches, groups=groups, **changes)
    for wrong in ({"steps": 0}, {"ramp": -0.1}, {"harden": 2.0}, {"noise": float("nan")}, {"travel": -1.0}):
        with pytest.raises(RequestError, match=f"GradientSearch: .*{next(iter(wrong))}=.*expected"):
            ca.GradientSearch(**wrong)
    for wrong in (
        {"levels": ()},
        {"levels": (0.0, 1.0)},
        {"at_once": 0},
        {"validate": 0},
        {"steps_each": -1},
    ):
        with pytest.raises(RequestError, match=f"GridSearch: {next(iter(wrong))}=.*expected"):
            ca.GridSearch(**wrong)
    with pytest.raises(RequestError, match="expected a configured search"):
        inspect.unwrap(ca.sweep)(
            tasks.apply, variables, tasks.loss, tasks.batches, groups=groups, budgets=[ca.params(0.5)],
            search=ca.GradientSearch,
        )  # fmt: skip
    with pytest.raises(RequestError, match="fit: steps=-1, expected a whole number"):
        ca.fit(tasks.apply, variables, tasks.loss, tasks.batches, -1)


def test_foreign_and_corrupt_checkpoints(trained, tmp_path):
    compress(trained, directory=tmp_path, fine_tune=20)
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    contents = [p.read_bytes() for p in files]
    with pytest.raises(CheckpointError, match=r"another job.*budget"):
        compress(trained, directory=tmp_path, fine_tune=20, budget=ca.params(0.4))
    assert [p.read_bytes() for p in files] == contents
    latest = max((tmp_path / "search").iterdir(), key=lambda p: int(p.name))
    for path in latest.rglob("*"):
        if path.is_file() and "run" in path.parts:
            path.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        compress(trained, directory=tmp_path, fine_tune=20)


def test_sweep_refuses_what_compress_refuses(trained, tmp_path):
    run = partial(sweep, directory=tmp_path, criteria=[])
    run(trained)
    with pytest.raises(CheckpointError, match="another job"):
        run((jax.tree.map(lambda x: x + 1, trained[0]), trained[1]))
    with pytest.raises(CheckpointError, match="another job"):
        run(trained, search=ca.GradientSearch(steps=15), fine_tune=5)
    with pytest.raises(CheckpointError, match=r"another job.*key"):
        run(trained, key=jax.random.key(1))
    with pytest.raises(CriterionError, match="criteria need held_out"):
        run(trained, criteria=[BOUND], held_out=None)


def test_requests_that_cannot_work(trained):
    variables, _ = trained
    with pytest.raises(CriterionError, match="expected names of their own"):
        compress(trained, criteria=[BOUND, BOUND])

    def counting(v, x):
        return tasks.apply(v["w"], x) + 0 * v["count"]

    tree = {"w": variables, "count": jnp.int32(3)}
    counted = ca.find_groups(counting, tree, jnp.zeros((1, 8)))
    with pytest.raises(RequestError, match="no floating-point arrays"):
        ca.compress(counting, tree, tasks.loss, tasks.batches, groups=counted, budget=ca.params(0.5))
    linear = ca.find_groups(lambda v, x: x @ v, jnp.ones((8, 8)), jnp.zeros((1, 8)))
    with pytest.raises(PlanError, match="no group of this model can leave"):
        compress((jnp.ones((8, 8)), linear))


SCRIPT = """
import json, sys
from pathlib import Path
import compaware_jax as ca
from tests import tasks
from tests.test_compress import BOUND, compress
folder = Path(sys.argv[1])
variables = tasks.dense(100)
result = compress(
    (variables, tasks.groups(variables)), directory=folder / "checkpoints", allow_failing=True,
    search=ca.GradientSearch(steps=2000), fine_tune=2000,
)
result.plan.save(folder / "plan.json")
small = {k: {n: x.tolist() for n, x in v.items()} for k, v in result.variables.items()}
(folder / "metrics.json").write_text(json.dumps([small, [v.after for v in result.verdicts]]))
"""


def test_killed_and_started_again(tmp_path, environment):
    """kill -9 in the search and again in the fine-tune: the same files, bit for bit."""

    def start(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        # A kill may leave half a compiled program: nobody else is to read it.
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
        return folder, subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)],
            env=environment(Path(__file__).parents[1]) | compiled,
            stderr=subprocess.PIPE,
        )

    def finish(name):
        folder, process = start(name)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
        return (folder / "plan.json").read_bytes(), (folder / "metrics.json").read_bytes()

    for phase in ("search", "fine-tune"):
        folder, process = start("killed")
        deadline = time.monotonic() + 120
        # A finished checkpoint bears a plain number; one being written has a longer name.
        while not any(p.name.isdigit() for p in folder.glob(f"checkpoints/{phase}/*")):
            assert process.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (folder / "metrics.json").exists()
    killed = finish("killed")
    assert killed == finish("undisturbed")
    assert json.loads(killed[0])["format"] == "compaware_jax plan 1"


def test_sweep_is_what_compress_does(trained):
    budgets = [ca.params(b) for b in (0.3, 0.6)]
    points = sweep(trained, budgets=budgets, seeds=2, search=tasks.SEARCH, fine_tune=100)
    assert [(p.budget.fraction, p.seed) for p in points] == [(0.3, 0), (0.3, 1), (0.6, 0), (0.6, 1)]
    for point in points:
        total, cost = point.costs["parameters"]
        assert 0.9 * point.budget.fraction * total <= cost <= point.budget.fraction * total
        small_apply = ca.slim(tasks.apply, point.plan)
        got = float(tasks.error(small_apply, point.variables, tasks.held_out()))
        assert got == pytest.approx(point.verdicts[0].after, rel=1e-4)
        assert point.kept == point.verdicts[0].kept == (got <= 0.25)
    assert not np.array_equal(points[0].coefficients, points[1].coefficients)
    point, alone = points[0], compress(trained, budget=budgets[0], search=tasks.SEARCH, fine_tune=100)
    np.testing.assert_allclose(point.coefficients, alone.found.coefficients, rtol=1e-3)
    assert point.plan == alone.plan
    assert point.costs == alone.costs
    assert point.verdicts[0].before == alone.verdicts[0].before
    assert point.verdicts[0].after == pytest.approx(alone.verdicts[0].after, rel=1e-2)


def test_work_at_full_width_is_said(caplog):
    """A token that is zero still takes part in a softmax, so a removed one leaves it at full width."""
    rng = np.random.default_rng(0)
    shapes = {"tokens": (6, 8), "query": (8, 4), "key": (8, 4), "out": (8, 2)}
    variables = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def apply(v, x):
        tokens = jnp.concatenate([jnp.broadcast_to(v["tokens"], (len(x), 6, 8)), x], 1)
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
    assert "of the work still runs at full width" in caplog.text


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
    warning = "With it 75% of the FLOPs are left, above the budget."
    assert caplog.text.count(warning) == 1
    (point,) = ca.sweep(*model, budgets=[ca.flops(0.5)], **settings)
    assert point.costs == result.costs
    assert caplog.text.count(warning) == 2


def test_checkpoints_are_of_the_same_demands(trained, tmp_path):
    variables, groups = trained
    whole = ca.constrain(groups, whole=groups.groups[0].name)
    compress((variables, whole), directory=tmp_path, fine_tune=20)
    with pytest.raises(CheckpointError, match=r"another job.*groups"):
        compress(
            (variables, ca.constrain(groups, whole=groups.groups[2].name)), directory=tmp_path, fine_tune=20
        )
    compress((variables, whole), directory=tmp_path, fine_tune=20)


def test_checkpoints_are_of_the_same_score(trained, tmp_path):
    def worst(groups, variables):
        return -ca.importance.l2(groups, variables)

    scores = {"score": lambda groups, variables: ca.importance.l2(groups, variables)}
    compress(trained, directory=tmp_path, fine_tune=20, **scores)
    with pytest.raises(CheckpointError, match=r"another job.*score"):
        compress(trained, directory=tmp_path, fine_tune=20, score=lambda groups, v: worst(groups, v))
    compress(trained, directory=tmp_path, fine_tune=20, **scores)


def test_trainings_are_told_apart(trained, tmp_path):
    fit = partial(ca.fit, tasks.apply, trained[0], steps=5, directory=tmp_path, progress=False)
    fit(tasks.loss, tasks.batches)
    with pytest.raises(CheckpointError, match=r"another job.*'loss'"):
        fit(tasks.error, tasks.batches)
    with pytest.raises(CheckpointError, match=r"another job.*'data'"):
        fit(tasks.loss, lambda step: tasks.batches(step + 7))


def test_checkpoints_are_of_the_same_loss_and_data(trained, tmp_path):
    compress(trained, directory=tmp_path, fine_tune=20)

    def run(loss, batches):
        variables, groups = trained
        return ca.compress(
            tasks.apply, variables, loss, batches, groups=groups, budget=ca.params(0.5),
            search=tasks.SEARCH, fine_tune=20, criteria=[BOUND], held_out=tasks.held_out(),
            learning_rate=1e-2, directory=tmp_path, progress=False,
        )  # fmt: skip

    with pytest.raises(CheckpointError, match=r"another job.*loss"):
        run(lambda *args: 2 * tasks.loss(*args), tasks.batches)
    with pytest.raises(CheckpointError, match=r"another job.*data"):
        run(tasks.loss, lambda step: tasks.batches(step + 1))
    run(tasks.loss, tasks.batches)


def test_results_print_as_tables(trained):
    result = compress(trained, fine_tune=5)
    before, after = result.costs["parameters"]
    text = str(result)
    assert f"{before:,}" in text
    assert f"{after:,}" in text
    assert str(BOUND) in text
    assert all(name in text for name in result.found.groups.components)
    assert len(repr(result)) < 3000
    assert "3 groups" in repr(result.found.groups)


def test_training_that_diverges_is_an_error(trained):
    with pytest.raises(DivergenceError, match=r"fine-tune: .* not finite, in \['layer0/b'"):
        compress(trained, learning_rate=1e30, criteria=[])
    with pytest.raises(DivergenceError, match="search: "):
        compress(trained, search=ca.GradientSearch(steps=20, learning_rate=1e30), criteria=[])


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


def test_checkpoints_are_of_the_same_metric(trained, tmp_path):
    def run(metric):
        criterion = ca.at_most("error", metric, 10.0, trainable=False)
        compress(trained, directory=tmp_path, fine_tune=5, criteria=[criterion])

    run(tasks.error)
    with pytest.raises(CheckpointError, match=r"another job.*before"):
        run(lambda *args: 2 * tasks.error(*args))
    run(tasks.error)


def test_a_lane_that_diverges_leaves_the_others(trained, caplog):
    """The second seed meets a batch of values that are not finite; its criterion cannot tell."""

    def batches(step):
        return jnp.where(step >= 10 + 10, jnp.nan, tasks.batches(step))

    def blind(apply, variables, batch):
        return jnp.nan_to_num(tasks.error(apply, variables, batch), nan=0.0)

    variables, groups = trained
    fine, broken = ca.sweep(
        tasks.apply, variables, tasks.loss, batches, groups=groups, budgets=[ca.params(0.5)], seeds=2,
        criteria=[ca.at_most("error", blind, 10.0, trainable=False)], held_out=tasks.held_out(),
        search=ca.GradientSearch(steps=10), fine_tune=10, progress=False,
    )  # fmt: skip
    assert (fine.diverged, broken.diverged) == (False, True)
    assert "seed 1 of budget 0.5 ended in values that are not finite" in caplog.text
    assert (fine.kept, broken.kept) == (True, False)
    assert not broken.verdicts[0].kept
    total, left = fine.costs["parameters"]
    assert 0.45 * total < left <= 0.5 * total


def test_threshold_that_was_measured(trained):
    """A criterion may come from a measurement, which is an array."""
    measured = tasks.error(tasks.apply, trained[0], tasks.held_out())
    criterion = ca.at_most("error", tasks.error, 3 * measured)
    assert isinstance(criterion.threshold, float)
    compress(trained, criteria=[criterion], fine_tune=20)
    with pytest.raises(CriterionError, match="expected one number"):
        ca.at_most("error", tasks.error, jnp.ones(2))


def test_sweep_without_fine_tune_is_cut_all_the_same(trained):
    (point,) = sweep(trained, criteria=[], search=ca.GradientSearch(steps=50), fine_tune=0)
    total, cost = point.costs["parameters"]
    assert 0.45 * total < cost <= 0.5 * total
    assert sum(x.size for x in jax.tree.leaves(point.variables)) == cost


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
