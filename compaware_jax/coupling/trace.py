"""From a function to a flat program: one list of equations, one id per value.

Tracing is abstract (`jax.make_jaxpr` on shapes), so a model larger than memory traces as well. Plain
calls (`jit`, `remat`, closed calls) are inlined. Calls with a custom derivative rule are kept as call
sites, because replacing them by their body would silently change gradients; their body is flattened
beside them, with ids of its own at every call site, and so are the bodies of loops and branches.
What depends on constants alone and is small, such as the positions of a static gather, is evaluated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.export
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import primitives as p

from compaware_jax.coupling.folding import evaluate
from compaware_jax.coupling.program import Block, Checkpoint, Equation, Program
from compaware_jax.errors import TraceError, gist
from compaware_jax.paths import named_leaves, path_name
from compaware_jax.placement import explicit, struct_of


def _primitive_of(function: Callable[..., Any]) -> jex.Primitive:
    return jax.make_jaxpr(function)(0.0).eqns[0].primitive


@jax.custom_batching.custom_vmap
def _mapped(x: jax.Array) -> jax.Array:
    return x + 1


_mapped.def_vmap(lambda size, batched, x: (x + 1, batched[0]))
# Calls that are as good as their bodies, and the parameters that hold these, in some version of JAX.
_INLINED = {
    p.jit_p: ("jaxpr",),
    p.remat_p: ("jaxpr",),
    p.closed_call_p: ("call_jaxpr",),
    _primitive_of(_mapped): ("call",),
    _primitive_of(jax.lax.composite(jnp.sin, "compaware.sin")): ("jaxpr", "call_jaxpr"),
}
_BODIES = {
    p.custom_jvp_call_p: ("call_jaxpr",),
    p.custom_vjp_call_p: ("call_jaxpr",),
    p.scan_p: ("jaxpr",),
    p.while_p: ("cond_jaxpr", "body_jaxpr"),
    p.cond_p: ("branches",),
}
# Larger arrays than this are left to the program: rules look at positions, not at data.
_FOLDED_SIZE = 2**20
# The sum of these comes first in every trace: its context is that in which the function was called.
_MARK = np.float32(0), np.float32(0)
# Drawing bits costs more than it tells.
_NEVER_FOLDED = {p.random_bits_p, p.threefry2x32_p, p.rng_bit_generator_p}


def trace(apply: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any) -> Program:
    """Trace ``apply(variables, *args, **kwargs)`` abstractly.

    Args:
      apply: a pure function of a pytree of arrays and further arrays.
      variables: pytree of arrays or `jax.ShapeDtypeStruct`.
      *args: further positional inputs: pytrees of arrays or `jax.ShapeDtypeStruct`.
      **kwargs: further keyword inputs, likewise.

    Returns:
      The flat `Program`.

    Raises:
      TraceError: a leaf is not an array, or the function cannot be traced with these variables.
    """
    # A Python scalar among the inputs keeps its weak type; among the variables it is no array.
    structs = (
        jax.tree.map_with_path(_abstract, variables),
        *(jax.tree.map_with_path(_input, part) for part in (args, kwargs)),
    )
    names = tuple(name for name, _ in named_leaves(structs[0]))
    if len(set(names)) < len(names):
        twice = next(name for n, name in enumerate(names) if name in names[:n])
        raise TraceError(
            f"trace: two leaves of the variables have the path `{twice}`, expected its own for each. Rename "
            "a key that contains a slash."
        )
    leaves, tree = jax.tree.flatten(structs)
    output: dict[str, Any] = {}

    def flat(*flat_leaves: Any) -> list[Any]:
        jax.lax.add(*_MARK)
        variables, args, kwargs = jax.tree.unflatten(tree, flat_leaves)
        result = apply(variables, *args, **kwargs)
        named, output["tree"] = jax.tree_util.tree_flatten_with_path(result)
        output["paths"] = tuple(path_name(path) for path, _ in named)
        return [leaf for _, leaf in named]

    try:
        closed = jax.make_jaxpr(flat)(*leaves)
    except Exception as error:
        name = getattr(apply, "__qualname__", repr(apply))
        flags = _flags(apply, structs[1], structs[2])
        if flags and isinstance(error, jax.errors.ConcretizationTypeError):
            raise TraceError(
                f"trace: `{name}` decides by {flags}, which are traced like arrays "
                f"({type(error).__name__}). Close over such flags: functools.partial(apply, train=False), or "
                "the keyword arguments of an adapter's `functional`."
            ) from error
        raise TraceError(
            f"trace: `{name}` cannot be traced with these variables and inputs "
            f"({gist(error)}). Expected a pure JAX function "
            "called as apply(variables, *args) with the variables it was initialised with; check that "
            "the tree, the shapes and the order of the arguments fit, and close over static arguments "
            "(a training flag) with functools.partial."
        ) from error
    return flatten(
        closed,
        leaves=names,
        mark=closed.jaxpr.eqns[0],
        arguments=argument_names(apply, structs[1], structs[2]),
        output_paths=output["paths"],
        output_tree=output["tree"],
    )


def _flags(apply: Callable[..., Any], args: Any, kwargs: Any) -> list[str]:
    """Names of the arguments that are flags of Python."""
    names = argument_names(apply, args, kwargs)
    return [n for n, x in zip(names, jax.tree.leaves((args, kwargs)), strict=True) if isinstance(x, bool)]


def argument_names(apply: Callable[..., Any], args: Any, kwargs: Any) -> tuple[str, ...]:
    """Names of the arguments' leaves, by the function's own parameter names where it shows them."""
    try:
        parameters = list(inspect.signature(apply).parameters.values())[1:]
        names = [x.name for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    except (TypeError, ValueError):
        names = []
    names = names[: len(args)] + [f"argument {i + 1}" for i in range(len(names), len(args))]
    parts = [*zip(names, args, strict=True), *sorted(kwargs.items())]
    return tuple(f"{name}/{path}" if path else name for name, part in parts for path, _ in named_leaves(part))


def _input(path: Any, leaf: Any) -> Any:
    return leaf if isinstance(leaf, (bool, int, float, complex)) else _abstract(path, leaf, "input")


def _abstract(path: Any, leaf: Any, what: str = "leaf") -> jax.ShapeDtypeStruct:
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        if any(map(jax.export.is_symbolic_dim, leaf.shape)):
            raise TraceError(
                f"trace: the input `{path_name(path)}` has the symbolic shape {leaf.shape}, expected numbers."
                " To export any batch size, map the function of one example: "
                "jax.export.export(jax.jit(jax.vmap(lambda x: slim(apply, plan)(variables, x[None])[0])))."
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return struct_of(leaf, leaf.dtype)  # typed random keys
        return struct_of(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
    raise TraceError(
        f"trace: the {what} `{path_name(path)}` is {type(leaf).__name__}, expected an array or a "
        "jax.ShapeDtypeStruct. Close over values that are not arrays, e.g. with functools.partial."
    )


def flatten(
    closed: jex.ClosedJaxpr, leaves: tuple[str, ...], *, mark: jex.JaxprEqn | None = None, **names: Any
) -> Program:
    """Flatten a closed jaxpr whose first inputs are the given leaves.

    Args:
      closed: the jaxpr.
      leaves: their paths.
      mark: an equation that is none of the function's, traced in the context in which it was called.
      **names: see `Program`.
    """
    flattener = _Flattener(mark)
    constants = [flattener.constant(c) for c in closed.consts]
    block = flattener.block(closed.jaxpr, constants)
    return Program(
        block=block,
        avals=tuple(flattener.avals),
        constants=flattener.constants,
        leaves=leaves,
        ambient=None if mark is None else mark.ctx,
        **names,
    )


@dataclass(eq=False)
class _Flattener:
    mark: jex.JaxprEqn | None
    avals: list[Any] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    scopes: dict[Any, str] = field(default_factory=dict)

    def value(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def constant(self, array: Any, aval: Any = None) -> int:
        index = self.value(jax.typeof(array) if aval is None else aval)
        self.constants[index] = array
        return index

    def literal(self, literal: jex.Literal) -> int:
        # A literal may be a Python scalar: it has to take the dtype that the trace gave it.
        aval: Any = literal.aval
        return self.constant(np.asarray(literal.val, dtype=aval.dtype), aval)

    def block(self, jaxpr: jex.Jaxpr, constants: list[int], handed_in: Sequence[int] = ()) -> Block:
        env: dict[Any, int] = dict(zip(jaxpr.constvars, constants, strict=True))
        inputs = tuple(self.value(var.aval) for var in jaxpr.invars)
        # What is a constant outside is one inside.
        for inner, outer in zip(inputs, handed_in, strict=False):
            if outer in self.constants:
                self.constants[inner] = self.constants[outer]
        env.update(zip(jaxpr.invars, inputs, strict=True))
        equations = list(self.equations(jaxpr, env, "", ()))
        outputs = tuple(self.read(env, v) for v in jaxpr.outvars)
        return Block(inputs, outputs, _live(equations, outputs))

    def read(self, env: dict[Any, int], var: Any) -> int:
        return self.literal(var) if isinstance(var, jex.Literal) else env[var]

    def equations(
        self, jaxpr: jex.Jaxpr, env: dict[Any, int], scope: str, checkpoints: tuple[Checkpoint, ...]
    ) -> Iterator[Equation]:
        for eqn in jaxpr.eqns:
            if eqn is self.mark:
                continue
            inputs = tuple(self.read(env, var) for var in eqn.invars)
            stack = self.joined(scope, eqn.source_info.name_stack)
            if eqn.primitive in _INLINED:
                body = next(eqn.params[name] for name in _INLINED[eqn.primitive] if name in eqn.params)
                inner, constants = _open(body)
                inner_env = dict(zip(inner.constvars, [self.constant(c) for c in constants], strict=True))
                inner_env.update(zip(inner.invars, inputs, strict=True))
                yield from self.equations(inner, inner_env, stack, (*checkpoints, *_checkpoint(eqn)))
                outputs = tuple(self.read(inner_env, var) for var in inner.outvars)
            else:
                outputs = tuple(self.value(var.aval) for var in eqn.outvars)
                flat = Equation(
                    primitive=eqn.primitive,
                    params=eqn.params,
                    inputs=inputs,
                    outputs=outputs,
                    source=eqn,
                    bodies=tuple(self.bodies(eqn, inputs)),
                    scope=stack,
                    checkpoints=checkpoints,
                    ambient=self.mark is not None and eqn.ctx is self.mark.ctx,
                )
                if not self.fold(flat):
                    yield flat
            env.update(zip(eqn.outvars, outputs, strict=True))

    def joined(self, scope: str, stack: Any) -> str:
        """A scope and a name stack within it, as a path; neighbours mostly have the same."""
        path = self.scopes.get((scope, stack))
        if path is None:
            path = self.scopes[scope, stack] = "/".join(s for s in (scope, str(stack)) if s)
        return path

    def bodies(self, eqn: jex.JaxprEqn, inputs: tuple[int, ...]) -> Iterator[Block]:
        for body, handed_in in zip(_bodies(eqn), _handed_in(eqn, inputs), strict=True):
            jaxpr, constants = _open(body)
            yield self.block(jaxpr, [self.constant(c) for c in constants], handed_in)

    def is_nothing(self, value: int) -> bool:
        """Whether an array has no elements, whatever its inputs are."""
        aval = self.avals[value]
        if 0 not in aval.shape:
            return False
        return not jnp.issubdtype(aval.dtype, jax.dtypes.extended) and explicit(aval.sharding) is None

    def fold(self, eqn: Equation) -> bool:
        """Evaluate an equation of constants alone, where its results are positions, flags or scalars.

        Nothing at all needs no evaluation: padding of no width selects no elements.
        """
        if eqn.bodies or eqn.source.effects or eqn.primitive in _NEVER_FOLDED:
            return False
        if eqn.outputs and all(map(self.is_nothing, eqn.outputs)):
            results = (np.zeros(aval.shape, aval.dtype) for aval in map(self.avals.__getitem__, eqn.outputs))
            self.constants.update(zip(eqn.outputs, results, strict=True))
            return True
        inputs = [self.constants.get(v) for v in eqn.inputs]
        if any(x is None or isinstance(x, Tracer) for x in inputs):
            return False
        for value in eqn.outputs:
            aval = self.avals[value]
            if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
                return False
            size = int(np.prod(aval.shape))
            if size > (1 if jnp.issubdtype(aval.dtype, jnp.inexact) else _FOLDED_SIZE):
                return False
        results = evaluate(eqn, inputs)
        if results is not None:
            self.constants.update(zip(eqn.outputs, results, strict=True))
        return results is not None


def _checkpoint(eqn: jex.JaxprEqn) -> tuple[Checkpoint, ...]:
    """What a call under `jax.checkpoint` asks for; nothing where a derivative has been taken already."""
    if eqn.primitive is not p.remat_p or eqn.params["differentiated"]:
        return ()
    return (Checkpoint(eqn.params["policy"], eqn.params["prevent_cse"]),)


def _bodies(eqn: jex.JaxprEqn) -> list[Any]:
    found = [eqn.params[name] for name in _BODIES.get(eqn.primitive, ())]
    return [body for part in found for body in (part if isinstance(part, tuple) else (part,))]


def _handed_in(eqn: jex.JaxprEqn, inputs: Sequence[int]) -> list[list[int]]:
    """Per body the operands that its first inputs are at every run."""
    if eqn.primitive is p.scan_p:
        return [scan_parts(eqn, inputs)[0]]
    if eqn.primitive is p.while_p:
        condition, body, _ = while_parts(eqn, inputs)
        return [condition, body]
    if eqn.primitive is p.cond_p:
        return [list(inputs[1:])] * len(eqn.params["branches"])
    return [list(inputs)] * len(_bodies(eqn))


def scan_parts(eqn: jex.JaxprEqn, items: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """What a `scan` is given, one item per operand, as constants, initial carry and sequences.

    Told apart by rank, because the parameters that say it changed between JAX versions: a sequence has an
    axis more outside the body than inside.
    """
    inner, _ = _open(eqn.params["jaxpr"])
    sequences = _ranked(eqn.invars, inner.invars)
    carry = len(inner.outvars) - _ranked(eqn.outvars, inner.outvars)
    consts = len(inner.invars) - sequences - carry
    return list(items[:consts]), list(items[consts : consts + carry]), list(items[consts + carry :])


def _ranked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(x.aval.shape) > len(y.aval.shape) for x, y in zip(outside, inside, strict=True))


def while_parts(eqn: jex.JaxprEqn, items: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """What a `while_loop` is given: constants of its condition, of its body, and the initial carry."""
    cond, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    return list(items[:cond]), list(items[cond : cond + body]), list(items[cond + body :])


def _open(jaxpr: Any) -> tuple[jex.Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())


def _live(equations: list[Equation], outputs: tuple[int, ...]) -> tuple[Equation, ...]:
    """The equations that an output or an effect needs: dead code must not tie channels."""
    needed, live = set(outputs), []
    for eqn in reversed(equations):
        if eqn.source.effects or not needed.isdisjoint(eqn.outputs):
            needed.update(eqn.inputs)
            live.append(eqn)
    return tuple(reversed(live))
