"""A network in Equinox: a residual network, channels first, under ``vmap``."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from equinox import nn
from jax import Array
from networks import Training, images


class ResidualBlock(eqx.Module):
    """Two 3×3 convolutions with batch normalisation, added to a 1×1 shortcut."""

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    shortcut: nn.Conv2d
    norm1: nn.BatchNorm
    norm2: nn.BatchNorm

    def __init__(self, inputs: int, outputs: int, *, key: Array) -> None:
        keys = jax.random.split(key, 3)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, padding=1, use_bias=False, key=keys[0])
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding="SAME", use_bias=False, key=keys[1])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2, use_bias=False, key=keys[2])
        self.norm1 = nn.BatchNorm(outputs, axis_name="batch", momentum=0.9, mode="batch")
        self.norm2 = nn.BatchNorm(outputs, axis_name="batch", momentum=0.9, mode="batch")

    def __call__(self, x: Array, state: nn.State) -> tuple[Array, nn.State]:
        y, state = self.norm1(self.conv1(x), state)
        y, state = self.norm2(self.conv2(jax.nn.relu(y)), state)
        return jax.nn.relu(y + self.shortcut(x)), state


class Residual(eqx.Module):
    stem: nn.Conv2d
    blocks: list[ResidualBlock]
    dropout: nn.Dropout
    head: nn.Linear

    def __init__(self, key: Array) -> None:
        keys = jax.random.split(key, 4)
        self.stem = nn.Conv2d(3, 12, 3, padding="SAME", key=keys[0])
        self.blocks = [ResidualBlock(12, 12, key=keys[1]), ResidualBlock(12, 16, key=keys[2])]
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Linear(16, 5, key=keys[3])

    def __call__(self, x: Array, state: nn.State, key: Array) -> tuple[Array, nn.State]:
        x = self.stem(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(self.dropout(jnp.mean(x, axis=(1, 2)), key=key)), state


def residual() -> Training:
    optimizer = optax.sgd(0.05, momentum=0.9)

    def start() -> Any:
        model, state = nn.make_with_state(Residual)(jax.random.key(0))
        moments = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        return model, state, moments, jax.random.key(1)

    def loss(model: Any, state: nn.State, x: Array, targets: Array, keys: Array) -> Any:
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        outputs, state = batched(x, state, keys)
        value = optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()
        return value, (outputs, state)

    def step(
        model: Any, state: nn.State, moments: Any, key: Array, x: Array, targets: Array
    ) -> Any:
        key, *keys = jax.random.split(key, 1 + x.shape[0])
        (value, (outputs, state)), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(
            model, state, x, targets, jnp.stack(keys)
        )
        updates, moments = optimizer.update(gradients, moments)
        model = eqx.apply_updates(model, updates)
        return (model, state, moments, key), (value, outputs, gradients)

    def split(state: Any) -> Any:
        arrays, static = eqx.partition(state, eqx.is_array)
        return static, arrays

    return Training(
        start=eqx.filter_jit(start),
        step=step,
        jit=eqx.filter_jit,
        split=split,
        merge=eqx.combine,
        batches=images(4, 3, 16, 16),
    )
