"""Linen: the law through a module, and the widths to rebuild it with."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import compaware_jax as ca
from compaware_jax.adapters import linen as adapter
from compaware_jax.errors import PlanError, TraceError
from compaware_jax.law import distance, law_errors
from tests.adapters.common import (
    TIGHT,
    cut,
    drawn_init,
    images,
    random_units,
    units_without_every_second,
    without_gradient,
)

# The scale of attention depends on the channels per head, so they stay; whole heads leave.
PER_HEAD = ("query/kernel:2", "value")


class Net(nn.Module):
    conv: int = 6
    depthwise: int = 6
    heads: int = 4
    qkv: int = 8
    stream: int = 6
    hidden: int = 5
    normalise: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(self.conv, (3, 3))(x)))
        x = nn.Conv(self.depthwise, (3, 3), feature_group_count=self.depthwise)(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = nn.MultiHeadDotProductAttention(self.heads, qkv_features=self.qkv, out_features=self.stream)(x)
        if self.normalise:
            x = nn.LayerNorm()(x)
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(x)).mean(1)
        return nn.Dense(3, name="head")(x)


@lru_cache
def prepared(normalise=False):
    module, x = Net(normalise=normalise), images(2, 4, 4, 2)
    apply, variables = adapter.functional(module, drawn_init(module.init, x, train=False), train=False)
    return module, apply, variables, x, ca.find_groups(apply, variables, x)


def rebuilt(counts, normalise=False):
    attention = counts["MultiHeadDotProductAttention_0"]
    return Net(
        conv=counts["Conv_0"]["features"],
        depthwise=counts["Conv_1"]["feature_group_count"],
        heads=attention["num_heads"],
        qkv=attention["qkv_features"],
        stream=attention["out_features"],
        hidden=counts["hidden"]["features"],
        normalise=normalise,
    )


def test_law(x64):
    _, apply, variables, x, groups = prepared(normalise=True)
    assert max(law_errors(apply, variables, x, keep=random_units(groups), groups=groups)) <= TIGHT


def test_law_in_training(x64):
    module, _, variables, x, _ = prepared()
    apply, variables = adapter.functional(module, variables, train=True, mutable=["batch_stats"])
    groups = ca.find_groups(apply, variables, x, state_outputs={"1": ""})
    plan, masked = cut(groups, random_units(groups), variables)
    got, got_updates = jax.jit(ca.slim(apply, plan))(ca.shrink(variables, plan), x)
    expected, expected_updates = jax.jit(apply)(masked, x)
    assert distance(got, expected) <= TIGHT
    assert distance(expected_updates["batch_stats"], variables["batch_stats"]) > TIGHT
    small = ca.shrink(variables, plan)["batch_stats"]
    assert jax.tree.map(jnp.shape, got_updates["batch_stats"]) == jax.tree.map(jnp.shape, small)
    expected_small = ca.shrink({**variables, **expected_updates}, plan)["batch_stats"]
    assert distance(got_updates["batch_stats"], expected_small) <= TIGHT


def test_rebuilt_from_its_configuration(x64):
    module, apply, variables, x, groups = prepared()
    plan, masked = cut(groups, units_without_every_second(groups, *PER_HEAD), variables)
    counts = adapter.feature_counts(module, variables, plan, x, train=False)
    assert set(counts) == {"Conv_0", "Conv_1", "MultiHeadDotProductAttention_0", "hidden", "head"}
    assert counts["Conv_1"]["features"] == counts["Conv_1"]["feature_group_count"] < 6
    assert counts["MultiHeadDotProductAttention_0"]["num_heads"] < 4
    small, small_variables = adapter.functional(rebuilt(counts), ca.shrink(variables, plan), train=False)
    assert adapter.check_rebuilt(small, apply, plan, variables, x) <= TIGHT
    assert distance(jax.jit(small)(small_variables, x), jax.jit(apply)(masked, x)) <= TIGHT


def test_layer_norm_over_a_cut_axis_cannot_be_rebuilt(x64):
    module, apply, variables, x, groups = prepared(normalise=True)
    plan = ca.plan_units(groups, units_without_every_second(groups, *PER_HEAD))
    counts = adapter.feature_counts(module, variables, plan, x, train=False)
    small, _ = adapter.functional(rebuilt(counts, normalise=True), ca.shrink(variables, plan), train=False)
    with pytest.raises(PlanError, match=r"normalisation over a cut axis.* Use `slim`"):
        adapter.check_rebuilt(small, apply, plan, variables, x)


def test_rebuilt_with_wrong_widths(x64):
    _, apply, variables, x, groups = prepared()
    plan = ca.plan_units(groups, units_without_every_second(groups, *PER_HEAD))
    with pytest.raises(PlanError, match=r"check_rebuilt: the model's own code does not run .*Scope"):
        adapter.check_rebuilt(apply, apply, plan, variables, x)
    with pytest.raises(PlanError, match=r"the rebuilt model returns .*, `slim` returns"):
        adapter.check_rebuilt(lambda v, x: 0.0, apply, plan, variables, x)


def test_attention_that_no_arguments_express(x64):
    module, _, variables, x, groups = prepared()
    keep = np.ones(groups.units, bool)
    keep[next(g for g in groups.groups if g.name.endswith("value")).offset] = False
    with pytest.raises(PlanError, match=r"keeps 4 heads of 2 channels for queries and 4 of 1 for values"):
        adapter.feature_counts(module, variables, ca.plan_units(groups, keep), x, train=False)


class Layers(nn.Module):
    """The other layers that have widths."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 6)(tokens)
        x = nn.GroupNorm(num_groups=3)(x)
        x = nn.RNN(nn.GRUCell(5))(x)
        x = nn.DenseGeneral((2, 3))(x)
        x = nn.DenseGeneral(4, axis=(-2, -1))(jnp.tanh(x))
        return nn.ConvTranspose(3, (3,))(x)


def test_counts_of_other_layers():
    module, tokens = Layers(), jnp.arange(6).reshape(2, 3)
    apply, variables = adapter.functional(module, drawn_init(module.init, tokens))
    groups = ca.find_groups(apply, variables, tokens)
    whole = ca.plan_units(groups, np.ones(groups.units, bool))
    assert adapter.feature_counts(module, variables, whole, tokens) == {
        "Embed_0": {"features": 6},
        "GroupNorm_0": {"num_groups": 3},
        "GRUCell_0": {"features": 5},
        "DenseGeneral_0": {"features": (2, 3)},
        "DenseGeneral_1": {"features": 4},
        "ConvTranspose_0": {"features": 3},
    }
    plan = ca.plan_units(groups, units_without_every_second(groups, "Embed_0", "GroupNorm_0"))
    counts = adapter.feature_counts(module, variables, plan, tokens)
    small = ca.shrink(variables, plan)["params"]
    assert counts["DenseGeneral_0"]["features"] == small["DenseGeneral_0"]["kernel"].shape[1:]
    assert counts["DenseGeneral_1"]["features"] == small["ConvTranspose_0"]["kernel"].shape[-2] < 4


def test_method(x64):
    class Coder(nn.Module):
        def setup(self):
            self.inner = nn.Dense(4)
            self.outer = nn.Dense(2)

        def __call__(self, x):
            return self.outer(self.encode(x))

        def encode(self, x):
            return jnp.tanh(self.inner(x))

    x = images(2, 3)
    variables = Coder().init(jax.random.key(0), x)
    encode, variables = adapter.functional(Coder(), variables, method="encode")
    np.testing.assert_array_equal(encode(variables, x), Coder().apply(variables, x, method="encode"))


def test_only_parameters_have_a_gradient(x64):
    """So that `compress`, which trains all variables, leaves running statistics as they are."""
    x = images(4, 3)
    module = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.Dense(2)])
    apply, variables = adapter.functional(module, drawn_init(module.init, x))
    assert without_gradient(apply, variables, x) == {
        f"batch_stats/layers_1/{name}" for name in ("mean", "var")
    }


def test_models_of_the_wrong_type():
    dense = nn.Dense(2)
    variables = dense.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(TraceError, match=r"linen\.functional: got the class Dense, expected an instance"):
        adapter.functional(nn.Dense, variables)
    with pytest.raises(TraceError, match=r"variables have \['kernel', 'bias'\].*Pass what module\.init"):
        adapter.functional(dense, variables["params"])


def test_counts_of_a_cut_boundary_are_refused():
    module = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(2)])
    x = jnp.ones((3, 4))
    apply, variables = adapter.functional(module, module.init(jax.random.key(0), x))
    groups = ca.find_groups(apply, variables, x, boundary=True)
    keep = np.ones(groups.units, bool)
    keep[groups.groups[0].slice] = [True, False, True, True]  # One input is not read.
    with pytest.raises(PlanError, match="read less of an input"):
        adapter.feature_counts(module, variables, ca.plan_units(groups, keep), x)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_counts_of_layers_in_boxes_and_under_vmap(axis):
    class Members(nn.Module):
        width: int = 5

        @nn.compact
        def __call__(self, x):
            kernel = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
            x = jnp.tanh(nn.Dense(6, kernel_init=kernel)(x))
            lifted = nn.vmap(
                nn.Dense,
                variable_axes={"params": axis},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
            )
            return nn.Dense(2)(jnp.tanh(lifted(self.width)(x)).sum(0))

    module, x = Members(), jnp.ones((2, 3))
    apply, variables = adapter.functional(module, module.init(jax.random.key(0), x))
    groups = ca.find_groups(apply, variables, x)
    keep = np.ones(groups.units, bool)
    for units, leaves in ((6, 2), (5, 1)):
        group = next(group for group in groups.groups if group.units == units)
        keep[group.offset : group.offset + leaves] = False
    counts = adapter.feature_counts(module, variables, ca.plan_units(groups, keep), x)
    assert counts["Dense_0"] == {"features": 4}
    assert counts["VmapDense_0"] == {"features": 4}


def test_counts_under_vmap_that_shapes_do_not_tell():
    class Members(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = nn.vmap(
                nn.Dense, variable_axes={"params": -1}, split_rngs={"params": True}, in_axes=None, axis_size=5
            )
            return nn.Dense(2)(jnp.tanh(lifted(5)(x)).sum(0))

    module, x = Members(), jnp.ones((2, 3))
    apply, variables = adapter.functional(module, module.init(jax.random.key(0), x))
    groups = ca.find_groups(apply, variables, x)
    keep = np.arange(groups.units) > 0
    with pytest.raises(PlanError, match=r"sees \(3, 5\), and what is left of it is one of"):
        adapter.feature_counts(module, variables, ca.plan_units(groups, keep), x)


def test_groups_of_a_layer_under_vmap():
    """They lie along an axis that the mapped one must not take the place of."""
    x = jnp.ones((2, 3))
    for axis in (0, -1):
        axes = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
        lifted = nn.vmap(nn.GroupNorm, **axes, in_axes=None, out_axes=0, axis_size=3)
        module = nn.Sequential([nn.Dense(6), lifted(num_groups=2), lambda h: h.sum(0), nn.Dense(2)])
        apply, variables = adapter.functional(module, module.init(jax.random.key(0), x))
        groups = ca.find_groups(apply, variables, x)
        whole = ca.plan_units(groups, np.ones(groups.units, bool))
        if axis == 0:
            assert adapter.feature_counts(module, variables, whole, x)["layers_1"] == {"num_groups": 2}
        else:
            with pytest.raises(PlanError, match=r"is that of nn\.vmap or nn\.scan, \(6, 3\)"):
                adapter.feature_counts(module, variables, whole, x)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(8)(x))
        return nn.Dense(2)(x + jax.random.normal(self.make_rng("noise"), x.shape))


@pytest.mark.parametrize("named", [True, False])
def test_a_key_per_call(x64, named):
    """Drawn anew for every batch, in the small function as in the masked one."""
    rngs = {"dropout": jax.random.key(1), "noise": jax.random.key(2)} if named else jax.random.key(3)
    x, module = images(4, 3), Dropped()
    init = {name: jax.random.key(0) for name in ("params", "dropout", "noise")}
    apply, variables = adapter.functional(module, module.init(init, x), rngs=rngs)
    keys = [jax.random.key(seed) for seed in (4, 5)]
    outputs = [apply(variables, x, reseed=key) for key in (None, *keys)]
    assert (apply(variables, x, reseed=keys[0]) == outputs[1]).all()
    assert min(distance(outputs[n], outputs[n - 1]) for n in range(3)) > 0.1
    groups = ca.find_groups(apply, variables, x, reseed=keys[0])
    plan, masked = cut(groups, random_units(groups), variables)
    for key in keys:
        got = ca.slim(apply, plan)(ca.shrink(variables, plan), x, reseed=key)
        assert distance(got, apply(masked, x, reseed=key)) <= TIGHT
