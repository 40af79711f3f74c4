"""Derivative rules of calls, cut as the calls are: what a small function's derivatives are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from compaware_jax.coupling.analysis import Analysis
from compaware_jax.coupling.derivatives import derivative_of
from compaware_jax.coupling.factors import Factor, Tracked
from compaware_jax.coupling.program import Equation
from compaware_jax.coupling.propagate import analyse_seeded
from compaware_jax.coupling.rules import Kept
from compaware_jax.coupling.trace import flatten


class InseparableError(Exception):
    """A derivative rule ties what the plan separates, or takes inputs that have no derivative."""


def cut_derivative(
    eqn: Equation, outer: Analysis, alive: np.ndarray, kept: Sequence[Kept]
) -> tuple[Analysis, np.ndarray]:
    """The derivative rule of a call as a program of its own, of primals and tangents cut as the call's are.

    Args:
      eqn: the call.
      outer: the analysis of the program that it is in.
      alive: boolean array over the classes of that analysis.
      kept: what is kept of the call's outputs.

    Returns:
      The analysis of the rule, and which of its classes are kept.

    Raises:
      InseparableError: the rule does not run on cut arrays.
    """
    closed = derivative_of(eqn)
    if closed is None:
        raise InseparableError
    classes = outer.solution.count
    inputs = [_by_class(outer, v) for v in eqn.inputs] * 2
    analysis = analyse_seeded(flatten(closed, leaves=()), inputs, classes, cuts=outer.cuts)
    labels = analysis.solution.labels[:classes]
    survivors = alive | ~outer.free
    alive_here = np.ones(analysis.solution.count, bool)
    alive_here[labels[~survivors]] = False
    # The rule must neither tie what the plan separates nor need whole what it cuts.
    tied = alive_here[labels] != survivors
    if tied.any() or not analysis.free[labels[~survivors]].all():
        raise InseparableError
    for value, expected in zip(analysis.program.block.outputs, kept, strict=True):
        got = analysis.kept(value, alive_here)
        if any(not _same(a, b) for a, b in zip(got, expected, strict=True)):
            raise InseparableError
    return analysis, alive_here


def _by_class(analysis: Analysis, value: int) -> Tracked:
    """A value whose atoms are the classes that an outer analysis found."""
    shape = analysis.program.avals[value].shape
    labels = analysis.solution.labels
    factors = tuple(Factor(f.axes, labels[f.ids], f.dead) for f in analysis.factors.get(value, ()))
    return Tracked(shape, factors)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def jvp_of_zeros(call: Callable[..., Any], *arrays: jax.Array) -> Any:
    """A function's results and tangents, for tangents that are zero."""

    def zero(array: jax.Array) -> Any:
        inexact = jnp.issubdtype(array.dtype, jnp.inexact)
        return jnp.zeros_like(array) if inexact else np.zeros(array.shape, jax.dtypes.float0)

    return jax.jvp(call, arrays, tuple(map(zero, arrays)))


def vjp_of_asked(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Any]:
    """Results, and what `pulled_back` needs, with the derivatives of those inputs alone that are asked for.

    A rule may refuse to be differentiated for the others.
    """
    asked = [(x.value,) if x.perturbed else () for x in inputs]

    def of_asked(asked: list[Any]) -> Any:
        return function(*(mine[0] if mine else x.value for mine, x in zip(asked, inputs, strict=True)))

    return jax.vjp(of_asked, asked)


def pulled_back(pull: Callable[..., Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
    """The cotangents of the inputs of `vjp_of_asked`; None for those that are not asked for."""
    (asked,) = pull([_instantiated(x) for x in cotangents])
    return tuple(mine[0] if mine else None for mine in asked)


def _instantiated(cotangent: Any) -> Any:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    aval: Any = cotangent.aval
    return (np.zeros if aval.dtype == jax.dtypes.float0 else jnp.zeros)(aval.shape, aval.dtype)
