"""Timed convolutions: how long each algorithm took, on which machine. Predictions rest on them.

A line of JSON for each convolution: what is unusual about it, and for each machine milliseconds and
seconds to compile by algorithm. The package's, with the position of each and the floors of
algorithms (see ``position``), are in ``data/rows.jsonl.gz``, after a line of machines; ``python -m
jaxconv.bench.calibrate`` adds to them. The user's, from ``autotune`` and ``jaxconv tune``, are
appended to a file in ``config.cache_dir`` for this device and these versions of JAX and jaxconv;
the last line of a convolution counts. Faults of that file raise no error: a bad line is skipped, an
unreadable file ignored, what can't be written known to this process only, with one warning for each
file.
"""

import dataclasses
import gc
import gzip
import hashlib
import json
import math
import operator
import re
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared, unsupported
from jaxconv.compat import OLD_XLA
from jaxconv.config import config, listeners, several_processes
from jaxconv.planning.machine import Machine, fingerprint, here
from jaxconv.planning.position import floors, position
from jaxconv.spec import ConvSpec

# What reading a line that is no row may raise.
INVALID = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)
# Algorithms whose blocks depend on JAX's version: the package's floors are those of the newest.
TUNED = {"shift"} if OLD_XLA else set[str]()
LOCK_SECONDS = 10  # to wait for another process, which holds the lock for a few milliseconds


@dataclasses.dataclass(frozen=True)
class Timed:
    """One convolution, timed on one machine."""

    spec: ConvSpec
    machine: Machine
    seconds: Mapping[str, float]  # the median, by algorithm
    compile_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # Where it is among others, and the floor by algorithm, see ``position``.
    position: Sequence[float] = dataclasses.field(default=(), compare=False)
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict, compare=False)

    def placed(self) -> "Timed":
        """This row with its position and floors."""
        known = {name: floor for name, floor in self.floors.items() if name not in TUNED}
        missing = self.seconds.keys() & ALGORITHMS.keys() - known.keys()
        if self.position and not missing:
            return self
        spec = prepared(self.spec)
        able = (name for name in missing if not unsupported(ALGORITHMS[name], spec))
        at = self.position or position(spec)
        return dataclasses.replace(self, position=at, floors=known | floors(spec, able))


# Lines


def fields_of(spec: ConvSpec) -> dict[str, Any]:
    """What is unusual about ``spec``."""
    ones, zeros = (1,) * spec.spatial_ndim, ((0, 0),) * spec.spatial_ndim
    usual = {f.name: f.default for f in dataclasses.fields(ConvSpec)}
    usual |= {"window_strides": ones, "padding": zeros, "lhs_dilation": ones, "rhs_dilation": ones}
    usual |= {"dtype": np.dtype("float32"), "out_dtype": spec.dtype}
    values = ((name, getattr(spec, name)) for name in usual)
    return {name: value for name, value in values if value != usual[name]}


def spec_of(fields: Mapping[str, Any]) -> ConvSpec:
    """The spec of which these are ``fields_of``, as JSON."""
    lhs_shape, rhs_shape = tuple(fields["lhs_shape"]), tuple(fields["rhs_shape"])
    ones = (1,) * (len(lhs_shape) - 2)
    dtype = _dtype(fields.get("dtype", "float32"))
    precision, usual = fields.get("precision"), ConvSpec.precision
    return ConvSpec(
        lhs_shape,
        rhs_shape,
        tuple(fields.get("window_strides", ones)),
        tuple(map(tuple, fields.get("padding", ((0, 0),) * len(ones)))),
        tuple(fields.get("lhs_dilation", ones)),
        tuple(fields.get("rhs_dilation", ones)),
        dtype,
        _dtype(fields["out_dtype"]) if "out_dtype" in fields else dtype,
        precision=tuple(lax.Precision[name] for name in precision) if precision else usual,
        **{name: fields[name] for name in AS_THEY_ARE if name in fields},
    )


AS_THEY_ARE = "feature_group_count", "batch_group_count", "weight_gradient"
AS_THEY_ARE += "channels_first", "kernel_order"
_text = partial(json.dumps, default=operator.attrgetter("name"))  # of dtypes and precisions
_dtype = cache(lambda name: np.dtype(getattr(jnp, name)))  # NumPy alone does not know bfloat16


def _entry(which: int, row: Timed) -> list[Any]:
    """What was measured on machine number ``which``."""
    times = {name: float(f"{1e3 * t:.4g}") for name, t in row.seconds.items()}
    return [which, times, {name: float(f"{t:.2g}") for name, t in row.compile_seconds.items()}]


def _seconds(times: Mapping[str, float]) -> dict[str, float]:
    return {name: time / 1e3 for name, time in times.items()}


# The package's rows


def read(lines: Sequence[str], wanted: Collection[Machine] | None = None) -> Iterator[Timed]:
    """The rows in a file of the package, of the ``wanted`` machines only."""
    machines = [Machine(**fields) for fields in json.loads(lines[0])]
    for fields, at, work, *entries in map(json.loads, lines[1:]):
        spec = spec_of(fields)
        for which, times, compiling in entries:
            if wanted is None or machines[which] in wanted:
                yield Timed(spec, machines[which], _seconds(times), compiling, at, work)


def written(rows: Sequence[Timed]) -> Iterator[str]:
    """The lines that ``read`` reads."""
    machines = list(dict.fromkeys(row.machine for row in rows))
    yield json.dumps([dataclasses.asdict(machine) for machine in machines])
    lines: dict[ConvSpec, list[Any]] = {}
    for row in rows:
        spec = prepared(row.spec)
        if row.spec not in lines:
            rounded = [round(x, 3) if x % 1 else int(x) for x in position(spec)]
            lines[row.spec] = [fields_of(row.spec), rounded, {}]
        work = floors(spec, row.seconds).items()
        lines[row.spec][2] |= {name: round(floor, 2) for name, floor in work}
        lines[row.spec].append(_entry(machines.index(row.machine), row))
    yield from map(_text, lines.values())


@cache
def _package_lines() -> list[str]:
    file = resources.files("jaxconv.planning") / "data" / "rows.jsonl.gz"
    return gzip.decompress(file.read_bytes()).decode().splitlines()


def package_machines() -> list[Machine]:
    """The machines that the package has rows of."""
    return [Machine(**fields) for fields in json.loads(_package_lines()[0])]


@lru_cache
def package_rows(wanted: tuple[Machine, ...] | None = None) -> tuple[Timed, ...]:
    """The rows that the package comes with, of the ``wanted`` machines only."""
    # So many new objects make Python 3.11 look through all of JAX's: 120 ms instead of 70.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return tuple(read(_package_lines(), wanted))
    finally:
        if collecting:
            gc.enable()


# The user's rows: lines that could not be written, by file: they count for this process.
_unwritten: dict[Path, list[str]] = {}
_warned: set[Path] = set()
_lock = threading.Lock()


@lru_cache
def own_rows(platform: str) -> Mapping[ConvSpec, Timed]:
    """The user's rows for this device and these versions, by their prepared specs; none if
    ``use_cache`` is off or there are several processes, which may have different ones."""
    path = _path(platform) if config.use_cache and not several_processes() else None
    return {} if path is None else _rows(path, here(platform))


def _path(platform: str) -> Path | None:
    """The file of the user's rows: its name is readable, and unique for each fingerprint."""
    text = fingerprint(platform)
    if text is None:
        return None
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    name = f"rows-{re.sub('[^a-z0-9.]+', '-', text.lower())[:80]}-{digest}.jsonl"
    return Path(name) if config.cache_dir is None else config.cache_dir / name


def _rows(path: Path, machine: Machine) -> dict[ConvSpec, Timed]:
    """The rows in a file, and those that could not be written to it, by their prepared specs."""
    rows, text = dict[ConvSpec, Timed](), ""
    try:
        if config.cache_dir is not None:
            text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        _warn(path, f"{str(path)!r} can't be read ({error.strerror}), and is ignored")
    # Another process may still be writing what follows the last newline.
    for number, line in enumerate([*text.split("\n")[:-1], *_unwritten.get(path, ())], 1):
        try:
            row = _own_row(line, machine)
        except INVALID:
            _warn(path, f"{str(path)!r}: line {number} is not a row, and is skipped: {line:.200}")
        else:
            rows[prepared(row.spec)] = row
    return rows


def _own_row(line: str, machine: Machine) -> Timed:
    fields, (_, times, compiling) = json.loads(line)
    if not times or not all(0 < t < math.inf for t in (*times.values(), *compiling.values())):
        raise ValueError("times must be positive")
    return Timed(spec_of(fields), machine, _seconds(times), compiling).placed()


def record(rows: Sequence[Timed], platform: str) -> None:
    """Adds rows to the user's, which replace earlier ones of the same convolutions."""
    path = _path(platform)
    if path is None:
        return
    with _lock:
        lines = _unwritten.setdefault(path, [])
        lines += (_text([fields_of(row.spec), _entry(0, row)]) for row in rows)
        try:
            _append(path, lines)
            del _unwritten[path]
            problem = ""
        except ModuleNotFoundError as error:
            problem = f'install {error.name} to save them: pip install "jaxconv[tune]"'
        except (OSError, NotImplementedError) as error:  # latter: file system without locks
            problem = f"{str(path)!r} can't be written ({getattr(error, 'strerror', 0) or error})"
    own_rows.cache_clear()
    if problem:
        _warn(path, f"measurements are known to this process only; {problem}")


def _append(path: Path, lines: Iterable[str]) -> None:
    import filelock  # an optional dependency, as platformdirs; not needed for reading

    if config.cache_dir is None:
        raise ModuleNotFoundError(name="platformdirs")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        # A process that was killed may have left the last line unfinished.
        unfinished = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("\n" * unfinished + "".join(f"{line}\n" for line in lines))


def file(platform: str) -> Path | None:
    """Where the user's rows are kept; None where they are known to this process only."""
    path = _path(platform)
    return path if path is not None and config.cache_dir and path.exists() else None


def forget(platform: str) -> int:
    """Drops the user's rows for this device and these versions; returns how many there were."""
    path = _path(platform)
    if path is None:
        return 0
    count = len(_rows(path, here(platform)))
    with _lock:
        _unwritten.pop(path, None)
        try:
            if file(platform) is not None:
                path.unlink()
        except OSError as error:
            count = 0
            _warn(path, f"{str(path)!r} can't be removed ({error.strerror})")
    own_rows.cache_clear()
    return count


def _warn(path: Path, problem: str) -> None:
    """Warns about a file, unless this process was warned about it before."""
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"jaxconv's cache: {problem}", UserWarning, stacklevel=2)


listeners.append(own_rows.cache_clear)
