"""A spatial axis that is cut over devices: which part of the image each of them needs.

Devices hold equal parts of the axis, one after another; where the size doesn't divide, the last
parts are padded with garbage. Each device needs its own part and a border from its neighbours (a
halo), or less than its own part. With these, its part of the convolution is an ordinary one.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv.arguments.errors import Call, fail
from jaxconv.arguments.parse import parameters
from jaxconv.spec import ConvSpec, dilate


@dataclasses.dataclass(frozen=True)
class MeshLine:
    """The devices along axes of a mesh, inside ``shard_map``: each line holds a whole axis."""

    names: tuple[str, ...]

    def index(self) -> Array:
        """The place of the device that runs this, in its line."""
        return lax.axis_index(self.names)

    def permuted(self, x: Array, pairs: Sequence[tuple[int, int]]) -> Array:
        """What each device receives that is the second of a pair of places, from the first; zeros
        for the others."""
        return lax.ppermute(x, self.names, pairs)


@dataclasses.dataclass(frozen=True)
class AxisCut:
    """How one spatial axis of a convolution is cut over devices."""

    devices: int
    size: int  # elements of the image
    held: int  # elements that each device holds
    left: int  # elements that it receives from its neighbours
    right: int
    before: int  # zeros around what it then has
    after: int
    starts: tuple[int, ...]  # for each device, where its window begins in what it then has
    length: int  # elements of a window
    padding: tuple[int, int]  # of the window's convolution
    outputs: int  # of a device
    surplus: tuple[int, ...]  # for each device, the outputs of its window before its own ones


def cut_axis(spec: ConvSpec, d: int, devices: int, sums: bool = False) -> AxisCut | None:
    """The cut of the ``d``-th spatial axis by which each device computes its part of the outputs,
    or, if ``sums``, all outputs with its part of the taps. None where no window of the same size
    does it, because windows would begin at different places between a dilated image's elements.
    """
    size, taps, out = spec.lhs_spatial[d], spec.kernel_shape[d], spec.out_spatial[d]
    stride, low = spec.window_strides[d], spec.padding[d][0]
    spacing, dilation = spec.lhs_dilation[d], spec.rhs_dilation[d]
    total = taps if sums else out
    own = -(-total // devices)
    begins = [k * own for k in range(devices)]
    places = [begin * (dilation if sums else stride) - low for begin in begins]  # in the image
    firsts = [-(-place // spacing) for place in places]  # elements
    gaps = [first * spacing - place for first, place in zip(firsts, places, strict=True)]
    # A window begins with as many zeros as any needs, and has more outputs by that.
    surplus = [max(gaps) - gap for gap in gaps]
    more = max(surplus)
    if more and (sums or stride > 1):
        return None
    outputs = out if sums else own
    extent = (outputs + more - 1) * stride + dilate(own if sums else taps, dilation)
    length = (extent - 1 - max(gaps)) // spacing + 1
    if length < 1:
        return None
    held = -(-size // devices)
    left = right = 0
    for k, (begin, place, first) in enumerate(zip(begins, places, firsts, strict=True)):
        count = min(own, total - begin)
        outs, along = (out, count) if sums else (count, taps)
        span = (outs - 1) * stride + dilate(along, dilation)
        start, stop = max(first, 0), min((place + span - 1) // spacing + 1, size)
        if begin < total and start < stop:
            left, right = max(left, k * held - start), max(right, stop - (k + 1) * held)
    rows = left + held + right
    offsets = [first - (k * held - left) for k, first in enumerate(firsts)]
    met = [offset for offset, begin in zip(offsets, begins, strict=True) if begin < total]
    before = max(0, *(-offset for offset in met))
    after = max(0, length - rows - before, *(offset + length - rows for offset in met))
    if len(set(met)) == 1:  # all windows begin at the same place: those without outputs, too
        offsets = [met[0]] * devices
    last = before + rows + after - length
    return AxisCut(
        devices=devices,
        size=size,
        held=held,
        left=left,
        right=right,
        before=before,
        after=after,
        starts=tuple(min(max(offset + before, 0), last) for offset in offsets),
        length=length,
        padding=(max(gaps), extent - max(gaps) - dilate(length, spacing)),
        outputs=outputs,
        surplus=tuple(surplus),
    )


def window(x: Array, axis: int, cut: AxisCut, line: MeshLine) -> Array:
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


def own_outputs(out: Array, axis: int, cut: AxisCut, line: MeshLine) -> Array:
    """The outputs of a window without its surplus."""
    return _slice(out, axis, cut.surplus, cut.outputs, line)


def only_valid(x: Array, axis: int, size: int, devices: int, line: MeshLine) -> Array:
    """``x`` with zeros for what lies after the end of an axis of ``size`` elements."""
    held = x.shape[axis]
    if devices * held == size:
        return x
    index = lax.broadcasted_iota(np.int32, x.shape, axis) + held * line.index()
    return jnp.where(index < size, x, np.zeros((), x.dtype))


def _slice(x: Array, axis: int, starts: Sequence[int], length: int, line: MeshLine) -> Array:
    """``length`` elements from where each device's begin."""
    if len(set(starts)) == 1:
        return lax.slice_in_dim(x, starts[0], starts[0] + length, axis=axis)
    start = jnp.asarray(starts, np.int32)[line.index()]
    return lax.dynamic_slice_in_dim(x, start, length, axis)


def with_borders(
    call: Call, x: Array, w: Array, names: Any, arguments: Mapping[str, Any]
) -> tuple[Array, dict[str, Any]]:
    """A device's part of the image with its neighbours' borders, and the parameters for that."""
    ndim = w.ndim - 2
    named = isinstance(names, Sequence) and all(isinstance(n, str | tuple | None) for n in names)
    if not named or isinstance(names, str) or len(names) != ndim:
        must = f"must be {ndim} mesh axes or None, one for each spatial dimension"
        remedy = "pass one for each, such as ('rows', None)"
        fail("conv", f"spatial_axes {must}", repr(names), remedy)
    lines = [MeshLine((n,) if isinstance(n, str) else n or ()) for n in names]
    try:
        counts = [math.prod(map(lax.axis_size, line.names)) for line in lines]
    except NameError:
        constraint = "spatial_axes must name axes of the mesh of a jax.shard_map around it"
        remedy = "call it inside one, or omit spatial_axes: under jit it is not needed"
        fail("conv", constraint, repr(names), remedy)
    sizes = [size * count for size, count in zip(x.shape[1:-1], counts, strict=True)]
    whole = jax.ShapeDtypeStruct((x.shape[0], *sizes, x.shape[-1]), x.dtype)
    params = parameters(call, whole, w, **arguments)
    spec = ConvSpec.from_params(whole, w, params)
    padding = list(spec.padding)
    for d, (line, count) in enumerate(zip(lines, counts, strict=True)):
        if count == 1:
            continue
        if spec.out_spatial[d] % count:
            fail(
                "conv",
                f"the devices along spatial_axes[{d}] must divide the output's size",
                f"{count} devices and an output of {spec.out_spatial} for an image of {sizes}",
                "pad the image or take another mesh",
            )
        cut = cut_axis(spec, d, count)
        assert cut is not None  # the image is not dilated
        x = window(x, 1 + d, cut, line)
        padding[d] = cut.padding
    return x, {**params, "padding": tuple(padding)}
