"""A program of two processes, ``processes.py``, that talk to each other on this machine."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from children import environment
from processes import DEVICES, PROCESSES

SECONDS = 120.0  # after which they are taken to wait for each other for ever


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(folder: Path) -> list[dict[str, Any]]:
    """What each process reports. If one fails or hangs, all are killed, and their output shown."""
    address = f"127.0.0.1:{free_port()}"
    files = [(folder / f"{i}.json", folder / f"{i}.txt") for i in range(PROCESSES)]
    running: list[subprocess.Popen[bytes]] = []
    for i, (report, output) in enumerate(files):
        options = "-X", "faulthandler", "-W", "error", Path(__file__).parent / "processes.py"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *options, address, str(i), report],
                env=environment(DEVICES) | {"JAXCONV_CACHE_DIR": str(folder / f"cache {i}")},
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            running.append(process)
    end = time.monotonic() + SECONDS
    try:
        # One that failed leaves the other waiting.
        while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for process in running:
            process.send_signal(signal.SIGABRT)  # it prints where it is, and ends
            process.wait()
    codes = [process.returncode for process in running]
    texts = (output.read_text(errors="replace") for _, output in files)
    assert codes == [0] * PROCESSES, "\n".join([f"exit codes {codes}", *texts])
    return [json.loads(report.read_text()) for report, _ in files]


pytestmark = pytest.mark.exhaustive  # four processes that compile: 20 seconds


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process reports."""
    return run(tmp_path_factory.mktemp("processes"))


def test_training_is_as_in_one_process(reports: list[dict[str, Any]]) -> None:
    assert all(report["error"] < 1e-11 for report in reports)


def test_processes_plan_alike(reports: list[dict[str, Any]]) -> None:
    """Whatever is in their caches."""
    one, other = reports
    assert one == other
    assert {line.rpartition(": ")[2] for line in one["plans"]} - {"xla"}
