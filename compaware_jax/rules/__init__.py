"""Rules: how each primitive ties axes together, and how it runs on smaller arrays."""

from compaware_jax.rules import contraction, elementwise, layout, pieces, reductions
from compaware_jax.rules.registry import RULES, Kept, Rule, Small, register_rule

__all__ = [
    "RULES",
    "Kept",
    "Rule",
    "Small",
    "contraction",
    "elementwise",
    "layout",
    "pieces",
    "reductions",
    "register_rule",
]
