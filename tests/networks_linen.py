"""Networks in Flax Linen: a small MobileNetV2 and a 3-D U-Net, channels last."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state
from jax import Array
from networks import Training, images, volumes


class InvertedResidual(nn.Module):
    """1×1 to more channels, 3×3 depthwise, 1×1 to fewer channels."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def convolve(x: Array, channels: int, kernel: int, **options: Any) -> Array:
            x = nn.Conv(
                channels,
                (kernel, kernel),
                use_bias=False,
                param_dtype=jnp.float64,
                **options,
            )(x)
            return nn.BatchNorm(not train, momentum=0.9, param_dtype=jnp.float64)(x)

        wide = 2 * x.shape[-1]
        y = nn.relu6(convolve(x, wide, 1))
        y = nn.relu6(convolve(y, wide, 3, strides=self.stride, feature_group_count=wide))
        y = convolve(y, self.channels, 1)
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.relu6(nn.Conv(8, (3, 3), 2, param_dtype=jnp.float64)(x))
        x = InvertedResidual(8)(x, train)
        x = InvertedResidual(12, stride=2)(x, train)
        x = nn.Dropout(0.25, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(5, param_dtype=jnp.float64)(x)


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
        return nn.Conv(1, (1, 1, 1), param_dtype=jnp.float64)(x)


class State(train_state.TrainState):
    batch_stats: Any
    dropout: Array


def step(state: State, x: Array, targets: Array) -> tuple[State, Any]:
    dropout = jax.random.fold_in(state.dropout, state.step)

    def loss(params: Any) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, changed = state.apply_fn(
            variables, x, train=True, rngs={"dropout": dropout}, mutable=["batch_stats"]
        )
        if outputs.ndim == 2:
            value = optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()
        else:
            value = optax.sigmoid_binary_cross_entropy(outputs, targets).mean()
        return value, (outputs, changed.get("batch_stats", {}))

    (value, (outputs, batch_stats)), gradients = jax.value_and_grad(loss, has_aux=True)(
        state.params
    )
    state = state.apply_gradients(grads=gradients, batch_stats=batch_stats)
    return state, (value, outputs, gradients)


def training(network: nn.Module, optimizer: Any, batches: list[Any]) -> Training:
    def start() -> State:
        x = batches[0][0]
        variables = network.init(jax.random.key(0), x, train=False)
        # Flax starts these in float32 whatever the parameters are.
        batch_stats = jax.tree.map(
            lambda x: x.astype(jnp.float64), variables.get("batch_stats", {})
        )
        return State.create(
            apply_fn=network.apply,
            params=variables["params"],
            batch_stats=batch_stats,
            dropout=jax.random.key(1),
            tx=optimizer,
        )

    return Training(
        start=jax.jit(start),
        step=step,
        jit=jax.jit,
        advance=lambda step, state, batch: step(state, *batch),
        split=lambda state: (None, state),
        merge=lambda _, state: state,
        batches=batches,
    )


def mobilenet() -> Training:
    return training(MobileNet(), optax.sgd(0.05, momentum=0.9), images(4, 16, 16, 3))


def unet() -> Training:
    return training(UNet(), optax.adam(1e-2), volumes(2, 8, 8, 8, 1))
