"""Multiply-add of shifted views, no GEMM: for few input channels a group."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxconv import layout, loops
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.compat import OLD_XLA
from jaxconv.spec import ConvSpec, dilate

# Input channels per group above which a GEMM, which reuses loaded values, is faster: 3×3 on 16→16
# channels runs at 0.4 times lax's speed here, at 0.8 times by im2col_tiled.
MAX_CHANNELS = 16
# Terms that one fused loop adds up. 49 (a 7×7 kernel) compile in 0.1 to 0.3 s, 147 took 3 s. More
# are added by a loop over blocks of neighbouring taps.
UNROLL = 64
# Bytes of all padded images from which they are convolved one at a time: glibc maps memory of this
# size anew for each call, which took longer than the convolution (3×3 stride 2 on 8×112×112×96:
# 26 ms, one by one 4; a step of MobileNetV2 takes 30 MiB less). Such a loop runs on one core, which
# pays off up to this many operations per byte.
COPIED, LIGHT = 32 << 20, 13
# Products that a step of a loop adds up. JAX 0.10.2 vectorises only long steps: 13×13 depthwise on
# 4×64×64×16 takes 2 ms by 48, 18 by 24. JAX 0.12 is faster with short ones: 2.2 by 16, 3.0 by 48.
TERMS_OF_BLOCK = 48 if OLD_XLA else 16
# Positions along one axis whose products a step of a weight gradient adds up, the preferred first.
# From 16 on, JAX 0.10.2 is twice to four times as fast as below, and JAX 0.12 is slower: 7 taps
# depthwise, 4×6720×64, by 15 and by 16 take 8.8 and 3.2 ms there, 1.8 and 3.1 ms here.
ROWS_OF_LINE = range(16, 33) if OLD_XLA else range(15, 7, -1)
# In a loop, JAX 0.10.2 widens the whole of a bfloat16 array to take a slice of it: the gradient of
# 7 taps, 4×16006×64, takes 850 ms, with the array widened before 9.
SLICES_WIDEN = OLD_XLA
# Output rows whose products with a tap are summed before anything is written, and the limit of
# products over all columns of taps, each of which is compiled: of 7, 14, 28 and 56 rows, 14 are the
# fastest or within 20 % of it.
ROWS, PRODUCTS = 14, 100
# Bytes of the images in a block where an image has no more rows than that.
IMAGE_BYTES = 5 << 20


def by_planes(spec: ConvSpec) -> bool:
    """Whether each channel of each image, a plane in memory, is convolved as it lies there."""
    depthwise = spec.rhs_shape[-2] == 1 and spec.out_channels == spec.groups
    return spec.channels_first and depthwise and spec.taps <= UNROLL


def planes_at_once(x: Array, rhs: Array, spec: ConvSpec) -> Array:
    """A depthwise convolution of (n, G, spatial…) to (n, G, out spatial…)."""
    # 3×3 on 8×144×56×56 takes 2.9 ms, with channels last and two transpositions 5.6 to 9.1. Not for
    # an image that still lies channels last: MobileNetV2 took 1.7 times as long.
    g, dtype = spec.groups, spec.accumulator_dtype
    x, _ = layout.pad_and_dilate(x, spec, first=2)
    kernel = rhs.reshape(spec.taps, 1, g, *(1 for _ in spec.kernel_shape)).astype(dtype)

    def term(i: int) -> Array:
        starts = (0, *loops.unravel(i, spec.kernel_shape, spec.rhs_dilation))
        view = loops.strided(x, starts, (g, *spec.out_spatial), (1, *spec.window_strides))
        return view.astype(dtype) * lax.index_in_dim(kernel, i, keepdims=False)

    return loops.in_one_loop(loops.sum_of(spec.taps, term, spec.taps))


def image_by_image(spec: ConvSpec) -> bool:
    """Whether images are padded and convolved one after another."""
    padded = layout.padded_bytes(spec)
    return spec.lhs_shape[0] > 1 and padded > COPIED and spec.flops < LIGHT * padded


def run_at_once(lhs: Array, rhs: Array, spec: ConvSpec) -> Array:
    x, spec = layout.pad_and_dilate(lhs, spec)
    g, (c, o) = spec.groups, spec.rhs_shape[-2:]
    # A single output channel per group gets no axis: with an axis of length 1, depthwise 7×7 on
    # 8×56×56×96 is 17 times as fast as lax, without it 25.
    channels = (g,) if o == g else (g, o // g)
    shape = (x.shape[0], *spec.out_spatial, *channels)
    dtype = spec.accumulator_dtype

    def sum_of_taps(x: Array, rhs: Array, taps: Sequence[int]) -> Array:
        # Apart, since a kernel in another order would be read with strides for each output:
        # MobileNetV2 channels first, batch 1, took 1.14 times as long as channels last, so 1.0.
        kernel = lax.optimization_barrier(rhs.reshape(-1, *channels).astype(dtype))
        last = range(len(shape) - len(channels), len(shape))

        def term(i: int) -> Array:
            view = layout.view(x, i // c, spec, taps)
            if c > 1:
                view = layout.split_groups(view, -1, g)[..., i % c]
            view = view.astype(dtype)
            if o > g:
                view = lax.broadcast_in_dim(view, shape, range(view.ndim))
            weights = lax.index_in_dim(kernel, i, keepdims=False)
            return lax.mul(view, lax.broadcast_in_dim(weights, shape, last))

        return loops.sum_of(len(kernel), term, len(kernel))

    if spec.taps * c <= UNROLL:
        out = sum_of_taps(x, rhs, spec.kernel_shape)
        return loops.in_one_loop(out).reshape(spec.out_shape)

    if SLICES_WIDEN:
        x = x.astype(dtype)
    total = loops.zeros(shape, dtype, x, rhs)
    cut, blocks = blocks_of(spec)
    outer, rest = spec.kernel_shape[:cut], (0,) * (spec.spatial_ndim - cut - 1)
    ones = (1,) * spec.spatial_ndim
    outs = list(map(dilate, spec.out_spatial, spec.window_strides))
    for start, count, taps in blocks:
        sizes = map(dilate, taps, spec.rhs_dilation)
        spans = [size + out - 1 for size, out in zip(sizes, outs, strict=True)]

        def block(i: Any, start: int = start, count: int = count, taps: Any = taps) -> Array:
            *ahead, number = loops.unravel(i, (*outer, count))
            first = *ahead, start + number * taps[cut], *rest
            starts = [t * d for t, d in zip(first, spec.rhs_dilation, strict=True)]
            kernel = loops.strided(rhs[None], first, taps, ones)[0]
            return sum_of_taps(loops.strided(x, starts, spans, ones), kernel, taps)  # noqa: B023

        total = loops.sum_over(math.prod(outer) * count, total, block)
    return total.reshape(spec.out_shape)


def blocks_of(spec: ConvSpec) -> tuple[int, list[tuple[int, int, tuple[int, ...]]]]:
    """The axis that is cut into blocks of taps, and (first tap, blocks, taps of a block) along it.
    A block has all taps of the axes behind. Its taps lie at fixed positions from a computed first:
    with each computed, 15×15 took 3 s to compile; so it takes 0.2 to 0.4, and runs as fast."""
    axis, inner = spec.spatial_ndim - 1, spec.rhs_shape[-2]
    while inner * spec.kernel_shape[axis] <= TERMS_OF_BLOCK:
        inner *= spec.kernel_shape[axis]
        axis -= 1
    size = max(1, TERMS_OF_BLOCK // inner)
    count, left = divmod(spec.kernel_shape[axis], size)
    ahead, behind = (1,) * axis, spec.kernel_shape[axis + 1 :]
    blocks = [(0, count, (*ahead, size, *behind)), (size * count, 1, (*ahead, left, *behind))]
    return axis, [block for block in blocks if 0 not in (block[1], block[2][axis])]


def block_of(spec: ConvSpec) -> tuple[int, int]:
    """Output rows and images of a block: a divisor of all rows close to ``ROWS``, if there is one;
    several images only where the block has all their rows."""
    height, batch = spec.out_spatial[0], spec.lhs_shape[0]
    if spec.spatial_ndim == 1:
        rows = next((rows for rows in ROWS_OF_LINE if height % rows == 0), 0)
        rows = rows or min(ROWS_OF_LINE[0], height)
    else:
        most = min(ROWS, max(2, PRODUCTS * spec.kernel_shape[0] // spec.taps))
        near = [rows for rows in range(most // 2 + 1, 2 * most + 1) if height % rows == 0]
        rows = min(near, key=lambda rows: abs(rows - most), default=min(most, height))
    if rows < height:
        return rows, 1
    size = spec.accumulator_dtype.itemsize * math.prod((*spec.padded_spatial, spec.lhs_shape[-1]))
    fit = max(1, IMAGE_BYTES // size)
    return rows, max(i for i in range(1, min(fit, batch) + 1) if batch % i == 0)


def sums_of(x: Array, y: Array, spec: ConvSpec) -> Array:
    """Each tap's sum of products: (columns of taps, kernel rows, lanes).

    x: (n, rows, …, G·c), padded; y: (n, out rows, …, G·o); lanes: (G,) or (G, c, o). The taps of a
    column, multiplied by the same cotangents, are neighbours in memory where lanes fill a vector.
    """
    # Sums over images and widths come last, for all columns at once: with one sum per column, JAX
    # 0.10.2 compiles its products to several loops (3×3 on 8×14×14×576: 21 ms instead of 1.2).
    (k, *others), (stride, *strides) = spec.kernel_shape, spec.window_strides
    (dilation, *dilations), (rows, *widths) = spec.rhs_dilation, y.shape[1:-1]
    fill = spec.rhs_shape[-2] * spec.out_channels >= layout.LANES
    if not x.shape[-1] == y.shape[-1] == spec.groups:
        x = layout.split_groups(x, -1, spec.groups)[..., None]
        y = layout.split_groups(y, -1, spec.groups)[..., None, :]
    lanes = *x.shape[1 + len(spec.kernel_shape) : -1], y.shape[-1]
    shape = (len(x), k, *widths, *lanes)
    order = list(range(len(shape)))
    if fill:
        order.insert(len(widths) + 1, order.pop(1))  # rows behind widths

    def cotangent(row: int) -> Array:
        one = lax.slice_in_dim(y, row, row + 1, axis=1)
        return lax.transpose(jnp.broadcast_to(one, shape), order)

    columns = math.prod(others)
    shared = [cotangent(row) for row in range(rows)] if columns <= loops.UNROLL else []

    def column(i: Any) -> Array:
        starts = loops.unravel(i, others, dilations)

        def term(row: int) -> Array:
            # Moved after it is cut out: as a whole, the padded image of the forward convolution
            # would be padded again (4 to 9 % of MobileNetV2's step).
            view = loops.strided(x, [row * stride, *starts], (k, *widths), (dilation, *strides))
            view = lax.transpose(jnp.broadcast_to(view, shape), order)
            return lax.mul(view, shared[row] if shared else cotangent(row))

        return loops.sum_of(rows, term, rows)

    out = loops.stack_of(columns, column, 0)
    first = 2 if fill else 3
    return out.sum((1, *range(first, first + len(widths))), dtype=out.dtype)


# Input times output channels per group up to which shifting is worth its compile time: the first,
# or the second where an output has few terms. In a network XLA fuses the preceding operations into
# each term: with 3×3 on 3→32 and 1×1 on 16→32 channels by shift, a step of MobileNetV2 took 77 s to
# compile, without 5 s.
FEW_PRODUCTS = 9
SOME_PRODUCTS, FEW_TERMS = 64, 72


class Shift(Algorithm):
    name = "shift"
    summary = "multiply-add of shifted views, no GEMM"

    def unsupported(self, spec: ConvSpec) -> str | None:
        channels, terms = spec.rhs_shape[-2], "input channels per group"
        if spec.weight_gradient:
            *_, c, o = spec.forward.rhs_shape
            channels, terms = c * o // spec.groups, "products per group and tap"
        if channels > MAX_CHANNELS:
            return f"{channels} {terms}; it sums at most {MAX_CHANNELS}"
        if spec.weight_gradient and not spec.spatial_ndim:
            return "there is no spatial dimension to sum over"
        return None

    def doubted(self, spec: ConvSpec) -> str | None:
        if spec.weight_gradient:
            # 32 groups of 4 channels, 4×2306, take 10 ms, as a product 3, and with three taps 4.
            single = spec.spatial_ndim == spec.forward.taps == 1
            return "a single tap along one axis is not compiled to one loop" if single else None
        channels, n = spec.rhs_shape[-2], spec.gemm[2]
        few = SOME_PRODUCTS if spec.taps * channels <= FEW_TERMS else FEW_PRODUCTS
        if channels * n > few and not n == 1 < spec.groups:
            return f"in a network more than {few} products per tap and group take long to compile"
        return None

    def cost(self, spec: ConvSpec) -> Cost:
        if spec.weight_gradient:
            forward, size = spec.forward, spec.accumulator_dtype.itemsize
            copied = layout.padded_bytes(forward) if max(forward.lhs_dilation) > 1 else 0
            if SLICES_WIDEN and spec.dtype != spec.accumulator_dtype:
                copied += (math.prod(forward.lhs_shape) + math.prod(forward.out_shape)) * size
            rows, images = block_of(forward)
            steps = forward.lhs_shape[0] // images * -(-forward.out_spatial[0] // rows)
            span = (rows - 1) * forward.window_strides[0] + forward.axes[0].window
            rest = *forward.padded_spatial[1:], forward.lhs_shape[-1]
            block = math.prod((images, span, *rest)) * size
            lanes = forward.rhs_shape[-2] * forward.out_channels
            sums = math.prod((forward.taps, images, *forward.out_spatial[1:], lanes)) * size
            traffic = spec.operand_bytes + 2 * copied + 2 * (block + sums) * steps
            return Cost(spec.flops, traffic, copied + block + sums, None, steps)
        terms = spec.taps * spec.rhs_shape[-2]
        steps = 1 if terms <= UNROLL else -(-terms // TERMS_OF_BLOCK)
        (groups, m, n, _), padded = spec.gemm, layout.padded_bytes(spec)
        output = groups * m * n * spec.accumulator_dtype.itemsize
        images = spec.lhs_shape[0] if image_by_image(spec) else 1
        traffic = spec.operand_bytes + 2 * padded + 2 * output * (steps - 1)
        return Cost(spec.flops, traffic, padded // images, None, images * steps)

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        first = by_planes(spec)
        if first:  # as it lies in memory: this undoes a transposition, which XLA then leaves out
            lhs = jnp.moveaxis(lhs, -1, 1)
        one = spec.replace(lhs_shape=(1, *spec.lhs_shape[1:]))
        at_once = planes_at_once if first else run_at_once
        if image_by_image(spec):
            out = lax.map(lambda image: at_once(image[None], rhs, one)[0], lhs)
        else:
            out = at_once(lhs, rhs, spec)
        return jnp.moveaxis(out, 1, -1) if first else out

    def gradient(self, image: Array, cotangent: Array, spec: ConvSpec) -> Array:
        """Sums products of shifted rows, by blocks of rows that stay in cache."""
        if max(spec.lhs_dilation) > 1:
            image, spec = layout.pad_and_dilate(image, spec)
        if SLICES_WIDEN:
            image, cotangent = (a.astype(spec.accumulator_dtype) for a in (image, cotangent))
        g, (c, o) = spec.groups, (spec.rhs_shape[-2], spec.out_channels // spec.groups)
        rows, images = block_of(spec)
        blocks, left = divmod(spec.out_spatial[0], rows)

        def sums(first: Any, row: Any, rows: int) -> Array:
            x, part = layout.rows_of(image, spec, first, images, row, rows)
            y = lax.dynamic_slice_in_dim(cotangent, first, images)
            y = lax.dynamic_slice_in_dim(y, row, rows, 1)
            return sums_of(x.astype(spec.accumulator_dtype), y.astype(spec.accumulator_dtype), part)

        def of_block(i: Any) -> Array:
            return sums(i // blocks * images, i % blocks * rows, rows)

        steps, lanes = len(image) // images * blocks, (g,) if c == o == 1 else (g, c, o)
        shape = (spec.taps // spec.kernel_shape[0], spec.kernel_shape[0], *lanes)
        total = loops.sum_of_blocks(steps, shape, spec.accumulator_dtype, image, of_block)
        if left:  # apart, since filling a block with rows of zeros would turn Inf into NaN
            total = loops.sum_over(len(image), total, lambda i: sums(i, blocks * rows, left))
        # total: (columns of taps, kernel rows, lanes…)
        out = jnp.swapaxes(total, 0, 1).reshape(-1, g, c, o)
        return jnp.moveaxis(out, 1, 2).reshape(spec.rhs_shape)

    def largest_index(self, spec: ConvSpec) -> int:
        terms = 0 if spec.weight_gradient else spec.taps * spec.rhs_shape[-2]
        looped = spec.weight_gradient or terms > UNROLL or image_by_image(spec)
        return max(terms, super().largest_index(spec)) if looped else 0


SHIFT = Shift()
