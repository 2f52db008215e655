"""Which way each pooling is computed: by a few rules, since each way wins by much where it wins."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxconv.compat import OLD_XLA
from jaxconv.loops import UNROLL, stored
from jaxconv.pooling.select import gradient, tangent
from jaxconv.pooling.spec import Pooling
from jaxconv.pooling.windows import STORE, axis_work, reduced

# Most taps read at once. Derivatives of 3×3×3 step 2 of 2×32×32×32×16 took 2.5 ms at once and 8.9
# axis by axis, 5×5 step 1 of 8×28×28×64 2.3 and 1.9, 13×13 of 20×20×256 18 and 1.4.
TOGETHER = 27


def choose(pooling: Pooling, platform: str) -> tuple[str, str]:
    """How a pooling is computed, "xla", "taps" or "axes", and why."""
    if reason := _left(pooling, platform):
        return "xla", reason
    if pooling.taps > TOGETHER or pooling.direction != "forward":
        way = "axes" if pooling.taps > TOGETHER else "taps"
        return way, f"a window of {pooling.taps} taps"
    sizes, by_axes = list(pooling.shape), -STORE * math.prod(pooling.out_shape)
    for d in reversed(pooling.pooled):
        sizes[d] = 1
        by_axes += axis_work(pooling.axes[d]) * math.prod(sizes)
        sizes[d] = pooling.axes[d].out
    if pooling.taps * math.prod(pooling.out_shape) <= by_axes:
        return "taps", "axis by axis is no less work"
    return "axes", "axis by axis is less work"


def _left(pooling: Pooling, platform: str) -> str | None:
    """The reason why it stays with XLA, None if it doesn't."""
    if platform != "cpu":
        return f"nothing was measured on {platform}"
    if 0 in (*pooling.shape, *pooling.out_shape) or not pooling.pooled:
        return "nothing is reduced"
    if pooling.kind != "sum" and jnp.issubdtype(pooling.dtype, np.complexfloating):
        return "maxima of complex numbers"
    if pooling.direction == "forward":
        return None
    if not jnp.issubdtype(pooling.dtype, np.number):
        return "a derivative of booleans"
    if any(min(axis.low, axis.high) < 0 for axis in pooling.axes):
        return "a derivative with negative padding"
    if max(max(axis.taps, axis.stride) for axis in pooling.axes) > UNROLL:
        return f"a derivative of more than {UNROLL} taps along an axis, which would be unrolled"
    return None


def run(pooling: Pooling, algorithm: str, *operands: Array, remade: bool = False) -> Array:
    """Computes a pooling by an algorithm other than XLA's. Its result is stored, as XLA's is, since
    what reads it would compute it again; so is what it reads several times. With JAX 0.10.2, where
    that takes a copy (max 2×2 step 2 of 8×112×112×64: 6.2 ms instead of 2.2), only what is
    ``remade`` at a cost."""
    *others, x = operands
    if pooling.overlaps and (remade or not OLD_XLA):
        x = stored(x)
    compute = {"forward": reduced, "gradient": gradient, "tangent": tangent}[pooling.direction]
    out = compute(*others, x, pooling, algorithm)  # the others: cotangents or tangents
    return out if OLD_XLA else stored(out)
