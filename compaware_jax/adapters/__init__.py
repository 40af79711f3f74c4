"""Adapters: from a framework's model object to a pure function of its variables, and back.

`linen`, `nnx`, `haiku` and `equinox` each offer ``functional(model, ...) -> (apply, variables)``, which is
all that `find_groups`, `compress` and `slim` need. `nnx.slimmed` and `equinox.slimmed` give a module back;
`linen.feature_counts` says what to write into a module's configuration. Adapters only split and merge
variables; import the one you need, since Haiku and Equinox are optional.
"""
