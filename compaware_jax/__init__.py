"""Structured pruning as a JAX function transformation."""

from compaware_jax.cost import Budget, flops, nbytes, params
from compaware_jax.groups import Group, Groups, find_groups
from compaware_jax.masks import apply_mask, mask
from compaware_jax.plan import Plan, plan_units
from compaware_jax.rules import register_rule
from compaware_jax.surgery import expand, shrink, slim
