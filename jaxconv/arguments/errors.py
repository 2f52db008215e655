"""Errors that name function and argument, the constraint, what was given, and the remedy."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxconv.arguments import hints


def fail(
    function: str, constraint: str, given: object, remedy: str, error: type[Exception] = ValueError
) -> NoReturn:
    """Raises ``error`` with a message in the form shared by all of jaxconv's errors."""
    end = "" if remedy.endswith("?") else "."
    raise error(f"jaxconv.{function}: {constraint}, got {given}; {remedy}{end}")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a public function, as its error messages speak of it."""

    function: str
    shapes: Mapping[str, Sequence[int]]  # those passed, by the argument's name
    # Of lax's arguments that have others here.
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    paddings: str = "'SAME', 'SAME_LOWER', 'VALID' or (low, high) pairs"
    # Unless as in lax: where image and kernel have their channels; and what may be meant by
    # operands whose channels don't fit, for a group count.
    channels: tuple[str, str] | None = None
    guesses: Callable[[int], Iterable[hints.Guess]] | None = None
    transpose_kernel: bool | None = None  # of ``conv_transpose``

    def name(self, argument: str) -> str:
        """What the function calls an argument of lax."""
        return self.names.get(argument, argument)

    def fail(
        self, constraint: str, given: object, remedy: str, error: type[Exception] = ValueError
    ) -> NoReturn:
        """Raises ``error``; the message adds the shapes to what was ``given``, None for nothing."""
        *others, last = (
            name + (" " if name.endswith("shape") else " of shape ") + str(tuple(shape))
            for name, shape in self.shapes.items()
        )
        shapes = f"{', '.join(others)} and {last}" if others else last
        given = shapes if given is None else f"{given} for {shapes}"
        fail(self.function, constraint, given, remedy, error)


def check_array(function: str, name: str, x: Any, concrete: bool = False) -> None:
    """Raises if ``x`` has no shape and dtype or, where it must be ``concrete``, no values."""
    has_values = isinstance(x, (jax.Array, np.ndarray, np.generic)) or hasattr(x, "__jax_array__")
    has_type = hasattr(x, "shape") and hasattr(x, "dtype")
    if not (has_values if concrete else has_type):
        remedy = "convert it with jnp.asarray; shapes are for jaxconv.plan"
        fail(function, f"{name} must be an array", type(x).__name__, remedy, TypeError)
    try:
        is_numeric = not has_type or any(jnp.issubdtype(x.dtype, k) for k in (np.number, np.bool_))
    except TypeError:  # another library's
        is_numeric = False
    if not is_numeric:
        given, remedy = f"dtype {x.dtype} and shape {x.shape}", "convert it to numbers"
        if str(x.dtype).startswith("key<"):
            remedy = "draw numbers by it, for example jax.random.normal(key, shape)"
        fail(function, f"{name} must be an array of numbers", given, remedy, TypeError)


def operand(function: str, name: str, x: Any) -> Array:
    """``x`` as a JAX array; a list is refused."""
    check_array(function, name, x, concrete=True)
    return jnp.asarray(x)


def check_function(function: str, fn: Any) -> None:
    if not callable(fn):
        given, remedy = type(fn).__name__, "pass the function itself, not what it returns"
        fail(function, "fn must be a function", given, remedy, TypeError)
