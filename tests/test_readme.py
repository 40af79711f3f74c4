"""The README's examples run as they are printed."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import compaware_jax as ca
from compaware_jax.search import request

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLES = {
    name: block for block in BLOCKS if (name := next(iter(re.findall(r"adapters import (\w+)", block)), None))
}


@pytest.mark.parametrize("name", ["linen", "nnx", "haiku", "equinox"])
def test_example(name):
    made = {}
    exec(compile(EXAMPLES[name], f"README, {name}", "exec"), made)
    assert made["plan"].counts[0][1:] == (8, 16)


def test_first_example(monkeypatch):
    (example,) = (block for block in BLOCKS if "data.mnist(" in block)
    for printed, short in {" 3_000)": " 100)", "fine_tune=5_000": "fine_tune=100", "19.0": "10.0"}.items():
        assert example.count(printed) == 1
        example = example.replace(printed, short)
    monkeypatch.setattr(request, "GradientSearch", partial(ca.GradientSearch, steps=50))
    made = {}
    exec(compile(example, "README, first example", "exec"), made)
    before, after = made["result"].costs["parameters"]
    assert 0.09 * before < after <= 0.1 * before
    image = made["small_apply"](made["small_variables"], made["image"])["image"]
    assert image.shape == made["image"].shape


def test_recipes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in BLOCKS if "pure_callback" in block)
    assert example.count("500") == 3
    monkeypatch.setattr(request, "GradientSearch", partial(ca.GradientSearch, steps=50))
    made = {}
    exec(compile(example.replace("500", "100"), "README, recipes", "exec"), made)
    assert made["result"].kept
    assert made["shapes"] == jax.eval_shape(lambda: made["small"])
    assert made["small_apply"](made["small"], made["rows"]).shape == (1_000, 8)


def test_batch_statistics():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2)(nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))))

    x = jax.random.normal(jax.random.key(0), (16, 3))
    made = {
        "model": Model(),
        "variables": Model().init(jax.random.key(1), x, False),
        "x": x,
        "jnp": jnp,
        "ca": ca,
    }
    (example,) = (block for block in BLOCKS if "batch_stats" in block)
    exec(compile(example, "README, batch statistics", "exec"), made)
    result = ca.compress(
        made["apply"], made["variables"], made["loss"], lambda step: {"x": x, "y": x[:, :2]},
        groups=made["groups"], budget=ca.params(0.6), search=ca.GradientSearch(steps=5), fine_tune=5,
        progress=False,
    )  # fmt: skip
    ((_, kept, units),) = result.plan.counts
    assert kept < units == 8
    assert result.variables["batch_stats"]["BatchNorm_0"]["mean"].shape == (kept,)
    assert result.costs["flops"] == (2 * 16 * 8 * 5, 2 * 16 * kept * 5)
