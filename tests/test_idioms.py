"""The law on idioms of JAX that put something into channels whose weights are zero, or hold no numbers."""

import chex
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
OUTSIDE = np.array([7, 1])


def rows(h, index, **how):
    return jnp.take(h, index, axis=0, **how)


def pooled(h, start, function):
    """Over windows of two rows."""
    return lax.reduce_window(h, start, function, (2, 1), (1, 1), "VALID")


def over_a_name(function, h):
    return jax.vmap(function, axis_name="rows")(h)


def outer(h):
    """A matrix that can be inverted for every channel, shape (6, 4, 4)."""
    return h.T[:, :, None] * h.T[:, None] + jnp.diag(jnp.arange(1.0, 5))


@jax.custom_batching.custom_vmap
def mapped(h):
    return jnp.cos(h)


@mapped.def_vmap
def _(size, batched, h):
    return mapped(h), True


# What becomes of hidden channels h (4, 6) before they are summed and multiplied.
HIDDEN = {
    "filled with a number": lambda h: h.at[OUTSIDE].get(mode="fill", fill_value=1.0),
    "filled along an axis": lambda h: jnp.take_along_axis(h, jnp.array([[7], [1]]), axis=0, fill_value=2.0),
    "filled at a computed place": lambda h: rows(h, (h.sum() > -99) * 9, mode="fill", fill_value=1.0)[None],
    "filled with no number": lambda h: jnp.nan_to_num(rows(h, OUTSIDE), nan=3.0),
    "integers filled": lambda h: rows((9 * h).astype(int), OUTSIDE) % 5 + 0.0 * h[:2],
    "filled with zero": lambda h: rows(h, OUTSIDE, mode="fill", fill_value=0.0),
    "a function applied by index": lambda h: h + lax.stop_gradient(h).at[0].apply(jnp.exp),
    "a window of padding": lambda h: jnp.maximum(
        lax.reduce_window(h, -jnp.inf, lax.max, (1, 1), (1, 1), ((1, 0), (0, 0))), -5.0
    ),
    "a window in the holes": lambda h: jnp.minimum(
        lax.reduce_window(h, jnp.inf, lax.min, (1, 1), (1, 1), "VALID", base_dilation=(2, 1)), 5.0
    ),
    "sums over windows of ones": lambda h: pooled(jnp.cos(h), 0.0, lax.add),
    "windows of a function of its own": lambda h: pooled(lax.stop_gradient(h), 0.0, lambda a, b: a + b + 1.0),
    "running sums of ones": lambda h: jnp.cumsum(jnp.cos(h), 0),
    "running sums along the channels": lambda h: jnp.cumsum(h, 1),
    "running sums of exponentials": lambda h: lax.cumlogsumexp(h, 0),
    "the largest of ones": lambda h: lax.top_k(jnp.cos(h), 2, axis=0)[0],
    "places of the largest": lambda h: lax.top_k(h, 4, axis=0)[1] * jnp.cos(h),
    "ones in the order of others": lambda h: lax.sort((h, jnp.cos(h)), dimension=0, num_keys=1)[1],
    "segments without members": lambda h: jnp.maximum(
        jax.ops.segment_max(h, jnp.array([0, 0, 2, 2]), 4), -3.0
    ),
    "a norm over the name of a mapped axis": lambda h: over_a_name(
        lambda row: (row - lax.pmean(row, "rows")) / (1 + lax.psum(row**2, "rows")), h
    ),
    "extremes over the name of a mapped axis": lambda h: over_a_name(
        lambda row: row * lax.pmax(row, "rows") - lax.pmin((row, 2 * row), "rows")[1], lax.stop_gradient(h)
    ),
    "edges, of no width along the channels": lambda h: jnp.pad(h, ((1, 1), (0, 0)), mode="edge"),
    "a normalization by neighbours": lambda h: (
        h / (1 + lax.reduce_window(h**2, 0.0, lax.add, (1, 3), (1, 1), "SAME")) ** 0.75
    ),
    "a normalization of halves by neighbours": lambda h: (
        jax.nn.sigmoid(h) * lax.reduce_window(jax.nn.sigmoid(h), 0.0, lax.add, (1, 3), (1, 1), "SAME")
    ),
    "a gate by neighbours": lambda h: (
        h * jax.nn.sigmoid(lax.conv(h[:, None], jnp.array([[[0.3, -1.0, 2.0]]]), (1,), "SAME"))[:, 0]
    ),
    "a transform along the channels": lambda h: h + jnp.fft.fft(jnp.cos(h)).real,
    "signs, from bits": lambda h: jnp.copysign(1.0, h) * h + jnp.signbit(h) * jnp.sin(h),
    "bits in pieces": lambda h: (
        h * lax.bitcast_convert_type(lax.bitcast_convert_type(h, jnp.uint16) // 2, jnp.int64).astype(float)
    ),
    "draws of a shape of their own": lambda h: h * jax.random.gamma(jax.random.key(0), jax.nn.softplus(h)),
    "draws of a key for every row": lambda h: (
        h * jax.vmap(jax.random.gamma)(jax.random.split(jax.random.key(0), 4), jax.nn.softplus(h))
    ),
    "draws that add up to one": lambda h: h * jax.random.dirichlet(jax.random.key(0), jax.nn.softplus(h).T).T,
    "solutions, column by column": lambda h: jax.scipy.linalg.solve_triangular(
        jnp.tril(X @ X.T) + jnp.eye(4), jnp.cos(h), lower=True
    ),
    "solutions, row by row": lambda h: (
        lax.linalg.triangular_solve(jnp.tril(X @ X.T) + jnp.eye(4), h.T, transpose_a=True).T
    ),
    "a matrix for every channel, in factors": lambda h: jnp.linalg.cholesky(outer(h)).sum(1).T,
    "orthogonal factors of a matrix for every channel": lambda h: jnp.linalg.qr(outer(h))[1].sum(1).T,
    "a system for every channel": lambda h: (
        jax.scipy.linalg.solve_triangular(outer(h), h.T[..., None])[..., 0].T
    ),
    "truth values": lambda h: jnp.where(h > 0.2, 1.0, 0.0) + h,
}


@pytest.mark.parametrize("idiom", HIDDEN)
def test_law(idiom):
    def apply(v, x):
        h = HIDDEN[idiom](x @ v["a"])
        return h @ v["b"], h.sum(-1), (h > 0.1).all(-1)

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    assert groups.units == 6
    assert max(law_errors(apply, VARIABLES, X, keep=KEEP, groups=groups)) <= 1e-10


@pytest.mark.parametrize("call", [mapped, lax.composite(jnp.cos, "tests.cos")])
def test_calls_that_jax_cannot_differentiate(call):
    def apply(v, x):
        return call(x @ v["a"]) @ v["b"]

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    assert groups.units == 6
    assert law_errors(apply, VARIABLES, X, keep=KEEP, groups=groups, gradients=False)[0] <= 1e-10


START = jnp.uint32(2)  # An array of JAX, closed over: of unsigned integers nothing is folded on the way.


@pytest.mark.parametrize(
    "moved",
    [
        lambda h: lax.dynamic_slice(h, (jnp.uint32(0), START), (4, 3)) @ jnp.ones((3, 6)) + h,
        lambda h: lax.dynamic_update_slice(h, jnp.cos(h[:, :3]), (jnp.uint32(0), START)),
    ],
)
def test_positions_that_are_arrays_of_jax(moved):
    def apply(v, x):
        h = moved(x @ v["a"])
        return h @ v["b"], jnp.cos(h).sum(1)

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    keep = np.stack([random_keep(groups, RNG) for _ in range(4)])
    assert max(law_errors(apply, VARIABLES, X, keep=keep, groups=groups)) <= 1e-10


@jax.custom_jvp
def first(x):
    return jnp.sin(x) * x


@jax.custom_jvp
def second(x):
    return first(x) * 2


first.defjvp(lambda x, t: (first(*x), t[0] * second(*x)))
second.defjvp(lambda x, t: (second(*x), t[0] * jnp.cos(*x)))


def test_derivative_rules_that_call_each_other():
    def apply(v, x):
        return first(x @ v["a"]) @ v["b"]

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    assert max(law_errors(apply, VARIABLES, X, keep=KEEP, groups=groups)) <= 1e-10


def test_channels_that_stay_zero_run_small():
    """What is filled with zero, or, by default, with no number at computed places, costs no full width."""
    for how in ({"mode": "fill", "fill_value": 0.0}, {}):

        def apply(v, x, index, how=how):
            h = rows(x @ v["a"], index, **how)
            return (h - h.mean(-1, keepdims=True) * 6) @ v["b"]

        groups = ca.find_groups(apply, VARIABLES, X, np.array([0, 3]))
        plan = ca.plan_units(groups, KEEP)
        assert [e.where for e in ca.uncut(groups, plan) if "reduce_sum" in e.where] == []


# What of channels (4, 6) that are zero leaves them zero.
ZEROS = {
    "sums over windows": lambda h: pooled(h, 0.0, lax.add),
    "the largest in windows": lambda h: pooled(h, -jnp.inf, lax.max),
    "running sums": lambda h: jnp.cumsum(h, 0),
    "running products": lambda h: jnp.cumprod(h, 0),
    "running maxima": lambda h: lax.cummax(h, 0),
    "sorted": lambda h: jnp.sort(h, 0),
    "sorted as others are": lambda h: lax.sort((jnp.cos(h), h), dimension=0, num_keys=1)[1],
    "the largest": lambda h: lax.top_k(h, 2, axis=0)[0],
}


@pytest.mark.parametrize("of", ZEROS)
def test_what_is_zero_of_zeros_runs_small(of):
    """What left was zero before and is zero after: no sum over the channels needs them all."""

    def apply(v, x):
        h = ZEROS[of](x @ v["a"])
        return (h - h.sum(-1, keepdims=True)) @ v["b"]

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    assert groups.units == 6
    assert ca.uncut(groups, ca.plan_units(groups, KEEP)) == ()
    assert max(law_errors(apply, VARIABLES, X, keep=KEEP, groups=groups)) <= 1e-10


def test_activated_channels_of_images_stay_zero():
    """A bias is added along the channels alone: that says nothing of the axes that never leave."""

    def apply(v, x):
        h = jax.nn.relu(lax.conv(x, v["k"], (1, 1), "SAME") + v["c"])
        near = lax.reduce_window(h**2, 0.0, lax.add, (1, 3, 1, 1), (1, 1, 1, 1), "SAME")
        return ((h - h.mean(1, keepdims=True)) / (1 + near)).sum((2, 3)) @ v["b"]

    variables = {**VARIABLES, "k": RNG.normal(size=(6, 3, 3, 3)), "c": RNG.normal(size=(6, 1, 1))}
    image = RNG.normal(size=(2, 3, 4, 4))
    groups = ca.find_groups(apply, variables, image)
    assert groups.units == 6
    assert ca.uncut(groups, ca.plan_units(groups, KEEP)) == ()
    assert max(law_errors(apply, variables, image, keep=KEEP, groups=groups)) <= 1e-10


@jax.custom_vjp
def layer(h, w):
    """A layer with a backward pass of its own, not that of its body: twice as much for the input."""
    return jnp.tanh(h @ w)


layer.defvjp(
    lambda h, w: (layer(h, w), (h, w, layer(h, w))),
    lambda saved, g: (2 * (g * (1 - saved[2] ** 2)) @ saved[1].T, saved[0].T @ (g * (1 - saved[2] ** 2))),
)


@pytest.mark.parametrize("before", [jnp.tanh, jax.nn.sigmoid], ids=["zeros", "no zeros"])
def test_backward_pass_of_its_own(before):
    """Where zeros stand for what left, the forward pass runs small; gradients are those of the rule."""

    def apply(v, x):
        h = layer(before(x @ v["a"]), v["w"])
        return jax.lax.scan(lambda h, _: (h + layer(h @ v["w"].T, v["w"]), None), h, length=2)[0] @ v["c"]

    variables = {**VARIABLES, "w": RNG.normal(size=(6, 5)), "c": RNG.normal(size=(5, 2))}
    groups = ca.find_groups(apply, variables, X)
    assert groups.units == 11
    keep = np.arange(groups.units) % 3 != 1
    assert max(law_errors(apply, variables, X, keep=keep, groups=groups)) <= 1e-10
    plan = ca.plan_units(groups, keep)
    ran = [e.where for e in ca.uncut(groups, plan)]
    assert bool(ran) == (before is jax.nn.sigmoid)
    small = jax.make_jaxpr(ca.slim(apply, plan))(ca.shrink(variables, plan), X)
    shapes = [v.aval.shape for e in small.eqns if "custom_vjp" in str(e.primitive) for v in e.invars]
    full = [(4, 6), (6, 5)]
    assert shapes == (full if ran else [(4, 4), (4, 3)])


def straight_through(forward, backward):
    """A function of weights with a backward pass of operand and cotangent."""
    call = jax.custom_vjp(forward)
    call.defvjp(lambda w: (forward(w), w), lambda w, g: (backward(w, g),))
    return call


def rounded(w):
    return jnp.round(4 * w) / 4


def quantised(w):
    scale = jnp.abs(w).max() / 7
    return jnp.round(w / scale) * scale


IN_PLACE = {
    "rounded": straight_through(rounded, lambda w, g: g),
    "signs": straight_through(jnp.sign, lambda w, g: jnp.where(jnp.abs(w) < 1, g, 0.0)),
    "with a scale of all weights": straight_through(
        quantised, lambda w, g: g * (jnp.abs(w) < jnp.abs(w).max())
    ),
    "cotangents of one sign": straight_through(jnp.tanh, lambda w, g: jnp.maximum(g, 0.1 * w)),
}
ELSEWHERE = {
    "of a norm": straight_through(rounded, lambda w, g: g / jnp.linalg.norm(g)),
    "without their mean": straight_through(rounded, lambda w, g: g - g.mean(-1, keepdims=True)),
    "turned round": straight_through(lambda w: w[:, ::-1], lambda w, g: g),
    "turned round on the way back": straight_through(rounded, lambda w, g: g[::-1, ::-1]),
    "added up": straight_through(rounded, lambda w, g: jnp.cumsum(g, 0)),
}


@pytest.mark.parametrize("name", [*IN_PLACE, *ELSEWHERE])
def test_weights_with_a_backward_pass_of_their_own(name):
    """Where each weight has its own cotangent, as in training for quantisation, all products run small."""
    of = (IN_PLACE | ELSEWHERE)[name]

    def apply(v, x):
        h = x @ of(v["a"])
        # The sum hands cotangents to dead weights, too, which the rule may mix with those of others.
        return jnp.tanh(jnp.tanh(h) @ of(v["m"])) @ of(v["b"]) + h.sum(-1, keepdims=True)

    variables = {**VARIABLES, "m": 2 * RNG.normal(size=(6, 6))}
    groups = ca.find_groups(apply, variables, X, strict=True)
    keep = np.arange(groups.units) % 4 != 1  # Not the same turned round.
    assert max(law_errors(apply, variables, X, keep=keep, groups=groups)) <= 1e-10
    plan = ca.plan_units(groups, keep)
    if name in IN_PLACE:
        assert groups.units == 12
        small = jax.make_jaxpr(ca.slim(apply, plan))(ca.shrink(variables, plan), X)
        products = (e for e in small.eqns if e.primitive is lax.dot_general_p)
        shapes = [tuple(v.aval.shape for v in e.invars) for e in products]
        assert shapes == [((4, 3), (3, 4)), ((4, 4), (4, 5)), ((4, 5), (5, 2))]


def test_backward_pass_of_its_own_that_closes_over_arrays():
    """Such arrays come first among the operands, and have no derivative: nothing asks for it."""
    slopes = jnp.asarray(RNG.normal(size=(1, 6)))

    @jax.custom_vjp
    def scaled(h):
        return h * slopes

    scaled.defvjp(lambda h: (scaled(h), h), lambda h, g: (g * slopes + 0.1 * h,))

    def apply(v, x):
        return scaled(jnp.tanh(x @ v["a"])) @ v["b"]

    groups = ca.find_groups(apply, VARIABLES, X)
    assert max(law_errors(apply, VARIABLES, X, keep=KEEP, groups=groups)) <= 1e-10


def test_backward_pass_that_refuses_to_be_asked_for_data():
    """What is data stays data: the rule is asked for the derivatives of the rest alone."""

    @jax.custom_vjp
    def gated(h, gate):
        return h * gate

    def forward(h, gate):
        assert not gate.perturbed
        return h.value * gate.value, gate.value

    gated.defvjp(forward, lambda gate, g: (2 * g * gate, None), symbolic_zeros=True)

    def apply(v, x):
        h = gated(jnp.tanh(x @ v["a"]), jnp.cos(x[:, :1]))
        return h @ v["b"], gated(h, jnp.ones((1, 6))).sum(1)

    groups = ca.find_groups(apply, VARIABLES, X)
    assert groups.units == 6
    assert max(law_errors(apply, VARIABLES, X, keep=KEEP, groups=groups)) <= 1e-10


def test_what_is_shown_on_the_way_keeps_nothing_whole(capsys):
    seen = []

    def apply(v, x):
        h = x @ v["a"]
        jax.debug.callback(lambda h: seen.append(h.shape), h)
        jax.debug.print("{h}", h=h[0])
        return h @ v["b"]

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    plan = ca.plan_units(groups, KEEP)
    jax.jit(ca.slim(apply, plan))(ca.shrink(VARIABLES, plan), X)
    jax.effects_barrier()
    assert seen == [(4, 4)]
    assert len(capsys.readouterr().out.strip("[] \n").split()) == 4


@pytest.mark.parametrize("look_up", [lambda s: jnp.take(s, 0), lambda s: s[0]], ids=["take", "slice"])
def test_a_single_element_looked_up_stays(look_up):
    def apply(v, x):
        return (jnp.tanh(x @ v["a"]) * v["s"]) @ v["b"] * look_up(v["s"])

    variables = {**VARIABLES, "s": RNG.normal(size=6)}
    groups = ca.find_groups(apply, variables, X)
    assert groups.units == 5
    keep = np.array([1, 0, 0, 1, 0], bool)
    assert max(law_errors(apply, variables, X, keep=keep, groups=groups)) <= 1e-10
    assert ca.plan_units(groups, keep).kept[2] == ((0, 1, 4),)


def test_activation_of_integers():
    """The accumulator of a quantised layer: its activation has a derivative rule and no derivative."""
    variables = {
        "a": RNG.integers(-9, 9, (3, 6)).astype(np.int8),
        "scale": RNG.random(6),
        "b": RNG.normal(size=(6, 2)),
    }

    def apply(v, x):
        dims = (((1,), (0,)), ((), ()))
        total = lax.dot_general(
            jnp.round(9 * x).astype(jnp.int8), v["a"], dims, preferred_element_type=jnp.int32
        )
        return (jax.nn.relu(total) * v["scale"]) @ v["b"]

    groups = ca.find_groups(apply, variables, X)
    assert groups.units == 6
    assert max(law_errors(apply, variables, X, keep=KEEP, groups=groups)) <= 1e-10


def halved(h, w):
    """Steps until what is left is small: another number of them for every example."""

    def step(state):
        h, count, key = state
        key, draw = jax.random.split(key)
        return 0.8 * h + 0.1 * jnp.tanh(h @ w) + 0.01 * jax.random.normal(draw, h.shape) * h, count + 1, key

    start = h, 0, jax.random.key(0)
    return lax.while_loop(lambda s: (jnp.abs(s[0]).sum() > 1) & (s[1] < 20), step, start)


@pytest.mark.parametrize("of", ["examples", "examples of members", "members"])
def test_a_loop_of_its_own_length_for_every_example(of):
    """Under vmap the condition has an axis for them: examples, or members of an ensemble, which may leave."""
    members = {"w": 0.3 * RNG.normal(size=(3, 6, 6)), "c": RNG.normal(size=(3, 6, 2))}

    def apply(v, x):
        h = x @ v["a"]
        if of == "examples":
            h, counts, _ = jax.vmap(halved, (0, None))(h, v["w"][0])
            return h @ v["b"], counts + 0.0
        one = jax.vmap(halved, (0, None)) if of == "examples of members" else halved
        h, _, _ = jax.vmap(one, (None, 0))(h, v["w"])
        return jnp.einsum("mbh,mho->bo", h, v["c"])

    variables = {**VARIABLES, **members}
    _, counts, _ = jax.vmap(halved, (0, None))(X @ VARIABLES["a"], members["w"][0])
    assert len(set(counts.tolist())) > 1
    groups = ca.find_groups(apply, variables, X)
    sizes = {"examples": [6], "examples of members": [6, 3], "members": [6, 3]}[of]
    assert sorted(g.units for g in groups.groups) == sorted(sizes)
    rng = np.random.default_rng(1)
    for _ in range(3):
        keep = random_keep(groups, rng)
        error, _ = law_errors(apply, variables, X, keep=keep, groups=groups, gradients=False)
        assert error <= 1e-10
        assert not any("while" in e.where for e in ca.uncut(groups, ca.plan_units(groups, keep)))


def test_random_key_among_the_variables():
    variables = {**VARIABLES, "key": jax.random.key(3)}

    def apply(v, x):
        h = x @ v["a"]
        return jnp.where(jax.random.bernoulli(v["key"], 0.5, h.shape), h, 0.0) @ v["b"]

    groups = ca.find_groups(apply, variables, X)
    plan = ca.plan_units(groups, KEEP)
    masked = ca.apply_mask(groups, KEEP.astype(float), variables)
    got = ca.slim(apply, plan)(ca.shrink(variables, plan), X)
    np.testing.assert_allclose(got, apply(masked, X), rtol=1e-12)
    assert ca.expand(ca.shrink(variables, plan), plan)["key"] == variables["key"]


def test_cache_that_comes_out_cut():
    """The law of a decoding step, whose keys and values are state at a position of their own."""
    shapes = {"in": (3, 6), "q": (6, 8), "k": (6, 8), "v": (6, 8), "o": (8, 6), "out": (6, 2)}
    variables = {
        "params": {name: RNG.normal(size=shape) for name, shape in shapes.items()},
        "cache": {name: RNG.normal(size=(2, 5, 4, 2)) for name in "kv"},
    }

    def apply(v, x, position):
        p = v["params"]
        h = x @ p["in"]
        q, k, u = ((h @ p[name]).reshape(2, 1, 4, 2) for name in "qkv")
        cache = {
            name: lax.dynamic_update_slice(v["cache"][name], new, (0, position, 0, 0))
            for name, new in (("k", k), ("v", u))
        }
        scores = jnp.einsum("bthd,bshd->bhts", q, cache["k"])
        scores = jnp.where(jnp.arange(5) <= position, scores, -1e9)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), cache["v"]).reshape(2, 1, 8)
        return (h + mixed @ p["o"]) @ p["out"], cache

    args = RNG.normal(size=(2, 1, 3)), jnp.array(2)
    groups = ca.find_groups(apply, variables, *args, state_outputs={"1": "cache"})
    keep = np.arange(groups.units) % 3 != 1
    assert max(law_errors(apply, variables, *args, keep=keep, groups=groups)) <= 1e-10
    plan = ca.plan_units(groups, keep)
    assert ca.shrink(variables, plan)["cache"]["k"].shape[2] < 4


def test_a_rule_that_refuses_tangents_of_data():
    """It is asked for all tangents at once, which the gradient by the variables never needs."""

    @jax.custom_jvp
    def data(x):
        return 2 * x

    @data.defjvp
    def _(primals, tangents):
        raise RuntimeError("data have no derivative")

    def apply(v, x):
        return jnp.tanh(data(x) @ v["a"]) @ v["b"]

    groups = ca.find_groups(apply, VARIABLES, X, strict=True)
    assert groups.units == 6
    plan = ca.plan_units(groups, KEEP)
    small = ca.slim(apply, plan), ca.shrink(VARIABLES, plan)
    full = jax.grad(lambda v: apply(v, X).sum())(ca.apply_mask(groups, KEEP * 1.0, VARIABLES))
    got = jax.grad(lambda v: small[0](v, X).sum())(small[1])
    chex.assert_trees_all_close(ca.shrink(full, plan), got, rtol=1e-12)
