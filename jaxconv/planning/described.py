"""The convolution that a call of ``plan`` describes, by the arguments of ``conv`` or of lax."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxconv.arguments import hints
from jaxconv.arguments.channels_last import NAMES, lax_arguments
from jaxconv.arguments.errors import check_array, fail, is_integers
from jaxconv.arguments.parse import parameters, parse
from jaxconv.spec import ConvSpec

LAX = inspect.Signature(list(inspect.signature(parameters).parameters.values())[1:])
_function, *_arguments = inspect.signature(lax_arguments).parameters.values()
CONV = inspect.Signature(_arguments)


def described(args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: Any) -> ConvSpec:
    """The spec of a convolution.

    Args:
      args, kwargs: those of lax, if there is a third by position or a name that only lax has; else
        those of ``conv``.
      dtype: that of operands given as shapes; None for that of the other, or float32.
    """
    is_lax = _is_lax(args, kwargs)
    signature, function = (LAX, "lax.conv_general_dilated") if is_lax else (CONV, "conv")
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        constraint = f"these arguments must be those of {function}"
        remedy = "see help(jaxconv.plan)"
        if is_lax:
            remedy = "for those of conv, give all but x and w by name, such as strides=2"
        fail("plan", constraint, f"others ({error})", remedy, TypeError)
    operands = _operands(dict(list(given.items())[:2]), dtype)
    given.update(operands)
    x, w = operands.values()
    if is_lax:
        return ConvSpec.from_params(x, w, parse("plan", **given))
    call, others = lax_arguments("plan", **given)
    if len(x.shape) < len(w.shape):
        x = jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
    return ConvSpec.from_params(x, w, parameters(call, x, w, **others))


def _is_lax(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments are lax's; raises where they are of both or of none."""
    constraint = "arguments must be those of conv or of lax.conv_general_dilated"
    names = {*CONV.parameters, *LAX.parameters}
    for name in kwargs:
        if name not in names:
            remedy = hints.of_name(name, sorted(names))
            if name == "algorithm":
                remedy = "leave it out, since the plan says how all of them would do"
            fail("plan", constraint, repr(name), remedy, TypeError)
    of_conv = [name for name in kwargs if name not in LAX.parameters]
    of_lax = [name for name in kwargs if name not in CONV.parameters]
    if len(args) > 2:
        of_lax.insert(0, "a third argument by position")
        if isinstance(args[2], int):
            remedy = f"give those of conv by name, strides={args[2]}"
            constraint = f"{of_lax[0]} must be lax's window_strides"
            fail("plan", constraint, repr(args[2]), remedy, TypeError)
    if of_conv and of_lax:
        lax_name = next(name for name, own in NAMES.items() if own == of_conv[0])
        given = f"{of_conv[0]} of the one and {of_lax[0]} of the other"
        fail("plan", constraint, given, f"give {of_conv[0]} as lax's {lax_name}", TypeError)
    return bool(of_lax)


def _operands(given: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Arrays and what stands for them, shapes with their dtype."""
    dtypes = [x.dtype for x in given.values() if hasattr(x, "dtype")]
    if dtype is not None and len(dtypes) == len(given):
        remedy = "leave it out, or give shapes"
        fail("plan", "dtype is for operands given as shapes", "none of these", remedy)
    if dtype is None:
        dtype = dtypes[0] if dtypes else np.float32
    operands = {}
    for name, x in given.items():
        if isinstance(x, (tuple, list)) and is_integers(x):
            if min(x, default=0) < 0:
                fail("plan", f"the sizes of {name} must not be negative", x, "give the whole shape")
            x = jax.ShapeDtypeStruct(x, dtype)
        check_array("plan", name, x)
        operands[name] = x
    return operands


def documented(result: type) -> inspect.Signature:
    """The signature of ``plan``: that of ``conv`` by name, lax's as ``*args`` and ``**kwargs``.

    Args:
      result: what it returns.
    """
    (x, w, *others), new = CONV.parameters.values(), inspect.Parameter
    others = [p.replace(kind=new.KEYWORD_ONLY) for p in others]
    own = [new(name, new.KEYWORD_ONLY, default=None) for name in ("dtype", "platform")]
    args, kwargs = new("args", new.VAR_POSITIONAL), new("kwargs", new.VAR_KEYWORD)
    return inspect.Signature([x, w, args, *others, *own, kwargs], return_annotation=result)
