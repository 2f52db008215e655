"""Single layers by jaxconv and by lax: forward, input gradient, weight gradient."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxconv
from jaxconv.bench.timing import Compiled, alternate
from jaxconv.planner import choose
from jaxconv.primitive import conv_p
from jaxconv.spec import ConvSpec

CHANNELS_LAST = {
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution to time. ``direction``: "forward", "input gradient", "weight gradient"; or
    "gradient", which is both."""

    name: str
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    groups: int = 1
    padding: Any = "SAME"
    dtype: str = "float32"
    direction: str = "forward"
    stride: int = 1
    lhs_dilation: int = 1

    def function(self, conv: Callable[..., Array]) -> Callable[..., Any]:
        """What is timed, of ``operands()``, by ``conv`` with lax's signature."""
        ndim = len(self.lhs_shape) - 2
        forward = partial(
            conv,
            window_strides=(self.stride,) * ndim,
            padding=self.padding,
            lhs_dilation=(self.lhs_dilation,) * ndim,
            dimension_numbers=CHANNELS_LAST[ndim],
            feature_group_count=self.groups,
        )
        if self.direction == "forward":
            return forward

        def input_gradient(lhs: Array, rhs: Array, cotangent: Array) -> Array:
            return jax.linear_transpose(lambda lhs: forward(lhs, rhs), lhs)(cotangent)[0]

        def weight_gradient(lhs: Array, rhs: Array, cotangent: Array) -> Array:
            return jax.linear_transpose(lambda rhs: forward(lhs, rhs), rhs)(cotangent)[0]

        if self.direction == "gradient":
            return lambda *args: (input_gradient(*args), weight_gradient(*args))
        return input_gradient if self.direction == "input gradient" else weight_gradient

    def operands(self) -> tuple[Array, ...]:
        rng = np.random.default_rng(0)
        operands = [_random(rng, shape, self.dtype) for shape in (self.lhs_shape, self.rhs_shape)]
        if self.direction != "forward":
            forward = dataclasses.replace(self, direction="forward")
            out = jax.eval_shape(forward.function(lax.conv_general_dilated), *operands)
            operands.append(_random(rng, out.shape, self.dtype))
        return tuple(operands)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(rng.integers(-9, 9, shape), dtype)
    return jnp.asarray(rng.standard_normal(shape), dtype)


LAYERS = (
    Layer("depthwise 3×3, 1×56×56×128", (1, 56, 56, 128), (3, 3, 1, 128), 128),
    Layer("depthwise 7×7, 8×56×56×96", (8, 56, 56, 96), (7, 7, 1, 96), 96),
    Layer("causal depthwise, 4×4096×512, 4 taps", (4, 4096, 512), (4, 1, 512), 512, ((3, 0),)),
    Layer("11×11 blur, 1×1024×1024×1", (1, 1024, 1024, 1), (11, 11, 1, 1)),
    Layer("3×3, 1×7×7×512", (1, 7, 7, 512), (3, 3, 512, 512)),
    Layer("int32 3×3, 1×56×56×64", (1, 56, 56, 64), (3, 3, 64, 64), dtype="int32"),
    Layer(
        "3×3 in 32 groups, 4×28×28×256",
        (4, 28, 28, 256),
        (3, 3, 8, 256),
        32,
        direction="weight gradient",
    ),
    Layer("1×1, 8×28×28×256→512", (8, 28, 28, 256), (1, 1, 256, 512), direction="weight gradient"),
    Layer("3×3, 8×56×56×64", (8, 56, 56, 64), (3, 3, 64, 64)),
    Layer("3×3, 1×224×224×64", (1, 224, 224, 64), (3, 3, 64, 64)),
)


DEPTHWISE = Layer("depthwise 3×3, 8×28×28×128", (8, 28, 28, 128), (3, 3, 1, 128), 128)
GROUPS = Layer("3×3 in 32 groups, 4×28×28×256", (4, 28, 28, 256), (3, 3, 8, 256), 32)
STEM = Layer("7×7 stride 2, 8×224×224×3→64", (8, 224, 224, 3), (7, 7, 3, 64), stride=2)
VOLUME = Layer("3×3×3, 2×8×28×28×32", (2, 8, 28, 28, 32), (3, 3, 3, 32, 32))
TRANSPOSED = Layer(
    "bfloat16 3×3×3 transposed, stride 2, 2×4×14×14×32",
    (2, 4, 14, 14, 32),
    (3, 3, 3, 32, 32),
    padding=((1, 2),) * 3,
    dtype="bfloat16",
    lhs_dilation=2,
)
DENSE = tuple(
    Layer(f"3×3, {n}×{size}×{size}×{c}", (n, size, size, c), (3, 3, c, c), direction=direction)
    for n in (1, 8)
    for size, c in ((56, 64), (28, 128), (14, 256), (7, 512))
    for direction in ("forward", "input gradient", "weight gradient")
)
GRADIENTS = (
    *(
        dataclasses.replace(layer, direction=direction)
        for layer, direction in (
            (DEPTHWISE, "input gradient"),
            (DEPTHWISE, "weight gradient"),
            (GROUPS, "weight gradient"),
            (STEM, "input gradient"),
            (VOLUME, "input gradient"),
            (VOLUME, "weight gradient"),
            (TRANSPOSED, "gradient"),
        )
    ),
    *DENSE,
)


@dataclasses.dataclass(frozen=True)
class Result:
    """A layer's times.

    Attributes:
      algorithms: what "auto" took, for each convolution.
      pairs: seconds of lax and of jaxconv, called in turn.
      compile_seconds: of lax and of jaxconv: tracing, lowering and compiling.
      error: the largest difference from lax, over the largest value.
    """

    layer: Layer
    algorithms: tuple[str, ...]
    pairs: tuple[tuple[float, float], ...]
    compile_seconds: tuple[float, float]
    error: float

    @property
    def ratios(self) -> np.ndarray:
        """lax's time over jaxconv's, pair by pair: above 1 is faster than lax."""
        return np.array([baseline / own for baseline, own in self.pairs])


def run(
    layers: tuple[Layer, ...] = LAYERS, pairs: int = 301, seconds: float = 4.0
) -> Iterator[Result]:
    """Times each layer, at most ``pairs`` pairs and about ``seconds``, and checks its result.

    Raises:
      RuntimeError: a result is not lax's.
    """
    for layer in layers:
        operands = layer.operands()
        function = layer.function(jaxconv.conv_general_dilated)
        baseline = Compiled(layer.function(lax.conv_general_dilated), *operands)
        subject = Compiled(function, *operands)
        measured = alternate(baseline, subject, pairs, seconds)
        error = difference(baseline.output, subject.output)
        # Both sum thousands of products, each in an order of its own.
        if not error < (2e-2 if layer.dtype == "bfloat16" else 1e-4):
            raise RuntimeError(f"{layer}: off by {error:.1e} of the largest value")
        compiling = baseline.compile_seconds, subject.compile_seconds
        algorithms = planned(function, *operands)
        yield Result(layer, algorithms, tuple(measured), compiling, error)


def difference(expected: Any, found: Any) -> float:
    """The largest difference over the largest value, of the worst array of two trees."""

    def of_array(expected: Array, found: Array) -> float:
        wide = np.asarray(expected, np.float64)
        return float(np.max(np.abs(np.asarray(found, np.float64) - wide)) / np.max(np.abs(wide)))

    return max(jax.tree.leaves(jax.tree.map(of_array, expected, found)))


def planned(function: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """The algorithm that "auto" takes for each convolution of ``function``, in order."""
    names = []
    for eqn in jax.make_jaxpr(function)(*args).eqns:
        if eqn.primitive is conv_p:
            lhs, rhs = (v.aval for v in eqn.invars)
            spec = ConvSpec.from_params(lhs, rhs, eqn.params)
            names.append(choose(spec, jax.default_backend())[0])
    return tuple(names)
