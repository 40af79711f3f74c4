"""How much a program computes: the multiply-adds of its contractions and convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compaware_jax.coupling.program import Block, Equation, Program
from compaware_jax.coupling.rules import REGIONS, RULES


@dataclass(frozen=True)
class Work:
    """The multiply-adds of one contraction or convolution.

    Attributes:
      dimensions: axes whose sizes multiply to the multiply-adds, as (value id, axis) pairs; those of one
        dimension run along one another, so it has the indices that all of them keep.
      times: how often it runs in one call: a body of `scan` runs once per step.
    """

    dimensions: tuple[tuple[tuple[int, int], ...], ...]
    times: int


def _bodies(eqn: Equation) -> list[tuple[Block, int]]:
    """The bodies of an equation, and how often each runs in one run of it."""
    region = REGIONS.get(eqn.primitive)
    often = (1,) * len(eqn.bodies) if region is None else region.times(eqn)
    return list(zip(eqn.bodies, often, strict=True))


def each_equation(block: Block, times: int = 1) -> Iterator[tuple[Equation, int]]:
    """The equations of a block, those in its loops and branches included, and how often each runs.

    Args:
      block: of a program.
      times: how often the block itself runs.
    """
    for eqn in block.equations:
        yield eqn, times
        for body, n in _bodies(eqn):
            if n:
                yield from each_equation(body, times * n)


def work_of(program: Program, outputs: Sequence[int] | None = None) -> list[Work]:
    """The contractions and convolutions of a program, those in its loops and branches included.

    Args:
      program: the program.
      outputs: positions of outputs; what none of them needs is not counted. None: all.
    """
    outputs = range(len(program.block.outputs)) if outputs is None else outputs
    return [
        Work(tuple(rule.work(eqn)), times)
        for eqn, times in each_equation(program.needed_for(outputs))
        if (rule := RULES.get(eqn.primitive)) is not None and rule.work is not None
    ]


def contraction_flops(program: Program, outputs: Sequence[int] | None = None) -> int:
    """FLOPs of the contractions and convolutions that outputs need (None: all), two per multiply-add."""
    return sum(
        2 * work.times * math.prod(program.avals[value].shape[axis] for (value, axis), *_ in work.dimensions)
        for work in work_of(program, outputs)
    )


def flops_of(eqn: Equation, shape: Callable[[int], tuple[int, ...]]) -> int:
    """FLOPs of one run of an equation, its bodies included.

    Two per multiply-add of a contraction or convolution, one per element of any other equation.

    Args:
      eqn: the equation.
      shape: gives the shape of a value, by its id.
    """
    rule = RULES.get(eqn.primitive)
    if rule is not None and rule.work is not None:
        return 2 * math.prod(shape(value)[axis] for (value, axis), *_ in rule.work(eqn))
    inside = sum(n * flops_of(inner, shape) for body, n in _bodies(eqn) for inner in body.equations)
    return max((math.prod(shape(value)) for value in (*eqn.inputs, *eqn.outputs)), default=0) + inside
