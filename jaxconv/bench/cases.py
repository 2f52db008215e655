"""What is timed: layers of well-known networks, filters, poolings, random convolutions."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv.spec import ConvSpec, dilate
from jaxconv.tools.autotune import operands

DIRECTIONS = ("forward", "input gradient", "weight gradient")


class Layer(NamedTuple):
    """A forward convolution to time, channels last, in these directions."""

    name: str
    spec: ConvSpec
    directions: tuple[str, ...] = DIRECTIONS

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
        cotangent = np.random.default_rng(1).standard_normal(self.spec.out_shape, np.float32)
        return *operands(self.spec), jnp.asarray(cotangent, self.spec.dtype)


def arguments(spec: ConvSpec) -> dict[str, Any]:
    """Arguments of ``conv_general_dilated`` for ``spec``, with operands in the order of memory."""
    space = "DHW"[-spec.spatial_ndim :]
    kernel = spec.kernel_order.replace("x", space)
    if spec.weight_gradient:
        numbers = f"C{space}N", f"I{space}O", kernel.replace("I", "N").replace("O", "C")
    else:
        image = f"NC{space}" if spec.channels_first else f"N{space}C"
        numbers = image, kernel, image
    names = "window_strides", "padding", "lhs_dilation", "rhs_dilation"
    names += "feature_group_count", "batch_group_count"
    preferred = None if spec.out_dtype == spec.dtype else spec.out_dtype
    facts = {"dimension_numbers": numbers, "preferred_element_type": preferred}
    return {name: getattr(spec, name) for name in names} | facts


def alike(
    image: tuple[int, ...], kernel: tuple[int, ...], groups: int, *each: Any, dtype: Any = "float32"
) -> ConvSpec:
    """A convolution with ``each``, its stride, padding and dilations of image and kernel, the same
    along all axes; the sum of int8 is int32."""
    dtype = np.dtype(dtype)
    out_dtype = np.dtype("int32") if dtype == np.int8 else dtype
    strides, padding, ups, dilations = ((value,) * (len(image) - 2) for value in each)
    return ConvSpec(image, kernel, strides, padding, ups, dilations, dtype, out_dtype, groups)


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
    pads: tuple[int, int] | None = None,
    dilation: int = 1,
    causal: bool = False,
    up: bool = False,
    directions: tuple[str, ...] = DIRECTIONS,
) -> Layer:
    """A layer with a descriptive name, the same along each axis except for sizes, by default padded
    by half its kernel; ``up`` is transposed, to twice the size."""
    sizes = (size,) * ndim if isinstance(size, int) else size
    entering, leaving = channels
    what = "×".join([str(kernel)] * ndim) if ndim > 1 else f"{kernel} taps"
    if groups > 1:
        what += " depthwise" if groups == entering else f" in {groups} groups"
    low = high = kernel // 2 if kernel % 2 and stride < kernel else 0
    if stride > 1:
        what += f" stride {stride}"
    elif causal:
        low, high = (kernel - 1) * dilation, 0
        what += f" dilation {dilation}" if dilation > 1 else ""
    elif up:
        low = high = (kernel + 1) // 2
        what += " transposed stride 2"
    width = str(entering) if entering == leaving else f"{entering}→{leaving}"
    image, weights = (batch, *sizes, entering), (*(kernel,) * ndim, entering // groups, leaving)
    spec = alike(image, weights, groups, stride, pads or (low, high), 2 if up else 1, dilation)
    name = f"{network}: {what}, {'×'.join(map(str, (batch, *sizes)))}×{width}"
    return Layer(name, spec, directions)


def layers(network: str, batches: Sequence[int], *each: tuple[Any, ...]) -> list[Layer]:
    """Layers of a network, each with all batches."""
    return [layer_of(network, batch, *layer) for layer in each for batch in batches]


_signal, _volume = partial(layer_of, ndim=1), partial(layer_of, ndim=3)
FLOAT32 = (
    *layers("ResNet-50", [1, 8], (224, (3, 64), 7, 2), (56, (64, 64), 3), (28, (128, 128), 3)),
    *layers("ResNet-50", [1, 8], (14, (256, 256), 3), (7, (512, 512), 3), (56, (128, 128), 3, 2)),
    *layers("ResNet-50", [1, 8], (56, (64, 256), 1), (7, (512, 2048), 1), (56, (256, 512), 1, 2)),
    layer_of("MobileNetV2", 8, 224, (3, 32), 3, 2),
    layer_of("MobileNetV2", 1, 112, (32, 32), 3, 1, 32),
    layer_of("MobileNetV2", 8, 112, (96, 96), 3, 2, 96),
    *layers("MobileNetV2", [1, 8], (56, (144, 144), 3, 1, 144)),
    *layers("MobileNetV2", [8], (14, (576, 576), 3, 1, 576), (7, (960, 960), 3, 1, 960)),
    layer_of("MobileNetV2", 8, 56, (24, 144), 1),
    *layers("MobileNetV2", [1, 8], (7, (320, 1280), 1)),
    *layers("EfficientNet-B0", [1, 8], (28, (240, 240), 5, 1, 240)),
    *layers("EfficientNet-B0", [8], (14, (672, 672), 5, 2, 672), (1, (672, 28), 1)),
    *layers("ConvNeXt-T", [1, 8], (224, (3, 96), 4, 4)),
    layer_of("ConvNeXt-T", 8, 56, (96, 192), 2, 2),
    *layers("ConvNeXt-T", [1, 8], (56, (96, 96), 7, 1, 96)),
    *layers("ConvNeXt-T", [8], (14, (384, 384), 7, 1, 384), (56, (96, 384), 1)),
    layer_of("ResNeXt-50", 1, 56, (128, 128), 3, 1, 32),
    layer_of("ResNeXt-50", 8, 28, (256, 256), 3, 1, 32),
    layer_of("ResNeXt-50", 1, 14, (512, 512), 3, 1, 32),
    layer_of("ResNeXt-50", 8, 14, (1024, 1024), 3, 2, 32),
    *layers("VGG-16", [1], (224, (3, 64), 3), (224, (64, 64), 3), (56, (256, 256), 3)),
    layer_of("VGG-16", 8, 14, (512, 512), 3),
    _volume("3-D U-Net", 1, 32, (1, 32), 3),
    _volume("3-D U-Net", 1, 32, (32, 64), 3),
    _volume("3-D U-Net", 1, 16, (64, 128), 3),
    _volume("3-D U-Net", 2, 8, (128, 128), 3),
    _volume("3-D U-Net", 1, 8, (128, 128), 2, up=True),
    _signal("WaveNet", 1, 16000, (64, 64), 2, causal=True),
    _signal("WaveNet", 1, 16000, (64, 64), 2, causal=True, dilation=512),
    _signal("WaveNet", 1, 16000, (64, 256), 1),
    _signal("wav2vec 2.0", 1, 16000, (1, 512), 10, 5),
    _signal("wav2vec 2.0", 1, 3199, (512, 512), 3, 2, pads=(0, 0)),
    _signal("wav2vec 2.0", 4, 199, (512, 512), 2, 2),
    _signal("wav2vec 2.0", 1, 499, (768, 768), 128, 1, 16, pads=(64, 64)),
    _signal("Mamba", 1, 2048, (1536, 1536), 4, 1, 1536, causal=True),
    _signal("Mamba", 8, 1024, (768, 768), 4, 1, 768, causal=True),
    *layers("ViT-B/16", [1, 8], (224, (3, 768), 16, 16)),
    layer_of("Sobel", 1, 1024, (1, 2), 3),
    layer_of("RGB filter", 1, 512, (3, 3), 5, 1, 3),
    layer_of("blur", 1, 1024, (1, 1), 11),
    layer_of("large kernel", 1, 512, (1, 1), 31),
    layer_of("large kernel", 1, 512, (1, 1), 65),
    # lax takes too long for its gradients.
    _signal("FIR filter", 1, 1 << 20, (1, 1), 4096, causal=True, directions=("forward",)),
    layer_of("segmentation", 1, 64, (64, 32), 2, up=True),
    layer_of("GAN", 8, 16, (256, 128), 4, up=True),
)
LAYERS = FLOAT32 + tuple(
    Layer(f"{dtype} {layer.name}", layer.spec.replace(dtype=dtype, out_dtype=out), directions)
    for dtype, out, directions in (
        (np.dtype("bfloat16"), np.dtype("bfloat16"), DIRECTIONS),
        (np.dtype("int8"), np.dtype("int32"), ("forward",)),
    )
    for layer in (
        *layers("ResNet-50", [1], (28, (128, 128), 3), (28, (128, 512), 1)),
        layer_of("MobileNetV2", 1, 56, (144, 144), 3, 1, 144),
    )
)


class Pool(NamedTuple):
    """A pooling to time, channels last, the same along each axis; its mean is of whole windows."""

    kind: str  # "max", "mean"
    shape: tuple[int, ...]
    size: int
    stride: int
    directions = "forward", "gradient"

    @property
    def name(self) -> str:
        what = "×".join([str(self.size)] * (len(self.shape) - 2))
        return f"{self.kind} pool: {what} stride {self.stride}, {'×'.join(map(str, self.shape))}"

    def _pooled(self, x: Array) -> Array:
        window, strides = ([1, *[n] * (x.ndim - 2), 1] for n in (self.size, self.stride))
        if self.kind == "max":
            return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME")
        return lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME") / math.prod(window)

    def case(self, direction: str) -> tuple[Callable[..., Array], tuple[Array, ...]]:
        """The function to time and its operands: an image after a ReLU, a cotangent."""
        x = jax.nn.relu(jax.random.normal(jax.random.key(0), self.shape))
        if direction == "forward":
            return self._pooled, (x,)
        return lambda x, y: jax.vjp(self._pooled, x)[1](y)[0], (x, self._pooled(x))


POOLS = (
    Pool("max", (8, 112, 112, 64), 3, 2),
    Pool("max", (8, 112, 112, 64), 2, 2),
    Pool("max", (8, 28, 28, 192), 3, 1),
    Pool("mean", (8, 56, 56, 128), 2, 2),
    Pool("mean", (8, 28, 28, 192), 3, 1),
    Pool("max", (16, 4000, 64), 3, 2),
    Pool("max", (2, 32, 32, 32, 32), 2, 2),
)

# Random convolutions

SEED, COUNT = 2024, 200  # of the suite "regret"
# Operations that take as long as the overhead of a call; those that lax does in half a second on
# its fast paths, and in its loops; and bytes of operands.
FEWEST_FLOPS, FAST_FLOPS, LOOP_FLOPS, OPERANDS = 1e6, 1e10, 6e8, 64 << 20


def random_specs(seed: int, count: int) -> list[ConvSpec]:
    """Random convolutions as they occur in practice, transposed ones and weight gradients among
    them, each of at most about half a second by lax; the same for the same seed."""
    rng = np.random.default_rng(seed)
    specs: list[ConvSpec] = []
    while len(specs) < count:
        spec = _random_spec(rng)
        if spec is not None and _bounded(spec):
            specs.append(spec)
    return specs


# Probabilities or relative weights of what is drawn, and limits of sizes.
NDIM = {1: 0.2, 2: 0.65, 3: 0.15}
LARGEST = {1: 16384, 2: 256, 3: 40}
KERNELS = {
    1: {1: 1, 2: 2, 3: 3, 4: 2, 5: 1, 7: 1, 10: 1, 16: 1, 32: 1}
    | {64: 0.7, 255: 0.7, 512: 0.5, 1024: 0.5},
    2: {1: 4, 2: 1, 3: 6, 4: 1, 5: 2, 7: 2, 11: 1, 16: 0.5, 31: 0.5},
    3: {1: 2, 2: 2, 3: 6, 5: 1},
}
KINDS = {"dense": 0.52, "depthwise": 0.2, "grouped": 0.1, "single": 0.08, "stem": 0.1}
MULTIPLIERS = {1: 0.75, 2: 0.08, 3: 0.04, 4: 0.04, 8: 0.03, 16: 0.02, 32: 0.02, 64: 0.02}
STRIDES = {1: 0.68, 2: 0.17, 3: 0.04, 4: 0.05, 5: 0.02, 8: 0.04}
DILATIONS = {1: 0.82, 2: 0.08, 3: 0.03, 4: 0.04, 8: 0.03}
UPSAMPLING = {2: 0.5, 3: 0.1, 4: 0.2, 5: 0.05, 8: 0.15}
PADS = {"valid": 0.2, "half": 0.65, "causal": 0.15}
DTYPES = {"float32": 0.82, "bfloat16": 0.1, "int8": 0.04, "float64": 0.04}


def _pick(rng: np.random.Generator, weights: Mapping[Any, float]) -> Any:
    shares = np.array(list(weights.values()))
    return list(weights)[rng.choice(len(shares), p=shares / shares.sum())]


def _random_spec(rng: np.random.Generator) -> ConvSpec | None:
    ndim = _pick(rng, NDIM)
    size = _between(rng, 4, LARGEST[ndim])
    square = rng.random() < 0.8
    sizes = [size if square else _between(rng, 4, LARGEST[ndim]) for _ in range(ndim)]
    kernel, kind = _pick(rng, KERNELS[ndim]), _pick(rng, KINDS)
    c, o, groups = _channels(rng), _channels(rng), 1
    if rng.random() < 0.4:
        o = c
    if kind == "depthwise":
        groups, o = c, c * _pick(rng, MULTIPLIERS)
    elif kind == "grouped":
        groups = int(rng.choice([2, 4, 8, 16, 32]))
        c, o = groups * math.ceil(c / groups), groups * math.ceil(o / groups)
    elif kind == "single":
        c, o = 1, int(rng.choice([1, 2, 8]))
    elif kind == "stem":
        c = int(rng.choice([1, 2, 3, 4]))
    stride = _pick(rng, STRIDES if kernel > 1 else {1: 0.9, 2: 0.1})
    if kernel in (2, 4, 16) and rng.random() < 0.5:
        stride = kernel  # patches
    dilation = _pick(rng, DILATIONS) if stride == 1 and kernel > 1 else 1
    up = 1
    if kernel > 1 and stride == dilation == 1 and rng.random() < 0.2:
        up = min(_pick(rng, UPSAMPLING) if rng.random() < 0.8 else kernel // 4, kernel) or 1
        if groups == 1 and rng.random() < 0.5:
            c, o = o, c  # as in the input gradient
    extent = dilate(kernel, dilation)
    if extent > 2 * dilate(min(sizes), up):
        return None  # mostly padding
    half, causal = ((extent - 1) // 2, extent // 2), (extent - 1, 0)
    pads = {"valid": (0, 0), "half": half, "causal": causal}[_pick(rng, PADS)]
    dtype, batch = _pick(rng, DTYPES), int(rng.choice([1, 2, 4, 8]))
    image, weights = (batch, *sizes, c), (*(kernel,) * ndim, c // groups, o)
    spec = alike(image, weights, groups, stride, pads, up, dilation, dtype=dtype)
    if spec.is_empty:
        return None
    if up == 1 and dtype != "int8" and rng.random() < 0.3:
        return spec.kernel_gradient
    return spec


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _channels(rng: np.random.Generator) -> int:
    if rng.random() < 0.1:
        return 3
    return 2 ** int(rng.integers(3, 10)) if rng.random() < 0.6 else _between(rng, 1, 512)


def _bounded(spec: ConvSpec) -> bool:
    # Batch groups, and feature groups outside f32, become one dense convolution with zeros.
    masked = spec.batch_group_count if spec.dtype == np.float32 else spec.groups
    fast = spec.spatial_ndim < 3 and spec.groups == 1 and jnp.issubdtype(spec.dtype, np.inexact)
    flops = spec.flops * masked
    within = FEWEST_FLOPS <= flops <= (FAST_FLOPS if fast else LOOP_FLOPS)
    return within and spec.operand_bytes <= OPERANDS
