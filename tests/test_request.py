"""Requests that cannot work are refused before any work, with what to do."""

import inspect
import itertools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from compaware_jax.settings import checked_number
from compaware_jax.training.objective import constrained, no_pressure
from tests import tasks

# Without the annotations that tests check: a user's call meets our own messages.
COMPRESS = inspect.unwrap(ca.compress)


@pytest.fixture(scope="module")
def task():
    variables = tasks.init(jax.random.key(0))
    return variables, tasks.groups(variables)


def refused(task, error, message, /, apply=tasks.apply, loss=tasks.loss, batches=tasks.batches, **changes):
    variables, groups = changes.pop("task", task)
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
    for setting, wrong in (("travel", -1.0), ("noise", -0.1), ("edge", float("inf")), ("ramp", 1.5)):
        with pytest.raises(RequestError, match=f"GradientSearch: {setting}=.*expected a finite number"):
            ca.GradientSearch(**{setting: wrong})
    for wrong in ("1", None, [0.5]):
        with pytest.raises(RequestError, match=r"share=.*expected a finite number, from 0 to 1\."):
            checked_number(wrong, "share", most=1.0)


def test_criteria(task):
    error = ca.at_most("error", tasks.error, 9.0)
    refused(task, CriterionError, r"criteria is Criterion, expected a list of criteria", criteria=error)
    refused(task, CriterionError, r"criteria is \['function'\], expected", criteria=[tasks.error])
    refused(
        task, CriterionError, "held_out is a function, `held_out`, expected the batch",
        criteria=[error], held_out=tasks.held_out,
    )  # fmt: skip
    refused(
        task, CriterionError, r"criteria are named \['error', 'error'\], expected names of their own",
        criteria=[error, error], held_out=tasks.held_out(),
    )  # fmt: skip
    turned = ca.at_most("turned", lambda f, v, b: f(v, b).sum() * 1j, 9.0, trainable=False)
    refused(
        task, CriterionError, "metric of `turned` is of complex64, expected a real number",
        criteria=[turned], held_out=tasks.held_out(),
    )  # fmt: skip


def test_loss_and_metric_of_the_model_around_them(task):
    """What ignores its arguments would judge the dense model, however small the new one is."""
    variables, _ = task

    def outside(f, _, batch):
        return tasks.error(tasks.apply, variables, batch)

    def on_their_arrays(f, variables, batch):
        return tasks.error(tasks.apply, variables, batch)

    refused(task, TraceError, "the loss does not depend on the variables.*has to use that", loss=outside)
    message = "the loss does not call the function that it is given.*has to use that"
    refused(task, TraceError, message, loss=on_their_arrays)
    refused(
        task, CriterionError, "the metric of `error` does not depend on the variables",
        criteria=[ca.at_most("error", outside, 9.0)], held_out=tasks.held_out(),
    )  # fmt: skip


def test_metrics_that_do_not_ask(task, caplog):
    """They may be of the weights alone, or of the dense function on the small one's arrays."""
    length = ca.at_most("length", lambda f, v, b: optax.tree.norm(v), 99.0)
    error = ca.at_most("error", tasks.error, 9.0)
    with caplog.at_level(logging.WARNING):
        tasks.compress(task, criteria=[length, error], fine_tune=1, search=ca.GradientSearch(steps=2))
    assert [record.getMessage() for record in caplog.records] == [
        "compress: the metric of `length` does not call the function that it is given: is it of the weights "
        "alone?"
    ]


def test_metrics_of_what_has_no_gradient(task):
    """An average of the weights is deployed, and not trained."""
    variables, _ = task
    both = {"params": variables, "average": variables}

    def apply(v, x):
        still = jax.lax.stop_gradient(v["average"])
        average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, still, v["params"])
        return {"y": tasks.apply(v["params"], x), "used": tasks.apply(still, x), "average": average}

    def loss(f, v, batch):
        found = f(v, batch)
        return jnp.mean((found["y"] - batch) ** 2), {"average": found["average"]}

    def error(f, v, batch):
        return jnp.mean((f(v, batch)["used"] - batch) ** 2)

    groups = ca.find_groups(apply, both, jnp.zeros((1, 8)), state_outputs={"average": "average"})
    changes = {"task": (both, groups), "apply": apply, "loss": loss, "held_out": tasks.held_out()}
    refused(
        task, CriterionError, "metric of `average` has no gradient.*trainable=False",
        criteria=[ca.at_most("average", error, 9.0)], **changes,
    )  # fmt: skip
    result = ca.compress(
        apply, both, loss, tasks.batches, groups=groups, budget=ca.params(0.5), fine_tune=1,
        criteria=[ca.at_most("average", error, 9.0, trainable=False)], held_out=tasks.held_out(),
        search=ca.GradientSearch(steps=2), progress=False,
    )  # fmt: skip
    assert result.kept


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
        task,
        TraceError,
        r"the loss has shape \(64,\), expected a scalar: one number, such as a mean",
        loss=per_example,
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


def test_metrics_that_cannot_be_asked(task):
    def only_held_out(f, variables, batch):
        return jnp.mean((f(variables, batch["x"]) - batch["x"]) ** 2)

    def by_numpy(f, variables, batch):
        return float(np.asarray(f(variables, batch)).mean())

    def both(f, variables, batch):
        return {"error": tasks.error(f, variables, batch)}

    held_out = {"x": tasks.held_out()}
    message = r"metric of `e` fails on a training batch \(.*trainable=False: it is asked of held_out alone"
    refused(task, CriterionError, message, criteria=[ca.at_most("e", only_held_out, 9.0)], held_out=held_out)
    message = r"metric of `e` fails on held_out \(TracerArrayConversionError.*need jax\.pure_callback"
    host = ca.at_most("e", by_numpy, 9.0, trainable=False)
    refused(task, CriterionError, message, criteria=[host], held_out=tasks.held_out())
    message = "metric of `e` is a dict, expected a scalar"
    refused(task, CriterionError, message, criteria=[ca.at_most("e", both, 9.0)], held_out=tasks.held_out())
    with pytest.raises(CriterionError, match=r"has shape \(64, 8\), expected a scalar"):
        ca.find_plan(
            tasks.apply, task[0], tasks.loss, tasks.batches, groups=task[1], budget=ca.params(0.5),
            criteria=[ca.at_most("e", lambda f, v, b: f(v, b), 9.0)],
        )  # fmt: skip


def test_metrics_that_are_not_a_number(task):
    def nowhere(f, v, b):
        return jnp.sqrt(tasks.loss(f, v, b) - 100)

    def held(f, v, b):
        return jnp.where(len(b) == 5, jnp.nan, tasks.loss(f, v, b))

    def asked(metric, **settings):
        criteria = [ca.at_most("wrong", metric, 1.0)]
        return {"criteria": criteria, "held_out": tasks.held_out()[:5], "allow_failing": True, **settings}

    refused(task, CriterionError, r"\['wrong'\] are not a number on batches\(0\)", **asked(nowhere))
    refused(task, CriterionError, r"\['wrong'\] are not a number on held_out", **asked(held))
    with pytest.raises(CriterionError, match=r"fit: the metrics of \['wrong'\] are not a number"):
        ca.fit(
            tasks.apply, task[0], tasks.loss, tasks.batches, 2, criteria=asked(nowhere)["criteria"],
            progress=False,
        )  # fmt: skip


def test_groups_and_plans_of_another_kind(task):
    variables, groups = task
    told = "groups is dict, expected what find_groups returns"
    with pytest.raises(RequestError, match=told):
        inspect.unwrap(ca.plan_units)(variables, np.ones(3, bool))
    with pytest.raises(RequestError, match=told):
        inspect.unwrap(ca.constrain)(variables, floor=1)
    with pytest.raises(PlanError, match="shrink: the plan is NoneType, expected a Plan"):
        inspect.unwrap(ca.shrink)(variables, None)
    smallest = inspect.unwrap(ca.smallest)
    settings = {"criteria": [tasks.BOUND], "held_out": tasks.held_out()}
    given = tasks.apply, variables, tasks.loss, tasks.batches
    with pytest.raises(RequestError, match=told):
        smallest(*given, groups=variables, **settings)
    with pytest.raises(BudgetError, match=r"start='0\.1'.*two numbers in \(0, 1\)"):
        smallest(*given, groups=groups, start="0.1", **settings)


def test_trees_of_another_kind(task):
    variables, groups = task
    gates, other, plan = np.ones(groups.units), {"a": jnp.ones(3)}, ca.plan_units(groups, np.ones(36, bool))
    apply_mask, uncut = inspect.unwrap(ca.apply_mask), inspect.unwrap(ca.uncut)
    shrink_optimizer = inspect.unwrap(ca.shrink_optimizer)
    groups_wanted, leaves_wanted = (
        "expected what find_groups returns",
        r"variables have .* expected .*Pass those",
    )
    for error, message, call in (
        (RequestError, groups_wanted, lambda: inspect.unwrap(ca.mask)(gates, groups, variables)),
        (PlanError, "mask: the variables have 1 leaves", lambda: ca.mask(groups, jnp.asarray(gates), other)),
        (RequestError, groups_wanted, lambda: apply_mask(variables, groups, gates)),
        (PlanError, leaves_wanted, lambda: apply_mask(groups, variables, gates)),
        (PlanError, leaves_wanted, lambda: apply_mask(groups, gates, other)),
        (PlanError, "gates are str, expected numbers", lambda: apply_mask(groups, "all", variables)),
        (PlanError, leaves_wanted, lambda: inspect.unwrap(l2)(groups, {**variables, "scale": 2.0})),
        (RequestError, groups_wanted, lambda: uncut(plan, groups)),
        (PlanError, "uncut: the plan is Groups", lambda: uncut(groups, groups)),
        (
            PlanError,
            "shrink_optimizer: the plan is dict",
            lambda: shrink_optimizer(None, None, plan, variables),
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_arguments_of_another_kind(task):
    refused(task, RequestError, r"\['scale'\] are no arrays", task=({**task[0], "scale": 2.0}, task[1]))
    refused(task, TraceError, "a model object, Dense, was given as the function", apply=nn.Dense(8))
    refused(task, RequestError, "groups is NoneType, expected what find_groups returns", groups=None)
    refused(task, RequestError, r"score='l2', expected a function", score="l2")
    for rate in (-1.0, 0.0, float("nan"), "1e-3", optax.constant_schedule(1e-3)):
        refused(task, RequestError, "compress: learning_rate=.*expected a finite number", learning_rate=rate)
    with pytest.raises(BudgetError, match=r"sweep: budgets is .*expected a list of budgets"):
        inspect.unwrap(ca.sweep)(
            tasks.apply, task[0], tasks.loss, tasks.batches, groups=task[1], budgets=ca.params(0.5)
        )


def test_fit_refuses_what_compress_refuses(task):
    def fit(**changes):
        given = {"apply": tasks.apply, "variables": task[0], "loss": tasks.loss, "batches": tasks.batches}
        inspect.unwrap(ca.fit)(**(given | {"steps": 2, "progress": False} | changes))

    fit()
    several = optax.MultiSteps(optax.adam(1e-3), 2)
    for kind, message, changes in (
        (RequestError, "batches is list, expected a function", {"batches": [1]}),
        (RequestError, r"fit: batches\(0\) gives another batch each time", {"batches": numbered(0)}),
        (RequestError, "fit: learning_rate=-1, expected a finite number", {"learning_rate": -1}),
        (RequestError, "fit: job='mine', expected a dictionary", {"job": "mine"}),
        (RequestError, r"optax\.MultiSteps has gradient_transformation\(\)", {"optimizer": several}),
        (CriterionError, "criteria is Criterion, expected a list", {"criteria": tasks.BOUND}),
        (CriterionError, "expected names of their own", {"criteria": [tasks.BOUND] * 2}),
        (RequestError, r"fit: \['n'\] are no arrays", {"variables": {**task[0], "n": 3}}),
        (TraceError, r"fit: the loss has shape \(64, 8\)", {"loss": lambda f, v, b: f(v, b)}),
        (TraceError, "fit: the loss is of int32", {"loss": lambda f, v, b: jnp.int32(f(v, b).sum())}),
        (TraceError, "fit: the loss is a NoneType", {"loss": lambda f, v, b: None}),
    ):
        with pytest.raises(kind, match=message):
            fit(**changes)


def test_a_loss_may_change_what_the_model_returned(task):
    """Loss and metrics ask the model once; what the one does to the containers is not seen by the other."""

    def apply(variables, x):
        return {"y": tasks.apply(variables, x)}

    def loss(f, variables, batch):
        found = f(variables, batch)
        found["y"] = found.pop("y") - batch
        return jnp.mean(found["y"] ** 2)

    def error(f, variables, batch):
        return jnp.mean((f(variables, batch)["y"] - batch) ** 2)

    criterion = ca.at_most("error", error, 1.0)
    objective = constrained(loss, [criterion], 1)
    batch = tasks.held_out()
    _, (pressure, _) = objective(apply, task[0], batch, no_pressure([criterion]))
    assert float(pressure.excess[0]) == pytest.approx(float(error(apply, task[0], batch)) - 1.0, rel=1e-5)
