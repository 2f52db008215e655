"""Measurements on this machine: the fastest algorithm for a convolution, and how fast it is.

Winners come from ``autotune``; scales, factors of predicted times, from ``jaxconv tune``.
The cache has a document of each for each device, version of JAX and version of jaxconv.
"""

import dataclasses
import enum
import hashlib
import math
import os
import platform as system
import re
from collections.abc import Mapping
from functools import lru_cache, partial
from importlib import metadata
from typing import Any

import jax
import numpy as np

from jaxconv import tables
from jaxconv.algorithms import ALGORITHMS
from jaxconv.config import config
from jaxconv.planning import cache
from jaxconv.spec import ConvSpec


def key(spec: ConvSpec) -> str:
    """``spec`` as text: all its fields, the same in every process."""
    fields = dataclasses.fields(spec)
    return " ".join(f"{field.name}={_text(getattr(spec, field.name))}" for field in fields)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({','.join(map(_text, value))})"
    if isinstance(value, (np.dtype, enum.Enum)):
        return value.name
    return str(value)


@lru_cache
def fingerprint(platform: str) -> Mapping[str, str] | None:
    """Device and versions that a measurement is valid for; None if there is no such device."""
    if platform == "cpu":
        device = f"{processor()}, {_cores()} cores"  # JAX calls every processor "cpu"
    else:
        try:
            device = jax.devices(platform)[0].device_kind
        except RuntimeError:
            return None
    return {"device": device, "jax": jax.__version__, "jaxconv": version()}


@lru_cache
def version() -> str:
    """The version of jaxconv, "unknown" where it is not installed."""
    try:
        return metadata.version("jaxconv")
    except metadata.PackageNotFoundError:
        return "unknown"


def processor() -> str:
    """The processor's model."""
    model = system.processor() or system.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            match = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
        return match[1].strip() if match else model
    except OSError:  # not Linux
        return model


def _cores() -> int | None:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _name(identity: Mapping[str, str], what: str = "winners") -> str:
    """The document's name: readable, and unique for each fingerprint."""
    text = "-".join(identity.values())
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{what}-{re.sub('[^a-z0-9.]+', '-', text.lower())[:80]}-{digest}"


def _problem(
    identity: Mapping[str, str], document: cache.Document, what: str = "winners"
) -> str | None:
    """What is wrong with a document; None if it is valid."""
    if document.get("fingerprint") != identity:
        return "it is of another device or version"
    return None if isinstance(document.get(what), dict) else f"it has no {what}"


@dataclasses.dataclass(frozen=True)
class Winner:
    """The fastest algorithm for a convolution.

    Attributes:
      algorithm: its name.
      seconds: its median time.
      ratio: the time of lax's convolution over its own; None where lax's can't run.
    """

    algorithm: str
    seconds: float
    ratio: float | None

    @property
    def why(self) -> str:
        figures = tables.milliseconds(self.seconds)
        if self.ratio is not None:
            figures += f", {self.ratio:.2f} times as fast as lax's"
        return f"it was measured fastest on this machine ({figures})"


def winner(spec: ConvSpec, platform: str) -> Winner | None:
    """The measured winner for ``spec``; None if there is none or ``use_cache`` is off."""
    identity = fingerprint(platform) if config.use_cache else None
    if identity is None:
        return None
    name = _name(identity)
    document = cache.load(name, partial(_problem, identity))
    entry = None if document is None else document["winners"].get(key(spec))
    if entry is None:
        return None
    valid = _winner(entry)
    if valid is None:
        cache.warn(name, f"{name!r} holds an invalid entry ({entry!r:.200}), which is ignored")
        return None
    return valid


def _winner(entry: Any) -> Winner | None:
    """The winner in an entry of the document; None if the entry is invalid."""
    if not isinstance(entry, dict) or entry.get("algorithm") not in list(ALGORITHMS):
        return None
    seconds, ratio = entry.get("seconds"), entry.get("ratio")
    if not isinstance(seconds, (int, float)) or not isinstance(ratio, (int, float, type(None))):
        return None
    return Winner(entry["algorithm"], seconds, ratio)


def record(spec: ConvSpec, platform: str, best: Winner) -> None:
    """Keeps the winner for ``spec`` in the cache, for this device and these versions."""
    identity = fingerprint(platform)
    if identity is None:
        return

    def merged(document: cache.Document) -> cache.Document:
        winners = document.get("winners", {}) | {key(spec): dataclasses.asdict(best)}
        return {"fingerprint": identity, "winners": winners}

    cache.update(_name(identity), merged, partial(_problem, identity))


def scales(platform: str) -> Mapping[str, float]:
    """Factors of predicted times on this machine; empty if not tuned or ``use_cache`` is off."""
    identity = fingerprint(platform) if config.use_cache else None
    if identity is None:
        return {}
    name = _name(identity, "scales")
    document = cache.load(name, partial(_problem, identity, what="scales"))
    factors = {} if document is None else document["scales"]
    good = {k: v for k, v in factors.items() if isinstance(v, (int, float)) and 0 < v < math.inf}
    if len(good) < len(factors):
        cache.warn(name, f"{name!r} holds invalid factors, which are ignored")
    return good


def record_scales(platform: str, factors: Mapping[str, float]) -> None:
    """Keeps factors of predicted times in the cache, replacing earlier ones."""
    identity = fingerprint(platform)
    if identity is not None:
        check = partial(_problem, identity, what="scales")
        document = {"fingerprint": identity, "scales": dict(factors)}
        cache.update(_name(identity, "scales"), lambda _: document, check)
