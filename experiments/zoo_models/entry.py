"""What a zoo entry is: a public model architecture, and what a hand count says can leave it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Model = tuple[Callable[..., Any], Any, tuple[Any, ...]]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
      name: what it is called, e.g. ``ResNet-50 v1``.
      source: the package and class it comes from, or how it was written.
      build: gives ``(apply, variables, args)``: a pure function, its abstract variables (a pytree of
        `jax.ShapeDtypeStruct`), and example inputs, arrays or abstract.
      units: how many units must be free to leave, counted by hand.
      by_hand: how that number comes about.
    """

    name: str
    source: str
    build: Callable[[], Model]
    units: int
    by_hand: str
