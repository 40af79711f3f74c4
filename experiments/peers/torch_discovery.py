"""Torch-Pruning's discovery on models in plain PyTorch; called by `bench_discovery.py`.

    echo "seconds ResNet-50" | python experiments/peers/torch_discovery.py    # torch, torch-pruning installed

Answers each line that it reads with a line of JSON: ``sizes MODEL`` with the channels of each group,
``seconds MODEL`` with those of building the dependency graph plus one pruning step on a new model.
"""

from __future__ import annotations

import json
import sys
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


def conv_norm(
    width: int, out: int, kernel: int, stride: int, padding: int, groups: int = 1
) -> list[nn.Module]:
    """A convolution without bias, batch norm, ReLU."""
    conv = nn.Conv2d(width, out, kernel, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU()]


class MobileNetV1(nn.Module):
    """MobileNetV1, width 1: a stem without padding, then depthwise 3×3 and pointwise 13 times."""

    def __init__(self) -> None:
        super().__init__()
        layers, width = conv_norm(3, 32, 3, 2, 0), 32
        outs = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
        for out, stride in zip(outs, (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), strict=True):
            layers += conv_norm(width, width, 3, stride, 1, groups=width) + conv_norm(width, out, 1, 1, 0)
            width = out
        self.features, self.head = nn.Sequential(*layers), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.head(self.features(x).mean((2, 3)))


def norm_conv(width: int, out: int, kernel: int) -> list[nn.Module]:
    """Batch norm, ReLU, a convolution without bias that keeps the size."""
    return [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, out, kernel, 1, kernel // 2, bias=False)]


class DenseLayer(nn.Module):
    """1×1 to four growths, 3×3 to one growth, appended to the input."""

    def __init__(self, width: int, growth: int):
        super().__init__()
        self.layers = nn.Sequential(*norm_conv(width, 4 * growth, 1), *norm_conv(4 * growth, growth, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer."""
        return torch.cat([x, self.layers(x)], 1)


class DenseNet121(nn.Module):
    """DenseNet-121: growth 32, transitions that halve."""

    def __init__(self, growth: int = 32):
        super().__init__()
        layers, width = [*conv_norm(3, 64, 7, 2, 3), nn.MaxPool2d(3, 2, 1)], 64
        for stage, depth in enumerate((6, 12, 24, 16)):
            for _ in range(depth):
                layers.append(DenseLayer(width, growth))
                width += growth
            if stage < 3:
                layers += [*norm_conv(width, width // 2, 1), nn.AvgPool2d(2)]
                width //= 2
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 1000)

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


MODELS = {"ResNet-50": ResNet50, "MobileNetV1": MobileNetV1, "DenseNet-121": DenseNet121, "ViT-B/16": ViT}


def seconds(make: type[nn.Module]) -> float:
    """Of graph building plus one pruning step."""
    model, image = make().eval(), torch.zeros(1, 3, 224, 224)
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
        head_pruning_ratio=0.5,
    )
    pruner.step()
    return time.perf_counter() - start


def sizes(make: type[nn.Module]) -> list[int]:
    """The channels of each group."""
    model, image = make().eval(), torch.zeros(1, 3, 224, 224)
    graph = tp.DependencyGraph().build_dependency(model, image)
    return [len(group[0].idxs) for group in graph.get_all_groups(ignored_layers=[model.head])]


def main() -> None:
    """Answer line by line."""
    questions = {"seconds": seconds, "sizes": sizes}
    for line in sys.stdin:
        question, model = line.split()
        print(json.dumps(questions[question](MODELS[model])), flush=True)


if __name__ == "__main__":
    main()
