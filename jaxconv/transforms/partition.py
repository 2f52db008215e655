"""A convolution in a program for several devices: cut into local ones before it is planned.

XLA's partitioner moves whole arrays where it meets the loops and slices that algorithms consist of.
So in such a program a convolution is a custom call first, about which the partitioner asks how its
dimensions correspond, and then, how the arrays lie on the devices being decided, what each device
computes. That is a convolution of what it holds, planned for its own shape:

* batch, output channels and groups: nothing moves;
* input channels, and what a kernel's gradient sums over: local sums, then one over the devices;
* spatial axes: each device gets a border from its neighbours first (``borders``).

Whatever is cut otherwise is moved by XLA before.

``jax.experimental.custom_partitioning`` does the same for functions. It refuses programs with
several meshes, and abstract ones, which lax's convolution does not.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import compat
from jaxconv.spec import ConvSpec
from jaxconv.transforms.borders import only_valid, own_outputs, window
from jaxconv.transforms.cuts import Cut, Dimensions, cut_of, dimensions

Bind = Callable[..., Array]
TARGET = "jaxconv"
AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Devices:
    """Lines of devices of a program, along letters of a cut (see ``borders.Line``)."""

    lines: Sequence[Sequence[int]]

    def index(self) -> Array:
        places = np.zeros(sum(map(len, self.lines)), np.int32)
        for line in self.lines:
            places[list(line)] = range(len(line))
        return jnp.asarray(places)[lax.axis_index(AXIS)]

    def permuted(self, x: Array, pairs: Sequence[tuple[int, int]]) -> Array:
        moves = [(line[start], line[end]) for line in self.lines for start, end in pairs]
        return lax.ppermute(x, AXIS, moves)

    def sum(self, x: Array) -> Array:
        return lax.psum(x, AXIS, axis_index_groups=[list(line) for line in self.lines])


# Called with each convolution that is cut, a device's part, and what devices exchange.
observers: list[Callable[[ConvSpec, ConvSpec, str], None]] = []


def local(
    found: Dimensions,
    cut: Cut,
    params: Mapping[str, Any],
    bind: Bind,
    seen: Callable[[ConvSpec], None],
) -> Bind:
    """What a device computes from its parts of lhs and rhs.

    Args:
      seen: called with the convolution that it comes to.
    """
    spec, groups = found.spec, cut.parts("g")
    padding = list(spec.padding)
    for d, axis in cut.axes.items():
        padding[d] = axis.padding
    counts = {name: params[name] for name in ("feature_group_count", "batch_group_count")}
    counts = {name: count // groups if count > 1 else count for name, count in counts.items()}
    changed = {**params, **counts, "padding": tuple(padding)}

    def of_parts(lhs: Array, rhs: Array) -> Array:
        arrays = [lhs, rhs]
        for i, letters in enumerate(found.arrays[:2]):
            if ("c",) in letters and "c" in cut.places:
                line = Devices(cut.lines("c"))
                axis = letters.index(("c",))
                arrays[i] = only_valid(arrays[i], axis, found.sizes["c"], cut.parts("c"), line)
        lhs, rhs = arrays
        for d, axis in cut.axes.items():
            line = Devices(cut.lines([f"x{d}"]))
            lhs = window(lhs, found.spatial[d][0], axis, line)
            if found.sums(d):
                taps = spec.kernel_shape[d]
                rhs = only_valid(rhs, found.spatial[d][1], taps, axis.devices, line)
        seen(ConvSpec.from_params(lhs, rhs, changed))
        out = bind(lhs, rhs, **changed)
        for d, axis in cut.axes.items():
            if not found.sums(d):
                line = Devices(cut.lines([f"x{d}"]))
                out = own_outputs(out, found.spatial[d][2], axis, line)
        along = summed(found, cut)
        return Devices(cut.lines(along)).sum(out) if along else out

    return of_parts


def summed(found: Dimensions, cut: Cut) -> list[str]:
    """The letters over whose parts is summed."""
    letters = ["c", *(f"x{d}" for d in cut.axes if found.sums(d))]
    return [letter for letter in letters if letter in cut.places]


def exchanged(found: Dimensions, cut: Cut) -> str:
    """What devices exchange, in words: "borders 1 + 1 of axis 0; sums of 8 devices"."""
    borders = [
        f"borders {axis.left} + {axis.right} of axis {d}"
        for d, axis in cut.axes.items()
        if axis.left or axis.right
    ]
    devices = math.prod(map(cut.parts, summed(found, cut)))
    return "; ".join([*borders, f"sums of {devices} devices"] if devices > 1 else borders)


# What XLA asks


@dataclasses.dataclass(frozen=True)
class _Call:
    """A convolution that XLA asks about, ``bind(…, **params)``."""

    dimensions: Dimensions
    params: Mapping[str, Any]
    bind: Bind
    devices: int
    platforms: Sequence[str]
    # A device's program and convolution by how the arrays lie: ResNet-50's training step has 158
    # convolutions, of which 68 differ.
    made: dict[str, tuple[bytes, ConvSpec]] = dataclasses.field(default_factory=dict)

    def cut(self, shardings: Sequence[Any]) -> Cut:
        """Args: shardings: XLA's, of lhs, rhs and output."""
        arrays = self.dimensions.arrays
        given = [
            compat.places(sharding, len(letters), self.devices)
            for letters, sharding in zip(arrays, shardings, strict=True)
        ]
        return cut_of(self.dimensions, given, self.devices)

    def shardings(self, cut: Cut) -> list[Any]:
        """XLA's, of lhs, rhs and output."""
        return [
            compat.sharding_of([cut.of_dimension(dim) for dim in letters])
            for letters in self.dimensions.arrays
        ]


_calls: "weakref.WeakValueDictionary[bytes, _Call]" = weakref.WeakValueDictionary()


def _partition(
    shapes: Sequence[Any], shardings: Sequence[Any], _: Any, result: Any, key: bytes
) -> tuple[bytes, list[Any], Any]:
    """The program of a device, and how XLA must lay the arrays before and after it."""
    call = _calls[key]
    found, cut = call.dimensions, call.cut([*shardings, result])
    *operands, out = call.shardings(cut)
    lies = str([*operands, out])
    if lies not in call.made:
        local_shapes = [
            jax.ShapeDtypeStruct(sharding.tile(shape).dimensions(), shape.numpy_dtype())
            for sharding, shape in zip(operands, shapes, strict=True)
        ]
        parts: list[ConvSpec] = []
        function = local(found, cut, call.params, call.bind, parts.append)
        axis = AXIS, call.devices
        module = compat.module_of(function, local_shapes, axis, call.platforms)
        call.made[lies] = module, parts[0]
    module, part = call.made[lies]
    for observe in observers:
        observe(found.spec, part, exchanged(found, cut))
    return module, operands, out


def _from_operands(_: Any, shardings: Sequence[Any], shape: Any, key: bytes) -> Any:
    """How the output lies, given the operands, for a partitioner that knows no rules."""
    call = _calls[key]
    return call.shardings(call.cut([*shardings, None]))[2]


def _from_user(sharding: Any, shape: Any, key: bytes) -> Any:
    return sharding


compat.register_partitioner(TARGET, _from_user, _partition, _from_operands)


def partitioned(
    ctx: Any, lhs: Any, rhs: Any, params: Mapping[str, Any], bind: Bind, devices: int
) -> Any:
    """The lowering of ``bind(lhs, rhs, **params)`` in a program for several devices.

    Args:
      lhs, rhs: values in MLIR.
    """
    avals, platforms = ctx.avals_in, ctx.module_context.platforms
    lhs_aval, rhs_aval = avals
    call = _Call(dimensions(lhs_aval, rhs_aval, params), params, bind, devices, platforms)
    # JAX's cache on disk tells programs apart by it.
    shapes = [aval.str_short() for aval in avals]
    key = repr((shapes, sorted(params.items(), key=str), devices, platforms)).encode()
    call = _calls.setdefault(key, call)
    ctx.module_context.add_keepalive(call)
    found = call.dimensions
    axes = range(found.spec.spatial_ndim)
    kinds = {
        "reduction_factors": ["c", *(f"x{d}" for d in axes if found.sums(d))],
        "permutation_factors": [f"x{d}" for d in axes if not found.sums(d)],
        "need_replication_factors": [f"t{d}" for d in axes],
    }
    arrays = [
        [tuple(f for f in letters if found.sizes.get(f) != 1) or letters[:1] for letters in array]
        for array in found.arrays
    ]
    return compat.custom_call(ctx, TARGET, (lhs, rhs), key.decode(), arrays, found.sizes, kinds)
