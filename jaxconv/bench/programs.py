"""The programs timed by lax, by jaxconv and by its peers: layers, loops, and whole networks."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxconv
from jaxconv.bench.cases import Layer, arguments, layer_of
from jaxconv.bench.measure import CHANNELS_LAST, Call, Effort, Result, measure, peers, reference
from jaxconv.bench.networks import LAYOUTS, NETWORKS, Network
from jaxconv.bench.profile import Profile, profile
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
        shapes = layer.lhs_shape, layer.rhs_shape, layer.spec.out_shape
        operands = [jax.ShapeDtypeStruct(shape, layer.dtype) for shape in shapes]
        for direction in layer.directions:
            function = layer.function(lax.conv_general_dilated, direction)
            found += convolutions(function, *operands)
    return found


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
        how=", ".join(_chosen(by_lax, *operands)),
        # Both sum thousands of products, in different orders.
        tolerance=2e-2 if layer.dtype == "bfloat16" else 1e-4,
    )


@dataclasses.dataclass(frozen=True)
class Loop:
    """A program that calls only lax, with convolutions in a loop or a batch.

    ``args`` are the shapes of its arguments.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[tuple[int, ...], ...]
    directions: tuple[str, ...] = ("accelerate", "enable")


def _conv(image: Array, kernel: Array, layout: tuple[str, str, str] = LAYOUTS[2]) -> Array:
    return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout)


def train(images: Array, kernel: Array) -> Array:
    def loss(kernel: Array) -> Array:
        return jnp.square(_conv(images, kernel)).mean()

    def step(kernel: Array, _: None) -> tuple[Array, None]:
        return kernel - 1e-3 * jax.grad(loss)(kernel), None

    return lax.scan(step, kernel, None, length=2)[0]


def stacked(images: Array, kernel: Array) -> Array:
    layout = ("NCHW", "OIHW", "NCHW")
    return lax.scan(lambda x, _: (_conv(x, kernel, layout), None), images, None, length=2)[0]


def loss_of_one(kernel: Array, image: Array) -> Array:
    return jnp.square(_conv(image[None], kernel)).sum()


LOOPS = (
    Loop("training steps in scan, 3×3, 8×28×28×64", train, ((8, 28, 28, 64), (3, 3, 64, 64))),
    Loop("NCHW 3×3 in scan, 8×28×28×64", stacked, ((8, 64, 28, 28), (64, 64, 3, 3))),
    Loop(
        "a gradient for each of 32 examples, 3×3, 28×28×16→32",
        jax.vmap(jax.grad(loss_of_one), (None, 0)),
        ((3, 3, 16, 32), (32, 28, 28, 16)),
    ),
    Loop(
        "8 kernels at once by vmap, 3×3, 8×28×28×32",
        jax.vmap(_conv, (None, 0)),
        ((8, 28, 28, 32), (8, 3, 3, 32, 32)),
    ),
)


def measure_loop(loop: Loop, how: str, effort: Effort) -> Result:
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(shape) / 8, jnp.float32) for shape in loop.args]
    baseline = Compiled(loop.function, *args)
    if how == "accelerate":
        subject = Compiled(jaxconv.accelerate(loop.function), *args)
    else:
        with jaxconv.enabled():
            subject = Compiled(loop.function, *args)
    facts = {"name": loop.name, "direction": "", "how": how, "tolerance": 1e-4}
    return measure(effort, baseline, subject, flops=flops(loop.function, *args), **facts)


# What follows a layer in a network, for its output and its input.


def _normal(y: Array, axes: int | tuple[int, ...]) -> Array:
    centred = y - y.mean(axes, keepdims=True)
    return centred * lax.rsqrt((centred * centred).mean(axes, keepdims=True) + 1e-5)


CONSUMERS: dict[str, Callable[[Array, Array], Array]] = {
    "bias, ReLU": lambda y, _: jax.nn.relu(y + jnp.arange(y.shape[-1], dtype=y.dtype)),
    "batch norm, ReLU": lambda y, _: jax.nn.relu(_normal(y, tuple(range(y.ndim - 1)))),
    "layer norm, GELU": lambda y, _: jax.nn.gelu(_normal(y, -1)),
    "residual sum": lambda y, x: jax.nn.relu(x + y),
    "concatenation": lambda y, x: jnp.concatenate([x, y], -1),
    "mean over positions": lambda y, _: y.mean(tuple(range(1, y.ndim - 1))),
    "sum over channels": lambda y, _: y.sum(-1),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A layer in what surrounds it in a network: a function of its image and kernel.

    Attributes:
      around: makes the program, given the layer's convolution.
    """

    layer: Layer
    what: str
    around: Callable[[Callable[..., Array]], Callable[..., Array]]
    directions: tuple[str, ...] = ("forward", "gradients")

    @property
    def name(self) -> str:
        return f"{self.layer.name}, {self.what}"

    def function(self, direction: str) -> Callable[..., Any]:
        def conv(x: Array, w: Array) -> Array:
            return lax.conv_general_dilated(x, w, **arguments(self.layer.spec))

        forward = self.around(conv)
        if direction == "forward":
            return forward
        return jax.grad(lambda x, w: jnp.square(forward(x, w)).mean(), (0, 1))

    def operands(self, direction: str) -> tuple[Array, Array]:
        del direction  # image and kernel in both
        return self.layer.operands()[:2]


def _followed(by: Callable[[Array, Array], Array]) -> Any:
    return lambda conv: lambda x, w: by(conv(x, w), x)


def _channels_first(conv: Callable[..., Array]) -> Callable[..., Array]:
    """The convolution of an image that another operation writes channels first, and reads so."""

    def function(x: Array, w: Array) -> Array:
        first = jnp.tanh(jnp.moveaxis(x, -1, 1))
        return jnp.tanh(jnp.moveaxis(conv(jnp.moveaxis(first, 1, -1), w), -1, 1))

    return function


def _in_scan(conv: Callable[..., Array]) -> Callable[..., Array]:
    """Three steps, scaled as a network's are: else each enlarges rounding errors thirtyfold."""

    def function(x: Array, w: Array) -> Array:
        scale = math.prod(w.shape[:-1]) ** -0.5
        return lax.scan(lambda x, _: (jnp.tanh(scale * conv(x, w)), None), x, None, length=3)[0]

    return function


def _in_threes(conv: Callable[..., Array]) -> Callable[..., Array]:
    def function(x: Array, w: Array) -> Array:
        y = conv(x, w)
        return y.reshape(*y.shape[:-1], -1, 3).sum(-1)

    return function


def _patches(_: Callable[..., Array]) -> Callable[..., Array]:
    """Patches as lax makes them, multiplied as users do."""

    def function(x: Array, w: Array) -> Array:
        patches = lax.conv_general_dilated_patches(
            x, w.shape[:-2], (1,) * (x.ndim - 2), "SAME", dimension_numbers=LAYOUTS[x.ndim - 2]
        )
        return patches @ jnp.moveaxis(w, -2, 0).reshape(-1, w.shape[-1])

    return function


SURROUNDED = (
    layer_of("dense", 8, 28, (64, 64), 3),
    layer_of("depthwise", 8, 56, (144, 144), 3, 1, 144),
    layer_of("depthwise", 8, 14, (384, 384), 7, 1, 384),
    layer_of("pointwise", 8, 28, (192, 192), 1),
    layer_of("grouped", 8, 28, (128, 128), 3, 1, 32),
    layer_of("volume", 1, 16, (32, 32), 3, ndim=3),
    layer_of("signal", 8, 1024, (256, 256), 4, 1, 256, ndim=1, causal=1),
)
PROGRAMS = (
    *(Program(one, what, _followed(by)) for one in SURROUNDED for what, by in CONSUMERS.items()),
    *(Program(one, "channels first around", _channels_first) for one in SURROUNDED),
    *(Program(one, "in scan", _in_scan) for one in SURROUNDED),
    Program(layer_of("multiplier", 1, 66, (16, 48), 3, 1, 16), "summed in threes", _in_threes),
    Program(layer_of("dense", 8, 28, (32, 64), 3), "by patches", _patches),
    Program(layer_of("dense", 1, 32, (3, 64), 7), "by patches", _patches),
)


def measure_program(program: Program, direction: str, effort: Effort) -> Result:
    function, args = program.function(direction), program.operands(direction)
    return measure(
        effort,
        Compiled(function, *args),
        Compiled(jaxconv.accelerate(function), *args),
        name=program.name,
        direction=direction,
        how=", ".join(_chosen(function, *args)),
        flops=flops(function, *args),
        tolerance=1e-4 if direction == "forward" else 1e-3,
    )


def _chosen(function: Callable[..., Any], *args: Any) -> list[str]:
    platform = jax.default_backend()
    return [choose(spec, platform)[0] for spec in convolutions(function, *args)]


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


IMAGES = [network for network in NETWORKS if len(network.shape) == 3]
MODELS = tuple(
    Model(network, batch)
    for network in (*NETWORKS, *(dataclasses.replace(one, first=True) for one in IMAGES))
    for batch in (1, 8)
)
# A call takes up to several seconds. For ResNet-50's step, batch 8, a single pair with PyTorch gave
# a ratio of 1.02, seven pairs 0.88.
MODEL_EFFORT = Effort(seconds=8.0, fewest=5)


def measure_model(model: Model, direction: str, effort: Effort) -> Result:
    """Beside lax; channels last also beside other runtimes, channels first beside itself channels
    last."""
    function, args = model.function(direction), model.operands(direction)
    beside = peers(effort, "network", model.network, direction, args)
    if model.network.first:
        last = dataclasses.replace(model, network=dataclasses.replace(model.network, first=False))
        twin = Compiled(jaxconv.accelerate(last.function(direction)), *last.operands(direction))
        # Of a step the loss is compared: its parameters are in another order.
        head = (lambda out: out) if direction == "forward" else (lambda out: out[0])
        beside[CHANNELS_LAST] = Call(twin.run, head, head)
    return measure(
        effort,
        Compiled(function, *args),
        Compiled(jaxconv.accelerate(function), *args),
        beside,
        name=model.name,
        direction=direction,
        how="accelerate",
        flops=flops(function, *args),
        # The smallest gradients of 50 layers suffer from cancellation.
        tolerance=1e-4 if direction == "forward" else 1e-2,
    )


def profile_of(case: Program | Model, direction: str) -> Profile:
    """The time of each operation of a case, by ``accelerate``."""
    args = case.operands(direction)
    function = jaxconv.accelerate(case.function(direction))
    return profile(f"{case.name}, {direction}", function, *args)
