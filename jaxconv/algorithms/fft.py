"""A product of spectra: real FFTs, in overlapping blocks where that is less work (overlap-save).

Each block includes all elements that its windows cover; of its circular correlation, only the
outputs that did not wrap around are kept. Stockham, "High-speed convolution and correlation", 1966.

A transform sums over all elements of a block, so errors are relative to the norm of the block, not
to each output: where magnitudes vary within a block, its small outputs have few correct digits. One
NaN or infinity spreads over its whole block. In float32 errors are 2e-7 to 3e-7 of the largest
output; lax's are 1e-7 to 2e-7 with one input channel, and larger with 16 or in its scalar loop.

Very large and very small operands are scaled by powers of two, which is exact, since spectra may
overflow where outputs do not.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import layout, loops
from jaxconv.algorithms import gemm
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.algorithms.blocks import Blocks, blocks_of, transform_flops
from jaxconv.spec import ConvSpec, dilate

# Exponents up to this size need no scaling: spectra of operands up to 2**32 stay finite in float32,
# and scaling the largest down to 2**32 keeps values of 2**-94 of it, so that one exponent per image
# is enough.
MODERATE = 32


def cut(x: Array, axis: int, count: int, step: int, length: int) -> Array:
    """(…, elements, …) → (…, count, length, …): blocks that begin ``step`` apart, zero-padded."""
    x = layout.padded(x, [(0, (count + (length > step)) * step - x.shape[axis], 0)], axis)
    x = x.reshape(*x.shape[:axis], -1, step, *x.shape[axis + 1 :])
    if length <= step:
        return x
    own = lax.slice_in_dim(x, 0, count, axis=axis)
    shared = lax.slice_in_dim(x, 1, count + 1, axis=axis)
    shared = lax.slice_in_dim(shared, 0, length - step, axis=axis + 1)
    return lax.concatenate([own, shared], axis + 1)


def tiles_of(x: Array, blocks: Blocks, groups: int, overlap: bool) -> Array:
    """(images, spatial…, g·c) → (tiles, g, c, spatial…): of image (``overlap``) or cotangent."""
    ndim = len(blocks.axes)
    for d, axis in reversed(list(enumerate(blocks.axes))):
        if axis.count > 1:
            count = blocks.rows if d == 0 else axis.count
            length = axis.step + axis.taps - 1 if overlap else axis.step
            x = cut(x, 1 + d, count, axis.step, length)
        else:
            x = jnp.expand_dims(x, 1 + d)
    x = layout.split_groups(x, -1, groups)  # x: (images, (count, length)…, g, c)
    counts, lengths = range(1, 2 * ndim, 2), range(2, 2 * ndim + 1, 2)
    x = x.transpose(0, *counts, 2 * ndim + 1, 2 * ndim + 2, *lengths)
    return x.reshape(blocks.tiles, *x.shape[1 + ndim :])


def excess(x: Array) -> Array:
    """x: (n, …) → (n,): how far the exponents of the largest magnitudes are beyond ±MODERATE."""
    # Without the barrier XLA:CPU reduces over the original axes: 9 ms for 1×2**20×1, with it 0.5.
    x = lax.optimization_barrier(x.reshape(len(x), -1))
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    largest = reduce(jnp.maximum, [jnp.max(jnp.abs(part), 1) for part in parts])
    largest = jnp.where(jnp.isfinite(largest), largest, 1)
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(largest, f"int{info.bits}")
    exponents = (bits >> info.nmant).astype(np.int32) + (info.minexp - 1)
    return exponents - jnp.clip(exponents, -MODERATE, MODERATE)


def scaled(x: Array, exponents: Array) -> Array:
    """``x · 2**exponents``, exact for exponents returned by ``excess``; x: (n, …)."""
    info = jnp.finfo(x.dtype)
    bits = (exponents + (1 - info.minexp)).astype(f"int{info.bits}") << info.nmant
    powers = lax.bitcast_convert_type(bits, info.dtype)
    return x * powers.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)


def rescaled(x: Array, exponents: Array) -> Array:
    """``x · 2**exponents`` for sums of two exponents, which may exceed the dtype's range."""
    half = exponents >> 1
    return scaled(scaled(x, half), exponents - half)


def spectrum(x: Array, blocks: Blocks) -> Array:
    """(…, spatial…) → (…, frequencies)."""
    ndim = len(blocks.axes)
    transform = jnp.fft.fftn if jnp.iscomplexobj(x) else jnp.fft.rfftn
    y = transform(x, blocks.lengths, range(-ndim, 0))
    return y.reshape(*y.shape[:-ndim], -1)


def window_spectrum(x: Array, blocks: Blocks) -> Array:
    """The conjugate spectrum of the sliding window, (…, spatial…) → (…, frequencies)."""
    ndim = len(blocks.axes)
    for d, axis in enumerate(blocks.axes, x.ndim - ndim):
        if axis.count == 1 and axis.low:
            # The window is shifted instead of the image.
            x = layout.padded(x, [(0, axis.length - x.shape[d], 0)], d)
            x = jnp.roll(x, -axis.low, d)
    return jnp.conj(spectrum(jnp.conj(x), blocks))


def inverse(y: Array, blocks: Blocks, dtype: Any) -> Array:
    """(…, frequencies) → (…, spatial…)."""
    ndim = len(blocks.axes)
    real = not jnp.issubdtype(dtype, np.complexfloating)
    *others, last = blocks.lengths
    y = y.reshape(*y.shape[:-1], *others, last // 2 + 1 if real else last)
    transform = jnp.fft.irfftn if real else jnp.fft.ifftn
    return transform(y, blocks.lengths, range(-ndim, 0))


def product(a: Array, b: Array, spec: ConvSpec) -> Array:
    """a: (g, m, k, f), b: (g, k, n, f) → (g, m, n, f): a matrix product for each frequency, in real
    numbers, since XLA:CPU takes 2 to 4 times as long for a complex one."""
    if a.shape[2] == 1:
        return a * b
    g, m, _, f = a.shape
    n = b.shape[2]
    real, imag = lax.real(b), lax.imag(b)
    a = jnp.concatenate([lax.real(a), lax.imag(a)], 2)
    b = jnp.concatenate([jnp.concatenate([real, imag], 2), jnp.concatenate([-imag, real], 2)], 1)
    a, b = (jnp.moveaxis(x, -1, 1).reshape(g * f, *x.shape[1:3]) for x in (a, b))
    real_spec = spec.replace(dtype=a.dtype, out_dtype=a.dtype)
    out = jnp.moveaxis(gemm.product(a, b, real_spec).reshape(g, f, m, 2 * n), 1, -1)
    return lax.complex(out[:, :, :n], out[:, :, n:])


def bordered(x: Array, blocks: Blocks) -> Array:
    """The elements that windows cover; along an axis of several blocks, with its borders."""
    pads = []
    for size, axis in zip(x.shape[1:], blocks.axes, strict=False):
        low, high = -axis.start, axis.start + axis.size - size
        if axis.count > 1:
            low += axis.low
            high += axis.positions + axis.taps - 1 - axis.low - axis.size
        pads.append((low, high, 0))
    return layout.padded(x, pads)


def dilated(x: Array, dilation: Sequence[int], first: int = 1) -> Array:
    """``x`` with holes along the axes from the ``first`` on."""
    return layout.padded(x, [(0, 0, d - 1) for d in dilation], first)


def row_blocks(spec: ConvSpec) -> loops.RowBlocks:
    """The images and rows of each step, of outputs with stride 1."""
    blocks, first = blocks_of(spec), blocks_of(spec).axes[0]
    rows = min(first.positions, blocks.rows * first.step)
    return loops.RowBlocks(spec.lhs_shape[0], first.positions, blocks.images, rows)


def inputs_of(x: Array, spec: ConvSpec, image: Any, row: Any) -> Array:
    """The part of a bordered ``x`` that a step from an image and an output row on needs."""
    blocks, first = blocks_of(spec), blocks_of(spec).axes[0]
    x = lax.dynamic_slice_in_dim(x, image, blocks.images)
    if first.count == 1:
        return x
    return lax.dynamic_slice_in_dim(x, row, row_blocks(spec).rows + first.taps - 1, 1)


# Products per output from which an FFT's root mean square error is about twice lax's or less: with
# one channel and 31×31 to 45×45 or 1,001 taps it was 1.6 to 2.1 times in eight seeds, with 7×7 to
# 21×21 taps up to 2.6 times.
MIN_PRODUCTS = 900


class Fft(Algorithm):
    name = "fft"
    summary = "a product of spectra, by overlapping blocks"
    margin = 0.5
    rereads = False
    caveat = "its errors are relative to the norm of a block, so zeros may become 1e-7 of it"

    def unsupported(self, spec: ConvSpec) -> str | None:
        if not 1 <= spec.spatial_ndim <= 3:
            return f"FFTs have 1 to 3 dimensions, this has {spec.spatial_ndim}"
        if not jnp.issubdtype(spec.dtype, np.inexact):
            return f"{spec.dtype.name} would not stay exact through an FFT"
        if {lax.Precision.HIGH, lax.Precision.HIGHEST} & set(spec.precision):
            return "precision 'high' and 'highest' require the direct products, an FFT forms others"
        return None

    def excluded(self, spec: ConvSpec) -> str | None:
        # Of 31×31 taps on 12×12 elements at most 144 are needed, the others multiply zeros: the
        # error was 2.4 times lax's.
        needed = (min(-(-a.taps // a.spacing), a.size) for a in spec.axes)
        few = spec.rhs_shape[-2] * math.prod(needed) < MIN_PRODUCTS
        reason = f"it rounds too much where an output sums fewer than {MIN_PRODUCTS} products"
        return reason if few else None

    def spread(self, spec: ConvSpec) -> tuple[int, ...] | None:
        if spec.weight_gradient:
            return (1,) * spec.spatial_ndim
        axes = zip(blocks_of(spec).axes, spec.window_strides, strict=True)
        return tuple(max(1, axis.step // stride) for axis, stride in axes)

    def cost(self, spec: ConvSpec) -> Cost:
        gradient, spec = spec.weight_gradient, spec.forward
        blocks, steps = blocks_of(spec), row_blocks(spec).steps
        g, (c, o) = spec.groups, spec.rhs_shape[-2:]
        size, itemsize = math.prod(blocks.lengths), spec.accumulator_dtype.itemsize
        half = size // 2 + 1
        tiles, step = steps * blocks.tiles, blocks.tiles * (g * c + o) * size * itemsize
        flops = (tiles * (g * c + o) + c * o) * transform_flops(blocks.lengths)
        kernel = 2 * c * o * size * itemsize
        shape = None if c == 1 else (steps * g * half, blocks.tiles, 2 * o // g, 2 * c)
        traffic = spec.operand_bytes + 6 * steps * step + 2 * kernel
        workspace = layout.padded_bytes(spec) * (steps > 1)
        twice = 1 if shape is None else 2  # in real numbers
        workspace += step * twice + kernel * (1 if gradient else twice)
        if gradient:  # scaled copies, the cotangent's dilated
            rows = map(dilate, spec.out_spatial, spec.window_strides)
            cotangent = math.prod((spec.lhs_shape[0], *rows, spec.out_channels)) * itemsize
            workspace += math.prod(spec.lhs_shape) * itemsize + cotangent
        return Cost(round(flops) + 8 * tiles * c * o * half, traffic, workspace, shape, steps)

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        g, ndim, dtype = spec.groups, spec.spatial_ndim, spec.accumulator_dtype
        blocks = blocks_of(spec)
        lhs_exponents, rhs_exponent = excess(lhs), excess(rhs[None])
        x = bordered(dilated(scaled(lhs, -lhs_exponents), spec.lhs_dilation), blocks)
        kernel = scaled(rhs[None], -rhs_exponent)[0].astype(dtype)
        kernel = layout.split_groups(kernel, -1, g)  # kernel: (kernel…, c, g, o)
        kernel = kernel.transpose(ndim + 1, ndim, ndim + 2, *range(ndim))
        # kernel: (g, c, o, frequencies)
        kernel = window_spectrum(dilated(kernel, spec.rhs_dilation, first=3), blocks)
        positions, steps = [axis.positions for axis in blocks.axes], row_blocks(spec)

        def convolved(image: Any, row: Any) -> Array:
            tiles = inputs_of(x, spec, image, row).astype(dtype)
            # tiles: (tiles, g, c, frequencies)
            tiles = spectrum(tiles_of(tiles, blocks, g, overlap=True), blocks)
            tiles = product(jnp.moveaxis(tiles, 0, 1), kernel, spec)
            tiles = inverse(jnp.moveaxis(tiles, 1, 0), blocks, dtype)
            tiles = tiles[(..., *(slice(axis.step) for axis in blocks.axes))]
            # tiles: (images·counts…, g, o, steps…) → (images, (count, step)…, g, o)
            counts = [blocks.rows, *(axis.count for axis in blocks.axes[1:])]
            tiles = tiles.reshape(blocks.images, *counts, *tiles.shape[1:])
            exponents = lax.dynamic_slice_in_dim(lhs_exponents, image, blocks.images)
            tiles = rescaled(tiles, exponents + rhs_exponent)
            pairs = [axis for d in range(ndim) for axis in (1 + d, 3 + ndim + d)]
            tiles = tiles.transpose(0, *pairs, 1 + ndim, 2 + ndim)
            sizes = [count * axis.step for count, axis in zip(counts, blocks.axes, strict=True)]
            tiles = tiles.reshape(blocks.images, *sizes, -1)
            tiles = tiles[(slice(None), *map(slice, (steps.rows, *positions[1:])))]
            return tiles.astype(spec.out_dtype)

        shape = (spec.lhs_shape[0], *positions, spec.out_channels)
        out = steps.filled(shape, spec.out_dtype, x, convolved)
        return loops.strided(out, (0,) * ndim, spec.out_spatial, spec.window_strides)

    def gradient(self, image: Array, cotangent: Array, spec: ConvSpec) -> Array:
        g, ndim, dtype = spec.groups, spec.spatial_ndim, spec.accumulator_dtype
        blocks, steps = blocks_of(spec), row_blocks(spec)
        # One exponent for all images: the kernel is a sum over them.
        lhs_exponent, rhs_exponent = excess(image[None]), excess(cotangent[None])
        image = scaled(image[None], -lhs_exponent)[0]
        cotangent = scaled(cotangent[None], -rhs_exponent)[0]
        x = bordered(dilated(image, spec.lhs_dilation), blocks)
        y = dilated(cotangent, spec.window_strides)

        def step(i: Any) -> Array:
            part, cotangents = inputs_of(x, spec, *steps.start(i)), steps.unrepeated(y, i)
            a = spectrum(tiles_of(part.astype(dtype), blocks, g, overlap=True), blocks)
            b = tiles_of(cotangents.astype(dtype), blocks, g, overlap=False)
            b = window_spectrum(b, blocks)
            # a: (tiles, g, c, frequencies), b: (tiles, g, o, frequencies)
            return product(a.transpose(1, 2, 0, 3), jnp.moveaxis(b, 0, 1), spec)

        shape = (g, spec.rhs_shape[-2], spec.out_channels // g, *blocks.lengths)
        sums = jax.eval_shape(lambda: spectrum(jnp.zeros(shape, dtype), blocks))
        total = loops.sum_over(steps.steps, loops.zeros(sums.shape, sums.dtype, x), step)
        kernel = inverse(total, blocks, dtype)  # kernel: (g, c, o, lengths…)
        taps = (slice(0, axis.window, axis.dilation) for axis in spec.axes)
        kernel = kernel[(..., *taps)].transpose(*range(3, 3 + ndim), 1, 0, 2)
        return rescaled(kernel.reshape(1, *spec.rhs_shape), lhs_exponent + rhs_exponent)[0]


FFT = Fft()
