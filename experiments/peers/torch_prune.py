"""Which channels Torch-Pruning keeps of a dense autoencoder at given budgets; called by `compare.py`.

    python experiments/peers/torch_prune.py dense.npz kept.json --budgets 0.1 0.05

`dense.npz` holds `kernels` ``w0, w1, …`` (inputs × outputs) and biases ``b0, b1, …`` of the dense layers in
order, the number of the latent layer as `latent`, and `images` (examples × pixels) for gradients. The output
maps each rival to budgets to, per hidden layer, the kept channels. Its ratio counts channels, not
parameters, so the largest ratio of parameters that fits is found by bisection. The latent is left alone, to
the rivals' favour. It runs in an environment with torch and torch-pruning.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable

import numpy as np
import torch
import torch_pruning as tp
from torch import nn

RIVALS: dict[str, tuple[Callable[[], tp.importance.Importance], bool]] = {
    "L2, uniform": (lambda: tp.importance.GroupMagnitudeImportance(p=2), False),
    "L2, global": (lambda: tp.importance.GroupMagnitudeImportance(p=2), True),
    "LAMP, global": (lambda: tp.importance.LAMPImportance(p=2), True),
    "FPGM, uniform": (lambda: tp.importance.FPGMImportance(), False),
    "Taylor, uniform": (lambda: tp.importance.GroupTaylorImportance(), False),
    "Taylor, global": (lambda: tp.importance.GroupTaylorImportance(), True),
    "Hessian, global": (lambda: tp.importance.GroupHessianImportance(), True),
}


class Autoencoder(nn.Module):
    """Dense layers with ReLU between them; none after the latent, a sigmoid at the end."""

    def __init__(self, kernels: list[np.ndarray], biases: list[np.ndarray], latent: int):
        super().__init__()
        self.latent = latent
        self.layers = nn.ModuleList(nn.Linear(*kernel.shape) for kernel in kernels)
        for layer, kernel, bias in zip(self.layers, kernels, biases, strict=True):
            layer.weight.data = torch.tensor(kernel.T.copy())
            layer.bias.data = torch.tensor(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The reconstruction."""
        for number, layer in enumerate(self.layers[:-1]):
            x = layer(x)
            x = x if number == self.latent else torch.relu(x)
        return torch.sigmoid(self.layers[-1](x))


def differentiate(model: Autoencoder, importance: tp.importance.Importance, images: torch.Tensor) -> None:
    """Leave the gradients that an importance asks for."""
    model.zero_grad()
    if isinstance(importance, tp.importance.GroupHessianImportance):
        importance.zero_grad()
        for image in images[:64]:
            model.zero_grad()
            ((model(image[None]) - image[None]) ** 2).mean().backward()
            importance.accumulate_grad(model)
    elif isinstance(importance, tp.importance.GroupTaylorImportance):
        ((model(images) - images) ** 2).mean().backward()


def prune(dense: Autoencoder, images: torch.Tensor, rival: str, ratio: float) -> tuple[int, list[list[int]]]:
    """Parameters left and channels kept per hidden layer at a channel ratio."""
    make, is_global = RIVALS[rival]
    model, importance = copy.deepcopy(dense), make()
    differentiate(model, importance, images)
    kept = [list(range(layer.out_features)) for layer in model.layers[:-1]]
    number = {layer: i for i, layer in enumerate(model.layers)}
    pruner = tp.pruner.MetaPruner(
        model,
        images[:1],
        importance=importance,
        global_pruning=is_global,
        pruning_ratio=ratio,
        ignored_layers=[model.layers[-1], model.layers[model.latent]],
    )
    for group in pruner.step(interactive=True):
        dependency, channels = group[0]
        gone = set(channels)
        layer = number[dependency.target.module]
        kept[layer] = [channel for channel in kept[layer] if channel not in gone]
        group.prune()
    widths = [layer.out_features for layer in model.layers[:-1]]
    assert widths == [len(channels) for channels in kept], (widths, rival)
    return sum(p.numel() for p in model.parameters()), kept


def main() -> None:
    """Prune to every budget with every rival."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense")
    parser.add_argument("kept")
    parser.add_argument("--budgets", type=float, nargs="+", required=True)
    arguments = parser.parse_args()
    data = np.load(arguments.dense)
    layers = len([name for name in data if name.startswith("w")])
    kernels, biases = ([data[f"{kind}{i}"] for i in range(layers)] for kind in "wb")
    dense = Autoencoder(kernels, biases, int(data["latent"]))
    images = torch.tensor(data["images"])
    total = sum(p.numel() for p in dense.parameters())
    result: dict[str, dict[str, list[list[int]]]] = {}
    for rival in RIVALS:
        for budget in arguments.budgets:
            low, high, best = 0.0, 1.0, None
            for _ in range(12):
                middle = (low + high) / 2
                parameters, kept = prune(dense, images, rival, middle)
                if parameters <= budget * total:
                    high, best = middle, kept
                else:
                    low = middle
            if best is not None:
                result.setdefault(rival, {})[str(budget)] = best
    with open(arguments.kept, "w") as file:
        json.dump({"torch-pruning": tp.__version__, "kept": result}, file)


if __name__ == "__main__":
    main()
