"""enable and disable: what lax's convolutions compile to, and that all is as it was afterwards."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carriers import PROGRAMS, grad, operands
from cases import CASES, case_of
from jax import Array, export
from jax.interpreters import mlir
from oracles import assert_close
from test_transformations import TRANSFORMATIONS, conv_by

import jaxconv
from jaxconv import compat
from jaxconv.compat import conv_general_dilated_p
from jaxconv.planning.plan import plan_spec
from jaxconv.transforms import primitive
from jaxconv.transforms.planned import PLANNED

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the default platform of enable is the CPU"
)
CASE = CASES["depthwise"]


def rules() -> dict[Any, Any]:
    """JAX's entries for lax's convolution and poolings, by table."""
    tables = {"": compat._lowerings, **compat._platform_specific_lowerings}
    return {(name, p): t[p] for name, t in tables.items() for p in PLANNED if p in t}


def is_enabled(platform: str = "cpu") -> bool:
    """Whether a convolution that JAX lowers for ``platform`` is jaxconv's."""
    found, platform = [], {"gpu": "cuda"}.get(platform, platform)
    primitive.observers.append(found.append)
    try:
        jax.jit(CASE.lax).trace(*CASE.operands()).lower(lowering_platforms=(platform,))
    finally:
        primitive.observers.remove(found.append)
    return bool(found)


ORIGINAL = rules()


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    yield
    left = rules() != ORIGINAL
    jaxconv.disable()
    assert not left
    assert rules() == ORIGINAL


def convolutions(fun: Callable, *args: Any) -> int:
    """In what JAX gives to XLA for ``fun``."""
    text = jax.jit(lambda *args: fun(*args)).lower(*args).as_text()
    return text.count("stablehlo.convolution")


# ---- what is compiled ----


def test_the_convolution_is_replaced_and_comes_back() -> None:
    args = CASE.operands()
    jaxpr = str(jax.make_jaxpr(CASE.lax)(*args))
    expected = CASE.lax(*args)
    assert convolutions(CASE.lax, *args) == 1
    jaxconv.enable()
    assert convolutions(CASE.lax, *args) == 0
    assert str(jax.make_jaxpr(CASE.lax)(*args)) == jaxpr
    assert_close(CASE.lax(*args), expected)
    jaxconv.disable()
    assert convolutions(CASE.lax, *args) == 1
    assert not is_enabled()


@pytest.mark.parametrize("jit", [True, False])
def test_what_was_compiled_before_takes_part(jit: bool, lowered: list[str]) -> None:
    """But a compiled object stays what it is."""
    fun = jax.jit(CASE.lax) if jit else CASE.lax
    args = [jnp.asarray(x) for x in CASE.operands()]
    expected = fun(*args)
    compiled = jax.jit(CASE.lax).lower(*args).compile()
    with jaxconv.enabled():
        assert_close(compiled(*args), expected)
        assert lowered == []
        for _ in range(2):
            assert_close(fun(*args), expected)
            assert lowered == ["auto"]
    assert_close(fun(*args), expected)
    assert lowered == ["auto"]


# Of which lax's convolution comes out in different ways.
CARRIED: dict[str, tuple[Callable, Any]] = {
    "second derivatives": (TRANSFORMATIONS["second derivatives"](CASE.lax), CASE.operands()),
    "accelerate": (jaxconv.accelerate(CASE.lax), CASE.operands()),
    "grad of scan, cond, remat and custom_vjp": (grad(PROGRAMS["deep"]), operands()),
}


@pytest.mark.parametrize("name", CARRIED)
def test_transformations(name: str, lowered: list[str]) -> None:
    fun, args = CARRIED[name]
    expected = jax.jit(fun)(*args)
    del lowered[:]
    with jaxconv.enabled():
        assert_close(jax.jit(fun)(*args), expected, roundings=2**16)
    assert lowered


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("matmul", np.float64),  # no spatial dimension
        ("3d", np.float64),
        ("odd layout", np.float32),
        ("negative padding", np.float64),
        ("batch groups", np.float64),
        ("all dilations", np.complex64),
        ("3x3", np.complex128),
        ("3x3", np.int32),
        ("3x3", np.uint8),
        ("3x3", jnp.bfloat16),
        ("depthwise", np.float16),
        ("no output", np.float32),
        ("no channels", np.float32),
    ],
)
def test_shapes_and_dtypes(name: str, dtype: Any, lowered: list[str]) -> None:
    case = CASES[name]
    args = [(4 * x).astype(dtype) for x in case.operands()]
    expected = case.lax(*args)
    with jaxconv.enabled():
        out = case.lax(*args)
    # XLA's complex convolution is three real ones, which are lowered in their turn.
    assert set(lowered) == {"auto"}
    assert len(lowered) == 1 or np.issubdtype(dtype, np.complexfloating)
    assert_close(out, expected)


def test_an_algorithm_by_name_stays_that_one() -> None:
    """XLA's is XLA's, and not the one that stands in for it."""
    args = CASE.operands()
    with jaxconv.enabled():
        for name in ("xla", "im2col", "shift"):
            fun = conv_by(CASE, name)
            accelerated = jaxconv.accelerate(CASE.lax, algorithm=name)
            by_xla = int(name == "xla")
            assert_close(fun(*args), CASE.lax(*args))
            assert convolutions(fun, *args) == convolutions(accelerated, *args) == by_xla
            assert convolutions(TRANSFORMATIONS["value and grad"](fun), *args) == 3 * by_xla


def test_auto_may_still_choose_xla() -> None:
    # A precision that leaves out Winograd.
    case = case_of((1, 64, 64, 64), (3, 3, 64, 64), precision="highest")
    assert plan_spec(case.spec(np.float32), "cpu").algorithm == "xla"
    with jaxconv.enabled():
        assert convolutions(case.lax, *case.operands(np.float32)) == 1


def test_symbolic_shapes_are_left_to_lax(lowered: list[str]) -> None:
    lhs, rhs = CASE.operands()
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape("b, 6, 7, 4"), np.float64)
    with jaxconv.enabled():
        made = export.export(jax.jit(CASE.lax))(symbolic, rhs)
    assert lowered == []
    assert "convolution" in made.mlir_module()
    assert_close(made.call(lhs, rhs), CASE.lax(lhs, rhs))


def test_export_for_several_platforms() -> None:
    """Only the platform that is enabled has another program."""
    args = CASE.operands()
    fun = jax.jit(CASE.lax)
    with jaxconv.enabled():
        alone = export.export(fun, platforms=("cpu",))(*args)
        both = export.export(fun, platforms=("cpu", "tpu"))(*args)
    assert "stablehlo.convolution" not in alone.mlir_module()
    assert both.mlir_module().count("stablehlo.convolution") == 1
    assert_close(both.call(*args), CASE.lax(*args))


# ---- what it does to the process ----


def test_enabling_twice_changes_nothing(lowered: list[str]) -> None:
    fun = jax.jit(CASE.lax)
    args = CASE.operands()
    jaxconv.enable()
    once = rules()
    fun(*args)
    jaxconv.enable("cpu")
    with jaxconv.enabled(["cpu"]):
        fun(*args)
    assert rules() == once
    fun(*args)
    assert lowered == ["auto"]  # no cache was cleared
    for _ in range(2):
        jaxconv.disable()
        assert not is_enabled()
    jaxconv.enable(())
    assert not is_enabled()


def test_disabling_clears_no_cache_where_nothing_was_enabled() -> None:
    chex.clear_trace_counter()
    fun = jax.jit(chex.assert_max_traces(lambda x: x, 1))
    fun(1.0)
    jaxconv.disable()
    fun(1.0)


def test_blocks() -> None:
    with jaxconv.enabled():
        with jaxconv.enabled(("cpu", "tpu")):
            assert is_enabled("tpu")
        assert is_enabled()
        assert not is_enabled("tpu")
    assert not is_enabled()
    # A block leaves what stood before it, and what was enabled in it.
    jaxconv.enable()
    with jaxconv.enabled(("cpu", "tpu")):
        pass
    assert is_enabled()
    assert not is_enabled("tpu")
    with jaxconv.enabled():
        jaxconv.enable("tpu")
    assert is_enabled("tpu")
    jaxconv.disable()
    # Disabling ends the blocks that are open, which then end no other.
    first, second = jaxconv.enabled(), jaxconv.enabled()
    with first:
        jaxconv.disable()
        assert not is_enabled()
        with jaxconv.enabled():
            assert is_enabled()
        assert not is_enabled()
        second.__enter__()
    assert is_enabled()
    second.__exit__(None, None, None)
    assert not is_enabled()


def test_as_a_decorator_and_with_errors() -> None:
    @jaxconv.enabled()
    def fun(fails: bool = False) -> bool:
        if fails:
            raise RuntimeError(is_enabled())
        return is_enabled()

    for _ in range(2):
        assert fun()
        assert not is_enabled()
        with pytest.raises(RuntimeError, match="True"):
            fun(fails=True)
        assert not is_enabled()


def test_blocks_of_threads_overlap() -> None:
    """The last to end restores, in whichever thread it is."""
    started, end_first = threading.Event(), threading.Event()

    def other() -> None:
        with jaxconv.enabled():
            started.set()
            assert end_first.wait(60)

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(other)
        assert started.wait(60)
        assert is_enabled()  # for the whole process
        with jaxconv.enabled():
            end_first.set()
            ended.result()
            assert is_enabled()
    assert not is_enabled()


def test_many_threads() -> None:
    """Blocks and compilations of several threads at once, each with a shape of its own."""
    lhs, rhs = CASE.operands()
    expected = CASE.lax(lhs, rhs)

    def work(size: int) -> None:
        for _ in range(2):
            with jaxconv.enabled():
                batch = jax.jit(CASE.lax)(np.concatenate([lhs] * size), rhs)
                single = CASE.lax(lhs, rhs)
            assert_close(batch, jnp.concatenate([expected] * size))
            assert_close(single, expected)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(1, 4))) == [None] * 3
    assert not is_enabled()


def test_inside_a_function_that_jit_traces(lowered: list[str]) -> None:
    """Whatever is enabled when the function is lowered counts, after it has been traced."""

    @jax.jit
    def fun(lhs: Array, rhs: Array) -> Array:
        with jaxconv.enabled():
            return jax.jit(CASE.lax)(lhs, rhs)

    args = CASE.operands()
    assert_close(fun(*args), CASE.lax(*args))
    assert lowered == []
    assert not is_enabled()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_very_entry_comes_back(platform: str) -> None:
    """JAX's own, none at all, or the one that another library has registered."""

    def assert_restored(before: dict[str, Any]) -> None:
        with jaxconv.enabled([platform]):
            assert is_enabled(platform)
            if platform == "cpu":
                assert float(jnp.sum(jnp.abs(jax.jit(CASE.lax)(*CASE.operands())))) > 1
        assert rules() == before
        assert all(rules()[name] is entry for name, entry in before.items())

    def zeros(lhs: Array, rhs: Array) -> Array:
        return jnp.zeros((*lhs.shape[:-1], rhs.shape[-1]), lhs.dtype)

    def of_another_library(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
        return mlir.lower_fun(zeros, False)(ctx, lhs, rhs)

    assert_restored(before := rules())
    mlir.register_lowering(conv_general_dilated_p, of_another_library, platform=platform)
    try:
        assert_restored(rules())
        if platform == "cpu":
            assert float(jnp.sum(jnp.abs(jax.jit(CASE.lax)(*CASE.operands())))) == 0
    finally:
        for name in compat.ALIASES.get(platform, (platform,)):
            table = compat._platform_specific_lowerings[name]
            table.pop(conv_general_dilated_p, None)
            if (name, conv_general_dilated_p) in before:
                table[conv_general_dilated_p] = before[name, conv_general_dilated_p]
        jax.clear_caches()


@pytest.mark.parametrize("bad", [("cpu", "quantum"), "quantum", ("CPU",), (None,)])
def test_unknown_platforms(bad: Any) -> None:
    match = "platforms must be among 'cpu', 'gpu' and 'tpu', got"
    with pytest.raises(ValueError, match=match), jaxconv.enabled(bad):
        pass
    assert not is_enabled()
