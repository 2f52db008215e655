"""``autotune``: what it finds, measures, chooses and keeps; never how long anything takes."""

import dataclasses
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest
from carriers import conv as lax_conv
from cases import CASES
from jax import lax
from test_plan import struct
from test_prediction import NOT_EMPTY

import jaxconv
from jaxconv.algorithms.base import prepared
from jaxconv.config import config
from jaxconv.config import notify as forget
from jaxconv.planning.machine import here
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.rows import Timed, record
from jaxconv.planning.timing import quickest
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune as autotuning
from jaxconv.tools.autotune import Measurement, Tuning, candidates, timed
from jaxconv.transforms import primitive
from jaxconv.transforms.primitive import planned_here

PLATFORM = jax.default_backend()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and few rounds."""
    monkeypatch.setattr(autotuning, "ROUNDS", 2)
    with config.set(cache_dir=tmp_path / "cache", use_cache=True):
        yield tmp_path / "cache"


X, W = struct(2, 6, 6, 4), struct(3, 3, 4, 5)


def loss(x: Any, w: Any) -> Any:
    return (jaxconv.conv(x, w) ** 2).sum()


gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))


def autotuned() -> Measurement:
    (row,) = jaxconv.autotune(loss, X, W).rows
    return row


# Seconds by algorithm, in place of measured ones.
Times = dict[str, float]


class Stub:
    """A compiled convolution that takes given seconds, and counts its calls."""

    compile_seconds = 0.25

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def call(self) -> float:
        self.calls += 1
        return self.seconds


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """What an algorithm that is given here takes; those that are not take a second."""
    given: Times = {}
    monkeypatch.setattr(autotuning, "_compiled", lambda spec, name, *_: Stub(given.get(name, 1.0)))
    return given


@pytest.fixture
def faster(times: Times) -> tuple[ConvSpec, str]:
    """The convolution of ``loss``, and an algorithm that is not planned for it, now the fastest."""
    spec = jaxconv.explain(loss, X, W).rows[0].spec
    planned, *others = candidates(spec, PLATFORM)
    other = next(name for name in others if name not in (planned, "xla"))
    times[other] = 0.25
    return spec, other


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """``timed``, that keeps what it was asked for."""
    mock = Mock(side_effect=timed)
    monkeypatch.setattr(autotuning, "timed", mock)
    return mock


def asked(watched: Mock) -> list[ConvSpec]:
    return [call.args[0] for call in watched.call_args_list]


# What it finds


def test_forward_and_backward_are_found_once_each(times: Times) -> None:
    tuning, found = jaxconv.autotune(gradient, X, W), jaxconv.explain(gradient, X, W)
    assert [row.spec for row in tuning.rows] == list(dict.fromkeys(r.spec for r in found.rows))
    assert any(row.spec.weight_gradient for row in tuning.rows)
    assert tuning.platform == PLATFORM
    hash(tuning)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tuning.rows = ()  # pyright: ignore


def test_what_was_compiled_is_found(
    monkeypatch: pytest.MonkeyPatch, times: Times, folder: Path
) -> None:
    """Without a function: through jaxconv, by "auto", each once, in any thread."""
    monkeypatch.setattr(primitive, "_planned_here", deque())
    x, w = (jnp.ones(a.shape, a.dtype) for a in (X, W))
    jax.clear_caches()
    jaxconv.conv(x, w, algorithm="im2col")
    jaxconv.conv(x[:0], w)
    lax.conv(x, x, (1, 1), "SAME")
    assert planned_here(PLATFORM) == []

    with ThreadPoolExecutor(1) as pool:
        pool.submit(gradient, x, w).result()
    expected = {row.spec for row in jaxconv.explain(gradient, X, W).rows}
    assert set(planned_here(PLATFORM)) == expected
    assert planned_here("tpu") == [] != planned_here(PLATFORM)
    jax.clear_caches()
    jaxconv.conv(x, w)
    tuning = jaxconv.autotune()
    assert {row.spec for row in tuning.rows} == expected
    assert len(tuning.rows) == len(expected)
    # Measuring compiles too, but that is not the program's.
    assert set(planned_here(PLATFORM)) == expected
    # Those that a function names are known now, and the other way round.
    assert all(row.known for row in jaxconv.autotune(loss, X, W).rows)
    assert all(row.known for row in jaxconv.autotune().rows)


def test_what_was_compiled_by_lax_is_found_where_it_is_enabled(
    monkeypatch: pytest.MonkeyPatch, times: Times
) -> None:
    monkeypatch.setattr(primitive, "_planned_here", deque())
    with jaxconv.enabled((PLATFORM,)):
        jax.jit(lambda x, w: lax.conv(x, w, (1, 1), "SAME"))(
            jnp.ones((1, 2, 5, 5)), jnp.ones((3, 2, 3, 3))
        )
    (row,) = jaxconv.autotune().rows
    assert (row.spec.lhs_shape, row.spec.rhs_shape) == ((1, 5, 5, 2), (3, 3, 2, 3))


def test_memory_of_what_was_compiled_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitive, "_planned_here", deque(maxlen=4))
    spec = CASES["3x3"].spec("float32")
    specs = [spec.replace(lhs_shape=(n, 9, 9, spec.lhs_shape[-1])) for n in range(1, 6)]
    for one in [*specs, specs[-1]]:
        primitive._remember(primitive.Lowered(one, "auto", "cpu"))
        primitive._remember(primitive.Lowered(one, "im2col", "gpu"))
    assert planned_here("cpu") == specs[-3:]
    assert planned_here("gpu") == []


def test_laxs_convolutions_are_found_in_loops_and_accelerated_functions(times: Times) -> None:
    def steps(x: Any, w: Any) -> Any:
        return lax.scan(lambda x, _: (lax_conv(x, w), None), x, length=3)[0]

    arguments = struct(1, 6, 6, 4), struct(3, 3, 4, 4)
    (plain,) = jaxconv.autotune(steps, *arguments).rows
    (accelerated,) = jaxconv.autotune(jaxconv.accelerate(steps), *arguments).rows
    assert plain.spec == accelerated.spec


def test_those_with_a_name_and_empty_ones_are_left_alone(folder: Path) -> None:
    named = jaxconv.autotune(lambda x, w: jaxconv.conv(x, w, algorithm="im2col"), X, W)
    empty = jaxconv.autotune(loss, struct(0, 6, 6, 4), W)
    assert named.rows == empty.rows == ()
    assert not folder.exists()
    assert "0 different convolutions" in str(named)


# What it measures


@pytest.mark.parametrize("spec", NOT_EMPTY.values(), ids=NOT_EMPTY)
def test_candidates(spec: ConvSpec) -> None:
    plan = plan_spec(spec, "cpu")
    names = candidates(spec, "cpu")
    assert names[0] == plan.algorithm
    assert "xla" in names
    assert len(set(names)) == len(names)
    possible = {c.name: c.seconds or 0 for c in plan.eligible}
    assert set(names) <= set(possible)
    for name in set(possible) - set(names):
        assert possible[name] > autotuning.HOPELESS_PREDICTED * min(possible.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64", "int8", "uint8", "bool"])
def test_dtypes(dtype: str) -> None:
    spec = CASES["3x3"].spec(dtype)
    names = candidates(spec, PLATFORM)[:3]
    row = timed(spec, names, PLATFORM)
    assert (row.spec, row.machine) == (spec, here(PLATFORM))
    assert set(row.seconds) == set(row.compile_seconds) <= set(names)
    assert names[0] in row.seconds
    assert all(time > 0 for time in (*row.seconds.values(), *row.compile_seconds.values()))
    lhs, rhs = autotuning.operands(spec)
    assert (lhs.dtype, rhs.dtype) == (spec.dtype, spec.dtype)


def test_wide_numbers_stay_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were compiled in a block of ``jax.enable_x64``, which has ended."""
    compiled = Mock(wraps=autotuning._compiled)
    monkeypatch.setattr(autotuning, "_compiled", compiled)
    with jax.enable_x64(False):
        timed(CASES["3x3"].spec("float64"), ["im2col"], PLATFORM)
    *_, arrays = compiled.call_args.args
    assert [array.dtype for array in arrays] == ["float64"] * 2


@pytest.mark.parametrize("groups", [1, 4])
def test_a_weight_gradient_is_run_as_it_arrives(groups: int) -> None:
    """Its operands are the image and the cotangent in their own layouts, so is its result."""
    w = struct(3, 3, 4 // groups, 8)

    def gradient(x: Any, w: Any, cotangent: Any) -> Any:
        return jax.vjp(lambda w: jaxconv.conv(x, w, 2, groups=groups), w)[1](cotangent)[0]

    rows = jaxconv.explain(gradient, X, w, struct(2, 3, 3, 8)).rows
    (spec,) = [row.spec for row in rows if row.spec.weight_gradient]
    image, cotangent = autotuning.operands(spec)
    assert image.shape == X.shape
    assert cotangent.shape == (2, 3, 3, 8)
    expected = gradient(image, jnp.zeros(w.shape, "float32"), cotangent)
    for name in candidates(spec, PLATFORM)[:4]:
        compiled = autotuning._compiled(spec, name, PLATFORM, (image, cotangent)).compiled
        out = compiled(image, cotangent)
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
    row = timed(spec, [planned, *others], PLATFORM)
    assert set(row.seconds) == set(row.compile_seconds) == {planned, *others} - {refused}
    # A planned one that fails would fail in the program too.
    with pytest.raises(jax.errors.JaxRuntimeError):
        timed(spec, [refused, planned], PLATFORM)


# What it chooses


@pytest.mark.parametrize(
    ("seconds", "wins"), [(0.5, True), (0.9, True), (0.99, False), (2.0, False)]
)
def test_laxs_own_stays_unless_clearly_beaten(times: Times, seconds: float, wins: bool) -> None:
    spec = jaxconv.explain(loss, X, W).rows[0].spec
    planned, *others = candidates(spec, PLATFORM)
    times |= dict.fromkeys([planned, *others], 3.0) | {"xla": 1.0, "im2col": seconds}
    row = autotuned()
    assert (row.planned, row.chosen) == (planned, "im2col" if wins else "xla")
    assert dict(row.seconds)["im2col"] == seconds
    assert [time for _, time in row.seconds] == sorted(time for _, time in row.seconds)
    assert row.ratio == 1 / dict(row.seconds)[row.chosen]
    assert not row.known
    assert ("im2col 990.000 ms (not clearly faster)" in Tuning("cpu", (row,)).table()) == (
        seconds == 0.99
    )


def test_an_fft_must_be_twice_as_fast(times: Times) -> None:
    image, kernel = struct(1, 64, 64, 16), struct(15, 15, 16, 16)
    for seconds, wins in ((0.6, False), (0.4, True)):
        times["fft"] = seconds
        tuning = jaxconv.autotune(jaxconv.conv, image, kernel, force=True)
        assert (tuning.rows[0].chosen == "fft") == wins
        assert ("fft 600.000 ms (not 2× faster)" in tuning.table()) == (not wins)


def test_the_hopeless_are_called_once(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CASES["3x3"].spec("float32")
    names = ["im2col", "xla", "slices"]
    subjects = {name: Stub(1.0) for name in names}
    subjects["slices"].seconds = 1.0 + autotuning.HOPELESS_MEASURED
    monkeypatch.setattr(autotuning, "_compiled", lambda spec, name, *_: subjects[name])
    row = timed(spec, names, PLATFORM)
    assert subjects["slices"].calls == 1
    assert subjects["im2col"].calls > 1 < subjects["xla"].calls
    assert row.seconds == {name: subject.seconds for name, subject in subjects.items()}
    assert row.compile_seconds == dict.fromkeys(names, 0.25)
    # The planned one is timed in full, however slow.
    timed(spec, names[::-1], PLATFORM)
    assert subjects["slices"].calls > 2


def test_one_call_that_stalls_says_nothing() -> None:
    calls = [5e-3, 1e-3, 2e-3, 3e-3, 0.0]
    assert quickest(iter(calls).__next__) == 1e-3
    assert quickest(iter([1.0, 0.0]).__next__) == 1.0  # a slow one is called once


# What it keeps


def test_plans_take_what_it_chose(faster: tuple[ConvSpec, str], folder: Path) -> None:
    before, (_, other) = jaxconv.explain(loss, X, W).rows[0], faster
    row = autotuned()
    assert (row.planned, row.chosen) == (before.algorithm, other)
    after = jaxconv.explain(loss, X, W).rows[0]
    assert (after.algorithm, after.why) == (other, row.why)
    assert after.why.startswith("measured fastest (250.000 ms, measured")
    assert len(list(folder.glob("rows-*.jsonl"))) == 1
    with config.set(use_cache=False):
        assert jaxconv.explain(loss, X, W).rows[0] == before
    # Another process has them from the file.
    forget()
    assert jaxconv.explain(loss, X, W).rows[0] == after


def test_what_is_known_is_not_measured_again(
    faster: tuple[ConvSpec, str], times: Times, watched: Mock
) -> None:
    (spec, other), first = faster, autotuned()
    watched.reset_mock()
    again = autotuned()
    assert again == dataclasses.replace(first, planned=other, known=True)
    assert asked(watched) == []
    # Others of the same function are.
    tuning = jaxconv.autotune(gradient, X, W)
    assert [row.known for row in tuning.rows] == [row.spec == spec for row in tuning.rows]
    assert asked(watched) == [row.spec for row in tuning.rows if not row.known]
    assert len(asked(watched)) > 1
    assert " 1 were known before; force=True measures them again" in tuning.table()
    # On demand all are measured again; what was measured last counts.
    watched.reset_mock()
    times.clear()
    times[again.planned], times["xla"] = 2.0, 0.1
    (forced,) = jaxconv.autotune(loss, X, W, force=True).rows
    assert asked(watched) == [spec]
    assert (forced.planned, forced.chosen, forced.known) == (other, "xla", False)
    # And where the cache is not used, each time.
    with config.set(use_cache=False):
        assert not autotuned().known


def test_what_is_known_of_the_same_work_is_taken() -> None:
    """Groups of the batch are run as groups of channels."""
    case = CASES["batch groups"]
    spec = case.spec("float32")
    assert prepared(spec) != spec
    record([Timed(prepared(spec), here(PLATFORM), {"im2col": 0.001, "xla": 0.5})], PLATFORM)
    forget()
    operands = struct(*case.lhs_shape), struct(*case.rhs_shape)
    (row,) = jaxconv.autotune(jaxconv.conv_general_dilated, *operands, **case.arguments).rows
    assert row.known
    assert row.spec == spec
    assert row.chosen == "im2col"


def test_what_was_measured_but_can_not_be_taken_now_is_not_listed(times: Times) -> None:
    times |= {"im2col": 0.1, "xla": 0.5}
    assert autotuned().chosen == "im2col"
    with config.set(workspace_limit=0):
        assert "im2col" not in candidates(jaxconv.explain(loss, X, W).rows[0].spec, PLATFORM)
        row = autotuned()
    assert row.known
    assert "im2col" not in dict(row.seconds)
    assert row.chosen == "xla"


def test_what_is_compiled_next_runs_it(times: Times) -> None:
    x, w = (jnp.ones(a.shape, a.dtype) for a in (X, W))
    (row,) = jaxconv.explain(jaxconv.conv, x, w).rows
    for name in [n for n in candidates(row.spec, PLATFORM) if n in ("im2col", "xla")]:
        times.clear()
        times[name] = 0.1
        jaxconv.autotune(jaxconv.conv, x, w=w, strides=1, force=True)
        with jaxconv.enabled((PLATFORM,)):
            for f in (jaxconv.conv, jaxconv.accelerate(lax_conv), lax_conv):
                text = jax.jit(lambda x, w, f=f: f(x, w)).lower(x, w).as_text()
                assert ("stablehlo.convolution" in text) == (name == "xla")


def test_an_interrupt_keeps_what_is_measured(faster: tuple[ConvSpec, str], watched: Mock) -> None:
    spec, other = faster
    first = timed(spec, candidates(spec, PLATFORM), PLATFORM)
    watched.side_effect = [first, KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        jaxconv.autotune(gradient, X, W)
    assert asked(watched)[0] == spec
    assert plan_spec(spec, PLATFORM).algorithm == other


# How it prints


def test_report_is_a_table() -> None:
    spec = CASES["3x3"].spec("float32")
    seconds = (("im2col", 0.001), ("xla", 0.0025))
    rows = (
        Measurement(spec, "xla", "im2col", "why", seconds, 2.5),
        Measurement(spec, "im2col", "im2col", "why", seconds[:1], None, known=True),
        Measurement(spec, "xla", "xla", "why", seconds, 1.0),
        Measurement(spec, "shift", "shift", "why", seconds, None, known=True),
    )
    line, head, first, second, third, last = Tuning("cpu", rows).table().splitlines()
    assert line == (
        "Measured on cpu: 4 different convolutions. 1 changed algorithm. 2 were known before;"
        " force=True measures them again."
    )
    assert "× lax" in head
    assert first.split()[:6] == ["xla", "im2col", "1.000", "ms", "2.50", "now"]
    assert "xla 2.500 ms  " in first
    assert first.endswith(str(spec))
    assert second.split()[:6] == ["im2col", "im2col", "1.000", "ms", "–", "before"]
    assert "im2col 1.000 ms (not clearly faster)" in third
    assert last.split()[:5] == ["shift", "shift", "–", "–", "before"]
    assert "clearly" not in first + second + last
    text = Tuning("cpu", rows)._repr_html_()
    assert text.count("<tr") == 5
    assert text.count("bold") == 1
    assert "known" not in str(Tuning("cpu", rows[:1]))


def test_progress_counts_what_is_left_to_measure(
    times: Times, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    jaxconv.autotune(loss, X, W)
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    jaxconv.autotune(gradient, X, W, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    for text in ("0 of 2", "1 of 2", "float32["):
        assert text in err
    for progress in (True, False, None):  # all are known; no terminal
        jaxconv.autotune(loss, X, W, progress=progress)
    assert capsys.readouterr() == ("", "")


def test_progress_without_rich(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert len(jaxconv.autotune(loss, X, W, progress=True).rows) == 1
