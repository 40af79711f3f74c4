"""Flax Linen: a module as a pure function of its variables, and the widths to rebuild it with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import unfreeze

from compaware_jax.adapters.rebuilt import check_rebuilt
from compaware_jax.adapters.widths import leaf_number, surviving_blocks
from compaware_jax.errors import PlanError, TraceError
from compaware_jax.paths import named_leaves
from compaware_jax.surgery.plan import Plan

__all__ = ["check_rebuilt", "feature_counts", "functional"]

Widths = dict[str, Any]


def functional(
    module: Any,
    variables: Any,
    *,
    method: Any = None,
    rngs: Any = None,
    mutable: Any = False,
    **static_kwargs: Any,
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A module as a pure function of its variables.

    Args:
      module: the module.
      variables: what `module.init` returned: collections such as params and batch_stats.
      method: the method to call, as in `module.apply`.
      rngs: random keys by name, or one for all, as in `module.apply`; closed over, see below.
      mutable: collections that the function updates, as in `module.apply`; with any, it returns
        (output, updates). Pass ``state_outputs={"1": ""}`` to `find_groups`, or the updates keep what they
        are computed from at full width.
      **static_kwargs: keyword arguments of the call that are not arrays, e.g. ``train=False``.

    Returns:
      The function ``apply(variables, *args, reseed=None)`` and the variables as plain dicts. A module that
      draws, such as Dropout, draws the same numbers at every call, unless it is given a random key as
      `reseed`, e.g. from the batch, which takes the place of those in `rngs`. Only "params" has a gradient,
      so that `compress` leaves batch statistics as they are.

    Raises:
      TraceError: the module is no instance of a Linen module, or the variables have no collection "params".

    Example:
      >>> import jax, jax.numpy as jnp, compaware_jax as ca
      >>> from flax import linen as nn
      >>> from compaware_jax.adapters import linen as adapter
      >>> def build(width):
      ...     return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(2)])
      >>> x = jnp.ones((1, 3))
      >>> apply, variables = adapter.functional(build(8), build(8).init(jax.random.key(0), x))
      >>> groups = ca.find_groups(apply, variables, x)
      >>> plan = ca.plan_units(groups, jnp.arange(8) < 5)
      >>> counts = adapter.feature_counts(build(8), variables, plan, x)
      >>> counts
      {'layers_0': {'features': 5}, 'layers_2': {'features': 2}}
      >>> small = build(counts["layers_0"]["features"])
      >>> adapter.check_rebuilt(small.apply, apply, plan, variables, x) < 1e-3
      True
    """
    variables = _checked(module, variables, "functional")

    def apply(variables: Any, *args: Any, reseed: Any = None, **kwargs: Any) -> Any:
        still = {name: x if name == "params" else jax.lax.stop_gradient(x) for name, x in variables.items()}
        keys = rngs
        if reseed is not None:
            named = isinstance(rngs, Mapping)
            keys = {name: jax.random.fold_in(reseed, n) for n, name in enumerate(rngs)} if named else reseed
        return module.apply(
            still, *args, method=method, rngs=keys, mutable=mutable, **static_kwargs, **kwargs
        )

    return apply, variables


def feature_counts(
    module: Any, variables: Any, plan: Plan, *args: Any, method: Any = None, **kwargs: Any
) -> dict[str, Widths]:
    """The constructor arguments that rebuild a module at the widths of a plan.

    The module is called abstractly, so that the class and path of every layer are known; widths are read
    off the shapes of its small arrays.

    Args:
      module: the full module.
      variables: the full variables.
      plan: what is kept, for groups that were found on ``functional(module, variables)``.
      *args: example inputs, arrays or `jax.ShapeDtypeStruct`.
      method: the method to call, as in `module.apply`.
      **kwargs: further arguments of `module.apply`, e.g. ``train=False`` or ``rngs``.

    Returns:
      Per module path, such as ``encoder/Dense_0``, the arguments with their new values: `features` of
      Dense, DenseGeneral, Conv, ConvTranspose, Embed and recurrent cells; `feature_group_count` of grouped
      convolutions; `num_heads`, `qkv_features` and `out_features` of attention; `num_groups` or
      `group_size` of GroupNorm. `check_rebuilt` tells whether the module so built is the same function.

    Raises:
      TraceError: see `functional`.
      PlanError: the plan belongs to another model, or no arguments express it: groups of a convolution
        that keep different numbers of channels, heads whose queries and values do, cuts at the boundary.
    """
    variables = _checked(module, variables, "feature_counts")
    if plan.cuts.boundary:
        raise PlanError(
            "feature_counts: the plan lets kernels read less of an input or write less of an output, which "
            "no widths express. Find the groups without boundary=True, or use `slim`, which runs any plan."
        )
    layers: dict[str, nn.Module] = {}
    seen: dict[str, dict[str, tuple[int, ...]]] = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer, path = context.module, "/".join(context.module.path)
        layers.setdefault(path, layer)
        held = nn.unbox(layer.variables.get("params", {}))
        seen.setdefault(path, {name: jnp.shape(x) for name, x in named_leaves(held)})
        return call(*args, **kwargs)

    def run(variables: Any, *args: Any) -> Any:
        with nn.intercept_methods(note):
            return module.apply(variables, *args, method=method, **kwargs)

    jax.eval_shape(run, variables, *args)
    counts: dict[str, Widths] = {}
    whole: list[str] = []
    for path, layer in layers.items():  # Parents come before their children.
        if any(path.startswith(f"{parent}/") for parent in whole):
            continue
        for kind, widths in _WIDTHS:
            if isinstance(layer, kind):
                if found := widths(layer, _Shapes(plan, path, seen[path])):
                    counts[path] = found
                if kind in (nn.MultiHeadDotProductAttention, nn.RNNCellBase):
                    whole.append(path)
                break
    return counts


def _checked(module: Any, variables: Any, caller: str) -> dict[str, Any]:
    if not isinstance(module, nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise TraceError(
            f"linen.{caller}: got {got}, expected an instance of flax.linen.Module. For NNX, Haiku and "
            "Equinox see the adapters of these names."
        )
    names = list(variables) if hasattr(variables, "keys") else type(variables).__name__
    if "params" not in names:
        raise TraceError(
            f"linen.{caller}: the variables have {names}, expected collections with 'params' among them. "
            'Pass what module.init returned, or {"params": params}.'
        )
    return unfreeze(variables)


class _Shapes:
    """Shapes of a layer's small arrays, as the layer sees them."""

    def __init__(self, plan: Plan, layer: str, seen: dict[str, tuple[int, ...]]):
        self.plan = plan
        self.layer = layer
        self.seen = seen

    def path(self, name: str) -> str:
        path = "/".join(part for part in ("params", self.layer, name) if part)
        # The array in a box, such as that of nn.with_partitioning.
        boxed = f"{path}/value"
        return boxed if any(leaf.path == boxed for leaf in self.plan.leaves) else path

    def __call__(self, name: str) -> tuple[int, ...]:
        number = leaf_number(self.plan, self.path(name))
        full, small = self.plan.leaves[number].shape, self.plan.small_shape(number)
        lifted = len(full) - len(self.seen[name])
        if not lifted:
            return small
        # The layer runs under nn.vmap or nn.scan, whose axis lies anywhere.
        axes = itertools.combinations(range(len(full)), lifted)
        left = {_without(small, gone) for gone in axes if _without(full, gone) == self.seen[name]}
        if len(left) != 1:
            raise PlanError(
                f"feature_counts: `{self.path(name)}` has shape {full}, `{self.layer}` sees "
                f"{self.seen[name]}, and what is left of it is one of {sorted(left)}. Use `slim`, which runs "
                "any plan."
            )
        return left.pop()

    def blocks(self, name: str, number: int) -> tuple[int, int]:
        full = self.plan.leaves[leaf_number(self.plan, self.path(name))].shape
        if full[-1] != self.seen[name][-1]:
            raise PlanError(
                f"feature_counts: the last axis of `{self.path(name)}` is that of nn.vmap or nn.scan, "
                f"{full}, which hides the layer's groups. Use `slim`, which runs any plan, or map over the "
                "first axis."
            )
        return surviving_blocks(self.plan, self.path(name), number)

    def names(self) -> Iterable[str]:
        """Leaves of the layer, by their paths inside it."""
        return self.seen


def _without(shape: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _dense(layer: Any, shapes: _Shapes) -> Widths:
    return {"features": shapes("kernel")[-1]}


def _dense_general(layer: Any, shapes: _Shapes) -> Widths:
    if isinstance(layer.features, int):
        return _dense(layer, shapes)
    return {"features": shapes("kernel")[-len(layer.features) :]}


def _conv(layer: Any, shapes: _Shapes) -> Widths:
    if layer.feature_group_count == 1:
        return _dense(layer, shapes)
    groups, size = shapes.blocks("kernel", layer.feature_group_count)
    return {"features": groups * size, "feature_group_count": groups}


def _conv_transpose(layer: Any, shapes: _Shapes) -> Widths:
    return {"features": shapes("kernel")[-2 if layer.transpose_kernel else -1]}


def _embed(layer: Any, shapes: _Shapes) -> Widths:
    rows, features = shapes("embedding")
    return {"features": features} | ({"num_embeddings": rows} if rows != layer.num_embeddings else {})


def _attention(layer: Any, shapes: _Shapes) -> Widths:
    query, value = shapes("query/kernel"), shapes("value/kernel")
    if query[-2:] != value[-2:]:
        raise PlanError(
            f"feature_counts: `{shapes.layer}` keeps {query[-2]} heads of {query[-1]} channels for queries "
            f"and {value[-2]} of {value[-1]} for values, which no arguments of "
            "MultiHeadDotProductAttention express. Use `slim`, which runs any plan."
        )
    heads, size = query[-2:]
    return {"num_heads": heads, "qkv_features": heads * size, "out_features": shapes("out/kernel")[-1]}


def _group_norm(layer: Any, shapes: _Shapes) -> Widths:
    name = next((name for name in ("scale", "bias") if name in shapes.names()), None)
    if name is None:
        return {}
    full = shapes.plan.leaves[leaf_number(shapes.plan, shapes.path(name))].shape[-1]
    groups, size = shapes.blocks(name, layer.num_groups or full // layer.group_size)
    return {"num_groups": groups} if layer.group_size is None else {"group_size": size}


def _cell(layer: Any, shapes: _Shapes) -> Widths:
    # The kernels of the hidden state begin with h in all cells of Linen; their input is the state.
    hidden = [name for name in shapes.names() if name.startswith("h") and name.endswith("/kernel")]
    return {"features": shapes(hidden[0])[-2]} if hidden else {}


_WIDTHS: tuple[tuple[type[nn.Module], Callable[[Any, _Shapes], Widths]], ...] = (
    (nn.Dense, _dense),
    (nn.DenseGeneral, _dense_general),
    (nn.Conv, _conv),
    (nn.ConvLocal, _conv),
    (nn.ConvTranspose, _conv_transpose),
    (nn.Embed, _embed),
    (nn.MultiHeadDotProductAttention, _attention),
    (nn.GroupNorm, _group_norm),
    (nn.RNNCellBase, _cell),
)
