"""Multiply-add of shifted views, no GEMM: for few input channels a group."""

from typing import Any

from jax import Array

from jaxconv import layout
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec

# Input channels of a group above which a GEMM, which reuses what it loads, wins everywhere.
MAX_CHANNELS = 16


def supports(spec: ConvSpec) -> str | None:
    channels = spec.rhs_shape[-2]
    if channels > MAX_CHANNELS:
        return (
            f"{channels} input channels a group; it multiplies one at a time, at most"
            f" {MAX_CHANNELS}"
        )
    return None


def cost(spec: ConvSpec) -> Cost:
    terms = spec.taps * spec.rhs_shape[-2]
    loops = -(-terms // layout.UNROLL)
    output = spec.groups * spec.gemm[1] * spec.gemm[2] * spec.accumulator_dtype.itemsize
    return Cost(
        flops=spec.flops,
        traffic=spec.operand_bytes + 2 * layout.padded_bytes(spec) + 2 * output * (loops - 1),
        workspace=layout.padded_bytes(spec),
        gemm=None,
    )


def run(lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
    x, spec = layout.pad_and_dilate(lhs, spec)
    x = layout.split_groups(x, -1, spec.groups)  # x: (n, spatial…, g, c)
    c = x.shape[-1]
    # kernel: (taps·c, g, o)
    kernel = layout.split_groups(rhs, -1, spec.groups).reshape(spec.taps * c, spec.groups, -1)
    dtype = spec.accumulator_dtype

    def term(i: Any) -> Array:
        offsets = layout.unravel(i // c, spec.kernel_shape)
        starts = [t * d for t, d in zip(offsets, spec.rhs_dilation, strict=True)]
        view = layout.strided(x, starts, spec.out_spatial, spec.window_strides)
        view = view if c == 1 else view[..., i % c, None]  # view: (n, out spatial…, g, 1)
        return view.astype(dtype) * kernel[i].astype(dtype)

    out = layout.sum_of(spec.taps * c, term)  # out: (n, out spatial…, g, o)
    return out.reshape(spec.out_shape)


SHIFT = Algorithm("shift", "multiply-add of shifted views, no GEMM", supports, cost, run)
