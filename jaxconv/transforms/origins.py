"""What an operand was made from, in MLIR: whether XLA would move it, or make it again."""

from collections.abc import Callable, Iterator
from typing import Any

# What XLA moves transpositions through; chlo.erf is an activation's.
_ELEMENTWISE = """abs add and clamp compare convert divide exponential log logistic maximum minimum
    multiply negate not optimization_barrier or power rsqrt select sign sqrt subtract tanh"""
MOVED_THROUGH = {"chlo.erf", *(f"stablehlo.{name}" for name in _ELEMENTWISE.split())}
# What XLA also computes where it is read, like elementwise operations.
_PLACED = "broadcast_in_dim concatenate pad reshape reverse transpose"
MADE_AGAIN = MOVED_THROUGH - {"stablehlo.compare", "stablehlo.optimization_barrier"}
MADE_AGAIN |= {f"stablehlo.{name}" for name in _PLACED.split()}
SLICES = 4  # an operand that is made from so many is stored
LOOKED_AT = 64  # values


def _origins(ctx: Any, value: Any, followed: Callable[[Any, Any], bool]) -> Iterator[Any]:
    """The operations that make ``value``, and the blocks of which it is an argument, the last
    first; of an operation's operands those that are ``followed``. Calls are followed into the
    functions that they call, and from there to what these were called with."""
    pending, seen = list[Any]([(value, ())]), set[Any]()
    while pending and len(seen) < LOOKED_AT:
        entry = value, calls = pending.pop()
        if entry in seen:
            continue
        seen.add(entry)
        made_by = value.owner
        name = getattr(made_by, "name", "")  # a block has none
        if name == "func.call":
            function = ctx.module_context.symbol_table[made_by.attributes["callee"].value]
            returned = function.regions[0].blocks[0].operations[-1].operands
            pending.append((returned[list(made_by.results).index(value)], (made_by, *calls)))
        elif not name and calls:
            pending.append((calls[0].operands[value.arg_number], calls[1:]))
        else:
            yield made_by
            if name:
                pending += ((x, calls) for x in made_by.operands if followed(made_by, x))


def is_moved(ctx: Any, image: Any) -> bool:
    """Whether an image (N, C, spatial…), a value in MLIR, was made from one channels last by
    elementwise operations, as an activation: XLA cancels the transposition, so that it lies so."""
    shape = image.type.shape
    to_first = [0, len(shape) - 1, *range(1, len(shape) - 1)]

    def followed(made_by: Any, x: Any) -> bool:
        return made_by.name in MOVED_THROUGH and getattr(x.type, "shape", None) == shape

    return any(
        getattr(made_by, "name", "") == "stablehlo.transpose"
        and list(made_by.attributes["permutation"]) == to_first
        for made_by in _origins(ctx, image, followed)
    )


def is_remade(ctx: Any, operand: Any) -> bool:
    """Whether XLA would make ``operand`` (a value in MLIR) again for each tap that reads it, at a
    cost: if it is made from many slices, as the sum of taps of another convolution. Two grouped
    convolutions of 7 taps in a row, 16×100×32, took 22 to 30 ms, so 0.4."""
    slices = 0
    for made_by in _origins(ctx, operand, lambda made_by, _: made_by.name in MADE_AGAIN):
        name = getattr(made_by, "name", "")
        if not name and _is_inner_function(made_by.owner):
            return True  # what it is called with can't be seen
        slices += name == "stablehlo.slice"
        if slices == SLICES:
            return True
    return False


def _is_inner_function(op: Any) -> bool:
    """Whether it is a function jitted in another, rather than the program or a loop's body."""
    known = op.attributes
    private = "sym_visibility" in known and known["sym_visibility"].value == "private"
    return private and known["sym_name"].value != "closed_call"
