"""Multiply-add of shifted views, no GEMM: for few input channels a group."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import compat, layout
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec, dilate

# Input channels of a group above which a GEMM, which reuses what it loads, is the better way: 3×3
# on 16→16 channels runs at 0.4 times lax's speed here, at 0.8 times by im2col_tiled.
MAX_CHANNELS = 16
# Terms that one fused loop adds up. 49 (a 7×7 kernel) compile in 0.1 s, 147 took 3 s.
UNROLL = 64


# Output rows whose products with a tap are summed before they reach the accumulators, which would
# else be read and written for each: 7 rows take a third of the time that 1 takes.
ROWS = 7
# Outputs in a row where there is but one axis.
WIDTH = 64


def supports(spec: ConvSpec) -> str | None:
    channels = spec.rhs_shape[-2]
    if spec.weight_gradient:
        forward = layout.forward_of(spec)
        channels = forward.rhs_shape[-2] * forward.out_channels // forward.groups
        if channels > MAX_CHANNELS:
            return f"{channels} products a group and tap, at most {MAX_CHANNELS} are summed apart"
        return None if spec.spatial_ndim else "there is no spatial dimension to sum over"
    if channels > MAX_CHANNELS:
        return f"{channels} input channels a group, at most {MAX_CHANNELS} are added one by one"
    return None


def cost(spec: ConvSpec) -> Cost:
    terms = spec.taps * spec.rhs_shape[-2]
    loops = -(-terms // UNROLL)
    output = spec.groups * spec.gemm[1] * spec.gemm[2] * spec.accumulator_dtype.itemsize
    return Cost(
        flops=spec.flops,
        traffic=spec.operand_bytes + 2 * layout.padded_bytes(spec) + 2 * output * (loops - 1),
        workspace=layout.padded_bytes(spec),
        gemm=None,
    )


def run(lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
    x, spec = layout.pad_and_dilate(lhs, spec)
    g, (c, o) = spec.groups, spec.rhs_shape[-2:]
    # One output channel a group gets no axis of its own: with one of length 1, depthwise 7×7 on
    # 8×56×56×96 is 17 times as fast as lax, without it 25.
    channels = (g,) if o == g else (g, o // g)
    kernel = rhs.reshape(spec.taps * c, *channels)
    shape = (x.shape[0], *spec.out_spatial, *channels)
    dtype = spec.accumulator_dtype

    def term(i: Any) -> Array:
        offsets = layout.unravel(i // c, spec.kernel_shape)
        starts = [t * d for t, d in zip(offsets, spec.rhs_dilation, strict=True)]
        view = layout.strided(x, starts, spec.out_spatial, spec.window_strides)
        if c > 1:
            view = layout.split_groups(view, -1, g)[..., i % c]
        if o > g:
            view = jnp.broadcast_to(view[..., None], shape)
        return view.astype(dtype) * jnp.broadcast_to(kernel[i].astype(dtype), shape)

    out = layout.sum_of(spec.taps * c, term, UNROLL)  # out: (n, out spatial…, g, o / g)
    return out.reshape(spec.out_shape)


def gradient(image: Array, cotangent: Array, spec: ConvSpec) -> Array:
    """Sums products of shifted rows, image by image, in accumulators of one row for each tap.

    What a block of rows needs stays in cache, and only the row that is left at the end is summed
    along itself, which XLA:CPU does without vector instructions.
    """
    if spec.spatial_ndim == 1:
        return rows_of_one(image, cotangent, spec)
    dtype, g = spec.accumulator_dtype, spec.groups
    c, o = spec.rhs_shape[-2], spec.out_channels // g
    height, *widths = spec.out_spatial
    blocks = -(-height // ROWS)
    rows = -(-height // blocks)
    stride, dilation = spec.window_strides[0], spec.rhs_dilation[0]
    missing = blocks * rows - height  # rows of zeros fill the last block
    (low, high), *pads = spec.padding
    padded = spec.replace(
        lhs_shape=(1, *image.shape[1:]), padding=((low, high + missing * stride), *pads)
    )
    lanes = (g,) if c == o == 1 else (g, c, o)  # an axis of length 1 would cost vector lanes

    def rows_at(x: Array, start: Any, step: int) -> list[Array]:
        taken = lax.dynamic_slice_in_dim(x, start, (rows - 1) * step + 1, 0)
        return [taken[row * step] for row in range(rows)]

    def product(x: Array, y: Array, offsets: Sequence[int]) -> Array:
        starts = [t * d for t, d in zip(offsets, spec.rhs_dilation[1:], strict=True)]
        view = layout.strided(x[None], starts, widths, spec.window_strides[1:])[0]
        if len(lanes) == 1:
            return view * y
        view = layout.split_groups(view, -1, g)[..., None]
        return view * layout.split_groups(y, -1, g)[..., None, :]

    def add_image(n: Array, totals: Any) -> Any:
        x = lax.dynamic_slice_in_dim(image, n, 1)
        x = layout.pad_and_dilate(x, padded)[0][0].astype(dtype)
        y = lax.dynamic_slice_in_dim(cotangent, n, 1)[0].astype(dtype)
        y = jnp.pad(y, [(0, missing), *((0, 0),) * len(y.shape[1:])])

        def add_block(block: Array, totals: Any) -> Any:
            ys = rows_at(y, block * rows, 1)

            def add_tap(tap: Array, totals: Any) -> Any:
                xs = rows_at(x, block * rows * stride + tap * dilation, stride)
                sums = []
                for offsets, total in zip(taps, totals, strict=True):
                    products = [product(x, y, offsets) for x, y in zip(xs, ys, strict=True)]
                    added = lax.dynamic_index_in_dim(total, tap, 0, False)
                    added += layout.sum_of(rows, products.__getitem__, rows)
                    sums.append(lax.dynamic_update_index_in_dim(total, added, tap, 0))
                return sums

            return lax.fori_loop(np.int32(0), np.int32(spec.kernel_shape[0]), add_tap, totals)

        return lax.fori_loop(np.int32(0), np.int32(blocks), add_block, totals)

    taps = list(itertools.product(*map(range, spec.kernel_shape[1:])))
    zeros = jnp.zeros((spec.kernel_shape[0], *widths, *lanes), dtype)
    totals = [compat.auto_insert_reshard(zeros, image)[0] for _ in taps]
    totals = lax.fori_loop(np.int32(0), np.int32(len(image)), add_image, totals)
    out = jnp.stack(totals, 1).sum(range(2, 2 + len(widths)))  # out: (rows, taps of a row, lanes…)
    return jnp.moveaxis(out.reshape(-1, g, c, o), 1, 2).reshape(spec.rhs_shape)


def rows_of_one(image: Array, cotangent: Array, spec: ConvSpec) -> Array:
    """``gradient`` along one axis, cut into rows that overlap by what windows share."""
    x, spec = layout.pad_and_dilate(image, spec)
    (k,), (stride,), (d,) = spec.kernel_shape, spec.window_strides, spec.rhs_dilation
    width = max(WIDTH, (k - 1) * d)
    span, step = (width - 1) * stride + dilate(k, d), width * stride
    rows = -(-spec.positions // width)
    x = lax.pad(
        x, np.zeros((), x.dtype), [(0, 0, 0), (0, (rows + 1) * step - x.shape[1], 0), (0, 0, 0)]
    )
    x = x.reshape(x.shape[0], rows + 1, step, -1)
    shared = x[:, 1:, : max(0, span - step)]
    x = jnp.concatenate([x[:, :-1, :span], shared], 2)
    y = jnp.pad(cotangent, ((0, 0), (0, rows * width - spec.positions), (0, 0)))
    two = spec.replace(
        lhs_shape=x.shape,
        rhs_shape=(1, *spec.rhs_shape),
        window_strides=(1, stride),
        padding=((0, 0), (0, 0)),
        lhs_dilation=(1, 1),
        rhs_dilation=(1, d),
    )
    return gradient(x, y.reshape(y.shape[0], rows, width, -1), two)[0]


SHIFT = Algorithm("shift", "multiply-add of shifted views, no GEMM", supports, cost, run, gradient)
