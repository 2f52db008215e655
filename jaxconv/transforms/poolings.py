"""Poolings that choose how they are computed when they are lowered: lax's window reductions and
their derivatives."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax import lax

from jaxconv import compat
from jaxconv.compat import mlir
from jaxconv.pooling.choose import choose, run
from jaxconv.pooling.spec import KINDS, Pooling
from jaxconv.transforms.planned import Planned
from jaxconv.transforms.primitive import Lowered, observers


def _params(avals: Any, params: dict[str, Any], algorithm: str) -> dict[str, Any] | None:
    """Other algorithms by name are for convolutions; "xla" leaves poolings with it too."""
    numbers = compat.is_constant_shape([size for aval in avals for size in aval.shape])
    return {**params, "algorithm": "auto"} if numbers and algorithm != "xla" else None


def _rule(original: Any, platform: str) -> Callable[..., Any]:
    """The lowering of one of lax's poolings."""
    by_xla = compat.lowering_rule(original, platform)

    def rule(ctx: Any, *operands: Any, algorithm: str = "auto", **params: Any) -> Any:
        if _params(ctx.avals_in, params, algorithm) is None:
            return by_xla(ctx, *operands, **params)
        pooling = Pooling.from_params(original.name, ctx.avals_in[-1], params)
        algorithm, _ = choose(pooling, platform)
        # XLA's partitioner knows its own operation, for which devices exchange borders only.
        explicit = compat.has_explicit_sharding(*ctx.avals_in, *ctx.avals_out)
        if compat.lowered_for(ctx)[0] > 1 or explicit:
            algorithm = "xla"
        for observe in observers:
            observe(Lowered(pooling, algorithm, platform))
        if algorithm == "xla":
            return by_xla(ctx, *operands, **params)
        return mlir.lower_fun(partial(run, pooling, algorithm), multiple_results=False)(
            ctx, *operands
        )

    return rule


# By lax's primitive and platform, as lax's rules were when jaxconv was imported: ``enable`` puts
# these in their place.
RULES: dict[Any, dict[str, Callable[..., Any]]] = {}
POOLINGS: dict[str, Planned] = {}
for _name in KINDS:
    _original = getattr(lax, f"{_name}_p")
    POOLINGS[_name] = Planned(f"jaxconv_{_name}", _original, _params)
    RULES[_original] = {where: _rule(_original, where) for where in ("cpu", "gpu", "tpu", "other")}
    for _platform, _own in RULES[_original].items():
        _where = None if _platform == "other" else _platform
        mlir.register_lowering(POOLINGS[_name], _own, platform=_where)
