"""The other question: not the best model at a budget, but the smallest one that keeps every criterion."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from compaware_jax.compress import Result, compress
from compaware_jax.cost import COSTS, Budget, cost_of
from compaware_jax.coupling.groups import Groups, check_groups
from compaware_jax.errors import BudgetError, CriterionError, RequestError
from compaware_jax.tables import text_table
from compaware_jax.training.criteria import Apply, Criterion, Verdict
from compaware_jax.training.loop import folder_of
from compaware_jax.training.objective import Batches, Loss


class Attempt(NamedTuple):
    """One budget that `smallest` tried: whether every criterion was kept, and what each one had."""

    budget: float
    kept: bool
    verdicts: tuple[Verdict, ...]


def _is_share(number: Any) -> bool:
    return isinstance(number, (int, float, np.number)) and bool(0 < number < 1)


@dataclass(frozen=True)
class Smallest:
    """What `smallest` found.

    Attributes:
      result: the smallest model that keeps every criterion; None if no tried budget below one does.
      tried: the attempts, in their order.
    """

    result: Result | None
    tried: tuple[Attempt, ...]

    def __str__(self) -> str:
        """Every budget that was tried, and what each criterion had there; then the result."""
        names = [verdict.criterion for verdict in self.tried[0].verdicts] if self.tried else []
        rows = [(f"{budget:.2%}", *(v.told for v in verdicts)) for budget, _, verdicts in self.tried]
        end = "No budget that was tried keeps every criterion." if self.result is None else str(self.result)
        return f"{text_table(('budget', *names), rows)}\n\n{end}"


def smallest(
    apply: Apply,
    variables: Any,
    loss: Loss,
    batches: Batches,
    *,
    groups: Groups,
    criteria: Sequence[Criterion],
    held_out: Any,
    cost: str = "parameters",
    start: float = 0.1,
    tolerance: float = 0.1,
    directory: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Smallest:
    """Find the smallest model that keeps every criterion.

    Budgets are halved or doubled from `start` until one keeps the criteria and the next smaller one does
    not, then bisected on a logarithmic scale. Every attempt is a whole `compress`, so what is returned
    has been trained, cut, fine-tuned and measured. With JAX's persistent compilation cache
    (`jax_compilation_cache_dir`) the searches of all budgets share one program, unless a boundary is trimmed.

    Args:
      apply: pure function ``apply(variables, *args)``.
      variables: its trained variables.
      loss: as for `compress`.
      batches: as for `compress`.
      groups: what can leave.
      criteria: what the model must keep; at least one.
      held_out: the batch on which they are measured.
      cost: what "small" means: "parameters", "bytes" or "flops".
      start: first budget, in (0, 1).
      tolerance: stop when the smallest budget that works is within this share of one that does not.
      directory: where to keep checkpoints, one folder per budget; None for none.
      **settings: passed on to `compress`, e.g. ``search=``, ``fine_tune=``, ``key=``.

    Returns:
      The `Smallest`.

    Raises:
      CriterionError: there are no criteria, or the dense model already fails one.
      BudgetError: `start` or `tolerance` is out of range, or `cost` is unknown or zero.
      RequestError, PlanError, TraceError, DivergenceError, CheckpointError: as for `compress`.
    """
    if not criteria:
        raise CriterionError(
            "smallest: there are no criteria, so the smallest model is none. Pass at least one, e.g. "
            "at_least('psnr', psnr, 20.0); for the best model at a given size, call compress."
        )
    if "budget" in settings:
        raise RequestError(
            "smallest: got a budget, which is what it looks for. Leave it out, or call compress; start= is "
            "the first one tried."
        )
    if cost not in COSTS or not (_is_share(start) and _is_share(tolerance)):
        raise BudgetError(
            f"smallest: cost={cost!r}, start={start!r}, tolerance={tolerance!r}; expected one of "
            f"{sorted(COSTS)}, and two numbers in (0, 1)."
        )
    check_groups(groups)
    whole = cost_of(groups, cost)
    # Where everything may be emptied, even nothing is within reach.
    floor = max(whole.floor, 1) / whole.total
    found: dict[float, Result] = {}

    def works(budget: float) -> bool:
        folder = None if directory is None else folder_of(directory, "smallest") / repr(budget)
        found[budget] = compress(
            apply,
            variables,
            loss,
            batches,
            groups=groups,
            budget=Budget(cost, budget),
            criteria=criteria,
            held_out=held_out,
            directory=folder,
            **settings,
        )
        return found[budget].kept

    # The dense model keeps the criteria (compress checks it); below the floor there is no model.
    low, high = floor, 1.0
    budget = max(float(start), floor * (1 + tolerance))
    while high / low > 1 + tolerance and budget < 1:
        if works(budget):
            high = budget
        else:
            low = budget
        doubled, halved = 2 * low, high / 2
        if high == 1.0 and doubled < 1.0 and low > floor:
            budget = doubled
        elif low == floor and halved > floor:
            budget = halved
        else:
            budget = (low * high) ** 0.5
    tried = tuple(Attempt(b, result.kept, result.verdicts) for b, result in found.items())
    kept = [attempt.budget for attempt in tried if attempt.kept]
    return Smallest(found[min(kept)] if kept else None, tried)
