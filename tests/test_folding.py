"""Constants evaluated in numpy are, bit for bit, what JAX makes of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from compaware_jax.coupling import folding
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.trace import trace

INTS = np.array([[3, -7, 0], [2**31 - 1, -(2**31), 5]], np.int32)
FLAGS = np.array([[True, False, True], [False, False, True]])
SCALAR = np.float32(0.1)

FUNCTIONS = {
    "sum, overflowing": lambda: jnp.add(INTS, INTS),
    "difference of unsigned": lambda: INTS.astype(np.uint8) - jnp.uint8(9),
    "product": lambda: jnp.multiply(INTS, -3),
    "largest": lambda: jnp.maximum(INTS, 1),
    "least": lambda: jnp.minimum(INTS, 1),
    "equal": lambda: jnp.equal(INTS, 5),
    "not equal": lambda: jnp.not_equal(INTS, 5),
    "less": lambda: jnp.less(INTS, 5),
    "at most": lambda: jnp.less_equal(INTS, 5),
    "greater": lambda: jnp.greater(INTS, 5),
    "at least": lambda: jnp.greater_equal(INTS, 5),
    "bits and": lambda: jnp.bitwise_and(INTS, 6),
    "flags or": lambda: jnp.logical_or(FLAGS, INTS > 0),
    "exclusive": lambda: jnp.bitwise_xor(INTS, 6),
    "inverted": lambda: jnp.bitwise_not(INTS),
    "negated": lambda: jnp.logical_not(FLAGS),
    "copied": lambda: jnp.copy(INTS),
    "counted": lambda: lax.broadcasted_iota(jnp.int8, (3, 200), 1),
    "spread": lambda: lax.broadcast_in_dim(INTS, (2, 4, 3), (0, 2)),
    "chosen": lambda: jnp.where(FLAGS, INTS, 4),
    "chosen by one": lambda: lax.select(jnp.bool_(True), INTS, INTS + 1),
    "chosen of three": lambda: lax.select_n(np.int32([[0, 1, 2], [2, 1, 0]]), INTS, INTS + 1, INTS + 2),
    "narrowed": lambda: lax.convert_element_type(INTS, jnp.int8),
    "as flags": lambda: lax.convert_element_type(INTS, jnp.bool_),
    "a whole number of a number": lambda: lax.convert_element_type(jnp.sqrt(jnp.float32(7)), jnp.int32),
    "halved": lambda: lax.convert_element_type(SCALAR, jnp.bfloat16) + jnp.bfloat16(0.3),
    "of four bits": lambda: lax.convert_element_type(INTS[0, ::2], jnp.int4) & jnp.int4(5),
    "sliced": lambda: lax.slice(INTS, (0, 1), (2, 3), (1, 2)),
    "squeezed": lambda: lax.squeeze(INTS[:1], (0,)),
    "reshaped": lambda: lax.reshape(INTS, (3, 2)),
    "turned": lambda: lax.transpose(INTS, (1, 0)),
    "joined": lambda: lax.concatenate([INTS, INTS[:, :1]], 1),
    "a number plus a number": lambda: lax.add(SCALAR, jnp.float32(0.2)),
    "no number": lambda: lax.max(jnp.float32(np.nan), SCALAR),
    "wider than JAX takes it for": lambda: jnp.asarray(np.int64([2**31 - 1])) + 1,
}
# What numpy has not, or rounds in its own way.
BY_JAX = ("chosen of three", "a whole number of a number", "halved", "of four bits")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_jax(name: str) -> None:
    program = trace(lambda variables: (FUNCTIONS[name](), variables), jnp.zeros(()))
    (value, _), expected = program.block.outputs, FUNCTIONS[name]()
    assert not program.block.equations
    got = np.asarray(program.constants[value])
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, np.asarray(expected))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_numpy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, by_jax = Equation.run, []
    monkeypatch.setattr(Equation, "run", lambda eqn, *xs: by_jax.append(eqn.primitive) or run(eqn, *xs))
    trace(lambda variables: FUNCTIONS[name](), jnp.zeros(()))
    assert bool(by_jax) == (name in BY_JAX)


LOOK_UPS = {
    "rows": lambda x, i: x[i[:, 0]],
    "columns": lambda x, i: x[:, i],
    "two axes": lambda x, i: x[i, :, i],
    "apart": lambda x, i: x[:, i, :, i],
    "points": lambda x, i: x[i, i, i, i],
    "windows": lambda x, i: jax.vmap(lambda n: lax.dynamic_slice(x, (n, 0, n, 0), (2, 3, 1, 5)))(i[:, 0]),
    "of each": lambda x, i: jnp.take_along_axis(x, i[:4, :, None, None], axis=1),
    "mapped": lambda x, i: jax.vmap(lambda row, n: row[n, :, 1])(x, i[:4]),
}


@pytest.mark.parametrize("name", LOOK_UPS)
def test_look_up_equals_gather(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.arange(4 * 5 * 3 * 6).reshape(4, 5, 3, 6)
    i = jnp.asarray(np.random.default_rng(0).integers(0, 3, (5, 2)))
    run, found = Equation.run, []

    def observed(eqn: Equation, *operands: Any) -> list[jax.Array]:
        results = run(eqn, *operands)
        if eqn.primitive is lax.gather_p:
            found.append((*map(np.asarray, operands), eqn.params, np.asarray(results[0])))
        return results

    monkeypatch.setattr(Equation, "run", observed)
    trace(lambda variables: LOOK_UPS[name](x, i), jnp.zeros(()))
    assert found
    for operand, positions, params, expected in found:
        got = folding.look_up(operand, positions, params["dimension_numbers"], params["slice_sizes"])
        np.testing.assert_array_equal(got, expected)
