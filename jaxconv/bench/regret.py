"""Regret of the choice of "auto": its time over the best algorithm's, on random convolutions."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxconv
from jaxconv.bench.cases import arguments
from jaxconv.bench.measure import Effort, Result, compared, difference
from jaxconv.planning.choose import worthwhile
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.timing import Compiled
from jaxconv.spec import ConvSpec, dilate
from jaxconv.tools.autotune import candidates, operands, timed

SEED, COUNT = 2024, 200
ENOUGH = Effort(16, precision=0.0)
# Operations that take as long as the overhead of a call; those that lax does in half a second on
# its fast paths, and in its loops; and bytes of operands.
FEWEST_FLOPS, FAST_FLOPS, LOOP_FLOPS, OPERANDS = 1e6, 1e10, 6e8, 64 << 20


def random_specs(seed: int, count: int) -> list[ConvSpec]:
    """Random convolutions as they occur in practice, the same for the same seed.

    Of one to three dimensions, transposed ones and weight gradients among them, limited so that lax
    takes about half a second at most.
    """
    rng = np.random.default_rng(seed)
    specs: list[ConvSpec] = []
    while len(specs) < count:
        spec = _random_spec(rng)
        if spec is not None and _bounded(spec):
            specs.append(spec)
    return specs


# Probabilities or relative weights of what is drawn, and limits of sizes.
NDIM = {1: 0.2, 2: 0.65, 3: 0.15}
LARGEST = {1: 16384, 2: 256, 3: 40}
KERNELS = {
    1: {1: 1, 2: 2, 3: 3, 4: 2, 5: 1, 7: 1, 10: 1, 16: 1, 32: 1}
    | {64: 0.7, 255: 0.7, 512: 0.5, 1024: 0.5},
    2: {1: 4, 2: 1, 3: 6, 4: 1, 5: 2, 7: 2, 11: 1, 16: 0.5, 31: 0.5},
    3: {1: 2, 2: 2, 3: 6, 5: 1},
}
KINDS = {"dense": 0.52, "depthwise": 0.2, "grouped": 0.1, "single": 0.08, "stem": 0.1}
MULTIPLIERS = {1: 0.75, 2: 0.08, 3: 0.04, 4: 0.04, 8: 0.03, 16: 0.02, 32: 0.02, 64: 0.02}
STRIDES = {1: 0.68, 2: 0.17, 3: 0.04, 4: 0.05, 5: 0.02, 8: 0.04}
DILATIONS = {1: 0.82, 2: 0.08, 3: 0.03, 4: 0.04, 8: 0.03}
UPSAMPLING = {2: 0.5, 3: 0.1, 4: 0.2, 5: 0.05, 8: 0.15}
PADS = {"valid": 0.2, "half": 0.65, "causal": 0.15}
DTYPES = {"float32": 0.82, "bfloat16": 0.1, "int8": 0.04, "float64": 0.04}


def _pick(rng: np.random.Generator, weights: Mapping[Any, float]) -> Any:
    shares = np.array(list(weights.values()))
    return list(weights)[rng.choice(len(shares), p=shares / shares.sum())]


def _random_spec(rng: np.random.Generator) -> ConvSpec | None:
    ndim = _pick(rng, NDIM)
    size = _between(rng, 4, LARGEST[ndim])
    square = rng.random() < 0.8
    sizes = [size if square else _between(rng, 4, LARGEST[ndim]) for _ in range(ndim)]
    kernel, kind = _pick(rng, KERNELS[ndim]), _pick(rng, KINDS)
    c, o, groups = _channels(rng), _channels(rng), 1
    if rng.random() < 0.4:
        o = c
    if kind == "depthwise":
        groups, o = c, c * _pick(rng, MULTIPLIERS)
    elif kind == "grouped":
        groups = int(rng.choice([2, 4, 8, 16, 32]))
        c, o = groups * math.ceil(c / groups), groups * math.ceil(o / groups)
    elif kind == "single":
        c, o = 1, int(rng.choice([1, 2, 8]))
    elif kind == "stem":
        c = int(rng.choice([1, 2, 3, 4]))
    stride = _pick(rng, STRIDES if kernel > 1 else {1: 0.9, 2: 0.1})
    if kernel in (2, 4, 16) and rng.random() < 0.5:
        stride = kernel  # patches
    dilation = _pick(rng, DILATIONS) if stride == 1 and kernel > 1 else 1
    up = 1
    if kernel > 1 and stride == dilation == 1 and rng.random() < 0.2:
        up = min(_pick(rng, UPSAMPLING) if rng.random() < 0.8 else kernel // 4, kernel) or 1
        if groups == 1 and rng.random() < 0.5:
            c, o = o, c  # as in the input gradient
    extent = dilate(kernel, dilation)
    if extent > 2 * dilate(min(sizes), up):
        return None  # mostly padding
    half, causal = ((extent - 1) // 2, extent // 2), (extent - 1, 0)
    pads = {"valid": (0, 0), "half": half, "causal": causal}[_pick(rng, PADS)]
    dtype = np.dtype(_pick(rng, DTYPES))
    spec = ConvSpec(
        (int(rng.choice([1, 2, 4, 8])), *sizes, c),
        (*(kernel,) * ndim, c // groups, o),
        (stride,) * ndim,
        (pads,) * ndim,
        (up,) * ndim,
        (dilation,) * ndim,
        dtype,
        np.dtype("int32") if dtype == "int8" else dtype,
        groups,
    )
    if spec.is_empty:
        return None
    if up == 1 and dtype != "int8" and rng.random() < 0.3:
        return spec.kernel_gradient
    return spec


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _channels(rng: np.random.Generator) -> int:
    if rng.random() < 0.1:
        return 3
    return 2 ** int(rng.integers(3, 10)) if rng.random() < 0.6 else _between(rng, 1, 512)


def _bounded(spec: ConvSpec) -> bool:
    # Batch groups, and feature groups outside f32, become one dense convolution with zeros.
    masked = spec.batch_group_count if spec.dtype == np.float32 else spec.groups
    fast = spec.spatial_ndim < 3 and spec.groups == 1 and jnp.issubdtype(spec.dtype, np.inexact)
    flops = spec.flops * masked
    within = FEWEST_FLOPS <= flops <= (FAST_FLOPS if fast else LOOP_FLOPS)
    return within and spec.operand_bytes <= OPERANDS


def measure_regret(spec: ConvSpec, effort: Effort) -> Result:
    """Times every candidate to find the best; then lax, "auto" and the best in turn.

    Judged by the times that chose it, the best would often be a lucky one, and its luck would count
    as regret.
    """
    platform = jax.default_backend()
    chosen = plan_spec(spec, platform).algorithm
    seconds = timed(spec, candidates(spec, platform), platform, effort.seconds).seconds
    best = min(worthwhile(seconds), key=lambda name: seconds[name])
    with jax.enable_x64(spec.dtype == np.float64):
        arrays = operands(spec)

        def compiled(conv: Callable[..., Any], **algorithm: str) -> Compiled:
            return Compiled(partial(conv, **arguments(spec), **algorithm), *arrays)

        by_lax, auto = map(compiled, (lax.conv_general_dilated, jaxconv.conv_general_dilated))
        fastest = compiled(jaxconv.conv_general_dilated, algorithm=best)
        rounds = effort.times((by_lax, auto, fastest))
    _, own, least = np.median(rounds, axis=0)
    outputs = {"jaxconv": auto.output, best: fastest.output}
    return compared(
        by_lax,
        auto,
        {name: difference(by_lax.output, output) for name, output in outputs.items()},
        name=str(spec),
        direction="",
        how=chosen,
        lax=[(first, second) for first, second, _ in rounds],
        tolerance=2e-2 if spec.dtype.name == "bfloat16" else 1e-4,
        best=best,
        regret=1.0 if best == chosen else float(own / least),
    )
