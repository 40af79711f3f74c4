"""Block structure that survives a plan: groups of a convolution, of a GroupNorm."""

from __future__ import annotations

import numpy as np

from compaware_jax.errors import PlanError
from compaware_jax.surgery.plan import Plan


def surviving_blocks(plan: Plan, path: str, blocks: int) -> tuple[int, int]:
    """How many of the equal blocks of a leaf's last axis a plan keeps, and of what size.

    Args:
      plan: what is kept.
      path: path of the leaf.
      blocks: number of blocks in the full model, e.g. the `feature_group_count` of a convolution.

    Returns:
      The number of blocks of which something is kept, and what each has left.

    Raises:
      PlanError: no such leaf, or the blocks that stay are of different sizes.
    """
    leaf = leaf_number(plan, path)
    size = plan.leaves[leaf].shape[-1]
    kept = plan.kept[leaf][-1]
    indices = np.arange(size) if kept is None else np.asarray(kept)
    left = np.bincount(indices // (size // blocks), minlength=blocks)
    left = left[left > 0]
    if len(set(left.tolist())) != 1:
        raise PlanError(
            f"`{path}`: its {blocks} groups keep {left.tolist()} channels, which no configuration of the "
            "layer expresses. Use `slim`, which runs any plan."
        )
    return len(left), int(left[0])


def leaf_number(plan: Plan, path: str) -> int:
    """The position of a leaf in a plan.

    Raises:
      PlanError: the plan has no such leaf.
    """
    for position, leaf in enumerate(plan.leaves):
        if leaf.path == path:
            return position
    raise PlanError(
        f"The plan has no leaf `{path}`; its first is `{plan.leaves[0].path}`. Pass the model that the plan "
        "was made for."
    )
