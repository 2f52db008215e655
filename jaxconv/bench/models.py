"""Whole networks by ``accelerate``, by lax and by PyTorch: forward, and a training step."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxconv
from jaxconv.bench.measure import Effort, Result, measure, torch_peer
from jaxconv.bench.networks import NETWORKS, Network, Params
from jaxconv.planning.timing import Compiled

DIRECTIONS = ("forward", "training step")
# A call takes up to several seconds. Of ResNet-50's step, batch 8, a single pair with PyTorch gave
# 1.02, seven 0.88.
ENOUGH = Effort(seconds=8.0, fewest=5)
MODELS: Sequence[tuple[Network, int]] = [
    (network, batch) for network in NETWORKS for batch in (1, 8)
]


def named(network: Network, batch: int) -> str:
    return f"{network.name}, batch {batch}"


def run(
    models: Sequence[tuple[Network, int]],
    directions: tuple[str, ...] = DIRECTIONS,
    effort: Effort = ENOUGH,
) -> Iterator[str | Result]:
    """Times each network at each batch. Yields the name of what comes, then its result."""
    peer = torch_peer()
    for network, batch in models:
        params, (x, labels) = network.init(), network.data(batch)
        for direction in directions:
            name = named(network, batch)
            yield f"{name}, {direction}"
            forward = direction == "forward"
            function: Callable[..., Any] = network.forward if forward else network.step
            args: tuple[Any, ...] = (params, x) if forward else (params, x, labels)
            torch = None
            if peer is not None:
                torch = (peer.forward if forward else peer.step)(network, *args)
            yield measure(
                effort,
                Compiled(function, *args),
                Compiled(jaxconv.accelerate(function), *args),
                torch,
                (lambda output: output) if forward else partial(_changes, params),
                None if forward else (0.0, jax.tree.map(_rounding, params)),
                suite="models",
                name=name,
                direction=direction,
                how="accelerate",
                # The smallest gradients of 50 layers are sums of terms that cancel.
                tolerance=1e-4 if forward else 1e-2,
            )


def _changes(params: Params, output: Any) -> Any:
    """Of a training step's output, what tells whether the gradients are right: the loss, and the
    changes of the parameters, which would vanish beside these themselves."""

    def change(new: Any, old: Any) -> np.ndarray:
        return np.asarray(new, np.float64) - np.asarray(old, np.float64)

    loss, new = output
    return loss, jax.tree.map(change, [tuple(layer) for layer in new], params)


def _rounding(param: Any) -> float:
    """The difference that rounding alone makes between two new values of a parameter."""
    return float(jnp.finfo(param.dtype).eps * jnp.max(jnp.abs(param)))
