"""A new algorithm is a record and its line in the table: all else works without a measurement."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from jax import Array, lax

import jaxconv
from jaxconv import layout
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import Algorithm, Convolve, Cost
from jaxconv.bench import calibrate
from jaxconv.config import notify as forget
from jaxconv.planning.measured import Row, here, package_rows
from jaxconv.planning.predict import predicted
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune as autotuning

Conv = Callable[[Any, Any], Array]


# What a file of an algorithm holds


class Tiny(Algorithm):
    name = "tiny"
    summary = "an einsum over patches"

    def unsupported(self, spec: ConvSpec) -> str | None:
        if spec.spatial_ndim != 2:
            return "it is for two spatial dimensions"
        if spec.groups > 1:
            return "it has no groups"
        if set(spec.lhs_dilation) != {1}:
            return "it has no holes in its image"
        return None

    def cost(self, spec: ConvSpec) -> Cost:
        _, m, _, k = spec.gemm
        patches = m * k * spec.dtype.itemsize
        return Cost(spec.flops, spec.operand_bytes + 2 * patches, patches, spec.gemm)

    def run(self, lhs: Array, rhs: Array, spec: ConvSpec, convolve: Convolve) -> Array:
        lhs, spec = layout.pad_and_dilate(lhs, spec)
        patches = layout.patches(lhs, spec)
        wanted = spec.accumulator_dtype
        return jnp.einsum("nhwabc,abco->nhwo", patches, rhs, preferred_element_type=wanted)


TINY = Tiny()

TAKEN = (
    *("3x3 stride 2", "atrous", "negative padding", "nchw", "odd layout", "weight gradient"),
    "no output",
)
REFUSED = {
    "matmul": "two spatial dimensions",
    "1d": "two spatial dimensions",
    "depthwise": "no groups",
    "batch groups": "no groups",
    "transposed": "no holes",
    "3d": "two spatial dimensions",
}


# Its line in the table


@contextlib.contextmanager
def registered(algorithm: Algorithm) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALGORITHMS._records, algorithm.name, algorithm)  # type: ignore[attr-defined]
        forget()  # plans without it
        yield
    forget()


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Algorithm]:
    """The algorithm, registered, and a cache that knows nothing of it."""
    with jaxconv.config.set(cache_dir=tmp_path), registered(TINY):
        yield TINY
    forget()


@pytest.fixture(scope="module", autouse=True)
def _programs(compile_quickly: None) -> Iterator[None]:
    """Compiled quickly; and no later test meets what "auto" compiled here."""
    yield
    jax.clear_caches()


def conv_by(name: str, case: Case) -> Conv:
    return lambda lhs, rhs: jaxconv.conv_general_dilated(lhs, rhs, **case.arguments, algorithm=name)


def everything(conv: Conv) -> Conv:
    """The value, both gradients, the tangent, batches, and images in a loop."""

    def fun(lhs: Array, rhs: Array) -> Any:
        out, transpose = jax.vjp(conv, lhs, rhs)
        lhs2, rhs2 = (jnp.stack([x, 2 * x]) for x in (lhs, rhs))
        return {
            "out": out,
            "gradients": transpose(jnp.cos(out)),
            "jvp": jax.jvp(conv, (lhs, rhs), (jnp.sin(lhs), jnp.cos(rhs)))[1],
            "vmap lhs": jax.vmap(conv, (0, None))(lhs2, rhs),
            "vmap rhs": jax.vmap(conv, (None, 0))(lhs, rhs2),
            "vmap both": jax.vmap(conv)(lhs2, rhs2),
            "scan": lax.scan(lambda _, x: (None, conv(x, rhs)), None, lhs2)[1],
        }

    return fun


@pytest.mark.parametrize("name", TAKEN)
def test_its_name_selects_it(name: str, tiny: Algorithm) -> None:
    case = CASES[name]
    lhs, rhs = case.operands()
    outs, expected = (
        jax.jit(everything(conv))(lhs, rhs) for conv in (conv_by("tiny", case), case.lax)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(outs, expected)
    chex.assert_trees_all_close(outs, expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(outs["out"], case.loop(lhs, rhs), rtol=1e-11, atol=1e-11)


def test_it_is_what_runs(tiny: Algorithm) -> None:
    """And not another that is as right: in derivatives and batches too, where it can."""
    ran = []

    class Watched(Tiny):
        def run(self, *args: Any) -> Array:
            ran.append(args[2])
            return super().run(*args)

    case = CASES["3x3"]
    with registered(Watched()):
        jax.make_jaxpr(everything(conv_by("tiny", case)))(*case.operands())
        assert not ran  # it is planned when it is lowered
        jax.jit(everything(conv_by("tiny", case))).lower(*case.operands())
    assert any(spec.weight_gradient for spec in ran)
    assert {spec.lhs_shape[0] for spec in ran} >= {2, 4}  # a batch of two images, a batch of those


@pytest.mark.parametrize("name", REFUSED)
def test_it_gives_its_reason_where_it_refuses(name: str, tiny: Algorithm) -> None:
    message = re.compile(rf"'tiny' can't do .*{REFUSED[name]}.*algorithm='auto'")
    with pytest.raises(jaxconv.UnsupportedConvError, match=message):
        conv_by("tiny", CASES[name])(*CASES[name].operands())


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_it_has_a_predicted_time(platform: str, tiny: Algorithm) -> None:
    assert not any("tiny" in row.seconds for row in package_rows())
    for name in ("3x3", "nchw", "weight gradient"):
        case = CASES[name]
        plan = jaxconv.plan(*case.operands(), **case.arguments, platform=platform)
        (found,) = (c for c in plan.candidates if c.name == "tiny")
        assert found.reason is None
        assert 0 < found.seconds < 1
        assert found in plan.eligible
        assert TINY.summary in str(plan)
    case = CASES["grouped"]
    plan = jaxconv.plan(*case.operands(), **case.arguments, platform=platform)
    assert next(c.reason for c in plan.candidates if c.name == "tiny") == "it has no groups"


def test_its_predicted_time_grows_with_its_cost(tiny: Algorithm) -> None:
    spec = CASES["3x3"].spec(np.float32)
    larger = spec.replace(lhs_shape=(8, 128, 128, 3))
    times = [predicted("tiny", one, "cpu").seconds for one in (larger, spec)]
    assert times[0] > 10 * times[1]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "complex64"])
def test_auto_never_fails_with_it_there(dtype: str, platform: str, tiny: Algorithm) -> None:
    for case in CASES.values():
        operands = (jax.ShapeDtypeStruct(s, dtype) for s in (case.lhs_shape, case.rhs_shape))
        plan = jaxconv.plan(*operands, **case.arguments, platform=platform)
        assert [c.name for c in plan.candidates] == list(ALGORITHMS)
        chosen = next(c for c in plan.candidates if c.name == plan.algorithm)
        assert chosen.reason is None


def test_auto_takes_it_where_it_is_predicted_to_be_the_fastest(tiny: Algorithm) -> None:
    case = Case("large", (8, 64, 64, 64), (3, 3, 64, 64), CASES["3x3"].arguments)
    operands = [jax.ShapeDtypeStruct(s, "float32") for s in (case.lhs_shape, case.rhs_shape)]

    class Free(Tiny):
        def cost(self, spec: ConvSpec) -> Cost:
            return Cost(0, 0, 0, None)

    with registered(Free()):
        assert jaxconv.plan(*operands, **case.arguments, platform="cpu").algorithm == "tiny"


def test_autotune_measures_and_takes_it(tiny: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = autotuning._compiled

    def timed(spec: ConvSpec, name: str, *args: Any) -> Any:
        compiled(spec, name, *args)
        seconds = 1e-3 if name == "tiny" else 2e-3
        return SimpleNamespace(call=lambda: seconds, compile_seconds=0.1)

    monkeypatch.setattr(autotuning, "_compiled", timed)
    monkeypatch.setattr(autotuning, "ROUNDS", 2)
    case = CASES["3x3 stride 2"]
    lhs, rhs = case.operands(np.float32)
    (row,) = jaxconv.autotune(conv_by("auto", case), lhs, rhs).rows
    assert row.chosen == row.seconds[0][0] == "tiny"
    plan = jaxconv.plan(lhs, rhs, **case.arguments)
    assert plan.algorithm == "tiny"
    assert "was measured to be the fastest" in plan.why
    by_auto, by_lax = (jax.jit(conv)(lhs, rhs) for conv in (conv_by("auto", case), case.lax))
    np.testing.assert_allclose(by_auto, by_lax, rtol=1e-5, atol=1e-5)


def test_tuning_teaches_its_predicted_time(
    tiny: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("there are no predictions to learn from")
    spec = CASES["3x3"].spec(np.float32)
    specs = [spec.replace(lhs_shape=(n, *spec.lhs_shape[1:])) for n in (1, 3, 4)]
    before = predicted("tiny", spec, "cpu")

    def timed(spec: ConvSpec, names: Any, platform: str, seconds: float) -> Row:
        assert "tiny" in names
        return Row(spec, here(platform), {"tiny": 10 * before.seconds})

    monkeypatch.setattr(calibrate, "_fastest", lambda spec: ["xla", "tiny"])
    monkeypatch.setattr(calibrate, "_sample", lambda: iter(specs))
    monkeypatch.setattr(calibrate, "timed", timed)
    tuned = calibrate.tune(60)
    assert "tiny" not in tuned.before  # it has no rows to be predicted from
    assert len(tuned.after["tiny"]) == 3
    after = predicted("tiny", spec, "cpu")
    assert after.seconds > 3 * before.seconds
    assert after.sigma < before.sigma


def test_without_its_line_the_name_is_unknown() -> None:
    case = CASES["3x3"]

    def unknown() -> Any:
        return pytest.raises(ValueError, match=r"algorithm must be .*'tiny'")

    with unknown():
        conv_by("tiny", case)(*case.operands())
    with registered(TINY):
        assert "tiny" in jaxconv.ALGORITHMS
        conv_by("tiny", case)(*case.operands())
    assert "tiny" not in jaxconv.ALGORITHMS
    with unknown():
        conv_by("tiny", case)(*case.operands())
    plan = jaxconv.plan(*case.operands(), **case.arguments)
    assert "tiny" not in {c.name for c in plan.candidates}
