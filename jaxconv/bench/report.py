"""The suites of ``jaxconv bench``, and the table and summary of their results."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version as version_of
from statistics import geometric_mean
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxconv import tables
from jaxconv.bench import regret
from jaxconv.bench.cases import LAYERS
from jaxconv.bench.measure import TITLES, Effort, Result, gemm_peak
from jaxconv.bench.programs import MODEL_EFFORT, MODELS, measure_layer, measure_model
from jaxconv.planning.machine import processor, version

SLOWER = 0.95  # the ratio below which jaxconv counts as slower than its peer
QUICK = Effort(5, 0.05, precision=0.0)


class Case(NamedTuple):
    name: str
    direction: str
    measure: Callable[[Effort], Result]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The part of a suite to run, see the options of ``jaxconv bench``; None for all."""

    case: re.Pattern[str] | None = None
    direction: str | None = None
    quick: bool = False
    specs: int = regret.COUNT
    torch: bool = False


class Suite(NamedTuple):
    cases: Callable[[int], Sequence[Case]]  # for a number of random ones
    few: slice  # those of a quick run
    effort: Effort  # of one case

    def selected(self, selection: Selection) -> list[Case]:
        """The cases of a selection; those selected by name also in a quick run."""
        cases, pattern = self.cases(selection.specs), selection.case
        if pattern is None:
            cases = cases[self.few] if selection.quick else cases
        else:
            cases = [case for case in cases if pattern.search(case.name)]
        return [case for case in cases if selection.direction in (None, case.direction)]

    def run(self, cases: Sequence[Case], selection: Selection) -> Iterator[str | Result]:
        """Measures cases. Yields the name of each, then its result."""
        effort = QUICK if selection.quick else self.effort
        for case in cases:
            yield ", ".join(filter(None, case[:2]))
            yield case.measure(dataclasses.replace(effort, torch=selection.torch))


def _all(measure: Callable[..., Result], subjects: Sequence[Any]) -> list[Case]:
    return [Case(x.name, d, partial(measure, x, d)) for x in subjects for d in x.directions]


def _random(count: int) -> list[Case]:
    specs = regret.random_specs(regret.SEED, count)
    return [Case(str(spec), "", partial(regret.measure_regret, spec)) for spec in specs]


SUITES = {
    "layers": Suite(lambda _: _all(measure_layer, LAYERS), slice(3, None, 31), Effort()),
    "models": Suite(lambda _: _all(measure_model, MODELS), slice(2), MODEL_EFFORT),
    "regret": Suite(_random, slice(4), regret.ENOUGH),
}
DIRECTIONS = tuple(dict.fromkeys(d for case in (*LAYERS, *MODELS) for d in case.directions))

HEADER = ("what", "direction", "how", "GEMMs × m×n×k", "lax", "jaxconv", "× lax (quartiles)")
HEADER += ("GFLOP/s", "of peak", "PyTorch", "× PyTorch (quartiles)")
HEADER += ("best", "regret", "compile", "workspace", "error")
WORDS = ("what", "direction", "how", "best")  # the other columns are figures
# Columns left out in a narrow terminal, the least important first.
SPARE = ("compile", "workspace", "GEMMs × m×n×k", "GFLOP/s", "PyTorch", "of peak", "lax")
SPARE += ("error", "jaxconv", "best", "how", "× PyTorch (quartiles)")


def table(results: Sequence[Result]) -> tables.Table:
    """A line for each result."""
    cells = map(_cells, results)
    rows = [HEADER, *([row.get(title, "–") for title in HEADER] for row in cells)]
    figures = [i for i, title in enumerate(HEADER) if title not in WORDS]
    return tables.Table(rows=rows, right=figures, spare=list(map(HEADER.index, SPARE)))


def _cells(result: Result) -> dict[str, str]:
    """What is known of it, by the titles of the columns."""
    cells = {"what": result.name, "direction": result.direction, "how": result.how}
    cells["best"] = result.best
    for peer, title in TITLES.items():
        if pairs := getattr(result, peer):
            cells[title] = tables.milliseconds(np.median(pairs, 0)[0])
            cells[f"× {title} (quartiles)"] = ratio(result, peer)
    cells["jaxconv"] = tables.milliseconds(np.median(result.lax, 0)[1])
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
    if result.regret is not None:
        cells["regret"] = f"{result.regret:.2f}"
    return cells


def ratio(result: Result, peer: str = "lax") -> str:
    """Its ratio to a peer's time, and the quartiles."""
    if result.is_lax and peer == "lax":
        return "= lax"
    return "{1:.3g} ({0:.3g}–{2:.3g})".format(*result.quartiles(peer))


def summary(results: Sequence[Result]) -> list[str]:
    """Lines that summarise the results of a suite: means, and the worst."""
    lines = []
    for peer, title in TITLES.items():
        ratios = [(r.quartiles(peer)[1], r) for r in results if getattr(r, peer)]
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


def machine(torch: bool = False) -> dict[str, Any]:
    """What results depend on: CPU, cores, FLOP/s of its matrix products, versions."""
    return {
        "cpu": processor(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "gemm": gemm_peak(),
        "jaxconv": version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "torch": version_of("torch") if torch else None,
    }
