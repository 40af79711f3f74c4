"""Flax NNX: a module as a pure function of its variables, and a small module back."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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
from compaware_jax.adapters.nnx_layers import update_attributes
from compaware_jax.adapters.rebuilt import compare
from compaware_jax.coupling.program import is_smooth
from compaware_jax.errors import PlanError, TraceError
from compaware_jax.paths import named_leaves
from compaware_jax.surgery.plan import Plan
from compaware_jax.surgery.small_function import check_small
from compaware_jax.surgery.trees import shrink


def functional(
    model: Any, *, updates: bool = False, **static_kwargs: Any
) -> tuple[Callable[..., Any], dict[Any, Any]]:
    """A module as a pure function of its variables.

    Args:
      model: the module, in the mode (`train()`, `eval()`) that is meant; it is not changed.
      updates: whether the function returns (output, new values of all variables but Params) instead of the
        output. Find the groups on this function in training mode, with ``state_outputs={"1": ""}``, and let
        the loss return the second part as its updates.
      **static_kwargs: keyword arguments of the call that are not arrays.

    Returns:
      The function ``apply(variables, *args, reseed=None)``, which gives what ``model(*args)`` gives, and the
      variables: a nested dict of the arrays of Param, BatchStat and Cache, and of what else is
      floating-point. Other integers and flags, such as a permutation or a mask, are closed over: look-ups by
      a table that is known are followed index by index. So is the state of random number generators: a
      module that draws, such as Dropout in training mode, draws the same numbers at every call, unless it
      is given a random key as `reseed`, e.g. from the batch. Only Params have a gradient, so that
      `compress` leaves batch statistics as they are.

    Raises:
      TraceError: the model is no NNX module.

    Example:
      >>> import jax.numpy as jnp, compaware_jax as ca
      >>> from flax import nnx
      >>> from compaware_jax.adapters import nnx as adapter
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs))
      >>> apply, variables = adapter.functional(model)
      >>> groups = ca.find_groups(apply, variables, jnp.ones((1, 3)))
      >>> plan = ca.plan_units(groups, jnp.arange(8) < 5)
      >>> small = adapter.slimmed(model, plan)
      >>> small(jnp.ones((4, 3))).shape, small.model.layers[0].kernel.shape
      ((4, 2), (3, 5))
    """
    graphdef, variables, held = _split(model, "functional")
    params = set(nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model, nnx.Param))))

    def apply(variables: Any, *args: Any, reseed: Any = None, **kwargs: Any) -> Any:
        flat = nnx.traversals.flatten_mapping(variables).items()
        still = {path: x if path in params else jax.lax.stop_gradient(x) for path, x in flat}
        called = nnx.merge(graphdef, nnx.traversals.unflatten_mapping(still), held)
        if reseed is not None:
            _reseed(called, reseed)
        output = called(*args, **static_kwargs, **kwargs)
        if not updates:
            return output
        _, new, _ = _split(called, "functional")
        changed = {p: x for p, x in nnx.traversals.flatten_mapping(new).items() if p not in params}
        return output, nnx.traversals.unflatten_mapping(changed)

    return apply, variables


class Slimmed(nnx.Module):
    """A module that runs another one slimmed; made by `slimmed`.

    `model` holds the small arrays in the structure of the full module, which is what `nnx.state`,
    `nnx.Optimizer`, `train()` and `eval()` look at. Its layers keep the attributes of the full module, at
    whose shapes the code is traced; call the `Slimmed`, not `model`. Tables of integers and flags are
    constants where the plan needs their values, as it does those of a permutation. Such a one may not change
    then: outside of `nnx.jit` that is refused, inside it is not seen.
    """

    def __init__(self, model: nnx.Module, plan: Plan):
        self.model = model
        self.plan = plan
        held, _ = named_arrays(_split(model, "slimmed")[2])
        streams = {path for path, _ in named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.RngState)))}
        self.known = Known.of({path: x for path, x in held.items() if path not in streams})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the slimmed function gives; updates of the state (BatchNorm, RNG) are written back."""
        graphdef, variables, held = _split(self.model, "Slimmed")
        held, rest = named_arrays(held)
        arrays, static = split_arrays((rest, args, kwargs))
        build = _cached if hashable(graphdef, static) else _small_call
        try:
            output, changed = build(graphdef, static, self.plan, self.known)(variables, held, arrays)
        except PlanError as error:
            if not jax.tree.leaves(nnx.state(self.model, nnx.BatchStat)):
                raise
            raise PlanError(
                f"{error} Groups that were found in training mode do not cut batch statistics, which are not "
                "read there. Find them in evaluation mode (`eval()`), or on functional(model, updates=True) "
                'with state_outputs={"1": ""}.'
            ) from error
        # In evaluation nothing changes, and a module may then be called where it must not be changed.
        if changed:
            nnx.update(self.model, changed)
        return output


def slimmed(model: Any, plan: Plan, *, variables: Any = None) -> Slimmed:
    """A module that holds the small arrays and computes what `slim` computes.

    Args:
      model: the full module; it is not changed.
      plan: what is kept, for groups that were found on ``functional(model)``.
      variables: the small arrays, e.g. `Result.variables` of `compress`; default the model's own, cut.

    Returns:
      A module called like `model`, in its mode. Its variables are proper Params, BatchStats and so on, for
      any optimizer and checkpointer. It composes with `nnx.jit` and `nnx.grad`; in training mode it updates
      batch statistics and random number generators as the full module does.

    Raises:
      TraceError: the model is no NNX module.
      PlanError: the plan was made for another model, or the variables are not small ones of it.
    """
    return Slimmed(_with_small_arrays(model, plan, variables, "slimmed"), plan)


def smaller(model: Any, plan: Plan, *args: Any, variables: Any = None, **kwargs: Any) -> Any:
    """A module of the same class with smaller arrays, which runs its own code on them.

    It is the same function as the slimmed one only where nothing in its code depends on the size of a cut
    axis (the mean of a LayerNorm, the scale of attention, a reshape); give example inputs to have that
    checked. Attributes of known layers (`in_features`, `num_heads`, ...) are set to the new widths;
    attributes of your own modules are not.

    Args:
      model: the full module, in evaluation mode if it drops out; it is not changed.
      plan: what is kept.
      *args: example inputs for the check; without any, nothing is checked.
      variables: the small arrays, e.g. `Result.variables` of `compress`; default the model's own, cut.
      **kwargs: further arguments of the call.

    Returns:
      The smaller module.

    Raises:
      TraceError: the model is no NNX module.
      PlanError: the plan was made for another model, or (with example inputs) the smaller module computes
        something else than `slimmed`.
    """
    small = _with_small_arrays(model, plan, variables, "smaller")
    update_attributes(small, plan)
    if args or kwargs:
        arrays, static = split_arrays((args, kwargs))

        @nnx.jit
        def run(module: Any, arrays: list[Any]) -> Any:
            args, kwargs = static.join(arrays)
            return module(*args, **kwargs)

        expected = run(slimmed(model, plan, variables=variables), arrays)
        # A clone, because the check must not advance batch statistics.
        compare(lambda: run(nnx.clone(small), arrays), expected, None, "smaller", "slimmed")
    return small


def _split(model: Any, caller: str) -> tuple[Any, dict[Any, Any], dict[Any, Any]]:
    if not isinstance(model, nnx.Module):
        raise TraceError(
            f"nnx.{caller}: got {_described(model)}, expected an instance of flax.nnx.Module. For Linen, "
            "Haiku and Equinox see the adapters of these names."
        )
    graphdef, held, rest = nnx.split(model, _is_held, ...)
    return graphdef, nnx.to_pure_dict(rest), nnx.to_pure_dict(held)


def _reseed(model: Any, key: jax.Array) -> None:
    """Let every stream of random numbers of a module start anew from a key."""
    streams = jax.tree.leaves(nnx.state(model, nnx.RngKey), is_leaf=lambda x: isinstance(x, nnx.Variable))
    for number, stream in enumerate(streams):
        old, new = stream.get_value(), jax.random.fold_in(key, number)
        typed = jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
        stream.set_value(new if typed else jax.random.key_data(new))


def _is_held(path: Any, variable: Any) -> bool:
    """Whether a variable is none of the function: keys, tables, what `sow` gathers."""
    value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        return True
    return not (isinstance(variable, nnx.Param | nnx.BatchStat | nnx.Cache) or is_smooth(value))


def _described(model: Any) -> str:
    return f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"


def _with_small_arrays(model: Any, plan: Plan, small: Any, caller: str) -> Any:
    graphdef, variables, held = _split(model, caller)
    if small is None:
        small = shrink(variables, plan)
    check_small(small, plan, caller)
    return nnx.merge(graphdef, small, held)


def _small_call(graphdef: Any, static: Static, plan: Plan, known: Known) -> SmallCall:
    """The slimmed call of a module: the output, and the variables that the call changed."""

    def call(variables: Any, held: dict[str, Any], arrays: list[Any]) -> tuple[Any, dict[Any, Any]]:
        rest, args, kwargs = static.join(arrays)
        whole = with_arrays(rest, held)
        model = nnx.merge(graphdef, variables, whole)
        before = {path: id(leaf) for tree in (variables, whole) for path, leaf in named_leaves(tree)}
        output = model(*args, **kwargs)
        _, *after = _split(model, "Slimmed")
        changed = {}
        for tree in after:
            for path, leaf in nnx.traversals.flatten_mapping(tree).items():
                name = "/".join(map(str, path))
                # New variables, as of sow, have no place in the module's structure.
                if name in before and id(leaf) != before[name]:
                    changed[path] = leaf
        return output, nnx.traversals.unflatten_mapping(changed)

    return SmallCall(
        call, with_updates(plan, ""), known, lambda output: {path for path, _ in named_leaves(output[1])}
    )


_cached = lru_cache(maxsize=64)(_small_call)
