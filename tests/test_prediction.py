"""Predicted times: the data they rest on, and how they choose."""

import dataclasses
import gzip
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import CASES
from typer.testing import CliRunner

import jaxconv
from jaxconv import cli
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared, refusal
from jaxconv.bench import calibrate, networks
from jaxconv.bench.regret import random_specs
from jaxconv.config import notify as forget
from jaxconv.planning import measured
from jaxconv.planning import predict as prediction
from jaxconv.planning.choose import choose
from jaxconv.planning.choose import predicted_seconds as predict
from jaxconv.planning.fit import Measured, document, fit
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.predict import calibrated

# The algorithms that only their names select.
NEVER = {"naive", "winograd4"}
DOCUMENTS = prediction.documents()
SPECS = [spec for spec in random_specs(11, 60) if spec.flops < 1e6]


@pytest.fixture
def _own_cache(tmp_path: Path) -> Iterator[None]:
    with jaxconv.config.set(cache_dir=tmp_path):
        yield
    forget()


# The data


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda d: "{device}, JAX {jax}".format(**d["origin"])
)
def test_calibrations_say_where_they_come_from(document: dict) -> None:
    told = {"platform", "device", "cores", "jax", "date", "command", "convolutions"}
    assert told <= set(document["origin"])
    assert document["origin"]["convolutions"] == len(document["points"])
    calibration = prediction.from_document(document, {})
    width = len(prediction.position(prepared(CASES["3x3"].spec(np.float32))))
    assert calibration.points.shape[1] == width
    named = {name.removesuffix(" gradient") for name in calibration.kinds}
    # One that is newer than the measurements is predicted without them; these are not.
    assert {"im2col", "xla"} <= named <= set(ALGORITHMS) - set(NEVER)
    for known in calibration.kinds.values():
        assert (known.constants >= 0).all()
        assert known.constants.any()
        assert np.isfinite(known.weights).all()


@pytest.fixture
def _elsewhere() -> Iterator[None]:
    prediction.document_for.cache_clear()
    yield
    prediction.document_for.cache_clear()


def _origin(monkeypatch: pytest.MonkeyPatch, version: str, device: str) -> tuple[str, str]:
    """JAX and device of the calibration that is taken there."""
    monkeypatch.setattr(jax, "__version__", version)
    monkeypatch.setattr(prediction, "device_class", lambda: device)
    prediction.document_for.cache_clear()
    document = prediction.document_for("cpu")
    assert document is not None
    return document["origin"]["jax"], document["origin"]["device"]


DEVICES = {document["origin"]["device"] for document in DOCUMENTS}


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("device", sorted(DEVICES))
def test_the_calibration_is_that_of_version_and_processor(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    for version in ("0.10.2", "0.11.1"):
        assert _origin(monkeypatch, version, device) == ("0.10.2", device)
    for version in ("0.12.0.1", "1.0"):
        assert _origin(monkeypatch, version, device) == ("0.12.0.1", device)


@pytest.mark.usefixtures("_elsewhere")
def test_elsewhere_the_calibration_is_of_another_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for device in ("x86_64 GenuineIntel 6 with AVX-512", "aarch64", "x86_64"):
        jax_version, taken = _origin(monkeypatch, "0.11.1", device)
        assert jax_version == "0.10.2"
        assert taken in DEVICES
    assert prediction.document_for("tpu") is None


CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
power management:
flags\t\t: fpu avx2 {flags}

processor\t: 1
flags\t\t: avx512f
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CPUINFO.format(flags="avx512f"), "AuthenticAMD 26 with AVX-512"),
        (CPUINFO.format(flags="avx512foo"), "AuthenticAMD 26"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", ""),
        ("", ""),
    ],
)
def test_the_class_of_a_processor(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: io.StringIO(text))
    monkeypatch.setattr(prediction.system, "machine", lambda: "x86_64")
    prediction.device_class.cache_clear()
    found = prediction.device_class()
    monkeypatch.undo()
    prediction.device_class.cache_clear()
    assert found == f"x86_64 {expected}".strip()


# What is predicted


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_algorithm_has_a_time(case: object, platform: str) -> None:
    spec = prepared(case.spec(np.float32))  # type: ignore[attr-defined]
    if spec.is_empty:
        return
    for name, algorithm in ALGORITHMS.items():
        if refusal(algorithm, spec) is None:
            seconds = predict(name, spec, platform)
            assert 0 < seconds < 1
            assert predict(name, spec, platform) == seconds


def test_more_work_takes_longer() -> None:
    small = prepared(CASES["3x3"].spec(np.float32))
    shape = (8, 128, 128, small.lhs_shape[-1])
    large = small.replace(lhs_shape=shape)
    for name, algorithm in ALGORITHMS.items():
        if refusal(algorithm, small) is None:
            assert predict(name, large, "cpu") > predict(name, small, "cpu")


def test_what_is_chosen_is_predicted_to_be_fast() -> None:
    for spec in SPECS:
        plan = plan_spec(spec, "cpu")
        seconds = {c.name: c.seconds for c in plan.candidates if c.reason is None}
        assert seconds[plan.algorithm] <= seconds["xla"]
        assert plan.algorithm not in NEVER


def test_highest_precision_leaves_out_other_products() -> None:
    spec = prepared(CASES["3x3"].spec(np.float32))
    spec = spec.replace(
        lhs_shape=(8, 14, 14, 256),
        rhs_shape=(3, 3, 256, 256),
        precision=(jax.lax.Precision.HIGHEST,) * 2,
    )
    assert choose(spec, "cpu")[0] not in ("winograd", "fft")


# How the data is made


def test_what_was_measured_is_kept_as_a_line() -> None:
    spec = SPECS[0]
    found = Measured(spec, {"xla": 1e-3}, {"xla": 0.01})
    assert calibrate.of_line(calibrate.as_line(found)) == found


def test_measuring_times_what_can_do_it() -> None:
    spec = min(SPECS, key=lambda spec: spec.flops)
    found = calibrate.measure(spec)
    able = {name for name, a in ALGORITHMS.items() if refusal(a, spec) is None}
    assert set(found.seconds) == able - set(NEVER)
    assert all(seconds > 0 for seconds in found.seconds.values())


@pytest.mark.parametrize("compressed", [False, True])
def test_a_calibration_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compressed: bool
) -> None:
    specs = random_specs(11, 6)
    monkeypatch.setattr(calibrate, "random_specs", lambda seed, count: specs[:count])
    monkeypatch.setattr(calibrate, "well_known", lambda: [])
    asked: list[object] = []

    def measure(spec: object) -> Measured:
        asked.append(spec)
        return Measured(spec, {"xla": 1e-3, "im2col": 2e-3}, {"xla": 0.1})  # type: ignore[arg-type]

    monkeypatch.setattr(calibrate, "measure", measure)
    file = tmp_path / "made.json"
    for count in (4, 6):
        calibrate.main([str(file), "--convolutions", str(count)])
    assert asked == specs
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["origin"]["convolutions"] == len(document["points"]) == 6

    kept, again = tmp_path / "made.json.measured", tmp_path / "again.json"
    if compressed:
        packed = tmp_path / "measured.jsonl.gz"
        packed.write_bytes(gzip.compress(kept.read_bytes()))
        kept = packed
    calibrate.main([str(again), "--measured", str(kept)])
    assert json.loads(again.read_text(encoding="utf-8")) == document
    assert asked == specs


def test_well_known_convolutions_are_calibrated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(net: Any, x: Any) -> Any:
        return net.logits(net.conv(x, 13, 3, 2), 5)

    # Tracing the steps of whole ones takes half a minute.
    network = networks.Network("two layers", layers, (12, 12, 2))
    monkeypatch.setattr(calibrate, "NETWORKS", (network,))
    with jax.numpy_rank_promotion("allow"):  # as users have it
        specs = calibrate.well_known()
    assert len(specs) == len(set(specs)) > 150
    assert {True, False} == {spec.weight_gradient for spec in specs}
    # The network's step, of one image and of eight: forward, and the gradient of its kernel.
    own = [spec for spec in specs if spec.out_channels == 13]
    assert [spec.weight_gradient for spec in own] == [False, True] * 2
    assert {layer.spec for layer in calibrate.LAYERS if "forward" in layer.directions} <= set(specs)


def test_a_fit_gives_back_what_it_was_given() -> None:
    """Times that are the formula's own are predicted within 10 %, and the file holds them."""
    truth = prediction.calibrated("cpu")
    rows = []
    for spec in map(prepared, random_specs(12, 150)):
        seconds = {
            name: truth.seconds(algorithm, spec)
            for name, algorithm in ALGORITHMS.items()
            if name in ("im2col", "xla") and refusal(algorithm, spec) is None
        }
        rows.append(Measured(spec, seconds, dict.fromkeys(seconds, 0.1)))
    made = fit(rows)
    read = prediction.from_document(document(made, calibrate.origin()), {})
    misses = []
    for row in rows:
        for name, seconds in row.seconds.items():
            again = read.seconds(ALGORITHMS[name], row.spec)
            assert math.isclose(again, made.seconds(ALGORITHMS[name], row.spec), rel_tol=0.05)
            misses.append(abs(math.log(again / seconds)))
    assert np.median(misses) < 0.1


def test_what_was_measured_is_predicted_as_it_was() -> None:
    """However far it is from what its neighbours take."""
    truth = prediction.calibrated("cpu")
    xla = ALGORITHMS["xla"]
    specs = [s for s in map(prepared, random_specs(12, 150)) if refusal(xla, s) is None]
    seconds = [truth.seconds(xla, spec) for spec in specs]
    odd = 17
    seconds[odd] *= 3
    made = fit(
        [Measured(spec, {"xla": taken}, {}) for spec, taken in zip(specs, seconds, strict=True)]
    )
    assert math.isclose(made.seconds(xla, specs[odd]), seconds[odd], rel_tol=0.2)
    others = [
        abs(math.log(made.seconds(xla, spec) / taken))
        for i, (spec, taken) in enumerate(zip(specs, seconds, strict=True))
        if i != odd
    ]
    assert np.median(others) < 0.1


# A machine's own


@pytest.mark.usefixtures("_own_cache")
def test_tuning_scales_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = prepared(SPECS[0])
    before = predict("xla", spec, "cpu")
    slow = Measured(spec, {"xla": 3 * before}, {})
    monkeypatch.setattr(calibrate, "_sample", lambda: iter([spec] * 3))
    monkeypatch.setattr(calibrate, "measure", lambda spec, names: slow)
    shown: list[str] = []
    tuned = calibrate.tune(60, shown.append)
    assert shown == [str(spec)] * 3
    ((kind, ratios),) = tuned.ratios.items()
    assert len(ratios) == 3
    assert math.isclose(tuned.factors[kind], 3)
    assert "measured over predicted" in str(tuned)
    assert math.isclose(predict("xla", spec, "cpu"), 3 * before)
    # Tuned again, the factor is of the package's prediction, not of the tuned one.
    assert math.isclose(calibrate.tune(60).factors[kind], 3)
    with jaxconv.config.set(use_cache=False):
        assert math.isclose(predict("xla", spec, "cpu"), before)


@pytest.mark.usefixtures("_own_cache")
def test_a_slower_machine_has_slower_parts_once() -> None:
    spec = prepared(CASES["transposed"].spec(np.float32))
    before = {name: predict(name, spec, "cpu") for name in ("phase", "xla", "im2col")}
    measured.record_scales("cpu", dict.fromkeys(calibrated("cpu").kinds, 2.0))
    forget()
    for name, seconds in before.items():
        assert 1.5 * seconds < predict(name, spec, "cpu") <= 2.001 * seconds, name
    assert all(ALGORITHMS[name].parts is None for name in calibrate._fastest(spec))


def test_the_command_line_says_where_it_can_not_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "document_for", lambda platform: None)
    result = CliRunner().invoke(cli.app, ["tune", "--seconds", "1"])
    assert result.exit_code == 2
    assert "jaxconv.autotune" in result.stderr


def test_factors_of_few_samples_are_drawn_to_what_all_have_in_common() -> None:
    many, few = calibrate.factors({"im2col": [2.0] * 99, "shift": [4.0] * 2}).values()
    assert math.isclose(many, 2)
    assert 2 < few < 2.3


@pytest.mark.usefixtures("_own_cache")
def test_factors_of_no_use_are_ignored() -> None:
    measured.record_scales("cpu", {"xla": 2.0, "im2col": -1.0, "shift": "fast"})  # type: ignore[dict-item]
    with pytest.warns(UserWarning, match="invalid factors"):
        assert measured.scales("cpu") == {"xla": 2.0}


@pytest.mark.usefixtures("_own_cache")
def test_the_command_line_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(SPECS[0])
    monkeypatch.setattr(calibrate, "_sample", lambda: iter([small]))
    result = CliRunner().invoke(cli.app, ["tune", "--seconds", "1"])
    assert result.exit_code == 0, result.output
    assert "Timed 1 random convolutions" in result.output
