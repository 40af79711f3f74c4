"""The law: masked and slimmed are the same function, on every model, under every transform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.scipy import special

import compaware_jax as ca
from compaware_jax.coupling.derivatives import derivative_of
from compaware_jax.coupling.trace import flatten, trace
from compaware_jax.law import distance, law_errors, random_keep
from compaware_jax.models import autoencoder
from tests.models import MODELS
from tests.programs import random_program

pytestmark = pytest.mark.usefixtures("x64")
TOLERANCE = 1e-10


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_law_on_models(model, share):
    apply, variables, args = model
    groups = ca.find_groups(apply, variables, *args, boundary=share == 0.5)
    keep = random_keep(groups, np.random.default_rng(int(10 * share)), share)
    assert not keep.all()
    assert max(law_errors(apply, variables, *args, keep=keep, groups=groups)) <= TOLERANCE


@pytest.mark.parametrize(("preset", "boundary"), [("dense", False), ("conv", True)])
def test_law_on_autoencoders(preset, boundary):
    model = autoencoder(preset)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda s: rng.normal(size=s.shape) * 0.1, jax.eval_shape(model.init, jax.random.key(0))
    )
    image = jnp.asarray(rng.random((2, 28, 28, 1)))
    groups = ca.find_groups(model.apply, variables, image, boundary=boundary)
    # Of the images in the middle of the convolutional one, too, positions can be left unread and unwritten.
    assert sum(group.boundary and group.units == 7 * 7 for group in groups.groups) == 2 * boundary
    for share in (0.3, 0.7):
        keep = random_keep(groups, rng, share)
        errors = law_errors(model.apply, variables, image, keep=keep, groups=groups)
        assert max(errors) <= TOLERANCE


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.3, 0.7]),
    cut=st.sampled_from([{}, {"boundary": True}, {"within_heads": True}]),
)
def test_law_on_random_programs(seed, share, cut):
    apply, variables, x = random_program(seed)
    groups = ca.find_groups(apply, variables, x, strict=True, **cut)
    keep = random_keep(groups, np.random.default_rng(seed), share)
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= TOLERANCE


def small_model(model, share=0.5):
    apply, variables, args = model
    groups = ca.find_groups(apply, variables, *args)
    keep = random_keep(groups, np.random.default_rng(0), share)
    plan = ca.plan_units(groups, keep)
    masked = jax.jit(partial(ca.apply_mask, groups))(jnp.asarray(keep, float), variables)
    return apply, masked, ca.slim(apply, plan), ca.shrink(variables, plan), args


def test_eager_equals_jit(model):
    apply, masked, small_apply, small, args = small_model(model)
    eager = small_apply(small, *args)
    assert distance(jax.jit(small_apply)(small, *args), eager) <= TOLERANCE
    assert distance(eager, apply(masked, *args)) <= TOLERANCE


def test_other_batch_sizes(model):
    apply, masked, small_apply, small, args = small_model(model)
    for batch in (1, 7):
        resized = [np.resize(x, (batch, *x.shape[1:])) for x in args]
        got, expected = jax.jit(small_apply)(small, *resized), jax.jit(apply)(masked, *resized)
        assert distance(got, expected) <= TOLERANCE


def test_vmap_over_variables(model):
    apply, masked, small_apply, small, args = small_model(model)
    twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), small)
    got = jax.jit(jax.vmap(partial(_swapped, small_apply), in_axes=(None, 0)))(args, twice)
    full = jax.jit(apply)
    expected = jax.tree.map(
        lambda a, b: jnp.stack([a, b]),
        full(masked, *args),
        full(jax.tree.map(lambda x: 2 * x, masked), *args),
    )
    assert distance(got, expected) <= TOLERANCE


def _swapped(apply, args, variables):
    return apply(variables, *args)


def test_second_derivative(model, request):
    if jax.default_backend() != "cpu" and request.node.callspec.id == "mobile":
        pytest.skip("that of max pooling has reduced precision on accelerators")
    apply, masked, small_apply, small, args = small_model(model)

    def curvature(f, variables):
        def along(t):
            return f(jax.tree.map(lambda x: x * (1 + t), variables), *args).sum()

        return jax.jit(jax.grad(jax.grad(along)))(0.1)

    assert distance(curvature(small_apply, small), curvature(apply, masked)) <= TOLERANCE


def test_export(model):
    apply, masked, small_apply, small, args = small_model(model)
    exported = jax.export.export(jax.jit(small_apply))(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args),
    )
    assert distance(exported.call(small, *args), apply(masked, *args)) <= TOLERANCE


def test_small_function_is_small():
    """No operation of the slimmed autoencoder runs at the full width of what was cut."""
    model = autoencoder("dense")
    variables = jax.eval_shape(model.init, jax.random.key(0))
    groups = ca.find_groups(model.apply, variables, np.zeros((1, 28, 28, 1)))
    keep = np.arange(groups.units) % 4 == 0
    plan = ca.plan_units(groups, keep)
    small = jax.eval_shape(lambda v: ca.shrink(v, plan), variables)
    jaxpr = str(jax.make_jaxpr(ca.slim(model.apply, plan))(small, np.zeros((1, 28, 28, 1))))
    assert ",512]" not in jaxpr
    assert ",256]" not in jaxpr


def test_released_latent_comes_out_smaller():
    model = autoencoder("dense")
    variables = model.init(jax.random.key(0))
    image = jnp.asarray(np.random.default_rng(0).random((2, 28, 28, 1)))
    groups = ca.find_groups(model.apply, variables, image, released=("latent",))
    keep = np.ones(groups.units, bool)
    latent = next(g for g in groups.groups if g.coupling)
    keep[latent.offset + 3] = False
    plan = ca.plan_units(groups, keep)
    small = ca.shrink(variables, plan)
    out = ca.slim(model.apply, plan)(small, image)["latent"]
    encoded = ca.slim(model.encode, plan, released=("",))(small, image)
    assert out.shape == (2, 31)
    np.testing.assert_allclose(out, encoded, rtol=1e-6)
    expected = np.delete(np.asarray(model.encode(variables, image)), 3, axis=1)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@jax.custom_jvp
def _needs_first_channel(h, w):
    return h @ w


@_needs_first_channel.defjvp
def _(primals, tangents):
    (h, w), (dh, dw) = primals, tangents
    return h @ w, (dh @ w + h @ dw) * (1 + h[..., :1] ** 2)


@jax.custom_vjp
def _centralised(x):
    return x


_centralised.defvjp(lambda x: (x, None), lambda _, g: (g - g.mean(-1, keepdims=True),))


@jax.custom_jvp
def _mixing(x):
    return jnp.tanh(x)


_mixing.defjvps(lambda t, ans, x: t + t.mean(-1, keepdims=True))


@jax.custom_jvp
def _halves(x):
    return jnp.tanh(x)


_halves.defjvps(lambda t, ans, x: t * jnp.concatenate([x[:, :4] ** 2, x[:, 4:] ** 2], -1))

_passing, _averaging = jax.custom_jvp(jax.nn.relu), jax.custom_jvp(jax.nn.relu)
_passing.defjvps(lambda t, ans, x: t)
_averaging.defjvps(lambda t, ans, x: t + t.mean(-1, keepdims=True))

TWO_ARGUMENTS = (special.xlogy, special.xlog1py, jnp.logaddexp, jnp.logaddexp2)

DERIVATIVE_RULES = {
    "needs one channel": lambda v, x: _needs_first_channel(jnp.tanh(x @ v["a"]), v["b"]),
    "mixes cotangents, then a sum": lambda v, x: (
        jnp.tanh(x @ v["a"]) @ v["b"] + _centralised(x @ v["a"]).sum(-1, keepdims=True)
    ),
    "mixes tangents, then a sum": lambda v, x: (
        _mixing(x @ v["a"]).sum(-1, keepdims=True) + (x @ v["a"]) @ v["b"]
    ),
    "two rules for one function of JAX": lambda v, x: (
        _passing(x @ v["a"]) @ v["b"] + _averaging(x @ v["a"]).sum(-1, keepdims=True)
    ),
    "its pieces can empty": lambda v, x: _halves(x @ v["a"]) @ v["b"],
}


@pytest.mark.parametrize("name", DERIVATIVE_RULES)
def test_law_under_custom_derivative_rules(name):
    """Rules whose derivative reaches across channels, though their value does not."""
    apply = DERIVATIVE_RULES[name]
    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(3, 8)), "b": rng.normal(size=(8, 2))}
    x = rng.normal(size=(5, 3))
    groups = ca.find_groups(apply, variables, x)
    assert groups.units == 8
    for keep in (np.arange(8) < 2, np.arange(8) % 3 > 0):
        assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= TOLERANCE


@pytest.mark.parametrize(
    "function",
    [jax.nn.relu, special.xlogy, special.xlog1py, special.log_ndtr, jnp.sinc, jnp.logaddexp, jnp.logaddexp2],
)
def test_rules_of_jax_do_not_ask_for_sizes(function):
    """Their answers at one size are taken for those at others."""

    def steps(*shape):
        arguments = [jnp.ones(shape)] * (2 if function in TWO_ARGUMENTS else 1)
        program = trace(lambda v: function(*v), arguments)
        calls = [eqn for eqn in program.block.equations if eqn.bodies]
        return [
            [(eqn.primitive, [len(x) for x in eqn.in_shapes]) for eqn in rule.block.equations]
            for rule in (flatten(derivative_of(call), leaves=()) for call in calls)
        ]

    found = steps(2, 3)
    assert found == steps(1, 2) == steps(64, 128) == steps(1000, 1)
    # In JAX 0.12, sinc has no rule of its own.
    assert found or (function is jnp.sinc and jax.__version_info__ >= (0, 11))


@pytest.mark.parametrize(("power", "units"), [(-1, 0), (-2, 0), (2, 4), (2.5, 4), (0.5, 0)])
def test_powers_that_are_infinite_at_zero_stay_whole(power, units):
    def apply(v, x):
        return jax.nn.relu(x @ v["a"]) ** power @ v["b"]

    variables = {"a": np.ones((3, 4)), "b": np.ones((4, 2))}
    assert ca.find_groups(apply, variables, np.ones((2, 3))).units == units


def test_small_function_follows_the_dtype_of_its_variables():
    apply, _, small_apply, small, args = small_model(MODELS["mlp"]())
    cast = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (small, args))
    assert small_apply(cast[0], *cast[1]).dtype == jnp.bfloat16

    def scaled(v, x, factor):
        return apply(v, x) * factor

    groups = ca.find_groups(scaled, MODELS["mlp"]()[1], *args, 2.0)
    plan = ca.plan_units(groups, np.ones(groups.units, bool))
    cast = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (MODELS["mlp"]()[1], args))
    assert ca.slim(scaled, plan)(cast[0], *cast[1], 2.0).dtype == jnp.bfloat16
