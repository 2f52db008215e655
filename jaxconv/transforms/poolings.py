"""lax's window reductions and their derivatives, planned when they are lowered."""

from collections.abc import Collection
from functools import partial
from typing import Any

from jax import lax

from jaxconv import compat
from jaxconv.compat import EVERYWHERE, Primitive, mlir
from jaxconv.pooling.choose import choose, run
from jaxconv.pooling.spec import KINDS, Pooling
from jaxconv.transforms.origins import is_remade
from jaxconv.transforms.planned import Planned
from jaxconv.transforms.primitive import Lowered, observers

# Constants of zeros, as MLIR prints them.
ZEROS = "dense<0>", "dense<0.000000e+00>", "dense<(0.000000e+00,0.000000e+00)>"
ORIGINALS = [getattr(lax, f"{name}_p") for name in KINDS]
# lax's rules as they were when jaxconv was imported, since ``enable`` replaces them.
_BY_XLA = {(p, where): compat.lowering_rule(p, where) for p in ORIGINALS for where in EVERYWHERE}


def _params(avals: Any, params: dict[str, Any], algorithm: str) -> dict[str, Any] | None:
    """Other algorithms by name are for convolutions; "xla" leaves poolings with it too."""
    numbers = compat.is_constant_shape([size for aval in avals for size in aval.shape])
    return {**params, "algorithm": "auto"} if numbers and algorithm != "xla" else None


def _lower_on(
    platform: str, ctx: Any, *operands: Any, original: Any, wanted: Collection[str], **params: Any
) -> Any:
    """The lowering on one platform."""
    pooling = Pooling.from_params(original.name, ctx.avals_in[-1], params)
    algorithm, _ = choose(pooling, platform)
    # XLA's partitioner knows its own operation, for which devices exchange borders only.
    explicit = compat.has_explicit_sharding(*ctx.avals_in, *ctx.avals_out)
    if platform not in wanted or compat.lowered_for(ctx)[0] > 1 or explicit:
        algorithm = "xla"
    for observe in observers:
        observe(Lowered(pooling, algorithm, platform))
    if algorithm == "xla":
        return _BY_XLA[original, platform](ctx, *operands, **params)
    remade = is_remade(ctx, operands[-1])
    if pooling.kind == "sum":
        (x,) = operands
        pooling, x = _without_holes(pooling, x)
        operands, (aval,) = (x,), ctx.avals_in
        ctx = ctx.replace(avals_in=[aval.update(shape=pooling.shape)])
    compute = partial(run, pooling, algorithm, remade=remade)
    return mlir.lower_fun(compute, multiple_results=False)(ctx, *operands)


def _without_holes(pooling: Pooling, x: Any) -> tuple[Pooling, Any]:
    """The same sum of what ``x`` is before zeros are put around and between its elements, as in the
    gradient of a mean; unchanged where it is made otherwise."""
    op = x.owner
    if getattr(op, "name", "") != "stablehlo.pad" or max(a.spacing for a in pooling.axes) > 1:
        return pooling, x
    inner, value = op.operands
    constant = getattr(value.owner, "name", "") == "stablehlo.constant"
    if not constant or not str(value.owner.attributes["value"]).startswith(ZEROS):
        return pooling, x
    names = "edge_padding_low", "edge_padding_high", "interior_padding"
    pads = zip(*(map(int, op.attributes[name]) for name in names), strict=True)
    shape = tuple(inner.type.shape)
    axes = tuple(
        a._replace(size=size, low=a.low + low, high=a.high + high, spacing=1 + interior)
        for a, size, (low, high, interior) in zip(pooling.axes, shape, pads, strict=True)
    )
    return pooling.replace(shape=shape, axes=axes), inner


# For programs for several platforms, each of which has a rule of its own.
pooled_p = Primitive("jaxconv_pooled")


@pooled_p.def_effectful_abstract_eval
def _(*avals: Any, original: Any, wanted: Any, **params: Any) -> Any:
    return original.abstract_eval(*avals, **params)


for _platform in EVERYWHERE:
    _where = None if _platform == "other" else _platform
    mlir.register_lowering(pooled_p, partial(_lower_on, _platform), platform=_where)


def _lower(ctx: Any, *operands: Any, algorithm: str, **params: Any) -> Any:
    platform, *others = compat.platforms_of(ctx)
    if not others:
        return _lower_on(platform, ctx, *operands, **params)
    return mlir.lower_fun(pooled_p.bind, multiple_results=False)(ctx, *operands, **params)


POOLINGS: dict[str, Planned] = {}
for _original in ORIGINALS:
    _rule = partial(_lower, original=_original, wanted=EVERYWHERE)
    POOLINGS[_original.name] = Planned(f"jaxconv_{_original.name}", _original, _params, _rule)
