"""The programs timed by lax, by jaxconv and by its peers: layers, loops, and whole networks."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxconv
from jaxconv.bench.cases import Layer, arguments, layer_of
from jaxconv.bench.measure import Effort, Result, measure, peers, reference
from jaxconv.bench.networks import CHANNELS_FIRST, LAYOUTS, NETWORKS, Network
from jaxconv.planning.choose import choose
from jaxconv.planning.timing import Compiled
from jaxconv.spec import ConvSpec
from jaxconv.transforms import jaxprs


def convolutions(function: Callable[..., Any], *args: Any) -> list[ConvSpec]:
    """The convolutions of a function with these arguments, in program order."""
    return [conv.spec("bench") for conv in jaxprs.convolutions("bench", function, args, {})]


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of a function's convolutions, inserted zeros left out."""
    total = 0.0
    for conv in jaxprs.convolutions("bench", function, args, {}):
        spec = conv.spec("bench")
        total += conv.times * spec.flops / math.prod(spec.lhs_dilation)
    return total


def convolutions_of(layers: Iterable[Layer]) -> list[ConvSpec]:
    """The convolutions of layers, in all their directions."""
    found: list[ConvSpec] = []
    for layer in layers:
        operands = jax.eval_shape(layer.operands)
        for direction in layer.directions:
            function = layer.function(lax.conv_general_dilated, direction)
            found += convolutions(function, *operands)
    return found


def _chosen(function: Callable[..., Any], *args: Any) -> str:
    platform = jax.default_backend()
    return ", ".join(choose(spec, platform)[0] for spec in convolutions(function, *args))


def measure_layer(layer: Layer, direction: str, effort: Effort) -> Result:
    operands = layer.operands()
    by_lax = layer.function(lax.conv_general_dilated, direction)
    return measure(
        effort,
        Compiled(by_lax, *operands),
        Compiled(layer.function(jaxconv.conv_general_dilated, direction), *operands),
        peers(effort, "layer", layer, direction, operands),
        exact=partial(reference, layer, direction, *operands),
        flops=flops(by_lax, *operands),
        name=layer.name,
        direction=direction,
        how=_chosen(by_lax, *operands),
        # Both sum thousands of products, in different orders.
        tolerance=2e-2 if layer.dtype == "bfloat16" else 1e-4,
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that calls only lax, of arguments with these shapes."""

    name: str
    forward: Callable[..., Array]
    shapes: Sequence[tuple[int, ...]]
    directions: tuple[str, ...] = ("forward", "gradients")

    def function(self, direction: str) -> Callable[..., Any]:
        if direction != "gradients":
            return self.forward
        every = tuple(range(len(self.shapes)))
        return jax.grad(lambda *args: jnp.square(self.forward(*args)).mean(), every)

    def operands(self, direction: str) -> tuple[Array, ...]:
        del direction  # the same in all
        rng = np.random.default_rng(0)
        return tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in self.shapes)


def measure_program(case: "Program | Model", direction: str, effort: Effort) -> Result:
    """By lax, by ``accelerate``, and by its peers."""
    function, args = case.function(direction), case.operands(direction)
    return measure(
        effort,
        Compiled(function, *args),
        Compiled(jaxconv.accelerate(function), *args),
        peers(effort, "network", case.network, direction, args)
        if isinstance(case, Model)
        else None,
        name=case.name,
        direction=direction,
        how="accelerate" if isinstance(case, Model) else _chosen(function, *args),
        flops=flops(function, *args),
        # The smallest gradients of 50 layers suffer from cancellation.
        tolerance={"gradients": 1e-3, "training step": 1e-2}.get(direction, 1e-4),
    )


# Loops, and convolutions that vmap makes


def _conv(image: Array, kernel: Array, layout: tuple[str, str, str] = LAYOUTS[2]) -> Array:
    return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout)


def _loss(kernel: Array, images: Array) -> Array:
    return jnp.square(_conv(images, kernel)).mean()


def _train(images: Array, kernel: Array) -> Array:
    def step(kernel: Array, _: None) -> tuple[Array, None]:
        return kernel - 1e-3 * jax.grad(_loss)(kernel, images), None

    return lax.scan(step, kernel, None, length=2)[0]


def _stacked(images: Array, kernel: Array) -> Array:
    def step(images: Array, _: None) -> tuple[Array, None]:
        return _conv(images, kernel, CHANNELS_FIRST), None

    return lax.scan(step, images, None, length=2)[0]


IMAGES = (8, 28, 28)
EACH = jax.vmap(lambda kernel, image: jax.grad(_loss)(kernel, image[None]), (None, 0))
LOOPS = tuple(
    Program(name, function, shapes, ("forward",))
    for name, function, *shapes in (
        ("training steps in scan, 3×3, 8×28×28×64", _train, (*IMAGES, 64), (3, 3, 64, 64)),
        ("NCHW 3×3 in scan, 8×28×28×64", _stacked, (8, 64, 28, 28), (64, 64, 3, 3)),
        ("32 gradients by vmap, 3×3, 28×28×16→32", EACH, (3, 3, 16, 32), (32, 28, 28, 16)),
        (
            "8 kernels at once by vmap, 3×3, 8×28×28×32",
            jax.vmap(_conv, (None, 0)),
            (*IMAGES, 32),
            (8, 3, 3, 32, 32),
        ),
    )
)


# Layers in what surrounds them in a network: functions of its convolution, its image and kernel


def _normal(y: Array, axes: int | tuple[int, ...]) -> Array:
    centred = y - y.mean(axes, keepdims=True)
    return centred * lax.rsqrt((centred * centred).mean(axes, keepdims=True) + 1e-5)


def _biased(conv: Any, x: Array, w: Array) -> Array:
    return jax.nn.relu(conv(x, w) + jnp.arange(w.shape[-1], dtype=w.dtype))


def _batch_normal(conv: Any, x: Array, w: Array) -> Array:
    return jax.nn.relu(_normal(conv(x, w), tuple(range(x.ndim - 1))))


def _channels_first(conv: Any, x: Array, w: Array) -> Array:
    """Of an image that another operation writes channels first, and reads so."""
    first = jnp.tanh(jnp.moveaxis(x, -1, 1))
    return jnp.tanh(jnp.moveaxis(conv(jnp.moveaxis(first, 1, -1), w), -1, 1))


def _in_scan(conv: Any, x: Array, w: Array) -> Array:
    """Three steps, scaled as a network's are: else each enlarges rounding errors thirtyfold."""
    scale = math.prod(w.shape[:-1]) ** -0.5
    return lax.scan(lambda x, _: (jnp.tanh(scale * conv(x, w)), None), x, None, length=3)[0]


AROUND: dict[str, Callable[[Any, Array, Array], Array]] = {
    "bias, ReLU": _biased,
    "batch norm, ReLU": _batch_normal,
    "layer norm, GELU": lambda conv, x, w: jax.nn.gelu(_normal(conv(x, w), -1)),
    "residual sum": lambda conv, x, w: jax.nn.relu(x + conv(x, w)),
    "channels first around": _channels_first,
    "in scan": _in_scan,
}
SURROUNDED = (
    layer_of("dense", 8, 28, (64, 64), 3),
    layer_of("depthwise", 8, 56, (144, 144), 3, 1, 144),
    layer_of("depthwise", 8, 14, (384, 384), 7, 1, 384),
    layer_of("pointwise", 8, 28, (192, 192), 1),
    layer_of("grouped", 8, 28, (128, 128), 3, 1, 32),
    layer_of("volume", 1, 16, (32, 32), 3, ndim=3),
    layer_of("signal", 8, 1024, (256, 256), 4, 1, 256, ndim=1, causal=1),
)


def surrounded(layer: Layer, what: str) -> Program:
    """A layer in what surrounds it."""
    conv = partial(lax.conv_general_dilated, **arguments(layer.spec))
    shapes = layer.lhs_shape, layer.rhs_shape
    return Program(f"{layer.name}, {what}", partial(AROUND[what], conv), shapes)


PROGRAMS = tuple(surrounded(layer, what) for what in AROUND for layer in SURROUNDED)


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and a batch size."""

    network: Network
    batch: int
    directions: tuple[str, ...] = ("forward", "training step")

    @property
    def name(self) -> str:
        order = ", channels first" if self.network.first else ""
        return f"{self.network.name}{order}, batch {self.batch}"

    def function(self, direction: str) -> Callable[..., Any]:
        return self.network.forward if direction == "forward" else self.network.step

    def operands(self, direction: str) -> tuple[Any, ...]:
        params, (x, labels) = self.network.init(), self.network.data(self.batch)
        return (params, x) if direction == "forward" else (params, x, labels)


MODELS = tuple(
    Model(dataclasses.replace(network, first=first), batch)
    for first in (False, True)
    for network in NETWORKS
    for batch in (1, 8)
)
# A call takes up to several seconds. For ResNet-50's step, batch 8, a single pair with PyTorch gave
# a ratio of 1.02, seven pairs 0.88.
MODEL_EFFORT = Effort(seconds=8.0, fewest=5)
