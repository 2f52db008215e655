"""Gathers every patch into one matrix and multiplies once (Chellapilla, Puri & Simard, "High
Performance Convolutional Neural Networks for Document Processing", 2006)."""

import jax.numpy as jnp
from jax import Array

from jaxconv import layout
from jaxconv.algorithms import gemm, pointwise
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec

# Most slices along an axis to unroll where a loop could not index them: 1,001 compile in 7 s.
MAX_SLICES = 1024


class Im2col(Algorithm):
    name = "im2col"
    summary = "gathers all patches to a matrix, one GEMM"

    def doubted(self, spec: ConvSpec) -> str | None:
        return pointwise.same_product(spec)

    def cost(self, spec: ConvSpec) -> Cost:
        groups, m, _, k = spec.gemm
        patches = groups * m * k * spec.dtype.itemsize
        # The gather goes axis by axis: the last one reads an array of patches.
        made = patches + patches // max(spec.kernel_shape[:1] or (1,))
        traffic, workspace = spec.operand_bytes + 2 * made, layout.padded_bytes(spec) + made
        return Cost(spec.flops, traffic, workspace, spec.gemm)

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        g = spec.groups
        x, spec = layout.pad_and_dilate(lhs, spec)
        patches = layout.patches(layout.features_to_batch(x, g), spec)
        if layout.taps_last(spec):
            # 3×3 on 7×7×512: moving the kernel took 14 ms, the product 9.
            return gemm.in_memory(jnp.moveaxis(patches, -1, 1 + spec.spatial_ndim), rhs, spec)
        kernel = gemm.kernel_matrix(rhs, g)  # kernel: (g, k, o), k = taps·c
        matrix = patches.reshape(g, -1, kernel.shape[1])  # matrix: (g, n·positions, k)
        return gemm.outputs_of(gemm.product(matrix, kernel, spec), spec)

    def gradient(self, image: Array, cotangent: Array, spec: ConvSpec) -> Array:
        x, spec = layout.pad_and_dilate(image, spec)
        x = layout.features_to_batch(x, spec.groups)
        cotangent = gemm.rows_of(cotangent, spec.groups)
        patches = layout.patches(x, spec)
        if layout.taps_last(spec):
            patches = jnp.moveaxis(patches, -1, spec.spatial_ndim + 1)
            out = gemm.gradient(cotangent, patches.reshape(1, cotangent.shape[1], -1), spec)
            return layout.from_memory(out, spec)
        matrix = patches.reshape(*cotangent.shape[:2], -1)  # (g, n·positions, k)
        return gemm.kernel_of(gemm.gradient(matrix, cotangent, spec), spec)

    def moving(self, spec: ConvSpec) -> float:
        return 0.0 if layout.taps_last(spec.forward) else super().moving(spec)

    def largest_index(self, spec: ConvSpec) -> int:
        looped = max(spec.forward.kernel_shape, default=1) > MAX_SLICES
        return super().largest_index(spec) if looped else 0


IM2COL = Im2col()
