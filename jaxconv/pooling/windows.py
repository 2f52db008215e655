"""Reductions over windows: tap by tap, axis by axis, or by doubling."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jax import Array, lax

from jaxconv.loops import UNROLL, combined, stored
from jaxconv.pooling.place import placed
from jaxconv.pooling.spec import Pooling, along, is_narrow
from jaxconv.spec import Axis

# An array that is stored costs as much as so many taps.
STORE = 1.5

OPERATIONS = {"max": lax.max, "min": lax.min, "sum": lax.add}


def padded(x: Array, axes: Sequence[Axis], value: np.ndarray) -> tuple[Array, tuple[Axis, ...]]:
    """``x`` with ``value`` around and between its elements; its axes."""
    edges = [(axis.low, axis.high, axis.spacing - 1) for axis in axes]
    if any(map(any, edges)):
        x = lax.pad(x, value, edges)
    done = {"low": 0, "high": 0, "spacing": 1}
    return x, tuple(a._replace(size=n, **done) for a, n in zip(axes, x.shape, strict=True))


def views(x: Array, axes: Sequence[Axis], value: np.ndarray) -> Iterator[Array]:
    """For each tap of the window, in row-major order, its element in every window; ``value`` where
    it is in the padding.

    Each view is padded itself: a padded copy of ``x`` costs more than all taps of a small window
    (3×3 step 2 of 8×112×112×64: 5.5 ms instead of 2.1).
    """
    for tap in itertools.product(*(range(axis.taps) for axis in axes)):
        starts, limits, edges = [], [], []
        for t, axis in zip(tap, axes, strict=True):
            offset = t * axis.dilation - axis.low  # of the first window's element
            first = min(axis.out, max(0, -(offset // axis.stride)))
            last = min(axis.out, (axis.size - 1 - offset) // axis.stride + 1)
            count = max(0, last - first)
            starts.append(first * axis.stride + offset if count else 0)
            limits.append(starts[-1] + (count - 1) * axis.stride + 1 if count else 0)
            edges.append((first, axis.out - first - count, 0))
        y = lax.slice(x, starts, limits, [axis.stride for axis in axes])
        yield lax.pad(y, value, edges) if any(map(any, edges)) else y


def reduced(x: Array, pooling: Pooling, algorithm: str) -> Array:
    """The forward pass of ``pooling``."""
    operation, axes, value = OPERATIONS[pooling.kind], pooling.axes, pooling.identity
    if is_narrow(x.dtype):
        # XLA:CPU rounds after each operation in bfloat16: maxima 2×2 of 8×112×112×64 took 8.9 ms,
        # so 0.9; sums of 31×31 are up to 47 % wrong.
        wide = pooling.replace(dtype=np.dtype(np.float32))
        return reduced(x.astype(np.float32), wide, algorithm).astype(x.dtype)
    if any(axis.spacing > 1 for axis in axes):
        phases = math.prod(axis.spacing for axis in axes)
        plain = all(axis.stride == axis.dilation == 1 for axis in axes)
        if pooling.kind == "sum" and plain and phases <= UNROLL:
            return _from_holes(x, axes)
        x, axes = padded(x, axes, value)
    if algorithm == "taps":
        return combined(list(views(x, axes, value)), operation)
    for d in reversed(pooling.pooled):
        own = along(axes, [d], x.shape)
        if _doubles(axes[d]) < axes[d].taps * axes[d].out:
            x = _doubled(*padded(x, own, value), d, pooling.kind)
        else:
            x = stored(combined(list(views(x, own, value)), operation))
    return x


def axis_work(axis: Axis) -> float:
    """What a reduction along one axis costs, in elements read."""
    return min(axis.taps * axis.out, _doubles(axis)) + STORE * axis.out


def _doubles(axis: Axis) -> float:
    """What it costs by doubling: an array for each power of two."""
    return (1 + STORE) * (axis.taps - 1).bit_length() * axis.padded


def _from_holes(x: Array, axes: Sequence[Axis]) -> Array:
    """Sums of an array with holes, as in the gradient of a mean, without adding the holes: each
    element is in ``taps`` of them, which are the windows of another pooling turned round."""
    done = {"low": 0, "high": 0, "spacing": 1}
    each = zip(axes, x.shape, strict=True)
    windows = [
        a._replace(size=(n - 1) * a.spacing + a.taps, stride=a.spacing, **done) for a, n in each
    ]
    x = placed(x, windows)
    first = [axis.taps - 1 - axis.low for axis in axes]
    each = zip(axes, first, x.shape, strict=True)
    edges = [(-start, start + axis.out - size, 0) for axis, start, size in each]
    return lax.pad(x, np.zeros((), x.dtype), edges)


def _doubled(x: Array, axes: Sequence[Axis], d: int, kind: str) -> Array:
    """A window along dimension ``d`` of a padded ``x``, from windows of 1, 2, 4, … taps."""
    axis, operation = axes[d], OPERATIONS[kind]

    def from_tap(tap: int) -> Array:
        start = tap * axis.dilation
        return lax.slice_in_dim(x, start, start + (axis.out - 1) * axis.stride + 1, axis.stride, d)

    terms, covered, taps = list[Array](), 0, 1
    while covered < axis.taps:
        # Maxima may count elements twice: the last window ends where the whole does.
        if kind != "sum" and 2 * taps >= axis.taps:
            terms, covered = [from_tap(0), from_tap(axis.taps - taps)], axis.taps
        elif axis.taps & taps:
            terms.append(from_tap(covered))
            covered += taps
        if covered < axis.taps:
            shift = taps * axis.dilation
            ends = (0, x.shape[d] - shift), (shift, x.shape[d])
            x = stored(operation(*(lax.slice_in_dim(x, *end, axis=d) for end in ends)))
            taps *= 2
    return stored(combined(terms, operation))
