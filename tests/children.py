"""Commands in this process; Python in others, where JAX has several devices of the host."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many devices, which finds the tests' modules."""
    tests = Path(__file__).parent
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | quickly | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def output(devices: int, *arguments: Any) -> str:
    """What Python prints in a process that must succeed."""
    process = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``jaxconv`` with these arguments, in this process."""
    from jaxconv.app import app

    with pytest.raises(SystemExit) as exit_:
        app(list(map(str, arguments)))
    captured = capsys.readouterr()
    code = exit_.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err
