"""What ``test_sharding`` runs in a process that has four devices: a line for each check.

Prints "ok <check>", or "FAILED <check>: <error>"; the checks' names come from ``names``.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_compiled import case_of

import jaxconv

DEVICES = 4
# Batch and output channels divide by the devices.
CASES = {
    "3x3": case_of((8, 5, 6, 3), (3, 3, 3, 8), window_strides=(2, 1)),
    "3x3 stride 1": case_of((8, 5, 6, 3), (3, 3, 3, 8)),
    "1x1": case_of((8, 5, 6, 3), (1, 1, 3, 8), window_strides=(2, 2)),
    "transposed": case_of(
        (8, 4, 3, 3), (3, 3, 3, 8), padding=((1, 2), (2, 1)), lhs_dilation=(2, 2)
    ),
    "grouped": case_of((8, 5, 6, 4), (3, 3, 2, 8), feature_group_count=2),
    "large kernel": case_of((4, 10, 11, 1), (9, 9, 1, 4)),
}
# Nothing but the first of an algorithm's cases is laid out in every way.
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
Conv = Callable[[Any, Any], Array]


def conv_by(case: Case, algorithm: str, **arguments: Any) -> Conv:
    arguments = case.arguments | arguments
    return functools.partial(jaxconv.conv_general_dilated, **arguments, algorithm=algorithm)


def value_and_gradients(conv: Conv) -> Callable[[Any, Any], tuple[Array, Any]]:
    def loss(lhs: Array, rhs: Array) -> tuple[Array, Array]:
        out = conv(lhs, rhs)
        return jnp.sum(jnp.sin(out)), out

    def fun(lhs: Array, rhs: Array) -> tuple[Array, Any]:
        gradients, out = jax.grad(loss, (0, 1), has_aux=True)(lhs, rhs)
        return out, gradients

    return fun


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
    operands = case.operands()
    assert_close(jax.jit(fun)(*operands), value_and_gradients(case.lax)(*operands))


def in_shard_map_with_vmap_and_scan(algorithm: str) -> None:
    case = CASES["3x3"]
    lhs, rhs = case.operands()
    images = np.stack([lhs, -lhs, 2 * lhs])

    def fun(conv: Conv, images: Array, rhs: Array) -> tuple[Array, Array]:
        batched = jax.vmap(conv, (0, None))(images, rhs)
        return batched, lax.scan(lambda _, x: (None, conv(x, rhs)), None, images)[1]

    sharded = jax.shard_map(
        functools.partial(fun, conv_by(case, algorithm)),
        mesh=mesh(),
        in_specs=(P(None, ("a", "b")), P()),
        out_specs=P(None, ("a", "b")),
    )
    assert_close(jax.jit(sharded)(images, rhs), fun(case.lax, images, rhs))


def under_jit(layout: str, algorithm: str, name: str) -> None:
    case = CASES[name]
    operands = case.operands()
    specs = LAYOUTS[layout][:2]
    placed = [
        jax.device_put(x, NamedSharding(mesh(), spec))
        for x, spec in zip(operands, specs, strict=True)
    ]
    assert len({shard.device for shard in placed[0].addressable_shards}) == DEVICES
    fun = value_and_gradients(conv_by(case, algorithm))
    assert_close(jax.jit(fun)(*placed), value_and_gradients(case.lax)(*operands))


def in_explicit_mode(out_sharding: bool) -> None:
    """Shardings that are part of the types: lax's own convolution, and its sharding."""
    case = CASES["3x3"]
    lhs, rhs = case.operands()
    with jax.set_mesh(mesh(AxisType.Explicit)):
        placed = jax.device_put(lhs, P("a")), jax.device_put(rhs, P())
        arguments = {"out_sharding": P("a")} if out_sharding else {}
        for algorithm in ("auto", "xla"):
            out = jax.jit(conv_by(case, algorithm, **arguments))(*placed)
            by_lax = jax.jit(
                functools.partial(lax.conv_general_dilated, **case.arguments, **arguments)
            )(*placed)
            assert jax.typeof(out) == jax.typeof(by_lax), (jax.typeof(out), jax.typeof(by_lax))
            assert jax.typeof(out).sharding.spec[0] == "a"
            assert_close(out, case.lax(lhs, rhs))


def explicit_mode_refuses_a_name() -> None:
    case = CASES["3x3"]
    with jax.set_mesh(mesh(AxisType.Explicit)):
        lhs, rhs = (jax.device_put(x, P()) for x in case.operands())
        sharded = jax.device_put(lhs, P("a"))
        for args, arguments in (((sharded, rhs), {}), ((lhs, rhs), {"out_sharding": P("a")})):
            with pytest.raises(jaxconv.UnsupportedConvError, match=r"shardings in types.*'im2col'"):
                conv_by(case, "im2col", **arguments)(*args)


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for algorithm in ("auto", *jaxconv.ALGORITHMS):
        first, *others = CASES_OF.get(algorithm, ("3x3",))
        for layout, case in [*((key, first) for key in LAYOUTS), *(("batch", c) for c in others)]:
            check = functools.partial(in_shard_map, layout, algorithm, case)
            yield f"shard_map, {layout}: {algorithm}, {case}", check
    for algorithm in ("auto", "im2col_tiled", "naive"):
        check = functools.partial(in_shard_map_with_vmap_and_scan, algorithm)
        yield f"shard_map, vmap and scan: {algorithm}", check
    for layout in LAYOUTS:
        for algorithm, case in (("auto", "3x3"), ("auto", "transposed"), ("im2col", "3x3")):
            check = functools.partial(under_jit, layout, algorithm, case)
            yield f"NamedSharding, {layout}: {algorithm}, {case}", check
    yield "explicit mode: typed operands", functools.partial(in_explicit_mode, False)
    yield "explicit mode: out_sharding", functools.partial(in_explicit_mode, True)
    yield "explicit mode: a named algorithm is refused", explicit_mode_refuses_a_name


def names() -> list[str]:
    return [name for name, _ in checks()]


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)  # each program runs once
    assert len(jax.devices()) == DEVICES
    for name, check in checks():
        try:
            check()
            print(f"ok {name}", flush=True)
        except Exception as error:
            message = f"{type(error).__name__}: {error}".splitlines()
            print(f"FAILED {name}: {' '.join(message)[:800]}", flush=True)


if __name__ == "__main__":
    main()
