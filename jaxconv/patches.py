"""``im2col`` and ``col2im``: the patch matrix by itself, and its exact adjoint."""

import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax
from jax.typing import ArrayLike

from jaxconv import layout, loops
from jaxconv.arguments.channels_last import NAMES, PADDINGS, Padding, resolve_padding
from jaxconv.arguments.errors import Call, fail, operand
from jaxconv.arguments.hints import Shape, lettered
from jaxconv.arguments.parse import parameters, positive
from jaxconv.spec import ConvSpec


def _patch_spec(call: Call, x_shape: Shape, dtype: Any, kernel: Shape, steps: Any) -> ConvSpec:
    """The spec of the convolution whose patches are gathered; ``x_shape`` includes the batch,
    ``steps`` are strides, padding and dilation."""
    strides, padding, dilation = steps
    ndim, rank = len(kernel), len(x_shape)
    if rank != ndim + 2:
        x, channel_axis = "x", "x[..., None]"
        if call.function == "col2im":
            x, channel_axis = "x_shape", f"{(*x_shape, 1)}"
        remedy = f"pass {rank - 2} sizes, or {rank - 1} if there is no batch"
        if rank == ndim > 1 and kernel[-2] == x_shape[-1]:
            remedy = f"leave out the kernel's channels: {kernel[:-2]}"
        elif rank < ndim and x != "x":
            remedy = "x_shape and kernel_shape look swapped: x_shape comes first"
        elif rank <= ndim:
            remedy = f"add a channel axis, {channel_axis}, or pass fewer sizes"
        must = "must have one size for each spatial dimension"
        constraint = f"kernel_shape {must} of {x}, which is (N, spatial…, C) or (spatial…, C)"
        call.fail(constraint, None, remedy)
    lhs, rhs = (ShapeDtypeStruct(s, dtype) for s in (x_shape, (*kernel, x_shape[-1], 1)))
    dilation = positive(call, "rhs_dilation", dilation, ndim, or_one=True)
    strides = positive(call, "window_strides", strides, ndim, or_one=True)
    padding = resolve_padding(call, padding, kernel, dilation)
    others = {"rhs_dilation": dilation, "dimension_numbers": lettered(rank)}
    return ConvSpec.from_params(lhs, rhs, parameters(call, lhs, rhs, strides, padding, **others))


def _shape(function: str, name: str, given: Any, remedy: str, least: int) -> tuple[int, ...]:
    """``given`` as a shape, of sizes that are ``least`` or more."""
    try:
        shape = tuple(map(operator.index, given))
    except TypeError:
        given = type(given).__name__ if hasattr(given, "shape") else repr(given)
        fail(function, f"{name} must be a sequence of integers", given, remedy, TypeError)
    if min(shape, default=least) < least:
        must = f"must be {least} or more"
        fail(function, f"sizes in {name} {must}", shape, "use 1" if least else remedy)
    return shape


def _kernel_shape(function: str, given: Any, ndim: int) -> tuple[int, ...]:
    """Args: ndim: the number of spatial dimensions that ``x`` has if it has a batch."""
    remedy = "pass one size for each spatial dimension"
    if len(getattr(given, "shape", ())) > 2:
        remedy = f"pass the kernel's shape without its channels: {tuple(given.shape[:-2])}"
    elif isinstance(given, int) and ndim > 0:
        remedy += f": {(given,) * ndim}"
    return _shape(function, "kernel_shape", given, remedy, 1)


def im2col(
    x: ArrayLike,
    kernel_shape: Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: Padding = "VALID",
    dilation: int | Sequence[int] = 1,
) -> Array:
    """Gathers the patches that a convolution multiplies (Chellapilla, Puri & Simard, 2006).

    ``torch.nn.functional.unfold`` is channel-major with positions last, (N, C·taps, positions);
    ``lax.conv_general_dilated_patches`` is channel-major too. From
    ``p = im2col(...).reshape(n, positions, taps, c)``, the first is
    ``p.transpose(0, 3, 2, 1).reshape(n, c * taps, positions)`` and the second (channels last)
    ``p.swapaxes(2, 3).reshape(n, *out_spatial, c * taps)``.

    Args:
      x: (N, spatial…, C), or (spatial…, C) without a batch; any dtype.
      kernel_shape: taps along each spatial dimension.
      strides, dilation: an integer, or one for each spatial dimension.
      padding: "SAME", "SAME_LOWER", "VALID", "CAUSAL", an integer, or (low, high) pairs.

    Returns:
      (N, out spatial…, taps·C), taps before channels, so that
      ``im2col(x, w.shape[:-2]) @ w.reshape(-1, w.shape[-1])`` is the convolution with ``w``.

    Raises:
      TypeError, ValueError: as ``conv``.

    Example:
      >>> import jax.numpy as jnp, jaxconv
      >>> jaxconv.im2col(jnp.arange(4.0)[:, None], (2,))
      Array([[0., 1.],
             [1., 2.],
             [2., 3.]], dtype=float32)
    """
    x = operand("im2col", "x", x)
    kernel_shape = _kernel_shape("im2col", kernel_shape, x.ndim - 2)
    call = Call("im2col", {"x": x.shape, "kernel_shape": kernel_shape}, NAMES, PADDINGS)
    batched = x.ndim != len(kernel_shape) + 1
    x = x if batched else x[None]
    spec = _patch_spec(call, x.shape, x.dtype, kernel_shape, (strides, padding, dilation))
    shape = (x.shape[0], *spec.out_spatial, spec.taps * x.shape[-1])
    if 0 in shape:
        out = jnp.zeros(shape, x.dtype)
    else:
        out = layout.patches(*layout.pad_and_dilate(x, spec)).reshape(shape)
    return out if batched else out[0]


def col2im(
    patches: ArrayLike,
    x_shape: Sequence[int],
    kernel_shape: Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: Padding = "VALID",
    dilation: int | Sequence[int] = 1,
) -> Array:
    """Sums patches at the places they were gathered from: the exact adjoint of ``im2col``.

    ⟨im2col(x), p⟩ = ⟨x, col2im(p, x.shape)⟩ for every x and p. It is not the inverse: an element
    that lies in several windows is counted once for each. ``torch.nn.functional.fold`` is the same
    sum for channel-major patches, (N, C·taps, positions).

    Args:
      patches: (N, out spatial…, taps·C), or without a batch, as ``im2col`` makes them.
      x_shape: shape of the array that they came from, with its batch if they have one.
      kernel_shape, strides, padding, dilation: as in ``im2col``.

    Returns:
      An array of shape ``x_shape``.

    Raises:
      TypeError, ValueError: as ``im2col``, and where ``patches`` are not those of ``x_shape``.

    Example:
      >>> import jax.numpy as jnp, jaxconv
      >>> jaxconv.col2im(jaxconv.im2col(jnp.ones((4, 1)), (2,)), (4, 1), (2,)).ravel()
      Array([1., 2., 2., 1.], dtype=float32)
    """
    patches = operand("col2im", "patches", patches)
    x_shape = _shape("col2im", "x_shape", x_shape, "pass x.shape", 0)
    kernel_shape = _kernel_shape("col2im", kernel_shape, len(x_shape) - 2)
    shapes = {"patches": patches.shape, "x_shape": x_shape, "kernel_shape": kernel_shape}
    call = Call("col2im", shapes, NAMES, PADDINGS)
    batched = len(x_shape) != len(kernel_shape) + 1
    full_shape = x_shape if batched else (1, *x_shape)
    spec = _patch_spec(call, full_shape, patches.dtype, kernel_shape, (strides, padding, dilation))
    expected = (*full_shape[:1], *spec.out_spatial, spec.taps * x_shape[-1])
    if patches.shape != (shape := expected if batched else expected[1:]):
        constraint = f"patches of x_shape {x_shape} must have the shape {shape}"
        call.fail(constraint, None, "pass the arguments that im2col had")
    if 0 in expected:
        return jnp.zeros(x_shape, patches.dtype)
    longest = max(*full_shape, *spec.padded_spatial, *expected)
    if longest > loops.MAX_INDEX:
        constraint = f"no axis may be longer than {loops.MAX_INDEX}, with its padding"
        fail("col2im", constraint, longest, "split the array")
    x = patches.reshape(*expected[:-1], *kernel_shape, x_shape[-1])
    for d in range(len(kernel_shape)):
        x = _sum_taps(x, spec, d)
    return layout.padded(x, [(-lo, -hi, 0) for lo, hi in spec.padding]).reshape(x_shape)


def _sum_taps(x: Array, spec: ConvSpec, axis: int) -> Array:
    """Undoes one axis of ``layout.patches``: (N, …, out, …, kernel, …) → (N, …, padded, …)."""
    size, tap_axis = spec.padded_spatial[axis], 1 + spec.spatial_ndim

    def placed(tap: Any) -> Array:
        view = lax.dynamic_index_in_dim(x, tap, tap_axis, keepdims=False)
        view = layout.padded(view, [(0, 0, spec.window_strides[axis] - 1)], 1 + axis)
        zeros = jnp.zeros((*view.shape[: 1 + axis], size, *view.shape[2 + axis :]), x.dtype)
        start = tap * spec.rhs_dilation[axis]
        return lax.dynamic_update_slice_in_dim(zeros, view, start, 1 + axis)

    return loops.sum_of(spec.kernel_shape[axis], placed, loops.UNROLL)
