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

CHANNELS_LAST = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution to time. ``direction``: "forward", "input gradient", "weight gradient"."""

    name: str
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    groups: int = 1
    padding: Any = "SAME"
    dtype: str = "float32"
    direction: str = "forward"

    def function(self, conv: Callable[..., Array]) -> Callable[..., Array]:
        """What is timed, of ``operands()``, by ``conv`` with lax's signature."""
        ndim = len(self.lhs_shape) - 2
        forward = partial(
            conv,
            window_strides=(1,) * ndim,
            padding=self.padding,
            dimension_numbers=CHANNELS_LAST[ndim],
            feature_group_count=self.groups,
        )
        if self.direction == "forward":
            return forward
        if self.direction == "input gradient":
            return lambda lhs, rhs, cotangent: jax.linear_transpose(
                lambda lhs: forward(lhs, rhs), lhs
            )(cotangent)[0]
        return lambda lhs, rhs, cotangent: jax.linear_transpose(lambda rhs: forward(lhs, rhs), rhs)(
            cotangent
        )[0]

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
        expected = np.asarray(baseline.output, np.float64)
        difference = np.max(np.abs(np.asarray(subject.output, np.float64) - expected))
        error = float(difference / np.max(np.abs(expected)))
        # Both sum thousands of products in float32, each in an order of its own.
        if not error < 1e-4:
            raise RuntimeError(f"{layer}: off by {error:.1e} of the largest value")
        compiling = baseline.compile_seconds, subject.compile_seconds
        algorithms = planned(function, *operands)
        yield Result(layer, algorithms, tuple(measured), compiling, error)


def planned(function: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """The algorithm that "auto" takes for each convolution of ``function``, in order."""
    names = []
    for eqn in jax.make_jaxpr(function)(*args).eqns:
        if eqn.primitive is conv_p:
            lhs, rhs = (v.aval for v in eqn.invars)
            spec = ConvSpec.from_params(lhs, rhs, eqn.params)
            names.append(choose(spec, jax.default_backend())[0])
    return tuple(names)
