"""What a model saves for its backward pass (`jax.checkpoint`), the small one saves as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

import compaware_jax as ca
from compaware_jax import law

ROWS, WIDTH, HIDDEN, LAYERS = 64, 8, 16, 6


def variables():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "in": (3, WIDTH),
        "up": (LAYERS, WIDTH, HIDDEN),
        "down": (LAYERS, HIDDEN, WIDTH),
        "out": (WIDTH, 2),
    }
    return {
        name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def normed(h):  # Its mean over channels that are not zero where one left runs at full width.
    return (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-3)


def block(h, layer):
    hidden = checkpoint_name(jnp.sin(jnp.cos(normed(h) @ layer["up"])), "hidden")
    return h + jnp.tanh(jnp.sin(hidden)) @ layer["down"], None


def nested(h, layer):
    return jax.checkpoint(block)(jnp.sin(jnp.sin(h)), layer)


def scanned(wrap):
    def apply(v, x):
        layers = {name: v[name] for name in ("up", "down")}
        return jax.lax.scan(wrap(block), x @ v["in"], layers)[0] @ v["out"]

    return apply


def unrolled(wrap):
    def apply(v, x):
        h = x @ v["in"]
        for i in range(LAYERS):
            h, _ = wrap(block)(h, {name: v[name][i] for name in ("up", "down")})
        return h @ v["out"]

    return apply


POLICY = jax.checkpoint_policies.save_only_these_names("hidden")
WRAPS = {
    "all again": jax.checkpoint,
    "but a name": lambda f: jax.checkpoint(f, policy=POLICY),
    "nested": lambda f: jax.checkpoint(nested, prevent_cse=False),
}


def cut(apply):
    v, x = variables(), jax.random.normal(jax.random.key(1), (ROWS, 3))
    groups = ca.find_groups(apply, v, x)
    assert [group.units for group in groups.groups] == [WIDTH, HIDDEN]
    return v, x, groups, np.arange(groups.units) % 4 < 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [scanned, unrolled])
@pytest.mark.parametrize("wrap", WRAPS)
def test_law(shape, wrap):
    apply = shape(WRAPS[wrap])
    v, x, groups, keep = cut(apply)
    errors = law.law_errors(apply, v, x, keep=keep, groups=groups)
    assert max(errors) <= 1e-10
    plan = ca.plan_units(groups, keep)
    assert ca.uncut(groups, plan), "nothing here runs at full width"
    assert checkpoints(*small(apply, v, plan), x) == checkpoints(apply, v, x) != []


def checkpoints(apply, v, x):
    """What calls under `jax.checkpoint` ask for, those inside of others included."""

    def inside(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive is primitives.remat_p:
                yield eqn.params["policy"], eqn.params["prevent_cse"]
            for body in (eqn.params[name] for name in ("jaxpr", "call_jaxpr") if name in eqn.params):
                yield from inside(getattr(body, "jaxpr", body))

    return list(inside(jax.make_jaxpr(apply)(v, x).jaxpr))


def small(apply, v, plan):
    return ca.slim(apply, plan), ca.shrink(v, plan)


def saved(apply, v, x):
    """Bytes that a gradient holds beside its inputs and outputs."""
    gradient = jax.jit(jax.grad(lambda v: apply(v, x).sum()))
    return gradient.lower(v).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("wrap", WRAPS)
def test_memory(wrap):
    apply = scanned(WRAPS[wrap])
    v, x, groups, keep = cut(apply)
    function, cut_variables = small(apply, v, ca.plan_units(groups, keep))
    assert saved(function, cut_variables, x) < saved(apply, v, x) < saved(scanned(lambda f: f), v, x) / 1.5
