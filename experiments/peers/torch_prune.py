"""Which channels Torch-Pruning keeps of a dense autoencoder at given budgets; called by `torch_rivals.py`.

    python experiments/peers/torch_prune.py dense.npz kept.json --budgets 0.1 0.05

`dense.npz` holds, per layer in order, what it is (`kinds`), its kernel ``w0, w1, …`` ((inputs, outputs) or
(height, width, inputs, outputs)) and its bias ``b0, b1, …``; the number of the latent layer as `latent`; and
`images` (examples, height, width, 1) for gradients, with the `outputs` that the model must give. What is
written maps each rival to budgets to, per hidden layer, the kept channels. Torch-Pruning's ratio counts
channels, not parameters, so the smallest one with which the parameters fit is found by bisection. The latent
is left alone. A layer that a global ranking would empty is left whole by Torch-Pruning. It runs in an
environment with torch and torch-pruning.
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
    """A chain of layers with ReLU between them; none after the latent, a sigmoid at the end.

    Attributes:
      layers: linear, or convolutions of stride 2, or over a whole image.
      latent: the number of the latent layer.
      pairs: per layer the weights that one input channel has with one output channel.
      biases: per layer the biases of one output channel.
    """

    def __init__(self, kinds: list[str], kernels: list[np.ndarray], biases: list[np.ndarray], latent: int):
        super().__init__()
        self.kinds, self.latent = kinds, latent
        self.layers = nn.ModuleList(LAYERS[k](w) for k, w in zip(kinds, kernels, strict=True))
        self.pairs = [int(np.prod(kernel.shape[:-2])) for kernel in kernels]
        self.biases = [bias.size // kernel.shape[-1] for kernel, bias in zip(kernels, biases, strict=True)]
        # A layer whose channels have several biases adds them as a constant.
        self.offsets: list[torch.Tensor | None] = []
        for layer, kind, kernel, bias in zip(self.layers, kinds, kernels, biases, strict=True):
            layer.weight.data = weight(kind, kernel)
            grown = bias.size > kernel.shape[-1]
            layer.bias.data = torch.zeros(kernel.shape[-1]) if grown else torch.tensor(bias)
            image = torch.tensor(bias).reshape(*kernel.shape[:-2], -1).movedim(-1, 0) if grown else None
            self.offsets.append(image)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The reconstruction."""
        for number, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True)):
            size = x.shape[-1]
            # Padding "same" of a stride of 2 is one-sided.
            x = layer(nn.functional.pad(x, (0, 1, 0, 1)) if kind == "down" else x)
            x = x[..., : 2 * size, : 2 * size] if kind == "up" else x
            offset = self.offsets[number]
            x = x if offset is None else x + offset
            if number < len(self.layers) - 1:
                x = x if number == self.latent else torch.relu(x)
        return torch.sigmoid(x)

    def parameters_of(self, widths: list[int]) -> int:
        """The number of parameters with these output channels of the layers."""
        inputs = [self.inputs, *widths[:-1]]
        sizes = zip(self.pairs, self.biases, inputs, widths, strict=True)
        return sum((pair * before + bias) * width for pair, bias, before, width in sizes)

    @property
    def inputs(self) -> int:
        """Input channels of the model, which stay."""
        first = self.layers[0]
        return first.in_features if self.kinds[0] == "linear" else first.in_channels

    @property
    def widths(self) -> list[int]:
        """Output channels of all layers."""
        return [getattr(layer, "out_features", None) or layer.out_channels for layer in self.layers]


LAYERS: dict[str, Callable[[np.ndarray], nn.Module]] = {
    "linear": lambda w: nn.Linear(*w.shape),
    "down": lambda w: nn.Conv2d(*w.shape[2:], w.shape[:2], stride=2),
    "whole": lambda w: nn.Conv2d(*w.shape[2:], w.shape[:2]),
    "grow": lambda w: nn.ConvTranspose2d(*w.shape[2:], w.shape[:2]),
    "up": lambda w: nn.ConvTranspose2d(*w.shape[2:], w.shape[:2], stride=2),
}


def weight(kind: str, kernel: np.ndarray) -> torch.Tensor:
    """A kernel in PyTorch's layout."""
    if kind == "linear":
        return torch.tensor(kernel.T.copy())
    if kind in ("down", "whole"):
        return torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
    # Flax does not flip the kernel of a transposed convolution.
    flipped = kernel[::-1, ::-1] if kind == "up" else kernel
    return torch.tensor(flipped.transpose(2, 3, 0, 1).copy())


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
    kept = [list(range(width)) for width in model.widths[:-1]]
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
    assert model.widths[:-1] == [len(channels) for channels in kept], (model.widths, rival)
    return dense.parameters_of(model.widths), kept


def main() -> None:
    """Prune to every budget with every rival."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense")
    parser.add_argument("kept")
    parser.add_argument("--budgets", type=float, nargs="+", required=True)
    arguments = parser.parse_args()
    data = np.load(arguments.dense)
    kinds = data["kinds"].tolist()
    kernels, biases = ([data[f"{letter}{i}"] for i in range(len(kinds))] for letter in "wb")
    dense = Autoencoder(kinds, kernels, biases, int(data["latent"]))
    images = torch.tensor(data["images"]).movedim(-1, 1)
    images = images.flatten(1) if kinds[0] == "linear" else images
    outputs = dense(images).detach().numpy().reshape(data["outputs"].shape)
    np.testing.assert_allclose(outputs, data["outputs"], atol=1e-4)
    total = dense.parameters_of(dense.widths)
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
