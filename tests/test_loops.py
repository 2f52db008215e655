"""Blocks of rows: none is left out, none counts twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.loops import RowBlocks


@pytest.mark.parametrize(
    ("batch", "height", "images", "rows", "shape"),
    [
        (4, 6, 2, 6, (2, 3)),
        (2, 6, 1, 3, (3,)),
        (2, 7, 1, 3, (2, 3)),
        (1, 5, 1, 4, (3,)),
        (3, 5, 3, 5, ()),
    ],
)
def test_blocks_of_rows(
    batch: int, height: int, images: int, rows: int, shape: tuple[int, ...]
) -> None:
    y = jax.random.normal(jax.random.key(0), (batch, height, *shape), jnp.float32)
    blocks = RowBlocks(batch, height, images, rows)

    def block(image: jax.Array, row: jax.Array) -> jax.Array:
        of_images = jax.lax.dynamic_slice_in_dim(y, image, images)
        return jax.lax.dynamic_slice_in_dim(of_images, row, rows, 1)

    @jax.jit
    def run(y: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        parts = [blocks.unrepeated(y, jnp.int32(i)) for i in range(blocks.steps)]
        return blocks.filled(y.shape, y.dtype, y, block), parts

    filled, parts = run(y)
    np.testing.assert_array_equal(filled, y)
    assert all(part.shape == (images, rows, *shape) for part in parts)
    total = sum(np.asarray(part, np.float64).sum((0, 1)) for part in parts)
    np.testing.assert_allclose(total, np.asarray(y, np.float64).sum((0, 1)), rtol=1e-12)
