"""NNX: the law through a module, and a small module back."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import compaware_jax as ca
from compaware_jax.adapters import nnx as adapter
from compaware_jax.errors import PlanError, TraceError
from compaware_jax.law import distance, law_errors
from tests.adapters.common import (
    TIGHT,
    cut,
    drawn,
    images,
    random_units,
    units_without_every_second,
    without_gradient,
)

# The scale of attention depends on the channels per head, so they stay; whole heads leave.
PER_HEAD = ("attention/query/kernel:2", "attention/value")


class Net(nnx.Module):
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
def prepared_once(normalise):
    model = Net(nnx.Rngs(0), normalise)
    model.eval()
    nnx.update(model, drawn(adapter.functional(model)[1]))
    apply, variables = adapter.functional(model)
    x = images(2, 4, 4, 2)
    return model, apply, variables, x, ca.find_groups(apply, variables, x)


def prepared(normalise=True):
    model, *rest = prepared_once(normalise)
    return nnx.clone(model), *rest


run = nnx.jit(lambda module, x: module(x))


def test_law(x64):
    model, apply, variables, x, groups = prepared()
    assert distance(jax.jit(apply)(variables, x), run(model, x)) == 0
    assert max(law_errors(apply, variables, x, keep=random_units(groups), groups=groups)) <= TIGHT
    assert set(groups.components) == {"conv", "norm", "depthwise", "attention", "layer_norm", "dense"}


def test_slimmed_is_a_module_to_go_on_with(x64):
    model, apply, variables, x, groups = prepared()
    plan, masked = cut(groups, random_units(groups), variables)
    small = adapter.slimmed(model, plan)
    expected = jax.jit(apply)(masked, x)
    assert distance(jax.jit(lambda x: small(x))(x), expected) <= TIGHT
    assert distance(run(small, x), expected) <= TIGHT
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(small, nnx.Not(nnx.RngState)))) == (
        plan.parameters
    )

    adapted = jax.tree.map(lambda leaf: 2 * leaf, ca.shrink(variables, plan))
    assert (
        distance(
            run(adapter.slimmed(model, plan, variables=adapted), x), jax.jit(ca.slim(apply, plan))(adapted, x)
        )
        == 0
    )
    with pytest.raises(PlanError, match="slimmed: the variables do not fit the plan"):
        adapter.slimmed(model, plan, variables=variables)

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


def test_training_mode_updates_as_the_full_module_does(x64):
    model, _, variables, x, groups = prepared()
    plan, masked = cut(groups, random_units(groups), variables)
    small = adapter.slimmed(model, plan)
    small.train()
    full = nnx.clone(model)
    full.train()
    nnx.update(full, masked)
    for _ in range(2):
        assert distance(run(small, x), run(full, x)) <= TIGHT
    state = ca.shrink(adapter.functional(full)[1], plan)
    assert distance(small.model.norm.mean[...], state["norm"]["mean"]) <= TIGHT
    assert distance(small.model.norm.var[...], state["norm"]["var"]) <= TIGHT


def test_smaller(x64):
    model, apply, variables, x, groups = prepared(normalise=False)
    plan, masked = cut(groups, units_without_every_second(groups, *PER_HEAD), variables)
    small = adapter.smaller(model, plan, x)
    assert type(small) is Net
    assert distance(jax.jit(small)(x), jax.jit(apply)(masked, x)) <= TIGHT
    assert small.conv.out_features == small.conv.kernel.shape[-1] == small.norm.num_features < 6
    assert small.depthwise.feature_group_count == small.depthwise.in_features == small.conv.out_features
    assert small.attention.num_heads == small.attention.query.kernel.shape[1] < 4
    assert small.attention.query.out_features == (small.attention.num_heads, small.attention.head_dim)
    assert small.dense[0].in_features == small.attention.out_features
    assert small.dense[0].out_features == small.dense[1].in_features
    assert model.conv.out_features == 6


def test_smaller_refuses_a_layer_norm_over_a_cut_axis(x64):
    model, _, _, x, groups = prepared()
    plan = ca.plan_units(groups, units_without_every_second(groups, *PER_HEAD))
    with pytest.raises(PlanError, match=r"smaller: .*normalisation over a cut axis.* Use `slimmed`"):
        adapter.smaller(model, plan, x)
    assert adapter.smaller(model, plan).dense[0].out_features < 5  # Unchecked without an input.


class Layers(nnx.Module):
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


def test_attributes_of_other_layers():
    model, tokens = Layers(nnx.Rngs(0)), jnp.arange(6).reshape(2, 3)
    apply, variables = adapter.functional(model)
    groups = ca.find_groups(apply, variables, tokens)
    plan = ca.plan_units(groups, units_without_every_second(groups, "embed", "norm"))
    small = adapter.smaller(model, plan, tokens)
    assert small.lstm.cell.hidden_features == small.split.in_features[0] == small.split.kernel.shape[0]
    assert small.lstm.cell.in_features == small.gru.cell.hidden_features
    assert small.join.in_features == small.split.out_features == small.split.kernel.shape[1:]
    assert small.join.out_features == (small.lora.in_features,)
    assert small.lora.out_features == small.einsum.kernel_shape[0]
    assert small.up.in_features == small.einsum.bias_shape[0] == small.up.kernel.shape[1] < 4


def test_only_parameters_have_a_gradient(x64):
    """So that `compress`, which trains all variables, leaves running statistics as they are."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    model.eval()
    apply, variables = adapter.functional(model)
    assert without_gradient(apply, variables, images(4, 3)) == {"layers/1/mean", "layers/1/var"}


class Trained(nnx.Module):
    """A network whose training mode normalises by the batch and drops out."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def test_training_mode_through_compress():
    """Statistics follow the model that gets smaller, and every step drops others."""
    model, x = Trained(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (64, 3)) + 2.0
    apply, variables = adapter.functional(model, updates=True)
    key = jax.random.key(2)
    first, again, other = (apply(variables, x, reseed=k)[0] for k in (key, key, jax.random.key(3)))
    np.testing.assert_array_equal(first, again)
    assert distance(first, other) > 0.1

    def loss(f, v, batch):
        output, updates = f(v, batch["x"], reseed=batch["key"])
        return jnp.mean((output - batch["x"][:, :2]) ** 2), updates

    result = ca.compress(
        apply,
        variables,
        loss,
        lambda step: {"x": x, "key": jax.random.fold_in(key, step)},
        groups=ca.find_groups(apply, variables, x, reseed=key, state_outputs={"1": ""}),
        budget=ca.params(0.5),
        search=ca.GradientSearch(steps=20),
        fine_tune=20,
        learning_rate=1e-5,
        progress=False,
    )
    small = adapter.slimmed(model, result.plan, variables=result.variables)
    width = result.plan.counts[0][1]
    assert small.model.norm.mean.shape == (width,) < (16,)
    seen = x @ small.model.first.kernel + small.model.first.bias
    np.testing.assert_allclose(small.model.norm.mean.get_value(), seen.mean(0), atol=0.01)
    small.eval()
    assert small(x).shape == (64, 2)


def test_models_of_the_wrong_type():
    with pytest.raises(TraceError, match=r"nnx\.functional: got a Dense, expected an instance of flax\.nnx"):
        adapter.functional(linen.Dense(2))
    with pytest.raises(TraceError, match=r"nnx\.slimmed: got a dict"):
        adapter.slimmed({}, ca.Plan((), (), ()))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_sow_gathers_is_passed_over(x64):
    class Sown(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 6, rngs=rngs)
            self.b = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            hidden = self.a(x)
            self.sow(nnx.Intermediate, "hidden", hidden)
            return self.b(jnp.tanh(hidden))

    model, x = Sown(nnx.Rngs(0)), images(2, 3)
    for _ in range(2):  # Once more with what the first call has left in the module.
        apply, variables = adapter.functional(model)
        output, updates = adapter.functional(model, updates=True)[0](variables, x)
        np.testing.assert_array_equal(output, apply(variables, x))
        assert updates == {}
        groups = ca.find_groups(apply, variables, x)
        plan = ca.plan_units(groups, np.arange(6) % 2 == 0)
        expected = ca.slim(apply, plan)(ca.shrink(variables, plan), x)
        assert distance(adapter.slimmed(model, plan)(x), expected) <= TIGHT
        assert distance(adapter.smaller(model, plan, x)(x), expected) <= TIGHT
        model(x)


def test_a_plan_of_the_mode_that_returns_updates():
    """Found with a released output beside the updates, it fits the module."""

    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            hidden = self.norm(self.a(x))
            return {"hidden": hidden, "y": self.b(jnp.tanh(hidden))}

    model, x = Two(nnx.Rngs(0)), images(2, 3)
    apply, variables = adapter.functional(model, updates=True)
    groups = ca.find_groups(apply, variables, x, released=("0/hidden",), state_outputs={"1": ""})
    plan = ca.plan_units(groups, np.arange(6) % 2 == 0)
    expected, _ = ca.slim(apply, plan)(ca.shrink(variables, plan), x)
    got = adapter.slimmed(model, plan)(x)
    assert got["hidden"].shape == (2, 3)
    assert distance(got, expected) <= TIGHT


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_groups_of_training_mode_do_not_cut_batch_statistics(mode):
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
    model, x = nnx.Sequential(*layers), jnp.ones((4, 3))
    apply, variables = adapter.functional(model)
    plan = ca.plan_units(ca.find_groups(apply, variables, x), jnp.arange(8) < 5)
    getattr(model, mode)()
    with pytest.raises(PlanError, match=r"ties together.*not read there. Find them in evaluation mode"):
        adapter.slimmed(model, plan)(x)
