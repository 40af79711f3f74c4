"""What cannot run small along one axis stays small along the others, and runs once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax.cost import flop_cost
from compaware_jax.law import law_errors
from compaware_jax.surgery import slimming
from compaware_jax.surgery.small_function import what_runs
from tests.adapters.common import TIGHT

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
BLOCKS, WIDTH, HEADS, TOKENS, LEARNED, HIDDEN = 3, 16, 4, 6, 4, 32


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape) / math.sqrt(shape[-2] if len(shape) > 1 else 1))


def block():
    return {
        **{name: drawn(WIDTH, HEADS, 4) for name in "qkv"},
        "o": drawn(HEADS, 4, WIDTH),
        "up": drawn(WIDTH, HIDDEN),
        "bias": drawn(HIDDEN),
        "down": drawn(HIDDEN, WIDTH),
    }


def variables():
    blocks = [block() for _ in range(BLOCKS)]
    return {"in": drawn(5, WIDTH), "learned": drawn(LEARNED, WIDTH), "out": drawn(WIDTH, 3), "blocks": blocks}


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def one_block(h, v):
    q, k, values = (jnp.einsum("btd,dhc->bthc", normalised(h), v[name]) for name in "qkv")
    attention = jax.nn.softmax(jnp.einsum("bthc,bshc->bhts", q, k), -1)
    h = h + jnp.einsum("bhts,bshc,hcd->btd", attention, values, v["o"])
    return h + jax.nn.gelu(normalised(h) @ v["up"] + v["bias"]) @ v["down"]


def model(run):
    """A transformer with learned tokens beside those of the input: a row of zeros is in the softmax, too."""

    def apply(v, x):
        learned = jnp.broadcast_to(v["learned"], (len(x), LEARNED, WIDTH))
        h = run(jnp.concatenate([learned, x @ v["in"]], 1), v["blocks"])
        return h[:, LEARNED:].mean(1) @ v["out"]

    return apply


def unrolled(h, blocks):
    for v in blocks:
        h = one_block(h, v)
    return h


def checkpointed(h, blocks):
    for v in blocks:
        h = jax.checkpoint(one_block)(h, v)
    return h


def scanned(h, blocks):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return jax.lax.scan(lambda h, v: (one_block(h, v), None), h, stacked)[0]


def halved(groups, whole=()):
    keep = np.ones(groups.units, bool)
    for group in groups.groups:
        if group.name not in whole:
            keep[group.offset + group.units // 2 : group.offset + group.units] = False
    return keep


@pytest.mark.parametrize("run", [unrolled, checkpointed])
def test_learned_tokens(run):
    v, x, apply = variables(), drawn(2, TOKENS, 5), model(run)
    groups = ca.find_groups(apply, v, x)
    assert {group.name: group.units for group in groups.groups}["learned:0"] == LEARNED
    keep = halved(groups)
    assert max(law_errors(apply, v, x, keep=keep, groups=groups)) <= TIGHT
    ran, flops = what_runs(groups, ca.plan_units(groups, keep))
    plan = ca.plan_units(groups, halved(groups, whole=["learned:0"]))
    with_all_tokens = flop_cost(groups).exact(np.array([kept for _, kept, _ in plan.counts]))
    assert flops <= with_all_tokens
    # Of the equations listed, none counts more than it runs with.
    assert sum(equation.flops for equation in ran if "dot_general" in equation.where) <= flops


def test_in_a_loop():
    v, x, apply = variables(), drawn(2, TOKENS, 5), model(scanned)
    groups = ca.find_groups(apply, v, x)
    assert max(law_errors(apply, v, x, keep=halved(groups), groups=groups)) <= TIGHT


@pytest.mark.parametrize("deepest", [0, 1])
def test_however_deep(monkeypatch, deepest):
    monkeypatch.setattr(slimming, "_DEEPEST", deepest)
    v, x, apply = variables(), drawn(2, TOKENS, 5), model(unrolled)
    groups = ca.find_groups(apply, v, x)
    for rng in map(np.random.default_rng, range(3)):
        keep = rng.random(groups.units) < 0.7
        keep[groups.offsets] = True
        assert max(law_errors(apply, v, x, keep=keep, groups=groups)) <= TIGHT


def test_another_axis_stays_small():
    """A softmax over the channels of a layer whose inputs are cut, too."""

    def apply(v, x):
        shares = jax.nn.softmax(jnp.tanh(x @ v["a"]) @ v["b"] + v["bias"], -1)
        return shares @ v["c"]

    v, x = {"a": drawn(3, 40), "b": drawn(40, 30), "bias": drawn(30), "c": drawn(30, 2)}, drawn(7, 3)
    groups = ca.find_groups(apply, v, x)
    keep = np.arange(groups.units) % 2 == 0
    assert max(law_errors(apply, v, x, keep=keep, groups=groups)) <= TIGHT
    # Batch of 7: of 40 and 30 channels there are 20 and 15. The logits of removed channels are zeros.
    _, flops = what_runs(groups, ca.plan_units(groups, keep))
    assert flops == 2 * 7 * (3 * 20 + 20 * 15 + 15 * 2)
