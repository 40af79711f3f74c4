"""Requests that cannot be met, refused by `compress` and `sweep` before anything runs."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import compaware_jax as ca
from compaware_jax.errors import (
    BudgetError,
    CheckpointError,
    CriterionError,
    PlanError,
    RequestError,
    TraceError,
)
from tests import tasks


def test_bad_input(trained, tmp_path):
    variables, groups = trained
    with pytest.raises(BudgetError, match="smallest reachable"):
        tasks.compress(trained, budget=ca.params(0.001))
    with pytest.raises(CriterionError, match="expected a finite number"):
        ca.at_least("x", tasks.error, float("nan"))
    with pytest.raises(CriterionError, match="criteria need held_out"):
        tasks.compress(trained, held_out=None)
    with pytest.raises(TraceError, match=r"is nan, expected a finite number"):
        ca.compress(
            tasks.apply, variables, tasks.loss, lambda step: tasks.batches(step) * jnp.nan,
            groups=groups, budget=ca.params(0.5),
        )  # fmt: skip
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(PlanError, match="not finite"):
        tasks.compress((broken, groups))
    with pytest.raises(PlanError, match="not those that the groups were found for"):
        tasks.compress(({"layer0": variables["layer0"]}, groups))
    with pytest.raises(BudgetError, match=r"is 0.5, expected a Budget: params\(0.5\)"):
        # Without the annotations that tests check.
        inspect.unwrap(ca.compress)(
            tasks.apply, variables, tasks.loss, tasks.batches, groups=groups, budget=0.5
        )
    with pytest.raises(CriterionError, match=r"has shape \(64, 8\), expected a scalar"):
        tasks.compress(
            trained, criteria=[ca.at_most("x", lambda f, v, b: f(v, b), 1.0)], held_out=tasks.batches(0)
        )
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


def test_requests_that_cannot_work(trained):
    variables, _ = trained
    with pytest.raises(CriterionError, match="expected names of their own"):
        tasks.compress(trained, criteria=[tasks.BOUND, tasks.BOUND])

    def counting(v, x):
        return tasks.apply(v["w"], x) + 0 * v["count"]

    tree = {"w": variables, "count": jnp.int32(3)}
    counted = ca.find_groups(counting, tree, jnp.zeros((1, 8)))
    with pytest.raises(RequestError, match="no floating-point arrays"):
        ca.compress(counting, tree, tasks.loss, tasks.batches, groups=counted, budget=ca.params(0.5))
    linear = ca.find_groups(lambda v, x: x @ v, jnp.ones((8, 8)), jnp.zeros((1, 8)))
    with pytest.raises(PlanError, match="no group of this model can leave"):
        tasks.compress((jnp.ones((8, 8)), linear))


def test_sweep_refuses_what_compress_refuses(trained, tmp_path):
    run = partial(tasks.sweep, directory=tmp_path, criteria=[])
    run(trained)
    with pytest.raises(CheckpointError, match="another job"):
        run((jax.tree.map(lambda x: x + 1, trained[0]), trained[1]))
    with pytest.raises(CheckpointError, match="another job"):
        run(trained, search=ca.GradientSearch(steps=15), fine_tune=5)
    with pytest.raises(CheckpointError, match=r"another job.*key"):
        run(trained, key=jax.random.key(1))
    with pytest.raises(CriterionError, match="criteria need held_out"):
        run(trained, criteria=[tasks.BOUND], held_out=None)
