"""The coupling analysis and the law on public model architectures, nothing simplified.

    python experiments/zoo.py                      # every model, 5 random plans each
    python experiments/zoo.py --only resnet vit    # some
    python experiments/zoo.py --plans 0            # the analysis alone, in a minute

Per model: equations, groups, units (and how many a hand count of its layers allows), the share of the
parameters that can be pruned, seconds of discovery, the largest relative error of the law over the random
plans (float64, outputs and gradients; bound 1e-10), what runs un-cut and its share of the FLOPs, and why
the other axes stay whole. It writes `runs/zoo/zoo.json`, a row at a time, and `runs/zoo/zoo.md`.

It needs the extra: ``pip install -e '.[zoo]'``.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import compaware_jax as ca
from compaware_jax.cost import parameter_cost
from compaware_jax.law import law_errors, random_keep
from compaware_jax.surgery.small_function import work_in
from compaware_jax.tables import markdown_table, text_table

sys.path.insert(0, str(Path(__file__).parent))
from zoo_models.entry import Entry

BOUND = 1e-10
# Compiling takes most of the time; what is compared does not need fast code.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True)
class Args:
    """Settings of the zoo."""

    only: tuple[str, ...] = ()
    """Models whose name contains one of these (any case); default all."""
    plans: int = 5
    """Random plans per model."""
    output: Path = Path("runs/zoo")
    """Where the table goes."""
    strict: bool = False
    """Raise at a primitive without a rule."""


@dataclass(frozen=True)
class Row:
    """What was measured of one model; see the module's docstring."""

    name: str
    source: str
    equations: int
    groups: int
    units: int
    units_by_hand: int
    by_hand: str
    parameters: int
    prunable: float
    seconds: float
    law: float | None
    uncut: list[str]
    uncut_flops: float
    fixed: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def entries() -> tuple[Entry, ...]:
    """All models of the zoo."""
    from zoo_models import (
        agents,
        convolutional,
        decoders,
        encoders,
        generative,
        recurrent,
        structures,
        vision_transformers,
    )

    kinds = (
        convolutional, vision_transformers, decoders, encoders, recurrent, generative, agents, structures,
    )  # fmt: skip
    return tuple(entry for kind in kinds for entry in kind.ENTRIES)


def draw(tree: Any, rng: np.random.Generator) -> Any:
    """Random float64 arrays for abstract leaves: of order one per unit, variances positive."""

    def leaf(path: Any, x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return np.asarray(x, float) if np.issubdtype(np.asarray(x).dtype, np.floating) else x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return rng.integers(0, 8, x.shape).astype(x.dtype)
        if jnp.issubdtype(x.dtype, jnp.bool_):
            return rng.random(x.shape) < 0.5
        name = jax.tree_util.keystr(path).lower()
        if "var" in name or "counter" in name:
            return 0.5 + rng.random(x.shape)
        fan_in = int(np.prod(x.shape[:-1])) if len(x.shape) > 1 else 4
        return rng.normal(size=x.shape) / np.sqrt(max(fan_in, 1))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def measure(entry: Entry, plans: int, strict: bool) -> Row:
    """One row of the table."""
    apply, variables, args = entry.build()
    wide = jax.tree.map(_widened, variables)
    rng = np.random.default_rng(0)
    inputs = draw(args, rng)
    ca.find_groups(apply, wide, *inputs)  # Once for the traces that JAX caches, once for the time.
    start = time.perf_counter()
    groups = ca.find_groups(apply, wide, *inputs, strict=strict)
    seconds = time.perf_counter() - start
    cost = parameter_cost(groups)
    arrays = draw(wide, rng) if plans else None
    keeps, share, where = [random_keep(groups, rng) for _ in range(max(plans, 1))], 0.0, Counter()
    for keep in keeps:
        ran = ca.uncut(groups, ca.plan_units(groups, keep))
        share = max(share, sum(u.flops for u in ran) / work_in(groups))
        where.update({u.where for u in ran if not u.again})
    law = None
    if plans:
        stacked = np.stack(keeps)
        law = max(law_errors(apply, arrays, *inputs, keep=stacked, groups=groups, compiler_options=COMPILER))
        jax.clear_caches()
    return Row(
        name=entry.name,
        source=entry.source,
        equations=len(groups.analysis.program.block.equations),
        groups=len(groups.groups),
        units=groups.units,
        units_by_hand=entry.units,
        by_hand=entry.by_hand,
        parameters=cost.total,
        prunable=1 - cost.floor / cost.total,
        seconds=seconds,
        law=law,
        uncut=sorted(where),
        uncut_flops=share,
        fixed=dict(Counter(axis.kind for axis in groups.fixed).most_common()),
        unknown=list(groups.analysis.unknown),
    )


def _widened(x: Any) -> Any:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(x.shape, jnp.float64 if floating else x.dtype)


HEADER = (
    "model", "eqns", "groups", "units", "by hand", "prunable", "s", "law", "un-cut", "FLOPs", "fixed",
)  # fmt: skip


def cells(row: Row) -> tuple[object, ...]:
    """A row of the table."""
    return (
        row.name,
        row.equations,
        row.groups,
        row.units,
        row.units_by_hand,
        f"{row.prunable:.1%}",
        f"{row.seconds:.2f}",
        "–" if row.law is None else f"{row.law:.1e}",
        len(row.uncut),
        f"{row.uncut_flops:.1%}",
        "; ".join(f"{n}× {reason}" for reason, n in row.fixed.items()),
    )


def table(rows: list[Row]) -> str:
    """The rows as text."""
    title = f"{len(rows)} models; law: largest relative error, bound {BOUND:g}"
    return text_table(HEADER, [cells(row) for row in rows], title)


def markdown(rows: list[Row]) -> str:
    """The rows as Markdown, with how the units were counted by hand and what runs wider than the plan."""
    more = [
        (*cells(row), row.by_hand, "; ".join(where.split(" (")[0] for where in row.uncut[:3])) for row in rows
    ]
    return markdown_table((*HEADER, "the count by hand", "un-cut, first of them"), more)


def main(args: Args) -> None:
    """Measure every model, write and print the table."""
    jax.config.update("jax_enable_x64", True)
    chosen = [e for e in entries() if not args.only or any(o.lower() in e.name.lower() for o in args.only)]
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for entry in chosen:
        start = time.perf_counter()
        rows.append(measure(entry, args.plans, args.strict))
        print(table(rows[-1:]), f"({time.perf_counter() - start:.0f} s)", flush=True)
        (args.output / "zoo.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    (args.output / "zoo.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    print(table(rows))
    wrong = [row.name for row in rows if row.law is not None and row.law > BOUND]
    short = [row.name for row in rows if row.units < row.units_by_hand]
    print(f"above {BOUND:g}: {wrong or 'none'}; fewer units than counted by hand: {short or 'none'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
