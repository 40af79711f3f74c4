"""Demands on groups: kept by selection and search, refused where they cannot be."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax.cost import parameter_cost
from compaware_jax.errors import BudgetError, PlanError
from compaware_jax.law import law_errors, random_keep
from compaware_jax.search.select import keep_units, round_counts, uniform_counts

SIZES = {"encoder": 64, "middle": 48, "decoder": 30}


def chain():
    rng = np.random.default_rng(0)
    widths = [5, *SIZES.values(), 3]
    names = [*SIZES, "head"]
    variables = {
        name: {"w": rng.normal(size=(m, n)), "b": rng.normal(size=n)}
        for name, m, n in zip(names, widths, widths[1:], strict=False)
    }

    def apply(v, x):
        for name in SIZES:
            x = jnp.tanh(x @ v[name]["w"] + v[name]["b"])
        return x @ v["head"]["w"] + v["head"]["b"]

    return apply, variables, (rng.normal(size=(4, 5)),)


@pytest.fixture
def groups():
    apply, variables, args = chain()
    return ca.find_groups(apply, variables, *args)


def test_counts_keep_to_every_demand(groups):
    demanded = ca.constrain(
        groups, whole="decoder", floor={"*": 2, "encoder/b": 0.3}, ceiling={"middle": 16}, multiple_of=8
    )
    assert demanded.floors.tolist() == [24, 8, 30]
    assert demanded.ceilings.tolist() == [64, 16, 30]
    cost = parameter_cost(demanded)
    for fraction in (0.4, 0.5, 0.6):
        limit = int(fraction * cost.total)
        for counts in (round_counts(cost, np.array([0.3, 0.9, 0.2]), limit), uniform_counts(cost, limit)):
            assert cost.exact(counts) <= limit
            assert (counts >= demanded.floors).all()
            assert (counts <= demanded.ceilings).all()
            assert counts[0] % 8 == counts[1] % 8 == 0
            assert counts[2] == 30


@pytest.mark.parametrize("integer", [np.int64, np.int32, jnp.asarray])
def test_integers_of_numpy_and_jax_are_units(groups, integer):
    demanded = ca.constrain(
        groups, floor={"encoder": integer(1)}, ceiling={"middle": integer(1)}, multiple_of=integer(1)
    )
    assert demanded.floors.tolist() == [1, 1, 1]
    assert demanded.ceilings.tolist() == [64, 1, 30]
    assert ca.constrain(groups, floor=np.float32(1)).floors.tolist() == [64, 48, 30]


@pytest.mark.parametrize("amount", [True, np.True_, -1, 1.5, np.float32(1.5), "3", None, float("nan")])
def test_what_is_no_amount_is_refused(groups, amount):
    with pytest.raises(BudgetError, match=r"floor=.*expected a number of units"):
        inspect.unwrap(ca.constrain)(groups, floor={"encoder": amount})


def test_demands_are_shown(groups):
    assert "may keep" not in str(groups)
    text = str(
        ca.constrain(groups, multiple_of=8, floor={"encoder": 9}, whole="decoder", ceiling={"middle": 8})
    )
    lines = {name: next(x for x in text.splitlines() if f"   {name}  " in x) for name in SIZES}
    assert "16 to 64 by 8" in lines["encoder"]
    assert " 8 " in lines["middle"]
    assert "all 30" in lines["decoder"]


def test_a_component_that_produces_nothing_stands_for_what_reaches_it(groups):
    assert groups.components == (*SIZES, "head")
    np.testing.assert_array_equal(ca.constrain(groups, whole="head").floors, [1, 1, 30])
    np.testing.assert_array_equal(ca.constrain(groups, whole="middle").floors, [1, 48, 1])


def test_multiples_count_indices_not_units():
    """A unit that holds four indices of an axis reaches a multiple of eight with two."""

    def apply(v, x):
        return jnp.tanh(x @ v["a"]).reshape(-1, 4, 16).sum(1) @ v["b"]

    variables = {"a": np.ones((3, 64)), "b": np.ones((16, 2))}
    found = ca.find_groups(apply, variables, np.ones((2, 3)))
    assert [times for _, _, times in found.groups[0].axes] == [4, 1]
    assert ca.constrain(found, multiple_of=8).steps.tolist() == [8]
    alone = ca.constrain(found, multiple_of={"a": 8})
    assert alone.steps.tolist() == [8]


def test_wide_limit_spends_up_to_whole_groups(groups):
    """A group whose size is no multiple may still stay whole."""
    cost = parameter_cost(ca.constrain(groups, multiple_of=8))
    counts = round_counts(cost, np.ones(3), cost.total)
    assert counts.tolist() == [64, 48, 30]


def test_the_search_keeps_to_the_demands():
    apply, variables, args = chain()
    demanded = ca.constrain(
        ca.find_groups(apply, variables, *args), floor={"middle": 20}, ceiling={"encoder": 16}
    )
    target = np.random.default_rng(1).normal(size=(4, 3))
    result = ca.compress(
        apply,
        variables,
        lambda f, v, batch: jnp.mean((f(v, batch) - target) ** 2),
        lambda step: jnp.asarray(args[0]),
        groups=demanded,
        budget=ca.params(0.25),
        search=ca.GradientSearch(steps=30),
        fine_tune=5,
        progress=False,
    )
    counts = {name: kept for name, kept, _ in result.plan.counts}
    assert counts["middle"] >= 20
    assert counts["encoder"] <= 16


@pytest.mark.usefixtures("x64")
def test_groups_forced_together_leave_index_by_index():
    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(3, 8)), "b": rng.normal(size=(8, 8)), "c": rng.normal(size=(8, 2))}

    def apply(v, x):
        return jnp.tanh(jnp.tanh(x @ v["a"]) @ v["b"]) @ v["c"]

    x = rng.normal(size=(4, 3))
    apart = ca.find_groups(apply, variables, x)
    tied = ca.constrain(apart, together=[("a", "b")])
    assert [g.units for g in apart.groups] == [8, 8]
    assert [(g.name, g.units, len(g.axes)) for g in tied.groups] == [("a", 8, 4)]
    without_one = ca.shrink(variables, ca.plan_units(tied, np.arange(8) > 0))
    left = sum(leaf.size for leaf in jax.tree.leaves(without_one))
    assert tied.groups[0].parameters == sum(leaf.size for leaf in variables.values()) - left
    keep = random_keep(tied, rng)
    plan = ca.plan_units(tied, keep)
    assert plan.kept[1][0] == plan.kept[1][1] == tuple(np.flatnonzero(keep))
    assert max(law_errors(apply, variables, x, keep=keep, groups=tied)) <= 1e-10


def test_groups_forced_apart_have_coefficients_of_their_own(groups):
    parts = ca.constrain(groups, apart={"encoder": 4}, floor={"encoder/0": 3})
    assert [g.name for g in parts.groups[:4]] == [f"encoder/{i}" for i in range(4)]
    assert parts.units == groups.units
    assert parts.floors.tolist() == [3, 1, 1, 1, 1, 1]
    counts = np.array([3, 1, 2, 1, 5, 5])
    keep = keep_units(parts, np.random.default_rng(0).random(parts.units), counts)
    plan = ca.plan_units(parts, keep)
    assert len(plan.kept[[leaf.path for leaf in plan.leaves].index("encoder/w")][1]) == 7


@pytest.mark.usefixtures("x64")
def test_a_group_is_emptied_only_where_that_is_allowed():
    rng = np.random.default_rng(0)
    shapes = {"in": (3, 8), "up": (8, 5), "down": (5, 8), "out": (8, 2)}
    variables = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def apply(v, x):
        x = x @ v["in"]
        inner = jnp.exp(x @ v["up"])  # Not zero where a channel is gone, ...
        return (x + inner.max(-1, keepdims=True) + jnp.tanh(x @ v["up"]) @ v["down"]) @ v["out"]

    x = rng.normal(size=(4, 3))
    groups = ca.find_groups(apply, variables, x)
    inner = next(group for group in groups.groups if group.name == "up")
    keep = np.ones(groups.units, bool)
    keep[inner.slice] = False
    with pytest.raises(PlanError, match=r"nothing of the group `up`.*may_empty"):
        ca.plan_units(groups, keep)
    allowed = ca.constrain(groups, may_empty="up")
    assert allowed.floors.tolist() == [0 if group is inner else 1 for group in groups.groups]
    plan = ca.plan_units(allowed, keep)
    assert ca.shrink(variables, plan)["up"].shape == (8, 0)
    assert ca.Plan.from_json(plan.to_json()) == plan
    assert max(law_errors(apply, variables, x, keep=keep, groups=allowed)) <= 1e-10
    # ... so the largest over nothing runs at full width, and the product over nothing does not run.
    assert [e.where.split("`")[1] for e in ca.uncut(allowed, plan) if not e.again] == ["reduce_max"]
    cost = parameter_cost(allowed)
    assert round_counts(cost, np.where(groups.sizes == 5, 1e-3, 1.0), 40).tolist() == [8, 0]


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        ({"floor": {"nowhere": 3}}, "floor names 'nowhere', which matches no group"),
        ({"floor": 1.5}, r"floor=1.5, expected a number of units \(int\) or a share"),
        ({"floor": {"middle": 20}, "ceiling": {"middle": 10}}, "`middle` .* at least 20 and at most 10"),
        ({"multiple_of": 0}, "multiple_of=0, expected a whole number"),
        ({"together": [("encoder", "middle")]}, "cannot be forced together"),
        ({"together": [("encoder", "nowhere")]}, "'nowhere' is no group"),
        ({"together": ("encoder", "middle")}, "expected a list of pairs of names"),
        ({"together": 3}, "expected a list of pairs of names"),
        ({"together": [3]}, "expected a list of pairs of names"),
        ({"together": [("encoder", "middle", "decoder")]}, "expected a list of pairs of names"),
        ({"apart": {"decoder": 99}}, "cannot be split into 99 parts"),
        ({"apart": {"decoder": 2.5}}, r"cannot be split into 2\.5 parts. Expected a whole number"),
        ({"apart": ["decoder"]}, "expected a mapping from names of groups"),
        ({"whole": 3}, "whole=3, expected a pattern of groups"),
        ({"ceiling": {"middle": 5}, "multiple_of": 8}, "Lower its floor or raise its ceiling"),
    ],
)
def test_demands_that_cannot_be(groups, demand, message):
    with pytest.raises(BudgetError, match=message):
        inspect.unwrap(ca.constrain)(groups, **demand)


def test_ties_may_form_a_chain():
    def apply(v, x):
        for w in v[:-1]:
            x = jnp.tanh(x @ w)
        return x @ v[-1]

    groups = ca.find_groups(apply, [np.ones((8, 8))] * 5, np.ones((1, 8)))
    a, b, c, d = (group.name for group in groups.groups)
    for pairs in ([(a, b), (b, c), (c, d)], [(c, d), (b, c), (a, b)], [(a, b), (c, d), (d, b), (a, c)]):
        tied = ca.constrain(groups, together=pairs)
        assert [group.units for group in tied.groups] == [8]
        keep = np.arange(8) < 5
        assert [w.shape for w in ca.shrink([np.ones((8, 8))] * 5, ca.plan_units(tied, keep))] == [
            (8, 5), (5, 5), (5, 5), (5, 5), (5, 8)
        ]  # fmt: skip
    assert ca.constrain(groups, ceiling=4, floor=0.25).ceilings.tolist() == [4] * 4


def test_names_with_brackets_are_names():
    """As tables show axes; in a shell pattern, brackets would be a choice of letters."""
    variables = {"w[0]": jnp.ones((3, 6)), "w": jnp.ones((6, 5)), "b": jnp.ones((5, 2))}
    groups = ca.find_groups(
        lambda v, x: jnp.tanh(jnp.tanh(x @ v["w[0]"]) @ v["w"]) @ v["b"], variables, jnp.ones((1, 3))
    )
    assert [group.name for group in groups.groups] == ["w[0]", "w"]
    assert ca.constrain(groups, whole="w[0]").floors.tolist() == [6, 1]
    assert ca.constrain(groups, whole="b[0]").floors.tolist() == [1, 5]
    variables = {"w": jnp.ones((3, 6)), "w1": jnp.ones((6, 5)), "b": jnp.ones((5, 2))}
    groups = ca.find_groups(
        lambda v, x: jnp.tanh(jnp.tanh(x @ v["w"]) @ v["w1"]) @ v["b"], variables, jnp.ones((1, 3))
    )
    assert ca.constrain(groups, whole="w[1]").floors.tolist() == [6, 1]
    assert ca.constrain(groups, whole="w[12]").floors.tolist() == [1, 5]


def test_demands_add_up(groups):
    first = ca.constrain(groups, whole="encoder", ceiling={"middle": 30}, may_empty="decoder")
    both = ca.constrain(first, multiple_of=8, floor={"middle": 9})
    assert both.floors.tolist() == [64, 16, 0]
    assert both.ceilings.tolist() == [64, 24, 30]
    assert ca.constrain(both, multiple_of=12).steps.tolist() == [24, 24, 24]
    with pytest.raises(BudgetError, match="under demands already"):
        ca.constrain(first, apart={"middle": 2})
    with pytest.raises(BudgetError, match="would have to keep at least"):
        ca.constrain(first, ceiling={"encoder": 8})
