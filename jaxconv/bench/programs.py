"""The programs timed by lax, by jaxconv and by PyTorch: layers and whole networks."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any

import jax
from jax import lax

import jaxconv
from jaxconv.bench.cases import Layer
from jaxconv.bench.measure import Call, Effort, Result, measure, reference
from jaxconv.bench.networks import NETWORKS, Network
from jaxconv.planning.choose import choose
from jaxconv.planning.timing import Compiled
from jaxconv.spec import ConvSpec
from jaxconv.transforms import jaxprs


def convolutions(function: Callable[..., Any], *args: Any) -> list[ConvSpec]:
    """The convolutions of a function with these arguments, in program order."""
    return [conv.spec("bench") for conv in jaxprs.convolutions("bench", function, args, {})]


def convolutions_of(layers: Iterable[Layer]) -> list[ConvSpec]:
    """The convolutions of layers, in all their directions."""
    found: list[ConvSpec] = []
    for layer in layers:
        operands = jax.eval_shape(layer.operands)
        for direction in layer.directions:
            function = layer.function(lax.conv_general_dilated, direction)
            found += convolutions(function, *operands)
    return found


def flops(specs: Iterable[ConvSpec]) -> float:
    """Floating-point operations of convolutions, inserted zeros left out."""
    return sum(spec.flops / math.prod(spec.lhs_dilation) for spec in specs)


def _by_torch(effort: Effort, kind: str, *args: Any) -> Call | None:
    """A call by the module that imports PyTorch."""
    if not effort.torch:
        return None
    return getattr(import_module("jaxconv.bench.torch_peer"), kind)(*args)


def measure_layer(layer: Layer, direction: str, effort: Effort) -> Result:
    operands = layer.operands()
    by_lax = layer.function(lax.conv_general_dilated, direction)
    specs, platform = convolutions(by_lax, *operands), jax.default_backend()
    return measure(
        effort,
        Compiled(by_lax, *operands),
        Compiled(layer.function(jaxconv.conv_general_dilated, direction), *operands),
        _by_torch(effort, "layer", layer, direction, *operands),
        partial(reference, layer, *operands[:2]) if direction == "forward" else None,
        flops=flops(specs),
        name=layer.name,
        direction=direction,
        how=", ".join(choose(spec, platform)[0] for spec in specs),
        # Both sum thousands of products, in different orders.
        tolerance=2e-2 if layer.dtype == "bfloat16" else 1e-4,
    )


@dataclasses.dataclass(frozen=True)
class Model:
    network: Network
    batch: int
    directions: tuple[str, ...] = ("forward", "training step")

    @property
    def name(self) -> str:
        order = ", channels first" if self.network.first else ""
        return f"{self.network.name}{order}, batch {self.batch}"


MODELS = tuple(
    Model(dataclasses.replace(network, first=first), batch)
    for first in (False, True)
    for network in NETWORKS
    for batch in (1, 8)
)
# A call takes up to several seconds. For ResNet-50's step, batch 8, a single pair with PyTorch gave
# a ratio of 1.02, seven pairs 0.88.
MODEL_EFFORT = Effort(seconds=8.0, fewest=5)


def measure_model(model: Model, direction: str, effort: Effort) -> Result:
    network = model.network
    function: Callable[..., Any] = network.step
    args: tuple[Any, ...] = (network.init(), *network.data(model.batch))
    if direction == "forward":
        function, args = network.forward, args[:-1]
    return measure(
        effort,
        Compiled(function, *args),
        Compiled(jaxconv.accelerate(function), *args),
        _by_torch(effort, "network", network, *args),
        name=model.name,
        direction=direction,
        how="accelerate",
        flops=flops(convolutions(function, *args)),
        # The smallest gradients of 50 layers suffer from cancellation.
        tolerance=1e-4 if direction == "forward" else 1e-2,
    )
