"""Training any function of variables, dense, masked or small, resumably.

`objective` is what training lowers: a loss, with `criteria` as constraints. `trained` says which leaves a
gradient trains, `loop` runs steps in compiled chunks with checkpoints, whatever `interruption` there is,
`fit` puts them together, and `checks` refuses early what cannot work.
"""
