"""Requests that cannot be met, refused by `compress` and `sweep` before anything runs."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
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
    with pytest.raises(CriterionError, match="expected names of their own"):
        tasks.compress(trained, criteria=[tasks.BOUND, tasks.BOUND])

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


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (
            TraceError,
            r"the loss fails \(TypeError.*called as loss\(apply, variables, batch\)",
            {"loss": lambda f, v: 0.0},
        ),
        (
            TraceError,
            "the loss fails .*compiled: numpy and float",
            {"loss": lambda *a: float(tasks.loss(*a))},
        ),
        (PlanError, r"score .* fails \(TypeError.*score\(groups, variables\)", {"score": lambda groups: 1}),
        (RequestError, "directory=5, expected the path of a folder", {"directory": 5}),
        (CheckpointError, "is a file, expected a folder", {"directory": __file__}),
        (CriterionError, "held_out has an array without elements", {"held_out": jnp.zeros((0, 8))}),
        (
            RequestError,
            r"batches\(0\) gives another batch each time",
            {
                "batches": lambda step: jax.pure_callback(
                    lambda step: np.random.rand(64, 8).astype(np.float32),
                    jax.ShapeDtypeStruct((64, 8), jnp.float32),
                    step,
                )
            },
        ),
    ],
)
def test_functions_and_folders_that_do_not_fit(trained, error, message, changes):
    variables, groups = trained
    asked = {
        "loss": tasks.loss,
        "batches": tasks.batches,
        "criteria": [tasks.BOUND],
        "held_out": tasks.held_out(),
    }
    asked |= changes
    with pytest.raises(error, match=message):
        inspect.unwrap(ca.compress)(
            tasks.apply, variables, asked.pop("loss"), asked.pop("batches"), groups=groups,
            budget=ca.params(0.5), search=ca.GradientSearch(steps=2), fine_tune=1, **asked,
        )  # fmt: skip


def hits(f, variables, batch):
    return jnp.mean(jnp.abs(f(variables, batch) - batch) < 0.1)


def through_numpy(f, variables, batch):
    value = tasks.error(f, variables, batch)
    return jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct((), jnp.float32), value)


@pytest.mark.parametrize("metric", [hits, through_numpy])
def test_criteria_without_a_gradient(trained, metric):
    """No training would keep them; they may be judged all the same."""
    with pytest.raises(CriterionError, match=f"`{metric.__name__}` has no gradient.*trainable=False"):
        tasks.compress(trained, criteria=[ca.at_most(metric.__name__, metric, 0.9)])
    judged = ca.at_most(metric.__name__, metric, 0.9, trainable=False)
    assert tasks.compress(trained, criteria=[judged], fine_tune=1).verdicts[0].criterion == f"{judged}"


def test_linear_criteria_have_a_gradient(trained):
    """It is the same at all variables, and not zero."""

    def size(f, variables, batch):
        return variables["layer0"]["b"].sum()

    bound = ca.at_most("size", size, 1e3)
    assert tasks.compress(trained, criteria=[bound], fine_tune=1).kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((tasks.error, "error", 0.2), "expected a string and a function .* in this order"),
        (("error", 0.2, tasks.error), "the name is 'error' and the metric 0.2, expected a string and a func"),
        (("error", tasks.error, "0.2"), "the threshold is '0.2', expected one number"),
        (("error", tasks.error, 0.2j), "expected one number"),
    ],
)
def test_arguments_of_criteria(arguments, message):
    with pytest.raises(CriterionError, match=message):
        inspect.unwrap(ca.at_least)(*arguments)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_variables_of_few_bits_are_not_trained(trained, dtype):
    """Adam divides by zero in float16; in bfloat16 its small steps round to none."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), trained[0])
    match = rf"layer0/b \({dtype.__name__}\).* have too few bits .*expected float32"
    with pytest.raises(RequestError, match=match):
        tasks.compress((narrow, tasks.groups(narrow)))
    with pytest.raises(RequestError, match=match):
        ca.fit(tasks.apply, narrow, tasks.loss, tasks.batches, 1)


def test_frozen_variables_may_have_few_bits():
    """No step of theirs is lost."""

    def apply(v, x):
        return jnp.tanh(x @ jax.lax.stop_gradient(v["base"]).astype(x.dtype)) @ v["head"]

    keys = jax.random.split(jax.random.key(0))
    variables = {
        "base": jax.random.normal(keys[0], (8, 16), jnp.bfloat16),
        "head": jax.random.normal(keys[1], (16, 8)),
    }
    groups = ca.find_groups(apply, variables, jnp.zeros((1, 8)))
    result = ca.compress(
        apply, variables, tasks.loss, tasks.batches, groups=groups, budget=ca.params(0.5), fine_tune=2,
        search=ca.GradientSearch(steps=2), progress=False,
    )  # fmt: skip
    assert (result.variables["base"].shape, result.variables["base"].dtype) == ((8, 8), jnp.bfloat16)


def test_messages_name_the_function_that_was_called(trained):
    variables, groups = trained
    asked = (tasks.apply, jax.tree.map(lambda x: x * jnp.nan, variables), tasks.loss, tasks.batches)
    for function, budget in (
        (ca.compress, {"budget": ca.params(0.5)}),
        (ca.find_plan, {"budget": ca.params(0.5)}),
        (ca.sweep, {"budgets": [ca.params(0.5)]}),
    ):
        with pytest.raises(PlanError, match=rf"^{function.__name__}: \['layer0/b'.* not finite"):
            function(*asked, groups=groups, **budget)
