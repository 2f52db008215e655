"""Programs that call lax alone, by ``accelerate`` and by ``enable``: loops and batches."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxconv
from jaxconv.bench.measure import ENOUGH, Effort, Result, measure
from jaxconv.planning.timing import Compiled


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to time. ``make`` gives the function and its arguments."""

    name: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]


def _random(*shape: int) -> Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def _conv(image: Array, kernel: Array, layout: tuple[str, str, str]) -> Array:
    return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout)


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def training_loop() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def train(images: Array, kernel: Array) -> Array:
        def loss(kernel: Array) -> Array:
            return jnp.square(_conv(images, kernel, NHWC)).mean()

        def step(kernel: Array, _: None) -> tuple[Array, None]:
            return kernel - 1e-3 * jax.grad(loss)(kernel), None

        return lax.scan(step, kernel, None, length=2)[0]

    return train, (_random(8, 28, 28, 64), _random(3, 3, 64, 64) / 24)


def forward_loop() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def layers(images: Array, kernel: Array) -> Array:
        return lax.scan(lambda x, _: (_conv(x, kernel, NCHW), None), images, None, length=2)[0]

    return layers, (_random(8, 64, 28, 28), _random(64, 64, 3, 3) / 24)


def gradients_per_example() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def loss(kernel: Array, image: Array) -> Array:
        return jnp.square(_conv(image[None], kernel, NHWC)).sum()

    return jax.vmap(jax.grad(loss), (None, 0)), (_random(3, 3, 16, 32), _random(32, 28, 28, 16))


def kernels_in_a_batch() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def conv(image: Array, kernel: Array) -> Array:
        return _conv(image, kernel, NHWC)

    return jax.vmap(conv, (None, 0)), (_random(8, 28, 28, 32), _random(8, 3, 3, 32, 32))


PROGRAMS = (
    Program("training steps in scan, 3×3, 8×28×28×64", training_loop),
    Program("NCHW 3×3 in scan, 8×28×28×64", forward_loop),
    Program("a gradient for each of 32 examples, 3×3, 28×28×16→32", gradients_per_example),
    Program("8 kernels at once by vmap, 3×3, 8×28×28×32", kernels_in_a_batch),
)
HOW = ("accelerate", "enable")


def run(programs: tuple[Program, ...], effort: Effort = ENOUGH) -> Iterator[str | Result]:
    """Times each program by ``accelerate`` and by ``enable``. Yields the name of what comes, then
    its result."""
    for program in programs:
        function, args = program.make()
        baseline = Compiled(function, *args)
        for how in HOW:
            yield f"{program.name}, {how}"
            with jaxconv.enabled() if how == "enable" else contextlib.nullcontext():
                subject = Compiled(
                    jaxconv.accelerate(function) if how == "accelerate" else function, *args
                )
            yield measure(
                effort,
                baseline,
                subject,
                suite="loops",
                name=program.name,
                direction="",
                how=how,
                tolerance=1e-4,
            )
