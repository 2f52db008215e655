"""The layers that are timed: those of well-known networks, and image and signal filters."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxconv.bench.networks import LAYOUTS
from jaxconv.spec import ConvSpec

DIRECTIONS = ("forward", "input gradient", "weight gradient")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution to time, channels last, the same along each spatial axis but for its sizes.

    Attributes:
      lhs_shape: (N, spatial…, C).
      rhs_shape: (spatial…, C / groups, O).
      padding: (before, after), of each spatial axis; on transposed layers of the dilated image.
      directions: those that are measured, of ``DIRECTIONS``.
    """

    name: str
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    padding: tuple[int, int] = (0, 0)
    stride: int = 1
    groups: int = 1
    lhs_dilation: int = 1
    rhs_dilation: int = 1
    dtype: str = "float32"
    out_dtype: str | None = None
    directions: tuple[str, ...] = DIRECTIONS

    @property
    def ndim(self) -> int:
        return len(self.lhs_shape) - 2

    @property
    def spec(self) -> ConvSpec:
        """Of the forward convolution."""
        ndim = self.ndim
        return ConvSpec(
            self.lhs_shape,
            self.rhs_shape,
            (self.stride,) * ndim,
            (self.padding,) * ndim,
            (self.lhs_dilation,) * ndim,
            (self.rhs_dilation,) * ndim,
            np.dtype(self.dtype),
            np.dtype(self.out_dtype or self.dtype),
            self.groups,
        )

    def function(
        self, conv: Callable[..., Array], direction: str, **options: Any
    ) -> Callable[..., Array]:
        """What is timed, of ``operands()``, by ``conv`` with lax's signature and ``options``."""
        forward = partial(
            conv,
            window_strides=(self.stride,) * self.ndim,
            padding=(self.padding,) * self.ndim,
            lhs_dilation=(self.lhs_dilation,) * self.ndim,
            rhs_dilation=(self.rhs_dilation,) * self.ndim,
            dimension_numbers=LAYOUTS[self.ndim],
            feature_group_count=self.groups,
            preferred_element_type=None if self.out_dtype is None else np.dtype(self.out_dtype),
            **options,
        )

        def input_gradient(lhs: Array, rhs: Array, cotangent: Array) -> Array:
            return jax.linear_transpose(lambda lhs: forward(lhs, rhs), lhs)(cotangent)[0]

        def weight_gradient(lhs: Array, rhs: Array, cotangent: Array) -> Array:
            return jax.linear_transpose(lambda rhs: forward(lhs, rhs), rhs)(cotangent)[0]

        functions = (lambda lhs, rhs, _: forward(lhs, rhs)), input_gradient, weight_gradient
        return functions[DIRECTIONS.index(direction)]

    def operands(self) -> tuple[Array, Array, Array]:
        """Image, kernel, and cotangent of the output."""
        rng = np.random.default_rng(0)

        def random(shape: tuple[int, ...]) -> Array:
            if jnp.issubdtype(self.dtype, np.integer):
                return jnp.asarray(rng.integers(-9, 9, shape), self.dtype)
            return jnp.asarray(rng.standard_normal(shape, np.float32), self.dtype)

        return random(self.lhs_shape), random(self.rhs_shape), random(self.spec.out_shape)


def _conv(
    network: str,
    batch: int,
    size: int | tuple[int, ...],
    channels: tuple[int, int],
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    ndim: int = 2,
    **changes: object,
) -> Layer:
    """A layer padded by half its kernel, with a name that says what it is."""
    sizes = (size,) * ndim if isinstance(size, int) else size
    entering, leaving = channels
    what = "×".join([str(kernel)] * ndim) if ndim > 1 else f"{kernel} taps"
    if groups > 1:
        what += " depthwise" if groups == entering else f" in {groups} groups"
    if stride > 1:
        what += f" stride {stride}"
    width = str(entering) if entering == leaving else f"{entering}→{leaving}"
    shape = "×".join(map(str, (batch, *sizes)))
    half = kernel // 2 if kernel % 2 and stride < kernel else 0
    layer = Layer(
        f"{network}: {what}, {shape}×{width}",
        (batch, *sizes, entering),
        (*(kernel,) * ndim, entering // groups, leaving),
        padding=(half, half),
        stride=stride,
        groups=groups,
    )
    return dataclasses.replace(layer, **changes)  # pyright: ignore[reportArgumentType]


def _causal(
    network: str, batch: int, length: int, channels: int, taps: int, dilation: int = 1, **kw: int
) -> Layer:
    layer = _conv(network, batch, (length,), (channels, channels), taps, ndim=1, **kw)
    name = layer.name if dilation == 1 else layer.name.replace("taps", f"taps dilation {dilation}")
    pads = ((taps - 1) * dilation, 0)
    return dataclasses.replace(layer, name=name, padding=pads, rhs_dilation=dilation)


def _up(
    network: str, batch: int, size: int, channels: tuple[int, int], kernel: int, ndim: int = 2
) -> Layer:
    """Transposed, stride 2: to twice the size."""
    layer = _conv(network, batch, size, channels, kernel, ndim=ndim)
    name = layer.name.replace(",", " transposed stride 2,", 1)
    pad = kernel - 1 - (kernel - 2) // 2
    return dataclasses.replace(layer, name=name, padding=(pad, pad), lhs_dilation=2)


def _convs(network: str, layers: Sequence[tuple[Any, ...]]) -> tuple[Layer, ...]:
    return tuple(_conv(network, *layer) for layer in layers)


RESNET = _convs(
    "ResNet-50",
    [
        (batch, *layer)
        for batch in (1, 8)
        for layer in (
            (224, (3, 64), 7, 2),
            (56, (64, 64), 3),
            (28, (128, 128), 3),
            (14, (256, 256), 3),
            (7, (512, 512), 3),
            (56, (128, 128), 3, 2),
            (56, (64, 256), 1),
            (7, (512, 2048), 1),
            (56, (256, 512), 1, 2),
        )
    ],
)
MOBILENET = _convs(
    "MobileNetV2",
    (
        (8, 224, (3, 32), 3, 2),
        (1, 112, (32, 32), 3, 1, 32),
        (8, 112, (96, 96), 3, 2, 96),
        (1, 56, (144, 144), 3, 1, 144),
        (8, 56, (144, 144), 3, 1, 144),
        (8, 14, (576, 576), 3, 1, 576),
        (8, 7, (960, 960), 3, 1, 960),
        (8, 56, (24, 144), 1),
        (1, 7, (320, 1280), 1),
        (8, 7, (320, 1280), 1),
    ),
)
EFFICIENTNET = _convs(
    "EfficientNet-B0",
    (
        (1, 28, (240, 240), 5, 1, 240),
        (8, 28, (240, 240), 5, 1, 240),
        (8, 14, (672, 672), 5, 2, 672),
        (8, 1, (672, 28), 1),
    ),
)
CONVNEXT = _convs(
    "ConvNeXt-T",
    (
        (1, 224, (3, 96), 4, 4),
        (8, 224, (3, 96), 4, 4),
        (8, 56, (96, 192), 2, 2),
        (1, 56, (96, 96), 7, 1, 96),
        (8, 56, (96, 96), 7, 1, 96),
        (8, 14, (384, 384), 7, 1, 384),
        (8, 56, (96, 384), 1),
    ),
)
RESNEXT = _convs(
    "ResNeXt-50",
    (
        (1, 56, (128, 128), 3, 1, 32),
        (8, 28, (256, 256), 3, 1, 32),
        (1, 14, (512, 512), 3, 1, 32),
        (8, 14, (1024, 1024), 3, 2, 32),
    ),
)
VGG = _convs(
    "VGG-16",
    (
        (1, 224, (3, 64), 3),
        (1, 224, (64, 64), 3),
        (1, 56, (256, 256), 3),
        (8, 14, (512, 512), 3),
    ),
)
UNET = (
    _conv("3-D U-Net", 1, 32, (1, 32), 3, ndim=3),
    _conv("3-D U-Net", 1, 32, (32, 64), 3, ndim=3),
    _conv("3-D U-Net", 1, 16, (64, 128), 3, ndim=3),
    _conv("3-D U-Net", 2, 8, (128, 128), 3, ndim=3),
    _up("3-D U-Net", 1, 8, (128, 128), 2, ndim=3),
)
SIGNALS = (
    _causal("WaveNet", 1, 16000, 64, 2),
    _causal("WaveNet", 1, 16000, 64, 2, 512),
    _conv("WaveNet", 1, (16000,), (64, 256), 1, ndim=1),
    _conv("wav2vec 2.0", 1, (16000,), (1, 512), 10, 5, ndim=1),
    _conv("wav2vec 2.0", 1, (3199,), (512, 512), 3, 2, ndim=1, padding=(0, 0)),
    _conv("wav2vec 2.0", 4, (199,), (512, 512), 2, 2, ndim=1),
    _conv("wav2vec 2.0", 1, (499,), (768, 768), 128, 1, 16, ndim=1, padding=(64, 64)),
    _causal("Mamba", 1, 2048, 1536, 4, groups=1536),
    _causal("Mamba", 8, 1024, 768, 4, groups=768),
)
PATCHES = tuple(_conv("ViT-B/16", batch, 224, (3, 768), 16, 16) for batch in (1, 8))
FILTERS = (
    _conv("Sobel", 1, 1024, (1, 2), 3),
    _conv("RGB filter", 1, 512, (3, 3), 5, 1, 3),
    _conv("blur", 1, 1024, (1, 1), 11),
    _conv("large kernel", 1, 512, (1, 1), 31),
    _conv("large kernel", 1, 512, (1, 1), 65),
    # lax takes too long for its gradients.
    _conv(
        "FIR filter",
        1,
        (1 << 20,),
        (1, 1),
        4096,
        ndim=1,
        padding=(4095, 0),
        directions=("forward",),
    ),
)
UPSAMPLING = (
    _up("segmentation", 1, 64, (64, 32), 2),
    _up("GAN", 8, 16, (256, 128), 4),
)
DTYPES = tuple(
    dataclasses.replace(layer, name=f"{dtype} {layer.name}", **changes)
    for dtype, changes in (
        ("bfloat16", {"dtype": "bfloat16"}),
        ("int8", {"dtype": "int8", "out_dtype": "int32", "directions": ("forward",)}),
    )
    for layer in (
        _conv("ResNet-50", 1, 28, (128, 128), 3),
        _conv("ResNet-50", 1, 28, (128, 512), 1),
        _conv("MobileNetV2", 1, 56, (144, 144), 3, 1, 144),
    )
)
LAYERS = (
    *RESNET,
    *MOBILENET,
    *EFFICIENTNET,
    *CONVNEXT,
    *RESNEXT,
    *VGG,
    *UNET,
    *SIGNALS,
    *PATCHES,
    *FILTERS,
    *UPSAMPLING,
    *DTYPES,
)
