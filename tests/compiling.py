"""How tests compile what they only compare: compiling takes most of the time, and fast code none of it."""

from collections.abc import Callable
from typing import Any

import jax


def _known(option: str) -> bool:
    """Whether this version of XLA has a compile option."""
    try:
        jax.jit(lambda x: x, compiler_options={option: False}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Where there is another way to fuse, it takes half of the time; some functions of float64 are then good to
# 1e-11 only.
_OTHER = [name for name in ["xla_cpu_use_fusion_emitters"] if _known(name)]
COMPILER |= dict.fromkeys(_OTHER, False)
# For processes that train as well: what compiles faster and runs as fast.
FLAGS = " ".join(f"--{name}=false" for name in _OTHER)


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled so, in one piece: op by op, every shape of every op is compiled for itself."""
    return jax.jit(f, compiler_options=COMPILER)
