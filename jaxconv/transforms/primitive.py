"""The convolution that plans when it is lowered, and what is known then about its operands."""

from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array

from jaxconv import compat, layout
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import unsupported
from jaxconv.arguments.parse import plannable
from jaxconv.compat import EVERYWHERE, Primitive, conv_general_dilated_p, mlir
from jaxconv.planning.choose import run
from jaxconv.pooling.spec import Pooling
from jaxconv.sharding.partition import PartOf, partitioned
from jaxconv.spec import ConvSpec
from jaxconv.transforms.origins import is_moved, is_remade
from jaxconv.transforms.planned import Planned


def _params(avals: Any, params: dict[str, Any], algorithm: str) -> dict[str, Any] | None:
    """The planned parameters of lax's convolution, by "auto" where ``algorithm`` can't do it."""
    lhs, rhs = avals
    if not plannable(lhs, rhs, params):
        return None
    if algorithm != "auto":
        spec = ConvSpec.from_params(lhs, rhs, params)
        algorithm = algorithm if unsupported(ALGORITHMS[algorithm], spec) is None else "auto"
    return {**params, "algorithm": algorithm}


class Lowered(NamedTuple):
    """A convolution as it is lowered, or a pooling."""

    # In a program for several devices, what one of them computes.
    spec: ConvSpec | Pooling
    algorithm: str  # as asked for; that of a pooling as chosen
    platform: str
    part_of: PartOf | None = None  # if ``spec`` is a device's part


# What "auto" planned in this process, and for which platform: the last of them.
_planned_here = deque[tuple[ConvSpec, str]](maxlen=4096)


def _remember(lowered: Lowered) -> None:
    spec = lowered.spec
    if lowered.algorithm == "auto" and isinstance(spec, ConvSpec) and not spec.is_empty:
        _planned_here.append((spec, lowered.platform))


def planned_here(platform: str) -> list[ConvSpec]:
    """The convolutions that "auto" planned in this process for ``platform``, each once."""
    return list(dict.fromkeys(spec for spec, where in _planned_here.copy() if where == platform))


# Each is called with every convolution and every pooling that is lowered.
observers: list[Callable[[Lowered], None]] = [_remember]


# A second primitive, whose rule JAX calls once for equal convolutions. That of the first looks at
# where operands come from, and is called for each.
lowered_p = Primitive("jaxconv_lowered")


class Known(NamedTuple):
    """What is known about a convolution where it is lowered."""

    moved: bool  # ``is_moved(lhs)``
    remade: tuple[bool, bool]  # ``is_remade`` of both operands
    wanted: Collection[str] = EVERYWHERE  # the platforms that it is planned on
    part_of: PartOf | None = None  # as in ``Lowered``


@lowered_p.def_effectful_abstract_eval
def _(lhs: Any, rhs: Any, *, known: Known, **params: Any) -> Any:
    return conv_p.evaluated(lhs, rhs, **params)


def _run(
    platform: str, lhs: Array, rhs: Array, *, algorithm: str, known: Known, **params: Any
) -> Array:
    algorithm = algorithm if platform in known.wanted else "xla"
    spec, numbers = ConvSpec.from_params(lhs, rhs, params), params["dimension_numbers"]
    for observe in observers:
        observe(Lowered(spec, algorithm, platform, known.part_of))
    lhs, rhs = layout.to_canonical(lhs, rhs, numbers)
    out = run(lhs, rhs, spec, algorithm, platform, known.moved, known.remade)
    return layout.from_canonical(out, numbers)


# Any other platform is treated as an accelerator, where XLA's convolution is chosen. Equal
# convolutions call one function: written out at each place, they were 36,000 operations instead of
# 10,800 of ConvNeXt-T's training step, from which XLA makes the same program.
for _platform in EVERYWHERE:
    _rule = mlir.lower_fun(partial(_run, _platform), multiple_results=False)
    _where = None if _platform == "other" else _platform
    mlir.register_lowering(lowered_p, _rule, platform=_where, inline=False)


def _lower(
    ctx: Any, lhs: Any, rhs: Any, wanted: Collection[str] = EVERYWHERE, **params: Any
) -> Any:
    remade, moved = (is_remade(ctx, lhs), is_remade(ctx, rhs)), is_moved(ctx, lhs)
    devices, asks = compat.lowered_for(ctx)
    if devices > 1:
        shapes = (aval.shape for aval in (*ctx.avals_in, *ctx.avals_out))
        if asks and 0 not in [size for shape in shapes for size in shape]:
            (out,) = partitioned(ctx, lhs, rhs, params | {"out_sharding": None}, _part, devices)
            return [compat.with_sharding_in_type(ctx, out)]
        # XLA would gather whole arrays for the loops and slices of others.
        moved = False
        if params["algorithm"] == "auto":
            params = params | {"algorithm": "xla"}
    bind = partial(lowered_p.bind, known=Known(moved, remade, wanted))
    lower = mlir.lower_fun(bind, multiple_results=False)
    if not compat.has_explicit_sharding(*ctx.avals_in, *ctx.avals_out):
        return lower(ctx, lhs, rhs, **params)
    with compat.no_mesh():
        plain = compat.without_shardings(ctx)
        (out,) = lower(plain, lhs, rhs, **params | {"out_sharding": None})
    return [compat.with_sharding_in_type(ctx, out)]


def _part(lhs: Array, rhs: Array, *, algorithm: str, part_of: PartOf, **params: Any) -> Array:
    """What a device computes. An algorithm that can't do its part is replaced by "auto"."""
    planned = _params((jax.typeof(lhs), jax.typeof(rhs)), params, algorithm)
    planned = planned or params | {"algorithm": "xla"}
    known = Known(False, (True, True), part_of=part_of)
    return lowered_p.bind(lhs, rhs, **planned, known=known)


conv_p = Planned("jaxconv", conv_general_dilated_p, _params, _lower)
