"""Masked variables are the same, computed on the host or in a program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax.errors import PlanError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3)).astype(np.float32)


def apply(v, x):
    read = x @ (v["first"] * v["flags"] * v["steps"]).astype(jnp.float32)
    return jnp.tanh(read) @ v["last"].real + jax.random.normal(v["key"], (2,))


def variables(dtype):
    return {
        "first": jnp.asarray(RNG.normal(size=(3, 4)), dtype),
        "flags": jnp.array([True, False, True, True]),
        "key": jax.random.key(0),
        "last": jnp.asarray(RNG.normal(size=(4, 2)) + 1j),
        "steps": jnp.full(4, 2**30 + 1, jnp.int32),
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("gates", [[1.0, 0.0, 1.0, 0.0], [1.0, 0.25, 0.5, 1.0]])
def test_on_the_host_as_in_a_program(dtype, gates):
    given = variables(dtype)
    groups = ca.find_groups(apply, given, X)
    gates = np.array(gates)
    here = ca.apply_mask(groups, gates, given)
    there = jax.jit(partial(ca.apply_mask, groups))(gates, given)
    assert jax.tree.structure(here) == jax.tree.structure(given)
    for name, leaf in given.items():
        assert isinstance(here[name], jax.Array)
        assert here[name].dtype == there[name].dtype == leaf.dtype
        if name == "key":
            assert jax.random.key_data(here[name]).tolist() == jax.random.key_data(leaf).tolist()
        elif name in ("flags", "steps"):
            # Whole until their gate is closed. (Of such integers there are none in float32.)
            np.testing.assert_array_equal(here[name], np.where(gates > 0, leaf, 0))
            np.testing.assert_array_equal(there[name], here[name])
        else:
            np.testing.assert_array_equal(np.asarray(here[name]), np.asarray(there[name]))


def test_nothing_is_compiled_for_what_is_on_the_host(caplog):
    given = {"a": jnp.ones((3, 37)), "b": jnp.ones((37, 2))}
    groups = ca.find_groups(lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"], given, X)
    gates = np.arange(37) % 2
    with jax.log_compiles():
        masked = ca.apply_mask(groups, gates, given)
        assert not caplog.records
        jax.jit(partial(ca.apply_mask, groups))(gates, given)
        assert any("Compiling" in record.getMessage() for record in caplog.records)
    assert masked["a"].sum() == 3 * 18


def test_infinite_leaves_are_masked_without_a_word():
    given = variables(jnp.float32) | {"last": jnp.full((4, 2), -jnp.inf)}
    groups = ca.find_groups(apply, given, X)
    masked = ca.apply_mask(groups, np.array([1.0, 0.0, 1.0, 1.0]), given)
    assert np.isnan(masked["last"][1]).all()
    assert np.isneginf(np.delete(masked["last"], 1, 0)).all()


def test_gates_that_are_not_one_per_unit():
    given = variables(jnp.float32)
    groups = ca.find_groups(apply, given, X)
    for call in (ca.apply_mask, jax.jit(partial(ca.apply_mask, groups))):
        arguments = (groups,) if call is ca.apply_mask else ()
        with pytest.raises(PlanError, match=r"gates have shape \(3,\), expected one per unit, \(4,\)"):
            call(*arguments, np.ones(3), given)
