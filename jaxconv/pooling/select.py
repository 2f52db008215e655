"""Derivatives of maxima and minima: which tap of each window is selected, and its place.

A window's elements are compared in row-major order, as XLA does: at ties the first stays, and the
one after a NaN is taken.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv.loops import combined, stored
from jaxconv.pooling.place import placed
from jaxconv.pooling.spec import Pooling, along, is_narrow
from jaxconv.pooling.windows import padded, views
from jaxconv.spec import Axis


class Selected(NamedTuple):
    """The element of each window along some axes."""

    axes: tuple[Axis, ...]
    tap: Array  # its number in the window; -1 for none


def select(x: Array, pooling: Pooling, algorithm: str) -> list[Selected]:
    """What is selected of a padded ``x``, along all axes at once or the last axis first."""
    compare = lax.ge if pooling.kind == "max" else lax.le
    dims = [pooling.pooled] if algorithm == "taps" else [(d,) for d in reversed(pooling.pooled)]
    axes = [a._replace(low=0, high=0, spacing=1) for a in pooling.axes]
    # Which elements are, or were selected from some with, a NaN: what came before is forgotten.
    nan = x != x if len(dims) > 1 and jnp.issubdtype(x.dtype, np.floating) else None
    found = []
    for those in dims:
        own = along(axes, those, x.shape)
        elements = list(views(x, own, pooling.identity))
        forget = None if nan is None else list(views(nan, own, np.array(False)))
        dtype = np.int8 if len(elements) <= np.iinfo(np.int8).max else np.int32
        value, tap = elements[0], jnp.full_like(elements[0], 0, dtype)
        from_nothing = pooling.direction == "tangent"  # lax starts from the identity, no tangent
        if from_nothing:
            value, tap = jnp.full_like(value, pooling.identity), jnp.full_like(tap, -1)
        for n, element in enumerate(elements):
            keep = compare(value, element)
            if from_nothing:  # and leaves out padding, also after a NaN
                keep |= element == pooling.identity
            if forget is not None:
                keep &= ~forget[n]
            value = lax.select(keep, value, element)
            tap = lax.select(keep, tap, jnp.full_like(tap, n))
        found.append(Selected(own, stored(tap)))
        if those != dims[-1]:
            x = stored(value)
            nan = None if forget is None else stored(combined(forget, lax.bitwise_or))
    return found


def gradient(cotangent: Array, x: Array, pooling: Pooling, algorithm: str) -> Array:
    """``select_and_scatter_add``: each cotangent added at the selected element of its window."""
    whole, _ = padded(x, pooling.axes, pooling.identity)
    dtype = cotangent.dtype
    g = cotangent.astype(np.float32) if is_narrow(dtype) else cotangent
    found = select(whole, pooling, algorithm)
    for selected in reversed(found):
        g = placed(g, *selected)
        if selected is not found[0]:
            g = stored(g)
    starts = [axis.low for axis in pooling.axes]
    limits = [low + size for low, size in zip(starts, x.shape, strict=True)]
    return lax.slice(g, starts, limits).astype(dtype)


def tangent(tangents: Array, x: Array, pooling: Pooling, algorithm: str) -> Array:
    """``select_and_gather_add``: the tangent of the selected element of each window."""
    whole, _ = padded(x, pooling.axes, pooling.identity)
    t, _ = padded(tangents, pooling.axes, np.zeros((), tangents.dtype))
    for selected in select(whole, pooling, algorithm):
        out = jnp.full_like(t, 0, shape=selected.tap.shape)
        for n, element in enumerate(views(t, selected.axes, np.zeros((), t.dtype))):
            is_it = selected.tap == np.array(n, selected.tap.dtype)
            out = lax.select(is_it, element, out)
        t = stored(out)
    return t
