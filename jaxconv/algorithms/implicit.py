"""GEMM without a patch matrix: a product for each kernel tap, of a shifted view of the image. The
forward pass sums the products; in a weight gradient each is the gradient of its tap."""

from typing import Any

from jax import Array

from jaxconv import layout, loops
from jaxconv.algorithms import gemm, pointwise
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec

# Most products to unroll: XLA:CPU keeps them all, 49 took 785 MiB for a stem with 16 MiB of output.
UNROLL = 9
# Bytes of all views from which a weight gradient takes its taps in a loop: XLA keeps what is not in
# one. 3×3×3 on 32×32×32×32 takes 44 to 64 ms and 9 MiB instead of 91 to 98 ms and 109 MiB, and
# compiles three times sooner; with 14 MiB of views it takes 1.2 times as long.
VIEWS = 16 << 20


def at_once(forward: ConvSpec) -> int:
    """The most taps whose products are formed at once in the weight gradient of ``forward``."""
    groups, m, _, k = forward.gemm
    few = groups * m * k * forward.dtype.itemsize <= VIEWS
    # Written out, slices need no index.
    return loops.UNROLL if few or forward.largest_size > loops.MAX_INDEX else 1


class Implicit(Algorithm):
    name = "implicit"
    summary = "one GEMM per kernel tap, no patch matrix"

    def doubted(self, spec: ConvSpec) -> str | None:
        if spec.rhs_shape[-2] == 1 < spec.groups and not spec.weight_gradient:
            return "a product of single elements is a shift in another layout"
        return pointwise.same_product(spec)

    def cost(self, spec: ConvSpec) -> Cost:
        forward = spec.forward
        (groups, m, n, _), taps, c = forward.gemm, forward.taps, forward.rhs_shape[-2]
        view = groups * m * c * spec.dtype.itemsize
        workspace, traffic = layout.padded_bytes(spec), spec.operand_bytes
        if spec.weight_gradient:
            views, shape = taps if taps <= at_once(forward) else 1, (c, n, m)
            traffic, workspace = traffic + 2 * view * taps, workspace + (views + 1) * view
        else:
            output, shape = groups * m * n * spec.accumulator_dtype.itemsize, (m, n, c)
            traffic += (2 * view + 3 * output) * taps
            workspace += min(taps, UNROLL) * (view + output)
        return Cost(spec.flops, traffic, workspace, (groups * taps, *shape))

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        g = spec.groups
        x, spec = layout.pad_and_dilate(lhs, spec)
        x = layout.features_to_batch(x, g)  # x: (g·n, spatial…, c)
        kernel = gemm.kernel_matrix(rhs, g)  # kernel: (g, taps·c, o)
        kernel = kernel.reshape(g, spec.taps, -1, kernel.shape[-1])

        def product(tap: Any) -> Array:
            matrix = layout.view(x, tap, spec).reshape(g, -1, kernel.shape[2])
            return gemm.product(matrix, kernel[:, tap], spec)

        return gemm.outputs_of(loops.sum_of(spec.taps, product, UNROLL), spec)

    def gradient(self, image: Array, cotangent: Array, spec: ConvSpec) -> Array:
        g = spec.groups
        x, spec = layout.pad_and_dilate(image, spec)
        x = layout.features_to_batch(x, g)  # x: (g·n, spatial…, c)
        cotangent = gemm.rows_of(cotangent, g)

        def product(tap: Any) -> Array:
            matrix = layout.view(x, tap, spec).reshape(*cotangent.shape[:2], -1)
            return gemm.gradient(matrix, cotangent, spec)

        out = loops.stack_of(spec.taps, product, 1, at_once(spec))  # out: (g, taps, c, o)
        return gemm.kernel_of(out.reshape(g, -1, out.shape[-1]), spec)

    def largest_index(self, spec: ConvSpec) -> int:
        taps, unroll = spec.forward.taps, at_once(spec.forward) if spec.weight_gradient else UNROLL
        return max(taps, super().largest_index(spec)) if taps > unroll else 0


IMPLICIT = Implicit()
