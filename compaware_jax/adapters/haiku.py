"""Haiku: a transformed function as a pure function of its variables."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax

try:
    import haiku as hk
except ImportError as error:
    raise ImportError(
        "compaware_jax.adapters.haiku needs Haiku, which is not installed: pip install dm-haiku"
    ) from error

from compaware_jax.adapters.rebuilt import check_rebuilt
from compaware_jax.errors import TraceError

__all__ = ["check_rebuilt", "functional"]


def functional(
    transformed: Any,
    params: Any,
    state: Any = None,
    *,
    rng: Any = None,
    updates: bool = False,
    **static_kwargs: Any,
) -> tuple[Callable[..., Any], Any]:
    """A transformed function as a pure function of its variables.

    Args:
      transformed: what `hk.transform` or `hk.transform_with_state` returned, the former also wrapped in
        `hk.without_apply_rng`.
      params: the parameters.
      state: the state, for `hk.transform_with_state`.
      rng: random key, closed over; needed only where the model draws random numbers, see below.
      updates: whether the function returns (output, new state) instead of the output; with state only.
        Find the groups on this function in training mode, with ``state_outputs={"1": "state"}``: a plan
        then cuts all of the state. (hk.BatchNorm reads one part of it in training and another in
        evaluation, and what a function never reads is not cut along.)
      **static_kwargs: keyword arguments of the call that are not arrays, e.g. ``is_training=False``.

    Returns:
      The function ``apply(variables, *args, reseed=None)`` and the variables: `params` as they are, or with
      state ``{"params": params, "state": state}``. A model that draws random numbers draws the same ones at
      every call, unless it is given a random key as `reseed`, e.g. from the batch. Only the parameters have
      a gradient, so that `compress` leaves running means as they are. Shrunken variables are the parameters
      (and state) of the network built at the smaller widths.

    Raises:
      TraceError: the model is no transformed function, or state is missing or given in vain.

    Example:
      >>> import haiku as hk, jax, jax.numpy as jnp, compaware_jax as ca
      >>> from compaware_jax.adapters import haiku as adapter
      >>> net = hk.transform(lambda x: hk.nets.MLP([8, 2])(x))
      >>> params = net.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> apply, variables = adapter.functional(net, params)
      >>> groups = ca.find_groups(apply, variables, jnp.ones((1, 3)))
      >>> plan = ca.plan_units(groups, jnp.arange(8) < 5)
      >>> small = hk.transform(lambda x: hk.nets.MLP([5, 2])(x))
      >>> small.apply(ca.shrink(params, plan), None, jnp.ones((4, 3))).shape
      (4, 2)
    """
    if isinstance(transformed, hk.TransformedWithState):
        if state is None:
            raise TraceError(
                "haiku.functional: got a TransformedWithState without its state. Pass "
                "functional(transformed, params, state) with both results of transformed.init."
            )
        with_state = transformed.apply

        def apply_with_state(variables: Any, *args: Any, reseed: Any = None, **kwargs: Any) -> Any:
            still, key = jax.lax.stop_gradient(variables["state"]), rng if reseed is None else reseed
            output, new = with_state(variables["params"], still, key, *args, **static_kwargs, **kwargs)
            if not updates:
                return output
            # A state that is written but not read (an average, in training) is tied to its next value too.
            return output, jax.tree.map(lambda o, n: jax.lax.select(True, n, o), still, new)

        return apply_with_state, {"params": params, "state": state}
    if not isinstance(transformed, hk.Transformed):
        raise TraceError(
            f"haiku.functional: got a {type(transformed).__name__}, expected what hk.transform or "
            "hk.transform_with_state returns. Of hk.multi_transform, pass "
            "hk.Transformed(transformed.init, f) with one of the functions f of transformed.apply."
        )
    if state is not None or updates:
        raise TraceError(
            "haiku.functional: got state or updates=True for a Transformed, which has no state. Leave them "
            "out, or use hk.transform_with_state."
        )
    plain = transformed.apply
    # What hk.without_apply_rng returns takes no random key.
    takes_key = list(inspect.signature(plain).parameters)[1:2] == ["rng"]

    def apply(variables: Any, *args: Any, reseed: Any = None, **kwargs: Any) -> Any:
        keys = (rng if reseed is None else reseed,) if takes_key else ()
        return plain(variables, *keys, *args, **static_kwargs, **kwargs)

    return apply, params
