"""Where in a tree the leaves of a plan are: the variables, their collections, and what mirrors them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from compaware_jax.coupling.groups import COLLECTIONS
from compaware_jax.errors import PlanError
from compaware_jax.paths import named_leaves, path_name
from compaware_jax.surgery.plan import Plan


def change_matching(tree: Any, plan: Any, change: Callable, *, full: bool, caller: str) -> Any:
    """Change all that is in a tree of the leaves of a plan.

    Args:
      tree: any pytree.
      plan: what is kept.
      change: ``(arrays, plan, positions of their leaves in the plan) -> arrays``.
      full: whether the tree's arrays have their full shapes, not those of the plan.
      caller: the function that asks, for messages.

    Raises:
      PlanError: nothing in the tree fits, or not clearly; see `shrink`.
    """
    templates = _templates(plan, full, caller)
    found: dict[int, list[int]] = {}

    def fits(node: Any) -> bool:
        positions = _match(node, plan, templates, caller)
        if positions is not None:
            found[id(node)] = positions
        return positions is not None

    def visit(node: Any) -> Any:
        if id(node) not in found:
            return node
        leaves, structure = jax.tree.flatten(node)
        return jax.tree.unflatten(structure, change(leaves, plan, found[id(node)]))

    result = jax.tree.map(visit, tree, is_leaf=fits)
    if not found:
        raise PlanError(
            f"{caller}: no sub-tree has the leaves of the plan (fingerprint {plan.fingerprint}, "
            f"{len(plan.leaves)} leaves, first `{plan.leaves[0].path}` "
            f"{plan.leaves[0].shape if full else plan.small_shape(0)}); the tree has "
            f"{[(path, np.shape(leaf)) for path, leaf in named_leaves(tree)][:3]} … "
            "Pass variables of the model that the plan was made for."
        )
    return result


def positions_in(tree: Any, plan: Any, caller: str) -> list[int]:
    """Positions in the plan of the leaves of full variables, or of one of their Flax collections.

    Args:
      tree: the variables or the collection.
      plan: what is kept.
      caller: the function that asks, for messages.

    Raises:
      PlanError: the tree is not one of these.
    """
    positions = _match(tree, plan, _templates(plan, True, caller), caller)
    if positions is None:
        raise PlanError(
            f"{caller}: the tree with leaves {[path for path, _ in named_leaves(tree)][:4]} is not "
            f"the variables of the plan (fingerprint {plan.fingerprint}) nor a collection of them. Pass "
            "the full variables."
        )
    return positions


class _Place(NamedTuple):
    """What is looked for: a leaf below a sub-tree, the shape it should have, its position in the plan."""

    path: str
    shape: tuple[int, ...]
    position: int


def _templates(plan: Any, full: bool, caller: str) -> list[list[_Place]]:
    """The leaves of the variables, and of each of their Flax collections."""
    if not isinstance(plan, Plan):
        raise PlanError(
            f"{caller}: the plan is {type(plan).__name__}, expected a Plan behind the tree, such as that of "
            "plan_units or result.plan."
        )
    # Deeper sub-trees are not offered: a layer of another model may look the same by chance.
    first_keys = {leaf.path.split("/")[0] for leaf in plan.leaves}
    prefixes = ["", *(f"{key}/" for key in sorted(first_keys & COLLECTIONS))]
    result = []
    for prefix in prefixes:
        inside = [(i, leaf) for i, leaf in enumerate(plan.leaves) if leaf.path.startswith(prefix)]
        # Without any, a leaf has the name of a collection.
        if inside:
            result.append(
                [
                    _Place(leaf.path[len(prefix) :], leaf.shape if full else plan.small_shape(i), i)
                    for i, leaf in inside
                ]
            )
    return result


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _match(node: Any, plan: Plan, templates: list[list[_Place]], caller: str) -> list[int] | None:
    """Positions in the plan of the leaves of a sub-tree that fits it; None for any other."""
    named = [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(node, is_leaf=_is_hole)]
    holes = [path for path, x in named if _is_hole(x)]
    leaves = [(path, np.shape(x)) for path, x in named if not _is_hole(x)]
    fits, wrong = [], []
    for template in templates:
        places = _present(template, leaves, holes)
        if places is not None:
            others = [(p, shape) for p, (_, shape) in zip(places, leaves, strict=True) if p.shape != shape]
            wrong += others
            if not others:
                fits.append([place.position for place in places])
        elif not _in_parts(template):
            _refuse_more(template, dict(leaves), holes, plan, caller)
    if not fits:
        _refuse_shapes(wrong, plan, caller)
        return None
    if any(plan.kept[i] != plan.kept[j] for other in fits[1:] for i, j in zip(fits[0], other, strict=True)):
        raise PlanError(
            f"{caller}: the sub-tree with leaves {[path for path, _ in leaves[:4]]} fits {len(fits)} "
            "sub-trees of the plan, which keep different indices. Pass the tree around it instead, so that "
            "its place is known."
        )
    return fits[0]


def _present(
    template: list[_Place], leaves: list[tuple[str, tuple[int, ...]]], holes: list[str]
) -> list[_Place] | None:
    """The places of all leaves, if the others are left out: a hole stands for a leaf or a sub-tree."""
    if not holes:
        same = len(leaves) == len(template) and all(
            place.path == path for place, (path, _) in zip(template, leaves, strict=True)
        )
        return template if same else None
    left = iter([path for path, _ in leaves])
    following, places = next(left, None), []
    for place in template:
        if place.path == following:
            places.append(place)
            following = next(left, None)
        elif not _is_left_out(place, holes):
            return None
    return places if following is None and places else None


def _is_left_out(place: _Place, holes: list[str]) -> bool:
    return any(hole in ("", place.path) or place.path.startswith(f"{hole}/") for hole in holes)


def _in_parts(template: list[_Place]) -> bool:
    """Whether all of it lies in collections, which are templates of their own."""
    return all(place.path.split("/")[0] in COLLECTIONS for place in template)


def _refuse_more(
    template: list[_Place], leaves: Mapping[str, Any], holes: list[str], plan: Plan, caller: str
) -> None:
    more = sorted(leaves.keys() - {place.path for place in template})
    if not more or len(more) == len(leaves):
        return
    there = (leaves.get(place.path) == place.shape or _is_left_out(place, holes) for place in template)
    if all(there):
        raise PlanError(
            f"{caller}: beside the leaves of the plan (fingerprint {plan.fingerprint}) there are "
            f"{more[:3]}, which it does not know. Find the groups again, for all variables; or pass those "
            "of the plan alone."
        )


def _is_cut(plan: Plan, place: _Place) -> bool:
    return any(index is not None for index in plan.kept[place.position])


def _refuse_shapes(wrong: list[tuple[_Place, tuple[int, ...]]], plan: Plan, caller: str) -> None:
    for place, got in wrong:
        if place.path and np.prod(got) > 1 and _is_cut(plan, place):
            raise PlanError(
                f"{caller}: `{place.path}` has shape {got} under the names of the plan (fingerprint "
                f"{plan.fingerprint}), expected {place.shape}. Pass variables of the model that the plan was "
                "made for; the state of an optimizer that does not mirror them goes through "
                "shrink_optimizer."
            )
