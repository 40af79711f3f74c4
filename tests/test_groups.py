"""Groups: exact listings of small models, and what is refused or reported."""

import copy
import gc
import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Primitive

import compaware_jax as ca
from compaware_jax.errors import PlanError, RequestError, TraceError, UnknownPrimitiveError
from compaware_jax.law import law_errors, random_keep
from compaware_jax.models import autoencoder
from tests.models import MODELS

GOLDEN = Path(__file__).parent / "golden"


def listing(groups):
    return {
        "groups": [
            {
                "name": g.name,
                "units": g.units,
                "components": list(g.components),
                "axes": [list(axis) for axis in g.axes],
                "parameters": g.parameters,
            }
            for g in groups.groups
        ],
        "fixed": [[f.path, f.axis, f.indices] for f in groups.fixed],
        "unread": list(groups.unread),
    }


@pytest.mark.parametrize("name", [*MODELS, "dense", "conv"])
def test_golden(name):
    """Listings checked by hand; a change here is a change of what leaves together."""
    if name in MODELS:
        apply, variables, args = MODELS[name]()
        groups = ca.find_groups(apply, variables, *args)
    else:
        model = autoencoder(name)
        variables = jax.eval_shape(model.init, jax.random.key(0))
        groups = ca.find_groups(model.apply, variables, jnp.zeros((1, 28, 28, 1)), released=("latent",))
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    assert listing(groups) == expected


def test_abstract_variables_give_the_same_groups():
    apply, variables, args = MODELS["convolutional"]()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (variables, args))
    concrete = ca.find_groups(apply, variables, *args)
    abstract = ca.find_groups(apply, shapes[0], *shapes[1])
    assert listing(concrete) == listing(abstract)


def test_units_of_a_group_are_consecutive_and_complete():
    apply, variables, args = MODELS["attention"]()
    groups = ca.find_groups(apply, variables, *args)
    seen = np.concatenate([units for axes in groups.units_of for units in axes])
    assert set(seen[seen >= 0]) == set(range(groups.units))
    assert [g.offset for g in groups.groups] == [0, *np.cumsum(groups.sizes)[:-1]]


def test_table_says_why_axes_stay_whole():
    apply, variables, args = MODELS["convolutional"]()
    text = str(ca.find_groups(apply, variables, *args))
    assert "conv/k[0]" in text
    assert "spatial axis of the kernel" in text
    assert "data input" in text
    assert "output of the function" in text


def test_unknown_primitive_is_kept_whole_and_named():
    twisted = Primitive("twisted")
    twisted.def_abstract_eval(lambda x: x)

    def apply(v, x):
        return twisted.bind(x @ v["a"]) @ v["b"]

    variables = {"a": np.ones((3, 4)), "b": np.ones((4, 2))}
    groups = ca.find_groups(apply, variables, np.ones((2, 3)))
    assert groups.units == 0
    assert "`twisted`" in groups.analysis.unknown[0]
    assert "register_rule" in str(groups)
    with pytest.raises(UnknownPrimitiveError, match=r"no rule for `twisted`.*register_rule"):
        ca.find_groups(apply, variables, np.ones((2, 3)), strict=True)


def test_rules_are_for_primitives():
    for wrong in ("sin", jnp.sin):
        with pytest.raises(RequestError, match=r"register_rule: got .*expected a primitive and a function"):
            inspect.unwrap(ca.register_rule)(wrong, lambda ledger, eqn, inputs: inputs)


def test_inexact_groups_are_left_alone_unless_released():
    def normed(v, x):
        return (x @ (v["a"] / jnp.linalg.norm(v["a"], axis=0))) @ v["b"]

    variables = {"a": np.ones((2, 4)), "b": np.ones((4, 2))}
    x = np.ones((2, 2))
    closed = ca.find_groups(normed, variables, x)
    assert closed.units == 0
    assert any("singular at zero; inexact=True releases it" in axis.reason for axis in closed.fixed)
    assert ca.find_groups(normed, variables, x, inexact=True).units == 4


def test_dead_code_ties_nothing():
    def apply(v, x):
        del_me = x @ v["a"] + x @ v["c"]
        return x @ v["a"] @ v["b"] + 0 * del_me.shape[0]

    variables = {"a": np.ones((3, 4)), "b": np.ones((4, 2)), "c": np.ones((3, 4))}
    groups = ca.find_groups(apply, variables, np.ones((2, 3)))
    assert groups.unread == ("c",)
    assert [g.axes for g in groups.groups] == [(("a", 1, 1), ("b", 0, 1))]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_again_afterwards(enabled):
    """The collector is paused while a function is analysed, and then as it was, also after an error."""
    seen = []

    def function(variables, x):
        seen.append(gc.isenabled())
        if x.shape == (2,):
            raise ValueError("refused")
        return x @ variables["w"]

    variables = {"w": jnp.ones((3, 2))}
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        ca.find_groups(function, variables, jnp.ones(3))
        assert gc.isenabled() == enabled
        with pytest.raises(TraceError, match="refused"):
            ca.find_groups(function, variables, jnp.ones(2))
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
    assert seen == [False, False]


def test_component_names_can_be_given():
    apply, variables, args = MODELS["mlp"]()
    groups = ca.find_groups(apply, variables, *args, components=lambda path: "one")
    assert groups.groups[0].components == ("one",)
    assert not groups.groups[0].coupling


def test_copies_are_the_same():
    apply, variables, args = MODELS["mlp"]()
    groups = ca.find_groups(apply, variables, *args)
    assert copy.deepcopy({"groups": groups})["groups"] is groups


def test_components_are_names():
    apply, variables, args = MODELS["mlp"]()
    with pytest.raises(RequestError, match=r"components\('.*'\) is None, expected the name of a component"):
        inspect.unwrap(ca.find_groups)(apply, variables, *args, components=lambda path: None)


def test_outputs_are_given_by_paths():
    def apply(v, x):
        hidden = jnp.tanh(x @ v["a"])
        return {"seen": {"hidden": hidden, "twice": 2 * hidden}, "y": hidden @ v["b"]}

    variables, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((5, 3))
    find = inspect.unwrap(ca.find_groups)
    assert find(apply, variables, x, released=None, deployed=None, state_outputs=None).units == 0
    groups = find(apply, variables, x, released="seen")
    assert groups.units == 4
    plan = ca.plan_units(groups, np.arange(4) < 3)
    small = ca.shrink(variables, plan)
    assert jax.tree.map(jnp.shape, ca.slim(apply, plan)(small, x)["seen"]) == {
        "hidden": (5, 3),
        "twice": (5, 3),
    }
    with pytest.raises(RequestError, match=r"released=3, expected tree paths"):
        find(apply, variables, x, released=3)
    with pytest.raises(RequestError, match=r"state_outputs=\['y'\], expected a dictionary"):
        find(apply, variables, x, state_outputs=["y"])
    with pytest.raises(PlanError, match=r"slim: released='nothing' names no output"):
        ca.slim(apply, plan, released=["nothing"])(small, x)


def test_released_output_must_exist():
    apply, variables, args = MODELS["mlp"]()
    with pytest.raises(TraceError, match="released='latent' names no output"):
        ca.find_groups(apply, variables, *args, released=("latent",))


def test_variables_that_do_not_fit():
    apply, variables, args = MODELS["mlp"]()
    variables["second"]["w"] = np.ones((9, 3))
    with pytest.raises(TraceError, match="cannot be traced with these variables"):
        ca.find_groups(apply, variables, *args)
    with pytest.raises(TraceError, match="`first` is str, expected an array"):
        ca.find_groups(apply, {"first": "w"}, *args)


def test_many_axes_that_stay_whole_are_counted_by_reason(monkeypatch):
    apply, variables, args = MODELS["convolutional"]()
    groups = ca.find_groups(apply, variables, *args)
    monkeypatch.setattr("compaware_jax.coupling.groups._LISTED", 2)
    text = str(groups)
    assert "first of them" in text
    assert " spatial axis of the kernel " in text
    assert {f.kind for f in groups.fixed} >= {"spatial axis of the kernel", "output of the function"}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fused", [True, False])
def test_heads_leave_whole_or_within_on_request(fused):
    """Four heads of six channels, on one axis of the projections."""
    rng = np.random.default_rng(0)
    shapes = {"in": (5, 8), "out": (24, 2)}
    shapes |= {"qkv": (8, 72)} if fused else {"q": (8, 24), "k": (8, 24), "v": (8, 24)}
    variables = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def apply(v, x):
        x = x @ v["in"]
        parts = jnp.split(x @ v["qkv"], 3, -1) if fused else [x @ v[name] for name in ("q", "k", "v")]
        q, k, w = (part.reshape(*part.shape[:2], 4, 6).swapaxes(1, 2) for part in parts)
        mixed = jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ w
        return mixed.swapaxes(1, 2).reshape(*x.shape[:2], 24) @ v["out"]

    x = rng.normal(size=(2, 3, 5))
    whole = ca.find_groups(apply, variables, x)
    within = ca.find_groups(apply, variables, x, within_heads=True)
    assert [group.units for group in whole.groups] == [8, 4]
    assert [group.units for group in within.groups] == [8, 6, 6]  # query-key channels, value channels
    keep = random_keep(within, rng)
    assert max(law_errors(apply, variables, x, keep=keep, groups=within)) <= 1e-10
    plan = ca.Plan.from_json(ca.plan_units(within, keep).to_json())  # It knows how it cuts.
    longer = rng.normal(size=(3, 7, 5))
    small = ca.slim(apply, plan)(ca.shrink(variables, plan), longer)
    masked = ca.apply_mask(within, jnp.asarray(keep, float), variables)
    np.testing.assert_allclose(small, apply(masked, longer), rtol=1e-10)


STACKED = {
    "flattened": (lambda both, v, x: flat(both.swapaxes(0, 1)) @ v["both"], [6, 6]),
    "in turn": (lambda both, v, x: flat(jnp.moveaxis(both, 0, 2)) @ v["both"], [6, 6]),
    "unpacked": (lambda both, v, x: both[0] @ v["first"] + jnp.cos(both[1]) @ v["second"], [6, 6]),
    "averaged": (lambda both, v, x: both.mean(0) @ v["first"], [6]),
    "weighed": (lambda both, v, x: weighed(both, x @ v["gate"]) @ v["first"], [6]),
    "scaled apiece": (lambda both, v, x: flat((both * v["scale"]).swapaxes(0, 1)) @ v["both"], [6]),
    "in one product": (lambda both, v, x: jnp.einsum("tbh,thk->bk", both, v["cube"]), [6]),
    "returned in part": (lambda both, v, x: (both[0] @ v["first"], both[:, :, :1]), [5, 5]),
}


def flat(x):
    return x.reshape(len(x), -1)


def weighed(both, logits):
    return jnp.einsum("tbh,bt->bh", both, jax.nn.softmax(logits))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("stack", [jnp.stack, lambda xs: jnp.concatenate([x[None] for x in xs])])
@pytest.mark.parametrize("use", STACKED)
def test_stacked_values_leave_apart_where_that_frees_more(use, stack):
    """Whole branches would be few units: where not all can leave one by one, they leave index by index."""
    rng = np.random.default_rng(0)
    shapes = {
        "a": (3, 6), "b": (3, 6), "both": (12, 2), "first": (6, 2), "second": (6, 2), "gate": (3, 2),
        "scale": (2, 1, 1), "cube": (2, 6, 2),
    }  # fmt: skip
    variables = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    read, expected = STACKED[use]

    def apply(v, x):
        return read(stack([jnp.tanh(x @ v["a"]), jax.nn.sigmoid(x @ v["b"])]), v, x)

    x = rng.normal(size=(4, 3))
    groups = ca.find_groups(apply, variables, x)
    assert groups.sizes.tolist() == expected
    for _ in range(3):
        assert max(law_errors(apply, variables, x, keep=random_keep(groups, rng), groups=groups)) <= 1e-10


@pytest.mark.usefixtures("x64")
def test_boundary_frees_what_is_read_of_inputs_and_written_to_outputs():
    """A skip keeps the input whole, a bias the output; only the kernels' rows and columns leave."""
    rng = np.random.default_rng(0)
    variables = {"in": rng.normal(size=(6, 5)), "out": rng.normal(size=(5, 6)), "bias": rng.normal(size=6)}

    def apply(v, x):
        return jax.nn.sigmoid(jnp.tanh(x["seen"] @ v["in"]) @ v["out"] + v["bias"]) + x["seen"]

    x = {"seen": rng.normal(size=(3, 6))}
    assert [g.axes for g in ca.find_groups(apply, variables, x).groups] == [(("in", 1, 1), ("out", 0, 1))]
    groups = ca.find_groups(apply, variables, x, boundary=True)
    assert [(g.axes, g.units) for g in groups.groups] == [
        ((("in", 0, 1),), 6),
        ((("in", 1, 1), ("out", 0, 1)), 5),
        ((("out", 1, 1),), 6),
    ]
    assert [(f.path, f.axis, f.reason) for f in groups.fixed] == [("bias", 0, "data input `x/seen`")]
    keep = np.array([1, 0, 0, 1, 0, 1, *[1, 1, 0, 1, 0], *[0, 1, 1, 0, 0, 1]], bool)
    plan = ca.Plan.from_json(ca.plan_units(groups, keep).to_json())  # It knows how it cuts.
    small = ca.shrink(variables, plan)
    assert {name: leaf.shape for name, leaf in small.items()} == {"in": (3, 3), "out": (3, 3), "bias": (6,)}
    more = {"seen": rng.normal(size=(7, 6))}
    masked = ca.apply_mask(groups, jnp.asarray(keep, float), variables)
    np.testing.assert_allclose(ca.slim(apply, plan)(small, more), apply(masked, more), rtol=1e-12)
    assert ca.uncut(groups, plan) == ()


@pytest.mark.usefixtures("x64")
def test_boundary_where_data_and_channels_meet():
    """Of one kernel's rows some read the observation, some a latent: those leave with its channels."""
    rng = np.random.default_rng(1)
    variables = {name: rng.normal(size=shape) for name, shape in {"a": (3, 4), "b": (7, 2)}.items()}

    def apply(v, x):
        return jnp.concatenate([x, jnp.exp(x @ v["a"])], -1) @ v["b"]

    x = rng.normal(size=(5, 3))
    groups = ca.find_groups(apply, variables, x, boundary=True)
    assert [g.axes for g in groups.groups] == [
        (("a", 0, 1),),
        (("a", 1, 1), ("b", 0, 1)),
        (("b", 0, 1),),
        (("b", 1, 1),),
    ]
    keep = np.array([[1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0]], bool)
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= 1e-10


def test_leaves_with_the_names_of_collections():
    """A leaf `params` or `state` at the top is a leaf."""
    variables = {"params": jnp.ones((3, 8)), "state": jnp.ones(8), "b": jnp.ones((8, 2))}
    groups = ca.find_groups(lambda v, x: (x @ v["params"] + v["state"]) @ v["b"], variables, jnp.ones((1, 3)))
    assert [(g.name, g.units) for g in groups.groups] == [("params", 8)]
    plan = ca.plan_units(groups, jnp.arange(8) < 3)
    assert ca.shrink(variables, plan)["state"].shape == (3,)
    with pytest.raises(PlanError):
        ca.shrink((optax.EmptyState(), {"foo": jnp.ones((3, 8))}), plan)
