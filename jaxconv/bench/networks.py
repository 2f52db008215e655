"""Networks of papers, and small ones that people train on a CPU, without normalisation, so that
convolutions dominate their cost; those that a normalisation follows in the paper have no bias.

Each is written once and run by JAX (``Lax``, which calls lax's functions as a user's model does)
and by PyTorch (``torch_peer.Torch``, with the same methods).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv.arguments.hints import lettered

# For each layer: kernel (h, w, in, out) or matrix (in, out), and bias if any.
Params = list[tuple[Any, ...]]
# So large that gradients dominate the updated parameters, by which a step is checked.
RATE = 1024.0
CLASSES = 1000


def padding(kernel: int, stride: int) -> int:
    """That of a kernel whose output has the size of its input over ``stride``."""
    return (kernel - stride + 1) // 2


class Lax:
    """Operations by JAX on images, whose channels, and those of kernels, may be ``first``;
    ``parameters`` returns a layer's, from the shape of its kernel and whether it has a bias."""

    relu = staticmethod(jax.nn.relu)
    relu6 = staticmethod(jax.nn.relu6)
    gelu = staticmethod(jax.nn.gelu)
    leaky_relu = staticmethod(partial(jax.nn.leaky_relu, negative_slope=0.2))

    def __init__(self, parameters: Callable[..., tuple[Any, ...]], first: bool = False) -> None:
        self.parameters, self.first = parameters, first

    def axes(self, x: Any) -> tuple[int, tuple[int, ...]]:
        """The axis of channels, and those of positions."""
        return (1, tuple(range(2, x.ndim))) if self.first else (-1, tuple(range(1, x.ndim - 1)))

    def conv(
        self, x: Any, channels: int, size: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> Any:
        """A convolution to ``channels``, padded by ``padding``."""
        last, positions = self.axes(x)
        ndim, pad = len(positions), padding(size, stride)
        kernel, *biases = self.parameters((*ndim * [size], x.shape[last] // groups, channels), bias)
        numbers = None if self.first else lettered(x.ndim)
        strides, pads = ndim * [stride], ndim * [(pad, pad)]
        y = lax.conv_general_dilated(
            x, kernel, strides, pads, None, None, numbers, feature_group_count=groups
        )
        return y + jnp.expand_dims(biases[0], (0, *positions)) if bias else y

    def logits(self, x: Any) -> Any:
        """(N, CLASSES): the mean over all positions, and a linear layer."""
        last, positions = self.axes(x)
        weights, bias = self.parameters((x.shape[last], CLASSES), True)
        return x.mean(positions) @ weights + bias

    def max_pool(self, x: Any, size: int) -> Any:
        """Of stride 2, padded by ``padding``."""
        window, strides, pads = [1] * x.ndim, [1] * x.ndim, [0] * x.ndim
        for axis in self.axes(x)[1]:
            window[axis], strides[axis], pads[axis] = size, 2, padding(size, 2)
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, [(p, p) for p in pads])

    def enlarged(self, x: Any, other: Any) -> Any:
        """Each element of ``x`` twice along all positions, and the channels of ``other``."""
        last, positions = self.axes(x)
        for axis in positions:
            x = jnp.repeat(x, 2, axis)
        return jnp.concatenate([x, other], last)


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
        for stride in (first_stride, *[1] * (blocks - 1)):
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
        for stride in (first_stride, *[1] * (blocks - 1)):
            y = net.relu(net.conv(x, channels, 1, bias=False))
            y = net.relu(net.conv(y, channels, 3, stride, bias=False))
            y = net.conv(y, 4 * channels, 1, bias=False)
            shortcut = x if x.shape == y.shape else net.conv(x, 4 * channels, 1, stride, bias=False)
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


def resnet_20(net: Lax, x: Any) -> Any:
    """He et al. 2015, for CIFAR."""
    x = net.relu(net.conv(x, 16, 3, bias=False))
    for channels, first_stride in ((16, 1), (32, 2), (64, 2)):
        for stride in (first_stride, 1, 1):
            y = net.relu(net.conv(x, channels, 3, stride, bias=False))
            y = net.conv(y, channels, 3, bias=False)
            shortcut = net.conv(x, channels, 1, stride, bias=False) if stride > 1 else x
            x = net.relu(shortcut + y)
    return net.logits(x)


def strided(net: Lax, x: Any) -> Any:
    """Two 5×5 convolutions of stride 2."""
    return net.logits(net.relu(net.conv(net.relu(net.conv(x, 32, 5, 2)), 64, 5, 2)))


def discriminator(net: Lax, x: Any) -> Any:
    """Of a GAN, as Radford et al. 2015."""
    for channels in (64, 128, 256):
        x = net.leaky_relu(net.conv(x, channels, 4, 2))
    return net.logits(x)


def keyword_spotting(net: Lax, x: Any) -> Any:
    """TC-ResNet8, Choi et al. 2019: 9 taps in time, the spectrum as channels."""
    x = net.relu(net.conv(x, 16, 3, bias=False))
    for channels in (24, 32, 48):
        y = net.relu(net.conv(x, channels, 9, 2, bias=False))
        x = net.relu(net.conv(y, channels, 9, bias=False) + net.conv(x, channels, 1, 2, bias=False))
    return net.logits(x)


def separable(net: Lax, x: Any) -> Any:
    """Depthwise and 1×1 convolutions, as MobileNet's."""
    x, entering = net.relu(net.conv(x, 32, 3)), 32
    for channels, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)):
        x = net.relu(net.conv(x, entering, 3, stride, entering))
        x, entering = net.relu(net.conv(x, channels, 1)), channels
    return net.logits(x)


def impala(net: Lax, x: Any) -> Any:
    """The convolutions of a reinforcement learner, Espeholt et al. 2018."""
    for channels in (16, 32, 32):
        x = net.max_pool(net.conv(x, channels, 3), 3)
        for _ in range(2):
            x = x + net.conv(net.relu(net.conv(net.relu(x), channels, 3)), channels, 3)
    return net.logits(net.relu(x))


def unet(net: Lax, x: Any) -> Any:
    """A small U-Net, Ronneberger et al. 2015."""
    passed = []
    for channels in (16, 32, 64):
        x = net.relu(net.conv(x, channels, 5))
        passed.append(x)
        x = net.max_pool(x, 2)
    for channels, other in zip((64, 32, 16), reversed(passed), strict=True):
        x = net.relu(net.conv(net.enlarged(x, other), channels, 5))
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

        def parameters(shape: tuple[int, ...], bias: bool) -> tuple[np.ndarray, ...]:
            scale = np.float32(math.sqrt(math.prod(shape[:-1])))
            weights = rng.standard_normal(shape, np.float32) / scale
            moved = self.first and weights.ndim > 2  # a kernel
            kernel = np.moveaxis(weights, (-1, -2), (0, 1)) if moved else weights
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


LARGE = ("MobileNetV2", mobilenet_v2), ("ResNet-50", resnet_50), ("ConvNeXt-T", convnext_t)
VGG_11 = ((64, 1), (128, 1), (256, 2), (512, 2), (512, 2))  # Simonyan and Zisserman 2014, A
SMALL = (
    ("VGG-11", partial(pooled, blocks=VGG_11), (96, 96, 3), [8]),
    ("ResNet-20", resnet_20, (32, 32, 3), [1, 64]),
    ("CIFAR", partial(pooled, blocks=((32, 2), (64, 2), (128, 2))), (32, 32, 3), [1, 64]),
    ("MNIST", partial(pooled, blocks=((32, 1), (64, 1))), (28, 28, 1), [1, 64]),
    ("MNIST, strides", strided, (28, 28, 1), [1, 64]),
    ("separable", separable, (32, 32, 3), [1, 64]),
    ("keyword spotting", keyword_spotting, (101, 40), [1, 64]),
    ("volume", partial(pooled, blocks=((16, 1), (32, 1), (32, 1))), (32, 32, 32, 1), [1, 4]),
    ("reinforcement", impala, (64, 64, 3), [1, 64]),
    ("discriminator", discriminator, (32, 32, 3), [1, 64]),
    ("U-Net, 1-D", unet, (1024, 1), [1, 64]),
)
NETWORKS = (
    *(Network(*net, batch, first) for first in (False, True) for net in LARGE for batch in (1, 8)),
    *(Network(kind, net, size, shape=shape) for kind, net, shape, sizes in SMALL for size in sizes),
)
