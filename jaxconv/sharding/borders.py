"""A spatial axis that is cut over devices: which part of the image each of them needs.

Devices hold equal parts of the axis, one after another; the last may be padded with garbage. Each
needs a border from its neighbours (a halo), or less than its own part. With these, its part of the
convolution is an ordinary one.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import layout
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
        """What each second device of a pair receives from the first; zeros for the others."""
        return lax.ppermute(x, self.names, pairs)


class AxisCut(NamedTuple):
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
    does it: they would begin at different places between a dilated image's elements."""
    axis, size, stride = spec.axes[d], spec.lhs_spatial[d], spec.window_strides[d]
    total = axis.taps if sums else axis.out
    own = -(-total // devices)
    begins = np.arange(devices) * own
    places = begins * (axis.dilation if sums else stride) - axis.low  # in the image
    firsts = -(-places // axis.spacing)  # elements
    gaps = firsts * axis.spacing - places
    # A window begins with as many zeros as any needs, and has more outputs by that.
    zeros = int(gaps.max())
    more = zeros - int(gaps.min())
    outputs = axis.out if sums else own
    extent = (outputs + more - 1) * stride + dilate(own if sums else axis.taps, axis.dilation)
    length = (extent - 1 - zeros) // axis.spacing + 1
    if length < 1 or (more and (sums or stride > 1)):
        return None
    held = -(-size // devices)
    before_own, used = np.arange(devices) * held, begins < total
    counts = np.minimum(own, total - begins)
    outs, along = (axis.out, counts) if sums else (counts, axis.taps)
    last = places + (outs - 1) * stride + (along - 1) * axis.dilation
    starts, stops = np.maximum(firsts, 0), np.minimum(last // axis.spacing + 1, size)
    need = used & (starts < stops)
    left = int(np.max((before_own - starts)[need], initial=0))
    right = int(np.max((stops - before_own - held)[need], initial=0))
    rows, offsets = left + held + right, firsts - before_own + left
    met = offsets[used]
    before = max(0, -int(met.min()))
    after = max(0, length - rows - before, int(met.max()) + length - rows)
    if met.min() == met.max():  # all windows begin at one place: those without outputs, too
        offsets[:] = met[0]
    starts = tuple(np.clip(offsets + before, 0, before + rows + after - length).tolist())
    padding = zeros, extent - zeros - dilate(length, axis.spacing)
    surplus = tuple((zeros - gaps).tolist())
    return AxisCut(
        devices, size, held, left, right, before, after, starts, length, padding, outputs, surplus
    )


def window(x: Array, axis: int, cut: AxisCut, line: MeshLine) -> Array:
    """A device's window: ``x``, its part of an axis, with its neighbours' borders in ``line``."""
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
        x = layout.padded(x, [(cut.before, cut.after, 0)], axis)
    return sliced(x, axis, cut.starts, cut.length, line)


def only_valid(x: Array, axis: int, size: int, devices: int, line: MeshLine) -> Array:
    """``x`` with zeros for what lies after the end of an axis of ``size`` elements."""
    held = x.shape[axis]
    if devices * held == size:
        return x
    index = lax.broadcasted_iota(np.int32, x.shape, axis) + held * line.index()
    return jnp.where(index < size, x, np.zeros((), x.dtype))


def sliced(x: Array, axis: int, starts: Sequence[int], length: int, line: MeshLine) -> Array:
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
            constraint = f"the devices along spatial_axes[{d}] must divide the output's size"
            given = f"{count} devices and an output of {spec.out_spatial} for an image of {sizes}"
            fail("conv", constraint, given, "pad the image or take another mesh")
        cut = cut_axis(spec, d, count)
        assert cut is not None  # the image is not dilated
        x = window(x, 1 + d, cut, line)
        padding[d] = cut.padding
    return x, {**params, "padding": tuple(padding)}
