"""What a function changes besides returning results: its arguments, and what it refers to."""

from collections.abc import Callable, Iterable
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import jax


def results_and_changes(fn: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    """The arrays that ``fn(*args, **kwargs)`` returns, and those it leaves in any object.

    It runs on copies of the objects it refers to: the user's own must not be left with tracers, and
    Flax refuses to change an object in another trace than the one that made it. What it writes to a
    ``jax.Ref`` is not among the arrays: JAX itself keeps track of these effects.
    """
    copies = _Copies()
    fn = copies.copy(fn)
    before = {id(x): x for x in (*_arrays((args, kwargs)), *copies.arrays())}
    results = fn(*args, **kwargs)
    after = (*_arrays((args, kwargs)), *copies.arrays())
    return [*_arrays(results), *(x for x in after if id(x) not in before)]


class _Copies:
    """A function, with copies of its variables and of the arguments bound to it."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}  # by the ids of the originals
        self.holders: list[Callable[[], Iterable[Any]]] = []

    def arrays(self) -> list[Any]:
        return [x for held in self.holders for value in held() for x in _arrays(value)]

    def copy(self, value: Any) -> Any:
        """A copy of a function or a pytree; what is neither, such as a jitted function, itself."""
        if isinstance(value, FunctionType):
            cells = tuple(map(self.cell, value.__closure__ or ()))
            names = _names(value.__code__)
            scope = value.__globals__ | self.variables(value.__globals__, names)
            self.holders.append(lambda: map(scope.get, names))
            copy = FunctionType(value.__code__, scope, value.__name__, value.__defaults__, cells)
            copy.__kwdefaults__ = value.__kwdefaults__
            copy.__dict__.update(value.__dict__)
            return copy
        if isinstance(value, partial):
            func, *args = map(self.copy, (value.func, *value.args))
            keywords = {name: self.copy(x) for name, x in value.keywords.items()}
            return type(value)(func, *args, **keywords)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.bound(value.__self__))
        return self.tree(value)

    def tree(self, value: Any) -> Any:
        if id(value) not in self.made:
            try:
                copy = jax.tree.map(lambda x: x, value)
            except (TypeError, ValueError):  # such as a dict whose keys can't be sorted
                copy = value
            self.made[id(value)] = copy
            self.holders.append(lambda: [copy])
        return self.made[id(value)]

    def cell(self, original: CellType) -> CellType:
        """A copy of the variable of a closure."""
        if id(original) not in self.made:
            # Before its contents, which may be the function itself.
            self.made[id(original)] = cell = CellType()
            for value in _contents(original):
                cell.cell_contents = self.copy(value)
            self.holders.append(lambda: _contents(cell))
        return self.made[id(original)]

    def variables(self, values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """Copies of the ``values`` with these names; functions stay as they are."""
        return {name: self.tree(values[name]) for name in names if name in values}

    def bound(self, original: Any) -> Any:
        """A copy of the object that a method is bound to, a pytree or not."""
        copy = self.tree(original)
        plain = type(original).__new__ is object.__new__ and hasattr(original, "__dict__")
        if copy is original and plain:
            self.made[id(original)] = copy = object.__new__(type(original))
            vars(copy).update(self.variables(vars(original), vars(original)))
            self.holders.append(lambda: vars(copy).values())
        return copy


def _arrays(tree: Any) -> list[Any]:
    try:
        return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    except (TypeError, ValueError):
        return []


def _contents(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it has no value yet, or no longer
        return []


def _names(code: CodeType) -> set[str]:
    """The global variables, and others, that a function and those defined in it name."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
