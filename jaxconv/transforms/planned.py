"""Primitives that plan when they are lowered, each in place of one of lax's.

Their parameters are those of lax's primitive, and ``algorithm``. Derivatives and batching reuse
lax's rules: applied to lax's primitive, with all such primitives in the result in planned form.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
from jax import Array

from jaxconv import compat
from jaxconv.compat import Primitive, ad, batching, mlir

Params = dict[str, Any]


class Planned(Primitive):
    """The planned form of ``original``. ``params(avals, params, algorithm)`` are its parameters,
    None where an operation stays with lax; ``lower(ctx, *operands, wanted=…, **params)`` is its
    lowering, of operands in MLIR, planned on the platforms ``wanted`` only, or on all."""

    def __init__(
        self,
        name: str,
        original: Any,
        params: Callable[[Any, Params, str], Params | None],
        lower: Callable[..., Any],
    ) -> None:
        super().__init__(name)
        self.original, self.params, self.lower = original, params, lower
        self.def_impl(partial(compat.apply_primitive, self))
        self.def_effectful_abstract_eval(self.evaluated)
        ad.primitive_jvps[self] = partial(_jvp, original)
        ad.primitive_transposes[self] = partial(_transpose, original)
        batching.fancy_primitive_batchers[self] = partial(_batch, original)
        compat.partial_eval.partial_eval_jaxpr_custom_rules[self] = partial(_partial_eval, self)
        mlir.register_lowering(self, lower, cacheable=False)  # it looks at its operands
        PLANNED[original] = self

    def bind(self, *args: Any, **params: Any) -> Any:
        compat.add_rules(self, self.original)
        return super().bind(*args, **params)

    def evaluated(self, *avals: Any, algorithm: str, **params: Any) -> Any:
        return self.original.abstract_eval(*avals, **params)


PLANNED: dict[Any, Planned] = {}  # by lax's primitive


def planned(primitive: Any, avals: Any, params: Params, algorithm: str) -> tuple[Any, Params]:
    """The planned form of an operation of lax; the same where it has none."""
    found = PLANNED.get(primitive)
    changed = None if found is None else found.params(avals, params, algorithm)
    return (primitive, params) if changed is None else (found, changed)


def planned_eqn(eqn: Any, algorithm: str) -> Any:
    """``eqn`` in its planned form; itself where it has none."""
    if eqn.primitive not in PLANNED:
        return eqn
    avals = [x.aval for x in eqn.invars]
    primitive, params = planned(eqn.primitive, avals, eqn.params, algorithm)
    return eqn if primitive is eqn.primitive else eqn.replace(primitive=primitive, params=params)


# Cached, so that JAX traces equal derivatives and batches once.
@lru_cache(maxsize=4096)
def _jaxpr(algorithm: str, rule: Any, params: Any, *avals: Any) -> tuple[Any, Any]:
    """The jaxpr of ``rule`` in planned form; its second, static, result."""
    results = []

    def fun(*args: Array) -> list[Array]:
        out, result = rule(*args, **dict(params))
        results.append(result)
        return out

    closed = jax.make_jaxpr(fun)(*avals)
    eqns = [planned_eqn(eqn, algorithm) for eqn in closed.eqns]
    return compat.with_eqns(closed, eqns), results[-1]


def _in_planned_form(
    algorithm: str, rule: Callable[..., Any], *args: Any, **static: Any
) -> tuple[list[Array], Any]:
    """``rule(*args, **static)``, arrays and something static, with lax's operations in planned
    form."""
    closed, result = _jaxpr(algorithm, rule, tuple(static.items()), *map(jax.typeof, args))
    return compat.eval_jaxpr(closed, *args), result


def _with_tangents(*arrays: Array, original: Any, zeros: Any, **params: Any) -> Any:
    primals, given = arrays[: len(zeros)], iter(arrays[len(zeros) :])
    tangents = [next(given) if zero is None else ad.Zero(zero) for zero in zeros]
    out, tangent = ad.primitive_jvps[original](primals, tangents, **params)
    return ([out], tangent) if isinstance(tangent, ad.Zero) else ([out, tangent], None)


def _jvp(original: Any, primals: Any, tangents: Any, *, algorithm: str, **params: Any) -> Any:
    zeros = tuple(t.aval if isinstance(t, ad.Zero) else None for t in tangents)
    given = [t for t in tangents if not isinstance(t, ad.Zero)]
    params |= {"original": original, "zeros": zeros}
    (out, *tangent), zero = _in_planned_form(algorithm, _with_tangents, *primals, *given, **params)
    return out, tangent[0] if tangent else zero


def _transposed(cotangent: Array, *known: Array, original: Any, avals: Any, **params: Any) -> Any:
    given = iter(known)
    operands = [next(given) if aval is None else ad.UndefinedPrimal(aval) for aval in avals]
    results = ad.get_primitive_transpose(original)(cotangent, *operands, **params)
    return [result for result in results if result is not None], None


def _transpose(
    original: Any, cotangent: Any, *operands: Any, algorithm: str, **params: Any
) -> list[Any]:
    """The cotangent of the only operand that is linear."""
    avals = tuple(x.aval if ad.is_undefined_primal(x) else None for x in operands)
    if isinstance(cotangent, ad.Zero) or 0 in cotangent.shape:
        return [None if aval is None else ad.Zero(aval) for aval in avals]
    params |= {"original": original, "avals": avals}
    known = (x for x in operands if not ad.is_undefined_primal(x))
    (out,), _ = _in_planned_form(algorithm, _transposed, cotangent, *known, **params)
    return [None if aval is None else out for aval in avals]


def _batched(*args: Array, original: Any, axis_data: Any, dims: Any, **params: Any) -> Any:
    if original in batching.fancy_primitive_batchers:
        out, dim = batching.fancy_primitive_batchers[original](axis_data, args, dims, **params)
    else:
        plain: Any = batching.primitive_batchers
        out, dim = plain[original](args, dims, **params)
    return [out], dim


def _batch(
    original: Any, axis_data: Any, args: Any, dims: Any, *, algorithm: str, **params: Any
) -> Any:
    params |= {"original": original, "axis_data": axis_data, "dims": tuple(dims)}
    (out,), dim = _in_planned_form(algorithm, _batched, *args, **params)
    return out, dim


def _partial_eval(
    primitive: Planned, policy: Callable[..., Any], unknown: Any, instantiated: Any, eqn: Any
) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
    """``jax.checkpoint``'s default rule, with ``policy`` asked about lax's primitive."""
    inputs = [x for x, instance in zip(eqn.invars, instantiated, strict=True) if not instance]
    if any(unknown):
        return None, eqn, [True], [True], inputs
    avals = [x.aval for x in eqn.invars]
    params = {key: value for key, value in eqn.params.items() if key != "algorithm"}
    case = compat.ensure_enum(policy(primitive.original, *avals, **params))
    if isinstance(case, compat.SaveableType):
        return eqn, None, [False], [False], []
    if not isinstance(case, compat.Offloadable):
        return eqn, eqn, [False], [True], inputs
    space = jax.memory.Space
    src, dst = (space.Host if kind == "pinned_host" else space.Device for kind in case)
    copied = partial(jax.device_put, may_alias=False)

    def offloaded(*operands: Array) -> tuple[Array, Array]:
        out = primitive.bind(*operands, **eqn.params)
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
