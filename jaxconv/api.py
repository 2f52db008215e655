"""The functions that users call."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxconv import compat
from jaxconv.algorithms import UnsupportedConvError
from jaxconv.arguments import hints, parse
from jaxconv.arguments.channels_last import NAMES, Padding, lax_arguments
from jaxconv.arguments.errors import Call, fail, operand
from jaxconv.planning.choose import check_algorithm
from jaxconv.sharding.borders import with_borders
from jaxconv.spec import ConvSpec, dilate
from jaxconv.transforms.primitive import conv_p


def _convolve(
    call: Call, lhs: Array, rhs: Array, algorithm: str, out_sharding: Any, *args: Any, **kwargs: Any
) -> Array:
    """Parses lax's arguments and binds the primitive."""
    if compat.is_constant_shape((*lhs.shape, *rhs.shape)):
        params = parse.parameters(call, lhs, rhs, *args, **kwargs)
        return _bind(call, lhs, rhs, algorithm, params, out_sharding)
    if algorithm not in ("auto", "xla"):
        constraint, remedy = "symbolic shapes are for algorithm 'auto' or 'xla'", "use one of these"
        fail(call.function, constraint, repr(algorithm), remedy, UnsupportedConvError)
    return lax.conv_general_dilated(lhs, rhs, *args, **kwargs, out_sharding=out_sharding)


def _bind(
    call: Call, lhs: Array, rhs: Array, algorithm: str, params: Any, out_sharding: Any = None
) -> Array:
    """Binds the primitive, whose parameters were parsed."""
    check_algorithm(call.function, algorithm, ConvSpec.from_params(lhs, rhs, params))
    if out_sharding is not None:
        if not isinstance(out_sharding, NamedSharding | PartitionSpec):
            constraint = "out_sharding must be a jax.sharding.NamedSharding or PartitionSpec"
            remedy = "pass one such as jax.P('x')"
            fail(call.function, constraint, repr(out_sharding), remedy, TypeError)
        out_sharding = compat.canonicalize_sharding(out_sharding, call.function)
    lhs, rhs = compat.auto_insert_reshard(lhs, rhs)
    return conv_p.bind(lhs, rhs, **params, out_sharding=out_sharding, algorithm=algorithm)


def _operands(function: str, lhs: Any, rhs: Any, **more: Any) -> tuple[Call, Array, Array]:
    lhs, rhs = operand(function, "lhs", lhs), operand(function, "rhs", rhs)
    return Call(function, {"lhs": lhs.shape, "rhs": rhs.shape}, **more), lhs, rhs


def conv_general_dilated(
    lhs: ArrayLike,
    rhs: ArrayLike,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
    *,
    algorithm: str = "auto",
) -> Array:
    """``lax.conv_general_dilated``, by the algorithm that is fastest for it.

    Args:
      lhs: the image, (batch, channels, spatial…) unless ``dimension_numbers`` say otherwise.
      rhs: the kernel, (output channels, input channels / feature groups, spatial…) likewise.
      window_strides: window stride per spatial dimension.
      padding: "SAME", "SAME_LOWER", "VALID", or (low, high) pairs; negative ones crop.
      lhs_dilation, rhs_dilation: distance between neighbouring elements of image and kernel.
      dimension_numbers: a ``lax.ConvDimensionNumbers``, or ``("NHWC", "HWIO", "NHWC")``, say.
      feature_group_count, batch_group_count: groups of channels, or of images, that are convolved
        independently; at most one of the two may exceed 1.
      precision: of the products, as in ``lax``.
      preferred_element_type: dtype to accumulate in and to return.
      out_sharding: as in ``lax``, for meshes with explicit axes.
      algorithm: "auto", or a name in ``ALGORITHMS``, for derivatives too where it supports them.

    Returns:
      The convolution (cross-correlation, as in ``lax``), of the shape and dtype that lax returns.

    Raises:
      TypeError, ValueError: where lax raises; the message says what to do.
      UnsupportedConvError: the named algorithm can't do this convolution.

    Example:
      >>> import jax.numpy as jnp, jaxconv
      >>> image, kernel = jnp.ones((1, 1, 5, 5)), jnp.ones((1, 1, 3, 3))
      >>> jaxconv.conv_general_dilated(image, kernel, (1, 1), "VALID")[0, 0, 0]
      Array([9., 9., 9.], dtype=float32)
    """
    call, lhs, rhs = _operands("conv_general_dilated", lhs, rhs)
    dilations, groups = (lhs_dilation, rhs_dilation), (feature_group_count, batch_group_count)
    types = precision, preferred_element_type
    arguments = window_strides, padding, *dilations, dimension_numbers, *groups, *types
    return _convolve(call, lhs, rhs, algorithm, out_sharding, *arguments)


def conv(
    x: ArrayLike,
    w: ArrayLike,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    spatial_axes: Sequence[str | tuple[str, ...] | None] | None = None,
    algorithm: str = "auto",
) -> Array:
    """Channels-last convolution of as many dimensions as the kernel has.

    Args:
      x: (N, spatial…, C), or (spatial…, C) without a batch.
      w: (kernel…, C / groups, O).
      strides, dilation: an integer, or one per spatial dimension; dilation is the kernel's.
      padding: "SAME", "SAME_LOWER", "VALID", "CAUSAL" (1-D: an output sees no later input), an
        integer for all sides, or (low, high) pairs.
      groups: groups of channels convolved independently; C for a depthwise convolution.
      precision, preferred_element_type, algorithm: as in ``conv_general_dilated``.
      spatial_axes: inside ``jax.shard_map``, where each device holds a part of the image: for each
        spatial dimension the mesh axis, or axes, over which it is cut, or None. ``padding`` is that
        of the whole image; each device receives its neighbours' borders and returns its part of
        the output. (Under ``jit`` with sharded arrays that happens by itself.)

    Returns:
      (N, out spatial…, O), without N where x has none.

    Raises:
      TypeError, ValueError, UnsupportedConvError: as ``conv_general_dilated``.

    Example:
      >>> import jax.numpy as jnp, jaxconv
      >>> jaxconv.conv(jnp.ones((2, 32, 32, 3)), jnp.ones((3, 3, 3, 8)), strides=2).shape
      (2, 16, 16, 8)
    """
    x, w = operand("conv", "x", x), operand("conv", "w", w)
    types = {"precision": precision, "preferred_element_type": preferred_element_type}
    call, arguments = lax_arguments("conv", x, w, strides, padding, dilation, groups, **types)
    batched = x.ndim == w.ndim
    x = x if batched else x[None]
    if spatial_axes is None:
        out = _convolve(call, x, w, algorithm, None, **arguments)
    else:
        x, params = with_borders(call, x, w, spatial_axes, arguments)
        out = _bind(call, x, w, algorithm, params)
    return out if batched else out[0]


def conv_transpose(
    lhs: ArrayLike,
    rhs: ArrayLike,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    transpose_kernel: bool = False,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    use_consistent_padding: bool = False,
    *,
    algorithm: str = "auto",
) -> Array:
    """``lax.conv_transpose``: a convolution with fractional strides, by the fastest algorithm.

    Args:
      lhs: the image, channels last unless ``dimension_numbers`` say otherwise (lax's convention).
      rhs: the kernel, (kernel…, input channels, output channels) likewise.
      strides: the factor by which each spatial dimension grows.
      padding: "SAME", "VALID" (of the convolution that this transposes), or (low, high) pairs of
        this convolution itself; with ``use_consistent_padding``, of the one it transposes.
      rhs_dilation: distance between neighbouring kernel elements.
      dimension_numbers: as in ``conv_general_dilated``; default: channels last.
      transpose_kernel: flip the kernel's spatial axes and swap its channel axes, so that the result
        is the input gradient of the convolution with ``rhs`` (as Keras and PyTorch define it).
      precision, preferred_element_type, algorithm: as in ``conv_general_dilated``.

    Returns:
      The transposed convolution, of the shape and dtype that lax returns.

    Raises:
      TypeError, ValueError, UnsupportedConvError: as ``conv_general_dilated``.

    Example:
      >>> import jax.numpy as jnp, jaxconv
      >>> image, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 2))
      >>> jaxconv.conv_transpose(image, kernel, (2, 2), "SAME").shape
      (1, 16, 16, 2)
    """
    names = {"window_strides": "strides", "feature_group_count": ""}
    paddings = "'SAME', 'VALID', with strides of 1 'SAME_LOWER', or (low, high) pairs"
    words = {"names": names, "paddings": paddings, "transpose_kernel": transpose_kernel}
    call, lhs, rhs = _operands("conv_transpose", lhs, rhs, **words)
    ndim = rhs.ndim - 2
    numbers = hints.lettered(rhs.ndim) if dimension_numbers is None else dimension_numbers
    dnums = parse.parse_dimension_numbers(call, lhs.shape, rhs.shape, numbers, strides)
    strides = parse.positive(call, "window_strides", strides, ndim, TypeError)
    rhs_dilation = (1,) * ndim if rhs_dilation is None else rhs_dilation
    rhs_dilation = parse.positive(call, "rhs_dilation", rhs_dilation, ndim, TypeError)
    window = map(dilate, [rhs.shape[d] for d in dnums.rhs_spec[2:]], rhs_dilation)
    padding = parse.transpose_padding(call, padding, window, strides, use_consistent_padding)
    if transpose_kernel:
        rhs = jnp.flip(rhs, dnums.rhs_spec[2:]).swapaxes(*dnums.rhs_spec[:2])
    dilations, types = (strides, rhs_dilation), (precision, preferred_element_type)
    arguments = (1,) * ndim, padding, *dilations, dnums, 1, 1, *types
    return _convolve(call, lhs, rhs, algorithm, None, *arguments)


def pointwise(
    x: ArrayLike,
    w: ArrayLike,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """1×1 convolution: a single contraction over channels, without gathering patches.

    Args:
      x: (…, C), with any number of leading axes, batch or spatial.
      w: (C, O).
      precision, preferred_element_type: as in ``conv_general_dilated``.

    Returns:
      (…, O).

    Raises:
      TypeError: ranks, channels or dtypes that don't fit.

    Example:
      >>> import jax.numpy as jnp, jaxconv
      >>> jaxconv.pointwise(jnp.ones((2, 7, 7, 64)), jnp.ones((64, 256))).shape
      (2, 7, 7, 256)
    """
    x, w = operand("pointwise", "x", x), operand("pointwise", "w", w)
    call = Call("pointwise", {"x": x.shape, "w": w.shape}, NAMES)
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        guesses = hints.of_pointwise(x.shape, w.shape) if min(x.ndim, w.ndim) > 0 else ()
        remedy = hints.likeliest(guesses) or "w needs as many rows as x has channels"
        call.fail("x must be (…, C) and w (C, O)", None, remedy, TypeError)
    parse.parse_out_dtype(call, x.dtype, w.dtype, preferred_element_type)
    parse.parse_precision(call, precision)
    types = {"precision": precision, "preferred_element_type": preferred_element_type}
    return jnp.einsum("...c,co->...o", x, w, **types)
