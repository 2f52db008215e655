"""The machine: what it is, and what it can do at best."""

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxconv.planning.measured import processor


def description() -> dict[str, Any]:
    """CPU, cores, bytes of memory, versions, peak FLOP/s of an f32 GEMM, bytes/s of memory."""
    return {
        "cpu": processor(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "memory": _memory(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("jaxconv", "jax", "jaxlib", "numpy", "torch")},
        "gemm": gemm_peak(),
        "bandwidth": bandwidth(),
    }


def gemm_peak(size: int = 1024, seconds: float = 1.0) -> float:
    """FLOP/s of an f32 matrix product, the best of several."""
    x = jnp.ones((size, size), jnp.float32)
    return 2 * size**3 / _best(jax.jit(jnp.dot), x, x, seconds=seconds)


def bandwidth(size: int = 1 << 26, seconds: float = 1.0) -> float:
    """Bytes/s read and written in place of f32 numbers larger than the caches, best of several."""
    # In place: the page faults of a new array would cost more than the bytes.
    function = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = function(jnp.ones(size, jnp.float32))

    def step() -> Array:
        nonlocal x
        x = function(x)
        return x

    return 2 * x.nbytes / _best(step, seconds=seconds)


def _best(function: Callable[..., Any], *args: Any, seconds: float) -> float:
    jax.block_until_ready(function(*args))
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        best = min(best, time.perf_counter() - start)
    return best


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows, macOS
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
