"""Sharded over four devices of the host, which a process of its own has: ``sharded.py``."""

from pathlib import Path

import children
import pytest

PARTS = 13


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.exhaustive) for i in range(1, PARTS))]
)
def test_sharded(part: int) -> None:
    """Every thirteenth check."""
    script = Path(__file__).parent / "sharded.py"
    assert children.output(4, script, f"{part}", f"{PARTS}") == "done\n"
