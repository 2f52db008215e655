"""im2col by tiles of output rows, so that the patch matrix stays in cache."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import compat, layout
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.algorithms.gemm import gemm, kernel_matrix
from jaxconv.spec import ConvSpec, dilate

# Bytes of the patch matrix of a tile.
TILE_BYTES = 2 << 20


def supports(spec: ConvSpec) -> str | None:
    return None if spec.spatial_ndim else "there is no spatial dimension to cut into tiles"


def tile_rows(spec: ConvSpec) -> int:
    """Output rows (of the first spatial dimension) whose patches of one image fit a tile."""
    row = spec.groups * spec.positions // spec.out_spatial[0] * spec.gemm[3] * spec.dtype.itemsize
    tiles = -(-spec.out_spatial[0] // max(1, TILE_BYTES // row))
    return -(-spec.out_spatial[0] // tiles)


def cost(spec: ConvSpec) -> Cost:
    groups, _, n, k = spec.gemm
    rows = tile_rows(spec)
    tiles = -(-spec.out_spatial[0] // rows)
    tile_m = spec.positions // spec.out_spatial[0] * rows
    tile = groups * tile_m * (k * spec.dtype.itemsize + n * spec.accumulator_dtype.itemsize)
    steps = spec.out_shape[0] * tiles
    dilated = layout.padded_bytes(spec) if any(d > 1 for d in spec.lhs_dilation) else 0
    return Cost(
        flops=spec.flops,
        traffic=spec.operand_bytes + 2 * tile * steps,
        workspace=dilated + 2 * tile,
        gemm=(groups * steps, tile_m, n, k),
        steps=steps,
    )


def run(lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
    g = spec.groups
    rows = tile_rows(spec)
    x = lhs
    if any(d > 1 for d in spec.lhs_dilation):
        x, spec = layout.pad_and_dilate(x, spec)
    kernel = kernel_matrix(rhs, g)  # kernel: (g, k, o), k = taps·c
    height, *widths = spec.out_spatial
    tiles = -(-height // rows)
    stride = spec.window_strides[0]
    span = (rows - 1) * stride + dilate(spec.kernel_shape[0], spec.rhs_dilation[0])

    # Tiles are padded, not the image: a second image in memory would be as large as the output.
    size, taken = x.shape[1], min(span, x.shape[1])
    low, high = (max(0, pad) for pad in spec.padding[0])
    pads = ((low, high), *spec.padding[1:])
    unpadded = spec.replace(lhs_shape=(1, taken, *x.shape[2:]), padding=pads)

    def tile_at(image: Array, row: Array) -> tuple[Array, ConvSpec]:
        start = row * stride - spec.padding[0][0]
        first = jnp.clip(start, 0, size - taken)
        tile = lax.dynamic_slice_in_dim(lax.dynamic_slice_in_dim(x, image, 1), first, taken, 1)
        tile, tile_spec = layout.pad_and_dilate(tile, unpadded)
        tile = lax.dynamic_slice_in_dim(tile, start - first + low, span, 1)
        return tile, tile_spec.replace(lhs_shape=tile.shape)

    def add_tile(i: Array, out: Array) -> Array:
        image = i // tiles
        # The last tile moves up where the rows don't divide, and writes some of them again.
        row = jnp.minimum(i % tiles * rows, height - rows)
        tile, tile_spec = tile_at(image, row)
        matrix = layout.patches(layout.features_to_batch(tile, g), tile_spec)
        matrix = matrix.reshape(g, -1, kernel.shape[1])  # matrix: (g, rows·widths, k)
        tile = gemm(matrix, kernel, spec).reshape(g, rows, *widths, -1)
        tile = layout.batch_groups_to_features(tile, g).astype(spec.out_dtype)
        starts = (image, row, *(0 for _ in range(len(widths) + 1)))
        return lax.dynamic_update_slice(out, tile, [jnp.asarray(s, jnp.int32) for s in starts])

    out, _ = compat.auto_insert_reshard(jnp.zeros(spec.out_shape, spec.out_dtype), x)
    return lax.fori_loop(np.int32(0), np.int32(spec.out_shape[0] * tiles), add_tile, out)


IM2COL_TILED = Algorithm(
    "im2col_tiled", "im2col by tiles of output rows that stay in cache", supports, cost, run
)
