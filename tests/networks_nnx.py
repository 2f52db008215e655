"""A network in Flax NNX: a residual network, channels last."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from networks import Training, images


class ResidualBlock(nnx.Module):
    """Two 3×3 convolutions with batch normalisation, added to a 1×1 shortcut."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        options = {"use_bias": False, "param_dtype": jnp.float64}
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), 2, **options, rngs=rngs)
        self.norm1 = nnx.BatchNorm(outputs, momentum=0.9, param_dtype=jnp.float64, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), **options, rngs=rngs)
        self.norm2 = nnx.BatchNorm(outputs, momentum=0.9, param_dtype=jnp.float64, rngs=rngs)
        self.shortcut = nnx.Conv(inputs, outputs, (1, 1), 2, **options, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Residual(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        options = {"param_dtype": jnp.float64, "rngs": rngs}
        self.stem = nnx.Conv(3, 12, (3, 3), **options)
        self.block = ResidualBlock(12, 16, rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.head = nnx.Linear(16, 5, **options)

    def __call__(self, x: Array) -> Array:
        x = nnx.remat(ResidualBlock.__call__)(self.block, self.stem(x))
        return self.head(self.dropout(jnp.mean(x, axis=(1, 2))))


def loss(model: Callable[[Array], Array], x: Array, labels: Array) -> tuple[Array, Array]:
    logits = model(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


def step(model: nnx.Module, optimizer: nnx.Optimizer, x: Array, labels: Array) -> Any:
    (value, logits), gradients = nnx.value_and_grad(loss, has_aux=True)(model, x, labels)
    optimizer.update(model, gradients)
    return value, logits, gradients


def residual() -> Training:
    optimizer = optax.sgd(0.05, momentum=0.9)

    def start() -> Any:
        model = Residual(nnx.Rngs(0, dropout=1))
        # Flax starts these in float32 whatever the parameters are.
        statistics = nnx.state(model, nnx.BatchStat)
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float64), statistics))
        return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def advance(step: Any, state: Any, batch: Any) -> Any:
        report = step(*state, *batch)  # changes the model and the optimizer in place
        return state, report

    return Training(
        start=nnx.jit(start),
        step=step,
        jit=nnx.jit,
        advance=advance,
        split=nnx.split,
        merge=lambda static, arrays: nnx.merge(static, arrays, copy=True),
        batches=images(4, 16, 16, 3),
    )
