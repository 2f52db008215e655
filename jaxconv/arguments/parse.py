"""lax-style arguments, checked and normalised to the primitive's parameters."""

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv import compat
from jaxconv.arguments import hints
from jaxconv.arguments.errors import Call, check_array
from jaxconv.arguments.padding import to_pairs
from jaxconv.spec import dilate

# lax's signature without ``out_sharding``, which does not affect the values.
_parameters = inspect.signature(lax.conv_general_dilated).parameters.values()
SIGNATURE = inspect.Signature([p for p in _parameters if p.name != "out_sharding"])


def parse(function: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Checks the arguments of ``lax.conv_general_dilated``; returns the primitive's parameters.

    Args:
      function: the public function named in error messages.
      args, kwargs: those of ``lax.conv_general_dilated``; the operands may be anything with a
        ``shape`` and a ``dtype``.

    Returns, Raises: as ``parameters``.
    """
    given = SIGNATURE.bind(*args, **kwargs).arguments
    for name in ("lhs", "rhs"):
        check_array(function, name, given[name])
    call = Call(function, {name: given[name].shape for name in ("lhs", "rhs")})
    return parameters(call, **given)


def parameters(call: Call, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The parameters of lax's primitive for arguments of ``lax.conv_general_dilated``.

    Args:
      call: the user's, for error messages.
      args, kwargs: those of ``lax.conv_general_dilated``; the operands have been checked to be
        arrays, or to stand for some.

    Returns:
      The parameters of lax's convolution primitive, except ``out_sharding``: strides, dilations and
      pads as tuples of integers, ``dimension_numbers`` as ``lax.ConvDimensionNumbers``.

    Raises:
      TypeError: operands of different rank or dtype, malformed ``dimension_numbers``, pads or
        dilations, or an impossible ``preferred_element_type``.
      ValueError: everything else that ``lax.conv_general_dilated`` refuses.
    """
    bound = SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    lhs, rhs = given["lhs"], given["rhs"]
    check_ranks(call, lhs.shape, rhs.shape)
    out_dtype = parse_out_dtype(call, lhs.dtype, rhs.dtype, given["preferred_element_type"])
    dnums = parse_dimension_numbers(call, lhs.shape, rhs.shape, given["dimension_numbers"])
    ndim = len(lhs.shape) - 2
    strides = positive(call, "window_strides", given["window_strides"], ndim, ValueError)
    ones = (1,) * ndim
    lhs_dilation, rhs_dilation = (
        ones if given[name] is None else positive(call, name, given[name], ndim, TypeError)
        for name in ("lhs_dilation", "rhs_dilation")
    )
    feature_groups, batch_groups = (
        _count(call, name, given[name]) for name in ("feature_group_count", "batch_group_count")
    )

    n, c, *lhs_spatial = (lhs.shape[d] for d in dnums.lhs_spec)
    o, i, *kernel_shape = (rhs.shape[d] for d in dnums.rhs_spec)
    canonical = (n, *lhs_spatial, c), (*kernel_shape, i, o)
    _check_groups(call, lhs, rhs, dnums, canonical, feature_groups, batch_groups)
    if 0 in kernel_shape:
        call.fail(
            "the kernel must have at least one tap in each spatial dimension",
            f"kernel shape {tuple(kernel_shape)}",
            "drop the convolution where there is no kernel",
        )
    window = tuple(map(dilate, kernel_shape, rhs_dilation))
    pads = to_pairs(call, given["padding"], lhs_spatial, window, strides, lhs_dilation)
    return {
        "window_strides": strides,
        "padding": pads,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dnums,
        "feature_group_count": feature_groups,
        "batch_group_count": batch_groups,
        "precision": compat.canonicalize_precision(given["precision"]),
        "preferred_element_type": out_dtype,
    }


def check_ranks(call: Call, lhs_shape: Sequence[int], rhs_shape: Sequence[int]) -> None:
    if len(lhs_shape) != len(rhs_shape):
        added = f"a batch is {call.name('lhs')}[None]"
        missing = len(lhs_shape) == len(rhs_shape) - 1
        call.fail(
            f"{call.name('lhs')} and {call.name('rhs')} must have the same rank (batch, channels"
            " and the spatial dimensions)",
            None,
            "add the missing dimensions" + (f"; {added}" if missing else ""),
            TypeError,
        )
    if len(lhs_shape) < 2:
        call.fail(
            f"{call.name('lhs')} and {call.name('rhs')} must have at least a batch and a channel"
            " dimension",
            None,
            "add them with x[None]",
            TypeError,
        )


def parse_out_dtype(call: Call, lhs: Any, rhs: Any, preferred: Any) -> np.dtype | None:
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
    preferred = np.dtype(compat.check_and_canonicalize_user_dtype(preferred, call.function))
    widens = preferred.itemsize >= np.dtype(lhs).itemsize
    issub = jnp.issubdtype
    if issub(lhs, np.integer) and issub(preferred, np.floating):
        compatible = True
    elif issub(lhs, np.signedinteger):
        compatible = issub(preferred, np.signedinteger)
    else:
        kinds = (np.integer, np.floating, np.complexfloating)
        compatible = all(issub(preferred, kind) for kind in kinds if issub(lhs, kind))
    if not (widens and compatible):
        call.fail(
            "preferred_element_type must be as wide as the operands and of their kind"
            " (integers may also become floats, unsigned integers signed ones)",
            f"{preferred.name} with {np.dtype(lhs).name} operands",
            "cast the operands before or the result after",
            TypeError,
        )
    return preferred


def _cast(x: str, w: str, lhs: Any, rhs: Any) -> str:
    """The cast that is most likely wanted: from integers to floats, or else to fewer bits."""

    def rank(dtype: Any) -> tuple[bool, int]:
        return not jnp.issubdtype(dtype, np.inexact), np.dtype(dtype).itemsize

    return f"{x}.astype({w}.dtype)" if rank(lhs) > rank(rhs) else f"{w}.astype({x}.dtype)"


def parse_dimension_numbers(
    call: Call, lhs_shape: Sequence[int], rhs_shape: Sequence[int], given: Any
) -> lax.ConvDimensionNumbers:
    try:
        dnums = lax.conv_dimension_numbers(lhs_shape, rhs_shape, given)
    except TypeError as error:
        call.fail(
            "dimension_numbers must be None, a ConvDimensionNumbers, or three strings such as"
            f" ('NHWC', 'HWIO', 'NHWC') of length {len(lhs_shape)}",
            repr(given),
            str(error).rstrip("."),
            TypeError,
        )
    axes = list(range(len(lhs_shape)))
    error = ValueError
    try:
        specs = [tuple(map(operator.index, spec)) for spec in dnums]
    except TypeError:
        specs, error = [()], TypeError
    if any(sorted(spec) != axes for spec in specs):
        call.fail(
            f"each spec of dimension_numbers must be a permutation of 0…{axes[-1]}",
            dnums,
            "name every dimension once",
            error,
        )
    return lax.ConvDimensionNumbers(*specs)


def positive(
    call: Call, argument: str, given: Any, length: int, error: type[Exception]
) -> tuple[int, ...]:
    """``given`` as ``length`` positive integers, else ``error``; TypeError for non-integers."""
    try:
        values = tuple(map(operator.index, given))
        remedy = hints.of_values(values, length)
    except TypeError:
        values, error = (), TypeError
        remedy = hints.of_no_integers(given, length)
    if len(values) != length or any(value < 1 for value in values):
        constraint = f"{call.name(argument)} must be {length} positive integers"
        call.fail(constraint, repr(given), remedy, error)
    return values


def _count(call: Call, argument: str, given: Any) -> int:
    """A number of groups."""
    try:
        count, error, remedy = operator.index(given), ValueError, "give 1 where there are no groups"
    except TypeError:
        count, error, remedy = 0, TypeError, hints.of_no_integers(given, 1)
    if count < 1:
        call.fail(f"{call.name(argument)} must be a positive integer", repr(given), remedy, error)
    return count


def _check_groups(
    call: Call,
    lhs: Any,
    rhs: Any,
    dnums: lax.ConvDimensionNumbers,
    canonical: tuple[tuple[int, ...], tuple[int, ...]],
    feature_groups: int,
    batch_groups: int,
) -> None:
    """Args: canonical: the shapes of ``lhs`` and ``rhs`` in the canonical layout."""
    (n, *_, c), (*_, i, o) = canonical
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
            guesses = hints.of_lax(lhs.shape, rhs.shape, canonical, feature_groups)
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
    for name, count in ((groups, feature_groups), ("batch_group_count", batch_groups)):
        if o % count:
            call.fail(
                f"{name} must divide the output channels of {w}",
                f"{o} output channels and {count} groups",
                "each group needs as many output channels as the next",
            )
    if n % batch_groups:
        call.fail(
            "batch_group_count must divide the batch of lhs",
            f"a batch of {n} and {batch_groups} groups",
            "each group needs as many images as the next",
        )


def well_formed(rhs_shape: Sequence[int], params: Mapping[str, Any]) -> bool:
    """Whether lax can compile a convolution with these parameters of its primitive.

    lax's shape and dtype rules accept some that its lowering rejects.
    """
    axes = tuple(range(len(rhs_shape)))
    specs = params["dimension_numbers"]
    if any(tuple(sorted(spec)) != axes for spec in specs):
        return False
    taps = [rhs_shape[d] for d in specs.rhs_spec[2:]]
    factors = [params[name] for name in ("window_strides", "lhs_dilation", "rhs_dilation")]
    return all(
        len(values) == len(taps) and min(values, default=1) > 0 for values in (taps, *factors)
    )
