"""Interleaved timing: A B A B in one process.

Other load on the machine changes times by 30 % and more from second to second, but affects both of
a pair alike: ratios are reproducible where times are not.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

FEWEST = 5  # rounds before which no ratio counts as settled
# Limits on the first calls of something whose time is unknown: their number and total seconds.
FIRST_CALLS, FIRST_SECONDS = 4, 0.2


@dataclasses.dataclass
class Call:
    """A function without arguments, to be timed."""

    function: Callable[[], Any]
    as_jax: Callable[[Any], Any] = lambda x: x  # converts its output to JAX's layout
    output: Any = None  # of the last call

    def call(self) -> float:
        """Calls it once and returns the seconds."""
        start = time.perf_counter()
        self.output = self.function()
        return time.perf_counter() - start


class Compiled(Call):
    """A function compiled for its arguments."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        start = time.perf_counter()
        self.compiled = compiled = jax.jit(function).lower(*args).compile()
        self.compile_seconds = time.perf_counter() - start  # tracing and lowering included
        # Bytes of intermediate arrays; None where the backend doesn't report them.
        analysis = compiled.memory_analysis()
        self.workspace: int | None = getattr(analysis, "temp_size_in_bytes", None)
        super().__init__(lambda: jax.block_until_ready(compiled(*args)))


def alternate(
    subjects: Sequence[Call],
    rounds: int,  # the maximum
    seconds: float = float("inf"),  # after which no further round is begun
    precision: float = 0.0,
    settle: float = 0.0,
    fewest: int = 1,  # the minimum of rounds
) -> list[tuple[float, ...]]:
    """Seconds of each subject, called in turn after one warm-up call each.

    Measuring ends once the ratios of the first to the others have this ``precision``: interquartile
    range over the median and the square root of the number of rounds. Each is called for ``settle``
    seconds before it is timed: threads of other runtimes keep spinning for a while.
    """
    start = time.perf_counter()
    for subject in subjects:
        subject.call()
    measured: list[tuple[float, ...]] = []
    while len(measured) < rounds:
        times = []
        for subject in subjects:
            begun = time.perf_counter()
            while time.perf_counter() - begun < settle:
                subject.call()
            times.append(subject.call())
        measured.append(tuple(times))
        if len(measured) >= fewest and time.perf_counter() - start > seconds:
            break
        if precision and len(measured) >= FEWEST and _uncertainty(measured) < precision:
            break
    return measured


def quickest(call: Callable[[], float]) -> float:
    """The fastest of a few calls, which return their seconds: a single one occasionally takes ten
    times as long, and the first is the slowest."""
    calls = [call()]
    while len(calls) < FIRST_CALLS and sum(calls) < FIRST_SECONDS:
        calls.append(call())
    return min(calls)


def _uncertainty(measured: Sequence[tuple[float, ...]]) -> float:
    """The largest relative uncertainty of the median ratios."""
    times = np.array(measured)
    low, median, high = np.quantile(times[:, :1] / times[:, 1:], (0.25, 0.5, 0.75), axis=0)
    return float(np.max((high - low) / median)) / len(times) ** 0.5
