"""Random functions of hidden channels that may be infinite where a channel is dead, for the tests."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Hidden = Any
ROWS = 4
_EVEN = (np.arange(ROWS) % 2 == 0)[:, None]

# Of one value; most are finite wherever they are asked.
_FUNCTIONS: tuple[Callable[[Hidden], Hidden], ...] = (
    jnp.tanh, jnp.sin, jnp.cos, jnp.square, jnp.abs, jnp.negative, jnp.arctan,
    jax.nn.sigmoid, jax.nn.relu, jax.nn.softplus,
    lambda x: jnp.exp(jnp.clip(x, -20, 20)),
    lambda x: jnp.cosh(jnp.tanh(x)),
    lambda x: jnp.expm1(jnp.tanh(x)),
    lambda x: jnp.log1p(jnp.abs(x)),
    lambda x: 0.5 * x,
    lambda x: x + 1.0,
    lambda x: x - 1.0,
    lambda x: x * jnp.sign(x),
    lambda x: jnp.where(x > 0.3, x, 0.2),
    lambda x: jnp.maximum(x, 1e-3),
    lambda x: jnp.sqrt(jnp.abs(x)),
    lambda x: jnp.log(jnp.abs(x)),
    lambda x: 1 / x,
    lambda x: lax.rsqrt(jnp.abs(x)),
    lambda x: jnp.arccos(jnp.tanh(x)),
    lambda x: jnp.arccosh(1 + jnp.abs(x)),
)  # fmt: skip
_OF_TWO: tuple[Callable[[Hidden, Hidden], Hidden], ...] = (
    jnp.add, jnp.subtract, jnp.multiply, jnp.divide, jnp.maximum, jnp.minimum,
    lambda x, y: x / jnp.where(y == 0, 1.0, y),
    lambda x, y: jnp.where(_EVEN, x, y),
    lambda x, y: jnp.where(_EVEN, x, 1.0),
    lambda x, y: jnp.concatenate([x, y], 0)[1 : ROWS + 1],
    lambda x, y: jnp.roll(x, 1, 0) + 0.3 * y,
)  # fmt: skip
# Over the rows of one.
_OVER_ROWS: tuple[Callable[[Hidden], Hidden], ...] = (
    lambda x: x * x.sum(0), lambda x: x * x.mean(0), lambda x: x * x.max(0), lambda x: x * x.min(0),
    lambda x: x * x.prod(0), lambda x: x * jnp.std(x, 0),
    lambda x: (x - x.mean(0)) / jnp.sqrt(x.var(0)),
    lambda x: (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5),
    lambda x: jnp.cumsum(x, 0), lambda x: jnp.cumprod(x, 0), lambda x: lax.cummax(x, 0),
    lambda x: jnp.sort(x, 0),
    lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1), (1, 1), "SAME"),
)  # fmt: skip


def random_function(seed: int) -> Callable[[Hidden], Hidden]:
    """Draw a function of hidden channels, shape (rows, channels) to the same shape."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(2**30, size=6) for _ in range(rng.integers(2, 7))]

    def function(h: Hidden) -> Hidden:
        values = [h]
        for kind, which, other, left, right, last in draws:
            x = values[-1 if last % 3 else left % len(values)]
            y = values[right % len(values)]
            first, second = (_FUNCTIONS[n % len(_FUNCTIONS)] for n in (which, other))
            if kind % 10 < 4:
                x = first(x)
            elif kind % 10 < 6:
                x = _OF_TWO[which % len(_OF_TWO)](x, y)
            elif kind % 10 < 8:
                x = _OVER_ROWS[which % len(_OVER_ROWS)](x)
            elif kind % 10 < 9:
                x = lax.cond(x.sum() > 0, first, second, x)
            else:
                x = lax.scan(lambda c, row, of=first: (0.5 * of(c) + row, c + 0.3 * row), y[0], x)[1]
            values.append(x)
        return values[-1]

    return function
