"""What a user demands of groups: whole ones, floors, ceilings, handy widths, ties and splits."""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from compaware_jax.coupling.groups import Group, Groups, Limits, check_groups, parameters_held
from compaware_jax.errors import BudgetError

Amount = int | float | np.number | jax.Array
"""A number of units (integers), or a share of a group (floats), be it of Python, numpy or JAX."""


def constrain(
    groups: Groups,
    *,
    whole: str | Sequence[str] = (),
    floor: Mapping[str, Amount] | Amount = 0,
    ceiling: Mapping[str, Amount] | Amount | None = None,
    multiple_of: Mapping[str, Amount] | Amount = 1,
    together: Sequence[tuple[str, str]] = (),
    apart: Mapping[str, int] | None = None,
    may_empty: str | Sequence[str] = (),
) -> Groups:
    """Groups under further demands; every search and selection keeps to them.

    Patterns are shell patterns (``*``, ``?``, ``[…]``) of group names; where none fits, of the component
    that produces a group; where none fits, of the components that it reaches into; where none fits, of the
    paths of leaves that its units span, and at last of these with the axis, as tables show them: ``w[0]``.
    Where several demands of a call reach a group, the last wins. Called again, demands add up: floors rise,
    ceilings fall, multiples become common ones.

    Args:
      groups: what can leave.
      whole: patterns of groups that stay whole. The members of an ensemble are a group, too; one that left
        counts as zero in the minimum or the maximum over them.
      floor: least kept units: an int, or a float for a share of the group; one for all, or by pattern.
      ceiling: most kept units, likewise.
      multiple_of: kept sizes of all axes that a group cuts are multiples of this, e.g. 8 for tensor
        cores; one for all, or by pattern. A group may also stay whole.
      together: pairs of group names whose units leave index by index, as one group; pairs may share names.
        Where a top-k or an argmax routes to experts, a gate's column and its expert are units of two
        groups: each of them can leave without the other, and an expert that left still draws tokens.
      apart: group name to a number of parts: consecutive units that get a coefficient of their own.
      may_empty: patterns of groups of which nothing need stay, e.g. the inner channels of a block that
        its skip connection replaces.

    Returns:
      New `Groups`.

    Raises:
      BudgetError: a pattern matches no group, a number is out of range, groups forced together differ in
        size, a floor is above its ceiling, or groups under demands are to be tied or split.

    Example:
      >>> import jax.numpy as jnp
      >>> import compaware_jax as ca
      >>> def net(v, x):
      ...     return jnp.tanh(x @ v["a"]) @ v["b"]
      >>> groups = ca.find_groups(net, {"a": jnp.ones((3, 64)), "b": jnp.ones((64, 2))}, jnp.ones((1, 3)))
      >>> ca.constrain(groups, floor={"a": 0.2}, multiple_of=8).floors
      array([16])
    """
    check_groups(groups)
    if groups.limits is not None and (together or apart):
        raise BudgetError(
            "constrain: these groups are under demands already, which would not fit groups tied together or "
            "split. Ask for `together` and `apart` in the first call."
        )
    groups = _all_tied(groups, together)
    for name, parts in _mapping(apart or {}, "apart").items():
        groups = _split(groups, name, parts)
    sizes, number = groups.sizes, len(groups.groups)
    least, most, step = np.zeros(number, int), sizes.copy(), np.ones(number, int)
    for g, amount in _by_group(groups, floor, "floor"):
        least[g] = math.ceil(_units(amount, int(sizes[g]), "floor") - 1e-9)
    for g, amount in _by_group(groups, {} if ceiling is None else ceiling, "ceiling"):
        most[g] = math.floor(_units(amount, int(sizes[g]), "ceiling") + 1e-9)
    for g, multiple in _by_group(groups, multiple_of, "multiple_of"):
        whole_number = _whole_number(multiple)
        if whole_number is None or whole_number < 1:
            raise BudgetError(f"constrain: multiple_of={multiple!r}, expected a whole number of at least 1.")
        held = math.gcd(whole_number, *(times for _, _, times in groups.groups[g].axes))
        step[g] = whole_number // held
    for pattern in _patterns(whole, "whole"):
        least[_matching(groups, pattern, "whole")] = sizes[_matching(groups, pattern, "whole")]
    empty = np.zeros(number, bool)
    for pattern in _patterns(may_empty, "may_empty"):
        empty[_matching(groups, pattern, "may_empty")] = True
    demands = Limits(least, most, step, empty)
    result = replace(groups, limits=demands if groups.limits is None else _both(groups.limits, demands))
    for group, low, high in zip(groups.groups, result.floors, result.ceilings, strict=True):
        if low > high:
            raise BudgetError(
                f"constrain: the group `{group.name}` ({group.units} units) would have to keep at least "
                f"{low} and at most {high}. Lower its floor or raise its ceiling; with multiple_of, both "
                "are rounded to multiples."
            )
    return result


def _patterns(given: Any, what: str) -> Sequence[str]:
    """One pattern, or several."""
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Collection) or not all(isinstance(p, str) for p in patterns):
        raise BudgetError(
            f"constrain: {what}={given!r}, expected a pattern of groups, or a list of patterns."
        )
    return tuple(patterns)


def _mapping(given: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise BudgetError(f"constrain: {what}={given!r}, expected a mapping from names of groups.")
    return given


def _both(first: Limits, second: Limits) -> Limits:
    return Limits(
        least=np.maximum(first.least, second.least),
        most=np.minimum(first.most, second.most),
        step=np.lcm(first.step, second.step),
        may_empty=first.may_empty | second.may_empty,
    )


def _units(amount: Any, size: int, what: str) -> float:
    number = _whole_number(amount)
    if number is not None and number >= 0:
        return float(min(number, size))
    given = np.asarray(amount)
    share = float(given) if given.dtype.kind == "f" and given.ndim == 0 else math.nan
    if not 0 <= share <= 1:
        raise BudgetError(
            f"constrain: {what}={amount!r}, expected a number of units (int) or a share in [0, 1] (float)."
        )
    return share * size


def _whole_number(amount: Any) -> int | None:
    """The integer, be it of Python, numpy or JAX; None for anything else, truth values too."""
    if isinstance(amount, bool):
        return None
    try:
        return operator.index(amount)
    except TypeError:
        return None


def _by_group(groups: Groups, demand: Any, what: str) -> list[tuple[int, Any]]:
    if not isinstance(demand, Mapping):
        return [(g, demand) for g in range(len(groups.groups))]
    return [(g, value) for pattern, value in demand.items() for g in _matching(groups, pattern, what)]


def _matching(groups: Groups, pattern: str, what: str) -> list[int]:
    readings: tuple[Callable[[Group], Sequence[str]], ...] = (
        lambda group: (group.name,),
        lambda group: group.components[:1],
        lambda group: group.components,
        lambda group: [path for path, _, _ in group.axes],
        lambda group: [f"{path}[{axis}]" for path, axis, _ in group.axes],
    )
    found: list[int] = []
    # A name with brackets is a name, whatever it is as a pattern.
    for fits, reading in itertools.product((operator.eq, fnmatchcase), readings):
        found = found or [
            g for g, group in enumerate(groups.groups) if any(fits(text, pattern) for text in reading(group))
        ]
    if not found:
        raise BudgetError(
            f"constrain: {what} names {pattern!r}, which matches no group. The groups are "
            f"{[group.name for group in groups.groups][:12]}; patterns may also be of components, "
            "leaf paths and their axes."
        )
    return found


def _named(groups: Groups, name: str) -> int:
    names = [group.name for group in groups.groups]
    if name not in names:
        raise BudgetError(f"constrain: {name!r} is no group. The groups are {names[:12]}.")
    return names.index(name)


def _all_tied(groups: Groups, pairs: Any) -> Groups:
    """Groups that are forced together, pair by pair; a group that has joined another answers for both."""
    joined: dict[str, str] = {}
    for pair in pairs if isinstance(pairs, Collection) else [pairs]:
        listed = isinstance(pair, Sequence) and not isinstance(pair, str)
        if not listed or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise BudgetError(
                f"constrain: together={pairs!r}, expected a list of pairs of names of groups, such as "
                "[('first', 'second')]."
            )
        first, second = (str(joined.get(name, name)) for name in pair)
        if first == second and pair[0] != pair[1]:
            continue
        groups = _tied(groups, first, second)
        joined = {name: first if at == second else at for name, at in joined.items()} | {second: first}
    return groups


def _tied(groups: Groups, first: str, second: str) -> Groups:
    """The units of the second group join those of the first, index by index."""
    a, b = (groups.groups[_named(groups, name)] for name in (first, second))
    if a.name == b.name or a.units != b.units:
        raise BudgetError(
            f"constrain: `{a.name}` ({a.units} units) and `{b.name}` ({b.units} units) cannot be forced "
            "together. Expected two groups with as many units."
        )
    times = Counter[tuple[str, int]]()
    for path, axis, n in a.axes + b.axes:
        times[path, axis] += n
    axes = tuple((path, axis, n) for (path, axis), n in times.items())
    merged = replace(
        a,
        axes=axes,
        components=tuple(dict.fromkeys(a.components + b.components)),
        parameters=parameters_held(axes, {leaf.path: leaf.shape for leaf in groups.leaves}),
    )
    listed = [merged if group is a else group for group in groups.groups if group is not b]
    number = np.arange(groups.units)
    number[b.slice] = number[a.slice]
    return _renumbered(groups, listed, number)


def _split(groups: Groups, name: str, parts: Any) -> Groups:
    position = _named(groups, name)
    group = groups.groups[position]
    number = _whole_number(parts)
    if number is None or not 2 <= number <= group.units:
        raise BudgetError(
            f"constrain: `{name}` ({group.units} units) cannot be split into {parts!r} parts. Expected a "
            f"whole number from 2 to {group.units}."
        )
    edges = np.linspace(0, group.units, number + 1).round().astype(int)
    pieces = [
        replace(group, name=f"{name}/{i}", units=int(high - low), offset=int(group.offset + low))
        for i, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    listed = [*groups.groups[:position], *pieces, *groups.groups[position + 1 :]]
    return _renumbered(groups, listed, np.arange(groups.units))


def _renumbered(groups: Groups, listed: list[Group], alias: np.ndarray) -> Groups:
    """Number units anew, in the order of `listed`; `alias` maps each unit to the one it is now."""
    new = np.full(groups.units + 1, -1)
    offset, placed = 0, []
    for group in listed:
        new[group.slice] = np.arange(offset, offset + group.units)
        placed.append(replace(group, offset=offset))
        offset += group.units
    new[:-1] = new[alias]

    return replace(
        groups,
        groups=tuple(placed),
        units_of=tuple(tuple(new[units] for units in axes) for axes in groups.units_of),
        guarded=tuple(np.unique(new[units]) for units in groups.guarded),
        unit_of_class=new[groups.unit_of_class],
    )
