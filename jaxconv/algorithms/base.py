"""What an algorithm is, and how any algorithm is applied."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import layout, loops
from jaxconv.spec import ConvSpec

Convolve = Callable[[Array, Array, ConvSpec], Array]


class UnsupportedConvError(ValueError):
    """The named algorithm does not support the convolution; the message says why."""


class Cost(NamedTuple):
    """What an algorithm spends on one convolution."""

    flops: int  # floating-point operations, a multiply and an add counted as two
    traffic: int  # bytes read and written, intermediate arrays included
    workspace: int  # peak bytes of intermediate arrays, without those of delegated parts
    gemm: tuple[int, int, int, int] | None  # (count, m, n, k) of its products, or of the largest
    steps: int = 1  # of a loop that can't run in parallel


# Bytes/s at which XLA:CPU moves a kernel to another order: of one tap, and of several (2 to 3e9).
MOVING_ONE, MOVING = 8e8, 2.5e9


class Algorithm:
    """One way to compute a convolution.

    The defaults are those of an algorithm that does every convolution and sums its very products.
    Each ``spec`` is a prepared one that is not empty: see ``prepared``.
    """

    name: str  # as the argument ``algorithm``
    summary: str  # what it does, in a line
    # "auto" takes it if its predicted or measured time is below this share of the fastest other
    # algorithm's; 1 for those whose results are as accurate as any.
    margin: float = 1.0
    rereads: bool = True  # whether elements of the operands are read by several operations
    static: bool = False  # whether it computes no index at run time: all slices are static
    caveat: str = ""  # how its results fall short of others', appended to a plan's reason

    def unsupported(self, spec: ConvSpec) -> str | None:
        """Why it can't do ``spec``; None where it can."""
        return None

    def excluded(self, spec: ConvSpec) -> str | None:
        """Why "auto" never takes it for ``spec``, however fast: its rounding error may exceed twice
        lax's, or NaN and infinity spread further than lax's at precision "highest"."""
        if max(spec.lhs_dilation, default=1) > 1 and lax.Precision.HIGHEST in spec.precision:
            return "it multiplies the zeros between elements, which NaN and infinity turn into NaN"
        return None

    def doubted(self, spec: ConvSpec) -> str | None:
        """Why "auto" on CPU omits it whatever its predicted time, unless it was measured to be
        the fastest; None where that time decides."""
        return None

    def cost(self, spec: ConvSpec) -> Cost:
        """What it spends on a ``spec`` that it supports."""
        raise NotImplementedError

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        """The convolution of canonical arrays, of dtype ``spec.accumulator_dtype`` or cast from it.

        It never gets batch groups, numbers of less than 8 bits or empty arrays: ``apply`` handles
        them for all. ``convolve`` computes the smaller convolutions of ``parts``.
        """
        raise NotImplementedError

    def gradient(self, image: Array, cotangent: Array, spec: ConvSpec) -> Array:
        """The gradient (kernel…, c, O) with respect to the kernel of a forward ``spec``; for those
        that don't override it, ``run`` computes the convolution that it is."""
        raise NotImplementedError

    def spread(self, spec: ConvSpec) -> tuple[int, ...] | None:
        """How far it spreads NaN and infinity; None where they stay where the definition has them.

        Of any so many neighbouring outputs along each spatial axis, the first of those that one
        reaches is not finite, and with it that of all output channels of the group; so is one in
        the kernel in all positions. See ``repaired``.
        """
        return None

    def parts(self, spec: ConvSpec) -> list[ConvSpec]:
        """The smaller convolutions that it delegates, which XLA may compute side by side."""
        return []

    def moving(self, spec: ConvSpec) -> float:
        """Seconds in which XLA:CPU copies the kernel to the order in which the algorithm takes it,
        or a kernel's gradient to that of memory: by default, from or to the canonical one."""
        forward = spec.forward
        size = math.prod(forward.rhs_shape) * spec.dtype.itemsize
        speed = MOVING if forward.taps > 1 else MOVING_ONE
        return 0.0 if spec.kernel_order == "xIO" else size / speed

    def largest_index(self, spec: ConvSpec) -> int:
        """The largest index computed at run time, by default of any size, distance or step."""
        return 0 if self.static else max(spec.forward.largest_size, self.cost(spec).steps)

    def __reduce__(self) -> str:
        return self.name.upper()  # its variable: copying and unpickling return this very object

    def __repr__(self) -> str:
        return f"{self.name}: {self.summary}"


def unsupported(algorithm: Algorithm, spec: ConvSpec) -> str | None:
    """Why ``algorithm`` can't do any ``spec``; None where it can."""
    if spec.is_empty:
        return None
    spec = prepared(spec)
    reason = algorithm.unsupported(spec)
    if reason is None and (largest := algorithm.largest_index(spec)) > loops.MAX_INDEX:
        reason = f"it computes indices up to {largest}, which int32 does not hold"
    return reason


def prepared(spec: ConvSpec) -> ConvSpec:
    """The normalised spec passed to algorithms: batch groups become feature groups, booleans and
    numbers of less than 8 bits a wider dtype, complex numbers as wide as the result."""
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
    (gn, *spatial, c), g = spec.lhs_shape, spec.batch_group_count
    if g == 1:
        return spec
    shape = gn // g, *spatial, g * c
    return spec.replace(lhs_shape=shape, feature_group_count=g, batch_group_count=1)


def is_narrow(dtype: np.dtype) -> bool:
    """Whether numbers take less than 8 bits. XLA:CPU fails to compile many operations that convert
    them, and booleans as integers could not be cast to narrower or complex results."""
    if dtype == np.bool_:
        return True
    info = jnp.iinfo if jnp.issubdtype(dtype, np.integer) else jnp.finfo
    return info(dtype).bits < 8


def repaired(out: Array, groups: int, spread: Sequence[int], direct: Callable[[], Array]) -> Array:
    """``out`` where no operand had NaN or infinity, else what ``direct`` computes.
    They are looked for in one channel of each group at every ``spread``-th and the last position,
    and in one position: all outputs would be read from memory again. A loop of no step or of one is
    run in place by XLA; the branches of a conditional are copied."""
    first = out[..., :: out.shape[-1] // groups]
    every = (slice(None, None, s) for s in spread)
    seen = [out[(0,) * (out.ndim - 1)], first[(slice(None), *every)]]
    seen += [lax.index_in_dim(first, -1, 1 + d) for d, s in enumerate(spread) if s > 1]
    broken = ~jnp.stack([jnp.isfinite(x).all() for x in seen]).all()

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.zeros_like(state[0]), direct()

    return lax.while_loop(lambda state: state[0], again, (broken, out))[1]


def apply(
    algorithm: Algorithm,
    lhs: Array,
    rhs: Array,
    spec: ConvSpec,
    convolve: Convolve,
    by_xla: Convolve | None = None,
) -> Array:
    """Runs ``algorithm`` on canonical arrays; ``by_xla`` where it would spread NaN or infinity."""
    if spec.is_empty:
        return jnp.zeros(spec.out_shape, spec.out_dtype)
    todo = prepared(spec)
    if reason := unsupported(algorithm, todo):
        raise UnsupportedConvError(
            f"jaxconv: algorithm {algorithm.name!r} can't do {spec}: {reason};"
            " algorithm='auto' takes one that can, if any."
        )
    lhs = layout.batch_groups_to_features(lhs, spec.batch_group_count)
    lhs, rhs = lhs.astype(todo.dtype), rhs.astype(todo.dtype)
    if todo.weight_gradient and type(algorithm).gradient is not Algorithm.gradient:
        kernel = algorithm.gradient(*layout.as_forward(lhs, rhs, todo), todo.forward)
        out = jnp.moveaxis(kernel, -2, 0)
    else:
        out = algorithm.run(lhs, rhs, todo, convolve)
    out = out != 0 if spec.out_dtype == np.bool_ else out.astype(spec.out_dtype)
    spread = algorithm.spread(todo)
    if spread is None or by_xla is None:
        return out
    return repaired(out, todo.groups, spread, lambda: by_xla(lhs, rhs, todo).astype(spec.out_dtype))
