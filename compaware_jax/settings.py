"""Settings as users give them: numbers and names of Python, numpy or JAX, refused where they are none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.errors import RequestError


def real_number(value: Any) -> float | None:
    """What holds one real number, as that; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)):
        return None
    array = np.asarray(value)
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    return float(array) if real and array.shape == () else None


def checked_number(value: Any, name: str, *, most: float = np.inf) -> float:
    """A setting as a number, from zero to `most`.

    Raises:
      RequestError: it is none.
    """
    number = real_number(value)
    if number is None or not (0 <= number <= most) or number == np.inf:
        expected = "zero or above" if most == np.inf else f"from 0 to {most:g}"
        raise RequestError(f"{name}={value!r}, expected a finite number, {expected}.")
    return number


def whole_number(value: Any, name: str, *, least: int = 0) -> int:
    """A count as a plain integer.

    Args:
      value: what was given, of whatever type.
      name: what messages call it.
      least: the smallest that is allowed.

    Raises:
      RequestError: it is no whole number, or a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise RequestError(f"{name}={value!r}, expected a whole number, {least} or more.")
    return int(value)


def as_names(given: Any, option: str) -> tuple[str, ...]:
    """Tree paths given as one, as several, or not at all.

    Args:
      given: a string, an iterable of strings, or None.
      option: what messages call it.

    Raises:
      RequestError: it is something else.
    """
    names = () if given is None else (given,) if isinstance(given, str) else given
    listed = isinstance(names, Iterable) and not isinstance(names, Mapping)
    if not listed or not all(isinstance(name, str) for name in names):
        raise RequestError(f"{option}={given!r}, expected tree paths of outputs, such as ('latent',).")
    return tuple(map(str, names))
