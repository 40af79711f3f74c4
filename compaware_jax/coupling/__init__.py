"""Which channels leave together, read off the jaxpr of a function.

`trace` makes a flat `program` of the function, whose constants are folded (`folding`). `propagate` hands
out atoms, one per index of every axis, and asks the coupling rule of each primitive (`rules`) which of them
live and die together; `factors` says what is known of a value, `operands` where several meet, the `ledger`
collects the equalities. The solved `analysis` is collected into `groups` of units. All of it starts in
`discover`.
"""
