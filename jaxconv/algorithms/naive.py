"""Slides the window, one output position at a time: the definition, and a second oracle."""

import jax.numpy as jnp
from jax import Array, lax

from jaxconv import layout, loops
from jaxconv.algorithms import gemm
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.spec import ConvSpec


class Naive(Algorithm):
    name = "naive"
    summary = "slides the window, one output position at a time"

    def excluded(self, spec: ConvSpec) -> str | None:
        return "it is for learning"

    def cost(self, spec: ConvSpec) -> Cost:
        (groups, m, n, k), steps = spec.gemm, spec.positions
        patch = groups * m // steps * k * spec.dtype.itemsize
        traffic, padded = spec.operand_bytes + 2 * patch * steps, layout.padded_bytes(spec)
        return Cost(spec.flops, traffic, padded + patch, (groups * steps, m // steps, n, k), steps)

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        g = spec.groups
        x, spec = layout.pad_and_dilate(lhs, spec)
        x = layout.features_to_batch(x, g)  # x: (g·n, spatial…, c)
        kernel = gemm.kernel_matrix(rhs, g)  # kernel: (g, k, o), k = taps·c

        def at(position: Array) -> Array:
            starts = loops.unravel(position, spec.out_spatial, spec.window_strides)
            window = loops.strided(x, starts, spec.kernel_shape, spec.rhs_dilation)
            return gemm.product(window.reshape(g, -1, kernel.shape[1]), kernel, spec)  # (g, n, o)

        out = lax.map(at, jnp.arange(spec.positions, dtype=jnp.int32))  # (positions, g, n, o)
        return gemm.outputs_of(jnp.moveaxis(out, 0, 2), spec)


NAIVE = Naive()
