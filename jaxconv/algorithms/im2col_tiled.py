"""im2col by tiles of output rows, so that the patch matrix stays in cache."""

from typing import Any

from jax import Array, lax

from jaxconv import layout, loops
from jaxconv.algorithms import gemm, pointwise
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec

# Bytes of the patch matrix of a tile.
TILE_BYTES = 2 << 20


def tile_rows(spec: ConvSpec) -> int:
    """Output rows (of the first spatial dimension) whose patches of one image fit a tile."""
    row = spec.groups * spec.positions // spec.out_spatial[0] * spec.gemm[3] * spec.dtype.itemsize
    tiles = -(-spec.out_spatial[0] // max(1, TILE_BYTES // row))
    return -(-spec.out_spatial[0] // tiles)


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
        return pointwise.same_product(spec)

    def cost(self, spec: ConvSpec) -> Cost:
        spec = spec.forward
        (groups, _, n, k), rows = spec.gemm, tile_rows(spec)
        steps = spec.out_shape[0] * -(-spec.out_spatial[0] // rows)
        m = spec.positions // spec.out_spatial[0] * rows
        tile = groups * m * (k * spec.dtype.itemsize + n * spec.accumulator_dtype.itemsize)
        dilated = layout.padded_bytes(spec) if max(spec.lhs_dilation) > 1 else 0
        traffic, workspace = spec.operand_bytes + 2 * tile * steps, dilated + 2 * tile
        return Cost(spec.flops, traffic, workspace, (groups * steps, m, n, k), steps)

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
        rows = tile_rows(spec)
        tiles, left = divmod(spec.out_spatial[0], rows)

        def product(n: Any, row: Any, rows: int) -> Array:
            tile, tile_spec = layout.rows_of(image, spec, n, 1, row, rows)
            part = lax.dynamic_slice_in_dim(lax.dynamic_slice_in_dim(cotangent, n, 1), row, rows, 1)
            part = gemm.rows_of(part, g)
            matrix = layout.patches(layout.features_to_batch(tile, g), tile_spec)
            return gemm.gradient(matrix.reshape(*part.shape[:2], -1), part, spec)

        shape = (g, spec.gemm[3], spec.out_channels // g)
        total = loops.sum_over(
            len(image) * tiles,
            loops.zeros(shape, spec.accumulator_dtype, image),
            lambda i: product(i // tiles, i % tiles * rows, rows),
        )
        if left:
            total = loops.sum_over(len(image), total, lambda i: product(i, tiles * rows, left))
        return gemm.kernel_of(total, spec)


IM2COL_TILED = Im2colTiled()
