"""Many budgets and seeds in one program: each lane is what `compress` does alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from tests import tasks


def of_one_seed(trained, seed, *, search, fine_tune, **asked):
    """What `compress` makes with a seed's key, on batches from where those of the seed before end."""
    first = jnp.int32(seed * (search.steps + fine_tune))
    key = jax.random.fold_in(jax.random.key(0), seed) if seed else jax.random.key(0)
    asked |= {"batches": lambda step: tasks.batches(step + first), "key": key}
    return tasks.compress(trained, search=search, fine_tune=fine_tune, **asked)


def test_sweep_is_what_compress_does(trained):
    budgets = [ca.params(b) for b in (0.3, 0.6)]
    points = tasks.sweep(trained, budgets=budgets, seeds=2, search=tasks.SEARCH, fine_tune=100)
    assert [(p.budget.fraction, p.seed) for p in points] == [(0.3, 0), (0.3, 1), (0.6, 0), (0.6, 1)]
    for point in points:
        total, cost = point.costs["parameters"]
        assert 0.9 * point.budget.fraction * total <= cost <= point.budget.fraction * total
        small_apply = ca.slim(tasks.apply, point.plan)
        got = float(tasks.error(small_apply, point.variables, tasks.held_out()))
        assert got == pytest.approx(point.verdicts[0].after, rel=1e-4)
        assert point.kept == point.verdicts[0].kept == (got <= 0.25)
    header, _, *rows = str(points).splitlines()
    assert header.split() == ["budget", "seed", "parameters", "left", *str(tasks.BOUND).split()]
    for point, row in zip(points, rows, strict=True):
        cost = point.costs["parameters"][1]
        left = f"{cost / point.costs['parameters'][0]:.2%}"
        told = [f"{point.verdicts[0].after:.6g}", *(() if point.kept else ("(not", "kept)"))]
        assert row.split() == [f"{point.budget.fraction:.2%}", str(point.seed), f"{cost:,}", left, *told]
    assert not np.array_equal(points[0].coefficients, points[1].coefficients)
    for point in points[:2]:
        alone = of_one_seed(trained, point.seed, budget=budgets[0], search=tasks.SEARCH, fine_tune=100)
        np.testing.assert_allclose(point.coefficients, alone.found.coefficients, rtol=1e-3)
        assert point.plan == alone.plan
        assert point.costs == alone.costs
        assert point.verdicts[0].before == alone.verdicts[0].before
        assert point.verdicts[0].after == pytest.approx(alone.verdicts[0].after, rel=1e-2)
        chex.assert_trees_all_close(point.variables, alone.variables, rtol=1e-2, atol=1e-3)


def test_penalties_are_of_what_stays(trained):
    same = {"loss": tasks.penalized, "criteria": [], "search": tasks.SEARCH, "fine_tune": 50}
    assert tasks.sweeps_alike(trained, **same)


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


def test_sweep_without_fine_tune_is_cut_all_the_same(trained):
    (point,) = tasks.sweep(trained, criteria=[], search=ca.GradientSearch(steps=50), fine_tune=0)
    total, cost = point.costs["parameters"]
    assert 0.45 * total < cost <= 0.5 * total
    assert sum(x.size for x in jax.tree.leaves(point.variables)) == cost
