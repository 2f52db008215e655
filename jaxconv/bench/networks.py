"""Whole networks, without normalisation, so that convolutions dominate their cost.

A network is written once and run by JAX (``Lax``, which calls lax's functions as a user's model
does) and by PyTorch (``torch_peer.Torch``, with the same methods). As in the papers, convolutions
followed there by a normalisation have no bias.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# For each layer: kernel (h, w, in, out) or matrix (in, out), and bias if any.
Params = list[tuple[Any, ...]]
# So large that gradients dominate the updated parameters, by which a step is checked.
RATE = 1024.0
CLASSES = 1000


def padding(kernel: int) -> int:
    """Half the size of an odd kernel, 0 for an even one."""
    return kernel // 2 * (kernel % 2)


class Lax:
    """Operations by JAX on images, whose channels, and those of kernels, may be ``first``.

    ``parameters`` returns a layer's, from the shape of its kernel and whether it has a bias.
    """

    relu = staticmethod(jax.nn.relu)
    relu6 = staticmethod(jax.nn.relu6)
    gelu = staticmethod(jax.nn.gelu)

    def __init__(self, parameters: Callable[..., tuple[Any, ...]], first: bool = False) -> None:
        self.parameters = parameters
        self.numbers = ("NCHW", "OIHW", "NCHW") if first else ("NHWC", "HWIO", "NHWC")
        self.channels, self.positions = (1, (2, 3)) if first else (3, (1, 2))

    def conv(
        self, x: Any, channels: int, size: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> Any:
        """A convolution to ``channels``, padded by ``padding``."""
        shape = (size, size, x.shape[self.channels] // groups, channels)
        kernel, *biases = self.parameters(shape, bias)
        strides, pads = (stride, stride), ((padding(size), padding(size)),) * 2
        y = lax.conv_general_dilated(
            x, kernel, strides, pads, None, None, self.numbers, feature_group_count=groups
        )
        return y + jnp.expand_dims(biases[0], (0, *self.positions)) if bias else y

    def logits(self, x: Any) -> Any:
        """(N, CLASSES): the mean over all positions, and a linear layer."""
        weights, bias = self.parameters((x.shape[self.channels], CLASSES), True)
        return x.mean(self.positions) @ weights + bias

    def max_pool(self, x: Any, size: int) -> Any:
        """Of stride 2, padded by ``padding``."""
        window, strides, pads = [1] * 4, [1] * 4, [0] * 4
        for axis in self.positions:
            window[axis], strides[axis], pads[axis] = size, 2, padding(size)
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, [(p, p) for p in pads])


def mobilenet_v2(net: Lax, x: Any) -> Any:
    """Sandler et al. 2018."""
    x, entering = net.relu6(net.conv(x, 32, 3, 2, bias=False)), 32
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
            hidden = entering * expansion
            y = net.relu6(net.conv(x, hidden, 1, bias=False)) if expansion > 1 else x
            y = net.relu6(net.conv(y, hidden, 3, stride, hidden, bias=False))
            y = net.conv(y, channels, 1, bias=False)
            x, entering = x + y if x.shape == y.shape else y, channels
    return net.logits(net.relu6(net.conv(x, 1280, 1, bias=False)))


def resnet_50(net: Lax, x: Any) -> Any:
    """He et al. 2015."""
    x = net.max_pool(net.relu(net.conv(x, 64, 7, 2, bias=False)), 3)
    for channels, blocks, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            y = net.relu(net.conv(x, channels, 1, bias=False))
            y = net.relu(net.conv(y, channels, 3, stride, bias=False))
            y = net.conv(y, 4 * channels, 1, bias=False)
            shortcut = net.conv(x, 4 * channels, 1, stride, bias=False) if block == 0 else x
            x = net.relu(shortcut + y)
    return net.logits(x)


def convnext_t(net: Lax, x: Any) -> Any:
    """Liu et al. 2022. Its convolutions have biases."""
    for channels, blocks, patch in ((96, 3, 4), (192, 3, 2), (384, 9, 2), (768, 3, 2)):
        x = net.conv(x, channels, patch, patch)
        for _ in range(blocks):
            y = net.conv(x, channels, 7, groups=channels)
            y = net.gelu(net.conv(y, 4 * channels, 1))
            x = x + net.conv(y, channels, 1)
    return net.logits(x)


def pooled(net: Lax, x: Any, blocks: tuple[tuple[int, int], ...]) -> Any:
    """Blocks of so many 3×3 convolutions and a max pool, to so many channels; one dense layer."""
    for channels, count in blocks:
        for _ in range(count):
            x = net.relu(net.conv(x, channels, 3))
        x = net.max_pool(x, 2)
    return net.logits(x)


class Network(NamedTuple):
    """A network, as functions of its parameters."""

    kind: str
    layers: Callable[[Lax, Any], Any]  # x → logits (N, CLASSES)
    batch: int
    first: bool = False  # as ``Lax.first``; the same values, in another order
    shape: tuple[int, ...] = (224, 224, 3)  # (h, w, channels) of one input
    directions = "forward", "training step"

    @property
    def name(self) -> str:
        return f"{self.kind}{', channels first' * self.first}, batch {self.batch}"

    def init(self) -> Params:
        """Random parameters that preserve the scale of activations."""
        rng, made = np.random.default_rng(0), Params()
        order = (3, 2, 0, 1) if self.first else (0, 1, 2, 3)  # of kernels only

        def parameters(shape: tuple[int, ...], bias: bool) -> tuple[np.ndarray, ...]:
            scale = np.float32(math.sqrt(math.prod(shape[:-1])))
            weights = rng.standard_normal(shape, np.float32) / scale
            kernel = weights.transpose(order) if weights.ndim > 2 else weights
            made.append((kernel, np.zeros(shape[-1], np.float32)) if bias else (kernel,))
            return made[-1]

        x, _ = self.data()
        jax.eval_shape(lambda x: self.layers(Lax(parameters, self.first), x), x)
        return jax.tree.map(jnp.asarray, made)

    def data(self) -> tuple[Array, Array]:
        """Random inputs and labels."""
        rng = np.random.default_rng(1)
        x = jnp.asarray(rng.standard_normal((self.batch, *self.shape)), jnp.float32)
        x = jnp.moveaxis(x, -1, 1) if self.first else x
        return x, jnp.asarray(rng.integers(0, CLASSES, self.batch), jnp.int32)

    def forward(self, params: Params, x: Array) -> Array:
        layers = iter(params)
        return self.layers(Lax(lambda *_: next(layers), self.first), x)

    def step(self, params: Params, x: Array, labels: Array) -> tuple[Array, Params]:
        """A training step: the loss, and the parameters after one step of gradient descent."""

        def loss(params: Params) -> Array:
            logits = jax.nn.log_softmax(self.forward(params, x))
            return -jnp.take_along_axis(logits, labels[..., None], -1).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - RATE * g, params, gradients)


NETWORKS = tuple(
    Network(kind, layers, batch, first)
    for first in (False, True)
    for kind, layers in (
        ("MobileNetV2", mobilenet_v2),
        ("ResNet-50", resnet_50),
        ("ConvNeXt-T", convnext_t),
    )
    for batch in (1, 8)
)
VGG_11 = ((64, 1), (128, 1), (256, 2), (512, 2), (512, 2))  # Simonyan and Zisserman 2014, A
NETWORKS += (
    Network("VGG-11", partial(pooled, blocks=VGG_11), 8, shape=(96, 96, 3)),
    Network("MNIST", partial(pooled, blocks=((32, 1), (64, 1))), 128, shape=(28, 28, 1)),
)
