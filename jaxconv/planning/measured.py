"""Measured convolutions: how long each algorithm took, on which machine. Predictions rest on them.

The package has its rows in ``data/rows.jsonl.gz``, readable by ``zcat``: the machines, then a line
for each convolution with its place (see ``predict.place``) and, for each machine, milliseconds and
seconds to compile by algorithm. ``python -m jaxconv.bench.calibrate`` adds to them. The user's own
rows, from ``autotune`` and ``jaxconv tune``, are in the cache, in a document for each device,
version of JAX and version of jaxconv.
"""

import dataclasses
import gc
import gzip
import hashlib
import json
import math
import operator
import os
import platform as system
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache as once
from functools import lru_cache, partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv.algorithms.base import prepared
from jaxconv.config import config, listeners, several_processes
from jaxconv.planning import cache
from jaxconv.spec import ConvSpec


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where rows were measured.

    Attributes:
      platform: "cpu", "gpu", "tpu", …
      processor: its class: architecture, vendor, family, and whether it has AVX-512.
      cores: that each device of the process could use while all were busy.
      jax: the version.
      own: whether it is the user's, this very one.
      note: date and command; the same for machines that are otherwise equal.
    """

    platform: str
    processor: str
    cores: int
    jax: str
    own: bool = False
    note: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Row:
    """One convolution on one machine.

    Attributes:
      spec: the convolution, in the canonical layout.
      seconds: of each algorithm that was measured, the median.
      compile_seconds: likewise.
      place: where it is among others, see ``predict.place``; None where it was not computed yet.
    """

    spec: ConvSpec
    machine: Machine
    seconds: Mapping[str, float]
    compile_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    place: Sequence[float] | None = dataclasses.field(default=None, compare=False)


# A spec as JSON


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
    precision = fields.get("precision")
    return ConvSpec(
        lhs_shape,
        rhs_shape,
        tuple(fields.get("window_strides", ones)),
        tuple(map(tuple, fields.get("padding", ((0, 0),) * len(ones)))),
        tuple(fields.get("lhs_dilation", ones)),
        tuple(fields.get("rhs_dilation", ones)),
        dtype,
        _dtype(fields["out_dtype"]) if "out_dtype" in fields else dtype,
        precision=tuple(lax.Precision[name] for name in precision) if precision else DEFAULT,
        **{name: fields[name] for name in AS_THEY_ARE if name in fields},
    )


AS_THEY_ARE = "feature_group_count", "batch_group_count", "weight_gradient"
AS_THEY_ARE += "channels_first", "kernel_order"
DEFAULT = (lax.Precision.DEFAULT, lax.Precision.DEFAULT)
_text = partial(json.dumps, default=operator.attrgetter("name"))  # of dtypes and precisions
_dtype = once(lambda name: np.dtype(getattr(jnp, name)))  # NumPy alone does not know bfloat16


def key(spec: ConvSpec) -> str:
    """``spec`` as text, the same in every process."""
    return _text(fields_of(spec))


# The package's rows


def read(lines: Sequence[str], wanted: Collection[Machine] | None = None) -> Iterator[Row]:
    """The rows in a file of the package, of the ``wanted`` machines only."""
    machines = read_machines(lines)
    for fields, place, *measured in map(json.loads, lines[1:]):
        taken = [entry for entry in measured if wanted is None or machines[entry[0]] in wanted]
        spec = spec_of(fields)
        for which, times, compiling in taken:
            seconds = {name: time / 1e3 for name, time in times.items()}
            yield Row(spec, machines[which], seconds, compiling, place)


def written(rows: Sequence[Row], place: Callable[[ConvSpec], Sequence[float]]) -> Iterator[str]:
    """The lines that ``read`` reads; ``place`` as in ``predict``."""
    machines = list(dict.fromkeys(row.machine for row in rows))
    yield json.dumps([dataclasses.asdict(machine) for machine in machines])
    lines: dict[ConvSpec, list[Any]] = {}
    for row in rows:
        times = {name: _rounded(1e3 * time, 3) for name, time in row.seconds.items()}
        compiling = {name: _rounded(time, 2) for name, time in row.compile_seconds.items()}
        entry = [machines.index(row.machine), times, compiling]
        if row.spec not in lines:
            rounded = [round(x, 3) if x % 1 else int(x) for x in place(row.spec)]
            lines[row.spec] = [fields_of(row.spec), rounded]
        lines[row.spec].append(entry)
    yield from map(_text, lines.values())


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def read_machines(lines: Sequence[str]) -> list[Machine]:
    """The machines in a file of the package."""
    return [Machine(**fields) for fields in json.loads(lines[0])]


@once
def _package_lines() -> list[str]:
    file = resources.files("jaxconv.planning") / "data" / "rows.jsonl.gz"
    return gzip.decompress(file.read_bytes()).decode().splitlines()


def package_machines() -> list[Machine]:
    """The machines that the package has rows of."""
    return read_machines(_package_lines())


@lru_cache
def package_rows(wanted: tuple[Machine, ...] | None = None) -> tuple[Row, ...]:
    """The rows that the package comes with, of the ``wanted`` machines only."""
    # So many new objects make Python 3.11 look through all of JAX's: 120 ms instead of 70.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return tuple(read(_package_lines(), wanted))
    finally:
        if collecting:
            gc.enable()


# This machine


@lru_cache
def here(platform: str) -> Machine:
    """The machine that this process runs on; where there are several processes, any machine."""
    if several_processes():  # 2 cores, as most of the package's rows
        return Machine(platform, "", 2, jax.__version__, own=True)
    kinds = _devices(platform)
    processor = processor_class() if platform == "cpu" else (kinds or [platform])[0]
    share = max(1, (cores() or 1) // max(1, len(kinds)))
    return Machine(platform, processor, share, jax.__version__, own=True)


def processor() -> str:
    """The processor's model."""
    return _cpuinfo().get("model name") or system.processor() or system.machine()


def processor_class() -> str:
    """What decides which algorithm is fast: architecture, vendor and family of the processor, where
    the system reports them, and whether it has AVX-512 and XLA may use it."""
    facts = _cpuinfo()
    known = [facts[name] for name in ("vendor_id", "cpu family") if name in facts]
    has = "avx512f" in facts.get("flags", "").split()
    wide = ["with AVX-512"] if has and _limit() not in ("SSE4_2", "AVX", "AVX2") else []
    return " ".join([system.machine().lower(), *known, *wide])


def _limit() -> str:
    """The instruction set that ``XLA_FLAGS`` limit XLA:CPU to; empty where they do not."""
    match = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    return match[1].upper() if match else ""


@once
def _cpuinfo() -> Mapping[str, str]:
    """What Linux reports of the first core; empty on other systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines()]
    except OSError:
        return {}
    return {line[0].strip(): line[1].strip() for line in lines if line[1:]}


def cores() -> int | None:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _devices(platform: str) -> list[str]:
    """The kinds of this process's devices."""
    try:
        return [device.device_kind for device in jax.local_devices(backend=platform)]
    except RuntimeError:
        return []


@lru_cache
def version() -> str:
    """The version of jaxconv, "unknown" where it is not installed."""
    try:
        return metadata.version("jaxconv")
    except metadata.PackageNotFoundError:
        return "unknown"


# The user's rows


@lru_cache
def fingerprint(platform: str) -> Mapping[str, str] | None:
    """Device and versions that the user's rows are valid for; None if there is no such device."""
    kinds = _devices(platform)
    if platform == "cpu":  # JAX calls every processor "cpu"
        shared = f" for {len(kinds)} devices" if len(kinds) > 1 else ""
        limit = f", up to {_limit()}" if _limit() else ""
        kinds = [f"{processor()}, {cores()} cores{shared}{limit}"]
    return {"device": kinds[0], "jax": jax.__version__, "jaxconv": version()} if kinds else None


def document_name(identity: Mapping[str, str]) -> str:
    """The document's name: readable, and unique for each fingerprint."""
    text = "-".join(identity.values())
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"rows-{re.sub('[^a-z0-9.]+', '-', text.lower())[:80]}-{digest}"


def _problem(identity: Mapping[str, str], document: cache.Document) -> str | None:
    """What is wrong with a document that should be of ``identity``; None if it is valid."""
    if document.get("fingerprint") != identity:
        return "it is of another device or version"
    return None if isinstance(document.get("rows"), dict) else "it has no rows"


@lru_cache
def own_rows(platform: str) -> Mapping[ConvSpec, Row]:
    """The user's rows for this device and these versions, by their prepared specs; empty if
    ``use_cache`` is off, and where there are several processes, each of which has its own."""
    identity = fingerprint(platform) if config.use_cache and not several_processes() else None
    if identity is None:
        return {}
    name = document_name(identity)
    document = cache.load(name, partial(_problem, identity))
    rows = {}
    for text, entry in (document or {"rows": {}})["rows"].items():
        row = _own_row(text, entry, here(platform))
        if row is None:
            cache.warn(name, f"{name!r} holds an invalid entry ({entry!r:.200}), which is ignored")
        else:
            rows[prepared(row.spec)] = row
    return rows


def _own_row(text: str, entry: Any, machine: Machine) -> Row | None:
    """The row in an entry of the document; None if the entry is invalid."""
    try:
        seconds, compiling = (dict(entry[name]) for name in ("seconds", "compile_seconds"))
        good = all(0 < time < math.inf for time in (*seconds.values(), *compiling.values()))
        row = Row(spec_of(json.loads(text)), machine, seconds, compiling)
        return row if good and seconds else None
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def record(rows: Sequence[Row], platform: str) -> None:
    """Keeps rows in the user's cache, replacing earlier ones of the same convolutions."""
    identity = fingerprint(platform)
    if identity is None:
        return
    new = {
        key(row.spec): {
            "seconds": {name: _rounded(time, 4) for name, time in row.seconds.items()},
            "compile_seconds": {n: _rounded(time, 2) for n, time in row.compile_seconds.items()},
        }
        for row in rows
    }

    def merged(document: cache.Document) -> cache.Document:
        return {"fingerprint": identity, "rows": document.get("rows", {}) | new}

    cache.update(document_name(identity), merged, partial(_problem, identity))
    own_rows.cache_clear()


def file(platform: str) -> Path | None:
    """Where the user's rows are kept; None where they are known to this process only."""
    identity = fingerprint(platform)
    if identity is None or config.cache_dir is None:
        return None
    path = config.cache_dir / f"{document_name(identity)}.json"
    return path if path.exists() else None


def forget(platform: str) -> int:
    """Drops the user's rows for this device and these versions; returns how many there were."""
    identity = fingerprint(platform)
    if identity is None:
        return 0
    name, check = document_name(identity), partial(_problem, identity)
    count = len((cache.load(name, check) or {"rows": {}})["rows"])
    if count:
        cache.update(name, lambda _: {"fingerprint": identity, "rows": {}}, check)
        own_rows.cache_clear()
    return count


listeners.append(own_rows.cache_clear)
