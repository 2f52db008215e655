"""The primitive that plans when it is lowered.

Its parameters are those of lax's convolution, and ``algorithm``. Derivatives and batching reuse
lax's rules: they are applied to lax's convolution, and the convolutions in the result are replaced
by this primitive. Each derived convolution is thus planned in turn.
"""

from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
from jax import Array

from jaxconv import compat, layout
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import unsupported
from jaxconv.arguments.parse import plannable
from jaxconv.compat import Primitive, ad, batching, conv_general_dilated_p, mlir
from jaxconv.planning.choose import run
from jaxconv.sharding.partition import PartOf, partitioned
from jaxconv.spec import ConvSpec


class _Convolution(Primitive):
    def bind(self, *args: Any, **params: Any) -> Any:
        compat.add_rules(self)
        return super().bind(*args, **params)


conv_p = _Convolution("jaxconv")
conv_p.def_impl(partial(compat.apply_primitive, conv_p))


@conv_p.def_effectful_abstract_eval
def _abstract_eval(lhs: Any, rhs: Any, *, algorithm: str, **params: Any) -> Any:
    return conv_general_dilated_p.abstract_eval(lhs, rhs, **params)


def planned_params(
    lhs: Any, rhs: Any, params: dict[str, Any], algorithm: str
) -> dict[str, Any] | None:
    """This primitive's parameters for lax's convolution, "auto" in place of an algorithm that does
    not support it; None where it stays with lax."""
    if not plannable(lhs, rhs, params):
        return None
    if algorithm != "auto":
        spec = ConvSpec.from_params(lhs, rhs, params)
        algorithm = algorithm if unsupported(ALGORITHMS[algorithm], spec) is None else "auto"
    return {**params, "algorithm": algorithm}


def planned_eqn(eqn: Any, algorithm: str) -> Any:
    """``eqn`` with this primitive in place of lax's; ``eqn`` itself if it stays with lax."""
    if eqn.primitive is not conv_general_dilated_p:
        return eqn
    lhs, rhs = eqn.invars
    params = planned_params(lhs.aval, rhs.aval, eqn.params, algorithm)
    return eqn if params is None else eqn.replace(primitive=conv_p, params=params)


# Cached, so that JAX traces equal derivatives and batches once.
@lru_cache(maxsize=4096)
def _jaxpr(algorithm: str, rule: Any, static: Any, params: Any, *avals: Any) -> tuple[Any, Any]:
    """The jaxpr of ``rule`` with this primitive in place of lax's; its second, static, result."""
    results = []

    def fun(*args: Array) -> Array:
        out, result = rule(*args, *static, **dict(params))
        results.append(result)
        return out

    closed = jax.make_jaxpr(fun)(*avals)
    eqns = [planned_eqn(eqn, algorithm) for eqn in closed.eqns]
    return compat.with_eqns(closed, eqns), results[-1]


def _planned(algorithm: str, rule: Any, static: Any, params: Any, *args: Any) -> tuple[Array, Any]:
    """``rule(*args, *static, **params)`` with lax's convolutions replaced by this primitive."""
    avals = map(jax.typeof, args)
    closed, result = _jaxpr(algorithm, rule, static, tuple(params.items()), *avals)
    (out,) = compat.eval_jaxpr(closed, *args)
    return out, result


def _transposed(
    cotangent: Array, other: Array, operand: int, aval: Any, **params: Any
) -> tuple[Array, None]:
    operands: list[Any] = [other, other]
    operands[operand] = ad.UndefinedPrimal(aval)
    rule = ad.get_primitive_transpose(conv_general_dilated_p)
    return rule(cotangent, *operands, **params)[operand], None


def _transpose(
    operand: int, cotangent: Array, *operands: Any, algorithm: str, **params: Any
) -> Any:
    """The gradient of lhs (0) or rhs (1)."""
    aval = operands[operand].aval
    if operand == 1 and 0 in cotangent.shape:
        return ad.Zero(aval)
    args = cotangent, operands[1 - operand]
    return _planned(algorithm, _transposed, (operand, aval), params, *args)[0]


ad.defbilinear(conv_p, partial(_transpose, 0), partial(_transpose, 1))


def _batched(lhs: Array, rhs: Array, axis_data: Any, dims: Any, **params: Any) -> Any:
    rule = batching.fancy_primitive_batchers[conv_general_dilated_p]
    return rule(axis_data, (lhs, rhs), dims, **params)


def _batch(axis_data: Any, args: Any, dims: Any, *, algorithm: str, **params: Any) -> Any:
    return _planned(algorithm, _batched, (axis_data, tuple(dims)), params, *args)


batching.fancy_primitive_batchers[conv_p] = _batch


def _partial_eval(
    policy: Callable[..., Any], unknown: Any, instantiated: Any, eqn: Any
) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
    """``jax.checkpoint``'s default rule, except that ``policy`` is asked about lax's primitive, the
    only one that policies know."""
    inputs = [x for x, instance in zip(eqn.invars, instantiated, strict=True) if not instance]
    if any(unknown):
        return None, eqn, [True], [True], inputs
    avals = [x.aval for x in eqn.invars]
    params = {key: value for key, value in eqn.params.items() if key != "algorithm"}
    case = compat.ensure_enum(policy(conv_general_dilated_p, *avals, **params))
    if isinstance(case, compat.SaveableType):
        return eqn, None, [False], [False], []
    if not isinstance(case, compat.Offloadable):
        return eqn, eqn, [False], [True], inputs
    space = jax.memory.Space
    src, dst = (space.Host if kind == "pinned_host" else space.Device for kind in case)
    copied = partial(jax.device_put, may_alias=False)

    def offloaded(lhs: Array, rhs: Array) -> tuple[Array, Array]:
        out = conv_p.bind(lhs, rhs, **eqn.params)
        return out, copied(out, dst)

    # A rule returns one equation for each side, so the two of the known side are put in a jit.
    (known,) = jax.make_jaxpr(jax.jit(offloaded))(*avals).eqns
    residual = known.outvars[1]
    (staged,) = jax.make_jaxpr(lambda out: copied(out, src))(residual.aval).eqns
    known = known.replace(
        invars=eqn.invars, outvars=[*eqn.outvars, residual], source_info=eqn.source_info
    )
    staged = staged.replace(invars=[residual], outvars=eqn.outvars)
    return known, staged, [False], [True], [residual]


compat.partial_eval.partial_eval_jaxpr_custom_rules[conv_p] = _partial_eval


class Lowered(NamedTuple):
    """A convolution as it is lowered."""

    spec: ConvSpec  # in a program for several devices, what one of them computes
    algorithm: str  # as asked for
    platform: str
    part_of: PartOf | None = None  # if ``spec`` is a device's part


# What "auto" planned in this process, and for which platform: the last of them.
_planned_here = deque[tuple[ConvSpec, str]](maxlen=4096)


def _remember(lowered: Lowered) -> None:
    if lowered.algorithm == "auto" and not lowered.spec.is_empty:
        _planned_here.append((lowered.spec, lowered.platform))


def planned_here(platform: str) -> list[ConvSpec]:
    """The convolutions that "auto" planned in this process for ``platform``, each once."""
    return list(dict.fromkeys(spec for spec, where in _planned_here.copy() if where == platform))


# Each is called with every convolution that is lowered.
observers: list[Callable[[Lowered], None]] = [_remember]


# A second primitive, whose rule JAX calls once for equal convolutions. That of the first looks at
# where operands come from, and is called for each.
lowered_p = Primitive("jaxconv_lowered")
Both = tuple[bool, bool]  # of both operands


@lowered_p.def_effectful_abstract_eval
def _(lhs: Any, rhs: Any, *, moved: bool, remade: Both, part_of: Any = None, **params: Any) -> Any:
    return _abstract_eval(lhs, rhs, **params)


def _run(
    platform: str,
    lhs: Array,
    rhs: Array,
    *,
    algorithm: str,
    moved: bool,
    remade: Both,
    **params: Any,
) -> Array:
    """``moved``: ``is_moved(lhs)``; ``remade``: ``is_remade`` of both operands."""
    spec = ConvSpec.from_params(lhs, rhs, params)
    for observe in observers:
        observe(Lowered(spec, algorithm, platform, params.get("part_of")))
    numbers = params["dimension_numbers"]
    out = run(*layout.to_canonical(lhs, rhs, numbers), spec, algorithm, platform, moved, remade)
    return layout.from_canonical(out, numbers)


# Any other platform is treated as an accelerator, where XLA's convolution is chosen.
for _platform in ("cpu", "gpu", "tpu", None):
    _rule = mlir.lower_fun(partial(_run, _platform or "other"), multiple_results=False)
    mlir.register_lowering(lowered_p, _rule, platform=_platform)


def lowered(
    ctx: Any, lhs: Any, rhs: Any, params: dict[str, Any], moved: bool, remade: Both = (False, False)
) -> Any:
    """The lowering of a convolution of values in MLIR with this primitive's parameters."""
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
    bind = partial(lowered_p.bind, moved=moved, remade=remade)
    lower = mlir.lower_fun(bind, multiple_results=False)
    if not compat.has_explicit_sharding(*ctx.avals_in, *ctx.avals_out):
        return lower(ctx, lhs, rhs, **params)
    with compat.no_mesh():
        plain = compat.without_shardings(ctx)
        (out,) = lower(plain, lhs, rhs, **params | {"out_sharding": None})
    return [compat.with_sharding_in_type(ctx, out)]


def _part(lhs: Array, rhs: Array, *, algorithm: str, part_of: PartOf, **params: Any) -> Array:
    """What a device computes. An algorithm that can't do its part is replaced by "auto"."""
    planned = planned_params(jax.typeof(lhs), jax.typeof(rhs), params, algorithm)
    planned = planned or params | {"algorithm": "xla"}
    return lowered_p.bind(lhs, rhs, **planned, moved=False, remade=(True, True), part_of=part_of)


def _lower(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    remade = is_remade(ctx, lhs), is_remade(ctx, rhs)
    return lowered(ctx, lhs, rhs, params, is_moved(lhs), remade)


mlir.register_lowering(conv_p, _lower, cacheable=False)


# What XLA moves transpositions through; func.call is an activation.
_ELEMENTWISE = """abs add and clamp compare convert divide exponential log logistic maximum minimum
    multiply negate not optimization_barrier or power rsqrt select sign sqrt subtract tanh"""
MOVED_THROUGH = {"func.call", "chlo.erf", *(f"stablehlo.{name}" for name in _ELEMENTWISE.split())}
# What XLA also computes where it is read, like elementwise operations.
_PLACED = "broadcast_in_dim concatenate pad reshape reverse transpose"
MADE_AGAIN = MOVED_THROUGH - {"stablehlo.compare", "stablehlo.optimization_barrier"}
MADE_AGAIN |= {f"stablehlo.{name}" for name in _PLACED.split()}
# Slices from which an operand is made from which it is stored.
SLICES = 4
# Operations that ``is_moved`` and ``is_remade`` look at.
LOOKED_AT = 64


def is_moved(image: Any) -> bool:
    """Whether an image (N, C, spatial…), a value in MLIR, was made from one channels last by
    elementwise operations, as an activation: XLA cancels the transposition, so that it lies so."""
    shape, pending = image.type.shape, [image]
    for _ in range(LOOKED_AT):
        if not pending:
            break
        op = pending.pop().owner
        name = getattr(op, "name", "")  # a block has none: an argument
        if name == "stablehlo.transpose":
            if list(op.attributes["permutation"]) == [0, len(shape) - 1, *range(1, len(shape) - 1)]:
                return True
        elif name in MOVED_THROUGH:
            pending += [x for x in op.operands if getattr(x.type, "shape", None) == shape]
    return False


def is_remade(ctx: Any, operand: Any) -> bool:
    """Whether XLA would make ``operand`` (a value in MLIR) again for each tap that reads it, at a
    cost: if it is made from many slices, as the sum of taps of another convolution.

    Two grouped convolutions of 7 taps in a row, 16×100×32, took 22 to 30 ms, so 0.4.
    """
    slices, pending = 0, [operand]
    seen, called = list[Any](), list[Any]()
    while pending and slices < SLICES and len(seen) < LOOKED_AT:
        value = pending.pop()
        if value in seen:
            continue
        seen.append(value)
        op = value.owner
        name = getattr(op, "name", "")  # a block has none: an argument
        if not name and op.owner in called:
            continue  # what it was called with is looked at
        if not name and _is_inner_function(op.owner):
            return True  # what it is called with can't be seen
        if name == "func.call":
            function = ctx.module_context.symbol_table[op.attributes["callee"].value]
            *_, results = function.regions[0].blocks[0].operations
            pending += [x for x in results.operands if x.type == value.type]
            called.append(function)
        slices += name == "stablehlo.slice"
        if name in MADE_AGAIN:
            pending += op.operands
    return slices >= SLICES


def _is_inner_function(op: Any) -> bool:
    """Whether it is a function jitted in another, rather than the program or a loop's body."""
    known = op.attributes
    private = "sym_visibility" in known and known["sym_visibility"].value == "private"
    return private and known["sym_name"].value != "closed_call"
