"""Collectives in compiled programs. Run by ``test_collectives`` in a process of eight devices, it
prints where jaxconv's programs move more than lax's, or are wrong."""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxconv
from jaxconv.bench.cases import Layer, layer_of
from jaxconv.bench.measure import difference

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
# Of an operation that runs beside others, its end: the beginning's result has the operand in it.
COLLECTIVE = re.compile(rf"^\s*[^=]* = (\(.*?\)|\S+) ({KINDS})(?:-done)?\(", re.MULTILINE)


def collectives(text: str) -> tuple[tuple[str, int], ...]:
    """Those in the text of a compiled program, and the bytes of their results; of a loop once."""
    return tuple((kind, _size(result)) for result, kind in COLLECTIVE.findall(text))


def _size(result: str) -> int:
    """Bytes of an array, or of a tuple of them, in XLA's notation."""
    size = 0
    for bits, shape in re.findall(r"\b(?:[a-z]+(\d+)\w*|pred)\[([\d,]*)\]", result):
        size += int(bits or 8) * math.prod(map(int, filter(None, shape.split(",")))) // 8
    return size


def excess(program: Any, by_lax: Any) -> str:
    """What ``program`` moves where that is more than lax's moves; empty where it is not."""
    moved, allowed = (collectives(each.as_text()) for each in (program, by_lax))
    size, limit = (sum(size for _, size in each) for each in (moved, allowed))
    # As many bytes in no more collectives, or fewer: where lax gathers.
    return "" if (size, len(moved)) <= (limit, len(allowed)) else f"{moved} instead of {allowed}"


# A mesh of two axes: along both, or each along another dimension.
MESH = {"a": 4, "b": 2}
ALL = tuple(MESH)
# The axes of the mesh along dimensions: "n" batch, "h" rows, "i" input and "o" output channels.
LAYOUTS: dict[str, dict[str, Any]] = {
    "batch": {"n": ALL},
    "inputs": {"i": ALL},
    "outputs": {"o": ALL},
    "rows": {"h": ALL},
    "batch, rows": {"n": "a", "h": "b"},
    "batch, outputs": {"n": "a", "o": "b"},
}
BFLOAT16 = dict.fromkeys(("dtype", "out_dtype"), jnp.dtype("bfloat16"))
_layer = partial(layer_of, "", 16)
LAYERS = (
    _layer(56, (32, 32), 3),
    # A size that no number of devices divides.
    layer_of("", 12, 57, (30, 44), 3),
    _layer(56, (32, 64), 3, 2),
    _layer(64, (8, 64), 7, 2),
    _layer(56, (64, 128), 1, 2),
    _layer(64, (8, 96), 4, 4),
    _layer(57, (64, 64), 3, 2, 64),
    _layer(32, (16, 16), 31, 1, 16),
    _layer(28, (128, 128), 3, 1, 32),
    _layer(56, (32, 32), 3, pads=(4, 4), dilation=4),
    _layer(28, (32, 32), 4, up=True),
    _layer(1024, (64, 64), 3, 2, ndim=1),
    _layer(1024, (64, 64), 4, 1, 64, ndim=1, causal=True, dilation=2),
    _layer(17, (16, 16), 3, 2, ndim=3),
    Layer("bfloat16", _layer(56, (32, 32), 3).spec.replace(**BFLOAT16)),
)


def specs(layer: Layer, layout: str) -> list[P]:
    """How a layer's image, kernel and output lie on the mesh."""
    axes = LAYOUTS[layout]
    inputs, outputs = axes.get("i"), axes.get("o")
    kernel = [None] * layer.spec.spatial_ndim
    image = [axes.get("n"), axes.get("h"), *kernel[1:]]
    if layer.spec.groups > 1:  # input channels are cut by groups, and with them the others
        outputs = inputs or outputs
    kernel.append(None if layer.spec.groups > 1 else inputs)
    return [P(*image, inputs), P(*kernel, outputs), P(*image, outputs)]


def problem(layer: Layer, layout: str, direction: str) -> str:
    """What is wrong with jaxconv's program; empty where nothing is."""
    mesh = jax.make_mesh(tuple(MESH.values()), ALL, (AxisType.Auto,) * 2)
    shardings = [NamedSharding(mesh, spec) for spec in specs(layer, layout)]

    def compiled(conv: Callable[..., Array]) -> Any:
        def program(*operands: Array) -> Array:
            # Inside of a program arrays may be cut unevenly.
            laid = map(lax.with_sharding_constraint, operands, shardings)
            return layer.function(conv, direction)(*laid)

        return jax.jit(program).lower(*operands).compile()

    operands = layer.operands()
    by_lax, ours = map(compiled, (lax.conv_general_dilated, jaxconv.conv_general_dilated))
    expected = jax.jit(layer.function(lax.conv_general_dilated, direction))(*operands)
    off = difference(expected, ours(*operands))
    terms = math.prod(layer.spec.rhs_shape[:-1]) * math.prod(layer.spec.lhs_shape[:-1])
    rounding = float(jnp.finfo(layer.spec.dtype).eps)
    tolerance = 4 * (np.finfo(np.float32).eps * terms**0.5 + rounding)
    if not off <= tolerance:
        return f"off by {off:.1e}"
    return excess(ours, by_lax)


def problems() -> Iterator[str]:
    for layer in LAYERS:
        for layout in LAYOUTS:
            for direction in layer.directions:
                found = problem(layer, layout, direction)
                name = layer.name.removeprefix(": ")
                print(f"{name}; {layout}; {direction}; {found}", flush=True)
                yield found


if __name__ == "__main__":
    print(f"{len(list(problems()))} programs")
