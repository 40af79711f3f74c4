"""How long the coupling analysis takes: against Torch-Pruning, at 7 B parameters, and with depth.

    python -m venv peers && peers/bin/pip install torch torch-pruning
    python experiments/bench_discovery.py --torch-python peers/bin/python

* ResNet-50 and ViT-B/16 at 224×224 on the CPU: discovery plus one pruning step (L2, half of the units)
  and Torch-Pruning's graph building plus one step, in turns, for a machine's speed changes; medians over
  rounds, and the quartiles of the rounds' ratios. Every round traces the model anew; "cold" is with all of
  JAX's caches cleared as well. ResNet-50 is there twice: in plain JAX, as the peer's is in plain PyTorch,
  and as Haiku's module, whose tracing takes longer. Goal: a ratio of at most 0.5.
* The groups and units of these, MobileNetV1 and DenseNet-121 beside Torch-Pruning's groups and channels.
* A Llama-like decoder of 1 B and 7 B abstract parameters, each in a process of its own: seconds and peak
  memory. Goal: 30 s and 2 GB.
* Seconds per equation from 10² to 10⁴ dense layers, medians of three: `runs/discovery/depth.png`.

It needs the extra: ``pip install -e '.[zoo]'``. Without `--torch-python` the peer's columns stay empty.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import compaware_jax as ca
from compaware_jax.importance import l2
from compaware_jax.search.select import keep_units
from compaware_jax.tables import text_table

HERE = Path(__file__).parent
IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
sys.path.insert(0, str(HERE))

PLAIN = "ResNet-50, plain JAX"
# The models timed, and what the peer calls them.
TIMED = {PLAIN: "ResNet-50", "ResNet-50": "ResNet-50", "ViT-B/16": "ViT-B/16"}
# Where the groups differ in size from Torch-Pruning's.
WHY = {
    "ViT-B/16": "per layer the peer has one group of 768 query-key-value channels for the attention; Linen's "
    "kernels keep heads and their channels on two axes, so here it is three: 12 heads, 64 query-key and 64 "
    "value channels, each of all heads"
}


@dataclass(frozen=True)
class Args:
    """Settings of the benchmark."""

    torch_python: str | None = None
    """Python of an environment with torch and torch-pruning."""
    rounds: int = 15
    """The median of so many."""
    depths: tuple[int, ...] = (100, 300, 1000, 3000, 10000)
    """Layers of the depth study."""
    decoder: str | None = None
    """Only analyse this preset of the decoder, and print JSON (used by the benchmark itself)."""
    output: Path = Path("runs/discovery")
    """Where the figures go."""


def models() -> dict[str, Callable[[], Any]]:
    """The models of the comparison; their input is `IMAGE`."""
    from zoo_models import convolutional, plain
    from zoo_models.vision_transformers import LinenViT

    def vit() -> Any:
        module = LinenViT()
        return module.apply, jax.eval_shape(module.init, jax.random.key(0), IMAGE), (IMAGE,)

    by_name = {entry.name: entry for entry in convolutional.ENTRIES}
    return {
        PLAIN: plain.resnet50,
        "ResNet-50": by_name["ResNet-50 v1"].build,
        "MobileNetV1": by_name["MobileNetV1"].build,
        "DenseNet-121": by_name["DenseNet-121"].build,
        "ViT-B/16": vit,
    }


class Peer:
    """Torch-Pruning in a process of its own, which rests while it is not asked.

    Attributes:
      process: it; None without its Python.
    """

    def __init__(self, python: str | None):
        command = [python, str(HERE / "peers/torch_discovery.py")] if python else None
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes) if command else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.communicate()

    def ask(self, question: Literal["seconds", "sizes"], model: str) -> Any:
        """The seconds of one step, or the sizes of the groups; None without a peer."""
        if self.process is None:
            return None
        assert self.process.stdin
        assert self.process.stdout
        print(question, model, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("Torch-Pruning's process ended; what it says is above. Is --torch-python right?")
        return json.loads(answer)


def one_step(apply: Any, variables: Any, image: Any) -> None:
    """Discovery and one pruning step: half of every group's units, by L2 norm."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    groups = ca.find_groups(apply, shapes, image)
    keep = keep_units(groups, l2(groups, variables), np.maximum(groups.sizes // 2, groups.floors))
    jax.block_until_ready(ca.shrink(variables, ca.plan_units(groups, keep)))


def compare_seconds(args: Args, peer: Peer) -> list[tuple[Any, ...]]:
    """One row per timed model: ours, JAX's tracing alone, ours cold, the peer's, the ratio of ours to it."""
    return [compare_model(args, peer, name, theirs) for name, theirs in TIMED.items()]


def compare_model(args: Args, peer: Peer, name: str, theirs: str) -> tuple[Any, ...]:
    """The row of a model, after a round that is not counted."""
    apply, shapes, _ = models()[name]()
    variables = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)

    def step() -> None:
        one_step(partial(apply), variables, IMAGE)

    def traced() -> None:
        jax.make_jaxpr(partial(apply))(shapes, IMAGE)

    rounds = []
    for _ in range(1 + args.rounds):
        # The cold step fills the caches again.
        asked = peer.ask("seconds", theirs)
        time.sleep(REST)
        rounds.append((seconds_of(step, jax.clear_caches), seconds_of(step), seconds_of(traced), asked))
    cold, ours, tracing, peers = zip(*rounds[1:], strict=True)
    own = [f"{np.median(times):.3f}" for times in (ours, tracing, cold)]
    if peer.process is None:
        return name, *own, "–", "–", "–"
    low, ratio, high = np.quantile(np.divide(ours, peers), (0.25, 0.5, 0.75))
    return name, *own, f"{np.median(peers):.3f}", f"{ratio:.2f}", f"{low:.2f}–{high:.2f}"


REST = 0.1
"""Seconds after the peer's turn: its threads spin for a while."""


def seconds_of(run: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Seconds of a run, after something that is not timed."""
    before()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare_groups(peer: Peer) -> list[tuple[Any, ...]]:
    """One row per model: our groups and units, the peer's groups and channels, why they differ if they do."""
    rows = []
    for name, build in models().items():
        apply, shapes, _ = build()
        known = TIMED.get(name, name)
        groups = ca.find_groups(apply, shapes, IMAGE)
        row = (name, len(groups.groups), groups.units)
        theirs = peer.ask("sizes", known)
        if theirs is None:
            rows.append((*row, "–", "–", ""))
            continue
        same = sorted(theirs) == sorted(groups.sizes.tolist())
        why = "" if same else WHY.get(name, "unexplained")
        rows.append((*row, len(theirs), sum(theirs), why))
    return rows


def analyse_decoder(preset: str) -> dict[str, Any]:
    """Seconds and peak memory of one abstract decoder."""
    from zoo_models.decoders import PRESETS, llama

    apply, variables, inputs = llama(PRESETS[preset])
    start = time.perf_counter()
    groups = ca.find_groups(apply, variables, *inputs)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(int(np.prod(leaf.shape)) for leaf in groups.leaves)
    return {
        "parameters": parameters,
        "seconds": seconds,
        "gigabytes": memory,
        "groups": len(groups.groups),
        "units": groups.units,
    }


def deep(layers: int, width: int = 16) -> Any:
    """A chain of dense layers, abstract."""

    def abstract(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    variables = {
        "in": abstract(4, width),
        "hidden": [{"w": abstract(width, width), "b": abstract(width)} for _ in range(layers)],
        "out": abstract(width, 2),
    }

    def apply(v: Any, x: jax.Array) -> jax.Array:
        x = x @ v["in"]
        for layer in v["hidden"]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x @ v["out"]

    return apply, variables, abstract(2, 4)


def depth_study(args: Args) -> list[tuple[int, int, float]]:
    """(layers, equations, microseconds per equation), and the plot."""
    import matplotlib.pyplot as plt

    rows = []
    for layers in args.depths:
        apply, variables, x = deep(layers)
        equations = len(ca.find_groups(apply, variables, x).analysis.program.block.equations)
        times = [seconds_of(partial(ca.find_groups, partial(apply), variables, x)) for _ in range(3)]
        seconds = float(np.median(times))
        rows.append((layers, equations, 1e6 * seconds / equations))
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.semilogx([row[0] for row in rows], [row[2] for row in rows], "o-")
    axes.set(xlabel="layers", ylabel="µs per equation", ylim=(0, None), title="Discovery, dense chain")
    axes.grid(alpha=0.3)
    figure.savefig(args.output / "depth.png", dpi=150)
    return rows


def main(args: Args) -> None:
    """Run the three parts and print their tables."""
    if args.decoder:
        print(json.dumps(analyse_decoder(args.decoder)))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    with Peer(args.torch_python) as peer:
        header = ("model", "s", "of it tracing", "cold", "peer s", "ratio", "quartiles")
        print(text_table(header, compare_seconds(args, peer), "Discovery and one pruning step, 224×224, CPU"))
        header = ("model", "groups", "units", "peer groups", "peer channels", "why")
        print(text_table(header, compare_groups(peer), "Groups"))
    rows = []
    for preset in ("1b", "7b"):
        command = [sys.executable, __file__, "--decoder", preset]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(run.stdout.splitlines()[-1])
        rows.append(
            (
                preset,
                f"{found['parameters']:,}",
                f"{found['seconds']:.1f}",
                f"{found['gigabytes']:.2f}",
                found["groups"],
                found["units"],
            )
        )
    print(text_table(("decoder", "parameters", "s", "GB", "groups", "units"), rows, "Abstract parameters"))
    lines = [(layers, equations, f"{micro:.0f}") for layers, equations, micro in depth_study(args)]
    print(text_table(("layers", "equations", "µs per equation"), lines, "Depth"))


if __name__ == "__main__":
    main(tyro.cli(Args))
