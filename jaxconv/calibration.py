"""Measured constants as data: what the planner's predictions rest on.

Origin: medians on 2 cores of an AVX-512 server CPU (AMD EPYC, Zen 5), JAX 0.10.2 and 0.12.0.1.
They give the order of magnitude elsewhere, which is what a predicted time in a plan's table is for.
"""

from types import MappingProxyType

# Floating-point operations per second in f32, by what does the work.
CPU_RATES = MappingProxyType(
    {
        "gemm": 320e9,  # 1024³ through jnp.dot
        "small gemm": 30e9,  # fewer than 16 rows or columns: 32 groups on 1×28×28×256, tiled
        "integer gemm": 60e9,  # int32 3×3 on 1×56×56×64, im2col_tiled
        "multiply-add": 70e9,  # depthwise 7×7 on 8×56×56×96 as shifted views
        "xla fast": 350e9,  # XLA:CPU's Eigen convolution, 3×3 on 8×56×56×64
        "xla grouped": 15e9,  # one small GEMM per group, 32 groups on 1×28×28×256
        "xla loop": 2.5e9,  # XLA:CPU's scalar loop: depthwise 7×7 on 8×56×56×96
    }
)
# Bytes per second of intermediate arrays that leave the cache, page faults included: im2col 3×3 on
# 1×224×224×64 moves 0.3 GB in 55 ms.
CPU_BANDWIDTH = 6e9
CPU_STEP = 2e-6  # seconds per iteration of a loop: naive 3×3 on 1×56×56×64, 6 ms

# Estimates, not measured: an accelerator's convolution is bound by launches and memory at the sizes
# that this table teaches.
ACCELERATOR_RATE = 50e12
ACCELERATOR_BANDWIDTH = 2e12
ACCELERATOR_STEP = 10e-6
