"""Costs: equal to what is there for whole counts, differentiable for soft ones; budgets."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax.cost import COSTS
from compaware_jax.coupling.trace import flatten
from compaware_jax.coupling.work import contraction_flops, work_of
from compaware_jax.errors import BudgetError, TraceError
from compaware_jax.law import random_keep
from compaware_jax.masks import group_counts
from compaware_jax.models import autoencoder
from compaware_jax.surgery.small_function import what_runs
from tests.models import MODELS


def counted_flops(apply, variables, args):
    """FLOPs of a function as it is, from the shapes in its own jaxpr."""
    program = flatten(jax.make_jaxpr(apply)(variables, *args), leaves=())
    shapes = [[program.avals[v].shape[a] for (v, a), *_ in work.dimensions] for work in work_of(program)]
    return sum(2 * int(np.prod(sizes)) for sizes in shapes)


@pytest.mark.parametrize("boundary", [False, True])
@pytest.mark.parametrize("name", ["mlp", "convolutional", "gated", "concatenated", "attention"])
def test_costs_are_exact(name, boundary):
    apply, variables, args = MODELS[name]()
    groups = ca.find_groups(apply, variables, *args, boundary=boundary)
    for seed in range(3):
        keep = random_keep(groups, np.random.default_rng(seed))
        plan = ca.plan_units(groups, keep)
        small = ca.shrink(variables, plan)
        counts = np.array([kept for _, kept, _ in plan.counts])
        leaves = jax.tree.leaves(small)
        assert COSTS["parameters"](groups).exact(counts) == sum(x.size for x in leaves)
        assert COSTS["bytes"](groups).exact(counts) == sum(jnp.asarray(x).nbytes for x in leaves)
        expected = counted_flops(ca.slim(apply, plan), small, args)
        assert COSTS["flops"](groups).exact(counts) == expected


def test_dense_preset():
    model = autoencoder("dense")
    groups = ca.find_groups(
        model.apply,
        jax.eval_shape(model.init, jax.random.key(0)),
        jnp.zeros((1, 28, 28, 1)),
        released=("latent",),
    )
    cost = COSTS["parameters"](groups)
    assert cost.total == 1_083_696
    assert COSTS["bytes"](groups).total == 4 * 1_083_696
    assert COSTS["flops"](groups).total == 2 * (784 * 512 + 512 * 256 + 256 * 32) * 2


def test_bytes_are_those_that_jax_computes_with():
    """Without x64, it makes float32 of numpy's float64."""
    variables = {"a": np.ones((3, 6)), "b": np.ones((6, 2))}
    groups = ca.find_groups(lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"], variables, np.ones((1, 3)))
    assert COSTS["bytes"](groups).total == sum(jnp.asarray(x).nbytes for x in variables.values())


def test_a_model_without_the_cost():
    variables = {"a": jnp.ones(6), "b": jnp.ones(6)}
    groups = ca.find_groups(lambda v, x: (x * v["a"] + v["b"]).sum(1), variables, jnp.ones((2, 1)))
    assert ca.params(0.5).limit(groups) == 6
    with pytest.raises(BudgetError, match=r"the model has no FLOPs, expected a cost that pruning lowers"):
        ca.flops(0.5).limit(groups)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_bytes_are_those_of_each_leaf(kind):
    """Half precision, flags of a byte, a random key: a unit's bytes depend on where it lies."""

    def apply(v, x):
        h = jnp.where(v["on"], jnp.tanh(x @ v["a"].astype(jnp.float32)), 0.0)
        return jnp.where(jax.random.bernoulli(v["key"]), h, -h) @ v["b"]

    variables = {
        "a": jnp.ones((3, 6), jnp.bfloat16),
        "b": jnp.ones((6, 2)),
        "key": jax.random.key(0, impl=kind),
        "on": jnp.ones(6, bool),
    }
    groups = ca.find_groups(apply, variables, jnp.ones((1, 3)))
    small = ca.shrink(variables, ca.plan_units(groups, np.arange(6) < 4))
    of_key = variables["key"].nbytes
    expected = 4 * (3 * 2 + 2 * 4 + 1) + of_key
    assert sum(x.nbytes for x in jax.tree.leaves(small)) == expected
    assert COSTS["bytes"](groups).exact(np.array([4])) == expected
    assert COSTS["bytes"](groups).total == 6 * (3 * 2 + 2 * 4 + 1) + of_key


def test_flops_of_what_is_deployed():
    """Of the outputs of training nothing is counted, nor what no output needs."""

    def apply(v, x):
        h = jnp.tanh(x @ v["a"])
        _ = h @ jnp.ones((6, 99))
        heads = {"main": h @ v["b"], "extra": {"near": h @ v["c"], "far": jnp.tanh(x @ v["d"]) @ v["e"]}}
        return heads, h.sum()

    shapes = {"a": (3, 6), "b": (6, 2), "c": (6, 4), "d": (3, 5), "e": (5, 1)}
    variables = {name: jnp.ones(shape) for name, shape in shapes.items()}
    products = {"a": 3 * 6, "b": 6 * 2, "c": 6 * 4, "d": 3 * 5, "e": 5 * 1}
    for deployed, read in {
        (): "abcde",
        "0/main": "ab",
        ("0/extra",): "acde",
        ("0/extra/far", "1"): "ade",
        ("0", "1"): "abcde",
    }.items():
        groups = ca.find_groups(apply, variables, jnp.ones((1, 3)), deployed=deployed)
        assert groups.units == 11
        assert COSTS["flops"](groups).total == sum(2 * products[name] for name in read)
        plan = ca.plan_units(groups, np.arange(11) % 2 == 0)
        ran, flops = what_runs(groups, plan)
        assert not ran
        kept = plan.small_shape(0)[1]
        kept_far = plan.small_shape(3)[1]
        left = {"a": 3 * kept, "b": kept * 2, "c": kept * 4, "d": 3 * kept_far, "e": kept_far}
        assert flops == sum(2 * left[name] for name in read)
    with pytest.raises(TraceError, match=r"deployed='0/mane' names no output .*'0/main'"):
        ca.find_groups(apply, variables, jnp.ones((1, 3)), deployed=["0/mane"])


def test_uncut_work_of_what_is_deployed():
    """A norm of training, which runs at full width, is no work of the model that is used."""

    def apply(v, x):
        h = x @ v["a"] + v["bias"]
        normed = h / (h - h.mean(-1, keepdims=True) + 3.0).std(-1, keepdims=True)
        return {"used": h @ v["b"], "trained": normed @ v["b"]}

    variables = {"a": jnp.ones((3, 6)), "bias": jnp.ones(6), "b": jnp.ones((6, 2))}
    x = jnp.ones((1, 3))
    keep = np.arange(6) < 2
    both, used = (ca.find_groups(apply, variables, x, deployed=names) for names in ((), ("used",)))
    assert ca.uncut(both, ca.plan_units(both, keep))
    assert not ca.uncut(used, ca.plan_units(used, keep))


def test_soft_cost_agrees_and_has_the_right_gradient():
    apply, variables, args = MODELS["attention"]()
    groups = ca.find_groups(apply, variables, *args)
    for make in COSTS.values():
        cost = make(groups)
        counts = np.maximum(groups.sizes // 2, 1)
        assert float(cost(jnp.asarray(counts, float))) == pytest.approx(cost.exact(counts))
        one_more = [
            cost.exact(counts + np.eye(len(counts), dtype=int)[g]) - cost.exact(counts)
            for g in range(len(counts))
        ]
        one_less = [
            cost.exact(counts) - cost.exact(counts - np.eye(len(counts), dtype=int)[g])
            for g in range(len(counts))
        ]
        # Costs are at most quadratic in one count: the derivative is the mean of both differences.
        expected = (np.array(one_more) + np.array(one_less)) / 2
        got = jax.grad(cost)(jnp.asarray(counts, float))
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_counts_of_gates():
    apply, variables, args = MODELS["convolutional"]()
    groups = ca.find_groups(apply, variables, *args)
    gates = np.linspace(0, 1, groups.units)
    expected = [gates[g.slice].sum() for g in groups.groups]
    np.testing.assert_allclose(group_counts(groups, gates), expected, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(BudgetError, match=r"expected a number in \(0, 1\]"):
        ca.params(fraction)


def test_unknown_cost():
    with pytest.raises(BudgetError, match="expected one of"):
        ca.Budget("latency", 0.5)


def test_unreachable_budget_names_the_smallest():
    apply, variables, args = MODELS["mlp"]()
    groups = ca.find_groups(apply, variables, *args)
    floor = COSTS["parameters"](groups).floor
    assert floor == 5 + 1 + 3
    with pytest.raises(BudgetError, match=rf"smallest reachable {floor} "):
        ca.params(0.1).limit(groups)
    assert ca.flops(1.0).limit(groups) == COSTS["flops"](groups).total
    assert ca.nbytes(0.5).limit(groups) == COSTS["bytes"](groups).total // 2


def conv(image, kernel, *, strides=(1, 1), **settings):
    layout = jax.lax.conv_dimension_numbers(image, kernel, ("NHWC", "HWIO", "NHWC"))
    settings = {"dimension_numbers": layout, "window_strides": strides, "padding": "VALID"} | settings
    return partial(jax.lax.conv_general_dilated, **settings), image, kernel


def loop(x, w):
    return jax.lax.scan(lambda h, _: (h @ w, None), x, length=5)[0]


# Two FLOPs per product; these are counted by hand, of convolutions as outputs × taps × inputs of a group.
BY_HAND = {
    "dense": (jnp.matmul, (3, 4), (4, 5), 3 * 5 * 4),
    "batched": (jnp.matmul, (7, 3, 4), (7, 4, 5), 7 * 3 * 5 * 4),
    "plain": (*conv((2, 9, 8, 4), (3, 2, 4, 6)), (2 * 7 * 7 * 6) * (3 * 2) * 4),
    "strided": (*conv((2, 9, 9, 4), (3, 3, 4, 6), strides=(2, 4)), (2 * 4 * 2 * 6) * (3 * 3) * 4),
    "dilated": (*conv((2, 9, 9, 4), (3, 3, 4, 6), rhs_dilation=(2, 2)), (2 * 5 * 5 * 6) * (3 * 3) * 4),
    "grouped": (*conv((2, 9, 9, 4), (3, 3, 2, 6), feature_group_count=2), (2 * 7 * 7 * 6) * (3 * 3) * 2),
    "depthwise": (*conv((2, 9, 9, 4), (3, 3, 1, 4), feature_group_count=4), (2 * 7 * 7 * 4) * (3 * 3)),
    "transposed": (
        *conv((2, 5, 4, 4), (3, 2, 4, 6), padding=[(2, 2), (1, 1)], lhs_dilation=(2, 3)),
        (2 * 5 * 4 * 4) * (3 * 2) * 6,
    ),
    "in a loop": (loop, (3, 4), (4, 4), 5 * 3 * 4 * 4),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_by_hand(name):
    apply, x, w, products = BY_HAND[name]
    structs = jax.ShapeDtypeStruct(w, jnp.float32), jax.ShapeDtypeStruct(x, jnp.float32)
    groups = ca.find_groups(lambda w, x: apply(x, w), *structs)
    assert COSTS["flops"](groups).total == 2 * products
    assert contraction_flops(groups.analysis.program) == 2 * products
    if name != "in a loop":  # XLA counts a body once.
        compiled = jax.jit(apply).lower(*structs[::-1]).compile()
        assert compiled.cost_analysis()["flops"] == 2 * products
