"""Surgery on functions: the small function, and what of it runs wider than the plan has it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compaware_jax.cost import COSTS, Budget, flop_cost
from compaware_jax.coupling.analysis import Analysis
from compaware_jax.coupling.groups import Groups, check_groups
from compaware_jax.coupling.program import Program
from compaware_jax.coupling.propagate import analyse
from compaware_jax.coupling.rules import Kept
from compaware_jax.coupling.rules.arrays import missing, take
from compaware_jax.coupling.trace import flatten, trace
from compaware_jax.coupling.work import contraction_flops, each_equation, flops_of
from compaware_jax.errors import PlanError, gist
from compaware_jax.garbage import uncollected
from compaware_jax.paths import named_leaves
from compaware_jax.placement import sharding_in_type, struct_of
from compaware_jax.settings import as_names
from compaware_jax.surgery.cut_inputs import check_taken, full_shapes, widened
from compaware_jax.surgery.plan import Plan
from compaware_jax.surgery.slimming import run_small, wider_on_shapes
from compaware_jax.surgery.widths import Wider

_LOG = logging.getLogger(__name__)


def slim(
    apply: Callable[..., Any],
    plan: Plan,
    *,
    released: Sequence[str] = (),
    cut_inputs: Mapping[str, Sequence[int | None]] | None = None,
) -> Callable[..., Any]:
    """The small function.

    ``slim(apply, plan)(shrink(variables, plan), *args)`` equals
    ``apply(expand(shrink(variables, plan), plan), *args)`` up to the order of summation.

    The function is traced again for every new input shape, so it takes any batch size, and it composes
    with `jit`, `grad`, `vmap` and `jax.export`. Nothing in the model's code changes. To export a function
    of any batch size, map that of one example: ``jax.vmap(lambda x: small(variables, x[None])[0])`` takes
    a symbolic batch.

    Args:
      apply: the function that the groups were found for, or another function of the same variables.
      plan: what is kept.
      released: tree paths of outputs that come out cut, beside those released to `find_groups`; sub-trees
        stand for all that is in them.
      cut_inputs: further arguments that come in cut, such as the carry of a single step of what the groups
        were found on as a scan: the name of a parameter of `apply`, or a path in it, to the full shape, with
        None for sizes that are as they come, e.g. ``{"carry": (None, 256)}``. What is missing of them
        counts as zero.

    Returns:
      A function of the small variables and the same further arguments as `apply`.

    Raises:
      PlanError: what is given is no function or no plan; or (when called) the variables are not those of the
        plan, or the plan cuts what this function needs whole, or separates what it ties.
    """
    if not callable(apply) or not isinstance(plan, Plan):
        raise PlanError(
            f"slim: got ({type(apply).__name__}, {type(plan).__name__}), expected a function and a Plan: "
            "slim(apply, plan)."
        )
    released = as_names(released, "slim: released")
    widths = full_shapes(cut_inputs)
    runs: dict[Any, tuple[Callable[..., list[jax.Array]], Any]] = {}

    def small_apply(small_variables: Any, *args: Any, **kwargs: Any) -> Any:
        small_leaves, structure = jax.tree.flatten(small_variables)
        check_small(small_variables, plan, "slim")
        full = jax.tree.unflatten(
            structure,
            [
                # The dtype is the small leaf's own: variables may have been cast since the plan was made.
                struct_of(small, jax.dtypes.result_type(small), leaf.shape)
                for leaf, small in zip(plan.leaves, small_leaves, strict=True)
            ],
        )
        rest, rest_structure = jax.tree.flatten((args, kwargs))
        try:
            types = tuple(jax.typeof(x) for x in (*small_leaves, *rest))
        except TypeError as error:
            raise PlanError(
                f"slim: an argument is no array ({gist(error)}). Close over values that are not arrays, with "
                "functools.partial, as for find_groups."
            ) from error
        key = (
            structure,
            rest_structure,
            types,
            jax.sharding.get_abstract_mesh(),
            _numerics(),
        )
        if key not in runs:
            inputs, taken = widened(apply, widths, args, kwargs)
            analysis, alive = _analysed(apply, full, plan, released, taken, *inputs[0], **inputs[1])
            check_taken(analysis, alive, taken, rest)
            run, tree = _settled(analysis, alive, plan, (*small_leaves, *rest)), analysis.program.output_tree
            typed = any(sharding_in_type(x) is not None for x in (*small_leaves, *rest))
            # Outside of jit, types name a mesh but not its devices; they have to be those of the inputs.
            runs[key] = jax.jit(run) if typed and jax.sharding.get_abstract_mesh().empty else run, tree
        run, tree = runs[key]
        return jax.tree.unflatten(tree, run(*(jnp.asarray(x) for x in (*small_leaves, *rest))))

    return small_apply


def _numerics() -> tuple[Any, ...]:
    """What the caller's configuration says of how the same function is computed."""
    names = (
        "jax_enable_x64",
        "jax_default_matmul_precision",
        "jax_numpy_dtype_promotion",
        "jax_default_prng_impl",
        "jax_threefry_partitionable",
    )
    return tuple(getattr(jax.config, name) for name in names)


def _settled(
    analysis: Analysis, alive: np.ndarray, plan: Plan, inputs: Sequence[Any]
) -> Callable[..., list[jax.Array]]:
    """The small program as a function of its inputs, once it is known what has to run wider."""
    before = wider_on_shapes(analysis, alive, inputs)

    def run(*inputs: jax.Array) -> list[jax.Array]:
        return _run(analysis, alive, plan, list(inputs), before)[0]

    return run


@uncollected()
def _analysed(
    apply: Callable[..., Any],
    full: Any,
    plan: Plan,
    released: Sequence[str],
    taken: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> tuple[Analysis, np.ndarray]:
    """The analysis of a function at these input shapes, and which of its classes the plan keeps."""
    program = trace(apply, full, *args, **kwargs)
    for name in released:
        if not program.under([name]):
            raise PlanError(
                f"slim: released={name!r} names no output of the function, which has "
                f"{list(program.output_paths)}. Pass one of these paths."
            )
    chosen = program.under((*released, *plan.released))
    analysis = analyse(
        program,
        released=chosen,
        states=program.states(plan.states),
        taken=taken,
        cuts=plan.cuts,
        settled=True,
    )
    return analysis, _alive(analysis, plan)


def _run(
    analysis: Analysis, alive: np.ndarray, plan: Plan, inputs: list[Any], before: Wider
) -> tuple[list[jax.Array], Wider]:
    outputs, record = run_small(analysis, alive, inputs, before)
    program = analysis.program
    for position, leaf in program.states(plan.states):
        have = analysis.kept(program.block.outputs[position], alive)
        want = analysis.kept(program.leaf_values[leaf], alive)
        outputs[position] = take(outputs[position], missing(want, have))
    return outputs, record


@dataclass(frozen=True)
class Uncut:
    """An equation that the small function runs wider than the plan has it, at full width along some axis.

    Attributes:
      where: primitive, module path and source line.
      flops: its FLOPs in one call as it runs, one per element where it is no contraction; of all its runs
        where it is in a loop.
      again: whether it only runs to rebuild an operand of another one.
    """

    where: str
    flops: int
    again: bool


def uncut(groups: Groups, plan: Plan) -> tuple[Uncut, ...]:
    """What `slim` runs wider for the deployed outputs, because running it small would not be exact.

    Args:
      groups: what could leave, at the input shapes for which they were found.
      plan: what is kept of it.

    Returns:
      The equations, in program order, first those that had to, then those run again for them.

    Raises:
      PlanError: the plan is of another model.
    """
    check_groups(groups)
    if not isinstance(plan, Plan):
        raise PlanError(f"uncut: the plan is {type(plan).__name__}, expected a Plan: uncut(groups, plan).")
    if plan.fingerprint != groups.fingerprint:
        raise PlanError(
            f"uncut: the plan is for the model {plan.fingerprint}, the groups are of {groups.fingerprint}. "
            "Pass the groups that the plan was made from."
        )
    return what_runs(groups, plan)[0]


def what_runs(groups: Groups, plan: Plan) -> tuple[tuple[Uncut, ...], int]:
    """What `uncut` lists, and the FLOPs of one call of the small function.

    They are counted as `cost.flop_cost` counts them, but on the small function's own trace: what runs at full
    width is in them, so they may be more than the cost of the plan's counts.

    Args:
      groups: what could leave, at the input shapes for which they were found.
      plan: what is kept of it.
    """
    program, record = _traced(groups, plan)
    times = dict(each_equation(groups.analysis.program.block))
    needed = dict(each_equation(groups.analysis.program.needed_for(groups.deployed_outputs)))
    ran = tuple(
        Uncut(eqn.where, times.get(eqn, 1) * flops, again)
        for equations, again in ((record.uncut, False), (record.again, True))
        for eqn, flops in equations.items()
        if eqn in needed or eqn not in times
    )
    return ran, contraction_flops(program, groups.deployed_outputs)


def work_in(groups: Groups) -> int:
    """FLOPs of one call of the full function, counted as `Uncut` counts them."""
    program = groups.analysis.program
    needed = program.needed_for(groups.deployed_outputs)
    return sum(flops_of(eqn, lambda value: program.avals[value].shape) for eqn in needed.equations)


def checked_work(groups: Groups, plan: Plan, budget: Budget) -> tuple[tuple[Uncut, ...], int]:
    """What `what_runs` says of a plan for a budget; a warning where it is much more than by its counts."""
    ran, left = what_runs(groups, plan)
    cost = flop_cost(groups)
    planned = cost.exact(np.array([kept for _, kept, _ in plan.counts]))
    over = budget.cost == "flops" and left > budget.limit(groups)
    if ran and (left - planned > 0.01 * cost.total or over):
        _LOG.warning(
            "%.1f %% of the FLOPs are left%s, by the plan's counts %.1f %%: %s runs wider, because a small "
            "result would not be exact, and so does what feeds it. uncut(groups, plan) lists it all; "
            "constrain(groups, whole=...) keeps whole the units that cause it.",
            100 * left / cost.total,
            ", above the budget" if over else "",
            100 * planned / cost.total,
            ran[0].where,
        )
    return ran, left


def costs_left(groups: Groups, plan: Plan, flops: int) -> dict[str, tuple[int, int]]:
    """Per cost its value before and after; that of FLOPs is what the small function runs, as counted."""
    counts = np.array([kept for _, kept, _ in plan.counts])
    made = {name: make(groups) for name, make in COSTS.items()}
    costs = {name: (cost.total, cost.exact(counts)) for name, cost in made.items()}
    return costs | {"flops": (made["flops"].total, flops)}


def _traced(groups: Groups, plan: Plan) -> tuple[Program, Wider]:
    """The small function as a program, and what of it runs wider."""
    program, alive = groups.analysis.program, _alive(groups.analysis, plan)
    full = [program.avals[value] for value in program.leaf_values]
    leaves = [struct_of(leaf, leaf.dtype, plan.small_shape(i)) for i, leaf in enumerate(full)]
    record = Wider()

    def run(*inputs: jax.Array) -> list[jax.Array]:
        nonlocal record
        outputs, record = _run(groups.analysis, alive, plan, list(inputs), before)
        return outputs

    # The types of the inputs may name the mesh under which the groups were found.
    with program.ambient.manager:
        arguments = (program.avals[value] for value in program.argument_values)
        inputs = (*leaves, *(struct_of(aval, aval.dtype) for aval in arguments))
        before = wider_on_shapes(groups.analysis, alive, inputs)
        closed = jax.make_jaxpr(run)(*inputs)
    return flatten(closed, leaves=()), record


def cut_outputs(groups: Groups, plan: Plan, outputs: Any) -> Any:
    """The outputs of the full function, cut as those of the small one come out: state, and what was released.

    Args:
      groups: what could leave.
      plan: what is kept of it.
      outputs: pytree as the function returns it.
    """
    program, alive = groups.analysis.program, _alive(groups.analysis, plan)
    leaves = jax.tree.leaves(outputs)
    kept: list[Kept] = [groups.analysis.kept(value, alive) for value in program.block.outputs]
    for position, leaf in program.states(plan.states):
        kept[position] = groups.analysis.kept(program.leaf_values[leaf], alive)
    return jax.tree.unflatten(
        jax.tree.structure(outputs), [take(x, axes) for x, axes in zip(leaves, kept, strict=True)]
    )


def check_small(small_variables: Any, plan: Plan, caller: str) -> None:
    """Refuse variables that are not the small ones of a plan.

    Raises:
      PlanError: says where they differ first.
    """
    got = [(path, np.shape(leaf)) for path, leaf in named_leaves(small_variables)]
    expected = [(leaf.path, plan.small_shape(i)) for i, leaf in enumerate(plan.leaves)]
    if got != expected:
        wrong = next(
            (pair for pair in zip(got, expected, strict=False) if pair[0] != pair[1]),
            (f"{len(got)} leaves", f"{len(expected)} leaves"),
        )
        raise PlanError(
            f"{caller}: the variables do not fit the plan (fingerprint {plan.fingerprint}): got {wrong[0]}, "
            f"expected {wrong[1]}. Pass shrink(variables, plan) of the model that the plan was made for."
        )


def _alive(analysis: Analysis, plan: Plan) -> np.ndarray:
    """Which classes of a function's analysis the plan keeps."""
    dead = np.zeros(analysis.solution.count, bool)
    needed = np.zeros(analysis.solution.count, bool)
    for position, value in enumerate(analysis.program.leaf_values):
        for axis, index in enumerate(plan.kept[position]):
            if plan.leaves[position].shape[axis] <= 1:
                continue
            factor = next(f for f in analysis.factors[value] if axis in f.axes)
            labels = analysis.solution.labels[factor.ids]
            kept = np.ones(len(labels), bool)
            if index is not None:
                kept = np.isin(np.arange(len(labels)), index)
            dead[labels[~kept]] = True
            needed[labels[kept]] = True
            blocked = labels[~kept & ~analysis.free[labels]]
            if len(blocked):
                raise PlanError(
                    f"slim: the plan cuts axis {axis} of `{plan.leaves[position].path}`, which this "
                    f"function needs whole ({analysis.solution.fixed[blocked[0]]}). Pass the function "
                    "that the groups were found for, or name the output in `released`, the input in "
                    "`cut_inputs`."
                )
    if (dead & needed).any():
        raise PlanError(
            "slim: the plan separates channels that this function ties together. Pass the function that "
            "the groups were found for."
        )
    return ~dead
