"""Torch-Pruning's discovery on ResNet-50 and ViT-B/16 in plain PyTorch; called by `bench_discovery.py`.

    python experiments/peers/torch_discovery.py --rounds 3     # in an environment with torch, torch-pruning

Prints JSON: per model the seconds of building the dependency graph plus one pruning step, and the group
counts.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch_pruning as tp
from torch import nn


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with batch norms, and a projection where the shape changes."""

    def __init__(self, width: int, inner: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.project = None
        if stride != 1 or width != out:
            self.project = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.project is None else self.project(x)))


class ResNet50(nn.Module):
    """ResNet-50 v1.5."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        layers.append(nn.MaxPool2d(3, 2, 1))
        width = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            inner, out = 64 * 2**stage, 256 * 2**stage
            for block in range(blocks):
                layers.append(Bottleneck(width, inner, out, 2 if block == 0 and stage > 0 else 1))
                width = out
        self.features, self.head = nn.Sequential(*layers), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.head(self.features(x).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with separate projections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer."""
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """ViT-B/16."""

    def __init__(self, width: int = 768, heads: int = 12, inner: int = 3072, depth: int = 12):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 197, width))
        self.blocks = nn.Sequential(*(Block(width, heads, inner) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def measure(make: type[nn.Module], rounds: int) -> dict[str, object]:
    """Best seconds of graph building plus one pruning step, and what was found."""
    image, times = torch.zeros(1, 3, 224, 224), []
    for _ in range(rounds):
        model = make().eval()
        heads = {
            layer: module.heads
            for module in model.modules()
            if isinstance(module, Attention)
            for layer in (module.query, module.key, module.value)
        }
        start = time.perf_counter()
        pruner = tp.pruner.MetaPruner(
            model,
            image,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[model.head],
            num_heads=heads,
            prune_num_heads=bool(heads),
        )
        built = time.perf_counter()
        pruner.step()
        times.append((time.perf_counter() - start, built - start))
    model = make().eval()
    graph = tp.DependencyGraph().build_dependency(model, image)
    found = list(graph.get_all_groups(ignored_layers=[model.head]))
    return {
        "seconds": min(t[0] for t in times),
        "build": min(t[1] for t in times),
        "groups": len(found),
        "channels": sum(len(group[0].idxs) for group in found),
    }


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(json.dumps({"ResNet-50": measure(ResNet50, rounds), "ViT-B/16": measure(ViT, rounds)}))


if __name__ == "__main__":
    main()
