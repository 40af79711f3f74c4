"""ResNet-50 with half of its parameters left: forward time beside FLOPs, with and without handy widths.

    python experiments/bench_speed.py

The public dm-haiku ResNet-50 v1 with random weights, float32, compiled; uniform L2 pruning to 50 % of the
parameters, once as it comes and once with `multiple_of=8`. Times are medians over interleaved rounds, as
ratios to the dense model in the same run. It needs the extra: ``pip install -e '.[zoo]'``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import compaware_jax as ca
from compaware_jax.cost import flop_cost, parameter_cost
from compaware_jax.importance import l2
from compaware_jax.search.select import keep_units, uniform_counts
from compaware_jax.tables import text_table

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Args:
    """Settings of the benchmark."""

    size: int = 224
    """Height and width of the images."""
    batch: int = 4
    """Images per call."""
    rounds: int = 15
    """Interleaved rounds."""
    fraction: float = 0.5
    """Parameters that stay."""


def main(args: Args) -> None:
    """Prune, time, print."""
    from zoo_models import convolutional

    build = {entry.name: entry.build for entry in convolutional.ENTRIES}["ResNet-50 v1"]
    apply, shapes, _ = build()
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda s: (
            jnp.asarray(rng.normal(size=s.shape) / np.sqrt(max(np.prod(s.shape[:-1]), 1)), s.dtype) ** 2
        ),
        shapes,
    )
    images = jnp.asarray(rng.random((args.batch, args.size, args.size, 3)), jnp.float32)
    found = ca.find_groups(apply, variables, images)
    runs: dict[str, tuple[Any, Any]] = {"dense": (jax.jit(apply), variables)}
    rows: dict[str, tuple[Any, ...]] = {}
    for name, multiple in (("half", 1), ("half, multiple_of=8", 8)):
        groups = ca.constrain(found, multiple_of=multiple)
        cost, work = parameter_cost(groups), flop_cost(groups)
        counts = uniform_counts(cost, int(args.fraction * cost.total))
        plan = ca.plan_units(groups, keep_units(groups, l2(groups, variables), counts))
        runs[name] = jax.jit(ca.slim(apply, plan)), ca.shrink(variables, plan)
        widths = [len(k) for axes in plan.kept for k in axes if k is not None]
        rows[name] = (
            f"{cost.exact(counts) / cost.total:.2%}",
            f"{work.exact(counts) / work.total:.3f}",
            f"{np.mean([w % 8 == 0 for w in widths]):.0%}",
        )
    times: dict[str, list[float]] = {name: [] for name in runs}
    for f, tree in runs.values():
        jax.block_until_ready(f(tree, images))
    for _ in range(args.rounds):
        for name, (f, tree) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(f(tree, images))
            times[name].append(time.perf_counter() - start)
    dense = float(np.median(times["dense"]))
    lines = [
        (name, *row, f"{np.median(times[name]) / dense:.3f}", f"{1e3 * np.median(times[name]):.3g}")
        for name, row in rows.items()
    ]
    header = ("model", "parameters", "FLOPs ratio", "widths in eights", "time ratio", "ms")
    print(text_table(header, lines, f"ResNet-50 at {args.batch}×{args.size}², dense {1e3 * dense:.3g} ms"))


if __name__ == "__main__":
    main(tyro.cli(Args))
