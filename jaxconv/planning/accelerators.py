"""Where "auto" leaves XLA's own convolution on an accelerator: rules, each as far as measured.

cuDNN, which XLA:GPU calls, is fast for most shapes. It has blind spots, and refuses some dtypes.
The factors in the rules are those over lax on an H200 with JAX 0.11.2, in float32 and bfloat16.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxconv.algorithms import pointwise
from jaxconv.spec import ConvSpec


@dataclasses.dataclass(frozen=True)
class Rule:
    """A kind of convolution for which "auto" takes an algorithm.

    Attributes:
      applies: whether a prepared spec is of the kind.
      why: the reason that a plan states.
    """

    algorithm: str
    applies: Callable[[ConvSpec], bool]
    why: str


def refused(spec: ConvSpec) -> bool:
    """XLA:GPU has no convolution of this dtype."""
    return jnp.issubdtype(spec.dtype, np.integer) or spec.dtype == jnp.float8_e8m0fnu


def _is_float(spec: ConvSpec) -> bool:
    return jnp.issubdtype(spec.dtype, np.floating) and 2 <= spec.dtype.itemsize <= 4


def side_by_side(spec: ConvSpec) -> bool:
    """Windows of several elements that neither overlap nor leave gaps, and their gradients."""
    if not _is_float(spec) or spec.groups > 1 or spec.spatial_ndim == 0:
        return False
    forward = spec.forward
    abut = forward.window_strides == forward.kernel_shape and max(forward.rhs_dilation) == 1
    abut = abut and max(forward.lhs_dilation) == 1 < forward.taps
    return abut or pointwise.spreads(spec)


def depthwise(spec: ConvSpec) -> bool:
    """A filter for each channel, along one axis."""
    forward = spec.forward
    steps = (*forward.window_strides, *forward.lhs_dilation)
    one_each = forward.rhs_shape[-2] == 1 < forward.groups == forward.out_channels
    return _is_float(spec) and forward.spatial_ndim == 1 and one_each and max(steps) == 1


def depthwise_gradient(spec: ConvSpec) -> bool:
    """Of a filter with holes; of a short one without, XLA's own is slow in 16 bits only."""
    if not spec.weight_gradient or not depthwise(spec):
        return False
    forward = spec.forward
    return max(forward.rhs_dilation) > 1 or (forward.taps <= 4 and spec.dtype.itemsize == 2)


def transposed_gradient(spec: ConvSpec) -> bool:
    """Of the kernel of a transposed convolution in 3-D."""
    if not spec.weight_gradient or not _is_float(spec):
        return False
    forward = spec.forward
    return forward.spatial_ndim == 3 and min(forward.lhs_dilation) > 1


REFUSED = "XLA refuses convolutions of integers and this float8 on GPU"

# The first that applies, and whose algorithm is possible, is taken.
ON_GPU = (
    Rule("pointwise", refused, REFUSED),
    Rule("implicit", refused, REFUSED),
    # https://github.com/jax-ml/jax/issues/23085: 16×16 pixels 1.2 to 4.8 times, the input gradient
    # 65 and 105 times; 4×4 2.0 to 2.3 times, 2×2 1.2 to 1.4.
    Rule("pointwise", side_by_side, "windows lie side by side: a matrix product of their pixels"),
    # https://github.com/jax-ml/jax/issues/26266 and 13800: 4 to 16 taps 1.8 to 6.8 times, with
    # holes 32 to 46.
    Rule(
        "shift",
        lambda spec: depthwise(spec) and not spec.weight_gradient,
        "XLA's own is slow at filters along one axis, one for each channel",
    ),
    # 96 to 103 times with holes; without, 4 taps in bfloat16 2.1 times, in float32 0.8.
    Rule("im2col", depthwise_gradient, "XLA's own is slow at the gradient of such filters"),
    # https://github.com/jax-ml/jax/issues/31662: 220 times in bfloat16. Not measured in 2-D.
    Rule(
        "phase",
        transposed_gradient,
        "XLA's own is slow at the kernel's gradient of transposed convolutions in 3-D",
    ),
)


def rules(platform: str) -> tuple[Rule, ...]:
    """Those of a platform."""
    return ON_GPU if platform == "gpu" else ()
