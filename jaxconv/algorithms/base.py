"""The record that describes an algorithm, and how any algorithm is applied."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import layout, loops
from jaxconv.spec import ConvSpec, dilate

Convolve = Callable[[Array, Array, ConvSpec], Array]


class UnsupportedConvError(ValueError):
    """The named algorithm does not support the convolution; the message says why."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an algorithm spends on one convolution.

    Attributes:
      flops: floating-point operations, a multiply and an add counted as two.
      traffic: bytes read and written, intermediate arrays included.
      workspace: peak bytes of intermediate arrays, besides operands, output and what the parts that
        it delegates take.
      gemm: (count, m, n, k) of the matrix products, of the largest where they differ; None where
        there is none.
      steps: iterations of a loop that can't run in parallel.
    """

    flops: int
    traffic: int
    workspace: int
    gemm: tuple[int, int, int, int] | None
    steps: int = 1


def no_reason(spec: ConvSpec) -> str | None:
    """For algorithms that have no objection to any ``spec``."""
    return None


def largest_index(spec: ConvSpec) -> int:
    """The largest size or distance along an axis that an index is computed from."""
    if spec.weight_gradient:
        spec = layout.forward_of(spec)
    axes = zip(spec.lhs_spatial, spec.lhs_dilation, spec.padding, strict=True)
    spans = [dilate(size, d) + max(0, lo) + max(0, hi) for size, d, (lo, hi) in axes]
    distances = (*spec.window_strides, *spec.rhs_dilation)
    return max(*spec.lhs_shape, *spans, *distances, spec.out_channels)


def zeros_between(spec: ConvSpec) -> str | None:
    """For algorithms that multiply the zeros between elements of a dilated image."""
    if max(spec.lhs_dilation, default=1) > 1 and lax.Precision.HIGHEST in spec.precision:
        return "it multiplies the zeros between elements, which NaN and infinity turn into NaN"
    return None


# Bytes/s at which XLA:CPU moves a kernel to another order: of one tap, and of several (2 to 3e9).
MOVING_ONE, MOVING = 8e8, 2.5e9


def moved_kernel(spec: ConvSpec) -> float:
    """Seconds, for algorithms that take kernels in the canonical order."""
    if spec.kernel_order == "xIO":
        return 0.0
    forward = layout.forward_of(spec) if spec.weight_gradient else spec
    size = math.prod(forward.rhs_shape) * spec.dtype.itemsize
    return size / (MOVING if forward.taps > 1 else MOVING_ONE)


def nothing(spec: ConvSpec) -> int:
    """For algorithms that compute no index, or move no kernel."""
    return 0


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One way to compute a convolution.

    Attributes:
      name: its name as the argument ``algorithm``.
      summary: what it does, in a line.
      supports: None where it can do ``spec``, else the reason why not.
      cost: what it spends on a ``spec`` that it supports.
      run: computes the convolution, given the canonical arrays, the spec, and ``convolve`` for
        smaller convolutions that it delegates. The result has dtype ``spec.accumulator_dtype`` or
        one cast from it. It never gets batch groups, numbers of less than 8 bits or empty arrays:
        ``apply`` handles them for all algorithms.
      gradient: computes a ``spec.weight_gradient``, (kernel…, c, O), given the image, the output's
        cotangent and the spec of the forward convolution. None: ``run`` computes it.
      parts: the smaller convolutions that it delegates, which XLA may compute side by side; None
        where there are none.
      by_name_only: why "auto" never takes it; None for those that "auto" may take.
      inaccurate: why its rounding error for a prepared ``spec`` may exceed twice lax's, the limit
        that "auto" promises, or why NaN and infinity spread further than lax's at precision
        "highest"; None where neither holds. It applies however fast the algorithm was measured.
      doubt: why "auto" leaves it out on CPU for a prepared ``spec``, whatever its predicted time;
        None where that time decides. Ignored if it was measured to be the fastest.
      margin: "auto" takes it if its predicted or measured time is below this share of the fastest
        other algorithm's; 1 for those whose results are as accurate as any.
      caveat: how its results fall short of others', appended to the reason for choosing it.
      moving: seconds in which XLA:CPU copies the kernel to the order in which the algorithm takes
        it, or a kernel's gradient to that of memory, where ``spec.kernel_order`` is another.
      largest_index: the largest int32 index computed at run time for a ``spec`` that it supports;
        0 where all of its slices are static.
    """

    name: str
    summary: str
    supports: Callable[[ConvSpec], str | None]
    cost: Callable[[ConvSpec], Cost]
    run: Callable[[Array, Array, ConvSpec, Convolve], Array]
    gradient: Callable[[Array, Array, ConvSpec], Array] | None = None
    parts: Callable[[ConvSpec], list[ConvSpec]] | None = None
    by_name_only: str | None = None
    inaccurate: Callable[[ConvSpec], str | None] = no_reason
    doubt: Callable[[ConvSpec], str | None] = no_reason
    margin: float = 1.0
    caveat: str = ""
    moving: Callable[[ConvSpec], float] = moved_kernel
    largest_index: Callable[[ConvSpec], int] = largest_index

    def refuses(self, spec: ConvSpec) -> str | None:
        """Why it can't do a prepared ``spec`` that is not empty; None where it can."""
        reason = self.supports(spec)
        if reason is None:
            largest = max(self.largest_index(spec), self.cost(spec).steps)
            if largest > loops.MAX_INDEX:
                reason = f"it computes indices up to {largest}, which int32 does not hold"
        return reason

    def __repr__(self) -> str:
        return f"{self.name}: {self.summary}"

    def breach(self, spec: ConvSpec) -> str | None:
        """Why "auto" must not take it for a prepared ``spec``, however fast it is."""
        return self.by_name_only or self.inaccurate(spec)


def refusal(algorithm: Algorithm, spec: ConvSpec) -> str | None:
    """Why ``algorithm`` can't do ``spec``; None where it can."""
    return None if spec.is_empty else algorithm.refuses(prepared(spec))


def prepared(spec: ConvSpec) -> ConvSpec:
    """The normalised spec passed to algorithms.

    Batch groups become feature groups, booleans and numbers of less than 8 bits a wider dtype,
    complex numbers as wide as the result.
    """
    out_dtype = spec.out_dtype
    if out_dtype == jnp.float8_e8m0fnu:
        # It has neither zero nor sign: lax turns such operands into NaN before it multiplies.
        spec = spec.replace(dtype=out_dtype)
    elif is_narrow(spec.dtype) or is_narrow(out_dtype):
        out_dtype = np.dtype(np.int32) if out_dtype == np.bool_ else spec.accumulator_dtype
        if np.issubdtype(out_dtype, np.complexfloating):
            out_dtype = np.zeros((), out_dtype).real.dtype
        same = jnp.issubdtype(out_dtype, np.integer) or jnp.issubdtype(spec.dtype, np.floating)
        spec = spec.replace(dtype=out_dtype if same else np.dtype(np.int32), out_dtype=out_dtype)
    if np.issubdtype(spec.dtype, np.complexfloating):
        # XLA has no complex convolution: JAX composes it of three real ones, whose operands are
        # sums that would be rounded to the narrower dtype before being multiplied.
        spec = spec.replace(dtype=spec.out_dtype)
    g = spec.batch_group_count
    if g > 1:
        gn, *spatial, c = spec.lhs_shape
        spec = spec.replace(
            lhs_shape=(gn // g, *spatial, g * c), feature_group_count=g, batch_group_count=1
        )
    return spec


def is_narrow(dtype: np.dtype) -> bool:
    """Whether numbers take less than 8 bits. XLA:CPU fails to compile many operations that convert
    them, and booleans as integers could not be cast to narrower or complex results."""
    if dtype == np.bool_:
        return True
    info = jnp.iinfo if jnp.issubdtype(dtype, np.integer) else jnp.finfo
    return info(dtype).bits < 8


def apply(
    algorithm: Algorithm, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve
) -> Array:
    """Runs ``algorithm`` on canonical arrays; see ``Algorithm`` for the arguments."""
    if spec.is_empty:
        return jnp.zeros(spec.out_shape, spec.out_dtype)
    todo = prepared(spec)
    reason = algorithm.refuses(todo)
    if reason is not None:
        raise UnsupportedConvError(
            f"jaxconv: algorithm {algorithm.name!r} can't do {spec}: {reason};"
            " algorithm='auto' takes one that can, if any."
        )
    lhs = layout.batch_groups_to_features(lhs, spec.batch_group_count)
    lhs, rhs = lhs.astype(todo.dtype), rhs.astype(todo.dtype)
    if todo.weight_gradient and algorithm.gradient is not None:
        image, cotangent = layout.as_forward(lhs, rhs, todo)
        kernel = algorithm.gradient(image, cotangent, layout.forward_of(todo))
        out = jnp.moveaxis(kernel, -2, 0)
    else:
        out = algorithm.run(lhs, rhs, todo, convolve)
    return out != 0 if spec.out_dtype == np.bool_ else out.astype(spec.out_dtype)
