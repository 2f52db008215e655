"""lax's own convolution, always in the canonical layout.

XLA:CPU has its fast path for exactly this layout, and the pass that converts others to it does not
reach into scan, while and cond: an NCHW convolution there takes 210 to 420 ms instead of 8. It is a
separate primitive, lowered as lax's was when jaxconv was imported, since ``enable`` replaces lax's
lowering.
"""

import math
from functools import partial
from typing import Any

import numpy as np
from jax import Array, lax

from jaxconv import compat, layout
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.compat import OLD_XLA, Primitive, ad, batching, conv_general_dilated_p, mlir
from jaxconv.spec import ConvSpec

xla_conv_p = Primitive("xla_conv")
xla_conv_p.def_impl(partial(compat.apply_primitive, xla_conv_p))
xla_conv_p.def_effectful_abstract_eval(conv_general_dilated_p.abstract_eval)
for _rules in (ad.primitive_jvps, ad.primitive_transposes, batching.fancy_primitive_batchers):
    _rules[xla_conv_p] = _rules[conv_general_dilated_p]
for _platform in ("gpu", "tpu", None):
    _rule = compat.lowering_rule(conv_general_dilated_p, _platform or "other")
    mlir.register_lowering(xla_conv_p, _rule, platform=_platform)

# XLA:CPU of JAX 0.10.2 convolves a padded image in pieces that stay in cache, but writes the whole
# patch matrix of an unpadded one: 3×3 on 2×56×56×512→4 without padding takes 80 ms, with one row of
# zeros 6. JAX 0.12 takes about as long for both.
PADDED_IS_FASTER = OLD_XLA
# With at most this many channels XLA:CPU uses older kernels, for which padding makes no difference.
EIGEN_CHANNELS = 16
# Bytes of the patch matrix from which a row of zeros pays off.
PATCHES = 3 << 20
_rule_on_cpu = compat.lowering_rule(conv_general_dilated_p, "cpu")


def gains_by_padding(lhs: Any, rhs: Any, out: Any, params: dict[str, Any]) -> bool:
    """Whether XLA:CPU is faster with a row of zeros, for the arguments of ``xla_conv_p``."""
    *kernel, c, o = rhs.shape
    plain = (
        len(kernel) == 2
        and lhs.dtype == out.dtype == np.float32
        and params["feature_group_count"] == 1
        and max(params["lhs_dilation"]) == 1
        and not any(map(any, params["padding"]))
        and max(c, o) > EIGEN_CHANNELS
        and max(kernel) > 1 < max(out.shape[1:-1])  # neither is a matrix product
    )
    return plain and math.prod((*out.shape[:-1], *kernel, c)) * lhs.dtype.itemsize >= PATCHES


def lower_on_cpu(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    """lax's rule, for an image with an extra row of zeros where that is faster."""
    (image, kernel), (out,) = ctx.avals_in, ctx.avals_out
    if not (PADDED_IS_FASTER and gains_by_padding(image, kernel, out, params)):
        return _rule_on_cpu(ctx, lhs, rhs, **params)

    def with_a_row(lhs: Array, rhs: Array) -> Array:
        more = xla_conv_p.bind(lhs, rhs, **params | {"padding": ((0, 1), (0, 0))})
        return lax.slice_in_dim(more, 0, out.shape[1], axis=1)

    return mlir.lower_fun(with_a_row, multiple_results=False)(ctx, lhs, rhs)


mlir.register_lowering(xla_conv_p, lower_on_cpu, platform="cpu")

# Channels from which a product is as fast as XLA's convolution: 3 to 5, 98×98, take it three times
# as long.
PRODUCT_CHANNELS = 16
# Bytes of the output up to which the product is preferred. An activation of a larger one takes an
# array of its own, where it overwrites a convolution's output: MobileNetV2 forward, batch 8, took
# 82 instead of 52 MiB, and no less time.
PRODUCT_BYTES = 8 << 20


def is_product(spec: ConvSpec) -> bool:
    """Whether each output is the product of one position and a matrix, in float32."""
    ones, zeros = (1,) * spec.spatial_ndim, ((0, 0),) * spec.spatial_ndim
    return (
        spec.taps == spec.groups == 1
        and spec.window_strides == spec.lhs_dilation == ones
        and spec.padding == zeros
        and not spec.weight_gradient
        and spec.dtype == np.float32
        and min(spec.rhs_shape[-2:]) >= PRODUCT_CHANNELS
        and math.prod(spec.out_shape) * spec.dtype.itemsize <= PRODUCT_BYTES
    )


def cropped(lhs: Array, spec: ConvSpec) -> tuple[Array, ConvSpec]:
    """``lhs`` cropped by its negative padding, and its spec without negative padding."""
    crops = [[max(0, -(pad // a.spacing)) for pad in (a.low, a.high)] for a in spec.axes]
    each = list(zip(crops, spec.axes, strict=True))
    if any(sum(crop) >= a.size for crop, a in each):
        return layout.pad_and_dilate(lhs, spec)  # only padding is left to convolve
    pads = [(a.low + lo * a.spacing, a.high + hi * a.spacing) for (lo, hi), a in each]
    lhs = layout.padded(lhs, [(-lo, -hi, 0) for lo, hi in crops])
    return lhs, spec.replace(lhs_shape=lhs.shape, padding=tuple(pads))


# Outputs of a group from which XLA may be fast in dtypes of which it convolves all groups at once:
# patches of 5×5 in bfloat16, 64×192×192, take 26 to 39 ms, 42 to 54 by ``im2col_tiled``; of 3×3, by
# ``shift``, 15 instead of 60.
MULTIPLES = 16


class Xla(Algorithm):
    # Its indices are limited too: XLA:CPU gives zeros for axes beyond int32 (JAX 0.10.2) and wrong
    # values for float32 padding beyond it (0.10.2 and 0.12).
    name = "xla"
    summary = "lax's own convolution, in the canonical layout"
    rereads = False

    def excluded(self, spec: ConvSpec) -> str | None:
        return None

    def doubted(self, spec: ConvSpec) -> str | None:
        if spec.spatial_ndim == 0:
            # 512×512 by 512×512 takes 157 ms instead of 2.7 (JAX 0.12.0.1; on 0.10.2 both take 3).
            return "without spatial axes it is a matrix product, which XLA may compute in a loop"
        if np.issubdtype(spec.dtype, np.integer) and spec.dtype.itemsize > 1:
            # 3×3 on 1×56×56×64 takes 70 to 81 ms in int32, by one product for each tap 9 to 11.
            return "XLA convolves integers of more than 8 bits in a scalar loop"
        if is_product(spec):
            # Alone the product takes 0.67 to 0.86 times as long (medians of the rows of five
            # machines). XLA fuses it with more, and it takes kernels in two orders: with all 1×1
            # kernels so, ConvNeXt-T's forward pass gained 10 to 17 % on JAX 0.12, others' 2 to 8.
            return "a kernel of one tap is a matrix product, which XLA fuses with what surrounds it"
        few = spec.out_channels < MULTIPLES * spec.groups
        if spec.groups > 1 and few and spec.dtype.name not in ("float32", "float16"):
            # Non-finite values become NaN, too.
            return "in groups of this dtype XLA multiplies all channels by a kernel full of zeros"
        if spec.groups > 1 and spec.taps > spec.positions:
            # As in gradients: 1,400 ms instead of 5 (32 groups, 4×28×28×256).
            return "XLA is slow in groups with a kernel larger than the output"
        return None

    def cost(self, spec: ConvSpec) -> Cost:
        flops = spec.flops
        if spec.groups == 1 and spec.spatial_ndim <= 2 and not spec.weight_gradient:
            # XLA:CPU skips the zeros between elements: with them it would do 213 GFLOP/s (median of
            # the rows of a machine of 150).
            flops //= math.prod(spec.lhs_dilation)
        return Cost(flops, spec.operand_bytes, workspace=0, gemm=spec.gemm)

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        if any(pad < 0 for pads in spec.padding for pad in pads):
            # XLA:CPU of JAX 0.10.2 gives wrong values for padding such as ((0, -2), (-1, 1)).
            lhs, spec = cropped(lhs, spec)
        last = spec.spatial_ndim + 1
        image, kernel = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
        names = "window_strides padding lhs_dilation rhs_dilation feature_group_count precision"
        return xla_conv_p.bind(
            *compat.auto_insert_reshard(lhs, rhs),
            **{name: getattr(spec, name) for name in names.split()},
            dimension_numbers=lax.ConvDimensionNumbers(image, kernel, image),
            batch_group_count=1,
            preferred_element_type=None if spec.out_dtype == spec.dtype else spec.out_dtype,
            out_sharding=None,
        )


XLA = Xla()
