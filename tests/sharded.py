"""What ``test_sharding`` runs in processes that have four devices: a part of the checks in each.

Prints a line for each check that fails, and "done".
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from cases import Case, case_of
from collectives import collectives, excess
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxconv
from jaxconv.transforms.primitive import planned_here

DEVICES = 4
# Batch and output channels divide by the devices.
CASES = {
    "3x3": case_of((8, 5, 6, 3), (3, 3, 3, 8), strides=(2, 1)),
    "3x3 stride 1": case_of((8, 5, 6, 3), (3, 3, 3, 8)),
    "1x1": case_of((8, 5, 6, 3), (1, 1, 3, 8), strides=(2, 2)),
    "transposed": case_of(
        (8, 4, 3, 3), (3, 3, 3, 8), padding=((1, 2), (2, 1)), lhs_dilation=(2, 2)
    ),
    "grouped": case_of((8, 5, 6, 4), (3, 3, 2, 8), feature_group_count=2),
    "large kernel": case_of((4, 10, 11, 1), (9, 9, 1, 4)),
}
# The first of those of "auto" and winograd are laid out in every way inside shard_map, where an
# algorithm can't tell how.
CASES_OF = {
    "auto": ("3x3", "transposed", "grouped", "large kernel"),
    "pointwise": ("1x1",),
    "phase": ("transposed",),
    "implicit": ("3x3", "large kernel"),
    "shift": ("3x3", "grouped", "large kernel"),
    "winograd": ("3x3 stride 1", "grouped"),
    "winograd4": ("3x3 stride 1", "grouped"),
}
# How the operands are laid over a mesh of 2×2 devices named a and b.
LAYOUTS = {
    "batch": (P(("a", "b")), P(), P(("a", "b"))),
    "outputs": (P(), P(None, None, None, ("a", "b")), P(None, None, None, ("a", "b"))),
    "batch and outputs": (P("a"), P(None, None, None, "b"), P("a", None, None, "b")),
}
LAYOUTS_UNDER_JIT = LAYOUTS | {
    "inputs": (P(None, None, None, "a"), P(None, None, "a")),
    "rows": (P(None, ("a", "b")), P()),
    "rows and columns": (P(None, "a", "b"), P()),
    "batch and rows": (P("b", "a"), P()),
    "different in both": (P("a"), P(None, None, None, "a")),
}
UNDER_JIT = (
    ("auto", "3x3", tuple(LAYOUTS_UNDER_JIT)),
    ("auto", "transposed", ("inputs", "rows", "batch and rows")),
    ("auto", "grouped", ("outputs", "rows and columns", "different in both")),
    ("auto", "large kernel", ("batch", "rows", "rows and columns")),
    ("winograd", "3x3 stride 1", ("batch", "rows")),
)
Conv = Callable[[Any, Any], Array]


def conv_by(case: Case, algorithm: str, **arguments: Any) -> Conv:
    arguments = case.arguments | arguments
    return partial(jaxconv.conv_general_dilated, **arguments, algorithm=algorithm)


def value_and_gradients(conv: Conv) -> Callable[[Any, Any], tuple[Array, Any]]:
    def loss(lhs: Array, rhs: Array) -> tuple[Array, Array]:
        out = conv(lhs, rhs)
        return jnp.sum(jnp.sin(out)), out

    def fun(lhs: Array, rhs: Array) -> tuple[Array, Any]:
        gradients, out = jax.grad(loss, (0, 1), has_aux=True)(lhs, rhs)
        return out, gradients

    return fun


@cache
def expected(name: str) -> Any:
    """What lax computes on one device, with gradients."""
    return jax.jit(value_and_gradients(CASES[name].lax))(*CASES[name].operands())


def assert_close(outs: Any, expected: Any) -> None:
    chex.assert_trees_all_close(outs, expected, rtol=1e-11, atol=1e-12)


def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))


def in_shard_map(layout: str, algorithm: str, name: str) -> None:
    """Gradients of what is replicated are summed over the devices by shard_map's types."""
    case = CASES[name]
    lhs_spec, rhs_spec, out_spec = LAYOUTS[layout]
    fun = jax.shard_map(
        value_and_gradients(conv_by(case, algorithm)),
        mesh=mesh(),
        in_specs=(lhs_spec, rhs_spec),
        out_specs=(out_spec, (lhs_spec, rhs_spec)),
    )
    assert_close(jax.jit(fun)(*case.operands()), expected(name))


def images_and_kernel() -> tuple[np.ndarray, np.ndarray]:
    lhs, rhs = CASES["3x3"].operands()
    return np.stack([lhs, -lhs, 2 * lhs]), rhs


def by_vmap_and_scan(conv: Conv, images: Array, rhs: Array) -> tuple[Array, Array]:
    batched = jax.vmap(conv, (0, None))(images, rhs)
    return batched, lax.scan(lambda _, x: (None, conv(x, rhs)), None, images)[1]


def in_shard_map_with_vmap_and_scan(algorithm: str) -> None:
    case, operands = CASES["3x3"], images_and_kernel()
    sharded = jax.shard_map(
        partial(by_vmap_and_scan, conv_by(case, algorithm)),
        mesh=mesh(),
        in_specs=(P(None, ("a", "b")), P()),
        out_specs=P(None, ("a", "b")),
    )
    expected = jax.jit(partial(by_vmap_and_scan, case.lax))(*operands)
    assert_close(jax.jit(sharded)(*operands), expected)


def kinds(text: str) -> Counter[str]:
    return Counter(kind for kind, _ in collectives(text))


def laid_out(conv: Conv, layout: str) -> Conv:
    """``conv`` of operands that it lays out first; also where the devices don't divide a size."""
    specs = LAYOUTS_UNDER_JIT[layout][:2]

    def fun(*operands: Any) -> Array:
        return conv(
            *(
                lax.with_sharding_constraint(x, NamedSharding(mesh(), spec))
                for x, spec in zip(operands, specs, strict=True)
            )
        )

    return fun


def under_jit(layout: str, algorithm: str, name: str) -> None:
    """Values, and that no more is moved than by lax's program."""
    case = CASES[name]
    operands = case.operands()
    funs = [
        jax.jit(value_and_gradients(laid_out(conv, layout)))
        for conv in (conv_by(case, algorithm), case.lax)
    ]
    by_us, by_lax = (fun.lower(*operands).compile() for fun in funs)
    assert_close(by_us(*operands), expected(name))
    assert not (more := excess(by_us, by_lax)), more


def under_vmap_and_scan(way: str) -> None:
    case, (images, rhs) = CASES["3x3"], images_and_kernel()
    ways = {"accelerate": jaxconv.accelerate(case.lax), "enabled": case.lax}
    subject = ways.get(way) or conv_by(case, "auto")

    def fun(conv: Conv, images: Array, rhs: Array) -> Array:
        batched, each = by_vmap_and_scan(conv, images, rhs)
        return jnp.sum(jnp.sin(batched) * each)

    placed = jax.device_put(images, NamedSharding(mesh(), P(None, ("a", "b"))))
    gradients = jax.jit(jax.grad(partial(fun, case.lax), (0, 1)))
    by_lax = gradients.lower(placed, rhs).compile()
    with jaxconv.enabled() if way == "enabled" else contextlib.nullcontext():
        compiled = jax.jit(jax.grad(partial(fun, subject), (0, 1))).lower(placed, rhs).compile()
    assert_close(compiled(placed, rhs), by_lax(placed, rhs))
    assert kinds(compiled.as_text()) <= kinds(by_lax.as_text())


def spatial_axes(image: Any, kernel: Any, names: Any, **arguments: Any) -> None:
    """Rows and columns cut inside shard_map: as the whole, by one exchange a side and axis."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(image), rng.standard_normal(kernel)
    spec, conv = P(None, *names), partial(jaxconv.conv, **arguments)
    cut = partial(conv, spatial_axes=names)
    cut = jax.shard_map(cut, mesh=mesh(), in_specs=(spec, P()), out_specs=spec)
    by_cut, whole = (jax.jit(value_and_gradients(fun)) for fun in (cut, conv))
    assert_close(by_cut(x, w), whole(x, w))
    moved = kinds(jax.jit(cut).lower(x, w).compile().as_text())
    sides = 2 * sum(name is not None for name in names)
    assert set(moved) <= {"collective-permute"}, moved
    assert sum(moved.values()) <= sides, moved


def in_explicit_mode(algorithm: str, out_sharding: bool) -> None:
    """Shardings that are part of the types: as lax has them, and no more is moved."""
    case = CASES["3x3"]
    lhs, rhs = case.operands()
    with jax.set_mesh(mesh(AxisType.Explicit)):
        placed = jax.device_put(lhs, P("a")), jax.device_put(rhs, P())
        arguments = {"out_sharding": P("a")} if out_sharding else {}
        convs = [
            conv_by(case, algorithm, **arguments),
            partial(lax.conv_general_dilated, **case.arguments, **arguments),
        ]
        for wrap in (lambda conv: conv, value_and_gradients):
            by_us, by_lax = (jax.jit(wrap(conv)).lower(*placed).compile() for conv in convs)
            outs, values = by_us(*placed), by_lax(*placed)
            types = [jax.tree.map(jax.typeof, tree) for tree in (outs, values)]
            assert types[0] == types[1], types
            assert_close(outs, values)
            assert kinds(by_us.as_text()) == kinds(by_lax.as_text())


def with_automatic_axes_beside_manual_ones() -> None:
    """XLA can't be told there, so that it gets its own convolution."""
    case = CASES["3x3"]
    fun = jax.shard_map(
        conv_by(case, "auto"),
        mesh=mesh(),
        in_specs=(P("a"), P()),
        out_specs=P("a"),
        axis_names={"a"},
    )
    lhs, rhs = case.operands()
    placed = jax.device_put(lhs, NamedSharding(mesh(), P(("a", "b"))))
    compiled = jax.jit(fun).lower(placed, rhs).compile()
    assert_close(compiled(placed, rhs), case.lax(lhs, rhs))
    assert not kinds(compiled.as_text())


def while_enabled() -> None:
    """In shard_map, and with shardings in types."""
    case = case_of((8, 6, 7, 4), (3, 3, 1, 4), feature_group_count=4)
    lhs, rhs = case.operands()
    specs: dict[str, Any] = {"in_specs": (P(("a", "b")), P()), "out_specs": P(("a", "b"))}
    fun = jax.jit(value_and_gradients(jax.shard_map(case.lax, mesh=mesh(), **specs)))
    values = jax.jit(value_and_gradients(case.lax))(lhs, rhs)
    with jaxconv.enabled():
        assert "stablehlo.convolution" not in fun.lower(lhs, rhs).as_text()
        assert_close(fun(lhs, rhs), values)
    assert "stablehlo.convolution" in fun.lower(lhs, rhs).as_text()
    with jax.set_mesh(mesh(AxisType.Explicit)), jaxconv.enabled():
        out = jax.jit(case.lax)(jax.device_put(lhs, P("a")), jax.device_put(rhs, P()))
        assert jax.typeof(out).sharding.spec[0] == "a"
        assert_close(np.asarray(out), np.asarray(values[0]))


def planned_for_a_part() -> None:
    """A device's part is planned, not the whole."""
    case = CASES["3x3 stride 1"]
    lhs, rhs = case.operands()
    placed = jax.device_put(lhs, NamedSharding(mesh(), P(("a", "b"))))
    jaxconv.accelerate(jax.jit(lambda x, w: case.lax(x, w)))(placed, rhs)
    shapes = {spec.lhs_shape for spec in planned_here("cpu")}
    assert (2, 5, 6, 3) in shapes, shapes


def explained() -> None:
    """Parts and exchanges of arrays on several devices."""
    case = CASES["3x3 stride 1"]
    lhs, rhs = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.operands())
    lhs = lhs.update(sharding=NamedSharding(mesh(), P(("a", "b"))))
    explanation = jaxconv.explain(value_and_gradients(case.lax), lhs, rhs)
    rows = {row.direction: row for row in explanation.rows}
    assert rows["forward"].spec.lhs_shape == (2, 5, 6, 3)
    assert rows["forward"].exchanged == rows["input gradient"].exchanged == ""
    assert rows["weight gradient"].exchanged == "sums of 4 devices"
    assert "sums of 4 devices" in str(explanation)
    image = jax.ShapeDtypeStruct((2, 16, 6, 3), "float64")
    image = image.update(sharding=NamedSharding(mesh(), P(None, "a")))
    (row,) = jaxconv.explain(jaxconv.conv, image, rhs).rows
    assert (row.spec.lhs_shape, row.exchanged) == ((2, 10, 6, 3), "borders 1 + 1 of axis 0")


def checks() -> Iterator[Any]:
    for algorithm in ("auto", *jaxconv.ALGORITHMS):
        cases = CASES_OF.get(algorithm, ("3x3",))
        yield from (partial(in_shard_map, "batch", algorithm, case) for case in cases)
        if algorithm in ("auto", "winograd"):
            for layout in ("outputs", "batch and outputs"):
                yield partial(in_shard_map, layout, algorithm, cases[0])
    for algorithm in ("auto", "im2col_tiled", "naive"):
        yield partial(in_shard_map_with_vmap_and_scan, algorithm)
    for algorithm, case, layouts in UNDER_JIT:
        yield from (partial(under_jit, layout, algorithm, case) for layout in layouts)
    for way in ("conv_general_dilated", "accelerate", "enabled"):
        yield partial(under_vmap_and_scan, way)
    shapes = (2, 16, 12, 3), (5, 3, 3, 4)
    yield partial(spatial_axes, *shapes, ("a", "b"))
    yield partial(spatial_axes, *shapes, ("b", None), strides=2)
    yield partial(spatial_axes, *shapes, (("a", "b"), None))
    yield partial(spatial_axes, *shapes, ("b", "a"), padding=((3, 1), (0, 2)))
    # A causal padding: from the left only, here from two neighbours.
    text = (2, 16, 3), (3, 3, 4), (("a", "b"),)
    yield partial(spatial_axes, *text, padding="CAUSAL", dilation=3)
    for algorithm in ("auto", "im2col"):
        yield from (partial(in_explicit_mode, algorithm, out) for out in (False, True))
    others = with_automatic_axes_beside_manual_ones, while_enabled, planned_for_a_part, explained
    yield from map(partial, others)


def main(part: int, parts: int) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)  # each program runs once
    assert len(jax.devices()) == DEVICES
    for check in islice(checks(), part, None, parts):
        try:
            check()
        except Exception as error:
            message = f"{type(error).__name__}: {error}".splitlines()
            name = f"{check.func.__name__}{check.args} {check.keywords}"
            print(f"{name}: {' '.join(message)[:800]}", flush=True)
    print("done")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
