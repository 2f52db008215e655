"""A network in Equinox: a residual network, channels first, under ``vmap``."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from equinox import nn
from jax import Array
from networks import Training, images


class Residual(eqx.Module):
    """Two 3×3 convolutions with batch normalisation, added to a 1×1 shortcut, after another."""

    stem: nn.Conv2d
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    shortcut: nn.Conv2d
    norms: list[nn.BatchNorm]
    dropout: nn.Dropout
    head: nn.Linear

    def __init__(self, key: Array) -> None:
        keys = jax.random.split(key, 5)
        self.stem = nn.Conv2d(3, 12, 3, padding="SAME", key=keys[0])
        self.conv1 = nn.Conv2d(12, 16, 3, 2, padding=1, use_bias=False, key=keys[1])
        self.conv2 = nn.Conv2d(16, 16, 3, padding="SAME", use_bias=False, key=keys[2])
        self.shortcut = nn.Conv2d(12, 16, 1, 2, use_bias=False, key=keys[3])
        norm = functools.partial(nn.BatchNorm, axis_name="batch", momentum=0.9, mode="batch")
        self.norms = [norm(16), norm(16)]
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Linear(16, 5, key=keys[4])

    def __call__(self, x: Array, state: nn.State, key: Array) -> tuple[Array, nn.State]:
        x = self.stem(x)
        y, state = self.norms[0](self.conv1(x), state)
        y, state = self.norms[1](self.conv2(jax.nn.relu(y)), state)
        x = jax.nn.relu(y + self.shortcut(x))
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
