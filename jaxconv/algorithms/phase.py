"""Splits a dilated image's outputs by phase, so that no inserted zeros are multiplied (sub-pixel).

In a convolution with ``lhs_dilation``, only every ``lhs_dilation``-th tap of an output position
falls on an element, the others on inserted zeros. Which ones depends only on the position's phase,
so each phase is a smaller convolution of the image without holes. A kernel's gradient needs no
phases: it is that of a strided convolution, see ``exchanged``.
Shi et al., "Is the deconvolution layer the same as a convolutional layer?" (2016).
"""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jaxconv import layout
from jaxconv.algorithms.base import Algorithm, Convolve, Cost, prepared
from jaxconv.spec import ConvSpec, dilate

# Phases that differ are each compiled as a convolution of its own.
MAX_PHASES = 64


def periods(spec: ConvSpec) -> tuple[int, ...]:
    """The period of each axis: output positions after which the same taps are used again."""
    return tuple(axis.spacing // math.gcd(axis.spacing, axis.stride) for axis in spec.axes)


def split_axis(spec: ConvSpec, axis: int, phase: int) -> tuple[slice, int, int, tuple[int, int]]:
    """One phase of one axis: its taps, and the stride, dilation and pads of its convolution.
    Output position j = q·period + phase uses element (j·stride + t·r - lo) / d through tap t, if
    that is an integer, as for every (d / gcd(r, d))-th tap. The element then advances by
    stride / gcd(d, stride) with q and by r / gcd(r, d) from one such tap to the next."""
    size, k, stride, lo, _, d, r = spec.axes[axis]
    step = d // math.gcd(r, d)
    offset = phase * stride - lo
    first = next((t for t in range(min(k, step)) if (offset + t * r) % d == 0), k)
    taps = slice(first, k, step)
    sub_stride, sub_dilation = stride // math.gcd(d, stride), r // math.gcd(r, d)
    count = -(-spec.out_spatial[axis] // periods(spec)[axis])
    sub_lo = -((offset + first * r) // d)
    span = (count - 1) * sub_stride + (len(range(first, k, step)) - 1) * sub_dilation + 1
    return taps, sub_stride, sub_dilation, (sub_lo, span - size - sub_lo)


def part_of(spec: ConvSpec, phases: Sequence[int]) -> tuple[tuple[slice, ...], ConvSpec | None]:
    """The taps and the convolution of one phase; None where no tap lies on an element."""
    axes = [split_axis(spec, axis, phase) for axis, phase in enumerate(phases)]
    taps, strides, dilations, padding = zip(*axes, strict=True)
    kernel = tuple(len(range(k)[t]) for k, t in zip(spec.kernel_shape, taps, strict=True))
    if 0 in kernel:
        return taps, None
    rhs_shape, ones = (*kernel, *spec.rhs_shape[-2:]), (1,) * spec.spatial_ndim
    steps = {"window_strides": strides, "lhs_dilation": ones, "rhs_dilation": dilations}
    return taps, spec.replace(rhs_shape=rhs_shape, padding=padding, **steps)


def split(spec: ConvSpec) -> list[tuple[tuple[slice, ...], ConvSpec | None]]:
    """Each phase's taps and convolution, row-major."""
    return [part_of(spec, phases) for phases in itertools.product(*map(range, periods(spec)))]


def is_many(spec: ConvSpec) -> bool:
    return math.prod(periods(spec)) > MAX_PHASES


def aligned(spec: ConvSpec) -> ConvSpec:
    """Many phases of whole kernels as one convolution, by more padding in front: all begin with an
    element then. The inverse STFT of 200×513, 256 phases of 4 taps, takes 4.5 ms, XLA's 82."""
    more = tuple((a.low + -(a.low + 1) % a.spacing, a.high) for a in spec.axes)
    return spec.replace(padding=more) if is_many(spec) else spec


def is_whole(spec: ConvSpec) -> bool:
    """Whether all phases have equally many, neighbouring taps of an ungrouped kernel."""
    whole = (a.stride == a.dilation == 1 and a.taps % a.spacing == 0 for a in spec.axes)
    return spec.groups == 1 and all(whole)


def together(spec: ConvSpec) -> ConvSpec | None:
    """One convolution with the output channels of all phases, if these differ only in their taps.

    This holds where the stride divides the kernel, as is usual in upsampling. It reads the image
    once: 2×2×2 on 1×8×8×8×128 takes 0.9 ms, phase by phase 2.1.
    """
    every = [part_of(spec, (0,) * spec.spatial_ndim)] if is_many(spec) else split(spec)
    phases = {part for _, part in every}
    part = phases.pop()
    if phases or part is None or spec.groups > 1:
        return None
    *kernel, o = part.rhs_shape
    return part.replace(rhs_shape=(*kernel, math.prod(periods(spec)) * o))


def kernel_of_phases(rhs: Array, spec: ConvSpec) -> Array:
    """The kernels of all phases side by side: (taps of a phase…, c, phases, o)."""
    if not is_many(spec):
        return jnp.stack([rhs[taps] for taps, _ in split(spec)], -2)
    ndim, (c, o) = spec.spatial_ndim, rhs.shape[-2:]
    pairs = zip(spec.kernel_shape, spec.lhs_dilation, strict=True)
    kernel = rhs.reshape(*(size for k, d in pairs for size in (k // d, d)), c, o)
    for axis in range(ndim):  # the first phase begins with the last tap of the first period
        kernel = jnp.flip(kernel, 2 * axis + 1)
    order = *range(0, 2 * ndim, 2), 2 * ndim, *range(1, 2 * ndim, 2), 2 * ndim + 1
    kernel = kernel.transpose(order)
    return kernel.reshape(*kernel.shape[: ndim + 1], -1, o)


def exchanged(spec: ConvSpec) -> ConvSpec | None:
    """The strided convolution from this one's output to its image, if ``spec`` is the gradient of a
    kernel without strides: its own kernel's gradient is that kernel's, in reverse.

    One convolution instead of one for each phase: of 15 such gradients 1.5 times as fast in the
    geometric mean, 5×5 dilated by 8 3.8 times, and compiled in 0.2 s instead of 2.2.
    """
    forward = spec.forward
    if not spec.weight_gradient or max(forward.window_strides, default=1) > 1:
        return None
    *kernel, c, _ = forward.rhs_shape
    padding = []
    for axis, out in zip(forward.axes, forward.out_spatial, strict=True):
        low = axis.window - 1 - axis.low
        size = dilate(axis.size, axis.spacing) + axis.window - 1
        padding.append((low, size - out - low))
    return forward.replace(
        lhs_shape=forward.out_shape,
        rhs_shape=(*kernel, forward.out_channels // forward.groups, forward.groups * c),
        window_strides=forward.lhs_dilation,
        padding=tuple(padding),
        lhs_dilation=(1,) * forward.spatial_ndim,
    )


def by_exchange(lhs: Array, rhs: Array, spec: ConvSpec, one: ConvSpec, convolve: Convolve) -> Array:
    image, cotangent = layout.as_forward(lhs, rhs, spec)
    x, y = jnp.swapaxes(cotangent, 0, -1), jnp.moveaxis(image, 0, -2)
    out = convolve(x, y, one.kernel_gradient)  # (o, kernel…, G·c)
    out = jnp.flip(out, range(1, out.ndim - 1))
    out = jnp.moveaxis(layout.split_groups(out, -1, spec.groups), (0, -1), (-1, 0))
    return out.reshape(spec.out_shape)


# Input channels per group from which XLA sums to one output channel at memory bandwidth: the input
# gradient of 10 taps stride 5, 1×16000×1 to 512 channels, takes 0.6 ms, by phases 1.2 to 2.6.
MANY_CHANNELS = 16


class Phase(Algorithm):
    name = "phase"
    summary = "a dilated image by phases, each a convolution without holes"
    static = True

    def unsupported(self, spec: ConvSpec) -> str | None:
        if all(d == 1 for d in spec.lhs_dilation):
            return "lhs is not dilated, so there are no phases"
        if is_many(spec) and not is_whole(spec) and not exchanged(spec):
            return f"{math.prod(periods(spec))} phases to compile; it takes at most {MAX_PHASES}"
        return None

    def excluded(self, spec: ConvSpec) -> str | None:
        return None

    def doubted(self, spec: ConvSpec) -> str | None:
        if spec.out_channels == 1 and spec.rhs_shape[-2] >= MANY_CHANNELS and not is_many(spec):
            return "XLA sums many channels to one output at memory bandwidth"
        return None

    def cost(self, spec: ConvSpec) -> Cost:
        todo = self.parts(spec)
        output = math.prod(spec.out_shape) * spec.out_dtype.itemsize
        sizes = [part.gemm[1:] for part in todo] or [(0, 0, 0)]
        shape = spec.groups * len(todo), *map(max, zip(*sizes, strict=True))
        traffic = sum(part.operand_bytes for part in todo) + 2 * output
        padded = max((layout.padded_bytes(part) for part in todo), default=0)
        return Cost(sum(part.flops for part in todo), traffic, output + padded, shape)

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        if one := exchanged(spec):
            return by_exchange(lhs, rhs, spec, one, convolve)
        out_spatial, spec = spec.out_spatial, aligned(spec)
        counts = [-(-out // p) for out, p in zip(spec.out_spatial, periods(spec), strict=True)]
        shape = (spec.out_shape[0], *counts, spec.out_channels)
        one = together(spec)
        if one:
            kernel = kernel_of_phases(rhs, spec)
            out = convolve(lhs, kernel.reshape(one.rhs_shape), one)
        else:
            outputs = [part and convolve(lhs, rhs[taps], part) for taps, part in split(spec)]
            zeros = jnp.zeros(shape, spec.out_dtype)
            out = jnp.stack([zeros if output is None else output for output in outputs], -2)
        out = layout.interleaved(out.reshape(*shape[:-1], *periods(spec), -1))
        pairs = zip(spec.out_spatial, out_spatial, strict=True)
        return out[(slice(None), *(slice(size - own, size) for size, own in pairs))]

    def parts(self, spec: ConvSpec) -> list[ConvSpec]:
        if one := exchanged(spec):
            return [prepared(one.kernel_gradient)]
        one = together(aligned(spec))
        return [one] if one else [part for _, part in split(spec) if part is not None]


PHASE = Phase()
