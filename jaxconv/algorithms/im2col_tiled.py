"""im2col by tiles of output rows, so that the patch matrix stays in cache."""

import math
from typing import Any, NamedTuple

from jax import Array, lax

from jaxconv import layout, loops
from jaxconv.algorithms import gemm, pointwise
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec

# Bytes of the patch matrix of a tile.
TILE_BYTES = 2 << 20
# Bytes that a kernel's gradient gathers for a tile. 64×32×32×16 → 16 takes 7.5 ms with 3.3 MiB, 9.7
# with 0.8, 8.6 with 6.7; 64×32×32×32 → 32 takes 20, 30 and 23.
GRADIENT_BYTES = 7 << 19
# Most rows of a tile's image over those of its cotangent, beyond which zeros cost too much.
MOST = 1.25


def tile_rows(spec: ConvSpec) -> int:
    """Output rows (of the first spatial dimension) whose patches of one image fit a tile."""
    row = spec.groups * spec.positions // spec.out_spatial[0] * spec.gemm[3] * spec.dtype.itemsize
    tiles = -(-spec.out_spatial[0] // max(1, TILE_BYTES // row))
    return -(-spec.out_spatial[0] // tiles)


class Tiles(NamedTuple):
    """How a kernel's gradient is cut.

    It sums image[y + i, x + j] · cotangent[y, x] for each tap (i, j). With j gathered from the
    image and i from the cotangent one product of 3·c by 3·o columns has all taps of 3×3, instead of
    9·c by o: fewer columns to gather, and few channels fill the product's blocks. With tiles of
    several images, 239 convolutions take 0.78 of the time in the geometric mean, at best 0.2.
    """

    blocks: loops.RowBlocks  # of several images where these are small
    shared: int  # taps along the first axis if they are gathered from the cotangent, else 1
    columns: tuple[int, int]  # gathered at each position of image and cotangent, of a group
    border: int  # rows of the image beyond those of the cotangent, which gets zeros on both sides

    @classmethod
    def of(cls, spec: ConvSpec) -> "Tiles":
        taps, c, (_, _, o, k) = spec.kernel_shape[0], spec.rhs_shape[-2], spec.gemm
        columns = spec.taps // taps * c, taps * o
        fewer = sum(columns) < k and spec.groups == 1 == spec.window_strides[0]
        # Zeros beside the cotangent meet the image.
        if fewer and lax.Precision.HIGHEST not in spec.precision:
            border = (taps - 1) * spec.rhs_dilation[0]
            blocks = cls._blocks(spec, columns, border)
            if blocks.rows + border <= MOST * blocks.rows:
                return cls(blocks, taps, columns, border)
        return cls(cls._blocks(spec, (k, o), 0), 1, (k, o), 0)

    @staticmethod
    def _blocks(spec: ConvSpec, columns: tuple[int, int], border: int) -> loops.RowBlocks:
        batch, height = spec.lhs_shape[0], spec.out_spatial[0]
        row = spec.groups * spec.positions // height * sum(columns) * spec.dtype.itemsize
        if fit := GRADIENT_BYTES // (row * (height + border)):
            images = max(i for i in range(1, min(fit, batch) + 1) if batch % i == 0)
            return loops.RowBlocks(batch, height, images, height)
        count = -(-height // max(1, GRADIENT_BYTES // row - border))
        return loops.RowBlocks(batch, height, 1, -(-height // count))


def group_by_group(image: Array, cotangent: Array, spec: ConvSpec) -> Array:
    """``gradient`` of one image in groups, as from vmap over per-example gradients: the former
    examples are contiguous in memory."""
    g, (_, *spatial, c) = spec.groups, spec.lhs_shape
    rhs_shape = (*spec.rhs_shape[:-1], spec.out_channels // g)
    one = spec.replace(lhs_shape=(1, *spatial, c // g), rhs_shape=rhs_shape, feature_group_count=1)
    each = layout.features_to_batch(image, g), layout.features_to_batch(cotangent, g)
    kernels = lax.map(lambda pair: IM2COL_TILED.gradient(pair[0][None], pair[1][None], one), each)
    return gemm.kernel_of(kernels, spec)


class Im2colTiled(Algorithm):
    name = "im2col_tiled"
    summary = "im2col by tiles of output rows that stay in cache"

    def unsupported(self, spec: ConvSpec) -> str | None:
        return None if spec.spatial_ndim else "there is no spatial dimension to cut into tiles"

    def doubted(self, spec: ConvSpec) -> str | None:
        # In groups ``pointwise`` moves whole images, and this a tile: two groups of 256 channels,
        # 8×64×64, on JAX 0.10.2 take 29 ms instead of 65, and 3 MiB instead of 80.
        return None if spec.groups > 1 else pointwise.same_product(spec)

    def cost(self, spec: ConvSpec) -> Cost:
        if spec.weight_gradient:
            return self._gradient_cost(spec.forward)
        (groups, _, n, k), rows = spec.gemm, tile_rows(spec)
        steps = spec.out_shape[0] * -(-spec.out_spatial[0] // rows)
        m = spec.positions // spec.out_spatial[0] * rows
        tile = groups * m * (k * spec.dtype.itemsize + n * spec.accumulator_dtype.itemsize)
        dilated = layout.padded_bytes(spec) if max(spec.lhs_dilation) > 1 else 0
        traffic, workspace = spec.operand_bytes + 2 * tile * steps, dilated + 2 * tile
        return Cost(spec.flops, traffic, workspace, (groups * steps, m, n, k), steps)

    def _gradient_cost(self, spec: ConvSpec) -> Cost:
        blocks, _, columns, border = Tiles.of(spec)
        m = blocks.images * (blocks.rows + border) * (spec.positions // spec.out_spatial[0])
        shape = spec.groups * blocks.steps, *columns, m
        tile = spec.groups * m * sum(columns) * spec.dtype.itemsize
        total = spec.groups * math.prod(columns) * spec.accumulator_dtype.itemsize
        dilated = layout.padded_bytes(spec) if max(spec.lhs_dilation) > 1 else 0
        traffic = spec.operand_bytes + 2 * (tile + total) * blocks.steps
        return Cost(2 * math.prod(shape), traffic, dilated + tile + 2 * total, shape, blocks.steps)

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        g = spec.groups
        if max(spec.lhs_dilation) > 1:
            lhs, spec = layout.pad_and_dilate(lhs, spec)
        kernel = gemm.kernel_matrix(rhs, g)  # kernel: (g, k, o), k = taps·c
        rows = tile_rows(spec)

        def tile_at(image: Any, row: Any) -> Array:
            tile, tile_spec = layout.rows_of(lhs, spec, image, 1, row, rows)
            matrix = layout.patches(layout.features_to_batch(tile, g), tile_spec)
            matrix = matrix.reshape(g, -1, kernel.shape[1])  # matrix: (g, rows·widths, k)
            tile = gemm.outputs_of(gemm.product(matrix, kernel, spec), tile_spec)
            return tile.astype(spec.out_dtype)

        tiles = loops.RowBlocks(len(lhs), spec.out_spatial[0], 1, rows)
        return tiles.filled(spec.out_shape, spec.out_dtype, lhs, tile_at)

    def gradient(self, image: Array, cotangent: Array, spec: ConvSpec) -> Array:
        g = spec.groups
        if g > 1 and len(image) == 1:
            return group_by_group(image, cotangent, spec)
        if max(spec.lhs_dilation) > 1:
            image, spec = layout.pad_and_dilate(image, spec)
        blocks, shared, columns, border = Tiles.of(spec)

        def product(i: Any) -> Array:
            first, row = blocks.start(i)
            x, tile = layout.rows_of(image, spec, first, blocks.images, row, blocks.rows)
            y = layout.features_to_batch(blocks.unrepeated(cotangent, i), g)
            if shared > 1:
                y, ones = layout.padded(y, [(border, border, 0)]), (1,) * (spec.spatial_ndim - 1)
                rows = tile.replace(lhs_shape=y.shape, rhs_shape=(shared, *ones, *y.shape[-1:] * 2))
                y = layout.patches(y, rows.replace(window_strides=(1, *ones)))
                tile = tile.replace(rhs_shape=(1, *spec.rhs_shape[1:]))
            x = layout.patches(layout.features_to_batch(x, g), tile)
            x, y = (a.reshape(g, -1, n) for a, n in zip((x, y), columns, strict=True))
            return gemm.gradient(x, y, spec)

        shape, dtype = (g, *columns), spec.accumulator_dtype
        total = loops.sum_of_blocks(blocks.steps, shape, dtype, image, product)
        # The cotangent's rows come in the reverse order of the taps that they belong to.
        total = total.reshape(g, columns[0], shared, -1)[:, :, ::-1].swapaxes(1, 2)
        return gemm.kernel_of(total.reshape(g, -1, total.shape[-1]), spec)


IM2COL_TILED = Im2colTiled()
