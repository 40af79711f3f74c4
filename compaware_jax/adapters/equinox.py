"""Equinox: a module as a pure function of its arrays, and a small module back.

Equinox modules are written for one example; so is everything here, and `jax.vmap` goes around it:
``find_groups(apply, variables, x)`` with one example, ``jax.vmap(apply, (None, 0))(variables, batch)`` in a
loss, ``jax.vmap(slimmed(model, plan))(batch)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "compaware_jax.adapters.equinox needs Equinox, which is not installed: pip install equinox"
    ) from error

from compaware_jax.adapters import equinox_loops  # noqa: F401  (registers rules)
from compaware_jax.adapters.calls import (
    Known,
    SmallCall,
    Static,
    hashable,
    named_arrays,
    split_arrays,
    with_arrays,
    with_updates,
)
from compaware_jax.adapters.rebuilt import compare
from compaware_jax.errors import TraceError
from compaware_jax.surgery.plan import Plan
from compaware_jax.surgery.small_function import check_small
from compaware_jax.surgery.trees import shrink


def functional(
    model: Any, state: eqx.nn.State | None = None, *, updates: bool = False, **static_kwargs: Any
) -> tuple[Callable[..., Any], Any]:
    """A module as a pure function of its arrays.

    Args:
      model: the module, in the mode that is meant (see `eqx.nn.inference_mode`).
      state: the state of a model of `eqx.nn.make_with_state`.
      updates: whether the function returns (output, new state) instead of the output; with state only. A
        `BatchNorm` in training wants the whole batch: find the groups on
        ``jax.vmap(apply, (None, 0), (0, None), axis_name)`` with ``state_outputs={"1": "state"}``, and let
        the loss return ``{"state": new}`` as its updates.
      **static_kwargs: keyword arguments of the call that are not arrays.

    Returns:
      The function ``apply(variables, *args, **kwargs)``, which gives what ``model(*args, **kwargs)`` gives,
      and the variables: the module with None in place of everything but floating-point arrays. (Integers
      are closed over: look-ups by a table that is known are followed index by index.) With state, the
      variables are ``{"params": ..., "state": ...}`` and the function gives the output of
      ``model(*args, state, **kwargs)`` without the new state; the state has no gradient, so that `compress`
      leaves it as it is.

    Raises:
      TraceError: the model is no Equinox module, or updates are asked for without state.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, compaware_jax as ca
      >>> from compaware_jax.adapters import equinox as adapter
      >>> model = eqx.nn.MLP(3, 2, 8, depth=1, key=jax.random.key(0))
      >>> apply, variables = adapter.functional(model)
      >>> groups = ca.find_groups(apply, variables, jnp.ones(3))
      >>> plan = ca.plan_units(groups, jnp.arange(8) < 5)
      >>> small = adapter.slimmed(model, plan)
      >>> jax.vmap(small)(jnp.ones((4, 3))).shape, small.model.layers[0].weight.shape
      ((4, 2), (5, 3))
    """
    _check(model, "functional")
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    if state is None:
        if updates:
            raise TraceError(
                "equinox.functional: got updates=True without state, expected the state of a model of "
                "eqx.nn.make_with_state. Leave it out, or pass functional(model, state, updates=True)."
            )

        def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
            return eqx.combine(variables, rest)(*args, **static_kwargs, **kwargs)

        return apply, params
    arrays, other = eqx.partition(state, eqx.is_array)

    def apply_with_state(variables: Any, *args: Any, **kwargs: Any) -> Any:
        called = eqx.combine(variables["params"], rest)
        still = eqx.combine(jax.lax.stop_gradient(variables["state"]), other)
        output, new = called(*args, still, **static_kwargs, **kwargs)
        return (output, eqx.filter(new, eqx.is_array)) if updates else output

    return apply_with_state, {"params": params, "state": arrays}


class Slimmed(eqx.Module):
    """A module that runs another one slimmed; made by `slimmed`.

    `model` holds the small arrays in the structure of the full module, which is what `eqx.filter_grad`,
    `eqx.partition`, `eqx.tree_serialise_leaves` and `eqx.nn.inference_mode` look at. Call the `Slimmed`,
    not `model`. Its tables of integers and flags are constants where the plan needs their values, as it does
    those of a permutation. Such a one may not change then: outside of `eqx.filter_jit` that is refused,
    inside it is not seen.
    """

    model: eqx.Module
    plan: Plan = eqx.field(static=True)
    known: Known = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the slimmed function gives for one example."""
        params, rest = eqx.partition(self.model, eqx.is_inexact_array)
        held, rest = named_arrays(rest)
        states = [i for i, x in enumerate(args) if isinstance(x, eqx.nn.State)]
        variables = params
        if states:
            arrays, other = eqx.partition(args[states[0]], eqx.is_array)
            variables = {"params": params, "state": arrays}
            args = (*args[: states[0]], other, *args[states[0] + 1 :])
        arrays, static = split_arrays((rest, args, kwargs))
        place = states[0] if states else None
        build = _cached if hashable(static) else _small_call
        return build(static, place, self.plan, self.known)(variables, held, arrays)


def slimmed(model: Any, plan: Plan, state: eqx.nn.State | None = None, *, variables: Any = None) -> Any:
    """A module that holds the small arrays and computes what `slim` computes.

    Args:
      model: the full module.
      plan: what is kept, for groups that were found on ``functional(model)`` (or ``functional(model,
        state)``).
      state: the state that the groups were found with, if any.
      variables: the small arrays, e.g. `Result.variables` of `compress`; default the model's own, cut.

    Returns:
      A module called like `model`, unbatched: `jax.vmap` goes around it. With state, the module and the
      small state, to be called as ``module(x, state)``, which gives the output and the new small state.

    Raises:
      TraceError: the model is no Equinox module.
      PlanError: the plan was made for another model, or the variables are not small ones of it.
    """
    small, small_state = _with_small_arrays(model, plan, state, variables, "slimmed")
    module = _slimmed(small, plan)
    return module if state is None else (module, small_state)


def smaller(
    model: Any,
    plan: Plan,
    *args: Any,
    state: eqx.nn.State | None = None,
    variables: Any = None,
    **kwargs: Any,
) -> Any:
    """A module of the same class with smaller arrays, which runs its own code on them.

    It is the same function as the slimmed one only where nothing in its code depends on the size of a cut
    axis (the mean of a LayerNorm, the scale of attention, a reshape); give example inputs to have that
    checked. Static fields (`out_features`, `num_heads`, `groups`) stay as they are.

    Args:
      model: the full module, in inference mode if it drops out.
      plan: what is kept.
      *args: one example for the check (the state is added behind it); without any, nothing is checked.
      state: the state that the groups were found with, if any.
      variables: the small arrays, e.g. `Result.variables` of `compress`; default the model's own, cut.
      **kwargs: further arguments of the call.

    Returns:
      The smaller module; with state, the module and the small state.

    Raises:
      TraceError: the model is no Equinox module.
      PlanError: the plan was made for another model, or (with an example) the smaller module computes
        something else than `slimmed`.
    """
    small, small_state = _with_small_arrays(model, plan, state, variables, "smaller")
    if args or kwargs:
        inputs = args if state is None else (*args, small_state)
        expected = eqx.filter_jit(_slimmed(small, plan))(*inputs, **kwargs)
        compare(lambda: eqx.filter_jit(small)(*inputs, **kwargs), expected, None, "smaller", "slimmed")
    return small if state is None else (small, small_state)


def _slimmed(small: Any, plan: Plan) -> Slimmed:
    return Slimmed(small, plan, Known.of(named_arrays(eqx.partition(small, eqx.is_inexact_array)[1])[0]))


def _check(model: Any, caller: str) -> None:
    if not isinstance(model, eqx.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TraceError(
            f"equinox.{caller}: got {got}, expected an instance of equinox.Module. A plain function of a "
            "pytree needs no adapter: pass it to find_groups as it is."
        )


def _with_small_arrays(model: Any, plan: Plan, state: Any, small: Any, caller: str) -> tuple[Any, Any]:
    _check(model, caller)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    arrays, other = eqx.partition(state, eqx.is_array)
    if small is None:
        small = shrink(params if state is None else {"params": params, "state": arrays}, plan)
    check_small(small, plan, caller)
    if state is None:
        return eqx.combine(small, rest), None
    return eqx.combine(small["params"], rest), eqx.combine(small["state"], other)


def _small_call(static: Static, place: int | None, plan: Plan, known: Known) -> SmallCall:
    """The slimmed call of a module whose state, if any, is the argument at a place."""

    def call(variables: Any, held: dict[str, Any], arrays: list[Any]) -> Any:
        rest, args, kwargs = static.join(arrays)
        rest = with_arrays(rest, held)
        params = variables
        if place is not None:
            params = variables["params"]
            args = (*args[:place], eqx.combine(variables["state"], args[place]), *args[place + 1 :])
        return eqx.combine(params, rest)(*args, **kwargs)

    return SmallCall(call, [plan] if place is None else with_updates(plan, "state"), known)


_cached = lru_cache(maxsize=64)(_small_call)
