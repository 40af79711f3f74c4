"""From a plan to a smaller model: its variables, its optimizer state, and the function itself.

A `plan` says what is kept. `trees` cuts whatever is shaped like the variables, where `matching` finds it in a
tree; `optimizers` cuts the state of an optimizer. `small_function` runs the program on the smaller arrays,
further arguments that come in cut (`cut_inputs`) included: `slimming` reads each equation by its rule, wider
where it would not be exact otherwise, `widths` finds values of one width among those of others, and
`small_derivatives` has the derivative rules of calls.
"""
