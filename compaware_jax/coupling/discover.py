"""Discovery: the groups of units of a function, read off its jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compaware_jax.coupling.collect import collect
from compaware_jax.coupling.factors import Cuts
from compaware_jax.coupling.groups import Groups, default_component, leaves_of
from compaware_jax.coupling.model_objects import check_function
from compaware_jax.coupling.program import Program
from compaware_jax.coupling.propagate import analyse
from compaware_jax.coupling.trace import trace
from compaware_jax.errors import RequestError, TraceError
from compaware_jax.garbage import uncollected
from compaware_jax.settings import as_names


@uncollected()
def find_groups(
    apply: Callable[..., Any],
    variables: Any,
    *args: Any,
    components: Callable[[str], str] = default_component,
    released: Sequence[str] = (),
    state_outputs: Mapping[str, str] | None = None,
    deployed: Sequence[str] = (),
    within_heads: bool = False,
    boundary: bool = False,
    inexact: bool = False,
    strict: bool = False,
    **kwargs: Any,
) -> Groups:
    """Find the coupled channels of a function, read off its jaxpr.

    Args:
      apply: pure function, called as ``apply(variables, *args, **kwargs)``.
      variables: pytree of arrays or `jax.ShapeDtypeStruct`.
      *args: example inputs, arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are used.
      components: maps a leaf path such as ``params/encoder/Dense_0/kernel`` to a component's name.
      released: tree paths of outputs whose axes may be cut, e.g. ``("latent",)``, sub-trees standing for all
        that is in them; all other outputs keep their shape.
      state_outputs: maps the tree paths of outputs that are the next value of leaves (running averages,
        an EMA target, a recurrent carry) to the leaves' paths, e.g. ``{"1/batch_stats": "batch_stats"}``;
        sub-trees stand for all that is in them. They come out cut as their leaves are. State that has left
        counts as zero at every call, as masked variables have it, whatever the call before made of it.
      deployed: tree paths of the outputs that the model is used for, sub-trees standing for all that is in
        them, e.g. ``("used",)``; FLOPs are those that they need. None named: all outputs. What only training
        needs, such as the other mode of a batch norm, is cut and returned all the same.
      within_heads: where one axis holds the heads of an attention and their channels, cut the same
        channels of all heads instead of whole heads. (Where they are two axes, both can leave anyway,
        unless the model flattens them: then those of which more can leave.)
      boundary: also let go what kernels read of data inputs and write of outputs that stay: single rows
        and columns that no channel leaves with. The inputs and outputs keep their shape; an input
        feature is no longer read, an output feature is what its bias alone makes of it. The same holds
        inside, wherever an axis of a kernel meets one that stays: of the positions of an image in front
        of a dense layer, if its kernel has them as an axis, (positions, channels, features). Rank such
        units by how they matter to the loss, not by their weights: those of a pixel that is always dark
        are as large as when they were drawn.
      inexact: also release groups whose removal differs from masking (a norm of a removed column). They are
        told by the numbers that dead channels become, zero and what is made of it, where one of them is
        a number at which a function or its derivative is infinite. What else comes in is not known: masked,
        1 / (h + x) is infinite unseen wherever the data x is zero, where the small function is finite.
      strict: raise at a primitive without a rule instead of keeping whole what reaches it.
      **kwargs: further example inputs, by name.

    Returns:
      The `Groups`.

    Raises:
      TraceError: the function cannot be traced with these variables and inputs, or `released`, `deployed`
        or `state_outputs` names no output, or a state differs in shape from its leaf.
      UnknownPrimitiveError: in strict mode, at a primitive without a rule.
      RequestError: `components` is no function to names, or an option is of another kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import compaware_jax as ca
      >>> def mlp(variables, x):
      ...     hidden = jax.nn.relu(x @ variables["first"]["w"] + variables["first"]["b"])
      ...     return hidden @ variables["second"]["w"]
      >>> variables = {
      ...     "first": {"w": jnp.ones((3, 8)), "b": jnp.ones(8)},
      ...     "second": {"w": jnp.ones((8, 2))},
      ... }
      >>> groups = ca.find_groups(mlp, variables, jnp.ones((1, 3)))
      >>> [(g.name, g.units, g.coupling) for g in groups.groups]
      [('first', 8, True)]
    """
    if not callable(components):
        raise RequestError(
            f"find_groups: components={components!r}, expected a function from the path of a leaf to the "
            "name of its component, such as lambda path: path.split('/')[1]."
        )
    check_function(apply, variables, "find_groups")
    program = trace(apply, variables, *args, **kwargs)
    released = as_names(released, "find_groups: released")
    deployed = as_names(deployed, "find_groups: deployed")
    for option, names in (("released", released), ("deployed", deployed)):
        for name in names:
            if not program.under([name]):
                raise TraceError(
                    f"find_groups: {option}={name!r} names no output of the function, which has "
                    f"{list(program.output_paths)}. Pass one of these paths."
                )
    if not isinstance(state_outputs, (Mapping, type(None))):
        raise RequestError(
            f"find_groups: state_outputs={state_outputs!r}, expected a dictionary from paths of outputs to "
            "those of the leaves whose next values they are, such as {'1/batch_stats': 'batch_stats'}."
        )
    pairs = tuple((state_outputs or {}).items())
    states = _checked_states(program, pairs)
    analysis = analyse(
        program,
        released=program.under(released),
        states=states,
        strict=strict,
        cuts=Cuts(within_heads=within_heads, boundary=boundary),
    )
    leaves = leaves_of(variables)
    for leaf in leaves:
        if not isinstance(name := components(leaf.path), str):
            raise RequestError(
                f"find_groups: components({leaf.path!r}) is {name!r}, expected the name of a component."
            )
    return collect(analysis, leaves, components, inexact, released, pairs, deployed)


def _checked_states(program: Program, pairs: tuple[tuple[str, str], ...]) -> list[tuple[int, int]]:
    states = program.states(pairs)
    for output, leaf in pairs:
        if not program.states([(output, leaf)]):
            raise TraceError(
                f"find_groups: state_outputs={{{output!r}: {leaf!r}}} joins no output to a leaf. The "
                f"outputs are {list(program.output_paths)[:8]}, the leaves {list(program.leaves)[:8]}. "
                "Pass paths under which an output's name, put behind the leaf's path, is a leaf."
            )
    for position, leaf in states:
        got = program.avals[program.block.outputs[position]].shape
        expected = program.avals[program.leaf_values[leaf]].shape
        if got != expected:
            raise TraceError(
                f"find_groups: the state `{program.output_paths[position]}` has shape {got}, its leaf "
                f"`{program.leaves[leaf]}` {expected}. A state takes its leaf's place in the next call, so "
                "the shapes must agree."
            )
    return states
