"""Equinox's own loops, as those of diffrax: state and what is saved of it get narrower."""

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca
from compaware_jax import law
from compaware_jax.adapters import equinox as adapter
from tests.adapters.common import TIGHT, random_units

pytestmark = pytest.mark.usefixtures("x64")
STEPS = 5


class Stepped(eqx.Module):
    """A latent that is stepped as often as its example wants, and all that it went through."""

    encoder: eqx.nn.Linear
    step: eqx.nn.MLP
    decoder: eqx.nn.Linear
    kind: str = eqx.field(static=True)

    def __init__(self, kind):
        keys = jax.random.split(jax.random.key(0), 3)
        self.encoder = eqx.nn.Linear(3, 8, key=keys[0])
        self.step = eqx.nn.MLP(8, 8, 12, 1, activation=jnp.tanh, key=keys[1])
        self.decoder = eqx.nn.Linear(8, 2, key=keys[2])
        self.kind = kind

    def __call__(self, x):
        def condition(carry):
            count, latent, _ = carry
            return (jnp.sum(latent**2) < 40) & eqxi.unvmap_any(count < STEPS)

        def body(carry):
            count, latent, saved = carry
            latent = latent * 1.5 + self.step(latent)
            return count + 1, latent, saved.at[count].set(latent)

        start = jnp.asarray(0), self.encoder(x), jnp.zeros((STEPS, 8))
        _, latent, saved = eqxi.while_loop(
            condition, body, start, max_steps=STEPS, buffers=lambda carry: carry[2], kind=self.kind
        )
        return self.decoder(latent), jax.vmap(self.decoder)(saved)


@pytest.mark.parametrize("kind", ["lax", "checkpointed", "bounded"])
@pytest.mark.parametrize("examples", [False, True])
def test_law_and_units(kind, examples):
    apply, variables = adapter.functional(Stepped(kind))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3))) * jnp.array([[0.5], [1], [2], [4]])
    function, argument = (jax.vmap(apply, (None, 0)), x) if examples else (apply, x[0])
    groups = ca.find_groups(function, variables, argument, strict=True)
    assert sorted(group.units for group in groups.groups) == [8, 12]
    keep = random_units(groups)
    gradients = kind != "lax"  # Such a loop has no reverse mode.
    errors = law.law_errors(function, variables, argument, keep=keep, groups=groups, gradients=gradients)
    assert max(errors) <= TIGHT
    if examples:  # They stop at different steps, so what counts for which example matters.
        _, saved = function(ca.apply_mask(groups, keep.astype(float), variables), x)
        steps = np.any(saved != variables.decoder.bias, axis=2).sum(1)
        assert len(set(steps.tolist())) > 1
