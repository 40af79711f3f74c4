"""Calls of a module, split into the arrays that are traced and the rest, which is static."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from compaware_jax.surgery.plan import Plan


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

    One found on such a call names its outputs that way already; otherwise the function gave the output alone.
    """
    if plan.states:
        return plan
    released = tuple(f"0/{path}" if path else "0" for path in plan.released)
    return replace(plan, released=released, states=(("1", leaf),))
