"""``explain``: the convolutions of a function, forward and backward, with where they come from."""

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from test_plan import struct

import jaxconv
from jaxconv import ALGORITHMS
from jaxconv.compat import conv_general_dilated_p
from jaxconv.planning.plan import plan_spec
from jaxconv.tools.explain import CAUTION, UNKNOWN, WITHIN, Compiled, Explanation
from jaxconv.transforms.primitive import conv_p, observers

explain = partial(jaxconv.explain, platform="cpu")

X, W = struct(1, 4, 8, 8), struct(4, 4, 3, 3)
BOTH = (0, 1)


def conv(x: Any, w: Any) -> Array:
    return lax.conv(x, w, (1, 1), "SAME")


def loss(x: Any, w: Any, conv: Callable[..., Array] = conv) -> Array:
    return jnp.sum(jnp.tanh(conv(x, w)))


def directions(explanation: Explanation) -> Counter[str]:
    counts = Counter[str]()
    for row in explanation.rows:
        counts[row.direction] += row.count
    return counts


def line(function: Callable[..., Any], text: str) -> int:
    """The number of the first line of ``function`` that has ``text``."""
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, found in enumerate(lines) if text in found)


# Directions

CONVOLUTIONS = {
    "1-D": ((2, 4, 9), (6, 4, 3), {}),
    "2-D": ((2, 4, 9, 8), (6, 4, 3, 3), {}),
    "3-D": ((2, 4, 5, 6, 7), (6, 4, 3, 3, 3), {}),
    "0-D": ((2, 4), (6, 4), {}),
    "1×1": ((2, 4, 9, 8), (6, 4, 1, 1), {}),
    "strided": ((2, 4, 9, 8), (6, 4, 3, 3), {"window_strides": (2, 2)}),
    "dilated": ((2, 4, 9, 8), (6, 4, 3, 3), {"rhs_dilation": (2, 2)}),
    "transposed": ((2, 4, 9, 8), (6, 4, 3, 3), {"lhs_dilation": (2, 2)}),
    "depthwise": ((2, 4, 9, 8), (8, 1, 3, 3), {"feature_group_count": 4}),
    "grouped": ((2, 4, 9, 8), (6, 2, 3, 3), {"feature_group_count": 2}),
    "batch groups": ((4, 4, 9, 8), (6, 4, 3, 3), {"batch_group_count": 2}),
    "one image, one channel": ((1, 1, 9, 8), (1, 1, 3, 3), {}),
}
ONCE = {"forward": 1, "input gradient": 1, "weight gradient": 1}
Function = Callable[..., Any]


gradients = partial(jax.value_and_grad, argnums=BOTH)


def in_scan(f: Function) -> Function:
    return lambda x, w: lax.map(lambda x: f(x, w), jnp.stack([x] * 3)).sum()


def of_three(f: Function, axes: Any = 0) -> Function:
    return lambda x, w: jax.vmap(f, axes)(jnp.stack([x] * 3), w if axes else jnp.stack([w] * 3))


TRANSFORMED: dict[str, tuple[Callable[[Function], Function], dict[str, int]]] = {
    "grad": (gradients, ONCE),
    "jit(grad)": (lambda f: jax.jit(gradients(f)), ONCE),
    "grad(jit)": (lambda f: gradients(jax.jit(f)), ONCE),
    "accelerate(grad)": (lambda f: jaxconv.accelerate(gradients(f)), ONCE),
    "grad(accelerate)": (lambda f: gradients(jaxconv.accelerate(f)), ONCE),
    "grad(checkpoint)": (lambda f: gradients(jax.checkpoint(f)), {**ONCE, "recomputed": 1}),
    "grad(scan)": (lambda f: gradients(in_scan(f)), dict.fromkeys(ONCE, 3)),
    "vmap(grad)": (lambda f: of_three(gradients(f)), ONCE),
    "grad(vmap)": (lambda f: gradients(lambda *a: of_three(f, (0, None))(*a).sum()), ONCE),
}


@pytest.mark.parametrize("transformed", TRANSFORMED)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_directions(name: str, last: bool, transformed: str) -> None:
    lhs, rhs, arguments = CONVOLUTIONS[name]
    ndim, letters = len(lhs) - 2, "DHW"[: len(lhs) - 2]
    numbers = (f"NC{letters}", f"OI{letters}", f"NC{letters}")
    if last:
        lhs, rhs = (lhs[0], *lhs[2:], lhs[1]), (*rhs[2:], rhs[1], rhs[0])
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    arguments = {"window_strides": (1,) * ndim, "padding": ((1, 1),) * ndim} | arguments
    convolve = partial(lax.conv_general_dilated, **arguments, dimension_numbers=numbers)
    transform, expected = TRANSFORMED[transformed]
    found = explain(transform(partial(loss, conv=convolve)), struct(*lhs), struct(*rhs))
    assert directions(found) == expected
    assert {row.where.rpartition(" ")[2] for row in found.rows} == {"(loss)"}


def test_flips_beside_a_convolution_are_told_from_an_input_gradient() -> None:
    def flipped(x: Any, w: Any) -> Array:
        return jnp.flip(conv(x, jnp.flip(w, (2, 3))), (2, 3))

    found = explain(gradients(partial(loss, conv=flipped)), X, W)
    assert directions(found) == ONCE


def test_a_backward_rule_of_the_users_own() -> None:
    """Its convolutions look like forward ones, and are not."""

    @jax.custom_vjp
    def layer(x: Any, w: Any) -> Array:
        return conv(x, w)

    layer.defvjp(
        lambda x, w: (conv(x, w), (x, w)),
        lambda saved, g: (conv(g, saved[1]), saved[1] * conv(*saved).sum()),
    )
    found = explain(jax.grad(partial(loss, conv=layer), BOTH), X, W)
    assert directions(found) == {"forward": 1, "backward": 2}


def test_second_derivatives_have_backward_convolutions() -> None:
    def penalty(x: Any, w: Any) -> Array:
        return jnp.sum(jax.grad(loss)(x, w) ** 2)

    found = directions(explain(jax.grad(penalty, 1), X, W))
    assert found["forward"] == 1
    assert found["weight gradient"] >= 2
    assert set(found) <= {"forward", "input gradient", "weight gradient", "backward"}


# Where


def test_where_is_the_users_line() -> None:
    def network(x: Any, w: Any) -> Array:
        x = jaxconv.conv_general_dilated(x, w, (1, 1), "SAME")  # first
        return conv(x, w)

    found = explain(jax.grad(lambda x, w: jnp.sum(jnp.sin(network(x, w))), BOTH), X, W)
    path = Path(__file__)
    name = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name
    first = f"{name}:{line(network, 'first')} ({network.__name__})"
    second = f"{name}:{line(conv, 'lax.conv')} (conv)"
    assert [(row.where, row.direction) for row in found.rows] == [
        (first, "forward"),
        (second, "forward"),
        (second, "weight gradient"),
        (second, "input gradient"),
        (first, "weight gradient"),
        (first, "input gradient"),
    ]


def test_derivatives_of_equal_convolutions_keep_their_lines() -> None:
    def one(x: Any, w: Any) -> Array:
        return jaxconv.conv_general_dilated(x, w, (1, 1), "SAME")

    for layer in (one, conv):
        found = explain(gradients(partial(loss, conv=layer)), X, W)
        assert {row.where.rpartition(" ")[2] for row in found.rows} == {f"({layer.__name__})"}


def library(path: str) -> Callable[..., Array]:
    """A function of a file that lies in ``path``."""
    namespace: dict[str, Any] = {"conv": partial(lax.conv, window_strides=(1, 1), padding="SAME")}
    exec(compile("def layer(x, w):\n    return conv(x, w)", path, "exec"), namespace)
    return namespace["layer"]


def test_where_is_not_in_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = library("/env/lib/site-packages/library/layers.py")

    def network(x: Any, w: Any) -> Array:
        return layer(x, w)

    (row,) = explain(network, X, W).rows
    assert row.where.endswith(f":{line(network, 'layer(')} ({network.__name__})")
    # Of a file outside the folder the name alone.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (outside,) = explain(library(str(tmp_path / "layers.py")), X, W).rows
    assert outside.where == "layers.py:2 (layer)"
    (inside,) = explain(library(str(tmp_path / "here" / "nets" / "layers.py")), X, W).rows
    assert Path(inside.where) == Path("nets") / "layers.py:2 (layer)"


# Counts


def in_a_scan(x: Any, w: Any) -> Array:
    def steps(x: Array, _: Any) -> tuple[Array, None]:
        return lax.fori_loop(0, 5, lambda _, x: conv(x, w), x), None

    return lax.scan(steps, x, None, length=7)[0]


def in_a_while_loop(x: Any, w: Any) -> Array:
    return lax.while_loop(lambda x: x.sum() < 1, lambda x: conv(conv(x, w), w), x)


def in_both_branches(x: Any, w: Any) -> Array:
    return lax.cond(x.sum() < 1, conv, lambda x, w: conv(conv(x, w), w), x, w)


@pytest.mark.parametrize(
    ("network", "count", "within"),
    [(in_a_scan, 35, ""), (in_a_while_loop, 2, "while"), (in_both_branches, 3, "cond")],
)
def test_counts_in_loops_and_branches(network: Function, count: int, within: str) -> None:
    """Of each step of a scan, one iteration of a ``while_loop``, all branches of a ``cond``."""
    found = explain(network, X, W)
    assert ({row.within for row in found.rows}, found.count) == ({within}, count)
    assert found.table().endswith(WITHIN) == bool(within)
    assert f"{found.rows[0].count} {within}".strip() in str(found)


def test_shapes_in_shard_map_are_those_on_a_device() -> None:
    mesh = AbstractMesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        conv, mesh=mesh, in_specs=(P("devices"), P()), out_specs=P("devices"), check_vma=False
    )
    (row,) = explain(sharded, struct(8, 4, 6, 6), W).rows
    assert row.spec.lhs_shape == (2, 6, 6, 4)


def test_what_nothing_uses_is_left_out() -> None:
    def network(x: Any, w: Any) -> Array:
        conv(x, w)
        return jax.jit(lambda x: (conv(x, w), x))(x)[1]

    assert explain(network, X, W).rows == ()


# What is planned


def test_rows_agree_with_plan() -> None:
    found = explain(jax.grad(loss, BOTH), X, W)
    assert len(found.rows) == 3
    for row in found.rows:
        plan = plan_spec(row.spec, "cpu")
        assert row.plan == plan
        costs = {candidate.name: candidate for candidate in plan.candidates}
        assert (row.algorithm, row.why) == (plan.algorithm, plan.why)
        assert row.seconds == costs[plan.algorithm].seconds
        assert row.workspace == costs[plan.algorithm].workspace
        assert row.lax_seconds == costs["xla"].seconds


def test_totals() -> None:
    def network(x: Any, w: Any) -> Array:
        for _ in range(3):
            x = conv(x, w)
        x = jaxconv.conv_general_dilated(x, w, (2, 2), "SAME", algorithm="im2col")
        return conv(x, w[:, :, :1])  # by the same line as the first

    found = explain(network, X, W)
    counts = [row.count for row in found.rows]
    assert (counts, found.count) == ([3, 1, 1], 5)
    assert found.seconds == sum(row.count * (row.seconds or 0) for row in found.rows)
    assert found.lax_seconds == sum(row.count * (row.lax_seconds or 0) for row in found.rows)
    assert found.workspace == max(row.workspace for row in found.rows) > 0


def test_times_that_nobody_measured_are_not_shown() -> None:
    (row,) = explain(conv, X, W).rows
    unknown = dataclasses.replace(row, seconds=None, sigma=None, lax_seconds=None)
    nothing = Explanation("gpu", (unknown,))
    assert nothing.seconds is nothing.lax_seconds is None
    above, head, *lines = nothing.table().splitlines()
    assert above == f"Planned for gpu. {UNKNOWN}"
    assert head.split() == ["where", "direction", "algorithm", "count", "workspace", "convolution"]
    assert not any(" ms " in line for line in lines)
    half = Explanation("gpu", (row, unknown))
    assert half.seconds is None
    _, _, first, second, total = half.table().splitlines()
    assert "–" not in first
    assert second.count("–") == 4
    assert total.count("–") == 3


def test_what_is_no_call_is_refused() -> None:
    with pytest.raises(TypeError, match=r"conv\(\) missing 2 required positional arguments"):
        explain(conv)
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        explain(conv, X, W, y=1)


@pytest.mark.parametrize("algorithm", ["im2col", "xla"])
def test_algorithms_by_name_are_kept(algorithm: str) -> None:
    accelerated = jaxconv.accelerate(jax.grad(loss, BOTH), algorithm=algorithm)
    found = explain(accelerated, X, W)
    assert {row.algorithm for row in found.rows} == {algorithm}
    assert {row.why for row in found.rows} == {"it was asked for by name"}


def test_platform() -> None:
    assert jaxconv.explain(conv, X, W).platform == jax.default_backend()
    found = explain(conv, X, W, platform="tpu")
    assert (found.platform, found.rows[0].algorithm) == ("tpu", "xla")


def test_shardings_in_types() -> None:
    mesh = AbstractMesh((2,), ("devices",), axis_types=(AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, P("devices"))
    blur = struct(4, 1, 3, 3)
    depthwise = partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", feature_group_count=4
    )
    with jax.sharding.use_abstract_mesh(mesh):
        x = jax.ShapeDtypeStruct((2, 4, 8, 8), "float32", sharding=sharding)
        (row,) = explain(depthwise, x, blur).rows
    (plain,) = explain(depthwise, struct(2, 4, 8, 8), blur).rows
    assert (row.algorithm, row.why) == (plain.algorithm, plain.why)


# Arguments


def test_arguments_that_are_no_arrays_reach_the_function_as_they_are() -> None:
    @partial(jax.jit, static_argnames=("strides", "padding"))
    def network(params: Any, x: Any, strides: int, *, padding: str, train: bool = False) -> Any:
        return {"out": lax.conv(x, params["w"], (strides,) * 2, padding), "train": train}

    params = {"w": np.zeros((4, 4, 3, 3), np.float32), "activation": None}
    found = explain(network, params, X, 2, padding="VALID", train=True)
    (row,) = found.rows
    assert row.spec.window_strides == (2, 2)
    assert row.spec.padding == ((0, 0), (0, 0))

    def eager(x: Any, w: Any, activation: Callable[..., Any], name: str) -> tuple[Any, str]:
        return activation(conv(x, w)) if name else x, name

    assert explain(eager, jnp.zeros(X.shape), jnp.zeros(W.shape), jnp.tanh, "net").count == 1


def test_nothing_is_run() -> None:
    def network(x: Any, w: Any) -> Array:
        jax.debug.callback(lambda: pytest.fail("it ran"))
        return conv(x, w)

    assert explain(network, struct(1 << 20, 4, 1 << 18, 1 << 18), W).count == 1


def test_the_function_stays_what_it_is() -> None:
    before = str(jax.make_jaxpr(loss)(X, W))
    explain(jax.jit(loss), X, W)
    assert str(jax.make_jaxpr(loss)(X, W)) == before
    assert conv_general_dilated_p.name in before
    assert conv_p.name not in before


# How it prints


def test_str_is_a_table() -> None:
    found = explain(jax.grad(loss, BOTH), X, W)
    assert hash(found) == hash(explain(jax.grad(loss, BOTH), X, W))
    above, head, *lines, total = found.table().splitlines()
    assert above == f"Planned for cpu. {CAUTION}"
    assert head.split()[:4] == ["where", "direction", "algorithm", "count"]
    for row, text in zip(found.rows, lines, strict=True):
        assert text.startswith(f"{row.where}  {row.direction} ")
        assert text.endswith(f"  {row.spec}")
        assert f"  {row.algorithm}  " in text
    assert total.split()[:2] == ["all", "3"]
    assert found._repr_html_().count("bold") == 1


def test_a_function_without_convolutions() -> None:
    found = explain(jnp.sin, X)
    assert (found.count, found.seconds, found.workspace) == (0, 0, 0)
    assert str(found) == "There is no convolution in this function."
    assert found._repr_html_() == "<p>There is no convolution in this function.</p>"
    empty = explain(conv, struct(0, 4, 8, 8), W)
    assert empty.rows[0].algorithm in ALGORITHMS
    assert "0.000 ms" in str(empty)


# What is compiled


def test_compiled_convolutions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    compiled = Compiled()
    assert str(compiled) == "No convolution was compiled."

    def program(x: Any, w: Any) -> Array:
        x = jaxconv.conv_general_dilated(conv(x, w), w, (1, 1), "SAME")
        return jaxconv.conv_general_dilated(x, w, (2, 2), "SAME", algorithm="im2col")

    platform = jax.default_backend()
    observers.append(compiled)
    try:
        with jaxconv.enabled(platform):
            jax.jit(conv).lower(X, W)
            jax.jit(program).lower(X, W)
    finally:
        observers.remove(compiled)
    jax.jit(lambda x, w: conv(x, w)).lower(X, W)
    above, head, *lines = str(compiled).splitlines()
    assert above == f"Compiled for {platform}. {CAUTION}"
    assert head.split()[:3] == ["where", "algorithm", "count"]
    expected = jaxconv.explain(program, X, W).rows
    # Equal ones are lowered apart where another convolution made the image.
    for text, row, count in zip(lines, (expected[0], expected[2]), (3, 1), strict=True):
        assert text.startswith(row.where)
        assert text.removeprefix(row.where).split()[:2] == [row.algorithm, str(count)]
        assert text.endswith(f"  {row.spec}")
