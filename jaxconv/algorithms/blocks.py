"""How a convolution is cut into the overlapping blocks that minimise the work of FFTs."""

import dataclasses
import itertools
import math
from functools import lru_cache

from jaxconv.spec import ConvSpec, dilate

# Bytes of the blocks transformed at a time, including their spectra. If memory was returned to the
# system, as after another convolution, a step spends as long on page faults as on transforms:
# 65×65 on 1×1024×1024×1 takes 6.5 ms in steps of half the image, 9.7 ms in one.
STEP_BYTES = 12 << 20
# 1-D transforms that run side by side: alone, each takes four times as long.
LANES = 4
# FLOPs per element of a block besides its FFT (padding, cropping, multiplying).
ELEMENT = 30
# Shorter transforms round less: they are preferred up to this much more work.
SHORTER = 1.12


@dataclasses.dataclass(frozen=True)
class BlockedAxis:
    """How one axis of a convolution of stride 1 is cut into blocks."""

    start: int  # first element of the image that any window covers
    size: int  # number of elements from there on that windows cover
    low: int  # zeros before them
    positions: int  # outputs
    taps: int  # length of the kernel with its holes
    length: int  # of the transforms
    step: int  # outputs of a block
    count: int  # blocks; 1 where the axis is transformed whole


@lru_cache(maxsize=4096)
def good_length(n: int) -> int:
    """The least length ≥ ``n`` without a prime factor above 11, for which FFTs are fast."""
    primes = 2 * 3 * 5 * 7 * 11
    return next(m for m in itertools.count(n) if pow(primes, m.bit_length(), m) == 0)


def round_length(n: int) -> int:
    """The least length ≥ ``n`` that is 1, 3 or 5 times a power of two. Others round more: 4,096
    taps had 2.2 times lax's error in blocks of 24,300, in 16,384 or 20,480 1.9 times."""
    return min(odd * 2 ** max(0, math.ceil(math.log2(n / odd))) for odd in (1, 3, 5))


def axis_candidates(spec: ConvSpec, d: int) -> list[BlockedAxis]:
    """Ways to cut axis ``d``: whole, and into blocks of a few lengths."""
    axis = spec.axes[d]
    taps, positions = axis.window, (axis.out - 1) * axis.stride + 1
    start, low = max(0, -axis.low), max(0, axis.low)
    size = max(0, min(dilate(axis.size, axis.spacing) - start, positions + taps - 1 - low))
    # Outputs wrap around into the zeros before or after the image: one border suffices.
    high = positions + taps - 1 - low - size
    length = good_length(max(positions, taps, size + max(low, high)))
    whole = BlockedAxis(start, size, low, positions, taps, length, positions, 1)
    blocks = {}
    for factor in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64):
        step = max(taps - 1, factor * (taps - 1) - taps + 1, 16)
        step = round_length(step + taps - 1) - taps + 1
        count = -(-positions // step)
        step = -(-positions // count)
        length = round_length(step + taps - 1)
        if count > 1 and length < whole.length and step >= length - step:
            blocks[length] = BlockedAxis(start, size, low, positions, taps, length, step, count)
    return [whole, *blocks.values()]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a convolution is cut into blocks, and how many are transformed at a time."""

    axes: tuple[BlockedAxis, ...]  # one for each spatial dimension
    images: int  # of a step
    rows: int  # blocks of the first axis in a step, each with all blocks of the other axes

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    @property
    def tiles(self) -> int:
        """Blocks of a step."""
        return self.images * self.rows * math.prod(axis.count for axis in self.axes[1:])


def transform_flops(lengths: tuple[int, ...]) -> float:
    n = math.prod(lengths)
    return 2.5 * n * math.log2(max(2, n))


@lru_cache(maxsize=4096)
def blocks_of(spec: ConvSpec) -> Blocks:
    """The blocks with the least work: transforms of blocks and kernel, products of spectra."""
    n, g, (c, o) = spec.lhs_shape[0], spec.groups, spec.rhs_shape[-2:]  # o: of all groups

    def work(axes: tuple[BlockedAxis, ...]) -> float:
        lengths = tuple(axis.length for axis in axes)
        tiles = n * math.prod(axis.count for axis in axes)
        each = transform_flops(lengths) + ELEMENT * math.prod(lengths)
        count = tiles * (g * c + o) + c * o
        if len(axes) == 1:
            count = max(count, LANES)
        return count * each + 4 * tiles * c * o * math.prod(lengths)

    candidates = [axis_candidates(spec, d) for d in range(spec.spatial_ndim)]
    works = {axes: work(axes) for axes in itertools.product(*candidates)}
    enough = SHORTER * min(works.values())
    near = (axes for axes in works if works[axes] <= enough)
    axes = min(near, key=lambda axes: (math.prod(axis.length for axis in axes), works[axes]))
    tile = math.prod(axis.length for axis in axes) * (g * c + o)
    tile *= spec.accumulator_dtype.itemsize * math.prod(axis.count for axis in axes[1:])
    most = max(1, STEP_BYTES // tile)
    rows = min(axes[0].count, most)
    rows = -(-axes[0].count // -(-axes[0].count // rows))
    most = max(1, most // axes[0].count)
    images = max(i for i in range(1, min(n, most) + 1) if n % i == 0)
    return Blocks(axes, images, rows)
