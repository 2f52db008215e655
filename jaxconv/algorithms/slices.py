"""A sum of convolutions of one dimension less, one for each tap along the first axis: 2-D ones over
all slices of volumes, for which XLA:CPU has a fast path, 3 to 6 times as fast as its 3-D loop."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from jaxconv import layout, loops
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec

# Each is compiled as a convolution of its own.
MAX_SLICES = 16


def part(spec: ConvSpec) -> ConvSpec:
    """The convolution of one tap of the first axis, with outputs in the accumulator's dtype."""
    (n, _, *sizes, c), dtype = spec.lhs_shape, spec.accumulator_dtype
    names = "rhs_shape", "window_strides", "padding", "lhs_dilation", "rhs_dilation"
    others = {name: getattr(spec, name)[1:] for name in names}
    lhs_shape = (n * spec.out_spatial[0], *sizes, c)
    return spec.replace(lhs_shape=lhs_shape, dtype=dtype, out_dtype=dtype, **others)


def slices_of(lhs: Array, spec: ConvSpec) -> tuple[Callable[[int], Array], ConvSpec]:
    """The slices that a tap of the first axis multiplies, as a batch, and ``part(spec)``."""
    one, others = part(spec), spec.spatial_ndim - 1
    ones, zeros = (1,) * others, (0,) * others
    padding = spec.padding[0], *((0, 0),) * others
    first = spec.replace(padding=padding, lhs_dilation=(spec.lhs_dilation[0], *ones))
    x, _ = layout.pad_and_dilate(lhs, first)
    counts, steps = (spec.out_spatial[0], *spec.lhs_spatial[1:]), (spec.window_strides[0], *ones)

    def view(tap: int) -> Array:
        x_of_tap = loops.strided(x, (tap * spec.rhs_dilation[0], *zeros), counts, steps)
        return x_of_tap.reshape(one.lhs_shape).astype(one.dtype)

    return view, one


class Slices(Algorithm):
    name = "slices"
    summary = "a sum of convolutions of one dimension less, one per tap"
    static = True

    def unsupported(self, spec: ConvSpec) -> str | None:
        if spec.spatial_ndim < 2:
            return "there is no dimension left without the first"
        slices = spec.forward.kernel_shape[0]
        return f"{slices} slices to compile; at most {MAX_SLICES}" if slices > MAX_SLICES else None

    def doubted(self, spec: ConvSpec) -> str | None:
        reason = "in fewer than three dimensions it only splits the same products"
        return reason if spec.spatial_ndim < 3 else None

    def cost(self, spec: ConvSpec) -> Cost:
        one, slices = part(spec.forward), spec.forward.kernel_shape[0]
        moved = slices * one.operand_bytes  # XLA keeps every slice until the sum is computed
        return Cost(spec.flops, moved, moved, (spec.groups * slices, *one.gemm[1:]))

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        if spec.weight_gradient:
            image, cotangent = layout.as_forward(lhs, rhs, spec)
            view, one = slices_of(image, spec.forward)
            y = cotangent.reshape(one.out_shape).astype(one.dtype)

            def of_tap(tap: int) -> Array:
                x, gradient = view(tap).swapaxes(0, -1), one.kernel_gradient
                return jnp.moveaxis(convolve(x, jnp.moveaxis(y, 0, -2), gradient), 0, -2)

            # In the order of a kernel: in that of ``spec`` XLA would move it there.
            return jnp.moveaxis(loops.stack_of(spec.forward.kernel_shape[0], of_tap, 0), -2, 0)
        view, one = slices_of(lhs, spec)

        def term(tap: int) -> Array:
            return convolve(view(tap), rhs[tap].astype(one.dtype), one)

        return loops.sum_of(spec.kernel_shape[0], term, MAX_SLICES).reshape(spec.out_shape)

    def parts(self, spec: ConvSpec) -> list[ConvSpec]:
        one, slices = part(spec.forward), spec.forward.kernel_shape[0]
        return [one.kernel_gradient if spec.weight_gradient else one] * slices


SLICES = Slices()
