"""The layers to time: those of well-known networks, and image and signal filters."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxconv.spec import ConvSpec

DIRECTIONS = ("forward", "input gradient", "weight gradient")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution to time, channels last, the same along each spatial axis except for sizes."""

    name: str
    lhs_shape: tuple[int, ...]  # (N, spatial…, C)
    rhs_shape: tuple[int, ...]  # (spatial…, C / groups, O)
    padding: tuple[int, int] = (0, 0)
    stride: int = 1
    groups: int = 1
    lhs_dilation: int = 1
    rhs_dilation: int = 1
    dtype: str = "float32"
    out_dtype: str | None = None
    directions: tuple[str, ...] = DIRECTIONS

    @property
    def spec(self) -> ConvSpec:
        """The forward convolution."""
        ndim = len(self.lhs_shape) - 2
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
        """The function of ``operands()`` to time; it calls ``conv`` as lax's, with ``options``."""
        forward = partial(conv, **arguments(self.spec), **options)

        def run(lhs: Array, rhs: Array, cotangent: Array) -> Array:
            if direction == "forward":
                return forward(lhs, rhs)
            if direction == "input gradient":
                return jax.linear_transpose(lambda lhs: forward(lhs, rhs), lhs)(cotangent)[0]
            return jax.linear_transpose(lambda rhs: forward(lhs, rhs), rhs)(cotangent)[0]

        return run

    def operands(self) -> tuple[Array, Array, Array]:
        """Image, kernel, and cotangent of the output."""
        rng = np.random.default_rng(0)
        scale = 4 if jnp.issubdtype(self.dtype, np.integer) else 1
        shapes = self.lhs_shape, self.rhs_shape, self.spec.out_shape
        x, w, y = (scale * rng.standard_normal(shape, np.float32) for shape in shapes)
        return jnp.asarray(x, self.dtype), jnp.asarray(w, self.dtype), jnp.asarray(y, self.dtype)


def arguments(spec: ConvSpec) -> dict[str, Any]:
    """Arguments of ``conv_general_dilated`` for ``spec``, with operands in the order of memory."""
    space = "DHW"[-spec.spatial_ndim :]
    kernel = spec.kernel_order.replace("x", space)
    if spec.weight_gradient:
        numbers = f"C{space}N", f"I{space}O", kernel.replace("I", "N").replace("O", "C")
    else:
        image = f"NC{space}" if spec.channels_first else f"N{space}C"
        numbers = image, kernel, image
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    names += ("feature_group_count", "batch_group_count")
    preferred = None if spec.out_dtype == spec.dtype else spec.out_dtype
    facts = {"dimension_numbers": numbers, "preferred_element_type": preferred}
    return {name: getattr(spec, name) for name in names} | facts


def layer_of(
    network: str,
    batch: int,
    size: int | tuple[int, ...],
    channels: tuple[int, int],
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    *,
    ndim: int = 2,
    causal: int = 0,
    up: bool = False,
    **changes: Any,
) -> Layer:
    """A layer padded by half its kernel, with a descriptive name.

    ``causal`` is the dilation of a causal kernel; ``up`` is transposed, to twice the size.
    """
    sizes = (size,) * ndim if isinstance(size, int) else size
    entering, leaving = channels
    what = "×".join([str(kernel)] * ndim) if ndim > 1 else f"{kernel} taps"
    if groups > 1:
        what += " depthwise" if groups == entering else f" in {groups} groups"
    half = kernel // 2 if kernel % 2 and stride < kernel else 0
    pads = (half, half)
    if stride > 1:
        what += f" stride {stride}"
    elif causal:
        pads = ((kernel - 1) * causal, 0)
        what += f" dilation {causal}" if causal > 1 else ""
    elif up:
        pads = ((kernel + 1) // 2,) * 2
        what += " transposed stride 2"
    width = str(entering) if entering == leaving else f"{entering}→{leaving}"
    facts: dict[str, Any] = {
        "name": f"{network}: {what}, {'×'.join(map(str, (batch, *sizes)))}×{width}",
        "lhs_shape": (batch, *sizes, entering),
        "rhs_shape": (*(kernel,) * ndim, entering // groups, leaving),
        "padding": pads,
        "stride": stride,
        "groups": groups,
        "lhs_dilation": 2 if up else 1,
        "rhs_dilation": max(1, causal),
    }
    return Layer(**facts | changes)


def _both(network: str, *layer: Any) -> tuple[Layer, Layer]:
    return layer_of(network, 1, *layer), layer_of(network, 8, *layer)


_signal, _volume = partial(layer_of, ndim=1), partial(layer_of, ndim=3)
FLOAT32 = (
    *_both("ResNet-50", 224, (3, 64), 7, 2),
    *_both("ResNet-50", 56, (64, 64), 3),
    *_both("ResNet-50", 28, (128, 128), 3),
    *_both("ResNet-50", 14, (256, 256), 3),
    *_both("ResNet-50", 7, (512, 512), 3),
    *_both("ResNet-50", 56, (128, 128), 3, 2),
    *_both("ResNet-50", 56, (64, 256), 1),
    *_both("ResNet-50", 7, (512, 2048), 1),
    *_both("ResNet-50", 56, (256, 512), 1, 2),
    layer_of("MobileNetV2", 8, 224, (3, 32), 3, 2),
    layer_of("MobileNetV2", 1, 112, (32, 32), 3, 1, 32),
    layer_of("MobileNetV2", 8, 112, (96, 96), 3, 2, 96),
    *_both("MobileNetV2", 56, (144, 144), 3, 1, 144),
    layer_of("MobileNetV2", 8, 14, (576, 576), 3, 1, 576),
    layer_of("MobileNetV2", 8, 7, (960, 960), 3, 1, 960),
    layer_of("MobileNetV2", 8, 56, (24, 144), 1),
    *_both("MobileNetV2", 7, (320, 1280), 1),
    *_both("EfficientNet-B0", 28, (240, 240), 5, 1, 240),
    layer_of("EfficientNet-B0", 8, 14, (672, 672), 5, 2, 672),
    layer_of("EfficientNet-B0", 8, 1, (672, 28), 1),
    *_both("ConvNeXt-T", 224, (3, 96), 4, 4),
    layer_of("ConvNeXt-T", 8, 56, (96, 192), 2, 2),
    *_both("ConvNeXt-T", 56, (96, 96), 7, 1, 96),
    layer_of("ConvNeXt-T", 8, 14, (384, 384), 7, 1, 384),
    layer_of("ConvNeXt-T", 8, 56, (96, 384), 1),
    layer_of("ResNeXt-50", 1, 56, (128, 128), 3, 1, 32),
    layer_of("ResNeXt-50", 8, 28, (256, 256), 3, 1, 32),
    layer_of("ResNeXt-50", 1, 14, (512, 512), 3, 1, 32),
    layer_of("ResNeXt-50", 8, 14, (1024, 1024), 3, 2, 32),
    layer_of("VGG-16", 1, 224, (3, 64), 3),
    layer_of("VGG-16", 1, 224, (64, 64), 3),
    layer_of("VGG-16", 1, 56, (256, 256), 3),
    layer_of("VGG-16", 8, 14, (512, 512), 3),
    _volume("3-D U-Net", 1, 32, (1, 32), 3),
    _volume("3-D U-Net", 1, 32, (32, 64), 3),
    _volume("3-D U-Net", 1, 16, (64, 128), 3),
    _volume("3-D U-Net", 2, 8, (128, 128), 3),
    _volume("3-D U-Net", 1, 8, (128, 128), 2, up=True),
    _signal("WaveNet", 1, 16000, (64, 64), 2, causal=1),
    _signal("WaveNet", 1, 16000, (64, 64), 2, causal=512),
    _signal("WaveNet", 1, 16000, (64, 256), 1),
    _signal("wav2vec 2.0", 1, 16000, (1, 512), 10, 5),
    _signal("wav2vec 2.0", 1, 3199, (512, 512), 3, 2, padding=(0, 0)),
    _signal("wav2vec 2.0", 4, 199, (512, 512), 2, 2),
    _signal("wav2vec 2.0", 1, 499, (768, 768), 128, 1, 16, padding=(64, 64)),
    _signal("Mamba", 1, 2048, (1536, 1536), 4, 1, 1536, causal=1),
    _signal("Mamba", 8, 1024, (768, 768), 4, 1, 768, causal=1),
    *_both("ViT-B/16", 224, (3, 768), 16, 16),
    layer_of("Sobel", 1, 1024, (1, 2), 3),
    layer_of("RGB filter", 1, 512, (3, 3), 5, 1, 3),
    layer_of("blur", 1, 1024, (1, 1), 11),
    layer_of("large kernel", 1, 512, (1, 1), 31),
    layer_of("large kernel", 1, 512, (1, 1), 65),
    # lax takes too long for its gradients.
    _signal("FIR filter", 1, 1 << 20, (1, 1), 4096, causal=1, directions=("forward",)),
    layer_of("segmentation", 1, 64, (64, 32), 2, up=True),
    layer_of("GAN", 8, 16, (256, 128), 4, up=True),
)
LAYERS = FLOAT32 + tuple(
    dataclasses.replace(layer, name=f"{dtype} {layer.name}", dtype=dtype, **changes)
    for dtype, changes in (
        ("bfloat16", {}),
        ("int8", {"out_dtype": "int32", "directions": ("forward",)}),
    )
    for layer in (
        layer_of("ResNet-50", 1, 28, (128, 128), 3),
        layer_of("ResNet-50", 1, 28, (128, 512), 1),
        layer_of("MobileNetV2", 1, 56, (144, 144), 3, 1, 144),
    )
)
