"""Whether a rebuilt model computes what the small function computes, measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from compaware_jax.errors import PlanError, gist
from compaware_jax.paths import named_leaves
from compaware_jax.surgery.plan import Plan
from compaware_jax.surgery.small_function import slim
from compaware_jax.surgery.trees import shrink


def check_rebuilt(
    rebuilt_apply: Callable[..., Any],
    apply: Callable[..., Any],
    plan: Plan,
    variables: Any,
    *args: Any,
    tolerance: float | None = None,
) -> float:
    """Compare a model that was rebuilt at the plan's widths with the small function.

    A rebuilt model is its own code on smaller arrays. That is the same function only where nothing in the
    code depends on the size of an axis that was cut: the mean of a LayerNorm, the scale of attention and a
    reshape do.

    Args:
      rebuilt_apply: called as ``rebuilt_apply(shrink(variables, plan), *args)``.
      apply: the full function that the plan was made for.
      plan: what is kept.
      variables: the full variables.
      *args: example inputs; real ones, since values are compared.
      tolerance: largest relative difference allowed; 3·√eps of the outputs' dtype by default (about 1e-3
        in float32), which leaves room for another order of summation.

    Returns:
      The norm of the difference of all outputs over the norm of the outputs.

    Raises:
      PlanError: the rebuilt model does not run on the shrunken variables, or computes something else.
    """
    small = shrink(variables, plan)
    expected = jax.jit(slim(apply, plan))(small, *args)
    return compare(lambda: jax.jit(rebuilt_apply)(small, *args), expected, tolerance, "check_rebuilt", "slim")


def compare(
    rebuilt: Callable[[], Any], expected: Any, tolerance: float | None, caller: str, instead: str
) -> float:
    """Run a rebuilt model and compare its outputs with those of the small function.

    Args:
      rebuilt: gives the outputs of the rebuilt model.
      expected: the outputs of the small function.
      tolerance: see `check_rebuilt`.
      caller: the function that reports an error.
      instead: what the error tells to use.

    Returns:
      The relative difference.

    Raises:
      PlanError: see `check_rebuilt`.
    """
    try:
        got = rebuilt()
    except Exception as error:  # Any error of the model's own code says that it cannot be rebuilt.
        raise PlanError(
            f"{caller}: the model's own code does not run on the smaller arrays "
            f"({gist(error)}). Give "
            f"its layers the widths of the plan, or use `{instead}`, which runs any plan."
        ) from error
    shapes = [[(path, np.shape(leaf)) for path, leaf in named_leaves(tree)] for tree in (got, expected)]
    if shapes[0] != shapes[1]:
        raise PlanError(
            f"{caller}: the rebuilt model returns {shapes[0][:3]}, `{instead}` returns {shapes[1][:3]}. "
            f"Rebuild the function that the plan was made for, or use `{instead}`."
        )
    if tolerance is None:
        dtypes = [jax.dtypes.result_type(leaf) for leaf in jax.tree.leaves(expected)]
        eps = [float(jax.numpy.finfo(d).eps) for d in dtypes if jax.numpy.issubdtype(d, np.inexact)]
        tolerance = float(3 * np.sqrt(max(eps, default=0.0)))
    difference = relative_difference(got, expected)
    if not difference <= tolerance:
        raise PlanError(
            f"{caller}: the rebuilt model differs from `{instead}` by {difference:.2g} of the outputs' norm "
            f"(allowed: {tolerance:.2g}). A normalisation over a cut axis, the scale of attention or a "
            "reshape is traced anew with the constants of the smaller width, which is another function; and "
            "what is drawn at random, as for dropout, is drawn anew at the smaller shapes. Use "
            f"`{instead}`, which keeps the constants and the draws of the full model."
        )
    return difference


def relative_difference(got: Any, expected: Any) -> float:
    """Norm of the difference of two trees of like arrays over the norm of the expected one."""
    flat = [
        np.concatenate([np.ravel(np.asarray(x, np.complex128)) for x in jax.tree.leaves(tree)] or [[0j]])
        for tree in (got, expected)
    ]
    difference = np.linalg.norm(flat[0] - flat[1])
    return float(difference / max(np.linalg.norm(flat[1]), np.finfo(np.float32).tiny))
