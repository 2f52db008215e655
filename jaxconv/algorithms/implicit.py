"""GEMM without a patch matrix: one product per kernel tap, or one per output position.

Both orders read shifted views of the image where they lie. Which is shorter decides: kernels are
smaller than outputs in a forward convolution, and larger in a weight gradient.
"""

from typing import Any

from jax import Array

from jaxconv import layout
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.algorithms.gemm import gemm, kernel_matrix
from jaxconv.spec import ConvSpec

# Products written out before a loop takes over. XLA:CPU keeps what all of them return: 49 of them
# took 785 MiB for a network stem whose output has 16.
UNROLL = 9


def supports(spec: ConvSpec) -> str | None:
    return None


def by_position(spec: ConvSpec) -> bool:
    return spec.positions < spec.taps


def cost(spec: ConvSpec) -> Cost:
    groups, m, n, k = spec.gemm
    view = groups * m * k // max(spec.positions, spec.taps) * spec.dtype.itemsize
    products = min(spec.positions, spec.taps)
    output = groups * m * n * spec.accumulator_dtype.itemsize
    if by_position(spec):
        shape = (groups * products, m // products, n, k)
        traffic, workspace = 2 * view * products, 2 * view
    else:
        shape = (groups * products, m, n, k // products)
        live = min(products, UNROLL)
        traffic, workspace = (2 * view + 3 * output) * products, live * (view + output)
    return Cost(
        flops=spec.flops,
        traffic=spec.operand_bytes + traffic,
        workspace=layout.padded_bytes(spec) + workspace,
        gemm=shape,
    )


def run(lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
    x, spec = layout.pad_and_dilate(lhs, spec)
    x = layout.features_to_batch(x, spec.groups)  # x: (g·n, spatial…, c)
    out = sum_over_positions(x, rhs, spec) if by_position(spec) else sum_over_taps(x, rhs, spec)
    return layout.batch_groups_to_features(out, spec.groups)


def sum_over_taps(x: Array, rhs: Array, spec: ConvSpec) -> Array:
    g = spec.groups
    kernel = kernel_matrix(rhs, g)  # kernel: (g, taps·c, o)
    kernel = kernel.reshape(g, spec.taps, -1, kernel.shape[-1])

    def product(tap: Any) -> Array:
        offsets = layout.unravel(tap, spec.kernel_shape)
        starts = [t * d for t, d in zip(offsets, spec.rhs_dilation, strict=True)]
        view = layout.strided(x, starts, spec.out_spatial, spec.window_strides)
        return gemm(view.reshape(g, -1, kernel.shape[2]), kernel[:, tap], spec)

    out = layout.sum_of(spec.taps, product, UNROLL)  # out: (g, n·positions, o)
    return out.reshape(x.shape[0], *spec.out_spatial, -1)


def sum_over_positions(x: Array, rhs: Array, spec: ConvSpec) -> Array:
    g = spec.groups
    kernel = kernel_matrix(rhs, g)  # kernel: (g, k, o), k = taps·c

    def product(position: Any) -> Array:
        output = layout.unravel(position, spec.out_spatial)
        starts = [p * stride for p, stride in zip(output, spec.window_strides, strict=True)]
        window = layout.strided(x, starts, spec.kernel_shape, spec.rhs_dilation)
        return gemm(window.reshape(g, -1, kernel.shape[1]), kernel, spec)

    out = layout.stack_of(spec.positions, product, 2)  # out: (g, n, positions, o)
    return out.reshape(x.shape[0], *spec.out_spatial, -1)


IMPLICIT = Algorithm(
    "implicit", "one GEMM per tap, or per output position; no patch matrix", supports, cost, run
)
