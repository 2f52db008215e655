"""The primitive that plans when it is lowered.

Its parameters are those of lax's convolution, and ``algorithm``. Derivatives and batching reuse
lax's rules: they are applied to lax's convolution, and the convolutions in the result are replaced
by this primitive. Each derived convolution is thus planned in turn.
"""

import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
from jax import Array

from jaxconv import layout
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import unsupported
from jaxconv.arguments.parse import well_formed
from jaxconv.compat import (
    Offloadable,
    Primitive,
    SaveableType,
    ad,
    add_rules,
    apply_primitive,
    batching,
    conv_general_dilated_p,
    ensure_enum,
    eval_jaxpr,
    has_explicit_sharding,
    is_constant_shape,
    lowered_for,
    mem_kind_to_space,
    mlir,
    no_mesh,
    partial_eval,
    with_eqns,
    with_sharding_in_type,
    without_shardings,
)
from jaxconv.planning.choose import run
from jaxconv.spec import ConvSpec
from jaxconv.transforms.partition import partitioned


class _Convolution(Primitive):
    def bind(self, *args: Any, **params: Any) -> Any:
        add_rules(self)
        return super().bind(*args, **params)


conv_p = _Convolution("jaxconv")
conv_p.def_impl(partial(apply_primitive, conv_p))


@conv_p.def_effectful_abstract_eval
def _abstract_eval(lhs: Any, rhs: Any, *, algorithm: str, **params: Any) -> Any:
    return conv_general_dilated_p.abstract_eval(lhs, rhs, **params)


def planned_params(
    lhs: Any, rhs: Any, params: dict[str, Any], algorithm: str
) -> dict[str, Any] | None:
    """This primitive's parameters for lax's convolution of these types; None to leave it to lax.

    An algorithm that does not support the convolution is replaced by "auto".
    """
    if not plannable(lhs, rhs, params):
        return None
    if algorithm != "auto":
        spec = ConvSpec.from_params(lhs, rhs, params)
        algorithm = algorithm if unsupported(ALGORITHMS[algorithm], spec) is None else "auto"
    return {**params, "algorithm": algorithm}


def planned_eqn(eqn: Any, algorithm: str) -> Any:
    """``eqn`` with this primitive in place of lax's; ``eqn`` itself if it is left to lax."""
    if eqn.primitive is not conv_general_dilated_p:
        return eqn
    lhs, rhs = eqn.invars
    params = planned_params(lhs.aval, rhs.aval, eqn.params, algorithm)
    return eqn if params is None else eqn.replace(primitive=conv_p, params=params)


def plannable(lhs: Any, rhs: Any, params: dict[str, Any]) -> bool:
    """Whether jaxconv plans this convolution: it has no symbolic sizes, and lax can compile it."""
    return is_constant_shape((*lhs.shape, *rhs.shape)) and well_formed(rhs.shape, params)


def _planned(algorithm: str, fun: Callable[..., Any], *args: Any) -> Any:
    """``fun(*args)`` with lax's convolutions replaced by this primitive."""
    closed, tree = _jaxpr(algorithm, fun, *map(jax.typeof, args))
    return jax.tree.unflatten(tree, eval_jaxpr(closed, *args))


@lru_cache(maxsize=4096)
def _jaxpr(algorithm: str, fun: Callable[..., Any], *avals: Any) -> Any:
    """The jaxpr of ``fun`` with this primitive in place of lax's, and the tree of its outputs."""
    closed, out = jax.make_jaxpr(fun, return_shape=True)(*avals)
    eqns = [planned_eqn(eqn, algorithm) for eqn in closed.eqns]
    return with_eqns(closed, eqns), jax.tree.structure(out)


Params = tuple[tuple[str, Any], ...]


# Cached: the same arguments return the same function, so that JAX reuses its trace.
@lru_cache(maxsize=4096)
def _transpose(operand: int, aval: Any, params: Params) -> Callable[..., Any]:
    def transpose(cotangent: Array, other: Array) -> Any:
        operands: list[Any] = [other, other]
        operands[operand] = ad.UndefinedPrimal(aval)
        rule = ad.get_primitive_transpose(conv_general_dilated_p)
        return rule(cotangent, *operands, **dict(params))[operand]

    return transpose


def _transpose_lhs(cotangent: Array, lhs: Any, rhs: Array, *, algorithm: str, **params: Any) -> Any:
    return _planned(algorithm, _transpose(0, lhs.aval, tuple(params.items())), cotangent, rhs)


def _transpose_rhs(cotangent: Array, lhs: Array, rhs: Any, *, algorithm: str, **params: Any) -> Any:
    if 0 in cotangent.shape:
        return ad.Zero(rhs.aval)
    return _planned(algorithm, _transpose(1, rhs.aval, tuple(params.items())), cotangent, lhs)


ad.defbilinear(conv_p, _transpose_lhs, _transpose_rhs)


@lru_cache(maxsize=4096)
def _batched(
    axis_data: Any, dims: Any, params: Params, *avals: Any
) -> tuple[Callable[..., Any], list[int | None]]:
    """The batched convolution, and a list that tracing fills with its output batch axis."""
    out_dims = []

    def batched(lhs: Array, rhs: Array) -> Any:
        rule = batching.fancy_primitive_batchers[conv_general_dilated_p]
        out, out_dim = rule(axis_data, (lhs, rhs), dims, **dict(params))
        out_dims.append(out_dim)
        return out

    return batched, out_dims


def _batch(axis_data: Any, args: Any, dims: Any, *, algorithm: str, **params: Any) -> Any:
    avals = map(jax.typeof, args)
    batched, out_dims = _batched(axis_data, tuple(dims), tuple(params.items()), *avals)
    out = _planned(algorithm, batched, *args)
    return out, out_dims[-1]


batching.fancy_primitive_batchers[conv_p] = _batch


def _partial_eval(
    policy: Callable[..., Any], unknown: Any, instantiated: Any, eqn: Any
) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
    """``jax.checkpoint``'s default rule, except that ``policy`` is asked about lax's primitive.

    Rematerialisation policies know only that one.
    """
    inputs = [x for x, instance in zip(eqn.invars, instantiated, strict=True) if not instance]
    if any(unknown):
        return None, eqn, [True], [True], inputs
    avals = [x.aval for x in eqn.invars]
    params = {key: value for key, value in eqn.params.items() if key != "algorithm"}
    case = ensure_enum(policy(conv_general_dilated_p, *avals, **params))
    if isinstance(case, SaveableType):
        return eqn, None, [False], [False], []
    if not isinstance(case, Offloadable):
        return eqn, eqn, [False], [True], inputs
    src, dst = map(mem_kind_to_space, case)

    def offloaded(lhs: Array, rhs: Array) -> tuple[Array, Array]:
        out = conv_p.bind(lhs, rhs, **eqn.params)
        return out, jax.device_put(out, dst, may_alias=False)

    def reloaded(out: Array) -> Array:
        return jax.device_put(out, src, may_alias=False)

    # A rule returns one equation for each side, so the two of the known side are put in a jit.
    (known,) = jax.make_jaxpr(jax.jit(offloaded))(*avals).eqns
    residual = known.outvars[1]
    (staged,) = jax.make_jaxpr(reloaded)(residual.aval).eqns
    known = known.replace(
        invars=eqn.invars, outvars=[*eqn.outvars, residual], source_info=eqn.source_info
    )
    staged = staged.replace(invars=[residual], outvars=eqn.outvars)
    return known, staged, [False], [True], [residual]


partial_eval.partial_eval_jaxpr_custom_rules[conv_p] = _partial_eval


_planned_here: dict[tuple[ConvSpec, str], None] = {}
_planned_lock = threading.Lock()
REMEMBERED = 4096


def _remember(spec: ConvSpec, algorithm: str, platform: str) -> None:
    if algorithm != "auto" or spec.is_empty:
        return
    with _planned_lock:
        _planned_here[spec, platform] = None
        if len(_planned_here) > REMEMBERED:
            del _planned_here[next(iter(_planned_here))]


def planned_here(platform: str) -> list[ConvSpec]:
    """The convolutions that "auto" planned in this process for ``platform``, each once; the last
    ``REMEMBERED`` of them."""
    with _planned_lock:
        return [spec for spec, where in _planned_here if where == platform]


# Called for each convolution that is lowered, with its spec, ``algorithm`` and the platform.
observers: list[Callable[[ConvSpec, str, str], None]] = [_remember]


def lowering(platform: str, moved: bool | None = None) -> Callable[..., Any]:
    """The lowering rule of a convolution for ``platform``: by ``algorithm``, or planned.

    Args:
      moved: whether an image channels first is one of those of ``is_moved``; None if the primitive
        has that as a parameter.
    """

    def lowered(lhs: Array, rhs: Array, *, algorithm: str = "auto", **params: Any) -> Array:
        last = params.pop("moved") if moved is None else moved
        spec = ConvSpec.from_params(lhs, rhs, params)
        for observe in observers:
            observe(spec, algorithm, platform)
        dimension_numbers = params["dimension_numbers"]
        lhs, rhs = layout.to_canonical(lhs, rhs, dimension_numbers)
        out = run(lhs, rhs, spec, algorithm, platform, last)
        return layout.from_canonical(out, dimension_numbers)

    return mlir.lower_fun(lowered, multiple_results=False)


# A second primitive, whose rule JAX calls once for equal convolutions. That of the first looks at
# where an image comes from, and is called for each.
lowered_p = Primitive("jaxconv_lowered")


@lowered_p.def_effectful_abstract_eval
def _lowered_abstract_eval(lhs: Any, rhs: Any, *, moved: bool, **params: Any) -> Any:
    return _abstract_eval(lhs, rhs, **params)


for _platform in ("cpu", "gpu", "tpu"):
    mlir.register_lowering(lowered_p, lowering(_platform), platform=_platform)
# Any other platform is treated as an accelerator, where XLA's convolution is chosen.
mlir.register_lowering(lowered_p, lowering("other"))


def _looked_up(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    out = for_several_devices(ctx, lhs, rhs, params)
    return _lowered(ctx, lhs, rhs, params, is_moved(lhs)) if out is None else out


def for_several_devices(ctx: Any, lhs: Any, rhs: Any, params: dict[str, Any]) -> Any:
    """The lowering of this primitive in a program that XLA partitions; None in any other."""
    devices, asks = lowered_for(ctx)
    if devices == 1:
        return None
    lhs_aval, rhs_aval = ctx.avals_in
    if asks and 0 not in (*lhs_aval.shape, *rhs_aval.shape, *ctx.avals_out[0].shape):
        (out,) = partitioned(ctx, lhs, rhs, params | {"out_sharding": None}, _part, devices)
        return [with_sharding_in_type(ctx, out)]
    # XLA would gather whole arrays for the loops and slices of others.
    algorithm = "xla" if params["algorithm"] == "auto" else params["algorithm"]
    return _lowered(ctx, lhs, rhs, params | {"algorithm": algorithm}, False)


def _lowered(ctx: Any, lhs: Any, rhs: Any, params: dict[str, Any], moved: bool) -> Any:
    bind = partial(lowered_p.bind, moved=moved)
    lower = mlir.lower_fun(bind, multiple_results=False)
    if not has_explicit_sharding(*ctx.avals_in, *ctx.avals_out):
        return lower(ctx, lhs, rhs, **params)
    with no_mesh():
        (out,) = lower(without_shardings(ctx), lhs, rhs, **params | {"out_sharding": None})
    return [with_sharding_in_type(ctx, out)]


def _part(lhs: Array, rhs: Array, *, algorithm: str, **params: Any) -> Array:
    """What a device computes. An algorithm that can't do its part is replaced by "auto"."""
    planned = planned_params(jax.typeof(lhs), jax.typeof(rhs), params, algorithm)
    return conv_p.bind(lhs, rhs, **planned or {**params, "algorithm": "xla"})


mlir.register_lowering(conv_p, _looked_up, cacheable=False)


# What XLA moves transpositions through; func.call is an activation.
ELEMENTWISE = """abs add and clamp compare convert divide exponential log logistic maximum minimum
    multiply negate not optimization_barrier or power rsqrt select sign sqrt subtract tanh"""
TRANSPARENT = {"func.call", "chlo.erf", *(f"stablehlo.{name}" for name in ELEMENTWISE.split())}
# Operations that ``is_moved`` looks at.
LOOKED_AT = 64


def is_moved(image: Any) -> bool:
    """Whether an image (N, C, spatial…) was made from one channels last by elementwise operations.

    Such as a convolution's output with its activation: XLA cancels the transposition, and the image
    lies channels last in memory.

    Args:
      image: a value in MLIR.
    """
    shape, pending = image.type.shape, [image]
    for _ in range(LOOKED_AT):
        if not pending:
            break
        op = pending.pop().owner
        name = getattr(op, "name", "")  # a block has none: an argument
        if name == "stablehlo.transpose":
            if list(op.attributes["permutation"]) == [0, len(shape) - 1, *range(1, len(shape) - 1)]:
                return True
        elif name in TRANSPARENT:
            pending += [x for x in op.operands if getattr(x.type, "shape", None) == shape]
    return False
