"""Calls of a module, split into the arrays that are traced and the rest, which is static or known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from compaware_jax.errors import PlanError
from compaware_jax.surgery.plan import Plan
from compaware_jax.training.loop import digest


@dataclass(frozen=True)
class Static:
    """What is left of a tree without its arrays: hashable if its other leaves are."""

    structure: Any
    leaves: tuple[Any, ...]

    def join(self, arrays: list[Any]) -> Any:
        """The tree with the given arrays in their places."""
        rest = iter(arrays)
        leaves = [next(rest) if leaf is None else leaf[1] for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


@dataclass(frozen=True, eq=False)
class Known:
    """Arrays that a module holds for good, such as the indices of a permutation, or a mask.

    The groups were found with their values, so the small function needs these, not tracers in their place.
    Two are equal if their arrays are.

    Attributes:
      given: by name; empty where they are not known. A program may have taken their memory since.
      arrays: copies of them.
      mark: a hash of all of them.
    """

    given: dict[Any, Any]
    arrays: dict[Any, Any]
    mark: str

    @classmethod
    def of(cls, arrays: dict[Any, Any]) -> Known:
        """What is known of arrays: nothing if they are traced."""
        if any(isinstance(x, Tracer) for x in arrays.values()):
            arrays = {}
        types = [(name, x.shape, str(x.dtype)) for name, x in arrays.items()]
        with jax.ensure_compile_time_eval():
            held = jax.tree.map(jnp.copy, arrays)
        return cls(arrays, held, digest([held, np.frombuffer(repr(types).encode(), np.uint8)]))

    def check(self, arrays: dict[Any, Any], caller: str) -> None:
        """Refuse other arrays in the place of those that are known, as far as that can be seen.

        Raises:
          PlanError: says which ones.
        """
        for name, known in self.arrays.items():
            now = arrays.get(name, known)
            if now is self.given[name] or isinstance(now, Tracer):
                continue
            if digest([now]) != digest([known]):
                raise PlanError(
                    f"{caller}: `{name}` has other values than when `slimmed` was called, where the small "
                    "model took them for constants. Change it in the full model, find its groups again, and "
                    "call slimmed on that."
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self.mark == other.mark

    def __hash__(self) -> int:
        return hash(self.mark)


def split_arrays(tree: Any) -> tuple[list[Any], Static]:
    """Split a tree into its arrays and the rest, as `equinox.filter_jit` does."""
    leaves, structure = jax.tree.flatten(tree)
    found = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]
    arrays = [leaf for leaf, is_array in zip(leaves, found, strict=True) if is_array]
    # The type goes along, because True == 1 == 1.0 would share an entry of a cache.
    rest = tuple(None if is_array else (type(x), x) for x, is_array in zip(leaves, found, strict=True))
    return arrays, Static(structure, rest)


def hashable(*values: Any) -> bool:
    """Whether values can be looked up in a cache."""
    try:
        hash(values)
    except TypeError:
        return False
    return True


def with_updates(plan: Plan, leaf: str) -> Plan:
    """A plan for a call that gives (output, updates of the state at a leaf's path).

    One found on such a call names its outputs that way already. Otherwise the function gave the output alone,
    or those of several calls, each in a place of its own.
    """
    if (states := (("1", leaf),)) == plan.states:
        return plan
    paths = list(plan.released)
    if plan.states:
        paths += [path.partition("/")[2] for path in plan.released]
    return replace(plan, released=tuple(f"0/{path}" if path else "0" for path in paths), states=states)
