"""How much of each group to keep.

`coefficients` are soft counts per group; the searches for them are `gradient`, jointly with the weights,
and `grid`. Before one, `boundary` lets go what the loss hardly notices of inputs and outputs; after it,
`select` rounds to whole units on the budget. `request` and `rehearsal` refuse early what cannot work, `job`
tells requests apart, and `find` runs it all.
"""
