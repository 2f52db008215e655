"""Measuring one thing by lax, by jaxconv and by PyTorch, and checking that all agree."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from jaxconv.planning.timing import Compiled, alternate

# Seconds after which threads of PyTorch no longer spin: 2 taps on 4×199×512 by jaxconv took 3.7 ms
# 2 ms after a call of PyTorch, 2.5 ms from 10 ms on.
SETTLE = 0.015

Pairs = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long one pairing is measured: so many pairs and about so many seconds at most, less where
    the ratio is known to ``precision`` before, ``fewest`` at least; see ``timing.alternate``."""

    pairs: int = 101
    seconds: float = 1.0
    precision: float = 0.01
    fewest: int = 3


ENOUGH = Effort()


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of a suite.

    Attributes:
      suite, name, direction: what was measured.
      how: the algorithms that "auto" took, or "accelerate" or "enable".
      lax: seconds of lax and of jaxconv, called in turn.
      torch: seconds of PyTorch and of jaxconv; empty without PyTorch.
      lower_seconds, xla_seconds: of lax and of jaxconv, before XLA's compiler and in it.
      workspace: bytes of intermediate arrays of lax and of jaxconv.
      difference: the largest difference from lax, over the largest value.
      torch_difference: the same of PyTorch's result; None without PyTorch.
      tolerance: what both must stay below.
      errors: root mean square error of lax and of jaxconv against float64, over the root mean
        square; None where it was not measured.
      flops, traffic: operations, and bytes of operands and result; 0 where unknown.
    """

    suite: str
    name: str
    direction: str
    how: str
    lax: Pairs
    torch: Pairs
    lower_seconds: tuple[float, float]
    xla_seconds: tuple[float, float]
    workspace: tuple[int | None, int | None]
    difference: float
    torch_difference: float | None
    tolerance: float
    errors: tuple[float, float] | None = None
    flops: int = 0
    traffic: int = 0

    def quartiles(self, peer: str) -> tuple[float, float, float]:
        """First, median and third of the time of ``peer``, "lax" or "torch", over jaxconv's: above
        1 is faster than the peer."""
        low, median, high = np.quantile(self.ratios(peer), (0.25, 0.5, 0.75))
        return float(low), float(median), float(high)

    def ratios(self, peer: str) -> np.ndarray:
        """Pair by pair; see ``quartiles``."""
        return np.array([other / own for other, own in getattr(self, peer)])

    @property
    def seconds(self) -> float:
        """Median time of jaxconv."""
        return float(np.median([own for _, own in self.lax]))

    @property
    def error_ratio(self) -> float | None:
        """jaxconv's error over lax's; 1 where both are exact."""
        if self.errors is None:
            return None
        by_lax, own = self.errors
        return own / by_lax if by_lax else 1.0 if own == 0 else float("inf")

    @property
    def wrong(self) -> str | None:
        """Which results disagree with lax's, in words; None where none does."""
        for who, found in (("jaxconv", self.difference), ("PyTorch", self.torch_difference)):
            if found is not None and not found < self.tolerance:
                return (
                    f"{self.name}, {self.direction}: {who} is off by {found:.1e} of the largest"
                    f" value, more than {self.tolerance:.0e}"
                )
        return None


@cache
def torch_peer() -> Any:
    """The module that runs PyTorch; None where it is not installed."""
    try:
        from jaxconv.bench import torch_peer
    except ModuleNotFoundError:
        return None
    return torch_peer


def measure(
    effort: Effort,
    baseline: Compiled,
    subject: Compiled,
    peer: Any = None,
    compared: Callable[[Any], Any] = lambda output: output,
    slack: Any = None,
    **facts: Any,
) -> Result:
    """Times and compares.

    Args:
      baseline, subject: by lax and by jaxconv.
      peer: a ``torch_peer.TorchCall``; None without PyTorch.
      compared: from an output to what is compared, a tree of arrays.
      slack: the same tree of what differences are allowed besides; default: none.
      facts: the rest of ``Result``.
    """
    peer_output = None
    if peer is not None:
        # The first: a training step of PyTorch changes its parameters.
        peer.call()
        peer_output = compared(peer.as_jax(peer.output))
    timed = partial(
        alternate,
        rounds=effort.pairs,
        seconds=effort.seconds,
        precision=effort.precision,
        fewest=effort.fewest,
    )
    by_lax = timed((baseline, subject))
    by_torch = []
    if peer is not None:
        by_torch = timed((peer, subject), settle=SETTLE)
    expected = compared(baseline.output)
    return Result(
        lax=tuple(by_lax),
        torch=tuple(by_torch),
        lower_seconds=(baseline.lower_seconds, subject.lower_seconds),
        xla_seconds=(baseline.xla_seconds, subject.xla_seconds),
        workspace=(baseline.workspace, subject.workspace),
        difference=difference(expected, compared(subject.output), slack),
        torch_difference=None if peer is None else difference(expected, peer_output, slack),
        **facts,
    )


def difference(expected: Any, found: Any, slack: Any = None) -> float:
    """The largest difference over the largest value, of the worst array of two trees; NaN or
    infinite where one of them holds what is not finite.

    ``slack``: the same tree of what is taken off the differences.
    """
    slack = jax.tree.map(lambda _: 0.0, expected) if slack is None else slack

    def of_array(expected: Any, found: Any, slack: float) -> float:
        wide = np.asarray(expected, np.float64)
        off = np.maximum(np.max(np.abs(np.asarray(found, np.float64) - wide)) - slack, 0.0)
        return float(off / max(np.max(np.abs(wide)), np.finfo(np.float64).tiny))

    return float(np.max(jax.tree.leaves(jax.tree.map(of_array, expected, found, slack))))
