"""Calls of a module, split into the arrays that are traced and the rest, which is static or known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from compaware_jax.errors import PlanError
from compaware_jax.paths import named_leaves, path_name
from compaware_jax.surgery.plan import Plan
from compaware_jax.surgery.small_function import slim
from compaware_jax.training.loop import digest


@dataclass(frozen=True)
class Static:
    """What is left of a tree without its arrays: hashable if its other leaves are."""

    structure: Any
    leaves: tuple[Any, ...]

    def join(self, arrays: list[Any]) -> Any:
        """The tree with the given arrays in their places."""
        rest = iter(arrays)
        leaves = [next(rest) if leaf is None else leaf[1] for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


@dataclass(frozen=True, eq=False)
class Known:
    """Arrays that a module holds for good, such as the indices of a permutation, or a mask.

    The groups were found with their values, so the small function may need these, not tracers in their
    place. Two are equal if their arrays are.

    Attributes:
      given: by name. A program may have taken their memory since.
      arrays: copies of them.
      mark: a hash of all of them.
    """

    given: dict[str, Any]
    arrays: dict[str, Any]
    mark: str

    @classmethod
    def of(cls, held: dict[str, Any]) -> Known:
        """What can be known of what a module holds: arrays that are not traced. Scalars count something."""
        given = {
            name: x
            for name, x in held.items()
            if isinstance(x, jax.Array | np.ndarray) and not isinstance(x, Tracer) and x.ndim
        }
        types = [(name, x.shape, str(x.dtype)) for name, x in given.items()]
        with jax.ensure_compile_time_eval():
            arrays = jax.tree.map(jnp.copy, given)
        return cls(given, arrays, digest([arrays, np.frombuffer(repr(types).encode(), np.uint8)]))

    def check(self, held: dict[str, Any], names: Collection[str], caller: str) -> None:
        """Refuse other values in the place of those that are known, as far as that can be seen.

        Raises:
          PlanError: says which ones.
        """
        for name in names:
            now, known = held.get(name), self.arrays[name]
            if now is None or now is self.given[name] or isinstance(now, Tracer):
                continue
            if not np.array_equal(_numbers(now).astype(_numbers(known).dtype), _numbers(known)):
                raise PlanError(
                    f"{caller}: `{name}` has other values than when `slimmed` was called, where the small "
                    "model took them for constants. Change it in the full model, find its groups again, and "
                    "call slimmed on that."
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self.mark == other.mark

    def __hash__(self) -> int:
        return hash(self.mark)


def _numbers(array: Any) -> np.ndarray:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array)


class SmallCall:
    """A slimmed call of a module: with what the module holds as data, or else, for that plan, as constants.

    Args:
      call: ``(variables, held, arrays) -> output``, the call at full width; held by name.
      plans: what is kept, as the outputs of the call may be read; the first that fits is taken.
      known: what may be constant.
      changed: the names of what a call has changed, told by its output: that is no constant.
    """

    def __init__(
        self,
        call: Callable[[Any, dict[str, Any], list[Any]], Any],
        plans: Sequence[Plan],
        known: Known,
        changed: Callable[[Any], set[str]] = lambda output: set(),
    ):
        self._call, self._plans, self._known, self._changed = call, plans, known, changed
        self._moving: set[str] = set()
        self._settled: tuple[Callable[..., Any], dict[str, Any]] | None = None

    def __call__(self, variables: Any, held: dict[str, Any], arrays: list[Any]) -> Any:
        """The output of the small call.

        Raises:
          PlanError: the plan does not fit, or what is constant has other values now.
        """
        if self._settled is None:
            self._settled = self._fitting(variables, held, arrays)
        small, constants = self._settled
        self._known.check(held, constants, "Slimmed")
        try:
            output = small(variables, held, arrays)
        except PlanError:
            # Of other shapes than those that it was settled for.
            small, constants = self._settled = self._fitting(variables, held, arrays)
            self._known.check(held, constants, "Slimmed")
            output = small(variables, held, arrays)
        if moving := self._changed(output) & constants.keys():
            self._moving |= moving
            self._settled = None
            return self(variables, held, arrays)
        return output

    def _fitting(self, variables: Any, held: Any, arrays: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        constants = {name: x for name, x in self._known.arrays.items() if name not in self._moving}
        first = None
        for plan, known in itertools.product(self._plans, ({}, constants) if constants else ({},)):
            small = slim(partial(self._with, known), plan)
            try:
                jax.eval_shape(small, variables, held, arrays)
            except PlanError as error:
                first = first or error
            else:
                return small, known
        assert first is not None
        raise first

    def _with(self, constants: dict[str, Any], variables: Any, held: dict[str, Any], arrays: Any) -> Any:
        return self._call(variables, {**held, **constants}, arrays)


def named_arrays(tree: Any) -> tuple[dict[str, Any], Any]:
    """The arrays of a tree by their paths, and the tree with None in their place."""
    named = {path: x for path, x in named_leaves(tree) if _is_array(x)}
    return named, jax.tree.map(lambda x: None if _is_array(x) else x, tree)


def with_arrays(rest: Any, named: dict[str, Any]) -> Any:
    """The inverse of `named_arrays`."""
    return jax.tree.map_with_path(
        lambda path, x: named.get(path_name(path), x), rest, is_leaf=lambda x: x is None
    )


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def split_arrays(tree: Any) -> tuple[list[Any], Static]:
    """Split a tree into its arrays and the rest, as `equinox.filter_jit` does."""
    leaves, structure = jax.tree.flatten(tree)
    found = [_is_array(leaf) for leaf in leaves]
    arrays = [leaf for leaf, is_array in zip(leaves, found, strict=True) if is_array]
    # The type goes along, because True == 1 == 1.0 would share an entry of a cache.
    rest = tuple(None if is_array else (type(x), x) for x, is_array in zip(leaves, found, strict=True))
    return arrays, Static(structure, rest)


def hashable(*values: Any) -> bool:
    """Whether values can be looked up in a cache."""
    try:
        hash(values)
    except TypeError:
        return False
    return True


def with_updates(plan: Plan, leaf: str) -> list[Plan]:
    """A plan as it may read for a call that gives (output, updates of the state at a leaf's path).

    One found on such a call names its outputs that way already. Otherwise the function gave the output alone,
    or with updates among it, or those of several calls, each in a place of its own.
    """
    if (states := (("1", leaf),)) == plan.states:
        return [plan]
    readings = [plan.released]
    if plan.states:
        readings.append(tuple(path.partition("/")[2] for path in plan.released))
    return [
        replace(plan, released=tuple(f"0/{path}" if path else "0" for path in paths), states=states)
        for paths in readings
    ]
