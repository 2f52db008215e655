"""What a convolution must be: a loop in NumPy, lax in float64, and how far a result may be off."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def wide(dtype: Any) -> np.dtype:
    """The dtype in which the oracles count: exact for integers, 64 bits a part otherwise."""
    if dtype == np.bool_ or jnp.issubdtype(dtype, jnp.integer):
        return np.dtype(np.int64)
    return np.dtype(np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64)


def drawn(rng: np.random.Generator, shape: Any, dtype: Any, preferred: Any = None) -> np.ndarray:
    """An operand of a convolution with this ``preferred_element_type``."""
    dtype = jnp.dtype(dtype)
    if dtype == np.bool_:
        return rng.random(shape) < 0.3
    if jnp.issubdtype(dtype, jnp.integer):
        # Sums overflow and must wrap around, except where they are rounded to floats.
        small = preferred is not None and jnp.issubdtype(jnp.dtype(preferred), jnp.floating)
        info = jnp.iinfo(dtype)
        low, high = (-9, 9) if small else (int(info.min), int(info.max))
        return rng.integers(low, high, shape, endpoint=True).astype(dtype)
    x = rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return x.astype(dtype)


def loop_conv(lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> np.ndarray:
    """The convolution with explicit padding, window by window, in ``wide(lhs.dtype)``."""
    x, w, numbers, out_shape, windows = _windows(lhs, rhs, *args, **kwargs)
    out, axes = np.zeros(out_shape, x.dtype), list(range(1, x.ndim))
    for image, kernel, at in windows:
        out[at] = np.tensordot(x[image], w[kernel], (axes, axes))
    return out.transpose(np.argsort(numbers.out_spec))


def loop_gradients(
    lhs: Any,
    rhs: Any,
    cotangent: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    *args: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Of both operands, by the same loop."""
    dilations = lhs_dilation, rhs_dilation
    x, w, numbers, _, windows = _windows(lhs, rhs, window_strides, padding, *dilations, *args)
    y = cotangent.transpose(numbers.out_spec)
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for image, kernel, at in windows:
        dx[image] += np.tensordot(y[at], w[kernel], 1)
        dw[kernel] += np.tensordot(y[at].T, x[image], 1)
    for axis, (low, high) in enumerate(padding, 2):
        dx = _pad(dx, axis, -low, -high)
    inner = [tuple(slice(None, None, d) for d in dilation) for dilation in dilations]
    return (
        dx[(slice(None), slice(None), *inner[0])].transpose(np.argsort(numbers.lhs_spec)),
        dw[(slice(None), slice(None), *inner[1])].transpose(np.argsort(numbers.rhs_spec)),
    )


def _windows(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
) -> tuple[np.ndarray, np.ndarray, lax.ConvDimensionNumbers, tuple[int, ...], Iterator[Any]]:
    """The image (n, c, spatial…) and the kernel (o, i, spatial…), dilated and padded, the shape of
    the output (n, o, spatial…), and for each of its positions and groups where to look in all."""
    dnums = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    ndim = lhs.ndim - 2
    x = np.asarray(lhs).astype(wide(lhs.dtype)).transpose(dnums.lhs_spec)
    w = np.asarray(rhs).astype(wide(rhs.dtype)).transpose(dnums.rhs_spec)
    for d in range(ndim):
        axis = 2 + d
        x = _dilate(x, axis, (lhs_dilation or [1] * ndim)[d])
        w = _dilate(w, axis, (rhs_dilation or [1] * ndim)[d])
        x = _pad(x, axis, *padding[d])
    sizes = x.shape[2:], w.shape[2:], window_strides
    out_spatial = [max(0, (size - k) // stride + 1) for size, k, stride in zip(*sizes, strict=True)]
    n, o = x.shape[0] // batch_group_count, w.shape[0]
    groups = feature_group_count * batch_group_count

    def part(size: int, g: int) -> slice:
        return slice(g * size, (g + 1) * size)

    def windows() -> Iterator[Any]:
        for position in itertools.product(*map(range, out_spatial)):
            at = tuple(
                slice(p * s, p * s + k)
                for p, s, k in zip(position, window_strides, w.shape[2:], strict=True)
            )
            for g in range(groups):
                images = part(n, g) if batch_group_count > 1 else slice(None)
                channels = part(w.shape[1], g) if feature_group_count > 1 else slice(None)
                outputs = part(o // groups, g)
                yield (images, channels, *at), outputs, (slice(None), outputs, *position)

    return x, w, dnums, (n, o, *out_spatial), windows()


def _dilate(x: np.ndarray, axis: int, dilation: int) -> np.ndarray:
    shape = list(x.shape)
    shape[axis] = max(0, (shape[axis] - 1) * dilation + 1)
    out = np.zeros(shape, x.dtype)
    out[(slice(None),) * axis + (slice(None, None, dilation),)] = x
    return out


def _pad(x: np.ndarray, axis: int, low: int, high: int) -> np.ndarray:
    size = x.shape[axis]
    out_shape = list(x.shape)
    out_shape[axis] = size + low + high
    out = np.zeros(out_shape, x.dtype)
    first, last = max(0, -low), min(size, size + high)
    if first < last:
        source = (slice(None),) * axis + (slice(first, last),)
        out[(slice(None),) * axis + (slice(first + low, last + low),)] = x[source]
    return out


def lax_conv(lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> np.ndarray:
    """lax's convolution in ``wide(lhs.dtype)``, on CPU, where it takes every dtype."""
    cpu = jax.devices("cpu")[0]
    lhs, rhs = (jax.device_put(np.asarray(x).astype(wide(x.dtype)), cpu) for x in (lhs, rhs))
    return np.asarray(lax.conv_general_dilated(lhs, rhs, *args, **kwargs))


# Rounding errors that an algorithm spreads over all its outputs, in roundings of the largest one.
# FFT: each of three transforms of n elements is off by at most log2(n) roundings of its norm
# (Higham, "Accuracy and Stability of Numerical Algorithms", 24.1), and so is the product, of
# ‖x‖·‖w‖, for which the largest magnitude stands; n is at most 2^20 here.
# Winograd: its matrices cancel, and it rounds relative to |Aᵀ| [(|G| |w|) ⊙ (|Bᵀ| |x|)] (Barabasz
# et al., 2020); measured, by 10 roundings with two outputs a tile and 17 with four.
SPREAD = {"fft": 3 * 20, "winograd": 20, "winograd4": 35}


def check(
    out: Any,
    expected: np.ndarray,
    magnitude: np.ndarray,
    length: int,
    dtype: Any,
    spread: int = 0,
) -> None:
    """Asserts that ``out`` is ``expected`` within the rounding of ``length`` products.

    Args:
      expected: the exact result, of ``wide`` dtype.
      magnitude: the same convolution of the operands' absolute values.
      length: products that each output element sums.
      dtype: of the operands.
      spread: roundings, relative to the largest magnitude, that an algorithm spreads over all
        outputs, see ``SPREAD``; 0 for one that sums the products themselves.
    """
    out = np.asarray(out)
    assert out.shape == expected.shape, f"shape {out.shape} instead of {expected.shape}"
    if out.dtype == np.bool_:
        np.testing.assert_array_equal(out, expected != 0)
        return
    if jnp.issubdtype(out.dtype, jnp.integer):
        np.testing.assert_array_equal(out, expected.astype(out.dtype))  # both wrap around
        return
    # Each of `length` products and sums rounds once in the accumulator, and the result once more.
    # Narrow floats are summed in float32; a complex product has four real ones.
    rounded = float(jnp.finfo(out.dtype).eps)
    summed = rounded if out.dtype.itemsize >= 4 else float(jnp.finfo(jnp.float32).eps)
    parts = 4 if jnp.issubdtype(dtype, jnp.complexfloating) else 1
    largest = np.max(magnitude, initial=0.0)
    bound = parts * summed * ((length + 2) * magnitude + spread * largest)
    bound = bound + rounded * np.abs(expected)
    error = np.abs(out.astype(expected.dtype) - expected)
    worst = np.max(error - bound, initial=-1.0)
    assert worst <= 0, f"off by {np.max(error)}, {worst} more than {dtype} may be"


def assert_close(outs: Any, expected: Any, roundings: float = 64) -> None:
    """Asserts trees of arrays of equal types, with values up to roundings of the largest."""
    assert jax.tree.structure(outs) == jax.tree.structure(expected)
    for out, value in zip(jax.tree.leaves(outs), jax.tree.leaves(expected), strict=True):
        assert isinstance(out, jax.Array)
        types = ((x.shape, x.dtype, x.weak_type) for x in map(jax.typeof, (out, value)))
        assert len(set(types)) == 1, f"{jax.typeof(out)} instead of {jax.typeof(value)}"
        inexact = jnp.issubdtype(out.dtype, jnp.inexact)
        tolerance = roundings * float(jnp.finfo(out.dtype).eps) if inexact else 0
        out, value = (np.asarray(x).astype(wide(x.dtype)) for x in (out, value))
        scale = np.max(np.abs(value), initial=1)
        np.testing.assert_allclose(out, value, tolerance, tolerance * scale)
