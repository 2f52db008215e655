"""``autotune``: what it finds, measures, chooses and keeps; never how long anything takes."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CASES, Case
from jax import lax

import jaxconv
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared
from jaxconv.config import config
from jaxconv.config import notify as forget
from jaxconv.planning import cache
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.timing import quickest
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune as autotuning
from jaxconv.tools.autotune import Measurement, Tuning, candidates, measure

PLATFORM = jax.default_backend()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and few rounds."""
    monkeypatch.setattr(autotuning, "ROUNDS", 2)
    with config.set(cache_dir=tmp_path / "cache", use_cache=True):
        yield tmp_path / "cache"


def struct(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


X, W = struct(2, 6, 6, 4), struct(3, 3, 4, 5)


def loss(x: Any, w: Any) -> Any:
    return (jaxconv.conv(x, w) ** 2).sum()


# Seconds by algorithm, in place of measured ones.
Times = dict[str, float]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """What an algorithm that is given here takes; those that are not take a second."""
    given: Times = {}
    monkeypatch.setattr(
        autotuning,
        "_compiled",
        lambda spec, name, *_: SimpleNamespace(call=lambda: given.get(name, 1.0)),
    )
    return given


# What it finds


def test_forward_and_backward_are_found_once_each() -> None:
    tuning = jaxconv.autotune(jax.jit(jax.grad(loss, argnums=(0, 1))), X, W)
    found = jaxconv.explain(jax.grad(loss, argnums=(0, 1)))(X, W)
    assert [row.spec for row in tuning.rows] == list(dict.fromkeys(r.spec for r in found.rows))
    assert any(row.spec.weight_gradient for row in tuning.rows)
    assert tuning.platform == PLATFORM
    hash(tuning)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tuning.rows = ()  # pyright: ignore


def test_laxs_convolutions_are_found_in_loops_and_accelerated_functions(times: Times) -> None:
    def steps(x: Any, w: Any) -> Any:
        def body(x: Any, _: Any) -> Any:
            return lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ), None

        return lax.scan(body, x, length=3)[0]

    arguments = struct(1, 6, 6, 4), struct(3, 3, 4, 4)
    plain = jaxconv.autotune(steps, *arguments)
    assert len(plain.rows) == 1
    assert (
        jaxconv.autotune(jaxconv.accelerate(steps), *arguments).rows[0].spec == plain.rows[0].spec
    )


def test_those_with_a_name_and_empty_ones_are_left_alone(folder: Path) -> None:
    named = jaxconv.autotune(lambda x, w: jaxconv.conv(x, w, algorithm="im2col"), X, W)
    empty = jaxconv.autotune(loss, struct(0, 6, 6, 4), W)
    assert named.rows == empty.rows == ()
    assert not folder.exists()
    assert "0 different convolutions" in str(named)


def test_arrays_and_keywords(times: Times) -> None:
    def f(x: Any, *, w: Any, strides: int) -> Any:
        return jaxconv.conv(x, w, strides)

    (row,) = jaxconv.autotune(f, jnp.ones(X.shape), w=jnp.ones(W.shape), strides=2).rows
    assert row.spec.window_strides == (2, 2)


# What it measures


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_candidates(case: Case) -> None:
    spec = case.spec("float32")
    if spec.is_empty:
        return
    plan = plan_spec(spec, "cpu")
    names = candidates(spec, "cpu")
    assert names[0] == plan.algorithm
    assert "xla" in names
    assert len(set(names)) == len(names)
    possible = {
        c.name: c.seconds
        for c in plan.candidates
        if c.reason is None and ALGORITHMS[c.name].breach(prepared(spec)) is None
    }
    assert set(names) <= set(possible)
    for name in set(possible) - set(names):
        assert possible[name] > autotuning.HOPELESS_PREDICTED * min(possible.values())


def test_candidates_are_under_the_limit() -> None:
    spec = CASES["3x3"].spec("float32")
    assert "im2col" in candidates(spec, "cpu")
    with config.set(workspace_limit=0):
        assert "im2col" not in candidates(spec, "cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64", "int8", "uint8", "bool"])
def test_dtypes(dtype: str) -> None:
    spec = CASES["3x3"].spec(dtype)
    row = measure(spec, PLATFORM)
    assert row.spec == spec
    assert row.chosen in dict(row.seconds)
    lhs, rhs = autotuning.operands(spec)
    assert (lhs.dtype, rhs.dtype) == (spec.dtype, spec.dtype)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_weight_gradient_is_run_as_it_arrives(groups: int) -> None:
    """Its operands are the image and the cotangent in their own layouts, so is its result."""
    w = struct(3, 3, 4 // groups, 8)

    def gradient(x: Any, w: Any) -> Any:
        return jax.grad(lambda w: (jaxconv.conv(x, w, 2, groups=groups) ** 2).sum())(w)

    specs = [row.spec for row in jaxconv.explain(gradient)(X, w).rows]
    (spec,) = [spec for spec in specs if spec.weight_gradient]
    image, cotangent = autotuning.operands(spec)
    assert image.shape == X.shape
    assert cotangent.shape == (2, 3, 3, 8)
    _, pullback = jax.vjp(
        lambda w: jaxconv.conv(image, w, 2, groups=groups), jnp.zeros(w.shape, "float32")
    )
    (expected,) = pullback(cotangent)
    for name in candidates(spec, PLATFORM):
        out = autotuning._compiled(spec, name, PLATFORM, (image, cotangent)).compiled(
            image, cotangent
        )
        assert jnp.allclose(out, expected, rtol=1e-4, atol=1e-4), name


def test_what_the_backend_refuses_is_left_out(
    times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CASES["3x3"].spec("float32")
    planned, *others = candidates(spec, PLATFORM)
    refused = others[0]
    compiled = autotuning._compiled

    def refusing(spec: ConvSpec, name: str, *args: Any) -> Any:
        if name == refused:
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")
        return compiled(spec, name, *args)

    monkeypatch.setattr(autotuning, "_compiled", refusing)
    row = measure(spec, PLATFORM)
    assert refused not in dict(row.seconds)
    assert planned in dict(row.seconds)
    assert (row.ratio is None) == (refused == "xla")


# What it chooses


@pytest.mark.parametrize(
    ("seconds", "wins"), [(0.5, True), (0.94, True), (0.96, False), (2, False)]
)
def test_the_planned_one_stays_unless_clearly_beaten(
    times: Times, seconds: float, wins: bool
) -> None:
    spec = CASES["3x3"].spec("float32")
    planned, *others = candidates(spec, PLATFORM)
    other = next(name for name in others if name != "xla")
    times[other] = seconds
    row = measure(spec, PLATFORM)
    assert (row.planned, row.chosen) == (planned, other if wins else planned)
    assert dict(row.seconds)[other] == seconds
    assert [time for _, time in row.seconds] == sorted(time for _, time in row.seconds)
    assert row.ratio == pytest.approx(1 / dict(row.seconds)[row.chosen])


def test_one_lucky_round_in_two_is_not_enough() -> None:
    columns = {"im2col": [1.0, 1.0, 1.0, 1.0], "xla": [0.5, 0.5, 2.0, 2.0]}
    assert autotuning._choose("im2col", columns) == "im2col"
    assert autotuning._choose("im2col", columns | {"xla": [0.5, 0.5, 0.5, 0.9]}) == "xla"


def test_an_fft_must_be_twice_as_fast() -> None:
    columns = {"im2col": [1.0] * 4, "fft": [0.6] * 4}
    assert autotuning._choose("im2col", columns) == "im2col"
    assert autotuning._choose("fft", columns) == "im2col"
    columns["fft"] = [0.4] * 4
    assert autotuning._choose("im2col", columns) == "fft"
    assert autotuning._choose("fft", {"fft": [0.6] * 4}) == "fft"


def test_the_hopeless_are_called_once(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CASES["3x3"].spec("float32")
    planned, *others = candidates(spec, PLATFORM)
    slow = next(name for name in others if name != "xla")
    times[slow] = 1.0 + autotuning.HOPELESS_MEASURED
    calls: list[str] = []

    def counted(spec: ConvSpec, name: str, *_: Any) -> Any:
        def call() -> float:
            calls.append(name)
            return times.get(name, 1.0)

        return SimpleNamespace(call=call)

    monkeypatch.setattr(autotuning, "_compiled", counted)
    row = measure(spec, PLATFORM)
    assert calls.count(slow) == 1
    assert calls.count(planned) > 1
    assert dict(row.seconds)[slow] == times[slow]


def test_one_call_that_stalls_says_nothing() -> None:
    calls = [5e-3, 1e-3, 2e-3, 3e-3, 0.0]
    assert quickest(iter(calls).__next__) == 1e-3
    assert quickest(iter([1.0, 0.0]).__next__) == 1.0  # a slow one is called once


# What it keeps


def other_than_planned(spec: ConvSpec) -> str:
    planned, *others = candidates(spec, PLATFORM)
    return next(name for name in others if name not in (planned, "xla"))


def test_plans_take_what_it_chose(times: Times, folder: Path) -> None:
    before = jaxconv.explain(loss)(X, W).rows[0]
    other = other_than_planned(before.spec)
    times[other] = 0.25
    (row,) = jaxconv.autotune(loss, X, W).rows
    assert (row.planned, row.chosen) == (before.algorithm, other)
    after = jaxconv.explain(loss)(X, W).rows[0]
    assert after.algorithm == other
    assert (
        after.why
        == "it was measured fastest on this machine (250.000 ms, 4.00 times as fast as lax's)"
    )
    assert len(list(folder.glob("winners-*.json"))) == 1
    # Measured again, it is the planned one.
    (again,) = jaxconv.autotune(loss, X, W).rows
    assert (again.planned, again.chosen) == (other, other)
    with config.set(use_cache=False):
        assert jaxconv.explain(loss)(X, W).rows[0] == before
    # Another process has them from the file.
    cache._read.clear()
    forget()
    assert jaxconv.explain(loss)(X, W).rows[0] == after


def test_what_is_compiled_next_runs_it(times: Times) -> None:
    x, w = (jnp.ones(a.shape, a.dtype) for a in (X, W))
    (row,) = jaxconv.explain(lambda x, w: jaxconv.conv(x, w))(x, w).rows
    for name in [n for n in candidates(row.spec, PLATFORM) if n in ("im2col", "xla")]:
        times.clear()
        times[name] = 0.1
        jaxconv.autotune(lambda x, w: jaxconv.conv(x, w), x, w)

        def lax_conv(x: Any, w: Any) -> Any:
            return lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        for f in (lambda x, w: jaxconv.conv(x, w), jaxconv.accelerate(lax_conv)):
            text = jax.jit(f).lower(x, w).as_text()
            assert ("stablehlo.convolution" in text) == (name == "xla")
        with jaxconv.enabled((PLATFORM,)):
            text = jax.jit(lax_conv).lower(x, w).as_text()
            assert ("stablehlo.convolution" in text) == (name == "xla")


def test_an_interrupt_keeps_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[ConvSpec] = []

    def interrupted(spec: ConvSpec, platform: str) -> Measurement:
        if done:
            raise KeyboardInterrupt
        done.append(spec)
        return Measurement(spec, "xla", "im2col", (("im2col", 0.5), ("xla", 1.0)), 2.0)

    monkeypatch.setattr(autotuning, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jaxconv.autotune(jax.grad(loss, argnums=(0, 1)), X, W)
    assert plan_spec(done[0], PLATFORM).algorithm == "im2col"


def test_without_a_cache_it_holds_for_the_process(times: Times, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with config.set(cache_dir=tmp_path / "file" / "cache"):
        spec = jaxconv.explain(loss)(X, W).rows[0].spec
        other = other_than_planned(spec)
        times[other] = 0.25
        with pytest.warns(UserWarning, match="known to this process only"):
            jaxconv.autotune(loss, X, W)
        assert plan_spec(spec, PLATFORM).algorithm == other
    assert plan_spec(spec, PLATFORM).algorithm != other


# How it prints


def test_report_is_a_table() -> None:
    spec = CASES["3x3"].spec("float32")
    seconds = (("im2col", 0.001), ("xla", 0.0025))
    rows = (
        Measurement(spec, "xla", "im2col", seconds, 2.5),
        Measurement(spec, "im2col", "im2col", seconds[:1], None),
    )
    line, head, first, second = str(Tuning("cpu", rows)).splitlines()
    assert line.startswith("Measured on cpu: 2 different convolutions, 1 of which")
    assert "× lax" in head
    assert first.split()[:5] == ["xla", "im2col", "1.000", "ms", "2.50"]
    assert "xla 2.500 ms" in first
    assert first.endswith(str(spec))
    assert second.split()[4] == "–"
    text = Tuning("cpu", rows)._repr_html_()
    assert text.count("<tr") == 3
    assert text.count("bold") == 1


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_goes_to_stderr(
    times: Times, capsys: pytest.CaptureFixture[str], progress: bool | None
) -> None:
    pytest.importorskip("rich")
    tuning = jaxconv.autotune(loss, X, W, progress=progress)
    assert len(tuning.rows) == 1
    assert capsys.readouterr().out == ""


def test_progress_without_rich(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert len(jaxconv.autotune(loss, X, W, progress=True).rows) == 1
