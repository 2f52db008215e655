"""The user's rows: nothing is lost, nothing fails, one warning at most."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pytest
from cases import case_of
from children import environment

from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared, unsupported
from jaxconv.config import Config, config
from jaxconv.config import notify as forget
from jaxconv.planning import rows
from jaxconv.planning.choose import choose
from jaxconv.planning.machine import fingerprint, here
from jaxconv.planning.rows import Timed, own_rows, record
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune as autotuning

DEFAULT, HIGHEST = jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST
UNUSUAL = {"precision": (HIGHEST, DEFAULT), "preferred_element_type": "float32"}
SPEC = case_of(
    (1, 8, 8, 3), (3, 3, 3, 4), padding=((1, 1), (0, -1)), rhs_dilation=(1, 2), **UNUSUAL
).spec("bfloat16")
PLAIN = case_of((1, 9, 9, 3), (3, 3, 3, 4), padding="VALID").spec("float32")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, that is not there yet."""
    monkeypatch.setattr(rows, "_unwritten", {})
    monkeypatch.setattr(rows, "_warned", set())
    with config.set(cache_dir=tmp_path / "cache", use_cache=True):
        yield tmp_path / "cache"


def path() -> Path:
    found = rows._path("cpu")
    assert found is not None
    return found


def row(spec: ConvSpec, **seconds: float) -> Timed:
    return Timed(spec, here("cpu"), seconds, dict.fromkeys(seconds, 0.5))


def keep(*kept: Timed) -> None:
    record(kept, "cpu")
    forget()


def specs() -> set[ConvSpec]:
    """Of the rows that are known."""
    forget()
    return set(own_rows("cpu"))


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """What ``function`` returns; it must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


def refusing(*args: Any, **kwargs: Any) -> Any:
    raise PermissionError(13, "Permission denied")


# What plans make of them


def test_a_row_is_what_plans_take() -> None:
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


HIGH = {"precision": (HIGHEST, HIGHEST)}


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("fft", {"lhs_shape": (1, 64, 64, 1), "rhs_shape": (21, 21, 1, 1)}),
        ("winograd", {"lhs_shape": (1, 28, 28, 64), "rhs_shape": (5, 5, 64, 64)}),
        ("winograd4", {}),
        ("fft", HIGH),
        ("winograd", HIGH),
    ],
)
def test_a_row_of_what_rounds_too_much_is_ignored(algorithm: str, changes: dict[str, Any]) -> None:
    spec = SPEC.replace(**{"precision": (DEFAULT, DEFAULT), "rhs_dilation": (1, 1)} | changes)
    assert (unsupported(ALGORITHMS[algorithm], spec) is None) == (changes is not HIGH)
    keep(row(spec, **{algorithm: 1e-9}))
    taken, why = choose(spec, "cpu")
    assert taken != algorithm
    assert "predicted" in why or "likely" in why
    assert algorithm not in autotuning.candidates(spec, "cpu")


# What is kept


def test_the_file_is_of_lines_of_what_is_unusual(folder: Path) -> None:
    """If they change, measurements that exist are lost."""
    keep(row(PLAIN, xla=0.25), row(SPEC, im2col=0.00123456))
    assert path().read_text() == (
        '[{"lhs_shape": [1, 9, 9, 3], "rhs_shape": [3, 3, 3, 4]},'
        ' [0, {"xla": 250.0}, {"xla": 0.5}]]\n'
        '[{"lhs_shape": [1, 8, 8, 3], "rhs_shape": [3, 3, 3, 4], "padding": [[1, 1], [0, -1]],'
        ' "rhs_dilation": [1, 2], "dtype": "bfloat16", "out_dtype": "float32",'
        ' "precision": ["HIGHEST", "DEFAULT"]}, [0, {"im2col": 1.235}, {"im2col": 0.5}]]\n'
    )
    assert {p.name for p in folder.iterdir()} <= {path().name, f"{path().name}.lock"}
    assert own_rows("cpu") == {
        PLAIN: row(PLAIN, xla=0.25),
        prepared(SPEC): row(SPEC, im2col=1.235 / 1e3),
    }


def test_the_last_line_of_a_convolution_counts() -> None:
    keep(row(SPEC, im2col=0.5, xla=1.0), row(PLAIN, xla=2.0))
    keep(row(SPEC, xla=4.0))
    assert own_rows("cpu") == {prepared(SPEC): row(SPEC, xla=4.0), PLAIN: row(PLAIN, xla=2.0)}


def test_rows_are_dropped_on_demand(folder: Path) -> None:
    assert rows.file("cpu") is None
    assert rows.forget("cpu") == 0
    assert not folder.exists()
    keep(row(SPEC, im2col=1e-9), row(PLAIN, im2col=1e-9))
    assert rows.file("cpu") == path()
    assert rows.forget("cpu") == 2
    assert rows.file("cpu") is None
    assert specs() == set()
    assert "measured" not in choose(SPEC, "cpu")[1]
    assert rows.forget("cpu") == 0
    keep(row(SPEC, im2col=1e-9))
    assert specs() == {prepared(SPEC)}


@pytest.mark.parametrize("part", ["folder", "jax", "jaxconv", "cores"])
def test_other_folders_devices_and_versions_are_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str
) -> None:
    keep(row(SPEC, im2col=0.001))
    text = fingerprint("cpu") or ""
    assert f"{part} " in text or part in ("cores", "folder")
    other = {"cache_dir": tmp_path / "other"} if part == "folder" else {}
    with monkeypatch.context() as patched, config.set(**other):
        patched.setattr(rows, "fingerprint", lambda platform: text.replace(part, f"other {part}"))
        assert quietly(specs) == set()
    assert specs() == {prepared(SPEC)}


def test_devices_that_are_not_here_have_no_rows(folder: Path) -> None:
    fingerprint.cache_clear()
    missing = next(p for p in ("tpu", "gpu") if p != jax.default_backend())
    assert fingerprint(missing) is None
    record([row(SPEC, im2col=0.001)], missing)
    assert own_rows(missing) == {}
    assert rows.file(missing) is None
    assert rows.forget(missing) == 0
    assert not folder.exists()


# What is wrong with a file

ENTRY = '[{"lhs_shape": [1, 8, 2], "rhs_shape": [1, 2, 3]}, null, [0, {"xla": 1.0}, {}]]'
BAD = {
    "empty": "",
    "garbage": "\x00\xff",
    "truncated": ENTRY[:-7],
    "nested": "[" * 200_000,
    "a dictionary": "{}",
    "a number": "17",
    "no shape": ENTRY.replace("lhs_shape", "shape"),
    "shapes that do not fit": ENTRY.replace("[1, 8, 2]", "[1]"),
    "no such dtype": ENTRY.replace("}, null", ', "dtype": "float31"}, null'),
    "no strides": ENTRY.replace("}, null", ', "window_strides": [0]}, null'),
    "no times": ENTRY.replace('"xla": 1.0', ""),
    "text for times": ENTRY.replace('{"xla": 1.0}', '"xla"'),
    "text for a time": ENTRY.replace("1.0", '"1"'),
    "null for a time": ENTRY.replace("1.0", "null"),
    "zero": ENTRY.replace("1.0", "0.0"),
    "infinity": ENTRY.replace("1.0", "Infinity"),
    "not a number": ENTRY.replace("1.0", "NaN"),
    "text for compile seconds": ENTRY.replace("{}", '{"xla": "1"}'),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_line_is_skipped_with_one_warning(fault: str) -> None:
    keep(row(PLAIN, im2col=0.001))
    good = path().read_text()
    path().write_text(f"{BAD[fault]}\n{good}{BAD[fault]}\n", encoding="latin1")
    with pytest.warns(UserWarning, match=r"jaxconv's cache: .*: line 1 is not a row") as caught:
        assert specs() == {PLAIN}
    assert len(caught) == 1
    assert quietly(specs) == {PLAIN}
    quietly(keep, row(SPEC, im2col=0.001))
    assert quietly(specs) == {PLAIN, prepared(SPEC)}


def test_a_line_that_is_not_written_to_its_end_is_no_line_yet() -> None:
    keep(row(PLAIN, im2col=0.001), row(SPEC, xla=0.001))
    text = path().read_text()
    path().write_text(text[:-9])
    assert quietly(specs) == {PLAIN}
    # Who writes next, once the other process was killed, begins a new one.
    keep(row(SPEC, xla=0.002))
    with pytest.warns(UserWarning, match="line 2 is not a row"):
        assert own_rows("cpu")[prepared(SPEC)].seconds == {"xla": 0.002}
    assert specs() == {PLAIN, prepared(SPEC)}


def test_an_unreadable_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(row(PLAIN, xla=0.001))
    before = path().read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refusing)
        patched.setattr(Path, "read_bytes", refusing)
        with pytest.warns(match=r"can't be read \(Permission denied\), and is ignored"):
            assert specs() == set()
        quietly(keep, row(SPEC, xla=0.001))
        assert quietly(specs) == {prepared(SPEC)}
    assert path().read_bytes() == before
    assert specs() == {PLAIN, prepared(SPEC)}


def test_a_folder_in_its_place() -> None:
    path().mkdir(parents=True)
    with pytest.warns(UserWarning, match="can't be read"):
        assert specs() == set()
    quietly(keep, row(SPEC, xla=0.001))
    assert quietly(specs) == {prepared(SPEC)}


# What is wrong with the folder

PROCESS_ONLY = "measurements are known to this process only"


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with config.set(cache_dir=tmp_path / "file" / "cache"):
        assert quietly(specs) == set()
        with pytest.warns(UserWarning, match=f"{PROCESS_ONLY}; .*can't be written") as caught:
            keep(row(SPEC, im2col=1e-9))
        assert len(caught) == 1
        quietly(keep, row(PLAIN, xla=0.001))
        assert rows.file("cpu") is None
        assert choose(SPEC, "cpu")[0] == "im2col"
        assert quietly(specs) == {PLAIN, prepared(SPEC)}
        assert quietly(rows.forget, "cpu") == 2
        assert quietly(specs) == set()


def test_a_read_only_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(row(SPEC, xla=0.001))
    before = path().read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refusing)
        patched.setattr(Path, "read_text", lambda path, **_: path.read_bytes().decode())
        patched.setattr(Path, "read_bytes", lambda path: before)
        with pytest.warns(UserWarning, match=r"can't be written \(Permission denied\)"):
            keep(row(PLAIN, xla=0.002))
        assert quietly(specs) == {PLAIN, prepared(SPEC)}
        patched.setattr(Path, "unlink", refusing)
        assert quietly(rows.forget, "cpu") == 0
    assert path().read_bytes() == before
    assert specs() == {prepared(SPEC)}


def test_what_could_not_be_written_is_written_with_the_next() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "mkdir", refusing)
        with pytest.warns(UserWarning, match="can't be written"):
            keep(row(SPEC, xla=0.001))
    quietly(keep, row(PLAIN, xla=0.002))
    assert len(path().read_text().splitlines()) == 2
    assert specs() == {PLAIN, prepared(SPEC)}


@pytest.mark.parametrize("package", ["filelock", "platformdirs"])
def test_without_the_packages_for_writing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    keep(row(SPEC, xla=0.001))
    kept = {prepared(SPEC)} if package == "filelock" else set()
    monkeypatch.setitem(sys.modules, package, None)
    if package == "platformdirs":
        monkeypatch.setattr(rows, "config", Config({}))
    assert quietly(specs) == kept
    match = rf"{PROCESS_ONLY}; install {package} to save them: pip install \"jaxconv\[tune\]\""
    with pytest.warns(UserWarning, match=match):
        keep(row(PLAIN, xla=0.002))
    assert quietly(specs) == {PLAIN, *kept}


def test_a_lock_that_is_never_free(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    filelock = pytest.importorskip("filelock")
    monkeypatch.setattr(rows, "LOCK_SECONDS", 0.05)
    folder.mkdir()
    with filelock.FileLock(f"{path()}.lock"), pytest.warns(match="can't be written"):
        keep(row(SPEC, xla=0.001))
    assert not path().exists()


# Several processes

PREAMBLE = """
import dataclasses, os, signal, sys
from pathlib import Path
import filelock
from jaxconv.planning import rows
from jaxconv.config import config
config.update("cache_dir", sys.argv[1])
one = rows.spec_of({"lhs_shape": (1, 8, 2), "rhs_shape": (1, 2, 3)})
"""


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment(1), stderr=subprocess.PIPE, text=True)


def test_two_processes_lose_nothing(folder: Path, tmp_path: Path) -> None:
    code = """
        import time
        Path(sys.argv[2], sys.argv[3]).touch()
        while len(list(Path(sys.argv[2]).iterdir())) < 2:
            time.sleep(0.001)
        for i in range(int(sys.argv[3]), 100, 2):
            spec = one.replace(lhs_shape=(1, 8 + i, 2))
            rows.record([rows.Timed(spec, rows.here("cpu"), {"xla": 1.0})], "cpu")
        """
    (tmp_path / "ready").mkdir()
    both = [process(code, folder, tmp_path / "ready", name) for name in (0, 1)]
    for one in both:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors
        assert "Warning" not in errors
    assert {spec.lhs_shape[1] for spec in specs()} == set(range(8, 108))


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_while_writing(folder: Path) -> None:
    killed = process(
        """
        rows.record([rows.Timed(one, rows.here("cpu"), {"xla": 1.0})], "cpu")
        path = rows.file("cpu")
        filelock.FileLock(f"{path}.lock").acquire()
        with path.open("a") as file:
            file.write("[{")
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        folder,
    )
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert len(quietly(specs)) == 1
    start = time.monotonic()
    quietly(record, [row(SPEC, xla=0.001)], "cpu")
    assert time.monotonic() - start < rows.LOCK_SECONDS  # the lock died with its holder
    with pytest.warns(UserWarning, match="line 2 is not a row"):
        assert len(specs()) == 2


def test_threads_lose_nothing() -> None:
    def work(n: int) -> None:
        for i in range(10):
            record([row(PLAIN.replace(lhs_shape=(n, 9 + i, 9, 3)), xla=1.0)], "cpu")
            assert own_rows("cpu")

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, n) for n in range(1, 5)]:
            done.result()
    assert len(specs()) == 40
    assert len(list(map(json.loads, path().read_text().splitlines()))) == 40
