"""The machine that this process runs on: what decides which algorithms are fast."""

import dataclasses
import os
import platform as system
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import metadata

import jax

from jaxconv.config import several_processes


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where convolutions were timed."""

    platform: str  # "cpu", "gpu", "tpu", …
    processor: str  # its class, see ``processor_class``
    cores: int  # that each device of the process could use while all were busy
    jax: str  # the version
    own: bool = False  # whether it is the user's, this very one
    note: str = dataclasses.field(default="", compare=False)  # date and command


@lru_cache
def here(platform: str) -> Machine:
    """The machine that this process runs on; where there are several processes, any machine."""
    if several_processes():  # 2 cores, as most of the package's rows
        return Machine(platform, "", 2, jax.__version__, own=True)
    kinds = devices(platform)
    processor = processor_class() if platform == "cpu" else (kinds or [platform])[0]
    share = max(1, (cores() or 1) // max(1, len(kinds)))
    return Machine(platform, processor, share, jax.__version__, own=True)


@lru_cache
def fingerprint(platform: str) -> str | None:
    """Device and versions that the user's rows are valid for; None if there is no such device."""
    kinds = devices(platform)
    if platform == "cpu":  # JAX calls every processor "cpu"
        shared = f" for {len(kinds)} devices" if len(kinds) > 1 else ""
        limit = f", up to {_limit()}" if _limit() else ""
        kinds = [f"{processor()}, {cores()} cores{shared}{limit}"]
    return f"{kinds[0]}, jax {jax.__version__}, jaxconv {version()}" if kinds else None


def processor() -> str:
    """The processor's model."""
    return _cpuinfo().get("model name") or system.processor() or system.machine()


def processor_class() -> str:
    """Architecture, vendor and family of the processor, where the system reports them, and whether
    it has AVX-512 and XLA may use it: what decides which algorithm is fast."""
    facts = _cpuinfo()
    known = [facts[name] for name in ("vendor_id", "cpu family") if name in facts]
    has = "avx512f" in facts.get("flags", "").split()
    wide = ["with AVX-512"] if has and _limit() not in ("SSE4_2", "AVX", "AVX2") else []
    return " ".join([system.machine().lower(), *known, *wide])


def _limit() -> str:
    """The instruction set that ``XLA_FLAGS`` limit XLA:CPU to; empty where they do not."""
    match = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    return match[1].upper() if match else ""


@cache
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


def devices(platform: str) -> list[str]:
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
