"""What every training asks of a model, a loss and batches, refused early where it cannot work."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compaware_jax.coupling.model_objects import check_function
from compaware_jax.coupling.program import is_smooth
from compaware_jax.coupling.trace import flatten, trace
from compaware_jax.errors import CompawareError, CriterionError, RequestError, TraceError, gist
from compaware_jax.paths import named_leaves
from compaware_jax.settings import real_number
from compaware_jax.training.criteria import Criterion
from compaware_jax.training.loop import digest
from compaware_jax.training.objective import Batches, Loss, trainable, updated, value_and_updates
from compaware_jax.training.trained import trained_part, value_and_gradients, with_part

ASKED = (
    "It is called as f(apply, variables, batch) with the dense, the masked and the small model, and has to "
    "use that `apply` and those `variables`, not the dense model around it."
)

_RESIDENT = "data.resident makes such a function of arrays that fit the device."


def check_functions(apply: Any, loss: Any, batches: Any) -> None:
    """Refuse what cannot be called, or is a model object.

    Raises:
      RequestError, TraceError: says what to pass instead.
    """
    expected = {
        "apply": (apply, "the model as a pure function apply(variables, *args)."),
        "loss": (loss, "a function (apply, variables, batch) -> scalar."),
        "batches": (batches, f"a function step -> batch, pure and jittable. {_RESIDENT}"),
    }
    for name, (given, what) in expected.items():
        if not callable(given):
            raise RequestError(f"{name} is {type(given).__name__}, expected {what}")
    check_function(apply, None, "apply")


def checked_rate(rate: Any, name: str, *, zero: bool = False) -> float:
    """A learning rate as a number; zero, which trains nothing, only where that is allowed.

    Raises:
      RequestError: it is none, or not above zero.
    """
    number = real_number(rate)
    if number is None or not (0 < number < np.inf or (zero and number == 0)):
        least = "zero or above" if zero else "above zero"
        raise RequestError(
            f"{name}={rate!r}, expected a finite number, {least}: it falls on a cosine. For another "
            "schedule pass an optimizer that has it, such as optimizer=optax.adamw(schedule)."
        )
    return number


def optimizer_mark(optimizer: Any, variables: Any, caller: str) -> str | None:
    """What tells an optimizer from others: a hash of the program of its first step; None of None.

    Raises:
      RequestError: it is no optimizer, or none of these variables.
    """
    if optimizer is None:
        return None
    if not isinstance(optimizer, optax.GradientTransformation):
        raise RequestError(
            f"{caller}: optimizer={optimizer!r}, expected an optax.GradientTransformation, such as "
            "optax.adamw(1e-3); optax.MultiSteps has gradient_transformation()."
        )
    check_trainable(variables, caller)

    def first(part: Any) -> Any:
        state = optimizer.init(part)
        asking = optax.with_extra_args_support(optimizer)
        return state, asking.update(part, state, part, value=jnp.float32(1))[1]

    try:
        mark, states = program_mark(first, trained_part(variables))
    except Exception as error:
        raise RequestError(
            f"{caller}: the optimizer fails ({gist(error)}). Expected one that is called as "
            "update(gradients, state, variables), or with value=loss as well, on pytrees like the variables "
            "with None in place of what is not floating-point. Whatever needs more than that needs a loop of "
            "your own; find_plan is the search alone."
        ) from error
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in states)
    if before != after:
        raise RequestError(
            f"{caller}: the optimizer's state has other shapes or dtypes after a step, expected those that "
            "its init makes, as with the optimizers of optax."
        )
    return mark


def program_mark(function: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """What tells a function from others: a hash of its program; and the shapes that it returns.

    Args:
      function: pure, of pytrees of arrays; nothing is computed.
      *args: its arguments.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    # Functions in it, as of custom derivatives, are printed with their addresses.
    text = re.sub(r"0x[0-9a-f]+", "", str(program))
    held = flatten(program, leaves=()).constants.values()
    return digest([np.frombuffer(text.encode(), np.uint8), *held]), shapes


def check_trainable(variables: Any, caller: str) -> None:
    """Refuse variables that no gradient trains.

    Raises:
      RequestError: says which.
    """
    leaves = named_leaves(variables)
    if wrong := [path for path, leaf in leaves if not hasattr(leaf, "dtype")]:
        raise RequestError(
            f"{caller}: {wrong[:3]} are no arrays, expected arrays of JAX or numpy. Close over what is no "
            "number; make arrays of numbers, jnp.asarray(leaf)."
        )
    if not any(is_smooth(leaf) for _, leaf in leaves):
        raise RequestError(
            f"{caller}: the variables have no floating-point array, and no gradient trains others: "
            f"{[f'{path} ({leaf.dtype})' for path, leaf in leaves][:3]}. Quantised weights are trained by a "
            "scale, or by adapters, among the variables."
        )


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def not_finite(tree: Any) -> list[str]:
    """Paths of the arrays that hold values that are not finite."""
    leaves = named_leaves(trained_part(tree))
    finite = jax.device_get(_finite([leaf for _, leaf in leaves]))
    return [path for (path, _), fine in zip(leaves, finite, strict=True) if not fine]


def check_batches(batches: Batches, caller: str) -> None:
    """Refuse batches that are no function of the step, by JAX.

    Raises:
      RequestError: says what tells.
    """
    steps = jnp.int32(0), jnp.int32(1)
    try:
        program = trace(lambda step: batches(step), steps[0])
    except TraceError as error:
        raise RequestError(
            f"{caller}: batches cannot be compiled ({type(error.__cause__ or error).__name__}). Expected a "
            "function that takes its batch by JAX, such as array[index] of a jax.Array; a generator needs "
            f"jax.pure_callback. {_RESIDENT}"
        ) from error
    by_step = bool(program.leaves_read())
    if by_step and not any("callback" in e.primitive.name for e in program.block.equations):
        return
    # One batch for all steps is fine, where it is meant.
    first, second, again = (digest(batches(step)) for step in (*steps, steps[0]))
    if again != first:
        raise RequestError(
            f"{caller}: batches(0) gives another batch each time, expected a pure function of the step: a "
            f"resumed run would see other data. {_RESIDENT}"
        )
    if first != second and not by_step:
        raise RequestError(
            f"{caller}: compiled, batches gives the same batch at every step: what tells them apart is not "
            f"computed from the step by JAX. Expected e.g. jax.random.fold_in(key, step). {_RESIDENT}"
        )


def check_objective(
    apply: Any, variables: Any, loss: Loss, batches: Batches, criteria: Sequence[Criterion], caller: str
) -> None:
    """Refuse a loss, or metrics of criteria, that are not one number; nothing is computed.

    Raises:
      TraceError: the loss.
      CriterionError: a metric.
      RequestError: variables of few bits that the loss trains.
    """
    batch = jax.eval_shape(batches, jnp.int32(0))

    def first(variables: Any, batch: Any) -> Any:
        return value_and_updates(loss, apply, variables, batch)[0]

    try:
        value = jax.eval_shape(first, variables, batch)
    except CompawareError:
        raise
    except Exception as error:
        raise TraceError(
            f"{caller}: the loss fails ({gist(error)}). It is called as loss(apply, variables, batch), the "
            "batch as batches(step) returns it, and compiled: numpy and float() have no place in it."
        ) from error
    _check_number(value, f"{caller}: the loss", TraceError)
    _check_bits(first, variables, batch, caller)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TraceError(f"{caller}: the loss is of {value.dtype}, expected a floating-point number.")
    for criterion in trainable(criteria):
        check_metric(criterion, apply, variables, batch, caller, "a training batch")
        _check_gradient(criterion, apply, variables, batch, caller)


def _check_bits(loss: Callable[..., Any], variables: Any, batch: Any, caller: str) -> None:
    """Refuse to train in so few bits that small steps are lost; what has no gradient may have few."""
    narrow = {
        path: leaf.dtype
        for path, leaf in named_leaves(variables)
        if is_smooth(leaf) and jnp.finfo(leaf.dtype).bits < 32
    }
    if not narrow:
        return
    trained = [f"{p} ({narrow[p]})" for p in trace(loss, variables, batch).leaves_read() if p in narrow]
    if trained:
        raise RequestError(
            f"{caller}: {trained[:3]} have too few bits to be trained, small steps are lost: expected "
            "float32 here and for find_groups, by "
            "jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables). "
            "The function may compute in fewer bits. Cast what comes out. What is frozen, by stop_gradient, "
            "may have them."
        )


def check_metric(
    criterion: Criterion, apply: Any, variables: Any, batch: Any, caller: str, where: str
) -> None:
    """Refuse a metric that cannot be computed on shapes of a batch, or is not one number.

    Args:
      criterion: whose metric it is.
      apply: the function under test.
      variables: its variables.
      batch: of arrays or shapes.
      caller: the function that asks, for messages.
      where: what the batch is, likewise.

    Raises:
      CriterionError: says what happened and what is expected.
    """
    name = f"{caller}: the metric of `{criterion.name}`"
    try:
        value = jax.eval_shape(lambda v, b: criterion.metric(apply, v, b), variables, batch)
    except Exception as error:
        raise CriterionError(
            f"{name} fails on {where} ({gist(error)}). It is called as metric(apply, variables, batch) and "
            "compiled: numpy and float() need jax.pure_callback. A criterion that is not for training "
            "batches, or has no gradient, needs trainable=False: it is asked of held_out alone."
        ) from error
    _check_number(value, name, CriterionError)


def _check_gradient(criterion: Criterion, apply: Any, variables: Any, batch: Any, caller: str) -> None:
    """Refuse to train by a metric that has no gradient, such as a count of hits."""

    def value(variables: Any, batch: Any) -> jax.Array:
        return jnp.asarray(criterion.metric(apply, variables, batch), float)

    def slopes(both: Any) -> Any:
        variables, batch = both
        return value_and_gradients(lambda v: (value(v, batch), None), variables)[1]

    name, told = f"{caller}: the metric of `{criterion.name}`", ""
    if not trace(value, variables, batch).leaves_read(stopped=True):
        raise CriterionError(f"{name} does not depend on the variables. {ASKED}")
    try:
        if trace(slopes, (variables, batch)).leaves_read():
            return
        # They are constants, the same of whatever values.
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (variables, batch))
        if any(bool(slope.any()) for slope in jax.tree.leaves(slopes(nothing))):
            return
    except TraceError as error:
        told = f" ({gist(error.__cause__ or error)})"
    raise CriterionError(
        f"{name} has no gradient in the variables{told}, so that no training keeps it. Pass trainable=False: "
        "it is judged at the end, on held_out alone."
    )


def _check_number(value: Any, name: str, kind: type[CompawareError]) -> None:
    shape = getattr(value, "shape", None)
    if shape != ():
        got = f"is a {type(value).__name__}" if shape is None else f"has shape {shape}"
        raise kind(f"{name} {got}, expected a scalar: one number, such as a mean over the batch.")
    if not any(jnp.issubdtype(value.dtype, real) for real in (jnp.floating, jnp.integer, jnp.bool_)):
        raise kind(f"{name} is of {value.dtype}, expected a real number, such as an absolute value.")


def check_loss(apply: Any, variables: Any, loss: Loss, batches: Batches, caller: str) -> None:
    """Refuse a loss that is not finite from the start, on the first batch.

    Raises:
      TraceError: it is not finite, or its updates do not fit the variables.
    """
    batch = batches(jnp.int32(0))

    def first(variables: Any) -> jax.Array:
        value, updates = value_and_updates(loss, apply, variables, batch)
        updated(variables, updates)
        return value

    value = jnp.asarray(jax.jit(first)(variables))
    if not bool(jnp.isfinite(value)):
        raise TraceError(
            f"{caller}: the loss on batches(0) is {value}, expected a finite number. "
            "Look for values in the data that are not finite, or for a loss without a mean."
        )


def check_metrics(
    apply: Any, variables: Any, batches: Batches, criteria: Sequence[Criterion], caller: str
) -> None:
    """Refuse to train by metrics that are not a number from the start.

    Raises:
      CriterionError: says which.
    """
    trained = trainable(criteria)
    if not trained:
        return
    batch = batches(jnp.int32(0))
    values = jax.jit(lambda v: [c.metric(apply, v, batch) for c in trained])(variables)
    wrong = [c.name for c, value in zip(trained, values, strict=True) if bool(jnp.isnan(value))]
    if wrong:
        raise CriterionError(
            f"{caller}: the metrics of {wrong} are not a number on batches(0), expected numbers to train by. "
            "Look for a root or a logarithm of what may be negative, or for 0/0."
        )


def marks(
    apply: Any, variables: Any, loss: Loss, batches: Batches, criteria: Sequence[Criterion]
) -> dict[str, Any]:
    """What tells a training from others of the same variables, as JSON values.

    Losses and metrics may agree at the start, as those do that compare with the dense model; so they are
    asked nearby as well.
    """
    first = batches(jnp.int32(0))

    def nearby(x: jax.Array) -> jax.Array:
        return x * (1 + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).astype(x.dtype)

    @jax.jit
    def values(variables: Any) -> list[Any]:
        both = variables, with_part(variables, jax.tree.map(nearby, trained_part(variables)))
        losses = [value_and_updates(loss, apply, v, first)[0] for v in both]
        return [*losses, *(c.metric(apply, v, first) for c in trainable(criteria) for v in both)]

    # Machines differ in the last digits.
    told = [f"{float(value):.3g}" for value in values(variables)]
    return {"data": digest([first, batches(jnp.int32(1))]), "loss": told[:2], "metrics": told[2:]}
