"""The suites of ``jaxconv bench``, and the table and summary of their results."""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version as version_of
from statistics import geometric_mean
from typing import Any

import jax
import numpy as np

from jaxconv import tables
from jaxconv.bench import regret
from jaxconv.bench.cases import FIELD, LAYERS
from jaxconv.bench.measure import PEERS, TITLES, Effort, Result, gemm_peak
from jaxconv.bench.programs import (
    LOOPS,
    MODEL_EFFORT,
    MODELS,
    PROGRAMS,
    convolutions_of,
    measure_layer,
    measure_program,
)
from jaxconv.bench.regret import SEED, measure_regret, random_specs, relatives
from jaxconv.planning.machine import processor, version

# Below this ratio jaxconv counts as slower than its peer.
SLOWER = 0.95
QUICK = Effort(5, 0.05, precision=0.0)
# What is measured, as progress shows it; its case and direction.
Selected = tuple[str, Any, str]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The part of a suite to run.

    Attributes:
      case: a regular expression to search for in the names; None for all.
      direction: one of the suite's; None for all.
      quick: only a few cases, each timed briefly.
      specs: the number of random convolutions for ``regret`` and ``relatives``.
      against: names of ``PEERS``.
    """

    case: re.Pattern[str] | None = None
    direction: str | None = None
    quick: bool = False
    specs: int = regret.COUNT
    against: tuple[str, ...] = ()


def name_of(case: Any) -> str:
    """The name that a case is selected by."""
    return getattr(case, "name", None) or str(case)


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of benchmarks.

    Attributes:
      measure: measures a case in a direction.
      cases: all of them, with directions; see ``name_of``.
      few: those of a quick run.
      effort: of one case.
    """

    measure: Callable[[Any, str, Effort], Result]
    cases: Callable[[Selection], Sequence[Any]]
    few: slice
    effort: Effort

    def run(self, cases: Sequence[Selected], selection: Selection) -> Iterator[str | Result]:
        """Measures selected cases. Yields the name of each, then its result."""
        effort = QUICK if selection.quick else self.effort
        effort = dataclasses.replace(effort, against=selection.against)
        for name, case, direction in cases:
            yield name
            yield self.measure(case, direction, effort)

    def selected(self, selection: Selection) -> Iterator[Selected]:
        """The cases of a selection; those selected by name also in a quick run."""
        cases = self.cases(selection)
        for case in cases[self.few] if selection.quick and selection.case is None else cases:
            name = name_of(case)
            if selection.case is not None and not selection.case.search(name):
                continue
            for direction in getattr(case, "directions", ("",)):
                if selection.direction in (None, direction):
                    yield f"{name}, {direction}" if direction else name, case, direction


def _relatives(selection: Selection) -> Sequence[Any]:
    return relatives(convolutions_of(FIELD), SEED, selection.specs)


SUITES = {
    "layers": Suite(measure_layer, lambda _: LAYERS, slice(1, None, 12), Effort()),
    "loops": Suite(measure_program, lambda _: LOOPS, slice(1, 3), Effort()),
    "programs": Suite(
        measure_program, lambda _: PROGRAMS, slice(1, None, 11), Effort(seconds=0.5, fewest=5)
    ),
    "models": Suite(measure_program, lambda _: MODELS, slice(1), MODEL_EFFORT),
    "regret": Suite(measure_regret, lambda s: random_specs(SEED, s.specs), slice(4), regret.ENOUGH),
    "relatives": Suite(measure_regret, _relatives, slice(4), regret.ENOUGH),
}
# Those of whole programs, whose operations can be timed.
PROFILED = ("models", "programs")
DIRECTIONS = tuple(
    dict.fromkeys(d for case in (*LAYERS, *LOOPS, *PROGRAMS, *MODELS) for d in case.directions)
)

PEER_COLUMNS = {name: (peer.title, f"× {peer.title} (quartiles)") for name, peer in PEERS.items()}
TIMES, RATIOS = zip(*PEER_COLUMNS.values(), strict=True)
HEADER = ("what", "direction", "how", "GEMMs × m×n×k", "lax", "jaxconv", "× lax (quartiles)")
HEADER += ("GFLOP/s", "of peak", *itertools.chain(*PEER_COLUMNS.values()))
HEADER += ("best", "regret", "compile", "workspace", "error")
WORDS = ("what", "direction", "how", "best")  # the other columns are figures
# Columns left out in a narrow terminal, the least important first.
SPARE = ("compile", "workspace", "GEMMs × m×n×k", "GFLOP/s", *TIMES, "of peak", "lax")
SPARE += ("error", "jaxconv", "best", "how", *reversed(RATIOS))


def table(results: Sequence[Result]) -> tables.Table:
    """A line for each result."""
    cells = map(_cells, results)
    rows = [HEADER, *([row.get(title, "–") for title in HEADER] for row in cells)]
    figures = [i for i, title in enumerate(HEADER) if title not in WORDS]
    return tables.Table(rows=rows, right=figures, spare=list(map(HEADER.index, SPARE)))


def _cells(result: Result) -> dict[str, str]:
    """What is known of it, by the titles of the columns."""

    def ratio(peer: str) -> str:
        low, median, high = result.quartiles(peer)
        return f"{median:.3g} ({low:.3g}–{high:.3g})"

    cells = {"what": result.name, "direction": result.direction, "how": result.how}
    cells["best"] = result.best
    cells["lax"], cells["jaxconv"] = map(tables.milliseconds, np.median(result.lax, axis=0))
    cells["× lax (quartiles)"] = "= lax" if result.is_lax else ratio("lax")
    cells["compile"] = "{:.2f} → {:.2f} s".format(*result.compile_seconds)
    sizes = ("–" if size is None else tables.mebibytes(size) for size in result.workspace)
    cells["workspace"] = " → ".join(sizes)
    cells["error"] = f"{result.difference:.0e}"
    if result.wrong:
        cells["error"] = "WRONG"
    elif result.error_ratio is not None:
        cells["error"] = f"{result.error_ratio:.2g} × lax's"
    if result.gemm is not None:
        cells["GEMMs × m×n×k"] = "{} × {}×{}×{}".format(*result.gemm)
    if result.rate is not None:
        cells["GFLOP/s"] = f"{result.rate / 1e9:.3g}"
        cells["of peak"] = "–" if result.peak is None else f"{result.rate / result.peak:.0%}"
    for peer, pairs in result.peers.items():
        time, times = PEER_COLUMNS[peer]
        cells[time], cells[times] = tables.milliseconds(np.median(pairs, 0)[0]), ratio(peer)
    if result.regret is not None:
        cells["regret"] = f"{result.regret:.2f}"
    return cells


def summary(results: Sequence[Result]) -> list[str]:
    """Lines that summarise the results of a suite: means, and the worst."""
    lines = []
    for peer, title in TITLES.items():
        ratios = [(r.quartiles(peer)[1], r) for r in results if peer in ("lax", *r.peers)]
        ratios.sort(key=lambda pair: pair[0])
        below = [f"  {ratio:.3g}: {r.label} ({r.how})" for ratio, r in ratios if ratio < SLOWER]
        if ratios:
            lines.append(
                f"against {title}: {geometric_mean(ratio for ratio, _ in ratios):.3g} times as fast"
                f" in the geometric mean of {len(ratios)}, {ratios[0][0]:.3g} at worst;"
                f" {len(below)} below {SLOWER}"
            )
        lines += below
    errors = [(r.error_ratio, r.label) for r in results if r.error_ratio is not None]
    if errors:
        worst, label = max(errors, key=lambda pair: (math.isnan(pair[0]), pair[0]))
        above = sum(not ratio <= 2 for ratio, _ in errors)
        lines.append(
            f"errors against float64: {above} of {len(errors)} above 2 × lax's; at worst"
            f" {worst:.2g}: {label}"
        )
    regrets = [(r.regret, r) for r in results if r.regret is not None]
    if regrets:
        regrets.sort(key=lambda pair: -pair[0])
        values = [value for value, _ in regrets]
        lines.append(
            f"regret of {len(regrets)}: {geometric_mean(values):.3f} in the geometric mean,"
            f" {np.quantile(values, 0.95):.3g} at the 95th percentile, {values[0]:.3g} at worst"
        )
        lines += [f"  {value:.2f}: {r.label}: {r.how}, best {r.best}" for value, r in regrets[:10]]
    return lines


def contents(results: Sequence[Result]) -> tables.Table:
    """The table and the summary of a suite's results."""
    rest = "a wider terminal has all, or --json"
    return dataclasses.replace(table(results), below=["", *summary(results)], rest=rest)


def machine(against: Sequence[str] = ()) -> dict[str, Any]:
    """What results depend on: CPU, cores, FLOP/s of its matrix products, versions."""
    return {
        "cpu": processor(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "gemm": gemm_peak(),
        "jaxconv": version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "peers": {name: version_of(PEERS[name].packages[0]) for name in against},
    }
