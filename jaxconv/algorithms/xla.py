"""lax's own convolution, always given in the canonical layout.

XLA:CPU has its fast path for exactly this layout, and the pass that brings others to it does not
reach into scan, while and cond: an NCHW convolution there takes 210 to 420 ms instead of 8.

It is a primitive of its own that is lowered as lax's was when jaxconv was imported: ``enable``
replaces the lowering of lax's.
"""

from functools import partial

from jax import Array, lax

from jaxconv import layout
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.compat import (
    Primitive,
    ad,
    apply_primitive,
    auto_insert_reshard,
    batching,
    conv_general_dilated_p,
    lowering_rule,
    mlir,
)
from jaxconv.spec import ConvSpec

xla_conv_p = Primitive("xla_conv")
xla_conv_p.def_impl(partial(apply_primitive, xla_conv_p))
xla_conv_p.def_effectful_abstract_eval(conv_general_dilated_p.abstract_eval)
ad.primitive_jvps[xla_conv_p] = ad.primitive_jvps[conv_general_dilated_p]
ad.primitive_transposes[xla_conv_p] = ad.primitive_transposes[conv_general_dilated_p]
batching.fancy_primitive_batchers[xla_conv_p] = batching.fancy_primitive_batchers[
    conv_general_dilated_p
]
for _platform in ("cpu", "gpu", "tpu"):
    _rule = lowering_rule(conv_general_dilated_p, _platform)
    mlir.register_lowering(xla_conv_p, _rule, platform=_platform)
mlir.register_lowering(xla_conv_p, lowering_rule(conv_general_dilated_p, "other"))


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
    lhs, rhs = auto_insert_reshard(lhs, rhs)
    return xla_conv_p.bind(
        lhs,
        rhs,
        window_strides=spec.window_strides,
        padding=spec.padding,
        lhs_dilation=spec.lhs_dilation,
        rhs_dilation=spec.rhs_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(channels_last, kernel, channels_last),
        feature_group_count=spec.feature_group_count,
        batch_group_count=1,
        precision=spec.precision,
        preferred_element_type=None if spec.out_dtype == spec.dtype else spec.out_dtype,
        out_sharding=None,
    )


XLA = Algorithm("xla", "lax's own convolution, in the canonical layout", supports, cost, run)
