"""``ConvSpec``: the static description of one convolution."""

import dataclasses
import math
import operator
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

Pads = tuple[tuple[int, int], ...]


def dilate(size: int, dilation: int) -> int:
    """Length of ``size`` elements with ``dilation - 1`` holes between neighbours."""
    return max(0, 1 + dilation * (size - 1))


class Axis(NamedTuple):
    """One spatial axis of a convolution."""

    size: int  # of the image
    taps: int
    stride: int
    low: int  # padding
    high: int
    spacing: int  # dilation of the image
    dilation: int  # of the kernel

    @property
    def window(self) -> int:
        """Length of the kernel with its holes."""
        return dilate(self.taps, self.dilation)

    @property
    def padded(self) -> int:
        return dilate(self.size, self.spacing) + self.low + self.high

    @property
    def out(self) -> int:
        return max(0, (self.padded - self.window) // self.stride + 1)


# The spatial axes (x), input channels and output channels of a kernel; the canonical order first.
KERNEL_ORDERS = ("xIO", "OIx", "xOI", "IOx")


def _kernel_order(spec: "ConvSpec", dimension_numbers: Any) -> str:
    """The order in memory of the kernel, or of the kernel's gradient that ``spec`` computes. In
    groups, and where it is none of ``KERNEL_ORDERS``, it is moved to the canonical one."""
    _, (o, i, *spatial), out_spec = dimension_numbers
    taps = spec.taps
    if spec.weight_gradient:
        (i, o, *spatial), taps = out_spec, spec.positions
    if spec.groups > 1:
        return "xIO"
    if taps == 1:
        return "xIO" if i < o else "xOI"
    letters = dict(zip((o, i, *spatial), "OI" + "x" * len(spatial), strict=True))
    order = "".join(letters[axis] for axis in range(len(letters))).replace("x" * len(spatial), "x")
    return order if spatial == sorted(spatial) and order in KERNEL_ORDERS else "xIO"


# Output positions up to which a result may be a kernel larger than its cotangent: VGG's first
# linear layer, as a convolution, has 7×7.
LARGEST_KERNEL = 49


def _is_weight_gradient(spec: "ConvSpec", dimension_numbers: Any) -> bool:
    """Whether a convolution has the layout and the sizes of those that JAX derives for kernels.

    There image and cotangent have one layout and the output a kernel's; in a forward convolution
    image and output have one. Where all three are alike, as channels first, or each is another,
    sizes tell: a kernel is smaller than the cotangent, an output larger than the kernel.
    """
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    alike, kept = lhs_spec == rhs_spec, lhs_spec == out_spec
    if kept and not alike:
        return False
    larger = spec.taps >= spec.positions
    if lhs_spec[0] == 0:  # the outermost axis is a batch, seldom channels
        return alike and not kept and larger
    return (alike and not kept) or larger or spec.positions <= LARGEST_KERNEL


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """The static description of one convolution in the canonical, channels-last layout.

    ``lhs`` is (N, spatial…, C), ``rhs`` is (spatial…, C / feature groups, O), the output is
    (N / batch groups, spatial…, O). Instances are hashable values: equal convolutions have equal
    specs. ``from_params`` makes them from parameters checked by ``parse``.
    """

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    window_strides: tuple[int, ...]
    padding: Pads
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dtype: np.dtype
    out_dtype: np.dtype
    feature_group_count: int = 1
    batch_group_count: int = 1
    precision: Any = (lax.Precision.DEFAULT, lax.Precision.DEFAULT)
    # In memory:
    weight_gradient: bool = False  # the batch of ``lhs`` was the channel axis, as JAX derives them
    channels_first: bool = False  # image and output are (N, C, spatial…)
    kernel_order: str = "xIO"  # of ``KERNEL_ORDERS``; of a weight gradient's result

    @classmethod
    def from_params(cls, lhs: Any, rhs: Any, params: Mapping[str, Any]) -> "ConvSpec":
        """The spec of a primitive: of what has ``shape`` and ``dtype``, and parsed parameters."""
        numbers = lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
        n, c, *lhs_spatial = (lhs.shape[d] for d in lhs_spec)
        o, i, *rhs_spatial = (rhs.shape[d] for d in rhs_spec)
        out_dtype, precision = params["preferred_element_type"], params["precision"]
        # lax does not convert NumPy integers.
        names = "window_strides", "lhs_dilation", "rhs_dilation"
        steps: dict[str, Any] = {name: tuple(map(operator.index, params[name])) for name in names}
        names = "feature_group_count", "batch_group_count"
        counts: dict[str, Any] = {name: operator.index(params[name]) for name in names}
        alike = tuple(lhs_spec) == tuple(out_spec) == tuple(range(len(lhs_spec)))
        spec = cls(
            lhs_shape=(n, *lhs_spatial, c),
            rhs_shape=(*rhs_spatial, i, o),
            padding=tuple((operator.index(lo), operator.index(hi)) for lo, hi in params["padding"]),
            dtype=np.dtype(lhs.dtype),
            out_dtype=np.dtype(lhs.dtype if out_dtype is None else out_dtype),
            # A dot algorithm does not apply to convolutions: lax uses the default.
            precision=precision if isinstance(precision, tuple) else cls.precision,
            channels_first=bool(lhs_spatial) and alike,
            **steps,
            **counts,
        )
        spec = spec.replace(weight_gradient=_is_weight_gradient(spec, numbers))
        return spec.replace(kernel_order=_kernel_order(spec, numbers))

    def replace(self, **changes: Any) -> "ConvSpec":
        return dataclasses.replace(self, **changes)

    @property
    def spatial_ndim(self) -> int:
        return len(self.lhs_shape) - 2

    @property
    def lhs_spatial(self) -> tuple[int, ...]:
        return self.lhs_shape[1:-1]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.rhs_shape[:-2]

    @property
    def out_channels(self) -> int:
        return self.rhs_shape[-1]

    @property
    def groups(self) -> int:
        """Independent convolutions side by side: feature groups or batch groups."""
        return self.feature_group_count * self.batch_group_count

    @cached_property
    def taps(self) -> int:
        return math.prod(self.kernel_shape)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        pads = zip(*self.padding, strict=True) if self.padding else ((), ())
        sizes = self.lhs_spatial, self.kernel_shape, self.window_strides
        each = zip(*sizes, *pads, self.lhs_dilation, self.rhs_dilation, strict=True)
        return tuple(map(Axis._make, each))

    @cached_property
    def padded_spatial(self) -> tuple[int, ...]:
        """Spatial sizes of ``lhs`` after its dilation and padding."""
        return tuple(axis.padded for axis in self.axes)

    @cached_property
    def out_spatial(self) -> tuple[int, ...]:
        return tuple(axis.out for axis in self.axes)

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        return (self.lhs_shape[0] // self.batch_group_count, *self.out_spatial, self.out_channels)

    @cached_property
    def positions(self) -> int:
        """Output positions of one image."""
        return math.prod(self.out_spatial)

    @cached_property
    def gemm(self) -> tuple[int, int, int, int]:
        """(groups, m, n, k): the batched matrix product that this convolution is."""
        m = self.out_shape[0] * self.positions
        return self.groups, m, self.out_channels // self.groups, self.taps * self.rhs_shape[-2]

    @cached_property
    def flops(self) -> int:
        """Floating-point operations, a multiply and an add counted as two."""
        return 2 * math.prod(self.gemm)

    @cached_property
    def operand_bytes(self) -> int:
        """Bytes of both operands and the output: the minimum that any algorithm moves."""
        operands = math.prod(self.lhs_shape) + math.prod(self.rhs_shape)
        return operands * self.dtype.itemsize + math.prod(self.out_shape) * self.out_dtype.itemsize

    @cached_property
    def forward(self) -> "ConvSpec":
        """The convolution whose weight gradient this is: the image as ``lhs``, the output as
        kernel, the cotangent as output, in feature groups; itself unless ``weight_gradient``."""
        if not self.weight_gradient:
            return self
        (batch, *sizes, gn), g = self.lhs_shape, self.feature_group_count
        return self._exchanged(lhs_shape=(gn // g, *sizes, g * batch), weight_gradient=False)

    @property
    def kernel_gradient(self) -> "ConvSpec":
        """The convolution that JAX derives for the kernel's gradient."""
        (n, *sizes, c), groups = self.lhs_shape, self.feature_group_count
        changes = {"feature_group_count": 1, "batch_group_count": groups, "weight_gradient": True}
        return self._exchanged(lhs_shape=(c, *sizes, n), **changes)

    def _exchanged(self, **changes: Any) -> "ConvSpec":
        """With output and kernel exchanged, and without the end of the padding that no window
        covers, on which no gradient depends."""
        rhs_shape = (*self.out_spatial, self.lhs_shape[0], self.out_channels)
        padding = tuple((a.low, a.high - (a.padded - a.window) % a.stride) for a in self.axes)
        steps = {"window_strides": self.rhs_dilation, "rhs_dilation": self.window_strides}
        return self.replace(rhs_shape=rhs_shape, padding=padding, **steps, **changes)

    @property
    def largest_size(self) -> int:
        """The largest size or distance along an axis that an index is computed from."""
        spans = [a.padded + max(0, -a.low) + max(0, -a.high) for a in self.axes]
        distances = (*self.window_strides, *self.rhs_dilation)
        return max(*self.lhs_shape, *spans, *distances, self.out_channels)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is summed: no output element, or no product for any of them."""
        return 0 in (*self.lhs_shape, *self.rhs_shape, *self.out_shape)

    @cached_property
    def accumulator_dtype(self) -> np.dtype:
        """The dtype of sums: at least 32 bits wide, so that only the final cast rounds or wraps."""
        kinds = {np.unsignedinteger: np.uint32, np.integer: np.int32, np.generic: np.float32}
        wide = next(wide for kind, wide in kinds.items() if jnp.issubdtype(self.out_dtype, kind))
        return self.out_dtype if self.out_dtype.itemsize >= 4 else np.dtype(wide)

    @property
    def shapes(self) -> str:
        """Those of the operands: ``8x28x28x64*3x3x64x128``."""
        return "*".join("x".join(map(str, shape)) for shape in (self.lhs_shape, self.rhs_shape))

    def __str__(self) -> str:
        """The convolution in one line: ``float32[1,8,8,3] * float32[3,3,3,4] → …``."""

        def shape(dtype: np.dtype, dims: tuple[int, ...]) -> str:
            return f"{dtype.name}[{','.join(map(str, dims))}]"

        operands = (shape(self.dtype, dims) for dims in (self.lhs_shape, self.rhs_shape))
        ones = (1,) * self.spatial_ndim
        notes = {
            f"strides {self.window_strides}": self.window_strides != ones,
            f"padding {self.padding}": any(map(any, self.padding)),
            f"lhs_dilation {self.lhs_dilation}": self.lhs_dilation != ones,
            f"rhs_dilation {self.rhs_dilation}": self.rhs_dilation != ones,
            f"{self.feature_group_count} feature groups": self.feature_group_count > 1,
            f"{self.batch_group_count} batch groups": self.batch_group_count > 1,
            "channels first": self.channels_first,
            f"kernel {self.kernel_order}": self.kernel_order != "xIO",
        }
        text = f"{' * '.join(operands)} → {shape(self.out_dtype, self.out_shape)}"
        return ", ".join([text, *(note for note, holds in notes.items() if holds)])
