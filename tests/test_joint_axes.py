"""Axes that a model splits and joins: heads and their channels, blocks, codebooks, shuffled channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import compaware_jax as ca
from compaware_jax.law import law_errors, random_keep

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
VARIABLES = {"a": RNG.normal(size=(3, 6)), "b": RNG.normal(size=(6, 2))}
X = RNG.normal(size=(4, 3))
KEEP = np.array([1, 0, 1, 1, 0, 1], bool)


def drawn(shapes):
    return {name: RNG.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("heads", "channels"), [(4, 3), (2, 5)])
def test_heads_with_a_norm_of_their_own(heads, channels):
    """Queries and keys are normalised head by head: whole heads leave, or the same channels of all."""

    def norm(x):
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def apply(v, x):
        q, k, u = ((x @ v[name]).reshape(2, 5, heads, channels) for name in "qku")
        q, k = norm(q) * v["scale"], norm(k)
        a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.einsum("bhts,bshd->bthd", a, u).reshape(2, 5, -1) @ v["o"]

    width = heads * channels
    shapes = {"q": (6, width), "k": (6, width), "u": (6, width), "scale": (channels,), "o": (width, 2)}
    variables = {name: RNG.normal(size=shape) for name, shape in shapes.items()}
    x = RNG.normal(size=(2, 5, 6))
    for within, together in (
        (False, {("q", "k", "u", "o"): heads, ("scale",): channels}),
        (True, {("q", "k", "scale"): channels, ("u", "o"): channels}),
    ):
        groups = ca.find_groups(apply, variables, x, within_heads=within)
        found = {frozenset(path for path, *_ in g.axes): g.units for g in groups.groups}
        assert found == {frozenset(paths): units for paths, units in together.items()}
        keep = np.arange(groups.units) % 3 != 1
        assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= 1e-10


def test_layer_of_diagonal_blocks():
    """Gates that see a width in blocks: whole blocks leave, for positions in all blocks would be fewer."""
    shapes = {"in": (3, 8), "first": (2, 4, 4), "second": (2, 4, 4), "out": (8, 2)}
    variables = {name: RNG.normal(size=shape) for name, shape in shapes.items()}

    def gate(h, w):
        return jax.nn.sigmoid(jnp.einsum("bni,nij->bnj", h.reshape(len(h), 2, 4), w).reshape(h.shape))

    def apply(v, x):
        h = x @ v["in"]
        return (h * gate(h, v["first"]) * gate(h, v["second"])) @ v["out"]

    groups = ca.find_groups(apply, variables, X, strict=True)
    # The blocks of the width; and the rows that a gate reads, of which none has to be read.
    assert [(g.units, len(g.axes)) for g in groups.groups] == [(2, 4), (4, 1), (4, 1)]
    keep = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1, 1], bool)
    assert max(law_errors(apply, variables, X, keep=keep, groups=groups)) <= 1e-10
    assert ca.shrink(variables, ca.plan_units(groups, keep))["in"].shape == (3, 4)
    positions = ca.find_groups(apply, variables, X, within_heads=True)
    assert [(g.units, len(g.axes)) for g in positions.groups] == [(4, 6)]


@pytest.mark.parametrize(("heads", "channels"), [(2, 4), (4, 2)])
def test_heads_that_a_scan_adds_up_behind_a_stream_that_leaves(heads, channels):
    """A kernel that loses rows already loses columns as well."""
    width = heads * channels

    def apply(v, x):
        h = x @ v["in"]
        q, k, u = ((h @ v[name]).reshape(-1, heads, channels) for name in "qku")

        def step(state, now):
            q, k, u = now
            state = state + k[:, :, None] * u[:, None]
            return state, jnp.einsum("hd,hde->he", q, state)

        _, mixed = lax.scan(step, jnp.zeros((heads, channels, channels)), (q, k, u))
        return (h + mixed.reshape(-1, width) @ v["o"]) @ v["out"]

    square = (width, width)
    variables = drawn({"in": (3, width), **dict.fromkeys("qkuo", square), "out": (width, 2)})
    groups = ca.find_groups(apply, variables, X, strict=True)
    assert [(g.units, {path: n for path, _, n in g.axes}) for g in groups.groups] == [
        (width, dict.fromkeys(("in", "q", "k", "u", "o", "out"), 1)),
        (heads, dict.fromkeys("qkuo", channels)),
    ]
    keep = random_keep(groups, np.random.default_rng(0))
    assert max(law_errors(apply, variables, X, keep=keep, groups=groups)) <= 1e-10


@pytest.mark.parametrize("biased", ["q", "k", "u"])
def test_channels_of_heads_with_a_bias_of_heads_and_channels(biased):
    """Within heads the bias loses channels as well; its axis of heads stays."""
    heads, channels = 2, 4
    width = heads * channels

    def apply(v, x):
        parts = {name: (x @ v[name]).reshape(2, 5, heads, channels) for name in "qku"}
        q, k, u = ({**parts, biased: parts[biased] + v["bias"]}[name] for name in "qku")
        a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.einsum("bhts,bshd->bthd", a, u).reshape(2, 5, -1) @ v["o"]

    shapes = {**dict.fromkeys("qku", (6, width)), "bias": (heads, channels), "o": (width, 2)}
    variables, x = drawn(shapes), RNG.normal(size=(2, 5, 6))
    groups = ca.find_groups(apply, variables, x, within_heads=True)
    found = {frozenset(path for path, *_ in g.axes): g.units for g in groups.groups}
    with_bias = {"bias"}
    of_scores, of_values = ({*"qk"} | with_bias, {*"uo"}) if biased != "u" else ({*"qk"}, {*"uo"} | with_bias)
    assert found == {frozenset(of_scores): channels, frozenset(of_values): channels}
    assert [(axis.path, axis.axis) for axis in groups.fixed if axis.path == "bias"] == [("bias", 0)]
    keep = random_keep(groups, np.random.default_rng(0))
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= 1e-10


@pytest.mark.parametrize("corrected", [False, True])
def test_channels_of_heads_that_a_scan_adds_up(corrected):
    """Also where what is added is first compared with what the state holds (the delta rule)."""
    heads, channels = 4, 3

    def apply(v, x):
        q, k, u = ((x @ v[name]).reshape(-1, heads, channels) for name in "qku")

        def step(state, now):
            q, k, u = now
            u = u - jnp.einsum("hd,hde->he", k, state) if corrected else u
            state = state + k[:, :, None] * u[:, None]
            return state, jnp.einsum("hd,hde->he", q, state)

        _, mixed = lax.scan(step, jnp.zeros((heads, channels, channels)), (q, k, u))
        return mixed.reshape(len(x), -1) @ v["o"]

    width = heads * channels
    variables = drawn({**dict.fromkeys("qku", (3, width)), "o": (width, 2)})
    for within, together in (
        (False, [(heads, dict.fromkeys("qkuo", channels))]),
        (True, [(channels, dict.fromkeys("qk", heads)), (channels, dict.fromkeys("uo", heads))]),
    ):
        groups = ca.find_groups(apply, variables, X, within_heads=within, strict=True)
        assert [(g.units, {path: n for path, _, n in g.axes}) for g in groups.groups] == together
        keep = random_keep(groups, np.random.default_rng(0))
        assert max(law_errors(apply, variables, X, keep=keep, groups=groups)) <= 1e-10


@pytest.mark.parametrize("within_heads", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_matrix_that_is_made_by_a_layer_and_multiplied_with_itself(rows, within_heads):
    """A penalty that keeps it orthogonal must not tie its rows to its columns."""
    n = 4

    def apply(v, x):
        h = jax.nn.relu(x @ v["in"])
        made = (h.max(0) @ v["matrix"]).reshape(n, n)
        gram = made @ made.T if rows else made.T @ made
        return (h @ made) @ v["out"], jnp.sum(gram**2)

    variables = drawn({"in": (3, n), "matrix": (n, n * n), "out": (n, 2)})
    groups = ca.find_groups(apply, variables, X, within_heads=within_heads, strict=True)
    assert [group.units for group in groups.groups] == [n, n]
    assert sum(group.axes[0][0] == "in" for group in groups.groups) == 1
    keep = random_keep(groups, np.random.default_rng(0))
    assert max(law_errors(apply, variables, X, keep=keep, groups=groups)) <= 1e-10


@pytest.mark.parametrize("boundary", [False, True])
def test_codebooks_leave_with_the_channels_that_they_encode(boundary):
    def apply(v, x):
        z = (jax.nn.relu(x @ v["e1"]) @ v["e2"]).reshape(-1, 2, 4)
        index = jnp.argmin(((z[:, :, None] - v["codes"]) ** 2).sum(-1), -1)
        code = jnp.take_along_axis(v["codes"][None], index[:, :, None, None], 2)[:, :, 0]
        return (z + lax.stop_gradient(code - z)).reshape(-1, 8) @ v["d"]

    variables = drawn({"e1": (3, 7), "e2": (7, 8), "codes": (2, 6, 4), "d": (8, 5)})
    groups = ca.find_groups(apply, variables, X, boundary=boundary)
    assert (2, (("e2", 1, 4), ("codes", 0, 1), ("d", 0, 4))) in [(g.units, g.axes) for g in groups.groups]
    keep = random_keep(groups, np.random.default_rng(0))
    assert max(law_errors(apply, variables, X, keep=keep, groups=groups)) <= 1e-10


def shuffled(h):
    return h.reshape(*h.shape[:-1], 2, 3).swapaxes(-1, -2).reshape(h.shape)


SHUFFLES = {
    "once": lambda h: shuffled(jax.nn.sigmoid(h)),
    "many times": lambda h: shuffled(shuffled(shuffled(h))),
    # What was cut was a half; the softmax needs it, so all before it runs again at full width.
    "before what runs at full width": lambda h: jax.nn.softmax(shuffled(jax.nn.sigmoid(h)) - 0.3),
    "in a loop": lambda h: lax.fori_loop(0, 2, lambda i, x: shuffled(shuffled(jnp.tanh(x))), h),
    "in a call with a derivative of its own": lambda h: SHUFFLED_CALL(h),
    "of each row": jax.vmap(shuffled),
}
SHUFFLED_CALL = jax.custom_jvp(shuffled)
SHUFFLED_CALL.defjvps(lambda tangent, out, h: 2 * shuffled(tangent))


@pytest.mark.parametrize("how", SHUFFLES)
def test_shuffled_channels_leave_one_by_one(how):
    """As two axes, channels would leave by rows or columns; that is between reshapes only."""

    def apply(v, x):
        return SHUFFLES[how](x @ v["a"] + 0.1) @ v["b"]

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    # Two shuffles swap 1 with 4 and 2 with 3: what a loop hands on is cut the same before and after.
    assert groups.units == (4 if how == "in a loop" else 6)
    for keep in (KEEP, np.arange(6) == 4):
        keep = keep[: groups.units] | np.isin(np.arange(groups.units), groups.offsets)
        assert max(law_errors(apply, VARIABLES, X, keep=keep, groups=groups)) <= 1e-10
        assert bool(ca.uncut(groups, ca.plan_units(groups, keep))) == ("full width" in how)


def test_shuffled_channels_that_meet_a_layer_as_two_axes_leave_by_rows():
    """The other way in which they are read decides: a dense array of two axes loses rows or columns."""

    def apply(v, x):
        h = x @ v["a"]
        return shuffled(h) @ v["b"], (jnp.tanh(h.reshape(-1, 2, 3)) * v["s"]).sum((1, 2))

    variables = {**VARIABLES, "s": RNG.normal(size=(2, 3))}
    groups = ca.find_groups(apply, variables, X, strict=True)
    assert [(g.units, g.axes) for g in groups.groups] == [(2, (("a", 1, 3), ("b", 0, 3), ("s", 0, 1)))]
    assert max(law_errors(apply, variables, X, keep=np.array([1, 0], bool), groups=groups)) <= 1e-10
