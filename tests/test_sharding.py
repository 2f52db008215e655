"""Sharded over four devices of the host, which a process of its own has: ``sharded.py``."""

from pathlib import Path

import children
import pytest
import sharded


@pytest.fixture(scope="session")
def report() -> dict[str, str]:
    """The line that each check printed, by the check's name."""
    lines = children.output(4, Path(__file__).parent / "sharded.py").splitlines()
    return {
        name: next((line for line in lines if line.partition(" ")[2].startswith(name)), "not run")
        for name in sharded.names()
    }


@pytest.mark.parametrize("name", sharded.names())
def test_sharded(name: str, report: dict[str, str]) -> None:
    assert report[name] == f"ok {name}"
