"""lax's own convolution, always given in the canonical layout.

XLA:CPU has its fast path for exactly this layout, and the pass that brings others to it does not
reach into scan, while and cond: an NCHW convolution there takes 210 to 420 ms instead of 8.
"""

from jax import Array, lax

from jaxconv import layout
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec


def supports(spec: ConvSpec) -> str | None:
    return None


def cost(spec: ConvSpec) -> Cost:
    return Cost(spec.flops, traffic=spec.operand_bytes, workspace=0, gemm=spec.gemm)


def run(lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
    if any(pad < 0 for pads in spec.padding for pad in pads):
        # XLA:CPU of JAX 0.10.2 gives wrong values for padding such as ((0, -2), (-1, 1)).
        lhs, spec = layout.pad_and_dilate(lhs, spec)
    last = spec.spatial_ndim + 1
    spatial = tuple(range(1, last))
    channels_last = (0, last, *spatial)
    kernel = (last, last - 1, *range(last - 1))
    return lax.conv_general_dilated(
        lhs,
        rhs,
        spec.window_strides,
        spec.padding,
        spec.lhs_dilation,
        spec.rhs_dilation,
        lax.ConvDimensionNumbers(channels_last, kernel, channels_last),
        spec.feature_group_count,
        precision=spec.precision,
        preferred_element_type=None if spec.out_dtype == spec.dtype else spec.out_dtype,
    )


XLA = Algorithm("xla", "lax's own convolution, in the canonical layout", supports, cost, run)
