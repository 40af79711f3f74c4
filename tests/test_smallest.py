"""The smallest model that keeps its criteria, on a small problem."""

import sys
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest

import compaware_jax as ca
from compaware_jax.errors import BudgetError, CriterionError, RequestError
from tests import tasks

SETTINGS = {
    "held_out": tasks.held_out(),
    "search": ca.GradientSearch(steps=50),
    "fine_tune": 100,
    "learning_rate": 1e-2,
    "progress": False,
}


@pytest.fixture(scope="module")
def problem():
    variables = tasks.dense()
    return tasks.apply, variables, tasks.loss, tasks.batches, tasks.groups(variables)


def smallest(problem, **changes):
    *job, groups = problem
    bound = ca.at_most("error", tasks.error, 0.25)
    return ca.smallest(*job, **({"groups": groups, "criteria": [bound], **SETTINGS} | changes))


def test_smallest_that_keeps_and_next_that_does_not(problem):
    found = smallest(problem, start=0.5, tolerance=0.3)
    assert found.result is not None
    assert found.result.kept
    worked = [budget for budget, kept, _ in found.tried if kept]
    failed = [budget for budget, kept, _ in found.tried if not kept]
    assert [kept for _, kept, verdicts in found.tried] == [v.kept for *_, (v,) in found.tried]
    assert str(found).endswith(str(found.result))
    assert min(worked) / max(b for b in failed if b < min(worked)) <= 1.3
    before, after = found.result.costs["parameters"]
    assert after <= min(worked) * before
    assert after == sum(x.size for x in jax.tree.leaves(found.result.variables))


@pytest.mark.parametrize(
    ("start", "tolerance", "least", "expected"),
    [
        (0.4, 0.5, 0.13, [0.4, 0.2, 0.1, 0.1 * 2**0.5]),
        (0.4, 0.2, 0.13, [0.4, 0.2, 0.1, 0.1 * 2**0.5, 0.1 * 2**0.25]),
        (0.1, 0.45, 0.47, [0.1, 0.2, 0.4, 0.8, 0.4 * 2**0.5]),
    ],
)
def test_budgets_that_are_tried(problem, monkeypatch, start, tolerance, least, expected):
    """Halved or doubled from the start, then bisected on a logarithmic scale, only as far as is asked."""

    def compressed(*args, budget, **settings):
        kept = budget.fraction >= least
        return Mock(spec=ca.Result, kept=kept, verdicts=(), costs={budget.cost: budget.fraction})

    monkeypatch.setattr(sys.modules[ca.smallest.__module__], "compress", compressed)
    found = smallest(problem, start=start, tolerance=tolerance, cost="bytes")
    assert [budget for budget, _, _ in found.tried] == pytest.approx(expected)
    assert [kept for _, kept, _ in found.tried] == [budget >= least for budget in expected]
    assert found.result is not None
    assert found.result.costs == {"bytes": pytest.approx(min(b for b in expected if b >= least))}


def test_nothing_smaller_keeps_a_bound_at_the_dense_error(problem):
    apply, variables, *_ = problem
    error = float(tasks.error(apply, variables, tasks.held_out()))
    strict = ca.at_most("error", tasks.error, error * 1.0001)
    found = smallest(problem, criteria=[strict], start=0.6, tolerance=0.5, fine_tune=1)
    assert found.result is None
    assert [attempt.kept for attempt in found.tried] == [False] * len(found.tried)
    assert all(attempt.verdicts[0].after > error * 1.0001 for attempt in found.tried)
    assert str(found).count("(not kept)") == len(found.tried)
    assert str(found).endswith("No budget that was tried keeps every criterion.")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"criteria": []}, CriterionError, "there are no criteria"),
        ({"start": 1.5}, BudgetError, "start=1.5"),
        ({"cost": "seconds"}, BudgetError, "cost='seconds'"),
        ({"budget": ca.params(0.5)}, RequestError, "got a budget, which is what it looks for"),
    ],
)
def test_bad_input(problem, changes, error, message):
    with pytest.raises(error, match=message):
        smallest(problem, **changes)


def test_everything_may_be_emptied():
    """Nothing is fixed, so no model at all is within reach of the cost."""

    def apply(v, x):
        return jnp.tanh(x @ v["a"]) @ v["b"]

    variables = {"a": jnp.ones((8, 6)) / 8, "b": jnp.ones((6, 8)) / 6}
    groups = ca.constrain(ca.find_groups(apply, variables, jnp.ones((1, 8))), may_empty="*")
    found = ca.smallest(
        apply, variables, tasks.loss, tasks.batches, groups=groups, held_out=tasks.held_out(),
        criteria=[ca.at_most("error", tasks.error, 10.0)], start=0.5, tolerance=0.5, fine_tune=2,
        search=ca.GradientSearch(steps=2), progress=False,
    )  # fmt: skip
    assert found.result is not None
    assert found.result.costs["parameters"][1] <= 16
