"""A convolution in a program for several devices: cut into local ones before it is planned.

XLA's partitioner moves whole arrays where it meets the loops and slices that algorithms consist of.
So a convolution is a custom call first, about which the partitioner asks how its dimensions
correspond, and then, how the arrays lie being decided, what each device computes. That is a
convolution of what it holds, planned for its own shape:

* batch, output channels and groups: no communication;
* input channels, and what a kernel's gradient sums over: local sums, then one over the devices;
* spatial axes: each device receives a border from its neighbours first (``borders``).

Whatever is cut otherwise is moved by XLA before. ``jax.experimental.custom_partitioning`` refuses
programs with several meshes, and abstract ones, which lax's convolution does not.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxconv import compat
from jaxconv.sharding.borders import MeshLine, only_valid, sliced, window
from jaxconv.sharding.cuts import Cut, Dimensions, cut_of, dimensions
from jaxconv.spec import ConvSpec

Bind = Callable[..., Array]  # of a device's arrays, with its parameters and ``part_of``
PartOf = tuple[ConvSpec, str]  # the whole convolution, and what devices exchange, in words
TARGET = "jaxconv"
AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Devices(MeshLine):
    """Lines of devices of a program, along letters of a cut."""

    lines: Sequence[Sequence[int]]

    def index(self) -> Array:
        places = np.zeros(sum(map(len, self.lines)), np.int32)
        for line in self.lines:
            places[list(line)] = range(len(line))
        return jnp.asarray(places)[super().index()]

    def permuted(self, x: Array, pairs: Sequence[tuple[int, int]]) -> Array:
        moves = [(line[start], line[end]) for line in self.lines for start, end in pairs]
        return super().permuted(x, moves)

    def sum(self, x: Array) -> Array:
        return lax.psum(x, self.names, axis_index_groups=[list(line) for line in self.lines])


def local(found: Dimensions, cut: Cut, params: Mapping[str, Any], bind: Bind) -> Bind:
    """What a device computes from its parts of lhs and rhs."""
    padding = dict(enumerate(found.spec.padding)) | {d: a.padding for d, a in cut.axes.items()}
    changed = {**params, "padding": tuple(padding.values())}
    for name in ("feature_group_count", "batch_group_count"):
        changed[name] //= cut.parts("g") if params[name] > 1 else 1

    def along(*letters: str) -> Devices:
        return Devices((AXIS,), cut.lines(letters))

    def of_parts(*arrays: Array) -> Array:
        lhs, rhs = (
            only_valid(x, letters.index(("c",)), found.sizes["c"], cut.parts("c"), along("c"))
            if ("c",) in letters and "c" in cut.places
            else x
            for x, letters in zip(arrays, found.arrays[:2], strict=True)
        )
        for d, axis in cut.axes.items():
            lhs = window(lhs, found.spatial[d][0], axis, along(f"x{d}"))
            if found.sums(d):
                taps = found.spec.kernel_shape[d]
                rhs = only_valid(rhs, found.spatial[d][1], taps, axis.devices, along(f"x{d}"))
        out = bind(lhs, rhs, part_of=(found.spec, exchanged(found, cut)), **changed)
        for d, axis in cut.axes.items():
            if not found.sums(d):
                out = sliced(out, found.spatial[d][2], axis.surplus, axis.outputs, along(f"x{d}"))
        letters = summed(found, cut)
        return along(*letters).sum(out) if letters else out

    return of_parts


def summed(found: Dimensions, cut: Cut) -> list[str]:
    letters = ["c", *(f"x{d}" for d in cut.axes if found.sums(d))]
    return [letter for letter in letters if letter in cut.places]


def exchanged(found: Dimensions, cut: Cut) -> str:
    """What devices exchange, in words: "borders 1 + 1 of axis 0; sums of 8 devices"."""
    moved = {d: axis for d, axis in cut.axes.items() if axis.left or axis.right}
    parts = [f"borders {axis.left} + {axis.right} of axis {d}" for d, axis in moved.items()]
    devices = math.prod(map(cut.parts, summed(found, cut)))
    return "; ".join(parts + [f"sums of {devices} devices"] * (devices > 1))


@dataclasses.dataclass(frozen=True)
class _Call:
    """A convolution that XLA asks about, ``bind(…, **params)``."""

    dimensions: Dimensions
    params: Mapping[str, Any]
    bind: Bind
    devices: int
    platforms: Sequence[str]
    # A device's program by how the arrays lie, since many of a network's convolutions are equal.
    made: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def cut(self, *shardings: Any) -> tuple[Cut, list[Any]]:
        """How it is cut, and XLA's shardings for that, given those of lhs, rhs and output."""
        arrays = self.dimensions.arrays
        each = zip(arrays, shardings, strict=True)
        given = [compat.places(lie, len(letters), self.devices) for letters, lie in each]
        cut = cut_of(self.dimensions, given, self.devices)
        return cut, [compat.sharding_of([*map(cut.of_dimension, letters)]) for letters in arrays]


_calls: "weakref.WeakValueDictionary[bytes, _Call]" = weakref.WeakValueDictionary()


def _partition(
    shapes: Sequence[Any], shardings: Sequence[Any], _: Any, result: Any, key: bytes
) -> tuple[bytes, list[Any], Any]:
    """The program of a device, and how XLA must lay the arrays before and after it."""
    call = _calls[key]
    cut, lies = call.cut(*shardings, result)
    *operands, out = lies
    if (lying := str(lies)) not in call.made:
        tiles = [(lie.tile(shape), shape) for lie, shape in zip(operands, shapes, strict=True)]
        parts = [jax.ShapeDtypeStruct(t.dimensions(), shape.numpy_dtype()) for t, shape in tiles]
        function, axis = local(call.dimensions, cut, call.params, call.bind), (AXIS, call.devices)
        call.made[lying] = compat.module_of(function, parts, axis, call.platforms)
    return call.made[lying], operands, out


def _from_operands(_: Any, shardings: Sequence[Any], shape: Any, key: bytes) -> Any:
    """How the output lies, given the operands, for a partitioner that knows no rules."""
    return _calls[key].cut(*shardings, None)[1][2]


@lru_cache(maxsize=1)
def _registered() -> None:
    compat.register_partitioner(TARGET, lambda sharding, *_: sharding, _partition, _from_operands)


def partitioned(
    ctx: Any, lhs: Any, rhs: Any, params: Mapping[str, Any], bind: Bind, devices: int
) -> Any:
    """The lowering of ``bind(lhs, rhs, **params)`` of values in MLIR for several devices."""
    _registered()
    platforms = ctx.module_context.platforms
    found = dimensions(*ctx.avals_in, params=params)
    # JAX's cache on disk tells programs apart by it.
    shapes = [aval.str_short() for aval in ctx.avals_in]
    key = repr((shapes, sorted(params.items(), key=str), devices, platforms)).encode()
    call = _calls.setdefault(key, _Call(found, params, bind, devices, platforms))
    call.made.clear()  # another program is lowered anew, for those who observe it
    ctx.module_context.add_keepalive(call)
    sizes, axes = found.sizes, range(found.spec.spatial_ndim)
    arrays = [[[f for f in dim if sizes.get(f) != 1] or dim[:1] for dim in a] for a in found.arrays]
    texts = (" ".join(f[0] if len(f) == 1 else f"({' '.join(f)})" for f in a) for a in arrays)
    used = {f for array in arrays for letters in array for f in letters}
    whole = {letters[0] for array in arrays for letters in array if len(letters) == 1}
    kinds = {
        "reduction_factors": ["c", *(f"x{d}" for d in axes if found.sums(d))],
        "permutation_factors": [f"x{d}" for d in axes if not found.sums(d)],
        "need_replication_factors": [f"t{d}" for d in axes],
    }
    rule, factors = "{}, {} -> {}".format(*texts), {f: sizes[f] for f in used - whole}
    by_kind = {kind: tuple(f for f in given if f in used) for kind, given in kinds.items()}
    return compat.asking_call(ctx, TARGET, (lhs, rhs), key.decode(), rule, **factors, **by_kind)
