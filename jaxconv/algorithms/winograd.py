"""Winograd's minimal filtering: fewer multiplications for small kernels, by transforming tiles.

F(m, r) makes m outputs of r taps from m + r - 1 products instead of m·r:

    y = Aᵀ [(G w) ⊙ (Bᵀ x)]

along each spatial axis, with x a tile of m + r - 1 inputs, y its m outputs. Channels are summed
between the transforms, so each of the products is a GEMM over all tiles: (tiles, c)·(c, o). Sums of
up to 2**dimensions elements may overflow close to the largest representable number. Lavin & Gray,
"Fast Algorithms for Convolutional Neural Networks" (2015).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import layout, loops
from jaxconv.algorithms import gemm
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.algorithms.cook_toom import POINTS, Matrix, combinations, transforms
from jaxconv.spec import ConvSpec

# Bytes of a block's transformed inputs and products, which fit in cache and need no fresh memory
# for each call. JAX 0.10.2 multiplies on one core where products are small (76 instead of 114
# GFLOP/s for 392×128×128 instead of 784×128×128), so blocks of few channels have more tiles:
# 8×28×28×128 takes 6.7 ms, with 8 MiB 9.8, 8×56×56×64 12.2 ms, with 4 MiB 20. In 3-D this gains
# nothing, and a kernel's gradient has longer sums (16×16×16×64→128: 2.3 times lax's error).
BLOCK_BYTES, BLOCK_BYTES_OF_FEW = 8 << 20, 13 << 20
BLOCK_CHANNELS = 200


class Tiling(NamedTuple):
    """How a convolution is cut into blocks of tiles: of whole images, or of rows of an image."""

    spec: ConvSpec
    m: tuple[int, ...]  # outputs of a tile along each spatial axis; 1 where the kernel has one tap
    images: int  # of a block
    rows: int  # of a block: its outputs along the first spatial axis

    @property
    def matrices(self) -> list[tuple[Matrix, Matrix, Matrix]]:
        """Aᵀ, G and Bᵀ of each spatial axis."""
        return list(map(transforms, self.m, self.spec.kernel_shape))

    @property
    def axes(self) -> list[int]:
        """Those transformed. Each frequency of the last one is an array of its own."""
        return [d for d, taps in enumerate(self.spec.kernel_shape) if taps > 1]

    @property
    def frequencies(self) -> list[int]:
        """Sizes of the leading axes of transformed arrays, the last spatial axis first."""
        return [self.m[d] + self.spec.kernel_shape[d] - 1 for d in reversed(self.axes)]

    @property
    def out_spatial(self) -> tuple[int, ...]:
        """Output sizes of an image in a block."""
        return self.rows, *self.spec.out_spatial[1:]

    @property
    def tiles(self) -> list[int]:
        """Tiles of an image in a block along each spatial axis."""
        return [-(-size // m) for size, m in zip(self.out_spatial, self.m, strict=True)]

    @property
    def blocks(self) -> loops.RowBlocks:
        batch, height = self.spec.lhs_shape[0], self.spec.out_spatial[0]
        return loops.RowBlocks(batch, height, self.images, self.rows)

    @property
    def gemm(self) -> tuple[int, int, int, int]:
        """(frequencies and groups, tiles, o, c) of a block."""
        groups, _, o, _ = self.spec.gemm
        tiles = self.images * math.prod(self.tiles)
        return groups * math.prod(self.frequencies), tiles, o, self.spec.rhs_shape[-2]

    @property
    def kernel_bytes(self) -> int:
        """Bytes of the transformed kernel."""
        count, _, o, c = self.gemm
        return count * c * o * self.spec.accumulator_dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's transformed inputs and products."""
        count, p, o, c = self.gemm
        return count * p * (c + o) * self.spec.accumulator_dtype.itemsize


def tiling(m: int, spec: ConvSpec) -> Tiling:
    """The blocks of ``spec``, as large as its transformed kernel, which each of them reads."""
    batch, height = spec.lhs_shape[0], spec.out_spatial[0]
    cut = Tiling(spec, tuple(m if k > 1 else 1 for k in spec.kernel_shape), 1, height)
    few = min(cut.gemm[2:]) < BLOCK_CHANNELS and spec.spatial_ndim < 3
    limit = max(BLOCK_BYTES_OF_FEW if few else BLOCK_BYTES, cut.kernel_bytes)
    fit = limit // cut.block_bytes
    if fit:
        images = max(i for i in range(1, min(fit, batch) + 1) if batch % i == 0)
        return cut._replace(images=images)
    blocks = min(cut.tiles[0], -(-cut.block_bytes // limit))
    rows = cut.m[0] * -(-cut.tiles[0] // blocks)
    return cut._replace(rows=min(height, rows))


def inputs_of(x: Array, cut: Tiling, image: Any, row: Any) -> Array:
    """The padded part of ``x``, in whole tiles, that a block from an image and a row on needs."""
    return whole_tiles(layout.rows_of(x, cut.spec, image, cut.images, row, cut.rows)[0], cut)


def whole_tiles(x: Array, cut: Tiling) -> Array:
    """(images, spatial…, g·c) → (g·images, spatial…, c), zero-padded to whole tiles."""
    x = layout.features_to_batch(x, cut.spec.groups).astype(cut.spec.accumulator_dtype)
    sizes = zip(cut.tiles, cut.m, cut.out_spatial, strict=True)
    return layout.padded(x, [(0, t * m - size, 0) for t, m, size in sizes])


def to_frequencies(x: Array, matrices: Sequence[Matrix], cut: Tiling) -> list[Array]:
    """Multiplies each tile by a matrix per axis: (g·n, spatial…, c) → (frequencies·g, tiles, c) for
    each frequency of the last axis."""
    shape = math.prod(cut.frequencies[1:]) * cut.spec.groups, -1, x.shape[-1]
    sums: list[Array] = []
    for d in cut.axes:
        x = jnp.stack(sums) if sums else x
        axis, m = x.ndim - 1 - len(cut.m) + d, cut.m[d]
        last = (cut.tiles[d] - 1) * m + 1
        terms = [lax.slice_in_dim(x, i, i + last, m, axis) for i in range(len(matrices[d][0]))]
        sums = combinations(matrices[d], terms)
    return [y.reshape(shape) for y in sums]


def from_frequencies(ys: Sequence[Array], cut: Tiling) -> Array:
    """Aᵀ y, of arrays shaped as by ``to_frequencies``, o in place of c: (g·n, out spatial…, o)."""
    *others, apart = cut.axes

    def summed(terms: Sequence[Array], d: int) -> Array:
        axis = terms[0].ndim - 1 - len(cut.m) + d  # of the tiles
        y = jnp.stack(combinations(cut.matrices[d][0], terms), axis + 1)
        return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])

    parts = []
    for y in ys:
        images = cut.spec.groups * cut.images
        y = y.reshape(*cut.frequencies[1:], images, *cut.tiles, y.shape[-1])
        for d in reversed(others):
            y = summed(list(y), d)
        parts.append(y)
    return summed(parts, apart)[(slice(None), *(slice(size) for size in cut.out_spatial))]


def kernel_transform(cut: Tiling) -> np.ndarray:
    """G of all axes at once, (frequencies of the last axis, others, taps): one product with it is
    as fast as sums along each axis and compiles faster."""
    total = np.ones((1, 1))
    for _, matrix, _ in cut.matrices:
        total = np.einsum("ft,nr->nftr", total, np.array(matrix, float))
        total = total.reshape(total.shape[0] * total.shape[1], -1)
    total = total.reshape(cut.frequencies[0], -1, cut.spec.taps)
    return total.astype(cut.spec.accumulator_dtype)


def transformed_kernel(rhs: Array, cut: Tiling) -> list[Array]:
    """G w: (kernel…, c, g·o) → (frequencies·g, c, o) for each frequency of the last axis."""
    spec = cut.spec
    if spec.groups > 1:
        w = jnp.moveaxis(layout.split_groups(rhs, -1, spec.groups), -2, -3)
        pairs = w.shape[-2:]  # w: (kernel…, g, c, o)
    else:
        w = layout.in_memory(rhs, spec)
        pairs = w.shape[:2] if taps_behind(spec) else w.shape[-2:]
    w = w.astype(spec.accumulator_dtype)
    w = w.reshape(-1, spec.taps).T if taps_behind(spec) else w.reshape(spec.taps, -1)
    outs = [jnp.matmul(g, w, precision="highest") for g in kernel_transform(cut)]
    outs = [out.reshape(-1, *pairs) for out in outs]
    return [out.swapaxes(1, 2) for out in outs] if outputs_first(spec) else outs


def taps_behind(spec: ConvSpec) -> bool:
    """Whether the kernel's taps come last in memory."""
    return spec.kernel_order[-1] == "x"


def outputs_first(spec: ConvSpec) -> bool:
    """Whether the kernel's output channels come before its input channels in memory."""
    return spec.kernel_order.index("O") < spec.kernel_order.index("I")


# Channels per group from which the transforms cost less than the products they save.
MANY_CHANNELS = 16


class Winograd(Algorithm):
    caveat = "where a kernel's mask or an image has exact zeros, results may be 1e-7 of the others"

    def __init__(self, name: str, m: int) -> None:
        self.name, self.m = name, m
        self.summary = f"fewer products for tiles of {m} outputs an axis, by transforms: F({m}, r)"

    def unsupported(self, spec: ConvSpec) -> str | None:
        for dtype in (spec.dtype, spec.out_dtype):
            if not jnp.issubdtype(dtype, np.floating):
                return f"its transforms need real floating-point numbers, not {dtype.name}"
        if lax.Precision.HIGHEST in spec.precision:
            return "precision 'highest' rules out changing which products are formed"
        spec = spec.forward
        if any(x > 1 for x in (*spec.window_strides, *spec.lhs_dilation, *spec.rhs_dilation)):
            return "tiles share products only where strides and dilations are 1"
        taps = max(spec.kernel_shape, default=1)
        if taps == 1:
            return "a kernel of one tap has no products to save"
        most = len(POINTS) + 2 - self.m
        reason = f"{taps} taps along an axis, it rounds too much above {most}"
        return reason if taps > most else None

    def excluded(self, spec: ConvSpec) -> str | None:
        if self.m > 2:  # in float32 3 to 5 times lax's error, where F(2, 3) has 0.7 to 1.8 times it
            return "it rounds more than 'auto' promises"
        # More points than three taps need round more: 5×5 on 64 channels has 3.7 times lax's error,
        # 7×7 14 times, 5 taps along one axis 2.0 times, 3×3×3 2.4 times. With two taps it saves
        # less and rounds as much: the phases of 4×4 stride 2, 256→128, had 2.06 times.
        kernel = spec.forward.kernel_shape
        if max(kernel, default=1) != 3 or kernel.count(3) > 2:
            return "it rounds too much with other than 3 taps along one or two axes"
        # lax computes a grouped kernel's gradient by a loop that rounds less than a product: 32
        # groups of 16 channels, 14×14, had 2.2 times its error.
        if spec.weight_gradient and spec.groups > 1:
            return "it rounds too much for a kernel's gradient in groups"
        return None

    def doubted(self, spec: ConvSpec) -> str | None:
        few = min(spec.forward.rhs_shape[-2], spec.forward.gemm[2]) < MANY_CHANNELS
        reason = f"with fewer than {MANY_CHANNELS} channels transforms cost more than they save"
        return reason if few else None

    def spread(self, spec: ConvSpec) -> tuple[int, ...] | None:
        # F(2, 3) reaches the outputs that the definition reaches, though infinity becomes NaN there
        # and at borders all taps of a kernel's gradient are reached. To compute those again would
        # cost a step of ResNet-50 25 % more time to compile and 9 % more memory.
        if self.m == 2 and max(spec.forward.kernel_shape) <= 3:
            return None
        m = 1 if spec.weight_gradient else self.m
        return tuple(m if k > 1 else 1 for k in spec.kernel_shape)

    def cost(self, spec: ConvSpec) -> Cost:
        cut = tiling(self.m, spec.forward)
        (count, p, o, c), steps = cut.gemm, cut.blocks.steps
        kernel, block, shape = cut.kernel_bytes, cut.block_bytes, (count * steps, p, o, c)
        # A loop holds its sums and the term to be added; JAX 0.10.2 copies the kernel into it.
        looped = kernel if steps > 1 else 0
        workspace = kernel + (block + looped if spec.weight_gradient else max(block, looped))
        traffic = spec.operand_bytes + 2 * kernel + 3 * block * steps
        if spec.weight_gradient:
            shape = count * steps, c, o, p
        return Cost(2 * math.prod(shape), traffic, workspace, shape, steps)

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        cut = tiling(self.m, spec)
        matrices = [b for _, _, b in cut.matrices]
        kernel = transformed_kernel(rhs, cut)

        def block(image: Any, row: Any) -> Array:
            xs = to_frequencies(inputs_of(lhs, cut, image, row), matrices, cut)
            # XLA:CPU of JAX 0.10.2 computes the matrices of one batched product in turn, small ones
            # on one core; separate products run in parallel. 51 convolutions gain 6 % on average,
            # 8×28×28×128 20 to 60 %. A product for each of the 16 frequencies gains as much, but
            # takes 0.8 s to compile instead of 0.3. JAX 0.12 is as fast, in a quarter less memory.
            numbers = (((2,), (1,)), ((0,), (0,)))
            ys = [gemm.contract(x, k, numbers, spec) for x, k in zip(xs, kernel, strict=True)]
            y = from_frequencies(ys, cut)
            return layout.batch_groups_to_features(y, spec.groups).astype(spec.out_dtype)

        return cut.blocks.filled(spec.out_shape, spec.out_dtype, lhs, block)

    def gradient(self, image: Array, cotangent: Array, spec: ConvSpec) -> Array:
        """The adjoint of ``run`` with respect to the kernel: Gᵀ [Σ over tiles (Bᵀ x) ⊙ (A y)]."""
        cut = tiling(self.m, spec)
        inputs = [b for _, _, b in cut.matrices]
        outputs = [tuple(zip(*a, strict=True)) for a, _, _ in cut.matrices]

        def block(i: Any) -> Array:
            x = inputs_of(image, cut, *cut.blocks.start(i))
            y = whole_tiles(cut.blocks.unrepeated(cotangent, i), cut)
            x = jnp.concatenate(to_frequencies(x, inputs, cut))
            y = jnp.concatenate(to_frequencies(y, outputs, cut))
            pair = (y, x) if outputs_first(spec) else (x, y)
            return gemm.contract(*pair, (((1,), (1,)), ((0,), (0,))), spec)

        count, _, o, c = cut.gemm
        shape = (count, o, c) if outputs_first(spec) else (count, c, o)
        steps, dtype = cut.blocks.steps, spec.accumulator_dtype
        total = loops.sum_of_blocks(steps, shape, dtype, image, block)
        g = kernel_transform(cut).reshape(-1, spec.taps)
        total = total.reshape(len(g), -1)
        factors = (total.T, g) if taps_behind(spec) else (g.T, total)
        w = jnp.matmul(*factors, precision="highest")
        if spec.groups == 1:
            return layout.from_memory(w, spec)
        w = w.reshape(spec.taps, spec.groups, c, o)
        return jnp.moveaxis(w, 1, 2).reshape(spec.rhs_shape)

    def moving(self, spec: ConvSpec) -> float:
        return 0.0


WINOGRAD = Winograd("winograd", 2)
WINOGRAD4 = Winograd("winograd4", 4)
