"""Networks in Haiku: a WaveNet and a residual network, channels last and channels first."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jax import Array
from networks import Training, images, signals

LEVELS = 8


def wavenet_network(samples: Array, data_format: str, train: bool) -> Array:
    """Causal dilated convolutions with gates, residual and skip connections."""

    def conv(x: Array, channels: int, kernel: int = 1, rate: int = 1) -> Array:
        causal = hk.pad.causal
        return hk.Conv1D(channels, kernel, rate=rate, padding=causal, data_format=data_format)(x)

    axis = data_format.index("C")
    x = y = conv(jax.nn.one_hot(samples, LEVELS, dtype=jnp.float64, axis=axis), 8)
    skips = []
    for rate in (1, 2, 4):
        if skips:
            x = x + conv(y, 8)
        signal, gate = jnp.split(conv(x, 16, kernel=2, rate=rate), 2, axis)
        y = jnp.tanh(signal) * jax.nn.sigmoid(gate)
        if train:
            y = hk.dropout(hk.next_rng_key(), 0.1, y)
        skips.append(conv(y, 12))
    logits = conv(jax.nn.relu(sum(skips)), LEVELS)
    return jnp.moveaxis(logits, axis, -1)


def residual_network(x: Array, data_format: str, train: bool) -> Array:
    """Two blocks of 3×3 convolutions with batch normalisation, added to 1×1 shortcuts."""

    def conv(x: Array, channels: int, kernel: int = 1, stride: int = 1) -> Array:
        return hk.Conv2D(channels, kernel, stride, with_bias=False, data_format=data_format)(x)

    def norm(x: Array) -> Array:
        return hk.BatchNorm(True, True, decay_rate=0.9, data_format=data_format)(x, train)

    x = conv(x, 12, 3)
    for channels in (12, 16):
        y = jax.nn.relu(norm(conv(x, channels, 3, 2)))
        x = jax.nn.relu(norm(conv(y, channels, 3)) + conv(x, channels, 1, 2))
    space = (2, 3) if data_format == "NCHW" else (1, 2)
    return hk.Linear(5)(jnp.mean(x, space))


def training(
    network: Callable[..., Array], data_format: str, optimizer: Any, batches: Any
) -> Training:
    def forward(x: Array, train: bool) -> Array:
        return network(x, data_format, train)

    model = hk.transform_with_state(forward)

    def start() -> Any:
        params, state = model.init(jax.random.key(0), batches[0][0], train=True)
        return params, state, optimizer.init(params), jax.random.key(1)

    def loss(params: Any, state: Any, key: Array, x: Array, labels: Array) -> tuple[Array, Any]:
        logits, state = model.apply(params, state, key, x, train=True)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return value, (logits, state)

    def step(params: Any, state: Any, moments: Any, key: Array, x: Array, labels: Array) -> Any:
        key, now = jax.random.split(key)
        (value, (logits, state)), gradients = jax.value_and_grad(loss, has_aux=True)(
            params, state, now, x, labels
        )
        updates, moments = optimizer.update(gradients, moments)
        params = optax.apply_updates(params, updates)
        return (params, state, moments, key), (value, logits, gradients)

    return Training(
        start=jax.jit(start),
        step=step,
        jit=jax.jit,
        advance=lambda step, state, batch: step(*state, *batch),
        split=lambda state: (None, state),
        merge=lambda _, state: state,
        batches=batches,
    )


def wavenet(data_format: str) -> Training:
    return training(wavenet_network, data_format, optax.adam(1e-2), signals(2, 24, LEVELS))


def residual(data_format: str) -> Training:
    shape = (3, 16, 16) if data_format == "NCHW" else (16, 16, 3)
    sgd = optax.sgd(0.05, momentum=0.9)
    return training(residual_network, data_format, sgd, images(4, *shape))
