"""A sum of convolutions of one dimension less, one for each tap along the first axis: 2-D ones over
all slices of volumes, for which XLA:CPU has a fast path, 3 to 6 times as fast as its 3-D loop."""

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


class Slices(Algorithm):
    name = "slices"
    summary = "a sum of convolutions of one dimension less, one per tap"
    static = True

    def unsupported(self, spec: ConvSpec) -> str | None:
        if spec.spatial_ndim < 2:
            return "there is no dimension left without the first"
        if spec.kernel_shape[0] > MAX_SLICES:
            return f"{spec.kernel_shape[0]} slices to compile; it takes at most {MAX_SLICES}"
        return None

    def doubted(self, spec: ConvSpec) -> str | None:
        reason = "in fewer than three dimensions it only splits the same products"
        return reason if spec.spatial_ndim < 3 else None

    def cost(self, spec: ConvSpec) -> Cost:
        one, slices = part(spec), spec.kernel_shape[0]
        moved = slices * one.operand_bytes  # XLA keeps every slice until the sum is computed
        return Cost(spec.flops, moved, moved, (spec.groups * slices, *one.gemm[1:]))

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        one, others = part(spec), spec.spatial_ndim - 1
        ones, zeros = (1,) * others, (0,) * others
        padding = spec.padding[0], *((0, 0),) * others
        first = spec.replace(padding=padding, lhs_dilation=(spec.lhs_dilation[0], *ones))
        x, _ = layout.pad_and_dilate(lhs, first)
        counts = spec.out_spatial[0], *spec.lhs_spatial[1:]

        def term(tap: int) -> Array:
            starts = tap * spec.rhs_dilation[0], *zeros
            view = loops.strided(x, starts, counts, (spec.window_strides[0], *ones))
            view = view.reshape(one.lhs_shape).astype(one.dtype)
            return convolve(view, rhs[tap].astype(one.dtype), one)

        return loops.sum_of(spec.kernel_shape[0], term, MAX_SLICES).reshape(spec.out_shape)

    def parts(self, spec: ConvSpec) -> list[ConvSpec]:
        return [part(spec)] * spec.kernel_shape[0]


SLICES = Slices()
