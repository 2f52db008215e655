"""Single layers by jaxconv, by lax and by PyTorch: forward, input gradient, weight gradient."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array, lax

import jaxconv
from jaxconv.bench.cases import DIRECTIONS, Layer
from jaxconv.bench.measure import ENOUGH, Effort, Result, measure, torch_peer
from jaxconv.planning.choose import choose
from jaxconv.planning.timing import Compiled
from jaxconv.spec import ConvSpec
from jaxconv.transforms.primitive import conv_p


def run(
    layers: tuple[Layer, ...], directions: tuple[str, ...] = DIRECTIONS, effort: Effort = ENOUGH
) -> Iterator[str | Result]:
    """Times each layer in each direction that it has. Yields the name of what comes, then that."""
    for layer in layers:
        wanted = [direction for direction in layer.directions if direction in directions]
        operands = layer.operands() if wanted else ()
        for direction in wanted:
            yield f"{layer.name}, {direction}"
            function = layer.function(jaxconv.conv_general_dilated, direction)
            baseline = Compiled(layer.function(lax.conv_general_dilated, direction), *operands)
            subject = Compiled(function, *operands)
            peer = torch_peer()
            result = measure(
                effort,
                baseline,
                subject,
                None if peer is None else peer.layer(layer, direction, *operands),
                suite="layers",
                name=layer.name,
                direction=direction,
                how=", ".join(planned(function, *operands)),
                # Both sum thousands of products, each in an order of its own.
                tolerance=2e-2 if layer.dtype == "bfloat16" else 1e-4,
                flops=layer.spec.flops,
                traffic=layer.spec.operand_bytes,
            )
            errors = exact_errors(layer, direction, operands, (baseline.output, subject.output))
            yield dataclasses.replace(result, errors=errors)


def planned(function: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """The algorithm that "auto" takes for each convolution of ``function``, in order."""
    names = []
    for eqn in jax.make_jaxpr(function)(*args).eqns:
        if eqn.primitive is conv_p:
            lhs, rhs = (v.aval for v in eqn.invars)
            spec = ConvSpec.from_params(lhs, rhs, eqn.params)
            names.append(choose(spec, jax.default_backend())[0])
    return tuple(names)


# Outputs that are recomputed in float64, and products that may be summed for all of them.
SAMPLES, PRODUCTS = 400, 100_000_000


def exact_errors(
    layer: Layer, direction: str, operands: tuple[Array, ...], outputs: tuple[Array, ...]
) -> tuple[float, ...]:
    """Root mean square error of each output over the root mean square of what is exact.

    A sample of the output, computed from its definition in float64: lax's own float64 convolutions
    are scalar loops, which would take longer than all the rest.
    """
    lhs, rhs, cotangent = (np.asarray(x) for x in operands)
    out = np.asarray(outputs[0])
    terms = layer.spec.flops // (2 * out.size)
    count = min(SAMPLES, max(16, PRODUCTS // terms), out.size)
    rng = np.random.default_rng(1)
    samples = [tuple(map(int, rng.integers(0, out.shape))) for _ in range(count)]
    exact = np.array([_exact(layer, direction, lhs, rhs, cotangent, at) for at in samples])
    scale = math.sqrt(np.mean(exact**2)) or 1.0
    found = ([np.float64(np.asarray(output)[at]) for at in samples] for output in outputs)
    return tuple(math.sqrt(np.mean((x - exact) ** 2)) / scale for x in map(np.array, found))


def _exact(
    layer: Layer,
    direction: str,
    lhs: np.ndarray,
    rhs: np.ndarray,
    cotangent: np.ndarray,
    at: tuple[int, ...],
) -> float:
    """One element of an output: a sum over all that meet in it."""
    depth, width = rhs.shape[-2], rhs.shape[-1] // layer.groups
    met = [_meeting(layer, direction, axis, at) for axis in range(layer.ndim)]
    rows, taps, positions = (list(indices) for indices in zip(*met, strict=True))
    if direction == "weight gradient":
        c, o = at[-2:]
        batch = range(len(lhs))
        one = lhs[np.ix_(batch, *rows, [o // width * depth + c])]
        other = cotangent[np.ix_(batch, *positions, [o])]
    elif direction == "forward":
        n, o = at[0], at[-1]
        group = o // width * depth
        one = lhs[n][np.ix_(*rows, range(group, group + depth))]
        other = rhs[np.ix_(*taps, range(depth), [o])][..., 0]
    else:
        n, group, c = at[0], at[-1] // depth * width, at[-1] % depth
        one = cotangent[n][np.ix_(*positions, range(group, group + width))]
        other = rhs[np.ix_(*taps, [c], range(group, group + width))][..., 0, :]
    return float(np.vdot(one.astype(np.float64), other.astype(np.float64)))


def _meeting(
    layer: Layer, direction: str, axis: int, at: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Along one axis: image rows, taps and output positions that meet in the output element."""
    size, kernel = layer.lhs_shape[1 + axis], layer.rhs_shape[axis]
    positions_in_all = layer.spec.out_spatial[axis]
    taps, stride = np.arange(kernel), layer.stride
    if direction == "input gradient":
        reached = at[1 + axis] * layer.lhs_dilation + layer.padding[0] - taps * layer.rhs_dilation
        positions = reached // stride
        meets = (reached % stride == 0) & (positions >= 0) & (positions < positions_in_all)
        rows = np.full(kernel, at[1 + axis])
    else:
        if direction == "forward":
            positions = np.full(kernel, at[1 + axis])
        else:
            positions = np.arange(positions_in_all)
            taps = np.full(positions_in_all, at[axis])
        reached = positions * stride + taps * layer.rhs_dilation - layer.padding[0]
        rows = reached // layer.lhs_dilation
        meets = (reached % layer.lhs_dilation == 0) & (rows >= 0) & (rows < size)
    return rows[meets], taps[meets], positions[meets]
