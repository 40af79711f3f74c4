"""Plans: what is kept, as indices per leaf axis. Static, hashable, JSON, tied to one model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compaware_jax.coupling.factors import USUAL, Cuts
from compaware_jax.coupling.groups import Groups, Leaf, check_groups, fingerprint
from compaware_jax.errors import PlanError

Indices = tuple[int, ...]

_FORMAT = "compaware_jax plan 1"


@dataclass(frozen=True, repr=False)
class Plan:
    """What is kept of a model.

    Attributes:
      leaves: all leaves of the model, in tree order, at their full shapes.
      kept: per leaf and axis the kept indices, ascending, or None where the axis stays whole.
      counts: per group its name, the units kept and the units there were.
      released: tree paths of outputs that come out cut.
      states: (output path, leaf path) pairs of outputs that are the next value of leaves.
      cuts: how it was cut where there was a choice.
    """

    leaves: tuple[Leaf, ...]
    kept: tuple[tuple[Indices | None, ...], ...]
    counts: tuple[tuple[str, int, int], ...]
    released: tuple[str, ...] = ()
    states: tuple[tuple[str, str], ...] = ()
    cuts: Cuts = USUAL

    def __repr__(self) -> str:
        """Counts, in a line; `to_json` has the indices."""
        counts = ", ".join(f"{name} {kept}/{units}" for name, kept, units in self.counts)
        return f"<Plan for {self.fingerprint}: {self.parameters:,} parameters; {counts}>"

    @property
    def fingerprint(self) -> str:
        """A hash of the full model's leaves: the model that the plan is for."""
        return fingerprint(self.leaves)

    def small_shape(self, leaf: int) -> tuple[int, ...]:
        """The shape of a leaf (by position) after surgery."""
        return tuple(
            size if index is None else len(index)
            for size, index in zip(self.leaves[leaf].shape, self.kept[leaf], strict=True)
        )

    @property
    def parameters(self) -> int:
        """Number of elements left in all leaves."""
        return sum(int(np.prod(self.small_shape(i))) for i in range(len(self.leaves)))

    def to_json(self) -> str:
        """The plan as JSON text."""
        content = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "counts": self.counts,
            "released": self.released,
            "states": self.states,
            "within_heads": self.cuts.within_heads,
            "boundary": self.cuts.boundary,
            "choices": sorted(self.cuts.choices),
            "leaves": [
                {"path": leaf.path, "shape": leaf.shape, "dtype": leaf.dtype, "kept": kept}
                for leaf, kept in zip(self.leaves, self.kept, strict=True)
            ],
        }
        return json.dumps({**content, "hash": _hash(content)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan written by `to_json`.

        Raises:
          PlanError: the text is not such a plan, or was altered.
        """
        try:
            data = json.loads(text)
            stated, found = data.pop("hash"), data["format"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                f"Plan.from_json: not a plan ({type(error).__name__}: {error}). Expected the text that "
                "Plan.to_json writes."
            ) from error
        if found != _FORMAT:
            raise PlanError(
                f"Plan.from_json: the format is {found!r}, expected {_FORMAT!r}. Write the plan again with "
                "this version, or read it with the one that wrote it."
            )
        if stated != (got := _hash(data)):
            raise PlanError(
                f"Plan.from_json: the content hashes to {got}, the plan states {stated}. The text was "
                "altered; write it again with Plan.to_json, or make another plan with plan_units."
            )
        return cls(
            leaves=tuple(Leaf(x["path"], tuple(x["shape"]), x["dtype"]) for x in data["leaves"]),
            kept=tuple(
                tuple(None if index is None else tuple(index) for index in x["kept"]) for x in data["leaves"]
            ),
            counts=tuple(map(tuple, data["counts"])),
            released=tuple(data["released"]),
            states=tuple(map(tuple, data["states"])),
            cuts=Cuts(
                data["within_heads"],
                data["boundary"],
                frozenset((tuple(a), tuple(b)) for a, b in data["choices"]),
            ),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a JSON file; see `from_json`."""
        return cls.from_json(Path(path).read_text(errors="replace"))


def component_table(groups: Groups, plan: Plan) -> list[tuple[str, int, int, str]]:
    """What each component paid: (component, parameters before, parameters after, share left)."""
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    for number, leaf in enumerate(groups.leaves):
        name = groups.component_of(leaf.path)
        before[name] = before.get(name, 0) + int(np.prod(leaf.shape))
        after[name] = after.get(name, 0) + int(np.prod(plan.small_shape(number)))
    return [(n, before[n], after[n], f"{after[n] / max(before[n], 1):.1%}") for n in before]


def _hash(content: Mapping[str, Any]) -> str:
    """A hash of JSON values, however they are laid out as text (16 hexadecimal digits)."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def plan_units(groups: Groups, keep: Any) -> Plan:
    """The plan that keeps the given units.

    Args:
      groups: what can leave.
      keep: array over units, of truth values, zeros and ones.

    Returns:
      The plan.

    Raises:
      PlanError: `keep` has another shape, holds soft values, or leaves nothing of a group or of a guarded
        set.
    """
    check_groups(groups)
    given = np.asarray(keep)
    keep = given.astype(bool)
    if (given != keep).any():
        raise PlanError(
            f"plan_units: keep holds {given[given != keep].ravel()[0]!s}, expected true or false, one or "
            "zero. Soft gates or scores do not say which units stay: compare them with a threshold first."
        )
    if keep.shape != (groups.units,):
        raise PlanError(
            f"plan_units: keep has shape {keep.shape}, expected one flag per unit, ({groups.units},)."
        )
    for group, may_empty in zip(groups.groups, groups.may_empty, strict=True):
        if not may_empty and not keep[group.slice].any():
            raise PlanError(
                f"plan_units: nothing of the group `{group.name}` ({group.units} units) is kept. "
                "Keep at least one of its units, or allow it with constrain(groups, may_empty=...)."
            )
    for units in groups.needed:
        if not keep[units].any():
            raise PlanError(
                f"plan_units: units {units.tolist()[:8]} make up a whole axis of an intermediate value "
                "and none of them is kept. Keep at least one."
            )
    # Fixed indices carry unit -1: the flag behind the last unit.
    flags = np.append(keep, True)
    found: dict[bytes, tuple[int, ...] | None] = {}

    def along(units: np.ndarray) -> tuple[int, ...] | None:
        # Many axes carry the same units.
        name = units.tobytes()
        if name not in found:
            stays = flags[units]
            found[name] = None if stays.all() else tuple(np.flatnonzero(stays).tolist())
        return found[name]

    kept = tuple(tuple(map(along, axes)) for axes in groups.units_of)
    counts = tuple((g.name, int(keep[g.slice].sum()), g.units) for g in groups.groups)
    return Plan(groups.leaves, kept, counts, groups.released, groups.states, groups.analysis.cuts)
