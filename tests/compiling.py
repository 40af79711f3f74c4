"""How tests compile what they only compare: compiling takes most of the time, and fast code none of it."""

from collections.abc import Callable
from typing import Any

import jax

COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled so, in one piece: op by op, every shape of every op is compiled for itself."""
    return jax.jit(f, compiler_options=COMPILER)
