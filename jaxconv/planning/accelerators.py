"""Where "auto" departs from XLA on an accelerator, each as far as measured.

cuDNN, which XLA:GPU calls, is fast for most shapes. It has blind spots, and refuses some dtypes.
The factors below are those over lax on an H200 with JAX 0.11.2, in float32 and bfloat16.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jaxconv.algorithms import pointwise
from jaxconv.spec import ConvSpec


def refused(spec: ConvSpec) -> bool:
    """XLA:GPU has no convolution of this dtype."""
    return jnp.issubdtype(spec.dtype, np.integer) or spec.dtype == jnp.float8_e8m0fnu


def choices(spec: ConvSpec, platform: str) -> Iterator[tuple[str, str]]:
    """What "auto" takes for a prepared ``spec`` rather than XLA's own, if possible; and why."""
    if platform == "gpu":
        if refused(spec):
            for name in ("pointwise", "implicit"):
                yield name, "XLA refuses convolutions of integers and this float8 on GPU"
        elif jnp.issubdtype(spec.dtype, np.floating) and 2 <= spec.dtype.itemsize <= 4:
            yield from _blind_spots(spec)


def _blind_spots(spec: ConvSpec) -> Iterator[tuple[str, str]]:
    forward = spec.forward
    ndim, kernel, strides = forward.spatial_ndim, forward.kernel_shape, forward.window_strides
    gaps, zeros = max(forward.rhs_dilation, default=1), max(forward.lhs_dilation, default=1)
    # https://github.com/jax-ml/jax/issues/23085: 16×16 pixels 1.2 to 4.8 times, the input gradient
    # 65 and 105 times; 4×4 2.0 to 2.3 times, 2×2 1.2 to 1.4.
    abut = strides == kernel and gaps == zeros == 1 < forward.taps
    if spec.groups == 1 and ndim > 0 and (abut or pointwise.spreads(spec)):
        yield "pointwise", "windows lie side by side: a matrix product of their pixels"
    one_each = forward.rhs_shape[-2] == 1 < forward.groups == forward.out_channels
    if ndim == 1 and one_each and max(strides) == zeros == 1:
        # https://github.com/jax-ml/jax/issues/26266 and 13800: 4 to 16 taps 1.8 to 6.8 times, with
        # dilation 32 to 46.
        if not spec.weight_gradient:
            yield "shift", "XLA's own is slow at filters along one axis, one for each channel"
        # 96 to 103 times with dilation; without, 4 taps in bfloat16 2.1 times, in float32 0.8.
        elif gaps > 1 or (forward.taps <= 4 and spec.dtype.itemsize == 2):
            yield "im2col", "XLA's own is slow at the gradient of such filters"
    # https://github.com/jax-ml/jax/issues/31662: 220 times in bfloat16, phase by phase; as one
    # convolution not measured, nor in 2-D.
    if spec.weight_gradient and ndim == 3 and min(forward.lhs_dilation) > 1:
        yield "phase", "XLA's own is slow at kernels' gradients of transposed convolutions in 3-D"
