"""A new algorithm is a record and its line in the table: all else works without a measurement."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import CASES, Case
from jax import Array, lax
from test_algorithms import Conv, conv_by
from test_plan import candidate, case_plan

import jaxconv
from jaxconv import layout
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import Algorithm, Convolve, Cost, unsupported
from jaxconv.config import notify as forget
from jaxconv.planning.choose import choose
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.predict import predicted
from jaxconv.planning.rows import package_rows
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune as autotuning

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

TAKEN = "3x3 stride 2", "atrous", "odd layout", "weight gradient", "no output"
REFUSED = {"1d": "two spatial dimensions", "depthwise": "no groups", "transposed": "no holes"}


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
def _programs() -> Iterator[None]:
    """Compiled quickly; and no later test meets what "auto" compiled here."""
    yield
    jax.clear_caches()


def gradients(conv: Conv) -> Conv:
    """The value and both gradients."""

    def fun(lhs: Array, rhs: Array) -> Any:
        out, transpose = jax.vjp(conv, lhs, rhs)
        return {"out": out, "gradients": transpose(jnp.cos(out))}

    return fun


def everything(conv: Conv) -> Conv:
    """The tangent, batches, and images in a loop, too."""

    def fun(lhs: Array, rhs: Array) -> Any:
        lhs2, rhs2 = (jnp.stack([x, 2 * x]) for x in (lhs, rhs))
        return gradients(conv)(lhs, rhs) | {
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
    function = everything if name == "odd layout" else gradients
    outs, expected = (
        jax.jit(function(conv))(lhs, rhs) for conv in (conv_by("tiny", case), case.lax)
    )
    oracles.assert_close(outs, expected, roundings=2**12)
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
def test_it_is_in_plans(platform: str, tiny: Algorithm) -> None:
    assert not any("tiny" in row.seconds for row in package_rows())
    for name in ("3x3", "nchw", "weight gradient"):
        plan = case_plan(CASES[name], platform)
        assert TINY.summary in plan.table()
        found = candidate(plan, "tiny")
        assert found.status in ("chosen", "possible")
        assert found.reason is None
        assert 0 < (found.seconds or (platform != "cpu")) <= 1
    found = candidate(case_plan(CASES["depthwise"], platform), "tiny")
    assert (found.status, found.reason) == ("unsupported", "it has no groups")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_never_fails_with_it_there(platform: str, tiny: Algorithm) -> None:
    dtypes = ("float32", "bfloat16", "int8", "bool", "complex64")
    for case, dtype in list(itertools.product(CASES.values(), dtypes))[::3]:
        spec = case.spec(jnp.dtype(dtype))
        name, _ = choose(spec, platform)
        assert unsupported(ALGORITHMS[name], spec) is None


def test_auto_takes_it_where_it_is_predicted_to_be_the_fastest(tiny: Algorithm) -> None:
    """Its predicted time grows with its cost."""
    spec = CASES["3x3"].spec(np.float32)
    larger = spec.replace(lhs_shape=(8, 128, 128, 3))
    assert predicted("tiny", larger, "cpu").seconds > 10 * predicted("tiny", spec, "cpu").seconds
    case = Case("large", (8, 64, 64, 64), (3, 3, 64, 64), CASES["3x3"].arguments)

    class Free(Tiny):
        def cost(self, spec: ConvSpec) -> Cost:
            return Cost(0, 0, 0, None)

    with registered(Free()):
        assert choose(case.spec(np.float32), "cpu")[0] == "tiny"


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
    name, why = choose(case.spec(np.float32), jax.default_backend())
    assert name == "tiny"
    assert "measured fastest" in why
    by_auto, by_lax = (jax.jit(conv)(lhs, rhs) for conv in (conv_by("auto", case), case.lax))
    np.testing.assert_allclose(by_auto, by_lax, rtol=1e-5, atol=1e-5)


def test_without_its_line_the_name_is_unknown() -> None:
    case = CASES["3x3"]
    with registered(TINY):
        conv_by("tiny", case)(*case.operands())
    with pytest.raises(ValueError, match=r"algorithm must be .*'tiny'"):
        conv_by("tiny", case)(*case.operands())
    assert "tiny" not in {c.name for c in plan_spec(case.spec(), "cpu").candidates}
