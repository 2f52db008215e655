"""``keep_memory``: page faults stop, and where it can't help it says so."""

import os
from pathlib import Path

import children
import jax
import pytest

import jaxconv
from jaxconv.tools import memory

try:
    GLIBC = os.confstr("CS_GNU_LIBC_VERSION") is not None
except (AttributeError, ValueError, OSError):
    GLIBC = False
glibc = pytest.mark.skipif(not GLIBC, reason="only glibc's allocator is told to keep memory")

# Pages that most of the last twenty of forty calls take anew from the system, of a program with 64
# MiB of intermediate arrays (16,384 pages). glibc before 2.38 has a few calls more to go until what
# it has kept fits, and on a busy machine another thread's arena may still grow in one call.
FAULTS = """
import resource
import jax, jax.numpy as jnp

x = jnp.ones((8, 1024, 1024))
stored = jax.lax.optimization_barrier
f = jax.jit(lambda x: jnp.flip(stored(stored(x + 1) * 2), 0).sum())
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(f(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[20:])[10])
"""
LEAST = 16_384


@glibc
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept"])
def test_memory_is_taken_from_the_system_once(kept: bool, tmp_path: Path) -> None:
    """By the function; and not by ``jaxconv run --no-keep-memory``."""
    script = tmp_path / "script.py"
    keep = "import jaxconv\nassert jaxconv.keep_memory()\nassert jaxconv.keep_memory()\n"
    script.write_text(keep * kept + FAULTS)
    command = () if kept else ("-m", "jaxconv", "run", "--no-keep-memory")
    faults = int(children.output(1, *command, script))
    assert faults < LEAST / 3 if kept else faults >= LEAST


@glibc
def test_too_late_is_said_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))  # in threads of their own
    monkeypatch.setattr(memory, "OPTIONS", {0: None})  # ctypes would refuse None
    with pytest.warns(UserWarning, match="keep_memory: too late: other threads") as log:
        assert jaxconv.keep_memory() is False
    assert log[0].filename == __file__


@pytest.mark.parametrize("system", ["Windows", "musl", "jemalloc"])
def test_where_there_is_nothing_to_do(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "nothing to do: memory is kept on Linux with glibc only"
    if system == "Windows":
        monkeypatch.delattr(os, "confstr", raising=False)
    elif system == "musl":
        unknown = lambda name: int(name)  # noqa: E731  # a ValueError, as for an unknown name
        monkeypatch.setattr(os, "confstr", unknown, raising=False)
    elif not GLIBC:
        pytest.skip("another allocator takes the place of glibc's")
    else:
        addresses = iter(range(2))
        monkeypatch.setattr(memory, "_address", lambda _: next(addresses))
        expected = "nothing to do: another allocator than glibc's is in use"
    with pytest.warns(UserWarning, match=f"jaxconv.keep_memory: {expected}"):
        assert jaxconv.keep_memory() is False
