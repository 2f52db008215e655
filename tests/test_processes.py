"""A program of two processes, ``processes.py``, that talk to each other on this machine."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import children
import pytest
from processes import DEVICES, PROCESSES


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


pytestmark = pytest.mark.exhaustive  # four processes that compile: 20 seconds


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process reports."""
    address, script = f"127.0.0.1:{free_port()}", Path(__file__).parent / "processes.py"
    reports = [tmp_path_factory.mktemp("process") / f"{i}.json" for i in range(PROCESSES)]

    def run(process: int) -> Any:
        children.output(DEVICES, script, address, str(process), reports[process])
        return json.loads(reports[process].read_text())

    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(run, range(PROCESSES)))


def test_training_is_as_in_one_process(reports: list[dict[str, Any]]) -> None:
    assert all(report["error"] < 1e-11 for report in reports)


def test_processes_plan_alike(reports: list[dict[str, Any]]) -> None:
    """Whatever is in their caches."""
    one, other = reports
    assert one == other
    assert {line.rpartition(": ")[2] for line in one["plans"]} - {"xla"}
