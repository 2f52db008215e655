"""``Pooling``: the static description of one of lax's window reductions, or of its derivative."""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxconv.spec import Axis

# lax's primitives by name: what is reduced by, and which of its derivatives it is.
KINDS = {
    "reduce_window_max": ("max", "forward"),
    "reduce_window_min": ("min", "forward"),
    "reduce_window_sum": ("sum", "forward"),
    "select_and_scatter_add": ("", "gradient"),
    "select_and_gather_add": ("", "tangent"),
}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """The static description of one window reduction; equal ones have equal hashable values."""

    kind: str  # "max", "min", "sum"
    direction: str  # "forward", "gradient", "tangent"
    shape: tuple[int, ...]  # of the operand
    dtype: np.dtype
    axes: tuple[Axis, ...]  # of all dimensions

    @classmethod
    def from_params(cls, name: str, operand: Any, params: Mapping[str, Any]) -> "Pooling":
        """That of a primitive of this name, whose last operand is ``operand``."""
        kind, direction = KINDS[name]
        kind = kind or {"ge": "max", "le": "min"}[params["select_prim"].name]
        ones, pads = (1,) * len(operand.shape), list(zip(*params["padding"], strict=True))
        dilations = (params.get(f"{what}_dilation", ones) for what in ("base", "window"))
        window, strides = params["window_dimensions"], params["window_strides"]
        each = zip(operand.shape, window, strides, *(pads or [(), ()]), *dilations, strict=True)
        axes = tuple(Axis._make(map(operator.index, axis)) for axis in each)
        return cls(kind, direction, tuple(operand.shape), np.dtype(operand.dtype), axes)

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(axis.out for axis in self.axes)

    @cached_property
    def pooled(self) -> tuple[int, ...]:
        """The dimensions that are pooled."""
        return tuple(d for d, axis in enumerate(self.axes) if axis != neutral(axis.size))

    @property
    def overlaps(self) -> bool:
        """Whether an element is in several windows."""
        return any(axis.taps > 1 and axis.window > axis.stride for axis in self.axes)

    def replace(self, **changes: Any) -> "Pooling":
        return dataclasses.replace(self, **changes)

    @cached_property
    def taps(self) -> int:
        return math.prod(axis.taps for axis in self.axes)

    @cached_property
    def identity(self) -> np.ndarray:
        """What padding counts as."""
        if self.kind == "sum":
            return np.zeros((), self.dtype)
        if jnp.issubdtype(self.dtype, np.floating):
            return np.array(-np.inf if self.kind == "max" else np.inf, self.dtype)
        if self.dtype == np.bool_:
            return np.array(self.kind == "min")
        limits = jnp.iinfo(self.dtype)
        return np.array(limits.min if self.kind == "max" else limits.max, self.dtype)

    def __str__(self) -> str:
        """In one line: ``max 3×3 of float32[8,112,112,64] → [8,56,56,64], strides (2, 2)``."""

        def of(name: str) -> tuple[Any, ...]:
            return tuple(getattr(self.axes[d], name) for d in self.pooled)

        def shape(sizes: Sequence[int]) -> str:
            return f"[{','.join(map(str, sizes))}]"

        window = "×".join(map(str, of("taps")))
        names = {"strides": "stride", "base_dilation": "spacing", "window_dilation": "dilation"}
        words = [f"{word} {of(name)}" for word, name in names.items() if set(of(name)) - {1}]
        pads = tuple(zip(of("low"), of("high"), strict=True))
        words += [f"padding {pads}"] if any(map(any, pads)) else []
        which = "" if self.direction == "forward" else f" {self.direction}"
        sizes = f"{self.dtype.name}{shape(self.shape)} → {shape(self.out_shape)}"
        return ", ".join([f"{self.kind}{which} {window} of {sizes}", *words])


def neutral(size: int) -> Axis:
    """An axis along which nothing is pooled."""
    return Axis(size, 1, 1, 0, 0, 1, 1)


def along(axes: Sequence[Axis], dims: Sequence[int], shape: Sequence[int]) -> tuple[Axis, ...]:
    """``axes`` for an array of ``shape``, with nothing pooled but along ``dims``."""
    each = enumerate(zip(axes, shape, strict=True))
    return tuple(a._replace(size=n) if d in dims else neutral(n) for d, (a, n) in each)


def is_narrow(dtype: Any) -> bool:
    """Whether sums of floats of this dtype are taken in a wider one."""
    return jnp.issubdtype(dtype, np.floating) and dtype.itemsize < 4
