"""How the package's rows are made, and what ``jaxconv tune`` measures and teaches."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import children
import jax
import numpy as np
import pytest
from cases import CASES

import jaxconv
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared, unsupported
from jaxconv.bench import calibrate
from jaxconv.bench.cases import LAYERS, random_specs
from jaxconv.bench.programs import convolutions_of
from jaxconv.config import notify as forget
from jaxconv.planning import rows as stored
from jaxconv.planning.machine import Machine, here
from jaxconv.planning.predict import predicted
from jaxconv.planning.rows import Timed
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune as autotuning

Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]
PLATFORM = jax.default_backend()
SPECS = [
    spec
    for spec in random_specs(11, 60)
    if spec.flops < 1e7
    and spec.dtype == np.float32
    and unsupported(ALGORITHMS["xla"], spec) is None
    and not spec.weight_gradient
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    """A cache of its own."""
    with jaxconv.config.set(cache_dir=tmp_path / "cache", use_cache=True):
        yield tmp_path / "cache"
    forget()


# The package's rows


def timing(monkeypatch: Patch, seconds: Callable[..., dict[str, float]]) -> list[Any]:
    """Measures as ``seconds`` says, of names, a spec and a platform: what is measured, in order."""
    specs: list[ConvSpec] = []

    def timed(spec: ConvSpec, names: list[str], platform: str, _: float) -> Timed:
        specs.append(spec)
        times = seconds(names, spec, platform)
        return Timed(spec, here(platform), times, dict.fromkeys(times, 0.5))

    monkeypatch.setattr(autotuning, "timed", timed)
    return specs


@pytest.fixture
def asked(monkeypatch: Patch) -> list[ConvSpec]:
    """What was measured: in this order, and at once."""
    monkeypatch.setattr(calibrate, "in_order", lambda: SPECS[:6])
    return timing(monkeypatch, lambda names, *_: {name: i for i, name in enumerate(names, 1)})


def interrupt(monkeypatch: Patch, asked: list[ConvSpec], count: int) -> None:
    """Once so many were measured."""
    measuring = autotuning.timed

    def interrupted(*args: Any) -> Timed:
        if len(asked) == count:
            raise KeyboardInterrupt
        return measuring(*args)

    monkeypatch.setattr(autotuning, "timed", interrupted)


def test_a_file_goes_on_where_it_ended(
    asked: list[ConvSpec], tmp_path: Path, monkeypatch: Patch
) -> None:
    file = tmp_path / "measured.jsonl"
    with monkeypatch.context() as patched:
        interrupt(patched, asked, 4)
        with pytest.raises(KeyboardInterrupt):
            calibrate.main([str(file)])
    assert asked == SPECS[:4]
    calibrate.main([str(file)])
    assert asked == SPECS[:6]
    rows = calibrate.load(file)
    assert [row.spec for row in rows] == SPECS[:6]
    assert {row.machine for row in rows} == {calibrate.origin()}
    assert not calibrate.origin().own
    assert re.match(r"\d{4}-\d\d-\d\d, python -m jaxconv", rows[0].machine.note)
    for row in rows:
        assert row.seconds["xla"] > 0
        assert set(row.seconds) == set(row.compile_seconds)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    monkeypatch.setattr(calibrate, "here", lambda platform: Machine(platform, "Z80", 1, "1"))
    with pytest.raises(ValueError, match=r"is of another machine, .*; this is .*Z80"):
        calibrate.main([str(file)])
    assert asked == SPECS[:6]


def test_files_are_merged(tmp_path: Path, capsys: Capture) -> None:
    here_, other = calibrate.origin(), Machine("cpu", "Z80", 1, "0.1")

    def row(spec: ConvSpec, machine: Machine, seconds: float) -> Timed:
        return Timed(spec, machine, {"xla": seconds, "im2col": 0.002}, {"xla": 0.25})

    into, *files = (tmp_path / text for text in ("into", "first", "second"))
    first = [row(SPECS[0], here_, 0.001), row(SPECS[1], here_, 0.001)]
    second = [row(SPECS[1], here_, 0.003), row(SPECS[1], other, 0.004)]
    for file, rows in zip(files, (first, second), strict=True):
        calibrate.save(file, rows)
        calibrate.main([str(file), "--into", str(into)])
    assert calibrate.load(into) == [first[0], *second]
    assert capsys.readouterr().out == f"{into}: 2 rows\n{into}: 3 rows\n"


def test_an_interrupted_calibration_is_a_fair_sample(monkeypatch: Patch) -> None:
    drawn, rows = random_specs(calibrate.SEED, 7), [Timed(spec, here("cpu"), {}) for spec in SPECS]
    monkeypatch.setattr(calibrate, "package_rows", lambda: rows)
    monkeypatch.setattr(calibrate, "LAYERS", LAYERS[:1])
    monkeypatch.setattr(calibrate, "RANDOM", 7)
    order, layer = calibrate.in_order(), convolutions_of(LAYERS[:1])
    assert len(layer) == 3
    assert set(order) == {*SPECS, *drawn, *layer}
    assert len(order) == len(set(order))
    assert [spec for spec in order if spec in SPECS] != SPECS
    assert not set(order[-7:]) <= set(drawn)
    assert calibrate.in_order() == order


# A user's own


@pytest.fixture
def slow(monkeypatch: Patch) -> list[ConvSpec]:
    """A machine on which everything takes three times as long as predicted; what was measured."""
    if PLATFORM != "cpu":
        pytest.skip("the package has no rows to learn from")

    def slowly(names: list[str], spec: ConvSpec, platform: str) -> dict[str, float]:
        with jaxconv.config.set(use_cache=False):
            return {name: 3 * predicted(name, prepared(spec), platform).seconds for name in names}

    monkeypatch.setattr(calibrate, "_sample", lambda: iter(SPECS[:3]))
    return timing(monkeypatch, slowly)


def test_tuning_teaches_predictions(slow: list[ConvSpec], folder: Path, monkeypatch: Patch) -> None:
    base = CASES["3x3"].spec("float32").replace(rhs_shape=(3, 3, 32, 32))
    alike = [base.replace(lhs_shape=(2, size, size, 32)) for size in range(26, 31)]
    near = alike.pop(2)
    monkeypatch.setattr(calibrate, "_sample", lambda: iter(alike))
    before = predicted("xla", near, PLATFORM)
    tuned = calibrate.tune(60)
    assert slow == alike
    assert (tuned.platform, tuned.convolutions) == (PLATFORM, 4)
    assert len(tuned.before["xla"]) == len(tuned.after["xla"]) == 4
    np.testing.assert_allclose(tuned.before["xla"], 3)
    assert max(tuned.after["xla"]) < 2
    after = predicted("xla", near, PLATFORM)
    assert after.seconds > 1.5 * before.seconds
    assert after.sigma < before.sigma
    assert [row.spec for row in stored.own_rows(PLATFORM).values()] == alike
    assert tuned.file is not None
    assert list(folder.glob("rows-*.jsonl")) == [tuned.file]
    with jaxconv.config.set(use_cache=False):
        assert predicted("xla", near, PLATFORM) == before


def test_tuned_again_it_times_others(slow: list[ConvSpec], monkeypatch: Patch) -> None:
    calibrate.tune(60)
    slow.clear()
    monkeypatch.setattr(calibrate, "_sample", lambda: iter(SPECS[:4]))
    tuned = calibrate.tune(60)
    assert tuned.convolutions == 1
    assert slow == SPECS[3:4]
    assert len(stored.own_rows(PLATFORM)) == 4
    # The half that the one convolution would be predicted from is empty.
    assert tuned.before == tuned.after != {}


def test_the_sample_never_ends_and_is_small() -> None:
    sample = calibrate._sample()
    specs = [next(sample) for _ in range(60)]  # more than one seed's
    assert len(set(specs)) > 50
    for spec in specs:
        assert spec.flops <= calibrate.FLOPS
        assert spec.dtype == np.float32
    names = autotuning.candidates(specs[0], "cpu", calibrate.FASTEST)
    assert "xla" in names
    assert len(names) == len(set(names)) <= calibrate.FASTEST + 2


def test_an_interrupted_tuning_keeps_what_it_has(slow: list[ConvSpec], monkeypatch: Patch) -> None:
    interrupt(monkeypatch, slow, 2)
    with pytest.raises(KeyboardInterrupt):
        calibrate.tune(60)
    assert [row.spec for row in stored.own_rows(PLATFORM).values()] == SPECS[:2]
    xla = predicted("xla", prepared(SPECS[0]), PLATFORM)
    with jaxconv.config.set(use_cache=False):
        assert xla.seconds > predicted("xla", prepared(SPECS[0]), PLATFORM).seconds


def test_the_report_prints_medians_and_quartiles(tmp_path: Path) -> None:
    before, after = {"xla": [1.0, 3.0, 2.0]}, {"xla": [0.5, 1.0, 1.5], "im2col": [4.0]}
    tuned = calibrate.Tuned("cpu", 3, before, after, tmp_path / "rows.json")
    *_, head, im2col, xla, kept, undo = tuned.table().splitlines()
    assert head.split() == ["algorithm", "convolutions", "before", "after"]
    assert im2col.split() == ["im2col", "1", "–", "4.00", "(4.00–4.00)"]
    assert xla.split() == ["xla", "3", "2.00", "(1.50–2.50)", "1.00", "(0.75–1.25)"]
    assert kept == f"Kept in {tmp_path / 'rows.json'}."
    assert "jaxconv tune --forget" in undo
    assert "Kept in this process only." in str(calibrate.Tuned("cpu", 0, {}, {}, None))


@pytest.mark.usefixtures("slow")
def test_the_command_line_tunes_and_forgets(
    folder: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = children.command(capsys, "tune", "--seconds", 60)
    assert code == 0, err
    assert "Timed 3 random convolutions" in out
    (file,) = folder.glob("rows-*.jsonl")
    assert str(file) in out
    for count in (3, 0):
        code, out, _ = children.command(capsys, "tune", "--forget")
        assert code == 0
        assert out.startswith(f"Dropped {count} convolutions")
        assert not file.exists()


def test_the_command_line_says_where_it_can_not_tune(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(calibrate, "package_machines", lambda: [])
    code, _, err = children.command(capsys, "tune", "--seconds", 1)
    assert code == 2
    assert err.startswith("jaxconv: tune: it takes a platform with measured predictions")


def test_tuning_measures(monkeypatch: Patch) -> None:
    if PLATFORM != "cpu":
        pytest.skip("the package has no rows to learn from")
    monkeypatch.setattr(calibrate, "EACH", 0.0)
    small = min(SPECS, key=lambda spec: spec.flops)
    monkeypatch.setattr(calibrate, "_sample", lambda: iter([small]))
    assert calibrate.tune(60).convolutions == 1
    (row,) = stored.own_rows(PLATFORM).values()
    assert "xla" in row.seconds
    assert all(time > 0 for time in row.seconds.values())
