"""Random programs out of everything that has a rule: the widest oracle for the law.

A program is drawn as a list of steps on a value of shape (batch, features), (batch, height, width,
channels) or (batch, time, features); each step may add leaves to the variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Step = Callable[[dict[str, Any], jax.Array], jax.Array]


@jax.custom_jvp
def straight_through(x: jax.Array) -> jax.Array:
    """Rounds, with the gradient of the identity: replacing it by its body would lose the gradient."""
    return jnp.round(x * 4) / 4


straight_through.defjvps(lambda t, ans, x: t)


@jax.custom_jvp
def self_gated(x: jax.Array) -> jax.Array:
    """Its derivative rule calls the function again."""
    return x * jax.nn.sigmoid(x)


self_gated.defjvps(lambda t, ans, x: t * (jax.nn.sigmoid(x) + self_gated(x) * jnp.tanh(x)))


@jax.custom_jvp
def contrast(x: jax.Array) -> jax.Array:
    """Element-wise, but its derivative rule mixes channels: the rule has to run un-cut."""
    return jnp.tanh(x)


contrast.defjvps(lambda t, ans, x: t * (1 - ans**2) + 0.1 * t.mean(-1, keepdims=True) * x)

ACTIVATIONS = (
    jax.nn.relu, jax.nn.sigmoid, jnp.tanh, jax.nn.gelu, jax.nn.silu, jax.nn.softplus, jax.nn.elu,
    jax.nn.relu6, jax.nn.leaky_relu, jax.nn.hard_tanh, jnp.sin, jnp.exp, jnp.square, straight_through,
    self_gated, contrast, lambda x: jnp.where(x > 0.1, x, 0.2 * x), lambda x: jnp.clip(x, -1, 1),
    lambda x: 1 / (1 + x**2), lambda x: jnp.maximum(x, 0.3), lambda x: jax.checkpoint(jnp.tanh)(x),
)  # fmt: skip


class _Drawing:
    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.variables: dict[str, Any] = {}
        self.steps: list[Step] = []
        self.shape: tuple[int, ...] = ()

    def leaf(self, *shape: int) -> str:
        name = f"leaf{len(self.variables):02d}"
        self.variables[name] = self.rng.normal(size=shape) / np.sqrt(max(shape[0], 1))
        return name

    def add(self, step: Step) -> None:
        struct = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in self.variables.items()}
        self.shape = jax.eval_shape(step, struct, jax.ShapeDtypeStruct(self.shape, float)).shape
        self.steps.append(step)

    def choice(self, options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def width(self) -> int:
        return int(self.rng.integers(2, 9))


def _activation(d: _Drawing) -> None:
    f = d.choice(ACTIVATIONS)
    d.add(lambda v, x: f(x))


def _bias(d: _Drawing) -> None:
    b = d.leaf(d.shape[-1])
    d.add(lambda v, x: x + v[b])


def _scale(d: _Drawing) -> None:
    s = d.leaf(d.shape[-1])
    d.add(lambda v, x: x * v[s])


def _dense(d: _Drawing) -> None:
    w = d.leaf(d.shape[-1], d.width())
    d.add(lambda v, x: x @ v[w])


def _residual(d: _Drawing) -> None:
    hidden = d.width()
    w1, b1, w2 = d.leaf(d.shape[-1], hidden), d.leaf(hidden), d.leaf(hidden, d.shape[-1])
    d.add(lambda v, x: x + jax.nn.relu(x @ v[w1] + v[b1]) @ v[w2])


def _norm(d: _Drawing) -> None:
    s = d.leaf(d.shape[-1])
    centred = d.rng.random() < 0.6

    def step(v: Any, x: jax.Array) -> jax.Array:
        mean = x.mean(-1, keepdims=True) if centred else 0.0
        return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 0.1) * v[s]

    d.add(step)


def _softmax(d: _Drawing) -> None:
    d.add(lambda v, x: jax.nn.softmax(x))


def _pooled(d: _Drawing) -> None:
    f = d.choice((jnp.max, jnp.mean, jnp.sum, jnp.prod, jnp.min))
    d.add(lambda v, x: x * f(x, -1, keepdims=True))


def _gated_split(d: _Drawing) -> None:
    w = d.leaf(d.shape[-1], 2 * d.width())

    def step(v: Any, x: jax.Array) -> jax.Array:
        a, b = jnp.split(x @ v[w], 2, -1)
        return a * jax.nn.sigmoid(b)

    d.add(step)


def _uneven_split(d: _Drawing) -> None:
    if (n := d.shape[-1]) < 3:
        return
    at = int(d.rng.integers(1, n))
    f = d.choice(ACTIVATIONS)
    d.add(lambda v, x: jnp.concatenate([f(x[..., at:]), x[..., :at]], -1))


def _concatenated(d: _Drawing) -> None:
    w = d.leaf(d.shape[-1], d.width())
    constant = d.rng.normal(size=(*d.shape[:-1], 2))
    d.add(lambda v, x: jnp.concatenate([x, constant, x @ v[w]], -1))


def _moved(d: _Drawing) -> None:
    n, kind = d.shape[-1], d.rng.integers(5)
    if kind == 0:
        d.add(lambda v, x: x[..., ::-1])
    elif kind == 1 and n > 3:
        d.add(lambda v, x: x[..., 1::2])
    elif kind == 2:
        d.add(lambda v, x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 2)], constant_values=0.5))
    elif kind == 3:
        d.add(lambda v, x: lax.pad(x, 0.0, [(0, 0, 0)] * (x.ndim - 1) + [(0, 1, 1)]))
    else:
        d.add(lambda v, x: jnp.stack([x, jnp.tanh(x)], -1).reshape(*x.shape[:-1], 2 * n))


def _shuffled(d: _Drawing) -> None:
    if (n := d.shape[-1]) % 2 == 0:
        d.add(lambda v, x: x.reshape(*x.shape[:-1], 2, n // 2).swapaxes(-1, -2).reshape(x.shape))


def _conv(d: _Drawing) -> None:
    (_, h, w, c), out, size = d.shape, d.width(), int(d.rng.integers(1, 4))
    if min(h, w) < 2:
        return
    k = d.leaf(size, size, c, out)
    stride = int(d.rng.integers(1, 3))
    dilated = d.rng.random() < 0.3
    dims = ("NHWC", "HWIO", "NHWC")

    def step(v: Any, x: jax.Array) -> jax.Array:
        if dilated:
            return lax.conv_transpose(x, v[k], (stride, stride), "SAME", dimension_numbers=dims)
        return lax.conv_general_dilated(x, v[k], (stride, stride), "SAME", dimension_numbers=dims)

    d.add(step)


def _grouped_conv(d: _Drawing) -> None:
    c = d.shape[-1]
    groups = int(d.choice([g for g in range(1, c + 1) if c % g == 0]))
    if d.rng.random() < 0.3:
        # Few wide groups: positions leave, not groups.
        w = d.leaf(c, 8)
        d.add(lambda v, x: x @ v[w])
        c, groups = 8, 2
    k = d.leaf(3, 3, c // groups, groups * int(d.rng.integers(1, 3)))
    dims = ("NHWC", "HWIO", "NHWC")
    d.add(
        lambda v, x: lax.conv_general_dilated(
            x, v[k], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups
        )
    )


def _blur(d: _Drawing) -> None:
    c = d.shape[-1]
    k = d.rng.normal(size=(2, 2, 1, c))
    dims = ("NHWC", "HWIO", "NHWC")
    d.add(
        lambda v, x: lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=c
        )
    )


def _squeeze_excite(d: _Drawing) -> None:
    c, hidden = d.shape[-1], d.width()
    w1, w2 = d.leaf(c, hidden), d.leaf(hidden, c)

    def step(v: Any, x: jax.Array) -> jax.Array:
        gate = jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ v[w1]) @ v[w2])
        return x * gate[:, None, None, :]

    d.add(step)


def _patches(d: _Drawing) -> None:
    (_, h, w, c), out = d.shape, d.width()
    k = d.leaf(2, 2, c, out)

    def step(v: Any, x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        taps = [padded[:, i : i + h, j : j + w] for i in (0, 1) for j in (0, 1)]
        return jnp.concatenate(taps, -1) @ v[k].reshape(4 * c, out)

    d.add(step)


def _pixel_shuffle(d: _Drawing) -> None:
    (_, h, w, c), out = d.shape, d.width()
    if h > 6:
        return
    k = d.leaf(c, 4 * out)

    def step(v: Any, x: jax.Array) -> jax.Array:
        y = (x @ v[k]).reshape(-1, h, w, 2, 2, out)
        return y.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 2 * h, 2 * w, out)

    d.add(step)


def _attention(d: _Drawing) -> None:
    (_, _, n), heads, size = d.shape, 3, 2
    wq, wk, wv = (d.leaf(n, heads * size) for _ in range(3))
    wo = d.leaf(heads * size, n)

    def step(v: Any, x: jax.Array) -> jax.Array:
        q, k, u = ((x @ v[w]).reshape(*x.shape[:2], heads, size) for w in (wq, wk, wv))
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        mixed = jnp.einsum("bhts,bshd->bthd", weights, u)
        return x + mixed.reshape(*x.shape[:2], heads * size) @ v[wo]

    d.add(step)


def _to_image(d: _Drawing) -> None:
    w = d.leaf(d.shape[-1], 3 * 2 * 4)
    d.add(lambda v, x: (x @ v[w]).reshape(-1, 3, 2, 4))


def _to_sequence(d: _Drawing) -> None:
    w = d.leaf(d.shape[-1], 5 * 4)
    d.add(lambda v, x: (x @ v[w]).reshape(-1, 5, 4))


def _flatten(d: _Drawing) -> None:
    if np.prod(d.shape[1:]) <= 200:
        d.add(lambda v, x: x.reshape(x.shape[0], -1))


def _spatial_mean(d: _Drawing) -> None:
    d.add(lambda v, x: x.mean(tuple(range(1, x.ndim - 1))))


def _recurrent(d: _Drawing) -> None:
    """A gated recurrent layer over time; its state starts at zero, at one, or at a learned value."""
    (_, _, n), h = d.shape, d.width()
    w, u, b, s = d.leaf(n, 2 * h), d.leaf(h, 2 * h), d.leaf(2 * h), d.leaf(h)
    start = d.choice((lambda v: jnp.zeros(h), lambda v: jnp.ones(h), lambda v: v[s]))

    def step(v: Any, x: jax.Array) -> jax.Array:
        def cell(state: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
            gate, new = jnp.split(now @ v[w] + state @ v[u] + v[b], 2, -1)
            state = state + jax.nn.sigmoid(gate) * (jnp.tanh(new) - state)
            return state, jnp.sin(state)

        first = jnp.broadcast_to(start(v), (x.shape[0], h))
        return jax.lax.scan(cell, first, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    d.add(step)


def _scanned_layers(d: _Drawing) -> None:
    n, h, layers = d.shape[-1], d.width(), 3
    up, down, scale = d.leaf(layers, n, h), d.leaf(layers, h, n), d.leaf(layers, n)
    normed = d.rng.random() < 0.5

    def step(v: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            y = x - x.mean(-1, keepdims=True) if normed else x
            return x + jax.nn.gelu((y * w[2]) @ w[0]) @ w[1], None

        return jax.lax.scan(layer, x, (v[up], v[down], v[scale]))[0]

    d.add(step)


def _repeated(d: _Drawing) -> None:
    w = d.leaf(d.shape[-1], d.shape[-1])
    counted = d.rng.random() < 0.5

    def step(v: Any, x: jax.Array) -> jax.Array:
        if counted:
            return jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ v[w]) + x, x)
        return jax.lax.fori_loop(0, 2, lambda i, y: y + 0.5 * jnp.sin(y @ v[w]), x)

    d.add(step)


def _branched(d: _Drawing) -> None:
    w, b = d.leaf(d.shape[-1], d.shape[-1]), d.leaf(d.shape[-1])
    d.add(
        lambda v, x: jax.lax.cond(
            x.sum() > 0, lambda x: jnp.tanh(x @ v[w]), lambda x: x * jax.nn.sigmoid(v[b]), x
        )
    )


def _looked_up(d: _Drawing) -> None:
    """Static look-ups along the features: a permutation, a choice, or one with repeats."""
    n = d.shape[-1]
    places = d.rng.permutation(n) if d.rng.random() < 0.5 else d.rng.integers(0, n, size=n + 1)
    d.add(lambda v, x: x[..., places])


def _embedded(d: _Drawing) -> None:
    """Rows of a table chosen by data, added to the features."""
    table = d.leaf(7, d.shape[-1])
    d.add(lambda v, x: x + v[table][(jnp.abs(x).sum(-1) * 10).astype(int) % 7])


def _rolled(d: _Drawing) -> None:
    d.add(lambda v, x: jnp.roll(x, 1, -1))


def _cumulated(d: _Drawing) -> None:
    f = d.choice((jnp.cumsum, jnp.cumprod, jax.lax.cummax, jax.lax.cumlogsumexp))
    axis = -1 if d.rng.random() < 0.5 or len(d.shape) < 3 else 1
    d.add(lambda v, x: f(jnp.tanh(x), axis % x.ndim))


def _sorted(d: _Drawing) -> None:
    k = d.shape[-1]
    if d.rng.random() < 0.5:
        d.add(lambda v, x: jnp.sort(x, -1))
    else:
        d.add(lambda v, x: x * jax.lax.top_k(x, min(2, k))[0][..., -1:])


def _written(d: _Drawing) -> None:
    b, kind = d.leaf(d.shape[-1]), d.rng.integers(3)
    if kind == 0:
        d.add(lambda v, x: x.at[0].set(v[b]))
    elif kind == 1:
        d.add(lambda v, x: x.at[jnp.array([0, 1, 0])].add(jnp.tanh(v[b])))
    else:
        d.add(lambda v, x: jax.lax.dynamic_update_slice_in_dim(x, jnp.sin(x[:1]), 1, 0))


def _placed(d: _Drawing) -> None:
    """Written along the features at static places: some in an order, a run, or every second."""
    n = d.shape[-1]
    size, kind = int(d.rng.integers(1, n + 1)), d.rng.integers(4)
    places, first = d.rng.permutation(n)[:size], int(d.rng.integers(0, n - size + 1))
    f = d.choice((jnp.cos, jnp.tanh))
    if kind == 0:
        d.add(lambda v, x: x.at[..., places].set(f(x[..., :size])))
    elif kind == 1:
        d.add(lambda v, x: x.at[0, ..., places].add(f(jnp.moveaxis(x[0, ..., :size], -1, 0))))
    elif kind == 2:
        d.add(lambda v, x: jnp.zeros_like(x).at[..., first : first + size].set(f(x[..., :size])))
    else:
        d.add(lambda v, x: jax.lax.dynamic_update_slice_in_dim(f(x), x[..., :size], first, x.ndim - 1))


def _sliced_dynamically(d: _Drawing) -> None:
    n = d.shape[-1]
    at = int(d.rng.integers(0, n))
    d.add(lambda v, x: jax.lax.dynamic_slice_in_dim(x, at, max(n - 1, 1), x.ndim - 1))


def _dropped(d: _Drawing) -> None:
    seed = int(d.rng.integers(100))
    d.add(lambda v, x: x * jax.random.bernoulli(jax.random.key(seed), 0.7, x.shape) / 0.7)


def _ensemble(d: _Drawing) -> None:
    """Members of a vmapped ensemble; the mean or the minimum over them comes out."""
    n, h, out = d.shape[-1], d.width(), d.width()
    up, b, down = d.leaf(3, n, h), d.leaf(3, h), d.leaf(3, h, out)
    f = d.choice((jnp.mean, jnp.sum, jnp.min))

    def step(v: Any, x: jax.Array) -> jax.Array:
        members = jax.vmap(lambda w, c, u: jnp.tanh(x @ w + c) @ u)(v[up], v[b], v[down])
        return f(members, 0)

    d.add(step)


def _blockwise_softmax(d: _Drawing) -> None:
    if (n := d.shape[-1]) % 2 == 0:
        d.add(lambda v, x: jax.nn.softmax(x.reshape(*x.shape[:-1], n // 2, 2)).reshape(x.shape))


def _fourier(d: _Drawing) -> None:
    d.add(lambda v, x: jnp.fft.rfft(x, axis=0).real[: x.shape[0]] if x.ndim == 2 else x)


def _transformed(d: _Drawing) -> None:
    """A transform along the features, beside them or in their place."""
    n = d.shape[-1]
    if d.rng.random() < 0.5:
        d.add(lambda v, x: x + jnp.fft.fft(x).real / n)
    else:
        d.add(lambda v, x: jnp.abs(jnp.fft.rfft(x)) ** 2 / n)


def _neighbours(d: _Drawing) -> None:
    """A window or a kernel that slides along the features."""
    kind, window = d.rng.integers(3), (1,) * (len(d.shape) - 1) + (3,)
    ones = (1,) * len(d.shape)
    if kind == 0:  # Local response normalization.
        d.add(lambda v, x: x / (1 + lax.reduce_window(x**2, 0.0, lax.add, window, ones, "SAME")))
    elif kind == 1:
        strides = (*ones[:-1], 2)
        d.add(lambda v, x: lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME"))
    else:
        k = d.leaf(3)

        def step(v: Any, x: jax.Array) -> jax.Array:
            lines = x.reshape(-1, 1, x.shape[-1])
            gate = lax.conv_general_dilated(lines, v[k][None, None], (1,), "SAME")
            return x * jax.nn.sigmoid(gate.reshape(x.shape))

        d.add(step)


def _gathered_max(d: _Drawing) -> None:
    d.add(lambda v, x: x - jnp.take_along_axis(x, jnp.argmax(x, -1, keepdims=True), -1))


def _pool(d: _Drawing) -> None:
    (_, h, w, _), f = d.shape, d.rng.integers(2)
    if min(h, w) < 2:
        return
    window = (1, 2, 2, 1)
    if f:
        d.add(lambda v, x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "SAME"))
    else:
        d.add(lambda v, x: jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), "SAME"))


def _group_norm(d: _Drawing) -> None:
    if (n := d.shape[-1]) % 2:
        return
    s = d.leaf(n)

    def step(v: Any, x: jax.Array) -> jax.Array:
        y = x.reshape(*x.shape[:-1], 2, n // 2)
        axes = (*range(1, x.ndim - 1), -1)
        y = (y - y.mean(axes, keepdims=True)) * jax.lax.rsqrt(y.var(axes, keepdims=True) + 0.1)
        return y.reshape(x.shape) * v[s]

    d.add(step)


def _grouped_query_attention(d: _Drawing) -> None:
    (_, _, n), pairs, share, size = d.shape, 2, 2, 3
    wq, wk, wv = d.leaf(n, pairs * share * size), d.leaf(n, pairs * size), d.leaf(n, pairs * size)
    wo = d.leaf(pairs * share * size, n)

    def step(v: Any, x: jax.Array) -> jax.Array:
        q = (x @ v[wq]).reshape(*x.shape[:2], pairs * share, size)
        k, u = ((x @ v[w]).reshape(*x.shape[:2], pairs, size).repeat(share, 2) for w in (wk, wv))
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), u)
        return x + mixed.reshape(*x.shape[:2], -1) @ v[wo]

    d.add(step)


_ANY = (
    _activation, _activation, _activation, _bias, _scale, _dense, _dense, _residual, _norm, _softmax,
    _pooled, _gated_split, _uneven_split, _concatenated, _moved, _shuffled, _scanned_layers, _repeated,
    _branched, _looked_up, _embedded, _rolled, _cumulated, _sorted, _written, _placed, _sliced_dynamically,
    _dropped, _ensemble, _blockwise_softmax, _gathered_max, _fourier, _transformed,
    _neighbours,
)  # fmt: skip
_IMAGE = (
    _conv, _conv, _grouped_conv, _blur, _squeeze_excite, _patches, _pixel_shuffle, _flatten,
    _spatial_mean, _activation, _bias, _norm, _pool, _pool, _group_norm,
)  # fmt: skip
_SEQUENCE = (
    _attention, _attention, _dense, _residual, _flatten, _spatial_mean, _norm, _recurrent, _recurrent,
    _group_norm, _grouped_query_attention,
)  # fmt: skip


def random_program(seed: int) -> tuple[Callable[..., jax.Array], dict[str, Any], np.ndarray]:
    """Draw a program: ``(apply, variables, x)`` with float64 variables and input."""
    d = _Drawing(seed)
    image = d.rng.random() < 0.4
    d.shape = (2, 4, 4, 3) if image else (3, 5)
    x = d.rng.normal(size=d.shape)
    (_conv if image else _dense)(d)
    for _ in range(int(d.rng.integers(3, 9))):
        if len(d.shape) == 4:
            d.choice(_IMAGE + _ANY)(d)
        elif len(d.shape) == 3:
            d.choice(_SEQUENCE + _ANY)(d)
        else:
            d.choice((*_ANY, _to_image, _to_sequence))(d)
    if len(d.shape) > 2 and np.prod(d.shape[1:]) <= 200:
        _flatten(d)
    _dense(d)
    steps = tuple(d.steps)

    def apply(variables: dict[str, Any], x: jax.Array) -> jax.Array:
        for step in steps:
            x = step(variables, x)
        return x

    return apply, d.variables, x
