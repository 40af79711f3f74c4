"""Groups: the units of a model that can leave, and the axes that cannot.

A *unit* is what is kept or removed as one: index ranges on several axes of several leaves. A *group* is
a run of units that span the same axes and are interchangeable. Units are numbered so that a group's are
consecutive; arrays "over units" in the rest of the package use that numbering.
"""

from __future__ import annotations

import builtins
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from compaware_jax.coupling.analysis import Analysis
from compaware_jax.coupling.program import is_smooth
from compaware_jax.errors import PlanError, RequestError
from compaware_jax.paths import named_leaves
from compaware_jax.tables import text_table

# Several collections stand beside one another; a component is a module, not a collection.
COLLECTIONS = frozenset({"params", "batch_stats", "cache", "intermediates", "state"})

# More fixed axes than this are counted by reason instead of listed.
_LISTED = 30


@dataclass(frozen=True)
class Leaf:
    """A leaf of the variables: tree path, shape and dtype name."""

    path: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Group:
    """Interchangeable units.

    Attributes:
      name: the path of the module that produces them.
      units: how many there are.
      offset: number of the first one.
      axes: (leaf path, axis, indices per unit) that a unit spans.
      components: the components that a unit reaches into, first its producer's.
      parameters: parameters that one unit holds when nothing else is removed.
      boundary: whether they are what a kernel reads or writes of an axis that stays, such as the pixels
        of an input or an output; see `find_groups`.
    """

    name: str
    units: int
    offset: int
    axes: tuple[tuple[str, int, int], ...]
    components: tuple[str, ...]
    parameters: int
    boundary: bool = False

    @property
    def coupling(self) -> bool:
        """Whether the group reaches into two or more components."""
        return len(self.components) > 1

    @property
    def slice(self) -> builtins.slice:
        """Where the group's units stand in an array over units."""
        return slice(self.offset, self.offset + self.units)


@dataclass(frozen=True)
class FixedAxis:
    """A leaf axis of which some indices never leave, and why."""

    path: str
    axis: int
    indices: int
    reason: str

    @property
    def kind(self) -> str:
        """The reason without the place, to count by."""
        return re.split(r" (?:of|in|by) `| \(", self.reason)[0]


@dataclass(frozen=True, eq=False)
class Limits:
    """What is demanded of the kept units per group, arrays of shape (groups,); see `constrain`.

    Attributes:
      least: at least so many.
      most: at most so many.
      step: a multiple of it, or all.
      may_empty: whether nothing of it need stay.
    """

    least: np.ndarray
    most: np.ndarray
    step: np.ndarray
    may_empty: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Groups:
    """What can leave a model, and what cannot.

    Attributes:
      groups: the groups, in the order in which the program produces them.
      leaves: all leaves of the variables, in tree order.
      units_of: per leaf and axis the unit of each index, or -1 where it never leaves.
      fixed: the leaf axes that stay whole, at least in part, and why.
      unread: paths of leaves that the function never reads; they form no groups.
      guarded: sets of units of which one must stay, beyond "no group is emptied".
      released: tree paths of outputs whose axes may be cut.
      states: (output path, leaf path) pairs of outputs that are the next value of leaves.
      deployed: tree paths of the outputs whose FLOPs count, sub-trees standing for all that is in them;
        none for all outputs.
      analysis: the coupling analysis behind it all.
      unit_of_class: unit per class of the analysis, or -1.
      component_of: maps a leaf path to its component's name.
      limits: what a user demands of the groups, beside what the model does.
    """

    groups: tuple[Group, ...]
    leaves: tuple[Leaf, ...]
    units_of: tuple[tuple[np.ndarray, ...], ...]
    fixed: tuple[FixedAxis, ...]
    unread: tuple[str, ...]
    guarded: tuple[np.ndarray, ...]
    released: tuple[str, ...]
    states: tuple[tuple[str, str], ...]
    deployed: tuple[str, ...]
    analysis: Analysis
    unit_of_class: np.ndarray
    component_of: Callable[[str], str]
    limits: Limits | None = None

    def __deepcopy__(self, memo: Any) -> Groups:
        # Nothing of it changes, and a program cannot be copied.
        return self

    @property
    def units(self) -> int:
        """Number of units in all groups."""
        return sum(group.units for group in self.groups)

    @property
    def sizes(self) -> np.ndarray:
        """Units per group, shape (groups,)."""
        return np.array([group.units for group in self.groups], int)

    @property
    def offsets(self) -> np.ndarray:
        """Number of each group's first unit, shape (groups,)."""
        return np.array([group.offset for group in self.groups], int)

    @property
    def group_of_unit(self) -> np.ndarray:
        """Group number per unit, shape (units,)."""
        return np.repeat(np.arange(len(self.groups)), self.sizes)

    @property
    def floors(self) -> np.ndarray:
        """The fewest units that may stay per group, shape (groups,).

        One, or none where the group may be emptied, or one per guarded set that it answers for, or what
        is demanded.
        """
        answers = [self.group_of_unit[units[0]] for units in self.needed]
        floors = np.where(self.may_empty, 0, np.minimum(self.sizes, 1))
        floors = np.maximum(floors, np.bincount(np.array(answers, int), minlength=len(floors)))
        if self.limits is not None:
            floors = np.maximum(floors, self.limits.least)
        return np.minimum(-(-floors // self.steps) * self.steps, self.sizes)

    @property
    def may_empty(self) -> np.ndarray:
        """Whether nothing need stay of a group, shape (groups,)."""
        return np.zeros(len(self.groups), bool) if self.limits is None else self.limits.may_empty

    @property
    def needed(self) -> tuple[np.ndarray, ...]:
        """The guarded sets, but for those in groups that may all be emptied."""
        empty = self.may_empty[self.group_of_unit]
        return tuple(units for units in self.guarded if not empty[units].all())

    @property
    def ceilings(self) -> np.ndarray:
        """The most units that may stay per group, shape (groups,)."""
        if self.limits is None:
            return self.sizes
        return self.below(self.limits.most)

    @property
    def steps(self) -> np.ndarray:
        """Kept counts are multiples of this, or the whole group; shape (groups,)."""
        return np.ones_like(self.sizes) if self.limits is None else self.limits.step

    @property
    def smooth(self) -> list[bool]:
        """Which leaves have a gradient: those that hold no integers or flags."""
        program = self.analysis.program
        return [is_smooth(program.avals[value]) for value in program.leaf_values]

    @property
    def trained(self) -> np.ndarray:
        """Which groups hold anything that a gradient trains, boolean of shape (groups,)."""
        paths = {leaf.path for leaf, smooth in zip(self.leaves, self.smooth, strict=True) if smooth}
        return np.array([any(path in paths for path, *_ in group.axes) for group in self.groups], bool)

    def below(self, counts: np.ndarray) -> np.ndarray:
        """The largest allowed counts that are not above the given ones."""
        return np.where(counts >= self.sizes, self.sizes, counts // self.steps * self.steps)

    @property
    def deployed_outputs(self) -> list[int]:
        """Positions of the outputs whose FLOPs count."""
        return self.analysis.program.under(self.deployed or ("",))

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components, in the order of the groups, then of the leaves."""
        names = [name for group in self.groups for name in group.components]
        return tuple(dict.fromkeys(names + [self.component_of(leaf.path) for leaf in self.leaves]))

    @property
    def fingerprint(self) -> str:
        """A hash of the leaves' paths, shapes and dtypes: what a plan is tied to."""
        return fingerprint(self.leaves)

    @property
    def summary(self) -> str:
        """Groups, units and parameters, counted in a line."""
        parameters = sum(int(np.prod(leaf.shape)) for leaf in self.leaves)
        return f"{len(self.groups)} groups, {self.units} units, {parameters:,} parameters"

    def __repr__(self) -> str:
        """The line that a debugger has room for; `print` shows the tables."""
        return f"<Groups: {self.summary}>"

    def __str__(self) -> str:
        """The groups and the fixed axes, as tables."""
        allowed = zip(self.floors.tolist(), self.ceilings.tolist(), self.steps.tolist(), strict=True)
        demands = [
            () if self.limits is None else (_range(group, *them),)
            for group, them in zip(self.groups, allowed, strict=True)
        ]
        rows = [
            (
                " + ".join(group.components),
                group.name,
                group.units,
                *demand,
                "boundary" if group.boundary else "coupling" if group.coupling else "intra",
                group.parameters,
                ", ".join(
                    f"{path}[{axis}]" + (f"×{times}" if times > 1 else "") for path, axis, times in group.axes
                ),
            )
            for group, demand in zip(self.groups, demands, strict=True)
        ]
        may = () if self.limits is None else ("may keep",)
        header = ("component", "group", "units", *may, "kind", "parameters/unit", "axes (× indices/unit)")
        tables = [text_table(header, rows, self.summary)]
        if self.fixed:
            tables.append(text_table(*self.fixed_table()))
        if self.unread:
            tables.append("never read by the function: " + ", ".join(self.unread))
        return "\n\n".join(tables)

    def fixed_table(self) -> tuple[tuple[str, ...], Sequence[tuple[object, ...]]]:
        """Header and rows of a table of the axes that stay whole; many are counted by reason."""
        if len(self.fixed) <= _LISTED:
            listed = [(f"{f.path}[{f.axis}]", f.indices, f.reason) for f in self.fixed]
            return ("axis that stays whole", "indices", "because"), listed
        kinds: dict[str, list[FixedAxis]] = {}
        for axis in self.fixed:
            kinds.setdefault(axis.kind, []).append(axis)
        counted = [
            (len(axes), kind, f"{axes[0].path}[{axes[0].axis}]", axes[0].reason)
            for kind, axes in kinds.items()
        ]
        return ("axes that stay whole", "because", "first of them", "in full"), counted


def check_groups(groups: Any) -> None:
    """Refuse what is not groups.

    Raises:
      RequestError: says what to pass instead.
    """
    if not isinstance(groups, Groups):
        raise RequestError(f"groups is {type(groups).__name__}, expected what find_groups returns.")


def leaves_like(groups: Any, tree: Any, caller: str) -> list[Any]:
    """The leaves of a tree that is like the variables of groups.

    Args:
      groups: what can leave.
      tree: a pytree of arrays, abstract ones included.
      caller: the function that asks, for messages.

    Raises:
      RequestError: the groups are none.
      PlanError: the tree has other leaves or shapes.
    """
    check_groups(groups)
    leaves = jax.tree.leaves(tree)
    got, expected = [np.shape(leaf) for leaf in leaves], [leaf.shape for leaf in groups.leaves]
    if got != expected:
        other = next((n for n, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
        told = f"{len(got)} leaves, expected {len(expected)}"
        if other is not None:
            told = f"{got[other]} in place of `{groups.leaves[other].path}`, expected {expected[other]}"
        raise PlanError(f"{caller}: the variables have {told}. Pass those that the groups were found for.")
    return leaves


def _range(group: Group, least: int, most: int, step: int) -> str:
    """The counts that may stay, in words."""
    if least == most:
        return f"all {most}" if most == group.units else f"{most}"
    return f"{least} to {most}" + (f" by {step}" if step > 1 else "")


def default_component(path: str) -> str:
    """The default component of a leaf: its top-level key, not counting a Flax collection."""
    keys = path.split("/")
    return keys[1] if keys[0] in COLLECTIONS and len(keys) > 1 else keys[0]


def leaves_of(variables: Any) -> tuple[Leaf, ...]:
    """The leaves of a variables tree, in tree order."""
    named = named_leaves(variables)
    names = {dtype: str(dtype) for dtype in dict.fromkeys(leaf.dtype for _, leaf in named)}
    return tuple(Leaf(path, tuple(leaf.shape), names[leaf.dtype]) for path, leaf in named)


def parameters_held(axes: Sequence[tuple[str, int, int]], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Parameters under a unit that spans axes, as `Group.axes`, of leaves with these shapes."""
    rest = {path: list(shapes[path]) for path, _, _ in axes}
    for path, axis, times in axes:
        rest[path][axis] -= times
    return sum(math.prod(shapes[path]) - math.prod(left) for path, left in rest.items())


def fingerprint(leaves: Sequence[Leaf]) -> str:
    """A hash of leaves' paths, shapes and dtypes (16 hexadecimal digits)."""
    text = "\n".join(f"{leaf.path} {leaf.shape} {leaf.dtype}" for leaf in leaves)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
