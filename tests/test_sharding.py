"""On more than one device: arrays stay where they are, sharded as they were, and nothing else changes."""

import contextlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import compaware_jax as ca
from compaware_jax import importance
from tests import tasks

FEATURES, WIDTH = 6, 16
SPECS = {
    "first": {"w": P(None, "devices"), "b": P("devices")},
    "second": {"w": P("devices", None), "scale": P()},
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(kind):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    return jax.make_mesh((2,), ("devices",), axis_types=(kind,))


@pytest.fixture(params=KINDS)
def mesh(request):
    mesh = mesh_of(KINDS[request.param])
    with jax.set_mesh(mesh):
        yield mesh


def drawn():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "first": {"w": jax.random.normal(keys[0], (FEATURES, WIDTH)), "b": jnp.ones(WIDTH)},
        "second": {"w": jax.random.normal(keys[1], (WIDTH, FEATURES)), "scale": jnp.ones(FEATURES // 2)},
    }


def sharded(variables, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), variables, specs)


def apply(variables, x):
    """Columns, then rows, in parallel; where features are repeated, JAX leaves the mesh to its compiler."""
    hidden = jax.nn.relu(x @ variables["first"]["w"] + variables["first"]["b"])
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    out_sharding = jax.typeof(x).sharding if explicit else None
    result = jnp.einsum("bi,ij->bj", hidden, variables["second"]["w"], out_sharding=out_sharding)
    return result * jnp.repeat(variables["second"]["scale"], 2)


def images(spec, mesh):
    x = jax.random.normal(jax.random.key(1), (8, FEATURES))
    return jax.device_put(x, NamedSharding(mesh, spec))


@pytest.mark.parametrize("parallel", ["model", "data"])
@pytest.mark.parametrize("kept", [8, 5])
def test_sharded_variables(mesh, parallel, kept):
    specs = (
        SPECS
        if parallel == "model"
        else jax.tree.map(lambda _: P(), SPECS, is_leaf=lambda s: isinstance(s, P))
    )
    variables = sharded(drawn(), mesh, specs)
    x = images(P("devices") if parallel == "data" else P(), mesh)
    groups = ca.find_groups(apply, variables, x)
    flags = np.random.default_rng(kept).permutation(WIDTH) < kept
    plan = ca.plan_units(groups, np.concatenate([flags, np.ones(groups.units - WIDTH, bool)]))
    small = ca.shrink(variables, plan)
    for path, leaf in jax.tree.leaves_with_path(small):
        assert leaf.sharding.mesh == mesh
        want = specs[path[0].key][path[1].key]
        # Five columns do not divide by two devices.
        assert tuple(leaf.sharding.spec) == (tuple(want) if kept == 8 else (None,) * len(want)), path
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), variables)
    assert jax.tree.map(lambda a: a.sharding, ca.shrink(abstract, plan)) == jax.tree.map(
        lambda a: a.sharding, small
    )
    small_apply = ca.slim(apply, plan)
    masked = ca.expand(small, plan)
    np.testing.assert_allclose(small_apply(small, x), apply(masked, x), atol=1e-5)
    got, want = (
        jax.jit(jax.grad(lambda v, f=f: (f(v, x) ** 2).sum()))(v)
        for f, v in ((small_apply, small), (apply, masked))
    )
    chex.assert_trees_all_close(got, ca.shrink(want, plan), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parallel", ["model", "data"])
def test_compress(mesh, parallel):
    """The whole way on two devices ends in the plan that one device finds."""
    spec = P("devices") if parallel == "data" else P()

    def batches(step):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(2), step), (8, FEATURES))
        return jax.lax.with_sharding_constraint(x, spec) if auto else jax.sharding.reshard(x, spec)

    def loss(apply, variables, x):
        return jnp.mean((apply(variables, x) - jnp.sin(x)) ** 2)

    auto = mesh.axis_types == (AxisType.Auto,)
    settings = {"budget": ca.params(0.4), "search": tasks.SEARCH, "fine_tune": 30, "progress": False}
    variables = sharded(drawn(), mesh, SPECS) if parallel == "model" else drawn()
    groups = ca.find_groups(apply, variables, images(spec, mesh))
    result = ca.compress(apply, variables, loss, batches, groups=groups, **settings)
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:1]), "devices")):
        auto, spec = True, P()
        alone = ca.compress(apply, drawn(), loss, batches, groups=groups, **settings)
    assert result.plan == alone.plan
    chex.assert_trees_all_close(result.variables, alone.variables, rtol=1e-3, atol=1e-3)


def test_a_mesh_that_is_not_set():
    """Types name it all the same; constants of the trace are not evaluated for it then."""
    mesh = mesh_of(AxisType.Explicit)
    variables = jax.device_put({"a": jnp.ones((8, 6)), "b": jnp.ones((6, 8))}, NamedSharding(mesh, P()))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (4, 8)), NamedSharding(mesh, P("devices")))

    def hidden(v, x):
        return jnp.tanh(x @ v["a"]) @ v["b"]

    groups = ca.find_groups(hidden, variables, x)
    result = ca.compress(
        hidden, variables, tasks.loss, lambda step: x, groups=groups, budget=ca.params(0.5), fine_tune=2,
        criteria=[ca.at_most("loss", tasks.loss, 50.0)], held_out=x, search=ca.GradientSearch(steps=2),
        progress=False,
    )  # fmt: skip
    assert result.kept


def test_the_context_of_an_equation():
    """Random numbers are drawn in the way that the function chose where it drew them."""

    def noisy(variables, x):
        with jax.threefry_partitionable(False):
            noise = jax.random.normal(jax.random.key(0), x.shape)
        return jax.nn.relu((x + noise) @ variables["w"]) @ variables["v"]

    keys = jax.random.split(jax.random.key(3), 3)
    variables = {"w": jax.random.normal(keys[0], (4, 8)), "v": jax.random.normal(keys[1], (8, 2))}
    x = jax.random.normal(keys[2], (3, 4))
    groups = ca.find_groups(noisy, variables, x)
    plan = ca.plan_units(groups, np.arange(8) % 2 == 0)
    small = ca.shrink(variables, plan)
    np.testing.assert_allclose(ca.slim(noisy, plan)(small, x), noisy(ca.expand(small, plan), x), rtol=1e-5)


def both(apply, variables, x):
    """The small function's result and the masked one's."""
    groups = ca.find_groups(apply, variables, x)
    plan = ca.plan_units(groups, np.arange(groups.units) % 4 < 2)
    assert any(kept < all_of_it for _, kept, all_of_it in plan.counts)
    small = ca.shrink(variables, plan)
    return ca.slim(apply, plan)(small, x), apply(ca.expand(small, plan), x)


def mlp(variables, x):
    return jax.nn.softmax(jax.nn.relu(x @ variables["w"])) @ variables["v"]


@pytest.fixture
def explicit_mesh():
    return mesh_of(AxisType.Explicit)


@pytest.fixture
def weights():
    keys = jax.random.split(jax.random.key(5), 2)
    return {"w": jax.random.normal(keys[0], (6, 8)), "v": jax.random.normal(keys[1], (8, 6))}


@pytest.mark.parametrize("set_mesh", [False, True])
def test_shards_gathered_for_use(explicit_mesh, weights, set_mesh):
    """Stored in shards, whole where they are used: `reshard`, and arrays whose types alone name the mesh."""

    def gathered(variables, x):
        whole = NamedSharding(jax.typeof(x).sharding.mesh, P())
        return mlp(jax.tree.map(lambda w: jax.sharding.reshard(w, whole), variables), x)

    stored = jax.tree.map(lambda w: jax.device_put(w, NamedSharding(explicit_mesh, P("devices"))), weights)
    x = images(P("devices"), explicit_mesh)
    with jax.set_mesh(explicit_mesh) if set_mesh else contextlib.nullcontext():
        got, want = both(gathered, stored, x)
        groups = ca.find_groups(gathered, stored, x)
        scores = importance.activation(groups, stored, x)
        far = importance.fpgm(groups, stored)
    np.testing.assert_allclose(got, want, atol=1e-5)
    alone = ca.find_groups(mlp, weights, np.asarray(x))
    np.testing.assert_allclose(far, importance.fpgm(alone, weights), rtol=1e-4)
    np.testing.assert_allclose(scores, importance.activation(alone, weights, np.asarray(x)), rtol=1e-4)


def test_heads_on_devices(explicit_mesh):
    """Two devices' worth of columns, one head: the axis that does not divide is whole on both."""

    def attention(variables, x):
        q, k, v = ((x @ variables[name]).reshape(8, 2, 4) for name in "qkv")
        mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k)), v)
        return jnp.einsum("ti,io->to", mixed.reshape(8, 8), variables["o"], out_sharding=P(None, None))

    keys = dict(zip("qkvo", jax.random.split(jax.random.key(6), 4), strict=True))
    with jax.set_mesh(explicit_mesh):
        variables = {
            name: jax.device_put(
                jax.random.normal(key, (8, 6) if name == "o" else (6, 8)),
                NamedSharding(explicit_mesh, P("devices", None) if name == "o" else P(None, "devices")),
            )
            for name, key in keys.items()
        }
        x = images(P(), explicit_mesh)
        groups = ca.find_groups(attention, variables, x)
        plan = ca.plan_units(groups, np.array([True, False]))
        small = ca.shrink(variables, plan)
        got = jax.jit(ca.slim(attention, plan))(small, x)
        masked = jax.tree.map(np.asarray, ca.expand(small, plan))
    q, k, v = ((np.asarray(x) @ masked[name]).reshape(8, 2, 4) for name in "qkv")
    mixed = np.einsum("hts,shd->thd", jax.nn.softmax(np.einsum("thd,shd->hts", q, k)), v)
    np.testing.assert_allclose(got, mixed.reshape(8, 8) @ masked["o"], atol=1e-4)


def test_called_in_another_context(explicit_mesh, weights):
    """What the caller chooses holds for this call, whatever it was when the function was first called."""

    def noisy(variables, x):
        return mlp(variables, x + jax.random.normal(jax.random.key(0), x.shape))

    x = jax.random.normal(jax.random.key(7), (8, 6))
    groups = ca.find_groups(noisy, weights, x)
    plan = ca.plan_units(groups, np.arange(8) % 2 == 0)
    small, small_apply = ca.shrink(weights, plan), ca.slim(noisy, plan)
    masked = ca.expand(small, plan)
    auto = jax.sharding.Mesh(np.array(jax.devices()[:2]), "devices")
    # Made one by one: `jax.set_mesh` sets the mesh when it is called.
    contexts = (
        contextlib.nullcontext,
        lambda: jax.threefry_partitionable(False),
        lambda: jax.set_mesh(explicit_mesh),
        lambda: jax.set_mesh(auto),
        contextlib.nullcontext,
    )
    for context in contexts:
        with context():
            # Compiled anew each time, as what is called is another function.
            got, expected = (jax.jit(partial(f))(v, x) for f, v in ((small_apply, small), (noisy, masked)))
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_shuffled_and_transformed_channels_of_a_sharded_batch(mesh):
    """What stays whole between reshapes, and what is filled up for a transform, keep the batch's sharding."""

    def shuffling(variables, x):
        h = x @ variables["first"]["w"] + variables["first"]["b"]
        h = h.reshape(-1, 2, WIDTH // 2).swapaxes(1, 2).reshape(-1, WIDTH)
        return (h + jnp.fft.fft(h).real) @ variables["second"]["w"]

    variables = drawn()
    variables = sharded(variables, mesh, jax.tree.map(lambda _: P(), variables))
    x = images(P("devices"), mesh)
    groups = ca.find_groups(shuffling, variables, x)
    assert groups.units == WIDTH
    plan = ca.plan_units(groups, np.arange(WIDTH) % 3 != 1)
    small = ca.slim(shuffling, plan)(ca.shrink(variables, plan), x)
    expected = shuffling(ca.expand(ca.shrink(variables, plan), plan), x)
    assert small.sharding.is_equivalent_to(expected.sharding, 2)
    np.testing.assert_allclose(small, expected, rtol=1e-5, atol=1e-5)
