"""The one (batched) matrix product in which the GEMM algorithms end."""

import jax.numpy as jnp
from jax import Array, lax

from jaxconv.layout import split_groups
from jaxconv.spec import ConvSpec


def kernel_matrix(rhs: Array, groups: int) -> Array:
    """rhs: (kernel…, c, G·o) → (G, kernel·c, o), taps before channels."""
    rhs = split_groups(rhs, -1, groups)
    return jnp.moveaxis(rhs, -2, 0).reshape(groups, -1, rhs.shape[-1])


def gemm(a: Array, b: Array, spec: ConvSpec) -> Array:
    """a: (G, m, k), b: (G, k, n) → (G, m, n), summed in ``spec.accumulator_dtype``."""
    if a.shape[0] == 1:
        dimension_numbers = (((1,), (0,)), ((), ()))
        return _dot(a[0], b[0], dimension_numbers, spec)[None]
    return _dot(a, b, (((2,), (1,)), ((0,), (0,))), spec)


def gradient_gemm(a: Array, b: Array, spec: ConvSpec) -> Array:
    """a: (G, m, k), rows of patches, b: (G, m, o), cotangents → (G, k, o), summed over m."""
    if a.shape[0] == 1:
        return _dot(a[0], b[0], (((0,), (0,)), ((), ())), spec)[None]
    return _dot(a, b, (((1,), (1,)), ((0,), (0,))), spec)


def kernel_of(matrix: Array, spec: ConvSpec) -> Array:
    """(G, kernel·c, o) → (kernel…, c, G·o), the inverse of ``kernel_matrix``."""
    return jnp.moveaxis(matrix, 0, -2).reshape(spec.rhs_shape)


def _dot(a: Array, b: Array, dimension_numbers: lax.DotDimensionNumbers, spec: ConvSpec) -> Array:
    return lax.dot_general(
        a,
        b,
        dimension_numbers,
        precision=spec.precision,
        preferred_element_type=spec.accumulator_dtype,
    )
