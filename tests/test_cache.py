"""The user's cache: nothing is lost, nothing fails, one warning at most."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxconv
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared, unsupported
from jaxconv.config import config
from jaxconv.config import notify as forget
from jaxconv.planning import cache, measured
from jaxconv.planning.choose import choose
from jaxconv.planning.measured import Row
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune as autotuning

ROOT = Path(jaxconv.__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    """A cache of its own, that is not there yet."""
    with config.set(cache_dir=tmp_path / "cache", use_cache=True):
        yield tmp_path / "cache"


def adding(**entries: Any) -> cache.Merge:
    return lambda document: document | entries


def file_of(name: str) -> Path:
    assert config.cache_dir is not None
    return config.cache_dir / f"{name}.json"


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """What ``function`` returns; it must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


# Documents


def test_update_and_load(folder: Path) -> None:
    assert quietly(cache.load, "a") is None
    assert not folder.exists()
    quietly(cache.update, "a", adding(x=1))
    quietly(cache.update, "a", adding(y=[1, "é"]))
    quietly(cache.update, "b", adding(z={}))
    assert cache.load("a") == {"x": 1, "y": [1, "é"]}
    assert cache.load("b") == {"z": {}}
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".lock"}


def test_a_file_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.update("a", adding(x=1))
    first = cache.load("a")
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_parsed", lambda *_: pytest.fail("parsed again"))
        assert cache.load("a") is first
    # What another process wrote is seen.
    path = file_of("a")
    path.write_text(path.read_text().replace('"x": 1', '"x": 22'))
    assert cache.load("a") == {"x": 22}


def test_folders_are_apart(tmp_path: Path) -> None:
    cache.update("a", adding(x=1))
    with config.set(cache_dir=tmp_path / "other"):
        assert cache.load("a") is None
    assert cache.load("a") == {"x": 1}


# What is wrong with a file

GOOD = {"schema": cache.SCHEMA, "name": "a", "document": {"x": 1}}
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "garbage": bytes(range(256)),
    "truncated": json.dumps(GOOD).encode()[:-7],
    "nested": b"[" * 200_000,
    "no dictionary": b"[1, 2]",
    "no schema": b'{"name": "a", "document": {}}',
    "other schema": json.dumps(GOOD | {"schema": cache.SCHEMA + 1}).encode(),
    "other name": json.dumps(GOOD | {"name": "b"}).encode(),
    "no document": json.dumps(GOOD | {"document": [1]}).encode(),
    "refused": json.dumps(GOOD | {"document": {"bad": 1}}).encode(),
}


def check(document: cache.Document) -> str | None:
    return "it is bad" if "bad" in document else None


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_costs_one_warning_and_is_kept_aside(folder: Path, damage: str) -> None:
    folder.mkdir()
    file_of("a").write_bytes(DAMAGED[damage])
    with pytest.warns(
        UserWarning, match=r"jaxconv's cache: .*a\.json' is damaged \(it is "
    ) as all_:
        assert cache.load("a", check) is None
    assert len(all_) == 1
    assert quietly(cache.load, "a", check) is None
    assert file_of("a").read_bytes() == DAMAGED[damage]
    quietly(cache.update, "a", adding(x=2), check)
    assert quietly(cache.load, "a", check) == {"x": 2}
    assert (folder / "a.json.damaged").read_bytes() == DAMAGED[damage]


def test_damage_found_by_writing(folder: Path) -> None:
    folder.mkdir()
    for count, suffix in enumerate(("", ".1", ".2")):
        file_of("a").write_text(f"damaged {count}")
        if count:
            quietly(cache.update, "a", adding(x=count))
        else:
            with pytest.warns(UserWarning, match=r"was damaged .*it is now '.*a\.json\.damaged'"):
                cache.update("a", adding(x=count))
        assert cache.load("a") == {"x": count}
        assert (folder / f"a.json{suffix}.damaged").read_text() == f"damaged {count}"


def test_a_folder_in_its_place(folder: Path) -> None:
    file_of("a").mkdir(parents=True)
    with pytest.warns(UserWarning, match="can't be read"):
        assert cache.load("a") is None
    quietly(cache.update, "a", adding(x=1))
    assert quietly(cache.load, "a") == {"x": 1}
    assert file_of("a").is_dir()


def test_an_unreadable_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.update("a", adding(x=1))
    before = file_of("a").read_bytes()

    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refused)
        with pytest.warns(UserWarning, match=r"can't be read \(Permission denied\): it is ignored"):
            assert cache.load("a") is None
        quietly(cache.update, "a", adding(y=2))
        assert quietly(cache.load, "a") == {"y": 2}
    assert file_of("a").read_bytes() == before


# What is wrong with the folder


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with config.set(cache_dir=tmp_path / "file" / "cache"):
        assert quietly(cache.load, "a") is None
        with pytest.warns(
            UserWarning, match="known to this process only, since .*can't be written"
        ):
            cache.update("a", adding(x=1))
        quietly(cache.update, "a", adding(y=1))
        assert quietly(cache.load, "a") == {"x": 1, "y": 1}


def test_a_read_only_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cache.update("a", adding(x=1))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refused)
        with pytest.warns(UserWarning, match=r"can't be written \(Permission denied\)"):
            cache.update("a", adding(y=2))
        assert quietly(cache.load, "a") == {"x": 1, "y": 2}
    assert {name: (folder / name).read_bytes() for name in before} == before
    # What could not be written is written with the next that can.
    quietly(cache.update, "a", adding(z=3))
    assert json.loads(file_of("a").read_text())["document"] == {"x": 1, "y": 2, "z": 3}
    assert cache.load("a") == {"x": 1, "y": 2, "z": 3}


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="can't be written"):
        cache.update("a", adding(x=1))
    assert cache.load("a") == {"x": 1}


@pytest.mark.parametrize("package", ["filelock", "platformdirs"])
def test_without_the_packages_for_writing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    cache.update("a", adding(x=1))
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, package, None)
        if package == "platformdirs":
            patched.setattr(cache, "config", type(config)({}))
            assert quietly(cache.load, "a") is None
        else:
            assert quietly(cache.load, "a") == {"x": 1}
        with pytest.warns(UserWarning, match=rf"package '{package}' to .*jaxconv\[tune\]"):
            cache.update("a", adding(y=2))
        assert (cache.load("a") or {}).get("y") == 2
    cache._pending.clear()


def test_a_lock_that_is_never_free(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    filelock = pytest.importorskip("filelock")
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.05)
    folder.mkdir()
    with (
        filelock.FileLock(f"{file_of('a')}.lock"),
        pytest.warns(UserWarning, match="can't be written"),
    ):
        cache.update("a", adding(x=1))
    assert not file_of("a").exists()


# Several processes

PREAMBLE = """
import os, signal, sys
from pathlib import Path
from jaxconv.planning import cache
from jaxconv.config import config
config.update("cache_dir", sys.argv[1])
"""


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_two_processes_lose_nothing(folder: Path, tmp_path: Path) -> None:
    code = """
        import time
        Path(sys.argv[2], sys.argv[3]).touch()
        while len(list(Path(sys.argv[2]).iterdir())) < 2:
            time.sleep(0.001)
        for i in range(100):
            cache.update("a", lambda document: document | {f"{sys.argv[3]}{i}": i})
        """
    (tmp_path / "ready").mkdir()
    both = [process(code, folder, tmp_path / "ready", name) for name in "pq"]
    for one in both:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors
        assert "Warning" not in errors
    assert cache.load("a") == {f"{name}{i}": i for name in "pq" for i in range(100)}


def test_threads_lose_nothing(folder: Path) -> None:
    seen: list[cache.Document | None] = []

    def work(name: str) -> None:
        for i in range(20):
            cache.update("a", adding(**{f"{name}{i}": i}))
            seen.append(cache.load("a"))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, name) for name in "pqrs"]:
            done.result()
    assert cache.load("a") == {f"{name}{i}": i for name in "pqrs" for i in range(20)}
    assert None not in seen


def test_a_thread_waits_for_what_another_parses(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.update("a", adding(x=1))
    parsed, begun = cache._parsed, threading.Event()

    def slowly(*args: Any) -> cache.Document:
        begun.set()
        time.sleep(0.2)
        return parsed(*args)

    monkeypatch.setattr(cache, "_parsed", slowly)
    monkeypatch.setattr(cache, "_read", {})
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.load, "a")
        assert begun.wait(60)
        assert cache.load("a") == first.result() == {"x": 1}


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_while_writing(folder: Path) -> None:
    cache.update("a", adding(x=1))
    before = file_of("a").read_bytes()
    killed = process(
        """
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        cache.update("a", lambda document: document | {"y": 2})
        """,
        folder,
    )
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "a.json.tmp").exists()
    assert file_of("a").read_bytes() == before
    assert quietly(cache.load, "a") == {"x": 1}
    start = time.monotonic()
    quietly(cache.update, "a", adding(z=3))
    assert time.monotonic() - start < cache.LOCK_SECONDS  # the lock died with its holder
    assert quietly(cache.load, "a") == {"x": 1, "z": 3}
    assert not (folder / "a.json.tmp").exists()


# Rows

DEFAULT, HIGHEST = jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST
SPEC = ConvSpec(
    (1, 8, 8, 3),
    (3, 3, 3, 4),
    (1, 1),
    ((1, 1), (0, -1)),
    (1, 1),
    (1, 2),
    jax.numpy.dtype("bfloat16"),
    jax.numpy.dtype("float32"),
    precision=(HIGHEST, DEFAULT),
)
SIZES = {"lhs_shape": (1, 9, 9, 3), "padding": ((0, 0), (0, 0)), "rhs_dilation": (1, 1)}
PLAIN = SPEC.replace(**SIZES, dtype=SPEC.out_dtype, precision=(DEFAULT, DEFAULT))


def row(spec: ConvSpec, **seconds: float) -> Row:
    return Row(spec, measured.here("cpu"), seconds, dict.fromkeys(seconds, 0.5))


def keep(*rows: Row) -> None:
    measured.record(rows, "cpu")
    forget()


def test_the_key_is_what_is_unusual_as_text() -> None:
    """Files hold it: if it changes, measurements that exist are lost."""
    assert measured.key(PLAIN) == '{"lhs_shape": [1, 9, 9, 3], "rhs_shape": [3, 3, 3, 4]}'
    assert measured.key(SPEC) == (
        '{"lhs_shape": [1, 8, 8, 3], "rhs_shape": [3, 3, 3, 4], "padding": [[1, 1], [0, -1]],'
        ' "rhs_dilation": [1, 2], "dtype": "bfloat16", "out_dtype": "float32",'
        ' "precision": ["HIGHEST", "DEFAULT"]}'
    )
    for spec in (PLAIN, SPEC, SPEC.replace(weight_gradient=True)):
        assert measured.spec_of(json.loads(measured.key(spec))) == spec


@pytest.fixture
def name() -> Iterator[str]:
    forget()
    identity = measured.fingerprint("cpu")
    assert identity is not None
    yield measured.document_name(identity)
    forget()


def test_a_row_is_what_plans_take(name: str) -> None:
    rules = choose(SPEC, "cpu")
    for algorithm in ("im2col", "im2col_tiled", "xla"):
        keep(row(SPEC, **{"im2col": 0.003, "im2col_tiled": 0.003, "xla": 0.003, algorithm: 0.001}))
        taken, why = choose(SPEC, "cpu")
        assert taken == algorithm
        assert "1.000 ms, measured" in why
    assert choose(SPEC, "tpu") != (taken, why)
    assert choose(SPEC.replace(weight_gradient=True), "cpu")[1] != why
    assert choose(SPEC, "cpu", frozenset({"xla"}))[0] != "xla"
    with config.set(use_cache=False):
        assert choose(SPEC, "cpu") == rules
    assert choose(SPEC, "cpu") == (taken, why)
    assert list(cache.load(name) or {}) == ["fingerprint", "rows"]


def test_a_row_is_kept_as_it_was_measured(name: str) -> None:
    keep(row(SPEC, im2col=0.00123456, xla=1.0), row(PLAIN, xla=2.0))
    assert measured.own_rows("cpu") == {
        prepared(SPEC): row(SPEC, im2col=0.001235, xla=1.0),
        PLAIN: row(PLAIN, xla=2.0),
    }
    # Measured again, it is replaced, and others stay.
    keep(row(SPEC, xla=3.0))
    assert measured.own_rows("cpu") == {
        prepared(SPEC): row(SPEC, xla=3.0),
        PLAIN: row(PLAIN, xla=2.0),
    }


def test_rows_are_dropped_on_demand(name: str) -> None:
    assert measured.file("cpu") is None
    assert measured.forget("cpu") == 0
    assert config.cache_dir is not None
    assert not config.cache_dir.exists()
    keep(row(SPEC, im2col=1e-9), row(PLAIN, im2col=1e-9))
    assert measured.file("cpu") == file_of(name)
    assert measured.forget("cpu") == 2
    forget()
    assert measured.own_rows("cpu") == {}
    assert "measured" not in choose(SPEC, "cpu")[1]
    assert measured.forget("cpu") == 0
    keep(row(SPEC, im2col=1e-9))
    assert list(measured.own_rows("cpu")) == [prepared(SPEC)]


def test_a_row_of_what_can_not_run_is_ignored() -> None:
    # One refuses; one is never picked; one is not there.
    keep(row(SPEC, pointwise=1e-9, naive=1e-9, magic=1e-9))
    taken, why = quietly(choose, SPEC, "cpu")
    assert taken not in ("pointwise", "naive", "magic")
    assert "predicted" in why or "likely" in why
    with config.set(workspace_limit=0):
        keep(row(SPEC, im2col=1e-9))
        assert choose(SPEC, "cpu")[0] != "im2col"
    assert choose(SPEC, "cpu")[0] == "im2col"


ROUNDS_TOO_MUCH = {
    "fft": {"lhs_shape": (1, 64, 64, 1), "rhs_shape": (21, 21, 1, 1)},
    "winograd": {"lhs_shape": (1, 28, 28, 64), "rhs_shape": (5, 5, 64, 64)},
    "winograd4": {},
}


@pytest.mark.parametrize("algorithm", ROUNDS_TOO_MUCH)
def test_a_row_of_what_rounds_too_much_is_ignored(algorithm: str) -> None:
    spec = SPEC.replace(
        precision=(DEFAULT, DEFAULT), rhs_dilation=(1, 1), **ROUNDS_TOO_MUCH[algorithm]
    )
    assert unsupported(ALGORITHMS[algorithm], spec) is None
    keep(row(spec, **{algorithm: 1e-9}))
    taken, why = choose(spec, "cpu")
    assert taken != algorithm
    assert "predicted" in why or "likely" in why
    assert algorithm not in autotuning.candidates(spec, "cpu")


@pytest.mark.parametrize("algorithm", ["fft", "winograd"])
def test_highest_precision_never_takes_other_products(algorithm: str) -> None:
    highest = PLAIN.replace(precision=(HIGHEST, HIGHEST))
    assert unsupported(ALGORITHMS[algorithm], PLAIN) is None
    keep(row(highest, **{algorithm: 1e-9}))
    assert choose(highest, "cpu")[0] not in ("fft", "winograd")


TIMES = {"seconds": {"xla": 1.0}, "compile_seconds": {}}
ENTRIES: dict[str, Any] = {
    "text": "xla",
    "a list": [1.0],
    "no seconds": {"compile_seconds": {}},
    "no algorithm": TIMES | {"seconds": {}},
    "a number for seconds": TIMES | {"seconds": 1.0},
    "text for seconds": TIMES | {"seconds": {"xla": "1"}},
    "no time": TIMES | {"seconds": {"xla": None}},
    "zero": TIMES | {"seconds": {"xla": 0.0}},
    "infinity": TIMES | {"seconds": {"xla": float("inf")}},
    "not a number": TIMES | {"seconds": {"xla": float("nan")}},
    "text for compile seconds": TIMES | {"compile_seconds": {"xla": "1"}},
}
KEYS = {
    "no JSON": "lhs_shape=(1,8)",
    "no shape": "{}",
    "no such dtype": '{"lhs_shape": [1, 8, 2], "rhs_shape": [1, 2, 3], "dtype": "float31"}',
    "a list": "[1, 2]",
    "a number": "17",
}


@pytest.mark.parametrize("fault", [*ENTRIES, *KEYS])
def test_an_entry_of_no_use_costs_one_warning_and_itself(name: str, fault: str) -> None:
    rules = choose(SPEC, "cpu")
    keep(row(PLAIN, im2col=0.001))
    bad = {KEYS.get(fault, measured.key(SPEC)): ENTRIES.get(fault, TIMES)}
    cache.update(name, adding(rows=bad | cache.load(name)["rows"]))
    forget()
    with pytest.warns(UserWarning, match="an invalid entry"):
        assert list(measured.own_rows("cpu")) == [PLAIN]
    forget()
    assert "measured" not in quietly(choose, SPEC, "cpu")[1]
    assert choose(PLAIN, "cpu")[0] == "im2col"
    with config.set(use_cache=False):
        assert choose(SPEC, "cpu") == rules


@pytest.mark.parametrize("field", ["device", "jax", "jaxconv"])
def test_other_devices_and_versions_are_apart(
    monkeypatch: pytest.MonkeyPatch, name: str, field: str
) -> None:
    keep(row(SPEC, im2col=0.001))
    identity = dict(measured.fingerprint("cpu") or {}) | {field: "other"}
    with monkeypatch.context() as patched:
        patched.setattr(measured, "fingerprint", lambda platform: identity)
        measured.own_rows.cache_clear()
        assert quietly(measured.own_rows, "cpu") == {}
        # A file of that name with what was measured elsewhere is foreign.
        content = json.loads(file_of(name).read_text())
        other = measured.document_name(identity)
        file_of(other).write_text(json.dumps(content | {"name": other}))
        measured.own_rows.cache_clear()
        with pytest.warns(UserWarning, match="it is of another device or version"):
            assert measured.own_rows("cpu") == {}
    measured.own_rows.cache_clear()
    assert len(measured.own_rows("cpu")) == 1


def test_a_damaged_file_of_rows_is_kept_aside(name: str, folder: Path) -> None:
    keep(row(SPEC, im2col=0.001))
    content = json.loads(file_of(name).read_text())
    text = json.dumps(content | {"document": content["document"] | {"rows": [1]}})
    file_of(name).write_text(text)
    forget()
    with pytest.warns(UserWarning, match="is damaged .it has no rows.: it is ignored"):
        assert measured.own_rows("cpu") == {}
    quietly(keep, row(PLAIN, xla=0.001))
    assert list(measured.own_rows("cpu")) == [PLAIN]
    assert (folder / f"{name}.json.damaged").read_text() == text


def test_rows_that_can_not_be_written_hold_for_the_process(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "filelock", None)
        with pytest.warns(UserWarning, match="known to this process only"):
            keep(row(SPEC, im2col=1e-9))
        quietly(keep, row(PLAIN, xla=0.001))
        assert measured.file("cpu") is None
        assert choose(SPEC, "cpu")[0] == "im2col"
        assert len(measured.own_rows("cpu")) == 2
        assert quietly(measured.forget, "cpu") == 2
        assert measured.own_rows("cpu") == {}
    cache._pending.clear()


def test_devices_that_are_not_here_have_no_rows() -> None:
    measured.fingerprint.cache_clear()
    missing = next(p for p in ("tpu", "gpu") if p != jax.default_backend())
    assert measured.fingerprint(missing) is None
    measured.record([row(SPEC, im2col=0.001)], missing)
    assert measured.own_rows(missing) == {}
    assert measured.file(missing) is None
    assert measured.forget(missing) == 0
    assert config.cache_dir is not None
    assert not config.cache_dir.exists()


def test_without_a_file_plans_are_those_of_the_package() -> None:
    with config.set(use_cache=False):
        rules = choose(SPEC, "cpu")
    assert choose(SPEC, "cpu") == rules
