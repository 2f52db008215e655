"""A network in Haiku: a WaveNet, channels first."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jax import Array
from networks import Training, signals

LEVELS = 8


def wavenet_network(samples: Array, train: bool) -> Array:
    """Causal dilated convolutions with gates, residual and skip connections."""

    def conv(x: Array, channels: int, kernel: int = 1, rate: int = 1) -> Array:
        options = {"rate": rate, "padding": hk.pad.causal, "data_format": "NCW"}
        return hk.Conv1D(channels, kernel, **options)(x)

    x = y = conv(jax.nn.one_hot(samples, LEVELS, dtype=jnp.float64, axis=1), 8)
    skips = []
    for rate in (1, 2, 4):
        if skips:
            x = x + conv(y, 8)
        signal, gate = jnp.split(conv(x, 16, kernel=2, rate=rate), 2, axis=1)
        y = jnp.tanh(signal) * jax.nn.sigmoid(gate)
        if train:
            y = hk.dropout(hk.next_rng_key(), 0.1, y)
        skips.append(conv(y, 12))
    return jnp.moveaxis(conv(jax.nn.relu(sum(skips)), LEVELS), 1, -1)


def wavenet() -> Training:
    batches, optimizer = signals(2, 24, LEVELS), optax.adam(1e-2)
    model = hk.transform_with_state(wavenet_network)

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

    return Training(jax.jit(start), step, batches)
