"""A flat program: one list of equations, one id per value, in blocks of straight runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend.core import primitives as p
from jax.extend.source_info_util import summarize


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One call of a function under `jax.checkpoint`, whose equations stand in line with the others.

    Attributes:
      policy: what is saved for the backward pass.
      prevent_cse: whether the compiler is kept from undoing it.
    """

    policy: Any
    prevent_cse: Any


@dataclass(frozen=True, eq=False)
class Equation:
    """One primitive application.

    Attributes:
      primitive: the primitive object; rules are keyed by it.
      params: its parameters, at the traced shapes.
      inputs: value ids, literals included (they are constants of the program).
      outputs: value ids.
      source: the traced equation, to run it unchanged.
      bodies: the flattened bodies of calls with custom derivatives, of loops and of branches.
      scope: the module path in which it was traced (JAX's name stack).
      checkpoints: the calls under `jax.checkpoint` that it is a part of, outermost first.
      ambient: whether it was traced in the context in which the whole function was called.
    """

    primitive: jex.Primitive
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: jex.JaxprEqn
    bodies: tuple[Block, ...]
    scope: str
    checkpoints: tuple[Checkpoint, ...]
    ambient: bool

    @property
    def context(self) -> AbstractContextManager:
        """What the function chose for this equation: a mesh, where it computes, how it draws random bits.

        The caller's own choices are not fixed: they may be others at the next call.
        """
        return nullcontext() if self.ambient else self.source.ctx.manager

    @cached_property
    def in_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Full shapes of the inputs."""
        return tuple(_shape(var) for var in self.source.invars)

    @property
    def in_dtypes(self) -> tuple[Any, ...]:
        """Dtypes of the inputs."""
        return tuple(aval.dtype for aval in self.in_avals)

    @cached_property
    def in_avals(self) -> tuple[Any, ...]:
        """Abstract values of the inputs, as traced."""
        variables: Any = self.source.invars
        return tuple(var.aval for var in variables)

    @cached_property
    def out_avals(self) -> tuple[Any, ...]:
        """Abstract values of the outputs, as traced."""
        return tuple(var.aval for var in self.source.outvars)

    @cached_property
    def out_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Full shapes of the outputs."""
        return tuple(_shape(var) for var in self.source.outvars)

    @cached_property
    def where(self) -> str:
        """Primitive, module path and source line, for messages."""
        # The line's folder says nothing to a reader and differs from machine to machine.
        line = os.path.basename(summarize(self.source.source_info))
        scope, line = self.scope and f" in {self.scope}", line and f" ({line})"
        return f"`{self.primitive}`{scope}{line}"

    def run(self, *operands: Any) -> list[jax.Array]:
        """Run the traced equation unchanged, on operands of the traced shapes."""
        with self.context:
            results = self.primitive.bind(*operands, **self.primitive.get_bind_params(self.params))
        return list(results) if self.primitive.multiple_results else [results]


@dataclass(frozen=True, eq=False)
class Block:
    """A straight run of equations between inputs and outputs (value ids)."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    equations: tuple[Equation, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A traced function.

    Attributes:
      block: its equations, inputs (leaves first, then arguments) and outputs.
      avals: abstract value per value id: shape, dtype, and sharding where it is part of the type.
      constants: value id to array, for literals and closed-over arrays.
      leaves: the paths of the variables' leaves, in the order of `block.inputs`.
      arguments: names of the other inputs, in order.
      output_paths: tree paths of the outputs.
      output_tree: tree structure of the outputs.
      ambient: the context in which the function was traced; see `Equation.ambient`.
    """

    block: Block
    avals: tuple[Any, ...]
    constants: dict[int, Any]
    leaves: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    output_paths: tuple[str, ...] = ()
    output_tree: Any = None
    ambient: Any = None

    @property
    def leaf_values(self) -> tuple[int, ...]:
        """Value ids of the variables' leaves."""
        return self.block.inputs[: len(self.leaves)]

    @property
    def argument_values(self) -> tuple[int, ...]:
        """Value ids of the other inputs."""
        return self.block.inputs[len(self.leaves) :]

    def is_differentiated(self, value: int) -> bool:
        """Whether a derivative of the outputs by the leaves may pass through a value."""
        return value in self._differentiated

    @cached_property
    def _differentiated(self) -> set[int]:
        reached = {v for v in self.block.outputs if is_smooth(self.avals[v])}
        _add_differentiated(self.block, reached)
        return reached

    def leaves_read(self, output: int | None = None, *, stopped: bool = False) -> list[str]:
        """Paths of the leaves that reach an output.

        Args:
          output: its position; None for any.
          stopped: whether through `stop_gradient` alone is enough.
        """
        needed = set(self.block.outputs if output is None else self.block.outputs[output : output + 1])
        for eqn in reversed(self.block.equations):
            if needed & set(eqn.outputs) and (stopped or eqn.primitive is not p.stop_gradient_p):
                needed.update(eqn.inputs)
        return [path for path, value in zip(self.leaves, self.leaf_values, strict=True) if value in needed]

    def under(self, paths: Sequence[str]) -> list[int]:
        """Positions of the outputs with these tree paths, sub-trees standing for all that is in them.

        Paths of no output are passed over.
        """
        return [i for i, path in enumerate(self.output_paths) if any(_under(path, p) for p in paths)]

    def needed_for(self, outputs: Sequence[int]) -> Block:
        """The block without the equations that these outputs (positions) do not need."""
        values = tuple(self.block.outputs[i] for i in outputs)
        needed, equations = set(values), []
        for eqn in reversed(self.block.equations):
            if not needed.isdisjoint(eqn.outputs):
                needed.update(eqn.inputs)
                equations.append(eqn)
        return Block(self.block.inputs, values, tuple(reversed(equations)))

    def states(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        """Which outputs are the next value of which leaf.

        Args:
          pairs: (output path, leaf path); sub-trees stand for all that is in them.

        Returns:
          (output position, leaf position) for every output under one of the paths whose leaf exists.
        """
        leaf_at = {path: i for i, path in enumerate(self.leaves)}
        found = []
        for position, path in enumerate(self.output_paths):
            for output, leaf in pairs:
                if _under(path, output):
                    name = "/".join(part for part in (leaf, path[len(output) :].strip("/")) if part)
                    if name in leaf_at:
                        found.append((position, leaf_at[name]))
                    break
        return found


# Their derivative is zero, whatever that of their operand.
_FLAT = {p.stop_gradient_p, p.sign_p, p.floor_p, p.ceil_p, p.round_p}


def _add_differentiated(block: Block, reached: set[int]) -> None:
    """Add what a derivative of what is reached in a block passes through: all of a body, if any of it."""
    for eqn in reversed(block.equations):
        if eqn.primitive in _FLAT or reached.isdisjoint(eqn.outputs):
            continue
        if any(map(is_smooth, eqn.out_avals)):
            reached.update(eqn.inputs)
            for body in eqn.bodies:
                reached.update(body.outputs)
                _add_differentiated(body, reached)


def is_smooth(aval: Any) -> bool:
    """Whether a value can have a derivative: its numbers are no integers or flags."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _under(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}/")


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(var.aval.shape)
