"""Timing in alternating pairs: A B A B in one process.

What else the machine does changes from second to second, by 30 % and more, and meets both of a pair
alike: the ratio holds where the times don't.
"""

import time
from collections.abc import Callable
from typing import Any

import jax


class Compiled:
    """A function compiled for its arguments, ready to be called and timed.

    Attributes:
      compile_seconds: of tracing, lowering and compiling.
      output: of the last call; None before it.
      workspace: bytes of intermediate arrays; None where the backend doesn't tell.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.args = args
        self.output: Any = None
        start = time.perf_counter()
        self.compiled = jax.jit(function).lower(*args).compile()
        self.compile_seconds = time.perf_counter() - start
        analysis = self.compiled.memory_analysis()
        self.workspace: int | None = getattr(analysis, "temp_size_in_bytes", None)

    def call(self) -> float:
        """Calls it once and returns the seconds."""
        start = time.perf_counter()
        self.output = jax.block_until_ready(self.compiled(*self.args))
        return time.perf_counter() - start


def alternate(
    baseline: Compiled, subject: Compiled, pairs: int, seconds: float = float("inf")
) -> list[tuple[float, float]]:
    """Seconds of the baseline and of the subject, called in turn after a call each to warm up.

    Args:
      pairs: how many at most.
      seconds: after which no further pair is begun; one is always measured.
    """
    for warmed_up in (baseline, subject):
        warmed_up.call()
    measured = []
    start = time.perf_counter()
    while len(measured) < pairs:
        measured.append((baseline.call(), subject.call()))
        if time.perf_counter() - start > seconds:
            break
    return measured
