"""Mixtures of experts: tokens that choose their experts, and experts that choose their tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import compaware_jax as ca
from compaware_jax.law import law_errors

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
VARIABLES = {"a": RNG.normal(size=(3, 6)), "b": RNG.normal(size=(6, 2))}
X = RNG.normal(size=(4, 3))


def routed(v, x):
    """The better of two experts of each row, rows sorted by expert."""
    expert = jnp.argmax(x @ v["route"], -1)
    order = jnp.argsort(expert)
    h = lax.ragged_dot(x[order], v["a"], jnp.bincount(expert, length=2))
    y = lax.ragged_dot(jnp.tanh(h), v["b"], jnp.bincount(expert, length=2))
    return jnp.zeros_like(y).at[order].set(y)


def test_ragged_product():
    shapes = {"in": (3, 4), "route": (4, 2), "a": (2, 4, 6), "b": (2, 6, 4), "out": (4, 2)}
    variables = {name: RNG.normal(size=shape) for name, shape in shapes.items()}

    def apply(v, x):
        h = x @ v["in"]
        return (h + routed(v, h)) @ v["out"]

    rows = RNG.normal(size=(7, 3))
    groups = ca.find_groups(apply, variables, rows, strict=True)
    # The stream, the columns of the route, what is hidden in both experts; no expert leaves whole.
    assert sorted(groups.sizes.tolist()) == [2, 4, 6]
    assert {axis.path for axis in groups.fixed if "rows or groups" in axis.reason} == {"a", "b"}
    keep = np.arange(groups.units) % 3 != 1
    assert max(law_errors(apply, variables, rows, keep=keep, groups=groups)) <= 1e-10
    plan = ca.plan_units(groups, keep)
    assert [e.where for e in ca.uncut(groups, plan) if "ragged" in e.where] == []


def test_ragged_product_of_contracted_rows():
    """As in the gradient of one: sums over runs of rows, of which nothing leaves."""

    def apply(v, x):
        h = jnp.tanh(x @ v["a"])
        sizes = jnp.array([1, 3], jnp.int32)
        slope = jax.grad(lambda w: (lax.ragged_dot(h, w, sizes) ** 2).sum())(jnp.ones((2, 6, 2)))
        return slope.sum((0, 1)) + h @ v["b"]

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    assert groups.units == 0
    assert any("summed in runs" in axis.reason for axis in groups.fixed)


def choosing(score, head):
    """Four experts, each of which takes the two tokens that it scores highest."""

    def apply(v, x):
        h = x @ v["in"]
        weight, rows = lax.top_k(score(h @ v["route"]).T, 2)
        inner = jnp.tanh(jnp.einsum("ecd,edf->ecf", h[rows], v["up"]))
        outer = head(jnp.einsum("ecf,efd->ecd", inner, v["down"])) * weight[..., None]
        return jnp.zeros_like(h).at[rows].add(outer) @ v["out"]

    return apply


@pytest.mark.parametrize(
    ("score", "head", "wide"),
    [(jax.nn.sigmoid, jnp.sin, False), (jax.nn.softmax, jnp.sin, True), (jax.nn.sigmoid, jnp.cos, True)],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_experts_that_choose_their_tokens(score, head, wide, mapped):
    """Summed up where they came from: an expert that left adds zeros, or else runs at full width."""
    shapes = {"in": (3, 5), "route": (5, 4), "up": (4, 5, 6), "down": (4, 6, 5), "out": (5, 2)}
    variables = {name: RNG.normal(size=shape) for name, shape in shapes.items()}
    apply, tokens = choosing(score, head), RNG.normal(size=(2, 8, 3) if mapped else (8, 3))
    apply = jax.vmap(apply, (None, 0)) if mapped else apply
    groups = ca.find_groups(apply, variables, tokens, strict=True)
    experts = next(group for group in groups.groups if group.name == "route")
    assert experts.axes == (("route", 1, 1), ("up", 0, 1), ("down", 0, 1))
    assert sorted(groups.sizes.tolist()) == [4, 5, 5, 6]
    keep = np.arange(groups.units) % 3 != 1
    assert max(law_errors(apply, variables, tokens, keep=keep, groups=groups)) <= 1e-10
    assert bool(ca.uncut(groups, ca.plan_units(groups, keep))) == wide


def test_what_is_written_in_place_of_another_stays():
    """The last of several writes to one place would be another one."""

    def apply(v, x):
        rows = jnp.argsort(x @ v["route"], 0).T
        return jnp.zeros((4, 6)).at[rows].set((x @ v["a"])[rows] * v["scale"][:, None, None]) @ v["b"]

    variables = {**VARIABLES, "route": RNG.normal(size=(3, 5)), "scale": RNG.normal(size=5)}
    groups = ca.find_groups(apply, variables, X, strict=True)
    assert [group.units for group in groups.groups] == [6]
    keep = np.array([1, 0, 1, 1, 0, 1], bool)
    assert max(law_errors(apply, variables, X, keep=keep, groups=groups)) <= 1e-10
