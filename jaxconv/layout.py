"""Conversion between ``dimension_numbers`` and the canonical layout; padding, dilation, groups.

Canonical: lhs (N, spatial…, C), rhs (spatial…, C/G, O), out (N, spatial…, O).
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import loops
from jaxconv.spec import ConvSpec, dilate

# Number of elements that fill a vector register or two.
LANES = 16


def to_canonical(
    lhs: Array, rhs: Array, dimension_numbers: lax.ConvDimensionNumbers
) -> tuple[Array, Array]:
    (n, c, *lhs_spatial), (o, i, *rhs_spatial), _ = dimension_numbers
    return lax.transpose(lhs, (n, *lhs_spatial, c)), lax.transpose(rhs, (*rhs_spatial, i, o))


def from_canonical(out: Array, dimension_numbers: lax.ConvDimensionNumbers) -> Array:
    n, c, *spatial = dimension_numbers.out_spec
    return lax.transpose(out, np.argsort((n, *spatial, c)))


def in_memory(kernel: Array, spec: ConvSpec) -> Array:
    """A canonical kernel with its axes in the order of ``spec.kernel_order``: as it was handed
    over, so that XLA moves nothing."""
    return lax.transpose(kernel, memory_axes(spec))


def from_memory(kernel: Array, spec: ConvSpec) -> Array:
    """The inverse of ``in_memory``; of any shape with the elements in the order of memory."""
    axes = memory_axes(spec)
    kernel = kernel.reshape([spec.rhs_shape[axis] for axis in axes])
    return lax.transpose(kernel, np.argsort(axes))


def memory_axes(spec: ConvSpec) -> list[int]:
    """The axes of a canonical kernel in the order of memory."""
    ndim = spec.spatial_ndim
    axes = {"x": range(ndim), "I": [ndim], "O": [ndim + 1]}
    return [axis for letter in spec.kernel_order for axis in axes[letter]]


def taps_last(spec: ConvSpec) -> bool:
    """Whether products sum over channels before taps: the order in which a kernel (O, I, spatial…)
    lies in memory, and in which patches are gathered, where these are fewer than output channels.
    """
    return spec.kernel_order == "OIx" and spec.gemm[1] <= spec.out_channels


def pad_and_dilate(lhs: Array, spec: ConvSpec) -> tuple[Array, ConvSpec]:
    """``lhs`` with holes and borders filled with zeros, and the spec of its convolution."""
    zeros = ((0, 0),) * spec.spatial_ndim
    ones = (1,) * spec.spatial_ndim
    if spec.padding == zeros and spec.lhs_dilation == ones:
        return lhs, spec
    config = [(lo, hi, d - 1) for (lo, hi), d in zip(spec.padding, spec.lhs_dilation, strict=True)]
    lhs = lax.pad(lhs, np.zeros((), lhs.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    return lhs, spec.replace(lhs_shape=lhs.shape, padding=zeros, lhs_dilation=ones)


def rows_of(
    x: Array, spec: ConvSpec, image: Any, images: int, row: Any, rows: int
) -> tuple[Array, ConvSpec]:
    """The padded input rows needed for ``rows`` output rows from ``row`` on, of ``images`` images
    from ``image`` on, and the spec of their convolution. Rows are along the first spatial axis.

    For a ``spec`` without ``lhs_dilation``. The image is not padded as a whole: a second copy in
    memory would be as large as the output.
    """
    stride = spec.window_strides[0]
    span = (rows - 1) * stride + dilate(spec.kernel_shape[0], spec.rhs_dilation[0])
    size, taken = x.shape[1], min(span, x.shape[1])
    low, high = (max(0, pad) for pad in spec.padding[0])
    start = row * stride - spec.padding[0][0]
    first = jnp.clip(start, 0, size - taken)
    x = lax.dynamic_slice_in_dim(lax.dynamic_slice_in_dim(x, image, images), first, taken, 1)
    pads = ((low, high), *spec.padding[1:])
    x, spec = pad_and_dilate(x, spec.replace(lhs_shape=x.shape, padding=pads))
    x = lax.dynamic_slice_in_dim(x, start - first + low, span, 1)
    return x, spec.replace(lhs_shape=x.shape)


def padded_bytes(spec: ConvSpec) -> int:
    """Bytes of ``lhs`` after ``pad_and_dilate``, 0 if that does nothing."""
    if spec.padded_spatial == spec.lhs_spatial:
        return 0
    n, *_, c = spec.lhs_shape
    return math.prod((n, *spec.padded_spatial, c)) * spec.dtype.itemsize


def batch_groups_to_features(lhs: Array, groups: int) -> Array:
    """(G·n, spatial…, C) → (n, spatial…, G·C): group g's images become group g's channels.

    The data of a group stays together, so that feature groups implement both kinds of group.
    """
    if groups == 1:
        return lhs
    gn, *spatial, c = lhs.shape
    lhs = lhs.reshape(groups, gn // groups, *spatial, c)
    return jnp.moveaxis(lhs, 0, -2).reshape(gn // groups, *spatial, groups * c)


def split_groups(x: Array, axis: int, groups: int) -> Array:
    """Channels (…, G·c, …) as (…, G, c, …)."""
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])


def features_to_batch(x: Array, groups: int) -> Array:
    """(N, spatial…, G·c) → (G·N, spatial…, c), the inverse of ``batch_groups_to_features``."""
    if groups == 1:
        return x
    n, *spatial, channels = x.shape
    x = jnp.moveaxis(split_groups(x, -1, groups), -2, 0)
    return x.reshape(groups * n, *spatial, channels // groups)


def patches(x: Array, spec: ConvSpec) -> Array:
    """The patch matrix of a padded ``x``, before its axes are flattened.

    x: (N, spatial…, c) → (N, out spatial…, kernel…, c). Axis by axis, so that a k×k kernel takes
    2·k slices instead of k² (1.4 to 3.4× faster on 8×28×28×128), and no gather.
    """
    ndim, indexed = spec.spatial_ndim, max(x.shape) <= loops.MAX_INDEX
    for d in reversed(range(ndim)):
        counts = (*x.shape[1 : 1 + d], spec.out_spatial[d], *spec.out_spatial[d + 1 :])
        steps = [spec.window_strides[d] if i == d else 1 for i in range(ndim)]
        step = spec.rhs_dilation[d]

        def view(tap: Any, x: Array = x, d: int = d, step: int = step) -> Array:
            starts = [tap * step if i == d else 0 for i in range(ndim)]
            return loops.strided(x, starts, counts, steps)  # noqa: B023 (used at once)

        unroll = loops.UNROLL if indexed else spec.kernel_shape[d]
        x = loops.stack_of(spec.kernel_shape[d], view, 1 + ndim, unroll)
    return x


def as_forward(lhs: Array, rhs: Array, spec: ConvSpec) -> tuple[Array, Array]:
    """Image (N, spatial…, G·c) and cotangent (N, out spatial…, G·o) of ``spec.forward``.

    The image was (c, spatial…, G·N), the cotangent (out spatial…, N, G·o). In memory both already
    have the order returned here, so that XLA copies nothing.
    """
    g, last = spec.groups, lhs.ndim - 1
    spatial = range(1, last)
    if g == 1:
        lhs = lhs.transpose(last, *spatial, 0)
    else:
        n, batch = lhs.shape[-1] // g, lhs.shape[0]
        lhs = split_groups(lhs, -1, g).transpose(last + 1, *spatial, last, 0)
        lhs = lhs.reshape(n, *spec.lhs_spatial, g * batch)
    return lhs, jnp.moveaxis(rhs, -2, 0)
