"""Importance of units: by magnitude, by gradient, by what they pass on, or by the criterion itself.

Every function returns scores over units, shape (units,): the higher, the more the unit matters.
"""

from compaware_jax.importance.activations import activation
from compaware_jax.importance.gradients import (
    Evidence,
    accumulated,
    bayesian,
    curvature,
    fisher,
    gate_gradients,
    no_evidence,
    obd,
    observe,
    taylor,
    taylor2,
)
from compaware_jax.importance.magnitude import fpgm, l1, l2, lamp, random
from compaware_jax.importance.sensitivity import ablation, gradient_sensitivity, group_ablation
from compaware_jax.importance.units import ranks, unit_sum, within_groups

__all__ = [
    "Evidence",
    "ablation",
    "accumulated",
    "activation",
    "bayesian",
    "curvature",
    "fisher",
    "fpgm",
    "gate_gradients",
    "gradient_sensitivity",
    "group_ablation",
    "l1",
    "l2",
    "lamp",
    "no_evidence",
    "obd",
    "observe",
    "random",
    "ranks",
    "taylor",
    "taylor2",
    "unit_sum",
    "within_groups",
]
