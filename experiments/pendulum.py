"""A pendulum seen by a camera: its physics, who swings it up, and a world model of it with a controller.

The motor is weaker than gravity, so the pendulum has to be swung up before it can be balanced. The model sees
two frames and nothing else. Everything is drawn anew at every step; no data set is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

SECONDS = 0.05
"""Between two frames."""
GRAVITY, TORQUE, FRICTION = 9.81, 4.0, 0.05
"""Of a unit mass on a rod of 1 m: in m/s², N m, N m s."""
FASTEST = 8.0
"""Of the velocities drawn, in rad/s; from hanging, swinging up takes 6.3."""
SIDE, PIXEL = 24, 0.1
"""Pixels along each side of a frame, and the side of a pixel in m."""
HORIZON = 3
"""Steps that the world model looks ahead."""

Batch = dict[str, jax.Array]
Apply = Callable[..., dict[str, jax.Array]]


def move(state: jax.Array, action: jax.Array) -> jax.Array:
    """The state (..., angle and velocity; upright is 0) after one action (...), a share of the torque."""
    angle, velocity = state[..., 0], state[..., 1]
    for _ in range(5):
        push = GRAVITY * jnp.sin(angle) + TORQUE * action - FRICTION * velocity
        velocity = velocity + SECONDS / 5 * push
        angle = angle + SECONDS / 5 * velocity
    return jnp.stack([angle, velocity], -1)


def expert(state: jax.Array) -> jax.Array:
    """The action (...) of one who knows the state: pump energy, and catch near the top."""
    angle, velocity = state[..., 0], state[..., 1]
    energy = velocity**2 / 2 + GRAVITY * (jnp.cos(angle) - 1)
    pump = jnp.tanh(-2 * energy * velocity / TORQUE)
    catch = jnp.tanh(-(14 * jnp.sin(angle) + 4.5 * velocity) / TORQUE)
    near = jax.nn.sigmoid(20 * (jnp.cos(angle) - 0.92)) * jax.nn.sigmoid(6 * (2.5 - jnp.abs(velocity)))
    return near * catch + (1 - near) * pump


def frames_of(state: jax.Array) -> jax.Array:
    """What the camera sees of states (..., 2): (..., SIDE, SIDE), in [0, 1]."""
    place = (jnp.arange(SIDE) - (SIDE - 1) / 2) * PIXEL
    x, y = place, place[:, None]
    to_x, to_y = (f(state[..., 0])[..., None, None] for f in (jnp.sin, lambda angle: -jnp.cos(angle)))
    along = jnp.clip(x * to_x + y * to_y, 0, 1)
    return jnp.exp(-((x - along * to_x) ** 2 + (y - along * to_y) ** 2) / PIXEL**2)


def seen(before: jax.Array, now: jax.Array) -> jax.Array:
    """Two frames (..., SIDE, SIDE) as the model takes them, (..., SIDE, SIDE, 2)."""
    return jnp.stack([before, now], -1)


def batches(size: int, key: jax.Array) -> Callable[[jax.Array], Batch]:
    """Step -> so many views at random states, what follows on random actions, and what the expert does."""

    def batch(step: jax.Array) -> Batch:
        keys = jax.random.split(jax.random.fold_in(key, step), 3)
        angle = jax.random.uniform(keys[0], (size,), minval=-jnp.pi, maxval=jnp.pi)
        velocity = jax.random.uniform(keys[1], (size,), minval=-FASTEST, maxval=FASTEST)
        actions = jax.random.uniform(keys[2], (size, 1 + HORIZON), minval=-1.0)
        states = [jnp.stack([angle, velocity], -1)]
        for number in range(1 + HORIZON):
            states.append(move(states[-1], actions[:, number]))
        frames = frames_of(jnp.stack(states, 1))
        return {
            "view": seen(frames[:, 0], frames[:, 1]),
            "actions": actions[:, 1:],
            "frames": frames[:, 1:],
            "expert": expert(states[1]),
        }

    return batch


def swing_up(control: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int = 200) -> jax.Array:
    """Angles (steps, n) while a controller of views has the pendulum, from states (n, 2)."""

    def one(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        state, before = carry
        now = frames_of(state)
        return (move(state, control(seen(before, now))), now), state[:, 0]

    return jax.lax.scan(one, (start, frames_of(start)), None, length=steps)[1]


class Layers(nn.Module):
    """Dense layers with ReLU in between."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The last one's output."""
        for number, width in enumerate(self.widths[:-1]):
            x = nn.relu(nn.Dense(width, name=f"dense{number + 1}")(x))
        return nn.Dense(self.widths[-1], name="out")(x)


class WorldModel(nn.Module):
    """Encoder, dynamics, decoder and policy around one latent."""

    def setup(self) -> None:
        """The components."""
        self.encoder = Layers((512, 256, 32))
        self.dynamics = Layers((256, 256, 32))
        self.decoder = Layers((256, 512, SIDE * SIDE))
        self.policy = Layers((128, 64, 1))

    def __call__(self, view: jax.Array, actions: jax.Array) -> dict[str, jax.Array]:
        """The policy's action (n,), and the frames (n, 1 + steps, SIDE, SIDE) on others (n, steps)."""
        latents = [self.encoder(view.reshape(len(view), -1))]
        for action in actions.T:
            change = self.dynamics(jnp.concatenate([latents[-1], action[:, None]], -1))
            latents.append(latents[-1] + change)
        frames = nn.sigmoid(self.decoder(jnp.stack(latents, 1)))
        return {
            "action": jnp.tanh(self.policy(latents[0]))[:, 0],
            "frames": frames.reshape(*frames.shape[:2], SIDE, SIDE),
        }


def apply(variables: Any, view: jax.Array, actions: jax.Array) -> dict[str, jax.Array]:
    """The world model as a pure function; see `WorldModel`."""
    return WorldModel().apply(variables, view, actions)  # pyright: ignore[reportReturnType]


def control(apply: Apply, variables: Any, view: jax.Array) -> jax.Array:
    """The action alone (n,), without looking ahead: what runs in the loop, of a model of any size."""
    return apply(variables, view, jnp.zeros((len(view), HORIZON)))["action"]
