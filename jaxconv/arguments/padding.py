"""Padding in all forms that the public functions take, as (low, high) pairs."""

import operator
from collections.abc import Sequence
from typing import Any, NoReturn

from jax import lax

from jaxconv.arguments import hints
from jaxconv.arguments.errors import Call
from jaxconv.spec import Pads, dilate


def to_pairs(
    call: Call,
    padding: Any,
    lhs_spatial: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    lhs_dilation: Sequence[int],
) -> Pads:
    """Padding as (low, high) pairs; strings are resolved against the dilated window."""
    if isinstance(padding, str):
        if any(d > 1 for d in lhs_dilation):
            call.fail(
                "padding must be explicit (low, high) pairs where lhs_dilation is above 1",
                repr(padding),
                "pass pairs, or use conv_transpose",
            )
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            fail_padding(call, padding)
        return tuple(lax.padtype_to_pads(lhs_spatial, window, strides, padding))
    pads = parse_pairs(call, padding, len(lhs_spatial))
    for size, d, (lo, hi) in zip(lhs_spatial, lhs_dilation, pads, strict=True):
        if dilate(size, d) + lo + hi < 0:
            call.fail(
                "negative padding must not be larger than the dimension that it crops",
                f"padding {(lo, hi)} of {dilate(size, d)} elements",
                "crop less",
            )
    return pads


def fail_padding(call: Call, padding: str) -> NoReturn:
    """Raises for a string that is no padding."""
    names = {"SAME", "SAME_LOWER", "VALID", "CAUSAL"} - {padding}  # it may be one for other strides
    choices = [name for name in sorted(names) if repr(name) in call.paddings]
    remedy = hints.of_name(padding, choices)
    call.fail(f"padding must be {call.paddings}", repr(padding), remedy)


def parse_pairs(call: Call, padding: Any, ndim: int) -> Pads:
    """Explicit padding as ``ndim`` pairs of integers."""
    try:
        pads = tuple((operator.index(lo), operator.index(hi)) for lo, hi in padding)
    except (TypeError, ValueError):
        remedy = hints.of_pads(padding, ndim)
        call.fail(f"padding must be {call.paddings} of integers", repr(padding), remedy)
    if len(pads) != ndim:
        call.fail(
            f"padding must have one (low, high) pair for each of {ndim} spatial dimensions",
            repr(padding),
            hints.of_pairs(pads, ndim),
            TypeError,
        )
    return pads


def transpose_pads(k: int, stride: int, pads: str | tuple[int, int]) -> tuple[int, int]:
    """Pads of the transpose of a convolution with window ``k`` along one axis, as lax has them."""
    if isinstance(pads, str):
        total = k + stride - 2
        if pads == "SAME":
            low = k - 1 if stride > k - 1 else -(-total // 2)
        else:  # VALID
            total, low = total + max(k - stride, 0), k - 1
    else:
        low, total = k - 1 - pads[0], 2 * (k - 1) - sum(pads)
    return low, total - low
