"""Slices, sums and stacks of many terms, unrolled or as loops, and loops over blocks of rows."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv.compat import OLD_XLA, auto_insert_reshard

# Most slices to unroll; beyond that, a loop.
UNROLL = 64
# Terms of a loop above which they are summed in groups, of no fewer than these: the gradient of 4
# taps, 8×1024×768, a sum of 1,024 terms, had 2.3 times lax's error, so 0.7 times.
GROUPED, FEWEST = 256, 8
# Computed indices are int32: with 64-bit ones XLA:CPU compiles slower loops, and JAX has none
# unless jax_enable_x64 is set.
MAX_INDEX = np.iinfo(np.int32).max


def strided(x: Array, starts: Sequence[Any], counts: Sequence[int], steps: Sequence[int]) -> Array:
    """``counts`` elements, ``steps`` apart, from ``starts`` on along each axis but the first of
    ``x``. Starts known at trace time become a static slice, others a dynamic one."""
    first, rest = x.shape[0], x.shape[1 + len(counts) :]
    spans = [(count - 1) * step + 1 for count, step in zip(counts, steps, strict=True)]
    spans, starts = (first, *spans, *rest), (0, *starts, *(0 for _ in rest))
    if not all(isinstance(start, int) for start in starts):
        x = lax.dynamic_slice(x, [jnp.asarray(start, jnp.int32) for start in starts], spans)
        starts = (0,) * x.ndim
    limits = [start + span for start, span in zip(starts, spans, strict=True)]
    return lax.slice(x, starts, limits, (1, *steps, *(1 for _ in rest)))


def combined(terms: list[Array], operation: Callable[[Array, Array], Array] = lax.add) -> Array:
    """In pairs: 121 terms in float32 have an error of 1e-7 as lax's sums, instead of 5e-7."""
    while len(terms) > 1:
        pairs = [operation(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def sum_of(count: int, term: Callable[[Any], Array], unroll: int) -> Array:
    """``term(0) + … + term(count - 1)``: unrolled up to ``unroll`` terms, beyond that a loop."""

    def chunk(first: Any, length: int) -> Array:
        return combined([term(first + i) for i in range(length)])

    if count <= unroll:
        return chunk(0, count)
    # The remainder goes first, so that the loop starts from a value of the right type.
    loops, rest = divmod(count - 1, unroll)
    return sum_over(loops, chunk(0, 1 + rest), lambda i: chunk(1 + rest + i * unroll, unroll))


def in_one_loop(x: Array) -> Array:
    """``x``, limited to ±infinity: its value, but an operation that XLA compiles to a loop."""
    # XLA:CPU hands a sum over ``x``, with the products and sums that make it, to a library that
    # writes each to memory: depthwise 3×3, 66×66×16 to 48 channels, then summed over threes, takes
    # 4.8 ms, so 0.8 to 1.0. ``lax.optimization_barrier`` would also keep an activation out of the
    # loop, and JAX 0.10.2 removes it too early.
    if not jnp.issubdtype(x.dtype, np.floating):
        return x
    limit = np.array(np.inf, x.dtype)
    return lax.clamp(-limit, x, limit)


def stored(x: Array) -> Array:
    """``x``, kept in memory: what made it is not computed again by each operation that reads it."""
    if not OLD_XLA:
        return lax.optimization_barrier(x)
    # JAX 0.10.2 removes barriers before it fuses. XLA doesn't know that this loop has no steps.
    never = x[(0,) * x.ndim].real.astype(np.float32) > np.float32(np.inf)
    ended = partial(jax.tree.map, jnp.zeros_like)
    return lax.while_loop(lambda state: state[0], ended, (never, x))[1]


def sum_over(steps: int, total: Array, term: Callable[[Any], Array]) -> Array:
    """``total + term(0) + … + term(steps - 1)``, by a loop; many terms in groups first, so that
    rounding errors grow less than with their number."""
    if steps == 1:  # XLA would undo the loop, which hides from ``is_remade`` what is summed
        return total + term(0)
    group = max((n for n in range(1, 2 * math.isqrt(steps) + 1) if steps % n == 0), default=1)
    if steps > GROUPED and group >= FEWEST:

        def of_group(i: Any) -> Array:
            zero = zeros(total.shape, total.dtype, total)
            return sum_over(group, zero, lambda j: term(i * group + j))

        return sum_over(steps // group, total, of_group)
    # int32: with jax_enable_x64, 16×16 taps of 25 channels took 124 ms instead of 9.
    return lax.fori_loop(np.int32(0), np.int32(steps), lambda i, sums: sums + term(i), total)


def sum_of_blocks(
    steps: int, shape: Sequence[int], dtype: Any, like: Array, term: Callable[[Any], Array]
) -> Array:
    """``term(0) + … + term(steps - 1)``, by a loop if several; of the mesh axes of ``like``."""
    return term(0) if steps == 1 else sum_over(steps, zeros(shape, dtype, like), term)


def stack_of(count: int, term: Callable[[Any], Array], axis: int, unroll: int = UNROLL) -> Array:
    """``term(0)``, …, ``term(count - 1)`` along a new ``axis``."""
    if count <= unroll:
        return jnp.stack([term(i) for i in range(count)], axis)
    return jnp.moveaxis(lax.map(term, jnp.arange(count, dtype=jnp.int32)), 0, axis)


def unravel(index: Any, shape: Sequence[int], steps: Sequence[int] = ()) -> list[Any]:
    """Row-major coordinates of a flat ``index``, static or traced; multiplied by ``steps``."""
    coordinates = []
    for size in reversed(shape):
        coordinates.insert(0, index % size)
        index = index // size
    return [c * step for c, step in zip(coordinates, steps, strict=True)] if steps else coordinates


def zeros(shape: Sequence[int], dtype: Any, *like: Array) -> Array:
    """Zeros that vary over the same mesh axes as the arrays ``like``."""
    return auto_insert_reshard(jnp.zeros(shape, dtype), *like)[0]


class RowBlocks(NamedTuple):
    """An array (batch, height, …) in blocks: of whole images, or of rows of one image. Where these
    don't divide, the last block of an image starts earlier and repeats some."""

    batch: int
    height: int
    images: int  # of a block
    rows: int

    @property
    def per_image(self) -> int:
        return -(-self.height // self.rows)

    @property
    def steps(self) -> int:
        return self.batch // self.images * self.per_image

    def start(self, i: Any) -> tuple[Any, Any]:
        """The first image and the first row of block ``i``."""
        image = i // self.per_image * self.images
        return image, jnp.minimum(i % self.per_image * self.rows, self.height - self.rows)

    def filled(
        self, shape: Sequence[int], dtype: Any, like: Array, block: Callable[[Any, Any], Array]
    ) -> Array:
        """The array whose block from an image and a row on is ``block(image, row)``; it varies over
        the same mesh axes as ``like``."""
        if self.steps == 1:
            return block(0, 0)

        def add(i: Any, out: Array) -> Array:
            image, row = self.start(i)
            part = block(image, row)
            starts = (image, row, *(0 for _ in shape[2:]))
            return lax.dynamic_update_slice(out, part, [jnp.asarray(s, jnp.int32) for s in starts])

        return lax.fori_loop(np.int32(0), np.int32(self.steps), add, zeros(shape, dtype, like))

    def unrepeated(self, y: Array, i: Any) -> Array:
        """Block ``i`` of ``y``, with zeros in rows that the previous block has too."""
        image, row = self.start(i)
        y = lax.dynamic_slice_in_dim(y, image, self.images)
        y = lax.dynamic_slice_in_dim(y, row, self.rows, 1)
        if self.height % self.rows == 0:
            return y
        repeated = row + jnp.arange(self.rows, dtype=jnp.int32) < i % self.per_image * self.rows
        return jnp.where(repeated.reshape(-1, *(1,) * (y.ndim - 2)), np.zeros((), y.dtype), y)
