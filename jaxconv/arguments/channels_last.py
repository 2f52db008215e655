"""The arguments of the channels-last functions, as those of ``lax.conv_general_dilated``."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxconv.arguments import hints
from jaxconv.arguments.errors import Call
from jaxconv.arguments.parse import positive
from jaxconv.spec import Pads

Each = int | Sequence[int]  # one number for all spatial dimensions, or one for each
Padding = str | int | Sequence[tuple[int, int]]
PADDINGS = "'SAME', 'SAME_LOWER', 'VALID', 'CAUSAL' (1-D), an integer, or (low, high) pairs"
# What these functions call the arguments of lax.
NAMES = {"lhs": "x", "rhs": "w", "window_strides": "strides", "rhs_dilation": "dilation"}
NAMES |= {"feature_group_count": "groups"}


def lax_arguments(
    function: str,
    x: Any,
    w: Any,
    strides: Each,
    padding: Padding,
    dilation: Each,
    groups: int,
    **others: Any,
) -> tuple[Call, dict[str, Any]]:
    """``conv``'s arguments as lax's, once ``x`` has a batch, and the call for its errors."""
    channels = "the last axis", "the last axis but one"
    guesses = partial(hints.of_conv, tuple(x.shape), tuple(w.shape))
    call = Call(function, {"x": x.shape, "w": w.shape}, NAMES, PADDINGS, channels, guesses)
    _check_ranks(call, x.shape, w.shape)
    ndim = len(w.shape) - 2
    strides = positive(call, "window_strides", strides, ndim, or_one=True)
    dilation = positive(call, "rhs_dilation", dilation, ndim, or_one=True)
    others |= {"padding": resolve_padding(call, padding, w.shape[:-2], dilation)}
    others |= {"dimension_numbers": hints.lettered(ndim + 2), "feature_group_count": groups}
    return call, {"window_strides": strides, "rhs_dilation": dilation, **others}


def _check_ranks(call: Call, x: Sequence[int], w: Sequence[int]) -> None:
    of_x, of_w = len(x), len(w)
    if of_w >= 2 and of_x in (of_w, of_w - 1):
        return
    if of_x == of_w < 2:
        remedy = "x and w have no channel axes: pass x[..., None] and w[..., None, None]"
    elif of_x == of_w + 2 or (of_w <= 2 and of_x == of_w + 1):
        tiled = f"jnp.tile(w[..., None, None], {x[-1]}) and groups={x[-1]} for the same on each"
        remedy = f"w has no channel axes: pass {tiled if x[-1] > 1 else 'w[..., None, None]'}"
    elif hints.look_swapped(tuple(w), tuple(x)):
        remedy = "x and w look swapped: the image comes first"
    elif of_x > of_w:
        remedy = "make the leading axes of x one batch, or add the missing axes of w"
    else:
        remedy = "add the missing axes, such as x[..., None] for one channel"
    must = "w must be (kernel…, C / groups, O) and x (N, spatial…, C) or (spatial…, C)"
    call.fail(must, None, remedy, TypeError)


def resolve_padding(
    call: Call, padding: Padding, kernel_shape: Sequence[int], dilation: Sequence[int]
) -> str | Pads | Sequence[tuple[int, int]]:
    """Channels-last padding (an int, "CAUSAL", …) as ``lax.conv_general_dilated`` takes it."""
    if isinstance(padding, (int, np.integer)):
        return ((int(padding), int(padding)),) * len(kernel_shape)
    if isinstance(padding, str) and padding.upper() == "CAUSAL":
        if len(kernel_shape) != 1:
            constraint = "padding 'CAUSAL' is for one spatial dimension"
            call.fail(constraint, f"{len(kernel_shape)} of them", "pass (low, high) pairs")
        return tuple(((k - 1) * d, 0) for k, d in zip(kernel_shape, dilation, strict=True))
    return padding
