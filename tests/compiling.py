"""How tests compile what they only compare: compiling takes most of the time, and fast code none of it."""

from collections.abc import Callable
from typing import Any

import jax

from compaware_jax.law import quick_options

COMPILER = quick_options()
# For processes that train as well: what compiles faster and runs as fast.
FLAGS = " ".join(f"--{name}=false" for name in COMPILER if "fusion" in name)


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled so, in one piece: op by op, every shape of every op is compiled for itself."""
    return jax.jit(f, compiler_options=COMPILER)
