"""The law of the library, measured: masked and slimmed are the same function, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.coupling.groups import Groups
from compaware_jax.errors import PlanError
from compaware_jax.masks import apply_mask
from compaware_jax.paths import named_leaves
from compaware_jax.placement import on_host
from compaware_jax.surgery.plan import plan_units
from compaware_jax.surgery.small_function import cut_outputs, slim
from compaware_jax.surgery.trees import shrink


def random_keep(groups: Groups, rng: np.random.Generator, share: float = 0.5) -> np.ndarray:
    """Random units to keep: each with the given probability, one of each group and guarded set at least.

    Args:
      groups: what can leave.
      rng: source of randomness.
      share: probability with which a unit stays.

    Returns:
      Boolean array, shape (units,).
    """
    keep = rng.random(groups.units) < share
    for group, floor in zip(groups.groups, groups.floors, strict=True):
        if floor:
            keep[rng.integers(group.offset, group.offset + group.units)] = True
    for units in groups.needed:
        keep[rng.choice(units)] = True
    return keep


def law_errors(
    apply: Callable[..., Any],
    variables: Any,
    *args: Any,
    keep: np.ndarray,
    groups: Groups,
    slimmer: Callable[..., Any] = slim,
    gradients: bool = True,
    compiler_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[float, float]:
    """How far the small function is from the masked one, on given inputs.

    Meaningful in float64 (``jax.config.update("jax_enable_x64", True)``), where anything above rounding
    (about 1e-10) is a wrong rule.

    Args:
      apply: the function that the groups were found for.
      variables: its variables.
      *args: its inputs.
      keep: units to keep, shape (units,), or (plans, units) for several plans.
      groups: what can leave.
      slimmer: makes the small function; `slim`, or what is to be compared with it.
      gradients: whether to compare them as well; a loop of unknown length has none.
      compiler_options: for `jax.jit`.
      **kwargs: further inputs, by name.

    Returns:
      Relative error of the outputs, and of the gradients by the variables against their global norm (of
      a random linear function of the outputs); the largest over the plans. Infinite where the small
      function is not finite.

    Raises:
      PlanError: outputs or gradients of the masked function are not finite on these inputs, so there is
        nothing to compare with.
    """
    dtype = jnp.result_type(float)

    def loss(f: Callable[..., Any], tree: Any) -> tuple[jax.Array, Any]:
        outputs = f(tree, *args, **kwargs)
        # Drawn by numpy: what draws random numbers takes longer to compile than many a function.
        terms = [
            jnp.sum(y * np.random.default_rng([7, i]).normal(size=y.shape).astype(dtype))
            for i, y in enumerate(map(jnp.asarray, jax.tree.leaves(outputs)))
            if jnp.issubdtype(y.dtype, jnp.floating)
        ]
        return sum(terms, jnp.zeros(())), outputs

    def evaluate(f: Callable[..., Any]) -> Callable[..., Any]:
        if not gradients:
            return lambda tree: (loss(f, tree), {})
        gradient = jax.value_and_grad(lambda t: loss(f, t), has_aux=True, allow_int=True)

        def run(tree: Any) -> tuple[Any, Any]:
            values, slopes = gradient(tree)
            # Integer leaves have no gradient; zeros stand for it.
            return values, jax.tree.map(
                lambda s, t: jnp.zeros(t.shape) if s.dtype == jax.dtypes.float0 else s, slopes, tree
            )

        return run

    def run(f: Callable[..., Any], program: Callable[..., Any], tree: Any) -> tuple[Any, Any]:
        (_, outputs), slopes = program(tree)
        if _not_finite(slopes):
            # Compiled, the derivative of a minimum can be 0/0 (XLA computes the compared values twice, in
            # different roundings, and finds no minimum); op by op it cannot.
            (_, outputs), slopes = evaluate(f)(tree)
        return outputs, slopes

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(function, compiler_options=dict(compiler_options or {}))

    full = compiled(evaluate(apply))
    mask = partial(apply_mask, groups)
    if not all(map(on_host, jax.tree.leaves(variables))):
        mask = compiled(mask)  # One program instead of several per shape.
    cuts_outputs = bool(groups.released or groups.states)
    errors = []
    for units in np.atleast_2d(keep):
        plan = plan_units(groups, units)
        reference = apply
        if cuts_outputs:

            def reference(tree: Any, *args: Any, plan: Any = plan, **kwargs: Any) -> Any:
                return cut_outputs(groups, plan, apply(tree, *args, **kwargs))

            full = compiled(evaluate(reference))
        masked = mask(np.asarray(units, float), variables)
        expected, expected_grad = run(reference, full, masked)
        small_apply = slimmer(apply, plan)
        small = compiled(evaluate(small_apply))
        got, got_grad = run(small_apply, small, shrink(variables, plan))
        if gradients:
            # What left has no gradient to compare.
            expected_grad = shrink(jax.device_get(expected_grad), plan)
        _check_finite(expected, expected_grad)
        errors.append((distance(got, expected), distance(got_grad, expected_grad)))
    outputs, gradients = np.max(errors, axis=0).tolist()
    return outputs, gradients


def _not_finite(tree: Any) -> list[str]:
    return [path for path, x in named_leaves(tree) if not np.isfinite(_number(x)).all()]


def _check_finite(outputs: Any, gradients: Any) -> None:
    for what, tree in (("outputs", outputs), ("gradients", gradients)):
        if bad := _not_finite(tree):
            raise PlanError(
                f"law_errors: the {what} of the masked function are not finite at {bad[:4]}, so there is "
                "nothing to compare the small function with. Pass inputs, or a plan, on which they are; "
                "if they never are without some units, keep those: constrain(groups, whole=...)."
            )


def distance(got: Any, expected: Any) -> float:
    """Norm of the difference over the norm of the expected tree.

    With weights and inputs of order one, a norm below 1e-5 is rounding noise around zero (some programs
    cancel exactly); it has no relative error, and 1e-5 takes its place.

    Args:
      got: pytree of arrays.
      expected: pytree of arrays of the same shapes.

    Returns:
      The relative distance; infinite where one of them is not finite, so that no maximum passes it over.
    """
    flat_got, flat_expected = (
        np.concatenate([np.zeros(0), *(np.ravel(_number(x)) for x in jax.tree.leaves(tree))])
        for tree in (got, expected)
    )
    assert flat_got.shape == flat_expected.shape
    scale = np.linalg.norm(flat_expected)
    error = float(np.linalg.norm(flat_got - flat_expected) / max(scale, 1e-5))
    return error if np.isfinite(error) else math.inf


def _number(array: Any) -> np.ndarray:
    """Truth values and random keys as numbers."""
    # By way of the host: `jnp.asarray` compiles a program per shape.
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    return array.astype(float) if array.dtype == bool else array
