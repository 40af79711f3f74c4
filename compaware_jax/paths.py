"""Names of leaves: tree paths as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from compaware_jax.errors import RequestError


def path_name(path: Sequence[Any]) -> str:
    """A tree path as text, e.g. ``params/encoder/Dense_0/kernel``."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def as_names(given: Any, option: str) -> tuple[str, ...]:
    """Tree paths given as one, as several, or not at all.

    Args:
      given: a string, an iterable of strings, or None.
      option: what messages call it.

    Raises:
      RequestError: it is something else.
    """
    names = (given,) if isinstance(given, str) else given or ()
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise RequestError(f"{option}={given!r}, expected tree paths of outputs, such as ('latent',).")
    return tuple(names)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves of a pytree with their paths as text."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
