"""lax-style arguments, checked and normalised to the primitive's parameters."""

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import compat
from jaxconv.spec import Pads, dilate

# Padding of the channels-last functions.
Padding = str | int | Sequence[tuple[int, int]]


def fail(
    function: str, constraint: str, given: object, remedy: str, error: type[Exception] = ValueError
) -> NoReturn:
    """Raises ``error`` with a message in the form shared by all of jaxconv's errors."""
    raise error(f"jaxconv.{function}: {constraint}, got {given}; {remedy}.")


def check_array(function: str, name: str, x: Any, concrete: bool = False) -> None:
    """Raises if ``x`` has no shape and dtype or, where it must be ``concrete``, no values."""
    has_values = isinstance(x, (jax.Array, np.ndarray, np.generic)) or hasattr(x, "__jax_array__")
    has_type = hasattr(x, "shape") and hasattr(x, "dtype")
    if not (has_values if concrete else has_type):
        fail(
            function,
            f"{name} must be an array",
            type(x).__name__,
            "convert it with jnp.asarray",
            TypeError,
        )


# lax's signature without ``out_sharding``, which does not affect the values.
_parameters = inspect.signature(lax.conv_general_dilated).parameters.values()
SIGNATURE = inspect.Signature([p for p in _parameters if p.name != "out_sharding"])


def parse(function: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Checks the arguments of ``lax.conv_general_dilated``; returns the primitive's parameters.

    Args:
      function: the public function named in error messages.
      args, kwargs: those of ``lax.conv_general_dilated``; the operands may be anything with a
        ``shape`` and a ``dtype``.

    Returns:
      The parameters of lax's convolution primitive, except ``out_sharding``: strides, dilations and
      pads as tuples of integers, ``dimension_numbers`` as ``lax.ConvDimensionNumbers``.

    Raises:
      TypeError: operands of different rank or dtype, malformed ``dimension_numbers``, pads or
        dilations, or an impossible ``preferred_element_type``.
      ValueError: everything else that ``lax.conv_general_dilated`` refuses.
    """
    try:
        bound = SIGNATURE.bind(*args, **kwargs)
    except TypeError as error:
        fail(
            function,
            "arguments must be those of lax.conv_general_dilated",
            f"others ({error})",
            "see help(jaxconv.conv_general_dilated)",
            TypeError,
        )
    bound.apply_defaults()
    given = bound.arguments
    lhs, rhs = given["lhs"], given["rhs"]
    for name in ("lhs", "rhs"):
        check_array(function, name, given[name])
    if len(lhs.shape) != len(rhs.shape):
        fail(
            function,
            "lhs and rhs must have the same rank (batch, channels and the spatial dimensions)",
            f"shapes {lhs.shape} and {rhs.shape}",
            "add the missing dimensions",
            TypeError,
        )
    if len(lhs.shape) < 2:
        fail(
            function,
            "lhs and rhs must have at least a batch and a channel dimension",
            f"shapes {lhs.shape} and {rhs.shape}",
            "add them with x[None]",
            TypeError,
        )
    out_dtype = parse_out_dtype(function, lhs.dtype, rhs.dtype, given["preferred_element_type"])
    dnums = parse_dimension_numbers(function, lhs.shape, rhs.shape, given["dimension_numbers"])
    ndim = len(lhs.shape) - 2
    strides = positive(function, "window_strides", given["window_strides"], ndim, ValueError)
    ones = (1,) * ndim
    lhs_dilation, rhs_dilation = (
        ones if given[name] is None else positive(function, name, given[name], ndim, TypeError)
        for name in ("lhs_dilation", "rhs_dilation")
    )
    feature_groups, batch_groups = (
        positive(function, name, (given[name],), 1, ValueError)[0]
        for name in ("feature_group_count", "batch_group_count")
    )

    n, c, *lhs_spatial = (lhs.shape[d] for d in dnums.lhs_spec)
    o, i, *kernel_shape = (rhs.shape[d] for d in dnums.rhs_spec)
    _check_groups(function, n, c, i, o, feature_groups, batch_groups)
    if 0 in kernel_shape:
        fail(
            function,
            "the kernel must have at least one tap in each spatial dimension",
            f"kernel shape {tuple(kernel_shape)}",
            "drop the convolution where there is no kernel",
        )
    window = tuple(map(dilate, kernel_shape, rhs_dilation))
    pads = _pads(function, given["padding"], lhs_spatial, window, strides, lhs_dilation)
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


def parse_out_dtype(function: str, lhs: Any, rhs: Any, preferred: Any) -> np.dtype | None:
    if lhs != rhs:
        fail(
            function,
            "lhs and rhs must have the same dtype",
            f"{np.dtype(lhs).name} and {np.dtype(rhs).name}",
            "cast one of them with .astype",
            TypeError,
        )
    if preferred is None:
        return None
    preferred = np.dtype(compat.check_and_canonicalize_user_dtype(preferred, function))
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
        fail(
            function,
            "preferred_element_type must be as wide as the operands and of their kind"
            " (integers may also become floats, unsigned integers signed ones)",
            f"{preferred.name} for {np.dtype(lhs).name} operands",
            "cast the operands before or the result after",
            TypeError,
        )
    return preferred


def parse_dimension_numbers(
    function: str, lhs_shape: Sequence[int], rhs_shape: Sequence[int], given: Any
) -> lax.ConvDimensionNumbers:
    try:
        dnums = lax.conv_dimension_numbers(lhs_shape, rhs_shape, given)
    except TypeError as error:
        fail(
            function,
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
        fail(
            function,
            f"each spec of dimension_numbers must be a permutation of 0…{axes[-1]}",
            dnums,
            "name every dimension once",
            error,
        )
    return lax.ConvDimensionNumbers(*specs)


def positive(
    function: str, name: str, given: Sequence[int], length: int, error: type[Exception]
) -> tuple[int, ...]:
    """``given`` as ``length`` positive integers, else ``error``; TypeError for non-integers."""
    remedy = "give 1 where there is nothing to do"
    try:
        values = tuple(map(operator.index, given))
    except TypeError:
        values, error = (), TypeError
        remedy = "give static Python integers; under jax.jit, name the argument in static_argnums"
    if len(values) != length or any(value < 1 for value in values):
        shown = given[0] if name.endswith("count") else given
        fail(
            function,
            f"{name} must be "
            + ("a positive integer" if name.endswith("count") else f"{length} positive integers"),
            repr(shown),
            remedy,
            error,
        )
    return values


def _check_groups(
    function: str, n: int, c: int, i: int, o: int, feature_groups: int, batch_groups: int
) -> None:
    if feature_groups > 1 and batch_groups > 1:
        fail(
            function,
            "at most one of feature_group_count and batch_group_count may be above 1",
            f"{feature_groups} and {batch_groups}",
            "split the batch by hand and use feature_group_count",
        )
    if c % feature_groups or c // feature_groups != i:
        fail(
            function,
            "the channels of lhs must be feature_group_count times the input channels of rhs",
            f"{c} channels, {feature_groups} groups, {i} input channels in rhs",
            "check dimension_numbers, whose default is channels first, and the group count",
        )
    for name, count in (("feature", feature_groups), ("batch", batch_groups)):
        if o % count:
            fail(
                function,
                f"{name}_group_count must divide the output channels of rhs",
                f"{o} output channels and {count} groups",
                "each group needs as many output channels as the next",
            )
    if n % batch_groups:
        fail(
            function,
            "batch_group_count must divide the batch of lhs",
            f"a batch of {n} and {batch_groups} groups",
            "each group needs as many images as the next",
        )


def _pads(
    function: str,
    padding: Any,
    lhs_spatial: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    lhs_dilation: Sequence[int],
) -> Pads:
    """Padding as (low, high) pairs; strings are resolved against the dilated window."""
    if isinstance(padding, str):
        if any(d > 1 for d in lhs_dilation):
            fail(
                function,
                "padding must be explicit (low, high) pairs where lhs_dilation is above 1",
                repr(padding),
                "give pairs, or use conv_transpose",
            )
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            fail(
                function,
                "padding must be 'SAME', 'SAME_LOWER', 'VALID' or (low, high) pairs",
                repr(padding),
                "use one of these",
            )
        return tuple(lax.padtype_to_pads(lhs_spatial, window, strides, padding))
    pads = parse_pairs(function, padding, len(lhs_spatial))
    for size, d, (lo, hi) in zip(lhs_spatial, lhs_dilation, pads, strict=True):
        if dilate(size, d) + lo + hi < 0:
            fail(
                function,
                "negative padding must not be larger than the dimension that it crops",
                f"padding {(lo, hi)} for {dilate(size, d)} elements",
                "crop less",
            )
    return pads


def parse_pairs(function: str, padding: Any, ndim: int) -> Pads:
    """Explicit padding as ``ndim`` pairs of integers."""
    try:
        pads = tuple((operator.index(lo), operator.index(hi)) for lo, hi in padding)
    except (TypeError, ValueError):
        fail(
            function,
            "padding must be 'SAME', 'SAME_LOWER', 'VALID' or (low, high) pairs of integers",
            repr(padding),
            "give one pair for each spatial dimension",
        )
    if len(pads) != ndim:
        fail(
            function,
            f"padding must have one (low, high) pair for each of {ndim} spatial dimensions",
            repr(padding),
            "add or drop pairs",
            TypeError,
        )
    return pads


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


def operand(function: str, name: str, x: Any) -> Array:
    """``x`` as a JAX array; a list is refused."""
    check_array(function, name, x, concrete=True)
    return jnp.asarray(x)


def per_axis(function: str, name: str, value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """An integer for all spatial axes, or one for each."""
    try:
        values = (value,) * ndim if isinstance(value, (int, np.integer)) else tuple(value)
    except TypeError:
        values = None
    if values is None or len(values) != ndim:
        fail(
            function,
            f"{name} must be an integer or {ndim} of them, one for each spatial dimension",
            repr(value),
            "give one for each",
        )
    return values


def resolve_padding(
    function: str, padding: Padding, kernel_shape: Sequence[int], dilation: Sequence[int]
) -> str | Sequence[tuple[int, int]]:
    """Channels-last padding (an int, "CAUSAL", …) as ``lax.conv_general_dilated`` takes it."""
    if isinstance(padding, (int, np.integer)):
        return ((int(padding), int(padding)),) * len(kernel_shape)
    if isinstance(padding, str) and padding.upper() == "CAUSAL":
        if len(kernel_shape) != 1:
            fail(
                function,
                "padding 'CAUSAL' is for one spatial dimension",
                f"{len(kernel_shape)} of them",
                "give (low, high) pairs",
            )
        return tuple(((k - 1) * d, 0) for k, d in zip(kernel_shape, dilation, strict=True))
    return padding
