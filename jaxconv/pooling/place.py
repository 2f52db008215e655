"""What windows give back to their elements: a sum over windows, without a scatter."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv.loops import combined
from jaxconv.spec import Axis


def placed(g: Array, axes: Sequence[Axis], taps: Array | None = None) -> Array:
    """The sum of windows' ``g`` at their elements: at all of them, or at the one of each window
    whose number is in ``taps``. The axes have no padding.

    Element ``stride * q + phase`` is tap ``phase + stride * i`` of window ``q - i``: for each phase
    a sum over windows, of which the phases are then interleaved.
    """
    counts = [-(-axis.size // axis.stride) for axis in axes]
    reach = [-(-axis.taps // axis.stride) for axis in axes]
    edges = [(r - 1, count - a.out, 0) for a, count, r in zip(axes, counts, reach, strict=True)]
    g = lax.pad(g, np.zeros((), g.dtype), edges)
    if taps is not None:
        taps = lax.pad(taps, np.array(-1, taps.dtype), edges)
    phases = []
    for phase in itertools.product(*(range(axis.stride) for axis in axes)):
        terms = []
        for windows in itertools.product(*map(range, reach)):
            at = [p + a.stride * i for p, a, i in zip(phase, axes, windows, strict=True)]
            if any(t >= axis.taps for t, axis in zip(at, axes, strict=True)):
                continue
            starts = [r - 1 - i for r, i in zip(reach, windows, strict=True)]
            limits = [start + count for start, count in zip(starts, counts, strict=True)]
            of_window = lax.slice(g, starts, limits)
            if taps is not None:
                number = np.ravel_multi_index(at, [axis.taps for axis in axes])
                selected = lax.slice(taps, starts, limits) == np.array(number, taps.dtype)
                of_window = lax.select(selected, of_window, jnp.zeros_like(of_window))
            terms.append(of_window)
        terms = terms or [jnp.zeros_like(g, shape=counts)]  # steps are larger than the window
        phases.append(combined(terms, lax.add))
    for d, axis in reversed(list(enumerate(axes))):
        if axis.stride > 1:
            shape = list(phases[0].shape)
            shape[d] *= axis.stride
            groups = zip(*[iter(phases)] * axis.stride, strict=True)  # of consecutive phases
            phases = [jnp.stack(group, d + 1).reshape(shape) for group in groups]
    return lax.slice(phases[0], [0] * len(axes), [axis.size for axis in axes])
