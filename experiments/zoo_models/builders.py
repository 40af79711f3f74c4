"""Entries' `build` from a module of some framework and its inputs, abstract or given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .entry import Model

BATCH = 2
Build = Callable[[], Model]


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    """An abstract float32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def random_tokens(*shape: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """Random tokens below `vocabulary`, int32."""
    return np.random.default_rng(seed).integers(0, vocabulary, shape).astype(np.int32)


def abstract_key() -> jax.ShapeDtypeStruct:
    """An abstract random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def linen(module: nn.Module, *args: Any) -> Build:
    """A Flax Linen module."""
    return lambda: (module.apply, jax.eval_shape(module.init, jax.random.key(0), *args), args)


def haiku(forward: Callable[..., Any], *args: Any) -> Build:
    """A function of Haiku modules without state."""

    def build() -> Model:
        net = hk.without_apply_rng(hk.transform(forward))
        return net.apply, jax.eval_shape(net.init, jax.random.key(0), *args), args

    return build


def flax_nnx(make: Callable[[], nnx.Module], *args: Any) -> Build:
    """A Flax NNX module; `make` gives it."""

    def build() -> Model:
        graph, state = nnx.split(nnx.eval_shape(make))
        return (lambda variables, *inputs: nnx.merge(graph, variables)(*inputs)), state, args

    return build


def abstract_equinox(make: Callable[[], Any]) -> tuple[Any, Any]:
    """An Equinox model's abstract arrays, and the rest of it; `eqx.combine` puts them together."""
    return eqx.partition(eqx.filter_eval_shape(make), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


def equinox(make: Callable[[], eqx.Module], *args: Any, keyed: bool = False) -> Build:
    """An Equinox model, mapped over the batch; `keyed`: its last argument is a key for the batch."""

    def build() -> Model:
        arrays, static = abstract_equinox(make)

        def apply(variables: Any, *inputs: Any) -> Any:
            whole = eqx.combine(variables, static)
            if not keyed:
                return jax.vmap(whole)(*inputs)
            *data, key = inputs
            keys = jax.random.split(key, len(data[0]))
            return jax.vmap(lambda *x: whole(*x[:-1], key=x[-1]))(*data, keys)

        return apply, arrays, args

    return build
