"""Data inputs that the small function takes cut, such as the carry of a recurrent model's single step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import jax
import numpy as np

from compaware_jax.coupling.analysis import Analysis
from compaware_jax.coupling.trace import argument_names
from compaware_jax.errors import PlanError
from compaware_jax.placement import struct_of


def full_shapes(cut_inputs: Any) -> dict[str, tuple[int | None, ...]]:
    """What is given as `cut_inputs`, checked.

    Raises:
      PlanError: it is no dictionary of shapes.
    """
    shapes = {} if cut_inputs is None else cut_inputs
    try:
        return {str(path): tuple(None if n is None else index(n) for n in shapes[path]) for path in shapes}
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"slim: cut_inputs={cut_inputs!r}, expected a dictionary from names of arguments to their full "
            "shapes, such as {'carry': (None, 256)}; None is for a size that is as it comes."
        ) from error


def widened(
    apply: Callable[..., Any], shapes: Mapping[str, Sequence[int | None]], args: Any, kwargs: Any
) -> tuple[Any, list[int]]:
    """The arguments, of full shapes where they come in cut; and the positions of those among their leaves.

    Raises:
      PlanError: a name is of no argument, or a shape has more or fewer axes.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    if not shapes:
        return (args, kwargs), []
    names, taken = argument_names(apply, args, kwargs), []
    for path, shape in shapes.items():
        inside = [n for n, name in enumerate(names) if name == path or name.startswith(f"{path}/")]
        if not inside:
            raise PlanError(
                f"slim: cut_inputs names {path!r}, which is no argument of the function; these are "
                f"{list(names)[:8]}. Pass one of these names, or of what they begin with."
            )
        for n in inside:
            got = np.shape(leaves[n])
            if len(got) != len(shape):
                raise PlanError(
                    f"slim: cut_inputs[{path!r}] has {len(shape)} axes, `{names[n]}` has shape {got}. Pass a "
                    "size, or None, per axis."
                )
            full = [came if size is None else size for size, came in zip(shape, got, strict=True)]
            leaves[n] = struct_of(leaves[n], jax.dtypes.result_type(leaves[n]), full)
        taken += inside
    return jax.tree.unflatten(structure, leaves), taken


def check_taken(analysis: Analysis, alive: np.ndarray, taken: Sequence[int], leaves: Sequence[Any]) -> None:
    """Refuse arguments that do not come in as the plan cuts them.

    Raises:
      PlanError: says which shape is expected.
    """
    program = analysis.program
    for n in taken:
        value = program.argument_values[n]
        full = program.avals[value].shape
        kept = analysis.kept(value, alive)
        small = tuple(size if i is None else len(i) for size, i in zip(full, kept, strict=True))
        if np.shape(leaves[n]) != small:
            raise PlanError(
                f"slim: `{program.arguments[n]}` has shape {np.shape(leaves[n])}, expected {small}: of "
                f"{full}, what the plan keeps of what it meets."
            )
