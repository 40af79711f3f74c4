"""How much a program computes: the multiply-adds of its contractions and convolutions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from compaware_jax.program import Block, Equation, Program
from compaware_jax.rules import REGIONS, RULES


@dataclass(frozen=True)
class Work:
    """The multiply-adds of one contraction or convolution.

    Attributes:
      where: primitive, module path and source line.
      dimensions: axes whose sizes multiply to the multiply-adds, as (value id, axis) pairs; those of one
        dimension run along one another, so it has the indices that all of them keep.
      times: how often it runs in one call: a body of `scan` runs once per step.
    """

    where: str
    dimensions: tuple[tuple[tuple[int, int], ...], ...]
    times: int


def work_of(program: Program) -> list[Work]:
    """The contractions and convolutions of a program, those in its loops and branches included."""

    def walk(block: Block, times: int) -> Iterator[Work]:
        for eqn in block.equations:
            rule, region = RULES.get(eqn.primitive), REGIONS.get(eqn.primitive)
            if rule is not None and rule.work is not None:
                yield Work(eqn.where, tuple(rule.work(eqn)), times)
            often = (1,) * len(eqn.bodies) if region is None else region.times(eqn)
            for body, n in zip(eqn.bodies, often, strict=True):
                if n:
                    yield from walk(body, times * n)

    return list(walk(program.block, 1))


def contraction_flops(program: Program) -> int:
    """FLOPs of the contractions and convolutions of a program, two per multiply-add."""
    return sum(
        2 * work.times * math.prod(program.avals[value].shape[axis] for (value, axis), *_ in work.dimensions)
        for work in work_of(program)
    )


def flops_of(eqn: Equation) -> int:
    """FLOPs of one equation at full width: two per multiply-add of contractions, else one per element."""
    rule = RULES.get(eqn.primitive)
    if rule is not None and rule.work is not None:
        shapes = dict(zip((*eqn.inputs, *eqn.outputs), (*eqn.in_shapes, *eqn.out_shapes), strict=True))
        return 2 * int(np.prod([shapes[value][axis] for (value, axis), *_ in rule.work(eqn)]))
    inside = sum(flops_of(inner) for body in eqn.bodies for inner in body.equations)
    return max((int(np.prod(shape)) for shape in (*eqn.in_shapes, *eqn.out_shapes)), default=0) + inside
