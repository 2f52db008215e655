"""What is timed by lax, by jaxconv and by PyTorch: layers, loops, and whole networks."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxconv
from jaxconv.bench.cases import DIRECTIONS, Layer
from jaxconv.bench.measure import ENOUGH, Effort, Result, measure, reference, torch_peer
from jaxconv.bench.networks import LAYOUTS, NETWORKS, Network
from jaxconv.planning.choose import choose
from jaxconv.planning.timing import Compiled
from jaxconv.spec import ConvSpec
from jaxconv.transforms.primitive import conv_p


def run_layers(
    layers: Sequence[Layer],
    directions: Sequence[str] = DIRECTIONS,
    effort: Effort = ENOUGH,
) -> Iterator[str | Result]:
    """Times each layer in each direction that it has. Yields the name of what comes, then that."""
    peer = torch_peer()
    for layer in layers:
        wanted = [direction for direction in layer.directions if direction in directions]
        operands = layer.operands() if wanted else ()
        for direction in wanted:
            yield f"{layer.name}, {direction}"
            function = layer.function(jaxconv.conv_general_dilated, direction)
            yield measure(
                effort,
                Compiled(layer.function(lax.conv_general_dilated, direction), *operands),
                Compiled(function, *operands),
                None if peer is None else peer.layer(layer, direction, *operands),
                exact=partial(reference, layer, direction, *operands),
                name=layer.name,
                direction=direction,
                how=", ".join(planned(function, *operands)),
                # Both sum thousands of products, each in an order of its own.
                tolerance=2e-2 if layer.dtype == "bfloat16" else 1e-4,
            )


def planned(function: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """The algorithm that "auto" chooses for each convolution of ``function``, in order."""
    names = []
    for eqn in jax.make_jaxpr(function)(*args).eqns:
        if eqn.primitive is conv_p:
            lhs, rhs = (v.aval for v in eqn.invars)
            spec = ConvSpec.from_params(lhs, rhs, eqn.params)
            names.append(choose(spec, jax.default_backend())[0])
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A program that calls lax alone, with convolutions in a loop or a batch.

    ``args`` are the shapes of its arguments.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[tuple[int, ...], ...]


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
    Loop(
        "training steps in scan, 3×3, 8×28×28×64",
        train,
        ((8, 28, 28, 64), (3, 3, 64, 64)),
    ),
    Loop(
        "NCHW 3×3 in scan, 8×28×28×64",
        stacked,
        ((8, 64, 28, 28), (64, 64, 3, 3)),
    ),
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


def run_loops(loops: Sequence[Loop], effort: Effort) -> Iterator[str | Result]:
    """Times each by ``accelerate`` and by ``enable``. Yields the name of what comes, then that."""
    for loop in loops:
        rng = np.random.default_rng(0)
        args = [jnp.asarray(rng.standard_normal(shape) / 8, jnp.float32) for shape in loop.args]
        baseline = Compiled(loop.function, *args)
        for how in ("accelerate", "enable"):
            yield f"{loop.name}, {how}"
            with jaxconv.enabled() if how == "enable" else contextlib.nullcontext():
                accelerated = how == "accelerate"
                function = jaxconv.accelerate(loop.function) if accelerated else loop.function
                subject = Compiled(function, *args)
            facts = {"name": loop.name, "direction": "", "how": how, "tolerance": 1e-4}
            yield measure(effort, baseline, subject, **facts)


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and a batch size."""

    network: Network
    batch: int

    @property
    def name(self) -> str:
        return f"{self.network.name}, batch {self.batch}"


MODELS = tuple(Model(network, batch) for network in NETWORKS for batch in (1, 8))
MODEL_DIRECTIONS = ("forward", "training step")
# A call takes up to several seconds. Of ResNet-50's step, batch 8, a single pair with PyTorch gave
# 1.02, seven 0.88.
MODEL_EFFORT = Effort(seconds=8.0, fewest=5)


def run_models(
    models: Sequence[Model],
    directions: Sequence[str] = MODEL_DIRECTIONS,
    effort: Effort = MODEL_EFFORT,
) -> Iterator[str | Result]:
    """Times each by ``accelerate``. Yields the name of what comes, then its result."""
    peer = torch_peer()
    for model in models:
        network = model.network
        params, (x, labels) = network.init(), network.data(model.batch)

        def changes(output: Any, params: Any = params) -> Any:
            """A step's loss, and the changes of the parameters, which show whether the gradients
            are right: a small change makes no difference to a parameter."""
            loss, new = output
            new = [tuple(layer) for layer in new]
            return loss, jax.tree.map(lambda a, b: np.subtract(a, b, dtype=float), new, params)

        for direction in directions:
            yield f"{model.name}, {direction}"
            forward = direction == "forward"
            function: Callable[..., Any] = network.forward if forward else network.step
            args = (params, x) if forward else (params, x, labels)
            torch = None
            if peer is not None:
                torch = (peer.forward if forward else peer.step)(network, *args)
            yield measure(
                effort,
                Compiled(function, *args),
                Compiled(jaxconv.accelerate(function), *args),
                torch,
                (lambda output: output) if forward else changes,
                name=model.name,
                direction=direction,
                how="accelerate",
                # The smallest gradients of 50 layers are sums of terms that cancel.
                tolerance=1e-4 if forward else 1e-2,
            )
