"""Plans and surgery: round trips, optimizer states, and everything foreign refused."""

import inspect
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compaware_jax as ca
from compaware_jax import models
from compaware_jax.cost import flop_cost
from compaware_jax.errors import PlanError, TraceError
from compaware_jax.law import random_keep
from compaware_jax.surgery import trees
from compaware_jax.surgery.small_function import what_runs, work_in
from tests.models import MODELS


@pytest.fixture
def cut():
    apply, variables, args = MODELS["convolutional"]()
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)
    groups = ca.find_groups(apply, variables, *args)
    keep = np.arange(groups.units) % 3 != 1
    return apply, variables, args, groups, keep, ca.plan_units(groups, keep)


def test_expand_undoes_shrink_up_to_the_mask(cut):
    _, variables, _, groups, keep, plan = cut
    masked = ca.apply_mask(groups, jnp.asarray(keep, float), variables)
    back = ca.expand(ca.shrink(variables, plan), plan)
    chex.assert_trees_all_equal(masked, back)


def test_abstract_trees(cut):
    """The shapes of the small model, e.g. to restore its checkpoint, without its arrays."""
    _, variables, _, _, _, plan = cut
    full = jax.eval_shape(lambda: variables)
    small = ca.shrink(full, plan)
    assert small == jax.eval_shape(lambda: ca.shrink(variables, plan))
    assert ca.expand(small, plan) == full


def test_slim_with_its_arguments_swapped(cut):
    apply, _, _, _, _, plan = cut
    with pytest.raises(PlanError, match=r"slim: got \(Plan, function\), expected a function and a Plan"):
        inspect.unwrap(ca.slim)(plan, apply)  # Without the annotations that tests check.


def test_arguments_that_are_no_arrays(cut):
    apply, variables, args, _, _, plan = cut
    with pytest.raises(PlanError, match=r"slim: an argument is no array .*functools\.partial"):
        ca.slim(lambda v, x, mode: apply(v, x), plan)(ca.shrink(variables, plan), *args, mode="a")


def test_mask_is_like_the_variables(cut):
    _, variables, _, groups, keep, _ = cut
    mask = ca.mask(groups, jnp.asarray(keep, float), variables)
    assert jax.tree.structure(mask) == jax.tree.structure(variables)
    for m, leaf in zip(jax.tree.leaves(mask), jax.tree.leaves(variables), strict=True):
        assert np.broadcast_shapes(m.shape, leaf.shape) == leaf.shape


def test_optimizer_state_shrinks_along(cut):
    apply, variables, args, _, _, plan = cut
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    update = jax.jit(optimizer.update)
    gradients = jax.jit(jax.grad(lambda v: (apply(v, *args) ** 2).sum()))(variables)
    _, state = update(gradients, jax.jit(optimizer.init)(variables), variables)
    small_state = ca.shrink(state, plan)
    expected = ca.shrink(variables, plan)
    moments = small_state[1][0]
    assert int(moments.count) == 1
    for part, full in ((moments.mu, state[1][0].mu), (moments.nu, state[1][0].nu)):
        chex.assert_trees_all_equal_shapes_and_dtypes(part, expected)
        np.testing.assert_array_equal(part["in"]["w"], ca.shrink(full, plan)["in"]["w"])
    # One step goes on with it.
    update(jax.tree.map(jnp.ones_like, expected), small_state, expected)


@pytest.mark.parametrize("left_out", [optax.MaskedNode(), None])
def test_whole_layers_may_be_left_out(cut, left_out):
    _, variables, _, _, _, plan = cut
    first, *_ = variables
    small = ca.shrink(variables, plan)
    for tree in (
        variables | {first: left_out},
        dict.fromkeys(variables, left_out) | {first: variables[first]},
    ):
        part = ca.shrink({"mu": tree, "count": jnp.array(3)}, plan)
        chex.assert_trees_all_equal(
            part["mu"], {n: x if x is left_out else small[n] for n, x in tree.items()}
        )
        chex.assert_trees_all_equal_shapes(ca.expand(part, plan)["mu"], tree)


def test_optimizers_by_layer(cut):
    """`optax.multi_transform` leaves out whole layers, not their leaves one by one."""
    _, variables, _, _, _, plan = cut
    labels = dict.fromkeys(variables, "slow") | {"in": "fast"}
    optimizer = optax.multi_transform({"slow": optax.adam(1e-3), "fast": optax.adam(1e-2)}, labels)
    small = ca.shrink(variables, plan)
    state = ca.shrink(jax.jit(optimizer.init)(variables), plan)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.jit(optimizer.init)(small))
    jax.jit(optimizer.update)(small, state, small)


def test_trees_that_hold_more_are_refused(cut):
    """They would come out half cut."""
    *_, plan = cut
    variables = cut[1]
    more = variables | {"head": jnp.ones(3)}
    with pytest.raises(PlanError, match=r"beside the leaves of the plan.*'head'.*does not know"):
        ca.shrink({"weights": more, "average": variables}, plan)
    with pytest.raises(PlanError, match=r"beside the leaves of the plan.*'head'.*does not know"):
        ca.shrink(more, plan)


def test_holes_alone_are_nothing(cut):
    *_, plan = cut
    variables = cut[1]
    for tree in (None, {"x": jnp.ones(7), "n": None}, dict.fromkeys(variables)):
        with pytest.raises(PlanError, match="no sub-tree has the leaves of the plan"):
            ca.shrink(tree, plan)
    first, *_ = variables
    with pytest.raises(PlanError, match=r"beside the leaves of the plan.*'head'.*does not know"):
        ca.shrink([variables, {**variables, first: None, "head": jnp.ones(3)}], plan)


def test_collections_that_hold_more_are_refused():
    def apply(v, x):
        return jnp.tanh(x @ v["params"]["a"] + v["state"]["mean"]) @ v["params"]["b"]

    variables = {"params": {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, "state": {"mean": jnp.ones(4)}}
    plan = ca.plan_units(ca.find_groups(apply, variables, jnp.ones((1, 3))), np.arange(4) < 3)
    assert ca.shrink({**variables, "step": jnp.array(0)}, plan)["state"]["mean"].shape == (3,)
    variables["params"]["c"] = jnp.ones(2)
    with pytest.raises(PlanError, match=r"beside the leaves of the plan.*'c'.*does not know"):
        ca.shrink(variables, plan)


def test_gradients_of_integers_shrink():
    def apply(v, x):
        return x @ v["w"] * v["codes"] @ v["w"].T

    variables = {"w": jnp.ones((3, 4)), "codes": jnp.arange(4)}
    plan = ca.plan_units(ca.find_groups(apply, variables, jnp.ones((1, 3))), np.arange(4) < 3)
    gradients = jax.grad(lambda v: apply(v, jnp.ones((1, 3))).sum(), allow_int=True)(variables)
    small = ca.shrink(gradients, plan)
    assert (small["codes"].shape, small["codes"].dtype) == ((3,), jax.dtypes.float0)
    assert ca.expand(small, plan)["codes"].shape == (4,)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere it has to be copied")
def test_what_is_cut_on_the_host_is_handed_over_uncopied():
    for shape in ((3, 5), (7,), (2, 3, 11)):
        array = trees._fresh(shape, np.dtype("float32"))
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_flax_collections_shrink_on_their_own():
    def apply(v, x):
        return jnp.tanh(x @ v["params"]["a"]) @ v["params"]["b"]

    variables = {"params": {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}}
    plan = ca.plan_units(ca.find_groups(apply, variables, jnp.ones((1, 3))), np.arange(4) < 3)
    assert ca.shrink(variables["params"], plan)["a"].shape == (3, 3)


def test_plan_json_round_trip(cut, tmp_path):
    plan = cut[-1]
    assert ca.Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert hash(ca.Plan.load(tmp_path / "plan.json")) == hash(plan)


def test_plan_counts_parameters(cut):
    _, variables, _, _, _, plan = cut
    small = ca.shrink(variables, plan)
    assert plan.parameters == sum(x.size for x in jax.tree.leaves(small))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("hash"), "not a plan"),
        (lambda d: d.update(format="another"), "the format is 'another'"),
        (lambda d: d.pop("counts"), "altered"),
        (lambda d: d["counts"][0].__setitem__(1, 1), "altered"),
        (lambda d: d["leaves"][0].update(shape=[4, 4]), "altered"),
        (lambda d: d["leaves"][0].update(kept=[[0]] * len(d["leaves"][0]["kept"])), "altered"),
    ],
)
def test_damaged_plans_are_refused(cut, change, message):
    data = json.loads(cut[-1].to_json())
    change(data)
    with pytest.raises(PlanError, match=message):
        ca.Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["{", "[]", "1"])
def test_text_that_is_no_plan(text):
    with pytest.raises(PlanError, match="not a plan"):
        ca.Plan.from_json(text)


def test_a_file_that_holds_no_text(tmp_path):
    (tmp_path / "plan").write_bytes(bytes(range(256)))
    with pytest.raises(PlanError, match="not a plan"):
        ca.Plan.load(tmp_path / "plan")


def test_plan_for_another_model(cut):
    plan = cut[-1]
    _, other, args = MODELS["mlp"]()
    with pytest.raises(PlanError, match="no sub-tree has the leaves of the plan"):
        ca.shrink(other, plan)
    with pytest.raises(PlanError, match="do not fit the plan"):
        ca.slim(MODELS["mlp"]()[0], plan)(other, *args)


def test_full_variables_in_the_small_function(cut):
    apply, variables, args, _, _, plan = cut
    with pytest.raises(PlanError, match=r"Pass shrink\(variables, plan\)"):
        ca.slim(apply, plan)(variables, *args)


def test_function_that_needs_what_was_cut(cut):
    _, variables, args, _, _, plan = cut

    def looks_inside(v, x):
        return v["conv"]["k"]

    with pytest.raises(PlanError, match="needs whole"):
        ca.slim(looks_inside, plan)(ca.shrink(variables, plan), *args)


def test_function_that_ties_what_was_separated():
    def apart(v, x):
        return jnp.tanh(x @ v["a"]) @ v["c"] + jnp.tanh(x @ v["b"]) @ v["c2"]

    def together(v, x):
        return (x @ v["a"] + x @ v["b"]) @ (v["c"] + v["c2"])

    variables = {k: np.ones((2, 3)) for k in "ab"} | {k: np.ones((3, 2)) for k in ("c", "c2")}
    groups = ca.find_groups(apart, variables, np.ones((1, 2)))
    plan = ca.plan_units(groups, np.array([True, True, False, False, True, True]))
    with pytest.raises(PlanError, match="ties together"):
        ca.slim(together, plan)(ca.shrink(variables, plan), np.ones((1, 2)))


def test_soft_gates_are_no_choice(cut):
    groups = cut[3]
    with pytest.raises(PlanError, match=r"plan_units: keep holds 0\.3, .*threshold"):
        ca.plan_units(groups, np.full(groups.units, 0.3))
    assert ca.plan_units(groups, np.ones(groups.units)) == ca.plan_units(groups, np.ones(groups.units, bool))


def test_emptied_group_is_refused(cut):
    groups = cut[3]
    with pytest.raises(PlanError, match="nothing of the group `conv`"):
        ca.plan_units(groups, np.arange(groups.units) >= 4)
    with pytest.raises(PlanError, match="one flag per unit"):
        ca.plan_units(groups, np.ones(3, bool))


def test_emptied_piece_is_refused():
    def apply(v, x):
        left, right = jnp.split(x @ v["a"], 2, -1)
        return jnp.concatenate([jnp.tanh(left), right], -1) @ v["b"]

    variables = {"a": np.ones((3, 6)), "b": np.ones((6, 2))}
    groups = ca.find_groups(apply, variables, np.ones((1, 3)))
    assert len(groups.groups) == 1
    assert sorted(map(tuple, groups.guarded)) == [(0, 1, 2), (3, 4, 5)]
    with pytest.raises(PlanError, match="make up a whole axis"):
        ca.plan_units(groups, np.arange(6) < 3)


def test_thousands_of_equations_in_a_row_may_run_un_cut():
    def net(v, x):
        h = x @ v["a"]
        for _ in range(1200):
            h = jnp.cos(h)  # No longer zero where h is, ...
        return jnp.cumprod(h, axis=1) @ v["b"]  # ... which a product over the axis needs.

    variables = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 2))}
    groups = ca.find_groups(net, variables, jnp.ones((2, 3)))
    ran = ca.uncut(groups, ca.plan_units(groups, np.arange(6) < 3))
    assert len(ran) == 1201
    assert [u.again for u in ran].count(False) == 1


@pytest.mark.parametrize("preset", ["dense", "conv"])
def test_flops_that_are_left(preset):
    """The small function's own trace has the FLOPs that the cost of its counts says."""
    model = models.autoencoder(preset)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    groups = ca.find_groups(model.apply, variables, jnp.zeros((1, 28, 28, 1)), released=("latent",))
    plan = ca.plan_units(groups, random_keep(groups, np.random.default_rng(0)))
    cost = flop_cost(groups)
    full_width, left = what_runs(groups, plan)
    assert full_width == ()
    assert left == cost.exact(np.array([kept for _, kept, _ in plan.counts]))
    assert 0 < left < cost.total


@pytest.mark.parametrize("length", [1, 7])
def test_what_runs_in_a_loop_counts_every_time(length):
    def net(v, x):
        def step(h, _):
            return jnp.cumprod(jnp.cos(h @ v["a"]), axis=1) @ v["b"], None

        return jax.lax.scan(step, x, length=length)[0]

    variables = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 3))}
    groups = ca.find_groups(net, variables, jnp.ones((2, 3)))
    ran = ca.uncut(groups, ca.plan_units(groups, np.arange(6) < 3))
    assert [(u.flops, u.again) for u in ran] == [(length * 2 * 6, False), (length * 2 * 6, True)]
    products, rest = length * 2 * 2 * (2 * 3 * 6), length * 2 * (2 * 6)
    assert work_in(groups) == products + rest + 3 * 6  # The loop itself counts as its largest operand.


def test_the_callers_configuration_may_change():
    """Precision, promotion, random bits: a small function that has been called asks again."""

    def net(v, x):
        return jnp.tanh(x @ v["a"]) @ v["b"]

    variables, x = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 3))}, jnp.ones((2, 3))
    groups = ca.find_groups(net, variables, x)
    plan = ca.plan_units(groups, np.arange(6) < 3)
    small, variables = ca.slim(net, plan), ca.shrink(variables, plan)
    before = str(jax.make_jaxpr(small)(variables, x))
    with jax.default_matmul_precision("highest"):
        precise = str(jax.make_jaxpr(small)(variables, x))
    assert (before.count("HIGHEST"), precise.count("HIGHEST")) == (0, 4)
    assert str(jax.make_jaxpr(small)(variables, x)) == before


CHANGED = {
    "precision of floats": lambda: jax.enable_x64(True),
    "random bits": lambda: jax.default_prng_impl("rbg"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_is_drawn_follows_the_callers_configuration(what):
    """A small function that has been called draws what the full one draws now, not what it drew before."""

    def net(v, x):
        return jnp.tanh(x @ v["a"]) @ v["b"] + jax.random.normal(jax.random.key(0))

    variables, x = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 3))}, jnp.ones((2, 3))
    plan = ca.plan_units(ca.find_groups(net, variables, x), np.arange(6) < 3)
    small, variables = ca.slim(net, plan), ca.shrink(variables, plan)
    before = small(variables, x)
    with CHANGED[what]():
        got, expected = small(variables, x), net(ca.expand(variables, plan), x)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert not np.isclose(got, before).any()


def test_promotion_that_the_caller_forbids():
    def net(v, x):
        return jnp.tanh(x @ v["a"]) @ v["b"] + jnp.arange(3)

    variables, x = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 3))}, jnp.ones((2, 3))
    plan = ca.plan_units(ca.find_groups(net, variables, x), np.arange(6) < 3)
    small, variables = ca.slim(net, plan), ca.shrink(variables, plan)
    small(variables, x)
    with jax.numpy_dtype_promotion("strict"), pytest.raises(TraceError, match="TypePromotionError"):
        small(variables, x)
