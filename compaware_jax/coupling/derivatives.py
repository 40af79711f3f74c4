"""What a call has to say of its own derivative rule, and which calls may be asked once for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import primitives as p

from compaware_jax.coupling.factors import Tracked
from compaware_jax.coupling.program import Block, Equation, is_smooth
from compaware_jax.coupling.rules import RULES
from compaware_jax.placement import struct_of


def place(eqn: Equation) -> str | None:
    """Where JAX itself defines the function of a call together with its rule, if it does."""
    body = eqn.params["call_jaxpr"].jaxpr
    shown = getattr(getattr(body, "debug_info", None), "func_src_info", None) or ""
    # A function of JAX's under a user's own rule shows the same place: it is plain in its module, or a call
    # inside this one.
    own = _is_of_jax(shown) and not any(inner.bodies for inner in eqn.bodies[0].equations)
    return shown if own else None


@cache
def _is_of_jax(shown: str) -> bool:
    """Whether a place is that of a function of JAX with a derivative rule."""
    name, _, file = shown.partition(f" at {os.path.dirname(jax.__file__)}{os.sep}")
    module = sys.modules.get("jax." + file.partition(".py")[0].replace(os.sep, "."))
    return isinstance(getattr(module, name, None), jax.custom_jvp)


def identity(eqn: Equation) -> tuple[Any, ...]:
    """What a call shares with others of the same function and shapes."""
    defined = place(eqn)
    if defined is not None:
        # Defined once, at the top of a module: the place says which rule it is.
        return defined, str(eqn.params["call_jaxpr"])
    # The equation itself is part of the key, so that its id is not given to another one.
    return id(eqn.source), eqn.source


def flags(eqn: Equation, inputs: Sequence[Tracked], constants: Mapping[int, Any]) -> tuple[Any, ...] | None:
    """What a call of an element-wise function of JAX shares with others under the same flags, of any sizes.

    JAX's rules for element-wise functions do not ask for sizes. Where the rule is element-wise, too, which
    atoms stand where makes no difference, as long as no factor spans two axes: none is ever collapsed.
    """
    defined, body = place(eqn), eqn.bodies[0]
    if defined is None or not is_elementwise(body) or any(len(f.axes) > 1 for x in inputs for f in x.factors):
        return None
    steps = body.equations
    inside = [value for step in steps for value in (*step.inputs, *step.outputs)]
    name = {value: n for n, value in enumerate(dict.fromkeys((*body.inputs, *inside, *body.outputs)))}
    numbers = tuple((n, number_of(constants[value])) for value, n in name.items() if value in constants)
    if any(number is None for _, number in numbers):
        return None
    text = tuple((step.primitive, str(step.params), *map(name.get, step.inputs)) for step in steps)
    pattern = tuple((len(x.shape), x.uniform, *((f.axes, f.dead) for f in x.factors)) for x in inputs)
    return defined, eqn.in_dtypes, numbers, text, tuple(map(name.get, body.outputs)), pattern


def is_elementwise(block: Block) -> bool:
    """Whether all its equations are element-wise, or fill a shape with a scalar."""
    return all(
        (eqn.primitive in RULES and RULES[eqn.primitive].elementwise)
        or (eqn.primitive is p.broadcast_in_dim_p and eqn.in_shapes[0] == ())
        for eqn in block.equations
    )


def derivative_of(eqn: Equation) -> jex.ClosedJaxpr | None:
    """The derivative rule of a call as a jaxpr of primals and tangents; None without one for all of them."""
    if not all(map(is_smooth, eqn.in_avals)):
        return None
    avals = [struct_of(aval, aval.dtype) for aval in eqn.in_avals]
    try:
        return jax.make_jaxpr(lambda primals, tangents: jax.jvp(eqn.run, primals, tangents)[1])(
            tuple(avals), tuple(avals)
        )
    except Exception:
        # A rule may refuse tangents of some operands, such as data, with whatever error it likes.
        return None


def backward_of(eqn: Equation) -> jex.ClosedJaxpr | None:
    """A call and its backward pass as a jaxpr, of operands and cotangents; None where that is refused."""
    avals = [struct_of(aval, aval.dtype) for aval in eqn.in_avals]
    results = [struct_of(aval, aval.dtype) for aval in eqn.out_avals]
    asked = asked_of(eqn)
    smooth = list(map(is_smooth, results))

    def backward(operands: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        def call(*values: Any) -> list[Any]:
            own = iter(values)
            every = eqn.run(*(next(own) if mine else x for x, mine in zip(operands, asked, strict=True)))
            return [y for y, mine in zip(every, smooth, strict=True) if mine]

        _, pull = jax.vjp(call, *(x for x, mine in zip(operands, asked, strict=True) if mine))
        return pull(list(cotangents))

    try:
        return jax.make_jaxpr(backward)(avals, [y for y, mine in zip(results, smooth, strict=True) if mine])
    except Exception:
        # As above.
        return None


def asked_of(eqn: Equation) -> list[bool]:
    """Per operand of a call with a backward pass whether that may be asked for its cotangent."""
    # What the function closed over comes first; it has no derivative, and to ask for it is an error.
    return [n >= eqn.params.get("num_consts", 0) and is_smooth(aval) for n, aval in enumerate(eqn.in_avals)]


def reached_in_place(block: Block, values: Sequence[int]) -> set[int] | None:
    """All that is made of some values, if each of its elements is made of theirs at the same position."""
    reached = set(values)
    for eqn in block.equations:
        shapes = [s for v, s in zip(eqn.inputs, eqn.in_shapes, strict=True) if v in reached]
        if not shapes:
            continue
        rule = RULES.get(eqn.primitive)
        if rule is None or not rule.elementwise or {*shapes} != {*eqn.out_shapes}:
            return None
        reached.update(eqn.outputs)
    return reached


def number_of(constant: Any) -> float | None:
    """A constant scalar as a real number, where it is one, or a truth value, and its value is known."""
    if np.shape(constant) != ():
        return None
    dtype = constant.dtype if hasattr(constant, "dtype") else jnp.result_type(constant)
    if not (jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)):
        return None
    try:
        number = complex(constant)
    except jax.errors.ConcretizationTypeError:
        return None
    return number.real if number.imag == 0 else None


def positions_of(constant: Any) -> np.ndarray | None:
    """A constant array of integers or flags, where it is one and its value is known."""
    if isinstance(constant, Tracer):
        return None
    dtype = jax.dtypes.result_type(constant)
    plain = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)
    return np.asarray(constant) if plain else None
