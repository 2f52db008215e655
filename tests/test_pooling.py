"""Poolings: lax's values by each algorithm, through every transformation, and how they are told.

The two oracles of a random pooling, which its seed names, are lax and a loop in NumPy.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import children
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from carriers import traced
from flax import linen as nn
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_explain import line

import jaxconv
from jaxconv.pooling.choose import choose, run
from jaxconv.pooling.spec import KINDS, Pooling
from jaxconv.spec import Axis
from jaxconv.tools.explain import Compiled
from jaxconv.transforms.primitive import observers

FLOATS = ("float32", "float64", "bfloat16", "float16")
DTYPES = {
    "max": (*FLOATS, "int8", "uint8", "int32", "bool"),
    "min": (*FLOATS, "int8", "uint8", "int32", "bool"),
    "sum": (*FLOATS, "int8", "int32", "complex64"),
}
MOST_VISITS = 6_000  # of elements by the loop


# ---- random poolings, and what they give by a loop ----


@dataclasses.dataclass(frozen=True)
class Sample:
    pooling: Pooling
    params: dict[str, Any]
    operands: tuple[np.ndarray, ...]
    ordinary: bool  # no NaN

    def by_lax(self, *operands: Any) -> Array:
        names = {"gradient": "select_and_scatter_add", "tangent": "select_and_gather_add"}
        name = names.get(self.pooling.direction, f"reduce_window_{self.pooling.kind}")
        return getattr(lax, f"{name}_p").bind(*operands, **self.params)


def drawn(rng: np.random.Generator) -> Pooling:
    """Any axes, often large windows, negative padding and holes where lax takes them."""
    ndim = int(rng.integers(1, 5))
    direction = str(rng.choice(["forward", "gradient", "tangent"]))
    kind = str(rng.choice(["max", "min", "sum"] if direction == "forward" else ["max", "min"]))
    dtype = str(rng.choice(DTYPES[kind] if direction == "forward" else FLOATS))
    large, holes = rng.random() < 0.3, direction != "gradient" and rng.random() < 0.3
    axes = []
    for _ in range(ndim):
        size, taps = int(rng.integers(1, 12)), int(rng.integers(1, 14 if large else 4))
        stride, least = int(rng.integers(1, 5)), -1 if direction == "forward" else 0
        low, high = (int(p) for p in rng.integers(least, 5, 2))
        spacing, dilation = (int(d) for d in rng.integers(1, 3 if holes else 2, 2))
        axes.append(Axis(size, taps, stride, low, high, spacing, dilation))
    axes = tuple(a._replace(taps=min(a.taps, (a.padded - 1) // a.dilation + 1)) for a in axes)
    pooling = Pooling(kind, direction, tuple(a.size for a in axes), np.dtype(dtype), axes)
    fits = all(a.taps > 0 for a in axes)
    few = fits and math.prod(pooling.out_shape) * pooling.taps <= MOST_VISITS
    return pooling if few else drawn(rng)


def sample(seed: int) -> Sample:
    """Three in four are of small integers, with many ties, the others of normal numbers."""
    rng = np.random.default_rng(seed)
    pooling = drawn(rng)
    dtype, is_float = pooling.dtype, pooling.dtype.name in FLOATS
    of_integers = rng.random() < 0.75 or not is_float

    def values(shape: tuple[int, ...], whole: bool) -> np.ndarray:
        x = rng.integers(-3, 4, shape) if whole else 3 * rng.standard_normal(shape)
        if dtype.name == "complex64":
            return (x + 1j * rng.standard_normal(shape)).astype(dtype)
        low = 0 if dtype.name in ("bool", "uint8") else -3
        return np.maximum(x, low).astype(dtype)

    x, ordinary = values(pooling.shape, of_integers), True
    if is_float:
        x[rng.random(x.shape) < 0.05] = -0.0
    if is_float and rng.random() < 0.3:
        x[rng.random(x.shape) < 0.1] = np.inf
        x[rng.random(x.shape) < 0.1] = -np.inf if pooling.kind != "sum" else np.inf
        if rng.random() < 0.7:
            ordinary = False
            x[rng.random(x.shape) < 0.1] = np.nan
    if pooling.direction == "tangent" and not ordinary:
        x[x == pooling.identity] = 0  # see ``select``
    fields = {"window_dimensions": "taps", "window_strides": "stride"}
    if pooling.direction != "gradient":
        fields |= {"base_dilation": "spacing", "window_dilation": "dilation"}
    params: dict[str, Any] = {
        name: tuple(getattr(axis, field) for axis in pooling.axes) for name, field in fields.items()
    }
    params["padding"] = tuple((axis.low, axis.high) for axis in pooling.axes)
    if pooling.direction == "forward":
        return Sample(pooling, params, (x,), ordinary)
    params["select_prim"] = lax.ge_p if pooling.kind == "max" else lax.le_p
    shape = pooling.out_shape if pooling.direction == "gradient" else pooling.shape
    return Sample(pooling, params, (values(shape, of_integers), x), ordinary)


Place = tuple[int, ...]


def windows(axes: tuple[Axis, ...]) -> Iterator[tuple[Place, list[Place | None]]]:
    """Each window's place in the output, and its elements' in row-major order; None for padding."""

    def along(axis: Axis, window: int) -> list[int | None]:
        first = window * axis.stride - axis.low
        places = (divmod(first + t * axis.dilation, axis.spacing) for t in range(axis.taps))
        return [n if rest == 0 and 0 <= n < axis.size else None for n, rest in places]

    for window in np.ndindex(*(axis.out for axis in axes)):
        each = itertools.product(*map(along, axes, window))
        yield window, [None if None in place else place for place in each]  # pyright: ignore


def by_loop(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The result, how many terms each of its elements has, and the sum of their magnitudes."""
    pooling, (*others, x) = sample.pooling, sample.operands
    wide = {"c": np.complex128, "f": np.float64, "V": np.float64}.get(x.dtype.kind, x.dtype)
    shape = pooling.shape if pooling.direction == "gradient" else pooling.out_shape
    out, terms, size = np.zeros(shape, wide), np.zeros(shape, int), np.zeros(shape)
    keeps = np.greater_equal if pooling.kind == "max" else np.less_equal
    values = dict(np.ndenumerate(x.astype(wide)))
    sources = dict(np.ndenumerate(others[0].astype(wide))) if others else values
    for window, elements in windows(pooling.axes):
        if pooling.direction == "forward":
            inside = [values[place] for place in elements if place is not None]
            reduce = {"max": np.max, "min": np.min, "sum": partial(np.sum, dtype=wide)}
            known = {} if pooling.kind == "sum" else {"initial": pooling.identity.astype(wide)}
            out[window] = reduce[pooling.kind](np.array(inside, wide), **known)
            terms[window], size[window] = len(inside), np.abs(np.array(inside)).sum()
            continue
        value, selected = pooling.identity.astype(wide), None
        for n, place in enumerate(elements):
            if place is None and pooling.direction == "tangent":
                continue
            element = pooling.identity.astype(wide) if place is None else values[place]
            begins = n == 0 and pooling.direction == "gradient"
            if begins or not keeps(value, element):
                value, selected = element, place
        if selected is not None and pooling.direction == "tangent":
            out[window] = sources[selected]
        elif selected is not None:
            out[selected] += sources[window]
            terms[selected] += 1
            size[selected] += abs(sources[window])
    return out, terms, size


def assert_same_bits(out: np.ndarray, expected: np.ndarray) -> None:
    """NaN where NaN is; zeros have signs."""
    np.testing.assert_array_equal(out, expected)
    if expected.dtype.kind == "f":
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(out[numbers]), np.signbit(expected[numbers]))


def numbers(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype.name in FLOATS else x


def check(seed: int) -> set[str]:
    """One random pooling, by each algorithm; the one chosen by ``accelerate``."""
    drawn = sample(seed)
    pooling = drawn.pooling
    chosen, _ = choose(pooling, "cpu")
    expected, terms, size = by_loop(drawn)
    algorithms = {chosen}
    if chosen != "xla":
        algorithms |= {"axes"} if pooling.taps > 32 else {"axes", "taps"}
    functions = {name: partial(run, pooling, name) for name in sorted(algorithms)}
    functions |= {"lax": drawn.by_lax, chosen: jaxconv.accelerate(drawn.by_lax)}
    results = jax.jit(lambda *x: {name: f(*x) for name, f in functions.items()})(*drawn.operands)
    by_lax = numbers(lax_out := results.pop("lax"))
    for result in results.values():
        assert (result.shape, result.dtype) == (lax_out.shape, lax_out.dtype)
        out = numbers(result)
        if pooling.direction == "tangent":  # XLA compares some in another order
            assert chosen == "xla" or (out == expected).all(), str(pooling)
        elif pooling.dtype.name not in (*FLOATS, "complex64"):
            assert_same_bits(out, by_lax)
            assert_same_bits(out, expected)
        elif pooling.kind != "sum" and pooling.direction == "forward":
            assert_same_bits(out, by_lax)
            np.testing.assert_array_equal(out, expected)
        else:
            same = (terms <= 1) | ~np.isfinite(expected)
            np.testing.assert_array_equal(out[same], by_lax[same])
            eps = float(jnp.finfo(pooling.dtype).eps)
            of_sums = min(eps, float(np.finfo(np.float32).eps))
            bound = (eps * np.abs(expected) + of_sums * terms * size)[~same]
            if chosen != "xla":
                assert (np.abs(out[~same] - expected[~same]) <= bound).all(), str(pooling)
    return {pooling.direction, chosen, *algorithms}


BLOCK = 20


@pytest.mark.parametrize(
    "block", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n > 1)) for n in range(28)]
)
def test_random_poolings(block: int) -> None:
    found = set[str]()
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        try:
            found |= check(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}: {sample(seed).pooling}")
            raise
    assert found >= {"forward", "gradient", "tangent", "taps", "axes"}


# ---- transformations ----

X = np.random.default_rng(0).integers(-2, 3, (2, 6, 7, 3)).astype(np.float64)
WINDOW = (1, 3, 3, 1), (1, 2, 2, 1), "SAME"
Function = Callable[..., Any]


flax_mean = jax.numpy_dtype_promotion("standard")(nn.avg_pool)


POOLED: dict[str, Function] = {
    "max": lambda x: lax.reduce_window(x, -np.inf, lax.max, *WINDOW),
    "min": lambda x: lax.reduce_window(x, np.inf, lax.min, *WINDOW),
    "sum": lambda x: lax.reduce_window(x, 0.0, lax.add, *WINDOW),
    "max of flax": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    "mean of flax": lambda x: flax_mean(x, (3, 2), (1, 1), "SAME"),
}


def grad(f: Function) -> Function:
    return jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))


def pushed(f: Function) -> Function:
    return lambda x: jax.jvp(f, (x,), (jnp.cos(x),))


def repeated(f: Function) -> Function:
    """In the body of a loop, whose state keeps its shape."""
    return lambda x: x + jnp.mean(jnp.sin(f(x)))


def saving(primitive: Any) -> Function:
    return lambda f: jax.checkpoint(f, policy=lambda prim, *_, **__: prim is primitive)


TRANSFORMATIONS: dict[str, Callable[[Function], Function]] = {
    "alone": lambda f: f,
    "jit": jax.jit,
    "grad": grad,
    "grad of grad": lambda f: grad(grad(f)),
    "jvp": pushed,
    "jvp of grad": lambda f: pushed(grad(f)),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](jnp.cos(x)),
    **{
        f"vmap over {axis}": lambda f, axis=axis: (
            lambda x: jax.vmap(grad(f), axis, axis)(jnp.stack([x, -x], axis))
        )
        for axis in (0, 2, 4)
    },
    "scan": lambda f: grad(lambda x: lax.fori_loop(0, 2, lambda _, x: repeated(f)(x), x)),
    "while": lambda f: (
        lambda x: lax.while_loop(
            lambda state: state[0] < 2, lambda state: (state[0] + 1, repeated(f)(state[1])), (0, x)
        )[1]
    ),
    "cond": lambda f: grad(lambda x: lax.cond(jnp.sum(x) > -99, f, lambda x: -f(x), x)),
    "checkpoint": lambda f: grad(jax.checkpoint(f)),
    "checkpoint, saved": lambda f: grad(saving(lax.reduce_window_max_p)(f)),
}


def pooling_names(fun: Function, *args: Any) -> list[str]:
    """Of lax's poolings in a program and of jaxconv's."""
    return [name for name in traced(fun, *args) if name.removeprefix("jaxconv_") in KINDS]


assert_close = partial(oracles.assert_close, roundings=2**12)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("name", POOLED)
def test_transformed_poolings(name: str, transformation: str, lowered: list[str]) -> None:
    transform = TRANSFORMATIONS[transformation]
    transformed = transform(POOLED[name])
    expected = jax.jit(transformed)(X)
    inside = transform(jaxconv.accelerate(POOLED[name]))
    for accelerated in (jaxconv.accelerate(transformed), inside):
        names = pooling_names(accelerated, X)
        assert names
        assert all(name.startswith("jaxconv") for name in names), names
    assert lowered == []
    assert_close((inside if transformation == "alone" else jax.jit(inside))(X), expected)
    assert lowered
    assert "xla" not in lowered
    lowered.clear()
    with jaxconv.enabled():
        assert_close(jax.jit(transformed)(X), expected)
    assert lowered
    assert "xla" not in lowered


def test_a_policy_saves_the_maximum() -> None:
    """Else it is computed twice, with nothing but its input saved."""

    def counted(policy: Function) -> int:
        fun = grad(policy(lambda x: jnp.sin(POOLED["max"](jnp.sin(x)))))
        return pooling_names(jaxconv.accelerate(fun), X).count("jaxconv_reduce_window_max")

    assert (counted(saving(lax.reduce_window_max_p)), counted(jax.checkpoint)) == (1, 2)


def test_by_name_xlas_stay_with_lax() -> None:
    fun = grad(POOLED["max"])
    by_xla = jaxconv.accelerate(fun, algorithm="xla")
    assert pooling_names(by_xla, X) == pooling_names(fun, X)
    by_other = jaxconv.accelerate(fun, algorithm="im2col")
    assert pooling_names(by_other, X) == [f"jaxconv_{name}" for name in pooling_names(fun, X)]


def test_reductions_by_a_function_stay_with_lax() -> None:
    def by_product(x: Any) -> Any:
        return lax.reduce_window(x, 1.0, lax.mul, *WINDOW), lax.cummax(x, axis=1)

    assert pooling_names(jaxconv.accelerate(by_product), X) == []
    assert_close(jaxconv.accelerate(by_product)(X), by_product(X))


def test_exported_poolings() -> None:
    """Those of symbolic shapes are XLA's."""
    fun = jax.jit(jaxconv.accelerate(grad(POOLED["max"])))
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 6, 7, 3"), X.dtype)
    for x in (X, symbolic):
        made = jax.export.export(fun)(x)
        assert ("stablehlo.select_and_scatter" in made.mlir_module()) == (x is symbolic)
        assert_close(made.call(X), grad(POOLED["max"])(X))


def on_two_devices(*names: str) -> None:
    """XLA's own under jit, each device its part; jaxconv's in shard_map."""
    jax.config.update("jax_enable_x64", True)
    found: list[str] = []
    observers.append(lambda lowered: found.append(lowered.algorithm))
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(X, NamedSharding(mesh, P("a")))
    for f in map(POOLED.get, names):
        fun = jax.value_and_grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))
        compiled = jax.jit(jaxconv.accelerate(fun)).lower(placed).compile()
        assert set(found) == {"xla"}, found
        by_lax = jax.jit(fun).lower(placed).compile()
        ours, allowed = (each.as_text().count("all-gather(") for each in (compiled, by_lax))
        assert ours == allowed
        assert_close(compiled(placed), fun(X))
        found.clear()
        cut = jax.shard_map(grad(f), mesh=mesh, in_specs=P("a"), out_specs=P("a"))
        assert_close(jax.jit(jaxconv.accelerate(cut))(placed), grad(f)(X))
        assert set(found) <= {"taps", "axes"}, found
        assert found
        found.clear()
    (row,) = jaxconv.explain(POOLED["max"], placed).poolings
    assert row.algorithm == "xla"


@pytest.mark.parametrize(
    "names", [["max", "sum"], pytest.param([*POOLED], marks=pytest.mark.exhaustive)], ids=len
)
def test_on_two_devices(names: list[str]) -> None:
    children.output(2, "-c", f"import test_pooling; test_pooling.on_two_devices(*{names})")


# ---- max_pool and avg_pool ----

ARGUMENTS = [
    ((2, 2, 7, 6, 3), (3, 2), (2, 1), "SAME"),
    ((2, 7, 6, 3), (3, 2), (2, 3), "VALID"),
    ((7, 6, 3), (2, 2), (2, 2), "SAME_LOWER"),
    ((2, 9, 3), (4,), (1,), ((5, 2),)),
    ((1, 3, 3, 1), (2, 2), (1, 1), ((3, 3), (3, 0))),  # whose mean is none of padding alone
    ((3, 7, 6, 5, 2), (2, 2, 2), (1, 2, 1), ((1, 1), (0, 3), (-1, 0))),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_pools_are_those_of_flax(arguments: Any, dtype: str) -> None:
    shape, *how = arguments
    x = jnp.asarray(np.random.default_rng(1).integers(-9, 9, shape).astype(dtype))
    wide = x.astype(float)
    maxima = jaxconv.max_pool(x, *how)
    assert maxima.dtype == dtype
    limit = np.array(np.iinfo(dtype).min if dtype == "int32" else -np.inf, dtype)
    expected = nn.pool(x, limit, lax.max, *how)
    np.testing.assert_array_equal(numbers(maxima), numbers(expected))
    floating = x if dtype != "int32" else wide
    for counted in (True, False):
        means = jaxconv.avg_pool(x, *how, count_include_pad=counted)
        assert means.dtype == floating.dtype
        by_flax = flax_mean(wide, *how, count_include_pad=counted)
        rtol = 2 * float(jnp.finfo(means.dtype).eps)
        np.testing.assert_allclose(numbers(means), by_flax, rtol=rtol, atol=9 * rtol)


def test_one_number_is_for_all_spatial_dimensions() -> None:
    np.testing.assert_array_equal(
        jaxconv.max_pool(X, 3, 2, 1), nn.max_pool(X, (3, 3), (2, 2), ((1, 1), (1, 1)))
    )
    np.testing.assert_array_equal(jaxconv.max_pool(X, (2, 1)), nn.max_pool(X, (2, 1)))
    assert pooling_names(grad(lambda x: jaxconv.max_pool(x, 2)), X) == [
        "jaxconv_reduce_window_max",
        "jaxconv_select_and_scatter_add",
    ]


# ---- how they are told ----


def network(x: Any) -> Array:
    for _ in range(2):
        x = jnp.sin(lax.reduce_window(x, -np.inf, lax.max, *WINDOW[:2], "VALID"))  # first
        x = jnp.concatenate([x] * 5, 2)[:, :, :7].repeat(3, 1)[:, :6]
    return lax.reduce_window(x, 0.0, lax.add, *WINDOW).sum()  # second


def test_explain_lists_poolings() -> None:
    found = jaxconv.explain(jax.value_and_grad(network), X, platform="cpu")
    first, second = (f"{line(network, text)} (network)" for text in ("first", "second"))
    assert [
        (row.where.rpartition(":")[2], row.direction, row.count, row.pooling.kind)
        for row in found.poolings
    ] == [
        (first, "forward", 2, "max"),
        (second, "forward", 1, "sum"),
        (second, "gradient", 1, "sum"),
        (first, "gradient", 2, "max"),
    ]
    for row in found.poolings:
        assert (row.algorithm, row.why) == choose(row.pooling, "cpu")
        assert str(row.pooling) in found.table()
    (tangent,) = jaxconv.explain(pushed(POOLED["min"]), X, platform="cpu").poolings[1:]
    assert (tangent.direction, str(tangent.pooling)) == (
        "tangent",
        "min tangent 3×3 of float64[2,6,7,3] → [2,3,4,3], strides (2, 2), padding ((0, 1), (1, 1))",
    )
    by_xla = jaxconv.explain(network, X, platform="tpu").poolings
    assert {row.algorithm for row in by_xla} == {"xla"}


def test_compiled_poolings_are_listed() -> None:
    compiled = Compiled()
    observers.append(compiled)
    try:
        jax.jit(jaxconv.accelerate(jax.grad(network))).lower(X)
    finally:
        observers.remove(compiled)
    text = str(compiled)
    assert "max gradient 3×3" in text
    assert f":{line(network, 'first')} (network)" in text
    assert "Poolings are chosen by rules" in text
