"""Requests that cannot work are refused before any work, with what to do."""

import inspect
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax.errors import (
    BudgetError,
    CriterionError,
    PlanError,
    RequestError,
    TraceError,
)
from compaware_jax.importance import l2
from tests import tasks

# Without the annotations that tests check: a user's call meets our own messages.
COMPRESS = inspect.unwrap(ca.compress)


@pytest.fixture(scope="module")
def task():
    variables = tasks.init(jax.random.key(0))
    return variables, tasks.groups(variables)


def refused(task, error, message, apply=tasks.apply, loss=tasks.loss, batches=tasks.batches, **changes):
    variables, groups = task
    settings = {"groups": groups, "budget": ca.params(0.5), "fine_tune": 1, "progress": False}
    with pytest.raises(error, match=message):
        COMPRESS(apply, variables, loss, batches, **(settings | changes))


def numbered(start):
    """Another batch for every call, whatever the step."""
    calls = itertools.count(start)
    return lambda step: tasks.points(jax.random.key(next(calls)), 64)


def by_numpy(step):
    return jnp.asarray(np.random.default_rng(int(step)).normal(size=(64, 8)))


class Cached:
    """A host's cache: other batches while steps are numbers, the first one when traced."""

    def __call__(self, step):
        number = 0 if isinstance(step, jax.core.Tracer) else int(step)
        return tasks.points(jax.random.key(number), 64)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([jnp.ones((64, 8))], r"batches is list, expected a function step -> batch.*data\.resident"),
        (iter([jnp.ones((64, 8))]), r"batches is list_iterator, expected a function"),
        (numbered(0), r"batches\(0\) gives another batch each time"),
        (by_numpy, r"batches cannot be compiled \((Concret|TracerInteger)"),
        (Cached(), r"compiled, batches gives the same batch at every step"),
    ],
    ids=["list", "iterator", "impure", "host", "constant"],
)
def test_batches(task, batches, message):
    refused(task, RequestError, message, batches=batches)


def test_one_batch_of_all_data_is_fine(task):
    variables, groups = task
    everything = tasks.held_out()
    search = ca.GradientSearch(steps=2)
    ca.find_plan(
        tasks.apply, variables, tasks.loss, lambda step: everything,
        groups=groups, budget=ca.params(0.5), search=search, progress=False,
    )  # fmt: skip


def test_arguments_in_another_order(task):
    refused(task, RequestError, "apply is dict, expected the model as a pure function", apply=task[0])
    refused(task, RequestError, "loss is ArrayImpl, expected a function", loss=tasks.held_out())


def test_settings(task):
    refused(task, RequestError, "compress: fine_tune=-1, expected a whole number", fine_tune=-1)
    refused(task, RequestError, "compress: fine_tune=10.0, expected a whole number", fine_tune=10.0)
    refused(task, RequestError, r"key=0, expected one random key, such as jax\.random\.key\(0\)", key=0)
    refused(task, RequestError, "expected one random key", key=jax.random.split(jax.random.key(0)))
    refused(task, RequestError, r"search=<class .*expected a configured search", search=ca.GradientSearch)
    refused(task, RequestError, "search='gradient', expected a configured search", search="gradient")
    for wrong in (True, "0.1", [0.1], None):
        with pytest.raises(BudgetError, match=r"expected a number in \(0, 1\]"):
            ca.params(wrong)


def test_criteria(task):
    error = ca.at_most("error", tasks.error, 9.0)
    refused(task, CriterionError, r"criteria is Criterion, expected a list of criteria", criteria=error)
    refused(task, CriterionError, r"criteria is \['function'\], expected", criteria=[tasks.error])
    refused(
        task, CriterionError, "held_out is a function, `held_out`, expected the batch",
        criteria=[error], held_out=tasks.held_out,
    )  # fmt: skip


def test_loss_and_metric_of_the_model_around_them(task):
    """What ignores its arguments would judge the dense model, however small the new one is."""
    variables, _ = task

    def outside(f, _, batch):
        return tasks.error(tasks.apply, variables, batch)

    refused(task, TraceError, "the loss does not depend on the variables.*has to use that", loss=outside)
    refused(
        task, CriterionError, "the metric of `error` does not depend on the variables",
        criteria=[ca.at_most("error", outside, 9.0)], held_out=tasks.held_out(),
    )  # fmt: skip


def test_loss_and_metric_that_fail_on_the_small_model(task):
    """They call the dense function on whatever variables they are given: refused before the search."""

    def dense(f, variables, batch):
        hidden = jnp.tanh(batch @ variables["layer0"]["w"] + jnp.ones(16))
        return jnp.mean(hidden**2) + tasks.error(f, variables, batch)

    refused(
        task,
        TraceError,
        r"the loss fails on a model with half of its units \((TypeError|ValueError): ",
        loss=dense,
    )
    refused(
        task, CriterionError, "the metric of `error` fails on a model with half",
        criteria=[ca.at_most("error", dense, 9.0)], held_out=tasks.held_out(),
    )  # fmt: skip


def test_loss_that_is_no_number(task):
    def per_example(f, variables, batch):
        return jnp.mean((f(variables, batch) - batch) ** 2, -1)

    refused(
        task, TraceError, r"the loss has shape \(64,\), expected one number, such as a mean", loss=per_example
    )


def test_scores(task):
    def of_groups(groups, variables):
        return jnp.zeros(len(groups.groups))

    def hole(groups, variables):
        return l2(groups, variables).at[3].set(jnp.nan)

    refused(task, PlanError, r"`.*of_groups` has shape \(3,\), expected one number per unit", score=of_groups)
    refused(task, PlanError, "is not a number at unit 3 of `layer0`", score=hole)


def test_variables_of_another_shape(task):
    variables, groups = task
    other = tasks.init(jax.random.key(0)) | {"layer3": {"w": jnp.ones((16, 9)), "b": jnp.ones(9)}}
    refused((other, groups), PlanError, r"got Leaf\(.*\(9,\).*expected Leaf\(.*\(8,\)")
    assert variables["layer3"]["b"].shape == (8,)


def test_statistics_that_would_be_trained(caplog):
    """The eval mode of a batch norm has gradients for its statistics."""
    rng = np.random.default_rng(0)
    variables = {
        "params": {"a": jnp.asarray(rng.normal(size=(8, 6))), "b": jnp.asarray(rng.normal(size=(6, 8)))},
        "batch_stats": {"mean": jnp.zeros(6), "unread": jnp.zeros(6)},
    }

    def apply(v, x):
        hidden = x @ v["params"]["a"] - v["batch_stats"]["mean"]
        still = jax.lax.stop_gradient(v["batch_stats"]["unread"])
        return jnp.tanh(hidden + still) @ v["params"]["b"]

    def returned(f, v, batch):
        return tasks.loss(f, v, batch), {"batch_stats": {"mean": v["batch_stats"]["mean"]}}

    groups = ca.find_groups(apply, variables, jnp.zeros((1, 8)))
    search = ca.GradientSearch(steps=2)
    for loss, warned in ((tasks.loss, 1), (returned, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ca.find_plan(
                apply, variables, loss, tasks.batches,
                groups=groups, budget=ca.params(0.6), search=search, progress=False,
            )  # fmt: skip
        told = [r.message for r in caplog.records if "trained like a weight" in r.message]
        assert len(told) == warned
        assert all("`batch_stats/mean` would be" in text for text in told)
