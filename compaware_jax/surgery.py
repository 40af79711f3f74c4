"""Surgery: any tree shaped like the variables becomes the small one, the function the small function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compaware_jax.analysis import Analysis
from compaware_jax.errors import PlanError
from compaware_jax.groups import COLLECTIONS, Groups
from compaware_jax.plan import Plan
from compaware_jax.propagate import analyse
from compaware_jax.rules.families import scatter, take
from compaware_jax.slimming import FullWidth, run_small
from compaware_jax.trace import named_leaves, on_host, path_name, trace
from compaware_jax.work import flops_of


def shrink(tree: Any, plan: Plan) -> Any:
    """Cut a tree down to a plan.

    Args:
      tree: the variables, or any pytree that holds trees like them (an optimizer state with its moments,
        EMA copies, a checkpoint of all of these) or like one of their Flax collections (moments
        over ``variables["params"]``), also with parts left out by `optax.masked`; other leaves are passed
        through.
      plan: what is kept.

    Returns:
      The tree with every array that belongs to a leaf of the plan cut along the kept indices.

    Raises:
      PlanError: nothing in the tree fits the plan, or a sub-tree fits it in two ways that differ, or has
        its names but other shapes.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import compaware_jax as ca
      >>> def net(v, x):
      ...     return jnp.tanh(x @ v["w1"]) @ v["w2"]
      >>> v = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
      >>> groups = ca.find_groups(net, v, jnp.ones((1, 3)))
      >>> plan = ca.plan_units(groups, jnp.arange(8) < 5)
      >>> ca.shrink(v, plan)["w2"].shape
      (5, 2)
      >>> ca.shrink(optax.adam(1e-3).init(v), plan)[0].mu["w1"].shape
      (3, 5)
    """
    return _map_plan(tree, plan, _cut, full=True, caller="shrink")


def expand(tree: Any, plan: Plan) -> Any:
    """The inverse of `shrink` up to what was cut, which comes back as zeros.

    Args:
      tree: a tree that `shrink` returned for the plan.
      plan: what was kept.

    Returns:
      The tree at the full shapes: ``expand(shrink(variables, plan), plan)`` is the masked variables.

    Raises:
      PlanError: nothing in the tree fits the plan.
    """
    return _map_plan(tree, plan, _put_back, full=False, caller="expand")


def _cut(arrays: Sequence[Any], plan: Plan, positions: Sequence[int]) -> list[Any]:
    small = [_taken(array, plan.kept[i]) for array, i in zip(arrays, positions, strict=True)]
    return _sent_back(small, arrays)


def cut_axes(array: Any, kept: Sequence[Sequence[int] | None]) -> Any:
    """An array with the kept indices of each axis (None: all), on the host where it is there."""
    return _sent_back([_taken(array, kept)], [array])[0]


def _taken(array: Any, kept: Sequence[Sequence[int] | None]) -> Any:
    if all(index is None for index in kept):
        return array
    # On the host, numpy spares a compilation per shape.
    small = np.asarray(array) if on_host(array) else array
    for axis, index in enumerate(kept):
        if index is not None:
            small = small.take(np.asarray(index, int), axis=axis)
    return small


def _sent_back(small: list[Any], arrays: Sequence[Any]) -> list[Any]:
    """What was cut on the host becomes JAX arrays where it came from such, all in one transfer."""
    sent = [
        n
        for n, (x, array) in enumerate(zip(small, arrays, strict=True))
        if isinstance(x, np.ndarray) and not isinstance(array, np.ndarray)
    ]
    places = [arrays[n].sharding if arrays[n].committed else None for n in sent]
    result = list(small)
    for n, x in zip(sent, jax.device_put([small[n] for n in sent], places), strict=True):
        result[n] = x
    return result


def _put_back(arrays: Sequence[Any], plan: Plan, positions: Sequence[int]) -> list[Any]:
    def kept(leaf: int) -> tuple[np.ndarray | None, ...]:
        return tuple(None if index is None else np.asarray(index, int) for index in plan.kept[leaf])

    full = []
    for array, leaf in zip(arrays, positions, strict=True):
        # On the host, numpy spares a compilation per shape.
        small = np.asarray(array) if on_host(array) else array
        full.append(scatter(small, kept(leaf), plan.leaves[leaf].shape))
    return _sent_back(full, arrays)


def _map_plan(tree: Any, plan: Plan, change: Callable, *, full: bool, caller: str) -> Any:
    templates = _templates(plan, full)
    found = False

    def match(node: Any) -> list[int] | None:
        return _match(node, plan, templates, caller)

    def visit(node: Any) -> Any:
        nonlocal found
        positions = match(node)
        if positions is None:
            return node
        found = True
        leaves, structure = jax.tree.flatten(node)
        return jax.tree.unflatten(structure, change(leaves, plan, positions))

    result = jax.tree.map(visit, tree, is_leaf=lambda node: match(node) is not None)
    if not found:
        raise PlanError(
            f"{caller}: no sub-tree has the leaves of the plan (fingerprint {plan.fingerprint}, "
            f"{len(plan.leaves)} leaves, first `{plan.leaves[0].path}` "
            f"{plan.leaves[0].shape if full else plan.small_shape(0)}); the tree has "
            f"{[(path, np.shape(leaf)) for path, leaf in named_leaves(tree)][:3]} … "
            "Pass variables of the model that the plan was made for."
        )
    return result


_Shape = tuple[int, ...]
_Templates = dict[tuple[str, ...], list[tuple[list[int], list[_Shape]]]]
"""Paths of the leaves of a sub-tree, to the positions in the plan and the shapes that they may have."""


def _templates(plan: Plan, full: bool) -> _Templates:
    """The variables and their Flax collections."""
    # Deeper sub-trees are not offered: a layer of another model may look the same by chance.
    first_keys = {leaf.path.split("/")[0] for leaf in plan.leaves}
    prefixes = ["", *(f"{key}/" for key in sorted(first_keys & COLLECTIONS))]
    result: _Templates = {}
    for prefix in prefixes:
        inside = [i for i, leaf in enumerate(plan.leaves) if leaf.path.startswith(prefix)]
        paths = tuple(plan.leaves[i].path[len(prefix) :] for i in inside)
        shapes = [plan.leaves[i].shape if full else plan.small_shape(i) for i in inside]
        result.setdefault(paths, []).append((inside, shapes))
    return result


def _is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _match(node: Any, plan: Plan, templates: _Templates, caller: str) -> list[int] | None:
    """Positions in the plan of the leaves of a sub-tree that fits it; None for any other.

    Leaves that `optax.masked` leaves out are passed over.
    """
    named = [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(node, is_leaf=_is_hole)]
    paths = tuple(path for path, _ in named)
    if paths not in templates:
        return None
    present = [number for number, (_, x) in enumerate(named) if not _is_hole(x)]
    fits, others = [], []
    for positions, shapes in templates[paths]:
        wrong = [n for n in present if np.shape(named[n][1]) != shapes[n]]
        if wrong:
            others += [(n, positions[n], shapes[n]) for n in wrong]
        else:
            fits.append([positions[n] for n in present])
    if not fits:
        for number, position, shape in others:
            got = np.shape(named[number][1])
            if paths != ("",) and np.prod(got) > 1 and any(index for index in plan.kept[position]):
                raise PlanError(
                    f"{caller}: `{paths[number]}` has shape {got} under the names of the plan (fingerprint "
                    f"{plan.fingerprint}), expected {shape}. Pass variables of the model that the plan was "
                    "made for; the state of an optimizer that does not mirror them goes through "
                    "shrink_optimizer."
                )
        return None
    if len({tuple(plan.kept[i] for i in positions) for positions in fits}) > 1:
        raise PlanError(
            f"{caller}: the sub-tree with leaves {list(paths[:4])} fits {len(fits)} sub-trees of the plan, "
            "which keep different indices. Pass the tree around it instead, so that its place is known."
        )
    return fits[0]


def positions_in(tree: Any, plan: Plan, caller: str) -> list[int]:
    """Positions in the plan of the leaves of full variables, or of one of their Flax collections.

    Args:
      tree: the variables or the collection.
      plan: what is kept.
      caller: the function that asks, for messages.

    Raises:
      PlanError: the tree is not one of these.
    """
    positions = _match(tree, plan, _templates(plan, full=True), caller)
    if positions is None:
        raise PlanError(
            f"{caller}: the tree with leaves {[path for path, _ in named_leaves(tree)][:4]} is not "
            f"the variables of the plan (fingerprint {plan.fingerprint}) nor a collection of them. Pass "
            "the full variables."
        )
    return positions


def slim(apply: Callable[..., Any], plan: Plan, *, released: Sequence[str] = ()) -> Callable[..., Any]:
    """The small function.

    ``slim(apply, plan)(shrink(variables, plan), *args)`` equals
    ``apply(expand(shrink(variables, plan), plan), *args)`` up to the order of summation.

    The function is traced again for every new input shape, so it takes any batch size, and it composes
    with `jit`, `grad`, `vmap` and `jax.export`. Nothing in the model's code changes. To export a function
    of any batch size, map that of one example: ``jax.vmap(lambda x: small(variables, x[None])[0])`` takes
    a symbolic batch.

    Args:
      apply: the function that the groups were found for, or another function of the same variables.
      plan: what is kept.
      released: tree paths of outputs that come out cut, beside those released to `find_groups`.

    Returns:
      A function of the small variables and the same further arguments as `apply`.

    Raises:
      PlanError: (when called) the variables are not those of the plan; or the plan cuts what this
        function needs whole, or separates what it ties.
    """
    analyses: dict[Any, tuple[Analysis, np.ndarray]] = {}

    def small_apply(small_variables: Any, *args: Any, **kwargs: Any) -> Any:
        small_leaves, structure = jax.tree.flatten(small_variables)
        _check_small(small_variables, plan)
        full = jax.tree.unflatten(
            structure,
            [
                # The dtype is the small leaf's own: variables may have been cast since the plan was made.
                jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.result_type(small))
                for leaf, small in zip(plan.leaves, small_leaves, strict=True)
            ],
        )
        rest, rest_structure = jax.tree.flatten((args, kwargs))
        key = (
            structure,
            rest_structure,
            tuple(jax.typeof(x) for x in (*small_leaves, *rest)),
        )
        if key not in analyses:
            analyses[key] = _analysed(apply, full, plan, released, *args, **kwargs)
        analysis, alive = analyses[key]
        outputs, _ = _run(analysis, alive, plan, [jnp.asarray(x) for x in (*small_leaves, *rest)])
        return jax.tree.unflatten(analysis.program.output_tree, outputs)

    return small_apply


def _analysed(
    apply: Callable[..., Any], full: Any, plan: Plan, released: Sequence[str], *args: Any, **kwargs: Any
) -> tuple[Analysis, np.ndarray]:
    """The analysis of a function at these input shapes, and which of its classes the plan keeps."""
    program = trace(apply, full, *args, **kwargs)
    chosen = program.positions((*released, *plan.released))
    analysis = analyse(
        program, released=chosen, states=program.states(plan.states), cuts=plan.cuts, settled=True
    )
    return analysis, _alive(analysis, plan)


def _run(
    analysis: Analysis, alive: np.ndarray, plan: Plan, inputs: list[Any]
) -> tuple[list[jax.Array], FullWidth]:
    outputs, record = run_small(analysis, alive, inputs)
    program = analysis.program
    for position, leaf in program.states(plan.states):
        have = analysis.kept(program.block.outputs[position], alive)
        want = analysis.kept(program.leaf_values[leaf], alive)
        missing = [w if h is None else None for h, w in zip(have, want, strict=True)]
        outputs[position] = take(outputs[position], missing)
    return outputs, record


@dataclass(frozen=True)
class Uncut:
    """An equation that runs at full width in the small function.

    Attributes:
      where: primitive, module path and source line.
      flops: its FLOPs at full width, one per element where it is no contraction.
      again: whether it only runs to rebuild an operand of another one.
    """

    where: str
    flops: int
    again: bool


def uncut(groups: Groups, plan: Plan) -> tuple[Uncut, ...]:
    """What `slim` runs at full width, because running it small would not be exact.

    Args:
      groups: what could leave, at the input shapes for which they were found.
      plan: what is kept of it.

    Returns:
      The equations, in program order, first those that had to, then those run again for them.

    Raises:
      PlanError: the plan is of another model.
    """
    if plan.fingerprint != groups.fingerprint:
        raise PlanError(
            f"uncut: the plan is for the model {plan.fingerprint}, the groups are of {groups.fingerprint}. "
            "Pass the groups that the plan was made from."
        )
    program = groups.analysis.program
    alive = _alive(groups.analysis, plan)
    leaves = [
        jax.ShapeDtypeStruct(plan.small_shape(i), program.avals[value].dtype)
        for i, value in enumerate(program.leaf_values)
    ]
    record = FullWidth()

    def run(*inputs: jax.Array) -> list[jax.Array]:
        nonlocal record
        outputs, record = _run(groups.analysis, alive, plan, list(inputs))
        return outputs

    jax.eval_shape(run, *leaves, *(program.avals[value] for value in program.argument_values))
    again = [eqn for eqn in record.again if eqn not in record.uncut]
    return tuple(
        [Uncut(eqn.where, flops_of(eqn), False) for eqn in record.uncut]
        + [Uncut(eqn.where, flops_of(eqn), True) for eqn in again]
    )


def work_in(groups: Groups) -> int:
    """FLOPs of one call of the full function, counted as `Uncut` counts them."""
    return sum(flops_of(eqn) for eqn in groups.analysis.program.block.equations)


def _check_small(small_variables: Any, plan: Plan) -> None:
    got = [(path, np.shape(leaf)) for path, leaf in named_leaves(small_variables)]
    expected = [(leaf.path, plan.small_shape(i)) for i, leaf in enumerate(plan.leaves)]
    if got != expected:
        wrong = next(
            (pair for pair in zip(got, expected, strict=False) if pair[0] != pair[1]),
            (f"{len(got)} leaves", f"{len(expected)} leaves"),
        )
        raise PlanError(
            f"slim: the variables do not fit the plan (fingerprint {plan.fingerprint}): got {wrong[0]}, "
            f"expected {wrong[1]}. Pass shrink(variables, plan) of the model that the plan was made for."
        )


def _alive(analysis: Analysis, plan: Plan) -> np.ndarray:
    """Which classes of a function's analysis the plan keeps."""
    dead = np.zeros(analysis.solution.count, bool)
    needed = np.zeros(analysis.solution.count, bool)
    for position, value in enumerate(analysis.program.leaf_values):
        for axis, index in enumerate(plan.kept[position]):
            if plan.leaves[position].shape[axis] <= 1:
                continue
            factor = next(f for f in analysis.factors[value] if axis in f.axes)
            labels = analysis.solution.labels[factor.ids]
            kept = np.ones(len(labels), bool)
            if index is not None:
                kept = np.isin(np.arange(len(labels)), index)
            dead[labels[~kept]] = True
            needed[labels[kept]] = True
            blocked = labels[~kept & ~analysis.free[labels]]
            if len(blocked):
                raise PlanError(
                    f"slim: the plan cuts axis {axis} of `{plan.leaves[position].path}`, which this "
                    f"function needs whole ({analysis.solution.fixed[blocked[0]]}). Pass the function "
                    "that the groups were found for, or name the output in `released`."
                )
    if (dead & needed).any():
        raise PlanError(
            "slim: the plan separates channels that this function ties together. Pass the function that "
            "the groups were found for."
        )
    return ~dead
