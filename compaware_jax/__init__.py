"""Structured pruning as a JAX function transformation.

`find_groups` reads the coupled channels of a function off its jaxpr; `compress` learns how much of each
to keep while the weights adapt; `shrink` and `slim` are the surgery. See the README for the shortest
example.
"""

from compaware_jax.compress import Result, compress
from compaware_jax.constraints import constrain
from compaware_jax.cost import Budget, flops, nbytes, params
from compaware_jax.coupling.discover import find_groups
from compaware_jax.coupling.groups import Groups
from compaware_jax.coupling.rules import register_rule
from compaware_jax.errors import CompawareError
from compaware_jax.masks import apply_mask, mask
from compaware_jax.search.find import Found, find_plan
from compaware_jax.search.gradient import GradientSearch
from compaware_jax.search.grid import GridSearch
from compaware_jax.search.select import one_shot
from compaware_jax.smallest import Smallest, smallest
from compaware_jax.surgery.optimizers import shrink_optimizer
from compaware_jax.surgery.plan import Plan, plan_units
from compaware_jax.surgery.small_function import slim, uncut
from compaware_jax.surgery.trees import expand, shrink
from compaware_jax.sweep import Front, Point, sweep
from compaware_jax.training.criteria import Criterion, at_least, at_most
from compaware_jax.training.fit import fit

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CompawareError",
    "Criterion",
    "Found",
    "Front",
    "GradientSearch",
    "GridSearch",
    "Groups",
    "Plan",
    "Point",
    "Result",
    "Smallest",
    "apply_mask",
    "at_least",
    "at_most",
    "compress",
    "constrain",
    "expand",
    "find_groups",
    "find_plan",
    "fit",
    "flops",
    "mask",
    "nbytes",
    "one_shot",
    "params",
    "plan_units",
    "register_rule",
    "shrink",
    "shrink_optimizer",
    "slim",
    "smallest",
    "sweep",
    "uncut",
]
