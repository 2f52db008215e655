"""Networks of Flax, Equinox and Haiku train with jaxconv as they do with lax, to rounding."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import networks_equinox
import networks_haiku
import networks_linen
import networks_nnx
import numpy as np
import optax
import pytest
from cases import equations
from flax import linen, nnx
from flax.errors import TraceContextError
from jax import Array
from networks import STEPS, Training, numbers

import jaxconv
from jaxconv import loops
from jaxconv.tools import autotune

# The first alone is trained in the default run.
NETWORKS: dict[str, Callable[[], Training]] = {
    "nnx residual": networks_nnx.residual,
    "linen 3-D U-Net": networks_linen.unet,
    "equinox residual": networks_equinox.residual,
    "haiku WaveNet": networks_haiku.wavenet,
}
every_network = pytest.mark.parametrize("network", NETWORKS)
WAYS: dict[str, Callable[[Training], Any]] = {
    "lax": lambda training: training.jit(training.step),
    "inside jit": lambda training: training.jit(jaxconv.accelerate(training.step)),
    "outside jit": lambda training: jaxconv.accelerate(training.jit(training.step)),
}
# For each framework, by its name in the README, a network.
FRAMEWORKS = {
    "JAX": "haiku WaveNet",
    "Flax NNX": "nnx residual",
    "Flax Linen": "linen 3-D U-Net",
    "Equinox": "equinox residual",
    "Haiku": "haiku WaveNet",
}


@pytest.fixture(autouse=True, scope="module")
def _settings() -> Iterator[None]:
    """The frameworks promote dtypes and ranks themselves."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# How they are trained and looked at


class Run(NamedTuple):
    """The numbers of a training: the state after the last step, and the report of each."""

    state: dict[str, np.ndarray]
    reports: list[tuple[dict[str, np.ndarray], ...]]  # loss, outputs, gradients


@functools.cache
def started(network: str) -> tuple[Training, Any, Any]:
    """A training; of the state before it what is static, and the arrays."""
    training = NETWORKS[network]()
    return training, *training.split(training.start())


@functools.cache
def shapes(network: str) -> tuple[Training, Any, Any]:
    """As ``started``, with the arrays' shapes alone: nothing is compiled."""
    training, statics = NETWORKS[network](), []

    def start() -> Any:
        static, arrays = training.split(training.start())
        statics.append(static)
        return arrays

    arrays = jax.eval_shape(start)
    return training, *statics, arrays


def train(network: str, step: Any) -> Run:
    training, static, arrays = started(network)
    state, reports = training.merge(static, arrays), []
    for batch in training.batches:
        state, report = training.advance(step, state, batch)
        reports.append(tuple(map(numbers, report)))
    return Run(numbers(training.split(state)[1]), reports)


@functools.cache
def trained_by_lax(network: str) -> Run:
    return train(network, WAYS["lax"](started(network)[0]))


def on_arrays(network: str, step: Any) -> tuple[Callable[..., Any], Any, Any]:
    """A step as a function of arrays alone, and arguments for it."""
    training, static, arrays = shapes(network)

    def fn(arrays: Any, batch: Any) -> Any:
        state, report = training.advance(step, training.merge(static, arrays), batch)
        return training.split(state)[1], report

    return fn, arrays, training.batches[0]


def convolutions_in(fn: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The equations that convolve, by lax or by jaxconv, in ``fn`` and in all it calls."""
    kinds = "conv_general_dilated", "jaxconv"
    found = equations(jax.make_jaxpr(fn)(*arguments))
    return [eqn for eqn in found if eqn.primitive.name in kinds]


@functools.cache
def convolutions_of_lax(network: str) -> list[Any]:
    return convolutions_in(*on_arrays(network, shapes(network)[0].step))


def assert_all_are_jaxconvs(network: str, step: Any) -> None:
    by_lax = convolutions_of_lax(network)
    assert len(by_lax) >= 9
    assert {eqn.primitive.name for eqn in by_lax} == {"conv_general_dilated"}
    found = convolutions_in(*on_arrays(network, step))
    assert [eqn.primitive.name for eqn in found] == ["jaxconv"] * len(by_lax)


def tolerance(network: str) -> float:
    """What rounding may do in a step, relative to the largest of the numbers that belong together.

    A convolution rounds once for each product that it sums. The longest sums, those of weight
    gradients over all positions of all images, leave room for what the layers between hand on.
    """
    kernels = [(eqn.invars[1].aval, eqn.params) for eqn in convolutions_of_lax(network)]
    longest = max(
        kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        for kernel, params in kernels
    )
    return longest * float(jnp.finfo(jnp.float64).eps)


def assert_close(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float
) -> None:
    assert actual.keys() == expected.keys()
    floats = [x for x in expected.values() if x.dtype == np.float64]
    largest = max((np.max(np.abs(x)) for x in floats), default=0.0)
    for path, x in expected.items():
        assert (actual[path].dtype, actual[path].shape) == (x.dtype, x.shape), path
        atol = tolerance * largest if x.dtype == np.float64 else 0  # counters and random keys
        np.testing.assert_allclose(actual[path], x, rtol=0, atol=atol, err_msg=path)


def assert_trained_alike(actual: Run, expected: Run, tolerance: float) -> None:
    steps = zip(actual.reports, expected.reports, strict=True)
    for i, reports in enumerate(steps):
        for a, e in zip(*reports, strict=True):
            assert_close(a, e, (i + 1) * tolerance)
    assert_close(actual.state, expected.state, STEPS * tolerance)


# The trainings


@every_network
def test_lax_trains_all_of_it(network: str) -> None:
    training, _, arrays = started(network)
    assert len(training.batches) == STEPS
    start, run = numbers(arrays), trained_by_lax(network)
    keys = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(arrays)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    for path, x in run.state.items():  # parameters, their moments, statistics, counters
        assert path in keys or not np.array_equal(x, start[path]), f"{path} is what it was"
        assert x.dtype != np.float32, f"{path} rounds to 32 bits"
    for _, _, gradients in run.reports:
        assert all(np.any(gradient) for gradient in gradients.values())


@every_network
@pytest.mark.parametrize("way", ["inside jit", "outside jit"])
def test_accelerated_training(network: str, way: str) -> None:
    step = WAYS[way](started(network)[0])
    assert_all_are_jaxconvs(network, step)
    assert_trained_alike(train(network, step), trained_by_lax(network), tolerance(network))


@every_network
@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="elsewhere auto leaves convolutions to XLA"
)
def test_both_ways_compile_the_same(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = started(network)[0]
    # Under enable a convolution can't see that another made its operands, and stores none.
    monkeypatch.setattr(loops, "stored", lambda x: x)

    def operations(way: str) -> Counter[str]:
        fn, *arguments = on_arrays(network, WAYS[way](training))
        text = jax.jit(fn).lower(*arguments).as_text()
        calls = Counter(re.findall(r"call @(\w+)", text))
        counts = Counter[str]()
        for function in text.split("func.func ")[1:]:  # JAX may share one of its own, or not
            (name, *_) = re.findall(r"@(\w+)", function)
            for operation in re.findall(r"stablehlo\.\w+", function):
                counts[operation] += max(1, calls[name])
        return counts

    by_lax, accelerated = operations("lax"), operations("inside jit")
    with jaxconv.enabled():
        assert operations("lax") == accelerated != by_lax


# The convolutions that explain and autotune find


@every_network
def test_explain_lists_what_accelerate_plans(network: str) -> None:
    training, static, arrays = started(network)
    step = WAYS["lax"](training)

    def without_gradients(state: Any, batch: Any) -> Any:
        state, (value, *_) = training.advance(step, state, batch)
        return value if training.jit is nnx.jit else (state, value)  # NNX changes it in place

    state = training.merge(static, arrays)
    found = jaxconv.explain(without_gradients, state, training.batches[0])
    assert_all_are_jaxconvs(network, WAYS["outside jit"](training))
    assert found.count == len(convolutions_of_lax(network))


def nnx_step(model: nnx.Module, optimizer: nnx.Optimizer, x: Array) -> Array:
    loss, gradients = nnx.value_and_grad(lambda model, x: jnp.sum(model(x) ** 2))(model, x)
    optimizer.update(model, gradients)
    return loss


@pytest.mark.parametrize("jit", [nnx.jit, lambda f: f], ids=["jit", "plain"])
def test_nnx_objects_are_left_alone(jit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        autotune, "_compiled", lambda *_: SimpleNamespace(call=lambda: 1.0, compile_seconds=0.1)
    )
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-4), wrt=nnx.Param)
    step, state, x = jit(nnx_step), (model, optimizer), IMAGE.astype(np.float32)
    before = numbers(nnx.state(state))
    assert jaxconv.explain(step, *state, x).count == 2
    assert len(jaxconv.autotune(step, *state, x).rows) == 2
    assert jaxconv.explain(model, x).count == 1  # whose statistics are changed
    np.testing.assert_equal(numbers(nnx.state(state)), before)
    assert step(*state, x) > step(*state, x)
    # As jax.jit, it refuses to change what is no argument.
    with pytest.raises((ValueError, TraceContextError), match="different trace level"):
        jaxconv.explain(lambda x: step(*state, x), x)


# A part of a network

IMAGE = np.random.default_rng(3).normal(size=(2, 4, 5, 3))
Wrap = Callable[[Callable[..., Array]], Callable[..., Array]]


def nnx_layers(wrap: Wrap) -> Any:
    """Running statistics are made outside what is wrapped, and changed inside."""
    rngs = nnx.Rngs(0)
    conv = nnx.Conv(3, 8, (3, 3), param_dtype=jnp.float64, rngs=rngs)
    norm = nnx.BatchNorm(8, param_dtype=jnp.float64, rngs=rngs)
    static, params, rest = nnx.split(nnx.Sequential(conv, norm), nnx.Param, ...)
    rest = jax.tree.map(lambda x: x.astype(jnp.float64), rest)
    return params, lambda params, x: wrap(nnx.merge(static, params, rest, copy=True))(x)


def nnx_by_argument(wrap: Wrap) -> Any:
    """The layer takes a function that convolves: jaxconv's own."""
    of = jaxconv if wrap is jaxconv.accelerate else jax.lax
    options = {"param_dtype": jnp.float64, "conv_general_dilated": of.conv_general_dilated}
    static, params = nnx.split(nnx.Conv(3, 8, (3, 3), **options, rngs=nnx.Rngs(0)))
    return params, lambda params, x: nnx.merge(static, params)(x)


def linen_layer(wrap: Wrap) -> Any:
    class Layers(linen.Module):
        @linen.compact
        def __call__(self, x: Array) -> Array:
            return wrap(linen.Conv(8, (3, 3), param_dtype=jnp.float64))(x)

    layers = Layers()
    return layers.init(jax.random.key(0), IMAGE), layers.apply


def equinox_layer(wrap: Wrap) -> Any:
    layer = eqx.nn.Conv2d(3, 8, 3, key=jax.random.key(0))
    return layer, lambda layer, x: jax.vmap(wrap(layer))(jnp.moveaxis(x, -1, 1))


def haiku_layer(wrap: Wrap) -> Any:
    layers = hk.without_apply_rng(hk.transform(lambda x: wrap(hk.Conv2D(8, 3))(x)))
    return layers.init(jax.random.key(0), IMAGE), layers.apply


LAYERS = [nnx_layers, linen_layer, nnx_by_argument, equinox_layer, haiku_layer]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_alone(layer: Callable[[Wrap], Any]) -> None:
    def gradient(wrap: Wrap) -> Any:
        params, apply = layer(wrap)
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(apply(params, IMAGE))))), params

    by_lax, params = gradient(lambda layer: layer)
    accelerated, _ = gradient(jaxconv.accelerate)
    eqns = convolutions_in(accelerated, params)
    assert {eqn.primitive.name for eqn in eqns} == {"jaxconv"}
    tolerance = IMAGE.size * float(jnp.finfo(jnp.float64).eps)
    assert_close(numbers(accelerated(params)), numbers(by_lax(params)), tolerance)


# The README

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| `(step = .+?)`", README, re.MULTILINE)
LINES = [(framework, line) for frameworks, line in ROWS for framework in frameworks.split(", ")]


@pytest.mark.parametrize(("framework", "line"), LINES)
def test_the_lines_of_the_readme(framework: str, line: str) -> None:
    network = FRAMEWORKS[framework]
    namespace = {"jax": jax, "nnx": nnx, "eqx": eqx, "jaxconv": jaxconv}
    namespace["step"] = shapes(network)[0].step
    exec(line, namespace)
    assert_all_are_jaxconvs(network, namespace["step"])


def test_the_readme_has_a_line_for_each_framework() -> None:
    assert {framework for framework, _ in LINES} == set(FRAMEWORKS)
