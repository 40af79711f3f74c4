"""Adapters: the law through each framework's model objects, and the way back to an object."""

import subprocess
import sys
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import compaware_jax as ca
from compaware_jax.adapters import linen as linen_adapter
from compaware_jax.adapters import nnx as nnx_adapter
from compaware_jax.adapters.rebuilt import relative_difference
from compaware_jax.errors import PlanError, TraceError
from compaware_jax.law import distance, law_errors, random_keep
from compaware_jax.trace import named_leaves

TIGHT = 1e-10


def drawn(tree: Any, seed: int = 0) -> Any:
    """The tree with random float64 values of order one; vectors positive, as a variance must be."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if leaf.size == leaf.shape[-1]:
            return jnp.asarray(rng.uniform(0.3, 1.0, leaf.shape))
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(leaf.size // leaf.shape[-1]))

    return jax.tree.map(draw, tree)


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).normal(size=shape))


def masked(groups: ca.Groups, keep: np.ndarray, variables: Any) -> Any:
    return ca.apply_mask(groups, jnp.asarray(keep, float), variables)


def keep_with_whole(groups: ca.Groups, *names: str) -> np.ndarray:
    """Units to keep: no second, fourth, ... one, but all of groups whose name contains a given one."""
    keep = np.ones(groups.units, bool)
    for group in groups.groups:
        if not any(name in group.name for name in names):
            keep[group.slice][1:-1:2] = False
    return keep


# --- Linen -----------------------------------------------------------------------------------------------


class LinenNet(nn.Module):
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


def linen_model(**widths):
    x = images(2, 4, 4, 2)
    module = LinenNet(**widths)
    return module, drawn(jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))), x


def rebuilt_linen(counts, **widths):
    attention = counts["MultiHeadDotProductAttention_0"]
    return LinenNet(
        conv=counts["Conv_0"]["features"],
        depthwise=counts["Conv_1"]["feature_group_count"],
        heads=attention["num_heads"],
        qkv=attention["qkv_features"],
        stream=attention["out_features"],
        hidden=counts["hidden"]["features"],
        **widths,
    )


def test_linen_law(x64):
    module, variables, x = linen_model(normalise=True)
    apply, variables = linen_adapter.functional(module, variables, train=False)
    groups = ca.find_groups(apply, variables, x)
    keep = random_keep(groups, np.random.default_rng(0))
    assert 0 < keep.sum() < groups.units
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= TIGHT


def test_linen_law_in_training(x64):
    module, variables, x = linen_model()
    apply, variables = linen_adapter.functional(module, variables, train=True, mutable=["batch_stats"])
    groups = ca.find_groups(apply, variables, x, state_outputs={"1": ""})
    keep = random_keep(groups, np.random.default_rng(0))
    plan = ca.plan_units(groups, keep)
    got, got_updates = jax.jit(ca.slim(apply, plan))(ca.shrink(variables, plan), x)
    expected, expected_updates = jax.jit(apply)(masked(groups, keep, variables), x)
    assert distance(got, expected) <= TIGHT
    assert distance(expected_updates["batch_stats"], variables["batch_stats"]) > TIGHT
    small = ca.shrink(variables, plan)["batch_stats"]
    assert jax.tree.map(jnp.shape, got_updates["batch_stats"]) == jax.tree.map(jnp.shape, small)
    expected_small = ca.shrink({**variables, **expected_updates}, plan)["batch_stats"]
    assert distance(got_updates["batch_stats"], expected_small) <= TIGHT


def test_linen_rebuilt_from_its_configuration(x64):
    module, variables, x = linen_model()
    apply, variables = linen_adapter.functional(module, variables, train=False)
    groups = ca.find_groups(apply, variables, x)
    # The scale of attention depends on the channels per head, so they stay; whole heads leave.
    keep = keep_with_whole(groups, "query/kernel:2", "value")
    plan = ca.plan_units(groups, keep)
    counts = linen_adapter.feature_counts(module, variables, plan, x, train=False)
    assert set(counts) == {"Conv_0", "Conv_1", "MultiHeadDotProductAttention_0", "hidden", "head"}
    assert counts["Conv_1"]["features"] == counts["Conv_1"]["feature_group_count"] < 6
    assert counts["MultiHeadDotProductAttention_0"]["num_heads"] < 4
    small, small_variables = linen_adapter.functional(
        rebuilt_linen(counts), ca.shrink(variables, plan), train=False
    )
    assert linen_adapter.check_rebuilt(small, apply, plan, variables, x) <= TIGHT
    assert (
        distance(jax.jit(small)(small_variables, x), jax.jit(apply)(masked(groups, keep, variables), x))
        <= TIGHT
    )


def test_linen_layer_norm_over_a_cut_axis_cannot_be_rebuilt(x64):
    module, variables, x = linen_model(normalise=True)
    apply, variables = linen_adapter.functional(module, variables, train=False)
    groups = ca.find_groups(apply, variables, x)
    plan = ca.plan_units(groups, keep_with_whole(groups, "query/kernel:2", "value"))
    counts = linen_adapter.feature_counts(module, variables, plan, x, train=False)
    small, _ = linen_adapter.functional(
        rebuilt_linen(counts, normalise=True), ca.shrink(variables, plan), train=False
    )
    with pytest.raises(PlanError, match=r"normalisation over a cut axis.* Use `slim`"):
        linen_adapter.check_rebuilt(small, apply, plan, variables, x)


def test_linen_rebuilt_with_wrong_widths(x64):
    module, variables, x = linen_model()
    apply, variables = linen_adapter.functional(module, variables, train=False)
    groups = ca.find_groups(apply, variables, x)
    plan = ca.plan_units(groups, keep_with_whole(groups, "query/kernel:2", "value"))
    with pytest.raises(PlanError, match=r"check_rebuilt: the model's own code does not run .*Scope"):
        linen_adapter.check_rebuilt(apply, apply, plan, variables, x)
    with pytest.raises(PlanError, match=r"the rebuilt model returns .*, `slim` returns"):
        linen_adapter.check_rebuilt(lambda v, x: 0.0, apply, plan, variables, x)


def test_linen_attention_that_no_arguments_express(x64):
    module, variables, x = linen_model()
    apply, variables = linen_adapter.functional(module, variables, train=False)
    groups = ca.find_groups(apply, variables, x)
    keep = np.ones(groups.units, bool)
    keep[next(g for g in groups.groups if g.name.endswith("value")).offset] = False
    with pytest.raises(PlanError, match=r"keeps 4 heads of 2 channels for queries and 4 of 1 for values"):
        linen_adapter.feature_counts(module, variables, ca.plan_units(groups, keep), x, train=False)


class LinenLayers(nn.Module):
    """The other layers that have widths."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 6)(tokens)
        x = nn.GroupNorm(num_groups=3)(x)
        x = nn.RNN(nn.GRUCell(5))(x)
        x = nn.DenseGeneral((2, 3))(x)
        x = nn.DenseGeneral(4, axis=(-2, -1))(jnp.tanh(x))
        return nn.ConvTranspose(3, (3,))(x)


def test_linen_counts_of_other_layers():
    tokens = jnp.arange(6).reshape(2, 3)
    module = LinenLayers()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens))
    apply, variables = linen_adapter.functional(module, drawn(shapes))
    groups = ca.find_groups(apply, variables, tokens)
    whole = ca.plan_units(groups, np.ones(groups.units, bool))
    assert linen_adapter.feature_counts(module, variables, whole, tokens) == {
        "Embed_0": {"features": 6},
        "GroupNorm_0": {"num_groups": 3},
        "GRUCell_0": {"features": 5},
        "DenseGeneral_0": {"features": (2, 3)},
        "DenseGeneral_1": {"features": 4},
        "ConvTranspose_0": {"features": 3},
    }
    keep = keep_with_whole(groups, "Embed_0", "GroupNorm_0")
    plan = ca.plan_units(groups, keep)
    counts = linen_adapter.feature_counts(module, variables, plan, tokens)
    small = ca.shrink(variables, plan)["params"]
    assert counts["DenseGeneral_0"]["features"] == small["DenseGeneral_0"]["kernel"].shape[1:]
    assert counts["DenseGeneral_1"]["features"] == small["ConvTranspose_0"]["kernel"].shape[-2] < 4


def test_linen_method(x64):
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
    encode, variables = linen_adapter.functional(Coder(), variables, method="encode")
    np.testing.assert_array_equal(encode(variables, x), Coder().apply(variables, x, method="encode"))


# --- NNX -------------------------------------------------------------------------------------------------


class NnxNet(nnx.Module):
    def __init__(self, rngs, normalise):
        self.conv = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.depthwise = nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            4, in_features=6, qkv_features=8, out_features=6, decode=False, rngs=rngs
        )
        self.layer_norm = nnx.LayerNorm(6, rngs=rngs) if normalise else None
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.dense = nnx.List([nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])

    def __call__(self, x):
        x = self.depthwise(nnx.relu(self.norm(self.conv(x))))
        x = self.attention(x.reshape(x.shape[0], -1, x.shape[-1]))
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        x = nnx.relu(self.dense[0](self.dropout(x)))
        return self.dense[1](x.mean(1))


@lru_cache
def prepared_nnx_model(normalise):
    model = NnxNet(nnx.Rngs(0), normalise)
    model.eval()
    nnx.update(model, drawn(nnx_adapter.functional(model)[1]))
    apply, variables = nnx_adapter.functional(model)
    x = images(2, 4, 4, 2)
    return model, apply, variables, x, ca.find_groups(apply, variables, x)


def nnx_model(normalise=True):
    model, *rest = prepared_nnx_model(normalise)
    return nnx.clone(model), *rest


def test_nnx_law(x64):
    model, apply, variables, x, groups = nnx_model()
    assert distance(jax.jit(apply)(variables, x), nnx.jit(lambda m, x: m(x))(model, x)) == 0
    keep = random_keep(groups, np.random.default_rng(0))
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= TIGHT
    assert set(groups.components) == {"conv", "norm", "depthwise", "attention", "layer_norm", "dense"}


def test_nnx_slimmed_is_a_module_to_go_on_with(x64):
    model, apply, variables, x, groups = nnx_model()
    keep = random_keep(groups, np.random.default_rng(0))
    plan = ca.plan_units(groups, keep)
    small = nnx_adapter.slimmed(model, plan)
    expected = jax.jit(apply)(masked(groups, keep, variables), x)
    assert distance(jax.jit(lambda x: small(x))(x), expected) <= TIGHT
    assert distance(nnx.jit(lambda m, x: m(x))(small, x), expected) <= TIGHT
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(small, nnx.Not(nnx.RngState)))) == (
        plan.parameters
    )

    # In training, batch statistics and generators move, and an optimizer sees the small Params.
    small.train()
    optimizer = nnx.Optimizer(small, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x):
        loss, gradients = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(module)
        optimizer.update(module, gradients)
        return loss

    before = np.asarray(small.model.norm.mean)
    losses = [float(step(small, optimizer, x)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not np.allclose(small.model.norm.mean, before)
    assert int(small.model.dropout.rngs.count[...]) == 5
    assert int(model.dropout.rngs.count[...]) == 0


def test_nnx_training_mode_updates_as_the_full_module_does(x64):
    model, _, variables, x, groups = nnx_model()
    keep = random_keep(groups, np.random.default_rng(0))
    plan = ca.plan_units(groups, keep)
    small = nnx_adapter.slimmed(model, plan)
    small.train()
    full = nnx.clone(model)
    full.train()
    nnx.update(full, masked(groups, keep, variables))
    run = nnx.jit(lambda m, x: m(x))
    for _ in range(2):
        assert distance(run(small, x), run(full, x)) <= TIGHT
    state = ca.shrink(nnx_adapter.functional(full)[1], plan)
    assert distance(small.model.norm.mean[...], state["norm"]["mean"]) <= TIGHT
    assert distance(small.model.norm.var[...], state["norm"]["var"]) <= TIGHT


def test_nnx_smaller(x64):
    model, apply, variables, x, groups = nnx_model(False)
    keep = keep_with_whole(groups, "attention/query/kernel:2", "attention/value")
    plan = ca.plan_units(groups, keep)
    small = nnx_adapter.smaller(model, plan, x)
    assert type(small) is NnxNet
    assert distance(jax.jit(small)(x), jax.jit(apply)(masked(groups, keep, variables), x)) <= TIGHT
    assert small.conv.out_features == small.conv.kernel.shape[-1] == small.norm.num_features < 6
    assert small.depthwise.feature_group_count == small.depthwise.in_features == small.conv.out_features
    assert small.attention.num_heads == small.attention.query.kernel.shape[1] < 4
    assert small.attention.query.out_features == (small.attention.num_heads, small.attention.head_dim)
    assert small.dense[0].in_features == small.attention.out_features
    assert small.dense[0].out_features == small.dense[1].in_features
    assert model.conv.out_features == 6


def test_nnx_smaller_refuses_a_layer_norm_over_a_cut_axis(x64):
    model, _, _, x, groups = nnx_model()
    plan = ca.plan_units(groups, keep_with_whole(groups, "attention/query/kernel:2", "attention/value"))
    with pytest.raises(PlanError, match=r"smaller: .*normalisation over a cut axis.* Use `slimmed`"):
        nnx_adapter.smaller(model, plan, x)
    assert nnx_adapter.smaller(model, plan).dense[0].out_features < 5  # Unchecked without an input.


class NnxLayers(nnx.Module):
    """The other layers that have widths."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.norm = nnx.GroupNorm(6, num_groups=3, rngs=rngs)
        self.gru = nnx.RNN(nnx.GRUCell(6, 5, rngs=rngs), rngs=rngs)
        self.lstm = nnx.RNN(nnx.LSTMCell(5, 4, rngs=rngs), rngs=rngs)
        self.split = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=rngs)
        self.lora = nnx.LoRA(4, 2, 5, rngs=rngs)
        self.einsum = nnx.Einsum("btc,cd->btd", (5, 4), (4,), rngs=rngs)
        self.up = nnx.ConvTranspose(4, 3, (3,), rngs=rngs)

    def __call__(self, tokens):
        x = self.lstm(self.gru(self.norm(self.embed(tokens))))
        return self.up(jnp.tanh(self.einsum(self.lora(self.join(jnp.tanh(self.split(x)))))))


def test_nnx_attributes_of_other_layers():
    model = NnxLayers(nnx.Rngs(0))
    tokens = jnp.arange(6).reshape(2, 3)
    apply, variables = nnx_adapter.functional(model)
    groups = ca.find_groups(apply, variables, tokens)
    keep = keep_with_whole(groups, "embed", "norm")
    small = nnx_adapter.smaller(model, ca.plan_units(groups, keep), tokens)
    assert small.lstm.cell.hidden_features == small.split.in_features[0] == small.split.kernel.shape[0]
    assert small.lstm.cell.in_features == small.gru.cell.hidden_features
    assert small.join.in_features == small.split.out_features == small.split.kernel.shape[1:]
    assert small.join.out_features == (small.lora.in_features,)
    assert small.lora.out_features == small.einsum.kernel_shape[0]
    assert small.up.in_features == small.einsum.bias_shape[0] == small.up.kernel.shape[1] < 4


# --- Haiku -----------------------------------------------------------------------------------------------


def haiku_net(conv=6, hidden=5, normalise=True, with_state=True):
    hk = pytest.importorskip("haiku")

    def net(x, is_training):
        x = hk.Conv2D(conv, 3)(x)
        if with_state:
            x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        x = jax.nn.relu(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if normalise:
            x = hk.LayerNorm(-1, True, True)(x)
        return hk.Linear(3)(jax.nn.relu(hk.Linear(hidden)(x)).mean(1))

    return (hk.transform_with_state if with_state else hk.transform)(net)


def test_haiku_law(x64):
    pytest.importorskip("haiku")
    from compaware_jax.adapters import haiku as adapter

    x = images(2, 4, 4, 2)
    net = haiku_net(with_state=False)
    apply, variables = adapter.functional(
        net, drawn(jax.eval_shape(lambda: net.init(jax.random.key(0), x, True))), is_training=False
    )
    groups = ca.find_groups(apply, variables, x)
    keep = random_keep(groups, np.random.default_rng(0))
    assert 0 < keep.sum() < groups.units
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= TIGHT


@pytest.mark.parametrize("normalise", [True, False])
def test_haiku_params_and_state_go_on_in_a_rebuilt_net(x64, normalise):
    pytest.importorskip("haiku")
    from compaware_jax.adapters import haiku as adapter

    x = images(2, 4, 4, 2)
    net = haiku_net(normalise=normalise)
    params, state = drawn(jax.eval_shape(lambda: net.init(jax.random.key(0), x, True)))
    training, variables = adapter.functional(net, params, state, updates=True, is_training=True)
    groups = ca.find_groups(training, variables, x, state_outputs={"1": "state"})
    keep = random_keep(groups, np.random.default_rng(0))
    plan = ca.plan_units(groups, keep)
    small, full = ca.shrink(variables, plan), masked(groups, keep, variables)
    output, new_state = jax.jit(ca.slim(training, plan))(small, x)
    expected, expected_state = jax.jit(training)(full, x)
    assert distance(output, expected) <= TIGHT
    assert distance(new_state, ca.shrink({**variables, "state": expected_state}, plan)["state"]) <= TIGHT
    small_params, small_state = adapter.params_and_state(small, state)
    assert jax.tree.structure(small_state) == jax.tree.structure(state)
    evaluation, _ = adapter.functional(net, params, state, is_training=False)
    assert distance(jax.jit(ca.slim(evaluation, plan))(small, x), jax.jit(evaluation)(full, x)) <= TIGHT

    widths = {
        "conv": small["params"]["conv2_d"]["w"].shape[-1],
        "hidden": small["params"]["linear_1"]["w"].shape[-1],
    }
    rebuilt = haiku_net(**widths, normalise=normalise)
    rebuilt_apply, _ = adapter.functional(rebuilt, small_params, small_state, is_training=False)
    if normalise:
        with pytest.raises(PlanError, match="normalisation over a cut axis"):
            adapter.check_rebuilt(rebuilt_apply, evaluation, plan, variables, x)
        return
    assert adapter.check_rebuilt(rebuilt_apply, evaluation, plan, variables, x) <= TIGHT
    _, rebuilt_state = rebuilt.apply(small_params, small_state, None, x, is_training=True)
    assert distance(rebuilt_state, adapter.params_and_state({**small, "state": new_state}, state)[1]) < 0.1


def test_haiku_refusals():
    pytest.importorskip("haiku")
    from compaware_jax.adapters import haiku as adapter

    with pytest.raises(TraceError, match=r"without its state\. Pass functional\(transformed, params, state"):
        adapter.functional(haiku_net(), {})
    with pytest.raises(TraceError, match="a Transformed, which has no state"):
        adapter.functional(haiku_net(with_state=False), {}, {})
    with pytest.raises(TraceError, match=r"got a function, expected what hk\.transform"):
        adapter.functional(lambda x: x, {})


# --- Equinox ---------------------------------------------------------------------------------------------


@lru_cache
def equinox_model(normalise=True, batch_norm=False):
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: Any
        attention: eqx.nn.MultiheadAttention
        layer_norm: Any
        dense: list

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.conv = eqx.nn.Conv2d(2, 6, 3, padding=1, key=keys[0])
            self.norm = eqx.nn.BatchNorm(6, "batch", mode="batch") if batch_norm else None
            self.attention = eqx.nn.MultiheadAttention(
                4, 6, qk_size=2, vo_size=2, use_query_bias=True, output_size=6, key=keys[1]
            )
            self.layer_norm = eqx.nn.LayerNorm(6) if normalise else None
            self.dense = [eqx.nn.Linear(6, 5, key=keys[2]), eqx.nn.Linear(5, 3, key=keys[3])]

        def __call__(self, x, state=None, *, key=None):
            x = self.conv(x)
            if self.norm is not None:
                x, state = self.norm(x, state)
            x = jax.nn.relu(x).reshape(x.shape[0], -1).T
            x = self.attention(x, x, x)
            if self.layer_norm is not None:
                x = jax.vmap(self.layer_norm)(x)
            x = self.dense[1](jax.nn.relu(jax.vmap(self.dense[0])(x)).mean(0))
            return x if self.norm is None else (x, state)

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    model, rest = eqx.partition(model, eqx.is_inexact_array)
    return eqx, eqx.combine(drawn(model), rest), state if batch_norm else None


def test_equinox_law(x64):
    pytest.importorskip("equinox")
    from compaware_jax.adapters import equinox as adapter

    _, model, _ = equinox_model()
    x = images(4, 2, 4, 4)
    apply, variables = adapter.functional(model)
    groups = ca.find_groups(apply, variables, x[0])
    keep = random_keep(groups, np.random.default_rng(0))

    def batched(variables, x):
        return jax.vmap(apply, (None, 0))(variables, x)

    assert 0 < keep.sum() < groups.units
    plan = ca.plan_units(groups, keep)
    expected = jax.jit(batched)(masked(groups, keep, variables), x)
    assert distance(jax.jit(ca.slim(batched, plan))(ca.shrink(variables, plan), x), expected) <= TIGHT


def test_equinox_slimmed_is_a_module_to_go_on_with(x64, tmp_path):
    pytest.importorskip("equinox")
    from compaware_jax.adapters import equinox as adapter

    eqx, model, _ = equinox_model()
    x = images(4, 2, 4, 4)
    apply, variables = adapter.functional(model)
    groups = ca.find_groups(apply, variables, x[0])
    keep = random_keep(groups, np.random.default_rng(0))
    plan = ca.plan_units(groups, keep)
    small = adapter.slimmed(model, plan)
    expected = jax.jit(jax.vmap(apply, (None, 0)))(masked(groups, keep, variables), x)
    assert distance(jax.jit(jax.vmap(small))(x), expected) <= TIGHT
    # Keys are passed through, as Equinox users do.
    assert distance(eqx.filter_jit(small)(x[0], key=jax.random.key(1)), expected[0]) <= TIGHT

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(module, x):
        return (jax.vmap(module)(x) ** 2).mean()

    optimizer = optax.adam(1e-2)
    moments = optimizer.init(eqx.filter(small, eqx.is_inexact_array))
    losses = []
    for _ in range(3):
        value, gradients = loss(small, x)
        updates, moments = optimizer.update(gradients, moments)
        small = eqx.apply_updates(small, updates)
        losses.append(float(value))
    assert losses[-1] < losses[0]

    eqx.tree_serialise_leaves(tmp_path / "small.eqx", small)
    back = eqx.tree_deserialise_leaves(tmp_path / "small.eqx", adapter.slimmed(model, plan))
    assert eqx.tree_equal(back, small)


def test_equinox_state(x64):
    pytest.importorskip("equinox")
    from compaware_jax.adapters import equinox as adapter

    eqx, model, state = equinox_model(batch_norm=True)
    x = images(4, 2, 4, 4)
    trained = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    _, state = trained(x, state)
    model = eqx.nn.inference_mode(model)
    apply, variables = adapter.functional(model, state)
    groups = ca.find_groups(apply, variables, x[0])
    assert any(path.startswith("state/") for group in groups.groups for path, _, _ in group.axes)
    keep = random_keep(groups, np.random.default_rng(0))
    plan = ca.plan_units(groups, keep)
    small, small_state = adapter.slimmed(model, plan, state)
    call = jax.jit(jax.vmap(small, in_axes=(0, None), out_axes=(0, None)))
    expected = jax.jit(jax.vmap(apply, (None, 0)))(masked(groups, keep, variables), x)
    output, new_state = call(x, small_state)
    assert distance(output, expected) <= TIGHT
    shapes = [[y.shape for y in jax.tree.leaves(tree)] for tree in (new_state, small_state)]
    assert shapes[0] == shapes[1]
    assert sum(y.size for y in jax.tree.leaves(eqx.filter((small, small_state), eqx.is_inexact_array))) == (
        plan.parameters
    )


def test_equinox_smaller(x64):
    pytest.importorskip("equinox")
    from compaware_jax.adapters import equinox as adapter

    eqx, model, _ = equinox_model(normalise=False)
    x = images(2, 4, 4)
    apply, variables = adapter.functional(model)
    groups = ca.find_groups(apply, variables, x)
    keep = keep_with_whole(groups, "attention/query", "attention/key", "attention/value")
    plan = ca.plan_units(groups, keep)
    small = adapter.smaller(model, plan, x)
    assert type(small) is type(model)
    assert distance(eqx.filter_jit(small)(x), jax.jit(apply)(masked(groups, keep, variables), x)) <= TIGHT

    _, model, _ = equinox_model()
    groups = ca.find_groups(adapter.functional(model)[0], adapter.functional(model)[1], x)
    plan = ca.plan_units(groups, keep_with_whole(groups, "attention/query"))
    with pytest.raises(PlanError, match=r"smaller: the model's own code does not run.* use `slimmed`"):
        adapter.smaller(model, plan, x)


# --- Gradients -------------------------------------------------------------------------------------------


def test_only_parameters_have_a_gradient(x64):
    """So that `compress`, which trains all variables, leaves running statistics as they are."""

    def still(apply, variables, *args):
        gradients = jax.jit(jax.grad(lambda v: (apply(v, *args) ** 2).sum()))(variables)
        names = [(path, bool(jnp.any(leaf != 0))) for path, leaf in named_leaves(gradients)]
        return {path for path, moves in names if not moves}

    x = images(4, 3)
    module = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.Dense(2)])
    apply, variables = linen_adapter.functional(
        module, drawn(jax.eval_shape(lambda: module.init(jax.random.key(0), x)))
    )
    assert still(apply, variables, x) == {f"batch_stats/layers_1/{name}" for name in ("mean", "var")}

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    model.eval()
    apply, variables = nnx_adapter.functional(model)
    assert still(apply, variables, x) == {"layers/1/mean", "layers/1/var"}


# --- Refusals, and what stays optional -------------------------------------------------------------------


def test_models_of_the_wrong_type():
    dense = nn.Dense(2)
    variables = dense.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(TraceError, match=r"linen\.functional: got the class Dense, expected an instance"):
        linen_adapter.functional(nn.Dense, variables)
    with pytest.raises(TraceError, match=r"variables have \['kernel', 'bias'\].*Pass what module\.init"):
        linen_adapter.functional(dense, variables["params"])
    with pytest.raises(TraceError, match=r"nnx\.functional: got a Dense, expected an instance of flax\.nnx"):
        nnx_adapter.functional(dense)
    with pytest.raises(TraceError, match=r"nnx\.slimmed: got a dict"):
        nnx_adapter.slimmed({}, ca.Plan((), (), ()))


def test_equinox_models_of_the_wrong_type():
    pytest.importorskip("equinox")
    from compaware_jax.adapters import equinox as adapter

    with pytest.raises(TraceError, match=r"equinox\.functional: got a dict.*needs no adapter"):
        adapter.functional({})


def test_plan_of_another_model():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    apply, variables = nnx_adapter.functional(model)
    plan = ca.plan_units(ca.find_groups(apply, variables, jnp.ones((1, 3))), np.ones(0, bool))
    with pytest.raises(PlanError, match="no sub-tree has the leaves of the plan"):
        nnx_adapter.slimmed(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), plan)
    module = nn.Dense(2)
    foreign = module.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(PlanError, match="plan has no leaf `params/kernel`"):
        linen_adapter.feature_counts(module, foreign, plan, jnp.ones((1, 3)))


def test_uneven_groups_of_a_convolution_are_refused():
    from compaware_jax.adapters.widths import surviving_blocks
    from compaware_jax.groups import Leaf

    plan = ca.Plan((Leaf("k", (3, 2, 6), "float32"),), ((None, None, (0, 1, 2)),), ())
    with pytest.raises(PlanError, match=r"its 3 groups keep \[2, 1\] channels"):
        surviving_blocks(plan, "k", 3)
    assert surviving_blocks(plan, "k", 1) == (1, 3)


def test_relative_difference():
    assert relative_difference({"a": jnp.ones(4)}, {"a": jnp.full(4, 2.0)}) == pytest.approx(0.5)
    assert named_leaves({"a": 1}) == [("a", 1)]


@pytest.mark.parametrize(("package", "install"), [("haiku", "dm-haiku"), ("equinox", "equinox")])
def test_optional_frameworks_stay_optional(package, install):
    code = (
        "import sys, compaware_jax, compaware_jax.adapters\n"
        f"assert {package!r} not in sys.modules\n"
        f"sys.modules[{package!r}] = None\n"
        f"try:\n    import compaware_jax.adapters.{package}\n"
        f"except ImportError as error:\n    assert 'pip install {install}' in str(error), error\n"
        "else:\n    raise SystemExit('imported')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
