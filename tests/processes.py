"""What ``test_processes`` runs in two processes of four devices each: they train a network.

Their caches differ: that of the second process claims that other algorithms are the fastest. Each
writes a JSON file: the algorithm planned for each convolution, and how far the training is from
lax's.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxconv
from jaxconv.config import notify
from jaxconv.planning import rows
from jaxconv.planning.choose import choose
from jaxconv.planning.machine import here
from jaxconv.planning.rows import Timed, record
from jaxconv.spec import ConvSpec
from jaxconv.tools.autotune import candidates
from jaxconv.transforms.primitive import Lowered, observers, planned_here

PROCESSES, DEVICES = 2, 4
LAST = ("NHWC", "HWIO", "NHWC")
STEPS, RATE = 3, 0.5
Params = tuple[Any, ...]


def start() -> tuple[Params, np.ndarray, np.ndarray]:
    """Parameters, images and what the network should make of them."""
    rng = np.random.default_rng(0)
    shapes = (3, 3, 3, 8), (3, 3, 1, 8), (1, 1, 8, 16), (3, 3, 16, 3)
    params = tuple(rng.standard_normal(shape) / 4 for shape in shapes)
    x, target = rng.standard_normal((2, 4, 16, 10, 3))
    return params, x, target


def step(params: Params, x: Any, target: Any) -> tuple[Array, Params]:
    """The loss, and the parameters after a step of gradient descent."""

    def loss(params: Params) -> Array:
        strided, depthwise, pointwise, transposed = params
        y = lax.conv_general_dilated(x, strided, (2, 2), "SAME", dimension_numbers=LAST)
        y = lax.conv_general_dilated(
            jnp.tanh(y), depthwise, (1, 1), "SAME", dimension_numbers=LAST, feature_group_count=8
        )
        y = lax.conv_general_dilated(jnp.tanh(y), pointwise, (1, 1), "SAME", dimension_numbers=LAST)
        y = lax.conv_transpose(jnp.tanh(y), transposed, (2, 2), "SAME", dimension_numbers=LAST)
        return jnp.mean((y - target) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda p, g: p - RATE * g, params, gradients)


def trained(step: Callable[..., Any], params: Params, x: Any, target: Any) -> list[np.ndarray]:
    """The losses, and the parameters at the end."""
    losses = []
    for _ in range(STEPS):
        loss, params = step(params, x, target)
        losses.append(loss)
    return [np.asarray(value) for value in (*losses, *params)]


claimed: dict[ConvSpec, str] = {}


def claim(lowered: Lowered) -> None:
    """Before a convolution is planned, keeps a row by which another algorithm is the fastest."""
    spec, platform = lowered.spec, lowered.platform
    planned, *others = candidates(spec, platform)
    if others:
        claimed[spec] = others[0]
        seconds = dict.fromkeys([planned, *others], 1.0) | {others[0]: 1e-3}
        record([Timed(spec, here(platform), seconds)], platform)
        notify()


def main(address: str, process: int, report: Path) -> None:
    jaxconv.config.update("cache_dir", report.with_suffix(""))
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # they run three times
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, PROCESSES, process)
    assert (jax.process_count(), jax.local_device_count()) == (PROCESSES, DEVICES)
    # Along both axes there are neighbours in different processes: batch · rows = 2 · 4.
    one, two = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = Mesh(np.block([[one[:1], two[:1]], [two[1:], one[1:]]]), ("batch", "rows"))

    def placed(x: np.ndarray, spec: P) -> Array:
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    params, *images = start()
    args = [tuple(placed(p, P()) for p in params), *(placed(x, P("batch", "rows")) for x in images)]
    whole = NamedSharding(mesh, P())
    expected = trained(jax.jit(step), params, *images)
    if process == 1:
        observers.append(claim)
    found = trained(jax.jit(jaxconv.accelerate(step), out_shardings=whole), *args)
    errors = [np.max(abs(a - b)) / np.max(abs(b)) for a, b in zip(found, expected, strict=True)]
    specs = planned_here("cpu")
    plans = [f"{spec}: {choose(spec, 'cpu')[0]}" for spec in specs]
    report.write_text(json.dumps({"plans": plans, "error": max(errors)}))
    if process == 1:
        assert claimed.keys() <= set(specs)
        rows.several_processes = lambda: False
        notify()
        # It would do what its cache claims, were it alone.
        assert {spec: choose(spec, "cpu")[0] for spec in claimed} == claimed != {}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
