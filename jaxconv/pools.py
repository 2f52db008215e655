"""Pooling for those who write their own layers: channels last, as ``conv``."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxconv.arguments.channels_last import Each, Padding, resolve_padding
from jaxconv.arguments.errors import Call, operand
from jaxconv.arguments.parse import fail_padding, parse_pairs, positive
from jaxconv.transforms.poolings import POOLINGS

PADDINGS = "'SAME', 'SAME_LOWER', 'VALID', an integer, or (low, high) pairs"


def max_pool(
    x: ArrayLike, window_shape: Each, strides: Each = 1, padding: Padding = "VALID"
) -> Array:
    """The maximum of each window.

    Args:
      x: (…, spatial…, C), with as many spatial dimensions as ``window_shape`` has numbers and any
        number of leading axes.
      window_shape: the window's size; an integer for all spatial dimensions of (N, spatial…, C).
      strides: an integer, or one per spatial dimension.
      padding: "VALID", "SAME", "SAME_LOWER", an integer for all sides, or (low, high) pairs. It
        counts as smaller than everything.

    Returns:
      (…, out spatial…, C) of the dtype of ``x``. Where several elements are the maximum, the
      gradient goes to the first of them in row-major order.

    Raises:
      TypeError, ValueError: arguments that don't fit; the message says what to do.

    Example:
      >>> import jax.numpy as jnp, jaxconv
      >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
      >>> jaxconv.max_pool(x, 2, strides=2)[0, :, :, 0]
      Array([[ 5.,  7.],
             [13., 15.]], dtype=float32)
    """
    return _pool("max_pool", "max", x, window_shape, strides, padding)[0]


def avg_pool(
    x: ArrayLike,
    window_shape: Each,
    strides: Each = 1,
    padding: Padding = "VALID",
    *,
    count_include_pad: bool = True,
) -> Array:
    """The mean of each window.

    Args:
      x, window_shape, strides: as in ``max_pool``.
      padding: as in ``max_pool``, but of zeros.
      count_include_pad: whether a mean is over the whole window, padding included; else over the
        elements of ``x`` in it.

    Returns:
      (…, out spatial…, C); floating-point where ``x`` is of integers.

    Raises:
      TypeError, ValueError: as ``max_pool``.

    Example:
      >>> import jax.numpy as jnp, jaxconv
      >>> jaxconv.avg_pool(jnp.ones((1, 4, 1)), 3, padding="SAME", count_include_pad=False).ravel()
      Array([1., 1., 1., 1.], dtype=float32)
    """
    x = operand("avg_pool", "x", x)
    x = x if jnp.issubdtype(x.dtype, np.inexact) else x.astype(float)
    sums, params = _pool("avg_pool", "sum", x, window_shape, strides, padding)
    window = params["window_dimensions"]
    if count_include_pad:
        return sums / np.prod(window).astype(sums.dtype)
    counts, pads = np.ones(()), params["padding"]
    axes = zip(sums.shape, x.shape, window, params["window_strides"], pads, strict=True)
    for out, size, taps, stride, (low, _) in axes:
        first = np.arange(out) * stride - low
        inside = np.maximum(np.minimum(first + taps, size) - np.maximum(first, 0), 0)
        counts = np.multiply.outer(counts, inside)
    return sums / counts.astype(sums.dtype)


def _pool(
    function: str, kind: str, x: Any, window_shape: Each, strides: Each, padding: Padding
) -> tuple[Array, dict[str, Any]]:
    """One of lax's window reductions, and its parameters."""
    x = operand(function, "x", x)
    ndim = np.size(window_shape) if np.ndim(window_shape) else x.ndim - 2
    call = Call(function, {"x": x.shape}, paddings=PADDINGS)
    if x.ndim < ndim + 1 or ndim < 1:
        must = f"x must have {max(ndim, 1)} spatial dimension{'s' * (ndim > 1)} and channels last"
        remedy = "add the missing axes, such as x[..., None] for one channel"
        call.fail(must, None, remedy, TypeError)
    window = positive(call, "window_shape", window_shape, ndim, or_one=True)
    strides = positive(call, "strides", strides, ndim, or_one=True)
    outer = x.ndim - ndim - 1
    sizes = x.shape[outer:-1]
    padding = resolve_padding(call, padding, window, (1,) * ndim)
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            fail_padding(call, padding)
        padding = lax.padtype_to_pads(sizes, window, strides, padding)
    pads = parse_pairs(call, padding, ndim)
    ones = (1,) * x.ndim
    params = {
        "window_dimensions": (*ones[:outer], *window, 1),
        "window_strides": (*ones[:outer], *strides, 1),
        "padding": (*((0, 0),) * outer, *pads, (0, 0)),
        "base_dilation": ones,
        "window_dilation": ones,
    }
    return POOLINGS[f"reduce_window_{kind}"].bind(x, **params, algorithm="auto"), params
