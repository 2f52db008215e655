"""im2col by tiles of output rows, so that the patch matrix stays in cache."""

import jax.numpy as jnp
from jax import Array, lax

from jaxconv import compat, layout
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.algorithms.gemm import gemm, kernel_matrix
from jaxconv.spec import ConvSpec

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
    return Cost(
        flops=spec.flops,
        traffic=spec.operand_bytes + 2 * tile * steps,
        workspace=layout.padded_bytes(spec) + 2 * tile,
        gemm=(groups * steps, tile_m, n, k),
        steps=steps,
    )


def run(lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
    g = spec.groups
    rows = tile_rows(spec)
    x, spec = layout.pad_and_dilate(lhs, spec)
    n, _, *rest, _ = x.shape
    kernel = kernel_matrix(rhs, g)  # kernel: (g, k, o), k = taps·c
    height, *widths = spec.out_spatial
    tiles = -(-height // rows)
    stride = spec.window_strides[0]
    span = (rows - 1) * stride + (spec.kernel_shape[0] - 1) * spec.rhs_dilation[0] + 1
    tile_spec = spec.replace(lhs_shape=(1, span, *rest, x.shape[-1]))

    def add_tile(i: Array, out: Array) -> Array:
        image = i // tiles
        # The last tile moves up where the rows don't divide, and writes some of them again.
        row = jnp.minimum(i % tiles * rows, height - rows)
        tile = lax.dynamic_slice_in_dim(
            lax.dynamic_slice_in_dim(x, image, 1), row * stride, span, 1
        )
        tile = layout.features_to_batch(tile, g)
        matrix = layout.patches(tile, tile_spec).reshape(g, -1, kernel.shape[1])
        tile = gemm(matrix, kernel, spec).reshape(g, rows, *widths, -1)
        tile = layout.batch_groups_to_features(tile, g).astype(spec.out_dtype)
        starts = (image, row, *(0 for _ in range(len(widths) + 1)))
        return lax.dynamic_update_slice(out, tile, [jnp.asarray(s, jnp.int32) for s in starts])

    out, _ = compat.auto_insert_reshard(jnp.zeros(spec.out_shape, spec.out_dtype), x)
    return lax.fori_loop(jnp.int32(0), jnp.int32(n * tiles), add_tile, out)


IM2COL_TILED = Algorithm(
    "im2col_tiled", "im2col by tiles of output rows that stay in cache", supports, cost, run
)
