"""A network in Flax Linen: a 3-D U-Net, channels last."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state
from jax import Array
from networks import Training, volumes


class Block(nn.Module):
    """A 3×3×3 convolution with group normalisation."""

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(self.channels, (3, 3, 3), param_dtype=jnp.float64)(x)
        return nn.silu(nn.GroupNorm(2, param_dtype=jnp.float64)(x))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        options = {"strides": (2, 2, 2), "param_dtype": jnp.float64}
        fine = Block(6)(x)
        coarse = nn.remat(Block)(12)(nn.Conv(12, (2, 2, 2), **options)(fine))
        up = nn.ConvTranspose(6, (4, 4, 4), **options)(coarse)
        x = Block(6)(jnp.concatenate([fine, up], axis=-1))
        x = x + nn.Conv(6, (3, 3, 3), feature_group_count=6, param_dtype=jnp.float64)(x)
        x = nn.Dropout(0.25, deterministic=not train)(x)
        return nn.Conv(1, (1, 1, 1), param_dtype=jnp.float64)(x)


class State(train_state.TrainState):
    dropout: Array


def step(state: State, x: Array, targets: Array) -> tuple[State, Any]:
    dropout = jax.random.fold_in(state.dropout, state.step)

    def loss(params: Any) -> tuple[Array, Array]:
        outputs = state.apply_fn({"params": params}, x, train=True, rngs={"dropout": dropout})
        return optax.sigmoid_binary_cross_entropy(outputs, targets).mean(), outputs

    (value, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients), (value, outputs, gradients)


def unet() -> Training:
    network, batches = UNet(), volumes(2, 8, 8, 8, 1)

    def start() -> State:
        params = network.init(jax.random.key(0), batches[0][0], train=False)["params"]
        key, adam = jax.random.key(1), optax.adam(1e-2)
        return State.create(apply_fn=network.apply, params=params, dropout=key, tx=adam)

    advance = lambda step, state, batch: step(state, *batch)  # noqa: E731
    return Training(jax.jit(start), step, batches, advance=advance)
