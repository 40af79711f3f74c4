"""The table of rules: one per primitive, keyed by the primitive object.

A rule reads a primitive three ways:

* *coupling*: which axes of its inputs and outputs are tied (`couple`);
* *slimming*: how to bind it on smaller arrays (`slim`); ``None`` means that the traced equation runs wider
  instead (un-cut): whole along one axis where that will do, else along all; always right, sometimes slow;
* *work*: the axes whose sizes multiply to its multiply-add count (`work`), for the FLOPs of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import Primitive

from compaware_jax.coupling.factors import Tracked
from compaware_jax.coupling.ledger import Ledger
from compaware_jax.coupling.program import Block, Equation
from compaware_jax.errors import RequestError

Kept = tuple[np.ndarray | None, ...]
"""Per axis the kept indices, ascending, or None where the axis is whole."""


@dataclass(frozen=True, eq=False)
class Small:
    """An operand while slimming.

    Attributes:
      array: its value, smaller on the cut axes.
      kept: per axis the kept indices of the full axis, or None where it is whole.
      zero: per axis whether what was cut away is zero in the masked network.
      known: its value at full width, where the trace shows it.
    """

    array: jax.Array
    kept: Kept
    zero: tuple[bool, ...]
    known: np.ndarray | None = None


Couple = Callable[[Ledger, Equation, Sequence[Tracked]], "list[Tracked]"]
Slim = Callable[[Equation, Sequence[Small], Sequence[Kept]], "list[jax.Array] | None"]
Work = Callable[[Equation], "list[tuple[tuple[int, int], ...]]"]
Loose = Callable[[Equation], "list[tuple[int, int]]"]


@dataclass(frozen=True, eq=False)
class Rule:
    """How to read one primitive.

    Attributes:
      couple: ``(ledger, equation, inputs) -> outputs``: what is known of the outputs, having told the
        ledger which atoms leave together.
      slim: ``(equation, operands, kept_outputs) -> arrays``, or None from it to run the equation
        wider (un-cut); None instead of it for one that always runs at full width.
      work: ``equation -> dimensions``, whose sizes multiply to the multiply-adds; a dimension is a tuple
        of the (value id, axis) pairs that run along it.
      loose: ``equation -> [(operand, axis), ...]`` where `slim` takes an operand that is cut although
        the index stays: what is missing counts as zero.
      elementwise: whether its operands are tied index by index, and zero flags alone tell the outputs'.
      moves: whether it does nothing but move elements, so that it costs little at full width.
    """

    couple: Couple
    slim: Slim | None = None
    work: Work | None = None
    loose: Loose | None = None
    elementwise: bool = False
    moves: bool = False


RULES: dict[Primitive, Rule] = {}


def register_rule(
    primitive: Primitive,
    couple: Couple,
    slim: Slim | None = None,
    work: Work | None = None,
    loose: Loose | None = None,
    *,
    moves: bool = False,
) -> None:
    """Register how a primitive is read; see `Rule` for the readings.

    Most primitives are of a family, which `compaware_jax.coupling.rules.families` registers in a line:
    ``elementwise(primitive, zero)``, where ``zero(equation, flags, values)`` says when zeros stay zeros
    (``lambda eqn, flags, values: flags[0]`` for a function that is zero at zero), and
    ``reduction(primitive, sums=True)`` for sums over ``params["axes"]``.

    Args:
      primitive: the primitive object.
      couple: its coupling.
      slim: its slimming; None runs it at full width, which is always exact.
      work: its multiply-add count as a product of axis sizes.
      loose: the ends of its operands that may leave apart from it.
      moves: whether it does nothing but move elements, as a reshape does. What several such equations hand
        to one another need not fit a dense array when it is cut: it stays whole.

    Raises:
      RequestError: the primitive is given by its name, say; or the coupling is no function.

    Example:
      A primitive that swaps neighbours along its last axis. Coupling does to the atoms what it does to
      the values; at full width it is always exact, so `slim` can wait.

      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jax.extend.core import Primitive
      >>> import compaware_jax as ca
      >>> from compaware_jax.coupling.factors import Factor, Tracked
      >>> swap_p = Primitive("swap_neighbours")
      >>> swap = lambda x: x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
      >>> _ = swap_p.def_impl(swap), swap_p.def_abstract_eval(lambda x: x)
      >>> def couple(ledger, eqn, inputs):
      ...     last = len(inputs[0].shape) - 1
      ...     return [Tracked(inputs[0].shape, tuple(
      ...         Factor(f.axes, swap(f.ids), f.dead) if f.axes == (last,) else f
      ...         for f in inputs[0].factors))]
      >>> ca.register_rule(swap_p, couple)
      >>> net = lambda v, x: swap_p.bind(x @ v["a"]) @ v["b"]
      >>> v = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> groups = ca.find_groups(net, v, jnp.ones((1, 3)), strict=True)
      >>> plan = ca.plan_units(groups, jnp.array([False, True, True, True]))
      >>> dict(zip(("a", "b"), plan.kept))
      {'a': (None, (1, 2, 3)), 'b': ((0, 2, 3), None)}
    """
    if not isinstance(primitive, Primitive) or not callable(couple):
        raise RequestError(
            f"register_rule: got ({primitive!r}, {couple!r}), expected a primitive and a function. Those of "
            "JAX are attributes of jax.extend.core.primitives, e.g. primitives.sin_p."
        )
    RULES[primitive] = Rule(couple, slim, work, loose, moves=moves)


def primitives_of(function: Callable, *args: object) -> list[Primitive]:
    """The primitives that a function traces to: some have no public name."""
    return [eqn.primitive for eqn in jax.make_jaxpr(function)(*args).eqns]


Read = Callable[[Block, Sequence[Tracked]], "list[Tracked]"]
"""Reads a body: what is known of its inputs to what is known of its outputs."""


RunBody = Callable[[Block, Sequence[jax.Array], Sequence[Kept]], "list[jax.Array]"]
"""Runs a body on small arrays, some of them at full width, and cuts its outputs to the given targets."""


class Parts(NamedTuple):
    """Where what a loop or a branch is given turns up in its bodies.

    Attributes:
      operand_of: which operand an input of a body is, at first, by value id; empty where every value has to
        be as narrow as the analysis says.
      carried: operand position to output position of what a body's result takes the place of.
    """

    operand_of: Mapping[int, int]
    carried: Mapping[int, int]


@dataclass(frozen=True, eq=False)
class RegionRule:
    """How to read a primitive that runs bodies: a loop or a branch.

    Attributes:
      couple: ``(ledger, equation, inputs, read) -> outputs``; it reads every body at least once.
      slim: ``(equation, operands, kept_outputs, run) -> arrays``.
      times: ``equation -> how often each body runs`` in one call, for FLOPs.
      parts: ``equation -> Parts``.
    """

    couple: Callable[[Ledger, Equation, Sequence[Tracked], Read], list[Tracked]]
    slim: Callable[[Equation, Sequence[Small], Sequence[Kept], RunBody], list[jax.Array]]
    times: Callable[[Equation], Sequence[int]]
    parts: Callable[[Equation], Parts]


REGIONS: dict[Primitive, RegionRule] = {}
