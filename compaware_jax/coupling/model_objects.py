"""Model objects of frameworks, recognised without importing these."""

from __future__ import annotations

from typing import Any

import jax

from compaware_jax.errors import TraceError

# Where the class is defined that makes an object one of them, and its adapter.
_BASES = {
    ("equinox", "Module"): "equinox",
    ("flax.linen", "Module"): "linen",
    ("flax.nnx", "Module"): "nnx",
    ("haiku", "Transformed"): "haiku",
    ("haiku", "TransformedWithState"): "haiku",
}


def adapter_of(value: Any) -> str | None:
    """The adapter for a model object; None for anything else, functions that a framework wraps included."""
    if type(value).__module__.startswith("equinox._"):
        return None
    for base in type(value).__mro__:
        for (package, name), adapter in _BASES.items():
            if base.__name__ == name and base.__module__.startswith(f"{package}."):
                return adapter
    return None


def check_function(apply: Any, variables: Any, caller: str) -> None:
    """Refuse a model object in place of a function, or of variables if it is no pytree of arrays.

    Args:
      apply: should be a pure function.
      variables: should be a pytree of arrays; modules of NNX, and filtered ones of Equinox, are.
      caller: what messages call the function that was given them.

    Raises:
      TraceError: one of them is a model object.
    """
    given = {"function": apply}
    if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(variables)):
        given["variables"] = variables
    for what, value in given.items():
        if adapter := adapter_of(value):
            raise TraceError(
                f"{caller}: a model object, {type(value).__name__}, was given as the {what}, expected a pure "
                "function apply(variables, *args) and the pytree of arrays that it takes. "
                f"compaware_jax.adapters.{adapter}.functional makes both of a model."
            )
