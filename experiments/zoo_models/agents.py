"""Agents: brax's policies, values and critics as they come; two world models in Flax Linen."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from brax.training.acme import running_statistics, specs
from brax.training.agents.ppo import networks as ppo
from brax.training.agents.sac import networks as sac

from .builders import BATCH, abstract_key, floats, linen
from .entry import Entry, Model

ANT = (27, 8)


NORMALISE: Any = running_statistics.normalize


def _normaliser(observations: int) -> Any:
    """The mean and deviation alone: the counter is an integer, of which no gradient is taken."""
    state = jax.eval_shape(lambda: running_statistics.init_state(specs.Array((observations,), jnp.float32)))
    return running_statistics.NestedMeanStd(mean=state.mean, std=state.std)


def _ppo() -> Model:
    nets = ppo.make_ppo_networks(*ANT, preprocess_observations_fn=NORMALISE)
    variables = {
        "normaliser": _normaliser(ANT[0]),
        "policy": jax.eval_shape(nets.policy_network.init, jax.random.key(0)),
        "value": jax.eval_shape(nets.value_network.init, jax.random.key(0)),
    }

    def apply(v: Any, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = nets.policy_network.apply(v["normaliser"], v["policy"], observations)
        return logits, nets.value_network.apply(v["normaliser"], v["value"], observations)

    return apply, variables, (floats(4, ANT[0]),)


def _sac() -> Model:
    nets = sac.make_sac_networks(
        *ANT,
        preprocess_observations_fn=NORMALISE,
        policy_network_layer_norm=True,
        q_network_layer_norm=True,
    )
    variables = {
        "normaliser": _normaliser(ANT[0]),
        "policy": jax.eval_shape(nets.policy_network.init, jax.random.key(0)),
        "critic": jax.eval_shape(nets.q_network.init, jax.random.key(0)),
    }

    def apply(v: Any, observations: jax.Array, actions: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = nets.policy_network.apply(v["normaliser"], v["policy"], observations)
        return logits, nets.q_network.apply(v["normaliser"], v["critic"], observations, actions)

    return apply, variables, (floats(4, ANT[0]), floats(4, ANT[1]))


def simplex_norm(x: jax.Array, simplex: int = 8) -> jax.Array:
    """SimNorm of TD-MPC2: a softmax over each run of `simplex` channels."""
    return nn.softmax(x.reshape(*x.shape[:-1], -1, simplex)).reshape(x.shape)


def two_hot_inverse(logits: jax.Array, low: float = -10.0, high: float = 10.0) -> jax.Array:
    """The scalar that a distribution over symlog bins stands for."""
    x = (nn.softmax(logits) * np.linspace(low, high, logits.shape[-1])).sum(-1)
    return jnp.sign(x) * (jnp.exp(jnp.abs(x)) - 1)


class NormedMLP(nn.Module):
    """Dense layers with LayerNorm and Mish; the last one plain, or with SimNorm."""

    hidden: tuple[int, ...]
    out: int
    simplex: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The last layer's output."""
        for width in self.hidden:
            x = jax.nn.mish(nn.LayerNorm()(nn.Dense(width)(x)))
        x = nn.Dense(self.out)(x)
        return simplex_norm(nn.LayerNorm()(x)) if self.simplex else x


class WorldModel(nn.Module):
    """The world model of TD-MPC2 (Hansen et al. 2024), 5M preset, along a rollout."""

    actions: int
    latent: int = 512
    encoder: int = 256
    hidden: int = 512
    bins: int = 101
    critics: int = 5

    @nn.compact
    def __call__(self, observations: jax.Array, actions: jax.Array) -> dict[str, jax.Array]:
        """Rewards, values and policies along a rollout; actions are (time, batch, actions)."""
        two = (self.hidden, self.hidden)
        dynamics = NormedMLP(two, self.latent, simplex=True, name="dynamics")
        reward = NormedMLP(two, self.bins, name="reward")
        policy = NormedMLP(two, 2 * self.actions, name="policy")
        ensemble = nn.vmap(
            NormedMLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,  # pyright: ignore[reportArgumentType]
            axis_size=self.critics,
        )
        critics = ensemble(two, self.bins, name="critics")
        z = NormedMLP((self.encoder,), self.latent, simplex=True, name="encoder")(observations)
        rewards, policies, values = [], [], []
        for action in actions:
            pair = jnp.concatenate([z, action], -1)
            rewards.append(two_hot_inverse(reward(pair)))
            values.append(two_hot_inverse(critics(pair)).min(0))
            policies.append(policy(z))
            z = dynamics(pair)
        policies.append(policy(z))
        final = jnp.concatenate([z, jnp.tanh(policies[-1][..., : self.actions])], -1)
        values.append(two_hot_inverse(critics(final)).min(0))
        return {"rewards": jnp.stack(rewards), "values": jnp.stack(values), "policies": jnp.stack(policies)}


class RecurrentStateCell(nn.Module):
    """One step of DreamerV3's recurrent state-space model: a gated state and categorical latents."""

    state: int
    hidden: int
    latents: int
    classes: int

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array, jax.Array], now: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
        """The next state, sample and key; state and sample as features of the heads."""
        (state, sample, key), (embedded, action) = carry, now
        x = nn.silu(nn.RMSNorm()(nn.Dense(self.hidden)(jnp.concatenate([sample, action], -1))))
        parts = nn.LayerNorm()(nn.Dense(3 * self.state, use_bias=False)(jnp.concatenate([x, state], -1)))
        reset, candidate, update = jnp.split(parts, 3, -1)
        candidate = jnp.tanh(nn.sigmoid(reset) * candidate)
        update = nn.sigmoid(update - 1)
        state = update * candidate + (1 - update) * state
        x = nn.silu(nn.RMSNorm()(nn.Dense(self.hidden)(jnp.concatenate([state, embedded], -1))))
        logits = nn.Dense(self.latents * self.classes)(x).reshape(-1, self.latents, self.classes)
        chances = 0.99 * nn.softmax(logits) + 0.01 / self.classes
        key, draw = jax.random.split(key)
        drawn = jax.nn.one_hot(jax.random.categorical(draw, jnp.log(chances)), self.classes)
        sample = drawn + chances - jax.lax.stop_gradient(chances)
        sample = sample.reshape(*sample.shape[:-2], -1)
        return (state, sample, key), jnp.concatenate([state, sample], -1)


class Dreamer(nn.Module):
    """The world model of DreamerV3 (Hafner et al. 2023), on vectors, along a sequence."""

    state: int = 512
    hidden: int = 256
    latents: int = 32
    classes: int = 32

    @nn.compact
    def __call__(self, observations: jax.Array, actions: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        """Observations and rewards told again, and whether it goes on; inputs are (time, batch, features)."""

        def head(x: jax.Array, out: int) -> jax.Array:
            return nn.Dense(out)(nn.silu(nn.RMSNorm()(nn.Dense(self.hidden)(x))))

        embedded = nn.silu(
            nn.RMSNorm()(nn.Dense(self.hidden)(jnp.sign(observations) * jnp.log1p(abs(observations))))
        )
        cell = nn.scan(RecurrentStateCell, variable_broadcast="params", split_rngs={"params": False})
        batch, latents = observations.shape[1], self.latents * self.classes
        start = jnp.zeros((batch, self.state)), jnp.zeros((batch, latents)), key
        step = cell(self.state, self.hidden, self.latents, self.classes)
        _, features = step(start, (embedded, actions))
        return {
            "observations": head(features, observations.shape[-1]),
            "rewards": two_hot_inverse(head(features, 255)),
            "goes on": nn.sigmoid(head(features, 1)),
        }


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "PPO policy and value",
        "brax 0.14.2: make_ppo_networks, Ant sizes",
        _ppo,
        4 * 32 + 5 * 256,
        "policy 4 × 32, value 5 × 256",
    ),
    Entry(
        "SAC policy and critics",
        "brax 0.14.2: make_sac_networks with layer norm, Ant sizes",
        _sac,
        2 * 256 + 2 * 2 * 256,
        "policy 2 × 256, two critics of 2 × 256",
    ),
    Entry(
        "TD-MPC2 world model",
        "own, Flax Linen, 5M preset, Ant sizes",
        linen(WorldModel(ANT[1]), floats(BATCH, ANT[0]), floats(2, BATCH, ANT[1])),
        256 + 512 // 8 + 4 * 2 * 512 + 5 + 2 * 101,
        "encoder 256; 64 simplices of 8 latent channels; dynamics, reward, policy, critics (each across the "
        "ensemble) 2 × 512; 5 critics, of which the least counts; 2 × 101 bins, summed to scalars",
    ),
    Entry(
        "DreamerV3 world model",
        "own, Flax Linen, Ant sizes",
        linen(Dreamer(), floats(3, BATCH, ANT[0]), floats(3, BATCH, ANT[1]), abstract_key()),
        256 + (512 + 32 + 2 * 256) + 3 * 256 + 255,
        "encoder 256; state 512, 32 latents of 32 classes each, two inner widths of 256; three heads of 256; "
        "255 bins, summed to a scalar",
    ),
)
