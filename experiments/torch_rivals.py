"""The bridge to Torch-Pruning: our dense weights go over, the channels that it keeps come back.

Torch-Pruning runs in an environment of its own (`peers/torch_prune.py`). Its model of the dense preset is of
linear layers, that of the conv preset of convolutions alone: what flattens or unflattens an image is a
convolution over the whole of it, so that channels stay channels.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mnist_task import Preset
from protocol import Seed

Kept = dict[str, dict[str, list[list[int]]]]
"""Per rival and budget, per hidden layer the channels that stay."""

RIVALS = (
    "L2, uniform",
    "L2, global",
    "LAMP, global",
    "FPGM, uniform",
    "Taylor, uniform",
    "Taylor, global",
    "Hessian, global",
)
"""The importances of Torch-Pruning, as `peers/torch_prune.py` names them."""

# Per preset its layers in order, what they are in Torch-Pruning's model, and the shape of the kernel there
# as (height, width, inputs, outputs).
LAYERS: dict[Preset, tuple[tuple[str, str, tuple[int, ...]], ...]] = {
    "dense": (
        ("encoder/dense1", "linear", (784, 512)),
        ("encoder/dense2", "linear", (512, 256)),
        ("encoder/latent", "linear", (256, 32)),
        ("decoder/dense1", "linear", (32, 256)),
        ("decoder/dense2", "linear", (256, 512)),
        ("decoder/image", "linear", (512, 784)),
    ),
    "conv": (
        ("encoder/conv1", "down", (3, 3, 1, 32)),
        ("encoder/conv2", "down", (3, 3, 32, 64)),
        ("encoder/dense1", "whole", (7, 7, 64, 256)),
        ("encoder/latent", "whole", (1, 1, 256, 32)),
        ("decoder/dense1", "whole", (1, 1, 32, 256)),
        ("decoder/dense2", "grow", (7, 7, 256, 64)),
        ("decoder/conv1", "up", (3, 3, 64, 32)),
        ("decoder/image", "up", (3, 3, 32, 1)),
    ),
}
LATENT = {"dense": 2, "conv": 3}


def torch_rivals(seed: Seed, weights: Any, budgets: Sequence[float]) -> Kept:
    """What Torch-Pruning's importances keep of dense weights at budgets.

    Args:
      seed: whose task it is.
      weights: the dense ones.
      budgets: shares of the parameters that may stay.
    """
    config = seed.config
    images = seed.task.batches(jnp.asarray(0))["image"]
    with jax.default_matmul_precision("highest"):
        # It checks that its model gives the same; accelerators multiply float32 in fewer bits by default.
        outputs = seed.task.model.apply(weights, images)["image"]
    arrays = {"images": np.asarray(images), "outputs": np.asarray(outputs), "latent": LATENT[config.model]}
    script = Path(__file__).parent / "peers/torch_prune.py"
    with tempfile.TemporaryDirectory() as folder:
        dense, kept = Path(folder, "dense.npz"), Path(folder, "kept.json")
        np.savez(dense, **arrays, **_layers(config.model, weights))
        files = [str(script), str(dense), str(kept)]
        subprocess.run([str(config.torch_python), *files, "--budgets", *map(str, budgets)], check=True)
        return json.loads(kept.read_text())["kept"]


def _layers(preset: Preset, weights: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = {"kinds": [kind for _, kind, _ in LAYERS[preset]]}
    for i, (path, kind, shape) in enumerate(LAYERS[preset]):
        part, layer = path.split("/")
        kernel = np.asarray(weights["params"][part][layer]["kernel"])
        if kind == "grow":
            # Its outputs are (height, width, channel), behind the inputs.
            height, width, inputs, outputs = shape
            kernel = kernel.reshape(inputs, height, width, outputs).transpose(1, 2, 0, 3)
        arrays[f"w{i}"] = kernel.reshape(shape)
        arrays[f"b{i}"] = np.asarray(weights["params"][part][layer]["bias"])
    return arrays


def channels(seed: Seed, kept: Sequence[Sequence[int]]) -> np.ndarray:
    """Flags over the units of `seed.groups` from the channels kept per hidden layer."""
    units = np.zeros(seed.groups.units, bool)
    for group, indices in zip(seed.groups.groups, kept, strict=True):
        units[group.offset + np.array(indices)] = True
    return units
