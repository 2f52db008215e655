"""The convolutions and poolings of a program, lax's and jaxconv's, and their source lines."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from jaxconv import compat
from jaxconv.arguments.errors import check_function, fail
from jaxconv.arguments.parse import plannable
from jaxconv.compat import conv_general_dilated_p, without_dead_code
from jaxconv.pooling.spec import Pooling
from jaxconv.spec import ConvSpec
from jaxconv.transforms.planned import PLANNED, Planned

PACKAGE = str(Path(__file__).parents[1]) + os.sep
ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


class Found(NamedTuple):
    """A convolution or a pooling in a program."""

    eqn: Any
    stack: str  # JAX's names of the transformations it comes from
    makers: Mapping[Any, Any]  # the equations of its jaxpr so far, by their outputs
    times: int  # how often it is run; in a ``while_loop``, in one iteration
    within: str  # "while" or "cond" if it is inside one, else empty

    def spec(self, function: str) -> ConvSpec:
        """The convolution; ``function`` is the public one named in error messages."""
        params = self.eqn.params
        lhs, rhs = (operand.aval for operand in self.eqn.invars)
        if not plannable(lhs, rhs, params):
            must = "sizes that are numbers, taps, positive strides and dilations"
            given = f"{lhs.str_short()} by {rhs.str_short()} with {params}"
            remedy = "pass the sizes that you will use, or correct the call"
            fail(function, f"convolutions must have {must}", given, remedy)
        return ConvSpec.from_params(lhs, rhs, params)

    @property
    def original(self) -> Any:
        """lax's primitive, of which this one may be the planned form."""
        return getattr(self.eqn.primitive, "original", self.eqn.primitive)

    @property
    def pooling(self) -> Pooling:
        return Pooling.from_params(self.original.name, self.eqn.invars[-1].aval, self.eqn.params)

    @property
    def algorithm(self) -> str:
        """Its name as passed; "auto" for lax's convolutions."""
        return self.eqn.params.get("algorithm", "auto")

    def maker(self, operand: Any) -> Any:
        """The equation that made ``operand``; None for constants and arguments."""
        return None if hasattr(operand, "val") else self.makers.get(operand)


def convolutions(function: str, fn: Any, args: Any, kwargs: Any) -> Iterator[Found]:
    """The convolutions of ``fn(*args, **kwargs)`` whose results are used, in program order."""
    found = operations(function, fn, args, kwargs)
    return (each for each in found if each.original is conv_general_dilated_p)


def operations(function: str, fn: Any, args: Any, kwargs: Any) -> Iterator[Found]:
    """Its convolutions and poolings."""
    check_function(function, fn)
    traced, arrays = over_arrays(fn, args, kwargs)
    # JAX raises where a tracer stays behind: in an object that is no argument.
    with jax.checking_leaks():
        jaxpr = jax.make_jaxpr(traced)(arrays)
    return _walk(without_dead_code(jaxpr))


def over_arrays(
    fn: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Callable[[list[Any]], list[Any]], list[Any]]:
    """``fn(*args, **kwargs)`` as a function of the arrays among its arguments, and the arrays. It
    works on copies of the arguments, as ``fn`` may change objects, and returns every array that
    ``fn`` returns or leaves in them. What ``fn`` is bound to counts as an argument."""
    if isinstance(fn, MethodType):
        fn = Partial(fn.__func__, fn.__self__)
    elif isinstance(fn, partial) and not isinstance(fn, Partial):
        fn = Partial(fn.func, *fn.args, **fn.keywords)
    leaves, tree = jax.tree.flatten((fn, args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, ARRAYS)]

    def of_arrays(arrays: list[Any]) -> list[Any]:
        given = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
        copies = fn, args, kwargs = jax.tree.unflatten(tree, given.values())
        left = jax.tree.leaves((fn(*args, **kwargs), copies))
        known = set(map(id, arrays))
        return [x for x in left if isinstance(x, jax.Array) and id(x) not in known]

    return of_arrays, [leaves[i] for i in places]


def _walk(jaxpr: Any, stack: str = "", times: int = 1, within: str = "") -> Iterator[Found]:
    makers: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        makers.update(dict.fromkeys(eqn.outvars, eqn))
        names = f"{stack}/{eqn.source_info.name_stack}"
        if eqn.primitive in PLANNED or isinstance(eqn.primitive, Planned):
            yield Found(eqn, names, makers, times, within)
        kind = eqn.primitive.name
        inner = times * eqn.params["length"] if kind == "scan" else times
        for carried in compat.jaxprs_in_params(eqn.params):
            yield from _walk(carried, names, inner, kind if kind in ("while", "cond") else within)


def source_line(traceback: Any) -> str:
    """ "file:line (function)" of the user's frame: never jaxconv's, preferably no library's."""
    frames = [f for f in compat.user_frames(traceback) if not f.file_name.startswith(PACKAGE)]
    if not frames:
        return ""
    own = (f for f in frames if not re.search("(site|dist)-packages", f.file_name))
    frame = next(own, frames[0])
    path = Path(frame.file_name)
    name = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name
    return f"{name}:{frame.start_line} ({frame.function_name.rpartition('<locals>.')[2]})"
