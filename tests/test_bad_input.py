"""Inputs that are odd or wrong: handled, or refused with what to do."""

import inspect
import subprocess
import sys

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintParamViolation
from flax import linen, nnx
from jaxtyping import TypeCheckError

import compaware_jax as ca
from compaware_jax.coupling.model_objects import check_function
from compaware_jax.errors import PlanError, TraceError
from compaware_jax.law import law_errors

RNG = np.random.default_rng(0)


def two_layers(v, x):
    return jnp.tanh(x @ v["a"]) @ v["b"]


def variables(**more):
    return {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(4, 2)), **more}


X = RNG.normal(size=(2, 3))


def test_types_are_checked_in_tests():
    groups = ca.find_groups(two_layers, variables(), X)
    with pytest.raises(BeartypeCallHintParamViolation, match="parameter plan=5"):
        ca.slim(two_layers, 5)
    with pytest.raises(TypeCheckError, match="checking the parameters"):
        ca.mask(groups, np.ones((4, 1)), variables())


def test_leaf_that_is_no_array():
    with pytest.raises(TraceError, match=r"`name` is str, expected an array.*functools.partial"):
        ca.find_groups(two_layers, variables(name="net"), X)


class _Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(x)


@pytest.mark.parametrize(
    ("function", "given", "adapter"),
    [
        (_Linen(), variables(), "linen"),
        (_Linen().apply, _Linen(), "linen"),
        (nnx.Linear(3, 2, rngs=nnx.Rngs(0)), X, "nnx"),
        (eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), X, "equinox"),
        (lambda m, x: m(x[0]), eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), "equinox"),
        (hk.transform(lambda x: hk.Linear(2)(x)), variables(), "haiku"),
    ],
)
def test_model_objects_are_for_adapters(function, given, adapter):
    message = rf"find_groups: a model object, .*compaware_jax\.adapters\.{adapter}\.functional"
    with pytest.raises(TraceError, match=message):
        check_function(function, given, "find_groups")
    if callable(function):
        with pytest.raises(TraceError, match=message):
            ca.find_groups(function, given, X)


def test_modules_that_are_trees_of_arrays_are_variables():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    call = eqx.filter_jit(lambda m, x: eqx.combine(m, static)(x))
    assert ca.find_groups(call, arrays, X[0]).sizes.tolist() == [4]
    module = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    assert ca.find_groups(lambda m, x: m(x), module, X).sizes.tolist() == [4]


def test_python_number_among_the_variables():
    with pytest.raises(TraceError, match="`scale` is float, expected an array"):
        ca.find_groups(two_layers, variables(scale=2.0), X)


def test_flags_among_the_inputs():
    def apply(v, x, train):
        return two_layers(v, x) * (2 if train else 1)

    for call in (
        lambda: ca.find_groups(apply, variables(), X, True),
        lambda: ca.find_groups(apply, variables(), X, train=False),
    ):
        with pytest.raises(TraceError, match=r"decides by \['train'\], which are traced.*functools\.partial"):
            call()


def test_input_that_is_no_array():
    with pytest.raises(TraceError, match=r"the input `mode` is str, expected an array.*functools\.partial"):
        ca.find_groups(lambda v, x, mode: two_layers(v, x), variables(), X, mode="train")


def test_random_keys_of_another_kind(environment):
    """The kind is set before all imports, as is usual on TPUs."""
    code = "import jax, compaware_jax as ca; print(jax.random.key(0).dtype)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment() | {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "rbg" in run.stdout


def test_two_leaves_of_one_path():
    with pytest.raises(TraceError, match=r"two leaves .* have the path `c/d`.*Rename a key"):
        ca.find_groups(two_layers, variables(**{"c": {"d": np.ones(3)}, "c/d": np.ones(3)}), X)


def test_shape_that_depends_on_data():
    def apply(v, x):
        return two_layers(v, x[x[:, 0] > 0])

    with pytest.raises(TraceError, match=r"cannot be traced.*NonConcreteBooleanIndexError"):
        ca.find_groups(apply, variables(), X)


def test_python_branch_on_data():
    def apply(v, x):
        return two_layers(v, x) if x.sum() > 0 else x @ v["a"] @ v["b"]

    with pytest.raises(TraceError, match=r"cannot be traced.*TracerBoolConversionError"):
        ca.find_groups(apply, variables(), X)


def test_side_effects_happen_at_trace_time_only():
    calls = []

    def apply(v, x):
        calls.append(1)
        return two_layers(v, x)

    groups = ca.find_groups(apply, variables(), X)
    assert len(calls) == 1
    small = jax.jit(ca.slim(apply, ca.plan_units(groups, np.arange(4) < 2)))
    arrays = ca.shrink(variables(), ca.plan_units(groups, np.arange(4) < 2))
    small(arrays, X)
    small(arrays, X)
    assert len(calls) == 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.int8, np.bool_])
def test_integer_and_flag_leaves(dtype):
    """Quantised weights and pruning masks leave with their channels."""
    quantised = variables(q=(RNG.normal(size=(3, 4)) > 0).astype(dtype), s=RNG.normal(size=4))

    def apply(v, x):
        return jnp.tanh(x @ (v["q"].astype(float) * v["s"])) @ v["b"] + 0 * v["a"].sum()

    groups = ca.find_groups(apply, quantised, X)
    plan = ca.plan_units(groups, np.isin(groups.group_of_unit, [0]) & (np.arange(groups.units) != 1))
    small = ca.shrink(quantised, plan)
    assert small["q"].dtype == dtype
    assert small["q"].shape == (3, 3)
    masked = ca.apply_mask(groups, (np.arange(groups.units) != 1).astype(float), quantised)
    np.testing.assert_allclose(ca.slim(apply, plan)(small, X), apply(masked, X), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_complex_leaves():
    spectral = {
        "a": RNG.normal(size=(3, 4)) + 1j * RNG.normal(size=(3, 4)),
        "b": RNG.normal(size=(4, 2)) + 0j,
    }

    def apply(v, x):
        h = x @ v["a"]
        return ((h * jnp.conj(h)) @ v["b"]).real

    groups = ca.find_groups(apply, spectral, X)
    assert groups.units == 4
    keep = np.array([True, False, True, True])
    plan = ca.plan_units(groups, keep)
    masked = ca.apply_mask(groups, keep.astype(float), spectral)
    got = ca.slim(apply, plan)(ca.shrink(spectral, plan), X)
    np.testing.assert_allclose(got, apply(masked, X), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_empty_axes():
    """A batch of nothing, and a layer that joins nothing."""

    def apply(v, x):
        return jnp.concatenate([jnp.tanh(x @ v["a"]), x @ v["none"]], -1) @ v["b"]

    tree = variables(none=np.zeros((3, 0)))
    groups = ca.find_groups(apply, tree, X)
    assert groups.units == 4
    plan = ca.plan_units(groups, np.arange(4) < 3)
    assert ca.slim(apply, plan)(ca.shrink(tree, plan), np.zeros((0, 3))).shape == (0, 2)


def test_output_that_shows_the_channels_keeps_them():
    def apply(v, x):
        h = jnp.tanh(x @ v["a"])
        return h @ v["b"], h

    groups = ca.find_groups(apply, variables(), X)
    assert groups.units == 0
    assert "output `1`" in str(groups)


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=jax.typeof(x).weak_type), tree
    )


@pytest.mark.usefixtures("x64")
def test_ignored_leaf_stays_as_it_is():
    groups = ca.find_groups(two_layers, variables(spare=np.ones((4, 4))), X)
    assert groups.unread == ("spare",)
    plan = ca.plan_units(groups, np.arange(4) < 2)
    assert ca.shrink(variables(spare=np.ones((4, 4))), plan)["spare"].shape == (4, 4)
    tree = variables(spare=np.ones((4, 4)))
    assert max(law_errors(two_layers, tree, X, keep=np.arange(4) < 2, groups=groups)) <= 1e-10


def test_weakly_typed_inputs():
    def apply(v, x, scale):
        return two_layers(v, x) * scale

    groups = ca.find_groups(apply, variables(), X, 2.0)
    plan = ca.plan_units(groups, np.arange(4) < 2)
    small = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), ca.shrink(variables(), plan))
    assert ca.slim(apply, plan)(small, jnp.asarray(X, jnp.bfloat16), 2.0).dtype == jnp.bfloat16


def test_weakly_typed_variables():
    """`jnp.array(2.0)` gives way to the dtypes that it meets, in the small function as in the dense one."""

    def scaled(v, x):
        hidden = jnp.tanh(x @ v["a"]) * v["scale"] * v["scales"]
        return jax.lax.scan(lambda c, _: (c * v["scale"], None), hidden, length=2)[0] @ v["b"]

    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), variables())
    tree = narrow | {"scale": jnp.array(2.0), "scales": jnp.full((4,), 3.0)}
    x = jnp.asarray(X, jnp.bfloat16)
    groups = ca.find_groups(scaled, tree, x)
    plan = ca.plan_units(groups, np.arange(4) < 2)
    small, masked = ca.shrink(tree, plan), ca.apply_mask(groups, 1.0 * (np.arange(4) < 2), tree)
    apart = {"scale", "scales"}
    for changed in (small, masked, ca.expand(small, plan), ca.shrink(abstract(tree), plan)):
        assert {name for name, leaf in changed.items() if leaf.weak_type} == apart
    assert ca.slim(scaled, plan)(small, x).dtype == scaled(masked, x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(ca.slim(scaled, plan)(small, x), scaled(masked, x))


def test_rows_that_this_input_does_not_read_stay():
    """A position table longer than the example: its other rows may be read by the next input."""

    def apply(v, x):
        return jnp.tanh(x @ v["a"] + v["positions"][: x.shape[0]]) @ v["b"]

    tree = variables(positions=RNG.normal(size=(16, 4)))
    groups = ca.find_groups(apply, tree, X)
    assert groups.units == 4
    assert ("positions", 0, 16) in [(f.path, f.axis, f.indices) for f in groups.fixed]
    plan = ca.plan_units(groups, np.arange(4) < 2)
    longer = RNG.normal(size=(9, 3))
    assert ca.slim(apply, plan)(ca.shrink(tree, plan), longer).shape == (9, 2)


def test_state_that_names_nothing_or_changes_shape():
    def apply(v, x):
        return two_layers(v, x), {"a": v["a"].T}

    with pytest.raises(TraceError, match=r"state_outputs=.'2': ''. joins no output to a leaf"):
        ca.find_groups(apply, variables(), X, state_outputs={"2": ""})
    with pytest.raises(TraceError, match=r"the state `1/a` has shape \(4, 3\), its leaf `a` \(3, 4\)"):
        ca.find_groups(apply, variables(), X, state_outputs={"1": ""})


def test_plan_of_another_function():
    groups = ca.find_groups(two_layers, variables(), X)
    plan = ca.plan_units(groups, np.arange(4) >= 2)

    def other(v, x):
        return two_layers(v, x) + v["a"].sum(0)[:2]

    with pytest.raises(PlanError, match=r"separates channels|needs whole"):
        ca.slim(other, plan)(ca.shrink(variables(), plan), X)


def test_symbolic_batch_is_refused_and_its_remedy_works():
    def apply(v, x):
        return jnp.tanh(x.reshape(x.shape[0], -1) @ v["a"]) @ v["b"]

    rng = np.random.default_rng(0)
    variables = {"a": jnp.asarray(rng.normal(size=(6, 8))), "b": jnp.asarray(rng.normal(size=(8, 2)))}
    plan = ca.plan_units(ca.find_groups(apply, variables, jnp.ones((1, 2, 3))), np.arange(8) < 5)
    small, small_apply = ca.shrink(variables, plan), ca.slim(apply, plan)
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 2, 3), jnp.float32)
    with pytest.raises(TraceError, match=r"symbolic shape.*vmap"):
        jax.export.export(jax.jit(lambda x: small_apply(small, x)))(x)
    exported = jax.export.export(jax.jit(jax.vmap(lambda x: small_apply(small, x[None])[0])))(x)
    images = jnp.asarray(rng.normal(size=(5, 2, 3)))
    np.testing.assert_allclose(exported.call(images), small_apply(small, images), rtol=1e-5)


def test_gates_of_another_length():
    groups = ca.find_groups(two_layers, variables(), X)
    for gates in (np.ones(3), np.ones(5), np.ones((4, 1))):
        with pytest.raises(PlanError, match=r"expected one per unit, \(4,\)"):
            # Without the annotations that tests check.
            inspect.unwrap(ca.mask)(groups, gates, variables())


def test_law_where_the_masked_function_is_not_finite():
    def apply(v, x):
        h = jax.nn.relu(x @ v["a"]) @ v["b"]
        return {"h": h, "direction": h / jnp.linalg.norm(h, axis=-1, keepdims=True)}

    variables = {"a": jnp.array([[1.0, -1.0], [1.0, -1.0]]), "b": jnp.ones((2, 3))}
    groups = ca.find_groups(apply, variables, jnp.ones((1, 2)))
    with pytest.raises(PlanError, match=r"outputs .* not finite at \['direction'\].*whole="):
        law_errors(apply, variables, jnp.ones((1, 2)), keep=np.array([False, True]), groups=groups)


@pytest.mark.usefixtures("x64")
def test_law_where_the_small_function_is_not_finite():
    """No maximum over errors may pass over what is not a number."""

    def apply(v, x):
        return jnp.tanh(x @ v["a"]) @ v["b"]

    def broken(apply, plan):
        small = ca.slim(apply, plan)
        return lambda v, x: jnp.where(x.sum() > -99, jnp.nan, small(v, x))

    variables, x = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(4, 2))}, RNG.normal(size=(5, 3))
    groups = ca.find_groups(apply, variables, x)
    keep = np.array([1, 0, 1, 1], bool)
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= 1e-10
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups, slimmer=broken)) == np.inf


@pytest.mark.usefixtures("x64")
def test_law_of_a_loop_of_unknown_length():
    def apply(v, x):
        def body(state):
            return jnp.tanh(jnp.tanh(state @ v["a"]) @ v["b"]) + 0.1

        return jax.lax.while_loop(lambda s: jnp.abs(s).sum() < 20, lambda s: s + body(s), x)

    variables, x = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(4, 3))}, np.full((2, 3), 0.3)
    groups = ca.find_groups(apply, variables, x)
    keep = np.array([1, 0, 1, 1], bool)
    with pytest.raises(ValueError, match="while_loop"):
        law_errors(apply, variables, x, keep=keep, groups=groups)
    assert law_errors(apply, variables, x, keep=keep, groups=groups, gradients=False)[0] <= 1e-10
