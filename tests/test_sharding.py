"""Sharded over four devices of the host, which a process of its own has: ``sharded.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded


@pytest.fixture(scope="session")
def report() -> dict[str, str]:
    """The line that each check printed, by the check's name."""
    tests = Path(__file__).parent
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-W", "error", tests / "sharded.py"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = process.stdout.splitlines()
    assert process.returncode == 0, process.stderr
    return {
        name: next((line for line in lines if line.partition(" ")[2].startswith(name)), "not run")
        for name in sharded.names()
    }


@pytest.mark.parametrize("name", sharded.names())
def test_sharded(name: str, report: dict[str, str]) -> None:
    assert report[name] == f"ok {name}"
