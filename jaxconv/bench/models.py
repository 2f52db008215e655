"""Whole networks in plain JAX, without normalisation: what is left is what convolutions cost.

They call ``lax.conv_general_dilated`` alone, as a user's model does; jaxconv comes in by
``accelerate``. MobileNetV2: Sandler et al. 2018; ResNet-50: He et al. 2015; ConvNeXt-T: Liu et al.
2022.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# conv(x, channels, kernel, stride=1, groups=1): a convolution with bias to so many channels.
Conv = Callable[..., Array]
Params = list[tuple[Array, Array]]
CLASSES = 1000


def mobilenet_v2(conv: Conv, x: Array) -> Array:
    x = jax.nn.relu6(conv(x, 32, 3, 2))
    for expansion, channels, blocks, first_stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            hidden = x.shape[-1] * expansion
            y = jax.nn.relu6(conv(x, hidden, 1)) if expansion > 1 else x
            y = jax.nn.relu6(conv(y, hidden, 3, stride, hidden))
            y = conv(y, channels, 1)
            x = x + y if x.shape == y.shape else y
    return jax.nn.relu6(conv(x, 1280, 1))


def resnet_50(conv: Conv, x: Array) -> Array:
    x = jax.nn.relu(conv(x, 64, 7, 2))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for channels, blocks, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            y = jax.nn.relu(conv(x, channels, 1))
            y = jax.nn.relu(conv(y, channels, 3, stride))
            y = conv(y, 4 * channels, 1)
            shortcut = conv(x, 4 * channels, 1, stride) if block == 0 else x
            x = jax.nn.relu(shortcut + y)
    return x


def convnext_t(conv: Conv, x: Array) -> Array:
    for channels, blocks, patch in ((96, 3, 4), (192, 3, 2), (384, 9, 2), (768, 3, 2)):
        x = conv(x, channels, patch, patch)
        for _ in range(blocks):
            y = conv(x, channels, 7, groups=channels)
            y = jax.nn.gelu(conv(y, 4 * channels, 1))
            x = x + conv(y, channels, 1)
    return x


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its parameters outside: lists of (kernel, bias), the classifier's last."""

    name: str
    network: Callable[[Conv, Array], Array]

    def forward(self, params: Params, images: Array) -> Array:
        """images: (N, height, width, 3) → logits (N, 1000)."""
        layers = iter(params)

        def conv(x: Array, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> Array:
            weights, bias = next(layers)
            y = lax.conv_general_dilated(
                x,
                weights,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            return y + bias

        features = self.network(conv, images).mean((1, 2))
        weights, bias = next(layers)
        return features @ weights + bias

    def init(self, size: int = 224, seed: int = 0) -> Params:
        """Random parameters under which activations keep their size."""
        rng = np.random.default_rng(seed)
        params: Params = []

        def layer(*shape: int) -> None:
            weights = rng.standard_normal(shape) / math.sqrt(math.prod(shape[:-1]))
            params.append((jnp.asarray(weights, jnp.float32), jnp.zeros(shape[-1], jnp.float32)))

        def conv(x: Array, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> Array:
            with jax.ensure_compile_time_eval():
                layer(kernel, kernel, x.shape[-1] // groups, channels)
            n, h, w, _ = x.shape
            return jnp.zeros((n, -(-h // stride), -(-w // stride), channels), x.dtype)

        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        features = jax.eval_shape(lambda image: self.network(conv, image), image)
        layer(features.shape[-1], CLASSES)
        return params

    def step(self, params: Params, images: Array, labels: Array) -> tuple[Array, Params]:
        """A training step: the loss, and the parameters after one of gradient descent."""

        def loss(params: Params) -> Array:
            logits = jax.nn.log_softmax(self.forward(params, images))
            return -jnp.take_along_axis(logits, labels[:, None], 1).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)


MODELS = (
    Model("MobileNetV2", mobilenet_v2),
    Model("ResNet-50", resnet_50),
    Model("ConvNeXt-T", convnext_t),
)


def data(batch: int, size: int = 224, seed: int = 1) -> tuple[Array, Array]:
    """Random images (batch, size, size, 3) and labels."""
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.standard_normal((batch, size, size, 3)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, CLASSES, batch), jnp.int32)
