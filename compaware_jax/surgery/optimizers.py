"""Optimizer states through surgery, whatever their layout.

Moments that mirror the variables need no more than `surgery.shrink`. Others do not mirror them (the row
and column means of Adafactor, the memory of L-BFGS): which of their axes runs along which axis of the
variables is read off the coupling of the optimizer's own update.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import optax

from compaware_jax.coupling.propagate import analyse
from compaware_jax.coupling.trace import trace
from compaware_jax.errors import PlanError, TraceError, gist
from compaware_jax.paths import named_leaves
from compaware_jax.surgery.matching import positions_in
from compaware_jax.surgery.plan import Plan
from compaware_jax.surgery.trees import cut_axes, shrink

_Ties = tuple[frozenset[tuple[int, int]], ...]
"""Per axis of a state's leaf the (leaf, axis) pairs of the parameters that it runs along."""


def shrink_optimizer(optimizer: Any, state: Any, params: Any, plan: Plan, **extra: Any) -> Any:
    """Cut the state of any optax chain down to a plan.

    Args:
      optimizer: made the state: an `optax.GradientTransformation`, or what has its two methods.
      state: what ``optimizer.init`` returned, or a later update.
      params: the full arrays that it is the state for: the variables of the plan, or a Flax collection.
      plan: what is kept.
      **extra: further arguments that the optimizer's update takes by name, e.g. ``value=``.

    Returns:
      The state for ``shrink(params, plan)``, of the shapes that ``optimizer.init`` gives it. What the
      optimizer lays out in another way at the small sizes (Adafactor does not factor small matrices) is
      set back to its initial value; a warning names it.

    Raises:
      PlanError: the params do not belong to the plan, or the state not to the optimizer; or its update asks
        the model itself, as a line search does.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import compaware_jax as ca
      >>> v = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
      >>> groups = ca.find_groups(lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"], v, jnp.ones((1, 3)))
      >>> plan = ca.plan_units(groups, jnp.arange(8) < 5)
      >>> adafactor = optax.adafactor(1e-3, min_dim_size_to_factor=2)
      >>> small = ca.shrink_optimizer(adafactor, adafactor.init(v), v, plan)
      >>> small[0].v_row["a"].shape, small[0].v_col["a"].shape
      ((3,), (5,))
    """
    positions = positions_in(params, plan, "shrink_optimizer")
    small_params = shrink(params, plan)
    initial = optimizer.init(small_params)
    full_shapes = jax.eval_shape(optimizer.init, params)
    if [(n, np.shape(x)) for n, x in named_leaves(state)] != [
        (n, x.shape) for n, x in named_leaves(full_shapes)
    ] or jax.tree.structure(state) != jax.tree.structure(initial):
        raise PlanError(
            "shrink_optimizer: the state is not one that this optimizer makes for these params. Pass the "
            "state and the full params as they were in training, and the optimizer that made it."
        )
    try:
        before = _ties(optimizer, state, params, extra)
        after = _ties(optimizer, initial, small_params, extra)
    except TraceError as error:
        raise PlanError(
            f"shrink_optimizer: the optimizer's update cannot be traced ({gist(error)}). Pass by name what "
            "it takes beside gradients, state and params. Where that has the shapes of the params or calls "
            "the model, as for optax.lbfgs with its line search, start anew: "
            "optimizer.init(shrink(params, plan))."
        ) from error
    result, reset, names = [], [], [name for name, _ in named_leaves(params)]
    for (path, leaf), old, new, (_, fresh) in zip(
        named_leaves(state), before, after, named_leaves(initial), strict=True
    ):
        mine = [i for i, name in enumerate(names) if f"/{path}".endswith(f"/{name}")]
        own = max(mine, key=lambda i: len(names[i]), default=-1)
        kept = tuple(_kept(plan, positions, ties, (own, axis)) for axis, ties in enumerate(old))
        agrees = all(n == 1 or not a or a & b for n, a, b in zip(np.shape(fresh), old, new, strict=False))
        small = cut_axes(leaf, kept) if agrees else None
        if small is None or np.shape(small) != np.shape(fresh):
            reset.append(path)
            small = fresh
        result.append(small)
    if reset:
        warnings.warn(
            f"shrink_optimizer: {len(reset)} arrays of the state have another layout at the small sizes "
            f"and start anew: {', '.join(reset[:6])}{' …' if len(reset) > 6 else ''}.",
            stacklevel=2,
        )
    return jax.tree.unflatten(jax.tree.structure(initial), result)


def _kept(
    plan: Plan, positions: list[int], ties: frozenset[tuple[int, int]], own: tuple[int, int]
) -> tuple[int, ...] | None:
    # A sum over everything ties all axes of a size; among those it is the parameter of the same name.
    found = {plan.kept[positions[leaf]][axis] for leaf, axis in ({own} if own in ties else ties)}
    return found.pop() if len(found) == 1 else None


def _ties(optimizer: Any, state: Any, params: Any, extra: Any) -> list[_Ties]:
    """Which axes leave together in one update, by the coupling analysis of it."""

    def abstract(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x)), tree)

    def update(v: Any) -> Any:
        changes, later = optax.with_extra_args_support(optimizer).update(
            v["gradients"], v["state"], v["params"], **extra
        )
        return optax.apply_updates(v["params"], changes), later

    variables = {"params": abstract(params), "gradients": abstract(params), "state": abstract(state)}
    program = trace(update, variables)
    states = program.states([("0", "params"), ("1", "state")])
    analysis = analyse(program, released=range(len(program.output_paths)), states=states)
    labels = {
        kind: [
            analysis.labels(value)
            for name, value in zip(program.leaves, program.leaf_values, strict=True)
            if name.split("/")[0] == kind
        ]
        for kind in ("params", "state")
    }
    places: dict[bytes, set[tuple[int, int]]] = {}
    for leaf, axes in enumerate(labels["params"]):
        for axis, here in enumerate(axes):
            if here is not None:
                places.setdefault(here.tobytes(), set()).add((leaf, axis))
    return [
        tuple(frozenset() if here is None else frozenset(places.get(here.tobytes(), ())) for here in axes)
        for axes in labels["state"]
    ]
