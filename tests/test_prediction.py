"""Predicted times: the rows that they rest on, how sure they are, and how they choose."""

import dataclasses
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, case_of
from jax import lax

import jaxconv
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared, unsupported
from jaxconv.bench.cases import random_specs
from jaxconv.config import notify as forget
from jaxconv.planning import machine as machines
from jaxconv.planning import position
from jaxconv.planning import predict as prediction
from jaxconv.planning import rows as stored
from jaxconv.planning.choose import choose, decide
from jaxconv.planning.machine import Machine
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.predict import Model, Time, predicted
from jaxconv.planning.rows import Timed, package_rows
from jaxconv.spec import ConvSpec

# The algorithms that only their names select.
NEVER = {"naive", "winograd4"}
SPECS = [spec for spec in random_specs(11, 60) if spec.flops < 1e6]
# Many alike: small images, of which rows can be made up.
LIKE = [
    case_of((1, n, n, c), (3, 3, c, 8)).spec(np.dtype(np.float32))
    for n in (8, 12, 16, 20, 24, 32)
    for c in (4, 8, 16, 32)
]
HERE = Machine("cpu", "a", 2, "0.12.0", own=True)
THERE = dataclasses.replace(HERE, own=False)


def rows_of(seconds: dict[str, float], machine: Machine = THERE) -> list[Timed]:
    """Rows of ``LIKE``: each algorithm takes a multiple of the roofline."""
    return [
        Timed(spec, machine, {name: time * floor(spec) for name, time in seconds.items()})
        for spec in LIKE
    ]


def floor(spec: ConvSpec) -> float:
    return position.roofline(spec.flops, spec.operand_bytes)


# The rows


def test_rows_say_where_they_come_from() -> None:
    found = {row.machine for row in package_rows()}
    assert {m.platform for m in found} == {"cpu"}
    assert {prediction.release(m.jax) for m in found} == {(0, 10), (0, 12)}
    assert {m.cores for m in found} == {1, 2}
    assert all(m.processor and m.note and not m.own for m in found)
    for row in package_rows():
        assert set(row.seconds) <= set(ALGORITHMS) - NEVER
        assert all(0 < time < 100 for time in row.seconds.values())


def test_data_are_small() -> None:
    folder = Path(stored.__file__).parent / "data"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 300_000


def test_places_are_those_of_the_rows() -> None:
    """If not, ``python -m jaxconv.bench.calibrate`` writes them anew."""
    for row in {row.spec: row for row in package_rows()}.values():
        anew, placed = dataclasses.replace(row, position=(), floors={}).placed(), row.placed()
        np.testing.assert_allclose(placed.position, anew.position, atol=6e-4)
        assert placed.floors == pytest.approx(placed.floors | anew.floors, abs=6e-3)


EVERY = [
    *random_specs(12, 40),
    *(case.spec(np.float32) for case in CASES.values()),
    LIKE[0].replace(dtype=np.dtype(jnp.bfloat16), precision=(lax.Precision.HIGHEST,) * 2),
    LIKE[0].replace(dtype=np.dtype(jnp.int4), out_dtype=np.dtype(np.int32), batch_group_count=1),
]


def test_a_spec_is_kept_as_it_is() -> None:
    for spec in EVERY:
        assert stored.spec_of(json.loads(stored._text(stored.fields_of(spec)))) == spec


def test_rows_are_read_as_they_were_written() -> None:
    rows = [
        Timed(spec, machine, {"xla": 1.23e-3 * (i + 1), "im2col": 4.56e-7}, {"xla": 0.12})
        for i, spec in enumerate(LIKE[:3])
        for machine in (THERE, dataclasses.replace(THERE, cores=1, note="yesterday"))
    ]
    again = list(stored.read(list(stored.written(rows))))
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
    monkeypatch.setattr(machines.system, "machine", lambda: "x86_64")
    machines._cpuinfo.cache_clear()
    found = machines.processor_class()
    monkeypatch.undo()
    machines._cpuinfo.cache_clear()
    assert found == f"x86_64 {expected}".strip()


@pytest.mark.parametrize(("limit", "wide"), [("AVX2", False), ("avx", False), ("AMX", True)])
def test_the_class_is_of_what_xla_may_use(
    monkeypatch: pytest.MonkeyPatch, limit: str, wide: bool
) -> None:
    monkeypatch.setattr(machines, "_cpuinfo", lambda: {"flags": "fpu avx512f"})
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_max_isa={limit} --xla_dump_to=/tmp")
    assert ("with AVX-512" in machines.processor_class()) == wide


@pytest.mark.parametrize(
    ("cores", "devices", "share"), [(8, 1, 8), (8, 3, 2), (2, 4, 1), (8, 0, 8), (None, 1, 1)]
)
def test_devices_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, devices: int, share: int
) -> None:
    monkeypatch.setattr(machines, "cores", lambda: cores)
    monkeypatch.setattr(machines, "devices", lambda platform: ["cpu"] * devices)
    assert machines.here.__wrapped__("cpu").cores == share
    text = machines.fingerprint.__wrapped__("cpu")
    assert (f" for {devices} devices" in str(text)) == (devices > 1)


def test_several_processes_plan_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On whatever hosts they are, and whatever they measured."""
    specs = list(map(prepared, SPECS[:30]))

    def plans(processor: str, cores: int, fastest: str) -> tuple[Machine, list[tuple[str, str]]]:
        monkeypatch.setattr(machines, "processor_class", lambda: processor)
        monkeypatch.setattr(machines, "cores", lambda: cores)
        with jaxconv.config.set(cache_dir=tmp_path / processor):
            caches()
            times = dict.fromkeys(("im2col", "xla"), 1.0) | {fastest: 0.001}
            stored.record([Timed(spec, HERE, times) for spec in specs], "cpu")
            forget()
            return machines.here("cpu"), [choose(spec, "cpu") for spec in specs]

    def caches() -> None:
        machines.here.cache_clear()
        machines.fingerprint.cache_clear()

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
    model = Model(package_rows(), HERE)
    for spec in LIKE:
        model.predict("xla", spec)
    assert 0 < max(sizes) <= (prediction.NEAREST + prediction.OWN_NEAREST) // 2 < 100


def predict(rows: list[Timed], spec: ConvSpec, name: str = "xla", **machine: Any) -> Time:
    """The time that is predicted here, or on another machine."""
    time = Model(rows, dataclasses.replace(HERE, **machine)).predict(name, spec)
    assert time is not None
    return time


def test_what_was_measured_is_predicted_as_it_was() -> None:
    """However far it is from what its neighbours take."""
    rows = rows_of({"xla": 2.0, "im2col": 3.0})
    odd = rows[9]
    rows[9] = dataclasses.replace(odd, seconds={"xla": 6.0 * floor(odd.spec)})
    for row in rows[::3]:
        for name, seconds in row.seconds.items():
            assert abs(math.log(predict(rows, row.spec, name).seconds / seconds)) < 0.25
    assert Model(rows, HERE).predict("shift", LIKE[0]) is None


def test_between_rows_it_is_as_there() -> None:
    for n, c in ((10, 6), (14, 24), (28, 12)):
        spec = LIKE[0].replace(lhs_shape=(1, n, n, c), rhs_shape=(3, 3, c, 8))
        seconds = predict(rows_of({"xla": 2.0}), spec).seconds
        assert abs(math.log(seconds / (2 * floor(spec)))) < 0.15


def test_it_is_less_sure_away_from_rows() -> None:
    row, near = LIKE[5], LIKE[5].replace(lhs_shape=(1, 14, 14, 8))
    far = case_of((8, 90, 90, 512), (31, 31, 1, 512), (4, 4), feature_group_count=512)
    specs = row, near, far.spec(np.float32)
    sigmas = [predict(rows_of({"xla": 2.0}), spec).sigma for spec in specs]
    assert sigmas == sorted(sigmas)
    assert sigmas[0] < 0.5 * sigmas[2]


def test_it_is_less_sure_on_other_machines() -> None:
    rows = rows_of({"xla": 2.0})
    for changes in ({"processor": "b"}, {"jax": "0.13.0"}, {"cores": 4}):
        assert predict(rows, LIKE[5], **changes).sigma > 1.1 * predict(rows, LIKE[5]).sigma
    # The more cores, the less.
    rows += rows_of({"xla": 3.0}, dataclasses.replace(THERE, cores=1))
    sigmas = [predict(rows, LIKE[5], cores=n).sigma for n in (2, 4, 16, 64)]
    assert sigmas == sorted(set(sigmas))


def test_what_gains_by_cores_gains_by_more() -> None:
    one = dataclasses.replace(THERE, cores=1)
    rows = [*rows_of({"xla": 4.0, "shift": 3.0}, one), *rows_of({"xla": 2.0, "shift": 3.0})]
    for spec in LIKE[3:20:4]:
        ratios = [
            predict(rows, spec, cores=n).seconds / predict(rows, spec, "shift", cores=n).seconds
            for n in (1, 2, 8)
        ]
        assert ratios[0] > 1.4 * ratios[1] > 1.4 * 1.5 * ratios[2]


def test_the_users_rows_say_more_than_the_packages() -> None:
    """A machine on which one algorithm is slow: half of its convolutions are measured."""
    own = rows_of({"xla": 2.0, "shift": 4.0}, HERE)[::2]
    rows = [*rows_of({"xla": 2.0, "shift": 1.0}), *own]
    for spec in LIKE[1::2]:
        # By the package's rows, 0.5.
        assert predict(rows, spec, "shift").seconds > 0.75 * predict(rows, spec).seconds


def test_relations_are_a_covariance() -> None:
    parts = "ab", (1, 2, 16), ("0.10.2", "0.12.0.1"), (True, False)
    all_ = [
        Machine("cpu", name, cores, jax_, own)
        for name, cores, jax_, own in itertools.product(*parts)
    ]
    matrix = np.array([[prediction.relation(a, b) for b in all_] for a in all_])
    np.testing.assert_allclose(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > -1e-9


# What is predicted


NOT_EMPTY = {n: s for n, case in CASES.items() if not (s := case.spec(np.float32)).is_empty}


@pytest.mark.parametrize("name", NOT_EMPTY)
def test_every_algorithm_has_a_time_on_cpu_only(name: str) -> None:
    spec = prepared(NOT_EMPTY[name])
    possible = [name for name, a in ALGORITHMS.items() if unsupported(a, spec) is None]
    assert {"im2col", "xla"} <= set(possible)
    for name in possible:
        time = predicted(name, spec, "cpu")
        assert time is not None
        assert 0 < time.seconds < 1
        assert 0 < time.sigma < 3
        assert predicted(name, spec, "gpu") is predicted(name, spec, "tpu") is None


def test_more_work_takes_longer() -> None:
    small = prepared(CASES["3x3"].spec(np.float32))
    large = small.replace(lhs_shape=(8, 128, 128, small.lhs_shape[-1]))
    for name, algorithm in ALGORITHMS.items():
        if unsupported(algorithm, small) is None:
            shorter, longer = (predicted(name, spec, "cpu").seconds for spec in (small, large))
            assert shorter < longer


def test_what_is_chosen_is_predicted_to_be_fast() -> None:
    for spec in SPECS:
        plan = plan_spec(spec, "cpu")
        seconds = {c.name: c.seconds or 0 for c in plan.candidates}
        assert 0 < seconds[plan.algorithm] <= seconds["xla"]
        assert plan.algorithm not in NEVER


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (case_of((1, 6, 6, 4), (5, 5, 4, 3)), False),
        (case_of((1, 6, 4, 4), (5, 5, 4, 3)), True),
        (case_of((1, 5, 5, 4), (5, 5, 4, 3), padding="VALID"), False),
        (case_of((1, 5, 4, 4), (5, 5, 4, 3), padding=((0, 0), (1, 1))), True),
        (case_of((1, 1, 1, 4), (3, 3, 4, 3), padding=((2, 2), (2, 2))), False),
        (case_of((1, 3, 3, 4), (5, 5, 1, 8), feature_group_count=4), False),
    ],
)
def test_xla_exchanges_operands_where_predictions_say(case: Case, expected: bool) -> None:
    assert position.swapped(prepared(case.spec(np.float32))) == expected
    text = jax.jit(case.lax).lower(*case.operands(np.float32)).compile().as_text()
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
    sure = "predicted fastest (1.000 ms ×/÷ 1.2, XLA's own 2.000 ms ×/÷ 1.1)"
    times = {"xla": Time(2e-3, 0.1), "shift": Time(1e-3, 0.2)}
    assert decide(times, "cpu") == ("shift", sure)
    unsure = "no other is likely to be faster (1.000 ms ×/÷ 1.6, shift 0.900 ms ×/÷ 1.6)"
    times = {"xla": Time(1e-3, 0.5), "shift": Time(9e-4, 0.5)}
    assert decide(times, "cpu") == ("xla", unsure)
    measured_times = {"xla": Time(1e-3, 0.03, True), "shift": Time(9.9e-4, 0.03, True)}
    assert "no other is measured clearly faster" in decide(measured_times, "cpu")[1]
    assert decide({"xla": Time(1.0, 1.0)}, "cpu") == ("xla", "no other algorithm applies")


def test_unknown_machines_take_only_large_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [
        s for s in map(prepared, random_specs(5, 20)) if unsupported(ALGORITHMS["xla"], s) is None
    ]

    def of_xla() -> int:
        forget()
        return sum(choose(spec, "cpu")[0] == "xla" for spec in specs)

    here = of_xla()
    with monkeypatch.context() as patch:
        unknown = Machine("cpu", "an unknown one", 64, "0.99", own=True)
        patch.setattr(prediction, "here", lambda platform: unknown)
        assert here < of_xla() < len(specs)
    forget()
