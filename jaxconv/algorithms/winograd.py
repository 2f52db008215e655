"""Winograd's minimal filtering: fewer multiplications for small kernels, by transforming tiles.

F(m, r) makes m outputs of r taps from m + r - 1 products instead of m·r:

    y = Aᵀ [(G w) ⊙ (Bᵀ x)]

along each spatial axis, with x a tile of m + r - 1 inputs, y its m outputs. Channels are summed
between the transforms, so each of the products is a GEMM over all tiles: (tiles, c)·(c, o).

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2015). The matrices are
Cook–Toom's: Blahut, "Fast Algorithms for Signal Processing" (2010), chapter 5.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import compat, layout
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec

Matrix = tuple[tuple[Fraction, ...], ...]

# Where polynomials are evaluated, besides infinity: small numbers round least.
POINTS = tuple(map(Fraction, ("0", "1", "-1", "2", "-2", "1/2", "-1/2")))
# Bytes of a block's transformed inputs and products.
BLOCK_BYTES = 8 << 20


@cache
def transforms(m: int, r: int) -> tuple[Matrix, Matrix, Matrix]:
    """Aᵀ (m, n), G (n, r) and Bᵀ (n, n) of F(m, r), n = m + r - 1, exact.

    An axis of one tap has nothing to save: F(1, 1) is a product.
    """
    points = POINTS[: m + r - 2]
    zero, one = Fraction(0), Fraction(1)
    a, g, b = [], [], []
    for p in points:
        others = [q for q in points if q != p]
        scale = math.prod((p - q for q in others), start=one)
        # The rows of Bᵀ are integers, as in the paper, their first coefficients not negative.
        row = _product_of(others)
        factor = Fraction(math.lcm(*(c.denominator for c in row)))
        factor *= -1 if next(c for c in row if c) < 0 else 1
        a.append([p**i for i in range(m)])
        g.append([p**k / scale / factor for k in range(r)])
        b.append([c * factor for c in row] + [zero])
    a.append([zero] * (m - 1) + [one])
    g.append([zero] * (r - 1) + [one])
    b.append(_product_of(points))
    return tuple(zip(*a, strict=True)), tuple(map(tuple, g)), tuple(map(tuple, b))


def _product_of(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of Π (x - root), the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [
            high - root * low for high, low in zip(shifted, [*coefficients, 0], strict=True)
        ]
    return coefficients


def combinations(matrix: Matrix, terms: Sequence[Array]) -> list[Array]:
    """``matrix @ terms``, written out as sums: zeros and ones cost nothing."""
    return [_combination(row, terms) for row in matrix]


def _combination(row: Sequence[Fraction], terms: Sequence[Array]) -> Array:
    total = None
    for factor, term in zip(row, terms, strict=True):
        if factor == 0:
            continue
        part = term if abs(factor) == 1 else term * np.asarray(float(abs(factor)), term.dtype)
        if total is None:
            total = part if factor > 0 else -part
        else:
            total = total + part if factor > 0 else total - part
    assert total is not None
    return total


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a convolution is cut into blocks of tiles.

    Attributes:
      m: outputs of a tile along each spatial axis.
      images, rows: images of a block, and its output rows along the first spatial axis.
    """

    spec: ConvSpec
    m: tuple[int, ...]
    images: int
    rows: int

    @property
    def n(self) -> tuple[int, ...]:
        """Inputs of a tile along each spatial axis."""
        return tuple(m + r - 1 for m, r in zip(self.m, self.spec.kernel_shape, strict=True))

    @property
    def out_spatial(self) -> tuple[int, ...]:
        """Of an image in a block."""
        return self.rows, *self.spec.out_spatial[1:]

    @property
    def tiles(self) -> tuple[int, ...]:
        """Of an image in a block."""
        return tuple(-(-size // m) for size, m in zip(self.out_spatial, self.m, strict=True))

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of images, and of rows."""
        return self.spec.lhs_shape[0] // self.images, -(-self.spec.out_spatial[0] // self.rows)

    @property
    def steps(self) -> int:
        return math.prod(self.blocks)

    @property
    def gemm(self) -> tuple[int, int, int, int]:
        groups, c = self.spec.groups, self.spec.rhs_shape[-2]
        p = self.images * math.prod(self.tiles)
        return groups * math.prod(self.n), p, self.spec.out_channels // groups, c


def tiling(spec: ConvSpec, m: int, limit: int) -> Tiling:
    """Blocks of whole images, or of rows of an image, of at most ``limit`` bytes."""
    batch, height = spec.lhs_shape[0], spec.out_spatial[0]
    whole = Tiling(spec, tuple(m if k > 1 else 1 for k in spec.kernel_shape), 1, height)
    count, p, o, c = whole.gemm
    size = count * p * (c + o) * spec.accumulator_dtype.itemsize
    if size <= limit:
        images = max(i for i in range(1, batch + 1) if batch % i == 0 and i * size <= limit)
        return dataclasses.replace(whole, images=images)
    tiles, m = whole.tiles[0], whole.m[0]
    blocks = min(tiles, -(-size // limit))
    return dataclasses.replace(whole, rows=min(height, m * -(-tiles // blocks)))


def inputs(x: Array, tiling: Tiling) -> Array:
    """Bᵀ x: (g·n, padded spatial…, c) → (n₋₁, …, n₀, g·n, tiles…, c)."""
    for d, (m, n, t) in enumerate(zip(tiling.m, tiling.n, tiling.tiles, strict=True)):
        axis = x.ndim - 1 - tiling.spec.spatial_ndim + d
        if n > 1:
            _, _, matrix = transforms(m, n - m + 1)
            terms = [lax.slice_in_dim(x, i, i + (t - 1) * m + 1, m, axis) for i in range(n)]
            x = jnp.stack(combinations(matrix, terms))
    return x


def outputs(y: Array, tiling: Tiling) -> Array:
    """Aᵀ y: (n₋₁, …, n₀, g·n, tiles…, o) → (g·n, tiles·m…, o)."""
    for d in reversed(range(tiling.spec.spatial_ndim)):
        m, n, t = tiling.m[d], tiling.n[d], tiling.tiles[d]
        axis = y.ndim - 1 - tiling.spec.spatial_ndim + d
        if n > 1:
            matrix, _, _ = transforms(m, n - m + 1)
            terms = combinations(matrix, list(y))
            y = jnp.stack(terms, axis)
            y = y.reshape(*y.shape[: axis - 1], t * m, *y.shape[axis + 1 :])
    return y


def kernel_matrix(cut: Tiling) -> np.ndarray:
    """G of all axes at once: (n₋₁·…·n₀, taps)."""
    total = np.ones((1, 1))
    ndim = cut.spec.spatial_ndim
    for m, n in zip(cut.m, cut.n, strict=True):
        _, matrix, _ = transforms(m, n - m + 1)
        # total: (frequencies so far, taps so far)
        total = np.einsum("ft,nk->nftk", total, np.array(matrix, float))
        total = total.reshape(total.shape[0] * total.shape[1], -1)
    return total.astype(cut.spec.accumulator_dtype)


def kernel_of(rhs: Array, cut: Tiling) -> Array:
    """G w: (kernel…, c, g·o) → (n₋₁·…·n₀, g, c, o)."""
    g = cut.spec.groups
    w = jnp.moveaxis(layout.split_groups(rhs, -1, g), -2, -3)  # (kernel…, g, c, o)
    w = w.astype(cut.spec.accumulator_dtype)
    out = kernel_matrix(cut) @ w.reshape(cut.spec.taps, -1)
    return out.reshape(-1, *w.shape[-3:])


def block_of(x: Array, tiling: Tiling, i: Any) -> tuple[Any, Any, Array]:
    """First image and first output row of the i-th block, and its padded part of ``x``.

    The last block of rows moves up where the rows don't divide, and has some of them again.
    """
    spec, images, rows = tiling.spec, tiling.images, tiling.rows
    low, high = spec.padding[0]
    image = i // tiling.blocks[1] * images
    span = rows + spec.kernel_shape[0] - 1
    row = jnp.minimum(i % tiling.blocks[1] * rows, spec.out_spatial[0] - rows)
    size, taken = x.shape[1], min(span, x.shape[1])
    start = row - low
    first = jnp.clip(start, 0, size - taken)
    part = lax.dynamic_slice_in_dim(lax.dynamic_slice_in_dim(x, image, images), first, taken, 1)
    pads = ((max(0, low), max(0, high)), *spec.padding[1:])
    part, _ = layout.pad_and_dilate(part, spec.replace(lhs_shape=part.shape, padding=pads))
    part = lax.dynamic_slice_in_dim(part, start - first + max(0, low), span, 1)
    return image, row, part


def run(m: int, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
    cut = tiling(spec, m, BLOCK_BYTES)
    kernel = kernel_of(rhs, cut)

    def block(i: Any) -> tuple[Any, Any, Array]:
        image, row, x = block_of(lhs, cut, i)
        v = inputs(tiles_of(x, cut), cut)
        count, p, o, c = cut.gemm
        v = v.reshape(-1, spec.groups, p, c)
        y = lax.dot_general(
            v, kernel, (((3,), (2,)), ((0, 1), (0, 1))), precision=spec.precision
        )
        n = [n for n in reversed(cut.n) if n > 1]
        y = y.reshape(*n, spec.groups * cut.images, *cut.tiles, o)
        y = outputs(y, cut)
        y = y[(slice(None), *(slice(size) for size in cut.out_spatial))]
        return image, row, layout.batch_groups_to_features(y, spec.groups).astype(spec.out_dtype)

    if cut.steps == 1:
        return block(0)[2]

    def add(i: Array, out: Array) -> Array:
        image, row, y = block(i)
        starts = (image, row, *(0 for _ in y.shape[2:]))
        return lax.dynamic_update_slice(out, y, [jnp.asarray(s, jnp.int32) for s in starts])

    out, _ = compat.auto_insert_reshard(jnp.zeros(spec.out_shape, spec.out_dtype), lhs)
    return lax.fori_loop(np.int32(0), np.int32(cut.steps), add, out)


def tiles_of(x: Array, cut: Tiling) -> Array:
    x = layout.features_to_batch(x, cut.spec.groups).astype(cut.spec.accumulator_dtype)
    extra = [t * m - size for t, m, size in zip(cut.tiles, cut.m, cut.out_spatial, strict=True)]
    if any(extra):
        x = lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *((0, e, 0) for e in extra), (0, 0, 0)])
    return x


def gradient(m: int, image: Array, cotangent: Array, spec: ConvSpec) -> Array:
    cut = tiling(spec, m, BLOCK_BYTES)
    g = spec.groups

    def block(i: Any) -> Array:
        start, row, x = block_of(image, cut, i)
        y = lax.dynamic_slice_in_dim(cotangent, start, cut.images)
        y = lax.dynamic_slice_in_dim(y, row, cut.rows, 1)
        if spec.out_spatial[0] % cut.rows:  # rows that the block before has had
            again = row + jnp.arange(cut.rows, dtype=jnp.int32) < i % cut.blocks[1] * cut.rows
            y = jnp.where(again.reshape(-1, *(1,) * (y.ndim - 2)), 0, y)
        count, p, o, c = cut.gemm
        v = inputs(tiles_of(x, cut), cut).reshape(-1, g, p, c)
        z = cotangents(tiles_of(y, cut), cut).reshape(-1, g, p, o)
        return lax.dot_general(v, z, (((2,), (2,)), ((0, 1), (0, 1))), precision=spec.precision)

    if cut.steps == 1:
        return weight_gradient(block(0), cut)
    shape = (math.prod(cut.n), g, *cut.gemm[:1:-1])
    total, _ = compat.auto_insert_reshard(jnp.zeros(shape, spec.accumulator_dtype), image)
    total = lax.fori_loop(np.int32(0), np.int32(cut.steps), lambda i, t: t + block(i), total)
    return weight_gradient(total, cut)


def cotangents(y: Array, cut: Tiling) -> Array:
    for d, (m, n, t) in enumerate(zip(cut.m, cut.n, cut.tiles, strict=True)):
        axis = y.ndim - 1 - cut.spec.spatial_ndim + d
        if n > 1:
            matrix, _, _ = transforms(m, n - m + 1)
            terms = [lax.slice_in_dim(y, i, i + (t - 1) * m + 1, m, axis) for i in range(m)]
            y = jnp.stack(combinations(tuple(zip(*matrix, strict=True)), terms))
    return y


def weight_gradient(total: Array, cut: Tiling) -> Array:
    """Gᵀ total: (n₋₁·…·n₀, g, c, o) → (kernel…, c, g·o)."""
    w = kernel_matrix(cut).T @ total.reshape(len(total), -1)
    w = w.reshape(*cut.spec.kernel_shape, *total.shape[1:])
    return jnp.moveaxis(w, -3, -2).reshape(cut.spec.rhs_shape)


def supports(m: int, spec: ConvSpec) -> str | None:
    """Why F(m, r) can't do ``spec``."""
    if not all(jnp.issubdtype(d, np.floating) for d in (spec.dtype, spec.out_dtype)):
        return f"its transforms have fractions, which {spec.dtype.name} is not made for"
    if lax.Precision.HIGHEST in spec.precision:
        return "precision 'highest' leaves out what changes which products are formed"
    if spec.weight_gradient:
        spec = layout.forward_of(spec)
    ones = (1,) * spec.spatial_ndim
    if spec.window_strides != ones or spec.lhs_dilation != ones or spec.rhs_dilation != ones:
        return "tiles overlap only where strides and dilations are 1"
    taps = [k for k in spec.kernel_shape if k > 1]
    if not taps:
        return "a kernel of one tap has nothing to save"
    if max(taps) + m - 2 > len(POINTS):
        return f"{max(taps)} taps along an axis, at most {len(POINTS) + 2 - m} are accurate"
    return None


def cost(m: int, spec: ConvSpec) -> Cost:
    gradient = spec.weight_gradient
    if gradient:
        spec = layout.forward_of(spec)
    cut = tiling(spec, m, BLOCK_BYTES)
    count, p, o, c = cut.gemm
    size = spec.accumulator_dtype.itemsize
    kernel, block = count * c * o * size, count * p * (c + o) * size
    return Cost(
        flops=2 * count * p * o * c * cut.steps,
        traffic=spec.operand_bytes + 2 * kernel + 3 * block * cut.steps,
        workspace=kernel + 2 * block,
        gemm=(count * cut.steps, c, o, p) if gradient else (count * cut.steps, p, o, c),
        steps=cut.steps,
    )


def _record(name: str, m: int) -> Algorithm:
    return Algorithm(
        name,
        f"transforms tiles of {m} outputs an axis, F({m}, r): fewer products",
        partial(supports, m),
        partial(cost, m),
        partial(run, m),
        partial(gradient, m),
    )


WINOGRAD = _record("winograd", 2)
WINOGRAD4 = _record("winograd4", 4)
