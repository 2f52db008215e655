"""A single contraction where windows don't overlap: 1×1, patchify, a kernel as large as the image.

Each element of the image then belongs to at most one window, and the patch matrix is a reshape.
Conversely, where the image is dilated by the size of the kernel, as in the input gradient of
patchify, each output uses one tap, and the product is reshaped.
"""

import math

import jax.numpy as jnp
from jax import Array, lax

from jaxconv import layout, loops
from jaxconv.algorithms import gemm
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec


def spreads(spec: ConvSpec) -> bool:
    """Whether the elements of a dilated image contribute to disjoint outputs."""
    ones = (1,) * spec.spatial_ndim
    return (
        spec.window_strides == spec.rhs_dilation == ones
        and spec.lhs_dilation == spec.kernel_shape != ones
        and not spec.weight_gradient
    )


def same_product(spec: ConvSpec) -> str | None:
    """Why an algorithm that gathers patches is redundant for a prepared ``spec``."""
    # A tiled product of one tap is fast alone, but XLA fuses nothing into its loop: with two of
    # them ConvNeXt-T's forward pass, batch 8, took 257 MiB instead of 101 and 1.12 times as long.
    same = spec.forward.taps == 1 and POINTWISE.unsupported(spec) is None
    return "it would compute the same product as pointwise" if same else None


def windows(lhs: Array, spec: ConvSpec) -> tuple[Array, list[int]]:
    """The windows side by side, (n, (out, kernel)…, g·c), and which axes are the kernel's; without
    those of length 1, which would only hide the GEMM."""
    x, spec = layout.pad_and_dilate(lhs, spec)
    shape, kernel_axes = [x.shape[0]], []
    for axis in spec.axes:
        shape.append(axis.out)
        if axis.taps > 1:
            kernel_axes.append(len(shape))
            shape.append(axis.taps)
    counts = [axis.out * axis.taps for axis in spec.axes]
    steps = [axis.stride if axis.taps == 1 else axis.dilation for axis in spec.axes]
    x = loops.strided(x, (0,) * spec.spatial_ndim, counts, steps)
    return x.reshape(*shape, x.shape[-1]), kernel_axes


def in_order(spec: ConvSpec) -> bool:
    """Whether a kernel (O, c), or (O, c, taps), is taken as it lies in memory."""
    return layout.taps_last(spec) or (spec.taps == 1 and spec.kernel_order == "xOI")


def spread(lhs: Array, rhs: Array, spec: ConvSpec) -> Array:
    g, ndim = spec.groups, spec.spatial_ndim
    x = gemm.rows_of(lhs, g)
    kernel = layout.split_groups(jnp.flip(rhs, range(ndim)), -1, g)  # kernel: (kernel…, c, g, o)
    kernel = jnp.moveaxis(kernel, (-2, ndim), (0, 1)).reshape(g, x.shape[-1], -1)
    out = gemm.product(x, kernel, spec)  # out: (g, n·positions, kernel·o)
    n = g * spec.lhs_shape[0]
    out = layout.interleaved(out.reshape(n, *spec.lhs_spatial, *spec.kernel_shape, -1))
    # With a low padding of k - 1, element i contributes to position i·k through its last tap.
    shifts = [(a.low - (a.taps - 1), a.out - a.size * a.taps) for a in spec.axes]
    edges = [(low, more - low, 0) for low, more in shifts]
    return layout.batch_groups_to_features(layout.padded(out, edges), g)


# Positions from which computing the transpose of a kernel's gradient is faster.
MANY_POSITIONS = 128


def turned(spec: ConvSpec) -> bool:
    """Whether a kernel's gradient is computed as (o, k) and transposed."""
    # XLA:CPU transposes the left matrix as it multiplies; fewer columns cost less: 8×56×56 from 256
    # to 64 channels runs at 115 instead of 82 GFLOP/s, 8×28×28 from 192 to 32 at 128 instead of 66.
    # 147 columns, no multiple of a vector, took 1.2 times as long, 49 positions up to twice.
    k, o = spec.taps * spec.rhs_shape[-2], spec.out_channels
    many = spec.lhs_shape[0] * spec.positions >= MANY_POSITIONS
    return spec.groups == 1 and many and k > o and k % layout.LANES == 0


class Pointwise(Algorithm):
    name = "pointwise"
    summary = "one contraction: windows don't overlap, nothing to gather"
    rereads = False
    static = True

    def unsupported(self, spec: ConvSpec) -> str | None:
        if spreads(spec):
            return None
        spec = spec.forward
        for axis in spec.axes:
            apart = axis.taps == axis.stride and axis.dilation == 1
            if not (apart or 1 in (axis.taps, axis.out)):
                return f"windows overlap: kernel {spec.kernel_shape}, strides {spec.window_strides}"
        return None

    def excluded(self, spec: ConvSpec) -> str | None:
        return None if spreads(spec) else super().excluded(spec)

    def cost(self, spec: ConvSpec) -> Cost:
        if spreads(spec):
            (groups, _, n, k), taps = spec.gemm, spec.taps
            m = spec.lhs_shape[0] * math.prod(spec.lhs_spatial)
            output = groups * m * n * taps * spec.accumulator_dtype.itemsize
            traffic, shape = spec.operand_bytes + 4 * output, (groups, m, n * taps, k // taps)
            return Cost(2 * math.prod(shape), traffic, 2 * output, shape)
        forward, workspace = spec.forward, layout.padded_bytes(spec.forward)
        groups, m, _, k = forward.gemm
        if groups > 1 or forward.taps > 1 or max(forward.window_strides, default=1) > 1:
            # What is read is moved or gathered, at the speed of the product.
            workspace += groups * m * k * spec.dtype.itemsize
        traffic = spec.operand_bytes + 2 * layout.padded_bytes(spec)
        return Cost(spec.flops, traffic, workspace, spec.gemm)

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        if spreads(spec):
            return spread(lhs, rhs, spec)
        x, kernel_axes = windows(lhs, spec)
        if in_order(spec):
            x = x.transpose(*(d for d in range(x.ndim) if d not in kernel_axes), *kernel_axes)
            return gemm.in_memory(x, rhs, spec)
        kernel = [k for k in spec.kernel_shape if k > 1]
        c, groups = spec.rhs_shape[-2], [spec.groups] if spec.groups > 1 else []
        x = x.reshape(*x.shape[:-1], *groups, c)  # x: (n, (out, kernel)…, g, c)
        rhs = rhs.reshape(*kernel, c, *groups, -1)  # rhs: (kernel…, c, g, o)
        contracting = ([*kernel_axes, x.ndim - 1], list(range(len(kernel) + 1)))
        batch = ([x.ndim - 2], [rhs.ndim - 2]) if groups else ([], [])
        # The product: (g, n, out spatial…, o), without g where there is one group.
        return gemm.outputs_of(gemm.contract(x, rhs, (contracting, batch), spec), spec)

    def gradient(self, image: Array, cotangent: Array, spec: ConvSpec) -> Array:
        g = spec.groups
        x, kernel_axes = windows(layout.features_to_batch(image, g), spec)
        cotangent = gemm.rows_of(cotangent, g)
        out_axes = [axis for axis in range(x.ndim - 1) if axis not in kernel_axes]
        channels = [x.ndim - 1]
        columns = channels + kernel_axes if layout.taps_last(spec) else kernel_axes + channels
        x = x.transpose(*out_axes, *columns)
        matrix = x.reshape(*cotangent.shape[:2], -1)  # matrix: (g, n·positions, k)
        if in_order(spec):
            return layout.from_memory(gemm.gradient(cotangent, matrix, spec), spec)
        if not turned(spec):
            return gemm.kernel_of(gemm.gradient(matrix, cotangent, spec), spec)
        out = gemm.gradient(cotangent, matrix, spec)  # out: (g, o, k)
        # Without the barrier XLA folds the transpose into the product.
        return gemm.kernel_of(lax.optimization_barrier(out).swapaxes(1, 2), spec)

    def moving(self, spec: ConvSpec) -> float:
        return 0.0 if in_order(spec.forward) else super().moving(spec)


POINTWISE = Pointwise()
