"""The primitive that plans when it is lowered.

Its parameters are those of lax's convolution, and ``algorithm``. Derivatives and batching need no
mathematics of their own: lax's rules are applied to lax's convolution, and the convolutions in what
comes out are replaced by this primitive. So each derived convolution is planned in its turn.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array

from jaxconv import layout
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import refusal
from jaxconv.compat import (
    Primitive,
    ad,
    apply_primitive,
    batching,
    conv_general_dilated_p,
    jaxpr_as_fun,
    mlir,
)
from jaxconv.planner import run
from jaxconv.spec import ConvSpec

conv_p = Primitive("jaxconv")
conv_p.def_impl(partial(apply_primitive, conv_p))


@conv_p.def_effectful_abstract_eval
def _abstract_eval(lhs: Any, rhs: Any, *, algorithm: str, **params: Any) -> Any:
    return conv_general_dilated_p.abstract_eval(lhs, rhs, **params)


def _planned(algorithm: str, fun: Callable[..., Any], *args: Any) -> Any:
    """``fun(*args)`` with lax's convolutions replaced by this primitive.

    An algorithm that can't do a derived convolution gives way to "auto".
    """

    def replaced(eqn: Any) -> Any:
        if eqn.primitive is not conv_general_dilated_p:
            return eqn
        lhs, rhs = eqn.invars
        spec = ConvSpec.from_params(lhs.aval, rhs.aval, eqn.params)
        capable = algorithm in ALGORITHMS and refusal(ALGORITHMS[algorithm], spec) is None
        params = {**eqn.params, "algorithm": algorithm if capable else "auto"}
        return eqn.replace(primitive=conv_p, params=params)

    closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
    jaxpr = closed.jaxpr.replace(eqns=[replaced(eqn) for eqn in closed.jaxpr.eqns])
    outputs = jaxpr_as_fun(closed.replace(jaxpr=jaxpr))(*jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(out), outputs)


def _transpose_lhs(cotangent: Array, lhs: Any, rhs: Array, *, algorithm: str, **params: Any) -> Any:
    def transpose(cotangent: Array, rhs: Array) -> Any:
        rule = ad.get_primitive_transpose(conv_general_dilated_p)
        return rule(cotangent, ad.UndefinedPrimal(lhs.aval), rhs, **params)[0]

    return _planned(algorithm, transpose, cotangent, rhs)


def _transpose_rhs(cotangent: Array, lhs: Array, rhs: Any, *, algorithm: str, **params: Any) -> Any:
    if 0 in cotangent.shape:
        return ad.Zero(rhs.aval)

    def transpose(cotangent: Array, lhs: Array) -> Any:
        rule = ad.get_primitive_transpose(conv_general_dilated_p)
        return rule(cotangent, lhs, ad.UndefinedPrimal(rhs.aval), **params)[1]

    return _planned(algorithm, transpose, cotangent, lhs)


ad.defbilinear(conv_p, _transpose_lhs, _transpose_rhs)


def _batch(axis_data: Any, args: Any, dims: Any, *, algorithm: str, **params: Any) -> Any:
    out_dim = None

    def batched(*args: Array) -> Array:
        nonlocal out_dim
        rule = batching.fancy_primitive_batchers[conv_general_dilated_p]
        out, out_dim = rule(axis_data, args, dims, **params)
        return out

    out = _planned(algorithm, batched, *args)
    return out, out_dim


batching.fancy_primitive_batchers[conv_p] = _batch


def _lowered(lhs: Array, rhs: Array, *, algorithm: str, platform: str, **params: Any) -> Array:
    spec = ConvSpec.from_params(lhs, rhs, params)
    dimension_numbers = params["dimension_numbers"]
    lhs, rhs = layout.to_canonical(lhs, rhs, dimension_numbers)
    return layout.from_canonical(run(lhs, rhs, spec, algorithm, platform), dimension_numbers)


for _platform in ("cpu", "gpu", "tpu"):
    mlir.register_lowering(
        conv_p,
        mlir.lower_fun(partial(_lowered, platform=_platform), multiple_results=False),
        platform=_platform,
    )
# Any other platform: treated as an accelerator, where XLA's convolution is the choice.
mlir.register_lowering(
    conv_p, mlir.lower_fun(partial(_lowered, platform="other"), multiple_results=False)
)
