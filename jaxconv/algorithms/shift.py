"""Multiply-add of shifted views, no GEMM: for few input channels a group."""

import itertools
from typing import Any

import jax
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


# Bytes of all padded images from which on they are convolved one after another: memory of this size
# glibc maps anew for each call, which took longer than the convolution (3×3 stride 2 on
# 8×112×112×96: 26 ms, one by one 4; a step of MobileNetV2 takes 30 MiB less). A loop runs on one
# core, which pays up to so many operations a byte.
COPIED, LIGHT = 32 << 20, 13
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
    padded = layout.padded_bytes(spec)
    steps = spec.lhs_shape[0] if not spec.weight_gradient and image_by_image(spec) else 1
    return Cost(
        flops=spec.flops,
        traffic=spec.operand_bytes + 2 * padded + 2 * output * (loops - 1),
        workspace=padded // steps,
        gemm=None,
        steps=steps,
    )


def run(lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
    if not image_by_image(spec):
        return run_at_once(lhs, rhs, spec)
    one = spec.replace(lhs_shape=(1, *spec.lhs_shape[1:]))
    return lax.map(lambda image: run_at_once(image[None], rhs, one)[0], lhs)


def image_by_image(spec: ConvSpec) -> bool:
    """Whether images are padded and convolved one after another."""
    padded = layout.padded_bytes(spec)
    return spec.lhs_shape[0] > 1 and padded > COPIED and spec.flops < LIGHT * padded


def run_at_once(lhs: Array, rhs: Array, spec: ConvSpec) -> Array:
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
    rows = block_rows(height)
    padded = spec.replace(lhs_shape=(1, *image.shape[1:]))
    add_blocks = add_by_tap if compat.LOOPS_ARE_KERNELS else add_by_column

    def add_image(n: Array, totals: Array | list[Array]) -> Any:
        x = lax.dynamic_slice_in_dim(image, n, 1)
        x = layout.pad_and_dilate(x, padded)[0][0].astype(dtype)
        y = lax.dynamic_slice_in_dim(cotangent, n, 1)[0].astype(dtype)
        totals = add_blocks(x, y, 0, rows, height // rows, totals, spec)
        if height % rows:  # apart, since rows of zeros to fill a block would make NaN of Inf
            totals = add_blocks(x, y, height - height % rows, height % rows, 1, totals, spec)
        return totals

    lanes = (g,) if c == o == 1 else (g, c, o)  # an axis of length 1 would cost vector lanes
    if compat.LOOPS_ARE_KERNELS:
        totals = jnp.zeros((spec.taps, *widths, *lanes), dtype)
    else:
        columns = spec.taps // spec.kernel_shape[0]
        totals = [jnp.zeros((spec.kernel_shape[0], *widths, *lanes), dtype)] * columns
    totals = jax.tree.map(lambda total: compat.auto_insert_reshard(total, image)[0], totals)
    totals = lax.fori_loop(np.int32(0), np.int32(len(image)), add_image, totals)
    if isinstance(totals, list):
        totals = jnp.stack(totals, 1).reshape(spec.taps, *widths, *lanes)
    out = totals.sum(range(1, 1 + len(widths)))  # out: (taps, lanes…)
    return jnp.moveaxis(out.reshape(-1, g, c, o), 1, 2).reshape(spec.rhs_shape)


def block_rows(height: int) -> int:
    """Rows of a block: the number nearest to ``ROWS`` that divides ``height``, if one is near."""
    near = [rows for rows in range(ROWS // 2 + 1, 2 * ROWS + 1) if height % rows == 0]
    return min(near, key=lambda rows: abs(rows - ROWS), default=min(ROWS, height))


def product(view: Array, y: Array, spec: ConvSpec) -> Array:
    """Products of elements of the image (…, G·c) and of the cotangent (…, G·o), of each group.

    The image's may be those of several rows of taps, which meet the same cotangents.
    """
    y = jnp.broadcast_to(y, (*view.shape[:-1], y.shape[-1]))
    if view.shape[-1] == y.shape[-1] == spec.groups:
        return view * y
    view = layout.split_groups(view, -1, spec.groups)[..., None]
    return view * layout.split_groups(y, -1, spec.groups)[..., None, :]


def add_by_tap(
    x: Array, y: Array, first: int, rows: int, blocks: int, totals: Any, spec: ConvSpec
) -> Any:
    """Adds the products of ``blocks`` blocks of rows from row ``first`` on, tap by tap.

    x: (rows, …, G·c), padded; y: (out rows, …, G·o); totals: (taps, …, G) or (taps, …, G, c, o).
    """
    stride, (_, *widths) = spec.window_strides[0], spec.out_spatial

    def add_block(block: Array, totals: Any) -> Any:
        start = first + block * rows
        ys = lax.dynamic_slice_in_dim(y, start, rows, 0)

        def add_tap(tap: Array, totals: Any) -> Any:
            offsets = layout.unravel(tap, spec.kernel_shape)
            starts = [t * d for t, d in zip(offsets, spec.rhs_dilation, strict=True)]
            starts[0] += start * stride
            xs = layout.strided(x[None], starts, (rows, *widths), spec.window_strides)[0]
            added = lax.dynamic_index_in_dim(totals, tap, 0, False)
            added += layout.sum_of(rows, lambda row: product(xs[row], ys[row], spec), rows)
            return lax.dynamic_update_index_in_dim(totals, added, tap, 0)

        return lax.fori_loop(np.int32(0), np.int32(spec.taps), add_tap, totals)

    return lax.fori_loop(np.int32(0), np.int32(blocks), add_block, totals)


def add_by_column(
    x: Array, y: Array, first: int, rows: int, blocks: int, totals: Any, spec: ConvSpec
) -> Any:
    """``add_by_tap`` with a total (kernel rows, …) for each column of taps.

    The loop carries the rows that the next block needs, so that what adds them up reads no index:
    with one XLA 0.10.2 uses no vector instructions (8×56×56×96 7×7: 30 ms against 6).
    """
    (k, *others), (stride, *strides) = spec.kernel_shape, spec.window_strides
    (dilation, *dilations), (_, *widths) = spec.rhs_dilation, spec.out_spatial
    span = (rows - 1) * stride + dilate(k, dilation)

    def rows_at(block: Any) -> tuple[Array, Array]:
        start = first + block * rows
        xs = lax.dynamic_slice_in_dim(x, start * stride, span, 0)
        return xs, lax.dynamic_slice_in_dim(y, start, rows, 0)

    def add_block(block: Array, carry: Any) -> Any:
        totals, (xs, ys) = carry
        sums = []
        for offsets, total in zip(itertools.product(*map(range, others)), totals, strict=True):
            starts = [t * d for t, d in zip(offsets, dilations, strict=True)]

            def term(row: int, starts: list[int] = starts) -> Array:
                view = layout.strided(
                    xs[None], [row * stride, *starts], (k, *widths), (dilation, *strides)
                )
                return product(view[0], ys[row], spec)

            sums.append(total + layout.sum_of(rows, term, rows))
        return sums, rows_at(block + 1)

    carry = totals, rows_at(np.int32(0))
    return lax.fori_loop(np.int32(0), np.int32(blocks), add_block, carry)[0]


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
