"""Flax NNX: a module as a pure function of its variables, and a small module back."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
from flax import nnx

from compaware_jax.adapters.calls import Static, hashable, split_arrays
from compaware_jax.adapters.layers import update_attributes
from compaware_jax.adapters.rebuilt import compare
from compaware_jax.errors import TraceError
from compaware_jax.plan import Plan
from compaware_jax.surgery import shrink, slim
from compaware_jax.trace import named_leaves


def functional(model: nnx.Module, **static_kwargs: Any) -> tuple[Callable[..., Any], dict[Any, Any]]:
    """A module as a pure function of its variables.

    Args:
      model: the module, in the mode (`train()`, `eval()`) that is meant; it is not changed.
      **static_kwargs: keyword arguments of the call that are not arrays.

    Returns:
      The function ``apply(variables, *args)``, which gives what ``model(*args)`` gives and forgets updates
      of the state, and the variables: a nested dict of the arrays of all variables (Param, BatchStat, ...)
      but the state of random number generators, which is closed over.

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
    graphdef, variables, rng = _split(model, "functional")

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graphdef, variables, rng)(*args, **static_kwargs, **kwargs)

    return apply, variables


class Slimmed(nnx.Module):
    """A module that runs another one slimmed; made by `slimmed`.

    `model` holds the small arrays in the structure of the full module, which is what `nnx.state`,
    `nnx.Optimizer`, `train()` and `eval()` look at. Its layers keep the attributes of the full module, at
    whose shapes the code is traced; call the `Slimmed`, not `model`.
    """

    def __init__(self, model: nnx.Module, plan: Plan):
        self.model = model
        self.plan = plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the slimmed function gives; updates of the state (BatchNorm, RNG) are written back."""
        graphdef, variables, rng = _split(self.model, "Slimmed")
        arrays, static = split_arrays((rng, args, kwargs))
        build = _cached if hashable(graphdef, static) else _small_call
        output, changed = build(graphdef, static, self.plan)(variables, *arrays)
        # In evaluation nothing changes, and a module may then be called where it must not be changed.
        if changed:
            nnx.update(self.model, changed)
        return output


def slimmed(model: nnx.Module, plan: Plan) -> Slimmed:
    """A module that holds the small arrays and computes what `slim` computes.

    Args:
      model: the full module; it is not changed.
      plan: what is kept, for groups that were found on ``functional(model)``.

    Returns:
      A module called like `model`, in its mode. Its variables are proper Params, BatchStats and so on, for
      any optimizer and checkpointer. It composes with `nnx.jit` and `nnx.grad`; in training mode it updates
      batch statistics and random number generators as the full module does.

    Raises:
      TraceError: the model is no NNX module.
      PlanError: the plan was made for another model.
    """
    return Slimmed(_with_small_arrays(model, plan, "slimmed"), plan)


def smaller(model: nnx.Module, plan: Plan, *args: Any, **kwargs: Any) -> nnx.Module:
    """A module of the same class with smaller arrays, which runs its own code on them.

    It is the same function as the slimmed one only where nothing in its code depends on the size of a cut
    axis (the mean of a LayerNorm, the scale of attention, a reshape); give example inputs to have that
    checked. Attributes of known layers (`in_features`, `num_heads`, ...) are set to the new widths;
    attributes of your own modules are not.

    Args:
      model: the full module, in evaluation mode if it drops out; it is not changed.
      plan: what is kept.
      *args: example inputs for the check; without any, nothing is checked.
      **kwargs: further arguments of the call.

    Returns:
      The smaller module.

    Raises:
      TraceError: the model is no NNX module.
      PlanError: the plan was made for another model, or (with example inputs) the smaller module computes
        something else than `slimmed`.
    """
    small = _with_small_arrays(model, plan, "smaller")
    update_attributes(small, plan)
    if args or kwargs:
        expected = slimmed(model, plan)(*args, **kwargs)
        # A clone, because the check must not advance batch statistics.
        compare(lambda: nnx.clone(small)(*args, **kwargs), expected, None, "smaller", "slimmed")  # pyright: ignore[reportCallIssue]
    return small


def _split(model: nnx.Module, caller: str) -> tuple[Any, dict[Any, Any], dict[Any, Any]]:
    if not isinstance(model, nnx.Module):
        raise TraceError(
            f"nnx.{caller}: got {_described(model)}, expected an instance of flax.nnx.Module. For Linen, "
            "Haiku and Equinox see the adapters of these names."
        )
    graphdef, rng, rest = nnx.split(model, nnx.RngState, ...)
    return graphdef, nnx.to_pure_dict(rest), nnx.to_pure_dict(rng)


def _described(model: Any) -> str:
    return f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"


def _with_small_arrays(model: nnx.Module, plan: Plan, caller: str) -> nnx.Module:
    graphdef, variables, rng = _split(model, caller)
    # Copies, so that training the small module cannot touch generators of the full one.
    return nnx.merge(graphdef, shrink(variables, plan), jax.tree.map(lambda x: x, rng))


def _small_call(graphdef: Any, static: Static, plan: Plan) -> Callable[..., Any]:
    """The slimmed call of a module: the output, and the variables that the call changed."""

    def call(variables: Any, *arrays: Any) -> tuple[Any, dict[Any, Any]]:
        rng, args, kwargs = static.join(list(arrays))
        model = nnx.merge(graphdef, variables, rng)
        before = {id(leaf) for leaf in jax.tree.leaves((variables, rng))}
        output = model(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        _, after, rng_after = _split(model, "Slimmed")
        known = {path for tree in (variables, rng) for path, _ in named_leaves(tree)}
        changed = {}
        for tree in (after, rng_after):
            for path, leaf in nnx.traversals.flatten_mapping(tree).items():
                # New variables, as of sow, have no place in the module's structure.
                if id(leaf) not in before and "/".join(map(str, path)) in known:
                    changed[path] = leaf
        return output, nnx.traversals.unflatten_mapping(changed)

    released = [f"1/{leaf.path}" for leaf in plan.leaves]
    released += [f"0/{path}" if path else "0" for path in plan.released]
    return slim(call, plan, released=released)


_cached = lru_cache(maxsize=64)(_small_call)
