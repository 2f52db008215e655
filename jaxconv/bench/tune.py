"""``tune``: makes predicted times those of this machine, within a minute.

A sample of random convolutions is timed by the algorithms that are predicted to be the fastest, and
by XLA. How far the predictions of each algorithm are off, on the median, is kept in the user's
cache as a factor; which shapes suit it is left as the package's data has it.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from jaxconv import tables
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared, refusal
from jaxconv.arguments import fail
from jaxconv.bench.calibrate import measure
from jaxconv.bench.regret import random_specs
from jaxconv.config import notify
from jaxconv.planning.choose import predicted_seconds
from jaxconv.planning.measured import record_scales, scales
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.predict import document_for, kind
from jaxconv.spec import ConvSpec

SEED = 7  # neither that of ``calibrate`` nor that of ``regret``
SECONDS = 50.0  # no convolution is begun later: with the last one, a minute
FLOPS = 3e8  # larger convolutions are left out: they take long and say the same
FASTEST = 4  # so many algorithms are timed for each convolution, besides XLA's
# Samples of a kind that count as much as what all kinds have in common. Of one kind's samples half
# lie 1.5-fold apart, which kinds hardly do: with each kind's own median of 2 to 28 samples the
# choices became worse (regret of 70 convolutions 1.27, untuned 1.21).
COMMON = 14


@dataclasses.dataclass(frozen=True)
class Scale:
    """How far predictions of a kind of algorithm were off.

    Attributes:
      kind: an algorithm, or its weight gradient.
      samples: convolutions it was timed on.
      factor: predictions are multiplied by it: the median of measured over predicted time, drawn
        to that of all kinds as far as there are few samples.
      spread: the quartiles of measured over predicted time.
    """

    kind: str
    samples: int
    factor: float
    spread: tuple[float, float]


HEADER = ("algorithm", "convolutions", "measured over predicted", "quartiles")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What ``tune`` measured. ``str()`` is a table."""

    platform: str
    convolutions: int
    rows: tuple[Scale, ...]

    def __str__(self) -> str:
        rows = [
            (r.kind, str(r.samples), f"{r.factor:.2f}", "{:.2f}–{:.2f}".format(*r.spread))
            for r in self.rows
        ]
        line = f"Timed {self.convolutions} random convolutions on {self.platform}."
        return f"{line}\n{tables.as_text([HEADER, *rows], right=(1, 2, 3))}"


def tune(seconds: float = SECONDS, shown: Callable[[str], None] = lambda _: None) -> Tuned:
    """Times convolutions for about ``seconds`` and keeps the factors of predicted times.

    Args:
      shown: called with each convolution before it is timed.

    Raises:
      ValueError: there are no predictions for this platform that factors could correct.
    """
    platform = jax.default_backend()
    if document_for(platform) is None:
        fail(
            "tune",
            "it takes a platform with measured predictions, the CPU",
            platform,
            "use jaxconv.autotune, which measures a program's own convolutions",
        )
    before = scales(platform)
    ratios: dict[str, list[float]] = defaultdict(list)
    end = time.perf_counter() + seconds
    count = 0
    for spec in _sample():
        if time.perf_counter() > end:
            break
        shown(str(spec))
        count += 1
        todo = prepared(spec)
        for name, taken in measure(spec, _candidates(spec, platform)).seconds.items():
            what = kind(ALGORITHMS[name], todo)
            unscaled = predicted_seconds(name, todo, platform) / before.get(what, 1.0)
            ratios[what].append(taken / unscaled)
    rows = _rows(ratios)
    record_scales(platform, {row.kind: row.factor for row in rows})
    notify()
    return Tuned(platform, count, rows)


def _rows(ratios: Mapping[str, list[float]]) -> tuple[Scale, ...]:
    common = np.median(np.log([ratio for found in ratios.values() for ratio in found]))
    rows = []
    for what, found in sorted(ratios.items()):
        low, own, high = np.quantile(found, (0.25, 0.5, 0.75))
        weight = len(found) / (len(found) + COMMON)
        factor = float(np.exp(common + weight * (np.log(own) - common)))
        rows.append(Scale(what, len(found), factor, (float(low), float(high))))
    return tuple(rows)


def _sample() -> Iterator[ConvSpec]:
    """Convolutions without end, the same in every process."""
    seed = SEED
    while True:
        for spec in random_specs(seed, 50):
            small = spec.flops <= FLOPS and spec.dtype == np.float32
            if small and refusal(ALGORITHMS["xla"], spec) is None:
                yield spec
        seed += 1


def _candidates(spec: ConvSpec, platform: str) -> list[str]:
    """What is timed: not those that hand parts on, whose time is that of other algorithms."""
    possible = [
        c
        for c in plan_spec(spec, platform).candidates
        if c.reason is None and not ALGORITHMS[c.name].by_name_only and not ALGORITHMS[c.name].parts
    ]
    possible.sort(key=lambda c: c.seconds)
    return list(dict.fromkeys([*(c.name for c in possible[:FASTEST]), "xla"]))
