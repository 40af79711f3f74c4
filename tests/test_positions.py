"""Reads and writes along channels at positions that the trace shows: followed one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import compaware_jax as ca
from compaware_jax.law import law_errors, random_keep

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
VARIABLES = {"a": RNG.normal(size=(3, 8)), "c": RNG.normal(size=8), "b": RNG.normal(size=(16, 2))}
X = RNG.normal(size=(4, 3))
ORDER = np.array([3, 0, 5, 1, 4, 2, 7, 6])
FEW = np.array([6, 1, 3])


def shifted(h):
    """A temporal shift: some channels of the row before, some of the row after."""
    out = jnp.zeros_like(h).at[:-1, :2].set(h[1:, :2]).at[1:, 2:4].set(h[:-1, 2:4])
    return out.at[:, 4:].set(h[:, 4:])


def rotated(h):
    even, odd = h[:, 0::2], h[:, 1::2]
    return jnp.zeros_like(h).at[:, 0::2].set(even - odd).at[:, 1::2].set(even + odd)


def ordered(h):
    return h[:, ORDER]


custom = jax.custom_jvp(ordered)
custom.defjvps(lambda tangent, _, h: ordered(tangent))
backward = jax.custom_vjp(ordered)
backward.defvjp(lambda h: (ordered(h), None), lambda _, gradient: (gradient[:, np.argsort(ORDER)],))

# What becomes of channels (4, 8) that may be negative at zero, and how many units there are then.
IDIOMS = {
    "a permutation written": (lambda h: jnp.zeros_like(h).at[:, ORDER].set(h), 8),
    "the gradient of a read": (lambda h: jax.grad(lambda h: (jnp.sin(h)[:, ORDER] ** 2).sum())(h), 8),
    "a temporal shift": (shifted, 8),
    "a rotation of pairs": (rotated, 4),
    "a half added to the other": (lambda h: h.at[:, :4].add(jnp.tanh(h[:, 4:])), 4),
    "a few replaced": (lambda h: h.at[:, FEW].set(jnp.cos(h[:, :3])), 8),
    "a few replaced in a row": (lambda h: h.at[1, FEW].set(jnp.cos(h[0, :3])), 6),
    "a few of some rows": (lambda h: h.at[jnp.array([[0], [2]]), FEW].set(jnp.cos(h[:2, :3])), 6),
    "a few multiplied": (lambda h: h.at[:, FEW].mul(jnp.cos(h[:, :3]), unique_indices=True), 6),
    "the smaller of two": (lambda h: h.at[:, FEW].min(jnp.cos(h[:, 5:])), 5),
    "constants written": (lambda h: h.at[:, FEW].set(1.0), 8),
    "a constant written": (lambda h: h.at[:, 2].set(1.0), 8),
    "a constant added at one place": (lambda h: h.at[1, 2].add(1.0), 8),
    "a function applied to a few": (lambda h: lax.stop_gradient(h).at[:, FEW].apply(jnp.exp) + h, 8),
    "twice the same place": (lambda h: jnp.zeros_like(h).at[:, np.array([1, 1, 4])].add(h[:, :3]), 7),
    "one channel's place": (lambda h: h.at[:, 2].set(jnp.sin(h[:, 3])), 7),
    "a diagonal": (lambda h: h.at[jnp.arange(4), jnp.arange(4)].set(0.5), 0),
    "a run at a place": (lambda h: lax.dynamic_update_slice(h, jnp.cos(h[:, :3]), (0, 4)), 8),
    "a run in some rows": (lambda h: lax.dynamic_update_slice(h, jnp.cos(h[:2, :3]), (1, 4)), 5),
    "a run beyond the end": (lambda h: lax.dynamic_update_slice(jnp.cos(h), h[:, :3], (0, 7)), 8),
    "in a map over rows": (lambda h: lax.map(lambda row: row[ORDER], h), 8),
    "in a scan": (lambda h: lax.scan(lambda h, _: (ordered(jnp.cos(ordered(h))), None), h, length=2)[0], 6),
    "in a loop": (lambda h: lax.fori_loop(0, 2, lambda _, h: jnp.zeros_like(h).at[:, ORDER].set(h), h), 4),
    "in a branch": (lambda h: lax.cond(h.sum() > 0, ordered, lambda h: jnp.cos(ordered(h)), h), 8),
    "under a derivative rule": (lambda h: custom(jnp.cos(h)), 8),
    "under a backward pass": (lambda h: backward(jnp.cos(h)), 8),
}  # fmt: skip


@pytest.mark.parametrize("idiom", IDIOMS)
def test_law(idiom):
    function, units = IDIOMS[idiom]

    def apply(v, x):
        h = x @ v["a"] + v["c"]
        both = jnp.concatenate([function(h), jnp.sin(h)], axis=1)
        return both @ v["b"], both.sum(1)

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    alone = ca.find_groups(lambda v, x: function(x @ v["a"] + v["c"]) @ v["b"][:8], VARIABLES, X)
    assert sum(any(path == "a" for path, _, _ in g.axes) * g.units for g in alone.groups) == units
    if groups.units:
        keep = np.stack([random_keep(groups, RNG) for _ in range(8)])
        reverse = idiom != "in a loop"
        errors = law_errors(apply, VARIABLES, X, keep=keep, groups=groups, gradients=reverse)
        assert max(errors) <= 1e-10


def test_channels_may_fill_a_buffer():
    def apply(v, x):
        h = jnp.tanh(x @ v["a"] + v["c"])
        return jnp.zeros((4, 16)).at[:, :8].set(h).at[:, 8:].set(jnp.cos(h)) @ v["b"]

    groups = ca.find_groups(apply, VARIABLES, X)
    assert [(g.units, g.axes) for g in groups.groups] == [(8, (("a", 1, 1), ("c", 0, 1), ("b", 0, 2)))]
    keep = RNG.random((3, 8)) < 0.6
    errors = law_errors(apply, VARIABLES, X, keep=keep, groups=groups)
    assert max(errors) <= 1e-10


# Tables (4, 8) of 4 angles for each of 4 positions, and how many units stay free of one made of data.
TABLES = {
    "written": (lambda s: jnp.zeros((4, 8)).at[:, 0::2].set(jnp.sin(s)).at[:, 1::2].set(jnp.cos(s)), 8),
    "orthogonal": (lambda s: jnp.linalg.qr(jnp.sin(jnp.concatenate([s, s + 1], 1)).T)[0].T, 0),
    "transformed": (lambda s: jnp.fft.fft(jnp.concatenate([s, s], 1)).real, 0),
    "sorted": (lambda s: jnp.sort(jnp.concatenate([s, s], 1), 1), 8),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("of_data", [False, True])
def test_tables_of_positions(table, of_data):
    """A table made of constants keeps nothing whole, whatever it is made by."""
    function, units = TABLES[table]

    def apply(v, x, positions):
        positions = positions if of_data else jnp.arange(4.0)
        added = function(positions[:, None] * jnp.exp(-jnp.arange(4.0)))
        return (x @ v["a"] + added) @ v["b"][:8]

    inputs = VARIABLES, X, np.arange(4.0)
    groups = ca.find_groups(apply, *inputs)
    assert groups.units == (units if of_data else 8)
    if groups.units:
        keep = np.stack([random_keep(groups, RNG) for _ in range(3)])
        assert max(law_errors(apply, *inputs, keep=keep, groups=groups)) <= 1e-10
