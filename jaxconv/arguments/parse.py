"""lax-style arguments, checked and normalised to the primitive's parameters."""

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxconv import compat
from jaxconv.arguments import hints
from jaxconv.arguments.errors import Call
from jaxconv.arguments.hints import Shape
from jaxconv.spec import Pads, dilate


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
    """Lax's arguments, of which operands need a shape and a dtype only, as the parameters of its
    primitive, but ``out_sharding``. Errors are of the classes that lax raises."""
    dnums = parse_dimension_numbers(call, lhs.shape, rhs.shape, dimension_numbers, window_strides)
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
    lhs_spatial = tuple(lhs.shape[d] for d in dnums.lhs_spec[2:])
    kernel_shape = tuple(rhs.shape[d] for d in dnums.rhs_spec[2:])
    if 0 in kernel_shape:
        constraint = "the kernel must have at least one tap in each spatial dimension"
        remedy = "drop the convolution where there is no kernel"
        call.fail(constraint, f"kernel shape {kernel_shape}", remedy)
    window = tuple(map(dilate, kernel_shape, rhs_dilation))
    return {
        "window_strides": strides,
        "padding": _pads(call, padding, lhs_spatial, window, strides, lhs_dilation),
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dnums,
        "feature_group_count": feature_groups,
        "batch_group_count": batch_groups,
        "precision": parse_precision(call, precision),
        "preferred_element_type": out_dtype,
    }


def parse_dimension_numbers(
    call: Call, lhs_shape: Shape, rhs_shape: Shape, given: Any, strides: Any
) -> lax.ConvDimensionNumbers:
    """``dimension_numbers`` as axes; raises where the operands lack batch and channels."""
    rank, (x, w, name) = len(lhs_shape), map(call.name, ("lhs", "rhs", "window_strides"))
    operands = x, w, lhs_shape, rhs_shape, given
    if rank != len(rhs_shape) or rank < 2:
        must = "at least a batch and a channel dimension"
        if rank != len(rhs_shape):
            must = "the same rank (batch, channels and the spatial dimensions)"
        call.fail(f"{x} and {w} must have {must}", None, hints.of_axes(*operands), TypeError)
    try:
        dnums = lax.conv_dimension_numbers(lhs_shape, rhs_shape, given)
    except TypeError:
        strings = f"three strings of length {rank} such as {hints.lettered(rank, given)}"
        constraint = f"dimension_numbers must be None, a lax.ConvDimensionNumbers, or {strings}"
        call.fail(constraint, repr(given), hints.of_dimension_numbers(*operands), TypeError)
    try:
        specs, error = [tuple(map(operator.index, spec)) for spec in dnums], ValueError
    except TypeError:
        specs, error = [()], TypeError
    if any(sorted(spec) != list(range(rank)) for spec in specs):
        constraint = f"each spec of dimension_numbers must be a permutation of 0…{rank - 1}"
        call.fail(constraint, dnums, "name every dimension once", error)
    c, i = lhs_shape[dnums.lhs_spec[1]], rhs_shape[dnums.rhs_spec[1]]
    count = len(strides) if isinstance(strides, Sequence) else -1
    if (rank == 2 and count != 0) or (rank == count and c % max(i, 1)):  # a stride for each axis
        must = f"must have batch and channels besides the spatial dimensions of {name}"
        call.fail(f"{x} and {w} {must}", f"{name} {strides!r}", hints.of_axes(*operands))
    return lax.ConvDimensionNumbers(*specs)


def parse_out_dtype(
    call: Call, lhs: np.dtype, rhs: np.dtype, preferred: DTypeLike | None
) -> np.dtype | None:
    if lhs != rhs:
        x, w = call.name("lhs"), call.name("rhs")
        given = f"{np.dtype(lhs).name} and {np.dtype(rhs).name}"
        order = (np.inexact, np.complexfloating)  # after integers
        of_x, of_w = ([jnp.issubdtype(dtype, kind) for kind in order] for dtype in (lhs, rhs))
        cast = f"{w}.astype({x}.dtype)" if of_x >= of_w else f"{x}.astype({w}.dtype)"
        remedy = f"cast one of them with .astype, for example {cast}"
        call.fail(f"{x} and {w} must have the same dtype", given, remedy, TypeError)
    if preferred is None:
        return None
    try:
        dtype = np.dtype(compat.check_and_canonicalize_user_dtype(preferred, call.function))
    except (TypeError, ValueError):
        given = repr(preferred)
        remedy = hints.of_name(preferred, hints.DTYPES, "use one such as jnp.float32", 0.5)
        if hasattr(preferred, "dtype"):
            given, remedy = type(preferred).__name__, "use its .dtype"
        call.fail("preferred_element_type must be a dtype of numbers", given, remedy, TypeError)
    issub = jnp.issubdtype
    kinds = (np.signedinteger, np.integer, np.floating, np.complexfloating)
    compatible = all(issub(dtype, kind) for kind in kinds if issub(lhs, kind))
    compatible |= issub(lhs, np.integer) and issub(dtype, np.floating)
    if dtype.itemsize < np.dtype(lhs).itemsize or not compatible:
        also = "integers may also become floats, unsigned integers signed ones"
        must = f"must be as wide as the operands and of their kind ({also})"
        constraint = f"preferred_element_type {must}"
        given = f"{dtype.name} with {np.dtype(lhs).name} operands"
        call.fail(constraint, given, "cast the operands before or the result after", TypeError)
    return dtype


def parse_precision(call: Call, given: lax.PrecisionLike) -> Any:
    try:
        return compat.canonicalize_precision(given)
    except ValueError:
        kinds = "None, a name such as 'highest', a lax.Precision, two of either"
        constraint = f"precision must be {kinds}, or a lax.DotAlgorithmPreset"
        names = (*hints.PRECISIONS, *lax.DotAlgorithmPreset.__members__)
        call.fail(constraint, repr(given), hints.of_name(given, names, "use a name"))


def positive(
    call: Call, name: str, given: Any, length: int, error: Any = ValueError, or_one: bool = False
) -> tuple[int, ...]:
    """``given``, or ``or_one`` number for all, as ``length`` positive integers; else ``error``."""
    try:
        is_one = or_one and hasattr(given, "__index__") and not np.ndim(given)
        values = tuple(map(operator.index, (given,) * length if is_one else given))
        remedy = hints.of_values(values, length)
    except TypeError:
        values, error = (), TypeError
        remedy = hints.of_no_integers(given, length)
    if len(values) != length or min(values, default=1) < 1:
        of_them = "of them" if or_one else f"positive integer{'s' * (length != 1)}"
        must = f"{'a positive integer or ' * or_one}{length} {of_them}"
        call.fail(f"{call.name(name)} must be {must}", repr(given), remedy, error)
    return values


def _count(call: Call, argument: str, given: Any) -> int:
    try:
        count, error, remedy = operator.index(given), ValueError, "use 1 without groups"
    except TypeError:
        count, error, remedy = 0, TypeError, hints.of_no_integers(given, 0)
    if count < 1:
        call.fail(f"{call.name(argument)} must be a positive integer", repr(given), remedy, error)
    return count


def _check_groups(
    call: Call, lhs: Shape, rhs: Shape, dnums: Any, feature_groups: int, batch_groups: int
) -> None:
    n, c = (lhs[d] for d in dnums.lhs_spec[:2])
    o, i = (rhs[d] for d in dnums.rhs_spec[:2])
    x, w, groups = map(call.name, ("lhs", "rhs", "feature_group_count"))
    if feature_groups > 1 and batch_groups > 1:
        constraint = "at most one of feature_group_count and batch_group_count may be above 1"
        remedy = "split the batch by hand and use feature_group_count"
        call.fail(constraint, f"{feature_groups} and {batch_groups}", remedy)
    if c != feature_groups * i:
        inputs = dnums.rhs_spec[0 if call.transpose_kernel else 1]
        of_x, of_w = call.channels or (f"axis {dnums.lhs_spec[1]}", f"axis {inputs}")
        times = f"{groups} ({feature_groups}) times " if groups else ""
        must = f"must be {times}the input channels of {w} ({of_w}: {i})"
        needed = f"{w} needs {c // feature_groups} input channels for this {x}"
        if c % feature_groups:
            needed = f"{groups} must divide the channels of {x}"
        of_lax = partial(hints.of_lax, *call.shapes.values(), dnums, call.transpose_kernel)
        remedy = hints.likeliest((call.guesses or of_lax)(feature_groups)) or needed
        call.fail(f"the channels of {x} ({of_x}: {c}) {must}", None, remedy)
    for name, count, whole, size in (
        (groups, feature_groups, f"output channels of {w}", o),
        ("batch_group_count", batch_groups, f"output channels of {w}", o),
        ("batch_group_count", batch_groups, f"batch of {x}", n),
    ):
        if size % count:
            given, remedy = f"{size} in {count} groups", f"use a multiple of {count}"
            call.fail(f"{name} must divide the {whole}", given, f"{remedy}, or change {name}")


def plannable(lhs: Any, rhs: Any, params: Mapping[str, Any]) -> bool:
    """Whether sizes are numbers, and lax can compile it, whose rule of shape accepts more."""
    specs = params["dimension_numbers"]
    if any(sorted(spec) != list(range(len(rhs.shape))) for spec in specs):
        return False
    taps = [rhs.shape[d] for d in specs.rhs_spec[2:]]
    factors = [params[name] for name in ("window_strides", "lhs_dilation", "rhs_dilation")]
    return compat.is_constant_shape((*lhs.shape, *rhs.shape)) and all(
        len(values) == len(taps) and min(values, default=1) > 0 for values in (taps, *factors)
    )


def _pads(
    call: Call, padding: Any, sizes: Shape, window: Shape, strides: Shape, lhs_dilation: Shape
) -> Pads:
    """Padding as (low, high) pairs; strings are resolved against the dilated window."""
    if isinstance(padding, str):
        if any(d > 1 for d in lhs_dilation):
            constraint = "padding must be explicit (low, high) pairs where lhs_dilation is above 1"
            call.fail(constraint, repr(padding), "pass pairs, or use conv_transpose")
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            fail_padding(call, padding)
        return tuple(lax.padtype_to_pads(sizes, window, strides, padding))
    pads = parse_pairs(call, padding, len(sizes))
    for size, d, (lo, hi) in zip(sizes, lhs_dilation, pads, strict=True):
        if dilate(size, d) + lo + hi < 0:
            constraint = "negative padding must not be larger than the dimension that it crops"
            given = f"padding {(lo, hi)} of {dilate(size, d)} elements"
            call.fail(constraint, given, "crop less")
    return pads


def fail_padding(call: Call, padding: str) -> NoReturn:
    # It may be one of them for other strides.
    choices = [name for name in re.findall("'(.+?)'", call.paddings) if name != padding]
    call.fail(f"padding must be {call.paddings}", repr(padding), hints.of_name(padding, choices))


def parse_pairs(call: Call, padding: Any, ndim: int) -> Pads:
    try:
        pads = tuple((operator.index(lo), operator.index(hi)) for lo, hi in padding)
    except (TypeError, ValueError):
        remedy = hints.of_pads(padding, ndim)
        call.fail(f"padding must be {call.paddings} of integers", repr(padding), remedy)
    if len(pads) != ndim:
        must = f"must have one (low, high) pair for each of {ndim} spatial dimensions"
        call.fail(f"padding {must}", repr(padding), hints.of_values(pads, ndim), TypeError)
    return pads


def transpose_padding(
    call: Call, padding: Any, window: Iterable[int], strides: Sequence[int], consistent: bool
) -> str | Pads:
    """``padding`` of ``lax.conv_transpose`` as that of the convolution that it runs."""
    if not isinstance(padding, str):
        pairs = parse_pairs(call, padding, len(strides))
        if not consistent:
            return pairs
        ends = zip(window, pairs, strict=True)
        return tuple((k - 1 - low, k - 1 - high) for k, (low, high) in ends)
    if padding not in ("SAME", "VALID"):
        if consistent or max(strides, default=1) > 1:
            fail_padding(call, padding)
        return padding
    pads = []
    for k, stride in zip(window, strides, strict=True):
        total, low = k + stride - 2, k - 1
        if padding == "VALID":
            total += max(k - stride, 0)
        elif stride < k:
            low = -(-total // 2)
        pads.append((low, total - low))
    return tuple(pads)
