"""Rules: how each primitive ties axes together, and how it runs on smaller arrays."""

from compaware_jax.rules import (
    contraction,
    control,
    convolution,
    elementwise,
    indexing,
    joining,
    layout,
    opaque,
    ordering,
    pieces,
    reductions,
    windows,
    writing,
)
from compaware_jax.rules.registry import REGIONS, RULES, Kept, Parts, RegionRule, Rule, Small, register_rule

__all__ = [
    "REGIONS",
    "RULES",
    "Kept",
    "Parts",
    "RegionRule",
    "Rule",
    "Small",
    "contraction",
    "control",
    "convolution",
    "elementwise",
    "indexing",
    "joining",
    "layout",
    "opaque",
    "ordering",
    "pieces",
    "reductions",
    "register_rule",
    "windows",
    "writing",
]
