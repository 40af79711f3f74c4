"""Training with any optimizer: as by hand, resumed, and told apart."""

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import compaware_jax as ca
from compaware_jax.errors import CheckpointError, RequestError
from tests import tasks

OPTIMIZERS = {
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 60))
    ),
    "muon": optax.contrib.muon(1e-2),
    "several steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(trained, tmp_path, name):
    variables, _ = trained
    optimizer = OPTIMIZERS[name]
    fit = partial(ca.fit, tasks.apply, variables, tasks.loss, tasks.batches, 60, progress=False)
    fitted, _ = fit(optimizer=optimizer)

    @jax.jit
    def by_hand(variables):
        def step(index, state):
            variables, moments = state
            gradients = jax.grad(partial(tasks.loss, tasks.apply))(variables, tasks.batches(index))
            changes, moments = optimizer.update(gradients, moments, variables)
            return optax.apply_updates(variables, changes), moments

        return jax.lax.fori_loop(0, 60, step, (variables, optimizer.init(variables)))[0]

    chex.assert_trees_all_close(fitted, by_hand(variables), rtol=1e-4, atol=1e-5)
    # A checkpoint holds its state, and is of this optimizer.
    for _ in range(2):
        chex.assert_trees_all_equal(fit(optimizer=optimizer, directory=tmp_path)[0], fitted)
    with pytest.raises(CheckpointError, match="another job"):
        fit(optimizer=optax.sgd(1e-2), directory=tmp_path)
    result = tasks.compress(trained, optimizer=optimizer, fine_tune=20)
    start = ca.shrink(result.found.variables, result.plan)
    tuned, _ = ca.fit(
        result.apply, start, tasks.loss, tasks.batches, 20, optimizer=optimizer, criteria=[tasks.BOUND],
        progress=False,
    )  # fmt: skip
    chex.assert_trees_all_equal(result.variables, tuned)


def test_optimizers_that_ask_for_the_loss(trained):
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, accumulation_size=5)
    optimizer = optax.chain(optax.adam(1e-2), plateau)
    variables, history = ca.fit(
        tasks.apply, tasks.init(jax.random.key(0)), tasks.loss, tasks.batches, 300, optimizer=optimizer,
        progress=False,
    )  # fmt: skip
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    chex.assert_trees_all_equal_shapes(variables, trained[0])
    (point,) = tasks.sweep(trained, optimizer=optimizer, criteria=[])
    assert not point.diverged


def test_optimizers_of_one_program_with_other_numbers(trained, tmp_path):
    fit = partial(
        ca.fit, tasks.apply, trained[0], tasks.loss, tasks.batches, 4, directory=tmp_path, progress=False
    )
    fit(optimizer=optax.inject_hyperparams(optax.adam)(1e-3))
    with pytest.raises(CheckpointError, match=r"another job.*optimizer"):
        fit(optimizer=optax.inject_hyperparams(optax.adam)(2e-3))
    with pytest.raises(CheckpointError, match=r"another job"):
        fit()


def test_what_is_no_optimizer(trained):
    def growing(updates, state, params=None):
        return updates, (state, state)

    for wrong, message in (
        (optax.adam, "expected an optax.GradientTransformation, such as optax.adamw"),
        (optax.lbfgs(), r"the optimizer fails \(.*a loop of your own"),
        (optax.GradientTransformation(jnp.zeros_like, growing), "the optimizer"),
        (
            optax.GradientTransformation(lambda _: jnp.zeros(3), growing),
            "state has other shapes or dtypes after a step",
        ),
    ):
        given = {"groups": trained[1], "budget": ca.params(0.5), "optimizer": wrong}
        with pytest.raises(RequestError, match=f"compress: .*{message}"):
            inspect.unwrap(ca.compress)(tasks.apply, trained[0], tasks.loss, tasks.batches, **given)
        given = {"groups": trained[1], "budgets": [ca.params(0.5)], "optimizer": wrong}
        with pytest.raises(RequestError, match=f"sweep: .*{message}"):
            inspect.unwrap(ca.sweep)(tasks.apply, trained[0], tasks.loss, tasks.batches, **given)


def test_lanes_take_it(trained):
    """A learning rate of zero: what the search found stays."""
    same = {"search": ca.GradientSearch(steps=10), "criteria": [], "optimizer": optax.sgd(0.0)}
    (point,) = tasks.sweep(trained, **same)
    result = tasks.compress(trained, fine_tune=10, **same)
    assert point.plan == result.plan
    chex.assert_trees_all_close(point.variables, result.variables, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(result.variables, ca.shrink(result.found.variables, result.plan))


def test_lanes_start_anew_with_it(trained):
    """Its state holds weights: those that the search ended with, not those that it began with."""
    same = {"criteria": [], "optimizer": optax.contrib.schedule_free_adamw(1e-2)}
    same |= {"search": ca.GradientSearch(steps=60), "fine_tune": 60}
    assert tasks.sweeps_alike(trained, **same)


def test_optimizers_that_hold_arrays_in_programs_of_their_own(trained, tmp_path):
    def scaled(by):
        def update(gradients, state, params=None):
            return jax.jit(lambda g: jax.tree.map(lambda x: -1e-3 * by.sum() * x, g))(gradients), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    fit = partial(
        ca.fit, tasks.apply, trained[0], tasks.loss, tasks.batches, 4, directory=tmp_path, progress=False
    )
    fit(optimizer=scaled(jnp.ones(50)))
    with pytest.raises(CheckpointError, match=r"another job.*optimizer"):
        fit(optimizer=scaled(2 * jnp.ones(50)))
