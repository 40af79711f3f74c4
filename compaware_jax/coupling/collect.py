"""From classes of atoms to groups of units: which leave together, what they span, what they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from jax.extend.core import primitives as p

from compaware_jax.coupling.analysis import Analysis
from compaware_jax.coupling.groups import COLLECTIONS, FixedAxis, Group, Groups, Leaf, parameters_held
from compaware_jax.coupling.work import work_of


def collect(
    analysis: Analysis,
    leaves: tuple[Leaf, ...],
    components: Callable[[str], str],
    inexact: bool,
    released: tuple[str, ...],
    states: tuple[tuple[str, str], ...],
    deployed: tuple[str, ...],
) -> Groups:
    """The groups of an analysis.

    Args:
      analysis: of the function.
      leaves: of its variables.
      components: see `find_groups`, as are the others.
      inexact: whether classes leave whose removal differs from masking.
      released: paths of outputs that may be cut.
      states: pairs of paths, of outputs and of the leaves whose next values they are.
      deployed: paths of the outputs in use.

    Returns:
      The `Groups`.
    """
    program, solution = analysis.program, analysis.solution
    order, unread = _first_use(analysis, states)
    free = analysis.free.copy()
    if not inexact:
        free[list(solution.inexact)] = False

    # Where classes appear: on leaf axes in order of first use, then on axes that count as work.
    per_leaf = (analysis.labels(program.leaf_values[position]) for position in order)
    appearances = [labels for axes in per_leaf for labels in axes if labels is not None]
    on_leaves = len(appearances)
    appearances += _work_labels(analysis)

    classes, sizes = _in_groups(*_signatures(appearances, on_leaves, free, solution.count))
    unit_of_class = np.full(solution.count + 1, -1)
    unit_of_class[classes] = np.arange(len(classes))
    units_of, fixed = _placed(analysis, leaves, unit_of_class, unread)

    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(sizes) else np.zeros(0, int)
    at_boundary = np.isin(classes[offsets], analysis.boundary)
    groups = _describe(leaves, units_of, order, offsets, sizes, components, at_boundary)
    return Groups(
        groups=groups,
        leaves=leaves,
        units_of=units_of,
        fixed=fixed,
        unread=unread,
        guarded=_guarded(analysis, unit_of_class, groups),
        released=released,
        states=states,
        deployed=deployed,
        analysis=analysis,
        unit_of_class=unit_of_class,
        component_of=components,
    )


def _first_use(analysis: Analysis, states: tuple[tuple[str, str], ...]) -> tuple[list[int], tuple[str, ...]]:
    """Positions of the leaves in the order in which the program reads them; paths never read.

    Stopping the gradient of a leaf is not yet reading it; being the place of a state is.
    """
    program = analysis.program
    position_of = {value: i for i, value in enumerate(program.leaf_values)}
    read: list[int] = []
    for eqn in program.block.equations:
        if eqn.primitive is p.stop_gradient_p and eqn.inputs[0] in position_of:
            position_of[eqn.outputs[0]] = position_of[eqn.inputs[0]]
        else:
            read += eqn.inputs
    read += program.block.outputs
    order = list(dict.fromkeys(position_of[v] for v in read if v in position_of))
    order += [leaf for _, leaf in program.states(states) if leaf not in order]
    seen = set(order)
    unread = tuple(name for i, name in enumerate(program.leaves) if i not in seen)
    return order, unread


def _work_labels(analysis: Analysis) -> list[np.ndarray]:
    return [
        labels
        for dimension in dict.fromkeys(d for work in work_of(analysis.program) for d in work.dimensions)
        if (labels := analysis.together(dimension)) is not None
    ]


def _signatures(
    appearances: list[np.ndarray], on_leaves: int, free: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Free classes on leaves, where each first appears, and a hash of the axes that each spans.

    An index that only its own leaf knows of is not one of them: a row of a position table that this
    input is too short to read may be read by the next.
    """
    # A random word per axis, once for every index: a multiset hash, modulo 2^64.
    words = np.random.default_rng(0).integers(1, 2**63, len(appearances), np.uint64) | np.uint64(1)
    starts = np.cumsum([0, *map(len, appearances)])
    # Many axes share their array of classes: what they share is said once, of all of them.
    alike: dict[int, list[int]] = {}
    for number, labels in enumerate(appearances):
        alike.setdefault(id(labels), []).append(number)
    labels, which = _joined([appearances[numbers[0]] for numbers in alike.values()])
    word = np.array([words[numbers].sum() for numbers in alike.values()], np.uint64)
    earliest, latest = (np.array([numbers[end] for numbers in alike.values()], int) for end in (0, -1))
    index = np.arange(len(labels)) - np.searchsorted(which, which)
    known = labels >= 0
    labels, which, index = labels[known], which[known], index[known]
    signature = np.zeros(count, np.uint64)
    np.add.at(signature, labels, word[which])
    never = np.iinfo(np.int64).max
    first, first_axis, last_axis = np.full(count, never), np.full(count, never), np.full(count, -1)
    on_leaf = earliest[which] < on_leaves
    np.minimum.at(first, labels[on_leaf], (starts[earliest[which]] + index)[on_leaf])
    np.minimum.at(first_axis, labels, earliest[which])
    np.maximum.at(last_axis, labels, latest[which])
    return np.flatnonzero(free & (first < never) & (first_axis < last_axis)), first, signature


def _joined(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays one after the other, and for each element the number of its array."""
    number = np.repeat(np.arange(len(arrays)), np.array([len(array) for array in arrays], int))
    return np.concatenate([np.zeros(0, int), *arrays]), number


def _in_groups(
    classes: np.ndarray, first: np.ndarray, signature: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The classes group by group, those that span the same axes, and the sizes of the groups.

    Groups are in the order in which their first units appear, units in the order of their indices.
    """
    classes = classes[np.argsort(first[classes], kind="stable")]
    _, start, inverse = np.unique(signature[classes], return_index=True, return_inverse=True)
    group_of = np.argsort(np.argsort(start))[inverse]
    return classes[np.argsort(group_of, kind="stable")], np.bincount(group_of, minlength=len(start))


def _placed(
    analysis: Analysis, leaves: tuple[Leaf, ...], unit_of_class: np.ndarray, unread: tuple[str, ...]
) -> tuple[tuple[tuple[np.ndarray, ...], ...], tuple[FixedAxis, ...]]:
    """Per leaf and axis the unit of each index, -1 where it stays; and the axes of which something stays."""
    never_read = set(unread)
    along: dict[int, tuple[np.ndarray, bool]] = {}
    units_of, fixed = [], []
    for leaf, value in zip(leaves, analysis.program.leaf_values, strict=True):
        per_axis = []
        for axis, labels in enumerate(analysis.labels(value)):
            if labels is None or leaf.path in never_read:
                per_axis.append(np.full(leaf.shape[axis], -1))
                continue
            # Axes that share their labels share their units.
            if id(labels) not in along:
                units = unit_of_class[labels]
                along[id(labels)] = units, bool((units < 0).any())
            units, some_stay = along[id(labels)]
            if some_stay:
                fixed.append(_fixed_axis(analysis, leaf, axis, value, units))
            per_axis.append(units)
        units_of.append(tuple(per_axis))
    return tuple(units_of), tuple(fixed)


def _fixed_axis(analysis: Analysis, leaf: Leaf, axis: int, value: int, units: np.ndarray) -> FixedAxis:
    classes = analysis.solution.labels[analysis.factor(value, axis).ids][units < 0]
    for label in classes:
        reason = analysis.solution.fixed.get(label)
        if reason is None and label in analysis.solution.inexact:
            reason = f"{analysis.solution.inexact[label]}; inexact=True releases it"
        if reason:
            return FixedAxis(leaf.path, axis, int((units < 0).sum()), reason)
    return FixedAxis(leaf.path, axis, int((units < 0).sum()), "nothing else reads it at these input shapes")


def _describe(
    leaves: tuple[Leaf, ...],
    units_of: tuple[tuple[np.ndarray, ...], ...],
    order: list[int],
    offsets: np.ndarray,
    sizes: np.ndarray,
    components: Callable[[str], str],
    at_boundary: np.ndarray,
) -> tuple[Group, ...]:
    axes: list[list[tuple[str, int, int]]] = [[] for _ in sizes]
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    spans = [(position, axis) for position in order for axis in range(len(units_of[position]))]
    along = [units_of[position][axis] for position, axis in spans]
    distinct = {id(units): units for units in along}
    counted = dict(zip(distinct, _count(list(distinct.values()), sizes), strict=True))
    for (position, axis), units in zip(spans, along, strict=True):
        for group, count in counted[id(units)]:
            # Units of a group are interchangeable: each holds as many indices as the others.
            axes[group].append((leaves[position].path, axis, count // int(sizes[group])))
    names = _names([spans[0] for spans in axes])
    return tuple(
        Group(
            name=names[g],
            units=int(sizes[g]),
            offset=int(offsets[g]),
            axes=tuple(axes[g]),
            components=tuple(dict.fromkeys(components(path) for path, _, _ in axes[g])),
            parameters=parameters_held(axes[g], shapes),
            boundary=bool(at_boundary[g]),
        )
        for g in range(len(sizes))
    )


def _count(arrays: list[np.ndarray], sizes: np.ndarray) -> list[list[tuple[int, int]]]:
    """Per array of units the groups that it holds, and how many indices of each."""
    units, number = _joined(arrays)
    number, group = number[units >= 0], np.repeat(np.arange(len(sizes)), sizes)[units[units >= 0]]
    # Neighbours mostly belong together: to sort runs is quicker than to sort indices.
    pair = number * len(sizes) + group
    start = np.flatnonzero(np.diff(pair, prepend=-1))
    pairs, which = np.unique(pair[start], return_inverse=True)
    indices = np.bincount(which, np.diff(start, append=len(pair))).astype(int)
    result: list[list[tuple[int, int]]] = [[] for _ in arrays]
    for pair, count in zip(pairs.tolist(), indices.tolist(), strict=True):
        result[pair // len(sizes)].append((pair % len(sizes), count))
    return result


def _names(first_axes: list[tuple[str, int, int]]) -> list[str]:
    """Module paths; with the axis, then a number, where that alone is not unique."""
    modules = []
    for path, _, _ in first_axes:
        keys = path.split("/")
        keys = keys[1:] if keys[0] in COLLECTIONS and len(keys) > 1 else keys
        modules.append("/".join(keys[:-1]) or keys[-1])
    shared, taken = Counter(modules), Counter[str]()
    names: list[str] = []
    for module, (path, axis, _) in zip(modules, first_axes, strict=True):
        name = module
        if shared[module] > 1:
            leaf = path.rsplit("/", 1)[-1]
            name = f"{module}:{axis}" if leaf == module else f"{module}/{leaf}:{axis}"
        names.append(f"{name}#{taken[name]}" if taken[name] else name)
        taken[name] += 1
    return names


def _guarded(
    analysis: Analysis, unit_of_class: np.ndarray, groups: tuple[Group, ...]
) -> tuple[np.ndarray, ...]:
    """Sets of units that make up the whole of some value's axis but no whole group."""
    sets: dict[bytes, np.ndarray] = {}
    sizes = np.array([group.units for group in groups], int)
    group_of_unit = np.repeat(np.arange(len(sizes)), sizes)

    def holds_a_group(units: np.ndarray) -> bool:
        here = group_of_unit[units]
        if here[0] == here[-1]:
            return bool(len(units) == sizes[here[0]])
        here, count = np.unique(here, return_counts=True)
        return bool((count == sizes[here]).any())

    for labels in analysis.lines():
        units = unit_of_class[labels]
        if len(units) and units.min() >= 0 and not holds_a_group(units := np.unique(units)):
            sets[units.tobytes()] = units
    return tuple(sets.values())
