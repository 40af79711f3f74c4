"""How tests compile what they only compare: compiling takes most of the time, and fast code none of it."""

COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
