"""Where a convolution is among others: those that behave alike are near each other."""

import math
from collections.abc import Iterable, Sequence

from jaxconv import layout
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.xla import EIGEN_CHANNELS
from jaxconv.spec import ConvSpec, dilate

# The roofline: seconds of a call and of a step of a loop, FLOP/s, bytes/s of two cores.
CALL, STEP, RATE, BANDWIDTH = 5e-6, 1e-6, 5e10, 2e10
# FLOPs and ten times the bytes of an operation above which XLA:CPU splits it between threads.
SPLIT = 200_000
DTYPES = ("float32", "bfloat16", "float16", "int8", "int32", "float64", "complex64")
# The weight of each of XLA's code paths: the larger, the less alike the others.
PATHS = dict.fromkeys(("packed", "eigen", "dilated", "volume", "grouped", "depthwise"), 0.6)
PATHS |= {"multiply": 2.0, "loop": 1.3, "loop in groups": 1.0, "swapped": 1.9}


def roofline(flops: float, traffic: float, steps: int = 1) -> float:
    """Seconds that work takes at least, about: FLOPs, bytes, steps of a loop."""
    return CALL + flops / RATE + traffic / BANDWIDTH + STEP * (steps - 1)


def floors(spec: ConvSpec, names: Iterable[str]) -> dict[str, float]:
    """The logarithm of the seconds that the work of each algorithm takes at least, about, for a
    prepared ``spec``."""
    costs = ((name, ALGORITHMS[name].cost(spec)) for name in names)
    return {name: math.log(roofline(c.flops, c.traffic, c.steps)) for name, c in costs}


def position(spec: ConvSpec) -> tuple[float, ...]:
    """Coordinates of a prepared ``spec``, of a weight gradient by its forward convolution. Factors
    are those of the largest likelihood of the package's rows."""
    forward = spec.forward
    groups, m, n, k = forward.gemm
    c, size, dtype = forward.rhs_shape[-2], spec.dtype.itemsize, spec.dtype.name
    output = math.prod(spec.out_shape) * spec.accumulator_dtype.itemsize
    image, kernel = (math.prod(shape) * size for shape in (spec.lhs_shape, spec.rhs_shape))
    path = xla_path(spec)
    return (
        0.1 * _log(m),
        0.35 * _log(n),
        0.25 * _log(c),
        0.4 * _log(forward.taps),
        0.25 * _log(groups),
        0.2 * _log(forward.lhs_shape[0]),
        0.25 * _log(spec.flops),
        0.4 * _log(spec.operand_bytes),
        0.15 * _log(kernel),
        0.12 * _log(groups * m * k * size),
        0.15 * _log(max(forward.kernel_shape, default=1)),
        0.15 * _log(forward.out_spatial[-1] if forward.out_spatial else 1),
        0.1 * _log(min(forward.out_spatial, default=1)),
        # Vectors that are not full.
        0.7 * (_log(-(-n // layout.LANES) * layout.LANES) - _log(n)),
        0.9 * (_log(-(-c // 8) * 8) - _log(c)),
        # The share of the padded image that is image.
        0.35 * sum(_log(a.padded) - _log(dilate(a.size, a.spacing)) for a in forward.axes),
        0.3 * _step(forward.window_strides),
        0.65 * _step(forward.lhs_dilation),
        0.2 * _step(forward.rhs_dilation),
        0.7 * forward.spatial_ndim,
        0.9 * (forward.taps == 1),
        0.85 * spec.weight_gradient,
        # What XLA:CPU splits between threads.
        0.25 * (10 * output > SPLIT),
        0.4 * (10 * image > SPLIT),
        0.3 * (spec.flops > 10 * SPLIT),
        0.35 * (path == "swapped") * (_log(spec.taps) - _log(math.prod(spec.lhs_spatial))),
        *(weight * (path == name) for name, weight in PATHS.items()),
        *(0.7 * (dtype == name) for name in DTYPES),
    )


def _log(value: int) -> float:
    return math.log2(max(1, value))


def _step(steps: Sequence[int]) -> float:
    """1 more than the logarithm of the largest of strides or dilations, 0 where they are 1."""
    largest = max(steps, default=1)
    return (largest > 1) + _log(largest)


def xla_path(spec: ConvSpec) -> str:
    """The XLA:CPU code path of a prepared ``spec``.

    "packed": a library that packs patches in cache; "eigen": the older one; "dilated", "volume":
    its slower paths for dilated images and volumes; "grouped": a product for each group;
    "multiply": one for each element; the others are scalar loops, "swapped" over the image.
    """
    if swapped(spec):
        return "swapped"
    if spec.groups > 1:
        if spec.taps == 1 and spec.out_channels == spec.groups:
            return "multiply"
        if spec.spatial_ndim == 3:
            return "loop in groups"
        return "depthwise" if spec.rhs_shape[-2] == 1 else "grouped"
    if (
        spec.spatial_ndim == 2
        and spec.dtype.name in ("float32", "int8", "float64")
        and max(spec.lhs_shape[-1], spec.out_channels) > EIGEN_CHANNELS
        and max(spec.lhs_dilation) == 1
    ):
        return "packed"
    if spec.dtype.name not in ("float32", "float16", "bfloat16"):
        return "loop"
    if spec.spatial_ndim == 3:
        return "volume"
    return "dilated" if max(spec.lhs_dilation, default=1) > 1 else "eigen"


def swapped(spec: ConvSpec) -> bool:
    """Whether XLA exchanges image and kernel: if the kernel has more taps than the image positions.
    31×31, stride 2, 8×48×16×2→128, takes 1.1 s on one core; 24 columns are not swapped: 0.12 s.
    https://github.com/openxla/xla: hlo/transforms/simplifiers/conv_operand_swapper.cc"""
    if spec.groups > 1:
        return False
    taps = positions = 1
    for size, k, stride, low, high, spacing, dilation in spec.axes:
        alone = dilation == 1 and low == high == 0
        if alone and ((k == size and spacing == stride == 1) or spacing == k == stride + 1):
            continue  # a sum over the axis, or a group
        taps *= k
        whole = size == stride == dilation == 1 and low == high == k - 1
        positions *= k if whole else size
    return taps > positions
