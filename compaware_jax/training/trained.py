"""Which leaves of variables a gradient trains, and one step of an optimizer on them.

Trained are floating-point and complex numbers. Integers, flags and random keys (a quantised base, a counter,
a sparsity pattern) are carried along: they are cut as their channels are, and change only where a loss
returns an update of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from compaware_jax.coupling.program import is_smooth


def trained_part(variables: Any) -> Any:
    """The variables with None in place of what no gradient trains, as optimizers take them."""
    return jax.tree.map(lambda leaf: leaf if is_smooth(leaf) else None, variables)


def with_part(variables: Any, part: Any) -> Any:
    """The variables with their trained leaves from elsewhere.

    Args:
      variables: a pytree of arrays.
      part: as `trained_part` has it.
    """
    leaves, structure = jax.tree.flatten(variables)
    new = iter(jax.tree.leaves(part))
    return jax.tree.unflatten(structure, [next(new) if is_smooth(leaf) else leaf for leaf in leaves])


def value_and_gradients(function: Callable[[Any], Any], variables: Any) -> Any:
    """Like ``jax.value_and_grad(function, has_aux=True)(variables)``, by the trained part alone.

    Returns:
      ``((value, auxiliary), gradients)``, the gradients as `trained_part` has them.
    """

    def of_part(part: Any) -> Any:
        return function(with_part(variables, part))

    return jax.value_and_grad(of_part, has_aux=True)(trained_part(variables))


def descended(
    optimizer: optax.GradientTransformation, state: Any, variables: Any, gradients: Any, value: Any
) -> tuple[Any, Any]:
    """The variables and the optimizer's state one step on.

    Args:
      optimizer: set up as ``optimizer.init(trained_part(variables))``.
      state: its state.
      variables: a pytree of arrays.
      gradients: of a real number, as `trained_part` has them.
      value: that number, which some optimizers ask for.
    """
    part = trained_part(variables)
    asking = optax.with_extra_args_support(optimizer)
    changes, state = asking.update(_ascent(gradients), state, part, value=value)
    return with_part(variables, optax.apply_updates(part, changes)), state


def _ascent(gradients: Any) -> Any:
    """Gradients of a real number as directions in which it rises, which is what optimizers take.

    By a complex variable JAX's gradient is the conjugate of that.
    """
    return jax.tree.map(jnp.conj, gradients)
