"""Predicted times: the rows that they rest on, how sure they are, and how they choose."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax import lax

import jaxconv
from jaxconv.algorithms import ALGORITHMS, xla
from jaxconv.algorithms.base import prepared, unsupported
from jaxconv.bench.regret import random_specs
from jaxconv.config import notify as forget
from jaxconv.planning import measured
from jaxconv.planning import predict as prediction
from jaxconv.planning.choose import choose, decide
from jaxconv.planning.measured import Machine, Row, package_rows
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.predict import Model, Time, predicted
from jaxconv.spec import ConvSpec

# The algorithms that only their names select.
NEVER = {"naive", "winograd4"}
SPECS = [spec for spec in random_specs(11, 60) if spec.flops < 1e6]
# Many alike: small images, of which rows can be made up.
LIKE = [
    ConvSpec(
        (1, n, n, c),
        (3, 3, c, 8),
        (1, 1),
        ((1, 1), (1, 1)),
        (1, 1),
        (1, 1),
        np.dtype(np.float32),
        np.dtype(np.float32),
    )
    for n in (8, 12, 16, 20, 24, 32)
    for c in (4, 8, 16, 32)
]
HERE = Machine("cpu", "a", 2, "0.12.0", own=True)
THERE = dataclasses.replace(HERE, own=False)


def rows_of(seconds: dict[str, float], machine: Machine = THERE) -> list[Row]:
    """Rows of ``LIKE``: each algorithm takes a multiple of the roofline."""
    return [
        Row(spec, machine, {name: time * floor(spec) for name, time in seconds.items()})
        for spec in LIKE
    ]


def floor(spec: ConvSpec) -> float:
    return prediction.roofline(spec.flops, spec.operand_bytes)


# The rows


def test_rows_say_where_they_come_from() -> None:
    machines = {row.machine for row in package_rows()}
    assert {m.platform for m in machines} == {"cpu"}
    assert {prediction.version(m.jax) for m in machines} == {(0, 10), (0, 12)}
    assert {m.cores for m in machines} == {1, 2}
    assert all(m.processor and m.note and not m.own for m in machines)
    for row in package_rows():
        assert set(row.seconds) <= set(ALGORITHMS) - NEVER
        assert all(0 < time < 100 for time in row.seconds.values())


def test_data_are_small() -> None:
    folder = Path(measured.__file__).parent / "data"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 300_000


def test_places_are_those_of_the_rows() -> None:
    """If not, ``python -m jaxconv.bench.calibrate`` writes them anew."""
    for spec, place in {row.spec: row.place for row in package_rows()}.items():
        assert place is not None
        np.testing.assert_allclose(place, prediction.place(spec), atol=6e-4)


EVERY = [
    *random_specs(12, 40),
    *(case.spec(np.float32) for case in CASES.values()),
    LIKE[0].replace(dtype=np.dtype(jnp.bfloat16), precision=(lax.Precision.HIGHEST,) * 2),
    LIKE[0].replace(dtype=np.dtype(jnp.int4), out_dtype=np.dtype(np.int32), batch_group_count=1),
]


def test_a_spec_is_kept_as_it_is() -> None:
    for spec in EVERY:
        assert measured.spec_of(json.loads(measured.key(spec))) == spec
    assert len({measured.key(spec) for spec in set(EVERY)}) == len(set(EVERY))
    assert measured.key(LIKE[0]) == (
        '{"lhs_shape": [1, 8, 8, 4], "rhs_shape": [3, 3, 4, 8], "padding": [[1, 1], [1, 1]]}'
    )


def test_rows_are_read_as_they_were_written() -> None:
    rows = [
        Row(spec, machine, {"xla": 1.23e-3 * (i + 1), "im2col": 4.56e-7}, {"xla": 0.12})
        for i, spec in enumerate(LIKE[:3])
        for machine in (THERE, dataclasses.replace(THERE, cores=1, note="yesterday"))
    ]
    again = list(measured.read(list(measured.written(rows, prediction.place))))
    assert [(row.spec, row.machine) for row in again] == [(row.spec, row.machine) for row in rows]
    assert again[1].machine.note == "yesterday"
    for one, other in zip(rows, again, strict=True):
        chex.assert_trees_all_close(dict(other.seconds), dict(one.seconds), rtol=5e-3)
        chex.assert_trees_all_close(dict(other.compile_seconds), dict(one.compile_seconds))


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
    monkeypatch.setattr(measured.system, "machine", lambda: "x86_64")
    measured._cpuinfo.cache_clear()
    found = measured.processor_class()
    monkeypatch.undo()
    measured._cpuinfo.cache_clear()
    assert found == f"x86_64 {expected}".strip()


@pytest.mark.parametrize(("limit", "wide"), [("AVX2", False), ("avx", False), ("AMX", True)])
def test_the_class_is_of_what_xla_may_use(
    monkeypatch: pytest.MonkeyPatch, limit: str, wide: bool
) -> None:
    monkeypatch.setattr(measured, "_cpuinfo", lambda: {"flags": "fpu avx512f"})
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_max_isa={limit} --xla_dump_to=/tmp")
    assert ("with AVX-512" in measured.processor_class()) == wide


@pytest.mark.parametrize(
    ("cores", "devices", "share"), [(8, 1, 8), (8, 3, 2), (2, 4, 1), (8, 0, 8), (None, 1, 1)]
)
def test_devices_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, devices: int, share: int
) -> None:
    monkeypatch.setattr(measured, "cores", lambda: cores)
    monkeypatch.setattr(measured, "_devices", lambda platform: ["cpu"] * devices)
    assert measured.here.__wrapped__("cpu").cores == share
    identity = measured.fingerprint.__wrapped__("cpu")
    assert identity is not None
    assert (f" for {devices} devices" in identity["device"]) == (devices > 1)


def test_several_processes_plan_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On whatever hosts they are, and whatever they measured."""
    specs = list(map(prepared, SPECS[:30]))

    def plans(processor: str, cores: int, fastest: str) -> tuple[Machine, list[tuple[str, str]]]:
        monkeypatch.setattr(measured, "processor_class", lambda: processor)
        monkeypatch.setattr(measured, "cores", lambda: cores)
        with jaxconv.config.set(cache_dir=tmp_path / processor):
            caches()
            times = dict.fromkeys(("im2col", "xla"), 1.0) | {fastest: 0.001}
            measured.record([Row(spec, HERE, times) for spec in specs], "cpu")
            forget()
            return measured.here("cpu"), [choose(spec, "cpu") for spec in specs]

    def caches() -> None:
        measured.here.cache_clear()
        measured.fingerprint.cache_clear()

    hosts = ("x86_64 AuthenticAMD 25", 2, "im2col"), ("x86_64 GenuineIntel 6", 64, "xla")
    try:
        apart = [plans(*host) for host in hosts]
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        together = [plans(*host) for host in hosts]
    finally:
        monkeypatch.undo()
        caches()
        forget()
    assert apart[0] != apart[1]
    assert together[0] == together[1]
    machine, chosen = together[0]
    assert (machine.processor, machine.cores) == ("", 2)
    assert not any("was measured" in why for _, why in chosen)


# The interpolation


@pytest.mark.parametrize("n", [0, 1, 2, 7, 160])
def test_solution_by_halves(n: int) -> None:
    rng = np.random.default_rng(n)
    root, vector = rng.standard_normal((n, n)), rng.standard_normal(n)
    matrix = root @ root.T + np.eye(n)
    expected = np.linalg.solve(matrix, vector)
    np.testing.assert_allclose(prediction._solution(matrix, vector), expected, rtol=1e-9)


def test_what_is_solved_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 100 rows on OpenBLAS takes more stack than threads of XLA may have."""
    sizes = []
    solve = np.linalg.solve

    def watched(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
        sizes.append(len(matrix))
        return solve(matrix, vector)

    monkeypatch.setattr(np.linalg, "solve", watched)
    for spec in LIKE:
        Model(package_rows(), HERE).predict("xla", spec)
    assert 0 < max(sizes) <= (prediction.NEAREST + prediction.OWN_NEAREST) // 2 < 100


def test_what_was_measured_is_predicted_as_it_was() -> None:
    """However far it is from what its neighbours take."""
    rows = rows_of({"xla": 2.0, "im2col": 3.0})
    odd = rows[9]
    rows[9] = dataclasses.replace(odd, seconds={"xla": 6.0 * floor(odd.spec)})
    model = Model(rows, HERE)
    for row in rows:
        for name, seconds in row.seconds.items():
            time = model.predict(name, row.spec)
            assert time is not None
            assert abs(math.log(time.seconds / seconds)) < 0.25
    assert model.predict("shift", LIKE[0]) is None


def test_between_rows_it_is_as_there() -> None:
    model = Model(rows_of({"xla": 2.0}), HERE)
    for n, c in ((10, 6), (14, 24), (28, 12)):
        spec = LIKE[0].replace(lhs_shape=(1, n, n, c), rhs_shape=(3, 3, c, 8))
        time = model.predict("xla", spec)
        assert time is not None
        assert abs(math.log(time.seconds / (2 * floor(spec)))) < 0.15


def test_it_is_less_sure_away_from_rows() -> None:
    model = Model(rows_of({"xla": 2.0}), HERE)
    row, near = LIKE[5], LIKE[5].replace(lhs_shape=(1, 14, 14, 8))
    far = LIKE[5].replace(
        lhs_shape=(8, 90, 90, 512),
        rhs_shape=(31, 31, 1, 512),
        window_strides=(4, 4),
        feature_group_count=512,
    )
    sigmas = [model.predict("xla", spec).sigma for spec in (row, near, far)]  # type: ignore[union-attr]
    assert sigmas == sorted(sigmas)
    assert sigmas[0] < 0.5 * sigmas[2]


@pytest.mark.parametrize(
    "changes",
    [{"processor": "b"}, {"jax": "0.13.0"}, {"cores": 4}],
    ids=["processor", "version", "cores"],
)
def test_it_is_less_sure_on_other_machines(changes: dict[str, Any]) -> None:
    rows = rows_of({"xla": 2.0})
    here = Model(rows, HERE).predict("xla", LIKE[5])
    there = Model(rows, dataclasses.replace(HERE, **changes)).predict("xla", LIKE[5])
    assert here is not None
    assert there is not None
    assert there.sigma > 1.1 * here.sigma


def test_it_is_less_sure_the_more_cores_there_are() -> None:
    rows = [*rows_of({"xla": 2.0}), *rows_of({"xla": 3.0}, dataclasses.replace(THERE, cores=1))]
    machines = [dataclasses.replace(HERE, cores=n) for n in (2, 4, 16, 64)]
    sigmas = [Model(rows, m).predict("xla", LIKE[5]).sigma for m in machines]  # type: ignore[union-attr]
    assert sigmas == sorted(set(sigmas))


def test_what_gains_by_cores_gains_by_more() -> None:
    one = dataclasses.replace(THERE, cores=1)
    rows = [*rows_of({"xla": 4.0, "shift": 3.0}, one), *rows_of({"xla": 2.0, "shift": 3.0})]
    for spec in LIKE[3:20:4]:
        times = [
            {
                name: Model(rows, dataclasses.replace(HERE, cores=n)).predict(name, spec)
                for name in ("xla", "shift")
            }
            for n in (1, 2, 8)
        ]
        ratios = [t["xla"].seconds / t["shift"].seconds for t in times]  # type: ignore[union-attr]
        assert ratios[0] > 1.2 > 0.85 > ratios[1] > 1.5 * ratios[2]


def test_the_users_rows_say_more_than_the_packages() -> None:
    """A machine on which one algorithm is slow: half of its convolutions are measured."""
    own = rows_of({"xla": 2.0, "shift": 4.0}, HERE)[::2]
    model = Model([*rows_of({"xla": 2.0, "shift": 1.0}), *own], HERE)
    for spec in LIKE[1::2]:
        shift, by_xla = model.predict("shift", spec), model.predict("xla", spec)
        assert shift is not None
        assert by_xla is not None
        assert shift.seconds > 0.75 * by_xla.seconds  # by the package's rows, 0.5


def test_relations_are_a_covariance() -> None:
    machines = [
        Machine("cpu", processor, cores, version, own)
        for processor in "ab"
        for cores in (1, 2, 16)
        for version in ("0.10.2", "0.12.0.1")
        for own in (True, False)
    ]
    matrix = np.array([[prediction.relation(a, b) for b in machines] for a in machines])
    np.testing.assert_allclose(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > -1e-9


# What is predicted


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_algorithm_has_a_time(case: Any, platform: str) -> None:
    spec = prepared(case.spec(np.float32))
    if spec.is_empty:
        return
    for name, algorithm in ALGORITHMS.items():
        if unsupported(algorithm, spec) is None:
            time = predicted(name, spec, platform)
            assert 0 < time.seconds < 1
            assert 0 < time.sigma < 3
            assert predicted(name, spec, platform) == time


def test_more_work_takes_longer() -> None:
    small = prepared(CASES["3x3"].spec(np.float32))
    shape = (8, 128, 128, small.lhs_shape[-1])
    large = small.replace(lhs_shape=shape)
    for name, algorithm in ALGORITHMS.items():
        if unsupported(algorithm, small) is None:
            assert predicted(name, large, "cpu").seconds > predicted(name, small, "cpu").seconds


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


DENSE = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    ("shape", "kernel", "params", "expected"),
    [
        ((1, 6, 6, 4), (5, 5, 4, 3), {"padding": "SAME"}, False),
        ((1, 6, 4, 4), (5, 5, 4, 3), {"padding": "SAME"}, True),
        ((1, 5, 5, 4), (5, 5, 4, 3), {"padding": "VALID"}, False),
        ((1, 5, 4, 4), (5, 5, 4, 3), {"padding": ((0, 0), (1, 1))}, True),
        ((1, 1, 1, 4), (3, 3, 4, 3), {"padding": ((2, 2), (2, 2))}, False),
        ((1, 3, 3, 4), (5, 5, 1, 8), {"padding": "SAME", "feature_group_count": 4}, False),
    ],
)
def test_xla_exchanges_operands_where_predictions_say(
    shape: tuple[int, ...], kernel: tuple[int, ...], params: dict[str, Any], expected: bool
) -> None:
    operands = [jax.ShapeDtypeStruct(s, np.float32) for s in (shape, kernel)]

    def convolved(lhs: Any, rhs: Any) -> Any:
        return lax.conv_general_dilated(lhs, rhs, (1, 1), dimension_numbers=DENSE, **params)

    plan = jaxconv.plan(*operands, (1, 1), dimension_numbers=DENSE, **params)
    assert xla.swapped(prepared(plan.spec)) == expected
    text = jax.jit(convolved).lower(*operands).compile().as_text()
    assert ("rhs_reversal" in str(text)) == expected


# The decision


def decided(**times: tuple[float, float]) -> str:
    return decide({n: Time(*t) for n, t in times.items()}, "cpu")[0]


def test_xla_is_left_only_for_a_likely_gain() -> None:
    assert decided(xla=(1.0, 0.1), shift=(0.8, 0.1)) == "shift"
    assert decided(xla=(1.0, 1.0), shift=(0.8, 1.0)) == "xla"
    assert decided(xla=(1.0, 1.0), shift=(0.05, 1.0)) == "shift"
    assert decided(xla=(1.0, 0.01), shift=(0.99, 0.01)) == "xla"
    assert decided(im2col=(1.0, 1.0), shift=(0.9, 1.0)) == "shift"
    assert decided(xla=(0.5, 1.0), shift=(0.9, 1.0)) == "xla"


def test_it_says_how_sure_it_is() -> None:
    name, why = decide({"xla": Time(2e-3, 0.1), "shift": Time(1e-3, 0.2)}, "cpu")
    assert (name, why) == (
        "shift",
        "it is predicted to be the fastest (1.000 ms ×/÷ 1.2, XLA's own 2.000 ms ×/÷ 1.1)",
    )
    name, why = decide({"xla": Time(1e-3, 0.5), "shift": Time(9e-4, 0.5)}, "cpu")
    assert (name, why) == (
        "xla",
        "no other is likely to be faster (1.000 ms ×/÷ 1.6, shift 0.900 ms ×/÷ 1.6)",
    )
    measured_times = {"xla": Time(1e-3, 0.03, True), "shift": Time(9.9e-4, 0.03, True)}
    assert "no other was measured to be clearly faster" in decide(measured_times, "cpu")[1]
    assert decide({"xla": Time(1.0, 1.0)}, "cpu") == ("xla", "no other can be taken")


def test_unknown_machines_take_only_large_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choices elsewhere are those of here, or XLA's own."""
    specs = [
        s for s in map(prepared, random_specs(5, 40)) if unsupported(ALGORITHMS["xla"], s) is None
    ]
    forget()
    here = {spec: choose(spec, "cpu")[0] for spec in specs}
    machine = Machine("cpu", "an unknown one", 64, "0.99", own=True)
    monkeypatch.setattr(prediction, "here", lambda platform: machine)
    forget()
    there = {spec: choose(spec, "cpu")[0] for spec in specs}
    monkeypatch.undo()
    forget()
    of_xla = [sum(name == "xla" for name in choices.values()) for choices in (here, there)]
    assert of_xla[1] > of_xla[0]
    assert of_xla[1] < len(specs)
