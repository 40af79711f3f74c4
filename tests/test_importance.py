"""Importances against their definitions, unit by unit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax import importance
from tests.models import MODELS


@pytest.fixture
def scored():
    apply, variables, args = MODELS["convolutional"]()
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    return apply, variables, args, ca.find_groups(apply, variables, *args)


def unit_slices(groups, variables, unit):
    for leaf, axes in zip(jax.tree.leaves(variables), groups.units_of, strict=True):
        for axis, units in enumerate(axes):
            yield leaf.take(np.flatnonzero(units == unit), axis=axis)


def test_magnitudes(scored):
    _, variables, _, groups = scored
    l1, l2 = importance.l1(groups, variables), importance.l2(groups, variables)
    for unit in range(groups.units):
        parts = list(unit_slices(groups, variables, unit))
        assert float(l1[unit]) == pytest.approx(sum(np.abs(p).sum() for p in parts), rel=1e-5)
        norm = np.sqrt(sum((p**2).sum() for p in parts))
        assert float(l2[unit]) == pytest.approx(norm, rel=1e-5)


def test_taylor_predicts_the_first_order_change(scored):
    apply, variables, args, groups = scored

    def loss(v):
        return jnp.sum(apply(v, *args) ** 2)

    gradients = jax.grad(loss)(jax.tree.map(jnp.asarray, variables))
    scores = importance.taylor(groups, variables, gradients)

    def along(unit, t):
        gates = jnp.ones(groups.units).at[unit].add(-t)
        return loss(ca.apply_mask(groups, gates, variables))

    slopes = jax.vmap(lambda u: jax.grad(along, 1)(u, 0.0))(jnp.arange(groups.units))
    np.testing.assert_allclose(scores, np.abs(slopes), rtol=1e-3, atol=1e-4)


def test_sensitivities_against_removal_one_by_one(scored):
    apply, variables, args, groups = scored

    def metric(v):
        return -jnp.sum(apply(v, *args) ** 2)

    got = importance.ablation(groups, metric, variables, at_once=3)
    for unit in range(groups.units):
        gates = np.ones(groups.units)
        gates[unit] = 0
        expected = metric(variables) - metric(ca.apply_mask(groups, gates, variables))
        assert float(got[unit]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    slopes = importance.gradient_sensitivity(groups, metric, variables)
    assert slopes.shape == (groups.units,)
    assert (np.asarray(slopes) >= 0).all()
    scores = importance.l2(groups, variables)
    falls = importance.group_ablation(groups, metric, variables, scores, share=0.5)
    for number, group in enumerate(groups.groups):
        gates = np.ones(groups.units)
        worst = np.argsort(np.asarray(scores)[group.slice])[: group.units // 2]
        gates[group.offset + worst] = 0
        expected = metric(variables) - metric(ca.apply_mask(groups, gates, variables))
        assert float(falls[number]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_random_scores_follow_the_key(scored):
    groups = scored[-1]
    a = importance.random(groups, jax.random.key(0))
    np.testing.assert_array_equal(a, importance.random(groups, jax.random.key(0)))
    assert not np.array_equal(a, importance.random(groups, jax.random.key(1)))
    assert a.shape == (groups.units,)


def vectors(groups, variables, group):
    """Everything that each unit of a group holds, as rows."""
    rows = [
        np.concatenate([np.ravel(part) for part in unit_slices(groups, variables, unit)])
        for unit in range(group.offset, group.offset + group.units)
    ]
    return np.stack(rows)


def test_geometric_median(scored):
    _, variables, _, groups = scored
    got = importance.fpgm(groups, variables)
    for group in groups.groups:
        rows = vectors(groups, variables, group)
        expected = np.linalg.norm(rows[:, None] - rows[None], axis=-1).sum(1)
        np.testing.assert_allclose(got[group.slice], expected, rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_layer_adaptive_magnitude(scored, scale):
    _, variables, _, groups = scored
    variables = {
        name: jax.tree.map(lambda x, n=n: x * scale**-n, v) for n, (name, v) in enumerate(variables.items())
    }
    got = np.asarray(importance.lamp(groups, variables))
    squares = np.asarray(importance.l2(groups, variables)) ** 2
    for group in groups.groups:
        own = squares[group.slice]
        expected = [x / own[own >= x].sum() for x in own]
        np.testing.assert_allclose(got[group.slice], expected, rtol=1e-4)
        assert got[group.slice].max() == pytest.approx(1.0)


def test_scores_over_the_mean_of_their_group(scored):
    groups = scored[-1]
    scores = np.arange(1.0, groups.units + 1)
    got = np.asarray(importance.within_groups(groups, scores))
    for group in groups.groups:
        np.testing.assert_allclose(
            got[group.slice], scores[group.slice] / scores[group.slice].mean(), rtol=1e-5
        )


def test_second_order_scores_predict_a_removal(scored):
    apply, variables, args, groups = scored
    variables = jax.tree.map(jnp.asarray, variables)

    def loss(v):
        return 0.01 * jnp.sum(apply(v, *args) ** 2)

    def along(gates):
        return loss(ca.apply_mask(groups, gates, variables))

    gates = jnp.ones(groups.units)
    slopes, hessian = jax.jit(lambda g: (jax.grad(along)(g), jax.hessian(along)(g)))(gates)
    second = np.diagonal(hessian)
    for score, expected in (
        (partial(importance.curvature, at_once=3), second),
        (importance.obd, np.abs(second) / 2),
        (importance.taylor2, np.abs(second / 2 - slopes)),
    ):
        found = jax.jit(lambda v, score=score: score(groups, loss, v))(variables)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.5, 1.0])
def test_evidence_of_steps(scored, smoothing):
    apply, variables, args, groups = scored
    variables = jax.tree.map(jnp.asarray, variables)

    def loss(v, seed):
        noise = jax.random.normal(jax.random.key(seed), args[0].shape)
        return jnp.mean(apply(v, args[0] + noise, *args[1:]) ** 2)

    evidence, slopes, norms = importance.no_evidence(groups), [], []
    for seed in range(4):
        gradients = jax.grad(loss)(variables, seed)
        evidence = importance.observe(evidence, groups, variables, gradients, smoothing=smoothing)
        slopes.append(
            [
                sum((w * g).sum() for w, g in zip(*parts, strict=True))
                for parts in (
                    (list(unit_slices(groups, variables, u)), list(unit_slices(groups, gradients, u)))
                    for u in range(groups.units)
                )
            ]
        )
        norms.append(np.sqrt(importance.unit_sum(groups, jax.tree.map(jnp.square, gradients))))
    weights = smoothing ** np.arange(3, -1, -1.0)
    weights /= weights.sum()  # Moving means, corrected for the first steps.
    slopes = np.array(slopes)
    np.testing.assert_allclose(evidence.slope, weights @ slopes, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(importance.accumulated(evidence), weights @ np.array(norms), rtol=1e-3)
    np.testing.assert_allclose(importance.fisher(evidence), weights @ slopes**2 / 2, rtol=1e-3, atol=1e-7)
    mean, square = weights @ slopes, weights @ slopes**2
    spread = weights @ (slopes - mean) ** 2
    expected = np.abs(mean) * np.sqrt(square + 1e-8) / np.sqrt(spread + 1e-8)
    np.testing.assert_allclose(importance.bayesian(evidence), expected, rtol=1e-2, atol=1e-5)


def test_a_gate_on_which_steps_agree_is_surer(scored):
    """The same mean slope scores higher where it does not vary."""
    groups = scored[-1]
    nothing = importance.no_evidence(groups)
    steady = nothing._replace(slope=nothing.slope + 1.0, square=nothing.square + 1.01)
    erratic = nothing._replace(slope=nothing.slope + 1.0, square=nothing.square + 5.0)
    assert (importance.bayesian(steady) > importance.bayesian(erratic)).all()


def test_activation_is_what_a_unit_passes_on():
    """Per unit the root mean square of the hidden layer, where the next layer takes it."""
    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(3, 6)), "b": rng.normal(size=(6, 4)), "c": rng.normal(size=(4, 2))}
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)
    x = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)

    def apply(v, x):
        return jax.nn.relu(jax.nn.relu(x @ v["a"]) @ v["b"]) @ v["c"]

    groups = ca.find_groups(apply, variables, x)
    first = jax.nn.relu(x @ variables["a"])
    second = jax.nn.relu(first @ variables["b"])
    expected = np.concatenate([np.sqrt(np.mean(np.square(h), axis=0)) for h in (first, second)])
    np.testing.assert_allclose(importance.activation(groups, variables, x), expected, rtol=1e-5)
    got = jax.jit(lambda v: importance.activation(groups, v, x))(variables)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_activation_says_where_it_does_not_look(caplog):
    """The hidden channels of a branch are seen nowhere; those before it are."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 6), "b": (6, 5), "c": (5, 6), "d": (6, 2)}
    variables = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def apply(v, x):
        h = jnp.tanh(x @ v["a"])
        h = jax.lax.cond(x.sum() > 0, lambda h: h + jnp.tanh(h @ v["b"]) @ v["c"], lambda h: h, h)
        return h @ v["d"]

    groups = ca.find_groups(apply, variables, np.ones((2, 3), np.float32))
    scores = importance.activation(groups, variables, np.ones((2, 3), np.float32))
    hidden = next(group for group in groups.groups if group.units == 5)
    assert (scores[hidden.slice] == 0).all()
    assert (scores > 0).sum() == 6
    (record,) = caplog.records
    assert f"{[hidden.name]} pass on" in record.getMessage()


def test_a_phase_changes_no_importance():
    """Of complex weights, and of what they pass on, the magnitude counts."""
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 6), "b": (6, 2), "x": (5, 4)}
    variables = {n: jnp.asarray(rng.normal(size=s) + 1j * rng.normal(size=s)) for n, s in shapes.items()}
    x = variables.pop("x")
    turned = jax.tree.map(lambda leaf: leaf * jnp.exp(0.7j), variables)
    groups = ca.find_groups(lambda v, x: jnp.abs((x @ v["a"]) @ v["b"]), variables, x)
    expected = np.sqrt(np.mean(np.abs(x @ variables["a"]) ** 2, axis=0))
    np.testing.assert_allclose(importance.activation(groups, variables, x), expected, rtol=1e-5)
    units = np.concatenate([variables["a"], variables["b"].T])
    expected = [sum(np.linalg.norm(units[:, i] - units[:, j]) for j in range(6)) for i in range(6)]
    np.testing.assert_allclose(importance.fpgm(groups, variables), expected, rtol=1e-5)
    for score in (
        importance.l1,
        importance.l2,
        importance.lamp,
        importance.fpgm,
        lambda g, v: importance.activation(g, v, x),
    ):
        np.testing.assert_allclose(score(groups, turned), score(groups, variables), rtol=1e-5)


def test_complex_weights_have_a_real_norm():
    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 2))}
    groups = ca.find_groups(lambda v, x: (x @ v["a"]).real @ v["b"], variables, np.ones((2, 3), complex))
    expected = np.sqrt((np.abs(variables["a"]) ** 2).sum(0) + (variables["b"] ** 2).sum(1))
    np.testing.assert_allclose(importance.l2(groups, variables), expected, rtol=1e-5)
