"""Where arrays lie: on the host or not, and on which devices once they are cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding


def on_host(array: Any) -> bool:
    """Whether an array's values can be read here and now, without a transfer from an accelerator."""
    if isinstance(array, np.ndarray):
        return True
    return _addressable(array) and all(d.platform == "cpu" for d in array.devices())


def is_spread(array: Any) -> bool:
    """Whether an array lies in parts on several devices, all of them this process's."""
    return _addressable(array) and len(array.devices()) > 1


def place_of(array: Any, shape: Sequence[int]) -> Sharding | None:
    """Where an array goes that takes the place of another one; None where that one had no place of its own.

    Args:
      array: the other one, a `jax.Array` or `jax.ShapeDtypeStruct`.
      shape: of what takes its place.

    Returns:
      The same sharding; axes that their part of the mesh does not divide any more are replicated over it.
    """
    sharding = array.sharding if getattr(array, "committed", True) else None
    return dividing(sharding, shape) if isinstance(sharding, NamedSharding) else sharding


def dividing(sharding: Any, shape: Sequence[int]) -> NamedSharding | None:
    """A sharding, None for none, without the mesh axes that do not divide a shape."""
    if not isinstance(sharding, NamedSharding):
        return None
    entries = []
    for size, names in zip(shape, sharding.spec, strict=False):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        while size % math.prod(sharding.mesh.shape[name] for name in names):
            names = names[:-1]
        entries.append(names or None)
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)


def sharding_in_type(array: Any) -> NamedSharding | None:
    """The sharding of an array, a tracer or an abstract value, where it is part of its type.

    That is so along the explicit axes of a mesh, as `jax.make_mesh` makes them.
    """
    aval = jax.typeof(array) if isinstance(array, (jax.Array, np.ndarray)) else array
    return explicit(getattr(aval, "sharding", None))


def explicit(sharding: Any) -> NamedSharding | None:
    """A sharding that is part of types; None for any other."""
    named = isinstance(sharding, NamedSharding)
    return sharding if named and AxisType.Explicit in sharding.mesh.axis_types else None


def replicated(array: Any) -> Any:
    """The array, whole on all devices where its sharding is part of its type."""
    sharding = sharding_in_type(array)
    if sharding is None:
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def resharded(array: Any, axis: int, change: Callable[[Any], Any]) -> Any:
    """What a change of an array's size along an axis gives, sharded as the array is.

    Where its sharding is part of its type, the axis is whole on all devices during the change.
    """
    sharding = sharding_in_type(array)
    if sharding is None or axis >= len(sharding.spec) or sharding.spec[axis] is None:
        return change(array)
    whole = PartitionSpec(*(None if a == axis else names for a, names in enumerate(sharding.spec)))
    result = change(jax.sharding.reshard(array, NamedSharding(sharding.mesh, whole)))
    return jax.sharding.reshard(result, dividing(sharding, result.shape))


def struct_of(array: Any, dtype: Any, shape: Sequence[int] | None = None) -> jax.ShapeDtypeStruct:
    """The shape of an array, or another one, with a dtype, sharded as far as that is part of its type.

    An array that gives way to the dtypes that it meets, such as `jnp.array(2.0)`, does so as well.
    """
    shape = np.shape(array) if shape is None else tuple(shape)
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=dividing(sharding_in_type(array), shape), weak_type=is_weak(array)
    )


def is_weak(array: Any) -> bool:
    """Whether an array, or an abstract one, gives way to the dtypes that it meets."""
    return getattr(array, "weak_type", False)


def weakened(array: jax.Array) -> jax.Array:
    """The same array, giving way to the dtypes that it meets."""
    weak = jnp.full(array.shape, array.dtype.type(0).item())
    return weak.at[...].set(array) if weak.dtype == array.dtype else array


def _addressable(array: Any) -> bool:
    concrete = isinstance(array, jax.Array) and not isinstance(array, Tracer)
    return concrete and array.is_fully_addressable
