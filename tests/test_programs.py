"""Sampled programs: transformations in any order, accelerated at any place, give what lax gives.

A program follows from its seed alone, which a failure names: a convolution of ``test_fuzz``, in
float64, inside up to four transformations.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import Array, lax
from test_fuzz import Sample, sample

import jaxconv

Fun = Callable[[Array, Array], Array]


# ---- transformations, each of a function of two arrays that gives one ----


def flat(*arrays: Array) -> Array:
    return jnp.concatenate([jnp.ravel(x) for x in arrays])


def grad(fun: Fun, rng: np.random.Generator) -> Fun:
    gradients = jax.grad(lambda x, w: jnp.sum(jnp.sin(fun(x, w))), (0, 1))
    return lambda x, w: flat(*gradients(x, w))


def jvp(fun: Fun, rng: np.random.Generator) -> Fun:
    return lambda x, w: flat(*jax.jvp(fun, (x, w), (jnp.cos(x), jnp.sin(w))))


def vmap(fun: Fun, rng: np.random.Generator) -> Fun:
    which = int(rng.integers(3))
    x_axis, w_axis = int(rng.integers(-1, 3)), int(rng.integers(-1, 3))
    axes = ((x_axis, None), (None, w_axis), (x_axis, w_axis))[which]

    def batched(x: Array, w: Array) -> Array:
        args = [
            y if axis is None else jnp.stack([y, -0.5 * y], axis)
            for y, axis in zip((x, w), axes, strict=True)
        ]
        return jax.vmap(fun, axes)(*args)

    return batched


def scan(fun: Fun, rng: np.random.Generator) -> Fun:
    def scanned(x: Array, w: Array) -> Array:
        def step(carry: Array, scale: Array) -> tuple[Array, Array]:
            out = fun(carry, scale * w)
            return carry * jnp.tanh(jnp.mean(out)), out

        return flat(*lax.scan(step, x, jnp.asarray([1.0, -2.0])))

    return scanned


def cond(fun: Fun, rng: np.random.Generator) -> Fun:
    bound = float(rng.choice([-1e9, 1e9]))

    def branched(x: Array, w: Array) -> Array:
        return lax.cond(jnp.sum(x) > bound, fun, lambda x, w: 2 * fun(-x, w), x, w)

    return branched


def remat(fun: Fun, rng: np.random.Generator) -> Fun:
    policies = jax.checkpoint_policies
    choices = (None, policies.dots_saveable, policies.everything_saveable)
    return jax.checkpoint(fun, policy=choices[rng.integers(len(choices))])


def custom_vjp(fun: Fun, rng: np.random.Generator) -> Fun:
    @jax.custom_vjp
    def call(x: Array, w: Array) -> Array:
        return fun(x, w)

    def backward(transpose: Callable[[Array], Any], cotangent: Array) -> tuple[Array, Array]:
        dx, dw = transpose(cotangent)
        return 2 * dx, 3 * dw

    call.defvjp(functools.partial(jax.vjp, fun), backward)
    return call


def jit(fun: Fun, rng: np.random.Generator) -> Fun:
    return jax.jit(fun)


TRANSFORMATIONS = {f.__name__: f for f in (jit, grad, jvp, vmap, scan, cond, remat, custom_vjp)}
DIFFERENTIATE = ("grad", "jvp", "custom_vjp")


@dataclasses.dataclass(frozen=True)
class Program:
    layer: Sample
    # Innermost first: a transformation's name, and the seed of what is random in it; and the
    # algorithm of the ``accelerate`` around it, if there is one.
    steps: tuple[tuple[str, int, str | None], ...]

    @classmethod
    def sample(cls, seed: int) -> "Program":
        rng = np.random.default_rng(seed)
        layer = sample(seed)
        layer.arguments["preferred_element_type"] = None
        names: list[str] = []
        for _ in range(rng.integers(1, 5)):
            allowed = list(TRANSFORMATIONS)
            if sum(name in DIFFERENTIATE for name in names) == 2:
                # Third derivatives have hundreds of convolutions.
                allowed = [name for name in allowed if name not in DIFFERENTIATE]
            elif "custom_vjp" in names:
                allowed.remove("jvp")  # JAX refuses it
            names.append(str(rng.choice(allowed)))
        algorithms = [
            str(rng.choice(["auto", "auto", "im2col", "implicit"])) if rng.random() < 0.4 else None
            for _ in names
        ]
        algorithms[rng.integers(len(names))] = "auto"
        seeds = map(int, rng.integers(2**31, size=len(names)))
        return cls(layer, tuple(zip(names, seeds, algorithms, strict=True)))

    def function(self, accelerated: bool) -> Fun:
        def layer(x: Array, w: Array) -> Array:
            return jnp.tanh(lax.conv_general_dilated(x, w, **self.layer.arguments))

        fun: Fun = layer
        for name, seed, algorithm in self.steps:
            fun = TRANSFORMATIONS[name](fun, np.random.default_rng(seed))
            if accelerated and algorithm is not None:
                fun = jaxconv.accelerate(fun, algorithm=algorithm)
        return fun


SEEDS = [*range(40), *(pytest.param(i, marks=pytest.mark.exhaustive) for i in range(40, 160))]


@pytest.mark.parametrize("seed", SEEDS)
def test_programs(seed: int) -> None:
    program = Program.sample(seed)
    rng = np.random.default_rng(seed)
    shapes = program.layer.lhs_shape, program.layer.rhs_shape
    args = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]
    expected = jax.jit(program.function(False))(*args)
    compiled = jax.jit(program.function(True)).trace(*args)
    assert "conv_general_dilated" not in str(compiled.jaxpr), program
    out = compiled.lower().compile()(*args)
    # A few roundings for each product of a sum, here or in a derivative, of which two at most.
    oracles.assert_close(out, expected, roundings=16 * max(map(math.prod, shapes)))
