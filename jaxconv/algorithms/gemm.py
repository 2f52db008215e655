"""The (batched) matrix product that the GEMM algorithms share."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import layout
from jaxconv.compat import Primitive, ad, batching, mlir
from jaxconv.spec import ConvSpec


def kernel_matrix(rhs: Array, groups: int) -> Array:
    """rhs: (kernel…, c, G·o) → (G, kernel·c, o), taps before channels."""
    rhs = layout.split_groups(rhs, -1, groups)
    return jnp.moveaxis(rhs, -2, 0).reshape(groups, -1, rhs.shape[-1])


def product(a: Array, b: Array, spec: ConvSpec) -> Array:
    """a: (G, m, k), b: (G, k, n) → (G, m, n), summed in ``spec.accumulator_dtype``."""
    if a.shape[0] == 1:
        return contract(a[0], b[0], (((1,), (0,)), ((), ())), spec)[None]
    return contract(a, b, (((2,), (1,)), ((0,), (0,))), spec)


def in_memory(x: Array, rhs: Array, spec: ConvSpec) -> Array:
    """x: (n, out spatial…, c, taps…) → (n, out spatial…, O), by a kernel as it lies in memory."""
    # XLA:CPU moves neither of two matrices, but an operand with several axes that are summed over.
    kernel = layout.in_memory(rhs, spec).reshape(spec.out_channels, -1)
    x = x.reshape(-1, kernel.shape[1])
    return outputs_of(contract(x, kernel, (((1,), (1,)), ((), ())), spec), spec)


def rows_of(y: Array, groups: int) -> Array:
    """(n, spatial…, G·c) → (G, n·positions, c)."""
    return layout.features_to_batch(y, groups).reshape(groups, -1, y.shape[-1] // groups)


def outputs_of(out: Array, spec: ConvSpec) -> Array:
    """(G, n·positions, o) → (n, out spatial…, G·o)."""
    out = out.reshape(-1, *spec.out_spatial, out.shape[-1])
    return layout.batch_groups_to_features(out, spec.groups)


def gradient(a: Array, b: Array, spec: ConvSpec) -> Array:
    """a: (G, m, k), rows of patches, b: (G, m, o), cotangents → (G, k, o), summed over m."""
    (groups, m, k), o = a.shape, b.shape[2]
    parts = parts_of(m, k * o)
    if groups == parts == 1:
        return contract(a[0], b[0], (((0,), (0,)), ((), ())), spec)[None]
    a, b = (x.reshape(groups * parts, -1, x.shape[2]) for x in (a, b))
    out = contract(a, b, (((1,), (1,)), ((0,), (0,))), spec)
    return out if parts == 1 else out.reshape(groups, parts, k, o).sum(1, dtype=out.dtype)


# Products summed in one part, where outputs are few. Beyond the other two limits one dot sums them
# all: cut into parts, 6,272 products of 32 groups of 8 channels took twice as long.
SUMMED, MANY_SUMMED, FEW_OUTPUTS = 128, 512, 10_000


def parts_of(m: int, outputs: int) -> int:
    """Number of parts that a sum of ``m`` products is cut into. XLA sums small ones sequentially:
    with 196 positions and 32 groups of 16 channels the error was 2.6 times lax's."""
    if m > MANY_SUMMED or outputs > FEW_OUTPUTS:
        return 1
    wanted = -(-m // SUMMED)
    return next((s for s in range(wanted, 3 * wanted) if m % s == 0), 1)


def kernel_of(matrix: Array, spec: ConvSpec) -> Array:
    """(G, kernel·c, o) → (kernel…, c, G·o), the inverse of ``kernel_matrix``."""
    return jnp.moveaxis(matrix, 0, -2).reshape(spec.rhs_shape)


# Fewest products of 8-bit integers that XLA:GPU (JAX 0.11, H200) is trusted to sum: of 3 and 6 it
# returned twice the sum, of 27 and more the sum.
FEWEST = 32


def contract(a: Array, b: Array, numbers: lax.DotDimensionNumbers, spec: ConvSpec) -> Array:
    """``lax.dot_general``, summed in ``spec.accumulator_dtype``."""
    total = spec.accumulator_dtype
    products = math.prod(a.shape[axis] for axis in numbers[0][0])
    integers = jnp.issubdtype(a.dtype, np.integer)
    mixed = integers and not jnp.issubdtype(total, np.integer)
    # XLA:GPU refuses integers summed in floats, and sums float32 in float32 for a float64 result.
    if mixed or a.dtype.itemsize >= 4 or (integers and products < FEWEST):
        a, b = a.astype(total), b.astype(total)
    a, b = operand_p.bind(a), operand_p.bind(b)
    return lax.dot_general(a, b, numbers, spec.precision, preferred_element_type=total)


# An operand of a matrix product. On GPU a barrier keeps apart from the product what makes it: XLA
# (JAX 0.11) fuses slices and reshapes into its Triton kernels, and some of those abort the process
# ("Check failed: subdim_size_accumulator == dim_size").
operand_p = Primitive("gemm_operand")
operand_p.def_impl(lambda x: x)
operand_p.def_abstract_eval(lambda x: x)
ad.deflinear2(operand_p, lambda cotangent, _: [cotangent])
batching.defvectorized(operand_p)
mlir.register_lowering(operand_p, lambda _, x: [x])
_barrier = mlir.lower_fun(lax.optimization_barrier, multiple_results=False)
mlir.register_lowering(operand_p, _barrier, platform="gpu")
