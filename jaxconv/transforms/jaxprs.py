"""The convolutions of a jaxpr, lax's and jaxconv's, and the source lines they come from."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxconv import compat
from jaxconv.arguments.errors import fail
from jaxconv.arguments.parse import well_formed
from jaxconv.compat import conv_general_dilated_p, is_constant_shape, without_dead_code
from jaxconv.spec import ConvSpec
from jaxconv.transforms.primitive import conv_p
from jaxconv.transforms.state import results_and_changes

PACKAGE = str(Path(__file__).parents[1]) + os.sep
BY_NAME = "it was asked for by name"


def fn_jaxpr(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The jaxpr of ``fn(*args, **kwargs)``, traced over the arrays, without dead code."""
    return without_dead_code(
        jax.make_jaxpr(partial(results_of, fn, args, kwargs))(arrays_of(args, kwargs))
    )


def arrays_of(args: Any, kwargs: Any) -> dict[int, Any]:
    """The arrays among arguments, and what stands for arrays, by their place."""
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    leaves = enumerate(jax.tree.leaves((args, kwargs)))
    return {i: leaf for i, leaf in leaves if isinstance(leaf, kinds)}


def results_of(fn: Callable[..., Any], args: Any, kwargs: Any, arrays: dict[int, Any]) -> list[Any]:
    """What ``fn`` returns and leaves in objects, with ``arrays`` in place of its own."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    args, kwargs = jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
    return results_and_changes(fn, args, kwargs)


def walk(
    jaxpr: Any, stack: str = "", times: int = 1, within: str = ""
) -> Iterator[tuple[Any, str, dict[Any, Any], int, str]]:
    """The convolutions of ``jaxpr`` and its inner jaxprs, lax's and jaxconv's, in program order.

    Args:
      stack: JAX's names of the transformations applied to ``jaxpr``.
      times: how often it is run.
      within: "while" or "cond" if it is inside one.

    Returns:
      For each: the equation, its ``stack``, all equations by their outputs, ``times``, ``within``.
    """
    makers: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        makers.update(dict.fromkeys(eqn.outvars, eqn))
        names = f"{stack}/{eqn.source_info.name_stack}"
        if eqn.primitive in (conv_general_dilated_p, conv_p):
            yield eqn, names, makers, times, within
        kind = eqn.primitive.name
        inner = (
            times * eqn.params["length"] if kind == "scan" else times,
            kind if kind in ("while", "cond") else within,
        )
        for carried in compat.jaxprs_in_params(eqn.params):
            yield from walk(carried, names, *inner)


def choice(function: str, eqn: Any) -> tuple[ConvSpec, str, str]:
    """The spec of a convolution, its ``algorithm``, and the reason for it unless it is "auto".

    Args:
      function: the public function named in error messages.
    """
    lhs, rhs = (operand.aval for operand in eqn.invars)
    if not is_constant_shape((*lhs.shape, *rhs.shape)):
        shapes = f"{lhs.shape} and {rhs.shape}"
        fail(function, "shapes must be numbers", shapes, "give the sizes that you will use")
    if not well_formed(rhs.shape, eqn.params):
        names = ("window_strides", "lhs_dilation", "rhs_dilation", "dimension_numbers")
        fail(
            function,
            "convolutions must have taps, positive strides and dilations for each spatial axis, and"
            " permutations as dimension_numbers",
            f"{lhs.str_short()} by {rhs.str_short()}, "
            + ", ".join(f"{name}={eqn.params[name]}" for name in names),
            "correct the call of lax's convolution, which lax can't compile either",
        )
    spec = ConvSpec.from_params(lhs, rhs, eqn.params)
    return spec, eqn.params.get("algorithm", "auto"), BY_NAME


def source_line(traceback: Any) -> str:
    """ "file:line (function)" of the user's frame: never jaxconv's, preferably no library's."""
    frames = [f for f in compat.user_frames(traceback) if not f.file_name.startswith(PACKAGE)]
    libraries = ("site-packages", "dist-packages")
    own = [f for f in frames if not any(name in f.file_name for name in libraries)]
    if not frames:
        return ""
    frame = (own or frames)[0]
    path = Path(frame.file_name)
    name = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name
    return f"{name}:{frame.start_line} ({frame.function_name.rpartition('<locals>.')[2]})"
