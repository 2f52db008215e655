"""A spatial axis that is cut over devices: which part of the image each of them needs.

Devices hold equal parts of the axis, one after another; where the size doesn't divide, the last
ones hold less, and behind it anything. Each needs its own part and a border from its neighbours, or
less than its own part. Once it has them, its part of the convolution is an ordinary one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv.spec import ConvSpec, dilate


class Line(Protocol):
    """Devices one after another, which hold the parts of an axis. There may be several such lines,
    each with the whole axis."""

    def index(self) -> Array:
        """The place of the device that runs this, in its line."""
        ...

    def permuted(self, x: Array, pairs: Sequence[tuple[int, int]]) -> Array:
        """What each device receives that is the second of a pair of places, from the first; zeros
        for the others."""
        ...


@dataclasses.dataclass(frozen=True)
class MeshLine:
    """The devices along axes of a mesh, inside ``shard_map``."""

    names: tuple[str, ...]

    def index(self) -> Array:
        return lax.axis_index(self.names)

    def permuted(self, x: Array, pairs: Sequence[tuple[int, int]]) -> Array:
        return lax.ppermute(x, self.names, pairs)


@dataclasses.dataclass(frozen=True)
class AxisCut:
    """How one spatial axis of a convolution is cut over devices.

    Attributes:
      devices: their number.
      size: elements of the image.
      held: elements that each device holds.
      left, right: elements that it receives from its neighbours.
      before, after: zeros around what it then has.
      starts: for each device, where its window begins in what it then has.
      length: elements of a window.
      padding: of the window's convolution.
      outputs: of a device.
      surplus: for each device, the outputs of its window before its own ones.
    """

    devices: int
    size: int
    held: int
    left: int
    right: int
    before: int
    after: int
    starts: tuple[int, ...]
    length: int
    padding: tuple[int, int]
    outputs: int
    surplus: tuple[int, ...]


def cut_axis(
    devices: int,
    size: int,
    taps: int,
    out: int,
    stride: int,
    low: int,
    holes: int,
    dilation: int,
    sums: bool = False,
) -> AxisCut | None:
    """The cut by which each device computes its part of the outputs, with all taps.

    Args:
      size, taps, out: elements of the image, of the kernel, of the output.
      low: the padding before the image.
      holes, dilation: the dilations of the image and of the kernel.
      sums: each device computes all outputs, with its part of the taps.

    Returns:
      None where no window of the same size does it, because they would begin at different holes of
      the image.
    """
    own = -(-(taps if sums else out) // devices)
    begins = [k * own for k in range(devices)]
    used = [begin < (taps if sums else out) for begin in begins]
    places = [begin * (dilation if sums else stride) - low for begin in begins]  # in the image
    firsts = [-(-place // holes) for place in places]  # elements
    gaps = [first * holes - place for first, place in zip(firsts, places, strict=True)]
    # A window begins with as many zeros as any needs, and has more outputs by that.
    surplus = [max(gaps) - gap for gap in gaps]
    more = max(surplus)
    if more and (sums or stride > 1):
        return None
    outputs = out if sums else own
    extent = (outputs + more - 1) * stride + dilate(own if sums else taps, dilation)
    length = (extent - 1 - max(gaps)) // holes + 1
    if length < 1:
        return None
    held = -(-size // devices)
    needs = []
    for k, (begin, place, first) in enumerate(zip(begins, places, firsts, strict=True)):
        count = min(own, (taps if sums else out) - begin)
        outs, along = (out, count) if sums else (count, taps)
        span = (outs - 1) * stride + dilate(along, dilation)
        start, stop = max(first, 0), min((place + span - 1) // holes + 1, size)
        if used[k] and start < stop:
            needs.append((k, start, stop))
    left = max([0, *(k * held - start for k, start, _ in needs)])
    right = max([0, *(stop - (k + 1) * held for k, _, stop in needs)])
    rows = left + held + right
    offsets = [first - (k * held - left) for k, first in enumerate(firsts)]
    met = [offset for offset, use in zip(offsets, used, strict=True) if use]
    before = max(0, *(-offset for offset in met))
    after = max(0, length - rows - before, *(offset + length - rows for offset in met))
    # Where all windows begin at the same place, so do those of devices without outputs.
    place = met[0] if len(set(met)) == 1 else None
    last = before + rows + after - length
    return AxisCut(
        devices=devices,
        size=size,
        held=held,
        left=left,
        right=right,
        before=before,
        after=after,
        starts=tuple(
            min(max((offset if place is None else place) + before, 0), last) for offset in offsets
        ),
        length=length,
        padding=(max(gaps), extent - max(gaps) - dilate(length, holes)),
        outputs=outputs,
        surplus=tuple(surplus),
    )


def cut_axis_of(spec: ConvSpec, d: int, devices: int, sums: bool = False) -> AxisCut | None:
    """``cut_axis`` of the ``d``-th spatial axis."""
    return cut_axis(
        devices,
        spec.lhs_spatial[d],
        spec.kernel_shape[d],
        spec.out_spatial[d],
        spec.window_strides[d],
        spec.padding[d][0],
        spec.lhs_dilation[d],
        spec.rhs_dilation[d],
        sums,
    )


def window(x: Array, axis: int, cut: AxisCut, line: Line) -> Array:
    """A device's window: its part ``x`` of the image, cut along ``axis``, with the borders that its
    neighbours in ``line`` hold."""
    x = only_valid(x, axis, cut.size, cut.devices, line)
    parts, n, held = [x], cut.devices, cut.held
    for hop in range(1, -(-cut.left // held) + 1):
        first = held - min(held, cut.left - (hop - 1) * held)
        piece = lax.slice_in_dim(x, first, held, axis=axis)
        parts.insert(0, line.permuted(piece, [(k, k + hop) for k in range(n - hop)]))
    for hop in range(1, -(-cut.right // held) + 1):
        last = min(held, cut.right - (hop - 1) * held)
        piece = lax.slice_in_dim(x, 0, last, axis=axis)
        parts.append(line.permuted(piece, [(k, k - hop) for k in range(hop, n)]))
    x = lax.concatenate(parts, axis) if len(parts) > 1 else x
    if cut.before or cut.after:
        edges = [(cut.before, cut.after, 0) if d == axis else (0, 0, 0) for d in range(x.ndim)]
        x = lax.pad(x, np.zeros((), x.dtype), edges)
    return _slice(x, axis, cut.starts, cut.length, line)


def own_outputs(out: Array, axis: int, cut: AxisCut, line: Line) -> Array:
    """The outputs of a window without its surplus."""
    return _slice(out, axis, cut.surplus, cut.outputs, line)


def only_valid(x: Array, axis: int, size: int, devices: int, line: Line) -> Array:
    """``x`` with zeros for what lies behind the end of an axis of ``size`` elements."""
    held = x.shape[axis]
    if devices * held == size:
        return x
    index = lax.broadcasted_iota(np.int32, x.shape, axis) + held * line.index()
    return jnp.where(index < size, x, np.zeros((), x.dtype))


def _slice(x: Array, axis: int, starts: Sequence[int], length: int, line: Line) -> Array:
    """``length`` elements from where each device's begin."""
    if len(set(starts)) == 1:
        return lax.slice_in_dim(x, starts[0], starts[0] + length, axis=axis)
    start = jnp.asarray(starts, np.int32)[line.index()]
    return lax.dynamic_slice_in_dim(x, start, length, axis)
