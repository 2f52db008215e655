"""lax-style arguments, checked and normalised to the primitive's parameters."""

import contextlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxconv import compat
from jaxconv.arguments import hints
from jaxconv.arguments.errors import Call, check_array
from jaxconv.arguments.padding import to_pairs
from jaxconv.spec import dilate


def parse(function: str, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """``parameters`` of operands that are checked too, for the errors of a public function."""
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        check_array(function, name, x)
    call = Call(function, {"lhs": lhs.shape, "rhs": rhs.shape})
    return parameters(call, lhs, rhs, *args, **kwargs)


def parameters(
    call: Call,
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> dict[str, Any]:
    """The parameters of lax's primitive, but ``out_sharding``, for ``lax.conv_general_dilated``'s.

    Args:
      call: the user's, for error messages.
      lhs, rhs: arrays, or what stands for some.

    Raises:
      TypeError: operands of different rank or dtype, malformed ``dimension_numbers``, pads or
        dilations, or an impossible ``preferred_element_type``.
      ValueError: everything else that ``lax.conv_general_dilated`` refuses.
    """
    dnums = parse_dimension_numbers(call, lhs.shape, rhs.shape, dimension_numbers)
    check_axes(call, lhs, rhs, dnums, window_strides, dimension_numbers)
    out_dtype = parse_out_dtype(call, lhs.dtype, rhs.dtype, preferred_element_type)
    ndim = len(lhs.shape) - 2
    strides = positive(call, "window_strides", window_strides, ndim, ValueError)
    lhs_dilation, rhs_dilation = (
        (1,) * ndim if given is None else positive(call, name, given, ndim, TypeError)
        for name, given in (("lhs_dilation", lhs_dilation), ("rhs_dilation", rhs_dilation))
    )
    feature_groups = _count(call, "feature_group_count", feature_group_count)
    batch_groups = _count(call, "batch_group_count", batch_group_count)
    _check_groups(call, lhs.shape, rhs.shape, dnums, feature_groups, batch_groups)
    lhs_spatial = [lhs.shape[d] for d in dnums.lhs_spec[2:]]
    kernel_shape = tuple(rhs.shape[d] for d in dnums.rhs_spec[2:])
    if 0 in kernel_shape:
        call.fail(
            "the kernel must have at least one tap in each spatial dimension",
            f"kernel shape {kernel_shape}",
            "drop the convolution where there is no kernel",
        )
    window = tuple(map(dilate, kernel_shape, rhs_dilation))
    return {
        "window_strides": strides,
        "padding": to_pairs(call, padding, lhs_spatial, window, strides, lhs_dilation),
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dnums,
        "feature_group_count": feature_groups,
        "batch_group_count": batch_groups,
        "precision": parse_precision(call, precision),
        "preferred_element_type": out_dtype,
    }


def parse_dimension_numbers(
    call: Call, lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...], given: Any
) -> lax.ConvDimensionNumbers:
    """``dimension_numbers`` as axes; raises where the operands' ranks allow none."""
    rank, operands = len(lhs_shape), (call.name("lhs"), call.name("rhs"), lhs_shape, rhs_shape)
    if rank != len(rhs_shape) or rank < 2:
        must = "at least a batch and a channel dimension"
        if rank != len(rhs_shape):
            must = "the same rank (batch, channels and the spatial dimensions)"
        constraint = f"{operands[0]} and {operands[1]} must have {must}"
        call.fail(constraint, None, hints.of_axes(*operands, given), TypeError)
    try:
        dnums = lax.conv_dimension_numbers(lhs_shape, rhs_shape, given)
    except TypeError:
        call.fail(
            "dimension_numbers must be None, a lax.ConvDimensionNumbers, or three strings of length"
            f" {rank} such as {hints.lettered(rank, given)}",
            repr(given),
            hints.of_dimension_numbers(*operands, given),
            TypeError,
        )
    error = ValueError
    try:
        specs = [tuple(map(operator.index, spec)) for spec in dnums]
    except TypeError:
        specs, error = [()], TypeError
    if any(sorted(spec) != list(range(rank)) for spec in specs):
        constraint = f"each spec of dimension_numbers must be a permutation of 0…{rank - 1}"
        call.fail(constraint, dnums, "name every dimension once", error)
    return lax.ConvDimensionNumbers(*specs)


def check_axes(
    call: Call, lhs: Any, rhs: Any, dnums: lax.ConvDimensionNumbers, strides: Any, given: Any
) -> None:
    """Raises where there is a stride for each axis of operands that lack batch and channels.

    ``given``: ``dimension_numbers`` as passed, whose layout the remedy follows.
    """
    rank, count = len(lhs.shape), len(strides) if isinstance(strides, Sequence) else -1
    c, i = lhs.shape[dnums.lhs_spec[1]], rhs.shape[dnums.rhs_spec[1]]
    if (rank == 2 and count != 0) or (rank == count and c % max(i, 1)):
        x, w, name = map(call.name, ("lhs", "rhs", "window_strides"))
        must = f"must have batch and channels besides the spatial dimensions of {name}"
        remedy = hints.of_axes(x, w, lhs.shape, rhs.shape, given)
        call.fail(f"{x} and {w} {must}", f"{name} {strides!r}", remedy)


def parse_out_dtype(
    call: Call, lhs: np.dtype, rhs: np.dtype, preferred: DTypeLike | None
) -> np.dtype | None:
    if lhs != rhs:
        x, w = call.name("lhs"), call.name("rhs")
        call.fail(
            f"{x} and {w} must have the same dtype",
            f"{np.dtype(lhs).name} and {np.dtype(rhs).name}",
            f"cast one of them with .astype, for example {_cast(x, w, lhs, rhs)}",
            TypeError,
        )
    if preferred is None:
        return None
    try:
        dtype = np.dtype(compat.check_and_canonicalize_user_dtype(preferred, call.function))
    except (TypeError, ValueError):
        given, remedy = repr(preferred), hints.of_dtype(preferred)
        if hasattr(preferred, "dtype"):
            given, remedy = type(preferred).__name__, "use its .dtype"
        call.fail("preferred_element_type must be a dtype of numbers", given, remedy, TypeError)
    issub = jnp.issubdtype
    if issub(lhs, np.integer) and issub(dtype, np.floating):
        compatible = True
    elif issub(lhs, np.signedinteger):
        compatible = issub(dtype, np.signedinteger)
    else:
        kinds = (np.integer, np.floating, np.complexfloating)
        compatible = all(issub(dtype, kind) for kind in kinds if issub(lhs, kind))
    if dtype.itemsize < np.dtype(lhs).itemsize or not compatible:
        constraint = (
            "preferred_element_type must be as wide as the operands and of their kind (integers may"
            " also become floats, unsigned integers signed ones)"
        )
        given = f"{dtype.name} with {np.dtype(lhs).name} operands"
        call.fail(constraint, given, "cast the operands before or the result after", TypeError)
    return dtype


def _cast(x: str, w: str, lhs: np.dtype, rhs: np.dtype) -> str:
    """The cast that is likely meant: integers to floats to complex numbers, or to fewer bits."""

    def rank(dtype: np.dtype) -> tuple[bool, bool, int]:
        is_real = not jnp.issubdtype(dtype, np.complexfloating)
        return not jnp.issubdtype(dtype, np.inexact), is_real, np.dtype(dtype).itemsize

    return f"{x}.astype({w}.dtype)" if rank(lhs) > rank(rhs) else f"{w}.astype({x}.dtype)"


def parse_precision(call: Call, given: lax.PrecisionLike) -> Any:
    """``precision`` as lax's primitive has it."""
    try:
        return compat.canonicalize_precision(given)
    except ValueError:
        if given is None:  # JAX's setting is wrong
            raise
        constraint = (
            "precision must be None, a name such as 'highest', a lax.Precision, two of either, or a"
            " lax.DotAlgorithmPreset"
        )
        call.fail(constraint, repr(given), hints.of_precision(given))


def positive(
    call: Call,
    argument: str,
    given: Any,
    length: int,
    error: type[Exception] = ValueError,
    or_one: bool = False,
) -> tuple[int, ...]:
    """``given`` as ``length`` positive integers, else ``error``; TypeError for non-integers.

    ``or_one``: an integer may stand for all of them.
    """
    values = given
    if or_one:
        with contextlib.suppress(TypeError):
            values = (operator.index(given),) * length
    try:
        values = tuple(map(operator.index, values))
        remedy = hints.of_values(values, length)
    except TypeError:
        values, error = (), TypeError
        remedy = hints.of_no_integers(given, length)
    if len(values) != length or min(values, default=1) < 1:
        of_them = "of them" if or_one else f"positive integer{'s' * (length != 1)}"
        must = f"{'a positive integer or ' * or_one}{length} {of_them}"
        call.fail(f"{call.name(argument)} must be {must}", repr(given), remedy, error)
    return values


def _count(call: Call, argument: str, given: Any) -> int:
    """A number of groups."""
    try:
        count, error, remedy = operator.index(given), ValueError, "use 1 without groups"
    except TypeError:
        count, error, remedy = 0, TypeError, hints.of_no_integers(given, 0)
    if count < 1:
        call.fail(f"{call.name(argument)} must be a positive integer", repr(given), remedy, error)
    return count


def _check_groups(
    call: Call,
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    dnums: lax.ConvDimensionNumbers,
    feature_groups: int,
    batch_groups: int,
) -> None:
    n, c = (lhs_shape[d] for d in dnums.lhs_spec[:2])
    o, i = (rhs_shape[d] for d in dnums.rhs_spec[:2])
    x, w, groups = map(call.name, ("lhs", "rhs", "feature_group_count"))
    if feature_groups > 1 and batch_groups > 1:
        call.fail(
            "at most one of feature_group_count and batch_group_count may be above 1",
            f"{feature_groups} and {batch_groups}",
            "split the batch by hand and use feature_group_count",
        )
    if c != feature_groups * i:
        of_x, of_w = call.channels or (f"axis {dnums.lhs_spec[1]}", f"axis {dnums.rhs_spec[1]}")
        guesses = ()
        if call.guesses is not None:
            guesses = call.guesses(feature_groups)
        elif batch_groups == 1:
            guesses = hints.of_lax(tuple(lhs_shape), tuple(rhs_shape), dnums, feature_groups)
        times = f"{groups} ({feature_groups}) times " if groups else ""
        needed = f"{w} needs {c // feature_groups} input channels for this {x}"
        if c % feature_groups:
            needed = f"{groups} must divide the channels of {x}"
        call.fail(
            f"the channels of {x} ({of_x}: {c}) must be {times}the input channels of {w}"
            f" ({of_w}: {i})",
            None,
            hints.likeliest(guesses) or needed,
        )
    for name, count, whole, size in (
        (groups, feature_groups, f"output channels of {w}", o),
        ("batch_group_count", batch_groups, f"output channels of {w}", o),
        ("batch_group_count", batch_groups, f"batch of {x}", n),
    ):
        if size % count:
            call.fail(
                f"{name} must divide the {whole}",
                f"{size} in {count} groups",
                f"use a multiple of {count}, or change {name}",
            )


def well_formed(rhs_shape: Sequence[int], params: Mapping[str, Any]) -> bool:
    """Whether lax can compile these parameters of its primitive: its rules of shape accept more."""
    axes = tuple(range(len(rhs_shape)))
    specs = params["dimension_numbers"]
    if any(tuple(sorted(spec)) != axes for spec in specs):
        return False
    taps = [rhs_shape[d] for d in specs.rhs_spec[2:]]
    factors = [params[name] for name in ("window_strides", "lhs_dilation", "rhs_dilation")]
    return all(
        len(values) == len(taps) and min(values, default=1) > 0 for values in (taps, *factors)
    )
